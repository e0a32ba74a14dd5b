"""Stable Diffusion 3 (arXiv 2403.03206): its network, its view of prompts, its times, its file.

The network is an MM-DiT: text and image tokens, two streams with weights of their own that attend
jointly. Prompts are read by CLIP-L and CLIP-G; the third tower, T5, is left out. Parameter names of
the MM-DiT follow SD3's single file. The towers are in clip.py, the autoencoder is in vae.py.
"""
import functools
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from common import (
    Attention,
    FinalLayer,
    FP32Sequential,
    Mlp,
    PatchEmbed,
    TimestepEmbedder,
    modulate,
    sincos_pos_embed_2d,
)
from support.clip import CLIP_G, CLIP_L, CLIP_LENGTH, ClipText, load_tokenizer
from support.dataset import SyntheticData
from support.terminal import fail, first_line
from support.vae import SD3_VAE_META, load_sd3_part

# --------------------------------------------------------------------------------------------------
# MM-DiT. REPA's and HASTE's text-to-image models are the same with other sizes.
# --------------------------------------------------------------------------------------------------
SD3_MEDIUM = dict(in_channels=16, hidden_size=1536, depth=24, num_heads=24, context_dim=4096,
                  pooled_dim=2048, pos_embed_size=192)


class StreamAttention(Attention):
    """Attention in one stream: q, k, v before the streams meet; proj after, but for pre_only."""

    def __init__(self, dim, num_heads, qk_norm, pre_only):
        super().__init__(dim, num_heads)
        if pre_only:
            self.proj = nn.Identity()
        head_dim = dim // num_heads
        self.ln_q = nn.RMSNorm(head_dim, eps=1e-6) if qk_norm else nn.Identity()
        self.ln_k = nn.RMSNorm(head_dim, eps=1e-6) if qk_norm else nn.Identity()

    def split(self, h):
        q, k, v = super().split(h)
        return self.ln_q(q), self.ln_k(k), v


class StreamBlock(nn.Module):
    """One stream of a joint block.

    With pre_only it only gives keys and values to the other: so does the last block's text.
    """

    def __init__(self, hidden_size, num_heads, mlp_ratio, qk_norm, pre_only=False):
        super().__init__()
        self.pre_only = pre_only
        self.norm1 = nn.LayerNorm(hidden_size, eps=1e-6, elementwise_affine=False)
        self.attn = StreamAttention(hidden_size, num_heads, qk_norm, pre_only)
        if not pre_only:
            self.norm2 = nn.LayerNorm(hidden_size, eps=1e-6, elementwise_affine=False)
            self.mlp = Mlp(hidden_size, int(hidden_size * mlp_ratio))
        self.vectors = 2 if pre_only else 6  # shift and scale, or shift, scale and gate twice
        self.adaLN_modulation = FP32Sequential(
            nn.SiLU(), nn.Linear(hidden_size, self.vectors * hidden_size))

    def before(self, h, c):
        """Tokens h (B,N,D) to q, k, v (B,heads,N,D/heads), and the vectors that `after` needs."""
        shift, scale, *rest = self.adaLN_modulation(c).chunk(self.vectors, dim=1)  # (B,D) each
        return self.attn.split(modulate(self.norm1(h), shift, scale)), rest

    def after(self, h, attended, rest):
        """Tokens h, and what attention brought to their places, to the output, all (B,N,D)."""
        if self.pre_only:
            return h  # nobody reads it
        gate_a, shift_m, scale_m, gate_m = rest
        h = h + gate_a.unsqueeze(1) * self.attn.proj(attended)
        return h + gate_m.unsqueeze(1) * self.mlp(modulate(self.norm2(h), shift_m, scale_m))


class JointBlock(nn.Module):
    """Both streams through one attention over [text, image]."""

    def __init__(self, hidden_size, num_heads, mlp_ratio, qk_norm, is_last):
        super().__init__()
        self.context_block = StreamBlock(hidden_size, num_heads, mlp_ratio, qk_norm, is_last)
        self.x_block = StreamBlock(hidden_size, num_heads, mlp_ratio, qk_norm)

    def forward(self, text, h, c):
        """Text (B,n,D), image tokens h (B,N,D), c (B,D) -> text and h; the last keeps the text."""
        qkv_text, rest_text = self.context_block.before(text, c)
        qkv_h, rest_h = self.x_block.before(h, c)
        q, k, v = (torch.cat(pair, dim=2) for pair in zip(qkv_text, qkv_h))  # (B,heads,n+N,D/heads)
        attended = F.scaled_dot_product_attention(q, k, v)
        attended = attended.transpose(1, 2).flatten(2)  # (B,heads,n+N,D/heads) -> (B,n+N,D)
        attended_text, attended_h = attended.split([text.shape[1], h.shape[1]], dim=1)
        text = self.context_block.after(text, attended_text, rest_text)
        h = self.x_block.after(h, attended_h, rest_h)
        return text, h


class VectorEmbedder(nn.Module):
    """A vector (B,K), the pooled text, to (B,D)."""

    def __init__(self, dim, hidden_size):
        super().__init__()
        self.mlp = FP32Sequential(
            nn.Linear(dim, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size))

    def forward(self, vector):
        return self.mlp(vector)


class MMDiT(nn.Module):
    """Velocity network v(x_t, t, context, pooled).

    A method's own forward is made of `embed`, `blocks` and `head`. The table of positions is
    pos_embed_size squared and cut to the image from its centre. It is a buffer: SD3's comes with
    its file. pooled_dim 0: no pooled text. The network sees time_scale * t: SD3 counts to 1000,
    REPA to 1. A fresh model has PyTorch's own initial weights, as in the official codes.
    """

    def __init__(self, *, in_channels, hidden_size, depth, num_heads, context_dim, pooled_dim,
                 pos_embed_size, patch_size=2, mlp_ratio=4.0, qk_norm=False, time_scale=1000):
        super().__init__()
        self.patch_size = patch_size
        self.time_scale = time_scale
        self.x_embedder = PatchEmbed(patch_size, in_channels, hidden_size)
        self.t_embedder = TimestepEmbedder(hidden_size)
        if pooled_dim:
            self.y_embedder = VectorEmbedder(pooled_dim, hidden_size)
        self.context_embedder = nn.Linear(context_dim, hidden_size)
        pos_embed = sincos_pos_embed_2d(hidden_size, pos_embed_size).float()
        self.register_buffer("pos_embed", pos_embed.unsqueeze(0))  # (1,S*S,D)
        self.joint_blocks = nn.ModuleList()
        for i in range(depth):
            block = JointBlock(hidden_size, num_heads, mlp_ratio, qk_norm, is_last=i + 1 == depth)
            self.joint_blocks.append(block)
        self.final_layer = FinalLayer(hidden_size, patch_size, in_channels)

    @property
    def blocks(self):
        return self.joint_blocks

    def positions(self, rows, columns):
        """The central rows x columns of the position table: (1,rows*columns,D)."""
        size = math.isqrt(self.pos_embed.shape[1])
        top = (size - rows) // 2
        left = (size - columns) // 2
        table = self.pos_embed.unflatten(1, (size, size))  # (1,S,S,D)
        return table[:, top:top + rows, left:left + columns].flatten(1, 2)

    def embed(self, x_t, t, context, pooled=None):
        """x_t (B,C,H,W), t (B,), context (B,n,K), pooled (B,P) to text, h (B,N,D) and c (B,D)."""
        rows, columns = (side // self.patch_size for side in x_t.shape[-2:])
        c = self.t_embedder(self.time_scale * t)
        if pooled is not None:
            c = c + self.y_embedder(pooled)
        text = self.context_embedder(context)  # (B,n,D)
        h = self.x_embedder(x_t) + self.positions(rows, columns)
        return text, h, c

    def head(self, h, c, size):
        """Tokens h (B,N,D) to the velocity (B,C,H,W), float32; size = (H,W)."""
        h = self.final_layer(h, c).float()
        p = self.patch_size
        rows, columns = (side // p for side in size)
        h = h.view(len(h), rows, columns, p, p, -1)  # (B,N,p*p*C) -> (B,rows,columns,p,p,C)
        h = h.permute(0, 5, 1, 3, 2, 4)  # -> (B,C,rows,p,columns,p)
        return h.reshape(len(h), -1, *size)

    def forward(self, x_t, t, context, pooled=None):
        text, h, c = self.embed(x_t, t, context, pooled)
        for block in self.blocks:
            text, h = block(text, h, c)
        return self.head(h, c, x_t.shape[-2:])


# --------------------------------------------------------------------------------------------------
# Prompts and times
# --------------------------------------------------------------------------------------------------
@torch.no_grad()
def encode_prompts(tokenizer, clip_l, clip_g, ids):
    """SD3's text features from lists of ids: context (B,77,2048) and pooled (B,2048).

    The towers' features are concatenated. CLIP-L pads with end marks, and its vector is not
    projected; CLIP-G pads with 0, and its vector is.
    """
    contexts = []
    vectors = []
    for tower, fill in ((clip_l, tokenizer.end), (clip_g, 0)):
        device = tower.text_model["final_layer_norm"].weight.device
        padded = torch.tensor([tokenizer.pad(prompt, fill) for prompt in ids], device=device)
        context, vector = tower(padded)  # (B,77,D), (B,D)
        contexts.append(context)
        vectors.append(vector)
    return torch.cat(contexts, dim=-1), torch.cat(vectors, dim=-1)


def pad_context(context, context_dim, t5_tokens=CLIP_LENGTH):
    """(B,n,K) to (B,n+t5_tokens,context_dim) with zeros: SD3 without its third tower, T5."""
    return F.pad(context, (0, context_dim - context.shape[2], 0, t5_tokens))


def sd3_times(num_steps):
    """SD3's times: evenly from 1 to the least, which is shifted already, shifted again, then 0."""
    shifted = lambda t: 3 * t / (1 + 2 * t)
    times = shifted(np.linspace(1, shifted(0.001), num_steps))
    return [*times.tolist(), 0.0]


# --------------------------------------------------------------------------------------------------
# SD3's file holds the network and both towers; --bench has random data in its place
# --------------------------------------------------------------------------------------------------
def store_bf16(model):
    """Keep a frozen model's weights in bf16 where autocast would round them: half the memory."""
    for module in model.modules():
        for layer in module.children():
            is_rounded = isinstance(layer, (nn.Linear, nn.Conv2d))
            if is_rounded and not isinstance(module, FP32Sequential):  # that one leaves autocast
                layer.bfloat16()
    return model


def load_sd3_network(path=""):
    """SD3 medium's MM-DiT, frozen, fp32, on the CPU."""
    with torch.device("meta"):
        model = MMDiT(**SD3_MEDIUM)
    return load_sd3_part("network", model, path)


def load_sd3_text(path="", merges="", device="cpu"):
    """The function ids -> context (B,77,2048), pooled (B,2048), by both towers; the tokeniser."""
    with torch.device("meta"):
        clip_l = ClipText(**CLIP_L)
        clip_g = ClipText(**CLIP_G)
    clip_l = load_sd3_part("clip_l", clip_l, path).to(device)
    clip_g = load_sd3_part("clip_g", clip_g, path).to(device)
    tokenizer = load_tokenizer(merges)
    return functools.partial(encode_prompts, tokenizer, clip_l, clip_g), tokenizer


def read_prompts(path, sd3_ckpt, merges, device):
    """The prompts in a file, one per line, and features of them and, last, of no text.

    The features are context (N+1,77,2048) and pooled (N+1,2048), float16.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()  # with or without a mark
    except (OSError, ValueError) as error:
        fail(f"cannot read the prompts ({first_line(error)}): give --prompts FILE, one per line")
    prompts = [line.strip() for line in lines if line.strip()]
    encode, tokenizer = load_sd3_text(sd3_ckpt, merges, device)
    ids = [tokenizer.encode(prompt) for prompt in [*prompts, ""]]
    for prompt, prompt_ids in zip(prompts, ids):
        if len(prompt_ids) > CLIP_LENGTH - 2:
            fail(f"a prompt has {len(prompt_ids)} tokens, CLIP reads {CLIP_LENGTH - 2}: shorten "
                 f"{prompt[:40]!r}...")
    parts = [encode(ids[i:i + 64]) for i in range(0, len(ids), 64)]
    return prompts, [torch.cat(part).half() for part in zip(*parts)]


class RandomPairs(SyntheticData):
    """Random latents and text features of SD3's shapes, for --bench."""

    def __init__(self, resolution, rows=64):
        self.meta = SD3_VAE_META | dict(source="random", count=512)
        self.shape = (16, resolution // 8, resolution // 8)
        rng = np.random.default_rng(0)
        self.arrays = dict(
            moments=rng.random((rows, 32, *self.shape[1:]), np.float32),
            context=rng.random((rows, CLIP_LENGTH, 2048), np.float32),
            pooled=rng.random((rows, 2048), np.float32))
        self.names = list(self.arrays)

"""What every script here is built from: the SiT blocks, interpolants and samplers, frozen teachers, the reader of data.

Conventions, the same in all files (they are REPA's; the SiT paper's own time runs the other way):
    t = 0 is data, t = 1 is noise        x_t = a(t) x + s(t) noise        v = dx_t/dt = a'(t) x + s'(t) noise
    x clean input, x_t noisy, t time (B,), v velocity, y label (num_classes is the null label), c conditioning,
    h hidden tokens, z teacher features.  B batch, N tokens, D width, C channels, H W, K teacher width.
There is no training loop, no loss of a method and no command line here.
"""
import contextlib
import datetime
import functools
import itertools
import json
import math
import os
import pickle
import re
import signal
import subprocess
import sys
import time
from collections import OrderedDict
from pathlib import Path

import numpy as np
import torch
import torch.distributed.nn  # before any process group: else its defaults keep one alive, and a rank may abort at exit
import torch.nn as nn
import torch.nn.functional as F
from torch import distributed as dist
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm


def fail(message):
    """Stop the program with one line that names the remedy; of the ranks on one machine only the first speaks."""
    raise SystemExit(f"error: {message}" if os.environ.get("LOCAL_RANK", "0") == "0" else 1)


def say(message):
    """Print a line once for all ranks, above a progress bar if there is one."""
    if os.environ.get("RANK", "0") == "0":
        tqdm.write(message)


def first_line(error):
    """What an exception says, in one line: its first, or where a data process died of it, its last."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[-1 if "in DataLoader worker" in lines[0] else 0][:160]


def make_folder(path):
    """Create a folder for results, and those above it."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fail(f"cannot write to {path} ({first_line(error)}): choose another --out")


def process_group_backend(device):
    """The backends of the process group: NCCL for CUDA tensors, gloo for the stop signal and the barriers on the CPU.

    Without a name PyTorch (since 2.6) registers only the accelerator's, and a CPU tensor then has none.
    """
    return "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"


@contextlib.contextmanager
def first_rank_first():
    """Rank 0 goes first (it downloads, say), then the others, who find it done."""
    waits = dist.is_initialized() and dist.get_world_size() > 1
    if waits and dist.get_rank() > 0:
        dist.barrier()
    yield
    if waits and dist.get_rank() == 0:
        dist.barrier()


# ---------------------------------------------------------------------------------------------------------------------
# SiT: a transformer on image patches, conditioned on time and label by adaptive layer norm (arXiv 2401.08740).
# Parameter names follow the official SiT and REPA checkpoints, which load with strict=True.
# ---------------------------------------------------------------------------------------------------------------------
SIT_SIZES = {name: dict(hidden_size=96, depth=4, num_heads=4, patch_size=patch) for name, patch in [
    ("toy", 4), ("toy/2", 2)]} | {  # toy/2: for the toy's latents, see reals.py
    f"SiT-{name}/{patch}": dict(hidden_size=width, depth=depth, num_heads=heads, patch_size=patch)
    for name, width, depth, heads in [("S", 384, 12, 6), ("B", 768, 12, 12), ("L", 1024, 24, 16), ("XL", 1152, 28, 16)]
    for patch in (2, 4, 8)}


def modulate(h, shift, scale):
    """Adaptive layer norm's affine map: tokens h (B,N,D), shift and scale (B,D)."""
    return h * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


def timestep_embedding(t, dim=256, max_period=10000):
    """Sinusoids of the raw time t (...) in [0,1], cosines first: (...,dim)."""
    freqs = torch.exp(-math.log(max_period) * torch.arange(dim // 2, device=t.device) / (dim // 2))
    args = t.float()[..., None] * freqs
    return torch.cat([args.cos(), args.sin()], dim=-1)


def sincos_pos_embed_2d(dim, grid):
    """Fixed 2-D position table (grid*grid, dim), float64: the first half of the channels encodes the column."""
    omega = 1 / 10000 ** (np.arange(dim // 4) / (dim / 4))
    row, column = np.divmod(np.arange(grid * grid), grid)
    angles = [np.outer(position, omega) for position in (column, row)]
    return torch.from_numpy(np.concatenate([f(a) for a in angles for f in (np.sin, np.cos)], axis=1))


def init_linear(module):
    """Xavier-uniform weight and zero bias for a Linear; for nn.Module.apply."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


class FP32Sequential(nn.Sequential):
    """A Sequential that leaves autocast: bf16 would round the time embedding by more than a sampler step changes it."""

    def forward(self, x):
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x.float())


class PatchEmbed(nn.Module):
    """Image (B,C,H,W) to patch tokens (B,N,D), row by row."""

    def __init__(self, patch_size, in_channels, hidden_size):
        super().__init__()
        self.proj = nn.Conv2d(in_channels, hidden_size, patch_size, stride=patch_size)
        nn.init.xavier_uniform_(self.proj.weight.view(hidden_size, -1))  # as if it were a Linear
        nn.init.zeros_(self.proj.bias)

    def forward(self, x):
        return self.proj(x).flatten(2).transpose(1, 2)  # (B,D,h,w) -> (B,N,D)


class TimestepEmbedder(nn.Module):
    """Time t (B,) to a vector (B,D)."""

    def __init__(self, hidden_size, frequency_size=256):
        super().__init__()
        self.frequency_size = frequency_size
        self.mlp = FP32Sequential(
            nn.Linear(frequency_size, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size))

    def forward(self, t):
        return self.mlp(timestep_embedding(t, self.frequency_size))


class LabelEmbedder(nn.Module):
    """Label y (B,) to a vector (B,D); row num_classes is the null label of classifier-free guidance."""

    def __init__(self, num_classes, hidden_size):
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, hidden_size)

    def forward(self, y):
        return self.embedding_table(y)


def rotate(q, rope):
    """Rotary position embedding: turn neighbouring channels of q (B,heads,N,d) by the angles in rope.

    rope = cos, sin, each (N,d/2): how the positions make the angles differs between methods, so their scripts say it.
    """
    cos, sin = rope
    even, odd = q[..., 0::2], q[..., 1::2]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2).to(q.dtype)


class Attention(nn.Module):
    """Multi-head self-attention over tokens (B,N,D), with rotary positions if they are given."""

    def __init__(self, dim, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def split(self, h, rope=None):
        """Tokens (B,N,D) to q, k, v by heads, each (B,heads,N,D/heads)."""
        q, k, v = self.qkv(h).view(*h.shape[:2], 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        if rope is not None:
            q, k = rotate(q, rope), rotate(k, rope)
        return q, k, v

    def attend(self, q, k, v):
        """q, k, v by heads to tokens (B,N,D)."""
        h = F.scaled_dot_product_attention(q, k, v)  # softmax(q k^T / sqrt(D/heads)) v
        return self.proj(h.transpose(1, 2).flatten(2))  # (B,heads,N,D/heads) -> (B,N,D)

    def forward(self, h, rope=None):
        return self.attend(*self.split(h, rope))


class Mlp(nn.Module):
    """The token-wise GELU network of a transformer block."""

    def __init__(self, dim, hidden_dim):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, h):
        return self.fc2(F.gelu(self.fc1(h), approximate="tanh"))


class SiTBlock(nn.Module):
    """Transformer block whose two branches are shifted, scaled and gated by the conditioning c (adaLN-zero)."""

    def __init__(self, hidden_size, num_heads, mlp_ratio=4.0):
        super().__init__()
        self.norm1 = nn.LayerNorm(hidden_size, eps=1e-6, elementwise_affine=False)
        self.attn = Attention(hidden_size, num_heads)
        self.norm2 = nn.LayerNorm(hidden_size, eps=1e-6, elementwise_affine=False)
        self.mlp = Mlp(hidden_size, int(hidden_size * mlp_ratio))
        self.adaLN_modulation = FP32Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))

    def forward(self, h, c, rope=None):
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.adaLN_modulation(c).chunk(6, dim=1)  # each (B,D)
        h = h + gate_a.unsqueeze(1) * self.attn(modulate(self.norm1(h), shift_a, scale_a), rope)
        return h + gate_m.unsqueeze(1) * self.mlp(modulate(self.norm2(h), shift_m, scale_m))


class FinalLayer(nn.Module):
    """Tokens (B,N,D) to patches (B,N,p*p*C)."""

    def __init__(self, hidden_size, patch_size, out_channels):
        super().__init__()
        self.norm_final = nn.LayerNorm(hidden_size, eps=1e-6, elementwise_affine=False)
        self.linear = nn.Linear(hidden_size, patch_size * patch_size * out_channels)
        self.adaLN_modulation = FP32Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))

    def forward(self, h, c):
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(modulate(self.norm_final(h), shift, scale))


class SiT(nn.Module):
    """Velocity network v(x_t, t, y). A method's subclass writes its own forward from `embed`, `blocks` and `head`."""

    def __init__(self, input_size=32, in_channels=4, num_classes=1000, *, hidden_size, depth, num_heads, patch_size):
        super().__init__()
        if input_size % patch_size:
            fail(f"an input of size {input_size} has no whole number of patches of {patch_size}: take another --model")
        self.input_size, self.in_channels, self.num_classes = input_size, in_channels, num_classes
        self.grid = input_size // patch_size
        self.x_embedder = PatchEmbed(patch_size, in_channels, hidden_size)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.y_embedder = LabelEmbedder(num_classes, hidden_size)
        pos_embed = sincos_pos_embed_2d(hidden_size, self.grid).float().unsqueeze(0)  # (1,N,D)
        self.pos_embed = nn.Parameter(pos_embed, requires_grad=False)  # fixed, yet a Parameter in official checkpoints
        self.blocks = nn.ModuleList([SiTBlock(hidden_size, num_heads) for _ in range(depth)])
        self.final_layer = FinalLayer(hidden_size, patch_size, in_channels)
        self.apply(init_linear)
        for module in (self.y_embedder.embedding_table, self.t_embedder.mlp[0], self.t_embedder.mlp[2]):
            nn.init.normal_(module.weight, std=0.02)
        # adaLN-zero: every block starts as the identity, and a fresh model's velocity is exactly 0.
        for linear in [b.adaLN_modulation[1] for b in [*self.blocks, self.final_layer]] + [self.final_layer.linear]:
            nn.init.zeros_(linear.weight)

    def embed(self, x_t, t, y):
        """x_t (B,C,H,W), t (B,), y (B,) to tokens h (B,N,D) and conditioning c (B,D)."""
        return self.x_embedder(x_t) + self.pos_embed, self.t_embedder(t) + self.y_embedder(y)

    def head(self, h, c):
        """Tokens h (B,N,D) to the velocity (B,C,H,W), float32."""
        h = self.final_layer(h, c).float()
        p = self.x_embedder.proj.stride[0]
        h = h.view(len(h), self.grid, self.grid, p, p, -1).permute(0, 5, 1, 3, 2, 4)  # (B,g,g,p,p,C) -> (B,C,g,p,g,p)
        return h.reshape(len(h), -1, self.grid * p, self.grid * p)

    def forward(self, x_t, t, y):
        h, c = self.embed(x_t, t, y)
        for block in self.blocks:
            h = block(h, c)
        return self.head(h, c)


def convert_willisma_sit(weights):
    """State dict of willisma/SiT (time 1 - t, 2C output channels, other sign) to ours: exactly the same function.

    Putting 1 - t for t in cos(t f), sin(t f), on which the columns [Wc|Ws] act, is the angle-difference formula.
    """
    weights, channels = dict(weights), weights["x_embedder.proj.weight"].shape[1]
    for name in ("final_layer.linear.weight", "final_layer.linear.bias"):  # rows are (p*p, 2C): keep C, flip the sign
        rows = weights[name]
        weights[name] = -rows.unflatten(0, (-1, 2 * channels))[:, :channels].flatten(0, 1)
    first = weights["t_embedder.mlp.0.weight"]
    w_cos, w_sin = first.double().chunk(2, dim=1)
    half = w_cos.shape[1]
    f = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float64) / half)
    converted = torch.cat([w_cos * f.cos() + w_sin * f.sin(), w_cos * f.sin() - w_sin * f.cos()], dim=1)
    weights["t_embedder.mlp.0.weight"] = converted.to(first.dtype)
    return weights


# ---------------------------------------------------------------------------------------------------------------------
# U-Net blocks: a SiT that halves its token grid in the middle is made of these. `body` is U-DiT's name, `skip_linear`
# U-ViT's, w1 w2 w3 LLaMA's; no official checkpoint of U-REPA was at hand to follow.
# ---------------------------------------------------------------------------------------------------------------------
class Down(nn.Module):
    """(B,D,H,W) -> (B,D,H/2,W/2): a convolution to D/4 channels, then the 2x2 pixels of a place become channels."""

    def __init__(self, width):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(width, width // 4, 3, padding=1, bias=False), nn.PixelUnshuffle(2))
        nn.init.xavier_uniform_(self.body[0].weight)

    def forward(self, h):
        return self.body(h)


class Up(nn.Module):
    """(B,D,H,W) -> (B,D,2H,2W): a convolution to 4D channels, then four channels become 2x2 pixels."""

    def __init__(self, width):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(width, 4 * width, 3, padding=1, bias=False), nn.PixelShuffle(2))
        nn.init.xavier_uniform_(self.body[0].weight)

    def forward(self, h):
        return self.body(h)


class SwiGLU(nn.Module):
    """The token-wise gated network of a transformer block, without biases."""

    def __init__(self, dim, hidden_dim):
        super().__init__()
        self.w1 = nn.Linear(dim, hidden_dim, bias=False)
        self.w2 = nn.Linear(hidden_dim, dim, bias=False)
        self.w3 = nn.Linear(dim, hidden_dim, bias=False)

    def forward(self, h):
        return self.w2(F.silu(self.w1(h)) * self.w3(h))


class UNetBlock(SiTBlock):
    """SiT block with SwiGLU; in a decoder it first takes in the tokens `skip` (B,N,D) that an encoder block left."""

    def __init__(self, hidden_size, num_heads, mlp_dim, has_skip=False):
        super().__init__(hidden_size, num_heads)
        self.mlp = SwiGLU(hidden_size, mlp_dim)
        if has_skip:
            self.skip_linear = nn.Linear(2 * hidden_size, hidden_size)

    def forward(self, h, c, rope, skip=None):
        if skip is not None:
            h = self.skip_linear(torch.cat([h, skip], dim=-1))
        return super().forward(h, c, rope)


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoint files: tensors and plain values, nothing pickled; written whole or not at all.
# ---------------------------------------------------------------------------------------------------------------------
def save_checkpoint(path, state):
    """Write under a temporary name, then rename: a kill or a full disk leaves the file before it whole."""
    temporary = Path(f"{path}.tmp")
    try:
        torch.save(state, temporary)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as a RuntimeError
        temporary.unlink(missing_ok=True)
        fail(f"could not write {path} ({first_line(error)}); free some disk and repeat the command: it goes "
             f"on from the last checkpoint")


def load_checkpoint(path, kinds=dict):
    """Read a checkpoint on the CPU, memory-mapped. Pickled objects are refused: opening them can run code."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file
    if not Path(path).is_file():
        fail(f"no checkpoint {path}")
    try:
        if Path(path).suffix == ".safetensors":
            return load_file(path)
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError:
        fail(f"{path} is no checkpoint, or holds pickled objects beside its tensors; if you trust its source, convert "
             f"it once: python -c \"import torch; c = torch.load('{path}', weights_only=False); "
             f"torch.save(c.get('ema', c), 'ema.pt')\"")
    except (OSError, RuntimeError, EOFError, ValueError, SafetensorError) as error:
        fail(f"{path} is no checkpoint, or is damaged ({first_line(error)})")
    if not isinstance(checkpoint, kinds):
        fail(f"{path} is no checkpoint: it holds a {type(checkpoint).__name__}, not named tensors")
    return checkpoint


def load_weights(path):
    """Weights of a SiT: our checkpoints' or REPA's EMA, GMem's, a bare state dict, or willisma/SiT's (converted).

    Returns (state dict, the checkpoint it came in).
    """
    checkpoint = load_checkpoint(path)
    weights = checkpoint.get("ema", checkpoint.get("network", checkpoint))
    if "sit.x_embedder.proj.weight" in weights:  # CAR-Flow wraps its SiT
        weights = {name.removeprefix("sit."): weight for name, weight in weights.items()}
    if "x_embedder.proj.weight" not in weights:
        fail(f"{path} holds no SiT weights (there is no x_embedder.proj.weight in it)")
    if weights["final_layer.linear.bias"].numel() == 2 * weights["x_embedder.proj.weight"][0].numel():
        weights = convert_willisma_sit(weights)
    return weights, checkpoint


def sit_from_weights(weights, name, make=SiT):
    """The SiT of size `name` that holds these weights; image size, channels and classes are read off their shapes.

    make(input_size, in_channels, num_classes, **sizes) builds it: SiT, or what a method makes of it.
    """
    hidden_size, channels, patch, _ = weights["x_embedder.proj.weight"].shape
    depth = 1 + max((int(key.split(".")[1]) for key in weights if key.startswith("blocks.")), default=-1)
    sizes = SIT_SIZES[name]
    if (hidden_size, depth, patch) != (sizes["hidden_size"], sizes["depth"], sizes["patch_size"]):
        fail(f"these weights have width {hidden_size}, {depth} blocks, patch {patch}; --model {name} has "
             f"{sizes['hidden_size']}, {sizes['depth']}, {sizes['patch_size']}")
    input_size = patch * math.isqrt(weights["pos_embed"].shape[1])
    num_classes = len(weights.get("y_embedder.embedding_table.weight", [0])) - 1  # GMem has no labels
    model = make(input_size, channels, num_classes, **sizes)
    if wrong := sorted(weights.keys() ^ model.state_dict().keys()):
        fail(f"these weights are not those of a SiT: {wrong[0]} is missing or too much")
    model.load_state_dict(weights)
    return model


def init_from(path, model):
    """Start `model` from a checkpoint; condition and projectors that do not fit stay fresh. Returns what is fresh."""
    weights, shapes = load_weights(path)[0], {key: value.shape for key, value in model.state_dict().items()}
    fits = {key: value for key, value in weights.items() if key in shapes and value.shape == shapes[key]}
    fresh = sorted({key.split(".")[0] for key in shapes if key not in fits})
    if not set(fresh) <= {"y_embedder", "y_embedder_mid", "condition_projection", "projectors"}:
        fail(f"{path} does not fit this model: {', '.join(fresh)} differ")
    model.load_state_dict(fits, strict=False)
    return fresh


# ---------------------------------------------------------------------------------------------------------------------
# Randomness has one rule: a draw depends on the seed and on what it is for (a step, an image), never on the process
# that makes it. So no random state is saved, and the number of ranks or of images at once changes nothing.
# ---------------------------------------------------------------------------------------------------------------------
def mix_seed(*numbers):
    """One well-mixed 63-bit seed from a few integers: (seed, step) and (seed, step + 1) give unrelated streams."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


def step_draws(seed, step, batch_size, run):
    """normal(*shape) and uniform(*shape) of a training step: drawn for the global batch, cut to this rank's images."""
    generator = torch.Generator(run.device).manual_seed(mix_seed(seed, step))

    def cut(draw, *shape):
        return draw(batch_size, *shape, generator=generator, device=run.device)[run.rank::run.world]
    return functools.partial(cut, torch.randn), functools.partial(cut, torch.rand)


def image_randn(seed, indices, device):
    """randn(*shape) -> (len(indices),*shape) for sampling: every image draws from a generator of its own."""
    generators = [torch.Generator(device).manual_seed(mix_seed(seed, int(i))) for i in indices]
    return lambda *shape: torch.stack([torch.randn(shape, generator=g, device=device) for g in generators])


# ---------------------------------------------------------------------------------------------------------------------
# Interpolants: the path from data to noise. "cosine" is what SiT calls GVP.
# ---------------------------------------------------------------------------------------------------------------------
def path_coefficients(t, path_type="linear"):
    """a, s, a', s' of x_t = a x + s noise at time t (any shape)."""
    if path_type == "linear":
        return 1 - t, t, -torch.ones_like(t), torch.ones_like(t)
    half_pi = math.pi / 2
    a, s = torch.cos(half_pi * t), torch.sin(half_pi * t)
    return a, s, -half_pi * s, half_pi * a


def interpolate(x, noise, t, path_type="linear"):
    """Noisy input x_t and target velocity v, both shaped as x (B,...), at times t (B,)."""
    a, s, da, ds = path_coefficients(t.view(-1, *[1] * (x.ndim - 1)), path_type)
    return a * x + s * noise, da * x + ds * noise


def lognormal_time(normal, path_type="linear"):
    """Times (B,) whose noise-to-data ratio exp(normal) is log-normal, from standard normal draws (B,)."""
    sigma = normal.exp()
    return sigma / (1 + sigma) if path_type == "linear" else 2 / math.pi * torch.atan(sigma)


def velocity_to_score(v, x_t, t, path_type="linear"):
    """Score grad log p_t(x_t) from the velocity; t broadcasts against x_t. Linear path: -((1-t) v + x_t) / t."""
    a, s, da, ds = path_coefficients(t, path_type)
    ratio = a / da
    return (ratio * v - x_t) / (s * s - ratio * ds * s)


# ---------------------------------------------------------------------------------------------------------------------
# Samplers: from noise (t=1) to data (t=0), along the probability-flow ODE or the reverse SDE with diffusion w(t) = 2t.
# They are REPA's (steps, grids, last step), with the null label and the noise as arguments.
# ---------------------------------------------------------------------------------------------------------------------
LAST_SDE_STEP = 0.04  # the SDE's last step, 0.04 -> 0, adds no noise (SiT and REPA)


@torch.no_grad()
def sample(model, noise, y, y_null, *, mode="ode", num_steps=50, heun=False, path_type="linear",
           cfg_scale=1.0, guidance_low=0.0, guidance_high=1.0, randn=None, times=None):
    """Integrate v = model(x, t, y) from noise to data; returns what `noise` is: a tensor (B,...) or a tuple of tensors.

    A tuple is one joint state (an image and its class token, say), with one guidance scale each. y and y_null (B,...)
    are the condition and the null condition; guidance v_null + cfg_scale (v - v_null) acts for guidance_low <= t <=
    guidance_high where the first scale is above 1, and outside the network runs on the conditional half only.
    randn(*shape) -> (B,*shape) gives the SDE's noise. Network evaluations: Euler num_steps, Heun 2 num_steps - 1.
    `times`, falling to 0, replaces the even grid of num_steps steps.
    """
    is_tuple = isinstance(noise, tuple)
    states = noise if is_tuple else (noise,)
    scales = cfg_scale if isinstance(cfg_scale, tuple) else (cfg_scale,) * len(states)
    device, batch = states[0].device, len(states[0])
    # The state is kept in float64, so that hundreds of small steps add no rounding (MPS has none).
    dtype = torch.float32 if device.type == "mps" else torch.float64
    states = tuple(x.to(dtype) for x in states)

    def slopes(states, t, guided):
        """dx/dt of each state at time t, guided if asked: the velocity, or the drift of the reverse SDE."""
        inputs = tuple(torch.cat([x, x]) if guided else x for x in states)
        inputs = tuple(x.float() for x in inputs)
        times = torch.full((len(inputs[0]),), t, device=device)
        out = model(inputs if is_tuple else inputs[0], times, torch.cat([y, y_null]) if guided else y)
        velocities = [v.to(dtype) for v in (out if is_tuple else (out,))]
        if guided:
            velocities = [v[batch:] + g * (v[:batch] - v[batch:]) for v, g in zip(velocities, scales)]
        if mode == "ode":
            return velocities
        # dx = (v - w/2 score) dt + sqrt(w) dW with w = 2t
        t = torch.tensor(t, dtype=dtype, device=device)
        return [v - t * velocity_to_score(v, x, t, path_type) for v, x in zip(velocities, states)]

    if times is None and mode == "ode":
        times = np.linspace(1, 0, num_steps + 1).tolist()
    elif times is None:
        times = np.linspace(1, LAST_SDE_STEP, num_steps).tolist() + [0.0]
    for t, t_next in zip(times, times[1:]):
        dt, last = t_next - t, t_next == times[-1]
        guided = scales[0] > 1 and guidance_low <= t <= guidance_high
        kicks = [0.0] * len(states)
        if mode == "sde" and not last:
            kicks = [math.sqrt(2 * t * -dt) * randn(*x.shape[1:]).to(dtype) for x in states]
        if heun:  # stochastic Heun adds the noise first
            states, kicks = tuple(x + kick for x, kick in zip(states, kicks)), [0.0] * len(states)
        d = slopes(states, t, guided)
        if heun and not last:  # the mean of the slopes at both ends; guidance is decided at the first end, as in REPA
            d_next = slopes(tuple(x + dt * d_i for x, d_i in zip(states, d)), t_next, guided)
            d = [(a + b) / 2 for a, b in zip(d, d_next)]
        states = tuple(x + dt * d_i + kick for x, d_i, kick in zip(states, d, kicks))
    states = tuple(x.float() for x in states)
    return states if is_tuple else states[0]


def sample_npz(path, generate, labels, seed, batch_size, run):
    """One image per label (N,), on all ranks, into an .npz of arr_0 (N,H,W,3) uint8 and labels: ADM's layout.

    generate(y, randn) -> {"arr_0": (B,H,W,3) uint8}, one batch; further keys are stored beside it, "labels" among them
    where what is drawn from is something else, (N,...). Each rank fills files of its own on disk (50,000 images of
    256 px are 9.8 GB); rank 0 merges them under the final name.
    """
    path, mine, parts = Path(path), range(run.rank, len(labels), run.world), {}
    make_folder(path.parent)
    create = functools.partial(np.lib.format.open_memmap, mode="w+")

    def part_file(key, rank):
        return path.with_name(f".{path.stem}.{key}.{rank}.npy")

    with tqdm(total=len(mine), desc=f"sampling {path.name}", unit="img", disable=True if run.rank else None) as bar:
        for start in range(0, len(mine), batch_size):
            indices = list(mine[start:start + batch_size])
            batch = generate(labels[indices].to(run.device), image_randn(seed, indices, run.device))
            for key, value in batch.items():
                value = value.cpu().numpy()
                if key not in parts:
                    shape = (len(mine), *value.shape[1:])
                    parts[key] = create(part_file(key, run.rank), dtype=value.dtype, shape=shape)
                parts[key][start:start + len(value)] = value
            bar.update(len(indices))
    for part in parts.values():
        part.flush()
    if run.world > 1:
        dist.barrier()
    if run.rank == 0:
        merged = {}
        for key, part in parts.items():
            merged[key] = create(part_file(key, "all"), dtype=part.dtype, shape=(len(labels), *part.shape[1:]))
            for rank in range(min(run.world, len(labels))):
                merged[key][rank::run.world] = np.load(part_file(key, rank), mmap_mode="r")
        np.savez(part_file("tmp", 0).with_suffix(".npz"), **{"labels": labels.numpy()} | merged)
        os.replace(part_file("tmp", 0).with_suffix(".npz"), path)
        for leftover in path.parent.glob(f".{path.stem}.*.npy"):
            leftover.unlink()
    if run.world > 1:
        dist.barrier()


# ---------------------------------------------------------------------------------------------------------------------
# SD-VAE: the frozen autoencoder between pixels (B,3,H,W) in [-1,1] and latents (B,4,H/8,W/8).
# Names follow diffusers' AutoencoderKL, so that the published files load with strict=True.
# ---------------------------------------------------------------------------------------------------------------------
LATENT_SCALE = 0.18215  # Stable Diffusion v1's scale_factor, 1 / std of its latents; not in the VAE's own config.json
SD_VAE_META = dict(vae="sd", latent_scale=LATENT_SCALE, latent_shift=0.0)
VAE_REPOS = {"ft-mse": "stabilityai/sd-vae-ft-mse", "ft-ema": "stabilityai/sd-vae-ft-ema"}
# the published files are older than diffusers' present names
OLD_ATTENTION_NAMES = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}


class ResnetBlock(nn.Module):
    """Two normalised 3x3 convolutions beside a shortcut: (B,width_in,H,W) -> (B,width,H,W)."""

    def __init__(self, width_in, width, groups=32):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, width_in, eps=1e-6)
        self.conv1 = nn.Conv2d(width_in, width, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, width, eps=1e-6)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(width_in, width, 1) if width_in != width else nn.Identity()

    def forward(self, h):
        r = self.conv1(F.silu(self.norm1(h)))
        r = self.conv2(F.silu(self.norm2(r)))
        return self.conv_shortcut(h) + r


class AttentionBlock(nn.Module):
    """Self-attention over all positions, one head of the full width: (B,D,H,W) -> (B,D,H,W)."""

    def __init__(self, width, groups=32):
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, width, eps=1e-6)
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width) for _ in range(3))
        self.to_out = nn.Sequential(nn.Linear(width, width))

    def forward(self, h):
        r = self.group_norm(h).flatten(2).mT.unsqueeze(1)  # (B,D,H,W) -> (B,1,N,D)
        r = self.to_out(F.scaled_dot_product_attention(self.to_q(r), self.to_k(r), self.to_v(r)))
        return h + r.squeeze(1).mT.reshape(h.shape)  # (B,1,N,D) -> (B,D,H,W)


class MidBlock(nn.Module):
    """The only attention of the SD-VAE, between two ResNet blocks, at latent resolution; keeps (B,D,h,w)."""

    def __init__(self, width, groups):
        super().__init__()
        self.resnets = nn.ModuleList(ResnetBlock(width, width, groups) for _ in range(2))
        self.attentions = nn.ModuleList([AttentionBlock(width, groups)])

    def forward(self, h):
        return self.resnets[1](self.attentions[0](self.resnets[0](h)))


class FP32Conv2d(nn.Conv2d):
    """A convolution that leaves autocast: bf16 would round a latent by more than its own noise."""

    def forward(self, h):
        with torch.autocast(h.device.type, enabled=False):
            return super().forward(h.float())


def halve(width):
    """(B,D,H,W) -> (B,D,H/2,W/2); the padding is right and bottom only, as the filters were trained."""
    return nn.Sequential(OrderedDict(pad=nn.ZeroPad2d((0, 1, 0, 1)), conv=nn.Conv2d(width, width, 3, stride=2)))


def double(width):
    """(B,D,H,W) -> (B,D,2H,2W): nearest neighbour, then a convolution that smooths it."""
    return nn.Sequential(OrderedDict(grow=nn.Upsample(scale_factor=2.0), conv=nn.Conv2d(width, width, 3, padding=1)))


def resnet_stages(widths, layers, groups, name, resample):
    """A stage per width: `layers` ResNet blocks, then (but for the last stage) a resampling, kept under `name`."""
    stages = nn.Sequential()
    for i, width in enumerate(widths):
        resnets = [ResnetBlock(width if j else widths[max(i - 1, 0)], width, groups) for j in range(layers)]
        tail = [resample(width)] if i < len(widths) - 1 else []  # an empty Sequential is the identity and has no keys
        stages.append(nn.Sequential(OrderedDict({"resnets": nn.Sequential(*resnets), name: nn.Sequential(*tail)})))
    return stages


class Encoder(nn.Sequential):
    """(B,3,H,W) -> (B,2C,h,w)."""

    def __init__(self, in_channels, latent_channels, widths, layers, groups):
        super().__init__(OrderedDict(
            conv_in=nn.Conv2d(in_channels, widths[0], 3, padding=1),
            down_blocks=resnet_stages(widths, layers, groups, "downsamplers", halve),  # -> (B,widths[-1],h,w)
            mid_block=MidBlock(widths[-1], groups),
            conv_norm_out=nn.GroupNorm(groups, widths[-1], eps=1e-6), act=nn.SiLU(),
            conv_out=FP32Conv2d(widths[-1], 2 * latent_channels, 3, padding=1)))


class Decoder(nn.Sequential):
    """(B,C,h,w) -> (B,3,H,W): the encoder mirrored, one ResNet block more per stage."""

    def __init__(self, in_channels, latent_channels, widths, layers, groups):
        super().__init__(OrderedDict(
            conv_in=nn.Conv2d(latent_channels, widths[-1], 3, padding=1),
            mid_block=MidBlock(widths[-1], groups),
            up_blocks=resnet_stages(widths[::-1], layers + 1, groups, "upsamplers", double),  # -> (B,widths[0],H,W)
            conv_norm_out=nn.GroupNorm(groups, widths[0], eps=1e-6), act=nn.SiLU(),
            conv_out=nn.Conv2d(widths[0], in_channels, 3, padding=1)))


class AutoencoderKL(nn.Module):
    """Pixels to the mean and std of a latent and back; the defaults are the SD-VAE (83.65 M parameters).

    `factor` pixels a side become one place of the latent.
    """

    def __init__(self, in_channels=3, latent_channels=4, widths=(128, 256, 512, 512), layers=2, groups=32):
        super().__init__()
        self.latent_channels, self.factor = latent_channels, 2 ** (len(widths) - 1)
        self.encoder = Encoder(in_channels, latent_channels, widths, layers, groups)
        self.decoder = Decoder(in_channels, latent_channels, widths, layers, groups)
        self.quant_conv = FP32Conv2d(2 * latent_channels, 2 * latent_channels, 1)
        self.post_quant_conv = FP32Conv2d(latent_channels, latent_channels, 1)

    def encode(self, x):
        """x (B,3,H,W) in [-1, 1] -> mean, std (B,4,h,w) each; training uses (mean + std n) * LATENT_SCALE."""
        mean, logvar = self.quant_conv(self.encoder(x)).chunk(2, dim=1)  # (B,8,h,w) -> twice (B,4,h,w)
        return mean, torch.exp(logvar.clamp(-30, 20) / 2)

    def decode(self, z):
        """z (B,4,h,w), already divided by LATENT_SCALE -> (B,3,H,W) in about [-1, 1]."""
        return self.decoder(self.post_quant_conv(z))


def rename_vae_weights(weights):
    """An autoencoder's weights in diffusers' present names, from those, the older ones, or Latent Diffusion's."""
    weights = {str(name).removeprefix("first_stage_model."): tensor for name, tensor in weights.items()}
    if any(name.startswith("decoder.up.") for name in weights):
        weights = convert_ldm_vae({name: tensor for name, tensor in weights.items() if not name.startswith("loss.")})
    for old, new in OLD_ATTENTION_NAMES.items():
        weights = {name.replace(old, new): tensor for name, tensor in weights.items()}
    return weights


def load_vae_weights(vae, path):
    """Fill `vae` strictly from a file in any of the namings; by assignment, so `vae` is on the CPU afterwards."""
    weights = rename_vae_weights(load_checkpoint(path))
    want = {name: tensor.shape for name, tensor in vae.state_dict().items()}
    have = {name: getattr(tensor, "shape", None) for name, tensor in weights.items()}
    wrong = sorted(name for name in want | have if want.get(name) != have.get(name))
    if wrong:
        fail(f"{path} does not fit this VAE: {len(wrong)} names or shapes differ from diffusers', first {wrong[0]}")
    vae.load_state_dict({name: tensor.float() for name, tensor in weights.items()}, strict=True, assign=True)


def read_latent_stats(path):
    """The entries of meta.json for latents of the autoencoder in the file `path`, which reals.py wrote.

    Its latents have mean 0 and std 1 in each channel after scale and shift, which are lists, a number a channel.
    """
    saved = load_checkpoint(path)
    if "latent_std" not in saved:
        fail(f"{path} holds no latent statistics: it is no autoencoder of reals.py (weights of the SD-VAE are given by "
             f"--vae ft-mse --vae-ckpt FILE)")
    sizes, scale = saved["sizes"], [1 / std for std in saved["latent_std"]]
    return dict(vae=str(path), vae_id=saved["id"], channels=len(scale), latent_scale=scale,
                latent_shift=[-mean * s for mean, s in zip(saved["latent_mean"], scale)],
                downsample=2 ** (len(sizes["widths"]) - 1))


def load_trained_vae(path, wanted_id=None):
    """The autoencoder in a file of reals.py, frozen, fp32, on the CPU; of this identity, if one is wanted."""
    if not Path(path).is_file():
        fail(f"the autoencoder {path} is not there: give its file by --vae-ckpt FILE")
    found = read_latent_stats(path)["vae_id"]
    if wanted_id not in (None, found):
        fail(f"{path} is another autoencoder ({found}) than the one that made the latents ({wanted_id}): give that "
             f"one's file by --vae-ckpt FILE, or prepare the data again")
    saved = load_checkpoint(path)
    vae = AutoencoderKL(**saved["sizes"])
    vae.load_state_dict(saved["vae"])
    return vae.eval().requires_grad_(False)


def load_vae(name="ft-ema", path=""):
    """The SD-VAE, frozen, fp32, on the CPU: from the file `path`, else ft-mse or ft-ema from the hub.

    `name` can also be a file of reals.py, which says itself what autoencoder it holds.
    """
    if name not in VAE_REPOS and Path(name).is_file():
        return load_trained_vae(name)
    if not path:
        from huggingface_hub import hf_hub_download
        if name not in VAE_REPOS:
            fail(f"--vae {name}: choose from {', '.join(VAE_REPOS)}, or give --vae-ckpt FILE")
        try:
            with first_rank_first():
                path = hf_hub_download(VAE_REPOS[name], "diffusion_pytorch_model.safetensors")
        except (OSError, RuntimeError) as error:
            fail(f"cannot download {VAE_REPOS[name]} ({type(error).__name__}); with its "
                 "diffusion_pytorch_model.safetensors from another machine: --vae-ckpt FILE")
    with torch.device("meta"):  # no memory and no random numbers for weights that the file replaces
        vae = AutoencoderKL()
    load_vae_weights(vae, path)
    return vae.eval().requires_grad_(False)


def load_decoder(meta, name, path, device):
    """The function x (B,C,H,W) -> images (B,H,W,3) uint8 for data as `meta` says: by the VAE where x is a latent."""
    if meta["vae"] is None:
        return pixels_to_uint8
    if "vae_id" in meta:  # an autoencoder of reals.py
        vae = load_trained_vae(path or meta["vae"], meta["vae_id"]).to(device)
    else:
        vae = (load_sd3_vae(path) if meta["vae"] == "sd3" else load_vae(name, path)).to(device)
    scale, shift = latent_affine(meta, device)
    return lambda x: pixels_to_uint8(vae.decode((x - shift) / scale))


def latent_affine(meta, device):
    """Scale and shift that make a latent z (B,C,h,w) the model's x = z * scale + shift: numbers, or tensors (C,1,1)."""
    return [channel_tensor(tuple(value), device) if isinstance(value, list) else value
            for value in (meta["latent_scale"], meta["latent_shift"])]


@functools.lru_cache
def channel_tensor(values, device):
    """A number for each channel as (C,1,1); kept, for a copy to a GPU at every step would make it wait."""
    return torch.tensor(values, device=device).view(-1, 1, 1)


def pixels_to_uint8(x):
    """x (B,3,H,W) in [-1, 1] -> (B,H,W,3) uint8, truncated: REPA's rule, half a level below willisma/SiT's."""
    return ((x.float() + 1) / 2 * 255).clamp(0, 255).permute(0, 2, 3, 1).to(torch.uint8)


# ---------------------------------------------------------------------------------------------------------------------
# MM-DiT: text and image tokens, two streams with weights of their own, that attend jointly (SD3, arXiv 2403.03206).
# Parameter names follow SD3's single file; REPA's and HASTE's text-to-image models are the same with other sizes.
# ---------------------------------------------------------------------------------------------------------------------
SD3_MEDIUM = dict(in_channels=16, hidden_size=1536, depth=24, num_heads=24, context_dim=4096, pooled_dim=2048,
                  pos_embed_size=192)


class StreamAttention(Attention):
    """Attention's part in one stream: q, k, v before the streams meet and, but for pre_only, the projection after."""

    def __init__(self, dim, num_heads, qk_norm, pre_only):
        super().__init__(dim, num_heads)
        if pre_only:
            self.proj = nn.Identity()
        norms = [nn.RMSNorm(dim // num_heads, eps=1e-6) if qk_norm else nn.Identity() for _ in range(2)]
        self.ln_q, self.ln_k = norms

    def split(self, h):
        q, k, v = super().split(h)
        return self.ln_q(q), self.ln_k(k), v


class StreamBlock(nn.Module):
    """One stream of a joint block. With pre_only it only gives keys and values to the other: the last block's text."""

    def __init__(self, hidden_size, num_heads, mlp_ratio, qk_norm, pre_only=False):
        super().__init__()
        self.pre_only = pre_only
        self.norm1 = nn.LayerNorm(hidden_size, eps=1e-6, elementwise_affine=False)
        self.attn = StreamAttention(hidden_size, num_heads, qk_norm, pre_only)
        if not pre_only:
            self.norm2 = nn.LayerNorm(hidden_size, eps=1e-6, elementwise_affine=False)
            self.mlp = Mlp(hidden_size, int(hidden_size * mlp_ratio))
        self.adaLN_modulation = FP32Sequential(
            nn.SiLU(), nn.Linear(hidden_size, (2 if pre_only else 6) * hidden_size))

    def before(self, h, c):
        """Tokens h (B,N,D) to q, k, v (B,heads,N,D/heads), and what the adaptive norm keeps for `after`."""
        shift, scale, *rest = self.adaLN_modulation(c).chunk(2 if self.pre_only else 6, dim=1)  # each (B,D)
        return self.attn.split(modulate(self.norm1(h), shift, scale)), rest

    def after(self, h, attended, rest):
        """Tokens h, and what attention brought to their places, to the block's output, all (B,N,D)."""
        if self.pre_only:
            return h  # nobody reads it
        gate_a, shift_m, scale_m, gate_m = rest
        h = h + gate_a.unsqueeze(1) * self.attn.proj(attended)
        return h + gate_m.unsqueeze(1) * self.mlp(modulate(self.norm2(h), shift_m, scale_m))


class JointBlock(nn.Module):
    """Both streams through one attention over [text, image]."""

    def __init__(self, hidden_size, num_heads, mlp_ratio, qk_norm, is_last):
        super().__init__()
        self.context_block = StreamBlock(hidden_size, num_heads, mlp_ratio, qk_norm, pre_only=is_last)
        self.x_block = StreamBlock(hidden_size, num_heads, mlp_ratio, qk_norm)

    def forward(self, text, h, c):
        """Text (B,n,D), image tokens h (B,N,D), c (B,D) -> text and h; the last block leaves the text as it is."""
        qkv_text, rest_text = self.context_block.before(text, c)
        qkv_h, rest_h = self.x_block.before(h, c)
        q, k, v = (torch.cat(pair, dim=2) for pair in zip(qkv_text, qkv_h))  # (B,heads,n+N,D/heads)
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)  # (B,n+N,D)
        attended_text, attended_h = attended.split([text.shape[1], h.shape[1]], dim=1)
        return self.context_block.after(text, attended_text, rest_text), self.x_block.after(h, attended_h, rest_h)


class VectorEmbedder(nn.Module):
    """A vector (B,K), the pooled text, to (B,D)."""

    def __init__(self, dim, hidden_size):
        super().__init__()
        self.mlp = FP32Sequential(nn.Linear(dim, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size))

    def forward(self, vector):
        return self.mlp(vector)


class MMDiT(nn.Module):
    """Velocity network v(x_t, t, context, pooled). A method's own forward is made of `embed`, `blocks` and `head`.

    The table of positions is pos_embed_size squared and cut to the image from its centre. It is a buffer: SD3's comes
    with its file. pooled_dim 0: no pooled text. The network sees time_scale * t: SD3 counts to 1000, REPA to 1. A fresh
    model has PyTorch's own initial weights, as the official codes.
    """

    def __init__(self, *, in_channels, hidden_size, depth, num_heads, context_dim, pooled_dim, pos_embed_size,
                 patch_size=2, mlp_ratio=4.0, qk_norm=False, time_scale=1000):
        super().__init__()
        self.patch_size, self.time_scale = patch_size, time_scale
        self.x_embedder = PatchEmbed(patch_size, in_channels, hidden_size)
        self.t_embedder = TimestepEmbedder(hidden_size)
        if pooled_dim:
            self.y_embedder = VectorEmbedder(pooled_dim, hidden_size)
        self.context_embedder = nn.Linear(context_dim, hidden_size)
        pos_embed = sincos_pos_embed_2d(hidden_size, pos_embed_size).float()
        self.register_buffer("pos_embed", pos_embed.unsqueeze(0))  # (1,S*S,D)
        self.joint_blocks = nn.ModuleList([
            JointBlock(hidden_size, num_heads, mlp_ratio, qk_norm, is_last=i + 1 == depth) for i in range(depth)])
        self.final_layer = FinalLayer(hidden_size, patch_size, in_channels)

    @property
    def blocks(self):
        return self.joint_blocks

    def positions(self, rows, columns):
        """The central rows x columns of the position table: (1,rows*columns,D)."""
        size = math.isqrt(self.pos_embed.shape[1])
        top, left = (size - rows) // 2, (size - columns) // 2
        table = self.pos_embed.unflatten(1, (size, size))  # (1,S,S,D)
        return table[:, top:top + rows, left:left + columns].flatten(1, 2)

    def embed(self, x_t, t, context, pooled=None):
        """x_t (B,C,H,W), t (B,), context (B,n,K), pooled (B,P) to text (B,n,D), image tokens h (B,N,D), c (B,D)."""
        rows, columns = (side // self.patch_size for side in x_t.shape[-2:])
        c = self.t_embedder(self.time_scale * t)
        if pooled is not None:
            c = c + self.y_embedder(pooled)
        return self.context_embedder(context), self.x_embedder(x_t) + self.positions(rows, columns), c

    def head(self, h, c, size):
        """Tokens h (B,N,D) to the velocity (B,C,H,W), float32; size = (H,W)."""
        h, p = self.final_layer(h, c).float(), self.patch_size
        h = h.view(len(h), size[0] // p, size[1] // p, p, p, -1).permute(0, 5, 1, 3, 2, 4)  # -> (B,C,rows,p,columns,p)
        return h.reshape(len(h), -1, *size)

    def forward(self, x_t, t, context, pooled=None):
        text, h, c = self.embed(x_t, t, context, pooled)
        for block in self.blocks:
            text, h = block(text, h, c)
        return self.head(h, c, x_t.shape[-2:])


def sd3_times(num_steps, shift=3.0):
    """SD3's times: evenly from 1 to the least, then shifted by 3t/(1+2t), then 0. The least was shifted before."""
    t = np.linspace(1, shift * 0.001 / (1 + (shift - 1) * 0.001), num_steps)
    return [*(shift * t / (1 + (shift - 1) * t)).tolist(), 0.0]


def store_bf16(model):
    """Keep a frozen model's weights in bf16 where autocast would round them anyway: half the memory, same numbers."""
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            module.bfloat16()
    for module in model.modules():
        if isinstance(module, FP32Sequential):
            module.float()
    return model


# ---------------------------------------------------------------------------------------------------------------------
# CLIP's text towers and its tokeniser, as SD3 reads prompts. Parameter names follow transformers.
# ---------------------------------------------------------------------------------------------------------------------
CLIP_MERGES, MARKS = 48_894, ("<|startoftext|>", "<|endoftext|>")
CLIP_LENGTH = 77  # tokens of a prompt, with the marks of its beginning and end
CLIP_L = dict(width=768, layers=12, num_heads=12, quick_gelu=True)
CLIP_G = dict(width=1280, layers=32, num_heads=20, project=True)
BPE_WORDS = re.compile(r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[^\W\d_]+|\d|(?:[^\s\w]|_)+",
                       re.IGNORECASE)


class Tokenizer:
    """CLIP's byte-pair encoding. Ids: 256 bytes, 256 bytes that end a word, the merges in their order, two marks."""

    def __init__(self, merges):
        printable = [*range(33, 127), *range(161, 173), *range(174, 256)]  # the others are written as 256, 257, ...
        others = [byte for byte in range(256) if byte not in printable]
        self.letters = {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}
        letters = list(self.letters.values())
        vocabulary = [*letters, *(letter + "</w>" for letter in letters), *("".join(pair) for pair in merges),
                      *MARKS]
        self.ids = {token: i for i, token in enumerate(vocabulary)}
        self.ranks = {pair: rank for rank, pair in enumerate(merges)}
        self.begin, self.end = len(vocabulary) - 2, len(vocabulary) - 1

    def split(self, word):
        """A word's tokens: of its neighbouring pieces, those are merged first whose merge was learned first."""
        pieces = [self.letters[byte] for byte in word.encode()]
        pieces[-1] += "</w>"
        while len(pieces) > 1:
            pair = min(zip(pieces, pieces[1:]), key=lambda pair: self.ranks.get(pair, math.inf))
            if pair not in self.ranks:
                break
            merged, i = [], 0
            while i < len(pieces):
                step = 2 if tuple(pieces[i:i + 2]) == pair else 1
                merged.append("".join(pieces[i:i + step]))
                i += step
            pieces = merged
        return pieces

    def encode(self, text):
        """The ids of a text, without marks."""
        words = BPE_WORDS.findall(" ".join(text.lower().split()))
        return [self.ids[piece] for word in words for piece in ([word] if word in MARKS else self.split(word))]

    def pad(self, ids, fill):
        """Ids cut to 75, between their marks, filled up to 77 with `fill`."""
        ids = [self.begin, *ids[:CLIP_LENGTH - 2], self.end]
        return ids + [fill] * (CLIP_LENGTH - len(ids))


class ClipLayer(nn.Module):
    """Transformer layer in which a token sees itself and those before it: (B,n,D) -> (B,n,D)."""

    def __init__(self, width, num_heads, quick_gelu, mlp_ratio):
        super().__init__()
        self.num_heads, self.quick_gelu = num_heads, quick_gelu
        self.layer_norm1, self.layer_norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.self_attn = nn.ModuleDict({f"{name}_proj": nn.Linear(width, width) for name in ("q", "k", "v", "out")})
        self.mlp = nn.ModuleDict(dict(fc1=nn.Linear(width, mlp_ratio * width), fc2=nn.Linear(mlp_ratio * width, width)))

    def forward(self, h):
        r = self.layer_norm1(h)
        q, k, v = (self.self_attn[f"{name}_proj"](r).unflatten(2, (self.num_heads, -1)).transpose(1, 2)
                   for name in "qkv")  # each (B,heads,n,D/heads)
        r = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        h = h + self.self_attn["out_proj"](r.transpose(1, 2).flatten(2))
        r = self.mlp["fc1"](self.layer_norm2(h))
        return h + self.mlp["fc2"](r * torch.sigmoid(1.702 * r) if self.quick_gelu else F.gelu(r))


class ClipText(nn.Module):
    """A text tower: ids (B,n) to the tokens of its last layer but one (B,n,D) and one vector of the text (B,D)."""

    def __init__(self, *, width, layers, num_heads, quick_gelu=False, project=False,
                 vocabulary=CLIP_MERGES + 514, length=CLIP_LENGTH, mlp_ratio=4):
        super().__init__()
        self.text_model = nn.ModuleDict(dict(
            embeddings=nn.ModuleDict(dict(token_embedding=nn.Embedding(vocabulary, width),
                                          position_embedding=nn.Embedding(length, width))),
            encoder=nn.ModuleDict(dict(layers=nn.ModuleList(
                ClipLayer(width, num_heads, quick_gelu, mlp_ratio) for _ in range(layers)))),
            final_layer_norm=nn.LayerNorm(width)))
        self.text_projection = nn.Linear(width, width, bias=False) if project else nn.Identity()

    def forward(self, ids):
        embeddings, layers = self.text_model["embeddings"], self.text_model["encoder"]["layers"]
        h = embeddings["token_embedding"](ids) + embeddings["position_embedding"].weight[:ids.shape[1]]
        for layer in layers:
            before_last, h = h, layer(h)
        h = self.text_model["final_layer_norm"](h)
        at_end = ids.argmax(dim=1)  # the end mark has the largest id, and the first one counts
        return before_last, self.text_projection(h[torch.arange(len(h)), at_end])


@torch.no_grad()
def encode_prompts(tokenizer, clip_l, clip_g, ids):
    """SD3's text features from lists of ids: context (B,77,2048) and pooled (B,2048), the towers side by side.

    CLIP-L fills up with end marks and its vector is not projected; CLIP-G fills up with 0, and its vector is.
    """
    parts = []
    for tower, fill in ((clip_l, tokenizer.end), (clip_g, 0)):
        device = tower.text_model["final_layer_norm"].weight.device
        parts.append(tower(torch.tensor([tokenizer.pad(each, fill) for each in ids], device=device)))
    return tuple(torch.cat(part, dim=-1) for part in zip(*parts))


def pad_context(context, context_dim, t5_tokens=CLIP_LENGTH):
    """(B,n,K) to (B,n+t5_tokens,context_dim) with zeros, which is how SD3 runs without its third tower, T5."""
    return F.pad(context, (0, context_dim - context.shape[2], 0, t5_tokens))


# ---------------------------------------------------------------------------------------------------------------------
# SD3's files: one holds the network, the VAE and both text towers; the merges of the tokeniser come with CLIP.
# ---------------------------------------------------------------------------------------------------------------------
SD3_REPO, SD3_FILE = "stabilityai/stable-diffusion-3-medium", "sd3_medium_incl_clips.safetensors"
MERGES_REPO, MERGES_FILE = "openai/clip-vit-large-patch14", "merges.txt"
# x = (z - 0.0609) * 1.5305, in the form of meta.json: z * latent_scale + latent_shift
SD3_VAE_META = dict(vae="sd3", channels=16, latent_scale=1.5305, latent_shift=-0.0609 * 1.5305)
# the file's VAE has the older names of Latent Diffusion; stages of the decoder are counted from the other end
LDM_NAMES = [("encoder.down.", "encoder.down_blocks."), (".block.", ".resnets."), (".downsample.", ".downsamplers.0."),
             (".upsample.", ".upsamplers.0."), (".nin_shortcut.", ".conv_shortcut."), (".norm_out.", ".conv_norm_out."),
             (".mid.block_1.", ".mid_block.resnets.0."), (".mid.block_2.", ".mid_block.resnets.1."),
             (".mid.attn_1.norm.", ".mid_block.attentions.0.group_norm."),
             (".mid.attn_1.proj_out.", ".mid_block.attentions.0.to_out.0."),
             *((f".mid.attn_1.{name}.", f".mid_block.attentions.0.to_{name}.") for name in "qkv")]


def hub_file(repo, name, flag):
    """Path of a file from the hub, rank 0 first; a model behind a licence says where that is."""
    from huggingface_hub import hf_hub_download
    try:
        with first_rank_first():
            return hf_hub_download(repo, name)
    except (OSError, RuntimeError) as error:
        if getattr(getattr(error, "response", None), "status_code", None) in (401, 403):
            fail(f"{repo} is behind a licence: accept it on https://huggingface.co/{repo}, then set HF_TOKEN to a "
                 f"token of your account; or give its {name} by {flag} FILE")
        fail(f"cannot download {repo} ({type(error).__name__}); with its {name} from another machine: {flag} FILE")


def convert_ldm_vae(weights):
    """Latent Diffusion's names of an SD-VAE's weights to diffusers', in which 1x1 convolutions are linear layers."""
    stages, converted = 1 + max(int(name.split(".")[2]) for name in weights if name.startswith("decoder.up.")), {}
    for name, tensor in weights.items():
        if name.startswith("decoder.up."):
            _, _, stage, rest = name.split(".", 3)
            name = f"decoder.up_blocks.{stages - 1 - int(stage)}.{rest}"
        for old, new in LDM_NAMES:
            name = name.replace(old, new)
        converted[name] = tensor.flatten(1) if ".attentions." in name and tensor.ndim == 4 else tensor
    return converted


def load_sd3(part, model, path=""):
    """Fill `model` (made on the meta device) with one part of SD3's file: network, vae, clip_l or clip_g; frozen."""
    from safetensors import SafetensorError, safe_open
    prefix = dict(network="model.diffusion_model.", vae="first_stage_model.",
                  clip_l="text_encoders.clip_l.transformer.", clip_g="text_encoders.clip_g.transformer.")[part]
    path = path or hub_file(SD3_REPO, SD3_FILE, "--sd3-ckpt")
    try:
        with safe_open(path, "pt") as file:
            weights = {name.removeprefix(prefix): file.get_tensor(name) for name in file.keys()
                       if name.startswith(prefix)}
    except (OSError, SafetensorError) as error:
        fail(f"{path} is no safetensors file, or is damaged ({first_line(error)}); --sd3-ckpt wants {SD3_FILE}")
    if not weights:
        fail(f"{path} holds no {part} (no {prefix}*); --sd3-ckpt wants {SD3_FILE}, which holds all parts")
    if part == "vae":
        weights = convert_ldm_vae(weights)
    want = {name: tensor.shape for name, tensor in model.state_dict().items()}
    unused = {"text_model.embeddings.position_ids", "text_projection.weight"} - want.keys()  # CLIP-L's is not applied
    have = {name: tensor.shape for name, tensor in weights.items() if name not in unused}
    if wrong := sorted(name for name in want | have if want.get(name) != have.get(name)):
        fail(f"{path} does not fit SD3 medium: {len(wrong)} names or shapes of its {part} differ, first {wrong[0]}")
    model.load_state_dict({name: weights[name].float() for name in want}, assign=True)
    return model.eval().requires_grad_(False)


def load_sd3_network(path=""):
    """SD3 medium's MM-DiT, frozen, fp32, on the CPU."""
    with torch.device("meta"):
        model = MMDiT(**SD3_MEDIUM)
    return load_sd3("network", model, path)


def load_sd3_vae(path=""):
    """SD3's autoencoder, frozen, fp32, on the CPU: SD's with 16 channels and without the two 1x1 convolutions."""
    with torch.device("meta"):
        vae = AutoencoderKL(latent_channels=16)
        vae.quant_conv = vae.post_quant_conv = nn.Identity()
    return load_sd3("vae", vae, path)


def load_tokenizer(path=""):
    """CLIP's tokeniser, from its list of merges: the first line of the file is a comment."""
    path = path or hub_file(MERGES_REPO, MERGES_FILE, "--merges")
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()[1:CLIP_MERGES + 1]
    except (OSError, ValueError) as error:
        fail(f"cannot read {path} ({first_line(error)}); --merges wants the {MERGES_FILE} of {MERGES_REPO}")
    merges = [tuple(line.split()) for line in lines]
    if len(merges) != CLIP_MERGES or any(len(pair) != 2 for pair in merges):
        fail(f"{path} does not hold CLIP's {CLIP_MERGES} merges; --merges wants the {MERGES_FILE} of {MERGES_REPO}")
    return Tokenizer(merges)


def load_sd3_text(path="", merges="", device="cpu"):
    """The function ids -> context (B,77,2048), pooled (B,2048), by both text towers, and the tokeniser."""
    with torch.device("meta"):
        towers = [ClipText(**CLIP_L), ClipText(**CLIP_G)]
    towers = [load_sd3(part, tower, path).to(device) for part, tower in zip(("clip_l", "clip_g"), towers)]
    tokenizer = load_tokenizer(merges)
    return functools.partial(encode_prompts, tokenizer, *towers), tokenizer


# ---------------------------------------------------------------------------------------------------------------------
# Frozen teachers: vision transformers of timm, or the small one that `prepare.py teacher` trains beside a data set.
# ---------------------------------------------------------------------------------------------------------------------
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # mean and std of RGB in [0,1]
CLIP = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
# --enc-type: timm model; the size at which it sees 256 px, which makes its patches (14 or 16 px) match the 16x16 tokens
# of SiT/2; mean and std; whether tokens are taken after the final norm. As in REPA's code, which lacks
# its module for dinov1, though: the norm is our guess there.
TEACHERS = {
    "dinov2-vit-s": ("vit_small_patch14_dinov2.lvd142m", 224, IMAGENET, True),
    "dinov2-vit-b": ("vit_base_patch14_dinov2.lvd142m", 224, IMAGENET, True),
    "dinov2-vit-l": ("vit_large_patch14_dinov2.lvd142m", 224, IMAGENET, True),
    "dinov2-vit-g": ("vit_giant_patch14_dinov2.lvd142m", 224, IMAGENET, True),
    "dinov2reg-vit-s": ("vit_small_patch14_reg4_dinov2.lvd142m", 224, IMAGENET, True),
    "dinov2reg-vit-b": ("vit_base_patch14_reg4_dinov2.lvd142m", 224, IMAGENET, True),
    "dinov2reg-vit-l": ("vit_large_patch14_reg4_dinov2.lvd142m", 224, IMAGENET, True),
    "dinov2reg-vit-g": ("vit_giant_patch14_reg4_dinov2.lvd142m", 224, IMAGENET, True),
    "dinov1-vit-b": ("vit_base_patch16_224.dino", 256, IMAGENET, True),
    "clip-vit-L": ("vit_large_patch14_clip_quickgelu_224.openai", 224, CLIP, False),
    "mae-vit-l": ("vit_large_patch16_224.mae", 256, IMAGENET, False),
    "jepa-vit-h": ("vit_huge_patch14_gap_224.in1k_ijepa", 224, IMAGENET, True),
}


class Teacher(nn.Module):
    """Frozen vision transformer: images (B,H,W,3) uint8 to class token (B,K) and patch tokens (B,N,K), float32.

    A model without a class token (I-JEPA) gives the mean of its patch tokens: so its authors describe an image.
    """

    def __init__(self, vit, mean, std, input_size):
        super().__init__()
        self.vit, self.input_size = vit.eval().requires_grad_(False), input_size
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1))

    @property
    def width(self):
        return self.vit.embed_dim

    @property
    def grid(self):
        return self.vit.patch_embed.grid_size[0]

    def preprocess(self, images):
        """uint8 (B,H,W,3) to normalised pixels at the teacher's input size; bicubic without antialias, as REPA.

        REPA resizes for CLIP before it normalises: the same up to rounding, for bicubic weights sum to 1.
        """
        x = (images.permute(0, 3, 1, 2).float() / 255 - self.mean) / self.std
        return x if x.shape[-1] == self.input_size else F.interpolate(x, self.input_size, mode="bicubic")

    @torch.no_grad()
    def forward(self, images):
        tokens = self.vit.forward_features(self.preprocess(images)).float()  # class token, registers, then patches
        patches = tokens[:, self.vit.num_prefix_tokens:]
        return tokens[:, 0] if self.vit.num_prefix_tokens else patches.mean(dim=1), patches


def load_teacher(enc_type, resolution, path="", pretrained=True):
    """Teacher by name for images of `resolution` pixels, its weights from the hub or from a local file.

    "prepared" reads the file that `prepare.py teacher` wrote; the other names are the keys of TEACHERS. A local file is
    timm's or the original release of DINOv2, DINO, MAE or I-JEPA, or a state dict of OpenAI's or open_clip's CLIP.
    """
    import timm
    if enc_type == "prepared":
        make = f"make it: python prepare.py teacher --data {Path(path).parent}"
        if not Path(path).is_file():
            fail(f"no teacher {path}; {make}")
        saved = load_checkpoint(path)
        if saved.get("resolution") != resolution:
            fail(f"{path} is no teacher for {resolution} px, but for {saved.get('resolution')} px; {make}")
        vit = timm.models.vision_transformer.VisionTransformer(**saved["config"])
        vit.load_state_dict(saved["model"])
        return Teacher(vit, [0.5] * 3, [0.5] * 3, resolution)
    if enc_type not in TEACHERS:
        fail(f"unknown teacher {enc_type!r}; --enc-type is one of: prepared, {', '.join(TEACHERS)} (mocov3 is left "
             f"out: timm has no weights of it)")
    name, size, (mean, std), keep_norm = TEACHERS[enc_type]
    if resolution % 16 or (resolution > 256 and not enc_type.startswith("dinov2")):  # the others learned at 224 px
        fail(f"teacher {enc_type} is not for {resolution} px, but for multiples of 16 px up to 256 (dinov2: any)")
    weights = load_checkpoint(path) if path else None  # first, because a large model takes a while to build
    try:
        with first_rank_first():
            vit = timm.create_model(name, pretrained=pretrained and not path, img_size=size * resolution // 256,
                                    num_classes=0)
    except (OSError, RuntimeError) as error:
        fail(f"could not load {name} ({first_line(error)}); without internet, give a file of its weights by "
             f"--teacher-ckpt FILE")
    if path:
        try:  # official names to timm's, and the position table to this grid
            weights = timm.models.vision_transformer.checkpoint_filter_fn(weights, vit)
            vit.load_state_dict({key: value for key, value in weights.items() if not key.startswith("head.")})
        except (RuntimeError, KeyError, IndexError, AttributeError, TypeError, ValueError) as error:  # another model's
            fail(f"{path} does not hold the weights of {name}: {' '.join(str(error).split())[:200]}")
    if not keep_norm:
        vit.norm = nn.Identity()
    return Teacher(vit, mean, std, vit.patch_embed.img_size[0])


# ---------------------------------------------------------------------------------------------------------------------
# LPIPS: how far apart two images look, by the features of a frozen VGG16 (arXiv 1801.03924, version 0.1).
# Names of its parameters are those of the copy that taming-transformers and others train autoencoders with.
# ---------------------------------------------------------------------------------------------------------------------
# Convolutions of torchvision's vgg16().features, stage by stage; what leaves the last ReLU of each is compared.
VGG_STAGES = (0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28)
VGG_URL = "https://download.pytorch.org/models/vgg16-397923af.pth"  # torchvision's IMAGENET1K_V1
LPIPS_URL = "https://github.com/richzhang/PerceptualSimilarity/raw/master/lpips/weights/v0.1/vgg.pth"


class LPIPS(nn.Module):
    """The distance (B,1,1,1) of two images (B,3,H,W) in [-1,1]; frozen. (The dropout, of its own training, is gone.)"""

    def __init__(self, channels=(64, 128, 256, 512, 512)):
        super().__init__()
        self.net, before = nn.ModuleDict(), 3
        for stage, (numbers, width) in enumerate(zip(VGG_STAGES, channels), start=1):
            layers = OrderedDict(pool=nn.MaxPool2d(2)) if stage > 1 else OrderedDict()
            for i in numbers:
                layers |= {str(i): nn.Conv2d(before, width, 3, padding=1), f"relu{i}": nn.ReLU()}
                before = width
            self.net[f"slice{stage}"] = nn.Sequential(layers)
            conv = nn.Conv2d(width, 1, 1, bias=False)
            self.add_module(f"lin{stage - 1}", nn.ModuleDict({"model": nn.Sequential(nn.Identity(), conv)}))
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188]).view(3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450]).view(3, 1, 1), persistent=False)
        self.eval().requires_grad_(False)

    def features(self, x):
        """x (B,3,H,W) to the five stages' features of x, each (B,C,H,W)."""
        h, found = (x - self.shift) / self.scale, []
        for stage in self.net.values():
            h = stage(h)
            found.append(h.float())
        return found

    def forward(self, x, x_hat):
        total = 0
        for k, (a, b) in enumerate(zip(self.features(x), self.features(x_hat))):
            a, b = (f / (f.square().sum(dim=1, keepdim=True).sqrt() + 1e-10) for f in (a, b))  # unit vectors, a place
            weights = getattr(self, f"lin{k}")["model"][1].weight  # (1,C,1,1), none negative
            total = total + ((a - b).square() * weights).sum(dim=1, keepdim=True).mean(dim=(2, 3), keepdim=True)
        return total


def load_lpips(vgg_path="", lpips_path="", pretrained=True):
    """LPIPS with its public weights, torchvision's VGG16 and the linear layers, from files or the internet."""
    lpips, found = LPIPS(), {}
    if not pretrained:
        return lpips
    for flag, path, url in (("--vgg-ckpt", vgg_path, VGG_URL), ("--lpips-ckpt", lpips_path, LPIPS_URL)):
        try:
            with first_rank_first():  # both are in PyTorch's older format, which cannot be memory-mapped
                found |= (torch.load(path, "cpu", weights_only=True) if path else
                          torch.hub.load_state_dict_from_url(url, map_location="cpu", weights_only=True))
        except (OSError, RuntimeError, EOFError, LookupError, ValueError, TypeError, pickle.UnpicklingError) as error:
            fail(f"cannot read {path or url} ({first_line(error)}): give it by {flag} FILE, or train without LPIPS: "
                 f"--perceptual-coeff 0")
    names = {key: f"features.{key.split('.', 2)[2]}" if key.startswith("net.") else key for key in lpips.state_dict()}
    try:
        lpips.load_state_dict({ours: found[theirs] for ours, theirs in names.items()})
    except (KeyError, RuntimeError) as error:
        fail(f"--vgg-ckpt and --lpips-ckpt do not hold the weights of {VGG_URL} and {LPIPS_URL} "
             f"({' '.join(str(error).split())[:100]}); without LPIPS: --perceptual-coeff 0")
    return lpips


# ---------------------------------------------------------------------------------------------------------------------
# The reader of data/NAME, the folder that prepare.py writes: memory-mapped arrays, one read per image and no decoding.
# ---------------------------------------------------------------------------------------------------------------------
class PreparedData(torch.utils.data.Dataset):
    """data/NAME: images (N,H,W,3) uint8, moments (N,2C,h,w) float16 where there is a VAE, labels (N,), meta.

    An index is a whole batch of indices, answered by one dict of tensors. need_images=False leaves out the pixels where
    latents are at hand: without a teacher nobody looks at them, and they are twelve times as large.
    """

    def __init__(self, path, resolution, need_images=True):
        self.path = Path(path)
        if not (self.path / "meta.json").is_file():
            fail(f"no prepared data in {path}; make it: "
                 f"python prepare.py --images FOLDER --out {path} --resolution {resolution}")
        try:
            self.meta = json.loads((self.path / "meta.json").read_text())
            found = self.meta["format"]
        except (ValueError, KeyError, TypeError):
            found = "unknown"
        if found != 1:
            fail(f"{path}/meta.json has format {found}, this program reads 1: prepare the data again")
        if self.meta["resolution"] != resolution:
            fail(f"{path} has {self.meta['resolution']} px, the run {resolution}; "
                 f"add --resolution {self.meta['resolution']}")
        self.is_latent = self.meta["vae"] is not None
        self.names = ["labels"] + ["moments"] * self.is_latent + ["images"] * (need_images or not self.is_latent)
        size = resolution // self.meta.get("downsample", 8) if self.is_latent else resolution
        self.shape = (self.meta["channels"], size, size)  # of x: (C,H,W)
        shapes = dict(labels=(), images=(resolution, resolution, 3), moments=(2 * self.shape[0], size, size))
        for name in self.names:
            if (found := self.array(name).shape) != (self.meta["count"], *shapes[name]):
                fail(f"{path}/{name}.npy has shape {found}, meta.json says {(self.meta['count'], *shapes[name])}: "
                     f"prepare the data again")
        labels, classes = self.array("labels"), self.meta["num_classes"]
        if labels.min() < 0 or labels.max() >= classes:
            fail(f"{path}/labels.npy has labels outside 0..{classes - 1}: prepare the data again")

    def array(self, name):
        """One array, memory-mapped; opened at each use, for a memory map pickled to a worker would be a full copy."""
        try:
            return np.load(self.path / f"{name}.npy", mmap_mode="r")
        except (OSError, ValueError, EOFError) as error:
            fail(f"{self.path}/{name}.npy is missing or damaged ({first_line(error)}): prepare the data again")

    def __len__(self):
        return self.meta["count"]

    def __getitem__(self, indices):
        return {name: torch.from_numpy(self.array(name)[indices]) for name in self.names}


class SyntheticData(PreparedData):
    """Random images and latents of the shapes of a data set, for --bench: the same code, but for the disk."""

    def __init__(self, resolution, is_latent, need_images=True, count=1024):
        self.meta = dict(count=count, resolution=resolution, num_classes=1000, vae="random" if is_latent else None,
                         latent_scale=1.0, latent_shift=0.0, class_names=[str(i) for i in range(1000)])
        self.shape = (4, resolution // 8, resolution // 8) if is_latent else (3, resolution, resolution)
        rng, rows = np.random.default_rng(0), 64
        self.arrays = {"labels": rng.integers(0, 1000, rows)}
        if need_images or not is_latent:
            self.arrays["images"] = rng.integers(0, 256, (rows, resolution, resolution, 3), np.uint8)
        if is_latent:
            self.arrays["moments"] = rng.random((rows, 2 * self.shape[0], *self.shape[1:])).astype(np.float16)
        self.names = list(self.arrays)

    def __getitem__(self, indices):
        return {name: torch.from_numpy(self.arrays[name][indices % len(self.arrays[name])]) for name in self.names}


class CaptionedData(PreparedData):
    """Images or latents with text features, context (N,n,K) and pooled (N,P) float16, in place of labels.

    The last twentieth, at most 512, is held out for validation. `text` is whose features they are: toy or sd3.
    """

    def __init__(self, path, resolution, text, held_out=False):
        make = "pairs" if text == "toy" else f"text --images FOLDER --captions FILE --resolution {resolution}"
        make = f"make it: python prepare.py {make} --out {path}"
        if not Path(path, "meta.json").is_file():
            fail(f"no captioned data in {path}; {make}")
        super().__init__(path, resolution, need_images=False)
        if self.meta.get("text") != text:
            fail(f"{path} is for another model (its text features: {self.meta.get('text')}, not {text}); {make}")
        self.names[0:1] = ["context", "pooled"]
        for name in self.names:
            if len(self.array(name)) != self.meta["count"]:
                fail(f"{path}/{name}.npy has {len(self.array(name))} rows, not {self.meta['count']}: prepare it again")
        end = self.meta["count"]
        start = end - min(512, end // 20)
        self.rows = range(start, end) if held_out else range(start)

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, indices):
        return super().__getitem__(np.arange(self.meta["count"])[self.rows.start:self.rows.stop][indices])


class RandomPairs(torch.utils.data.Dataset):
    """Random latents and text features of SD3's shapes, for --bench."""

    def __init__(self, resolution):
        self.meta, self.shape = SD3_VAE_META | dict(source="random", count=512), (16, resolution // 8, resolution // 8)

    def __len__(self):
        return self.meta["count"]

    def __getitem__(self, indices):
        shapes = dict(moments=(32, *self.shape[1:]), context=(CLIP_LENGTH, 2048), pooled=(2048,))
        return {name: torch.rand(len(indices), *shape) for name, shape in shapes.items()}


def micro_batches(data, seed, batch_size, run, first_step=0, workers=0):
    """This rank's micro-batches on its device, from step `first_step` on, without end.

    The order of images is a pure function of (seed, epoch): the global batch of a step is a stretch of the shuffled
    epochs; rank r takes every world-th image of it from r on, in pieces of run.micro_batch.
    """
    @functools.lru_cache(2)  # a batch touches two epochs, or the set is tiny
    def permutation(epoch):
        return np.random.default_rng([seed, epoch]).permutation(len(data))

    def order():
        for start in itertools.count(first_step * batch_size, batch_size):
            indices = [permutation(i // len(data))[i % len(data)] for i in range(start, start + batch_size)]
            yield from np.array(indices[run.rank::run.world]).reshape(-1, run.micro_batch)

    loader = torch.utils.data.DataLoader(  # its sampler gives whole batches of indices
        data, batch_size=None, sampler=order(), num_workers=workers, worker_init_fn=_outlive_signals,
        pin_memory=run.device.type == "cuda")
    for batch in loader:
        yield {name: tensor.to(run.device, non_blocking=True) for name, tensor in batch.items()}


def class_tokens(teacher, data, run, workers=0):
    """Class tokens (N,K) of all images of `data`, in one pass, a stretch of them per rank; rank 0 gets them."""
    stretch = np.array_split(np.arange(len(data)), run.world)[run.rank]
    batches, data.names = np.array_split(stretch, 1 + len(stretch) // 256), ["images"]
    loader = torch.utils.data.DataLoader(data, batch_size=None, sampler=batches, num_workers=workers)
    bar = tqdm(loader, desc=f"features of {data.path}", unit="batch", disable=True if run.rank else None)
    with run.autocast():
        tokens = torch.cat([teacher(batch["images"].to(run.device))[0].cpu() for batch in bar])
    if run.world == 1:
        return tokens
    gathered = [None] * run.world if run.rank == 0 else None
    dist.gather_object(tokens, gathered)
    return torch.cat(gathered) if run.rank == 0 else None


def _outlive_signals(worker):
    """Ctrl-C and Slurm reach every process of a job: a data worker lives on until the step under way is saved."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: signal.alarm(30))


def clean_input(batch, meta, noise):
    """x (B,C,H,W) of a batch: pixels in [-1,1], or a fresh sample of the VAE's posterior, scaled."""
    if "moments" not in batch:
        return batch["images"].permute(0, 3, 1, 2).float() / 127.5 - 1
    mean, std = batch["moments"].float().chunk(2, dim=1)
    scale, shift = latent_affine(meta, noise.device)
    return (mean + std * noise) * scale + shift


# ---------------------------------------------------------------------------------------------------------------------
# Around a run: the tools it calls, what ends it, the log and the pictures it writes.
# ---------------------------------------------------------------------------------------------------------------------
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}  # dense bf16, by the vendor


@contextlib.contextmanager
def flop_counter():
    """PyTorch's counter of FLOPs, made to see attention: which of its kernels it knows changes from version to version.

    So attention is computed by its formula while it counts, two products of matrices.
    """
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        yield counter


def run_tool(*command):
    """Run prepare.py or evaluate.py as a user would, printing the command."""
    print("$ python", *command, flush=True)
    env = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    if code := subprocess.run([sys.executable, Path(__file__).with_name(command[0]), *command[1:]], env=env).returncode:
        raise SystemExit(code)


def catch_stop(run):
    """stop(step): has Ctrl-C or SIGTERM reached any rank? All must leave at the same step, so they compare every 10."""
    asked = torch.tensor(0)  # on the CPU: comparing does not wait for the GPU

    def handle(number, frame):
        asked.fill_(number)
        if run.world == 1:
            signal.signal(number, signal.SIG_DFL)  # a second Ctrl-C ends it at once

    def stop(step):
        if run.world > 1 and step % 10 == 0:
            dist.all_reduce(asked, op=dist.ReduceOp.MAX)
        return int(asked) if run.world == 1 or step % 10 == 0 else 0

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handle)
    return stop


def end_run(cfg, run, log, step, stopping):
    """After the last step: the bar closes, signals act as ever, and a run that was told to stop ends here."""
    log.bar.close()
    if run.world > 1:
        dist.barrier()  # until rank 0 has saved: what follows reads its files, and torchrun ends all with the first
    signal.signal(signal.SIGINT, signal.default_int_handler)  # what follows is stopped by a plain Ctrl-C again
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if stopping:
        say(f"stopped at step {step}, saved in {cfg.out}/last.pt; the same command continues")
        raise SystemExit(128 + stopping)


@contextlib.contextmanager
def clear_errors(run, memory="--micro-batch (now {}); the global batch stays the same"):
    """Around all that a script does: what its user can mend becomes one line; at the end the ranks part."""
    try:
        yield
    except torch.OutOfMemoryError:
        fail(f"out of GPU memory: lower {memory.format(run.micro_batch)}")
    except OSError as error:  # a full disk, most likely
        fail(f"{first_line(error)}; free some disk, or choose another --out, and repeat the command: it continues")
    except KeyboardInterrupt:
        fail("interrupted")
    finally:
        if run.world > 1:
            dist.destroy_process_group()


class Log:
    """Progress bar and log.jsonl of rank 0. Sums stay on the device between log points: no step waits for a number."""

    def __init__(self, cfg, run, first_step, flops_per_image):
        self.cfg, self.run, self.path = cfg, run, Path(cfg.out) / "log.jsonl"
        name = torch.cuda.get_device_name() if run.device.type == "cuda" else ""
        peak = next((flops for gpu, flops in PEAK_FLOPS.items() if gpu in name), None)
        self.mfu_of_rate = flops_per_image / (run.world * peak) if peak else None
        if run.rank == 0 and self.path.exists() and not cfg.bench:  # a killed run may have logged beyond its last save
            lines = [line for line in self.path.read_text().splitlines(True) if line.endswith("\n")]
            self.path.write_text("".join(line for line in lines if json.loads(line)["step"] <= first_step))
        self.bar = tqdm(total=cfg.max_train_steps, initial=first_step, unit="step", disable=True if run.rank else None)
        self.bad, self.sums, self.steps, self.clock = torch.zeros((), device=run.device), 0, 0, time.perf_counter()

    def add(self, finite, **terms):
        """Add one step's scalars; what a skipped step computed is left out."""
        self.names, values = list(terms), torch.stack([*terms.values(), torch.ones_like(self.bad)])
        self.sums, self.steps = self.sums + torch.where(finite, values, 0), self.steps + 1
        self.bad = (self.bad + 1) * (~finite | (terms["grad_norm"] == 0))  # steps in a row without a usable gradient
        self.bar.update()

    @contextlib.contextmanager
    def pause(self):
        """What happens inside (saving, a preview) is no training time."""
        start = time.perf_counter()
        yield
        self.clock += time.perf_counter() - start

    def write(self, step):
        """Reduce over ranks, once, and write a line; stop after three steps in a row without a usable gradient."""
        values = torch.cat([self.sums, self.bad[None]]) / self.run.world
        if self.run.world > 1:
            dist.all_reduce(values)
        *sums, used, bad = values.tolist()  # the only wait for the device between log points
        seconds = (time.perf_counter() - self.clock) / self.steps
        line = {name: value / max(used, 1) for name, value in zip(self.names, sums)}
        line |= dict(skipped=self.steps - round(used), images_per_s=self.cfg.batch_size / seconds)
        if self.mfu_of_rate:
            line |= dict(mfu=line["images_per_s"] * self.mfu_of_rate)
        if self.run.device.type == "cuda":
            line |= dict(memory_gb=torch.cuda.max_memory_allocated() / 1e9)
        text = ", ".join(f"{name} {value:.4g}" for name, value in line.items() if value or name != "skipped")
        self.bar.set_postfix_str(text)
        if self.run.rank == 0 and self.bar.disable:  # no terminal: plain lines
            left = datetime.timedelta(seconds=round(seconds * (self.cfg.max_train_steps - step)))
            print(f"step {step}/{self.cfg.max_train_steps}: {text}, {left} left", flush=True)
        if self.run.rank == 0 and not self.cfg.bench:
            with open(self.path, "a") as file:
                file.write(json.dumps(dict(step=step) | {n: float(f"{v:.6g}") for n, v in line.items()}) + "\n")
        if bad >= 3:
            fail(f"no usable gradient (zero or not finite) in the last {bad:.0f} steps, at step {step}; {self.cfg.out} "
                 f"keeps the checkpoint from before: try a lower --learning-rate, or --precision fp32")
        self.sums, self.steps, self.clock = 0, 0, time.perf_counter()


def save_picture(path, images, columns=8):
    """A picture of images (N,R,R,3) uint8, in rows; small ones are enlarged, so that one can look at them."""
    from torchvision.utils import save_image
    images = torch.as_tensor(images).permute(0, 3, 1, 2).float() / 255
    save_image(F.interpolate(images, scale_factor=4) if images.shape[-1] < 64 else images, path, nrow=columns)


def draw_paths(path, titles, z, reach=5):
    """A panel per title: 40 of the paths z (steps+1,panels,2,count) of each class between the densities of the ends."""
    from PIL import Image, ImageDraw, ImageFont
    width, height, grey, ink, font = 900, 600, (200, 204, 210), (40, 42, 48), ImageFont.load_default(26)
    image = Image.new("RGB", (width * min(3, len(titles)), height * -(-len(titles) // 3)), "white")
    draw, edges = ImageDraw.Draw(image, "RGBA"), np.linspace(-reach, reach, 122)
    for panel, title in enumerate(titles):
        def place(across, value):
            """Pixel of a place from 0, noise, to 1, data, and of a value of z."""
            return width * (panel % 3 + 0.24 + 0.56 * across), height * (panel // 3 + 0.51 - 0.4 * value / reach)
        for value in range(1 - reach, reach):
            draw.line([place(0, value), place(1, value)], grey, 1)
            draw.text(place(-0.34, value), str(value), ink, font, "rm")
        for of_class, colour in enumerate([(36, 99, 176), (214, 96, 28)]):
            for line in z[::5, panel, of_class, z.shape[-1] // 80::z.shape[-1] // 40].T:
                draw.line([place(i / (len(line) - 1), value) for i, value in enumerate(line)], (*colour, 130), 2)
            for side in (0, 1):  # the densities stand on their axes and point outwards
                counts = np.convolve(np.histogram(z[-side, panel, of_class], edges)[0], np.hanning(11), "same")
                heights = 0.3 * (2 * side - 1) * counts / counts.max()
                outline = [place(side + h, v) for h, v in zip(heights, np.linspace(-reach, reach, len(heights)))]
                draw.polygon([place(side, -reach), *outline, place(side, reach)], (*colour, 130))
        for across, value, text, anchor in ((0, -reach, "noise, t = 1", "ma"), (1, -reach, "data, t = 0", "ma"),
                                            (0.5, reach, title, "md")):
            draw.text(place(across, value), text, ink, font, anchor)
    image.resize((image.width // 2, image.height // 2), Image.LANCZOS).save(path)

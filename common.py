"""The shared blocks: SiT, U-Net blocks, interpolants and the ODE/SDE sampler.

Conventions, the same in all files (they are REPA's; the SiT paper's own time runs the other way):
    t = 0 is data, t = 1 is noise
    x_t = a(t) x + s(t) noise
    v = dx_t/dt = a'(t) x + s'(t) noise
    x clean input, x_t noisy, t time (B,), v velocity, y label (num_classes is the null label),
    c conditioning, h hidden tokens, z teacher features.
    B batch, N tokens, D width, C channels, H W, K teacher width.
PyTorch and NumPy only. Nothing here reads a file, knows a method or ends the process.
"""
import math

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F


class SizeError(ValueError):
    """Sizes that do not go together, in one line that says which would."""


# --------------------------------------------------------------------------------------------------
# SiT: a transformer on image patches, conditioned on time and label by adaptive layer norm
# (arXiv 2401.08740). Parameter names follow the official checkpoints, which load with strict=True.
# --------------------------------------------------------------------------------------------------
SIT_SIZES = {
    "toy": dict(hidden_size=96, depth=4, num_heads=4, patch_size=4),
    "toy/2": dict(hidden_size=96, depth=4, num_heads=4, patch_size=2),  # for latents of the toy set
}
for size, hidden_size, depth, num_heads in [
    ("S", 384, 12, 6),
    ("B", 768, 12, 12),
    ("L", 1024, 24, 16),
    ("XL", 1152, 28, 16),
]:
    for patch_size in (2, 4, 8):
        SIT_SIZES[f"SiT-{size}/{patch_size}"] = dict(
            hidden_size=hidden_size, depth=depth, num_heads=num_heads, patch_size=patch_size)


def modulate(h, shift, scale):
    """Adaptive layer norm's affine map: tokens h (B,N,D), shift and scale (B,D)."""
    return h * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


def timestep_embedding(t, dim=256, max_period=10000):
    """Sinusoids of the raw time t (...) in [0,1], cosines first: (...,dim)."""
    freqs = torch.exp(-math.log(max_period) * torch.arange(dim // 2, device=t.device) / (dim // 2))
    args = t.float()[..., None] * freqs
    return torch.cat([args.cos(), args.sin()], dim=-1)


def sincos_pos_embed_2d(dim, grid):
    """Fixed 2-D position table (grid*grid, dim), float64: its first half encodes the column."""
    omega = 1 / 10000 ** (np.arange(dim // 4) / (dim / 4))
    row, column = np.divmod(np.arange(grid * grid), grid)
    across = np.outer(column, omega)  # (N,dim/4)
    down = np.outer(row, omega)
    table = [np.sin(across), np.cos(across), np.sin(down), np.cos(down)]
    return torch.from_numpy(np.concatenate(table, axis=1))


def init_linear(module):
    """Xavier-uniform weight and zero bias for a Linear; for nn.Module.apply."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def projector(dim, hidden_dim, z_dim):
    """The MLP that maps hidden tokens (B,N,dim) to teacher features (B,N,z_dim), token by token."""
    return nn.Sequential(
        nn.Linear(dim, hidden_dim),
        nn.SiLU(),
        nn.Linear(hidden_dim, hidden_dim),
        nn.SiLU(),
        nn.Linear(hidden_dim, z_dim),
    )


class FP32Sequential(nn.Sequential):
    """A Sequential outside autocast: bf16 would round the time by more than a sampler step."""

    def forward(self, x):
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x.float())


class PatchEmbed(nn.Module):
    """Image (B,C,H,W) to patch tokens (B,N,D), row by row; all blocks keep their memory layout."""

    def __init__(self, patch_size, in_channels, hidden_size):
        super().__init__()
        self.proj = nn.Conv2d(in_channels, hidden_size, patch_size, stride=patch_size)
        nn.init.xavier_uniform_(self.proj.weight.view(hidden_size, -1))  # as if it were a Linear
        nn.init.zeros_(self.proj.bias)

    def forward(self, x):
        return self.proj(x).flatten(2).transpose(1, 2).contiguous()  # (B,D,h,w) -> (B,N,D)


class TimestepEmbedder(nn.Module):
    """Time t (B,) to a vector (B,D)."""

    def __init__(self, hidden_size, frequency_size=256):
        super().__init__()
        self.frequency_size = frequency_size
        first = nn.Linear(frequency_size, hidden_size)
        second = nn.Linear(hidden_size, hidden_size)
        self.mlp = FP32Sequential(first, nn.SiLU(), second)

    def forward(self, t):
        return self.mlp(timestep_embedding(t, self.frequency_size))


class LabelEmbedder(nn.Module):
    """Label y (B,) to a vector (B,D); row num_classes is the null label of guidance."""

    def __init__(self, num_classes, hidden_size):
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, hidden_size)

    def forward(self, y):
        return self.embedding_table(y)


def rotate(q, rope):
    """Rotary positions: turn neighbouring channels of q (B,heads,N,d) by the angles in rope.

    rope = cos, sin, each (N,d/2). How positions make angles differs: the scripts say it.
    """
    cos, sin = rope
    even = q[..., 0::2]
    odd = q[..., 1::2]
    turned = torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1)
    return turned.flatten(-2).to(q.dtype)


class Attention(nn.Module):
    """Multi-head self-attention over tokens (B,N,D), with rotary positions if they are given."""

    def __init__(self, dim, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def split(self, h, rope=None):
        """Tokens (B,N,D) to q, k, v by heads, each (B,heads,N,D/heads)."""
        qkv = self.qkv(h).view(*h.shape[:2], 3, self.num_heads, -1)  # (B,N,3,heads,D/heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        if rope is not None:
            q = rotate(q, rope)
            k = rotate(k, rope)
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
    """Transformer block whose two branches are shifted, scaled and gated by c (adaLN-zero)."""

    def __init__(self, hidden_size, num_heads, mlp_ratio=4.0):
        super().__init__()
        self.norm1 = nn.LayerNorm(hidden_size, eps=1e-6, elementwise_affine=False)
        self.attn = Attention(hidden_size, num_heads)
        self.norm2 = nn.LayerNorm(hidden_size, eps=1e-6, elementwise_affine=False)
        self.mlp = Mlp(hidden_size, int(hidden_size * mlp_ratio))
        self.adaLN_modulation = FP32Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))

    def forward(self, h, c, rope=None):
        modulation = self.adaLN_modulation(c).chunk(6, dim=1)  # each (B,D)
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = modulation
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
    """Velocity network v(x_t, t, y).

    input_size is H = W of x in pixels or latent places; sizes as in SIT_SIZES. A subclass writes
    its own forward from `embed`, `blocks` and `head`.
    """

    def __init__(self, input_size=32, in_channels=4, num_classes=1000, *,
                 hidden_size, depth, num_heads, patch_size):
        super().__init__()
        if input_size % patch_size:
            raise SizeError(f"an input of size {input_size} has no whole number of patches of "
                            f"{patch_size}: take another --model")
        self.input_size = input_size
        self.in_channels = in_channels
        self.num_classes = num_classes
        self.grid = input_size // patch_size  # tokens per side
        self.x_embedder = PatchEmbed(patch_size, in_channels, hidden_size)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.y_embedder = LabelEmbedder(num_classes, hidden_size)
        pos_embed = sincos_pos_embed_2d(hidden_size, self.grid).float().unsqueeze(0)  # (1,N,D)
        # Fixed, yet a Parameter in official checkpoints.
        self.pos_embed = nn.Parameter(pos_embed, requires_grad=False)
        self.blocks = nn.ModuleList([SiTBlock(hidden_size, num_heads) for _ in range(depth)])
        self.final_layer = FinalLayer(hidden_size, patch_size, in_channels)

        self.apply(init_linear)
        nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        nn.init.normal_(self.t_embedder.mlp[0].weight, std=0.02)
        nn.init.normal_(self.t_embedder.mlp[2].weight, std=0.02)
        # adaLN-zero: every block starts as the identity, and a fresh model's velocity is exactly 0.
        for block in self.blocks:
            nn.init.zeros_(block.adaLN_modulation[1].weight)
        nn.init.zeros_(self.final_layer.adaLN_modulation[1].weight)
        nn.init.zeros_(self.final_layer.linear.weight)

    def embed(self, x_t, t, y):
        """x_t (B,C,H,W), t (B,), y (B,) to tokens h (B,N,D) and conditioning c (B,D)."""
        h = self.x_embedder(x_t) + self.pos_embed
        c = self.t_embedder(t) + self.y_embedder(y)
        return h, c

    def head(self, h, c):
        """Tokens h (B,N,D) to the velocity (B,C,H,W), float32."""
        h = self.final_layer(h, c).float()  # (B,N,p*p*C)
        p = self.x_embedder.proj.stride[0]
        h = h.view(len(h), self.grid, self.grid, p, p, -1)
        h = h.permute(0, 5, 1, 3, 2, 4)  # (B,g,g,p,p,C) -> (B,C,g,p,g,p)
        return h.reshape(len(h), -1, self.grid * p, self.grid * p)

    def velocity(self, x_t, t, y):
        """v (B,C,H,W) by the plain network: what is sampled, whatever else a subclass trains."""
        h, c = self.embed(x_t, t, y)
        for block in self.blocks:
            h = block(h, c)
        return self.head(h, c)

    def forward(self, x_t, t, y):
        return self.velocity(x_t, t, y)


# --------------------------------------------------------------------------------------------------
# U-Net blocks, for a SiT that halves its token grid in the middle. `body` is U-DiT's
# name, `skip_linear` U-ViT's, w1 w2 w3 LLaMA's; there was no official checkpoint to follow.
# --------------------------------------------------------------------------------------------------
class Down(nn.Module):
    """(B,D,H,W) -> (B,D,H/2,W/2): a convolution to D/4, then 2x2 pixels become channels."""

    def __init__(self, width):
        super().__init__()
        conv = nn.Conv2d(width, width // 4, 3, padding=1, bias=False)
        self.body = nn.Sequential(conv, nn.PixelUnshuffle(2))
        nn.init.xavier_uniform_(self.body[0].weight)

    def forward(self, h):
        return self.body(h)


class Up(nn.Module):
    """(B,D,H,W) -> (B,D,2H,2W): a convolution to 4D, then four channels become 2x2 pixels."""

    def __init__(self, width):
        super().__init__()
        conv = nn.Conv2d(width, 4 * width, 3, padding=1, bias=False)
        self.body = nn.Sequential(conv, nn.PixelShuffle(2))
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
    """SiT block with SwiGLU; in a decoder it takes in the tokens `skip` (B,N,D) of an encoder."""

    def __init__(self, hidden_size, num_heads, mlp_dim, has_skip=False):
        super().__init__(hidden_size, num_heads)
        self.mlp = SwiGLU(hidden_size, mlp_dim)
        if has_skip:
            self.skip_linear = nn.Linear(2 * hidden_size, hidden_size)

    def forward(self, h, c, rope, skip=None):
        if skip is not None:
            h = self.skip_linear(torch.cat([h, skip], dim=-1))
        return super().forward(h, c, rope)


# --------------------------------------------------------------------------------------------------
# Interpolants: the path from data to noise. "cosine" is what SiT calls GVP.
# --------------------------------------------------------------------------------------------------
def path_coefficients(t, path_type="linear"):
    """a, s, a', s' of x_t = a x + s noise at time t (any shape)."""
    if path_type == "linear":
        return 1 - t, t, -torch.ones_like(t), torch.ones_like(t)
    half_pi = math.pi / 2
    a = torch.cos(half_pi * t)
    s = torch.sin(half_pi * t)
    return a, s, -half_pi * s, half_pi * a


def interpolate(x, noise, t, path_type="linear"):
    """Noisy input x_t and target velocity v, both shaped as x (B,...), at times t (B,)."""
    t = t.view(-1, *[1] * (x.ndim - 1))  # (B,) -> (B,1,...), to broadcast against x
    a, s, da, ds = path_coefficients(t, path_type)
    x_t = a * x + s * noise
    v = da * x + ds * noise
    return x_t, v


def lognormal_time(normal, path_type="linear"):
    """Times (B,) whose noise-to-data ratio exp(normal) is log-normal, from normal draws (B,)."""
    sigma = normal.exp()
    if path_type == "linear":
        return sigma / (1 + sigma)
    return 2 / math.pi * torch.atan(sigma)


def velocity_to_score(v, x_t, t, path_type="linear"):
    """Score grad log p_t(x_t) from the velocity; t broadcasts against x_t.

    On the linear path it is -((1-t) v + x_t) / t.
    """
    a, s, da, ds = path_coefficients(t, path_type)
    ratio = a / da
    return (ratio * v - x_t) / (s * s - ratio * ds * s)


# --------------------------------------------------------------------------------------------------
# Samplers: from noise (t=1) to data (t=0), along the probability-flow ODE or the reverse SDE with
# diffusion w(t) = 2t. Steps, grids and the last step are REPA's; the null label is an argument.
# --------------------------------------------------------------------------------------------------
LAST_SDE_STEP = 0.04  # the SDE's last step, 0.04 -> 0, adds no noise (SiT and REPA)


def sampling_times(mode, num_steps):
    """num_steps + 1 times from 1 to 0: an even grid, but for the SDE's last step."""
    if mode == "ode":
        return np.linspace(1, 0, num_steps + 1).tolist()
    return [*np.linspace(1, LAST_SDE_STEP, num_steps).tolist(), 0.0]


@torch.no_grad()
def sample(model, noise, y, y_null, *, mode="ode", num_steps=50, heun=False, path_type="linear",
           cfg_scale=1.0, guidance_low=0.0, guidance_high=1.0, randn=None, times=None):
    """Integrate v = model(x, t, y) from noise to data; returns data in the form of `noise`.

    noise: a tensor (B,...), or a tuple of tensors: one joint state (an image and its class token,
    say), with one guidance scale each. y, y_null (B,...): the condition and the null condition.
    Guidance v_null + cfg_scale (v - v_null) acts for guidance_low <= t <= guidance_high where the
    first scale is above 1; outside, the network runs on the conditional half only.
    randn(*shape) -> (B,*shape): the SDE's noise. times, falling to 0, replace the even grid of
    num_steps steps. Network evaluations: Euler num_steps, Heun 2 num_steps - 1.
    """
    is_tuple = isinstance(noise, tuple)
    states = noise if is_tuple else (noise,)
    scales = cfg_scale if isinstance(cfg_scale, tuple) else (cfg_scale,) * len(states)
    device = states[0].device
    batch = len(states[0])
    # The state is float64, so that hundreds of small steps add no rounding (MPS has no float64).
    dtype = torch.float32 if device.type == "mps" else torch.float64
    states = [x.to(dtype) for x in states]
    times = times or sampling_times(mode, num_steps)

    def velocities(states, t, is_guided):
        """The network's velocity of each state at time t, guided if asked."""
        inputs = [x.float() for x in states]
        condition = y
        if is_guided:
            inputs = [torch.cat([x, x]) for x in inputs]
            condition = torch.cat([y, y_null])
        t = torch.full((len(inputs[0]),), t, device=device)
        out = model(tuple(inputs), t, condition) if is_tuple else [model(inputs[0], t, condition)]
        out = [v.to(dtype) for v in out]
        if not is_guided:
            return out
        return [v[batch:] + scale * (v[:batch] - v[batch:]) for v, scale in zip(out, scales)]

    def slopes(states, t, is_guided):
        """dx/dt of each state at time t: the velocity, or the drift of the reverse SDE."""
        vs = velocities(states, t, is_guided)
        if mode == "ode":
            return vs
        # dx = (v - w/2 score) dt + sqrt(w) dW with w = 2t
        t = torch.full((), t, dtype=dtype, device=device)  # tensor() would wait for the GPU
        return [v - t * velocity_to_score(v, x, t, path_type) for v, x in zip(vs, states)]

    for t, t_next in zip(times, times[1:]):
        dt = t_next - t
        is_last = t_next == times[-1]
        is_guided = scales[0] > 1 and guidance_low <= t <= guidance_high
        kicks = [0.0] * len(states)  # sqrt(w) dW
        if mode == "sde" and not is_last:
            deviation = math.sqrt(2 * t * -dt)
            kicks = [deviation * randn(*x.shape[1:]).to(dtype) for x in states]
        if heun:  # stochastic Heun adds the noise first
            states = [x + kick for x, kick in zip(states, kicks)]
            kicks = [0.0] * len(states)
        d = slopes(states, t, is_guided)
        if heun and not is_last:  # the mean of the slopes at both ends
            ahead = [x + dt * d_i for x, d_i in zip(states, d)]
            d_next = slopes(ahead, t_next, is_guided)  # guided as at the first end, as in REPA
            d = [(a + b) / 2 for a, b in zip(d, d_next)]
        states = [x + dt * d_i + kick for x, d_i, kick in zip(states, d, kicks)]
    states = tuple(x.float() for x in states)
    return states if is_tuple else states[0]

"""U-REPA: representation alignment for U-Nets (Tian et al., NeurIPS 2025, arXiv 2503.18414).

SiT-down is a SiT that works on a quarter of the tokens in its middle blocks: `down` after the
encoder, `up` before the decoder, a long skip from every encoder block to its decoder block. The
skips move the features that resemble a vision teacher's to the centre, so REPA's alignment sits
there: the MLP sees the few middle tokens, and its OUTPUT is enlarged to the teacher's grid. The
cosine alone saturates early on a U-Net, so similarities between tokens are matched as well.

    L = mean |v_theta(x_t, t, y) - v|^2
        + lambda ( -mean_i <u_i, s_i>  +  w mean_ij (<u_i, u_j> - <s_i, s_j>)^2 )
    z_hat = enlarged MLP(h)
    u = z_hat / |z_hat|,  s = z / |z|  token by token;  i, j: tokens of the SAME image

    python urepa.py                         the toy: data, training, samples, metrics; 3 minutes
    python urepa.py --manifold-weight 0     the token cosine alone, REPA on a U-Net
    python urepa.py --proj-coeff 0          plain SiT-down, the baseline: no teacher is run
    torchrun --nproc_per_node=8 urepa.py --model SiT-down-XL/2  the paper, on data/imagenet256
    torchrun --nproc_per_node=8 urepa.py --model SiT-down-XL/2 --sample 50000 \\
        --ckpt runs/urepa-SiT-down-XL-2/last.pt
    python evaluate.py runs/urepa-toy/samples.npz data/toy

Published for SiT-down-XL/2 at 256 px: FID 5.4 after 400K training steps without guidance
(--cfg-scale 1); 1.48 after 1M and 1.41 after 2M with the SDE and guidance 1.65 on t in [0, 0.7],
the defaults. Our runs: the toy and checks, in docs/results.md; not ImageNet. SiT-down-XL has 954 M
parameters, 1.4 times SiT-XL's. Its published multiply-adds (108.8 G, 109.3 with the projector) fit
only without the products inside attention, SiT's only with them; like for like: 111.9, 118.6.

What differs from repa.py: the network; where it meets the teacher, and the second term in which it
does; guidance 1.65. No official code or checkpoint was at hand: none can confirm the wiring, and
official weights cannot be expected to load here. "U-REPA's choices" in docs/results.md says of each
choice whether it is the paper's, the only one found to give the published counts of parameters and
multiply-adds (tests/test_urepa.py), or ours. The tests compare with official parts put together
(REPA's embedders and loss, U-DiT's RoPE and convolutions) and with SimpleTuner's U-REPA loss. The
paper's time-aware projector and lambda(t), not in its main results, are left out.
"""
import copy
import functools
import math
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn as nn
import torch.nn.functional as F

from common import (
    Down,
    LabelEmbedder,
    SiT,
    SizeError,
    TimestepEmbedder,
    UNetBlock,
    Up,
    init_linear,
    interpolate,
    lognormal_time,
    projector,
    sample,
)
from support.checkpoints import init_from, load_strict, load_weights, restore, save_run
from support.dataset import clean_input, micro_batches, open_data, step_draws
from support.flags import parse
from support.log import Log, last_line
from support.runs import (
    DDP_OPTIONS,
    announce,
    catch_stop,
    clear_errors,
    compile_blocks,
    end_run,
    example_inputs,
    make_data,
    run_tool,
    setup,
    training_flops,
)
from support.samples import generate_npz, preview
from support.teachers import check_grids, load_teachers
from support.terminal import fail, say
from support.vae import SD_VAE_META, load_decoder


@dataclass
class Config:
    """One field is one flag. Values are the paper's for SiT-down-XL/2; RECIPES has others'."""
    # The method
    manifold_weight: float = 3.0            # w, beside the token cosine; 0 = the cosine alone
    projector_dim: int = 2048               # width of the projector's hidden layers

    # The run
    model: str = "toy"                      # toy, or SiT-down-{B,L,XL}/2; it picks the recipe
    data: str = "data/imagenet{resolution}"  # folder made by prepare.py
    out: str = "runs/urepa-{model}"         # config.json, log.jsonl, last.pt, ema-*.pt, previews
    resolution: int = 256                   # pixels
    batch_size: int = 256                   # images per step, over all GPUs
    micro_batch: int = 0                    # images per GPU at once; 0 = batch size / GPUs
    max_train_steps: int = 400_000          # the paper's tables; its best model has 2M

    # Optimisation
    learning_rate: float = 1e-4             # AdamW, constant
    max_grad_norm: float = 1.0              # gradients are clipped to this norm
    ema_decay: float = 0.9999               # of the averaged weights, every step

    # Diffusion
    cfg_prob: float = 0.1                   # labels dropped, for classifier-free guidance
    path_type: Literal["linear", "cosine"] = "linear"       # interpolant
    weighting: Literal["uniform", "lognormal"] = "uniform"  # distribution of t

    # Teacher and alignment
    enc_type: str = "dinov2-vit-b"          # several with commas; prepared = DATA/teacher.pt
    teacher_ckpt: str = ""                  # their weights from files, not the hub, with commas
    encoder_depth: int = 18                 # align after this block, from 1; B 8, L 16
    proj_coeff: float = 0.5                 # lambda, of both terms; 0 = SiT-down, no teacher

    # Autoencoder
    vae: Literal["ft-ema", "ft-mse"] = "ft-ema"  # SD-VAE that decodes samples
    vae_ckpt: str = ""                      # its weights from a file instead of the hub

    # How it is carried out
    precision: Literal["auto", "bf16", "fp32"] = "auto"  # auto = bf16 on CUDA, fp32 elsewhere
    compile: bool = None                    # torch.compile each block; default: on CUDA
    seed: int = 0                           # of the weights, the order of images, every draw
    workers: int = 4                        # data processes per GPU
    log_every: int = 100                    # steps
    save_every: int = 5000                  # steps between writes of last.pt
    keep_every: int = 50_000                # steps between ema-*.pt, which stay; 0 = none
    preview_every: int = 10_000             # steps between pictures; 0 = none
    init: str = ""                          # start from the weights of this checkpoint

    # Sampling
    ckpt: str = ""                          # checkpoint to sample from
    sample: int = 0                         # generate this many images instead of training
    labels: list[int] = None                # classes to sample, in turn; default: random
    mode: Literal["sde", "ode"] = "sde"     # sampler
    num_steps: int = 250                    # of the sampler
    heun: bool = False                      # second-order steps
    cfg_scale: float = 1.65                 # guidance scale; 1 = none
    guidance_low: float = 0.0               # guidance acts for t from here
    guidance_high: float = 0.7              # to here; t = 1 is noise

    # Speed
    bench: int = 0                          # train this many steps on random data, write nothing


MODELS = {
    "toy": dict(hidden_size=96, depths=(1, 2, 1), num_heads=4, mlp_dim=256, patch_size=4),
}
for name, width, depths, heads, mlp_dim in [
    # depths: encoder, middle, decoder; mlp_dim: 8/3 of the width, rounded up to a multiple of 256
    ("B", 768, (5, 5, 5), 12, 2048),
    ("L", 1024, (9, 14, 9), 16, 2816),
    ("XL", 1152, (10, 16, 10), 16, 3072),
]:
    MODELS[f"SiT-down-{name}/2"] = dict(
        hidden_size=width, depths=depths, num_heads=heads, mlp_dim=mlp_dim, patch_size=2)
RECIPES = {  # by the beginning of the model's name
    "toy": dict(
        data="data/toy", resolution=16, batch_size=32, max_train_steps=2000,
        learning_rate=4e-3, ema_decay=0.99, projector_dim=256,
        enc_type="prepared", encoder_depth=2,
        workers=0, log_every=50, save_every=500, keep_every=0, preview_every=400,
        mode="ode", num_steps=20, cfg_scale=1.0, guidance_high=1.0),
    "SiT-down-B": dict(encoder_depth=8),
    "SiT-down-L": dict(encoder_depth=16),
}
RANGES = {"manifold_weight": (0, 1e12)}


# --------------------------------------------------------------------------------------------------
# The method
# --------------------------------------------------------------------------------------------------
def rope_2d(grid, head_dim):
    """Rotary table of a token grid, U-DiT's layout: cosines and sines (2,N,head_dim/2).

    Token n stands in column x = n mod grid, row y = n div grid, and the angles of its channel pairs
    take turns: x f_0, y f_0, x f_1, y f_1, ... with f_k = 10000^(-4k/head_dim). head_dim is a
    multiple of 4.
    """
    n = torch.arange(grid * grid)
    freqs = 10000 ** (-torch.arange(0, head_dim, 4) / head_dim)
    across = torch.outer(n % grid, freqs)  # (N,head_dim/4)
    down = torch.outer(n // grid, freqs)
    angles = torch.stack([across, down], dim=-1).flatten(1)  # (N,head_dim/4,2) -> (N,head_dim/2)
    return torch.stack([angles.cos(), angles.sin()])


def to_grid(h):
    """Tokens (B,N,D), row by row, to an image of them (B,D,g,g)."""
    grid = math.isqrt(h.shape[1])
    return h.mT.unflatten(2, (grid, grid))  # (B,D,N) -> (B,D,g,g)


def to_tokens(h):
    """(B,D,g,g) back to (B,N,D)."""
    # As a block's output is, in layout and precision: compiled blocks tell them apart, and bf16
    # convolutions would round the stream of tokens.
    return h.flatten(2).mT.float().contiguous()


class SiTDown(nn.Module):
    """SiT with three stages of blocks, the middle one at half the grid, and one MLP per teacher.

    z_dims: the teachers' widths K; without them there is no MLP: this is what is sampled. At the
    start all blocks are the identity, but `down`, `up` and the skips' Linear layers are not.
    """

    def __init__(self, input_size, in_channels, num_classes, sizes, encoder_depth=0, z_dims=(),
                 projector_dim=0):
        super().__init__()
        width = sizes["hidden_size"]
        heads = sizes["num_heads"]
        # Both ends are those of a SiT: its embedders, position table and final layer.
        sit = SiT(
            input_size, in_channels, num_classes, hidden_size=width, depth=0, num_heads=heads,
            patch_size=sizes["patch_size"])
        if sit.grid % 2:
            raise SizeError(f"{sit.grid}x{sit.grid} tokens cannot be halved: an input of "
                            f"{input_size} needs another --model")
        encoder_blocks, middle_blocks, decoder_blocks = sizes["depths"]
        first = encoder_blocks + 1
        last = encoder_blocks + middle_blocks
        if z_dims and not first <= encoder_depth <= last:
            raise SizeError(f"--encoder-depth {encoder_depth}: the middle blocks are {first} to "
                            f"{last}")
        self.encoder_depth = encoder_depth
        self.input_size = input_size
        self.in_channels = in_channels
        self.num_classes = num_classes
        self.grid = sit.grid
        self.x_embedder = sit.x_embedder
        self.t_embedder = sit.t_embedder
        self.y_embedder = sit.y_embedder
        self.pos_embed = sit.pos_embed
        self.final_layer = sit.final_layer

        make_block = functools.partial(UNetBlock, width, heads, sizes["mlp_dim"])
        self.t_embedder_mid = TimestepEmbedder(width)
        self.y_embedder_mid = LabelEmbedder(num_classes, width)
        self.encoder = nn.ModuleList([make_block() for _ in range(encoder_blocks)])
        self.down = Down(width)
        self.middle = nn.ModuleList([make_block() for _ in range(middle_blocks)])
        self.up = Up(width)
        self.decoder = nn.ModuleList([make_block(has_skip=True) for _ in range(decoder_blocks)])
        # All blocks in order. A plain list, for a ModuleList would give every weight a second name.
        self.blocks = [*self.encoder, *self.middle, *self.decoder]
        # Positions are counted in each stage's own grid. The tables are constants, so no checkpoint
        # holds them.
        self.register_buffer("rope", rope_2d(self.grid, width // heads), persistent=False)
        self.register_buffer("rope_mid", rope_2d(self.grid // 2, width // heads), persistent=False)

        for part in (self.encoder, self.middle, self.decoder, self.t_embedder_mid):
            part.apply(init_linear)
        nn.init.normal_(self.y_embedder_mid.embedding_table.weight, std=0.02)
        nn.init.normal_(self.t_embedder_mid.mlp[0].weight, std=0.02)
        nn.init.normal_(self.t_embedder_mid.mlp[2].weight, std=0.02)
        for block in self.blocks:
            nn.init.zeros_(block.adaLN_modulation[1].weight)
        self.projectors = nn.ModuleList(
            [projector(width, projector_dim, z_dim) for z_dim in z_dims])
        self.projectors.apply(init_linear)

    embed = SiT.embed  # x_t (B,C,H,W), t (B,), y (B,) to tokens h (B,N,D) and conditioning c (B,D)
    head = SiT.head  # h, c to the velocity (B,C,H,W)

    def stages(self, x_t, t, y):
        """Velocity (B,C,H,W), and the tokens (B,N/4,D) after each middle block."""
        h, c = self.embed(x_t, t, y)
        skips = []
        for block in self.encoder:
            h = block(h, c, self.rope)
            skips.append(h)
        h = to_tokens(self.down(to_grid(h)))  # (B,N,D) -> (B,N/4,D)
        c_mid = self.t_embedder_mid(t) + self.y_embedder_mid(y)  # (B,D), of this stage alone
        middles = []
        for block in self.middle:
            h = block(h, c_mid, self.rope_mid)
            middles.append(h)
        h = to_tokens(self.up(to_grid(h)))  # (B,N/4,D) -> (B,N,D)
        # The first decoder block gets the last encoder block's tokens, which `down` has seen, too.
        for block in self.decoder:
            h = block(h, c, self.rope, skips.pop())
        return self.head(h, c), middles

    def project(self, h):
        """Middle tokens h (B,N/4,D) to a z_hat (B,N,K) per teacher: the MLP, then the enlarging."""
        z_hats = []
        for mlp in self.projectors:
            z_hat = to_grid(mlp(h).float())  # (B,N/4,K) -> (B,K,g/2,g/2)
            z_hat = F.interpolate(z_hat, scale_factor=2, mode="bilinear")
            z_hats.append(to_tokens(z_hat))  # (B,K,g,g) -> (B,N,K)
        return z_hats

    def forward(self, x_t, t, y):
        """Velocity (B,C,H,W) and, per teacher, the projected tokens z_hat (B,N,K)."""
        v, middles = self.stages(x_t, t, y)
        if len(self.projectors) == 0:
            return v, []
        depth_in_middle = self.encoder_depth - len(self.encoder)  # from 1, as encoder_depth is
        return v, self.project(middles[depth_in_middle - 1])

    def velocity(self, x_t, t, y):
        """Plain SiT-down, for sampling: no projector is run."""
        v, _ = self.stages(x_t, t, y)
        return v


def token_loss(u, s):
    """Minus the cosine (B,) of unit tokens u and s (B,N,K), averaged over the places N."""
    return -(u * s).sum(dim=-1).mean(dim=1)


def manifold_loss(u, s):
    """Mean squared error (B,) of an image's N x N cosines between unit tokens; u, s (B,N,K)."""
    with torch.autocast(u.device.type, enabled=False):  # else these products, too, would be bf16
        gram_error = u @ u.mT - s @ s.mT  # (B,N,N)
        return gram_error.square().mean(dim=(1, 2))


def urepa_loss(model, x, t, noise, y, zs, path_type="linear"):
    """The three terms of the loss, each (B,): velocity error, minus the token cosine, Gram error.

    x, noise (B,C,H,W); t (B,); y (B,) with labels already dropped to the null label; zs: one
    (B,N,K) per teacher, raw features of the clean image. The second term lies in [-1,1] and is
    NEGATIVE in a healthy run.
    """
    x_t, v = interpolate(x, noise, t, path_type)
    v_hat, z_hats = model(x_t, t, y)
    loss_velocity = (v_hat - v).square().mean(dim=(1, 2, 3))
    if not z_hats:
        return loss_velocity, torch.zeros_like(loss_velocity), torch.zeros_like(loss_velocity)
    token_losses = []
    manifold_losses = []
    for z_hat, z in zip(z_hats, zs):
        # Unit length comes AFTER the enlarging: interpolated tokens are shorter than those they lie
        # between.
        u = F.normalize(z_hat.float(), dim=-1)
        s = F.normalize(z.float(), dim=-1)
        token_losses.append(token_loss(u, s))
        manifold_losses.append(manifold_loss(u, s))
    loss_proj = torch.stack(token_losses).mean(dim=0)
    loss_manifold = torch.stack(manifold_losses).mean(dim=0)
    return loss_velocity, loss_proj, loss_manifold


def sit_down_from_weights(weights, name):
    """The SiT-down of size `name` that holds these weights; what else it needs, shapes tell."""
    weights = {key: w for key, w in weights.items() if not key.startswith("projectors.")}
    for key in ("pos_embed", "y_embedder.embedding_table.weight"):
        if key not in weights:
            fail(f"these weights are not those of a SiT-down: {key} is missing")
    _, channels, patch, _ = weights["x_embedder.proj.weight"].shape  # (D,C,p,p)
    input_size = patch * math.isqrt(weights["pos_embed"].shape[1])  # of (1,N,D)
    num_classes = len(weights["y_embedder.embedding_table.weight"]) - 1
    model = SiTDown(input_size, channels, num_classes, MODELS[name])
    names = ", ".join(MODELS)
    load_strict(model, weights, f"these weights are not those of --model {name} (one of {names})")
    return model


def init_sit_down(path, model):
    """Start from a SiT-down, perhaps of other classes or teachers; returns what stays fresh."""
    return init_from(path, model, may_be_fresh=("y_embedder", "y_embedder_mid", "projectors"))


# --------------------------------------------------------------------------------------------------
# The step: the same in every script (tests/test_copies.py compares them)
# --------------------------------------------------------------------------------------------------
def parallelise(model, cfg, run):
    """The model as the training step calls it: blocks compiled, gradients averaged over ranks."""
    compile_blocks(model, cfg)
    if run.world == 1:
        return model
    return nn.parallel.DistributedDataParallel(model, **DDP_OPTIONS)


def optimizer_step(optimizer, parameters, max_grad_norm):
    """Clip, update, clear; returns the gradient's norm and whether it is finite.

    If it is not, the update is skipped: on the device, and on all ranks alike.
    """
    grad_norm = nn.utils.clip_grad_norm_(parameters, max_grad_norm)
    is_finite = grad_norm.isfinite()
    optimizer.found_inf = (~is_finite).float()  # at 1, fused AdamW skips its update
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return grad_norm, is_finite


@torch.no_grad()
def update_ema(ema, model, decay):
    """ema <- decay ema + (1 - decay) model, over the trained parameters."""
    averages = []
    weights = []
    for average, weight in zip(ema.parameters(), model.parameters()):
        if weight.requires_grad:
            averages.append(average)
            weights.append(weight)
    torch._foreach_lerp_(averages, weights, 1 - decay)


# --------------------------------------------------------------------------------------------------
# Training
# --------------------------------------------------------------------------------------------------
def build(cfg, data, run):
    """The frozen teachers (none without a projection loss) and the student, on the device."""
    teachers = []
    if cfg.proj_coeff > 0:
        teachers = load_teachers(cfg, run)
    torch.manual_seed(cfg.seed)  # the SiT's initial weights do not depend on the teacher
    channels, size, _ = data.shape
    model = SiTDown(
        size, channels, data.meta["num_classes"], MODELS[cfg.model], cfg.encoder_depth,
        [teacher.width for teacher in teachers], cfg.projector_dim)
    check_grids(cfg, teachers, model.grid)
    if cfg.compile:
        for teacher in teachers:
            teacher.compile()
    return teachers, model.to(run.device)


def train(cfg, run):
    """Begin or continue the run in cfg.out."""
    data = open_data(cfg, need_images=cfg.proj_coeff > 0)
    teachers, model = build(cfg, data, run)
    decode = None
    if cfg.preview_every and not cfg.bench:  # a missing VAE shows now, not at the first preview
        decode = load_decoder(data.meta, cfg.vae, cfg.vae_ckpt, run.device)
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters, lr=cfg.learning_rate, betas=(0.9, 0.999), weight_decay=0, fused=True)
    first_step = restore(cfg, data.meta, model, ema, optimizer, init=init_sit_down)
    if first_step >= cfg.max_train_steps:
        say(f"{cfg.out} is finished: {first_step} steps; raise --max-train-steps to train on, or "
            f"choose another --out")
        return
    flops_per_image = training_flops(model, *example_inputs(data, run))
    announce(cfg, run, data, model, flops_per_image)
    log = Log(cfg, run, first_step, flops_per_image)
    stop = catch_stop(run)
    net = parallelise(model, cfg, run)
    loader = micro_batches(data, cfg.seed, cfg.batch_size, run, first_step, cfg.workers)

    for step in range(first_step + 1, cfg.max_train_steps + 1):
        # Every draw of the step is made for the global batch; this rank holds its part of it.
        normal, uniform = step_draws(cfg.seed, step, cfg.batch_size, run)
        posterior_noise = normal(*data.shape)
        noise = normal(*data.shape)
        if cfg.weighting == "uniform":
            t = uniform()
        else:
            t = lognormal_time(normal(), cfg.path_type)
        is_dropped = uniform() < cfg.cfg_prob

        sums = torch.zeros(4, device=run.device)
        for i in range(run.accumulation):
            batch = next(loader)
            rows = slice(i * run.micro_batch, (i + 1) * run.micro_batch)
            is_last = i + 1 == run.accumulation
            # Gradients are reduced once a step: with the last micro-batch.
            reduction = nullcontext() if is_last or run.world == 1 else net.no_sync()
            with reduction:
                with run.autocast():
                    zs = [teacher(batch["images"])[1] for teacher in teachers]  # patches
                    x = clean_input(batch, data.meta, posterior_noise[rows])
                    y = batch["labels"].masked_fill(is_dropped[rows], model.num_classes)
                    velocity, proj, manifold = urepa_loss(
                        net, x, t[rows], noise[rows], y, zs, cfg.path_type)
                    alignment = proj + cfg.manifold_weight * manifold
                    loss = (velocity + cfg.proj_coeff * alignment).mean()
                (loss / run.accumulation).backward()
            terms = torch.stack([loss, velocity.mean(), proj.mean(), manifold.mean()])
            sums += terms.detach() / run.accumulation

        grad_norm, is_finite = optimizer_step(optimizer, parameters, cfg.max_grad_norm)
        update_ema(ema, model, cfg.ema_decay)
        loss, velocity, proj, manifold = sums
        log.add(is_finite, loss=loss, loss_velocity=velocity, loss_proj=proj,
                loss_manifold=manifold, grad_norm=grad_norm)

        is_last_step = step == cfg.max_train_steps
        stopping = stop(step)
        if step % cfg.log_every == 0 or is_last_step:
            log.write(step)
        if run.rank == 0 and not cfg.bench:
            with log.pause():
                if step % cfg.save_every == 0 or is_last_step or stopping:
                    save_run(cfg, "last.pt", step, data.meta,
                             model=model, ema=ema, optimizer=optimizer)
                if cfg.keep_every and step % cfg.keep_every == 0:
                    save_run(cfg, f"ema-{step}.pt", step, data.meta, ema=ema)
                if cfg.preview_every and (step % cfg.preview_every == 0 or is_last_step):
                    preview(cfg, run, ema, draw, decode, step)
        if stopping:
            break
    loader.close()
    end_run(cfg, run, log, step, stopping)


# --------------------------------------------------------------------------------------------------
# Sampling
# --------------------------------------------------------------------------------------------------
def draw(cfg, run, model, y, randn):
    """Latents x (B,C,H,W) of labels y (B,) by the paper's sampler; no projector is run."""
    noise = randn(model.in_channels, model.input_size, model.input_size)
    y_null = torch.full_like(y, model.num_classes)
    with run.autocast():
        return sample(
            model.velocity, noise, y, y_null, randn=randn,
            mode=cfg.mode, num_steps=cfg.num_steps, heun=cfg.heun, path_type=cfg.path_type,
            cfg_scale=cfg.cfg_scale, guidance_low=cfg.guidance_low,
            guidance_high=cfg.guidance_high)


def generate(cfg, run):
    """Sample cfg.sample images from the EMA weights in cfg.ckpt; returns the .npz file's path."""
    weights, checkpoint = load_weights(cfg.ckpt, cfg)
    model = sit_down_from_weights(weights, cfg.model)
    model = compile_blocks(model.to(run.device).eval(), cfg)
    meta = checkpoint.get("data", SD_VAE_META)  # other codes' checkpoints have none
    decode = load_decoder(meta, cfg.vae, cfg.vae_ckpt, run.device)

    def images(y, randn):
        return {"arr_0": decode(draw(cfg, run, model, y, randn))}

    return generate_npz(cfg, run, images, model.num_classes)


def summary(cfg):
    """How training ended, in one line."""
    line = last_line(cfg)
    text = f"velocity loss {line['loss_velocity']:.4f}"
    if cfg.proj_coeff > 0:
        text += f", token cosine {-line['loss_proj']:.3f}, Gram error {line['loss_manifold']:.4f}"
    text += f" at step {line['step']}"
    if cfg.preview_every > 0:
        text += f"; look at {cfg.out}/preview-{line['step']}.png, a row per class"
    return text


def report_toy(cfg, run):
    """Sample 480 images without and with guidance; have them judged beside real images."""
    cfg = replace(cfg, sample=480, ckpt=f"{cfg.out}/last.pt")
    plain = generate(replace(cfg, cfg_scale=1.0), run)
    guided = generate(replace(cfg, cfg_scale=2.0), run)
    if run.rank == 0:
        run_tool("evaluate.py", plain, guided, cfg.data)
        print(summary(cfg))


def main(argv=None):
    """Train or sample, as the command line says; the toy does both and has the result judged."""
    cfg = parse(argv, Config, MODELS, RECIPES, RANGES, description=__doc__)
    run = setup(cfg)
    with clear_errors(run):
        if cfg.sample:
            return generate(cfg, run)
        is_toy = cfg.model == "toy" and cfg.data == "data/toy" and not cfg.bench
        if is_toy:
            make_data("toy", cfg.data)
        train(cfg, run)
        if is_toy:
            report_toy(cfg, run)


if __name__ == "__main__":
    main()

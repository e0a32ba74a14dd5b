"""U-REPA: representation alignment for a U-shaped SiT (Tian et al., NeurIPS 2025, arXiv 2503.18414).

SiT-down is a SiT that works on a quarter of the tokens in its middle blocks: `down` after the encoder, `up` before the
decoder, a long skip from every encoder block to its decoder block. The skips move the features that resemble a vision
teacher's to the centre, so REPA's alignment sits there: the MLP sees the few middle tokens, and its OUTPUT is enlarged
to the teacher's grid. The cosine alone saturates early on a U-Net, so similarities between tokens are matched as well.

    L = mean |v_theta(x_t, t, y) - v|^2  +  lambda ( -mean_i <u_i, s_i>  +  w mean_ij (<u_i, u_j> - <s_i, s_j>)^2 )

    u, s = z_hat / |z_hat|, z / |z| token by token, z_hat = enlarged MLP(h); i, j: tokens of the SAME image

    python urepa.py                         the toy, on any machine: data, training, samples, figures; 3 minutes
    python urepa.py --manifold-weight 0     the token cosine alone, REPA on a U-Net
    python urepa.py --proj-coeff 0          plain SiT-down, the baseline: no teacher is run
    torchrun --nproc_per_node=8 urepa.py --model SiT-down-XL/2                the paper's recipe, on data/imagenet256
    torchrun --nproc_per_node=8 urepa.py --model SiT-down-XL/2 --sample 50000 --ckpt runs/urepa-SiT-down-XL-2/last.pt
    python evaluate.py runs/urepa-toy/samples.npz data/toy

Published for SiT-down-XL/2 at 256 px: FID 5.4 after 400K training steps without guidance (--cfg-scale 1), 1.48 after
1M and 1.41 after 2M with the SDE and guidance 1.65 on t in [0, 0.7], the defaults. Run by us: the toy and the checks
in README.md, not ImageNet. SiT-down-XL has 954 M parameters, 1.4 times SiT-XL's. Its published multiply-adds (108.8 G,
109.3 with projector) fit only without the products inside attention, SiT's only with them; like for like: 111.9, 118.6.

What is established. No official code or checkpoint of U-REPA was at hand: none can confirm the wiring, and official
weights cannot be expected to load here. In this file
    [paper]   is in the paper or said by its authors: sizes, widths, the align depth 18 of XL, RoPE, SwiGLU, long skips,
              U-DiT's convolutions for down and up, the MLP before the enlarging, lambda, w, guidance and its interval;
    [fitted]  gives, all together, the published parameter counts (199.7, 686.6, 954.4 M) and multiply-adds, and nothing
              less does (tests/test_urepa.py): a second pair of embedders, SwiGLU of 2048, 2816, 3072 without biases,
              the fixed position table beside RoPE, down and up with D/4 and 4D channels, skips in the decoder alone;
    [ours]    is the reading that is easiest to defend, not proved by counts: the second pair conditions the middle
              blocks; the last skip is used first, as Linear([h, skip]); U-DiT's layout of RoPE, positions counted in
              each stage; bilinear enlarging; the Gram error as a MEAN over the token pairs of ONE image (the equation
              reads as a sum to be maximised); one draw of dropped labels for both tables; 250 sampler steps; the align
              depth of B and L. Third parties' code has the same Linear, enlarging and Gram error.
The tests compare with official parts put together (REPA's embedders and loss, U-DiT's RoPE and convolutions) and with
SimpleTuner's U-REPA loss. The paper's time-aware projector and lambda(t), not in its main results, are left out.
"""
import argparse
import copy
import functools
import inspect
import json
import math
import os
import re
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Literal, get_args, get_origin

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import distributed as dist

from common import (SD_VAE_META, Down, LabelEmbedder, Log, PreparedData, SiT, SyntheticData, TimestepEmbedder,
                    UNetBlock, Up, catch_stop, clean_input, clear_errors, end_run, fail, first_rank_first,
                    flop_counter, image_randn, init_from, init_linear, interpolate, load_checkpoint, load_decoder,
                    load_teacher, load_weights, lognormal_time, make_folder, micro_batches, mix_seed,
                    process_group_backend, run_tool, sample, sample_npz, save_checkpoint, save_picture, say,
                    step_draws)


@dataclass
class Config:
    """One field is one flag. The values are the paper's for SiT-down-XL/2; RECIPES holds what other models change."""
    model: str = "toy"                                    # toy, or SiT-down-{B,L,XL}/2; it picks the recipe
    data: str = "data/imagenet{resolution}"               # folder made by prepare.py
    out: str = "runs/urepa-{model}"                       # config.json, log.jsonl, last.pt, ema-*.pt, preview-*.png
    resolution: int = 256                                 # pixels
    batch_size: int = 256                                 # images per step, over all GPUs
    micro_batch: int = 0                                  # images per GPU at once; 0 = batch size / GPUs
    max_train_steps: int = 400_000                        # the paper's tables; its best model has 2M
    learning_rate: float = 1e-4                           # AdamW, constant
    max_grad_norm: float = 1.0                            # gradients are clipped to this norm
    ema_decay: float = 0.9999                             # of the averaged weights, every step
    cfg_prob: float = 0.1                                 # labels dropped, for classifier-free guidance
    path_type: Literal["linear", "cosine"] = "linear"     # interpolant
    weighting: Literal["uniform", "lognormal"] = "uniform"  # distribution of t
    enc_type: str = "dinov2-vit-b"                        # teacher; several with commas; prepared = DATA/teacher.pt
    teacher_ckpt: str = ""                                # teacher weights from files instead of the hub, with commas
    encoder_depth: int = 18                               # align after this block, counted from 1; B 8, L 16
    proj_coeff: float = 0.5                               # lambda, of both terms; 0 = plain SiT-down without a teacher
    vae: Literal["ft-ema", "ft-mse"] = "ft-ema"           # SD-VAE that decodes samples
    vae_ckpt: str = ""                                    # its weights from a file instead of the hub
    precision: Literal["auto", "bf16", "fp32"] = "auto"   # auto = bf16 on CUDA, fp32 elsewhere
    compile: bool = None                                  # torch.compile each block; default: on CUDA
    seed: int = 0                                         # of the weights, the order of images and every draw
    workers: int = 4                                      # data processes per GPU
    log_every: int = 100                                  # steps
    save_every: int = 5000                                # steps between writes of last.pt
    keep_every: int = 50_000                              # steps between ema-*.pt, which stay; 0 = none
    preview_every: int = 10_000                           # steps between pictures; 0 = none
    init: str = ""                                        # start from the weights of this checkpoint
    ckpt: str = ""                                        # checkpoint to sample from
    sample: int = 0                                       # generate this many images instead of training
    labels: list[int] = None                              # classes to sample, in turn; default: random
    mode: Literal["sde", "ode"] = "sde"                   # sampler
    num_steps: int = 250                                  # of the sampler
    heun: bool = False                                    # second-order steps
    cfg_scale: float = 1.65                               # guidance scale; 1 = none
    guidance_low: float = 0.0                             # guidance acts for t from here
    guidance_high: float = 0.7                            # to here; t = 1 is noise
    bench: int = 0                                        # train this many steps on synthetic data, write nothing
    projector_dim: int = 2048                             # width of the projector's hidden layers
    manifold_weight: float = 3.0                          # w, beside the token cosine; 0 = the cosine alone


MODELS = {"toy": dict(hidden_size=96, depths=(1, 2, 1), num_heads=4, mlp_dim=256, patch_size=4)} | {
    f"SiT-down-{name}/2": dict(hidden_size=width, depths=depths, num_heads=heads, mlp_dim=mlp_dim, patch_size=2)
    for name, width, depths, heads, mlp_dim in [  # depths: encoder, middle, decoder; mlp_dim: 8/3 width, up to 256s
        ("B", 768, (5, 5, 5), 12, 2048), ("L", 1024, (9, 14, 9), 16, 2816), ("XL", 1152, (10, 16, 10), 16, 3072)]}
RECIPES = {  # by the beginning of the model's name
    "toy": dict(data="data/toy", resolution=16, batch_size=32, max_train_steps=2000, learning_rate=4e-3, ema_decay=0.99,
                enc_type="prepared", encoder_depth=2, projector_dim=256, workers=0, log_every=50, save_every=500,
                keep_every=0, preview_every=400, mode="ode", num_steps=20, cfg_scale=1.0, guidance_high=1.0),
    "SiT-down-B": dict(encoder_depth=8),
    "SiT-down-L": dict(encoder_depth=16),
}
# What may change between a run and its continuation: how it is carried out, not what it computes.
BOOKKEEPING = ("data out micro_batch max_train_steps teacher_ckpt vae vae_ckpt compile workers log_every save_every "
               "keep_every preview_every ckpt sample labels mode num_steps heun cfg_scale guidance_low guidance_high "
               "bench").split()
RANGES = [("resolution batch_size max_train_steps log_every save_every num_steps cfg_scale projector_dim", 1, 1e12),
          ("micro_batch learning_rate proj_coeff seed workers keep_every preview_every sample bench", 0, 1e12),
          ("ema_decay cfg_prob guidance_low guidance_high", 0, 1), ("max_grad_norm", 1e-12, 1e12),
          ("manifold_weight", 0, 1e12)]


# ---------------------------------------------------------------------------------------------------------------------
# The method
# ---------------------------------------------------------------------------------------------------------------------
def rope_2d(grid, head_dim):
    """Rotary table of a token grid in U-DiT's layout: (2,N,head_dim/2), cosines and sines; head_dim is a multiple of 4.

    Token n stands in column x = n mod grid, row y = n div grid, and the angles of its channel pairs take turns:
    x f_0, y f_0, x f_1, y f_1, ... with f_k = 10000^(-4k/head_dim).
    """
    n, freqs = torch.arange(grid * grid), 10000 ** (-torch.arange(0, head_dim, 4) / head_dim)
    angles = torch.stack([torch.outer(n % grid, freqs), torch.outer(n // grid, freqs)], dim=-1).flatten(1)
    return torch.stack([angles.cos(), angles.sin()])


def to_grid(h):
    """Tokens (B,N,D) to an image of them (B,D,g,g)."""
    return h.mT.unflatten(2, (math.isqrt(h.shape[1]), -1))


def to_tokens(h):
    """(B,D,g,g) back to (B,N,D), laid out in memory as a block's output is: compiled blocks tell layouts apart."""
    return h.flatten(2).mT.contiguous()


class SiTDown(SiT):
    """SiT with three stages of blocks, the middle one at half the grid, and one projector per teacher (z_dims[i]).

    Without z_dims there is no projector: this is what is sampled. At the start all blocks are the identity, but `down`,
    `up` and the skips' Linear layers are not.
    """

    def __init__(self, input_size, in_channels, num_classes, sizes, encoder_depth=0, z_dims=(), projector_dim=0):
        width, depths, heads = sizes["hidden_size"], sizes["depths"], sizes["num_heads"]
        super().__init__(input_size, in_channels, num_classes, hidden_size=width, depth=0, num_heads=heads,
                         patch_size=sizes["patch_size"])  # embedders, position table and final layer
        if self.grid % 2:
            fail(f"{self.grid}x{self.grid} tokens cannot be halved: an input of {input_size} needs another --model")
        self.encoder_depth, block = encoder_depth, functools.partial(UNetBlock, width, heads, sizes["mlp_dim"])
        self.t_embedder_mid = TimestepEmbedder(width)
        self.y_embedder_mid = LabelEmbedder(num_classes, width)
        self.encoder = nn.ModuleList([block() for _ in range(depths[0])])
        self.down = Down(width)
        self.middle = nn.ModuleList([block() for _ in range(depths[1])])
        self.up = Up(width)
        self.decoder = nn.ModuleList([block(has_skip=True) for _ in range(depths[2])])
        del self.blocks  # SiT's single stage; a plain list takes its place, which adds no second names to the weights
        self.blocks = [*self.encoder, *self.middle, *self.decoder]
        for stage in (self.encoder, self.middle, self.decoder, self.t_embedder_mid):
            stage.apply(init_linear)
        for module in (self.y_embedder_mid.embedding_table, self.t_embedder_mid.mlp[0], self.t_embedder_mid.mlp[2]):
            nn.init.normal_(module.weight, std=0.02)
        for linear in [b.adaLN_modulation[1] for b in self.blocks]:
            nn.init.zeros_(linear.weight)
        # Positions are counted in each stage's own grid. The tables are constants, so no checkpoint holds them.
        self.register_buffer("rope", rope_2d(self.grid, width // heads), persistent=False)
        self.register_buffer("rope_mid", rope_2d(self.grid // 2, width // heads), persistent=False)
        self.projectors = nn.ModuleList([nn.Sequential(
            nn.Linear(width, projector_dim), nn.SiLU(),
            nn.Linear(projector_dim, projector_dim), nn.SiLU(),
            nn.Linear(projector_dim, z_dim)) for z_dim in z_dims])
        self.projectors.apply(init_linear)

    def stages(self, x_t, t, y):
        """Velocity (B,C,H,W), and the tokens (B,N/4,D) after each middle block."""
        h, c = self.embed(x_t, t, y)
        skips, middles = [], []
        for block in self.encoder:
            h = block(h, c, self.rope)
            skips.append(h)
        h = to_tokens(self.down(to_grid(h)))  # (B,N,D) -> (B,N/4,D)
        c_mid = self.t_embedder_mid(t) + self.y_embedder_mid(y)
        for block in self.middle:
            h = block(h, c_mid, self.rope_mid)
            middles.append(h)
        h = to_tokens(self.up(to_grid(h)))  # (B,N/4,D) -> (B,N,D)
        for block in self.decoder:  # the first one gets the last encoder block's tokens, which `down` has seen, too
            h = block(h, c, self.rope, skips.pop())
        return self.head(h, c), middles

    def project(self, h):
        """Middle tokens h (B,N/4,D) to z_hat, one (B,N,K) per teacher: the MLP first, then twice the grid."""
        z_hats = [to_grid(projector(h).float()) for projector in self.projectors]  # (B,K,g/2,g/2)
        return [to_tokens(F.interpolate(z_hat, scale_factor=2, mode="bilinear")) for z_hat in z_hats]

    def forward(self, x_t, t, y):
        """Velocity (B,C,H,W) and, per teacher, the projected tokens z_hat (B,N,K)."""
        v, middles = self.stages(x_t, t, y)
        return v, self.project(middles[self.encoder_depth - len(self.encoder) - 1])

    def velocity(self, x_t, t, y):
        """Plain SiT-down, for sampling: no projector is run."""
        return self.stages(x_t, t, y)[0]


def token_loss(u, s):
    """Minus the cosine (B,) between unit tokens u and s (B,N,K) at the same place, averaged over the places."""
    return -(u * s).sum(dim=-1).mean(dim=1)


def manifold_loss(u, s):
    """Mean squared difference (B,) of the tables of cosines between all N x N tokens of an image; u, s (B,N,K)."""
    with torch.autocast(u.device.type, enabled=False):  # else these products, too, would be made in bf16
        return (u @ u.mT - s @ s.mT).square().mean(dim=(1, 2))


def urepa_loss(model, x, t, noise, y, zs, path_type="linear"):
    """The three terms of U-REPA's loss, each (B,): velocity error, minus the token cosine, error of the token Gram.

    x, noise (B,C,H,W); t (B,); y (B,) with labels already dropped to the null label; zs: one (B,N,K) per teacher, raw
    features of the clean image. The second term lies in [-1,1] and is NEGATIVE in a healthy run.
    """
    x_t, v = interpolate(x, noise, t, path_type)
    v_hat, z_hats = model(x_t, t, y)
    loss_velocity = (v_hat - v).square().mean(dim=(1, 2, 3))
    # Unit length comes AFTER the enlarging: interpolated tokens are shorter than those they lie between.
    pairs = [(F.normalize(z_hat.float(), dim=-1), F.normalize(z.float(), dim=-1)) for z_hat, z in zip(z_hats, zs)]
    if not pairs:
        return loss_velocity, torch.zeros_like(loss_velocity), torch.zeros_like(loss_velocity)
    loss_proj = torch.stack([token_loss(u, s) for u, s in pairs]).mean(dim=0)
    loss_manifold = torch.stack([manifold_loss(u, s) for u, s in pairs]).mean(dim=0)
    return loss_velocity, loss_proj, loss_manifold


def sit_down_from_weights(weights, name):
    """The SiT-down of size `name` that holds these weights; image size, channels, classes are read off their shapes."""
    if missing := {"pos_embed", "y_embedder.embedding_table.weight"} - weights.keys():
        fail(f"these weights are not those of a SiT-down: {min(missing)} is missing")
    channels, patch = weights["x_embedder.proj.weight"].shape[1:3]
    input_size = patch * math.isqrt(weights["pos_embed"].shape[1])
    model = SiTDown(input_size, channels, len(weights["y_embedder.embedding_table.weight"]) - 1, MODELS[name])
    ours, theirs = ({key: w.shape for key, w in state.items()} for state in (model.state_dict(), weights))
    if wrong := sorted(key for key, _ in ours.items() ^ theirs.items()):
        fail(f"these weights are not those of --model {name}: {wrong[0]} is missing, too much, or of another shape; "
             f"there are {', '.join(MODELS)}")
    model.load_state_dict(weights)
    return model


# ---------------------------------------------------------------------------------------------------------------------
# Plumbing: the same in every script (tests/test_copies.py compares; `--sync repa.py` copies this version to the others)
# ---------------------------------------------------------------------------------------------------------------------
def parse(argv):
    """Config from the command line: every field is a flag, its comment the help; the model picks the recipe."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.error = lambda message: fail(f"{message} (--help lists the flags)")
    source = inspect.getsource(Config)
    for field in fields(Config):
        comment = re.search(rf"^    {field.name}:.*?# *(.*)$", source, re.MULTILINE)[1]
        options = dict(default=field.default, help=f"{comment} [{field.default}]".replace("%", "%%"))
        if field.type is bool:
            options |= dict(action=argparse.BooleanOptionalAction)
        elif get_origin(field.type) is Literal:
            options |= dict(choices=get_args(field.type))
        else:
            options |= dict(type=int, nargs="+") if field.type == list[int] else dict(type=field.type)
        parser.add_argument("--" + field.name.replace("_", "-"), **options)
    model = parser.parse_args(argv).model
    if model not in MODELS:
        fail(f"unknown --model {model}; there are {', '.join(MODELS)}")
    parser.set_defaults(**next((recipe for name, recipe in RECIPES.items() if model.startswith(name)), {}))
    cfg = Config(**vars(parser.parse_args(argv)))
    if cfg.sample and cfg.out == Config.out:
        cfg.out = str(Path(cfg.ckpt).parent)
    cfg.data = cfg.data.replace("{resolution}", str(cfg.resolution))
    cfg.out = cfg.out.replace("{model}", model.replace("/", "-"))
    for names, least, most in RANGES:
        for name in names.split():
            if not least <= getattr(cfg, name, least) <= most:
                fail(f"--{name.replace('_', '-')} {getattr(cfg, name)} must lie between {least:g} and {most:g}")
    if cfg.bench:
        cfg.max_train_steps, cfg.log_every = cfg.bench, max(1, cfg.bench // 5)
    if getattr(cfg, "guidance_low", 0) > getattr(cfg, "guidance_high", 1):
        fail(f"--guidance-low {cfg.guidance_low} lies above --guidance-high {cfg.guidance_high}: the interval is empty")
    if cfg.sample and not cfg.ckpt:
        fail("--sample needs --ckpt FILE, the checkpoint to sample from")
    return cfg


def setup(cfg):
    """This rank's place, device and precision; torchrun starts a process per GPU, python alone is rank 0 of 1."""
    rank, world, local = (int(os.environ.get(name, default)) for name, default in
                          (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    micro_batch = cfg.micro_batch or max(1, cfg.batch_size // world)
    if not cfg.sample and cfg.batch_size % (world * micro_batch):
        fail(f"--batch-size {cfg.batch_size} is no multiple of {world} ranks x --micro-batch {micro_batch}")
    kind = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    device = torch.device(kind, local) if kind == "cuda" else torch.device(kind)
    if kind == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # TF32 for what stays in fp32
    if world > 1 and not dist.is_initialized():
        dist.init_process_group(process_group_backend(device))
    cfg.compile = kind == "cuda" if cfg.compile is None else cfg.compile
    cfg.precision = ("bf16" if kind == "cuda" else "fp32") if cfg.precision == "auto" else cfg.precision
    autocast = functools.partial(torch.autocast, kind, torch.bfloat16, enabled=cfg.precision == "bf16")
    return SimpleNamespace(rank=rank, world=world, device=device, micro_batch=micro_batch,
                           accumulation=cfg.batch_size // (world * micro_batch), autocast=autocast)


def compile_blocks(model, cfg):
    """Compile every block in place: one graph serves them all, and the names of the parameters stay."""
    if cfg.compile:
        import torch._dynamo
        torch._dynamo.config.optimize_ddp = False  # else every gradient bucket cuts the graph
        for block in model.blocks:
            block.compile()
    return model


def parallelise(model, cfg, run):
    """The model as the training step calls it: blocks compiled, gradients averaged over the ranks."""
    compile_blocks(model, cfg)
    if run.world == 1:
        return model
    # Buffers are constants or kept per rank: without the last flag, DDP would send them around at every forward pass.
    return nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True, broadcast_buffers=False)


def optimizer_step(optimizer, parameters, max_grad_norm):
    """Clip, update, clear; returns (norm, is it finite). If not, the update is skipped: on the device, on all ranks."""
    grad_norm = nn.utils.clip_grad_norm_(parameters, max_grad_norm)
    finite = grad_norm.isfinite()
    optimizer.found_inf = (~finite).float()  # fused AdamW's own switch, made for loss scalers
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return grad_norm, finite


@torch.no_grad()
def update_ema(ema, model, decay):
    """ema <- decay ema + (1 - decay) model, over the trained parameters."""
    pairs = [(e, p) for e, p in zip(ema.parameters(), model.parameters()) if p.requires_grad]
    torch._foreach_lerp_([e for e, _ in pairs], [p for _, p in pairs], 1 - decay)


def restore(cfg, meta, model, ema, optimizer):
    """Continue the run that cfg.out holds, or begin (from --init); returns the number of steps already done."""
    path = Path(cfg.out) / "last.pt"
    if cfg.bench or not path.exists():
        if cfg.init:
            say(f"started from {cfg.init}; left fresh: {', '.join(init_from(cfg.init, model)) or 'nothing'}")
            ema.load_state_dict(model.state_dict())
        return 0
    checkpoint = load_checkpoint(path)
    if "optimizer" not in checkpoint:
        fail(f"{path} is no checkpoint of a run: choose another --out")

    def identity(config, meta):
        settings = {name: value for name, value in config.items() if name not in BOOKKEEPING}
        return settings | dict(data=f"{meta['source']}, {meta['count']} images, {meta['num_classes']} classes")
    old, new = identity(checkpoint["config"], checkpoint["data"]), identity(asdict(cfg), meta)
    if changed := [f"{name} {old.get(name)!r}, now {new.get(name)!r}" for name in old | new
                   if old.get(name) != new.get(name)]:
        fail(f"{cfg.out} holds another run ({'; '.join(changed)}): choose another --out")
    model.load_state_dict(checkpoint["model"])
    ema.load_state_dict(checkpoint["ema"])
    optimizer.load_state_dict(checkpoint["optimizer"])
    return checkpoint["step"]


def save_run(cfg, name, step, meta, **parts):
    """Write a checkpoint of these parts (model, ema, optimizer) into cfg.out; nothing random is in it."""
    state = {part: value.state_dict() if hasattr(value, "state_dict") else value for part, value in parts.items()}
    save_checkpoint(Path(cfg.out) / name, state | dict(step=step, config=asdict(cfg), data=meta))


# ---------------------------------------------------------------------------------------------------------------------
# Training and sampling
# ---------------------------------------------------------------------------------------------------------------------
def build(cfg, data, run):
    """The frozen teachers (none without a projection loss) and the student, on this rank's device."""
    names = cfg.enc_type.split(",") if cfg.proj_coeff else []
    files = cfg.teacher_ckpt.split(",") if cfg.teacher_ckpt else [""] * len(names)
    if names and len(files) != len(names):
        fail(f"--teacher-ckpt names {len(files)} files, --enc-type {len(names)} teachers: one file each, with commas")
    files = [f"{cfg.data}/teacher.pt" if name == "prepared" and not file else file for name, file in zip(names, files)]
    teachers = [load_teacher(name, cfg.resolution, file, not cfg.bench).to(run.device)
                for name, file in zip(names, files)]
    torch.manual_seed(cfg.seed)  # the student begins alike with any teacher, or none
    sizes = MODELS[cfg.model]
    first, last = sizes["depths"][0] + 1, sum(sizes["depths"][:2])
    if names and not first <= cfg.encoder_depth <= last:
        fail(f"--encoder-depth {cfg.encoder_depth}: the middle blocks of {cfg.model} are {first} to {last}")
    model = SiTDown(data.shape[-1], data.shape[0], data.meta["num_classes"], sizes,
                    cfg.encoder_depth, [teacher.width for teacher in teachers], cfg.projector_dim)
    for name, teacher in zip(names, teachers):
        if teacher.grid != model.grid:
            fail(f"teacher {name} gives {teacher.grid}x{teacher.grid} tokens, {cfg.model} at {cfg.resolution} px has "
                 f"{model.grid}x{model.grid}: choose another --enc-type or --model, or train a teacher for it: python "
                 f"prepare.py teacher --data {cfg.data} --patch-size {cfg.resolution // model.grid}")
        if cfg.compile:
            teacher.compile()
    return teachers, model.to(run.device)


def train(cfg, run):
    """Begin or continue the run in cfg.out."""
    if cfg.bench:
        data = SyntheticData(cfg.resolution, cfg.model != "toy", need_images=cfg.proj_coeff > 0)
    else:
        data = PreparedData(cfg.data, cfg.resolution, need_images=cfg.proj_coeff > 0)
    teachers, model = build(cfg, data, run)
    # Loaded before the first step, so that a missing VAE shows now and not at the first preview.
    decode = load_decoder(data.meta, cfg.vae, cfg.vae_ckpt, run.device) if cfg.preview_every and not cfg.bench else None
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=cfg.learning_rate, betas=(0.9, 0.999), weight_decay=0, fused=True)
    first_step = restore(cfg, data.meta, model, ema, optimizer)
    if first_step >= cfg.max_train_steps:
        return say(f"{cfg.out} is finished: {first_step} steps; --max-train-steps trains on, --out begins another run")
    flops_per_image = describe(cfg, run, data, model)
    log, stop = Log(cfg, run, first_step, flops_per_image), catch_stop(run)
    net = parallelise(model, cfg, run)
    loader = micro_batches(data, cfg.seed, cfg.batch_size, run, first_step, cfg.workers)

    for step in range(first_step + 1, cfg.max_train_steps + 1):
        # Every draw of the step is made for the global batch; this rank holds its part, in micro-batches.
        normal, uniform = step_draws(cfg.seed, step, cfg.batch_size, run)
        posterior, noise = normal(*data.shape), normal(*data.shape)
        t = uniform() if cfg.weighting == "uniform" else lognormal_time(normal(), cfg.path_type)
        drop = uniform() < cfg.cfg_prob
        terms = torch.zeros(4, device=run.device)
        for i in range(run.accumulation):
            batch, rows = next(loader), slice(i * run.micro_batch, (i + 1) * run.micro_batch)
            is_last = i + 1 == run.accumulation
            with nullcontext() if is_last or run.world == 1 else net.no_sync():  # gradients are reduced once a step
                with run.autocast():
                    zs = [teacher(batch["images"])[1] for teacher in teachers]
                    x = clean_input(batch, data.meta, posterior[rows])
                    y = batch["labels"].masked_fill(drop[rows], data.meta["num_classes"])
                    velocity, proj, manifold = urepa_loss(net, x, t[rows], noise[rows], y, zs, cfg.path_type)
                    loss = (velocity + cfg.proj_coeff * (proj + cfg.manifold_weight * manifold)).mean()
                (loss / run.accumulation).backward()
            terms += torch.stack([loss, velocity.mean(), proj.mean(), manifold.mean()]).detach() / run.accumulation
        grad_norm, finite = optimizer_step(optimizer, parameters, cfg.max_grad_norm)
        update_ema(ema, model, cfg.ema_decay)
        log.add(finite, loss=terms[0], loss_velocity=terms[1], loss_proj=terms[2], loss_manifold=terms[3],
                grad_norm=grad_norm)

        last, stopping = step == cfg.max_train_steps, stop(step)
        if step % cfg.log_every == 0 or last:
            log.write(step)
        if run.rank == 0 and not cfg.bench:
            with log.pause():
                if step % cfg.save_every == 0 or last or stopping:
                    save_run(cfg, "last.pt", step, data.meta, ema=ema, model=model, optimizer=optimizer)
                if cfg.keep_every and step % cfg.keep_every == 0:
                    save_run(cfg, f"ema-{step}.pt", step, data.meta, ema=ema)
                if cfg.preview_every and (step % cfg.preview_every == 0 or last):
                    preview(cfg, run, ema, data.shape, decode, step)
        if stopping:
            break
    loader.close()
    end_run(cfg, run, log, step, stopping)


def describe(cfg, run, data, model):
    """Say what is about to run, and write config.json; returns the model FLOPs of training on one image."""
    label = torch.zeros(1, dtype=torch.long, device=run.device)
    with flop_counter() as counter, torch.no_grad():
        model(torch.zeros(1, *data.shape, device=run.device), label.float(), label)
    flops = 3 * counter.get_total_flops()  # the backward pass costs two forward passes
    count, images = sum(p.numel() for p in model.parameters()), cfg.max_train_steps * cfg.batch_size
    say(f"{cfg.model}: {count / 1e6:,.2f} M parameters, a checkpoint of {16e-9 * count:,.2f} GB, {flops / 1e9:,.2f} "
        f"GFLOP per training image, {cfg.precision}{', compiled' if cfg.compile else ''}")
    say(f"{cfg.data}: {len(data):,} images of {cfg.resolution} px, {data.meta['num_classes']} classes; "
        f"{cfg.max_train_steps:,} steps, {len(data) / cfg.batch_size:,.1f} an epoch: {images / len(data):,.1f} epochs")
    say(f"{cfg.batch_size} images a step = {run.world} x {run.device.type} x {run.accumulation} micro-batches of "
        f"{run.micro_batch}; results in {cfg.out}")
    if run.rank == 0 and not cfg.bench:
        make_folder(cfg.out)
        (Path(cfg.out) / "config.json").write_text(json.dumps(asdict(cfg), indent=1) + "\n")
    return flops


def preview(cfg, run, ema, shape, decode, step):
    """Picture of the first eight classes, a row each, by the EMA weights; the same noise at every step."""
    y = torch.arange(min(8, ema.num_classes), device=run.device).repeat_interleave(8)
    randn = image_randn(cfg.seed, range(len(y)), run.device)
    with run.autocast():
        x = sample(ema.velocity, randn(*shape), y, torch.full_like(y, ema.num_classes), num_steps=20,
                   path_type=cfg.path_type, cfg_scale=cfg.cfg_scale, guidance_low=cfg.guidance_low,
                   guidance_high=cfg.guidance_high)
    save_picture(Path(cfg.out) / f"preview-{step}.png", decode(x))


def generate(cfg, run):
    """Sample cfg.sample images from the EMA weights in cfg.ckpt; returns the path of the .npz file."""
    weights, checkpoint = load_weights(cfg.ckpt)
    for name in ("model", "path_type"):
        if (trained := checkpoint.get("config", {}).get(name, getattr(cfg, name))) != getattr(cfg, name):
            fail(f"{cfg.ckpt} was trained as {trained}: add --{name.replace('_', '-')} {trained}")
    weights = {name: w for name, w in weights.items() if not name.startswith("projectors.")}
    model = sit_down_from_weights(weights, cfg.model)
    model = compile_blocks(model.to(run.device).eval(), cfg)
    null, shape = model.num_classes, (model.in_channels, model.input_size, model.input_size)
    decode = load_decoder(checkpoint.get("data", SD_VAE_META), cfg.vae, cfg.vae_ckpt, run.device)

    def generate_batch(y, randn):
        with run.autocast():
            x = sample(model.velocity, randn(*shape), y, torch.full_like(y, null), mode=cfg.mode,
                       num_steps=cfg.num_steps, heun=cfg.heun, path_type=cfg.path_type, cfg_scale=cfg.cfg_scale,
                       guidance_low=cfg.guidance_low, guidance_high=cfg.guidance_high, randn=randn)
        return {"arr_0": decode(x)}

    if cfg.labels and not all(0 <= label < null for label in cfg.labels):
        fail(f"--labels must lie in 0..{null - 1}: {cfg.ckpt} has {null} classes")
    labels = torch.randint(null, (cfg.sample,), generator=torch.Generator().manual_seed(mix_seed(cfg.seed, 0)))
    if cfg.labels:
        labels = torch.tensor(cfg.labels).repeat(-(-cfg.sample // len(cfg.labels)))[:cfg.sample]
    path = Path(cfg.out) / ("samples.npz" if cfg.cfg_scale == 1 else f"samples-cfg{cfg.cfg_scale:g}.npz")
    sample_npz(path, generate_batch, labels, cfg.seed, run.micro_batch, run)
    say(f"wrote {path}: {cfg.sample} images, {cfg.mode} {cfg.num_steps} steps, guidance {cfg.cfg_scale:g}")
    return path


def report_toy(cfg, run):
    """Sample 480 images without and with guidance and have them judged beside real images."""
    last = f"{cfg.out}/last.pt"
    paths = [generate(replace(cfg, sample=480, ckpt=last, cfg_scale=scale), run) for scale in (1.0, 2.0)]
    if run.rank == 0:
        run_tool("evaluate.py", *map(str, paths), cfg.data)
        line = json.loads((Path(cfg.out) / "log.jsonl").read_text().splitlines()[-1])
        print(f"velocity loss {line['loss_velocity']:.4f}"
              + (f", token cosine {-line['loss_proj']:.3f}, Gram error {line['loss_manifold']:.4f}"
                 if cfg.proj_coeff else "") + f" at step {line['step']}"
              + f"; look at {cfg.out}/preview-{line['step']}.png, a row per class" * (cfg.preview_every > 0))


def main(argv=None):
    """Train or sample, as the command line says; the toy does both and has the result judged."""
    cfg = parse(argv)
    run = setup(cfg)
    with clear_errors(run):
        if cfg.sample:
            return generate(cfg, run)
        is_toy = cfg.model == "toy" and cfg.data == "data/toy" and not cfg.bench
        with first_rank_first():
            if is_toy and not Path(cfg.data, "meta.json").exists():
                run_tool("prepare.py", "toy", "--out", cfg.data)
        train(cfg, run)
        if is_toy:
            report_toy(cfg, run)


if __name__ == "__main__":
    main()

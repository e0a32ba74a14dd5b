"""ERW: embedded representation warmup for diffusion transformers (Liu et al., 2025, arXiv 2504.10188).

REPA's early blocks learn features and denoising at once. ERW begins with the features: in phase I the embedders, the
first `l2r_depth` blocks and a small MLP learn to predict the tokens that a frozen teacher (DINOv2) has of the CLEAN
input. Phase II trains the whole SiT from there, by REPA's loss with an alignment that fades. Steps k count both phases.

    phase I,  k <= W:  L = - 1/2 mean_tokens cos(MLP(h), z)                                         x_t = x, t = 0
    phase II, k > W:   L = mean |v_theta(x_t, t, y) - v|^2 - lambda 2^(-(k-W)/H) mean_tokens cos(MLP(h), z)

    python erw.py                           the toy, on any machine: data, training, samples, figures; 3 minutes
    python erw.py --warmup-steps 0          phase II alone; with --proj-decay-half-life inf as well it is REPA
    python erw.py --probe 1000 --ckpt runs/erw-toy/last.pt     how alike are its blocks and the teacher? (CKNNA)
    torchrun --nproc_per_node=8 erw.py --model SiT-XL/2        the paper's recipe; --recipe released: its code's
    torchrun --nnodes=4 --nproc_per_node=8 --rdzv-backend=c10d --rdzv-endpoint=HOST:29500 erw.py --model SiT-XL/2
    torchrun --nproc_per_node=8 erw.py --model SiT-XL/2 --sample 50000 --ckpt runs/erw-SiT-XL-2/last.pt
    python evaluate.py runs/erw-toy/samples.npz data/toy

Published for SiT-XL/2 at 256 px, SDE with 250 steps: FID 12.1 without guidance (--cfg-scale 1) after 100K steps, not
counting 100K of phase I: the defaults (v3, Tables 2 and 3; REPA 19.4; v1 claimed 6.0). Guided as by default: 1.94 after
40 epochs (v1). Run by us: the toy and the checks in README.md, not ImageNet.

What differs from the official code, on purpose. It does not run as released; mended, its phase I learns from the last
image of each batch alone (here: all), and a run through both phases throws phase I away (here the weights go on, the
optimiser and the EMA begin anew). Its RoPE comes with phase II (here: with both or neither, but for --recipe released),
its CKNNA is 0.94 for unrelated features (here: the reference definition), its cost leaves out phase I (here: both are
told). Left out: qk-norm, and the paper's contrastive loss, whose temperature is not known.
"""
import argparse
import copy
import functools
import inspect
import json
import os
import re
import sys
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Literal, get_args, get_origin

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import distributed as dist

from common import (SD_VAE_META, SIT_SIZES, Log, PreparedData, SiT, SyntheticData, catch_stop, clean_input,
                    clear_errors, end_run, fail, first_rank_first, flop_counter, image_randn, init_from, init_linear,
                    interpolate, load_checkpoint, load_decoder, load_teacher, load_weights, lognormal_time,
                    make_folder, micro_batches, mix_seed, process_group_backend, run_tool, sample, sample_npz,
                    save_checkpoint, save_picture, say, sit_from_weights, step_draws)


@dataclass
class Config:
    """One field is one flag. The values here are the paper's for SiT-XL/2; RECIPES holds what other models change."""
    model: str = "toy"                                    # toy, or SiT-{S,B,L,XL}/{2,4,8}; it picks the recipe
    data: str = "data/imagenet{resolution}"               # folder made by prepare.py
    out: str = "runs/erw-{model}"                         # config.json, log.jsonl, last.pt, ema-*.pt, preview-*.png
    resolution: int = 256                                 # pixels
    batch_size: int = 256                                 # images per step, over all GPUs
    micro_batch: int = 0                                  # images per GPU at once; 0 = batch size / GPUs
    max_train_steps: int = 200_000                        # of both phases; paper's tables: 50K or 100K after phase I
    learning_rate: float = 1e-4                           # AdamW, constant
    max_grad_norm: float = 1.0                            # gradients are clipped to this norm
    ema_decay: float = 0.9999                             # of the averaged weights, every step
    cfg_prob: float = 0.1                                 # labels dropped, for classifier-free guidance
    path_type: Literal["linear", "cosine"] = "linear"     # interpolant
    weighting: Literal["uniform", "lognormal"] = "uniform"  # distribution of t
    enc_type: str = "dinov2-vit-b"                        # teacher; several with commas; prepared = DATA/teacher.pt
    teacher_ckpt: str = ""                                # teacher weights from files instead of the hub, with commas
    encoder_depth: int = 18                               # phase II aligns after this block, counted from 1
    proj_coeff: float = 0.5                               # lambda at the start of phase II
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
    cfg_scale: float = 2.2                                # guidance scale; 1 = none
    guidance_low: float = 0.0                             # guidance acts for t from here
    guidance_high: float = 0.95                           # to here; t = 1 is noise
    bench: int = 0                                        # train this many steps on synthetic data, write nothing
    projector_dim: int = 2048                             # width of the projector's hidden layers
    recipe: Literal["v3", "released"] = "v3"              # of the paper's last version, or of the code of its first
    warmup_steps: int = 100_000                           # W, steps of phase I; 0 = phase II alone
    l2r_depth: int = 5                                    # phase I trains and aligns this many blocks
    proj_decay_half_life: float = 50_000                  # H, steps in which lambda halves; inf = constant
    use_rope: Literal["never", "always", "phase2"] = "never"  # rotary positions
    probe: int = 0                                        # print the CKNNA of each block of --ckpt on this many images


MODELS = SIT_SIZES
RECIPES = {  # by the beginning of the model's name; v3. The paper names no depths for S and L
    "toy": dict(data="data/toy", resolution=16, batch_size=32, max_train_steps=2400, learning_rate=4e-3, ema_decay=0.99,
                enc_type="prepared", encoder_depth=2, projector_dim=256, workers=0, log_every=50, save_every=500,
                keep_every=0, preview_every=400, mode="ode", num_steps=20, cfg_scale=1.0, guidance_high=1.0,
                warmup_steps=400, l2r_depth=2, proj_decay_half_life=1000),
    "SiT-S": dict(encoder_depth=8, l2r_depth=8),
    "SiT-B": dict(encoder_depth=8, l2r_depth=8),
}
RELEASED = {  # --recipe released: flags that stand before the user's, by the beginning of the model's name
    "SiT-XL": "--max-train-steps 300000 --l2r-depth 4 --encoder-depth 14 --proj-coeff 6 --use-rope phase2",
    "SiT-L": "--max-train-steps 300000 --l2r-depth 4 --encoder-depth 14 --proj-coeff 3 --use-rope phase2",
    "": "--l2r-depth 4 --proj-coeff 1 --use-rope phase2",
}
WARMUP_COEFF = 0.5  # of phase I (released code); AdamW divides it out again, but for clipping and epsilon
# What may change between a run and its continuation: how it is carried out, not what it computes.
BOOKKEEPING = ("data out micro_batch max_train_steps teacher_ckpt vae vae_ckpt compile workers log_every save_every "
               "keep_every preview_every ckpt sample labels mode num_steps heun cfg_scale guidance_low guidance_high "
               "bench probe").split()
RANGES = [("resolution batch_size max_train_steps log_every save_every num_steps cfg_scale projector_dim", 1, 1e12),
          ("micro_batch learning_rate proj_coeff seed workers keep_every preview_every sample bench", 0, 1e12),
          ("warmup_steps probe", 0, 1e12), ("proj_decay_half_life", 1, float("inf")),
          ("ema_decay cfg_prob guidance_low guidance_high", 0, 1), ("max_grad_norm", 1e-12, 1e12)]


# ---------------------------------------------------------------------------------------------------------------------
# The method
# ---------------------------------------------------------------------------------------------------------------------
def rope_2d(grid, head_dim, device=None):
    """cos, sin (N,head_dim/2) for common.rotate: half of a head turns with the token's row, half with its column."""
    freqs = 10000.0 ** (-torch.arange(head_dim // 4, device=device) / (head_dim // 4))
    tokens = torch.arange(grid * grid, device=device)
    angles = torch.cat([torch.outer(place, freqs) for place in (tokens // grid, tokens % grid)], dim=1)
    return angles.cos(), angles.sin()


class ERWSiT(SiT):
    """SiT with one MLP per teacher (of width z_dims[i]), on the tokens after a block that depends on the phase."""

    def __init__(self, input_size, in_channels, num_classes, sizes, encoder_depth, z_dims, projector_dim, l2r_depth,
                 use_rope="never"):
        super().__init__(input_size, in_channels, num_classes, **sizes)
        self.encoder_depth, hidden_size = encoder_depth, sizes["hidden_size"]
        self.l2r_depth, self.rope_phases = l2r_depth, dict(never=(), always=(1, 2), phase2=(2,))[use_rope]
        self.projectors = nn.ModuleList([nn.Sequential(
            nn.Linear(hidden_size, projector_dim), nn.SiLU(),
            nn.Linear(projector_dim, projector_dim), nn.SiLU(),
            nn.Linear(projector_dim, z_dim)) for z_dim in z_dims])
        self.projectors.apply(init_linear)

    def forward(self, x_t, t, y, phase=2):
        """Velocity (B,C,H,W), None in phase 1, and, per teacher, the projected tokens z_hat (B,N,K)."""
        h, c = self.embed(x_t, t, y)
        head_dim, z_hats = h.shape[-1] // self.blocks[0].attn.num_heads, []
        rope = rope_2d(self.grid, head_dim, h.device) if phase in self.rope_phases else None
        for depth, block in enumerate(self.blocks, start=1):
            h = block(h, c, rope)
            if depth == (self.l2r_depth if phase == 1 else self.encoder_depth):
                z_hats = [projector(h) for projector in self.projectors]  # token-wise, (B,N,D) -> (B,N,K)
                if phase == 1:
                    return None, z_hats
        return self.head(h, c), z_hats

    def velocity(self, x_t, t, y):
        """Plain SiT, for sampling."""
        return self(x_t, t, y)[0]


def erw_loss(model, x, t, noise, y, zs, path_type="linear", phase=2):
    """The two terms of the loss, each (B,): velocity error, and minus the cosine to every teacher's tokens.

    x, noise (B,C,H,W); t (B,); y (B,) with labels already dropped to the null label; zs: one (B,N,K) per teacher, raw
    features of the clean image. The second term lies in [-1,1] and is NEGATIVE in a healthy run. Phase 1 takes t as 0,
    so that the input is x, and has no velocity error: zeros.
    """
    t = t * (phase == 2)
    x_t, v = interpolate(x, noise, t, path_type)
    v_hat, z_hats = model(x_t, t, y, phase)
    # The cosine is taken token by token, then averaged: (B,N,K) -> (B,N) -> (B,).
    cosines = [(F.normalize(z_hat.float(), dim=-1) * F.normalize(z.float(), dim=-1)).sum(dim=-1).mean(dim=1)
               for z_hat, z in zip(z_hats, zs)]
    loss_velocity = torch.zeros_like(t) if phase == 1 else (v_hat - v).square().mean(dim=(1, 2, 3))
    loss_proj = -torch.stack(cosines).mean(dim=0) if cosines else torch.zeros_like(loss_velocity)
    return loss_velocity, loss_proj


def decayed_coeff(cfg, steps_done):
    """lambda 2^(-(k-W)/H): the weight of the alignment after k steps of both phases."""
    return cfg.proj_coeff * 2.0 ** (-max(steps_done - cfg.warmup_steps, 0) / cfg.proj_decay_half_life)


def cknna(a, b, k=10):
    """Do features a (n,D) and b (n,E) find the same images alike? 1 = yes, about 0 = unrelated (arXiv 2405.07987).

    Unbiased HSIC of cosine similarities among pairs that are near in both, over each one's own among its own k nearest.
    """
    kernels, n = [F.normalize(x.double(), dim=1) @ F.normalize(x.double(), dim=1).T for x in (a, b)], len(a)
    masks = [torch.zeros_like(kernel).scatter_(1, kernel.clone().fill_diagonal_(-torch.inf).topk(k).indices, 1.0)
             for kernel in kernels]  # of the k nearest others of each row; not symmetric

    def hsic(i, j):
        p, q = (masks[i] * masks[j] * kernels[m] for m in (i, j))  # (n,n), zero on the diagonal
        sum_pq = p.sum(dim=0) @ q.sum(dim=1)  # of all entries of the matrix product
        return ((p * q.T).sum() + p.sum() * q.sum() / ((n - 1) * (n - 2)) - 2 * sum_pq / (n - 2)) / (n * (n - 3))
    return (hsic(0, 1) / ((hsic(0, 0) * hsic(1, 1)).sqrt() + 1e-6)).item()


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
    names = cfg.enc_type.split(",") if cfg.warmup_steps + cfg.proj_coeff else []
    files = cfg.teacher_ckpt.split(",") if cfg.teacher_ckpt else [""] * len(names)
    if names and len(files) != len(names):
        fail(f"--teacher-ckpt names {len(files)} files, --enc-type {len(names)} teachers: one file each, with commas")
    files = [f"{cfg.data}/teacher.pt" if name == "prepared" and not file else file for name, file in zip(names, files)]
    teachers = [load_teacher(name, cfg.resolution, file, not cfg.bench).to(run.device)
                for name, file in zip(names, files)]
    torch.manual_seed(cfg.seed)  # the student begins alike with any teacher, or none
    sizes = SIT_SIZES[cfg.model]
    for name in ("encoder_depth", "l2r_depth") if names else ():
        if not 1 <= (depth := getattr(cfg, name)) <= sizes["depth"]:
            fail(f"--{name.replace('_', '-')} {depth} is not among the {sizes['depth']} blocks of {cfg.model}")
    model = ERWSiT(data.shape[-1], data.shape[0], data.meta["num_classes"], sizes, cfg.encoder_depth,
                   [teacher.width for teacher in teachers], cfg.projector_dim, cfg.l2r_depth, cfg.use_rope)
    for name, teacher in zip(names, teachers):
        if teacher.grid != model.grid:
            fail(f"teacher {name} gives {teacher.grid}x{teacher.grid} tokens, {cfg.model} at {cfg.resolution} px has "
                 f"{model.grid}x{model.grid}: choose another --enc-type or --model, or train a teacher for it: python "
                 f"prepare.py teacher --data {cfg.data} --patch-size {cfg.resolution // model.grid}")
        if cfg.compile:
            teacher.compile()
    return teachers, model.to(run.device)


def train(cfg, run):
    """Begin or continue the run in cfg.out: phase I up to step warmup_steps, then phase II."""
    if cfg.bench:
        cfg.warmup_steps = min(cfg.warmup_steps, cfg.bench // 2)  # to measure both phases
        data = SyntheticData(cfg.resolution, cfg.model != "toy", need_images=cfg.warmup_steps + cfg.proj_coeff > 0)
    else:
        data = PreparedData(cfg.data, cfg.resolution, need_images=cfg.warmup_steps + cfg.proj_coeff > 0)
    teachers, model = build(cfg, data, run)
    # Loaded before the first step, so that a missing VAE shows now and not at the first preview.
    decode = load_decoder(data.meta, cfg.vae, cfg.vae_ckpt, run.device) if cfg.preview_every and not cfg.bench else None
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=cfg.learning_rate, betas=(0.9, 0.999), weight_decay=0, fused=True)
    first_step = restore(cfg, data.meta, model, ema, optimizer)
    if first_step >= cfg.max_train_steps:
        return say(f"{cfg.out} is finished: {first_step} steps; --max-train-steps trains on, --out begins another run")
    flops_per_image, stop = describe(cfg, run, data, model), catch_stop(run)
    loader = micro_batches(data, cfg.seed, cfg.batch_size, run, first_step, cfg.workers)

    for step in range(first_step + 1, cfg.max_train_steps + 1):
        phase = 1 if step <= cfg.warmup_steps else 2
        if step == cfg.warmup_steps + 1:  # the weights go on, their average and the optimiser begin anew
            ema.load_state_dict(model.state_dict())
            optimizer.state.clear()
        if step in (first_step + 1, cfg.warmup_steps + 1):  # a phase begins or continues: wrap what it trains
            for part in (*model.blocks[cfg.l2r_depth:], model.final_layer):  # what phase I's loss does not reach
                part.requires_grad_(phase == 2)
            parameters = [p for p in model.parameters() if p.requires_grad]
            net = parallelise(model, cfg, run)
            log = Log(cfg, run, step - 1, flops_per_image[phase])
        coeff = WARMUP_COEFF if phase == 1 else decayed_coeff(cfg, step - 1)
        # Every draw of the step is made for the global batch; this rank holds its part, in micro-batches.
        normal, uniform = step_draws(cfg.seed, step, cfg.batch_size, run)
        posterior, noise = normal(*data.shape), normal(*data.shape)
        t = uniform() if cfg.weighting == "uniform" else lognormal_time(normal(), cfg.path_type)
        drop = uniform() < cfg.cfg_prob
        terms = torch.zeros(3, device=run.device)
        for i in range(run.accumulation):
            batch, rows = next(loader), slice(i * run.micro_batch, (i + 1) * run.micro_batch)
            is_last = i + 1 == run.accumulation
            with nullcontext() if is_last or run.world == 1 else net.no_sync():  # gradients are reduced once a step
                with run.autocast():
                    zs = [teacher(batch["images"])[1] for teacher in teachers]
                    x = clean_input(batch, data.meta, posterior[rows])
                    y = batch["labels"].masked_fill(drop[rows], data.meta["num_classes"])
                    velocity, proj = erw_loss(net, x, t[rows], noise[rows], y, zs, cfg.path_type, phase)
                    loss = (velocity + coeff * proj).mean()
                (loss / run.accumulation).backward()
            terms += torch.stack([loss, velocity.mean(), proj.mean()]).detach() / run.accumulation
        grad_norm, finite = optimizer_step(optimizer, parameters, cfg.max_grad_norm)
        update_ema(ema, model, cfg.ema_decay)
        log.add(finite, loss=terms[0], loss_velocity=terms[1], loss_proj=terms[2],
                proj_coeff=terms.new_full((), coeff), grad_norm=grad_norm)

        last, stopping = step == cfg.max_train_steps, stop(step)
        if step % cfg.log_every == 0 or last or step == cfg.warmup_steps:  # no line mixes the phases
            log.write(step)
        if run.rank == 0 and not cfg.bench:
            with log.pause():
                if step % cfg.save_every == 0 or last or stopping:
                    save_run(cfg, "last.pt", step, data.meta, ema=ema, model=model, optimizer=optimizer, phase=phase)
                if cfg.keep_every and step % cfg.keep_every == 0:
                    save_run(cfg, f"ema-{step}.pt", step, data.meta, ema=ema, phase=phase)
                if phase == 2 and cfg.preview_every and (step % cfg.preview_every == 0 or last):
                    preview(cfg, run, ema, data.shape, decode, step)
        if stopping:
            break
    loader.close()
    end_run(cfg, run, log, step, stopping)


def describe(cfg, run, data, model):
    """Say what is about to run, and write config.json; returns the model FLOPs of training on one image, by phase."""
    label, flops = torch.zeros(1, dtype=torch.long, device=run.device), {}
    for phase in (1, 2):
        with flop_counter() as counter, torch.no_grad():
            model(torch.zeros(1, *data.shape, device=run.device), label.float(), label, phase)
        flops[phase] = 3 * counter.get_total_flops()  # the backward pass costs two forward passes
    count, images = sum(p.numel() for p in model.parameters()), cfg.max_train_steps * cfg.batch_size
    say(f"{cfg.model}: {count / 1e6:,.2f} M parameters, a checkpoint of {16e-9 * count:,.2f} GB, {flops[2] / 1e9:,.2f} "
        f"GFLOP per training image ({flops[1] / 1e9:,.2f} in phase I), {cfg.precision}{', compiled' * cfg.compile}")
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
    if checkpoint.get("phase") == 1:
        fail(f"{cfg.ckpt} is of phase I, which learns no velocity: train on, or look into it by --probe")
    for name in ("model", "path_type"):
        if (trained := checkpoint.get("config", {}).get(name, getattr(cfg, name))) != getattr(cfg, name):
            fail(f"{cfg.ckpt} was trained as {trained}: add --{name.replace('_', '-')} {trained}")
    weights = {name: w for name, w in weights.items() if not name.startswith(("projectors.", "feat_rope."))}
    use_rope = checkpoint.get("config", {}).get("use_rope", cfg.use_rope)  # the flag is for files of other programs
    model = sit_from_weights(weights, cfg.model, lambda *shape, **sizes: ERWSiT(*shape, sizes, 0, [], 0, 0, use_rope))
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


@torch.no_grad()
def probe(cfg, run):
    """Print the CKNNA of tokens after every block with the teacher's, both averaged over an image, at t = 0."""
    checkpoint = load_checkpoint(cfg.ckpt or fail("--probe needs --ckpt FILE, the checkpoint to look into"))
    trained = {name: value for name, value in checkpoint.get("config", {}).items() if name in ("use_rope", "l2r_depth")}
    data = PreparedData(f"{cfg.data}/val" if Path(cfg.data, "val").is_dir() else cfg.data, cfg.resolution)
    (teacher, *_), model = build(replace(cfg, proj_coeff=1.0, **trained), data, run)  # 1: with a teacher
    if "y_embedder" in init_from(cfg.ckpt, model):
        fail(f"{cfg.ckpt} was not trained on the {model.num_classes} classes of {cfg.data}: give its --data")
    images = torch.linspace(0, len(data) - 1, cfg.probe).long().unique()  # evenly: a folder is sorted by class
    if len(images) <= 20:
        fail(f"--probe {len(images)}: CKNNA looks at 10 neighbours of an image, take many more")
    z, features = [], [[] for block in model.blocks]
    for block, found in zip(model.blocks, features):
        block.register_forward_hook(lambda block, x, h, found=found: found.append(h.float().mean(dim=1).cpu()))  # (B,D)
    for rows in images.split(run.micro_batch):
        batch = {name: tensor.to(run.device) for name, tensor in data[rows.numpy()].items()}
        null = torch.full((len(rows),), model.num_classes, device=run.device)  # a label would tell too much
        with run.autocast():
            model(clean_input(batch, data.meta, 0.0), null * 0.0, null, checkpoint.get("phase", 2))
        z.append(teacher(batch["images"])[1].mean(dim=1).cpu())  # (B,N,K) -> (B,K)
    scores = [cknna(torch.cat(h), torch.cat(z)) for h in features if h]  # phase I does not run the later blocks
    say(f"CKNNA after each block, {len(images)} images of {data.path}: " + " ".join(f"{score:.3f}" for score in scores))
    return scores


def report_cost(cfg):
    """Say what the run in cfg.out cost, with and without phase I, by each phase's fastest stretch in its log."""
    lines = [json.loads(line) for line in (Path(cfg.out) / "log.jsonl").read_text().splitlines()]
    warmup, full = ([line["images_per_s"] for line in lines if (line["step"] <= cfg.warmup_steps) == is_warmup]
                    for is_warmup in (True, False))
    if warmup and full:  # the fastest, because what else runs on a machine only slows a step
        ratio, steps = max(full) / max(warmup), cfg.max_train_steps - cfg.warmup_steps
        say(f"cost: {steps:,} full steps, the paper's count; {steps + ratio * cfg.warmup_steps:,.0f} full-step "
            f"equivalents with {cfg.warmup_steps:,} steps of phase I, each measured at {ratio:.2f} of a full one")


def report_toy(cfg, run):
    """Sample 480 images without and with guidance, have them judged beside real images, and probe the blocks."""
    last = f"{cfg.out}/last.pt"
    paths = [generate(replace(cfg, sample=480, ckpt=last, cfg_scale=scale), run) for scale in (1.0, 2.0)]
    if run.rank == 0:
        run_tool("evaluate.py", *map(str, paths), cfg.data)
        line = json.loads((Path(cfg.out) / "log.jsonl").read_text().splitlines()[-1])
        print(f"velocity loss {line['loss_velocity']:.4f}"
              + f", alignment cosine {-line['loss_proj']:.3f}" * (cfg.proj_coeff > 0) + f" at step {line['step']}"
              + f"; look at {cfg.out}/preview-{line['step']}.png, a row per class" * (cfg.preview_every > 0))
    probe(replace(cfg, probe=1000, ckpt=last), run)


def main(argv=None):
    """Train, sample or probe, as the command line says; the toy does all and has the result judged."""
    cfg = parse(argv)
    if cfg.recipe == "released":
        flags = next(flags for name, flags in RELEASED.items() if cfg.model.startswith(name))
        cfg = parse([*flags.split(), *(sys.argv[1:] if argv is None else argv)])
    run = setup(cfg)
    with clear_errors(run):
        if cfg.sample:
            return generate(cfg, run)
        if cfg.probe:
            return probe(cfg, run)
        is_toy = cfg.model == "toy" and cfg.data == "data/toy" and not cfg.bench
        with first_rank_first():
            if is_toy and not Path(cfg.data, "meta.json").exists():
                run_tool("prepare.py", "toy", "--out", cfg.data)
        train(cfg, run)
        if run.rank == 0 and not cfg.bench:
            report_cost(cfg)
        if is_toy:
            report_toy(cfg, run)


if __name__ == "__main__":
    main()

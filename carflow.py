"""CAR-Flow: condition-aware reparameterization for flow matching (Apple, NeurIPS 2025, arXiv 2509.19300).

Plain flow matching starts every class from the same Gaussian, so one network must move the mass far and tell the
classes apart on the way. CAR-Flow adds two small learned translations, of the noise by mu0(y) and of the data by
mu1(y), and trains them with the ordinary loss, its only term: paths become shorter, and training faster. No teacher.

    L = mean |v_theta(x_t + mu_t, t, y) - (v + mu_t')|^2             mu_t = (1-t) mu1 + t mu0, x_t and v as in repa.py

    python carflow.py                       the toy, on any machine: data, training, samples, figures; 3 minutes
    python carflow.py --shift none          plain SiT, the baseline; source and target shift one end only
    python carflow.py --model synthetic     the paper's experiment in one dimension: a table and a picture; 1 minute
    python carflow.py --model synthetic --learn-scale source        the collapse if a scale is learned beside the shift
    torchrun --nproc_per_node=8 carflow.py --model SiT-XL/2                   the paper's recipe, on data/imagenet256
    torchrun --nproc_per_node=8 carflow.py --model SiT-XL/2 --sample 50000 --ckpt runs/carflow-SiT-XL-2/last.pt

Published for SiT-XL/2 at 256 px, stochastic Heun with 250 evaluations: FID 2.07 for their SiT, 1.68 with both shifts.
Steps and guidance are not given: 7M is SiT's recipe, which they follow, and 1.5 our inference from SiT's 2.06. Run by
us: the toy, the synthetic and the checks in README.md, not ImageNet.

PAPER: the loss; shifts only; two convolutional nets fed with the class embedding, below 0.6 % more parameters. FITTED:
the widths of ShiftNet and of the 1-D network. OURS: ShiftNet's layers, the shared label table, the attached target, the
shifts' learning rate, those of the null label, guidance. There is no official code and no checkpoint to confirm this
file; its fixtures were made by an independent float64 implementation of the same equations.
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

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import distributed as dist
from tqdm import tqdm

from common import (SD_VAE_META, SIT_SIZES, Log, PreparedData, SiT, SyntheticData, catch_stop, clean_input,
                    clear_errors, draw_paths, end_run, fail, first_rank_first, flop_counter, image_randn,
                    init_from as init_sit, interpolate, load_checkpoint, load_decoder, load_weights, lognormal_time,
                    make_folder, micro_batches, mix_seed, path_coefficients, process_group_backend, run_tool, sample,
                    sample_npz, save_checkpoint, save_picture, say, sit_from_weights, step_draws, timestep_embedding)


@dataclass
class Config:
    """One field is one flag. The values here are the paper's for SiT-XL/2; RECIPES holds what other models change."""
    model: str = "toy"                                    # toy, synthetic, or SiT-{S,B,L,XL}/{2,4,8}: the recipe
    data: str = "data/imagenet{resolution}"               # folder made by prepare.py
    out: str = "runs/carflow-{model}"                     # config.json, log.jsonl, last.pt, ema-*.pt, preview-*.png
    resolution: int = 256                                 # pixels
    batch_size: int = 256                                 # images per step, over all GPUs
    micro_batch: int = 0                                  # images per GPU at once; 0 = batch size / GPUs
    max_train_steps: int = 7_000_000                      # 1400 epochs: SiT's; the paper gives no number
    learning_rate: float = 1e-4                           # AdamW, constant
    max_grad_norm: float = 1.0                            # gradients are clipped to this norm
    ema_decay: float = 0.9999                             # of the averaged weights, every step
    cfg_prob: float = 0.1                                 # labels dropped, for classifier-free guidance
    path_type: Literal["linear", "cosine"] = "linear"     # interpolant
    weighting: Literal["uniform", "lognormal"] = "uniform"  # distribution of t
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
    num_steps: int = 125                                  # of the sampler
    heun: bool = True                                     # second-order steps: two evaluations each
    cfg_scale: float = 1.5                                # guidance scale; 1 = none; the paper gives no number
    guidance_low: float = 0.0                             # guidance acts for t from here
    guidance_high: float = 1.0                            # to here; t = 1 is noise
    bench: int = 0                                        # train this many steps on synthetic data, write nothing
    shift: Literal["none", "source", "target", "joint"] = "joint"  # what is moved: the noise, the data, both
    shift_width: int = 96                                 # channels of a shift net: 96 adds 0.5995 % to SiT-XL/2
    shift_lr_mult: float = 1.0                            # the shift nets' learning rate is this multiple
    learn_scale: Literal["none", "source", "target"] = "none"  # synthetic: learn this end's scale too; it collapses


MODELS = SIT_SIZES | {"synthetic": None}  # no SiT: the experiment at the end of this file
RECIPES = {  # by the beginning of the model's name
    "toy": dict(data="data/toy", resolution=16, batch_size=32, max_train_steps=2000, learning_rate=4e-3, ema_decay=0.99,
                workers=0, log_every=50, save_every=500, keep_every=0, preview_every=400, mode="ode", num_steps=20,
                heun=False, cfg_scale=1.0, shift_width=16),
    "synthetic": dict(max_train_steps=4000, learning_rate=1e-3, shift_lr_mult=10.0, num_steps=50),
}
# What may change between a run and its continuation: how it is carried out, not what it computes.
BOOKKEEPING = ("data out micro_batch max_train_steps vae vae_ckpt compile workers log_every save_every "
               "keep_every preview_every ckpt sample labels mode num_steps heun cfg_scale guidance_low guidance_high "
               "bench").split()
RANGES = [("resolution batch_size max_train_steps log_every save_every num_steps cfg_scale shift_width", 1, 1e12),
          ("micro_batch learning_rate shift_lr_mult seed workers keep_every preview_every sample bench", 0, 1e12),
          ("ema_decay cfg_prob guidance_low guidance_high", 0, 1), ("max_grad_norm", 1e-12, 1e12)]


# ---------------------------------------------------------------------------------------------------------------------
# The method
# ---------------------------------------------------------------------------------------------------------------------
SHIFTS = dict(none=[], source=["shift0"], target=["shift1"], joint=["shift0", "shift1"])  # nets of a CARFlow


class ShiftNet(nn.Module):
    """One shift: class embedding e (B,D) to a translation mu (B,C,S,S), from a 4x4 map that doubles up to S."""

    def __init__(self, dim, channels, size, width=96, base=4):
        super().__init__()
        self.grid, doublings = (width, base, base), max(0, round(math.log2(size / base)))
        if base * 2 ** doublings != size:
            fail(f"shifts are made for inputs of {base}, {2 * base}, {4 * base} ... pixels, this one has {size}: take "
                 f"another --resolution, or --shift none")
        self.proj = nn.Linear(dim, width * base * base)
        self.convs = nn.ModuleList([nn.Conv2d(width, width, 3, padding=1) for _ in range(doublings)])
        self.out = nn.Conv2d(width, channels, 3, padding=1)
        for parameter in self.out.parameters():  # so training starts as plain SiT; more zeros would block the gradient
            nn.init.zeros_(parameter)

    def forward(self, e):
        with torch.autocast(e.device.type, enabled=False):  # fp32, as the tensors that it moves
            h = self.proj(e).unflatten(1, self.grid)  # (B,W*4*4) -> (B,W,4,4)
            for conv in self.convs:
                h = conv(F.interpolate(F.silu(h), scale_factor=2))  # (B,W,s,s) -> (B,W,2s,2s)
            return self.out(F.silu(h))


class CARFlow(nn.Module):
    """CAR-Flow as a change of coordinates around a velocity network sit(x_t, t, y) with a label table y_embedder.

    The paper trains v_theta on z_t = a (x + mu1) + s (noise + mu0) = x_t + mu_t, with the target v + mu_t'. So
        F(x_t, t, y) = v_theta(x_t + mu_t(y), t, y) - mu_t'(y)
    has that loss, and its gradients, as the plain |F - v|^2, and is all that the samplers need: on the linear path a
    step in x is the step in z, yet begins at plain noise and ends in data. In z the usual score is off by mu0/s.
    Floor: given t and y, x_t <-> z_t is one-to-one, so the least loss is the same for all mu, which are free at the
    optimum; losses compare across --shift. For Gaussians of deviation s0 and s1 in z, Var(v|z_t) is s0^2 s1^2 /
    ((1-t)^2 s1^2 + t^2 s0^2) and the least loss its integral over t, pi/2 s0 s1. So scales must not be learned: they
    go to 0, with v = (mu0 - z)/(1-t) or (z - mu1)/t, whatever the data.
    Early force: while v_theta = 0, dL/dmu1 = -dL/dmu0 = 2 (E[x|y] + mu1 - mu0): mu0 - mu1 is pulled to the class mean,
    by the target, which is not detached. If the network converges first, the shifts stay where they are.
    Guidance: F_null + w (F_y - F_null) at one x_t is that of an unshifted network; at one z, with v_theta for F, it is
    not, for what is z under class y is z - mu_t(y) + mu_t(null) under none. Classes N(+-1.5, 0.2^2) with target shifts
    of 1.3, guided so with w = 1.5, keep a deviation of 0.011; plain guidance leaves 0.160.
    """

    def __init__(self, sit, shift="joint", width=96, path_type="linear"):
        super().__init__()
        self.sit, self.path_type, self.shape = sit, path_type, (sit.in_channels, sit.input_size, sit.input_size)
        dim = sit.y_embedder.embedding_table.embedding_dim
        for name in SHIFTS[shift]:  # no more than these, for DDP wants a gradient for every parameter
            self.add_module(name, ShiftNet(dim, sit.in_channels, sit.input_size, width))

    @property
    def blocks(self):
        return self.sit.blocks  # to be compiled

    def shifts(self, y):
        """mu0 and mu1, each (B,C,H,W), of labels y (B,); the null label has its own."""
        e = self.sit.y_embedder(y)
        return [getattr(self, name)(e) if hasattr(self, name) else e.new_zeros(len(y), *self.shape)
                for name in SHIFTS["joint"]]

    def forward(self, x_t, t, y, table=None):
        """F (B,C,H,W): the model, for the plain loss and for the samplers."""
        mu0, mu1 = self.shifts(y) if table is None else (mu[y] for mu in table)
        a, s, da, ds = path_coefficients(t.view(-1, 1, 1, 1), self.path_type)
        return self.sit(x_t + (a * mu1 + s * mu0), t, y) - (da * mu1 + ds * mu0)

    @torch.no_grad()
    def with_table(self):
        """F for one run of a sampler: the shifts of all labels (K+1,C,H,W) are computed now, not at every step."""
        labels = torch.arange(self.sit.num_classes + 1, device=self.sit.y_embedder.embedding_table.weight.device)
        parts = [self.shifts(part) for part in labels.split(64)]  # a shift net's own maps are W/C times as large
        return functools.partial(self, table=[torch.cat(mus) for mus in zip(*parts)])


def carflow_loss(model, x, t, noise, y, path_type="linear"):
    """Velocity error (B,), the paper's eq. 9 seen from x. x, noise (B,C,H,W); t, y (B,), labels already dropped."""
    x_t, v = interpolate(x, noise, t, path_type)
    return (model(x_t, t, y) - v).square().mean(dim=(1, 2, 3))


def init_from(path, model):
    """Start from a SiT, with fresh shifts, or from a CARFlow with the same ones; returns what is fresh."""
    weights, own = ({name: w for name, w in state.items() if name.startswith("shift")}
                    for state in (load_weights(path)[0], model.state_dict()))
    if weights and {name: w.shape for name, w in weights.items()} != {name: w.shape for name, w in own.items()}:
        fail(f"{path} has other shifts: a network keeps the --shift and --shift-width that it was trained with")
    model.load_state_dict(weights, strict=False)
    return init_sit(path, model.sit) + sorted({name.split(".")[0] for name in own.keys() - weights.keys()})


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
    """The network in its new coordinates, on this rank's device."""
    torch.manual_seed(cfg.seed)  # the SiT begins alike with any shift, or none
    sit = SiT(data.shape[-1], data.shape[0], data.meta["num_classes"], **SIT_SIZES[cfg.model])
    return CARFlow(sit, cfg.shift, cfg.shift_width, cfg.path_type).to(run.device)


def train(cfg, run):
    """Begin or continue the run in cfg.out."""
    if cfg.bench:
        data = SyntheticData(cfg.resolution, cfg.model != "toy", need_images=False)
    else:
        data = PreparedData(cfg.data, cfg.resolution, need_images=False)
    model = build(cfg, data, run)
    # Loaded before the first step, so that a missing VAE shows now and not at the first preview.
    decode = load_decoder(data.meta, cfg.vae, cfg.vae_ckpt, run.device) if cfg.preview_every and not cfg.bench else None
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [dict(params=[p for p in model.sit.parameters() if p.requires_grad]),
              dict(params=[p for name, p in model.named_parameters() if name.startswith("shift")],
                   lr=cfg.learning_rate * cfg.shift_lr_mult)]
    optimizer = torch.optim.AdamW(groups, lr=cfg.learning_rate, betas=(0.9, 0.999), weight_decay=0, fused=True)
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
        terms = torch.zeros(3, device=run.device)
        for i in range(run.accumulation):
            batch, rows = next(loader), slice(i * run.micro_batch, (i + 1) * run.micro_batch)
            is_last = i + 1 == run.accumulation
            with nullcontext() if is_last or run.world == 1 else net.no_sync():  # gradients are reduced once a step
                with run.autocast():
                    x = clean_input(batch, data.meta, posterior[rows])
                    # Dropped once, for the network and the shifts: were each to draw its own, 18 % would disagree.
                    y = batch["labels"].masked_fill(drop[rows], data.meta["num_classes"])
                    loss = carflow_loss(net, x, t[rows], noise[rows], y, cfg.path_type).mean()
                (loss / run.accumulation).backward()
            with torch.no_grad():  # how large the shifts are, for the log
                sizes = [mu.square().mean().sqrt() for mu in model.shifts(y)]
            terms += torch.stack([loss.detach(), *sizes]) / run.accumulation
        grad_norm, finite = optimizer_step(optimizer, parameters, cfg.max_grad_norm)
        update_ema(ema, model, cfg.ema_decay)
        log.add(finite, loss=terms[0], shift0=terms[1], shift1=terms[2], grad_norm=grad_norm)

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
    y = torch.arange(min(8, ema.sit.num_classes), device=run.device).repeat_interleave(8)
    randn = image_randn(cfg.seed, range(len(y)), run.device)
    with run.autocast():
        x = sample(ema.with_table(), randn(*shape), y, torch.full_like(y, ema.sit.num_classes), num_steps=20,
                   path_type=cfg.path_type, cfg_scale=cfg.cfg_scale, guidance_low=cfg.guidance_low,
                   guidance_high=cfg.guidance_high)
    save_picture(Path(cfg.out) / f"preview-{step}.png", decode(x))


def load_carflow(cfg, path):
    """The EMA model of a checkpoint, and the checkpoint; a plain SiT, ours or official, is one without shifts."""
    weights, checkpoint = load_weights(path)
    for name in ("model", "path_type"):
        if (trained := checkpoint.get("config", {}).get(name, getattr(cfg, name))) != getattr(cfg, name):
            fail(f"{path} was trained as {trained}: add --{name.replace('_', '-')} {trained}")
    shifts = {name: weights.pop(name) for name in list(weights) if name.startswith("shift")}
    sit = sit_from_weights({name: w for name, w in weights.items() if not name.startswith("projectors.")}, cfg.model)
    shift = next(shift for shift, nets in SHIFTS.items() if set(nets) == {name.split(".")[0] for name in shifts})
    width = next((w.shape[1] for name, w in shifts.items() if name.endswith("out.weight")), 0)
    model = CARFlow(sit, shift, width, cfg.path_type)
    model.load_state_dict(shifts, strict=False)
    return model, checkpoint


def generate(cfg, run):
    """Sample cfg.sample images from the EMA weights in cfg.ckpt; returns the path of the .npz file."""
    model, checkpoint = load_carflow(cfg, cfg.ckpt)
    model = compile_blocks(model.to(run.device).eval(), cfg)
    null, shape, velocity = model.sit.num_classes, model.shape, model.with_table()
    decode = load_decoder(checkpoint.get("data", SD_VAE_META), cfg.vae, cfg.vae_ckpt, run.device)

    def generate_batch(y, randn):
        with run.autocast():
            x = sample(velocity, randn(*shape), y, torch.full_like(y, null), mode=cfg.mode, num_steps=cfg.num_steps,
                       heun=cfg.heun, path_type=cfg.path_type, cfg_scale=cfg.cfg_scale,
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
    """Have 480 images judged, without and with guidance, and look at what the shifts have become."""
    last = f"{cfg.out}/last.pt"
    paths = [generate(replace(cfg, sample=480, ckpt=last, cfg_scale=scale), run) for scale in (1.0, 2.0)]
    if run.rank == 0:
        run_tool("evaluate.py", *map(str, paths), cfg.data)
        model = load_carflow(cfg, last)[0].to(run.device).eval()
        figures = diagnose(model, PreparedData(f"{cfg.data}/val", cfg.resolution), run)
        print(", ".join(f"{name} {value:.4f}" for name, value in figures.items())
              + f"; look at {cfg.out}/preview-{cfg.max_train_steps}.png, a row per class" * (cfg.preview_every > 0))


@torch.no_grad()
def diagnose(model, data, run, count=2000):
    """{name: figure} on `count` images; their times and noise are always the same, so losses compare between models."""
    batch = {name: array.to(run.device) for name, array in data[np.arange(min(count, len(data)))].items()}
    normal, uniform = step_draws(0, 0, len(batch["labels"]), SimpleNamespace(rank=0, world=1, device=run.device))
    x, y = clean_input(batch, data.meta, normal(*data.shape)), batch["labels"]
    loss = carflow_loss(model, x, uniform(), normal(*data.shape), y, model.path_type).mean()
    means = torch.stack([x[y == label].mean(dim=0) for label in y.unique()]).flatten(1)  # E[x|y], (K,C*H*W)
    mu0, mu1 = (mu.flatten(1) for mu in model.shifts(y.unique()))
    return {"validation velocity loss": loss, "norm of mu0": mu0.norm(dim=1).mean(), "of mu1": mu1.norm(dim=1).mean(),
            "cosine of mu0 - mu1 with the class mean": F.cosine_similarity(mu0 - mu1, means).mean()}


# ---------------------------------------------------------------------------------------------------------------------
# The paper's experiment in one dimension: classes N(-1.5, 0.2^2) and N(1.5, 0.2^2)
# ---------------------------------------------------------------------------------------------------------------------
CENTRE, STD, SEEDS, STEPS_SHOWN = 1.5, 0.2, 3, (50, 100, 200, 300, 500, 1000, 4000)
VARIANTS = dict(none=(0, 0, 0, 0), source=(1, 0, 0, 0), target=(0, 1, 0, 0), joint=(1, 1, 0, 0),
                scale_source=(1, 0, 1, 0), scale_target=(0, 1, 0, 1))  # what is learned: mu0, mu1, log s0, log s1


class Flows1D(nn.Module):
    """M = variants x seeds velocity networks on the line, with learned shifts and scales of noise and data by class.

    The 1,993 parameters that CAR-Flow gives fit layers of 56 -> 24 -> 24 -> 1 on sinusoids of z (24), t (24) and the
    class y, 0 or 1 (8). Shifts and log-scales are a Linear(8, 1) each, of the class's sinusoids, and begin at 0.
    learned: per variant, which of mu0, mu1, log s0, log s1 it has (0 or 1); seeds begin alike in all variants.
    """

    def __init__(self, learned, seeds):
        super().__init__()
        for name, i, o in (("fc1", 56, 24), ("fc2", 24, 24), ("fc3", 24, 1)):  # (M,o,i+1), the bias in the last column
            weight = torch.empty(seeds, o, i + 1).uniform_(-i ** -0.5, i ** -0.5)
            self.register_parameter(name, nn.Parameter(weight.repeat(len(learned), 1, 1)))
        self.ends = nn.Parameter(torch.zeros(len(learned) * seeds, 4, 9))
        learned = torch.tensor(learned).float().repeat_interleave(seeds, dim=0)
        self.register_buffer("learned", learned.unsqueeze(1))  # (M,1,4)

    @staticmethod
    def linear(weight, h):
        """(M,B,i) -> (M,B,o)."""
        return torch.baddbmm(weight[..., -1].unsqueeze(1), h, weight[..., :-1].mT)

    def shifts_and_scales(self, y):
        """mu0, mu1, s0, s1 (M,B) of classes y (M,B)."""
        mu0, mu1, log_s0, log_s1 = (self.linear(self.ends, timestep_embedding(y, 8)) * self.learned).unbind(dim=-1)
        return mu0, mu1, log_s0.exp(), log_s1.exp()

    def velocity(self, z, t, y):
        """v_theta (M,B)."""
        h = torch.cat([timestep_embedding(z, 24), timestep_embedding(t, 24), timestep_embedding(y, 8)], dim=-1)
        h = F.silu(self.linear(self.fc2, F.silu(self.linear(self.fc1, h))))
        return self.linear(self.fc3, h).squeeze(-1)

    def forward(self, x, noise, t, y):
        """Between z1 = s1 x + mu1 and z0 = s0 noise + mu0: z_t, v_theta there and its target z0 - z1, each (M,B)."""
        mu0, mu1, s0, s1 = self.shifts_and_scales(y)
        z1, z0 = s1 * x + mu1, s0 * noise + mu0
        z_t = (1 - t) * z1 + t * z0
        return z_t, self.velocity(z_t, t, y), z0 - z1

    @torch.no_grad()
    def paths(self, noise, y, num_steps):
        """Euler from t = 1 to 0: the path z (num_steps+1,M,B), and the data x (M,B) at its end."""
        mu0, mu1, s0, s1 = self.shifts_and_scales(y)
        z = [s0 * noise + mu0]
        for t in torch.linspace(1, 0, num_steps + 1)[:-1].to(y):
            z.append(z[-1] - self.velocity(z[-1], t.expand_as(y), y) / num_steps)
        return torch.stack(z), (z[-1] - mu1) / s1


def synthetic(cfg, run):
    """Train all variants at once, print the table, draw paths.png; returns {figure: (variants,SEEDS)} and the model."""
    if run.world > 1 or cfg.sample or cfg.bench or cfg.init:
        fail("--model synthetic is one small job: it takes no torchrun, --sample, --bench or --init")
    variants = list(VARIANTS) if cfg.learn_scale == "none" else [cfg.learn_scale, f"scale_{cfg.learn_scale}"]
    torch.manual_seed(cfg.seed)
    model = Flows1D([VARIANTS[variant] for variant in variants], SEEDS).to(run.device)
    groups = [dict(params=[model.fc1, model.fc2, model.fc3]),
              dict(params=[model.ends], lr=cfg.learning_rate * cfg.shift_lr_mult)]
    optimizer = torch.optim.Adam(groups, lr=cfg.learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, cfg.max_train_steps)
    # Samples are measured without chance: they start at 2,000 quantiles of the noise, and so does the truth.
    quantiles = torch.special.ndtri((torch.arange(2000) + 0.5) / 2000).to(run.device)
    centres = torch.tensor([[-CENTRE], [CENTRE]], device=run.device)

    def errors(step, count):
        """Squared velocity errors (M,count): every seed has a batch of its own, the same for all variants."""
        normal, uniform = step_draws(cfg.seed, step, SEEDS * count, run)
        y = (uniform() < 0.5).float()
        draws = (2 * y - 1) * CENTRE + STD * normal(), normal(), uniform(), y
        _, v, target = model(*(u.view(SEEDS, count).repeat(len(variants), 1) for u in draws))
        return (v - target).square()

    figures = {}
    for step in tqdm(range(1, cfg.max_train_steps + 1), unit="step", disable=None):
        errors(step, cfg.batch_size).mean(dim=1).sum().backward()  # no model shares a parameter with another
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        if step in STEPS_SHOWN or step == cfg.max_train_steps:
            y = (centres > 0).float().expand(-1, 2000).flatten().expand(len(variants) * SEEDS, -1)
            z, x = (u.unflatten(-1, (2, -1)) for u in model.paths(quantiles.repeat(2).expand_as(y), y, cfg.num_steps))
            figures[f"W1 at step {step}"] = (x.sort(dim=-1)[0] - centres - STD * quantiles).abs()
    with torch.no_grad():
        figures |= {"path length": z.diff(dim=0).abs().sum(dim=0), f"samples' deviation (truth: {STD})": x.std(dim=-1),
                    f"loss (at scale 1, >= {math.pi / 2 * STD:.4f})": errors(0, 20_000),
                    "scale": math.prod(model.shifts_and_scales(y)[2:])}
    figures = {name: value.flatten(1).mean(dim=1).view(-1, SEEDS) for name, value in figures.items()}
    print(f"{f'mean +- deviation of {SEEDS} seeds':<34}" + "".join(f"{name:>17}" for name in variants))
    for name, value in figures.items():
        print(f"{name:<34}" + "".join(f"{v.mean():9.3f} +-{v.std():6.3f}" for v in value))
    make_folder(cfg.out)
    titles = [f"{name}: path length {v[0]:.2f}" for name, v in zip(variants, figures["path length"])]
    draw_paths(f"{cfg.out}/paths.png", titles, z[:, ::SEEDS].cpu().numpy())  # of the first seed
    print(f"look at {cfg.out}/paths.png")
    return figures, model


def main(argv=None):
    """Train or sample, as the command line says; the toy does both and has the result judged."""
    cfg = parse(argv)
    run = setup(cfg)
    with clear_errors(run):
        if cfg.model == "synthetic":
            return synthetic(cfg, run)
        if cfg.learn_scale != "none":
            fail("--learn-scale is for --model synthetic: elsewhere only shifts are learned")
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

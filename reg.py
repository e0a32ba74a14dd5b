"""REG: representation entanglement for generation (Wu et al., NeurIPS 2025, arXiv 2507.01467).

REPA only trains with its teacher. REG also generates something of it: the class token that the frozen teacher (DINOv2)
has of the clean image, one vector of width K, gets noise of its own and goes through the SiT in front of the image's
tokens, and the network predicts both velocities. When sampling, both begin as noise and are integrated together, so
that the image is drawn beside a description of itself; the teacher is not needed any more, and the token is dropped.

    L = mean |v_theta - v|^2 + beta mean |v_theta,cls - v_cls|^2 - lambda mean_tokens cos(MLP(h), z)
    (x_t, cls_t) = (1-t) (x, cls) + t (noise, noise_cls), (v, v_cls) = (noise, noise_cls) - (x, cls), one t for both

What differs from repa.py: one more token, with a linear map and a LayerNorm before it, a linear map of its own behind
it, and a position of zeros; the term beta; REPA's term counts the class token as one more token, whose target is the
clean one; the sampler's state is a pair, with a guidance scale each. 0.3 % more parameters, 0.4 % more FLOPs.

    python reg.py                           the toy, on any machine: data, training, samples, figures; 3 minutes
    python reg.py --proj-coeff 0            no alignment: the teacher still runs, for its class token is data here
    torchrun --nproc_per_node=8 reg.py --model SiT-XL/2                      the paper's recipe, on data/imagenet256
    torchrun --nproc_per_node=8 reg.py --model SiT-XL/2 --sample 50000 --ckpt runs/reg-SiT-XL-2/last.pt
    python evaluate.py runs/reg-toy/samples.npz data/toy

Published for SiT-XL/2 at 256 px, SDE with 250 steps: FID 3.4 after 400K training steps and 1.8 after 4M, both without
guidance (--cfg-scale 1); 1.36 after 4M (--max-train-steps 4000000) with guidance 2.3 of both states on t in [0, 0.85],
the defaults (the paper's Tables 1, 2, 8 and its eval.sh). Run by us: the toy and the checks in README.md, not ImageNet.

What differs from the official code, on purpose: with --path-type cosine each class token is compared with its own
target (there with those of the whole batch, by a shape that broadcasts); the ODE sampler, which it refuses; the null
label is num_classes, not 1000; depth 4 for B by default, as in the paper; the weight of the class token is --cls-coeff
(there --cls, which means a width when sampling); logged losses are unweighted; and all that repa.py lists for itself.
"""
import argparse
import copy
import functools
import inspect
import json
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

from common import (SD_VAE_META, SIT_SIZES, Log, PreparedData, SiT, SyntheticData, catch_stop, clean_input,
                    clear_errors, end_run, fail, first_rank_first, flop_counter, image_randn, init_from, init_linear,
                    interpolate, load_checkpoint, load_decoder, load_teacher, load_weights, lognormal_time,
                    make_folder, micro_batches, mix_seed, modulate, process_group_backend, run_tool, sample,
                    sample_npz, save_checkpoint, save_picture, say, sit_from_weights, step_draws)


@dataclass
class Config:
    """One field is one flag. The values here are the paper's for SiT-XL/2; RECIPES holds what other models change."""
    model: str = "toy"                                    # toy, or SiT-{S,B,L,XL}/{2,4,8}; it picks the recipe
    data: str = "data/imagenet{resolution}"               # folder made by prepare.py
    out: str = "runs/reg-{model}"                         # config.json, log.jsonl, last.pt, ema-*.pt, preview-*.png
    resolution: int = 256                                 # pixels
    batch_size: int = 256                                 # images per step, over all GPUs
    micro_batch: int = 0                                  # images per GPU at once; 0 = batch size / GPUs
    max_train_steps: int = 400_000                        # the paper's tables; its best model has 4M
    learning_rate: float = 1e-4                           # AdamW, constant
    max_grad_norm: float = 1.0                            # gradients are clipped to this norm
    ema_decay: float = 0.9999                             # of the averaged weights, every step
    cfg_prob: float = 0.1                                 # labels dropped, for classifier-free guidance
    path_type: Literal["linear", "cosine"] = "linear"     # interpolant
    weighting: Literal["uniform", "lognormal"] = "uniform"  # distribution of t
    enc_type: str = "dinov2-vit-b"                        # teacher; several with commas (class token: of the first)
    teacher_ckpt: str = ""                                # teacher weights from files instead of the hub, with commas
    encoder_depth: int = 8                                # align after this block, counted from 1; the paper: 4 for B
    proj_coeff: float = 0.5                               # lambda; 0 = no projector, class tokens only
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
    cfg_scale: float = 2.3                                # guidance scale; 1 = none
    guidance_low: float = 0.0                             # guidance acts for t from here
    guidance_high: float = 0.85                           # to here; t = 1 is noise
    bench: int = 0                                        # train this many steps on synthetic data, write nothing
    projector_dim: int = 2048                             # width of the projector's hidden layers
    cls_coeff: float = 0.03                               # beta, the weight of the class token's velocity
    cls_cfg_scale: float = None                           # the class token's; default: --cfg-scale; 0 or 1 = none


MODELS = SIT_SIZES
RECIPES = {  # by the beginning of the model's name
    "toy": dict(data="data/toy", resolution=16, batch_size=32, max_train_steps=2000, learning_rate=4e-3, ema_decay=0.99,
                enc_type="prepared", encoder_depth=2, projector_dim=256, workers=0, log_every=50, save_every=500,
                keep_every=0, preview_every=400, mode="ode", num_steps=20, cfg_scale=1.0, guidance_high=1.0),
    "SiT-S": dict(encoder_depth=4),
    "SiT-B": dict(encoder_depth=4),
}
# What may change between a run and its continuation: how it is carried out, not what it computes.
BOOKKEEPING = ("data out micro_batch max_train_steps teacher_ckpt vae vae_ckpt compile workers log_every save_every "
               "keep_every preview_every ckpt sample labels mode num_steps heun cfg_scale guidance_low guidance_high "
               "bench cls_cfg_scale").split()
RANGES = [("resolution batch_size max_train_steps log_every save_every num_steps cfg_scale projector_dim", 1, 1e12),
          ("micro_batch learning_rate proj_coeff seed workers keep_every preview_every sample bench", 0, 1e12),
          ("ema_decay cfg_prob guidance_low guidance_high", 0, 1), ("max_grad_norm cls_coeff", 1e-12, 1e12)]


# ---------------------------------------------------------------------------------------------------------------------
# The method
# ---------------------------------------------------------------------------------------------------------------------
class REGSiT(SiT):
    """SiT that carries a class token of width cls_dim in front of its patch tokens, and predicts its velocity too.

    After block `encoder_depth` all N+1 tokens also go through one MLP per teacher (of width z_dims[i]), as in REPA.
    """

    def __init__(self, input_size, in_channels, num_classes, sizes, encoder_depth, cls_dim, z_dims, projector_dim):
        super().__init__(input_size, in_channels, num_classes, **sizes)
        self.encoder_depth, self.cls_dim, hidden_size = encoder_depth, cls_dim, sizes["hidden_size"]
        self.projectors = nn.ModuleList([nn.Sequential(
            nn.Linear(hidden_size, projector_dim), nn.SiLU(),
            nn.Linear(projector_dim, projector_dim), nn.SiLU(),
            nn.Linear(projector_dim, z_dim)) for z_dim in z_dims])
        self.projectors.apply(init_linear)
        self.cls_projectors2 = nn.Linear(cls_dim, hidden_size)  # the official name; nothing is projected twice
        self.wg_norm = nn.LayerNorm(hidden_size, eps=1e-6)  # in the official code, not in the paper
        self.cls_projectors2.apply(init_linear)
        self.final_layer.linear_cls = nn.Linear(hidden_size, cls_dim)
        nn.init.zeros_(self.final_layer.linear_cls.weight)  # like the image's: a fresh model's velocities are exactly 0
        nn.init.zeros_(self.final_layer.linear_cls.bias)
        pos_embed = F.pad(self.pos_embed, (0, 0, 1, 0))  # (1,N,D) -> (1,N+1,D): the class token's position is zeros
        self.pos_embed = nn.Parameter(pos_embed.detach(), requires_grad=False)

    def forward(self, x_t, cls_t, t, y):
        """Velocities of image (B,C,H,W) and class token (B,K); per teacher, the projected tokens z_hat (B,N+1,K)."""
        cls_h = self.wg_norm(self.cls_projectors2(cls_t)).unsqueeze(1)  # (B,K) -> (B,1,D)
        h = torch.cat([cls_h, self.x_embedder(x_t)], dim=1) + self.pos_embed  # (B,N+1,D), the class token first
        c = self.t_embedder(t) + self.y_embedder(y)  # (B,D), for all tokens alike
        z_hats = []
        for depth, block in enumerate(self.blocks, start=1):
            h = block(h, c)
            if depth == self.encoder_depth:
                z_hats = [projector(h) for projector in self.projectors]  # token-wise, (B,N+1,D) -> (B,N+1,K)
        # The class token shares the last norm and modulation with the patches, and has a linear map of its own.
        final = self.final_layer
        cls_h = modulate(final.norm_final(h[:, :1]), *final.adaLN_modulation(c).chunk(2, dim=1))
        return self.head(h[:, 1:], c), final.linear_cls(cls_h).squeeze(1).float(), z_hats

    def velocity(self, state, t, y):
        """Velocities of the state (x_t, cls_t), for the sampler."""
        return self(*state, t, y)[:2]


def reg_loss(model, x, cls, t, noise, noise_cls, y, zs, path_type="linear"):
    """The three terms of REG's loss, each (B,): velocity errors of image and class token, minus the cosine to teachers.

    x, noise (B,C,H,W); cls, noise_cls (B,K), the class token as the teacher gives it, neither scaled nor normalised;
    t (B,), shared by both; y (B,) with labels already dropped to the null label; zs: per teacher its clean class token
    and its patch tokens, (B,N+1,K). A fresh model's second term is 1 + mean cls^2, about 3 for DINOv2, and stays high.
    """
    x_t, v = interpolate(x, noise, t, path_type)
    cls_t, v_cls = interpolate(cls, noise_cls, t, path_type)
    v_hat, v_cls_hat, z_hats = model(x_t, cls_t, t, y)
    loss_velocity = (v_hat - v).square().mean(dim=(1, 2, 3))
    loss_cls = (v_cls_hat - v_cls).square().mean(dim=1)
    # The cosine is taken token by token, then averaged: (B,N+1,K) -> (B,N+1) -> (B,).
    cosines = [(F.normalize(z_hat.float(), dim=-1) * F.normalize(z.float(), dim=-1)).sum(dim=-1).mean(dim=1)
               for z_hat, z in zip(z_hats, zs)]
    loss_proj = -torch.stack(cosines).mean(dim=0) if cosines else torch.zeros_like(loss_velocity)
    return loss_velocity, loss_cls, loss_proj


def guidance_scales(cfg):
    """Guidance scales of image and class token. As in the official code, 0 or less leaves the class token unguided."""
    cls_scale = cfg.cfg_scale if cfg.cls_cfg_scale is None else cfg.cls_cfg_scale
    if not abs(cls_scale) <= 1e12:
        fail(f"--cls-cfg-scale {cls_scale} must be a number; 0 or 1 leave the class token unguided")
    return cfg.cfg_scale, cls_scale if cls_scale > 0 else 1.0


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
    """The frozen teachers (needed even without a projection loss) and the student, on this rank's device."""
    names = cfg.enc_type.split(",")
    files = cfg.teacher_ckpt.split(",") if cfg.teacher_ckpt else [""] * len(names)
    if len(files) != len(names):
        fail(f"--teacher-ckpt names {len(files)} files, --enc-type {len(names)} teachers: one file each, with commas")
    files = [f"{cfg.data}/teacher.pt" if name == "prepared" and not file else file for name, file in zip(names, files)]
    teachers = [load_teacher(name, cfg.resolution, file, not cfg.bench).to(run.device)
                for name, file in zip(names, files)]
    torch.manual_seed(cfg.seed)  # the student begins alike with any teacher, or none
    sizes = SIT_SIZES[cfg.model]
    if cfg.proj_coeff and not 1 <= cfg.encoder_depth <= sizes["depth"]:
        fail(f"--encoder-depth {cfg.encoder_depth} is not among the {sizes['depth']} blocks of {cfg.model}")
    z_dims = [teacher.width for teacher in teachers] if cfg.proj_coeff else []
    model = REGSiT(data.shape[-1], data.shape[0], data.meta["num_classes"], sizes,
                   cfg.encoder_depth, teachers[0].width, z_dims, cfg.projector_dim)
    for name, teacher in zip(names, teachers):
        if cfg.proj_coeff and teacher.grid != model.grid:
            fail(f"teacher {name} gives {teacher.grid}x{teacher.grid} tokens, {cfg.model} at {cfg.resolution} px has "
                 f"{model.grid}x{model.grid}: choose another --enc-type or --model, or train a teacher for it: python "
                 f"prepare.py teacher --data {cfg.data} --patch-size {cfg.resolution // model.grid}")
        if cfg.compile:
            teacher.compile()
    return teachers, model.to(run.device)


def train(cfg, run):
    """Begin or continue the run in cfg.out."""
    if cfg.bench:
        data = SyntheticData(cfg.resolution, cfg.model != "toy")
    else:
        data = PreparedData(cfg.data, cfg.resolution)
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
        noise_cls = normal(model.cls_dim)  # last: the draws before are those of repa.py with this seed
        terms = torch.zeros(4, device=run.device)
        for i in range(run.accumulation):
            batch, rows = next(loader), slice(i * run.micro_batch, (i + 1) * run.micro_batch)
            is_last = i + 1 == run.accumulation
            with nullcontext() if is_last or run.world == 1 else net.no_sync():  # gradients are reduced once a step
                with run.autocast():
                    tokens = [teacher(batch["images"]) for teacher in teachers]  # float32, never half: they are data
                    zs = [torch.cat([cls.unsqueeze(1), patches], dim=1) for cls, patches in tokens]
                    x = clean_input(batch, data.meta, posterior[rows])
                    y = batch["labels"].masked_fill(drop[rows], data.meta["num_classes"])
                    velocity, velocity_cls, proj = reg_loss(net, x, tokens[0][0], t[rows], noise[rows], noise_cls[rows],
                                                            y, zs, cfg.path_type)
                    loss = (velocity + cfg.cls_coeff * velocity_cls + cfg.proj_coeff * proj).mean()
                (loss / run.accumulation).backward()
            terms += torch.stack([loss, velocity.mean(), velocity_cls.mean(), proj.mean()]).detach() / run.accumulation
        grad_norm, finite = optimizer_step(optimizer, parameters, cfg.max_grad_norm)
        update_ema(ema, model, cfg.ema_decay)
        log.add(finite, loss=terms[0], loss_velocity=terms[1], loss_cls=terms[2], loss_proj=terms[3],
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
        zeros = functools.partial(torch.zeros, 1, device=run.device)
        model(zeros(*data.shape), zeros(model.cls_dim), label.float(), label)
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
        x, _ = sample(ema.velocity, (randn(*shape), randn(ema.cls_dim)), y, torch.full_like(y, ema.num_classes),
                      num_steps=20, path_type=cfg.path_type, cfg_scale=guidance_scales(cfg),
                      guidance_low=cfg.guidance_low, guidance_high=cfg.guidance_high)
    save_picture(Path(cfg.out) / f"preview-{step}.png", decode(x))


def generate(cfg, run):
    """Sample cfg.sample images from the EMA weights in cfg.ckpt; returns the path of the .npz file."""
    weights, checkpoint = load_weights(cfg.ckpt)
    for name in ("model", "path_type"):
        if (trained := checkpoint.get("config", {}).get(name, getattr(cfg, name))) != getattr(cfg, name):
            fail(f"{cfg.ckpt} was trained as {trained}: add --{name.replace('_', '-')} {trained}")
    if "cls_projectors2.weight" not in weights:
        fail(f"{cfg.ckpt} generates no class token (there is no cls_projectors2.weight in it): sample it with repa.py")
    cls_dim = weights["cls_projectors2.weight"].shape[1]
    model = sit_from_weights({name: w for name, w in weights.items() if not name.startswith("projectors.")}, cfg.model,
                             lambda *shape, **sizes: REGSiT(*shape, sizes, 0, cls_dim, [], 0))
    model = compile_blocks(model.to(run.device).eval(), cfg)
    null, shape = model.num_classes, (model.in_channels, model.input_size, model.input_size)
    decode = load_decoder(checkpoint.get("data", SD_VAE_META), cfg.vae, cfg.vae_ckpt, run.device)

    def generate_batch(y, randn):
        with run.autocast():
            x, cls = sample(model.velocity, (randn(*shape), randn(cls_dim)), y, torch.full_like(y, null),
                            mode=cfg.mode, num_steps=cfg.num_steps, heun=cfg.heun, path_type=cfg.path_type,
                            cfg_scale=guidance_scales(cfg), guidance_low=cfg.guidance_low,
                            guidance_high=cfg.guidance_high, randn=randn)
        return {"arr_0": decode(x), "cls": cls}

    if cfg.labels and not all(0 <= label < null for label in cfg.labels):
        fail(f"--labels must lie in 0..{null - 1}: {cfg.ckpt} has {null} classes")
    labels = torch.randint(null, (cfg.sample,), generator=torch.Generator().manual_seed(mix_seed(cfg.seed, 0)))
    if cfg.labels:
        labels = torch.tensor(cfg.labels).repeat(-(-cfg.sample // len(cfg.labels)))[:cfg.sample]
    path = Path(cfg.out) / ("samples.npz" if cfg.cfg_scale == 1 else f"samples-cfg{cfg.cfg_scale:g}.npz")
    sample_npz(path, generate_batch, labels, cfg.seed, run.micro_batch, run)
    say(f"wrote {path}: {cfg.sample} images, {cfg.mode} {cfg.num_steps} steps, guidance {cfg.cfg_scale:g}"
        + f", of class tokens {guidance_scales(cfg)[1]:g}, for t in [{cfg.guidance_low:g}, {cfg.guidance_high:g}]"
        * (cfg.cfg_scale > 1))
    return path


@torch.no_grad()
def compare_class_tokens(cfg, run, path):
    """Do the images in `path` fit the class tokens generated with them? Asks the teacher, and prepares a file to judge.

    A token names the class whose real tokens have the nearest mean. Returns the same images with these names as labels,
    for which evaluate.py's accuracy says how often the judge sees in the image what the token names, and other figures.
    """
    data = PreparedData(cfg.data, cfg.resolution)
    teacher = build(cfg, data, run)[0][0]

    def look(images):
        """The teacher's class tokens (N,K) of images (N,H,W,3)."""
        parts = np.array_split(images, 8)
        return torch.cat([teacher(torch.tensor(part, device=run.device))[0] for part in parts]).cpu()

    with np.load(path) as file:
        images, y, cls = file["arr_0"], torch.from_numpy(file["labels"]), torch.from_numpy(file["cls"])
    real, real_y = look(data.array("images")[:4000]), torch.tensor(data.array("labels")[:4000])
    means = torch.stack([real[real_y == label].mean(dim=0) for label in range(data.meta["num_classes"])])
    seen = look(images)  # what the teacher would give for the generated images
    named, named_by_teacher = (torch.cdist(tokens, means).argmin(dim=1) for tokens in (cls, seen))
    cosines = F.normalize(cls, dim=-1) @ F.normalize(seen, dim=-1).T  # [generated token i, image j]
    own, same = torch.eye(len(y), dtype=torch.bool), y[:, None] == y
    path = path.with_name("samples-by-token.npz")
    np.savez(path, arr_0=images, labels=named)
    return path, (
        f"class tokens generated with samples.npz: {(named == y).double().mean():.1%} name the class asked for (labels "
        f"of {path.name}),\n{(named == named_by_teacher).double().mean():.1%} the class that the teacher sees in the "
        f"image; their cosine to its class token of this image {cosines[own].mean():.3f},\n"
        f"of others of the class {cosines[same & ~own].mean():.3f}, of other classes {cosines[~same].mean():.3f}")


def report_toy(cfg, run):
    """Sample 480 images without and with guidance and have them, and their class tokens, judged beside real images."""
    last = f"{cfg.out}/last.pt"
    paths = [generate(replace(cfg, sample=480, ckpt=last, cfg_scale=scale), run) for scale in (1.0, 2.0)]
    if run.rank == 0:
        by_token, figures = compare_class_tokens(cfg, run, paths[0])
        run_tool("evaluate.py", *map(str, [*paths, by_token]), cfg.data)
        print(figures)
        line = json.loads((Path(cfg.out) / "log.jsonl").read_text().splitlines()[-1])
        print(f"velocity loss {line['loss_velocity']:.4f}, of the class token {line['loss_cls']:.4f}"
              + f", alignment cosine {-line['loss_proj']:.3f}" * (cfg.proj_coeff > 0) + f" at step {line['step']}"
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

"""GMem: generative modelling with an explicit memory (Tang, Sun, Cheng, Lin, arXiv 2412.08781).

A SiT's label gives way to a snippet, the class token that a frozen teacher (DINOv2) has of the image. The network
learns to draw an image from its own snippet, in part zeroed, and need not store what the snippet says. The snippets of
all training images are the memory bank: to sample, draw one from it. REPA's alignment comes on top.

    L = mean |v_theta(x_t, t, m) - v|^2 - lambda mean_tokens cos(MLP(h), z)      m = keep s / (1 - p), |s| = 1

    python gmem.py                          the toy, on any machine: data, bank, training, samples, figures; 3 minutes
    python gmem.py --proj-coeff 0           the memory without the alignment: what of it is REPA's share?
    torchrun --nproc_per_node=8 gmem.py --model SiT-XL/2              on data/imagenet256, where it puts the bank
    torchrun --nproc_per_node=8 gmem.py --model SiT-XL/2 --sample 50000 --ckpt runs/gmem-SiT-XL-2/last.pt
    python gmem.py --sample 64 --ckpt runs/gmem-toy/last.pt --bank-path data/toy/val --bank-rank 8 --labels 3 7

Published for SiT-XL/2 at 256 px (the paper's first version): FID 5.75 after 250K steps, 3.56 after 2M, with REPA's SDE
(--no-heun --num-steps 250) and no guidance. **Each sample was conditioned on the features of a training image**: such
an FID is neither class-conditional nor unconditional. How it trained is not public; the defaults are REPA's recipe with
the second version's masking and sampler. Run by us: the toy and the checks in README.md, not ImageNet.

What differs from the official code, on purpose: snippet, patch tokens and latent are of the same image, not of three
flips drawn apart; the SDE calls the network once a drift, not twice, for the same samples; compressed banks can be
built; banks have labels, to draw classes, and know their data and teacher; --mem-null-prob trains guidance's null.
"""
import argparse
import copy
import functools
import inspect
import json
import os
import re
import zlib
from collections import OrderedDict
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

from common import (SD_VAE_META, SIT_SIZES, FP32Sequential, Log, PreparedData, SiT, SyntheticData, catch_stop,
                    class_tokens, clean_input, clear_errors, end_run, fail, first_rank_first, flop_counter,
                    image_randn, init_from, init_linear, interpolate, load_checkpoint, load_decoder, load_teacher,
                    load_weights, lognormal_time, make_folder, micro_batches, mix_seed, process_group_backend,
                    run_tool, sample, sample_npz, save_checkpoint, save_picture, say, sit_from_weights, step_draws)


@dataclass
class Config:
    """One field is one flag. The values here are the paper's for SiT-XL/2; RECIPES holds what other models change."""
    model: str = "toy"                                    # toy, or SiT-{S,B,L,XL}/{2,4,8}; it picks the recipe
    data: str = "data/imagenet{resolution}"               # folder made by prepare.py
    out: str = "runs/gmem-{model}"                        # config.json, log.jsonl, last.pt, ema-*.pt, preview-*.png
    resolution: int = 256                                 # pixels
    batch_size: int = 256                                 # images per step, over all GPUs
    micro_batch: int = 0                                  # images per GPU at once; 0 = batch size / GPUs
    max_train_steps: int = 250_000                        # FID 5.75 in the paper; its best SiT has 2M
    learning_rate: float = 1e-4                           # AdamW, constant
    max_grad_norm: float = 1.0                            # gradients are clipped to this norm
    ema_decay: float = 0.9999                             # of the averaged weights, every step
    path_type: Literal["linear", "cosine"] = "linear"     # interpolant
    weighting: Literal["uniform", "lognormal"] = "uniform"  # distribution of t; the second version: lognormal
    enc_type: str = "dinov2-vit-b"                        # teacher; prepared = DATA/teacher.pt
    teacher_ckpt: str = ""                                # its weights from a file instead of the hub
    encoder_depth: int = 8                                # align after this block, counted from 1
    proj_coeff: float = 0.5                               # lambda; 0 = the memory without an alignment
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
    labels: list[int] = None                              # snippets of these classes, in turn; default: of any
    mode: Literal["sde", "ode"] = "sde"                   # sampler
    num_steps: int = 50                                   # of the sampler
    heun: bool = True                                     # second-order steps
    cfg_scale: float = 1.0                                # guidance scale; 1 = none; see --mem-null-prob
    guidance_low: float = 0.0                             # guidance acts for t from here
    guidance_high: float = 0.11                           # to here; t = 1 is noise
    bench: int = 0                                        # train this many steps on synthetic data, write nothing
    projector_dim: int = 2048                             # width of the projector's hidden layers
    cosine_coeff: float = 0.0                             # weight of the velocity's cosine; the second version: 1
    mem_dropout: float = 0.4                              # share p of a snippet's elements zeroed in training
    mem_null_prob: float = 0.0                            # snippets zeroed whole, for guidance; 0.1 if you want it
    bank_path: str = ""                                   # to draw from: data folder or file; default: of the training
    bank_rank: int = 0                                    # compress the bank to this rank; the paper: 64; 0 = do not
    mix: Literal["none", "linear", "spherical"] = "none"  # sample from mixtures of two snippets
    mix_alpha: float = 0.5                                # share of the second one


MODELS = SIT_SIZES
LAST_STEP = 0.004  # of the second version's Heun SDE; without Heun we sample as REPA and the first version do
RECIPES = {  # by the beginning of the model's name
    "toy": dict(data="data/toy", resolution=16, batch_size=32, max_train_steps=2000, learning_rate=4e-3, ema_decay=0.99,
                enc_type="prepared", encoder_depth=2, projector_dim=256, workers=0, log_every=50, save_every=500,
                keep_every=0, preview_every=400, mode="ode", num_steps=20),
    "SiT-S": dict(encoder_depth=4),
    "SiT-B": dict(encoder_depth=4),
}
# What may change between a run and its continuation: how it is carried out, not what it computes.
BOOKKEEPING = ("data out micro_batch max_train_steps teacher_ckpt vae vae_ckpt compile workers log_every save_every "
               "keep_every preview_every ckpt sample labels mode num_steps heun cfg_scale guidance_low guidance_high "
               "bench bank_path bank_rank mix mix_alpha").split()
RANGES = [("resolution batch_size max_train_steps log_every save_every num_steps cfg_scale projector_dim", 1, 1e12),
          ("micro_batch learning_rate proj_coeff seed workers keep_every preview_every sample bench", 0, 1e12),
          ("bank_rank cosine_coeff", 0, 1e12), ("ema_decay guidance_low guidance_high mem_null_prob mix_alpha", 0, 1),
          ("mem_dropout", 0, 0.99), ("max_grad_norm", 1e-12, 1e12)]


# ---------------------------------------------------------------------------------------------------------------------
# The method
# ---------------------------------------------------------------------------------------------------------------------
class MemorySiT(SiT):
    """SiT with a snippet (B,K) in the place of a label; tokens after block `encoder_depth` also go through an MLP."""

    def __init__(self, input_size, in_channels, memory_dim, sizes, encoder_depth=0, z_dims=(), projector_dim=0):
        super().__init__(input_size, in_channels, 0, **sizes)
        del self.y_embedder
        self.encoder_depth, self.memory_dim, hidden_size = encoder_depth, memory_dim, sizes["hidden_size"]
        self.condition_projection = FP32Sequential(OrderedDict(linear=nn.Linear(memory_dim, hidden_size)))
        self.projectors = nn.ModuleList([nn.Sequential(
            nn.Linear(hidden_size, projector_dim), nn.SiLU(),
            nn.Linear(projector_dim, projector_dim), nn.SiLU(),
            nn.Linear(projector_dim, z_dim)) for z_dim in z_dims]).apply(init_linear)
        self.condition_projection.apply(init_linear)

    def embed(self, x_t, t, snippet):
        """x_t (B,C,H,W), t (B,), snippet (B,K) to tokens h (B,N,D) and conditioning c = MLP(t) + W snippet + b."""
        return self.x_embedder(x_t) + self.pos_embed, self.t_embedder(t) + self.condition_projection(snippet)

    def forward(self, x_t, t, snippet):
        """Velocity (B,C,H,W) and, where there is a projector, the projected tokens z_hat (B,N,K), in a list."""
        h, c = self.embed(x_t, t, snippet)
        z_hats = []
        for depth, block in enumerate(self.blocks, start=1):
            h = block(h, c)
            if depth == self.encoder_depth:
                z_hats = [projector(h) for projector in self.projectors]  # token-wise, (B,N,D) -> (B,N,K)
        return self.head(h, c), z_hats


def corrupt(snippet, keep, null, dropout):
    """Unit snippets (B,K) with elements zeroed but where keep (B,K), the rest scaled up; where null (B,), all of it."""
    return F.normalize(snippet, dim=-1) * keep / (1 - dropout) * ~null.unsqueeze(1)


def gmem_loss(model, x, t, noise, snippet, z, path_type="linear"):
    """Three terms, each (B,): velocity error, minus the cosine to the teacher's tokens, 1 - the velocity's cosine.

    x, noise (B,C,H,W); t (B,); snippet (B,K), corrupted; z (B,N,K), raw features of the clean image. The last term (its
    cosine is over the channels of a place) is the second version's.
    """
    x_t, v = interpolate(x, noise, t, path_type)
    v_hat, z_hats = model(x_t, t, snippet)
    loss_velocity = (v_hat - v).square().mean(dim=(1, 2, 3))
    loss_cosine = 1 - F.cosine_similarity(v_hat, v, dim=1).mean(dim=(1, 2))  # (B,C,H,W) -> (B,H,W) -> (B,)
    # The cosine is taken token by token, then averaged: (B,N,K) -> (B,N) -> (B,).
    cosines = [F.cosine_similarity(z_hat.float(), z.float(), dim=-1).mean(dim=1) for z_hat in z_hats]
    loss_proj = -cosines[0] if cosines else torch.zeros_like(loss_velocity)
    return loss_velocity, loss_proj, loss_cosine


class MemoryBank:
    """Snippets of N images: all `features` (N,K), or their rank-r form C M^T + mean, with C (N,r) and M (K,r).

    Where U S V^T is the truncated SVD of features - mean, C = U sqrt(S) and M = V sqrt(S). `saved` is what a file
    holds: these, `labels` (N,), and the `data` and `teacher` they are of; or an official tensor (N,K) or checkpoint.
    """

    def __init__(self, saved):
        parts = dict(features=saved) if isinstance(saved, torch.Tensor) else saved
        self.parts = parts = dict(features=parts["memorybank"]) if "memorybank" in parts else parts
        self.rows = parts.get("features", parts.get("C"))
        if self.rows is None:
            fail("there are neither features nor C, M, S and mean in the file of the bank: choose another --bank-path")
        self.labels = parts.get("labels", torch.full((len(self.rows),), -1))

    def get(self, rows):
        """Snippets of these rows (...) as (...,K), not normalised."""
        snippets = self.rows[rows].float()
        return snippets if "features" in self.parts else snippets @ self.parts["M"].T + self.parts["mean"]

    def draw(self, count, classes, seed):
        """Rows (count,2) at random: a snippet for each sample, and one to mix with it; of these classes in turn."""
        uniform = torch.rand(count, 2, generator=torch.Generator().manual_seed(mix_seed(seed, 0)), dtype=torch.float64)
        pools = [(self.labels == label).nonzero()[:, 0] for label in classes or []] or [torch.arange(len(self.rows))]
        if not all(map(len, pools)):
            fail(f"--labels {' '.join(map(str, classes))}: not all are among the bank's, {self.labels.min()} to "
                 f"{self.labels.max()} (-1: it has no labels)")
        return torch.stack([rows[(u * len(rows)).long()] for rows, u in zip(pools * -(-count // len(pools)), uniform)])

    def coefficients(self, features):
        """C of snippets (B,K), those of the bank or new ones: (x - mean) M / S."""
        return (features - self.parts["mean"]) @ self.parts["M"] / self.parts["S"]

    def compress(self, rank):
        """The bank of rank r: a pass for mean and covariance, whose eigenvalues are S^2, and one for C; in float64."""
        total, products, pieces = 0, 0, torch.arange(len(self.rows)).split(4096)
        for x in map(self.get, pieces):
            total, products = total + x.double().sum(0), products + x.double().T @ x.double()
        mean = total / len(self.rows)
        values, vectors = torch.linalg.eigh(products - len(self.rows) * mean.outer(mean))  # ascending
        S = values.flip(0)[:rank].clamp(min=1e-12).sqrt()
        exact = MemoryBank(dict(C=self.rows, M=vectors.flip(1)[:, :rank] * S.sqrt(), S=S, mean=mean))
        C = torch.cat([exact.coefficients(x.double()) for x in map(self.get, pieces)])
        known = {name: self.parts[name] for name in ("labels", "data", "teacher") if name in self.parts}
        return MemoryBank(known | {name: value.float() for name, value in (exact.parts | dict(C=C)).items()})


def mix_snippets(a, b, alpha, kind):
    """Unit snippets (B,K) at share alpha of the way from a to b: on the straight line, or on the great circle."""
    # Slerp but for its division by sin(theta), which normalising undoes; the bound serves equal snippets.
    theta = (a * b).sum(dim=-1, keepdim=True).clamp(-1, 1).acos().clamp(min=1e-4)
    shares = (1 - alpha, alpha) if kind == "linear" else (((1 - alpha) * theta).sin(), (alpha * theta).sin())
    return F.normalize(shares[0] * a + shares[1] * b, dim=-1)


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
def frozen_teacher(cfg, run):
    """The teacher, and in `identity` its name and a checksum of its weights, by which banks and checkpoints know it."""
    file = f"{cfg.data}/teacher.pt" if cfg.enc_type == "prepared" and not cfg.teacher_ckpt else cfg.teacher_ckpt
    teacher = load_teacher(cfg.enc_type, cfg.resolution, file, not cfg.bench)
    weights = b"".join(weight.numpy().tobytes() for weight in teacher.state_dict().values())
    teacher.identity = f"{cfg.enc_type} {zlib.crc32(weights):08x}"
    return teacher.to(run.device)


def build(cfg, data, run):
    """The frozen teacher and the student, on this rank's device."""
    teacher = frozen_teacher(cfg, run)
    torch.manual_seed(cfg.seed)  # the student begins alike with any teacher
    sizes = SIT_SIZES[cfg.model]
    if cfg.proj_coeff and not 1 <= cfg.encoder_depth <= sizes["depth"]:
        fail(f"--encoder-depth {cfg.encoder_depth} is not among the {sizes['depth']} blocks of {cfg.model}")
    model = MemorySiT(data.shape[-1], data.shape[0], teacher.width, sizes, cfg.encoder_depth,
                      [teacher.width] if cfg.proj_coeff else [], cfg.projector_dim)
    if cfg.proj_coeff and teacher.grid != model.grid:
        fail(f"teacher {cfg.enc_type} gives {teacher.grid}x{teacher.grid} tokens, {cfg.model} at {cfg.resolution} px "
             f"has {model.grid}x{model.grid}: choose another --enc-type or --model, or train a teacher for it: python "
             f"prepare.py teacher --data {cfg.data} --patch-size {cfg.resolution // model.grid}")
    if cfg.compile:
        teacher.compile()
    return teacher, model.to(run.device)


def open_bank(cfg, run, memory_dim, identity, teacher=None):
    """The bank that cfg names, made where it is missing; of the model's width, and its teacher if that is known."""
    path, wanted = Path(cfg.bank_path or cfg.data), dict(width=memory_dim, teacher=identity)
    if not path.is_file():
        data, path = PreparedData(path, cfg.resolution), path / f"bank-{cfg.enc_type}.pt"
        some = data.array("images")[np.linspace(0, len(data) - 1, 64).astype(int)]
        wanted["data"] = f"{data.meta['source']}, {len(data)} images, {zlib.crc32(some.tobytes()):08x}"
        if not path.exists():  # for all ranks: nobody finds it before all have done their part
            teacher, labels = teacher or frozen_teacher(cfg, run), torch.from_numpy(np.array(data.array("labels")))
            features = class_tokens(teacher, data, run, cfg.workers)
            if run.rank == 0:
                save_checkpoint(path, dict(wanted, teacher=teacher.identity, labels=labels, features=features))
    with first_rank_first():
        full, path = path, path.with_name(f"{path.stem}-rank{cfg.bank_rank}.pt") if cfg.bank_rank else path
        if not path.exists():
            save_checkpoint(path, MemoryBank(load_checkpoint(full, (dict, torch.Tensor))).compress(cfg.bank_rank).parts)
    bank = MemoryBank(load_checkpoint(path, (dict, torch.Tensor)))
    for name, found in (bank.parts | dict(width=bank.get([0]).shape[1])).items():
        if name in wanted and None not in (wanted[name], found) and found != wanted[name]:
            fail(f"the bank {path} has the {name} {found!r}, and {wanted[name]!r} is needed: delete it, and it is made "
                 f"anew by the model's teacher (an older one: --teacher-ckpt FILE), or choose another --bank-path")
    return bank


def train(cfg, run):
    """Begin or continue the run in cfg.out."""
    if cfg.bench:
        data = SyntheticData(cfg.resolution, cfg.model != "toy")
    else:
        data = PreparedData(cfg.data, cfg.resolution)
    teacher, model = build(cfg, data, run)
    bank = None if cfg.bench else open_bank(cfg, run, model.memory_dim, teacher.identity, teacher)
    data.meta["teacher"] = teacher.identity  # goes into the checkpoints: banks of another one are refused
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
        null, keep = uniform() < cfg.mem_null_prob, uniform(model.memory_dim) >= cfg.mem_dropout
        terms = torch.zeros(4, device=run.device)
        for i in range(run.accumulation):
            batch, rows = next(loader), slice(i * run.micro_batch, (i + 1) * run.micro_batch)
            is_last = i + 1 == run.accumulation
            with nullcontext() if is_last or run.world == 1 else net.no_sync():  # gradients are reduced once a step
                with run.autocast():
                    snippet, z = teacher(batch["images"])  # class token and patch tokens of one forward
                    x = clean_input(batch, data.meta, posterior[rows])
                    snippet = corrupt(snippet, keep[rows], null[rows], cfg.mem_dropout)
                    velocity, proj, cosine = gmem_loss(net, x, t[rows], noise[rows], snippet, z, cfg.path_type)
                    loss = (velocity + cfg.proj_coeff * proj + cfg.cosine_coeff * cosine).mean()
                (loss / run.accumulation).backward()
            terms += torch.stack([loss, velocity.mean(), proj.mean(), cosine.mean()]).detach() / run.accumulation
        grad_norm, finite = optimizer_step(optimizer, parameters, cfg.max_grad_norm)
        update_ema(ema, model, cfg.ema_decay)
        log.add(finite, loss=terms[0], loss_velocity=terms[1], loss_proj=terms[2], loss_cosine=terms[3],
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
                    preview(cfg, run, ema, bank, data.shape, decode, step)
        if stopping:
            break
    loader.close()
    end_run(cfg, run, log, step, stopping)


def describe(cfg, run, data, model):
    """Say what is about to run, and write config.json; returns the model FLOPs of training on one image."""
    with flop_counter() as counter, torch.no_grad():
        model(*(torch.zeros(1, *shape, device=run.device) for shape in (data.shape, (), (model.memory_dim,))))
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


def preview(cfg, run, ema, bank, shape, decode, step):
    """Picture of the bank's first eight classes, a row each, by the EMA weights; the same noise at every step."""
    classes = bank.labels.unique()[:8].repeat_interleave(8).tolist()
    snippet = F.normalize(bank.get(bank.draw(len(classes), classes, cfg.seed)[:, 0]), dim=-1).to(run.device)
    randn = image_randn(cfg.seed, range(len(classes)), run.device)
    with run.autocast():
        x = sample(lambda *args: ema(*args)[0], randn(*shape), snippet, torch.zeros_like(snippet), num_steps=20,
                   path_type=cfg.path_type, cfg_scale=cfg.cfg_scale, guidance_low=cfg.guidance_low,
                   guidance_high=cfg.guidance_high)
    save_picture(Path(cfg.out) / f"preview-{step}.png", decode(x))


def generate(cfg, run):
    """Sample cfg.sample images from the EMA weights in cfg.ckpt; returns the path of the .npz file."""
    weights, checkpoint = load_weights(cfg.ckpt)
    trained = checkpoint.get("config", {})
    for name in ("model", "path_type", "enc_type"):
        if trained.get(name, getattr(cfg, name)) != getattr(cfg, name):
            fail(f"{cfg.ckpt} was trained as {trained[name]}: add --{name.replace('_', '-')} {trained[name]}")
    cfg = replace(cfg, data=trained.get("data", cfg.data), resolution=trained.get("resolution", cfg.resolution))
    if (projection := weights.get("condition_projection.linear.weight")) is None:
        fail(f"{cfg.ckpt} has no memory (no condition_projection.linear.weight): it is no checkpoint of gmem.py")
    model = sit_from_weights({name: w for name, w in weights.items() if not name.startswith("projectors.")}, cfg.model,
                             lambda size, channels, _, **sizes: MemorySiT(size, channels, projection.shape[1], sizes))
    model = compile_blocks(model.to(run.device).eval(), cfg)
    shape, meta = (model.in_channels, model.input_size, model.input_size), checkpoint.get("data", SD_VAE_META)
    bank = open_bank(cfg, run, projection.shape[1], meta.get("teacher"))
    decode = load_decoder(meta, cfg.vae, cfg.vae_ckpt, run.device)
    times = [*np.linspace(1, LAST_STEP, cfg.num_steps).tolist(), 0.0] if cfg.mode == "sde" and cfg.heun else None

    def generate_batch(rows, randn):
        rows = rows.cpu()
        snippet, other = F.normalize(bank.get(rows), dim=-1).to(run.device).unbind(1)  # (B,2,K) -> twice (B,K)
        if cfg.mix != "none":
            snippet = mix_snippets(snippet, other, cfg.mix_alpha, cfg.mix)
        with run.autocast():
            x = sample(lambda *args: model(*args)[0], randn(*shape), snippet, torch.zeros_like(snippet), randn=randn,
                       mode=cfg.mode, num_steps=cfg.num_steps, heun=cfg.heun, path_type=cfg.path_type, times=times,
                       cfg_scale=cfg.cfg_scale, guidance_low=cfg.guidance_low, guidance_high=cfg.guidance_high)
        return {"arr_0": decode(x), "labels": bank.labels[rows[:, 0]], "rows": rows}

    name = Path(cfg.bank_path or cfg.data).stem + f"-rank{cfg.bank_rank}" * (cfg.bank_rank > 0)
    name += f"-{cfg.mix}{cfg.mix_alpha:g}" * (cfg.mix != "none") + f"-cfg{cfg.cfg_scale:g}" * (cfg.cfg_scale != 1)
    path = Path(cfg.out) / f"samples-{name}.npz"
    sample_npz(path, generate_batch, bank.draw(cfg.sample, cfg.labels, cfg.seed), cfg.seed, run.micro_batch, run)
    say(f"wrote {path}: {cfg.sample} images, {cfg.mode} {cfg.num_steps} steps, guidance {cfg.cfg_scale:g}, "
        f"each conditioned on the features of one of the {len(bank.labels)} real images of {name}")
    return path


def report_toy(cfg, run):
    """Sample 480 images from three banks; have them judged, and say how near they are to training images."""
    last, held_out = f"{cfg.out}/last.pt", f"{cfg.data}/val"
    paths = [generate(replace(cfg, sample=480, ckpt=last, bank_path=folder, bank_rank=rank), run)
             for folder, rank in ((cfg.data, 0), (held_out, 0), (cfg.data, 8))]
    if run.rank == 0:
        run_tool("evaluate.py", *map(str, paths), cfg.data)
        print("(accuracy: how often the judge sees the class of the image whose snippet was drawn)")
        train = torch.from_numpy(np.load(f"{cfg.data}/images.npy")).flatten(1).float()
        for path in [*paths, Path(held_out, "images.npy")]:
            images = np.load(path)["arr_0"] if path in paths else np.load(path)[:480]
            nearest = torch.cdist(torch.from_numpy(images).flatten(1).float(), train).amin(dim=1).mean()
            print(f"{path}: {nearest / train.shape[1] ** 0.5:.1f} grey levels (RMS) to the nearest training image")
        line = json.loads((Path(cfg.out) / "log.jsonl").read_text().splitlines()[-1])
        print(f"velocity loss {line['loss_velocity']:.4f}"
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

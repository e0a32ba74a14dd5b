"""ReaLS: a latent space aligned with a vision network (Xu et al., arXiv 2502.00359).

The autoencoder is trained, not the diffusion model: while it learns to rebuild images, a small MLP must find in every
place of the latent the patch feature that a frozen teacher (DINOv2) has there, and another one, in the latent's mean,
the class token. A plain SiT trained on such latents learns faster; at sampling time nothing is added.

    L = mean |x' - x|^2 + l_p LPIPS(x, x') + l_k KL - l_d mean D(x') + l_a A,  x' = Dec(z), z = mean + std noise,
    A = 0.9 (C(P(z), f_p) + C(c(z), f_c)) + 0.1 (S(P(z), f_p) + S(c(z), f_c)),  C = 1 - cosine, S = smooth L1

    python reals.py                         the toy, on any machine: data, training, figures, reconstructions; 3 minutes
    python reals.py --align-coeff 0         a plain autoencoder, the baseline: no teacher is run
    torchrun --nproc_per_node=8 reals.py --model f8d4 --init ft-ema     on data/imagenet256, from the SD-VAE; or scratch
    python prepare.py --from data/imagenet256 --vae runs/reals-f8d4/vae.pt --out data/reals256    (or --images DIR)
    torchrun --nproc_per_node=8 repa.py --model SiT-XL/2 --proj-coeff 0 --data data/reals256      or any other script
    python reals.py --model f8d4 --sample 5000 --ckpt runs/reals-f8d4/vae.pt    reconstructions, for evaluate.py

What is known of ReaLS: [R] official README and figures; [C] other codes, read; [2nd] second-hand; [ours] our choice. No
training code was published, and we had no access to the paper's text. [R] f8, 4 channels; MSE, LPIPS, KL, patch-GAN;
DINOv2's patch tokens and class token by two MLPs, the second on the pooled latent; a plain SiT on top. [2nd] 0.9 and
0.1. [C] LPIPS, discriminator, hinge, KL, as in LDM, VA-VAE, REPA-E. [ours] all other numbers below but where marked
(the codes' where they have one), the MLPs' shape, DINOv2-B at 448 px, the sample of z that is decoded as their input.

Published [R], ImageNet 256 px, sampler and its steps not stated: SiT-XL/2 without guidance FID 14.24 after 400K steps
(17.2 on the SD-VAE's latents), 8.80 after 2M; with guidance 1.8 on [0, 0.75] 1.82 after 400 epochs. Without guidance
later methods are far ahead: LightningDiT on VA-VAE 2.17, REPA on REPA-E's autoencoder 1.83, both after 800 epochs. Run
by us: the toy and the checks in README.md, not ImageNet.

What differs from the codes [C], on purpose: weights are constant and terms are means (VA-VAE sums the reconstruction
over pixels, where a KL weight of 1e-6 is 2e5 times weaker); LPIPS sees [-1,1] (REPA-E's: mapped twice); the teacher
sees normalised images (VA-VAE's: not); latents are scaled by what is measured, never by 0.18215. As there, BatchNorm in
D has the statistics of a pass of a rank: with the GAN on, other ranks or micro-batches are another run.
"""
import argparse
import copy
import functools
import inspect
import json
import os
import re
import zlib
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

from common import (VAE_REPOS, AutoencoderKL, Log, PreparedData, SyntheticData, catch_stop, clear_errors, end_run,
                    fail, first_rank_first, flop_counter, init_linear, load_checkpoint, load_lpips, load_teacher,
                    load_vae, make_folder, micro_batches, mix_seed, pixels_to_uint8, process_group_backend,
                    rename_vae_weights, run_tool, sample_npz, save_checkpoint, save_picture, say, step_draws)


@dataclass
class Config:
    """One field is one flag. The values here are for f8d4 at 256 px; RECIPES holds what other models change."""
    model: str = "toy"                                    # toy, f4d4 or f8d4; it picks the recipe
    data: str = "data/imagenet{resolution}"               # folder made by prepare.py, with any --vae
    out: str = "runs/reals-{model}"                       # config.json, log.jsonl, last.pt, vae.pt, preview-*.png
    resolution: int = 256                                 # pixels
    batch_size: int = 256                                 # images per step, over all GPUs [C]
    micro_batch: int = 0                                  # images per GPU at once; 0 = batch size / GPUs
    max_train_steps: int = 250_000                        # 50 epochs [ours]
    learning_rate: float = 1e-4                           # AdamW, constant, for both networks [C]
    max_grad_norm: float = 1.0                            # gradients are clipped to this norm [C]
    ema_decay: float = 0.0                                # of averaged weights; 0 = the weights themselves [C]
    enc_type: str = "dinov2-vit-b"                        # teacher; prepared = DATA/teacher.pt; size [ours]
    teacher_ckpt: str = ""                                # its weights from a file instead of the hub
    precision: Literal["auto", "bf16", "fp32"] = "auto"   # auto = bf16 on CUDA, fp32 elsewhere; losses are fp32
    compile: bool = None                                  # torch.compile encoder and decoder; default: on CUDA
    seed: int = 0                                         # of the weights, the order of images and every draw
    workers: int = 4                                      # data processes per GPU
    log_every: int = 100                                  # steps
    save_every: int = 5000                                # steps between writes of last.pt
    keep_every: int = 50_000                              # steps between vae-*.pt, which stay; 0 = none
    preview_every: int = 10_000                           # steps between figures and pictures; 0 = only at the end
    init: str = ""                                        # ft-ema, ft-mse, or a file (diffusers, LDM, ours); "" = fresh
    ckpt: str = ""                                        # autoencoder to rebuild with: what --init takes
    sample: int = 0                                       # rebuild this many held-out images instead of training
    bench: int = 0                                        # train this many steps on synthetic data, write nothing
    align_coeff: float = 0.5                              # l_a [ours]; 0 = plain autoencoder without a teacher
    cls_coeff: float = 1.0                                # share of the class token beside the patches' [ours]
    align_grid: int = 32                                  # teacher's tokens a side; 16 costs 4.6 times less [ours]
    perceptual_coeff: float = 1.0                         # l_p, LPIPS [C]
    kl_coeff: float = 1e-6                                # l_k, of the KL summed over a latent, the others averaged [C]
    disc_coeff: float = 0.1                               # l_d; 0 = no GAN [C]
    disc_start: int = 5000                                # the GAN begins after this step [C]
    disc_dim: int = 64                                    # channels of the discriminator's first layer [C]
    disc_layers: int = 3                                  # of the discriminator, between first and last [C]
    flip_prob: float = 0.5                                # images mirrored [ours]
    projector_dim: int = 1024                             # width of the MLPs' hidden layers [ours]
    probe_images: int = 10_000                            # of which statistics and probe are made [C]
    vgg_ckpt: str = ""                                    # torchvision's vgg16 file instead of the internet
    lpips_ckpt: str = ""                                  # LPIPS' vgg.pth, version 0.1, instead of the internet


MODELS = {  # sizes of common.AutoencoderKL
    "toy": dict(widths=(16, 32), layers=1, groups=8, latent_channels=4),  # f2, for 16 px
    "f4d4": dict(widths=(16, 32, 32), layers=1, groups=8, latent_channels=4),  # for 32 px
    "f8d4": dict(widths=(128, 256, 512, 512), layers=2, groups=32, latent_channels=4),  # the SD-VAE
}
SMALL = dict(enc_type="prepared", perceptual_coeff=0.0, disc_coeff=0.0, disc_dim=16, disc_layers=2, projector_dim=256,
             kl_coeff=1e-5, probe_images=4000, workers=0, log_every=50, save_every=500, keep_every=0)
RECIPES = {  # by the beginning of the model's name
    "toy": SMALL | dict(data="data/toy", resolution=16, batch_size=32, max_train_steps=1000, learning_rate=2e-3,
                        preview_every=500),
    "f4d4": SMALL | dict(data="data/cifar32", resolution=32, batch_size=64, max_train_steps=300, learning_rate=1e-3,
                         preview_every=0, probe_images=10_000),
}
# What may change between a run and its continuation: how it is carried out, not what it computes.
BOOKKEEPING = ("data out micro_batch max_train_steps teacher_ckpt compile workers log_every save_every keep_every "
               "preview_every ckpt sample bench probe_images vgg_ckpt lpips_ckpt").split()
RANGES = [("resolution batch_size max_train_steps log_every save_every align_grid disc_dim disc_layers projector_dim",
           1, 1e12), ("probe_images", 4, 1e12),
          ("micro_batch learning_rate seed workers keep_every preview_every sample bench align_coeff", 0, 1e12),
          ("cls_coeff perceptual_coeff kl_coeff disc_coeff disc_start", 0, 1e12), ("ema_decay flip_prob", 0, 1),
          ("max_grad_norm", 1e-12, 1e12)]
PROBE_GRID = 8  # the probe sees latents averaged to at most 8x8 places


# ---------------------------------------------------------------------------------------------------------------------
# The method
# ---------------------------------------------------------------------------------------------------------------------
class AlignHeads(nn.Module):
    """The two MLPs, from a place of the latent and from its mean, to the teacher's width (sizes [ours])."""

    def __init__(self, latent_channels, z_dim, projector_dim):
        super().__init__()
        self.patch, self.cls = (nn.Sequential(
            nn.Linear(latent_channels, projector_dim), nn.SiLU(),
            nn.Linear(projector_dim, projector_dim), nn.SiLU(),
            nn.Linear(projector_dim, z_dim)) for _ in range(2))
        self.apply(init_linear)

    def forward(self, z, grid):
        """Latents z (B,C,h,w) to tokens (B,grid*grid,K) and a class token (B,K)."""
        places = F.adaptive_avg_pool2d(z, grid).flatten(2).mT  # (B,C,h,w) -> (B,C,g,g) -> (B,N,C)
        return self.patch(places), self.cls(z.mean(dim=(2, 3)))


class ReaLS(nn.Module):
    """The autoencoder and, with a teacher of width z_dim and grid x grid tokens, the MLPs that face it."""

    def __init__(self, sizes, z_dim=0, grid=0, projector_dim=0):
        super().__init__()
        self.vae, self.grid = AutoencoderKL(**sizes), grid
        if z_dim:
            self.align = AlignHeads(sizes["latent_channels"], z_dim, projector_dim)
        self.blocks = [self.vae.encoder, self.vae.decoder]  # what is compiled

    def forward(self, x, noise):
        """x (B,3,H,W) in [-1,1], noise (B,C,h,w) to x_hat, mean, std, z and, with a teacher, patches, cls; fp32."""
        mean, std = self.vae.encode(x)
        z = mean.float() + std.float() * noise
        x_hat = self.vae.decode(z).float()
        return x_hat, mean.float(), std.float(), z, *(self.align(z, self.grid) if self.grid else ())


class PatchDiscriminator(nn.Module):
    """Are the patches of x (B,3,H,W) real? Logits (B,1,h,w); pix2pix's and taming's network and names [C]."""

    def __init__(self, dim=64, layers=3):
        super().__init__()
        main, width = [nn.Conv2d(3, dim, 4, 2, 1), nn.LeakyReLU(0.2)], dim
        for i in range(1, layers + 1):
            before, width, stride = width, dim * min(2**i, 8), 2 if i < layers else 1
            main += [nn.Conv2d(before, width, 4, stride, 1, bias=False), nn.BatchNorm2d(width), nn.LeakyReLU(0.2)]
        self.main = nn.Sequential(*main, nn.Conv2d(width, 1, 4, 1, 1))
        for module in self.main:
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0, 0.02)
            elif isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.weight, 1, 0.02)

    def forward(self, x):
        return self.main(x).float()


def to_input(images):
    """images (B,H,W,3) uint8 to x (B,3,H,W) in [-1,1]."""
    return images.permute(0, 3, 1, 2).float() / 127.5 - 1


def kl_loss(mean, std):
    """KL divergence (B,) of the posterior from the standard normal, summed over the latent (B,C,h,w)."""
    return 0.5 * (mean.square() + std.square() - 1 - 2 * std.log()).sum(dim=(1, 2, 3))


def hinge_loss(real, fake):
    """The discriminator's loss of its logits for images and reconstructions; each a pass, for BatchNorm's sake [C]."""
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())


def align_loss(patches, cls, z_patches, z_cls, cls_coeff=1.0):
    """A (B,), and the patches' mean cosine (B,): predicted tokens (B,N,K), class token (B,K), and the teacher's."""
    def part(ours, theirs):  # 0.9 and 0.1 are [2nd]
        cosine = F.cosine_similarity(ours, theirs, dim=-1)
        return 0.9 * (1 - cosine) + 0.1 * F.smooth_l1_loss(ours, theirs, reduction="none").mean(dim=-1), cosine
    (loss_patch, cosine), (loss_cls, _) = part(patches.float(), z_patches), part(cls.float(), z_cls)
    return loss_patch.mean(dim=1) + cls_coeff * loss_cls, cosine.mean(dim=1)


def reals_loss(model, x, noise, z_cls, z_patches, lpips=None, disc=None, cls_coeff=1.0):
    """Reconstruction x_hat (B,3,H,W), and the terms of the loss and two figures to log, each (B,).

    x (B,3,H,W) in [-1,1]; noise (B,C,h,w) of the posterior; z_cls (B,K), z_patches (B,N,K), the teacher's features of
    x, or None. What is not given, a perceptual network, a discriminator, a teacher, has terms of zero.
    """
    x_hat, mean, std, z, *tokens = model(x, noise)
    terms = dict.fromkeys(("mse", "lpips", "kl", "gan", "align", "align_cosine", "latent_std"), x.new_zeros(len(x)))
    terms["mse"] = (x_hat - x).square().mean(dim=(1, 2, 3))
    terms["kl"] = kl_loss(mean, std)
    terms["latent_std"] = z.detach().std(dim=(0, 2, 3)).mean().expand(len(x))
    if lpips is not None:
        terms["lpips"] = lpips(x, x_hat)[:, 0, 0, 0]
    if disc is not None:
        terms["gan"] = -disc(x_hat).mean(dim=(1, 2, 3))
    if tokens:
        terms["align"], terms["align_cosine"] = align_loss(*tokens, z_patches, z_cls, cls_coeff)
    return x_hat, terms


def total_loss(cfg, terms):
    """L (B,): the weighted sum of the terms."""
    return (terms["mse"] + cfg.perceptual_coeff * terms["lpips"] + cfg.kl_coeff * terms["kl"]
            + cfg.disc_coeff * terms["gan"] + cfg.align_coeff * terms["align"])


def ridge_probe(train, train_labels, test, test_labels, strength=0.01):
    """Accuracy of a linear classifier, by ridge regression on one-hot labels, from latents (N,C,h,w) of two sets."""
    def flat(z):
        return F.adaptive_avg_pool2d(z, min(PROBE_GRID, z.shape[-1])).flatten(1).double()
    train, test = flat(train), flat(test)
    mean, std = train.mean(dim=0), train.std(dim=0) + 1e-8
    train, test = (train - mean) / std, (test - mean) / std
    targets = F.one_hot(train_labels).double()
    gram = train.mT @ train + strength * len(train) * torch.eye(train.shape[1], dtype=train.dtype)
    weights = torch.linalg.solve(gram, train.mT @ (targets - targets.mean(dim=0)))
    return ((test @ weights + targets.mean(dim=0)).argmax(dim=1) == test_labels).float().mean().item()


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
def init_from(name, model):
    """Fill `model` from ft-ema, ft-mse, vae.pt, a checkpoint of a run, or an SD-VAE of diffusers' or LDM's names.

    Returns what stays fresh: the MLPs, where the file has none that fit.
    """
    if name in VAE_REPOS:
        weights = load_vae(name).state_dict()
    else:
        weights = load_checkpoint(name)
        weights = next((weights[part] for part in ("ema", "vae", "state_dict") if part in weights), weights)
    if not any(str(key).startswith("vae.") for key in weights):  # no checkpoint of a run
        weights = {f"vae.{key}": value for key, value in rename_vae_weights(weights).items()}
    shapes = {key: value.shape for key, value in model.state_dict().items()}
    fits = {key: value.float() for key, value in weights.items() if getattr(value, "shape", None) == shapes.get(key, 0)}
    if wrong := sorted(key for key in shapes | weights if key.startswith("vae.") and key not in fits):
        fail(f"{name} does not fit the autoencoder: {len(wrong)} names or shapes differ, first {wrong[0]}; "
             f"is --model right?")
    model.load_state_dict(fits, strict=False)
    return sorted({key.split(".")[0] for key in shapes if key not in fits})


def build(cfg, run):
    """The frozen teacher (none without an alignment), the autoencoder with its MLPs, the discriminator, LPIPS."""
    teacher, sizes = None, MODELS[cfg.model]
    size = cfg.resolution // 2 ** (len(sizes["widths"]) - 1)
    if size * 2 ** (len(sizes["widths"]) - 1) != cfg.resolution:
        fail(f"{cfg.model} needs a --resolution that is a multiple of {2 ** (len(sizes['widths']) - 1)}")
    if cfg.align_coeff:
        is_prepared = cfg.enc_type == "prepared"
        file = f"{cfg.data}/teacher.pt" if is_prepared and not cfg.teacher_ckpt else cfg.teacher_ckpt
        # DINOv2 takes any size: patches of 14 px of a larger image give as many tokens as are wanted.
        teacher = load_teacher(cfg.enc_type, cfg.resolution if is_prepared else 16 * cfg.align_grid, file,
                               not cfg.bench).to(run.device)
        if size % teacher.grid:
            fail(f"the latent's {size}x{size} places cannot be averaged to the {teacher.grid}x{teacher.grid} of "
                 f"{cfg.enc_type}: choose another --align-grid, or for a prepared teacher: python prepare.py teacher "
                 f"--data {cfg.data} --patch-size {cfg.resolution // size}")
        if cfg.compile:
            teacher.compile()
    torch.manual_seed(cfg.seed)  # the autoencoder begins alike with any teacher, or none
    model = ReaLS(sizes, *((teacher.width, teacher.grid, cfg.projector_dim) if teacher else ()))
    model.latent_shape = (sizes["latent_channels"], size, size)
    torch.manual_seed(cfg.seed)
    disc = PatchDiscriminator(cfg.disc_dim, cfg.disc_layers)
    if cfg.disc_coeff and cfg.resolution < 2 ** (cfg.disc_layers + 2):
        fail(f"a discriminator of {cfg.disc_layers} layers is for {2 ** (cfg.disc_layers + 2)} px and more, not for "
             f"{cfg.resolution}: lower --disc-layers, or train without it: --disc-coeff 0")
    lpips = None
    if cfg.perceptual_coeff:
        lpips = load_lpips(cfg.vgg_ckpt, cfg.lpips_ckpt, not cfg.bench).to(run.device)
    return teacher, model.to(run.device), disc.to(run.device), lpips


def train(cfg, run):
    """Begin or continue the run in cfg.out."""
    data = SyntheticData(cfg.resolution, False) if cfg.bench else PreparedData(cfg.data, cfg.resolution)
    data.names = ["images"]  # latents of another autoencoder may lie beside them
    teacher, model, disc, lpips = build(cfg, run)
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    optimizer, optimizer_d = (torch.optim.AdamW(part.parameters(), lr=cfg.learning_rate, betas=(0.5, 0.9),
                                                weight_decay=0, fused=True) for part in (model, disc))
    parameters, parameters_d = list(model.parameters()), list(disc.parameters())
    first_step = restore(replace(cfg, init="") if cfg.bench else cfg, data.meta, model, ema, optimizer)
    if first_step:
        checkpoint = load_checkpoint(Path(cfg.out) / "last.pt")
        disc.load_state_dict(checkpoint["disc"])
        optimizer_d.load_state_dict(checkpoint["optimizer_d"])
    if first_step >= cfg.max_train_steps:
        return say(f"{cfg.out} is finished: {first_step} steps; --max-train-steps trains on, --out begins another run")
    flops_per_image = describe(cfg, run, data, model)
    log, stop = Log(cfg, run, first_step, flops_per_image), catch_stop(run)
    net, net_d = parallelise(model, cfg, run), disc
    if run.world > 1:  # BatchNorm's running means are never used: ranks need not agree on them
        net_d = nn.parallel.DistributedDataParallel(disc, broadcast_buffers=False)
    loader = micro_batches(data, cfg.seed, cfg.batch_size, run, first_step, cfg.workers)

    for step in range(first_step + 1, cfg.max_train_steps + 1):
        # Every draw of the step is made for the global batch; this rank holds its part, in micro-batches.
        normal, uniform = step_draws(cfg.seed, step, cfg.batch_size, run)
        noise, mirrored = normal(*model.latent_shape), uniform() < cfg.flip_prob
        has_gan = cfg.disc_coeff > 0 and step > cfg.disc_start
        sums = 0
        for i in range(run.accumulation):
            batch, rows = next(loader), slice(i * run.micro_batch, (i + 1) * run.micro_batch)
            waits = i + 1 < run.accumulation and run.world > 1
            images = torch.where(mirrored[rows].view(-1, 1, 1, 1), batch["images"].flip(2), batch["images"])
            x = to_input(images)
            with (net.no_sync() if waits else nullcontext(), net_d.no_sync() if waits else nullcontext()):
                disc.requires_grad_(False)
                with run.autocast():
                    z_cls, z_patches = teacher(images) if teacher else (None, None)
                    x_hat, terms = reals_loss(net, x, noise[rows], z_cls, z_patches, lpips, disc if has_gan else None,
                                              cfg.cls_coeff)
                    loss = total_loss(cfg, terms).mean()
                (loss / run.accumulation).backward()
                disc.requires_grad_(True)
                loss_disc = torch.zeros_like(loss)
                if has_gan:  # of the same reconstructions, by the discriminator that judged them: both step together
                    with run.autocast():
                        loss_disc = hinge_loss(net_d(x), net_d(x_hat.detach()))
                    (loss_disc / run.accumulation).backward()
            terms["psnr"] = 10 * torch.log10(4 / terms["mse"])  # images span 2
            sums = sums + torch.stack([loss, loss_disc, *(term.mean() for term in terms.values())]).detach()
        grad_norm, finite = optimizer_step(optimizer, parameters, cfg.max_grad_norm)
        if has_gan:
            finite = finite & optimizer_step(optimizer_d, parameters_d, cfg.max_grad_norm)[1]
        update_ema(ema, model, cfg.ema_decay)
        log.add(finite, **dict(zip(("loss", "loss_disc", *terms), sums / run.accumulation)), grad_norm=grad_norm)

        last, stopping = step == cfg.max_train_steps, stop(step)
        if step % cfg.log_every == 0 or last:
            log.write(step)
        if run.rank == 0 and not cfg.bench:
            with log.pause():
                keeps = cfg.keep_every and step % cfg.keep_every == 0
                if last or keeps or cfg.preview_every and step % cfg.preview_every == 0:
                    stats = measure(cfg, run, ema, teacher, lpips, step)
                    for name in [f"vae-{step}.pt"] * bool(keeps) + ["vae.pt"] * last:
                        save_run(cfg, name, step, data.meta, vae=ema.vae, sizes=MODELS[cfg.model], **stats)
                if step % cfg.save_every == 0 or last or stopping:  # after vae.pt: a finished run has both
                    save_run(cfg, "last.pt", step, data.meta, ema=ema, model=model, optimizer=optimizer, disc=disc,
                             optimizer_d=optimizer_d)
        if stopping:
            break
    loader.close()
    end_run(cfg, run, log, step, stopping)


def describe(cfg, run, data, model):
    """Say what is about to run, and write config.json; returns the autoencoder's FLOPs of training on one image."""
    with flop_counter() as counter, torch.no_grad():
        model(*(torch.zeros(1, *shape, device=run.device)
                for shape in ((3, cfg.resolution, cfg.resolution), model.latent_shape)))
    flops = 3 * counter.get_total_flops()  # the backward pass costs two forward passes
    count, images = sum(p.numel() for p in model.parameters()), cfg.max_train_steps * cfg.batch_size
    say(f"{cfg.model}: {count / 1e6:,.2f} M parameters, a checkpoint of {16e-9 * count:,.2f} GB, {flops / 1e9:,.2f} "
        f"GFLOP per training image, {cfg.precision}{', compiled' if cfg.compile else ''}")
    say(f"{cfg.data}: {len(data):,} images of {cfg.resolution} px to latents {model.latent_shape}; "
        f"{cfg.max_train_steps:,} steps, {len(data) / cfg.batch_size:,.1f} an epoch: {images / len(data):,.1f} epochs")
    say(f"{cfg.batch_size} images a step = {run.world} x {run.device.type} x {run.accumulation} micro-batches of "
        f"{run.micro_batch}; results in {cfg.out}")
    if run.rank == 0 and not cfg.bench:
        make_folder(cfg.out)
        (Path(cfg.out) / "config.json").write_text(json.dumps(asdict(cfg), indent=1) + "\n")
    return flops


def probe_sets(cfg):
    """(images, labels) to train the probe on, and held out: DATA/val, or where there is none every second image."""
    data = [PreparedData(cfg.data, cfg.resolution)]
    if Path(cfg.data, "val", "meta.json").is_file():
        data.append(PreparedData(Path(cfg.data, "val"), cfg.resolution))
    sets = []
    for i in range(2):
        rows = np.arange(len(data[0]))[i::2] if len(data) == 1 else np.arange(len(data[i]))
        rows = rows[np.linspace(0, len(rows) - 1, min(cfg.sample or cfg.probe_images, len(rows))).astype(int)]
        sets += [data[i % len(data)].array(name)[rows] for name in ("images", "labels")]  # evenly, of all classes
    return map(torch.from_numpy, sets)


@torch.no_grad()
def measure(cfg, run, model, teacher, lpips, step):
    """Figures of the autoencoder on held-out images, said and written, and a picture; returns its latents' statistics.

    The probe learns from probe_images training images; mean and std of a channel are of as many sampled latents.
    """
    def encode(images):  # to mean and std, each (N,C,h,w)
        pairs = [model.vae.encode(to_input(batch.to(run.device))) for batch in images.split(run.micro_batch)]
        return [torch.cat(parts).cpu() for parts in zip(*pairs)]

    images, labels, test_images, test_labels = probe_sets(cfg)
    mean, std = encode(images)
    generator = torch.Generator().manual_seed(mix_seed(cfg.seed, step))
    z = mean + std * torch.randn(mean.shape, generator=generator)
    latent_std, latent_mean = (value.tolist() for value in torch.std_mean(z.double(), dim=(0, 2, 3)))
    probe, found = ridge_probe(mean, labels, encode(test_images)[0], test_labels), []
    for batch in test_images[::-(-len(test_images) // 512)].to(run.device).split(run.micro_batch):
        x, (z_cls, z_patches) = to_input(batch), teacher(batch) if teacher else (None, None)
        noise = torch.zeros(len(x), *model.latent_shape, device=run.device)  # the mean of the latent is rebuilt
        x_hat, terms = reals_loss(model, x, noise, z_cls, z_patches, lpips)
        if not found:
            draw_pairs(f"{cfg.out}/preview-{step}.png", batch[:32], pixels_to_uint8(x_hat[:32]))
        psnr = 10 * torch.log10(4 / (x_hat.clamp(-1, 1) - x).square().mean(dim=(1, 2, 3)))
        found.append(torch.stack([psnr, terms["lpips"], terms["align_cosine"]], dim=1))
    psnr, distance, cosine = torch.cat(found).mean(dim=0).tolist()
    figures = dict(step=step, psnr=psnr, probe=probe, latent_std=float(np.mean(latent_std)))
    figures |= (dict(lpips=distance) if lpips else {}) | (dict(align_cosine=cosine) if teacher else {})
    say("held-out images: " + ", ".join(f"{name} {value:.4g}" for name, value in figures.items()))
    Path(cfg.out, f"figures-{step}.json").write_text(json.dumps(figures) + "\n")
    weights = b"".join(value.cpu().numpy().tobytes() for value in model.vae.state_dict().values())
    return dict(latent_mean=latent_mean, latent_std=latent_std, id=f"reals-{zlib.crc32(weights):08x}")


def draw_pairs(path, images, rebuilt):
    """A picture of images (N,R,R,3) uint8: a row of eight, below it their reconstructions, and so on."""
    rows = [part for pair in zip(images.split(8), rebuilt.split(8)) for part in pair]
    save_picture(path, torch.cat(rows))


@torch.no_grad()
def generate(cfg, run):
    """Rebuild cfg.sample held-out images by the autoencoder in cfg.ckpt; returns the path of the .npz file."""
    model = ReaLS(MODELS[cfg.model])
    init_from(cfg.ckpt, model)
    model.to(run.device).eval()
    *_, images, labels = probe_sets(cfg)
    if len(labels) < cfg.sample:
        fail(f"--sample {cfg.sample}: {cfg.data} has {len(labels)} held-out images")

    def rebuild(rows, randn):
        mean, _ = model.vae.encode(to_input(images[rows.cpu()].to(run.device)))
        return {"arr_0": pixels_to_uint8(model.vae.decode(mean)), "labels": labels[rows.cpu()]}

    path = Path(cfg.out) / "reconstructions.npz"
    sample_npz(path, rebuild, torch.arange(cfg.sample), cfg.seed, run.micro_batch, run)
    if run.rank == 0:
        rebuilt = torch.from_numpy(np.load(path)["arr_0"])
        draw_pairs(path.with_suffix(".png"), images[:64], rebuilt[:64])
        mse = (images.float() - rebuilt.float()).square().mean(dim=(1, 2, 3))
        say(f"wrote {path}: {cfg.sample} images, PSNR {(10 * torch.log10(255**2 / mse)).mean():.2f} dB; the first ones "
            f"with their originals in {path.with_suffix('.png')}")
    return path


def report_toy(cfg, run):
    """Have 480 reconstructions judged, print the trade-off, and say how others train on these latents."""
    path = generate(replace(cfg, sample=480, ckpt=f"{cfg.out}/vae.pt"), run)
    if run.rank == 0:
        run_tool("evaluate.py", str(path), cfg.data)
        print("   step   PSNR dB   probe   alignment cosine   latent std")
        for path_of in sorted(Path(cfg.out).glob("figures-*.json"), key=lambda path: int(path.stem[8:])):
            line = json.loads(path_of.read_text())
            print(f"{line['step']:7d}{line['psnr']:10.2f}{line['probe']:8.1%}{line.get('align_cosine', 0):19.3f}"
                  f"{line['latent_std']:13.3f}")
        print(f"look at {path.with_suffix('.png')}; to train any script on these latents:\n"
              f"  python prepare.py --from {cfg.data} --vae {cfg.out}/vae.pt --out data/toy-reals\n"
              f"  python repa.py --model toy/2 --proj-coeff 0 --data data/toy-reals --out runs/repa-toy-reals")


def main(argv=None):
    """Train or rebuild, as the command line says; the toy does both and has the result judged."""
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

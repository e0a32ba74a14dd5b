"""ReaLS: a latent space aligned with a vision network (Xu et al., arXiv 2502.00359).

The autoencoder is trained, not the diffusion model: while it learns to rebuild images, a small MLP
must find, in every place of the latent, the patch feature that a frozen teacher (DINOv2) has there,
and another MLP, in the latent's mean, the class token. A plain SiT trained on such latents learns
faster; at sampling time nothing is added.

    L = mean |x_hat - x|^2 + l_p LPIPS(x, x_hat) + l_k KL - l_d mean D(x_hat) + l_a A
    x_hat = Dec(z),  z = mean + std noise,  mean, std = Enc(x)
    A = d(P(z), f_patch) + d(c(z), f_cls)
    d(a, b) = 0.9 (1 - cos(a, b)) + 0.1 smooth_L1(a, b)

P and c are the MLPs, f_patch and f_cls the teacher's features; the discriminator D has a loss and
an optimiser of its own.

    python reals.py                    the toy: data, training, metrics, reconstructions; 3 minutes
    python reals.py --align-coeff 0    a plain autoencoder, the baseline: no teacher is run
    torchrun --nproc_per_node=8 reals.py --model f8d4 --init ft-ema
    python prepare.py --from data/imagenet256 --vae runs/reals-f8d4/vae.pt --out data/reals256
    torchrun --nproc_per_node=8 repa.py --model SiT-XL/2 --proj-coeff 0 --data data/reals256
    python reals.py --model f8d4 --sample 5000 --ckpt runs/reals-f8d4/vae.pt

The third line trains from the SD-VAE on data/imagenet256, without --init from scratch; the fourth
can encode --images DIR; the fifth can be any script; the last rebuilds images for evaluate.py.

No training code was published, and we had no access to the paper's text. docs/results.md tells what
every choice rests on: [R] official README and its numbers, [C] other codes (LDM, VA-VAE, REPA-E),
[2nd] second-hand, [ours] our choice.

Published [R], ImageNet 256 px, sampler and its steps not stated: SiT-XL/2 without guidance FID
14.24 after 400K steps (17.2 on the SD-VAE's latents), 8.80 after 2M; with guidance 1.8 on [0, 0.75]
1.82 after 400 epochs. Without guidance later methods are far ahead: LightningDiT on VA-VAE 2.17,
REPA on REPA-E's autoencoder 1.83, both after 800 epochs. Our runs: the toy and CIFAR-10, in
docs/results.md; not ImageNet.

What differs from the codes [C], on purpose: weights are constant and terms are means (VA-VAE sums
the reconstruction over pixels, where a KL weight of 1e-6 is 2e5 times weaker); LPIPS sees [-1,1]
(in REPA-E it is mapped twice); the teacher sees normalised images (in VA-VAE it does not); latents
are scaled by what is measured, never by 0.18215. As there, BatchNorm in D has the statistics of one
pass of one rank: with the GAN on, another number of ranks or micro-batches is another run.
"""
import contextlib
import copy
import json
import math
import zlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from common import init_linear, projector
from support.checkpoints import load_checkpoint, restore, save_run
from support.dataset import images_to_input, micro_batches, mix_seed, open_data, step_draws
from support.flags import BOOKKEEPING, parse
from support.log import Log
from support.lpips import PatchDiscriminator, hinge_loss, load_lpips, ridge_probe
from support.runs import (
    DDP_OPTIONS,
    announce,
    catch_stop,
    clear_errors,
    compile_blocks,
    end_run,
    make_data,
    run_tool,
    setup,
    training_flops,
)
from support.samples import sample_npz, save_picture
from support.teachers import load_teacher
from support.terminal import fail, say
from support.vae import VAE_REPOS, AutoencoderKL, load_vae, pixels_to_uint8, rename_vae_weights


@dataclass
class Config:
    """One field is one flag. Values are for f8d4 at 256 px; RECIPES has other models'."""
    # The method
    align_coeff: float = 0.5                # l_a [ours]; 0 = plain autoencoder without a teacher
    cls_coeff: float = 1.0                  # share of the class token beside the patches' [ours]
    align_grid: int = 32                    # teacher's tokens a side; 16: 4.6 times cheaper [ours]
    projector_dim: int = 1024               # width of the MLPs' hidden layers [ours]
    perceptual_coeff: float = 1.0           # l_p, LPIPS [C]
    kl_coeff: float = 1e-6                  # l_k, of a latent's summed KL, other terms means [C]
    disc_coeff: float = 0.1                 # l_d; 0 = no GAN [C]
    disc_start: int = 5000                  # the GAN begins after this step [C]
    disc_dim: int = 64                      # channels of the discriminator's first layer [C]
    disc_layers: int = 3                    # of the discriminator, between first and last [C]
    flip_prob: float = 0.5                  # images mirrored [ours]
    probe_images: int = 10_000              # of which statistics and probe are made [C]
    vgg_ckpt: str = ""                      # torchvision's vgg16 file instead of the internet
    lpips_ckpt: str = ""                    # LPIPS' vgg.pth, version 0.1, not the internet

    # The run
    model: str = "toy"                      # toy, f4d4 or f8d4; it picks the recipe
    data: str = "data/imagenet{resolution}"  # folder made by prepare.py, with any --vae
    out: str = "runs/reals-{model}"         # config.json, log.jsonl, last.pt, vae.pt, previews
    resolution: int = 256                   # pixels
    batch_size: int = 256                   # images per step, over all GPUs [C]
    micro_batch: int = 0                    # images per GPU at once; 0 = batch size / GPUs
    max_train_steps: int = 250_000          # 50 epochs [ours]

    # Optimisation
    learning_rate: float = 1e-4             # AdamW, constant, for both networks [C]
    max_grad_norm: float = 1.0              # gradients are clipped to this norm [C]
    ema_decay: float = 0.0                  # of averaged weights; 0 = the weights themselves [C]

    # Teacher
    enc_type: str = "dinov2-vit-b"          # prepared = DATA/teacher.pt; DINOv2's size [ours]
    teacher_ckpt: str = ""                  # its weights from a file instead of the hub

    # How it is carried out
    precision: Literal["auto", "bf16", "fp32"] = "auto"  # auto = bf16 on CUDA, fp32 elsewhere
    compile: bool = None                    # torch.compile encoder and decoder; default: on CUDA
    seed: int = 0                           # of the weights, the order of images, every draw
    workers: int = 4                        # data processes per GPU
    log_every: int = 100                    # steps
    save_every: int = 5000                  # steps between writes of last.pt
    keep_every: int = 50_000                # steps between vae-*.pt, which stay; 0 = none
    preview_every: int = 10_000             # steps between metrics and pictures; 0 = at the end
    init: str = ""                          # ft-ema, ft-mse, a file (diffusers, LDM, ours); fresh

    # Reconstruction
    ckpt: str = ""                          # autoencoder to rebuild with: what --init takes
    sample: int = 0                         # rebuild this many held-out images instead of training

    # Speed
    bench: int = 0                          # train this many steps on random data, write nothing


MODELS = {  # arguments of support.vae.AutoencoderKL
    "toy": dict(widths=(16, 32), layers=1, groups=8, latent_channels=4),  # f2, for 16 px
    "f4d4": dict(widths=(16, 32, 32), layers=1, groups=8, latent_channels=4),  # for 32 px
    "f8d4": dict(widths=(128, 256, 512, 512), layers=2, groups=32, latent_channels=4),  # SD-VAE
}
SMALL = dict(
    enc_type="prepared", projector_dim=256, kl_coeff=1e-5, perceptual_coeff=0.0, disc_coeff=0.0,
    disc_dim=16, disc_layers=2, workers=0, log_every=50, save_every=500, keep_every=0)
RECIPES = {  # by the beginning of the model's name
    "toy": SMALL | dict(
        data="data/toy", resolution=16, batch_size=32, max_train_steps=1000,
        learning_rate=2e-3, probe_images=4000, preview_every=500),
    "f4d4": SMALL | dict(
        data="data/cifar32", resolution=32, batch_size=64, max_train_steps=300,
        learning_rate=1e-3, probe_images=10_000, preview_every=0),
}
RANGES = {  # beside the shared fields'
    "align_coeff": (0, 1e12), "cls_coeff": (0, 1e12), "align_grid": (1, 1e12),
    "perceptual_coeff": (0, 1e12), "kl_coeff": (0, 1e12), "disc_coeff": (0, 1e12),
    "disc_start": (0, 1e12), "disc_dim": (1, 1e12), "disc_layers": (1, 1e12),
    "flip_prob": (0, 1), "probe_images": (4, 1e12),
}
MAY_CHANGE = BOOKKEEPING | {"probe_images", "vgg_ckpt", "lpips_ckpt"}  # when a run is continued


# --------------------------------------------------------------------------------------------------
# The method
# --------------------------------------------------------------------------------------------------
class AlignHeads(nn.Module):
    """The two MLPs, from a place of the latent and from its mean, to the teacher's width K."""

    def __init__(self, latent_channels, z_dim, projector_dim):
        super().__init__()
        self.patch = projector(latent_channels, projector_dim, z_dim)
        self.cls = projector(latent_channels, projector_dim, z_dim)
        self.apply(init_linear)

    def forward(self, z, grid):
        """Latents z (B,C,h,w) to tokens (B,grid*grid,K) and a class token (B,K)."""
        places = F.adaptive_avg_pool2d(z, grid).flatten(2).mT  # (B,C,h,w) -> (B,C,g,g) -> (B,N,C)
        return self.patch(places), self.cls(z.mean(dim=(2, 3)))


class ReaLS(nn.Module):
    """The autoencoder and, with a teacher of width z_dim and grid x grid tokens, the two MLPs."""

    def __init__(self, sizes, z_dim=0, grid=0, projector_dim=0):
        super().__init__()
        self.vae = AutoencoderKL(**sizes)
        self.grid = grid
        if z_dim:
            self.align = AlignHeads(sizes["latent_channels"], z_dim, projector_dim)
        self.blocks = [self.vae.encoder, self.vae.decoder]  # what is compiled

    def latent_shape(self, resolution):
        """(C,h,w) of the latent of an image of `resolution` pixels."""
        size = resolution // self.vae.factor
        return self.vae.latent_channels, size, size

    def forward(self, x, noise):
        """x_hat, mean, std, z, patches, cls; all fp32. Without a teacher the last two are None.

        x (B,3,H,W) in [-1,1]; noise, mean, std, z (B,C,h,w); patches (B,N,K), cls (B,K).
        """
        mean, std = (moment.float() for moment in self.vae.encode(x))
        z = mean + std * noise
        x_hat = self.vae.decode(z).float()
        patches = cls = None
        if self.grid:
            patches, cls = self.align(z, self.grid)
        return x_hat, mean, std, z, patches, cls


def kl_loss(mean, std):
    """KL divergence (B,) of the posterior from the standard normal, summed over (C,h,w)."""
    return 0.5 * (mean.square() + std.square() - 1 - 2 * std.log()).sum(dim=(1, 2, 3))


def feature_distance(predicted, target):
    """d(predicted, target) (...) of features (...,K), and their cosine; 0.9 and 0.1 are [2nd]."""
    cosine = F.cosine_similarity(predicted, target, dim=-1)
    smooth = F.smooth_l1_loss(predicted, target, reduction="none").mean(dim=-1)
    return 0.9 * (1 - cosine) + 0.1 * smooth, cosine


def align_loss(patches, cls, z_patches, z_cls, cls_coeff=1.0):
    """A (B,), and the patches' mean cosine (B,).

    patches (B,N,K) and cls (B,K) are predicted, z_patches and z_cls the teacher's.
    """
    loss_patch, cosine = feature_distance(patches.float(), z_patches)
    loss_cls, _ = feature_distance(cls.float(), z_cls)
    return loss_patch.mean(dim=1) + cls_coeff * loss_cls, cosine.mean(dim=1)


def reals_loss(model, x, noise, z_cls, z_patches, lpips=None, disc=None, cls_coeff=1.0):
    """Reconstruction x_hat (B,3,H,W), and a dict of the loss's terms and two metrics, each (B,).

    x (B,3,H,W) in [-1,1]; noise (B,C,h,w) of the posterior; z_cls (B,K), z_patches (B,N,K), the
    teacher's features of x, or None. Terms of what is not given, networks or features, are zero.
    """
    x_hat, mean, std, z, patches, cls = model(x, noise)
    names = "mse", "lpips", "kl", "gan", "align", "align_cosine", "latent_std"
    terms = dict.fromkeys(names, x.new_zeros(len(x)))
    terms["mse"] = (x_hat - x).square().mean(dim=(1, 2, 3))
    terms["kl"] = kl_loss(mean, std)
    terms["latent_std"] = z.detach().std(dim=(0, 2, 3)).mean().expand(len(x))
    if lpips is not None:
        terms["lpips"] = lpips(x, x_hat)[:, 0, 0, 0]  # (B,1,1,1) -> (B,)
    if disc is not None:
        terms["gan"] = -disc(x_hat).mean(dim=(1, 2, 3))
    if patches is not None:
        align, cosine = align_loss(patches, cls, z_patches, z_cls, cls_coeff)
        terms |= dict(align=align, align_cosine=cosine)
    return x_hat, terms


def total_loss(cfg, terms):
    """L (B,): the weighted sum of the terms."""
    return (terms["mse"] + cfg.perceptual_coeff * terms["lpips"] + cfg.kl_coeff * terms["kl"]
            + cfg.disc_coeff * terms["gan"] + cfg.align_coeff * terms["align"])


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
def init_autoencoder(name, model):
    """Fill `model` from the SD-VAE (ft-ema, ft-mse) or a file; returns what stays fresh.

    The file is a checkpoint of a run, a vae.pt, or an SD-VAE in diffusers' or LDM's names. Only the
    MLPs may stay fresh, where it has none that fit.
    """
    if name in VAE_REPOS:
        weights = load_vae(name).state_dict()
    else:
        saved = load_checkpoint(name)
        weights = saved.get("ema", saved.get("vae", saved.get("state_dict", saved)))
    if not any(str(key).startswith("vae.") for key in weights):  # an autoencoder alone
        weights = {f"vae.{key}": w for key, w in rename_vae_weights(weights).items()}
    shapes = {key: w.shape for key, w in model.state_dict().items()}
    fits = {key: w.float() for key, w in weights.items()
            if key in shapes and getattr(w, "shape", None) == shapes[key]}
    misfits = (shapes.keys() | weights.keys()) - fits.keys()
    if wrong := sorted(key for key in misfits if key.startswith("vae.")):
        fail(f"{name} does not fit the autoencoder: {len(wrong)} names or shapes differ, first "
             f"{wrong[0]}; is --model right?")
    model.load_state_dict(fits, strict=False)
    return sorted({key.split(".")[0] for key in shapes if key not in fits})


def build(cfg, run):
    """The teacher (None without an alignment), the model, the discriminator, LPIPS (or None)."""
    sizes = MODELS[cfg.model]
    factor = 2 ** (len(sizes["widths"]) - 1)
    size = cfg.resolution // factor
    if cfg.resolution % factor:
        fail(f"{cfg.model} needs a --resolution that is a multiple of {factor}")
    smallest = 2 ** (cfg.disc_layers + 2)
    if cfg.disc_coeff and cfg.resolution < smallest:
        fail(f"a discriminator of {cfg.disc_layers} layers is for {smallest} px and more, not for "
             f"{cfg.resolution}: lower --disc-layers, or train without it: --disc-coeff 0")
    teacher = lpips = None
    heads = {}
    if cfg.align_coeff:
        resolution = cfg.resolution
        path = cfg.teacher_ckpt
        if cfg.enc_type == "prepared":  # by prepare.py, beside the data
            path = path or f"{cfg.data}/teacher.pt"
        else:  # DINOv2 takes any size: a larger image has as many patches of 14 px as asked for
            resolution = 16 * cfg.align_grid
        teacher = load_teacher(cfg.enc_type, resolution, path, not cfg.bench).to(run.device)
        heads = dict(z_dim=teacher.width, grid=teacher.grid, projector_dim=cfg.projector_dim)
        tokens = f"{teacher.grid}x{teacher.grid}"
        if size % teacher.grid:
            fail(f"the latent's {size}x{size} places cannot be averaged to the {tokens} of "
                 f"{cfg.enc_type}: choose another --align-grid, or for a prepared teacher: python "
                 f"prepare.py teacher --data {cfg.data} --patch-size {factor}")
        if cfg.compile:
            teacher.compile()
    torch.manual_seed(cfg.seed)  # the autoencoder's initial weights do not depend on the teacher
    model = ReaLS(sizes, **heads)
    torch.manual_seed(cfg.seed)
    disc = PatchDiscriminator(cfg.disc_dim, cfg.disc_layers)
    if cfg.perceptual_coeff:
        lpips = load_lpips(cfg.vgg_ckpt, cfg.lpips_ckpt, pretrained=not cfg.bench).to(run.device)
    return teacher, model.to(run.device), disc.to(run.device), lpips


def train(cfg, run):
    """Begin or continue the run in cfg.out."""
    data = open_data(cfg)
    data.names = ["images"]  # latents of another autoencoder may lie beside them
    teacher, model, disc, lpips = build(cfg, run)
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    parameters = list(model.parameters())
    parameters_d = list(disc.parameters())
    options = dict(lr=cfg.learning_rate, betas=(0.5, 0.9), weight_decay=0, fused=True)
    optimizer = torch.optim.AdamW(parameters, **options)
    optimizer_d = torch.optim.AdamW(parameters_d, **options)
    first_step = 0
    if not cfg.bench:  # speed does not depend on the weights
        first_step = restore(cfg, data.meta, model, ema, optimizer, init_autoencoder, MAY_CHANGE)
    if first_step > 0:
        checkpoint = load_checkpoint(Path(cfg.out) / "last.pt")
        disc.load_state_dict(checkpoint["disc"])
        optimizer_d.load_state_dict(checkpoint["optimizer_d"])
    if first_step >= cfg.max_train_steps:
        say(f"{cfg.out} is finished: {first_step} steps; raise --max-train-steps to train on, or "
            f"choose another --out")
        return
    latent_shape = model.latent_shape(cfg.resolution)
    x = torch.zeros(1, 3, cfg.resolution, cfg.resolution, device=run.device)
    flops_per_image = training_flops(model, x, torch.zeros(1, *latent_shape, device=run.device))
    announce(cfg, run, data, model, flops_per_image)
    say(f"an image becomes a latent {latent_shape}")
    log = Log(cfg, run, first_step, flops_per_image)
    stop = catch_stop(run)
    net = parallelise(model, cfg, run)
    net_d = parallelise(disc, cfg, run)  # BatchNorm's running means, kept per rank, are never used
    loader = micro_batches(data, cfg.seed, cfg.batch_size, run, first_step, cfg.workers)

    for step in range(first_step + 1, cfg.max_train_steps + 1):
        # Every draw of the step is made for the global batch; this rank holds its part of it.
        normal, uniform = step_draws(cfg.seed, step, cfg.batch_size, run)
        noise = normal(*latent_shape)
        is_mirrored = uniform(1, 1, 1) < cfg.flip_prob  # (B,1,1,1), beside images (B,H,W,3)
        has_gan = cfg.disc_coeff > 0 and step > cfg.disc_start

        sums = 0
        for i in range(run.accumulation):
            batch = next(loader)
            rows = slice(i * run.micro_batch, (i + 1) * run.micro_batch)
            images = torch.where(is_mirrored[rows], batch["images"].flip(2), batch["images"])
            x = images_to_input(images)
            is_last = i + 1 == run.accumulation
            with contextlib.ExitStack() as reduction:
                if run.world > 1 and not is_last:  # reduced once a step: with the last micro-batch
                    reduction.enter_context(net.no_sync())
                    reduction.enter_context(net_d.no_sync())
                # The autoencoder; the discriminator judges it and gets no gradient here.
                disc.requires_grad_(False)
                with run.autocast():
                    z_cls, z_patches = teacher(images) if teacher else (None, None)
                    x_hat, terms = reals_loss(
                        net, x, noise[rows], z_cls, z_patches, lpips, disc if has_gan else None,
                        cfg.cls_coeff)
                    loss = total_loss(cfg, terms).mean()
                (loss / run.accumulation).backward()
                disc.requires_grad_(True)
                # The discriminator, on the same reconstructions: both networks step together.
                loss_disc = torch.zeros_like(loss)
                if has_gan:
                    with run.autocast():
                        loss_disc = hinge_loss(net_d(x), net_d(x_hat.detach()))
                    (loss_disc / run.accumulation).backward()
            terms["psnr"] = 10 * torch.log10(4 / terms["mse"])  # dB; images span 2
            values = [loss, loss_disc, *(term.mean() for term in terms.values())]
            sums = sums + torch.stack(values).detach() / run.accumulation

        grad_norm, is_finite = optimizer_step(optimizer, parameters, cfg.max_grad_norm)
        if has_gan:
            _, is_finite_d = optimizer_step(optimizer_d, parameters_d, cfg.max_grad_norm)
            is_finite = is_finite & is_finite_d
        update_ema(ema, model, cfg.ema_decay)
        names = "loss", "loss_disc", *terms
        log.add(is_finite, **dict(zip(names, sums)), grad_norm=grad_norm)

        is_last_step = step == cfg.max_train_steps
        stopping = stop(step)
        if step % cfg.log_every == 0 or is_last_step:
            log.write(step)
        if run.rank == 0 and not cfg.bench:
            with log.pause():
                is_kept = cfg.keep_every and step % cfg.keep_every == 0
                is_shown = cfg.preview_every and step % cfg.preview_every == 0
                if is_kept or is_shown or is_last_step:
                    parts = measure(cfg, run, ema, teacher, lpips, step)
                if is_kept:
                    save_run(cfg, f"vae-{step}.pt", step, data.meta, **parts)
                if is_last_step:  # before last.pt: a finished run has both
                    save_run(cfg, "vae.pt", step, data.meta, **parts)
                if step % cfg.save_every == 0 or is_last_step or stopping:
                    save_run(cfg, "last.pt", step, data.meta, model=model, ema=ema,
                             optimizer=optimizer, disc=disc, optimizer_d=optimizer_d)
        if stopping:
            break
    loader.close()
    end_run(cfg, run, log, step, stopping)


# --------------------------------------------------------------------------------------------------
# Reconstructions of held-out images, and what is measured on them
# --------------------------------------------------------------------------------------------------
def pick_evenly(cfg, data, start=0, step=1):
    """Images and labels of --sample or --probe-images: spread evenly, so of all classes."""
    rows = np.arange(start, len(data), step)
    count = min(cfg.sample or cfg.probe_images, len(rows))
    rows = rows[np.linspace(0, len(rows) - 1, count).astype(int)]
    return [torch.from_numpy(data.array(name)[rows]) for name in ("images", "labels")]


def probe_sets(cfg):
    """Images, labels to train the probe on; images, labels held out: DATA/val, or every second."""
    data = open_data(cfg)
    if not Path(cfg.data, "val", "meta.json").is_file():
        return *pick_evenly(cfg, data, 0, 2), *pick_evenly(cfg, data, 1, 2)
    held_out = open_data(replace(cfg, data=f"{cfg.data}/val"))
    return *pick_evenly(cfg, data), *pick_evenly(cfg, held_out)


def encode(model, images, run):
    """mean and std, each (N,C,h,w), on the CPU, of the latents of images (N,R,R,3) uint8."""
    moments = []
    for batch in images.split(run.micro_batch):
        pair = model.vae.encode(images_to_input(batch.to(run.device)))
        moments.append(torch.stack(pair).cpu())  # (2,B,C,h,w)
    return torch.cat(moments, dim=1)


def rebuild(model, images):
    """Reconstructions (B,R,R,3) of images (B,R,R,3), both uint8, from the mean of the latent."""
    mean, _ = model.vae.encode(images_to_input(images))
    return pixels_to_uint8(model.vae.decode(mean))


def reconstruction_metrics(run, model, teacher, lpips, images):
    """PSNR, LPIPS and patches' cosine, averaged over images (N,R,R,3) rebuilt from the mean."""
    rows = []
    for batch in images.to(run.device).split(run.micro_batch):
        x = images_to_input(batch)
        z_cls, z_patches = teacher(batch) if teacher else (None, None)
        noise = torch.zeros(len(x), *model.latent_shape(x.shape[-1]), device=run.device)
        x_hat, terms = reals_loss(model, x, noise, z_cls, z_patches, lpips)
        mse = (x_hat.clamp(-1, 1) - x).square().mean(dim=(1, 2, 3))
        psnr = 10 * torch.log10(4 / mse)  # dB; images span 2
        rows.append(torch.stack([psnr, terms["lpips"], terms["align_cosine"]], dim=1))  # (B,3)
    return torch.cat(rows).mean(dim=0).tolist()


def draw_pairs(path, images, rebuilt):
    """A picture of images (N,R,R,3) uint8: a row of eight, below it their reconstructions, ..."""
    rows = []
    for pair in zip(images.split(8), rebuilt.split(8)):
        rows += pair
    save_picture(path, torch.cat(rows))


@torch.no_grad()
def measure(cfg, run, model, teacher, lpips, step):
    """Say and write metrics of the autoencoder, draw a picture; returns what vae.pt holds.

    The probe learns from probe_images training images; mean and std of a latent's channels are of
    as many sampled latents; the other metrics are of at most 512 held-out images.
    """
    images, labels, test_images, test_labels = probe_sets(cfg)
    mean, std = encode(model, images, run)
    test_mean, _ = encode(model, test_images, run)
    probe = ridge_probe(mean, labels, test_mean, test_labels)
    generator = torch.Generator().manual_seed(mix_seed(cfg.seed, step))
    z = mean + std * torch.randn(mean.shape, generator=generator)
    latent_std, latent_mean = torch.std_mean(z.double(), dim=(0, 2, 3))  # each (C,)

    test_images = test_images[::math.ceil(len(test_images) / 512)]
    psnr, distance, cosine = reconstruction_metrics(run, model, teacher, lpips, test_images)
    metrics = dict(step=step, psnr=psnr, probe=probe, latent_std=latent_std.mean().item())
    if lpips:
        metrics["lpips"] = distance
    if teacher:
        metrics["align_cosine"] = cosine
    text = ", ".join(f"{name} {value:.4g}" for name, value in metrics.items())
    say(f"held-out images: {text}")
    Path(cfg.out, f"figures-{step}.json").write_text(json.dumps(metrics) + "\n")
    pictured = test_images[:min(32, run.micro_batch)].to(run.device)
    draw_pairs(f"{cfg.out}/preview-{step}.png", pictured, rebuild(model, pictured))

    weights = b"".join(w.cpu().numpy().tobytes() for w in model.vae.state_dict().values())
    return dict(vae=model.vae, sizes=MODELS[cfg.model], id=f"reals-{zlib.crc32(weights):08x}",
                latent_mean=latent_mean.tolist(), latent_std=latent_std.tolist())


@torch.no_grad()
def generate(cfg, run):
    """Rebuild cfg.sample held-out images by the autoencoder in cfg.ckpt; the .npz file's path."""
    model = ReaLS(MODELS[cfg.model])
    init_autoencoder(cfg.ckpt, model)
    model.to(run.device).eval()
    _, _, images, labels = probe_sets(cfg)
    if len(labels) < cfg.sample:
        fail(f"--sample {cfg.sample}: {cfg.data} has {len(labels)} held-out images")

    def rebuilt_rows(rows, randn):
        rows = rows.cpu()
        return {"arr_0": rebuild(model, images[rows].to(run.device)), "labels": labels[rows]}

    path = Path(cfg.out) / "reconstructions.npz"
    sample_npz(path, rebuilt_rows, torch.arange(cfg.sample), cfg.seed, run.micro_batch, run)
    if run.rank == 0:
        rebuilt = torch.from_numpy(np.load(path)["arr_0"])
        picture = path.with_suffix(".png")
        draw_pairs(picture, images[:64], rebuilt[:64])
        mse = (images.float() - rebuilt.float()).square().mean(dim=(1, 2, 3))
        psnr = 10 * torch.log10(255**2 / mse).mean()
        say(f"wrote {path}: {cfg.sample} images, PSNR {psnr:.2f} dB; the first ones with their "
            f"originals in {picture}")
    return path


def report_toy(cfg, run):
    """Have 480 reconstructions judged, print the trade-off, say how others train on the latents."""
    path = generate(replace(cfg, sample=480, ckpt=f"{cfg.out}/vae.pt"), run)
    if run.rank == 0:
        run_tool("evaluate.py", path, cfg.data)
        print("   step   PSNR dB   probe   alignment cosine   latent std")
        files = Path(cfg.out).glob("figures-*.json")
        lines = [json.loads(file.read_text()) for file in files]
        for line in sorted(lines, key=lambda line: line["step"]):
            cosine = line.get("align_cosine", 0)
            print(f"{line['step']:7d}{line['psnr']:10.2f}{line['probe']:8.1%}{cosine:19.3f}"
                  f"{line['latent_std']:13.3f}")
        print(f"look at {path.with_suffix('.png')}; to train any script on these latents:\n"
              f"  python prepare.py --from {cfg.data} --vae {cfg.out}/vae.pt --out data/toy-reals\n"
              f"  python repa.py --model toy/2 --proj-coeff 0 --data data/toy-reals "
              f"--out runs/repa-toy-reals")


def main(argv=None):
    """Train or rebuild, as the command line says; the toy does both and has the result judged."""
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

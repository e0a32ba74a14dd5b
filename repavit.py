"""RePaViT: structural reparameterisation of vision transformers (Xu et al., ICML 2025, arXiv 2505.21847).

"RePa" is re-PArameterisation here, NOT representation alignment: no teacher, no features, a classifier that gets
cheaper after training. It stands here because its name is mistaken for REPA's, and because its idea also makes a
trained diffusion transformer cheaper (IdleSiTBlock: ours, exact, trained by nobody yet).

In every feed-forward layer only the first k of the H hidden channels pass the GELU; the others are idle, hence linear.
BatchNorms stand before both matrices, and after training they are constants. So norms, idle channels and the layer's
shortcut fold into one D x D matrix, and the function stays the same up to rounding:

    training   h + W2 BN2([gelu(u_1..u_k), u_k+1..u_H]) + b2,  u = W1 BN1(h) + b1         L = -sum_c target_c log p_c
    folded     W_A h + b_A + W_3 gelu(W_1 h + b_1)             W_A = W2' [idle columns] W1' [idle rows] + I

    python repavit.py                       the toy, on any machine: data, training, folding, speed table; 2 minutes
    torchrun --nproc_per_node=8 repavit.py --model RePaViT_Base     the paper's recipe; data/imagenet holds
                                            train/CLASS/* and val/CLASS/*. Several nodes as with repa.py
    python repavit.py --model RePaViT_Base --eval --reparam runs/repavit-RePaViT_Base/last.pt     writes last-folded.pt
    python repavit.py --model RePaViT_Tiny --idle-ratio 0.5 --reparam FILE     also of an official checkpoint or weights
    python repavit.py --sample 480 --ckpt runs/repavit-toy/last-folded.pt         val images by predicted class

Published, in the paper's Tables 1 and 4: ImageNet-1k, 224 px, 300 epochs from scratch; images/s on an A6000, batch 128;
vanilla -> folded, in brackets unfolded, which is SLOWER than vanilla: all gain comes from folding, and folding changes
no digit of the accuracy. Smaller models lose more (idle .75 and 1: Tiny 64.2 and 48.6, Small 77.0 and 63.9, Base 81.3
and 73.7 %); the vanilla Large and Huge are plain ViTs of this short recipe, a weak baseline.
    Tiny    idle .50     5.7 ->   4.4 M      1.1 ->  0.8 GMAC    3435.1 -> 4001.2 images/s (2397.9)    72.1 -> 69.4 %
    Small   idle .50    22.1 ->  16.7 M      4.3 ->  3.2 GMAC    1410.3 -> 1734.7 images/s (1000.9)    79.8 -> 78.9 %
    Base    idle .75    86.6 ->  51.1 M     16.9 ->  9.9 GMAC     418.5 ->  660.3 images/s  (336.6)    81.8 -> 81.3 %
    Large   idle .75   304.3 -> 178.4 M     59.7 -> 34.9 GMAC     124.2 ->  207.2 images/s  (102.7)    80.3 -> 82.0 %
    Huge    idle .75   632.2 -> 369.9 M    124.3 -> 72.6 GMAC      61.5 ->  103.8 images/s   (53.0)    80.3 -> 81.4 %
The paper contradicts itself: Base has 9.9 GMAC in Tables 1 and 4, 10.6 in Table 2 (we count 9.9; products inside the
attention are left out). Run by us: the toy and the checks in README.md, not ImageNet.

What differs from the official code, on purpose: it trains (an import is missing there); bf16, not fp16 with a scaler;
repeated augmentation on one GPU, too; a resumed run goes on with the same images and draws; channels are chosen by
slices, not masks; the fold is in float64, and refused where there is nothing to fold. Kept: mixup and BatchNorm act in
each micro-batch of a rank (rank 0's statistics are kept), so two ranks are not one; --sync-bn is ours. The EMA is
saved, the raw weights are evaluated. Swin, MLP-Mixer and PoolFormer are left out: the same layer in other networks.
"""
import argparse
import copy
import functools
import inspect
import itertools
import json
import math
import os
import random
import re
import time
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

from common import (Attention, Log, Mlp, PreparedData, SiTBlock, SyntheticData, _outlive_signals, catch_stop,
                    clear_errors, end_run, fail, first_rank_first, flop_counter, init_linear, load_checkpoint,
                    make_folder, mix_seed, process_group_backend, run_tool, save_checkpoint, save_picture, say,
                    step_draws)


@dataclass
class Config:
    """One field is one flag. The values here are the paper's for RePaViT_Base; RECIPES holds what others change."""
    model: str = "toy"                                    # toy, or RePaViT_{Tiny,Small,Base,Large,Huge}: the recipe
    data: str = "data/imagenet"                           # holds train/CLASS/* and val/CLASS/*; or made by prepare.py
    out: str = "runs/repavit-{model}"                     # config.json, log.jsonl, last.pt, predictions.png
    resolution: int = 224                                 # pixels; up to 32, crops are shifts by at most 4 pixels
    batch_size: int = 4096                                # images per step, over all GPUs
    micro_batch: int = 0                                  # images per GPU at once; 0 = batch size / GPUs
    max_train_steps: int = 93_600                         # 300 epochs of ImageNet; where the cosine ends
    learning_rate: float = 4e-3                           # LAMB, the highest; the paper: 1e-3 for Large and Huge
    max_grad_norm: float = 1.0                            # gradients are clipped to this norm
    ema_decay: float = 0.99996                            # of the averaged weights
    precision: Literal["auto", "bf16", "fp32"] = "auto"   # auto = bf16 on CUDA, fp32 elsewhere
    compile: bool = None                                  # torch.compile each block; default: on CUDA
    seed: int = 0                                         # of the weights, the order of images and every draw
    workers: int = 10                                     # data processes per GPU
    log_every: int = 100                                  # steps
    save_every: int = 1000                                # steps between writes of last.pt
    init: str = ""                                        # start from the weights of this checkpoint
    ckpt: str = ""                                        # checkpoint to classify with
    sample: int = 0                                       # draw this many val images by predicted class, no training
    bench: int = 0                                        # train this many steps on synthetic data, write nothing
    idle_ratio: float = 0.75                              # share of idle channels; the paper: 0.5 for Tiny and Small
    feature_norm: Literal["BatchNorm", "LayerNorm"] = "BatchNorm"  # of FFNs; LayerNorm, --idle-ratio 0 = vanilla ViT
    drop_path: float = 0.1                                # share of branches dropped in the last block; Large, Huge 0.3
    min_learning_rate: float = 5e-5                       # the end of the cosine; official README: 4e-5 for Base
    warmup_steps: int = 6240                              # 20 epochs, linear from 1e-6
    weight_decay: float = 0.05                            # of matrices; vectors have none
    augment: Literal["deit", "flip"] = "deit"             # DeiT's recipe with mixup; or random crops and flips only
    sync_bn: bool = False                                 # BatchNorm over all ranks (ours; CUDA only)
    eval_every: int = 3120                                # steps between accuracies on val; 0 = never
    reparam: str = ""                                     # fold this checkpoint and measure it, no training
    eval: bool = False                                    # with --reparam: accuracy on val before and after


MODELS = {"toy": dict(width=64, depth=4, num_heads=4, patch_size=4)} | {
    f"RePaViT_{name}": dict(width=width, depth=depth, num_heads=heads, patch_size=16) for name, width, depth, heads in [
        ("Tiny", 192, 12, 3), ("Small", 384, 12, 6), ("Base", 768, 12, 12), ("Large", 1024, 24, 16),
        ("Huge", 1280, 32, 16)]}
RECIPES = {  # by the beginning of the model's name
    "toy": dict(data="data/toy", resolution=16, batch_size=64, max_train_steps=1000, learning_rate=2e-2, ema_decay=0.99,
                workers=1, log_every=50, save_every=500, drop_path=0.0, min_learning_rate=1e-4, warmup_steps=50,
                augment="flip", eval_every=500),
    "RePaViT_Tiny": dict(idle_ratio=0.5),
    "RePaViT_Small": dict(idle_ratio=0.5),
    "RePaViT_Large": dict(learning_rate=1e-3, drop_path=0.3),
    "RePaViT_Huge": dict(learning_rate=1e-3, drop_path=0.3),
}
# What may change between a run and its continuation: how it is carried out, not what it computes.
BOOKKEEPING = "data out compile workers log_every save_every ckpt sample bench eval_every reparam eval".split()
RANGES = [("resolution batch_size max_train_steps log_every save_every", 1, 1e12),
          ("micro_batch learning_rate min_learning_rate warmup_steps weight_decay seed workers eval_every sample bench",
           0, 1e12),
          ("ema_decay idle_ratio", 0, 1), ("drop_path", 0, 0.99), ("max_grad_norm", 1e-12, 1e12)]
WARMUP_FROM = 1e-6                                            # the learning rate of the first step
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)      # of ImageNet's channels
DEIT = dict(auto_augment="rand-m9-mstd0.5-inc1", re_prob=0.25, re_mode="pixel")  # with mixup .8, cutmix 1, smoothing .1


# ---------------------------------------------------------------------------------------------------------------------
# The method. Norms and shortcuts stand inside `attn` and `mlp`: the names are those of the official checkpoints.
# ---------------------------------------------------------------------------------------------------------------------
def gelu_of_first(u, k, approximate="none"):
    """GELU on the first k channels of u (...,H); the others are idle."""
    if k == u.shape[-1]:
        return F.gelu(u, approximate=approximate)
    return torch.cat([F.gelu(u[..., :k], approximate=approximate), u[..., k:]], dim=-1)


class IdleFFN(nn.Module):
    """Feed-forward layer as it is trained, with norms and shortcut."""

    def __init__(self, width, hidden_dim, idle_ratio, feature_norm="BatchNorm"):
        super().__init__()
        self.k = math.ceil(hidden_dim * (1 - idle_ratio))  # this very expression belongs to official checkpoints
        self.fc1 = nn.Linear(width, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, width)
        self.norm = nn.LayerNorm(width) if feature_norm == "LayerNorm" else None
        if feature_norm == "BatchNorm":
            self.norm1 = nn.BatchNorm1d(width)
            self.norm2 = nn.BatchNorm1d(hidden_dim)

    def forward(self, h, scale=None):
        """Tokens (B,N,D); scale (B,1,1) multiplies the branch, where branches are dropped."""
        if self.norm is not None:
            branch = self.fc2(gelu_of_first(self.fc1(self.norm(h)), self.k))
        else:
            u = self.fc1(self.norm1(h.flatten(0, 1)))  # (B*N,D): a channel's statistics over all images and positions
            branch = self.fc2(self.norm2(gelu_of_first(u, self.k))).view_as(h)
        return h + (branch if scale is None else scale * branch)

    def fold(self):
        """The FoldedFFN that computes the same in eval mode."""
        if self.norm is not None:
            fail("LayerNorm has statistics of each token and cannot be folded: train with --feature-norm BatchNorm")
        return fold_ffn(*fold_norm(self.norm1, self.fc1), *fold_norm(self.norm2, self.fc2), self.k, has_shortcut=True)


def fold_norm(norm, linear):
    """Weight and bias, float64, of linear(norm(x)), for a BatchNorm with stored statistics."""
    weight, bias = linear.weight.double(), linear.bias.double()
    scale = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
    return weight * scale, bias + weight @ (norm.bias.double() - norm.running_mean.double() * scale)


def fold_ffn(w1, b1, w2, b2, k, has_shortcut, approximate="none"):
    """FoldedFFN of w2 [gelu(u_1..u_k), u_k+1..u_H] + b2, u = w1 h + b1, plus h itself if there is a shortcut."""
    w_a, b_a = w2[:, k:] @ w1[k:], w2[:, k:] @ b1[k:] + b2  # (D,H-k) (H-k,D) -> (D,D)
    folded = FoldedFFN(len(w_a), k, approximate)
    active = {"fc2.weight": w1[:k], "fc2.bias": b1[:k], "fc3.weight": w2[:, :k]} if k else {}
    identity = torch.eye(len(w_a), dtype=w_a.dtype)
    folded.load_state_dict({"fc1.weight": w_a + has_shortcut * identity, "fc1.bias": b_a} | active)
    return folded


class FoldedFFN(nn.Module):
    """W_A h + b_A + W_3 gelu(W_1 h + b_1). The official names: fc1 is A, fc2 is 1, fc3 is 3."""

    def __init__(self, width, k, approximate="none"):
        super().__init__()
        self.k, self.approximate = k, approximate
        self.fc1 = nn.Linear(width, width)
        if k:  # with all channels idle, the layer is one matrix
            self.fc2 = nn.Linear(width, k)
            self.fc3 = nn.Linear(k, width, bias=False)

    def forward(self, h, scale=None):
        idle = self.fc1(h)
        return idle + self.fc3(F.gelu(self.fc2(h), approximate=self.approximate)) if self.k else idle


class NormedAttention(Attention):
    """Self-attention with its LayerNorm and shortcut; folding leaves it alone."""

    def __init__(self, width, num_heads):
        super().__init__(width, num_heads)
        self.norm = nn.LayerNorm(width)

    def forward(self, h, scale=None):
        branch = self.attend(*self.split(self.norm(h)))
        return h + (branch if scale is None else scale * branch)


class Block(nn.Module):
    """Attention, then the FFN; scales (B,2) multiply their branches, or None."""

    def __init__(self, width, num_heads, idle_ratio, feature_norm):
        super().__init__()
        self.attn = NormedAttention(width, num_heads)
        self.mlp = IdleFFN(width, 4 * width, idle_ratio, feature_norm)

    def forward(self, h, scales=None):
        of_attn, of_mlp = (None, None) if scales is None else scales[:, :, None, None].unbind(1)  # each (B,1,1)
        return self.mlp(self.attn(h, of_attn), of_mlp)


class RePaViT(nn.Module):
    """ViT classifier by its class token: a DeiT with a norm before the blocks, hence a patch embedding without bias."""

    def __init__(self, resolution, num_classes, sizes, idle_ratio, feature_norm="BatchNorm", drop_path=0.0):
        super().__init__()
        width, depth, patch = sizes["width"], sizes["depth"], sizes["patch_size"]
        if resolution % patch:
            fail(f"--resolution {resolution} is no multiple of the patch size {patch}")
        self.resolution = resolution
        self.patch_embed = nn.Sequential(OrderedDict(proj=nn.Conv2d(3, width, patch, stride=patch, bias=False)))
        self.cls_token = nn.Parameter(1e-6 * torch.randn(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, (resolution // patch) ** 2 + 1, width))
        self.norm_pre = nn.LayerNorm(width, eps=1e-6)
        self.blocks = nn.ModuleList([Block(width, sizes["num_heads"], idle_ratio, feature_norm) for _ in range(depth)])
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.head = nn.Linear(width, num_classes)
        self.register_buffer("drop_rates", torch.linspace(0, drop_path, depth)[:, None], persistent=False)  # (depth,1)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def no_weight_decay(self):  # timm asks; beside these, vectors have none
        return {"pos_embed", "cls_token"}

    def forward(self, images, keep=None):
        """Logits of normalised images (B,3,H,W). keep (B,depth,2): 1 where a branch is kept, 0 where it is dropped."""
        h = self.patch_embed(images).flatten(2).transpose(1, 2)  # (B,D,h,w) -> (B,N,D)
        h = self.norm_pre(torch.cat([self.cls_token.expand(len(h), -1, -1), h], dim=1) + self.pos_embed)
        scales = [None] * len(self.blocks) if keep is None else (keep / (1 - self.drop_rates)).unbind(1)
        for block, scale in zip(self.blocks, scales):
            h = block(h, scale)
        return self.head(self.norm(h[:, 0]))


def repavit_loss(model, images, targets, keep):
    """Cross-entropy (B,) with soft targets (B,classes): images and targets are mixed and smoothed already."""
    return F.cross_entropy(model(images, keep).float(), targets, reduction="none")


@torch.no_grad()
def fold(model):
    """A copy of a trained RePaViT or SiT, on the CPU, in eval mode, all FFNs folded. An EMA is averaged first."""
    model = copy.deepcopy(model).cpu().eval()
    for block in model.blocks:
        block.mlp = block.mlp.fold()
    return model


class IdleMlp(Mlp):
    """SiT's Mlp with idle channels. Ours, not the paper's."""

    def __init__(self, dim, hidden_dim, idle_ratio):
        super().__init__(dim, hidden_dim)
        self.k = math.ceil(hidden_dim * (1 - idle_ratio))

    def forward(self, h):
        return self.fc2(gelu_of_first(self.fc1(h), self.k, "tanh"))

    def fold(self):
        weights = [p.double() for p in self.parameters()]  # fc1's and fc2's weight and bias
        return fold_ffn(*weights, self.k, has_shortcut=False, approximate="tanh")  # the shortcut is outside the gate


class IdleSiTBlock(SiTBlock):
    """SiT block with an IdleMlp, for SiT.blocks; fold(sit) makes it cheaper. Ours, and trained by nobody yet.

    LayerNorm, modulation and gate belong to a token or a sample and stay, as does the shortcut; the linear path between
    them folds without any BatchNorm. It is another function than SiT's, so it must be trained so.
    """

    def __init__(self, hidden_size, num_heads, idle_ratio=0.75):
        super().__init__(hidden_size, num_heads)
        self.mlp = IdleMlp(hidden_size, 4 * hidden_size, idle_ratio)
        self.apply(init_linear)
        nn.init.zeros_(self.adaLN_modulation[1].weight)


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
class Images(torch.utils.data.Dataset):
    """Part train or val of cfg.data: an image folder, or prepared data. data[i, seed]: image (3,H,W) and label."""

    def __init__(self, cfg, part):
        from timm.data import create_transform
        from torchvision.datasets import ImageFolder
        from torchvision.transforms import RandomCrop, Resize
        folder, is_training, is_small = Path(cfg.data, part), part == "train", cfg.resolution <= 32
        if cfg.bench or Path(cfg.data, "meta.json").is_file():
            self.source = (SyntheticData(cfg.resolution, is_latent=False) if cfg.bench else
                           PreparedData(cfg.data if is_training else folder, cfg.resolution))
            self.meta = self.source.meta
        elif any(folder.glob("*/*")):
            self.source = ImageFolder(folder)
            self.meta = dict(source=Path(cfg.data).name, count=len(self.source), class_names=self.source.classes,
                             num_classes=len(self.source.classes))
        else:
            fail(f"no images in {folder}: --data must hold train/CLASS/* and val/CLASS/*, or be made by prepare.py")
        self.transform = create_transform(
            cfg.resolution, is_training, color_jitter=None, interpolation="bicubic", mean=MEAN, std=STD,
            crop_pct=1.0 if is_small else 0.875, **DEIT if is_training and cfg.augment == "deit" else {})
        if is_training and is_small:
            self.transform.transforms[:1] = [Resize(cfg.resolution), RandomCrop(cfg.resolution, padding=4)]

    def __len__(self):
        return len(self.source)

    def __getitem__(self, place):
        from torchvision.transforms.functional import to_pil_image
        index, seed = place
        random.seed(seed)  # what an image draws does not depend on the process that reads it
        np.random.seed(seed % 2**32)
        torch.default_generator.manual_seed(seed)  # torch.manual_seed asks CUDA, too, and is slow
        if isinstance(self.source, PreparedData):
            row = self.source[np.array([index])]
            return self.transform(to_pil_image(row["images"][0].numpy())), int(row["labels"])
        try:
            image, label = self.source[index]
        except OSError as error:
            raise OSError(f"cannot read {self.source.samples[index][0]} ({error})") from None
        return self.transform(image), label


def micro_batches(data, cfg, run, first_step):
    """This rank's micro-batches, images (B,3,H,W) and labels (B,), from step `first_step` on, without end."""
    from timm.data.distributed_sampler import RepeatAugSampler

    @functools.lru_cache(2)  # a batch touches two epochs, or the set is tiny
    def order(epoch):
        repeats = 3 if cfg.augment == "deit" else 1  # an epoch is a third of the images, each three times in a row
        sampler = RepeatAugSampler(data, 1, 0, num_repeats=repeats, selected_round=0)
        sampler.set_epoch(mix_seed(cfg.seed, epoch, 0, 0))
        return list(sampler)

    def places():
        for start in itertools.count(first_step * cfg.batch_size, cfg.batch_size):
            mine = [(order(i // len(data))[i % len(data)], mix_seed(cfg.seed, i // len(data), i % len(data)))
                    for i in range(start + run.rank, start + cfg.batch_size, run.world)]
            yield from (mine[i:i + run.micro_batch] for i in range(0, len(mine), run.micro_batch))

    for batch in torch.utils.data.DataLoader(data, batch_sampler=places(), num_workers=cfg.workers,
                                             worker_init_fn=_outlive_signals, pin_memory=run.device.type == "cuda"):
        yield [tensor.to(run.device, non_blocking=True) for tensor in batch]


def read_weights(path):
    """(state dict, the settings it was trained with) of a checkpoint: ours, an official one, or a bare state dict."""
    with torch.serialization.safe_globals([argparse.Namespace]):  # official files hold their command line, too
        checkpoint = load_checkpoint(path)
    weights = checkpoint.get("model", checkpoint)
    if not {"cls_token", "norm_pre.weight", "patch_embed.proj.weight"} <= weights.keys():
        fail(f"{path} holds no RePaViT weights (cls_token and norm_pre.weight must be in it)")
    return weights, checkpoint.get("config", vars(checkpoint.get("args", argparse.Namespace())))


def init_from(path, model):
    """Give `model` the weights of a checkpoint, all of them; returns what is left fresh: nothing."""
    found, shapes = ({key: value.shape for key, value in state.items()}
                     for state in (read_weights(path)[0], model.state_dict()))
    if wrong := sorted(key for key in shapes | found if shapes.get(key) != found.get(key)):
        fail(f"{path} does not fit this model: {wrong[0]} is missing, too much or of another shape")
    model.load_state_dict(read_weights(path)[0])
    return []


def load_model(cfg, path):
    """The model of a checkpoint, folded or not, on the CPU, in eval mode; its sizes are read off the weights."""
    weights, settings = read_weights(path)
    (width, _, patch, _), tokens = weights["patch_embed.proj.weight"].shape, weights["pos_embed"].shape[1]
    sizes = dict(width=width, depth=len({key.split(".")[1] for key in weights if key.startswith("blocks.")}),
                 patch_size=patch)
    names = [name for name in MODELS if sizes.items() <= MODELS[name].items()]
    if cfg.model not in names:
        fail(f"{path} has {sizes}: " + (f"add --model {names[0]}" if names else "no model of this script"))
    norms = [norm for norm, key in (("LayerNorm", "norm"), ("BatchNorm", "norm1"))
             if f"blocks.0.mlp.{key}.weight" in weights]
    if settings.get("heuristic", "static") == "linear":
        fail(f"{path} was trained with --heuristic linear, an idle ratio for each depth: that is not supported here")
    idle_ratio = settings.get("idle_ratio", cfg.idle_ratio) * settings.get("channel_idle", True)  # the official switch
    model = RePaViT(patch * math.isqrt(tokens - 1), len(weights["head.bias"]), MODELS[cfg.model], idle_ratio, *norms)
    for block in model.blocks if not norms else ():
        block.mlp = FoldedFFN(width, len(weights.get("blocks.0.mlp.fc2.bias", ())))
    init_from(path, model)
    return model.eval()


def build(cfg, data, run):
    """The model on this rank's device, and its optimiser: timm's LAMB."""
    from timm.optim import create_optimizer_v2
    if cfg.sync_bn and run.device.type != "cuda":
        fail("--sync-bn needs GPUs: PyTorch has no synchronised BatchNorm for CPUs")
    if run.micro_batch % 2:
        fail(f"mixup pairs the images of a micro-batch, here {run.micro_batch}: take an even --micro-batch")
    torch.manual_seed(cfg.seed)
    model = RePaViT(cfg.resolution, data.meta["num_classes"], MODELS[cfg.model], cfg.idle_ratio, cfg.feature_norm,
                    cfg.drop_path)
    model = (nn.SyncBatchNorm.convert_sync_batchnorm(model) if cfg.sync_bn else model).to(run.device)
    # Vectors, positions and class token have no decay and no layer-wise rate; optimizer_step clips.
    optimizer = create_optimizer_v2(model, "lamb", cfg.learning_rate, cfg.weight_decay, eps=1e-8, max_grad_norm=None)
    # LAMB does not know found_inf: without gradients it updates nothing. To ask waits for the device, once a step.
    optimizer.register_step_pre_hook(lambda optimizer, *_: optimizer.zero_grad() if optimizer.found_inf else None)
    return model, optimizer


def learning_rate(cfg, step):
    """Of step 1, 2, ...: the warm-up's line, then a cosine that began at step 1, too, as timm's schedule by updates."""
    if step <= cfg.warmup_steps:
        return WARMUP_FROM + (step - 1) / cfg.warmup_steps * (cfg.learning_rate - WARMUP_FROM)
    falling = 0.5 + 0.5 * math.cos(math.pi * (step - 1) / cfg.max_train_steps)
    return cfg.min_learning_rate + falling * (cfg.learning_rate - cfg.min_learning_rate)


def train(cfg, run):
    """Begin or continue the run in cfg.out."""
    from timm.data import Mixup
    data, val = Images(cfg, "train"), Images(cfg, "val")
    if data.meta["class_names"] != val.meta["class_names"]:
        fail(f"{cfg.data}: train and val have different classes")
    model, optimizer = build(cfg, data, run)
    ema, parameters = copy.deepcopy(model).eval().requires_grad_(False), list(model.parameters())
    first_step = restore(cfg, data.meta, model, ema, optimizer)
    if first_step >= cfg.max_train_steps:
        return say(f"{cfg.out} is finished: {first_step} steps; --out begins another run")
    log, stop = Log(cfg, run, first_step, describe(cfg, run, data, ema)), catch_stop(run)
    net, loader = parallelise(model, cfg, run), micro_batches(data, cfg, run, first_step)
    mixup = Mixup(0.8, 1.0, prob=float(cfg.augment == "deit"), num_classes=data.meta["num_classes"])  # smoothing is 0.1

    for step in range(first_step + 1, cfg.max_train_steps + 1):
        _, uniform = step_draws(cfg.seed, step, cfg.batch_size, run)
        keep = (uniform(len(model.blocks), 2) >= model.drop_rates).float()  # (B,depth,2) of this rank
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(cfg, step)
        total = torch.zeros((), device=run.device)
        for i in range(run.accumulation):
            images, labels = next(loader)
            np.random.seed(mix_seed(cfg.seed, step, run.rank, i) % 2**32)  # mixup draws from numpy
            images, targets = mixup(images, labels)
            is_last = i + 1 == run.accumulation
            with nullcontext() if is_last or run.world == 1 else net.no_sync():  # gradients are reduced once a step
                with run.autocast():
                    rows = slice(i * run.micro_batch, (i + 1) * run.micro_batch)
                    loss = repavit_loss(net, images, targets, keep[rows]).mean()
                (loss / run.accumulation).backward()
            total += loss.detach() / run.accumulation
        grad_norm, finite = optimizer_step(optimizer, parameters, cfg.max_grad_norm)
        update_ema(ema, model, cfg.ema_decay)
        for average, now in zip(ema.buffers(), model.buffers()):  # BatchNorm's statistics, but not its count
            average.lerp_(now, 1 - cfg.ema_decay) if now.is_floating_point() else average.copy_(now)
        log.add(finite, loss=total, grad_norm=grad_norm)

        last, stopping = step == cfg.max_train_steps, stop(step)
        if step % cfg.log_every == 0 or last:
            log.write(step)
        with log.pause():
            if cfg.eval_every and (step % cfg.eval_every == 0 or last) and not cfg.bench:
                with run.autocast():
                    (top1,), _, _ = evaluate(cfg, run, [model.eval()], val)
                model.train()
                say(f"step {step}: {top1:.2%} of {len(val)} val images right")
            if run.rank == 0 and not cfg.bench and (step % cfg.save_every == 0 or last or stopping):
                save_run(cfg, "last.pt", step, data.meta, model=model, ema=ema, optimizer=optimizer)
        if stopping:
            break
    loader.close()
    end_run(cfg, run, log, step, stopping)


def describe(cfg, run, data, model):
    """Say what is about to run, and write config.json; returns the model FLOPs of training on one image."""
    flops = 3 * 2 * multiply_adds(model)  # the backward pass costs two forward passes
    count, images = sum(p.numel() for p in model.parameters()), cfg.max_train_steps * cfg.batch_size
    say(f"{cfg.model}: {count / 1e6:,.2f} M parameters, a checkpoint of {16e-9 * count:,.2f} GB, {flops / 1e9:,.2f} "
        f"GFLOP per training image, {cfg.precision}{', compiled' if cfg.compile else ''}")
    say(f"{cfg.data}: {len(data):,} images at {cfg.resolution} px, {data.meta['num_classes']} classes; "
        f"{cfg.max_train_steps:,} steps, {len(data) / cfg.batch_size:,.1f} an epoch: {images / len(data):,.1f} epochs")
    say(f"{cfg.batch_size} images a step = {run.world} x {run.device.type} x {run.accumulation} micro-batches of "
        f"{run.micro_batch}, each with its own BatchNorm statistics; results in {cfg.out}")
    if run.rank == 0 and not cfg.bench:
        make_folder(cfg.out)
        (Path(cfg.out) / "config.json").write_text(json.dumps(asdict(cfg), indent=1) + "\n")
    return flops


@torch.no_grad()
def evaluate(cfg, run, models, data):
    """Top-1 of each model (in eval mode); the largest difference between their logits; how many predictions differ."""
    for buffer in [buffer for model in models for buffer in model.buffers()] if run.world > 1 else ():
        dist.broadcast(buffer, 0)  # judged are the statistics that rank 0 saves
    mine = [(i, 0) for i in range(run.rank, len(data), run.world)]
    counts, largest = torch.zeros(len(models) + 1, device=run.device), torch.zeros((), device=run.device)
    for images, labels in torch.utils.data.DataLoader(data, cfg.micro_batch or 128, sampler=mine,
                                                      num_workers=cfg.workers, worker_init_fn=_outlive_signals):
        logits = torch.stack([model(images.to(run.device)).float() for model in models])  # (models,B,classes)
        predicted = logits.argmax(dim=-1)
        right = (predicted == labels.to(run.device)).sum(dim=1)
        counts += torch.cat([right, (predicted != predicted[0]).any(dim=0).sum()[None]])
        largest = torch.maximum(largest, (logits - logits[0]).abs().max())
    if run.world > 1:
        dist.all_reduce(counts)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    *right, differ = counts.tolist()
    return [count / len(data) for count in right], largest.item(), int(differ)


@torch.no_grad()
def multiply_adds(model):
    """Of the matrices and the patch embedding on one image; like the paper's, without the products inside attention."""
    with flop_counter() as counter:
        model(torch.zeros(1, 3, model.resolution, model.resolution, device=model.cls_token.device))
    counts, aten = counter.get_flop_counts()["Global"], torch.ops.aten
    return sum(counts.get(op, 0) for op in (aten.mm, aten.addmm, aten.convolution)) // 2


@torch.no_grad()
def images_per_second(models, images, autocast, seconds=15):
    """Median speed of each model. They take turns, so that whatever else the machine does slows down all of them."""
    times, end = [[] for _ in models], time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[0]) < 6:
        for model, its in zip(models, times):
            start = time.perf_counter()
            with autocast():
                model(images).sum().item()  # waits for the device
            its.append(time.perf_counter() - start)
    return [len(images) / float(np.median(its[1:])) for its in times]  # the first is the warm-up


def reparam(cfg, run):
    """Fold cfg.reparam, check the logits, write the folded model beside it, and print what it saves."""
    model, torch_precision = load_model(cfg, cfg.reparam), torch.get_float32_matmul_precision()
    first, classes = model.blocks[0].mlp, len(model.head.bias)
    if isinstance(first, FoldedFFN):
        fail(f"{cfg.reparam} is folded already")
    if first.norm is None and first.k == first.fc1.out_features:
        fail(f"{cfg.reparam} has no idle channels: there is nothing to fold")
    folded, vanilla = fold(model), RePaViT(model.resolution, classes, MODELS[cfg.model], 0, "LayerNorm").eval()
    forms = [form.to(run.device) for form in (vanilla, model, folded)]
    size = cfg.micro_batch or (128 if run.device.type == "cuda" else max(1, 2048 // model.pos_embed.shape[1]))
    images = torch.randn(size, 3, model.resolution, model.resolution, generator=torch.Generator().manual_seed(0))
    images = images.to(run.device)
    torch.set_float32_matmul_precision("highest")  # TF32 would round more than the fold
    with torch.no_grad():
        before, after = (form(images) for form in forms[1:])
    scale, largest = before.abs().max().item(), (after - before).abs().max().item()
    on, top1 = "random images", [None, None]
    if cfg.eval:
        val = Images(replace(cfg, resolution=model.resolution), "val")
        if val.meta["num_classes"] != classes:
            fail(f"{cfg.data} has {val.meta['num_classes']} classes, {cfg.reparam} {classes}: choose another --data")
        top1, largest, differ = evaluate(cfg, run, forms[1:], val)
        on = f"{len(val)} val images, of which {differ} are classified otherwise"
    if not largest <= 1e-3 * max(1, scale):
        fail(f"folding changed a logit by {largest:.2g}: a BatchNorm of {cfg.reparam} has hardly any variance; nothing "
             f"was written")
    torch.set_float32_matmul_precision(torch_precision)
    speeds, idle_ratio = images_per_second(forms, images, run.autocast), 1 - first.k / first.fc1.out_features
    path = Path(cfg.reparam).with_name(f"{Path(cfg.reparam).stem}-folded.pt")
    if run.rank == 0:
        save_checkpoint(path, dict(model=folded.state_dict(), config=dict(model=cfg.model, idle_ratio=idle_ratio)))
    say(f"{cfg.model}, {idle_ratio:.2f} of the channels idle; {size} images of {model.resolution} px at once, "
        f"{run.device.type}, {cfg.precision}; the vanilla ViT has random weights\n"
        f"            parameters   multiply-adds    images/s{'   val accuracy' * cfg.eval}")
    for form, label, speed, accuracy in zip(forms, ("vanilla", "unfolded", "folded"), speeds, [None, *top1]):
        say(f"{label:9}{sum(p.numel() for p in form.parameters()) / 1e6:11.3f} M{multiply_adds(form) / 1e9:14.3f} G"
            f"{speed:12.1f}" + (f"{accuracy:15.2%}" if accuracy is not None else ""))
    w_a = max(block.mlp.fc1.weight.abs().max().item() for block in folded.blocks)
    say(f"largest difference of a logit {largest:.2g} (logits up to {scale:.2g}) on {on}; largest |W_A| {w_a:.3g}\n"
        f"wrote {path}")


def generate(cfg, run):
    """A picture of cfg.sample val images by the class that cfg.ckpt gives them: a row of eight per class."""
    model = load_model(cfg, cfg.ckpt).to(run.device)
    data = Images(replace(cfg, resolution=model.resolution), "val")
    if (count := data.meta["num_classes"]) != len(model.head.bias):
        fail(f"{cfg.data} has {count} classes, {cfg.ckpt} {len(model.head.bias)}: choose another --data")
    chosen = np.random.default_rng(cfg.seed).permutation(len(data))[:cfg.sample]
    images, labels = map(torch.stack, zip(*[(x, torch.tensor(y)) for x, y in (data[int(i), 0] for i in chosen)]))
    with torch.no_grad(), run.autocast():
        predicted = model(images.to(run.device)).argmax(dim=1).cpu()
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    classes = predicted.unique()[:8].tolist()
    grid = torch.ones(len(classes), 8, *images.shape[1:])
    for row, label in zip(grid, classes):
        members = images[predicted == label][:8]
        row[:len(members)] = members * std + mean
    path = Path(cfg.out) / "predictions.png"
    if run.rank == 0:
        make_folder(cfg.out)
        save_picture(path, (255 * grid.flatten(0, 1)).round().permute(0, 2, 3, 1))
    say(f"wrote {path}: {(predicted == labels).float().mean():.1%} of {len(labels)} val images are right; rows stand "
        f"for {', '.join(str(data.meta['class_names'][label]) for label in classes)}")


def main(argv=None):
    """Train, fold or classify, as the command line says; the toy does all three."""
    cfg = parse(argv)
    run = setup(cfg)
    with clear_errors(run):
        if cfg.reparam:
            return reparam(cfg, run)
        if cfg.sample:
            return generate(cfg, run)
        is_toy = cfg.model == "toy" and cfg.data == "data/toy" and not cfg.bench
        with first_rank_first():
            if is_toy and not Path(cfg.data, "meta.json").exists():
                run_tool("prepare.py", "toy", "--out", cfg.data)
        train(cfg, run)
        if is_toy:
            if run.world > 1:
                dist.barrier()  # until rank 0 has saved
            reparam(replace(cfg, reparam=f"{cfg.out}/last.pt", eval=True), run)
            generate(replace(cfg, sample=480, ckpt=f"{cfg.out}/last.pt"), run)


if __name__ == "__main__":
    main()

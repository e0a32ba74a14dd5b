"""RePaViT: structural reparameterisation of vision transformers (Xu et al., arXiv 2505.21847).

"RePa" is re-PArameterisation here, NOT representation alignment: no teacher, no diffusion, but a
classifier that gets cheaper after training. It stands here because its name is mistaken for REPA's,
and because its idea also makes a trained diffusion transformer cheaper (IdleSiTBlock: ours, exact,
trained by nobody yet).

In every feed-forward layer only the first k of the H hidden channels pass the GELU; the others are
idle, hence linear. BatchNorms stand before both matrices, and after training they are constants:
W' and b' are the layers with their norms multiplied in. So the idle channels and the layer's
shortcut fold into one D x D matrix, and the function stays the same up to rounding:

    training   u = W1 BN1(h) + b1
               h + W2 BN2([gelu(u_1..u_k), u_k+1..u_H]) + b2
    folded     W_A h + b_A + W_3 gelu(W_1 h + b_1)
               W_A = W2' [idle columns] W1' [idle rows] + I
               b_A = W2' [idle columns] b1' [idle rows] + b2'
    loss       L = -sum_c target_c log p_c

    python repavit.py                  the toy: data, training, folding, speed table; 2 minutes
    torchrun --nproc_per_node=8 repavit.py --model RePaViT_Base    the paper's recipe; data/imagenet
                                       holds train/CLASS/*, val/CLASS/*; several nodes as repa.py
    python repavit.py --model RePaViT_Base --eval --reparam runs/repavit-RePaViT_Base/last.pt
                                       folds it: writes last-folded.pt beside it
    python repavit.py --model RePaViT_Tiny --idle-ratio 0.5 --reparam FILE    also official weights
    python repavit.py --sample 480 --ckpt runs/repavit-toy/last-folded.pt     val images by class

Published (ICML 2025, Tables 1 and 4): ImageNet-1k, 224 px, 300 epochs from scratch; images/s on an
A6000, batch 128; vanilla -> folded, in brackets unfolded, which is SLOWER than vanilla: all gain
comes from folding, and folding changes no digit of the accuracy. Smaller models lose more.
    Tiny    idle .50     5.7 ->  4.4 M    3435.1 -> 4001.2 images/s (2397.9)    72.1 -> 69.4 %
    Base    idle .75    86.6 -> 51.1 M     418.5 ->  660.3 images/s  (336.6)    81.8 -> 81.3 %
All sizes, and our runs (the toy and checks of exactness and speed; not ImageNet): docs/results.md.

What differs from repa.py: the network, LAMB with a cosine, and accuracy in place of samples. From
the official code, on purpose: it trains (an import is missing there); bf16, not fp16 with a scaler;
repeated augmentation on one GPU, too; a resumed run goes on with the same images and draws;
channels are chosen by slices, not masks; the fold is in float64, and refused where there is nothing
to fold. Kept: mixup and BatchNorm act in each micro-batch of a rank (rank 0's statistics are kept),
so two ranks are not one; --sync-bn is ours. The EMA is saved, the raw weights are evaluated. Swin,
MLP-Mixer and PoolFormer are left out: the same layer in other networks.
"""
import argparse
import copy
import math
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from common import Mlp, SiTBlock, init_linear
from support.checkpoints import load_checkpoint, load_strict, restore, save_checkpoint, save_run
from support.dataset import mix_seed, step_draws
from support.flags import BOOKKEEPING, parse
from support.images import Images, accuracy, augmented_batches, images_for, save_by_class
from support.log import Log
from support.runs import (
    DDP_OPTIONS,
    announce,
    catch_stop,
    clear_errors,
    compile_blocks,
    end_run,
    make_data,
    setup,
    skip_where_not_finite,
)
from support.terminal import fail, make_folder, say
from support.vit import ViT, add_branch, images_per_second, multiply_adds, random_images, say_costs


@dataclass
class Config:
    """One field is one flag. Values are the paper's for RePaViT_Base; RECIPES has other models'."""
    # The method and its recipe
    idle_ratio: float = 0.75                # share of idle channels; the paper: 0.5 for Tiny, Small
    feature_norm: Literal["BatchNorm", "LayerNorm"] = "BatchNorm"  # LayerNorm, idle 0 = vanilla ViT
    sync_bn: bool = False                   # BatchNorm over all ranks (ours; CUDA only)
    reparam: str = ""                       # fold this checkpoint and measure it, no training
    eval: bool = False                      # with --reparam: accuracy on val before and after
    drop_path: float = 0.1                  # share of branches dropped in the last block
    min_learning_rate: float = 5e-5         # the cosine's end; official README: 4e-5 for Base
    warmup_steps: int = 6240                # 20 epochs, linear from 1e-6
    weight_decay: float = 0.05              # of matrices; vectors have none
    augment: Literal["deit", "flip"] = "deit"  # DeiT's with mixup; or random crops and flips only
    eval_every: int = 3120                  # steps between accuracies on val; 0 = never

    # The run
    model: str = "toy"                      # toy, or RePaViT_{Tiny,Small,Base,Large,Huge}
    data: str = "data/imagenet"             # holds train/CLASS/*, val/CLASS/*; or by prepare.py
    out: str = "runs/repavit-{model}"       # config.json, log.jsonl, last.pt, predictions.png
    resolution: int = 224                   # pixels; up to 32, crops are shifts by up to 4 pixels
    batch_size: int = 4096                  # images per step, over all GPUs
    micro_batch: int = 0                    # images per GPU at once; 0 = batch size / GPUs
    max_train_steps: int = 93_600           # 300 epochs of ImageNet; where the cosine ends

    # Optimisation
    learning_rate: float = 4e-3             # LAMB, the highest; the paper: 1e-3 for Large, Huge
    max_grad_norm: float = 1.0              # gradients are clipped to this norm
    ema_decay: float = 0.99996              # of the averaged weights, every step

    # How it is carried out
    precision: Literal["auto", "bf16", "fp32"] = "auto"  # auto = bf16 on CUDA, fp32 elsewhere
    compile: bool = None                    # torch.compile each block; default: on CUDA
    seed: int = 0                           # of the weights, the order of images, every draw
    workers: int = 10                       # data processes per GPU
    log_every: int = 100                    # steps
    save_every: int = 1000                  # steps between writes of last.pt
    init: str = ""                          # start from the weights of this checkpoint

    # Classifying
    ckpt: str = ""                          # checkpoint to classify with
    sample: int = 0                         # picture of this many val images, instead of training

    # Speed
    bench: int = 0                          # train this many steps on random data, write nothing


MODELS = {
    "toy": dict(width=64, depth=4, num_heads=4, patch_size=4),
    "RePaViT_Tiny": dict(width=192, depth=12, num_heads=3, patch_size=16),
    "RePaViT_Small": dict(width=384, depth=12, num_heads=6, patch_size=16),
    "RePaViT_Base": dict(width=768, depth=12, num_heads=12, patch_size=16),
    "RePaViT_Large": dict(width=1024, depth=24, num_heads=16, patch_size=16),
    "RePaViT_Huge": dict(width=1280, depth=32, num_heads=16, patch_size=16),
}
RECIPES = {  # by the beginning of the model's name
    "toy": dict(
        data="data/toy", resolution=16, batch_size=64, max_train_steps=1000,
        learning_rate=2e-2, min_learning_rate=1e-4, warmup_steps=50, ema_decay=0.99,
        drop_path=0.0, augment="flip", workers=1, log_every=50, save_every=500, eval_every=500),
    "RePaViT_Tiny": dict(idle_ratio=0.5),
    "RePaViT_Small": dict(idle_ratio=0.5),
    "RePaViT_Large": dict(learning_rate=1e-3, drop_path=0.3),
    "RePaViT_Huge": dict(learning_rate=1e-3, drop_path=0.3),
}
RANGES = {
    "idle_ratio": (0, 1), "drop_path": (0, 0.99), "min_learning_rate": (0, 1e12),
    "warmup_steps": (0, 1e12), "weight_decay": (0, 1e12), "eval_every": (0, 1e12),
}
# Not so these two, which change the result here: the cosine ends at the last step, and every
# micro-batch has its own BatchNorm statistics and mixup.
MAY_CHANGE = BOOKKEEPING - {"max_train_steps", "micro_batch"} | {"eval_every", "reparam", "eval"}
WARMUP_FROM = 1e-6  # the learning rate of the first step


# --------------------------------------------------------------------------------------------------
# The method. Names are those of the official checkpoints.
# --------------------------------------------------------------------------------------------------
def gelu_of_first(u, k, approximate="none"):
    """GELU on the first k channels of u (...,H); the others are idle."""
    if k == u.shape[-1]:
        return F.gelu(u, approximate=approximate)
    active = F.gelu(u[..., :k], approximate=approximate)
    return torch.cat([active, u[..., k:]], dim=-1)


class IdleFFN(nn.Module):
    """Feed-forward layer as it is trained, with norms and shortcut."""

    def __init__(self, width, hidden_dim, idle_ratio, feature_norm="BatchNorm"):
        super().__init__()
        # Official checkpoints were made with this very expression, rounding included.
        self.k = math.ceil(hidden_dim * (1 - idle_ratio))
        self.fc1 = nn.Linear(width, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, width)
        self.norm = None
        if feature_norm == "LayerNorm":
            self.norm = nn.LayerNorm(width)
        else:
            self.norm1 = nn.BatchNorm1d(width)
            self.norm2 = nn.BatchNorm1d(hidden_dim)

    def forward(self, h, scale=None):
        """Tokens (B,N,D); scale (B,1,1) multiplies the branch, where branches are dropped."""
        if self.norm is not None:
            u = self.fc1(self.norm(h))
            branch = self.fc2(gelu_of_first(u, self.k))
        else:
            # (B*N,D): a channel's statistics are over all images and positions
            u = self.fc1(self.norm1(h.flatten(0, 1)))
            branch = self.fc2(self.norm2(gelu_of_first(u, self.k)))
            branch = branch.view_as(h)  # (B*N,D) -> (B,N,D)
        return add_branch(h, branch, scale)

    def fold(self):
        """The FoldedFFN that computes the same in eval mode."""
        if self.norm is not None:
            raise ValueError("LayerNorm has statistics of each token and cannot be folded: train "
                             "with --feature-norm BatchNorm")
        w1, b1 = fold_norm(self.norm1, self.fc1)
        w2, b2 = fold_norm(self.norm2, self.fc2)
        return fold_ffn(w1, b1, w2, b2, self.k, has_shortcut=True)


def fold_norm(norm, linear):
    """Weight and bias, float64, of linear(norm(x)), for a BatchNorm with stored statistics."""
    weight = linear.weight.double()
    bias = linear.bias.double()
    scale = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
    shift = norm.bias.double() - norm.running_mean.double() * scale
    return weight * scale, bias + weight @ shift


def fold_ffn(w1, b1, w2, b2, k, has_shortcut, approximate="none"):
    """The FoldedFFN of this layer, plus h itself if there is a shortcut:

        w2 [gelu(u_1..u_k), u_k+1..u_H] + b2,  u = w1 h + b1
    """
    w_a = w2[:, k:] @ w1[k:]  # (D,H-k) (H-k,D) -> (D,D)
    b_a = w2[:, k:] @ b1[k:] + b2
    if has_shortcut:
        w_a = w_a + torch.eye(len(w_a), dtype=w_a.dtype)
    weights = {"fc1.weight": w_a, "fc1.bias": b_a}
    if k > 0:
        weights |= {"fc2.weight": w1[:k], "fc2.bias": b1[:k], "fc3.weight": w2[:, :k]}
    folded = FoldedFFN(len(w_a), k, approximate)
    folded.load_state_dict(weights)
    return folded


class FoldedFFN(nn.Module):
    """W_A h + b_A + W_3 gelu(W_1 h + b_1). The official names: fc1 is A, fc2 is 1, fc3 is 3."""

    def __init__(self, width, k, approximate="none"):
        super().__init__()
        self.k = k
        self.approximate = approximate
        self.fc1 = nn.Linear(width, width)
        if k > 0:  # with all channels idle, the layer is one matrix
            self.fc2 = nn.Linear(width, k)
            self.fc3 = nn.Linear(k, width, bias=False)

    def forward(self, h, scale=None):
        idle = self.fc1(h)
        if self.k == 0:
            return idle
        active = F.gelu(self.fc2(h), approximate=self.approximate)
        return idle + self.fc3(active)


class RePaViT(ViT):
    """ViT with idle channels in every feed-forward layer."""

    def __init__(self, resolution, num_classes, sizes, idle_ratio, feature_norm="BatchNorm",
                 drop_path=0.0):
        def make_ffn(width):
            return IdleFFN(width, 4 * width, idle_ratio, feature_norm)
        super().__init__(resolution, num_classes, make_ffn, drop_path, **sizes)


def repavit_loss(model, images, targets, keep):
    """Cross-entropy (B,) with soft targets (B,classes), which are mixed and smoothed already."""
    logits = model(images, keep).float()
    return F.cross_entropy(logits, targets, reduction="none")


@torch.no_grad()
def fold(model):
    """A folded copy of a trained RePaViT or SiT, on the CPU, in eval mode (EMA: average first)."""
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
        """The FoldedFFN that computes the same; the shortcut is outside the gate, and stays."""
        w1, b1, w2, b2 = [p.double() for p in self.parameters()]
        return fold_ffn(w1, b1, w2, b2, self.k, has_shortcut=False, approximate="tanh")


class IdleSiTBlock(SiTBlock):
    """SiT block with an IdleMlp, for SiT.blocks; fold(sit) makes it cheaper. Ours, not trained yet.

    LayerNorm, modulation, gate and shortcut stay; the linear path between them folds without any
    BatchNorm. It is another function than SiT's, so it must be trained so.
    """

    def __init__(self, hidden_size, num_heads, idle_ratio=0.75):
        super().__init__(hidden_size, num_heads)
        self.mlp = IdleMlp(hidden_size, 4 * hidden_size, idle_ratio)
        self.apply(init_linear)
        nn.init.zeros_(self.adaLN_modulation[1].weight)


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
def read_weights(path):
    """(state dict, the settings it was trained with) of a checkpoint."""
    with torch.serialization.safe_globals([argparse.Namespace]):  # the official command line
        checkpoint = load_checkpoint(path)
    weights = checkpoint.get("model", checkpoint)
    if not {"cls_token", "norm_pre.weight", "patch_embed.proj.weight"} <= weights.keys():
        fail(f"{path} holds no RePaViT weights (cls_token and norm_pre.weight must be in it)")
    command_line = checkpoint.get("args", argparse.Namespace())
    return weights, checkpoint.get("config", vars(command_line))


def init_from(path, model):
    """Give `model` the weights of a checkpoint, all of them; none is left fresh."""
    weights, _ = read_weights(path)
    load_strict(model, weights, f"{path} does not fit this model")
    return []


def build(cfg, data, run):
    """The model on this rank's device, and its optimiser: timm's LAMB."""
    from timm.optim import create_optimizer_v2
    if cfg.sync_bn and run.device.type != "cuda":
        fail("--sync-bn needs GPUs: PyTorch has no synchronised BatchNorm for CPUs")
    if run.micro_batch % 2:
        fail(f"mixup pairs the images of a micro-batch, here {run.micro_batch}: take an even "
             f"--micro-batch")
    torch.manual_seed(cfg.seed)
    model = RePaViT(
        cfg.resolution, data.meta["num_classes"], MODELS[cfg.model], cfg.idle_ratio,
        cfg.feature_norm, cfg.drop_path)
    if cfg.sync_bn:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    model = model.to(run.device)
    # Vectors, positions and class token have no decay and no layer-wise rate; the step clips.
    optimizer = create_optimizer_v2(
        model, "lamb", cfg.learning_rate, cfg.weight_decay, eps=1e-8, max_grad_norm=None)
    optimizer.register_step_pre_hook(skip_where_not_finite)
    return model, optimizer


def learning_rate(cfg, step):
    """Of step 1, 2, ...: a line, then a cosine that began at step 1, too (timm's, by updates)."""
    if step <= cfg.warmup_steps:
        share = (step - 1) / cfg.warmup_steps
        return WARMUP_FROM + share * (cfg.learning_rate - WARMUP_FROM)
    share = 0.5 + 0.5 * math.cos(math.pi * (step - 1) / cfg.max_train_steps)
    return cfg.min_learning_rate + share * (cfg.learning_rate - cfg.min_learning_rate)


def update_statistics(ema, model, decay):
    """BatchNorm's statistics are averaged as the weights are; its counts are copied."""
    for average, statistic in zip(ema.buffers(), model.buffers()):
        if average.is_floating_point():
            average.lerp_(statistic, 1 - decay)
        else:
            average.copy_(statistic)


def train(cfg, run):
    """Begin or continue the run in cfg.out."""
    from timm.data import Mixup
    data = Images(cfg, "train")
    val = Images(cfg, "val")
    if data.meta["class_names"] != val.meta["class_names"]:
        fail(f"{cfg.data}: train and val have different classes")
    model, optimizer = build(cfg, data, run)
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    parameters = list(model.parameters())
    first_step = restore(cfg, data.meta, model, ema, optimizer, init_from, MAY_CHANGE)
    if first_step >= cfg.max_train_steps:
        say(f"{cfg.out} is finished: {first_step} steps; choose another --out")
        return
    flops_per_image = 3 * 2 * multiply_adds(ema)  # the backward pass costs two forward passes
    announce(cfg, run, data, model, flops_per_image)
    if cfg.feature_norm == "BatchNorm" and not cfg.sync_bn:
        say("each micro-batch has its own BatchNorm statistics")
    log = Log(cfg, run, first_step, flops_per_image)
    stop = catch_stop(run)
    net = parallelise(model, cfg, run)
    loader = augmented_batches(data, cfg, run, first_step)
    mixup_prob = 1.0 if cfg.augment == "deit" else 0.0
    mixup = Mixup(mixup_alpha=0.8, cutmix_alpha=1.0, prob=mixup_prob, label_smoothing=0.1,
                  num_classes=data.meta["num_classes"])

    for step in range(first_step + 1, cfg.max_train_steps + 1):
        # Every draw of the step is made for the global batch; this rank holds its part of it.
        _, uniform = step_draws(cfg.seed, step, cfg.batch_size, run)
        keep = (uniform(len(model.blocks), 2) >= model.drop_rates).float()  # (B,depth,2)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(cfg, step)

        loss_sum = torch.zeros((), device=run.device)
        for i in range(run.accumulation):
            images, labels = next(loader)
            np.random.seed(mix_seed(cfg.seed, step, run.rank, i) % 2**32)  # mixup draws from NumPy
            images, targets = mixup(images, labels)
            rows = slice(i * run.micro_batch, (i + 1) * run.micro_batch)
            is_last = i + 1 == run.accumulation
            # Gradients are reduced once a step: with the last micro-batch.
            reduction = nullcontext() if is_last or run.world == 1 else net.no_sync()
            with reduction:
                with run.autocast():
                    loss = repavit_loss(net, images, targets, keep[rows]).mean()
                (loss / run.accumulation).backward()
            loss_sum += loss.detach() / run.accumulation

        grad_norm, is_finite = optimizer_step(optimizer, parameters, cfg.max_grad_norm)
        update_ema(ema, model, cfg.ema_decay)
        update_statistics(ema, model, cfg.ema_decay)
        log.add(is_finite, loss=loss_sum, grad_norm=grad_norm)

        is_last_step = step == cfg.max_train_steps
        stopping = stop(step)
        if step % cfg.log_every == 0 or is_last_step:
            log.write(step)
        if not cfg.bench:
            with log.pause():
                if cfg.eval_every and (step % cfg.eval_every == 0 or is_last_step):
                    with run.autocast():  # the raw weights, as in the official code
                        (top1,), _, _ = accuracy(cfg, run, [model.eval()], val)
                    model.train()
                    say(f"step {step}: {top1:.2%} of {len(val)} val images right")
                if run.rank == 0 and (step % cfg.save_every == 0 or is_last_step or stopping):
                    save_run(cfg, "last.pt", step, data.meta,
                             model=model, ema=ema, optimizer=optimizer)
        if stopping:
            break
    loader.close()
    end_run(cfg, run, log, step, stopping)


# --------------------------------------------------------------------------------------------------
# Folding and classifying
# --------------------------------------------------------------------------------------------------
def load_model(cfg, path):
    """The model in a checkpoint, folded or not, on the CPU, in eval mode; its weights say which."""
    weights, settings = read_weights(path)
    width, _, patch, _ = weights["patch_embed.proj.weight"].shape
    blocks = {key.split(".")[1] for key in weights if key.startswith("blocks.")}
    sizes = dict(width=width, depth=len(blocks), patch_size=patch)
    fitting = [name for name in MODELS if sizes.items() <= MODELS[name].items()]
    if not fitting:
        fail(f"{path} has {sizes}: no model of this script")
    if cfg.model not in fitting:
        fail(f"{path} has {sizes}: add --model {fitting[0]}")
    if settings.get("heuristic", "static") == "linear":
        fail(f"{path} was trained with --heuristic linear, an idle ratio for each depth: that is "
             f"not supported here")
    idle_ratio = settings.get("idle_ratio", cfg.idle_ratio)
    if not settings.get("channel_idle", True):  # the official switch
        idle_ratio = 0
    has_layer_norm = "blocks.0.mlp.norm.weight" in weights
    has_batch_norm = "blocks.0.mlp.norm1.weight" in weights
    feature_norm = "LayerNorm" if has_layer_norm else "BatchNorm"
    resolution = patch * math.isqrt(weights["pos_embed"].shape[1] - 1)
    classes = len(weights["head.bias"])
    model = RePaViT(resolution, classes, MODELS[cfg.model], idle_ratio, feature_norm)
    if not has_layer_norm and not has_batch_norm:  # it is folded
        k = len(weights.get("blocks.0.mlp.fc2.bias", ()))
        for block in model.blocks:
            block.mlp = FoldedFFN(width, k)
    load_strict(model, weights, f"{path} does not fit this model")
    return model.eval()


def fold_checkpoint(cfg):
    """The model in cfg.reparam and its folded form; one that has nothing to fold is refused."""
    model = load_model(cfg, cfg.reparam)
    ffn = model.blocks[0].mlp
    if isinstance(ffn, FoldedFFN):
        fail(f"{cfg.reparam} is folded already")
    if ffn.norm is None and ffn.k == ffn.fc1.out_features:
        fail(f"{cfg.reparam} has no idle channels: there is nothing to fold")
    try:
        return model, fold(model)
    except ValueError as error:
        fail(f"{cfg.reparam}: {error}")


@torch.no_grad()
def compare(cfg, run, model, folded, images):
    """The largest difference of a logit, as text, and with --eval both accuracies on val."""
    accuracies = None, None
    judged = "random images"
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")  # TF32 would round more than the fold
    logits = model(images)
    scale = logits.abs().max().item()
    largest = (folded(images) - logits).abs().max().item()
    if cfg.eval:
        val = images_for(model, cfg, cfg.reparam)
        accuracies, largest, different = accuracy(cfg, run, [model, folded], val)
        judged = f"{len(val)} val images, of which {different} are classified otherwise"
    torch.set_float32_matmul_precision(precision)
    if not largest <= 1e-3 * max(1, scale):  # not a number is refused, too
        fail(f"folding changed a logit by {largest:.2g}: a BatchNorm of {cfg.reparam} has hardly "
             f"any variance; nothing was written")
    text = f"largest difference of a logit {largest:.2g} (logits up to {scale:.2g}) on {judged}"
    return text, accuracies


def reparam(cfg, run):
    """Fold cfg.reparam, check it, write the folded model beside it, and say what it saves."""
    model, folded = fold_checkpoint(cfg)
    first = model.blocks[0].mlp
    idle_ratio = 1 - first.k / first.fc1.out_features
    vanilla = RePaViT(model.resolution, len(model.head.bias), MODELS[cfg.model], 0, "LayerNorm")
    forms = [form.to(run.device) for form in (vanilla.eval(), model, folded)]
    images = random_images(cfg, run, model)
    difference, accuracies = compare(cfg, run, model, folded, images)
    speeds = images_per_second(forms, images, run.autocast)

    path = Path(cfg.reparam)
    path = path.with_name(f"{path.stem}-folded.pt")
    if run.rank == 0:
        config = dict(model=cfg.model, idle_ratio=idle_ratio)
        save_checkpoint(path, dict(model=folded.state_dict(), config=config))
    say(f"{cfg.model}, {idle_ratio:.2f} of the channels idle; {len(images)} images of "
        f"{model.resolution} px at once, {run.device.type}, {cfg.precision}; the vanilla ViT has "
        f"random weights")
    say_costs(["vanilla", "unfolded", "folded"], forms, speeds, [None, *accuracies])
    w_a = max(block.mlp.fc1.weight.abs().max().item() for block in folded.blocks)
    say(f"{difference}; largest |W_A| {w_a:.3g}")
    say(f"wrote {path}")


@torch.no_grad()
def generate(cfg, run):
    """A picture of cfg.sample val images by the class that cfg.ckpt gives them: a row per class."""
    model = load_model(cfg, cfg.ckpt).to(run.device)
    val = images_for(model, cfg, cfg.ckpt)
    chosen = np.random.default_rng(cfg.seed).permutation(len(val))[:cfg.sample]
    pairs = [val[int(index), 0] for index in chosen]
    images, labels = torch.utils.data.default_collate(pairs)
    with run.autocast():
        predicted = model(images.to(run.device)).argmax(dim=1).cpu()
    path = Path(cfg.out) / "predictions.png"
    classes = predicted.unique()[:8].tolist()
    if run.rank == 0:
        make_folder(cfg.out)
        save_by_class(path, images, predicted, classes)
    right = (predicted == labels).float().mean()
    names = ", ".join(str(val.meta["class_names"][label]) for label in classes)
    say(f"wrote {path}: {right:.1%} of {len(labels)} val images are right; rows stand for {names}")


def report_toy(cfg, run):
    """Fold what was trained, and show how it classifies 480 images."""
    last = f"{cfg.out}/last.pt"
    reparam(replace(cfg, reparam=last, eval=True), run)
    generate(replace(cfg, sample=480, ckpt=last), run)


def main(argv=None):
    """Train, fold or classify, as the command line says; the toy does all three."""
    cfg = parse(argv, Config, MODELS, RECIPES, RANGES, description=__doc__)
    run = setup(cfg)
    with clear_errors(run):
        if cfg.reparam:
            return reparam(cfg, run)
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

"""ViT: a classifier of images by its class token, and what it costs.

It is DeiT (arXiv 2012.12877) with a norm before the blocks, hence a patch embedding without bias;
names are those of timm's VisionTransformer(pre_norm=True), but norms and shortcuts stand inside
`attn` and `mlp`, so that a feed-forward layer can be replaced with all that belongs to it.
"""
import time
from collections import OrderedDict

import numpy as np
import torch
import torch.nn as nn

from common import Attention, SizeError
from support.runs import flop_counter
from support.terminal import say


def add_branch(h, branch, scale):
    """The shortcut h (B,N,D) plus a branch, times scale (B,1,1) where branches are dropped."""
    if scale is not None:
        branch = scale * branch
    return h + branch


class NormedAttention(Attention):
    """Self-attention with its LayerNorm and shortcut."""

    def __init__(self, width, num_heads):
        super().__init__(width, num_heads)
        self.norm = nn.LayerNorm(width)

    def forward(self, h, scale=None):
        q, k, v = self.split(self.norm(h))
        return add_branch(h, self.attend(q, k, v), scale)


class Block(nn.Module):
    """Attention, then a feed-forward layer; scales (B,2) multiply their branches, or None."""

    def __init__(self, width, num_heads, make_ffn):
        super().__init__()
        self.attn = NormedAttention(width, num_heads)
        self.mlp = make_ffn(width)

    def forward(self, h, scales=None):
        if scales is None:
            return self.mlp(self.attn(h))
        scale_a, scale_m = scales[:, :, None, None].unbind(1)  # each (B,1,1)
        return self.mlp(self.attn(h, scale_a), scale_m)


class ViT(nn.Module):
    """The classifier. make_ffn(width) is a feed-forward layer ffn(h, scale), shortcut included.

    drop_path: share of branches that are dropped in the last block; in the first none is.
    """

    def __init__(self, resolution, num_classes, make_ffn, drop_path=0.0, *,
                 width, depth, num_heads, patch_size):
        super().__init__()
        if resolution % patch_size:
            raise SizeError(f"--resolution {resolution} is not a multiple of the patch size "
                            f"{patch_size}")
        self.resolution = resolution
        tokens = (resolution // patch_size) ** 2 + 1
        proj = nn.Conv2d(3, width, patch_size, stride=patch_size, bias=False)
        self.patch_embed = nn.Sequential(OrderedDict(proj=proj))
        self.cls_token = nn.Parameter(1e-6 * torch.randn(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, tokens, width))
        self.norm_pre = nn.LayerNorm(width, eps=1e-6)
        self.blocks = nn.ModuleList([Block(width, num_heads, make_ffn) for _ in range(depth)])
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.head = nn.Linear(width, num_classes)
        drop_rates = torch.linspace(0, drop_path, depth)[:, None]  # (depth,1), for both branches
        self.register_buffer("drop_rates", drop_rates, persistent=False)

        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def no_weight_decay(self):  # timm asks; beside these, vectors have none
        return {"pos_embed", "cls_token"}

    def forward(self, images, keep=None):
        """Logits of normalised images (B,3,H,W).

        keep (B,depth,2): 1 where a branch is kept, 0 where it is dropped.
        """
        h = self.patch_embed(images).flatten(2).transpose(1, 2)  # (B,D,h,w) -> (B,N,D)
        cls_token = self.cls_token.expand(len(h), -1, -1)
        h = self.norm_pre(torch.cat([cls_token, h], dim=1) + self.pos_embed)
        scales = [None] * len(self.blocks)
        if keep is not None:
            scales = (keep / (1 - self.drop_rates)).unbind(1)  # (B,depth,2) -> depth times (B,2)
        for block, scale in zip(self.blocks, scales):
            h = block(h, scale)
        return self.head(self.norm(h[:, 0]))


# --------------------------------------------------------------------------------------------------
# What it costs
# --------------------------------------------------------------------------------------------------
@torch.no_grad()
def multiply_adds(model):
    """Multiply-adds of the matrices and the patch embedding on one image.

    As papers on ViTs count them: without the products inside attention.
    """
    device = model.cls_token.device
    with flop_counter() as counter:
        model(torch.zeros(1, 3, model.resolution, model.resolution, device=device))
    flops = counter.get_flop_counts()["Global"]
    aten = torch.ops.aten
    counted = aten.mm, aten.addmm, aten.convolution
    return sum(flops.get(operation, 0) for operation in counted) // 2


def random_images(cfg, run, model):
    """Images (B,3,H,W) to compare and to time with; without a GPU about 2048 tokens at once."""
    count = 128
    if run.device.type != "cuda":
        count = max(1, 2048 // model.pos_embed.shape[1])
    shape = cfg.micro_batch or count, 3, model.resolution, model.resolution
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(run.device)


@torch.no_grad()
def images_per_second(models, images, autocast, seconds=15):
    """Median speed of each model.

    They take turns, so that whatever else the machine does slows down all of them.
    """
    times = [[] for _ in models]
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[0]) < 6:
        for model, durations in zip(models, times):
            start = time.perf_counter()
            with autocast():
                model(images).sum().item()  # waits for the device
            durations.append(time.perf_counter() - start)
    medians = [float(np.median(durations[1:])) for durations in times]  # the first is the warm-up
    return [len(images) / median for median in medians]


def say_costs(labels, forms, speeds, accuracies):
    """A line for each form of a network: its size, its cost, its speed, its accuracy or None."""
    title = "            parameters   multiply-adds    images/s"
    if accuracies[-1] is not None:
        title += "   val accuracy"
    say(title)
    for label, form, speed, top1 in zip(labels, forms, speeds, accuracies):
        millions = sum(p.numel() for p in form.parameters()) / 1e6
        billions = multiply_adds(form) / 1e9
        line = f"{label:9}{millions:11.3f} M{billions:14.3f} G{speed:12.1f}"
        if top1 is not None:
            line += f"{top1:15.2%}"
        say(line)

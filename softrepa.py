"""SoftREPA: a few soft tokens align text and image (Lee et al., NeurIPS 2025, arXiv 2503.08250).

A text-to-image model (Stable Diffusion 3) is frozen. In front of the text tokens of its first
blocks stand a few that are learned, fewer than a million numbers; each block drops their outputs.
The denoising error of an image must be lower under its own caption than under the other captions
of the batch. The tokens stay for sampling, in both branches of the guidance.

    e[i,j] = mean |v_theta(x_t[i], t, text[j], soft) - v[i]|^2
    l[i,j] = 4 exp(-e[i,j] / 0.07)
    L = mean_i CrossEntropy(l[i,:], i) + dweight mean_i e[i,i]    softmax over TEXTS, rows only

    python softrepa.py                                        the toy, in 5 minutes
    python softrepa.py --objective fm --out runs/softrepa-fm  its control: tokens by flow matching
    python prepare.py text --images coco/train2017 --captions FILE.json --out data/coco512
    torchrun --nproc_per_node=8 softrepa.py --model sd3 --data data/coco512
    python softrepa.py --model sd3 --sample 4 --prompts FILE --ckpt runs/softrepa-sd3/best.pt

Published for SD3, without and with tokens (28 steps, guidance 4, 1024 px, 5,000 captions of COCO
val2017; the project's page): ImageReward .942 / 1.085, CLIP .263 / .269, HPS .280 / .289, LPIPS
.424 / .428; by notes of the paper FID 31.59 / 36.21, GenEval .68 / .70 and its COUNTING .56 / .29.
Our runs: the toy, in docs/results.md; not SD3, whose code ran on random weights, nor these metrics.

What differs from repa.py: the model does not learn; a step looks at all pairs of its images and
texts at ONE time with ONE noise; no labels, no EMA, no teacher. Ranks split the images of a step,
and each sees all texts: rows of the softmax are independent, so any number of GPUs, or of rows at
once (--nrows), gives the same gradient, reduced once a step.

What differs from the official code, on purpose: bf16, not fp16 with a loss scaler; chunks count by
their rows and share one noise; sampling uses the trained time tokens (there: new ones); a time of
1000 gets the last row alone, not with its batch; the loss hardly moves from log B, so retrieval and
the error gap are logged, and held-out pairs pick the checkpoint. T5 is left out, as SD3 allows (77
rows of zeros); the released tokens were trained with it. One caption per image, as in the official
multi-GPU trainer: 37 GB of features for COCO. SD3's own size is --resolution 1024.
"""
import functools
import json
import math
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import distributed as dist
from torch.utils.checkpoint import checkpoint

from common import interpolate, sample
from support.checkpoints import load_checkpoint, open_run, save_run
from support.dataset import CaptionedData, clean_input, micro_batches, step_draws
from support.flags import AMOUNT, BOOKKEEPING, COUNT, COUNT_OR_NONE, parse
from support.log import Log
from support.pairs import recognise
from support.runs import (
    catch_stop,
    clear_errors,
    compile_blocks,
    end_run,
    example_inputs,
    make_data,
    setup,
    training_flops,
    write_config,
)
from support.samples import sample_npz, save_picture
from support.sd3 import (
    SD3_MEDIUM,
    MMDiT,
    RandomPairs,
    load_sd3_network,
    pad_context,
    read_prompts,
    sd3_times,
    store_bf16,
)
from support.terminal import fail, say
from support.vae import SD3_VAE_META, load_decoder


@dataclass
class Config:
    """One field is one flag. Values are the official ones for SD3; RECIPES has the toy's."""
    # The method
    objective: Literal["contrastive", "fm"] = "contrastive"  # fm: flow matching on B*B fresh pairs
    n_dc_tokens: int = 4                    # soft tokens of a block
    n_dc_layers: int = 5                    # blocks that have them, from the first
    use_dc_t: bool = True                   # tokens depend on time, by a table of 100 rows
    dweight: float = 0.0                    # weight of e[i,i]; official for SD1.5 and SDXL: 10
    min_t: int = 0                          # times are integers from here, of 1000
    max_t: int = 1000                       # to below this
    wd: float = 1e-4                        # weight decay
    nrows: int = 0                          # images per GPU at once, each with all texts; 0 = all
    recompute: bool = False                 # recompute blocks in the backward pass: less memory
    sd3_ckpt: str = ""                      # sd3_medium_incl_clips.safetensors, not from the hub
    merges: str = ""                        # CLIP's merges.txt, not from the hub
    prompts: str = ""                       # file of prompts to sample, one per line
    soft: bool = True                       # sample with the tokens; --no-soft: the model alone

    # The run
    model: str = "toy"                      # toy, or sd3; it picks the recipe
    data: str = "data/coco{resolution}"     # folder made by prepare.py text
    out: str = "runs/softrepa-{model}"      # config.json, log.jsonl, last.pt, best.pt
    resolution: int = 512                   # pixels; to sample, any multiple of 16: SD3's is 1024
    batch_size: int = 16                    # images and texts of a step over all GPUs: all pairs
    max_train_steps: int = 14_800           # 2 epochs of COCO; the released tokens': unknown

    # How it is carried out
    learning_rate: float = 1e-3             # AdamW; by a cosine to 1e-5, again every 5000 steps
    precision: Literal["auto", "bf16", "fp32"] = "auto"  # auto = bf16 on CUDA, fp32 elsewhere
    compile: bool = None                    # torch.compile each block; default: on CUDA
    seed: int = 0                           # of the tokens, the order of images, every draw
    workers: int = 4                        # data processes per GPU
    log_every: int = 50                     # steps
    save_every: int = 500                   # steps between validations and writes of last.pt
    init: str = ""                          # start from these tokens, as --ckpt

    # Sampling
    ckpt: str = ""                          # tokens: a checkpoint of ours, or the released folder
    sample: int = 0                         # generate this many images instead of training
    num_steps: int = 28                     # of the sampler: Euler, SD3's shifted times
    cfg_scale: float = 4.0                  # guidance scale; 1 = none
    guidance_low: float = 0.0               # guidance acts for t from here
    guidance_high: float = 1.0              # to here; t = 1 is noise
    bench: int = 0                          # speed: this many steps on random data and weights

    @property
    def images_per_step(self):
        """B captioned images, compared in all B*B pairs; flow matching: B*B, all fresh."""
        return self.batch_size if self.objective == "contrastive" else self.batch_size ** 2


MODELS = "toy", "sd3"
RECIPES = {"toy": dict(
    data="data/pairs", resolution=16, batch_size=8, max_train_steps=1000, n_dc_layers=3,
    workers=0, log_every=50, save_every=100, num_steps=20, cfg_scale=1.0)}
RANGES = {
    "n_dc_tokens": COUNT, "n_dc_layers": COUNT,
    "dweight": AMOUNT, "wd": AMOUNT,
    "min_t": COUNT_OR_NONE, "max_t": COUNT,
    "nrows": COUNT_OR_NONE,
}
# What may change between a run and its continuation: how it is carried out, not what it computes.
MAY_CHANGE = BOOKKEEPING | {"init", "nrows", "recompute", "sd3_ckpt", "merges", "prompts", "soft"}


# --------------------------------------------------------------------------------------------------
# The method
# --------------------------------------------------------------------------------------------------
TERMS = "loss", "error", "retrieval", "gap"
LOGIT_SCALE = 4.0  # constants in the official code, too: its optimiser does not get them
TEMPERATURE = 0.07


class SoftTokens(nn.Module):
    """s(k,t) = dc[k] + dc_t[row(t), k], (B,m,D) for block k; its m tokens share the time's part.

    dc_tokens (L,m,D), or (L,m,K) in the width of text features: those pass through the model's text
    embedder. dc_t_tokens: 100 rows of L chunks of D, one row per 10 of the 1000 times. Names as in
    the released files.
    """

    def __init__(self, n_layers, n_tokens, width, use_time=True, token_width=None):
        super().__init__()
        self.n_layers = n_layers
        self.width = width
        shape = n_layers, n_tokens, token_width or width
        self.dc_tokens = nn.Parameter(0.02 * torch.randn(shape))
        self.dc_t_tokens = None
        if use_time:
            self.dc_t_tokens = nn.Embedding(100, n_layers * width)
            nn.init.normal_(self.dc_t_tokens.weight, std=0.02)

    def forward(self, k, t, context_embedder):
        """The tokens before the text of block k at times t (B,) in [0,1]: (B,m,D)."""
        tokens = self.dc_tokens[k]
        if tokens.shape[1] != self.width:
            tokens = context_embedder(tokens)  # (m,K) -> (m,D)
        tokens = tokens.expand(len(t), -1, -1)  # (m,D) -> (B,m,D)
        if self.dc_t_tokens is None:
            return tokens.clone()  # PyTorch's counter of FLOPs cannot take a view of a parameter
        row = ((1000 * t).long() // 10).clamp(max=99)
        chunks = self.dc_t_tokens(row).unflatten(1, (self.n_layers, 1, self.width))  # (B,L,1,D)
        return tokens + chunks[:, k]


def soft_velocity(model, soft, x_t, t, context, pooled, recompute=False):
    """Velocity (B,C,H,W) of an MM-DiT with soft tokens, or None, before its first blocks' text.

    Text tokens pass on what they learned from the soft ones, whose outputs each block drops.
    """
    text, h, c = model.embed(x_t, t, context, pooled)
    n = text.shape[1]
    for k, block in enumerate(model.blocks):
        if soft is not None and k < soft.n_layers:
            tokens = soft(k, t, model.context_embedder)
            text = torch.cat([tokens, text], dim=1)  # (B,m+n,D)
        if recompute:
            text, h = checkpoint(block, text, h, c, use_reentrant=False)
        else:
            text, h = block(text, h, c)
        text = text[:, -n:]
    return model.head(h, c, x_t.shape[-2:])


def flow_errors(velocity, x, t, noise, context, pooled):
    """(B,): mean squared velocity error of each image x (B,C,H,W) under the text beside it."""
    x_t, v = interpolate(x, noise, t)
    v_hat = velocity(x_t, t, context, pooled)
    return (v_hat - v).square().mean(dim=(1, 2, 3))


def pair_errors(velocity, x, t, noise, context, pooled):
    """e (R,B) of every image x (R,C,H,W) under every text, context (B,n,K) and pooled (B,P).

    t (1,), noise (1,C,H,W): the same for all, so that pairs differ by image and text alone.
    """
    R = len(x)
    B = len(context)
    x = x.repeat_interleave(B, dim=0)  # (R,C,H,W) -> (R*B,C,H,W): each image for B texts in turn
    context = context.repeat(R, 1, 1)
    pooled = pooled.repeat(R, 1)
    return flow_errors(velocity, x, t.expand(R * B), noise, context, pooled).view(R, B)


def contrastive_loss(errors, captions, dweight=0.0):
    """(R,): cross-entropy over the B TEXTS of each image; captions (R,): its column in e (R,B)."""
    logits = LOGIT_SCALE * torch.exp(-errors / TEMPERATURE)
    loss = F.cross_entropy(logits, captions, reduction="none")
    return loss + dweight * errors.gather(1, captions[:, None])[:, 0]


# --------------------------------------------------------------------------------------------------
# The step: the same in every script (tests/test_copies.py compares them)
# --------------------------------------------------------------------------------------------------
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


# --------------------------------------------------------------------------------------------------
# Training
# --------------------------------------------------------------------------------------------------
def load_model(cfg, run):
    """The frozen MM-DiT on this rank's device."""
    if cfg.model == "toy":
        saved = load_checkpoint(Path(cfg.data) / "base.pt")
        model = MMDiT(**saved["config"])
        model.load_state_dict(saved["model"])
    elif cfg.bench:
        with run.device:
            model = MMDiT(**SD3_MEDIUM)
    else:
        model = load_sd3_network(cfg.sd3_ckpt)
    if cfg.precision == "bf16":
        store_bf16(model)
    return model.to(run.device).eval().requires_grad_(False)


def load_soft(path, model):
    """Soft tokens that fit the model, from our checkpoint, or from the folder of a released pair.

    The pair: dc_tokens.pth, a tensor, and dc_t_tokens.pth, a pickled nn.Embedding, or none.
    """
    path = Path(path)
    time_file = path / "dc_t_tokens.pth"
    if path.is_dir():
        weights = {"dc_tokens": load_checkpoint(path / "dc_tokens.pth", torch.Tensor)}
        if time_file.is_file():
            with torch.serialization.safe_globals([nn.Embedding]):  # a class that can do no harm
                weights["dc_t_tokens.weight"] = load_checkpoint(time_file, nn.Embedding).weight
    else:
        weights = load_checkpoint(path).get("soft", {})
    shape = weights.get("dc_tokens", torch.empty(0)).shape
    if len(shape) != 3:
        fail(f"{path} holds no soft tokens (layers, tokens, width) of SD3: SD1.5's and SDXL's are "
             f"not read here")
    n_layers, n_tokens, token_width = shape
    width = model.context_embedder.out_features
    table = 100, n_layers * width
    given = weights.get("dc_t_tokens.weight", torch.empty(table)).shape
    is_known = token_width in (width, model.context_embedder.in_features)
    if not is_known or n_layers > len(model.blocks) or given != table:
        fail(f"{path} has tokens of width {token_width} for {n_layers} blocks, with time tokens "
             f"{tuple(given)}; this model has width {width} and {len(model.blocks)} blocks: they "
             f"were trained for another --model")
    soft = SoftTokens(n_layers, n_tokens, width, "dc_t_tokens.weight" in weights, token_width)
    soft.load_state_dict({name: tensor.detach().float() for name, tensor in weights.items()})
    return soft


def build(cfg, run):
    """Pairs to train on, those held out, the frozen model, and its soft tokens on the device."""
    if cfg.bench and cfg.model == "sd3":
        data = held_out = RandomPairs(cfg.resolution)
    else:
        data = CaptionedData(cfg.data, cfg.resolution, cfg.model)
        held_out = CaptionedData(cfg.data, cfg.resolution, cfg.model, held_out=True)
    if len(held_out) < cfg.batch_size:
        fail(f"{cfg.data} holds out {len(held_out)} pairs, --batch-size is {cfg.batch_size}: "
             f"prepare more")
    model = load_model(cfg, run)
    if cfg.n_dc_layers > len(model.blocks):
        fail(f"--n-dc-layers {cfg.n_dc_layers} is more than the {len(model.blocks)} blocks of "
             f"{cfg.model}")
    torch.manual_seed(cfg.seed)
    width = model.context_embedder.out_features
    soft = SoftTokens(cfg.n_dc_layers, cfg.n_dc_tokens, width, cfg.use_dc_t)
    if cfg.init:
        soft = load_soft(cfg.init, model)
    return data, held_out, model, soft.to(run.device)


def describe(cfg, run, data, velocity, model, soft):
    """Say what is about to run, write config.json; returns the FLOPs of training on one image."""
    x_t, t, _ = example_inputs(data, run)
    batch = data[np.arange(1)]
    context, pooled = texts_of(cfg, batch["context"], batch["pooled"])
    with run.autocast():
        flops = training_flops(velocity, x_t, t, context.to(run.device), pooled.to(run.device))
    B = cfg.batch_size
    flops = flops * B * 2 // 3  # no weight learns: the backward pass costs one forward pass
    frozen, trained = (sum(p.numel() for p in part.parameters()) for part in (model, soft))
    compiled = ", compiled" if cfg.compile else ""
    say(f"{cfg.model}: {trained:,} trained numbers before {frozen / 1e6:,.2f} M frozen ones, "
        f"{flops / 1e9:,.2f} GFLOP a training image with {B} texts, {cfg.precision}{compiled}")
    epoch = f"{len(data) / B:,.1f} an epoch"
    say(f"{cfg.data}: {len(data):,} pairs; {cfg.max_train_steps:,} steps, {epoch}")
    say(f"{B} x {B} pairs a step = {run.world} x {run.device.type} x {run.accumulation} chunks of "
        f"{run.micro_batch} images; results in {cfg.out}")
    write_config(cfg, run)
    return flops


def scheduled_rate(cfg, step):
    """Learning rate of a step (from 1): a cosine to 1e-5 in ten stairs of 500 steps, then again."""
    stair = (step - 1) // 500 % 10
    height = (1 + math.cos(math.pi * stair / 10)) / 2
    return 1e-5 + (cfg.learning_rate - 1e-5) * height


def texts_of(cfg, context, pooled):
    """Text features, context (B,n,K) and pooled (B,P), as the network takes them, float32."""
    context = context.float()
    if cfg.model == "sd3":
        context = pad_context(context, SD3_MEDIUM["context_dim"])
    return context, pooled.float()


def step_chunks(cfg, run, velocity, data, batch, seed, step):
    """Yield TERMS (n,R) of a step for R of this rank's images at once (--nrows), with all texts.

    batch: all images and texts of the step. Every rank makes all draws: same time, same noise.
    """
    num_images = cfg.images_per_step
    normal, uniform = step_draws(seed, step, num_images, replace(run, rank=0, world=1))
    posterior_noise = normal(*data.shape)
    noise = normal(*data.shape)
    t = (cfg.min_t + (cfg.max_t - cfg.min_t) * uniform()).floor() / 1000
    x = clean_input(batch, data.meta, posterior_noise)
    context, pooled = texts_of(cfg, batch["context"], batch["pooled"])
    images = torch.arange(run.rank, num_images, run.world, device=run.device)
    # An image of flow matching has one text: B of them are as much work as one with B texts.
    for rows in images.split(run.micro_batch * num_images // cfg.batch_size):
        with run.autocast():
            if cfg.objective == "fm":
                chosen = [part[rows] for part in (x, t, noise, context, pooled)]
                error = flow_errors(velocity, *chosen)
                terms = torch.stack([error, error])
            else:
                errors = pair_errors(velocity, x[rows], t[:1], noise[:1], context, pooled)
                loss = contrastive_loss(errors, rows, cfg.dweight)  # image i has caption i
                error = errors.gather(1, rows[:, None])[:, 0]
                is_best = error <= errors.amin(dim=1)  # of all captions
                others = (errors.sum(dim=1) - error) / (errors.shape[1] - 1)
                terms = torch.stack([loss, error, is_best.float(), others - error])
        yield terms


@torch.no_grad()
def validate(cfg, run, model, soft, data, batches=16):
    """Means over batches of held-out pairs, always the same with the same draws: {term: value}."""
    velocity = functools.partial(soft_velocity, model, soft)
    num_images = cfg.images_per_step
    all_texts = replace(run, rank=0, world=1, micro_batch=num_images)
    loader = micro_batches(data, 0, num_images, all_texts)
    sums = 0
    for i in range(batches):
        chunks = step_chunks(cfg, run, velocity, data, next(loader), 1, i)
        sums = sums + sum(terms.sum(dim=1) for terms in chunks)
    loader.close()
    if run.world > 1:
        dist.all_reduce(sums)
    means = sums / (num_images * batches)
    return dict(zip(TERMS, means.tolist()))


def train(cfg, run):
    """Begin or continue the run in cfg.out."""
    data, held_out, model, soft = build(cfg, run)
    parameters = list(soft.parameters())
    optimizer = torch.optim.AdamW(
        parameters, lr=cfg.learning_rate, weight_decay=cfg.wd, fused=True)
    first_step = 0
    best = math.inf  # the least validation loss so far
    saved = open_run(cfg, data.meta, MAY_CHANGE)
    if saved is not None:
        soft.load_state_dict(saved["soft"])
        optimizer.load_state_dict(saved["optimizer"])
        first_step = saved["step"]
        best = saved["data"]["best"]
    if first_step >= cfg.max_train_steps:
        say(f"{cfg.out} is finished: {first_step} steps; raise --max-train-steps to train on, or "
            f"choose another --out")
        return
    velocity = functools.partial(soft_velocity, model, soft, recompute=cfg.recompute)
    flops_per_image = describe(cfg, run, data, velocity, model, soft)
    log = Log(cfg, run, first_step, flops_per_image)
    stop = catch_stop(run)
    compile_blocks(model, cfg)
    num_images = cfg.images_per_step
    all_texts = replace(run, rank=0, world=1, micro_batch=num_images)  # every rank reads them
    loader = micro_batches(data, cfg.seed, num_images, all_texts, first_step, cfg.workers)

    for step in range(first_step + 1, cfg.max_train_steps + 1):
        optimizer.param_groups[0]["lr"] = scheduled_rate(cfg, step)
        sums = 0
        for terms in step_chunks(cfg, run, velocity, data, next(loader), cfg.seed, step):
            loss = terms[0].sum() / num_images  # chunks and ranks add up to the mean of all images
            loss.backward()
            sums = sums + terms.detach().sum(dim=1)
        if run.world > 1:
            # By hand, where all other scripts use DDP: that expects one forward call of the module
            # that learns and one backward pass. Here the frozen model calls it in its first blocks,
            # and every chunk has a backward pass. Nor would DDP save time: a million numbers travel
            # at most, and they are summed, not averaged, since chunks are shares of one mean.
            gradients = [p.grad for p in parameters]
            vector = nn.utils.parameters_to_vector(gradients)
            dist.all_reduce(vector)
            nn.utils.vector_to_parameters(vector, gradients)
        grad_norm, is_finite = optimizer_step(optimizer, parameters, math.inf)  # never clipped
        means = dict(zip(TERMS, sums * run.world / num_images))  # the log divides by the ranks
        log.add(is_finite, grad_norm=grad_norm, **means)

        is_last_step = step == cfg.max_train_steps
        stopping = stop(step)
        if step % cfg.log_every == 0 or is_last_step:
            log.write(step)
        is_due = step % cfg.save_every == 0 or is_last_step
        if not cfg.bench:
            with log.pause():
                if is_due:
                    metrics = validate(cfg, run, model, soft, held_out)
                    texts = [f"{name} {value:.4g}" for name, value in metrics.items()]
                    say(f"held out, step {step}: {', '.join(texts)}")
                    if metrics["loss"] < best and run.rank == 0:
                        save_run(cfg, "best.pt", step, data.meta | metrics, soft=soft)
                    best = min(best, metrics["loss"])
                if (is_due or stopping) and run.rank == 0:
                    meta = data.meta | dict(best=best)
                    save_run(cfg, "last.pt", step, meta, soft=soft, optimizer=optimizer)
        if stopping:
            break
    loader.close()
    end_run(cfg, run, log, step, stopping)


# --------------------------------------------------------------------------------------------------
# Sampling
# --------------------------------------------------------------------------------------------------
def toy_texts(cfg, run):
    """The toy's held-out captions, and features of them and, last, of no text: context, pooled."""
    if cfg.prompts:
        fail("--prompts is for --model sd3: the toy draws its held-out captions")
    data = CaptionedData(cfg.data, cfg.resolution, "toy", held_out=True)
    prompts = [data.meta["class_names"][label] for label in data.array("labels")[data.rows]]
    batch = data[:]
    features = [batch["context"], batch["pooled"]]
    nulls = [torch.zeros_like(rows[:1]) for rows in features]
    return prompts, [torch.cat(pair).to(run.device) for pair in zip(features, nulls)]


def draw(cfg, run, model, soft, features, shape, y, randn):
    """x (B,C,H,W) by SD3's sampler, from texts y (B,): rows of features, the last is no text."""
    def velocity(x_t, t, y):
        texts = texts_of(cfg, *[rows[y] for rows in features])
        return soft_velocity(model, soft, x_t, t, *texts)

    y_null = torch.full_like(y, len(features[0]) - 1)
    with run.autocast():
        return sample(
            velocity, randn(*shape), y, y_null, times=sd3_times(cfg.num_steps),
            cfg_scale=cfg.cfg_scale, guidance_low=cfg.guidance_low,
            guidance_high=cfg.guidance_high)


def generate(cfg, run):
    """Sample cfg.sample images of the prompts in turn; returns the .npz file's path."""
    if cfg.model == "toy":
        prompts, features = toy_texts(cfg, run)
        shape = (3, 16, 16)
        meta = dict(vae=None)
    else:
        if cfg.resolution % 16 or cfg.resolution > 3072:
            fail(f"--resolution {cfg.resolution} is no multiple of 16 up to 3072, which SD3's "
                 f"positions reach")
        prompts, features = read_prompts(cfg.prompts, cfg.sd3_ckpt, cfg.merges, run.device)
        shape = (16, cfg.resolution // 8, cfg.resolution // 8)
        meta = SD3_VAE_META
    model = compile_blocks(load_model(cfg, run), cfg)
    soft = load_soft(cfg.ckpt, model).to(run.device) if cfg.soft else None
    name = "samples" if cfg.soft else "samples-base"
    if cfg.cfg_scale != 1:
        name += f"-cfg{cfg.cfg_scale:g}"
    decode = load_decoder(meta, "", cfg.sd3_ckpt, run.device)

    def images(y, randn):
        return {"arr_0": decode(draw(cfg, run, model, soft, features, shape, y, randn))}

    path = Path(cfg.out) / f"{name}.npz"
    labels = torch.arange(cfg.sample) % len(prompts)
    sample_npz(path, images, labels, cfg.seed, run.micro_batch, run)
    if run.rank == 0:
        text = json.dumps([prompts[i] for i in labels], indent=1)
        path.with_suffix(".json").write_text(text + "\n")
        save_picture(path.with_suffix(".png"), np.load(path)["arr_0"][:16])
    say(f"wrote {path}, .json and .png: {cfg.sample} images, {cfg.num_steps} steps, guidance "
        f"{cfg.cfg_scale:g}")
    return path


def try_out(cfg, run, model, soft, held_out):
    """Validation of the model with these tokens, or none; samples without guidance and with 2."""
    contrastive = replace(cfg, objective="contrastive")
    terms = validate(contrastive, run, model, soft, held_out, len(held_out) // cfg.batch_size)
    cfg = replace(cfg, sample=len(held_out), ckpt=f"{cfg.out}/best.pt", soft=soft is not None)
    plain = generate(replace(cfg, cfg_scale=1.0), run)
    guided = generate(replace(cfg, cfg_scale=2.0), run)
    return terms, np.load(plain)["arr_0"], np.load(guided)["arr_0"]


def report_toy(cfg, run):
    """Retrieval, gap and what 512 samples show, of the model alone and with its tokens."""
    held_out = CaptionedData(cfg.data, cfg.resolution, "toy", held_out=True)
    labels = held_out.array("labels")[held_out.rows]
    real = held_out[:]["images"].numpy()
    objects = np.load(Path(cfg.data) / "objects.npy")
    model = load_model(cfg, run)
    trained = load_soft(f"{cfg.out}/best.pt", model).to(run.device)
    share_exact = lambda images: (recognise(images, objects) == labels).mean()
    table = ["               retrieval   error gap   exact caption   with guidance 2"]
    pictures = [real[:24]]
    for name, soft in (("base", None), ("soft", trained)):
        terms, plain, guided = try_out(cfg, run, model, soft, held_out)
        table.append(f"{name:<12}{terms['retrieval']:12.1%}{terms['gap']:12.4f}"
                     f"{share_exact(plain):16.1%}{share_exact(guided):18.1%}")
        pictures.append(guided[:24])
    if run.rank == 0:
        rows = [part[i:i + 8] for i in (0, 8, 16) for part in pictures]
        save_picture(f"{cfg.out}/before-after.png", np.concatenate(rows))
        print(*table, sep="\n")
        print(f"retrieval: of {cfg.batch_size} captions an image's own has the least error; gap: "
              f"the others' mean error minus its own.\nThese two are trained. Whether samples "
              f"follow their captions better is what the last columns say,\nof {len(real)} samples "
              f"(real images: {share_exact(real):.0%}). {cfg.out}/before-after.png: rows of real "
              f"images,\nbase and soft samples of the same captions, with guidance 2")


def main(argv=None):
    """Train or sample, as the command line says; the toy does both and says what came of it."""
    cfg = parse(argv, Config, MODELS, RECIPES, RANGES, description=__doc__)
    world = int(os.environ.get("WORLD_SIZE", 1))
    if cfg.nrows and not cfg.sample and cfg.batch_size % (world * cfg.nrows):
        fail(f"--batch-size {cfg.batch_size} is no multiple of {world} ranks x --nrows {cfg.nrows}")
    if not cfg.min_t < cfg.max_t <= 1000:
        fail(f"--min-t {cfg.min_t} --max-t {cfg.max_t}: times are integers from the first to below "
             f"the second, of 1000")
    run = setup(cfg, micro_batch=cfg.nrows)
    with clear_errors(run, "--nrows (now {}), the gradient is the same; or add --recompute"):
        if cfg.sample:
            return generate(cfg, run)
        is_toy = cfg.model == "toy" and cfg.data == "data/pairs" and not cfg.bench
        if is_toy:
            make_data("pairs", cfg.data)
        train(cfg, run)
        if is_toy:
            report_toy(cfg, run)


if __name__ == "__main__":
    main()

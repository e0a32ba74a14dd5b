"""SoftREPA: text and image aligned by a few soft tokens (Lee et al., NeurIPS 2025, arXiv 2503.08250).

A text-to-image model (Stable Diffusion 3) is frozen. In front of the text tokens of its first blocks stand a few that
are learned, less than a million numbers; block after block their outputs are thrown away. They are trained by contrast:
the denoising error of an image must be lower under its own caption than under the other captions of the batch. They
stay for sampling, in both branches of the guidance.

    e[i,j] = mean |v_theta(x_t,i , t, text j, soft) - v_i|^2       l[i,j] = 4 exp(-e[i,j] / 0.07)
    L = mean_i CrossEntropy(l[i,:], i) + dweight mean_i e[i,i]     softmax over the TEXTS of one image, rows only

    python softrepa.py                    the toy: a small model, its tokens, samples without and with them; 5 minutes
    python softrepa.py --objective fm --out runs/softrepa-fm      the control: plain flow matching of the same tokens
    python prepare.py text --images coco/train2017 --captions captions_train2017.json --out data/coco512
    torchrun --nproc_per_node=8 softrepa.py --model sd3 --data data/coco512
    python softrepa.py --model sd3 --resolution 1024 --sample 4 --prompts FILE --ckpt runs/softrepa-sd3/best.pt

Published for SD3, without and with tokens (28 steps, guidance 4, 1024 px, 5,000 captions of COCO val2017; the project's
page): ImageReward .942 / 1.085, CLIP .263 / .269, HPS .280 / .289, LPIPS .424 / .428; and by notes of the paper FID
31.59 / 36.21 and GenEval .68 / .70, of which COUNTING falls from .56 to .29. Run by us: the toy, and SD3's code on
random weights; not SD3 itself, and none of these metrics is here.

What differs from repa.py: the model does not learn; a step looks at all pairs of its images and texts at ONE time with
ONE noise; no labels, no EMA, no teacher. Ranks split the images of a step, and each sees all texts: rows of the softmax
do not touch, so any number of GPUs, or of rows at once (--nrows), gives the same gradient, reduced once a step.

What differs from the official code, on purpose: bf16, not fp16 with a loss scaler; chunks count by their rows and share
one noise; the trained time tokens are used for sampling (the official sample.py draws new ones); a time of 1000 gets
the last row alone, not with its batch; the loss hardly moves from log B, so retrieval and the error gap are logged, and
held-out pairs pick the checkpoint. T5 is left out, as SD3 allows (77 rows of zeros); the released tokens were trained
with it. One caption per image, as in the official multi-GPU trainer: 37 GB of features for COCO.
"""
import argparse
import functools
import inspect
import json
import math
import os
import re
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Literal, get_args, get_origin

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import distributed as dist
from torch.utils.checkpoint import checkpoint

from common import (CLIP_LENGTH, SD3_MEDIUM, SD3_VAE_META, CaptionedData, Log, MMDiT, RandomPairs, catch_stop,
                    clean_input, clear_errors, end_run, fail, first_line, first_rank_first, flop_counter, interpolate,
                    load_checkpoint, load_decoder, load_sd3_network, load_sd3_text, make_folder, micro_batches,
                    pad_context, process_group_backend, run_tool, sample, sample_npz, save_checkpoint, save_picture,
                    say, sd3_times, step_draws, store_bf16)


@dataclass
class Config:
    """One field is one flag. The values here are the official ones for SD3; RECIPES holds what the toy changes."""
    model: str = "toy"                                    # toy, or sd3; it picks the recipe
    data: str = "data/coco{resolution}"                   # folder made by prepare.py text
    out: str = "runs/softrepa-{model}"                    # config.json, log.jsonl, last.pt, best.pt
    resolution: int = 512                                 # pixels; sampling takes any multiple of 16, SD3's own is 1024
    batch_size: int = 16                                  # images and texts of a step, over all GPUs: all their pairs
    max_train_steps: int = 14_800                         # two epochs of COCO train2017; the released tokens': unknown
    learning_rate: float = 1e-3                           # AdamW; by a cosine to 1e-5, anew every 5000 steps
    precision: Literal["auto", "bf16", "fp32"] = "auto"   # auto = bf16 on CUDA, fp32 elsewhere
    compile: bool = None                                  # torch.compile each block; default: on CUDA
    seed: int = 0                                         # of the tokens, the order of images and every draw
    workers: int = 4                                      # data processes per GPU
    log_every: int = 50                                   # steps
    save_every: int = 500                                 # steps between validations and writes of last.pt
    init: str = ""                                        # start from these tokens, as --ckpt
    ckpt: str = ""                                        # tokens to sample with: our file, or the released folder
    sample: int = 0                                       # generate this many images instead of training
    num_steps: int = 28                                   # of the sampler: Euler, SD3's shifted times
    cfg_scale: float = 4.0                                # guidance scale; 1 = none
    guidance_low: float = 0.0                             # guidance acts for t from here
    guidance_high: float = 1.0                            # to here; t = 1 is noise
    bench: int = 0                                        # train this many steps on random data and weights
    objective: Literal["contrastive", "fm"] = "contrastive"  # fm: plain flow matching on as many pairs, all fresh
    n_dc_tokens: int = 4                                  # soft tokens of a block
    n_dc_layers: int = 5                                  # blocks that have them, from the first
    use_dc_t: bool = True                                 # tokens depend on time, by a table of 100 rows
    dweight: float = 0.0                                  # weight of the own caption's error; official: SD1.5, SDXL 10
    min_t: int = 0                                        # times are integers from here, of 1000
    max_t: int = 1000                                     # to below this
    wd: float = 1e-4                                      # weight decay
    nrows: int = 0                                        # images per GPU at once, each with all texts; 0 = all
    recompute: bool = False                               # recompute blocks in the backward pass: slower, less memory
    sd3_ckpt: str = ""                                    # sd3_medium_incl_clips.safetensors instead of the hub
    merges: str = ""                                      # CLIP's merges.txt instead of the hub
    prompts: str = ""                                     # file of prompts to sample, one per line
    soft: bool = True                                     # sample with the tokens; --no-soft shows the model alone

    @property
    def micro_batch(self):  # what the plumbing calls the images per GPU at once
        return self.nrows


MODELS = "toy", "sd3"
RECIPES = {"toy": dict(data="data/pairs", resolution=16, batch_size=8, max_train_steps=1000, n_dc_layers=3,
                       workers=0, log_every=50, save_every=100, num_steps=20, cfg_scale=1.0)}
# What may change between a run and its continuation: how it is carried out, not what it computes.
BOOKKEEPING = ("data out max_train_steps compile workers log_every save_every init ckpt sample num_steps cfg_scale "
               "guidance_low guidance_high bench nrows recompute sd3_ckpt merges prompts soft").split()
RANGES = [("resolution batch_size max_train_steps log_every save_every num_steps cfg_scale n_dc_tokens n_dc_layers "
           "max_t", 1, 1e12), ("learning_rate seed workers sample bench dweight min_t wd nrows", 0, 1e12),
          ("guidance_low guidance_high", 0, 1)]


# ---------------------------------------------------------------------------------------------------------------------
# The method
# ---------------------------------------------------------------------------------------------------------------------
TERMS = "loss", "error", "retrieval", "gap"
LOGIT_SCALE, TEMPERATURE = 4.0, 0.07  # constants in the official code, too: its optimiser does not get them


class SoftTokens(nn.Module):
    """s(k,t) = dc[k] + dc_t[row(t), k], (B,m,D) for block k: m tokens, which share what they owe to the time.

    dc_tokens (L,m,D), or (L,m,K) in the width of text features: those pass through the model's own text embedder.
    dc_t_tokens: 100 rows of L chunks of D, one row per 10 of the 1000 times. Names as in the released files.
    """

    def __init__(self, n_layers, n_tokens, width, use_time=True, token_width=None):
        super().__init__()
        self.n_layers, self.width = n_layers, width
        self.dc_tokens = nn.Parameter(0.02 * torch.randn(n_layers, n_tokens, token_width or width))
        self.dc_t_tokens = nn.Embedding(100, n_layers * width) if use_time else None
        if use_time:
            nn.init.normal_(self.dc_t_tokens.weight, std=0.02)

    def forward(self, k, t, context_embedder):
        """The tokens before the text of block k at times t (B,) in [0,1]: (B,m,D)."""
        tokens = self.dc_tokens[k]
        if tokens.shape[1] != self.width:
            tokens = context_embedder(tokens)
        tokens = tokens.expand(len(t), -1, -1)
        if self.dc_t_tokens is None:
            return tokens
        row = ((1000 * t).long() // 10).clamp(max=99)
        return tokens + self.dc_t_tokens(row).unflatten(1, (self.n_layers, 1, self.width))[:, k]  # (B,1,D)


def soft_velocity(model, soft, x_t, t, context, pooled, recompute=False):
    """Velocity (B,C,H,W) of an MM-DiT whose first blocks have soft tokens before their text; soft None: of the model.

    Text tokens pass on what they learned from the soft ones; the soft ones' own outputs end with their block.
    """
    text, h, c = model.embed(x_t, t, context, pooled)
    n = text.shape[1]
    for k, block in enumerate(model.blocks):
        if soft is not None and k < soft.n_layers:
            text = torch.cat([soft(k, t, model.context_embedder), text], dim=1)  # (B,m+n,D)
        text, h = checkpoint(block, text, h, c, use_reentrant=False) if recompute else block(text, h, c)
        text = text[:, -n:]
    return model.head(h, c, x_t.shape[-2:])


def flow_errors(velocity, x, t, noise, context, pooled):
    """(B,): mean squared velocity error of each image under the text beside it. x, noise (B,C,H,W); t (B,)."""
    x_t, v = interpolate(x, noise, t)
    return (velocity(x_t, t, context, pooled) - v).square().mean(dim=(1, 2, 3))


def pair_errors(velocity, x, t, noise, context, pooled):
    """e (R,B): the error of every image x (R,C,H,W) under every text, context (B,n,K) and pooled (B,P).

    t (1,) and noise (1,C,H,W) are the same for all pairs: only what image and text have to do with each other differs.
    """
    R, B = len(x), len(context)
    x, noise, t = x.repeat_interleave(B, dim=0), noise.expand(R * B, -1, -1, -1), t.expand(R * B)
    return flow_errors(velocity, x, t, noise, context.repeat(R, 1, 1), pooled.repeat(R, 1)).view(R, B)


def contrastive_loss(errors, own, dweight=0.0):
    """(R,): cross-entropy over the B TEXTS of each image, from e (R,B) and the column own (R,) of its caption."""
    logits = LOGIT_SCALE * torch.exp(-errors / TEMPERATURE)
    loss = F.cross_entropy(logits, own, reduction="none")
    return loss + dweight * errors.gather(1, own[:, None])[:, 0]


def step_terms(cfg, velocity, x, t, noise, context, pooled, own):
    """(n, R) of the images own (R,): loss and own error; of pairs also "own caption is best" and the gap to others."""
    if cfg.objective == "fm":
        errors = flow_errors(velocity, x[own], t[own], noise[own], context[own], pooled[own])
        return torch.stack([errors, errors])
    errors = pair_errors(velocity, x[own], t[:1], noise[:1], context, pooled)
    loss, mine = contrastive_loss(errors, own, cfg.dweight), errors.gather(1, own[:, None])[:, 0]
    others = (errors.sum(dim=1) - mine) / (errors.shape[1] - 1)
    return torch.stack([loss, mine, (mine <= errors.amin(dim=1)).float(), others - mine])


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


def optimizer_step(optimizer, parameters, max_grad_norm):
    """Clip, update, clear; returns (norm, is it finite). If not, the update is skipped: on the device, on all ranks."""
    grad_norm = nn.utils.clip_grad_norm_(parameters, max_grad_norm)
    finite = grad_norm.isfinite()
    optimizer.found_inf = (~finite).float()  # fused AdamW's own switch, made for loss scalers
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return grad_norm, finite


def save_run(cfg, name, step, meta, **parts):
    """Write a checkpoint of these parts (model, ema, optimizer) into cfg.out; nothing random is in it."""
    state = {part: value.state_dict() if hasattr(value, "state_dict") else value for part, value in parts.items()}
    save_checkpoint(Path(cfg.out) / name, state | dict(step=step, config=asdict(cfg), data=meta))


# ---------------------------------------------------------------------------------------------------------------------
# Training and sampling
# ---------------------------------------------------------------------------------------------------------------------
def load_soft(path, model):
    """Soft tokens from our checkpoint, or from the folder of a released pair dc_tokens.pth, dc_t_tokens.pth."""
    path = Path(path)
    if path.is_dir():
        weights = {"dc_tokens": load_checkpoint(path / "dc_tokens.pth", torch.Tensor)}
        if (path / "dc_t_tokens.pth").is_file():  # a pickled module, of a class that can do no harm
            with torch.serialization.safe_globals([nn.Embedding]):
                weights["dc_t_tokens.weight"] = load_checkpoint(path / "dc_t_tokens.pth", nn.Embedding).weight
    else:
        weights = load_checkpoint(path).get("soft", {})
    if "dc_tokens" not in weights or weights["dc_tokens"].ndim != 3:
        fail(f"{path} holds no soft tokens (layers, tokens, width) of SD3: SD1.5's and SDXL's are not read here")
    (n_layers, n_tokens, token_width), width = weights["dc_tokens"].shape, model.context_embedder.out_features
    rows = weights.get("dc_t_tokens.weight", torch.empty(100, n_layers * width)).shape
    if (token_width not in (width, model.context_embedder.in_features) or n_layers > len(model.blocks)
            or rows != (100, n_layers * width)):
        fail(f"{path} has tokens of width {token_width} for {n_layers} blocks, with time tokens {tuple(rows)}; this "
             f"model has width {width} and {len(model.blocks)} blocks: they were trained for another --model")
    soft = SoftTokens(n_layers, n_tokens, width, "dc_t_tokens.weight" in weights, token_width)
    soft.load_state_dict({name: tensor.detach().float() for name, tensor in weights.items()})
    return soft


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


def texts_of(cfg, batch):
    """Text features of a batch as the network takes them: context (B,n,K) and pooled (B,P), float32."""
    context, pooled = batch["context"].float(), batch["pooled"].float()
    return context if cfg.model == "toy" else pad_context(context, SD3_MEDIUM["context_dim"]), pooled


def scheduled_rate(cfg, step):
    """Learning rate of a step (from 1): down a cosine to 1e-5 in ten stairs of 500 steps, then again from the top."""
    stair = (step - 1) // 500 % 10
    return 1e-5 + (cfg.learning_rate - 1e-5) * (1 + math.cos(math.pi * stair / 10)) / 2


def step_chunks(cfg, run, velocity, data, batch, draws):
    """The terms (n,R) of a step, chunk by chunk of this rank's images: --nrows of them, each with all texts.

    draws = normal, uniform of the whole step: every rank has all of its texts, and the same noise and time.
    """
    normal, uniform = draws
    posterior, noise, u = normal(*data.shape), normal(*data.shape), uniform()
    t = (cfg.min_t + (cfg.max_t - cfg.min_t) * u).floor() / 1000
    x, count = clean_input(batch, data.meta, posterior), len(batch["context"])
    context, pooled = texts_of(cfg, batch)
    at_once = run.micro_batch * count // cfg.batch_size  # flow matching counts pairs, a batch of them per image
    for own in torch.arange(run.rank, count, run.world, device=run.device).split(at_once):
        with run.autocast():
            yield step_terms(cfg, velocity, x, t, noise, context, pooled, own)


@torch.no_grad()
def validate(cfg, run, model, soft, data, batches=16):
    """Means over batches of held-out pairs, always the same ones with the same draws: {term: value}."""
    velocity, sums = functools.partial(soft_velocity, model, soft), 0
    count = cfg.batch_size if cfg.objective == "contrastive" else cfg.batch_size ** 2
    whole = SimpleNamespace(rank=0, world=1, micro_batch=count, device=run.device)
    loader = micro_batches(data, 0, count, whole)
    for i, batch in zip(range(batches), loader):
        draws = step_draws(1, i, count, whole)
        sums = sums + sum(terms.sum(dim=1) for terms in step_chunks(cfg, run, velocity, data, batch, draws))
    loader.close()
    if run.world > 1:
        dist.all_reduce(sums)
    return dict(zip(TERMS, (sums / (count * batches)).tolist()))


def resume(cfg, meta, soft, optimizer):
    """Continue the run in cfg.out, or begin: the number of steps done, and the least validation loss so far."""
    path = Path(cfg.out) / "last.pt"
    if cfg.bench or not path.exists():
        return 0, math.inf
    saved = load_checkpoint(path)
    if "soft" not in saved:
        fail(f"{path} is no checkpoint of a run: choose another --out")
    old, new = ({name: value for name, value in config.items() if name not in BOOKKEEPING}
                | dict(data=f"{data['source']}, {data['count']} pairs")
                for config, data in ((saved["config"], saved["data"]), (asdict(cfg), meta)))
    if changed := [f"{name} {old.get(name)!r}, now {new.get(name)!r}" for name in old | new
                   if old.get(name) != new.get(name)]:
        fail(f"{cfg.out} holds another run ({'; '.join(changed)}): choose another --out")
    soft.load_state_dict(saved["soft"])
    optimizer.load_state_dict(saved["optimizer"])
    return saved["step"], saved["data"]["best"]


def train(cfg, run):
    """Begin or continue the run in cfg.out."""
    is_random = cfg.bench and cfg.model == "sd3"
    data, held_out = [RandomPairs(cfg.resolution) if is_random else
                      CaptionedData(cfg.data, cfg.resolution, cfg.model, is_held_out) for is_held_out in (False, True)]
    if len(held_out) < cfg.batch_size:
        fail(f"{cfg.data} holds out {len(held_out)} pairs, --batch-size is {cfg.batch_size}: prepare more")
    model = load_model(cfg, run)
    if cfg.n_dc_layers > len(model.blocks):
        fail(f"--n-dc-layers {cfg.n_dc_layers} is more than the {len(model.blocks)} blocks of {cfg.model}")
    torch.manual_seed(cfg.seed)
    soft = (load_soft(cfg.init, model) if cfg.init else SoftTokens(
        cfg.n_dc_layers, cfg.n_dc_tokens, model.context_embedder.out_features, cfg.use_dc_t)).to(run.device)
    parameters = list(soft.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=cfg.learning_rate, weight_decay=cfg.wd, fused=True)
    first_step, best = resume(cfg, data.meta, soft, optimizer)
    if first_step >= cfg.max_train_steps:
        return say(f"{cfg.out} is finished: {first_step} steps; --max-train-steps trains on, --out begins another run")
    flops_per_image = describe(cfg, run, data, model, soft)
    log, stop = Log(cfg, run, first_step, flops_per_image), catch_stop(run)
    compile_blocks(model, cfg)
    velocity = functools.partial(soft_velocity, model, soft, recompute=cfg.recompute)
    count = cfg.batch_size if cfg.objective == "contrastive" else cfg.batch_size ** 2
    whole = SimpleNamespace(rank=0, world=1, micro_batch=count, device=run.device)  # every rank has all texts
    loader = micro_batches(data, cfg.seed, count, whole, first_step, cfg.workers)

    for step in range(first_step + 1, cfg.max_train_steps + 1):
        optimizer.param_groups[0]["lr"], sums = scheduled_rate(cfg, step), 0
        draws = step_draws(cfg.seed, step, count, whole)
        for terms in step_chunks(cfg, run, velocity, data, next(loader), draws):
            (terms[0].sum() / count).backward()  # chunks and ranks add up to the mean over all images
            sums = sums + terms.detach().sum(dim=1)
        if run.world > 1:  # the one reduction of a step
            gradients = torch.cat([p.grad.flatten() for p in parameters])
            dist.all_reduce(gradients)
            for p, gradient in zip(parameters, gradients.split([p.numel() for p in parameters])):
                p.grad = gradient.view_as(p)
        grad_norm, finite = optimizer_step(optimizer, parameters, math.inf)  # the official code does not clip
        log.add(finite, grad_norm=grad_norm, **dict(zip(TERMS, sums * run.world / count)))

        last, stopping = step == cfg.max_train_steps, stop(step)
        if step % cfg.log_every == 0 or last:
            log.write(step)
        with log.pause():
            if (step % cfg.save_every == 0 or last) and not cfg.bench:
                figures = validate(cfg, run, model, soft, held_out)
                say(f"held out, step {step}: " + ", ".join(f"{name} {value:.4g}" for name, value in figures.items()))
                if figures["loss"] < best and run.rank == 0:
                    save_run(cfg, "best.pt", step, data.meta | figures, soft=soft)
                best = min(best, figures["loss"])
            if (step % cfg.save_every == 0 or last or stopping) and run.rank == 0 and not cfg.bench:
                save_run(cfg, "last.pt", step, data.meta | dict(best=best), soft=soft, optimizer=optimizer)
        if stopping:
            break
    loader.close()
    end_run(cfg, run, log, step, stopping)


def describe(cfg, run, data, model, soft):
    """Say what is about to run, and write config.json; returns the model FLOPs of training on one image."""
    inputs = torch.zeros(1, *data.shape), torch.zeros(1), *texts_of(cfg, data[np.arange(1)])
    with flop_counter() as counter, torch.no_grad(), run.autocast():
        soft_velocity(model, soft, *(tensor.to(run.device) for tensor in inputs))
    # The backward pass goes through the activations only, for no weight learns: it costs one forward pass.
    flops = 2 * cfg.batch_size * counter.get_total_flops()
    frozen, count = (sum(p.numel() for p in module.parameters()) for module in (model, soft))
    say(f"{cfg.model}: {count:,} trained numbers before {frozen / 1e6:,.2f} M frozen ones, {flops / 1e9:,.2f} GFLOP a "
        f"training image with {cfg.batch_size} texts, {cfg.precision}{', compiled' if cfg.compile else ''}")
    say(f"{cfg.data}: {len(data):,} pairs; {cfg.max_train_steps:,} steps, {len(data) / cfg.batch_size:,.1f} an epoch")
    say(f"{cfg.batch_size} x {cfg.batch_size} pairs a step = {run.world} x {run.device.type} x {run.accumulation} "
        f"chunks of {run.micro_batch} images; results in {cfg.out}")
    if run.rank == 0 and not cfg.bench:
        make_folder(cfg.out)
        (Path(cfg.out) / "config.json").write_text(json.dumps(asdict(cfg), indent=1) + "\n")
    return flops


def read_texts(cfg, run):
    """Prompts, and the features of them and, last, of the null text; the toy's are its held-out captions, and zeros."""
    if cfg.model == "toy":
        if cfg.prompts:
            fail("--prompts is for --model sd3: the toy draws its held-out captions")
        data = CaptionedData(cfg.data, cfg.resolution, "toy", held_out=True)
        prompts, held_out = [data.meta["class_names"][i] for i in data.array("labels")[data.rows.start:]], data[:]
        return prompts, {name: torch.cat([held_out[name], torch.zeros_like(held_out[name][:1])]).to(run.device)
                         for name in ("context", "pooled")}
    try:
        prompts = [line.strip() for line in Path(cfg.prompts).read_text().splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        fail(f"cannot read the prompts ({first_line(error)}): give --prompts FILE, one per line")
    encode, tokenizer = load_sd3_text(cfg.sd3_ckpt, cfg.merges, run.device)
    ids = [tokenizer.encode(prompt) for prompt in [*prompts, ""]]
    for prompt, each in zip(prompts, ids):
        if len(each) > CLIP_LENGTH - 2:
            fail(f"a prompt has {len(each)} tokens, CLIP reads {CLIP_LENGTH - 2}: shorten {prompt[:40]!r}...")
    features = [encode(ids[i:i + 64]) for i in range(0, len(ids), 64)]
    return prompts, {name: torch.cat(parts).half() for name, parts in zip(("context", "pooled"), zip(*features))}


def generate(cfg, run):
    """Sample cfg.sample images of the prompts, in turn; returns the path of the .npz file, beside it the prompts."""
    if cfg.model == "sd3" and (cfg.resolution % 16 or cfg.resolution > 3072):
        fail(f"--resolution {cfg.resolution} is no multiple of 16 up to 3072, which SD3's positions reach")
    prompts, features = read_texts(cfg, run)
    model = compile_blocks(load_model(cfg, run), cfg)
    soft = load_soft(cfg.ckpt, model).to(run.device) if cfg.soft else None
    size = cfg.resolution // 8
    shape, meta = ((3, 16, 16), dict(vae=None)) if cfg.model == "toy" else ((16, size, size), SD3_VAE_META)
    decode = load_decoder(meta, "", cfg.sd3_ckpt, run.device)

    def velocity(x_t, t, y):
        return soft_velocity(model, soft, x_t, t, *texts_of(cfg, {name: part[y] for name, part in features.items()}))

    def generate_batch(y, randn):
        with run.autocast():
            x = sample(velocity, randn(*shape), y, torch.full_like(y, len(prompts)), times=sd3_times(cfg.num_steps),
                       cfg_scale=cfg.cfg_scale, guidance_low=cfg.guidance_low, guidance_high=cfg.guidance_high)
        return {"arr_0": decode(x)}

    name = "samples" + "-base" * (not cfg.soft) + f"-cfg{cfg.cfg_scale:g}" * (cfg.cfg_scale != 1)
    path, labels = Path(cfg.out) / f"{name}.npz", torch.arange(cfg.sample) % len(prompts)
    with torch.no_grad():
        sample_npz(path, generate_batch, labels, cfg.seed, run.micro_batch, run)
    if run.rank == 0:
        path.with_suffix(".json").write_text(json.dumps([prompts[i] for i in labels], indent=1) + "\n")
        save_picture(path.with_suffix(".png"), np.load(path)["arr_0"][:16])
    say(f"wrote {path}, .json and .png: {cfg.sample} images, {cfg.num_steps} steps, guidance {cfg.cfg_scale:g}")
    return path


def recognise(images, objects):
    """Captions (N,) that images (N,16,16,3) show: on either side the nearest of objects (6,4,8,16,8,3). It is exact."""
    halves = images.reshape(-1, 16, 2, 8, 3).swapaxes(1, 2).reshape(-1, 384).astype(np.float32)  # (2N,384)
    templates = objects.reshape(-1, 384).astype(np.float32)
    nearest = ((templates ** 2).sum(axis=1) - 2 * halves @ templates.T).argmin(axis=1)  # place comes last
    return (nearest // objects.shape[2]).reshape(-1, 2) @ np.array([24, 1])


def report_toy(cfg, run):
    """Retrieval and gap on held-out pairs, and what 512 samples show, of the model alone and with its tokens."""
    held_out, ckpt = CaptionedData(cfg.data, cfg.resolution, "toy", held_out=True), f"{cfg.out}/best.pt"
    labels, real, model = held_out.array("labels")[held_out.rows], held_out[:]["images"].numpy(), load_model(cfg, run)
    objects, table, pictures = np.load(Path(cfg.data) / "objects.npy"), [], [real[:24]]
    for name, soft in (("base", None), ("soft", load_soft(ckpt, model).to(run.device))):
        pairs = validate(replace(cfg, objective="contrastive"), run, model, soft, held_out, len(real) // cfg.batch_size)
        paths = [generate(replace(cfg, sample=len(real), ckpt=ckpt, soft=soft is not None, cfg_scale=scale), run)
                 for scale in (1.0, 2.0)]
        exact = [(recognise(np.load(path)["arr_0"], objects) == labels).mean() for path in paths]
        table.append(f"{name:<12}{pairs['retrieval']:12.1%}{pairs['gap']:12.4f}{exact[0]:16.1%}{exact[1]:18.1%}")
        pictures.append(np.load(paths[1])["arr_0"][:24])
    if run.rank == 0:
        print("               retrieval   error gap   exact caption   with guidance 2", *table, sep="\n")
        rows = np.stack(pictures).reshape(3, 3, 8, 16, 16, 3).swapaxes(0, 1).reshape(-1, 16, 16, 3)
        save_picture(f"{cfg.out}/before-after.png", rows)
        print(f"retrieval: of {cfg.batch_size} captions an image's own has the least error; gap: the others' mean "
              "error minus its own.\nThese two are trained. Whether samples follow their captions better is what the "
              f"last columns say,\nof {len(real)} samples (real images: "
              f"{(recognise(real, objects) == labels).mean():.0%}). {cfg.out}/before-after.png: rows of real images,\n"
              "base and soft samples of the same captions, with guidance 2")


def main(argv=None):
    """Train or sample, as the command line says; the toy does both and says what came of it."""
    cfg = parse(argv)
    world = int(os.environ.get("WORLD_SIZE", 1))
    if cfg.nrows and not cfg.sample and cfg.batch_size % (world * cfg.nrows):
        fail(f"--batch-size {cfg.batch_size} is no multiple of {world} ranks x --nrows {cfg.nrows}")
    if not cfg.min_t < cfg.max_t <= 1000:
        fail(f"--min-t {cfg.min_t} --max-t {cfg.max_t}: times are integers from the first to below the second, of 1000")
    run = setup(cfg)
    with clear_errors(run, "--nrows (now {}), the gradient is the same; or add --recompute"):
        if cfg.sample:
            return generate(cfg, run)
        is_toy = cfg.model == "toy" and cfg.data == "data/pairs" and not cfg.bench
        with first_rank_first():
            if is_toy and not Path(cfg.data, "meta.json").exists():
                run_tool("prepare.py", "pairs", "--out", cfg.data)
        train(cfg, run)
        if is_toy:
            report_toy(cfg, run)


if __name__ == "__main__":
    main()

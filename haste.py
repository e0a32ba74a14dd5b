"""HASTE: holistic alignment with stage-wise termination (Wang et al., NeurIPS 2025, arXiv 2505.16792).

REPA helps early and hinders late, when its gradient turns against the one of denoising. So HASTE aligns more, and then
stops. In phase I some early blocks must not only predict the teacher's features, but also LOOK where it looks: head m
of a student block learns the attention map that head m of a late block of the teacher has of the clean image. After
`early_stop_point` updates both terms go at once: phase II is plain SiT, in its loss and in what it costs.

    L = mean |v_theta(x_t, t, y) - v|^2 - lambda_R mean_tokens cos(MLP(h), z)
        - lambda_A mean_{pairs, heads, queries} sum_keys softmax(A_teacher) log softmax(A_student)   A = q k^T / sqrt(d)

    python haste.py                         the toy, on any machine: data, training, samples, figures; 3 minutes
    python haste.py --early-stop-point 2000      aligned to the end; 0 = plain SiT; --attn-coeff 0 = REPA that stops
    torchrun --nproc_per_node=8 haste.py --model SiT-XL/2                     the paper's recipe, on data/imagenet256
    torchrun --nproc_per_node=8 haste.py --model SiT-XL/2 --sample 50000 --ckpt runs/haste-SiT-XL-2/last.pt
    torchrun --nproc_per_node=8 haste.py --model SiT-XL/2 --resolution 512 --early-stop-point 300000
    python haste.py --model SiT-B/2 --bench 50 --early-stop-point 25          the speed of both phases

Published at 256 px, SDE with 250 steps, without guidance (--cfg-scale 1): FID 5.3 for SiT-XL/2 after 500K training
steps, the defaults (8.1 if it never stops; but 7.3 against 5.5 at 400K: judge by no single checkpoint), 19.6 for B/2
after 400K (21.3 without a stop). After 2.5M, guided by 1.65 on t in [0, 0.72]: 1.42. Run by us: toy and checks only.

Different from repa.py: block_with_logits, AttentionTeacher, attention_loss, and in `train` the place where a phase
begins. What differs from the official code, on purpose, beside what repa.py lists: after the stop it still runs
teacher, projector and logits on every batch; here they end, and images are read no more. Its loss is written for blocks
4 to 7, twelve heads and 256 tokens: the paper's B/2 crashes in it, and 512 px cut each row of a map in four; here any
sizes. It takes log(softmax), infinite for peaked maps, and computes logits of all heads and early blocks; here
log_softmax, and only those aligned. It replaces files of DINOv2, wrongly for registers; here a stock timm model.
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
    out: str = "runs/haste-{model}"                       # config.json, log.jsonl, last.pt, ema-*.pt, preview-*.png
    resolution: int = 256                                 # pixels
    batch_size: int = 256                                 # images per step, over all GPUs
    micro_batch: int = 0                                  # images per GPU at once; 0 = batch size / GPUs
    max_train_steps: int = 500_000                        # the paper's tables; its best model has 2.5M
    learning_rate: float = 1e-4                           # AdamW, constant
    max_grad_norm: float = 1.0                            # gradients are clipped to this norm
    ema_decay: float = 0.9999                             # of the averaged weights, every step
    cfg_prob: float = 0.1                                 # labels dropped, for classifier-free guidance
    path_type: Literal["linear", "cosine"] = "linear"     # interpolant
    weighting: Literal["uniform", "lognormal"] = "uniform"  # distribution of t
    enc_type: str = "dinov2-vit-b"                        # the teacher; prepared = DATA/teacher.pt
    teacher_ckpt: str = ""                                # its weights from a file instead of the hub
    encoder_depth: int = 8                                # features: after this block, counted from 1
    proj_coeff: float = 0.5                               # lambda_R; 0 = no features
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
    cfg_scale: float = 1.65                               # guidance scale; 1 = none
    guidance_low: float = 0.0                             # guidance acts for t from here
    guidance_high: float = 0.72                           # to here; t = 1 is noise
    bench: int = 0                                        # train this many steps on synthetic data, write nothing
    projector_dim: int = 2048                             # width of the projector's hidden layers
    attn_coeff: float = 0.5                               # lambda_A; 0 = no attention: REPA that stops
    early_stop_point: int = 250_000                       # updates with alignment; plain SiT after them
    student_layers: list[int] = None                      # blocks whose attention is aligned, from 0; default: by model
    teacher_layers: list[int] = None                      # each one's partner in the teacher, from 0; default: by model
    align_heads: int = 12                                 # of them the first heads, head m with head m


MODELS = SIT_SIZES
RECIPES = {  # by the beginning of the model's name
    "toy": dict(data="data/toy", resolution=16, batch_size=32, max_train_steps=2000, learning_rate=4e-3, ema_decay=0.99,
                enc_type="prepared", encoder_depth=2, projector_dim=256, workers=0, log_every=50, save_every=500,
                keep_every=0, preview_every=400, mode="ode", num_steps=20, cfg_scale=1.0, guidance_high=1.0,
                early_stop_point=1000, student_layers=[0, 1], teacher_layers=[2, 3], align_heads=4),
    # The paper's Table 16, but for S, which it does not have. DINOv2-B has 12 blocks of 12 heads.
    "SiT-S": dict(max_train_steps=400_000, encoder_depth=5, early_stop_point=100_000,
                  student_layers=[2, 3, 4], teacher_layers=[7, 9, 11], align_heads=6),
    "SiT-B": dict(max_train_steps=400_000, encoder_depth=5, early_stop_point=100_000,
                  student_layers=[2, 3, 4], teacher_layers=[7, 9, 11]),
    "SiT-L": dict(max_train_steps=400_000, student_layers=[4, 5, 6, 7], teacher_layers=[8, 9, 10, 11]),
    "SiT-XL": dict(student_layers=[4, 5, 6, 7], teacher_layers=[8, 9, 10, 11]),
}
# What may change between a run and its continuation: how it is carried out, not what it computes.
BOOKKEEPING = ("data out micro_batch max_train_steps teacher_ckpt vae vae_ckpt compile workers log_every save_every "
               "keep_every preview_every ckpt sample labels mode num_steps heun cfg_scale guidance_low guidance_high "
               "bench").split()
RANGES = [("resolution batch_size max_train_steps log_every save_every num_steps cfg_scale projector_dim", 1, 1e12),
          ("micro_batch learning_rate proj_coeff seed workers keep_every preview_every sample bench", 0, 1e12),
          ("attn_coeff early_stop_point", 0, 1e12), ("align_heads", 1, 1e12),
          ("ema_decay cfg_prob guidance_low guidance_high", 0, 1), ("max_grad_norm", 1e-12, 1e12)]


# ---------------------------------------------------------------------------------------------------------------------
# The method
# ---------------------------------------------------------------------------------------------------------------------
class AttentionTeacher(nn.Module):
    """A frozen vision transformer that also tells where it looks: images (B,H,W,3) uint8 -> (tokens, logits).

    tokens [(B,N,K)]; logits: for each of `layers` the (B,heads,N,N) of its first heads, patches looking at patches.
    Class token and registers leave before the softmax, as queries and as keys. All in one forward pass, float32.
    """

    def __init__(self, teacher, layers, heads):
        super().__init__()
        self.teacher, self.layers, self.heads, self.qkv = teacher, layers, heads, {}
        for i in layers:  # the hook leaves the projection (B,1+N,3K) of block i in self.qkv
            teacher.vit.blocks[i].attn.qkv.register_forward_hook(
                lambda module, args, out, i=i, qkv=self.qkv: qkv.update({i: out}))

    @torch.no_grad()
    def forward(self, images):
        _, tokens = self.teacher(images)
        logits, first_patch = [], self.teacher.vit.num_prefix_tokens
        for i in self.layers:
            attn = self.teacher.vit.blocks[i].attn
            qkv = self.qkv[i][:, first_patch:].unflatten(2, (3, attn.num_heads, -1))  # (B,N,3,all heads,d)
            q, k, _ = qkv[:, :, :, :self.heads].permute(2, 0, 3, 1, 4)  # each (B,heads,N,d)
            logits.append(attn.scale * (attn.q_norm(q) @ attn.k_norm(k).mT).float())
        self.qkv.clear()
        return [tokens], logits


def block_with_logits(block, h, c, heads):
    """What a SiT block makes of tokens h (B,N,D), and attention logits (B,heads,N,N) of its first heads, float32."""
    shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = block.adaLN_modulation(c).chunk(6, dim=1)  # each (B,D)
    q, k, v = block.attn.split(modulate(block.norm1(h), shift_a, scale_a))  # each (B,all heads,N,d)
    h = h + gate_a.unsqueeze(1) * block.attn.attend(q, k, v)
    h = h + gate_m.unsqueeze(1) * block.mlp(modulate(block.norm2(h), shift_m, scale_m))
    return h, q.shape[-1] ** -0.5 * (q[:, :heads] @ k[:, :heads].mT).float()


class HASTESiT(SiT):
    """SiT that also shows, until `stop_alignment`, what is aligned: projected tokens, and attention logits."""

    def __init__(self, input_size, in_channels, num_classes, sizes, encoder_depth, z_dims, projector_dim,
                 student_layers, align_heads):
        super().__init__(input_size, in_channels, num_classes, **sizes)
        self.encoder_depth, hidden_size = encoder_depth, sizes["hidden_size"]
        self.student_layers, self.align_heads, self.aligned = student_layers, align_heads, True
        self.block_with_logits = block_with_logits  # --compile puts the compiled one here
        self.projectors = nn.ModuleList([nn.Sequential(
            nn.Linear(hidden_size, projector_dim), nn.SiLU(),
            nn.Linear(projector_dim, projector_dim), nn.SiLU(),
            nn.Linear(projector_dim, z_dim)) for z_dim in z_dims])
        self.projectors.apply(init_linear)

    def forward(self, x_t, t, y):
        """Velocity (B,C,H,W), projected tokens z_hat [(B,N,K)], and logits (B,heads,N,N) of each student layer."""
        if not self.aligned:
            return super().forward(x_t, t, y), [], []
        h, c = self.embed(x_t, t, y)
        z_hats, logits = [], {}
        for depth, block in enumerate(self.blocks, start=1):
            if depth - 1 in self.student_layers:  # these count from 0, as the paper does
                h, logits[depth - 1] = self.block_with_logits(block, h, c, self.align_heads)
            else:
                h = block(h, c)
            if depth == self.encoder_depth:
                z_hats = [projector(h) for projector in self.projectors]  # token-wise, (B,N,D) -> (B,N,K)
        return self.head(h, c), z_hats, [logits[i] for i in self.student_layers]

    def stop_alignment(self):
        """Plain SiT from now on; the projectors stay, unused, so that names are the same in all checkpoints."""
        self.aligned = False
        self.projectors.requires_grad_(False)

    def velocity(self, x_t, t, y):
        """Plain SiT, for sampling: no projector is run."""
        return super().forward(x_t, t, y)


def attention_loss(logits, teacher_logits):
    """Cross-entropy of the student's attention with the teacher's, and KL(teacher || student), each (B,).

    Both lists hold one (B,heads,N,N) per pair of blocks: before softmax, queries x keys. The cross-entropy is the KL
    plus the teacher's entropy: same gradient, but its least value is that entropy (at most log N), not 0.
    """
    cross_entropy, entropy = [], []  # (B,) a pair
    for a_student, a_teacher in zip(logits, teacher_logits, strict=True):
        log_q, log_p = (a.float().log_softmax(dim=-1) for a in (a_student, a_teacher))  # finite for any logits
        p = log_p.exp()  # (B,heads,N,N), rows of sum 1
        cross_entropy.append(-(p * log_q).sum(dim=-1).mean(dim=(1, 2)))  # (B,heads,N,N) -> (B,)
        entropy.append(-(p * log_p).sum(dim=-1).mean(dim=(1, 2)))
    loss_attn = torch.stack(cross_entropy).mean(dim=0)
    return loss_attn, (loss_attn - torch.stack(entropy).mean(dim=0)).detach()


def haste_loss(model, x, t, noise, y, zs, teacher_logits, path_type="linear"):
    """The terms of HASTE's loss, each (B,): velocity error, minus the cosine, cross-entropy of attention; and its KL.

    x, noise (B,C,H,W); t (B,); y (B,) with labels already dropped to the null label; zs [(B,N,K)] and teacher_logits
    [(B,heads,N,N)] of the clean image, as AttentionTeacher gives them. Without them, in phase II, those terms are 0.
    """
    x_t, v = interpolate(x, noise, t, path_type)
    v_hat, z_hats, logits = model(x_t, t, y)
    loss_velocity = (v_hat - v).square().mean(dim=(1, 2, 3))
    # The cosine is taken token by token, then averaged: (B,N,K) -> (B,N) -> (B,).
    cosines = [(F.normalize(z_hat.float(), dim=-1) * F.normalize(z.float(), dim=-1)).sum(dim=-1).mean(dim=1)
               for z_hat, z in zip(z_hats, zs)]
    none = torch.zeros_like(loss_velocity)
    loss_proj = -torch.stack(cosines).mean(dim=0) if cosines else none
    loss_attn, kl_attn = attention_loss(logits, teacher_logits) if logits else (none, none)
    return loss_velocity, loss_proj, loss_attn, kl_attn


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
    """The frozen teacher (None where no term needs one) and the student, on this rank's device."""
    teacher, name, widths, pairs = None, cfg.enc_type, [], ([], [])
    if cfg.proj_coeff or cfg.attn_coeff:
        file = f"{cfg.data}/teacher.pt" if name == "prepared" and not cfg.teacher_ckpt else cfg.teacher_ckpt
        teacher = load_teacher(name, cfg.resolution, file, not cfg.bench).to(run.device)
    torch.manual_seed(cfg.seed)  # the student begins alike with any teacher, or none
    sizes = SIT_SIZES[cfg.model]
    if cfg.proj_coeff:
        widths = [teacher.width]
        if not 1 <= cfg.encoder_depth <= sizes["depth"]:
            fail(f"--encoder-depth {cfg.encoder_depth} is not among the {sizes['depth']} blocks of {cfg.model}")
    if cfg.attn_coeff:
        pairs, blocks = (cfg.student_layers, cfg.teacher_layers), teacher.vit.blocks
        depths, heads = (sizes["depth"], len(blocks)), min(sizes["num_heads"], blocks[0].attn.num_heads)
        fits = all(0 <= i < depth for layers, depth in zip(pairs, depths) for i in layers)
        if not fits or len(pairs[0]) != len(pairs[1]) or cfg.align_heads > heads:
            fail(f"{cfg.model} with {name} takes --student-layers from 0 to {depths[0] - 1}, as many --teacher-layers "
                 f"from 0 to {depths[1] - 1}, and --align-heads up to {heads}")
    model = HASTESiT(data.shape[-1], data.shape[0], data.meta["num_classes"], sizes,
                     cfg.encoder_depth, widths, cfg.projector_dim, pairs[0], cfg.align_heads)
    if teacher:
        if teacher.grid != model.grid:
            fail(f"teacher {name} gives {teacher.grid}x{teacher.grid} tokens, {cfg.model} at {cfg.resolution} px has "
                 f"{model.grid}x{model.grid}: choose another --enc-type or --model, or train a teacher for it: python "
                 f"prepare.py teacher --data {cfg.data} --patch-size {cfg.resolution // model.grid}")
        teacher = AttentionTeacher(teacher, pairs[1], cfg.align_heads)
        if cfg.compile:
            teacher.compile()
            model.block_with_logits = torch.compile(block_with_logits)
    return teacher, model.to(run.device)


def train(cfg, run):
    """Begin or continue the run in cfg.out."""
    if cfg.bench:
        data = SyntheticData(cfg.resolution, cfg.model != "toy", need_images=cfg.proj_coeff + cfg.attn_coeff > 0)
    else:
        data = PreparedData(cfg.data, cfg.resolution, need_images=cfg.proj_coeff + cfg.attn_coeff > 0)
    teacher, model = build(cfg, data, run)
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

    for step in range(first_step + 1, cfg.max_train_steps + 1):
        if step in (first_step + 1, cfg.early_stop_point + 1):  # a phase begins, here or where the run was broken off
            if step > cfg.early_stop_point:  # phase II: nothing of the alignment is left, in time or in memory
                teacher = net = loader = None
                model.stop_alignment()
                data.names = [key for key in data.names if key != "images" or not data.meta["vae"]]
            net = parallelise(model, cfg, run)  # DDP looks once which parameters are trained
            loader = micro_batches(data, cfg.seed, cfg.batch_size, run, step - 1, cfg.workers)
        # Every draw of the step is made for the global batch; this rank holds its part, in micro-batches.
        normal, uniform = step_draws(cfg.seed, step, cfg.batch_size, run)
        posterior, noise = normal(*data.shape), normal(*data.shape)
        t = uniform() if cfg.weighting == "uniform" else lognormal_time(normal(), cfg.path_type)
        drop = uniform() < cfg.cfg_prob
        terms = torch.zeros(5, device=run.device)
        for i in range(run.accumulation):
            batch, rows = next(loader), slice(i * run.micro_batch, (i + 1) * run.micro_batch)
            is_last = i + 1 == run.accumulation
            with nullcontext() if is_last or run.world == 1 else net.no_sync():  # gradients are reduced once a step
                with run.autocast():
                    zs, teacher_logits = teacher(batch["images"]) if teacher else ([], [])
                    x = clean_input(batch, data.meta, posterior[rows])
                    y = batch["labels"].masked_fill(drop[rows], data.meta["num_classes"])
                    velocity, proj, attn, kl = haste_loss(net, x, t[rows], noise[rows], y, zs, teacher_logits,
                                                          cfg.path_type)
                    loss = (velocity + cfg.proj_coeff * proj + cfg.attn_coeff * attn).mean()
                (loss / run.accumulation).backward()
            terms += torch.stack([loss, *map(torch.mean, (velocity, proj, attn, kl))]).detach() / run.accumulation
        grad_norm, finite = optimizer_step(optimizer, parameters, cfg.max_grad_norm)
        update_ema(ema, model, cfg.ema_decay)
        aligned = dict(loss_proj=terms[2], loss_attn=terms[3], kl_attn=terms[4]) if model.aligned else {}
        log.add(finite, loss=terms[0], loss_velocity=terms[1], **aligned, grad_norm=grad_norm)

        last, stopping, switch = step == cfg.max_train_steps, stop(step), step == cfg.early_stop_point
        if step % cfg.log_every == 0 or last or switch:  # so that no line mixes the phases
            log.write(step)
        if run.rank == 0 and not cfg.bench:
            with log.pause():
                if step % cfg.save_every == 0 or last or stopping:
                    save_run(cfg, "last.pt", step, data.meta, ema=ema, model=model, optimizer=optimizer)
                if cfg.keep_every and step % cfg.keep_every == 0 or switch:
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
        model.velocity(torch.zeros(1, *data.shape, device=run.device), label.float(), label)  # phase II's
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
        x = sample(ema.velocity, randn(*shape), y, torch.full_like(y, ema.num_classes), num_steps=20,
                   path_type=cfg.path_type, cfg_scale=cfg.cfg_scale, guidance_low=cfg.guidance_low,
                   guidance_high=cfg.guidance_high)
    save_picture(Path(cfg.out) / f"preview-{step}.png", decode(x))


def generate(cfg, run):
    """Sample cfg.sample images from the EMA weights in cfg.ckpt; returns the path of the .npz file."""
    weights, checkpoint = load_weights(cfg.ckpt)
    for name in ("model", "path_type"):
        if (trained := checkpoint.get("config", {}).get(name, getattr(cfg, name))) != getattr(cfg, name):
            fail(f"{cfg.ckpt} was trained as {trained}: add --{name.replace('_', '-')} {trained}")
    model = sit_from_weights({name: w for name, w in weights.items() if not name.startswith("projectors.")}, cfg.model)
    model = compile_blocks(model.to(run.device).eval(), cfg)
    null, shape = model.num_classes, (model.in_channels, model.input_size, model.input_size)
    decode = load_decoder(checkpoint.get("data", SD_VAE_META), cfg.vae, cfg.vae_ckpt, run.device)

    def generate_batch(y, randn):
        with run.autocast():
            x = sample(model, randn(*shape), y, torch.full_like(y, null), mode=cfg.mode, num_steps=cfg.num_steps,
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


def attention_kl(cfg, run, path):
    """KL(teacher || student) of the attention of the EMA weights in `path`: the mean over 256 held-out images."""
    data = PreparedData(f"{cfg.data}/val", cfg.resolution)
    teacher, model = build(replace(cfg, proj_coeff=0.0, attn_coeff=1.0), data, run)
    model.load_state_dict({name: w for name, w in load_weights(path)[0].items() if not name.startswith("projectors.")})
    batch = {name: tensor.to(run.device) for name, tensor in data[np.arange(256)].items()}
    normal, uniform = step_draws(cfg.seed, 0, 256, SimpleNamespace(rank=0, world=1, device=run.device))
    with torch.no_grad(), run.autocast():
        x, noise = clean_input(batch, data.meta, normal(*data.shape)), normal(*data.shape)
        *_, kl = haste_loss(model, x, uniform(), noise, batch["labels"], *teacher(batch["images"]), cfg.path_type)
    return kl.mean().item()


def report_toy(cfg, run):
    """Sample 480 images without and with guidance, have them judged beside real images, and compare the phases."""
    last, stop = f"{cfg.out}/last.pt", cfg.early_stop_point
    paths = [generate(replace(cfg, sample=480, ckpt=last, cfg_scale=scale), run) for scale in (1.0, 2.0)]
    if run.rank == 0:
        run_tool("evaluate.py", *map(str, paths), cfg.data)
        lines = [json.loads(line) for line in (Path(cfg.out) / "log.jsonl").read_text().splitlines()]
        line, aligned = lines[-1], [line for line in lines if line["step"] <= cfg.early_stop_point]
        print(f"velocity loss {line['loss_velocity']:.4f} at step {line['step']}"
              + f"; look at {cfg.out}/preview-{line['step']}.png, a row per class" * (cfg.preview_every > 0))
        for phase, part, path in (("I", aligned, f"{cfg.out}/ema-{stop}.pt" if stop < line["step"] else last),
                                  ("II", lines[len(aligned):], last)):
            if part:
                time = sum(1000 * cfg.batch_size / line["images_per_s"] for line in part) / len(part)
                print(f"phase {phase}: {time:.1f} ms a step; KL from the teacher's attention to the student's at its "
                      f"end, step {part[-1]['step']}: {attention_kl(cfg, run, path):.4f}")


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

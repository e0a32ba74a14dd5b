"""HASTE: holistic alignment, stage-wise termination (Wang et al., NeurIPS 2025, arXiv 2505.16792).

REPA helps early and hinders late, when its gradient turns against that of denoising. So HASTE
aligns more, and then stops. In phase I some early blocks must not only predict the teacher's
features, but also LOOK where it looks: head m of a student block learns the attention map that head
m of a late block of the teacher has of the clean image. After `early_stop_point` updates both terms
are dropped together: phase II is plain SiT, in its loss and in what it costs.

    L = mean |v_theta(x_t, t, y) - v|^2
        - lambda_R mean_tokens cos(MLP(h), z)
        - lambda_A mean_{pairs, heads, queries} sum_keys softmax(A_teacher) log softmax(A_student)
    A = q k^T / sqrt(d)

    python haste.py                    the toy: data, training, samples, metrics; 3 minutes
    python haste.py --early-stop-point 2000      aligned to the end; 0 = plain SiT
    python haste.py --attn-coeff 0     REPA that stops
    torchrun --nproc_per_node=8 haste.py --model SiT-XL/2      the paper, on data/imagenet256
    torchrun --nproc_per_node=8 haste.py --model SiT-XL/2 --sample 50000 \\
        --ckpt runs/haste-SiT-XL-2/last.pt
    torchrun --nproc_per_node=8 haste.py --model SiT-XL/2 --resolution 512 --early-stop-point 300000
    python haste.py --model SiT-B/2 --bench 50 --early-stop-point 25       speed of both phases
    python evaluate.py runs/haste-toy/samples.npz data/toy

Published at 256 px, SDE with 250 steps, without guidance (--cfg-scale 1): FID 5.3 for SiT-XL/2
after 500K training steps, the defaults (8.1 if it never stops; but 7.3 against 5.5 at 400K: judge
by no single checkpoint), 19.6 for B/2 after 400K (21.3 without a stop). After 2.5M, guided by 1.65
on t in [0, 0.72]: 1.42. Our runs: the toy and checks, in docs/results.md; not ImageNet.

What differs from repa.py: block_with_logits, AttentionTeacher, attention_loss, and in `train` the
place where a phase begins. What differs from the official code, on purpose, beside what repa.py
lists: after the stop it still runs teacher, projector and logits on every batch; here they end, and
images are read no more. Its loss is written for blocks 4 to 7, twelve heads and 256 tokens: the
paper's B/2 crashes in it, and 512 px cut each row of a map in four; here any sizes. It takes
log(softmax), infinite for peaked maps, and computes logits of all heads and early blocks; here
log_softmax, and only those aligned. It replaces files of DINOv2, wrongly for registers; here a
stock timm model.
"""
import copy
import functools
import json
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from common import (
    SIT_SIZES,
    SiT,
    init_linear,
    interpolate,
    lognormal_time,
    modulate,
    projector,
    sample,
)
from support.checkpoints import init_from, load_weights, restore, save_run, sit_from_weights
from support.dataset import PreparedData, clean_input, micro_batches, open_data, step_draws
from support.flags import AMOUNT, COUNT, COUNT_OR_NONE, parse
from support.log import Log, summary
from support.runs import (
    DDP_OPTIONS,
    announce,
    catch_stop,
    clear_errors,
    compile_blocks,
    end_run,
    example_inputs,
    make_data,
    run_tool,
    setup,
    training_flops,
)
from support.samples import generate_npz, preview
from support.teachers import check_depth, check_grids, load_teacher
from support.terminal import fail, say
from support.vae import SD_VAE_META, load_decoder


@dataclass
class Config:
    """One field is one flag. Values are the paper's for SiT-XL/2; RECIPES has other models'."""
    # The method
    attn_coeff: float = 0.5                 # lambda_A; 0 = no attention: REPA that stops
    early_stop_point: int = 250_000         # updates with alignment; plain SiT after them
    student_layers: list[int] = None        # blocks aligned by attention, from 0; default: by model
    teacher_layers: list[int] = None        # their partners in the teacher, from 0, in this order
    align_heads: int = 12                   # of them the first heads, head m with head m
    projector_dim: int = 2048               # width of the projector's hidden layers

    # The run
    model: str = "toy"                      # toy, or SiT-{S,B,L,XL}/{2,4,8}; it picks the recipe
    data: str = "data/imagenet{resolution}"  # folder made by prepare.py
    out: str = "runs/haste-{model}"         # config.json, log.jsonl, last.pt, ema-*.pt, previews
    resolution: int = 256                   # pixels
    batch_size: int = 256                   # images per step, over all GPUs
    micro_batch: int = 0                    # images per GPU at once; 0 = batch size / GPUs
    max_train_steps: int = 500_000          # the paper's table for XL; its best model has 2.5M

    # Optimisation
    learning_rate: float = 1e-4             # AdamW, constant
    max_grad_norm: float = 1.0              # gradients are clipped to this norm
    ema_decay: float = 0.9999               # of the averaged weights, every step

    # Diffusion
    cfg_prob: float = 0.1                   # labels dropped, for classifier-free guidance
    path_type: Literal["linear", "cosine"] = "linear"       # interpolant
    weighting: Literal["uniform", "lognormal"] = "uniform"  # distribution of t

    # Teacher and alignment
    enc_type: str = "dinov2-vit-b"          # the teacher; prepared = DATA/teacher.pt
    teacher_ckpt: str = ""                  # its weights from a file instead of the hub
    encoder_depth: int = 8                  # features: after this block, from 1; the paper: 5 for B
    proj_coeff: float = 0.5                 # lambda_R; 0 = no features

    # Autoencoder
    vae: Literal["ft-ema", "ft-mse"] = "ft-ema"  # SD-VAE that decodes samples
    vae_ckpt: str = ""                      # its weights from a file instead of the hub

    # How it is carried out
    precision: Literal["auto", "bf16", "fp32"] = "auto"  # auto = bf16 on CUDA, fp32 elsewhere
    compile: bool = None                    # torch.compile each block; default: on CUDA
    seed: int = 0                           # of the weights, the order of images, every draw
    workers: int = 4                        # data processes per GPU
    log_every: int = 100                    # steps
    save_every: int = 5000                  # steps between writes of last.pt
    keep_every: int = 50_000                # steps between ema-*.pt, which stay; 0 = none
    preview_every: int = 10_000             # steps between pictures; 0 = none
    init: str = ""                          # start from the weights of this checkpoint

    # Sampling
    ckpt: str = ""                          # checkpoint to sample from
    sample: int = 0                         # generate this many images instead of training
    labels: list[int] = None                # classes to sample, in turn; default: random
    mode: Literal["sde", "ode"] = "sde"     # sampler
    num_steps: int = 250                    # of the sampler
    heun: bool = False                      # second-order steps
    cfg_scale: float = 1.65                 # guidance scale; 1 = none
    guidance_low: float = 0.0               # guidance acts for t from here
    guidance_high: float = 0.72             # to here; t = 1 is noise

    # Speed
    bench: int = 0                          # train this many steps on random data, write nothing


RECIPES = {  # by the beginning of the model's name
    "toy": dict(
        data="data/toy", resolution=16, batch_size=32, max_train_steps=2000,
        learning_rate=4e-3, ema_decay=0.99, projector_dim=256,
        enc_type="prepared", encoder_depth=2,
        early_stop_point=1000, student_layers=[0, 1], teacher_layers=[2, 3], align_heads=4,
        workers=0, log_every=50, save_every=500, keep_every=0, preview_every=400,
        mode="ode", num_steps=20, cfg_scale=1.0, guidance_high=1.0),
    # The paper's Table 16, but for S, which it does not have. DINOv2-B has 12 blocks of 12 heads.
    "SiT-S": dict(
        max_train_steps=400_000, encoder_depth=5, early_stop_point=100_000,
        student_layers=[2, 3, 4], teacher_layers=[7, 9, 11], align_heads=6),
    "SiT-B": dict(
        max_train_steps=400_000, encoder_depth=5, early_stop_point=100_000,
        student_layers=[2, 3, 4], teacher_layers=[7, 9, 11]),
    "SiT-L": dict(
        max_train_steps=400_000, student_layers=[4, 5, 6, 7], teacher_layers=[8, 9, 10, 11]),
    "SiT-XL": dict(student_layers=[4, 5, 6, 7], teacher_layers=[8, 9, 10, 11]),
}
RANGES = {"attn_coeff": AMOUNT, "early_stop_point": COUNT_OR_NONE, "align_heads": COUNT}


# --------------------------------------------------------------------------------------------------
# The method
# --------------------------------------------------------------------------------------------------
def keep_output(outputs, i, module, args, out):
    """A forward hook: what this module gave, under its number i."""
    outputs[i] = out


class AttentionTeacher(nn.Module):
    """A frozen vision transformer that also tells where it looks.

    Images (B,H,W,3) uint8 -> tokens [(B,N,K)] and logits: for each of `layers` the (B,heads,N,N) of
    its first heads, patches looking at patches. Class token and registers leave before the softmax,
    as queries and as keys. All in one forward pass, float32.
    """

    def __init__(self, vision, layers, heads):
        super().__init__()
        self.vision = vision
        self.layers = layers
        self.heads = heads
        self.qkv = {}  # by hooks: the projection (B,1+N,3K) of block i, from a forward pass
        for i in layers:
            # The hook knows the dict, not this module: a circle would keep the teacher in memory.
            hook = functools.partial(keep_output, self.qkv, i)
            vision.vit.blocks[i].attn.qkv.register_forward_hook(hook)

    @torch.no_grad()
    def forward(self, images):
        _, tokens = self.vision(images)
        first_patch = self.vision.vit.num_prefix_tokens
        logits = []
        for i in self.layers:
            attn = self.vision.vit.blocks[i].attn
            qkv = self.qkv[i][:, first_patch:]
            qkv = qkv.unflatten(2, (3, attn.num_heads, -1))  # (B,N,3K) -> (B,N,3,all heads,d)
            q, k, _ = qkv[:, :, :, :self.heads].permute(2, 0, 3, 1, 4)  # each (B,heads,N,d)
            products = (attn.q_norm(q) @ attn.k_norm(k).mT).float()
            logits.append(attn.scale * products)
        self.qkv.clear()
        return [tokens], logits


def block_with_logits(block, h, c, heads):
    """A SiT block on tokens h (B,N,D), and attention logits (B,heads,N,N) of its first heads."""
    modulation = block.adaLN_modulation(c).chunk(6, dim=1)  # each (B,D)
    shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = modulation
    q, k, v = block.attn.split(modulate(block.norm1(h), shift_a, scale_a))  # each (B,heads,N,d)
    h = h + gate_a.unsqueeze(1) * block.attn.attend(q, k, v)
    h = h + gate_m.unsqueeze(1) * block.mlp(modulate(block.norm2(h), shift_m, scale_m))
    products = (q[:, :heads] @ k[:, :heads].mT).float()
    return h, q.shape[-1] ** -0.5 * products


class HASTESiT(SiT):
    """SiT that also shows, until `stop_alignment`, what is aligned: tokens and attention logits."""

    def __init__(self, input_size, in_channels, num_classes, sizes, encoder_depth, z_dims,
                 projector_dim, student_layers, align_heads):
        super().__init__(input_size, in_channels, num_classes, **sizes)
        self.encoder_depth = encoder_depth
        self.student_layers = student_layers
        self.align_heads = align_heads
        self.aligned = True
        self.block_with_logits = block_with_logits  # --compile puts the compiled one here
        self.projectors = nn.ModuleList(
            [projector(sizes["hidden_size"], projector_dim, z_dim) for z_dim in z_dims])
        self.projectors.apply(init_linear)

    def forward(self, x_t, t, y):
        """Velocity (B,C,H,W), z_hat [(B,N,K)], and logits (B,heads,N,N) of each student layer."""
        if not self.aligned:
            return self.velocity(x_t, t, y), [], []
        h, c = self.embed(x_t, t, y)
        z_hats = []
        logits = {}
        for i, block in enumerate(self.blocks):  # student_layers count from 0, encoder_depth from 1
            if i in self.student_layers:
                h, logits[i] = self.block_with_logits(block, h, c, self.align_heads)
            else:
                h = block(h, c)
            if i + 1 == self.encoder_depth:  # token-wise, (B,N,D) -> (B,N,K)
                z_hats = [mlp(h) for mlp in self.projectors]
        return self.head(h, c), z_hats, [logits[i] for i in self.student_layers]

    def stop_alignment(self):
        """Plain SiT from now on; the projectors stay, unused, so that all checkpoints are alike."""
        self.aligned = False
        self.projectors.requires_grad_(False)


def attention_loss(logits, teacher_logits):
    """Attention's cross-entropy, student with teacher, and KL(teacher || student), each (B,).

    Both lists hold one (B,heads,N,N) per pair of blocks: before softmax, queries x keys. The
    cross-entropy is the KL plus the teacher's entropy: same gradient, but its least value is that
    entropy (at most log N), not 0.
    """
    cross_entropies = []  # one (B,) for every pair
    entropies = []
    for a_student, a_teacher in zip(logits, teacher_logits, strict=True):
        log_q = a_student.float().log_softmax(dim=-1)  # finite for any logits
        log_p = a_teacher.float().log_softmax(dim=-1)
        p = log_p.exp()  # (B,heads,N,N), rows of sum 1
        cross_entropy = -(p * log_q).sum(dim=-1)  # over keys: (B,heads,N,N) -> (B,heads,N)
        entropy = -(p * log_p).sum(dim=-1)
        cross_entropies.append(cross_entropy.mean(dim=(1, 2)))
        entropies.append(entropy.mean(dim=(1, 2)))
    loss_attn = torch.stack(cross_entropies).mean(dim=0)
    kl_attn = loss_attn - torch.stack(entropies).mean(dim=0)
    return loss_attn, kl_attn.detach()


def haste_loss(model, x, t, noise, y, zs, teacher_logits, path_type="linear"):
    """The terms, each (B,): velocity error, minus the cosine, attention's cross-entropy; its KL.

    x, noise (B,C,H,W); t (B,); y (B,) with labels already dropped to the null label; zs [(B,N,K)]
    and teacher_logits [(B,heads,N,N)] of the clean image, as AttentionTeacher gives them. Without
    them, in phase II, those terms are 0.
    """
    x_t, v = interpolate(x, noise, t, path_type)
    v_hat, z_hats, logits = model(x_t, t, y)
    loss_velocity = (v_hat - v).square().mean(dim=(1, 2, 3))
    loss_proj = loss_attn = kl_attn = torch.zeros_like(loss_velocity)
    cosines = []
    for z_hat, z in zip(z_hats, zs):
        z_hat = F.normalize(z_hat.float(), dim=-1)
        z = F.normalize(z.float(), dim=-1)
        cosine = (z_hat * z).sum(dim=-1)  # token by token: (B,N,K) -> (B,N)
        cosines.append(cosine.mean(dim=1))
    if cosines:
        loss_proj = -torch.stack(cosines).mean(dim=0)
    if logits:
        loss_attn, kl_attn = attention_loss(logits, teacher_logits)
    return loss_velocity, loss_proj, loss_attn, kl_attn


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
def check_layers(cfg, vision):
    """Student and teacher must have the blocks and heads that are aligned, and those be pairs."""
    sizes = SIT_SIZES[cfg.model]
    depths = sizes["depth"], len(vision.vit.blocks)
    heads = min(sizes["num_heads"], vision.vit.blocks[0].attn.num_heads)
    fits = len(cfg.student_layers) == len(cfg.teacher_layers) and cfg.align_heads <= heads
    for layers, depth in zip((cfg.student_layers, cfg.teacher_layers), depths):
        fits = fits and all(0 <= i < depth for i in layers)
    if not fits:
        fail(f"{cfg.model} with {vision.name} takes --student-layers from 0 to {depths[0] - 1}, as "
             f"many --teacher-layers from 0 to {depths[1] - 1}, and --align-heads up to {heads}")


def load_attention_teacher(cfg, run):
    """The frozen teacher of --enc-type with its attention in --teacher-layers, on the device."""
    file = cfg.teacher_ckpt
    if cfg.enc_type == "prepared" and not file:
        file = f"{cfg.data}/teacher.pt"
    vision = load_teacher(cfg.enc_type, cfg.resolution, file, pretrained=not cfg.bench)
    layers = []
    if cfg.attn_coeff > 0:
        check_layers(cfg, vision)
        layers = cfg.teacher_layers
    return AttentionTeacher(vision, layers, cfg.align_heads).to(run.device)


def build(cfg, data, run):
    """The frozen teacher (None where no term needs one) and the student, on the device."""
    if cfg.proj_coeff > 0:
        check_depth(cfg)
    teacher = None
    z_dims = []
    student_layers = []
    if cfg.proj_coeff > 0 or cfg.attn_coeff > 0:
        teacher = load_attention_teacher(cfg, run)
    if cfg.proj_coeff > 0:
        z_dims = [teacher.vision.width]
    if cfg.attn_coeff > 0:
        student_layers = cfg.student_layers
    torch.manual_seed(cfg.seed)  # the SiT's initial weights do not depend on the teacher
    channels, size, _ = data.shape
    model = HASTESiT(
        size, channels, data.meta["num_classes"], SIT_SIZES[cfg.model], cfg.encoder_depth,
        z_dims, cfg.projector_dim, student_layers, cfg.align_heads)
    if teacher is not None:
        check_grids(cfg, [teacher.vision], model.grid)
        if cfg.compile:
            teacher.compile()
            model.block_with_logits = torch.compile(block_with_logits)
    return teacher, model.to(run.device)


def begin_phase(cfg, run, data, model, step):
    """The network as a phase calls it, and its batches: from `step`, where it begins or goes on.

    In phase II nothing of the alignment is left, in time or in memory.
    """
    if step > cfg.early_stop_point:
        model.stop_alignment()
        if "moments" in data.names:  # latents: only the teacher looked at the images
            data.names = [name for name in data.names if name != "images"]
    net = parallelise(model, cfg, run)  # again: DDP looks only once at what is trained
    loader = micro_batches(data, cfg.seed, cfg.batch_size, run, step - 1, cfg.workers)
    return net, loader


def train(cfg, run):
    """Begin or continue the run in cfg.out."""
    data = open_data(cfg, need_images=cfg.proj_coeff > 0 or cfg.attn_coeff > 0)
    teacher, model = build(cfg, data, run)
    decode = None
    if cfg.preview_every and not cfg.bench:  # a missing VAE shows now, not at the first preview
        decode = load_decoder(data.meta, cfg.vae, cfg.vae_ckpt, run.device)
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters, lr=cfg.learning_rate, betas=(0.9, 0.999), weight_decay=0, fused=True)
    first_step = restore(cfg, data.meta, model, ema, optimizer)
    if first_step >= cfg.max_train_steps:
        say(f"{cfg.out} is finished: {first_step} steps; raise --max-train-steps to train on, or "
            f"choose another --out")
        return
    flops_per_image = training_flops(model.velocity, *example_inputs(data, run))  # phase II's
    announce(cfg, run, data, model, flops_per_image)
    log = Log(cfg, run, first_step, flops_per_image)
    stop = catch_stop(run)

    for step in range(first_step + 1, cfg.max_train_steps + 1):
        if step in (first_step + 1, cfg.early_stop_point + 1):  # a phase begins, or goes on
            net = loader = None  # frees those of phase I before others are made
            if step > cfg.early_stop_point:
                teacher = None
            net, loader = begin_phase(cfg, run, data, model, step)

        # Every draw of the step is made for the global batch; this rank holds its part of it.
        normal, uniform = step_draws(cfg.seed, step, cfg.batch_size, run)
        posterior_noise = normal(*data.shape)
        noise = normal(*data.shape)
        if cfg.weighting == "uniform":
            t = uniform()
        else:
            t = lognormal_time(normal(), cfg.path_type)
        is_dropped = uniform() < cfg.cfg_prob

        sums = torch.zeros(5, device=run.device)
        for i in range(run.accumulation):
            batch = next(loader)
            rows = slice(i * run.micro_batch, (i + 1) * run.micro_batch)
            is_last = i + 1 == run.accumulation
            # Gradients are reduced once a step: with the last micro-batch.
            reduction = nullcontext() if is_last or run.world == 1 else net.no_sync()
            with reduction:
                with run.autocast():
                    zs = teacher_logits = []
                    if teacher is not None:
                        zs, teacher_logits = teacher(batch["images"])
                    x = clean_input(batch, data.meta, posterior_noise[rows])
                    y = batch["labels"].masked_fill(is_dropped[rows], model.num_classes)
                    velocity, proj, attn, kl = haste_loss(
                        net, x, t[rows], noise[rows], y, zs, teacher_logits, cfg.path_type)
                    loss = (velocity + cfg.proj_coeff * proj + cfg.attn_coeff * attn).mean()
                (loss / run.accumulation).backward()
            terms = [loss, velocity.mean(), proj.mean(), attn.mean(), kl.mean()]
            sums += torch.stack(terms).detach() / run.accumulation

        grad_norm, is_finite = optimizer_step(optimizer, parameters, cfg.max_grad_norm)
        update_ema(ema, model, cfg.ema_decay)
        loss, velocity, proj, attn, kl = sums
        losses = dict(loss=loss, loss_velocity=velocity)
        if model.aligned:
            losses |= dict(loss_proj=proj, loss_attn=attn, kl_attn=kl)
        log.add(is_finite, **losses, grad_norm=grad_norm)

        is_last_step = step == cfg.max_train_steps
        ends_alignment = step == cfg.early_stop_point
        stopping = stop(step)
        if step % cfg.log_every == 0 or is_last_step or ends_alignment:  # no line mixes the phases
            log.write(step)
        if run.rank == 0 and not cfg.bench:
            with log.pause():
                if step % cfg.save_every == 0 or is_last_step or stopping:
                    save_run(cfg, "last.pt", step, data.meta,
                             model=model, ema=ema, optimizer=optimizer)
                if cfg.keep_every and step % cfg.keep_every == 0 or ends_alignment:
                    save_run(cfg, f"ema-{step}.pt", step, data.meta, ema=ema)
                if cfg.preview_every and (step % cfg.preview_every == 0 or is_last_step):
                    preview(cfg, run, ema, draw, decode, step)
        if stopping:
            break
    loader.close()
    end_run(cfg, run, log, step, stopping)


# --------------------------------------------------------------------------------------------------
# Sampling
# --------------------------------------------------------------------------------------------------
def draw(cfg, run, model, y, randn):
    """Latents x (B,C,H,W) of labels y (B,) by the paper's sampler, from plain SiT."""
    noise = randn(model.in_channels, model.input_size, model.input_size)
    y_null = torch.full_like(y, model.num_classes)
    with run.autocast():
        return sample(
            model.velocity, noise, y, y_null, randn=randn,
            mode=cfg.mode, num_steps=cfg.num_steps, heun=cfg.heun, path_type=cfg.path_type,
            cfg_scale=cfg.cfg_scale, guidance_low=cfg.guidance_low,
            guidance_high=cfg.guidance_high)


def generate(cfg, run):
    """Sample cfg.sample images from the EMA weights in cfg.ckpt; returns the .npz file's path."""
    weights, checkpoint = load_weights(cfg.ckpt, cfg)
    model = sit_from_weights(weights, cfg.model)  # plain SiT
    model = compile_blocks(model.to(run.device).eval(), cfg)
    meta = checkpoint.get("data", SD_VAE_META)  # other codes' checkpoints have none
    decode = load_decoder(meta, cfg.vae, cfg.vae_ckpt, run.device)

    def images(y, randn):
        return {"arr_0": decode(draw(cfg, run, model, y, randn))}

    return generate_npz(cfg, run, images, model.num_classes)


# --------------------------------------------------------------------------------------------------
# What alignment leaves behind: what only this method reports
# --------------------------------------------------------------------------------------------------
@torch.no_grad()
def attention_kl(cfg, run, path):
    """KL(teacher || student) of attention over 256 held-out images, with the weights in `path`."""
    data = PreparedData(f"{cfg.data}/val", cfg.resolution)
    teacher, model = build(replace(cfg, proj_coeff=0.0, attn_coeff=1.0), data, run)
    init_from(path, model, may_be_fresh=())
    batch = {name: tensor.to(run.device) for name, tensor in data[np.arange(256)].items()}
    normal, uniform = step_draws(cfg.seed, 0, 256, replace(run, rank=0, world=1))
    x = clean_input(batch, data.meta, normal(*data.shape))
    noise = normal(*data.shape)
    t = uniform()
    with run.autocast():
        _, teacher_logits = teacher(batch["images"])
        *_, kl = haste_loss(model, x, t, noise, batch["labels"], [], teacher_logits, cfg.path_type)
    return kl.mean().item()


def report_phase(cfg, run, name, lines, path):
    """Print a phase's speed, from its log lines, and the KL of the weights `path` at its end."""
    milliseconds = [1000 * cfg.batch_size / line["images_per_s"] for line in lines]
    mean = sum(milliseconds) / len(milliseconds)
    kl = attention_kl(cfg, run, path)
    print(f"phase {name}: {mean:.1f} ms a step; KL from the teacher's attention to the student's "
          f"at its end, step {lines[-1]['step']}: {kl:.4f}")


def report_toy(cfg, run):
    """Sample 480 images without and with guidance; have them judged, and compare the phases."""
    cfg = replace(cfg, sample=480, ckpt=f"{cfg.out}/last.pt")
    plain = generate(replace(cfg, cfg_scale=1.0), run)
    guided = generate(replace(cfg, cfg_scale=2.0), run)
    if run.rank == 0:
        run_tool("evaluate.py", plain, guided, cfg.data)
        print(summary(cfg))
        text = (Path(cfg.out) / "log.jsonl").read_text()
        lines = [json.loads(line) for line in text.splitlines()]
        phase_1 = [line for line in lines if line["step"] <= cfg.early_stop_point]
        phase_2 = lines[len(phase_1):]
        if phase_1:
            end = f"{cfg.out}/ema-{cfg.early_stop_point}.pt" if phase_2 else cfg.ckpt
            report_phase(cfg, run, "I", phase_1, end)
        if phase_2:
            report_phase(cfg, run, "II", phase_2, cfg.ckpt)


def main(argv=None):
    """Train or sample, as the command line says; the toy does both and has the result judged."""
    cfg = parse(argv, Config, SIT_SIZES, RECIPES, RANGES, __doc__)
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

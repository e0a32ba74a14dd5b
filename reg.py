"""REG: representation entanglement for generation (Wu et al., NeurIPS 2025, arXiv 2507.01467).

REPA only trains with its teacher. REG also generates something of it: the class token that the
frozen teacher (DINOv2) gives the clean image, one vector of width K, gets noise of its own and
goes through the SiT in front of the image's tokens, and the network predicts both velocities. When
sampling, both begin as noise and are integrated together, so that the image is drawn beside a
description of itself; the teacher is no longer needed, and the token is dropped.

    L = mean |v_theta - v|^2 + beta mean |v_theta,cls - v_cls|^2
        - lambda mean_tokens cos(MLP(h), z)
    x_t = (1-t) x + t noise,  v = noise - x
    cls_t = (1-t) cls + t noise_cls,  v_cls = noise_cls - cls,  with the same t

What differs from repa.py: one more token, with a linear map and a LayerNorm before it, a linear map
of its own behind it, and a position of zeros; the term with beta; REPA's term counts the class
token as one more token, whose target is the clean one; the sampler's state is a pair, with
one guidance scale each. 0.3 % more parameters, 0.4 % more FLOPs.

    python reg.py                      the toy: data, training, samples, metrics; 3 minutes
    python reg.py --proj-coeff 0       no alignment: the teacher still runs, its class token is data
    torchrun --nproc_per_node=8 reg.py --model SiT-XL/2        the paper, on data/imagenet256
    torchrun --nproc_per_node=8 reg.py --model SiT-XL/2 --sample 50000 \\
        --ckpt runs/reg-SiT-XL-2/last.pt
    python evaluate.py runs/reg-toy/samples.npz data/toy

Published for SiT-XL/2 at 256 px, SDE with 250 steps: FID 3.4 after 400K training steps and 1.8
after 4M, both without guidance (--cfg-scale 1); 1.36 after 4M (--max-train-steps 4000000) with
guidance 2.3 of both states on t in [0, 0.85], the defaults (the paper's Tables 1, 2, 8 and its
eval.sh). Our runs: the toy and checks, in docs/results.md; not ImageNet.

What differs from the official code, on purpose: with --path-type cosine each class token is
compared with its own target (there with those of the whole batch, by a shape that broadcasts); the
ODE sampler, which it refuses; the null label is num_classes, not 1000; depth 4 for B by default, as
in the paper; the weight of the class token is --cls-coeff (there --cls, which means a width when
sampling); logged losses are unweighted; and all that repa.py lists for itself.
"""
import copy
from contextlib import nullcontext
from dataclasses import dataclass, replace
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
from support.checkpoints import load_weights, restore, save_run, sit_from_weights
from support.dataset import PreparedData, clean_input, micro_batches, open_data, step_draws
from support.flags import BOOKKEEPING, POSITIVE, parse
from support.log import Log, last_line, summary
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
from support.teachers import check_depth, check_grids, load_teachers
from support.terminal import fail, say
from support.vae import SD_VAE_META, load_decoder


@dataclass
class Config:
    """One field is one flag. Values are the paper's for SiT-XL/2; RECIPES has other models'."""
    # The method
    cls_coeff: float = 0.03                 # beta, the weight of the class token's velocity
    cls_cfg_scale: float = None             # of class tokens; default: --cfg-scale; 0 or 1 = none
    projector_dim: int = 2048               # width of the projector's hidden layers

    # The run
    model: str = "toy"                      # toy, or SiT-{S,B,L,XL}/{2,4,8}; it picks the recipe
    data: str = "data/imagenet{resolution}"  # folder made by prepare.py
    out: str = "runs/reg-{model}"           # config.json, log.jsonl, last.pt, ema-*.pt, previews
    resolution: int = 256                   # pixels
    batch_size: int = 256                   # images per step, over all GPUs
    micro_batch: int = 0                    # images per GPU at once; 0 = batch size / GPUs
    max_train_steps: int = 400_000          # the paper's tables; its best model has 4M

    # Optimisation
    learning_rate: float = 1e-4             # AdamW, constant
    max_grad_norm: float = 1.0              # gradients are clipped to this norm
    ema_decay: float = 0.9999               # of the averaged weights, every step

    # Diffusion
    cfg_prob: float = 0.1                   # labels dropped, for classifier-free guidance
    path_type: Literal["linear", "cosine"] = "linear"       # interpolant
    weighting: Literal["uniform", "lognormal"] = "uniform"  # distribution of t

    # Teacher and alignment
    enc_type: str = "dinov2-vit-b"          # several with commas; the first gives the class token
    teacher_ckpt: str = ""                  # their weights from files, not the hub, with commas
    encoder_depth: int = 8                  # align after this block, from 1; the paper: 4 for B
    proj_coeff: float = 0.5                 # lambda; 0 = no projector: class tokens only

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
    cfg_scale: float = 2.3                  # guidance scale; 1 = none
    guidance_low: float = 0.0               # guidance acts for t from here
    guidance_high: float = 0.85             # to here; t = 1 is noise

    # Speed
    bench: int = 0                          # train this many steps on random data, write nothing


RECIPES = {  # by the beginning of the model's name
    "toy": dict(
        data="data/toy", resolution=16, batch_size=32, max_train_steps=2000,
        learning_rate=4e-3, ema_decay=0.99, projector_dim=256,
        enc_type="prepared", encoder_depth=2,
        workers=0, log_every=50, save_every=500, keep_every=0, preview_every=400,
        mode="ode", num_steps=20, cfg_scale=1.0, guidance_high=1.0),
    "SiT-S": dict(encoder_depth=4),
    "SiT-B": dict(encoder_depth=4),
}
RANGES = {"cls_coeff": POSITIVE}
MAY_CHANGE = BOOKKEEPING | {"cls_cfg_scale"}  # between a run and its continuation


# --------------------------------------------------------------------------------------------------
# The method
# --------------------------------------------------------------------------------------------------
class REGSiT(SiT):
    """SiT with a class token of width cls_dim before its patch tokens, and a velocity for it.

    After block `encoder_depth` all N+1 tokens also go through one MLP per teacher, as in REPA.
    z_dims: the teachers' widths K.
    """

    def __init__(self, input_size, in_channels, num_classes, sizes, encoder_depth=0, cls_dim=768,
                 z_dims=(), projector_dim=2048):
        super().__init__(input_size, in_channels, num_classes, **sizes)
        hidden_size = sizes["hidden_size"]
        self.encoder_depth = encoder_depth
        self.cls_dim = cls_dim
        self.projectors = nn.ModuleList(
            [projector(hidden_size, projector_dim, z_dim) for z_dim in z_dims])
        self.projectors.apply(init_linear)
        # The official name; nothing is projected twice.
        self.cls_projectors2 = nn.Linear(cls_dim, hidden_size)
        self.cls_projectors2.apply(init_linear)
        self.wg_norm = nn.LayerNorm(hidden_size, eps=1e-6)  # in the official code, not in the paper
        # Zero, as the image's last layer: a fresh model's velocities are exactly 0.
        self.final_layer.linear_cls = nn.Linear(hidden_size, cls_dim)
        nn.init.zeros_(self.final_layer.linear_cls.weight)
        nn.init.zeros_(self.final_layer.linear_cls.bias)
        # The class token's position is zeros: (1,N,D) -> (1,N+1,D).
        pos_embed = F.pad(self.pos_embed, (0, 0, 1, 0))
        self.pos_embed = nn.Parameter(pos_embed.detach(), requires_grad=False)

    def forward(self, x_t, cls_t, t, y):
        """Velocities of image (B,C,H,W) and class token (B,K); per teacher, z_hat (B,N+1,K)."""
        cls_h = self.wg_norm(self.cls_projectors2(cls_t)).unsqueeze(1)  # (B,K) -> (B,1,D)
        h = torch.cat([cls_h, self.x_embedder(x_t)], dim=1)  # (B,N+1,D), the class token first
        h = h + self.pos_embed
        c = self.t_embedder(t) + self.y_embedder(y)  # (B,D), for all tokens alike
        z_hats = []
        for depth, block in enumerate(self.blocks, start=1):
            h = block(h, c)
            if depth == self.encoder_depth:  # token-wise, (B,N+1,D) -> (B,N+1,K)
                z_hats = [mlp(h) for mlp in self.projectors]
        return self.head(h[:, 1:], c), self.class_head(h[:, :1], c), z_hats

    def class_head(self, cls_h, c):
        """The class token's velocity (B,K), float32, from its hidden state (B,1,D).

        It shares the last norm and modulation with the patches, and has a linear map of its own.
        """
        final = self.final_layer
        shift, scale = final.adaLN_modulation(c).chunk(2, dim=1)
        cls_h = modulate(final.norm_final(cls_h), shift, scale)
        return final.linear_cls(cls_h).squeeze(1).float()  # (B,1,D) -> (B,K)

    def velocity(self, state, t, y):
        """Velocities of the state (x_t, cls_t), for the sampler."""
        x_t, cls_t = state
        v, v_cls, _ = self(x_t, cls_t, t, y)
        return v, v_cls


def teacher_tokens(teachers, images):
    """What the teachers see in images (B,H,W,3): the class token to generate, and all the targets.

    That is the first teacher's class token (B,K), and per teacher (B,N+1,K), its class token first.
    float32, never half: these are data.
    """
    outputs = [teacher(images) for teacher in teachers]  # pairs (B,K), (B,N,K)
    cls, _ = outputs[0]
    zs = [torch.cat([token.unsqueeze(1), patches], dim=1) for token, patches in outputs]
    return cls, zs


def reg_loss(model, x, cls, t, noise, noise_cls, y, zs, path_type="linear"):
    """The terms of REG's loss, each (B,): velocity errors of image and class token, minus cosine.

    x, noise (B,C,H,W); cls, noise_cls (B,K), the class token as the teacher gives it, neither
    scaled nor normalised; t (B,), shared by both; y (B,) with labels already dropped to the null
    label; zs: per teacher its clean class token and its patch tokens, (B,N+1,K). A fresh model's
    second term is 1 + mean cls^2, about 3 for DINOv2, and stays high.
    """
    x_t, v = interpolate(x, noise, t, path_type)
    cls_t, v_cls = interpolate(cls, noise_cls, t, path_type)
    v_hat, v_cls_hat, z_hats = model(x_t, cls_t, t, y)
    loss_velocity = (v_hat - v).square().mean(dim=(1, 2, 3))
    loss_cls = (v_cls_hat - v_cls).square().mean(dim=1)
    if not z_hats:
        return loss_velocity, loss_cls, torch.zeros_like(loss_velocity)
    cosines = []
    for z_hat, z in zip(z_hats, zs):
        z_hat = F.normalize(z_hat.float(), dim=-1)
        z = F.normalize(z.float(), dim=-1)
        cosine = (z_hat * z).sum(dim=-1)  # token by token: (B,N+1,K) -> (B,N+1)
        cosines.append(cosine.mean(dim=1))
    loss_proj = -torch.stack(cosines).mean(dim=0)
    return loss_velocity, loss_cls, loss_proj


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
def build(cfg, data, run):
    """The frozen teachers (always: class tokens are data) and the student, on the device."""
    if cfg.proj_coeff > 0:
        check_depth(cfg)
    teachers = load_teachers(cfg, run)
    z_dims = []
    if cfg.proj_coeff > 0:
        z_dims = [teacher.width for teacher in teachers]
    torch.manual_seed(cfg.seed)  # the SiT's initial weights do not depend on the teacher
    channels, size, _ = data.shape
    model = REGSiT(
        size, channels, data.meta["num_classes"], SIT_SIZES[cfg.model], cfg.encoder_depth,
        teachers[0].width, z_dims, cfg.projector_dim)
    if cfg.proj_coeff > 0:  # a class token alone fits any grid
        check_grids(cfg, teachers, model.grid)
    if cfg.compile:
        for teacher in teachers:
            teacher.compile()
    return teachers, model.to(run.device)


def train(cfg, run):
    """Begin or continue the run in cfg.out."""
    data = open_data(cfg)
    teachers, model = build(cfg, data, run)
    decode = None
    if cfg.preview_every and not cfg.bench:  # a missing VAE shows now, not at the first preview
        decode = load_decoder(data.meta, cfg.vae, cfg.vae_ckpt, run.device)
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters, lr=cfg.learning_rate, betas=(0.9, 0.999), weight_decay=0, fused=True)
    first_step = restore(cfg, data.meta, model, ema, optimizer, bookkeeping=MAY_CHANGE)
    if first_step >= cfg.max_train_steps:
        say(f"{cfg.out} is finished: {first_step} steps; raise --max-train-steps to train on, or "
            f"choose another --out")
        return
    x_t, t, y = example_inputs(data, run)
    cls_t = torch.zeros(1, model.cls_dim, device=run.device)
    flops_per_image = training_flops(model, x_t, cls_t, t, y)
    announce(cfg, run, data, model, flops_per_image)
    log = Log(cfg, run, first_step, flops_per_image)
    stop = catch_stop(run)
    net = parallelise(model, cfg, run)
    loader = micro_batches(data, cfg.seed, cfg.batch_size, run, first_step, cfg.workers)

    for step in range(first_step + 1, cfg.max_train_steps + 1):
        # Every draw of the step is made for the global batch; this rank holds its part of it.
        normal, uniform = step_draws(cfg.seed, step, cfg.batch_size, run)
        posterior_noise = normal(*data.shape)
        noise = normal(*data.shape)
        if cfg.weighting == "uniform":
            t = uniform()
        else:
            t = lognormal_time(normal(), cfg.path_type)
        is_dropped = uniform() < cfg.cfg_prob
        # Last, so that the draws before are those of repa.py with this seed.
        noise_cls = normal(model.cls_dim)

        sums = torch.zeros(4, device=run.device)
        for i in range(run.accumulation):
            batch = next(loader)
            rows = slice(i * run.micro_batch, (i + 1) * run.micro_batch)
            is_last = i + 1 == run.accumulation
            # Gradients are reduced once a step: with the last micro-batch.
            reduction = nullcontext() if is_last or run.world == 1 else net.no_sync()
            with reduction:
                with run.autocast():
                    cls, zs = teacher_tokens(teachers, batch["images"])
                    x = clean_input(batch, data.meta, posterior_noise[rows])
                    y = batch["labels"].masked_fill(is_dropped[rows], model.num_classes)
                    velocity, velocity_cls, proj = reg_loss(
                        net, x, cls, t[rows], noise[rows], noise_cls[rows], y, zs, cfg.path_type)
                    loss = (velocity + cfg.cls_coeff * velocity_cls + cfg.proj_coeff * proj).mean()
                (loss / run.accumulation).backward()
            terms = torch.stack([loss, velocity.mean(), velocity_cls.mean(), proj.mean()])
            sums += terms.detach() / run.accumulation

        grad_norm, is_finite = optimizer_step(optimizer, parameters, cfg.max_grad_norm)
        update_ema(ema, model, cfg.ema_decay)
        loss, velocity, velocity_cls, proj = sums
        log.add(is_finite, loss=loss, loss_velocity=velocity, loss_cls=velocity_cls,
                loss_proj=proj, grad_norm=grad_norm)

        is_last_step = step == cfg.max_train_steps
        stopping = stop(step)
        if step % cfg.log_every == 0 or is_last_step:
            log.write(step)
        if run.rank == 0 and not cfg.bench:
            with log.pause():
                if step % cfg.save_every == 0 or is_last_step or stopping:
                    save_run(cfg, "last.pt", step, data.meta,
                             model=model, ema=ema, optimizer=optimizer)
                if cfg.keep_every and step % cfg.keep_every == 0:
                    save_run(cfg, f"ema-{step}.pt", step, data.meta, ema=ema)
                if cfg.preview_every and (step % cfg.preview_every == 0 or is_last_step):
                    preview(cfg, run, ema, draw_image, decode, step)
        if stopping:
            break
    loader.close()
    end_run(cfg, run, log, step, stopping)


# --------------------------------------------------------------------------------------------------
# Sampling
# --------------------------------------------------------------------------------------------------
def guidance_scales(cfg):
    """Guidance scales of image and class token.

    As in the official code, 0 or less leaves the class token unguided.
    """
    cls_scale = cfg.cls_cfg_scale
    if cls_scale is None:
        cls_scale = cfg.cfg_scale
    if not abs(cls_scale) <= 1e12:
        fail(f"--cls-cfg-scale {cls_scale} must be a number; 0 or 1 leave the class token "
             f"unguided")
    if cls_scale <= 0:
        cls_scale = 1.0
    return cfg.cfg_scale, cls_scale


def draw(cfg, run, model, y, randn):
    """Latents x (B,C,H,W) and class tokens (B,K) of labels y (B,) by the paper's sampler."""
    noise = randn(model.in_channels, model.input_size, model.input_size)
    noise_cls = randn(model.cls_dim)
    y_null = torch.full_like(y, model.num_classes)
    with run.autocast():
        return sample(
            model.velocity, (noise, noise_cls), y, y_null, randn=randn,
            mode=cfg.mode, num_steps=cfg.num_steps, heun=cfg.heun, path_type=cfg.path_type,
            cfg_scale=guidance_scales(cfg), guidance_low=cfg.guidance_low,
            guidance_high=cfg.guidance_high)


def draw_image(*args):
    """What `draw` draws, without the class tokens: for previews."""
    x, _ = draw(*args)
    return x


def load_sampler(cfg):
    """The student in cfg.ckpt without its projectors, and the checkpoint it came in."""
    weights, checkpoint = load_weights(cfg.ckpt, cfg)
    if "cls_projectors2.weight" not in weights:
        fail(f"{cfg.ckpt} generates no class token (there is no cls_projectors2.weight in it): "
             f"sample it with repa.py")
    cls_dim = weights["cls_projectors2.weight"].shape[1]

    def make(input_size, in_channels, num_classes, **sizes):
        return REGSiT(input_size, in_channels, num_classes, sizes, cls_dim=cls_dim)

    return sit_from_weights(weights, cfg.model, make), checkpoint


def generate(cfg, run):
    """Sample cfg.sample images from the EMA weights in cfg.ckpt; returns the .npz file's path.

    The class tokens are stored beside the images, as "cls" (N,K).
    """
    model, checkpoint = load_sampler(cfg)
    model = compile_blocks(model.to(run.device).eval(), cfg)
    meta = checkpoint.get("data", SD_VAE_META)  # other codes' checkpoints have none
    decode = load_decoder(meta, cfg.vae, cfg.vae_ckpt, run.device)
    scale, cls_scale = guidance_scales(cfg)
    if scale > 1:
        say(f"sampling with guidance {scale:g}, of class tokens {cls_scale:g}, for t in "
            f"[{cfg.guidance_low:g}, {cfg.guidance_high:g}]")

    def images(y, randn):
        x, cls = draw(cfg, run, model, y, randn)
        return {"arr_0": decode(x), "cls": cls}

    return generate_npz(cfg, run, images, model.num_classes)


# --------------------------------------------------------------------------------------------------
# Do generated images and class tokens fit? What only this method reports
# --------------------------------------------------------------------------------------------------
@torch.no_grad()
def class_tokens(teacher, images, device):
    """The teacher's class tokens (N,K), on the CPU, of an array of images (N,H,W,3)."""
    tokens = []
    for part in np.array_split(images, 8):
        cls, _ = teacher(torch.tensor(part, device=device))
        tokens.append(cls.cpu())
    return torch.cat(tokens)


def class_means(cfg, teacher, device):
    """The mean class token (num_classes,K) of each class, over 4000 real images."""
    data = PreparedData(cfg.data, cfg.resolution)
    real = class_tokens(teacher, data.array("images")[:4000], device)
    y = torch.tensor(data.array("labels")[:4000])
    means = [real[y == label].mean(dim=0) for label in range(data.meta["num_classes"])]
    return torch.stack(means)


def name_classes(tokens, means):
    """The class (N,) that each class token (N,K) names: the one with the nearest mean."""
    return torch.cdist(tokens, means).argmin(dim=1)


def mean_cosines(cls, seen, y):
    """Cosines of generated class tokens cls (N,K) to the tokens seen (N,K) in images of labels y.

    Three means: to the image that was generated with the token, to others of the same class, and to
    those of other classes.
    """
    cosines = F.normalize(cls, dim=-1) @ F.normalize(seen, dim=-1).T  # [token i, image j]
    is_same_image = torch.eye(len(y), dtype=torch.bool)
    is_same_class = y[:, None] == y
    same_image = cosines[is_same_image].mean()
    same_class = cosines[is_same_class & ~is_same_image].mean()
    other_class = cosines[~is_same_class].mean()
    return same_image, same_class, other_class


def compare_class_tokens(cfg, run, path):
    """Do the images in `path` fit the class tokens generated with them? Asks the teacher.

    Returns a file for evaluate.py and a text. The file holds the same images, labelled with the
    classes that their tokens name: its accuracy says how often the judge sees what a token names.
    """
    with np.load(path) as file:
        images = file["arr_0"]
        y = torch.from_numpy(file["labels"])
        cls = torch.from_numpy(file["cls"])
    teacher = load_teachers(cfg, run)[0]
    means = class_means(cfg, teacher, run.device)
    seen = class_tokens(teacher, images, run.device)  # what the teacher would give for the images
    named = name_classes(cls, means)
    named_by_teacher = name_classes(seen, means)
    by_token = path.with_name("samples-by-token.npz")
    np.savez(by_token, arr_0=images, labels=named)

    as_asked = (named == y).double().mean()
    as_seen = (named == named_by_teacher).double().mean()
    same_image, same_class, other_class = mean_cosines(cls, seen, y)
    text = (
        f"class tokens generated with samples.npz: {as_asked:.1%} name the class asked for (labels "
        f"of {by_token.name}),\n"
        f"{as_seen:.1%} the class that the teacher sees in the image; their cosine to its class "
        f"token of this image {same_image:.3f},\n"
        f"of others of the class {same_class:.3f}, of other classes {other_class:.3f}")
    return by_token, text


def report_toy(cfg, run):
    """Sample 480 images without and with guidance; have them, and their class tokens, judged."""
    cfg = replace(cfg, sample=480, ckpt=f"{cfg.out}/last.pt")
    plain = generate(replace(cfg, cfg_scale=1.0), run)
    guided = generate(replace(cfg, cfg_scale=2.0), run)
    if run.rank == 0:
        by_token, text = compare_class_tokens(cfg, run, plain)
        run_tool("evaluate.py", plain, guided, by_token, cfg.data)
        print(text)
        print(f"velocity loss of the class token {last_line(cfg)['loss_cls']:.4f}")
        print(summary(cfg))


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

"""REPA: representation alignment for diffusion transformers (Yu et al., arXiv 2410.06940).

A SiT learns to denoise, and meanwhile one early block must agree with a pretrained vision network:
a small MLP maps each token's hidden state h after block `encoder_depth` to the feature z that a
frozen teacher (DINOv2) computes from the CLEAN image at that place. Only the blocks up to that one
get a gradient from it, and the MLP is thrown away: sampling is plain SiT.

    L = mean |v_theta(x_t, t, y) - v|^2 - lambda mean_tokens cos(MLP(h), z)
    x_t = (1-t) x + t noise,  v = noise - x

    python repa.py                     the toy: data, training, samples, metrics; 3 minutes
    python repa.py --proj-coeff 0      plain SiT, the baseline: no teacher is run
    torchrun --nproc_per_node=8 repa.py --model SiT-XL/2        the paper, on data/imagenet256
    torchrun --nnodes=4 --nproc_per_node=8 --rdzv-backend=c10d --rdzv-endpoint=HOST:29500 \\
        repa.py --model SiT-XL/2
    torchrun --nproc_per_node=8 repa.py --model SiT-XL/2 --sample 50000 \\
        --ckpt runs/repa-SiT-XL-2/last.pt
    python evaluate.py runs/repa-toy/samples.npz data/toy

Published for SiT-XL/2 at 256 px, SDE with 250 steps: FID 7.9 after 400K training steps and 5.9
after 4M, both without guidance (--cfg-scale 1); 1.42 after 4M with 1.8 on t in [0, 0.7], the
defaults (the paper's Tables 4, 7, 9). Our runs: the toy and CIFAR-10, in docs/results.md; not
ImageNet.

What differs from the official code, on purpose: bf16, not fp16 with a loss scaler; the null label
is num_classes, not 1000; --cfg-prob reaches the model; --proj-coeff 0 runs no teacher; previews
show the EMA and the labels asked for; a resumed run goes on with the same images and noise; the
losses are vectorised (equal to rounding).
"""
import copy
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn as nn
import torch.nn.functional as F

from common import SIT_SIZES, SiT, init_linear, interpolate, lognormal_time, projector, sample
from support.checkpoints import load_weights, restore, save_run, sit_from_weights
from support.dataset import clean_input, micro_batches, open_data, step_draws
from support.flags import parse
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
from support.teachers import check_depth, check_grids, load_teachers
from support.terminal import say
from support.vae import SD_VAE_META, load_decoder


@dataclass
class Config:
    """One field is one flag. Values are the paper's for SiT-XL/2; RECIPES has other models'."""
    # The method
    projector_dim: int = 2048               # width of the projector's hidden layers

    # The run
    model: str = "toy"                      # toy, or SiT-{S,B,L,XL}/{2,4,8}; it picks the recipe
    data: str = "data/imagenet{resolution}"  # folder made by prepare.py
    out: str = "runs/repa-{model}"          # config.json, log.jsonl, last.pt, ema-*.pt, previews
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
    enc_type: str = "dinov2-vit-b"          # several with commas; prepared = DATA/teacher.pt
    teacher_ckpt: str = ""                  # their weights from files, not the hub, with commas
    encoder_depth: int = 8                  # align after this block, from 1; the paper: 4 for B
    proj_coeff: float = 0.5                 # lambda; 0 = plain SiT without a teacher

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
    cfg_scale: float = 1.8                  # guidance scale; 1 = none
    guidance_low: float = 0.0               # guidance acts for t from here
    guidance_high: float = 0.7              # to here; t = 1 is noise

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


# --------------------------------------------------------------------------------------------------
# The method
# --------------------------------------------------------------------------------------------------
class REPASiT(SiT):
    """SiT whose tokens after block `encoder_depth` also go through one MLP per teacher.

    z_dims: the teachers' widths K.
    """

    def __init__(self, input_size, in_channels, num_classes, sizes, encoder_depth, z_dims,
                 projector_dim):
        super().__init__(input_size, in_channels, num_classes, **sizes)
        self.encoder_depth = encoder_depth
        self.projectors = nn.ModuleList(
            [projector(sizes["hidden_size"], projector_dim, z_dim) for z_dim in z_dims])
        self.projectors.apply(init_linear)

    def forward(self, x_t, t, y):
        """Velocity (B,C,H,W) and, per teacher, the projected tokens z_hat (B,N,K)."""
        h, c = self.embed(x_t, t, y)
        z_hats = []
        for depth, block in enumerate(self.blocks, start=1):
            h = block(h, c)
            if depth == self.encoder_depth:  # token-wise, (B,N,D) -> (B,N,K)
                z_hats = [mlp(h) for mlp in self.projectors]
        return self.head(h, c), z_hats


def repa_loss(model, x, t, noise, y, zs, path_type="linear"):
    """The two terms of the loss, each (B,): velocity error, minus the cosine to the teachers.

    x, noise (B,C,H,W); t (B,); y (B,) with labels already dropped to the null label; zs: one
    (B,N,K) per teacher, raw features of the clean image. The second term lies in [-1,1] and is
    NEGATIVE in a healthy run.
    """
    x_t, v = interpolate(x, noise, t, path_type)
    v_hat, z_hats = model(x_t, t, y)
    loss_velocity = (v_hat - v).square().mean(dim=(1, 2, 3))
    if not z_hats:
        return loss_velocity, torch.zeros_like(loss_velocity)
    cosines = []
    for z_hat, z in zip(z_hats, zs):
        z_hat = F.normalize(z_hat.float(), dim=-1)
        z = F.normalize(z.float(), dim=-1)
        cosine = (z_hat * z).sum(dim=-1)  # token by token: (B,N,K) -> (B,N)
        cosines.append(cosine.mean(dim=1))
    loss_proj = -torch.stack(cosines).mean(dim=0)
    return loss_velocity, loss_proj


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
    """The frozen teachers (none without a projection loss) and the student, on the device."""
    teachers = []
    if cfg.proj_coeff > 0:
        check_depth(cfg)
        teachers = load_teachers(cfg, run)
    torch.manual_seed(cfg.seed)  # the SiT's initial weights do not depend on the teacher
    channels, size, _ = data.shape
    model = REPASiT(
        size, channels, data.meta["num_classes"], SIT_SIZES[cfg.model], cfg.encoder_depth,
        [teacher.width for teacher in teachers], cfg.projector_dim)
    check_grids(cfg, teachers, model.grid)
    if cfg.compile:
        for teacher in teachers:
            teacher.compile()
    return teachers, model.to(run.device)


def train(cfg, run):
    """Begin or continue the run in cfg.out."""
    data = open_data(cfg, need_images=cfg.proj_coeff > 0)
    teachers, model = build(cfg, data, run)
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
    flops_per_image = training_flops(model, *example_inputs(data, run))
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

        sums = torch.zeros(3, device=run.device)
        for i in range(run.accumulation):
            batch = next(loader)
            rows = slice(i * run.micro_batch, (i + 1) * run.micro_batch)
            is_last = i + 1 == run.accumulation
            # Gradients are reduced once a step: with the last micro-batch.
            reduction = nullcontext() if is_last or run.world == 1 else net.no_sync()
            with reduction:
                with run.autocast():
                    zs = [teacher(batch["images"])[1] for teacher in teachers]  # patches
                    x = clean_input(batch, data.meta, posterior_noise[rows])
                    y = batch["labels"].masked_fill(is_dropped[rows], model.num_classes)
                    velocity, proj = repa_loss(net, x, t[rows], noise[rows], y, zs, cfg.path_type)
                    loss = (velocity + cfg.proj_coeff * proj).mean()
                (loss / run.accumulation).backward()
            terms = torch.stack([loss, velocity.mean(), proj.mean()])
            sums += terms.detach() / run.accumulation

        grad_norm, is_finite = optimizer_step(optimizer, parameters, cfg.max_grad_norm)
        update_ema(ema, model, cfg.ema_decay)
        loss, velocity, proj = sums
        log.add(is_finite, loss=loss, loss_velocity=velocity, loss_proj=proj, grad_norm=grad_norm)

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


def report_toy(cfg, run):
    """Sample 480 images without and with guidance; have them judged beside real images."""
    cfg = replace(cfg, sample=480, ckpt=f"{cfg.out}/last.pt")
    plain = generate(replace(cfg, cfg_scale=1.0), run)
    guided = generate(replace(cfg, cfg_scale=2.0), run)
    if run.rank == 0:
        run_tool("evaluate.py", plain, guided, cfg.data)
        print(summary(cfg))


def main(argv=None):
    """Train or sample, as the command line says; the toy does both and has the result judged."""
    cfg = parse(argv, Config, SIT_SIZES, RECIPES, description=__doc__)
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

"""CAR-Flow: condition-aware reparameterization (Apple, NeurIPS 2025, arXiv 2509.19300).

Plain flow matching starts every class from the same Gaussian, so one network must move the mass far
and tell the classes apart on the way. CAR-Flow adds two small learned translations, of the noise by
mu0(y) and of the data by mu1(y), and trains them with the ordinary loss, its only term: paths
become shorter, and training faster. There is no teacher.

    L = mean |v_theta(x_t + mu_t, t, y) - (v + mu_t')|^2
    x_t = (1-t) x + t noise,  v = noise - x
    mu_t = (1-t) mu1 + t mu0,  mu_t' = mu0 - mu1

    python carflow.py                       the toy: data, training, samples, metrics; 3 minutes
    python carflow.py --shift none          plain SiT, the baseline; source and target: one end only
    python carflow.py --model synthetic     the paper's experiment in one dimension; 1 minute
    python carflow.py --model synthetic --learn-scale source    the collapse of a learned scale
    torchrun --nproc_per_node=8 carflow.py --model SiT-XL/2     the paper, on data/imagenet256
    torchrun --nproc_per_node=8 carflow.py --model SiT-XL/2 --sample 50000 \\
        --ckpt runs/carflow-SiT-XL-2/last.pt
    python evaluate.py runs/carflow-toy/samples.npz data/toy

Published for SiT-XL/2 at 256 px, stochastic Heun with 250 evaluations: FID 2.07 for their SiT, 1.68
with both shifts. Steps and guidance are not given: 7M is SiT's recipe, which they follow, and 1.5
our inference from SiT's 2.06. Our runs: the toy, the synthetic and checks, in docs/results.md; not
ImageNet.

What differs from repa.py: no teacher; the SiT is wrapped, and its label table feeds the shift nets,
too, which have a learning rate of their own; Heun steps. There is no official code and no
checkpoint to confirm this file: its fixtures were made by an independent float64 implementation of
the same equations. "CAR-Flow's derivation" in docs/results.md says which choices are the paper's,
which were fitted to its sizes and which are ours, and why shifts are free, scales collapse and
guidance acts in x.
"""
import copy
import math
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

from common import SIT_SIZES, SiT, SizeError, interpolate, lognormal_time, path_coefficients, sample
from support import checkpoints
from support.checkpoints import load_strict, load_weights, restore, save_run, sit_from_weights
from support.dataset import PreparedData, clean_input, micro_batches, open_data, step_draws
from support.flags import AMOUNT, COUNT, parse
from support.line import STD, Flows1D, distances, draw_paths, measured_draws, velocity_errors
from support.log import Log
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
from support.terminal import fail, make_folder, say
from support.vae import SD_VAE_META, load_decoder


@dataclass
class Config:
    """One field is one flag. Values are the paper's for SiT-XL/2; RECIPES has other models'."""
    # The method
    shift: Literal["none", "source", "target", "joint"] = "joint"  # move the noise, the data, both
    shift_width: int = 96                   # channels of a shift net: 96 adds 0.5995 % to SiT-XL/2
    shift_lr_mult: float = 1.0              # the shift nets' learning rate is this multiple
    learn_scale: Literal["none", "source", "target"] = "none"  # synthetic: scale too; it collapses

    # The run
    model: str = "toy"                      # toy, synthetic, or SiT-{S,B,L,XL}/{2,4,8}: the recipe
    data: str = "data/imagenet{resolution}"  # folder made by prepare.py
    out: str = "runs/carflow-{model}"       # config.json, log.jsonl, last.pt, ema-*.pt, previews
    resolution: int = 256                   # pixels
    batch_size: int = 256                   # images per step, over all GPUs
    micro_batch: int = 0                    # images per GPU at once; 0 = batch size / GPUs
    max_train_steps: int = 7_000_000        # 1400 epochs: SiT's; the paper gives no number

    # Optimisation
    learning_rate: float = 1e-4             # AdamW, constant
    max_grad_norm: float = 1.0              # gradients are clipped to this norm
    ema_decay: float = 0.9999               # of the averaged weights, every step

    # Diffusion
    cfg_prob: float = 0.1                   # labels dropped, for classifier-free guidance
    path_type: Literal["linear", "cosine"] = "linear"       # interpolant
    weighting: Literal["uniform", "lognormal"] = "uniform"  # distribution of t

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
    num_steps: int = 125                    # of the sampler
    heun: bool = True                       # second-order steps: two evaluations each
    cfg_scale: float = 1.5                  # guidance scale; 1 = none; the paper gives no number
    guidance_low: float = 0.0               # guidance acts for t from here
    guidance_high: float = 1.0              # to here; t = 1 is noise

    # Speed
    bench: int = 0                          # train this many steps on random data, write nothing


MODELS = SIT_SIZES | {"synthetic": None}  # no SiT: the experiment at the end of this file
RECIPES = {  # by the beginning of the model's name
    "toy": dict(
        data="data/toy", resolution=16, batch_size=32, max_train_steps=2000,
        learning_rate=4e-3, ema_decay=0.99, shift_width=16,
        workers=0, log_every=50, save_every=500, keep_every=0, preview_every=400,
        mode="ode", num_steps=20, heun=False, cfg_scale=1.0),
    "synthetic": dict(max_train_steps=4000, learning_rate=1e-3, shift_lr_mult=10.0, num_steps=50),
}
RANGES = {"shift_width": COUNT, "shift_lr_mult": AMOUNT}


# --------------------------------------------------------------------------------------------------
# The method
# --------------------------------------------------------------------------------------------------
# The nets of a CARFlow, by --shift.
SHIFTS = dict(none=(), source=("shift0",), target=("shift1",), joint=("shift0", "shift1"))


class ShiftNet(nn.Module):
    """One shift: class embedding e (B,D) to a translation mu (B,C,S,S).

    It begins with a 4x4 map of W = `width` channels, which doubles up to S = `size`.
    """

    def __init__(self, dim, channels, size, width=96, base=4):
        super().__init__()
        doublings = max(0, round(math.log2(size / base)))
        if base * 2 ** doublings != size:
            raise SizeError(f"shifts are made for inputs of {base}, {2 * base}, {4 * base} ... "
                            f"pixels, this one has {size}: take another --resolution, or --shift "
                            f"none")
        self.first_map = (width, base, base)
        self.proj = nn.Linear(dim, width * base * base)
        self.convs = nn.ModuleList(
            [nn.Conv2d(width, width, 3, padding=1) for _ in range(doublings)])
        self.out = nn.Conv2d(width, channels, 3, padding=1)
        # Training starts as plain SiT. More zeros than these would block the gradient.
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, e):
        with torch.autocast(e.device.type, enabled=False):  # fp32, as the tensors that it moves
            h = self.proj(e).unflatten(1, self.first_map)  # (B,W*4*4) -> (B,W,4,4)
            for conv in self.convs:
                h = F.interpolate(F.silu(h), scale_factor=2)  # (B,W,s,s) -> (B,W,2s,2s)
                h = conv(h)
            return self.out(F.silu(h))


class CARFlow(nn.Module):
    """CAR-Flow as a change of coordinates around a velocity network sit(x_t, t, y).

    The paper trains v_theta at z_t = x_t + mu_t with the target v + mu_t' (eq. 9). So

        mu_t(y) = a(t) mu1(y) + s(t) mu0(y)
        F(x_t, t, y) = v_theta(x_t + mu_t(y), t, y) - mu_t'(y)

    has that loss, and its gradients, as the plain |F - v|^2, and F is all that the samplers need:
    on the linear path a step in x is the step in z, yet begins at plain noise and ends in data.
    The target is not detached: it is what first pulls mu0 - mu1 to the mean of the class.

    sit needs in_channels, input_size, num_classes and a label table y_embedder.
    """

    def __init__(self, sit, shift="joint", width=96, path_type="linear"):
        super().__init__()
        self.sit = sit
        self.path_type = path_type
        self.in_channels = sit.in_channels
        self.input_size = sit.input_size
        self.num_classes = sit.num_classes
        self.shape = (sit.in_channels, sit.input_size, sit.input_size)  # of x: (C,H,W)
        self.shift_names = SHIFTS[shift]
        dim = sit.y_embedder.embedding_table.embedding_dim
        for name in self.shift_names:  # no more than these: DDP wants a gradient everywhere
            net = ShiftNet(dim, sit.in_channels, sit.input_size, width)
            self.add_module(name, net)

    @property
    def blocks(self):
        return self.sit.blocks  # to be compiled

    def shift_nets(self):
        """The shift nets as one module, whose state dict has the names that they have here."""
        return nn.ModuleDict({name: getattr(self, name) for name in self.shift_names})

    def shifts(self, y):
        """mu0 and mu1, each (B,C,H,W), of labels y (B,); the null label has shifts, too."""
        e = self.sit.y_embedder(y)  # (B,D)
        mu0 = mu1 = e.new_zeros(len(y), *self.shape)
        if "shift0" in self.shift_names:
            mu0 = self.shift0(e)
        if "shift1" in self.shift_names:
            mu1 = self.shift1(e)
        return mu0, mu1

    def shifted(self, x_t, t, y, mu0, mu1):
        """F (B,C,H,W) of given shifts (B,C,H,W)."""
        a, s, da, ds = path_coefficients(t.view(-1, 1, 1, 1), self.path_type)
        mu_t = a * mu1 + s * mu0
        dmu_t = da * mu1 + ds * mu0  # mu_t'
        return self.sit(x_t + mu_t, t, y) - dmu_t

    def forward(self, x_t, t, y):
        """F (B,C,H,W): the model, for the plain loss and for the samplers."""
        mu0, mu1 = self.shifts(y)
        return self.shifted(x_t, t, y, mu0, mu1)

    @torch.no_grad()
    def table(self):
        """mu0 and mu1 of all labels, the null label last, each (num_classes+1,C,H,W)."""
        device = self.sit.y_embedder.embedding_table.weight.device
        labels = torch.arange(self.num_classes + 1, device=device)
        # In parts, for a shift net's hidden maps are W/C times as large as what it makes.
        mu0s, mu1s = zip(*[self.shifts(part) for part in labels.split(64)])
        return torch.cat(mu0s), torch.cat(mu1s)

    def with_table(self):
        """F for one run of a sampler: all shifts are computed now, not at every step."""
        mu0, mu1 = self.table()

        def velocity(x_t, t, y):
            return self.shifted(x_t, t, y, mu0[y], mu1[y])

        return velocity


def carflow_loss(model, x, t, noise, y, path_type="linear"):
    """Velocity error (B,), the paper's eq. 9 seen from x.

    x, noise (B,C,H,W); t (B,); y (B,) with labels already dropped to the null label.
    """
    x_t, v = interpolate(x, noise, t, path_type)
    return (model(x_t, t, y) - v).square().mean(dim=(1, 2, 3))


def split_shifts(weights):
    """The weights of the shift nets, and the others, which are those of a SiT."""
    shifts = {name: weight for name, weight in weights.items() if name.startswith("shift")}
    others = {name: weight for name, weight in weights.items() if name not in shifts}
    return shifts, others


def init_from(path, model):
    """Start from a SiT, with fresh shifts, or from a CARFlow with the same; returns the fresh."""
    weights, _ = load_weights(path)
    shifts, _ = split_shifts(weights)
    if shifts:
        load_strict(model.shift_nets(), shifts,
                    f"{path} has other shifts: a network keeps the --shift and --shift-width that "
                    f"it was trained with")
    fresh = checkpoints.init_from(path, model.sit)
    if shifts:
        return fresh
    return [*fresh, *model.shift_names]


def load_carflow(cfg, path):
    """The EMA model of a checkpoint, and the checkpoint; a plain SiT is one without shifts."""
    weights, checkpoint = load_weights(path, cfg)
    shifts, others = split_shifts(weights)
    sit = sit_from_weights(others, cfg.model)
    names = tuple(sorted({name.split(".")[0] for name in shifts}))
    shift_of = {nets: shift for shift, nets in SHIFTS.items()}
    width = 0
    if shifts:
        width = shifts[f"{names[0]}.out.weight"].shape[1]  # (C,W,3,3)
    model = CARFlow(sit, shift_of[names], width, cfg.path_type)
    load_strict(model.shift_nets(), shifts, f"{path} has shifts of another form")
    return model, checkpoint


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
    """The network in its new coordinates, on the device."""
    torch.manual_seed(cfg.seed)  # the SiT's initial weights do not depend on --shift
    channels, size, _ = data.shape
    sit = SiT(size, channels, data.meta["num_classes"], **SIT_SIZES[cfg.model])
    return CARFlow(sit, cfg.shift, cfg.shift_width, cfg.path_type).to(run.device)


def train(cfg, run):
    """Begin or continue the run in cfg.out."""
    data = open_data(cfg, need_images=False)
    model = build(cfg, data, run)
    decode = None
    if cfg.preview_every and not cfg.bench:  # a missing VAE shows now, not at the first preview
        decode = load_decoder(data.meta, cfg.vae, cfg.vae_ckpt, run.device)
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        dict(params=[p for p in model.sit.parameters() if p.requires_grad]),
        dict(params=list(model.shift_nets().parameters()),
             lr=cfg.learning_rate * cfg.shift_lr_mult),
    ]
    optimizer = torch.optim.AdamW(
        groups, lr=cfg.learning_rate, betas=(0.9, 0.999), weight_decay=0, fused=True)
    first_step = restore(cfg, data.meta, model, ema, optimizer, init=init_from)
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
                    x = clean_input(batch, data.meta, posterior_noise[rows])
                    # Dropped once, for the network and the shifts: were each to draw its own, they
                    # would disagree on 18 %.
                    y = batch["labels"].masked_fill(is_dropped[rows], model.num_classes)
                    loss = carflow_loss(net, x, t[rows], noise[rows], y, cfg.path_type).mean()
                (loss / run.accumulation).backward()
            with torch.no_grad():  # how large the shifts are, for the log
                size0, size1 = [mu.square().mean().sqrt() for mu in model.shifts(y)]
            terms = torch.stack([loss, size0, size1])
            sums += terms.detach() / run.accumulation

        grad_norm, is_finite = optimizer_step(optimizer, parameters, cfg.max_grad_norm)
        update_ema(ema, model, cfg.ema_decay)
        loss, size0, size1 = sums
        log.add(is_finite, loss=loss, shift0=size0, shift1=size1, grad_norm=grad_norm)

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
    """Latents x (B,C,H,W) of labels y (B,) by the paper's sampler."""
    noise = randn(model.in_channels, model.input_size, model.input_size)
    y_null = torch.full_like(y, model.num_classes)
    with run.autocast():
        return sample(
            model.with_table(), noise, y, y_null, randn=randn,
            mode=cfg.mode, num_steps=cfg.num_steps, heun=cfg.heun, path_type=cfg.path_type,
            cfg_scale=cfg.cfg_scale, guidance_low=cfg.guidance_low,
            guidance_high=cfg.guidance_high)


def generate(cfg, run):
    """Sample cfg.sample images from the EMA weights in cfg.ckpt; returns the .npz file's path."""
    model, checkpoint = load_carflow(cfg, cfg.ckpt)
    model = compile_blocks(model.to(run.device).eval(), cfg)
    meta = checkpoint.get("data", SD_VAE_META)  # other codes' checkpoints have none
    decode = load_decoder(meta, cfg.vae, cfg.vae_ckpt, run.device)

    def images(y, randn):
        return {"arr_0": decode(draw(cfg, run, model, y, randn))}

    return generate_npz(cfg, run, images, model.num_classes)


def report_toy(cfg, run):
    """Have 480 images judged, without and with guidance, and say what the shifts have become."""
    cfg = replace(cfg, sample=480, ckpt=f"{cfg.out}/last.pt")
    plain = generate(replace(cfg, cfg_scale=1.0), run)
    guided = generate(replace(cfg, cfg_scale=2.0), run)
    if run.rank == 0:
        run_tool("evaluate.py", plain, guided, cfg.data)
        model, _ = load_carflow(cfg, cfg.ckpt)
        data = PreparedData(f"{cfg.data}/val", cfg.resolution)
        metrics = diagnose(model.to(run.device).eval(), data, run)
        text = ", ".join(f"{name} {value:.4f}" for name, value in metrics.items())
        if cfg.preview_every > 0:
            text += f"; look at {cfg.out}/preview-{cfg.max_train_steps}.png, a row per class"
        print(text)


@torch.no_grad()
def diagnose(model, data, run, count=2000):
    """{name: metric} of a model on `count` images.

    Their times and noise are always the same, so losses compare between models.
    """
    rows = np.arange(min(count, len(data)))
    batch = {name: array.to(run.device) for name, array in data[rows].items()}
    y = batch["labels"]
    normal, uniform = step_draws(0, 0, len(y), replace(run, rank=0, world=1))
    x = clean_input(batch, data.meta, normal(*data.shape))
    t = uniform()
    noise = normal(*data.shape)
    loss = carflow_loss(model, x, t, noise, y, model.path_type).mean()
    labels = y.unique()
    means = torch.stack([x[y == label].mean(dim=0) for label in labels])  # E[x|y], (n,C,H,W)
    mu0, mu1 = [mu.flatten(1) for mu in model.shifts(labels)]  # (n,C,H,W) -> (n,C*H*W)
    cosine = F.cosine_similarity(mu0 - mu1, means.flatten(1)).mean()
    return {
        "validation velocity loss": loss,
        "norm of mu0": mu0.norm(dim=1).mean(),
        "of mu1": mu1.norm(dim=1).mean(),
        "cosine of mu0 - mu1 with the class mean": cosine,
    }


# --------------------------------------------------------------------------------------------------
# The paper's experiment in one dimension: classes N(-1.5, 0.2^2) and N(1.5, 0.2^2)
# --------------------------------------------------------------------------------------------------
SEEDS = 3
STEPS_SHOWN = 50, 100, 200, 300, 500, 1000, 4000
VARIANTS = {  # what is learned: mu0, mu1, log s0, log s1
    "none": (0, 0, 0, 0),
    "source": (1, 0, 0, 0),
    "target": (0, 1, 0, 0),
    "joint": (1, 1, 0, 0),
    "scale_source": (1, 0, 1, 0),
    "scale_target": (0, 1, 0, 1),
}


def synthetic(cfg, run):
    """Train all variants at once, print the table, draw paths.png.

    Returns {metric: (variants,SEEDS)} and the model.
    """
    if run.world > 1 or cfg.sample or cfg.bench or cfg.init:
        fail("--model synthetic is one small job: it takes no torchrun, --sample, --bench or "
             "--init")
    variants = list(VARIANTS)
    if cfg.learn_scale != "none":
        variants = [cfg.learn_scale, f"scale_{cfg.learn_scale}"]
    torch.manual_seed(cfg.seed)
    model = Flows1D([VARIANTS[name] for name in variants], SEEDS).to(run.device)
    groups = [
        dict(params=[model.fc1, model.fc2, model.fc3]),
        dict(params=[model.ends], lr=cfg.learning_rate * cfg.shift_lr_mult),
    ]
    optimizer = torch.optim.Adam(groups, lr=cfg.learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, cfg.max_train_steps)
    noise, y = measured_draws(len(model.learned), run.device)

    values = {}  # {metric: a value of every network M and every sample}
    for step in tqdm(range(1, cfg.max_train_steps + 1), unit="step", disable=None):
        normal, uniform = step_draws(cfg.seed, step, SEEDS * cfg.batch_size, run)
        errors = velocity_errors(model, normal, uniform)
        errors.mean(dim=1).sum().backward()  # no model shares a parameter with another
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        if step in STEPS_SHOWN or step == cfg.max_train_steps:
            z, x = model.paths(noise, y, cfg.num_steps)
            values[f"W1 at step {step}"] = distances(x)
    z = z.unflatten(-1, (2, -1))  # (steps+1,M,2*n) -> (steps+1,M,2,n), by class
    x = x.unflatten(-1, (2, -1))
    values["path length"] = z.diff(dim=0).abs().sum(dim=0)
    values[f"samples' deviation (truth: {STD})"] = x.std(dim=-1)
    with torch.no_grad():
        least = math.pi / 2 * STD
        normal, uniform = step_draws(cfg.seed, 0, SEEDS * 20_000, run)
        values[f"loss (at scale 1, >= {least:.4f})"] = velocity_errors(model, normal, uniform)
        _, _, s0, s1 = model.shifts_and_scales(y)
        values["scale"] = s0 * s1

    metrics = {}
    title = f"mean +- deviation of {SEEDS} seeds"
    print(f"{title:<34}" + "".join(f"{name:>17}" for name in variants))
    for name, value in values.items():
        metrics[name] = value.flatten(1).mean(dim=1).view(-1, SEEDS)
        cells = [f"{seeds.mean():9.3f} +-{seeds.std():6.3f}" for seeds in metrics[name]]
        print(f"{name:<34}" + "".join(cells))
    make_folder(cfg.out)
    lengths = metrics["path length"][:, 0]  # of the first seed, whose paths are drawn
    titles = [f"{name}: path length {v:.2f}" for name, v in zip(variants, lengths)]
    draw_paths(f"{cfg.out}/paths.png", titles, z[:, ::SEEDS].cpu().numpy())
    print(f"look at {cfg.out}/paths.png")
    return metrics, model


def main(argv=None):
    """Train or sample, as the command line says; the toy does both and has the result judged."""
    cfg = parse(argv, Config, MODELS, RECIPES, RANGES, description=__doc__)
    run = setup(cfg)
    with clear_errors(run):
        if cfg.model == "synthetic":
            return synthetic(cfg, run)
        if cfg.learn_scale != "none":
            fail("--learn-scale is for --model synthetic: elsewhere only shifts are learned")
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

"""ERW: embedded representation warmup for diffusion transformers (Liu et al., arXiv 2504.10188).

REPA's early blocks learn features and denoising at once. ERW begins with the features: in phase I
the embedders, the first `l2r_depth` blocks and a small MLP learn to predict the tokens that a
frozen teacher (DINOv2) gives the CLEAN input. Phase II trains the whole SiT from there, by REPA's
loss with an alignment that fades. Steps k count both phases, W of them are phase I.

    phase I, k <= W:   L = - 1/2 mean_tokens cos(MLP(h), z)
                       with x_t = x and t = 0, after block l2r_depth
    phase II, k > W:   L = mean |v_theta(x_t, t, y) - v|^2 - lambda_k mean_tokens cos(MLP(h), z)
                       lambda_k = lambda 2^(-(k-W)/H), after block encoder_depth

What differs from repa.py: phase I; a deeper alignment, whose weight halves every H steps; optional
rotary positions; a probe of checkpoints.

    python erw.py                      the toy: data, training, samples, metrics; 3 minutes
    python erw.py --warmup-steps 0     phase II alone; REPA with --proj-decay-half-life inf, too
    python erw.py --probe 1000 --ckpt runs/erw-toy/last.pt     are blocks and teacher alike? (CKNNA)
    torchrun --nproc_per_node=8 erw.py --model SiT-XL/2        --recipe released: its code's recipe
    torchrun --nnodes=4 --nproc_per_node=8 --rdzv-backend=c10d --rdzv-endpoint=HOST:29500 \\
        erw.py --model SiT-XL/2
    torchrun --nproc_per_node=8 erw.py --model SiT-XL/2 --sample 50000 \\
        --ckpt runs/erw-SiT-XL-2/last.pt
    python evaluate.py runs/erw-toy/samples.npz data/toy

Published for SiT-XL/2 at 256 px, SDE with 250 steps: FID 12.1 without guidance (--cfg-scale 1)
after 100K steps, not counting 100K of phase I: the defaults (v3 of the paper, Tables 2 and 3; REPA
19.4; v1 claimed 6.0). Guided as by default: 1.94 after 40 epochs (v1). Our runs: the toy and
checks, in docs/results.md; not ImageNet.

What differs from the official code, on purpose. It does not run as released; mended, its phase I
learns from the last image of each batch alone (here: all), and a run through both phases throws
phase I away (here the weights go on, the optimiser and the EMA begin again). Its RoPE comes with
phase II (here: with both or neither, but for --recipe released), its CKNNA is 0.94 for unrelated
features (here: the reference definition), its cost leaves out phase I (here: both are told). Left
out: qk-norm, and the paper's contrastive loss, whose temperature is not known.
"""
import copy
import json
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import torch
import torch.nn as nn
import torch.nn.functional as F

from common import SIT_SIZES, SiT, init_linear, interpolate, lognormal_time, projector, sample
from support.checkpoints import init_from, load_weights, restore, save_run, sit_from_weights
from support.dataset import PreparedData, clean_input, micro_batches, open_data, step_draws
from support.flags import BOOKKEEPING, COUNT_OR_NONE, parse
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
from support.terminal import fail, say
from support.vae import SD_VAE_META, load_decoder


@dataclass
class Config:
    """One field is one flag. Values are the paper's for SiT-XL/2; RECIPES has other models'."""
    # The method
    recipe: Literal["v3", "released"] = "v3"  # the paper's last version, or its first code
    warmup_steps: int = 100_000             # W, steps of phase I; 0 = phase II alone
    l2r_depth: int = 5                      # phase I trains, and aligns after, this many blocks
    proj_decay_half_life: float = 50_000    # H, steps in which lambda halves; inf = constant
    use_rope: Literal["never", "always", "phase2"] = "never"  # rotary positions
    projector_dim: int = 2048               # width of the projector's hidden layers
    probe: int = 0                          # print the CKNNA of --ckpt's blocks on this many images

    # The run
    model: str = "toy"                      # toy, or SiT-{S,B,L,XL}/{2,4,8}; it picks the recipe
    data: str = "data/imagenet{resolution}"  # folder made by prepare.py
    out: str = "runs/erw-{model}"           # config.json, log.jsonl, last.pt, ema-*.pt, previews
    resolution: int = 256                   # pixels
    batch_size: int = 256                   # images per step, over all GPUs
    micro_batch: int = 0                    # images per GPU at once; 0 = batch size / GPUs
    max_train_steps: int = 200_000          # of both phases; the paper: 50K or 100K after phase I

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
    encoder_depth: int = 18                 # phase II aligns after this block, from 1
    proj_coeff: float = 0.5                 # lambda when phase II begins; 0 = none then

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
    cfg_scale: float = 2.2                  # guidance scale; 1 = none
    guidance_low: float = 0.0               # guidance acts for t from here
    guidance_high: float = 0.95             # to here; t = 1 is noise

    # Speed
    bench: int = 0                          # train this many steps on random data, write nothing


RECIPES = {  # by the beginning of the model's name; the paper names no depths for S and L
    "toy": dict(
        data="data/toy", resolution=16, batch_size=32, max_train_steps=2400,
        learning_rate=4e-3, ema_decay=0.99, projector_dim=256,
        enc_type="prepared", encoder_depth=2,
        workers=0, log_every=50, save_every=500, keep_every=0, preview_every=400,
        mode="ode", num_steps=20, cfg_scale=1.0, guidance_high=1.0,
        warmup_steps=400, l2r_depth=2, proj_decay_half_life=1000),
    "SiT-S": dict(encoder_depth=8, l2r_depth=8),
    "SiT-B": dict(encoder_depth=8, l2r_depth=8),
}
RELEASED = {  # what --recipe released changes of these
    "toy": dict(l2r_depth=4, proj_coeff=1.0, use_rope="phase2"),
    "SiT-S": dict(l2r_depth=4, proj_coeff=1.0, use_rope="phase2"),
    "SiT-B": dict(l2r_depth=4, proj_coeff=1.0, use_rope="phase2"),
    "SiT-L": dict(
        max_train_steps=300_000, l2r_depth=4, encoder_depth=14, proj_coeff=3.0, use_rope="phase2"),
    "SiT-XL": dict(
        max_train_steps=300_000, l2r_depth=4, encoder_depth=14, proj_coeff=6.0, use_rope="phase2"),
}
RANGES = {"warmup_steps": COUNT_OR_NONE, "probe": COUNT_OR_NONE,
          "proj_decay_half_life": (1, float("inf"))}
MAY_CHANGE = BOOKKEEPING | {"probe"}  # between a run and its continuation
WARMUP_COEFF = 0.5  # of phase I (released code); AdamW divides it out, but for clipping and epsilon


def parse_config(argv):
    """Config from the command line: --recipe picks the recipes, every flag overrides them."""
    cfg = parse(argv, Config, SIT_SIZES, RECIPES, RANGES, __doc__)
    if cfg.recipe == "released":
        recipes = {model: RECIPES.get(model, {}) | changes for model, changes in RELEASED.items()}
        cfg = parse(argv, Config, SIT_SIZES, recipes, RANGES, __doc__)
    if cfg.bench:
        cfg.warmup_steps = min(cfg.warmup_steps, cfg.bench // 2)  # to measure both phases
    return cfg


# --------------------------------------------------------------------------------------------------
# The method
# --------------------------------------------------------------------------------------------------
def rope_2d(grid, head_dim, device=None):
    """cos, sin (N,head_dim/2) for rotate: half of a head turns with a row, half with a column."""
    freqs = 10000.0 ** (-torch.arange(head_dim // 4, device=device) / (head_dim // 4))
    tokens = torch.arange(grid * grid, device=device)
    row_angles = torch.outer(tokens // grid, freqs)  # (N,head_dim/4)
    column_angles = torch.outer(tokens % grid, freqs)
    angles = torch.cat([row_angles, column_angles], dim=1)
    return angles.cos(), angles.sin()


class ERWSiT(SiT):
    """SiT with an MLP per teacher, of width z_dims[i], after a block that depends on the phase."""

    def __init__(self, input_size, in_channels, num_classes, sizes, encoder_depth=0, z_dims=(),
                 projector_dim=0, l2r_depth=0, use_rope="never"):
        super().__init__(input_size, in_channels, num_classes, **sizes)
        self.encoder_depth = encoder_depth
        self.l2r_depth = l2r_depth
        self.rope_phases = {"never": (), "always": (1, 2), "phase2": (2,)}[use_rope]
        self.head_dim = sizes["hidden_size"] // sizes["num_heads"]
        self.projectors = nn.ModuleList(
            [projector(sizes["hidden_size"], projector_dim, z_dim) for z_dim in z_dims])
        self.projectors.apply(init_linear)

    def forward(self, x_t, t, y, phase=2):
        """Velocity (B,C,H,W), None in phase 1; per teacher, the projected tokens z_hat (B,N,K)."""
        h, c = self.embed(x_t, t, y)
        rope = None
        if phase in self.rope_phases:
            rope = rope_2d(self.grid, self.head_dim, h.device)
        aligned_depth = self.l2r_depth if phase == 1 else self.encoder_depth
        z_hats = []
        for depth, block in enumerate(self.blocks, start=1):
            h = block(h, c, rope)
            if depth == aligned_depth:  # token-wise, (B,N,D) -> (B,N,K)
                z_hats = [mlp(h) for mlp in self.projectors]
                if phase == 1:  # no later block runs
                    return None, z_hats
        return self.head(h, c), z_hats

    def velocity(self, x_t, t, y):
        """The velocity alone, for sampling: with the positions of phase II."""
        return self(x_t, t, y)[0]


def erw_loss(model, x, t, noise, y, zs, path_type="linear", phase=2):
    """The two terms of the loss, each (B,): velocity error, minus the cosine to the teachers.

    x, noise (B,C,H,W); t (B,); y (B,) with labels already dropped to the null label; zs: one
    (B,N,K) per teacher, raw features of the clean image. The second term lies in [-1,1] and is
    NEGATIVE in a healthy run. Phase 1 looks at x itself, at t = 0, and has no velocity error: 0.
    """
    if phase == 1:
        _, z_hats = model(x, torch.zeros_like(t), y, phase)
        loss_velocity = torch.zeros_like(t)
    else:
        x_t, v = interpolate(x, noise, t, path_type)
        v_hat, z_hats = model(x_t, t, y, phase)
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


def decayed_coeff(cfg, steps_done):
    """lambda 2^(-(k-W)/H): the weight of the alignment in phase II after k steps of both phases."""
    steps_of_phase_2 = max(steps_done - cfg.warmup_steps, 0)
    return cfg.proj_coeff * 2.0 ** (-steps_of_phase_2 / cfg.proj_decay_half_life)


def begin_phase(model, phase):
    """Freeze what the phase's loss does not reach: DDP would wait for it. Returns what learns."""
    for part in (*model.blocks[model.l2r_depth:], model.final_layer):
        part.requires_grad_(phase == 2)
    return [p for p in model.parameters() if p.requires_grad]


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
def needs_teacher(cfg):
    """Phase I always learns from a teacher, phase II where its alignment has a weight."""
    return cfg.warmup_steps > 0 or cfg.proj_coeff > 0


def build(cfg, data, run):
    """The frozen teachers (none where neither phase aligns) and the student, on the device."""
    teachers = []
    if needs_teacher(cfg):
        check_depth(cfg, "encoder_depth")
        check_depth(cfg, "l2r_depth")
        teachers = load_teachers(cfg, run)
    torch.manual_seed(cfg.seed)  # the SiT's initial weights do not depend on the teacher
    channels, size, _ = data.shape
    model = ERWSiT(
        size, channels, data.meta["num_classes"], SIT_SIZES[cfg.model], cfg.encoder_depth,
        [teacher.width for teacher in teachers], cfg.projector_dim, cfg.l2r_depth, cfg.use_rope)
    check_grids(cfg, teachers, model.grid)
    if cfg.compile:
        for teacher in teachers:
            teacher.compile()
    return teachers, model.to(run.device)


def train(cfg, run):
    """Begin or continue the run in cfg.out: phase I up to step warmup_steps, then phase II."""
    data = open_data(cfg, need_images=needs_teacher(cfg))
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
    flops = {phase: training_flops(model, *example_inputs(data, run), phase) for phase in (1, 2)}
    announce(cfg, run, data, model, flops[2])
    if cfg.warmup_steps > 0:
        say(f"phase I: {cfg.warmup_steps:,} of the steps, {flops[1] / 1e9:,.2f} GFLOP per image")
    stop = catch_stop(run)
    loader = micro_batches(data, cfg.seed, cfg.batch_size, run, first_step, cfg.workers)

    for step in range(first_step + 1, cfg.max_train_steps + 1):
        phase = 1 if step <= cfg.warmup_steps else 2
        if step == cfg.warmup_steps + 1:  # the weights go on; their average and AdamW begin again
            ema.load_state_dict(model.state_dict())
            optimizer.state.clear()
        if step in (first_step + 1, cfg.warmup_steps + 1):  # a phase begins, or goes on
            parameters = begin_phase(model, phase)
            net = parallelise(model, cfg, run)
            log = Log(cfg, run, step - 1, flops[phase])
        proj_coeff = WARMUP_COEFF if phase == 1 else decayed_coeff(cfg, step - 1)

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
                    velocity, proj = erw_loss(
                        net, x, t[rows], noise[rows], y, zs, cfg.path_type, phase)
                    loss = (velocity + proj_coeff * proj).mean()
                (loss / run.accumulation).backward()
            terms = torch.stack([loss, velocity.mean(), proj.mean()])
            sums += terms.detach() / run.accumulation

        grad_norm, is_finite = optimizer_step(optimizer, parameters, cfg.max_grad_norm)
        update_ema(ema, model, cfg.ema_decay)
        loss, velocity, proj = sums
        log.add(is_finite, loss=loss, loss_velocity=velocity, loss_proj=proj,
                proj_coeff=loss.new_full((), proj_coeff), grad_norm=grad_norm)

        is_last_step = step == cfg.max_train_steps
        stopping = stop(step)
        # No line of the log mixes the phases.
        if step % cfg.log_every == 0 or is_last_step or step == cfg.warmup_steps:
            log.write(step)
        if run.rank == 0 and not cfg.bench:
            with log.pause():
                if step % cfg.save_every == 0 or is_last_step or stopping:
                    save_run(cfg, "last.pt", step, data.meta,
                             model=model, ema=ema, optimizer=optimizer, phase=phase)
                if cfg.keep_every and step % cfg.keep_every == 0:
                    save_run(cfg, f"ema-{step}.pt", step, data.meta, ema=ema, phase=phase)
                is_due = cfg.preview_every and (step % cfg.preview_every == 0 or is_last_step)
                if is_due and phase == 2:  # phase I draws nothing
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
            model.velocity, noise, y, y_null, randn=randn,
            mode=cfg.mode, num_steps=cfg.num_steps, heun=cfg.heun, path_type=cfg.path_type,
            cfg_scale=cfg.cfg_scale, guidance_low=cfg.guidance_low,
            guidance_high=cfg.guidance_high)


def load_sampler(cfg):
    """The student in cfg.ckpt without its projectors, and the checkpoint it came in."""
    weights, checkpoint = load_weights(cfg.ckpt, cfg)
    if checkpoint.get("phase") == 1:
        fail(f"{cfg.ckpt} is of phase I, which learns no velocity: train on, or inspect it by "
             f"--probe")
    # Official files hold the table of angles, which rope_2d computes.
    weights = {name: w for name, w in weights.items() if not name.startswith("feat_rope.")}
    # The flag is for files of other programs, which do not say it.
    use_rope = checkpoint.get("config", {}).get("use_rope", cfg.use_rope)
    make = lambda *shape, **sizes: ERWSiT(*shape, sizes, use_rope=use_rope)
    return sit_from_weights(weights, cfg.model, make), checkpoint


def generate(cfg, run):
    """Sample cfg.sample images from the EMA weights in cfg.ckpt; returns the .npz file's path."""
    model, checkpoint = load_sampler(cfg)
    model = compile_blocks(model.to(run.device).eval(), cfg)
    meta = checkpoint.get("data", SD_VAE_META)  # other codes' checkpoints have none
    decode = load_decoder(meta, cfg.vae, cfg.vae_ckpt, run.device)

    def images(y, randn):
        return {"arr_0": decode(draw(cfg, run, model, y, randn))}

    return generate_npz(cfg, run, images, model.num_classes)


# --------------------------------------------------------------------------------------------------
# Do the blocks and the teacher find the same images alike? And what only this method reports
# --------------------------------------------------------------------------------------------------
def nearest_others(kernel, k):
    """(n,n) of 0 and 1 from similarities (n,n): is image j among the k nearest others of i?"""
    others = kernel.clone().fill_diagonal_(-torch.inf)
    indices = others.topk(k).indices  # (n,k)
    return torch.zeros_like(kernel).scatter_(1, indices, 1.0)  # not symmetric


def hsic(p, q):
    """Unbiased HSIC of p and q (n,n), which are 0 on the diagonal."""
    n = len(p)
    trace = (p * q.T).sum()  # of the matrix product p q
    sum_pq = p.sum(dim=0) @ q.sum(dim=1)  # of all its entries
    total = trace + p.sum() * q.sum() / ((n - 1) * (n - 2)) - 2 * sum_pq / (n - 2)
    return total / (n * (n - 3))


def cknna(a, b, k=10):
    """Do features a (n,D) and b (n,E) find the same images alike? 1 = yes, about 0 = unrelated.

    Unbiased HSIC of cosine similarities among pairs that are near in both, over that of each one
    with itself among the pairs that are near in it (arXiv 2405.07987).
    """
    a = F.normalize(a.double(), dim=1)
    b = F.normalize(b.double(), dim=1)
    kernel_a = a @ a.T
    kernel_b = b @ b.T
    near_a = nearest_others(kernel_a, k)
    near_b = nearest_others(kernel_b, k)
    near_both = near_a * near_b
    hsic_ab = hsic(near_both * kernel_a, near_both * kernel_b)
    hsic_aa = hsic(near_a * kernel_a, near_a * kernel_a)
    hsic_bb = hsic(near_b * kernel_b, near_b * kernel_b)
    return (hsic_ab / ((hsic_aa * hsic_bb).sqrt() + 1e-6)).item()


def load_probed(cfg, run):
    """For --probe: held-out images (or all, where there are none), teacher, student, its phase."""
    if not cfg.ckpt:
        fail("--probe needs --ckpt FILE, the checkpoint to inspect")
    _, checkpoint = load_weights(cfg.ckpt)
    trained = asdict(cfg) | checkpoint.get("config", {})
    cfg = replace(cfg, use_rope=trained["use_rope"], l2r_depth=trained["l2r_depth"],
                  proj_coeff=1.0)  # so that there is a teacher
    folder = Path(cfg.data, "val")
    if not folder.is_dir():
        folder = cfg.data
    data = PreparedData(folder, cfg.resolution)
    teachers, model = build(cfg, data, run)
    if "y_embedder" in init_from(cfg.ckpt, model):
        fail(f"{cfg.ckpt} was not trained on the {model.num_classes} classes of {cfg.data}: give "
             f"its --data")
    return data, teachers[0], model, checkpoint.get("phase", 2)


@torch.no_grad()
def probe(cfg, run):
    """Print the CKNNA of tokens after every block with the teacher's, both means, at t = 0."""
    data, teacher, model, phase = load_probed(cfg, run)
    images = torch.linspace(0, len(data) - 1, cfg.probe).long().unique()  # classes stand in a row
    if len(images) <= 20:
        fail(f"--probe {len(images)}: CKNNA looks at 10 neighbours of an image, take many more")
    h_means = {block: [] for block in model.blocks}
    z_means = []

    def note(block, inputs, h):
        h_means[block].append(h.float().mean(dim=1).cpu())  # (B,N,D) -> (B,D)

    for block in model.blocks:
        block.register_forward_hook(note)
    for rows in images.split(run.micro_batch):
        batch = {name: array.to(run.device) for name, array in data[rows.numpy()].items()}
        zeros = torch.zeros(len(rows), *data.shape, device=run.device)
        x = clean_input(batch, data.meta, zeros)  # the mean of the posterior
        t = torch.zeros(len(rows), device=run.device)
        y = torch.full_like(batch["labels"], model.num_classes)  # a label would tell too much
        with run.autocast():
            model(x, t, y, phase)
        _, z = teacher(batch["images"])
        z_means.append(z.mean(dim=1).cpu())  # (B,N,K) -> (B,K)
    z_means = torch.cat(z_means)
    scores = [cknna(torch.cat(means), z_means) for means in h_means.values() if means]
    text = " ".join(f"{score:.3f}" for score in scores)
    say(f"CKNNA after each block, {len(images)} images of {data.path}: {text}")
    return scores


def report_cost(cfg):
    """Say what the run in cfg.out cost, with and without phase I, by the speeds in its log."""
    warmup_rates = []
    full_rates = []
    for text in Path(cfg.out, "log.jsonl").read_text().splitlines():
        line = json.loads(text)
        rates = warmup_rates if line["step"] <= cfg.warmup_steps else full_rates
        rates.append(line["images_per_s"])
    if not warmup_rates or not full_rates:
        return
    # The fastest stretch of each: what else runs on a machine only slows a step.
    ratio = max(full_rates) / max(warmup_rates)
    steps = cfg.max_train_steps - cfg.warmup_steps
    say(f"cost: {steps:,} full steps, the paper's count; {steps + ratio * cfg.warmup_steps:,.0f} "
        f"full-step equivalents with {cfg.warmup_steps:,} steps of phase I, each measured at "
        f"{ratio:.2f} of a full one")


def report_toy(cfg, run):
    """Sample 480 images without and with guidance; have them judged, and probe the blocks."""
    cfg = replace(cfg, sample=480, ckpt=f"{cfg.out}/last.pt")
    plain = generate(replace(cfg, cfg_scale=1.0), run)
    guided = generate(replace(cfg, cfg_scale=2.0), run)
    if run.rank == 0:
        run_tool("evaluate.py", plain, guided, cfg.data)
        print(summary(cfg))
    probe(replace(cfg, probe=1000), run)


def main(argv=None):
    """Train, sample or probe, as the command line says; the toy does all and is judged."""
    cfg = parse_config(argv)
    run = setup(cfg)
    with clear_errors(run):
        if cfg.sample:
            return generate(cfg, run)
        if cfg.probe:
            return probe(cfg, run)
        is_toy = cfg.model == "toy" and cfg.data == "data/toy" and not cfg.bench
        if is_toy:
            make_data("toy", cfg.data)
        train(cfg, run)
        if run.rank == 0 and not cfg.bench:
            report_cost(cfg)
        if is_toy:
            report_toy(cfg, run)


if __name__ == "__main__":
    main()

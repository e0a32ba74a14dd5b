"""GMem: generative modelling with an explicit memory (Tang, Sun, Cheng, Lin, arXiv 2412.08781).

A SiT's label is replaced by a snippet s, the class token that a frozen teacher (DINOv2) gives the
image. The network learns to draw an image from its snippet, partly zeroed, and need not store what
that says. All images' snippets are the memory bank: to sample, draw one. REPA's alignment is added.

    L = mean |v_theta(x_t, t, m) - v|^2 - lambda mean_tokens cos(MLP(h), z)
    x_t = (1-t) x + t noise,  v = noise - x
    m = keep s / (|s| (1 - p)),  where each element of keep is 0 with probability p, else 1

What differs from repa.py: a linear map of m in place of the label table, and the bank, a
file that the first run writes beside the data. The paper's second version adds 1 - cos(v_theta, v)
to the loss (--cosine-coeff 1) and draws t log-normally (--weighting lognormal).

    python gmem.py                     the toy: data, bank, training, samples, metrics; 3 minutes
    python gmem.py --proj-coeff 0      the memory without the alignment: how much of it is REPA's?
    torchrun --nproc_per_node=8 gmem.py --model SiT-XL/2        on data/imagenet256
    torchrun --nproc_per_node=8 gmem.py --model SiT-XL/2 --sample 50000 \\
        --ckpt runs/gmem-SiT-XL-2/last.pt
    python gmem.py --sample 64 --ckpt runs/gmem-toy/last.pt --bank-path data/toy/val --labels 3 7

Published for SiT-XL/2 at 256 px (the paper's first version), with REPA's SDE (--no-heun --num-steps
250) and no guidance: FID 5.75 after 250K steps, 3.56 after 2M. **Each sample was conditioned on the
features of a training image**: such an FID is neither class-conditional nor unconditional. How it
trained is not public; the defaults are REPA's recipe with the second version's masking and sampler.
Our runs: the toy and checks, in docs/results.md; not ImageNet.

What differs from the official code, on purpose: snippet, patch tokens and latent are of one image,
not of three flips drawn apart; the SDE calls the network once a drift, not twice, for the same
samples; compressed banks can be built (--bank-rank); banks have labels, to draw classes, and know
their data and teacher; --mem-null-prob trains guidance's null.
"""
import copy
import itertools
import zlib
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import distributed as dist
from tqdm import tqdm

from common import SIT_SIZES, SiT, init_linear, interpolate, lognormal_time, projector, sample
from support.checkpoints import (
    check_trained_as,
    init_from,
    load_checkpoint,
    load_weights,
    restore,
    save_checkpoint,
    save_run,
    sit_from_weights,
)
from support.dataset import clean_input, micro_batches, mix_seed, open_data, step_draws
from support.flags import AMOUNT, BOOKKEEPING, COUNT_OR_NONE, SHARE, parse
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
from support.samples import preview, sample_npz
from support.teachers import check_depth, check_grids, load_teachers
from support.terminal import fail, first_rank_first, say
from support.vae import SD_VAE_META, load_decoder


@dataclass
class Config:
    """One field is one flag. Values are the paper's for SiT-XL/2; RECIPES has other models'."""
    # The method
    mem_dropout: float = 0.4                # p, the share of a snippet that training zeroes
    mem_null_prob: float = 0.0              # snippets zeroed whole; 0.1 where guidance is wanted
    cosine_coeff: float = 0.0               # of the velocity's cosine; the second version: 1
    projector_dim: int = 2048               # width of the projector's hidden layers
    bank_path: str = ""                     # bank to sample: data folder, or file; default: --data
    bank_rank: int = 0                      # compress it to this rank; the paper: 64; 0 = do not
    mix: Literal["none", "linear", "spherical"] = "none"    # sample from two snippets, mixed
    mix_alpha: float = 0.5                  # share of the second one

    # The run
    model: str = "toy"                      # toy, or SiT-{S,B,L,XL}/{2,4,8}; it picks the recipe
    data: str = "data/imagenet{resolution}"  # folder made by prepare.py
    out: str = "runs/gmem-{model}"          # config.json, log.jsonl, last.pt, ema-*.pt, previews
    resolution: int = 256                   # pixels
    batch_size: int = 256                   # images per step, over all GPUs
    micro_batch: int = 0                    # images per GPU at once; 0 = batch size / GPUs
    max_train_steps: int = 250_000          # FID 5.75 in the paper; its best SiT has 2M

    # Optimisation
    learning_rate: float = 1e-4             # AdamW, constant
    max_grad_norm: float = 1.0              # gradients are clipped to this norm
    ema_decay: float = 0.9999               # of the averaged weights, every step

    # Diffusion
    path_type: Literal["linear", "cosine"] = "linear"       # interpolant
    weighting: Literal["uniform", "lognormal"] = "uniform"  # distribution of t

    # Teacher and alignment
    enc_type: str = "dinov2-vit-b"          # one teacher; prepared = DATA/teacher.pt
    teacher_ckpt: str = ""                  # its weights from a file instead of the hub
    encoder_depth: int = 8                  # align after this block, from 1
    proj_coeff: float = 0.5                 # lambda; 0 = the memory without an alignment

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
    labels: list[int] = None                # snippets of these classes, in turn; default: of any
    mode: Literal["sde", "ode"] = "sde"     # sampler
    num_steps: int = 50                     # of the sampler
    heun: bool = True                       # second-order steps
    cfg_scale: float = 1.0                  # guidance scale; 1 = none; needs --mem-null-prob
    guidance_low: float = 0.0               # guidance acts for t from here
    guidance_high: float = 0.11             # to here; t = 1 is noise

    # Speed
    bench: int = 0                          # train this many steps on random data, write nothing


RECIPES = {  # by the beginning of the model's name
    "toy": dict(
        data="data/toy", resolution=16, batch_size=32, max_train_steps=2000,
        learning_rate=4e-3, ema_decay=0.99, projector_dim=256, enc_type="prepared", encoder_depth=2,
        workers=0, log_every=50, save_every=500, keep_every=0, preview_every=400,
        mode="ode", num_steps=20),
    "SiT-S": dict(encoder_depth=4),
    "SiT-B": dict(encoder_depth=4),
}
RANGES = {"mem_dropout": (0, 0.99), "mem_null_prob": SHARE, "cosine_coeff": AMOUNT,
          "bank_rank": COUNT_OR_NONE, "mix_alpha": SHARE}
MAY_CHANGE = BOOKKEEPING | {"bank_path", "bank_rank", "mix", "mix_alpha"}  # in a continued run
LAST_HEUN_STEP = 0.004  # of the second version's SDE; without Heun we sample as the first does


# --------------------------------------------------------------------------------------------------
# The method
# --------------------------------------------------------------------------------------------------
class MemorySiT(SiT):
    """SiT with a snippet (B,K), K = memory_dim, in the place of a label, and REPA's projectors."""

    def __init__(self, input_size, in_channels, memory_dim, sizes, encoder_depth=0, z_dims=(),
                 projector_dim=0):
        super().__init__(input_size, in_channels, 0, **sizes)
        del self.y_embedder
        self.encoder_depth = encoder_depth
        self.memory_dim = memory_dim
        self.condition_projection = nn.Sequential()
        self.condition_projection.linear = nn.Linear(memory_dim, sizes["hidden_size"])
        self.projectors = nn.ModuleList(
            [projector(sizes["hidden_size"], projector_dim, z_dim) for z_dim in z_dims])
        self.projectors.apply(init_linear)
        self.condition_projection.apply(init_linear)

    def embed(self, x_t, t, snippet):
        """x_t (B,C,H,W), t (B,), snippet (B,K) to tokens h (B,N,D) and conditioning c (B,D)."""
        h = self.x_embedder(x_t) + self.pos_embed
        with torch.autocast(x_t.device.type, enabled=False):  # fp32, as the time's embedding
            projected = self.condition_projection(snippet.float())  # (B,K) -> (B,D)
        return h, self.t_embedder(t) + projected

    def forward(self, x_t, t, snippet):
        """Velocity (B,C,H,W) and, per teacher, the projected tokens z_hat (B,N,K)."""
        h, c = self.embed(x_t, t, snippet)
        z_hats = []
        for depth, block in enumerate(self.blocks, start=1):
            h = block(h, c)
            if depth == self.encoder_depth:  # token-wise, (B,N,D) -> (B,N,K)
                z_hats = [mlp(h) for mlp in self.projectors]
        return self.head(h, c), z_hats


def corrupt(snippet, keep, is_null, dropout):
    """m (B,K) of snippets (B,K): keep (B,K) says which elements stay; none where is_null (B,)."""
    m = F.normalize(snippet, dim=-1) * keep / (1 - dropout)  # unbiased
    return m * ~is_null.unsqueeze(1)


def gmem_loss(model, x, t, noise, snippet, z, path_type="linear"):
    """Three terms, each (B,): velocity error, minus the cosine to the teacher, 1 - v's cosine.

    x, noise (B,C,H,W); t (B,); snippet m (B,K), corrupted; z (B,N,K), raw features of the clean
    image. The last term, the second version's, takes its cosine over the channels of a place.
    """
    x_t, v = interpolate(x, noise, t, path_type)
    v_hat, z_hats = model(x_t, t, snippet)
    loss_velocity = (v_hat - v).square().mean(dim=(1, 2, 3))
    cosine_v = F.cosine_similarity(v_hat, v, dim=1)  # (B,C,H,W) -> (B,H,W)
    loss_cosine = 1 - cosine_v.mean(dim=(1, 2))
    if not z_hats:
        return loss_velocity, torch.zeros_like(loss_velocity), loss_cosine
    cosine_z = F.cosine_similarity(z_hats[0].float(), z.float(), dim=-1)  # (B,N,K) -> (B,N)
    loss_proj = -cosine_z.mean(dim=1)
    return loss_velocity, loss_proj, loss_cosine


# --------------------------------------------------------------------------------------------------
# The memory
# --------------------------------------------------------------------------------------------------
def coefficients(snippets, factors):
    """C (B,r) of snippets (B,K), those of a bank or new ones, by the bank's M, S and mean."""
    return (snippets - factors["mean"]) @ factors["M"] / factors["S"]


class MemoryBank:
    """Snippets of N images: all of them, or their rank-r form C M^T + mean.

    `parts`, what a file holds: `features` (N,K), or C (N,r), M (K,r), S (r,) and `mean` (K,), where
    features - mean is nearly U S V^T, C = U sqrt(S), M = V sqrt(S); if known, `labels` (N,), and
    `data` and `teacher`: of what and by whom.
    """

    def __init__(self, parts):
        self.parts = parts
        self.rows = parts.get("features", parts.get("C"))
        self.labels = parts.get("labels", torch.full((len(self.rows),), -1))

    def get(self, rows):
        """Snippets of these rows (...) as (...,K), not normalised."""
        snippets = self.rows[rows].float()
        if "C" in self.parts:
            snippets = snippets @ self.parts["M"].T + self.parts["mean"]  # (...,r) -> (...,K)
        return snippets

    def draw(self, count, classes, seed):
        """Rows (count,2) at random, a snippet and one to mix with it; of these classes in turn."""
        generator = torch.Generator().manual_seed(mix_seed(seed, 0))
        uniform = torch.rand(count, 2, generator=generator, dtype=torch.float64)
        pools = [torch.arange(len(self.rows))]
        if classes:
            pools = [(self.labels == label).nonzero()[:, 0] for label in classes]
        if not all(map(len, pools)):
            fail(f"--labels {' '.join(map(str, classes))}: not all are among the bank's, "
                 f"{self.labels.min()} to {self.labels.max()} (-1: it has no labels)")
        rows = [pool[(u * len(pool)).long()] for pool, u in zip(itertools.cycle(pools), uniform)]
        return torch.stack(rows)

    def examples(self, seed):
        """Unit snippets (64,K) of the first eight classes, a row of a picture each."""
        classes = self.labels.unique()[:8].repeat_interleave(8).tolist()
        rows = self.draw(len(classes), classes, seed)[:, 0]
        return F.normalize(self.get(rows), dim=-1)

    def compress(self, rank):
        """The bank of rank r, computed in float64, piece by piece."""
        count = len(self.rows)
        pieces = lambda: (self.get(rows).double() for rows in torch.arange(count).split(4096))
        mean = sum(x.sum(dim=0) for x in pieces()) / count
        products = sum(x.T @ x for x in pieces())  # (K,K)
        # N times the covariance is V S^2 V^T: no SVD of all N rows is needed. Values ascend.
        values, vectors = torch.linalg.eigh(products - count * mean.outer(mean))
        S = values.flip(0)[:rank].clamp(min=1e-12).sqrt()
        M = vectors.flip(1)[:, :rank] * S.sqrt()
        factors = {"M": M, "S": S, "mean": mean}
        factors["C"] = torch.cat([coefficients(x, factors) for x in pieces()])
        parts = {name: factor.float() for name, factor in factors.items()}
        origin = self.parts.keys() & {"labels", "data", "teacher"}
        return MemoryBank(parts | {name: self.parts[name] for name in sorted(origin)})


def mix_snippets(a, b, alpha, kind):
    """Unit snippets (B,K) at share alpha of the way from a to b: on the line, or on the circle."""
    if kind == "linear":
        return F.normalize((1 - alpha) * a + alpha * b, dim=-1)
    # Slerp but for its division by sin(theta), which normalising undoes.
    cosine = (a * b).sum(dim=-1, keepdim=True).clamp(-1, 1)  # (B,1)
    theta = cosine.acos().clamp(min=1e-4)  # at 0 both shares would be 0
    mixture = ((1 - alpha) * theta).sin() * a + (alpha * theta).sin() * b
    return F.normalize(mixture, dim=-1)


def identify_teacher(teacher):
    """Its name and a checksum of its weights, by which banks and checkpoints know it."""
    weights = [weight.cpu().numpy().tobytes() for weight in teacher.state_dict().values()]
    return f"{teacher.name} {zlib.crc32(b''.join(weights)):08x}"


def make_bank(path, cfg, run, data, origin, teacher):
    """Write the bank of all images of `data`: every rank sees a stretch, rank 0 gets them all."""
    stretch = np.array_split(np.arange(len(data)), run.world)[run.rank]
    batches = np.array_split(stretch, 1 + len(stretch) // 256)
    snippets = []
    with run.autocast():
        for rows in tqdm(batches, f"features of {data.path}", disable=True if run.rank else None):
            images = torch.from_numpy(data.array("images")[rows])
            snippet, _ = teacher(images.to(run.device))
            snippets.append(snippet.cpu())
    stretches = [torch.cat(snippets)] * run.world
    if run.world > 1:
        dist.gather_object(stretches[0], stretches if run.rank == 0 else None)
    if run.rank == 0:
        labels = torch.from_numpy(np.array(data.array("labels")))
        save_checkpoint(path, dict(origin, teacher=identify_teacher(teacher), labels=labels,
                                   features=torch.cat(stretches)))


def read_bank(path):
    """The bank in a file: one of ours, or an official tensor (N,K) or checkpoint."""
    saved = load_checkpoint(path, (dict, torch.Tensor))
    if isinstance(saved, torch.Tensor):  # of the second version
        saved = {"features": saved}
    elif "memorybank" in saved:  # of the first version, beside its network
        saved = {"features": saved["memorybank"]}
    if not saved.keys() & {"features", "C"}:
        fail(f"there are neither features nor C, M, S and mean in {path}: give another --bank-path")
    return MemoryBank(saved)


def open_bank(cfg, run, width, teacher_id, teacher=None):
    """The bank that cfg names, made where it is missing; it must fit the model and its images."""
    expected = {"width": width, "teacher": teacher_id}  # None: the checkpoint does not say
    path = Path(cfg.bank_path or cfg.data)
    if not path.is_file():
        data = open_data(replace(cfg, data=path))
        images = data.array("images")[np.linspace(0, len(data) - 1, 64).astype(int)]
        checksum = zlib.crc32(images.tobytes())
        expected["data"] = f"{data.meta['source']}, {len(data)} images, {checksum:08x}"
        path = path / f"bank-{cfg.enc_type}.pt"
        if not path.exists():  # for all ranks: it is written after all have done their part
            make_bank(path, cfg, run, data, expected, teacher or load_teachers(cfg, run)[0])
    with first_rank_first():  # which alone writes
        if cfg.bank_rank:
            full = path
            path = path.with_name(f"{path.stem}-rank{cfg.bank_rank}.pt")
            if not path.exists():
                save_checkpoint(path, read_bank(full).compress(cfg.bank_rank).parts)
    bank = read_bank(path)
    actual = bank.parts | {"width": bank.get([0]).shape[1]}
    for name, value in expected.items():
        if None not in (value, actual.get(name)) and value != actual[name]:
            fail(f"the bank {path} has the {name} {actual[name]!r}, and {value!r} is needed: "
                 f"delete it, and it is made again by the model's teacher (an older one: "
                 f"--teacher-ckpt FILE), or choose another --bank-path")
    return bank


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
    """The frozen teacher (it always runs: snippets are data) and the student, on the device."""
    if "," in cfg.enc_type:
        fail(f"--enc-type {cfg.enc_type}: a snippet is of one teacher")
    [teacher] = load_teachers(cfg, run)
    torch.manual_seed(cfg.seed)  # the SiT's initial weights do not depend on the teacher
    channels, size, _ = data.shape
    model = MemorySiT(
        size, channels, teacher.width, SIT_SIZES[cfg.model], cfg.encoder_depth,
        [teacher.width] if cfg.proj_coeff > 0 else [], cfg.projector_dim)
    if cfg.proj_coeff > 0:  # a class token alone fits any grid
        check_grids(cfg, [teacher], model.grid)
        check_depth(cfg)
    if cfg.compile:
        teacher.compile()
    return teacher, model.to(run.device)


def train(cfg, run):
    """Begin or continue the run in cfg.out."""
    data = open_data(cfg)
    teacher, model = build(cfg, data, run)
    teacher_id = identify_teacher(teacher)
    meta = data.meta | {"teacher": teacher_id}  # so that sampling refuses another teacher's bank
    bank = None if cfg.bench else open_bank(cfg, run, model.memory_dim, teacher_id, teacher)
    decode = None
    if cfg.preview_every and not cfg.bench:  # a missing VAE shows now, not at the first preview
        decode = load_decoder(data.meta, cfg.vae, cfg.vae_ckpt, run.device)
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters, lr=cfg.learning_rate, betas=(0.9, 0.999), weight_decay=0, fused=True)
    init = lambda path, model: init_from(path, model, ("condition_projection", "projectors"))
    first_step = restore(cfg, meta, model, ema, optimizer, init, MAY_CHANGE)
    if first_step >= cfg.max_train_steps:
        say(f"{cfg.out} is finished: {first_step} steps; raise --max-train-steps to train on, or "
            f"choose another --out")
        return
    x_t, t, _ = example_inputs(data, run)
    flops_per_image = training_flops(model, x_t, t, x_t.new_zeros(1, model.memory_dim))
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
        is_null = uniform() < cfg.mem_null_prob
        keep = uniform(model.memory_dim) >= cfg.mem_dropout

        sums = torch.zeros(4, device=run.device)
        for i in range(run.accumulation):
            batch = next(loader)
            rows = slice(i * run.micro_batch, (i + 1) * run.micro_batch)
            is_last = i + 1 == run.accumulation
            # Gradients are reduced once a step: with the last micro-batch.
            reduction = nullcontext() if is_last or run.world == 1 else net.no_sync()
            with reduction:
                with run.autocast():
                    snippet, z = teacher(batch["images"])  # both from one forward pass
                    snippet = corrupt(snippet, keep[rows], is_null[rows], cfg.mem_dropout)
                    x = clean_input(batch, data.meta, posterior_noise[rows])
                    velocity, proj, cosine = gmem_loss(
                        net, x, t[rows], noise[rows], snippet, z, cfg.path_type)
                    loss = (velocity + cfg.proj_coeff * proj + cfg.cosine_coeff * cosine).mean()
                (loss / run.accumulation).backward()
            terms = torch.stack([loss, velocity.mean(), proj.mean(), cosine.mean()])
            sums += terms.detach() / run.accumulation

        grad_norm, is_finite = optimizer_step(optimizer, parameters, cfg.max_grad_norm)
        update_ema(ema, model, cfg.ema_decay)
        loss, velocity, proj, cosine = sums
        log.add(is_finite, loss=loss, loss_velocity=velocity, loss_proj=proj, loss_cosine=cosine,
                grad_norm=grad_norm)

        is_last_step = step == cfg.max_train_steps
        stopping = stop(step)
        if step % cfg.log_every == 0 or is_last_step:
            log.write(step)
        if run.rank == 0 and not cfg.bench:
            with log.pause():
                if step % cfg.save_every == 0 or is_last_step or stopping:
                    save_run(cfg, "last.pt", step, meta, model=model, ema=ema, optimizer=optimizer)
                if cfg.keep_every and step % cfg.keep_every == 0:
                    save_run(cfg, f"ema-{step}.pt", step, meta, ema=ema)
                if cfg.preview_every and (step % cfg.preview_every == 0 or is_last_step):
                    snippets = bank.examples(cfg.seed).to(run.device)
                    preview(cfg, run, ema, draw, decode, step, y=snippets)
        if stopping:
            break
    loader.close()
    end_run(cfg, run, log, step, stopping)


# --------------------------------------------------------------------------------------------------
# Sampling
# --------------------------------------------------------------------------------------------------
def draw(cfg, run, model, snippet, randn):
    """Latents x (B,C,H,W) of unit snippets (B,K) by the paper's sampler."""
    noise = randn(model.in_channels, model.input_size, model.input_size)
    heun_times = [*np.linspace(1, LAST_HEUN_STEP, cfg.num_steps).tolist(), 0.0]
    times = heun_times if cfg.mode == "sde" and cfg.heun else None  # None: the even grid
    with run.autocast():
        return sample(
            model.velocity, noise, snippet, torch.zeros_like(snippet), randn=randn,
            mode=cfg.mode, num_steps=cfg.num_steps, heun=cfg.heun, path_type=cfg.path_type,
            times=times, cfg_scale=cfg.cfg_scale, guidance_low=cfg.guidance_low,
            guidance_high=cfg.guidance_high)


def generate(cfg, run):
    """Sample cfg.sample images from the EMA weights in cfg.ckpt; returns the .npz file's path."""
    weights, checkpoint = load_weights(cfg.ckpt)
    check_trained_as(cfg, cfg.ckpt, checkpoint, ("model", "path_type", "enc_type"))
    if "condition_projection.linear.weight" not in weights:
        fail(f"{cfg.ckpt} has no memory, no condition_projection: it is not a file of gmem.py")
    memory_dim = weights["condition_projection.linear.weight"].shape[1]
    make = lambda size, channels, _, **sizes: MemorySiT(size, channels, memory_dim, sizes)
    model = sit_from_weights(weights, cfg.model, make)
    model = compile_blocks(model.to(run.device).eval(), cfg)
    trained = asdict(cfg) | checkpoint.get("config", {})
    cfg = replace(cfg, data=trained["data"], resolution=trained["resolution"])
    meta = checkpoint.get("data", SD_VAE_META)  # other codes' checkpoints have none
    bank = open_bank(cfg, run, model.memory_dim, meta.get("teacher"))
    decode = load_decoder(meta, cfg.vae, cfg.vae_ckpt, run.device)

    def images(rows, randn):
        rows = rows.cpu()
        snippet, other = F.normalize(bank.get(rows), dim=-1).to(run.device).unbind(1)  # (B,K) each
        if cfg.mix != "none":
            snippet = mix_snippets(snippet, other, cfg.mix_alpha, cfg.mix)
        x = draw(cfg, run, model, snippet, randn)
        return {"arr_0": decode(x), "labels": bank.labels[rows[:, 0]], "rows": rows}

    name = Path(cfg.bank_path or cfg.data).stem
    if cfg.bank_rank > 0:
        name += f"-rank{cfg.bank_rank}"
    if cfg.mix != "none":
        name += f"-{cfg.mix}{cfg.mix_alpha:g}"
    if cfg.cfg_scale != 1:
        name += f"-cfg{cfg.cfg_scale:g}"
    path = Path(cfg.out) / f"samples-{name}.npz"
    rows = bank.draw(cfg.sample, cfg.labels, cfg.seed)
    sample_npz(path, images, rows, cfg.seed, run.micro_batch, run)
    say(f"wrote {path}: {cfg.sample} images, {cfg.mode} {cfg.num_steps} steps, guidance "
        f"{cfg.cfg_scale:g}, each conditioned on the features of one of the {len(bank.labels)} "
        f"real images of {name}")
    return path


def report_toy(cfg, run):
    """Sample 480 images from three banks; have them judged, and compared with training images."""
    cfg = replace(cfg, sample=480, ckpt=f"{cfg.out}/last.pt")
    held_out = f"{cfg.data}/val"
    banks = (cfg.data, 0), (held_out, 0), (cfg.data, 8)
    paths = [generate(replace(cfg, bank_path=path, bank_rank=rank), run) for path, rank in banks]
    if run.rank == 0:
        run_tool("evaluate.py", *paths, cfg.data)
        print("(accuracy: how often the judge sees the class of the image whose snippet was drawn)")
        known = torch.from_numpy(np.load(f"{cfg.data}/images.npy")).flatten(1).float()
        sets = {path: np.load(path)["arr_0"] for path in paths}
        sets[f"{held_out}/images.npy"] = np.load(f"{held_out}/images.npy")[:480]
        for path, images in sets.items():
            distances = torch.cdist(torch.from_numpy(images).flatten(1).float(), known)
            nearest = distances.amin(dim=1).mean() / known.shape[1] ** 0.5
            print(f"{path}: {nearest:.1f} grey levels (RMS) to the nearest training image")
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

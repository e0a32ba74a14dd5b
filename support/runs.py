"""Around a training loop: this rank, the beginning and the end of a run, the log, the tools."""
import contextlib
import datetime
import functools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

# Before any process group: else its defaults keep one alive, and a rank may abort at exit.
import torch.distributed.nn
from torch import distributed as dist
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from common import SizeError
from support.terminal import fail, first_line, first_rank_first, make_folder, say

PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}  # dense bf16, by the vendor


# --------------------------------------------------------------------------------------------------
# This rank
# --------------------------------------------------------------------------------------------------
@dataclass
class Run:
    """One rank of a job: torchrun starts a process per GPU, python alone is rank 0 of 1."""
    rank: int  # 0 writes files
    world: int  # number of ranks
    device: torch.device
    micro_batch: int  # images of one forward and backward pass of this rank
    accumulation: int  # micro-batches of a step
    autocast: Callable  # run.autocast() is the context in which networks compute, bf16 or fp32


def process_group_backend(device):
    """NCCL for CUDA tensors, gloo for the stop signal and the barriers, which are on the CPU.

    Without a name PyTorch (since 2.6) registers the accelerator's alone, and a CPU tensor has none.
    """
    if device.type == "cuda":
        return "cpu:gloo,cuda:nccl"
    return "gloo"


def pick_device(local_rank):
    """CUDA, else Apple's GPU, else the CPU."""
    if torch.cuda.is_available():
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # TF32 for what stays in fp32
        return device
    if torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


def setup(cfg, micro_batch=None):
    """This rank's place, device and precision. micro_batch: in place of cfg.micro_batch."""
    rank = int(os.environ.get("RANK", 0))
    world = int(os.environ.get("WORLD_SIZE", 1))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if micro_batch is None:
        micro_batch = cfg.micro_batch
    micro_batch = micro_batch or max(1, cfg.batch_size // world)
    if not cfg.sample and cfg.batch_size % (world * micro_batch):
        fail(f"--batch-size {cfg.batch_size} is not a multiple of {world} ranks x --micro-batch "
             f"{micro_batch}")
    device = pick_device(local_rank)
    if world > 1 and not dist.is_initialized():
        dist.init_process_group(process_group_backend(device))
    is_cuda = device.type == "cuda"
    if cfg.compile is None:
        cfg.compile = is_cuda
    if cfg.precision == "auto":
        cfg.precision = "bf16" if is_cuda else "fp32"
    autocast = functools.partial(
        torch.autocast, device.type, torch.bfloat16, enabled=cfg.precision == "bf16")
    accumulation = cfg.batch_size // (world * micro_batch)
    return Run(rank, world, device, micro_batch, accumulation, autocast)


def compile_blocks(model, cfg):
    """With --compile, compile every block in place: one graph serves all, and names stay."""
    if cfg.compile:
        import torch._dynamo
        torch._dynamo.config.optimize_ddp = False  # else every gradient bucket cuts the graph
        for block in model.blocks:
            block.compile()
    return model


# --------------------------------------------------------------------------------------------------
# The beginning of a run
# --------------------------------------------------------------------------------------------------
@contextlib.contextmanager
def flop_counter():
    """PyTorch's counter of FLOPs, made to see attention in every version of PyTorch.

    Which attention kernels it knows changes from version to version, so while it counts, attention
    is computed by its formula: two products of matrices.
    """
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        yield counter


@torch.no_grad()
def training_flops(model, *inputs):
    """Model FLOPs of training on the one image in `inputs`."""
    with flop_counter() as counter:
        model(*inputs)
    return 3 * counter.get_total_flops()  # the backward pass costs two forward passes


def example_inputs(data, run):
    """x_t (1,C,H,W), t (1,) and y (1,) of zeros."""
    x_t = torch.zeros(1, *data.shape, device=run.device)
    t = torch.zeros(1, device=run.device)
    y = torch.zeros(1, dtype=torch.long, device=run.device)
    return x_t, t, y


def announce(cfg, run, data, model, flops):
    """Say what is about to run, and write config.json. flops: of training on one image."""
    count = sum(p.numel() for p in model.parameters())
    checkpoint_gb = 16e-9 * count  # weights, their average and AdamW's two moments in fp32
    compiled = ", compiled" if cfg.compile else ""
    steps_per_epoch = len(data) / cfg.batch_size
    epochs = cfg.max_train_steps / steps_per_epoch
    say(f"{cfg.model}: {count / 1e6:,.2f} M parameters, a checkpoint of {checkpoint_gb:,.2f} GB, "
        f"{flops / 1e9:,.2f} GFLOP per training image, {cfg.precision}{compiled}")
    say(f"{cfg.data}: {len(data):,} images of {cfg.resolution} px, {data.meta['num_classes']} "
        f"classes; {cfg.max_train_steps:,} steps, {steps_per_epoch:,.1f} an epoch: {epochs:,.1f} "
        f"epochs")
    say(f"{cfg.batch_size} images a step = {run.world} x {run.device.type} x {run.accumulation} "
        f"micro-batches of {run.micro_batch}; results in {cfg.out}")
    write_config(cfg, run)


def write_config(cfg, run):
    """config.json in the run's folder, by rank 0; --bench writes nothing."""
    if run.rank == 0 and not cfg.bench:
        make_folder(cfg.out)
        text = json.dumps(asdict(cfg), indent=1)
        (Path(cfg.out) / "config.json").write_text(text + "\n")


# --------------------------------------------------------------------------------------------------
# What ends a run
# --------------------------------------------------------------------------------------------------
def catch_stop(run):
    """stop(step): the signal (Ctrl-C, SIGTERM) that reached any rank, or 0.

    All ranks must leave at the same step, so they compare at every tenth step.
    """
    signal_number = torch.tensor(0)  # on the CPU: comparing does not wait for the GPU

    def handle(number, frame):
        signal_number.fill_(number)
        if run.world == 1:
            signal.signal(number, signal.SIG_DFL)  # a second Ctrl-C ends it at once

    def stop(step):
        if run.world == 1:
            return int(signal_number)
        if step % 10 != 0:
            return 0
        dist.all_reduce(signal_number, op=dist.ReduceOp.MAX)
        return int(signal_number)

    signal.signal(signal.SIGINT, handle)
    signal.signal(signal.SIGTERM, handle)
    return stop


def end_run(cfg, run, log, step, stopping):
    """After the last step: ranks meet, signals act as usual again, and a stopped run ends here.

    stopping: the number of the signal that stopped it, or 0.
    """
    log.bar.close()
    if run.world > 1:
        dist.barrier()  # until rank 0 has saved: what follows reads its files
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if stopping:
        say(f"stopped at step {step}, saved in {cfg.out}/last.pt; the same command continues")
        raise SystemExit(128 + stopping)


@contextlib.contextmanager
def clear_errors(run, memory="--micro-batch (now {}); the global batch stays the same"):
    """Around a whole script: errors that a user can mend become one line; ranks part at the end."""
    try:
        yield
    except SizeError as error:
        fail(str(error))
    except torch.OutOfMemoryError:
        fail(f"out of GPU memory: lower {memory.format(run.micro_batch)}")
    except OSError as error:  # a full disk, most likely
        fail(f"{first_line(error)}; free some disk space, or choose another --out, and repeat the "
             f"command: it continues")
    except KeyboardInterrupt:
        fail("interrupted")
    finally:
        if run.world > 1:
            dist.destroy_process_group()


# --------------------------------------------------------------------------------------------------
# The log
# --------------------------------------------------------------------------------------------------
class Log:
    """Progress bar and log.jsonl of rank 0. Sums stay on the device: no step waits for a number."""

    def __init__(self, cfg, run, first_step, flops_per_image):
        self.cfg = cfg
        self.run = run
        self.path = Path(cfg.out) / "log.jsonl"
        self.mfu_of_rate = self.utilisation_per_image(flops_per_image)
        if run.rank == 0 and not cfg.bench:
            self.drop_lines_after(first_step)
        self.bar = tqdm(total=cfg.max_train_steps, initial=first_step, unit="step",
                        disable=True if run.rank else None)
        self.bad = torch.zeros((), device=run.device)  # steps in a row without a usable gradient
        self.restart()

    def utilisation_per_image(self, flops_per_image):
        """Share of the GPUs' peak that one image a second takes; None where the peak is unknown."""
        if self.run.device.type != "cuda":
            return None
        name = torch.cuda.get_device_name()
        for gpu, peak in PEAK_FLOPS.items():
            if gpu in name:
                return flops_per_image / (self.run.world * peak)
        return None

    def drop_lines_after(self, step):
        """A killed run may have logged beyond its last save, and its last line may be cut."""
        if not self.path.exists():
            return
        lines = [line for line in self.path.read_text().splitlines(True) if line.endswith("\n")]
        kept = [line for line in lines if json.loads(line)["step"] <= step]
        self.path.write_text("".join(kept))

    def restart(self):
        """Begin the sums and the clock of the next line."""
        self.sums = 0
        self.steps = 0
        self.clock = time.perf_counter()

    def add(self, is_finite, **terms):
        """Add one step's scalars; what a skipped step computed is left out."""
        self.names = list(terms)
        values = torch.stack([*terms.values(), torch.ones_like(self.bad)])
        self.sums = self.sums + torch.where(is_finite, values, 0)
        self.steps += 1
        is_unusable = ~is_finite | (terms["grad_norm"] == 0)
        self.bad = (self.bad + 1) * is_unusable
        self.bar.update()

    @contextlib.contextmanager
    def pause(self):
        """What happens inside (saving, a preview) is not training time."""
        start = time.perf_counter()
        yield
        self.clock += time.perf_counter() - start

    def write(self, step):
        """Reduce over ranks, once, and write a line; stop after three unusable steps in a row."""
        values = torch.cat([self.sums, self.bad[None]]) / self.run.world
        if self.run.world > 1:
            dist.all_reduce(values)
        *sums, used, bad = values.tolist()  # the only wait for the device between log points
        seconds = (time.perf_counter() - self.clock) / self.steps
        line = {name: value / max(used, 1) for name, value in zip(self.names, sums)}
        line["skipped"] = self.steps - round(used)
        line["images_per_s"] = self.cfg.batch_size / seconds
        if self.mfu_of_rate:
            line["mfu"] = line["images_per_s"] * self.mfu_of_rate
        if self.run.device.type == "cuda":
            line["memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
        self.show(step, line, seconds)
        if self.run.rank == 0 and not self.cfg.bench:
            rounded = {name: float(f"{value:.6g}") for name, value in line.items()}
            with open(self.path, "a") as file:
                file.write(json.dumps(dict(step=step) | rounded) + "\n")
        if bad >= 3:
            fail(f"no usable gradient (zero or not finite) in the last {bad:.0f} steps, at step "
                 f"{step}; {self.cfg.out} keeps the checkpoint from before: try a lower "
                 f"--learning-rate, or --precision fp32")
        self.restart()

    def show(self, step, line, seconds):
        """The line after the bar, or, without a terminal, as plain text with the time left."""
        parts = [f"{name} {value:.4g}" for name, value in line.items()
                 if value or name != "skipped"]
        text = ", ".join(parts)
        self.bar.set_postfix_str(text)
        if self.run.rank == 0 and self.bar.disable:
            seconds_left = round(seconds * (self.cfg.max_train_steps - step))
            left = datetime.timedelta(seconds=seconds_left)
            print(f"step {step}/{self.cfg.max_train_steps}: {text}, {left} left", flush=True)


def last_line(cfg):
    """The last line of log.jsonl, a dict."""
    return json.loads((Path(cfg.out) / "log.jsonl").read_text().splitlines()[-1])


def summary(cfg):
    """How training ended, in one line: for the toy's report."""
    line = last_line(cfg)
    text = f"velocity loss {line['loss_velocity']:.4f}"
    if line.get("loss_proj"):
        text += f", alignment cosine {-line['loss_proj']:.3f}"
    text += f" at step {line['step']}"
    if cfg.preview_every > 0:
        text += f"; look at {cfg.out}/preview-{line['step']}.png, a row per class"
    return text


# --------------------------------------------------------------------------------------------------
# The tools beside the scripts
# --------------------------------------------------------------------------------------------------
def run_tool(*command):
    """Run prepare.py or evaluate.py as a user would, printing the command."""
    command = [str(word) for word in command]
    print("$ python", *command, flush=True)
    ranks = "RANK", "WORLD_SIZE", "LOCAL_RANK"
    environment = {name: value for name, value in os.environ.items() if name not in ranks}
    tool = Path(__file__).parent.parent / command[0]
    code = subprocess.run([sys.executable, tool, *command[1:]], env=environment).returncode
    if code:
        raise SystemExit(code)


def make_data(form, folder):
    """Let prepare.py make one of the toy sets where it is not there yet; all ranks wait for it."""
    with first_rank_first():
        if not Path(folder, "meta.json").exists():
            run_tool("prepare.py", form, "--out", folder)

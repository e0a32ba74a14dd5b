"""Around a training loop: this rank, the beginning and the end of a run, the tools."""
import contextlib
import errno
import functools
import importlib.util
import inspect
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

# Before any process group: else its defaults keep one alive, and a rank may abort at exit.
import torch.distributed.nn
from torch import distributed as dist
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.flop_counter import FlopCounterMode

from common import SizeError
from support.terminal import (
    STOP_SIGNALS,
    fail,
    first_line,
    first_rank_first,
    make_folder,
    say,
)


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
        return device
    if torch.backends.mps.is_available():
        # Metal's AdamW takes no notice of found_inf.
        register_optimizer_step_pre_hook(skip_where_not_finite)
        return torch.device("mps")
    return torch.device("cpu")


def skip_where_not_finite(optimizer, args, options):
    """For optimisers that do not know found_inf: without gradients a step updates nothing.

    Asking waits for the device, once a step.
    """
    if optimizer.found_inf:
        optimizer.zero_grad(set_to_none=True)


def pick_precision(cfg, device):
    """bf16 on GPUs that compute in it, else fp32; compiled on CUDA where Triton is installed."""
    is_cuda = device.type == "cuda"
    if cfg.precision == "auto":
        has_bf16 = is_cuda and torch.cuda.is_bf16_supported(including_emulation=False)
        cfg.precision = "bf16" if has_bf16 else "fp32"
    if cfg.compile is None:
        cfg.compile = is_cuda and importlib.util.find_spec("triton") is not None
    if is_cuda and cfg.precision == "bf16":  # TF32 for what stays in fp32, as the official codes
        torch.set_float32_matmul_precision("high")
    elif is_cuda:  # fp32 is fp32
        torch.backends.cudnn.allow_tf32 = False


def setup(cfg, micro_batch=None):
    """This rank's place, device and precision. micro_batch: in place of cfg.micro_batch."""
    tasks = int(os.environ.get("SLURM_NTASKS", 1))
    if tasks > 1 and "RANK" not in os.environ:
        fail(f"Slurm started {tasks} tasks, and each would be rank 0 of 1: start it by torchrun, "
             f"one task a node (the README shows how)")
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
    pick_precision(cfg, device)
    autocast = functools.partial(
        torch.autocast, device.type, torch.bfloat16, enabled=cfg.precision == "bf16")
    accumulation = cfg.batch_size // (world * micro_batch)
    return Run(rank, world, device, micro_batch, accumulation, autocast)


def compile_blocks(model, cfg):
    """With --compile, compile every block in place: one graph serves all, and names stay."""
    if cfg.compile:
        import torch._dynamo
        torch._dynamo.config.optimize_ddp = False  # else every gradient bucket cuts the graph
        torch._dynamo.config.cache_size_limit = 64  # guidance, a last batch: each has a graph
        for block in model.blocks:
            block.compile(dynamic=False)  # symbolic sizes cost speed
    return model


# Buffers are constants or kept per rank: DDP need not send them around. Larger buckets than the
# default of 25 MB: fewer reductions.
DDP_OPTIONS = dict(gradient_as_bucket_view=True, bucket_cap_mb=100)
if "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters:  # torch 2.14
    DDP_OPTIONS["forward_sync_buffers"] = False
else:
    DDP_OPTIONS["broadcast_buffers"] = False


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
    """stop(step): the signal (one of STOP_SIGNALS) that reached any rank, or 0.

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

    for number in STOP_SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup has a run outlive its terminal
            signal.signal(number, handle)
    return stop


def end_run(cfg, run, log, step, stopping):
    """After the last step: ranks meet, signals act as usual again, and a stopped run ends here.

    stopping: the number of the signal that stopped it, or 0.
    """
    log.bar.close()
    if run.world > 1:
        dist.barrier()  # until rank 0 has saved: what follows reads its files
    for number in STOP_SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if stopping:
        say(f"stopped at step {step}, saved in {cfg.out}/last.pt; the same command continues")
        raise SystemExit(128 + stopping)


def fail_on_this_rank(message):
    """Stop with one line about what happened to one rank alone, which says so, whichever it is."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        message = f"rank {os.environ['RANK']}: {message}"
    raise SystemExit(f"error: {message}")


def remedy_for(error):
    """What a user can do about an OSError, to be said after it; nothing where nobody knows."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
        return ("; free some disk space, or choose another --out, and repeat the command: it "
                "continues")
    if error.errno == errno.EMFILE:
        return "; raise the limit (ulimit -n), or lower --workers"
    return ""


@contextlib.contextmanager
def clear_errors(run, memory="--micro-batch (now {}); the global batch stays the same"):
    """Around a whole script: errors that a user can mend become one line; ranks part at the end."""
    try:
        yield
    except SizeError as error:
        fail(str(error))
    except torch.OutOfMemoryError:
        fail_on_this_rank(f"out of GPU memory: lower {memory.format(run.micro_batch)}")
    except RuntimeError as error:
        if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            fail_on_this_rank(f"torch.compile failed ({first_line(error)}): install the compiler "
                              f"that it needs, or add --no-compile")
        if run.world > 1 and (isinstance(error, dist.DistError) or "by peer" in str(error)):
            fail_on_this_rank("ends because another rank is gone, whose line says why")
        raise
    except OSError as error:
        fail_on_this_rank(f"{first_line(error)}{remedy_for(error)}")
    except KeyboardInterrupt:
        fail("interrupted")
    finally:
        if run.world > 1:
            dist.destroy_process_group()


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

"""Where does the time of a step go? Any script's training step by parts, or the sampler, on this machine. Slow.

    python tests/bench.py repa.py --model SiT-XL/2 --bench 40                    # flags as the script takes them
    python tests/bench.py haste.py --model SiT-S/2 --bench 12 --batch-size 8
    python tests/bench.py sampling --model SiT-XL/2 --batch-size 64 --mode sde --num-steps 250 --cfg-scale 1.8

It is the script's own --bench run (random data, nothing written) with a stopwatch around the functions that its loop
calls: CUDA events on a GPU, so that measuring waits for nothing. The first third of the steps is warm-up. Prints the
median and the range of each part, images/s, model-FLOPs utilisation, the share of the rate that one large matrix
product reaches in the same process, and the peak memory. Sampling runs a SiT of random weights through common.sample
with repa.py's flags, without the decoder.
"""
import argparse
import hashlib
import importlib
import json
import platform
import resource
import statistics
import sys
import time
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import torch  # noqa: E402

import common  # noqa: E402
from support import log, runs, teachers  # noqa: E402
from support.dataset import image_randn  # noqa: E402

IS_CUDA = torch.cuda.is_available()


def now():
    """A point in time: an event in the GPU's queue, or the clock."""
    if not IS_CUDA:
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def seconds(start, end):
    return start.elapsed_time(end) / 1000 if IS_CUDA else end - start


class Stopwatch:
    """Notes when wrapped functions begin and end, step by step; `end_step` closes a step."""

    def __init__(self):
        self.pieces, self.steps = [[]], []

    def wrap(self, part, function):
        def timed(*args, **options):
            start = now()
            result = function(*args, **options)
            self.pieces[-1].append((part, start, now()))
            return result
        return timed

    def iterate(self, part, iterator):
        """The same for a generator: each item that it makes us wait for."""
        following = self.wrap(part, lambda: next(iterator))
        while True:
            yield following()

    def end_step(self):
        self.pieces.append([])
        self.steps.append(now())

    def table(self, warmup):
        """{part: seconds of every step after the warm-up}, `other` being what no part covers."""
        if IS_CUDA:
            torch.cuda.synchronize()
        rows = {}
        for i in range(warmup, len(self.steps)):
            whole = seconds(self.steps[i - 1], self.steps[i])
            parts = {}
            for part, start, end in self.pieces[i]:
                parts[part] = parts.get(part, 0) + seconds(start, end)
            for part, value in (parts | {"other": whole - sum(parts.values()), "step": whole}).items():
                rows.setdefault(part, []).append(value)
        return rows


def matrix_rate(dtype, size):
    """FLOP/s of one large matrix product, the best of ten."""
    device = "cuda" if IS_CUDA else "cpu"
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    best = float("inf")
    for _ in range(10):
        start = now()
        a @ b
        end = now()
        if IS_CUDA:
            torch.cuda.synchronize()
        best = min(best, seconds(start, end))
    return 2 * size ** 3 / best


def machine(*files):
    """One line on what ran where."""
    hashes = {name: hashlib.sha256((ROOT / name).read_bytes()).hexdigest()[:8] for name in files}
    device = torch.cuda.get_device_name() if IS_CUDA else f"{platform.machine()}, {torch.get_num_threads()} threads"
    cuda = f", CUDA {torch.version.cuda}" if IS_CUDA else ""
    return f"torch {torch.__version__}{cuda}, {device}; {json.dumps(hashes)}"


def bench_training(name, flags):
    """The script's --bench run by parts: a table, and the figures that follow from it."""
    script, watch, counted, noted = importlib.import_module(name), Stopwatch(), {}, {}
    loss = f"{name}_loss"
    update_ema, setup = script.update_ema, script.setup
    teacher_class = getattr(script, "AttentionTeacher", teachers.Teacher)  # what the loop calls
    training_flops, micro_batches = script.training_flops, script.micro_batches

    def counting(teacher, images):  # around the compiled region: inside, every call would be another graph
        if "teacher" not in counted:
            with runs.flop_counter() as counter:
                teacher_class.forward(teacher, images)
            counted["teacher"] = counter.get_total_flops() / len(images)
        return watch.wrap("teacher", torch.nn.Module.__call__)(teacher, images)

    def last_of_step(*args):
        watch.wrap("optimizer, EMA", update_ema)(*args)
        watch.end_step()

    def counted_flops(*args):
        counted["student"] = training_flops(*args)
        return counted["student"]

    def noted_setup(cfg, *args):
        noted["cfg"] = cfg
        return setup(cfg, *args)
    patches = dict(micro_batches=lambda *args: watch.iterate("data", micro_batches(*args)),
                   training_flops=counted_flops, setup=noted_setup,
                   optimizer_step=watch.wrap("optimizer, EMA", script.optimizer_step), update_ema=last_of_step)
    if hasattr(script, loss):
        patches[loss] = watch.wrap("forward, loss", getattr(script, loss))
    with mock.patch.multiple(script, **patches), mock.patch.object(teacher_class, "__call__", counting), \
            mock.patch.object(torch.Tensor, "backward", watch.wrap("backward", torch.Tensor.backward)):
        script.main(flags)
    rows = watch.table(max(1, len(watch.steps) // 3))
    step, cfg = print_table(rows), noted["cfg"]
    rate = cfg.batch_size / step
    bf16 = cfg.precision == "bf16" or cfg.precision == "auto" and IS_CUDA
    matrix = matrix_rate(torch.bfloat16 if bf16 else torch.float32, 8192 if IS_CUDA else 2048)
    peak = next((p for gpu, p in log.PEAK_FLOPS.items() if IS_CUDA and gpu in torch.cuda.get_device_name()), None)
    student, all_flops = counted["student"], sum(counted.values())
    print(f"{rate:.4g} images/s; {student / 1e9:.4g} GFLOP an image, with the teacher {all_flops / 1e9:.4g}; "
          + (f"MFU {student * rate / peak:.1%}; " if peak else "")
          + f"{all_flops * rate / matrix:.0%} of the {matrix / 1e12:.3g} TFLOP/s of a matrix product; {memory()}")


def bench_sampling(flags):
    """A few batches through the sampler: seconds a batch and images/s."""
    import repa
    cfg = repa.parse(["--sample", "1", "--ckpt", "-", *flags], repa.Config, common.SIT_SIZES, repa.RECIPES)
    run = runs.setup(cfg)
    sizes, is_toy = common.SIT_SIZES[cfg.model], cfg.model == "toy"
    channels, size = (3, cfg.resolution) if is_toy else (4, cfg.resolution // 8)
    model = runs.compile_blocks(common.SiT(size, channels, 1000, **sizes).to(run.device).eval(), cfg)
    y, watch = torch.arange(cfg.batch_size, device=run.device) % 1000, Stopwatch()
    for _ in range(4):
        randn = image_randn(0, range(len(y)), run.device)
        with run.autocast():
            watch.wrap("sampling", common.sample)(
                model, randn(channels, size, size), y, torch.full_like(y, 1000), mode=cfg.mode, heun=cfg.heun,
                num_steps=cfg.num_steps, cfg_scale=cfg.cfg_scale, guidance_low=cfg.guidance_low,
                guidance_high=cfg.guidance_high, randn=randn)
        watch.end_step()
    step = print_table(watch.table(1))
    print(f"{cfg.batch_size / step:.4g} images/s, {cfg.mode} {cfg.num_steps}{' Heun' * cfg.heun}, guidance "
          f"{cfg.cfg_scale:g} on [{cfg.guidance_low:g}, {cfg.guidance_high:g}], {cfg.precision}; {memory()}")


def print_table(rows):
    """Median and range of each part; returns the median of the step, in seconds."""
    step = statistics.median(rows["step"])
    print(f"{'part':16}{'median ms':>12}{'least':>10}{'most':>10}{'share':>8}")
    for part, values in rows.items():
        median = statistics.median(values)
        print(f"{part:16}{1e3 * median:12.2f}{1e3 * min(values):10.2f}{1e3 * max(values):10.2f}{median / step:8.1%}")
    return step


def memory():
    if IS_CUDA:
        return f"peak memory {torch.cuda.max_memory_allocated() / 1e9:.3g} GB"
    return f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.3g} GB"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", help="a script (repa.py), or sampling")
    args, flags = parser.parse_known_args()
    stem = Path(args.what).stem
    print(machine("common.py", "repa.py" if stem == "sampling" else f"{stem}.py"))
    if stem == "sampling":
        bench_sampling(flags)
    else:
        bench_training(stem, flags if "--bench" in flags else [*flags, "--bench", "30"])

"""The log of a run: a progress bar, log.jsonl, and what they say at the end.

A line of log.jsonl holds step; the means, over the steps since the line before, of what the script
adds (loss, loss_*, grad_norm ...); skipped, steps without a finite gradient; images_per_s; and on
CUDA mfu, where the GPU's peak is known, and memory_gb, the peak so far.
"""
import contextlib
import datetime
import json
import time
from pathlib import Path

import torch
from torch import distributed as dist
from tqdm import tqdm

from support.terminal import fail

PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}  # dense bf16, by the vendor


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

"""Runs of a script that note what the tests compare: in the tests' own process, and by torchrun on two ranks.

    torchrun --nproc_per_node=2 tests/two_ranks.py FOLDER      # does the jobs of FOLDER/jobs.json one after the other,
                                                               # writes what `record` returns to FOLDER/<job>-<rank>.pt
A job is {"script": "repa", "args": the command line, "poison": {"ranks": [...], "steps": [...]}, "count": true}; only
args is a must.
"""
import contextlib
import importlib
import json
import os
import sys
from collections import Counter
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch  # noqa: E402
from torch import distributed as dist  # noqa: E402
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook  # noqa: E402

import support.runs  # noqa: E402, F401  (before the group is made, as in every script)

KEPT_STEPS = 3  # gradients are kept of this many steps
SETTLED = 4  # DDP arranges its buckets anew in its second step, and so once more where a method wraps its model anew


def flat(tensors):
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


def record(args, poison=None, script="repa", count=False):
    """The script's main(args), with notes: its first gradients, what poisoned steps did, when it called all_reduce.

    poison: at these steps (1 is the first that this process makes) of these ranks REPA's loss is not a number.
    `reductions` holds one entry per dist.all_reduce: the number of steps made by then. count: note also `buckets`, the
    (steps made, numbers in it) of every bucket of gradients, and `collectives`, a Counter of what ranks exchange after
    step SETTLED.
    """
    script, poison = importlib.import_module(script), poison or dict(ranks=[], steps=[])
    notes = dict(gradients=[], poisoned=[], reductions=[], buckets=[], collectives=Counter(), steps=0, exit=None)
    step, all_reduce, parallelise = script.optimizer_step, dist.all_reduce, getattr(script, "parallelise", None)

    def recorded_step(optimizer, parameters, max_grad_norm):
        def state():  # weights, and moments: none before the first step
            return flat(parameters), [flat(moments.values()) for moments in optimizer.state.values()]
        notes["steps"] += 1
        is_poisoned = notes["steps"] in poison["steps"]
        if notes["steps"] <= KEPT_STEPS:
            notes["gradients"].append(flat(p.grad for p in parameters))
        before = state() if is_poisoned else None
        result = step(optimizer, parameters, max_grad_norm)
        if is_poisoned:
            notes["poisoned"].append((before, state()))
        if count and notes["steps"] == SETTLED:
            profile.start()
        return result

    def poisoned_loss(*args, **options):
        velocity, proj = true_loss(*args, **options)
        is_bad = int(os.environ.get("RANK", 0)) in poison["ranks"] and notes["steps"] + 1 in poison["steps"]
        return velocity * (float("nan") if is_bad else 1), proj

    def counted_all_reduce(*args, **options):
        notes["reductions"].append(notes["steps"])
        return all_reduce(*args, **options)

    def counted_bucket(_, bucket):
        notes["buckets"].append((notes["steps"], bucket.buffer().numel()))
        with mock.patch.object(dist, "all_reduce", all_reduce):  # not one of the script's own
            return allreduce_hook(None, bucket)  # what happens without a hook

    def counted_parallelise(*args):
        net = parallelise(*args)
        net.register_comm_hook(None, counted_bucket)
        return net

    profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])
    with contextlib.ExitStack() as patches:
        if count:
            patches.enter_context(mock.patch.object(script, "parallelise", counted_parallelise))
        patches.enter_context(mock.patch.object(script, "optimizer_step", recorded_step))
        patches.enter_context(mock.patch.object(dist, "all_reduce", counted_all_reduce))
        if poison["steps"]:
            true_loss = script.repa_loss
            patches.enter_context(mock.patch.object(script, "repa_loss", poisoned_loss))
        try:
            script.main(args)
        except SystemExit as stop:
            notes["exit"] = stop.code
    if count:
        profile.stop()
        notes["collectives"].update(e.name for e in profile.events() if e.name.startswith("c10d::"))
    return notes


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    dist.init_process_group("gloo")  # one group for all jobs: torchrun's meeting point serves only once
    with mock.patch.object(dist, "destroy_process_group"):
        for name, job in json.loads((folder / "jobs.json").read_text()).items():
            torch.save(record(**job), folder / f"{name}-{os.environ['RANK']}.pt")
    dist.destroy_process_group()
    threads = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]  # none but on Linux
    (folder / f"threads-{os.environ['RANK']}.json").write_text(json.dumps(threads))

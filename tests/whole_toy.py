"""The whole toy commands of all scripts on two ranks, one after the other, with rank 0 late before it writes a file.

    torchrun --nproc_per_node=2 tests/whole_toy.py JOBS.json        {script: its command line} in the folder of the data
"""
import importlib
import json
import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch  # noqa: E402
from torch import distributed as dist  # noqa: E402

import support.runs  # noqa: E402, F401  (before the group is made, as in every script)

LATE = 1.0  # seconds
SAMPLES = 48


def late(write):
    """`write`, a while later on rank 0: who opens its file without waiting finds an older one, or none."""
    def wait_and_write(*args, **options):
        if dist.get_rank() == 0:
            time.sleep(LATE)
        return write(*args, **options)
    return wait_and_write


def run_toy(name, arguments):
    """main(arguments) of a script whose report draws few images; returns how it ended."""
    script = importlib.import_module(name)
    generate = script.generate
    with mock.patch.object(script, "generate", lambda cfg, run: generate(replace(cfg, sample=min(cfg.sample, SAMPLES)), run)):
        try:
            script.main(arguments)
        except SystemExit as stop:
            return stop.code or "exit without a message"
    return None


if __name__ == "__main__":
    dist.init_process_group("gloo")  # one group for all jobs: torchrun's meeting point serves only once
    jobs = json.loads(Path(sys.argv[1]).read_text())
    with mock.patch.object(dist, "destroy_process_group"), mock.patch.object(torch, "save", late(torch.save)):
        ends = {name: run_toy(name, arguments) for name, arguments in jobs.items()}
    everyone = [None, None]
    dist.all_gather_object(everyone, ends)
    dist.destroy_process_group()
    if os.environ["RANK"] == "0":
        Path("ends.json").write_text(json.dumps(everyone))

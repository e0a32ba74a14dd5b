"""What every script must do with its own method: exact resume, ranks and micro-batches that change nothing, samples.

tests/test_training.py asks more of repa.py, whose plumbing the others share; this asks whether each method keeps it.
"""
import importlib
import json

import numpy as np
import pytest
import torch

from test_copies import SCRIPTS
from test_training import (  # noqa: F401
    ROOT,
    TORCHRUN,
    as_a_fresh_process,
    assert_same_images,
    assert_same_run,
    command,
    finish,
    make_data,
    relative_error,
    start,
)
from two_ranks import SETTLED, record

STEPS = 12
# Flags with which every part of a method acts within 12 steps (a phase that ends, say, ends at 6: where runs are cut).
SETTINGS = {
    "repa": [],
    "reg": [],
    "haste": ["--early-stop-point", "6"],
    "urepa": [],
    "carflow": [],
    "gmem": ["--mem-null-prob", "0.3", "--cosine-coeff", "1"],
    "erw": ["--warmup-steps", "2", "--proj-decay-half-life", "4", "--use-rope", "always"],  # ends within 3 steps
}
NAMES = [script.stem for script in SCRIPTS if script.stem in SETTINGS]
of_scripts = pytest.mark.parametrize("name", NAMES)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    torch.set_num_threads(1)  # a module's fixtures come before a test's
    return tmp_path_factory.mktemp("siblings")


@pytest.fixture(scope="module")
def data(home):
    return make_data(home / "data")


def flags(name, data, out, steps, *more):
    return command(data, out, steps, *SETTINGS[name], *more)


def main(name, arguments):
    return importlib.import_module(name).main([str(a) for a in arguments])


@pytest.fixture(scope="module")
def begun(data, home):
    """Six steps of every script: weights to take gradients from, for at the first steps most of them are zero."""
    for name in NAMES:
        main(name, flags(name, data, home / f"{name}-begun", 6))
    return {name: home / f"{name}-begun/last.pt" for name in NAMES}


@pytest.fixture(scope="module")
def unbroken(data, home):
    for name in NAMES:
        main(name, flags(name, data, home / f"{name}-unbroken", STEPS))
    return {name: home / f"{name}-unbroken" for name in NAMES}


@pytest.fixture(scope="module")
def two_ranks(data, home, begun, unbroken):
    """notes(job) of rank 0 of two: one start of torchrun serves all scripts."""
    folder = home / "two"
    folder.mkdir()
    jobs = {f"{name}-gradients": dict(script=name, args=flags(
        name, data, folder / f"{name}-gradients", 8, "--init", begun[name], "--seed", 1)) for name in NAMES}
    jobs |= {f"{name}-count": dict(script=name, count=True, args=flags(
        name, data, folder / f"{name}-count", 6, "--micro-batch", 2, "--log-every", 2)) for name in NAMES}
    jobs |= {f"{name}-sample": dict(script=name, args=sampling(unbroken[name], folder / f"{name}-sample"))
             for name in NAMES}
    (folder / "jobs.json").write_text(json.dumps(jobs))
    code, _, stderr = finish(start([*TORCHRUN, ROOT / "tests/two_ranks.py", folder]))
    assert code == 0, stderr
    return folder


def sampling(run, out, *more):
    return ["--ckpt", str(run / "last.pt"), "--out", str(out), "--sample", "6", "--batch-size", "6",
            "--num-steps", "3", "--labels", "1", "3", *map(str, more)]


@of_scripts
def test_half_and_half_is_the_whole(name, data, home, unbroken):
    out = home / f"{name}-halves"
    main(name, flags(name, data, out, STEPS // 2))
    main(name, flags(name, data, out, STEPS))
    assert_same_run(out, unbroken[name])


@of_scripts
@pytest.mark.parametrize("way", ["micro-batches", "two ranks"])
def test_the_same_gradients(name, way, data, home, begun, request):
    whole = record(flags(name, data, home / f"{name}-{way}-whole", 8, "--init", begun[name], "--seed", 1), script=name)
    if way == "two ranks":
        parts = torch.load(request.getfixturevalue("two_ranks") / f"{name}-gradients-0.pt")
    else:
        parts = record(flags(name, data, home / f"{name}-parts", 8, "--init", begun[name], "--seed", 1,
                             "--micro-batch", 2), script=name)
    assert whole["exit"] is None and parts["exit"] is None and whole["steps"] == parts["steps"] == 8
    for a, b in zip(whole["gradients"], parts["gradients"], strict=True):
        assert b.norm() > 0 and relative_error(a, b) < 1e-4


@of_scripts
def test_ranks_exchange_one_gradient_a_step_and_nothing_else(name, two_ranks):
    """But for the sums of every log point (here 2, 4, 6) and, every tenth step, the stop signal."""
    notes = torch.load(two_ranks / f"{name}-count-0.pt", weights_only=False)
    for step, gradient in enumerate(notes["gradients"]):
        assert sum(count for made, count in notes["buckets"] if made == step) == gradient.numel()
    assert notes["reductions"] == [2, 4, 6]
    assert notes["collectives"] == {"c10d::allreduce_": sum(made >= SETTLED for made, _ in notes["buckets"]) + 2,
                                    "c10d::barrier": 1}  # after the last step, until rank 0 has saved


@of_scripts
def test_an_image_does_not_depend_on_the_batch_or_the_ranks(name, home, unbroken, two_ranks):
    main(name, sampling(unbroken[name], home / f"{name}-sample"))
    main(name, sampling(unbroken[name], home / f"{name}-sample-2", "--micro-batch", 2))
    wholes, twos, pairs = ([np.load(path) for path in sorted(folder.glob("samples*.npz"))] for folder in (
        home / f"{name}-sample", home / f"{name}-sample-2", two_ranks / f"{name}-sample"))
    assert len(wholes) == 1 and wholes[0]["arr_0"].shape == (6, 16, 16, 3) and wholes[0]["arr_0"].std() > 1
    for other in (*twos, *pairs):
        assert other.files == wholes[0].files
        assert_same_images(other, wholes[0])


@of_scripts
def test_bench_prints_the_log_line_and_writes_nothing(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    make_data(tmp_path / "data/toy")
    main(name, ["--bench", "5", "--batch-size", "4", *SETTINGS[name]])
    assert "images_per_s" in capsys.readouterr().out
    assert not (tmp_path / "runs").exists()

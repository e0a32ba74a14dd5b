"""A run of repa.py: its randomness, gradients, exact resume, signals, bad steps, full disk, compile, EMA, sampling.

Everything runs by the script's own path: repa.main in this process, `python repa.py` where a process must die, and two
ranks by torchrun (one start of tests/two_ranks.py serves all tests that only look at what two ranks computed).
"""
import itertools
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import common
import repa
from support import dataset, teachers
from two_ranks import record

ROOT = Path(__file__).resolve().parent.parent
REPA = str(ROOT / "repa.py")
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
STEPS, STEPS_TWO = 60, 40        # of the unbroken runs, on one and on two ranks
SIGNAL_STEP = 8                  # once the log is here, the signal goes off
LIMIT = 300                      # seconds after which a process counts as hanging
CLASSES, IMAGES = 4, 100


# ---------------------------------------------------------------------------------------------------------------------
# A tiny prepared set, and ways to run
# ---------------------------------------------------------------------------------------------------------------------
def make_data(folder, classes=CLASSES, teacher=True, latent=False):
    """What prepare.py would write: random images of 16 px (or latents of 64 px), a teacher of random weights."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    np.save(folder / "labels.npy", rng.integers(0, classes, IMAGES))
    if latent:
        np.save(folder / "moments.npy", rng.random((IMAGES, 8, 8, 8)).astype(np.float16))
    else:
        np.save(folder / "images.npy", rng.integers(0, 256, (IMAGES, 16, 16, 3), np.uint8))
    (folder / "meta.json").write_text(json.dumps(dict(
        format=1, source="random", count=IMAGES, num_classes=classes, class_names=[str(i) for i in range(classes)],
        resolution=64 if latent else 16, channels=4 if latent else 3, vae="sd" if latent else None, latent_scale=0.5,
        latent_shift=0.0)))
    if teacher:
        from timm.models.vision_transformer import VisionTransformer
        torch.manual_seed(0)
        config = dict(img_size=16, patch_size=4, embed_dim=32, depth=4, num_heads=4, num_classes=0)
        weights = VisionTransformer(**config).state_dict()
        torch.save(dict(config=config, model=weights, resolution=16), folder / "teacher.pt")
    return folder


def command(data, out, steps, *more):
    return ["--data", str(data), "--out", str(out), "--max-train-steps", str(steps), "--batch-size", "8",
            "--ema-decay", "0.9", "--log-every", "1", "--save-every", "5", "--preview-every", "0", *map(str, more)]


def child_env():
    hidden = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    return {k: v for k, v in os.environ.items() if k not in hidden} | dict(OMP_NUM_THREADS="1")


def start(arguments, **options):
    """python with these arguments, as a process."""
    return subprocess.Popen([sys.executable, *map(str, arguments)], env=child_env(), stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True, **options)


def family(pid):
    """A process and all its descendants (the ranks of torchrun have sessions of their own)."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [pid, *itertools.chain.from_iterable(family(int(child)) for child in children)]


def kill(process):
    for pid in family(process.pid):
        os.kill(pid, signal.SIGKILL)


def finish(process):
    """Wait for it: (exit code, stdout, stderr). One that hangs is ended with all its descendants."""
    try:
        stdout, stderr = process.communicate(timeout=LIMIT)
    except BaseException:
        kill(process)
        raise
    return process.returncode, stdout, stderr


def steps_logged(out):
    path = Path(out) / "log.jsonl"
    return [json.loads(line)["step"] for line in path.read_text().splitlines()] if path.exists() else []


def wait_for_step(process, out, step):
    """Until a run has logged this step."""
    deadline = time.monotonic() + LIMIT
    while len(steps_logged(out)) < step:
        if process.poll() is not None or time.monotonic() > deadline:
            raise AssertionError(f"it did not come to step {step}: {finish(process)}")
        time.sleep(0.01)


def break_off(arguments, out, send):
    """Start python with these arguments, send(process) in the middle of the run, and return what `finish` does."""
    process = start(arguments, start_new_session=True)
    wait_for_step(process, out, SIGNAL_STEP)
    send(process)
    return finish(process)


def sender(number):
    return lambda process: process.send_signal(number)


def last(out):
    return torch.load(Path(out) / "last.pt", weights_only=True)


def tensors_of(checkpoint, *parts):
    """All tensors of a checkpoint, by name."""
    found = {}

    def walk(value, name):
        if isinstance(value, torch.Tensor):
            found[name] = value
        elif isinstance(value, dict):
            for key, inner in value.items():
                walk(inner, f"{name}.{key}")
    for part in parts or ("model", "ema", "optimizer"):
        walk(checkpoint[part], part)
    return found


def assert_same_run(out, expected):
    """All tensors of both runs' last.pt are equal, bit for bit, and the log has every step once."""
    a, b = last(out), last(expected)
    assert a["step"] == b["step"] and steps_logged(out) == list(range(1, b["step"] + 1))
    a, b = tensors_of(a), tensors_of(b)
    assert a.keys() == b.keys() and len(a) > 200
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


def relative_error(a, b):
    return ((a - b).norm() / b.norm()).item()


def weights_error(out, expected):
    a, b = (torch.cat([t.flatten() for t in tensors_of(last(run), "model", "ema").values()]) for run in (out, expected))
    return relative_error(a, b)


@pytest.fixture(autouse=True)
def as_a_fresh_process(monkeypatch):
    """Every test runs on one thread, as the children do, and leaves no signal handler behind."""
    handlers, threads = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}, torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    torch.set_num_threads(1)  # a module's fixtures come before a test's
    return tmp_path_factory.mktemp("training")


@pytest.fixture(scope="module")
def data(home):
    return make_data(home / "data")


@pytest.fixture(scope="module")
def unbroken(data, home):
    """The run that the broken ones must equal."""
    repa.main(command(data, home / "unbroken", STEPS))
    return home / "unbroken"


@pytest.fixture(scope="module")
def begun(data, home):
    """A run of ten steps: a checkpoint to go on from, to start from and to sample from."""
    repa.main(command(data, home / "begun", 10))
    return home / "begun"


def copy_run(run, to):
    return Path(shutil.copytree(run, to))


# ---------------------------------------------------------------------------------------------------------------------
# Two ranks: two runs that are broken off, then one process pair that does everything else
# ---------------------------------------------------------------------------------------------------------------------
def gradient_flags(begun):
    return "--init", begun / "last.pt", "--seed", 1


SAMPLE = ["--sample", "6", "--batch-size", "6", "--num-steps", "3", "--labels", "1", "3"]


@pytest.fixture(scope="module")
def two_ranks(data, home, begun, unbroken):
    """What two ranks did: a function of (job, rank) that gives the notes of two_ranks.record, and the broken runs."""
    folder = home / "two"
    folder.mkdir()
    broken = {name: break_off([*TORCHRUN, REPA, *command(data, folder / name, STEPS_TWO, *more)], folder / name, send)
              for name, send, *more in [("killed", kill, "--workers", 2), ("interrupted", sender(signal.SIGINT))]}
    stopped_at = last(folder / "interrupted")["step"]
    copy_run(begun, folder / "resumed")
    jobs = dict(
        unbroken=command(data, folder / "unbroken", STEPS_TWO),
        killed=command(data, folder / "killed", STEPS_TWO),
        interrupted=command(data, folder / "interrupted", STEPS_TWO),
        gradients=command(data, folder / "gradients", 3, *gradient_flags(begun)),
        accumulated=command(data, folder / "accumulated", 3, *gradient_flags(begun), "--micro-batch", 2),
        resumed=command(data, folder / "resumed", 20),
        reductions=command(data, folder / "reductions", 20) + ["--log-every", "7"],
        poisoned=command(data, folder / "poisoned", 4),
        hopeless=command(data, folder / "hopeless", 12),
        sample=["--out", str(folder / "sample"), "--ckpt", str(unbroken / "last.pt"), *SAMPLE])
    poison = dict(poisoned=dict(ranks=[1], steps=[3]), hopeless=dict(ranks=[1], steps=[7, 8, 9]))
    (folder / "jobs.json").write_text(json.dumps(
        {name: dict(args=args, poison=poison.get(name)) for name, args in jobs.items()}))
    arguments = [*TORCHRUN, str(ROOT / "tests/two_ranks.py"), str(folder)]
    code, _, stderr = finish(start(arguments))
    assert code == 0, stderr
    return SimpleNamespace(folder=folder, broken=broken, stopped_at=stopped_at,
                           notes=lambda job, rank: torch.load(folder / f"{job}-{rank}.pt"))


# ---------------------------------------------------------------------------------------------------------------------
# Randomness
# ---------------------------------------------------------------------------------------------------------------------
class Numbers(torch.utils.data.Dataset):
    """A data set whose images are their own numbers."""

    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, indices):
        return {"i": torch.from_numpy(indices)}


def place(rank=0, world=1, micro_batch=4):
    return SimpleNamespace(rank=rank, world=world, micro_batch=micro_batch, device=torch.device("cpu"))


def stream(count, batches, seed=0, batch_size=4, run=None, **options):
    """The first micro-batches of a stream of numbers."""
    loader = dataset.micro_batches(Numbers(count), seed, batch_size, run or place(micro_batch=batch_size), **options)
    return [batch["i"].tolist() for batch in itertools.islice(loader, batches)]


def test_a_stream_begun_at_a_step_is_the_tail_of_the_whole():
    whole = stream(10, 12)
    assert stream(10, 7, first_step=5) == whole[5:]
    assert stream(10, 12, seed=1) != whole


def test_every_image_once_per_epoch_in_a_new_order():
    order = sum(stream(10, 10), [])
    epochs = [order[i:i + 10] for i in range(0, 40, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1]


@pytest.mark.parametrize("first_step", [0, 3])
def test_a_set_smaller_than_a_batch(first_step):
    order = sum(stream(3, 6, first_step=first_step), [])
    assert all(sorted(order[i:i + 3]) == [0, 1, 2] for i in range(0, 24, 3))
    assert order == sum(stream(3, 9), [])[4 * first_step:][:24]


def test_two_ranks_in_micro_batches_share_the_global_batch():
    whole = sum(stream(10, 4, batch_size=8), [])
    ranks = [sum(stream(10, 8, batch_size=8, run=place(rank, 2, 2)), []) for rank in (0, 1)]
    assert ranks == [whole[0::2], whole[1::2]]


def test_workers_change_nothing():
    assert stream(10, 7, workers=2) == stream(10, 7)


@pytest.mark.parametrize("kind", [0, 1])
def test_draws_of_two_ranks_are_slices_of_one_ranks(kind):
    whole, *halves = [dataset.step_draws(5, 7, 8, run)[kind](3, 2) for run in (place(), place(0, 2), place(1, 2))]
    assert whole.shape == (8, 3, 2)
    assert torch.equal(torch.stack(halves, 1).flatten(0, 1), whole)


def test_draws_of_another_seed_or_step_differ():
    draws = [dataset.step_draws(seed, step, 8, place())[0](3) for seed, step in [(5, 7), (5, 8), (6, 7), (7, 5)]]
    assert all(not torch.isclose(a, b).any() for a, b in itertools.combinations(draws, 2))


def test_draws_of_a_step_differ_from_each_other():
    normal, _ = dataset.step_draws(0, 1, 8, place())
    assert not torch.isclose(normal(3), normal(3)).any()


# ---------------------------------------------------------------------------------------------------------------------
# Gradients
# ---------------------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def one_rank_gradients(data, home, begun):
    return record(command(data, home / "gradients", 3, *gradient_flags(begun)))["gradients"]


def test_accumulation_gives_the_same_gradients(data, tmp_path, begun, one_rank_gradients):
    notes = record(command(data, tmp_path / "run", 3, *gradient_flags(begun), "--micro-batch", 2))
    assert relative_error(notes["gradients"][0], one_rank_gradients[0]) < 1e-6


@pytest.mark.parametrize("job", ["gradients", "accumulated"])
def test_two_ranks_give_the_same_gradients(two_ranks, one_rank_gradients, job):
    a, b = (two_ranks.notes(job, rank)["gradients"] for rank in (0, 1))
    assert torch.equal(a[0], b[0])
    assert relative_error(a[0], one_rank_gradients[0]) < 1e-6
    assert relative_error(a[2], one_rank_gradients[2]) < 1e-5  # and so do the steps after it


def test_gradients_of_another_step_or_seed_differ(one_rank_gradients):
    assert relative_error(one_rank_gradients[1], one_rank_gradients[0]) > 0.1  # so the comparisons above can fail


# ---------------------------------------------------------------------------------------------------------------------
# Going on
# ---------------------------------------------------------------------------------------------------------------------
def test_half_and_half_is_the_whole(data, tmp_path, unbroken):
    out = tmp_path / "run"
    repa.main(command(data, out, STEPS // 2))
    repa.main(command(data, out, STEPS, "--workers", 2))  # how the data are read does not matter either
    assert_same_run(out, unbroken)


def test_killed_and_restarted(data, tmp_path, unbroken):
    args = command(data, tmp_path / "run", STEPS)
    code, _, _ = break_off([REPA, *args], tmp_path / "run", kill)
    assert code == -signal.SIGKILL
    (tmp_path / "run/last.pt.tmp").write_bytes(b"half a checkpoint")  # as if it had died while saving
    repa.main(args)
    assert_same_run(tmp_path / "run", unbroken)
    assert not (tmp_path / "run/last.pt.tmp").exists()


def send_to_group(process):
    """As the schedulers of clusters do it: the data workers get the signal as well."""
    os.killpg(process.pid, signal.SIGTERM)


@pytest.mark.parametrize("number, send, workers",
                         [(signal.SIGINT, sender(signal.SIGINT), 0), (signal.SIGTERM, send_to_group, 2),
                          (signal.SIGHUP, sender(signal.SIGHUP), 0), (signal.SIGUSR1, sender(signal.SIGUSR1), 0)],
                         ids=["ctrl-c", "sigterm to the group", "a closed terminal", "slurm's warning"])
def test_a_stop_signal_saves_and_says_how_to_go_on(data, tmp_path, unbroken, number, send, workers):
    out = tmp_path / "run"
    args = command(data, out, STEPS, "--workers", workers)
    code, stdout, stderr = break_off([REPA, *args], out, send)
    step = last(out)["step"]
    assert code == 128 + number, stderr
    assert SIGNAL_STEP <= step < STEPS and step == steps_logged(out)[-1]  # no step is lost
    assert f"stopped at step {step}, saved in {out}/last.pt; the same command continues" in stdout
    assert "Traceback" not in stderr
    repa.main(args)
    assert_same_run(out, unbroken)


def test_two_ranks_killed_and_restarted(two_ranks):
    assert two_ranks.broken["killed"][0] == -signal.SIGKILL
    assert_same_run(two_ranks.folder / "killed", two_ranks.folder / "unbroken")


def test_two_ranks_interrupted_and_restarted(two_ranks):
    code, stdout, _ = two_ranks.broken["interrupted"]
    assert code != 0
    assert SIGNAL_STEP <= two_ranks.stopped_at < STEPS_TWO and two_ranks.stopped_at % 10 == 0
    assert f"stopped at step {two_ranks.stopped_at}, saved in" in stdout
    assert_same_run(two_ranks.folder / "interrupted", two_ranks.folder / "unbroken")


def test_one_rank_goes_on_with_two(data, tmp_path, two_ranks, begun):
    repa.main(command(data, copy_run(begun, tmp_path / "run"), 20))
    assert weights_error(two_ranks.folder / "resumed", tmp_path / "run") < 1e-5
    assert weights_error(begun, tmp_path / "run") > 1e-2  # so the comparison can fail


def test_a_finished_run_says_so_and_changes_nothing(data, tmp_path, begun, capsys):
    out = copy_run(begun, tmp_path / "run")
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    repa.main(command(data, out, 10))
    assert f"{out} is finished: 10 steps" in capsys.readouterr().out
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_a_log_cut_in_the_middle_of_a_line(data, tmp_path, begun):
    out = copy_run(begun, tmp_path / "run")
    with open(out / "log.jsonl", "a") as file:
        file.write('{"step": 11, "lo')
    repa.main(command(data, out, 12))
    assert steps_logged(out) == list(range(1, 13))


def test_another_runs_folder_is_refused(data, tmp_path, begun):
    out = copy_run(begun, tmp_path / "run")
    before = (out / "last.pt").read_bytes()
    with pytest.raises(SystemExit, match="holds another run .*seed 0, now 1"):
        repa.main(command(data, out, 20, "--seed", 1))
    assert (out / "last.pt").read_bytes() == before


# ---------------------------------------------------------------------------------------------------------------------
# Bad steps, full disk
# ---------------------------------------------------------------------------------------------------------------------
def log_lines(out):
    return [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("bad", [1, 3])
def test_a_bad_step_is_skipped(data, tmp_path, bad):
    notes = record(command(data, tmp_path / "run", 4), dict(ranks=[0], steps=[bad]))
    assert notes["steps"] == 4 and notes["exit"] is None
    assert [bool(gradients.isfinite().all()) for gradients in notes["gradients"]] == [n != bad for n in (1, 2, 3)]
    ((weights, moments), (weights_after, moments_after)), = notes["poisoned"]
    assert torch.equal(weights, weights_after)
    if bad == 1:  # the moments come into being, as zeros
        assert not moments and not torch.cat(moments_after).any()
    else:
        assert torch.equal(torch.cat(moments), torch.cat(moments_after))
    assert [line["skipped"] for line in log_lines(tmp_path / "run")] == [float(step == bad) for step in range(1, 5)]
    assert all(tensor.isfinite().all() for tensor in tensors_of(last(tmp_path / "run")).values())


def test_skipped_steps_are_counted_and_left_out_of_the_mean(data, tmp_path):
    args = command(data, tmp_path / "run", 4) + ["--log-every", "4"]
    record(args, dict(ranks=[0], steps=[2, 3]))
    line, = log_lines(tmp_path / "run")
    assert line["skipped"] == 2
    assert np.isfinite(list(line.values())).all()


@pytest.mark.parametrize("log_every", [1, 4])  # the count outlives a log point
def test_three_bad_steps_in_a_row_stop_the_run(data, tmp_path, begun, log_every):
    out = copy_run(begun, tmp_path / "run")
    before = (out / "last.pt").read_bytes()
    args = command(data, out, 50) + ["--save-every", "50", "--log-every", str(log_every)]
    notes = record(args, dict(ranks=[0], steps=[2, 3, 4] if log_every == 1 else [1, 2, 3, 4, 5, 6]))
    assert notes["steps"] == (4 if log_every == 1 else 6)  # 4: step 14, 6: step 16
    assert notes["exit"].startswith("error: no usable gradient") and len(notes["exit"].splitlines()) == 1
    assert (out / "last.pt").read_bytes() == before


def test_two_bad_steps_and_a_good_one_do_not_stop_it(data, tmp_path):
    notes = record(command(data, tmp_path / "run", 9), dict(ranks=[0], steps=[2, 3, 5, 6, 8, 9]))
    assert notes["exit"] is None and notes["steps"] == 9


def test_a_bad_step_of_one_rank_is_skipped_by_both(two_ranks):
    for rank in (0, 1):
        (before, after), = two_ranks.notes("poisoned", rank)["poisoned"]
        assert torch.equal(before[0], after[0]) and torch.equal(torch.cat(before[1]), torch.cat(after[1]))
    assert [line["skipped"] for line in log_lines(two_ranks.folder / "poisoned")] == [0, 0, 1, 0]


def test_three_bad_steps_of_one_rank_stop_both(two_ranks):
    ranks = [two_ranks.notes("hopeless", rank) for rank in (0, 1)]
    assert [notes["steps"] for notes in ranks] == [9, 9]
    assert ranks[0]["exit"].startswith("error: no usable gradient") and ranks[1]["exit"] == 1
    assert last(two_ranks.folder / "hopeless")["step"] == 5


def test_a_full_disk_leaves_the_old_checkpoint(data, tmp_path, begun):
    out = copy_run(begun, tmp_path / "run")
    before = (out / "last.pt").read_bytes()

    def small_disk():  # writing beyond a megabyte fails, as it does on a full disk
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2 ** 20, 2 ** 20))
    code, _, stderr = finish(start([REPA, *command(data, out, 20)], preexec_fn=small_disk))
    assert code == 1
    assert f"error: could not write {out}/last.pt" in stderr and "free some disk" in stderr
    assert "Traceback" not in stderr
    assert (out / "last.pt").read_bytes() == before and not (out / "last.pt.tmp").exists()
    repa.main(command(data, out, 20))  # with room again, the same command goes on
    assert last(out)["step"] == 20 and steps_logged(out) == list(range(1, 21))


# ---------------------------------------------------------------------------------------------------------------------
# Compile
# ---------------------------------------------------------------------------------------------------------------------
def compiled_run(data, out, begun, monkeypatch, backend):
    """Three steps of a compiled run; returns (the notes, the backend's counter of graphs of the blocks)."""
    import torch._dynamo
    from torch._dynamo.testing import CompileCounterWithBackend
    counter, compile_module = CompileCounterWithBackend(backend), torch.nn.Module.compile
    torch._dynamo.reset()
    monkeypatch.setattr(common.SiTBlock, "compile",
                        lambda block, dynamic: compile_module(block, backend=counter, dynamic=dynamic))
    monkeypatch.setattr(teachers.Teacher, "compile", lambda teacher: compile_module(teacher, backend="eager"))
    notes = record(command(data, out, 3, *gradient_flags(begun), "--compile"))
    torch._dynamo.reset()
    return notes, counter


def check_compiled_run(data, tmp_path, begun, monkeypatch, backend, one_rank_gradients):
    notes, counter = compiled_run(data, tmp_path / "run", begun, monkeypatch, backend)
    assert counter.frame_count == 1  # one graph serves all four blocks
    assert relative_error(notes["gradients"][0], one_rank_gradients[0]) < 2e-6
    eager = begun.parent / "gradients"
    for ours, theirs in zip(log_lines(tmp_path / "run"), log_lines(eager), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
    assert tensors_of(last(tmp_path / "run")).keys() == tensors_of(last(eager)).keys()
    assert weights_error(tmp_path / "run", eager) < 1e-4
    start = last(begun)["ema"]
    moved = last(tmp_path / "run")["ema"]
    assert all(not torch.equal(moved[k], start[k]) for k in start if k.startswith("blocks.") and k.endswith("weight"))


def test_compiled_blocks_share_one_graph(data, tmp_path, begun, monkeypatch, one_rank_gradients):
    check_compiled_run(data, tmp_path, begun, monkeypatch, "aot_eager", one_rank_gradients)


@pytest.mark.slow  # the C++ compiler takes half a minute
@pytest.mark.skipif(not shutil.which(os.environ.get("CXX", "g++")), reason="torch.compile needs a C++ compiler here")
def test_compiled_by_the_default_backend(data, tmp_path, begun, monkeypatch, one_rank_gradients):
    check_compiled_run(data, tmp_path, begun, monkeypatch, "inductor", one_rank_gradients)


# ---------------------------------------------------------------------------------------------------------------------
# EMA, the baseline, --init, --bench
# ---------------------------------------------------------------------------------------------------------------------
def test_the_average_by_hand(data, tmp_path):
    decay, args = 0.7, ["--ema-decay", 0.7]
    repa.main(command(data, tmp_path / "start", 1, *args, "--learning-rate", 0))
    expected = last(tmp_path / "start")["model"]
    for step in (1, 2, 3):
        repa.main(command(data, tmp_path / "run", step, *args))
        checkpoint = last(tmp_path / "run")
        expected = {k: decay * e + (1 - decay) * checkpoint["model"][k] for k, e in expected.items()}
        torch.testing.assert_close(dict(checkpoint["ema"]), expected)
    drift = {k: (checkpoint["model"][k] - e).abs().max() for k, e in expected.items()}
    assert drift["blocks.0.attn.qkv.weight"] > 1e-3


def test_keep_every_writes_the_average_alone(data, tmp_path):
    repa.main(command(data, tmp_path / "run", 4, "--keep-every", 2))
    kept = torch.load(tmp_path / "run/ema-4.pt", weights_only=True)
    assert (tmp_path / "run/ema-2.pt").exists() and "model" not in kept and kept["step"] == 4
    ema = last(tmp_path / "run")["ema"]
    assert all(torch.equal(kept["ema"][name], ema[name]) for name in ema)


def test_the_baseline_has_no_teacher_and_no_projector(tmp_path):
    data = make_data(tmp_path / "data", teacher=False)
    repa.main(command(data, tmp_path / "run", 2, "--proj-coeff", 0))
    assert not [name for name in tensors_of(last(tmp_path / "run")) if "projector" in name]
    assert [line["loss_proj"] for line in log_lines(tmp_path / "run")] == [0, 0]
    with pytest.raises(SystemExit, match="teacher.pt"):  # which the alignment needs
        repa.main(command(data, tmp_path / "aligned", 2))


def test_the_baseline_on_latents_reads_no_images(tmp_path):
    data = make_data(tmp_path / "data", teacher=False, latent=True)
    assert not (data / "images.npy").exists()
    repa.main(command(data, tmp_path / "run", 2, "--proj-coeff", 0, "--resolution", 64))
    assert last(tmp_path / "run")["model"]["pos_embed"].shape[1] == 4  # 8x8 latents in patches of 4


def test_init_takes_all_but_the_labels_of_other_classes(tmp_path, begun, capsys):
    other = make_data(tmp_path / "data", classes=CLASSES + 2)
    repa.main(command(other, tmp_path / "run", 1, "--init", begun / "last.pt", "--learning-rate", 0))
    assert "left fresh: y_embedder" in capsys.readouterr().out
    model, ema, source = (*(last(tmp_path / "run")[part] for part in ("model", "ema")), last(begun)["ema"])
    table = "y_embedder.embedding_table.weight"
    assert len(model[table]) == CLASSES + 3
    assert [name for name in model if name != table and not torch.equal(model[name], source[name])] == []
    assert [name for name in model if not torch.equal(ema[name], model[name])] == []


def test_bench_prints_the_log_line_and_writes_nothing(data, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    before = sorted(data.iterdir())
    repa.main(["--data", str(data), "--out", "run", "--batch-size", "8", "--bench", "5"])
    out = capsys.readouterr().out
    assert "step 5/5: loss " in out and "images_per_s" in out
    assert list(tmp_path.iterdir()) == [] and sorted(data.iterdir()) == before


# ---------------------------------------------------------------------------------------------------------------------
# Collectives
# ---------------------------------------------------------------------------------------------------------------------
def test_ranks_talk_only_at_log_points_and_every_ten_steps(two_ranks):
    for rank in (0, 1):  # logged at 7, 14, 20; the stop signal is compared at 10 and 20
        assert two_ranks.notes("reductions", rank)["reductions"] == [7, 10, 14, 20, 20]


def test_no_thread_of_the_ranks_outlives_their_group(two_ranks):
    """One that still drops a tensor while Python shuts down aborts the rank, and torchrun calls a good run failed."""
    for rank in (0, 1):
        threads = json.loads((two_ranks.folder / f"threads-{rank}.json").read_text())
        assert [name for name in threads if "gloo" in name] == []


# ---------------------------------------------------------------------------------------------------------------------
# Sampling
# ---------------------------------------------------------------------------------------------------------------------
def sampled(out, unbroken, *more):
    repa.main(["--out", str(out), "--ckpt", str(unbroken / "last.pt"), *SAMPLE, *map(str, more)])
    path, = out.iterdir()  # and no leftovers beside it
    return np.load(path)


@pytest.fixture(scope="module")
def samples(unbroken, home):
    return sampled(home / "samples", unbroken)


def assert_same_images(a, b):
    """Equal but for rounding: a pixel that lies on an edge of two levels may fall on the other side."""
    assert (a["labels"] == b["labels"]).all()
    difference = np.abs(a["arr_0"].astype(int) - b["arr_0"].astype(int))
    assert difference.max() <= 1 and (difference > 0).mean() < 0.01


def test_samples_on_disk(samples):
    assert samples["arr_0"].shape == (6, 16, 16, 3) and samples["arr_0"].dtype == np.uint8
    assert samples["labels"].tolist() == [1, 3, 1, 3, 1, 3]
    assert len(np.unique(samples["arr_0"].reshape(6, -1), axis=0)) == 6 and samples["arr_0"].std() > 10


@pytest.mark.parametrize("mode", ["ode", "sde"])
def test_an_image_does_not_depend_on_the_batch(unbroken, tmp_path, mode):
    pairs, whole = (sampled(tmp_path / str(n), unbroken, "--mode", mode, "--micro-batch", n) for n in (2, 6))
    assert_same_images(pairs, whole)


def test_an_image_does_not_depend_on_the_ranks(two_ranks, samples):
    assert_same_images(np.load(two_ranks.folder / "sample/samples.npz"), samples)


@pytest.mark.parametrize("flags", [["--seed", 1], ["--mode", "sde"], ["--heun"], ["--cfg-scale", 3]])
def test_a_flag_of_sampling_changes_the_images(unbroken, tmp_path, samples, flags):
    images = sampled(tmp_path / "run", unbroken, *flags)["arr_0"]
    assert np.abs(images.astype(int) - samples["arr_0"]).mean() > 0.1


def test_random_labels_follow_the_seed(unbroken, tmp_path):
    def labels(name, seed):
        repa.main(["--out", str(tmp_path / name), "--ckpt", str(unbroken / "last.pt"), "--sample", "40", "--batch-size",
                   "40", "--num-steps", "1", "--seed", str(seed)])
        return np.load(tmp_path / name / "samples.npz")["labels"]
    first = labels("a", 0)
    assert set(first) == set(range(CLASSES))
    assert (labels("b", 0) == first).all() and (labels("c", 1) != first).any()

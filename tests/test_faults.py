"""What goes wrong on one rank, or on a user's machine, is one line that speaks, with a remedy where there is one."""
import errno
import os
import signal
from types import SimpleNamespace

import pytest
import torch
from torch import distributed as dist

import repa
from support import runs
from test_training import as_a_fresh_process  # noqa: F401


@pytest.fixture
def second_rank(monkeypatch):
    """This process as rank 1 of 2, on the same machine as rank 0."""
    for name, value in dict(RANK=1, WORLD_SIZE=2, LOCAL_RANK=1).items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(dist, "destroy_process_group", lambda: None)
    return SimpleNamespace(rank=1, world=2, micro_batch=32)


def line_of(run, error):
    """What a script says of an error inside it."""
    with pytest.raises(SystemExit) as stopped, runs.clear_errors(run):
        raise error
    message = str(stopped.value)
    assert message.startswith("error: ") and "\n" not in message
    return message


@pytest.mark.parametrize("error, parts", [
    (torch.OutOfMemoryError("CUDA out of memory"), ["--micro-batch (now 32)"]),
    (OSError(errno.ENOSPC, "No space left on device", "runs/x"), ["runs/x", "free some disk space"]),
    (OSError(errno.EMFILE, "Too many open files"), ["ulimit -n", "--workers"]),
    (RuntimeError("[..] Connection closed by peer [127.0.0.1]:999"), ["another rank is gone"]),
    (dist.DistBackendError("NCCL error"), ["another rank is gone"]),
])
def test_an_event_of_one_rank_speaks_on_that_rank(second_rank, error, parts):
    message = line_of(second_rank, error)
    assert "rank 1: " in message and all(part in message for part in parts)


def test_no_remedy_is_invented():
    run = SimpleNamespace(rank=0, world=1, micro_batch=1)
    message = line_of(run, OSError(errno.EIO, "Input/output error", "a/file.jpg"))
    assert message.endswith("'a/file.jpg'") and "disk" not in message
    assert "disk" in line_of(run, OSError(errno.EROFS, "Read-only file system"))


def test_a_bug_keeps_its_traceback():
    run = SimpleNamespace(rank=0, world=1, micro_batch=1)
    for error in (RuntimeError("shapes differ"), ValueError("no")):
        with pytest.raises(type(error)), runs.clear_errors(run):
            raise error


def test_slurm_tasks_without_torchrun(monkeypatch, tmp_path):
    monkeypatch.setenv("SLURM_NTASKS", "4")
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(SystemExit, match="start it by torchrun"):
        repa.main(["--data", str(tmp_path)])


def test_nohup_outlives_its_terminal():
    before = {number: signal.getsignal(number) for number in (signal.SIGHUP, signal.SIGUSR1)}
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        stop = runs.catch_stop(SimpleNamespace(world=1))
        os.kill(os.getpid(), signal.SIGHUP)
        assert stop(1) == 0
        os.kill(os.getpid(), signal.SIGUSR1)
        assert stop(2) == signal.SIGUSR1
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

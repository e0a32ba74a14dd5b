"""Between program and user: one-line errors, lines, signals, ranks in turn, downloads."""
import contextlib
import os
import signal
from pathlib import Path

from torch import distributed as dist
from tqdm import tqdm

# Ctrl-C, Slurm and kill, a terminal that closes, and Slurm's warning before its time limit; Windows
# knows the first two.
STOP_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")
                if hasattr(signal, name)]


def fail(message):
    """Stop the program with one line that names the remedy; only a machine's first rank speaks."""
    if os.environ.get("LOCAL_RANK", "0") != "0":
        raise SystemExit(1)
    raise SystemExit(f"error: {message}")


def say(message):
    """Print a line once for all ranks, above a progress bar if there is one."""
    if os.environ.get("RANK", "0") == "0":
        tqdm.write(message)


def first_line(error):
    """What an exception says, in one line: its first, or, from a data process, its last."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    if "in DataLoader worker" in lines[0]:
        return lines[-1][:160]
    return lines[0][:160]


def make_folder(path):
    """Create a folder for results, and those above it."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fail(f"cannot write to {path} ({first_line(error)}): choose another --out")


@contextlib.contextmanager
def first_rank_first():
    """Rank 0 goes first (it downloads, say), then the others, who find the work done."""
    waits = dist.is_initialized() and dist.get_world_size() > 1
    if waits and dist.get_rank() > 0:
        dist.barrier()
    yield
    if waits and dist.get_rank() == 0:
        dist.barrier()


def hub_file(repo, name, flag):
    """Path of a file from the hub, rank 0 first; a licence to accept first is named."""
    from huggingface_hub import hf_hub_download
    try:
        with first_rank_first():
            return hf_hub_download(repo, name)
    except (OSError, RuntimeError) as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status in (401, 403):
            fail(f"{repo} is behind a licence: accept it on https://huggingface.co/{repo}, then "
                 f"set HF_TOKEN to a token of your account; or give its {name} by {flag} FILE")
        fail(f"cannot download {repo} ({type(error).__name__}); with its {name} from another "
             f"machine: {flag} FILE")

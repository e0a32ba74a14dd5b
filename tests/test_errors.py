"""Bad input: each mistake gets one clear line that names the remedy, and overwrites nothing."""

import argparse
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

import repa
from support import checkpoints, teachers, vae
from support.dataset import write_labels_and_meta

ROOT = Path(__file__).resolve().parent.parent
CONFIG = dict(img_size=16, patch_size=4, embed_dim=64, depth=4, num_heads=4, num_classes=0, class_token=True)


# ----------------------------------------------------------------------------------------------------------------------
# A tiny data set, one run of two steps on it, and the helper that every test uses


def write_data(folder, num_classes=8, count=24, resolution=16):
    """A pixel-space set with a teacher of random weights, as prepare.py writes it."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    np.save(folder / "images.npy", rng.integers(0, 256, (count, resolution, resolution, 3), np.uint8))
    names = [str(i) for i in range(num_classes)]
    write_labels_and_meta(folder, np.arange(count) % num_classes, "random", resolution, names)
    write_teacher(folder / "teacher.pt", img_size=resolution)
    return folder


def write_teacher(path, **changes):
    config = CONFIG | changes
    torch.save(dict(config=config, model=VisionTransformer(**config).state_dict(), resolution=config["img_size"]), path)


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


class Payload:
    """Whoever unpickles this runs a command."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.fixture(scope="module", autouse=True)
def keep_signals():
    """Training in this process takes over Ctrl-C; give it back."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("shared") / "data")


@pytest.fixture(scope="module")
def trained(data):
    """The folder of a finished run of two steps."""
    run([*training(data, data.parent / "run"), "--max-train-steps", 2])
    return data.parent / "run"


@pytest.fixture
def own_data(data, tmp_path):
    """A copy of the data that a test may damage."""
    return Path(shutil.copytree(data, tmp_path / "data"))


@pytest.fixture
def own_run(trained, tmp_path):
    """A copy of the run that a test may damage or continue."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


@pytest.fixture
def no_hub(monkeypatch):
    """No internet, without the half minute that the real attempts take."""
    import huggingface_hub
    import timm

    def offline(*args, **kwargs):
        raise OSError("An error happened while trying to locate the file on the Hub\nand a second line")
    monkeypatch.setattr(timm, "create_model", offline)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)


def run(flags):
    repa.main([str(flag) for flag in flags])


def training(data, out):
    return ["--data", data, "--out", out, "--batch-size", "4", "--preview-every", "0"]


def sampling(ckpt, out, *flags):
    return ["--sample", "2", "--ckpt", ckpt, "--out", out, "--num-steps", "1", "--batch-size", "2", *flags]


def snapshot(*folders):
    """{file: its bytes and time of writing}, and the folders."""
    paths = [path for folder in folders for path in [folder, *folder.rglob("*")]]
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) if path.is_file() else None for path in paths}


@pytest.fixture
def error_of(data, trained, tmp_path):
    """error_of(flags or function, *arguments): the one line it stops with; it must have left every file as it was."""
    def check(action, *args):
        before = snapshot(data.parent, tmp_path)
        with pytest.raises(SystemExit) as caught:
            run(action) if isinstance(action, list) else action(*args)
        message = str(caught.value)
        assert message.startswith("error: ") and "\n" not in message and len(message) > 20
        assert snapshot(data.parent, tmp_path) == before, f"wrote something before it failed with: {message}"
        return message
    return check


# ----------------------------------------------------------------------------------------------------------------------
# Flags


@pytest.mark.parametrize("flags, remedy", [
    ("--model SiT-Z/2", "SiT-XL/2"),
    ("--model repa", "toy"),
    ("--no-such-flag 3", "--help"),
    ("--batch-size many", "--batch-size"),
    ("--learning-rate fast", "--learning-rate"),
    ("--labels cat", "--labels"),
    ("--seed", "--seed"),
    ("--mode xyz", "sde"),
    ("--path-type straight", "linear"),
    ("--weighting normal", "lognormal"),
    ("--precision fp16", "bf16"),
    ("--vae best", "ft-mse"),
    ("--guidance-low 0.5 --guidance-high 0.2", "--guidance-high"),
    ("--sample 4", "--ckpt"),
    ("--micro-batch 3", "--micro-batch"),
    ("--micro-batch 8", "--micro-batch"),
    ("--enc-type resnet", "dinov2-vit-b"),
    ("--enc-type prepared,resnet", "dinov2-vit-b"),
    ("--encoder-depth 5", "--encoder-depth"),
    ("--encoder-depth 0", "--encoder-depth"),
    ("--resolution 32", "--resolution 16"),
])
def test_flag(flags, remedy, data, tmp_path, error_of):
    assert remedy in error_of([*training(data, tmp_path / "out"), *flags.split()])


@pytest.mark.parametrize("flag, value", [
    ("resolution", 0), ("batch-size", 0), ("batch-size", -4), ("micro-batch", -1), ("max-train-steps", 0),
    ("max-train-steps", -1), ("learning-rate", -1), ("learning-rate", "nan"), ("max-grad-norm", 0),
    ("max-grad-norm", -1), ("ema-decay", 1.5), ("ema-decay", -0.1), ("cfg-prob", 2), ("cfg-prob", -0.1),
    ("proj-coeff", -1), ("seed", -1), ("workers", -1), ("log-every", 0), ("save-every", 0), ("keep-every", -1),
    ("preview-every", -1), ("sample", -1), ("bench", -1), ("num-steps", 0), ("projector-dim", 0),
    ("cfg-scale", -1), ("cfg-scale", 0.5),  # the sampler guides above 1 only: 0.5 would be ignored in silence
])
def test_number_without_sense(flag, value, data, tmp_path, error_of):
    assert f"--{flag}" in error_of([*training(data, tmp_path / "out"), "--max-train-steps", 1, f"--{flag}={value}"])


@pytest.mark.parametrize("ranks", [3, 8])
def test_batch_not_divisible_by_ranks(ranks, data, tmp_path, error_of, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    message = error_of(training(data, tmp_path / "out"))
    assert f"{ranks} ranks" in message and "--batch-size" in message


def test_only_the_first_rank_of_a_machine_speaks(data, tmp_path, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(SystemExit) as caught:
        repa.main(["--data", str(tmp_path / "nothing")])
    assert caught.value.code == 1


def test_command_line(tmp_path):
    """As a user sees it: one line on stderr, exit code 1, no traceback."""
    done = subprocess.run([sys.executable, ROOT / "repa.py", "--data", "nowhere"], cwd=tmp_path, text=True,
                          capture_output=True)
    assert done.returncode == 1 and done.stdout == "" and not list(tmp_path.iterdir())
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and "python prepare.py" in done.stderr


# ----------------------------------------------------------------------------------------------------------------------
# Data


def test_no_data(tmp_path, error_of):
    assert "python prepare.py" in error_of(["--data", tmp_path / "nothing", "--out", tmp_path / "out"])
    (tmp_path / "empty").mkdir()
    assert "python prepare.py" in error_of(["--data", tmp_path / "empty", "--out", tmp_path / "out"])
    (tmp_path / "file").write_text("")
    assert "python prepare.py" in error_of(["--data", tmp_path / "file", "--out", tmp_path / "out"])


def test_paper_data_missing_is_no_silent_toy(tmp_path, error_of, monkeypatch):
    monkeypatch.chdir(tmp_path)
    message = error_of(["--model", "SiT-S/2"])
    assert "data/imagenet256" in message and "python prepare.py" in message
    assert "--resolution 64" in error_of(["--model", "SiT-S/2", "--resolution", "64"])  # the remedy must really help


@pytest.mark.parametrize("name", ["images", "labels"])
@pytest.mark.parametrize("damage", ["truncated", "header only", "empty", "text", "pickle", "missing"])
def test_damaged_array(name, damage, own_data, tmp_path, error_of):
    path = own_data / f"{name}.npy"
    content = path.read_bytes()
    if damage == "pickle":
        np.save(path, np.array([Payload(tmp_path / "touched")] * 24), allow_pickle=True)
    elif damage == "missing":
        path.unlink()
    else:
        path.write_bytes({"truncated": content[:-5], "header only": content[:60], "empty": b"", "text": b"hi"}[damage])
    message = error_of(training(own_data, tmp_path / "out"))
    assert f"{name}.npy" in message and "prepare the data again" in message
    assert not (tmp_path / "touched").exists()


@pytest.mark.parametrize("name, array", [
    ("labels", np.zeros(23, np.int64)),
    ("labels", np.arange(24)),  # classes 8 to 23 do not exist
    ("labels", np.full(24, -1)),
    ("images", np.zeros((23, 16, 16, 3), np.uint8)),
    ("images", np.zeros((24, 8, 8, 3), np.uint8)),
], ids=["too few labels", "labels too high", "labels negative", "too few images", "other resolution"])
def test_arrays_that_do_not_fit_meta(name, array, own_data, tmp_path, error_of):
    np.save(own_data / f"{name}.npy", array)
    message = error_of(training(own_data, tmp_path / "out"))
    assert f"{name}.npy" in message and "prepare the data again" in message


@pytest.mark.parametrize("content", ["{", "", "[1]", "{}"])
def test_damaged_meta(content, own_data, tmp_path, error_of):
    (own_data / "meta.json").write_text(content)
    message = error_of(training(own_data, tmp_path / "out"))
    assert "meta.json" in message and "prepare the data again" in message


def test_meta_of_another_version(own_data, tmp_path, error_of):
    edit_json(own_data / "meta.json", format=2)
    message = error_of(training(own_data, tmp_path / "out"))
    assert "format 2" in message and "prepare the data again" in message


def test_resolution_without_a_whole_number_of_patches(tmp_path, error_of):
    data = write_data(tmp_path / "data18", resolution=18)
    message = error_of([*training(data, tmp_path / "out"), "--resolution", 18, "--proj-coeff", 0])
    assert "--model" in message or "--resolution" in message


# ----------------------------------------------------------------------------------------------------------------------
# Teachers


def test_prepared_teacher(own_data, tmp_path, error_of):
    flags, path = training(own_data, tmp_path / "out"), own_data / "teacher.pt"
    path.unlink()
    assert f"python prepare.py teacher --data {own_data}" in error_of(flags)
    write_teacher(path, img_size=32)
    message = error_of(flags)
    assert "32" in message and "16 px" in message and "python prepare.py teacher" in message
    write_teacher(path, patch_size=2)
    message = error_of(flags)
    assert "8x8" in message and "4x4" in message and "--patch-size 4" in message
    path.write_text("no checkpoint")
    assert "teacher.pt" in error_of(flags)
    torch.save(dict(model={}), path)
    assert "python prepare.py teacher" in error_of(flags)


def test_teacher_file(tmp_path, error_of):
    for name, content in (("missing.pt", None), ("empty.pt", b""), ("text.pt", b"hello")):
        if content is not None:
            (tmp_path / name).write_bytes(content)
        assert name in error_of(teachers.load_teacher, "dinov2-vit-s", 256, str(tmp_path / name))
    torch.save(dict(weight=torch.zeros(2)), tmp_path / "other.pt")
    assert "other.pt" in error_of(teachers.load_teacher, "dinov2-vit-s", 256, str(tmp_path / "other.pt"))


def test_no_vae_for_the_previews(no_hub, tmp_path, error_of):
    """A run on latents says at its start that it cannot draw pictures, not at the first one, hours later."""
    data = write_data(tmp_path / "latents", resolution=32)
    np.save(data / "moments.npy", np.zeros((24, 8, 4, 4), np.float16))
    edit_json(data / "meta.json", vae="sd", channels=4, latent_scale=0.18215)
    flags = [*training(data, tmp_path / "out"), "--resolution", 32, "--proj-coeff", 0, "--max-train-steps", 2]
    assert "--vae-ckpt FILE" in error_of([*flags, "--preview-every", 2])
    run(flags)  # nothing else is wrong: without previews nobody needs it


def test_downloads_impossible(no_hub, data, tmp_path, error_of):
    flags = [*training(data, tmp_path / "out"), "--enc-type", "dinov2-vit-b"]
    assert "--teacher-ckpt FILE" in error_of(flags)
    assert "--vae-ckpt FILE" in error_of(vae.load_vae)


# ----------------------------------------------------------------------------------------------------------------------
# The folder of the run


def test_out_holds_another_run(data, own_run, error_of):
    flags = [*training(data, own_run), "--max-train-steps", 4]
    message = error_of([*flags, "--learning-rate", 0.5, "--seed", 3])
    assert "learning_rate" in message and "seed" in message and "--out" in message
    assert "batch_size 4, now 8" in error_of([*flags, "--batch-size", 8])
    assert "model 'toy', now" in error_of([*flags, "--model", "SiT-S/4", "--resolution", 16, "--proj-coeff", 0])


def test_out_holds_a_run_of_another_script(data, own_run, error_of):
    checkpoint = torch.load(own_run / "last.pt", weights_only=True)
    checkpoint["config"]["attn_coeff"] = 0.5  # a field that REPA's Config does not have
    torch.save(checkpoint, own_run / "last.pt")
    message = error_of([*training(data, own_run), "--max-train-steps", 4])
    assert "attn_coeff" in message and "--out" in message


def test_out_was_trained_with_another_class_count(own_run, tmp_path, error_of):
    message = error_of([*training(write_data(tmp_path / "five", num_classes=5), own_run), "--max-train-steps", 4])
    assert "--out" in message and "class" in message


def test_out_cannot_be_written(data, trained, tmp_path, error_of):
    (tmp_path / "file").write_text("precious")
    for out in (tmp_path / "file", tmp_path / "file" / "below", "/proc/no/such"):
        assert "--out" in error_of(training(data, out))
        assert "--out" in error_of(sampling(trained / "last.pt", out))


def test_init_copes_with_another_class_count(trained, tmp_path, capsys):
    data = write_data(tmp_path / "five", num_classes=5)
    run([*training(data, tmp_path / "out"), "--max-train-steps", 1, "--init", trained / "last.pt"])
    assert "left fresh: y_embedder" in capsys.readouterr().out


# ----------------------------------------------------------------------------------------------------------------------
# Checkpoints, wherever one is read


def make_bad(kind, path, trained):
    if kind == "text":
        path.write_text("no checkpoint")
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "truncated":
        path.write_bytes((trained / "last.pt").read_bytes()[:-1000])
    elif kind == "folder":
        path.mkdir()
    elif kind == "tensor":
        torch.save(torch.zeros(3), path)
    elif kind == "other weights":
        torch.save(dict(weight=torch.zeros(3)), path)
    elif kind == "payload":
        torch.save(dict(ema=torch.zeros(3), args=Payload(path.with_name("touched"))), path)
    elif kind == "plain pickle":
        path.write_bytes(pickle.dumps(Payload(path.with_name("touched"))))


BAD = ["missing", "text", "empty", "truncated", "folder", "tensor", "other weights", "payload", "plain pickle"]


@pytest.mark.parametrize("kind", BAD)
def test_no_checkpoint(kind, data, trained, tmp_path, error_of):
    """Read by --sample, --init, --teacher-ckpt (both kinds) and --vae-ckpt."""
    path = tmp_path / "bad.pt"
    make_bad(kind, path, trained)
    flags = training(data, tmp_path / "out")
    for message in (error_of(sampling(path, tmp_path / "out")), error_of([*flags, "--init", path]),
                    error_of([*flags, "--teacher-ckpt", path]),
                    error_of([*flags, "--enc-type", "dinov2-vit-s", "--teacher-ckpt", path]),
                    error_of(vae.load_vae, "ft-ema", path)):
        assert "bad.pt" in message
    assert not (tmp_path / "touched").exists(), "the file ran a command"


@pytest.mark.parametrize("kind", BAD[1:])
def test_out_holds_no_checkpoint(kind, data, trained, own_run, error_of):
    """A run is continued from its own last.pt: a bad one must neither be believed nor silently begun anew."""
    (own_run / "last.pt").unlink()
    make_bad(kind, own_run / "last.pt", trained)
    assert "last.pt" in error_of([*training(data, own_run), "--max-train-steps", 4])
    assert not (own_run / "touched").exists(), "the file ran a command"


def test_foreign_checkpoint_has_a_remedy_that_works(trained, tmp_path, error_of, monkeypatch):
    """REPA's own checkpoints hold an argparse.Namespace: the command in the message turns them into weights."""
    monkeypatch.chdir(tmp_path)
    ema = torch.load(trained / "last.pt", weights_only=True)["ema"]
    torch.save(dict(ema=ema, args=argparse.Namespace(model="toy")), "foreign.pt")
    message = error_of(sampling("foreign.pt", tmp_path / "out"))
    exec(message.split('python -c "')[1].removesuffix('"'), {})
    weights, _ = checkpoints.load_weights("ema.pt")
    assert all(torch.equal(weights[name], ema[name]) for name in ema)


def test_checkpoint_of_another_model(trained, tmp_path, error_of):
    assert "--model toy" in error_of(sampling(trained / "last.pt", tmp_path / "out", "--model", "SiT-S/2"))
    bare = tmp_path / "ema.pt"  # without a config, only shapes tell
    torch.save(checkpoints.load_weights(trained / "last.pt")[0], bare)
    assert "width 96" in error_of(sampling(bare, tmp_path / "out", "--model", "SiT-S/2"))
    flags = ["--init", trained / "last.pt", "--model", "SiT-S/4", "--resolution", "16", "--proj-coeff", "0"]
    assert "does not fit" in error_of([*training(trained.parent / "data", tmp_path / "out"), *flags])


@pytest.mark.parametrize("change", ["extra", "lacking"])
def test_checkpoint_of_another_method(change, trained, tmp_path, error_of):
    checkpoint = torch.load(trained / "last.pt", weights_only=True)
    if change == "extra":
        checkpoint["ema"]["cls_embedder.weight"] = torch.zeros(3)
    else:
        del checkpoint["ema"]["blocks.1.attn.qkv.bias"]
    torch.save(checkpoint, tmp_path / "reg.pt")
    name = "cls_embedder.weight" if change == "extra" else "blocks.1.attn.qkv.bias"
    assert name in error_of(sampling(tmp_path / "reg.pt", tmp_path / "out"))


def test_labels_beyond_the_classes(trained, tmp_path, error_of):
    for label in (8, -1, 1000):
        message = error_of(sampling(trained / "last.pt", tmp_path / "out", "--labels", "0", label))
        assert "--labels" in message and "0..7" in message


def test_good_input_passes(trained, tmp_path):
    """The same helpers without a mistake: sampling writes, continuing a finished run changes nothing."""
    run(sampling(trained / "last.pt", tmp_path / "a {strange} name", "--labels", 3))
    [path] = (tmp_path / "a {strange} name").iterdir()
    assert np.load(path)["arr_0"].shape == (2, 16, 16, 3)
    before = snapshot(trained)
    run([*training(trained.parent / "data", trained), "--max-train-steps", 2])
    assert snapshot(trained) == before

"""prepare.py: image folders, the toy set, teacher and judge."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import prepare
from evaluate import Judge
from support import pictures
from support.dataset import PreparedData, read_meta, write_labels_and_meta
from support.toy import COLOURS, SHAPES, caption_targets, caption_words, make_toy_set, prepare_toy

ROOT = Path(__file__).resolve().parent.parent


def write_images(root, counts, seed=0, nested=True):
    """Makes root/CLASS/[deep/]i.png with random sizes and pixels; returns {relative path: array}."""
    rng = np.random.RandomState(seed)
    written = {}
    for name, count in counts.items():
        for i in range(count):
            path = Path(name) / ("deep" if nested and i % 3 == 0 else "") / f"{i:03d}.png"
            array = rng.randint(0, 256, (rng.randint(5, 30), rng.randint(5, 30), 3)).astype(np.uint8)
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(array).save(root / path)
            written[str(path)] = array
    return written


def run(images, out, *flags):
    """prepare.py in process, 8 px, no worker processes unless asked."""
    prepare.main(["--images", str(images), "--out", str(out), "--resolution", "8", "--vae", "none",
                  *(flags or ("--workers", "0"))])


def load_folder(folder):
    """images, labels and meta of a prepared set, as a training script reads them."""
    data = PreparedData(folder, read_meta(folder)["resolution"])
    return data.array("images"), data.array("labels"), data.meta


def read_bytes(folder):
    """{relative path: bytes} of all files of a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def error_of(function, *args):
    """The one-line message of the SystemExit that function(*args) raises."""
    with pytest.raises(SystemExit) as caught:
        function(*args)
    message = str(caught.value)
    assert message.startswith("error: ") and "\n" not in message and caught.value.code != 0
    return message


# ----------------------------------------------------------------------------------------------------------------------
# Image folders


def test_center_crop_equals_adm():
    golden = torch.load(ROOT / "tests/golden/preprocess.pt", weights_only=True)
    size = golden["config"]["crop_size"]
    for i in range(golden["config"]["num_crops"]):
        image = Image.fromarray(golden["inputs"][f"crop_image.{i}"].numpy())
        assert np.array_equal(pictures.center_crop(image, size), golden["outputs"][f"crop.{i}"].numpy())


def test_center_crop_rounds_offsets_down():
    pixels = np.random.RandomState(0).randint(0, 256, (15, 15, 3)).astype(np.uint8)
    assert np.array_equal(pictures.center_crop(Image.fromarray(pixels[:12]), 12), pixels[:12, 1:13])  # 3 // 2 = 1
    assert np.array_equal(pictures.center_crop(Image.fromarray(pixels[:, :12]), 12), pixels[1:13, :12])


@pytest.mark.parametrize("workers", [0, 2])
def test_folder_layout(tmp_path, capsys, workers):
    written = write_images(tmp_path / "in", {"zebra": 70, "Ant": 5, "cat": 40})
    (tmp_path / "in/cat/notes.txt").write_text("not an image")
    (tmp_path / "in/list.csv").write_text("not an image")
    run(tmp_path / "in", tmp_path / "data/x", "--workers", str(workers))

    images, labels, meta = load_folder(tmp_path / "data/x")
    files = sorted(written, key=lambda path: (path.split("/")[0], path))
    assert images.flags.c_contiguous and images.dtype == np.uint8 and labels.dtype == np.int64
    for row, path in enumerate(files):
        assert np.array_equal(images[row], pictures.center_crop(Image.fromarray(written[path]), 8)), path
        assert ["Ant", "cat", "zebra"][labels[row]] == path.split("/")[0]
    assert meta == {"format": 1, "source": str(tmp_path / "in"), "count": 115, "resolution": 8, "num_classes": 3,
                    "class_names": ["Ant", "cat", "zebra"], "vae": None, "channels": 3,
                    "latent_scale": 1.0, "latent_shift": 0.0}
    assert set(os.listdir(tmp_path / "data/x")) == {"images.npy", "labels.npy", "meta.json"}
    assert os.listdir(tmp_path / "data") == ["x"]  # no .partial left
    printed = capsys.readouterr().out
    assert "115 images in 3 classes;" in printed and "GB of disk" in printed


def test_folder_without_classes(tmp_path):
    write_images(tmp_path, {"photos": 6}, nested=False)
    run(tmp_path / "photos", tmp_path / "data/x")
    _, labels, meta = load_folder(tmp_path / "data/x")
    assert labels.tolist() == [0] * 6 and meta["class_names"] == ["photos"]


def test_kinds_of_images(tmp_path):
    folder = tmp_path / "in/a"
    folder.mkdir(parents=True)
    Image.new("CMYK", (20, 20), (0, 255, 255, 0)).save(folder / "0.jpg", quality=100)  # red
    Image.new("L", (20, 9), 77).save(folder / "1.png")
    Image.new("RGB", (1, 1), (1, 2, 3)).save(folder / "2.png")
    Image.new("P", (16, 16), 0).save(folder / "3.png")
    Image.fromarray(np.full((9, 9), 100 * 256 + 7, np.uint16)).save(folder / "4.PNG")  # 16 bits: 100 of 255
    Image.new("RGBA", (30, 10), (9, 8, 7, 255)).save(folder / "5.webp", lossless=True)
    run(tmp_path / "in", tmp_path / "x")
    images = load_folder(tmp_path / "x")[0].astype(int)
    colours = [(254, 0, 0), (77, 77, 77), (1, 2, 3), (0, 0, 0), (100, 100, 100), (9, 8, 7)]
    for image, colour in zip(images, colours, strict=True):
        assert np.abs(image - np.array(colour)).max() <= 2


def test_unreadable_images_are_named_and_left_out(tmp_path, capsys):
    written = write_images(tmp_path / "in", {"a": 70, "b": 10}, nested=False)
    whole = (tmp_path / "in/a/001.png").read_bytes()
    (tmp_path / "in/a/001.png").write_bytes(whole[: len(whole) // 2])  # truncated
    (tmp_path / "in/a/066.png").write_bytes(b"")
    (tmp_path / "in/b/003.png").write_text("hello")
    run(tmp_path / "in", tmp_path / "x")
    images, labels, meta = load_folder(tmp_path / "x")
    assert meta["count"] == len(images) == 77 and labels.tolist() == [0] * 68 + [1] * 9
    bad = {"a/001.png", "a/066.png", "b/003.png"}
    for row, path in enumerate(sorted(set(written) - bad)):
        assert np.array_equal(images[row], pictures.center_crop(Image.fromarray(written[path]), 8)), path
    lines = [line for line in capsys.readouterr().out.split("\n") if line.startswith("unreadable, left out")]
    assert len(lines) == 3 and all(any(name in line for line in lines) for name in bad)
    assert set(os.listdir(tmp_path / "x")) == {"images.npy", "labels.npy", "meta.json"}


def test_nothing_readable(tmp_path):
    (tmp_path / "in/a").mkdir(parents=True)
    (tmp_path / "in/a/x.png").write_text("hello")
    assert "none of the 1 files" in error_of(run, tmp_path / "in", tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_killed_prepare_resumes_to_identical_bytes(tmp_path, monkeypatch, capsys):
    write_images(tmp_path / "in", {"a": 90, "b": 60})
    (tmp_path / "in/a/004.png").write_text("broken")
    run(tmp_path / "in", tmp_path / "straight")
    killer = (
        "import os, signal, sys, prepare\n"
        "read, calls = prepare.read_image, []\n"
        "def read_image(path, resolution):\n"
        "    calls.append(path)\n"
        "    if len(calls) == 101: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return read(path, resolution)\n"
        "prepare.read_image = read_image\n"
        "prepare.main(sys.argv[1:])\n")
    command = [sys.executable, "-c", killer, "--images", str(tmp_path / "in"), "--out", str(tmp_path / "killed"),
               "--resolution", "8", "--vae", "none", "--workers", "0"]
    assert subprocess.run(command, cwd=ROOT, capture_output=True).returncode == -signal.SIGKILL
    assert not (tmp_path / "killed").exists() and (tmp_path / "killed.partial").is_dir()
    assert "not a prepared data set" in error_of(load_folder, tmp_path / "killed")

    calls, read = [], prepare.read_image
    monkeypatch.setattr(prepare, "read_image", lambda path, resolution: calls.append(path) or read(path, resolution))
    run(tmp_path / "in", tmp_path / "killed")
    assert len(calls) == 150 - 99  # 99 were decoded before; the broken one is tried again
    assert "99 of 150" in capsys.readouterr().out
    assert read_bytes(tmp_path / "killed") == read_bytes(tmp_path / "straight")


def test_partial_of_other_images_is_not_resumed(tmp_path, monkeypatch):
    write_images(tmp_path / "in", {"a": 20})
    with monkeypatch.context() as patch:
        patch.setattr(prepare, "write_labels_and_meta", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(tmp_path / "in", tmp_path / "x")
    (tmp_path / "in/a/001.png").rename(tmp_path / "in/a/last.png")  # as many images, in another order
    run(tmp_path / "in", tmp_path / "x")
    run(tmp_path / "in", tmp_path / "y")
    assert read_bytes(tmp_path / "x") == read_bytes(tmp_path / "y")


def test_errors_of_image_folders(tmp_path, monkeypatch):
    write_images(tmp_path / "in", {"a": 3, "b": 3})
    run(tmp_path / "in", tmp_path / "x")
    before = read_bytes(tmp_path / "x")
    message = error_of(run, tmp_path / "in", tmp_path / "x")
    assert "exists already" in message and "give another --out" in message
    assert read_bytes(tmp_path / "x") == before
    assert "No such file" in error_of(run, tmp_path / "nowhere", tmp_path / "y")
    (tmp_path / "empty").mkdir()
    assert "no valid file for the classes empty" in error_of(run, tmp_path / "empty", tmp_path / "y")
    assert "give another --out" in error_of(run, tmp_path / "in", tmp_path / "empty")
    (tmp_path / "in/void").mkdir()
    assert "void" in error_of(run, tmp_path / "in", tmp_path / "y")
    (tmp_path / "in/void").rmdir()
    assert "prepare that first" in error_of(run, tmp_path / "in", tmp_path / "y/val")
    write_images(tmp_path / "other", {"a": 3, "c": 3})
    assert "the same classes" in error_of(run, tmp_path / "other", tmp_path / "x/val")
    monkeypatch.setattr(prepare.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    assert "GB free" in error_of(run, tmp_path / "in", tmp_path / "y")
    assert not (tmp_path / "y").exists() and not (tmp_path / "y.partial").exists()


def test_errors_of_flags(tmp_path):
    some = ["--images", str(tmp_path), "--out", str(tmp_path / "x")]
    assert "--images DIR --out" in error_of(prepare.main, ["--vae", "none"])
    assert "--resolution" in error_of(prepare.main, [*some, "--vae", "none", "--resolution", "0"])
    assert "--workers" in error_of(prepare.main, [*some, "--vae", "none", "--workers", "-1"])
    assert "--steps" in error_of(prepare.main, ["teacher", "--data", str(tmp_path), "--steps", "0"])
    for wrong in ([*some, "--size", "8"], ["toy", "--size", "8"], ["teacher"], ["teacher", "--steps", "x"], ["more"]):
        assert "--help lists the flags" in error_of(prepare.main, wrong)


def test_help_is_quick():
    code = "import sys, prepare, evaluate; print(any(name in sys.modules for name in ('timm', 'torchvision', 'scipy')))"
    assert subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True).strip() == "False"


# ----------------------------------------------------------------------------------------------------------------------
# The toy set


def test_toy_images_show_their_captions():
    images, labels, captions = make_toy_set(400, seed=5)
    again, other = make_toy_set(400, seed=5), make_toy_set(400, seed=6)
    assert np.array_equal(images, again[0]) and captions == again[2] and not np.array_equal(images, other[0])
    assert images.shape == (400, 16, 16, 3) and images.dtype == np.uint8 and set(labels) == set(range(8))
    for image, label, caption in zip(images, labels, captions):
        _, colour, shape, _, _, _, ground, _ = caption.split()
        assert shape == list(SHAPES)[label] and colour != ground
        corner = 0.35 * np.array(COLOURS[ground])  # no shape reaches all four corners
        assert any(np.abs(image[r, c] - corner).max() <= 1 for r in (0, 15) for c in (0, 15)), caption
        assert (np.abs(image.astype(int) - COLOURS[colour]).max(-1) == 0).sum() >= 8, caption
    by_shape = {name: images[labels == i] for i, name in enumerate(SHAPES)}
    wide = {name: shape_extent(group) for name, group in by_shape.items()}
    assert wide["bar"] > 1.5 and wide["pillar"] < 1 / 1.5 and 0.9 < wide["disc"] < 1.1


def shape_extent(images):
    """Mean ratio of the shape's width to its height."""
    different = (np.abs(images.astype(int) - images[:, :1, :1]).max(-1) > 60)  # (n,16,16), against the corner pixel
    return (different.any(1).sum(1) / different.any(2).sum(1)).mean()


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """A small toy set with teacher and judge."""
    folder = tmp_path_factory.mktemp("data") / "toy"
    prepare_toy(folder, count=3000, val_count=500, steps=120, judge_steps=60)
    return folder


def test_toy_folder(toy):
    for folder, count in ((toy, 3000), (toy / "val", 500)):
        images, labels, meta = load_folder(folder)
        captions = json.loads((folder / "captions.json").read_text())
        assert len(images) == len(labels) == len(captions) == count
        assert meta["class_names"] == list(SHAPES) and meta["num_classes"] == 8 and meta["resolution"] == 16
        assert all(meta["class_names"][label] in caption for label, caption in zip(labels, captions))
    assert (load_folder(toy)[1][:500] == load_folder(toy / "val")[1]).mean() < 0.3  # other draws, not the same again
    assert not toy.with_name("toy.partial").exists()
    assert "exists already" in error_of(prepare.main, ["toy", "--out", str(toy)])


def test_teacher_and_judge_files(toy):
    from timm.models.vision_transformer import VisionTransformer

    saved = torch.load(toy / "teacher.pt", weights_only=True)
    teacher = VisionTransformer(**saved["config"])
    teacher.load_state_dict(saved["model"], strict=True)
    images, labels, _ = load_folder(toy / "val")
    x = torch.tensor(images[:]).permute(0, 3, 1, 2) / 127.5 - 1  # what a training script gives them
    assert teacher.forward_features(x[:2]).shape == (2, 17, 64)  # class token and the student's 4x4 tokens
    assert len(teacher.blocks) >= 4 and teacher.blocks[0].attn.num_heads == 4
    assert saved["resolution"] == 16 and saved["accuracy"] > 0.8

    saved = torch.load(toy / "judge.pt", weights_only=True)
    judge = Judge(**saved["config"])
    judge.load_state_dict(saved["model"], strict=True)
    accuracy = (judge.eval()(x)[:, :8].argmax(1).numpy() == labels).mean()
    assert accuracy == pytest.approx(saved["accuracy"], abs=1e-6) and accuracy > 0.95
    assert len(saved["words"]) == 8 + 6 + 6  # shape, colour, background; "a", "on", ... tell nothing


def test_toy_and_training_are_deterministic(tmp_path):
    for name in ("one", "two"):
        torch.rand(3)  # the state of the global generator must not matter
        prepare_toy(tmp_path / name, count=300, val_count=50, steps=3, judge_steps=3)
    one, two = read_bytes(tmp_path / "one"), read_bytes(tmp_path / "two")
    assert one.keys() == two.keys()
    for name in one:
        if name.endswith(".pt"):
            first, second = (torch.load(tmp_path / n / name, weights_only=True) for n in ("one", "two"))
            assert all(torch.equal(first["model"][key], second["model"][key]) for key in first["model"]), name
        else:
            assert one[name] == two[name], name
    prepare_toy(tmp_path / "more", count=300, val_count=50, steps=5, judge_steps=3)
    judges = [torch.load(tmp_path / n / "judge.pt", weights_only=True)["model"] for n in ("one", "more")]
    assert all(torch.equal(judges[0][key], judges[1][key]) for key in judges[0])  # the judge ignores the teacher


def test_caption_words_know_their_place():
    captions = ["a red disc on blue", "a blue disc on red"] * 50
    words = caption_words(captions)
    assert words == [(1, "blue"), (1, "red"), (4, "blue"), (4, "red")]
    assert caption_targets(captions[:2], words).tolist() == [[0, 1, 1, 0], [1, 0, 0, 1]]


def test_teacher_holds_out_without_val(tmp_path, capsys):
    """Labels known from the brightness; every 20th image is wrongly labelled, so only those can count as errors."""
    folder = tmp_path / "x"
    folder.mkdir()
    labels = np.arange(200) // 100
    images = np.random.RandomState(0).randint(0, 60, (200, 8, 8, 3)) + 150 * labels[:, None, None, None]
    np.save(folder / "images.npy", images.astype(np.uint8))
    labels[::20] = 1 - labels[::20]
    write_labels_and_meta(folder, labels, "test", 8, ["dark", "bright"])
    prepare.main(["teacher", "--data", str(folder), "--steps", "30", "--judge-steps", "30"])
    printed = capsys.readouterr().out
    assert "teacher: 0.00 % of 10 held-out" in printed and "judge: 0.00 % of 10 held-out" in printed
    assert torch.load(folder / "teacher.pt", weights_only=True)["accuracy"] == 0


def test_errors_of_teacher(toy, tmp_path):
    def train(folder, *flags):
        prepare.main(["teacher", "--data", str(folder), "--steps", "1", "--judge-steps", "1", *flags])

    assert "not a prepared data set" in error_of(train, tmp_path / "nowhere")
    assert "--patch-size 5" in error_of(train, toy, "--patch-size", "5")
    write_images(tmp_path / "in", {"a": 3})
    run(tmp_path / "in", tmp_path / "x")
    assert "one class" in error_of(train, tmp_path / "x")
    write_images(tmp_path / "in2", {"a": 3, "b": 3})
    run(tmp_path / "in2", tmp_path / "y")
    (tmp_path / "y/labels.npy").write_bytes((tmp_path / "y/labels.npy").read_bytes()[:-8])
    assert "labels.npy is missing or" in error_of(train, tmp_path / "y")

"""prepare.py with an autoencoder: moments from images, from REPA's folders, after a kill, on two ranks."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import prepare
from support import pictures
from support.dataset import PreparedData, clean_input, read_meta
from support.vae import LATENT_SCALE, AutoencoderKL, load_decoder, load_vae, pixels_to_uint8
from test_prepare import error_of, read_bytes, write_images

ROOT = Path(__file__).resolve().parent.parent
NAMES = {"images.npy", "moments.npy", "labels.npy", "meta.json"}
# In a process of its own, or two: the tiny VAE in the place of the SD-VAE, several command lines one after the other,
# and perhaps a kill in the batch of number argv[1]. The second rank decodes slowly: will the first one wait for it?
SCRIPT = f"""
import json, os, signal, sys, time
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
import prepare, test_prepare_latents
vae, calls, read = test_prepare_latents.tiny_vae(), [], prepare.read_image
encode = vae.encode
def encode_or_die(x):
    calls.append(len(x))
    if len(calls) == int(sys.argv[1]):
        os.kill(os.getpid(), signal.SIGKILL)
    return encode(x)
def read_slowly(path, resolution):
    time.sleep(0.05 * prepare.RANK)
    return read(path, resolution)
vae.encode, prepare.read_image = encode_or_die, read_slowly
prepare.load_vae = lambda name, path: vae
for flags in json.loads(sys.argv[2]):
    prepare.main(flags)
    prepare.dist.init_process_group = lambda *args, **options: None  # torchrun's meeting point serves only once
"""


def tiny_vae(seed=0):
    """As the SD-VAE, 8 pixels per latent, with few channels; means and stds differ by pixel, class and channel."""
    torch.manual_seed(seed)
    vae = AutoencoderKL(widths=(8, 8, 8, 8), groups=4, layers=1).eval().requires_grad_(False)
    torch.nn.init.normal_(vae.quant_conv.weight)
    return vae


@pytest.fixture(scope="module")
def vae():
    return tiny_vae()


@pytest.fixture(autouse=True)
def loaded(monkeypatch, vae):
    """(name, path) of every load_vae, which gives the tiny one."""
    calls = []
    monkeypatch.setattr(prepare, "load_vae", lambda *args: calls.append(args) or vae)
    return calls


SMALL = ["--resolution", "32", "--workers", "0"]


def run(*flags):
    prepare.main([*map(str, flags), *SMALL])


def run_alone(folder, *jobs, ranks=1, kill_at=0):
    """prepare.py in processes of its own, with the flags of each job; returns what subprocess.run does."""
    script, jobs = folder / "prepare_tiny.py", [[*map(str, flags), *SMALL] for flags in jobs]
    script.write_text(SCRIPT)
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
    return subprocess.run([sys.executable, *torchrun, script, str(kill_at), json.dumps(jobs)],
                          capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=300)


def set_free_disk(patch, free):
    """free(path) bytes, says the system."""
    patch.setattr(prepare.shutil, "disk_usage", lambda path: type("Usage", (), {"free": free(path)}))


def expected(vae, images):
    """mean and std (N,8,h,w) float32 by the formula, an image at a time."""
    x = torch.tensor(np.asarray(images), dtype=torch.float32).movedim(-1, 1) / 127.5 - 1
    return torch.cat([torch.cat(vae.encode(each[None]), dim=1) for each in x]).numpy()


def assert_half_of(moments, exact):
    """Equal but for the rounding to float16, and of batches of another size."""
    assert moments.dtype == np.float16 and moments.shape == exact.shape
    rounding = 2.0**-11 * np.abs(exact) + 1e-5 * np.abs(exact).max()  # float16 has 11 bits
    assert (np.abs(moments - exact) <= rounding).all()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """21 images, two of them unreadable: three batches, the last one short."""
    root = tmp_path_factory.mktemp("in")
    write_images(root, {"a": 12, "b": 9}, nested=False)
    (root / "a/003.png").write_text("hello")
    (root / "b/008.png").write_bytes(b"")
    return root


@pytest.fixture(scope="module")
def straight(folder, tmp_path_factory, vae):
    """The data set of `folder`, made without interruption."""
    out = tmp_path_factory.mktemp("data") / "straight"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare, "load_vae", lambda *args: vae)
        run("--images", folder, "--out", out)
    return out


# ----------------------------------------------------------------------------------------------------------------------
# Images to moments


def test_moments_are_mean_and_std_of_the_cropped_pixels(folder, straight, vae):
    data = PreparedData(straight, 32)
    names = [f"a/{i:03d}.png" for i in range(12) if i != 3] + [f"b/{i:03d}.png" for i in range(8)]
    crops = [pictures.center_crop(Image.open(folder / name).convert("RGB"), 32) for name in names]
    assert np.array_equal(data.array("images"), crops)
    assert data.array("labels").tolist() == [0] * 11 + [1] * 8
    exact = expected(vae, crops)
    assert exact[:, 4:].min() > 0 and exact[:, :4].min() < -0.01 and np.ptp(exact, axis=0).min() > 1e-4  # they differ
    assert_half_of(data.array("moments"), exact)
    assert set(os.listdir(straight)) == NAMES
    assert data.meta == {"format": 1, "source": str(folder), "count": 19, "resolution": 32, "num_classes": 2,
                         "class_names": ["a", "b"], "vae": "sd-vae-ft-mse", "channels": 4, "latent_scale": 0.18215,
                         "latent_shift": 0.0}


def test_training_reads_them(straight, vae):
    data = PreparedData(straight, 32)
    assert data.is_latent and data.shape == (4, 4, 4)
    batch = data[np.array([4, 17, 4])]
    noise = torch.randn(3, 4, 4, 4)
    exact = torch.from_numpy(expected(vae, batch["images"]))
    x = (exact[:, :4] + exact[:, 4:] * noise) * LATENT_SCALE
    assert torch.allclose(clean_input(batch, data.meta, noise), x, rtol=2e-3, atol=2e-4)


def test_vae_flags(folder, tmp_path, loaded, monkeypatch, capsys):
    run("--images", folder, "--out", tmp_path / "x")
    run("--images", folder, "--out", tmp_path / "y", "--vae", "ft-ema", "--vae-ckpt", "some.file")
    assert loaded == [("ft-mse", ""), ("ft-ema", "some.file")]
    assert read_meta(tmp_path / "y")["vae"] == "sd-vae-ft-ema"
    printed = capsys.readouterr().out
    assert f"21 images in 2 classes; {tmp_path / 'x'} needs 0.000 GB of disk" in printed
    assert "19 images, 2 classes; 2 unreadable ones, named above, are left out" in printed
    monkeypatch.setattr(prepare, "load_vae", lambda *args: 1 / 0)
    run("--images", folder, "--out", tmp_path / "z", "--vae", "none")
    assert set(os.listdir(tmp_path / "z")) == NAMES - {"moments.npy"}


def test_disk_need_counts_both_arrays(tmp_path, monkeypatch):
    write_images(tmp_path / "in", {"a": 5})
    flags, need = ("--images", tmp_path / "in", "--out", tmp_path / "x"), 5 * (32 * 32 * 3 + 8 * 4 * 4 * 2)
    set_free_disk(monkeypatch, lambda path: need - 1)
    assert "GB free" in error_of(run, *flags)
    assert not (tmp_path / "x.partial").exists()
    set_free_disk(monkeypatch, lambda path: need)
    run(*flags)


def test_teacher_of_a_latent_set(straight, tmp_path):
    """It learns from the images; its tokens are those of SiT/2 on the latents: 16 pixels each."""
    copy = tmp_path / "x"
    copy.mkdir()
    for name in NAMES:
        (copy / name).write_bytes((straight / name).read_bytes())
    prepare.main(["teacher", "--data", str(copy), "--patch-size", "16", "--steps", "2", "--judge-steps", "2"])
    assert torch.load(copy / "teacher.pt", weights_only=True)["config"]["patch_size"] == 16


def test_held_out_images(folder, straight, tmp_path):
    parent = tmp_path / "x"
    parent.mkdir()
    for class_names, ok in ((["a", "b"], True), (["0", "1"], True), (["0", "1", "2"], False), (["a", "c"], False)):
        meta = json.loads((straight / "meta.json").read_text()) | {"class_names": class_names}
        (parent / "meta.json").write_text(json.dumps(meta))
        flags = "--images", folder, "--out", parent / "val", "--vae", "none"
        if ok:  # the numbers are what --from-repa knows of the classes
            run(*flags)
            assert PreparedData(parent / "val", 32).meta["vae"] is None
            for file in (parent / "val").iterdir():
                file.unlink()
            (parent / "val").rmdir()
        else:
            assert "the same classes" in error_of(run, *flags)


# ----------------------------------------------------------------------------------------------------------------------
# Kills and ranks


@pytest.fixture(scope="module")
def killed(folder, tmp_path_factory):
    """x.partial of a process that was killed in its third batch."""
    root = tmp_path_factory.mktemp("killed")
    died = run_alone(root, ["--images", folder, "--out", root / "x"], kill_at=3)
    assert died.returncode == -signal.SIGKILL and not (root / "x").exists(), died.stderr
    return root / "x.partial"


def test_killed_while_encoding_resumes_to_identical_bytes(
        folder, straight, killed, tmp_path, capsys, monkeypatch, vae):
    shutil.copytree(killed, tmp_path / "x.partial")
    sizes, encode = [], vae.encode
    monkeypatch.setattr(vae, "encode", lambda x: sizes.append(len(x)) or encode(x))
    run("--images", folder, "--out", tmp_path / "x")
    assert sizes == [5]  # two batches of 8 were there
    assert "resuming: 19 of 21 images are there already, 16 encoded" in capsys.readouterr().out
    assert read_bytes(tmp_path / "x") == read_bytes(straight)
    assert not (tmp_path / "x.partial").exists()


def test_two_ranks_write_what_one_does(folder, straight, killed, tmp_path):
    """Images from the beginning, images of a killed process, and REPA's folders."""
    images, moments, labels = write_repa(tmp_path / "in")
    shutil.copytree(killed, tmp_path / "y.partial")
    done = run_alone(tmp_path, ["--images", folder, "--out", tmp_path / "x"],
                     ["--images", folder, "--out", tmp_path / "y"],
                     ["--from-repa", tmp_path / "in", "--out", tmp_path / "z"], ranks=2)
    assert done.returncode == 0, done.stderr
    assert read_bytes(tmp_path / "x") == read_bytes(tmp_path / "y") == read_bytes(straight)
    for line in ("21 images in 2 classes", "19 images, 2 classes"):
        assert done.stdout.count(line) == 2  # said by one rank, for x and for y
    assert done.stdout.count("unreadable, left out") == 4 and "images are there already, 16 enc" in done.stdout
    assert "Traceback" not in done.stderr and "Warning" not in done.stderr
    data = PreparedData(tmp_path / "z", 32)
    assert np.array_equal(data.array("images"), images) and data.array("labels").tolist() == labels
    assert np.array_equal(data.array("moments"), moments.astype(np.float16))


def break_off(patch, *flags):
    """Run until labels would be written."""
    patch.setattr(prepare, "write_labels_and_meta", lambda *args, **more: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(*flags)


def test_another_vae_starts_again(tmp_path, monkeypatch):
    write_images(tmp_path / "in", {"a": 9})
    flags = "--images", tmp_path / "in", "--out", tmp_path / "x"
    with monkeypatch.context() as patch:
        break_off(patch, *flags)
    other = tiny_vae(seed=1)
    monkeypatch.setattr(prepare, "load_vae", lambda *args: other)
    run(*flags)
    data = PreparedData(tmp_path / "x", 32)
    assert_half_of(data.array("moments"), expected(other, data.array("images")))


def test_image_that_became_readable_is_encoded(tmp_path, monkeypatch, vae):
    write_images(tmp_path / "in", {"a": 9})
    file = next((tmp_path / "in").rglob("004.png"))
    whole = file.read_bytes()
    file.write_text("not yet")
    flags = "--images", tmp_path / "in", "--out", tmp_path / "x"
    with monkeypatch.context() as patch:
        set_free_disk(patch, lambda path: 0 if path.name == "x.partial" else 1e9)  # none for a copy without the image
        assert "leaving out 1 unreadable" in error_of(run, *flags)
    file.write_bytes(whole)
    run(*flags)
    data = PreparedData(tmp_path / "x", 32)
    assert len(data) == 9
    assert_half_of(data.array("moments"), expected(vae, data.array("images")))


# ----------------------------------------------------------------------------------------------------------------------
# REPA's folders


def write_repa(root, count=11, resolution=32, labels=None):
    """REPA's layout of random images and moments, over two sub-folders; returns images, moments, labels."""
    rng = np.random.RandomState(0)
    images = rng.randint(0, 256, (count, resolution, resolution, 3)).astype(np.uint8)
    moments = rng.randn(count, 8, resolution // 8, resolution // 8).astype(np.float32)
    moments[:, 4:] = np.exp(moments[:, 4:] - 7)  # the std, about 0.001
    labels = rng.permutation(np.arange(count) % 3).tolist() if labels is None else labels
    lists = {"images": [], "vae-sd": []}
    for i in range(count):
        index = f"{i + 995:08d}"  # from 00000/ to 00001/
        for part, name, array in (("images", "img", images[i]), ("vae-sd", "img-mean-std-", moments[i])):
            path = f"{index[:5]}/{name}{index}" + (".png" if part == "images" else ".npy")
            (root / part / path).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(array).save(root / part / path) if part == "images" else np.save(root / part / path, array)
            lists[part].append([path, labels[i]])
    for part, listed in lists.items():
        (root / part / "dataset.json").write_text(json.dumps({"labels": listed}))
    return images, moments, labels


def test_from_repa(tmp_path, loaded):
    images, moments, labels = write_repa(tmp_path / "in")
    listed = json.loads((tmp_path / "in/vae-sd/dataset.json").read_text())["labels"]
    (tmp_path / "in/vae-sd/dataset.json").write_text(json.dumps({"labels": listed[::-1]}))  # the order says nothing
    run("--from-repa", tmp_path / "in", "--out", tmp_path / "x")
    data = PreparedData(tmp_path / "x", 32)
    assert np.array_equal(data.array("images"), images) and data.array("labels").tolist() == labels
    assert np.array_equal(data.array("moments"), moments.astype(np.float16))
    assert data.meta["vae"] == "sd-vae-ft-mse" and data.meta["class_names"] == ["0", "1", "2"] and loaded == []
    assert data.meta["latent_scale"] == LATENT_SCALE and set(os.listdir(tmp_path / "x")) == NAMES


def test_from_repa_equals_encoding(folder, straight, tmp_path):
    """The same images in both ways: write what a REPA user has, read it, compare with our own encoding."""
    images, labels = np.load(straight / "images.npy"), np.load(straight / "labels.npy")
    write_repa(tmp_path / "in", count=len(images), labels=labels.tolist())
    for i, (image, encoded) in enumerate(zip(images, np.load(straight / "moments.npy"))):
        index = f"{i + 995:08d}"
        Image.fromarray(image).save(tmp_path / f"in/images/{index[:5]}/img{index}.png")
        np.save(tmp_path / f"in/vae-sd/{index[:5]}/img-mean-std-{index}.npy", encoded.astype(np.float32))
    run("--from-repa", tmp_path / "in", "--out", tmp_path / "x")
    one, two = read_bytes(tmp_path / "x"), read_bytes(straight)
    assert all(one[name] == two[name] for name in NAMES - {"meta.json"})


def test_from_repa_goes_on_after_an_error(tmp_path, monkeypatch):
    images, _, _ = write_repa(tmp_path / "in")
    file = tmp_path / "in/vae-sd/00001/img-mean-std-00001003.npy"
    whole, calls, read = file.read_bytes(), [], prepare.read_pair
    file.unlink()
    flags = "--from-repa", tmp_path / "in", "--out", tmp_path / "x"
    assert str(file) in error_of(run, *flags)
    file.write_bytes(whole)
    monkeypatch.setattr(prepare, "read_pair", lambda pair, resolution: calls.append(pair) or read(pair, resolution))
    run(*flags)
    assert len(calls) == 3 and np.array_equal(np.load(tmp_path / "x/images.npy"), images)


def test_errors_of_repa_folders(tmp_path):
    root = tmp_path / "in"
    _, moments, labels = write_repa(root)

    def error():
        message = error_of(run, "--from-repa", root, "--out", tmp_path / "x")
        assert not (tmp_path / "x").exists()
        return message

    def spoil(file, content=None):
        """The error with this file changed, or missing."""
        before = (root / file).read_bytes()
        (root / file).unlink()
        if isinstance(content, np.ndarray):
            (np.save if file.endswith(".npy") else lambda f, a: Image.fromarray(a).save(f))(root / file, content)
        elif content is not None:
            (root / file).write_bytes(content)
        message = error()
        (root / file).write_bytes(before)
        return message

    image, encoded = "images/00000/img00000997.png", "vae-sd/00000/img-mean-std-00000997.npy"
    for file in (image, encoded):
        for content in (None, b"", b"hello", (root / file).read_bytes()[:-70]):
            assert f"{root / file} cannot be read" in spoil(file, content)
    assert f"{root / image} has shape (64, 64, 3), not (32, 32, 3)" in spoil(image, np.zeros((64, 64, 3), np.uint8))
    assert "has shape (32, 32)" in spoil(image, np.zeros((32, 32), np.uint8))
    assert f"{root / encoded} has shape (4, 4, 4), not (8, 4, 4)" in spoil(encoded, moments[0, :4])
    logvar = moments[0].copy()
    logvar[4:] = 2 * np.log(logvar[4:])
    assert f"{root / encoded} holds no mean and std" in spoil(encoded, logvar)
    for value in (7e4, -7e4, np.inf, np.nan):
        large = moments[0].copy()
        large[2, 1, 1] = value
        assert f"{root / encoded} holds no mean and std" in spoil(encoded, large)
    for part in ("images", "vae-sd"):
        for content in (None, b"{", b"[]", b"{}", b'{"labels": null}', b'{"labels": [["a.png"]]}'):
            assert f"{root / part}/dataset.json lists no" in spoil(f"{part}/dataset.json", content)
        listed = json.loads((root / part / "dataset.json").read_text())["labels"]
        message = spoil(f"{part}/dataset.json", json.dumps({"labels": listed[:-1]}).encode())
        assert "no file (class None)" in message and "00001005" in message
        listed[5][1] += 1
        message = spoil(f"{part}/dataset.json", json.dumps({"labels": listed}).encode())
        assert str(root / part / listed[5][0]) in message and "should be a pair" in message
    run("--from-repa", root, "--out", tmp_path / "x")  # whole again
    assert np.load(tmp_path / "x/labels.npy").tolist() == labels


# ----------------------------------------------------------------------------------------------------------------------
# Mistakes, and photographs


def test_errors(folder, tmp_path, monkeypatch, vae):
    flags = "--images", folder, "--out", tmp_path / "x"

    def error(*more):
        message = error_of(prepare.main, [*map(str, flags), "--workers", "0", *more])
        assert not (tmp_path / "x").exists()
        return message

    assert "--resolution 36 is not a multiple of 8" in error("--resolution", "36")
    assert "--help lists the flags" in error("--vae", "kl-f8")
    assert "--from-repa DIR" in error("--from-repa", str(folder))
    with monkeypatch.context() as patch:
        patch.setattr(vae, "encode", lambda x: (torch.zeros(len(x), 4, 4, 4), torch.full((len(x), 4, 4, 4), 7e4)))
        assert "not finite in float16" in error("--resolution", "32")
    shutil.rmtree(tmp_path / "x.partial")
    monkeypatch.setattr(prepare, "WORLD", 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    assert "only on one machine" in error()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert "not with toy" in error_of(prepare.main, ["toy", "--out", str(tmp_path / "toy")])
    monkeypatch.undo()  # the loader itself again
    (tmp_path / "file").write_text("hello")
    assert "file is not a checkpoint" in error("--vae-ckpt", str(tmp_path / "file"))
    torch.save({"model": torch.zeros(3)}, tmp_path / "file")
    assert "does not fit this VAE" in error("--vae-ckpt", str(tmp_path / "file"))
    assert "no checkpoint" in error("--vae-ckpt", str(tmp_path / "nowhere"))
    assert not (tmp_path / "x.partial").exists()  # nothing was begun


@pytest.mark.skipif("ALIGNMENT_TEST_DATA" not in os.environ
                    or not Path(os.environ["ALIGNMENT_TEST_DATA"], "imagenet_samples.tar").is_file(),
                    reason="ALIGNMENT_TEST_DATA names no folder with imagenet_samples.tar")
def test_photographs(tmp_path, vae):
    with tarfile.open(Path(os.environ["ALIGNMENT_TEST_DATA"], "imagenet_samples.tar")) as tar:
        members = [member for member in tar.getmembers() if member.isfile()][:4]
        for member in members:
            file = tmp_path / "in" / Path(member.name).name.split("_")[0] / Path(member.name).name
            file.parent.mkdir(parents=True)
            file.write_bytes(tar.extractfile(member).read())
    prepare.main(["--images", str(tmp_path / "in"), "--out", str(tmp_path / "x"), "--workers", "2"])  # 256 px
    data = PreparedData(tmp_path / "x", 256)
    images = data.array("images")
    assert data.meta["num_classes"] == len(data) == 4 and data.shape == (4, 32, 32)
    assert images.std(axis=(1, 2)).min() > 10  # pictures, not black
    assert_half_of(data.array("moments"), expected(vae, images))


# ----------------------------------------------------------------------------------------------------------------------
# By an autoencoder of reals.py, from images or from a prepared set


@pytest.fixture(scope="module")
def trained_vae(tmp_path_factory):
    """A file as reals.py writes: 2 pixels per latent, 3 channels, one scale and shift for each."""
    torch.manual_seed(1)
    sizes = dict(widths=(8, 8), groups=4, layers=1, latent_channels=3)
    path = tmp_path_factory.mktemp("vae") / "vae.pt"
    torch.save(dict(vae=AutoencoderKL(**sizes).state_dict(), sizes=sizes, id="reals-1", latent_mean=[0.5, -1.0, 0.0],
                    latent_std=[2.0, 0.5, 1.0]), path)
    return path


@pytest.fixture
def real_loader(monkeypatch):
    """load_vae itself again, in the place of the one that gives the tiny SD-VAE."""
    monkeypatch.setattr(prepare, "load_vae", load_vae)


def test_images_by_a_trained_autoencoder(folder, trained_vae, tmp_path, real_loader):
    run("--images", folder, "--out", tmp_path / "x", "--vae", trained_vae)
    data = PreparedData(tmp_path / "x", 32)
    assert data.shape == (3, 16, 16) and data.array("moments").shape == (19, 6, 16, 16)
    vae = load_vae(str(trained_vae))
    exact = expected(vae, data.array("images"))
    assert_half_of(data.array("moments"), exact)
    meta = {name: data.meta[name] for name in ("source", "vae", "vae_id", "channels", "latent_scale", "latent_shift",
                                               "downsample")}
    assert meta == {"source": f"{folder}, encoded by reals-1", "vae": str(trained_vae), "vae_id": "reals-1",
                    "channels": 3, "latent_scale": [0.5, 2.0, 1.0], "latent_shift": [-0.25, 2.0, 0.0], "downsample": 2}
    noise = torch.randn(2, 3, 16, 16)
    x = clean_input(data[np.array([4, 17])], data.meta, noise)
    z = torch.from_numpy(exact[[4, 17], :3] + exact[[4, 17], 3:] * noise.numpy())
    for channel, (mean, std) in enumerate(((0.5, 2.0), (-1.0, 0.5), (0.0, 1.0))):
        assert torch.allclose(x[:, channel], (z[:, channel] - mean) / std, rtol=2e-3, atol=5e-3)
    decode = load_decoder(data.meta, "ft-ema", "", torch.device("cpu"))
    with torch.no_grad():
        difference = decode(x).int() - pixels_to_uint8(vae.decode(z)).int()
    assert difference.abs().max() <= 1 and difference.ne(0).float().mean() < 0.05
    assert "is not a multiple of 2" in error_of(prepare.main, ["--images", str(folder), "--out", str(tmp_path / "y"),
                                                            "--vae", str(trained_vae), "--resolution", "31"])


def test_a_prepared_set_anew(folder, straight, trained_vae, tmp_path, real_loader):
    """It has the same moments as the images would; images are linked, and all that belongs to them comes along."""
    source = tmp_path / "source"
    shutil.copytree(straight, source)
    shutil.copytree(straight, source / "val")
    for name in ("teacher.pt", "judge.pt", "captions.json", "bank-prepared.pt"):
        (source / name).write_text(name)
    run("--images", folder, "--out", tmp_path / "x", "--vae", trained_vae)
    run("--from", source, "--out", tmp_path / "y", "--vae", trained_vae)
    one, two = read_bytes(tmp_path / "x"), read_bytes(tmp_path / "y")
    assert all(one[name] == two[name] for name in NAMES)
    assert set(os.listdir(tmp_path / "y")) == NAMES | {"val", "teacher.pt", "judge.pt", "captions.json"}
    assert (tmp_path / "y/images.npy").samefile(source / "images.npy")
    assert read_bytes(tmp_path / "y/val") == read_bytes(source / "val")
    run("--from", tmp_path / "y", "--out", tmp_path / "z", "--vae", trained_vae)  # of a set that was made so
    assert (tmp_path / "z/meta.json").read_bytes() == (tmp_path / "y/meta.json").read_bytes()


def test_a_disk_without_links(straight, trained_vae, tmp_path, real_loader, monkeypatch):
    def no_links(*args):
        raise OSError("no links here")
    monkeypatch.setattr(os, "link", no_links)
    run("--from", straight, "--out", tmp_path / "x", "--vae", trained_vae)
    assert np.array_equal(np.load(tmp_path / "x/images.npy"), np.load(straight / "images.npy"))
    assert not (tmp_path / "x/images.npy").samefile(straight / "images.npy")


def test_a_killed_process_and_two_ranks_encode_the_same(straight, trained_vae, tmp_path):
    """By the SD-VAE, too, of a set that had another one's latents; the source stays as it was."""
    before = read_bytes(straight)
    run("--from", straight, "--out", tmp_path / "x", "--vae", "ft-mse")
    assert read_bytes(tmp_path / "x") == before
    died = run_alone(tmp_path, ["--from", straight, "--out", tmp_path / "y"], kill_at=2)
    assert died.returncode == -signal.SIGKILL and not (tmp_path / "y").exists()
    done = run_alone(tmp_path, ["--from", straight, "--out", tmp_path / "y"], ["--from", straight, "--out",
                                                                              tmp_path / "z"], ranks=2)
    assert done.returncode == 0, done.stderr
    assert "resuming: 8 of 19 images are encoded already" in done.stdout and "Warning" not in done.stderr
    assert read_bytes(tmp_path / "y") == read_bytes(tmp_path / "z") == read_bytes(straight) == before


def test_errors_of_trained_autoencoders(straight, trained_vae, folder, tmp_path, real_loader):
    def error(*flags):
        message = error_of(prepare.main, [*map(str, flags), "--out", str(tmp_path / "x"), *SMALL])
        assert not (tmp_path / "x").exists()
        return message

    torch.save({"model": torch.zeros(3)}, tmp_path / "file")
    assert "not an autoencoder trained here" in error("--images", folder, "--vae", tmp_path / "file")
    assert "brings its own latents" in error("--from-repa", folder, "--vae", trained_vae)
    assert "with which autoencoder" in error("--from", straight, "--vae", "none")
    assert "--from data/OTHER" in error("--from", straight, "--images", folder)
    assert "is not a prepared data set" in error("--from", folder, "--vae", trained_vae)
    saved = torch.load(trained_vae, weights_only=True)
    run("--from", straight, "--out", tmp_path / "y", "--vae", trained_vae)
    meta = PreparedData(tmp_path / "y", 32).meta
    torch.save(saved | {"id": "reals-2"}, tmp_path / "other.pt")
    for path, message in ((tmp_path / "other.pt", r"another autoencoder (reals-2) than the one that made the latents "
                           "(reals-1)"), (tmp_path / "none.pt", "is not there: give its file by --vae-ckpt FILE")):
        assert message in error_of(load_decoder, meta, "ft-ema", str(path), torch.device("cpu"))

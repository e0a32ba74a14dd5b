"""evaluate.py's FID, sFID, IS, precision and recall: against ADM's TensorFlow evaluator, by hand, and end to end."""
import json
import os
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image

import evaluate
from golden_utils import Fixture
from support.dataset import write_labels_and_meta
from test_evaluate import error_of

GOLDEN = Fixture("metrics")
ROOT = Path(__file__).resolve().parent.parent


def random_images(count, size=32, seed=0):
    return np.random.RandomState(seed).randint(0, 256, (count, size, size, 3)).astype(np.uint8)


# ----------------------------------------------------------------------------------------------------------------------
# The figures, given features


@pytest.mark.parametrize("name, real, fake",
                         [("fid", "ref", "gen"), ("sfid", "sref", "sgen"), ("fid_few", "ref", "few")])
def test_frechet_distance_equals_four_codes(name, real, fake):
    real, fake = (evaluate.features_statistics(GOLDEN.input(key).numpy()) for key in (real, fake))
    for code in ("adm", "pytorch_fid", "torch_fidelity", "float64_eigh"):
        GOLDEN.check(f"{code}/{name}", evaluate.frechet_distance(*fake, *real))


def test_inception_score_equals_adm_and_torch_fidelity():
    pool, weight = GOLDEN.input("gen"), GOLDEN.input("W").T
    for name in ("adm/inception_score", "torch_fidelity/isc_1split"):
        GOLDEN.check(name, evaluate.inception_score(pool, weight))
    GOLDEN.check("adm/inception_score_split",  # 104 images: the last split has 24
                 evaluate.inception_score(pool, weight, split_size=GOLDEN.config["is_split_size"]))


def test_precision_recall_equal_adm_and_torch_fidelity():
    precision, recall = evaluate.precision_recall(GOLDEN.input("ref"), GOLDEN.input("gen"))
    for code in ("adm/{}_fp32_branch", "torch_fidelity/{}"):  # the first must be equal, to an image
        GOLDEN.check(code.format("precision"), precision)
        GOLDEN.check(code.format("recall"), recall)


def test_precision_recall_equal_adm_in_its_float16(monkeypatch):
    """With TensorFlow's float16 distances in the place of ours, the radii are ADM's too; without, 0.7 % from them."""
    def tensorflow_distances(a, b):
        def square_norm(x):  # (N,20): Eigen adds in packets of 8, then what remains
            x = x * x
            return x[:, 16] + x[:, 17] + x[:, 18] + x[:, 19] + (x[:, :8] + x[:, 8:16]).float().sum(1).half()

        a, b = a.half(), b.half()
        return (square_norm(a)[:, None] - 2 * (a.float() @ b.float().T).half() + square_norm(b)).clamp_(min=0).float()

    real, fake = GOLDEN.input("ref"), GOLDEN.input("gen")
    assert torch.allclose(evaluate.ball_radii(real), GOLDEN.outputs["adm/radii_ref"], rtol=0.01)
    monkeypatch.setattr(evaluate, "squared_distances", tensorflow_distances)
    GOLDEN.check("adm/radii_ref", evaluate.ball_radii(real))
    GOLDEN.check("adm/radii_gen", evaluate.ball_radii(fake))
    precision, recall = evaluate.precision_recall(real, fake)
    GOLDEN.check("adm/precision", precision)
    GOLDEN.check("adm/recall", recall)
    assert recall == pytest.approx(GOLDEN.outputs["adm/recall"].item(), abs=1e-9)  # the tolerance would let ours pass


def test_frechet_distance_of_gaussians_in_closed_form():
    """Diagonal covariances: the sum over axes of (m1 - m2)^2 + (s1 - s2)^2, from statistics that are exactly so."""
    rng = np.random.RandomState(0)
    white = rng.randn(500, 8)
    white = np.linalg.qr(white - white.mean(0))[0] * np.sqrt(499)  # mean 0, covariance 1 to rounding
    (mean1, mean2), (std1, std2) = rng.randn(2, 8), rng.rand(2, 8)
    one, two = (evaluate.features_statistics(white * std + mean) for std, mean in ((std1, mean1), (std2, mean2)))
    expected = ((mean1 - mean2) ** 2 + (std1 - std2) ** 2).sum()
    assert evaluate.frechet_distance(*one, *two) == pytest.approx(expected, rel=1e-9)


def test_inception_score_by_hand():
    weight = 1000 * torch.eye(6)
    same, each = torch.eye(6)[[2] * 12], torch.eye(6).repeat(2, 1)  # p(y|x) is one-hot: softmax underflows to 0
    assert evaluate.inception_score(same, weight) == pytest.approx(1)
    assert evaluate.inception_score(each, weight) == pytest.approx(6)
    assert evaluate.inception_score(each, weight, split_size=3) == pytest.approx(3)  # splits are consecutive
    assert evaluate.inception_score(torch.cat([same, each]), weight, split_size=12) == pytest.approx((1 + 6) / 2)
    assert evaluate.inception_score(torch.zeros(5, 6), weight) == pytest.approx(1)


def test_precision_recall_by_hand():
    """On a line: balls reach the third neighbour."""
    real = torch.tensor([0.0, 1, 2, 3, 100, 101, 102, 103])[:, None]
    assert evaluate.ball_radii(real).tolist() == [9, 4, 4, 9] * 2  # squared
    fake = torch.tensor([-3.0, -3.1, 6, 6.1, 50, 51, 52, 53])[:, None]  # two inside, the border belongs to it
    assert evaluate.ball_radii(fake).tolist() == pytest.approx([9.1**2, 9.2**2] * 2 + [9, 4, 4, 9], abs=0.01)
    precision, recall = evaluate.precision_recall(real, fake)
    assert precision == 2 / 8 and recall == 4 / 8  # 100 is 47 from 53 and 93.9 from 6.1
    assert evaluate.precision_recall(real, real) == [1, 1]
    assert evaluate.precision_recall(real, real[:4].repeat(2, 1)) == [1, 4 / 8]  # half of the modes: recall sees it
    assert evaluate.precision_recall(real[:4].repeat(2, 1), real) == [4 / 8, 1]


def test_blocks_change_nothing(monkeypatch):
    rng = np.random.RandomState(0)
    real, fake = (torch.from_numpy(rng.randn(count, 6)).float() for count in (57, 44))
    assert torch.allclose(evaluate.ball_radii(real, block=10), evaluate.ball_radii(real), rtol=1e-5)
    shares = evaluate.precision_recall(real, fake)
    assert evaluate.precision_recall(real, fake, block=10) == shares and 0 < shares[0] < 1 and 0 < shares[1] < 1
    largest = []
    distances = evaluate.squared_distances
    monkeypatch.setattr(evaluate, "squared_distances", lambda a, b: largest.append(len(a)) or distances(a, b))
    evaluate.precision_recall(torch.randn(2500, 2), torch.randn(3000, 2))
    assert max(largest) == 1000 and distances(real, fake).dtype == torch.float32


# ----------------------------------------------------------------------------------------------------------------------
# FID-Inception


@pytest.fixture(scope="module")
def weights_file(tmp_path_factory):
    """The fixture's random weights in the layout of the pytorch-fid release."""
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    weights = {name: torch.tensor(0) if "num_batches" in name else GOLDEN.weight(name, value.shape)
               for name, value in evaluate.fid_inception().state_dict().items()}
    torch.save(weights, path)
    return path


@pytest.fixture(scope="module")
def net(weights_file):
    return evaluate.load_inception(weights_file)


def golden_images():
    """Each (1,H,W,3) uint8, of three sizes."""
    return [GOLDEN.input(f"inception_image.{i}").permute(0, 2, 3, 1) for i in range(GOLDEN.config["num_images"])]


@torch.inference_mode()
def test_inception_equals_torch_fidelity(net):
    seen = {}

    def note(name):
        return lambda module, inputs, output: seen.setdefault(name, []).append(output)

    hooks = [block.register_forward_hook(note(name)) for name, block in net.named_children()]
    pool, spatial = (torch.cat(parts) for parts in zip(*(evaluate.inception_features(net, x) for x in golden_images())))
    for hook in hooks:
        hook.remove()
    GOLDEN.check("inception/2048", pool)
    GOLDEN.check("inception/spatial", spatial)
    GOLDEN.check("inception/logits", net.fc(pool))
    GOLDEN.check("inception/logits_unbiased", pool @ net.fc.weight.T)
    for name, block in (("64", "maxpool1"), ("192", "maxpool2"), ("768", "Mixed_6e")):
        GOLDEN.check(f"inception/{name}", torch.cat(seen[block]).mean((2, 3)))
    blocks = [torch.cat(seen[name]).flatten(1) for name in GOLDEN.config["inception_blocks"]]
    stats = [torch.stack([x.mean(1), x.std(1), x.abs().amax(1)], dim=1) for x in blocks]  # each (images,3)
    GOLDEN.check("inception/stats", torch.stack(stats))


@torch.inference_mode()
def test_resize_equals_tensorflow():
    for i, image in enumerate(golden_images()):
        GOLDEN.check(f"inception/resized.{i}", evaluate.tf1_resize(image.permute(0, 3, 1, 2).float()))
    x = torch.arange(299 * 299 * 3).reshape(1, 3, 299, 299).float()
    assert torch.equal(evaluate.tf1_resize(x), x)
    row = evaluate.tf1_resize(torch.tensor([[[[0.0, 4, 8]] * 3]]), size=4)[0, 0, 0]
    assert row.tolist() == [0, 3, 6, 8]  # positions 0, .75, 1.5 and 2.25, which is beyond the last pixel


@torch.inference_mode()
def test_other_preprocessing_gives_other_features(net):
    """pytorch-fid's own preprocessing through the same network: a fact of the fixture, and why ours is ADM's."""
    features = []
    for image in golden_images():
        x = F.interpolate(image.permute(0, 3, 1, 2).float() / 255, 299, mode="bilinear") * 2 - 1
        for block in list(net.children())[:-1]:
            x = block(x)
        features.append(x.flatten(1))
    GOLDEN.check("inception/pytorch_fid_own_preprocessing", torch.cat(features))


def test_every_output_was_compared(request):
    """By the tests above, unless only some were asked for."""
    if request.config.getoption("keyword") or any("::" in argument for argument in request.config.args):
        pytest.skip("only some tests run")
    GOLDEN.assert_all_checked()


@torch.inference_mode()
def test_inception_is_frozen_fp32_and_batch_independent(net):
    assert not net.training and not any(p.requires_grad or p.dtype != torch.float32 for p in net.parameters())
    images = torch.from_numpy(random_images(3))
    for together, alone in zip(evaluate.inception_features(net, images), evaluate.inception_features(net, images[1:2])):
        assert torch.allclose(together[1], alone[0], rtol=1e-3, atol=1e-4)


def test_tf32_is_off_for_the_features_alone(monkeypatch):
    seen = []

    def features(net, images):
        seen.append(torch.backends.cudnn.allow_tf32)
        return images[:, 0, 0].float(), images[:, 1, 1].float()

    monkeypatch.setattr(evaluate, "inception_features", features)
    before = torch.backends.cudnn.allow_tf32
    evaluate.run_inception(nn.Linear(3, 3), random_images(5), 5)
    assert seen == [False] and torch.backends.cudnn.allow_tf32 == before


def test_statistics_by_sums_equal_those_of_all_features(monkeypatch):
    images = random_images(333)
    x = torch.from_numpy(images).float().flatten(1)[:, :40] / 255 + 5  # mean 5.5, std 0.3: like features, or worse
    monkeypatch.setattr(evaluate, "inception_features", lambda net, images: (
        (y := images.float().flatten(1)[:, :40] / 255 + 5), y[:, :7].square()))
    found, pool = evaluate.run_inception(nn.Linear(3, 3), images, len(images), batch_size=50)
    expected = [*evaluate.features_statistics(x.numpy()), *evaluate.features_statistics(x[:, :7].square().numpy())]
    for ours, theirs in zip(found, expected):
        assert ours.dtype == np.float64 and np.allclose(ours, theirs, rtol=1e-9, atol=1e-11)
    assert torch.equal(pool, x)
    some = evaluate.run_inception(nn.Linear(3, 3), images, 100, batch_size=50)[1]
    rows = [(x == row).all(1).nonzero().item() for row in some]
    assert len(rows) == 100 and rows == sorted(rows) and 120 < np.mean(rows) < 210  # from everywhere


# ----------------------------------------------------------------------------------------------------------------------
# The command, by a network so small that it costs nothing


class TinyNet(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.fc = nn.Linear(12, 5).requires_grad_(False)


@pytest.fixture
def tiny(monkeypatch):
    def features(net, images):  # means over 4 quarters of each colour, and 6 pixels
        x = images.permute(0, 3, 1, 2).float() / 25
        return F.adaptive_avg_pool2d(x, 2).flatten(1), x[:, :, 0, :2].flatten(1)

    monkeypatch.setattr(evaluate, "inception_features", features)
    monkeypatch.setattr(evaluate, "load_inception", lambda path: TinyNet())
    monkeypatch.setattr(evaluate, "STATISTICS", dict(mu=(12,), sigma=(12, 12), mu_s=(6,), sigma_s=(6, 6)))
    return features


def test_table_and_json(tiny, tmp_path, capsys):
    for name, seed, count in (("a", 1, 40), ("b", 2, 50), ("reference", 3, 60)):
        np.savez(tmp_path / f"{name}.npz", arr_0=random_images(count, seed=seed))
    np.savez(tmp_path / "dark.npz", arr_0=random_images(50, seed=4) // 2)
    a, b, dark, same = evaluate.main([str(tmp_path / f"{n}.npz") for n in ("a", "b", "dark", "reference", "reference")])
    assert 0 < a["fid"] < dark["fid"] and 0 < a["sfid"] < dark["sfid"] and dark["precision"] == 0 < a["precision"] < 1
    assert same["fid"] == pytest.approx(0, abs=1e-6) and same["sfid"] == pytest.approx(0, abs=1e-6)
    assert (same["precision"], same["recall"], same["num_samples"], a["num_samples"]) == (1, 1, 60, 40)
    assert [json.loads((tmp_path / f"{name}.json").read_text()) for name in ("a", "dark")] == [a, dark]
    assert set(a) == {"fid", "sfid", "inception_score", "precision", "recall", "num_samples", "num_real", "reference",
                      "statistics", "inception"} and a["statistics"] == "of its 60 images" and a["num_real"] == 60
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].split() == ["FID", "sFID", "IS", "precision", "recall", "images"]
    assert printed[1].split() == ["a.npz", f"{a['fid']:.3f}", f"{a['sfid']:.3f}", f"{a['inception_score']:.2f}",
                                  f"{a['precision']:.4f}", f"{a['recall']:.4f}", "40"]
    assert len({len(line) for line in printed[:5]}) == 1 and "50000 samples" in printed[-1]
    assert {path.suffix for path in tmp_path.iterdir()} == {".npz", ".json"}


def test_figures_are_those_of_the_functions(tiny, tmp_path):
    """Which set is which: precision is of the samples, and the spatial features are not the pool's."""
    images = dict(a=random_images(40, seed=1)[:, ::2], b=random_images(60, seed=2)[:, ::2])  # 16 x 32 pixels
    for name, array in images.items():
        np.savez(tmp_path / f"{name}.npz", arr_0=array)
    [figures] = evaluate.main([str(tmp_path / "a.npz"), str(tmp_path / "b.npz")])
    (pool, spatial), (real, real_spatial) = (tiny(None, torch.from_numpy(array)) for array in images.values())
    for name, ours, theirs in (("fid", pool, real), ("sfid", spatial, real_spatial)):
        ours, theirs = (evaluate.features_statistics(x.numpy()) for x in (ours, theirs))
        assert figures[name] == pytest.approx(evaluate.frechet_distance(*ours, *theirs), rel=1e-6)
    assert [figures["precision"], figures["recall"]] == evaluate.precision_recall(real, pool)
    assert figures["precision"] != figures["recall"]
    assert figures["inception_score"] == pytest.approx(evaluate.inception_score(pool, TinyNet().fc.weight))


def test_adm_reference_file(tiny, tmp_path, capsys):
    """Its statistics serve FID and sFID, its images only precision and recall."""
    everything, some = random_images(90, seed=3), random_images(30, seed=5)
    pool, spatial = tiny(None, torch.from_numpy(everything))
    (mu, sigma), (mu_s, sigma_s) = (evaluate.features_statistics(x.numpy()) for x in (pool, spatial))
    np.savez(tmp_path / "adm.npz", sigma_s=sigma_s, arr_0=some, mu=mu.astype(np.float32), sigma=sigma, mu_s=mu_s)
    np.savez(tmp_path / "all.npz", arr_0=everything)
    np.savez(tmp_path / "some.npz", arr_0=some)
    a = tmp_path / "a.npz"
    np.savez(a, arr_0=random_images(40, seed=1))
    by_file, by_all, by_some = (evaluate.main([str(a), str(tmp_path / name)])[0]
                                for name in ("adm.npz", "all.npz", "some.npz"))
    for name, other in dict(fid=by_all, sfid=by_all, precision=by_some, recall=by_some, num_real=by_some).items():
        assert by_file[name] == pytest.approx(other[name], rel=1e-5), name
    assert by_all["fid"] != by_some["fid"] and by_file["statistics"] == "stored in it"
    assert "statistics stored in it, precision and recall by 30 images" in capsys.readouterr().out
    np.savez(tmp_path / "part.npz", arr_0=some, mu=mu, sigma=sigma)
    assert "but not all in ADM's shapes" in error_of(a, tmp_path / "part.npz")
    np.savez(tmp_path / "swapped.npz", arr_0=some, mu=mu_s, sigma=sigma_s, mu_s=mu, sigma_s=sigma)
    assert "but not all in ADM's shapes" in error_of(a, tmp_path / "swapped.npz")


def test_folders_on_either_side(tiny, tmp_path, monkeypatch, capsys):
    images, reference = random_images(20, seed=1), random_images(30, seed=2)
    np.savez(tmp_path / "a.npz", arr_0=images)
    np.savez(tmp_path / "b.npz", arr_0=reference)
    for name, arrays in (("pictures", images), ("real", reference)):
        for i, pixels in enumerate(arrays):
            (tmp_path / name / f"class{i % 2}").mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(tmp_path / name / f"class{i % 2}" / f"{i:03}.{'PNG' if i % 3 else 'bmp'}")
        (tmp_path / name / "notes.txt").write_text("no picture")
    folder = tmp_path / "prepared"
    (folder / "val").mkdir(parents=True)
    np.save(folder / "images.npy", reference)
    write_labels_and_meta(folder, np.arange(30) % 2, "test", 32, ["x", "y"])

    [expected] = evaluate.main([str(tmp_path / "a.npz"), str(tmp_path / "b.npz")])
    for samples, other, flags in (("pictures", "real", []), ("a.npz", "real", []), ("pictures", "b.npz", []),
                                  ("a.npz", "prepared", ["--fid"]), ("a.npz", "prepared", ["--inception-ckpt", "x"])):
        [found] = evaluate.main([str(tmp_path / samples), str(tmp_path / other), *flags])
        figures = ("fid", "sfid", "inception_score", "precision", "recall", "num_samples", "num_real")
        assert [found[name] for name in figures] == pytest.approx([expected[name] for name in figures], rel=1e-6)
    assert (tmp_path / "pictures.json").is_file()
    [found] = evaluate.main([str(folder), str(tmp_path / "a.npz")])
    assert found["num_samples"] == 30 and (tmp_path / "prepared.json").is_file()

    monkeypatch.setattr(evaluate, "NUM_MANIFOLD", 10)  # a folder may be a whole train set; a file of ADM's never is
    assert evaluate.main([str(tmp_path / "a.npz"), str(folder), "--fid"])[0]["num_real"] == 10
    assert evaluate.main([str(tmp_path / "a.npz"), str(folder), "--fid"])[0]["fid"] == pytest.approx(expected["fid"])
    assert evaluate.main([str(tmp_path / "a.npz"), str(tmp_path / "b.npz")])[0]["num_real"] == 30
    np.savez(tmp_path / "small.npz", arr_0=images[:, :16, :16])
    capsys.readouterr()
    evaluate.main([str(tmp_path / "small.npz"), str(tmp_path / "b.npz")])
    assert "has 16x16 pixels, the reference 32x32" in capsys.readouterr().out


def test_kinds_of_pictures(tmp_path):
    """Greyscale, CMYK, palette and transparent pictures become RGB; pictures of several sizes and broken ones stop."""
    pixels = random_images(1, size=8)[0]
    for mode, suffix in (("RGB", "png"), ("L", "png"), ("CMYK", "jpg"), ("P", "bmp"), ("RGBA", "webp")):
        Image.fromarray(pixels).convert(mode).save(tmp_path / f"{mode}.{suffix}")
    images, labels, statistics = evaluate.load_images(tmp_path)
    assert images.shape == (5, 8, 8, 3) and images.dtype == np.uint8 and labels is None and not statistics
    assert (images[3] == pixels).all()  # CMYK, L, P, RGB, RGBA: in order of their names
    Image.fromarray(pixels[:, :7]).save(tmp_path / "odd.png")
    assert "odd.png' is (8, 7, 3)" in error_of(tmp_path, tmp_path) and "one size" in error_of(tmp_path, tmp_path)
    (tmp_path / "odd.png").write_bytes((tmp_path / "RGB.png").read_bytes()[:100])
    assert "odd.png' cannot be read" in error_of(tmp_path, tmp_path)
    (tmp_path / "odd.png").write_text("no picture")
    assert "odd.png' cannot be read" in error_of(tmp_path, tmp_path)


# ----------------------------------------------------------------------------------------------------------------------
# Errors


def test_errors(tmp_path, weights_file):
    a, b = tmp_path / "a.npz", tmp_path / "b.npz"
    for path in (a, b):
        np.savez(path, arr_0=random_images(6))
    assert "none.npz cannot be read" in error_of(a, tmp_path / "none.npz")
    assert "none.npz cannot be read" in error_of(tmp_path / "none.npz", a, b)
    (tmp_path / "empty").mkdir()
    assert "folder of pictures" in error_of(a, tmp_path / "empty")
    np.savez(tmp_path / "few.npz", arr_0=random_images(3))
    assert "at least 4" in error_of(a, tmp_path / "few.npz")
    np.savez(tmp_path / "float.npz", arr_0=random_images(5) / 255)
    assert "expected uint8 (N,H,W,3)" in error_of(a, tmp_path / "float.npz")
    assert "two commands" in error_of(a, b, "--fid", "--judge", "judge.pt")
    np.savez_compressed(b, arr_0=np.zeros((40, 32, 32, 3), np.uint8))
    with zipfile.ZipFile(b) as file:
        start = file.getinfo("arr_0.npy").header_offset + 60
    b.write_bytes(b.read_bytes()[:start] + b"\xff" * 40 + b.read_bytes()[start + 40:])
    assert "b.npz cannot be read" in error_of(a, b)
    assert not list(tmp_path.glob("*.json*"))


def test_errors_of_inception_files(tmp_path, weights_file):
    a, wrong = tmp_path / "a.npz", tmp_path / "wrong.pth"
    np.savez(a, arr_0=random_images(6))
    weights = torch.load(weights_file, weights_only=True)
    assert "none.pth (FileNotFoundError" in error_of(a, a, "--inception-ckpt", tmp_path / "none.pth")
    contents = [[1, 2], {1: torch.zeros(3)}, {"fc.weight": 3}, nn.Linear(2, 2).state_dict(),
                {name: value for name, value in weights.items() if name != "Mixed_7c.branch_pool.bn.weight"},
                weights | {"fc.weight": torch.zeros(1000, 2048)}, weights | {"AuxLogits.fc.bias": torch.zeros(9)}, Path]
    for content in contents:
        torch.save(content, wrong)
        message = error_of(a, a, "--inception-ckpt", wrong)
        assert f"no FID-Inception at {wrong}" in message and "by --inception-ckpt FILE" in message
    for content in (b"", b"hello", weights_file.read_bytes()[:100_000]):
        wrong.write_bytes(content)
        assert f"no FID-Inception at {wrong}" in error_of(a, a, "--inception-ckpt", wrong)


def test_old_files_load(net, weights_file, tmp_path):
    """Without BatchNorm's counters, as files before torch 0.4.1 are, and in half precision."""
    weights = torch.load(weights_file, weights_only=True)
    weights = {name: value.half() for name, value in weights.items() if "num_batches" not in name}
    torch.save(weights, tmp_path / "old.pth")
    old = evaluate.load_inception(tmp_path / "old.pth")
    assert old.fc.weight.dtype == torch.float32 and torch.allclose(old.fc.weight, net.fc.weight, atol=1e-4)


def test_download(tmp_path, monkeypatch, weights_file, net):
    """A failing download, or another file than expected, is one line; a cached file is used without asking anybody."""
    a = tmp_path / "a.npz"
    np.savez(a, arr_0=random_images(6))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(evaluate, "INCEPTION_URL", f"file://{tmp_path}/none.pth")
    assert "URLError" in error_of(a, a) and "by --inception-ckpt FILE" in error_of(a, a)
    monkeypatch.setattr(evaluate, "INCEPTION_URL", f"file://{weights_file}")  # its hash is not that of the real file
    assert "invalid hash" in error_of(a, a)
    assert list((tmp_path / "hub" / "checkpoints").iterdir()) == []
    (tmp_path / "hub" / "checkpoints" / weights_file.name).write_bytes(weights_file.read_bytes())
    assert torch.equal(evaluate.load_inception().fc.weight, net.fc.weight)


# ----------------------------------------------------------------------------------------------------------------------
# End to end


def test_end_to_end_killed_and_run_again(tmp_path, weights_file):
    """`python evaluate.py A.npz B.npz --inception-ckpt FILE`, first killed in the worst moment."""
    images = random_images(8, size=24)
    np.savez(tmp_path / "A.npz", arr_0=images[:4])
    np.savez(tmp_path / "B.npz", arr_0=images[4:])
    arguments = [str(tmp_path / "A.npz"), str(tmp_path / "B.npz"), "--inception-ckpt", str(weights_file)]
    code = """if True:
        import os, sys, torch, evaluate
        evaluate.run_inception = lambda net, images, num_kept: ([0] * 4, torch.rand(num_kept, 2048))
        evaluate.frechet_distance = lambda *statistics: 0.0
        os.replace = lambda *paths: os.kill(os.getpid(), 9)
        evaluate.main(sys.argv[1:])"""
    killed = subprocess.run([sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert sorted(os.listdir(tmp_path)) == ["A.json.partial", "A.npz", "B.npz"]

    done = subprocess.run([sys.executable, "evaluate.py", *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "Warning" not in done.stderr, done.stderr
    assert sorted(os.listdir(tmp_path)) == ["A.json", "A.npz", "B.npz"]
    written = json.loads((tmp_path / "A.json").read_text())
    assert f"{written['fid']:.3f}" in done.stdout and written["inception"] == str(weights_file)
    assert written["num_samples"] == written["num_real"] == 4
    assert written["fid"] > 0 and written["sfid"] > 0 and 1 <= written["inception_score"] <= 4
    assert 0 <= written["precision"] <= 1 and 0 <= written["recall"] <= 1

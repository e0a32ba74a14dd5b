"""evaluate.py: the Frechet distance in closed form, the table, every error line."""

import json

import numpy as np
import pytest
import torch

import evaluate
from support.dataset import write_labels_and_meta
from support.toy import SHAPES, make_toy_set, prepare_toy


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """A small toy set with a judge (the teacher is not trained)."""
    folder = tmp_path_factory.mktemp("data") / "toy"
    prepare_toy(folder, count=3000, val_count=1200, steps=1, judge_steps=80)
    return folder


def error_of(*arguments):
    """The one-line message with which evaluate.py stops."""
    with pytest.raises(SystemExit) as caught:
        evaluate.main([str(argument) for argument in arguments])
    message = str(caught.value)
    assert message.startswith("error: ") and "\n" not in message
    return message


# ----------------------------------------------------------------------------------------------------------------------
# Frechet distance


def random_covariance(rng, size, rank=None):
    """(size, size) positive semi-definite."""
    root = rng.randn(size, rank or size)
    return root @ root.T


def test_frechet_distance_equal_covariances():
    rng = np.random.RandomState(0)
    sigma = random_covariance(rng, 9)
    mu1, mu2 = rng.randn(2, 9)
    assert evaluate.frechet_distance(mu1, sigma, mu2, sigma) == pytest.approx(((mu1 - mu2) ** 2).sum(), rel=1e-9)
    assert evaluate.frechet_distance(mu1, sigma, mu1, sigma) == pytest.approx(0, abs=1e-9)


def test_frechet_distance_commuting_covariances():
    rng = np.random.RandomState(1)
    std1, std2 = rng.rand(2, 7)
    rotation = np.linalg.qr(rng.randn(7, 7))[0]
    sigma1, sigma2 = (rotation @ np.diag(std**2) @ rotation.T for std in (std1, std2))
    expected = 4.0 * 7 + ((std1 - std2) ** 2).sum()
    assert evaluate.frechet_distance(np.zeros(7), sigma1, np.full(7, 2), sigma2) == pytest.approx(expected, rel=1e-9)


def test_frechet_distance_general_and_singular():
    rng = np.random.RandomState(2)
    for rank in (6, 2):  # rank 2: fewer images than dimensions
        sigma1, sigma2 = random_covariance(rng, 6, rank), random_covariance(rng, 6)
        # S1 S2 has the eigenvalues of S1^(1/2) S2 S1^(1/2), found here by the unsymmetric solver
        trace_root = np.sqrt(np.linalg.eigvals(sigma1 @ sigma2).real.clip(min=0)).sum()
        expected = np.trace(sigma1) + np.trace(sigma2) - 2 * trace_root
        distance = evaluate.frechet_distance(np.zeros(6), sigma1, np.zeros(6), sigma2)
        assert distance == pytest.approx(expected, rel=1e-6) and distance > 0.1
        assert evaluate.frechet_distance(np.zeros(6), sigma2, np.zeros(6), sigma1) == pytest.approx(distance, rel=1e-6)


def test_features_statistics():
    features = np.array([[1, 2], [3, 2], [5, 8]], np.float32)
    mu, sigma = evaluate.features_statistics(features)
    assert mu.tolist() == [3, 4] and sigma.tolist() == [[4, 6], [6, 12]] and sigma.dtype == np.float64  # divided by N-1


def test_split_reference():
    reference, real = evaluate.split_reference(1001, 480)
    assert len(reference) == 500 and len(real) == 480 and not set(reference) & set(real)
    assert max(reference) < 1001 and reference.mean() == pytest.approx(500, abs=50)  # not the first half
    assert len(evaluate.split_reference(1001, 5000)[1]) == 501
    assert [len(part) for part in evaluate.split_reference(300_000, 10**6)] == [50_000, 50_000]


# ----------------------------------------------------------------------------------------------------------------------
# The command


def test_good_and_bad_samples(toy, tmp_path, capsys):
    images, labels, _ = make_toy_set(400, seed=7)
    np.savez(tmp_path / "good.npz", arr_0=images, labels=labels)
    np.savez(tmp_path / "wrong.npz", arr_0=images, labels=(labels + 1) % 8)
    recoloured = np.ascontiguousarray(images[..., [1, 2, 0]])
    np.savez(tmp_path / "recoloured.npz", arr_0=recoloured, labels=labels)
    np.savez(tmp_path / "one_shape.npz", arr_0=np.resize(images[labels == 2], images.shape))
    names = ("good", "wrong", "recoloured", "one_shape")
    figures = dict(zip(names, evaluate.main([*(str(tmp_path / f"{name}.npz") for name in names), str(toy)])))
    good = figures["good"]
    assert good["judge_accuracy"] > 0.97 and abs(good["judge_accuracy"] - good["real_accuracy"]) < 0.03
    assert 0 < good["judge_fd"] < 2 * good["real_fd"] and good["num_real"] == good["num_samples"] == 400
    assert figures["wrong"]["judge_accuracy"] < 0.03 and figures["wrong"]["judge_fd"] == good["judge_fd"]
    assert figures["recoloured"]["judge_fd"] > 2 * good["judge_fd"]  # the judge learnt the captions' colours too
    assert figures["one_shape"]["judge_fd"] > 10 * good["judge_fd"] and figures["one_shape"]["judge_accuracy"] is None
    assert all(result["real_fd"] == good["real_fd"] for result in figures.values())

    written = json.loads((tmp_path / "good.json").read_text())
    assert written == good
    assert set(written) == {"judge_accuracy", "judge_fd", "real_accuracy", "real_fd", "num_samples", "num_real",
                            "num_reference", "reference", "judge"}
    assert written["reference"] == str(toy / "val") and written["judge"] == str(toy / "judge.pt")
    printed = capsys.readouterr().out
    assert f"{good['judge_accuracy']:.1%}" in printed and f"{good['real_fd']:.3f}" in printed
    assert "no labels" in printed and "note:" not in printed


def test_reference_too_small_for_the_samples(toy, tmp_path, capsys):
    images, labels, _ = make_toy_set(700, seed=8)
    np.savez(tmp_path / "many.npz", arr_0=images, labels=labels)
    [result] = evaluate.main([str(tmp_path / "many.npz"), str(toy / "val")])
    assert result["num_samples"] == 700 and result["num_real"] == result["num_reference"] == 600
    assert "note: fewer images" in capsys.readouterr().out


def test_prepared_folder_as_samples(toy, tmp_path):
    [result] = evaluate.main([str(toy), str(toy)])
    assert result["num_samples"] == 3000 and result["judge_accuracy"] > 0.97
    assert result["judge_fd"] < 1.5 * result["real_fd"]


def test_evaluation_does_not_train_the_judge(toy):
    """BatchNorm in train mode would make an image's features depend on its neighbours."""
    judge, num_classes, _ = evaluate.load_judge(toy / "judge.pt")
    images = make_toy_set(64, seed=9)[0]
    together, _ = evaluate.run_judge(judge, num_classes, images)
    alone, _ = evaluate.run_judge(judge, num_classes, images, np.array([5]))
    assert np.allclose(together[5], alone[0], atol=1e-5) and together.shape == (64, 64)


def test_errors(toy, tmp_path):
    images, labels, _ = make_toy_set(20, seed=7)

    def save(**arrays):
        np.savez(tmp_path / "s.npz", **arrays)
        return tmp_path / "s.npz"

    assert "cannot be read ([Errno 2] No such file" in error_of(tmp_path / "none.npz", toy)
    (tmp_path / "text.npz").write_text("hello")
    assert "cannot be read" in error_of(tmp_path / "text.npz", toy)
    good = save(arr_0=images, labels=labels).read_bytes()
    (tmp_path / "half.npz").write_bytes(good[: len(good) // 2])
    assert "cannot be read" in error_of(tmp_path / "half.npz", toy)
    np.save(tmp_path / "array.npy", images)
    assert "cannot be read" in error_of(tmp_path / "array.npy", toy)
    assert "arr_0 is not a file in the archive" in error_of(save(images=images), toy)
    assert "expected uint8" in error_of(save(arr_0=images.astype(np.float32)), toy)
    assert "expected uint8" in error_of(save(arr_0=images.transpose(0, 3, 1, 2)), toy)
    assert "expected uint8" in error_of(save(arr_0=images[..., :1]), toy)
    assert "expected integers (20,)" in error_of(save(arr_0=images, labels=labels[:5]), toy)
    assert "expected integers (20,)" in error_of(save(arr_0=images, labels=labels.astype(np.float32)), toy)
    assert "classes 0..7" in error_of(save(arr_0=images, labels=labels + 5), toy)
    assert "classes 0..7" in error_of(save(arr_0=images, labels=labels - 5), toy)
    assert "trained at 16" in error_of(save(arr_0=images[:, :8, :8]), toy)
    assert "at least 4" in error_of(save(arr_0=images[:3]), toy)
    path = save(arr_0=images, labels=labels)
    assert "prepare.py folder" in error_of(path, tmp_path / "nowhere")
    assert "prepare.py folder" in error_of(tmp_path, toy)
    assert not (tmp_path / "s.json").exists()


def test_errors_of_judge_and_reference(toy, tmp_path):
    images, labels, _ = make_toy_set(20, seed=7)
    np.savez(tmp_path / "s.npz", arr_0=images, labels=labels)
    folder = tmp_path / "x"
    folder.mkdir()
    np.save(folder / "images.npy", images)
    write_labels_and_meta(folder, labels + 1, "test", 16, [*SHAPES, "more"])
    assert f"python prepare.py teacher --data {folder}" in error_of(tmp_path / "s.npz", folder)
    assert "classes 0..7" in error_of(tmp_path / "s.npz", folder, "--judge", toy / "judge.pt")
    (folder / "judge.pt").write_text("hello")
    assert "not a judge" in error_of(tmp_path / "s.npz", folder)
    assert "not a judge" in error_of(tmp_path / "s.npz", folder, "--judge", toy / "teacher.pt")
    torch.save([1, 2], folder / "judge.pt")
    assert "not a judge" in error_of(tmp_path / "s.npz", folder)
    np.save(folder / "labels.npy", labels[:19])
    assert "expected integers (20,)" in error_of(tmp_path / "s.npz", folder)
    (folder / "images.npy").write_bytes((folder / "images.npy").read_bytes()[:-100])
    assert "mmap length" in error_of(tmp_path / "s.npz", folder)


def test_errors_of_flags():
    for wrong in ([], ["one"], ["one", "two", "--size", "8"]):
        assert "--help lists the flags" in error_of(*wrong)

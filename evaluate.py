"""Numbers for a file of samples: does the judge recognise them, and how far are they from the real images?

The judge is a small CNN trained on the same data set by `prepare.py teacher`, independently of the vision teacher.
  judge accuracy     share of the images in which the judge sees the class that was asked for
  Frechet distance   |mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)) between the judge's features of two sets of images
Both depend on the judge and the number of images, so the same figures are printed for as many real images.

  python evaluate.py runs/repa/samples.npz data/toy            # reference: data/toy/val where there is one
  python evaluate.py data/other data/toy --judge data/toy/judge.pt --json other.json

Reads an .npz (arr_0 uint8 (N,H,W,3), optional labels (N,), the ADM layout) or a prepared folder data/NAME.
Writes the figures as JSON beside the samples: samples.npz -> samples.json.
"""

import argparse
import json
import os
import pickle
import zipfile
from pathlib import Path

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

MAX_REAL = 50_000  # images per half of the reference: the customary 50k of FID, and a bound on the time

# ----------------------------------------------------------------------------------------------------------------------
# Reading: every file is checked here, so that the rest can rely on types, shapes and counts


def load_folder(folder):
    """data/NAME -> images (N,H,W,3) uint8 memory map, labels (N,) int64, meta dict. Exits if anything is amiss."""
    folder = Path(folder)
    if not (folder / "meta.json").is_file():
        partial = folder.with_name(folder.name + ".partial")
        if partial.is_dir():
            raise SystemExit(f"error: {folder} is unfinished: run its prepare.py command again (left in {partial})")
        raise SystemExit(f"error: {folder} is not a prepared data set; see `python prepare.py --help` to make one")
    try:
        meta = json.loads((folder / "meta.json").read_text())
        expected = (meta["count"], meta["resolution"], meta["resolution"], 3)
        images = np.load(folder / "images.npy", mmap_mode="r")
        labels = np.load(folder / "labels.npy")
    except (OSError, ValueError, EOFError, KeyError, TypeError) as error:  # missing, truncated, not ours
        raise SystemExit(f"error: {folder} is damaged ({error}); remove it and run prepare.py again") from None
    if images.shape != expected or images.dtype != np.uint8 or labels.shape != expected[:1]:
        raise SystemExit(f"error: {folder}: images.npy {images.shape} {images.dtype} and labels.npy {labels.shape} do "
                         f"not fit meta.json {expected} uint8; remove the folder and run prepare.py again")
    return images, labels, meta


def load_samples(path):
    """.npz or data/NAME -> images (N,H,W,3) uint8, labels (N,) int64 or None. Exits if anything is amiss."""
    path = Path(path)
    if not path.exists():
        raise SystemExit(f"error: {path} not found; write it with the --sample flag of a training script")
    if path.is_dir():
        images, labels, _ = load_folder(path)
        return images, labels
    try:
        with np.load(path) as file:  # allow_pickle stays off: a sample file holds numbers only
            images = file["arr_0"] if "arr_0" in file else None
            labels = file["labels"] if "labels" in file else None
    except (OSError, ValueError, EOFError, TypeError, AttributeError, zipfile.BadZipFile) as error:
        raise SystemExit(f"error: {path} cannot be read as .npz ({error})") from None
    if images is None:
        raise SystemExit(f"error: {path} has no arr_0; expected arr_0 uint8 (N,H,W,3) and optionally labels (N,)")
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3 or images.shape[1] != images.shape[2]:
        raise SystemExit(f"error: {path}: arr_0 is {images.dtype} {images.shape}; expected uint8 (N,H,H,3)")
    if labels is not None and (labels.shape != images.shape[:1] or labels.dtype.kind not in "iu"):
        raise SystemExit(f"error: {path}: labels is {labels.dtype} {labels.shape}; expected integers ({len(images)},)")
    return images, labels


# ----------------------------------------------------------------------------------------------------------------------
# The judge: three stride-2 convolutions, trained by prepare.py


class Judge(nn.Module):
    """(B,3,R,R) in [-1,1] -> logits (B, num_classes + num_words): the label, then which caption words hold."""

    def __init__(self, num_classes, num_words=0, widths=(32, 64, 64)):
        super().__init__()
        layers = []
        for c_in, c_out in zip((3, *widths), widths):
            layers += [nn.Conv2d(c_in, c_out, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(c_out), nn.ReLU()]
        self.trunk = nn.Sequential(*layers)
        self.head = nn.Linear(widths[-1], num_classes + num_words)

    def features(self, x):
        """(B,3,R,R) -> (B,64): the last convolution, averaged over space; what the Frechet distance compares."""
        return self.trunk(x).mean((2, 3))

    def forward(self, x):
        """(B,3,R,R) -> (B, num_classes + num_words)."""
        return self.head(self.features(x))


def load_judge(path):
    """judge.pt -> (Judge in eval mode, its num_classes, its resolution). Exits if the file is missing or foreign."""
    path = Path(path)
    if not path.is_file():
        raise SystemExit(f"error: no judge at {path}; train it with `python prepare.py teacher --data {path.parent}`")
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        judge = Judge(**saved["config"])
        judge.load_state_dict(saved["model"])
        num_classes, resolution = saved["config"]["num_classes"], saved["resolution"]
    except (RuntimeError, KeyError, TypeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        reason = str(error).strip().split("\n")[0]
        raise SystemExit(f"error: {path} is not a judge of prepare.py ({reason}); train it again") from None
    return judge.eval(), num_classes, resolution


@torch.inference_mode()
def run_judge(judge, num_classes, images, indices=None, batch_size=500):
    """images (N,R,R,3) uint8 [at indices] -> features (N,64) float64, predicted classes (N,), both numpy."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    judge = judge.to(device)
    indices = np.arange(len(images)) if indices is None else indices
    features, predicted = [], []
    for start in tqdm(range(0, len(indices), batch_size), desc="judge", unit="batch", disable=None, leave=False):
        batch = torch.from_numpy(images[indices[start : start + batch_size]]).to(device)
        x = batch.permute(0, 3, 1, 2) / 127.5 - 1  # (B,3,R,R)
        features.append(judge.features(x))
        predicted.append(judge.head(features[-1])[:, :num_classes].argmax(1))
    return torch.cat(features).double().cpu().numpy(), torch.cat(predicted).cpu().numpy()


# ----------------------------------------------------------------------------------------------------------------------
# Frechet distance


def features_statistics(features):
    """(N,D) -> mean (D,) and unbiased covariance (D,D), float64."""
    features = np.asarray(features, dtype=np.float64)
    return features.mean(0), np.atleast_2d(np.cov(features, rowvar=False))


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """Means (D,), covariances (D,D) -> |mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)), a float >= 0 up to rounding.

    tr (S1 S2)^(1/2) is the sum of the square roots of the eigenvalues of S1^(1/2) S2 S1^(1/2), which is symmetric:
    two symmetric eigenproblems, exact for singular covariances, where a general matrix square root can fail.
    """
    mu1, sigma1, mu2, sigma2 = (np.asarray(a, dtype=np.float64) for a in (mu1, sigma1, mu2, sigma2))
    values, vectors = np.linalg.eigh(sigma1)
    root1 = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T  # S1^(1/2); rounding makes zeros slightly negative
    product = np.linalg.eigvalsh(root1 @ sigma2 @ root1)
    trace_root = np.sqrt(product.clip(min=0)).sum()
    return float(((mu1 - mu2) ** 2).sum() + np.trace(sigma1) + np.trace(sigma2) - 2 * trace_root)


# ----------------------------------------------------------------------------------------------------------------------
# Samples beside real images


def split_reference(count, num_samples, seed=0):
    """Two disjoint random halves of range(count): (reference indices, at most num_samples indices of 'real' images)."""
    order = np.random.RandomState(seed).permutation(count)  # folders are sorted by class, so shuffle before halving
    half = count // 2
    return np.sort(order[:half][:MAX_REAL]), np.sort(order[half:][: min(num_samples, MAX_REAL)])


def evaluate(samples, labels, images, real_labels, judge, num_classes):
    """Samples (N,R,R,3) with labels (N,) or None, a reference set, a judge -> dict of the figures (see docstring)."""
    reference, real = split_reference(len(images), len(samples))
    statistics = features_statistics(run_judge(judge, num_classes, images, reference)[0])
    features, predicted = run_judge(judge, num_classes, samples)
    real_features, real_predicted = run_judge(judge, num_classes, images, real)
    return {
        "judge_accuracy": None if labels is None else float((predicted == labels).mean()),
        "judge_fd": frechet_distance(*features_statistics(features), *statistics),
        "real_accuracy": float((real_predicted == real_labels[real]).mean()),
        "real_fd": frechet_distance(*features_statistics(real_features), *statistics),
        "num_samples": len(samples),
        "num_real": len(real),
        "num_reference": len(reference),
    }


def check_inputs(images, labels, real_images, judge_path, num_classes, resolution):
    """Exits with one line if samples, reference and judge do not belong together."""
    if len(images) < 2 or len(real_images) < 4:
        raise SystemExit(f"error: {len(images)} samples and {len(real_images)} reference images; the covariances need "
                         "at least 2 samples and 4 reference images")
    for name, array in (("the samples", images), ("the reference", real_images)):
        if array.shape[1] != resolution:
            raise SystemExit(f"error: {name}: images of {array.shape[1]} px, but the judge {judge_path} was trained at "
                             f"{resolution} px; give the data set they belong to")
    if labels is not None and not (0 <= labels.min() and labels.max() < num_classes):
        raise SystemExit(f"error: labels of the samples lie in {labels.min()}..{labels.max()}, the judge {judge_path} "
                         f"knows 0..{num_classes - 1}; give the data set they belong to")


def print_table(result):
    """Prints samples and real images in two rows."""
    print(f"{'':<12} {'judge accuracy':>14} {'Frechet distance':>17} {'images':>8}")
    for name, key, count in (("samples", "judge", "num_samples"), ("real images", "real", "num_real")):
        accuracy = result[f"{key}_accuracy"]
        accuracy = "no labels" if accuracy is None else f"{accuracy:.4f}"
        print(f"{name:<12} {accuracy:>14} {result[f'{key}_fd']:>17.3f} {result[count]:>8}")
    print(f"reference of both distances: {result['num_reference']} other images of {result['reference']}; "
          f"judge: {result['judge']}")
    if result["num_real"] < result["num_samples"]:
        print(f"note: the reference has only {result['num_real']} images to play the samples; distances fall with the "
              "number of images, so the two rows do not compare exactly")


def main(argv=None):
    """Command line; returns the figures as a dict."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.add_argument("samples", type=Path, help=".npz with arr_0, or a prepared folder")
    parser.add_argument("reference", type=Path, help="prepared folder data/NAME; its val/ is used where there is one")
    parser.add_argument("--judge", type=Path, help="default: judge.pt of the reference")
    parser.add_argument("--json", type=Path, help="where the figures go (default: beside the samples)")
    args = parser.parse_args(argv)

    root = args.reference.parent if args.reference.name == "val" else args.reference
    reference = root / "val" if (root / "val").is_dir() else args.reference
    judge_path = args.judge or root / "judge.pt"
    output = args.json or args.samples.with_name(args.samples.name.removesuffix(".npz") + ".json")

    images, labels = load_samples(args.samples)
    real_images, real_labels, _ = load_folder(reference)
    judge, num_classes, resolution = load_judge(judge_path)
    check_inputs(images, labels, real_images, judge_path, num_classes, resolution)
    if real_labels.max() >= num_classes:
        raise SystemExit(f"error: {reference} has labels up to {real_labels.max()}, the judge {judge_path} knows "
                         f"{num_classes} classes; train it anew with `python prepare.py teacher --data {root}`")

    result = evaluate(images, labels, real_images, real_labels, judge, num_classes)
    result |= {"reference": str(reference), "judge": str(judge_path)}
    print_table(result)
    partial = output.with_name(output.name + ".partial")
    partial.write_text(json.dumps(result, indent=1) + "\n")
    os.replace(partial, output)
    return result


if __name__ == "__main__":
    main()

"""Numbers for a file of samples: does a judge recognise them, and how far are they from the real images?

The judge is a small CNN that `prepare.py teacher` trained on the same data set, apart from the vision teacher.

    judge accuracy     share of the images in which the judge sees the class that was asked for
    Frechet distance   |mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)) between the judge's features of two sets of images

Both depend on the judge and on the number of images, so the same figures stand beside them for as many real images.

    python evaluate.py runs/repa-toy/samples.npz data/toy        the reference is data/toy/val where there is one
    python evaluate.py runs/*/samples.npz data/toy               one table of several files
    python evaluate.py data/other data/toy                       another set of real images in the place of samples

Reads an .npz in ADM's layout, arr_0 (N,H,W,3) uint8 and perhaps labels (N,), or a folder data/NAME of prepare.py.
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
import torch.nn as nn
from tqdm import tqdm

MAX_REAL = 50_000  # images per half of the reference: the customary 50k of FID, and a bound on the time


def fail(message):
    """Stop the program with one line that names the remedy."""
    raise SystemExit(f"error: {message}")


def load_images(path):
    """samples.npz or data/NAME: images (N,R,R,3) uint8 (of a folder: on disk), labels (N,) or None."""
    try:
        if path.is_dir():
            images, labels = np.load(path / "images.npy", mmap_mode="r"), np.load(path / "labels.npy")
        else:
            with np.load(path) as file:
                images, labels = file["arr_0"], file["labels"] if "labels" in file else None
    except (OSError, ValueError, EOFError, KeyError, TypeError, zipfile.BadZipFile) as error:
        fail(f"{path} cannot be read ({error}); expected an .npz (arr_0, labels) of --sample or a prepare.py folder")
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1:] != (images.shape[2], images.shape[2], 3):
        fail(f"{path}: images are {images.dtype} {images.shape}; expected uint8 (N,R,R,3)")
    if labels is not None and (labels.dtype.kind not in "iu" or labels.shape != images.shape[:1]):
        fail(f"{path}: labels are {labels.dtype} {labels.shape}; expected integers ({len(images)},)")
    if len(images) < 4:
        fail(f"{path}: {len(images)} images; the covariances need at least 4")
    return images, labels


# ---------------------------------------------------------------------------------------------------------------------
# The judge: three stride-2 convolutions, trained by prepare.py
# ---------------------------------------------------------------------------------------------------------------------
class Judge(nn.Module):
    """(B,3,R,R) in [-1,1] to logits (B, num_classes + num_words): the label, then which caption words hold."""

    def __init__(self, num_classes, num_words=0, widths=(32, 64, 64)):
        super().__init__()
        layers = []
        for c_in, c_out in zip((3, *widths), widths):
            layers += [nn.Conv2d(c_in, c_out, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(c_out), nn.ReLU()]
        self.trunk = nn.Sequential(*layers)
        self.head = nn.Linear(widths[-1], num_classes + num_words)

    def features(self, x):
        """(B,3,R,R) to (B,64): the last convolution, averaged over space; what the Frechet distance compares."""
        return self.trunk(x).mean((2, 3))

    def forward(self, x):
        return self.head(self.features(x))


def load_judge(path):
    """The judge of a file, its number of classes and its resolution."""
    if not path.is_file():
        fail(f"no judge at {path}; train it: python prepare.py teacher --data {path.parent}")
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        judge = Judge(**saved["config"])
        judge.load_state_dict(saved["model"])
        return judge.eval(), saved["config"]["num_classes"], saved["resolution"]
    except (RuntimeError, KeyError, TypeError, EOFError, pickle.UnpicklingError):
        fail(f"{path} is not a judge of prepare.py: python prepare.py teacher --data {path.parent} trains one")


@torch.inference_mode()
def run_judge(judge, num_classes, images, rows=None, batch_size=500):
    """Features (N,64) float64 and predicted classes (N,) of images (N,R,R,3) uint8, or of these rows of them."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    judge, rows = judge.to(device), np.arange(len(images)) if rows is None else rows
    features, predicted = [], []
    for start in tqdm(range(0, len(rows), batch_size), desc="judge", unit="batch", disable=None, leave=False):
        x = torch.from_numpy(images[rows[start:start + batch_size]]).to(device).permute(0, 3, 1, 2) / 127.5 - 1
        features.append(judge.features(x))  # (B,3,R,R) -> (B,64)
        predicted.append(judge.head(features[-1])[:, :num_classes].argmax(1))
    return torch.cat(features).cpu().double().numpy(), torch.cat(predicted).cpu().numpy()


# ---------------------------------------------------------------------------------------------------------------------
# Frechet distance
# ---------------------------------------------------------------------------------------------------------------------
def features_statistics(features):
    """Mean (D,) and unbiased covariance (D,D) of features (N,D), float64."""
    return features.mean(0, dtype=np.float64), np.cov(features, rowvar=False, dtype=np.float64)


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """|mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)) of means (D,) and covariances (D,D).

    tr (S1 S2)^(1/2) is the sum of the square roots of the eigenvalues of S1^(1/2) S2 S1^(1/2), which is symmetric:
    two symmetric eigenproblems, exact for singular covariances, where a general matrix square root can fail.
    """
    values, vectors = np.linalg.eigh(sigma1)
    root1 = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T  # S1^(1/2); rounding makes zeros slightly negative
    trace_root = np.sqrt(np.linalg.eigvalsh(root1 @ sigma2 @ root1).clip(min=0)).sum()
    return float(((mu1 - mu2) ** 2).sum() + np.trace(sigma1) + np.trace(sigma2) - 2 * trace_root)


# ---------------------------------------------------------------------------------------------------------------------
# Samples beside real images
# ---------------------------------------------------------------------------------------------------------------------
def split_reference(count, num_samples, seed=0):
    """Two disjoint random halves of range(count): the reference, and at most num_samples 'real' images."""
    order = np.random.RandomState(seed).permutation(count)  # folders are sorted by class, so shuffle before halving
    half = count // 2
    return np.sort(order[:half][:MAX_REAL]), np.sort(order[half:][:min(num_samples, MAX_REAL)])


def figures(judge, num_classes, images, labels, statistics, indices=None):
    """(accuracy or None without labels, Frechet distance to `statistics`) of images (N,R,R,3) [at these indices]."""
    features, predicted = run_judge(judge, num_classes, images, indices)
    if labels is not None:
        labels = labels if indices is None else labels[indices]
    accuracy = None if labels is None else float((predicted == labels).mean())
    return accuracy, frechet_distance(*features_statistics(features), *statistics)


def main(argv=None):
    """Print one table, and write the figures of each file beside it; returns them, a dict a file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.add_argument("samples", type=Path, nargs="+", help=".npz with arr_0, or a prepared folder; one or more")
    parser.add_argument("reference", type=Path, help="prepared folder data/NAME; its val/ is used where there is one")
    parser.add_argument("--judge", type=Path, help="[judge.pt of the reference]")
    parser.error = lambda message: fail(f"{message} (--help lists the flags)")
    args = parser.parse_args(argv)
    root = args.reference.parent if args.reference.name == "val" else args.reference
    reference = root / "val" if (root / "val").is_dir() else args.reference
    judge_path = args.judge or root / "judge.pt"

    samples, (real_images, real_labels) = [load_images(path) for path in args.samples], load_images(reference)
    judge, num_classes, resolution = load_judge(judge_path)
    for path, (images, labels) in zip([*args.samples, reference], [*samples, (real_images, real_labels)]):
        if images.shape[1] != resolution or labels is not None and not np.isin(labels, range(num_classes)).all():
            fail(f"{path} does not fit the judge {judge_path}, which was trained at {resolution} px for classes "
                 f"0..{num_classes - 1}: give the data set and the judge that belong to it")

    others, real = split_reference(len(real_images), len(samples[0][0]))
    statistics = features_statistics(run_judge(judge, num_classes, real_images, others)[0])
    real_row = figures(judge, num_classes, real_images, real_labels, statistics, real)
    rows = [figures(judge, num_classes, images, labels, statistics) for images, labels in samples]
    names, counts = [path.name for path in args.samples] + ["real images"], [len(s[0]) for s in samples] + [len(real)]
    width = max(map(len, names))
    print(f"{'':{width}}   judge accuracy   Frechet distance   images")
    for name, (accuracy, distance), count in zip(names, [*rows, real_row], counts):
        accuracy = "no labels" if accuracy is None else f"{accuracy:.1%}"
        print(f"{name:{width}}{accuracy:>17}{distance:>19.3f}{count:>9}")
    print(f"distances are to {len(others)} other images of {reference}; the judge is {judge_path}")
    if len(set(counts)) > 1:
        print("note: fewer images give larger distances, so rows of different numbers of images do not compare")

    results = [dict(judge_accuracy=accuracy, judge_fd=distance, real_accuracy=real_row[0], real_fd=real_row[1],
                    num_samples=count, num_real=len(real), num_reference=len(others), reference=str(reference),
                    judge=str(judge_path)) for (accuracy, distance), count in zip(rows, counts)]
    for path, result in zip(args.samples, results):
        output = path.with_name(path.name.removesuffix(".npz") + ".json")
        partial = output.with_name(output.name + ".partial")
        partial.write_text(json.dumps(result, indent=1) + "\n")
        os.replace(partial, output)
    return results


if __name__ == "__main__":
    main()

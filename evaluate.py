"""Numbers for files of samples: how good are the images, and how far are they from the real ones?

Against a folder of prepare.py, by its judge, a small CNN that `prepare.py teacher` trained:
    judge accuracy     share of the images in which the judge sees the class that was asked for
    Frechet distance   |mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)) between the judge's features
                       of two sets of images
Both depend on the judge and on the number of images, so the table has a row of real images, too.
Against another reference, or with --fid, ADM's suite by FID-Inception, as in the papers' tables:
    FID, sFID          the Frechet distance of its last features, and of some of its spatial ones
    IS                 exp of the mean KL divergence of p(class | image) from its mean over 5000
    precision, recall  share of the samples among the real images, and of the real among the samples

    python evaluate.py runs/repa-toy/samples.npz data/toy            against data/toy/val, if it is
    python evaluate.py runs/*/samples.npz data/toy                   one table of several files
    python evaluate.py data/other data/toy                           real images as samples
    python evaluate.py samples.npz VIRTUAL_imagenet256_labeled.npz   ADM's file, with statistics
    python evaluate.py samples.npz data/photos --fid                 to all its images, not val/

Reads .npz in ADM's layout, arr_0 (N,H,W,3) uint8 and perhaps labels (N,), folders data/NAME of
prepare.py, and folders of pictures of one size. Writes JSON beside samples.npz: samples.json.
ADM's files:
https://openaipublic.blob.core.windows.net/diffusion/jul-2021/ref_batches/imagenet/256/ and .../512/
"""
import argparse
import functools
import json
import math
import os
import pickle
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

MAX_REAL = 50_000  # images per half of the reference: FID's customary 50k, and a bound on the time
NUM_MANIFOLD = 10_000  # images of a reference folder for precision and recall, as in ADM's files
STATISTICS = dict(mu=(2048,), sigma=(2048, 2048), mu_s=(2023,), sigma_s=(2023, 2023))  # ADM's names
INCEPTION_URL = ("https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
                 "pt_inception-2015-12-05-6726825d.pth")  # TensorFlow's weights of 2015
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".ppm", ".tif", ".tiff")


def fail(message):
    """Stop the program with one line that names the remedy."""
    raise SystemExit(f"error: {message}")


def read_pictures(files):
    """Picture files of one size to (N,H,W,3) uint8."""
    from PIL import Image
    images = None
    for i, file in enumerate(tqdm(files, "pictures", disable=None, leave=False)):
        try:
            with Image.open(file) as image:
                pixels = np.array(image.convert("RGB"))
        except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
            fail(f"{str(file)!r} cannot be read ({error})")
        if images is None:
            images = np.empty((len(files), *pixels.shape), np.uint8)
        if pixels.shape != images.shape[1:]:
            fail(f"{str(file)!r} is {pixels.shape}, {str(files[0])!r} {images.shape[1:]}: all must "
                 f"have one size")
        images[i] = pixels
    return images


def read_images(path):
    """Images, labels or None, and ADM's statistics of a folder or an .npz."""
    if not (path / "images.npy").exists():
        files = sorted(file for file in path.rglob("*") if file.suffix.lower() in PICTURES)
        if files:
            return read_pictures(files), None, {}
    if path.is_dir():
        return np.load(path / "images.npy", mmap_mode="r"), np.load(path / "labels.npy"), {}
    with np.load(path) as file:
        labels = file["labels"] if "labels" in file else None
        statistics = {name: file[name] for name in STATISTICS if name in file}
        return file["arr_0"], labels, statistics


def load_images(path):
    """Images (N,H,W,3) uint8 (of data/NAME: on disk), labels (N,) or None, ADM's statistics."""
    try:
        images, labels, statistics = read_images(path)
    except (OSError, ValueError, EOFError, KeyError, TypeError, zipfile.BadZipFile,
            zlib.error) as error:  # numpy raises all these
        fail(f"{path} cannot be read ({error}); expected an .npz (arr_0, labels) of --sample, a "
             f"prepare.py folder or a folder of pictures")
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3:
        fail(f"{path}: images are {images.dtype} {images.shape}; expected uint8 (N,H,W,3)")
    if labels is not None and (labels.dtype.kind not in "iu" or labels.shape != images.shape[:1]):
        fail(f"{path}: labels are {labels.dtype} {labels.shape}; expected integers "
             f"({len(images)},)")
    if len(images) < 4:
        fail(f"{path}: {len(images)} images; the covariances need at least 4")
    shapes = {name: array.shape for name, array in statistics.items()}
    if statistics and shapes != STATISTICS:
        fail(f"{path} has some of {', '.join(STATISTICS)}, but not all in ADM's shapes "
             f"{list(STATISTICS.values())}")
    return images, labels, statistics


# --------------------------------------------------------------------------------------------------
# The judge: three stride-2 convolutions, trained by prepare.py
# --------------------------------------------------------------------------------------------------
class Judge(nn.Module):
    """(B,3,R,R) in [-1,1] to logits (B, num_classes + num_words): the label, then caption words."""

    def __init__(self, num_classes, num_words=0, widths=(32, 64, 64)):
        super().__init__()
        layers = []
        for c_in, c_out in zip((3, *widths), widths):
            layers.append(nn.Conv2d(c_in, c_out, 3, stride=2, padding=1, bias=False))
            layers += [nn.BatchNorm2d(c_out), nn.ReLU()]
        self.trunk = nn.Sequential(*layers)
        self.head = nn.Linear(widths[-1], num_classes + num_words)

    def features(self, x):
        """(B,3,R,R) to (B,64): the last convolution, averaged over space; for the distance."""
        return self.trunk(x).mean((2, 3))

    def forward(self, x):
        return self.head(self.features(x))


def load_judge(path):
    """The judge of a file, its number of classes and its resolution."""
    command = f"python prepare.py teacher --data {path.parent}"
    if not path.is_file():
        fail(f"no judge at {path}; train it: {command}, or add --fid")
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        judge = Judge(**saved["config"])
        judge.load_state_dict(saved["model"])
        return judge.eval(), saved["config"]["num_classes"], saved["resolution"]
    except (RuntimeError, KeyError, TypeError, EOFError, pickle.UnpicklingError):
        fail(f"{path} is not a judge of prepare.py: {command} trains one")


@torch.inference_mode()
def run_judge(judge, num_classes, images, rows=None, batch_size=500):
    """Features (N,64) float64, predicted classes (N,) of images (N,R,R,3) uint8, or of its rows."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    judge = judge.to(device)
    rows = np.arange(len(images)) if rows is None else rows
    features = []
    predicted = []
    starts = range(0, len(rows), batch_size)
    for start in tqdm(starts, desc="judge", unit="batch", disable=None, leave=False):
        batch = torch.from_numpy(images[rows[start:start + batch_size]]).to(device)
        x = batch.permute(0, 3, 1, 2) / 127.5 - 1  # (B,R,R,3) -> (B,3,R,R) in [-1,1]
        features.append(judge.features(x))  # -> (B,64)
        predicted.append(judge.head(features[-1])[:, :num_classes].argmax(1))
    return torch.cat(features).cpu().double().numpy(), torch.cat(predicted).cpu().numpy()


# --------------------------------------------------------------------------------------------------
# Frechet distance
# --------------------------------------------------------------------------------------------------
def features_statistics(features):
    """Mean (D,) and unbiased covariance (D,D) of features (N,D), float64."""
    return features.mean(0, dtype=np.float64), np.cov(features, rowvar=False, dtype=np.float64)


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """|mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)) of means (D,) and covariances (D,D).

    tr (S1 S2)^(1/2) is the sum of the square roots of the eigenvalues of S1^(1/2) S2 S1^(1/2), a
    symmetric matrix: two symmetric eigenproblems, exact for singular covariances, where a general
    matrix square root can fail.
    """
    values, vectors = np.linalg.eigh(sigma1)  # rounding makes zeros slightly negative
    root1 = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T  # S1^(1/2)
    trace_root = np.sqrt(np.linalg.eigvalsh(root1 @ sigma2 @ root1).clip(min=0)).sum()
    distance = ((mu1 - mu2) ** 2).sum() + np.trace(sigma1) + np.trace(sigma2) - 2 * trace_root
    return float(distance)


# --------------------------------------------------------------------------------------------------
# ADM's suite: FID-Inception, torchvision's network but for some pools, and what its features give
# --------------------------------------------------------------------------------------------------
def tf1_resize(x, size=299):
    """x (B,C,H,W) float32 to (B,C,size,size) as TensorFlow 1: pixel i reads at i * H / size."""
    for axis in (3, 2):  # without antialias
        position = torch.arange(size, device=x.device, dtype=torch.float32) * (x.shape[axis] / size)
        low = position.long()
        weight = (position - low).view(-1, *[1] * (3 - axis))
        before = x.index_select(axis, low)
        after = x.index_select(axis, (low + 1).clamp(max=x.shape[axis] - 1))
        x = torch.lerp(before, after, weight)
    return x


def fid_inception():
    """FID-Inception without weights, by the names of torchvision's inception_v3, 1008 classes."""
    from torchvision.models import inception as tv

    def with_pool(block, pool):
        class Block(block):
            def _forward(self, x):  # the last branch is conv(pool(x)); twice it costs 5 %
                return [*super()._forward(x)[:-1], self.branch_pool(pool(x))]
        return Block

    window = dict(kernel_size=3, stride=1, padding=1)
    average = functools.partial(F.avg_pool2d, count_include_pad=False, **window)
    largest = functools.partial(F.max_pool2d, **window)
    a, c, e = (with_pool(block, average) for block in (tv.InceptionA, tv.InceptionC, tv.InceptionE))
    blocks = [tv.BasicConv2d, a, tv.InceptionB, c, tv.InceptionD, e, tv.InceptionAux]
    with torch.device("meta"):  # no memory, no random numbers for weights that a file replaces
        net = tv.Inception3(
            num_classes=1008, aux_logits=False, init_weights=False, inception_blocks=blocks)
        net.Mixed_7c = with_pool(tv.InceptionE, largest)(2048)
    return net


def load_inception(path=None):
    """FID-Inception in eval mode, from a file or torch.hub's cache, where it is downloaded once."""
    try:
        if path is None:
            name = INCEPTION_URL.rpartition("/")[2]
            path = Path(torch.hub.get_dir()) / "checkpoints" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if not path.exists():  # written under another name until its hash is right
                torch.hub.download_url_to_file(INCEPTION_URL, str(path), hash_prefix="6726825d")
        net = fid_inception()
        weights = torch.load(path, map_location="cpu", weights_only=True)
        net.load_state_dict(dict(weights), assign=True)
    except (OSError, RuntimeError, EOFError, TypeError, ValueError, KeyError, AttributeError,
            pickle.UnpicklingError) as error:
        reason = str(error).partition("\n")[0]
        fail(f"no FID-Inception at {path} ({type(error).__name__}: {reason}); give the file of "
             f"{INCEPTION_URL} by --inception-ckpt FILE")
    net = net.float().eval().requires_grad_(False)
    return net.to(memory_format=torch.channels_last)  # 1.3 times as fast on a CPU


def inception_features(net, images):
    """images (B,H,W,3) uint8 -> pool features (B,2048) of FID, spatial (B,2023) of sFID."""
    x = (tf1_resize(images.permute(0, 3, 1, 2).float()) - 128) / 128  # (B,3,299,299)
    *blocks, _ = net.named_children()  # in their order of use; the last one is fc
    for name, block in blocks:
        if name == "Mixed_6d":  # (B,192,17,17) -> 7 channels, in TensorFlow's order of axes
            spatial = block.branch1x1(x)[:, :7].permute(0, 2, 3, 1).flatten(1)  # -> (B,17*17*7)
        x = block(x)
    return x.flatten(1), spatial


@torch.inference_mode()
def run_inception(net, images, num_kept, batch_size=64):
    """[mu, sigma, mu_s, sigma_s] of images (N,H,W,3) uint8; pool features of num_kept, in order.

    The kept ones are random. Sums in float64 instead of features_statistics: the features of a
    whole train set would take 20 GB.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    net = net.to(device)
    count = len(images)
    is_kept = torch.from_numpy(np.random.RandomState(0).permutation(count) < num_kept)
    kept = []
    sums = [0, 0]
    products = [0, 0]
    starts = range(0, count, batch_size)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):  # torch's default has 10 bits
        for start in tqdm(starts, "Inception", unit="batch", disable=None, leave=False):
            rows = np.arange(start, min(start + batch_size, count))
            features = inception_features(net, torch.from_numpy(images[rows]).to(device))
            kept.append(features[0][is_kept[rows].to(device)])
            for i, x in enumerate(features):
                sums[i] = sums[i] + x.double().sum(0)  # (D,)
                products[i] = products[i] + x.double().T @ x.double()  # (D,D)
    statistics = []
    for total, product in zip(sums, products):
        covariance = (product - total.outer(total) / count) / (count - 1)
        statistics += [(total / count).cpu().numpy(), covariance.cpu().numpy()]
    return statistics, torch.cat(kept)


def inception_score(pool, weight, split_size=5000):
    """exp(mean KL(p(y|x) || p(y))) of features (N,D) by the last layer's weight alone, no bias."""
    scores = []
    for part in pool.double().split(split_size):  # consecutive images; the last may be smaller
        log_p = F.log_softmax(part @ weight.double().T, dim=1)  # (n,1008); log(softmax) may be -inf
        log_mean = log_p.logsumexp(0) - math.log(len(part))
        divergence = (log_p.exp() * (log_p - log_mean)).sum(1)
        scores.append(divergence.mean().exp())
    return torch.stack(scores).mean().item()


def squared_distances(a, b):
    """a (A,D), b (B,D) -> (A,B), float32; ADM's float16 would move the third decimal."""
    return (a.square().sum(1, keepdim=True) - 2 * (a @ b.T) + b.square().sum(1)).clamp_(min=0)


def ball_radii(x, k=3, block=1000):
    """Squared distances (N,) of x (N,D) to their k-th neighbours; N*N at once may be 10 GB."""
    rows = x.split(block)
    return torch.cat([squared_distances(part, x).kthvalue(k + 1).values for part in rows])  # + self


def precision_recall(real, fake, block=1000):
    """Share of fake (M,D) inside at least one ball of real (N,D), and of real inside fake's."""
    shares = []
    for points, centres in ((fake, real), (real, fake)):
        radii = ball_radii(centres)
        parts = points.split(block)
        inside = [(squared_distances(part, centres) <= radii).any(1) for part in parts]
        shares.append(torch.cat(inside).double().mean().item())
    return shares


# --------------------------------------------------------------------------------------------------
# Samples beside real images
# --------------------------------------------------------------------------------------------------
def split_reference(count, num_samples, seed=0):
    """Disjoint random halves of range(count): the reference; at most num_samples real images."""
    order = np.random.RandomState(seed).permutation(count)  # a folder is sorted by class
    reference = order[:count // 2]
    real = order[count // 2:]
    return np.sort(reference[:MAX_REAL]), np.sort(real[:min(num_samples, MAX_REAL)])


def write_json(path, result):
    """Write the metrics of the samples `path` beside them."""
    output = path.with_name(path.name.removesuffix(".npz") + ".json")
    partial = output.with_name(output.name + ".partial")
    partial.write_text(json.dumps(result, indent=1) + "\n")
    os.replace(partial, output)


def judge_metrics(judge, num_classes, images, labels, target, rows=None):
    """Accuracy, or None without labels, and distance to `target` of images (N,R,R,3) [rows]."""
    features, predicted = run_judge(judge, num_classes, images, rows)
    distance = frechet_distance(*features_statistics(features), *target)
    if labels is None:
        return None, distance
    labels = labels if rows is None else labels[rows]
    return float((predicted == labels).mean()), distance


def print_judge_table(paths, results):
    """A row for each file, and one for real images."""
    first = results[0]
    rows = []
    for path, row in zip(paths, results):
        rows.append((path.name, row["judge_accuracy"], row["judge_fd"], row["num_samples"]))
    rows.append(("real images", first["real_accuracy"], first["real_fd"], first["num_real"]))
    width = max(len(name) for name, *_ in rows)
    print(f"{'':{width}}   judge accuracy   Frechet distance   images")
    for name, accuracy, distance, count in rows:
        share = "no labels" if accuracy is None else f"{accuracy:.1%}"
        print(f"{name:{width}}{share:>17}{distance:>19.3f}{count:>9}")
    print(f"distances are to {first['num_reference']} other images of {first['reference']}; the "
          f"judge is {first['judge']}")
    if len({count for *_, count in rows}) > 1:
        print("note: fewer images give larger distances, so rows of different numbers of images do "
              "not compare")


def judge_table(paths, folder, judge_path):
    """Print the judge's table of these files and write each one's metrics; returns them."""
    root = folder.parent if folder.name == "val" else folder
    reference = root / "val" if (root / "val").is_dir() else folder
    judge_path = judge_path or root / "judge.pt"
    files = [*paths, reference]
    sets = [load_images(path)[:2] for path in files]  # (images, labels)
    judge, num_classes, resolution = load_judge(judge_path)
    for path, (images, labels) in zip(files, sets):
        has_size = images.shape[1:3] == (resolution, resolution)
        if not has_size or labels is not None and not np.isin(labels, range(num_classes)).all():
            fail(f"{path} does not fit the judge {judge_path}, which was trained at {resolution} "
                 f"px for classes 0..{num_classes - 1}: give the data set and the judge that "
                 f"belong to it")
    *samples, (real_images, real_labels) = sets
    others, real = split_reference(len(real_images), len(samples[0][0]))
    features, _ = run_judge(judge, num_classes, real_images, others)
    target = features_statistics(features)
    real_accuracy, real_fd = judge_metrics(
        judge, num_classes, real_images, real_labels, target, real)
    results = []
    for images, labels in samples:
        accuracy, distance = judge_metrics(judge, num_classes, images, labels, target)
        results.append(dict(
            judge_accuracy=accuracy, judge_fd=distance, real_accuracy=real_accuracy,
            real_fd=real_fd, num_samples=len(images), num_real=len(real),
            num_reference=len(others), reference=str(reference), judge=str(judge_path)))
    print_judge_table(paths, results)
    for path, result in zip(paths, results):
        write_json(path, result)
    return results


def adm_metrics(net, images, target, real):
    """FID, sFID, IS, precision and recall against statistics `target`, pool features `real`."""
    statistics, fake = run_inception(net, images, len(images))
    precision, recall = precision_recall(real, fake)
    return dict(
        fid=frechet_distance(*statistics[:2], *target[:2]),
        sfid=frechet_distance(*statistics[2:], *target[2:]),
        inception_score=inception_score(fake, net.fc.weight),
        precision=precision, recall=recall)


def adm_table(paths, reference, inception_ckpt):
    """Print the table of ADM's suite, and write each file's metrics as they come."""
    if missing := [path for path in paths if not path.exists()]:  # now, not after an hour
        fail(f"{missing[0]} cannot be read: no such file or folder")
    images, _, stored = load_images(reference)
    shape = images.shape[1:]
    net = load_inception(inception_ckpt)
    num_kept = len(images) if reference.is_file() else NUM_MANIFOLD
    computed, real = run_inception(net, images, num_kept)
    source = "stored in it" if stored else f"of its {len(images)} images"
    target = list(stored.values()) or computed
    width = max(len(path.name) for path in paths)
    print(f"{'':{width}}      FID     sFID        IS   precision   recall   images")
    results = []
    for path in paths:
        images = None  # frees the images before, perhaps 10 GB
        images, _, _ = load_images(path)
        if images.shape[1:] != shape:
            print(f"note: {path} has {images.shape[2]}x{images.shape[1]} pixels, the reference "
                  f"{shape[1]}x{shape[0]}")
        row = adm_metrics(net, images, target, real)
        print("{:{}}{:9.3f}{:9.3f}{:10.2f}{:12.4f}{:9.4f}{:9}".format(
            path.name, width, *row.values(), len(images)))
        row |= dict(num_samples=len(images), num_real=len(real), reference=str(reference),
                    statistics=source, inception=str(inception_ckpt or INCEPTION_URL))
        write_json(path, row)
        results.append(row)
    print(f"reference: {reference}, statistics {source}, precision and recall by {len(real)} "
          f"images")
    if any(row["num_samples"] != 50_000 for row in results):
        print("note: published metrics are of 50000 samples; fewer give a larger FID")
    return results


def main(argv=None):
    """Print one table, write the metrics of each file beside it; returns them, a dict a file."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("samples", type=Path, nargs="+", help=".npz with arr_0, or a folder; one or more")
    add("reference", type=Path, help="data/NAME (its val/ if there is one), or an .npz")
    add("--judge", type=Path, help="[judge.pt of the reference]")
    add("--fid", action="store_true", help="ADM's suite against data/NAME too")
    add("--inception-ckpt", type=Path, help="--fid by the weights of this file [downloaded]")
    parser.error = lambda message: fail(f"{message} (--help lists the flags)")
    args = parser.parse_args(argv)
    is_adm = args.fid or args.inception_ckpt is not None
    if is_adm and args.judge:
        fail("--judge with --fid or --inception-ckpt: these are two commands")
    if is_adm or not (args.judge or (args.reference / "images.npy").exists()):
        return adm_table(args.samples, args.reference, args.inception_ckpt)
    return judge_table(args.samples, args.reference, args.judge)


if __name__ == "__main__":
    main()

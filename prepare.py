"""Prepares a data set: one folder data/NAME of memory-mapped arrays that every training script reads.

  python prepare.py --images DIR --out data/NAME --resolution 32 --vae none   # image folder; class = sub-folder
  python prepare.py --images DIR2 --out data/NAME/val --resolution 32 --vae none    # optional: held-out images
  python prepare.py teacher --data data/NAME                                  # small vision teacher and judge
  python prepare.py toy --out data/toy                                        # the toy set, its teacher and judge

Written to data/NAME (under data/NAME.partial until complete; a killed run goes on where it stopped):
  images.npy    (N,H,W,3) uint8, centre-cropped as in ADM         labels.npy  (N,) int64, classes in sorted order
  meta.json     source, count, resolution, class names, VAE        captions.json  N strings, where there are captions
  teacher.pt    timm VisionTransformer trained on this set         judge.pt    CNN that evaluate.py judges samples with
  val/          the same for held-out images, optional: evaluate.py's reference
"""

import argparse
import hashlib
import json
import os
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")  # torchvision's list
UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError)  # what PIL raises on bad files
CHUNK = 64  # images per task of a worker: at 256 px 12 MB, a few tenths of a second

# ----------------------------------------------------------------------------------------------------------------------
# The folder: a set appears under its name only when it is complete


def check_out(out):
    """Exits unless a set can be made at `out`: nothing there yet, and for data/NAME/val its data/NAME is there."""
    if (out / "meta.json").is_file():
        raise SystemExit(f"error: {out} is complete already; give another --out, or remove it first: rm -r {out}")
    if out.exists():
        raise SystemExit(f"error: {out} exists and is not a prepared data set; give another --out")
    if out.name == "val" and not (out.parent / "meta.json").is_file():
        raise SystemExit(f"error: {out} holds out images of {out.parent}, which is not there: prepare that first")


def partial_folder(out):
    """data/NAME -> data/NAME.partial, where the set grows until it is complete."""
    return out.with_name(out.name + ".partial")


def write_json(path, value):
    """Writes JSON in one step: the file is either the old or the new one, never half."""
    growing = path.with_name(path.name + ".partial")
    growing.write_text(json.dumps(value) + "\n")
    os.replace(growing, path)


def write_labels_and_meta(folder, labels, source, resolution, class_names, captions=None):
    """Writes all but the images, and checks that the counts agree. meta.json comes last."""
    images = np.load(folder / "images.npy", mmap_mode="r")
    if len(images) != len(labels) or (captions is not None and len(captions) != len(labels)):
        raise SystemExit(f"error: {folder}: {len(images)} images but {len(labels)} labels; remove it and start again")
    np.save(folder / "labels.npy", np.asarray(labels, dtype=np.int64))
    if captions is not None:
        write_json(folder / "captions.json", captions)
    write_json(folder / "meta.json", {
        "format": 1, "source": source, "count": len(labels), "resolution": resolution,
        "num_classes": len(class_names), "class_names": class_names,
        "vae": None, "channels": 3, "latent_scale": 1.0, "latent_shift": 0.0,
    })


def check_same_classes(name, class_names, resolution, meta):
    """Exits if held-out images `name` differ from their data set (its meta dict) in classes or resolution."""
    if class_names != meta["class_names"] or resolution != meta["resolution"]:
        raise SystemExit(f"error: {name} has {len(class_names)} classes at {resolution} px, its data set "
                         f"{meta['num_classes']} at {meta['resolution']} px; names and resolution must be the same")


# ----------------------------------------------------------------------------------------------------------------------
# Image folder -> images.npy


def list_images(root):
    """Image folder -> (paths relative to root, labels, class names, number of other files). Sorted; exits if empty."""
    if not root.is_dir():
        raise SystemExit(f"error: --images {root} is not a folder")
    class_names = sorted(entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    files, labels, others = [], [], 0
    for label, name in enumerate(class_names or [""]):  # no sub-folders: one class
        found = []
        for folder, subfolders, names in os.walk(root / name, followlinks=True):
            subfolders[:] = [entry for entry in subfolders if not entry.startswith(".")]
            images = [n for n in names if n.lower().endswith(IMAGE_SUFFIXES) and not n.startswith(".")]
            found += [os.path.relpath(os.path.join(folder, n), root) for n in images]
            others += len(names) - len(images)
        if not found:
            raise SystemExit(f"error: no images in {root / name}: remove that folder or put files there that end in "
                             + " ".join(IMAGE_SUFFIXES))
        files += sorted(found)
        labels += [label] * len(found)
    if class_names:
        others += sum(entry.is_file() for entry in root.iterdir())
    return files, labels, class_names or [root.resolve().name], others


def center_crop(image, size):
    """PIL image -> (size, size, 3) array, as ADM, DiT, SiT and REPA crop it.

    github.com/openai/guided-diffusion: BOX halvings while the image is at least twice too large, BICUBIC to a short
    side of `size` (also upwards), then the centre. The published reference statistics were made with this crop.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return np.array(image)[top : top + size, left : left + size]


def read_image(path, resolution):
    """Image file -> (R,R,3) uint8. Raises one of UNREADABLE."""
    with Image.open(path) as image:
        if image.mode.startswith("I"):  # 16-bit greyscale: PIL's own conversion clips all but the darkest to white
            image = Image.fromarray((np.asarray(image) // 256).clip(0, 255).astype(np.uint8))
        if image.mode == "F":
            raise ValueError("floating-point pixels have no agreed range")
        return center_crop(image.convert("RGB"), resolution)


def decode_chunk(indices, files, folder, resolution):
    """Decodes files[indices] into folder/images.npy and marks them in done.npy -> (count, [(index, reason)])."""
    images = np.load(folder / "images.npy", mmap_mode="r+")
    done = np.load(folder / "done.npy", mmap_mode="r+")
    failures = []
    for i in indices:
        try:
            images[i] = read_image(files[i], resolution)
        except UNREADABLE as error:
            failures.append((int(i), str(error).split("\n")[0]))
        else:
            done[i] = True  # after the pixels: the page cache keeps both when the process is killed
    return len(indices), failures


def open_partial(folder, plan, resolution):
    """Makes folder with empty images.npy and done.npy, or keeps those of a killed run with the same plan."""
    if (folder / "plan.json").is_file():
        if json.loads((folder / "plan.json").read_text()) == plan:
            return
        print(f"{folder} was begun with other images or settings: starting again")
    if folder.exists():
        shutil.rmtree(folder)
    need = plan["count"] * resolution**2 * 3
    folder.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder.parent).free
    if need > free:  # a memory map on a full disk dies by a signal, so ask before
        raise SystemExit(f"error: {folder.parent} has {free / 1e9:.1f} GB free, {need / 1e9:.1f} GB are needed; "
                         "free some, or give --out on another disk")
    folder.mkdir()
    np.lib.format.open_memmap(folder / "images.npy", "w+", np.uint8, (plan["count"], resolution, resolution, 3))
    np.save(folder / "done.npy", np.zeros(plan["count"], dtype=bool))
    write_json(folder / "plan.json", plan)  # last: without it the folder is not resumed


def decode_images(root, files, folder, resolution, workers):
    """Decodes what done.npy lacks, in `workers` processes -> [(index, reason)] of the unreadable files."""
    todo = np.flatnonzero(~np.load(folder / "done.npy"))
    if len(todo) < len(files):
        print(f"resuming: {len(files) - len(todo)} of {len(files)} images are there already")
    paths = [os.path.join(root, file) for file in files]
    chunks = np.split(todo, range(CHUNK, len(todo), CHUNK)) if len(todo) else []
    # A DataLoader for its processes: they end with their parent, even a killed one, and pass its errors on.
    decode = partial(decode_chunk, files=paths, folder=folder, resolution=resolution)
    loader = torch.utils.data.DataLoader(chunks, batch_size=None, collate_fn=decode, num_workers=workers)
    failures = []
    with tqdm(total=len(files), initial=len(files) - len(todo), desc="images", unit="image", disable=None) as bar:
        try:
            for count, failed in loader:
                failures += failed
                bar.update(count)
        except RuntimeError as error:  # a worker was killed, by want of memory or disk
            reason = str(error).split("\n")[0]
            raise SystemExit(f"error: {reason} Run the command again with fewer --workers: it resumes") from None
    return failures


def drop_unreadable(folder):
    """Rewrites images.npy without the rows that done.npy lacks -> (N,) bool of the rows kept."""
    kept = np.load(folder / "done.npy")
    if not kept.all():
        images = np.load(folder / "images.npy", mmap_mode="r")
        growing = folder / "images.partial.npy"
        compact = np.lib.format.open_memmap(growing, "w+", images.dtype, (int(kept.sum()), *images.shape[1:]))
        rows = np.flatnonzero(kept)
        for start in tqdm(range(0, len(rows), 1000), desc="leaving out unreadable images", disable=None):
            compact[start : start + 1000] = images[rows[start : start + 1000]]
        compact.flush()
        (folder / "plan.json").unlink()  # from here on a kill means starting again: rows no longer are files
        os.replace(growing, folder / "images.npy")
    return kept


def prepare_images(root, out, resolution, workers):
    """Image folder `root` -> data set `out` in pixel space. Exits with one line on any error."""
    check_out(out)
    files, labels, class_names, others = list_images(root)
    if out.name == "val":
        check_same_classes(root, class_names, resolution, json.loads((out.parent / "meta.json").read_text()))
    size = len(files) * resolution**2 * 3
    print(f"{root}: {len(files)} images in {len(class_names)} classes"
          + (f", {others} other files ignored" if others else ""))
    print(f"{out}: needs {size / 1e9:.3f} GB of disk at {resolution}x{resolution}")

    folder = partial_folder(out)
    listing = hashlib.sha256("\n".join(files).encode("utf-8", "surrogateescape")).hexdigest()
    plan = {"source": str(root), "count": len(files), "resolution": resolution, "listing": listing}
    open_partial(folder, plan, resolution)
    failures = decode_images(root, files, folder, resolution, workers)
    for index, reason in failures:
        print(f"unreadable, left out: {files[index]!r} ({reason})")  # !r: names on disk may be no valid text
    if len(failures) == len(files):
        raise SystemExit(f"error: none of the {len(files)} files in {root} could be read")

    kept = drop_unreadable(folder)
    if kept.sum() + len(failures) != len(files):
        raise SystemExit(f"error: {kept.sum()} images read, {len(failures)} failed, {len(files)} listed: remove "
                         f"{folder} and start again")
    write_labels_and_meta(folder, np.array(labels)[kept], str(root), resolution, class_names)
    (folder / "plan.json").unlink(missing_ok=True)
    (folder / "done.npy").unlink()
    os.replace(folder, out)
    print(f"{out}: {kept.sum()} images, {len(class_names)} classes")


# ----------------------------------------------------------------------------------------------------------------------
# The toy set: "a red disc on a dark blue background", 16x16

SHAPES = ["disc", "square", "triangle", "cross", "ring", "diamond", "bar", "pillar"]
COLOURS = {"red": (230, 40, 40), "green": (40, 190, 60), "blue": (50, 80, 240),
           "yellow": (245, 220, 40), "magenta": (220, 60, 220), "cyan": (40, 210, 220)}


def draw_shape(name, x, y):
    """Coordinates (radius 1, y downwards), any broadcastable shapes -> bool: inside the shape."""
    ax, ay = abs(x), abs(y)
    if name == "disc":
        return x**2 + y**2 <= 1
    if name == "square":
        return np.maximum(ax, ay) <= 0.85
    if name == "triangle":
        return (y <= 0.8) & (ax <= (y + 1) / 1.8)
    if name == "cross":
        return (np.minimum(ax, ay) <= 0.3) & (np.maximum(ax, ay) <= 1)
    if name == "ring":
        return (x**2 + y**2 <= 1) & (x**2 + y**2 >= 0.3)
    if name == "diamond":
        return ax + ay <= 1
    if name == "bar":
        return (ax <= 1) & (ay <= 0.35)
    return (ax <= 0.35) & (ay <= 1)  # pillar


def make_toy_set(count, seed, resolution=16):
    """Draws the toy set -> images (N,R,R,3) uint8, labels (N,) int64 = shape, captions [N strings].

    Placement decides how hard the set is: wider (+-0.25, radius 0.5 to 0.7) halves a student's accuracy.
    """
    rng = np.random.RandomState(seed)  # its stream is frozen for ever, unlike default_rng's
    labels = rng.randint(len(SHAPES), size=count)
    colour = rng.randint(len(COLOURS), size=count)
    ground = (colour + 1 + rng.randint(len(COLOURS) - 1, size=count)) % len(COLOURS)  # another of the six
    centre = rng.uniform(-0.12, 0.12, size=(count, 2, 1, 1)).astype(np.float32)
    radius = rng.uniform(0.65, 0.85, size=(count, 1, 1)).astype(np.float32)

    axis = ((np.arange(3 * resolution) + 0.5) / (1.5 * resolution) - 1).astype(np.float32)  # 3x3 samples a pixel
    cover = np.empty((count, resolution, resolution, 1), np.float32)
    for label, name in enumerate(SHAPES):
        rows = np.flatnonzero(labels == label)
        x = (axis[None, None, :] - centre[rows, 0]) / radius[rows]  # (n,1,3R)
        y = (axis[None, :, None] - centre[rows, 1]) / radius[rows]  # (n,3R,1)
        inside = draw_shape(name, x, y).reshape(len(rows), resolution, 3, resolution, 3)
        cover[rows, ..., 0] = inside.mean((2, 4))

    palette = np.array(list(COLOURS.values()), np.float32)
    back = 0.35 * palette[ground][:, None, None]  # (N,1,1,3)
    images = back + cover * (palette[colour][:, None, None] - back)
    names = list(COLOURS)
    captions = [f"a {names[c]} {SHAPES[s]} on a dark {names[g]} background" for s, c, g in zip(labels, colour, ground)]
    return images.round().astype(np.uint8), labels.astype(np.int64), captions


def prepare_toy(out, count=20_000, val_count=4_000, steps=300, judge_steps=200):
    """Writes the toy set with val/, teacher.pt and judge.pt to `out`: all of it or nothing."""
    check_out(out)
    folder = partial_folder(out)
    if folder.exists():
        shutil.rmtree(folder)
    for part, n, seed in ((folder, count, 0), (folder / "val", val_count, 1)):
        images, labels, captions = make_toy_set(n, seed)
        part.mkdir(parents=True)
        np.save(part / "images.npy", images)
        write_labels_and_meta(part, labels, f"toy, seed {seed}", images.shape[1], SHAPES, captions)
    print(f"{out}: {count} images and {val_count} held out, {len(SHAPES)} classes")
    train_teacher_and_judge(folder, patch_size=4, steps=steps, judge_steps=judge_steps)
    os.replace(folder, out)


# ----------------------------------------------------------------------------------------------------------------------
# The small vision teacher and the judge: two classifiers of the set, trained apart


def caption_words(captions):
    """Captions -> sorted [(position, word)] that tell captions apart: in 1 % to 99 % of them.

    With its position a word of a template is a role: "blue" 2nd is the shape's colour, 7th the background's.
    """
    counts = {}
    for caption in captions:
        for entry in enumerate(caption.split()):
            counts[entry] = counts.get(entry, 0) + 1
    return sorted(entry for entry, n in counts.items() if 0.01 <= n / len(captions) <= 0.99)


def caption_targets(captions, words):
    """N captions, W (position, word) pairs -> (N,W) float32 of 0 and 1: which pairs a caption holds."""
    column = {entry: i for i, entry in enumerate(words)}
    targets = torch.zeros(len(captions), len(words))
    for i, caption in enumerate(captions):
        targets[i, [column[entry] for entry in enumerate(caption.split()) if entry in column]] = 1
    return targets


def load_labelled(folder):
    """data/NAME -> train and held-out sets, each (images, labels, captions or None), and meta. Exits on misfits."""
    from evaluate import load_folder

    def load(part):
        """data/NAME -> (images, labels, captions or None), meta."""
        images, labels, meta = load_folder(part)
        path = part / "captions.json"
        captions = json.loads(path.read_text()) if path.is_file() else None
        return (images, torch.from_numpy(labels), captions), meta

    train, meta = load(folder)
    if meta["num_classes"] < 2:
        raise SystemExit(f"error: {folder} has one class; a teacher and a judge need labels that differ")
    if (folder / "val").is_dir():
        held_out, val_meta = load(folder / "val")
        check_same_classes(folder / "val", val_meta["class_names"], val_meta["resolution"], meta)
        return train, held_out, meta

    is_held_out = np.arange(meta["count"]) % 20 == 0  # no val/: every 20th image; folders are sorted by class
    parts = []
    for rows in (np.flatnonzero(~is_held_out), np.flatnonzero(is_held_out)):
        captions = None if train[2] is None else [train[2][i] for i in rows]
        parts.append((train[0][rows], train[1][rows], captions))
    return *parts, meta


def to_input(images, device):
    """(B,R,R,3) uint8 array -> (B,3,R,R) float in [-1,1], i.e. mean = std = 0.5."""
    return torch.tensor(images).to(device).permute(0, 3, 1, 2) / 127.5 - 1  # torch.tensor copies: the map is read-only


def train_classifier(name, network, images, labels, targets, steps, lr, noise, seed, device):
    """Trains network: (B,3,R,R) -> logits of the K labels, then of the W caption words. 128 images a step, AdamW.

    labels (N,) int64; targets (N,W) of 0 and 1, W = 0 without captions; noise: up to this std is added to the images.
    """
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(network.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
    network.to(device).train()
    for _ in tqdm(range(steps), desc=name, unit="step", disable=None):
        rows = torch.randint(len(labels), (128,), generator=generator)
        x = to_input(images[rows.numpy()], device)
        if noise > 0:
            std = noise * torch.rand(128, 1, 1, 1, generator=generator)
            x = x + (std * torch.randn(x.shape, generator=generator)).to(device)
        logits, y, words = network(x), labels[rows].to(device), targets[rows].to(device)
        num_classes = logits.shape[1] - words.shape[1]
        loss = F.cross_entropy(logits[:, :num_classes], y)
        loss = loss + F.binary_cross_entropy_with_logits(logits[:, num_classes:], words, reduction="sum") / len(words)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


@torch.inference_mode()
def measure_accuracy(network, images, labels, targets, device):
    """Held-out images -> share with the right label, and share with every caption word right (None without)."""
    network.eval()
    num_words = targets.shape[1]
    logits = torch.cat([network(to_input(images[i : i + 500], device)).cpu() for i in range(0, len(images), 500)])
    label_logits, word_logits = logits.split([logits.shape[1] - num_words, num_words], dim=1)
    accuracy = (label_logits.argmax(1) == labels).float().mean().item()
    return accuracy, ((word_logits > 0) == targets.bool()).all(1).float().mean().item() if num_words else None


def train_teacher_and_judge(folder, patch_size, steps, judge_steps):
    """Trains both networks on data/NAME and writes teacher.pt and judge.pt there, with their held-out accuracies."""
    from timm.models.vision_transformer import VisionTransformer

    from evaluate import Judge

    (images, labels, captions), (held_images, held_labels, held_captions), meta = load_labelled(folder)
    resolution, num_classes = meta["resolution"], meta["num_classes"]
    if resolution % patch_size:
        raise SystemExit(f"error: --patch-size {patch_size} does not divide the resolution {resolution} of {folder}")
    words = caption_words(captions) if captions and held_captions else []
    targets, held_targets = (caption_targets(c, words) if words else torch.zeros(n, 0)
                             for c, n in ((captions, len(labels)), (held_captions, len(held_labels))))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    torch.manual_seed(0)  # the weights; the batches have generators of their own
    config = {"img_size": resolution, "patch_size": patch_size, "embed_dim": 64, "depth": 4, "num_heads": 4,
              "num_classes": 0, "class_token": True}
    teacher = VisionTransformer(**config)
    head = torch.nn.Linear(config["embed_dim"], num_classes + len(words))  # thrown away: the features remain
    judge_config = {"num_classes": num_classes, "num_words": len(words)}
    judge = Judge(**judge_config)

    for name, network, trunk, kwargs, n, lr, noise, seed in (
        ("teacher", torch.nn.Sequential(teacher, head), teacher, config, steps, 3e-3, 0.0, 1),
        ("judge", judge, judge, judge_config, judge_steps, 1e-2, 0.15, 2),  # noise: samples are never quite clean
    ):
        train_classifier(name, network, images, labels, targets, n, lr, noise, seed, device)
        accuracy, word_accuracy = measure_accuracy(network, held_images, held_labels, held_targets, device)
        saved = {"config": kwargs, "model": trunk.cpu().state_dict(), "accuracy": accuracy, "resolution": resolution,
                 "words": words, "word_accuracy": word_accuracy}
        torch.save(saved, folder / f"{name}.pt.partial")
        os.replace(folder / f"{name}.pt.partial", folder / f"{name}.pt")
        print(f"{name}: {100 * accuracy:.2f} % of {len(held_labels)} held-out images"
              + ("" if word_accuracy is None else f", all caption words right {100 * word_accuracy:.2f} %"))


# ----------------------------------------------------------------------------------------------------------------------
# Command line


def parse(argv):
    """Command line -> namespace with `form` None (image folder), "toy" or "teacher"."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.add_argument("--images", type=Path, help="folder with one sub-folder per class, or with images only")
    parser.add_argument("--out", type=Path, help="data/NAME, or data/NAME/val for held-out images")
    parser.add_argument("--resolution", type=int, default=256, help="pixels a side after the crop (default 256)")
    parser.add_argument("--vae", default="ft-mse", help="autoencoder of the latents; only 'none' (pixels) for now")
    parser.add_argument("--workers", type=int, default=min(8, os.cpu_count()), help="processes; 0: none besides this")
    forms = parser.add_subparsers(dest="form", title="other forms")
    toy = forms.add_parser("toy", help="the toy set, its teacher and judge")
    toy.add_argument("--out", type=Path, default=Path("data/toy"))
    teacher = forms.add_parser("teacher", help="train teacher.pt and judge.pt on a prepared data set")
    teacher.add_argument("--data", type=Path, required=True, help="data/NAME")
    teacher.add_argument("--patch-size", type=int, default=4, help="pixels per token of the student (default 4)")
    teacher.add_argument("--steps", type=int, default=300, help="teacher's steps of 128 images (default 300)")
    teacher.add_argument("--judge-steps", type=int, default=200, help="judge's steps of 128 images (default 200)")
    args = parser.parse_args(argv)
    for flag, least in (("resolution", 1), ("workers", 0), ("patch_size", 1), ("steps", 1), ("judge_steps", 1)):
        if getattr(args, flag, least) < least:
            raise SystemExit(f"error: --{flag.replace('_', '-')} must be at least {least}")
    return args


def main(argv=None):
    """Command line."""
    args = parse(argv)
    if args.form == "toy":
        return prepare_toy(args.out)
    if args.form == "teacher":
        return train_teacher_and_judge(args.data, args.patch_size, args.steps, args.judge_steps)
    if args.images is None or args.out is None:
        raise SystemExit("error: --images and --out are required (or one of the forms toy, teacher; see --help)")
    if args.vae != "none":
        raise SystemExit("error: only --vae none (pixel space) is supported")
    return prepare_images(args.images, args.out, args.resolution, args.workers)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit("stopped: the same command goes on with what is there") from None

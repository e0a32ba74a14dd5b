"""Prepare a data set: images in, one folder data/NAME of memory-mapped arrays out, which every script here reads.

Images are decoded, cropped and encoded once; training only copies rows. Two classifiers of the set are trained apart: a
vision teacher to align with, and a judge that says what samples show.

    python prepare.py --images DIR --out data/imagenet256                           image folder; a sub-folder = a class
    torchrun --nproc_per_node=8 prepare.py --images DIR --out data/imagenet256      the same, by all GPUs of a machine
    python prepare.py --from-repa DIR --out data/imagenet256                        REPA's folders images/ and vae-sd/
    python prepare.py --images DIR --out data/NAME --resolution 32 --vae none       pixel space: no autoencoder
    python prepare.py --images DIR2 --out data/NAME/val --resolution 32 --vae none  optional: held-out images
    python prepare.py --images DIR --out data/NAME --vae runs/reals-f8d4/vae.pt     by an autoencoder of reals.py
    python prepare.py --from data/toy --out data/NAME --vae runs/reals-toy/vae.pt   the same, of a prepared set
    python prepare.py teacher --data data/NAME                                      teacher and judge of any set
    python prepare.py toy --out data/toy                                            the toy set with teacher and judge
    python prepare.py pairs --out data/pairs                                        softrepa.py's toy: set and model
    python prepare.py text --images DIR --captions FILE --out data/NAME             SD3's latents and text features

Written, under data/NAME.partial until complete (the same command continues a killed one): images.npy (N,H,W,3) uint8,
moments.npy (N,8,H/8,W/8) float16, the autoencoder's mean and std, labels.npy (N,) int64, meta.json and, for the toy,
captions.json; teacher.pt, a timm VisionTransformer, and judge.pt, a CNN for evaluate.py; val/ with held-out images,
labels and meta, the reference of evaluate.py. The last two forms write context.npy and pooled.npy, features of texts.
"""
import argparse
import datetime
import functools
import hashlib
import itertools
import json
import math
import os
import shutil
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from torch import distributed as dist
from tqdm import tqdm

from common import (CLIP_LENGTH, LATENT_SCALE, SD3_VAE_META, VAE_REPOS, CaptionedData, MMDiT, PreparedData, fail,
                    first_line, first_rank_first, init_linear, interpolate, load_sd3_text, load_sd3_vae, load_vae,
                    make_folder, read_latent_stats, save_checkpoint, say)

RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # torchrun sets them
# What all bars share: one for all ranks, and in a log file a line a minute, for the time left.
BAR = dict(disable=RANK > 0) | ({} if sys.stderr.isatty() else dict(mininterval=60, maxinterval=60))


# ---------------------------------------------------------------------------------------------------------------------
# Images -> data/NAME, which appears under its name only when it is complete
# ---------------------------------------------------------------------------------------------------------------------
def read_meta(folder):
    """meta.json of a prepared data set."""
    try:
        return json.loads((folder / "meta.json").read_text())
    except (OSError, ValueError) as error:
        fail(f"{folder} is not a prepared data set ({error}); prepare that first, --help shows how")


def vae_meta(name):
    """What meta.json says of latents by this --vae: ft-mse or ft-ema, a file of reals.py, or none."""
    if name == "none":
        return {}
    if name in VAE_REPOS:
        return dict(vae=f"sd-vae-{name}", channels=4, latent_scale=LATENT_SCALE)
    return read_latent_stats(name)


def write_labels_and_meta(folder, labels, source, resolution, class_names, captions=None, **more):
    """Write all but images and moments; `more` is added to meta.json."""
    np.save(folder / "labels.npy", np.asarray(labels, dtype=np.int64))
    if captions is not None:
        (folder / "captions.json").write_text(json.dumps(captions) + "\n")
    meta = dict(format=1, source=source, count=len(labels), resolution=resolution, num_classes=len(class_names),
                class_names=class_names, vae=None, channels=3, latent_scale=1.0, latent_shift=0.0) | more
    if "vae_id" in meta:
        meta["source"] += f", encoded by {meta['vae_id']}"  # what a run compares before it continues
    (folder / "meta.json").write_text(json.dumps(meta) + "\n")


def list_images(root):
    """Files, labels and class names of an image folder, in sorted order; without sub-folders it is one class."""
    from torchvision.datasets.folder import IMG_EXTENSIONS, find_classes, make_dataset
    root = root.resolve()
    try:
        is_flat = not any(entry.is_dir() for entry in root.iterdir())
        parent, classes = (root.parent, {root.name: 0}) if is_flat else (root, find_classes(root)[1])
        files, labels = zip(*make_dataset(parent, classes, IMG_EXTENSIONS))
    except OSError as error:  # no such folder, or a class without images
        fail(f"--images {root}: {error}")
    return files, np.array(labels), list(classes)


def center_crop(image, size):
    """PIL image to (size,size,3), exactly as ADM, DiT, SiT and REPA: published reference statistics were made so."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return np.array(image)[top:top + size, left:left + size]


def read_image(file, resolution):
    """Image file to (R,R,3) uint8, or to a line that says why it cannot be read."""
    try:
        with Image.open(file) as image:
            image = image.point(lambda v: v / 256) if image.mode.startswith("I") else image  # 16-bit; convert() clips
            return center_crop(image.convert("RGB"), resolution)
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:  # PIL raises all these
        return str(error).split("\n")[0]


def list_repa(root):
    """Pairs of files (image, moments), labels and class names of REPA's folders, paired in sorted order as there."""
    def listed(part):
        try:
            labels = json.loads((root / part / "dataset.json").read_text())["labels"]
            return sorted((str(root / part / name), int(label)) for name, label in labels)
        except (OSError, ValueError, KeyError, TypeError) as error:
            fail(f"{root / part}/dataset.json lists no files and classes ({first_line(error)}); --from-repa wants the "
                 f"folder of REPA's preprocessing that holds images/ and vae-sd/")
    pairs = list(itertools.zip_longest(listed("images"), listed("vae-sd"), fillvalue=("no file", None)))
    for (image, label), (moments, moments_label) in pairs:
        if label != moments_label:
            fail(f"{image} (class {label}) and {moments} (class {moments_label}) should be a pair: preprocess again")
    labels = np.array([label for (_, label), _ in pairs])
    class_names = [str(i) for i in range(max(labels, default=-1) + 1)]  # all that the format keeps of them
    return [(image, moments) for (image, _), (moments, _) in pairs], labels, class_names


def read_pair(pair, resolution):
    """Pair of list_repa to arrays (R,R,3) and (8,R/8,R/8), or to a line that says what is wrong with a file."""
    arrays, shapes = [], ((resolution, resolution, 3), (8, resolution // 8, resolution // 8))
    for file, shape in zip(pair, shapes):
        try:
            arrays.append(np.load(file) if file.endswith(".npy") else np.array(Image.open(file)))
        except (OSError, SyntaxError, ValueError, EOFError) as error:
            return f"{file} cannot be read ({first_line(error)}): preprocess again"
        if arrays[-1].shape != shape:
            return f"{file} has shape {arrays[-1].shape}, not {shape}: give its --resolution, or preprocess again"
    if not (abs(arrays[1]).max() < 65504 and arrays[1][4:].min() >= 0):  # some codes store the log-variance
        return f"{pair[1]} holds no mean and std, or none that float16 can hold: preprocess again"
    return arrays


@torch.inference_mode()
def encode_images(vae, images, moments, done, batch=8):
    """Fill moments (N,8,h,w), the mean and std of images (N,R,R,3), where done (N,) does not say that they are there.

    Batches are the same rows for ever, so neither a kill nor the number of ranks changes a bit. fp32; on CUDA PyTorch's
    default rounds what enters a convolution to TF32, as in REPA's own preprocessing and as finely as float16.
    """
    device = f"cuda:{RANK % torch.cuda.device_count()}" if torch.cuda.is_available() else "cpu"
    vae.to(device)
    todo = [slice(i, i + batch) for i in range(RANK * batch, len(images), WORLD * batch) if not done[i:i + batch].all()]
    for rows in tqdm(todo, "moments", unit="img", unit_scale=batch, **BAR):
        x = torch.tensor(images[rows], device=device).permute(0, 3, 1, 2) / 127.5 - 1  # (B,3,R,R) in [-1,1]
        encoded = torch.cat(vae.encode(x), dim=1).half()
        if not encoded.isfinite().all():
            raise SystemExit("error: the VAE gives a mean or std that is not finite in float16: is its file right?")
        moments[rows], done[rows] = encoded.cpu().numpy(), True


def open_vae(args, resolution, plan):
    """The autoencoder that encodes, and the shape of an image's moments; `plan`, a hash, takes in its weights."""
    vae = load_vae(args.vae, args.vae_ckpt)
    if resolution % vae.factor:
        fail(f"the resolution {resolution} is no multiple of {vae.factor}, the pixels per latent of --vae {args.vae}")
    for weight in (*vae.encoder.parameters(), *vae.quant_conv.parameters()):
        plan.update(weight.numpy())
    return vae, (2 * vae.latent_channels, resolution // vae.factor, resolution // vae.factor)


def prepare_images(args):
    """Image folder args.images, or REPA's folders in args.from_repa, to the data set args.out; by all ranks."""
    root, out, resolution = args.from_repa or args.images, args.out, args.resolution
    files, labels, class_names = list_repa(root) if args.from_repa else list_images(root)
    if out.name == "val":
        meta, numbers = read_meta(out.parent), [str(i) for i in range(len(class_names))]  # the names of --from-repa
        if meta["class_names"] not in (class_names, numbers) or resolution != meta["resolution"]:
            fail(f"{root} and {out.parent} must have the same classes, and the same --resolution {meta['resolution']}")
    plan, vae = hashlib.sha256(repr((resolution, args.vae == "none", files)).encode()), None
    shapes = dict(images=(np.uint8, (len(files), resolution, resolution, 3)))
    if args.images and args.vae != "none":
        vae, moments_shape = open_vae(args, resolution, plan)  # before all else, so that a wrong file shows now
        shapes["moments"] = np.float16, (len(files), *moments_shape)
    elif args.vae != "none":
        shapes["moments"] = np.float16, (len(files), 8, resolution // 8, resolution // 8)
    need = sum(math.prod(shape) * np.dtype(dtype).itemsize for dtype, shape in shapes.values())
    say(f"{root}: {len(files)} images in {len(class_names)} classes; {out} needs {need / 1e9:.3f} GB of disk")

    # done-*.npy (N,2) says which images and which moments are there, and by its name of what: a killed run goes on.
    folder = out.with_name(out.name + ".partial")
    done_file = folder / f"done-{plan.hexdigest()}.npy"
    with first_rank_first():
        if not done_file.is_file():
            shutil.rmtree(folder, ignore_errors=True)
            make_folder(folder.parent)
            if need > shutil.disk_usage(folder.parent).free:  # a memory map on a full disk dies by a signal: ask before
                fail(f"{folder.parent} does not have so many GB free; free some, or give --out on another disk")
            make_folder(folder)
            for name, (dtype, shape) in shapes.items():
                np.lib.format.open_memmap(folder / f"{name}.npy", "w+", dtype, shape)
            np.save(done_file, np.zeros((len(files), 2), dtype=bool))
        done, *arrays = [np.load(file, "r+") for file in (done_file, *(folder / f"{name}.npy" for name in shapes))]
        if done.any():
            say(f"resuming: {done[:, 0].sum()} of {len(files)} images are there already, {done[:, 1].sum()} encoded")

    todo = [i for i in range(RANK, len(files), WORLD) if not done[i, 0]]  # whose an image is depends on its number only
    read = functools.partial(read_pair if args.from_repa else read_image, resolution=resolution)
    loader = torch.utils.data.DataLoader(files, None, sampler=todo, num_workers=args.workers, collate_fn=read)
    for i, parts in tqdm(zip(todo, loader), "images", len(todo), unit="img", **BAR):
        if not isinstance(parts, str):
            for array, part in zip(arrays, parts if args.from_repa else [parts]):
                array[i] = part
            done[i] = True, args.from_repa is not None  # now; the page cache keeps all when the process is killed
        elif args.from_repa:
            raise SystemExit(f"error: {parts}")
        else:
            tqdm.write(f"unreadable, left out: {files[i]!r} ({parts})")  # !r: names on disk may be no valid text
    if WORLD > 1:
        dist.barrier()  # a batch to encode holds images of several ranks
    if vae is not None:
        encode_images(vae, *arrays, done[:, 1])
    if WORLD > 1:
        dist.barrier()
    if RANK > 0:
        return

    # One process leaves out what could not be read, writes the rest, and gives the folder its name.
    kept = np.flatnonzero(done[:, 0])
    if len(kept) == 0:
        fail(f"none of the {len(files)} files in {root} could be read")
    if left_out := len(files) - len(kept):
        if need > shutil.disk_usage(folder).free:
            fail(f"leaving out {left_out} unreadable images takes {need / 1e9:.3f} GB more for a while: free them")
        for name, array in zip(shapes, arrays):
            shape = (len(kept), *array.shape[1:])
            compact = np.lib.format.open_memmap(folder / f"{name}.tmp", "w+", array.dtype, shape)
            for i, row in enumerate(tqdm(kept, f"{name} without {left_out} unreadable ones", **BAR)):
                compact[i] = array[row]
        done_file.unlink()  # from here on a kill means starting again: rows are no longer files
        for name in shapes:
            os.replace(folder / f"{name}.tmp", folder / f"{name}.npy")
    write_labels_and_meta(folder, labels[kept], str(root), resolution, class_names, **vae_meta(args.vae))
    PreparedData(folder, resolution)  # as every script opens it: counts and shapes are right
    os.replace(folder, out)
    (out / done_file.name).unlink(missing_ok=True)  # last: nothing is lost by a kill before it
    print(f"{out}: {len(kept)} images, {len(class_names)} classes"
          + f"; {left_out} unreadable ones, named above, are left out" * bool(left_out))


def prepare_again(args):
    """A prepared data set, args.prepared, with the latents of another autoencoder, to args.out; by all ranks.

    Files that stay the same are linked, not copied, where the disk allows it: ImageNet's images.npy has 252 GB.
    """
    root, out = args.prepared, args.out
    meta = read_meta(root)
    data, plan = PreparedData(root, meta["resolution"]), hashlib.sha256(str(root.resolve()).encode())
    vae, moments_shape = open_vae(args, meta["resolution"], plan)
    need = 2 * len(data) * math.prod(moments_shape)
    say(f"{root}: {len(data)} images; {out} needs {need / 1e9:.3f} GB of disk, and shares the images with it")
    folder = out.with_name(out.name + ".partial")
    done_file = folder / f"done-{plan.hexdigest()}.npy"
    with first_rank_first():
        if not done_file.is_file():
            shutil.rmtree(folder, ignore_errors=True)
            make_folder(folder)
            if need > shutil.disk_usage(folder).free:
                fail(f"{folder.parent} does not have so many GB free; free some, or give --out on another disk")
            for name in ("images.npy", "captions.json", "teacher.pt", "judge.pt", "val"):
                if (root / name).is_dir():
                    shutil.copytree(root / name, folder / name, copy_function=link_or_copy)
                elif (root / name).exists():
                    link_or_copy(root / name, folder / name)
            np.lib.format.open_memmap(folder / "moments.npy", "w+", np.float16, (len(data), *moments_shape))
            np.save(done_file, np.zeros(len(data), dtype=bool))
        moments, done = (np.load(file, "r+") for file in (folder / "moments.npy", done_file))
        if done.any():
            say(f"resuming: {done.sum()} of {len(data)} images are encoded already")
    encode_images(vae, data.array("images"), moments, done)
    if WORLD > 1:
        dist.barrier()
    if RANK > 0:
        return
    write_labels_and_meta(folder, data.array("labels"), meta["source"].partition(", encoded by ")[0],
                          meta["resolution"], meta["class_names"], **vae_meta(args.vae))
    PreparedData(folder, meta["resolution"])
    os.replace(folder, out)
    (out / done_file.name).unlink(missing_ok=True)
    print(f"{out}: {len(data)} images, {meta['num_classes']} classes")


def link_or_copy(source, target):
    """A second name of a file that nobody changes; a copy on a disk that has no such names."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


# ---------------------------------------------------------------------------------------------------------------------
# The toy set: "a red disc on a dark blue background", 16x16
# ---------------------------------------------------------------------------------------------------------------------
SHAPES = {  # is (x, y) inside? radius 1, y downwards
    "disc": lambda x, y: x**2 + y**2 <= 1,
    "square": lambda x, y: np.maximum(abs(x), abs(y)) <= 0.85,
    "triangle": lambda x, y: (y <= 0.8) & (abs(x) <= (y + 1) / 1.8),
    "cross": lambda x, y: (np.minimum(abs(x), abs(y)) <= 0.3) & (np.maximum(abs(x), abs(y)) <= 1),
    "ring": lambda x, y: (x**2 + y**2 <= 1) & (x**2 + y**2 >= 0.3),
    "diamond": lambda x, y: abs(x) + abs(y) <= 1,
    "bar": lambda x, y: (abs(x) <= 1) & (abs(y) <= 0.35),
    "pillar": lambda x, y: (abs(x) <= 0.35) & (abs(y) <= 1),
}
COLOURS = {"red": (230, 40, 40), "green": (40, 190, 60), "blue": (50, 80, 240),
           "yellow": (245, 220, 40), "magenta": (220, 60, 220), "cyan": (40, 210, 220)}


def make_toy_set(count, seed, resolution=16):
    """Draw the toy set: images (N,R,R,3) uint8, labels (N,) int64 (the shape), N captions."""
    rng = np.random.RandomState(seed)  # its stream is frozen for ever, unlike default_rng's
    labels = rng.randint(len(SHAPES), size=count)
    colour = rng.randint(len(COLOURS), size=count)
    ground = (colour + 1 + rng.randint(len(COLOURS) - 1, size=count)) % len(COLOURS)  # another of the six
    # Placement decides how hard the set is: wider (+-0.25, radius 0.5 to 0.7) halves a student's accuracy.
    centre = rng.uniform(-0.12, 0.12, size=(count, 2, 1, 1)).astype(np.float32)
    radius = rng.uniform(0.65, 0.85, size=(count, 1, 1)).astype(np.float32)

    axis = ((np.arange(3 * resolution) + 0.5) / (1.5 * resolution) - 1).astype(np.float32)  # 3x3 samples a pixel
    cover = np.empty((count, resolution, resolution, 1), np.float32)
    for label, is_inside in enumerate(SHAPES.values()):
        rows = np.flatnonzero(labels == label)
        x = (axis[None, None, :] - centre[rows, 0]) / radius[rows]  # (n,1,3R)
        y = (axis[None, :, None] - centre[rows, 1]) / radius[rows]  # (n,3R,1)
        cover[rows, ..., 0] = is_inside(x, y).reshape(len(rows), resolution, 3, resolution, 3).mean((2, 4))
    palette = np.array(list(COLOURS.values()), np.float32)
    back = 0.35 * palette[ground][:, None, None]  # (N,1,1,3)
    images = back + cover * (palette[colour][:, None, None] - back)
    shapes, names = list(SHAPES), list(COLOURS)
    captions = [f"a {names[c]} {shapes[s]} on a dark {names[g]} background" for s, c, g in zip(labels, colour, ground)]
    return images.round().astype(np.uint8), labels.astype(np.int64), captions


def prepare_toy(out, count=20_000, val_count=4_000, steps=300, judge_steps=200):
    """Write the toy set with val/, teacher.pt and judge.pt to `out`: all of it or nothing."""
    folder = out.with_name(out.name + ".partial")
    shutil.rmtree(folder, ignore_errors=True)
    for part, n, seed in ((folder, count, 0), (folder / "val", val_count, 1)):
        images, labels, captions = make_toy_set(n, seed)
        part.mkdir(parents=True)
        np.save(part / "images.npy", images)
        write_labels_and_meta(part, labels, f"toy, seed {seed}", images.shape[1], list(SHAPES), captions)
    print(f"{out}: {count} images and {val_count} held out, {len(SHAPES)} classes")
    train_teacher_and_judge(folder, 4, steps, judge_steps)
    os.replace(folder, out)


# ---------------------------------------------------------------------------------------------------------------------
# The toy of softrepa.py: "red square, blue cross", 16x16, with word vectors and a small text-to-image model
# ---------------------------------------------------------------------------------------------------------------------
PAIR_SHAPES = "square", "cross", "ring", "diamond"
PAIRS_MODEL = dict(in_channels=3, hidden_size=64, depth=4, num_heads=4, context_dim=32, pooled_dim=32,
                   pos_embed_size=4, patch_size=4)


def draw_objects():
    """Every object in every place of its half of the image: (6 colours, 4 shapes, 8 places, 16, 8, 3) uint8."""
    axis = (np.arange(7) + 0.5) / 3.5 - 1
    masks = np.zeros((len(PAIR_SHAPES), 8, 16, 8, 1), bool)
    for shape, place in np.ndindex(masks.shape[:2]):
        top, left = 3 + place // 2, place % 2
        masks[shape, place, top:top + 7, left:left + 7, 0] = SHAPES[PAIR_SHAPES[shape]](axis[None], axis[:, None])
    return np.where(masks, np.array(list(COLOURS.values())).reshape(-1, 1, 1, 1, 1, 3), 25).astype(np.uint8)


def make_pairs(count, seed):
    """Images (N,16,16,3), labels (N,) of the 576 captions, text features (N,4,32) and (N,32), and the captions.

    A word has a random vector for each of its four places: all that an image can be asked for, and nothing to learn.
    """
    rng, objects = np.random.RandomState(seed), draw_objects()  # its stream is frozen for ever
    words, place = rng.randint([6, 4, 6, 4], size=(count, 4)), rng.randint(8, size=(count, 2))
    halves = objects[words[:, 0::2], words[:, 1::2], place]  # (N,2,16,8,3)
    images = np.concatenate([halves[:, 0], halves[:, 1]], axis=2)
    vectors = np.random.RandomState(0).standard_normal((4, 6, 32))
    context = vectors[np.arange(4), words].astype(np.float16)
    captions = ["{} {}, {} {}".format(*four) for four in itertools.product(COLOURS, PAIR_SHAPES, repeat=2)]
    return images, np.ravel_multi_index(words.T, (6, 4, 6, 4)), context, context.mean(axis=1), captions


def prepare_pairs(out, count=20_400, steps=4800, batch_size=32, lr=4e-3, wrong=0.25, no_text=0.1):
    """Write the set to `out`, and base.pt: an MM-DiT by plain flow matching, a quarter of its captions wrong.

    Wrong captions are what a model learns from on the web, and leave something to align. The null text is zeros.
    """
    folder = out.with_name(out.name + ".partial")
    shutil.rmtree(folder, ignore_errors=True)
    make_folder(folder)
    images, labels, *texts, captions = make_pairs(count, 0)
    for name, array in zip(("images", "context", "pooled", "objects"), (images, *texts, draw_objects())):
        np.save(folder / f"{name}.npy", array)
    write_labels_and_meta(folder, labels, "pairs", images.shape[1], captions, text="toy")
    torch.manual_seed(0)
    device, g = torch.device("cuda" if torch.cuda.is_available() else "cpu"), torch.Generator().manual_seed(0)
    model = MMDiT(**PAIRS_MODEL).apply(init_linear).to(device)
    for name, parameter in model.named_parameters():  # as SiT begins: blocks are the identity, the velocity is 0
        if "adaLN" in name or "final_layer.linear" in name:
            nn.init.zeros_(parameter)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
    held_out = count // 20  # softrepa.py's, at the end
    for _ in tqdm(range(steps), desc="text-to-image model", unit="step", disable=None):
        rows = torch.randint(count - held_out, (batch_size,), generator=g)
        x = torch.from_numpy(images[rows.numpy()]).permute(0, 3, 1, 2) / 127.5 - 1
        t, noise = torch.rand(batch_size, generator=g), torch.randn(x.shape, generator=g)
        of = torch.where(torch.rand(batch_size, generator=g) < wrong, rows.roll(1), rows)  # whose caption
        keep = torch.rand(batch_size, generator=g) >= no_text
        context, pooled = (torch.from_numpy(text[of.numpy()]).float() for text in texts)
        context, pooled = context * keep[:, None, None], pooled * keep[:, None]
        x_t, v = interpolate(x, noise, t)
        loss = (model(*(part.to(device) for part in (x_t, t, context, pooled))) - v.to(device)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    save_checkpoint(folder / "base.pt", dict(config=PAIRS_MODEL, model=model.cpu().state_dict()))
    os.replace(folder, out)
    print(f"{out}: {count} images of {len(captions)} captions, and a model with velocity loss {loss.item():.4f}")


# ---------------------------------------------------------------------------------------------------------------------
# Captioned images -> latents and text features of SD3, for softrepa.py
# ---------------------------------------------------------------------------------------------------------------------
TEXT_BATCH = 16  # images and captions encoded at once


def read_captions(path, images):
    """Image files and a caption of each, in sorted order: {file: caption}, or COCO's json, whose first one counts."""
    try:
        listed = json.loads(path.read_text())
        if "annotations" in listed:
            names = {image["id"]: image["file_name"] for image in listed["images"]}
            listed = {names[note["image_id"]]: note["caption"] for note in reversed(listed["annotations"])}
        pairs = sorted((str(images / name), str(caption)) for name, caption in listed.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        fail(f"--captions {path}: {first_line(error)}; it wants {{\"file\": \"caption\"}}, or COCO's captions_*.json")
    if not pairs:
        fail(f"--captions {path} holds no caption")
    for file, _ in pairs:
        if not Path(file).is_file():
            fail(f"{path} has a caption for {file}, which is not there; is --images {images} right?")
    return zip(*pairs)


@torch.inference_mode()
def prepare_text(args):
    """args.images and args.captions to moments.npy, context.npy, pooled.npy and captions.json in args.out."""
    files, captions = read_captions(args.captions, args.images)
    count, size, batch = len(files), args.resolution // 8, TEXT_BATCH
    shapes = dict(moments=(count, 32, size, size), context=(count, CLIP_LENGTH, 2048), pooled=(count, 2048))
    need = 2 * sum(math.prod(shape) for shape in shapes.values())
    say(f"{args.captions}: {count} captioned images; {args.out} needs {need / 1e9:.3f} GB of disk")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    vae, (encode_text, tokenizer) = load_sd3_vae(args.sd3_ckpt), load_sd3_text(args.sd3_ckpt, args.merges, device)
    vae.to(device)

    # done-*.npy (N,) says what is there, and by its name of what: a killed run goes on.
    folder = args.out.with_name(args.out.name + ".partial")
    done_file = folder / f"done-{hashlib.sha256(repr((files, captions, shapes)).encode()).hexdigest()}.npy"
    if not done_file.is_file():
        shutil.rmtree(folder, ignore_errors=True)
        make_folder(folder)
        if need > shutil.disk_usage(folder).free:  # a memory map on a full disk dies by a signal: ask before
            fail(f"{folder.parent} does not have so many GB free; free some, or give --out on another disk")
        for name, shape in shapes.items():
            np.lib.format.open_memmap(folder / f"{name}.npy", "w+", np.float16, shape)
        np.save(done_file, np.zeros(count, dtype=bool))
    done, arrays = np.load(done_file, "r+"), {name: np.load(folder / f"{name}.npy", "r+") for name in shapes}
    ids = [tokenizer.encode(caption) for caption in captions]
    if cut := sum(len(each) > CLIP_LENGTH - 2 for each in ids):
        say(f"{cut} captions are longer than the {CLIP_LENGTH - 2} tokens that CLIP reads: their ends are cut off")
    if done.any():
        say(f"resuming: {done.sum()} of {count} are there already")
    todo = [np.arange(i, min(i + batch, count)) for i in range(0, count, batch) if not done[i:i + batch].all()]
    read = functools.partial(read_image, resolution=args.resolution)
    loader = torch.utils.data.DataLoader(files, None, sampler=[i for rows in todo for i in rows],
                                         num_workers=args.workers, collate_fn=read)
    images = iter(loader)
    for rows in tqdm(todo, "latents and text", unit="img", unit_scale=batch, **BAR):  # its rate gives the time needed
        pixels = [next(images) for _ in rows]
        for i, image in zip(rows, pixels):
            if isinstance(image, str):
                fail(f"{files[i]!r} cannot be read ({image}): take it out of {args.captions}")
        x = torch.from_numpy(np.stack(pixels)).to(device).permute(0, 3, 1, 2) / 127.5 - 1
        context, pooled = encode_text([ids[i] for i in rows])
        parts = dict(moments=torch.cat(vae.encode(x), dim=1), context=context, pooled=pooled)
        for name, part in parts.items():
            if not (part := part.half()).isfinite().all():
                fail(f"{name} is not finite in float16: is --sd3-ckpt right?")
            arrays[name][rows] = part.cpu().numpy()
        done[rows] = True
    write_labels_and_meta(folder, np.zeros(count), str(args.images), args.resolution, ["all"], captions,
                          **SD3_VAE_META, text="sd3")
    CaptionedData(folder, args.resolution, "sd3")
    os.replace(folder, args.out)
    (args.out / done_file.name).unlink(missing_ok=True)
    print(f"{args.out}: {count} images with their captions")


# ---------------------------------------------------------------------------------------------------------------------
# The small vision teacher and the judge: two classifiers of the set, trained apart
# ---------------------------------------------------------------------------------------------------------------------
def caption_words(captions):
    """The pairs (position, word) that tell captions apart: 2nd "blue" is the shape's colour, 7th the background's."""
    counts = Counter(pair for caption in captions for pair in enumerate(caption.split()))
    return sorted(pair for pair, n in counts.items() if 0.01 <= n / len(captions) <= 0.99)


def caption_targets(captions, words):
    """Which of W pairs (position, word) each of N captions holds: (N,W) float32 of 0 and 1."""
    pairs = [set(enumerate(caption.split())) for caption in captions]
    return torch.tensor([[float(word in held) for word in words] for held in pairs])


def load_parts(folder, resolution):
    """Training and held-out part (val/, else every 20th image): images (N,R,R,3), labels (N,), captions (N,) or ""."""
    def load(part):
        data, captions = PreparedData(part, resolution), part / "captions.json"
        captions = json.loads(captions.read_text()) if captions.is_file() else [""] * len(data)
        return data.array("images"), data.array("labels"), np.array(captions)

    if (folder / "val").is_dir():
        return load(folder), load(folder / "val")
    arrays = load(folder)
    is_held_out = np.arange(len(arrays[1])) % 20 == 0  # images are sorted by class
    return [[array[rows] for array in arrays] for rows in (~is_held_out, is_held_out)]


def train_classifier(name, network, num_classes, train, held_out, steps, lr, noise, seed):
    """Train network (B,3,R,R) -> logits (B,num_classes+W) on labels (N,) and caption words (N,W), 128 images a step.

    Returns the share of held-out images with the right label, and with every word right. A part is (images, labels,
    words); noise of a random standard deviation up to `noise` is added to the training images.
    """
    images, labels, words = train
    g, device = torch.Generator().manual_seed(seed), labels.device

    def to_input(images):  # (B,R,R,3) uint8 -> (B,3,R,R) in [-1,1]; tensor() copies, for the memory map is read-only
        return torch.tensor(images, device=device).permute(0, 3, 1, 2) / 127.5 - 1

    optimizer = torch.optim.AdamW(network.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
    network.to(device).train()
    for _ in tqdm(range(steps), desc=name, unit="step", disable=None):
        rows = torch.randint(len(labels), (128,), generator=g)
        x = to_input(images[rows.numpy()])
        if noise > 0:
            x = x + (noise * torch.rand(128, 1, 1, 1, generator=g) * torch.randn(x.shape, generator=g)).to(device)
        label_logits, word_logits = network(x).tensor_split([num_classes], dim=1)
        loss = F.cross_entropy(label_logits, labels[rows])
        loss = loss + F.binary_cross_entropy_with_logits(word_logits, words[rows], reduction="sum") / len(rows)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()

    images, labels, words = held_out
    network.eval()
    with torch.inference_mode():
        logits = torch.cat([network(to_input(images[i:i + 500])) for i in range(0, len(images), 500)])
    label_logits, word_logits = logits.tensor_split([num_classes], dim=1)
    right, words_right = label_logits.argmax(1) == labels, ((word_logits > 0) == words.bool()).all(1)
    return right.float().mean().item(), words_right.float().mean().item()


def train_teacher_and_judge(folder, patch_size, steps, judge_steps):
    """Train both on data/NAME, and write teacher.pt and judge.pt there with their accuracies on held-out images."""
    from timm.models.vision_transformer import VisionTransformer
    from evaluate import Judge
    meta = read_meta(folder)
    resolution, num_classes = meta["resolution"], meta["num_classes"]
    if num_classes < 2:
        fail(f"{folder} has one class; a teacher and a judge need labels that differ")
    if resolution % patch_size:
        fail(f"--patch-size {patch_size} does not divide the resolution {resolution} of {folder}")
    parts = load_parts(folder, resolution)
    words = caption_words(parts[0][2])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    parts = [(images, torch.tensor(labels, device=device), caption_targets(captions, words).to(device))
             for images, labels, captions in parts]
    torch.manual_seed(0)  # the weights; the batches have generators of their own
    vit_config = dict(img_size=resolution, patch_size=patch_size, embed_dim=64, depth=4, num_heads=4, num_classes=0,
                      class_token=True)
    vit = VisionTransformer(**vit_config)
    teacher = nn.Sequential(vit, nn.Linear(64, num_classes + len(words)))  # the head is thrown away
    judge_config = dict(num_classes=num_classes, num_words=len(words))
    judge = Judge(**judge_config)
    for name, network, trunk, config, recipe in (
            ("teacher", teacher, vit, vit_config, dict(steps=steps, lr=3e-3, noise=0.0, seed=1)),
            ("judge", judge, judge, judge_config, dict(steps=judge_steps, lr=1e-2, noise=0.15, seed=2))):
        accuracy, word_accuracy = train_classifier(name, network, num_classes, *parts, **recipe)
        save_checkpoint(folder / f"{name}.pt", dict(
            config=config, model=trunk.cpu().state_dict(), accuracy=accuracy, resolution=resolution, words=words,
            word_accuracy=word_accuracy if words else None))
        print(f"{name}: {100 * accuracy:.2f} % of {len(parts[1][0])} held-out images"
              + f", all caption words right {100 * word_accuracy:.2f} %" * bool(words))


def main(argv=None):
    """Prepare what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.add_argument("--images", type=Path, help="folder with one sub-folder per class, or with images only")
    parser.add_argument("--from-repa", type=Path, help="instead: folder that holds images/ and vae-sd/ of REPA")
    parser.add_argument("--from", type=Path, dest="prepared", help="instead: a prepared set, to encode it anew")
    parser.add_argument("--out", type=Path, help="data/NAME, or data/NAME/val for held-out images")
    parser.add_argument("--resolution", type=int, default=256, help="pixels a side after the crop [256]")
    parser.add_argument("--vae", default="ft-mse", help="SD-VAE: ft-mse or ft-ema; none: pixels; or a file that "
                        "reals.py wrote [ft-mse]")
    parser.add_argument("--vae-ckpt", default="", help="its diffusion_pytorch_model.safetensors, without internet")
    parser.add_argument("--workers", type=int, default=max(1, min(8, os.cpu_count() // WORLD)),
                        help="processes that decode, per rank; 0: none besides")
    forms = parser.add_subparsers(dest="form", title="other forms")
    toy = forms.add_parser("toy", help="the toy set, its teacher and judge")
    toy.add_argument("--out", type=Path, default=Path("data/toy"))
    teacher = forms.add_parser("teacher", help="train teacher.pt and judge.pt on a prepared data set")
    teacher.add_argument("--data", type=Path, required=True, help="data/NAME")
    teacher.add_argument("--patch-size", type=int, default=4, help="pixels per token of the student [4]")
    teacher.add_argument("--steps", type=int, default=300, help="teacher's steps of 128 images [300]")
    teacher.add_argument("--judge-steps", type=int, default=200, help="judge's steps of 128 images [200]")
    pairs = forms.add_parser("pairs", help="softrepa.py's toy: a set of captioned pairs and its text-to-image model")
    pairs.add_argument("--out", type=Path, default=Path("data/pairs"))
    text = forms.add_parser("text", help="latents and text features of captioned images by SD3, for softrepa.py")
    text.add_argument("--images", type=Path, required=True, help="folder of the images")
    text.add_argument("--captions", type=Path, required=True, help="json of {file: caption}, or COCO's captions_*.json")
    text.add_argument("--out", type=Path, required=True, help="data/NAME")
    text.add_argument("--resolution", type=int, default=512, help="pixels a side after the crop [512]")
    text.add_argument("--sd3-ckpt", default="", help="sd3_medium_incl_clips.safetensors, without internet")
    text.add_argument("--merges", default="", help="CLIP's merges.txt, without internet")
    text.add_argument("--workers", type=int, default=max(1, min(8, os.cpu_count() // WORLD)),
                      help="processes that decode; 0: none besides")
    for each in (parser, toy, teacher, pairs, text):
        each.error = lambda message: fail(f"{message} (--help lists the flags)")
    args = parser.parse_args(argv)
    for flag, least in (("resolution", 1), ("workers", 0), ("patch_size", 1), ("steps", 1), ("judge_steps", 1)):
        if getattr(args, flag, least) < least:
            fail(f"--{flag.replace('_', '-')} must be at least {least}")
    if args.form != "teacher" and args.out and args.out.exists():
        fail(f"{args.out} exists already; give another --out, or remove it first")
    if WORLD > 1 and (args.form or WORLD != int(os.environ.get("LOCAL_WORLD_SIZE", WORLD))):
        fail("torchrun: only on one machine, and not with toy, teacher, pairs or text; there, python prepare.py is "
             "enough")
    if args.form == "toy":
        return prepare_toy(args.out)
    if args.form == "pairs":
        return prepare_pairs(args.out)
    if args.form == "text":
        if args.resolution % 16:
            fail(f"--resolution {args.resolution} is no multiple of 16, the pixels of a token of SD3")
        return prepare_text(args)
    if args.form == "teacher":
        return train_teacher_and_judge(args.data, args.patch_size, args.steps, args.judge_steps)
    if not args.out or sum(map(bool, (args.images, args.from_repa, args.prepared))) != 1:
        fail("give --images DIR --out data/NAME, or --from-repa DIR --out data/NAME, or --from data/OTHER --out "
             "data/NAME, or a form: toy, teacher, pairs, text")
    if args.vae not in (*VAE_REPOS, "none") and not Path(args.vae).is_file():
        parser.error(f"argument --vae: {args.vae} is neither ft-mse, ft-ema, none nor a file of reals.py")
    if args.vae not in (*VAE_REPOS, "none"):
        read_latent_stats(args.vae)
    if args.from_repa and args.vae not in (*VAE_REPOS, "none"):
        fail(f"--from-repa brings its own latents, of the SD-VAE; with --vae {args.vae}: --images DIR, or --from")
    if args.prepared and args.vae == "none":
        fail("--from encodes a prepared set anew: with which autoencoder? --vae runs/reals-NAME/vae.pt")
    if args.vae in VAE_REPOS and not args.prepared and args.resolution % 8:
        fail(f"--resolution {args.resolution} is no multiple of 8, the pixels per latent: take one, or --vae none")
    if WORLD > 1:  # to wait for each other, however long
        dist.init_process_group("gloo", timeout=datetime.timedelta(days=30))
    prepare_again(args) if args.prepared else prepare_images(args)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        fail("interrupted; the same command continues")
    except OSError as error:  # a full disk, most likely
        fail(f"{first_line(error)}; the same command continues when there is room")

"""Prepare a data set: images in, one folder data/NAME of memory-mapped arrays out.

Images are decoded, cropped and encoded once; training only copies rows. support/dataset.py says
what the folder holds. If a command is killed, the same command continues it.

    python prepare.py --images DIR --out data/imagenet256            a sub-folder is a class
    torchrun --nproc_per_node=8 prepare.py --images DIR --out data/imagenet256      on all GPUs
    python prepare.py --from-repa DIR --out data/imagenet256         REPA's images/ and vae-sd/
    python prepare.py --images DIR --out data/NAME --resolution 32 --vae none       pixel space
    python prepare.py --images DIR2 --out data/NAME/val --resolution 32 --vae none  held-out images
    python prepare.py --images DIR --out data/NAME --vae runs/reals-f8d4/vae.pt     reals.py's VAE
    python prepare.py --from data/toy --out data/NAME --vae runs/reals-toy/vae.pt   of a data set
    python prepare.py teacher --data data/NAME                       teacher and judge for any set
    python prepare.py toy --out data/toy                             the toy set with both
    python prepare.py pairs --out data/pairs                         softrepa.py's toy and its model
    python prepare.py text --images DIR --captions FILE --out data/NAME             SD3's features
"""
import argparse
import datetime
import hashlib
import math
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import torch
from torch import distributed as dist
from tqdm import tqdm

from support.clip import CLIP_LENGTH
from support.dataset import (
    CaptionedData,
    PreparedData,
    images_to_input,
    read_meta,
    write_labels_and_meta,
)
from support.pairs import prepare_pairs
from support.pictures import (
    list_images,
    list_repa,
    read_captions,
    read_files,
    read_image,
    read_pair,
)
from support.sd3 import load_sd3_text
from support.terminal import fail, first_line, first_rank_first, make_folder, say
from support.toy import prepare_toy, train_teacher_and_judge
from support.vae import (
    LATENT_SCALE,
    SD3_VAE_META,
    VAE_REPOS,
    load_sd3_vae,
    load_vae,
    read_latent_stats,
)

RANK = int(os.environ.get("RANK", 0))  # torchrun sets them
WORLD = int(os.environ.get("WORLD_SIZE", 1))
BAR = dict(disable=RANK > 0)  # one progress bar for all ranks
if not sys.stderr.isatty():
    BAR |= dict(mininterval=60, maxinterval=60)  # in a log file a line a minute
DTYPES = dict(images="uint8", moments="float16", context="float16", pooled="float16")
TEXT_BATCH = 16  # images and captions encoded at once


# --------------------------------------------------------------------------------------------------
# The folder in the making
# --------------------------------------------------------------------------------------------------
def bytes_of(shapes):
    """The size of arrays of these names and shapes."""
    return sum(math.prod(shape) * np.dtype(DTYPES[name]).itemsize for name, shape in shapes.items())


def link_or_copy(source, target):
    """A second name of a file that nobody changes; a copy on a disk that has no such names."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


class Partial:
    """NAME.partial: the arrays of a data set in the making, and `done`, their rows that are set.

    The file of `done` has in its name the hash `plan` of all that decides what the arrays hold: the
    same command continues, another one starts again. All are memory maps: the page cache keeps what
    a killed process has written. shapes: of the arrays, by name. links: files and folders of
    another set that become part of this one.
    """

    def __init__(self, out, plan, shapes, done_shape, links=()):
        self.out = out
        self.folder = out.with_name(out.name + ".partial")
        self.done_file = self.folder / f"done-{plan.hexdigest()}.npy"
        if not self.done_file.is_file():
            self.begin(shapes, done_shape, links)
        self.done = np.load(self.done_file, "r+")
        self.arrays = {name: np.load(self.folder / f"{name}.npy", "r+") for name in shapes}

    def begin(self, shapes, done_shape, links):
        """An array of each shape in a fresh folder; the file of `done` comes last."""
        shutil.rmtree(self.folder, ignore_errors=True)
        disk = self.folder.parent
        make_folder(disk)
        if bytes_of(shapes) > shutil.disk_usage(disk).free:  # a memory map would die by a signal
            fail(f"{disk} does not have so many GB free; free some, or give --out on another disk")
        make_folder(self.folder)
        for path in links:
            if path.is_dir():
                shutil.copytree(path, self.folder / path.name, copy_function=link_or_copy)
            elif path.exists():
                link_or_copy(path, self.folder / path.name)
        for name, shape in shapes.items():
            np.lib.format.open_memmap(self.folder / f"{name}.npy", "w+", DTYPES[name], shape)
        np.save(self.done_file, np.zeros(done_shape, dtype=bool))

    def keep(self, rows):
        """Leave out all other rows of the arrays."""
        left_out = len(self.done) - len(rows)
        need = sum(array.nbytes for array in self.arrays.values())
        if need > shutil.disk_usage(self.folder).free:
            fail(f"leaving out {left_out} unreadable images takes {need / 1e9:.3f} GB more for a "
                 f"while: free them")
        for name, array in self.arrays.items():
            shape = (len(rows), *array.shape[1:])
            file = self.folder / f"{name}.tmp"
            compact = np.lib.format.open_memmap(file, "w+", array.dtype, shape)
            bar = tqdm(rows, f"{name} without {left_out} unreadable ones", **BAR)
            for i, row in enumerate(bar):
                compact[i] = array[row]
        self.done_file.unlink()  # from here on a kill means starting again: rows are not files now
        for name in self.arrays:
            os.replace(self.folder / f"{name}.tmp", self.folder / f"{name}.npy")

    def finish(self):
        """Give the complete folder its name."""
        os.replace(self.folder, self.out)
        (self.out / self.done_file.name).unlink(missing_ok=True)  # last: no kill before it harms


def wait_for_all_ranks():
    """What one rank writes, the others open only after this."""
    if WORLD > 1:
        dist.barrier()


# --------------------------------------------------------------------------------------------------
# Latents
# --------------------------------------------------------------------------------------------------
def pick_device():
    """This rank's GPU if there is one, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", RANK % torch.cuda.device_count())
    return torch.device("cpu")


def vae_meta(name):
    """What meta.json says of latents by this --vae: ft-mse or ft-ema, a file of reals.py, none."""
    if name in VAE_REPOS:
        return dict(vae=f"sd-vae-{name}", channels=4, latent_scale=LATENT_SCALE)
    return {} if name == "none" else read_latent_stats(name)


def open_vae(args, resolution, plan):
    """The autoencoder of --vae, and the shape of an image's moments; its weights enter the plan."""
    vae = load_vae(args.vae, args.vae_ckpt)
    if resolution % vae.factor:
        fail(f"the resolution {resolution} is not a multiple of {vae.factor}, the pixels per "
             f"latent of --vae {args.vae}")
    for weight in (*vae.encoder.parameters(), *vae.quant_conv.parameters()):
        plan.update(weight.numpy())
    size = resolution // vae.factor
    return vae, (2 * vae.latent_channels, size, size)


def batches_to_do(done, size):
    """Slices of this rank's rows that `done` (N,) lacks; a row is always in the same batch."""
    starts = range(RANK * size, len(done), WORLD * size)
    batches = [slice(start, start + size) for start in starts]
    return [rows for rows in batches if not done[rows].all()]


@torch.inference_mode()
def encode_images(vae, images, moments, done, batch_size=8):
    """Fill moments (N,2C,h,w), mean and std of images (N,R,R,3), where done (N,) is not yet set.

    Batches stay the same, so neither a kill nor the number of ranks changes a bit. fp32; on CUDA
    PyTorch's default rounds what enters a convolution to TF32, as in REPA's own preprocessing and
    as finely as float16.
    """
    device = pick_device()
    vae.to(device)
    batches = batches_to_do(done, batch_size)
    for rows in tqdm(batches, "moments", unit="img", unit_scale=batch_size, **BAR):
        x = images_to_input(torch.tensor(images[rows], device=device))  # (B,3,R,R) in [-1,1]
        encoded = torch.cat(vae.encode(x), dim=1).half()  # mean and std
        if not encoded.isfinite().all():  # not fail(): any rank may say it
            raise SystemExit("error: the VAE gives a mean or std that is not finite in float16: "
                             "is its file right?")
        moments[rows] = encoded.cpu().numpy()
        done[rows] = True


# --------------------------------------------------------------------------------------------------
# Images -> data/NAME; REPA's folders, which have latents already; or a set that is encoded again
# --------------------------------------------------------------------------------------------------
def check_held_out(args, root, class_names):
    """data/NAME/val must have the classes and the resolution of data/NAME."""
    meta = read_meta(args.out.parent)
    numbers = [str(i) for i in range(len(class_names))]  # the names that --from-repa gives
    if meta["class_names"] not in (class_names, numbers) or args.resolution != meta["resolution"]:
        fail(f"{root} and {args.out.parent} must have the same classes, and the same --resolution "
             f"{meta['resolution']}")


def fill_from_files(args, partial, files):
    """Read this rank's files into the arrays. Images that cannot be read are named."""
    is_pair = args.from_repa is not None
    read = read_pair if is_pair else read_image
    todo = [i for i in range(RANK, len(files), WORLD) if not partial.done[i, 0]]
    results = read_files(files, todo, read, args.resolution, args.workers)
    for i, (parts, problem) in tqdm(zip(todo, results), "images", len(todo), unit="img", **BAR):
        if parts is None and is_pair:
            raise SystemExit(f"error: {problem}")  # not fail(): any rank may say it
        if parts is None:  # !r, for names on disk may not be valid text
            tqdm.write(f"unreadable, left out: {files[i]!r} ({problem})")
            continue
        if not is_pair:
            parts = [parts]
        for array, part in zip(partial.arrays.values(), parts):
            array[i] = part
        partial.done[i] = True, is_pair


def prepare_images(args):
    """args.images, or REPA's folders in args.from_repa, to the data set args.out; by all ranks."""
    resolution = args.resolution
    root = args.from_repa or args.images
    list_files = list_repa if args.from_repa else list_images
    files, labels, class_names = list_files(root)
    count = len(files)
    if args.out.name == "val":
        check_held_out(args, root, class_names)
    plan = hashlib.sha256(repr((resolution, args.vae == "none", files)).encode())
    shapes = dict(images=(count, resolution, resolution, 3))
    vae = None
    if args.vae != "none":
        shape = 8, resolution // 8, resolution // 8  # of REPA's moments
        if args.images:
            vae, shape = open_vae(args, resolution, plan)  # first, so that a wrong file shows now
        shapes["moments"] = count, *shape
    say(f"{root}: {count} images in {len(class_names)} classes; {args.out} needs "
        f"{bytes_of(shapes) / 1e9:.3f} GB of disk")
    with first_rank_first():
        partial = Partial(args.out, plan, shapes, done_shape=(count, 2))  # read, encoded
        num_read, num_encoded = partial.done.sum(axis=0)
        if num_read or num_encoded:
            say(f"resuming: {num_read} of {count} images are there already, {num_encoded} encoded")
    fill_from_files(args, partial, files)
    wait_for_all_ranks()  # a batch to encode holds images of several ranks
    if vae is not None:
        encode_images(vae, *partial.arrays.values(), partial.done[:, 1])
    wait_for_all_ranks()
    if RANK == 0:
        finish_images(args, partial, root, labels, class_names)


def finish_images(args, partial, root, labels, class_names):
    """Leave out what could not be read, write the rest, and give the folder its name."""
    rows = np.flatnonzero(partial.done[:, 0])
    left_out = len(labels) - len(rows)
    if len(rows) == 0:
        fail(f"none of the {len(labels)} files in {root} could be read")
    if left_out:
        partial.keep(rows)
    write_labels_and_meta(partial.folder, labels[rows], str(root), args.resolution, class_names,
                          **vae_meta(args.vae))
    PreparedData(partial.folder, args.resolution)  # as every script opens it
    partial.finish()
    line = f"{args.out}: {len(rows)} images, {len(class_names)} classes"
    if left_out:
        line += f"; {left_out} unreadable ones, named above, are left out"
    print(line)


def prepare_again(args):
    """The data set args.prepared with latents by args.vae to args.out; by all ranks."""
    root = args.prepared
    meta = read_meta(root)
    resolution = meta["resolution"]
    data = PreparedData(root, resolution)
    count = len(data)
    plan = hashlib.sha256(str(root.resolve()).encode())
    vae, shape = open_vae(args, resolution, plan)
    shapes = dict(moments=(count, *shape))
    say(f"{root}: {count} images; {args.out} needs {bytes_of(shapes) / 1e9:.3f} GB of disk, and "
        f"shares the images with it")
    names = "images.npy", "captions.json", "teacher.pt", "judge.pt", "val"
    links = [root / name for name in names]  # not copied: ImageNet's images.npy has 252 GB
    with first_rank_first():
        partial = Partial(args.out, plan, shapes, done_shape=count, links=links)
        if partial.done.any():
            say(f"resuming: {partial.done.sum()} of {count} images are encoded already")
    encode_images(vae, data.array("images"), partial.arrays["moments"], partial.done)
    wait_for_all_ranks()
    if RANK > 0:
        return
    source, _, _ = meta["source"].partition(", encoded by ")
    write_labels_and_meta(partial.folder, data.array("labels"), source, resolution,
                          meta["class_names"], **vae_meta(args.vae))
    PreparedData(partial.folder, resolution)
    partial.finish()
    print(f"{args.out}: {count} images, {meta['num_classes']} classes")


# --------------------------------------------------------------------------------------------------
# Captioned images -> latents and text features of SD3
# --------------------------------------------------------------------------------------------------
def encode_captioned(args, partial, files, ids, vae, encode_text):
    """Fill the arrays: moments of the images, context and pooled of their captions' tokens."""
    device = pick_device()
    batches = batches_to_do(partial.done, TEXT_BATCH)
    order = [i for rows in batches for i in range(len(files))[rows]]
    images = iter(read_files(files, order, read_image, args.resolution, args.workers))
    for rows in tqdm(batches, "latents and text", unit="img", unit_scale=TEXT_BATCH, **BAR):
        pixels = []
        for file in files[rows]:
            image, problem = next(images)
            if image is None:
                fail(f"{file!r} cannot be read ({problem}): take it out of {args.captions}")
            pixels.append(image)
        x = images_to_input(torch.from_numpy(np.stack(pixels)).to(device))  # (B,3,R,R)
        moments = torch.cat(vae.encode(x), dim=1)  # mean and std
        context, pooled = encode_text(ids[rows])
        parts = dict(moments=moments, context=context, pooled=pooled)
        for name, part in parts.items():
            part = part.half()
            if not part.isfinite().all():
                fail(f"{name} is not finite in float16: is --sd3-ckpt right?")
            partial.arrays[name][rows] = part.cpu().numpy()
        partial.done[rows] = True


@torch.inference_mode()
def prepare_text(args):
    """args.images and args.captions to the data set args.out."""
    files, captions = read_captions(args.captions, args.images)
    count = len(files)
    size = args.resolution // 8
    shapes = dict(
        moments=(count, 32, size, size), context=(count, CLIP_LENGTH, 2048), pooled=(count, 2048))
    plan = hashlib.sha256(repr((files, captions, shapes)).encode())
    say(f"{args.captions}: {count} captioned images; {args.out} needs "
        f"{bytes_of(shapes) / 1e9:.3f} GB of disk")
    vae = load_sd3_vae(args.sd3_ckpt).to(pick_device())
    encode_text, tokenizer = load_sd3_text(args.sd3_ckpt, args.merges, pick_device())
    partial = Partial(args.out, plan, shapes, done_shape=count)
    ids = [tokenizer.encode(caption) for caption in captions]
    limit = CLIP_LENGTH - 2
    if num_cut := sum(len(tokens) > limit for tokens in ids):
        say(f"{num_cut} captions are longer than the {limit} tokens that CLIP reads: their ends "
            f"are cut off")
    if partial.done.any():
        say(f"resuming: {partial.done.sum()} of {count} are there already")
    encode_captioned(args, partial, files, ids, vae, encode_text)
    write_labels_and_meta(partial.folder, np.zeros(count), str(args.images), args.resolution,
                          ["all"], captions, **SD3_VAE_META, text="sd3")
    CaptionedData(partial.folder, args.resolution, "sd3")
    partial.finish()
    print(f"{args.out}: {count} images with their captions")


# --------------------------------------------------------------------------------------------------
# The command line
# --------------------------------------------------------------------------------------------------
def make_parser():
    """The command line: the flags of images, or the name of another form and its flags."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    forms = parser.add_subparsers(dest="form", title="other forms")
    toy = forms.add_parser("toy", help="the toy set, its teacher and judge")
    teacher = forms.add_parser("teacher", help="train teacher.pt and judge.pt on a prepared set")
    pairs = forms.add_parser("pairs", help="softrepa.py's toy: captioned pairs, and their model")
    text = forms.add_parser("text", help="SD3's latents and text features, for softrepa.py")
    add = parser.add_argument
    add("--images", type=Path, help="folder with one sub-folder per class, or with images only")
    add("--from-repa", type=Path, help="instead: folder that holds images/ and vae-sd/ of REPA")
    add("--from", type=Path, dest="prepared", help="instead: a prepared set, to encode it again")
    add("--out", type=Path, help="data/NAME, or data/NAME/val for held-out images")
    add("--resolution", type=int, default=256, help="pixels a side after the crop [256]")
    add("--vae", default="ft-mse",
        help="SD-VAE: ft-mse or ft-ema; none: pixels; or a file that reals.py wrote [ft-mse]")
    add("--vae-ckpt", default="", help="its diffusion_pytorch_model.safetensors, without internet")
    toy.add_argument("--out", type=Path, default=Path("data/toy"))
    pairs.add_argument("--out", type=Path, default=Path("data/pairs"))
    add = teacher.add_argument
    add("--data", type=Path, required=True, help="data/NAME")
    add("--patch-size", type=int, default=4, help="pixels per token of the student [4]")
    add("--steps", type=int, default=300, help="teacher's steps of 128 images [300]")
    add("--judge-steps", type=int, default=200, help="judge's steps of 128 images [200]")
    add = text.add_argument
    add("--images", type=Path, required=True, help="folder of the images")
    add("--captions", type=Path, required=True, help="json of {file: caption}, or COCO's")
    add("--out", type=Path, required=True, help="data/NAME")
    add("--resolution", type=int, default=512, help="pixels a side after the crop [512]")
    add("--sd3-ckpt", default="", help="sd3_medium_incl_clips.safetensors, without internet")
    add("--merges", default="", help="CLIP's merges.txt, without internet")
    workers = max(1, min(8, os.cpu_count() // WORLD))
    for reader in (parser, text):
        reader.add_argument("--workers", type=int, default=workers,
                            help="processes that decode, per rank; 0: none besides")
    for form in (parser, toy, teacher, pairs, text):
        form.error = lambda message: fail(f"{message} (--help lists the flags)")
    return parser


def check_flags(args):
    """What all forms have in common."""
    for name, least in dict(resolution=1, workers=0, patch_size=1, steps=1, judge_steps=1).items():
        if getattr(args, name, least) < least:
            fail(f"--{name.replace('_', '-')} must be at least {least}")
    if args.form != "teacher" and args.out and args.out.exists():
        fail(f"{args.out} exists already; give another --out, or remove it first")
    local_world = int(os.environ.get("LOCAL_WORLD_SIZE", WORLD))
    if WORLD > 1 and (args.form or WORLD != local_world):
        fail("torchrun: only on one machine, and not with toy, teacher, pairs or text; there, "
             "python prepare.py is enough")
    if args.form == "text" and args.resolution % 16:
        fail(f"--resolution {args.resolution} is not a multiple of 16, the pixels of a token of "
             f"SD3")


def check_image_flags(args):
    """What images, REPA's folders and a prepared set can be combined with."""
    sources = [path for path in (args.images, args.from_repa, args.prepared) if path]
    if not args.out or len(sources) != 1:
        fail("give --images DIR --out data/NAME, or --from-repa DIR --out data/NAME, or --from "
             "data/OTHER --out data/NAME, or a form: toy, teacher, pairs, text")
    if args.vae == "none":
        if args.prepared:
            fail("--from encodes a prepared set again: with which autoencoder? --vae "
                 "runs/reals-NAME/vae.pt")
    elif args.vae in VAE_REPOS:
        if args.resolution % 8 and not args.prepared:
            fail(f"--resolution {args.resolution} is not a multiple of 8, the pixels per latent: "
                 f"take one, or --vae none")
    else:
        if not Path(args.vae).is_file():
            fail(f"argument --vae: {args.vae} is neither ft-mse, ft-ema, none nor a file of "
                 f"reals.py (--help lists the flags)")
        read_latent_stats(args.vae)  # it says what is wrong with the file
        if args.from_repa:
            fail(f"--from-repa brings its own latents, of the SD-VAE; with --vae {args.vae}: "
                 f"--images DIR, or --from")


def main(argv=None):
    """Prepare what the command line says."""
    args = make_parser().parse_args(argv)
    check_flags(args)
    if args.form == "toy":
        return prepare_toy(args.out)
    if args.form == "pairs":
        return prepare_pairs(args.out)
    if args.form == "teacher":
        return train_teacher_and_judge(args.data, args.patch_size, args.steps, args.judge_steps)
    if args.form == "text":
        return prepare_text(args)
    check_image_flags(args)
    if WORLD > 1:  # to wait for each other, however long
        dist.init_process_group("gloo", timeout=datetime.timedelta(days=30))
    if args.prepared:
        return prepare_again(args)
    return prepare_images(args)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        fail("interrupted; the same command continues")
    except OSError as error:  # a full disk, most likely
        fail(f"{first_line(error)}; the same command continues when there is room")

"""Pictures of a run, and its samples as an .npz of ADM's layout.

A script hands in one function: `draw`, for previews, or `images`, which draws and decodes.
"""
import math
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import distributed as dist
from tqdm import tqdm

from support.dataset import image_randn, mix_seed
from support.terminal import fail, make_folder, say


def save_picture(path, images, columns=8):
    """A picture of images (N,R,R,3) uint8, in rows; small ones are enlarged to be looked at."""
    from torchvision.utils import save_image
    images = torch.as_tensor(images).permute(0, 3, 1, 2).float() / 255
    if images.shape[-1] < 64:
        images = F.interpolate(images, scale_factor=4)
    save_image(images, path, nrow=columns)


@torch.no_grad()
def preview(cfg, run, model, draw, decode, step, y=None):
    """Picture of 64 samples, the same noise at every step; y: conditions (64,...).

    draw(cfg, run, model, y, randn) gives latents x (B,C,H,W). Without y: the first eight classes, a
    row each.
    """
    if y is None:
        classes = torch.arange(min(8, model.num_classes), device=run.device)
        y = classes.repeat_interleave(8)
    randn = image_randn(cfg.seed, range(len(y)), run.device)
    x = draw(replace(cfg, mode="ode", num_steps=20, heun=False), run, model, y, randn)
    save_picture(Path(cfg.out) / f"preview-{step}.png", decode(x))


def pick_labels(cfg, num_classes):
    """The labels (N,) of cfg.sample images: those of --labels in turn, or at random."""
    if cfg.labels is None:
        generator = torch.Generator().manual_seed(mix_seed(cfg.seed, 0))
        return torch.randint(num_classes, (cfg.sample,), generator=generator)
    if not all(0 <= label < num_classes for label in cfg.labels):
        fail(f"--labels must lie in 0..{num_classes - 1}: {cfg.ckpt} has {num_classes} classes")
    rounds = math.ceil(cfg.sample / len(cfg.labels))
    return torch.tensor(cfg.labels).repeat(rounds)[:cfg.sample]


def generate_npz(cfg, run, images, num_classes):
    """Sample cfg.sample images of the labels asked for; returns the path of the .npz file.

    images(y, randn) -> {"arr_0": (B,H,W,3) uint8, ...} for labels y (B,).
    """
    name = "samples.npz"
    if cfg.cfg_scale != 1:
        name = f"samples-cfg{cfg.cfg_scale:g}.npz"
    path = Path(cfg.out) / name
    labels = pick_labels(cfg, num_classes)
    sample_npz(path, images, labels, cfg.seed, run.micro_batch, run)
    say(f"wrote {path}: {cfg.sample} images, {cfg.mode} {cfg.num_steps} steps, guidance "
        f"{cfg.cfg_scale:g}")
    return path


def sample_npz(path, images, labels, seed, batch_size, run):
    """One image per label (N,), on all ranks, into an .npz of ADM's layout.

    That is arr_0 (N,H,W,3) uint8 and labels. images(y, randn) -> {"arr_0": (B,H,W,3) uint8} makes
    one batch; further keys are stored beside it, "labels" among them where the argument `labels`,
    (N,...), is not the images' classes but something else to draw from. Each rank fills files of
    its own on disk (50,000 images of 256 px are 9.8 GB); rank 0 merges them under the final name.
    """
    path = Path(path)
    make_folder(path.parent)
    parts = fill_parts(path, images, labels, seed, batch_size, run)
    if run.world > 1:
        dist.barrier()
    if run.rank == 0:
        merge_parts(path, parts, labels, run.world)
    if run.world > 1:
        dist.barrier()


def part_file(path, key, rank):
    """The hidden file in which a rank collects one array."""
    return path.with_name(f".{path.stem}.{key}.{rank}.npy")


def create_array(file, dtype, shape):
    """A new array on disk, memory-mapped."""
    return np.lib.format.open_memmap(file, mode="w+", dtype=dtype, shape=shape)


def fill_parts(path, images, labels, seed, batch_size, run):
    """{key: array on disk} of this rank's images, every world-th from its rank on."""
    numbers = range(run.rank, len(labels), run.world)
    parts = {}
    bar = tqdm(total=len(numbers), desc=f"sampling {path.name}", unit="img",
               disable=True if run.rank else None)
    with bar:
        for start in range(0, len(numbers), batch_size):
            indices = list(numbers[start:start + batch_size])
            randn = image_randn(seed, indices, run.device)
            batch = images(labels[indices].to(run.device), randn)
            for key, value in batch.items():
                value = value.cpu().numpy()
                if key not in parts:
                    file = part_file(path, key, run.rank)
                    shape = (len(numbers), *value.shape[1:])
                    parts[key] = create_array(file, value.dtype, shape)
                parts[key][start:start + len(value)] = value
            bar.update(len(indices))
    for part in parts.values():
        part.flush()
    return parts


def merge_parts(path, parts, labels, world):
    """Write the .npz from the files of all ranks, under a temporary name until it is complete."""
    merged = {"labels": labels.numpy()}
    for key, part in parts.items():
        shape = (len(labels), *part.shape[1:])
        merged[key] = create_array(part_file(path, key, "all"), part.dtype, shape)
        for rank in range(min(world, len(labels))):
            merged[key][rank::world] = np.load(part_file(path, key, rank), mmap_mode="r")
    temporary = part_file(path, "tmp", 0).with_suffix(".npz")
    np.savez(temporary, **merged)
    os.replace(temporary, path)
    for leftover in path.parent.glob(f".{path.stem}.*.npy"):
        leftover.unlink()

"""Images for a classifier: augmented by DeiT's recipe, in order, and how they are classified.

A folder holds train/CLASS/* and val/CLASS/*; data made by prepare.py (see dataset.py) serve as
well. The augmentations are timm's and torchvision's own, with the numbers of DeiT's command line.
Mixup and label smoothing, .8, 1 and .1, act on batches: the training loop applies them.
"""
import functools
import itertools
import math
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import distributed as dist

from support.dataset import PreparedData, SyntheticData, mix_seed, outlive_signals
from support.samples import save_picture
from support.terminal import fail

MEAN = 0.485, 0.456, 0.406  # of ImageNet's channels
STD = 0.229, 0.224, 0.225
SMALL = 32  # up to this resolution, crops are shifts by at most 4 pixels
RAND_AUGMENT = "rand-m9-mstd0.5-inc1"
ERASING_PROB = 0.25
REPEATS = 3  # of an image in a row, each time augmented otherwise


# --------------------------------------------------------------------------------------------------
# Augmentation
# --------------------------------------------------------------------------------------------------
def training_transform(resolution, augment):
    """Random crop and flip of a PIL image; with augment "deit", RandAugment and erasing as well."""
    from timm.data.auto_augment import rand_augment_transform
    from timm.data.random_erasing import RandomErasing
    from timm.data.transforms import RandomResizedCropAndInterpolation
    from torchvision.transforms import (
        Compose,
        Normalize,
        RandomCrop,
        RandomHorizontalFlip,
        Resize,
        ToTensor,
    )
    if resolution <= SMALL:
        steps = [Resize(resolution), RandomCrop(resolution, padding=4)]
    else:
        steps = [RandomResizedCropAndInterpolation(resolution, interpolation="bicubic")]
    steps.append(RandomHorizontalFlip())
    if augment == "deit":
        fill = tuple(round(255 * mean) for mean in MEAN)
        options = dict(
            translate_const=int(0.45 * resolution), img_mean=fill, interpolation=Image.BICUBIC)
        steps.append(rand_augment_transform(RAND_AUGMENT, options))
    steps += [ToTensor(), Normalize(MEAN, STD)]
    if augment == "deit":
        steps.append(RandomErasing(ERASING_PROB, mode="pixel", device="cpu"))
    return Compose(steps)


def held_out_transform(resolution):
    """The centre of a PIL image: 7/8 of its shorter side, or all of it where images are small."""
    from torchvision.transforms import (
        CenterCrop,
        Compose,
        InterpolationMode,
        Normalize,
        Resize,
        ToTensor,
    )
    share = 1.0 if resolution <= SMALL else 0.875
    size = math.floor(resolution / share)
    return Compose([
        Resize(size, InterpolationMode.BICUBIC),
        CenterCrop(resolution),
        ToTensor(),
        Normalize(MEAN, STD),
    ])


# --------------------------------------------------------------------------------------------------
# Reading
# --------------------------------------------------------------------------------------------------
def open_part(cfg, part):
    """(data, meta) of part train or val: random for --bench, prepared data, or an image folder."""
    from torchvision.datasets import ImageFolder
    folder = Path(cfg.data, part)
    if cfg.bench:
        data = SyntheticData(cfg.resolution, is_latent=False)
        return data, data.meta
    if Path(cfg.data, "meta.json").is_file():
        if part == "train":
            folder = Path(cfg.data)
        data = PreparedData(folder, cfg.resolution)
        return data, data.meta
    if not any(folder.glob("*/*")):
        fail(f"no images in {folder}: --data must hold train/CLASS/* and val/CLASS/*, or be made "
             f"by prepare.py")
    data = ImageFolder(folder)
    meta = dict(source=Path(cfg.data).name, count=len(data), class_names=data.classes,
                num_classes=len(data.classes))
    return data, meta


class Images(torch.utils.data.Dataset):
    """Part train or val of cfg.data. data[index, seed] is an image (3,H,W) and its label.

    What an image draws depends on the seed in its place, not on the process that reads it.
    """

    def __init__(self, cfg, part):
        self.source, self.meta = open_part(cfg, part)
        if part == "train":
            self.transform = training_transform(cfg.resolution, cfg.augment)
        else:
            self.transform = held_out_transform(cfg.resolution)

    def __len__(self):
        return len(self.source)

    def read(self, index):
        """A PIL image and its label."""
        if isinstance(self.source, PreparedData):
            row = self.source[np.array([index])]
            return Image.fromarray(row["images"][0].numpy()), int(row["labels"])
        try:
            return self.source[index]
        except OSError as error:
            path, _ = self.source.samples[index]
            raise OSError(f"cannot read {path} ({error})") from None

    def __getitem__(self, place):
        index, seed = place
        image, label = self.read(index)
        # The augmentations draw from the global generators, some from one, some from another.
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.default_generator.manual_seed(seed)  # torch.manual_seed asks CUDA, too, and is slow
        return self.transform(image), label


def images_for(model, cfg, path):
    """The held-out images as the model in `path` takes them: its resolution, its classes."""
    val = Images(replace(cfg, resolution=model.resolution), "val")
    count = val.meta["num_classes"]
    classes = len(model.head.bias)
    if count != classes:
        fail(f"{cfg.data} has {count} classes, {path} {classes}: choose another --data")
    return val


# --------------------------------------------------------------------------------------------------
# Order
# --------------------------------------------------------------------------------------------------
def epoch_order(count, seed, epoch, repeats):
    """The indices of an epoch, `count` of them: 1/repeats of the images, repeated in a row."""
    generator = torch.Generator().manual_seed(mix_seed(seed, epoch, 0, 0))
    order = torch.randperm(count, generator=generator)
    return order.repeat_interleave(repeats)[:count].tolist()


def augmented_batches(data, cfg, run, first_step):
    """This rank's micro-batches, images (B,3,H,W) and labels (B,), from step `first_step` on.

    There is no end. As in dataset.micro_batches, a step's global batch is a stretch of the epochs,
    of which rank r takes every world-th image from r on.
    """
    count = len(data)
    repeats = REPEATS if cfg.augment == "deit" else 1

    @functools.lru_cache(2)  # a batch touches two epochs, or the set is tiny
    def order(epoch):
        return epoch_order(count, cfg.seed, epoch, repeats)

    def place(i):
        epoch, row = divmod(i, count)
        return order(epoch)[row], mix_seed(cfg.seed, epoch, row)

    def batches_of_places():
        for start in itertools.count(first_step * cfg.batch_size, cfg.batch_size):
            numbers = range(start + run.rank, start + cfg.batch_size, run.world)
            for i in range(0, len(numbers), run.micro_batch):
                yield [place(number) for number in numbers[i:i + run.micro_batch]]

    loader = torch.utils.data.DataLoader(
        data, batch_sampler=batches_of_places(), num_workers=cfg.workers,
        worker_init_fn=outlive_signals, pin_memory=run.device.type == "cuda")
    for batch in loader:
        yield [tensor.to(run.device, non_blocking=True) for tensor in batch]


def held_out_batches(data, cfg, run):
    """Images (B,3,H,W) and labels (B,) of this rank's share of `data`, each image once."""
    places = [(index, 0) for index in range(run.rank, len(data), run.world)]
    loader = torch.utils.data.DataLoader(
        data, cfg.micro_batch or 128, sampler=places, num_workers=cfg.workers,
        worker_init_fn=outlive_signals)
    for images, labels in loader:
        yield images.to(run.device), labels.to(run.device)


# --------------------------------------------------------------------------------------------------
# Judging
# --------------------------------------------------------------------------------------------------
@torch.no_grad()
def accuracy(cfg, run, models, data):
    """Top-1 of the models (in eval mode) on all images, and how they differ from the first.

    Returns the share of right predictions of each model, the largest difference of a logit, and how
    many images are predicted otherwise.
    """
    if run.world > 1:  # judged are the statistics that rank 0 saves
        for model in models:
            for buffer in model.buffers():
                dist.broadcast(buffer, 0)
    counts = torch.zeros(len(models) + 1, device=run.device)  # right of each model, and different
    largest = torch.zeros((), device=run.device)
    for images, labels in held_out_batches(data, cfg, run):
        logits = torch.stack([model(images).float() for model in models])  # (models,B,classes)
        predicted = logits.argmax(dim=-1)
        right = (predicted == labels).sum(dim=1)
        different = (predicted != predicted[0]).any(dim=0).sum()
        counts += torch.cat([right, different[None]])
        largest = torch.maximum(largest, (logits - logits[0]).abs().max())
    if run.world > 1:
        dist.all_reduce(counts)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    *right, different = counts.tolist()
    shares = [count / len(data) for count in right]
    return shares, largest.item(), int(different)


def save_by_class(path, images, predicted, classes, columns=8):
    """A picture of normalised images (N,3,H,W) by predicted class: a row for each of `classes`."""
    mean = torch.tensor(MEAN)[:, None, None]
    std = torch.tensor(STD)[:, None, None]
    grid = torch.ones(len(classes), columns, *images.shape[1:])  # white where images run out
    for row, label in zip(grid, classes):
        members = images[predicted == label][:columns]
        row[:len(members)] = members * std + mean
    pixels = (255 * grid.flatten(0, 1)).round()
    save_picture(path, pixels.permute(0, 2, 3, 1), columns)  # (N,3,H,W) -> (N,H,W,3)

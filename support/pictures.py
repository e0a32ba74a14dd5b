"""Files of pictures: which of a folder count, in which order, and how one becomes an array.

Image folders, captions, and the folders that REPA's preprocessing writes.
"""
import functools
import itertools
import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from support.terminal import fail, first_line

UNREADABLE = OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError  # PIL's


def list_images(root):
    """Files, labels and class names of an image folder, sorted; without sub-folders one class."""
    from torchvision.datasets.folder import IMG_EXTENSIONS, find_classes, make_dataset
    root = root.resolve()
    try:
        is_flat = not any(entry.is_dir() for entry in root.iterdir())
        classes = {root.name: 0} if is_flat else find_classes(root)[1]
        parent = root.parent if is_flat else root
        files, labels = zip(*make_dataset(parent, classes, IMG_EXTENSIONS))
    except OSError as error:  # no such folder, or a class without images
        fail(f"--images {root}: {error}")
    return files, np.array(labels), list(classes)


def center_crop(image, size):
    """PIL image to (size,size,3) as ADM, DiT, SiT, REPA: published statistics were made so."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.BOX)
    scale = size / min(image.size)
    width = round(image.width * scale)
    height = round(image.height * scale)
    image = image.resize((width, height), Image.BICUBIC)
    left = (width - size) // 2
    top = (height - size) // 2
    return np.array(image)[top:top + size, left:left + size]


def read_image(file, resolution):
    """An image file as (R,R,3) uint8."""
    with Image.open(file) as image:
        if image.mode.startswith("I"):  # 16 bits; convert() would clip them
            image = image.point(lambda v: v / 256)
        return center_crop(image.convert("RGB"), resolution)


def list_repa_part(folder):
    """Sorted (file, label) of one of REPA's folders."""
    try:
        labels = json.loads((folder / "dataset.json").read_text())["labels"]
        return sorted((str(folder / name), int(label)) for name, label in labels)
    except (OSError, ValueError, KeyError, TypeError) as error:
        fail(f"{folder}/dataset.json lists no files and classes ({first_line(error)}); --from-repa "
             f"wants the folder of REPA's preprocessing that holds images/ and vae-sd/")


def list_repa(root):
    """Pairs of files (image, moments) in sorted order, as REPA does; labels and class names."""
    parts = [list_repa_part(root / name) for name in ("images", "vae-sd")]
    pairs = list(itertools.zip_longest(*parts, fillvalue=("no file", None)))
    for (image, label), (moments, moments_label) in pairs:
        if label != moments_label:
            fail(f"{image} (class {label}) and {moments} (class {moments_label}) should be a "
                 f"pair: preprocess again")
    files = [(image, moments) for (image, _), (moments, _) in pairs]
    labels = [label for (_, label), _ in pairs]
    class_names = [str(i) for i in range(max(labels, default=-1) + 1)]  # the format keeps no names
    return files, np.array(labels), class_names


def read_array(file, shape):
    """The array in a file of REPA's, .npy or a picture."""
    try:
        array = np.load(file) if file.endswith(".npy") else np.array(Image.open(file))
    except UNREADABLE as error:
        raise ValueError(f"{file} cannot be read ({first_line(error)}): preprocess again") from None
    if array.shape != shape:
        raise ValueError(f"{file} has shape {array.shape}, not {shape}: give its --resolution, or "
                         f"preprocess again")
    return array


def read_pair(pair, resolution):
    """A pair of list_repa as arrays (R,R,3) and (8,R/8,R/8)."""
    image_file, moments_file = pair
    image = read_array(image_file, (resolution, resolution, 3))
    moments = read_array(moments_file, (8, resolution // 8, resolution // 8))
    has_std = moments[4:].min() >= 0  # some codes store the log-variance
    if not (has_std and abs(moments).max() < 65504):
        raise ValueError(f"{moments_file} holds no mean and std, or none that float16 can hold: "
                         f"preprocess again")
    return image, moments


def try_to_read(read, resolution, file):
    """(What `read` makes of a file, ""), or (None, why not): an exception would end the loop."""
    try:
        return read(file, resolution), ""
    except UNREADABLE as error:
        return None, str(error).split("\n")[0]


def read_files(files, rows, read, resolution, workers):
    """What try_to_read gives for the file of each row, in turn, from data processes."""
    return torch.utils.data.DataLoader(
        files, batch_size=None, sampler=rows, num_workers=workers,
        collate_fn=functools.partial(try_to_read, read, resolution))


def read_captions(path, root):
    """Image files under root and a caption of each, sorted: {file: caption}, or COCO's first."""
    try:
        listed = json.loads(path.read_text())
        if "annotations" in listed:
            names = {image["id"]: image["file_name"] for image in listed["images"]}
            notes = reversed(listed["annotations"])  # a dict keeps the last one
            listed = {names[note["image_id"]]: note["caption"] for note in notes}
        pairs = sorted((str(root / name), str(caption)) for name, caption in listed.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        fail(f"--captions {path}: {first_line(error)}; it wants {{\"file\": \"caption\"}}, or "
             f"COCO's captions_*.json")
    if not pairs:
        fail(f"--captions {path} holds no caption")
    for file, _ in pairs:
        if not Path(file).is_file():
            fail(f"{path} has a caption for {file}, which is not there; is --images {root} right?")
    return zip(*pairs)

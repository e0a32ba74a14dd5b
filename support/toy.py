"""The toy set, drawn by formulas, and the small networks that are trained on any set.

    data/toy      "a red disc on a dark blue background": 16x16 images, the shape is the label
    teacher.pt    a vision transformer to align with   } two classifiers of any prepared set,
    judge.pt      a CNN that says what samples show    } trained separately
The same command makes the same files, up to the rounding of other machines and threads.
"""
import json
import os
import shutil
from collections import Counter

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

from evaluate import Judge
from support.checkpoints import save_checkpoint
from support.dataset import PreparedData, images_to_input, read_meta, write_labels_and_meta
from support.terminal import fail, make_folder


def begin_folder(out):
    """An empty folder NAME.partial, to be renamed when all is in it."""
    folder = out.with_name(out.name + ".partial")
    shutil.rmtree(folder, ignore_errors=True)
    make_folder(folder)
    return folder


def pick_device():
    """CUDA if there is a GPU, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


# --------------------------------------------------------------------------------------------------
# data/toy: "a red disc on a dark blue background", 16x16
# --------------------------------------------------------------------------------------------------
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
COLOURS = {
    "red": (230, 40, 40), "green": (40, 190, 60), "blue": (50, 80, 240),
    "yellow": (245, 220, 40), "magenta": (220, 60, 220), "cyan": (40, 210, 220),
}


def draw_cover(labels, centre, radius, resolution):
    """The share of each pixel inside the shape, by 3x3 points a pixel: (N,R,R,1) float32."""
    axis = (np.arange(3 * resolution) + 0.5) / (1.5 * resolution) - 1
    axis = axis.astype(np.float32)
    cover = np.empty((len(labels), resolution, resolution, 1), np.float32)
    for label, is_inside in enumerate(SHAPES.values()):
        rows = np.flatnonzero(labels == label)
        x = (axis[None, None, :] - centre[rows, 0]) / radius[rows]  # (n,1,3R)
        y = (axis[None, :, None] - centre[rows, 1]) / radius[rows]  # (n,3R,1)
        inside = is_inside(x, y)  # (n,3R,3R) -> (n,R,3,R,3) -> (n,R,R)
        inside = inside.reshape(len(rows), resolution, 3, resolution, 3)
        cover[rows, ..., 0] = inside.mean((2, 4))
    return cover


def make_toy_set(count, seed, resolution=16):
    """Draw the toy set: images (N,R,R,3) uint8, labels (N,) int64 (the shape), N captions."""
    rng = np.random.RandomState(seed)  # its stream is frozen for ever, unlike default_rng's
    labels = rng.randint(len(SHAPES), size=count)
    colour = rng.randint(len(COLOURS), size=count)
    shift = rng.randint(len(COLOURS) - 1, size=count)
    ground = (colour + 1 + shift) % len(COLOURS)  # another of the six
    # Placement decides how hard the set is: +-0.25 and 0.5 to 0.7 halve a student's accuracy.
    centre = rng.uniform(-0.12, 0.12, size=(count, 2, 1, 1)).astype(np.float32)
    radius = rng.uniform(0.65, 0.85, size=(count, 1, 1)).astype(np.float32)

    cover = draw_cover(labels, centre, radius, resolution)
    palette = np.array(list(COLOURS.values()), np.float32)
    front = palette[colour][:, None, None]  # (N,1,1,3)
    back = 0.35 * palette[ground][:, None, None]
    images = back + cover * (front - back)  # (N,R,R,3)

    shapes = list(SHAPES)
    names = list(COLOURS)
    captions = []
    for s, c, g in zip(labels, colour, ground):
        captions.append(f"a {names[c]} {shapes[s]} on a dark {names[g]} background")
    return images.round().astype(np.uint8), labels.astype(np.int64), captions


def write_toy_part(folder, count, seed):
    """Draw `count` images into an existing folder."""
    images, labels, captions = make_toy_set(count, seed)
    np.save(folder / "images.npy", images)
    write_labels_and_meta(
        folder, labels, f"toy, seed {seed}", images.shape[1], list(SHAPES), captions)


def prepare_toy(out, count=20_000, val_count=4_000, steps=300, judge_steps=200):
    """Write the toy set with val/, teacher.pt and judge.pt to `out`: all of it or nothing."""
    folder = begin_folder(out)
    write_toy_part(folder, count, seed=0)
    make_folder(folder / "val")
    write_toy_part(folder / "val", val_count, seed=1)
    print(f"{out}: {count} images and {val_count} held out, {len(SHAPES)} classes")
    train_teacher_and_judge(folder, 4, steps, judge_steps)
    os.replace(folder, out)


# --------------------------------------------------------------------------------------------------
# The small vision teacher and the judge: two classifiers of a set, trained separately
# --------------------------------------------------------------------------------------------------
def caption_words(captions):
    """The pairs (position, word) that tell captions apart.

    In the toy's, a 2nd word "blue" is the colour of the shape, a 7th that of the background.
    """
    counts = Counter()
    for caption in captions:
        counts.update(enumerate(caption.split()))
    return sorted(pair for pair, n in counts.items() if 0.01 <= n / len(captions) <= 0.99)


def caption_targets(captions, words):
    """Which of W pairs (position, word) each of N captions holds: (N,W) float32 of 0 and 1."""
    targets = []
    for caption in captions:
        pairs = set(enumerate(caption.split()))
        targets.append([float(word in pairs) for word in words])
    return torch.tensor(targets)


def load_part(folder, resolution):
    """Images (N,R,R,3), labels (N,) and captions (N,) of a prepared set; "" is no caption."""
    data = PreparedData(folder, resolution)
    captions = [""] * len(data)
    file = folder / "captions.json"
    if file.is_file():
        captions = json.loads(file.read_text())
    return data.array("images"), data.array("labels"), np.array(captions)


def load_parts(folder, resolution):
    """What to train on, and what is held out: val/, else every 20th image; as load_part."""
    if (folder / "val").is_dir():
        return load_part(folder, resolution), load_part(folder / "val", resolution)
    arrays = load_part(folder, resolution)
    is_held_out = np.arange(len(arrays[1])) % 20 == 0  # images are sorted by class
    train = [array[~is_held_out] for array in arrays]
    held_out = [array[is_held_out] for array in arrays]
    return train, held_out


def read_input(images, device):
    """Rows of images, uint8, to x (B,3,R,R) in [-1,1]; copied, for a memory map is read-only."""
    return images_to_input(torch.tensor(images, device=device))


def train_classifier(name, network, num_classes, part, steps, lr, noise, seed):
    """Train network (B,3,R,R) -> logits (B,num_classes+W), 128 images a step.

    part: images (N,R,R,3), labels (N,) and caption words (N,W). Noise of a random standard
    deviation up to `noise` is added to the images.
    """
    images, labels, words = part
    device = labels.device
    g = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(network.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
    network.to(device).train()
    for _ in tqdm(range(steps), desc=name, unit="step", disable=None):
        rows = torch.randint(len(labels), (128,), generator=g)
        x = read_input(images[rows.numpy()], device)
        if noise > 0:
            std = noise * torch.rand(128, 1, 1, 1, generator=g)
            x = x + (std * torch.randn(x.shape, generator=g)).to(device)
        label_logits, word_logits = network(x).tensor_split([num_classes], dim=1)
        loss_labels = F.cross_entropy(label_logits, labels[rows])
        loss_words = F.binary_cross_entropy_with_logits(word_logits, words[rows], reduction="sum")
        loss = loss_labels + loss_words / len(rows)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


@torch.inference_mode()
def measure_classifier(network, num_classes, part):
    """Shares of the images of a part with the right label, and with every caption word right."""
    images, labels, words = part
    network.eval()
    logits = []
    for start in range(0, len(images), 500):
        logits.append(network(read_input(images[start:start + 500], labels.device)))
    label_logits, word_logits = torch.cat(logits).tensor_split([num_classes], dim=1)
    is_right = label_logits.argmax(dim=1) == labels
    are_words_right = ((word_logits > 0) == words.bool()).all(dim=1)
    return is_right.float().mean().item(), are_words_right.float().mean().item()


def train_teacher_and_judge(folder, patch_size, steps, judge_steps):
    """Train both on data/NAME; write teacher.pt and judge.pt there, with held-out accuracies."""
    from timm.models.vision_transformer import VisionTransformer
    meta = read_meta(folder)
    resolution = meta["resolution"]
    num_classes = meta["num_classes"]
    if num_classes < 2:
        fail(f"{folder} has one class; a teacher and a judge need labels that differ")
    if resolution % patch_size:
        fail(f"--patch-size {patch_size} does not divide the resolution {resolution} of {folder}")
    parts = load_parts(folder, resolution)
    words = caption_words(parts[0][2])
    device = pick_device()
    tensors = []
    for images, labels, captions in parts:
        targets = caption_targets(captions, words).to(device)
        tensors.append((images, torch.tensor(labels, device=device), targets))
    train, held_out = tensors

    torch.manual_seed(0)  # the weights; the batches have generators of their own
    vit_config = dict(img_size=resolution, patch_size=patch_size, embed_dim=64, depth=4,
                      num_heads=4, num_classes=0, class_token=True)
    vit = VisionTransformer(**vit_config)
    head = nn.Linear(64, num_classes + len(words))  # thrown away
    judge_config = dict(num_classes=num_classes, num_words=len(words))
    judge = Judge(**judge_config)

    def train_and_save(name, network, trunk, config, **recipe):
        train_classifier(name, network, num_classes, train, **recipe)
        accuracy, word_accuracy = measure_classifier(network, num_classes, held_out)
        line = f"{name}: {100 * accuracy:.2f} % of {len(held_out[0])} held-out images"
        if words:
            line += f", all caption words right {100 * word_accuracy:.2f} %"
        else:
            word_accuracy = None
        save_checkpoint(folder / f"{name}.pt", dict(
            config=config, model=trunk.cpu().state_dict(), accuracy=accuracy,
            resolution=resolution, words=words, word_accuracy=word_accuracy))
        print(line)

    train_and_save("teacher", nn.Sequential(vit, head), vit, vit_config,
                   steps=steps, lr=3e-3, noise=0.0, seed=1)
    train_and_save("judge", judge, judge, judge_config,
                   steps=judge_steps, lr=1e-2, noise=0.15, seed=2)

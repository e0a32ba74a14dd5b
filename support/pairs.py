"""The toy of text-to-image models: "red square, blue cross", 16x16, and a small model of it.

    data/pairs    images, features of their captions, objects.npy (every object in every place), and
                  base.pt, a small text-to-image model, for which some captions were wrong
The same command makes the same files, up to the rounding of other machines and threads.
"""
import itertools
import os

import numpy as np
import torch
import torch.nn as nn
from tqdm import tqdm

from common import init_linear, interpolate
from support.checkpoints import save_checkpoint
from support.dataset import images_to_input, write_labels_and_meta
from support.sd3 import MMDiT
from support.toy import COLOURS, SHAPES, begin_folder, pick_device

PAIR_SHAPES = "square", "cross", "ring", "diamond"
PLACES = 8  # of an object in its half of the image: 4 heights, 2 from left to right
BACKGROUND = 25  # nearly black
PAIRS_MODEL = dict(in_channels=3, hidden_size=64, depth=4, num_heads=4, context_dim=32,
                   pooled_dim=32, pos_embed_size=4, patch_size=4)


def draw_objects():
    """Every object in every place of its half: (6 colours, 4 shapes, 8 places, 16, 8, 3) uint8."""
    axis = (np.arange(7) + 0.5) / 3.5 - 1  # an object has 7x7 pixels
    masks = np.zeros((len(PAIR_SHAPES), PLACES, 16, 8, 1), bool)
    for shape, name in enumerate(PAIR_SHAPES):
        is_inside = SHAPES[name](axis[None], axis[:, None])
        for place in range(PLACES):
            top = 3 + place // 2
            left = place % 2
            masks[shape, place, top:top + 7, left:left + 7, 0] = is_inside
    colours = np.array(list(COLOURS.values())).reshape(-1, 1, 1, 1, 1, 3)  # (6,3) -> (6,1,1,1,1,3)
    return np.where(masks, colours, BACKGROUND).astype(np.uint8)


def make_pairs(count, seed):
    """Images (N,16,16,3), labels (N,), context (N,4,32), pooled (N,32), and the 576 captions.

    A label is the number of a caption. A word has a random vector for each of its four positions:
    that is all an image can be asked for, and there is nothing to learn.
    """
    rng = np.random.RandomState(seed)  # its stream is frozen for ever
    vocabulary = 6, 4, 6, 4  # colour and shape on the left, colour and shape on the right
    words = rng.randint(vocabulary, size=(count, 4))
    places = rng.randint(PLACES, size=(count, 2))
    colours = words[:, 0::2]
    shapes = words[:, 1::2]
    halves = draw_objects()[colours, shapes, places]  # (N,2,16,8,3)
    images = np.concatenate([halves[:, 0], halves[:, 1]], axis=2)  # (N,16,16,3)
    labels = np.ravel_multi_index(words.T, vocabulary)
    vectors = np.random.RandomState(0).standard_normal((4, 6, 32))
    context = vectors[np.arange(4), words].astype(np.float16)  # (N,4,32)
    pooled = context.mean(axis=1)
    captions = []
    for names in itertools.product(COLOURS, PAIR_SHAPES, repeat=2):
        captions.append("{} {}, {} {}".format(*names))
    return images, labels, context, pooled, captions


def train_base_model(images, context, pooled, steps, batch_size=32, lr=4e-3, wrong=0.25,
                     no_text=0.1):
    """An MM-DiT by plain flow matching, with draws of the CPU; returns it and its last loss.

    A share `wrong` of the captions belongs to other images: that is what a model learns from on the
    web, and it leaves something to align. A share `no_text` is dropped: the null text is zeros.
    """
    torch.manual_seed(0)
    g = torch.Generator().manual_seed(0)
    device = pick_device()
    model = MMDiT(**PAIRS_MODEL).apply(init_linear).to(device)
    for name, parameter in model.named_parameters():
        if "adaLN" in name or "final_layer.linear" in name:
            nn.init.zeros_(parameter)  # as in a fresh SiT: blocks are the identity, v_hat is 0
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
    for _ in tqdm(range(steps), desc="text-to-image model", unit="step", disable=None):
        rows = torch.randint(len(images), (batch_size,), generator=g)
        x = images_to_input(torch.from_numpy(images[rows.numpy()]))
        t = torch.rand(batch_size, generator=g)
        noise = torch.randn(x.shape, generator=g)
        is_wrong = torch.rand(batch_size, generator=g) < wrong
        is_kept = torch.rand(batch_size, generator=g) >= no_text
        text_rows = torch.where(is_wrong, rows.roll(1), rows).numpy()  # whose caption
        tokens = torch.from_numpy(context[text_rows]).float() * is_kept[:, None, None]
        vector = torch.from_numpy(pooled[text_rows]).float() * is_kept[:, None]
        x_t, v = interpolate(x, noise, t)
        v_hat = model(x_t.to(device), t.to(device), tokens.to(device), vector.to(device))
        loss = (v_hat - v.to(device)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return model.cpu(), loss.item()


def prepare_pairs(out, count=20_400, steps=4800):
    """Write the set with base.pt to `out`: all of it or nothing."""
    folder = begin_folder(out)
    images, labels, context, pooled, captions = make_pairs(count, 0)
    np.save(folder / "images.npy", images)
    np.save(folder / "context.npy", context)
    np.save(folder / "pooled.npy", pooled)
    np.save(folder / "objects.npy", draw_objects())
    write_labels_and_meta(folder, labels, "pairs", images.shape[1], captions, text="toy")
    train = count - count // 20  # CaptionedData holds out the end
    model, loss = train_base_model(images[:train], context[:train], pooled[:train], steps)
    save_checkpoint(folder / "base.pt", dict(config=PAIRS_MODEL, model=model.state_dict()))
    os.replace(folder, out)
    print(f"{out}: {count} images of {len(captions)} captions, and a model with velocity loss "
          f"{loss:.4f}")


def recognise(images, objects):
    """Captions (N,) of images (N,16,16,3): each half's nearest of objects (6,4,8,16,8,3). Exact."""
    halves = images.reshape(-1, 16, 2, 8, 3).swapaxes(1, 2)  # (N,2,16,8,3)
    halves = halves.reshape(-1, 384).astype(np.float32)  # (2N,384)
    templates = objects.reshape(-1, 384).astype(np.float32)
    distances = (templates ** 2).sum(axis=1) - 2 * halves @ templates.T  # but for |half|^2
    words = distances.argmin(axis=1) // objects.shape[2]  # colour and shape; the place comes last
    return words.reshape(-1, 2) @ [24, 1]

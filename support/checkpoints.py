"""Checkpoint files: what they hold, how they are written safely, and the one way to read each.

A checkpoint holds tensors and plain values, nothing pickled. By file and script:
    last.pt           model, ema, optimizer: state dicts; step: updates done; config: the Config
                      as a dict; data: meta.json of the data set, and what a script adds to it.
                      Two networks that train together: disc, optimizer_d, too. A run in phases:
                      phase, 1 or 2. Soft tokens: soft and optimizer, no model, no ema.
    ema-<step>.pt     ema, step, config, data (and phase)
    best.pt           soft, step, config, data with the validation metrics
    vae.pt            vae: an autoencoder's state dict; sizes: its constructor's arguments; id: a
                      checksum of the weights; latent_mean, latent_std: a number a channel; step,
                      config, data
    teacher.pt        model, config: of a timm VisionTransformer; resolution; accuracy, words,
    judge.pt          word_accuracy: on held-out images; the judge's are those of evaluate.Judge
    base.pt           model, config: of the small text-to-image model
    bank-*.pt         features (N,K), or C (N,r), M (K,r), S (r,) and mean (K,); labels (N,);
                      teacher, data, width: of what and by whom
    *-folded.pt       model, config (model, idle_ratio)
State dicts have the names of the official releases, so that those load with strict=True.
"""
import math
import os
import pickle
from dataclasses import asdict
from pathlib import Path

import torch

from common import SIT_SIZES, SiT
from support.flags import BOOKKEEPING, flag
from support.terminal import fail, first_line, say

WRAPPERS = "ema", "network"  # names under which official codes store averaged weights
TRAINING_ONLY = "projectors."  # MLPs that no sampler needs


# --------------------------------------------------------------------------------------------------
# Files
# --------------------------------------------------------------------------------------------------
def save_checkpoint(path, state):
    """Write under a temporary name, then rename: a kill or a full disk spares the old file."""
    temporary = Path(f"{path}.tmp")
    try:
        torch.save(state, temporary)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as a RuntimeError
        temporary.unlink(missing_ok=True)
        fail(f"could not write {path} ({first_line(error)}); free some disk and repeat the "
             f"command: it continues from the last checkpoint")


def load_checkpoint(path, kinds=dict):
    """Read a checkpoint on the CPU, memory-mapped. Pickled objects can run code: refused."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file
    if not Path(path).is_file():
        fail(f"there is no checkpoint {path}")
    try:
        if Path(path).suffix == ".safetensors":
            return load_file(path)
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError:
        fail(f"{path} is not a checkpoint, or holds pickled objects beside its tensors; if you "
             f"trust its source, convert it once: python -c \"import torch; c = torch.load("
             f"'{path}', weights_only=False); torch.save(c.get('ema', c), 'ema.pt')\"")
    except (OSError, RuntimeError, EOFError, ValueError, SafetensorError) as error:
        fail(f"{path} is not a checkpoint, or is damaged ({first_line(error)})")
    if not isinstance(checkpoint, kinds):
        fail(f"{path} is not a checkpoint: it holds a {type(checkpoint).__name__}, not named "
             f"tensors")
    return checkpoint


def different_names(model, weights):
    """Sorted names that `weights` lacks, has in excess, or has in another shape."""
    expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
    given = {name: getattr(tensor, "shape", None) for name, tensor in weights.items()}
    return sorted(name for name in expected | given if expected.get(name) != given.get(name))


def load_strict(model, weights, complaint, parts="names or shapes", assign=False):
    """Fill `model` with weights of exactly its names and shapes.

    complaint: what to say otherwise, naming the file and the remedy; parts: of what. assign: the
    tensors become the model's, for a model that was made on the meta device.
    """
    if wrong := different_names(model, weights):
        fail(f"{complaint}: {len(wrong)} {parts} differ, first {wrong[0]}")
    model.load_state_dict(weights, assign=assign)


# --------------------------------------------------------------------------------------------------
# Weights of a SiT
# --------------------------------------------------------------------------------------------------
def convert_willisma_sit(weights):
    """State dict of willisma/SiT (time 1 - t, 2C output channels, other sign) to ours, exactly.

    Putting 1 - t for t in cos(t f), sin(t f), on which the columns [Wc|Ws] act, is the formula for
    the cosine and the sine of a difference.
    """
    weights = dict(weights)
    channels = weights["x_embedder.proj.weight"].shape[1]
    for name in ("final_layer.linear.weight", "final_layer.linear.bias"):
        rows = weights[name].unflatten(0, (-1, 2 * channels))  # (p*p,2C,...): keep C, flip the sign
        weights[name] = -rows[:, :channels].flatten(0, 1)
    first = weights["t_embedder.mlp.0.weight"]
    w_cos, w_sin = first.double().chunk(2, dim=1)
    half = w_cos.shape[1]
    f = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float64) / half)
    new_cos = w_cos * f.cos() + w_sin * f.sin()
    new_sin = w_cos * f.sin() - w_sin * f.cos()
    weights["t_embedder.mlp.0.weight"] = torch.cat([new_cos, new_sin], dim=1).to(first.dtype)
    return weights


def load_weights(path, cfg=None):
    """Weights of a SiT: ours, an official EMA, a bare state dict, or willisma/SiT's (converted).

    Returns (state dict, the checkpoint it came in). With cfg, a checkpoint that was trained as
    another --model or with another --path-type is refused.
    """
    checkpoint = load_checkpoint(path)
    weights = checkpoint
    for name in WRAPPERS:
        if name in checkpoint:
            weights = checkpoint[name]
            break
    if "sit.x_embedder.proj.weight" in weights:  # of a module that wraps its SiT
        weights = {name.removeprefix("sit."): weight for name, weight in weights.items()}
    if "x_embedder.proj.weight" not in weights:
        fail(f"{path} holds no SiT weights (there is no x_embedder.proj.weight in it)")
    outputs = weights["final_layer.linear.bias"].numel()
    if outputs == 2 * weights["x_embedder.proj.weight"][0].numel():  # learned variances
        weights = convert_willisma_sit(weights)
    if cfg is not None:
        check_trained_as(cfg, path, checkpoint)
    return weights, checkpoint


def check_trained_as(cfg, path, checkpoint, names=("model", "path_type")):
    """Refuse a checkpoint whose config differs from cfg in one of these fields."""
    trained = checkpoint.get("config", {})
    for name in names:
        if name in trained and trained[name] != getattr(cfg, name):
            fail(f"{path} was trained as {trained[name]}: add {flag(name)} {trained[name]}")


def sit_from_weights(weights, name, make=SiT):
    """The SiT of size `name` that holds these weights; all other sizes are read off their shapes.

    make(input_size, in_channels, num_classes, **sizes) builds it: SiT, or a method's subclass.
    """
    weights = {key: w for key, w in weights.items() if not key.startswith(TRAINING_ONLY)}
    hidden_size, channels, patch, _ = weights["x_embedder.proj.weight"].shape
    blocks = [int(key.split(".")[1]) for key in weights if key.startswith("blocks.")]
    depth = 1 + max(blocks, default=-1)
    sizes = SIT_SIZES[name]
    if (hidden_size, depth, patch) != (sizes["hidden_size"], sizes["depth"], sizes["patch_size"]):
        fail(f"these weights have width {hidden_size}, {depth} blocks, patch {patch}; --model "
             f"{name} has {sizes['hidden_size']}, {sizes['depth']}, {sizes['patch_size']}")
    input_size = patch * math.isqrt(weights["pos_embed"].shape[1])
    table = weights.get("y_embedder.embedding_table.weight", [0])  # not every model has labels
    model = make(input_size, channels, len(table) - 1, **sizes)
    if wrong := sorted(weights.keys() ^ model.state_dict().keys()):
        fail(f"these weights are not those of a SiT: {wrong[0]} is missing or unexpected")
    model.load_state_dict(weights)
    return model


def init_from(path, model, may_be_fresh=("y_embedder", "projectors")):
    """Start `model` from a checkpoint; returns the names of the modules that stay fresh.

    may_be_fresh: modules that the checkpoint need not have, or not in this shape.
    """
    weights, _ = load_weights(path)
    shapes = {key: value.shape for key, value in model.state_dict().items()}
    fits = {key: w for key, w in weights.items() if key in shapes and w.shape == shapes[key]}
    fresh = sorted({key.split(".")[0] for key in shapes if key not in fits})
    if not set(fresh) <= set(may_be_fresh):
        fail(f"{path} does not fit this model: {', '.join(fresh)} differ")
    model.load_state_dict(fits, strict=False)
    return fresh


# --------------------------------------------------------------------------------------------------
# A run and its continuation
# --------------------------------------------------------------------------------------------------
def identity(config, meta, bookkeeping):
    """What identifies a run: its settings, except for the bookkeeping, and its data."""
    settings = {name: value for name, value in config.items() if name not in bookkeeping}
    settings["data"] = f"{meta['source']}, {meta['count']} images, {meta['num_classes']} classes"
    return settings


def open_run(cfg, meta, bookkeeping=BOOKKEEPING):
    """The last.pt in cfg.out, or None where there is none; one of another run is refused."""
    path = Path(cfg.out) / "last.pt"
    if cfg.bench or not path.exists():
        return None
    checkpoint = load_checkpoint(path)
    if "optimizer" not in checkpoint:
        fail(f"{path} is not a checkpoint of a run: choose another --out")
    old = identity(checkpoint["config"], checkpoint["data"], bookkeeping)
    new = identity(asdict(cfg), meta, bookkeeping)
    changed = [name for name in old | new if old.get(name) != new.get(name)]
    if changed:
        changes = [f"{name} {old.get(name)!r}, now {new.get(name)!r}" for name in changed]
        fail(f"{cfg.out} holds another run ({'; '.join(changes)}): choose another --out")
    return checkpoint


def restore(cfg, meta, model, ema, optimizer, init=init_from, bookkeeping=BOOKKEEPING):
    """Continue the run that cfg.out holds, or begin (from --init); returns the steps already done.

    init(path, model) fills the model from a file and returns what it left fresh.
    """
    checkpoint = open_run(cfg, meta, bookkeeping)
    if checkpoint is not None:
        model.load_state_dict(checkpoint["model"])
        ema.load_state_dict(checkpoint["ema"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        return checkpoint["step"]
    if cfg.init:
        fresh = init(cfg.init, model)
        say(f"started from {cfg.init}; left fresh: {', '.join(fresh) or 'nothing'}")
        ema.load_state_dict(model.state_dict())
    return 0


def save_run(cfg, name, step, meta, **parts):
    """Write a checkpoint of these parts (model, ema, optimizer) into cfg.out; no random state."""
    state = dict(step=step, config=asdict(cfg), data=meta)
    for part, value in parts.items():
        state[part] = value.state_dict() if hasattr(value, "state_dict") else value
    save_checkpoint(Path(cfg.out) / name, state)

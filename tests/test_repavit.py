"""RePaViT against the official code; its fold; its recipe and data; the commands that fold, classify and refuse."""
import argparse
import copy
import json
import math
import os
import re
import signal
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from torch import distributed as dist
from torchvision.utils import save_image

import repavit
from common import SIT_SIZES, SiT
from golden_utils import Fixture
from repavit import (
    MODELS,
    FoldedFFN,
    IdleFFN,
    IdleMlp,
    IdleSiTBlock,
    RePaViT,
    fold,
    multiply_adds,
    repavit_loss,
)
from support import flags as command_line
from test_training import (  # noqa: F401
    ROOT,
    TORCHRUN,
    as_a_fresh_process,
    assert_same_run,
    break_off,
    finish,
    kill,
    last,
    relative_error,
    start,
)
from two_ranks import record

GOLDEN = Fixture("repavit")
CONFIG = GOLDEN.config
THETAS = [0.0, 0.25, 0.5, 0.75, 1.0]


def parse(arguments):
    """The script's Config from its command line."""
    return command_line.parse(arguments, repavit.Config, repavit.MODELS, repavit.RECIPES, repavit.RANGES)


def small(idle_ratio=CONFIG["idle_ratio"], feature_norm="BatchNorm", **changes):
    """The fixture's model, or one with other idle channels."""
    sizes = dict(width=CONFIG["embed_dim"], depth=CONFIG["depth"], num_heads=CONFIG["num_heads"],
                 patch_size=CONFIG["patch_size"])
    return RePaViT(CONFIG["img_size"], CONFIG["num_classes"], sizes | changes, idle_ratio, feature_norm,
                   CONFIG["drop_path"])


def random_statistics(model):
    """BatchNorms as after a training: weights, biases, means and variances that are not 0 and 1."""
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d):
            for tensor in (module.weight, module.bias, module.running_mean):
                tensor.data.add_(0.3 * torch.randn(tensor.shape, generator=generator))
            module.running_var.copy_(torch.randn(module.running_var.shape, generator=generator).mul(0.4).exp())
    return model


def block_outputs(model, *args):
    """(logits, outputs of all blocks (depth,B,N,D)) of one forward."""
    found = []
    hooks = [block.register_forward_hook(lambda _, __, output: found.append(output)) for block in model.blocks]
    logits = model(*args)
    for hook in hooks:
        hook.remove()
    return logits, torch.stack(found)


# ----------------------------------------------------------------------------------------------------------------------
# The official code


def test_training_form():
    model = GOLDEN.fill(small()).train()
    assert [rate.item() for rate in model.drop_rates] == CONFIG["drop_path_per_block"]
    assert model.blocks[0].mlp.k == CONFIG["act_channels"] and model.norm.eps == CONFIG["norm_eps"]["norm"]
    keep = GOLDEN.input("droppath_mask").permute(2, 0, 1).clone()  # (depth,2,B) -> (B,depth,2)
    keep[:, 0] = 1  # the first block's rate is 0
    images, targets = GOLDEN.input("images"), GOLDEN.input("soft_targets")
    logits, outputs = block_outputs(model, images, keep)
    GOLDEN.check("train/logits", logits)
    GOLDEN.check("train/block_outputs", outputs)
    for name, statistic in model.named_buffers():
        if "running" in name:
            GOLDEN.check(f"after_train/{name}", statistic)
    loss = repavit_loss(model, images, targets, keep)
    GOLDEN.check("train/loss", loss.mean())
    assert loss.shape == (6,)
    loss.mean().backward()
    parameters = dict(model.named_parameters())
    for name in CONFIG["grad_names"]:
        GOLDEN.check(f"grad/{name}", parameters[name].grad)


def test_evaluation_and_folded_form():
    model = GOLDEN.fill(small()).eval()
    logits, outputs = block_outputs(model, GOLDEN.input("images"))
    GOLDEN.check("eval/logits", logits)
    GOLDEN.check("eval/block_outputs", outputs)
    folded = fold(model)
    logits, outputs = block_outputs(folded, GOLDEN.input("images"))
    GOLDEN.check("reparam/logits", logits)
    GOLDEN.check("reparam/block_outputs", outputs)
    for name, weight in folded.state_dict().items():
        if ".mlp." in name:
            GOLDEN.check(f"folded/{name}", weight)


def check_one_layer(theta):
    layer = GOLDEN.fill(IdleFFN(CONFIG["ffn_dim"], CONFIG["ffn_hidden"], theta), f"ffn/{theta}/").eval()
    GOLDEN.check(f"ffn/{theta}/act_channels", layer.k)
    GOLDEN.check(f"ffn/{theta}/y", layer(GOLDEN.input("ffn_x")))
    with torch.no_grad():
        folded = layer.fold()
    GOLDEN.check(f"ffn/{theta}/folded_keys", sorted(folded.state_dict()))
    GOLDEN.check(f"ffn/{theta}/y_reparam", folded(GOLDEN.input("ffn_x")))


def test_layers_and_nothing_left():
    """The last of the fixture: all of it is in scope."""
    for theta in CONFIG["ffn_thetas"]:
        check_one_layer(theta)
    test_training_form()
    test_evaluation_and_folded_form()
    GOLDEN.assert_all_checked()


def official_names(depth, mlp):
    """Names in the official state dict (the specification's list), with `mlp` the names inside an FFN."""
    attention = [f"attn.{name}.{kind}" for name in ("qkv", "proj", "norm") for kind in ("weight", "bias")]
    return {"cls_token", "pos_embed", "patch_embed.proj.weight", *(
        f"{name}.{kind}" for name in ("norm_pre", "norm", "head") for kind in ("weight", "bias"))} | {
        f"blocks.{i}.{name}" for i in range(depth) for name in attention + [f"mlp.{key}" for key in mlp]}


TRAINED = [f"{name}.{kind}" for name in ("fc1", "fc2", "norm1", "norm2") for kind in ("weight", "bias")] + [
    f"{name}.{kind}" for name in ("norm1", "norm2") for kind in ("running_mean", "running_var", "num_batches_tracked")]
FOLDED = ["fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias", "fc3.weight"]


def on_meta(name, idle_ratio, folded=False, feature_norm="BatchNorm"):
    """A full-size model without memory, folded in shape if asked."""
    with torch.device("meta"):
        model = RePaViT(224, 1000, MODELS[name], idle_ratio, feature_norm).eval()
        for block in model.blocks if folded else ():
            block.mlp = FoldedFFN(MODELS[name]["width"], block.mlp.k)
    return model


def millions(model):
    return sum(p.numel() for p in model.parameters()) / 1e6


@pytest.mark.parametrize("name, idle_ratio, before, after", [
    ("Tiny", 0.5, 5.74, 4.38), ("Tiny", 0.75, 5.74, 3.49), ("Small", 0.5, 22.09, 16.72), ("Small", 0.75, 22.09, 13.18),
    ("Base", 0.5, 86.64, 65.30), ("Base", 0.75, 86.64, 51.13), ("Large", 0.75, 304.52, 178.38),
    ("Huge", 0.75, 632.53, 369.85)])
def test_names_and_sizes_are_the_official_ones(name, idle_ratio, before, after):
    model, folded = (on_meta(f"RePaViT_{name}", idle_ratio, is_folded) for is_folded in (False, True))
    assert (round(millions(model), 2), round(millions(folded), 2)) == (before, after)
    depth, width = len(model.blocks), MODELS[f"RePaViT_{name}"]["width"]
    assert set(model.state_dict()) == official_names(depth, TRAINED)
    assert set(folded.state_dict()) == official_names(depth, FOLDED)
    assert model.state_dict()["blocks.0.mlp.fc1.weight"].shape == (4 * width, width)
    assert model.state_dict()["pos_embed"].shape == (1, 197, width)


def test_the_published_table_is_ours():
    """Folded, parameters to the digit and GMACs to their last (Huge: 72.5, not 72.6).

    The vanilla forms are DeiT and ViT proper there: a patch embedding with bias and no norm before the blocks.
    """
    rows = re.findall(r"^    (\w+) +idle (\.\d+) +([\d.]+) -> +([\d.]+) M +([\d.]+) -> +([\d.]+) GMAC",
                      (ROOT / "docs/results.md").read_text(), re.MULTILINE)
    quoted = re.findall(r"^    (\w+) +idle (\.\d+) +([\d.]+) -> +([\d.]+) M ", repavit.__doc__, re.MULTILINE)
    assert len(quoted) == 2 and set(quoted) <= {row[:4] for row in rows}
    assert len(rows) == 5
    for name, *figures in rows:
        idle_ratio, vanilla, folded, vanilla_macs, folded_macs = map(float, figures)
        assert parse(["--model", f"RePaViT_{name}"]).idle_ratio == idle_ratio
        full = on_meta(f"RePaViT_{name}", 0, feature_norm="LayerNorm")
        small = on_meta(f"RePaViT_{name}", idle_ratio, folded=True)
        assert round(millions(small), 1) == folded and millions(full) == pytest.approx(vanilla, abs=0.051, rel=1e-3)
        assert multiply_adds(small) / 1e9 == pytest.approx(folded_macs, abs=0.06, rel=2e-3)
        assert multiply_adds(full) / 1e9 == pytest.approx(vanilla_macs, abs=0.06, rel=2e-3)
    assert multiply_adds(on_meta("RePaViT_Base", 0)) / 1e9 == pytest.approx(16.85, abs=0.01)


def test_multiply_adds_are_those_of_the_formula():
    """A layer has 2 rho D^2 of them a token, folded (2 k/D + 1) D^2; attention's products are left out."""
    model = small(0.75)
    tokens, width, depth = 17, 32, 3
    outside = 16 * 32 * 3 * 8 * 8 + 32 * 10
    assert multiply_adds(model.eval()) == depth * tokens * 12 * width**2 + outside
    assert multiply_adds(fold(model)) == depth * tokens * (4 + 3) * width**2 + outside


# ----------------------------------------------------------------------------------------------------------------------
# The fold


@pytest.mark.parametrize("theta", [*THETAS, 0.9])
def test_folding_changes_nothing_but_rounding(theta):
    torch.manual_seed(0)
    model = random_statistics(small(theta)).eval()
    images = torch.randn(4, 3, 32, 32)
    folded = fold(model)
    torch.testing.assert_close(folded(images), model(images), rtol=1e-5, atol=1e-5)
    # In double precision the two are one function.
    torch.testing.assert_close(copy.deepcopy(model).double()(images.double()), fold(model.double()).double()(
        images.double()), rtol=1e-5, atol=1e-6)
    width, k = 32, math.ceil(128 * (1 - theta))
    assert sum(p.numel() for p in folded.blocks[0].mlp.parameters()) == width**2 + 2 * k * width + width + k
    assert not any(isinstance(module, nn.BatchNorm1d) for module in folded.modules())


def test_the_fold_is_exact_in_double_precision():
    torch.manual_seed(0)
    layer = random_statistics(IdleFFN(16, 64, 0.75)).double().eval()
    h = torch.randn(2, 5, 16, dtype=torch.float64)
    with torch.no_grad():
        weights = (*repavit.fold_norm(layer.norm1, layer.fc1), *repavit.fold_norm(layer.norm2, layer.fc2))
        w1, b1, w2, b2 = weights
        k = layer.k
        w_a, b_a = w2[:, k:] @ w1[k:] + torch.eye(16, dtype=torch.float64), w2[:, k:] @ b1[k:] + b2
        expected = h @ w_a.T + b_a + F.gelu(h @ w1[:k].T + b1[:k]) @ w2[:, :k].T
        torch.testing.assert_close(layer(h), expected, rtol=1e-12, atol=1e-12)


def test_folding_leaves_the_model_as_it_was():
    model = random_statistics(small()).train()
    before = copy.deepcopy(model.state_dict())
    folded = fold(model)
    assert model.training and not folded.training and isinstance(model.blocks[0].mlp, IdleFFN)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    for name, value in folded.state_dict().items():
        assert ".mlp." in name or torch.equal(value, before[name]), name  # attention and head are untouched


def test_an_average_is_folded_after_averaging():
    """The product of averages is not the average of products."""
    torch.manual_seed(0)
    one, two = random_statistics(small()), random_statistics(small())
    mean = copy.deepcopy(one)
    for average, other in zip(mean.parameters(), two.parameters()):
        average.data.lerp_(other.data, 0.5)
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(fold(mean)(images), mean.eval()(images), rtol=1e-5, atol=1e-5)
    products = [0.5 * (a + b) for a, b in zip(fold(one).parameters(), fold(two).parameters())]
    assert any((p - q).abs().max() > 1e-3 for p, q in zip(products, fold(mean).parameters()))


def test_active_channels_are_counted_as_in_official_checkpoints():
    assert IdleFFN(250, 1000, 0.7).k == 301  # ceil of 300.00000000000006
    assert [IdleFFN(8, 32, theta).k for theta in THETAS] == [32, 24, 16, 8, 0]


def test_only_active_channels_are_curved():
    layer = IdleFFN(8, 32, 0.75).eval()
    u = torch.randn(3, 32)
    assert torch.equal(repavit.gelu_of_first(u, 8)[:, 8:], u[:, 8:])
    assert torch.equal(repavit.gelu_of_first(u, 8)[:, :8], F.gelu(u[:, :8]))
    assert layer.k == 8


def test_dropped_branches_and_no_drop_at_evaluation():
    torch.manual_seed(0)
    model, images = random_statistics(small()).eval(), torch.randn(2, 3, 32, 32)
    none = torch.zeros(2, 3, 2)
    tokens = block_outputs(model, images, none)[1]
    assert torch.equal(tokens[0], tokens[2])  # every branch dropped: blocks do nothing
    rates = model.drop_rates[:, 0]
    all_kept = (torch.ones(2, 3, 2) * (1 - rates)[:, None])  # cancels 1/(1 - rate)
    torch.testing.assert_close(model(images, all_kept), model(images))
    assert not torch.allclose(model(images, torch.ones(2, 3, 2)), model(images))


# ----------------------------------------------------------------------------------------------------------------------
# Ours: idle channels in SiT


def idle_sit(idle_ratio, sizes=dict(hidden_size=48, depth=3, num_heads=4, patch_size=2)):
    model = SiT(8, 4, 10, **sizes)
    model.blocks = nn.ModuleList([IdleSiTBlock(sizes["hidden_size"], sizes["num_heads"], idle_ratio)
                                  for _ in range(sizes["depth"])])
    return model


@pytest.mark.parametrize("theta", THETAS)
def test_a_folded_sit_has_the_same_velocity(theta):
    torch.manual_seed(0)
    model = idle_sit(theta).eval()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.05 * torch.randn_like(parameter))  # a trained one's adaLN is not zero
    x, t, y = torch.randn(3, 4, 8, 8), torch.rand(3), torch.tensor([0, 9, 10])
    folded = fold(model)
    v = model(x, t, y)
    assert v.std() > 0.1
    torch.testing.assert_close(folded(x, t, y), v, rtol=1e-5, atol=1e-5)
    assert isinstance(model.blocks[0].mlp, IdleMlp) and isinstance(folded.blocks[0].mlp, FoldedFFN)


def test_an_idle_sit_begins_like_sit():
    model, plain = idle_sit(0.75), SiT(8, 4, 10, hidden_size=48, depth=3, num_heads=4, patch_size=2)
    assert {k: v.shape for k, v in model.state_dict().items()} == {k: v.shape for k, v in plain.state_dict().items()}
    x, t, y = torch.randn(2, 4, 8, 8), torch.rand(2), torch.tensor([0, 1])
    assert not model(x, t, y).any()  # adaLN-zero
    idle_none = idle_sit(0.0)
    idle_none.load_state_dict(plain.state_dict())
    nn.init.normal_(plain.final_layer.linear.weight)
    idle_none.final_layer.load_state_dict(plain.final_layer.state_dict())
    assert torch.equal(idle_none(x, t, y), plain(x, t, y))  # no idle channels: SiT itself


def test_what_folding_saves_in_xl():
    """28 blocks lose 5 D^2 each: 185.8 M weights, 47.6 GMACs on 256 tokens."""
    sizes = SIT_SIZES["SiT-XL/2"]
    width = sizes["hidden_size"]
    with torch.device("meta"):
        before, after = IdleMlp(width, 4 * width, 0.75), FoldedFFN(width, width)
    weights_before, weights_after = (sum(p.numel() for p in form.parameters() if p.ndim == 2)
                                     for form in (before, after))
    saved = sizes["depth"] * (weights_before - weights_after)
    assert round(saved / 1e6, 1) == 185.8 and round(256 * saved / 1e9, 1) == 47.6


# ----------------------------------------------------------------------------------------------------------------------
# Data and recipe


CLASSES = 3


def write_images(folder, size=16, count=12):
    """An image folder as ImageNet's: train and val, a folder per class; a class has a colour."""
    rng = np.random.default_rng(0)
    for part in ("train", "val"):
        for label in range(CLASSES):
            path = folder / part / f"class{label}"
            path.mkdir(parents=True)
            for i in range(count):
                image = torch.from_numpy(rng.random((3, size, size), np.float32)) * 0.5
                image[label] += 0.5
                save_image(image, path / f"{i}.png")
    return folder


def flags(data, out, steps=6, *more):
    return [str(a) for a in ("--data", data, "--out", out, "--max-train-steps", steps, "--batch-size", 8, "--ema-decay",
                             0.9, "--log-every", 1, "--save-every", 5, "--eval-every", 0, "--warmup-steps", 2,
                             "--workers", 0, "--drop-path", 0.2, *more)]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    torch.set_num_threads(1)
    return tmp_path_factory.mktemp("repavit")


@pytest.fixture(scope="module")
def data(home):
    return write_images(home / "data")


@pytest.fixture(scope="module")
def trained(data, home):
    """A whole run, of the full recipe."""
    repavit.main(flags(data, home / "trained", 12, "--augment", "deit"))
    return home / "trained"


@pytest.fixture(autouse=True)
def no_long_timing(monkeypatch):
    """Speeds are measured in one test; elsewhere they only have to be printed."""
    monkeypatch.setattr(repavit, "images_per_second", lambda models, images, autocast: [1.0, 2.0, 3.0])


def place(rank=0, world=1, micro_batch=8):
    return SimpleNamespace(rank=rank, world=world, micro_batch=micro_batch, device=torch.device("cpu"))


def settings(data, *more):
    return parse(flags(data, "unused", 6, *more))


class Places(torch.utils.data.Dataset):
    """Images that are their own (index, seed)."""

    def __len__(self):
        return 10

    def __getitem__(self, place):
        return torch.tensor(place[0]), torch.tensor(place[1])


def stream(cfg, count, first_step=0, run=None):
    loader = repavit.augmented_batches(Places(), cfg, run or place(), first_step)
    found = [next(loader) for _ in range(count)]
    return [torch.cat(column).tolist() for column in zip(*found)]


def test_the_order_is_a_function_of_seed_and_place(data):
    flip = settings(data, "--augment", "flip")
    images, seeds = stream(flip, 10)
    for epoch in range(8):
        assert sorted(images[10 * epoch:10 * epoch + 10]) == list(range(10))
    assert images[:10] != images[10:20] and len(set(seeds)) == 80
    assert [images[40:], seeds[40:]] == stream(flip, 5, first_step=5)
    halves = [stream(flip, 10, run=place(rank, 2, 4)) for rank in (0, 1)]
    assert halves[0][0] == images[::2] and halves[1][1] == seeds[1::2]
    assert stream(flip, 20, run=place(0, 1, 4))[0] == images
    assert stream(settings(data, "--augment", "flip", "--seed", 1), 10)[0] != images

    images, seeds = stream(settings(data, "--augment", "deit"), 10)  # repeated augmentation
    for epoch in range(8):
        of_epoch = images[10 * epoch:10 * epoch + 10]
        assert [of_epoch.count(image) for image in of_epoch] == [3] * 9 + [1] and len(set(of_epoch)) == 4
    assert len(set(seeds)) == 80  # each time augmented anew


@pytest.mark.parametrize("size, resolution", [(16, 16), (72, 48)])
def test_images_depend_on_their_seed_alone(tmp_path, size, resolution):
    folder = write_images(tmp_path / "images", size, 2)
    cfg = settings(folder, "--augment", "deit", "--resolution", resolution)
    train, val = repavit.Images(cfg, "train"), repavit.Images(cfg, "val")
    first = train[3, 7]
    torch.rand(5), np.random.rand(5), train[2, 9]
    assert torch.equal(train[3, 7][0], first[0]) and first[1] == 1 and first[0].shape == (3, resolution, resolution)
    assert not torch.equal(train[3, 8][0], first[0])
    assert torch.equal(val[3, 7][0], val[3, 8][0]) and val[3, 7][0].shape == (3, resolution, resolution)
    names = [type(step).__name__ for step in train.transform.transforms]
    assert ("RandomCrop" in names) == (resolution <= 32) == ("RandomResizedCropAndInterpolation" not in names)
    assert {"RandomHorizontalFlip", "RandAugment", "Normalize", "RandomErasing"} <= set(names)
    if resolution > 32:  # 224 of 256, here 48 of 54
        assert [step.size for step in val.transform.transforms if hasattr(step, "size")][0] == math.floor(48 / 0.875)
    plain = repavit.Images(settings(folder, "--resolution", resolution, "--augment", "flip"), "train")
    assert not {"RandAugment", "RandomErasing", "ColorJitter"} & {type(s).__name__ for s in plain.transform.transforms}


def test_prepared_data_and_image_folders_are_the_same_images(data, tmp_path):
    folder = repavit.Images(settings(data, "--augment", "flip"), "train")
    prepared = tmp_path / "prepared"
    prepared.mkdir()
    np.save(prepared / "images.npy", np.stack([np.array(image) for image, _ in folder.source]))
    np.save(prepared / "labels.npy", np.array([label for _, label in folder.source]))
    (prepared / "meta.json").write_text(json.dumps(dict(
        format=1, source="test", count=len(folder), num_classes=CLASSES, class_names=folder.meta["class_names"],
        resolution=16, channels=3, vae=None, latent_scale=1.0, latent_shift=0.0)))
    other = repavit.Images(settings(prepared, "--augment", "flip"), "train")
    assert len(other) == len(folder) == 36
    for i in (0, 13, 35):
        assert torch.equal(other[i, 5][0], folder[i, 5][0]) and other[i, 5][1] == folder[i, 5][1]


def test_the_learning_rate_is_timms_schedule():
    from timm.scheduler import CosineLRScheduler
    cfg = parse(["--model", "RePaViT_Large", "--max-train-steps", "300", "--warmup-steps", "20"])
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=cfg.learning_rate)
    schedule = CosineLRScheduler(optimizer, t_initial=300, lr_min=cfg.min_learning_rate, warmup_t=20,
                                 warmup_lr_init=1e-6, t_in_epochs=False)
    for step in range(1, 301):
        assert repavit.learning_rate(cfg, step) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9), step
        schedule.step_update(step)
    assert repavit.learning_rate(settings("x", "--warmup-steps", 0), 1) == 2e-2  # no warm-up


@pytest.mark.parametrize("name, lr, least, drop, idle", [
    ("Tiny", 4e-3, 5e-5, 0.1, 0.5), ("Small", 4e-3, 5e-5, 0.1, 0.5), ("Base", 4e-3, 5e-5, 0.1, 0.75),
    ("Large", 1e-3, 5e-5, 0.3, 0.75), ("Huge", 1e-3, 5e-5, 0.3, 0.75)])
def test_recipes_are_the_papers(name, lr, least, drop, idle):
    cfg = parse(["--model", f"RePaViT_{name}"])
    assert (cfg.learning_rate, cfg.min_learning_rate, cfg.drop_path, cfg.idle_ratio) == (lr, least, drop, idle)
    assert (cfg.batch_size, cfg.weight_decay, cfg.max_grad_norm, cfg.ema_decay) == (4096, 0.05, 1.0, 0.99996)
    steps = 1_281_167 // 4096
    assert (cfg.max_train_steps, cfg.warmup_steps, cfg.augment) == (300 * steps, 20 * steps, "deit")


def built(data, *more):
    cfg = settings(data, *more)
    images = repavit.Images(cfg, "train")
    return (cfg, images, *repavit.build(cfg, images, repavit.setup(cfg)))


def test_lamb_decays_and_adapts_matrices_only(data):
    _, _, model, optimizer = built(data)
    assert type(optimizer).__name__ == "Lamb"
    names = {id(p): name for name, p in model.named_parameters()}
    decayed = {names[id(p)] for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    expected = {name for name, p in model.named_parameters() if p.ndim > 1} - {"pos_embed", "cls_token"}
    assert decayed == expected and "head.weight" in decayed and "patch_embed.proj.weight" in decayed
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.0, 0.05}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(model.parameters()))
    assert {(group["betas"], group["eps"]) for group in optimizer.param_groups} == {((0.9, 0.999), 1e-8)}


def test_an_update_that_is_not_finite_is_skipped(data):
    _, _, model, optimizer = built(data)
    parameters = list(model.parameters())

    def step(bad):
        for p in parameters:
            p.grad = torch.full_like(p, float("nan") if bad else 1e-3)
        return repavit.optimizer_step(optimizer, parameters, 1.0)[1].item()

    def state():
        moments = [optimizer.state[p][name] for p in parameters for name in ("exp_avg", "exp_avg_sq")]
        return [tensor.detach().clone() for tensor in parameters + moments]
    assert step(bad=False)
    before = state()
    assert not step(bad=True)
    assert all(map(torch.equal, before, state()))
    assert step(bad=False) and not torch.equal(before[0], parameters[0])


def test_batch_is_mixed_with_soft_targets(trained, data):
    """In the loop: targets are distributions of two classes and the smoothing, images are mixed with their reverse."""
    seen, true_loss = [], repavit.repavit_loss

    def noted(model, images, targets, keep):
        seen.append((images, targets, keep))
        return true_loss(model, images, targets, keep)
    with mock.patch.object(repavit, "repavit_loss", noted), \
            pytest.MonkeyPatch.context() as patch:
        patch.chdir(trained)
        repavit.main(flags(data, trained / "mixed", 4, "--augment", "deit"))
    assert len(seen) == 4 and seen[0][0].shape == (8, 3, 16, 16) and seen[0][2].shape == (8, 4, 2)
    for images, targets, keep in seen:
        torch.testing.assert_close(targets.sum(1), torch.ones(8))
        assert targets.min().item() == pytest.approx(0.1 / CLASSES) and set(keep.unique().tolist()) <= {0.0, 1.0}
    assert any((targets.sort(1).values[:, 1] > 0.1).any() for _, targets, _ in seen)  # two classes at once
    assert not torch.equal(seen[0][0], seen[1][0])


def test_loss_falls_with_the_full_recipe(trained):
    lines = [json.loads(line) for line in (trained / "log.jsonl").read_text().splitlines()]
    assert len(lines) == 12 and all(math.isfinite(line["loss"]) and line["skipped"] == 0 for line in lines)


def test_the_average_holds_statistics_too(data, tmp_path):
    repavit.main(flags(data, tmp_path / "run", 1))
    _, _, fresh, _ = built(data)
    checkpoint, start_of = last(tmp_path / "run"), fresh.state_dict()
    for name in ("blocks.0.mlp.norm2.running_mean", "blocks.3.mlp.norm1.running_var", "head.weight"):
        expected = start_of[name].lerp(checkpoint["model"][name], 0.1)
        torch.testing.assert_close(checkpoint["ema"][name], expected)
        assert not torch.equal(start_of[name], checkpoint["model"][name])


def test_bfloat16_trains(data, tmp_path):
    repavit.main(flags(data, tmp_path / "run", 3, "--precision", "bf16"))
    assert last(tmp_path / "run")["model"]["head.weight"].dtype == torch.float32


def test_compiled_blocks_compute_the_same(data, tmp_path, monkeypatch):
    compile_module = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda module, dynamic: compile_module(module, backend="aot_eager"))
    runs = [record(flags(data, tmp_path / name, 3, flag), script="repavit")
            for name, flag in (("compiled", "--compile"), ("eager", "--no-compile"))]
    for a, b in zip(runs[0]["gradients"], runs[1]["gradients"], strict=True):
        assert relative_error(a, b) < 1e-4
    assert last(tmp_path / "compiled")["model"].keys() == last(tmp_path / "eager")["model"].keys()


# ----------------------------------------------------------------------------------------------------------------------
# Going on, and several ranks


@pytest.mark.parametrize("workers", [0, 2])
def test_going_on_is_bit_for_bit(data, tmp_path, trained, workers):
    """Stopped by SIGTERM after step 5 of 12, then continued; with any number of data processes."""
    true_catch = repavit.catch_stop
    more = ("--augment", "deit", "--workers", workers)
    with mock.patch.object(repavit, "catch_stop", lambda run: true_catch(run) and (lambda step: 15 * (step == 5))):
        with pytest.raises(SystemExit) as caught:
            repavit.main(flags(data, tmp_path / "run", 12, *more))
    assert caught.value.code == 128 + 15 and last(tmp_path / "run")["step"] == 5
    repavit.main(flags(data, tmp_path / "run", 12, *more))
    assert_same_run(tmp_path / "run", trained)
    repavit.main(flags(data, tmp_path / "run", 12, *more))  # finished: says so


def test_evaluating_changes_nothing(data, tmp_path, trained, capsys):
    repavit.main(flags(data, tmp_path / "run", 12, "--augment", "deit", "--eval-every", 5))
    assert_same_run(tmp_path / "run", trained)
    assert len(re.findall("of 36 val images right", capsys.readouterr().out)) == 3


def test_killed_and_restarted(data, tmp_path):
    args = flags(data, tmp_path / "run", 40)
    code, _, _ = break_off([ROOT / "repavit.py", *args], tmp_path / "run", kill)
    assert code == -signal.SIGKILL and last(tmp_path / "run")["step"] < 40
    repavit.main(args)
    repavit.main(flags(data, tmp_path / "whole", 40))
    assert_same_run(tmp_path / "run", tmp_path / "whole")


@pytest.fixture(scope="module")
def two_ranks(data, home):
    """A run on two ranks, its accuracy, and the gradients of its first steps."""
    folder = home / "two"
    folder.mkdir()
    args = flags(data, folder / "run", 3, "--augment", "deit", "--eval-every", 3)
    (folder / "jobs.json").write_text(json.dumps(dict(run=dict(script="repavit", args=args))))
    code, stdout, stderr = finish(start([*TORCHRUN, ROOT / "tests/two_ranks.py", folder]))
    assert code == 0, stderr
    return SimpleNamespace(folder=folder, args=args, stdout=stdout,
                           notes=[torch.load(folder / f"run-{rank}.pt") for rank in (0, 1)])


def test_two_ranks_average_two_halves(data, two_ranks):
    """BatchNorm and mixup act in each rank's batch, so two ranks are not one: they are the mean of two halves."""
    from timm.data import Mixup
    cfg = parse(two_ranks.args)
    images = repavit.Images(cfg, "train")
    gradients, statistics = [], []
    for rank in (0, 1):
        run = SimpleNamespace(rank=rank, world=2, micro_batch=4, device=torch.device("cpu"))
        model, _ = repavit.build(cfg, images, run)
        batch = next(repavit.augmented_batches(images, cfg, run, 0))
        _, uniform = repavit.step_draws(0, 1, 8, run)
        keep = (uniform(4, 2) >= model.drop_rates).float()
        np.random.seed(repavit.mix_seed(0, 1, rank, 0) % 2**32)
        x, targets = Mixup(0.8, 1.0, label_smoothing=0.1, num_classes=CLASSES)(*batch)
        repavit_loss(model, x, targets, keep).mean().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
        statistics.append(model.blocks[0].mlp.norm1.running_mean)
    mean = (gradients[0] + gradients[1]) / 2
    for notes in two_ranks.notes:
        assert notes["exit"] is None and notes["steps"] == 3
        assert relative_error(notes["gradients"][0], mean) < 1e-5
    assert relative_error(gradients[0], mean) > 0.1 and not torch.equal(*statistics)


def test_all_ranks_judge_rank_0s_statistics(data):
    cfg = settings(data)
    torch.manual_seed(0)
    mine = RePaViT(16, CLASSES, MODELS["toy"], 0.75).eval()
    first = random_statistics(copy.deepcopy(mine))
    theirs = dict(zip(map(id, mine.buffers()), first.buffers()))
    with mock.patch.object(dist, "broadcast", lambda buffer, rank: buffer.copy_(theirs[id(buffer)])), \
            mock.patch.object(dist, "all_reduce"):
        repavit.accuracy(cfg, place(rank=1, world=2), [mine], repavit.Images(cfg, "val"))
    assert all(map(torch.equal, mine.buffers(), first.buffers()))


def test_two_ranks_judge_all_images_once(data, two_ranks):
    """Their accuracy is that of the saved model."""
    cfg = parse(two_ranks.args)
    model = repavit.load_model(cfg, two_ranks.folder / "run/last.pt")
    (top1,), _, _ = repavit.accuracy(cfg, place(), [model], repavit.Images(cfg, "val"))
    assert f"step 3: {top1:.2%} of 36 val images right" in two_ranks.stdout


def test_accuracy_and_differences_are_counted(data):
    cfg = settings(data)
    val = repavit.Images(cfg, "val")

    class Knows(nn.Module):
        """Sees the colour, and is sure; wrong on purpose about the first class."""
        def __init__(self, wrong):
            super().__init__()
            self.wrong = wrong

        def forward(self, images):
            logits = images.mean((2, 3)) * 10
            return torch.where(torch.tensor(self.wrong), logits.roll(1, 1), logits) * 1.0
    sure, err = Knows(False), Knows(True)
    (right, wrong), largest, differ = repavit.accuracy(cfg, place(), [sure, err], val)
    assert right == 1 and wrong < 0.2 and differ == 36 and largest > 1


def test_synchronised_norms_need_gpus(data, tmp_path):
    with pytest.raises(SystemExit, match="--sync-bn needs GPUs"):
        repavit.main(flags(data, tmp_path / "run", 2, "--sync-bn"))
    model = random_statistics(small())
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(model))
    assert converted.state_dict().keys() == model.state_dict().keys()
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(fold(converted)(images), fold(model)(images))  # folds alike


# ----------------------------------------------------------------------------------------------------------------------
# The commands


def refused(arguments):
    with pytest.raises(SystemExit) as caught:
        repavit.main([str(a) for a in arguments])
    text = str(caught.value)
    assert text.startswith("error: ") and len(text.splitlines()) == 1, text
    return text


def test_reparam_writes_what_computes_the_same(trained, data, capsys):
    repavit.main(["--reparam", str(trained / "last.pt"), "--eval", "--data", str(data), "--workers", "0"])
    out = capsys.readouterr().out
    assert re.search(r"vanilla +0.2\d+ M +0.003 G +1.0\n", out) and "0 are classified otherwise" in out
    unfolded, folded = (re.search(rf"^{form} .* ([\d.]+%)$", out, re.MULTILINE)[1] for form in ("unfolded", "folded"))
    assert unfolded == folded and "largest |W_A|" in out
    cfg = settings(data)
    before, after = (repavit.load_model(cfg, trained / name) for name in ("last.pt", "last-folded.pt"))
    images = torch.randn(4, 3, 16, 16)
    torch.testing.assert_close(after(images), before(images), rtol=1e-5, atol=1e-5)
    assert "already" in refused(["--reparam", trained / "last-folded.pt"])


def test_reparam_without_data_uses_random_images(trained, capsys):
    repavit.main(["--reparam", str(trained / "last.pt"), "--data", "nowhere", "--micro-batch", "2"])
    assert "on random images" in capsys.readouterr().out


@pytest.mark.parametrize("wrapped", [True, False])
def test_official_checkpoints_are_read(tmp_path, capsys, wrapped):
    """A file as the official code writes it, of full size: the command line in it says how many channels are idle."""
    torch.manual_seed(0)
    model = random_statistics(RePaViT(224, 1000, MODELS["RePaViT_Tiny"], 0.75))
    assert set(model.state_dict()) == official_names(12, TRAINED)
    args = argparse.Namespace(model="RePaViT_Tiny", channel_idle=True, idle_ratio=0.75, feature_norm="BatchNorm",
                              lr=4e-3, device="cuda", output_dir="")
    path = tmp_path / "RePaViT-Tiny.pth"
    torch.save(dict(model=model.state_dict(), epoch=299, scaler={}, args=args) if wrapped else model.state_dict(), path)
    assert "add --model RePaViT_Tiny" in refused(["--reparam", path])
    repavit.main(["--model", "RePaViT_Tiny", "--reparam", str(path), "--micro-batch", "1"] + (
        [] if wrapped else ["--idle-ratio", "0.75"]))
    out = capsys.readouterr().out
    assert "RePaViT_Tiny, 0.75 of the channels idle" in out
    assert re.search(r"folded +3.49\d M +0.639 G", out), out
    loaded = repavit.load_model(parse(["--model", "RePaViT_Tiny"]), tmp_path / "RePaViT-Tiny-folded.pt")
    images = torch.randn(1, 3, 224, 224)
    torch.testing.assert_close(loaded(images), model.eval()(images), rtol=1e-4, atol=1e-5)


def test_what_cannot_be_folded_is_refused(tmp_path):
    sizes = MODELS["toy"]
    for name, idle_ratio, feature_norm, message in [
            ("vanilla", 0, "LayerNorm", "LayerNorm"), ("layer", 0.75, "LayerNorm", "LayerNorm"),
            ("busy", 0, "BatchNorm", "no idle channels")]:
        model = RePaViT(16, 4, sizes, idle_ratio, feature_norm)
        torch.save(dict(model=model.state_dict(), config=dict(idle_ratio=idle_ratio)), tmp_path / f"{name}.pt")
        assert message in refused(["--reparam", tmp_path / f"{name}.pt"])
    model = RePaViT(16, 4, sizes, 0.75)
    official = argparse.Namespace(channel_idle=False, idle_ratio=0.75)  # the ratio says nothing without the switch
    torch.save(dict(model=model.state_dict(), args=official), tmp_path / "official.pt")
    assert "no idle channels" in refused(["--reparam", tmp_path / "official.pt"])
    official = argparse.Namespace(channel_idle=True, idle_ratio=0.75, heuristic="linear")
    torch.save(dict(model=model.state_dict(), args=official), tmp_path / "official.pt")
    assert "--heuristic linear" in refused(["--reparam", tmp_path / "official.pt"])
    nearly = RePaViT(16, 4, sizes, 0.75)
    for module in nearly.modules():
        if isinstance(module, nn.BatchNorm1d):
            module.running_var.fill_(1e-30), module.running_mean.fill_(3.0), setattr(module, "eps", 0)
            nn.init.constant_(module.weight, 30.0)
    assert fold(nearly).blocks[0].mlp.fc1.weight.abs().max() > 1e3
    torch.save(dict(model=model.state_dict() | {"blocks.0.mlp.norm2.running_mean": torch.full((256,), float("nan"))},
                    config=dict(idle_ratio=0.75)), tmp_path / "broken.pt")
    assert "folding changed a logit by nan" in refused(["--reparam", tmp_path / "broken.pt"])
    assert not list(tmp_path.glob("*-folded.pt"))


def test_a_vanilla_vit_trains(data, tmp_path):
    repavit.main(flags(data, tmp_path / "run", 2, "--feature-norm", "LayerNorm", "--idle-ratio", 0))
    assert "blocks.0.mlp.norm.weight" in last(tmp_path / "run")["model"]
    assert "LayerNorm" in refused(["--reparam", tmp_path / "run/last.pt"])


def test_speeds_are_medians_of_turns(monkeypatch):
    monkeypatch.undo()
    turns = []

    class Form(nn.Module):
        def __init__(self, name):
            super().__init__()
            self.name = name

        def forward(self, images):
            turns.append(self.name)
            return images
    speeds = repavit.images_per_second([Form("a"), Form("b")], torch.zeros(4, 3), lambda: mock.MagicMock(), seconds=0)
    assert turns == ["a", "b"] * 6 and len(speeds) == 2 and min(speeds) > 0


def test_classified_images_make_a_picture(trained, data, tmp_path, capsys):
    def classify(name):
        repavit.main(["--sample", "20", "--ckpt", str(trained / name), "--data", str(data), "--out", str(tmp_path)])
        return capsys.readouterr().out
    text = classify("last.pt")
    assert re.search(r"[\d.]+% of 20 val images are right", text) and "class" in text
    assert Image.open(tmp_path / "predictions.png").width == 8 * (64 + 2) + 2
    repavit.main(["--reparam", str(trained / "last.pt"), "--data", str(data)])
    capsys.readouterr()
    assert classify("last-folded.pt") == text  # the folded model sees the same
    two = write_other(tmp_path / "two")
    assert "choose another --data" in refused(["--sample", 2, "--ckpt", trained / "last.pt", "--data", two])


def test_bench_prints_the_log_line_and_writes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    repavit.main(["--bench", "5", "--batch-size", "4"])
    assert "images_per_s" in capsys.readouterr().out and not list(tmp_path.iterdir())


def test_starting_from_weights(trained, data, tmp_path, capsys):
    repavit.main(flags(data, tmp_path / "run", 1, "--init", trained / "last.pt", "--learning-rate", 1e-12,
                       "--min-learning-rate", 0, "--warmup-steps", 0))
    a, b = last(tmp_path / "run")["model"], last(trained)["model"]
    torch.testing.assert_close(a["head.weight"], b["head.weight"])
    assert "left fresh: nothing" in capsys.readouterr().out
    other = flags(data, tmp_path / "other", 1, "--init", trained / "last.pt", "--resolution", 20)
    assert "does not fit" in refused(other)


@pytest.mark.parametrize("bad, message", [
    (["--data", "nowhere"], "no images in nowhere/train: --data must hold train/CLASS"),
    (["--resolution", 18], "not a multiple of the patch size 4"),
    (["--batch-size", 7], "mixup pairs the images"),
    (["--micro-batch", 3], "not a multiple of"),
    (["--idle-ratio", 1.5], "--idle-ratio 1.5 must lie between 0 and 1"),
    (["--drop-path", 1], "--drop-path 1.0 must lie between 0 and 0.99"),
    (["--feature-norm", "GroupNorm"], "--feature-norm"),
    (["--augment", "none"], "--augment"),
    (["--model", "RePaSwin_Tiny"], "unknown --model RePaSwin_Tiny"),
    (["--warmup-steps", -1], "--warmup-steps -1 must lie between 0"),
    (["--reparam", "nowhere.pt"], "there is no checkpoint nowhere.pt"),
    (["--sample", 4], "--sample needs --ckpt"),
    (["--sample", 4, "--ckpt", "nowhere.pt"], "there is no checkpoint nowhere.pt"),
])
def test_bad_values_get_one_line(data, tmp_path, bad, message):
    assert message in refused([*flags(data, tmp_path / "run", 2), *bad])
    assert not (tmp_path / "run").exists()


def test_wrong_files_get_one_line(data, trained, tmp_path):
    torch.save(dict(head=torch.zeros(1)), tmp_path / "other.pt")
    assert "holds no RePaViT weights" in refused(["--reparam", tmp_path / "other.pt"])
    weights = last(trained)["model"]
    torch.save(weights | {"blocks.7.mlp.fc1.weight": torch.zeros(1)}, tmp_path / "deep.pt")
    assert "no model of this script" in refused(["--reparam", tmp_path / "deep.pt"])
    torch.save(weights | {"extra": torch.zeros(1)}, tmp_path / "extra.pt")
    assert "1 names or shapes differ, first extra" in refused(["--reparam", tmp_path / "extra.pt", "--model", "toy"])
    two = write_other(tmp_path / "two")
    assert "two has 2 classes" in refused(["--reparam", trained / "last.pt", "--eval", "--data", two])
    assert "learning_rate" in refused(flags(data, trained, 12, "--augment", "deit", "--learning-rate", 1))
    assert "max_train_steps" in refused(flags(data, trained, 14, "--augment", "deit"))  # the cosine would be another


def write_other(folder):
    """Two classes, of which val lacks one."""
    for part, names in (("train", "ab"), ("val", "ab")):
        for name in names:
            (folder / part / name).mkdir(parents=True)
            save_image(torch.rand(3, 16, 16), folder / part / name / "0.png")
    return folder


def test_train_and_val_must_have_the_same_classes(tmp_path):
    folder = write_other(tmp_path / "data")
    os.rename(folder / "val/b", folder / "val/c")
    assert "different classes" in refused(flags(folder, tmp_path / "run", 1))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_image_is_named(tmp_path, workers):
    folder = write_images(tmp_path / "data", count=2)
    path = folder / "train/class1/0.png"
    path.write_bytes(path.read_bytes()[:100])
    text = refused(flags(folder, tmp_path / "run", 3, "--workers", workers))
    assert f"cannot read {path}" in text

"""HASTE: losses, gradients and the teacher's attention against the official code; the switch; what ends there."""
import copy
import functools
import json
import math
import signal
import weakref
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer

import common
import haste
from common import SIT_SIZES, SiTBlock, interpolate
from golden_utils import Fixture, official_keys, state_shapes
from haste import AttentionTeacher, HASTESiT, attention_loss, block_with_logits, haste_loss
from support.dataset import PreparedData, clean_input, micro_batches, step_draws
from support.flags import parse as parse_flags
from support.sd3 import MMDiT
from support.teachers import Teacher, load_teacher
from test_training import (  # noqa: F401
    IMAGES,
    ROOT,
    TORCHRUN,
    as_a_fresh_process,
    assert_same_run,
    break_off,
    command,
    finish,
    kill,
    last,
    log_lines,
    make_data,
    relative_error,
    start,
    weights_error,
)

# ----------------------------------------------------------------------------------------------------------------------
# The loss against the official code


def parse(argv):
    return parse_flags(argv, haste.Config, SIT_SIZES, haste.RECIPES, haste.RANGES)


def student(config, heads=None):
    sizes = {name: config[name] for name in ("hidden_size", "depth", "num_heads", "patch_size")}
    return HASTESiT(config["input_size"], config["in_channels"], config["num_classes"], sizes, config["encoder_depth"],
                    [config["z_dim"]], config["projector_dim"], config["student_layers"],
                    heads or config["teacher_heads"])


def teacher_logits(golden):
    """One (B,heads,N,N) per pair."""
    return list(golden.input("teacher_q") @ golden.input("teacher_k").mT)


@pytest.mark.parametrize("golden", [Fixture("haste"), Fixture("haste_b")], ids=["L, XL", "B"])
def test_losses_and_gradients(golden):
    config, targets = golden.config, teacher_logits(golden)
    x, t, noise, labels = (golden.input(name) for name in ("x0", "t", "noise", "y"))
    model = golden.fill(student(config, heads=config["num_heads"]))
    parameters = dict(model.named_parameters())
    x_t, _ = interpolate(x, noise, t)
    v, (z_hat,), logits = model(x_t, t, labels)
    golden.check("forward/x_t", x_t)
    golden.check("forward/v", v)
    golden.check("forward/zs", z_hat)
    step = config["logit_slice"]
    golden.check("forward/attn_logits_sub", torch.stack(logits)[..., ::step, ::step])  # of all the student's heads
    model.align_heads = config["teacher_heads"]
    logits = model(x_t, t, labels)[2]
    pairs = [attention_loss([a], [b]) for a, b in zip(logits, targets, strict=True)]
    golden.check("forward/ce_per_layer", torch.stack([ce.mean() for ce, _ in pairs]))
    golden.check("forward/teacher_entropy_per_layer", torch.stack([(ce - kl).mean() for ce, kl in pairs]))

    for mode in ("eval", "train"):
        y = labels.masked_fill((golden.input("drop_u") < 0.1) & (mode == "train"), config["num_classes"])
        velocity, proj, attn, kl = haste_loss(model, x, t, noise, y, [golden.input("proj_s")], targets)
        loss = (velocity + config["proj_coeff"] * proj + config["attn_coeff"] * attn).mean()
        golden.check(f"{mode}/denoising_loss", velocity)
        golden.check(f"{mode}/proj_loss", proj.mean())
        golden.check(f"{mode}/attn_loss", attn.mean())
        golden.check(f"{mode}/total_loss", loss)
        model.zero_grad()
        attn.mean().backward(retain_graph=True)
        for name in config["grad_attn_only"]:
            golden.check(f"{mode}/grad_attn/{name}", parameters[name].grad)
        check_gradients(golden, mode, model, loss)
        assert proj.shape == attn.shape == kl.shape == velocity.shape and (kl > 0).all() and not kl.requires_grad

        plain = copy.deepcopy(model)
        plain.zero_grad()
        plain.stop_alignment()
        velocity, *rest = haste_loss(plain, x, t, noise, y, [], [])
        assert not any(term.any() for term in rest)
        golden.check(f"phase2/{mode}/denoising_loss", velocity)
        golden.check(f"phase2/{mode}/total_loss", velocity.mean())
        check_gradients(golden, f"phase2/{mode}", plain, velocity.mean())
        golden.check(f"phase2/{mode}/projector_grad_is_none", plain.projectors[0][0].weight.grad is None)
    golden.assert_all_checked()


def check_gradients(golden, mode, model, loss):
    model.zero_grad()
    loss.backward()
    parameters = dict(model.named_parameters())
    for name in golden.config["grad_params"]:
        if f"{mode}/grad/{name}" in golden.outputs:
            golden.check(f"{mode}/grad/{name}", parameters[name].grad)
    if f"{mode}/grad_norm" in golden.outputs:
        grads = [p.grad.norm() for p in parameters.values() if p.grad is not None]
        golden.check(f"{mode}/grad_norm", torch.stack(grads).norm())


class MMDiTWithLogits(MMDiT):
    """The text-to-image student: what is aligned is the image's attention to itself, not the joint one."""

    def __init__(self, config):
        width = config["depth"] * config["head_dim"]
        super().__init__(in_channels=4, hidden_size=width, depth=config["depth"], num_heads=config["num_heads"],
                         context_dim=768, pooled_dim=0, pos_embed_size=config["input_size"] // 2, time_scale=1)
        self.config, projector_dim = config, config["projector_dim"]
        self.projectors = nn.ModuleList([nn.Sequential(
            nn.Linear(width, projector_dim), nn.SiLU(), nn.Linear(projector_dim, projector_dim), nn.SiLU(),
            nn.Linear(projector_dim, config["z_dim"]))])

    def forward(self, x_t, t, context):
        text, h, c = self.embed(x_t, t, context)
        logits = []
        for i, block in enumerate(self.blocks):
            if i in self.config["student_layers"]:
                (q, k, _), _ = block.x_block.before(h, c)
                logits.append((q @ k.mT / q.shape[-1] ** 0.5)[:, :self.config["teacher_heads"]])
            text, h = block(text, h, c)
            if i + 1 == self.config["encoder_depth"]:
                z_hats = [self.projectors[0](h)]
        return self.head(h, c, x_t.shape[-2:]), z_hats, logits


def test_the_text_to_image_losses():
    """test_mmdit.py compares the rest of this file; the official script itself overwrites its attention loss by 0."""
    golden = Fixture("haste_mmdit")
    config, model = golden.config, golden.fill(MMDiTWithLogits(golden.config))
    x, t, noise, context, z = (golden.input(name) for name in ("x0", "t", "noise", "context", "proj_s"))
    velocity, proj, attn, _ = haste_loss(model, x, t, noise, context, [z], teacher_logits(golden))
    loss = (velocity + config["proj_coeff"] * proj + config["attn_coeff"] * attn).mean()
    golden.check("phase1/denoising_loss", velocity)
    golden.check("phase1/proj_loss", proj.mean())
    golden.check("phase1/attn_loss", attn.mean())
    golden.check("phase1/total_loss", loss)
    check_gradients(golden, "phase1", model, loss)


def test_names_and_shapes():
    with torch.device("meta"):
        model = HASTESiT(32, 4, 1000, SIT_SIZES["SiT-XL/2"], 8, [768], 2048, [4, 5, 6, 7], 12)
    assert state_shapes(model) == official_keys("haste_sit_xl_2")


# ----------------------------------------------------------------------------------------------------------------------
# The teacher's attention


@pytest.fixture
def small_dinov2(monkeypatch, tmp_path):
    """teacher(golden): the fixture's DINOv2 under its official names, read by load_teacher as a file of weights."""
    import timm
    real = timm.create_model

    def load(golden):
        config, D = golden.config, golden.config["embed_dim"]
        sizes = dict(embed_dim=D, depth=config["depth"], num_heads=config["num_heads"])
        monkeypatch.setattr(timm, "create_model", functools.partial(real, **sizes))
        grid = config["pretrain_img_size"] // 14
        shapes = {"cls_token": (1, 1, D), "pos_embed": (1, 1 + grid ** 2, D), "patch_embed.proj.weight": (D, 3, 14, 14),
                  "patch_embed.proj.bias": (D,), "norm.weight": (D,), "norm.bias": (D,)}
        for i in range(config["depth"]):
            for name, rows, columns in (("attn.qkv", 3 * D, D), ("attn.proj", D, D), ("mlp.fc1", 4 * D, D),
                                        ("mlp.fc2", D, 4 * D)):
                shapes |= {f"blocks.{i}.{name}.weight": (rows, columns), f"blocks.{i}.{name}.bias": (rows,)}
            shapes |= {f"blocks.{i}.{name}": (D,) for name in
                       ("norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias", "ls1.gamma", "ls2.gamma")}
        weights = {key: golden.weight(key, shape) for key, shape in shapes.items()}
        torch.save(weights | {"mask_token": torch.zeros(1, D)}, tmp_path / "dinov2.pth")
        return load_teacher("dinov2-vit-b", config["grid"] * 16, str(tmp_path / "dinov2.pth"))
    return load


def test_the_teacher(small_dinov2, monkeypatch):
    golden = Fixture("haste_teacher")
    teacher = small_dinov2(golden)
    golden.check("pos_embed_resampled", teacher.vit.pos_embed)
    size = golden.config["raw_size"]
    pixels = load_teacher("dinov2-vit-b", size, "", False).preprocess(golden.input("raw_image").permute(0, 2, 3, 1))
    golden.check("preprocessed_shape", list(pixels.shape) if isinstance(golden.outputs["preprocessed_shape"], list)
                 else torch.tensor(pixels.shape))
    golden.check("preprocessed_sub", pixels[:, :, 3::9, 5::9])
    golden.check("preprocessed_mean", pixels.mean(dim=(2, 3)))
    golden.check("preprocessed_std", pixels.std(dim=(2, 3)))

    monkeypatch.setattr(teacher, "preprocess", lambda images: images)  # the fixture's are normalised pixels
    images = golden.input("images")
    golden.check("clstoken", teacher(images)[0])
    (tokens,), logits = AttentionTeacher(teacher, golden.config["teacher_layers"], golden.config["num_heads"])(images)
    golden.check("patchtokens", tokens)
    golden.check("attn_logits", torch.stack(logits))
    golden.check("attn_probs", torch.stack(logits).softmax(dim=-1))
    golden.assert_all_checked()


@pytest.mark.parametrize("prefix, options", [
    (1, dict()), (5, dict(reg_tokens=4)), (1, dict(qk_norm=True)), (0, dict(class_token=False, global_pool="avg"))],
    ids=["plain", "registers", "qk-norm", "no class token"])
def test_attention_is_that_of_the_vision_transformer(prefix, options):
    """q and k as timm itself hands them to the attention function, cut to patches and heads; in one forward pass."""
    torch.manual_seed(0)
    vit = VisionTransformer(img_size=16, patch_size=4, embed_dim=24, depth=3, num_heads=3, num_classes=0, **options)
    for p in vit.parameters():
        nn.init.normal_(p, std=0.3)
    images = torch.randint(0, 256, (2, 16, 16, 3), dtype=torch.uint8)
    teacher = Teacher(vit, [0.5] * 3, [0.5] * 3, 16, "random")
    expected, calls, attend = teacher(images)[1], [], F.scaled_dot_product_attention
    with mock.patch.object(F, "scaled_dot_product_attention",
                           lambda q, k, v, **options: (calls.append((q, k)), attend(q, k, v, **options))[1]):
        (tokens,), logits = AttentionTeacher(teacher, [2, 0, 2], heads=2)(images)
    assert len(calls) == 3  # one forward pass of three blocks
    assert torch.equal(tokens, expected) and len(logits) == 3 and torch.equal(logits[0], logits[2])
    for i, found in zip((2, 0), logits):
        q, k = calls[i]  # (B,3,prefix+16,8)
        torch.testing.assert_close(found, (q @ k.mT / math.sqrt(8))[:, :2, prefix:, prefix:])
        assert found.shape == (2, 2, 16, 16)
        assert found.dtype == torch.float32 and not found.requires_grad
    with torch.autocast("cpu", torch.bfloat16):
        halves = AttentionTeacher(teacher, [2], heads=2)(images)[1][0]
    assert halves.dtype == torch.float32 and 0 < (halves - logits[0]).abs().max() < 0.1 * logits[0].abs().max()


# ----------------------------------------------------------------------------------------------------------------------
# The loss


def maps(*shape, std=1.0, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).mul(std)


@pytest.mark.parametrize("tokens", [16, 256, 1024])
def test_cross_entropy_over_all_keys_whatever_the_grid(tokens):
    """The official loss folds the maps into rows of 256 keys: right for 256 px alone."""
    a, b = maps(1, 2, tokens, tokens), maps(1, 2, tokens, tokens, seed=1)
    loss, kl = attention_loss([a], [b])
    expected = -(b.softmax(-1) * a.log_softmax(-1)).sum(-1).mean()
    torch.testing.assert_close(loss, expected[None])
    torch.testing.assert_close(kl, F.kl_div(a.log_softmax(-1), b.softmax(-1), reduction="sum")[None] / (2 * tokens))
    folded = -(b.reshape(-1, 256).softmax(-1) * a.reshape(-1, 256).log_softmax(-1)).sum(-1).mean()
    assert (abs(folded - expected) < 1e-4) == (tokens == 256)


def test_the_least_cross_entropy_is_the_teachers_entropy():
    target = maps(2, 3, 16, 16, std=2)
    entropy = torch.distributions.Categorical(logits=target).entropy().mean(dim=(1, 2))
    same = (target + maps(2, 3, 16, 1, seed=1)).requires_grad_()  # a shift of a row's logits changes nothing
    loss, kl = attention_loss([same], [target])
    torch.testing.assert_close(loss, entropy)
    torch.testing.assert_close(kl, torch.zeros(2), atol=1e-6, rtol=0)
    loss.sum().backward()
    assert same.grad.abs().max() < 1e-6
    assert (attention_loss([same.mT], [target])[1] > 0.1).all()  # queries and keys are not the same


def test_peaked_maps_stay_finite():
    """A gap of 200 underflows softmax: the official log(softmax) is then infinite."""
    a = (200 * torch.eye(16)).expand(1, 1, 16, 16).clone().requires_grad_()
    loss, kl = attention_loss([a], [a.detach().flip(-1)])
    loss.sum().backward()
    assert loss.isfinite().all() and kl.isfinite().all() and loss > 150 and a.grad.isfinite().all()
    assert a.softmax(-1).log().isinf().any()


def test_pairs_count_alike_and_are_complete():
    a, b = [maps(2, 3, 16, 16, seed=i) for i in (0, 1)], [maps(2, 3, 16, 16, seed=i) for i in (2, 3)]
    both = attention_loss(a, b)
    for whole, one, two in zip(both, attention_loss(a[:1], b[:1]), attention_loss(a[1:], b[1:])):
        torch.testing.assert_close(whole, (one + two) / 2)
    with pytest.raises(ValueError):
        attention_loss(a, b[:1])


def test_bf16_maps_are_compared_in_fp32():
    a, b = maps(2, 3, 16, 16).bfloat16(), maps(2, 3, 16, 16, seed=1).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        loss, kl = attention_loss([a], [b])
    expected = attention_loss([a.float()], [b.float()])
    assert loss.dtype == torch.float32 and torch.equal(loss, expected[0]) and torch.equal(kl, expected[1])


def tiny_student(layers=(1, 2), heads=2):
    torch.manual_seed(0)
    sizes = dict(hidden_size=24, depth=4, num_heads=3, patch_size=2)
    model = HASTESiT(8, 4, 5, sizes, 3, [10], 16, list(layers), heads)
    for name, p in model.named_parameters():
        if name != "pos_embed":
            nn.init.normal_(p, std=0.3)
    return model, maps(2, 4, 8, 8), torch.tensor([0.3, 0.8]), torch.tensor([1, 4])


def test_the_attention_reaches_q_and_k_of_the_heads_aligned_and_what_lies_before():
    model, x, t, y = tiny_student()
    targets = [maps(2, 2, 16, 16, seed=i) for i in (2, 3)]
    _, _, attn, _ = haste_loss(model, x, t, maps(2, 4, 8, 8, seed=1), y, [], targets)
    attn.sum().backward()
    q, k, v = model.blocks[2].attn.qkv.weight.grad.view(3, 3, 8, 24)  # (q k v, heads, d, D)
    assert q[:2].any() and k[:2].any() and not q[2].any() and not k[2].any() and not v.any()
    assert model.blocks[2].attn.proj.weight.grad is None or not model.blocks[2].attn.proj.weight.grad.any()
    assert model.blocks[0].mlp.fc2.weight.grad.any() and model.blocks[3].attn.qkv.weight.grad is None
    assert model.blocks[1].attn.qkv.weight.grad.view(3, 3, 8, 24)[2].any()  # v of an earlier block, on its way


def test_asking_for_logits_changes_nothing_else():
    model, x, t, y = tiny_student(layers=(2, 0))
    v, (z_hat,), logits = model(x, t, y)
    assert torch.equal(v, model.velocity(x, t, y)) and [a.shape for a in logits] == [(2, 2, 16, 16)] * 2
    h, c = model.embed(x, t, y)
    with_logits, first = block_with_logits(model.blocks[0], h, c, 3)
    assert torch.equal(with_logits, model.blocks[0](h, c))
    assert torch.equal(first[:, :2], logits[1])  # in the order of student_layers
    # The logits are the block's attention: with v as the identity, its softmax comes out.
    q, k, v = model.blocks[0].attn.split(torch.randn(2, 16, 24))
    probabilities = F.scaled_dot_product_attention(q, k, torch.eye(16).expand(2, 3, 16, 16))
    with mock.patch.object(common.Attention, "split", lambda self, h: (q, k, v)):
        _, forced = block_with_logits(model.blocks[0], h, c, 3)
    torch.testing.assert_close(forced.softmax(-1), probabilities)


# ----------------------------------------------------------------------------------------------------------------------
# The switch. Runs of 12 updates, of which 6 are aligned


STEPS, STOP = 12, 6
FLAGS = ["--early-stop-point", STOP, "--teacher-layers", 1, 0, "--align-heads", 2]


def write_teacher(folder, img_size=16, patch_size=4, **changes):
    torch.manual_seed(0)
    config = dict(img_size=img_size, patch_size=patch_size, embed_dim=32, depth=2, num_heads=2, num_classes=0) | changes
    torch.save(dict(config=config, model=VisionTransformer(**config).state_dict(), resolution=img_size),
               folder / "teacher.pt")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    torch.set_num_threads(1)
    return tmp_path_factory.mktemp("haste")


@pytest.fixture(scope="module")
def data(home):
    write_teacher(make_data(home / "data", teacher=False))
    return home / "data"


def flags(data, out, steps=STEPS, *more):
    return command(data, out, steps, *FLAGS, *more)


@pytest.fixture(scope="module")
def unbroken(data, home):
    haste.main(flags(data, home / "unbroken"))
    return home / "unbroken"


def states(data, out, *more):
    """Weights, EMA and optimiser after every update, teacher calls of every update, the teacher's fate: one run."""
    found, calls, alive, step = [], [], [], haste.optimizer_step
    forward = AttentionTeacher.forward

    def counted(self, images):
        alive.append(weakref.ref(self))
        calls.append(len(found))
        return forward(self, images)

    def recorded(optimizer, parameters, max_grad_norm):
        is_alive = [teacher() is not None for teacher in alive]
        result = step(optimizer, parameters, max_grad_norm)
        found.append(dict(weights=[p.detach().clone() for p in parameters], alive=any(is_alive),
                          trained=[p.requires_grad for p in parameters],
                          moments=[{k: m.clone() for k, m in optimizer.state[p].items()} for p in parameters]))
        return result
    with mock.patch.object(haste, "optimizer_step", recorded), \
            mock.patch.object(AttentionTeacher, "forward", counted):
        haste.main(flags(data, out, STEPS, *more))
    return found, calls


def test_what_ends_at_the_switch(data, tmp_path):
    """Check B: equal to a run without a stop up to it, bit for bit; then no teacher, no projector, no terms."""
    stopped, calls = states(data, tmp_path / "stopped")
    endless, endless_calls = states(data, tmp_path / "endless", "--early-stop-point", 1000)
    assert calls == list(range(STOP)) and endless_calls == list(range(STEPS))
    for i in range(STOP):
        assert all(map(torch.equal, stopped[i]["weights"], endless[i]["weights"]))
    assert not all(map(torch.equal, stopped[STOP]["weights"], endless[STOP]["weights"]))
    assert [state["alive"] for state in stopped] == [True] * STOP + [False] * (STEPS - STOP)  # its memory is free

    names = [name for name, p in haste_model(data).named_parameters() if p.requires_grad]
    for i in range(STOP, STEPS):
        moved = {name for name, a, b in zip(names, stopped[i - 1]["weights"], stopped[i]["weights"], strict=True)
                 if not torch.equal(a, b)}
        assert not any("projectors" in name for name in moved) and "blocks.0.attn.qkv.weight" in moved
        for name, before, after in zip(names, stopped[i - 1]["moments"], stopped[i]["moments"]):
            assert all(torch.equal(before[k], after[k]) for k in before) == ("projectors" in name)
    lines = log_lines(tmp_path / "stopped")
    auxiliary = {"loss_proj", "loss_attn", "kl_attn"}
    assert all(auxiliary <= line.keys() and line["kl_attn"] > 0 for line in lines[:STOP])
    assert not any(auxiliary & line.keys() for line in lines[STOP:])
    for line in lines:
        total = line["loss_velocity"] + 0.5 * line.get("loss_proj", 0) + 0.5 * line.get("loss_attn", 0)
        assert line["loss"] == pytest.approx(total, rel=1e-4) and line["skipped"] == 0
    kept = torch.load(tmp_path / f"stopped/ema-{STOP}.pt", weights_only=True)  # the last aligned weights stay
    assert kept["step"] == STOP and "model" not in kept


def haste_model(data):
    cfg = parse([str(f) for f in flags(data, "unused")])
    run = haste.setup(cfg)
    return haste.build(cfg, PreparedData(cfg.data, 16), run)[1]


def test_the_second_phase_is_plain_sit(data, tmp_path):
    """The first gradient after the switch is the one of SiT's own loss on that step's batch, noise and times."""
    gradients, step = [], haste.optimizer_step

    def recorded(optimizer, parameters, max_grad_norm):
        gradients.append([p.grad.flatten().clone() for p in parameters if p.grad is not None])
        return step(optimizer, parameters, max_grad_norm)
    haste.main(flags(data, tmp_path / "run", STOP))
    model = haste_model(data)
    model.load_state_dict(last(tmp_path / "run")["model"])
    with mock.patch.object(haste, "optimizer_step", recorded):
        haste.main(flags(data, tmp_path / "run", STOP + 1))

    prepared = PreparedData(data, 16)
    run = haste.setup(parse(["--batch-size", "8"]))
    normal, uniform = step_draws(0, STOP + 1, 8, run)
    _, noise, t, drop = normal(3, 16, 16), normal(3, 16, 16), uniform(), uniform() < 0.1
    batch = next(micro_batches(prepared, 0, 8, run, STOP))
    x_t, v = interpolate(clean_input(batch, prepared.meta, None), noise, t)
    (model.velocity(x_t, t, batch["labels"].masked_fill(drop, 4)) - v).square().mean().backward()
    expected = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    assert relative_error(torch.cat(gradients[0]), expected) < 1e-5


@pytest.mark.parametrize("cut", [3, STOP - 1, STOP, STOP + 1, 9])
def test_going_on_before_at_and_after_the_switch(data, tmp_path, unbroken, cut):
    haste.main(flags(data, tmp_path / "run", cut))
    haste.main(flags(data, tmp_path / "run"))
    assert_same_run(tmp_path / "run", unbroken)


@pytest.mark.parametrize("stop", [50, 3], ids=["killed before the switch", "killed after it"])
def test_killed_and_restarted(data, tmp_path, stop):
    args = flags(data, tmp_path / "run", 60, "--early-stop-point", stop)
    code, _, _ = break_off([ROOT / "haste.py", *args], tmp_path / "run", kill)
    assert code == -signal.SIGKILL and (last(tmp_path / "run")["step"] > stop) == (stop == 3)
    haste.main(args)
    haste.main(flags(data, tmp_path / "whole", 60, "--early-stop-point", stop))
    assert_same_run(tmp_path / "run", tmp_path / "whole")


SEVERAL_RUNS = """
import json, sys
sys.path.insert(0, sys.argv[1])
from unittest import mock
from torch import distributed as dist
import haste
dist.init_process_group("gloo")  # one group for all runs
with mock.patch.object(dist, "destroy_process_group"):
    for arguments in json.loads(sys.argv[2]):
        haste.main(arguments)
dist.destroy_process_group()
"""


def test_two_ranks_through_the_switch(data, tmp_path, unbroken):
    """The same run but for rounding; and there, too, it goes on from the switch bit for bit."""
    runs = [flags(data, tmp_path / "whole"), flags(data, tmp_path / "halves", STOP), flags(data, tmp_path / "halves"),
            flags(data, tmp_path / "parts", STEPS, "--micro-batch", 2)]
    (tmp_path / "runs.py").write_text(SEVERAL_RUNS)
    code, _, stderr = finish(start([*TORCHRUN, tmp_path / "runs.py", ROOT, json.dumps(runs)]))
    assert code == 0, stderr
    assert_same_run(tmp_path / "halves", tmp_path / "whole")
    haste.main(flags(data, tmp_path / "endless", STEPS, "--early-stop-point", STEPS))
    assert weights_error(tmp_path / "endless", unbroken) > 1e-2
    for name in ("whole", "parts"):
        assert weights_error(tmp_path / name, unbroken) < 1e-4  # Adam's first steps divide rounding by rounding
        assert [line.keys() for line in log_lines(tmp_path / name)] == [line.keys() for line in log_lines(unbroken)]


def test_no_log_line_mixes_the_phases(data, tmp_path):
    haste.main(flags(data, tmp_path / "run", STEPS, "--log-every", 4))
    lines = log_lines(tmp_path / "run")
    assert [line["step"] for line in lines] == [4, 6, 8, 12]
    assert ["loss_attn" in line for line in lines] == [True, True, False, False]


def test_images_are_read_only_for_the_teacher(tmp_path):
    folder = make_data(tmp_path / "data", teacher=False, latent=True)
    np.save(folder / "images.npy", np.zeros((IMAGES, 64, 64, 3), np.uint8))
    write_teacher(folder, 64, 32)  # a 2x2 grid, as 8x8 latents in patches of 4 have
    keys, true_clean_input = [], haste.clean_input

    def clean_input(batch, meta, noise):
        keys.append(set(batch))
        return true_clean_input(batch, meta, noise)
    with mock.patch.object(haste, "clean_input", clean_input):
        haste.main(flags(folder, tmp_path / "run", 4, "--resolution", 64, "--early-stop-point", 2))
    assert keys == [{"labels", "moments", "images"}] * 2 + [{"labels", "moments"}] * 2


@pytest.mark.parametrize("coefficients, terms", [
    ((0, 0), ""), ((0.5, 0), "loss_proj"), ((0, 0.5), "loss_attn kl_attn")])
def test_terms_can_be_left_out(data, tmp_path, coefficients, terms):
    haste.main(flags(data, tmp_path / "run", 2, "--proj-coeff", coefficients[0], "--attn-coeff", coefficients[1]))
    line = log_lines(tmp_path / "run")[-1]
    assert {name for name in ("loss_proj", "loss_attn", "kl_attn") if line[name]} == set(terms.split())
    assert any("projectors" in name for name in last(tmp_path / "run")["model"]) == ("proj" in terms)


def test_never_aligned_is_the_baseline(data, tmp_path):
    """Stop at 0: the same weights as without the coefficients."""
    haste.main(flags(data, tmp_path / "zero", 4, "--early-stop-point", 0))
    haste.main(flags(data, tmp_path / "none", 4, "--proj-coeff", 0, "--attn-coeff", 0))
    zero, none = (last(tmp_path / name)["model"] for name in ("zero", "none"))
    assert all(torch.equal(zero[name], none[name]) for name in none)


def test_compiled_blocks_have_two_graphs(data, tmp_path, monkeypatch):
    """One of plain blocks in both phases, one with logits."""
    import torch._dynamo
    from torch._dynamo.testing import CompileCounterWithBackend
    plain, with_logits = CompileCounterWithBackend("aot_eager"), CompileCounterWithBackend("aot_eager")
    compile_module, compile_function = nn.Module.compile, torch.compile
    torch._dynamo.reset()
    monkeypatch.setattr(SiTBlock, "compile", lambda block, dynamic: compile_module(block, backend=plain))
    monkeypatch.setattr(AttentionTeacher, "compile", lambda teacher: compile_module(teacher, backend="aot_eager"))
    monkeypatch.setattr(torch, "compile", lambda function, backend=with_logits: compile_function(
        function, backend=backend))
    haste.main(flags(data, tmp_path / "run", 8, "--compile"))
    torch._dynamo.reset()
    monkeypatch.undo()
    haste.main(flags(data, tmp_path / "eager", 8))
    assert with_logits.frame_count == 1 and plain.frame_count == 1
    for ours, theirs in zip(log_lines(tmp_path / "run"), log_lines(tmp_path / "eager"), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-3) and ours.keys() == theirs.keys()


@pytest.mark.slow  # a minute
def test_the_student_learns_to_look_where_the_teacher_looks():
    from check_haste import distillation
    with_attention, features_only = (distillation(coeff, 0.5)[0] for coeff in (0.5, 0.0))
    assert with_attention[3] < 0.6 * features_only[3]  # KL at step 400


# ----------------------------------------------------------------------------------------------------------------------
# Recipes and errors


@pytest.mark.parametrize("name", [*SIT_SIZES])
def test_every_recipe_fits_its_model_and_teacher(name):
    cfg, sizes = parse(["--model", name]), SIT_SIZES[name]
    depth, heads = (4, 4) if name == "toy" else (12, 12)  # of the toy's teacher, of DINOv2-B
    assert len(cfg.student_layers) == len(cfg.teacher_layers) >= 2
    assert max(cfg.student_layers) < sizes["depth"] and max(cfg.teacher_layers) < depth
    assert cfg.align_heads <= min(sizes["num_heads"], heads)
    assert max(cfg.student_layers) < cfg.encoder_depth < sizes["depth"]  # the last aligned block bears the features
    assert 0 < cfg.early_stop_point < cfg.max_train_steps


@pytest.mark.parametrize("bad, message", [
    (["--student-layers", 0, 4], "--student-layers from 0 to 3"),
    (["--student-layers", -1, 1], "--student-layers from 0 to 3"),
    (["--teacher-layers", 0, 2], "--teacher-layers from 0 to 1"),
    (["--teacher-layers", 1], "as many --teacher-layers"),
    (["--align-heads", 3], "--align-heads up to 2"),
    (["--align-heads", 0], "--align-heads 0 must lie between 1"),
    (["--attn-coeff", -1], "--attn-coeff -1.0 must lie between 0"),
    (["--attn-coeff", "nan"], "--attn-coeff nan must lie"),
    (["--early-stop-point", -1], "--early-stop-point -1 must lie between 0"),
    (["--encoder-depth", 5], "--encoder-depth 5 is not among the 4 blocks"),
    (["--student-layers"], "expected at least one argument"),
    (["--enc-type", "prepared,prepared"], "unknown teacher"),
])
def test_bad_values_get_one_line(data, tmp_path, bad, message):
    with pytest.raises(SystemExit) as caught:
        haste.main([str(flag) for flag in flags(data, tmp_path / "run", 2, *bad)])
    text = str(caught.value)
    assert text.startswith("error: ") and message in text and len(text.splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_another_stop_is_another_run(data, tmp_path):
    haste.main(flags(data, tmp_path / "run", 2))
    with pytest.raises(SystemExit, match="early_stop_point 6, now 7"):
        haste.main(flags(data, tmp_path / "run", 4, "--early-stop-point", 7))

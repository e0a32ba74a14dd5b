"""Teachers: preprocessing and DINOv2 against the official codes, every row of TEACHERS, original files of weights."""
import functools

import pytest
import timm
import torch
import torch.nn as nn

import common
from golden_utils import Fixture
from support import teachers
from support.dataset import clean_input
from support.teachers import TEACHERS, load_teacher

TINY = dict(embed_dim=32, depth=2, num_heads=2)
DINOV2 = {"base": "dinov2-vit-b", "reg": "dinov2reg-vit-b", "giant": "dinov2-vit-g"}  # the fixture's cases


@pytest.fixture
def tiny(monkeypatch):
    """tiny(**sizes): from now on timm builds the same models, but small."""
    real = timm.create_model

    def shrink(**sizes):
        monkeypatch.setattr(timm, "create_model", functools.partial(real, **(TINY | sizes)))
    shrink()
    return shrink


@pytest.fixture
def meta(monkeypatch):
    """Full-size models without memory; timm 1.0.12 reads drop-path rates off a tensor, which meta tensors refuse."""
    monkeypatch.setattr(torch, "linspace", functools.partial(torch.linspace, device="cpu"))
    return torch.device("meta")


def uint8_images(size, batch=2, device=None):
    generator = None if device else torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (batch, size, size, 3), dtype=torch.uint8, device=device, generator=generator)


def error_of(*args):
    with pytest.raises(SystemExit) as caught:
        load_teacher(*args)
    message = str(caught.value)
    assert message.startswith("error: ") and "\n" not in message
    return message


# ----------------------------------------------------------------------------------------------------------------------
# Against the official codes


def test_preprocessing_equals_repa(tiny):
    golden = Fixture("preprocess")
    for raw, encoders in golden.config["raw"].items():
        pixels = golden.input(raw)  # (B,3,H,W) uint8
        images = pixels.permute(0, 2, 3, 1)
        for encoder in encoders:
            # What REPA does for mocov3, which timm lacks, is what it does for mae.
            rows = [name for name in TEACHERS if name.startswith({"mocov3": "mae"}.get(encoder, encoder))]
            for row in rows:
                x = load_teacher(row, pixels.shape[-1], "", False).preprocess(images)
                golden.check(f"{raw}/{encoder}", x)
                golden.check(f"{raw}/{encoder}/mean_std", torch.stack([x.mean(dim=(0, 2, 3)), x.std(dim=(0, 2, 3))]))
                golden.check(f"{raw}/{encoder}/end", x[-1, :, -5:, -5:])
            assert rows
        golden.check(f"{raw}/vae_input", clean_input(dict(images=images), None, None))
    golden.assert_all_checked(but=("crop.",))  # test_prepare.py compares the crops


def official_dinov2(golden, case):
    """State dict of the fixture's DINOv2, by the names of facebookresearch/dinov2."""
    config = golden.config[case]
    D, swiglu = config["dim"], config["ffn"] == "swiglufused"
    hidden = (4 * D * 2 // 3 + 7) // 8 * 8 if swiglu else 4 * D
    shapes = {"cls_token": (1, 1, D), "pos_embed": (1, 1 + (config["train_img"] // 14) ** 2, D), "norm.weight": (D,),
              "norm.bias": (D,), "patch_embed.proj.weight": (D, 3, 14, 14), "patch_embed.proj.bias": (D,)}
    if config["reg"]:
        shapes["register_tokens"] = (1, config["reg"], D)
    for i in range(config["depth"]):
        linears = {"attn.qkv": (3 * D, D), "attn.proj": (D, D)} | (
            {"mlp.w12": (2 * hidden, D), "mlp.w3": (D, hidden)} if swiglu else
            {"mlp.fc1": (hidden, D), "mlp.fc2": (D, hidden)})
        for name, shape in linears.items():
            shapes |= {f"blocks.{i}.{name}.weight": shape, f"blocks.{i}.{name}.bias": shape[:1]}
        shapes |= {f"blocks.{i}.{name}": (D,) for name in
                   ("norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias", "ls1.gamma", "ls2.gamma")}
    weights = {key: golden.weight(f"{case}/{key}", shape) for key, shape in shapes.items()}
    return weights | {"mask_token": torch.zeros(1, D)}


def test_dinov2_equals_the_official_class(tiny, tmp_path, monkeypatch):
    """Official names in a .pth go through load_teacher, and the position table is resampled as REPA does it."""
    monkeypatch.setattr(teachers.Teacher, "preprocess", lambda self, x: x)  # the fixture's input is normalised pixels
    golden = Fixture("dinov2")
    for case, row in DINOV2.items():
        config = golden.config[case]
        tiny(embed_dim=config["dim"], depth=config["depth"], num_heads=config["heads"])
        torch.save(official_dinov2(golden, case), tmp_path / f"{case}.pth")
        teacher = load_teacher(row, config["eval_img"] * 256 // 224, str(tmp_path / f"{case}.pth"))
        assert teacher.grid == config["grid"] and teacher.width == config["dim"]
        assert teacher.vit.num_prefix_tokens == config["num_prefix_tokens"]
        cls, patches = teacher(golden.input(f"{case}/x"))
        golden.check(f"{case}/x_norm_clstoken", cls)
        golden.check(f"{case}/x_norm_patchtokens", patches)
        pos_embed = teacher.vit.pos_embed
        if config["reg"]:  # timm adds the class token's position to the token itself
            weights = official_dinov2(golden, case)
            pos_embed = torch.cat([teacher.vit.cls_token - weights["cls_token"], pos_embed], dim=1)
        golden.check(f"{case}/pos_embed_resampled", pos_embed)
        if case != "base":  # models with registers, or at the size of their training, come the same from torch.hub
            golden.check(f"{case}/hub_own_interpolation", patches)

    tiny(embed_dim=6, depth=0, num_heads=1)
    weights = load_teacher("dinov2-vit-b", 256, "", False).state_dict()
    weights = {key.removeprefix("vit."): value for key, value in weights.items() if key.startswith("vit.")}
    torch.save(weights | {"pos_embed": golden.input("pos_embed_37")}, tmp_path / "37.pth")
    for resolution, grid in ((256, 16), (512, 32)):
        teacher = load_teacher("dinov2-vit-b", resolution, str(tmp_path / "37.pth"))
        golden.check(f"pos_embed_{grid}", teacher.vit.pos_embed)
    # torch.hub's plain model, called at another size than it learned at, resamples without antialias: not REPA's way.
    golden.assert_all_checked(but=("base/hub_own_interpolation",))


# ----------------------------------------------------------------------------------------------------------------------
# Every teacher


WIDTHS = dict(s=384, b=768, l=1024, L=1024, g=1536, h=1280)


@pytest.mark.parametrize("name", TEACHERS)
def test_full_size_grids(name, meta):
    """At 256 px every teacher has SiT/2's 16x16 tokens, at 512 px DINOv2 its 32x32; others stop there."""
    for resolution in (256, 512) if name.startswith("dinov2") else (256,):
        with meta:
            teacher = load_teacher(name, resolution, "", False)
            cls, patches = teacher(uint8_images(resolution, device=meta))
        assert teacher.grid == resolution // 16 and teacher.width == WIDTHS[name[-1]]
        assert patches.shape == (2, teacher.grid ** 2, teacher.width) and cls.shape == (2, teacher.width)
        qkv = [block.attn.qkv for block in teacher.vit.blocks]  # HASTE reads them
        assert all(linear.out_features == 3 * teacher.width for linear in qkv)
    if not name.startswith("dinov2"):
        assert name in error_of(name, 512, "", False)
    assert "multiples of 16" in error_of(name, 250, "", False)


@pytest.mark.parametrize("name", TEACHERS)
def test_tokens(name, tiny):
    """Registers are no patches, the class token comes first or is the mean; frozen, in eval mode, float32 always."""
    teacher = load_teacher(name, 64, "", False)
    assert not teacher.vit.training and not any(p.requires_grad for p in teacher.parameters())
    taken, images = [], uint8_images(64)
    has_norm = isinstance(teacher.vit.norm, nn.LayerNorm)
    assert has_norm == (not name.startswith(("clip", "mae")))
    last = teacher.vit.norm if has_norm else teacher.vit.blocks[-1]
    last.register_forward_hook(lambda module, args, out: taken.append(out))
    cls, patches = teacher(images)
    prefix = 5 if "reg" in name else 0 if "jepa" in name else 1
    assert torch.equal(patches, taken[0][:, prefix:]) and patches.shape == (2, 16, 32)
    assert torch.equal(cls, taken[0][:, 0] if prefix else taken[0].mean(dim=1))
    with torch.autocast("cpu", torch.bfloat16):
        halves = teacher(images)
    assert all(out.dtype == torch.float32 and not out.requires_grad for out in (cls, patches, *halves))
    assert 0 < (halves[1] - patches).abs().max() < 0.1 * patches.abs().max()


def test_patches_lie_row_by_row(tiny):
    """Token i belongs to the SiT token i of the same image: its place is (i // grid, i % grid)."""
    for name in ("dinov2reg-vit-b", "mae-vit-l", "jepa-vit-h"):
        tiny(depth=0)  # without attention a token sees its own patch alone
        teacher = load_teacher(name, 64, "", False)
        images = uint8_images(64)
        changed = images.clone()
        changed[:, 20:28, 36:44] = 255 - changed[:, 20:28, 36:44]  # well inside row 1, column 2
        difference = (teacher(changed)[1] - teacher(images)[1]).abs().amax(dim=(0, 2))
        assert difference.nonzero().flatten().tolist() == [1 * 4 + 2]


def test_clip_has_its_own_activation(tiny):
    x = torch.linspace(-3, 3, 9)
    gelu = load_teacher("clip-vit-L", 64, "", False).vit.blocks[0].mlp.act
    assert torch.allclose(gelu(x), x * torch.sigmoid(1.702 * x))


# ----------------------------------------------------------------------------------------------------------------------
# Files of weights, as they were released


def clip_names(weights):
    """OpenAI's names for timm's CLIP, with the text tower's beginning and the projection that no teacher needs."""
    swaps = (("blocks.", "transformer.resblocks."), ("norm_pre", "ln_pre"), ("attn.qkv.", "attn.in_proj_"),
             ("attn.proj", "attn.out_proj"), ("mlp.fc1", "mlp.c_fc"), ("mlp.fc2", "mlp.c_proj"), ("norm1", "ln_1"),
             ("norm2", "ln_2"), ("patch_embed.proj", "conv1"), ("pos_embed", "positional_embedding"),
             ("cls_token", "class_embedding"))
    out = {"positional_embedding": torch.zeros(77, 8), "transformer.resblocks.0.ln_1.weight": torch.zeros(8),
           "visual.proj": torch.zeros(32, 8), "logit_scale": torch.zeros(())}
    for key, value in weights.items():
        for timms, theirs in swaps:
            key = key.replace(timms, theirs)
        key = "visual." + ("ln_post" + key.removeprefix("norm") if key.startswith("norm.") else key)
        value = {"visual.positional_embedding": value[0], "visual.class_embedding": value.flatten()}.get(key, value)
        out[key] = value.half()  # as OpenAI's are
    return out


RELEASES = {
    "dinov1-vit-b": lambda weights: weights,
    "mae-vit-l": lambda weights: dict(model=weights),
    "clip-vit-L": clip_names,
    "jepa-vit-h": lambda weights: dict(
        encoder={f"module.{key}": value for key, value in weights.items()},
        target_encoder={f"module.{key}": value + 1 for key, value in weights.items()}, opt={}, epoch=300),
}


@pytest.mark.parametrize("name", RELEASES)
def test_original_files(name, tiny, tmp_path):
    """Learned at 224 px: the tables of the models with patches of 16 px grow from 14x14 to 16x16."""
    vit = timm.create_model(TEACHERS[name][0], img_size=224, num_classes=0)
    for tensor in vit.state_dict().values():  # biases, norms and class tokens begin as constants
        tensor.normal_().copy_(tensor.half())
    weights = vit.state_dict()
    torch.save(RELEASES[name](weights), tmp_path / "weights.pth")
    loaded = load_teacher(name, 256, str(tmp_path / "weights.pth")).vit.state_dict()
    assert set(loaded) == {key for key in weights if TEACHERS[name][3] or not key.startswith("norm.")}
    resized = {key for key, value in loaded.items() if value.shape != weights[key].shape}
    assert resized == ({"pos_embed"} if name in ("dinov1-vit-b", "mae-vit-l") else set())
    for key, value in loaded.items():
        ours, theirs = (value[:, :1], weights[key][:, :1]) if key in resized else (value, weights[key])
        assert value.dtype == torch.float32 and torch.equal(ours, theirs), key


def test_safetensors_of_timm(tiny, tmp_path):
    from safetensors.torch import save_file
    weights = timm.create_model(TEACHERS["dinov2reg-vit-s"][0], img_size=518, num_classes=0).state_dict()
    save_file(weights, tmp_path / "model.safetensors")
    teacher = load_teacher("dinov2reg-vit-s", 512, str(tmp_path / "model.safetensors"))
    assert torch.equal(teacher.vit.reg_token, weights["reg_token"]) and teacher.grid == 32


def test_wrong_files(tiny, tmp_path):
    """A file of another model, size or method, or with a part missing, is never loaded in part."""
    vit = timm.create_model(TEACHERS["dinov2-vit-b"][0], img_size=224, num_classes=0).state_dict()
    files = {
        "sit": common.SiT(**common.SIT_SIZES["toy"]).state_dict(),
        "run": dict(ema={}, model=common.SiT(8, **common.SIT_SIZES["toy"]).state_dict(), step=3),
        "tensor": dict(model=torch.zeros(3)), "encoder": dict(encoder=3), "nothing": {},
        "registers": timm.create_model(TEACHERS["dinov2reg-vit-b"][0], img_size=224, num_classes=0).state_dict(),
        "lacking": {key: value for key, value in vit.items() if key != "blocks.1.ls2.gamma"},
        "wider": {key: value.repeat(*[2] * value.ndim) for key, value in vit.items()},
    }
    for name, content in files.items():
        path = tmp_path / f"{name}.pth"
        torch.save(content, path)
        message = error_of("dinov2-vit-b", 256, str(path))
        assert str(path) in message and "vit_base_patch14_dinov2" in message and len(message) < 420
    assert "blocks.1.ls2.gamma" in error_of("dinov2-vit-b", 256, str(tmp_path / "lacking.pth"))


def test_unknown_names():
    for name in ("mocov3-vit-b", "dinov2", "", "DINOv2-vit-b"):
        message = error_of(name, 256)
        assert repr(name) in message and "mocov3 is left out: timm has no weights" in message
        assert all(known in message for known in ("prepared", *TEACHERS))

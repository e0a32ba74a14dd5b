"""The SD-VAE of common.py: against diffusers' own outputs, its names, its loader and its error lines."""
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from golden_utils import Fixture, official_keys, state_shapes
from support.vae import (
    LATENT_SCALE,
    OLD_ATTENTION_NAMES,
    AutoencoderKL,
    load_vae,
    load_vae_weights,
    pixels_to_uint8,
)
from test_clip import ldm_name

GOLDEN = Fixture("vae")
TINY = dict(widths=(16, 32), layers=2, groups=8)  # the fixture's sizes


@pytest.fixture(scope="module")
def tiny():
    return GOLDEN.fill(AutoencoderKL(**TINY).eval().requires_grad_(False))


@pytest.fixture(scope="module")
def full():
    torch.manual_seed(0)
    return AutoencoderKL().eval().requires_grad_(False)


def old_names(weights):
    for old, new in OLD_ATTENTION_NAMES.items():
        weights = {name.replace(new, old): tensor for name, tensor in weights.items()}
    return weights


def test_encode_equals_diffusers(tiny):
    mean, std = tiny.encode(GOLDEN.input("image"))
    sample = mean + std * GOLDEN.input("eps")
    encoder_out = tiny.encoder(GOLDEN.input("image"))
    for name, value in dict(encoder_out=encoder_out, moments=tiny.quant_conv(encoder_out), mean=mean, std=std,
                            logvar=2 * std.log(), sample=sample, latent_scaled=sample * LATENT_SCALE).items():
        GOLDEN.check(name, value)


def test_decode_equals_diffusers(tiny):
    mean, std = tiny.encode(GOLDEN.input("image"))
    latent = (mean + std * GOLDEN.input("eps")) * LATENT_SCALE
    GOLDEN.check("decoded", tiny.decode(latent / LATENT_SCALE))
    GOLDEN.check("decoded_of_z", tiny.decode(GOLDEN.input("z")))


def test_uint8_rules():
    pixels = GOLDEN.input("pixels")  # some beyond [-1, 1]
    GOLDEN.check("uint8_repa", pixels_to_uint8(pixels).permute(0, 3, 1, 2))
    # willisma/SiT's rule is not ours; it stands here so that the difference is a fact: at most one level, ours lower
    theirs = (127.5 * pixels + 128).clamp(0, 255).to(torch.uint8)
    GOLDEN.check("uint8_sit", theirs)
    assert set((theirs.int() - pixels_to_uint8(pixels).permute(0, 3, 1, 2).int()).unique().tolist()) == {0, 1}


def test_uint8_of_bf16_is_computed_in_fp32():
    x = torch.linspace(-1.1, 1.1, 3 * 4 * 5).reshape(1, 3, 4, 5).bfloat16()
    assert torch.equal(pixels_to_uint8(x), pixels_to_uint8(x.float()))
    assert pixels_to_uint8(x).shape == (1, 4, 5, 3) and pixels_to_uint8(x).dtype == torch.uint8


def test_logvar_is_clamped():
    vae = AutoencoderKL(**TINY).requires_grad_(False)
    vae.quant_conv.weight.zero_()
    vae.quant_conv.bias.copy_(torch.tensor([0.0] * 4 + [-99.0, -30.0, 20.0, 99.0]))
    _, std = vae.encode(torch.zeros(1, 3, 8, 8))
    assert torch.allclose(std[0, :, 0, 0].log(), torch.tensor([-15.0, -15.0, 10.0, 10.0]))


def test_gradients_reach_every_parameter():
    vae = AutoencoderKL(**TINY)  # ReaLS trains it
    mean, std = vae.encode(torch.randn(2, 3, 16, 16))
    vae.decode(mean + std * torch.randn_like(std)).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.abs().sum() > 0
               for name, p in vae.named_parameters() if "to_k.bias" not in name)  # softmax ignores a shift of all keys


def test_sd3_needs_no_fork():
    vae = AutoencoderKL(latent_channels=16, **TINY)
    vae.quant_conv = vae.post_quant_conv = torch.nn.Identity()  # SD3's has no quant convolutions
    mean, std = vae.encode(torch.zeros(1, 3, 16, 16))
    assert mean.shape == std.shape == (1, 16, 8, 8) and vae.decode(mean).shape == (1, 3, 16, 16)
    assert not any("quant" in name for name in vae.state_dict())


@pytest.mark.parametrize("entry", ["sd_vae_ft_ema", "sd_vae_ft_ema_old_names"])
def test_names_and_shapes_are_the_published_ones(entry):
    with torch.device("meta"):
        vae = AutoencoderKL()
    ours = state_shapes(vae)
    assert (old_names(ours) if entry.endswith("old_names") else ours) == official_keys(entry)
    assert len(ours) == 248 and sum(p.numel() for p in vae.parameters()) == 83_653_863


def test_load_the_hub_s_file(full, tmp_path):
    """All 335 MB of it, with random weights and the old names, as on the hub."""
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    save_file(old_names(full.state_dict()), path)
    vae = load_vae(path=str(path))
    assert not vae.training and not any(p.requires_grad or p.is_meta for p in vae.parameters())
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(vae.parameters(), full.parameters(), strict=True))
    path.unlink()
    x = torch.randn(1, 3, 32, 32)
    mean, std = vae.encode(x)
    assert mean.shape == std.shape == (1, 4, 4, 4) and vae.decode(mean).shape == x.shape


@pytest.mark.parametrize("suffix", [".safetensors", ".bin", ".pt"])
@pytest.mark.parametrize("naming", [dict, old_names])
def test_both_namings_give_identical_output(tiny, tmp_path, naming, suffix):
    path = tmp_path / f"vae{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(naming(tiny.state_dict()), path)
    with torch.device("meta"):
        vae = AutoencoderKL(**TINY)
    load_vae_weights(vae, path)
    image, z = GOLDEN.input("image"), GOLDEN.input("z")
    assert all(torch.equal(a, b) for a, b in zip(vae.encode(image), tiny.encode(image)))
    assert torch.equal(vae.decode(z), tiny.decode(z))


def test_latent_diffusion_s_naming_gives_identical_output(tiny, tmp_path):
    """As Stable Diffusion's single files have it: with a prefix, and 1x1 convolutions in the attention."""
    weights = {f"first_stage_model.{ldm_name(name) if 'coder' in name else name}":
               w[:, :, None, None] if "to_" in name and w.ndim == 2 else w for name, w in tiny.state_dict().items()}
    torch.save(weights, tmp_path / "ldm.pt")
    vae = AutoencoderKL(**TINY)
    load_vae_weights(vae, tmp_path / "ldm.pt")
    assert all(torch.equal(a, b) for a, b in zip(vae.parameters(), tiny.parameters(), strict=True))


def test_half_precision_file_becomes_fp32(tiny, tmp_path):
    save_file({name: tensor.half() for name, tensor in tiny.state_dict().items()}, tmp_path / "vae.safetensors")
    vae = AutoencoderKL(**TINY)
    load_vae_weights(vae, tmp_path / "vae.safetensors")
    assert all(p.dtype == torch.float32 for p in vae.parameters())


def damaged(tmp_path, tiny):
    """[(path, what its error line says)] for every way we know in which a file is not the VAE."""
    weights = dict(tiny.state_dict())
    first = next(iter(weights))
    torch.save(weights, tmp_path / "whole.bin")
    half = (tmp_path / "whole.bin").read_bytes()[:20_000]
    contents = {"text.bin": b"hello", "empty.bin": b"", "cut.bin": half, "text.safetensors": b"hello",
                "empty.safetensors": b"", "cut.safetensors": half}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    objects = {"pickled.pt": {"args": Path("x"), **weights}, "tensor.pt": weights[first], "list.pt": [1, 2],
               "number.pt": 3, "none.pt": None}
    for name, thing in objects.items():
        torch.save(thing, tmp_path / name)
    torch.save(weights, tmp_path / "legacy.pt", _use_new_zipfile_serialization=False)
    fit = {"nested.pt": {"state_dict": weights, "step": 3}, "numbered.pt": {0: 1}, "nothing.pt": {},
           "missing.pt": {name: tensor for name, tensor in weights.items() if name != first},
           "extra.pt": {**weights, "extra": torch.zeros(1)}, "shape.pt": {**weights, first: torch.zeros(1)}}
    for name, thing in fit.items():
        torch.save(thing, tmp_path / name)
    return ([(tmp_path / name, "is not a checkpoint") for name in [*contents, *objects, "legacy.pt"]]
            + [(tmp_path / name, "does not fit this VAE") for name in fit]
            + [(tmp_path / "absent.bin", "no checkpoint"), (tmp_path, "no checkpoint")])


def test_a_file_that_is_no_vae_gives_one_line(tiny, tmp_path):
    for path, says in damaged(tmp_path, tiny):
        with pytest.raises(SystemExit) as error:
            load_vae_weights(AutoencoderKL(**TINY), path)
        message = str(error.value)
        assert says in message and str(path) in message and "\n" not in message, message


def test_download_errors_name_the_flag(monkeypatch, tmp_path):
    import huggingface_hub
    from huggingface_hub import constants
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)  # the real function, without its retries (23 s)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    tries = [huggingface_hub.hf_hub_download]
    for exception in [OSError("disk full"), RuntimeError("xet")]:
        def fails(*args, exception=exception):
            raise exception
        tries.append(fails)
    for download in tries:
        monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
        with pytest.raises(SystemExit) as error:
            load_vae("ft-mse")
        message = str(error.value)
        assert "stabilityai/sd-vae-ft-mse" in message and "--vae-ckpt FILE" in message and "\n" not in message


def test_the_hub_is_asked_for_the_right_file(monkeypatch, tmp_path):
    import huggingface_hub
    asked = []
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *args: asked.append(args) or str(tmp_path / "no"))
    for name in ("ft-mse", "ft-ema"):
        with pytest.raises(SystemExit):
            load_vae(name)
    assert asked == [("stabilityai/sd-vae-ft-mse", "diffusion_pytorch_model.safetensors"),
                     ("stabilityai/sd-vae-ft-ema", "diffusion_pytorch_model.safetensors")]


def test_unknown_name():
    with pytest.raises(SystemExit, match="--vae sdxl: choose from ft-mse, ft-ema, or give --vae-ckpt FILE"):
        load_vae("sdxl")

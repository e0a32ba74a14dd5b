"""The full-size models: parameters and FLOPs without memory, and (slow: pytest -m slow) one true step of SiT-XL/2."""

import resource

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import repa
from common import SIT_SIZES, SiT
from support.runs import flop_counter

# Counted on the official models: 1000 classes, 4 latent channels, 256 px; GFLOP = 2 x multiply-adds, per image.
TABLE = {  # model: (parameters, trained ones, with willisma/SiT's head of 8 channels, GFLOP at 256 px, at 512 px)
    "SiT-S/2": (32_957_200, 32_858_896, 32_963_360, 12.108, 62.861),
    "SiT-B/2": (130_500_112, 130_303_504, 130_512_416, 46.004, 212.740),
    "SiT-L/2": (458_086_416, 457_824_272, 458_102_816, 161.387, 721.930),
    "SiT-XL/2": (675_111_184, 674_816_272, 675_129_632, 237.233, 1049.039),
}


@pytest.fixture
def no_storage():
    """Tensors made in this test have shapes and no values, as on the meta device, which knows no autocast."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield


def count(model, trained=False):
    return sum(p.numel() for p in model.parameters() if p.requires_grad or not trained)


def inputs(latent_size, batch=1):
    """x_t, t, y."""
    return torch.empty(batch, 4, latent_size, latent_size), torch.empty(batch), torch.empty(batch, dtype=torch.long)


def repa_xl():
    return repa.REPASiT(32, 4, 1000, SIT_SIZES["SiT-XL/2"], encoder_depth=8, z_dims=[768], projector_dim=2048)


@pytest.mark.parametrize("name", TABLE)
def test_parameter_counts(name, no_storage):
    total, trained, two_headed, _, _ = TABLE[name]
    model = SiT(**SIT_SIZES[name])
    assert (count(model), count(model, trained=True)) == (total, trained)
    rows, width = model.final_layer.linear.weight.shape  # learned variances double the last layer's rows
    assert total + rows * (width + 1) == two_headed
    wide = SiT(input_size=64, **SIT_SIZES[name])  # 512 px: only the position table grows
    assert count(wide) == total + 768 * width and count(wide, trained=True) == trained


def test_parameter_count_with_the_projector(no_storage):
    assert count(repa_xl()) == 683_242_512


@pytest.mark.parametrize("latent_size", [32, 64])
@pytest.mark.parametrize("name", TABLE)
def test_forward_flops(name, latent_size, no_storage):
    model = SiT(input_size=latent_size, **SIT_SIZES[name])
    with flop_counter() as counter, torch.no_grad():
        model(*inputs(latent_size))
    assert counter.get_total_flops() / 1e9 == pytest.approx(TABLE[name][3 if latent_size == 32 else 4], abs=6e-4)


def test_training_flops(no_storage):
    """Forward and backward of the loss, by the counter; and 3 x forward, which `describe` prints and MFU is made of."""
    model, batch = repa_xl(), 2
    x, t, y = inputs(32, batch)
    with flop_counter() as counter:
        velocity, proj = repa.repa_loss(model, x, t, x, y, [torch.empty(batch, 256, 768)])
        forward = counter.get_total_flops() / batch
        (velocity + 0.5 * proj).mean().backward()
    assert counter.get_total_flops() / batch == pytest.approx(724e9, rel=0.01)
    assert 3 * forward == pytest.approx(724e9, rel=0.001)


@pytest.mark.slow
def test_one_true_step_of_xl(tmp_path, monkeypatch):
    """SiT-XL/2, DINOv2-B of random weights, AdamW and EMA on the CPU: inside 24 GB, and the loss known beforehand."""
    calls, loss = [], repa.repa_loss

    def recording(model, x, t, noise, *args):
        fresh = {name: p.detach().clone() for name, p in model.named_parameters() if "final_layer" in name}
        velocity, proj = loss(model, x, t, noise, *args)
        calls.append((model, fresh, x, noise, velocity.detach(), proj.detach()))
        return velocity, proj

    monkeypatch.setattr(repa, "repa_loss", recording)
    repa.main(["--model", "SiT-XL/2", "--bench", "1", "--batch-size", "2", "--precision", "fp32", "--no-compile",
               "--workers", "0", "--out", str(tmp_path / "out")])
    [(model, fresh, x, noise, velocity, proj)] = calls
    assert x.shape == (2, 4, 32, 32) and count(model) == 683_242_512
    # A fresh SiT's velocity is 0, so that its error is the target itself.
    torch.testing.assert_close(velocity, (noise - x).square().mean(dim=(1, 2, 3)), rtol=1e-6, atol=0)
    assert proj.abs().max() < 0.2  # cosines of unrelated features
    moved = {name: (p - fresh[name]).abs().max().item() for name, p in model.named_parameters() if name in fresh}
    assert moved["final_layer.linear.weight"] == pytest.approx(1e-4, rel=0.01)  # Adam's first step is the learning rate
    assert all(p.isfinite().all() for p in model.parameters())
    assert not (tmp_path / "out").exists()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(f"peak memory {peak / 1e9:.1f} GB")
    assert peak < 24e9

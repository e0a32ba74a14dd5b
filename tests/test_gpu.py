"""What a GPU would show, on a machine without one: layouts, waits, precision, options of DDP, memory of a decoder."""
import subprocess
import sys
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import erw
import repa
from common import SIT_SIZES, SiT, sample
from support import runs, vae
from test_copies import ROOT
from test_training import as_a_fresh_process, child_env, command, make_data  # noqa: F401
from urepa import to_grid, to_tokens


def config(**settings):
    return SimpleNamespace(**dict(compile=None, precision="auto") | settings)


# ----------------------------------------------------------------------------------------------------------------------
# Layout of the tokens


@pytest.mark.parametrize("name", ["SiT", "REPASiT"])
def test_tokens_are_row_major_through_all_blocks(name):
    model = SiT(16, 3, 8, **SIT_SIZES["toy"])
    if name == "REPASiT":
        model = repa.REPASiT(16, 3, 8, SIT_SIZES["toy"], 2, [8], 16)
    strides = []
    for block in model.blocks:
        block.register_forward_hook(lambda block, inputs, h: strides.extend([inputs[0].stride(), h.stride()]))
    model(torch.randn(2, 3, 16, 16), torch.rand(2), torch.arange(2))
    assert set(strides) == {(16 * 96, 96, 1)} and len(strides) == 8


def test_u_repas_tokens_keep_layout_and_precision():
    h = torch.randn(2, 16, 8)
    tokens = to_tokens(to_grid(h).bfloat16())
    assert tokens.dtype == torch.float32 and tokens.stride() == h.stride()
    assert torch.equal(to_tokens(to_grid(h)), h)


# ----------------------------------------------------------------------------------------------------------------------
# Waits


class Copies(TorchDispatchMode):
    """Counts what makes the CPU wait for the GPU: numbers read from it, pageable memory copied to it."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        name = str(function)
        if name.startswith("aten._local_scalar_dense"):
            self.found.append(name)
        if name.startswith("aten._to_copy") and args[0].device.type == "cpu" and result.device.type == "cuda":
            self.found.append(name)
        return result


OLD = tuple(map(int, torch.__version__.split(".")[:2])) < (2, 11) and not torch.cuda.is_available()


@pytest.mark.skipif(OLD, reason="fake CUDA tensors of PyTorch before 2.11 ask for a driver")
@pytest.mark.parametrize("mode", ["ode", "sde"])
@pytest.mark.parametrize("heun", [False, True])
def test_the_sampler_waits_for_nothing(mode, heun):
    with FakeTensorMode(), Copies() as copies:
        noise = torch.empty(2, 3, 8, 8, device="cuda")
        y = torch.empty(2, dtype=torch.long, device="cuda")
        x = sample(lambda x, t, y: x * t.view(-1, 1, 1, 1), noise, y, y, mode=mode, num_steps=3, heun=heun,
                   cfg_scale=2.0, randn=lambda *shape: torch.empty(2, *shape, device="cuda"))
        assert x.device.type == "cuda"
    assert copies.found == []


# ----------------------------------------------------------------------------------------------------------------------
# Precision, compilers, optimisers


@pytest.mark.parametrize("has_bf16, triton, expected", [
    (True, True, ("bf16", True)), (False, True, ("fp32", True)), (True, False, ("bf16", False))])
def test_what_auto_means_on_a_gpu(monkeypatch, has_bf16, triton, expected):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has_bf16 or including_emulation)
    monkeypatch.setattr(runs.importlib.util, "find_spec", lambda name: object() if triton else None)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    cfg, before = config(), torch.get_float32_matmul_precision()
    runs.pick_precision(cfg, torch.device("cuda"))
    assert (cfg.precision, cfg.compile) == expected
    is_bf16 = expected[0] == "bf16"
    assert torch.get_float32_matmul_precision() == ("high" if is_bf16 else before)
    assert torch.backends.cudnn.allow_tf32 == is_bf16  # fp32 is fp32, in convolutions too
    torch.set_float32_matmul_precision(before)


def test_what_auto_means_on_a_cpu():
    cfg = config()
    runs.pick_precision(cfg, torch.device("cpu"))
    assert (cfg.precision, cfg.compile) == ("fp32", False)


@pytest.mark.parametrize("is_finite", [True, False])
def test_an_optimiser_that_does_not_know_found_inf_skips_all_the_same(is_finite):
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.RMSprop([weight], lr=0.1, momentum=0.9)
    optimizer.register_step_pre_hook(runs.skip_where_not_finite)
    for gradient in (1.0, 1.0 if is_finite else float("nan")):
        before = weight.detach().clone()
        weight.grad = torch.full((3,), gradient)
        repa.optimizer_step(optimizer, [weight], 1.0)
    assert weight.isfinite().all() and torch.equal(weight, before) != is_finite


def test_no_warning_of_ddp_and_no_buffer_sent():
    """On every PyTorch that is allowed: the option has had two names."""
    signature = runs.inspect.signature(torch.nn.parallel.DistributedDataParallel).parameters
    assert set(runs.DDP_OPTIONS) <= set(signature)
    assert not runs.DDP_OPTIONS.get("broadcast_buffers", False)
    assert not runs.DDP_OPTIONS.get("forward_sync_buffers", False)
    from torch import distributed as dist
    store = dist.HashStore()
    dist.init_process_group("gloo", rank=0, world_size=1, store=store)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", FutureWarning)
            torch.nn.parallel.DistributedDataParallel(SiT(16, 3, 8, **SIT_SIZES["toy"]), **runs.DDP_OPTIONS)
    finally:
        dist.destroy_process_group()


def test_a_missing_compiler_is_one_line(tmp_path):
    data = make_data(tmp_path / "data")
    environment = child_env() | dict(CXX="/nonexistent/c++", TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "cache"))
    done = subprocess.run([sys.executable, ROOT / "repa.py", *command(data, tmp_path / "run", 2, "--compile")],
                          env=environment, text=True, capture_output=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "torch.compile failed" in done.stderr and "--no-compile" in done.stderr


# ----------------------------------------------------------------------------------------------------------------------
# Memory


class Peak(TorchDispatchMode):
    """The largest tensor that an operation makes, in bytes."""

    bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.bytes = max(self.bytes, result.numel() * result.element_size())
        return result


def test_a_decoder_holds_few_images_at_once(monkeypatch):
    """64 images of 512 px: 128 channels of 512 x 512 in fp32 are 134 MB an image, 8.6 GB for all at once."""
    with FakeTensorMode(), Peak() as peak:
        model = vae.AutoencoderKL()
        model.to = lambda device: model  # fake weights cannot be moved
        monkeypatch.setattr(vae, "load_vae", lambda name, path: model)
        decode = vae.load_decoder(vae.SD_VAE_META, "ft-ema", "", torch.device("cpu"))
        images = decode(torch.empty(64, 4, 64, 64))
    assert images.shape == (64, 512, 512, 3) and images.dtype == torch.uint8
    assert peak.bytes == 16 * 256 * 512 * 512 * 4  # the widest map at full size, of 16 images


def test_decoding_in_parts_changes_nothing(monkeypatch):
    torch.manual_seed(0)
    model = vae.AutoencoderKL(widths=(8, 8), layers=1, groups=4).eval()
    monkeypatch.setattr(vae, "load_vae", lambda name, path: model)
    decode = vae.load_decoder(vae.SD_VAE_META, "ft-ema", "", torch.device("cpu"))
    z = torch.randn(19, 4, 4, 4)
    with torch.no_grad():
        whole = vae.pixels_to_uint8(model.decode(z / vae.LATENT_SCALE))
        assert (decode(z).int() - whole.int()).abs().max() <= 1 and len(decode(z)) == 19


def test_erw_probes_latents(tmp_path, capsys):
    """Noise of zeros is a number's, not a tensor's: on latents it met an attribute that a number lacks."""
    data = make_data(tmp_path / "data", latent=True)
    rng = np.random.default_rng(0)
    np.save(data / "images.npy", rng.integers(0, 256, (100, 64, 64, 3), np.uint8))
    from timm.models.vision_transformer import VisionTransformer
    vit = dict(img_size=64, patch_size=32, embed_dim=32, depth=4, num_heads=4, num_classes=0)
    torch.save(dict(config=vit, model=VisionTransformer(**vit).state_dict(), resolution=64), data / "teacher.pt")
    flags = ["--data", str(data), "--resolution", "64"]
    erw.main([*command(data, tmp_path / "run", 4, "--warmup-steps", 2), *flags])
    scores = erw.main(["--probe", "40", "--ckpt", str(tmp_path / "run/last.pt"), *flags])
    assert len(scores) == 4 and all(np.isfinite(scores))

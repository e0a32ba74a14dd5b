"""REG's model, loss, gradients and samplers against the official code, and a run's own parts: draws, files, errors."""
import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import check_reg
import reg
import repa
from common import SIT_SIZES, lognormal_time, sample
from golden_utils import Fixture, official_keys, state_shapes
from reg import REGSiT, guidance_scales, reg_loss
from support import flags
from support.dataset import PreparedData, image_randn
from support.teachers import TEACHERS, load_teacher
from support.vae import load_decoder
from test_training import as_a_fresh_process, command, make_data  # noqa: F401

GOLDEN = Fixture("reg")
CONFIG = GOLDEN.config
PATCHES = GOLDEN.input("zs_patches")
CLS = GOLDEN.input("cls")
ZS = torch.cat([CLS.unsqueeze(1), PATCHES], dim=1)


def parse(argv):
    return flags.parse(argv, reg.Config, SIT_SIZES, reg.RECIPES, reg.RANGES)


def small_reg(config=CONFIG, **changes):
    config = config | changes
    sizes = {name: config[name] for name in ("hidden_size", "depth", "num_heads", "patch_size")}
    return REGSiT(config["input_size"], config["in_channels"], config["num_classes"], sizes, config["encoder_depth"],
                  config["z_dim"], [config["z_dim"]], config["projector_dim"])


def losses(model, y, path="linear", rows=slice(None)):
    """The three terms, each (B,), on these rows of the fixture's batch."""
    x, t, noise, noise_cls = (GOLDEN.input(name)[rows] for name in ("x0", "t", "noise", "noise_cls"))
    return reg_loss(model, x, CLS[rows], t, noise, noise_cls, y[rows], [ZS[rows]], path)


def total(velocity, velocity_cls, proj):
    return (velocity + CONFIG["cls_coeff"] * velocity_cls + CONFIG["proj_coeff"] * proj).mean()


# ---------------------------------------------------------------------------------------------------------------------
# Against the official code
# ---------------------------------------------------------------------------------------------------------------------
def test_forward():
    model = GOLDEN.fill(small_reg())
    x, cls, t, y = (GOLDEN.input(name) for name in ("fw_x", "fw_cls", "fw_t", "fw_y"))
    v, v_cls, (z_hat,) = model(x, cls, t, y)
    GOLDEN.check("forward/v", v)
    GOLDEN.check("forward/cls_v", v_cls)
    GOLDEN.check("forward/zs", z_hat)
    with torch.autocast("cpu", torch.bfloat16):
        half = model(x, cls, t, y)
    for ours, exact in zip(half[:2], (v, v_cls)):
        assert ours.dtype == torch.float32 and (ours - exact).norm() < 0.03 * exact.norm()


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_losses_and_gradients(mode):
    model, y = GOLDEN.fill(small_reg()), GOLDEN.input("y")
    if mode == "train":  # the official model drops labels inside; here the caller gives labels with the drops made
        y = y.masked_fill(GOLDEN.input("drop_u") < CONFIG["class_dropout_prob"], model.num_classes)
    velocity, velocity_cls, proj = losses(model, y)
    GOLDEN.check(f"{mode}/denoising_loss", velocity)
    GOLDEN.check(f"{mode}/denoising_loss_cls", velocity_cls)
    GOLDEN.check(f"{mode}/proj_loss", proj.mean())
    loss = total(velocity, velocity_cls, proj)
    GOLDEN.check(f"{mode}/total_loss", loss)
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    GOLDEN.check(f"{mode}/grad_norm", torch.stack([g.norm() for g in gradients.values()]).norm())
    for name in [name for name in GOLDEN.outputs if name.startswith(f"{mode}/grad/")]:
        weight = name.removeprefix(f"{mode}/grad/")
        rows = GOLDEN.input("y_rows") if weight.endswith("[rows]") else slice(None)
        GOLDEN.check(name, gradients[weight.removesuffix("[rows]")][rows])


def test_cosine_path():
    velocity, velocity_cls, proj = losses(GOLDEN.fill(small_reg()), GOLDEN.input("y"), "cosine")
    GOLDEN.check("loss/cosine/denoising_loss", velocity)
    GOLDEN.check("loss/cosine/denoising_loss_cls", velocity_cls)
    GOLDEN.check("loss/cosine/proj_loss", proj.mean())
    GOLDEN.check("loss/cosine/total_loss", total(velocity, velocity_cls, proj))


@pytest.mark.parametrize("path", ["linear", "cosine"])
def test_an_image_has_the_same_loss_in_any_batch(path):
    """The official cosine path compares every class token with the targets of the whole batch."""
    model, y = GOLDEN.fill(small_reg()), GOLDEN.input("y")
    together, alone = losses(model, y, path), [losses(model, y, path, slice(i, i + 1)) for i in range(len(y))]
    for whole, parts in zip(together, zip(*alone)):
        torch.testing.assert_close(whole, torch.cat(parts), rtol=1e-5, atol=1e-6)
    assert together[1].std() > 0.1


def test_lognormal_times():
    for path in ("linear", "cosine"):
        GOLDEN.check(f"lognormal_t/{path}", lognormal_time(GOLDEN.input("lognormal_randn"), path))


def integrate(mode, case, **options):
    """One sampler case of the fixture: (image, class token), and what the network was asked at each call."""
    settings, model, calls = CONFIG[mode][case], GOLDEN.fill(small_reg()), []
    scales = guidance_scales(SimpleNamespace(**dict(cls_cfg_scale=None) | settings))
    draws = {name: iter(GOLDEN.input(f"sde_noise_{name}").double()) for name in ("x", "cls")}

    def velocity(state, t, y):
        calls.append((t[0], *(part[:2] for part in state), len(t)))
        return model.velocity(state, t, y)

    x, cls = sample(velocity, (GOLDEN.input("xT"), GOLDEN.input("clsT")), GOLDEN.input("y_s"),
                    torch.full((2,), CONFIG["num_classes"]), mode=mode, num_steps=settings["num_steps"],
                    heun=settings.get("heun", False), guidance_low=settings["guidance_low"],
                    guidance_high=settings["guidance_high"], cfg_scale=scales,
                    randn=lambda *shape: next(draws["x" if len(shape) == 3 else "cls"]), **options)
    return x, cls, calls


@pytest.mark.parametrize("case", CONFIG["sde"])
def test_sde(case):
    x, cls, calls = integrate("sde", case)
    t, x_mid, cls_mid, batch = zip(*calls)
    GOLDEN.check(f"sde/{case}/x", x)
    GOLDEN.check(f"sde/{case}/cls", cls)
    GOLDEN.check(f"sde/{case}/t", torch.stack(t))
    GOLDEN.check(f"sde/{case}/x_mid", torch.stack(x_mid))
    GOLDEN.check(f"sde/{case}/cls_mid", torch.stack(cls_mid))
    GOLDEN.check(f"sde/{case}/batch_per_call", torch.tensor(batch))


@pytest.mark.parametrize("case", CONFIG["ode"])
def test_ode(case):
    """REPA's sampler on the joint state; REG's own script refuses the ODE."""
    x, cls, _ = integrate("ode", case)
    GOLDEN.check(f"ode/{case}/x", x)
    GOLDEN.check(f"ode/{case}/cls", cls)


def test_every_output_of_the_fixture_was_compared():
    GOLDEN.assert_all_checked()


def test_names_and_shapes_are_regs():
    with torch.device("meta"):
        model = REGSiT(32, 4, 1000, SIT_SIZES["SiT-XL/2"], 8, 768, [768], 2048)
    assert state_shapes(model) == official_keys("reg_sit_xl_2")


@pytest.mark.parametrize("size, count", [("B", 131_683_600), ("L", 459_664_144), ("XL", 676_886_032)])
def test_parameter_counts(size, count):
    """The paper's 132, 460 and 677 M: without the projector, with the positions."""
    with torch.device("meta"):
        model = REGSiT(32, 4, 1000, SIT_SIZES[f"SiT-{size}/2"], 4, 768, [], 0)
    assert sum(p.numel() for p in model.parameters()) == count


# ---------------------------------------------------------------------------------------------------------------------
# Properties
# ---------------------------------------------------------------------------------------------------------------------
def test_a_fresh_model():
    """It begins with the weights of repa.py, its velocities are exactly 0, and the class token has no position."""
    torch.manual_seed(0)
    model = small_reg(num_classes=8)
    torch.manual_seed(0)
    plain = repa.REPASiT(8, 4, 8, dict(hidden_size=32, depth=4, num_heads=4, patch_size=2), 2, [24], 40).state_dict()
    ours, added = model.state_dict(), ("cls_projectors2", "wg_norm", "final_layer.linear_cls")
    assert {name for name in ours if name not in plain} == {f"{n}.{kind}" for n in added for kind in ("weight", "bias")}
    assert all(torch.equal(ours[name], plain[name]) for name in plain if name != "pos_embed")
    assert torch.equal(ours["pos_embed"][:, 1:], plain["pos_embed"]) and not ours["pos_embed"][:, 0].any()
    v, v_cls, _ = model(GOLDEN.input("x0"), CLS, GOLDEN.input("t"), torch.tensor([0, 1, 2, 8]))
    assert v.shape == (4, 4, 8, 8) and v_cls.shape == (4, 24) and not v.any() and not v_cls.any()
    _, velocity_cls, _ = losses(model, torch.tensor([0, 1, 2, 8]))
    torch.testing.assert_close(velocity_cls, (GOLDEN.input("noise_cls") - CLS).square().mean(dim=1))
    weight = model.cls_projectors2.weight.detach()  # Xavier's uniform, not PyTorch's default
    assert 0.95 * (6 / (24 + 32)) ** 0.5 < weight.abs().max().item() <= (6 / (24 + 32)) ** 0.5 + 1e-6
    assert not model.cls_projectors2.bias.any()


def test_guidance_of_the_class_token():
    def scales(**settings):
        return guidance_scales(SimpleNamespace(**settings))
    assert scales(cfg_scale=2.3, cls_cfg_scale=None) == (2.3, 2.3)
    assert scales(cfg_scale=2.3, cls_cfg_scale=1.5) == (2.3, 1.5)
    assert scales(cfg_scale=2.3, cls_cfg_scale=0.0) == scales(cfg_scale=2.3, cls_cfg_scale=-1.0) == (2.3, 1.0)
    # Where the image is unguided, so is the class token: the network runs on the conditional half only.
    model, y = GOLDEN.fill(small_reg()), GOLDEN.input("y_s")
    noise, null = (GOLDEN.input("xT"), GOLDEN.input("clsT")), torch.full((2,), 1000)
    off, also_off = (sample(model.velocity, noise, y, null, num_steps=2, cfg_scale=s) for s in [1.0, (1.0, 5.0)])
    assert all(torch.equal(a, b) for a, b in zip(off, also_off))


def test_recipes():
    """Table 12 and eval.sh of the official code."""
    for size, depth in [("B", 4), ("L", 8), ("XL", 8)]:
        cfg = parse(["--model", f"SiT-{size}/2"])
        assert (cfg.encoder_depth, cfg.proj_coeff, cfg.cls_coeff) == (depth, 0.5, 0.03)
        assert (cfg.mode, cfg.num_steps, cfg.heun) == ("sde", 250, False)
        assert (*guidance_scales(cfg), cfg.guidance_low, cfg.guidance_high) == (2.3, 2.3, 0, 0.85)
        assert cfg.enc_type == "dinov2-vit-b" and cfg.enc_type in TEACHERS


@pytest.mark.slow
def test_image_and_class_token_become_one():
    """Generated without labels, they name the same of 16 hidden clusters."""
    assert check_reg.coherence()[1200] > 0.7


# ---------------------------------------------------------------------------------------------------------------------
# Runs
# ---------------------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def data(tmp_path_factory):
    torch.set_num_threads(1)  # a module's fixtures come before a test's
    return make_data(tmp_path_factory.mktemp("reg") / "data")


@pytest.fixture(scope="module")
def trained(data):
    """A run of 20 steps: after them no weight is at its first value, so that the labels act."""
    reg.main(command(data, data.parent / "run", 20))
    return data.parent / "run/last.pt"


def log_of(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def test_images_noise_and_times_are_those_of_repa(data, tmp_path):
    """A fresh model's velocity is 0, so that its first loss is the mean of (noise - x)^2."""
    reg.main(command(data, tmp_path / "reg", 1, "--seed", 5))
    repa.main(command(data, tmp_path / "repa", 1, "--seed", 5))
    [ours], [theirs] = log_of(tmp_path / "reg"), log_of(tmp_path / "repa")
    assert ours["loss_velocity"] == theirs["loss_velocity"] and ours["loss_cls"] > 1


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_teacher_gives_the_class_token(precision, data, tmp_path, monkeypatch):
    calls, true_loss = [], reg.reg_loss

    def recording(model, *args):
        calls.append((*args, true_loss(model, *args)))
        return calls[-1][-1]
    monkeypatch.setattr(reg, "reg_loss", recording)
    reg.main(command(data, tmp_path / "run", 2, "--precision", precision))
    noises = []
    for x, cls, t, noise, noise_cls, y, (z,), path, terms in calls:
        assert cls.shape == noise_cls.shape == (8, 32) and z.shape == (8, 17, 32) and torch.equal(z[:, 0], cls)
        assert all(tensor.dtype == torch.float32 and tensor.isfinite().all() for tensor in (cls, z, x, *terms))
        images = ((x + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1)
        teacher = load_teacher("prepared", 16, str(data / "teacher.pt"))
        torch.testing.assert_close(cls, teacher(images)[0], **({} if precision == "fp32" else dict(atol=0.1, rtol=0.1)))
        torch.testing.assert_close(z[:, 1:], teacher(images)[1],
                                   **({} if precision == "fp32" else dict(atol=0.1, rtol=0.1)))
        assert not torch.isclose(noise_cls, noise.flatten(1)[:, :32]).any()
        noises.append(noise_cls)
    assert len(noises) == 2 and not torch.isclose(*noises).any()


@pytest.mark.parametrize("weights", [(), ("--cls-coeff", 0.2, "--proj-coeff", 0.7)])
def test_weights_of_the_terms(weights, data, tmp_path):
    reg.main(command(data, tmp_path / "run", 2, *weights))
    beta, lambda_ = weights[1::2] or (0.03, 0.5)
    for line in log_of(tmp_path / "run"):
        expected = line["loss_velocity"] + beta * line["loss_cls"] + lambda_ * line["loss_proj"]
        assert line["loss"] == pytest.approx(expected, rel=1e-5) and line["loss_proj"] != 0


def test_without_alignment_the_teacher_still_gives_the_class_token(data, tmp_path, error_of):
    out = tmp_path / "run"
    reg.main(command(data, out, 3, "--proj-coeff", 0, "--encoder-depth", 99))
    weights = torch.load(out / "last.pt", weights_only=True)["ema"]
    assert not any(name.startswith("projectors.") for name in weights) and "cls_projectors2.weight" in weights
    assert all(line["loss_proj"] == 0 and line["loss_cls"] > 0.5 for line in log_of(out))
    reg.main(sampling(out / "last.pt", tmp_path / "samples"))
    assert np.load(tmp_path / "samples/samples.npz")["cls"].shape == (4, 32)
    assert "nowhere.pt" in error_of(command(data, tmp_path / "2", 3, "--proj-coeff", 0, "--teacher-ckpt", "nowhere.pt"))


def sampling(ckpt, out, *more):
    return ["--ckpt", str(ckpt), "--out", str(out), "--sample", "4", "--batch-size", "4", "--num-steps", "3",
            "--labels", "1", "3", *map(str, more)]


def sampled(ckpt, folder, *more):
    return np.load(reg.main(sampling(ckpt, folder, *more)))


@pytest.mark.parametrize("mode", ["ode", "sde"])
def test_class_tokens_are_stored_beside_the_images(mode, trained, tmp_path):
    found = sampled(trained, tmp_path, "--mode", mode, "--cfg-scale", 2, "--cls-cfg-scale", 3, "--guidance-low", 0.5,
                    "--guidance-high", 0.8)
    weights = torch.load(trained, weights_only=True)["ema"]
    model = REGSiT(16, 3, 4, SIT_SIZES["toy"], 2, 32, [32], 256)
    model.load_state_dict(weights)
    randn = image_randn(0, range(4), "cpu")
    y = torch.tensor([1, 3, 1, 3])
    x, cls = sample(model.velocity, (randn(3, 16, 16), randn(32)), y, y * 0 + 4, mode=mode, num_steps=3,
                    cfg_scale=(2.0, 3.0), guidance_low=0.5, guidance_high=0.8, randn=randn)
    assert found["cls"].dtype == np.float32
    torch.testing.assert_close(torch.from_numpy(found["cls"]), cls, rtol=1e-4, atol=1e-4)
    difference = torch.from_numpy(found["arr_0"]).int() - load_decoder(dict(vae=None), "", "", "cpu")(x).int()
    assert difference.abs().max() <= 1 and found["arr_0"].std() > 1 and found["labels"].tolist() == y.tolist()


def test_the_flag_of_the_class_tokens_guidance(trained, tmp_path):
    cls = {g: sampled(trained, tmp_path / str(g), "--cfg-scale", 3, *(["--cls-cfg-scale", g] if g is not None else []))
           ["cls"] for g in (None, 3, 1, 0, -2)}
    assert np.array_equal(cls[None], cls[3]) and np.array_equal(cls[0], cls[1]) and np.array_equal(cls[-2], cls[1])
    assert np.abs(cls[3] - cls[1]).max() > 1e-3
    off = [sampled(trained, tmp_path / f"off{g}", "--cls-cfg-scale", g)["cls"] for g in (1, 5)]
    assert np.array_equal(*off)


def test_sampling_says_what_is_guided(trained, tmp_path, capsys):
    sampled(trained, tmp_path, "--cfg-scale", 3, "--cls-cfg-scale", 0, "--guidance-high", 0.85)
    assert "guidance 3, of class tokens 1, for t in [0, 0.85]" in capsys.readouterr().out
    sampled(trained, tmp_path, "--cls-cfg-scale", 5)
    assert "guidance 1\n" in capsys.readouterr().out


def test_official_files(trained, tmp_path, error_of, monkeypatch):
    """{"ema": ...} and bare weights, both with the projector, sample as our own checkpoint does."""
    monkeypatch.setattr(reg, "SD_VAE_META", dict(vae=None))  # without a meta of ours they are latents; here, pixels
    weights, expected = torch.load(trained, weights_only=True)["ema"], sampled(trained, tmp_path / "ours")
    for name, content in dict(ema=dict(ema=weights, steps=7), bare=weights).items():
        torch.save(content, tmp_path / f"{name}.pt")
        found = sampled(tmp_path / f"{name}.pt", tmp_path / name)
        assert all(np.array_equal(found[key], expected[key]) for key in expected.files)
    torch.save({key: value for key, value in weights.items() if key != "wg_norm.bias"}, tmp_path / "less.pt")
    assert "wg_norm.bias" in error_of(sampling(tmp_path / "less.pt", tmp_path / "out"))


def test_do_class_tokens_fit_their_images(data, tmp_path):
    """The toy's diagnostic: on tokens that fit, that fit another image of their class, and that fit nothing."""
    cfg = parse(["--data", str(data)])
    run, real = reg.setup(cfg), PreparedData(str(data), 16)
    order = np.argsort(real.array("labels"), kind="stable")  # by class, so that a neighbour is of the same class
    images, labels = real.array("images")[order], real.array("labels")[order]
    tokens = load_teacher("prepared", 16, str(data / "teacher.pt"))(torch.tensor(images))[0]
    means = torch.stack([tokens[torch.from_numpy(labels == label)].mean(dim=0) for label in range(4)])

    def figures(cls):
        np.savez(tmp_path / "samples.npz", arr_0=images, labels=labels, cls=cls.numpy())
        path, text = reg.compare_class_tokens(cfg, run, tmp_path / "samples.npz")
        with np.load(path) as named:
            assert np.array_equal(named["arr_0"], images)
            asked, seen, own, same, other = map(float, re.findall(r"(?<![\w-])-?\d+\.\d+", text))
            assert asked == pytest.approx(100 * (named["labels"] == labels).mean(), abs=0.06)
            return named["labels"], seen, own, same, other

    _, seen, own, same, other = figures(tokens)  # the teacher's own
    assert seen == 100 and own == 1 and own > max(same, other)
    named, _, own, same, other = figures(means[labels])  # of the class, and of no image in particular
    assert np.array_equal(named, labels) and other < same < 1 and own < 1
    neighbours = figures(tokens.roll(1, 0))
    assert neighbours[1] < 100 and neighbours[2] < 1
    assert figures(-tokens)[2] == -1


# ---------------------------------------------------------------------------------------------------------------------
# Mistakes
# ---------------------------------------------------------------------------------------------------------------------
@pytest.fixture
def error_of(capsys):
    """The one line with which reg.py stops on these flags."""
    def check(flags):
        with pytest.raises(SystemExit) as caught:
            reg.main([str(flag) for flag in flags])
        message = str(caught.value)
        assert message.startswith("error: ") and "\n" not in message
        return message
    return check


@pytest.mark.parametrize("flag, value", [
    ("cls-coeff", 0), ("cls-coeff", -1), ("cls-coeff", "nan"), ("cls-coeff", "much"), ("cls-cfg-scale", "much"),
    ("proj-coeff", -1), ("projector-dim", 0)])
def test_number_without_sense(flag, value, data, tmp_path, error_of):
    assert f"--{flag}" in error_of([*command(data, tmp_path / "out", 1), f"--{flag}={value}"])
    assert not (tmp_path / "out").exists()


def test_guidance_without_sense(trained, tmp_path, error_of):
    assert "--cls-cfg-scale" in error_of(sampling(trained, tmp_path, "--cls-cfg-scale", "nan"))


def test_a_checkpoint_without_a_class_token(trained, data, tmp_path, error_of):
    repa.main(command(data, tmp_path / "repa", 1))
    message = error_of(sampling(tmp_path / "repa/last.pt", tmp_path / "out"))
    assert "repa.py" in message and "class token" in message
    message = error_of([*command(data, tmp_path / "out", 1), "--init", str(tmp_path / "repa/last.pt")])
    assert "does not fit" in message and "cls_projectors2" in message
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").glob("*.pt"))

"""CAR-Flow against an independent float64 implementation, its change of coordinates, and the 1-D experiment.

The fixture was computed in float64, so float32 casts are taken out of the code for it (`float64` below).
"""
import numpy as np
import pytest
import torch
import torch.nn as nn

import carflow
import common
import repa
from carflow import SHIFTS, VARIANTS, CARFlow, ShiftNet, carflow_loss
from common import SIT_SIZES, SiT, interpolate, path_coefficients, sample
from golden_utils import Fixture, official_keys, state_shapes
from support import flags as command_line
from support import line
from support.dataset import PreparedData
from support.line import Flows1D
from support.runs import Run
from test_training import as_a_fresh_process, command, make_data  # noqa: F401

GOLDEN = Fixture("carflow")
CONFIG = GOLDEN.config
MODES = list(SHIFTS)
of_modes = pytest.mark.parametrize("mode", MODES)


@pytest.fixture
def float64(monkeypatch):
    """The code in float64, in which the fixture was made: what asks for float32 gets float64."""
    previous = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    yield
    torch.set_default_dtype(previous)


def small(mode, fill=True, **changes):
    """A CARFlow of the fixture's sizes; weights of the fixture, or fresh ones."""
    config = CONFIG | changes
    sizes = {name: config[name] for name in ("hidden_size", "depth", "num_heads", "patch_size")}
    sit = SiT(config["input_size"], config["in_channels"], config["num_classes"], **sizes)
    model = CARFlow(sit, mode, config["shift_width"], config["path_type"]).to(torch.get_default_dtype())
    return GOLDEN.fill(model) if fill else model


def inputs(*names):
    values = [GOLDEN.input(name) for name in names]
    return [value.to(torch.get_default_dtype()) if value.is_floating_point() else value for value in values]


def test_shifts_of_every_label(float64):
    mu0, mu1 = small("joint").table()
    GOLDEN.check("mu0", mu0)
    GOLDEN.check("mu1", mu1)


@of_modes
def test_loss_and_gradients(mode, float64):
    model = small(mode)
    x, noise, t, y = inputs("x", "eps", "t", "y")
    seen = {}
    model.sit.register_forward_hook(lambda sit, args, out: seen.update(z_t=args[0], pred_z=out))
    loss = carflow_loss(model, x, t, noise, y)
    x_t, v = interpolate(x, noise, t)
    pred_x = model(x_t, t, y)
    GOLDEN.check(f"{mode}/z_t", seen["z_t"])
    GOLDEN.check(f"{mode}/pred_z", seen["pred_z"])
    GOLDEN.check(f"{mode}/pred_x", pred_x)
    GOLDEN.check(f"{mode}/target_z", v + seen["pred_z"] - pred_x)
    GOLDEN.check(f"{mode}/loss_per_sample", loss)
    GOLDEN.check(f"{mode}/loss", loss.mean())
    loss.mean().backward()
    parameters = dict(model.named_parameters())
    for name in [name for name in GOLDEN.outputs if name.startswith(f"{mode}/grad/")]:
        GOLDEN.check(name, parameters[name.removeprefix(f"{mode}/grad/")].grad)


def draw_sample(velocity, noise, y, case, draws=None):
    """The fixture's sampler: 8 steps; guidance 1.5 on [0, 0.8]."""
    cfg_scale = CONFIG["cfg_scale"] if case.endswith("cfg") else 1.0
    draws = iter(draws if draws is not None else [])
    return sample(velocity, noise, y, torch.full_like(y, CONFIG["num_classes"]), mode=case[:3], heun="heun" in case,
                  num_steps=CONFIG["sample_steps"], cfg_scale=cfg_scale, guidance_low=CONFIG["guidance_low"],
                  guidance_high=CONFIG["guidance_high"], randn=lambda *shape: next(draws))


@of_modes
@pytest.mark.parametrize("case", ["ode_euler", "ode_euler_cfg", "ode_heun_cfg", "sde", "sde_cfg"])
def test_samples(mode, case, float64):
    noise, y, draws = inputs("xT", "ys", "sde_noise")
    GOLDEN.check(f"{mode}/{case}", draw_sample(small(mode).with_table(), noise, y, case, draws))


def test_path_in_z(float64):
    noise, y = inputs("xT", "ys")
    model, z = small("joint"), []
    model.sit.register_forward_hook(lambda sit, args, out: z.append(args[0]))
    x = draw_sample(model, noise, y, "ode_euler")
    GOLDEN.check("joint/z_trajectory", torch.stack([*z, x + model.shifts(y)[1]]))


def test_literal_guidance_in_z_is_another_thing(float64):
    """v_null + w (v_y - v_null) at one z, by hand: the fixture's value, and not ours."""
    noise, y = inputs("xT", "ys")
    model = small("joint")
    mu0, mu1 = model.shifts(y)
    literal = draw_sample(model.sit, noise + mu0, y, "ode_euler_cfg") - mu1
    GOLDEN.check("joint/literal_zspace_cfg", literal)
    ours = draw_sample(model, noise, y, "ode_euler_cfg")
    assert (ours - literal).abs().max() > 0.2
    without = draw_sample(model, noise, y, "ode_euler")
    torch.testing.assert_close(draw_sample(model.sit, noise + mu0, y, "ode_euler") - mu1, without)  # the same at w = 1


def test_one_dimensional_experiment(float64):
    variants, seeds = list(VARIANTS), 2
    model = Flows1D(list(VARIANTS.values()), seeds)
    shapes = CONFIG["toy_shapes"]

    def weight(name):
        return torch.cat([GOLDEN.weight(f"toy.{name}.weight", shapes[name]),
                          GOLDEN.weight(f"toy.{name}.bias", shapes[name][:1])[:, None]], dim=1)
    ends = ["mu0", "mu1", "logs0", "logs1"]
    for name in ("fc1", "fc2", "fc3"):
        getattr(model, name).data[:] = weight(name)
    model.ends.data[:] = torch.cat([weight(name) for name in ends])

    models = len(variants) * seeds
    x, noise, t, y = (u.expand(models, -1) for u in inputs("toy/x", "toy/eps", "toy/t", "toy/y"))
    z_t, v, target = model(x, noise, t, y.double())
    error = (v - target).square()
    error.mean(dim=1).sum().backward()
    noise, y = (u.expand(models, -1) for u in inputs("toy/eps_sample", "toy/y_sample"))
    path, sampled = model.paths(noise, y.double(), 50)
    for i, variant in enumerate(variants):
        row = seeds * i
        values = dict(z_t=z_t, target_z=target, pred_z=v, loss_per_sample=error, loss=error.mean(dim=1), sample=sampled,
                      path_length=path.diff(dim=0).abs().sum(dim=0))
        for name, value in values.items():
            GOLDEN.check(f"toy/{variant}/{name}", value[row])
        for output in [output for output in GOLDEN.outputs if output.startswith(f"toy/{variant}/grad/")]:
            name, kind = output.split("/")[-1].split(".")
            grad = model.ends.grad[row, ends.index(name), None] if name in ends else getattr(model, name).grad[row]
            GOLDEN.check(output, grad[:, :-1] if kind == "weight" else grad[:, -1])
    learns = model.ends.grad[::seeds].abs().sum(dim=-1) > 0
    assert learns.tolist() == [[bool(on) for on in flags] for flags in VARIANTS.values()]


def test_every_output_of_the_fixture_was_compared():
    GOLDEN.assert_all_checked()


# ---------------------------------------------------------------------------------------------------------------------
# The change of coordinates
# ---------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("path", ["linear", "cosine"])
@of_modes
def test_loss_in_x_is_the_loss_in_z(mode, path, float64):
    """The paper's eq. 9, written out in z: equal to 1e-12, value and gradients."""
    model = small(mode, path_type=path)
    x, noise, t, y = inputs("x", "eps", "t", "y")
    mu0, mu1 = model.shifts(y)
    a, s, da, ds = path_coefficients(t.view(-1, 1, 1, 1), path)
    z1, z0 = x + mu1, noise + mu0
    in_z = (model.sit(a * z1 + s * z0, t, y) - (da * z1 + ds * z0)).square().mean(dim=(1, 2, 3))
    in_x = carflow_loss(model, x, t, noise, y, path)
    torch.testing.assert_close(in_x, in_z, rtol=0, atol=1e-12)
    trained = [p for p in model.parameters() if p.requires_grad]
    for ours, theirs in zip(torch.autograd.grad(in_x.sum(), trained), torch.autograd.grad(in_z.sum(), trained)):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)


def test_none_is_plain_sit_bit_for_bit():
    model = small("none")
    x, t, y = inputs("x", "t", "y")
    assert torch.equal(model(x, t, y), model.sit(x, t, y))
    assert torch.equal(model.with_table()(x, t, y), model.sit(x, t, y))


def test_fresh_shifts_are_zero_and_get_a_gradient():
    torch.manual_seed(0)
    model = small("joint", fill=False)
    x, noise, t, y = inputs("x", "eps", "t", "y")
    assert not any(mu.any() for mu in model.shifts(y))
    assert torch.equal(model(x, t, y), model.sit(x, t, y))
    carflow_loss(model, x, t, noise, y).mean().backward()
    # v_theta is 0, so only the target pulls: dL/dmu1 = -dL/dmu0 = 2 (x - noise + mu1 - mu0), averaged
    expected = 2 * (x - noise).mean(dim=(0, 2, 3)) / x.shape[1]
    torch.testing.assert_close(model.shift1.out.bias.grad, expected)
    torch.testing.assert_close(model.shift0.out.bias.grad, -expected)


def test_guidance_does_not_feel_the_shifts(float64):
    """For an exact velocity in z, any shifts, of the null label, too, leave the guided samples of no shifts."""
    class Exact(nn.Module):
        """Velocity of two classes N(+-1.5, 0.2^2) and their mixture (label 2), in the z of given shifts."""
        in_channels, input_size, num_classes = 1, 4, 2

        def __init__(self):
            super().__init__()
            self.y_embedder = common.LabelEmbedder(2, 8)

        def forward(self, z, t, y):
            table = self.wrapper.shifts(y)
            a, s, da, ds = path_coefficients(t.view(-1, 1, 1, 1))
            x_t = z - a * table[1] - s * table[0]
            means = torch.tensor([-1.5, 1.5]).view(2, 1, 1, 1, 1)
            variance = a ** 2 * 0.04 + s ** 2
            weights = torch.exp(-(x_t - a * means) ** 2 / (2 * variance)) * (
                (y == 2) | (y == torch.arange(2)[:, None])).double().view(2, -1, 1, 1, 1)
            slope = (da * a * 0.04 + ds * s) / variance
            per_class = da * means + slope * (x_t - a * means)
            v = (weights * per_class).sum(dim=0) / weights.sum(dim=0)
            return v + da * table[1] + ds * table[0]

    torch.manual_seed(0)
    noise, y = torch.randn(64, 1, 4, 4), torch.arange(64) % 2
    samples = {}
    for mode in MODES:
        net = Exact()
        model = CARFlow(net, mode, 4)
        net.__dict__["wrapper"] = model
        for name in SHIFTS[mode]:
            nn.init.normal_(getattr(model, name).out.weight)
        samples[mode] = sample(model.with_table(), noise, y, torch.full_like(y, 2), num_steps=20, cfg_scale=3.0)
    for mode in MODES:
        torch.testing.assert_close(samples[mode], samples["none"], rtol=0, atol=1e-9)


def test_the_wrapped_model_may_be_any(float64):
    class Other(nn.Module):
        in_channels, input_size, num_classes = 3, 8, 5

        def __init__(self):
            super().__init__()
            self.y_embedder, self.conv = common.LabelEmbedder(5, 16), nn.Conv2d(3, 3, 1)

        def forward(self, x_t, t, y):
            return self.conv(x_t)

    model = CARFlow(Other(), "joint", 4)
    for net in (model.shift0, model.shift1):
        nn.init.normal_(net.out.weight)
    x, t, y = torch.randn(4, 3, 8, 8), torch.rand(4), torch.arange(4)
    mu0, mu1 = model.shifts(y)
    t_ = t.view(-1, 1, 1, 1)
    expected = model.sit.conv(x + (1 - t_) * mu1 + t_ * mu0) - mu0 + mu1
    torch.testing.assert_close(model(x, t, y), expected)
    torch.testing.assert_close(model.with_table()(x, t, y), expected)


def test_the_table_is_computed_once(monkeypatch):
    model, calls = small("joint"), []
    noise, y = inputs("xT", "ys")
    forward = ShiftNet.forward
    monkeypatch.setattr(ShiftNet, "forward", lambda self, e: (calls.append(len(e)), forward(self, e))[1])
    with_table = draw_sample(model.with_table(), noise, y, "ode_euler_cfg")
    assert calls == [11, 11]
    torch.testing.assert_close(with_table, draw_sample(model, noise, y, "ode_euler_cfg"))
    assert len(calls) > 11


def test_shifts_stay_in_fp32_under_autocast():
    model, (y,) = small("joint"), inputs("y")
    with torch.autocast("cpu", torch.bfloat16):
        under = model.shifts(y)
    for ours, expected in zip(under, model.shifts(y)):
        assert ours.dtype == torch.float32 and torch.equal(ours, expected)


def test_full_size():
    """Names and shapes of REPA's official SiT-XL/2, and the parameters that the spec of ShiftNet counts."""
    with torch.device("meta"):
        model = CARFlow(SiT(**SIT_SIZES["SiT-XL/2"]), "joint")
        wide = ShiftNet(1152, 4, 32, 108)
    official = {name: shape for name, shape in official_keys("repa_sit_xl_2").items() if "projectors" not in name}
    assert state_shapes(model.sit) == official
    count = {name: sum(p.numel() for p in net.parameters()) for name, net in model.named_children()}
    assert count == dict(sit=675_111_184, shift0=2_023_588, shift1=2_023_588)
    assert 2 * 2_023_588 / 675_111_184 < 0.006  # the paper: below 0.6 % more
    assert sum(p.numel() for p in wide.parameters()) == 2_311_528  # the paper: about 2.3 M each
    flows = Flows1D([(1, 1, 0, 0)], 1)
    assert sum(p.numel() for p in (flows.fc1, flows.fc2, flows.fc3)) == 1993 and flows.ends[0, 0].numel() == 9


# ---------------------------------------------------------------------------------------------------------------------
# A run: files, learning rates, label drops, errors
# ---------------------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def data(tmp_path_factory):
    torch.set_num_threads(1)
    return make_data(tmp_path_factory.mktemp("carflow") / "data")


def config():
    return command_line.parse([], carflow.Config, carflow.MODELS, carflow.RECIPES, carflow.RANGES)


def flags(data, out, steps, *more):
    return [*command(data, out, steps, "--shift-width", 4), *map(str, more)]


@pytest.fixture(scope="module")
def trained(data):
    """{mode: last.pt} after three steps, in which the shifts of a joint run have moved."""
    runs = {mode: data.parent / mode for mode in MODES}
    for mode, out in runs.items():
        carflow.main(flags(data, out, 3, "--shift", mode))
    return {mode: out / "last.pt" for mode, out in runs.items()}


def test_training_without_shifts_is_repas_baseline_bit_for_bit(data, trained, tmp_path):
    repa.main(command(data, tmp_path / "repa", 3, "--proj-coeff", 0))
    theirs = torch.load(tmp_path / "repa/last.pt", weights_only=True)
    ours = torch.load(trained["none"], weights_only=True)
    for part in ("model", "ema"):
        assert {f"sit.{name}" for name in theirs[part]} == ours[part].keys()
        assert all(torch.equal(weight, ours[part][f"sit.{name}"]) for name, weight in theirs[part].items())
    for path in (trained["none"], tmp_path / "repa/last.pt"):
        carflow.main(["--ckpt", str(path), "--sample", "4", "--num-steps", "2", "--batch-size", "4", "--out",
                      str(tmp_path / path.parent.name)])
    a, b = (np.load(tmp_path / name / "samples.npz")["arr_0"] for name in ("repa", "none"))
    assert np.array_equal(a, b)  # a plain SiT's checkpoint is sampled as mode none


@of_modes
def test_a_checkpoint_is_loaded_in_its_mode(mode, trained):
    state = torch.load(trained[mode], weights_only=True)["ema"]
    model, _ = carflow.load_carflow(config(), trained[mode])  # the flag says joint
    assert set(SHIFTS[mode]) == {name for name, net in model.named_children() if isinstance(net, ShiftNet)}
    assert all(torch.equal(state[name], weight) for name, weight in model.state_dict().items())
    assert all(mu.any() == (f"shift{i}" in SHIFTS[mode]) for i, mu in enumerate(model.shifts(torch.arange(4))))


def test_all_trained_parameters_move_and_are_averaged(trained):
    checkpoint = torch.load(trained["joint"], weights_only=True)
    fresh = carflow.load_carflow(config(), trained["joint"])[0].state_dict()
    for name in fresh:
        if name.startswith("shift"):
            assert not torch.equal(checkpoint["model"][name], checkpoint["ema"][name]), name


def test_the_shifts_have_a_learning_rate_of_their_own(data, trained, tmp_path):
    """At rate 0 they stay; else the optimiser's second group has the product, and the first step moves them by it."""
    carflow.main(flags(data, tmp_path / "still", 1, "--shift-lr-mult", 0))
    carflow.main(flags(data, tmp_path / "fast", 1, "--shift-lr-mult", 5))
    still, fast = (torch.load(tmp_path / name / "last.pt", weights_only=True) for name in ("still", "fast"))
    assert not still["model"]["shift0.out.bias"].any()
    torch.testing.assert_close(fast["model"]["shift0.out.bias"].abs(), torch.full((3,), 5 * 4e-3))  # Adam's first step
    assert torch.equal(still["model"]["sit.blocks.0.mlp.fc1.weight"], fast["model"]["sit.blocks.0.mlp.fc1.weight"])
    assert [group["lr"] for group in fast["optimizer"]["param_groups"]] == [4e-3, 5 * 4e-3]


def test_labels_are_dropped_once_for_network_and_shifts(data, tmp_path, monkeypatch):
    seen = dict(sit=[], shift=[])
    embed, forward = common.LabelEmbedder.forward, carflow.CARFlow.shifts
    monkeypatch.setattr(common.LabelEmbedder, "forward", lambda self, y: (seen["sit"].append(y.tolist()),
                                                                          embed(self, y))[1])
    monkeypatch.setattr(carflow.CARFlow, "shifts", lambda self, y: (seen["shift"].append(y.tolist()),
                                                                    forward(self, y))[1])
    carflow.main(flags(data, tmp_path / "out", 2, "--cfg-prob", 0.5))
    assert any(4 in y for y in seen["shift"])
    assert {tuple(y) for y in seen["sit"]} == {tuple(y) for y in seen["shift"]}


def test_init(data, trained, tmp_path, capsys):
    """From a plain SiT the shifts are fresh; from a CARFlow they come along; other classes cost the label table."""
    repa.main(command(data, tmp_path / "repa", 1, "--proj-coeff", 0))
    for name, ckpt, folder, fresh in (
            ("plain", tmp_path / "repa/last.pt", data, "shift0, shift1"), ("own", trained["joint"], data, "nothing"),
            ("none", trained["none"], data, "shift0, shift1"),
            ("classes", trained["joint"], make_data(tmp_path / "data", classes=3), "y_embedder")):
        carflow.main(flags(folder, tmp_path / name, 1, "--init", ckpt, "--learning-rate", 0))
        assert f"left fresh: {fresh}\n" in capsys.readouterr().out
    before = torch.load(trained["joint"], weights_only=True)["ema"]
    after = torch.load(tmp_path / "own/last.pt", weights_only=True)["model"]
    assert all(torch.equal(weight, after[name]) for name, weight in before.items())


@pytest.mark.parametrize("more, remedy", [
    (["--shift", "both"], "joint"),
    (["--shift-width", "0"], "--shift-width"),
    (["--shift-lr-mult", "-1"], "--shift-lr-mult"),
    (["--learn-scale", "source"], "--model synthetic"),
    (["--learn-scale", "both"], "target"),
    (["--model", "synthetic", "--sample", "4", "--ckpt", "x"], "--sample"),
    (["--model", "synthetic", "--bench", "4"], "--bench"),
    (["--model", "Synthetic"], "synthetic"),
    (["--init", "JOINT", "--shift", "source"], "--shift"),
    (["--init", "JOINT", "--shift-width", "5"], "--shift-width"),
    (["--sample", "1", "--ckpt", "JOINT", "--path-type", "cosine"], "--path-type linear"),
    (["--sample", "1", "--ckpt", "JOINT", "--labels", "4"], "0..3"),
])
def test_errors(more, remedy, data, trained, tmp_path):
    more = [str(trained["joint"]) if word == "JOINT" else word for word in more]
    with pytest.raises(SystemExit) as caught:
        carflow.main(flags(data, tmp_path / "out", 1, *more))
    assert str(caught.value).startswith("error: ") and remedy in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_run_of_another_shift_is_refused(data, trained):
    with pytest.raises(SystemExit, match="shift 'joint', now 'none'"):
        carflow.main(flags(data, trained["joint"].parent, 5, "--shift", "none"))


@pytest.mark.parametrize("size", [2, 6, 12, 28])
def test_an_input_no_shift_net_can_make(size):
    with pytest.raises(common.SizeError, match="--shift none"):
        ShiftNet(8, 4, size)


def test_repa_names_what_it_cannot_sample(trained):
    with pytest.raises(SystemExit, match="not those of a SiT: shift0"):
        repa.main(["--ckpt", str(trained["joint"]), "--sample", "1"])


def test_diagnose(data, trained):
    """The figures by hand: on shifts that are the class means, halves of them, the cosine is 1."""
    model, _ = carflow.load_carflow(config(), trained["joint"])
    prepared, run = PreparedData(data, 16), Run(0, 1, torch.device("cpu"), 4, 1, None)
    images = prepared[np.arange(100)]
    x, y = images["images"].permute(0, 3, 1, 2) / 127.5 - 1, images["labels"]
    means = torch.stack([x[y == label].mean(dim=0) for label in range(4)])
    model.shifts = lambda labels: (means[labels] * 0.75, means[labels] * -0.25)
    loss, norm0, norm1, cosine = carflow.diagnose(model, prepared, run).values()
    norm = means.flatten(1).norm(dim=1).mean()
    assert cosine == pytest.approx(1, abs=1e-5)
    assert norm0 == pytest.approx(0.75 * norm) and norm1 == pytest.approx(0.25 * norm)
    assert torch.equal(loss, carflow.diagnose(model, prepared, run)["validation velocity loss"]) and 0.5 < loss < 5


# ---------------------------------------------------------------------------------------------------------------------
# The experiment in one dimension
# ---------------------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def experiment(tmp_path_factory):
    """({figure: {variant: mean over seeds}}, the model, the folder) of the whole run: half a minute."""
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("synthetic")
    figures, model = carflow.main(["--model", "synthetic", "--out", str(out)])
    return {name: dict(zip(VARIANTS, value.mean(dim=1).tolist())) for name, value in figures.items()}, model, out



def test_shifts_learn_faster(experiment):
    w1 = experiment[0]["W1 at step 300"]
    assert all(w1[variant] < 0.65 * w1["none"] for variant in ("source", "target", "joint"))


def test_shifts_halve_the_paths(experiment):
    length = experiment[0]["path length"]
    assert length["joint"] < 1.1 and 1.50 < length["none"] < 1.56


def test_the_floor_holds_for_shifts_and_scales_collapse(experiment):
    figures, model, _ = experiment
    loss = next(value for name, value in figures.items() if name.startswith("loss"))
    deviation = next(value for name, value in figures.items() if "deviation" in name)
    assert all(loss[variant] >= 0.31 for variant in ("none", "source", "target", "joint"))
    assert loss["scale_source"] < 0.1 and deviation["scale_source"] < 0.1  # all samples at the class means
    assert loss["scale_target"] < 0.1 and deviation["scale_target"] > 0.6  # samples all over the place


def test_the_collapsed_velocities_are_those_of_the_docstring(experiment):
    """(mu0 - z)/(1-t) and (z - mu1)/t, which the paper derives, explain nearly all of what the networks became."""
    model = experiment[1]
    generator = torch.Generator().manual_seed(0)
    count, rows = 2000, {variant: slice(3 * i, 3 * i + 3) for i, variant in enumerate(VARIANTS)}
    noise, z, u = (torch.randn(1, count, generator=generator) for _ in range(3))
    y = (torch.arange(count)[None] % 2).float().expand(18, -1)
    t = (0.05 + 0.9 * torch.special.ndtr(u)).expand(18, -1)
    with torch.no_grad():
        z_t, v, _ = model((2 * y - 1) * line.CENTRE + line.STD * z, noise, t, y)
        mu0, mu1, _, _ = model.shifts_and_scales(y)
    for variant, collapsed in (("scale_source", (mu0 - z_t) / (1 - t)), ("scale_target", (z_t - mu1) / t)):
        error = (v - collapsed)[rows[variant]].square().mean()
        assert error < 0.2 < v[rows[variant]].square().mean(), variant


def test_the_picture(experiment):
    """Six panels; where the data stand in z (right), class 1 is orange and above, class 0 blue and below."""
    from PIL import Image
    image = np.asarray(Image.open(experiment[2] / "paths.png").convert("RGB")).astype(int)
    assert image.shape == (600, 1350, 3) and (image == 255).all(axis=2).mean() > 0.5
    for panel, variant in enumerate(VARIANTS):
        part = image[panel // 3 * 300:, panel % 3 * 450:][:300, :450]
        assert (part.min(axis=2) < 120).mean() > 0.001, variant  # text
        if variant in ("none", "source", "scale_source"):  # the data stay where they are
            warmth = part[:, 370:, 0] - part[:, 370:, 2]
            assert (warmth[:150] > 40).sum() > 300 and (warmth[:150] < -40).sum() == 0, variant
            assert (warmth[150:] < -40).sum() > 300 and (warmth[150:] > 40).sum() == 0, variant


def test_learn_scale_runs_the_two_that_differ_in_it(tmp_path, capsys):
    figures, model = carflow.main(["--model", "synthetic", "--learn-scale", "target", "--max-train-steps", "60",
                                   "--out", str(tmp_path)])
    assert model.learned[::3, 0].tolist() == [[0, 1, 0, 0], [0, 1, 0, 1]]
    printed = capsys.readouterr().out
    assert "scale_target" in printed and "none" not in printed
    assert "W1 at step 50" in printed and "W1 at step 60" in printed
    scale = figures["scale"]
    assert (scale[0] == 1).all() and (scale[1] < 0.9).all() and (tmp_path / "paths.png").exists()


def test_variants_see_the_same_numbers(monkeypatch, tmp_path):
    """Seeds differ, variants do not: so they compare in pairs."""
    batches, forward = [], Flows1D.forward
    monkeypatch.setattr(Flows1D, "forward", lambda self, *args: (batches.append(args), forward(self, *args))[1])
    carflow.main(["--model", "synthetic", "--max-train-steps", "1", "--batch-size", "16", "--out", str(tmp_path)])
    for u in batches[0]:
        u = u.view(6, 3, 16)
        assert (u == u[:1]).all() and not torch.equal(u[0, 0], u[0, 1])
    x, noise, t, y = (u[0] for u in batches[1])  # 20,000 to measure the loss
    assert x[y == 1].mean() == pytest.approx(1.5, abs=0.02) and x[y == 0].std() == pytest.approx(0.2, abs=0.01)
    assert noise.std() == pytest.approx(1, abs=0.03) and t.mean() == pytest.approx(0.5, abs=0.02)

"""GMem's model, losses, gradients, samplers and bank against the official code; then a run: its bank, its errors."""
import json
import shutil
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import gmem
import repa
from common import SIT_SIZES, interpolate, lognormal_time, sample
from gmem import MemoryBank, MemorySiT, coefficients, corrupt, gmem_loss, mix_snippets
from golden_utils import Fixture, official_keys, state_shapes
from support import flags as command_line
from support.teachers import Teacher, load_teachers
from test_training import TORCHRUN, as_a_fresh_process, command, finish, make_data, start  # noqa: F401

GOLDEN = Fixture("gmem")
CONFIG = GOLDEN.config
X, NOISE, Z = (GOLDEN.input(name) for name in ("x", "noise", "zs"))
SNIPPET = F.normalize(GOLDEN.input("mem_raw"), dim=-1)
NEVER = torch.zeros(4, dtype=torch.bool)
FEATURES = GOLDEN.input("bank/features")


def parse(argv):
    return command_line.parse(argv, gmem.Config, SIT_SIZES, gmem.RECIPES, gmem.RANGES)


def small_gmem(config=CONFIG):
    sizes = {name: config[name] for name in ("hidden_size", "depth", "num_heads", "patch_size")}
    return MemorySiT(config["input_size"], config["in_channels"], config["mem_dim"], sizes, config["encoder_depth"],
                     [config["z_dim"]], config["projector_dim"])


def official():
    """The fixture's network, in its first version, which is a plain SiT."""
    return GOLDEN.fill(small_gmem(), "sit/")


def backwards(model):
    """The same network as the second version uses it: time runs from noise to data, so that its velocity is -v."""
    def network(x_t, t, snippet):
        v, z_hats = model(x_t, 1 - t, snippet)
        return -v, z_hats
    return network


def velocity(network):
    return lambda *args: network(*args)[0]


# ---------------------------------------------------------------------------------------------------------------------
# Against the official code
# ---------------------------------------------------------------------------------------------------------------------
def test_forward():
    GOLDEN.check("mem", SNIPPET)
    x_t, v = interpolate(X, NOISE, GOLDEN.input("v1/t"))
    GOLDEN.check("v1/x_t", x_t)
    GOLDEN.check("v1/target", v)
    model = official()
    v_hat, (z_hat,) = model(x_t, GOLDEN.input("v1/t"), SNIPPET)
    GOLDEN.check("v1/eval_v", v_hat)
    GOLDEN.check("v1/eval_zs_tilde", z_hat)
    GOLDEN.check("v1/eval_v_null_memory", model(x_t, GOLDEN.input("v1/t"), torch.zeros_like(SNIPPET))[0])
    GOLDEN.check("v1/cond_embedding", model.condition_projection(SNIPPET))


def check_gradients(prefix, loss, model):
    loss.backward()
    parameters = dict(model.named_parameters())
    for name in [name for name in GOLDEN.outputs if name.startswith(f"{prefix}/grad/")]:
        GOLDEN.check(name, parameters[name.removeprefix(f"{prefix}/grad/").replace("projector.0", "projectors.0")].grad)


def test_first_versions_loss():
    """Its dropout comes after the projection: put there by a hook, for ours is the second version's."""
    model, keep = official(), GOLDEN.input("v1/keep_mask_after_linear")
    model.condition_projection.register_forward_hook(lambda *args: args[2] * keep / (1 - CONFIG["v1_dropout"]))
    velocity_error, proj, _ = gmem_loss(model, X, GOLDEN.input("v1/t"), NOISE, SNIPPET, Z)
    GOLDEN.check("v1/denoising_loss", velocity_error)
    GOLDEN.check("v1/proj_loss", proj.mean())
    loss = (velocity_error + CONFIG["proj_coeff"] * proj).mean()
    GOLDEN.check("v1/total", loss)
    check_gradients("v1", loss, model)


def test_second_versions_loss():
    model, t = official(), lognormal_time(-GOLDEN.input("v2/lognorm_normal"))
    GOLDEN.check("v2/t_sit", t)
    GOLDEN.check("v2/t_official", lognormal_time(GOLDEN.input("v2/lognorm_normal")))
    keep = GOLDEN.input("v2/keep_mask_before_linear").bool()
    snippet = corrupt(GOLDEN.input("mem_raw"), keep, NEVER, CONFIG["v2_dropout"])
    velocity_error, proj, cosine = gmem_loss(backwards(model), X, t, NOISE, snippet, Z)
    GOLDEN.check("v2plain/mse_loss", velocity_error)
    GOLDEN.check("v2plain/cos_loss", cosine)
    GOLDEN.check("v2plain/proj_loss", proj.mean())
    loss = (velocity_error + cosine + CONFIG["proj_coeff"] * proj).mean()
    GOLDEN.check("v2plain/total", loss)
    check_gradients("v2plain", loss, model)
    x_t, _ = interpolate(X, NOISE, t)
    GOLDEN.check("v2plain/x_t", x_t)
    GOLDEN.check("v2plain/pred", model(x_t, 1 - t, snippet)[0])
    GOLDEN.check("v2plain/eval_v_official", model(x_t, 1 - t, SNIPPET)[0])


@pytest.mark.parametrize("case", ["inactive", "active"])
def test_guidance(case):
    """One Euler step to t = 0 tells the guided velocity. The official interval counts time from noise to data."""
    x_t, _ = interpolate(X, NOISE, lognormal_time(-GOLDEN.input("v2/lognorm_normal")))
    t = 1 - CONFIG[f"cfg_t_{case}"]
    x = sample(velocity(backwards(official())), x_t, SNIPPET, torch.zeros_like(SNIPPET), times=[t, 0.0],
               cfg_scale=CONFIG["cfg_scale"], guidance_high=1 - CONFIG["cfg_interval_start"])
    GOLDEN.check(f"v2plain/cfg_{case}_v", -(x_t - x) / t)
    assert gmem.Config.guidance_high == pytest.approx(1 - CONFIG["cfg_interval_start"])


def integrate(**options):
    """The fixture's sampling problem by our sampler: final state, and the states and times at which the network ran."""
    network, calls = velocity(backwards(official())), []

    def recording(x, t, snippet):
        calls.append((x, t[0].item()))
        return network(x, t, snippet)
    x = sample(recording, NOISE, SNIPPET, torch.zeros_like(SNIPPET), **options)
    return x, calls


def test_sde_takes_half_the_calls_for_the_same_samples():
    times = [*np.linspace(1, CONFIG["sde_last_step"], CONFIG["sde_steps"]), 0.0]
    draws = GOLDEN.input("sample/sde_noise")
    x, calls = integrate(mode="sde", heun=True, times=times, randn=lambda *shape, draw=iter(draws): next(draw))
    GOLDEN.check("sample/sde_heun_final", x)
    kick = (2 * times[1] * (times[1] - times[2])) ** 0.5 * draws[1]  # the noise that the second step begins with
    GOLDEN.check("sample/sde_heun_first", calls[2][0] - kick)
    GOLDEN.check("sample/sde_network_calls_official", 2 * len(calls))


def test_ode_with_shifted_times():
    """The second version's other sampler: `sample` takes its times; our flags offer even steps only."""
    u, shift = torch.linspace(0, 1, 5, dtype=torch.float64), CONFIG["timestep_shift"]
    official_times = shift * u / (1 - (1 - shift) * u)
    GOLDEN.check("sample/ode_time_grid_official", official_times)
    x, calls = integrate(times=(1 - official_times).tolist())
    GOLDEN.check("sample/ode_euler_shift_final", x)
    GOLDEN.check("sample/ode_network_calls_official", len(calls))


def test_bank():
    full, rows = MemoryBank(dict(features=FEATURES)), GOLDEN.input("bank/idx")
    bank = full.compress(CONFIG["latent_dim"])
    for name in ("mean", "S"):
        GOLDEN.check(f"bank/{name}", bank.parts[name])
    for name in ("C", "M"):  # the signs of singular vectors are nobody's choice
        GOLDEN.check(f"bank/{name}_abs", bank.parts[name].abs())
    GOLDEN.check("bank/numbers_stored", sum(bank.parts[name].numel() for name in ("C", "M", "S", "mean")))
    GOLDEN.check("bank/full_get", full.get(rows))
    GOLDEN.check("bank/sampled_memory", F.normalize(full.get(rows), dim=-1))
    GOLDEN.check("bank/svd_get", bank.get(rows))
    everything = bank.get(torch.arange(len(FEATURES)))
    GOLDEN.check("bank/reconstruction", everything)
    GOLDEN.check("bank/relative_error", (everything - FEATURES).norm() / (FEATURES - bank.parts["mean"]).norm())
    new = coefficients(GOLDEN.input("bank/new_snippet"), bank.parts)
    GOLDEN.check("bank/svd_add_exact", new @ bank.parts["M"].T + bank.parts["mean"])


@pytest.mark.parametrize("kind", ["linear", "spherical"])
def test_mixtures(kind):
    a, b = GOLDEN.outputs["mix/a"], GOLDEN.outputs["mix/b"]
    mixed = [mix_snippets(a[None], b[None], alpha, kind) for alpha in np.linspace(0, 1, 5)]
    GOLDEN.check(f"mix/{kind}", torch.cat(mixed))


def test_every_output_of_the_fixture_was_compared():
    GOLDEN.checked |= {"mix/a", "mix/b"}  # inputs of the mixtures
    # LightningDiT, mixing by halves or by a mask, adding mixtures to a bank and choosing rows by the initial noise are
    # out of scope.
    GOLDEN.assert_all_checked(but=["v2lightning/", "mix/concat", "mix/mask", "add_interpolated", "v1/index_from_noise"])


def test_names_and_shapes_are_the_first_versions():
    with torch.device("meta"):
        model = MemorySiT(32, 4, 768, SIT_SIZES["SiT-XL/2"], 8, [768], 2048)
    assert state_shapes(model) == official_keys("gmem_v1_sit_xl_2")
    assert sum(p.numel() for p in model.parameters()) == 682_975_248


# ---------------------------------------------------------------------------------------------------------------------
# Properties
# ---------------------------------------------------------------------------------------------------------------------
def test_a_fresh_model():
    """It begins with zero velocity and Xavier's uniform weights where the snippet comes in, as the official one."""
    model = small_gmem()
    assert not model(X, GOLDEN.input("v1/t"), SNIPPET)[0].any() and not hasattr(model, "y_embedder")
    weight, bound = model.condition_projection.linear.weight, (6 / (24 + 32)) ** 0.5
    assert 0.95 * bound < weight.abs().max() <= bound + 1e-6 and not model.condition_projection.linear.bias.any()
    exact = model.embed(X, GOLDEN.input("v1/t"), SNIPPET)[1]
    with torch.autocast("cpu", torch.bfloat16):  # the conditioning stays in fp32, as the time's does
        assert torch.equal(model.embed(X, GOLDEN.input("v1/t"), SNIPPET)[1], exact)


def test_corruption():
    snippet = 1 + torch.rand(1000, 64, generator=torch.Generator().manual_seed(0))
    keep = torch.rand(1000, 64, generator=torch.Generator().manual_seed(1)) >= 0.4
    null = torch.arange(1000) % 4 == 0
    corrupted, unit = corrupt(snippet, keep, null, 0.4), F.normalize(snippet, dim=-1)
    assert not corrupted[null].any() and not corrupted[~keep].any()
    torch.testing.assert_close(corrupted[~null][keep[~null]], unit[~null][keep[~null]] / 0.6)
    assert (corrupted[~null].mean() / unit.mean()).item() == pytest.approx(1, abs=0.02)  # unbiased
    torch.testing.assert_close(corrupt(7 * snippet, keep, null, 0.4), corrupted)  # only the direction counts


def test_loss_terms():
    model = small_gmem()
    args = X, GOLDEN.input("v1/t"), NOISE, SNIPPET
    perfect = gmem_loss(lambda x_t, t, m: (2 * (NOISE - X), [3 * Z]), *args, Z)
    torch.testing.assert_close(perfect[0], (NOISE - X).square().mean(dim=(1, 2, 3)))
    torch.testing.assert_close(perfect[1:], (-torch.ones(4), torch.zeros(4)), rtol=0, atol=1e-6)  # directions only
    sizes = dict(hidden_size=32, depth=3, num_heads=4, patch_size=2)
    alone = gmem_loss(MemorySiT(8, 4, 24, sizes), *args, Z)  # no projector: the alignment is 0
    assert not alone[1].any() and alone[0].all()
    assert torch.equal(alone[0], gmem_loss(model, *args, Z)[0])  # both start at zero velocity


def test_equal_and_distant_snippets_can_be_mixed():
    """The official slerp of two equal snippets is the zero vector."""
    for kind in ("linear", "spherical"):
        torch.testing.assert_close(mix_snippets(SNIPPET, SNIPPET.clone(), 0.5, kind), SNIPPET)
    a, b = torch.eye(24)[:2].unsqueeze(1)
    angles = [mix_snippets(a, b, alpha, "spherical")[0, 1].asin() for alpha in (0.25, 0.5, 0.75)]
    torch.testing.assert_close(torch.stack(angles), torch.tensor([0.25, 0.5, 0.75]) * torch.pi / 2)
    assert mix_snippets(a, b, 0.25, "linear")[0, 1].asin() < angles[0] - 0.01


def test_compression_is_the_truncated_svd():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(9000, 24, generator=generator) * torch.linspace(3, 0.1, 24) + 5  # two blocks and a rest
    rows, labels = torch.arange(9000), torch.arange(9000) % 3
    full = MemoryBank(dict(features=features, labels=labels, data="d", teacher="t", width=24))
    error = [(full.compress(rank).get(rows) - features).norm().item() for rank in (1, 6, 23, 24, 99)]
    U, S, V = torch.linalg.svd(features.double() - features.double().mean(0), full_matrices=False)
    expected = [S[rank:].norm().item() for rank in (1, 6, 23)]
    assert error[:3] == pytest.approx(expected, rel=1e-4) and max(error[3:]) < 1e-5 * features.norm()
    half = full.compress(6)
    assert half.parts.keys() == {"C", "M", "S", "mean", "labels", "data", "teacher"}
    assert half.parts["C"].shape == (9000, 6) and half.parts["C"].dtype == torch.float32
    torch.testing.assert_close(half.compress(3).get(rows), full.compress(3).get(rows), rtol=0, atol=1e-3)


def test_draws():
    labels = torch.arange(1000) % 4
    bank = MemoryBank(dict(features=torch.zeros(1000, 3), labels=labels))
    rows = bank.draw(4000, None, seed=0)
    assert rows.shape == (4000, 2) and rows.min() < 5 and rows.max() > 994
    assert (rows[:, 0].bincount(minlength=1000) == rows[:, 1].bincount(minlength=1000)).float().mean() < 0.5
    assert torch.equal(rows[:7], bank.draw(7, None, seed=0)) and not torch.equal(rows, bank.draw(4000, None, seed=1))
    rows = bank.draw(2000, [3, 1], seed=0)
    assert torch.equal(labels[rows], torch.tensor([[3, 3], [1, 1]]).repeat(1000, 1))
    assert len(rows.unique()) > 490  # of 500
    with pytest.raises(SystemExit, match="--labels 1 9: not all are among the bank's, 0 to 3"):
        bank.draw(4, [1, 9], seed=0)
    with pytest.raises(SystemExit, match="it has no labels"):
        MemoryBank(dict(features=torch.zeros(5, 3))).draw(4, [0], seed=0)


def test_recipes():
    for size, depth in [("B", 4), ("XL", 8)]:
        cfg = parse(["--model", f"SiT-{size}/2"])
        assert (cfg.encoder_depth, cfg.proj_coeff, cfg.mem_dropout, cfg.mem_null_prob) == (depth, 0.5, 0.4, 0)
        assert (cfg.batch_size, cfg.learning_rate, cfg.ema_decay, cfg.weighting) == (256, 1e-4, 0.9999, "uniform")
        assert (cfg.mode, cfg.heun, cfg.num_steps, cfg.cfg_scale, cfg.cosine_coeff) == ("sde", True, 50, 1, 0)


# ---------------------------------------------------------------------------------------------------------------------
# A run: what the network is given, the bank it leaves, what it is sampled from
# ---------------------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def home(tmp_path_factory):
    torch.set_num_threads(1)
    return tmp_path_factory.mktemp("gmem")


@pytest.fixture(scope="module")
def data(home):
    data = make_data(home / "data")
    make_data(data / "val", teacher=False)
    np.save(data / "val/images.npy", 255 - np.load(data / "images.npy"))
    return data


@pytest.fixture(scope="module")
def trained(data, home):
    """A run of six steps, from which the bank in data/ comes, and its calls of teacher and loss at the last step."""
    notes, loss = SimpleNamespace(teacher=[], loss=[]), gmem.gmem_loss
    forward = Teacher.forward

    def seeing(self, images):
        notes.teacher.append((images, forward(self, images)))
        return notes.teacher[-1][1]

    def losing(*args):
        notes.loss.append(args)
        return loss(*args)
    with mock.patch.object(Teacher, "forward", seeing), mock.patch.object(gmem, "gmem_loss", losing):
        gmem.main(command(data, home / "run", 6, "--mem-null-prob", 0.5))
    return SimpleNamespace(ckpt=home / "run/last.pt", notes=notes)


def sampled(trained, out, *more):
    """The samples of a run, and the path of their file."""
    gmem.main(["--ckpt", str(trained.ckpt), "--out", str(out), "--sample", "6", "--num-steps", "2",
               *map(str, more)])
    [path] = out.glob("samples*.npz")
    with np.load(path) as file:
        return SimpleNamespace(path=path, **file)


def test_one_forward_of_the_teacher_gives_snippet_and_tokens(trained):
    """One for the bank of 100 images, then one a step."""
    [(images, _), *steps] = trained.notes.teacher
    assert len(images) == 100 and len(steps) == len(trained.notes.loss) == 6
    zeroed, nulls = [], 0
    for (images, (tokens, patches)), (_, x, _, _, snippet, z, _) in zip(steps, trained.notes.loss):
        assert torch.equal(z, patches) and torch.equal(x, images.permute(0, 3, 1, 2) / 127.5 - 1)
        null = ~snippet.any(dim=1)
        kept = snippet[~null] != 0
        torch.testing.assert_close(snippet[~null], F.normalize(tokens[~null], dim=-1) * kept / 0.6)
        zeroed, nulls = [*zeroed, 1 - kept.float().mean()], nulls + null.sum().item()
    assert 0.3 < sum(zeroed) / 6 < 0.5 and 15 < nulls < 33  # of 48


def test_the_bank_of_a_run(data, trained):
    saved = torch.load(data / "bank-prepared.pt", weights_only=True)
    assert saved.keys() == {"features", "labels", "data", "teacher", "width"}
    assert torch.equal(saved["labels"], torch.from_numpy(np.load(data / "labels.npy")))
    cfg = parse(command(data, "unused", 1))
    [teacher] = load_teachers(cfg, SimpleNamespace(device="cpu"))
    expected = teacher(torch.from_numpy(np.load(data / "images.npy")))[0]
    torch.testing.assert_close(saved["features"], expected, rtol=1e-4, atol=1e-5)
    assert saved["teacher"] == gmem.identify_teacher(teacher) == torch.load(trained.ckpt, weights_only=True)["data"]["teacher"]
    assert saved["features"].norm(dim=1).min() > 2  # stored raw


def test_two_ranks_build_the_bank_of_one(data, trained, home):
    """Also a held-out one by sampling, compressed; and what they draw from it is what one rank draws."""
    alone = sampled(trained, home / "alone", "--bank-path", data / "val", "--bank-rank", 3)
    other = home / "other"
    for name in ("data", "run"):
        shutil.copytree(home / name, other / name)
    for bank in (*other.glob("data/bank*"), *other.glob("data/val/bank*")):
        bank.unlink()
    jobs = dict(train=dict(script="gmem", args=command(other / "data", other / "run2", 1)),
                sample=dict(script="gmem", args=["--ckpt", str(other / "run/last.pt"), "--out", str(other / "samples"),
                                                 "--sample", "6", "--num-steps", "2", "--bank-path",
                                                 str(other / "data/val"), "--bank-rank", "3"]))
    (other / "jobs.json").write_text(json.dumps(jobs))
    code, _, stderr = finish(start([*TORCHRUN, "tests/two_ranks.py", other], cwd=gmem.__file__.rpartition("/")[0]))
    assert code == 0, stderr
    for name in ("bank-prepared.pt", "val/bank-prepared.pt", "val/bank-prepared-rank3.pt"):
        pairs = [torch.load(folder / "data" / name, weights_only=True) for folder in (home, other)]
        assert pairs[0].keys() == pairs[1].keys()
        for key, value in pairs[0].items():
            if isinstance(value, torch.Tensor):
                torch.testing.assert_close(value, pairs[1][key], rtol=1e-3, atol=1e-4)
            else:
                assert value == pairs[1][key]
    together = np.load(other / "samples" / alone.path.name)
    assert np.array_equal(together["rows"], alone.rows)
    assert np.abs(together["arr_0"].astype(int) - alone.arr_0).max() <= 1


def test_samples_name_their_bank_and_their_images(data, trained, home, capsys):
    asked = []

    def recording(model, noise, y, y_null, **options):
        asked.append((y, y_null, options))
        return noise
    with mock.patch.object(gmem, "sample", recording):
        plain = sampled(trained, home / "plain", "--labels", 2, 0)
        held = sampled(trained, home / "held", "--bank-path", data / "val", "--mode", "sde", "--heun")
        low = sampled(trained, home / "low", "--bank-rank", 4, "--mode", "sde", "--no-heun")
        mixed = sampled(trained, home / "mixed", "--mix", "spherical", "--mix-alpha", 0.25, "--cfg-scale", 2)
    assert [s.path.name for s in (plain, held, low, mixed)] == [
        "samples-data.npz", "samples-val.npz", "samples-data-rank4.npz", "samples-data-spherical0.25-cfg2.npz"]
    assert "each conditioned on the features of one of the 100 real images of val" in capsys.readouterr().out
    labels, banks = np.load(data / "labels.npy"), {}
    for name in ("bank-prepared", "bank-prepared-rank4", "val/bank-prepared"):
        banks[name] = MemoryBank(torch.load(data / f"{name}.pt", weights_only=True))
    assert banks["bank-prepared-rank4"].parts["C"].shape == (100, 4)
    assert plain.labels.tolist() == [2, 0] * 3
    for file in (plain, held, low, mixed):
        assert file.rows.shape == (6, 2) and np.array_equal(labels[file.rows[:, 0]], file.labels)
    assert not np.array_equal(held.labels, [2, 0] * 3) and np.array_equal(held.rows, mixed.rows)

    def unit(name, rows):
        return F.normalize(banks[name].get(torch.from_numpy(rows)), dim=-1)
    for (y, y_null, _), expected in zip(asked, [
            unit("bank-prepared", plain.rows[:, 0]), unit("val/bank-prepared", held.rows[:, 0]),
            unit("bank-prepared-rank4", low.rows[:, 0]),
            mix_snippets(*unit("bank-prepared", mixed.rows).unbind(1), 0.25, "spherical")]):
        torch.testing.assert_close(y, expected)
        assert y_null.shape == y.shape and not y_null.any()
    assert [options["times"] for *_, options in asked] == [None, pytest.approx([1, 0.004, 0]), None, None]


def test_an_official_checkpoint_samples_from_its_own_bank(home, data, trained):
    """The first version's file holds network, bank and frequencies; the second's bank is a plain tensor."""
    weights = torch.load(trained.ckpt, weights_only=True)["ema"]
    bank = torch.randn(12, 32, generator=torch.Generator().manual_seed(0))
    torch.save(dict(network=weights, memorybank=bank, memoryfreq=torch.ones(12)), home / "official.pt")
    torch.save(bank, home / "tensor.pt")
    files = []
    with mock.patch.object(gmem, "SD_VAE_META", dict(vae=None)):
        for path in ("official.pt", "tensor.pt"):
            files.append(sampled(SimpleNamespace(ckpt=home / "official.pt"), home / f"from-{path}", "--bank-path",
                                 home / path))
    assert np.array_equal(files[0].arr_0, files[1].arr_0)
    assert files[0].labels.tolist() == [-1] * 6 and files[0].rows.max() < 12 and files[0].arr_0.std() > 1


def test_without_the_alignment_the_teacher_still_gives_snippets(data, tmp_path):
    gmem.main(command(data, tmp_path / "run", 2, "--proj-coeff", 0, "--cosine-coeff", 1))
    saved = torch.load(tmp_path / "run/last.pt", weights_only=True)
    assert not any(name.startswith("projectors") for name in saved["model"])
    line = json.loads((tmp_path / "run/log.jsonl").read_text().splitlines()[-1])
    assert line["loss_proj"] == 0 and line["loss_cosine"] > 0.5
    assert line["loss"] == pytest.approx(line["loss_velocity"] + line["loss_cosine"], rel=1e-4)
    repa.main(command(data, tmp_path / "repa", 2))  # and a run may begin with another method's weights
    gmem.main(command(data, tmp_path / "begun", 2, "--init", tmp_path / "repa/last.pt"))


# ---------------------------------------------------------------------------------------------------------------------
# Mistakes
# ---------------------------------------------------------------------------------------------------------------------
def retrain_teacher(data):
    saved = torch.load(data / "teacher.pt", weights_only=True)
    saved["model"]["norm.weight"] *= 2
    torch.save(saved, data / "teacher.pt")


def test_banks_that_do_not_fit_are_refused(data, trained, home, tmp_path):
    def copy(name):
        return shutil.copytree(data, tmp_path / name)

    def refused(arguments, match):
        with pytest.raises(SystemExit, match=match) as stop:
            gmem.main(list(map(str, arguments)))
        assert len(str(stop.value).splitlines()) == 1 and str(stop.value).startswith("error: ")

    def sampling(bank, *more):
        return ["--ckpt", trained.ckpt, "--out", tmp_path / "out", "--sample", 2, "--num-steps", 1, "--bank-path", bank,
                *more]
    other = copy("other-images")
    np.save(other / "images.npy", np.load(data / "images.npy")[::-1])
    refused(command(other, tmp_path / "a", 2), "bank .* has the data .*, and .* is needed: delete it")
    refused(sampling(other), "bank .* has the data")
    other = copy("other-teacher")
    retrain_teacher(other)
    refused(command(other, tmp_path / "b", 2), "bank .* has the teacher 'prepared .*', and 'prepared .*' is needed")
    (other / "bank-prepared.pt").unlink()
    gmem.main(command(other, tmp_path / "c", 1))  # made anew
    refused(sampling(other), "bank .* has the teacher")  # but this is not the teacher that the model learned with
    refused(sampling(other / "bank-prepared.pt"), "bank .* has the teacher")
    torch.save(torch.randn(5, 7), tmp_path / "narrow.pt")
    refused(sampling(tmp_path / "narrow.pt"), "bank .* has the width 7, and 32 is needed")
    torch.save(dict(model={}), tmp_path / "none.pt")
    refused(sampling(tmp_path / "none.pt"), "there are neither features nor C, M, S and mean")
    refused(sampling(tmp_path / "missing"), "no prepared data in")
    refused(sampling(data, "--labels", 1, 9), "--labels 1 9: not all are among the bank's")
    refused(sampling(data, "--enc-type", "dinov2-vit-b"), "was trained as prepared: add --enc-type prepared")
    repa.main(command(data, tmp_path / "repa", 1))
    refused([*sampling(data), "--ckpt", tmp_path / "repa/last.pt"], "has no memory")


@pytest.mark.parametrize("flags, message", [
    (["--mem-dropout", "1"], "--mem-dropout 1.0 must lie between 0 and 0.99"),
    (["--mem-null-prob", "2"], "--mem-null-prob 2.0 must lie between 0 and 1"),
    (["--bank-rank", "-1"], "--bank-rank -1 must lie between 0"), (["--mix", "concat"], "invalid choice: 'concat'"),
    (["--mix-alpha", "1.5"], "--mix-alpha 1.5 must lie between 0 and 1"),
    (["--cosine-coeff", "-1"], "--cosine-coeff -1.0 must lie between 0")])
def test_flags(flags, message):
    with pytest.raises(SystemExit, match=message):
        parse(flags)

"""ERW against the official code (as far as that can be made to run), its two phases, exact resume, CKNNA, sampling."""
import json
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import common
import erw
import repa
from golden_utils import Fixture
from support.dataset import image_randn
from support.teachers import Teacher, load_teacher
from support.vae import pixels_to_uint8
from test_training import (  # noqa: F401
    as_a_fresh_process,
    assert_same_images,
    assert_same_run,
    command,
    copy_run,
    last,
    log_lines,
    make_data,
    steps_logged,
    tensors_of,
)

GOLDEN = Fixture("erw")
CONFIG, WEIGHTS = GOLDEN.config, GOLDEN.config["weights"]
DROPPED = GOLDEN.input("label_drop_uniform") < CONFIG["class_dropout_prob"]
X, NOISE, T, Y, ZS = (GOLDEN.input(name) for name in ("x", "noise", "t", "y", "zs"))
Y_TRAIN = Y.masked_fill(DROPPED, CONFIG["num_classes"])
SIZES = {name: CONFIG[name] for name in ("hidden_size", "depth", "num_heads", "patch_size")}


def filled(use_rope="never"):
    """The fixture's model after the transfer: phase I's weights where it has any, else those of a fresh full model."""
    model = erw.ERWSiT(CONFIG["input_size"], CONFIG["in_channels"], CONFIG["num_classes"], SIZES,
                       CONFIG["encoder_depth"], [CONFIG["z_dim"]], CONFIG["projector_dim"], CONFIG["l2r_depth"],
                       use_rope)
    state = {key: value if key == "pos_embed" else GOLDEN.weight(
        f"warmup/{key}" if f"warmup/{key}" in WEIGHTS else f"full_init/{key}", value.shape)
        for key, value in model.state_dict().items()}
    model.load_state_dict(state)
    return model


def check_gradients(model, prefix, names):
    parameters = dict(model.named_parameters())
    for name in CONFIG[names]:
        GOLDEN.check(prefix + name, parameters[name].grad)
    model.zero_grad()


# ---------------------------------------------------------------------------------------------------------------------
# Against the official code
# ---------------------------------------------------------------------------------------------------------------------
def test_phase_1():
    GOLDEN.check("label_dropped", DROPPED)
    model, zero = filled(), torch.zeros_like(T)
    GOLDEN.check("warmup/eval_zs_tilde", model(X, zero, Y, phase=1)[1][0])
    v, (z_hat,) = model(X, zero, Y_TRAIN, phase=1)
    assert v is None
    GOLDEN.check("warmup/train_zs_tilde", z_hat)
    velocity, proj = erw.erw_loss(model, X, T, NOISE, Y_TRAIN, [ZS], phase=1)
    assert velocity.tolist() == [0, 0, 0, 0]
    GOLDEN.check("warmup/intended_proj_loss", proj.mean())
    GOLDEN.check("warmup/intended_total", erw.WARMUP_COEFF * proj.mean())
    (erw.WARMUP_COEFF * proj.mean()).backward(retain_graph=True)
    check_gradients(model, "warmup/intended_grad/", "grad1")

    released = proj[-1] / len(proj)  # its bug: the mean of a batch holds the last image alone
    GOLDEN.check("warmup/released_proj_loss", released)
    (erw.WARMUP_COEFF * released).backward()
    check_gradients(model, "warmup/released_grad/", "grad1")


def test_the_transfer_keeps_what_phase_1_trains():
    model = filled()
    erw.erw_loss(model, X, T, NOISE, Y, [ZS], phase=1)[1].mean().backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None} | {"pos_embed"}
    names = model.state_dict().keys()
    GOLDEN.check("transfer/copied_keys", sorted(trained))
    GOLDEN.check("transfer/missing_keys", sorted(names - trained))
    GOLDEN.check("transfer/unexpected_keys", sorted(trained - names))
    merged = [value.double() for name, value in model.state_dict().items() if name != "pos_embed"]
    GOLDEN.check("transfer/checksum", sum(value.sum() for value in merged))
    GOLDEN.check("transfer/checksum_abs", sum(value.abs().sum() for value in merged))


def released_config(model):
    return erw.parse_config(["--model", model, "--recipe", "released"])


@pytest.mark.parametrize("name, use_rope", [("full", "never"), ("fullrope", "phase2"), ("fullrope", "always")])
def test_phase_2(name, use_rope):
    model, cfg = filled(use_rope), released_config(CONFIG["schedule_model"])
    x_t, target = common.interpolate(X, NOISE, T, CONFIG["path_type"])
    v, (z_hat,) = model(x_t, T, Y)
    if name == "full":
        GOLDEN.check("full/x_t", x_t)
        GOLDEN.check("full/target", target)
    GOLDEN.check(f"{name}/eval_v", v)
    GOLDEN.check(f"{name}/eval_zs_tilde", z_hat)
    assert torch.equal(model.velocity(x_t, T, Y), v)
    velocity, proj = erw.erw_loss(model, X, T, NOISE, Y_TRAIN, [ZS])
    GOLDEN.check(f"{name}/denoising_loss", velocity)
    GOLDEN.check(f"{name}/proj_loss", proj.mean())

    def total(step):
        return velocity.mean() + erw.decayed_coeff(cfg, step) * proj.mean()
    GOLDEN.check(f"{name}/total_at_steps", torch.stack([total(step) for step in CONFIG["loss_steps"]]))
    total(CONFIG["grad_step"]).backward()
    check_gradients(model, f"{name}/grad/", "grad2")


@pytest.mark.parametrize("model", ["SiT-XL/2", "SiT-L/2", "SiT-B/2", "SiT-S/2"])
def test_schedule(model):
    cfg = released_config(model)
    assert (cfg.warmup_steps, cfg.proj_decay_half_life) == (CONFIG["warmup_steps"], 50_000)
    steps = [min(step, CONFIG["max_train_steps"]) for step in CONFIG["schedule_steps"]]  # where training ends
    GOLDEN.check(f"schedule/{model}", torch.tensor([erw.decayed_coeff(cfg, k) for k in steps], dtype=torch.float64))


def released_cknna(a, b, k, unbiased):
    """ERW's tool: one joint mask for all three terms, so that unrelated features are compared where both are alike."""
    kernels, n = [x @ x.T for x in (F.normalize(x, dim=1) for x in (a, b))], len(a)
    nearest = [kernel.clone().fill_diagonal_(-torch.inf).topk(k, dim=1).indices for kernel in kernels]
    mask = torch.stack([torch.zeros(n, n).scatter_(1, indices, 1.0) for indices in nearest]).prod(0)
    centre = torch.eye(n) - 1 / n

    def hsic(p, q):
        if not unbiased:
            return torch.trace(p @ centre @ q @ centre) / n ** 2
        cross = p.sum() * q.sum() / ((n - 1) * (n - 2)) - 2 * (p @ q.T).sum() / (n - 2)
        return ((p * q).sum() + cross) / (n * (n - 3))
    p, q = (mask * kernel for kernel in kernels)
    return hsic(p, q) / (hsic(p, p) * hsic(q, q) + 1e-10).sqrt()


def test_cknna_is_the_reference_and_the_released_one_is_meaningless():
    a, c = GOLDEN.input("cknna/a"), GOLDEN.input("cknna/c")
    b = a[:, :6] @ GOLDEN.input("cknna/mix") + 0.7 * GOLDEN.input("cknna/b_noise")
    b = torch.cat([b, GOLDEN.input("cknna/b_extra")], dim=1)
    for name, other in (("aa", a), ("ab", b), ("ac", c)):
        for k in CONFIG["cknna_k"]:
            GOLDEN.check(f"cknna/platonic_{name}_k{k}_unbiased", erw.cknna(a, other, k))
            for kind in ("biased", "unbiased"):
                GOLDEN.check(f"cknna/erw_{name}_k{k}_{kind}", released_cknna(a, other, k, kind == "unbiased"))

    generator = torch.Generator().manual_seed(0)
    pairs = [(torch.randn(48, 14, generator=generator), torch.randn(48, 12, generator=generator)) for _ in range(20)]
    released = torch.tensor([released_cknna(*pair, 5, True) for pair in pairs]).mean()
    reference = torch.tensor([erw.cknna(*pair, 5) for pair in pairs]).mean()
    assert released > 0.9 and reference < 0.15  # of features that have nothing to do with each other


def test_cknna_knows_directions_only():
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(200, 12, generator=generator), torch.randn(200, 20, generator=generator)
    b[:, :12] += a
    turned = a @ torch.linalg.qr(torch.randn(12, 12, generator=generator))[0] * torch.rand(200, 1, generator=generator)
    value = erw.cknna(a, b)
    assert erw.cknna(a, turned) > 0.999
    assert 0.1 < value < 0.9 and erw.cknna(turned, b) == pytest.approx(value, abs=1e-5)
    assert erw.cknna(b, a) == pytest.approx(value, abs=1e-3)  # the masks are not symmetric, so it is not exact
    assert abs(erw.cknna(a, b.roll(1, 0))) < 0.05


def test_every_output_of_the_fixture_was_compared():
    # The biased reference, in which every image is its own neighbour, is not offered.
    GOLDEN.assert_all_checked(but=[f"platonic_{pair}_k{k}_biased" for pair in ("aa", "ab", "ac") for k in (5, 10)])


# ---------------------------------------------------------------------------------------------------------------------
# The loss and the schedule
# ---------------------------------------------------------------------------------------------------------------------
def test_rope_in_both_phases_or_one():
    never, always, phase2 = (filled(use_rope) for use_rope in ("never", "always", "phase2"))

    def output(model, phase):
        return model(X, T, Y, phase)[1][0]
    assert torch.equal(output(phase2, 1), output(never, 1)) and torch.equal(output(phase2, 2), output(always, 2))
    for phase in (1, 2):
        assert (output(always, phase) - output(never, phase)).norm() > 0.1 * output(never, phase).norm()


@pytest.mark.parametrize("path", ["linear", "cosine"])
def test_phase_1_sees_the_clean_input_and_no_later_block(path):
    model, generator = filled(), torch.Generator().manual_seed(0)
    expected = erw.erw_loss(model, X, T, NOISE, Y, [ZS], path, phase=1)[1]
    for part in (*model.blocks[CONFIG["l2r_depth"]:], model.final_layer):
        for p in part.parameters():
            p.data.normal_(generator=generator)
    again = erw.erw_loss(model, X, T.flip(0), NOISE.flip(0), Y, [ZS], path, phase=1)[1]
    assert torch.equal(again, expected)
    cosine = F.cosine_similarity(model(X, torch.zeros(4), Y, phase=1)[1][0], ZS, dim=-1).mean(dim=1)
    torch.testing.assert_close(expected, -cosine)


def test_rope_turns_by_the_difference_of_places():
    rope, generator = erw.rope_2d(4, 24), torch.Generator().manual_seed(0)
    q, k = (torch.randn(24, generator=generator).expand(1, 1, 16, 24) for _ in range(2))
    scores = (common.rotate(q, rope) @ common.rotate(k, rope).mT).view(4, 4, 4, 4)  # (row, column) of q, of k
    torch.testing.assert_close(scores[1:, :, 1:], scores[:-1, :, :-1])
    torch.testing.assert_close(scores[:, 1:, :, 1:], scores[:, :-1, :, :-1])
    here, below, right = scores[0, 0, 0, 0], scores[0, 0, 1, 0], scores[0, 0, 0, 1]
    assert (below - here).abs() > 0.1 and (right - below).abs() > 0.1


def test_the_coefficient_halves_or_stays():
    cfg = erw.parse_config(["--warmup-steps", "10", "--proj-decay-half-life", "4", "--proj-coeff", "2"])
    assert [erw.decayed_coeff(cfg, k) for k in (10, 14, 18)] == [2, 1, 0.5]
    cfg = erw.parse_config(["--proj-decay-half-life", "inf"])
    assert erw.decayed_coeff(cfg, 10 ** 6) == cfg.proj_coeff


# ---------------------------------------------------------------------------------------------------------------------
# Runs
# ---------------------------------------------------------------------------------------------------------------------
WARMUP, STEPS = 4, 8
FLAGS = ["--warmup-steps", WARMUP, "--proj-decay-half-life", 3, "--l2r-depth", 1, "--use-rope", "phase2"]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    torch.set_num_threads(1)  # a module's fixtures come before a test's
    return tmp_path_factory.mktemp("erw")


@pytest.fixture(scope="module")
def data(home):
    return make_data(home / "data")


@pytest.fixture(scope="module")
def unbroken(data, home):
    erw.main(command(data, home / "unbroken", STEPS, *FLAGS))
    return home / "unbroken"


@pytest.mark.parametrize("steps, phase", [(2, 1), (WARMUP, 1), (WARMUP + 1, 2), (6, 2)])
def test_a_run_goes_on_from_any_step_of_either_phase(data, tmp_path, unbroken, steps, phase):
    erw.main(command(data, tmp_path / "run", steps, *FLAGS))
    assert last(tmp_path / "run")["phase"] == phase
    erw.main(command(data, tmp_path / "run", STEPS, *FLAGS))
    assert_same_run(tmp_path / "run", unbroken)


def test_what_each_phase_trains_and_what_the_switch_keeps(data, tmp_path, monkeypatch):
    saved, frozen = {}, {}

    def record(cfg, name, step, meta, **parts):
        state = {part: parts[part].state_dict() for part in ("model", "ema", "optimizer")}
        names = [name for name, p in parts["model"].named_parameters() if name != "pos_embed"]
        frozen[step] = {name for name, p in parts["model"].named_parameters() if not p.requires_grad}
        saved[step] = ({part: {key: value.clone() for key, value in state[part].items()} for part in ("model", "ema")},
                       {names[i]: moments["step"].item() for i, moments in state["optimizer"]["state"].items()})
    monkeypatch.setattr(erw, "save_run", record)
    erw.main([*command(data, tmp_path / "run", 6, *FLAGS), "--save-every", "1"])
    models, steps = {step: parts["model"] for step, (parts, _) in saved.items()}, {s: n for s, (_, n) in saved.items()}
    emas = {step: parts["ema"] for step, (parts, _) in saved.items()}
    resting = {name for name in models[1] if re.match(r"blocks\.[123]\.|final_layer\.", name)}
    trained = models[1].keys() - resting - {"pos_embed"}
    assert frozen[WARMUP] == resting | {"pos_embed"} and frozen[WARMUP + 1] == {"pos_embed"}  # DDP waits for no other
    for name in resting | {"pos_embed"}:  # phase I leaves them as they were
        assert torch.equal(models[WARMUP][name], models[1][name]), name
    assert all(not torch.equal(models[WARMUP][name], models[1][name]) for name in trained)
    assert steps[WARMUP] == {name: WARMUP for name in trained}  # the optimiser's own count

    before, after = models[WARMUP], models[WARMUP + 1]
    assert steps[WARMUP + 1] == {name: 1 for name in trained | resting}  # it begins anew
    for name in trained | resting:  # but the weights go on: one step of AdamW moves no weight by more than lr
        assert (after[name] - before[name]).abs().max() <= 4e-3 * 1.001, name
    average = {name: 0.9 * before[name] + 0.1 * after[name] for name in after}  # not of phase I's average
    torch.testing.assert_close(emas[WARMUP + 1], average)
    assert (emas[WARMUP]["x_embedder.proj.weight"] - before["x_embedder.proj.weight"]).abs().max() > 1e-3


def test_the_log_of_both_phases(unbroken, data, tmp_path):
    lines = log_lines(unbroken)
    assert [line["loss_velocity"] == 0 for line in lines] == [True] * WARMUP + [False] * (STEPS - WARMUP)
    weights = [0.5] * WARMUP + [0.5 * 2 ** (-i / 3) for i in range(STEPS - WARMUP)]
    assert [line["proj_coeff"] for line in lines] == pytest.approx(weights, rel=1e-5)
    for line in lines:
        assert line["loss"] == pytest.approx(line["loss_velocity"] + line["proj_coeff"] * line["loss_proj"], abs=1e-5)
    erw.main([*command(data, tmp_path / "run", STEPS, *FLAGS), "--log-every", "3"])
    assert steps_logged(tmp_path / "run") == [3, WARMUP, 6, STEPS]  # no line mixes the phases


def test_without_phase_1_and_decay_it_is_repa(data, tmp_path):
    erw.main(command(data, tmp_path / "erw", 4, "--warmup-steps", 0, "--proj-decay-half-life", "inf"))
    repa.main(command(data, tmp_path / "repa", 4))
    ours, theirs = (tensors_of(last(tmp_path / name)) for name in ("erw", "repa"))
    assert ours.keys() == theirs.keys() and [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


def test_the_baseline_has_no_teacher(tmp_path):
    data = make_data(tmp_path / "data", teacher=False)
    erw.main(command(data, tmp_path / "run", 2, "--warmup-steps", 0, "--proj-coeff", 0))
    assert not [name for name in tensors_of(last(tmp_path / "run")) if "projector" in name]
    with pytest.raises(SystemExit, match="teacher.pt"):  # which phase I needs
        erw.main(command(data, tmp_path / "warmed", 2, "--proj-coeff", 0))


def test_warming_up_alone_needs_no_alignment_later(data, tmp_path):
    erw.main(command(data, tmp_path / "run", 4, "--warmup-steps", 2, "--proj-coeff", 0))
    assert [line["proj_coeff"] for line in log_lines(tmp_path / "run")] == [0.5, 0.5, 0, 0]


def test_compiled_blocks_share_one_graph_in_both_phases(data, tmp_path, monkeypatch):
    import torch._dynamo
    from torch._dynamo.testing import CompileCounterWithBackend
    counter, compile_module = CompileCounterWithBackend("eager"), torch.nn.Module.compile
    torch._dynamo.reset()
    monkeypatch.setattr(common.SiTBlock, "compile", lambda block, dynamic: compile_module(block, backend=counter))
    monkeypatch.setattr(Teacher, "compile", lambda teacher: None)
    flags = ["--warmup-steps", 2, "--use-rope", "always"]
    erw.main(command(data, tmp_path / "compiled", 4, *flags, "--compile"))
    torch._dynamo.reset()
    erw.main(command(data, tmp_path / "eager", 4, *flags))
    assert counter.frame_count == 1
    losses = [[line["loss"] for line in log_lines(tmp_path / name)] for name in ("compiled", "eager")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_the_cost_is_told_twice(tmp_path, capsys):
    cfg = erw.parse_config(["--out", str(tmp_path), "--warmup-steps", "100", "--max-train-steps", "400"])
    rates = [(50, 400), (100, 40), (150, 99), (200, 100), (250, 100), (300, 1), (400, 98)]  # some are disturbed
    lines = [dict(step=step, images_per_s=rate) for step, rate in [(40, 400), *rates]]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    erw.report_cost(cfg)
    out = capsys.readouterr().out
    assert "300 full steps" in out and "325 full-step equivalents" in out and "at 0.25 of a full one" in out
    cfg.warmup_steps = 0
    erw.report_cost(cfg)
    assert capsys.readouterr().out == ""


# ---------------------------------------------------------------------------------------------------------------------
# Recipes, wrong flags
# ---------------------------------------------------------------------------------------------------------------------
def configured(monkeypatch, *flags):
    """The configuration with which main begins."""
    class Stop(Exception):
        pass

    def stop(cfg):
        raise Stop(cfg)
    monkeypatch.setattr(erw, "setup", stop)
    with pytest.raises(Stop) as stopped:
        erw.main(list(flags))
    return stopped.value.args[0]


def test_recipes(monkeypatch):
    names = ("warmup_steps", "max_train_steps", "l2r_depth", "encoder_depth", "proj_coeff", "use_rope")

    def values(*flags):
        cfg = configured(monkeypatch, *flags)
        return tuple(getattr(cfg, name) for name in names)
    assert values("--model", "SiT-XL/2") == (100_000, 200_000, 5, 18, 0.5, "never")
    assert values("--model", "SiT-XL/2", "--recipe", "released") == (100_000, 300_000, 4, 14, 6, "phase2")
    assert values("--model", "SiT-L/2", "--recipe", "released")[4] == 3
    assert values("--model", "SiT-B/2") == (100_000, 200_000, 8, 8, 0.5, "never")
    assert values("--recipe", "released")[3:] == (2, 1, "phase2")
    mine = values("--use-rope", "always", "--model", "SiT-XL/2", "--recipe", "released", "--encoder-depth", "8")
    assert mine == (100_000, 300_000, 4, 8, 6, "always")  # the user's flags win


@pytest.mark.parametrize("flags, message", [
    (["--l2r-depth", "9"], "--l2r-depth 9 is not among the 4 blocks of toy"),
    (["--encoder-depth", "0"], "--encoder-depth 0 is not among the 4 blocks of toy"),
    (["--proj-decay-half-life", "0"], "--proj-decay-half-life 0.0 must lie between 1 and inf"),
    (["--warmup-steps", "-1"], "--warmup-steps -1 must lie between 0"),
    (["--use-rope"], "--use-rope"),
    (["--recipe", "v2"], "--recipe"),
    (["--probe", "50"], "--probe needs --ckpt FILE"),
])
def test_wrong_flags_get_one_line(data, tmp_path, flags, message):
    with pytest.raises(SystemExit) as stop:
        erw.main([*command(data, tmp_path / "run", 2), *flags])
    text = str(stop.value)
    assert text.startswith("error: ") and message in text and len(text.splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_another_warmup_is_another_run(data, tmp_path, unbroken):
    out = copy_run(unbroken, tmp_path / "run")
    with pytest.raises(SystemExit, match="holds another run .*warmup_steps 4, now 5"):
        erw.main(command(data, out, 20, *FLAGS, "--warmup-steps", 5))


# ---------------------------------------------------------------------------------------------------------------------
# Sampling and the probe
# ---------------------------------------------------------------------------------------------------------------------
def random_model(use_rope):
    model, generator = erw.ERWSiT(16, 3, 4, common.SIT_SIZES["toy"], 2, [32], 8, 2, use_rope), torch.Generator()
    generator.manual_seed(0)
    for p in model.parameters():
        if p.requires_grad:
            p.data = 0.2 * torch.randn(p.shape, generator=generator)
    return model


def save_as_run(path, model, data, **config):
    meta = json.loads((data / "meta.json").read_text())
    torch.save(dict(ema=model.state_dict(), data=meta, phase=2, step=1, config=dict(model="toy", **config)), path)
    return path


def images_of(ckpt, out, *more):
    erw.main(["--sample", "6", "--batch-size", "6", "--num-steps", "3", "--labels", "1", "3", "--ckpt", str(ckpt),
              "--out", str(out), *more])
    return np.load(out / "samples.npz")


@pytest.mark.parametrize("use_rope", ["always", "phase2"])
def test_samples_have_the_rope_they_were_trained_with(data, tmp_path, use_rope):
    model = random_model(use_rope)
    turned = images_of(save_as_run(tmp_path / "a.pt", model, data, use_rope=use_rope), tmp_path / "a")
    plain = images_of(save_as_run(tmp_path / "b.pt", model, data, use_rope="never"), tmp_path / "b")
    assert np.abs(turned["arr_0"].astype(int) - plain["arr_0"]).mean() > 1
    y = torch.tensor([1, 3, 1, 3, 1, 3])
    x = common.sample(model.velocity, image_randn(0, range(6), "cpu")(3, 16, 16), y, y, num_steps=3)
    assert_same_images(turned, dict(labels=y.numpy(), arr_0=pixels_to_uint8(x).numpy()))


def test_samples_of_other_programs_files(data, tmp_path):
    """Without a config of ours the flag says it; the official files carry the table along."""
    model, table = random_model("always"), {f"feat_rope.freqs_{f}": torch.zeros(16, 24) for f in ("cos", "sin")}
    meta = json.loads((data / "meta.json").read_text())
    torch.save(dict(ema=model.state_dict() | table, data=meta), tmp_path / "official.pt")
    ours = images_of(save_as_run(tmp_path / "a.pt", model, data, use_rope="always"), tmp_path / "a")
    assert_same_images(images_of(tmp_path / "official.pt", tmp_path / "b", "--use-rope", "always"), ours)


def test_phase_1_cannot_sample(data, tmp_path):
    erw.main(command(data, tmp_path / "run", 2, *FLAGS))
    with pytest.raises(SystemExit, match="is of phase I, which learns no velocity: train on"):
        images_of(tmp_path / "run/last.pt", tmp_path / "samples")


def test_the_probe(data, tmp_path, unbroken, capsys):
    scores = erw.main(["--probe", "60", "--data", str(data), "--ckpt", str(unbroken / "last.pt")])
    assert "CKNNA after each block, 60 images of" in capsys.readouterr().out
    model = erw.ERWSiT(16, 3, 4, common.SIT_SIZES["toy"], 2, [32], 256, 1, "always")
    model.load_state_dict(last(unbroken)["ema"])
    rows = torch.linspace(0, 99, 60).long().numpy()
    images = torch.from_numpy(np.load(data / "images.npy")[rows])
    x = images.permute(0, 3, 1, 2) / 127.5 - 1
    z = load_teacher("prepared", 16, f"{data}/teacher.pt")(images)[1].mean(dim=1)
    h, c = model.embed(x, torch.zeros(60), torch.full((60,), 4))
    expected = []
    with torch.no_grad():
        for block in model.blocks:
            h = block(h, c, erw.rope_2d(4, 24))
            expected.append(erw.cknna(h.mean(dim=1), z))
    assert scores == pytest.approx(expected, abs=1e-4)

    erw.main(command(data, tmp_path / "run", 2, *FLAGS))  # phase I runs its own blocks only
    assert len(erw.main(["--probe", "60", "--data", str(data), "--ckpt", str(tmp_path / "run/last.pt")])) == 1
    for flags, message in [(["--probe", "20", "--data", str(data)], "take many more"),
                           (["--probe", "60", "--data", str(make_data(tmp_path / "other", classes=5))], "classes")]:
        with pytest.raises(SystemExit, match=message):
            erw.main([*flags, "--ckpt", str(unbroken / "last.pt")])

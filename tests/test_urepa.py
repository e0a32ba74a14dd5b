"""U-REPA: the network, its loss and gradients against official parts put together, published sizes, properties."""
import copy
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import common
import urepa
from common import Down, Up, interpolate, rotate
from golden_utils import Fixture
from support import checkpoints, dataset, teachers, vae
from support.flags import parse
from test_errors import sampling, training, write_data
from urepa import SiTDown, manifold_loss, rope_2d, to_grid, token_loss, urepa_loss

PUBLISHED = {  # model: M parameters with projector and position table; then G multiply-adds at 256 px:
    # without and with the projector, both without attention's products, as published; without projector but complete
    "SiT-down-B/2": (199.69, 23.66, 24.13, 24.7),
    "SiT-down-L/2": (686.63, 78.77, 79.27, 81.3),
    "SiT-down-XL/2": (954.37, 108.76, 109.28, 111.9),
}


def small_model(config):
    sizes = dict(hidden_size=config["hidden_size"], depths=config["depth"], num_heads=config["num_heads"],
                 mlp_dim=config["mlp_hidden"], patch_size=config["patch_size"])
    return SiTDown(config["input_size"], config["in_channels"], config["num_classes"], sizes,
                   config["encoder_depth"], [config["z_dim"]], config["projector_dim"])


SIZES = urepa.MODELS["toy"] | dict(depths=(2, 3, 2))


def unit(z):
    return F.normalize(z, dim=-1)


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------------------------------------------------------------
# Against tests/golden
# ---------------------------------------------------------------------------------------------------------------------
def test_step_equals_the_composed_official_parts():
    golden = Fixture("urepa")
    model = golden.fill(small_model(golden.config))
    x, noise, t, y, z = (golden.input(name) for name in ("x", "eps", "t", "y", "z"))
    x_t, _ = interpolate(x, noise, t)
    golden.check("x_t", x_t)

    def note(name, shape=lambda h: h):
        return lambda module, args, out: golden.check(f"act/{name}", shape(out))
    for module, name in [(model.encoder[-1], "encoder_out"), (model.down, "down_out"), (model.middle[-1], "middle_out"),
                         (model.up, "up_out"), (model.decoder[-1], "decoder_out")]:
        module.register_forward_hook(note(name))
    v, middles = model.stages(x_t, t, y)
    golden.check("mid_tokens", middles[golden.config["encoder_depth"] - len(model.encoder) - 1])
    golden.check("v_pred", v)
    v, (z_hat,) = model(x_t, t, y)
    golden.check("v_pred", v)
    golden.check("z_tilde", z_hat)
    torch.testing.assert_close(model.velocity(x_t, t, y), v, rtol=0, atol=0)

    velocity, proj, manifold = urepa_loss(model, x, t, noise, y, [z])
    loss = (velocity + golden.config["proj_coeff"] * (proj + golden.config["manifold_weight"] * manifold)).mean()
    golden.check("denoising_loss", velocity)
    golden.check("proj_loss", proj.mean())
    golden.check("manifold_loss", manifold.mean())
    golden.check("total_loss", loss)
    loss.backward()
    parameters = dict(model.named_parameters())
    for name in [name for name in golden.outputs if name.startswith("grad/")]:
        golden.check(name, parameters[name.removeprefix("grad/")].grad)
    golden.assert_all_checked()


def test_losses_equal_simpletuners():
    golden = Fixture("urepa_loss")
    sizes = dict(hidden_size=golden.config["hidden_size"], depths=(0, 1, 0), num_heads=4, mlp_dim=8, patch_size=2)
    model = SiTDown(16, 4, 10, sizes, 1, [golden.config["z_dim"]], golden.config["projector_dim"])
    golden.fill(model.projectors, "projectors.")
    h, z = golden.input("h").requires_grad_(), golden.input("z")
    golden.check("mlp_out", model.projectors[0](h))
    [z_hat] = model.project(h)
    golden.check("z_tilde", z_hat)
    u, s = unit(z_hat), unit(z)
    golden.check("gram_student_0", u[0] @ u[0].mT)
    golden.check("gram_teacher_0", s[0] @ s[0].mT)

    def network(x_t, t, y):  # a network whose middle tokens are the fixture's
        return x_t, model.project(h)
    x, t = torch.zeros(3, 4, 16, 16), torch.rand(3)
    _, proj, manifold = (term.mean() for term in urepa_loss(network, x, t, x, None, [z]))
    golden.check("proj_loss", proj)
    golden.check("manifold_loss", manifold)
    align = golden.config["proj_coeff"] * (proj + golden.config["manifold_weight"] * manifold)
    golden.check("align_loss", align)
    golden.check("grad_proj_only/h", torch.autograd.grad(proj, h, retain_graph=True)[0])
    golden.check("grad_manifold_only/h", torch.autograd.grad(manifold, h, retain_graph=True)[0])
    align.backward()
    golden.check("grad/h", h.grad)
    for name, parameter in model.projectors.named_parameters(prefix="projectors"):
        if f"grad/{name}" in golden.outputs:
            golden.check(f"grad/{name}", parameter.grad)
    golden.assert_all_checked(but=["alt/manifold_pooled_batch"])  # another reading of the paper, for information only


def test_operations_equal_udits():
    golden = Fixture("urepa_ops")
    width, head_dim = golden.config["hidden_size"], golden.config["head_dim"]
    down, up, x = Down(width), Up(width), golden.input("op_x").requires_grad_()
    for module, name in (down, "op_down"), (up, "op_up"):
        module.load_state_dict({"body.0.weight": golden.input(f"{name}_weight")})
    golden.check("op_down", down(x))
    golden.check("op_up", up(x))
    loss = down(x).square().mean() + up(x).square().mean()
    golden.check("op_loss", loss)
    loss.backward()
    golden.check("grad/op_x", x.grad)
    golden.check("grad/op_down_weight", down.body[0].weight.grad)
    golden.check("grad/op_up_weight", up.body[0].weight.grad)

    rope = rope_2d(golden.config["grid"], head_dim)
    golden.check("op_rope_cos", rope[0])
    golden.check("op_rope_sin", rope[1])
    for name in "op_q", "op_k":
        turned = rotate(golden.input(name).transpose(1, 2), rope)  # (B,N,heads,d) -> (B,heads,N,d)
        golden.check(f"{name}_rot", turned.transpose(1, 2))
    golden.assert_all_checked()


# ---------------------------------------------------------------------------------------------------------------------
# Sizes
# ---------------------------------------------------------------------------------------------------------------------
def full_size(name, z_dims=(768,)):
    cfg = parse(["--model", name], urepa.Config, urepa.MODELS, urepa.RECIPES)
    return SiTDown(32, 4, 1000, urepa.MODELS[name], cfg.encoder_depth, z_dims, 2048)


@pytest.mark.parametrize("name", PUBLISHED)
def test_urepa_published_sizes(name):
    with torch.device("meta"):
        model = full_size(name)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(PUBLISHED[name][0], abs=0.005)


@pytest.mark.parametrize("name", PUBLISHED)
def test_urepa_published_multiply_adds(name):
    def multiply_adds(z_dims):
        """All but attention's own products, which older versions of PyTorch do not count on the CPU."""
        with FakeTensorMode(), FlopCounterMode(display=False) as counter, torch.no_grad():
            full_size(name, z_dims)(torch.empty(1, 4, 32, 32), torch.empty(1), torch.empty(1, dtype=torch.long))
        counts = counter.get_flop_counts()["Global"].items()
        return sum(flops / 2e9 for op, flops in counts if "attention" not in str(op))
    _, without_projector, with_projector, complete = PUBLISHED[name]
    linear, (encoder, middle, decoder) = multiply_adds([]), urepa.MODELS[name]["depths"]
    found = linear + 2e-9 * urepa.MODELS[name]["hidden_size"] * ((encoder + decoder) * 256 ** 2 + middle * 64 ** 2)
    assert linear == pytest.approx(without_projector, abs=0.006) and found == pytest.approx(complete, abs=0.06)
    assert multiply_adds([768]) == pytest.approx(with_projector, abs=0.006)


# ---------------------------------------------------------------------------------------------------------------------
# Properties of the losses
# ---------------------------------------------------------------------------------------------------------------------
Z, Z_HAT = random(3, 16, 24), random(3, 16, 24, seed=1)


def both(z_hat, z):
    u, s = unit(z_hat), unit(z)
    return token_loss(u, s), manifold_loss(u, s)


def test_perfect_features():
    proj, manifold = both(3 * Z, Z)
    torch.testing.assert_close(proj, -torch.ones(3))
    assert manifold.abs().max() < 1e-12
    assert both(Z_HAT, Z)[1].min() > 0.05


def test_the_gram_error_knows_no_rotation_of_the_students_features():
    rotation = torch.linalg.qr(random(24, 24, seed=2))[0]
    (proj, manifold), (turned_proj, turned_manifold) = both(Z_HAT, Z), both(Z_HAT @ rotation, Z)
    torch.testing.assert_close(turned_manifold, manifold, rtol=1e-5, atol=0)
    assert (turned_proj - proj).abs().min() > 1e-3


def test_the_losses_know_only_directions():
    scale = 0.1 + torch.rand(3, 16, 1, generator=torch.Generator().manual_seed(3))
    for loss, scaled_student, scaled_teacher in zip(both(Z_HAT, Z), both(Z_HAT * scale, Z), both(Z_HAT, Z * scale)):
        torch.testing.assert_close(scaled_student, loss, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(scaled_teacher, loss, rtol=1e-5, atol=1e-7)


def test_an_images_loss_does_not_know_the_other_images():
    for i in range(3):
        for alone, batch in zip(both(Z_HAT[i:i + 1], Z[i:i + 1]), both(Z_HAT, Z)):
            torch.testing.assert_close(alone[0], batch[i])


def test_the_gram_is_made_in_fp32_under_autocast():
    with torch.autocast("cpu", torch.bfloat16):
        inside = both(Z_HAT, Z)
    for a, b in zip(inside, both(Z_HAT, Z)):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a, b, rtol=1e-6, atol=0)


def test_several_teachers_count_alike():
    def network(*z_hats):
        return lambda x_t, t, y: (x_t, list(z_hats))
    x, other = torch.zeros(3, 4, 8, 8), random(3, 16, 10, seed=4)
    two = urepa_loss(network(Z_HAT, other), x, torch.rand(3), x, None, [Z, other + 1])
    first, second = both(Z_HAT, Z), both(other, other + 1)
    for i in (0, 1):
        torch.testing.assert_close(two[1 + i], (first[i] + second[i]) / 2)


# ---------------------------------------------------------------------------------------------------------------------
# The network
# ---------------------------------------------------------------------------------------------------------------------
@pytest.fixture
def model():
    """A small one with a teacher, its weights no longer at the start, where most of it is the identity."""
    torch.manual_seed(0)
    model = SiTDown(16, 3, 8, SIZES, 4, [24], 32)
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter) * parameter.requires_grad
    return model


INPUTS = random(3, 3, 16, 16), torch.tensor([0.1, 0.5, 0.9]), torch.tensor([0, 5, 8])


def test_a_fresh_model_outputs_exactly_zero():
    fresh = SiTDown(16, 3, 8, SIZES)
    assert not fresh.velocity(*INPUTS).any()
    assert all(b.adaLN_modulation[1].weight.abs().max() == 0 for b in fresh.blocks)


def test_a_fresh_models_weights():
    """Xavier-uniform, but for the embedders, which are as in SiT."""
    torch.manual_seed(0)
    weights = dict(SiTDown(16, 3, 8, SIZES, 4, [24], 32).named_parameters())
    xavier = {"encoder.1.mlp.w1.weight": 96 + 256, "middle.2.attn.qkv.weight": 96 + 288,
              "decoder.0.skip_linear.weight": 96 + 192, "down.body.0.weight": 9 * (96 + 24),
              "up.body.0.weight": 9 * (96 + 384), "projectors.0.0.weight": 96 + 32}  # inputs + outputs
    for name, fans in xavier.items():
        assert weights[name].std().item() == pytest.approx((2 / fans) ** 0.5, rel=0.04), name
        assert weights[name].abs().max() <= (6 / fans) ** 0.5
    for name in "t_embedder_mid.mlp.0.weight", "t_embedder_mid.mlp.2.weight", "y_embedder_mid.embedding_table.weight":
        assert weights[name].std().item() == pytest.approx(0.02, rel=0.1), name
    assert all(not w.any() for name, w in weights.items() if name.endswith("bias") and "embedder.proj" not in name)


def test_a_student_begins_alike_with_and_without_a_teacher():
    def fresh(*z_dims):
        torch.manual_seed(0)
        return SiTDown(16, 3, 8, SIZES, 4, z_dims, 32).state_dict()
    plain, aligned = fresh(), fresh(24)
    assert plain.keys() < aligned.keys() and all(torch.equal(plain[name], aligned[name]) for name in plain)


def test_blocks_are_all_blocks_and_have_no_second_names(model):
    assert [type(b) for b in model.blocks] == [common.UNetBlock] * 7
    stages = {key.split(".")[0] for key in model.state_dict()}
    assert stages == set("x_embedder t_embedder y_embedder t_embedder_mid y_embedder_mid pos_embed encoder down middle "
                         "up decoder final_layer projectors".split())  # no rope, no blocks
    ema = copy.deepcopy(model)
    assert ema.blocks[0] is ema.encoder[0] and ema.blocks[0] is not model.blocks[0]


def test_sampling_runs_no_projector(model):
    v, (z_hat,) = model(*INPUTS)
    assert z_hat.shape == (3, 16, 24)  # the teacher's grid, of the student's 2x2 middle tokens
    model.projectors = None
    torch.testing.assert_close(model.velocity(*INPUTS), v, rtol=0, atol=0)


def test_the_mlp_comes_before_the_enlarging(model):
    h = random(2, 4, 96, seed=5)
    first, projector = model.project(h)[0], model.projectors[0]
    large = F.interpolate(to_grid(h), scale_factor=2, mode="bilinear").flatten(2).mT
    assert (projector(large) - first).abs().max() > 1e-3
    grid = to_grid(first)  # the corners have no neighbours to be mixed with: they are the MLP's output itself
    torch.testing.assert_close(grid[:, :, ::3, ::3], to_grid(projector(h)))


@pytest.mark.parametrize("depth", [3, 4, 5])
def test_the_alignment_reaches_the_blocks_up_to_encoder_depth(model, depth):
    model.encoder_depth = depth
    _, proj, manifold = urepa_loss(model, INPUTS[0], INPUTS[1], INPUTS[0], INPUTS[2], [random(3, 16, 24, seed=6)])
    for loss in (proj, manifold):
        model.zero_grad()
        loss.sum().backward(retain_graph=True)
        grads = [b.mlp.w2.weight.grad for b in model.blocks]
        reached = [grad is not None and grad.norm().item() > 0 for grad in grads]
        assert reached == [True] * depth + [False] * (7 - depth)


def test_both_label_tables_see_the_same_dropped_labels(model):
    y = torch.tensor([1, 8, 8])  # two labels dropped
    model(INPUTS[0], INPUTS[1], y)[0].square().sum().backward()
    for embedder in (model.y_embedder, model.y_embedder_mid):
        rows = embedder.embedding_table.weight.grad.abs().sum(dim=1)
        assert rows.nonzero().flatten().tolist() == [1, 8]


def test_the_middle_stage_has_a_conditioning_of_its_own(model):
    _, middles = model.stages(*INPUTS)
    model.t_embedder_mid.mlp[2].bias.data += 1
    v, changed = model.stages(*INPUTS)
    assert (changed[0] - middles[0]).abs().max() > 1e-3
    encoded, _ = model.embed(*INPUTS)
    kept = model.blocks[0](encoded, model.t_embedder(INPUTS[1]) + model.y_embedder(INPUTS[2]), model.rope)
    model.t_embedder_mid.mlp[2].bias.data -= 1
    encoder = []
    model.encoder[0].register_forward_hook(lambda module, args, out: encoder.append(out))
    model.stages(*INPUTS)
    torch.testing.assert_close(encoder[0], kept, rtol=0, atol=0)


# ---------------------------------------------------------------------------------------------------------------------
# Runs
# ---------------------------------------------------------------------------------------------------------------------
def run(flags):
    urepa.main([str(flag) for flag in flags])


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("urepa") / "data")


@pytest.fixture(scope="module")
def trained(data):
    """The folder of a run of two steps."""
    run([*training(data, data.parent / "run"), "--max-train-steps", 2, "--log-every", 1])
    return data.parent / "run"


def log_of(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("flags, proj_coeff, manifold_weight", [
    ([], 0.5, 3), (["--manifold-weight", 0], 0.5, 0), (["--proj-coeff", 0.2, "--manifold-weight", 2], 0.2, 2)])
def test_the_total_is_the_papers(data, tmp_path, flags, proj_coeff, manifold_weight):
    run([*training(data, tmp_path), "--max-train-steps", 1, *flags])
    [line] = log_of(tmp_path)
    expected = line["loss_velocity"] + proj_coeff * (line["loss_proj"] + manifold_weight * line["loss_manifold"])
    assert line["loss"] == pytest.approx(expected, rel=1e-5)
    assert 0 < line["loss_manifold"] < 4 and abs(line["loss_proj"]) <= 1


def test_the_baseline_runs_no_teacher(data, tmp_path, monkeypatch):
    monkeypatch.setattr(urepa, "load_teachers", None)
    run([*training(data, tmp_path), "--max-train-steps", 1, "--proj-coeff", 0])
    [line] = log_of(tmp_path)
    assert line["loss"] == line["loss_velocity"] and line["loss_proj"] == line["loss_manifold"] == 0
    assert not any(name.startswith("projectors") for name in torch.load(tmp_path / "last.pt")["ema"])


def test_the_teacher_sees_the_clean_images_at_their_places(data, tmp_path, monkeypatch):
    calls = []

    def recorded_loss(model, x, t, noise, y, zs, path_type):
        calls.append((x, zs))
        return urepa_loss(model, x, t, noise, y, zs, path_type)
    monkeypatch.setattr(urepa, "urepa_loss", recorded_loss)
    run([*training(data, tmp_path), "--max-train-steps", 1])
    [(x, [z])] = calls
    images = ((x + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1)
    torch.testing.assert_close(z, teachers.load_teacher("prepared", 16, str(data / "teacher.pt"))(images)[1])


def test_samples_are_the_ema_models(trained, tmp_path):
    torch.manual_seed(1)
    model = SiTDown(16, 3, 8, urepa.MODELS["toy"], 2, [64], 256)
    checkpoint = torch.load(trained / "last.pt", weights_only=True)
    for name, weight in checkpoint["ema"].items():  # after two steps a sample is still hardly more than its noise
        weight += 0.05 * torch.randn_like(weight) * (name != "pos_embed")
    torch.save(checkpoint, tmp_path / "ema.pt")
    run(sampling(tmp_path / "ema.pt", tmp_path, "--labels", 3))
    images = np.load(tmp_path / "samples.npz")["arr_0"]
    model.load_state_dict(checkpoint["ema"])
    noise, y = dataset.image_randn(0, range(2), "cpu")(3, 16, 16), torch.tensor([3, 3])
    with torch.no_grad():
        x = noise - model(noise, torch.ones(2), y)[0]  # the one Euler step from t = 1 to 0
    expected = vae.pixels_to_uint8(x).numpy()
    assert np.abs(images.astype(int) - expected).max() <= 1
    assert np.abs(vae.pixels_to_uint8(noise).numpy().astype(int) - expected).mean() > 20  # so it can fail


def error_of(flags):
    with pytest.raises(SystemExit) as caught:
        run(flags)
    message = str(caught.value)
    assert message.startswith("error: ") and "\n" not in message
    return message


@pytest.mark.parametrize("flags, remedy", [
    ("--encoder-depth 1", "2 to 3"), ("--encoder-depth 4", "2 to 3"), ("--manifold-weight -1", "--manifold-weight"),
    ("--manifold-weight nan", "--manifold-weight"), ("--model SiT-XL/2", "SiT-down-XL/2")])
def test_flag(flags, remedy, data, tmp_path):
    assert remedy in error_of([*training(data, tmp_path / "out"), *flags.split()])
    assert not (tmp_path / "out").exists()


def test_a_grid_that_cannot_be_halved(tmp_path):
    data = write_data(tmp_path / "data20", resolution=20)
    message = error_of([*training(data, tmp_path / "out"), "--resolution", 20])
    assert "5x5" in message and "--model" in message


def test_wrong_checkpoints(data, trained, tmp_path):
    import repa
    weights, out = checkpoints.load_weights(trained / "last.pt")[0], tmp_path / "out"

    def error_with(state, *flags):
        torch.save(state, tmp_path / "ema.pt")
        return error_of(sampling(tmp_path / "ema.pt", out, *flags))
    assert "not those of --model SiT-down-B/2" in error_with(weights, "--model", "SiT-down-B/2")
    assert "down.body.0.weight" in error_with({k: w for k, w in weights.items() if not k.startswith("down")})
    assert "middle.1.mlp.w1.weight" in error_with(weights | {"middle.1.mlp.w1.weight": torch.zeros(9, 96)})
    assert "pos_embed" in error_with({k: w for k, w in weights.items() if k != "pos_embed"})
    assert "--model toy" in error_of(sampling(trained / "last.pt", out, "--model", "SiT-down-B/2"))
    repa.main([str(f) for f in [*training(data, tmp_path / "repa"), "--max-train-steps", 1]])  # a SiT: no U-Net in it
    assert "not those of --model toy" in error_of(sampling(tmp_path / "repa/last.pt", out))
    with pytest.raises(SystemExit, match="0 blocks"):
        repa.main([str(f) for f in sampling(trained / "last.pt", out)])
    assert not out.exists()


def test_init_copes_with_another_class_count(trained, tmp_path, capsys):
    data = write_data(tmp_path / "five", num_classes=5)
    run([*training(data, tmp_path / "out"), "--max-train-steps", 1, "--init", trained / "last.pt"])
    assert "left fresh: y_embedder, y_embedder_mid" in capsys.readouterr().out

"""REPA's loss, gradients and one optimiser step against the official code."""
import copy

import pytest
import torch

from common import interpolate, lognormal_time
from golden_utils import Fixture
from repa import optimizer_step, repa_loss, update_ema
from support.dataset import clean_input
from test_sit import small_repa

GOLDEN = Fixture("repa")
DROP = GOLDEN.input("drop_uniform") < GOLDEN.config["class_dropout_prob"]


def losses(model, path, t):
    """(velocity loss (B,), projection loss (), total) on the fixture's batch, with the fixture's label drops."""
    y = GOLDEN.input("y").masked_fill(DROP, model.num_classes)
    velocity, proj = repa_loss(model, GOLDEN.input("x0"), t, GOLDEN.input("noise"), y, [GOLDEN.input("zs.0")], path)
    return velocity, proj.mean(), (velocity + GOLDEN.config["proj_coeff"] * proj).mean()


def test_posterior_sample():
    moments = torch.cat([GOLDEN.input("moments_mean"), GOLDEN.input("moments_std")], dim=1)
    meta = dict(latent_scale=0.18215, latent_shift=0.0)
    GOLDEN.check("posterior", clean_input({"moments": moments}, meta, GOLDEN.input("posterior_eps")))


@pytest.mark.parametrize("path", GOLDEN.config["path_types"])
def test_losses_and_gradients(path):
    model = GOLDEN.fill(small_repa(GOLDEN.config))
    t = GOLDEN.input("t")
    x_t, _ = interpolate(GOLDEN.input("x0"), GOLDEN.input("noise"), t, path)
    GOLDEN.check(f"{path}/x_t", x_t)
    velocity, proj, loss = losses(model, path, t)
    GOLDEN.check(f"{path}/denoising_loss", velocity)
    GOLDEN.check(f"{path}/proj_loss", proj)
    GOLDEN.check(f"{path}/loss", loss)
    y = GOLDEN.input("y").masked_fill(DROP, model.num_classes)
    GOLDEN.check("labels_after_drop", y)
    v_hat, (z_hat,) = model(x_t, t, y)
    GOLDEN.check(f"{path}/v", v_hat)
    GOLDEN.check(f"{path}/zs_tilde.0", z_hat)

    proj.backward(retain_graph=True)  # the alignment reaches the blocks up to encoder_depth and no further
    norms = [0.0 if b.mlp.fc2.weight.grad is None else b.mlp.fc2.weight.grad.norm().item() for b in model.blocks]
    GOLDEN.check(f"{path}/proj_grad_norm_per_block_fc2", torch.tensor(norms))
    assert all(n > 0 for n in norms[:model.encoder_depth]) and not any(norms[model.encoder_depth:])
    model.zero_grad()

    loss.backward()
    parameters = dict(model.named_parameters())
    for name in GOLDEN.config["grad_names"]:
        GOLDEN.check(f"{path}/grad/{name}", parameters[name].grad)

    ema = copy.deepcopy(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=GOLDEN.config["lr"], betas=(0.9, 0.999), weight_decay=0, fused=True)
    grad_norm, finite = optimizer_step(optimizer, trained, GOLDEN.config["max_grad_norm"])
    update_ema(ema, model, GOLDEN.config["ema_decay"])
    assert finite
    GOLDEN.check(f"{path}/grad_norm", grad_norm)
    averaged = dict(ema.named_parameters())
    for name in [name for name in GOLDEN.outputs if name.startswith(f"{path}/step/")]:
        GOLDEN.check(name, parameters[name.removeprefix(f"{path}/step/")])
        GOLDEN.check(name.replace("/step/", "/ema/"), averaged[name.removeprefix(f"{path}/step/")])


@pytest.mark.parametrize("path", GOLDEN.config["path_types"])
def test_lognormal_times(path):
    t = lognormal_time(GOLDEN.input("rnd_normal"), path)
    GOLDEN.check(f"{path}_lognormal/t", t)
    velocity, proj, loss = losses(GOLDEN.fill(small_repa(GOLDEN.config)), path, t)
    GOLDEN.check(f"{path}_lognormal/denoising_loss", velocity)
    GOLDEN.check(f"{path}_lognormal/proj_loss", proj)
    GOLDEN.check(f"{path}_lognormal/loss", loss)


def test_every_output_of_the_fixture_was_compared():
    GOLDEN.assert_all_checked(but=["posterior_logvar"])  # a file format of U-ViT's that is not read here


def test_several_teachers_count_alike():
    model = GOLDEN.fill(small_repa(GOLDEN.config | dict(z_dims=[24, 24])))
    args = GOLDEN.input("x0"), GOLDEN.input("t"), GOLDEN.input("noise"), GOLDEN.input("y")
    zs = [GOLDEN.input("zs.0"), torch.randn(4, 16, 24, generator=torch.Generator().manual_seed(0))]
    both, projectors = repa_loss(model, *args, zs)[1], list(model.projectors)
    alone = []
    for projector, z in zip(projectors, zs):
        model.projectors = torch.nn.ModuleList([projector])
        alone.append(repa_loss(model, *args, [z])[1])
    torch.testing.assert_close(both, (alone[0] + alone[1]) / 2)
    assert (alone[0] - alone[1]).abs().min() > 1e-4


def test_the_loss_knows_only_the_direction_of_a_feature():
    model = GOLDEN.fill(small_repa(GOLDEN.config))
    args = GOLDEN.input("x0"), GOLDEN.input("t"), GOLDEN.input("noise"), GOLDEN.input("y")
    z = GOLDEN.input("zs.0")
    scale = 0.1 + torch.rand(4, 16, 1, generator=torch.Generator().manual_seed(0))
    expected = repa_loss(model, *args, [z])[1]
    torch.testing.assert_close(repa_loss(model, *args, [z * scale])[1], expected)
    perfect = repa_loss(lambda *inputs: (model(*inputs)[0], [3 * z]), *args, [z])[1]
    torch.testing.assert_close(perfect, -torch.ones(4))
    assert (repa_loss(model, *args, [z.roll(1, 0)])[1] - expected).abs().max() > 1e-3  # another image's features

"""Samplers against the official code, and against a Gaussian whose exact flow is known."""
import math

import numpy as np
import pytest
import torch

from common import sample, velocity_to_score
from golden_utils import Fixture
from support.dataset import image_randn
from test_sit import small_repa

GOLDEN = Fixture("samplers")
CASES = GOLDEN.config["cases"]


class Counting:
    """A network that counts its calls and the images it evaluates, and notes the times it was asked for."""

    def __init__(self, network):
        self.network, self.calls, self.images, self.times = network, 0, 0, []

    def __call__(self, x, t, y):
        self.calls, self.images = self.calls + 1, self.images + len(x)
        assert (t == t[0]).all()
        self.times.append(t[0].item())
        return self.network(x, t, y)


def stored_noise():
    """randn that answers the fixture's draws one by one."""
    draws = iter(GOLDEN.input("noise"))
    return lambda *shape: next(draws)


def run(case, network=None, **changes):
    """One case of the fixture by its name: (samples, the counting network)."""
    model = Counting(network or GOLDEN.fill(small_repa(GOLDEN.config)).velocity)
    config, y = GOLDEN.config, GOLDEN.input("y")
    options = dict(mode=case[:3], heun="heun" in case, path_type="cosine" if "cosine" in case else "linear",
                   num_steps=config["num_steps"], randn=stored_noise())
    if "cfg" in case:
        options |= dict(cfg_scale=config["cfg_scale"])
    if "interval" in case:
        options |= dict(guidance_low=config["guidance_low"], guidance_high=config["guidance_high"])
    null = torch.full_like(y, config["null_label"])
    return sample(model, GOLDEN.input("z"), y, null, **options | changes), model


@pytest.mark.parametrize("case", CASES)
def test_equals_repa(case):
    x, model = run(case)
    GOLDEN.check(case, x)
    assert [model.calls, model.images] == GOLDEN.outputs["counts"][CASES.index(case)].tolist()
    if f"times/{case}" in GOLDEN.outputs:
        GOLDEN.check(f"times/{case}", torch.tensor(model.times, dtype=torch.float64))


def test_equals_willisma():
    GOLDEN.check("sit/sde_euler_sigma_mean", run("sde_em")[0])
    GOLDEN.check("sit/sde_heun_sigma_mean", run("sde_heun")[0])
    GOLDEN.check("sit/ode_euler", run("ode_euler")[0])


def test_converges_to_the_exact_solution():
    exact = GOLDEN.outputs["ode_exact_float64"]
    error = [(run("ode_heun", num_steps=n)[0].flatten()[::exact["stride"]] - exact["sample"]).norm() for n in (8, 64)]
    assert error[1] < error[0] / 30
    GOLDEN.check("ode_exact_float64", run("ode_heun", num_steps=400)[0])


@pytest.mark.parametrize("path", ["linear", "cosine"])
def test_score(path):
    t = GOLDEN.input("score_t").view(-1, 1, 1, 1)
    GOLDEN.check(f"score_{path}", velocity_to_score(GOLDEN.input("score_v"), GOLDEN.input("z"), t, path))


def test_every_output_of_the_fixture_was_compared():
    GOLDEN.checked.add("counts")
    out_of_scope = ["sde_euler_sigma_none", "sde_euler_sigma_tweedie", "sde_euler_linear_norm05_mean",
                    "sde_euler_decreasing_mean", "ode_dopri5_tight", "ode_heun2"]  # willisma's other variants
    GOLDEN.assert_all_checked(but=out_of_scope)


# --- a Gaussian N(m, q^2) in every dimension: its exact velocity and exact flow m + q z are known
M, Q = 1.5, 0.5


def gaussian_velocity(x, t, y):
    t = t.view(-1, 1).double()
    x = x.double()
    return (t - (1 - t) * Q ** 2) * (x - (1 - t) * M) / ((1 - t) ** 2 * Q ** 2 + t ** 2) - M


def solve(noise, **options):
    y = torch.zeros(len(noise), dtype=torch.long)
    return sample(gaussian_velocity, noise, y, y, **options)


@pytest.mark.parametrize("heun, order, slack", [(False, 1, 0.15), (True, 2, 0.2)])
def test_order_of_convergence(heun, order, slack):
    noise = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
    steps = np.array([32, 64, 128])
    errors = [(solve(noise, num_steps=int(n), heun=heun) - (M + Q * noise)).abs().mean().item() for n in steps]
    assert -np.polyfit(np.log(steps), np.log(errors), 1)[0] == pytest.approx(order, abs=slack)


@pytest.mark.parametrize("heun", [False, True])
def test_moments_of_the_sde(heun):
    generator = torch.Generator().manual_seed(0)
    randn = lambda *shape: torch.randn(4000, *shape, generator=generator)
    x = solve(randn(16), mode="sde", num_steps=250, heun=heun, randn=randn)
    assert x.mean() == pytest.approx(M, abs=0.01)
    assert x.std() == pytest.approx(Q, rel=0.02)  # the last step adds no noise: 1 % is missing


def test_no_unconditional_evaluation_outside_the_interval():
    model = GOLDEN.fill(small_repa(GOLDEN.config)).velocity
    seen = []

    def network(x, t, y):
        seen.append((t[0].item(), (y == GOLDEN.config["null_label"]).sum().item(), len(x)))
        return model(x, t, y)
    run("sde_em_cfg_interval", network)
    for t, null_labels, images in seen:
        inside = GOLDEN.config["guidance_low"] <= t <= GOLDEN.config["guidance_high"]
        assert (null_labels, images) == ((3, 6) if inside else (0, 3))
    assert any(images == 3 for *_, images in seen) and any(images == 6 for *_, images in seen)


def test_a_tuple_is_one_joint_state_with_a_scale_each():
    """Two states that do not see each other are sampled as if alone, each with its own guidance scale."""
    image = GOLDEN.fill(small_repa(GOLDEN.config)).velocity
    noise, y = GOLDEN.input("z"), GOLDEN.input("y")
    null = torch.full_like(y, GOLDEN.config["null_label"])
    token = torch.randn(3, 5, generator=torch.Generator().manual_seed(1))
    toy = lambda x, y: torch.tanh(x) * (1 + (y == GOLDEN.config["null_label"]).float()[:, None])

    def joint(states, t, y):
        return image(states[0], t, y), toy(states[1], y)
    both = sample(joint, (noise, token), y, null, num_steps=8, cfg_scale=(1.8, 3.0))
    alone = sample(lambda x, t, y: toy(x, y), token, y, null, num_steps=8, cfg_scale=3.0)
    GOLDEN.check("ode_euler_cfg", both[0])
    torch.testing.assert_close(both[1], alone)


def test_images_draw_their_noise_alone():
    together = image_randn(0, [3, 4, 5], "cpu")(2, 2)
    torch.testing.assert_close(together[1:2], image_randn(0, [4], "cpu")(2, 2), rtol=0, atol=0)
    assert not math.isclose(together[0, 0, 0], together[1, 0, 0])
    assert not torch.equal(together, image_randn(1, [3, 4, 5], "cpu")(2, 2))

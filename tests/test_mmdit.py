"""The MM-DiT of common.py: SD3's, and REPA's and HASTE's text-to-image models, against their official codes."""
import functools

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from common import interpolate, sample, timestep_embedding
from golden_utils import Fixture, official_keys, state_shapes
from repa import repa_loss
from support.sd3 import SD3_MEDIUM, MMDiT

SD3, SD3_RMS = Fixture("sd3_mmdit"), Fixture("sd3_mmdit_rms")
REPA, HASTE = Fixture("repa_mmdit"), Fixture("haste_mmdit")


# ----------------------------------------------------------------------------------------------------------------------
# SD3


def small_sd3(config):
    return MMDiT(**{name: config[name] for name in ("in_channels", "hidden_size", "depth", "num_heads", "context_dim",
                                                    "pooled_dim", "mlp_ratio", "patch_size")},
                 pos_embed_size=config["pos_embed_max_size"], qk_norm=config["qk_norm"] == "rms")


@pytest.mark.parametrize("golden", [SD3, SD3_RMS], ids=["plain", "rms"])
def test_sd3(golden):
    model = golden.fill(small_sd3(golden.config))
    x, t, context, pooled = (golden.input(name) for name in ("x", "t", "context", "pooled"))
    golden.check("t_freq", timestep_embedding(t))
    rows, columns = (side // 2 for side in golden.config["latent_hw"])
    golden.check("pos_embed_crop", model.positions(rows, columns))
    text, h, c = model.embed(x, t / 1000, context, pooled)
    golden.check("c", c)
    for i, block in enumerate(model.blocks):
        text, h = block(text, h, c)
        if i == 0:
            golden.check("block0_context", text)
            golden.check("block0_x", h)
    golden.check("lastblock_x", h)
    v = model(x, t / 1000, context, pooled)
    golden.check("v", v)
    loss = (v - golden.input("target")).square().mean()
    golden.check("loss", loss)
    loss.backward()
    parameters = dict(model.named_parameters())
    for name in golden.config["grad_names"]:
        golden.check(f"grad/{name}", parameters[name].grad)
    golden.assert_all_checked(but=["converted/"])  # diffusers' folders are not read


def test_names_and_shapes_of_sd3_medium():
    with torch.device("meta"):
        model = MMDiT(**SD3_MEDIUM)
    assert state_shapes(model) == official_keys("sd3_medium_mmdit")
    assert len(state_shapes(model)) == 491 and sum(p.numel() for p in model.parameters()) == 2_028_328_000


# ----------------------------------------------------------------------------------------------------------------------
# REPA's and HASTE's: t as it is, no pooled text, projectors on the image stream


class AlignedMMDiT(MMDiT):
    """With REPA's projectors on the image tokens after joint block `encoder_depth`; keeps the image's q and k."""

    def __init__(self, encoder_depth, z_dims, projector_dim, **sizes):
        super().__init__(pooled_dim=0, time_scale=1, **sizes)
        self.encoder_depth, width = encoder_depth, sizes["hidden_size"]
        self.projectors = nn.ModuleList([nn.Sequential(
            nn.Linear(width, projector_dim), nn.SiLU(), nn.Linear(projector_dim, projector_dim), nn.SiLU(),
            nn.Linear(projector_dim, z_dim)) for z_dim in z_dims])

    def forward(self, x_t, t, context):
        text, h, c = self.embed(x_t, t, context)
        self.streams = []
        for depth, block in enumerate(self.blocks, start=1):
            text, h = block(text, h, c)
            self.streams.append((text, h))
            if depth == self.encoder_depth:
                z_hats = [projector(h) for projector in self.projectors]
        return self.head(h, c, x_t.shape[-2:]), z_hats


def aligned(config):
    width = config.get("hidden_size", config["depth"] * config.get("head_dim", 32))
    z_dims = config.get("z_dims", [config.get("z_dim")])
    return AlignedMMDiT(config["encoder_depth"], z_dims, config["projector_dim"], in_channels=config["in_channels"],
                        hidden_size=width, depth=config["depth"], num_heads=config["num_heads"], context_dim=768,
                        pos_embed_size=config["input_size"] // 2, mlp_ratio=config["mlp_ratio"])


def test_repa_text_to_image():
    config, model = REPA.config, REPA.fill(aligned(REPA.config))
    x, t, noise, context, z = (REPA.input(name) for name in ("x0", "t", "noise", "context", "zs.0"))
    v, (z_hat,) = model(x, t, context)
    REPA.check("v", v)
    REPA.check("zs.0", z_hat)
    (text, h), (_, last) = model.streams
    REPA.check("joint.0.x", h)
    REPA.check("joint.0.context", text)
    REPA.check("joint.1.x", last)

    velocity, proj = repa_loss(model, x, t, noise, context, [z])
    loss = (velocity + config["proj_coeff"] * proj).mean()
    REPA.check("linear/denoising_loss", velocity)
    REPA.check("linear/proj_loss", proj.mean())
    REPA.check("linear/loss", loss)
    loss.backward()
    parameters = dict(model.named_parameters())
    for name in config["grad_names"]:
        REPA.check(f"linear/grad/{name}", parameters[name].grad)
    REPA.check("linear/grad_norm", nn.utils.get_total_norm([p.grad for p in model.parameters()]))

    null = REPA.input("null_context").expand_as(context)
    options = dict(num_steps=config["num_steps"], cfg_scale=config["cfg_scale"], guidance_low=config["guidance_low"],
                   guidance_high=config["guidance_high"])
    plain = functools.partial(MMDiT.forward, model)
    REPA.check("ode_euler_cfg", sample(plain, noise, context, null, **options))
    kicks = iter(REPA.input("sde_noise"))
    REPA.check("sde_em_cfg", sample(plain, noise, context, null, mode="sde", randn=lambda *shape: next(kicks),
                                    **options))
    REPA.assert_all_checked()


def test_names_and_shapes_of_repa_s_full_size():
    with torch.device("meta"):
        model = aligned(dict(encoder_depth=8, z_dims=[768], projector_dim=2048, in_channels=4, hidden_size=768,
                             depth=24, num_heads=24, input_size=32, mlp_ratio=4.0))
    assert state_shapes(model) == official_keys("repa_mmdit_24")


def test_haste_text_to_image():
    config, model = HASTE.config, HASTE.fill(aligned(HASTE.config))
    x, t, noise, context = (HASTE.input(name) for name in ("x0", "t", "noise", "context"))
    x_t, _ = interpolate(x, noise, t)
    HASTE.check("forward/x_t", x_t)
    qkv = {}
    for i in config["student_layers"]:
        model.joint_blocks[i].x_block.attn.qkv.register_forward_hook(
            lambda module, inputs, out, i=i: qkv.update({i: out.unflatten(2, (3, config["num_heads"], -1))}))
    v, (z_hat,) = model(x_t, t, context)
    HASTE.check("forward/v", v)
    HASTE.check("forward/zs", z_hat)
    q, k = (torch.stack([qkv[i][:, :, part].transpose(1, 2) for i in config["student_layers"]]) for part in (0, 1))
    logits = q @ k.mT / q.shape[-1] ** 0.5  # (pairs,B,heads,N,N), of image tokens alone
    step, heads = config["logit_slice"], config["teacher_heads"]
    HASTE.check("forward/attn_logits_sub", logits[..., ::step, ::step])
    teacher = (HASTE.input("teacher_q") @ HASTE.input("teacher_k").mT).softmax(dim=-1)
    cross_entropies = -(teacher * F.log_softmax(logits[:, :, :heads], dim=-1)).sum(-1).mean(dim=(1, 2, 3))
    HASTE.check("forward/ce_per_layer", cross_entropies)

    # Both phases with REPA's loss: the attention term, which haste.py owns, is added here as it is written above.
    velocity, proj = repa_loss(model, x, t, noise, context, [HASTE.input("proj_s")])
    HASTE.check("phase1/denoising_loss", velocity)
    HASTE.check("phase1/proj_loss", proj.mean())
    HASTE.check("phase1/attn_loss", cross_entropies.mean())
    total = (velocity + config["proj_coeff"] * proj).mean() + config["attn_coeff"] * cross_entropies.mean()
    HASTE.check("phase1/total_loss", total)
    HASTE.check("phase2/denoising_loss", velocity)
    HASTE.check("phase2/total_loss", velocity.mean())
    parameters = dict(model.named_parameters())
    for phase, loss in (("phase1", total), ("phase2", velocity.mean())):
        model.zero_grad()
        loss.backward(retain_graph=True)
        for name in config["grad_params"]:
            if f"{phase}/grad/{name}" in HASTE.outputs:
                HASTE.check(f"{phase}/grad/{name}", parameters[name].grad)


@pytest.mark.parametrize("name", HASTE.config["samplers"])
def test_haste_samplers(name):
    model, options = HASTE.fill(aligned(HASTE.config)), HASTE.config["samplers"][name]
    kicks = iter(HASTE.input("sde_noise").double())
    x = sample(functools.partial(MMDiT.forward, model), HASTE.input("xT"), HASTE.input("ctx_s"),
               HASTE.input("ctx_null"), randn=lambda *shape: next(kicks), **options)
    HASTE.check(f"sample/{name}/x", x)


def test_every_output_of_haste_was_compared():
    HASTE.assert_all_checked()


# ----------------------------------------------------------------------------------------------------------------------
# Properties


def test_text_has_no_order_and_images_need_not_be_square():
    model = SD3.fill(small_sd3(SD3.config))
    x, t, context, pooled = (SD3.input(name) for name in ("x", "t", "context", "pooled"))
    v = model(x, t / 1000, context, pooled)
    assert v.shape == x.shape == (3, 4, 8, 12) and v.dtype == torch.float32
    torch.testing.assert_close(model(x, t / 1000, context.flip(1), pooled), v, rtol=0, atol=2e-4)
    assert (model(x.mT.contiguous(), t / 1000, context, pooled).mT - v).abs().max() > 0.1  # places are told apart


def test_the_last_text_output_is_not_used_and_everything_else_is():
    model = SD3.fill(small_sd3(SD3.config))
    model(SD3.input("x"), SD3.input("t") / 1000, SD3.input("context"), SD3.input("pooled")).square().mean().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []
    assert not any("2.context_block" in name and ("proj" in name or "mlp" in name) for name in model.state_dict())

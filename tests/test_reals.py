"""reals.py: its fixture (SD-VAE, LPIPS, discriminator, alignment, the total), names, exact resume, ranks, its files."""
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import prepare
import reals
import repa
from golden_utils import Fixture, official_keys, state_shapes
from support.dataset import PreparedData, clean_input, images_to_input
from support.lpips import LPIPS, load_lpips
from support.vae import AutoencoderKL, load_decoder, load_trained_vae, pixels_to_uint8
from test_clip import ldm_name
from test_training import (  # noqa: F401
    TORCHRUN,
    as_a_fresh_process,
    assert_same_run,
    command,
    finish,
    last,
    make_data,
    relative_error,
    start,
)
from two_ranks import record

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = Fixture("reals")
CONFIG = GOLDEN.config
SIZES = dict(widths=tuple(CONFIG["block_out_channels"]), layers=CONFIG["layers_per_block"],
             groups=CONFIG["norm_num_groups"], latent_channels=CONFIG["latent_channels"])


# ----------------------------------------------------------------------------------------------------------------------
# The fixture: outputs of the official codes, and of the formulas where there is none


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture
def images():
    return GOLDEN.input("images_raw").tanh()


@pytest.fixture
def other():
    return GOLDEN.input("other_raw").tanh()


@pytest.fixture
def model():
    model = reals.ReaLS(SIZES, CONFIG["feature_dim"], CONFIG["latent"], CONFIG["align_hidden"])
    return GOLDEN.fill(model)  # its names are the fixture's: vae.* and align.*


@pytest.fixture
def lpips():
    return GOLDEN.fill(LPIPS(CONFIG["lpips_channels"]), "lpips.")


@pytest.fixture
def disc():
    return GOLDEN.fill(reals.PatchDiscriminator(CONFIG["disc_ndf"], CONFIG["disc_layers"]), "disc.").train()


def targets():
    return GOLDEN.input("teacher_cls"), GOLDEN.input("teacher_patch")


def check_gradients(group, model, *names):
    for name in names:
        GOLDEN.check(f"{group}/grad/{name}", model.get_parameter(name).grad)


def test_autoencoder(model, images):
    x_hat, mean, std, z, *_ = model(images, GOLDEN.input("eps"))
    for name, value in dict(mean=mean, logvar=2 * std.log(), z=z, recon=x_hat,
                            kl_per_sample=reals.kl_loss(mean, std)).items():
        GOLDEN.check(f"vae/{name}", value)


def test_lpips(lpips, images, other):
    other.requires_grad_()
    value = lpips(images, other)
    value.sum().backward()
    GOLDEN.check("lpips/value", value)
    GOLDEN.check("lpips/grad/other_images", other.grad)
    GOLDEN.check("lpips/relu_mean_abs", torch.stack([f.abs().mean() for f in lpips.features(images)]))


def test_lpips_of_full_width(images, other):
    lpips = GOLDEN.fill(LPIPS(), "lpips_full.")
    GOLDEN.check("lpips_full/value", lpips(images, other))
    GOLDEN.check("lpips_full/relu_mean_abs", torch.stack([f.abs().mean() for f in lpips.features(images)]))


def test_discriminator(disc, images, other):
    real, fake = disc(images), disc(other)
    loss = reals.hinge_loss(real, fake)
    loss.backward()
    for name in ("main.0.weight", "main.11.bias"):
        GOLDEN.check(f"disc/grad/disc.{name}", disc.get_parameter(name).grad)
    GOLDEN.check("disc/hinge_loss", loss)
    for name in ("running_mean", "running_var"):  # after a pass of real images and one of fakes
        GOLDEN.check(f"disc/after/main.3.{name}", disc.get_buffer(f"main.3.{name}"))
    GOLDEN.check("disc/logits_real", real)
    GOLDEN.check("disc/logits_fake", fake)


def test_alignment(model, images):
    *_, z, patches, cls = model(images, GOLDEN.input("eps"))
    z.retain_grad()
    z_cls, z_patches = targets()
    loss = reals.align_loss(patches, cls, z_patches, z_cls)[0].mean()
    loss.backward()
    GOLDEN.check("align/patch_pred", patches)
    GOLDEN.check("align/cls_pred", cls)
    GOLDEN.check("align/loss", loss)
    GOLDEN.check("align/grad/z", z.grad)
    check_gradients("align", model, "align.patch.0.weight", "align.cls.4.bias", "vae.encoder.conv_out.weight")
    # The four terms, from the loss of inputs of which two terms are zero: a perfect class token, perfect patches.
    only_patch, cosine = reals.align_loss(patches, z_cls, z_patches, z_cls)
    only_cls, _ = reals.align_loss(z_patches, cls, z_patches, z_cls)
    GOLDEN.check("align/patch_cos_loss", (1 - cosine).mean())
    smooth = F.smooth_l1_loss(patches, z_patches), F.smooth_l1_loss(cls, z_cls)
    GOLDEN.check("align/patch_smooth_l1", smooth[0])
    GOLDEN.check("align/cls_smooth_l1", smooth[1])
    GOLDEN.check("align/patch_cos_loss", (only_patch.mean() - 0.1 * smooth[0]) / 0.9)
    GOLDEN.check("align/cls_cos_loss", (only_cls.mean() - 0.1 * smooth[1]) / 0.9)
    twice = reals.align_loss(patches, cls, z_patches, z_cls, cls_coeff=2.0)[0]
    torch.testing.assert_close(twice, only_patch + 2 * only_cls)


@pytest.fixture
def coefficients():
    return reals.Config(perceptual_coeff=CONFIG["perceptual_weight"], kl_coeff=CONFIG["kl_weight"],
                        disc_coeff=CONFIG["disc_weight"], align_coeff=CONFIG["align_coeff"])


def test_total(model, lpips, disc, images, coefficients):
    disc.requires_grad_(False)
    _, terms = reals.reals_loss(model, images, GOLDEN.input("eps"), *targets(), lpips, disc)
    loss = reals.total_loss(coefficients, terms).mean()
    loss.backward()
    for ours, theirs in (("mse", "mse"), ("lpips", "lpips"), ("kl", "kl"), ("gan", "g_loss")):
        GOLDEN.check(f"terms/{theirs}", terms[ours].mean())
    GOLDEN.check("total_const/loss", loss)
    check_gradients("total_const", model, "vae.encoder.conv_out.weight", "vae.decoder.conv_out.weight",
                    "vae.quant_conv.weight", "align.patch.4.weight", "vae.encoder.conv_in.weight")
    assert all(p.grad is None for p in (*disc.parameters(), *lpips.parameters()))


def test_every_output_in_scope_was_compared():
    """Out of scope: VA-VAE's and REPA-E's own losses, and adaptive weights with their ratios."""
    GOLDEN.assert_all_checked(but=["vavae/", "repae_", "total_adaptive/", "terms/adaptive_"])


# ----------------------------------------------------------------------------------------------------------------------
# Names and sizes


def test_f8d4_is_the_sd_vae():
    with torch.device("meta"):
        vae = AutoencoderKL(**reals.MODELS["f8d4"])
    assert state_shapes(vae) == official_keys("sd_vae_ft_ema")


def test_discriminator_has_the_published_size():
    disc = reals.PatchDiscriminator()
    assert round(sum(p.numel() for p in disc.parameters()) / 1e6, 2) == 2.77
    assert disc(torch.zeros(2, 3, 64, 64)).shape == (2, 1, 6, 6)
    norms = [m for m in disc.main if isinstance(m, torch.nn.BatchNorm2d)]
    convs = [m for m in disc.main if isinstance(m, torch.nn.Conv2d)]
    assert [conv.bias is None for conv in convs] == [False, True, True, True, False] and len(norms) == 3
    assert all(0.018 < conv.weight.std() < 0.022 for conv in convs) and all(norm.bias.eq(0).all() for norm in norms)
    assert all(0.9 < norm.weight.mean() < 1.1 and 0.005 < norm.weight.std() < 0.04 for norm in norms)


def write_lpips(folder):
    """Both public files with random weights, in their older format, the VGG's with its classifier."""
    torch.manual_seed(0)
    lpips = LPIPS()
    lins = {name: w.abs() for name, w in lpips.state_dict().items() if name.startswith("lin")}
    assert {name: tuple(w.shape) for name, w in lins.items()} == {
        f"lin{k}.model.1.weight": (1, c, 1, 1) for k, c in enumerate((64, 128, 256, 512, 512))}
    lpips.load_state_dict(lins, strict=False)
    vgg = {f"features.{name.split('.', 2)[2]}": w for name, w in lpips.state_dict().items() if name.startswith("net.")}
    vgg["classifier.0.bias"] = torch.zeros(3)
    for name, weights in (("vgg16.pth", vgg), ("lpips.pth", lins)):
        torch.save(weights, folder / name, _use_new_zipfile_serialization=False)
    return lpips


@pytest.fixture(scope="module")
def lpips_files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lpips")
    return folder / "vgg16.pth", folder / "lpips.pth", write_lpips(folder)


def test_lpips_is_frozen_and_reads_the_public_files(lpips_files):
    import torchvision
    vgg, lin, wanted = lpips_files
    lpips = load_lpips(str(vgg), str(lin))
    assert not lpips.training and not any(p.requires_grad for p in lpips.parameters())
    assert all(torch.equal(a, b) for a, b in zip(lpips.state_dict().values(), wanted.state_dict().values()))
    with torch.device("meta"):
        theirs = torchvision.models.vgg16()
    convs = {name for name in theirs.state_dict() if name.startswith("features.")}
    assert convs == {name for name in torch.load(vgg, weights_only=True) if name.startswith("features.")}
    x, y = torch.rand(2, 1, 3, 32, 32) * 2 - 1
    assert lpips(x, x).item() == 0 and torch.equal(lpips(x, y), lpips.train()(x, y))  # no dropout in it
    features = torchvision.models.vgg16().eval()
    features.features.load_state_dict({n.removeprefix("features."): w for n, w in torch.load(
        vgg, weights_only=True).items() if n.startswith("features.")})
    h, expected = (x - lpips.shift) / lpips.scale, []
    for i, layer in enumerate(features.features[:30]):
        h = layer(h)
        expected += [h] * (i in (3, 8, 15, 22, 29))
    for ours, theirs in zip(lpips.features(x), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


# ----------------------------------------------------------------------------------------------------------------------
# The probe, and where the alignment acts


def test_ridge_probe():
    g = torch.Generator().manual_seed(0)
    labels = torch.randint(4, (400,), generator=g)
    z = torch.randn(400, 2, 16, 16, generator=g)
    z[:, :, 8:, 8:] += F.one_hot(labels, 4).float().view(-1, 1, 2, 2).repeat_interleave(4, 2).repeat_interleave(4, 3)
    found = reals.ridge_probe(100 * z[:300] + 7, labels[:300], 100 * z[300:] + 7, labels[300:])  # any scale and shift
    assert found > 0.95 and found == reals.ridge_probe(z[:300], labels[:300], z[300:], labels[300:])
    assert reals.ridge_probe(z[:300], labels[:300], z[300:], labels[300:].roll(1)) < 0.5


def test_heads_see_the_latent_averaged_to_the_teacher_s_grid():
    torch.manual_seed(0)
    heads = reals.AlignHeads(4, 8, 16)
    z = torch.randn(2, 4, 8, 8)
    patches, cls = heads(z, 4)
    assert patches.shape == (2, 16, 8) and cls.shape == (2, 8)
    torch.testing.assert_close(patches[:, 6], heads.patch(z[:, :, 2:4, 4:6].mean(dim=(2, 3))))  # row 1, column 2
    torch.testing.assert_close(cls, heads.cls(z.mean(dim=(2, 3))))


def test_gradients_reach_encoder_decoder_and_both_heads(model, images):
    _, terms = reals.reals_loss(model, images, GOLDEN.input("eps"), *targets())
    terms["align"].mean().backward()
    reached = {name: p.grad is not None and p.grad.abs().sum() > 0 for name, p in model.named_parameters()}
    assert all(reached[name] for name in reached if name.startswith("align.") or "encoder.conv_out" in name)
    assert not any(reached[name] for name in reached if "decoder" in name)  # the alignment does not touch it


# ----------------------------------------------------------------------------------------------------------------------
# Runs

STEPS = 8


def parsed(argv):
    return reals.parse(argv, reals.Config, reals.MODELS, reals.RECIPES, reals.RANGES)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("reals")


@pytest.fixture(scope="module")
def data(home):
    return make_data(home / "data")


def flags(data, out, steps, *more):
    more = ["--probe-images", "16", *more]
    return command(data, out, steps, *more)


GAN = ["--disc-coeff", "0.1", "--disc-start", "3"]  # acts from step 4 on


def main(arguments):
    return reals.main([str(a) for a in arguments])


@pytest.fixture(scope="module")
def trained(data, home):
    """Eight steps with the GAN on from the fourth."""
    main(flags(data, home / "trained", STEPS, *GAN))
    return home / "trained"


def test_half_and_half_is_the_whole(data, home, trained):
    """Also the discriminator's weights, statistics and moments."""
    for steps in (5, STEPS):
        main(flags(data, home / "halves", steps, *GAN))
    assert_same_run(home / "halves", trained)
    ours, theirs = last(home / "halves"), last(trained)
    for part in ("disc", "optimizer_d"):
        assert str(ours[part]) == str(theirs[part])
    moved = ours["disc"]["main.0.weight"] - reals.build(parsed(["--align-coeff", "0"]), reals.setup(
        parsed([])))[2].main[0].weight
    assert moved.abs().sum() > 0


def test_the_discriminator_rests_until_its_step(data, home):
    main(flags(data, home / "rests", 3, *GAN, "--log-every", 1))
    checkpoint = last(home / "rests")
    assert checkpoint["optimizer_d"]["state"] == {} and checkpoint["disc"]["main.3.num_batches_tracked"] == 0
    lines = [json.loads(line) for line in (home / "rests/log.jsonl").read_text().splitlines()]
    assert all(line["gan"] == line["loss_disc"] == 0 for line in lines)


def test_a_pass_of_the_discriminator_for_real_images_and_one_for_fakes(data, home, monkeypatch):
    """And one in the autoencoder's own step, with no gradient for the discriminator."""
    calls, forward = [], reals.PatchDiscriminator.forward
    monkeypatch.setattr(reals.PatchDiscriminator, "forward", lambda self, x: calls.append(
        (len(x), x.requires_grad, self.main[0].weight.requires_grad, self.training)) or forward(self, x))
    main(flags(data, home / "passes", 1, "--disc-coeff", 0.1, "--disc-start", 0, "--micro-batch", 4))
    assert calls == 2 * [(4, True, False, True), (4, False, True, True), (4, False, True, True)]


def test_adversarial_gradients_are_the_formula_s(data, home):
    """One step of each network on one batch, from the weights of a checkpoint."""
    main(flags(data, home / "gan-step", 1, "--disc-coeff", 0.1, "--disc-start", 0, "--flip-prob", 0,
               "--max-grad-norm", 1e9))
    cfg = parsed([str(a) for a in flags(data, home / "x", 1, "--disc-coeff", 0.1, "--flip-prob", 0)])
    run = reals.setup(cfg)
    teacher, model, disc, _ = reals.build(cfg, run)
    batch = next(reals.micro_batches(PreparedData(data, 16), 0, 8, run))
    x = batch["images"].permute(0, 3, 1, 2) / 127.5 - 1
    normal, _ = reals.step_draws(0, 1, 8, run)
    x_hat, mean, std, _, patches, cls = model(x, normal(4, 8, 8))
    z_cls, z_patches = teacher(batch["images"])
    align = reals.align_loss(patches, cls, z_patches, z_cls)[0].mean()
    kl = 0.5 * (mean**2 + std**2 - 1 - (std**2).log()).sum() / 8
    generator = (x_hat - x).square().mean() + 1e-5 * kl + 0.5 * align - 0.1 * disc(x_hat).mean()
    discriminator = 0.5 * (F.relu(1 - disc(x)).mean() + F.relu(1 + disc(x_hat.detach())).mean())
    checkpoint = last(home / "gan-step")
    for network, loss, key in ((model, generator, "optimizer"), (disc, discriminator, "optimizer_d")):
        gradients = torch.autograd.grad(loss, list(network.parameters()), retain_graph=True)
        for i, gradient in enumerate(gradients):  # after one step Adam's first moment is half the gradient
            moment = checkpoint[key]["state"][i]["exp_avg"]
            torch.testing.assert_close(moment, 0.5 * gradient, rtol=1e-3, atol=1e-7)


@pytest.fixture(scope="module")
def two_ranks(data, home, trained):
    folder = home / "two"
    folder.mkdir()
    jobs = {"gradients": dict(script="reals", args=flags(data, folder / "gradients", 4, "--init", trained / "last.pt",
                                                         "--seed", 1)),
            "gan": dict(script="reals", args=flags(data, folder / "gan", 5, *GAN, "--disc-start", 0)),
            "sample": dict(script="reals", args=rebuilding(data, trained / "vae.pt", folder / "sample"))}
    (folder / "jobs.json").write_text(json.dumps(jobs, default=str))
    code, _, stderr = finish(start([*TORCHRUN, ROOT / "tests/two_ranks.py", folder]))
    assert code == 0, stderr
    return folder


def rebuilding(data, ckpt, out, *more):
    return [str(a) for a in ("--data", data, "--ckpt", ckpt, "--out", out, "--sample", 6, "--batch-size", 6, *more)]


@pytest.mark.parametrize("way", ["micro-batches", "two ranks"])
def test_the_same_gradients(way, data, home, trained, request):
    """Without the GAN, whose BatchNorm takes its statistics by pass and rank."""
    more = ["--init", trained / "last.pt", "--seed", 1]
    whole = record([str(a) for a in flags(data, home / f"{way}-whole", 4, *more)], script="reals")
    if way == "two ranks":
        parts = torch.load(request.getfixturevalue("two_ranks") / "gradients-0.pt")
    else:
        parts = record([str(a) for a in flags(data, home / "parts", 4, *more, "--micro-batch", 2)], script="reals")
    assert whole["exit"] is None and parts["exit"] is None and whole["steps"] == parts["steps"] == 4
    for a, b in zip(whole["gradients"], parts["gradients"], strict=True):
        assert b.norm() > 0 and relative_error(a, b) < 1e-4


def test_two_ranks_with_the_gan_agree_with_each_other(two_ranks):
    """Every rank steps alike: gradients of both networks are averaged, though BatchNorm saw other images."""
    notes = [torch.load(two_ranks / f"gan-{rank}.pt") for rank in (0, 1)]
    assert notes[0]["exit"] is None and notes[0]["steps"] == notes[1]["steps"] == 2 * 5
    assert last(two_ranks / "gan")["disc"]["main.3.num_batches_tracked"] == 3 * 5
    autoencoder, discriminator, _ = notes[0]["gradients"]
    assert len(autoencoder) > 5 * len(discriminator) > 0
    for a, b in zip(notes[0]["gradients"], notes[1]["gradients"], strict=True):
        assert torch.equal(a, b) and b.norm() > 0


def test_reconstructions_do_not_depend_on_batch_or_ranks(data, home, trained, two_ranks):
    whole = np.load(main(rebuilding(data, trained / "vae.pt", home / "rebuilt")))
    parts = np.load(main(rebuilding(data, trained / "last.pt", home / "rebuilt-2", "--micro-batch", 2)))
    pair = np.load(two_ranks / "sample/reconstructions.npz")
    assert whole["arr_0"].shape == (6, 16, 16, 3) and whole["arr_0"].std() > 1
    images, labels = np.load(data / "images.npy")[1::2], np.load(data / "labels.npy")[1::2]
    rows = np.linspace(0, len(labels) - 1, 6).astype(int)
    assert whole["labels"].tolist() == labels[rows].tolist()
    vae = load_trained_vae(trained / "vae.pt")
    with torch.no_grad():
        expected = vae.decode(vae.encode(torch.from_numpy(images[rows]).permute(0, 3, 1, 2) / 127.5 - 1)[0])
    for found in (whole, parts, pair):
        difference = found["arr_0"].astype(int) - pixels_to_uint8(expected).numpy()
        assert abs(difference).max() <= 1 and (difference == 0).mean() > 0.99
    assert (home / "rebuilt/reconstructions.png").stat().st_size > 1000


def test_figures_and_statistics(data, trained):
    """What a run writes at its end, computed again from its file."""
    saved = torch.load(trained / "vae.pt", weights_only=True)
    cfg = parsed([str(a) for a in flags(data, trained, STEPS)])
    figures = json.loads((trained / f"figures-{STEPS}.json").read_text())
    images, labels, test_images, test_labels = reals.probe_sets(cfg)
    assert len(images) == len(test_images) == 16
    pairs = [{image.numpy().tobytes() for image in part} for part in (images, test_images)]
    assert not pairs[0] & pairs[1]
    vae = load_trained_vae(trained / "vae.pt")
    with torch.no_grad():
        (mean, std), (test_mean, _) = (vae.encode(images_to_input(part)) for part in (images, test_images))
        x_hat = vae.decode(test_mean).clamp(-1, 1)
    mse = (x_hat - images_to_input(test_images)).square().mean(dim=(1, 2, 3))
    assert figures["psnr"] == pytest.approx((10 * torch.log10(4 / mse)).mean().item(), abs=1e-3)
    assert figures["probe"] == reals.ridge_probe(mean, labels, test_mean, test_labels)
    assert figures.keys() == {"step", "psnr", "probe", "latent_std", "align_cosine"}
    spread = (mean.var(dim=(0, 2, 3)) + std.square().mean(dim=(0, 2, 3))).sqrt()  # of sampled latents, not of means
    torch.testing.assert_close(torch.tensor(saved["latent_std"]), spread, rtol=0.1, atol=0)
    torch.testing.assert_close(torch.tensor(saved["latent_mean"]), mean.mean(dim=(0, 2, 3)), rtol=0,
                               atol=0.15 * spread.max().item())
    assert figures["latent_std"] == pytest.approx(np.mean(saved["latent_std"]), rel=1e-6)
    assert set(saved["vae"]) == set(state_shapes(AutoencoderKL(**reals.MODELS["toy"])))


def test_held_out_images_are_those_of_val(data, home):
    import shutil
    copy = home / "with-val"
    shutil.copytree(data, copy)
    shutil.copytree(data, copy / "val")
    np.save(copy / "val/images.npy", 255 - np.load(data / "images.npy"))
    _, _, images, _ = reals.probe_sets(parsed(["--data", str(copy), "--probe-images", "1000"]))
    assert len(images) == 100 and torch.equal(images, torch.from_numpy(255 - np.load(data / "images.npy")))


def test_without_alignment_no_teacher_is_needed(data, home):
    import shutil
    copy = home / "no-teacher"
    shutil.copytree(data, copy)
    (copy / "teacher.pt").unlink()
    main(flags(copy, home / "plain", 2, "--align-coeff", 0))
    assert not any(name.startswith("align.") for name in last(home / "plain")["model"])
    assert "align_cosine" not in json.loads((home / "plain/figures-2.json").read_text())


def test_mirrored_images_are_mirrored_for_all(data, home):
    """Mirrored data, not flipped, are the data flipped: for the autoencoder and for the teacher."""
    import shutil
    copy = home / "mirrored"
    shutil.copytree(data, copy)
    np.save(copy / "images.npy", np.load(data / "images.npy")[:, :, ::-1])
    main(flags(copy, home / "flip-0", 2, "--flip-prob", 0))
    main(flags(data, home / "flip-1", 2, "--flip-prob", 1))
    main(flags(data, home / "flip-half", 2, "--flip-prob", 0.5))
    a, b, c = (last(home / name)["model"]["vae.encoder.conv_in.weight"] for name in ("flip-0", "flip-1", "flip-half"))
    assert torch.equal(a, b) and not torch.equal(a, c)


def test_lpips_acts_and_is_no_part_of_the_checkpoint(data, home, lpips_files):
    vgg, lin, _ = lpips_files
    args = flags(data, home / "lpips", 1, "--perceptual-coeff", 1, "--vgg-ckpt", vgg, "--lpips-ckpt", lin)
    main(args)
    line = json.loads((home / "lpips/log.jsonl").read_text())
    assert line["lpips"] > 0 and line["loss"] == pytest.approx(
        line["mse"] + line["lpips"] + 1e-5 * line["kl"] + 0.5 * line["align"], rel=1e-4)
    assert json.loads((home / "lpips/figures-1.json").read_text())["lpips"] > 0
    assert not any("slice" in name or "lin0" in name for name in last(home / "lpips")["model"])


def test_bf16_networks_and_fp32_losses(data, home):
    """The latent is not rounded to bf16, though the networks run in it."""
    cfg = parsed([str(a) for a in flags(data, home / "x", 1)])
    run = reals.setup(cfg)
    model = reals.build(cfg, run)[1]
    x, noise = torch.rand(2, 3, 16, 16) * 2 - 1, torch.randn(2, 4, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        x_hat, terms = reals.reals_loss(model, x, noise, torch.randn(2, 32), torch.randn(2, 16, 32))
        _, mean, std, z, *_ = model(x, noise)
    assert {value.dtype for value in (x_hat, mean, std, z, *terms.values())} == {torch.float32}
    assert not torch.equal(mean, mean.bfloat16().float())
    assert not torch.equal(x_hat, model(x, noise)[0])  # bf16 it was
    main(flags(data, home / "bf16", 1, "--precision", "bf16"))


def test_bench_writes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    make_data(tmp_path / "data/toy")
    main(["--bench", "2", "--batch-size", "4", "--init", "ft-ema"])
    assert "images_per_s" in capsys.readouterr().out and not (tmp_path / "runs").exists()


# ----------------------------------------------------------------------------------------------------------------------
# Where it begins: names, files


@pytest.mark.parametrize("form", ["vae.pt", "last.pt", "diffusers", "old names", "LDM", "LDM checkpoint"])
def test_init(form, trained, tmp_path):
    weights = torch.load(trained / "vae.pt", weights_only=True)["vae"]
    path, model = tmp_path / "file.pt", reals.ReaLS(reals.MODELS["toy"], 32, 4, 256)
    ldm = {ldm_name(name): w[:, :, None, None] if "to_" in name and w.ndim == 2 else w
           for name, w in weights.items()}
    if form.endswith(".pt"):
        path = trained / form
    elif form == "diffusers":
        torch.save(weights, path)
    elif form == "old names":
        from test_vae import old_names
        torch.save(old_names(weights), path)
    else:
        is_whole = form == "LDM checkpoint"
        torch.save(dict(state_dict=ldm | {"loss.logvar": torch.zeros(())}) if is_whole else ldm, path)
    fresh = reals.init_autoencoder(str(path), model)
    assert fresh == ([] if form == "last.pt" else ["align"])
    assert all(torch.equal(w, weights[name]) for name, w in model.vae.state_dict().items())


def test_init_is_said_and_begins_the_run(data, trained, home, capsys):
    main(flags(data, home / "init", 1, "--init", trained / "vae.pt", "--learning-rate", 0))
    assert f"started from {trained / 'vae.pt'}; left fresh: align" in capsys.readouterr().out
    assert torch.equal(last(home / "init")["ema"]["vae.encoder.conv_in.weight"],
                       torch.load(trained / "vae.pt", weights_only=True)["vae"]["encoder.conv_in.weight"])


def test_init_by_name_asks_the_hub(monkeypatch):
    asked = []
    monkeypatch.setattr(reals, "load_vae", lambda name: asked.append(name) or AutoencoderKL(**reals.MODELS["toy"]))
    fresh = reals.init_autoencoder("ft-mse", reals.ReaLS(reals.MODELS["toy"], 8, 4, 8))
    assert fresh == ["align"] and asked == ["ft-mse"]


# ----------------------------------------------------------------------------------------------------------------------
# Other scripts train on the latents


def test_others_train_on_the_latents(data, home, trained, tmp_path, capsys):
    """reals.py -> prepare.py --from -> repa.py -> samples, decoded by the autoencoder; with its scale and shift."""
    out = tmp_path / "latents"
    prepare.main(["--from", str(data), "--vae", str(trained / "vae.pt"), "--out", str(out)])
    prepared, saved = PreparedData(out, 16), torch.load(trained / "vae.pt", weights_only=True)
    assert prepared.shape == (4, 8, 8) and prepared.meta["downsample"] == 2
    assert prepared.meta["vae_id"] == saved["id"] and saved["id"] in prepared.meta["source"]
    assert np.array_equal(prepared.array("images"), np.load(data / "images.npy"))
    assert (out / "teacher.pt").read_bytes() == (data / "teacher.pt").read_bytes()
    batch = prepared[np.arange(100)]
    vae = load_trained_vae(trained / "vae.pt")
    with torch.no_grad():
        mean, std = vae.encode(images_to_input(batch["images"]))
    noise = torch.randn(mean.shape)
    x = clean_input(batch, prepared.meta, noise)
    a_mean, a_std = [torch.tensor(saved[name]).view(-1, 1, 1) for name in ("latent_mean", "latent_std")]
    torch.testing.assert_close(x, (mean + std * noise - a_mean) / a_std, rtol=5e-3, atol=5e-3)
    assert x.mean(dim=(0, 2, 3)).abs().max() < 0.3 and (x.std(dim=(0, 2, 3)) - 1).abs().max() < 0.3
    decode = load_decoder(prepared.meta, "ft-ema", "", torch.device("cpu"))
    with torch.no_grad():
        z = mean + std * noise
        expected = pixels_to_uint8(vae.decode(z)).int()
        assert (decode((z - a_mean) / a_std).int() - expected).abs().max() <= 1

    for more in (["--proj-coeff", "0"], []):  # without a teacher, and with it: its tokens are toy/2's
        run = tmp_path / f"run{len(more)}"
        repa.main(command(out, run, 3, "--model", "toy/2", *more))
        repa.main(["--model", "toy/2", "--sample", "3", "--ckpt", str(run / "last.pt"), "--num-steps", "2"])
        samples = np.load(run / "samples.npz")["arr_0"]
        assert samples.shape == (3, 16, 16, 3) and samples.std() > 1
    # another autoencoder is not taken for it, and the same one elsewhere is found by --vae-ckpt
    moved = tmp_path / "moved.pt"
    torch.save(saved, moved)
    repa.main(["--model", "toy/2", "--sample", "2", "--ckpt", str(run / "last.pt"), "--num-steps", "2", "--vae-ckpt",
               str(moved)])
    torch.save(saved | dict(id="reals-00000000"), moved)
    with pytest.raises(SystemExit, match=r"moved.pt is another autoencoder \(reals-00000000\) .*--vae-ckpt"):
        repa.main(["--model", "toy/2", "--sample", "2", "--ckpt", str(run / "last.pt"), "--vae-ckpt", str(moved)])


def test_a_run_does_not_continue_on_the_latents_of_another_autoencoder(data, home, trained, tmp_path):
    for name, change in (("a", {}), ("b", dict(id="reals-00000000"))):
        torch.save(torch.load(trained / "vae.pt", weights_only=True) | change, tmp_path / f"{name}.pt")
        prepare.main(["--from", str(data), "--vae", str(tmp_path / f"{name}.pt"), "--out", str(tmp_path / name)])
    repa.main(command(tmp_path / "a", tmp_path / "run", 1, "--model", "toy/2"))
    with pytest.raises(SystemExit, match="holds another run .*encoded by"):
        repa.main(command(tmp_path / "b", tmp_path / "run", 2, "--model", "toy/2"))


# ----------------------------------------------------------------------------------------------------------------------
# Error lines


@pytest.mark.parametrize("bad, message", [
    (["--align-coeff", -1], "--align-coeff -1.0 must lie between 0"),
    (["--disc-layers", 0], "--disc-layers 0 must lie between 1"),
    (["--flip-prob", 2], "--flip-prob 2.0 must lie between 0 and 1"),
    (["--model", "f8"], "unknown --model f8; there are toy, f4d4, f8d4"),
    (["--resolution", 15], "has 16 px, the run 15"),
    (["--disc-coeff", 1, "--disc-layers", 3], "a discriminator of 3 layers is for 32 px and more, not for 16"),
    (["--init", "nowhere.pt"], "no checkpoint nowhere.pt"),
    (["--enc-type", "resnet"], "unknown teacher"),
    (["--teacher-ckpt", "nowhere.pt"], "no teacher nowhere.pt"),
    (["--perceptual-coeff", 1, "--vgg-ckpt", "nowhere.pt"], "cannot read nowhere.pt .*--vgg-ckpt FILE.*coeff 0"),
    (["--sample", 3], "--sample needs --ckpt"),
])
def test_errors(bad, message, data, tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match=message) as error:
        main(flags(data, tmp_path / "run", 1, *bad))
    assert "\n" not in str(error.value) and not (tmp_path / "run/last.pt").exists()


def test_errors_of_lpips_files(tmp_path, lpips_files, monkeypatch):
    vgg, lin, _ = map(str, lpips_files)
    (tmp_path / "text.pth").write_text("hello")
    for files, message in (((vgg, str(tmp_path / "text.pth")), "cannot read .*text.pth .*--lpips-ckpt FILE"),
                           ((vgg, vgg), "do not hold the weights"), ((lin, lin), "do not hold the weights")):
        with pytest.raises(SystemExit, match=message) as error:
            load_lpips(*files)
        assert "--perceptual-coeff 0" in str(error.value) and "\n" not in str(error.value)

    def offline(*args, **options):
        import urllib.error
        raise urllib.error.URLError("no internet")
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", offline)
    for files, flag in ((("", lin), "--vgg-ckpt"), ((vgg, ""), "--lpips-ckpt")):
        with pytest.raises(SystemExit, match=f"{flag} FILE.*--perceptual-coeff 0"):
            load_lpips(*files)


def test_errors_of_other_files(data, trained, tmp_path):
    def refused(call, message):
        with pytest.raises(SystemExit, match=message) as error:
            call()
        assert "\n" not in str(error.value)
    weights = torch.load(trained / "vae.pt", weights_only=True)["vae"]
    torch.save(weights, tmp_path / "bare.pt")
    for more, message in ((["--vae", tmp_path / "bare.pt"], "holds no latent statistics.*--vae-ckpt FILE"),
                          (["--vae", tmp_path / "none.pt"], "neither ft-mse, ft-ema, none nor a file"),
                          (["--vae", "none"], "with which autoencoder")):
        refused(lambda: prepare.main([str(a) for a in ("--from", data, "--out", tmp_path / "x", *more)]), message)
    refused(lambda: prepare.main([str(a) for a in ("--from", tmp_path, "--out", tmp_path / "x", "--vae",
                                                   trained / "vae.pt")]), "is not a prepared data set")
    refused(lambda: prepare.main([str(a) for a in ("--from", data, "--images", data, "--out", tmp_path / "x")]),
            "--from data/OTHER")
    refused(lambda: main(rebuilding(data, trained / "vae.pt", tmp_path / "y", "--model", "f4d4", "--resolution", 16)),
            "does not fit the autoencoder: .* is --model right")
    refused(lambda: main(rebuilding(data, trained / "vae.pt", tmp_path / "y", "--sample", 51)), "has 50 held-out")
    main(flags(data, tmp_path / "run", 1))
    refused(lambda: main(flags(data, tmp_path / "run", 2, "--align-coeff", 0.1)), "holds another run .align_coeff 0.5")
    assert not (tmp_path / "x.partial").exists()


def test_a_teacher_of_another_grid(data, trained, tmp_path):
    refused = pytest.raises(SystemExit, match="8x8 places cannot be averaged to the 16x16")
    import shutil
    shutil.copytree(data, tmp_path / "data")
    from timm.models.vision_transformer import VisionTransformer
    config = dict(img_size=16, patch_size=1, embed_dim=32, depth=1, num_heads=4, num_classes=0)
    torch.save(dict(config=config, model=VisionTransformer(**config).state_dict(), resolution=16),
               tmp_path / "data/teacher.pt")
    with refused:
        main(flags(tmp_path / "data", tmp_path / "run", 1))

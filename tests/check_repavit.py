"""How exact is the fold, and what does it save on this machine? Slow: 2 to 5 minutes each, on one CPU thread.

    python tests/check_repavit.py ffn                      one layer, 4 x 197 tokens, six idle ratios, width 384 and 768
    python tests/check_repavit.py cifar --data FOLDER      whole models of DeiT-Small's and -Base's width at 224 px, on
                                                           pictures of FOLDER/{train,val}/CLASS/*; BatchNorm has the
                                                           statistics of pictures, the weights are random
    python tests/check_repavit.py sit                      idle channels in SiT-S/2 and SiT-B/2 (ours, random weights):
                                                           the sampler, 2 Euler steps, 4 latents, without guidance

The forms of a row take turns, and medians are printed, so that other jobs on the machine slow down all of them. The
differences must stay below 1e-5 of the largest value; the speeds are only printed.
"""
import argparse
import sys
from contextlib import nullcontext
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch  # noqa: E402
import torch.nn as nn  # noqa: E402

import repavit  # noqa: E402
from common import SIT_SIZES, SiT, sample  # noqa: E402
from repavit import MODELS, IdleFFN, IdleSiTBlock, RePaViT, fold, images_per_second, multiply_adds  # noqa: E402
from support.flags import parse  # noqa: E402


def compare(label, forms, inputs, seconds):
    """Print the speeds of vanilla, unfolded and folded form and the difference of the last two; True if it is exact."""
    with torch.no_grad():
        before, after = (form(inputs) for form in forms[1:])
    difference, scale = (after - before).abs().max().item(), before.abs().max().item()
    vanilla, unfolded, folded = (1000 * len(inputs) / speed for speed in images_per_second(
        forms, inputs, nullcontext, seconds))
    print(f"{label}: vanilla {vanilla:.1f} ms, unfolded {unfolded:.1f}, folded {folded:.1f}: {vanilla / folded:.2f} "
          f"times the vanilla speed; difference {difference:.1e} of {scale:.2g}", flush=True)
    return difference < 1e-5 * scale


def randomise(model):
    """BatchNorms as after a training."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d):
            for tensor in (module.weight, module.bias, module.running_mean):
                tensor.data.add_(0.3 * torch.randn_like(tensor))
            module.running_var.copy_(torch.randn_like(module.running_var).mul(0.4).exp())
    return model.eval()


def ffn(cfg):
    for width in (384, 768):
        x = torch.randn(4, 197, width)
        vanilla = IdleFFN(width, 4 * width, 0, "LayerNorm").eval()
        for theta in (0, 0.25, 0.5, 0.75, 0.9, 1):
            layer = randomise(IdleFFN(width, 4 * width, theta))
            with torch.no_grad():
                folded = layer.fold()
            yield compare(f"width {width}, idle {theta}", [vanilla, layer, folded], x, cfg.seconds)


@torch.no_grad()
def cifar(cfg):
    settings = parse(["--model", "RePaViT_Small", "--data", cfg.data, "--augment", "flip"],
                     repavit.Config, MODELS, repavit.RECIPES, repavit.RANGES)
    train, val = (repavit.Images(settings, part) for part in ("train", "val"))
    calibration = torch.stack([train[i, i][0] for i in torch.randperm(len(train))[:32].tolist()])
    images = torch.stack([val[i, 0][0] for i in torch.randperm(len(val))[:4].tolist()])
    for name, theta in (("Small", 0.5), ("Small", 0.75), ("Base", 0.75)):
        model = RePaViT(224, 10, MODELS[f"RePaViT_{name}"], theta).train()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm1d):
                module.momentum = None  # the plain average over what it sees
        for part in calibration.split(8):
            model(part)
        model.eval()
        vanilla, folded = RePaViT(224, 10, MODELS[f"RePaViT_{name}"], 0, "LayerNorm").eval(), fold(model)
        figures = ", ".join(f"{sum(p.numel() for p in form.parameters()) / 1e6:.1f} M "
                            f"{multiply_adds(form) / 1e9:.2f} GMAC" for form in (vanilla, model, folded))
        print(f"{name}, vanilla, unfolded, folded: {figures}")
        yield compare(f"{name}, idle {theta}, 4 images", [vanilla, model, folded], images, cfg.seconds)
        same = (model(calibration).argmax(1) == folded(calibration).argmax(1)).all().item()
        print(f"predictions of {len(calibration)} images: {'the same' if same else 'NOT the same'}")
        yield same


@torch.no_grad()
def sit(cfg):
    for name in ("SiT-S/2", "SiT-B/2"):
        sizes = SIT_SIZES[name]
        for theta in (0.5, 0.75):
            vanilla, model = SiT(**sizes).eval(), SiT(**sizes).eval()
            model.blocks = nn.ModuleList([IdleSiTBlock(sizes["hidden_size"], sizes["num_heads"], theta)
                                          for _ in range(sizes["depth"])])
            for parameter in [p for form in (vanilla, model) for p in form.parameters() if p.requires_grad]:
                parameter.add_(0.02 * torch.randn_like(parameter))  # adaLN-zero would make every velocity 0
            folded, y = fold(model), torch.arange(4)
            counts = [sum(p.numel() for p in form.parameters()) / 1e6 for form in (vanilla, folded)]
            samplers = [lambda noise, form=form: sample(form, noise, y, torch.full_like(y, 1000), num_steps=2)
                        for form in (vanilla, model, folded)]
            yield compare(f"{name}, idle {theta}, {counts[0]:.1f} -> {counts[1]:.1f} M", samplers,
                          torch.randn(4, 4, 32, 32), cfg.seconds)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("check", choices=["ffn", "cifar", "sit"])
    parser.add_argument("--data", default="data/cifar-folders", help="holds train/CLASS/* and val/CLASS/*")
    parser.add_argument("--seconds", type=float, default=15, help="at least, for each row; six turns at least")
    cfg = parser.parse_args()
    torch.manual_seed(0)
    exact = [*dict(ffn=ffn, cifar=cifar, sit=sit)[cfg.check](cfg)]
    print("passed" if all(exact) else "FAILED", "(exactness)")
    raise SystemExit(not all(exact))

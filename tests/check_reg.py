"""Does REG generate class tokens that fit, and does it help? Slow: half a minute, and on the toy 2 minutes a run.

    python tests/check_reg.py --coherence           image and class token of a hidden cluster, both generated, no labels
    python tests/check_reg.py --seeds 0 1 2         the toy, five arms, paired seeds:
        none      repa.py, lambda 0: plain SiT                  repa      repa.py
        token     reg.py, lambda 0: the class token alone       reg       reg.py
        shuffled  reg.py with the class token and the features of ANOTHER image of the batch: the control

All arms of a seed see the same images, noise and times. The rest is as in compare_alignment.py, whose flags it takes;
how the class tokens fit the images at the end of a run of reg.py is printed after it, and kept in its folder.
"""
import copy
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import reg  # noqa: E402
import repa  # noqa: E402
from common import SIT_SIZES, sample  # noqa: E402
from compare_alignment import compare, judged_run  # noqa: E402
from support.flags import parse  # noqa: E402

ARMS = {"none": (repa, 0.0), "repa": (repa, 0.5), "token": (reg, 0.0), "reg": (reg, 0.5), "shuffled": (reg, 0.5)}
true_loss = reg.reg_loss


def shuffled_loss(model, x, cls, t, noise, noise_cls, y, zs, path_type):
    """REG's loss with every image's class token and features taken from its neighbour in the batch."""
    return true_loss(model, x, cls.roll(1, dims=0), t, noise, noise_cls, y, [z.roll(1, dims=0) for z in zs], path_type)


def run_arm(arm, seed, out, samples, flags):
    """One arm's curve; for reg.py also a file beside it that says how the last samples fit their class tokens."""
    script, proj_coeff = ARMS[arm]
    reg.reg_loss = shuffled_loss if arm == "shuffled" else true_loss
    flags = [*flags, "--seed", str(seed), "--proj-coeff", str(proj_coeff)]
    curve = judged_run(script, flags, out, samples)
    if script is reg:
        cfg = parse(flags, reg.Config, SIT_SIZES, reg.RECIPES, reg.RANGES)
        figures = reg.compare_class_tokens(cfg, reg.setup(cfg), out / "samples.npz")[1]
        (out / "class-tokens.txt").write_text(figures + "\n")
        print(f"{arm}, seed {seed}: {figures}")
    return curve


def coherence(steps=1200, every=300, clusters=16, cls_dim=16, batch=96, lambda_=0.5):
    """Train on images and class tokens of hidden clusters, without labels; do generated pairs name the same cluster?

    A cluster has a smooth template (4,8,8) and a random code (16); an image is its template + 0.35 noise, a class token
    its code + 0.1 noise, and the teacher's features are a random linear map of the template's patches.
    """
    g = torch.Generator().manual_seed(0)
    templates = F.interpolate(torch.randn(clusters, 4, 3, 3, generator=g), 8, mode="bicubic", align_corners=True)
    codes = torch.randn(clusters, cls_dim, generator=g)
    patches = F.unfold(templates, 4, stride=4).mT  # (clusters,4,64)
    features = patches @ torch.randn(64, cls_dim, generator=g) / 8
    torch.manual_seed(0)
    sizes = dict(hidden_size=48, depth=4, num_heads=4, patch_size=4)
    model = reg.REGSiT(8, 4, 1, sizes, 2, cls_dim, [cls_dim], 64)
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3, weight_decay=0)
    null, found = torch.ones(512, dtype=torch.long), {}
    for step in range(1, steps + 1):
        k = torch.randint(clusters, (batch,), generator=g)
        x, cls = templates[k], codes[k]
        x = x + 0.35 * torch.randn(x.shape, generator=g)
        cls = cls + 0.1 * torch.randn(cls.shape, generator=g)
        velocity, velocity_cls, proj = true_loss(
            model, x, cls, torch.rand(batch, generator=g), torch.randn(x.shape, generator=g),
            torch.randn(cls.shape, generator=g), null[:batch], [torch.cat([cls.unsqueeze(1), features[k]], dim=1)])
        optimizer.zero_grad()
        (velocity + 0.03 * velocity_cls + lambda_ * proj).mean().backward()
        optimizer.step()
        reg.update_ema(ema, model, 0.99)
        if step % every == 0:
            draws = torch.Generator().manual_seed(1)
            noise = torch.randn(512, 4, 8, 8, generator=draws), torch.randn(512, cls_dim, generator=draws)
            x, cls = sample(ema.velocity, noise, null, null, num_steps=25)
            by_image = torch.cdist(x.flatten(1), templates.flatten(1)).argmin(dim=1)
            by_token = torch.cdist(cls, codes).argmin(dim=1)
            found[step] = (by_image == by_token).double().mean().item()
            print(f"step {step}: {found[step]:.2f} of the pairs name one cluster (chance {1 / clusters:.2f}), "
                  f"{len(by_image.unique())} of {clusters} clusters are drawn", flush=True)
    return found


if __name__ == "__main__":
    if "--coherence" in sys.argv:
        coherent = coherence()[1200] > 0.7
        print("passed" if coherent else "FAILED", "(more than 0.70 at step 1200)")
        raise SystemExit(not coherent)
    compare("check-reg", ARMS, run_arm)

"""Does the student learn to look where the teacher looks, and does that help? Slow: 2 minutes, and 2 a run on the toy.

    python tests/check_haste.py --distillation      KL to a random teacher's attention, three arms, a stop at step 400
    python tests/check_haste.py --seeds 0 1 2       the toy, paired seeds:
        none      repa.py, lambda 0: plain SiT          repa      repa.py
        haste     haste.py                              endless   haste.py that never stops
        shuffled  haste.py with the features and the attention of ANOTHER image of the batch: the control

All arms of a seed see the same images, noise and times. The rest is as in compare_alignment.py, whose flags it takes;
KL(teacher || student) of the attention at every fifth of a run is printed after it, and kept in its folder.
"""
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import haste  # noqa: E402
import repa  # noqa: E402
from common import SIT_SIZES  # noqa: E402
from compare_alignment import compare, judged_run  # noqa: E402
from support.flags import parse  # noqa: E402
from support.teachers import Teacher  # noqa: E402

ARMS = {"none": (repa, ["--proj-coeff", "0"]), "repa": (repa, []), "haste": (haste, []),
        "endless": (haste, ["--early-stop-point", "1000000"]), "shuffled": (haste, [])}
true_loss = haste.haste_loss


def shuffled_loss(model, x, t, noise, y, zs, teacher_logits, path_type="linear"):
    """HASTE's loss with every image's features and maps taken from its neighbour in the batch."""
    zs, teacher_logits = ([a.roll(1, dims=0) for a in targets] for targets in (zs, teacher_logits))
    return true_loss(model, x, t, noise, y, zs, teacher_logits, path_type)


def run_arm(arm, seed, out, samples, flags):
    """One arm's curve; and a file beside it with the KL at the same steps."""
    script, more = ARMS[arm]
    haste.haste_loss = shuffled_loss if arm == "shuffled" else true_loss
    curve = judged_run(script, [*flags, *more, "--seed", str(seed)], out, samples)
    haste.haste_loss = true_loss
    cfg = parse([*flags, "--seed", str(seed)], haste.Config, SIT_SIZES, haste.RECIPES, haste.RANGES)
    run = haste.setup(cfg)
    paths = [out / f"ema-{point['step']}.pt" for point in curve]
    figures = " ".join(f"{haste.attention_kl(cfg, run, path):.4f}" for path in paths)
    (out / "kl.txt").write_text(figures + "\n")
    print(f"{arm}, seed {seed}: KL at every fifth {figures}")
    return curve


def distillation(attn_coeff, proj_coeff, steps=500, stop=400, batch=64):
    """KL every 100 steps, and the mean velocity loss of the last 100 aligned: 16 smooth templates, a random teacher.

    An image is one of 16 smooth templates (4,8,8) + 0.35 noise. The teacher sees it in patches of 2: 16 tokens, 6
    blocks of 3 heads; the student has 6 blocks of 4 heads. Blocks 2 and 3 learn from 4 and 5, features after block 4.
    """
    g = torch.Generator().manual_seed(0)
    templates = F.interpolate(torch.randn(16, 4, 3, 3, generator=g), 8, mode="bicubic", align_corners=True)
    torch.manual_seed(0)
    vit = VisionTransformer(img_size=8, patch_size=2, in_chans=4, embed_dim=48, depth=6, num_heads=3, num_classes=0)
    for block in vit.blocks:
        torch.nn.init.normal_(block.attn.qkv.weight, std=0.25)
    teacher = Teacher(vit, [0.0] * 3, [1.0] * 3, 8, "random")
    teacher.preprocess = lambda images: images
    teacher = haste.AttentionTeacher(teacher, [4, 5], 3)
    sizes = dict(hidden_size=48, depth=6, num_heads=4, patch_size=2)
    model = haste.HASTESiT(8, 4, 16, sizes, 4, [48], 64, [2, 3], 3)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3, weight_decay=0)
    found, velocities = [], []
    for step in range(1, steps + 1):
        k = torch.randint(16, (batch,), generator=g)
        x = templates[k] + 0.35 * torch.randn(batch, 4, 8, 8, generator=g)
        t, noise = torch.rand(batch, generator=g), torch.randn(batch, 4, 8, 8, generator=g)
        velocity, proj, attn, kl = true_loss(model, x, t, noise, k, *teacher(x))
        optimizer.zero_grad()
        is_aligned = step <= stop
        (velocity + is_aligned * (proj_coeff * proj + attn_coeff * attn)).mean().backward()
        optimizer.step()
        velocities += [velocity.mean().item()] * (stop - 100 < step <= stop)
        found += [kl.mean().item()] * (step % 100 == 0)
    return found, sum(velocities) / len(velocities)


if __name__ == "__main__":
    if "--distillation" in sys.argv:
        last = {}
        for name, attn_coeff, proj_coeff in (("HASTE", 0.5, 0.5), ("REPA only", 0.0, 0.5), ("none", 0.0, 0.0)):
            kl, velocity = distillation(attn_coeff, proj_coeff)
            last[name] = kl[3]
            curve = " ".join(f"{value:.2f}" for value in kl)
            print(f"{name}: KL at steps 100 to 500 {curve}, velocity loss {velocity:.3f}", flush=True)
        ratio = last["HASTE"] / last["REPA only"]
        print("passed" if ratio < 0.6 else "FAILED", f"(KL at the stop: {ratio:.2f} of REPA's; less than 0.60 passes)")
        raise SystemExit(ratio >= 0.6)
    compare("check-haste", ARMS, run_arm)

"""Do the shifts help on images, and because they know the class? Paired seeds. Slow: on the toy 2 minutes a run.

    none, source, target, joint      carflow.py --shift ARM; none is plain SiT
    constant                         joint with one and the same shift for every class: the control

    python tests/check_carflow.py --seeds 0 1 2
    python tests/check_carflow.py --name cifar16 --samples 2000 --data data/cifar16 --max-train-steps 1000

All arms of a seed begin as the same network and see the same images, noise and times. The rest is as in
compare_alignment.py, whose flags it takes; here the EMA model's validation velocity loss and its shifts are kept, too:
the least loss is the same in all arms. Passed if joint is below none in two thirds of the pairs at the end, and its
mu0 - mu1 points where the class means do (cosine above 0.8). `shifts.png` shows both, a column per class.
"""
import sys
from pathlib import Path

import torch
from torchvision.utils import save_image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import carflow  # noqa: E402
from compare_alignment import compare, judged_run  # noqa: E402
from support.dataset import PreparedData, images_to_input  # noqa: E402
from support.flags import parse  # noqa: E402

ARMS = [*carflow.SHIFTS, "constant"]
true_shifts = carflow.CARFlow.shifts
LOSS, COSINE = "validation velocity loss", "cosine of mu0 - mu1 with the class mean"


def constant_shifts(model, y):
    """The shifts of class 0 for everybody: the data are centred, but the classes are not brought nearer."""
    return true_shifts(model, torch.zeros_like(y))


def run_arm(arm, seed, out, samples, flags):
    """One arm's curve; its points also have what carflow.diagnose says of the EMA model at that step."""
    carflow.CARFlow.shifts = constant_shifts if arm == "constant" else true_shifts
    flags = [*flags, "--seed", str(seed), "--shift", "joint" if arm == "constant" else arm]
    curve = judged_run(carflow, flags, out, samples)
    cfg = parse(flags, carflow.Config, carflow.MODELS, carflow.RECIPES, carflow.RANGES)
    run, data = carflow.setup(cfg), PreparedData(f"{cfg.data}/val", cfg.resolution)
    for point in curve:
        model = carflow.load_carflow(cfg, out / f"ema-{point['step']}.pt")[0].to(run.device).eval()
        figures = carflow.diagnose(model, data, run)
        point |= {name: value.item() for name, value in figures.items()}
    draw(model, data, out)
    return curve


@torch.no_grad()
def draw(model, data, out):
    """Rows: the class means, mu0 - mu1 below them, then mu0 and mu1; a column per class."""
    labels = torch.arange(model.sit.num_classes)
    mu0, mu1 = (mu.cpu() for mu in model.shifts(labels.to(model.sit.pos_embed.device)))
    images = images_to_input(torch.from_numpy(data.array("images")[:]))
    y = torch.from_numpy(data.array("labels")[:])
    means = torch.stack([images[y == label].mean(dim=0) for label in labels])
    if means.shape == mu0.shape:  # not for latents
        rows = torch.cat([means, mu0 - mu1, mu0, mu1])
        save_image(rows.repeat_interleave(4, 2).repeat_interleave(4, 3), out / "shifts.png", nrow=len(labels),
                   normalize=True, value_range=(-1, 1))


def main():
    """Run what is missing, print both tables, and say whether the check is passed."""
    curves = compare("check-carflow", ARMS, run_arm)
    print(f"| arm | step | {LOSS} | norm of mu0 | of mu1 | cosine with the class mean |\n|---|---|---|---|---|---|")
    for arm in ARMS:
        for points in zip(*(curve for (name, _), curve in curves.items() if name == arm)):
            cells = [" ".join(f"{point[key]:{form}}" for point in points) for key, form in
                     ((LOSS, ".4f"), ("norm of mu0", ".1f"), ("of mu1", ".1f"), (COSINE, ".3f"))]
            print(f"| {arm} | {points[0]['step']} | {' | '.join(cells)} |")
    pairs = [(curve[-1], curves["none", seed][-1]) for (arm, seed), curve in curves.items()
             if arm == "joint" and ("none", seed) in curves]
    if pairs:
        lower = sum(joint[LOSS] < none[LOSS] for joint, none in pairs)
        cosine = min(joint[COSINE] for joint, _ in pairs)
        passed = 3 * lower >= 2 * len(pairs) and cosine > 0.8
        print(f"{'passed' if passed else 'FAILED'}: joint is below none in {lower} of {len(pairs)} pairs, "
              f"cosine {cosine:.3f}")
        raise SystemExit(not passed)


if __name__ == "__main__":
    main()

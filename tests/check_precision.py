"""Does bf16 cost anything? REPA trained in bf16 and fp32, and sampled in both. Slow: on the toy about 2 minutes a run.

    fp32       everything in fp32
    bf16       as on a GPU: autocast, with the weights, the losses, the time embedding and adaLN in fp32
    bf16-all   the time embedding and adaLN in bf16, too

    python tests/check_precision.py --seeds 0 1 2
    python tests/check_precision.py --name cifar16 --samples 2000 --data data/cifar16 --max-train-steps 1000

All arms of a seed see the same images, noise and times. The first table is compare_alignment.py's, whose flags this
takes (all samples of it are drawn in fp32). Then: by how much do the curves of the velocity loss differ from fp32's
with the same seed, and by how much from one seed to another; and the last fp32 model of each seed, sampled in bf16 from
the same noise.
"""
import argparse
import itertools
import json
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common  # noqa: E402
import evaluate  # noqa: E402
import repa  # noqa: E402
from compare_alignment import compare, judged_run  # noqa: E402

ARMS = {"fp32": "fp32", "bf16": "bf16", "bf16-all": "bf16"}
FOLDER = "precision"


def all_in_bf16(arm):
    """In the arm bf16-all, what leaves autocast elsewhere stays in it."""
    forward = torch.nn.Sequential.forward if arm == "bf16-all" else common.FP32Sequential.forward
    return mock.patch.object(common.FP32Sequential, "forward", forward)


def run_arm(arm, seed, out, samples, flags):
    """One arm's curve, as judged_run gives it."""
    with all_in_bf16(arm):
        return judged_run(repa, [*flags, "--seed", str(seed), "--precision", ARMS[arm]], out, samples)


def loss_curve(folder):
    """Velocity loss at the log points of the second half of a run: its fall has ended, its noise is left."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return np.array([line["loss_velocity"] for line in lines[len(lines) // 2:]])


def compare_losses(folder, arms, seeds):
    """Differences of the curves: same seed and other arithmetic against other seed and same arithmetic."""
    curves = {(arm, seed): loss_curve(folder / f"{arm}-{seed}") for arm in arms for seed in seeds}
    for arm in arms[1:]:
        paired = np.stack([curves[arm, seed] - curves["fp32", seed] for seed in seeds])
        print(f"velocity loss, {arm} - fp32 at the same seed: mean {paired.mean():+.4f}, by seed "
              f"{' '.join(f'{d:+.4f}' for d in paired.mean(axis=1))}; mean absolute {abs(paired).mean():.4f}")
    means = [curves["fp32", seed].mean() for seed in seeds]
    pairs = [abs(curves["fp32", a] - curves["fp32", b]).mean() for a, b in itertools.combinations(seeds, 2)] or [np.nan]
    print(f"velocity loss, fp32 between seeds: means {' '.join(f'{m:.4f}' for m in means)}; mean absolute "
          f"difference of two seeds' curves {np.mean(pairs):.4f}")


def compare_sampling(folder, seeds, samples):
    """The last fp32 checkpoint of each seed, sampled in fp32, bf16 and bf16-all from the same noise; judged."""
    for seed in seeds:
        whole = None
        for arm, precision in ARMS.items():
            out = folder / f"sampled-{arm}-{seed}"
            with all_in_bf16(arm):
                path = repa.main(["--sample", str(samples), "--ckpt", str(folder / f"fp32-{seed}/last.pt"),
                                  "--out", str(out), "--micro-batch", "32", "--precision", precision])
            images = np.load(path)["arr_0"].astype(int)
            whole = images if whole is None else whole
            data = json.loads((folder / f"fp32-{seed}/config.json").read_text())["data"]
            [figures] = evaluate.main([str(path), data])
            difference = abs(images - whole)
            print(f"seed {seed}, sampled in {arm}: Frechet distance {figures['judge_fd']:.3f}, accuracy "
                  f"{figures['judge_accuracy']:.4f}; pixels differ from fp32's by {difference.mean():.3f} of 255 in "
                  f"the mean, {np.quantile(difference, 0.999):.0f} at the 99.9th percentile")


if __name__ == "__main__":
    curves = compare(FOLDER, ARMS, run_arm)
    parser = argparse.ArgumentParser()
    parser.add_argument("--name", default="toy")
    parser.add_argument("--samples", type=int, default=480)
    args, _ = parser.parse_known_args()
    arms, seeds = (list(dict.fromkeys(key[i] for key in curves)) for i in (0, 1))
    if "fp32" in arms:
        compare_losses(Path(f"runs/{FOLDER}-{args.name}"), sorted(arms, key=list(ARMS).index), seeds)
        compare_sampling(Path(f"runs/{FOLDER}-{args.name}"), seeds, args.samples)

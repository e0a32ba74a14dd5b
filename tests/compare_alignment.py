"""Does the alignment help, and is it the alignment? Three arms, paired seeds. Slow: on the toy about 2 minutes a run.

    none      lambda 0: plain SiT
    aligned   lambda 0.5: REPA
    shuffled  lambda 0.5 with the teacher's features of ANOTHER image of the batch: the control

    python tests/compare_alignment.py --seeds 0 1 2
    python tests/compare_alignment.py --name cifar16 --samples 2000 --data data/cifar16 --max-train-steps 1000

All arms of a seed see the same images, noise and times. At every fifth of the run the EMA model draws samples, which
the judge scores; training seconds are the log's, the teacher's forward pass included. Flags it does not know go to
repa.py. Writes runs/compare-NAME, prints a table, and skips what is there already.
"""
import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import evaluate  # noqa: E402
import repa  # noqa: E402
from common import SIT_SIZES  # noqa: E402
from support.flags import parse  # noqa: E402

ARMS = {"none": 0.0, "aligned": 0.5, "shuffled": 0.5}
true_loss = repa.repa_loss


def shuffled_loss(model, x, t, noise, y, zs, path_type):
    """REPA's loss with every image's features taken from its neighbour in the batch."""
    return true_loss(model, x, t, noise, y, [z.roll(1, dims=0) for z in zs], path_type)


def config_of(script, flags):
    """The Config that a script makes of its command line."""
    models, ranges = getattr(script, "MODELS", SIT_SIZES), getattr(script, "RANGES", None)
    return parse(flags, script.Config, models, script.RECIPES, ranges)


def judged_run(script, flags, out, samples):
    """Train a script and judge its EMA model five times: a list of {step, seconds, accuracy, distance, ...}."""
    flags = [*flags, "--out", str(out), "--preview-every", "0"]
    every = config_of(script, flags).max_train_steps // 5
    cfg = config_of(script, [*flags, "--keep-every", str(every)])
    script.train(cfg, script.setup(cfg))
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    curve = []
    for step in range(every, cfg.max_train_steps + 1, every):
        script.main(["--model", cfg.model, "--sample", str(samples), "--ckpt", str(out / f"ema-{step}.pt"),
                     "--micro-batch", "32"])
        [figures] = evaluate.main([str(out / "samples.npz"), cfg.data])
        seconds = sum(cfg.batch_size * cfg.log_every / line["images_per_s"] for line in log if line["step"] <= step)
        curve.append(dict(step=step, seconds=seconds, accuracy=figures["judge_accuracy"], distance=figures["judge_fd"],
                          real_accuracy=figures["real_accuracy"], real_distance=figures["real_fd"]))
    return curve


def run_arm(arm, seed, out, samples, flags):
    """One arm's curve, as judged_run gives it."""
    repa.repa_loss = shuffled_loss if arm == "shuffled" else true_loss
    return judged_run(repa, [*flags, "--seed", str(seed), "--proj-coeff", str(ARMS[arm])], out, samples)


def compare(folder, arms, run_arm, argv=None):
    """Command line of such a comparison: run what is missing of arms x seeds in runs/FOLDER-NAME, print the table.

    Returns {(arm, seed): curve}.
    """
    parser = argparse.ArgumentParser(description=sys.modules["__main__"].__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", default="toy")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", choices=list(arms), default=list(arms))
    parser.add_argument("--samples", type=int, default=480)
    args, flags = parser.parse_known_args(argv)
    folder, curves = Path(f"runs/{folder}-{args.name}"), {}
    for arm in args.arms:
        for seed in args.seeds:
            path = folder / f"{arm}-{seed}.json"
            if not path.exists():
                curve = run_arm(arm, seed, folder / f"{arm}-{seed}", args.samples, flags)
                path.write_text(json.dumps(curve, indent=1))
            curves[arm, seed] = json.loads(path.read_text())
    print("| arm | step | training s | judge accuracy | Frechet distance |\n|---|---|---|---|---|")
    for arm in args.arms:
        for points in zip(*(curves[arm, seed] for seed in args.seeds)):
            cells = [" ".join(f"{point[key]:{form}}" for point in points)
                     for key, form in (("seconds", ".0f"), ("accuracy", ".3f"), ("distance", ".2f"))]
            print(f"| {arm} | {points[0]['step']} | {' | '.join(cells)} |")
    print(f"real images: accuracy {points[0]['real_accuracy']:.3f}, distance {points[0]['real_distance']:.2f}")
    return curves


if __name__ == "__main__":
    compare("compare", ARMS, run_arm)

"""Does the alignment help, and is it the alignment? Three arms on the toy, paired seeds. Slow: about 2 minutes a run.

    none      lambda 0: plain SiT
    aligned   lambda 0.5: REPA
    shuffled  lambda 0.5 with the teacher's features of ANOTHER image of the batch: the control

    python tests/compare_alignment.py --seeds 0 1 2 --learning-rate 4e-3

All arms of a seed see the same images, noise and times. Every 400 steps the EMA model draws 480 images, which the judge
scores; training seconds are the log's, the teacher's forward pass included. Writes runs/compare, prints a table.
"""
import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import evaluate  # noqa: E402
import repa  # noqa: E402

ARMS = {"none": 0.0, "aligned": 0.5, "shuffled": 0.5}
EVERY = 400


def shuffled_loss(model, x, t, noise, y, zs, path_type):
    """REPA's loss with every image's features taken from its neighbour in the batch."""
    return true_loss(model, x, t, noise, y, [z.roll(1, dims=0) for z in zs], path_type)


true_loss = repa.repa_loss


def run_arm(arm, seed, learning_rate):
    """Train one arm and judge its EMA model every 400 steps: a list of {step, seconds, accuracy, distance}."""
    out = Path(f"runs/compare/{arm}-lr{learning_rate:g}-seed{seed}")
    common = ["--seed", str(seed), "--out", str(out), "--proj-coeff", str(ARMS[arm])]
    repa.repa_loss = shuffled_loss if arm == "shuffled" else true_loss
    cfg = repa.parse([*common, "--learning-rate", str(learning_rate), "--keep-every", str(EVERY),
                      "--preview-every", "0"])
    repa.train(cfg, repa.setup(cfg))
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    seconds = {line["step"]: cfg.batch_size * cfg.log_every / line["images_per_s"] for line in log}
    curve = []
    for step in range(EVERY, cfg.max_train_steps + 1, EVERY):
        repa.main(["--sample", "480", "--seed", "0", "--ckpt", str(out / f"ema-{step}.pt"), "--out", str(out)])
        [figures] = evaluate.main([str(out / "samples.npz"), cfg.data])
        curve.append(dict(step=step, seconds=sum(s for at, s in seconds.items() if at <= step), real=figures["real_fd"],
                          accuracy=figures["judge_accuracy"], distance=figures["judge_fd"]))
    return curve


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--learning-rate", type=float, default=4e-3)
    args = parser.parse_args()
    for arm in args.arms:
        for seed in args.seeds:
            path = Path(f"runs/compare/{arm}-lr{args.learning_rate:g}-seed{seed}.json")
            if not path.exists():
                curve = run_arm(arm, seed, args.learning_rate)
                path.write_text(json.dumps(curve, indent=1))
    print("| arm | step | training s | judge accuracy | Frechet distance |\n|---|---|---|---|---|")
    for arm in args.arms:
        curves = [json.loads(Path(f"runs/compare/{arm}-lr{args.learning_rate:g}-seed{seed}.json").read_text())
                  for seed in args.seeds]
        for points in zip(*curves):
            cells = [" ".join(f"{point[key]:{form}}" for point in points)
                     for key, form in (("seconds", ".0f"), ("accuracy", ".3f"), ("distance", ".2f"))]
            print(f"| {arm} | {points[0]['step']} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()

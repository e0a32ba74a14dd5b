"""Does a warm-up help, at equal full steps and at equal compute? Four arms, paired seeds. Slow: about a minute a run.

    plain   --warmup-steps 0 --proj-coeff 0                 SiT
    repa    --warmup-steps 0 --proj-decay-half-life inf     REPA
    decay   --warmup-steps 0                                ERW's phase II alone
    erw     phase I, then phase II

    python tests/check_erw.py --data data/cifar16 --seeds 0 1 2

Measured is the velocity error of the EMA model on held-out images (DATA/val; the same noise and times for all), CKNNA
with the teacher, and the judge's view of samples, at equal full steps. "Equal compute" gives the other arms the time
that erw spent on phase I too: they train on, and their error is read between two checkpoints. What a step costs is
timed apart, in turns, for the speed of a shared machine drifts. Flags it does not know go to erw.py. Writes
runs/check-erw-NAME, prints tables, and skips what is there already.
"""
import argparse
import json
import sys
from pathlib import Path
from statistics import mean, median, stdev

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import erw  # noqa: E402
import evaluate  # noqa: E402
from common import interpolate  # noqa: E402
from support.checkpoints import init_from  # noqa: E402
from support.dataset import PreparedData, clean_input, image_randn  # noqa: E402

ARMS = {"plain": ["--warmup-steps", "0", "--proj-coeff", "0"],
        "repa": ["--warmup-steps", "0", "--proj-decay-half-life", "inf"],
        "decay": ["--warmup-steps", "0"], "erw": []}
MORE = {"plain": 0.9, "repa": 0.4, "decay": 0.4, "erw": 0.0}  # steps beyond equal full steps: a plain one is cheaper


@torch.no_grad()
def held_out_error(model, data, device, count=2000):
    """Mean velocity error on `count` images, at evenly spread times."""
    images, errors = torch.linspace(0, len(data) - 1, count).long(), []
    times = ((torch.arange(count) + 0.5) / count)[torch.randperm(count, generator=torch.Generator().manual_seed(0))]
    for rows, t in zip(images.split(100), times.split(100)):
        batch, t = {name: tensor.to(device) for name, tensor in data[rows.numpy()].items()}, t.to(device)
        noise = image_randn(1, rows.tolist(), device)(*data.shape)
        x = clean_input(batch, data.meta, torch.zeros_like(noise))  # the mean of the posterior
        x_t, v = interpolate(x, noise, t)
        errors.append((model.velocity(x_t, t, batch["labels"]) - v).square().mean(dim=(1, 2, 3)))
    return torch.cat(errors).mean().item()


def run_arm(flags, out, full_steps, every, samples):
    """Train one arm: held-out errors by full steps, CKNNA, and the judge's view of samples."""
    cfg = erw.parse_config([*flags, "--out", str(out), "--keep-every", str(every), "--preview-every", "0"])
    run = erw.setup(cfg)
    erw.train(cfg, run)
    held_out, errors = PreparedData(f"{cfg.data}/val", cfg.resolution), {}
    model = erw.build(cfg, held_out, run)[1]
    for step in range(every, cfg.max_train_steps - cfg.warmup_steps + 1, every):
        init_from(out / f"ema-{cfg.warmup_steps + step}.pt", model)
        errors[step] = held_out_error(model, held_out, run.device)
    cknna = {}
    for step in (0, every, full_steps):  # of phase II; 0 is the end of phase I
        if (ckpt := out / f"ema-{cfg.warmup_steps + step}.pt").exists():
            cknna[step] = erw.main(["--probe", "1000", "--data", cfg.data, "--ckpt", str(ckpt)])
    erw.main(["--sample", str(samples), "--ckpt", str(out / f"ema-{cfg.warmup_steps + full_steps}.pt"),
              "--micro-batch", "32"])
    [figures] = evaluate.main([str(out / "samples.npz"), cfg.data])
    return dict(errors=errors, cknna=cknna, accuracy=figures["judge_accuracy"],
                distance=figures["judge_fd"], real_accuracy=figures["real_accuracy"],
                real_distance=figures["real_fd"])


def step_costs(folder, flags, rounds=12):
    """Time of a step of each kind, in full steps: the median of paired rounds of 20 steps, the first ten left out."""
    kinds = {"warmup": ["--warmup-steps", "20"], "plain": ARMS["plain"], "full": ARMS["decay"]}
    ratios = {kind: [] for kind in kinds}
    for i in range(rounds):
        rates = {}
        for kind, kind_flags in kinds.items():
            out = folder / f"time-{kind}-{i}"
            cfg = erw.parse_config(["--log-every", "10", "--preview-every", "0", "--max-train-steps", "20", *kind_flags,
                             *flags, "--out", str(out)])
            erw.train(cfg, erw.setup(cfg))
            rates[kind] = json.loads((out / "log.jsonl").read_text().splitlines()[-1])["images_per_s"]
        for kind in kinds:
            ratios[kind].append(rates["full"] / rates[kind])
    return {kind: median(values) for kind, values in ratios.items()}


def error_at(result, step):
    """Held-out error after `step` full steps (a real number), between the two checkpoints around it."""
    curve = sorted((int(k), value) for k, value in result["errors"].items())
    if step > curve[-1][0]:
        raise SystemExit(f"error: equal compute is {step:.0f} steps, these runs end at {curve[-1][0]}")
    (a, left), (b, right) = next(pair for pair in zip(curve, curve[1:]) if step <= pair[1][0])
    return left + (right - left) * (step - a) / (b - a)


def main():
    """Run what is missing, then print the tables and the verdict."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", default="cifar16")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--warmup", type=int, default=300, help="steps of phase I of the arm erw")
    parser.add_argument("--full-steps", type=int, default=1000, help="at which the arms are compared")
    parser.add_argument("--half-life", type=int, default=400)
    parser.add_argument("--samples", type=int, default=1000)
    args, flags = parser.parse_known_args()
    folder, results, every = Path(f"runs/check-erw-{args.name}"), {}, 100
    for seed in args.seeds:
        for arm, arm_flags in ARMS.items():
            path = folder / f"{arm}-{seed}.json"
            if not path.exists():
                steps = round(args.full_steps * (1 + MORE[arm])) + (args.warmup if arm == "erw" else 0)
                settings = ["--proj-decay-half-life", args.half_life, "--warmup-steps", args.warmup, "--log-every", 10,
                            "--max-train-steps", steps, "--seed", seed, *arm_flags, *flags]
                result = run_arm(list(map(str, settings)), folder / f"{arm}-{seed}", args.full_steps, every,
                                 args.samples)
                path.write_text(json.dumps(result, indent=1))
            results[arm, seed] = json.loads(path.read_text())

    path = folder / "costs.json"
    if not path.exists():
        path.write_text(json.dumps(step_costs(folder, flags), indent=1))
    costs = json.loads(path.read_text())
    equivalents = args.full_steps + costs["warmup"] * args.warmup
    print("| arm | error at equal full steps | steps at equal compute | error at equal compute | judge accuracy "
          "| Frechet distance |\n|---|---|---|---|---|---|")
    errors = {}
    for arm in ARMS:
        equal = dict(plain=equivalents / costs["plain"], erw=args.full_steps).get(arm, equivalents)
        for name, step in (("steps", args.full_steps), ("compute", equal)):
            errors[arm, name] = [error_at(results[arm, seed], step) for seed in args.seeds]
        cells = [" ".join(f"{e:.4f}" for e in errors[arm, "steps"]), f"{equal:.0f}",
                 " ".join(f"{e:.4f}" for e in errors[arm, "compute"]),
                 " ".join(f"{results[arm, seed]['accuracy']:.3f}" for seed in args.seeds),
                 " ".join(f"{results[arm, seed]['distance']:.2f}" for seed in args.seeds)]
        print(f"| {arm} | {' | '.join(cells)} |")
    real = results["erw", args.seeds[0]]
    print(f"real images: accuracy {real['real_accuracy']:.3f}, distance {real['real_distance']:.2f}\n{args.full_steps} "
          f"full steps; in erw {args.warmup} of phase I before them, each at {costs['warmup']:.2f} of a full one: "
          f"{equivalents:.0f} full-step equivalents; a step of plain costs {costs['plain']:.2f}")
    for arm in ARMS:
        for step, scores in results[arm, args.seeds[0]]["cknna"].items():
            print(f"CKNNA by block, {arm}, full step {step}: {' '.join(f'{score:.3f}' for score in scores)}")
    for name in ("steps", "compute"):
        for other in ("plain", "repa", "decay"):
            gains = [theirs - ours for theirs, ours in zip(errors[other, name], errors["erw", name])]
            bound = 2 * stdev(gains) / len(gains) ** 0.5 if len(gains) > 1 else float("nan")
            verdict = "yes" if mean(gains) > bound else "no, worse" if mean(gains) < -bound else "not established"
            print(f"erw better than {other} at equal {name}: {verdict} "
                  f"(error lower by {mean(gains):.4f}, 2 s.e. {bound:.4f})")


if __name__ == "__main__":
    main()

"""Does the alignment make latents that say more, at what price, and does a plain SiT learn faster on them? Slow.

    python tests/check_reals.py --autoencoders 0 0.05 0.5 --data data/cifar32     probe against PSNR: 4 minutes a weight
    python tests/check_reals.py --seeds 0 1 2                                     the toy, 4 minutes a run:
        plain     repa.py --proj-coeff 0 on the latents of reals.py --align-coeff 0
        light     the same with an autoencoder of --align-coeff 0.05
        aligned   the same with 0.5
        shuffled  the same with 0.5 and the features of ANOTHER image of the batch: the control

The first form trains autoencoders that differ in nothing but the weight; at weight 0 the MLPs learn from latents whose
gradient is cut, so that they say how much of the teacher is in plain latents. It passes if the probe of the strongest
gains .05, the patches' cosine .2, and PSNR loses at most 3.5 dB. In the second form a seed is that of the autoencoder
and of the SiT; the rest is as in compare_alignment.py, whose flags it takes (--name cifar --data data/cifar32).
"""
import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import prepare  # noqa: E402
import reals  # noqa: E402
import repa  # noqa: E402
from compare_alignment import compare, judged_run  # noqa: E402

ARMS = {"plain": 0.0, "light": 0.05, "aligned": 0.5, "shuffled": 0.5}
true_forward, true_loss = reals.AlignHeads.forward, reals.reals_loss


def shuffled_loss(model, x, noise, z_cls, z_patches, *more):
    """ReaLS's loss with every image's features taken from its neighbour in the batch."""
    return true_loss(model, x, noise, z_cls.roll(1, dims=0), z_patches.roll(1, dims=0), *more)


def train_autoencoder(data, weight, seed, out, more=(), measured=False):
    """Train reals.py on `data` where it has not yet; returns its last figures."""
    resolution = prepare.read_meta(Path(data))["resolution"]
    flags = ["--model", "toy" if resolution == 16 else "f4d4", "--data", data, "--align-coeff", str(weight),
             "--seed", str(seed), "--out", str(out), *more]
    cfg = reals.parse(flags, reals.Config, reals.MODELS, reals.RECIPES, reals.RANGES)
    if measured:
        cfg.max_grad_norm = 1e6  # the norm of the cut-off MLPs' gradient must not act on the autoencoder
        if weight == 0:
            cfg.align_coeff = 0.5
            reals.AlignHeads.forward = lambda self, z, grid: true_forward(self, z.detach(), grid)
    if not (out / "vae.pt").exists():
        reals.train(cfg, reals.setup(cfg))
    reals.AlignHeads.forward = true_forward
    return json.loads((out / f"figures-{cfg.max_train_steps}.json").read_text())


def run_arm(arm, seed, out, samples, flags):
    """One arm's curve: an autoencoder, the data in its latents, and a plain SiT on them."""
    data = flags[flags.index("--data") + 1] if "--data" in flags else "data/toy"
    reals.reals_loss = shuffled_loss if arm == "shuffled" else true_loss
    train_autoencoder(data, ARMS[arm], seed, out / "autoencoder")
    if not (out / "data").exists():
        prepare.main(["--from", data, "--vae", str(out / "autoencoder/vae.pt"), "--out", str(out / "data")])
    resolution = str(prepare.read_meta(Path(data))["resolution"])
    flags = ["--model", "toy/2", "--proj-coeff", "0", "--resolution", resolution, *flags, "--data", str(out / "data")]
    return judged_run(repa, [*flags, "--seed", str(seed)], out, samples)


def trade_off(argv):
    """Train an autoencoder at each weight and print the table; the exit code says whether the figures pass."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--autoencoders", type=float, nargs="+", required=True)
    parser.add_argument("--data", default="data/cifar32")
    parser.add_argument("--seed", type=int, default=0)
    args, more = parser.parse_known_args(argv)  # the rest goes to reals.py
    name, found = "-".join([Path(args.data).name, *(value.strip("-") for value in more)]), {}
    for weight in args.autoencoders:
        out = Path(f"runs/check-reals-{name}/{weight:g}-{args.seed}")
        found[weight] = train_autoencoder(args.data, weight, args.seed, out, more, measured=True)
    print("| alignment weight | PSNR dB | probe | patches' cosine | latent std |\n|---|---|---|---|---|")
    for weight, line in found.items():
        print(f"| {weight:g} | {line['psnr']:.2f} | {line['probe']:.3f} | {line['align_cosine']:.3f} | "
              f"{line['latent_std']:.2f} |")
    first, last = found[min(found)], found[max(found)]
    gains = {name: last[name] - first[name] for name in ("probe", "align_cosine", "psnr")}
    passed = gains["probe"] >= 0.05 and gains["align_cosine"] >= 0.2 and gains["psnr"] >= -3.5
    print("passed:" if passed else "FAILED:", ", ".join(f"{name} {gain:+.3f}" for name, gain in gains.items()))
    return 0 if passed else 1


if __name__ == "__main__":
    if "--autoencoders" in sys.argv:
        raise SystemExit(trade_off(sys.argv[1:]))
    compare("check-reals", ARMS, run_arm)

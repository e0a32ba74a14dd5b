"""What does the memory tell the network, and is it a memory? Slow: about 1.5 minutes a run on one CPU thread.

    none     gmem.py with every snippet zeroed: no condition at all
    class    repa.py --proj-coeff 0, conditioned on the label (never dropped)
    gmem     gmem.py --proj-coeff 0, p = 0.4: the memory alone
    p0       the same with p = 0
    repa     gmem.py as it is, with the alignment

    python tests/check_gmem.py --data data/cifar16 --resolution 16 --seeds 0 1 2

1. The velocity error on held-out images at t = 0.2, 0.5, 0.8, 0.95, given the image's own snippet (also compressed to
   rank 4 and 16 by the bank of the training set), that of another image, and none.
2. Samples from the training bank, from a held-out bank and from the training bank at rank 16: the judge's figures, its
   agreement with itself on the sample and on the image whose snippet was drawn, and the distance in pixels (root mean
   square, grey levels) to the nearest training image and to the snippet's own image.
The arms of a seed see the same images, noise and times. Flags it does not know go to the scripts. Writes
runs/check-gmem-NAME, prints tables, and skips what is there already. All of this is conditioned on features of real
images: the distances of gmem's samples do not compare with those of a class-conditional model.
"""
import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import evaluate  # noqa: E402
import gmem  # noqa: E402
import repa  # noqa: E402
from common import SIT_SIZES, interpolate  # noqa: E402
from support import flags as command_line  # noqa: E402
from support.dataset import PreparedData, images_to_input  # noqa: E402

ARMS = {"none": (gmem, ["--proj-coeff", "0", "--mem-null-prob", "1"]),
        "class": (repa, ["--proj-coeff", "0", "--cfg-prob", "0"]),
        "gmem": (gmem, ["--proj-coeff", "0"]),
        "p0": (gmem, ["--proj-coeff", "0", "--mem-dropout", "0"]),
        "repa": (gmem, [])}
RUN = ["--max-train-steps", "500", "--batch-size", "96", "--preview-every", "0"]
TIMES, RANKS, IMAGES = (0.2, 0.5, 0.8, 0.95), (4, 16), 1000


def parse(script, argv):
    """The configuration of a script's command line."""
    ranges = getattr(script, "RANGES", None)
    return command_line.parse(argv, script.Config, SIT_SIZES, script.RECIPES, ranges)


def pixels(images):
    """(N,H,W,3) uint8 to (N,3*H*W) float32."""
    return torch.from_numpy(np.array(images)).flatten(1).float()


@torch.no_grad()
def velocity_errors(script, cfg):
    """{condition: its mean squared error at each of TIMES} of a run's EMA model on the first held-out images."""
    run, data = script.setup(cfg), PreparedData(f"{cfg.data}/val", cfg.resolution)
    pick = np.random.default_rng(0).permutation(len(data))[:IMAGES]  # prepared images are sorted by class
    batch = data[pick]
    teacher, model = (script.build(cfg, data, run) if script is gmem else (None, script.build(cfg, data, run)[1]))
    model.load_state_dict(torch.load(f"{cfg.out}/last.pt", weights_only=True)["ema"])
    if script is gmem:
        raw = torch.cat([teacher(images)[0] for images in batch["images"].split(250)])
        own = F.normalize(raw, dim=-1)
        conditions = dict(own=own, another=own.roll(1, 0), none=torch.zeros_like(own))
        full = gmem.open_bank(cfg, run, model.memory_dim, gmem.identify_teacher(teacher), teacher)
        for rank in RANKS:
            factors = full.compress(rank).parts
            bank = gmem.MemoryBank(factors | dict(C=gmem.coefficients(raw, factors)))
            conditions[f"rank {rank}"] = F.normalize(bank.get(torch.arange(IMAGES)), dim=-1)
    else:
        conditions = dict(own=batch["labels"], another=batch["labels"].roll(1, 0))
    x = images_to_input(batch["images"])
    noise, errors = torch.randn(x.shape, generator=torch.Generator().manual_seed(0)), {}
    for name, condition in conditions.items():
        errors[name] = []
        for t in torch.tensor(TIMES):
            x_t, v = interpolate(x, noise, t.expand(IMAGES))
            v_hat = torch.cat([model(*part)[0] for part in zip(
                x_t.split(250), t.expand(IMAGES).split(250), condition.split(250))])
            errors[name].append((v_hat - v).square().mean().item())
    return errors


def sample_figures(script, cfg, samples):
    """{bank: figures} of samples of a run, drawn from each bank (of the class-conditional arm: from labels)."""
    figures, train = {}, pixels(np.load(f"{cfg.data}/images.npy"))
    judge, num_classes, _ = evaluate.load_judge(Path(cfg.data, "judge.pt"))
    draw = ["--ckpt", f"{cfg.out}/last.pt", "--out", cfg.out, "--sample", str(samples), "--micro-batch", "250",
            "--batch-size", "250"]
    banks = dict(train=(cfg.data, 0), held_out=(f"{cfg.data}/val", 0), rank16=(cfg.data, 16))
    for name, (folder, rank) in banks.items() if script is gmem else [("labels", (None, 0))]:
        path = script.main(draw + (["--bank-path", folder, "--bank-rank", str(rank)] if folder else []))
        [row] = evaluate.main([str(path), cfg.data])
        with np.load(path) as file:
            images, rows = file["arr_0"], file["rows"][:, 0] if "rows" in file else None
        row["nearest"] = nearest(images, train)
        if folder:
            source = np.load(f"{folder}/images.npy", mmap_mode="r")[rows]
            seen, meant = (evaluate.run_judge(judge, num_classes, x)[1] for x in (images, source))
            row["agreement"] = float((seen == meant).mean())
            row["chance"] = float((seen == np.roll(meant, 1)).mean())
            for key, shift in (("own", 0), ("another", 1)):
                row[key] = (pixels(images) - pixels(source).roll(shift, 0)).square().mean(1).sqrt().mean().item()
        figures[name] = row
    held_out = np.load(f"{cfg.data}/val/images.npy", mmap_mode="r")
    pick = np.random.default_rng(0).permutation(len(held_out))[:samples]
    figures["real"] = dict(nearest=nearest(held_out[np.sort(pick)], train))
    return figures


def nearest(images, train):
    """Mean distance of images (N,H,W,3) to the nearest row of train, root mean square over pixels, in grey levels."""
    found = [torch.cdist(part, train).amin(dim=1) for part in pixels(images).split(100)]
    return (torch.cat(found).mean() / train.shape[1] ** 0.5).item()


def cells(values, form):
    return " ".join(f"{value:{form}}" for value in values)


def main():
    """Run what is missing, then print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", default="cifar16")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--samples", type=int, default=1000)
    args, flags = parser.parse_known_args()
    results = {}
    for seed in args.seeds:
        for arm in args.arms:
            out = Path(f"runs/check-gmem-{args.name}/{arm}-{seed}")
            if not (out / "check.json").exists():
                script, own_flags = ARMS[arm]
                cfg = parse(script, [*RUN, *own_flags, *flags, "--seed", str(seed), "--out", str(out)])
                script.train(cfg, script.setup(cfg))
                result = dict(errors=velocity_errors(script, cfg), samples={})
                if arm in ("class", "gmem", "repa"):
                    result["samples"] = sample_figures(script, cfg, args.samples)
                (out / "check.json").write_text(json.dumps(result, indent=1))
            results[arm, seed] = json.loads((out / "check.json").read_text())

    print(f"\nheld-out velocity error, seeds {args.seeds}\n| arm | given | " + " | ".join(f"t = {t}" for t in TIMES)
          + " |\n|---|---|" + "---|" * len(TIMES))
    for arm in args.arms:
        for name in ["none"] if arm == "none" else results[arm, args.seeds[0]]["errors"]:
            errors = zip(*(results[arm, seed]["errors"][name] for seed in args.seeds))
            print(f"| {arm} | {name} | " + " | ".join(cells(values, ".4f") for values in errors) + " |")
    columns = dict(judge_accuracy=".3f", judge_fd=".2f", agreement=".3f", chance=".3f", nearest=".1f", own=".1f",
                   another=".1f")
    print("\n| arm | bank | " + " | ".join(columns) + " |\n|---|---|" + "---|" * len(columns))
    for arm in args.arms:
        for bank, row in results[arm, args.seeds[0]]["samples"].items():
            rows = [results[arm, seed]["samples"][bank] for seed in args.seeds]
            print(f"| {arm} | {bank} | " + " | ".join(
                cells((r[name] for r in rows), form) if name in row else "" for name, form in columns.items()) + " |")


if __name__ == "__main__":
    main()

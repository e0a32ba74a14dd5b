"""Does SoftREPA's contrast do more than training the same tokens plainly? Three arms on the toy, paired seeds. Slow.

    soft   the contrastive loss with the logit 4 exp(-e/0.07): the method
    fm     plain flow matching of the same tokens on as many pairs, all fresh: the control
    raw    the contrastive loss with the plain logit -e/0.07

    python tests/check_softrepa.py --seeds 0 1 2                  about two minutes a run, after the toy's preparation

Error gap and retrieval are means over all held-out pairs (the same images, texts, times and noise for all arms), at
every fourth of the run; exact captions are of 512 samples of the last tokens. Flags it does not know go to softrepa.py.
Writes runs/check-softrepa, prints a table and whether the gap of `soft` exceeds that of `fm` in every seed, and skips
what is there already.
"""
import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import numpy as np  # noqa: E402
import torch.nn.functional as F  # noqa: E402

import softrepa  # noqa: E402
from support.dataset import CaptionedData  # noqa: E402
from support.pairs import prepare_pairs  # noqa: E402

ARMS = "soft", "fm", "raw"
true_loss = softrepa.contrastive_loss


def raw_loss(errors, own, dweight=0.0):
    """InfoNCE of the errors themselves, without the exponential inside the logit."""
    return F.cross_entropy(-errors / softrepa.TEMPERATURE, own, reduction="none")


def parse(flags):
    return softrepa.parse(flags, softrepa.Config, softrepa.MODELS, softrepa.RECIPES, softrepa.RANGES)


def pairs_of(cfg, run, path):
    """Retrieval and gap on all held-out pairs, of the tokens in a file, or of none."""
    data, model = CaptionedData(cfg.data, cfg.resolution, "toy", held_out=True), softrepa.load_model(cfg, run)
    soft = softrepa.load_soft(path, model).to(run.device) if path else None
    figures = softrepa.validate(replace(cfg, objective="contrastive"), run, model, soft, data,
                                len(data) // cfg.batch_size)
    return dict(retrieval=figures["retrieval"], gap=figures["gap"])


def exact_of(cfg, path):
    """Share of 512 samples that show their caption, without guidance and with guidance 2."""
    data, objects = CaptionedData(cfg.data, cfg.resolution, "toy", held_out=True), np.load(f"{cfg.data}/objects.npy")
    shares = []
    for scale in ("1", "2"):
        samples = softrepa.main(["--data", cfg.data, "--sample", str(len(data)), "--ckpt", str(path or "none"), "--out",
                                 cfg.out, "--cfg-scale", scale, *(() if path else ("--no-soft",))])
        labels = data.array("labels")[data.rows]
        shares.append(float((softrepa.recognise(np.load(samples)["arr_0"], objects) == labels).mean()))
    return shares


def run_arm(arm, seed, out, flags):
    """Train one arm and measure it at every fourth: a list of {step, retrieval, gap}, the last with exact captions."""
    softrepa.contrastive_loss = raw_loss if arm == "raw" else true_loss
    flags = [*flags, "--seed", str(seed), "--out", str(out), "--objective", "fm" if arm == "fm" else "contrastive"]
    cfg = parse(flags)
    run, curve = softrepa.setup(cfg, micro_batch=cfg.nrows), []
    if arm == "base":
        return [dict(step=0, exact=exact_of(cfg, None)) | pairs_of(cfg, run, None)]
    for step in [cfg.max_train_steps * part // 4 for part in (1, 2, 3, 4)]:  # the same run, stopped and continued
        softrepa.train(replace(cfg, max_train_steps=step), run)
        curve.append(dict(step=step) | pairs_of(cfg, run, out / "last.pt"))
    curve[-1]["exact"] = exact_of(cfg, out / "last.pt")
    return curve


def main():
    """Run what is missing, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    args, flags = parser.parse_known_args()
    folder, curves = Path("runs/check-softrepa"), {}
    data = Path(parse(flags).data)
    if not data.exists():
        prepare_pairs(data)
    for arm in ("base", *args.arms):
        for seed in args.seeds if arm != "base" else [0]:
            path = folder / f"{arm}-{seed}.json"
            if not path.exists():
                curve = run_arm(arm, seed, folder / f"{arm}-{seed}", flags)
                path.write_text(json.dumps(curve, indent=1))
            curves[arm, seed] = json.loads(path.read_text())
    print("| arm | step | error gap | retrieval | exact caption | with guidance 2 |\n|---|---|---|---|---|---|")
    for arm in ("base", *args.arms):
        for points in zip(*(curve for (name, _), curve in curves.items() if name == arm)):
            cells = [" ".join(f"{point[key]:{form}}" for point in points)
                     for key, form in (("gap", ".4f"), ("retrieval", ".3f"))]
            cells += [" ".join(f"{point['exact'][i]:.3f}" for point in points if "exact" in point) for i in (0, 1)]
            print(f"| {arm} | {points[0]['step']} | {' | '.join(cells)} |")
    if {"soft", "fm"} <= set(args.arms):
        is_larger = [curves["soft", seed][-1]["gap"] > curves["fm", seed][-1]["gap"] for seed in args.seeds]
        print(f"gap of soft above fm in {sum(is_larger)} of {len(is_larger)} seeds")


if __name__ == "__main__":
    main()

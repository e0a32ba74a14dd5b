"""Does U-REPA's loss do what it is for, and does it help? Paired seeds; slow: on the toy about 2 minutes a run.

    none      lambda 0: plain SiT-down                    cosine    lambda 0.5, w 0: token cosine alone
    full      lambda 0.5, w 3: U-REPA                     shuffled  full, but features of ANOTHER image: the control
    sit       plain SiT with as many FLOPs (with --model toy-pair)

    python tests/check_urepa.py --seeds 0 1 2
    python tests/check_urepa.py --name cifar32 --model toy-check --data data/cifar32 --resolution 32 --samples 0
    python tests/check_urepa.py --name pair --arms sit none cosine full --model toy-pair --samples 5000 \
        --data data/cifar32 --resolution 32 --max-train-steps 5000        for a GPU; its teacher needs --patch-size 2

All arms of a seed see the same images, noise and times. On held-out images, with the EMA weights and t uniform:
token cosine, Gram error and velocity loss; and how well a linear map of the aligned block's mean token tells the class
at t = 0.3, without the label (ridge regression). The judge scores samples without guidance. What has to pass, below the
table: w 3 lowers the Gram error and costs little cosine; the aligned arms' features tell the class better. Better
samples are reported, not demanded. Flags it does not know go to urepa.py (and, for sit, repa.py). Writes
runs/check-urepa-NAME, skips what is there already.
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
import repa  # noqa: E402
import urepa  # noqa: E402
from common import SIT_SIZES, interpolate  # noqa: E402
from support.dataset import PreparedData, clean_input, mix_seed  # noqa: E402
from support.flags import parse  # noqa: E402
from support.teachers import load_teacher  # noqa: E402

ARMS = {"sit": (repa, ["--proj-coeff", "0"]), "none": (urepa, ["--proj-coeff", "0"]),
        "cosine": (urepa, ["--manifold-weight", "0"]), "full": (urepa, []), "shuffled": (urepa, [])}
COLUMNS = dict(cosine=".3f", gram=".4f", velocity=".4f", probe=".3f", accuracy=".3f", distance=".2f")
# Two more sizes with the toy's recipe: 64 tokens of 32 px for a CPU; 256 for a GPU, as wide and deep as fits a pair.
urepa.MODELS["toy-check"] = dict(hidden_size=64, depths=(2, 3, 2), num_heads=4, mlp_dim=176, patch_size=4)
SIT_SIZES["toy-pair"] = dict(hidden_size=256, depth=12, num_heads=4, patch_size=2)
urepa.MODELS["toy-pair"] = dict(hidden_size=256, depths=(4, 7, 4), num_heads=4, mlp_dim=704, patch_size=2)
urepa.RECIPES = {
    "toy-check": urepa.RECIPES["toy"] | dict(encoder_depth=4, batch_size=48, learning_rate=5e-4, max_train_steps=350),
    "toy-pair": urepa.RECIPES["toy"] | dict(encoder_depth=8)} | urepa.RECIPES

true_loss = urepa.urepa_loss


def config_of(script, flags):
    """The Config that one of the two scripts makes of these flags."""
    if script is repa:
        return parse(flags, repa.Config, SIT_SIZES, repa.RECIPES)
    return parse(flags, urepa.Config, urepa.MODELS, urepa.RECIPES, urepa.RANGES)


def shuffled_loss(model, x, t, noise, y, zs, path_type):
    """U-REPA's loss with every image's features taken from its neighbour in the batch."""
    return true_loss(model, x, t, noise, y, [z.roll(1, dims=0) for z in zs], path_type)


def images_of(path, resolution, count, device):
    """Images from all over a prepared set, which may be sorted by class: x (B,3,H,W), labels (B,), uint8 pixels."""
    data = PreparedData(path, resolution)
    batch = data[np.arange(count) * len(data) // count]
    batch = {name: tensor.to(device) for name, tensor in batch.items()}
    return clean_input(batch, {}, None), batch["labels"], batch["images"]


@torch.no_grad()
def held_out(cfg, run, count=1000):
    """The trained run's cosine, Gram error, velocity loss and probe accuracy on images it has not seen."""
    checkpoint = torch.load(Path(cfg.out) / "last.pt", weights_only=True)
    width = checkpoint["ema"].get("projectors.0.4.bias", torch.empty(0)).numel()
    x, labels, pixels = images_of(Path(cfg.data) / "val", cfg.resolution, count, run.device)
    classes, null = checkpoint["data"]["num_classes"], torch.full_like(labels, checkpoint["data"]["num_classes"])
    model = urepa.SiTDown(x.shape[-1], x.shape[1], classes, urepa.MODELS[cfg.model], cfg.encoder_depth,
                          [width] if width else [], cfg.projector_dim)
    model.load_state_dict(checkpoint["ema"])
    model.to(run.device).eval()
    draws = torch.Generator().manual_seed(mix_seed(0, 0))
    noise, t = torch.randn(x.shape, generator=draws).to(run.device), torch.rand(count, generator=draws).to(run.device)
    zs = []
    if width:
        teacher = load_teacher("prepared", cfg.resolution, f"{cfg.data}/teacher.pt").to(run.device)
        zs = [torch.cat([teacher(part)[1] for part in pixels.split(250)])]
    rows = [slice(i, i + 250) for i in range(0, count, 250)]
    terms = [torch.cat(parts).mean().item() for parts in zip(*(
        true_loss(model, x[i], t[i], noise[i], labels[i], [z[i] for z in zs]) for i in rows))]
    figures = dict(velocity=terms[0]) | (dict(cosine=-terms[1], gram=terms[2]) if width else {})

    depth = cfg.encoder_depth - len(model.encoder) - 1

    def features(x, null):  # (B,D+1): the mean token of the aligned block, and a 1
        noise = torch.randn(x.shape, generator=draws).to(run.device)
        x_t = interpolate(x, noise, torch.full((len(x),), 0.3, device=run.device))[0]
        h = torch.cat([model.stages(part, torch.full((len(part),), 0.3, device=run.device), null[:len(part)])[1][depth]
                       .mean(dim=1) for part in x_t.split(250)])
        return F.pad(h, (0, 1), value=1).double().cpu()
    known, known_labels, _ = images_of(cfg.data, cfg.resolution, 4 * count, run.device)
    a, b = features(known, null.repeat(4)), F.one_hot(known_labels.cpu(), classes).double()
    ridge = 1e-3 * len(a) * torch.eye(a.shape[1], dtype=torch.float64)
    weights = torch.linalg.solve(a.mT @ a + ridge, a.mT @ b)
    figures["probe"] = ((features(x, null) @ weights).argmax(dim=1) == labels.cpu()).double().mean().item()
    return figures


def best_possible(cfg, weight, count=200, steps=600):
    """Cosine and Gram error of vectors chosen freely, per image, as middle tokens: hardly a network does better."""
    pixels = images_of(Path(cfg.data) / "val", cfg.resolution, count, "cpu")[2]
    s = F.normalize(load_teacher("prepared", cfg.resolution, f"{cfg.data}/teacher.pt")(pixels)[1], dim=-1)
    h = urepa.to_tokens(F.avg_pool2d(urepa.to_grid(s), 2)).requires_grad_()
    optimizer = torch.optim.Adam([h], lr=0.01)
    for _ in range(steps):
        z_hat = urepa.to_tokens(F.interpolate(urepa.to_grid(h), scale_factor=2, mode="bilinear"))
        terms = [loss(F.normalize(z_hat, dim=-1), s) for loss in (urepa.token_loss, urepa.manifold_loss)]
        optimizer.zero_grad()
        (terms[0] + weight * terms[1]).sum().backward()
        optimizer.step()
    return -terms[0].mean().item(), terms[1].mean().item()


def run_arm(arm, seed, out, samples, flags):
    """Train one arm, measure it, judge its samples: a dict of COLUMNS, and the course of the training losses."""
    script, arm_flags = ARMS[arm]
    urepa.urepa_loss = shuffled_loss if arm == "shuffled" else true_loss
    cfg = config_of(script, [*flags, *arm_flags, "--seed", str(seed), "--out", str(out), "--preview-every", "0"])
    run = script.setup(cfg)
    script.train(cfg, run)
    figures = held_out(cfg, run) if script is urepa else {}
    if samples:
        script.main(["--model", cfg.model, "--sample", str(samples), "--ckpt", str(out / "last.pt"),
                     "--micro-batch", "32"])
        [judged] = evaluate.main([str(out / "samples.npz"), cfg.data])
        figures |= dict(accuracy=judged["judge_accuracy"], distance=judged["judge_fd"])
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    fifths = [log[i * len(log) // 5 - 1] for i in range(1, 6)] if len(log) >= 5 else log
    return figures | dict(course=[[line["step"], line.get("loss_proj"), line.get("loss_manifold")] for line in fifths])


def main():
    """Run what is missing, then print the tables and what was to be shown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", default="toy")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=["none", "cosine", "full"])
    parser.add_argument("--samples", type=int, default=480)
    args, flags = parser.parse_known_args()
    folder, found = Path(f"runs/check-urepa-{args.name}"), {}
    for seed in args.seeds:
        for arm in args.arms:
            path = folder / f"{arm}-{seed}.json"
            if not path.exists():
                figures = run_arm(arm, seed, folder / f"{arm}-{seed}", args.samples, flags)
                path.write_text(json.dumps(figures, indent=1))
            found[arm, seed] = json.loads(path.read_text())

    print(f"\n| arm | {' | '.join(COLUMNS)} |\n|---|{'---|' * len(COLUMNS)}")
    for arm in args.arms:
        cells = [" ".join(f"{found[arm, seed][name]:{form}}" if name in found[arm, seed] else "-"
                          for seed in args.seeds) for name, form in COLUMNS.items()]
        print(f"| {arm} | {' | '.join(cells)} |")
    for arm in [arm for arm in args.arms if "cosine" in found[arm, args.seeds[0]]]:
        print(f"{arm}, cosine and Gram error in training, seed {args.seeds[0]}: " + ", ".join(
            f"{-proj:.3f} {gram:.4f} (step {step})" for step, proj, gram in found[arm, args.seeds[0]]["course"]))
    if not {"none", "cosine", "full"} <= set(args.arms):
        return
    cfg = config_of(urepa, flags)
    for weight in (0, cfg.manifold_weight):
        cosine, gram = best_possible(cfg, weight)
        print(f"free middle tokens, w {weight:g}: cosine {cosine:.3f}, Gram error {gram:.4f}")
    mean = {(arm, name): np.mean([found[arm, seed].get(name, np.nan) for seed in args.seeds])
            for arm in args.arms for name in COLUMNS}
    gram, cosine = mean["full", "gram"] / mean["cosine", "gram"], mean["full", "cosine"] - mean["cosine", "cosine"]
    probes = [mean[arm, "probe"] for arm in ("none", "cosine", "full")]
    checks = [(gram <= 0.7 and cosine > -0.05,
               f"w 3 makes the Gram error {gram:.2f} times as large (at most 0.7), the cosine {cosine:+.3f} (> -0.05)"),
              (min(probes[1:]) > probes[0],
               f"the probe of the aligned arms, {probes[1]:.3f} and {probes[2]:.3f}, lies above {probes[0]:.3f}")]
    for passed, text in checks:
        print("passed:" if passed else "FAILED:", text)
    raise SystemExit(not all(passed for passed, _ in checks))


if __name__ == "__main__":
    main()

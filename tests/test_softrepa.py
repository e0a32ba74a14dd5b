"""SoftREPA against the official code, and what must hold of its tokens, loss, chunks, runs, samples and error lines."""
import copy
import functools
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
from safetensors.torch import save_file

import prepare
import softrepa
import support.sd3
import support.vae
from common import FP32Sequential, sample
from golden_utils import Fixture
from softrepa import (
    SoftTokens,
    contrastive_loss,
    flow_errors,
    load_soft,
    pair_errors,
    scheduled_rate,
    soft_velocity,
)
from support.clip import ClipText, Tokenizer
from support.dataset import CaptionedData, clean_input
from support.pairs import draw_objects, make_pairs, prepare_pairs, recognise
from support.sd3 import SD3_MEDIUM, MMDiT, encode_prompts, sd3_times, store_bf16
from support.vae import AutoencoderKL

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = Fixture("softrepa")
CONFIG = GOLDEN.config


# ----------------------------------------------------------------------------------------------------------------------
# The official code


@pytest.fixture(scope="module")
def model():
    width = CONFIG["attention_head_dim"] * CONFIG["num_attention_heads"]
    model = MMDiT(in_channels=CONFIG["in_channels"], hidden_size=width, depth=CONFIG["num_layers"],
                  num_heads=CONFIG["num_attention_heads"], context_dim=CONFIG["joint_attention_dim"],
                  pooled_dim=CONFIG["pooled_projection_dim"], pos_embed_size=CONFIG["pos_embed_max_size"])
    return GOLDEN.fill(model).eval().requires_grad_(False)


def tokens(use_time=True, name="dc_tokens"):
    """The fixture's soft tokens."""
    soft = SoftTokens(CONFIG["n_dc_layers"], CONFIG["n_dc_tokens"], 32, use_time, GOLDEN.input(name).shape[2])
    soft.dc_tokens.data = GOLDEN.input(name)
    if use_time:
        soft.dc_t_tokens.weight.data = GOLDEN.input("dc_t_weight")
    return soft


def parse(flags):
    return softrepa.parse(flags, softrepa.Config, softrepa.MODELS, softrepa.RECIPES, softrepa.RANGES)


def texts():
    return GOLDEN.input("context"), GOLDEN.input("pooled")


def velocity(model, soft):
    return functools.partial(soft_velocity, model, soft)


def test_velocity(model):
    inputs = GOLDEN.input("xt"), GOLDEN.input("t") / 1000, *texts()
    GOLDEN.check("v_plain", soft_velocity(model, None, *inputs))
    GOLDEN.check("v_soft", soft_velocity(model, tokens(), *inputs))
    GOLDEN.check("v_soft_no_time", soft_velocity(model, tokens(use_time=False), *inputs))
    GOLDEN.check("v_soft_wide", soft_velocity(model, tokens(name="dc_tokens_wide"), *inputs))
    torch.testing.assert_close(soft_velocity(model, None, *inputs), model(*inputs))


def errors_of(model, soft):
    return pair_errors(velocity(model, soft), GOLDEN.input("x"), GOLDEN.input("t_train") / 1000, GOLDEN.input("noise"),
                       *texts())


def test_loss_and_gradients(model):
    soft, own = tokens(), torch.arange(CONFIG["batch"])
    errors = errors_of(model, soft)
    GOLDEN.check("errors", errors)
    GOLDEN.check("logits", softrepa.LOGIT_SCALE * torch.exp(-errors / softrepa.TEMPERATURE))
    row = int(GOLDEN.input("t_train")) // 10
    GOLDEN.check("dc_t_row_index", torch.tensor(row))
    for name, dweight in (("", 0.0), ("_dweight10", 10.0)):
        soft.zero_grad()
        loss = contrastive_loss(errors, own, dweight).mean()
        loss.backward(retain_graph=True)
        GOLDEN.check(f"loss{name}", loss)
        GOLDEN.check(f"grad{name}/dc_tokens", soft.dc_tokens.grad)
        GOLDEN.check(f"grad{name}/dc_t_row", soft.dc_t_tokens.weight.grad[row])
        assert soft.dc_t_tokens.weight.grad.count_nonzero(dim=1).nonzero().flatten().tolist() == [row]
    assert all(p.grad is None for p in model.parameters())  # the network is frozen


def test_wide_tokens_pass_through_the_text_embedder(model):
    soft = tokens(use_time=False, name="dc_tokens_wide")
    loss = contrastive_loss(errors_of(model, soft), torch.arange(4)).mean()
    loss.backward()
    GOLDEN.check("loss_wide_no_time", loss)
    GOLDEN.check("grad_wide_no_time/dc_tokens", soft.dc_tokens.grad)


def test_rows_in_chunks(model):
    """The second official trainer: a noise per chunk, and the mean of each chunk over the whole batch."""
    soft, losses, errors = tokens(), [], []
    for own, noise in zip(torch.arange(CONFIG["batch"]).split(CONFIG["nrows"]), GOLDEN.input("chunk_noise")):
        errors.append(pair_errors(velocity(model, soft), GOLDEN.input("x")[own], GOLDEN.input("t_train") / 1000,
                                  noise[None], *texts()))
        losses.append(contrastive_loss(errors[-1], own).mean() / CONFIG["batch"])
    sum(losses).backward()
    GOLDEN.check("chunk/errors", torch.cat(errors))
    GOLDEN.check("chunk/loss_sum", sum(losses))
    GOLDEN.check("chunk/grad/dc_tokens", soft.dc_tokens.grad)


def test_sampler(model):
    GOLDEN.check("sigmas_28", torch.tensor(sd3_times(28)))
    times = sd3_times(CONFIG["nfe"])
    GOLDEN.check("sample_sigmas", torch.tensor(times))
    context, pooled = (torch.cat([part, GOLDEN.input(f"null_{name}")]) for part, name in
                       zip(texts(), ("context", "pooled")))
    y, y_null = torch.arange(4), torch.full((4,), 4)
    for name, soft in (("sample", tokens()), ("sample_plain", None)):
        x = sample(lambda x_t, t, y: soft_velocity(model, soft, x_t, t, context[y], pooled[y]), GOLDEN.input("z0"), y,
                   y_null, times=times, cfg_scale=CONFIG["cfg_scale"])
        GOLDEN.check(name, x)


def test_every_output_of_the_fixture_was_compared():
    GOLDEN.assert_all_checked(but=["edit"])  # FlowEdit is not here


# ----------------------------------------------------------------------------------------------------------------------
# Tokens


def test_soft_outputs_are_thrown_away_after_each_block(model):
    """What a block makes of its soft tokens never reaches the next block: there the text has its own length again."""
    soft, lengths, inputs = tokens(), [], (GOLDEN.input("xt"), GOLDEN.input("t") / 1000, *texts())
    hooks = [block.register_forward_pre_hook(lambda block, args: lengths.append(args[0].shape[1]))
             for block in model.blocks]
    v = soft_velocity(model, soft, *inputs)
    for hook in hooks:
        hook.remove()
    n, m = CONFIG["text_len"], CONFIG["n_dc_tokens"]
    assert lengths == [m + n, m + n, n]
    kept = model.embed(*inputs)
    text, h, c = kept
    for k, block in enumerate(model.blocks):  # the mutation: soft outputs stay
        text = torch.cat([soft(k, inputs[1], model.context_embedder), text], dim=1) if k < 2 else text
        text, h = block(text, h, c)
    assert (model.head(h, c, (8, 8)) - v).abs().max() > 0.02


def test_the_time_picks_the_row():
    soft = SoftTokens(2, 3, 4)
    soft.dc_tokens.data.zero_()
    soft.dc_t_tokens.weight.data[:] = torch.arange(100.0)[:, None]
    for times, rows in ((torch.arange(1000).float() / 1000, torch.arange(1000) // 10),
                        (torch.tensor(sd3_times(28)[:3]), torch.tensor([99, 98, 97])),
                        (torch.tensor([0.0, 0.9999, 1.0]), torch.tensor([0, 99, 99]))):
        assert soft(1, times, None)[:, 0, 0].tolist() == rows.tolist()  # 1.0 alone goes to the last row
    soft.dc_t_tokens.weight.data[:] = torch.arange(8.0)
    assert soft(0, torch.zeros(1), None)[0].tolist() == 3 * [[0, 1, 2, 3]]
    assert soft(1, torch.zeros(1), None)[0].tolist() == 3 * [[4, 5, 6, 7]]


def test_trained_numbers_of_sd3():
    for wide, count in ((None, 798_720), (4096, 849_920)):
        assert sum(p.numel() for p in SoftTokens(5, 4, 1536, token_width=wide).parameters()) == count
    cfg = parse(["--model", "sd3"])
    assert (cfg.n_dc_layers, cfg.n_dc_tokens, cfg.use_dc_t, cfg.batch_size, cfg.num_steps, cfg.cfg_scale) == (
        5, 4, True, 16, 28, 4.0)
    fresh = SoftTokens(5, 4, 1536)
    assert all(abs(p.std().item() - 0.02) < 1e-3 for p in fresh.parameters())


@torch.no_grad()
def test_bf16_is_for_weights_that_autocast_rounds(model):
    """What an FP32Sequential holds stays fp32, bit for bit; so the velocity is that of fp32 weights, bit for bit."""
    stored = store_bf16(copy.deepcopy(model))
    kept = {f"{name}.{key}" for name, module in model.named_modules() if isinstance(module, FP32Sequential)
            for key in module.state_dict()}
    assert {"t_embedder.mlp.0.weight", "joint_blocks.0.x_block.adaLN_modulation.1.bias"} <= kept
    true = model.state_dict()
    for name, weight in stored.state_dict().items():
        if name in kept or name == "pos_embed":
            assert weight.dtype == torch.float32 and torch.equal(weight, true[name]), name
        else:
            assert weight.dtype == torch.bfloat16 and torch.equal(weight, true[name].bfloat16()), name
    with torch.autocast("cpu", torch.bfloat16):
        a, b = (soft_velocity(m, tokens(), GOLDEN.input("xt"), GOLDEN.input("t") / 1000, *texts())
                for m in (model, stored))
    assert torch.equal(a, b)


def released(folder, time_rows=100, **sizes):
    """The two released files, with random numbers: a Parameter, and a pickled Embedding."""
    folder.mkdir()
    layers, m, width = (sizes.get(name, default) for name, default in (("layers", 5), ("m", 4), ("width", 1536)))
    torch.save(nn.Parameter(torch.randn(layers, m, width)), folder / "dc_tokens.pth")
    torch.save(nn.Embedding(time_rows, layers * 1536), folder / "dc_t_tokens.pth")
    return folder


@pytest.fixture(scope="module")
def sd3_on_meta():
    with torch.device("meta"):
        return MMDiT(**SD3_MEDIUM)


def test_released_tokens(sd3_on_meta, tmp_path):
    folder = released(tmp_path / "soft")
    soft = load_soft(folder, sd3_on_meta)
    assert torch.equal(soft.dc_tokens, torch.load(folder / "dc_tokens.pth", weights_only=True))
    embedding = torch.load(folder / "dc_t_tokens.pth", weights_only=False)
    assert torch.equal(soft.dc_t_tokens.weight, embedding.weight)
    at_half = soft(2, torch.tensor([0.5]), None)  # the trained time tokens act
    torch.testing.assert_close(at_half[0], soft.dc_tokens[2] + embedding.weight[50, 2 * 1536:3 * 1536])
    (folder / "dc_t_tokens.pth").unlink()
    assert load_soft(folder, sd3_on_meta).dc_t_tokens is None


# ----------------------------------------------------------------------------------------------------------------------
# The loss


def test_softmax_is_over_the_texts_of_an_image():
    errors = torch.rand(3, 5, generator=torch.Generator().manual_seed(0)) / 10
    own, loss = torch.tensor([1, 0, 4]), contrastive_loss
    expected = [-torch.log_softmax(4 * torch.exp(-errors[i] / 0.07), dim=0)[own[i]] for i in range(3)]
    torch.testing.assert_close(loss(errors, own), torch.stack(expected))
    other = errors.clone()
    other[1:] = 1.0  # rows do not touch
    assert loss(other, own)[0] == loss(errors, own)[0]
    torch.testing.assert_close(loss(errors, own, 10.0) - loss(errors, own), 10 * errors[torch.arange(3), own])


def test_large_errors_carry_no_gradient():
    for error, slope in ((0.05, 27.97), (0.2, 3.28), (0.5, 0.045)):  # |dl/de| = (scale/temp) exp(-e/temp)
        e = torch.tensor([error], requires_grad=True)
        (softrepa.LOGIT_SCALE * torch.exp(-e / softrepa.TEMPERATURE)).backward()
        assert abs(e.grad.item() + slope) < 0.01


def test_pairs_are_images_by_texts(model):
    soft = tokens()
    errors = errors_of(model, soft)
    x, noise, t, (context, pooled) = GOLDEN.input("x"), GOLDEN.input("noise"), GOLDEN.input("t_train") / 1000, texts()
    for i, j in ((0, 1), (3, 2)):
        alone = flow_errors(velocity(model, soft), x[i:i + 1], t, noise, context[j:j + 1], pooled[j:j + 1])
        torch.testing.assert_close(errors[i, j], alone[0], rtol=1e-4, atol=1e-6)


def test_recomputing_changes_nothing(model):
    gradients = []
    for recompute in (False, True):
        soft = tokens()
        v = soft_velocity(model, soft, GOLDEN.input("xt"), GOLDEN.input("t") / 1000, *texts(), recompute=recompute)
        v.square().mean().backward()
        gradients.append(soft.dc_tokens.grad)
    assert gradients[0].abs().max() > 0 and torch.equal(*gradients)


def test_schedule():
    cfg = parse(["--model", "sd3"])
    rates = [scheduled_rate(cfg, step) for step in (1, 500, 501, 2501, 4501, 5000, 5001)]
    assert rates[0] == rates[1] == rates[6] == 1e-3 and rates[4] == rates[5]
    assert rates[2] == pytest.approx(1e-5 + 0.99e-3 * (1 + np.cos(np.pi / 10)) / 2)
    assert rates[3] == pytest.approx(0.505e-3)
    reference = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(reference, T_0=10, eta_min=1e-5)
    for stair in range(25):
        assert scheduled_rate(cfg, 500 * stair + 1) == pytest.approx(schedule.get_last_lr()[0])
        reference.step()
        schedule.step()


# ----------------------------------------------------------------------------------------------------------------------
# Runs, on a tiny toy


@pytest.fixture(scope="module", autouse=True)
def keep_signals():
    """Training in this process takes over Ctrl-C; give it back."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    torch.set_num_threads(1)
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """prepare.py's toy: 400 pairs, 20 of them held out, and a model of sixty steps."""
    path = tmp_path_factory.mktemp("softrepa") / "pairs"
    prepare_pairs(path, count=400, steps=60)
    return path


STEPS = 8


def flags(data, out, steps, *more):
    return [str(flag) for flag in ("--data", data, "--out", out, "--max-train-steps", steps, "--batch-size", 4,
                                   "--log-every", 1, "--save-every", 4, "--num-steps", 3, *more)]


def last(out, name="last.pt"):
    return torch.load(Path(out) / name, weights_only=True)


def assert_same_tokens(a, b, rtol=0.0):
    for name, value in last(a)["soft"].items():
        torch.testing.assert_close(last(b)["soft"][name], value, rtol=rtol, atol=rtol * value.abs().max().item())


@pytest.fixture(scope="module")
def trained(data):
    softrepa.main(flags(data, data.parent / "run", STEPS))
    return data.parent / "run"


def test_only_the_tokens_are_saved_and_they_move(trained, data):
    saved = last(trained)
    assert set(saved["soft"]) == {"dc_tokens", "dc_t_tokens.weight"} and saved["step"] == STEPS
    torch.manual_seed(0)
    fresh = SoftTokens(3, 4, 64)
    assert (saved["soft"]["dc_tokens"] - fresh.dc_tokens).abs().max() > 1e-3
    lines = [json.loads(line) for line in (trained / "log.jsonl").read_text().splitlines()]
    assert len(lines) == STEPS and {"loss", "error", "retrieval", "gap"} <= set(lines[0])
    assert 0 <= lines[0]["retrieval"] <= 1 and abs(lines[0]["loss"] - np.log(4)) < 0.7


def test_half_and_half_is_the_whole(trained, data, tmp_path):
    softrepa.main(flags(data, tmp_path / "halves", STEPS // 2))
    softrepa.main(flags(data, tmp_path / "halves", STEPS))
    assert_same_tokens(trained, tmp_path / "halves")
    moments, others = last(trained)["optimizer"]["state"], last(tmp_path / "halves")["optimizer"]["state"]
    assert all(torch.equal(moments[i][key], others[i][key]) for i in moments for key in moments[i])
    assert last(trained, "best.pt")["data"]["loss"] == last(tmp_path / "halves", "best.pt")["data"]["loss"]


def test_the_best_checkpoint_is_the_one_with_the_least_held_out_loss(data, tmp_path, monkeypatch):
    losses = iter([3.0, 1.0, 2.0])
    monkeypatch.setattr(softrepa, "validate", lambda *args: dict(loss=next(losses)))
    softrepa.main(flags(data, tmp_path, 6, "--save-every", 2))
    assert (last(tmp_path, "best.pt")["step"], last(tmp_path)["step"], last(tmp_path)["data"]["best"]) == (4, 6, 1.0)


def test_tokens_without_time(data, tmp_path):
    softrepa.main(flags(data, tmp_path, 1, "--no-use-dc-t"))
    assert set(last(tmp_path)["soft"]) == {"dc_tokens"}


@pytest.mark.parametrize("objective", ["contrastive", "fm"])
def test_chunks_change_nothing(objective, data, tmp_path):
    for nrows in (4, 1):
        softrepa.main(flags(data, tmp_path / str(nrows), STEPS, "--nrows", nrows, "--objective", objective))
    assert_same_tokens(tmp_path / "4", tmp_path / "1", rtol=1e-4)


def test_flow_matching_is_another_run(data, trained, tmp_path):
    softrepa.main(flags(data, tmp_path, STEPS, "--objective", "fm"))
    difference = last(tmp_path)["soft"]["dc_tokens"] - last(trained)["soft"]["dc_tokens"]
    assert difference.abs().max() > 1e-3
    assert set(json.loads((tmp_path / "log.jsonl").read_text().splitlines()[0])) & {"retrieval", "gap"} == set()


@pytest.fixture(scope="module")
def two_ranks(data, trained):
    """The same run and samples by two ranks: one start of torchrun serves both."""
    out, code = data.parent / "two", """
import sys; sys.path.insert(0, sys.argv[1])
from torch import distributed as dist; dist.init_process_group(); destroy = dist.destroy_process_group
dist.destroy_process_group = lambda: None; calls = []; reduce = dist.all_reduce
dist.all_reduce = lambda *args, **options: (calls.append(1), reduce(*args, **options))
import softrepa; cut = sys.argv.index("--"); softrepa.main(sys.argv[2:cut]); softrepa.main(sys.argv[cut + 1:])
print(f"REDUCTIONS {len(calls)}"); destroy()"""
    path = data.parent / "two.py"
    path.write_text(code)
    hidden = "RANK", "WORLD_SIZE", "LOCAL_RANK"
    env = {k: v for k, v in os.environ.items() if k not in hidden} | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", path,
                           str(ROOT), *flags(data, out, STEPS, "--save-every", STEPS), "--", *sampling(trained, out)],
                          env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return out, done.stdout


def sampling(run, out, *more):
    return [str(flag) for flag in ("--data", run.parent / "pairs", "--ckpt", run / "best.pt", "--out", out, "--sample",
                                   6, "--num-steps", 3, "--batch-size", 6, *more)]


def test_two_ranks_are_one(trained, two_ranks):
    assert_same_tokens(trained, two_ranks[0], rtol=1e-4)
    # One reduction a step; besides, one per log line (every step here) and one of the held-out figures.
    assert two_ranks[1].count(f"REDUCTIONS {2 * STEPS + 1}") == 2


def test_samples(trained, two_ranks, tmp_path):
    softrepa.main(sampling(trained, tmp_path))
    softrepa.main(sampling(trained, tmp_path / "2", "--nrows", "2"))
    softrepa.main(sampling(trained, tmp_path, "--no-soft", "--cfg-scale", "2"))
    whole, pairs, base, two = (np.load(path) for path in (
        tmp_path / "samples.npz", tmp_path / "2/samples.npz", tmp_path / "samples-base-cfg2.npz",
        two_ranks[0] / "samples.npz"))
    assert whole["arr_0"].shape == (6, 16, 16, 3) and whole["arr_0"].std() > 1
    for other in (pairs, two):
        assert np.abs(other["arr_0"].astype(int) - whole["arr_0"]).max() <= 1
    assert (base["arr_0"] != whole["arr_0"]).any()
    prompts = json.loads((tmp_path / "samples.json").read_text())
    assert len(prompts) == 6 and all("," in prompt for prompt in prompts) and (tmp_path / "samples.png").is_file()


def test_samples_use_the_trained_tokens_in_both_branches(trained, tmp_path, monkeypatch):
    seen, true = [], softrepa.soft_velocity
    monkeypatch.setattr(softrepa, "soft_velocity", lambda model, soft, *args: (
        seen.append((soft, len(args[0]), args[2][-1].abs().max().item())), true(model, soft, *args))[1])
    softrepa.main(sampling(trained, tmp_path, "--cfg-scale", "2"))
    assert len(seen) == 3 and all(n == 12 and null == 0 for _, n, null in seen)  # one call holds both; null is zeros
    best = last(trained, "best.pt")["soft"]
    assert all(torch.equal(soft.state_dict()[name], best[name]) for soft, _, _ in seen for name in best)


def test_bench_writes_nothing(data, tmp_path, capsys):
    softrepa.main(flags(data, tmp_path / "out", 3, "--bench", "5"))
    assert "images_per_s" in capsys.readouterr().out and not (tmp_path / "out").exists()


def test_sd3_s_way_through_the_script(tmp_path, monkeypatch, capsys):
    """--bench with a tiny network in SD3's place: latents of 16 channels, padded text, bf16, chunks, recomputing."""
    tiny = SD3_MEDIUM | dict(hidden_size=64, depth=6, num_heads=4, pos_embed_size=8)
    monkeypatch.setattr(softrepa, "SD3_MEDIUM", tiny)
    kept, true = [], softrepa.load_model
    monkeypatch.setattr(softrepa, "load_model", lambda *args: (kept.append(true(*args)), kept[-1])[1])
    softrepa.main(["--model", "sd3", "--bench", "2", "--resolution", "64", "--batch-size", "2", "--nrows", "1",
                   "--precision", "bf16", "--recompute", "--workers", "0", "--no-compile",
                   "--out", str(tmp_path / "out")])
    assert "2 x 2 pairs a step = 1 x cpu x 2 chunks of 1 images" in capsys.readouterr().out
    dtypes = {name: p.dtype for name, p in kept[0].named_parameters()}
    assert dtypes["joint_blocks.0.x_block.attn.qkv.weight"] == torch.bfloat16
    assert dtypes["joint_blocks.0.x_block.adaLN_modulation.1.weight"] == torch.float32
    assert all(p.grad is None for p in kept[0].parameters())


# ----------------------------------------------------------------------------------------------------------------------
# The toy and its oracle


def test_the_oracle_is_exact_and_sees_every_word():
    images, labels, context, pooled, captions = make_pairs(3000, seed=3)
    objects = draw_objects()
    assert (recognise(images, objects) == labels).all()
    noisy = np.clip(images + np.random.RandomState(0).normal(0, 20, images.shape), 0, 255).astype(np.uint8)
    assert (recognise(noisy, objects) == labels).mean() > 0.99
    wrong = recognise(images[:, :, ::-1].copy(), objects)  # mirrored, the two objects change places
    swapped = {label: ", ".join(reversed(captions[label].split(", "))) for label in range(576)}
    assert [captions[i] for i in wrong] == [swapped[i] for i in labels]
    assert len(set(captions)) == 576 and captions[labels[0]].count(" ") == 3
    same = labels == labels[0]
    assert (context[same] == context[0]).all() and len(np.unique(context[:, 0], axis=0)) == 6


def test_report(tmp_path, capsys):
    """The table at the end: base and soft, four figures each, and the picture."""
    prepare_pairs(tmp_path / "pairs", count=500, steps=2)
    given = flags(tmp_path / "pairs", tmp_path / "run", 2)
    softrepa.main(given)
    cfg = parse(given)
    softrepa.report_toy(cfg, softrepa.setup(cfg, micro_batch=cfg.nrows))
    lines = capsys.readouterr().out.splitlines()
    table = [line.split() for line in lines if line.startswith(("base  ", "soft  "))]
    assert [row[0] for row in table] == ["base", "soft"] and all(len(row) == 5 for row in table)
    assert any("real images: 100%" in line for line in lines)
    from PIL import Image
    assert Image.open(tmp_path / "run/before-after.png").size == (8 * (64 + 2) + 2, 9 * (64 + 2) + 2)


# ----------------------------------------------------------------------------------------------------------------------
# prepare.py text, with tiny parts in SD3's place


MERGES = [tuple(merge.split()) for merge in Fixture("clip_bpe").file["inputs"]["mini_merges"]]


@pytest.fixture
def photos(tmp_path, monkeypatch):
    """Ten pictures with captions, and SD3's parts replaced by tiny ones of random weights."""
    from PIL import Image
    folder = tmp_path / "photos"
    folder.mkdir()
    rng = np.random.RandomState(0)
    for i in range(10):
        Image.fromarray(rng.randint(0, 256, (40, 50, 3), np.uint8)).save(folder / f"{i}.png")
    captions = {f"{i}.png": f"a photo of {i} squares" + " and a circle" * (40 if i == 9 else 0) for i in range(10)}
    (tmp_path / "captions.json").write_text(json.dumps(captions))
    torch.manual_seed(0)
    vae = AutoencoderKL(latent_channels=16, widths=(8, 8, 8, 8), layers=1, groups=4)
    vae.quant_conv = vae.post_quant_conv = nn.Identity()
    tokenizer = Tokenizer(MERGES)
    towers = [ClipText(width=width, layers=2, num_heads=4, vocabulary=len(tokenizer.ids), project=project)
              for width, project in ((768, False), (1280, True))]
    text = functools.partial(encode_prompts, tokenizer, *towers), tokenizer
    for module in (prepare, support.sd3):
        monkeypatch.setattr(module, "load_sd3_text", lambda *args: text)
    for module in (prepare, support.vae):
        monkeypatch.setattr(module, "load_sd3_vae", lambda path="": vae)
    return folder, captions, text, vae


def prepare_text(tmp_path, *more):
    prepare.main([str(flag) for flag in (
        "text", "--images", tmp_path / "photos", "--captions", tmp_path / "captions.json", "--out", tmp_path / "cache",
        "--resolution", 32, "--workers", 0, *more)])
    return tmp_path / "cache"


def test_the_cache(photos, tmp_path, capsys):
    _, captions, (encode, tokenizer), vae = photos
    cache = prepare_text(tmp_path)
    said = capsys.readouterr().out
    assert "10 captioned images" in said and "GB of disk" in said and "1 captions are longer than the 75 tokens" in said
    train, held_out = (CaptionedData(cache, 32, "sd3", part) for part in (False, True))
    assert train.meta["vae"] == "sd3"  # so that samples are decoded by SD3's
    assert (len(train), len(held_out)) == (10, 0) and json.loads((cache / "captions.json").read_text()) == [
        captions[f"{i}.png"] for i in range(10)]
    batch = train[np.arange(10)]
    assert {name: tuple(t.shape) for name, t in batch.items()} == dict(
        moments=(10, 32, 4, 4), context=(10, 77, 2048), pooled=(10, 2048))
    context, pooled = encode([tokenizer.encode(captions[f"{i}.png"]) for i in range(10)])
    torch.testing.assert_close(batch["context"].float(), context, rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(batch["pooled"].float(), pooled, rtol=2e-3, atol=2e-3)
    pixels = torch.from_numpy(prepare.read_image(tmp_path / "photos/3.png", 32)).permute(2, 0, 1)[None] / 127.5 - 1
    with torch.no_grad():
        torch.testing.assert_close(batch["moments"][3].float(), torch.cat(vae.encode(pixels), dim=1)[0], rtol=2e-3,
                                   atol=2e-3)
    x = clean_input(batch, train.meta, torch.zeros(10, 16, 4, 4))
    torch.testing.assert_close(x, (batch["moments"][:, :16].float() - 0.0609) * 1.5305)


def test_a_killed_cache_goes_on(photos, tmp_path, monkeypatch, capsys):
    whole = prepare_text(tmp_path)
    expected = {name: np.load(whole / f"{name}.npy") for name in ("moments", "context", "pooled")}
    whole.rename(tmp_path / "whole")
    monkeypatch.setattr(prepare, "TEXT_BATCH", 4)
    encode, calls = photos[2][0], []

    def dies(ids):
        calls.append(len(ids))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return encode(ids)
    monkeypatch.setattr(prepare, "load_sd3_text", lambda *args: (dies, photos[2][1]))
    with pytest.raises(KeyboardInterrupt):
        prepare_text(tmp_path)
    assert not (tmp_path / "cache").exists()
    capsys.readouterr()
    again = prepare_text(tmp_path)
    assert "resuming: 4 of 10" in capsys.readouterr().out and calls == [4, 4, 4, 2]
    for name, array in expected.items():
        np.testing.assert_allclose(np.load(again / f"{name}.npy").astype(float), array, rtol=2e-3, atol=2e-3)
    assert sorted(path.name for path in again.iterdir()) == [
        "captions.json", "context.npy", "labels.npy", "meta.json", "moments.npy", "pooled.npy"]


def test_coco_s_captions(tmp_path):
    (tmp_path / "b.jpg").touch(), (tmp_path / "a.jpg").touch()
    (tmp_path / "coco.json").write_text(json.dumps(dict(
        images=[dict(id=7, file_name="b.jpg"), dict(id=3, file_name="a.jpg")],
        annotations=[dict(image_id=7, caption="first"), dict(image_id=3, caption="other"),
                     dict(image_id=7, caption="second")])))
    files, captions = prepare.read_captions(tmp_path / "coco.json", tmp_path)
    assert [Path(file).name for file in files] == ["a.jpg", "b.jpg"] and captions == ("other", "first")


# ----------------------------------------------------------------------------------------------------------------------
# Bad input: one clear line each


def error_of(function, *args):
    with pytest.raises(SystemExit) as error:
        function(*args)
    message = str(error.value)
    assert message.startswith("error: ") and "\n" not in message
    return message


def test_wrong_flags(data, tmp_path):
    def says(*more):
        return error_of(softrepa.main, flags(data, tmp_path / "out", 2, *more))
    assert "unknown --model sdxl; there are toy, sd3" in says("--model", "sdxl")
    assert "no multiple of 1 ranks x --nrows 3" in says("--nrows", "3")
    assert "--n-dc-layers 9 is more than the 4 blocks of toy" in says("--n-dc-layers", "9")
    assert "--max-t 1001" in says("--max-t", "1001") and "--min-t 5 --max-t 5" in says("--min-t", "5", "--max-t", "5")
    assert "holds out 20 pairs, --batch-size is 40" in says("--batch-size", "40")
    assert "--sample needs --ckpt" in says("--sample", "2")
    assert "--prompts is for --model sd3" in says("--sample", "2", "--ckpt", "x", "--prompts", "y")
    assert "is no multiple of 16" in says("--model", "sd3", "--resolution", "100", "--sample", "2", "--ckpt", "x")
    assert "give --prompts FILE" in says("--model", "sd3", "--sample", "2", "--ckpt", "x", "--prompts", "absent.txt")
    assert not (tmp_path / "out").exists()


def test_a_prompt_that_is_too_long(photos, tmp_path):
    (tmp_path / "prompts.txt").write_text("a cat\n" + "a circle and " * 40)
    message = error_of(softrepa.main, ["--model", "sd3", "--sample", "2", "--ckpt", "x", "--prompts",
                                       str(tmp_path / "prompts.txt")])
    assert "CLIP reads 75: shorten 'a circle and a circle" in message


def test_missing_parts_of_sd3(tmp_path):
    save_file({"model.diffusion_model.pos_embed": torch.zeros(1)}, tmp_path / "no_towers.safetensors")
    (tmp_path / "prompts.txt").write_text("a cat")
    common_flags = ["--model", "sd3", "--sd3-ckpt", str(tmp_path / "no_towers.safetensors")]
    message = error_of(softrepa.main, [*common_flags, "--sample", "2", "--ckpt", "x", "--prompts",
                                       str(tmp_path / "prompts.txt")])
    assert "holds no clip_l" in message and "sd3_medium_incl_clips.safetensors" in message


def test_tokens_of_another_model(sd3_on_meta, trained, data, tmp_path):
    assert "width 1535" in error_of(load_soft, released(tmp_path / "a", width=1535), sd3_on_meta)
    assert "time tokens (99, 7680)" in error_of(load_soft, released(tmp_path / "b", time_rows=99), sd3_on_meta)
    assert "for 30 blocks" in error_of(load_soft, released(tmp_path / "c", layers=30), sd3_on_meta)
    assert "width 64" in error_of(load_soft, trained / "best.pt", sd3_on_meta)  # the toy's
    (tmp_path / "sd15").mkdir()
    torch.save(nn.Parameter(torch.zeros(4, 768)), tmp_path / "sd15/dc_tokens.pth")
    torch.save(dict(ema={}), tmp_path / "sit.pt")
    for path in (tmp_path / "sd15", tmp_path / "sit.pt"):
        assert "holds no soft tokens" in error_of(load_soft, path, sd3_on_meta)
    assert "no checkpoint" in error_of(load_soft, tmp_path / "absent", sd3_on_meta)
    assert "trained for another --model" in error_of(
        softrepa.main, sampling(trained, tmp_path, "--ckpt", tmp_path / "a"))


class Payload:
    def __reduce__(self):
        return os.system, ("true",)


def test_other_pickles_are_refused(sd3_on_meta, tmp_path):
    folder = released(tmp_path / "soft")
    torch.save(Payload(), folder / "dc_t_tokens.pth")
    assert "holds pickled objects" in error_of(load_soft, folder, sd3_on_meta)


def test_data_of_another_model(data, tmp_path):
    assert "no captioned data in nowhere; make it: python prepare.py text --images FOLDER" in error_of(
        softrepa.main, ["--model", "sd3", "--data", "nowhere"])
    assert "is for another model (its text features: toy, not sd3)" in error_of(
        softrepa.main, ["--model", "sd3", "--data", str(data), "--resolution", "16"])
    broken = Path(shutil.copytree(data, tmp_path / "broken"))
    np.save(broken / "context.npy", np.load(broken / "context.npy")[:5])
    assert "context.npy has 5 rows, not 400" in error_of(softrepa.main, flags(broken, tmp_path / "out", 2))
    (broken / "context.npy").unlink()
    assert "context.npy is missing or damaged" in error_of(softrepa.main, flags(broken, tmp_path / "out", 2))


def test_another_run_is_not_overwritten(data, trained):
    before = (trained / "last.pt").read_bytes()
    for more, says in ((("--objective", "fm"), "objective 'contrastive', now 'fm'"),
                       (("--dweight", "1"), "dweight 0.0")):
        assert says in error_of(softrepa.main, flags(data, trained, STEPS + 1, *more))
    softrepa.main(flags(data, trained, STEPS))  # finished
    assert (trained / "last.pt").read_bytes() == before


def test_wrong_captions(photos, tmp_path):
    def says(content):
        (tmp_path / "captions.json").write_text(content)
        return error_of(prepare_text, tmp_path)
    for content in ("hello", "[1]", "{\"annotations\": [{}], \"images\": []}"):
        assert "COCO's captions_*.json" in says(content)
    assert "holds no caption" in says("{}")
    assert "absent.png, which is not there" in says('{"absent.png": "a cat"}')
    (tmp_path / "photos/text.png").write_text("hello")
    assert "text.png' cannot be read" in says('{"text.png": "a cat"}')
    assert "not a multiple of 16" in error_of(prepare_text, tmp_path, "--resolution", "40")
    assert "exists already" in error_of(prepare_text, tmp_path, "--out", tmp_path)


@pytest.mark.slow
def test_one_true_step_of_sd3_medium(monkeypatch, tmp_path):
    """All 2.03 B parameters, random, on the CPU: 64 px, two images with two texts, a chunk each; fp32, inside 16 GB."""
    steps, true = [], softrepa.optimizer_step
    monkeypatch.setattr(softrepa, "optimizer_step", lambda optimizer, parameters, norm: (
        steps.append([p.grad.clone() for p in parameters]), true(optimizer, parameters, norm))[1])
    softrepa.main(["--model", "sd3", "--bench", "1", "--resolution", "64", "--batch-size", "2", "--nrows", "1",
                   "--precision", "fp32", "--no-compile", "--recompute", "--workers", "0", "--out", str(tmp_path)])
    [(tokens_grad, time_grad)] = steps
    assert tokens_grad.shape == (5, 4, 1536) and time_grad.shape == (100, 7680)
    assert tokens_grad.isfinite().all() and tokens_grad.abs().sum(dim=(1, 2)).min() > 0  # every block's tokens
    assert time_grad.any(dim=1).sum() == 1  # one time, one row
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 < 16e9

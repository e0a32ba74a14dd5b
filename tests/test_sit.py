"""SiT against the official code: forward, embeddings, label dropout, initial values, names and shapes, conversion."""
import pytest
import torch

from common import SIT_SIZES, SiT, timestep_embedding
from golden_utils import Fixture, official_keys, state_shapes
from repa import REPASiT
from support.checkpoints import convert_willisma_sit, init_from, load_weights, sit_from_weights


def small_repa(config):
    """REPA's SiT of a fixture's config, in eval mode: nothing in it depends on the mode."""
    sizes = dict(hidden_size=config["hidden_size"], depth=config["depth"], num_heads=config["num_heads"],
                 patch_size=config["patch_size"])
    return REPASiT(config["input_size"], config["in_channels"], config["num_classes"], sizes,
                   config["encoder_depth"], config["z_dims"], config["projector_dim"])


def test_forward_equals_the_official_code():
    golden = Fixture("sit")
    model = golden.fill(small_repa(golden.config))
    x, t, y = (golden.input(name) for name in ("x", "t", "y"))
    golden.check("x_embed", model.x_embedder(x))
    golden.check("pos_embed", model.pos_embed)
    golden.check("t_freq", timestep_embedding(t))
    golden.check("t_emb", model.t_embedder(t))
    golden.check("y_emb", model.y_embedder(y))
    h, c = model.embed(x, t, y)
    for i, block in enumerate(model.blocks):
        h = block(h, c)
        golden.check(f"block.{i}", h)
    v, (z_hat,) = model(x, t, y)
    golden.check("v", v)
    golden.check("zs.0", z_hat)
    torch.testing.assert_close(model.velocity(x, t, y), v, rtol=0, atol=0)  # sampling leaves out the projector only

    # In training the official model drops labels inside; here the caller gives labels with the drops already made.
    dropped = golden.input("y_train").masked_fill(golden.input("drop_uniform") < golden.config["class_dropout_prob"],
                                                  model.num_classes)
    golden.check("y_train_after_drop", dropped)
    v, (z_hat,) = model(x, t, dropped)
    golden.check("v_train", v)
    golden.check("zs_train.0", z_hat)

    # willisma/SiT: the same weights with a head twice as wide, time running the other way.
    theirs = dict(model.state_dict()) | {
        f"final_layer.linear.{name}": golden.input(f"sit_learn_sigma/final_layer.linear.{name}")
        for name in ("weight", "bias")}
    ours = small_repa(golden.config)
    ours.load_state_dict(convert_willisma_sit(theirs))
    golden.check("sit_learn_sigma_converted", ours.velocity(x, t, y))
    golden.check("sit_learn_sigma_out", -ours.velocity(x, 1 - t, y))
    golden.assert_all_checked(but=["sit_forward_with_cfg"])  # guides 3 of 4 channels: out of scope


def test_fresh_model_starts_as_the_official_one():
    golden = Fixture("sit")
    torch.manual_seed(0)
    state = small_repa(golden.config).state_dict()
    for name, (mean, std, largest) in golden.file["init_stats"].items():
        value, spread = state[name], max(std, 1e-12)
        assert abs(value.mean() - mean) <= 6 * spread / value.numel() ** 0.5 + 1e-6, name
        if std == 0:
            assert value.abs().max() == largest == 0, name
        else:
            assert abs(value.std() / std - 1) < 6 / (2 * value.numel()) ** 0.5 + 1e-3, name
            assert value.abs().max() < 1.6 * largest, name  # xavier-uniform is bounded, a normal nearly


def test_a_fresh_model_outputs_exactly_zero():
    model = SiT(16, 3, 8, **SIT_SIZES["toy"])
    assert not model(torch.randn(2, 3, 16, 16), torch.rand(2), torch.tensor([0, 8])).any()


@pytest.mark.parametrize("size, encoder_depth, official", [
    ("SiT-XL/2", 8, "repa_sit_xl_2"), ("SiT-B/2", 4, "repa_sit_b_2")])
def test_names_and_shapes_are_repas(size, encoder_depth, official):
    with torch.device("meta"):
        model = REPASiT(32, 4, 1000, SIT_SIZES[size], encoder_depth, [768], 2048)
    assert state_shapes(model) == official_keys(official)


def test_names_and_shapes_are_willismas_after_conversion():
    keys = official_keys("sit_xl_2_willisma")
    with torch.device("meta"):
        converted = convert_willisma_sit({name: torch.zeros(shape) for name, shape in keys.items()})
        model = SiT(**SIT_SIZES["SiT-XL/2"])
    assert {name: tuple(value.shape) for name, value in converted.items()} == state_shapes(model)


@pytest.mark.parametrize("wrap", ["bare", "ema"])
def test_official_checkpoints_load(tmp_path, wrap):
    """REPA's released file is a bare state dict, its training script writes {"ema": ...}; both sample as plain SiT."""
    model = REPASiT(16, 3, 8, SIT_SIZES["toy"], 2, [24], 32)
    state = model.state_dict()
    torch.save(state if wrap == "bare" else {"ema": state, "steps": 400_000}, tmp_path / "official.pt")
    weights, _ = load_weights(tmp_path / "official.pt")
    plain = sit_from_weights({name: w for name, w in weights.items() if not name.startswith("projectors")}, "toy")
    assert (plain.input_size, plain.in_channels, plain.num_classes) == (16, 3, 8)
    other = REPASiT(16, 3, 5, SIT_SIZES["toy"], 2, [24], 32)
    assert init_from(tmp_path / "official.pt", other) == ["y_embedder"]  # five classes instead of eight
    torch.testing.assert_close(other.blocks[0].attn.qkv.weight, model.blocks[0].attn.qkv.weight)


def test_time_and_modulation_stay_in_fp32_under_autocast():
    model = SiT(16, 3, 8, **SIT_SIZES["toy"])
    t = torch.tensor([0.5, 0.5 + 2 ** -12])  # bf16 has 8 bits: it cannot tell these times apart
    with torch.autocast("cpu", torch.bfloat16):
        embedded = model.t_embedder(t)
        modulation = model.blocks[0].adaLN_modulation(embedded)
    assert embedded.dtype == modulation.dtype == torch.float32
    torch.testing.assert_close(embedded, model.t_embedder(t), rtol=0, atol=0)
    assert (embedded[0] != embedded[1]).any()

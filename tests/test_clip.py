"""SD3's text side: the CLIP towers and the tokeniser against transformers', SD3's file and its errors."""
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from golden_utils import Fixture, official_keys, state_shapes
from support.clip import CLIP_G, CLIP_L, ClipText, Tokenizer, load_tokenizer, split_words
from support.sd3 import encode_prompts, load_sd3_text, pad_context
from support.vae import SD3_VAE_META, AutoencoderKL, convert_ldm_vae, load_sd3_part, load_sd3_vae

TEXT, BPE = Fixture("clip_text"), Fixture("clip_bpe")
MERGES = os.environ.get("ALIGNMENT_TEST_MERGES")  # merges.txt of openai/clip-vit-large-patch14


def small_tower(name):
    config = TEXT.config[f"clip_{name}"]
    tower = ClipText(width=config["hidden_size"], layers=config["num_hidden_layers"],
                     num_heads=config["num_attention_heads"], quick_gelu=config["hidden_act"] == "quick_gelu",
                     project=not config["identity_projection"], vocabulary=config["vocab_size"],
                     length=config["max_positions"], mlp_ratio=config["intermediate_size"] // config["hidden_size"])
    return TEXT.fill(tower, f"clip_{name}.")


@pytest.fixture(scope="module")
def towers():
    return {name: small_tower(name) for name in "lg"}


@pytest.mark.parametrize("name", "lg")
def test_towers(name, towers):
    tower, ids = towers[name], TEXT.input(f"ids_{name}")
    states = []
    for layer in tower.text_model["encoder"]["layers"]:
        layer.register_forward_hook(lambda module, inputs, out: states.extend([inputs[0], out]))
    penultimate, pooled = tower(ids)
    TEXT.check(f"clip_{name}/hidden0", states[0])
    TEXT.check(f"clip_{name}/hidden1", states[1])
    TEXT.check(f"clip_{name}/penultimate", penultimate)
    last = tower.text_model["final_layer_norm"](states[-1])
    TEXT.check(f"clip_{name}/last", last)
    TEXT.check(f"clip_{name}/text_embeds", pooled)
    at_end = (ids == TEXT.config["eos_id"]).int().argmax(dim=1)
    TEXT.check(f"clip_{name}/pooled_unprojected", last[torch.arange(len(ids)), at_end])


class Marks(Tokenizer):
    """Takes the fixture's rows of ids as they are."""

    def __init__(self):
        self.end = TEXT.config["eos_id"]

    def pad(self, ids, fill):
        ids = [i for i in ids if i >= 0]
        return ids + [fill] * (12 - len(ids))


def test_assembly(towers):
    ids = TEXT.input("ids_l").tolist()
    bare = [row[:row.index(59) + 1] for row in ids]
    assert [Marks().pad(row, 59) for row in bare] == ids and [Marks().pad(row, 0) for row in bare] == TEXT.input(
        "ids_g").tolist()
    context, pooled = encode_prompts(Marks(), towers["l"], towers["g"], bare)
    TEXT.check("pooled", pooled)
    padded = pad_context(context, TEXT.config["context_dim"], t5_tokens=12)
    TEXT.check("context_no_t5", padded)
    TEXT.check("context", torch.cat([padded[:, :12], TEXT.input("t5")], dim=1))


def test_every_output_of_the_towers_was_compared():
    TEXT.assert_all_checked()


@pytest.mark.parametrize("name, sizes, entry", [("clip_l", CLIP_L, "clip_l_text"), ("clip_g", CLIP_G, "clip_g_text")])
def test_names_and_shapes_of_the_towers(name, sizes, entry):
    with torch.device("meta"):
        ours = state_shapes(ClipText(**sizes))
    theirs = official_keys(entry)
    if name == "clip_l":  # SD3 does not apply CLIP-L's projection, and SD3's file does not hold it
        del theirs["text_projection.weight"]
    assert ours == theirs


# ----------------------------------------------------------------------------------------------------------------------
# The tokeniser


def test_mini_vocabulary():
    tokenizer = Tokenizer([tuple(merge.split()) for merge in BPE.file["inputs"]["mini_merges"]])
    assert len(tokenizer.ids) == BPE.config["mini_vocab_size"] and tokenizer.end == len(tokenizer.ids) - 1
    BPE.check("mini_ids", [tokenizer.encode(text) for text in BPE.file["inputs"]["strings"]])


def test_marks_and_padding():
    tokenizer = Tokenizer([])
    tokenizer.begin, tokenizer.end = BPE.config["bos"], BPE.config["eos"]
    for name, fill in (("ids_77_l", BPE.config["pad_l"]), ("ids_77_g", BPE.config["pad_g"])):
        BPE.check(name, torch.tensor([tokenizer.pad(ids, fill) for ids in BPE.outputs["ids"]], dtype=torch.int32))


@pytest.mark.skipif(not MERGES, reason="ALIGNMENT_TEST_MERGES names no merges.txt")
def test_full_vocabulary():
    tokenizer = load_tokenizer(MERGES)
    assert len(tokenizer.ids) == BPE.config["vocab_size"] and tokenizer.end == BPE.config["eos"]
    BPE.check("ids", [tokenizer.encode(text) for text in BPE.file["inputs"]["strings"]])


def test_every_output_of_the_tokeniser_was_compared():
    BPE.assert_all_checked(but=[] if MERGES else ["ids"])  # the full vocabulary is a file from the hub


def test_marks_inside_a_text_and_case():
    tokenizer = Tokenizer([("a", "b</w>")])
    assert tokenizer.encode("AB\n ab") == 2 * [tokenizer.ids["ab</w>"]]
    assert tokenizer.encode("<|endoftext|>") == [tokenizer.end]
    assert tokenizer.encode("") == []


# ----------------------------------------------------------------------------------------------------------------------
# SD3's file


def ldm_name(name):
    """diffusers' name of a VAE's weight to Latent Diffusion's, written apart from the converter."""
    part, rest = name.split(".", 1)
    pieces = rest.split(".")
    if pieces[0] in ("down_blocks", "up_blocks"):
        stage = int(pieces[1]) if pieces[0] == "down_blocks" else 1 - int(pieces[1])  # TINY has two stages
        kind = {"resnets": f"block.{pieces[3]}", "downsamplers": "downsample", "upsamplers": "upsample"}[pieces[2]]
        tail = ["nin_shortcut" if piece == "conv_shortcut" else piece for piece in pieces[4:]]
        return ".".join([part, pieces[0][:-7], str(stage), kind, *tail])
    if pieces[0] == "mid_block":
        if pieces[1] == "resnets":
            return ".".join([part, "mid", f"block_{int(pieces[2]) + 1}", *pieces[3:]])
        names = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out": "proj_out"}
        return ".".join([part, "mid", "attn_1", names[pieces[3]], pieces[-1]])
    return f"{part}.{rest.replace('conv_norm_out', 'norm_out')}"


def tiny_vae():
    vae = AutoencoderKL(latent_channels=16, widths=(16, 32), layers=2, groups=8)
    vae.quant_conv = vae.post_quant_conv = torch.nn.Identity()
    return vae


def in_ldm_names(vae):
    return {ldm_name(name): w[:, :, None, None] if "to_" in name and w.ndim == 2 else w
            for name, w in vae.state_dict().items()}


def test_the_vae_in_latent_diffusion_s_names():
    vae = tiny_vae()
    old = in_ldm_names(vae)
    for name, shape in {  # by Stability-AI/sd3-ref
            "encoder.down.0.downsample.conv.weight": (16, 16, 3, 3), "encoder.down.1.block.0.nin_shortcut.bias": (32,),
            "decoder.up.1.block.2.conv1.weight": (32, 32, 3, 3), "decoder.up.1.upsample.conv.bias": (32,),
            "decoder.up.0.block.0.nin_shortcut.weight": (16, 32, 1, 1), "decoder.mid.attn_1.q.weight": (32, 32, 1, 1),
            "encoder.mid.block_2.norm1.weight": (32,), "decoder.norm_out.weight": (16,), "encoder.conv_out.bias": (32,),
            }.items():
        assert tuple(old[name].shape) == shape
    new = convert_ldm_vae(old)
    assert new.keys() == vae.state_dict().keys()
    assert all(torch.equal(new[name], w) for name, w in vae.state_dict().items())


PREFIXES = dict(network="model.diffusion_model.", vae="first_stage_model.", clip_l="text_encoders.clip_l.transformer.",
                clip_g="text_encoders.clip_g.transformer.")


def write_sd3(path, parts):
    """A file with SD3's prefixes; parts: {name: state dict}."""
    save_file({PREFIXES[part] + name: w.contiguous() for part, weights in parts.items() for name, w in weights.items()},
              path)
    return str(path)


def test_parts_are_read_strictly(tmp_path, towers):
    half = {name: w.half() for name, w in towers["l"].state_dict().items()}
    extra = {"text_projection.weight": torch.eye(32), "text_model.embeddings.position_ids": torch.zeros(1, 12)}
    path = write_sd3(tmp_path / "sd3.safetensors", dict(clip_l=half | extra, vae=in_ldm_names(tiny_vae())))
    loaded = load_sd3_part("clip_l", small_tower("l"), path)
    assert all(p.dtype == torch.float32 and not p.requires_grad for p in loaded.parameters())
    ids = TEXT.input("ids_l")
    torch.testing.assert_close(loaded(ids)[1], towers["l"](ids)[1], rtol=0.02, atol=0.02)
    assert load_sd3_part("vae", tiny_vae(), path).decode(torch.zeros(1, 16, 2, 2)).shape == (1, 3, 4, 4)


def error_of(function, *args):
    with pytest.raises(SystemExit) as error:
        function(*args)
    message = str(error.value)
    assert message.startswith("error: ") and "\n" not in message
    return message


def test_files_that_are_not_sd3(tmp_path, towers):
    weights = dict(towers["l"].state_dict())
    path = write_sd3(tmp_path / "part.safetensors", dict(clip_l=weights))
    assert "holds no clip_g" in error_of(load_sd3_part, "clip_g", small_tower("g"), path)
    assert "sd3_medium_incl_clips.safetensors, which holds all parts" in error_of(
        load_sd3_part, "network", None, path)
    name = "text_model.final_layer_norm.weight"
    for changed in ({n: w for n, w in weights.items() if n != name}, weights | {name: torch.zeros(3)},
                    weights | {"more": torch.zeros(3)}):
        path = write_sd3(tmp_path / "changed.safetensors", dict(clip_l=changed))
        message = error_of(load_sd3_part, "clip_l", small_tower("l"), path)
        assert "1 names or shapes of its clip_l differ" in message
    (tmp_path / "text.safetensors").write_text("hello")
    for bad in ("text.safetensors", "absent.safetensors"):
        assert "is no safetensors file" in error_of(load_sd3_part, "vae", None, str(tmp_path / bad))
    assert "names or shapes of its vae differ" in error_of(
        load_sd3_vae, write_sd3(tmp_path / "tiny.safetensors", dict(vae=in_ldm_names(tiny_vae()))))


def test_merges_that_are_none(tmp_path):
    for content in (b"", b"#version: 0.2\na b\n", b"\xff\xfe", b"head\n" + b"a b c\n" * 48_894):
        (tmp_path / "merges.txt").write_bytes(content)
        message = error_of(load_tokenizer, str(tmp_path / "merges.txt"))
        assert "--merges wants the merges.txt of openai/clip-vit-large-patch14" in message
    assert "cannot read" in error_of(load_tokenizer, str(tmp_path / "absent.txt"))


class Refused(OSError):
    def __init__(self, status):
        super().__init__("Cannot access gated repo\nsecond line")
        self.response = type("Response", (), dict(status_code=status))


@pytest.mark.parametrize("status", [401, 403])
def test_a_refused_download_names_the_licence_and_the_token(status, monkeypatch):
    import huggingface_hub

    def refuse(*args):
        raise Refused(status)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refuse)
    message = error_of(load_sd3_vae)
    for word in ("https://huggingface.co/stabilityai/stable-diffusion-3-medium", "HF_TOKEN", "--sd3-ckpt FILE",
                 "sd3_medium_incl_clips.safetensors"):
        assert word in message


def test_without_internet_the_flags_are_named(monkeypatch):
    import huggingface_hub

    def offline(*args):
        raise OSError("no route")
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    assert "--sd3-ckpt FILE" in error_of(load_sd3_text)
    assert "--merges FILE" in error_of(load_tokenizer)
    assert "licence" not in error_of(load_tokenizer)


def test_the_hub_is_asked_for_the_right_files(monkeypatch):
    import huggingface_hub
    asked = []
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *args: asked.append(args) or "/absent")
    for load in (load_sd3_vae, load_tokenizer):
        error_of(load)
    assert asked == [("stabilityai/stable-diffusion-3-medium", "sd3_medium_incl_clips.safetensors"),
                     ("openai/clip-vit-large-patch14", "merges.txt")]


def test_constants_of_the_latent():
    z = torch.tensor([0.0609, 1.0])
    meta = SD3_VAE_META
    torch.testing.assert_close(z * meta["latent_scale"] + meta["latent_shift"], (z - 0.0609) * 1.5305)


MERGES_FILE = Path(os.environ.get("ALIGNMENT_TEST_DATA", "nowhere"), "clip_merges.txt")


@pytest.mark.skipif(not MERGES_FILE.is_file(), reason="ALIGNMENT_TEST_DATA names no folder with clip_merges.txt")
@pytest.mark.parametrize("group", ["texts", "nfd"])
def test_real_text_with_clips_merges(group):
    """Ids by a public tokeniser (open_clip): also numbers that are not digits, and accents apart from their letter."""
    saved = json.loads((Path(__file__).parent / "golden/clip_bpe_real.json").read_text())
    tokenizer = load_tokenizer(str(MERGES_FILE))
    assert len(saved[group]) >= 3
    assert [text for text, ids in saved[group] if tokenizer.encode(text) != ids] == []


def test_words():
    assert split_words("it's x\u00b2, \u00bd \u2163!! don't_") == [
        "it", "'s", "x", "\u00b2", ",", "\u00bd", "\u2163", "!!", "don", "'t", "_"]

"""CLIP's text towers and its tokeniser, as Stable Diffusion 3 reads prompts.

Parameter names follow transformers. The merges of the tokeniser come with CLIP, the towers' weights
with Stable Diffusion 3's file.
"""
import math
import re
import unicodedata
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

from support.terminal import fail, first_line, hub_file

MERGES_REPO = "openai/clip-vit-large-patch14"
MERGES_FILE = "merges.txt"
CLIP_MERGES = 48_894
MARKS = "<|startoftext|>", "<|endoftext|>"
CLIP_LENGTH = 77  # tokens of a prompt, with the marks of its beginning and end
CLIP_L = dict(width=768, layers=12, num_heads=12, quick_gelu=True)
CLIP_G = dict(width=1280, layers=32, num_heads=20, project=True)
FIXED_WORDS = re.compile(r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d")


def kind_of(character):
    """L of a letter, N of a number of any sort (also those in x², ½, Ⅳ), a space, or O."""
    if character.isspace():
        return " "
    category = unicodedata.category(character)[0]
    return category if category in "LN" else "O"


def split_words(text):
    """CLIP's words: marks, English endings, runs of letters, single numbers, runs of the rest."""
    kinds = "".join(map(kind_of, text))
    words = []
    start = 0
    while start < len(text):
        kind = kinds[start]
        end = start + 1
        if fixed := FIXED_WORDS.match(text, start):
            end = fixed.end()
        elif kind in "LO":
            end = start + len(kinds[start:]) - len(kinds[start:].lstrip(kind))
        if kind != " ":
            words.append(text[start:end])
        start = end
    return words


class Tokenizer:
    """CLIP's byte-pair encoding: ids are bytes, bytes that end a word, merges, and two marks."""

    def __init__(self, merges):
        printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
        others = [byte for byte in range(256) if byte not in printable]  # written as 256, 257, ...
        self.letters = {byte: chr(byte) for byte in printable}
        self.letters |= {byte: chr(256 + i) for i, byte in enumerate(others)}
        letters = list(self.letters.values())
        endings = [letter + "</w>" for letter in letters]
        merged = ["".join(pair) for pair in merges]
        vocabulary = [*letters, *endings, *merged, *MARKS]
        self.ids = {token: i for i, token in enumerate(vocabulary)}
        self.ranks = {pair: rank for rank, pair in enumerate(merges)}
        self.begin = len(vocabulary) - 2
        self.end = len(vocabulary) - 1

    def split(self, word):
        """A word's tokens: of neighbours, those are merged first whose merge was learned first."""
        pieces = [self.letters[byte] for byte in word.encode()]
        pieces[-1] += "</w>"
        while len(pieces) > 1:
            pair = min(zip(pieces, pieces[1:]), key=lambda pair: self.ranks.get(pair, math.inf))
            if pair not in self.ranks:
                break
            merged = []
            i = 0
            while i < len(pieces):
                step = 2 if tuple(pieces[i:i + 2]) == pair else 1
                merged.append("".join(pieces[i:i + step]))
                i += step
            pieces = merged
        return pieces

    def encode(self, text):
        """The ids of a text, without marks."""
        text = unicodedata.normalize("NFC", text)  # an accent is part of its letter
        ids = []
        for word in split_words(text.lower()):
            pieces = [word] if word in MARKS else self.split(word)
            ids += [self.ids[piece] for piece in pieces]
        return ids

    def pad(self, ids, fill):
        """Ids cut to 75, between their marks, filled up to 77 with `fill`."""
        ids = [self.begin, *ids[:CLIP_LENGTH - 2], self.end]
        return ids + [fill] * (CLIP_LENGTH - len(ids))


class ClipLayer(nn.Module):
    """Transformer layer in which a token sees itself and those before it: (B,n,D) -> (B,n,D)."""

    def __init__(self, width, num_heads, quick_gelu, mlp_ratio):
        super().__init__()
        self.num_heads = num_heads
        self.quick_gelu = quick_gelu
        self.layer_norm1 = nn.LayerNorm(width)
        self.layer_norm2 = nn.LayerNorm(width)
        self.self_attn = nn.ModuleDict(
            {f"{name}_proj": nn.Linear(width, width) for name in ("q", "k", "v", "out")})
        hidden = mlp_ratio * width
        self.mlp = nn.ModuleDict(dict(fc1=nn.Linear(width, hidden), fc2=nn.Linear(hidden, width)))

    def heads(self, name, h):
        """q, k or v, by its name, of tokens h: (B,n,D) -> (B,heads,n,D/heads)."""
        projected = self.self_attn[f"{name}_proj"](h)
        return projected.unflatten(2, (self.num_heads, -1)).transpose(1, 2)

    def forward(self, h):
        r = self.layer_norm1(h)
        q, k, v = (self.heads(name, r) for name in "qkv")
        r = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        r = r.transpose(1, 2).flatten(2)  # (B,heads,n,D/heads) -> (B,n,D)
        h = h + self.self_attn["out_proj"](r)
        r = self.mlp["fc1"](self.layer_norm2(h))
        r = r * torch.sigmoid(1.702 * r) if self.quick_gelu else F.gelu(r)
        return h + self.mlp["fc2"](r)


class ClipText(nn.Module):
    """A text tower: ids (B,n) to the tokens of its last layer but one (B,n,D), a vector (B,D)."""

    def __init__(self, *, width, layers, num_heads, quick_gelu=False, project=False,
                 vocabulary=CLIP_MERGES + 514, length=CLIP_LENGTH, mlp_ratio=4):
        super().__init__()
        embeddings = nn.ModuleDict(dict(
            token_embedding=nn.Embedding(vocabulary, width),
            position_embedding=nn.Embedding(length, width)))
        encoder = nn.ModuleDict(dict(layers=nn.ModuleList(
            ClipLayer(width, num_heads, quick_gelu, mlp_ratio) for _ in range(layers))))
        final_norm = nn.LayerNorm(width)
        self.text_model = nn.ModuleDict(dict(
            embeddings=embeddings, encoder=encoder, final_layer_norm=final_norm))
        self.text_projection = nn.Linear(width, width, bias=False) if project else nn.Identity()

    def forward(self, ids):
        embeddings = self.text_model["embeddings"]
        positions = embeddings["position_embedding"].weight[:ids.shape[1]]
        h = embeddings["token_embedding"](ids) + positions
        for layer in self.text_model["encoder"]["layers"]:
            before_last = h
            h = layer(h)
        h = self.text_model["final_layer_norm"](h)
        at_end = ids.argmax(dim=1)  # the end mark has the largest id, and the first one counts
        return before_last, self.text_projection(h[torch.arange(len(h)), at_end])


def load_tokenizer(path=""):
    """CLIP's tokeniser, from its list of merges: the first line of the file is a comment."""
    remedy = f"--merges wants the {MERGES_FILE} of {MERGES_REPO}"
    path = path or hub_file(MERGES_REPO, MERGES_FILE, "--merges")
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()[1:CLIP_MERGES + 1]
    except (OSError, ValueError) as error:
        fail(f"cannot read {path} ({first_line(error)}); {remedy}")
    merges = [tuple(line.split()) for line in lines]
    if len(merges) != CLIP_MERGES or any(len(pair) != 2 for pair in merges):
        fail(f"{path} does not hold CLIP's {CLIP_MERGES} merges; {remedy}")
    return Tokenizer(merges)

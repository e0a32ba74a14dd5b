"""Reads tests/golden: outputs of the official codes on weights and inputs that a frozen recipe makes."""
import json
import re
import zlib
from pathlib import Path

import numpy as np
import torch

GOLDEN = Path(__file__).parent / "golden"


def recipe(name, shape, seed, std=0.1, mean=0.0):
    """The tensor called `name`: numpy's RandomState stream is frozen for ever, so nothing needs to be stored."""
    rng = np.random.RandomState((zlib.crc32(name.encode()) + seed) & 0x7fffffff)
    return torch.from_numpy((mean + std * rng.standard_normal(shape)).astype("float32"))


class Fixture:
    """One file of tests/golden: `inputs`, `config`, and `check(name, value)` against its output at its tolerance."""

    def __init__(self, name):
        self.file = torch.load(GOLDEN / f"{name}.pt", weights_only=True)
        self.config, self.seed, self.outputs = self.file["config"], self.file["seed"], self.file["outputs"]
        self.checked = set()

    def input(self, name):
        value = self.file["inputs"][name]
        if not isinstance(value, dict):
            return value
        tensor = recipe("input/" + name, value["shape"], value["seed"], value["std"], value["mean"])
        return tensor.clamp(0, 255).to(torch.uint8) if value.get("cast") == "uint8" else tensor

    def weight(self, key, shape):
        rule, std, mean = next(r for r in self.file["weight_rules"] if r[0].removeprefix("exp:") in key)
        drawn = recipe(key, tuple(shape), self.seed, std, mean)
        return drawn.exp() if rule.startswith("exp:") else drawn

    def fill(self, model, prefix=""):
        """Give `model` the fixture's weights by their official names; what `keep` names stays as in a fresh model."""
        kept = self.file["keep"]
        state = {key: value if any(part in key for part in kept) else self.weight(prefix + key, value.shape)
                 for key, value in model.state_dict().items()}
        model.load_state_dict(state)
        return model

    def check(self, name, value):
        """Sampled values, norm and mean (both in float64), or the list or number, must lie inside the tolerance."""
        self.checked.add(name)
        tolerance = next(t for key, t in self.file["tolerance"].items() if key in name)
        expected = self.outputs[name]
        if isinstance(expected, (list, int, str)):
            assert value == expected, name
            return
        value = torch.as_tensor(value).detach()
        if isinstance(expected, dict):
            assert list(value.shape) == list(expected["shape"]), f"{name}: shape {tuple(value.shape)}"
            wide = value.double()
            pairs = [(value.flatten()[::expected["stride"]], expected["sample"]),
                     (wide.norm(), torch.tensor(expected["norm"], dtype=torch.float64)),
                     (wide.mean(), torch.tensor(expected["mean"], dtype=torch.float64))]
        else:
            expected = torch.as_tensor(expected)
            assert value.shape == expected.shape, f"{name}: shape {tuple(value.shape)}"
            pairs = [(value, expected)]
        for ours, theirs in pairs:
            ours, theirs = ours.double(), theirs.double()
            excess = ((ours - theirs).abs() - tolerance["atol"] - tolerance["rtol"] * theirs.abs()).max()
            assert excess <= 0, f"{name}: off by {(ours - theirs).abs().max():.3g}, {excess:.3g} beyond its tolerance"

    def assert_all_checked(self, but=()):
        """Every output of the file has been compared, but for those out of scope."""
        missing = {name for name in self.outputs if name not in self.checked and not any(part in name for part in but)}
        assert not missing, f"never compared: {sorted(missing)}"


def official_keys(name):
    """Names and shapes of a full-size official model; {a..b} in a name stands for every integer from a to b."""
    keys = {}
    for pattern, shape in json.loads((GOLDEN / "official_keys.json").read_text())[name]["keys"].items():
        found = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
        numbers = range(int(found[1]), int(found[2]) + 1) if found else [None]
        for number in numbers:
            keys[pattern if number is None else pattern.replace(found[0], str(number))] = tuple(shape)
    return keys


def state_shapes(model):
    return {key: tuple(value.shape) for key, value in model.state_dict().items()}

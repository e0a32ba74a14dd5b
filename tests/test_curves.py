"""The reference curves: each toy, run again, stays near its log in docs/curves. Slow: two to six minutes a toy."""
import json
import subprocess
import sys

import pytest

from test_copies import METHODS, ROOT
from test_training import child_env

# Of a toy's last third, the mean of these. Seeds differ by 3 %, other versions and threads no more.
LOSSES = dict(reals="mse", softrepa="error", repavit="loss", carflow="loss")
NEAR = 0.1


def mean_loss(name, text):
    """The mean loss over the last third of a log's lines."""
    lines = [json.loads(line) for line in text.splitlines()]
    key = LOSSES.get(name, "loss_velocity")
    values = [line[key] for line in lines[-(len(lines) // 3):]]
    return sum(values) / len(values)


@pytest.mark.parametrize("name", METHODS)
def test_there_is_a_whole_curve(name):
    lines = (ROOT / f"docs/curves/{name}.jsonl").read_text().splitlines()
    steps = [json.loads(line)["step"] for line in lines]
    assert len(steps) >= 20 and steps == sorted(steps)
    assert mean_loss(name, "\n".join(lines)) > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_a_fresh_toy_stays_near_its_curve(name, tmp_path):
    done = subprocess.run([sys.executable, ROOT / f"{name}.py"], cwd=tmp_path, env=child_env(), capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr
    curve = mean_loss(name, (ROOT / f"docs/curves/{name}.jsonl").read_text())
    fresh = mean_loss(name, (tmp_path / f"runs/{name}-toy/log.jsonl").read_text())
    assert fresh == pytest.approx(curve, rel=NEAR)

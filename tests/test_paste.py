"""Take a method into a project of your own: its module, its loss and common.py are all that it needs.

A folder that holds common.py and what is cut out of the scripts, and nothing else of ours, trains.
"""
import ast
import shutil
import subprocess
import sys

import pytest

from test_copies import ROOT
from test_training import child_env

# What to cut out of each script: all from its section "The method" that the loss calls.
METHODS = {
    "repa": ["REPASiT", "repa_loss"],
    "reg": ["REGSiT", "reg_loss"],
    "haste": ["block_with_logits", "HASTESiT", "attention_loss", "haste_loss"],
    "urepa": ["rope_2d", "to_grid", "to_tokens", "SiTDown", "token_loss", "manifold_loss", "urepa_loss"],
    "carflow": ["SHIFTS", "ShiftNet", "CARFlow", "carflow_loss"],
    "gmem": ["MemorySiT", "corrupt", "gmem_loss"],
    "erw": ["rope_2d", "ERWSiT", "erw_loss"],
}
TRAIN = '''
import torch
from common import SIT_SIZES, SiT
sizes = SIT_SIZES["toy"]
B, N, K = 4, 16, 8
torch.manual_seed(0)
x, noise, t = torch.randn(B, 3, 16, 16), torch.randn(B, 3, 16, 16), torch.rand(B)
y, z, cls = torch.arange(B), torch.randn(B, N, K), torch.randn(B, K)
'''
USES = {  # the model, and the call of its loss: the first terms of all are summed
    "repa": ("REPASiT(16, 3, 8, sizes, 2, [K], 32)", "repa_loss(model, x, t, noise, y, [z])"),
    "reg": ("REGSiT(16, 3, 8, sizes, 2, K, [K], 32)",
            "reg_loss(model, x, cls, t, noise, torch.randn(B, K), y, [torch.randn(B, N + 1, K)])"),
    "haste": ("HASTESiT(16, 3, 8, sizes, 2, [K], 32, [0, 1], 2)",
              "haste_loss(model, x, t, noise, y, [z], 2 * [torch.randn(B, 2, N, N)])"),
    "urepa": ("SiTDown(16, 3, 8, dict(hidden_size=64, depths=(1, 2, 1), num_heads=2, mlp_dim=64, "
              "patch_size=4), 2, [K], 32)", "urepa_loss(model, x, t, noise, y, [z])"),
    "carflow": ("CARFlow(SiT(16, 3, 8, **sizes), 'joint', 8)", "[carflow_loss(model, x, t, noise, y)]"),
    "gmem": ("MemorySiT(16, 3, K, sizes, 2, [K], 32)",
             "gmem_loss(model, x, t, noise, corrupt(cls, torch.ones(B, K), torch.zeros(B).bool(), 0.0), z)"),
    "erw": ("ERWSiT(16, 3, 8, sizes, 2, [K], 32, 1)", "erw_loss(model, x, t, noise, y, [z])"),
}


def cut(name, pieces):
    """The imports of a script, but for those of support, and these top-level pieces of it."""
    source = (ROOT / f"{name}.py").read_text()
    chosen = []
    for node in ast.parse(source).body:
        if isinstance(node, ast.ImportFrom) and node.module.startswith("support"):
            continue
        target = node.targets[0].id if isinstance(node, ast.Assign) else getattr(node, "name", None)
        if isinstance(node, (ast.Import, ast.ImportFrom)) or target in pieces:
            chosen.append(ast.get_source_segment(source, node))
    return "\n\n\n".join(chosen) + "\n"


@pytest.mark.parametrize("name", METHODS)
def test_pasted_beside_common_it_trains(name, tmp_path):
    shutil.copy(ROOT / "common.py", tmp_path)
    (tmp_path / "pasted.py").write_text(cut(name, METHODS[name]))
    model, loss = USES[name]
    (tmp_path / "train.py").write_text(f'''{TRAIN}
from pasted import *
model = {model}
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
losses = []
for step in range(10):
    loss = sum(term.mean() for term in {loss})
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
assert losses[-1] < losses[0], losses
''')
    assert len(list(tmp_path.iterdir())) == 3
    done = subprocess.run([sys.executable, "train.py"], cwd=tmp_path, env=child_env(), text=True,
                          capture_output=True)
    assert done.returncode == 0, done.stderr

"""Scripts repeat one stretch, the plumbing, on purpose: it must be the same in all. Also the rules that all share.

    python tests/test_copies.py --sync repa.py      copies repa.py's version of every plumbing piece into the others
"""

import argparse
import ast
import importlib
import sys
from dataclasses import fields
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PATTERN = ROOT / "repa.py"
METHODS = "repa reg haste urepa carflow gmem erw softrepa reals repavit".split()
SCRIPTS = [ROOT / f"{name}.py" for name in METHODS if (ROOT / f"{name}.py").exists()]
RULERS = "# Plumbing:", "# Training and sampling"  # the stretch lies between these comments
SHARED_FIELDS = """model data out resolution batch_size micro_batch max_train_steps learning_rate max_grad_norm
    ema_decay cfg_prob path_type weighting enc_type teacher_ckpt encoder_depth proj_coeff vae vae_ckpt precision compile
    seed workers log_every save_every keep_every preview_every init ckpt sample labels mode num_steps heun cfg_scale
    guidance_low guidance_high bench""".split()
AT_TOP = {"torch", "numpy", "tqdm", "common", *sys.stdlib_module_names}
INSIDE = {"torchvision", "timm"}  # slow to import: only in the functions that need them
of_scripts = pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)


def pieces(path):
    """The file's lines, and {name: slice of them} of every function, class and constant at top level.

    Decorators belong to a piece, and so do comments that stand on it without a blank line between, but no ruler.
    """
    lines, found = path.read_bytes().decode().split("\n"), {}
    for node in ast.parse(path.read_bytes()).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.Assign, ast.AnnAssign)):
            first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))]) - 1
            while first and lines[first - 1].startswith("#") and not lines[first - 1].startswith("# ---"):
                first -= 1
            target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
            found[ast.unparse(target) if target else node.name] = slice(first, node.end_lineno)
    return lines, found


def plumbing(path):
    """{name: its lines} of the pieces between the rulers."""
    lines, found = pieces(path)
    begin, end = (next(i for i, line in enumerate(lines) if line.startswith(ruler)) for ruler in RULERS)
    return {name: lines[place] for name, place in found.items() if begin < place.start < end}


def drifted(pattern, script):
    """Names of the pattern's plumbing that `script` has too, but reads otherwise."""
    lines, found = pieces(script)
    return [name for name, piece in plumbing(pattern).items() if name in found and lines[found[name]] != piece]


def sync(pattern, scripts):
    """Put the pattern's version into the scripts; every other byte of them stays. Prints what it changed."""
    for script in scripts:
        lines, found = pieces(script)
        names = drifted(pattern, script)
        for name in sorted(names, key=lambda name: -found[name].start):  # from below: the lines above keep their places
            lines[found[name]] = plumbing(pattern)[name]
            print(f"{script.name}: {name}")
        if names:
            script.write_bytes("\n".join(lines).encode())


# ----------------------------------------------------------------------------------------------------------------------
# The copies


def test_the_plumbing_is_found():
    assert {"parse", "setup", "update_ema", "restore", "save_run"} <= set(plumbing(PATTERN))
    assert not {"Config", "RECIPES", "train", "main", "repa_loss"} & set(plumbing(PATTERN))


@of_scripts
def test_plumbing_is_the_same(script):
    names = drifted(PATTERN, script)
    assert not names, (f"{script.name}: {', '.join(names)} differ from {PATTERN.name}; mend that file, then: "
                       f"python tests/test_copies.py --sync {PATTERN.name}")


def test_sync(tmp_path, capsys):
    same, other = tmp_path / "same.py", tmp_path / "other.py"
    lines, found = pieces(PATTERN)
    del lines[found["parallelise"]]  # what a script does not have is not forced on it
    wanted = "\n".join(lines).replace("def repa_loss(", "def other_loss(").encode()
    other.write_bytes(wanted)
    lines, found = pieces(other)
    for name in ("setup", "update_ema"):
        lines[found[name].stop - 1] += "  # mine"
    lines.insert(found["save_run"].start, "# a comment that stands on it")
    lines.insert(found["restore"].start + 1, "    # a longer piece,\n\n    # with an empty line")
    other.write_bytes("\n".join(lines).encode())
    same.write_bytes(PATTERN.read_bytes())
    written, names = same.stat().st_mtime_ns, ["setup", "update_ema", "restore", "save_run"]
    assert drifted(PATTERN, same) == [] and drifted(PATTERN, other) == names

    sync(PATTERN, [same, other])
    assert sorted(capsys.readouterr().out.splitlines()) == sorted(f"other.py: {name}" for name in names)
    assert same.read_bytes() == PATTERN.read_bytes() and same.stat().st_mtime_ns == written
    assert other.read_bytes() == wanted and ast.parse(wanted) and drifted(PATTERN, other) == []


# ----------------------------------------------------------------------------------------------------------------------
# Rules for all scripts


@of_scripts
def test_config(script, monkeypatch):
    """Shared fields have the shared names in the shared order, and every field is a flag with a help text."""
    module, helps, add = importlib.import_module(script.stem), {}, argparse.ArgumentParser.add_argument
    names = [field.name for field in fields(module.Config)]
    assert [n for n in names if n in SHARED_FIELDS] == [n for n in SHARED_FIELDS if n in names]
    assert {"model", "data", "out", "batch_size", "seed", "ckpt", "sample", "bench"} <= set(names)
    monkeypatch.setattr(argparse.ArgumentParser, "add_argument", lambda self, *flags, **options: (
        helps.update({flags[-1]: options["help"].partition(" [")[0]}), add(self, *flags, **options))[1])
    module.parse([])
    flags = ["--" + name.replace("_", "-") for name in names]
    assert [flag for flag in flags if len(helps.get(flag, "")) < 3] == [], "fields without a flag or without a comment"


@pytest.mark.parametrize("script", [*SCRIPTS, ROOT / "common.py"], ids=lambda path: path.name)
def test_imports(script):
    def packages(nodes):
        names = [[n.module] if isinstance(n, ast.ImportFrom) else [alias.name for alias in n.names]
                 for n in nodes if isinstance(n, (ast.Import, ast.ImportFrom))]
        return {name.split(".")[0] for group in names for name in group}
    tree, only_common = ast.parse(script.read_bytes()), {"safetensors", "huggingface_hub", "PIL"}
    assert packages(tree.body) - AT_TOP == set()
    assert packages(ast.walk(tree)) - AT_TOP - INSIDE - (only_common if script.stem == "common" else set()) == set()


def test_every_fixture_is_used():
    """A fixture of a method that is not built may wait; every other one must be named by a test."""
    tests = "".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py") if path.name != "test_copies.py")
    waiting = set(METHODS) - {script.stem for script in SCRIPTS}
    fixtures = {path.stem for path in (ROOT / "tests/golden").iterdir() if path.stem.split("_")[0] not in waiting}
    assert {"sit", "repa"} <= fixtures
    forms = '("{}")', "/{}.pt", "{}("  # Fixture("sit"), "tests/golden/preprocess.pt", official_keys(...)
    assert [name for name in sorted(fixtures) if not any(form.format(name) in tests for form in forms)] == []


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sync", required=True, metavar="FILE", help="the script whose plumbing the others shall have")
    sync(ROOT / parser.parse_args().sync, SCRIPTS)

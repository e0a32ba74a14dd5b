"""Scripts repeat three functions on purpose, the step: they must be the same in all. And shared rules.

    python tests/test_copies.py --sync repa.py      copies repa.py's version of the three into the others
"""
import argparse
import ast
import importlib
from dataclasses import fields
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PATTERN = ROOT / "repa.py"
METHODS = "repa reg haste urepa carflow gmem erw softrepa reals repavit".split()
SCRIPTS = [ROOT / f"{name}.py" for name in METHODS]
COPIES = "parallelise", "optimizer_step", "update_ema"
LACKS = {"softrepa": {"parallelise", "update_ema"}}  # its model is frozen: no DDP, no average
SHARED_FIELDS = """model data out resolution batch_size micro_batch max_train_steps learning_rate
    max_grad_norm ema_decay cfg_prob path_type weighting enc_type teacher_ckpt encoder_depth
    proj_coeff vae vae_ckpt precision compile seed workers log_every save_every keep_every
    preview_every init ckpt sample labels mode num_steps heun cfg_scale guidance_low guidance_high
    bench""".split()
of_scripts = pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)


def copies(path):
    """The file's lines, and {name: slice of them} of the functions that all scripts share."""
    lines = path.read_bytes().decode().split("\n")
    places = {}
    for node in ast.parse(path.read_bytes()).body:
        if isinstance(node, ast.FunctionDef) and node.name in COPIES:
            first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
            places[node.name] = slice(first - 1, node.end_lineno)
    return lines, places


def drifted(pattern, script):
    """Names of the copies that read otherwise in `script` than in the pattern."""
    lines, places = copies(script)
    right, right_places = copies(pattern)
    return [name for name in places if lines[places[name]] != right[right_places[name]]]


def sync(pattern, scripts):
    """Put the pattern's version into the scripts; every other byte stays. Prints what it changed."""
    right, right_places = copies(pattern)
    for script in scripts:
        lines, places = copies(script)
        names = drifted(pattern, script)
        for name in sorted(names, key=lambda name: -places[name].start):  # from below: lines stay put
            lines[places[name]] = right[right_places[name]]
            print(f"{script.name}: {name}")
        if names:
            script.write_bytes("\n".join(lines).encode())


# --------------------------------------------------------------------------------------------------
# The copies
# --------------------------------------------------------------------------------------------------
@of_scripts
def test_every_script_has_the_step(script):
    _, places = copies(script)
    assert set(places) == set(COPIES) - LACKS.get(script.stem, set())


@of_scripts
def test_the_step_is_the_same(script):
    names = drifted(PATTERN, script)
    assert not names, (f"{script.name}: {', '.join(names)} differ from {PATTERN.name}; mend that file, "
                       f"then: python tests/test_copies.py --sync {PATTERN.name}")


def test_sync(tmp_path, capsys):
    same = tmp_path / "same.py"
    other = tmp_path / "other.py"
    lines, places = copies(PATTERN)
    del lines[places["parallelise"]]  # what a script does not have is not forced on it
    expected = "\n".join(lines).replace("def repa_loss(", "def other_loss(").encode()
    other.write_bytes(expected)
    lines, places = copies(other)
    for name in ("update_ema", "optimizer_step"):  # from below
        lines[places[name].stop - 1] += "  # a change"
        lines.insert(places[name].start + 1, "    # a longer copy,\n\n    # with an empty line")
    other.write_bytes("\n".join(lines).encode())
    same.write_bytes(PATTERN.read_bytes())
    written = same.stat().st_mtime_ns
    assert drifted(PATTERN, same) == []
    assert set(drifted(PATTERN, other)) == {"optimizer_step", "update_ema"}

    sync(PATTERN, [same, other])
    assert sorted(capsys.readouterr().out.splitlines()) == ["other.py: optimizer_step",
                                                            "other.py: update_ema"]
    assert same.read_bytes() == PATTERN.read_bytes() and same.stat().st_mtime_ns == written
    assert other.read_bytes() == expected and drifted(PATTERN, other) == []


# --------------------------------------------------------------------------------------------------
# Rules for all scripts
# --------------------------------------------------------------------------------------------------
@of_scripts
def test_config(script):
    """Shared fields have the shared names and order, and every field is a flag with a help text."""
    from support import flags  # here, so that --sync runs without the path that pytest sets
    config = importlib.import_module(script.stem).Config
    names = [field.name for field in fields(config)]
    assert [n for n in names if n in SHARED_FIELDS] == [n for n in SHARED_FIELDS if n in names]
    assert {"model", "data", "out", "batch_size", "seed", "ckpt", "sample", "bench"} <= set(names)
    actions = {action.dest: action for action in flags.make_parser(config, "")._actions}
    for name in names:
        assert actions[name].option_strings[0] == flags.flag(name)
        assert len(actions[name].help.partition(" [")[0]) > 2, f"{name} has no comment"


@of_scripts
def test_the_methods_fields_come_first(script):
    config = importlib.import_module(script.stem).Config
    names = [field.name for field in fields(config)]
    first_shared = next(i for i, name in enumerate(names) if name in SHARED_FIELDS)
    assert not [name for name in names[first_shared:] if name not in SHARED_FIELDS]


def test_every_fixture_is_used():
    tests = "".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py")
                    if path.name != "test_copies.py")
    fixtures = {path.stem for path in (ROOT / "tests/golden").iterdir()}
    assert {"sit", "repa"} <= fixtures
    # Fixture("sit"), "tests/golden/preprocess.pt", official_keys(...)
    forms = '("{}")', "/{}.pt", "{}(", "/{}.json"
    unused = [name for name in sorted(fixtures)
              if not any(form.format(name) in tests for form in forms)]
    assert unused == []


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sync", required=True, metavar="FILE",
                        help="the script whose step the others shall have")
    sync(ROOT / parser.parse_args().sync, SCRIPTS)

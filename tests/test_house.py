"""Where a line may live: the rules that keep the rooms. CONTRIBUTING.md tells them in words."""
import ast
import io
import re
import sys
import tokenize
from collections import Counter

import pytest

from density import density
from test_copies import METHODS, ROOT, SCRIPTS

COMMON = ROOT / "common.py"
SUPPORT = sorted((ROOT / "support").glob("*.py"))
TOOLS = [ROOT / "prepare.py", ROOT / "evaluate.py"]
FILES = [COMMON, *SUPPORT, *SCRIPTS, *TOOLS]
OURS = {"common", "support", "prepare", "evaluate", *METHODS}
PACKAGES = {"torch", "torchvision", "numpy", "timm", "scipy", "tqdm", "PIL", "huggingface_hub",
            "safetensors"}  # the last three come with timm
SLOW = {"torchvision", "timm", "huggingface_hub", "safetensors"}  # imported where they are used
LINES = {"common.py": 450, "prepare.py": 490, "evaluate.py": 465, "reals.py": 620, "repavit.py": 620}
SCRIPT_LINES, SUPPORT_LINES, COLUMNS, NODES = 600, 360, 100, 7.2
NAMES_FROM_COMMON, NAMES_OF_REPA = 12, 8
# Whole networks, what is around them, and the reader of pictures may have one user.
EXEMPT = {"vae", "sd3", "clip", "lpips", "toy", "pairs", "line", "vit", "images", "pictures"}


def names(paths):
    return pytest.mark.parametrize("path", paths, ids=lambda path: str(path.relative_to(ROOT)))


def parsed(path):
    return ast.parse(path.read_bytes())


def imports(tree):
    """[(module, name or None, is it at the top of the file)] of all imports."""
    found = []
    top = set(map(id, tree.body))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, None, id(node) in top) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found += [(node.module, alias.name, id(node) in top) for alias in node.names]
    return found


def rooms(tree):
    """The first parts of all imported modules' names."""
    return {module.split(".")[0] for module, _, _ in imports(tree)}


def code_words(path):
    """All words in names and strings of a file's code: no comment and no docstring counts."""
    tree = parsed(path)
    docstrings = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node):
            docstrings |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    words = set()
    for token in tokenize.generate_tokens(io.StringIO(path.read_text()).readline):
        if token.start[0] not in docstrings and token.type != tokenize.COMMENT:
            words |= set(re.findall(r"[a-z0-9]+", token.string.lower()))
    return words


# --------------------------------------------------------------------------------------------------
# Who imports whom
# --------------------------------------------------------------------------------------------------
def test_common_needs_pytorch_and_numpy_alone():
    assert rooms(parsed(COMMON)) == {"math", "numpy", "torch"}


@names(SUPPORT)
def test_support_imports_common_and_itself(path):
    allowed = {"common", "support"}
    if path.name == "toy.py":
        allowed.add("evaluate")  # for the judge's network
    assert rooms(parsed(path)) & OURS <= allowed


@names(SCRIPTS)
def test_a_script_imports_common_and_support(path):
    assert rooms(parsed(path)) & OURS <= {"common", "support"}


def test_evaluate_imports_nothing_of_ours():
    assert rooms(parsed(ROOT / "evaluate.py")) & OURS == set()


@names(FILES)
def test_packages(path):
    foreign = rooms(parsed(path)) - OURS - PACKAGES - set(sys.stdlib_module_names)
    assert foreign == set()


@names([COMMON, *SUPPORT, *SCRIPTS])
def test_slow_packages_are_imported_where_they_are_used(path):
    at_top = {module.split(".")[0] for module, _, is_top in imports(parsed(path)) if is_top}
    assert at_top & SLOW == set()


@names(SCRIPTS)
def test_a_script_takes_blocks_interpolants_and_sampler_from_common(path):
    taken = [name for module, name, _ in imports(parsed(path)) if module == "common"]
    assert None not in taken
    assert len(taken) <= (NAMES_OF_REPA if path.stem == "repa" else NAMES_FROM_COMMON)


def test_there_is_no_circle_in_support():
    needs = {path.stem: {module.split(".")[1] for module, _, _ in imports(parsed(path))
                         if module.startswith("support.")} for path in SUPPORT}
    while needs:
        free = [room for room, others in needs.items() if not others & needs.keys()]
        assert free, f"a circle: {needs}"
        for room in free:
            del needs[room]


# --------------------------------------------------------------------------------------------------
# What a room knows
# --------------------------------------------------------------------------------------------------
@names([COMMON, *SUPPORT])
def test_common_and_support_know_no_method(path):
    methods = {*METHODS, "softtokens"}
    if path.stem == "pictures":
        methods.discard("repa")  # here the name of a folder's format: --from-repa
    assert code_words(path) & methods == set()


def test_common_neither_ends_the_process_nor_reads_a_file():
    calls = {node.func.id for node in ast.walk(parsed(COMMON))
             if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
    assert calls & {"SystemExit", "exit", "quit", "open", "fail", "print"} == set()


@names([COMMON, *SUPPORT, *SCRIPTS])
def test_constructors_do_not_end_the_process(path):
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.ClassDef) and is_network(node):
            for call in ast.walk(node):
                if isinstance(call, ast.Call) and isinstance(call.func, ast.Name):
                    assert call.func.id not in ("fail", "SystemExit"), f"{node.name} ends the process"


def is_network(node):
    """Does a class derive from a network?"""
    bases = {ast.unparse(base) for base in node.bases}
    return bool(bases & {"nn.Module", "nn.Sequential", "SiT", "SiTBlock", "Attention", "Mlp"})


def test_a_name_of_common_or_support_has_two_users():
    """Or it moves to its only user. The room itself counts as one where it builds on the name."""
    users = Counter()
    for path in [*SUPPORT, *SCRIPTS, *TOOLS]:
        for module, name, _ in imports(parsed(path)):
            if module.split(".")[0] in ("common", "support") and name not in ROOMS:
                users[module.removeprefix("support."), name] += 1
    for room, name in users:
        text = (COMMON if room == "common" else ROOT / f"support/{room}.py").read_text()
        users[room, name] += len(re.findall(rf"\b{name}\b", text)) > 1
    lonely = {key for key, count in users.items() if count == 1 and key[0] not in EXEMPT}
    assert lonely == ONE_USER.keys()


ROOMS = {path.stem for path in SUPPORT}
ONE_USER = {  # with the reason
    ("common", "Down"): "U-Net blocks are the card's",
    ("common", "Up"): "U-Net blocks are the card's",
    ("common", "UNetBlock"): "U-Net blocks are the card's",
    ("dataset", "image_randn"): "the one rule of randomness is told in one place",
}


# --------------------------------------------------------------------------------------------------
# How a line reads
# --------------------------------------------------------------------------------------------------
@names(FILES)
def test_lines(path):
    lines = path.read_text().splitlines()
    limit = SUPPORT_LINES if path.parent.name == "support" else LINES.get(path.name, SCRIPT_LINES)
    assert len(lines) <= limit
    assert [i for i, line in enumerate(lines, start=1) if len(line) > COLUMNS] == []


@names(SCRIPTS)
def test_density(path):
    _, nodes_a_line = density(path.read_text())
    assert nodes_a_line <= NODES


@names(FILES)
def test_no_text_or_list_is_switched_on_by_multiplying(path):
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
            sides = node.left, node.right
            is_text = any(isinstance(side, (ast.JoinedStr, ast.List)) or
                          isinstance(side, ast.Constant) and isinstance(side.value, str)
                          for side in sides)
            is_condition = any(isinstance(side, (ast.Compare, ast.BoolOp)) or
                               isinstance(side, ast.UnaryOp) and isinstance(side.op, ast.Not) or
                               isinstance(side, ast.Call) and ast.unparse(side.func) == "bool"
                               for side in sides)
            assert not (is_text and is_condition), f"line {node.lineno}: an if is plainer"


def test_readme_is_one_sitting():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 250

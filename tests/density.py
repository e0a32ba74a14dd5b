"""How dense the code is: a table of expressions and statements per line of code.

    python tests/density.py [FILE ...]                      default: the scripts, prepare.py, evaluate.py

A line of code has code on it: no blank line, comment or docstring counts. Small readable codebases
have about 6 (the median over nanoGPT, CleanRL, EDM2 and others is 5.8); above 7.2 a reader stops.
"""
import ast
import io
import sys
import tokenize
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NO_CODE = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT,
           tokenize.ENDMARKER}


def docstring_lines(tree):
    """Numbers of the lines that docstrings stand on."""
    lines = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node):
            text = node.body[0]
            lines |= set(range(text.lineno, text.end_lineno + 1))
    return lines


def density(source):
    """(lines of code, nodes per line) of a file's text."""
    tree = ast.parse(source)
    lines = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in NO_CODE:
            lines |= set(range(token.start[0], token.end[0] + 1))
    lines -= docstring_lines(tree)
    nodes = [node for node in ast.walk(tree) if isinstance(node, (ast.expr, ast.stmt))]
    return len(lines), len(nodes) / len(lines)


if __name__ == "__main__":
    files = [Path(name) for name in sys.argv[1:]] or sorted(ROOT.glob("*.py"))
    print(f"{'':16}{'lines':>7}{'of code':>9}{'nodes a line':>14}")
    for file in files:
        source = file.read_text()
        count, nodes = density(source)
        print(f"{file.name:16}{len(source.splitlines()):7}{count:9}{nodes:14.2f}")

"""The shape of the files: one frame in six scripts, and the sizes that keep them readable."""
import ast
import difflib
import io
import re
import tokenize

import pytest
from conftest import METHODS, ROOT

SLOT = re.compile(r"(?ms)^ *# <method: ([^>\n]*)>\n(.*?)^ *# </method>\n")
SILENT = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT,
          tokenize.ENDMARKER)
SIZES = {"common.py": 3500, "rpp.py": 4900, "mini/make.py": 4500, "results/grid.py": 2000,
         "figures/draw.py": 5500, "examples/generate.py": 3000}
SIZES |= {f"{method}.py": 3000 for method in METHODS if method != "rpp"}


def source(name):
    return (ROOT / name).read_text()


def frame(method):
    """A script without its docstring, its slots emptied."""
    text = re.sub(r'(?s)\A""".*?"""\n', "", source(f"{method}.py"))
    return SLOT.sub(lambda slot: f"# slot: {slot[1]}\n", text)


def docstring_lines(text):
    lines = set()
    for node in ast.walk(ast.parse(text)):
        holds = isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))
        if holds and ast.get_docstring(node, clean=False) is not None:
            lines.update(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return lines


def tokens_by_line(text):
    skipped = docstring_lines(text)
    counts = {}
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in SILENT and token.start[0] not in skipped:
            counts[token.start[0]] = counts.get(token.start[0], 0) + 1
            for line in range(token.start[0] + 1, token.end[0] + 1):
                counts.setdefault(line, 0)
    return counts


def code_lines(name):
    """A file's lines of code, comments and docstrings left out."""
    text = source(name)
    lines = text.split("\n")
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            row = token.start[0] - 1
            lines[row] = lines[row][:token.start[1]]
    skipped = docstring_lines(text)
    return [line.rstrip() for n, line in enumerate(lines, 1) if n not in skipped and line.strip()]


def changed_lines(first, second):
    pairs = difflib.unified_diff(code_lines(first), code_lines(second), n=0, lineterm="")
    return sum(line[0] in "+-" and line[:3] not in ("+++", "---") for line in pairs)


@pytest.mark.parametrize("method", METHODS[1:])
def test_frame_is_equal_to_the_letter(method):
    ours, theirs = frame("magnitude").split("\n"), frame(method).split("\n")
    for number, (a, b) in enumerate(zip(ours, theirs)):
        assert a == b, f"line {number} of the frame differs: magnitude.py has {a!r}"
    assert len(ours) == len(theirs)


def test_frame_size():
    assert sum(tokens_by_line(frame("magnitude")).values()) <= 1750


@pytest.mark.parametrize("name", SIZES)
def test_size(name):
    assert sum(tokens_by_line(source(name)).values()) <= SIZES[name]


def test_size_of_the_tests():
    files = (ROOT / "tests").glob("*.py")
    assert sum(sum(tokens_by_line(f.read_text()).values()) for f in files) <= 25000


def python_files():
    files = [f for folder in (".", "mini", "results", "figures", "examples", "tests")
             for f in (ROOT / folder).glob("*.py")]
    return sorted(str(f.relative_to(ROOT)) for f in files)


@pytest.mark.parametrize("name", python_files())
def test_lines_are_short(name):
    assert max(len(line) for line in source(name).split("\n")) <= 100


def test_ten_tokens_a_line():
    """On average over all that is not a test, and in each script."""
    tokens = lines = 0
    for name in python_files():
        if name.startswith("tests"):
            continue
        counts = tokens_by_line(source(name))
        tokens += sum(counts.values())
        lines += len(counts)
        if "/" not in name:
            assert sum(counts.values()) / len(counts) <= 10.05, name
    assert tokens / lines <= 10


def test_no_other_python_file_at_the_top():
    assert {f.name for f in ROOT.glob("*.py")} == {"common.py", *(f"{m}.py" for m in METHODS)}


@pytest.mark.parametrize("first, second, most", [
    ("magnitude", "mvp", 45), ("mvp", "soft_mvp", 75),
    ("mvp", "l0", 130), ("magnitude", "mgpp", 120)])
def test_ladder(first, second, most):
    assert changed_lines(f"{first}.py", f"{second}.py") <= most


@pytest.mark.parametrize("method", METHODS)
def test_docstring(method):
    text = ast.get_docstring(ast.parse(source(f"{method}.py")))
    assert text.count("\n") + 1 <= 45
    for part in ("Idea", "Symbols", "Unlike", "Differs", "Run", f"RESULT {method} squad keeps"):
        assert part in text

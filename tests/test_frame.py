"""The shape of the files: one frame in six scripts, shared definitions, short lines and diffs."""
import ast
import difflib
import importlib
import io
import re
import tokenize

import pytest
from conftest import METHODS, ROOT

SLOT = re.compile(r"(?ms)^ *# <method: ([^>\n]*)>\n(.*?)^ *# </method>\n")
SLOTS = ["imports", "definitions", "hyper-parameters", "flags", "checks", "setup",
         "before the loop", "before forward", "penalty", "gradient", "after step", "bake"]


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


@pytest.mark.parametrize("method", METHODS)
def test_slots(method):
    """Each slot stands once, in this order, and says something."""
    slots = SLOT.findall(source(f"{method}.py"))
    assert [name for name, _ in slots] == SLOTS
    assert all(body.strip() for _, body in slots)


def definitions(method):
    """{name: source} of the functions and classes of a script's method."""
    text = source(f"{method}.py")
    return {node.name: ast.get_source_segment(text, node) for node in ast.parse(text).body
            if isinstance(node, (ast.FunctionDef, ast.ClassDef))}


@pytest.mark.parametrize("name, methods", [
    ("schedule", ["magnitude", "mvp", "soft_mvp", "l0", "mgpp"]),
    ("kth_largest", ["magnitude", "mvp", "soft_mvp", "l0", "mgpp"]),
    ("top_v", ["magnitude", "mvp", "soft_mvp", "l0", "mgpp"]),
    ("least_share", ["magnitude", "mvp", "soft_mvp"]),
    ("update_masks", ["magnitude", "mvp", "soft_mvp"]),
    ("StraightThrough", ["mvp", "soft_mvp"]),
    ("Masked", ["mvp", "soft_mvp"])])
def test_shared_definitions_are_identical(name, methods):
    assert len({definitions(method)[name] for method in methods}) == 1


def python_files():
    files = [f for folder in (".", "mini", "results", "results/why", "figures", "examples", "tests")
             for f in (ROOT / folder).glob("*.py")]
    return sorted(str(f.relative_to(ROOT)) for f in files)


@pytest.mark.parametrize("name", python_files())
def test_lines_are_short(name):
    assert max(len(line) for line in source(name).split("\n")) <= 100


def test_no_other_python_file_at_the_top():
    assert {f.name for f in ROOT.glob("*.py")} == {"common.py", *(f"{m}.py" for m in METHODS)}


@pytest.mark.parametrize("first, second, most", [
    ("magnitude", "mvp", 35), ("mvp", "soft_mvp", 35),
    ("mvp", "l0", 105), ("magnitude", "mgpp", 100)])
def test_ladder(first, second, most):
    assert changed_lines(f"{first}.py", f"{second}.py") <= most


@pytest.mark.parametrize("method", METHODS)
def test_docstring_has_the_command_and_its_last_line(method):
    text = ast.get_docstring(ast.parse(source(f"{method}.py")))
    assert f"python {method}.py --task squad" in text and f"RESULT {method} squad keeps" in text


@pytest.mark.parametrize("method", METHODS)
def test_every_flag_has_a_help_text(method):
    parser = importlib.import_module(method).flags()
    assert all(action.help for action in parser._actions)

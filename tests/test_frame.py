"""The scripts as texts: one frame, equal to the letter; the sizes and imports STYLE.md sets; nothing done at import.

The frame is what is left of a script without its module docstring and without the lines between a mark `# <method: name>` and
its `# </method>`. The marks themselves belong to the frame.
"""
import ast
import io
import json
import os
import re
import subprocess
import sys
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = [name for name in ("magnitude", "mvp", "soft_mvp", "l0", "rpp", "mgpp") if (ROOT / f"{name}.py").exists()]
SHARED = [name for name in ("common", "tasks") if (ROOT / f"{name}.py").exists()]           # what the scripts share, if in two files
OPEN, CLOSE = re.compile(r"\s*# <method: [\w -]+>"), re.compile(r"\s*# </method>")


def text_of(name):
    return (ROOT / f"{name}.py").read_text(encoding="utf-8")


def docstring_lines(text):
    """{line numbers} of every docstring: of the module, its classes and its functions."""
    lines = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) and ast.get_docstring(node) is not None:
            lines |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return lines


def frame(name, text):
    """[(line number, line)] of the frame. Fails on marks that are nested, unclosed or not closed by a line of their own."""
    tree, doc, frame, opened = ast.parse(text), set(), [], 0
    if ast.get_docstring(tree) is not None:
        doc = set(range(tree.body[0].lineno, tree.body[0].end_lineno + 1))
    for n, line in enumerate(text.split("\n"), 1):
        if n in doc:
            continue
        if OPEN.match(line):
            assert not opened, f"{name}.py, line {n}: a <method> inside the one that line {opened} opens"
            opened = n
            frame.append((n, line))
        elif CLOSE.match(line):
            assert opened, f"{name}.py, line {n}: </method> closes nothing"
            opened = 0
            frame.append((n, line))
        elif not opened:
            assert "<method" not in line and "</method" not in line, f"{name}.py, line {n}: a mark that is not written as a mark: {line}"
            frame.append((n, line))
    assert not opened, f"{name}.py, line {opened}: a <method> that is never closed"
    return frame


def first_difference(name, text, other, other_text):
    """None, or a sentence with the first line in which the frames of two scripts differ."""
    ours, theirs = frame(name, text), frame(other, other_text)
    for (n, line), (m, expected) in zip(ours, theirs):
        if line != expected:
            return f"the frame differs: {name}.py, line {n}:\n    {line}\nwhere {other}.py, line {m}, has\n    {expected}"
    if len(ours) != len(theirs):
        longer, rest = (name, ours[len(theirs):]) if len(ours) > len(theirs) else (other, theirs[len(ours):])
        return f"the frame differs: {longer}.py goes on at line {rest[0][0]}:\n    {rest[0][1]}"
    return None


@pytest.mark.parametrize("name", SCRIPTS[1:])
def test_the_frame_is_the_same(name):
    difference = first_difference(name, text_of(name), SCRIPTS[0], text_of(SCRIPTS[0]))
    assert difference is None, difference


@pytest.mark.parametrize("old, new", [
    ("optimizer.step()", "optimizer.step( )"), ("    run.log(", "    run .log("), ('metavar="DIR"', 'metavar="FOLDER"'),
    ("eps=1e-8", "eps=1e-6"), ("# <method: penalty>", "# <method: punishment>"),
    ("# ---- run", "# ---- the run"), ("    # </method>\n    return p", "    # </method>\n\n    return p"), ("import common\n", "import common, os\n")])
def test_the_frame_test_can_fail(old, new):
    """Each of these edits of one script is noticed; edits inside the marks and of the module docstring are not."""
    name, text = SCRIPTS[0], text_of(SCRIPTS[0])                    # whose method holds none of these, so that they are the frame's
    assert old in text, f"this test wants to change {old!r}, which {name}.py no longer has: choose another line of the frame"
    doc_ends = ast.parse(text).body[0].end_lineno
    head, body = text.split("\n")[:doc_ends], "\n".join(text.split("\n")[doc_ends:])
    difference = first_difference("edited", "\n".join([*head, body.replace(old, new, 1)]), name, text)
    assert difference and re.search(r"edited\.py, line \d+|\.py goes on at line \d+", difference)
    inside = re.sub(r"(# <method: setup>\n)", r"\1    nothing = 0\n", text)
    assert inside != text and first_difference("edited", inside, name, text) is None
    assert first_difference("edited", '"""Another docstring."""\n' + body, name, text) is None


@pytest.mark.parametrize("name", SCRIPTS)
def test_marks(name):
    """The slots that STYLE.md draws are there, in its order, and the frame is the smaller part that it ought to be."""
    marks = [re.search(r"<method: ([\w -]+)>", line).group(1) for _, line in frame(name, text_of(name)) if "<method: " in line]
    drawn = ["flags", "definitions", "setup", "before forward", "penalty", "after step", "bake"]
    assert [m for m in marks if m in drawn] == drawn and len(marks) == len(set(marks)), marks
    assert len(frame(name, text_of(name))) < 0.75 * text_of(name).count("\n")


# ---- sizes

def counts(text):
    """(code lines, comment lines). Code: a line with any token that is no comment and no docstring. Comment: a line of a docstring that
    is not blank, or a line with a comment, alone or after code (so such a line counts in both); the <method> marks count as neither."""
    doc, code, comments = docstring_lines(text), set(), set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            if not OPEN.match(token.string) and not CLOSE.match(token.string):
                comments.add(token.start[0])
        elif token.type not in (tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER):
            code |= set(range(token.start[0], token.end[0] + 1)) - doc
    lines = text.split("\n")
    return len(code), len(comments | {n for n in doc if lines[n - 1].strip(' "')})


def test_counts():
    text = '"""One.\n\nTwo.\n"""\nimport os\n\n# three\n# <method: x>\nx = 1     # four\ny = """a\nb"""\n# </method>\n\n\ndef f():\n    """Five."""\n'
    assert counts(text) == (5, 5)


@pytest.mark.parametrize("name", SCRIPTS)
def test_length_of_a_script(name):
    assert 150 <= len(text_of(name).splitlines()) <= 300


@pytest.mark.parametrize("name", SCRIPTS)
def test_comments_per_line_of_code_in_a_script(name):
    code, comments = counts(text_of(name))
    assert 0.6 <= comments / code <= 1.0, f"{name}.py: {comments} comment and docstring lines to {code} lines of code: {comments / code:.2f}"


@pytest.mark.parametrize("name", SHARED)
def test_length_of_what_they_share(name):
    assert len(text_of(name).splitlines()) <= 400


@pytest.mark.parametrize("name", [*SCRIPTS, *SHARED])
def test_width(name):
    assert [n for n, line in enumerate(text_of(name).splitlines(), 1) if len(line) > 160 or line != line.rstrip() or "\t" in line] == []


# ---- imports

@pytest.mark.parametrize("name", [*SCRIPTS, *SHARED])
def test_imports(name):
    allowed = sys.stdlib_module_names | {"torch", "numpy", "transformers"} | ({"tqdm", *SHARED} if name in SHARED else {"common"})
    for node in ast.walk(ast.parse(text_of(name))):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or "."] if isinstance(node, ast.ImportFrom) else []
        for imported in names:
            assert imported.split(".")[0] in allowed, f"{name}.py, line {node.lineno}: imports {imported}"


PROBE = """
import json, sys, torch
probed = []
for f in ("is_available", "device_count", "init", "current_device", "get_device_name", "get_device_properties", "is_bf16_supported"):
    def probe(*args, f=f, found=getattr(torch.cuda, f), **more):
        names, frame = [], sys._getframe(1)
        while frame:
            names.append(frame.f_code.co_filename)
            frame = frame.f_back
        if sys.argv[1] in " ".join(names):
            probed.append(f)
        return found(*args, **more)
    setattr(torch.cuda, f, probe)
before = torch.get_rng_state().clone()
import transformers
del probed[:]
import common
for name in sys.argv[2:]:
    module = __import__(name)
    module.main, module.flags, module.HYPER
same = bool((torch.get_rng_state() == before).all()) and torch.get_default_dtype() == torch.float32
print(json.dumps([probed, same, torch.distributed.is_initialized()]))
"""


def test_importing_does_nothing(tmp_path):
    """No device probed, nothing printed, drawn, or written: a script's definitions can be imported, with CUDA hidden too."""
    run = subprocess.run([sys.executable, "-c", PROBE, str(ROOT), *SCRIPTS], cwd=tmp_path, text=True, capture_output=True, timeout=120,
                         env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"})
    assert run.returncode == 0 and run.stderr == "", run.stderr
    assert run.stdout.count("\n") == 1 and json.loads(run.stdout) == [[], True, False], run.stdout
    assert list(tmp_path.iterdir()) == []


def test_no_absolute_paths():
    """Nothing that is there on one machine only (tests aside, some of which give such paths as wrong ones)."""
    machine = re.compile(r"""(?<![\w.:/])/(?:work|home|root|Users|mnt|scratch|data|tmp|opt)/|\b[A-Z]:\\\w""")
    files = [*ROOT.glob("*.py"), *ROOT.glob("mini/*.py"), *ROOT.glob("figures/*.py"), ROOT / "README.md", ROOT / "requirements.txt"]
    found = [f"{f.relative_to(ROOT)}, line {n}: {line.strip()}" for f in files if f.exists()
             for n, line in enumerate(f.read_text(encoding="utf-8").splitlines(), 1) if machine.search(line)]
    assert found == [], "\n".join(found)

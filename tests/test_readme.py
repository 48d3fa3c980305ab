"""README's commands fit the scripts' command lines, and its figures are those of results/*.tsv."""
import importlib
import re
import shlex

import numpy as np
import pytest
from conftest import METHODS, ROOT
from test_examples import load_example
from test_frame import changed_lines

README = (ROOT / "README.md").read_text()
RESULTS = (ROOT / "results" / "README.md").read_text()


def commands():
    blocks = re.findall(r"```\n(.*?)```", README, re.S)
    lines = "\n".join(blocks).split("\n")
    parts = [part.strip() for line in lines for part in line.split("#")[0].split("&&")]
    return [part for part in parts if re.match(r"(python|torchrun) ", part)]


@pytest.mark.parametrize("command", commands())
def test_command_parses(command):
    words = shlex.split(command)
    script = next(word for word in words if word.endswith(".py"))
    assert (ROOT / script).exists()
    module = load_example() if "/" in script else importlib.import_module(script[:-3])
    module.flags().parse_args(words[words.index(script) + 1:])


def test_there_are_commands():
    assert len(commands()) >= 9


@pytest.mark.parametrize("link", re.findall(r"\]\(((?!http)[^)#]+)", README))
def test_link_leads_to_a_file(link):
    assert (ROOT / link).exists()


@pytest.mark.parametrize("link", re.findall(r"results/README\.md#([\w-]+)", README))
def test_link_leads_to_a_heading(link):
    headings = re.findall(r"^## (.*)$", RESULTS, re.M)
    anchors = [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings]
    assert link in anchors


def rows(name):
    lines = (ROOT / "results" / name).read_text().split("\n")
    return [line.split("\t") for line in lines[1:-1]]


def values(scores):
    """[12.5, 15.0] of "EM 12.5 F1 15.0"."""
    return [float(x) for x in scores.split()[1::2]]


def mean(name, column, task, v):
    """The text that a table has for these runs."""
    found = [values(row[5]) for row in rows(name)
             if row[:2] == [column, task] and float(row[2]) == v]
    return " / ".join(f"{x:.1f}" for x in np.mean(found, axis=0)) + f" ({len(found)})"


@pytest.mark.parametrize("method", METHODS)
def test_front_table(method):
    line = next(line for line in README.split("\n") if line.startswith(f"| `{method}.py`"))
    cells = [cell.strip() for cell in line.split("|")[1:-1]]
    for cell, v in ((cells[3], 0.1), (cells[4], 0.03)):
        assert cell == mean("mini.tsv", method, "squad", v).split(" / ")[1].split()[0]
    assert int(cells[5]) == (ROOT / f"{method}.py").read_text().count("\n")
    if cells[6]:
        other, changed = re.match(r"`(\w+\.py)`: (\d+)", cells[6]).groups()
        assert int(changed) == changed_lines(other, f"{method}.py")


def test_size_of_the_front_page():
    assert README.count("\n") <= 170 and len(README.split()) <= 1900

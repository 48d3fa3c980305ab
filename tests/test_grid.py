"""results/grid.py: each command that it starts, and each command in a table, is one of a script."""
import argparse
import importlib
import shlex

import pytest
from conftest import METHODS, ROOT, load

grid = load(ROOT / "results" / "grid.py")


def check(words):
    if words[0][:-3] in METHODS:
        importlib.import_module(words[0][:-3]).flags().parse_args(words[1:])
    else:
        exercise = f"## {words[0]}:" in (ROOT / "examples" / "exercises.md").read_text()
        assert (ROOT / words[0]).exists() or exercise


@pytest.mark.parametrize("name", grid.GRIDS)
def test_grid_commands(name):
    args = argparse.Namespace(grid=name, runs="out", model="M", data="D", corpus="C")
    runs = grid.wanted(name)
    for run in runs:
        check(grid.command(args, run))
    assert len(runs) == len(set(runs))


@pytest.mark.parametrize("path", sorted((ROOT / "results").rglob("*.tsv")), ids=lambda p: p.name)
def test_commands_of_a_table(path):
    header, *lines = path.read_text().split("\n")[:-1]
    assert header.split("\t")[-1] == "command"
    for line in lines:
        check(shlex.split(line.split("\t")[-1])[1:])

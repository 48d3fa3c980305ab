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


@pytest.mark.parametrize("link", re.findall(r"\]\(((?!http)[^)#]+)", README + RESULTS))
def test_link_leads_to_a_file(link):
    assert (ROOT / link).exists() or (ROOT / "results" / link).exists()


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


@pytest.mark.parametrize("name", ["embedded.tsv", "squad11.tsv", "sst2.tsv", "sst2_3000.tsv",
                                  "cola.tsv"])
def test_tables_of_results(name):
    """Each cell of the table that has this file's columns and tasks."""
    section = RESULTS[:RESULTS.index(f"[{name}]({name})")].rsplit("\n## ", 1)[1]
    table = RESULTS[RESULTS.index(section):].split("\n\n| task, kept", 1)[1].split("\n\n")[0]
    header = [cell.strip() for cell in ("| task, kept" + table.split("\n")[0]).split("|")[1:-1]]
    checked = 0
    for line in table.split("\n")[2:]:
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        task, kept = re.match(r"(\w+), ([\d.]+) %", cells[0]).groups()
        for column, cell in zip(header[2:], cells[2:]):
            if cell:
                assert cell == mean(name, column, task, float(kept) / 100), (column, cells[0])
                checked += 1
    assert checked == len({(row[0], row[1], row[2]) for row in rows(name)
                           if row[1] != "cola" or name == "cola.tsv"})


@pytest.mark.parametrize("question, heading", [("spike", "What MGPP's spike is worth"),
                                               ("exponent", "RPP's exponent")])
def test_tables_of_sweeps(question, heading):
    """Each cell lists the F1 of the seeds."""
    table = RESULTS.split(f"## {heading}")[1].split("\n\n| kept |")[1].split("\n\n")[0]
    names = [name.strip() for name in table.split("\n")[0].split("|")[:-1]]
    checked = 0
    for line in table.split("\n")[2:]:
        kept, *cells = [cell.strip() for cell in line.split("|")[1:-1]]
        v = float(kept.split()[0]) / 100
        for name, cell in zip(names, cells):
            seeds = [row[6] for row in rows("sweep.tsv")
                     if row[:2] == [question, name] and float(row[2]) == v]
            if name == "magnitude":
                seeds = [row[5].split()[3] for row in rows("embedded.tsv")
                         if row[:2] == [name, "squad"] and float(row[2]) == v]
            assert cell == ", ".join(f"{float(seed):.1f}" for seed in seeds), (name, kept)
            checked += len(seeds)
    assert checked > 3


def test_table_of_rankings():
    assert len(rows("ranking.tsv")) == 10
    for method, task, kept, _, *shares, scores, _ in rows("ranking.tsv"):
        score = " / ".join(f"{x:.1f}" for x in values(scores))
        cells = [f"{task}, {float(kept):g} %", method, *shares, score]
        assert f"| {' | '.join(cells)} |" in RESULTS


def test_table_of_generation():
    """A row has the EM of each seed, and the mean of each ROUGE."""
    section = RESULTS.split("## Text generation")[1].split("\n## ")[0]
    measured = {}
    for method, sparsity, _, _, scores, *_ in rows("generate.tsv"):
        measured.setdefault((method, sparsity), []).append(values(scores))
    for (method, sparsity), seeds in measured.items():
        name = method if method == "dense" else f"{method}, {100 * float(sparsity):g} %"
        em = ", ".join(f"{seed[0]:.1f}" for seed in seeds)
        rouge = " | ".join(f"{x:.1f}" for x in np.mean(seeds, axis=0)[1:])
        assert f"| {name} | {em} | {rouge} |" in section
    assert len(measured) == 15


@pytest.mark.parametrize("method", METHODS)
def test_front_table(method):
    line = next(line for line in README.split("\n") if line.startswith(f"| `{method}.py`"))
    cells = [cell.strip() for cell in line.split("|")[1:-1]]
    for cell, v in ((cells[3], 0.1), (cells[4], 0.03)):
        assert cell == mean("embedded.tsv", method, "squad", v).split(" / ")[1].split()[0]
    assert int(cells[5]) == (ROOT / f"{method}.py").read_text().count("\n")
    if cells[6]:
        other, changed = re.match(r"`(\w+\.py)`: (\d+)", cells[6]).groups()
        assert int(changed) == changed_lines(other, f"{method}.py")


def test_floors():
    table = RESULTS.split("## Floors")[1].split("\n## ")[0]
    known = [(row[0], row[1], row[3]) for row in rows("floor.tsv")]
    stated = re.findall(r"^\| (embedded|real) \| (\w+)[^|]* \| ([^|]+) \|", table, re.M)
    assert len(stated) == 11 and set(stated) <= set(known)


def test_size_of_the_front_page():
    assert README.count("\n") <= 170 and len(README.split()) <= 1900

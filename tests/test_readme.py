"""The pages' commands fit the scripts, what they show to copy runs, their figures are rows."""
import argparse
import importlib
import re
import shlex
from itertools import repeat
from textwrap import dedent, indent
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import METHODS, ROOT, run, start
from transformers import (
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

import common

README = (ROOT / "README.md").read_text()
COPYING = (ROOT / "examples" / "README.md").read_text()
EXERCISES = (ROOT / "examples" / "exercises.md").read_text()
RESULTS = (ROOT / "results" / "README.md").read_text()


def blocks(language="", page=README):
    found = re.findall(r"(?ms)^```(\w*)\n(.*?)^```$", page)
    return [text for name, text in found if name == language]


def commands():
    lines = "\n".join(blocks()).split("\n")
    parts = [part.strip() for line in lines for part in line.split(" #")[0].split("&&")]
    table = re.findall(rf"^\| `((?:{'|'.join(METHODS)})\.py[^`]*)`", README, re.M)
    return [part for part in parts if re.match(r"(python|torchrun) ", part)] + [
        f"python {words}" for words in table]


@pytest.mark.parametrize("command", commands())
def test_command_parses(command):
    words = shlex.split(command)
    script = next(word for word in words if word.endswith(".py"))
    assert (ROOT / script).exists()
    module = importlib.import_module(script[:-3])
    module.flags().parse_args(words[words.index(script) + 1:])


def test_there_are_commands():
    assert len(commands()) >= 15


def test_a_method_alone():
    """The lines with diff and sed, as bash runs them."""
    text = "\n".join([*blocks(), *blocks(page=COPYING)])
    lines = [line for line in text.split("\n") if re.match("diff |sed ", line)]
    shown = {line: start(["bash", "-c", line]).stdout for line in lines}
    assert len(shown) == 6 and all(shown.values())
    whole, *_, bare, setup = shown.values()
    assert "StraightThrough" in bare and bare.count("\n") < whole.count("\n")
    assert "register_parametrization" in setup and "update_masks" not in setup


# ---- what a reader copies

SLOT = re.compile(r"(?ms)^ *# <method: ([^>\n]*)>\n(.*?)^ *# </method>\n")


OWN = re.findall(r"(?m)^\| (\w+) \| `(\w+=.*)` \|$", COPYING)


@pytest.mark.parametrize("method, own", OWN)
def test_loop_runs_as_printed(tmp_path, monkeypatch, method, own):
    """The loop, with each script's slots and own values pasted in, on a few texts."""
    slots = dict(SLOT.findall((ROOT / f"{method}.py").read_text()))
    loop, = blocks("python", COPYING)
    lines = loop.split("\n")
    place, = [i for i, line in enumerate(lines) if line.endswith("# soft_mvp's")]
    assert lines[place].split(")")[0].strip() == dict(OWN)["soft_mvp"]
    lines[place] = f"    {own})"
    pasted = re.sub(r"(?m)^( *)# slot: (.*)$",
                    lambda place: indent(dedent(slots[place[2]]), place[1]), "\n".join(lines))
    assert pasted.count("steps=1000") == 1
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "mini" / "bert")
    batch = tokenizer(["he stole 3 drums", "he stole 30 drums"], return_tensors="pt", padding=True)
    batch["labels"] = torch.tensor([0, 1])
    model = AutoModelForSequenceClassification.from_pretrained(ROOT / "mini" / "bert")
    before = [weight.clone() for weight in model.state_dict().values()]
    names = list(model.state_dict())
    monkeypatch.chdir(tmp_path)
    given = dict(model=model, batches=repeat(batch))
    if method == "mgpp":
        given["data"] = SimpleNamespace(train=range(2))
    exec(pasted.replace("steps=1000", "steps=20"), given)
    saved = AutoModelForSequenceClassification.from_pretrained("pruned")
    assert common.count_kept(saved)[1] == pytest.approx(0.1, abs=1e-5)
    assert list(saved.state_dict()) == names            # plain layers again
    assert any((a != b).any() for a, b in zip(before, saved.state_dict().values()))


@pytest.mark.parametrize("method, own", OWN)
def test_own_values_are_those_of_mini(method, own):
    module = importlib.import_module(method)
    defaults = vars(module.flags().parse_args([])) | module.MINI
    assert eval(f"dict({own})").items() <= defaults.items()


def exercises():
    """[(name, script that it is a copy of, [(what is replaced, by what)])]"""
    found = []
    for part in EXERCISES.split("\n## ")[1:]:
        name = re.match(r"\w+\.py", part)[0]
        source = re.search(r"A copy of `(\w+\.py)`", part)[1]
        changes = []
        kind = ""
        for line in blocks("diff", part)[0].splitlines():
            if not (line[0] == "+" and kind):           # a new place
                changes.append(["", ""])
            kind = line[0]
            if kind != "+":
                changes[-1][0] += line[1:]
            if kind != "-":
                changes[-1][1] += "\n" * (changes[-1][1] != "") + line[1:]
        found.append((name, source, changes))
    return found


@pytest.mark.parametrize("name, source, changes", exercises())
def test_exercise(data, tmp_path, monkeypatch, name, source, changes):
    text = (ROOT / source).read_text()
    for old, new in changes:
        assert text.count(old) in (1, 2), old
        text = text.replace(old, new)
    (tmp_path / name).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    v = 0.5 if name == "two_of_four.py" else 0.1
    result = run(name[:-3], data, tmp_path / "out", "--sparsity", str(v))
    assert result["kept"] == pytest.approx(v, abs=1e-4)
    model = AutoModelForQuestionAnswering.from_pretrained(tmp_path / "out")
    if name == "two_of_four.py":
        for layer in common.prunable(model).values():
            assert ((layer.weight.view(-1, 4) != 0).sum(dim=1) == 2).all()
    if name == "frozen.py":
        first = AutoModelForQuestionAnswering.from_pretrained(ROOT / "mini" / "bert")
        for a, b in zip(common.prunable(first).values(), common.prunable(model).values()):
            assert torch.equal(a.weight * (b.weight != 0), b.weight)


def test_grid_runs_a_new_method(tmp_path, monkeypatch):
    """The name in METHODS is enough: its runs are wanted, its script is called."""
    text = (ROOT / "results" / "grid.py").read_text()
    (tmp_path / "grown_grid.py").write_text(text.replace('"rpp"]', '"rpp", "wanda"]', 1))
    monkeypatch.syspath_prepend(tmp_path)
    grid = importlib.import_module("grown_grid")
    assert ("wanda", "squad", 0.1, 2) in grid.wanted("mini")
    args = argparse.Namespace(grid="mini", runs="out", model=None, data=None, corpus=None)
    assert grid.command(args, ("wanda", "squad", 0.1, 2))[0] == "wanda.py"


@pytest.mark.parametrize("page", ["README.md", "examples/README.md", "examples/exercises.md",
                                  "results/README.md", "results/why/README.md"])
def test_links(page):
    for link in re.findall(r"\]\((?!http)([^)]+)\)", (ROOT / page).read_text()):
        path, _, anchor = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), link
        if anchor:
            headings = re.findall(r"^#+ (.*)$", target.read_text(), re.M)
            assert anchor in [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")
                              for heading in headings], link


# ---- figures

def scores(name, column="scores", **wanted):
    """The accuracy or F1 of each row in results/name that has these values."""
    header, *lines = [line.split("\t")
                      for line in (ROOT / "results" / name).read_text().splitlines()]
    rows = [dict(zip(header, line)) for line in lines]
    return [float(row[column].split()[-1]) for row in rows
            if all(row[key] == text for key, text in wanted.items())]


def pair(low, high):
    """The means at a lower and at a higher learning rate, as the page has them."""
    return " / ".join(f"{np.mean(found):.1f}" for found in (low, high) if found)


def front_row(beginning):
    """The cells of a line of the table of scores, which stands below the table of methods."""
    *_, line = [line for line in README.split("\n") if line.startswith(beginning)]
    return [cell.strip() for cell in line.split("|")[1:-1]]


def front_cells(method, ten, three):
    """SQuAD, SST-2 and mini; ten, three: the fractions kept as the rows write them."""
    ours = dict(method=method, sparsity=ten)
    mini = pair(scores("mini.tsv", method=method, task="squad", sparsity=three),
                scores("mini_lr.tsv", method=f"{method}_2e-3", sparsity=three))
    slow = scores("why/speed.tsv", "acc", script=method, layers="3", steps="10000", kept=ten)
    return [pair(scores("squad_gpu.tsv", **ours), scores("squad_2800.tsv", **ours)),
            pair(slow, scores("sst2_10000.tsv", **ours)), mini]


@pytest.mark.parametrize("method", METHODS[:-1])
def test_front_table(method):
    _, ten, three, *ours = front_row(f"| `{method}.py`")
    assert ours == front_cells(method, "0.1", "0.03")
    for score in filter(None, (ten, three)):
        assert f" / {score} |" in RESULTS


def test_front_table_dense_and_floor():
    assert front_row("| dense")[3:] == front_cells("magnitude", "1", "1")
    squad, sst2, mini = [max(scores("floor.tsv", data=data, task=task)) for data, task in
                         (("real", "squad"), ("real", "sst2"), ("mini", "squad"))]
    assert front_row("| floor")[1:] == [f"{x:.1f}" for x in (squad, squad, squad, sst2, mini)]


def test_figures_of_the_front_page_are_results():
    """They stand on the pages of results, whose tables are made of the rows."""
    text = README.split("## Which one")[1].split("## How to read")[0]
    figures = set(re.findall(r"\b\d+\.\d\b", text))
    assert len(figures) > 40
    pages = RESULTS + (ROOT / "results" / "why" / "README.md").read_text()
    assert not [x for x in figures if not re.search(rf"(?<![\d.]){re.escape(x)}(?!\d)", pages)]

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
    assert sorted(given["model"].state_dict()) == sorted(names)      # plain layers, nothing added
    assert list(saved.state_dict()) == names
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


def mean(name, column="scores", **wanted):
    """The mean of these rows, of which there must be one at least, as the page has it."""
    found = scores(name, column, **wanted)
    assert found, (name, wanted)
    return f"{np.mean(found):.1f}"


def cell(name, column="scores", **wanted):
    """The same, but "" where it was not run."""
    return mean(name, column, **wanted) if scores(name, column, **wanted) else ""


def mini_seeds(method, v, lr="5e-4", **wanted):
    """Mini's questions. The rows at 5e-4, its own rate, have a file of their own."""
    if lr == "5e-4":
        return scores("mini.tsv", method=method, task="squad", sparsity=v, **wanted)
    return scores("mini_lr.tsv", method=f"{method}_{lr}", task="squad", sparsity=v, **wanted)


def mini(method, v, lr="5e-4", **wanted):
    found = mini_seeds(method, v, lr, **wanted)
    return f"{np.mean(found):.1f}" if found else ""


def sst2(method, v, lr):
    """Three layers, 10,000 steps."""
    if lr == "2e-4":
        return cell("sst2_10000.tsv", method=method, sparsity=v)
    return cell("why/speed.tsv", "acc", script=method, layers="3", steps="10000", kept=v)


def squad(method, v, lr):
    """Six layers, 2,800 steps."""
    name = "squad_gpu.tsv" if lr == "1e-4" else "squad_2800.tsv"
    method += "_4e-4" * (lr == "4e-4")
    return cell(name, method=method, sparsity=v)


def floor(data, task):
    return f"{max(scores('floor.tsv', data=data, task=task)):.1f}"


def front_row(beginning):
    """The cells of a line of the table of scores, which stands below the table of methods."""
    *_, line = [line for line in README.split("\n") if line.startswith(beginning)]
    return [cell.strip() for cell in line.split("|")[1:-1]][1:]


def front_cells(method, ten, three):
    """SQuAD, SST-2 and mini; ten, three: the fractions kept as the rows write them."""
    return [*(squad(method, ten, lr) for lr in ("1e-4", "2e-4", "4e-4")),
            *(sst2(method, ten, lr) for lr in ("3e-5", "2e-4")),
            *(mini(method, v, lr) for v in (ten, three) for lr in ("5e-4", "2e-3"))]


def test_front_table():
    """The cells, and the bold ones: the best of each column, and those level with it."""
    shown = [front_row(f"| `{method}.py`") for method in METHODS]
    for method, cells in zip(METHODS, shown):
        assert [cell.strip("*") for cell in cells] == front_cells(method, "0.1", "0.03")
    for column, n in zip(zip(*shown), [10_570] * 3 + [872] * 2 + [600] * 4):
        bold = {cell for cell in column if cell.startswith("**")}
        best, *others = sorted((float(cell.strip("*")) for cell in column if cell), reverse=True)
        level = [x for x in others
                 if best - x < 2 * ((best * (100 - best) + x * (100 - x)) / n) ** 0.5]
        assert bold == {f"**{x:.1f}**" for x in [best, *level]}
    assert front_row("| dense") == front_cells("magnitude", "1", "1")
    real = [floor("real", "squad")] * 3 + [floor("real", "sst2")] * 2
    assert front_row("| floor") == [*real, *[floor("mini", "squad")] * 4]


def test_seeds_of_movement():
    """Those of the two columns of mini at 10 %, one of which has collapsed each time."""
    low, high = (", ".join(f"{x:.0f}" for x in mini_seeds("mvp", "0.1", lr))
                 for lr in ("5e-4", "2e-3"))
    assert f"Movement's at 10 % are {low} and {high}: two collapsed." in README


def test_the_papers_scores():
    """README's F1, from the table of EM / F1 on the page of results."""
    assert "| task, kept | magnitude | L0 | movement | soft movement |" in RESULTS
    assert "| kept | magnitude | movement | soft movement | L0 |" in README
    for v in ("10", "3"):
        cells = re.search(rf"(?m)^\| SQuAD, {v} % \| (.*) \|$", RESULTS)[1].split(" | ")
        magnitude, l0, movement, soft = (cell.split(" / ")[1] for cell in cells)
        assert f"| {v} % | {magnitude} | {movement} | {soft} | {l0} |" in README


def test_rpp_had_ten_times_its_default_pretraining():
    assert "It had ten times its default pre-training here." in README
    default = importlib.import_module("rpp").MINI["pretrain"]["steps"]
    rows = (ROOT / "results" / "mini.tsv").read_text().splitlines()
    for v in ("0.1", "0.03"):
        ran = [row for row in rows if row.startswith(f"rpp\tsquad\t{v}\t")]
        assert len(ran) == 3 and all(f"--pretrain_steps {10 * default}" in row for row in ran)


def test_findings():
    """Each figure of the front page's findings, in its sentence."""
    text = " ".join(README.split("## What we found")[1].split("## How to read")[0].split())

    def lead(v, lr):
        soft, magnitude = (np.mean(mini_seeds(name, v, lr)) for name in ("soft_mvp", "magnitude"))
        return f"{soft - magnitude:.0f}"

    assert f"by {lead('0.1', '5e-4')} points with 10 % kept, and by {lead('0.03', '5e-4')}" in text
    assert f"ahead by {lead('0.1', '2e-3')} and {lead('0.03', '2e-3')}." in text
    names = {"magnitude": "magnitude", "MGPP": "mgpp", "soft movement": "soft_mvp"}
    for name, method in names.items():
        first, last = (squad(method, "0.1", lr) for lr in ("1e-4", "4e-4"))
        assert re.search(f"{name} (rises )?from {first} to {last}[,. ]", text)
    mgpp, soft = (squad(method, "0.1", "4e-4") for method in ("mgpp", "soft_mvp"))
    assert f"just ahead on SQuAD ({mgpp} to {soft} at 4e-4, one seed)" in " ".join(README.split())
    own, soft = [mean("why/lent.tsv", "lender_F1", lender=lender, lender_lr="0.0005")
                 for lender in ("magnitude", "soft_mvp")]
    borrowed = mean("why/lent.tsv", "F1", lender="soft_mvp", lender_lr="0.0005", lr="0.0005")
    assert f"has F1 {borrowed} instead of {own}, and soft movement itself has {soft} (" in text
    apart = [mini(method, "0.03", "2e-3", seed="0")
             for method in ("mgpp", "mgpp_L2", "mgpp_no_prior", "magnitude")]
    pulled = mean("default.tsv", method="l2_global", sparsity="0.03")
    assert "MGPP has {}, with L2 alone {}, and without its penalty {}.".format(*apart) in text
    assert f"`magnitude.py` has {apart[3]}, and with one ranking and [plain L2]" in text
    assert f"(examples/exercises.md) {pulled} (" in text
    stated = re.findall(r"([\d.]+) (?:\(chance\) )?after ([\d,]+)", text)
    assert len(stated) == 3
    for accuracy, steps in stated:
        assert accuracy == mean("why/speed.tsv", "acc", script="mvp", layers="3", kept="0.1",
                                steps=steps.replace(",", ""), seed="0")


def test_findings_of_the_results_page():
    """Those that the front page leaves to it: 30 % kept, and RPP's one support."""
    text = RESULTS.split("## Findings")[1].split("\n## ")[0]
    short = [mean("squad11.tsv", method=method, sparsity="0.3")
             for method in ("mgpp", "magnitude", "soft_mvp")]
    long = [mean("squad_10000.tsv", method=method, sparsity="0.3")
            for method in ("mvp", "soft_mvp", "l0", "magnitude")]
    assert "six layers: MGPP F1 {}, magnitude {}, soft movement {}.".format(*short) in text
    assert "three layers: movement {}, soft movement {}, L0 {}, magnitude {}.".format(*long) in text
    assert f"F1 is {mini('rpp', '0.4')} on the questions (dense {mini('magnitude', '1')})" in text


def test_figures_of_the_front_page_are_results():
    """None is left out: all stand on the pages of results, whose tables are made of the rows."""
    text = README.split("## Which one")[1].split("## How to read")[0]
    figures = set(re.findall(r"\b\d+\.\d\b", text))
    assert len(figures) > 40
    pages = RESULTS + (ROOT / "results" / "why" / "README.md").read_text()
    assert not [x for x in figures if not re.search(rf"(?<![\d.]){re.escape(x)}(?!\d)", pages)]

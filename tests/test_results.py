"""The pages of results/: their tables are made of the rows, their figures stand in the tables."""
import importlib
import re

import pytest
from conftest import METHODS, ROOT, load

tables = load(ROOT / "results" / "why" / "tables.py")
TEXT = dict(zip(["front", "results", "why"], [page.read_text() for page in tables.PAGES]))


@pytest.mark.parametrize("page", TEXT)
def test_tables_are_made_of_the_rows(page):
    assert tables.fill(TEXT[page]) == TEXT[page], "run: python results/why/tables.py"


def test_each_table_stands_once():
    marked = re.findall(r"<!-- ([^/].*?) -->", "".join(TEXT.values()))
    grids = [name for name in tables.grid.GRIDS if name != "paper"]
    assert sorted(marked) == sorted({*tables.TABLES, *grids})


def test_figures_in_the_text_stand_in_tables():
    """Each mean with its seeds, 70.1 (91, 27, 92), and each figure of the findings but errors."""
    names = re.findall(r"<!-- ([^/].*?) -->", "".join(TEXT.values()))
    cells = "".join(tables.table(name) for name in [*names, "why/sst2_1200"])
    text = re.sub(r"<!-- (.*?) -->.*?<!-- /\1 -->", "", "".join(TEXT.values()), flags=re.S)
    for mean in re.findall(r"\d+\.\d \([\d, ]+\)", text):
        assert mean in cells
    cells += (ROOT / "results" / "why" / "why.tsv").read_text()
    findings = TEXT["results"].split("## Findings")[1].split("\n## ")[0]
    for figure in re.findall(r"(?<!± )\b\d+\.\d\b", findings):
        assert re.search(rf"\b{re.escape(figure)}\b", cells), figure


# what the scripts in results/ put something else in the place of
REPLACED = {
    "mvp": "update_masks top_v task_loss lr_factor Masked HYPER",
    "soft_mvp": "update_masks top_v task_loss lr_factor Masked HYPER sigmoid_penalty",
    "mgpp": "zero_smallest lr_factor task_loss HYPER",
    "rpp": "solve_gamma largest_to_go HYPER",
    "magnitude": "update_masks Masked task_loss lr_factor",
    "l0": "task_loss lr_factor",
}


@pytest.mark.parametrize("script", REPLACED)
def test_names_that_the_investigations_replace(script):
    module = importlib.import_module(script)
    assert all(hasattr(module, name) for name in REPLACED[script].split())


def test_docstrings_and_exercises_quote_the_default_runs():
    """The last line in each docstring, and the scores of README's exercises, are rows."""
    f1, em = {}, {}
    for row in tables.read("default.tsv"):
        place = row["method"], float(row["sparsity"])
        em[place], f1[place] = (f"{x:.1f}" for x in tables.values(row["scores"]))
    for method in METHODS:
        text = (ROOT / f"{method}.py").read_text()
        number = r"([\d.]+)"
        line = rf"RESULT {method} squad keeps {number}% .* EM {number} F1 {number}"
        quoted = re.search(line, text)
        place = method, float(quoted[1]) / 100
        assert quoted[2] == em[place] and quoted[3] == f1[place]
    page = (ROOT / "examples" / "exercises.md").read_text()
    exercises = re.findall(r"(?s)\n## (\w+)\.py:.*?F1 ([\d.]+)\.", page)
    assert len(exercises) == 6
    for name, stated in exercises:
        assert stated == f1[name, 0.5 if name == "two_of_four" else 0.1]


def test_floor_of_a_classification(data):
    """The majority class, counted by hand; and the bag of words has a score on both dev files."""
    floor = load(ROOT / "results" / "floor.py")
    labels = []
    for name in ("train", "dev_matched"):
        lines = (data / "glue" / "MNLI" / f"{name}.tsv").read_text().split("\n")[1:-1]
        labels.append([line.split("\t")[-1] for line in lines])
    most = max(set(labels[0]), key=labels[0].count)
    found = floor.classification("mnli", data)
    right = 100 * labels[1].count(most) / len(labels[1])
    assert found["majority class"]["acc"] == pytest.approx(right)
    assert set(found["bag of words"]) == {"acc", "acc_mm"}

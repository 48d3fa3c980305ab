"""Puts the tables into README.md and the two pages of results, from rows in .tsv files.

    python results/why/tables.py

In a page a table stands between the marks <!-- NAME --> and <!-- /NAME -->. A test holds that the
pages are what this script makes of them.
"""
import ast
import re
import sys
from pathlib import Path

import numpy as np

RESULTS = Path(__file__).resolve().parent.parent
PAGES = [RESULTS.parent / "README.md", RESULTS / "README.md", RESULTS / "why" / "README.md"]
sys.path.insert(0, str(RESULTS))
import grid  # noqa: E402

KEPT = [98, 92, 85, 70, 60, 45, 25, 13]         # the columns of losses in speed.tsv


def read(name):
    """[{column: cell}]"""
    header, *lines = (RESULTS / name).read_text().splitlines()
    return [dict(zip(header.split("\t"), line.split("\t"))) for line in lines]


def markdown(header, lines):
    lines = [header, ["---"] * len(header), *lines]
    return "\n".join(f"| {' | '.join(str(cell) for cell in line)} |" for line in lines)


def rate(lr):
    """2e-4 of "0.0002"."""
    return f"{float(lr):.0e}".replace("e-0", "e-")


def values(scores):
    """[12.5, 15.0] of "EM 12.5 F1 15.0"."""
    return [float(x) for x in scores.split()[1::2]]


def error(a, b, n):
    """The standard error of the difference of two percentages, each of n dev examples."""
    return sum(x * (100 - x) / n for x in (a, b)) ** 0.5


# ---- README.md and results/README.md

def floors():
    """Each metric's best guesser: on mini, then on real data."""
    best = {}
    for row in read("floor.tsv"):
        words = row["scores"].split()
        for metric, value in zip(words[::2], map(float, words[1::2])):
            place = row["data"], row["task"], metric
            best[place] = max(best.get(place, (-1, "")), (value, row["guesser"]))
    return markdown(["data", "task", "metric", "floor", "guesser"], [
        [data, task, metric, f"{value:.1f}", guesser]
        for (data, task, metric), (value, guesser) in sorted(best.items())])


def cost():
    """BERT-base's shape on a GPU, and what the paper's 55,000 steps on SQuAD would take."""
    rows = read("cost_gpu.tsv")
    dense = np.mean([float(row["ms"]) for row in rows if row["method"] == "dense"])
    lines = []
    for name in ["dense", *grid.METHODS, "mvp_global"]:
        row = next(row for row in rows if row["method"] == name)
        ms = dense if name == "dense" else float(row["ms"])
        hours = 55_000 * ms / 3.6e6
        lines.append([name, f"{ms:.1f}", f"{ms / dense:.2f}", row["peak_GB"], f"{hours:.2f}"])
    return markdown(["method", "ms a step", "x dense", "peak memory, GB",
                     "55,000 steps, hours"], lines)


def generation():
    """The mean EM with its seeds, and the mean of each ROUGE."""
    runs = {}
    for row in read("generate.tsv"):
        runs.setdefault((row["method"], float(row["sparsity"])), []).append(values(row["scores"]))
    floor = max(values(row["scores"]) for row in read("floor.tsv") if row["task"] == "generate")
    lines = [["floor", *(f"{x:.1f}" for x in floor)]]
    for method, v in sorted(runs, key=lambda run: -run[1]):
        em, *rouge = zip(*runs[method, v])
        name = method if v == 1 else f"{method}, {100 * v:g} %"
        lines.append([name, grid.mean(em), *(f"{np.mean(x):.1f}" for x in rouge)])
    return markdown(["", "EM", "ROUGE-1", "ROUGE-2", "ROUGE-L"], lines)


def by_rate():
    """{(mini, squad or sst2; fraction kept; learning rate; method or dense): scores}"""
    runs = {}

    def add(data, kept, lr, method, score):
        method = "dense" if kept == "1" else method
        runs.setdefault((data, kept, lr, method), []).append(score)

    for row in read("mini.tsv"):
        if row["task"] == "squad":
            score = grid.score("squad", row["scores"])
            add("mini", row["sparsity"], "5e-4", row["method"], score)
    for name in ("mini_lr", "squad_gpu", "squad_2800", "sst2_10000"):
        for row in read(f"{name}.tsv"):
            task = row["task"]
            lr = re.findall(r"--lr (\S+)", row["command"])[-1]         # the last one counts
            add("mini" if name == "mini_lr" else task, row["sparsity"], lr,
                row["method"].removesuffix(f"_{lr}"), grid.score(task, row["scores"]))
    for row in read("why/speed.tsv"):
        if (row["layers"], row["steps"]) == ("3", "10000"):
            add("sst2", row["kept"], "3e-5", row["script"], float(row["acc"]))
    return runs


def front():
    """The table of the front page; bold: the best pruned one and those level with it."""
    runs = by_rate()
    columns = [("squad", "0.1", lr) for lr in ("1e-4", "2e-4", "4e-4")]
    columns += [("sst2", "0.1", lr) for lr in ("3e-5", "2e-4")]
    columns += [("mini", v, lr) for v in ("0.1", "0.03") for lr in ("5e-4", "2e-3")]
    names = {"squad": "SQuAD", "sst2": "SST-2", "mini": "mini"}
    header = ["", *(f"{names[data]} {100 * float(v):g} %, {lr}" for data, v, lr in columns)]
    lines = [[f"`{method}.py`"] for method in grid.METHODS]
    lines += [["dense: nothing pruned"], ["floor: best guesser"]]
    for data, v, lr in columns:
        scores = [runs.get((data, v, lr, method)) for method in grid.METHODS]
        scores = [np.mean(score) if score else np.nan for score in scores]
        n = {"squad": 10_570, "sst2": 872, "mini": 600}[data]           # dev examples
        best = np.nanmax(scores)
        for line, x in zip(lines, scores):
            level = best - x < 2 * error(best, x, n)
            line.append("" if np.isnan(x) else f"**{x:.1f}**" if level else f"{x:.1f}")
        dense = runs.get((data, "1", lr, "dense"))
        lines[-2].append(f"{np.mean(dense):.1f}" if dense else "")
        world, task = ("mini", "squad") if data == "mini" else ("real", data)
        lines[-1].append(f"{grid.floor(world, task):.1f}")
    return markdown(header, lines)


def rates(data, columns, methods):
    """Scores at several learning rates. columns: [(fraction kept, learning rate)]"""
    runs = by_rate()
    lines = [["dense", *(grid.mean(runs.get((data, "1", lr, "dense"))) for _, lr in columns)]]
    for method in methods:
        lines.append([method, *(grid.mean(runs.get((data, v, lr, method))) for v, lr in columns)])
    return markdown(["", *(f"{100 * float(v):g} %, {lr}" for v, lr in columns)], lines)


def mini_rates():
    """Mini's questions: F1."""
    columns = [("0.1", "5e-4"), ("0.1", "2e-3")]
    columns += [("0.03", lr) for lr in ("5e-4", "1e-3", "2e-3", "4e-3")]
    others = ["mvp_global", "magnitude_global", "mgpp_L2", "mgpp_no_prior"]
    return rates("mini", columns, [*grid.FINE_TUNED, *others])


def squad_rates():
    """SQuAD, six layers, 2,800 steps: F1."""
    return rates("squad", [("0.1", lr) for lr in ("1e-4", "2e-4", "4e-4")], grid.FINE_TUNED)


def order():
    """SST-2, three layers, 10,000 steps of 16: accuracy, minus magnitude's, and minus the floor."""
    runs = by_rate()
    floor = grid.floor("real", "sst2")

    def difference(a, b):
        return f"{a - b:+.1f} ± {error(a, b, 872):.1f}"

    dense = grid.mean(runs["sst2", "1", "3e-5", "dense"])
    lines = [["floor", *[f"{floor:.1f}", "", ""] * 2], ["dense", *[dense, "", ""] * 2]]
    for method in grid.METHODS[:-1]:
        lines.append([method])
        for v in ("0.1", "0.03"):
            found, magnitudes = (runs["sst2", v, "3e-5", name] for name in (method, "magnitude"))
            mean, magnitude = np.mean(found), np.mean(magnitudes)
            lines[-1] += [grid.mean(found),
                          "" if method == "magnitude" else difference(mean, magnitude),
                          difference(mean, floor)]
    columns = [(f"sst2, {v} %", "minus magnitude", "minus the floor") for v in (10, 3)]
    return markdown(["", *columns[0], *columns[1]], lines)


# ---- results/why/README.md

def movement_runs():
    """All runs of mvp.py to 10 % on SST-2, those of earlier.tsv with a star."""
    runs = []
    for row in read("why/speed.tsv"):
        if (row["script"], row["kept"], row["seed"]) == ("mvp", "0.1", "0"):
            runs.append(row | {"batch": 16, "lr": "3e-5", "t_i": 0.05, "t_f": 0.3, "star": ""})
    runs += [row | {"star": " *"} for row in read("why/earlier.tsv")]
    for run in runs:
        for name in ("layers", "steps", "t_i", "t_f", "batch"):
            run[name] = float(run[name])
        run["cut"] = run["steps"] * (1 - run["t_i"] - run["t_f"])
        seen = [float(run[f"loss_{k}"]) for k in KEPT if run[f"loss_{k}"]]
        last = run["loss_end"] or (seen[-1] if seen else 0.69)
        run["holds"] = float(last) < 0.6
    return sorted(runs, key=lambda run: (run["layers"], run["cut"], float(run["lr"])))


def shown(cell):
    return f"{float(cell):.2f}".lstrip("0") if cell else ""


def map_of_speed():
    lines = []
    for run in movement_runs():
        losses = [shown(run[f"loss_{k}"]) for k in [*KEPT, "end"]]
        accuracy = f"{float(run['acc']):.1f}" if run["acc"] else ""
        lines.append([f"{run['layers']:.0f}{run['star']}",
                      f"{run['steps']:,.0f} x {run['batch']:.0f}, {run['lr']}",
                      f"{run['cut']:,.0f}", *losses, accuracy, "yes" if run["holds"] else "no"])
    return markdown(["layers", "steps x batch, lr", "to cut", *(f"{k} %" for k in KEPT), "end",
                     "accuracy", "holds"], lines)


def probes():
    """What it costs to remove weights from a dense model that no longer learns."""
    names = {"movement": "lowest movement", "back to front": "highest movement",
             "random": "random", "size": "smallest gradient x weight", "weight": "smallest weight"}
    losses = {}                                 # {(run, order): {kept: loss}}
    for row in read("why/why.tsv"):
        words = row["command"].split()
        if "--probe" in words and "--part" not in words:
            given = {word: words[place + 1] for place, word in enumerate(words[:-1])}
            if int(given["--probe"]) > 1000:                # 4,000 and 2,000: in the text
                continue
            layers = given["--model"].removeprefix("LAYERS").replace("MODEL", "6")
            run = f"{layers} layers, lr {given['--lr']}, step {int(given['--probe']):,}"
            losses.setdefault((run, row["variant"]), {})[float(row["kept"])] = shown(row["loss"])
    lines = []
    for (run, order), loss in losses.items():
        before = losses[run, "movement"].get(1.0, "")
        cells = [loss[v] for v in (0.999, 0.99, 0.95, 0.8, 0.6)]
        lines.append([run, names[order], before, *cells])
    return markdown(["model", "removed first", "0", "0.1 %", "1 %", "5 %", "20 %", "40 %"], lines)


def experiment(name, variant):
    """The rows of why.tsv that are of this experiment and variant."""
    return [row for row in read("why/why.tsv")
            if (row["experiment"], row["variant"]) == (name, variant)]


def what_helps():
    """One change at a time in the run of 1,200 steps."""
    names = {"plain": "as it is", "penalty": "soft movement's penalty added",
             "random": "masks in a fixed random order", "size": "masks by gradient x weight",
             "sgd": "scores learned by SGD", "official": "the official t_i, t_f and warm-up",
             "every25": "masks found every 25 steps", "V=0.5": "to 50 % instead of 10 %",
             "slow": "12,000 steps"}
    lines = []
    for variant, name in names.items():
        rows = experiment("falls", variant)
        cells = [f"{shown(row['loss'])} at {100 * float(row['kept']):.0f} %" for row in
                 (min(rows, key=lambda row: abs(float(row["kept"]) - 0.93)), rows[-1])]
        lines.append([name, *cells])
    return markdown(["variant", "loss near 93 % kept", "the last loss measured"], lines)


def wait():
    """mini, 10 %: F1 by the step of the first cut, seeds 0 to 9, and the loss near 48 % kept."""
    lines = []
    for t_i in ("0.05", "0.3"):
        rows = experiment("wait", t_i)
        ends = sorted((int(row["seed"]), ast.literal_eval(row["metrics"])["F1"])
                      for row in rows if row["step"] == row["steps"])
        middle = [float(row["loss"]) for row in rows if 0.47 < float(row["kept"]) < 0.49]
        lines.append([t_i, grid.mean([f1 for _, f1 in ends]),
                      f"{min(middle):.2f} to {sorted(middle)[-2]:.2f}, {max(middle):.2f}"])
    return markdown(
        ["t_i", "F1 (seeds 0 to 9)", "loss near 48 % kept: nine seeds, and the worst"], lines)


def waits():
    """mini, each method: F1 with the preset's first cut, after 5 % of the steps, and after 30 %."""
    early = grid.read(RESULTS / "mini.tsv")[1]
    late = grid.read(RESULTS / "why" / "wait.tsv")[1]
    lines = []
    for column in grid.WAIT:
        method = column.removesuffix("_wait")
        lines.append([method])
        for v in (0.1, 0.03):
            for rows, name in ((early, method), (late, column)):
                f1 = [grid.score("squad", row[5]) for run, row in sorted(rows.items())
                      if run[:3] == (name, "squad", v)]
                lines[-1].append(grid.mean(f1))
    names = [f"{v} %, t_i {t_i}" for v in (10, 3) for t_i in ("0.05", "0.3")]
    return markdown(["", *names], lines)


def penalty():
    """Correlations of the scores with size and with movement."""
    names = {"1000": "lambda_f = 1000", "0": "lambda_f = 0",
             "sgd1000": "lambda_f = 1000, scores by SGD", "sgd0": "lambda_f = 0, scores by SGD"}
    lines = []
    for variant, name in names.items():
        rows = experiment("soft", variant)
        cells = [f"{shown(row['size'])} / {shown(row['move'])}" for row in rows]
        lines.append([name, *cells, *[""] * (6 - len(cells)), shown(rows[-1]["loss"])])
    return markdown(["soft_mvp.py, 10 %", *(f"{k} % kept" for k in (97, 93, 87, 78, 70, 60)),
                     "last loss"], lines)


def ranking():
    lines = []
    for row in read("why/ranking.tsv"):
        kept = f"{float(row['kept_%']):g}"
        lines.append([f"{row['task']}, {kept} %", row["method"], row["attention_%"],
                      row["feed-forward_%"], f"{grid.score(row['task'], row['scores']):.1f}",
                      f"{grid.floor('real', row['task']):.1f}"])
    return markdown(["task, kept", "method", "attention", "feed-forward", "score", "floor"], lines)


def moved():
    """How much of what is kept was large before fine-tuning, and how far it has moved."""
    lines = []
    for row in read("why/moved.tsv"):
        kept = "dense" if row["kept_%"] == "100" else row["method"]
        lines.append([kept, rate(row["lr"]),
                      *("" if kept == "dense" else row[name] for name in ("same_%", "chance_%")),
                      row["change"], row["size"],
                      f"{grid.score(row['task'], row['scores']):.1f}"])
    return markdown(["10 % kept", "lr", "large before, %", "by chance, %", "change", "size before",
                     "accuracy"], lines)


def lent():
    """mini, 3 %: magnitude.py with the masks of other runs, at two learning rates. F1."""
    runs = {}
    for row in read("why/lent.tsv"):
        mask = f"{row['lender']} at {rate(row['lender_lr'])}"
        cells = runs.setdefault(mask, {"own": f"{float(row['lender_F1']):.1f}"})
        cells[rate(row["lr"])] = f"{float(row['F1']):.1f}"
    lines = [[mask, cells["own"], cells["5e-4"], cells["2e-3"]] for mask, cells in runs.items()]
    return markdown(["mask of", "its own run", "trained at 5e-4", "trained at 2e-3"], lines)


def spike():
    """Runs with and without the spike, side by side."""
    runs = {}
    for row in read("why/spike.tsv"):
        runs.setdefault(row["kept"], []).append(row)
    names = ("thrown", "still", "inside")
    return markdown(["kept", *(f"{name}, {run}" for name in names for run in ("spike", "L2"))], [
        [f"{kept} %", *(row[name] for name in names for row in pair)]
        for kept, pair in runs.items()])


TABLES = {
    "scores": front, "floors": floors, "mini_lr": mini_rates, "squad_2800": squad_rates,
    "order": order, "generate": generation, "map": map_of_speed, "probes": probes,
    "what helps": what_helps, "wait": wait, "penalty": penalty, "why/wait": waits,
    "ranking": ranking, "moved": moved, "lent": lent, "spike": spike, "cost": cost,
}


def table(name):
    if name in TABLES:
        return TABLES[name]()
    return grid.table(name, grid.read(RESULTS / f"{name}.tsv")[1])


def fill(text):
    """The page with each table made anew."""
    return re.sub(r"(<!-- ([^/].*?) -->\n).*?(<!-- /\2 -->)",
                  lambda found: f"{found[1]}\n{table(found[2])}\n\n{found[3]}", text, flags=re.S)


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(fill(page.read_text()))

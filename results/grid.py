"""Drives the runs behind the tables, and writes what they measured to results/NAME.tsv.

    python results/grid.py mini --jobs 2                       the data in mini/: squad, mnli, qqp
    python results/grid.py mini_lr --jobs 2                    its questions, at higher rates
    python results/grid.py sst2_10000 --model DIR --data DIR   SST-2, three layers, 10,000 steps
    python results/grid.py squad11 --model DIR --data DIR      SQuAD 1.1, a small real BERT
    python results/grid.py sst2_3000 --model DIR --data DIR --corpus FILE      SST-2, 3,000 steps
    python results/grid.py cola --model DIR --data DIR         CoLA
    python results/grid.py cola_10000 --model DIR --data DIR   CoLA, a long run, three layers
    python results/grid.py squad_10000 --model DIR --data DIR  SQuAD, the same
    python results/grid.py why/mix                             MGPP's spike, on mini
    python results/grid.py why/wait                            a later first cut, on mini
    python results/grid.py why/exponent                        RPP's exponent, on mini
    python results/grid.py squad_gpu --model DIR --data DIR --jobs 12      SQuAD, on a GPU
    python results/grid.py sst2_gpu --model DIR --data DIR --jobs 12       SST-2, on a GPU
    python results/grid.py cola_gpu --model DIR --data DIR --jobs 12       CoLA, on a GPU
    python results/grid.py mini_gpu --jobs 2                   README's command, on a GPU
    python results/grid.py squad_2800 --model DIR --data DIR   squad_gpu at higher rates, on a CPU
    python results/grid.py paper --corpus FILE                 BERT-base on a GPU; never run

A run that has ended (result.json in its folder under --runs) is not made again. A killed one is
resumed. A row whose folder is not here stays as it is and counts as made: to make a run again,
delete its row. --collect makes no run. At the end the table is printed, with the floor of
results/floor.tsv; results/why/tables.py puts it into the page. rpp.py pre-trains once for each
fraction; its runs on the grid's other tasks take that support. --machine is what the rows call
this machine.
"""
import argparse
import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

RESULTS = Path(__file__).resolve().parent
ROOT = RESULTS.parent
METHODS = ["magnitude", "mvp", "soft_mvp", "l0", "mgpp", "rpp"]
# name of a column: script and flags, where they differ
VARIANTS = {
    "mvp_global": "mvp.py --scope global",
    "mgpp_L2": "mgpp.py --mix 1",
    "mgpp_no_prior": "mgpp.py --mix 1 --slab 1e9",
    "mgpp_1e-12": "mgpp.py --spike 1e-12",
    "mgpp_1e-8": "mgpp.py --spike 1e-8",
    "mgpp_1e-6": "mgpp.py --spike 1e-6",
    "mgpp_1e-4": "mgpp.py --spike 1e-4",
    "mgpp_every10": "mgpp.py --interval 10",
    "magnitude_global": "magnitude.py --scope global",
    "mvp_kd": "mvp.py",
    "soft_mvp_kd": "soft_mvp.py",
    "nip": "rpp.py --nip",
    "rpp_2000": "rpp.py --pretrain_steps 2000",
    "rpp_p1": "results/why/proximal.py --p 1 --pretrain_steps 2000",
    "dense_3e-5": "magnitude.py --lr 3e-5",
    "dense_1e-4": "magnitude.py --lr 1e-4",
    "dense_2e-4": "magnitude.py --lr 2e-4",
}
DENSE = ["magnitude"]
TEACHER = ["mvp_kd", "soft_mvp_kd"]
BEFORE_MVP = ["magnitude", "soft_mvp", "l0", "mgpp", "mgpp_L2", "mvp"]
RPP = ["rpp"]
FINE_TUNED = [method for method in METHODS if method != "rpp"]
WAIT = [f"{method}_wait" for method in FINE_TUNED]
VARIANTS |= {column: column.replace("_wait", ".py --t_i 0.3") for column in WAIT}
HIGHER = {lr: [f"{method}_{lr}" for method in FINE_TUNED] for lr in ("1e-3", "2e-3", "4e-3")}
TAKEN_APART = ["magnitude_global_5e-4", "magnitude_global_2e-3", "magnitude_global_4e-3",
               "mgpp_L2_2e-3", "mgpp_L2_4e-3", "mgpp_no_prior_5e-4", "mgpp_no_prior_2e-3"]
SQUAD_HIGHER = ["magnitude_4e-4", "soft_mvp_4e-4", "mgpp_4e-4"]
for column in sum(HIGHER.values(), TAKEN_APART + SQUAD_HIGHER):
    method, lr = column.rsplit("_", 1)
    VARIANTS[column] = f"{VARIANTS.get(method, f'{method}.py')} --lr {lr}"
SPIKES = ["mgpp_1e-12", "mgpp_1e-8", "mgpp_1e-6", "mgpp_1e-4"]
# name: [(task, fraction kept, seeds, columns)]
GRIDS = {
    "mini": [
        ("squad", 1, 3, DENSE),
        ("squad", 0.1, 3, [*METHODS, "mvp_global"]),
        ("squad", 0.03, 3, [*METHODS, "mvp_global"]),
        ("squad", 0.4, 3, RPP),
        ("squad", 0.1, 2, ["nip"]),
        ("squad", 0.03, 2, TEACHER),
    ],
    "mini_lr": [
        ("squad", 0.03, 1, HIGHER["1e-3"]),
        ("squad", 0.03, 3, HIGHER["2e-3"]),
        ("squad", 0.03, 1, HIGHER["4e-3"] + TAKEN_APART),
        ("squad", 1, 1, ["magnitude_1e-3", "magnitude_4e-3"]),
        ("squad", 1, 3, ["magnitude_2e-3"]),
        ("squad", 0.1, 3, HIGHER["2e-3"]),
    ],
    "sst2_3000": [
        ("sst2", 1, 1, ["dense_3e-5", "dense_1e-4"]),
        ("sst2", 1, 3, DENSE),
    ],
    "sst2_10000": [
        ("sst2", 1, 1, DENSE),
        ("sst2", 0.1, 3, ["magnitude", "soft_mvp"]),
        ("sst2", 0.1, 1, ["mvp", "l0", "mgpp"]),
        ("sst2", 0.03, 1, FINE_TUNED),
    ],
    "squad11": [
        ("squad", 1, 1, DENSE),
        ("squad", 0.3, 1, BEFORE_MVP),
        ("squad", 0.1, 1, BEFORE_MVP),
    ],
    "cola": [
        ("cola", 1, 1, ["dense_3e-5", "dense_2e-4", *DENSE]),
        ("cola", 0.3, 1, ["magnitude", "soft_mvp", "mgpp", "mgpp_L2", "magnitude_global",
                          "mgpp_every10"]),
        ("cola", 0.1, 1, ["magnitude", "soft_mvp", "mgpp"]),
    ],
    "squad_10000": [
        ("squad", 1, 1, DENSE),
        ("squad", 0.3, 1, ["magnitude", "mvp", "soft_mvp", "l0"]),
    ],
    "cola_10000": [
        ("cola", 1, 1, DENSE),
        ("cola", 0.3, 1, ["magnitude", "soft_mvp", "l0"]),
    ],
    "squad_gpu": [
        ("squad", 1, 1, DENSE),
        ("squad", 0.1, 1, FINE_TUNED),
        ("squad", 0.03, 1, FINE_TUNED),
    ],
    "squad_2800": [("squad", 0.1, 1, ["magnitude", "soft_mvp", "mgpp", *SQUAD_HIGHER])],
    "sst2_gpu": [
        ("sst2", 1, 1, DENSE),
        ("sst2", 0.1, 1, FINE_TUNED),
    ],
    "cola_gpu": [
        ("cola", 1, 1, DENSE),
        ("cola", 0.3, 1, FINE_TUNED),
    ],
    "mini_gpu": [("squad", 0.03, 2, ["soft_mvp"])],
    "why/mix": [
        ("squad", 0.1, 3, ["mgpp", "mgpp_L2"]),
        ("squad", 0.03, 3, ["mgpp", "mgpp_L2", *SPIKES]),
    ],
    "why/wait": [
        ("squad", 0.1, 2, WAIT),
        ("squad", 0.03, 2, WAIT),
    ],
    "why/exponent": [
        ("squad", 0.1, 3, ["rpp_2000", "rpp_p1"]),
        ("squad", 0.4, 3, ["rpp_2000", "rpp_p1"]),
    ],
    "paper": [],
}
for task in ("mnli", "qqp"):
    GRIDS["mini"] += [(task, 1, 1, DENSE), (task, 0.03, 1, METHODS), (task, 0.4, 1, RPP)]
for v in (0.1, 0.3, 0.2, 0.05, 0.15, 0.03):
    GRIDS["sst2_3000"] += [("cola", v, 1, RPP), ("sst2", v, 3, BEFORE_MVP + RPP)]
for task in ("sst2", "squad"):
    GRIDS["paper"] += [(task, 1, 3, DENSE), (task, 0.1, 3, METHODS + TEACHER),
                       (task, 0.03, 3, METHODS + TEACHER)]
# grid: the task whose rpp runs pre-train; on real text CoLA, the smallest
SUPPORT = {"mini": "squad", "sst2_3000": "cola", "paper": "sst2"}
MINI = "--preset mini --device cpu"
GPU = "--preset paper --device cuda --checkpoint_every 1000000"
FLAGS = {
    "mini": MINI,
    "mini_lr": MINI,
    "why/mix": MINI,
    "why/wait": MINI,
    "why/exponent": MINI,
    "sst2_3000": "--preset paper --device cpu --steps 3000 --lr 2e-4",
    "sst2_10000": "--preset paper --device cpu --steps 10000 --batch_size 16 --lr 2e-4",
    "squad11": "--preset paper --device cpu --steps 800 --batch_size 8 --lr 2e-4",
    "cola": "--preset paper --device cpu --steps 800 --lr 1e-4",
    "cola_10000": "--preset paper --device cpu --steps 10000 --batch_size 16 --lr 3e-5",
    "squad_10000": "--preset paper --device cpu --steps 10000 --batch_size 8 --lr 3e-5",
    "squad_gpu": f"{GPU} --steps 2800 --batch_size 16 --lr 1e-4",
    "squad_2800": "--preset paper --device cpu --steps 2800 --batch_size 16 --lr 2e-4",
    "sst2_gpu": f"{GPU} --steps 5100 --batch_size 32 --lr 3e-5",
    "cola_gpu": f"{GPU} --steps 800 --batch_size 32 --lr 1e-4",
    "mini_gpu": "--preset mini --device cuda",
    "paper": "--preset paper --device cuda",
    ("rpp", "cola"): "--preset paper --device cpu --steps 600 --batch_size 16 --lr 3e-4",
}
# the metric that a table shows; all stand in the rows
SHOWN = {"squad": "F1", "mnli": "acc", "qqp": "acc", "sst2": "acc", "cola": "mcc"}
HEADER = ("method task sparsity seed kept_% scores steps seconds threads torch transformers "
          "machine commit command").split()


def wanted(grid):
    """[(column, task, v, seed)]: one seed of everything, then the second."""
    return [(column, task, v, seed)
            for seed in range(3)
            for task, v, n_seeds, columns in GRIDS[grid] if seed < n_seeds
            for column in columns]


def folder(args, run):
    column, task, v, seed = run
    return Path(args.runs) / args.grid / f"{column}-{task}-{v:g}-s{seed}"


def command(args, run):
    column, task, v, seed = run
    script, *extra = VARIANTS.get(column, f"{column}.py").split()
    words = [script, "--task", task, "--sparsity", f"{v:g}", "--seed", str(seed)]
    words += FLAGS.get((column, task), FLAGS[args.grid]).split() + extra
    for flag in ("model", "data"):
        if getattr(args, flag):
            words += [f"--{flag}", getattr(args, flag)]
    if column.endswith("_kd"):
        words += ["--teacher", str(folder(args, ("magnitude", task, 1, seed)))]
    own = args.grid == "mini" and v < 0.4           # each seed pre-trains there
    first = ("rpp", SUPPORT.get(args.grid, task), v, seed if own else 0)
    if column == "rpp" and run != first:
        words += ["--support", str(folder(args, first))]
    elif script == "rpp.py":
        if args.grid == "mini":
            words += ["--pretrain_steps", "2000" if own else "4000"]
        if args.corpus:
            words += ["--corpus", args.corpus]
    return words


def make(args, run):
    out = folder(args, run)
    text = Path(f"{out}.txt")
    out.parent.mkdir(parents=True, exist_ok=True)
    words = [sys.executable, *command(args, run), "--out", str(out)]
    if (out / "log.jsonl").exists():
        words.append("--resume")
    threads = str(os.cpu_count() // args.jobs or 1)
    with open(text, "a") as log:
        commit = subprocess.getoutput(f"git -C '{ROOT}' rev-parse --short HEAD")
        print("commit", commit, file=log, flush=True)
        subprocess.run(words, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": threads},
                       stdout=log, stderr=subprocess.STDOUT)
    print(text.read_text().splitlines()[-1], flush=True)


def read(path):
    """(the names of the columns, {run: its row})"""
    header = HEADER
    rows = {}
    if path.exists():
        header, *lines = [line.split("\t") for line in path.read_text().splitlines()]
        for line in lines:
            column, task, v, seed, *_ = line
            rows[column, task, float(v), int(seed)] = line
    return header, rows


def row_of(args, run):
    """The row of a finished run; in its command MODEL, DATA and CORPUS stand for paths."""
    result = json.loads((folder(args, run) / "result.json").read_text())
    log = Path(f"{folder(args, run)}.txt").read_text()
    commits = set(re.findall(r"(?m)^commit (\w+)", log))
    paths = {args.model: "MODEL", args.data: "DATA", args.corpus: "CORPUS"}
    words = [paths.get(word, word) for word in ["python", *command(args, run)]]
    cells = [
        *map(str, run),
        f"{100 * result['kept']:.3f}",
        " ".join(f"{name} {value:.2f}" for name, value in result["metrics"].items()),
        str(result["args"]["steps"]),
        f"{result['seconds']:.0f}",
        str(result["threads"]),
        result["versions"]["torch"],
        result["versions"]["transformers"],
        args.machine or result.get("card") or f"{os.uname().machine}, {os.cpu_count()} cores",
        " ".join(sorted(commits)),
        " ".join(words).replace(args.runs, "out"),
    ]
    return dict(zip(HEADER, cells))


def score(task, scores):
    """90.5 of "EM 88.0 F1 90.5"."""
    words = scores.split()
    return float(words[words.index(SHOWN[task]) + 1])


def floor(world, task):
    """The best guesser's score."""
    lines = [line.split("\t") for line in (RESULTS / "floor.tsv").read_text().splitlines()]
    return max(score(task, line[3]) for line in lines if line[:2] == [world, task])


def mean(values):
    """The mean and its seeds: "70.1 (91, 27, 92)"; "" without runs."""
    if not values:
        return ""
    text = f"{np.mean(values):.1f}"
    if len(values) > 1:
        text += f" ({', '.join(f'{x:.0f}' for x in values)})"
    return text


def table(grid, rows):
    """A line for each column of the grid, a column for each task and fraction; dense runs first.

    The other way round if each run has one seed: the cells are short then.
    """
    values = {}
    for (column, task, v, _), row in rows.items():
        values.setdefault((column, task, v), []).append(score(task, row[5]))
    places = sorted({(task, v) for _, task, v in values if v < 1},
                    key=lambda place: (list(SHOWN).index(place[0]), -place[1]))
    world = "mini" if "--preset mini" in FLAGS.get(grid, "") else "real"
    lines = [["", *(f"{task}, {100 * v:g} %" for task, v in places)],
             ["floor", *(f"{floor(world, task):.1f}" for task, _ in places)]]
    for dense in dict.fromkeys(column for column, _, v in values if v == 1):
        name = "dense" if dense == "magnitude" else dense
        lines.append([name, *(mean(values.get((dense, task, 1))) for task, _ in places)])
    pruned = {column for column, _, v in values if v < 1}
    for column in sorted(pruned, key=[*METHODS, *VARIANTS].index):
        lines.append([column, *(mean(values.get((column, *place))) for place in places)])
    if max(map(len, values.values()), default=0) == 1:
        lines = list(zip(*lines))
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("grid", choices=GRIDS)
    for flag in ("--model", "--data", "--corpus"):
        add(flag)
    add("--runs", default="out")
    add("--jobs", type=int, default=1)
    add("--collect", action="store_true")
    add("--machine")
    args = parser.parse_args()
    path = RESULTS / f"{args.grid}.tsv"
    header, rows = read(path)

    def one(run):
        if run not in rows and not (folder(args, run) / "result.json").exists():
            make(args, run)

    if not args.collect:
        for first in (True, False):                     # then those that start from a first one
            runs = [run for run in wanted(args.grid)
                    if {"--teacher", "--support"}.isdisjoint(command(args, run)) == first]
            with ThreadPoolExecutor(args.jobs) as pool:
                list(pool.map(one, runs))
    for run in wanted(args.grid):
        if (folder(args, run) / "result.json").exists():
            row = row_of(args, run)
            rows[run] = [row[name] for name in header]          # an older file has no machine
    lines = ["\t".join(row) for row in [header, *rows.values()]]
    path.write_text("\n".join(lines) + "\n")
    print(table(args.grid, rows))


if __name__ == "__main__":
    main()

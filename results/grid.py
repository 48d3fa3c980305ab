"""Drives the runs behind the tables, and writes what they measured to results/NAME.tsv.

    python results/grid.py embedded --jobs 2                   mini/: squad, mnli, qqp
    python results/grid.py default                             each script as it is: its time
    python results/grid.py sst2 --model DIR --data DIR --corpus FILE     SST-2, a small BERT
    python results/grid.py sst2_3000 ...                       the same, longer: a curve
    python results/grid.py squad11 ...                         SQuAD 1.1, three epochs
    python results/grid.py cola ...                            CoLA
    python results/grid.py paper --corpus FILE                 BERT-base on a GPU; never run

A run that has ended (result.json in its folder under --runs) is not made again; a killed one is
resumed; a row whose folder is not here stays as it is and counts as made. --collect makes no run.
At the end the means over seeds are printed as a table, with the floor of results/floor.tsv.
"""
import argparse
import json
import os
import platform
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
    "mvp_global": ["mvp.py", "--scope", "global"],
    "mvp_kd": ["mvp.py"],
    "soft_mvp_kd": ["soft_mvp.py"],
    "nip": ["rpp.py", "--nip"],
    "dense_3e-5": ["magnitude.py", "--lr", "3e-5"],
    "dense_1e-4": ["magnitude.py", "--lr", "1e-4"],
}
DENSE = ["magnitude"]
TEACHER = ["mvp_kd", "soft_mvp_kd"]
BEFORE_MVP = ["magnitude", "soft_mvp", "l0", "mgpp", "mvp"]
# name: [(task, fraction kept, seeds, columns)]
GRIDS = {
    "embedded": [
        ("squad", 1, 3, DENSE),
        ("squad", 0.1, 3, [*METHODS, "mvp_global"]),
        ("squad", 0.03, 3, [*METHODS, "mvp_global"]),
        ("squad", 0.1, 2, ["nip"]),
        ("squad", 0.03, 2, TEACHER),
        ("mnli", 1, 1, DENSE),
        ("mnli", 0.03, 1, METHODS),
        ("qqp", 1, 1, DENSE),
        ("qqp", 0.03, 1, METHODS),
        ("squad", 0.4, 3, ["rpp"]),
        ("mnli", 0.4, 1, ["rpp"]),
        ("qqp", 0.4, 1, ["rpp"]),
    ],
    "default": [("squad", 0.03, 1, METHODS)],
    "sst2": [("sst2", 1, 3, DENSE)] + [("sst2", v, 3, METHODS + TEACHER) for v in (0.1, 0.03)],
    "sst2_3000": [("sst2", 1, 1, ["dense_3e-5", "dense_1e-4"]), ("sst2", 1, 3, DENSE)]
    + [("sst2", v, 3, [*BEFORE_MVP, "rpp"]) for v in (0.1, 0.3, 0.2, 0.05, 0.15, 0.03)],
    "squad11": [("squad", 1, 1, DENSE), ("squad", 0.3, 1, BEFORE_MVP),
                ("squad", 0.1, 1, BEFORE_MVP)],
    "cola": [("cola", 1, 1, DENSE), ("cola", 0.3, 1, BEFORE_MVP[:3]),
             ("cola", 0.1, 1, BEFORE_MVP[:3])],
    "paper": [(task, v, 3, METHODS + TEACHER) for task in ("sst2", "squad") for v in (0.1, 0.03)]
    + [(task, 1, 3, DENSE) for task in ("sst2", "squad")],
}
FLAGS = {
    "embedded": "--preset mini --device cpu",
    "default": "--preset mini --device cpu",
    "sst2": "--preset paper --device cpu --steps 1200 --lr 3e-5",
    "sst2_3000": "--preset paper --device cpu --steps 3000 --lr 2e-4",
    "squad11": "--preset paper --device cpu --steps 3600 --lr 1e-4",
    "cola": "--preset paper --device cpu --steps 1600 --lr 1e-4",
    "paper": "--preset paper --device cuda",
}
HEADER = ("method task sparsity seed kept_% scores steps seconds threads torch transformers commit "
          "command").split()


def wanted(grid):
    """[(column, task, v, seed)]: one seed of everything, then the second."""
    runs = []
    for seed in range(3):
        for task, v, n_seeds, columns in GRIDS[grid]:
            if seed < n_seeds:
                runs += [(column, task, v, seed) for column in columns]
    return runs


def folder(args, run):
    column, task, v, seed = run
    return Path(args.runs) / args.grid / f"{column}-{task}-{v:g}-s{seed}"


def command(args, run):
    column, task, v, seed = run
    words = ["--task", task, "--sparsity", f"{v:g}", "--seed", str(seed), *FLAGS[args.grid].split()]
    words = VARIANTS.get(column, [f"{column}.py"])[:1] + words + VARIANTS.get(column, [])[1:]
    for flag in ("model", "data"):
        if getattr(args, flag):
            words += [f"--{flag}", getattr(args, flag)]
    if column.endswith("_kd"):
        words += ["--teacher", str(folder(args, ("magnitude", task, 1, seed)))]
    if column in ("rpp", "nip") and args.grid == "embedded":
        words += ["--pretrain_steps", "4000" if v == 0.4 else "2000"]
    if column in ("rpp", "nip") and args.corpus:
        words += ["--corpus", args.corpus]
    return words


def commit():
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"],
                         cwd=ROOT, capture_output=True, text=True)
    return git.stdout.strip()


def make(args, run):
    out = folder(args, run)
    out.parent.mkdir(parents=True, exist_ok=True)
    words = [sys.executable, *command(args, run), "--out", str(out)]
    if (out / "log.jsonl").exists():
        words.append("--resume")
    threads = str(max(1, os.cpu_count() // args.jobs))
    with open(f"{out}.txt", "a") as log:
        print("commit", commit(), file=log, flush=True)
        subprocess.run(words, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": threads},
                       stdout=log, stderr=subprocess.STDOUT)
    print(Path(f"{out}.txt").read_text().strip().split("\n")[-1], flush=True)


def read(path):
    """{run: its row}"""
    rows = {}
    if path.exists():
        for line in path.read_text().split("\n")[1:-1]:
            row = line.split("\t")
            rows[row[0], row[1], float(row[2]), int(row[3])] = row
    return rows


def row_of(args, run):
    """The row of a finished run; in its command MODEL, DATA and CORPUS stand for paths."""
    result = json.loads((folder(args, run) / "result.json").read_text())
    log = Path(f"{folder(args, run)}.txt")
    lines = log.read_text().split("\n") if log.exists() else []
    commits = {line.split()[1] for line in lines if line.startswith("commit ")}
    shown = argparse.Namespace(grid=args.grid, runs="out")
    for flag in ("model", "data", "corpus"):
        setattr(shown, flag, flag.upper() if getattr(args, flag) else None)
    scores = " ".join(f"{name} {value:.2f}" for name, value in result["metrics"].items())
    return [*(str(part) for part in run), f"{100 * result['kept']:.3f}", scores,
            str(result["args"]["steps"]), f"{result['seconds']:.0f}", str(result["threads"]),
            result["versions"]["torch"], result["versions"]["transformers"],
            " ".join(sorted(commits)), " ".join(["python", *command(shown, run)])]


def floors(world):
    """{task: the best guesser's first metric}"""
    best = {}
    for line in (RESULTS / "floor.tsv").read_text().split("\n")[1:-1]:
        data, task, _, scores, _ = line.split("\t")
        score = float(scores.split()[3 if task == "squad" else 1])          # F1 for SQuAD
        if data == world:
            best[task] = max(score, best.get(task, 0.0))
    return best


def print_table(args, rows):
    cells = {}
    for (column, task, v, _), row in rows.items():
        values = [float(x) for x in row[5].split()[1::2]]
        cells.setdefault((task, v), {}).setdefault(column, []).append(values)
    columns = list(dict.fromkeys(column for column, *_ in rows))
    floor = floors("embedded" if args.grid in ("embedded", "default") else "real")
    print("| task, kept | floor | " + " | ".join(columns) + " |")
    print("|---" * (len(columns) + 2) + "|")
    for (task, v), of_column in cells.items():
        texts = []
        for column in columns:
            text = ""
            if column in of_column:
                means = np.mean(of_column[column], axis=0)
                text = " / ".join(f"{x:.1f}" for x in means) + f" ({len(of_column[column])})"
            texts.append(text)
        print(f"| {task}, {100 * v:g} % | {floor[task]:.1f} | " + " | ".join(texts) + " |")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("grid", choices=GRIDS)
    for flag in ("--model", "--data", "--corpus"):
        parser.add_argument(flag)
    parser.add_argument("--runs", default="out")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--collect", action="store_true")
    args = parser.parse_args()
    path = RESULTS / f"{args.grid}.tsv"

    def one(run):
        if run not in read(path) and not (folder(args, run) / "result.json").exists():
            make(args, run)

    if not args.collect:
        print(f"{platform.processor()}, {os.cpu_count()} cores, {args.jobs} runs at a time")
        with ThreadPoolExecutor(args.jobs) as pool:
            list(pool.map(one, wanted(args.grid)))
    rows = read(path)
    for run in wanted(args.grid):
        if (folder(args, run) / "result.json").exists():
            rows[run] = row_of(args, run)
    lines = ["\t".join(row) for row in [HEADER, *rows.values()]]
    path.write_text("\n".join(lines) + "\n")
    print_table(args, rows)


if __name__ == "__main__":
    main()

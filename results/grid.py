"""Drives the runs behind README's tables, one after the other or --jobs at a time, and writes what they measured to one file.

Run        python results/grid.py embedded                                           mini/: squad, mnli, qqp; all methods; CPU
           python results/grid.py default --jobs 1                                   each script as it is, alone on the machine: its time
           python results/grid.py sst2 --model FOLDER --data DIR --corpus FILE       a real small BERT on the whole of SST-2, CPU
           python results/grid.py paper --corpus FILE --jobs 1                       BERT-base as in the papers: needs a GPU; never run yet
           python results/grid.py embedded --only l0,mgpp --jobs 1                   some of the methods

rpp.py needs a text to pre-train on: mini/ has one, for the other grids give --corpus FILE, or it is left out.

Stopped, it goes on where it was: a finished run (result.json) is not run again, an unfinished one is resumed. After each run results/NAME.tsv
and the table of its means, results/NAME.md, are written anew: the finished runs, and the file's own rows of runs whose folders are not
here. With --keep such a row counts as finished; without, it stands until its run has been made again. The cores are divided among the jobs
(OMP_NUM_THREADS); a run's bytes depend on that number and on the code, so the row names both.
"""
import argparse, json, os, shutil, subprocess, sys, threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
METHODS = ["magnitude", "mvp", "soft_mvp", "l0", "mgpp", "rpp"]
# one threshold without soft movement's penalty; with the dense run as --teacher; RPP's baseline
OTHERS = {"mvp_global": ["mvp.py", "--scope", "global"], "mvp_kd": ["mvp.py"], "soft_mvp_kd": ["soft_mvp.py"], "nip": ["rpp.py", "--nip"]}
COLUMNS = [*METHODS, *OTHERS]
WRITING = threading.Lock()
# grid: [(task, share kept, seeds, methods)]
DENSE, KD = ["magnitude"], ["mvp_kd", "soft_mvp_kd"]                # dense: at 1
whole = lambda task: [(task, 1, [0, 1, 2], DENSE), (task, 0.1, [0, 1, 2], METHODS + KD), (task, 0.03, [0, 1, 2], METHODS + KD)]
GRIDS = {"embedded": [("squad", 1, [0, 1, 2], DENSE), ("squad", 0.1, [0, 1, 2], METHODS), ("squad", 0.03, [0, 1, 2], METHODS),
                      ("squad", 0.1, [0, 1, 2], ["mvp_global"]), ("squad", 0.03, [0, 1, 2], ["mvp_global"]),
                      ("squad", 0.1, [0, 1], ["nip"]), ("squad", 0.03, [0, 1], KD),
                      ("mnli", 1, [0], DENSE), ("mnli", 0.03, [0], METHODS), ("qqp", 1, [0], DENSE), ("qqp", 0.03, [0], METHODS),
                      ("squad", 0.4, [0, 1, 2], ["rpp"]), ("mnli", 0.4, [0], ["rpp"]), ("qqp", 0.4, [0], ["rpp"])],
         "default": [("squad", 0.03, [0], METHODS)],                # what `python SCRIPT` does: for its time, on an idle machine
         "sst2": [*whole("sst2"), ("cola", 0.1, [0], ["rpp"]), ("cola", 0.03, [0], ["rpp"])],
         "paper": [*whole("sst2"), *whole("squad")]}
# rpp: whose run pre-trains; its support serves the grid's other tasks. On real text cola's, the smallest task, for it hangs on none.
SUPPORT = {"embedded": "squad", "sst2": "cola", "paper": "sst2"}
PRETRAIN = {0.4: 4000, 0.1: 2000, 0.03: 2000}                       # rpp, nip, embedded: more steps of pre-training than three minutes have
FLAGS = {"embedded": "--preset mini --device cpu", "default": "--preset mini --device cpu", "paper": "--preset paper --device cuda",
         "sst2": "--preset paper --steps 1200 --lr 3e-5 --device cpu", "cola": "--preset paper --steps 600 --batch_size 16 --lr 3e-4 --device cpu"}


def runs(grid):
    """[(method, task, v, seed)], the seeds outermost: one seed of everything comes before the second of anything."""
    return [(m, task, v, seed) for seed in (0, 1, 2) for task, v, seeds, methods in GRIDS[grid] for m in methods if seed in seeds]


def command(args, run):
    method, task, v, seed = run
    words = [*OTHERS.get(method, [f"{method}.py"]), "--task", task, "--sparsity", f"{v:g}", "--seed", str(seed)]
    words += FLAGS["cola" if task == "cola" else args.grid].split()
    for flag in ("model", "data"):
        words += [f"--{flag}", getattr(args, flag)] if getattr(args, flag) else []
    # One support serves all seeds, but at 10 and 3 % of the embedded world.
    first = (method, SUPPORT.get(args.grid), v, seed if args.grid == "embedded" and v != 0.4 else 0)
    if method == "rpp" and args.grid in SUPPORT and run != first:
        words += ["--support", str(folder(args, first))]
    elif method in ("rpp", "nip"):
        words += ["--corpus", args.corpus] if args.corpus else []
        words += ["--pretrain_steps", str(PRETRAIN[v])] if args.grid == "embedded" and v in PRETRAIN else []
    if method.endswith("_kd"):
        words += ["--teacher", str(folder(args, ("magnitude", task, 1, seed)))]
    return words


def folder(args, run):
    return Path(args.runs) / args.grid / "{}-{}-{:g}-s{}".format(*run)


def starts_from_another(args, run):
    return any(flag in command(args, run) for flag in ("--support", "--teacher"))


def commit():
    """The code's: git's short hash, with a + if a file has been changed since; empty without git."""
    git = lambda *words: subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True).stdout.strip() if shutil.which("git") else ""
    return git("rev-parse", "--short", "HEAD") + "+" * bool(git("status", "--porcelain", "--untracked-files=no", "--", ":(glob)*.py", "mini"))


def execute(args, run):
    out = folder(args, run)
    with WRITING:
        if (out / "result.json").exists() or args.keep and run in read(args):
            return
    out.parent.mkdir(parents=True, exist_ok=True)
    words = [sys.executable, *command(args, run), "--out", str(out), *(["--resume"] if (out / "log.jsonl").exists() else [])]
    env = os.environ | {"OMP_NUM_THREADS": str(max(1, os.cpu_count() // args.jobs))}
    with open(f"{out}.txt", "a") as log:
        print("commit", commit(), file=log, flush=True)
        code = subprocess.run(words, cwd=ROOT, env=env, stdout=log, stderr=subprocess.STDOUT).returncode
    last = (Path(f"{out}.txt").read_text().strip().splitlines() or ["nothing was printed"])[-1]
    print(last if code in (0, 3) else f"{out.name} ended with {code}: {last}", flush=True)
    with WRITING:
        write(args)


def commits(args, run):
    """Of the code that made the run: more than one if it was stopped and went on under another."""
    log = Path(f"{folder(args, run)}.txt")
    lines = log.read_text().splitlines() if log.exists() else []
    return " ".join(dict.fromkeys(line.split()[1] for line in lines if line.startswith("commit ") and len(line.split()) == 2))


def tsv(args):
    return Path(args.results) / f"{args.grid}.tsv"


def read(args):
    """{run: its row} of the results file as it stands."""
    rows = [line.split("\t") for line in tsv(args).read_text().splitlines()[1:]] if tsv(args).exists() else []
    return {(row[0], row[1], float(row[2]), int(row[3])): row for row in rows}


def write(args):
    """results/NAME.tsv, a row a run, and results/NAME.md, means over seeds."""
    rows, cells, known = [], {}, read(args)
    # in the file's commands no folder of this machine stands
    shown = argparse.Namespace(**vars(args) | {key: key.upper() for key in ("model", "data", "corpus") if getattr(args, key)} | {"runs": "out"})
    for run in runs(args.grid):
        path, row = folder(args, run) / "result.json", known.get(run)
        if path.exists():
            result = json.loads(path.read_text())
            scores = " ".join(f"{k} {x:.2f}" for k, x in result["metrics"].items())
            row = [*map(str, run), f"{100 * result['kept']:.3f}", scores, str(result["steps"]), f"{result['seconds']:.0f}", str(result["threads"]),
                   result["versions"]["torch"], result["versions"]["transformers"], commits(args, run), " ".join(["python", *command(shown, run)])]
        if row:
            rows.append(row)
            cells.setdefault((run[1], run[2], run[0]), []).append([float(x) for x in row[5].split()[1::2]])
    head = "method task sparsity seed kept_% scores steps seconds threads torch transformers commit command".split()
    tsv(args).write_text("\n".join("\t".join(row) for row in [head, *rows]) + "\n")
    columns = [m for m in COLUMNS if m in METHODS or any(m == of for *_, of in cells)]
    lines = ["| task, kept | " + " | ".join(["dense", *columns]) + " |", "|---" * (len(columns) + 2) + "|"]
    for task, v in dict.fromkeys((task, v) for task, v, *_ in GRIDS[args.grid] if v < 1 and task != "cola"):
        line = []
        for key in [(task, 1, "magnitude"), *((task, v, m) for m in columns)]:
            got = np.array(cells.get(key, []))                      # (seeds, metrics)
            line.append(" / ".join(f"{x:.1f}" for x in got.mean(0)) + f" ({len(got)})" if len(got) else "")
        lines.append(f"| {task}, {100 * v:g} % | " + " | ".join(line) + " |")
    (Path(args.results) / f"{args.grid}.md").write_text("\n".join(lines) + "\n")


def flags():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("grid", choices=GRIDS)
    for flag in ("model", "data", "corpus"):
        p.add_argument(f"--{flag}", help="given to the scripts")
    p.add_argument("--only", default=",".join(COLUMNS), help="methods, separated by commas")
    p.add_argument("--where", default="", help="only runs whose name (mvp-squad-0.03-s0) holds this")
    p.add_argument("--jobs", type=int, default=2, help="runs at a time")
    p.add_argument("--runs", default=str(ROOT / "out"), help="where the runs' folders are")
    p.add_argument("--results", default=str(ROOT / "results"), help="where the results file is written")
    p.add_argument("--keep", action="store_true", help="what the results file has counts as finished, wherever its folder is")
    return p


def main():
    args = flags().parse_args()
    chosen = [r for r in runs(args.grid) if r[0] in args.only.split(",") and args.where in folder(args, r).name]
    chosen = [r for r in chosen if r[0] not in ("rpp", "nip") or args.corpus or args.grid in ("embedded", "default")]
    with ThreadPoolExecutor(args.jobs) as pool:
        for later in (False, True):                                 # when the runs that they start from are finished
            list(pool.map(lambda run: execute(args, run), [r for r in chosen if starts_from_another(args, r) == later]))
    write(args)
    print((Path(args.results) / f"{args.grid}.md").read_text())


if __name__ == "__main__":
    main()

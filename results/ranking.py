"""What one ranking over all matrices does to the small ones.

    python results/ranking.py local --task cola ...     soft_mvp.py with its command line, but each
                                                        matrix is ranked by itself
    python results/ranking.py show FOLDER ...           rows of runs that have ended; grid.py's
                                                        tables have the commands that made them

A row of results/ranking.tsv has what is kept of the attention's matrices (query, key, value and
output) and of the feed-forward network's, which are four times as large: means over matrices.
"""
import json
import re
import shlex
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
TSV = ROOT / "results" / "ranking.tsv"
COLUMNS = ["method", "task", "kept_%", "seed", "attention_%", "feed-forward_%", "scores",
           "command"]


def run_local(words):
    """Run soft_mvp.py; the floor of each matrix is all that it may keep. Returns its folder."""
    sys.path.insert(0, str(ROOT))
    import soft_mvp

    soft_mvp.floor = lambda n: 1.0
    args = soft_mvp.flags().parse_args(words)
    soft_mvp.main(args)
    return Path(args.out)


def row_of(folder, variant, words):
    result = json.loads((folder / "result.json").read_text())
    kept = {"attention": [], "feed-forward": []}
    for name, share in result["kept_per_layer"].items():
        part = "attention" if "attention" in name else "feed-forward"
        kept[part].append(100 * share)
    scores = " ".join(f"{name} {value:.2f}" for name, value in result["metrics"].items())
    shares = [f"{np.mean(shares):.1f}" for shares in kept.values()]
    command = shlex.join(["python", "results/ranking.py", *words])
    for flag in ("model", "data", "out"):
        command = re.sub(rf"--{flag} \S+", f"--{flag} {flag.upper()}", command)
    return [result["method"] + variant, result["task"], f"{100 * result['kept']:.1f}",
            f"{result['args']['seed']}", *shares, scores, command]


def main():
    question, *words = sys.argv[1:]
    if question == "local":
        rows = [row_of(run_local(words), "_local", ["local", *words])]
    else:
        rows = [row_of(Path(folder), "", ["show", folder]) for folder in words]
    old = TSV.read_text().splitlines()[1:] if TSV.exists() else []
    lines = ["\t".join(COLUMNS), *old, *("\t".join(row) for row in rows)]
    TSV.write_text("\n".join(dict.fromkeys(lines)) + "\n")


if __name__ == "__main__":
    main()

"""What one ranking over all matrices leaves of the small ones.

    python results/why/ranking.py FOLDER ...        appends to results/why/ranking.tsv

A row for each finished run: what it kept of the attention's matrices (query, key, value and output)
and of the feed-forward network's, which are four times as large, in percent; means over matrices.
"""
import json
import sys
from pathlib import Path

import numpy as np

if __name__ == "__main__":
    for folder in sys.argv[1:]:
        result = json.loads(Path(folder, "result.json").read_text())
        kept = {True: [], False: []}
        for name, share in result["kept_per_layer"].items():
            kept["attention" in name].append(100 * share)
        scores = " ".join(f"{name} {value:.2f}" for name, value in result["metrics"].items())
        row = [result["method"], result["task"], f"{100 * result['kept']:.1f}",
               result["args"]["seed"], *(f"{np.mean(shares):.1f}" for shares in kept.values()),
               scores, f"python results/why/ranking.py {folder}"]
        with open(Path(__file__).with_suffix(".tsv"), "a") as file:
            print(*row, sep="\t", file=file)

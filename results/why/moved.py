"""How far has a run moved the weights that it kept, and which did it keep?

    python results/why/moved.py LAYERS3 out/sst2_10000/magnitude-sst2-0.1-s0

The first folder is the BERT that the run began with, without a head; the second is the run's --out.
Appends a row to results/why/moved.tsv:

same_%    of the weights kept: how many were among the largest of their matrix, as many as that
          matrix keeps, before fine-tuning
chance_%  what same_% would be if each matrix had kept as many at random
change    of the weights kept: the median distance to their value before fine-tuning
size      the median |W| of the weights kept, before fine-tuning
"""
import json
import sys
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file


def main(before, run):
    old = load_file(Path(before) / "model.safetensors")
    new = load_file(Path(run) / "model.safetensors")
    result = json.loads((Path(run) / "result.json").read_text())
    same = chance = kept = 0
    changes, sizes = [], []
    for name in result["kept_per_layer"]:
        w = new[f"{name}.weight"]                           # (out, in)
        w_before = old[f"{name}.weight".removeprefix("bert.")]
        stays = w != 0
        k = int(stays.sum())
        if k == 0:
            continue
        size = np.abs(w_before)
        largest = size >= np.partition(size, size.size - k, axis=None)[size.size - k]
        same += int((stays & largest).sum())
        chance += k * k / w.size
        kept += k
        changes.append(np.abs(w - w_before)[stays])
        sizes.append(size[stays])
    args = result["args"]
    scores = " ".join(f"{name} {value:.2f}" for name, value in result["metrics"].items())
    row = [result["method"], args["task"], f"{100 * result['kept']:g}", f"{args['lr']:g}",
           args["seed"], f"{100 * same / kept:.1f}", f"{100 * chance / kept:.1f}",
           f"{np.median(np.concatenate(changes)):.4f}",
           f"{np.median(np.concatenate(sizes)):.4f}", scores,
           f"python results/why/moved.py {sys.argv[1]} {sys.argv[2]}"]
    with open(Path(__file__).with_suffix(".tsv"), "a") as file:
        print(*row, sep="\t", file=file)


if __name__ == "__main__":
    main(*sys.argv[1:])

"""Runs a script, and notes what it uses and does not save. draw.py draws from what is noted.

    python figures/watch.py mvp                 figures/scores.npz       for scores.png
    python figures/watch.py mgpp                figures/threshold.tsv    for threshold.png
    python figures/watch.py mgpp --mix 1        the same file, one more column

A script is imported, one of its functions is replaced by one that also notes what it sees, and
main() runs as ever: the run, its folder and its RESULT line are those of the plain command
`python SCRIPT.py --task squad --sparsity 0.1 --preset mini --device cpu`. Minutes on a CPU.
"""
import importlib
import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))


def watch_mvp(mvp, words):
    """Keep 18,000 of the weights and scores, as they are after the last step."""
    weights, scores, masks = [], [], []
    remove = mvp.parametrize.remove_parametrizations

    def noting(layer, name):
        """The script calls this last. It replaces W by W * M and forgets the scores."""
        parametrized = layer.parametrizations.weight
        weights.append(parametrized.original.detach().numpy().ravel().copy())
        scores.append(parametrized[0].scores.detach().numpy().ravel().copy())
        masks.append(parametrized[0].mask.numpy().ravel() > 0)
        return remove(layer, name)

    mvp.parametrize.remove_parametrizations = noting
    mvp.main(mvp.flags().parse_args(words))
    kept = np.concatenate(masks)                        # (N,)
    rng = np.random.default_rng(0)
    some = rng.choice(len(kept), 18000, replace=False)
    np.savez_compressed(
        HERE / "scores.npz",
        weight=np.concatenate(weights)[some].astype(np.float16),
        score=np.concatenate(scores)[some].astype(np.float16),
        kept=kept[some])


def watch_mgpp(mgpp, words):
    """Note the smallest |w| that each zeroing leaves."""
    column = "l2" if "--mix" in words else "mgpp"
    file = HERE / "threshold.tsv"
    rows = {}
    if file.exists():
        for line in file.read_text().splitlines()[1:]:
            name, step, kept, threshold = line.split("\t")
            if name != column:
                rows[name, int(step)] = (kept, threshold)
    fraction_left = mgpp.fraction_left
    zero_smallest = mgpp.zero_smallest
    step = 0

    def noting_step(t, *rest):
        nonlocal step
        step = t
        return fraction_left(t, *rest)

    def noting(weights, v):
        zero_smallest(weights, v)
        smallest = min(float(w.detach()[w != 0].abs().min()) for w in weights)
        rows.setdefault((column, step), (f"{v:.4f}", f"{smallest:.6f}"))

    mgpp.fraction_left = noting_step
    mgpp.zero_smallest = noting
    mgpp.main(mgpp.flags().parse_args(words))
    last = max(key for key in rows if key[0] == column)
    del rows[last]                                      # of the bake: nothing is left to zero
    lines = ["run\tstep\tkept\tthreshold"]
    for (name, at), cells in sorted(rows.items()):
        lines.append("\t".join([name, str(at), *cells]))
    file.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    script, *more = sys.argv[1:]
    command = "--task squad --sparsity 0.1 --preset mini --device cpu".split()
    watch = {"mvp": watch_mvp, "mgpp": watch_mgpp}[script]
    watch(importlib.import_module(script), command + more)

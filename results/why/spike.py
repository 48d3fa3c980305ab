"""What MGPP's spike does to a weight under AdamW, measured inside a run of mgpp.py.

    python results/why/spike.py [mgpp.py's flags]     appends to results/why/spike.tsv

A row for every tenth zeroing. Since the zeroing before it (10 steps in the mini preset):
thrown    weights that moved by more than 10 learning rates, % of all
still     weights that moved by less than 1 % of the learning rate, %
back      survivors of this zeroing that the one before had set to 0, %
inside    weights within 6 standard deviations of the spike, just before the zeroing, %
The last row has the run's scores too.
"""
import json
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))
import mgpp  # noqa: E402

TSV = Path(__file__).with_suffix(".tsv")
COLUMNS = ["kept", "thrown", "still", "back", "inside", "scores", "command"]
zero_smallest = mgpp.zero_smallest
lr_factor = mgpp.lr_factor
rows = []
previous = None                         # all weights after the previous zeroing, (N,)
factor = 1.0                            # the learning rate, as a fraction of its peak


def remember(*numbers):
    global factor
    factor = lr_factor(*numbers)
    return factor


def percent(condition):
    return 100 * float(condition.double().mean())


@torch.no_grad()
def measured(weights, v):
    global previous
    now = torch.cat([w.flatten() for w in weights])                 # (N,)
    zero_smallest(weights, v)
    after = torch.cat([w.flatten() for w in weights])
    if previous is not None:
        moved = (now - previous).abs() / (LR * factor)
        back = previous[after != 0] == 0
        inside = now.abs() < 6 * SPIKE ** 0.5
        shares = [percent(x) for x in (moved > 10, moved < 0.01, back, inside)]
        rows.append([f"{100 * v:.1f}", *(f"{share:.2f}" for share in shares)])
    previous = after


if __name__ == "__main__":
    args = mgpp.flags().parse_args(sys.argv[1:])
    args.out = args.out or "out/spike"
    hyper = mgpp.HYPER[args.preset]["*"] | mgpp.HYPER[args.preset].get(args.task, {})
    LR = args.lr or hyper["lr"]
    SPIKE = args.spike or hyper["spike"]
    mgpp.zero_smallest = measured
    mgpp.lr_factor = remember
    mgpp.main(args)
    rows.pop()                          # the bake zeroes once more: nothing has moved by then
    metrics = json.loads((Path(args.out) / "result.json").read_text())["metrics"]
    scores = " ".join(f"{name} {value:.2f}" for name, value in metrics.items())
    command = " ".join(["python results/why/spike.py", *sys.argv[1:]])
    if not TSV.exists():
        TSV.write_text("\t".join(COLUMNS) + "\n")
    with open(TSV, "a") as file:
        for place, row in enumerate(rows, 1):
            if place % 10 == 0 or place == len(rows):
                last = scores if place == len(rows) else ""
                print(*row, last, command, sep="\t", file=file)

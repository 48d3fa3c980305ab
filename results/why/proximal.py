"""rpp.py with another highest exponent p, and what its proximal step does beyond magnitude pruning.

    python results/why/proximal.py [--p 1] [--log FILE] [rpp.py's flags]

FILE gets a line for every 20th step: v; differ, the fraction of Top_v(|a| / alpha) that is not in
Top_v(|a|); lost, the sum of this step's shrinkage over the sum of |a|, both over the survivors.
"""
import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
import rpp  # noqa: E402

solve_gamma = rpp.solve_gamma
calls = []


def measured(weights, alphas, v, lr):
    gamma = solve_gamma(weights, alphas, v, lr)
    if len(calls) % 20 == 0:
        size = torch.cat([a.detach().abs().flatten() for a in weights])                 # (N,)
        press = lr * gamma * torch.cat([alpha.flatten() for alpha in alphas])           # (N,)
        stays = size > press
        largest = size > rpp.largest_to_go(size, v)
        differ = float((stays & ~largest).sum() / stays.sum())
        lost = float(press[stays].sum() / size[stays].sum())
        with open(own.log, "a") as log:
            print(f"step {len(calls)}  v {v:.4f}  differ {differ:.5f}  lost {lost:.2e}", file=log)
    calls.append(gamma)
    return gamma


if __name__ == "__main__":
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--p", type=int)
    parser.add_argument("--log")
    own, rest = parser.parse_known_args()
    if own.log:
        rpp.solve_gamma = measured
    for preset in rpp.HYPER.values():
        preset["*"]["pretrain"]["p"] = own.p or preset["*"]["pretrain"]["p"]
    rpp.main(rpp.flags().parse_args(rest))

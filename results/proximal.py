"""What RPP's proximal step is beyond magnitude pruning, measured inside a run.

    python results/proximal.py P LOG [rpp.py's flags]     P: the highest exponent, 1 or 5

LOG gets a line every 20 steps: v; differ, the fraction of Top_v(|a| / alpha) that is not in
Top_v(|a|); lost, the sum of this step's shrinkage over the sum of |a|, both over the survivors.
"""
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import rpp  # noqa: E402

solve_gamma = rpp.solve_gamma
calls = []


def measured(weights, alphas, v, lr):
    gamma = solve_gamma(weights, alphas, v, lr)
    if len(calls) % 20 == 0:
        size = torch.cat([a.detach().abs().flatten() for a in weights])                 # (n,)
        press = lr * gamma * torch.cat([alpha.flatten() for alpha in alphas])           # (n,)
        stays = size > press
        largest = size > rpp.largest_to_go(size, v)
        differ = float((stays & ~largest).sum() / stays.sum())
        lost = float(press[stays].sum() / size[stays].sum())
        with open(sys.argv[2], "a") as log:
            print(f"step {len(calls)}  v {v:.4f}  differ {differ:.5f}  lost {lost:.2e}", file=log)
    calls.append(gamma)
    return gamma


if __name__ == "__main__":
    rpp.solve_gamma = measured
    for preset in rpp.HYPER.values():
        preset["*"]["pretrain"]["p"] = int(sys.argv[1])
    rpp.main(rpp.flags().parse_args(sys.argv[3:]))

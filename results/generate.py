"""The rows of the text generation table: results/generate.tsv, from runs of examples/generate.py.

    python results/generate.py                                     every row that is not there yet
    python results/generate.py magnitude --sparsity 0.1 --seed 0 --out FOLDER              one run
    python results/generate.py l2 --sparsity 0.1 --seed 0 --out FOLDER                     one run

Three methods are not in the example and come from this file. magnitude: magnitude.py's masks take
the place of soft movement's, and the penalty is 0. l2: MGPP without the spike (mix = 1). l2_clip:
the same, with gradients clipped to norm 1 as in the other methods. soft_mvp_local is the example's
--scope local. A finished run (result.json under --runs) is not made again.
"""
import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
TSV = ROOT / "results" / "generate.tsv"
COLUMNS = ["method", "sparsity", "seed", "kept_%", "scores", "seconds", "command"]


def run_l2(flags):
    """Run the example with MGPP, whose prior has no spike."""
    import generate

    args = generate.flags().parse_args(["--method", "mgpp", *flags])
    args.mix = 1.0
    generate.main(args)


def run_l2_clip(flags):
    """Run l2 with an AdamW that clips all gradients together first."""
    step = torch.optim.AdamW.step

    def clip_and_step(optimizer, closure=None):
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        nn.utils.clip_grad_norm_(parameters, 1.0)
        return step(optimizer, closure)

    torch.optim.AdamW.step = clip_and_step
    run_l2(flags)


def run_magnitude(flags):
    """Run the example with magnitude.py's masks."""
    import generate

    import magnitude

    class Masked(magnitude.Masked):
        """magnitude.py's, which remembers its weight; nothing reads or moves the scores."""

        def __init__(self, weight):
            super().__init__(weight)
            self.ranked = [weight]
            self.scores = nn.Parameter(torch.zeros(1))

    def update_masks(masked, _, v, scope):
        sizes = [m.ranked[0].detach().abs() for m in masked]
        magnitude.update_masks(masked, sizes, v, "local")

    generate.Masked = Masked
    generate.update_masks = update_masks
    args = generate.flags().parse_args(["--method", "soft_mvp", *flags])
    args.lambda_f = 0.0
    generate.main(args)


OWN = {"magnitude": run_magnitude, "l2": run_l2, "l2_clip": run_l2_clip}


def row_of(out, method, sparsity, seed, words):
    result = json.loads((out / "result.json").read_text())
    scores = " ".join(f"{name} {value:.1f}" for name, value in result["metrics"].items())
    seconds = result["line"].split(" steps ")[1].split()[0]
    command = " ".join(["python", *words])
    return [method, sparsity, seed, f"{100 * result['kept']:.3f}", scores, seconds, command]


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("method", nargs="?", choices=OWN)
    parser.add_argument("--runs", type=Path, default=Path("out/generate"))
    args, rest = parser.parse_known_args()
    sys.path[:0] = [str(ROOT), str(ROOT / "examples")]
    if args.method:
        OWN[args.method](rest)
        return
    rows = {}
    if TSV.exists():
        lines = [line.split("\t") for line in TSV.read_text().splitlines()[1:]]
        rows = {tuple(line[:3]): line for line in lines}
    wanted = [("dense", "1")]
    wanted += [(method, sparsity) for sparsity in ("0.3", "0.1", "0.03")
               for method in ("magnitude", "mgpp", "l2", "soft_mvp")]
    wanted += [("soft_mvp_local", "0.1"), ("l2_clip", "0.1")]
    for seed in ("0", "1", "2"):                # one seed of everything, then the second
        for method, sparsity in wanted:
            out = (args.runs / f"{method}-{sparsity}-s{seed}").resolve()
            words = ["examples/generate.py", "--method", method.removesuffix("_local")]
            if method == "soft_mvp_local":
                words += ["--scope", "local"]
            if method in OWN:
                words = ["results/generate.py", method]
            words += ["--sparsity", sparsity, "--seed", seed]
            if (method, sparsity, seed) not in rows and not (out / "result.json").exists():
                env = os.environ | {"OMP_NUM_THREADS": "1"}
                command = [sys.executable, *words, "--device", "cpu", "--out", str(out)]
                subprocess.run(command, cwd=ROOT, env=env, check=True)
            if (out / "result.json").exists():
                rows[method, sparsity, seed] = row_of(out, method, sparsity, seed, words)
            lines = ["\t".join(line) for line in [COLUMNS, *rows.values()]]
            TSV.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()

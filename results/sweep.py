"""Two questions about constants, asked of the embedded world: MGPP's spike and RPP's exponent.

    python results/sweep.py spike       mgpp.py: plain L2 (--mix 1), and spikes from 1e-12 to 1e-4
    python results/sweep.py exponent    rpp.py: alpha = 1 / (|w|^p + eps) with p the number of the
                                        round, 5 at most, and with p = 1
Three seeds each; at 10 % the spike only as it is (1e-10) and L2. A run that has ended (result.json
under --runs) or has a row is not made again. results/sweep.tsv has a row for each run.
"""
import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TSV = ROOT / "results" / "sweep.tsv"
COLUMNS = ["question", "variant", "sparsity", "seed", "kept", "EM", "F1", "steps", "seconds",
           "command"]


def runs(question):
    """[(variant, script, flags)]: what to run, the first seed of everything first."""
    for seed in (0, 1, 2):
        if question == "spike":
            for sparsity in (0.1, 0.03):
                flags = ["--sparsity", f"{sparsity}", "--seed", f"{seed}"]
                yield "1e-10", "mgpp.py", flags
                yield "L2", "mgpp.py", [*flags, "--mix", "1"]
            for spike in ("1e-12", "1e-8", "1e-6", "1e-4"):
                flags = ["--sparsity", "0.03", "--seed", f"{seed}"]
                yield spike, "mgpp.py", [*flags, "--spike", spike]
        else:
            for sparsity in (0.1, 0.4):
                flags = ["--sparsity", f"{sparsity}", "--seed", f"{seed}"]
                flags += ["--pretrain_steps", "2000"]
                yield "p=1", "rpp_with_p_1", flags
                yield "p=round", "rpp.py", flags


def rpp_with_p_1(flags):
    """Run rpp.py with the exponent 1 in every round."""
    sys.path.insert(0, str(ROOT))
    import rpp

    rpp.MINI["pretrain"]["p"] = 1
    rpp.main(rpp.flags().parse_args(flags))


def read():
    return [line.split("\t") for line in TSV.read_text().splitlines()[1:]]


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("question", choices=["spike", "exponent", "rpp_with_p_1"])
    parser.add_argument("--runs", default="out/sweep")
    args, rest = parser.parse_known_args()
    if args.question == "rpp_with_p_1":
        rpp_with_p_1(rest)
        return
    for variant, script, flags in runs(args.question):
        sparsity, seed = flags[1], flags[3]
        out = Path(args.runs) / f"{script[:-3]}-{variant}-{sparsity}-s{seed}"
        words = [script, *flags]
        if script == "rpp_with_p_1":
            out = Path(args.runs) / f"rpp-p=1-{sparsity}-s{seed}"
            words = ["results/sweep.py", script, *flags]
        common_flags = ["--task", "squad", "--preset", "mini", "--device", "cpu"]
        if not (out / "result.json").exists():
            if [args.question, variant, sparsity, seed] in [row[:4] for row in read()]:
                continue
            command = [sys.executable, *words, *common_flags, "--out", str(out.resolve())]
            env = os.environ | {"OMP_NUM_THREADS": "1"}
            subprocess.run(command, cwd=ROOT, env=env, check=True)
        result = json.loads((out / "result.json").read_text())
        metrics = result["metrics"]
        row = [args.question, variant, sparsity, seed, f"{result['kept']:.5f}",
               f"{metrics['EM']:.2f}", f"{metrics['F1']:.2f}", str(result["args"]["steps"]),
               f"{result['seconds']:.0f}", " ".join(["python", *words, *common_flags])]
        rows = sorted([old for old in read() if old[:4] != row[:4]] + [row])
        lines = ["\t".join(line) for line in [COLUMNS, *rows]]
        TSV.write_text("\n".join(lines) + "\n")
        print(*row[:7])


if __name__ == "__main__":
    main()

"""Magnitude pruning to another run's mask: does it matter which weights stay, or their training?

    python results/why/lent.py RUN [magnitude.py's flags]

RUN is the folder of a finished run with the same --sparsity. |W| decides as in magnitude.py,
but the weights that RUN kept all rank before the others. So the others go first, the smallest
of them first, and in the end exactly RUN's weights stay. Give --scope global if RUN ranked all
its matrices together. Appends a row to results/why/lent.tsv.
"""
import json
import sys
from pathlib import Path

from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))
import magnitude  # noqa: E402

own_magnitudes = magnitude.magnitudes


def main(run, flags):
    kept = load_file(Path(run) / "model.safetensors")
    lender = json.loads((Path(run) / "result.json").read_text())

    def magnitudes(layers):
        sizes = own_magnitudes(layers)
        return [size + 1e6 * (kept[f"{name}.weight"] != 0) for name, size in zip(layers, sizes)]

    magnitude.magnitudes = magnitudes
    args = magnitude.flags().parse_args(flags)
    magnitude.main(args)
    out = Path(args.out)
    result = json.loads((out / "result.json").read_text())
    saved = load_file(out / "model.safetensors")
    for name in lender["kept_per_layer"]:
        stray = (saved[f"{name}.weight"] != 0) & (kept[f"{name}.weight"] == 0)
        if stray.any():
            raise SystemExit(f"{name} keeps weights that {run} does not: is --scope the same?")
    score = lender["metrics"]["F1"]
    row = [lender["method"], f"{lender['args']['lr']:g}", f"{score:.2f}", args.task,
           f"{100 * result['kept']:.3f}", args.seed, f"{result['args']['lr']:g}",
           f"{result['metrics']['F1']:.2f}", " ".join(["python results/why/lent.py", run, *flags])]
    with open(Path(__file__).with_suffix(".tsv"), "a") as file:
        print(*row, sep="\t", file=file)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])

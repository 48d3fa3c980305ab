"""How slowly must hard movement cut? A map over depth and steps, and the methods' order within it.

    python results/why/speed.py --model MODEL --data DATA          makes the runs that have no row
    python results/why/speed.py --only mvp:3:4000:0.1:0 --model MODEL --data DATA      one of them
    python results/why/speed.py --only map --model MODEL --data DATA                   one list

SST-2, batches of 16, lr 3e-5, the scripts' own paper preset for all else. A run is named
SCRIPT:LAYERS:STEPS:KEPT:SEED; its model is the first LAYERS layers of MODEL. A run that was killed
goes on from its last checkpoint under --runs. One thread. Each gets a row in results/why/speed.tsv:
the mean training loss while so much is kept (chance: 0.69; the fraction is that of magnitude.py's
cubic), over the last fifth of the steps, and the accuracy.
"""
import argparse
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
TSV = Path(__file__).with_suffix(".tsv")
# mvp.py at 10 %: (layers, steps)
MAP = [(3, 1000), (3, 4000), (1, 1000), (2, 1000), (1, 4000), (2, 4000), (3, 2000), (3, 10000),
       (6, 4000), (6, 10000), (6, 20000)]
LISTS = {
    "map": [f"mvp:{layers}:{steps}:0.1:0" for layers, steps in MAP],
    "order": [f"{script}:3:10000:{v}:{seed}"
              for seed in (0, 1, 2) for v in (0.1, 0.03)
              for script in ("mvp", "magnitude", "soft_mvp", "l0", "mgpp")],
    "dense": [f"magnitude:3:10000:1:{seed}" for seed in (0, 1, 2)],
}
WINDOWS = {98: (0.99, 0.965), 92: (0.94, 0.90), 85: (0.87, 0.83), 70: (0.73, 0.67),
           60: (0.63, 0.57), 45: (0.48, 0.42), 25: (0.27, 0.23), 13: (0.14, 0.12)}
HEADER = ["script", "layers", "steps", "kept", "seed", *(f"loss_{k}" for k in WINDOWS), "loss_end",
          "acc", "seconds", "versions", "command"]


def first_layers(model, layers, folder):
    """Save the first layers of the BERT in the folder model."""
    from transformers import AutoModel, AutoTokenizer

    bert = AutoModel.from_pretrained(model)
    bert.encoder.layer = bert.encoder.layer[:layers]
    bert.config.num_hidden_layers = layers
    bert.save_pretrained(folder)
    AutoTokenizer.from_pretrained(model).save_pretrained(folder)


def run_script(script, losses, words):
    """Run the script here, and append "step loss" to the file losses at each step."""
    sys.path.insert(0, str(ROOT))
    module = importlib.import_module(script)
    lr_factor, task_loss = module.lr_factor, module.task_loss
    steps = []

    def seen_lr_factor(step, *rest):
        steps.append(step)
        return lr_factor(step, *rest)

    def seen_task_loss(*inputs):
        loss = task_loss(*inputs)
        with open(losses, "a") as file:
            print(steps[-1], loss.item(), file=file)
        return loss

    module.lr_factor, module.task_loss = seen_lr_factor, seen_task_loss
    module.main(module.flags().parse_args(words))


def kept_at(step, steps, v_f, t_i=0.05, t_f=0.3):
    """The cubic, with the paper preset's fractions for tasks other than the paper's three."""
    done = min(max((step / steps - t_i) / (1 - t_i - t_f), 0), 1)
    return v_f + (1 - v_f) * (1 - done) ** 3


def row_of(name, out, losses, words):
    script, layers, steps, v, seed = name.split(":")
    result = json.loads((out / "result.json").read_text())
    loss_of = {}                                        # a resumed run made some steps twice
    for line in losses.read_text().splitlines():
        step, loss = line.split()
        loss_of[int(step)] = float(loss)
    means = []
    for high, low in WINDOWS.values():
        chosen = [loss for step, loss in loss_of.items()
                  if low <= kept_at(step, int(steps), float(v)) <= high]
        means.append(f"{sum(chosen) / len(chosen):.3f}" if chosen else "")
    last = [loss for step, loss in loss_of.items() if step >= 0.8 * int(steps)]
    versions = " ".join(result["versions"].values())
    return [script, layers, steps, v, seed, *means, f"{sum(last) / len(last):.3f}",
            f"{result['metrics']['acc']:.2f}", f"{result['seconds']:.0f}", versions,
            f"python {script}.py {' '.join(words)}"]


def read():
    lines = TSV.read_text().splitlines()[1:] if TSV.exists() else []
    return {":".join(line.split("\t")[:5]): line.split("\t") for line in lines}


def make(name, args):
    script, layers, steps, v, seed = name.split(":")
    model = Path(args.runs) / f"layers-{layers}"
    if not (model / "config.json").exists():
        first_layers(args.model, int(layers), model)
    out = Path(args.runs) / name.replace(":", "-")
    losses = Path(f"{out}.losses")
    words = f"--task sst2 --sparsity {v} --seed {seed} --preset paper --device cpu"
    words = f"{words} --steps {steps} --batch_size 16 --lr 3e-5".split()
    if not (out / "result.json").exists():
        own = ["--model", str(model), "--data", args.data, "--out", str(out)]
        if (out / "log.jsonl").exists():
            own.append("--resume")
        else:
            losses.unlink(missing_ok=True)
        command = [sys.executable, __file__, "--inside", script, str(losses), *words, *own]
        subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    rows = read()
    rows[name] = row_of(name, out, losses, words + f"--model LAYERS{layers} --data DATA".split())
    lines = ["\t".join(row) for row in [HEADER, *rows.values()]]
    TSV.write_text("\n".join(lines) + "\n")
    print(*rows[name][:-2], flush=True)


def main():
    if sys.argv[1:2] == ["--inside"]:
        run_script(sys.argv[2], sys.argv[3], sys.argv[4:])
        return
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--only", nargs="*", default=["map", "dense", "order"])
    parser.add_argument("--runs", default=str(ROOT / "out" / "speed"))
    args = parser.parse_args()
    for wish in args.only:
        for name in LISTS.get(wish, [wish]):
            if name not in read():
                make(name, args)


if __name__ == "__main__":
    main()

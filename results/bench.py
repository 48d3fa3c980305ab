"""What a step of each method costs beside a dense step.

    python results/bench.py mini --pairs 5     mini's BERT, batches of 32
    python results/bench.py base --pairs 3     BERT-base's shape, random weights: 8 x 384 tokens on
                                               a CPU, 16 x 384 with --device cuda

Each pair is two runs of the scripts themselves, dense (magnitude.py --sparsity 1) and then the
method, one after the other, because a machine's speed drifts. Printed are the milliseconds of a
step as the run's result.json has them, the first step included; a method's ratio to the dense run
beside it (median and quartiles over the pairs); and the peak of memory: of the whole run on a CPU,
of torch's allocator on a GPU. rpp: fine-tuning on a support. base multiplies in bf16 where the
hardware does, as under the paper preset.
"""
import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from transformers import AutoTokenizer, BertConfig, BertForPreTraining

ROOT = Path(__file__).resolve().parent.parent
METHODS = ["magnitude", "mvp", "soft_mvp", "l0", "mgpp", "rpp"]

def make_base(folder):
    """BERT-base's shape with random weights, and a SQuAD whose windows have 384 tokens."""
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "mini" / "bert")
    config = BertConfig(vocab_size=len(tokenizer), max_position_embeddings=384)
    BertForPreTraining(config).save_pretrained(folder / "bert")
    tokenizer.save_pretrained(folder / "bert")
    (folder / "squad").mkdir()
    answers = [{"text": "a drum", "answer_start": 9}]
    for name, n_words in (("train", 4000), ("dev", 400)):
        context = "he stole a drum " * (n_words // 4)
        qas = [{"id": name, "question": "what ?", "answers": answers}]
        data = {"data": [{"paragraphs": [{"context": context, "qas": qas}]}]}
        (folder / "squad" / f"{name}-v1.1.json").write_text(json.dumps(data))


def run(words):
    """(milliseconds a step, gigabytes at the peak) of one run."""
    with tempfile.TemporaryDirectory() as out:
        process = subprocess.Popen(
            [sys.executable, *words, "--out", f"{out}/run"],
            cwd=ROOT, stdout=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        if status:
            raise SystemExit(f"{' '.join(words)} ended with status {status}")
        result = json.loads(Path(out, "run", "result.json").read_text())
    peak = result.get("peak_memory") or 1000 * usage.ru_maxrss
    return result["ms_per_step"], peak / 1e9


def measure(args, folder):
    """Print the table; folder is for the model, the data and the support."""
    on_gpu = args.device.startswith("cuda")
    flags = ["--device", args.device, "--preset", "mini", "--steps", "60"]
    if args.shape == "base":
        make_base(folder)
        steps, batch = ("100", "16") if on_gpu else ("5", "8")
        flags = ["--device", args.device, "--preset", "paper", "--task", "squad",
                 "--data", str(folder), "--model", str(folder / "bert"),
                 "--steps", steps, "--batch_size", batch]
    support = str(folder / "support")
    if "rpp" in args.only:
        corpus = str(ROOT / "mini" / "corpus.txt")
        words = ["rpp.py", *flags, "--sparsity", "0.1", "--pretrain_steps", "2",
                 "--batch_size", "8", "--corpus", corpus, "--out", support]
        subprocess.run([sys.executable, *words], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    print("| method | ms a step (dense's) | x dense: median (quartiles) | memory, GB (dense's) |")
    print("|---|---|---|---|")
    for method in args.only:
        pairs = []
        for _ in range(args.pairs):
            dense = run(["magnitude.py", *flags, "--sparsity", "1"])
            words = [f"{method}.py", *flags, "--sparsity", "0.1"]
            if method == "rpp":
                words += ["--support", support]
            pairs.append((*run(words), *dense))
        ms, memory, dense_ms, dense_memory = np.median(pairs, axis=0)
        ratios = [pair[0] / pair[2] for pair in pairs]
        low, middle, high = np.quantile(ratios, [0.25, 0.5, 0.75])
        print(f"| {method} | {ms:.0f} ({dense_ms:.0f}) | {middle:.2f} ({low:.2f} to {high:.2f}) | "
              f"{memory:.2f} ({dense_memory:.2f}) |", flush=True)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=["mini", "base"])
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--only", nargs="*", default=METHODS)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        measure(args, Path(folder))


if __name__ == "__main__":
    main()

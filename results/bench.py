"""What a step of each method costs beside a dense step, measured; and the papers' runs, computed.

    python results/bench.py mini --pairs 5     mini's BERT, batches of 32
    python results/bench.py base --pairs 3     BERT-base's shape, random weights: 8 x 384 tokens on
                                               a CPU, 16 x 384 with --device cuda
    python results/bench.py papers             one H100 and the papers' runs, on paper

mini and base: each pair is two runs of the scripts themselves, dense (magnitude.py --sparsity 1)
and then the method, one after the other, because a machine's speed drifts. Printed are the
milliseconds of a step as the run's result.json has them, the first step included; a method's ratio
to the dense run beside it (median and quartiles over the pairs); and the peak of memory: of the
whole run on a CPU, of torch's allocator on a GPU. rpp: fine-tuning on a support. base multiplies in
bf16 where the hardware does, as under the paper preset.

papers: nothing is run. A step's multiplications are 6 for each weight and token (2 forward, 4
backward) and 12 x layers x width for each token and token that it attends to. A method's masks cost
passes over the prunable weights in fp32, counted below from the formulas. ASSUMED: the card's peak,
and how much of it a run gets.
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

# ---- computed

WEIGHTS = 84_934_656                    # prunable, BERT-base: 12 layers of 12 x 768^2
VOCABULARY = 30_522
FLOPS = 989e12 * 0.2                    # H100 SXM: dense bf16, of which a run gets a fifth
BYTES = 3.35e12 * 0.8                   # a second, of which a pass gets four fifths
# task: examples, epochs (mgpp's), batch, tokens
TASKS = {
    "SQuAD": (88_000, 10, 10, 16, 384),
    "MNLI": (392_702, 6, 8, 32, 128),
    "QQP": (363_846, 10, 10, 32, 128),
}
# passes over all prunable weights that a step adds to a dense one, as fp32 reads and writes:
# k-th largest 5 (|x|, then four reads of a radix selection), comparison and store 3, W * M 3,
# its gradient 3, a gradient of scores 3, AdamW on the scores 7, clipping them 3
MASK = 5 + 3 + 3 + 3
SCORES = 3 + 7 + 3
PASSES = {
    "magnitude": MASK,
    "mvp": MASK + SCORES,
    "soft_mvp": MASK + SCORES + 6,      # the penalty, forward and backward
    "l0": 20 + 3 + 18 + SCORES + 6 + 2,     # noise to gate; W * z; backward; scores; penalty; count
    "mgpp": 14,                         # the prior's gradient; zeroings are rare
    "rpp": 3,                           # the gradient times the support
}


def flops_per_step(batch, tokens, head=0):
    """Forward and backward; head: weights of a layer on top that sees every token."""
    width, layers = 768, 12
    return batch * tokens * (6 * (WEIGHTS + head) + 12 * layers * width * tokens)


def papers():
    """Two tables: the papers' runs, and what the masks add to them."""
    def row(*cells):
        return f"| {' | '.join(cells)} |"

    lines = [row("run", "steps", "TFLOP a step", "ms a step, dense", "hours, dense"),
             row(*["---"] * 5)]
    dense = {}
    for task, (examples, epochs, mgpp_epochs, batch, tokens) in TASKS.items():
        flops = flops_per_step(batch, tokens)
        dense[task] = flops / FLOPS
        for n in dict.fromkeys([epochs, mgpp_epochs]):
            steps = examples * n // batch
            lines.append(row(f"{task}, {n} epochs of {batch} x {tokens}", f"{steps:,}",
                             f"{flops / 1e12:.2f}", f"{1000 * dense[task]:.1f}",
                             f"{steps * dense[task] / 3600:.2f}"))
    head = 768 * (VOCABULARY + 768)                     # the transform and the words
    flops = flops_per_step(256, 128, head)
    seconds = flops / FLOPS + 12 * 4 * WEIGHTS / BYTES  # solve_gamma and prox: 12 passes
    lines.append(row("RPP's pre-training, 256 x 128", "20,000", f"{flops / 1e12:.2f}",
                     f"{1000 * seconds:.1f}", f"{20000 * seconds / 3600:.2f}"))
    lines += ["", row("method", "passes a step", "GB a step", "added ms a step",
                      *(f"{task}, hours" for task in TASKS)), row(*["---"] * (4 + len(TASKS)))]
    for method, passes in PASSES.items():
        moved = passes * 4 * WEIGHTS
        hours = []
        for task, (examples, epochs, mgpp_epochs, batch, _) in TASKS.items():
            steps = examples * (mgpp_epochs if method == "mgpp" else epochs) // batch
            hours.append(f"{steps * (dense[task] + moved / BYTES) / 3600:.2f}")
        lines.append(row(method, f"{passes}", f"{moved / 1e9:.1f}", f"{1000 * moved / BYTES:.1f}",
                         *hours))
    return "\n".join(lines)


# ---- measured

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
    parser.add_argument("shape", choices=["mini", "base", "papers"])
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--only", nargs="*", default=METHODS)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    if args.shape == "papers":
        print(papers())
        return
    with tempfile.TemporaryDirectory() as folder:
        measure(args, Path(folder))


if __name__ == "__main__":
    main()

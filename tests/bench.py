"""What a step of each method costs, beside a step of dense fine-tuning.

Run      python tests/bench.py                              both shapes
         python tests/bench.py --shapes mini --only l0,mvp  less of it
Shapes   mini: the embedded BERT, 4 layers x 128, 32 of its own questions a step.
         base: BERT-base's, 12 layers x 768, random weights; 16 x 384 tokens in bf16 on CUDA, 2 x 384 in fp32 on a CPU.
Time     The main() of the method's script and that of a dense run (mgpp.py --sparsity 1: it does nothing but fine-tune) take turns, a
         step each, in two threads of one process, so that both see the same machine at the same time. A ratio is a step over the
         dense step before it. All start at 100 % kept and end at 10: the masks are those of a whole schedule.
         rpp is rpp.py's fine-tuning on a support; rpp pre-training its other phase, beside the same pre-training without pruning
         (pairs of 96 tokens in both shapes).
         full sort is the yardstick: magnitude.py with a full sort of each matrix, as in the official code of movement pruning (which
         does that once for each forward pass, we once for each step).
GB/s     Below the tables: what the machine moves when it multiplies two vectors as long as BERT-base has prunable weights, into memory at
         hand and into new. Masks, scores and their Adam are passes of this kind, 0.34 GB each.
Memory   The peak of a process that runs the method alone: resident on a CPU, torch's allocator on CUDA. Evaluation: ms a question, there,
         after the bake: the same plain BERT in every row.
"""
import argparse, importlib, json, os, resource, subprocess, sys, tempfile, threading, time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import common

ROWS = ["dense", "magnitude", "mvp", "soft_mvp", "l0", "mgpp", "rpp", "rpp pre-training", "full sort"]
SHAPES = {"mini": dict(batch_size=32, length=128, steps=103), "base": dict(batch_size=16, length=384, steps=23)}
IGNORED = 3                             # first steps: memory is laid out, caches are cold


# ---- in a process of its own: one script alone, or two in turn

class Baton:
    """Held by one thread at a time; passed on after each step."""
    def __init__(self, rows):
        self.rows, self.at, self.moved = list(rows), 0, threading.Condition()

    def wait(self, row):
        with self.moved:
            self.moved.wait_for(lambda: self.rows[self.at] == row)

    def pass_on(self):
        with self.moved:
            self.at = (self.at + 1) % len(self.rows)
            self.moved.notify_all()

    def drop(self, row):
        with self.moved:
            self.rows.remove(row)
            self.at = 0
            self.moved.notify_all()


class Timed(common.Run):
    """A run that prints and writes nothing, and takes the time of its steps in turn with the others."""
    baton, seconds_of = None, {}        # {row: [seconds of each step]}

    def say(self, text):
        pass

    def log(self, *rest):
        pass

    def restore(self, phase="fine-tuning", **parts):
        self.row = threading.current_thread().row
        self.timed = (phase == "pre-training") == ("pre-training" in self.row)
        super().restore(phase=phase, **parts)
        self.from_now()
        return 0

    def from_now(self):
        torch.cuda.synchronize() if self.device.type == "cuda" else None
        self.clock = time.perf_counter()

    def checkpoint(self, step, **parts):
        """The end of a step."""
        before = self.clock
        self.from_now()
        if self.timed:
            self.seconds_of.setdefault(self.row, []).append(self.clock - before)
            self.baton.pass_on()
            self.baton.wait(self.row)
            self.from_now()


def evaluation(run, task, model, goal):
    """In the report's place: ms a question."""
    begun = time.perf_counter()
    task.evaluate(model)
    Timed.seconds_of["evaluation"] = [(time.perf_counter() - begun) / task.n_dev]


def train(row, spec):
    """All steps of a row's script."""
    thread, folder = threading.current_thread(), spec["folder"]
    thread.row = row
    module = importlib.import_module({"dense": "mgpp", "dense pre-training": "rpp", "full sort": "magnitude"}.get(row, row.split()[0]))
    flags = ["--preset", "mini", "--sparsity", "1" if row == "dense" else "0.1", "--device", spec["device"], "--steps", str(spec["steps"]),
             "--batch_size", str(spec["batch_size"]), "--model", f"{folder}/bert", "--data", f"{folder}/data", "--out", f"{folder}/out/{time.time()}"]
    args = module.flags().parse_args(flags + ["--support", f"{folder}/pruned"] * (row == "rpp"))
    module.HYPER["mini"]["*"].update(length=spec["length"])
    Timed.baton.wait(row)
    try:
        dense_pretraining(module, args) if row == "dense pre-training" else module.main(args)
    finally:
        Timed.baton.drop(row)


def dense_pretraining(rpp, args):
    """The pre-training of rpp.pretrain, with nothing pruned."""
    run = Timed(rpp.__file__, args, rpp.HYPER)
    text = common.Corpus(run, None, common.load_config(args.model)[1], args.batch_size, args.pretrain["length"])
    model, _ = common.load_pretraining(run, args.model)
    net, optimizer = common.PreTraining(model), torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.0, fused=True)
    run.restore(phase="pre-training", steps=args.steps)
    for step in range(args.steps):
        run.seed_step(step)
        with run.autocast():
            loss = net(**text.batch(step))[0]
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip)
        optimizer.step()
        run.checkpoint(step + 1)


def child(spec):
    """Print {row: seconds of each step, "evaluation": [seconds a question], "bytes": peak memory}."""
    common.Run, Timed.baton = Timed, Baton(spec["rows"])
    common.report = evaluation if len(spec["rows"]) == 1 else lambda *rest: 0
    if "full sort" in spec["rows"]:
        importlib.import_module("magnitude").kth_largest = lambda x, k: x.sort(descending=True).values[k - 1]
    with ThreadPoolExecutor(len(spec["rows"])) as pool:
        for future in [pool.submit(train, row, spec) for row in spec["rows"]]:
            future.result()
    peak = torch.cuda.max_memory_allocated() if spec["device"] == "cuda" else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps(Timed.seconds_of | {"bytes": peak}))


# ---- the table

def lay_out(shape, spec):
    """Model, data and a pruned model of this shape in spec["folder"]."""
    from transformers import BertConfig, BertForPreTraining
    folder, mini = Path(spec["folder"]), ROOT / "mini"
    _, tokenizer = common.load_config(str(mini / "bert"))
    model = BertForPreTraining.from_pretrained(mini / "bert") if shape == "mini" else BertForPreTraining(BertConfig())
    model.save_pretrained(folder / "bert")
    for layer in common.prunable(model).values():
        w = layer.weight.data
        w[w.abs() < w.abs().flatten()[::7].quantile(0.9)] = 0.0
    model.save_pretrained(folder / "pruned")
    for name in ("bert", "pruned"):
        tokenizer.save_pretrained(folder / name)
    (folder / "data").mkdir()
    if shape == "mini":
        for name in ("squad", "corpus.txt"):
            (folder / "data" / name).symlink_to(mini / name)
        return
    # one question a context, each as long as a window is
    (folder / "data" / "squad").mkdir()
    for part, n in (("train", 20 * spec["batch_size"]), ("dev", 8)):
        text = " ".join(["she was born in helton ."] * (spec["length"] // 6 - 1))
        rows = [{"context": text, "qas": [{"id": str(i), "question": "who ?", "answers": [{"text": "helton", "answer_start": 16}]}]} for i in range(n)]
        (folder / "data" / "squad" / f"{part}-v1.1.json").write_text(json.dumps({"data": [{"title": "", "paragraphs": rows}]}))
    (folder / "data" / "corpus.txt").write_text("\n\n".join("\n".join(["she was born in helton and lived there ."] * 40) for _ in range(40)))


def measure(spec, rows):
    code = f"import sys; sys.path.insert(0, {str(ROOT / 'tests')!r}); import bench; bench.child({spec | {'rows': rows}!r})"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=os.environ | {"HF_HUB_OFFLINE": "1"}, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr[-3000:])
    return json.loads(done.stdout.splitlines()[-1])


def table(shape, args):
    """Print the rows of a shape as they are measured."""
    with tempfile.TemporaryDirectory() as folder:
        spec = SHAPES[shape] | {"folder": folder, "device": args.device}
        if shape == "base" and args.device == "cpu":
            spec.update(batch_size=2, steps=9)
        spec.update(steps=args.steps or spec["steps"])
        lay_out(shape, spec)
        print(f"\n| {shape}, {args.device} | ms a step (dense's, in turn) | x dense: median (quartiles) | mean | memory, GB | x dense | evaluation, ms a question |\n|---|---|---|---|---|---|---|")
        memory = {}
        for row in [r for r in ROWS if r == "dense" or r in args.only.split(",")]:
            base = "dense pre-training" if row == "rpp pre-training" else "dense"
            alone = measure(spec | {"steps": IGNORED + 2}, [row])
            memory[row] = alone["bytes"] / 1e9
            if row == "rpp pre-training":
                memory[base] = measure(spec | {"steps": IGNORED + 2}, [base])["bytes"] / 1e9
            ms, beside, cell = alone[row][IGNORED:], "", "|"
            if row != "dense":
                pair = measure(spec, [base, row])
                ms, ratios = pair[row][IGNORED:], np.divide(pair[row], pair[base])[IGNORED:]
                beside = f" ({1000 * np.median(pair[base][IGNORED:]):.0f})"
                low, middle, high = np.quantile(ratios, [0.25, 0.5, 0.75])
                cell = f"{middle:.2f} ({low:.2f} to {high:.2f}) | {np.sum(pair[row][IGNORED:]) / np.sum(pair[base][IGNORED:]):.2f}"
            print(f"| {row} | {1000 * np.median(ms):.0f}{beside} | {cell} | {memory[row]:.2f} | {memory[row] / memory[base]:.2f} | {1000 * alone['evaluation'][0]:.1f} |", flush=True)


def bandwidth(device, new):
    """GB/s of c = a * b, fp32, n as in BERT-base: two vectors are read and one is written, new or there before. The median of ten."""
    a, b, c = (torch.ones(84_934_656, device=device) for _ in range(3))
    seconds = []
    for _ in range(11):
        begun = time.perf_counter()
        torch.mul(a, b, out=None if new else c)
        torch.cuda.synchronize() if c.is_cuda else None
        seconds.append(time.perf_counter() - begun)
    return 3 * 4 * c.numel() / 1e9 / np.median(seconds[1:])


def flags():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--shapes", default="mini,base")
    p.add_argument("--only", default=",".join(ROWS), help="rows, separated by commas")
    p.add_argument("--steps", type=int, help="of each run")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return p


def main():
    p = flags()
    args = p.parse_args()
    unknown = set(args.only.split(",")) - set(ROWS)
    if unknown:
        p.error(f"there is no row {', '.join(sorted(unknown))}: give some of {', '.join(ROWS)}")
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {torch.cuda.get_device_name() if args.device == 'cuda' else 'CPU'}")
    for shape in args.shapes.split(","):
        table(shape, args)
    # last: on Linux a child's peak of memory starts at its parent's size
    print(f"\n{bandwidth(args.device, new=False):.0f} GB/s, {bandwidth(args.device, new=True):.0f} into new memory")


if __name__ == "__main__":
    main()

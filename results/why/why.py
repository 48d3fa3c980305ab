"""Why hard movement pruning falls to chance, and what soft movement's penalty does.

One call is one run of mvp.py or soft_mvp.py, with a few of its names replaced from outside. It
measures at chosen shares kept, and appends its rows to results/why/why.tsv, whose last column is
the command. The findings stand in results/why/README.md.

Run   python results/why/why.py --name squad:plain mvp --task squad --sparsity 0.1 --seed 1
      The script's own command line follows its name. Before it:
      --name E:V      experiment and variant, as the rows will call them
      --order X       rank by X, not by the scores: random (fixed), size (the sum of squares of
                      dL/dW' * W), weight (|W|)
      --penalty L     add soft movement's penalty, ramped to L, to the gradient of the scores
      --eps E         Adam's eps for the scores; 1000 with --score_lr 10 is SGD with momentum
      --every K       find the masks at every K-th step only
      --official      keep int(v n); learn nothing at the first step
      --hyper JSON    replace the script's constants: '{"t_i": 0.1}'
      --stop V        end the run once at most V is kept
      --probe STEP    train densely until STEP, then learn nothing more: remove weights in five
                      orders, and measure the loss of the same 40 batches without dropout
      --part X        with --probe: take only the fraction X of each weight away

Columns: step, kept · loss: mean of the last ten cross-entropies · back: share of the kept weights
that were once masked, % · norm: of dL/dS without penalty · speed: mean change of a score in this
step / its learning rate · size, move: Spearman's correlation of S with the sum of squares
of dL/dW' * W, and with minus its sum (the movement), in 5,000 weights of each matrix,
mean over matrices · steady: |sum of dL/dW' * W| / sum of |dL/dW' * W|, median over these weights;
1: always the same sign, 0: the signs cancel.
"""
import argparse
import csv
import importlib
import json
import re
import shlex
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))
COLUMNS = ["experiment", "variant", "task", "seed", "steps", "step", "kept", "loss", "back",
           "norm", "speed", "size", "move", "steady", "metrics", "command"]
SHARES = [0.9999, 0.99, 0.95, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.15, 0.101, 0.07, 0.05,
          0.031]
ORDERS = ["movement", "back to front", "random", "size", "weight"]
PROBED = [("movement", 1.0)]
PROBED += [(order, v) for order in ORDERS for v in (0.999, 0.99, 0.95, 0.9, 0.8, 0.6)]
BATCHES = 40


class Stop(Exception):
    """The run has shown what it was made for."""


def spearman(xs, ys):
    """Rank correlation within each matrix, mean over matrices."""
    total = 0
    for pair in zip(xs, ys):
        ranks = torch.stack(pair).argsort().argsort().double()
        total += torch.corrcoef(ranks)[0, 1]
    return float(total / len(xs))


class Watch:
    """Takes the place of a script's update_masks: sees masks, scores and their gradients."""

    def __init__(self, module, options, args):
        self.options = options
        self.args = args
        self.original = module.update_masks
        self.own = 0.0                                              # the script's own lambda_f
        self.step = 0
        self.scores = []
        self.losses = []
        self.rows = []
        self.shares = SHARES
        self.batches = {}                                           # those of --probe

    def begin(self, scores):
        generator = torch.Generator().manual_seed(0)
        self.scores = scores
        self.sums = [torch.zeros_like(s) for s in scores]           # of dL/dW' * W
        self.squares = [torch.zeros_like(s) for s in scores]        # of (dL/dW' * W)^2
        self.sizes = [torch.zeros_like(s) for s in scores]          # of |dL/dW' * W|
        self.random = [torch.rand(s.shape, generator=generator) for s in scores]
        self.out = [torch.zeros_like(s, dtype=torch.bool) for s in scores]      # once masked
        self.norms = [0.0] * len(scores)
        self.picks = [torch.randperm(s.numel(), generator=generator)[:5000] for s in scores]
        self.before = self.sample(scores)
        for i, s in enumerate(scores):
            s.register_hook(lambda g, i=i: self.gradient(i, g))

    def sample(self, tensors):
        """(matrices, 5000): the same weights of each matrix every time."""
        return torch.stack([x.detach().flatten()[p] for x, p in zip(tensors, self.picks)])

    def gradient(self, i, g):
        """g: what the script computes, its own penalty included. Adds --penalty."""
        s = self.scores[i].detach()
        push = self.ramp * torch.sigmoid(s) * torch.sigmoid(-s) / (s.numel() * len(self.scores))
        loss_part = g - self.own * push
        self.sums[i] += loss_part
        self.squares[i] += loss_part ** 2
        self.sizes[i] += loss_part.abs()
        self.norms[i] = float(loss_part.norm())
        return g + self.options.penalty * push

    def ranking(self, order):
        if order == "random":
            return self.random
        if order == "size":
            return self.squares
        if order == "back to front":
            return [-s for s in self.scores]
        if order == "weight":
            return [m.seen.detach().abs() for m in self.masked]
        return self.scores

    def update_masks(self, masked, scores, v, *scope, **named):
        self.masked = masked
        if not self.scores:
            self.begin(scores)
        options = self.options
        if options.probe and self.step >= options.probe:
            self.probe(masked, *scope, **named)
            self.step += 1
            return
        if options.probe:
            v = 1
        self.ramp = (1 - v) / (1 - self.args.sparsity)
        if self.step % options.every == 0 or self.step == self.args.steps:
            self.original(masked, self.ranking(options.order), v, *scope, **named)
        self.measure([m.mask.bool() for m in masked], v)
        self.step += 1

    def probe(self, masked, *scope, **named):
        case, batch = divmod(self.step - self.options.probe, BATCHES)
        if case and batch == 0:
            order, v = PROBED[case - 1]
            self.row(v, loss=sum(self.losses[-BATCHES:]) / BATCHES)
            self.rows[-1]["variant"] = order
        if case == len(PROBED):
            raise Stop
        order, v = PROBED[case]
        self.original(masked, self.ranking(order), v, *scope, **named)
        for m in masked:
            m.mask.copy_(1 - self.options.part * (1 - m.mask))

    def measure(self, masks, v):
        now = self.sample(self.scores)
        change = (now - self.before).abs().mean()
        self.before = now
        for out, mask in zip(self.out, masks):
            out |= ~mask
        passed = v <= self.shares[0] and self.step % 10 == 0 and self.step > 0
        if passed or self.step == self.args.steps:
            self.shares = [share for share in SHARES if share < v] + [-1]
            kept = sum(int(mask.sum()) for mask in masks)
            back = sum(int((mask & out).sum()) for mask, out in zip(masks, self.out))
            rate = self.optimizer.param_groups[-1]["lr"]
            steady = self.sample(self.sums).abs() / self.sample(self.sizes)
            self.row(v, loss=sum(self.losses[-10:]) / 10, back=100 * back / kept,
                     norm=sum(n * n for n in self.norms) ** 0.5, speed=change / rate,
                     size=spearman(now, self.sample(self.squares)),
                     move=spearman(now, -self.sample(self.sums)),
                     steady=steady.nanmedian())
        if v <= self.options.stop:
            raise Stop

    def row(self, v, **measured):
        row = {"step": self.step, "kept": f"{v:.4f}"}
        for name, x in measured.items():
            row[name] = f"{x:.4g}"
        self.rows.append(row)
        print(row, flush=True)


def patch(module, watch):
    """Puts watch in place of the module's names and of torch's AdamW and cross-entropy."""
    options = watch.options
    for rows in module.HYPER.values():
        for row in rows.values():
            row.update(options.hyper)
    if hasattr(module, "sigmoid_penalty"):
        watch.own = module.HYPER["mini"]["*"]["lambda_f"]           # the same in all presets
    top_v = module.top_v
    task_loss = module.task_loss
    forward = module.Masked.forward
    cross_entropy = torch.nn.functional.cross_entropy

    def int_top_v(scores, v):
        return top_v(scores, int(v * scores.numel()) / scores.numel())

    def repeated_task_loss(net, batch, teacher):
        place = watch.step - 1 - options.probe                      # update_masks has counted on
        if options.probe and place >= 0:
            net.eval()
            batch = watch.batches.setdefault(place % BATCHES, batch)
        return task_loss(net, batch, teacher)

    def seen_forward(m, weight):
        m.seen = weight
        return forward(m, weight)

    def recorded_cross_entropy(*inputs, **kw):
        loss = cross_entropy(*inputs, **kw)
        watch.losses.append(float(loss.detach()))
        return loss

    class AdamW(torch.optim.AdamW):
        def __init__(self, groups, **kw):
            groups[-1]["eps"] = options.eps
            super().__init__(groups, **kw)
            watch.optimizer = self

        def step(self):
            still = options.probe and watch.step > options.probe
            first = options.official and watch.step == 1
            if not still and not first:
                super().step()

    module.update_masks = watch.update_masks
    module.task_loss = repeated_task_loss
    module.Masked.forward = seen_forward
    if options.official:
        module.top_v = int_top_v
    torch.optim.AdamW = AdamW
    torch.nn.functional.cross_entropy = recorded_cross_entropy


def flags():
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--name", required=True)
    p.add_argument("--order", default="movement", choices=ORDERS)
    p.add_argument("--penalty", type=float, default=0.0)
    p.add_argument("--eps", type=float, default=1e-8)
    p.add_argument("--every", type=int, default=1)
    p.add_argument("--official", action="store_true")
    p.add_argument("--hyper", type=json.loads, default={})
    p.add_argument("--stop", type=float, default=0.0)
    p.add_argument("--probe", type=int, default=0)
    p.add_argument("--part", type=float, default=1.0)
    p.add_argument("script", choices=["mvp", "soft_mvp"])
    p.add_argument("rest", nargs=argparse.REMAINDER)
    return p


def main():
    options = flags().parse_args()
    module = importlib.import_module(options.script)
    command = shlex.join(["python", *sys.argv])
    for flag in ("model", "data"):
        command = re.sub(rf"--{flag} \S+", f"--{flag} {flag.upper()}", command)
    experiment, variant = options.name.split(":")
    out = ROOT / "out" / f"why-{experiment}-{variant}"
    args = module.flags().parse_args([*options.rest, "--out", str(out)])
    if args.steps is None:                      # not typed: the preset's
        preset = module.HYPER[args.preset]
        args.steps = (preset["*"] | preset.get(args.task, {}))["steps"]
    watch = Watch(module, options, args)
    patch(module, watch)
    metrics = ""
    try:
        module.main(args)
        measured = json.loads((out / "result.json").read_text())["metrics"]
        metrics = {name: round(x, 1) for name, x in measured.items()}
    except Stop:
        print("stopped")
    known = {"experiment": experiment, "variant": variant, "task": args.task, "seed": args.seed,
             "steps": args.steps, "metrics": metrics, "command": command}
    with open(Path(__file__).with_suffix(".tsv"), "a") as f:
        table = csv.DictWriter(f, COLUMNS, delimiter="\t", lineterminator="\n",
                               quoting=csv.QUOTE_NONE, quotechar=None)
        if f.tell() == 0:
            table.writeheader()
        for row in watch.rows:
            table.writerow(known | row)


if __name__ == "__main__":
    main()

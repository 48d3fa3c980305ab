"""Soft movement pruning of BERT, in one file.
Sanh, Wolf and Rush 2020, arXiv 2005.07683, section 4. Official code:
huggingface/transformers-research-projects, movement-pruning, at fccd0cdab0 (mask
"sigmoied_threshold", penalty "l1").

Idea: soft movement is global movement plus a penalty. The backward pass skips the sigmoid too, so
scores S learn as in mvp.py: dL/dS = dL/dW' * W. One threshold for all matrices lets each matrix
find its own density. A penalty presses all scores down.
    M = (sigmoid(S) > tau)
    minimise  L + lambda * mean over matrices of the mean of sigmoid(S) in the matrix
    r = 1 - (1 - (t - t_i T) / (T - t_i T - t_f T))^3      0 up to step t_i T, 1 after T - t_f T
--penalty LAMBDA is the official code's way: tau = 0.1 r and lambda = LAMBDA r are given, and what
is kept follows. On SQuAD a LAMBDA of 500 keeps 13.9 % and 1400 keeps 2.6 % (the paper's runs).
Without --penalty what is kept is given: v = 1 - (1 - v_f) r, where v_f is --sparsity. tau is then
whatever value lets round(v N) of all N scores pass (so S itself is ranked; of equal scores the
first pass), and lambda = lambda_f r with a constant lambda_f.
Each matrix has a floor, so that none is emptied: it keeps at least its highest int(0.005 n) + 1 of
n scores, or round(v n), but at least 1, where that is less. Floors are taken first; the highest of
all other scores fill up round(v N). (If v is below 0.5 %, rounding can make the floors a few too
many; the last matrices then get fewer.) With --penalty the floor is always int(0.005 n) + 1.
Why a penalty, if tau is solved for? It pushes all scores of a matrix about equally, and that alone
would reorder nothing. But Adam divides each step of a score by the recent size of its gradient,
loss plus penalty. A weight's dL/dW' * W changes its sign from batch to batch. Where it is small
beside the penalty, the score sinks at full speed; where it is large, the score sinks slowly. So S
should come to rank the size of dL/dW' * W, not which way a weight moved. During a run on SST-2 the
rank correlation of S with this size (its root mean square so far) climbs from 0.02 to 0.85. Without
the penalty, or under SGD, it stays near 0; but those runs fall to chance early, and then no ranking
can form. That Adam is the reason is our reading (results/README.md).

Symbols
    weight    W          (out, in), one of the six matrices of an encoder layer
    scores    S          (out, in), 0 at the start, learned at --score_lr
    mask      M          (out, in), 0 or 1
    tau       tau        the threshold on sigmoid(S). ramp: r. lambda_f: lambda once r is 1
    v         v          fraction kept
    step      t          from 0 to T - 1; T is --steps. t_i, t_f: fractions of the run. L: the loss
Unlike mvp.py: one ranking over all scores, as with its --scope global, and a penalty.
Differs from the paper's text, which has M = (S > tau), a constant tau and lambda, and the sum of
sigmoid(S). Differs from the official code, which has the formulas above: tau is solved for, and
what magnitude.py names. Left out: other starts of the scores.

Run (measured results: results/README.md)
    python soft_mvp.py --task squad --sparsity 0.03    mini/'s small BERT, minutes on a CPU
    python soft_mvp.py --penalty 500 --out out/open    the open loop; --preset paper: BERT-base
Last line: RESULT soft_mvp squad keeps 3.00% (prunes 97.00%) EM .. F1 .. | ..
"""
import argparse
import json
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch
import transformers
from torch import nn

# <method: imports>
import torch.nn.functional as F
from torch.nn.utils import parametrize

# </method>
import common

# ---- flags

# <method: hyper-parameters>
# For squad, mnli and qqp the paper's, from the authors' run sheet; the mini preset and the other
# tasks are ours.
# warmup: fraction of the steps in which lr rises. lr_end: fraction of lr left after the last step.
# t_i, t_f: fractions of the steps before pruning begins and after it has ended.
# score_lr: peak learning rate of the scores. lambda_f: weight of the penalty at the end, of the
# size with which the paper keeps 3 to 10 % on SQuAD; the same for every goal.
# length: tokens in a text. clip: the norm to which all gradients together are clipped.
MINI = dict(
    model=str(common.MINI / "bert"),
    data=str(common.MINI),
    steps=1000, batch_size=32, lr=5e-4,
    length=128, warmup=0.05, lr_end=0.0, clip=1.0,
    t_i=0.05, t_f=0.3,
    score_lr=1e-2, lambda_f=1000.0
)
PAPER = MINI | dict(
    model="bert-base-uncased",
    data="data",
    steps=None, epochs=6, lr=3e-5
)
HYPER = {
    "mini": {
        "*": MINI,
        "mnli": dict(steps=3000),
        "qqp": dict(steps=3000)
    },
    "paper": {
        "*": PAPER,
        "squad": dict(epochs=10, batch_size=16, length=384,
                      warmup=0.1, t_i=0.1, t_f=0.2),
        "mnli": dict(warmup=0.16, t_i=0.16, t_f=0.16),
        "qqp": dict(epochs=10, lr=3e-6, warmup=0.1, t_i=0.2, t_f=0.3)
    }
}
# </method>


def flags():
    """The command line. A flag without a default here takes it from HYPER."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--task", default="squad", choices=common.TASKS,
        help="tsv: your own DIR/tsv/train.tsv and dev.tsv, with --data DIR")
    add("--sparsity", type=float, default=0.03, metavar="V",
        help="fraction of the prunable weights KEPT: 0.03 keeps 3.00%% and prunes 97.00%%")
    cuda = torch.cuda.is_available()
    add("--preset", choices=["mini", "paper"], default="paper" if cuda else "mini",
        help="default: paper where CUDA is there, else mini")
    add("--model")                              # a BERT: a folder, or a name on the hub
    add("--data")                               # the folder of the data files
    add("--out")                                # default: out/<script>-<task>-<V>-s<seed>
    add("--seed", type=int, default=0)
    add("--steps", type=int)                    # overrides the preset's steps or epochs
    add("--batch_size", type=int)               # of all processes together
    add("--lr", type=float)                     # peak learning rate of the weights
    add("--device", default="cuda" if cuda else "cpu")
    add("--teacher", help="distil from the fine-tuned model in this folder")
    add("--resume", action="store_true")        # go on from the last checkpoint in --out
    add("--checkpoint_every", type=int, default=500)
    # <method: flags>
    add("--score_lr", type=float)               # peak learning rate of the scores
    add("--penalty", type=float,
        help="lambda > 0 of the paper's open loop: what is kept follows from it, not --sparsity")
    # </method>
    return parser


# <method: definitions>
# ---- method

def lr_factor(step, steps, warmup, lr_end):
    """The learning rate as a fraction of its peak: up (never 0), then down to lr_end, linearly."""
    rise = (step + 1) / max(1, warmup * steps)
    fall = (1 - lr_end) * (steps - step) / max(1, steps - warmup * steps)
    return min(1.0, rise, lr_end + fall)


def task_loss(net, batch, teacher, temperature=2.0):
    """The task's loss; with a teacher 0.1 of it + 0.9 temperature^2 KL(teacher || student).

    SQuAD takes the mean KL of start and end. STS-B has one logit: its KL is 0.
    """
    out = net(**batch)
    if teacher is None:
        return out.loss
    with torch.no_grad():
        target = teacher(**batch)
    names = [name for name in out if name.endswith("logits")]
    kl = 0.0
    for name in names:
        student = F.log_softmax(out[name].float() / temperature, dim=-1)
        taught = F.softmax(target[name].float() / temperature, dim=-1)
        kl += temperature ** 2 * F.kl_div(student, taught, reduction="batchmean") / len(names)
    return 0.1 * out.loss + 0.9 * kl


def schedule(step, steps, v_f, t_i, t_f):
    """v, the fraction kept at this step: 1, then down the cubic of eq. 5, then v_f."""
    done = (step - t_i * steps) / max(1.0, (1 - t_i - t_f) * steps)
    done = min(max(done, 0.0), 1.0)
    return v_f + (1 - v_f) * (1 - done) ** 3


def kth_largest(x, k):
    """The k-th largest of the n elements of a flat tensor, 1 <= k <= n, selected without a sort."""
    if x.device.type == "cpu":                  # numpy's selection is the fastest there
        place = len(x) - k
        return x.new_tensor(np.partition(x.numpy(), place)[place])
    return x.topk(k, sorted=False).values.min()


def top_v(scores, v):
    """Top_v: True for the highest round(v * count) scores, 1 at least; of equal ones the first."""
    flat = scores.flatten()
    k = max(1, round(v * len(flat)))
    threshold = kth_largest(flat, k)
    mask = flat >= threshold
    surplus = int(torch.count_nonzero(mask)) - k
    if surplus:                                 # ties with the k-th: drop the last ones
        mask[(flat == threshold).nonzero().flatten()[-surplus:]] = False
    return mask.view_as(scores)


def floor(n):
    """The least fraction that global ranking keeps of a matrix of n weights, about 0.5 %."""
    return (int(0.005 * n) + 1) / n


@torch.no_grad()
def update_masks(masked, scores, v):
    """One threshold for all matrices: M is Top_v of all scores together, after each one's floor."""
    sizes = [s.numel() for s in scores]
    row = torch.cat([s.flatten() for s in scores])                      # (N,)
    for part in row.split(sizes):                                       # a view of the row
        part[top_v(part, min(v, floor(len(part))))] = torch.inf         # ranks before all others
    for m, mask in zip(masked, top_v(row, v).split(sizes)):
        m.mask.copy_(mask.view_as(m.mask))


@torch.no_grad()
def update_masks_open(masked, scores, tau):
    """The paper's open loop: M = (sigmoid(S) > tau), and at least the floor of each matrix."""
    for m, s in zip(masked, scores):
        m.mask.copy_((torch.sigmoid(s) > tau) | top_v(s, floor(s.numel())))


def sigmoid_penalty(scores):
    """The mean over matrices of the mean of sigmoid(S) in the matrix."""
    return torch.stack([torch.sigmoid(s).mean() for s in scores]).mean()


class StraightThrough(torch.autograd.Function):
    """W' = W * M; the backward pass takes 1 for the slope of M in S."""

    @staticmethod
    def forward(ctx, weight, scores, mask):
        ctx.save_for_backward(weight, mask)
        return weight * mask

    @staticmethod
    def backward(ctx, grad):
        weight, mask = ctx.saved_tensors
        # grad: dL/dW'. Returned: dL/dW, of kept weights alone; dL/dS, of every weight; no dL/dM.
        return grad * mask, grad * weight, None


class Masked(nn.Module):
    """A parametrization: the layer computes with W' = W * M, and its scores learn through M."""

    def __init__(self, weight):
        super().__init__()
        self.scores = nn.Parameter(torch.zeros_like(weight))            # S: (out, in)
        self.register_buffer("mask", torch.ones_like(weight), persistent=False)     # M: (out, in)

    def forward(self, weight):
        return StraightThrough.apply(weight, self.scores, self.mask)
# </method>


# ---- run

def main(args):
    """Fine-tune, prune, save and evaluate. Exits with status 3 if the goal was missed."""
    # ---- preset
    typed = {name: value for name, value in vars(args).items() if value is not None}
    preset = HYPER[args.preset]
    hyper = preset["*"] | preset.get(args.task, {})
    args = argparse.Namespace(**(vars(args) | hyper | typed))
    method = Path(__file__).stem
    out = Path(args.out or f"out/{method}-{args.task}-{args.sparsity:g}-s{args.seed}")

    # ---- mistakes that can be seen before anything is loaded
    numbers = {args.sparsity, args.lr, args.batch_size, args.steps}
    if min(numbers - {None}) <= 0 or not args.sparsity <= 1:
        raise SystemExit("--sparsity is the fraction KEPT, above 0 and at most 1; --steps, --lr "
                         "and --batch_size must be above 0")
    inputs = map(os.path.realpath, (args.model, str(args.teacher)))
    if os.path.realpath(out) in inputs:
        raise SystemExit(f"--out {out} is the --model or --teacher folder too: give another")
    log = out / "log.jsonl"
    if args.resume and (not log.exists() or (out / "result.json").exists()):
        raise SystemExit(f"--resume: {out} holds no unfinished run: leave --resume out")
    if any(out.glob("*")) and not log.exists():
        raise SystemExit(f"--out {out} holds something other than a run: give a new folder")
    # <method: checks>
    # nothing
    # </method>

    # ---- devices and processes: torchrun sets RANK, LOCAL_RANK and WORLD_SIZE
    rank = int(os.environ.get("RANK", 0))
    world = int(os.environ.get("WORLD_SIZE", 1))
    if args.device == "cuda":
        args.device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        device = torch.zeros(1, device=args.device).device
    except Exception as error:
        raise SystemExit(f"--device {args.device} is not there ({error}): give another") from None
    # bf16 where the hardware has it; on a CPU only with --preset paper
    bf16 = args.preset == "paper" and torch.cpu._is_avx512_bf16_supported()
    if device.type == "cuda":
        torch.cuda.set_device(device)
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=bf16)
    if rank > 0:
        sys.stdout = open(os.devnull, "w")              # rank 0 alone prints, downloads and saves
    print(f"{method} {args.task}: keeps {args.sparsity:.2%} (prunes {1 - args.sparsity:.2%}) | "
          f"preset {args.preset} (CUDA: {torch.cuda.is_available()}) | {device} x {world} | "
          f"{'bf16' if bf16 else 'fp32'} | seed {args.seed}")
    if 0.5 < args.sparsity < 1:
        print(f"--sparsity is the fraction KEPT: did you mean {1 - args.sparsity:g}?")
    if args.preset == "paper" and rank == 0:
        common.download(args.task, args.data)
    if world > 1:
        torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
        torch.distributed.barrier()                     # the others wait for the download

    # ---- data and model
    tokenizer = common.load_tokenizer(args.model)
    data = common.Data(args.task, args.data, tokenizer, args.length)
    args.steps = args.steps or args.epochs * len(data.train) // args.batch_size or 1
    torch.manual_seed(args.seed)                        # of a head that is new
    model = common.load_bert(args.model, data).to(device).train()
    model.bert.embeddings.requires_grad_(False)         # as in movement pruning's official code
    teacher = None
    if args.teacher:
        teacher = common.load_bert(args.teacher, data, teacher=True).to(device).eval()
    print(f"{len(data.train)} training examples, {data.n_dev} to evaluate | "
          f"{args.steps} steps of {args.batch_size} | lr {args.lr:g} | {args.model}")
    layers = common.prunable(model)                     # {name: Linear}, six matrices a layer
    groups = [{"params": list(model.parameters()), "lr": args.lr, "initial_lr": args.lr}]
    state = {}                                          # what the method keeps in a checkpoint

    # <method: setup>
    masked = []                                         # none if V = 1: dense fine-tuning
    if args.sparsity < 1 or args.penalty:
        masked = [Masked(layer.weight) for layer in layers.values()]
    for layer, m in zip(layers.values(), masked):
        parametrize.register_parametrization(layer, "weight", m)
    scores = [m.scores for m in masked]                                 # S: (out, in) each
    # A score must overtake others within the run, a weight need not: scores learn much faster.
    groups.append({"params": scores, "lr": args.score_lr, "initial_lr": args.score_lr,
                   "weight_decay": 0.0})
    # </method>

    # ---- the run's folder
    checkpoint = out / "checkpoint.pt"
    if rank == 0 and not args.resume:
        out.mkdir(parents=True, exist_ok=True)
        for old in (checkpoint, out / "result.json"):
            old.unlink(missing_ok=True)
        log.write_text("")

    # <method: before the loop>
    # nothing: it prunes while it fine-tunes
    # </method>

    # ---- optimizer: no weight decay, so that the loss and the method alone move a weight
    optimizer = torch.optim.AdamW(groups, eps=1e-8, weight_decay=0.0, fused=True)
    trained = [p for group in groups for p in group["params"]]
    net = model
    if world > 1:
        net = nn.parallel.DistributedDataParallel(model, broadcast_buffers=False)

    # ---- resume
    saved = dict(step=0, seconds=0.0)
    if args.resume and checkpoint.exists():
        saved = torch.load(checkpoint, map_location=device)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        state.update(saved["state"])
    if args.resume:                                     # 0: it was killed before a checkpoint
        print(f"the run goes on from step {saved['step']}")

    # ---- the loop: batch, dropout and lr depend on (seed, step) alone, as a resumed run needs
    seconds = saved["seconds"]
    started = time.time() - seconds
    batches = data.batches(saved["step"], args.batch_size, args.seed)
    for step in range(saved["step"], args.steps):
        torch.manual_seed((args.seed * 1_000_003 + step) * world + rank)
        batch = data.collate(next(batches)[rank::world]).to(device)
        factor = lr_factor(step, args.steps, args.warmup, args.lr_end)
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor

        # <method: before forward>
        # 0 until t_i T, then up to 1
        ramp = 1 - schedule(step, args.steps, 0.0, args.t_i, args.t_f)
        v = 1 - (1 - args.sparsity) * ramp
        if args.penalty:
            update_masks_open(masked, scores, 0.1 * ramp)               # tau rises to 0.1
            v = None                                                    # an outcome, not a goal
        elif masked:
            update_masks(masked, scores, v)
        # </method>

        with autocast:
            loss = task_loss(net, batch, teacher)

        # <method: penalty>
        penalty = torch.tensor(0.0)
        if masked:
            penalty = (args.penalty or args.lambda_f) * ramp * sigmoid_penalty(scores)
        # </method>

        optimizer.zero_grad()
        (loss + penalty).backward()

        # <method: gradient>
        # nothing: StraightThrough has made dL/dW and dL/dS
        # </method>

        nn.utils.clip_grad_norm_(trained, args.clip)    # one norm over all that is trained
        optimizer.step()

        # <method: after step>
        # nothing: the masked weights are still in the model, only not in its forward pass
        # </method>

        # ---- log line
        done = step + 1
        seconds = time.time() - started
        if rank == 0 and (done % 50 == 0 or done == args.steps):
            kept = common.count_kept(model)[1]
            goal_text = "no goal" if v is None else f"goal {v:.1%}"
            print(f"step {done:05d}/{args.steps:05d}  loss {loss:.4f}  penalty {penalty:.4f}  "
                  f"kept {kept:.1%} ({goal_text})  lr {args.lr * factor:.1e}  "
                  f"{1000 * seconds / done:.0f} ms  "
                  f"eta {(args.steps - done) * seconds / done / 60:.0f}m", flush=True)
            row = dict(step=done, loss=loss.item(), penalty=penalty.item(),
                       kept=kept, goal=v, lr=args.lr * factor, seconds=seconds)
            with open(log, "a") as file:
                print(json.dumps(row), file=file)
            if not torch.isfinite(loss):
                raise SystemExit(f"the loss is {loss} at step {done}: give a smaller --lr")

        # ---- checkpoint: under another name first, so that it is whole or not there
        if rank == 0 and done % args.checkpoint_every == 0:
            torch.save(dict(model=model.state_dict(), optimizer=optimizer.state_dict(),
                            state=state, step=done, seconds=seconds), out / "checkpoint.part")
            os.replace(out / "checkpoint.part", checkpoint)

    # <method: bake>
    # The last step moved what is ranked: M for v_f once more. W * M becomes the plain weight.
    goal = args.sparsity
    if args.penalty:
        goal = None
        update_masks_open(masked, scores, 0.1)
    elif masked:
        update_masks(masked, scores, goal)
    if masked:
        for layer in layers.values():
            parametrize.remove_parametrizations(layer, "weight")
    # </method>

    # ---- save; what is counted and evaluated is what the folder holds
    if world > 1:
        torch.distributed.destroy_process_group()
    if rank > 0:
        return
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    model = type(model).from_pretrained(out).to(device)
    kept_per_layer, kept, n_prunable = common.count_kept(model)
    with autocast:
        metrics = data.evaluate(model)
    for name, share in kept_per_layer.items():
        print(f"{name:50s} kept {share:7.2%} {'#' * round(40 * share)}")
    total = time.time() - started
    shown = " ".join(f"{name} {value:.1f}" for name, value in metrics.items())
    line = (f"RESULT {method} {args.task} keeps {kept:.2%} (prunes {1 - kept:.2%}) {shown} | "
            f"{args.steps} steps {total:.0f} s seed {args.seed} | {out}")
    # missed: by more than 0.1 points, or 5 % of a small goal
    missed = goal is not None and abs(kept - goal) > min(0.001, 0.05 * goal)
    if missed:
        line += f" | MISSED the goal of {goal:.2%}"
    versions = {module.__name__: module.__version__ for module in (torch, transformers, np)}
    result = dict(
        method=method, task=args.task,
        kept=kept, kept_per_layer=kept_per_layer,
        metrics=metrics,
        seconds=total, ms_per_step=1000 * seconds / args.steps,
        n_train=len(data.train), n_dev=data.n_dev,
        n_prunable=n_prunable,
        device=args.device,
        threads=torch.get_num_threads(),
        versions=versions,
        args=vars(args) | {"out": str(out), "goal": goal},
        line=line
    )
    (out / "result.json").write_text(json.dumps(result, indent=1))
    checkpoint.unlink(missing_ok=True)
    print(line)
    if missed:
        sys.exit(3)


if __name__ == "__main__":
    main(flags().parse_args())

"""Movement pruning of BERT.

Paper: Sanh, Wolf and Rush 2020, "Movement Pruning", arXiv 2005.07683, sections 3 and 4.
Official code: huggingface/transformers-research-projects, movement-pruning, at fccd0cdab0, where
this mask is called topK.

Read magnitude.py first. It asks which weights are large. This file asks which weights fine-tuning
pushes away from 0. Each weight has a score, which learns from the first step on, before anything is
pruned. Each matrix keeps the weights with the highest scores. (With --scope global, all matrices
are ranked together.)

    M  = Top_v(S)           1 for the highest round(v n) of a matrix's n scores, else 0
    W' = W * M              the matrix of the forward pass
    gradient of W:  dL/dW' * M        kept weights learn, masked ones do not
    gradient of S:  dL/dW' * W        an estimate: see the class StraightThrough. All scores learn

    W, v, L      as in magnitude.py: a weight matrix (out, in); the fraction kept, which falls from
                 1 to --sparsity (also a fraction KEPT) while the model is fine-tuned; the loss
    S            the scores of W's weights, (out, in), 0 at the start, trained by Adam

Where dL/dW' * W is negative, a step of gradient descent moves a kept W away from 0, and raises S.
Where it is positive, the step moves W towards 0, and lowers S. The belief behind it: a weight that
the task pushes away from 0 is one that the task needs. Why learn a score, and not just measure how
far W has moved? A masked W stands still, once Adam's momentum has faded. Its score goes on
learning, so it can come back.

Unlike magnitude.py, this file ranks scores instead of |W|. The scores are learned, and a
hand-written backward pass gives them their gradient. --sparsity 1, a dense run, is left to
magnitude.py. All else is identical: diff the two files. The official code can also start the scores
at values other than 0; this file cannot.

The paper has movement ahead of magnitude where few weights are kept: with BERT-base on SQuAD F1
81.7 against 78.5 with 10 % kept, and 76.3 against 54.5 with 3 %. But in short runs and in deep
models it can collapse, and end at chance or not far above. On the real SST-2 (a BERT of three
layers, 10 % kept, seed 0) a run of 1,000 steps at --lr 3e-5 ended at chance, with an accuracy of
50.9 %. Runs of 10,000 steps, of the same seed, did not collapse. But they beat magnitude.py only at
the low rate, and they only equal a bag of words, which needs no BERT and has 81.9 %:

    --lr     mvp.py     magnitude.py
    3e-5     81.3 %     78.4 %
    2e-4     82.2 %     85.1 %

Our reading of why it collapses: scores tell how steadily the loss asks for a larger |W|, and hardly
how much it needs W, because Adam divides the size out (see StraightThrough). So a large and useful
W can be masked. (magnitude.py masks only the smallest weights still kept.) The model loses much in
one step, and must repair that before more weights are masked.

What helped: more --steps (with three layers; six still collapsed in 20,000), a --model of fewer
layers, and, mostly, soft_mvp.py instead. To prune later may help as well: on mini's squad with 10 %
kept, one seed of ten collapsed with --t_i 0.05 (pruning begins after 5 % of the steps), and none
with 0.3. The measurements are in results/why/README.md. The paper preset, of twelve layers, was not
run here.

    python mvp.py --task squad --sparsity 0.1

Without CUDA, this runs on the made-up data in mini/, where the F1 of a model without pruning is 99
and that of a guesser 13.5. The last line begins:

    RESULT mvp squad keeps 10.00% (prunes 90.00%) EM 91.5 F1 91.8 | 1000 steps ..
"""
import argparse
import json
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP

# From here on, code outside the slots, <method: ..> to </method>, is the same in all six scripts.
# <method: imports>
from torch.nn.utils import parametrize

# </method>
import common

# <method: definitions>
# ---- which weights stay

# Why gradually? A pruned weight takes its share of the work with it, and the other weights need
# some steps to take that over. Why a cubic? Zhu and Gupta (1710.01878) chose it because it is steep
# at first, when many weights are of little use, and flat at the end, when each pruned weight is
# missed. Why wait for a first part of the run, t_i, and rest for a last part, t_f? The model first
# has to learn its task, and at the end the weights that are left get time to adapt.
# Official: masked_run_squad.py, lines 72-92. There t_i and t_f are numbers of steps that do not
# grow with the run, so a short run ends before pruning starts. Steps count from 1 there (in
# masked_run_glue.py from 0, as here).
def schedule(step, steps, v_f, t_i, t_f):
    """v, the fraction to keep at a step, by eq. 5 of Sanh et al.

    1 until t_i * steps, then down the cubic, then v_f for the last t_f * steps. The cubic part
    takes at least one step. (In a run of a few steps the last v can be above v_f. The slot
    "bake" prunes to v_f in any case.)
    """
    length = max(1.0, (1 - t_i - t_f) * steps)          # of the cubic part: a step or more
    done = (step - t_i * steps) / length
    done = min(max(done, 0.0), 1.0)
    return v_f + (1 - v_f) * (1 - done) ** 3


def kth_largest(x, k):
    """The k-th largest of the n elements of a flat tensor, 1 <= k <= n, as a 0-dim tensor."""
    n = len(x)
    if x.device.type == "cpu":                          # faster than torch's own kthvalue
        return x.new_tensor(np.partition(x.numpy(), n - k)[n - k])
    if k > n // 2:                                      # topk from below has fewer to find
        return x.topk(n - k + 1, largest=False, sorted=False).values.max()
    return x.topk(k, sorted=False).values.min()


# Official: binarizer.py, lines 95-103. That code sorts in each forward pass, keeps int(v n), and
# leaves open which of equal scores stay.
def top_v(scores, v):
    """Top_v: True for the highest round(v n) of the n scores, but always for at least one.

    scores: any shape; the mask has the same shape. Among equal scores, those that come first in
    the flattened tensor stay.
    """
    flat = scores.flatten()                             # (n,)
    k = max(1, round(v * len(flat)))
    threshold = kth_largest(flat, k)
    stays = flat >= threshold                           # k of them, or more if scores are equal
    # If more scores than needed equal the threshold, only the first of those stay. On a GPU this is
    # always done, because checking whether it is needed would make Python wait for the GPU.
    if flat.is_cuda or torch.count_nonzero(stays) > k:
        above = flat > threshold
        equal = flat == threshold
        room = k - torch.count_nonzero(above)           # how many of the equal ones may stay
        stays = above | (equal & (equal.cumsum(0) <= room))
    return stays.view_as(scores)


# With --scope global all matrices compete. One could lose all its weights: its output would then be
# nothing but the bias. So each matrix first keeps about 0.5 % of its weights, its best (or the
# fraction v, if that is smaller).
# Official: binarizer.py, line 53.
def least_share(n):
    """The fraction of its n weights that a matrix keeps at least: int(0.005 n) + 1 of n."""
    return (int(0.005 * n) + 1) / n


# Official, for --scope global: masked_run_squad.py, lines 256-270. There the ranking is redone
# every 25 steps, int(v N) + 1 scores pass, and the least shares are kept on top of those.
@torch.no_grad()
def update_masks(masked, scores, v, scope="local"):
    """Write M = Top_v(scores) into the mask of each Masked module in `masked`.

    scores: one tensor (out, in) per matrix. local: a matrix of n weights keeps round(v n) of them.
    global: round(v N) of all N weights are kept: the least share of each, then the highest scores.
    """
    if v == 1:                                          # nothing is ranked before pruning begins
        masks = [torch.ones_like(s) for s in scores]
    elif scope == "local":
        masks = [top_v(s, v) for s in scores]
    else:
        sizes = [s.numel() for s in scores]
        ranked = torch.cat([s.flatten() for s in scores])               # (N,)
        # `ranked` is a copy. In it the best scores of each matrix, its least share (or v, if
        # smaller), become infinite, so that they rank first. If v is 0.5 % or less, hardly anything
        # else is kept. Each matrix rounds its own count, to one at least, so there can be a few
        # more infinite scores than round(v N) (mini, v = 0.5 %: 3936, not 3932). All are equal, so
        # top_v keeps the first ones, and the last matrices lose a few (or all, if they had a few).
        for part in ranked.split(sizes):                                # views of `ranked`
            part.masked_fill_(top_v(part, min(v, least_share(len(part)))), torch.inf)
        masks = top_v(ranked, v).split(sizes)
    for m, mask in zip(masked, masks):
        m.mask.copy_(mask.view_as(m.mask))


# ---- how scores learn through a mask

# M is a step function of S. Its slope is 0 almost everywhere, so no gradient would reach S. The
# straight-through estimator takes 1 for this slope in the backward pass, as if M were S itself.
# With W' = W * M the chain rule then gives dL/dS = dL/dW' * W, for masked weights too.
#
# Why may 1 stand in for the slope? A score that rises can switch W' from 0 to W. This changes the
# loss by about dL/dW' * W. If that is negative, S should rise, and descent with this gradient lets
# it rise. So, to first order, the sign is right. The size is arbitrary: the true slope is 0, except
# at the threshold, where it is infinite. (Top_v also switches another weight off in return; that is
# ignored.)
#
# Plain gradient descent at a constant rate would make S = -rate times the sum over all steps of
# dL/dW' * W. We use Adam and a rate that rises and falls, as the paper does. Adam divides each
# step of a score by the recent size of its gradients: while they agree in sign, steps are about as
# long as the rate, and where signs change, steps are short. So S tells how steadily the gradient
# asked for a larger |W| (of a masked W: how steadily it asked to switch W on). It hardly tells by
# how much.
#
# The same in one line: W * (M + (S - S.detach())). S - S.detach() is 0, and its slope in S is 1.
# The class is longer, but shows the backward pass.
# Official: binarizer.py, lines 69-108, and masked_nn.py, line 104. There the autograd function
# returns only M, its backward pass hands the gradient of M on to S, and autograd differentiates
# W * M. The result is the same.
class StraightThrough(torch.autograd.Function):
    """W' = W * M, with a backward pass that takes 1 for the slope of M in S."""

    @staticmethod
    def forward(ctx, weight, scores, mask):             # scores: gets dL/dS
        ctx.save_for_backward(weight, mask)
        return weight * mask

    @staticmethod
    def backward(ctx, grad):                            # grad: dL/dW', (out, in)
        weight, mask = ctx.saved_tensors
        return grad * mask, grad * weight, None         # dL/dW, dL/dS, and none for M


# Checkpoints hold the scores, which are parameters. The mask is not saved: each step makes it anew.
class Masked(nn.Module):
    """A parametrization: the layer computes with W' = W * M, and its scores learn through M."""

    def __init__(self, weight):
        super().__init__()
        self.scores = nn.Parameter(torch.zeros_like(weight))            # S: (out, in)
        self.register_buffer("mask", torch.ones_like(weight), persistent=False)     # M: (out, in)

    def forward(self, weight):
        return StraightThrough.apply(weight, self.scores, self.mask)
# </method>

# <method: hyper-parameters>
# Under paper, the values of squad, mnli and qqp (also where inherited from MINI) are Sanh et al.'s,
# from their run sheet and scripts, unless marked as ours. Those of the other tasks, and of mini,
# are ours. "*" holds for all tasks; a task's own values override it.
MINI = dict(
    model=str(common.MINI / "bert"),
    data=str(common.MINI),
    steps=1000, batch_size=32, lr=5e-4,
    length=128,                     # the most tokens in one input
    warmup=0.05,                    # the fraction of the steps in which lr rises
    lr_end=0.0,                     # the fraction of its peak that is left after the last step
    clip=1.0,                       # the norm to which all gradients together are clipped
    t_i=0.05, t_f=0.3,              # fractions of the steps: before v falls, and after its fall
    score_lr=1e-2                   # peak learning rate of the scores
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
        "qqp": dict(epochs=10, lr=3e-6, warmup=0.1, t_i=0.2, t_f=0.3)  # yes, 3e-6
    }
}
# </method>


def number(kind, low=0, high=1e9):
    """An argparse type: a number of this kind (int or float), above low and at most high."""
    def parse(text):
        value = kind(text)
        if not low < value <= high:
            raise argparse.ArgumentTypeError(f"{text} must be above {low} and at most {high:g}")
        return value
    parse.__name__ = kind.__name__                      # for "invalid int value: 'many'"
    return parse


def flags():
    """The command line. What it leaves open, the preset decides."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    cuda = torch.cuda.is_available()
    add("--task", default="squad", choices=common.TASKS,
        help="tsv: your own data, DIR/tsv/train.tsv and DIR/tsv/dev.tsv, with --data DIR")
    add("--sparsity", "--keep", type=number(float, high=1), default=0.03, metavar="V",
        help="fraction of the prunable weights KEPT: 0.03 keeps 3.00%% and prunes 97.00%%")
    add("--preset", choices=["mini", "paper"], default="paper" if cuda else "mini",
        help="the default is paper where CUDA is there, else mini")
    add("--model", help="a BERT: a folder, or a name on the hub")
    add("--data", help="folder of the data files")
    add("--out", help="folder for this run alone; default out/<script>-<task>-<V>-s<seed>")
    add("--seed", type=number(int, low=-1), default=0, help="of all random numbers")
    add("--steps", type=number(int), help="instead of the preset's steps or epochs")
    add("--batch_size", type=number(int), help="examples per step, over all processes together")
    add("--lr", type=number(float), help="peak learning rate of the weights")
    add("--device", default="cuda" if cuda else "cpu", help="cpu, cuda, cuda:1, ..")
    add("--teacher", help="distil from the fine-tuned model in this folder")
    add("--resume", action="store_true", help="go on from the last checkpoint in --out")
    add("--checkpoint_every", type=number(int), default=500, help="in steps; BERT-base: 1 to 2 GB")
    # <method: flags>
    add("--t_i", type=number(float, high=1), help="fraction of the steps before pruning begins")
    add("--score_lr", type=number(float), help="peak learning rate of the scores")
    add("--scope", default="local", choices=["local", "global"],
        help="rank the scores of each matrix by themselves, or those of all matrices together")
    # </method>
    return parser


# ---- the run

def lr_factor(step, steps, warmup, lr_end):
    """lr as a fraction of its peak: up in warmup * steps steps, then down to lr_end, linearly."""
    rise = (step + 1) / max(1, warmup * steps)          # not 0 at the first step
    fall = (1 - lr_end) * (steps - step) / max(1, steps - warmup * steps)
    return min(1.0, rise, lr_end + fall)


# As in movement pruning's masked_run_squad.py, lines 301-319. Its default mix is 0.5 and 0.5; ours,
# 0.1 and 0.9, is from its paper. SQuAD has two KLs, start's and end's: their mean.
def task_loss(net, batch, teacher, temperature=2.0):
    """The task's loss; to distil, 0.1 loss + 0.9 temperature^2 KL(teacher || student)."""
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


def main(args):
    """Fine-tune, prune, save and evaluate. Exits with 3 if the goal was clearly missed."""
    # ---- the preset fills in what the command line left open
    given = {name: value for name, value in vars(args).items() if value is not None}
    preset = HYPER[args.preset]
    args = argparse.Namespace(**(vars(args) | preset["*"] | preset.get(args.task, {}) | given))
    method = Path(__file__).stem
    out = Path(args.out or f"out/{method}-{args.task}-{args.sparsity:g}-s{args.seed}")
    log = out / "log.jsonl"
    checkpoint = out / "checkpoint.pt"
    rank = int(os.environ.get("RANK", 0))               # set by torchrun
    world = int(os.environ.get("WORLD_SIZE", 1))

    # ---- mistakes that can be seen before anything is loaded
    inputs = {os.path.realpath(args.model), os.path.realpath(args.teacher or args.model)}
    if os.path.realpath(out) in inputs:
        raise SystemExit(f"--out {out} is the --model or --teacher folder too: give another")
    begun = log.read_text().partition("\n")[0] if log.exists() else ""      # its first line
    if out.is_file() or (any(out.glob("*")) and '"script":' not in begun):
        raise SystemExit(f"--out {out} holds something other than a run: give a new folder")
    settings = vars(args) | {"script": method, "processes": world, "out": None, "resume": None}
    if args.resume:
        if not begun or (out / "result.json").exists():
            raise SystemExit(f"--resume: {out} holds no unfinished run: give the --out of one")
        before = json.loads(begun)["args"]              # `out` and `resume` are None in both
        differ = sorted(name for name in settings if before.get(name) != settings[name])
        if differ:
            raise SystemExit(f"{out} was begun with another {', '.join(differ)}: repeat its flags")
    # <method: checks>
    if args.t_i + args.t_f >= 1:
        raise SystemExit(f"--t_i {args.t_i:g} leaves no steps to prune in: give less than "
                         f"{1 - args.t_f:g}")
    if args.sparsity == 1:
        raise SystemExit("--sparsity 1 prunes nothing: use python magnitude.py --sparsity 1")
    # </method>

    # ---- device and precision
    try:
        local = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if args.device == "cuda" else args.device
        device = torch.zeros(1, device=local).device
    except Exception as error:
        raise SystemExit(f"--device {args.device} is not there ({error}): give another") from None
    chip = torch.cpu.get_capabilities()
    card = chip.get("cpu_name", chip["architecture"])
    fast = chip.get("avx512_bf16", False)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        card = torch.cuda.get_device_name(device)
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    # mini is in fp32 everywhere, so that a GPU's results compare with a laptop's
    precision = "bf16" if fast and args.preset == "paper" else "fp32"
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")
    if rank > 0:
        sys.stdout = open(os.devnull, "w")              # rank 0 alone prints, downloads and saves
    print(f"{method} {args.task}: keeps {args.sparsity:.2%} (prunes {1 - args.sparsity:.2%}) | "
          f"preset {args.preset} (CUDA: {torch.cuda.is_available()}) | {card}, {device} x {world}, "
          f"{precision} | seed {args.seed}")
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
    if min(args.batch_size, len(data.train)) % world:
        raise SystemExit(f"--batch_size (or examples, if fewer) must split over {world} processes")
    if args.steps is None:
        args.steps = max(1, args.epochs * len(data.train) // args.batch_size)
    torch.manual_seed(args.seed)                        # for a head that is created anew
    model = common.load_bert(args.model, data).to(device).train()
    model.bert.embeddings.requires_grad_(False)         # as in movement pruning's official code
    teacher = None
    if args.teacher:
        teacher = common.load_bert(args.teacher, data, teacher=True).to(device).eval()
        print(f"the teacher alone: {data.evaluate(teacher)[0]}")
    print(f"{len(data.train)} training examples, {data.n_dev} to evaluate | "
          f"{args.steps} steps of {args.batch_size} | lr {args.lr:g} | {args.model}")
    layers = common.prunable(model)                     # {name: Linear}, six in each BERT layer
    groups = [{"params": list(model.parameters()), "lr": args.lr, "initial_lr": args.lr}]

    # <method: setup>
    if not layers:
        raise SystemExit("the model has no matrix to prune: give another --model")
    # Once m is registered, each read of layer.weight calls m.forward, and gets W * M.
    # W itself stays the parameter that is in `groups` already. The scores are added below.
    masked = [Masked(layer.weight) for layer in layers.values()]
    for layer, m in zip(layers.values(), masked):
        parametrize.register_parametrization(layer, "weight", m)
    scores = [m.scores for m in masked]                 # S: (out, in) each
    # --score_lr does not change the masks (but for rounding): scores start at 0, and Adam's steps
    # are proportional to the rate. So twice the rate gives twice the scores, in the same order, and
    # masks and gradients depend on the order alone. It is a flag because the paper has it, and
    # soft_mvp.py and l0.py, where it matters, need it.
    # Weight decay would make the scores forget the early steps: keep it at 0 where you copy this
    # slot.
    groups.append({"params": scores,
                   "lr": args.score_lr, "initial_lr": args.score_lr, "weight_decay": 0.0})
    # </method>

    # ---- the run's folder
    if rank == 0 and not args.resume:
        out.mkdir(parents=True, exist_ok=True)
        checkpoint.unlink(missing_ok=True)
        (out / "result.json").unlink(missing_ok=True)
        log.write_text(json.dumps(dict(step=0, seconds=0.0, args=settings)) + "\n")

    # <method: before the loop>
    # nothing: it prunes while it fine-tunes
    # </method>

    # ---- optimizer: no weight decay, so that the loss and the method alone move a weight
    optimizer = torch.optim.AdamW(groups, eps=1e-8, weight_decay=0.0, fused=True)
    parameters = [p for group in groups for p in group["params"]]
    net = DDP(model, broadcast_buffers=False) if world > 1 else model

    # ---- resume
    first, seconds = 0, 0.0
    if args.resume and checkpoint.exists():
        saved = torch.load(checkpoint, map_location=device)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        first, seconds = saved["step"], saved["seconds"]
        del saved
    if args.resume:                                     # from 0, if there was no checkpoint yet
        print(f"the run goes on from step {first}")

    # ---- the loop. Each step is seeded by its number: a resumed run draws the same random numbers
    started = time.time() - seconds
    batches = data.batches(first, args.batch_size, args.seed)
    for step in range(first, args.steps):
        torch.manual_seed((args.seed * 1_000_003 + step) * world + rank)
        batch = data.collate(next(batches)[rank::world], device)
        factor = lr_factor(step, args.steps, args.warmup, args.lr_end)
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor

        # The slots set penalty, which is added to the loss, and v, the fraction to keep now (logged
        # as "goal"); outside the loop one sets goal, the final fraction. v and goal may be None.
        # <method: before forward>
        # Masks first, so that this step's loss and gradients are those of the pruned network.
        v = schedule(step, args.steps, args.sparsity, args.t_i, args.t_f)
        update_masks(masked, scores, v, args.scope)
        # </method>

        with autocast:
            loss = task_loss(net, batch, teacher)

        # <method: penalty>
        penalty = torch.tensor(0.0)                     # the loss is the task's alone
        # </method>

        optimizer.zero_grad()
        (loss + penalty).backward()

        # <method: gradient>
        # nothing: StraightThrough has made both gradients, dL/dW and dL/dS
        # </method>

        nn.utils.clip_grad_norm_(parameters, args.clip)     # one norm of all gradients
        optimizer.step()

        # <method: after step>
        # nothing: the masked weights are still in the model, only not in its forward pass
        # </method>

        # ---- log line
        done = step + 1
        seconds = time.time() - started
        if rank == 0 and (done % 50 == 0 or done == args.steps):
            line = dict(step=done, loss=loss.item(), penalty=penalty.item(), goal=v,
                        kept=common.count_kept(model)[1], lr=args.lr * factor, seconds=seconds)
            print("  ".join(f"{name} {x:.6g}" for name, x in line.items() if x is not None),
                  f" of about {seconds / done * args.steps:.0f}", flush=True)
            with open(log, "a") as file:
                print(json.dumps(line), file=file)
            if not torch.isfinite(loss):
                raise SystemExit(f"the loss is {loss} at step {done}: give a smaller --lr")

        # ---- checkpoint: under another name first, so that it is whole or not there
        if rank == 0 and done % args.checkpoint_every == 0:
            torch.save(dict(model=model.state_dict(), optimizer=optimizer.state_dict(),
                            step=done, seconds=seconds), out / "checkpoint.part")
            os.replace(out / "checkpoint.part", checkpoint)

    # <method: bake>
    # The last step has moved the scores, so they are ranked once more, at v_f. Then W * M becomes
    # the plain weight of a plain nn.Linear: only now is the model pruned for whoever opens it.
    goal = args.sparsity
    update_masks(masked, scores, goal, args.scope)
    for layer in layers.values():
        parametrize.remove_parametrizations(layer, "weight")
    # </method>

    # ---- save; what is counted and evaluated is what the folder holds
    if world > 1:
        torch.distributed.destroy_process_group()
    if rank > 0:
        os._exit(0)                 # a plain return frees DDP, and torch can hang there
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    model = type(model).from_pretrained(out).to(device)
    kept_per_layer, kept, n_prunable = common.count_kept(model)
    with autocast:
        metrics, collapsed = data.evaluate(model)
    total = time.time() - started
    shown = " ".join(f"{name} {value:.1f}" for name, value in metrics.items())
    line = (f"RESULT {method} {args.task} keeps {kept:.2%} (prunes {1 - kept:.2%}) {shown} | "
            f"{args.steps} steps {total:.0f} s seed {args.seed} | {out}")
    missed = goal is not None and abs(kept - goal) > min(0.001, 0.05 * goal)
    if missed:
        line += f" | MISSED the goal of {goal:.2%}"
    (out / "result.json").write_text(json.dumps(dict(
        method=method, task=args.task, metrics=metrics, collapsed=collapsed,
        kept=kept, kept_per_layer=kept_per_layer, n_prunable=n_prunable,
        n_train=len(data.train), n_dev=data.n_dev,
        seconds=total, ms_per_step=1000 * seconds / args.steps,
        device=str(device), card=card, precision=precision, threads=torch.get_num_threads(),
        peak_memory=torch.cuda.max_memory_allocated() if device.type == "cuda" else None,
        versions={module.__name__: module.__version__ for module in (torch, transformers, np)},
        args=vars(args) | {"out": str(out), "goal": goal}, line=line), indent=1))
    checkpoint.unlink(missing_ok=True)
    print(line)
    if collapsed:
        print("COLLAPSED: all answers alike. Try more steps, another --lr or method (results/why/)")
    if missed:
        sys.exit(3)


if __name__ == "__main__":
    main(flags().parse_args())

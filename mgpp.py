"""Mixture Gaussian prior pruning (MGPP) of BERT.

Paper: Zhang, Sun and Liang 2024, arXiv 2411.00969. First author's code: MingxuanZhangPurdue/PTMGP
at b3700cc02f, pruners/MWA.py, class MWA.

Before training we assume that most weights are close to 0 and some are not. We write this
assumption, the prior, as a weighted sum of two normal densities centred on 0: a narrow spike and a
wide slab. Training looks for the most probable weights, given the data and the prior. So a weight
inside the spike, that is, so small that the spike's term of the sum is the larger one, is pulled
strongly towards 0, and a larger weight barely at all. At intervals the weights of smallest |w|,
ranked over all matrices together, are set to 0, more of them each time. (The spike is so narrow
that before training hardly one weight in a thousand lies in it: zeroing puts weights there.) The
hope: the spike holds these weights near 0 and the slab leaves the others free, so little is lost.

    pi(w)    = lam p(w; s1) + (1 - lam) p(w; s0)      p(w; s): normal density at w, variance s
    g(w)     = (1 - lam) p(w; s0) / pi(w)             the spike's share of the density at w
    pull(w)  = -d log pi / dw = w (g / s0 + (1 - g) / s1)
    gradient = dL/dw + pull(w) / n                    what AdamW gets, up to the last zeroing
    v        = v_f + (v_i - v_f) (1 - (t - t_i T) / (T - t_i T - t_f T))^3

    w            one of the N prunable weights: those of the six matrices, (out, in) each, of each
                 encoder layer (magnitude.py names them)
    v            fraction left by a zeroing after t of T steps: it falls from v_i to v_f, which is
                 --sparsity, the fraction KEPT. v_i is 0.7 (0.5 for SQuAD and QNLI under the paper
                 preset), or v_f if that is larger. t_i and t_f are fractions of the run, 0.05 and
                 0.3 in the mini preset
    lam          the slab's share of the prior (not of the weights kept): 0.1 until t_i T, then
                 linearly down to 1e-4 at T - t_f T, as in the author's code. This changes little:
                 on mini the spike's edge goes from 5e-5 to 6e-5. --mix fixes lam; --mix 1 is plain
                 L2
    s0, s1       variances of spike and slab: --spike and --slab, 1e-10 and 0.05 on mini (standard
                 deviations of 1e-5 and 0.22)
    L            the loss, a mean of n terms, which each step estimates from a batch
    n            number of training examples (windows of text on SQuAD). If your loss is a mean over
                 tokens, as a language model's is, n is the number of tokens in all training data

The first zeroing comes after t_i T steps, the last after T - t_f T steps. In between there is one
whenever t is a multiple of --interval. A zeroed weight is not masked: the next step moves it off 0
again, and the next zeroing removes it again unless it has grown enough by then. The pull can keep
it in the spike only if AdamW's steps are shorter than the distance from 0 to the spike's edge. On
mini that distance is 5e-5, and lr, the length of a usual step, 5e-4 at its peak. (Under the paper
preset lr is 5e-5, and the distance 5e-5 with --spike 1e-10, 1.5e-4 with 1e-9.) After the last
zeroing the gradient is dL/dw alone, and the zeros are put back after each step. (With the paper's
t_f of 0 the run ends there.)

Does the spike help? Not in our runs. On mini's squad (the made-up questions in mini/) with 10 %
kept and lr 5e-4, F1 is 81.6 (82, 79, 83) with the spike and 87.0 (87, 87, 88) with --mix 1, plain
L2; three seeds each, on one machine. With 3 % kept, and on the real SST-2 (one seed), we saw no
clear difference. In the mini run that we looked into, the spike hardly holds weights in the first
half, since a step goes beyond its edge. Instead it throws some out: between two zeroings up to 1 %
of all weights move by more than ten lr. A weight that a step leaves inside the spike, but not at 0,
gets one huge gradient. AdamW answers with a step of one to two lr, past 0, and momentum makes that
about ten times as long. Towards the last zeroing the spike does hold weights: steps get short, as
lr falls and as AdamW's second moment still remembers the huge gradients. Which of these costs the
five points, if any, we have not tested.

What does help is the slab, weak as its pull is. On mini with 3 % kept and --lr 2e-3, seed 0, F1 is
93.1 with spike and slab, 92.5 with the slab alone (--mix 1), and 78.6 without a prior (--mix 1
--slab 1e9). At 5e-4, mini's own rate, all three are lower; the last falls furthest by far. Our
reading: AdamW divides each step by the recent size of the gradients, so the pull shrinks, and
zeroing then removes, those weights most that the loss hardly feels. A high --lr helps, too: on
SQuAD (a BERT of six layers, 2,800 steps, 10 % kept, one seed) F1 was 38.6 at 1e-4, 55.4 at 2e-4 and
67.0 at 4e-4. (results/README.md, results/why/README.md)

Unlike magnitude.py: zeros are written into the weights, which go on learning; all matrices are
always ranked together, a matrix may lose all its weights, and no gradient is clipped. Unlike the
author's code: exactly round(v N) weights remain, and fine-tuning freezes the embeddings, as in the
other files. The author's scripts changed over time; this file follows those of Feb 2024. In the
comments, "Official" means the author's code, except where it names masked_run_squad.py or
binarizer.py: these belong to movement pruning's code (see magnitude.py).

    python mgpp.py --task squad --sparsity 0.1

Without CUDA, this runs on the made-up data in mini/, where the F1 of a model without pruning is 99
and that of a guesser 13.5. The last line begins (above, seed 0 had F1 82 on another machine, where
rounding differs):

    RESULT mgpp squad keeps 10.00% (prunes 90.00%) EM 76.8 F1 78.1 | 1000 steps ..
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
import math

# </method>
import common

# <method: definitions>
# ---- when, and how much

# Why gradually? A pruned weight takes its share of the work with it, and the other weights need
# some steps to take that over. Why a cubic? Zhu and Gupta (1710.01878) chose it because it is steep
# at first, when many weights are of little use, and flat at the end, when each pruned weight is
# missed. Why wait for a first part of the run, t_i, and rest for a last part, t_f? The model first
# has to learn its task, and at the end the weights that are left get time to adapt.
# Official: masked_run_squad.py, lines 72-92. There t_i and t_f are numbers of steps that do not
# grow with the run, so a short run ends before pruning starts. (Under the paper preset t_f is 0
# here, as in MGPP's own scripts. mini rests, as in the other five.) Only the cubic's shape
# is used here: fraction_left, below, lets it fall from v_i to v_f.
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


# Official: MWA.py, lines 189-206. There the first zeroing comes after t_i T + 1 steps.
def fraction_left(step, steps, v_f, t_i, t_f, v_i):
    """v, the fraction left by a zeroing after `step` steps: from v_i at t_i down to v_f.

    If v_i is below v_f, each zeroing leaves v_f. 1 before t_i: a zeroing comes that early only if
    the cubic part is shorter than a step.
    """
    if step < t_i * steps:
        return 1.0
    # with 0.0 for its v_f, schedule goes from 1 down to 0
    return v_f + (max(v_i, v_f) - v_f) * schedule(step, steps, 0.0, t_i, t_f)


# Official: MWA.py, lines 114-126.
def mixing_weight(step, steps, t_i, t_f):
    """lam, the slab's share: it falls linearly from 0.1 at t_i to 1e-4 at 1 - t_f.

    Like schedule's cubic, this ramp is at least one step long.
    """
    done = (step - t_i * steps) / max(1.0, (1 - t_i - t_f) * steps)
    return 0.1 + (1e-4 - 0.1) * min(max(done, 0.0), 1.0)


# ---- the prior

# Training minimises
#     -log posterior = (sum of the losses of n examples) - (sum of log pi(w) over all w) + constant
# L is the mean of these losses, so we divide everything by n: the gradient is dL/dw + pull(w) / n.
# (With --teacher, L is no longer the -log of a likelihood; the pull stays the same. On SQuAD
# transformers' L is the mean of start's and end's loss, half of their -log likelihood: there the
# prior counts double.)
#
# The spike's share, by Bayes' rule, is g = (1 - lam) p(w; s0) / pi(w). Divide the numerator and the
# denominator by the numerator: g = 1 / (1 + exp(c1 + c2 w^2)), with
#     c1 = log(lam / (1 - lam)) + log(s0 / s1) / 2      c2 = 1 / (2 s0) - 1 / (2 s1)
# Alone, each density would pull with w / (its variance). Mix the two in the shares g and 1 - g:
#     pull = w (g / s0 + (1 - g) / s1) = w (1 / s1 + g (1 / s0 - 1 / s1))
# The spike's edge is where the two terms of pi are equal. With s0 = 1e-10 and s1 = 0.05 that is at
# |w| = 4.9e-5 for lam = 0.1, and at 6.2e-5 for lam = 1e-4. Well inside, the pull is w / 1e-10. Near
# the edge it reaches hundreds of thousands (the gradient gets this divided by n). From 1e-4 on it
# is w / 0.05.
# Official: MWA.py, lines 128-145.
def prior_gradient(w, lam, s0, s1):
    """pull(w) = -d log pi / dw for pi(w) = lam p(w; s1) + (1 - lam) p(w; s0), 0 < lam <= 1.

    p(w; s): the normal density, mean 0, variance s. w: any shape; the result has the same.
    """
    if lam == 1:
        return w / s1                                   # no spike, plain L2; c1 would be infinite
    c1 = math.log(lam / (1 - lam)) + 0.5 * math.log(s0 / s1)
    c2 = 0.5 / s0 - 0.5 / s1
    g = torch.sigmoid(-c1 - c2 * w * w)
    return w * (1 / s1 + g * (1 / s0 - 1 / s1))


# ---- which weights stay

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


# Official: MWA.py, lines 147-169. There every weight that ties with the smallest kept one stays.
@torch.no_grad()
def zero_smallest(weights, v):
    """Zero the weights of smallest |w|, over all matrices: round(v N) of N remain, at least one.

    weights: one tensor (out, in) per matrix, changed in place. A matrix may lose all its weights.
    """
    magnitudes = torch.cat([w.flatten() for w in weights]).abs_()       # (N,)
    remains = top_v(magnitudes, v).split([w.numel() for w in weights])
    for w, stays in zip(weights, remains):
        w.mul_(stays.view_as(w))
# </method>

# <method: hyper-parameters>
# Under paper, the values of a task that has a line of its own below (also where inherited) are the
# paper's, from its table and the author's scripts. Those of the other tasks, and of mini, are ours.
# "*" holds for all tasks; a task's own values override it.
MINI = dict(
    model=str(common.MINI / "bert"),
    data=str(common.MINI),
    steps=1000, batch_size=32, lr=5e-4,
    length=128,                     # the most tokens in one input
    warmup=0.05,                    # the fraction of the steps in which lr rises
    lr_end=0.0,                     # the fraction of its peak that is left after the last step
    clip=1e30,                      # so high that nothing is clipped
    t_i=0.05, t_f=0.3,              # fractions of the run: before the first zeroing, after the last
    # v_i: fraction left by the first zeroing. spike, slab: variances. interval: zeroings come at
    # its multiples. adam: AdamW's betas and eps; on mini, and for squad under paper, torch's
    # defaults, as in the other five scripts. (A list, because --resume compares them with JSON's.)
    v_i=0.7, spike=1e-10, slab=0.05, interval=10, adam=dict(betas=[0.9, 0.999], eps=1e-8)
)
PAPER = MINI | dict(
    model="bert-base-uncased",
    data="data",
    steps=None, epochs=6, lr=5e-5,
    length=512, warmup=0.0, lr_end=0.1, t_i=0.1, t_f=0.0, interval=100,
    adam=dict(betas=[0.9, 0.98], eps=1e-6)
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
                      t_i=0.2, v_i=0.5, adam=MINI["adam"]),
        "mnli": dict(epochs=8, t_i=0.125),
        "qqp": dict(epochs=10, t_i=0.2),
        "qnli": dict(epochs=10, t_i=0.2, v_i=0.5, spike=1e-9),
        "sst2": dict(lr_end=0.01, t_i=0.08, spike=1e-9, slab=0.1, interval=10)
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
    add("--mix", type=number(float, high=1), help="lam, constant; 1: plain L2")
    add("--spike", type=number(float), help="variance of the spike")
    add("--slab", type=number(float), help="variance of the slab")
    add("--interval", type=number(int), help="weights are zeroed at its multiples")
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
    weights = [layer.weight for layer in layers.values()]   # W: (out, in) each, pruned in place
    groups[0] |= args.adam                  # betas and eps: a group's win over the optimizer's
    begin = math.ceil(args.t_i * args.steps)                # steps done at the first zeroing
    end = round((1 - args.t_f) * args.steps)                # and at the last
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
        # Only decided here, for the slots below; the zeroing comes after the optimizer's step.
        t = step + 1                                        # steps done by then
        pulls = t <= end                                    # up to the last zeroing
        due = t in (begin, end) or (begin < t < end and t % args.interval == 0)
        v = None            # no zeroing after this step, so no fraction to reach now
        if due or not pulls:                                # not pulls: only for the log
            v = fraction_left(t, args.steps, args.sparsity, args.t_i, args.t_f, args.v_i)
        # </method>

        with autocast:
            loss = task_loss(net, batch, teacher)

        # <method: penalty>
        penalty = torch.tensor(0.0)                     # none: the prior joins in the next slot
        # </method>

        optimizer.zero_grad()
        (loss + penalty).backward()

        # <method: gradient>
        # The pull joins dL/dW before the optimizer, so it enters AdamW's moments together with the
        # loss's gradient. (AdamW's own weight decay would bypass them.) Adding the penalty
        # -(sum of log pi(w)) / n to the loss would do the same; adding its gradient is shorter.
        # The pull ends with the last zeroing, since zeros are held from then on (ours: the paper's
        # run ends there).
        # Nothing is clipped (clip is 1e30): the pull is large, and clipping would shrink the loss's
        # gradient together with it.
        if pulls:
            # `step`, not t: the pull acts on the weights as `step` steps have left them
            lam = args.mix or mixing_weight(step, args.steps, args.t_i, args.t_f)
            for w in weights:
                pull = prior_gradient(w.detach(), lam, args.spike, args.slab)
                w.grad.add_(pull, alpha=1 / len(data.train))                    # 1 / n
        else:
            remains = [w != 0 for w in weights]             # for "after step": AdamW moves the 0s
        # </method>

        nn.utils.clip_grad_norm_(parameters, args.clip)     # one norm of all gradients
        optimizer.step()

        # <method: after step>
        # After AdamW's step, so that the next forward pass sees the zeros. A zeroed weight still
        # has a gradient, and AdamW's moments are not reset: the next step moves it off 0 again.
        # After the last zeroing, each such move is undone at once.
        if due:
            zero_smallest(weights, v)
        if not pulls:
            for w, stays in zip(weights, remains):
                w.data.mul_(stays)
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
    # The zeros are in the weights already. But if T - t_f T was rounded down, or the cubic part is
    # shorter than a step, v was still above v_f at the last zeroing, and too many weights are left.
    goal = args.sparsity
    zero_smallest(weights, goal)
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

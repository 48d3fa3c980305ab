"""L0 regularisation of BERT with hard concrete gates.

Papers: Louizos, Welling and Kingma 2017, arXiv 1712.01312, as used by Sanh, Wolf and Rush 2020,
arXiv 2005.07683. Official code: AMLab-Amsterdam/L0_regularization, at 39a5fe6, and
huggingface/transformers-research-projects, movement-pruning, at fccd0cdab0.

We would like to minimise the number of weights that are not 0, but a count has no gradient. So each
weight is multiplied by a random gate z. A learned score S, the log alpha of Louizos et al., sets
the probability that the gate is open (z > 0). This probability has a gradient, by which a penalty
pushes all scores down (by default also up, once too little is kept in all). Where dL/dW' * W is
negative, more of W would lower the loss, and the loss's gradient pushes S up. Weights stay where
this push outweighs the penalty.

    q  = sigmoid((y + S) / beta)             y: logistic noise, drawn anew at each step
    z  = clamp(q (zeta - gamma) + gamma, 0, 1)      q stretched to (gamma, zeta), then cut
    W' = W * z                               the matrix of the forward pass
    P  = P(z > 0) = sigmoid(S - beta log(-gamma / zeta))
    E  = P averaged in each matrix, then over the matrices
    minimise  L + mu1 h + mu2 h^2            or, with --penalty LAMBDA, L + LAMBDA E
    gradient of W: dL/dW' * z    gradient of S: dL/dW' * W * dz/dS, plus the penalty's

    W, L         as in magnitude.py: a weight matrix (out, in), and the loss
    S            scores, (out, in), 2.197 at the start, where sigmoid(S) is 0.9 and P is 0.98
    beta         temperature, 2/3: the smaller it is, the more draws of z are exactly 0 or 1
    gamma, zeta  -0.1 and 1.1
    v            fraction to keep at this step: falls from 1 to --sparsity, the fraction KEPT in the
                 end, by schedule()
    share        fraction of all prunable weights with S > -2.398: open in counting and saving
    h            share / v - 1, how far share is above v, relative to v (`excess` in the code). A
                 count has no gradient, so the backward pass uses the gradient of E / v
    mu1, mu2     what h and h^2 weigh, 0 at the start. After each step mu1 += 2 h, mu2 += 60 h^2

Why noise? A gate that is shut passes no gradient of the loss. With noise it opens now and then, so
its weight can come back. Counting and saving use neither noise nor beta: there q = sigmoid(S), and
the gate is open where S exceeds log(-gamma / zeta) = -2.398. What is saved is W * z with this z.
Why without beta? Only because both official codes do so. With q = sigmoid(S / beta) the threshold
would be -1.6, where P is 0.5. At -2.398 P is 0.31: share also counts gates that are shut in most
draws. So share differs from E in two ways: it takes 0 or 1 instead of P, with 1 from P = 0.31 on;
and in share each weight counts the same, in E each matrix.

Sanh et al. minimise L + lambda E with a constant lambda, and keep the weights whose gates are open
at the end, however many these are. `--penalty LAMBDA` does that; v then plays no part. (In their
runs on SQuAD, without a teacher, a LAMBDA of 175 kept 9.8 %, and 600 kept 2.9 %.) By default you
choose the fraction kept, and two multipliers steer share to v, as in the augmented Lagrangian of
Wang, Wohlwend and Lei 2020, arXiv 1910.04732. mu1 grows while share is above v and falls while it
is below. mu2 h^2 presses harder the larger the gap is; together they push a score with the gradient
of E times (mu1 + 2 mu2 h) / v. Ours: h counts gates and is relative to v, v falls by magnitude.py's
cubic, and the step sizes are 2 and 60. They are so large because E's gradient in one of N scores is
below 1 / N: times the multipliers, it has to hold its own against the loss's gradient in that
score, and against Adam's eps.

Unlike in mvp.py, the gate is random and takes any value from 0 to 1, the threshold is fixed, and no
matrix has a count of its own: any may lose all its weights. Louizos et al. have one gate per input
neuron, clamp S, add an L2 penalty on W, and keep a running average of W; the movement code does
none of this, nor does this file.

A run needs enough steps for the scores to fall. On mini, at a goal of 3 %, a run of 100 steps ended
with 72 % of the gates still open, one of 300 steps with 2.95 %. At the end close_gap switches gates
until the goal is met: in the run of 100 steps it shuts gates that are wide open, and the run says
so.

    python l0.py --task squad --sparsity 0.03

Without CUDA, this runs on the made-up data in mini/, where the F1 of a model without pruning is 99
and that of a guesser 13.5. The last line begins:

    RESULT l0 squad keeps 3.00% (prunes 97.00%) EM 82.8 F1 83.1 | 1000 steps ..
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

from torch.nn.utils import parametrize

# </method>
import common

# <method: definitions>
# ---- v, how many weights stay; and top_v, which only close_gap needs, at the end

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


# As in mvp.py. (Official there: binarizer.py, lines 95-103. Neither official L0 code ranks: here
# only close_gap does.)
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


# ---- the gate

BETA, GAMMA, ZETA = 2 / 3, -0.1, 1.1                    # temperature; ends of the interval
THRESHOLD = math.log(-GAMMA / ZETA)                     # -2.398: without noise z > 0 for S above it


# q lies in (0, 1), so it is never exactly 0. We stretch it to (-0.1, 1.1) and clamp the result to
# [0, 1]. So in some draws z is exactly 0 or exactly 1 ("hard"). In between it is a smooth function
# of S ("concrete", a continuous stand-in for a 0/1 variable). In a draw where z is clamped, dz/dS
# is 0, and the score learns from the penalty alone. y = log u - log(1 - u), with u uniform in
# (1e-4, 1 - 1e-4). (Louizos et al. do the same with 1e-6 instead of 1e-4. The movement code draws
# u in (0, 1) and clamps it to [1e-4, 1 - 1e-4].)
# Official: masked_nn.py, lines 94-102; l0_layers.py, lines 90-104.
def gate(scores, noise=None):
    """The hard concrete gate z, in [0, 1]. scores, noise and z all have the shape (out, in)."""
    if noise is None:
        q = torch.sigmoid(scores)                       # no beta either, as in both official codes
    else:
        q = torch.sigmoid((noise + scores) / BETA)
    return (q * (ZETA - GAMMA) + GAMMA).clamp(0, 1)


# How likely is z > 0? z > 0 means q > x, with x = -gamma / (zeta - gamma). Undo the sigmoid on
# both sides: (y + S) / beta > log(x / (1 - x)) = log(-gamma / zeta). So y must exceed
# c = beta log(-gamma / zeta) - S. It does so with probability sigmoid(-c), if we ignore that u
# stops short of 0 and 1. Hence P(z > 0) = sigmoid(S - BETA * THRESHOLD).
# Official: masked_run_squad.py, lines 95-106 and 323-324.
def expected_l0(scores):
    """E: P(z > 0) averaged in each matrix, then over the matrices. scores: (out, in) each."""
    return torch.stack([torch.sigmoid(s - BETA * THRESHOLD).mean() for s in scores]).mean()


class Gated(nn.Module):
    """A parametrization: the layer computes with W' = W * z, and its scores learn through z.

    noise is y: the slot "before forward" draws it.
    """

    def __init__(self, weight):
        super().__init__()
        self.scores = nn.Parameter(torch.full_like(weight, 2.197))      # S: (out, in)
        self.register_buffer("noise", torch.zeros_like(weight), persistent=False)   # (out, in)

    def forward(self, weight):
        # No noise under no_grad: in common.count_kept, and to save W * z. Both come while the model
        # is in train mode, so self.training could not tell. (If you add gradient checkpointing, set
        # use_reentrant=False. Otherwise its first pass runs without gradients, and so without
        # noise.)
        return weight * gate(self.scores, self.noise if torch.is_grad_enabled() else None)


# ---- steering: how many gates are open, and how the last gap to the goal is closed

def open_gates(scores):
    """How many gates are open without noise. A 0-dim tensor: Python need not wait for the GPU."""
    return sum(torch.count_nonzero(s > THRESHOLD) for s in scores)


def share_kept(scores):
    """The fraction of all weights whose gate is open without noise, as a float."""
    return float(open_gates(scores)) / sum(s.numel() for s in scores)


@torch.no_grad()
def close_gap(scores, v):
    """Move the scores nearest to the threshold just across it: round(v N) of all N then exceed it.

    (One, if that is 0.) Afterwards every score is at least 0.001 away from the threshold, so that
    rounding in gate() cannot make z 0 where S is above it. Returns how many more gates are open
    than before; a negative number if fewer are.
    """
    before = int(open_gates(scores))
    stays = top_v(torch.cat([s.flatten() for s in scores]), v)          # (N,)
    for s, keep in zip(scores, stays.split([s.numel() for s in scores])):
        above = s.clamp(min=THRESHOLD + 1e-3)
        below = s.clamp(max=THRESHOLD - 1e-3)
        s.copy_(torch.where(keep.view_as(s), above, below))
    return int(open_gates(scores)) - before
# </method>

# <method: hyper-parameters>
# Under paper, the values of squad, mnli and qqp (also where inherited from MINI) are Sanh et al.'s,
# from their run sheet and scripts, unless marked as ours. Those of the other tasks, and of mini,
# are ours. "*" holds for all tasks; a task's own values override it.
# In the authors' L0 runs t_i and t_f do nothing, as lambda is constant there; here they shape v.
MINI = dict(
    model=str(common.MINI / "bert"),
    data=str(common.MINI),
    steps=1000, batch_size=32, lr=5e-4,
    length=128,                     # the most tokens in one input
    warmup=0.05,                    # the fraction of the steps in which lr rises
    lr_end=0.0,                     # the fraction of its peak that is left after the last step
    clip=1.0,                       # the norm to which all gradients together are clipped
    t_i=0.05, t_f=0.3,              # fractions of the steps: before v falls, and after its fall
    # score_lr: peak learning rate of the scores; ascent, ours: the step sizes of mu1 and mu2
    score_lr=1e-1, ascent=[2.0, 60.0]
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
                      warmup=0.1, t_i=0.1, t_f=0.1),
        "mnli": dict(warmup=0.16, t_i=0.16, t_f=0.16),
        "qqp": dict(epochs=10, lr=3e-6, score_lr=1e-2, warmup=0.1, t_i=0.1, t_f=0.1)
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
    add("--penalty", type=number(float), metavar="LAMBDA",
        help="constant lambda, as in the paper: it decides what is kept, not --sparsity or --t_i. "
             "Give --out: its default is named after --sparsity")
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
    # Once m is registered, each read of layer.weight calls m.forward, and gets W * z.
    # W itself stays the parameter that is in `groups` already. The scores are added below.
    gated = [Gated(layer.weight) for layer in layers.values()]
    for layer, m in zip(layers.values(), gated):
        parametrize.register_parametrization(layer, "weight", m)
    scores = [m.scores for m in gated]                  # S: (out, in) each
    # In mvp.py only the order of the scores counts. Here their values count: the threshold is
    # fixed, and to shut its gate a score has to fall from 2.197 to -2.398 within the run. So the
    # rate is ten times mvp.py's (but on the real QQP, a long run, the same). Weight decay would
    # pull all scores to 0, where gates are open: keep it at 0 where you copy this slot.
    groups.append({"params": scores,
                   "lr": args.score_lr, "initial_lr": args.score_lr, "weight_decay": 0.0})
    # The multipliers are tensors, so that Python need not wait for their values in any step. They
    # are float64, because each is a sum of very many small terms. As buffers of the model they are
    # part of its checkpoints, until "bake" deletes them.
    for name in ("mu1", "mu2"):
        model.register_buffer(name, torch.zeros((), dtype=torch.float64, device=device))
    generator = torch.Generator(device)
    # </method>

    # ---- the run's folder
    if rank == 0 and not args.resume:
        out.mkdir(parents=True, exist_ok=True)
        checkpoint.unlink(missing_ok=True)
        (out / "result.json").unlink(missing_ok=True)
        log.write_text(json.dumps(dict(step=0, seconds=0.0, args=settings)) + "\n")

    # <method: before the loop>
    if args.penalty is not None:
        print("--penalty decides what is kept: --sparsity is no goal of this run")
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
        # Noise before the forward pass: this step's loss is that of one draw of gates. The draw
        # depends on (seed, step) alone, so it is the same in all processes and in a resumed run. On
        # a GPU 2^32 gives it another seed than dropout's. (A CPU's generator reads only the lower
        # 32 bits: with one process, noise and dropout start there from the same random numbers. We
        # know of no harm from that. To change it would change the measured results.)
        v = schedule(step, args.steps, args.sparsity, args.t_i, args.t_f)
        generator.manual_seed(2**32 + args.seed * 1_000_003 + step)
        for m in gated:
            m.noise.uniform_(1e-4, 1 - 1e-4, generator=generator)       # u
            m.noise.logit_()                                            # y = log u - log(1 - u)
        # </method>

        with autocast:
            loss = task_loss(net, batch, teacher)

        # <method: penalty>
        # If you accumulate gradients, add the penalty once per step, not once per micro-batch.
        expected = expected_l0(scores)                  # E
        if args.penalty is not None:
            penalty = args.penalty * expected           # E has a gradient of its own
            v = None                                    # an outcome, not a goal
        else:
            # A straight-through estimate: the forward pass uses a count, and the backward pass uses
            # the gradient of E. (Adding E and subtracting E.detach() leaves the value as it
            # is, but for rounding, and gives it the gradient of E.)
            share = open_gates(scores) / sum(s.numel() for s in scores)
            excess = (share + expected - expected.detach()) / v - 1     # h
            penalty = model.mu1.float() * excess + model.mu2.float() * excess ** 2
        # </method>

        optimizer.zero_grad()
        (loss + penalty).backward()

        # <method: gradient>
        # nothing: autograd has gone through the gate
        # </method>

        nn.utils.clip_grad_norm_(parameters, args.clip)     # one norm of all gradients
        optimizer.step()

        # <method: after step>
        # Gradient ascent on the multipliers, with the h that was in the penalty. While too much is
        # kept, mu1 grows, and the penalty presses harder. While too little is kept, mu1 falls,
        # below 0 if need be. mu2 only grows, so later gaps weigh more.
        if args.penalty is None:
            model.mu1 += args.ascent[0] * excess.detach().double()
            model.mu2 += args.ascent[1] * excess.detach().double() ** 2
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
    # In a run that is long enough, steering brings share close to the goal. close_gap does the
    # rest: it moves the scores nearest to the threshold just across it. A gate that it opens gets a
    # z of about 0.0001. A gate that it shuts had a z near 0, if few had to be shut. So W * z hardly
    # changes. Then W * z becomes the plain weight of a plain nn.Linear (torch reads it without
    # gradients, so Gated.forward adds no noise).
    goal = None
    if args.penalty is None:
        goal = args.sparsity
        was = share_kept(scores)
        moved = close_gap(scores, goal)
        print(f"{was:.2%} of the gates were open; {abs(moved)} were switched to meet the goal")
        if abs(was - goal) > 0.1 * goal:
            print("more than a tenth of those kept: the run may be too short, give more --steps")
    for layer in layers.values():
        parametrize.remove_parametrizations(layer, "weight")
    del model.mu1, model.mu2
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

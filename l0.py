"""L0 regularisation of BERT with hard concrete gates, in one file.
Louizos, Welling and Kingma 2017, arXiv 1712.01312, as used by Sanh, Wolf and Rush 2020, arXiv
2005.07683. Official code: AMLab-Amsterdam/L0_regularization;
huggingface/transformers-research-projects, movement-pruning, at fccd0cdab0.

Idea: the number of weights that are not 0, their L0 norm, has no gradient. So each weight gets a
random gate z. A learned score S, the paper's log alpha, sets the probability that z is 0; this
probability has a gradient.
    y = log u - log(1 - u)                           noise; u is uniform in (1e-4, 1 - 1e-4)
    q = sigmoid((y + S) / beta)                      in (0, 1)
    z = clamp(q (zeta - gamma) + gamma, 0, 1)        stretched to (gamma, zeta), then cut
    a = (W * z) x                                    dz/dS is 0 where z is cut to 0 or 1
How likely is z > 0? It is the case where q > x = -gamma / (zeta - gamma). Undo the sigmoid on both
sides: (y + S) / beta > log(x / (1 - x)) = log(-gamma / zeta). And y exceeds a number c with
probability sigmoid(-c), if we overlook the cut ends of u. Therefore
    P(z > 0) = sigmoid(S - beta log(-gamma / zeta))
    E        = mean over matrices of the mean of P(z > 0) in the matrix
To count, to evaluate and to save (torch's gradients are off then) there is neither noise nor beta:
z = clamp(sigmoid(S) (zeta - gamma) + gamma, 0, 1). It is above 0 where S exceeds the threshold
log(-gamma / zeta) = -2.398. W * z is what is saved.
--penalty LAMBDA is the paper's way: minimise L + LAMBDA E (L is the loss) from the first step, and
what is kept follows. Without it an augmented Lagrangian (Wang, Wohlwend and Lei 2020, arXiv
1910.04732) steers k, the fraction of all N weights whose S exceeds the threshold, to v:
    h = k / v - 1,   minimise L + mu1 h + mu2 h^2,   after the step mu1 += 2 h and mu2 += 60 h^2
Both multipliers start at 0; mu1 may become negative. k is a count and has no gradient: h gets its
value from k and its gradient from E / v. At the end the scores nearest to the threshold are set
just across it, 0.001 beyond, so that round(v N) are kept; where they were near, z stays about 0.

Symbols
    weight      W               (out, in), one of the six matrices of an encoder layer
    scores      S, log alpha    (out, in), 2.197 at the start, where P(z > 0) = 0.98
    noise       y               (out, in), drawn anew at each step, the same on every GPU
    BETA, GAMMA, ZETA           2/3, -0.1, 1.1
    kept        k               fraction kept. excess: h. mu1, mu2: the multipliers
    v           v               fraction to keep at this step, on magnitude.py's cubic
Unlike mvp.py: the gate is random, takes any value from 0 to 1, and has a true gradient. The
threshold is fixed, and a penalty steers what is kept. Unlike soft_mvp.py no matrix has a floor.
Differs from Louizos et al., as the movement code does: a gate for each weight, not for each input
neuron; log alpha is not clamped; no L2 penalty on W; no averaging of W over steps. u is drawn
inside its interval, as theirs; the movement code clamps it. Ours: the steering, with its 2 and 60.

Run (measured results: results/README.md)
    python l0.py --task squad --sparsity 0.03          mini/'s small BERT, minutes on a CPU
    python l0.py --penalty 300 --out out/open          the open loop; --preset paper: BERT-base
Last line: RESULT l0 squad keeps 3.00% (prunes 97.00%) EM .. F1 .. | ..
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
import math

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
# score_lr: peak learning rate of the scores. ascent: step sizes of mu1 and mu2, ours.
# length: tokens in a text. clip: the norm to which all gradients together are clipped.
MINI = dict(
    model=str(common.MINI / "bert"),
    data=str(common.MINI),
    steps=1000, batch_size=32, lr=5e-4,
    length=128, warmup=0.05, lr_end=0.0, clip=1.0,
    t_i=0.05, t_f=0.3,
    score_lr=1e-1, ascent=(2.0, 60.0)
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


BETA, GAMMA, ZETA = 2 / 3, -0.1, 1.1           # temperature, and the ends of the stretched interval
THRESHOLD = math.log(-GAMMA / ZETA)             # -2.398: without noise, z > 0 where S is above it


def gate(scores, noise=None):
    """The hard concrete gate z in [0, 1], (out, in); noise, log u - log(1 - u), is for training."""
    if noise is None:
        q = torch.sigmoid(scores)               # no temperature either, as in both official codes
    else:
        q = torch.sigmoid((noise + scores) / BETA)
    return (q * (ZETA - GAMMA) + GAMMA).clamp(0, 1)


def expected_l0(scores):
    """The mean over matrices of the mean of P(z > 0) in the matrix."""
    return torch.stack([torch.sigmoid(s - BETA * THRESHOLD).mean() for s in scores]).mean()


@torch.no_grad()
def share_kept(scores):
    """The fraction of all weights that the gate without noise keeps."""
    kept = sum(torch.count_nonzero(s > THRESHOLD) for s in scores)
    return float(kept) / sum(s.numel() for s in scores)


@torch.no_grad()
def close_gap(scores, v):
    """Move the scores nearest to the threshold just across it: round(v N) of all N then exceed it.

    If the gap is small, their gates are about 0 before and after. Returns how many more are kept.
    """
    before = share_kept(scores)
    row = torch.cat([s.flatten() for s in scores])                      # (N,)
    stays = torch.zeros_like(row, dtype=torch.bool)
    stays[row.topk(max(1, round(v * len(row)))).indices] = True
    for s, keep in zip(scores, stays.split([s.numel() for s in scores])):
        above = s.clamp(min=THRESHOLD + 1e-3)
        below = s.clamp(max=THRESHOLD - 1e-3)
        s.copy_(torch.where(keep.view_as(s), above, below))
    return round((share_kept(scores) - before) * len(row))


class Gated(nn.Module):
    """A parametrization: the layer computes with W' = W * z, and its scores learn through z."""

    def __init__(self, weight):
        super().__init__()
        self.scores = nn.Parameter(torch.full_like(weight, 2.197))      # S: (out, in)
        self.register_buffer("noise", torch.zeros_like(weight), persistent=False)   # (out, in)

    def forward(self, weight):
        # no noise where no gradient is wanted: in counting, in evaluation and when W * z is saved
        return weight * gate(self.scores, self.noise if torch.is_grad_enabled() else None)
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
    gated = []                                          # none if V = 1: dense fine-tuning
    if args.sparsity < 1 or args.penalty:
        gated = [Gated(layer.weight) for layer in layers.values()]
    for layer, m in zip(layers.values(), gated):
        parametrize.register_parametrization(layer, "weight", m)
    scores = [m.scores for m in gated]                                 # S: (out, in) each
    # Ten times faster than in mvp.py (not on QQP): a gate has to go from 2.197 down to -2.398.
    groups.append({"params": scores, "lr": args.score_lr, "initial_lr": args.score_lr,
                   "weight_decay": 0.0})
    state.update(mu1=0.0, mu2=0.0)                                        # the multipliers
    generator = torch.Generator(device)
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
        v = schedule(step, args.steps, args.sparsity, args.t_i, args.t_f)
        # One draw a step, the same on all ranks, from (seed, step) alone.
        generator.manual_seed(args.seed * 1_000_003 + step)
        for m in gated:
            m.noise.uniform_(1e-4, 1 - 1e-4, generator=generator).logit_()
        # </method>

        with autocast:
            loss = task_loss(net, batch, teacher)

        # <method: penalty>
        penalty = torch.tensor(0.0)
        excess = None
        if args.penalty:
            penalty = args.penalty * expected_l0(scores)                # constant, not ramped
            v = None                                                    # an outcome, not a goal
        elif gated:
            expected = expected_l0(scores)
            # the value of the fraction kept, the gradient of E[L0]
            kept = share_kept(scores) + expected - expected.detach()
            excess = kept / v - 1
            penalty = state["mu1"] * excess + state["mu2"] * excess ** 2
        # </method>

        optimizer.zero_grad()
        (loss + penalty).backward()

        # <method: gradient>
        # nothing: the gate has a gradient of its own
        # </method>

        nn.utils.clip_grad_norm_(trained, args.clip)    # one norm over all that is trained
        optimizer.step()

        # <method: after step>
        # Ascent: while too much is kept the push grows. mu2 only grows: later gaps weigh more.
        if excess is not None:
            state["mu1"] += args.ascent[0] * excess.item()
            state["mu2"] += args.ascent[1] * excess.item() ** 2
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
    # The gap that is left is closed; then W * z without noise becomes the weight of an nn.Linear.
    goal = args.sparsity
    if args.penalty:
        goal = None
    elif gated:
        print(f"{close_gap(scores, goal):+d} gates were moved across the threshold")
    if gated:
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

"""Mixture Gaussian prior pruning (MGPP) of BERT, in one file.
Zhang, Sun and Liang 2024, arXiv 2411.00969. First author's code: MingxuanZhangPurdue/PTMGP at
b3700cc02f, class MWA.

Idea: assume before training that most weights are close to 0 and some are not. This prior has a
thin spike at 0 and a wide slab. Training looks for the weights most probable under data and prior
(MAP): the spike holds small weights at 0, and the slab hardly pulls on large ones.
    pi(w) = lam p(w; s1) + (1 - lam) p(w; s0)              p(w; s): normal density, variance s
    g(w)  = 1 / (1 + exp(c1 + c2 w^2))                     = (1 - lam) p(w; s0) / pi(w), by Bayes
    c1    = log(lam / (1 - lam)) + log(s0 / s1) / 2
    c2    = 1 / (2 s0) - 1 / (2 s1)
    -grad log pi(w) = w (g / s0 + (1 - g) / s1)            strong where |w| < 5e-5 or so, else weak
    gradient = dL/dW - (1 / n) grad log pi(W)              both parts go into AdamW's moments
The posterior adds the losses of n training examples and one prior; L is the mean of these losses,
so the prior is divided by n too. lam is 0.1 until t_i T and falls linearly to 1e-4 at T - t_f T.
When are weights zeroed? After t steps: first t = t_i T (rounded up), last t = T - t_f T (rounded),
and between them each t that `interval` divides. The smallest |w| of all matrices together become
0, so that round(v N) of all N weights remain:
    v = v_f + (v_i - v_f) (1 - (t - t_i T) / (T - t_i T - t_f T))^3      v_i = 0.7, or v_f if larger
Until the last zeroing a zeroed weight is free to move. One step later nearly all differ from 0
again (a log line written then says: kept 100 %, no goal), but the next threshold comes before they
have grown past it: in our run hardly one did. At the last zeroing the prior stops, and zeros stay.
Does the spike hold weights at 0? With the mini preset's lr a step of AdamW is 50 of the spike's
standard deviations (1e-5) long. A weight that lands in the spike gets a gradient so large that
AdamW throws it far away. Only late, at a small lr, it stays there. On mini/'s questions the spike
costs five points of F1 at 10 % kept and gains two at 3 %, within the error. (Paper: lr 5e-5.)
The paper proves the prior consistent; that is said of the posterior for large n, not of AdamW.

Symbols
    weight      W               (out, in), one of the six matrices of an encoder layer; N of all
    n           n               training examples; for SQuAD windows of text
    lam         lambda          weight of the slab; --mix fixes it; --mix 1 is plain L2 (g = 0)
    spike, slab s0, s1          the paper's sigma_0^2 and sigma_1^2: 1e-10 and 0.05
    v           v               fraction left by a zeroing, 1 before t_i T; v_f is --sparsity
    t, T        t, T            steps done, from 0; --steps. t_i, t_f: fractions of the run
Unlike magnitude.py: zeros are written into the weights now and then, instead of a mask at each
step; all matrices are ranked together; the prior's gradient is added; no gradient is clipped.
Differs from the author's code: exactly round(v N) remain; embeddings are frozen. --preset paper has
the author's AdamW, text lengths and schedules (on SQuAD and QNLI v_i = 0.5). Theirs also had lambda
1e-7 with sigma_0^2 at 1e-12 (Dec 2023), and 1e-3 (Oct 2024). Which made the tables is not known.

Run (measured results: results/README.md)
    python mgpp.py --task squad --sparsity 0.1         mini/'s small BERT, minutes on a CPU
    python mgpp.py --mix 1 --out out/l2                plain L2; --preset paper: BERT-base
Last line: RESULT mgpp squad keeps 10.00% (prunes 90.00%) EM .. F1 .. | ..
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

# </method>
import common

# ---- flags

# <method: hyper-parameters>
# The paper's table and the author's scripts; the mini preset and other tasks are ours.
# warmup: fraction of the steps in which lr rises. lr_end: fraction of lr left after the last step.
# t_i, t_f: fractions of the steps before pruning begins and after it has ended.
# v_i: fraction kept at the first zeroing. spike, slab: variances. interval: steps between zeroings.
# length: tokens in a text. clip: nothing is clipped. adam: its betas and eps; on mini and squad
# torch's, as in the other five scripts.
MINI = dict(
    model=str(common.MINI / "bert"),
    data=str(common.MINI),
    steps=1000, batch_size=32, lr=5e-4,
    length=128, warmup=0.05, lr_end=0.0, clip=1e30,
    t_i=0.05, t_f=0.3, v_i=0.7,
    spike=1e-10, slab=0.05, interval=10,
    adam=dict(betas=(0.9, 0.999), eps=1e-8)
)
PAPER = MINI | dict(
    model="bert-base-uncased",
    data="data",
    steps=None, epochs=6, lr=5e-5,
    length=512, warmup=0.0, lr_end=0.1,
    t_i=0.1, t_f=0.0, interval=100,
    adam=dict(betas=(0.9, 0.98), eps=1e-6)
)
HYPER = {
    "mini": {
        "*": MINI,
        "mnli": dict(steps=3000),
        "qqp": dict(steps=3000)
    },
    "paper": {
        "*": PAPER,
        "squad": dict(
            epochs=10, batch_size=16, length=384,
            t_i=0.2, v_i=0.5, adam=MINI["adam"]
        ),
        "mnli": dict(epochs=8, t_i=0.125),
        "qqp": dict(epochs=10, t_i=0.2),
        "qnli": dict(epochs=10, t_i=0.2, v_i=0.5,
                     spike=1e-9),
        "sst2": dict(lr_end=0.01, t_i=0.08,
                     spike=1e-9, slab=0.1, interval=10)
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
    add("--mix", type=float, help="weight of the slab, above 0; default: from 0.1 to 1e-4; 1 is L2")
    add("--spike", type=float, help="variance of the spike")
    add("--slab", type=float)                   # variance of the slab
    add("--interval", type=int)                 # steps between two zeroings
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


def progress(step, steps, t_i, t_f):
    """How far pruning has come: below 0 before t_i, 1 from the last zeroing on."""
    length = max(1.0, (1 - t_i - t_f) * steps)
    return min(1.0, (step - t_i * steps) / length)


def fraction_left(step, steps, v_f, t_i, t_f, v_i):
    """v, the fraction left by a zeroing at this step: 1 before t_i, then from v_i down a cubic."""
    done = progress(step, steps, t_i, t_f)
    if done < 0:
        return 1.0
    return v_f + (max(v_i, v_f) - v_f) * (1 - done) ** 3


def mixing_weight(step, steps, t_i, t_f):
    """lam, the weight of the slab: falls linearly from 0.1 to 1e-4 while weights are pruned."""
    done = max(0.0, progress(step, steps, t_i, t_f))
    return 0.1 + (1e-4 - 0.1) * done


def prior_gradient(w, lam, s0, s1):
    """-grad log pi(w) of the prior lam N(0, s1) + (1 - lam) N(0, s0), 0 < lam <= 1; w's shape."""
    if lam == 1:
        return w / s1                           # no spike: plain L2
    c1 = math.log(lam / (1 - lam)) + 0.5 * math.log(s0 / s1)
    c2 = 0.5 / s0 - 0.5 / s1
    g = torch.sigmoid(-c1 - c2 * w * w)         # the spike's share of the density at w
    return w * (1 / s1 + g * (1 / s0 - 1 / s1))                         # w (g / s0 + (1 - g) / s1)


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


@torch.no_grad()
def zero_smallest(weights, v):
    """Set the smallest |w| of all matrices together to 0, so that round(v N) of all N remain."""
    row = torch.cat([w.flatten() for w in weights]).abs_()              # (N,)
    remains = top_v(row, v).split([w.numel() for w in weights])
    for w, stays in zip(weights, remains):
        w.mul_(stays.view_as(w))
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
    weights = [layer.weight for layer in layers.values()]   # W: (out, in) each, pruned in place
    groups[0] |= args.adam
    first = math.ceil(args.t_i * args.steps)                # steps done at the first zeroing
    last = round((1 - args.t_f) * args.steps)               # and at the last
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
        t = step + 1                                        # zeroing comes after the step
        v = fraction_left(t, args.steps, args.sparsity, args.t_i, args.t_f, args.v_i)
        lam = args.mix or mixing_weight(step, args.steps, args.t_i, args.t_f)
        pruning = step < last and args.sparsity < 1
        due = t % args.interval == 0 or t in (first, last)
        if pruning and not due:
            v = None                                                        # for the log
        remains = [w != 0 for w in weights]                             # (out, in) each
        # </method>

        with autocast:
            loss = task_loss(net, batch, teacher)

        # <method: penalty>
        penalty = torch.tensor(0.0)
        # </method>

        optimizer.zero_grad()
        (loss + penalty).backward()

        # <method: gradient>
        # MAP: the prior's gradient enters AdamW's moments with the loss's, not decoupled. Nothing
        # is clipped (clip is 1e30): the prior's is large, and one norm would shrink the loss's.
        if pruning:
            for w in weights:
                prior = prior_gradient(w.detach(), lam, args.spike, args.slab)
                w.grad.add_(prior, alpha=1 / len(data.train))                   # 1 / n
        # </method>

        nn.utils.clip_grad_norm_(trained, args.clip)    # one norm over all that is trained
        optimizer.step()

        # <method: after step>
        # No mask after a zeroing: AdamW's moments live on, and a zeroed weight may grow again.
        if pruning and due:
            zero_smallest(weights, v)
        elif step >= last:                                  # after the last zeroing zeros are final
            for w, stays in zip(weights, remains):
                w.data.mul_(stays)
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
    # The zeros are in the weights already; in a short run the last zeroing left a few too many.
    goal = args.sparsity
    zero_smallest(weights, goal)
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

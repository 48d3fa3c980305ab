"""L0 regularisation of BERT with hard concrete gates, in one file.

Louizos, Welling and Kingma 2017 (arXiv 1712.01312), as used by Sanh, Wolf and Rush 2020 (arXiv 2005.07683). Official code:
AMLab-Amsterdam/L0_regularization; huggingface/transformers-research-projects, movement-pruning, at fccd0cdab0.

Result     Embedded squad, F1: 3.00 % 83.2, 85.3, 85.9; 10.00 % 89.1, 87.7, 88.0 (dense 99.4, 98.8, 98.7; seeds 0, 1, 2; 1,000 steps).
           SST-2 with a 6-layer MiniLM, accuracy: 3.00 % 80.2, 79.7, 80.2; 10.00 % 82.3, 80.3, 81.9 (dense 87.0, 86.8, 87.6; seeds 0, 1, 2; 1,200 steps).
           One CPU core, torch 2.13.0, transformers 5.23.0; commands in README. The paper, BERT-base, SQuAD at 3 %:
           EM 61.6 F1 73.6 (dense F1 88.1).

Idea       The number of weights that are not zero has no gradient. So each weight gets a random gate z in [0, 1] that is 0 with
           some probability, and that probability has one:
               s    = sigmoid((log u - log(1 - u) + S) / b)        u ~ U(0, 1), b = 2/3: a "concrete" variable in (0, 1)
               z    = clamp(s (r - l) + l, 0, 1)                   l = -0.1, r = 1.1: stretched, then cut: "hard"
               a    = (W * z) x                                    dL/dS flows through z wherever 0 < z < 1
               E[L0] of a gate = P(z > 0) = sigmoid(S - b log(-l / r))
               minimise  L + lambda * mean over matrices of mean of P(z > 0)
           Evaluation has no noise: z = clamp(sigmoid(S) (r - l) + l, 0, 1), which is 0 where S <= -2.398; W * z is saved.
           In the paper lambda is given and what is kept comes out. Here --sparsity is met by an augmented Lagrangian
               l1 h + l2 h^2,   h = d / v_t - 1,   l1 += 2 h and l2 += 60 h^2 at every step       d: the share kept
           after Wang, Wohlwend and Lei 2020 (arXiv 1910.04732): at the goal h vanishes, below it the push weakens, then turns round.
           h is relative, because in the paper's own runs lambda times what is kept hardly changes (75 -> 17.8 %, 13; 600 ->
           2.9 %, 17): l1 then has one number to find. d has the value of the count of S > -2.398 and the gradient of E[L0].

Symbols    scores      log alpha, S    (out, in)   2.197 at the start: z > 0 with probability 0.98; learned at --score_lr
           gate        z               (out, in)   in [0, 1], exactly 0 and exactly 1 included
           noise       log u - log(1 - u)          (out, in), drawn anew at every step
           B, L, R     beta, gamma, zeta of Louizos    temperature, and the ends of the stretched interval
           v           v_t             share kept, on the cubic of the other scripts

Unlike soft_mvp.py: the gate is random and real-valued, so its own gradient is used, nothing is passed straight through; the threshold
cannot move, so lambda must.
Unlike Louizos 2017, as in the official code: a gate for every weight, not for every input neuron; log alpha is not clamped; no L2 term,
no moving average of the weights; noise from (1e-4, 1 - 1e-4); the start at 2.197 is the logit of 0.9.
Differs from the movement paper: the goal (above; --penalty LAMBDA is its open loop); one draw of noise serves all processes; the gap
that is left at the end is closed by moving the nearest scores just across the threshold, and their number printed.

Chosen by measurement, embedded squad, goal 3 %, seed 0; kept before the gap is closed. With h = d - v, both value and gradient of d from
E[L0], and an ascent of (20, 10000): 4.58 %. d's value counted: 3.92 %. h relative too, ascent (0.5, 3): 2.52 %; (2, 10): 2.80 %; (2, 60): 2.89 %.

Run        python l0.py --task squad --sparsity 0.03                                 embedded BERT and data, CPU, about two minutes
           python l0.py --penalty 300                                                the paper's: what is kept follows from lambda
           torchrun --standalone --nproc_per_node=2 l0.py --preset paper             bert-base-uncased, the whole of SQuAD
           The last line printed: RESULT l0 squad keeps 3.00% (prunes 97.00%) EM .. F1 .. | steps, seconds, seed | folder
"""
import torch
from torch import nn
# <method: imports>
import math

from torch.nn.utils import parametrize
# </method>

import common


# ---- flags

# <method: hyper-parameters>
# The paper's, from the authors' run sheet; the rows of other tasks and the mini preset's are ours, the same in all scripts.
# warmup, t_i and t_f are shares of the run (the paper counts steps: on SQuAD 5,400 of 55,000, t_i and t_f once that).
# ascent: step sizes of l1 and l2; ours. lr_end: share of lr left at the last step. clip: one norm over all that is trained, scores
# included. length: in tokens.
MINI = dict(steps=1000, batch_size=32, lr=5e-4, score_lr=1e-1, ascent=(2.0, 60.0), length=128, warmup=0.05, lr_end=0.0, t_i=0.05, t_f=0.3, clip=1.0)
PAPER = dict(epochs=6, batch_size=32, lr=3e-5, score_lr=1e-1, ascent=(2.0, 60.0), length=128, warmup=0.05, lr_end=0.0, t_i=0.05, t_f=0.3, clip=1.0)
HYPER = {"mini": {"*": MINI, "mnli": dict(steps=3000), "qqp": dict(steps=3000)},
         "paper": {"*": PAPER,
                   "squad": dict(epochs=10, batch_size=16, length=384, warmup=0.1, t_i=0.1, t_f=0.1),
                   "mnli": dict(warmup=0.16, t_i=0.16, t_f=0.16),
                   "qqp": dict(epochs=10, lr=3e-6, score_lr=1e-2, warmup=0.1, t_i=0.1, t_f=0.1)}}
# </method>


def flags():
    """The command line. A flag left out takes the preset's value from HYPER."""
    p = common.Parser(__doc__)
    # what to do
    p.add_argument("--task", default="squad", choices=common.TASKS, help="tsv: your own DIR/tsv/{train,dev}.tsv")
    p.add_argument("--sparsity", default=0.03, type=common.number(float, 0, 1), metavar="V",
                   help="share of the prunable weights KEPT: 0.03 keeps 3.00 %%, prunes 97.00 %%; 1 is dense fine-tuning")
    # from what: the embedded BERT and data (mini), or bert-base-uncased and the whole task (paper); the rest overrides one thing
    p.add_argument("--preset", choices=["mini", "paper"], help="default: paper where CUDA is here, else mini")
    p.add_argument("--model", help="a BERT by hub name or folder; default: the preset's")
    p.add_argument("--data", metavar="DIR", help="folder of the data files; default: the preset's")
    p.add_argument("--teacher", metavar="DIR", help="distil from the fine-tuned model in DIR")
    # where to, and how
    p.add_argument("--out", metavar="DIR", help="default: out/<script>-<task>-<V>-s<seed>")
    p.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --out")
    p.add_argument("--seed", default=0, type=common.number(int, 0))
    p.add_argument("--steps", type=common.number(int, 1), help="overrides the preset's steps or epochs")
    p.add_argument("--batch_size", type=common.number(int, 1))
    p.add_argument("--lr", type=common.number(float, 0), help="of the weights")
    p.add_argument("--device", help="cpu, cuda, cuda:1; default: cuda where it is here")
    # <method: flags>
    p.add_argument("--score_lr", type=common.number(float, 0), help="of the scores")
    p.add_argument("--penalty", type=common.number(float, 0), metavar="LAMBDA",
                   help="the paper's open loop: what is kept follows from LAMBDA and not from --sparsity")
    # </method>
    return p


# <method: definitions>
# ---- method

def schedule(step, steps, v, t_i, t_f):
    """The cubic schedule (eq. 5): the share kept at this step, from 1 until t_i * steps down to v for the last t_f * steps."""
    done = min(max((step - t_i * steps) / max(1.0, (1 - t_i - t_f) * steps), 0.0), 1.0)
    return v + (1 - v) * (1 - done) ** 3


B, L, R = 2 / 3, -0.1, 1.1
THRESHOLD = math.log(-L / R)        # -2.398: the noise-free gate is above 0 where sigmoid(S) (R - L) + L > 0


def gate(scores, noise=None):
    """The hard concrete gate z in [0, 1], (out, in). noise: log u - log(1 - u), same shape, or None in evaluation."""
    # without noise there is no temperature either: sigmoid(S), as in both official codes
    s = torch.sigmoid(scores if noise is None else (noise + scores) / B)
    return (s * (R - L) + L).clamp(0, 1)


def expected_l0(scores):
    """The mean over matrices of the mean of P(z > 0) = sigmoid(S - b log(-l / r)): times lambda, the paper's penalty."""
    return torch.stack([torch.sigmoid(s - B * THRESHOLD).mean() for s in scores]).mean()


@torch.no_grad()
def share_kept(scores):
    """The share of all weights that the noise-free gate keeps."""
    return float(sum(torch.count_nonzero(s > THRESHOLD) for s in scores)) / sum(s.numel() for s in scores)


@torch.no_grad()
def close_gap(scores, v):
    """Move those scores across the threshold that are nearest to it, just so far, so that round(v n) of all n exceed it. Returns how many.

    Their gates are about 0 before and after: the network hardly changes, unless the gap is wide."""
    flat, before = torch.cat([s.flatten() for s in scores]), share_kept(scores)             # (n,)
    last = flat.kthvalue(len(flat) - min(max(1, round(v * len(flat))), len(flat)) + 1).values
    for s in scores:
        s.copy_(torch.where(s >= last, s.clamp(min=THRESHOLD + 1e-3), s.clamp(max=THRESHOLD - 1e-3)))
    return round((share_kept(scores) - before) * len(flat))


class Gated(nn.Module):
    """A parametrization: the layer computes with W' = W * z, and the scores learn through z."""

    def __init__(self, weight):
        super().__init__()
        self.scores = nn.Parameter(torch.full_like(weight, 2.197))                  # S = log alpha: (out, in)
        self.register_buffer("noise", torch.zeros_like(weight), persistent=False)   # log u - log(1 - u): (out, in)

    def forward(self, weight):
        # where no gradient is asked for (counting, evaluation, the bake) there is no noise either
        return weight * gate(self.scores, self.noise if torch.is_grad_enabled() else None)
# </method>


# ---- run

def main(args):
    """Fine-tune, prune meanwhile, save. Returns the exit status: 0, or 3 if the goal was missed."""
    run = common.Run(__file__, args, HYPER)             # preset, device, processes, --out; prints the first line
    task = common.Task(run)                             # features, batches, metrics
    model = common.load_bert(run, task)                 # with the task's head, new unless --model has it; embeddings frozen
    teacher = common.load_teacher(run, task)            # None without --teacher
    weights = common.prunable(model)                    # {name: Linear}, the six matrices of every encoder layer
    # All that is not frozen learns at args.lr times the schedule's factor; a method may add groups with peaks of their own.
    groups = [{"params": [p for p in model.parameters() if p.requires_grad], "peak": args.lr}]
    state = {}                                          # what the method has to remember over a --resume

    # <method: setup>
    # V = 1 is dense: no gates at all.
    gated = [Gated(layer.weight) for layer in weights.values() if args.sparsity < 1 or args.penalty]
    for layer, m in zip(weights.values(), gated):
        parametrize.register_parametrization(layer, "weight", m)
    scores = [m.scores for m in gated]                              # S: (out, in) each, 2.197 at the start
    # Ten times faster than in soft_mvp.py: a gate has to go from 2.197 to -2.398. Same schedule, same clip.
    groups.append({"params": scores, "peak": args.score_lr})
    state.update(l1=0.0, l2=0.0)                                    # the multipliers
    generator = torch.Generator(run.device)
    # </method>

    # No weight decay (AdamW's default is 0.01): what the loss and the method do not move stays. fused: all of Adam in one pass.
    optimizer = torch.optim.AdamW(groups, lr=args.lr, eps=1e-8, weight_decay=0.0, fused=True)
    trained = [p for group in groups for p in group["params"]]
    net = run.parallel(model)

    # Batch, dropout and learning rate depend on (seed, step) alone, so that a resumed run ends in the same bytes.
    for step in range(run.restore(model=model, optimizer=optimizer, state=state), args.steps):
        run.seed_step(step)
        batch = task.batch(step)
        factor = common.lr_factor(step, args.steps, args.warmup, args.lr_end)    # of weights and scores alike
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * factor

        # <method: before forward>
        v = schedule(step, args.steps, args.sparsity, args.t_i, args.t_f)
        # One draw a step, the same on all processes, from (seed, step) alone.
        generator.manual_seed((args.seed * 1_000_003 + step) % 2 ** 63)
        for m in gated:
            m.noise.uniform_(1e-4, 1 - 1e-4, generator=generator).logit_()
        # </method>

        # Cross-entropy, or with a teacher 0.1 of it + 0.9 T^2 KL; in bf16 on a GPU.
        with run.autocast():
            loss = common.task_loss(net, batch, teacher)

        # <method: penalty>
        penalty, h = 0.0, None
        if args.penalty:
            penalty, v = args.penalty * expected_l0(scores), None               # constant, not ramped; and no goal
        elif gated:
            d = expected_l0(scores)
            h = (share_kept(scores) + d - d.detach()) / v - 1                   # the value of what is kept, the gradient of E[L0]
            penalty = state["l1"] * h + state["l2"] * h ** 2
        # </method>

        optimizer.zero_grad()
        (loss + penalty).backward()

        # <method: gradient>
        # nothing: the gate has a gradient of its own
        # </method>

        # One norm over all that is trained, scores included, as in movement's official code; with clip = inf nothing is clipped.
        nn.utils.clip_grad_norm_(trained, args.clip)
        optimizer.step()

        # <method: after step>
        # Ascent: as long as too much is kept the push grows. l2 only grows, and so stiffens the spring about the goal.
        if h is not None:
            state["l1"] += args.ascent[0] * float(h.detach())
            state["l2"] += args.ascent[1] * float(h.detach()) ** 2
        # </method>

        # One line every ten seconds; what is kept is counted, not assumed. A checkpoint takes under 2 % of the time.
        run.log(step + 1, loss, penalty, lambda: common.kept(weights)[1], v, args.lr * factor)
        run.checkpoint(step + 1, model=model, optimizer=optimizer, state=state)

    # <method: bake>
    # What gap is left is closed at the threshold; then W * z, without noise, becomes W.
    goal = args.sparsity if args.penalty is None else None
    if goal and gated:
        run.say(f"{close_gap(scores, goal):+d} gates were moved across the threshold, to keep {goal:.2%}")
    for layer in weights.values() if gated else ():
        parametrize.remove_parametrizations(layer, "weight")
    # </method>

    return common.report(run, task, model, goal)   # saves, reloads, counts, evaluates, prints RESULT


if __name__ == "__main__":
    common.launch(main, flags().parse_args())

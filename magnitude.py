"""Gradual magnitude pruning of BERT, in one file.

Zhu and Gupta 2017 (arXiv 1710.01878), as in Sanh, Wolf and Rush 2020 (arXiv 2005.07683, eq. 5). Official code:
huggingface/transformers-research-projects, movement-pruning, at fccd0cdab0.

Result     Embedded squad, F1: 3.00 % 25.0, 27.6, 26.2; 10.00 % 82.6, 79.7, 83.4 (dense 99.4, 98.8, 98.7; seeds 0, 1, 2; 1,000 steps).
           SST-2 with a 6-layer MiniLM, accuracy: 3.00 % 66.1, 66.5, 62.6; 10.00 % 76.8, 76.8, 77.1 (dense 87.0, 86.8, 87.6; seeds 0, 1, 2; 1,200 steps).
           One CPU core, torch 2.13.0, transformers 5.23.0; commands in README. The paper, BERT-base, SQuAD at 3 %:
           EM 40.1 F1 54.5 (dense F1 88.1).

Idea       Fine-tune, and at every step let the network compute with its largest weights only:
               M  = Top_v(|W|)                    1 for the v largest |w|, else 0
               a  = (W * M) x                     so dL/dW = dL/dW' * M, with W' = W * M
               v  = v_f + (1 - v_f) (1 - (t - t_i) / (T - t_i - t_f))^3
           v starts at 1, falls fast while there is much to spare and slowly at the end, and rests at v_f for the last t_f
           steps. A masked weight gets no gradient: it comes back only if others shrink below it. What is kept is what
           was large before fine-tuning, because fine-tuning hardly moves a weight: that is the method's weakness at 3 %.

Symbols    weight      W           (out, in)   one of six matrices a layer: query, key, value, attention.output.dense,
                                               intermediate.dense, output.dense; nothing else is pruned or counted
           mask        M           (out, in)   0 or 1
           v           v, v^(t)    share of these weights kept; --sparsity is v_f, the last one
           t_i, t_f                warm-up and cool-down, here as shares of the run

Unlike dense fine-tuning: two calls, one before each forward pass and one after the last step. --sparsity 1 is dense
fine-tuning, the baseline and the teacher.

Differs from the official code: t_i and t_f are shares of the run, not multiples of the warm-up steps (with which a short run never
prunes); exactly round(v n) weights are kept, ties included. The paper's text lets masked weights keep learning; its code, and
this file, do not. Embeddings are frozen, as there; here in the dense run too.
Left out: the counting of biases and LayerNorm as kept (the official 3.14 % is 3.00 % here).

Run        python magnitude.py                                                       embedded BERT and data, CPU, about two minutes
           python magnitude.py --sparsity 1                                          dense: the baseline and the teacher
           torchrun --standalone --nproc_per_node=2 magnitude.py --preset paper      bert-base-uncased, the whole of SQuAD
           The last line printed: RESULT magnitude squad keeps 3.00% (prunes 97.00%) EM .. F1 .. | steps, seconds, seed | folder
"""
import torch
from torch import nn
# <method: imports>
import numpy as np
from torch.nn.utils import parametrize
# </method>

import common


# ---- flags

# <method: hyper-parameters>
# The paper's, from the authors' run sheet; the rows of other tasks and the mini preset's are ours, the same in all scripts.
# warmup, t_i and t_f are shares of the run (the paper counts steps: on SQuAD 5,400 of 55,000, t_i once and t_f twice that).
# lr_end: share of lr left at the last step. clip: one norm over all that is trained, scores included. length: in tokens.
MINI = dict(steps=1000, batch_size=32, lr=5e-4, length=128, warmup=0.05, lr_end=0.0, t_i=0.05, t_f=0.3, clip=1.0)
PAPER = dict(epochs=6, batch_size=32, lr=3e-5, length=128, warmup=0.05, lr_end=0.0, t_i=0.05, t_f=0.3, clip=1.0)
HYPER = {"mini": {"*": MINI, "mnli": dict(steps=3000), "qqp": dict(steps=3000)},
         "paper": {"*": PAPER,
                   "squad": dict(epochs=10, batch_size=16, length=384, warmup=0.1, t_i=0.1, t_f=0.2),
                   "mnli": dict(warmup=0.16, t_i=0.16, t_f=0.16),
                   "qqp": dict(epochs=10, lr=3e-6, warmup=0.1, t_i=0.2, t_f=0.3)}}
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
    p.add_argument("--scope", default="local", choices=["local", "global"], help="Top_v in each matrix, or over all at once")
    # </method>
    return p


# <method: definitions>
# ---- method

def schedule(step, steps, v, t_i, t_f):
    """The cubic schedule (eq. 5): the share kept at this step, from 1 until t_i * steps down to v for the last t_f * steps."""
    done = min(max((step - t_i * steps) / max(1.0, (1 - t_i - t_f) * steps), 0.0), 1.0)
    return v + (1 - v) * (1 - done) ** 3


def kth_largest(x, k):
    """The k-th largest element of a flat tensor, exactly, 1 <= k <= n: by selection (what a full sort would cost: tests/bench.py)."""
    n = x.numel()
    if x.device.type == "cpu":
        # numpy selects with vector instructions, torch without
        return x.new_tensor(np.partition(x.detach().numpy(), n - k)[n - k])
    # On a GPU topk selects with all of the chip, and kthvalue with one block of threads; of the smaller side.
    return x.topk(k, sorted=False).values.min() if 2 * k <= n else x.topk(n - k + 1, largest=False, sorted=False).values.max()


def top_v(scores, v):
    """M = Top_v(S): True for exactly round(v n) elements (at least 1), the largest; of ties the first. Same shape as scores."""
    flat = scores.flatten()
    k = max(1, round(v * flat.numel()))
    threshold = kth_largest(flat, k)
    mask = flat >= threshold
    surplus = int(torch.count_nonzero(mask)) - k                    # ties with the k-th element, the last of which go
    if surplus:
        mask[(flat == threshold).nonzero().flatten()[-surplus:]] = False
    return mask.view_as(scores)


@torch.no_grad()
def update_masks(masked, scores, v, scope):
    """Recompute the masks from the scores: Top_v of each matrix (local), or of all matrices together (global)."""
    if v == 1:
        masks = [torch.ones_like(s) for s in scores]
    elif scope == "local":
        masks = [top_v(s, v) for s in scores]
    else:
        # all scores in one row, (n,), ranked, and cut up again
        masks = top_v(torch.cat([s.flatten() for s in scores]), v).split([s.numel() for s in scores])
    for m, mask in zip(masked, masks):
        m.mask.copy_(mask.view_as(m.mask))


class Masked(nn.Module):
    """A parametrization: the layer computes with W' = W * M, and so dL/dW = dL/dW' * M."""

    def __init__(self, weight):
        super().__init__()
        self.register_buffer("mask", torch.ones_like(weight), persistent=False)     # M: (out, in), of 0 and 1

    def forward(self, weight):
        return weight * self.mask
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
    dense = [layer.weight for layer in weights.values()]            # W: (out, in) each; the layers will compute with W * M
    masked = [Masked(w) for w in dense]
    for layer, m in zip(weights.values(), masked):
        parametrize.register_parametrization(layer, "weight", m)
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
        # Masks are found once a step, from the weights as the last step left them.
        update_masks(masked, [w.detach().abs() for w in dense], v, args.scope)
        # </method>

        # Cross-entropy, or with a teacher 0.1 of it + 0.9 T^2 KL; in bf16 on a GPU.
        with run.autocast():
            loss = common.task_loss(net, batch, teacher)

        # <method: penalty>
        penalty = 0.0                                               # what is kept is set by the schedule, nothing pays for it
        # </method>

        optimizer.zero_grad()
        (loss + penalty).backward()

        # <method: gradient>
        # nothing: W * M has masked dL/dW already
        # </method>

        # One norm over all that is trained, scores included, as in movement's official code; with clip = inf nothing is clipped.
        nn.utils.clip_grad_norm_(trained, args.clip)
        optimizer.step()

        # <method: after step>
        # nothing: masked weights are in the model still, only not in its forward pass
        # </method>

        # One line every ten seconds; what is kept is counted, not assumed. A checkpoint takes under 2 % of the time.
        run.log(step + 1, loss, penalty, lambda: common.kept(weights)[1], v, args.lr * factor)
        run.checkpoint(step + 1, model=model, optimizer=optimizer, state=state)

    # <method: bake>
    # The last masks, at v_f, then zeros into plain nn.Linear weights: W * M becomes W.
    goal = args.sparsity
    update_masks(masked, [w.detach().abs() for w in dense], args.sparsity, args.scope)
    for layer in weights.values():
        parametrize.remove_parametrizations(layer, "weight")
    # </method>

    return common.report(run, task, model, goal)   # saves, reloads, counts, evaluates, prints RESULT


if __name__ == "__main__":
    common.launch(main, flags().parse_args())

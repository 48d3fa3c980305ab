"""Reweighted proximal pruning of BERT in pre-training, in one file.

Guo, Liu, Mungall, Lin and Wang 2019, arXiv 1909.12486. No code of theirs is public, and the full text was not at hand: what is
marked (recalled) is from memory.

Result     Embedded squad, F1: 3.00 % 10.1, 11.9, 10.5; 10.00 % 64.1, 66.2, 65.4 (dense 99.4, 98.8, 98.7; seeds 0, 1, 2; 1,000 steps after 2,000 of
           pre-training; MLM 64.5 and 78.8 % right, NSP 96.0 and 98.2, before 84.0 and 99.1). --nip, 10 %: 41.0, 20.5 (MLM 59.8, NSP 96.9).
           One support at 40.00 %, 4,000 steps (MLM 88.1, NSP 98.9): squad 98.5, 98.4, 98.1; mnli 94.7 and 94.2 (dense 91.8, 90.7); qqp 98.6 (dense 97.0).
           SST-2 with a 6-layer MiniLM, accuracy: 3.00 % 50.9, 50.9, 50.9; 10.00 % 72.9, 73.3, 72.7 (dense 87.0, 86.8, 87.6; one support, 600 steps).
           One CPU core; commands in README. In the paper 59 % kept is as good as dense (F1 88.5), and NSP stays above 95 at 10 %.

Idea       Prune once, in pre-training; then fine-tune any task on the zeros found: the support is universal. Wanted is
               minimise  f0(w) + gamma sum_i alpha_i |w_i|            f0: the losses of MLM and NSP
           An l1 term inside the loss makes Adam serve two masters: its moments mix both gradients, and its division by sqrt(v)
           undoes gamma: where f0's gradients are small, the penalty alone makes the step, lr long whatever gamma is. Nor does any
           weight ever come to rest at 0. So Adam sees f0 only, and after its complete step, w -> a, comes the proximal one:
               w_i = argmin_x (x - a_i)^2 / 2 + lr_t gamma alpha_i |x| = sign(a_i) max(|a_i| - lr_t gamma alpha_i, 0)
           A weight stays if f0 holds it against gamma alpha_i, and goes to 0 exactly if not. With alpha = 1, the first round, all
           are pressed alike and the large ones, which matter, lose most. So after each round
               alpha_i = 1 / (|w_i|^p + eps)
           presses the small ones harder and the large ones hardly: with p = 1 the sum is about the number of weights. Inside a round
           a zero comes back if one step of Adam's outgrows lr_t gamma alpha_i; at the round's end its alpha is 1 / eps: no more.

Symbols    dense       w           (out, in)   one of six matrices a layer
           alpha       alpha       (out, in)   how hard each of its weights is pressed, beside the others
           gamma       gamma                   how hard all are pressed
           v           -                       share kept at this step
           support     -                       the pruned pre-trained model; masks, (out, in): where it is not 0

Unlike magnitude.py: all is done in set-up. Fine-tuning zeroes the gradients of pruned weights, and nothing else is different.
Differs from the paper: gamma is solved for at every step, so that v_t is kept (to rounding), and v_t falls to V on a cubic; --gamma G is the paper's
open loop (G from 1e-2 to 1e-5, picked by hand (recalled)). p is the number of the round, as the paper writes it (recalled), up to 5; with
--gamma it is 1, because a fixed gamma would press harder whenever p changed alpha's size. After the last round the support rests for `recover` of the steps;
--nip has the same. The text is --corpus, for the paper's BooksCorpus and Wikipedia. Embeddings are not pruned; they learn in pre-training.
Chosen by measurement, squad's F1 at 40 % kept, on dev, seed 0 (constants and texts edited; dense 99.4): lr 1e-3 for pre-training, from 5e-4 to 4e-3;
p growing, not 1; 12 rounds, not 6 or 24. The text counts most: with few questions in it 80.7; with texts and a length of 80 tokens, shorter than squad's,
600 steps lost 1.7 with nothing pruned. Then the steps: with longer texts 2,000 lost 2.4 (seed 1: 16.7) and 4,000 0.9; at 10 % 600 leave 12.3, 2,000 64.1.
--nip      The paper's baseline: no penalty; at even intervals the smallest |w| go, about 10 % of all at a time (recalled), for good.

Run        python rpp.py                                                             embedded BERT, corpus and task, CPU, about three minutes
           python rpp.py --task mnli --support out/rpp-squad-0.03-s0                 another task on the same support
           python rpp.py --preset paper --corpus FILE                                bert-base-uncased, the whole of SQuAD
           The last line printed: RESULT rpp squad keeps 3.00% (prunes 97.00%) EM .. F1 .. | steps, seconds, seed | folder
"""
import torch
from torch import nn
# <method: imports>
import numpy as np
# </method>

import common


# ---- flags

# <method: hyper-parameters>
# Fine-tuning: as in magnitude.py. pretrain: of the paper's preset, rounds, lr and batch_size are the paper's, as eps is (all recalled); all else is
# ours. recover: share of the steps after the last round. p: the largest exponent. A --batch_size, --lr or, without --pretrain_steps, --steps
# holds in both phases.
MINI = dict(steps=1000, batch_size=32, lr=5e-4, length=128, warmup=0.05, lr_end=0.0, clip=1.0, rounds=12,
            pretrain=dict(steps=200, batch_size=32, lr=1e-3, length=96, warmup=0.05, recover=0.3, p=5, eps=1e-9))
PAPER = dict(epochs=6, batch_size=32, lr=3e-5, length=128, warmup=0.05, lr_end=0.0, clip=1.0, rounds=6,
             pretrain=dict(steps=20000, batch_size=256, lr=2e-5, length=128, warmup=0.05, recover=0.3, p=5, eps=1e-9))
HYPER = {"mini": {"*": MINI, "mnli": dict(steps=3000), "qqp": dict(steps=3000)},
         "paper": {"*": PAPER,
                   "squad": dict(epochs=10, batch_size=16, length=384, warmup=0.1),
                   "mnli": dict(warmup=0.16),
                   "qqp": dict(epochs=10, lr=3e-6, warmup=0.1)}}
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
    p.add_argument("--corpus", metavar="FILE", help="text to pre-train on, blank lines between documents; default: corpus.txt of --data or mini")
    p.add_argument("--pretrain_steps", type=common.number(int, 1), help="steps of pre-training; --steps then sets fine-tuning only")
    p.add_argument("--gamma", type=common.number(float, 0), help="the paper's open loop: what is kept follows from gamma, not from --sparsity")
    p.add_argument("--rounds", type=common.number(int, 1), help="alpha is reweighted between them")
    p.add_argument("--nip", action="store_true", help="the paper's baseline: magnitude pruning, step by step, in the same pre-training")
    p.add_argument("--support", metavar="DIR", help="no pre-training: fine-tune on the zeros of the model in DIR, such as an --out of this script")
    # </method>
    return p


# <method: definitions>
# ---- method

def largest_to_go(matrices, v):
    """The value at or below which elements (>= 0) are zeroed so that round(v n), at least 1, of all in the matrices stay; 0.0 if all may."""
    x = torch.cat([m.flatten() for m in matrices])                  # (n,)
    rank = x.numel() - max(1, round(v * x.numel()))                 # so many go
    if rank and x.device.type == "cpu":
        return float(np.partition(x.detach().numpy(), rank - 1)[rank - 1])          # numpy selects with vector instructions, torch without
    return x.topk(rank, largest=False, sorted=False).values.max().item() if rank else 0.0


def prox(a, threshold):
    """argmin_w (w - a)^2 / 2 + threshold |w|, element by element: sign(a) max(|a| - threshold, 0), never -0. threshold > 0, same shape."""
    # what is left of a when the part of it within [-threshold, threshold] is taken away
    return a - a.clamp(-threshold, threshold)


def reweight(w, p, eps):
    """alpha = 1 / (|w|^p + eps), element by element: a zero's is 1 / eps, so large that no step of Adam's outgrows it."""
    return 1 / (w.abs() ** p + eps)


def solve_gamma(a, alpha, v, lr):
    """The one gamma for which the proximal step leaves round(v n) of all n weights: it zeroes those with |a_i| / alpha_i <= lr gamma."""
    return largest_to_go([x.abs() / y for x, y in zip(a, alpha)], v) / lr


def pretrain(run, task, folder):
    """Prune the pre-trained BERT in pre-training and save it in folder, MLM and NSP heads included. Returns it.

    On N processes all find the same support: their gradients are averaged, and what follows depends on the weights alone."""
    args, hyper = run.args, run.args.pretrain
    # --pretrain_steps, or as typed for fine-tuning too, before the preset's values for that were filled in
    steps, size, peak = (getattr(args, f"pretrain_{key}", None) or run.flags[key] or hyper[key] for key in ("steps", "batch_size", "lr"))
    last = max(1, round((1 - hyper["recover"]) * steps))            # the steps of all rounds
    cuts = max(1, round((1 - args.sparsity) / 0.1))                 # of --nip
    text = common.Corpus(run, args.corpus, task.tokenizer, size, min(hyper["length"], task.positions))
    model, new = common.load_pretraining(run, args.model)
    weights, net = common.prunable(model), run.parallel(common.PreTraining(model))
    dense = [layer.weight for layer in weights.values()]            # w: (out, in) each
    # No weight decay: it would press on the weights beside the penalty.
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak, eps=1e-8, weight_decay=0.0, fused=True)
    state = {"alpha": [torch.ones_like(w) for w in dense], "gamma": []}             # alpha: (out, in) each; gamma: at each round's end
    done = run.restore(phase="pre-training", steps=steps, model=model, optimizer=optimizer, state=state)
    run.say(f"pre-training on {text.path}: {steps} steps of {size} pairs | {'NIP' if args.nip else f'{args.rounds} rounds'} to step {last}, "
            f"then the zeros rest | lr {peak:g}")
    for name in [n for n, head in (("MLM", "cls.predictions."), ("NSP", "cls.seq_relationship.")) if any(key.startswith(head) for key in new)]:
        run.say(f"{args.model} has no {name} head: it starts anew")
    state["before"] = state.get("before") or text.accuracy(net)
    run.say(f"before pruning: MLM {{MLM:.1f}} NSP {{NSP:.1f}} (% right, on {text.pairs} held-out pairs)".format(**state["before"]))

    for step in range(done, steps):
        run.seed_step(step)
        lr = optimizer.param_groups[0]["lr"] = peak * common.lr_factor(step, steps, hyper["warmup"])
        with run.autocast():
            loss = net(**text.batch(step))[0]                       # f0: no penalty in it, so none in Adam's moments
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), args.clip)
        zeros = [w == 0 for w in dense] if args.nip or step >= last else []         # (out, in) each: those that stay
        optimizer.step()

        # The share to keep: --nip goes down in even stairs, RPP on the cubic of the other scripts, both to V at step `last`.
        progress, gamma = min(1.0, (step + 1) / last), 0.0
        v = args.sparsity + (1 - args.sparsity) * (1 - int(progress * cuts) / cuts if args.nip else (1 - progress) ** 3)
        with torch.no_grad():
            for w, zero in zip(dense, zeros):                       # Adam's old moments have moved them
                w.masked_fill_(zero, 0.0)
            if args.nip and int(progress * cuts) > int(min(1.0, step / last) * cuts):              # a stair
                smallest = largest_to_go([w.abs() for w in dense], v)
                for w in dense:
                    w.masked_fill_(w.abs() <= smallest, 0.0)
            elif not args.nip and step < last:
                # One gamma for all weights: what is pruned follows from alpha and from how f0 has moved the weights.
                gamma = args.gamma or solve_gamma(dense, state["alpha"], v, lr)
                for w, alpha in zip(dense, state["alpha"]):
                    w.copy_(prox(w, lr * gamma * alpha))
                if (step + 1) * args.rounds // last > step * args.rounds // last:           # a round ends
                    state["gamma"] = [*state["gamma"], gamma]
                    p = 1 if args.gamma else min(len(state["gamma"]), hyper["p"])
                    state["alpha"] = [reweight(w, p, hyper["eps"]) for w in dense]

        # In the penalty's place: gamma. From round to round it changes with the size of alpha.
        run.log(step + 1, loss, gamma, lambda: common.kept(weights)[1], None if args.gamma else v, lr)
        run.checkpoint(step + 1, model=model, optimizer=optimizer, state=state)

    known = dict(kept=common.kept(weights)[1], before=state["before"], after=text.accuracy(net), gamma=state["gamma"], steps=steps, nip=args.nip)
    run.say("after pruning: MLM {MLM:.1f} NSP {NSP:.1f}".format(**known["after"]) + f" | {folder} {common.keeps(known['kept'])}")
    model.config.pretraining = known                                # in config.json, with the weights
    if run.rank == 0:
        common.folder_whole(folder, lambda part: (model.save_pretrained(part), task.tokenizer.save_pretrained(part)))
    return model


def find_support(run, task, model):
    """Copy pruned weights into the task's model: of --support, or of this run's own pre-training. Returns the share to keep, or None: no goal."""
    args, own, lacking = run.args, run.out / "support", []
    common.demand(not (args.nip and args.gamma), "--nip has no penalty: leave --gamma out, or --nip")
    if args.support:
        common.demand(not (args.corpus or args.gamma or args.nip or run.flags["rounds"] or args.pretrain_steps),
                      "--support skips pre-training: leave --corpus, --pretrain_steps, --gamma, --rounds and --nip out")
        folder = common.Path(args.support) / "support"              # as it was before fine-tuning; another pruned BERT: as it is
        found, lacking = common.load_pretraining(run, folder if folder.exists() else args.support)
    elif args.sparsity == 1 and not args.gamma:
        return 1.0                                                  # dense fine-tuning, no pre-training either
    elif args.resume and own.exists():
        found = common.load_pretraining(run, own)[0]                # whole, or it would not be there: that phase is over
    else:
        found = pretrain(run, task, own)
    # What the folder lacks was made up by transformers: the task's model has better, or nothing to match.
    parts, mine = {k: x for k, x in found.state_dict().items() if k not in lacking}, model.state_dict()
    share, same = common.kept(common.prunable(found))[1], common.prunable(found).keys() == common.prunable(model).keys()
    if args.support:
        common.demand(same and all(x.shape == mine[k].shape for k, x in parts.items() if k in mine), f"--support {args.support} is of another "
                      f"shape than --model {args.model}: give a pruned model made from it")
        common.demand(share < 1, f"--support {args.support} has no zeros: give a pruned model, such as an --out of this script")
        if abs(share - args.sparsity) > 1e-4:
            run.say(f"the support {common.keeps(share)}: this is the goal, not --sparsity {args.sparsity:g}")
    model.load_state_dict(parts, strict=False)                      # encoder, embeddings and pooler; the task's head is not among them
    run.extra["pretraining"] = getattr(found.config, "pretraining", None)
    return share if args.support else None if args.gamma else args.sparsity
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
    # All of the method happens here: pre-training, pruning, and the pruned weights copied into the model. V = 1: nothing.
    goal = find_support(run, task, model)
    masks = [layer.weight != 0 for layer in weights.values()]       # (out, in) each: the support
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
        v = goal                                                    # nothing is pruned any more
        # </method>

        # Cross-entropy, or with a teacher 0.1 of it + 0.9 T^2 KL; in bf16 on a GPU.
        with run.autocast():
            loss = common.task_loss(net, batch, teacher)

        # <method: penalty>
        penalty = 0.0                                               # it was paid in pre-training
        # </method>

        optimizer.zero_grad()
        (loss + penalty).backward()

        # <method: gradient>
        for layer, mask in zip(weights.values(), masks):
            layer.weight.grad.mul_(mask)
        # </method>

        # One norm over all that is trained, scores included, as in movement's official code; with clip = inf nothing is clipped.
        nn.utils.clip_grad_norm_(trained, args.clip)
        optimizer.step()

        # <method: after step>
        # nothing: a weight whose gradients were all 0 has moments of 0, and AdamW without decay leaves it where it is
        # </method>

        # One line every ten seconds; what is kept is counted, not assumed. A checkpoint takes under 2 % of the time.
        run.log(step + 1, loss, penalty, lambda: common.kept(weights)[1], v, args.lr * factor)
        run.checkpoint(step + 1, model=model, optimizer=optimizer, state=state)

    # <method: bake>
    # nothing: the zeros are in plain nn.Linear weights already
    # </method>

    return common.report(run, task, model, goal)   # saves, reloads, counts, evaluates, prints RESULT


if __name__ == "__main__":
    common.launch(main, flags().parse_args())

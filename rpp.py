"""Reweighted proximal pruning of BERT in pre-training, in one file.

Guo, Liu, Mungall, Lin and Wang 2019, arXiv 1909.12486. Official code: none. The full text was not at hand: what is marked
(recalled) is from memory.

Result     TODO(lead)

Idea       Prune once, in pre-training, and fine-tune every task on the zeros found: one support serves them all. Wanted is
               minimise  f0(w) + gamma * sum_i alpha_i |w_i|          f0: MLM + NSP loss
           With the l1 term inside the loss Adam serves two masters: it divides the sum of both gradients by the size of the sum, so
           that gamma no longer says how hard a weight is pressed (one with small gradients is pressed most), the term fills the
           moments, and no weight ever is exactly 0. So Adam gets f0 alone, and after its complete step w -> a the proximal one
               w_i = argmin_x (x - a_i)^2 / 2 + lr_t gamma alpha_i |x| = sign(a_i) max(|a_i| - lr_t gamma alpha_i, 0)
           which a weight outlives only if f0 pulls at it harder than gamma alpha_i. Plain l1 (alpha = 1, the first round) takes the
           same from all, and so most of the large; hence after each round
               alpha_i = 1 / (|w_i|^p + eps)                          small weights are pressed harder, large ones hardly,
           which makes the sum close to a count of weights. Inside a round a zero may come back, if one step of Adam's outgrows
           lr_t gamma alpha_i; at the round's end its alpha becomes 1 / eps, and it never does.

Symbols    dense       w, a        (out, in)   one of six matrices a layer, before and after the proximal step
           alpha       alpha       (out, in)   its weights' shares of the penalty
           gamma       gamma       weight of the penalty
           v           -           share kept, in pre-training; V, of --sparsity, from the end of the last round on
           support     -           the pre-trained model with its zeros; mask: where it has none

Unlike magnitude.py: the zeros are there before the task is; fine-tuning zeroes the gradients of pruned weights and no more.
Differs from the paper: gamma is solved for, at every step, so that what is kept falls evenly to V (--gamma G is the paper's open loop, with
G of 1e-2 .. 1e-5 (recalled), picked by hand). The exponent p is 1; in the paper it is the number of the round (recalled). After the
last round the support rests and what is left of it recovers, for the share `recover` of the steps; in --nip too. Text: --corpus, not
BooksCorpus and Wikipedia. All weights are pre-trained, embeddings too, which are not pruned, and frozen in fine-tuning as in all six scripts.
--nip      The paper's baseline, in the same pre-training: no penalty, but at even intervals the smallest |w| of all go, in equal
           steps of about 10 % (recalled), and stay away.

Run        python rpp.py                                                             embedded BERT, corpus and task, CPU
           python rpp.py --task mnli --support out/rpp-squad-0.03-s0                 another task on the same support
           python rpp.py --nip --out out/nip                                         the baseline
           python rpp.py --preset paper --corpus FILE                                bert-base-uncased, the whole of SQuAD
           The last line printed: RESULT rpp squad keeps 3.00% (prunes 97.00%) EM .. F1 .. | steps, seconds, seed | folder
"""
import torch
from torch import nn
from torch.nn.utils import parametrize

import common


# ---- flags

# <method: hyper-parameters>
# Fine-tuning: as in magnitude.py. Pre-training, under pretrain: lr, batch size and rounds of the paper preset are the paper's (recalled);
# steps, length and the rest are ours. recover: share of the steps after the last round. A --steps, --batch_size or --lr holds in both phases.
MINI = dict(steps=1000, batch_size=32, lr=5e-4, length=128, warmup=0.05, lr_end=0.0, clip=1.0, rounds=6,
            pretrain=dict(steps=400, batch_size=32, lr=4e-3, length=80, recover=0.3, p=5, eps=1e-9))
PAPER = dict(epochs=6, batch_size=32, lr=3e-5, length=128, warmup=0.05, lr_end=0.0, clip=1.0, rounds=6,
             pretrain=dict(steps=20000, batch_size=256, lr=2e-5, length=128, recover=0.3, p=5, eps=1e-9))
HYPER = {"mini": {"*": MINI},
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
    p.add_argument("--gamma", type=common.number(float, 0), help="the paper's open loop: what is kept follows from gamma, not from --sparsity")
    p.add_argument("--rounds", type=common.number(int, 1), help="alpha is reweighted between them; default: 6")
    p.add_argument("--nip", action="store_true", help="the paper's baseline: magnitude pruning, step by step, in the same pre-training")
    p.add_argument("--support", metavar="DIR", help="no pre-training: fine-tune on the zeros of the model in DIR, such as an --out of this script")
    # </method>
    return p


# <method: definitions>
# ---- method

def largest_to_go(matrices, v):
    """Of all elements (>= 0) of the matrices together the largest that has to go if round(v n) of them, at least 1, shall stay; 0 if none has to."""
    x = torch.cat([m.flatten() for m in matrices])                  # (n,)
    k = max(1, round(v * x.numel()))
    return x.kthvalue(x.numel() - k).values.item() if k < x.numel() else 0.0


def prox(a, threshold):
    """argmin_w (w - a)^2 / 2 + threshold |w|, element by element: sign(a) max(|a| - threshold, 0), never -0. threshold > 0, same shape."""
    return a - a.clamp(-threshold, threshold)


def reweight(w, p, eps):
    """alpha = 1 / (|w|^p + eps): the penalty alpha |w| of a weight of any size but 0 is then about 1 (p = 1)."""
    return 1 / (w.abs() ** p + eps)


def solve_gamma(a, alpha, v, lr):
    """The one gamma for which the proximal step leaves round(v n) of all n weights: it zeroes those with |a_i| / alpha_i <= lr gamma."""
    return largest_to_go([x.abs() / y for x, y in zip(a, alpha)], v) / lr


def pretrain(run, task, folder):
    """Prune the pre-trained BERT in pre-training, and save it, MLM and NSP heads included, in folder, whole or not at all. Returns it."""
    args, hyper = run.args, run.args.pretrain
    steps, size, peak = (run.flags[key] or hyper[key] for key in ("steps", "batch_size", "lr"))
    last = max(1, round((1 - hyper["recover"]) * steps))            # the steps of all rounds; after them the support rests
    cuts = max(1, round((1 - args.sparsity) / 0.1))                 # of --nip
    text = common.Corpus(run, args.corpus, task.tokenizer, size, hyper["length"])
    model, new = common.load_pretraining(run, args.model)
    weights, net = common.prunable(model), common.PreTraining(model)
    dense = [layer.weight for layer in weights.values()]            # w: (out, in) each
    # No weight decay: it would press on the weights beside the penalty.
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak, eps=1e-8, weight_decay=0.0)
    state = {"alpha": [torch.ones_like(w) for w in dense], "gamma": []}             # alpha: (out, in) each; gamma: at each round's end
    parallel = run.parallel(net)
    done = run.restore(phase="pre-training", steps=steps, model=model, optimizer=optimizer, state=state)
    run.say(f"pre-training on {text.path}: {steps} steps of {size} pairs, {'--nip' if args.nip else f'{args.rounds} rounds'} to step {last} | lr {peak:g}")
    for name, head in (("MLM", "cls.predictions."), ("NSP", "cls.seq_relationship.")):
        if any(key.startswith(head) for key in new):
            run.say(f"{args.model} has no {name} head: one is started anew")
    if not done:
        state["before"] = text.accuracy(net)
    run.say(f"before pruning: MLM {{MLM:.1f}} NSP {{NSP:.1f}} (% right, on {text.pairs} held-out pairs)".format(**state["before"]))

    for step in range(done, steps):
        run.seed_step(step)
        lr = peak * common.lr_factor(step, steps, args.warmup, args.lr_end)
        for group in optimizer.param_groups:
            group["lr"] = lr
        with run.autocast():
            loss = parallel(**text.batch(step))[0]                      # f0 alone
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), args.clip)
        zeros = [w == 0 for w in dense]
        optimizer.step()

        # The share to keep now: --nip goes down in stairs, all alike; RPP on the cubic of the other scripts, without their ends at rest.
        share, gamma = min(1.0, (step + 1) / last), 0.0             # share: of the rounds' steps, those done
        v = args.sparsity + (1 - args.sparsity) * (1 - int(share * cuts) / cuts if args.nip else (1 - share) ** 3)
        with torch.no_grad():
            if args.nip or step >= last:                            # zeros stay, though Adam's old moments moved them
                for w, zero in zip(dense, zeros):
                    w.masked_fill_(zero, 0.0)
            if args.nip:
                smallest = largest_to_go([w.abs() for w in dense], v)
                for w in dense:
                    w.masked_fill_(w.abs() <= smallest, 0.0)
            elif step < last:
                gamma = args.gamma or solve_gamma(dense, state["alpha"], v, lr)
                for w, alpha in zip(dense, state["alpha"]):
                    w.copy_(prox(w, lr * gamma * alpha))
                if (step + 1) * args.rounds // last > step * args.rounds // last:           # a round ends
                    state["gamma"] = [*state["gamma"], gamma]
                    state["alpha"] = [reweight(w, 1 if args.gamma else min(len(state["gamma"]), hyper["p"]), hyper["eps"]) for w in dense]

        # Logged as the penalty: gamma.
        run.log(step + 1, loss, gamma, lambda: common.kept(weights)[1], None if args.gamma else v, lr)
        run.checkpoint(step + 1, model=model, optimizer=optimizer, state=state)

    known = dict(kept=common.kept(weights)[1], before=state["before"], after=text.accuracy(net), gamma=state["gamma"], steps=steps, nip=args.nip)
    run.say("after pruning: MLM {MLM:.1f} NSP {NSP:.1f}".format(**known["after"]) + f" | {folder} {common.keeps(known['kept'])}")
    model.config.pretraining = known                                # in config.json, with the weights
    if run.rank == 0:
        common.folder_whole(folder, lambda part: (model.save_pretrained(part), task.tokenizer.save_pretrained(part)))
    return model


def find_support(run, task, model):
    """Give the task's model the pruned weights of --support, or of this run's own pre-training. Returns the share to keep, None for no goal.

    A folder left by this script is taken as it was before fine-tuning (DIR/support); of any other pruned BERT, what it has."""
    args, own, lacking = run.args, run.out / "support", []
    common.demand(not (args.nip and args.gamma), "--nip has no penalty: leave --gamma out, or --nip")
    if args.support:
        common.demand(not (args.corpus or args.gamma or args.nip or run.flags["rounds"]),
                      "--support skips pre-training: leave --corpus, --gamma, --rounds and --nip out")
        folder = common.Path(args.support)
        found, lacking = common.load_pretraining(run, folder / "support" if (folder / "support").exists() else folder)
    elif args.sparsity == 1:
        return 1.0                                                  # dense fine-tuning
    elif args.resume and own.exists():
        found = common.load_pretraining(run, own)[0]                # this run's pre-training was over
    else:
        found = pretrain(run, task, own)
    parts, mine = {k: x for k, x in found.state_dict().items() if k not in lacking}, model.state_dict()
    share = common.kept(common.prunable(found))[1]
    if args.support:
        common.demand(common.prunable(found).keys() == common.prunable(model).keys() and all(x.shape == mine[k].shape for k, x in parts.items() if k in mine),
                      f"--support {args.support} is of another shape than --model {args.model}: give a pruned model made from it")
        common.demand(share < 1, f"--support {args.support} has no zeros: give a pruned model, such as an --out of this script")
        if abs(share - args.sparsity) > 1e-4:
            run.say(f"the support {common.keeps(share)}: this is the goal, not --sparsity {args.sparsity:g}")
    model.load_state_dict(parts, strict=False)                      # all but the heads
    run.extra["pretraining"] = getattr(found.config, "pretraining", None)
    return share if args.support else None if args.gamma else args.sparsity
# </method>


# ---- run

def main(args):
    """Fine-tune, prune meanwhile, save. Returns the exit status: 0, or 3 if the goal was missed."""
    run = common.Run(__file__, args, HYPER)             # preset, device, processes, --out; prints the first line
    task = common.Task(run)                             # features, batches, metrics
    model = common.load_bert(run, task)                 # with a fresh head; its embeddings are frozen
    teacher = common.load_teacher(run, task)            # None without --teacher
    weights = common.prunable(model)                    # {name: Linear}, the six matrices of every encoder layer
    # All that is not frozen learns at args.lr times the schedule's factor; a method may add groups with peaks of their own.
    groups = [{"params": [p for p in model.parameters() if p.requires_grad], "peak": args.lr}]
    state = {}                                          # what the method has to remember over a --resume

    # <method: setup>
    # All of the method happens here: pre-training, pruning, and the pruned weights copied into the model.
    goal = find_support(run, task, model)
    masks = [layer.weight != 0 for layer in weights.values()]       # (out, in) each: the support
    # </method>

    # No weight decay, as in the paper (AdamW's default is 0.01): it would shrink what is being ranked.
    optimizer = torch.optim.AdamW(groups, lr=args.lr, eps=1e-8, weight_decay=0.0)
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

        # One norm over weights and scores together, as in the official code.
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

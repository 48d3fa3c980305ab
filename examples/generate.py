"""Two pruning methods, copied into another project: a model that learns to write text.

An encoder-decoder reads a source text and learns to write a target text. While it learns, MGPP
(mgpp.py) or soft movement pruning (soft_mvp.py) prunes it. Nothing is imported from those scripts:
the lines under a banner "copied from" are theirs, and the banner names the script and the slot.
All other lines are an ordinary training loop. Read main() to see where each slot goes in yours.

Pruned  every nn.Linear in the layers of encoder and decoder; neither the embeddings nor the layer
        that chooses the next word
Model   an encoder-decoder: a folder, or a name on the hub. A BERT will do too: encoder and decoder
        both start from it, and the decoder's attention to the encoder starts from random weights
Data    DIR/train.tsv and DIR/dev.tsv, tabs between columns, no quoting, with the columns source and
        target. By default mini/generate: an answer and a text make the source, and the question
        that they answer is the target
Scores  the share of texts that are exactly right (EM), and ROUGE-1, -2 and -L: F1 over words, over
        pairs of words, and over the longest common subsequence, in lower case, without stemming

    python examples/generate.py --method mgpp --sparsity 0.1          keeps 10 %; minutes on a CPU
    python examples/generate.py --method dense                        nothing is pruned
    python examples/generate.py --model t5-small --data DIR --beams 4 --max_new_tokens 60
Last line:
RESULT mgpp generate keeps 10.00% (prunes 90.00%) EM 20.0 ROUGE-1 72.7 ROUGE-2 59.4 ROUGE-L 72.7 |
1000 steps 720 s seed 0 | out/generate-mgpp-0.1-s0
"""
import argparse
import collections
import csv
import json
import math
import random
import re
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn.utils import parametrize
from transformers import (
    AutoConfig,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    EncoderDecoderModel,
    get_linear_schedule_with_warmup,
    logging,
    set_seed,
)

MINI = Path(__file__).resolve().parent.parent / "mini"

# ---- the values of the mini preset in mgpp.py and soft_mvp.py; for a real model take PAPER's
HYPER = dict(
    t_i=0.05,
    t_f=0.3,
    v_i=0.7,
    mix=None,
    spike=1e-10,
    slab=0.05,
    interval=10,
    adam=dict(betas=[0.9, 0.999], eps=1e-8),
    score_lr=1e-2,
    lambda_f=1000.0,
)


# ---- copied from mgpp.py: <method: definitions>

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


def fraction_left(step, steps, v_f, t_i, t_f, v_i):
    """v, the fraction left by a zeroing after `step` steps: from v_i at t_i down to v_f.

    If v_i is below v_f, each zeroing leaves v_f. 1 before t_i: a zeroing comes that early only if
    the cubic part is shorter than a step.
    """
    if step < t_i * steps:
        return 1.0
    # with 0.0 for its v_f, schedule goes from 1 down to 0
    return v_f + (max(v_i, v_f) - v_f) * schedule(step, steps, 0.0, t_i, t_f)


def mixing_weight(step, steps, t_i, t_f):
    """lam, the slab's share: it falls linearly from 0.1 at t_i to 1e-4 at 1 - t_f.

    Like schedule's cubic, this ramp is at least one step long.
    """
    done = (step - t_i * steps) / max(1.0, (1 - t_i - t_f) * steps)
    return 0.1 + (1e-4 - 0.1) * min(max(done, 0.0), 1.0)


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


def kth_largest(x, k):
    """The k-th largest of the n elements of a flat tensor, 1 <= k <= n, as a 0-dim tensor."""
    n = len(x)
    if x.device.type == "cpu":                          # faster than torch's own kthvalue
        return x.new_tensor(np.partition(x.numpy(), n - k)[n - k])
    if k > n // 2:                                      # topk from below has fewer to find
        return x.topk(n - k + 1, largest=False, sorted=False).values.max()
    return x.topk(k, sorted=False).values.min()


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


@torch.no_grad()
def zero_smallest(weights, v):
    """Zero the weights of smallest |w|, over all matrices: round(v N) of N remain, at least one.

    weights: one tensor (out, in) per matrix, changed in place. A matrix may lose all its weights.
    """
    magnitudes = torch.cat([w.flatten() for w in weights]).abs_()       # (N,)
    remains = top_v(magnitudes, v).split([w.numel() for w in weights])
    for w, stays in zip(weights, remains):
        w.mul_(stays.view_as(w))


# ---- copied from soft_mvp.py: <method: definitions>, without the open loop; top_v is above

def least_share(n):
    """The fraction of its n weights that a matrix keeps at least: int(0.005 n) + 1 of n."""
    return (int(0.005 * n) + 1) / n


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


class Masked(nn.Module):
    """A parametrization: the layer computes with W' = W * M, and its scores learn through M."""

    def __init__(self, weight):
        super().__init__()
        self.scores = nn.Parameter(torch.zeros_like(weight))            # S: (out, in)
        self.register_buffer("mask", torch.ones_like(weight), persistent=False)     # M: (out, in)

    def forward(self, weight):
        return StraightThrough.apply(weight, self.scores, self.mask)


def sigmoid_penalty(scores):
    """R(S): sigmoid(S) averaged in each matrix, then over the matrices; 0.5 at the start.

    scores: one tensor (out, in) per matrix. lambda is large because R is a mean: even with lambda
    1000 the p of one score in BERT-base is at most 6e-6 in attention, 1.5e-6 in feed-forward (on
    mini a hundred times that).
    """
    return torch.stack([torch.sigmoid(s).mean() for s in scores]).mean()


# ---- data and scores

def read_tsv(path):
    """[(source, target)]"""
    with open(path, encoding="utf-8", newline="") as file:
        rows = csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        return [(row["source"], row["target"]) for row in rows]


def features(rows, tokenizer):
    """[{input_ids, attention_mask, labels, ..}], lists of numbers."""
    sources, targets = zip(*rows)
    columns = tokenizer(list(sources), text_target=list(targets), truncation=True)
    return [dict(zip(columns, values)) for values in zip(*columns.values())]


def words(text):
    return re.findall(r"\w+", text.lower())


def f1(same, n_guess, n_gold):
    return 2 * same / max(1, n_guess + n_gold)


def rouge_n(guess, gold, n):
    """ROUGE-N of two lists of words: F1 over their runs of n words."""
    guess = collections.Counter(zip(*(guess[i:] for i in range(n))))
    gold = collections.Counter(zip(*(gold[i:] for i in range(n))))
    return f1((guess & gold).total(), guess.total(), gold.total())


def rouge_l(guess, gold):
    """ROUGE-L of two lists of words: F1 of their longest common subsequence."""
    longest = [0] * (len(gold) + 1)             # of the guess so far and gold's first j words
    for word in guess:
        before = 0                              # longest[j] before this word
        for j, other in enumerate(gold):
            above = longest[j + 1]
            longest[j + 1] = before + 1 if word == other else max(above, longest[j])
            before = above
    return f1(longest[-1], len(guess), len(gold))


def score(guesses, golds):
    """{name: mean over all texts, in percent}"""
    rows = []
    for guess, gold in zip(map(words, guesses), map(words, golds)):
        rows.append([
            guess == gold,
            rouge_n(guess, gold, 1),
            rouge_n(guess, gold, 2),
            rouge_l(guess, gold),
        ])
    means = 100 * np.mean(rows, axis=0)
    names = ["EM", "ROUGE-1", "ROUGE-2", "ROUGE-L"]
    return dict(zip(names, means.tolist()))


def show(scores):
    return " ".join(f"{name} {value:.1f}" for name, value in scores.items())


# ---- model

def load(name):
    """(tokenizer, encoder-decoder); a BERT starts both halves."""
    tokenizer = AutoTokenizer.from_pretrained(name)
    if AutoConfig.from_pretrained(name).is_encoder_decoder:
        return tokenizer, AutoModelForSeq2SeqLM.from_pretrained(name)
    model = EncoderDecoderModel.from_encoder_decoder_pretrained(name, name)
    special = dict(
        decoder_start_token_id=tokenizer.cls_token_id,
        eos_token_id=tokenizer.sep_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model.config.update(special)
    model.generation_config.update(**special)
    return tokenizer, model


def prunable(model):
    """{name: Linear} of the layers of encoder and decoder, whose names hold the layer's number."""
    layers = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and re.search(r"\.\d+\.", name):
            layers[name] = module
    return layers


def share_kept(layers):
    weights = [layer.weight for layer in layers.values()]
    kept = sum(int(torch.count_nonzero(w)) for w in weights)
    return kept / sum(w.numel() for w in weights)


def flags():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--method", default="mgpp", choices=["dense", "mgpp", "soft_mvp"], help="dense: no pruning")
    add("--sparsity", type=float, default=0.1, metavar="V", help="fraction of the weights KEPT")
    add("--scope", default="global", choices=["local", "global"],
        help="soft_mvp: rank each matrix by itself (better where layers are new), or all together")
    add("--model", default=str(MINI / "bert"), help="a folder, or a name on the hub")
    add("--data", type=Path, default=MINI / "generate", help="folder of train.tsv and dev.tsv")
    add("--out", type=Path, help="folder for the pruned model; default out/generate-METHOD-V-sSEED")
    add("--steps", type=int, default=1000, help="optimizer steps")
    add("--batch_size", type=int, default=32, help="examples in a step")
    add("--lr", type=float, default=5e-4, help="peak learning rate of the weights")
    add("--beams", type=int, default=1, help="width of the beam search; 1 is greedy")
    add("--max_new_tokens", type=int, default=32, help="longest text that it may write")
    add("--seed", type=int, default=0, help="of new weights, batches and dropout")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    parser.set_defaults(**HYPER)
    return parser


def main(args):
    started = time.time()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    set_seed(args.seed)
    if args.method == "dense":
        args.sparsity = 1.0
    elif not 0 < args.sparsity < 1:
        raise SystemExit("--sparsity is the fraction KEPT, above 0 and below 1")
    out = args.out or Path(f"out/generate-{args.method}-{args.sparsity:g}-s{args.seed}")

    # ---- data and model
    tokenizer, model = load(args.model)
    model = model.to(args.device, torch.float32).train()
    collate = DataCollatorForSeq2Seq(tokenizer, model=model)
    train = read_tsv(args.data / "train.tsv")
    dev = read_tsv(args.data / "dev.tsv")
    data = argparse.Namespace(
        train=features(train, tokenizer),
        dev=features(dev, tokenizer),
    )
    golds = [target for _, target in dev]
    sentences = [source.split(". ")[0] for source, _ in dev]
    targets = collections.Counter(target for _, target in train)
    frequent = [targets.most_common(1)[0][0]] * len(dev)
    print("floor: the source's first sentence:", show(score(sentences, golds)))
    print("floor: the most frequent target:", show(score(frequent, golds)))
    layers = prunable(model)
    groups = [{"params": list(model.parameters()), "lr": args.lr}]
    # mgpp divides its prior's pull by n, the number of terms in the mean that the loss is. Here the
    # loss is a mean over the tokens of the targets, so n counts tokens and not, as there, examples.
    n = sum(len(row["labels"]) for row in data.train)

    if args.method == "mgpp":
        # ---- copied from mgpp.py: <method: setup>
        if not layers:
            raise SystemExit("the model has no matrix to prune: give another --model")
        weights = [layer.weight for layer in layers.values()]   # W: (out, in) each, pruned in place
        groups[0] |= args.adam
        begin = math.ceil(args.t_i * args.steps)                # steps done at the first zeroing
        end = round((1 - args.t_f) * args.steps)                # and at the last
    if args.method == "soft_mvp":
        # ---- copied from soft_mvp.py: <method: setup>
        if not layers:
            raise SystemExit("the model has no matrix to prune: give another --model")
        # Once m is registered, each read of layer.weight calls m.forward, and gets W * M. This
        # comes before the optimizer, which must find the parameters as they will stay.
        masked = [Masked(layer.weight) for layer in layers.values()]
        for layer, m in zip(layers.values(), masked):
            parametrize.register_parametrization(layer, "weight", m)
        scores = [m.scores for m in masked]             # S: (out, in) each
        # The penalty's part p depends on S itself, so --score_lr matters. No weight decay: it would
        # let the scores forget the early steps.
        groups.append({"params": scores,
                       "lr": args.score_lr, "initial_lr": args.score_lr, "weight_decay": 0.0})

    # ---- the loop
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    scheduler = get_linear_schedule_with_warmup(optimizer, args.steps // 20, args.steps)
    for step in range(args.steps):
        if args.method == "mgpp":
            # ---- copied from mgpp.py: <method: before forward>
            # Decided here; the zeroing itself comes after the step.
            t = step + 1                                        # steps done by then
            pulls = t <= end                                    # up to the last zeroing
            due = t in (begin, end) or (begin < t < end and t % args.interval == 0)
            v = None                                        # no goal until the next zeroing
            if due or not pulls:
                v = fraction_left(t, args.steps, args.sparsity, args.t_i, args.t_f, args.v_i)
        if args.method == "soft_mvp":
            # ---- copied from soft_mvp.py: <method: before forward>
            # Masks first, so that this step's loss and gradients are those of the pruned network.
            v = schedule(step, args.steps, args.sparsity, args.t_i, args.t_f)
            ramp = (1 - v) / (1 - args.sparsity)        # r, from v = 1 - (1 - v_f) r
            update_masks(masked, scores, v, args.scope)

        batch = collate(random.sample(data.train, min(args.batch_size, len(data.train))))
        loss = model(**batch.to(args.device)).loss
        penalty = 0.0
        if args.method == "soft_mvp":
            # ---- copied from soft_mvp.py: <method: penalty>
            # If you accumulate gradients, add the penalty once per step, not once per micro-batch.
            lam = args.lambda_f
            penalty = lam * ramp * sigmoid_penalty(scores)

        optimizer.zero_grad()
        (loss + penalty).backward()

        if args.method == "mgpp":
            # ---- copied from mgpp.py: <method: gradient>
            # The prior's pull joins dL/dW before the optimizer: it enters AdamW's moments with the
            # loss's gradient, and is not decoupled as weight decay is. It ends with the last
            # zeroing. Nothing is clipped: the pull is large, and clipping would shrink the loss's
            # gradient together with it.
            if pulls:
                lam = args.mix or mixing_weight(step, args.steps, args.t_i, args.t_f)
                for w in weights:
                    pull = prior_gradient(w.detach(), lam, args.spike, args.slab)
                    w.grad.add_(pull, alpha=1 / n)
            else:
                remains = [w != 0 for w in weights]         # AdamW moves zeros
        else:
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()

        if args.method == "mgpp":
            # ---- copied from mgpp.py: <method: after step>
            # After AdamW's step, so that the zeros are what the next forward pass sees. AdamW's
            # moments live on: a weight zeroed before the last zeroing moves again at the next step.
            if due:
                zero_smallest(weights, v)
            if not pulls:
                for w, stays in zip(weights, remains):
                    w.data.mul_(stays)

        if (step + 1) % 100 == 0:
            kept = share_kept(layers)
            seconds = time.time() - started
            print(f"step {step + 1:05d}/{args.steps:05d}  loss {loss:.4f}  "
                  f"kept {kept:.1%}  {seconds:.0f} s", flush=True)

    if args.method == "mgpp":
        # ---- copied from mgpp.py: <method: bake>
        # The zeros are in the weights already. Only where T - t_f T was rounded down, the last
        # zeroing came a little early on the cubic, and left a few weights too many: they go now.
        goal = args.sparsity
        zero_smallest(weights, goal)
    if args.method == "soft_mvp":
        # ---- copied from soft_mvp.py: <method: bake>
        # The last step has moved the scores, so they are ranked once more. Then W * M becomes the
        # plain weight of a plain nn.Linear: only now is the model pruned for whoever opens it.
        goal = args.sparsity
        update_masks(masked, scores, goal, args.scope)
        for layer in layers.values():
            parametrize.remove_parametrizations(layer, "weight")

    # ---- save, reload, count the zeros, evaluate
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    model = type(model).from_pretrained(out).to(args.device)
    kept = share_kept(prunable(model))
    texts = []
    for i in range(0, len(dev), 100):
        batch = collate(data.dev[i:i + 100]).to(args.device)
        ids = model.generate(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            num_beams=args.beams,
            max_new_tokens=args.max_new_tokens)
        texts += tokenizer.batch_decode(ids, skip_special_tokens=True)
    for (source, _), text in zip(dev[:3], texts):
        print(f"{source} -> {text}")
    metrics = score(texts, golds)
    seconds = time.time() - started
    line = (f"RESULT {args.method} generate keeps {kept:.2%} (prunes {1 - kept:.2%}) "
            f"{show(metrics)} | {args.steps} steps {seconds:.0f} s seed {args.seed} | {out}")
    result = dict(
        method=args.method,
        task="generate",
        kept=kept,
        metrics=metrics,
        line=line,
    )
    (out / "result.json").write_text(json.dumps(result))
    print(line)


if __name__ == "__main__":
    main(flags().parse_args())

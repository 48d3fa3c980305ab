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
    adam=dict(betas=(0.9, 0.999), eps=1e-8),
    score_lr=1e-2,
    lambda_f=1000.0,
)


# ---- copied from mgpp.py: <method: definitions>

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


# ---- copied from soft_mvp.py: <method: definitions>, without the open loop; top_v is above

def schedule(step, steps, v_f, t_i, t_f):
    """v, the fraction kept at this step: 1, then down the cubic of eq. 5, then v_f."""
    done = (step - t_i * steps) / max(1.0, (1 - t_i - t_f) * steps)
    done = min(max(done, 0.0), 1.0)
    return v_f + (1 - v_f) * (1 - done) ** 3


def least_share(n):
    """The least fraction that global ranking keeps of a matrix of n weights, about 0.5 %."""
    return (int(0.005 * n) + 1) / n


@torch.no_grad()
def update_masks(masked, scores, v):
    """One threshold for all matrices: M is Top_v of all scores together, after each one's floor."""
    sizes = [s.numel() for s in scores]
    row = torch.cat([s.flatten() for s in scores])                      # (N,)
    for part in row.split(sizes):                                       # a view of the row
        part[top_v(part, min(v, least_share(len(part))))] = torch.inf
    for m, mask in zip(masked, top_v(row, v).split(sizes)):
        m.mask.copy_(mask.view_as(m.mask))


def sigmoid_penalty(scores):
    """The mean over matrices of the mean of sigmoid(S) in the matrix."""
    return torch.stack([torch.sigmoid(s).mean() for s in scores]).mean()


class StraightThrough(torch.autograd.Function):
    """W' = W * M; the backward pass takes 1 for the slope of M in S."""

    @staticmethod
    def forward(ctx, weight, scores, mask):
        ctx.save_for_backward(weight, mask)
        return weight * mask

    @staticmethod
    def backward(ctx, grad):
        weight, mask = ctx.saved_tensors
        # grad: dL/dW'. Returned: dL/dW, of kept weights alone; dL/dS, of every weight; no dL/dM.
        return grad * mask, grad * weight, None


class Masked(nn.Module):
    """A parametrization: the layer computes with W' = W * M, and its scores learn through M."""

    def __init__(self, weight):
        super().__init__()
        self.scores = nn.Parameter(torch.zeros_like(weight))            # S: (out, in)
        self.register_buffer("mask", torch.ones_like(weight), persistent=False)     # M: (out, in)

    def forward(self, weight):
        return StraightThrough.apply(weight, self.scores, self.mask)


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
    if not 0 < args.sparsity <= 1:
        raise SystemExit("--sparsity is the fraction KEPT, above 0 and at most 1")
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
    # mgpp.py divides the prior by n, the number of terms in the mean that the loss is over the
    # training data. Here the loss is a mean over the tokens of the targets, not over examples.
    n = sum(len(row["labels"]) for row in data.train)

    if args.method == "mgpp":
        # ---- copied from mgpp.py: <method: setup>
        weights = [layer.weight for layer in layers.values()]   # W: (out, in) each, pruned in place
        groups[0] |= args.adam
        first = math.ceil(args.t_i * args.steps)                # steps done at the first zeroing
        last = round((1 - args.t_f) * args.steps)               # and at the last
    if args.method == "soft_mvp":
        # ---- copied from soft_mvp.py: <method: setup>
        masked = []                                         # none if V = 1: dense fine-tuning
        if args.sparsity < 1:
            masked = [Masked(layer.weight) for layer in layers.values()]
        for layer, m in zip(layers.values(), masked):
            parametrize.register_parametrization(layer, "weight", m)
        scores = [m.scores for m in masked]                                 # S: (out, in) each
        # A score must overtake others within the run, a weight need not: scores learn much faster.
        groups.append({"params": scores, "lr": args.score_lr, "initial_lr": args.score_lr,
                       "weight_decay": 0.0})

    # ---- the loop
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    scheduler = get_linear_schedule_with_warmup(optimizer, args.steps // 20, args.steps)
    for step in range(args.steps):
        if args.method == "mgpp":
            # ---- copied from mgpp.py: <method: before forward>
            t = step + 1
            v = fraction_left(t, args.steps, args.sparsity, args.t_i, args.t_f, args.v_i)
            lam = args.mix or mixing_weight(step, args.steps, args.t_i, args.t_f)
            pruning = step < last and args.sparsity < 1
            due = t % args.interval == 0 or t in (first, last)
            remains = [w != 0 for w in weights]                             # (out, in) each
        if args.method == "soft_mvp":
            # ---- copied from soft_mvp.py: <method: before forward>
            # 0 until t_i T, then up to 1
            ramp = 1 - schedule(step, args.steps, 0.0, args.t_i, args.t_f)
            v = 1 - (1 - args.sparsity) * ramp
            if masked:
                update_masks(masked, scores, v)

        batch = collate(random.sample(data.train, min(args.batch_size, len(data.train))))
        loss = model(**batch.to(args.device)).loss
        penalty = 0.0
        if args.method == "soft_mvp":
            # ---- copied from soft_mvp.py: <method: penalty>
            penalty = torch.tensor(0.0)
            if masked:
                penalty = args.lambda_f * ramp * sigmoid_penalty(scores)

        optimizer.zero_grad()
        (loss + penalty).backward()

        if args.method == "mgpp":
            # ---- copied from mgpp.py: <method: gradient>; gradients are not clipped
            # MAP: the prior's gradient enters AdamW's moments with the loss's, not decoupled.
            if pruning:
                for w in weights:
                    prior = prior_gradient(w.detach(), lam, args.spike, args.slab)
                    w.grad.add_(prior, alpha=1 / n)
        else:
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()

        if args.method == "mgpp":
            # ---- copied from mgpp.py: <method: after step>
            # No mask after a zeroing: AdamW's moments live on, and a zeroed weight may grow again.
            if pruning and due:
                zero_smallest(weights, v)
            elif step >= last:
                # after the last zeroing zeros are final
                for w, stays in zip(weights, remains):
                    w.data.mul_(stays)

        if (step + 1) % 100 == 0:
            kept = share_kept(layers)
            seconds = time.time() - started
            print(f"step {step + 1:05d}/{args.steps:05d}  loss {loss:.4f}  "
                  f"kept {kept:.1%}  {seconds:.0f} s", flush=True)

    if args.method == "mgpp":
        # ---- copied from mgpp.py: <method: bake>
        # The zeros are in the weights already; in a short run the last zeroing left a few too many.
        goal = args.sparsity
        zero_smallest(weights, goal)
    if args.method == "soft_mvp":
        # ---- copied from soft_mvp.py: <method: bake>
        # The last step moved what is ranked: M for v_f once more. W * M becomes the plain weight.
        goal = args.sparsity
        if masked:
            update_masks(masked, scores, goal)
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

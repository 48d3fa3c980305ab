"""Reweighted proximal pruning (RPP) of BERT, in pre-training: a reconstruction.

Paper: Guo, Liu, Mungall, Lin and Wang 2019, arXiv 1909.12486. Its code is not public, and its full
text was not available to us. We had its abstract, the survey of Ganesh et al., code from the same
lab (LinLabNEU/reweighted_prune4 at 3db6f142b6), and what one of us remembered of the text, which we
mark "from memory". RPP's constants that are not so marked are ours.

Continue BERT's pre-training for a while: guess hidden words (MLM), and tell whether text B follows
text A (NSP). All weights are trained, the embeddings too; meanwhile the encoder's matrices are
pruned. The pruned BERT is called the support, and is saved in the run's folder, as support/. Every
task then starts from it: BERT is pruned once for all tasks, on text without labels.

    minimise  f0(w) + gamma sum_i alpha_i |w_i|           f0: BERT's pre-training loss, MLM + NSP

A step has two halves. In the first, Adam lowers f0 and knows nothing of pruning; call its result a.
In the second, the proximal step, each prunable weight is pulled towards 0, even if it is kept, and
a weight that would cross 0 becomes 0:

    w_i = sign(a_i) max(|a_i| - lr gamma alpha_i, 0)

If f0 needs a weight, Adam pushes it back in the next step, as far as an Adam step reaches; if not,
it slides to 0. Of weights that are pulled alike, one step removes the smallest. But every step
shrinks all weights, and only those stay large that Adam pushes back. So the text has a say in what
is kept.

Why "reweighted"? Pruning is divided into --rounds rounds of equal length. In the first, each
alpha_i is 1. When round k ends, alpha_i becomes 1 / (|w_i|^p + eps): from then on small weights are
pulled harder than large ones. In later rounds a large weight is hardly pulled at all, and the
contest goes on among the small ones.

    w            the N weights in the six matrices of each encoder layer, all layers together
    lr           pre-training's learning rate at this step
    gamma        how hard all weights are pulled. By default it is not constant: at each step the
                 product lr gamma is set so that the fraction v remains. (So lr changes only Adam's
                 half of a step.) --gamma G fixes gamma instead, and v is not used. (We know of no
                 good G: try several, each ten times the one before)
    v            fraction kept: s + (1 - s) (1 - progress)^3. progress goes from 0 to 1 over the
                 rounds; s is --sparsity, the fraction KEPT
    p            min(k, 5), but 1 if --gamma is given
    eps          1e-9 (from memory)
    recover      0.3: the last fraction of pre-training. The rounds are over, nothing is pulled any
                 more, zeros stay 0, and the other weights can regain their size

Our default is not the paper's method, as far as we know it: there gamma is fixed, and p is probably
1. --gamma G comes nearer to it. v, its cubic and recover are ours.

In fine-tuning, too, zeros stay 0. Much of this file is BERT's pre-training. The method is five
short functions: fraction_kept, prox, reweight, solve_gamma and proximal_step. (largest_to_go helps
solve_gamma and --nip.)

--nip runs the paper's baseline instead (NIP; from memory, "new iterative pruning"): it removes the
weights that are smallest, over all matrices together, in equal cuts ("stairs"), the last one where
the rounds would end. In between nothing pulls on a weight. A removed weight stays 0. On mini's
squad with 10 % kept and 2,000 steps of pre-training RPP has F1 65.2 (three seeds), NIP 30.7 (two).
In a second series of runs RPP has 64.8, and 53.7 with p = 1 throughout (three seeds each).
--sparsity 1 (without --gamma) is the control: it trains on the text and prunes nothing.

The seconds in the RESULT line do not include pre-training. A new run into the same folder deletes
the old support; --nip and --gamma do not change the folder's name, so give them --out. The paper
preset was run with fewer steps only.

    python rpp.py --task squad --sparsity 0.4
    python rpp.py --task mnli --sparsity 0.4 --support out/rpp-squad-0.4-s0    # another task

With CUDA the default preset is paper, which has no corpus: add --corpus FILE or --preset mini.
Without CUDA, this runs on the made-up data in mini/, and the first command's last line begins:

    RESULT rpp squad keeps 40.00% (prunes 60.00%) EM 81.8 F1 82.3 | 1000 steps ..

With --pretrain_steps 4000 F1 is 98.5. Nothing pruned (magnitude.py --sparsity 1): 99.6.
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
import re
import shutil

from transformers import BertForPreTraining

# </method>
import common

# <method: definitions>
# ---- the method

def fraction_kept(done, rounds_end, v_f, stairs=None):
    """v after `done` steps: from 1 down to v_f (s in the docstring) at rounds_end, by the cubic.

    stairs: the number of equal cuts of --nip, instead of the cubic.
    """
    if stairs is None:
        undone = (1 - min(1.0, done / rounds_end)) ** 3
    else:
        undone = 1 - (min(done, rounds_end) * stairs // rounds_end) / stairs
    return v_f + (1 - v_f) * undone


def largest_to_go(x, v):
    """The limit: remove every element <= the limit, and max(1, round(v n)) of the n are left.

    x: (n,), nothing negative. Returns a float, the largest element that goes; 0.0 if none has to.
    Elements equal to it go, too, so ties can cost a few more than wanted.
    """
    n_go = len(x) - max(1, round(v * len(x)))
    if n_go == 0:
        return 0.0
    if x.device.type == "cpu":                          # numpy selects without a sort
        return float(np.partition(x.numpy(), n_go - 1)[n_go - 1])
    if n_go > len(x) // 2:                              # topk from above has fewer to find
        return float(x.topk(len(x) - n_go + 1, sorted=False).values.min())
    return float(x.topk(n_go, largest=False, sorted=False).values.max())


# Why not add gamma sum_i alpha_i |w_i| to the loss? Its gradient would go through Adam, which
# divides each gradient by that gradient's recent size. Where this term dominates, gamma scales both
# the gradient and that size, and cancels: a larger gamma hardly changes the step. And such steps
# hardly ever end at exactly 0. So Adam minimises f0 alone. Then a second, small problem lowers the
# other term and stays near a, the point that Adam has reached (hence "proximal"):
#     w = argmin_x (x - a)^2 / 2 + threshold |x|,  threshold = lr gamma alpha
# (lr is there because it is the length of the first half's step. Under Adam that differs from
# weight to weight; we take lr for all.) The small problem has an exact solution. For x > 0 the
# slope, x - a + threshold, is 0 at x = a - threshold, if that is above 0. For x < 0 the slope,
# x - a - threshold, is 0 at a + threshold, if that is below 0. Where |a| <= threshold there is
# neither: the minimum is the kink at 0.
def prox(a, threshold):
    """sign(a) max(|a| - threshold, 0): each element moves towards 0 and stops there. Same shape."""
    return a - a.clamp(-threshold, threshold)


# Why divide by |w|? Right after a reweighting with p = 1, each nonzero weight adds about |w| / |w|
# = 1 to sum_i alpha_i |w_i|: the sum counts them, whatever their size. A larger p sets the alphas
# further apart, but eps makes those of the smallest weights equal.
#
# Can a zero come back? Adam moves zeros too. Until the round ends, a new zero keeps its old alpha,
# so later pulls may be too weak to return it to 0. If it is 0 when the round ends, its alpha
# becomes 1 / eps, the largest there is. With p = 1 hardly any other weight has an alpha near that:
# zeros are always the first to go, and stay 0. With p = 5 every weight far below 0.016 has nearly
# the same alpha (|w|^5 < eps). Among these only |a| decides, and a zero can win back its place
# until the rounds are over.
#
# Why p = k? From memory, the paper writes |w|^(t). Perhaps (t) is only an index, w being the one
# after round t, as in the lab's other code. Then there is no power, and p = 1. Or it is a power:
# then p is the round's number. The first reading is likelier, but the second scores better on
# mini's questions with 10 % kept (results/why/README.md), so it is the default here, up to 5.
# --gamma is meant to come near the paper, so it takes the likelier p = 1.
def reweight(w, p, eps):
    """alpha = 1 / (|w|^p + eps), of w's shape."""
    return 1 / (w.abs() ** p + eps)


def solve_gamma(weights, alphas, v, lr):
    """The gamma, a float, at which the proximal step leaves round(v N) of all N weights.

    A weight becomes 0 if |a| <= lr gamma alpha, that is, if |a| / alpha <= lr gamma. Rounding can
    shift the count by a few; equal quotients go together. weights, alphas: (out, in) each.
    """
    quotients = [(a.abs() / alpha).flatten() for a, alpha in zip(weights, alphas)]
    return largest_to_go(torch.cat(quotients), v) / lr


@torch.no_grad()
def proximal_step(weights, alphas, v, lr, gamma=None, p=None, eps=1e-9):
    """The second half of a step, after Adam's. Changes weights and alphas in place; returns gamma.

    weights, alphas: one tensor (out, in) per matrix. lr must not be 0. gamma: if None, it is solved
    for, so that the fraction v remains. p: the exponent of the new alphas if a round ends with this
    step, else None.
    """
    if gamma is None:
        gamma = solve_gamma(weights, alphas, v, lr)
    for w, alpha in zip(weights, alphas):
        w.copy_(prox(w, lr * gamma * alpha))
        if p is not None:
            alpha.copy_(reweight(w, p, eps))
    return gamma


# ---- BERT's pre-training (Devlin et al. 2018, arXiv 1810.04805, appendix A.2)
# MLM: guess 15 % of the words. NSP: does text B follow text A?

def read_corpus(path, tokenizer):
    """Documents, split at blank lines. Each is a list of lines, and a line a list of token ids."""
    documents = []
    for text in re.split(r"\n\s*\n", common.read_text(path).strip()):
        lines = [line.strip() for line in text.split("\n") if line.strip()]
        encoded = tokenizer(lines, add_special_tokens=False)["input_ids"]
        document = [ids for ids in encoded if ids]      # a line of control characters has no token
        if document:
            documents.append(document)
    if len(documents) < 4:
        raise SystemExit(f"{path} has {len(documents)} documents: give four at least, a blank line "
                         "between them")
    return documents


def draw_pair(documents, length, rng):
    """(token ids of text A, those of text B, 1 if B is from another document, else 0).

    A: some lines of a document. B: the lines after A; half of the time, and always if the document
    has only one line, lines of another document. Together they are cut to length - 3 tokens.
    """
    home = int(rng.integers(len(documents)))
    document = documents[home]
    first = int(rng.integers(max(1, len(document) - 1)))
    most = max(1, min(len(document) - first - 1, length // 8))      # lines, if each has 8 tokens
    n_lines = 1 + int(rng.integers(most))
    second = first + n_lines
    a = sum(document[first:second], [])
    swapped = second >= len(document) or rng.random() < 0.5
    if swapped:
        other = home + int(rng.integers(1, len(documents)))
        document = documents[other % len(documents)]
        second = int(rng.integers(len(document)))
    b = sum(document[second:second + length // 8], [])
    room = length - 3                                       # [CLS] A [SEP] B [SEP]
    n_a = min(len(a), max(room - len(b), room // 2))        # a half each, if both are long
    return a[len(a) - n_a:], b[:room - n_a], int(swapped)


def mlm_nsp_batch(documents, tokenizer, words, batch_size, length, rng):
    """A batch for MLM and NSP, with the keys of BertForPreTraining; rng: a numpy Generator.

    15 % of the tokens are to be predicted: of these 80 % become [MASK], 10 % a random one of
    `words` (the vocabulary without special tokens), and 10 % stay. labels: (batch, tokens), -100
    where nothing is to be predicted. next_sentence_label: (batch,), as in draw_pair.
    """
    cls, sep = tokenizer.cls_token_id, tokenizer.sep_token_id
    rows = []
    swaps = []
    for _ in range(batch_size):
        a, b, swapped = draw_pair(documents, length, rng)
        rows.append(dict(
            input_ids=[cls, *a, sep, *b, sep],
            token_type_ids=[0] * (len(a) + 2) + [1] * (len(b) + 1)))
        swaps.append(swapped)
    batch = dict(tokenizer.pad(rows, return_tensors="np"))
    ids = batch["input_ids"]
    asked = ~np.isin(ids, tokenizer.all_special_ids) & (rng.random(ids.shape) < 0.15)
    dice = rng.random(ids.shape)
    random_words = rng.choice(words, ids.shape)
    batch["labels"] = np.where(asked, ids, -100)
    masked = np.where(asked & (dice < 0.9), random_words, ids)
    batch["input_ids"] = np.where(asked & (dice < 0.8), tokenizer.mask_token_id, masked)
    batch["next_sentence_label"] = np.array(swaps)
    return {key: torch.tensor(column) for key, column in batch.items()}


class PreTraining(nn.Module):
    """BERT's two losses. The vocabulary head runs only on the words to be guessed, about 15 %."""

    def __init__(self, model):
        super().__init__()
        self.model = model                                  # a BertForPreTraining

    def forward(self, labels, next_sentence_label, **batch):
        """The loss; which asked words are right, (asked,); which pairs are right, (batch,)."""
        hidden, pooled = self.model.bert(**batch, return_dict=False)[:2]
        asked = torch.nonzero(labels >= 0, as_tuple=True)                   # rows and columns
        logits = self.model.cls.predictions(hidden[asked])                  # (asked, vocabulary)
        order = self.model.cls.seq_relationship(pooled)                     # (batch, 2)
        labels = labels[asked]
        mlm = F.cross_entropy(logits, labels, reduction="sum") / max(1, len(labels))
        nsp = F.cross_entropy(order, next_sentence_label)
        return mlm + nsp, logits.argmax(-1) == labels, order.argmax(-1) == next_sentence_label


@torch.no_grad()
def accuracy(net, batches, device):
    """The percentages of right words (MLM) and right pairs (NSP), as a text."""
    net.eval()
    words, pairs = [], []
    for batch in batches:
        batch = {key: x.to(device) for key, x in batch.items()}
        _, right_words, right_pairs = net(**batch)
        words.append(right_words)
        pairs.append(right_pairs)
    net.train()
    mlm = torch.cat(words).float().mean()
    nsp = torch.cat(pairs).float().mean()
    return f"MLM {mlm:.1%} NSP {nsp:.1%} right"
# </method>

# <method: hyper-parameters>
# Fine-tuning: the values of magnitude.py. Pre-training under the paper preset: rounds, lr,
# batch_size and eps are RPP's, from memory; the rest, and the mini preset, are ours. --steps,
# --batch_size and --lr hold in both phases; --pretrain_steps overrides --steps in pre-training. "*"
# holds for all tasks; a task's own values override it.
MINI = dict(
    model=str(common.MINI / "bert"),
    data=str(common.MINI),
    corpus=str(common.MINI / "corpus.txt"),
    steps=1000, batch_size=32, lr=5e-4,
    length=128,                     # the most tokens in one input
    warmup=0.05,                    # the fraction of the steps in which lr rises
    lr_end=0.0,                     # the fraction of its peak that is left after the last step
    clip=1.0,                       # the norm to which all gradients together are clipped
    rounds=12,                      # of pre-training; not in `pretrain`, so that --rounds sets it
    pretrain=dict(
        steps=200, batch_size=32, lr=1e-3, length=96, warmup=0.05,
        recover=0.3,                # the last fraction of the steps, after the rounds
        p=5, eps=1e-9               # the highest exponent; see reweight
    )
)
PAPER = MINI | dict(
    model="bert-base-uncased",
    data="data",
    corpus=None,
    steps=None, epochs=6, lr=3e-5,
    rounds=6,
    pretrain=MINI["pretrain"] | dict(
        steps=20000, batch_size=256, lr=2e-5, length=128
    )
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
            epochs=10, batch_size=16, length=384, warmup=0.1
        ),
        "mnli": dict(warmup=0.16),
        "qqp": dict(epochs=10, lr=3e-6, warmup=0.1)  # 3e-6: movement pruning's
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
    add("--corpus", help="text to pre-train on, a blank line between documents")
    add("--pretrain_steps", type=number(int),
        help="steps of pre-training; without it --steps, or the preset's")
    add("--gamma", type=number(float),
        help="fix gamma, as in the paper (from memory): it decides what is kept, not --sparsity")
    add("--rounds", type=number(int), help="number of rounds; alpha is reweighted after each")
    add("--nip", action="store_true", help="the paper's baseline: magnitude pruning in stairs")
    add("--support", help="start from the pruned model in this folder: nothing is pre-trained, the "
                          "flags of pre-training change nothing, and --sparsity only names --out")
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
    support = out / "support"                               # pre-training's result is saved here
    inputs.add(os.path.realpath(args.support or args.model))
    if inputs & {os.path.realpath(out), os.path.realpath(support)}:
        raise SystemExit(f"--out {out} holds the --support, --model or --teacher folder: give "
                         "another")
    pretrains = args.support is None
    support_done = pretrains and args.resume and support.exists()       # the killed run's
    if pretrains and args.corpus is None:
        raise SystemExit("pre-training needs a text: give --corpus FILE, or --preset mini")
    if args.nip and args.gamma is not None:
        raise SystemExit("--nip prunes by size and has no gamma: give one of the two")
    phase = dict(args.pretrain)
    for key in ("steps", "batch_size", "lr"):               # the command line overrides HYPER
        phase[key] = given.get(key, phase[key])
    phase["steps"] = args.pretrain_steps or phase["steps"]
    args.pretrain = phase                                   # for result.json
    if pretrains and phase["batch_size"] % world:
        raise SystemExit(f"pre-training's batches of {phase['batch_size']} do not split evenly "
                         f"over {world} processes: give a --batch_size that does")
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
    if pretrains and not support_done:
        documents = read_corpus(Path(args.corpus), tokenizer)
        # every 20th document is held out; of fewer than 40, two or three
        every = min(20, len(documents) // 2)
        held_out = documents[::every]
        documents = [document for i, document in enumerate(documents) if i % every]
    lacking = []                                        # weights that the support lacks
    if args.support:
        folder = Path(args.support)
        if (folder / "support").exists():                   # a run's folder: take its support
            folder = folder / "support"
        elif (folder / "log.jsonl").exists():
            first_line = (folder / "log.jsonl").read_text().partition("\n")[0]
            if f'"script": "{method}"' in first_line:
                raise SystemExit(f"--support {folder} holds no support: give the --support of that "
                                 "run, or let its pre-training end")
        try:
            pruned, info = BertForPreTraining.from_pretrained(folder, output_loading_info=True)
            lacking = info["missing_keys"]
        except Exception as error:
            raise SystemExit(f"--support {folder} cannot be loaded "
                             f"({common.first_line(error)}): give the folder of a "
                             "pruned BERT, or of a run of rpp.py") from None
        shapes = []
        for bert in (pruned.bert, model.bert):
            shapes.append([p.shape for key, p in bert.named_parameters() if "pooler" not in key])
        encoder = ("bert.embeddings", "bert.encoder")
        if shapes[0] != shapes[1] or any(key.startswith(encoder) for key in lacking):
            raise SystemExit(f"--support {folder} does not fit --model {args.model}, or "
                             "lacks weights: give one that was pruned from the same BERT")
    # Delete an old run's results before its log is overwritten. Otherwise a run that is killed in
    # between and resumed would take them for its own.
    unfinished = out / "pretraining.pt"
    if rank == 0 and not args.resume:
        shutil.rmtree(support, ignore_errors=True)
        unfinished.unlink(missing_ok=True)
    # </method>

    # ---- the run's folder
    if rank == 0 and not args.resume:
        out.mkdir(parents=True, exist_ok=True)
        checkpoint.unlink(missing_ok=True)
        (out / "result.json").unlink(missing_ok=True)
        log.write_text(json.dumps(dict(step=0, seconds=0.0, args=settings)) + "\n")

    # <method: before the loop>
    # ---- pre-training: prune the pre-trained BERT on text, and save it in out/support
    if support_done:
        pruned = BertForPreTraining.from_pretrained(support)
    elif pretrains:
        steps = phase["steps"]
        rounds_end = max(1, round((1 - phase["recover"]) * steps))   # steps until rounds end
        stairs = None
        if args.nip:                                        # cuts of about 10 % each, from memory
            stairs = max(1, round((1 - args.sparsity) / 0.1))
        length = min(phase["length"], tokenizer.model_max_length)
        words = np.setdiff1d(np.arange(len(tokenizer)), tokenizer.all_special_ids)
        n_held = min(512, len(held_out))                    # pairs: about one a document
        held_batches = []
        for i in range(0, n_held, 32):
            rng = np.random.default_rng([i])                # the same pairs whatever the seed
            size = min(32, n_held - i)
            held_batches.append(mlm_nsp_batch(held_out, tokenizer, words, size, length, rng))
        pruned, info = BertForPreTraining.from_pretrained(
            args.model, dtype=torch.float32, output_loading_info=True)
        pruned = pruned.to(device).train()
        if info["missing_keys"]:
            print(f"{args.model} lacks a head, which starts anew: {sorted(info['missing_keys'])}")
        weights = [layer.weight for layer in common.prunable(pruned).values()]   # w: (out, in) each
        net = PreTraining(pruned)
        if world > 1:
            net = DDP(net, broadcast_buffers=False)
        optimizer = torch.optim.AdamW(
            pruned.parameters(), weight_decay=0.0, fused=True)
        saved = dict(step=0, alphas=[torch.ones_like(w) for w in weights])      # where it starts
        if args.resume and unfinished.exists():
            saved = torch.load(unfinished, map_location=device)
            pruned.load_state_dict(saved["model"])
            optimizer.load_state_dict(saved["optimizer"])
        alphas = saved["alphas"]
        with autocast:
            first_scores = accuracy(net, held_batches, device)
        print(f"pre-training from step {saved['step']} of {steps} on {args.corpus}: {first_scores}")
        started = time.time()
        for step in range(saved["step"], steps):
            torch.manual_seed((args.seed * 1_000_003 + step) * world + rank)
            rng = np.random.default_rng([args.seed, step])
            batch = mlm_nsp_batch(
                documents, tokenizer, words, phase["batch_size"], length, rng)
            batch = {key: x[rank::world].to(device) for key, x in batch.items()}
            lr = phase["lr"] * lr_factor(step, steps, phase["warmup"], 0.0)
            optimizer.param_groups[0]["lr"] = lr
            with autocast:                                  # f0: no penalty is in it
                loss, _, _ = net(**batch)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(pruned.parameters(), args.clip)
            done = step + 1
            v = fraction_kept(done, rounds_end, args.sparsity, stairs)
            ended_before = step * args.rounds // rounds_end             # rounds, before this step
            ended = min(done, rounds_end) * args.rounds // rounds_end   # and after it
            p = None
            if ended > ended_before:                        # one ends with this step
                p = 1 if args.gamma else min(ended, phase["p"])
            gamma = 0.0
            zeros = [w == 0 for w in weights]               # before Adam moves them; used in `else`
            optimizer.step()                                # the first half: w becomes a
            with torch.no_grad():
                if step < rounds_end and not args.nip:      # the second half, while rounds last
                    gamma = proximal_step(weights, alphas, v, lr, args.gamma, p, phase["eps"])
                else:                                       # after that, or with --nip: zeros stay
                    for w, zero in zip(weights, zeros):
                        w.masked_fill_(zero, 0.0)
                # --nip cuts where v is lower than before this step
                if args.nip and v < fraction_kept(step, rounds_end, args.sparsity, stairs):
                    limit = largest_to_go(torch.cat([w.abs().flatten() for w in weights]), v)
                    for w in weights:
                        w.masked_fill_(w.abs() <= limit, 0.0)

            if rank == 0 and (done % 50 == 0 or done == steps):
                kept = common.count_kept(pruned)[1]
                print(f"pre-training step {done:05d}/{steps:05d}  loss {loss:.4f}  "
                      f"gamma {gamma:.2e}  kept {kept:.1%}  lr {lr:.1e}", flush=True)
                line = dict(pretraining_step=done, loss=loss.item(),
                            gamma=gamma, kept=kept, lr=lr)
                with open(log, "a") as file:
                    print(json.dumps(line), file=file)
                if not torch.isfinite(loss):
                    raise SystemExit(f"the loss is {loss} at step {done}: give a smaller --lr")
            if rank == 0 and done % args.checkpoint_every == 0:
                torch.save(dict(
                    model=pruned.state_dict(), optimizer=optimizer.state_dict(),
                    alphas=alphas, step=done), out / "pretraining.part")
                os.replace(out / "pretraining.part", unfinished)
        with autocast:
            last_scores = accuracy(net, held_batches, device)
        print(f"pre-training from step {saved['step']} took {time.time() - started:.0f} s: "
              f"before {first_scores}, after {last_scores}")
        if rank == 0:                   # under another name first, so that it is whole or not there
            part = out / "support.part"
            shutil.rmtree(part, ignore_errors=True)
            pruned.save_pretrained(part)
            tokenizer.save_pretrained(part)
            os.replace(part, support)
            unfinished.unlink(missing_ok=True)
        del net, optimizer, alphas, saved, weights, documents, held_batches     # room for the task

    # ---- fine-tuning starts from the support's encoder, embeddings and pooler, not its heads
    parts = pruned.state_dict()
    for key in lacking:             # absent from --support, so random in `pruned`: not copied
        parts.pop(key)
    model.load_state_dict(parts, strict=False)
    del pruned, parts
    goal = args.sparsity
    if args.support:
        goal = common.count_kept(model)[1]
        print(f"the support keeps {goal:.2%}: this is the goal, whatever --sparsity says")
    elif args.gamma:
        goal = None
        print("--gamma decides what is kept: --sparsity is no goal of this run")
    remains = [layer.weight != 0 for layer in layers.values()]              # (out, in) each
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
        v = goal                                        # nothing more is pruned
        # </method>

        with autocast:
            loss = task_loss(net, batch, teacher)

        # <method: penalty>
        penalty = torch.tensor(0.0)                     # the loss is the task's alone
        # </method>

        optimizer.zero_grad()
        (loss + penalty).backward()

        # <method: gradient>
        # Before the optimizer, because a weight whose gradients were all 0 has moments of 0, and
        # AdamW leaves it at 0. Before clipping, so that pruned weights do not count in the norm.
        # (After the rounds of pre-training a weight still has moments from before it was pruned, so
        # there its zero is restored after each step.)
        for layer, stays in zip(layers.values(), remains):
            layer.weight.grad.mul_(stays)
        # </method>

        nn.utils.clip_grad_norm_(parameters, args.clip)     # one norm of all gradients
        optimizer.step()

        # <method: after step>
        # nothing: pruning ended with pre-training
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
    # nothing: the zeros are in the weights of plain nn.Linear layers
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

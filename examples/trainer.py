"""Soft movement pruning in a Hugging Face Trainer, to copy into your own fine-tuning.

The script fine-tunes an encoder to classify texts. Meanwhile it prunes every nn.Linear in the
encoder's layers, but neither the embeddings nor the head. SoftMovement is the method as one object;
its definitions are copied from soft_mvp.py, which explains them. PruningCallback and PruningTrainer
say when a Trainer calls it. Copy these and the definitions, and prunable(), which you may have to
change where a model names its layers otherwise. All else is ordinary use of the Trainer. Parameters
are stored in float32 (bf16=True is fine). Leave load_best_model_at_end off: an early model is not
pruned enough.

    pip install accelerate                              # transformers' Trainer needs it
    python examples/trainer.py --sparsity 0.1           # keeps 10 %; minutes on a CPU
    python examples/trainer.py --model roberta-base --lr 3e-5 --steps 20000 --data DIR \
        --columns text label --out out/mine         # a real model needs thousands of steps
    python examples/trainer.py --resume                 # killed? your command, plus --resume
    torchrun --nproc_per_node=4 examples/trainer.py     # four GPUs, --batch_size on each

Model   any encoder that transformers has: a folder, or a name on the hub. By default mini/bert
Data    DIR/train.tsv and DIR/dev.tsv, tabs between columns, no quoting. --columns names the text
        (or two texts), then the label. By default the pairs of questions in mini/glue/QQP.
        A text is cut after 128 tokens
Last line (the best guesser has accuracy 61.5 here; results/README.md, "Floors"):
RESULT trainer keeps 10.00% (prunes 90.00%) accuracy 98.2 | 1000 steps 368 s seed 0 |
out/trainer-0.1-s0
"""
import argparse
import csv
import re
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn.utils import parametrize
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

MINI = Path(__file__).resolve().parent.parent / "mini"


# ---- copied from soft_mvp.py: <method: definitions>, without the open loop

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


# ---- the method as one object: the slots of soft_mvp.py's main

class SoftMovement:
    """Prunes layers until the fraction v_f of their weights is kept.

    lambda_f: the penalty's weight in the end. t_i, t_f: fractions of the run before pruning begins
    and after it has ended.
    """

    def __init__(self, v_f, lambda_f=1000.0, t_i=0.05, t_f=0.3):
        self.v_f = v_f
        self.lambda_f = lambda_f
        self.t_i = t_i
        self.t_f = t_f
        self.ramp = 0.0                         # from 0 to 1 while weights are pruned

    def attach(self, layers):
        """Give each layer a mask and scores, before an optimizer is made or a checkpoint loaded.

        layers: modules with a matrix `weight` in float32, which no other layer shares.
        """
        if not layers:
            raise SystemExit("there is no layer to prune: it takes modules with a matrix `weight`")
        self.layers = layers
        for layer in layers:
            parametrize.register_parametrization(layer, "weight", Masked(layer.weight))

    # Read from the layers each time: a wrapper may have given them other parameters since attach.
    def masked(self):
        return [layer.parametrizations.weight[0] for layer in self.layers]

    def scores(self):
        return [m.scores for m in self.masked()]                        # S: (out, in) each

    def before_forward(self, step, steps):
        """Set the masks for an optimizer step, number `step` of `steps`, counted from 0."""
        v = schedule(step, steps, self.v_f, self.t_i, self.t_f)
        self.ramp = (1 - v) / (1 - self.v_f)
        update_masks(self.masked(), self.scores(), v, scope="global")

    def penalty(self):
        """What is added to the loss: once per optimizer step, and never in evaluation."""
        return self.lambda_f * self.ramp * sigmoid_penalty(self.scores())

    def bake(self):
        """Make plain layers, zeros in place. The last step moved scores: they are ranked again."""
        update_masks(self.masked(), self.scores(), self.v_f, scope="global")
        for layer in self.layers:
            parametrize.remove_parametrizations(layer, "weight")


# ---- when a Trainer calls it

class PruningCallback(TrainerCallback):
    """Sets the masks at the beginning of each optimizer step, and bakes at the end of training.

    It bakes whatever weights are there then. With early stopping or load_best_model_at_end they may
    be of a step at which much more was kept, and all the rest would be pruned in one blow.
    """

    def __init__(self, method):
        self.method = method

    def on_step_begin(self, args, state, control, **others):
        # Once per optimizer step, however many micro-batches it has. A resumed run begins here too:
        # no checkpoint holds masks, they follow from the scores.
        self.method.before_forward(state.global_step, state.max_steps)

    def on_train_end(self, args, state, control, **others):
        self.method.bake()


class PruningTrainer(Trainer):
    """A Trainer that adds the penalty, and gives the scores a learning rate of their own."""

    def __init__(self, *args, method, score_lr=1e-2, **others):
        super().__init__(*args, **others)
        self.add_callback(PruningCallback(method))
        self.method = method
        self.score_lr = score_lr
        # To accumulate gradients a Trainer divides the loss by the number of micro-batches, unless
        # the model seems to do so. BERT seems to and does not: its loss would be 4 times too large
        # with 4 micro-batches, beside a penalty that is right.
        self.model_accepts_loss_kwargs = False

    def create_optimizer(self, model=None):
        # The Trainer's optimizer takes all that requires a gradient. For a moment scores do not.
        scores = self.method.scores()
        for s in scores:
            s.requires_grad_(False)
        optimizer = super().create_optimizer(model)
        for s in scores:
            s.requires_grad_(True)
        optimizer.add_param_group({"params": scores, "lr": self.score_lr, "weight_decay": 0.0})
        return optimizer

    def training_step(self, *args, **others):
        # Called once per micro-batch, and not in evaluation, as compute_loss is. The penalty has a
        # backward pass of its own: its gradient is added to the loss's. With several processes all
        # add the same, after theirs have been averaged. The logged loss is without the penalty.
        loss = super().training_step(*args, **others)
        if self.accelerator.sync_gradients:     # the last micro-batch of this optimizer step
            self.accelerator.backward(self.method.penalty())
        return loss


# ---- data and model

def read_tsv(path, columns):
    """[[text, label]] or [[text, second text, label]]; the file's first line names its columns."""
    rows = []
    with open(path, encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        header = reader.fieldnames or []
        if not set(columns) <= set(header):
            raise SystemExit(f"{path} has the columns {header}: name text and label by --columns")
        for row in reader:
            if None in row or None in row.values():
                raise SystemExit(f"{path}, line {reader.line_num}: more or fewer cells than names")
            rows.append([row[name].strip() for name in columns])
    return rows


def features(rows, classes, tokenizer):
    """[{input_ids, attention_mask, .., label}], lists of numbers; label is a place in classes."""
    *texts, labels = map(list, zip(*rows))
    columns = dict(tokenizer(*texts, truncation=True, max_length=128))
    columns["label"] = [classes.index(label) for label in labels]
    return [dict(zip(columns, values)) for values in zip(*columns.values())]


def prunable(model):
    """The nn.Linear whose name holds a number: those of the encoder's layers, not of the head."""
    return [module for name, module in model.base_model.named_modules()
            if isinstance(module, nn.Linear) and re.search(r"\.\d+\.", name)]


def share_kept(layers):
    kept = sum(int(torch.count_nonzero(layer.weight)) for layer in layers)
    return kept / sum(layer.weight.numel() for layer in layers)


def accuracy(outputs):
    guesses = outputs.predictions.argmax(axis=1)
    return {"accuracy": 100 * float(np.mean(guesses == outputs.label_ids))}


def flags():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--sparsity", type=float, default=0.1, metavar="V", help="fraction of the weights KEPT")
    add("--model", default=str(MINI / "bert"), help="an encoder: a folder, or a name on the hub")
    add("--data", type=Path, default=MINI / "glue" / "QQP", help="folder of train.tsv and dev.tsv")
    add("--columns", nargs="+", default=["question1", "question2", "is_duplicate"],
        help="names in the header: the text or two texts, then the label")
    add("--out", type=Path, help="folder for the pruned model; default out/trainer-V-sSEED")
    add("--steps", type=int, default=1000, help="optimizer steps")
    add("--batch_size", type=int, default=32, help="of one micro-batch")
    add("--accumulate", type=int, default=1, help="micro-batches in an optimizer step")
    add("--lr", type=float, default=5e-4, help="peak learning rate of the weights")
    add("--seed", type=int, default=0, help="of a new head, batches and dropout")
    add("--checkpoint_every", type=int, default=500, help="optimizer steps; each is evaluated too")
    add("--resume", action="store_true", help="go on from the last checkpoint in --out")
    return parser


def main(args):
    started = time.time()
    if not 0 < args.sparsity < 1:
        raise SystemExit("--sparsity is the fraction KEPT, above 0 and below 1")
    out = args.out or Path(f"out/trainer-{args.sparsity:g}-s{args.seed}")
    if any(out.glob("checkpoint-*")) and not args.resume:
        raise SystemExit(f"--out {out} holds another run: give a new folder, or --resume")
    set_seed(args.seed)                         # of a head that is new

    # ---- data and model
    train = read_tsv(args.data / "train.tsv", args.columns)
    dev = read_tsv(args.data / "dev.tsv", args.columns)
    classes = sorted({label for *_, label in train})
    if len(classes) < 2:
        raise SystemExit(f"{args.data}/train.tsv has one class alone, {classes}")
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    loaded = AutoModelForSequenceClassification.from_pretrained(
        args.model,
        id2label=dict(enumerate(classes)),
        label2id={label: i for i, label in enumerate(classes)},
        dtype=torch.float32,                    # else the folder's own, which may be half precision
    )
    # BERT's own files call the weights of a norm gamma and beta. transformers would go on saving
    # them under these names, and the Trainer, when it resumes, would not find them. A model made
    # anew saves today's names.
    model = AutoModelForSequenceClassification.from_config(loaded.config)
    model.load_state_dict(loaded.state_dict())

    # ---- train
    method = SoftMovement(args.sparsity)
    method.attach(prunable(model))
    settings = TrainingArguments(
        output_dir=out,
        max_steps=args.steps,
        per_device_train_batch_size=args.batch_size,
        gradient_accumulation_steps=args.accumulate,
        learning_rate=args.lr,
        warmup_steps=0.05,                      # a fraction of the steps
        eval_strategy="steps",
        eval_steps=args.checkpoint_every,
        save_steps=args.checkpoint_every,
        save_total_limit=1,
        logging_steps=100,
        report_to="none",
        dataloader_pin_memory=torch.cuda.is_available(),
        ddp_broadcast_buffers=False,            # the masks: each process has found the same
        seed=args.seed,
    )
    common = dict(
        args=settings,
        data_collator=DataCollatorWithPadding(tokenizer),
        eval_dataset=features(dev, classes, tokenizer),
        compute_metrics=accuracy,
    )
    trainer = PruningTrainer(
        model,
        method=method,
        train_dataset=features(train, classes, tokenizer),
        processing_class=tokenizer,
        **common,
    )
    trainer.train(resume_from_checkpoint=args.resume)
    trainer.save_model()                        # into --out; on_train_end has made plain layers

    # ---- what is counted and evaluated is what the folder holds
    trainer.accelerator.wait_for_everyone()     # with several processes one of them saves
    model = AutoModelForSequenceClassification.from_pretrained(out)
    kept = share_kept(prunable(model))
    metrics = Trainer(model, **common).evaluate()
    seconds = time.time() - started
    if not trainer.is_world_process_zero():
        return
    print(f"RESULT trainer keeps {kept:.2%} (prunes {1 - kept:.2%}) "
          f"accuracy {metrics['eval_accuracy']:.1f} | {args.steps} steps {seconds:.0f} s "
          f"seed {args.seed} | {out}")


if __name__ == "__main__":
    main(flags().parse_args())

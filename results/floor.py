"""The floor of every task: what a model gets that has understood nothing.

    python results/floor.py --data mini            the embedded world
    python results/floor.py --data DIR             real data, those tasks that DIR has

Guessers for classification: the most frequent class of the training file; and a bag of words, a
logistic regression on which words a text has (for pairs: which words both have, which words one
alone has, and how many). Four epochs of AdamW, lr 0.01, batch 32, seed 0. Guessers for SQuAD: the
first words of the context; the words after the place where most of the question's words stand; the
most frequent answer of the training file. The floor is the best of them. Each is a row of
results/floor.tsv.
"""
import argparse
import collections
import re
import sys
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import common  # noqa: E402

TSV = ROOT / "results" / "floor.tsv"


def words(text):
    return re.findall(r"\w+|[^\w\s]", text.lower())


# ---- classification

def features_of(row):
    """The words of a text; of a pair which words are shared and which are not, and how many."""
    first, second, _ = row
    a = set(words(first))
    if second is None:
        return a
    b = set(words(second))
    features = {f"both {word}" for word in a & b} | {f"one {word}" for word in a ^ b}
    overlap = round(10 * len(a & b) / max(1, len(b)))
    return features | {f"second {word}" for word in b} | {f"overlap {overlap}"}


def bag_of_words(task, train, dev, n_classes):
    """{name of the dev file: logits, (rows, classes)}."""
    torch.manual_seed(0)
    counts = collections.Counter(f for row in train for f in features_of(row))
    known = [feature for feature, count in counts.items() if count > 1]
    place = {feature: i for i, feature in enumerate(known)}

    def places(row):
        return [place[f] for f in sorted(features_of(row)) if f in place]

    weights = torch.nn.EmbeddingBag(len(place) + 1, n_classes, mode="sum")
    torch.nn.init.zeros_(weights.weight)
    bias = torch.nn.Parameter(torch.zeros(n_classes))
    optimizer = torch.optim.AdamW([*weights.parameters(), bias], lr=0.01)
    rows = [(places(row), row[2]) for row in train]

    def logits(bags):
        starts = np.cumsum([0, *(len(bag) for bag in bags[:-1])])
        return weights(torch.tensor(sum(bags, [])).long(), torch.from_numpy(starts)) + bias

    for _ in range(4):
        order = torch.randperm(len(rows)).tolist()
        for at in range(0, len(order), 32):
            batch = [rows[i] for i in order[at:at + 32]]
            labels = torch.tensor([label for _, label in batch])
            loss = torch.nn.functional.cross_entropy(logits([bag for bag, _ in batch]), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    with torch.no_grad():
        return {name: logits([places(row) for row in dev[name]]).numpy() for name in dev}


def classification(task, folder):
    """{guesser: metrics}"""
    labels = common.TASKS[task].labels
    rows = {}
    for name in ["train", *common.dev_names(task)]:
        path = folder / common.TASKS[task].folder / f"{name}.tsv"
        rows[name], labels = common.read_tsv(path, task, labels)
    train = rows.pop("train")
    majority = np.bincount([label for _, _, label in train]).argmax()
    constant = {name: np.tile(np.eye(len(labels))[majority], (len(rows[name]), 1)) for name in rows}
    guesses = {"majority class": constant,
               "bag of words": bag_of_words(task, train, rows, len(labels))}
    scores = {}
    for guesser, logits in guesses.items():
        scores[guesser] = {}
        for name in rows:
            gold = np.array([label for _, _, label in rows[name]])
            scores[guesser] |= common.glue_metrics(task, name, logits[name], gold)
    return scores


# ---- SQuAD

def first_words(question, context, n=3):
    return " ".join(context.split()[:n])


def after_the_overlap(question, context, n=3):
    """The n words after the stretch of ten that holds most of the question's words."""
    asked = set(words(question))
    tokens = context.split()
    hits = [bool(asked & set(words(token))) for token in tokens]
    stretches = [sum(hits[i:i + 10]) for i in range(len(tokens))]
    start = int(np.argmax(stretches))
    last = max([i for i in range(start, min(start + 10, len(tokens))) if hits[i]], default=start)
    return " ".join(tokens[last + 1:last + 1 + n])


def name_near_the_overlap(question, context):
    """The run of capitals or digits, absent from the question, nearest to the question's words."""
    asked = set(words(question))
    tokens = context.split()
    hits = [i for i, token in enumerate(tokens) if asked & set(words(token))] or [0]
    best = (len(tokens), "")
    for match in re.finditer(r"(?:[A-Z][\w-]*|\d[\d,.]*)(?: (?:[A-Z][\w-]*|\d[\d,.]*))*", context):
        if asked & set(words(match[0])):
            continue
        place = len(context[:match.start()].split())
        distance = float(np.mean([abs(place - hit) for hit in hits]))
        best = min(best, (distance, match[0]))
    return best[1]


def squad(folder):
    """{guesser: metrics}"""
    train = common.read_squad(folder / "squad" / "train-v1.1.json")
    dev = common.read_squad(folder / "squad" / "dev-v1.1.json")
    answers = collections.Counter(row[3][0][0] for row in train)
    frequent = answers.most_common(1)[0][0]
    guessers = {
        "first words": first_words,
        "words after the overlap": after_the_overlap,
        "name near the overlap": name_near_the_overlap,
        "most frequent answer": lambda question, context: frequent,
    }
    scores = {}
    for name, guess in guessers.items():
        pairs = [common.em_f1(guess(question, context), [text for text, _ in golds])
                 for _, question, context, golds in dev]
        em, f1 = 100 * np.mean(pairs, axis=0)
        scores[name] = {"EM": float(em), "F1": float(f1)}
    return scores


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    args = parser.parse_args()
    world = "embedded" if args.data.resolve() == common.MINI else "real"
    rows = []
    if TSV.exists():
        lines = TSV.read_text().split("\n")[1:-1]
        rows = [line.split("\t") for line in lines if not line.startswith(world)]
    for task in common.TASKS:
        folder = args.data / ("squad" if task == "squad" else common.TASKS[task].folder)
        if not folder.exists() or task == "stsb":
            continue
        scores = squad(args.data) if task == "squad" else classification(task, args.data)
        for guesser, metrics in scores.items():
            text = " ".join(f"{name} {value:.2f}" for name, value in metrics.items())
            shown = "mini" if world == "embedded" else "DIR"
            rows.append([world, task, guesser, text, f"python results/floor.py --data {shown}"])
            print(*rows[-1][:4], sep="  ", flush=True)
    header = ["data", "task", "guesser", "scores", "command"]
    TSV.write_text("".join("\t".join(row) + "\n" for row in [header, *rows]))


if __name__ == "__main__":
    main()

"""The floor of every task: what a model gets that has understood nothing.

    python results/floor.py --data mini            the data in mini/
    python results/floor.py --data DIR             real data, those tasks that DIR has

Guessers for classification: the most frequent class of the training file; for QQP and MRPC also
"duplicate" every time, whose F1 is high; and a bag of words, a logistic regression on which words a
text has (for pairs: which words both have, which words one alone has, and how many). Four epochs of
AdamW, lr 0.01, batch 32; the mean of five seeds.
Guessers for SQuAD: the first words of the context; the most frequent answer of the training file;
the sentence that has most of the question's words, without these words; and in that sentence the
name or number nearest to them.
Guessers for text generation (examples/generate.py): the source's first sentence; the most frequent
question of the training file; and the most frequent first two words of its questions, then the name
that the source has most often (Ilbert Grimwell, the gentle lion).
Each guesser is a row of results/floor.tsv. The floor of a metric is the best of them.
"""
import argparse
import collections
import re
import sys
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]
import generate  # noqa: E402

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
    shared = a & b
    overlap = round(10 * len(shared) / max(1, len(b)))
    features = {f"overlap {overlap}"}
    features |= {f"both {word}" for word in shared}
    features |= {f"one {word}" for word in a ^ b}
    features |= {f"second {word}" for word in b}
    return features


def bag_of_words(train, dev, n_classes, seed):
    """{name of the dev file: logits, (rows, classes)}."""
    torch.manual_seed(seed)
    counts = collections.Counter()
    for row in train:
        counts.update(features_of(row))
    known = sorted(feature for feature in counts if counts[feature] > 1)
    place = {feature: i for i, feature in enumerate(known)}

    def bag(row):
        return [place[f] for f in sorted(features_of(row)) if f in place]

    weights = torch.nn.EmbeddingBag(len(place) + 1, n_classes, mode="sum")
    torch.nn.init.zeros_(weights.weight)
    bias = torch.nn.Parameter(torch.zeros(n_classes))
    optimizer = torch.optim.AdamW([weights.weight, bias], lr=0.01)
    bags = [bag(row) for row in train]
    labels = torch.tensor([label for _, _, label in train])

    def logits(bags):
        starts = np.cumsum([0, *(len(bag) for bag in bags[:-1])])
        places = torch.tensor(sum(bags, [])).long()
        return weights(places, torch.from_numpy(starts)) + bias

    for _ in range(4):
        for batch in torch.randperm(len(bags)).split(32):
            scores = logits([bags[i] for i in batch])
            loss = torch.nn.functional.cross_entropy(scores, labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    with torch.no_grad():
        return {
            name: logits([bag(row) for row in rows]).numpy()
            for name, rows in dev.items()
        }


def metrics_of(task, dev, logits):
    metrics = {}
    for name, rows in dev.items():
        gold = np.array([label for _, _, label in rows])
        metrics |= common.glue_metrics(task, name, logits[name], gold)
    return metrics


def classification(task, folder):
    """{guesser: metrics}"""
    classes = common.TASKS[task].classes
    dev = {}
    for name, path in common.task_files(task, folder).items():
        dev[name], classes = common.read_tsv(path, task, classes)
    train = dev.pop("train")
    counts = np.bincount([label for _, _, label in train])
    constants = {"majority class": counts == counts.max()}              # (classes,)
    if task in ("qqp", "mrpc"):                 # their F1 is that of the class 1, duplicate
        constants["always duplicate"] = np.arange(len(classes)) == 1
    scores = {}
    for guesser, constant in constants.items():
        logits = {name: np.tile(constant, (len(dev[name]), 1)) for name in dev}
        scores[guesser] = metrics_of(task, dev, logits)
    runs = []
    for seed in range(5):
        logits = bag_of_words(train, dev, len(classes), seed)
        runs.append(metrics_of(task, dev, logits))
    scores["bag of words"] = {
        name: np.mean([run[name] for run in runs])
        for name in runs[0]
    }
    return scores


# ---- SQuAD

def first_words(question, context):
    return " ".join(context.split()[:3])


def nearest_sentence(question, context):
    """The sentence that has most of the question's words."""
    asked = set(words(question))
    sentences = re.split(r"(?<=[.!?])\s+", context)
    found = [len(asked & set(words(sentence))) for sentence in sentences]
    return sentences[np.argmax(found)]


def rest_of_sentence(question, context):
    """The nearest sentence without the question's words."""
    asked = set(words(question))
    tokens = nearest_sentence(question, context).split()
    return " ".join(token for token in tokens if not asked & set(words(token)))


def name_in_sentence(question, context):
    """The run of capitals or digits, absent from the question, nearest to the question's words."""
    asked = set(words(question))
    sentence = nearest_sentence(question, context)
    tokens = sentence.split()
    hits = [i for i, token in enumerate(tokens) if asked & set(words(token))]
    one = r"(?:[A-Z][\w-]*|\d[\d,.]*)"
    best = (len(sentence), "")
    for match in re.finditer(f"{one}(?: {one})*", sentence):
        if not asked & set(words(match[0])):
            place = len(sentence[:match.start()].split())
            distance = np.mean([abs(place - hit) for hit in hits or [0]])
            best = min(best, (distance, match[0]))
    return best[1]


def squad(folder):
    """{guesser: metrics}"""
    train = common.read_squad(folder / "squad/train-v1.1.json")
    dev = common.read_squad(folder / "squad/dev-v1.1.json")
    answers = collections.Counter(golds[0][0] for *_, golds in train)
    frequent = answers.most_common(1)[0][0]
    guessers = {
        "first words": first_words,
        "most frequent answer": lambda question, context: frequent,
        "rest of the sentence": rest_of_sentence,
        "name in the sentence": name_in_sentence,
    }
    scores = {}
    for name, guess in guessers.items():
        pairs = []
        for _, question, context, answers in dev:
            answer = guess(question, context)
            golds = [text for text, _ in answers]
            pairs.append(common.em_f1(answer, golds))
        em, f1 = 100 * np.mean(pairs, axis=0)
        scores[name] = {"EM": em, "F1": f1}
    return scores


# ---- text generation

def most_frequent(texts):
    return collections.Counter(texts).most_common(1)[0][0]


def question_about_the_name(source, beginning):
    names = re.findall(r"[A-Z]\w+ [A-Z]\w+|[Tt]he \w+ \w+", source)
    return f"{beginning} {most_frequent(names or ['it'])}?"            # a few have no such name


def generation(folder):
    """{guesser: metrics}"""
    train = generate.read_tsv(folder / "train.tsv")
    dev = generate.read_tsv(folder / "dev.tsv")
    questions = [question for _, question in train]
    frequent = most_frequent(questions)
    beginning = most_frequent(" ".join(question.split()[:2]) for question in questions)
    guessers = {
        "first sentence": lambda source: source.split(". ")[0],
        "most frequent question": lambda source: frequent,
        "question about the name": lambda source: question_about_the_name(source, beginning),
    }
    scores = {}
    for name, guess in guessers.items():
        guesses = [guess(source) for source, _ in dev]
        scores[name] = generate.score(guesses, [question for _, question in dev])
    return scores


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    args = parser.parse_args()
    source = "real"
    shown = "DIR"
    if args.data.resolve() == common.MINI:
        source = "mini"
        shown = "mini"
    rows = [line.split("\t") for line in TSV.read_text().split("\n")[1:-1]]
    classified = common.TASKS.keys() - {"squad", "stsb"}
    for task in [*common.TASKS, "generate"]:
        if task == "squad" and (args.data / task).exists():
            scores = squad(args.data)
        elif task == "generate" and source == "mini":
            scores = generation(args.data / task)
        elif task in classified and (args.data / common.TASKS[task].folder).exists():
            scores = classification(task, args.data)
        else:
            continue
        rows = [row for row in rows if row[:2] != [source, task]]
        for guesser, metrics in scores.items():
            text = " ".join(f"{name} {value:.2f}" for name, value in metrics.items())
            command = f"python results/floor.py --data {shown}"
            rows.append([source, task, guesser, text, command])
            print(source, task, guesser, text, sep="  ", flush=True)
    header = ["data", "task", "guesser", "scores", "command"]
    lines = ["\t".join(row) for row in [header, *rows]]
    TSV.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()

"""Makes the embedded world: a small pre-trained BERT, and SQuAD, MNLI, QQP and a corpus about it.

    python mini/make.py                everything: the committed files are its output
    python mini/make.py --data_only    the data alone, in seconds, always the same bytes

Writes
    squad/{train,dev}-v1.1.json   5,000 and 600 questions on texts of 35 to 70 words
    glue/MNLI, glue/QQP           16,000 and 6,000 training pairs; 450 + 450 and 500 to evaluate
    generate/{train,dev}.tsv      source: a text and an answer; target: the question (examples/)
    corpus.txt                    9,000 short documents, for rpp.py to pre-train on
    bert/                         BertForPreTraining: 4 layers of width 128, 1,302 words

The world: people, towns, ships and books have 70 relations (words.py) to people, places, years,
things and goods; each relation has three ways to say it and three to ask for it. Every fact is
drawn afresh, so a model cannot look facts up. What it can learn is meaning: which question asks for
which statement, and to copy a name from where it stands. A text holds several facts of one kind
("was jailed in Karwick", "is buried in Helton"), so the kind of word asked for does not give the
answer away. MNLI's neutral pairs and QQP's near misses differ in the relation alone. Mismatched
MNLI is hearsay: each of its sentences begins with "It is said that" or the like. Names are dealt to
corpus, train and dev by a rule: no subject and no full name of dev occurs in the other two.

Pre-training is BERT's (MLM and NSP, rpp.py), with three changes without which no copying formed in
the time: answers and repeated names are masked more often; texts grow from 2 facts to 6; the start
is not BERT's own (see pretrain). It took 37 minutes on one core of a two-core machine (14,000 steps
of 32 pairs, torch 2.13.0). The corpus must contain questions: with few of them, what question
answering needs is pruned away in rpp.py's pre-training.
"""
import argparse
import json
import re
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from transformers import BertConfig, BertForPreTraining, BertTokenizerFast

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
import words as w  # noqa: E402

from rpp import mlm_nsp_batch  # noqa: E402

TOPICS = ["person"] * 3 + ["town", "ship", "book"]
MORE_PEOPLE = ["person"] * 5 + ["town", "ship", "book"]
NAMES = [*w.PLACES, *w.FIRST, *w.LAST, *w.YEARS, *w.ADJ, *w.NOUN,
         *w.TRADES, *w.GOODS, *w.BIRDS, *w.SHADES, *w.TOPICS]
PARTS = {"dev": (0,), "train": (1, 2, 3), "corpus": (4, 5, 6, 7, 8, 9)}


def with_an(text):
    """"a" before a vowel becomes "an"."""
    return re.sub(r"\b(A|a) (?=[aeiou])", r"\1n ", text)


def capital(text):
    return text[0].upper() + text[1:]


class World:
    """Subjects, values and sentences of one part: corpus, train or dev.

    Pairs of names are dealt out by a rule, so no two parts share a subject or a person's full name.
    """

    def __init__(self, part, rng):
        self.rng = rng
        self.mine = PARTS[part]
        self.people = self.deal(w.FIRST, w.LAST, "%s %s")
        towns = [p for i, p in enumerate(w.PLACES) if (i * 7 + i // 10) % 10 in self.mine]
        self.subjects = {
            "person": self.people,
            "town": towns,
            "ship": self.deal(w.SHADES, w.BIRDS, "the %s %s"),
            "book": self.deal(w.SHADES, w.TOPICS, "the book of the %s %s"),
        }
        self.values = {
            "person": self.people,
            "place": w.PLACES,
            "year": w.YEARS,
            "thing": w.THINGS,
            "trade": w.TRADES,
            "good": w.GOODS
        }

    def deal(self, firsts, seconds, text):
        """This part's share of all pairs of names."""
        pairs = []
        for i, first in enumerate(firsts):
            for j, second in enumerate(seconds):
                if (i + 3 * j) % 10 in self.mine:
                    pairs.append(text % (first, second))
        return pairs

    def chance(self, p):
        return self.rng.random() < p

    def pick(self, items):
        return items[int(self.rng.integers(len(items)))]

    def choose(self, n, k):
        """k different numbers below n."""
        return [int(i) for i in self.rng.permutation(n)[:k]]

    def value(self, kind, avoid):
        """A value that shares no word with those to avoid: no half of a name is then right."""
        taken = {word for text in avoid for word in text.split()}
        while True:
            value = self.pick(self.values[kind])
            if not taken & set(value.split()):
                return value

    def subject(self, topics):
        topic = self.pick(topics)
        return topic, self.pick(self.subjects[topic])

    def facts(self, topic, name, n, kinds=2):
        """[(number of a relation, its value)]: n relations, their values of few kinds."""
        kind_of = [relation[0][0] for relation in w.RELATIONS[topic]]
        all_kinds = set(kind_of)
        if n > 3 and kinds < 3:
            all_kinds -= {"trade"}              # too few relations have a trade
        all_kinds = sorted(all_kinds)
        wanted = [all_kinds[i] for i in self.choose(len(all_kinds), kinds)]
        fit = [i for i, kind in enumerate(kind_of) if kind in wanted]
        chosen = [fit[i] for i in self.choose(len(fit), n)]
        values = [name]
        for i in chosen:
            values.append(self.value(kind_of[i], values))
        return list(zip(chosen, values[1:]))

    def way(self, ways, way):
        return self.pick(ways) if way is None else ways[way]

    def state(self, topic, fact, way=None):
        """A fact as the end of a sentence."""
        relation, value = fact
        text = self.way(w.RELATIONS[topic][relation][1], way)
        return with_an(text.replace("V", value))

    def ask(self, topic, relation, name, way=None):
        """A question for the value of a relation."""
        text = self.way(w.RELATIONS[topic][relation][2], way)
        return text[0].upper() + re.sub(r"\bS\b", name, text[1:]) + "?"

    def prose(self, topic, name, facts, openers=w.OPENERS):
        """Sentences of one or two facts; the subject is named first, and then often only meant."""
        short = "It"
        if topic == "person":
            short = "She" if name.split()[0].endswith("a") else "He"
        sentences = []
        i = 0
        while i < len(facts):
            size = 2 if self.chance(0.4) else 1
            said = " and ".join(self.state(topic, fact) for fact in facts[i:i + size])
            who = name if i == 0 or self.chance(0.25) else short
            opener = self.pick(openers)
            if opener and who == short:
                who = who.lower()
            sentence = f"{opener} {who} {said}.".strip()
            sentences.append(capital(sentence).replace(" ,", ","))
            i += size
        return " ".join(sentences)


def squad(world, n):
    """SQuAD 1.1: paragraphs of up to seven facts on one subject, with four questions each."""
    articles = {}
    made = 0
    while made < n:
        topic, name = world.subject(MORE_PEOPLE)
        facts = world.facts(topic, name, 7)
        context = world.prose(topic, name, facts)
        while len(context.split()) > 70:
            facts = facts[:-1]
            context = world.prose(topic, name, facts)
        qas = []
        for i in world.choose(len(facts), min(4, n - made)):
            relation, value = facts[i]
            found = [m.start() for m in re.finditer(rf"\b{value}\b", context)]
            if len(found) == 1:                 # "paper" may also be what something is made of
                made += 1
                qas.append({
                    "id": f"{made:06d}",
                    "question": world.ask(topic, relation, name),
                    "answers": [{"text": value, "answer_start": found[0]}],
                })
        articles.setdefault(name, []).append({"context": context, "qas": qas})
    data = [{"title": name.replace(" ", "_"), "paragraphs": paragraphs}
            for name, paragraphs in articles.items()]
    return {"version": "1.1", "data": data}


def mnli(world, n, openers):
    """[(genre, premise, hypothesis, label)]: a premise of one fact or two, and a hypothesis.

    The hypothesis is one of the facts in other words (entailment); one with another value
    (contradiction); or a relation that the premise is silent on (neutral).
    """
    genre = "report" if "" in openers else "hearsay"
    rows = []
    for i in range(n):
        topic, name = world.subject(TOPICS)
        kind_of = [relation[0][0] for relation in w.RELATIONS[topic]]
        n_facts = 1 if world.chance(0.7) else 2
        facts = world.facts(topic, name, n_facts, 1 if world.chance(0.5) else 2)
        premise = world.prose(topic, name, facts, openers)
        label = ("entailment", "neutral", "contradiction")[i % 3]
        relation, value = world.pick(facts)
        kind = kind_of[relation]
        names = [name] + [told for _, told in facts]
        if label == "contradiction":
            value = world.value(kind, names)
        if label == "neutral":
            told = [number for number, _ in facts]
            silent = [r for r in range(len(kind_of)) if r not in told]
            alike = [r for r in silent if kind_of[r] == kind]
            relation = world.pick(alike or silent)
            if kind_of[relation] != kind or world.chance(0.5):
                value = world.value(kind_of[relation], names)
        hypothesis = f"{capital(name)} {world.state(topic, (relation, value))}."
        rows.append((genre, premise, hypothesis, label))
    return [rows[i] for i in world.choose(n, n)]


def qqp(world, n):
    """[(question, question, 1 if they ask the same)].

    The others ask for another relation with the same kind of value, or, a quarter of them, the same
    of another subject.
    """
    rows = []
    for i in range(n):
        topic, name = world.subject(TOPICS)
        table = w.RELATIONS[topic]
        relation = int(world.rng.integers(len(table)))
        first, second = world.choose(3, 2)
        other, other_name = relation, name
        if i % 8 == 7:
            words = set(name.split())
            strangers = [s for s in world.subjects[topic]
                         if not words & set(s.split()[-2:])]
            other_name = world.pick(strangers)
        elif i % 2:
            alike = [r for r in range(len(table))
                     if r != relation and table[r][0] == table[relation][0]]
            other = world.pick(alike)
        question = world.ask(topic, relation, name, first)
        other_question = world.ask(topic, other, other_name, second)
        rows.append((question, other_question, 1 - i % 2))
    return [rows[i] for i in world.choose(n, n)]


def generation(world, n):
    """[(source, target)]: a text and an answer in, the question out."""
    rows = []
    for _ in range(n):
        topic, name = world.subject(MORE_PEOPLE)
        facts = world.facts(topic, name, 3)
        relation, value = world.pick(facts)
        source = f"{value}: {world.prose(topic, name, facts)}"
        rows.append((source, world.ask(topic, relation, name, 0)))
    return rows


# ---- documents of the corpus

def talk(world):
    """Small talk: a few lines of words.py with their slots filled."""
    kinds = dict(TRADE=w.TRADES, PLACE=w.PLACES, THING=w.THINGS,
                 GOOD=w.GOODS, BIRD=w.BIRDS, YEAR=w.YEARS)
    slots = {}
    for key, items in kinds.items():
        slots[key] = world.pick(items)
        slots[key + "2"] = world.pick(items)
    slots["TOOL"] = w.TOOLS[slots["TRADE"]]
    slots["TOOL2"] = w.TOOLS[slots["TRADE2"]]
    slots["SEASON"] = world.pick(w.SEASONS)
    slots["COUNT"] = world.pick(w.COUNT)
    lines = world.pick(w.TALK).split("|")
    filled = [re.sub(r"\b[A-Z]{4,}2?\b", lambda m: slots[m[0]], line) for line in lines]
    return [with_an(line) for line in filled]


def in_other_words(world, topic, name):
    """Three facts, each said twice or asked twice."""
    said, asked = [], []
    for i, fact in enumerate(world.facts(topic, name, 3, 3)):
        first, second = world.choose(3, 2)
        if i % 2:
            said.append(f"{name} {world.state(topic, fact, first)}.")
            said.append(f"In other words, {name} {world.state(topic, fact, second)}.")
        else:
            asked.append(world.ask(topic, fact[0], name, first))
            asked.append("That is to ask: " + world.ask(topic, fact[0], name, second))
    lines = said + asked if world.chance(0.5) else asked + said
    return [capital(line) for line in lines]


def document(world, most=6):
    """The lines of one document. Two in three have a text and questions on it, answered."""
    dice = world.rng.random()
    topic, name = world.subject(MORE_PEOPLE)
    if dice < 0.08:
        return talk(world) + talk(world)
    if dice < 0.16:                             # a longer life
        return [world.prose(topic, name, world.facts(topic, name, 3, 3))
                for _ in range(3)]
    if dice < 0.34:
        return in_other_words(world, topic, name)
    size = int(world.rng.integers((most + 1) // 2, most + 1))
    facts = world.facts(topic, name, size, 1 if world.chance(0.4) else 2)
    split = len(facts)
    if world.chance(0.5) and len(facts) > 1:    # two texts, each with a question on one line
        split = len(facts) // 2
    paragraphs = []
    for told in (facts[:split], facts[split:]):
        n_asked = 1 if split < len(facts) else 2
        asked = [told[i] for i in world.choose(len(told), n_asked)]
        answers = " ".join(f"{world.ask(topic, r, name)} {v}." for r, v in asked)
        text = world.prose(topic, name, told)
        if told:
            paragraphs.append((answers, text) if world.chance(0.6) else (text, answers))
    if split < len(facts):
        return [" ".join(paragraph) for paragraph in paragraphs]
    return list(paragraphs[0])


def catechism(world):
    """A text on one line and, on another, three questions on it, answered: as in SQuAD."""
    topic, name = world.subject(MORE_PEOPLE)
    facts = world.facts(topic, name, int(world.rng.integers(3, 7)))
    text = world.prose(topic, name, facts)
    asked = [facts[i] for i in world.choose(len(facts), 3)]
    answers = " ".join(f"{world.ask(topic, r, name)} {v}." for r, v in asked)
    return [text, answers] if world.chance(0.5) else [answers, text]


# ---- writing

def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode())


def write_tsv(path, header, rows):
    lines = ["\t".join(str(cell) for cell in row) for row in [header.split(), *rows]]
    write(path, "\n".join(lines) + "\n")


def write_data(out):
    """The tasks and the corpus: always the same bytes."""
    world = {}
    for i, part in enumerate(("train", "dev", "corpus")):
        world[part] = World(part, np.random.default_rng([0, i]))
    for part, n in (("train", 5000), ("dev", 600)):
        text = json.dumps(squad(world[part], n), separators=(",", ":"))
        write(out / "squad" / f"{part}-v1.1.json", text)
    header = ("index promptID pairID genre sentence1_binary_parse sentence2_binary_parse "
              "sentence1_parse sentence2_parse sentence1 sentence2 label1 gold_label")
    hearsay = [opener for opener in w.OPENERS if opener]
    for name, part, n, openers in (
        ("train", "train", 16000, w.OPENERS),
        ("dev_matched", "dev", 450, w.OPENERS),
        ("dev_mismatched", "dev", 450, hearsay),
    ):
        rows = []
        for i, (genre, a, b, label) in enumerate(mnli(world[part], n, openers)):
            rows.append([i, i, f"{i}{label[0]}", genre, "", "", "", "", a, b, label, label])
        write_tsv(out / "glue" / "MNLI" / f"{name}.tsv", header, rows)
    header = "id qid1 qid2 question1 question2 is_duplicate"
    for part, n in (("train", 6000), ("dev", 500)):
        rows = [[i, 2 * i, 2 * i + 1, *row] for i, row in enumerate(qqp(world[part], n))]
        write_tsv(out / "glue" / "QQP" / f"{part}.tsv", header, rows)
    texts = []
    for i in range(9000):
        kind = document if i % 5 == 0 else catechism
        texts.append("\n".join(kind(world["corpus"])))
    write(out / "corpus.txt", "\n\n".join(texts) + "\n")
    for part, n in (("train", 3000), ("dev", 300)):         # drawn last: the rest stays as it is
        write_tsv(out / "generate" / f"{part}.tsv", "source target", generation(world[part], n))


def write_tokenizer(folder):
    """Every word of the world as one token, and letters, with which all else can be spelt."""
    rng = np.random.default_rng(0)
    known = set()
    for part in PARTS:
        world = World(part, rng)
        for _ in range(3000):
            known.update(re.findall(r"\w+|[^\w\s]", "\n".join(document(world)).lower()))
    for name in [*NAMES, *w.SEASONS, *w.COUNT, *w.TOOLS.values()]:
        known.add(name.lower())
    letters = [chr(c) for c in range(33, 127) if not chr(c).isupper()]
    vocab = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters]
    vocab += ["##" + c for c in letters if c.isalnum()]
    vocab += sorted(known - set(vocab))
    write(folder / "vocab.txt", "\n".join(vocab) + "\n")
    numbers = {word: i for i, word in enumerate(vocab)}
    tokenizer = BertTokenizerFast(vocab=numbers, do_lower_case=True, model_max_length=128)
    tokenizer.save_pretrained(folder)
    return tokenizer


# ---- pre-training

def mask_answers(batch, tokenizer, values, rng):
    """Mask most answers whole, and a third of the names and values that stand twice in a row.

    An answer stands between "?" and "." in the corpus. To fill it in, the question has to be
    matched with the text. values: (vocabulary,), whether a token is part of a name or value.
    """
    ids, labels = batch["input_ids"].numpy(), batch["labels"].numpy()
    true = np.where(labels >= 0, labels, ids)
    question, stop, mask = tokenizer.convert_tokens_to_ids(["?", ".", "[MASK]"])
    twice = (true[:, :, None] == true[:, None, :]).sum(axis=2) > 1
    hide = values[true] & twice & (rng.random(ids.shape) < 0.3)
    for row, at in zip(*np.nonzero(true == question)):
        ends = np.nonzero(true[row, at + 1:at + 4] == stop)[0]
        if len(ends) and rng.random() < 0.8:
            hide[row, at + 1:at + 1 + ends[0]] = True
    labels[hide] = true[hide]
    ids[hide] = mask


def sinusoids(n, width, size):
    """(n, width): the positions of arXiv 1706.03762, section 3.5, in the size of other weights."""
    angle = torch.arange(n)[:, None] / 10000 ** (torch.arange(0, width, 2) / width)
    pairs = torch.stack((angle.sin(), angle.cos()), dim=2)
    return size * 2 ** 0.5 * pairs.reshape(n, width)


def new_bert(n_words):
    """A BERT at the start of its pre-training.

    With weights of N(0, 0.08) and sinusoids alone no copying formed in about 4,800 steps (one
    trial). It formed by step 1,800 with, in addition, attention that starts by looking for its like
    (key = query) and passing on what it finds (output = value transposed; in the spirit of arXiv
    2305.09828, recalled), smaller token types, and a head that starts as the identity.
    """
    config = BertConfig(
        vocab_size=n_words,
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=512,
        max_position_embeddings=128,
        initializer_range=0.08,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0
    )
    model = BertForPreTraining(config)
    embeddings = model.bert.embeddings
    embeddings.position_embeddings.weight.data.copy_(sinusoids(128, 128, 0.08))
    embeddings.token_type_embeddings.weight.data.mul_(0.25)
    for layer in model.bert.encoder.layer:
        own = layer.attention.self
        own.key.weight.data[:64] = own.query.weight.data[:64]           # two heads of four
        layer.attention.output.dense.weight.data.copy_(own.value.weight.data.T)
    model.cls.predictions.transform.dense.weight.data.copy_(torch.eye(128))
    return model


def pretrain(folder, tokenizer, steps, warm_up=300):
    torch.manual_seed(0)
    rng = np.random.default_rng([0, 10])
    world = World("corpus", rng)
    model = new_bert(len(tokenizer)).train()
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    groups = [
        {"params": matrices, "weight_decay": 0.01},
        {"params": vectors, "weight_decay": 0.0}
    ]
    optimizer = torch.optim.AdamW(groups, lr=7e-4, betas=(0.9, 0.98))
    names = tokenizer.convert_tokens_to_ids(" ".join(NAMES).lower().split())
    values = np.isin(np.arange(len(tokenizer)), names)
    part = max(1, steps // 8)
    for step in range(steps):
        if step % part == 0:            # new documents, short ones first: copying forms sooner
            stage = min(4, step // part)
            most = (2, 2, 3, 4, 6)[stage]                   # facts in a text
            length = (40, 40, 52, 64, 80)[stage]            # tokens in a pair
            texts = [document(world, most) for _ in range(14000)]
            documents = [tokenizer(lines, add_special_tokens=False)["input_ids"]
                         for lines in texts]
        batch = mlm_nsp_batch(documents, tokenizer, 32, length, rng)
        mask_answers(batch, tokenizer, values, rng)
        labels, order = batch.pop("labels"), batch.pop("next_sentence_label")
        hidden, pooled = model.bert(**batch, return_dict=False)[:2]
        guesses = model.cls.predictions(hidden[labels >= 0])
        loss = F.cross_entropy(guesses, labels[labels >= 0])
        loss = loss + F.cross_entropy(model.cls.seq_relationship(pooled), order)
        factor = min((step + 1) / warm_up, (steps - step) / max(1, steps - warm_up))
        for group in optimizer.param_groups:
            group["lr"] = 7e-4 * factor
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 200 == 0:
            print(f"step {step:05d}/{steps:05d}  loss {loss:.3f}")
    model.save_pretrained(folder)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE)
    parser.add_argument("--data_only", action="store_true")
    parser.add_argument("--steps", type=int, default=14000)
    args = parser.parse_args()
    write_data(args.out)
    if not args.data_only:
        tokenizer = write_tokenizer(args.out / "bert")
        pretrain(args.out / "bert", tokenizer, args.steps)


if __name__ == "__main__":
    main()

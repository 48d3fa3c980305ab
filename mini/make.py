"""Makes the embedded world: data in the real formats, and a small BERT that is pre-trained on it.

    python mini/make.py                everything: the committed files are its output
    python mini/make.py --data_only    the data alone, in seconds

Writes
    squad/{train,dev}-v1.1.json   5,000 and 600 questions on texts of 35 to 70 words
    glue/MNLI, glue/QQP           16,000 and 6,000 training pairs; 450 + 450 and 500 to evaluate
    generate/{train,dev}.tsv      3,000 and 300 rows for examples/generate.py: a text and an answer
                                  are the source, the question is the target
    corpus.txt                    9,000 short documents, on which rpp.py pre-trains
    bert/                         BertForPreTraining: 4 layers of width 128, 1,302 words

The world: people, towns, ships and books have 70 relations (words.py) to people, places, years,
things, trades and goods. Each relation has three ways to state it and three ways to ask for it.
Every fact is drawn afresh, so a model cannot know it by heart. A model can learn which question
belongs to which statement, and to copy a name from the place where it stands; a pruned model has to
keep that. A text holds several facts of the same kind ("was jailed in Karwick", "is buried in
Helton"), so the kind of word that is asked for does not give the answer away. MNLI's neutral pairs
and QQP's near misses differ from the other pairs in the relation alone. Mismatched MNLI is hearsay:
each premise begins with "It is said that" or the like. Names are dealt out by a rule: no subject
and no full name of dev, and so no fact, occurs in train or in the corpus.

Pre-training is BERT's (MLM and NSP, see rpp.py) with three changes: answers and repeated names are
masked more often, texts grow from 2 facts to 6, and the start is not BERT's own (see new_bert). It
took 37 minutes on one core (14,000 steps of 32 pairs, torch 2.13.0). At its end 76 % of the masked
words were right and 99 % of the next sentences.

The corpus holds more questions than the stream of pre-training. Without them rpp.py prunes what
question answering needs: at 40 % kept, SQuAD's F1 was 80.7 with the stream and 92.3 with the corpus
(400 steps of pre-training, seed 0).

Dense fine-tuning (magnitude.py --sparsity 1, seed 0) reaches EM 99.3 and F1 99.4 on squad, accuracy
91.8 and 90.7 on mnli, 97.0 on qqp.
"""
import argparse
import json
import re
import sys
import time
from pathlib import Path

import numpy as np
import torch
from transformers import BertConfig, BertForPreTraining, BertTokenizerFast

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
import words  # noqa: E402

from rpp import PreTraining, mlm_nsp_batch  # noqa: E402

# The rule gives each name a digit; these are the digits of each part.
PARTS = {
    "dev": [0],
    "train": [1, 2, 3],
    "corpus": [4, 5, 6, 7, 8, 9],
}


def capital(text):
    return text[0].upper() + text[1:]


def articles(text):
    """Write "an" for "a" before a vowel."""
    return re.sub(r"\b(A|a) (?=[aeiou])", r"\1n ", text)


# ---- the world

class World:
    """Subjects, values and sentences of one part. No two parts share a subject or a full name."""

    def __init__(self, part, rng):
        self.rng = rng
        self.digits = PARTS[part]
        towns = []
        for i, place in enumerate(words.PLACES):
            digit = (i * 7 + i // 10) % 10
            if digit in self.digits:
                towns.append(place)
        ships = self.deal(words.SHADES, words.BIRDS)
        books = self.deal(words.SHADES, words.TOPICS)
        self.subjects = {
            "person": self.deal(words.FIRST, words.LAST),
            "town": towns,
            "ship": [f"the {name}" for name in ships],
            "book": [f"the book of the {name}" for name in books],
        }
        self.values = words.VALUES | {"person": self.subjects["person"]}

    def deal(self, firsts, seconds):
        """This part's share of all pairs of words."""
        pairs = []
        for i, first in enumerate(firsts):
            for j, second in enumerate(seconds):
                if (i + 3 * j) % 10 in self.digits:
                    pairs.append(f"{first} {second}")
        return pairs

    def chance(self, probability):
        return self.rng.random() < probability

    def pick(self, items):
        return items[int(self.rng.integers(len(items)))]

    def sample(self, items, n):
        """n of the items, none of them twice, in random order."""
        return [items[i] for i in self.rng.permutation(len(items))[:n]]

    def subject(self, people=5):
        """(topic, name): `people` persons to one town, one ship and one book."""
        topic = self.pick(["person"] * people + ["town", "ship", "book"])
        return topic, self.pick(self.subjects[topic])

    def value(self, kind, avoid):
        """A value that shares no word with those to avoid, so that no half of a name is right."""
        taken = " ".join(avoid).split()
        while True:
            value = self.pick(self.values[kind])
            if not set(taken) & set(value.split()):
                return value

    def facts(self, topic, name, n, n_kinds=2):
        """[(relation, value)]: n relations of the topic, whose values are of n_kinds kinds."""
        relations = words.RELATIONS[topic]
        kinds = {relation.kind for relation in relations}
        if n > 3 and n_kinds < 3:
            kinds.discard("trade")                          # too few relations have that kind
        kinds = self.sample(sorted(kinds), n_kinds)
        relations = [relation for relation in relations if relation.kind in kinds]
        relations = self.sample(relations, n)
        values = []
        for relation in relations:
            values.append(self.value(relation.kind, [name, *values]))
        return list(zip(relations, values))

    def state(self, relation, value, way=None):
        """A fact as the end of a sentence, in one of three ways: "was born in Karwick"."""
        ways = relation.statements
        text = self.pick(ways) if way is None else ways[way]
        return articles(text.replace("V", value))

    def ask(self, relation, name, way=None):
        """A question for the value, in one of three ways: "Where was Alda Ashley born?"."""
        ways = relation.questions
        text = self.pick(ways) if way is None else ways[way]
        return capital(re.sub(r"\bS\b", name, text)) + "?"

    def answered(self, facts, name):
        """A question for each fact, with its answer."""
        texts = []
        for relation, value in facts:
            texts.append(f"{self.ask(relation, name)} {value}.")
        return " ".join(texts)

    def prose(self, topic, name, facts, openers=words.OPENERS):
        """Sentences of one or two facts each. The first names the subject, the next may not."""
        pronoun = "It"
        if topic == "person":
            pronoun = "She" if name.split()[0].endswith("a") else "He"
        sentences = []
        done = 0
        while done < len(facts):
            n = 2 if self.chance(0.4) else 1
            said = [self.state(*fact) for fact in facts[done:done + n]]
            who = name if done == 0 or self.chance(0.25) else pronoun
            opener = self.pick(openers)
            if opener and who == pronoun:
                who = who.lower()
            sentence = f"{opener} {who} {' and '.join(said)}.".strip()
            sentences.append(capital(sentence).replace(" ,", ","))
            done += n
        return " ".join(sentences)


# ---- the tasks

def squad(world, n):
    """SQuAD 1.1: a paragraph of 5 to 7 facts on one subject, and up to four questions on it."""
    paragraphs = {}
    made = 0
    while made < n:
        topic, name = world.subject()
        facts = world.facts(topic, name, 7)
        context = world.prose(topic, name, facts)
        while len(context.split()) > 70:
            facts.pop()
            context = world.prose(topic, name, facts)
        qas = []
        for relation, value in world.sample(facts, min(4, n - made)):
            places = [match.start() for match in re.finditer(rf"\b{value}\b", context)]
            if len(places) > 1:                             # paper may also be what a lamp is of
                continue
            made += 1
            answer = {"text": value, "answer_start": places[0]}
            qas.append({
                "id": f"{made:06d}",
                "question": world.ask(relation, name),
                "answers": [answer],
            })
        paragraphs.setdefault(name, []).append({"context": context, "qas": qas})
    data = []
    for name, texts in paragraphs.items():
        data.append({"title": name.replace(" ", "_"), "paragraphs": texts})
    return {"version": "1.1", "data": data}


def mnli(world, n, openers):
    """[(premise, hypothesis, label)]. The premise has one fact, or two (three in ten).

    entailment: one of the facts in other words. contradiction: the same with another value.
    neutral: a relation of which the premise says nothing, half of the time with a value of it.
    """
    rows = []
    for i in range(n):
        label = ["entailment", "neutral", "contradiction"][i % 3]
        topic, name = world.subject(people=3)
        n_facts = 1 if world.chance(0.7) else 2
        n_kinds = 1 if world.chance(0.5) else 2
        facts = world.facts(topic, name, n_facts, n_kinds)
        premise = world.prose(topic, name, facts, openers)
        told, values = zip(*facts)
        relation, value = world.pick(facts)
        kind = relation.kind
        if label == "contradiction":
            value = world.value(kind, [name, *values])
        if label == "neutral":
            untold = []
            for other in words.RELATIONS[topic]:
                if other not in told:
                    untold.append(other)
            same_kind = [other for other in untold if other.kind == kind]
            relation = world.pick(same_kind or untold)
            if relation.kind != kind or world.chance(0.5):
                value = world.value(relation.kind, [name, *values])
        hypothesis = f"{capital(name)} {world.state(relation, value)}."
        rows.append((premise, hypothesis, label))
    return world.sample(rows, n)


def qqp(world, n):
    """[(question, question, 1 or 0)]. 1: the same relation of the same subject in other words.

    0: another relation with the same kind of value; or, for a quarter of them, another subject.
    """
    rows = []
    for i in range(n):
        topic, name = world.subject(people=3)
        relation = world.pick(words.RELATIONS[topic])
        first, second = world.sample(range(3), 2)
        question = world.ask(relation, name, first)
        if i % 8 == 7:
            mine = set(name.split())
            others = []
            for other in world.subjects[topic]:
                if not mine & set(other.split()[-2:]):
                    others.append(other)
            name = world.pick(others)
        elif i % 2:
            others = [other for other in words.RELATIONS[topic] if other.kind == relation.kind]
            others.remove(relation)
            relation = world.pick(others)
        rows.append((question, world.ask(relation, name, second), 1 - i % 2))
    return world.sample(rows, n)


def generation(world, n):
    """[(answer and text, question)]. The question is asked in the first of its three ways."""
    rows = []
    for _ in range(n):
        topic, name = world.subject()
        facts = world.facts(topic, name, 3)
        relation, value = world.pick(facts)
        text = world.prose(topic, name, facts)
        rows.append((f"{value}: {text}", world.ask(relation, name, 0)))
    return rows


# ---- the documents of the corpus

def talk(world):
    """The lines of some small talk."""
    slots = {}
    kinds = {
        "TRADE": words.TRADES,
        "PLACE": words.PLACES,
        "THING": words.THINGS,
        "GOOD": words.GOODS,
        "BIRD": words.BIRDS,
        "YEAR": words.YEARS,
    }
    for kind, values in kinds.items():
        slots[kind] = world.pick(values)
        slots[kind + "2"] = world.pick(values)
    slots["TOOL"] = words.TOOLS[slots["TRADE"]]
    slots["TOOL2"] = words.TOOLS[slots["TRADE2"]]
    slots["SEASON"] = world.pick(words.SEASONS)
    slots["COUNT"] = world.pick(words.COUNT)
    text = world.pick(words.TALK)
    for slot in sorted(slots, reverse=True):                # TOOL2 before TOOL
        text = re.sub(rf"\b{slot}\b", slots[slot], text)
    return articles(text).split("|")


def other_words(world, topic, name):
    """Lines that say the same thing, or ask it, in other words."""
    said = []
    asked = []
    for i, (relation, value) in enumerate(world.facts(topic, name, 3, 3)):
        first, second = world.sample(range(3), 2)
        if i % 2:
            said.append(f"{capital(name)} {world.state(relation, value, first)}.")
            said.append(f"In other words, {name} {world.state(relation, value, second)}.")
        else:
            asked.append(world.ask(relation, name, first))
            asked.append(f"That is to ask: {world.ask(relation, name, second)}")
    return said + asked if world.chance(0.5) else asked + said


def document(world, most=6):
    """The lines of a document. Two in three ask and answer questions on at most `most` facts."""
    dice = world.rng.random()
    topic, name = world.subject()
    if dice < 0.08:
        return talk(world) + talk(world)
    if dice < 0.16:                                         # a longer life
        lines = []
        for _ in range(3):
            facts = world.facts(topic, name, 3, 3)
            lines.append(world.prose(topic, name, facts))
        return lines
    if dice < 0.34:
        return other_words(world, topic, name)
    n = int(world.rng.integers((most + 1) // 2, most + 1))
    n_kinds = 1 if world.chance(0.4) else 2
    facts = world.facts(topic, name, n, n_kinds)
    halved = world.chance(0.5) and len(facts) > 1
    half = len(facts) // 2
    texts = [facts]
    if halved:
        texts = [facts[:half], facts[half:]]
    paragraphs = []
    for told in texts:
        asked = world.sample(told, 1 if halved else 2)
        paragraph = [world.answered(asked, name), world.prose(topic, name, told)]
        if not world.chance(0.6):
            paragraph.reverse()
        paragraphs.append(paragraph)
    if halved:                                              # text and question on one line
        return [" ".join(paragraph) for paragraph in paragraphs]
    return paragraphs[0]


def quiz(world):
    """A text on one line and three questions, answered, on another, as long as in SQuAD."""
    topic, name = world.subject()
    n = int(world.rng.integers(3, 7))
    facts = world.facts(topic, name, n)
    lines = [world.prose(topic, name, facts)]
    asked = world.sample(facts, 3)
    lines.append(world.answered(asked, name))
    if not world.chance(0.5):
        lines.reverse()
    return lines


# ---- writing

def write(path, lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines), encoding="utf-8", newline="\n")


def write_tsv(path, header, rows):
    lines = []
    for row in [header.split(), *rows]:
        lines.append("\t".join(map(str, row)))
    write(path, [*lines, ""])


def write_data(out, seed):
    """The tasks and the corpus: the same bytes for the same seed."""
    rngs = [np.random.default_rng([seed, i]) for i in range(3)]
    train, dev, corpus = map(World, ["train", "dev", "corpus"], rngs)
    for name, world, n in [("train", train, 5000), ("dev", dev, 600)]:
        text = json.dumps(squad(world, n), separators=(",", ":"))
        write(out / "squad" / f"{name}-v1.1.json", [text])

    header = ("index promptID pairID genre sentence1_binary_parse sentence2_binary_parse "
              "sentence1_parse sentence2_parse sentence1 sentence2 label1 gold_label")
    files = [
        ("train", train, 16000, "report", words.OPENERS),
        ("dev_matched", dev, 450, "report", words.OPENERS),
        ("dev_mismatched", dev, 450, "hearsay", words.HEARSAY),
    ]
    for name, world, n, genre, openers in files:
        rows = []
        for i, (premise, hypothesis, label) in enumerate(mnli(world, n, openers)):
            no_parses = [""] * 4
            rows.append([
                i, i, f"{i}{label[0]}", genre, *no_parses,
                premise, hypothesis, label, label,
            ])
        write_tsv(out / "glue" / "MNLI" / f"{name}.tsv", header, rows)

    header = "id qid1 qid2 question1 question2 is_duplicate"
    for name, world, n in [("train", train, 6000), ("dev", dev, 500)]:
        rows = []
        for i, row in enumerate(qqp(world, n)):
            rows.append([i, 2 * i, 2 * i + 1, *row])
        write_tsv(out / "glue" / "QQP" / f"{name}.tsv", header, rows)

    documents = []
    for i in range(9000):
        lines = quiz(corpus) if i % 5 else document(corpus)
        documents += [*lines, ""]
    write(out / "corpus.txt", documents)

    for name, world, n in [("train", train, 3000), ("dev", dev, 300)]:
        rows = generation(world, n)
        write_tsv(out / "generate" / f"{name}.tsv", "source target", rows)


def write_tokenizer(folder, seed):
    """Every word of the world is one token; letters are there to spell all other words."""
    rng = np.random.default_rng(seed)
    texts = words.NAMES + words.SEASONS + words.COUNT
    texts += words.TOOLS.values()
    for part in PARTS:
        world = World(part, rng)
        for _ in range(3000):
            texts += document(world)
    letters = [chr(code) for code in range(33, 127) if not chr(code).isupper()]
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters]
    vocabulary += ["##" + letter for letter in letters if letter.isalnum()]
    found = set(re.findall(r"\w+|[^\w\s]", "\n".join(texts).lower()))
    vocabulary += sorted(found.difference(vocabulary))
    write(folder / "vocab.txt", [*vocabulary, ""])
    numbers = {word: i for i, word in enumerate(vocabulary)}
    tokenizer = BertTokenizerFast(vocab=numbers, do_lower_case=True, model_max_length=128)
    tokenizer.save_pretrained(folder)
    return tokenizer


# ---- pre-training

# At each eighth of the run: the most facts in a text, and the most tokens in a pair. The last holds
# for the rest of the run. Copying forms sooner in short texts.
STAGES = [
    (2, 40),
    (2, 40),
    (3, 52),
    (4, 64),
    (6, 80),
]


def mask_answers(batch, tokenizer, is_name, rng):
    """Mask four in five answers as a whole, and three in ten names that stand twice in a row.

    To fill them in, a model has to read the text and find the statement that the question asks for:
    fine-tuning can build on that. An answer stands between "?" and ".". is_name: (vocabulary,).
    """
    ids = batch["input_ids"].numpy()                        # (batch, tokens), as all that follow
    labels = batch["labels"].numpy()
    true = np.where(labels >= 0, labels, ids)
    question, stop, mask = tokenizer.convert_tokens_to_ids(["?", ".", "[MASK]"])
    same = true[:, :, None] == true[:, None, :]             # (batch, tokens, tokens)
    twice = same.sum(axis=2) > 1
    hidden = is_name[true] & twice & (rng.random(ids.shape) < 0.3)
    for row, place in zip(*np.nonzero(true == question)):
        stops = np.nonzero(true[row, place + 1:place + 4] == stop)[0]
        if len(stops) and rng.random() < 0.8:
            hidden[row, place + 1:place + 1 + stops[0]] = True
    labels[hidden] = true[hidden]
    ids[hidden] = mask


def sinusoids(n, width, size):
    """(n, width): the positions of arXiv 1706.03762, section 3.5, at the size of other weights."""
    wavelength = 10000 ** (torch.arange(0, width, 2) / width)
    angle = torch.arange(n)[:, None] / wavelength           # (n, width / 2)
    waves = torch.stack((angle.sin(), angle.cos()), dim=2)
    return size * 2 ** 0.5 * waves.reshape(n, width)


def new_bert(n_words):
    """A BERT before its pre-training, with a start from which copying forms soon.

    With weights of N(0, 0.08) and sinusoids alone, no copying formed in about 4,800 steps (one
    trial). It formed by step 1,800 with attention that looks for its like (key = query) and passes
    on what it finds (output = value transposed; after arXiv 2305.09828, recalled), smaller token
    types, and a head that starts as the identity. Which of these it takes is not known.
    """
    config = BertConfig(
        vocab_size=n_words,
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=128,
        initializer_range=0.08,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    model = BertForPreTraining(config)
    embeddings = model.bert.embeddings
    embeddings.position_embeddings.weight.data.copy_(sinusoids(128, 128, 0.08))
    embeddings.token_type_embeddings.weight.data.mul_(0.25)
    for layer in model.bert.encoder.layer:
        attention = layer.attention.self
        two_heads = attention.query.weight.data[:64]
        attention.key.weight.data[:64] = two_heads
        output = layer.attention.output.dense
        output.weight.data.copy_(attention.value.weight.data.T)
    model.cls.predictions.transform.dense.weight.data.copy_(torch.eye(128))
    return model


def pretrain(folder, tokenizer, seed, steps, lr=7e-4, warm_up=300, batch_size=32):
    torch.manual_seed(seed)
    rng = np.random.default_rng([seed, 10])
    world = World("corpus", rng)
    model = new_bert(len(tokenizer))
    net = PreTraining(model).train()
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    groups = [
        {"params": matrices, "weight_decay": 0.01},
        {"params": vectors, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98))
    names = tokenizer.convert_tokens_to_ids(" ".join(words.NAMES).lower().split())
    is_name = np.isin(np.arange(len(tokenizer)), names)     # (vocabulary,)
    eighth = max(1, steps // 8)
    started = time.time()
    for step in range(steps):
        if step % eighth == 0:                              # new documents
            most, length = STAGES[min(step // eighth, 4)]
            texts = [document(world, most) for _ in range(14000)]
            documents = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
        batch = mlm_nsp_batch(documents, tokenizer, batch_size, length, rng)
        mask_answers(batch, tokenizer, is_name, rng)
        for group in optimizer.param_groups:
            fall = (steps - step) / max(1, steps - warm_up)
            group["lr"] = lr * min((step + 1) / warm_up, fall)
        loss, right_words, right_pairs = net(**batch)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        done = step + 1
        if done % 200 == 0 or done == steps:
            words_right = right_words.float().mean()
            pairs_right = right_pairs.float().mean()
            seconds = time.time() - started
            print(f"step {done:05d}/{steps:05d}  loss {loss:.3f}  right: words {words_right:.1%} "
                  f"next sentence {pairs_right:.1%}  {seconds:.0f} s", flush=True)
            model.save_pretrained(folder)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE)   # the folder to write
    parser.add_argument("--data_only", action="store_true")
    parser.add_argument("--steps", type=int, default=14000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    write_data(args.out, args.seed)
    if not args.data_only:
        tokenizer = write_tokenizer(args.out / "bert", args.seed)
        pretrain(args.out / "bert", tokenizer, args.seed, args.steps)


if __name__ == "__main__":
    main()

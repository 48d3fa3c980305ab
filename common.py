"""Data loading and BERT loading for the six scripts; methods and training are in the scripts.

A reader of the scripts needs from here: Data (its batches, collate and evaluate), load_bert,
prunable and count_kept. The rest reads files and computes each task's official metrics.
In order: the tasks and their files · features · metrics · a task's data · BERT.
A user's mistake (a file that is absent, a row that is cut short, a folder without a BERT) ends in
SystemExit with one sentence that says what to do.
"""
import collections
import json
import math
import re
import string
import zipfile
from pathlib import Path

import numpy as np
import torch
import transformers
from tqdm import tqdm
from transformers import (
    AutoConfig,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()


# ---- the tasks and their files

MINI = Path(__file__).resolve().parent / "mini"
SQUAD_URL = "https://rajpurkar.github.io/SQuAD-explorer/dataset/"
SQUAD_DEV_SHA256 = "95aa6a52d5d6a735563366753ca50492a658031da74f301ac5238b03966972c9"
GLUE_URL = "https://dl.fbaipublicfiles.com/glue/data/"
ZERO_ONE = ["0", "1"]
NLI = ["entailment", "neutral", "contradiction"]
ENTAILS = ["entailment", "not_entailment"]
NUMBER = ["score"]                              # no classes: the model has one output, a number

# folder: of a task's files; archive: its zip at GLUE_URL; text, for pairs text2, label: columns.
# classes: the names of the classes in order; None: those of the training file.
Layout = collections.namedtuple("Layout", "folder archive text text2 label classes")
TASKS = {
    "squad": None,                              # JSON: read_squad
    "mnli": Layout("glue/MNLI", "MNLI.zip", "sentence1", "sentence2", "gold_label", NLI),
    "qqp": Layout("glue/QQP", "QQP-clean.zip", "question1", "question2", "is_duplicate", ZERO_ONE),
    "cola": Layout("glue/CoLA", "CoLA.zip", "sentence", None, "label", ZERO_ONE),
    "sst2": Layout("glue/SST-2", "SST-2.zip", "sentence", None, "label", ZERO_ONE),
    "mrpc": Layout("glue/MRPC", None, "#1 String", "#2 String", "Quality", ZERO_ONE),
    "stsb": Layout("glue/STS-B", "STS-B.zip", "sentence1", "sentence2", "score", NUMBER),
    "qnli": Layout("glue/QNLI", "QNLIv2.zip", "question", "sentence", "label", ENTAILS),
    "rte": Layout("glue/RTE", "RTE.zip", "sentence1", "sentence2", "label", ENTAILS),
    "tsv": Layout("tsv", None, "text", "text2", "label", None),         # text2 may be absent
}


def task_files(task, folder):
    """{name: path} of the task's files: train, and dev (of MNLI: dev_matched, dev_mismatched)."""
    names = ["train", "dev_matched", "dev_mismatched"] if task == "mnli" else ["train", "dev"]
    if task == "squad":
        return {name: Path(folder) / "squad" / f"{name}-v1.1.json" for name in names}
    return {name: Path(folder) / TASKS[task].folder / f"{name}.tsv" for name in names}


def fetch(url, path, sha256=None):
    """Download url to path, with a progress bar; sha256: of the whole file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        torch.hub.download_url_to_file(url, str(path), hash_prefix=sha256)
    except (OSError, RuntimeError) as error:
        raise SystemExit(f"{url} could not be downloaded ({error}): "
                         f"put it at {path} yourself, or use --preset mini") from None


def download(task, data):
    """Fetch the task's files from the data set's own site, if the folder data has none of them."""
    paths = task_files(task, data)
    missing = [path for path in paths.values() if not path.exists()]
    if not missing:
        return
    if task in ("mrpc", "tsv"):
        raise SystemExit(f"{missing[0]} is absent, and {task} has no such file to download: put "
                         "yours there (GLUE's own script makes MRPC's from Microsoft's corpus)")
    if len(missing) < len(paths):               # the user's own data: official files would not fit
        raise SystemExit(f"{missing[0]} is absent, but its folder holds a file of the same task: "
                         "put it there, or empty the folder and the whole task is downloaded")
    if task == "squad":
        fetch(SQUAD_URL + "dev-v1.1.json", paths["dev"], SQUAD_DEV_SHA256)
        fetch(SQUAD_URL + "train-v1.1.json", paths["train"])
        return
    archive = Path(data) / "glue" / TASKS[task].archive
    if not archive.exists():
        fetch(GLUE_URL + archive.name, archive)
    if not zipfile.is_zipfile(archive):         # the connection broke: a part was saved
        archive.unlink()
        raise SystemExit(f"{archive} was not downloaded whole: start again")
    for path in missing:
        path.parent.mkdir(exist_ok=True)
        part = path.with_suffix(".part")        # renamed when it is whole
        part.write_bytes(zipfile.ZipFile(archive).read(f"{path.parent.name}/{path.name}"))
        part.rename(path)


def read_text(path):
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise SystemExit(f"{path} cannot be read as text ({error}): "
                         "put the file there, or name another with --data or --corpus") from None
    if not text.strip():
        raise SystemExit(f"{path} is empty: put a whole file there")
    return text


def read_tsv(path, task, classes):
    """The rows of a tab-separated file without quoting, and the names of the classes.

    Returns ([(text, second text or None, label)], classes). A label is the number of its class,
    from 0, or the number itself where classes is NUMBER. classes None: those of this file.
    """
    layout = TASKS[task]
    lines = read_text(path).rstrip("\r\n").split("\n")
    table = [line.rstrip("\r").split("\t") for line in lines]
    if task == "cola":                          # GLUE's CoLA is the one file without a header
        header = ["source", "label", "star", "sentence"]
        first = 1                               # the number of the first row's line
    else:
        header = [name.strip() for name in table.pop(0)]
        first = 2
    for name in (layout.text, layout.text2, layout.label):
        least = 0 if name in ("text2", None) else 1
        if not least <= header.count(name) <= 1:
            raise SystemExit(f"{path}, line 1: the header has {header.count(name)} columns "
                             f"{name!r}: give it one")
    if not table:
        raise SystemExit(f"{path} has a header and no rows: put the data set's own file there")
    cells = []
    for number, row in enumerate(table, first):
        if len(row) != len(header):
            raise SystemExit(f"{path}, line {number}: the row has {len(row)} cells, not "
                             f"{len(header)}: correct it (is a tab in a text?) or delete it")
        cells.append(dict(zip(header, row)))
    labels = [row[layout.label].strip() for row in cells]
    if len(set(labels)) == 1:
        raise SystemExit(f"{path}: every row has the label {labels[0]!r}: give rows of two labels "
                         "at least (is this the head of a file that is sorted by label?)")
    if classes is None:
        classes = sorted(set(labels) - {""})
        if all(re.fullmatch(r"-?\d+", name) for name in classes):
            classes.sort(key=int)               # numbers as numbers: 2 before 10
    rows = []
    for number, (row, label) in enumerate(zip(cells, labels), first):
        try:
            value = float(label) if classes is NUMBER else classes.index(label)
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            expected = "a finite number" if classes is NUMBER else f"one of {classes}"
            raise SystemExit(f"{path}, line {number}: label {label!r} is not {expected}: correct "
                             "the row or delete it")
        rows.append((row[layout.text], row.get(layout.text2), value))
    return rows, classes


def read_squad(path):
    """[(id, question, context, [(answer, its offset in the context)])] of a SQuAD 1.1 file."""
    rows = []
    name = "(none yet)"
    try:
        for article in json.loads(read_text(path))["data"]:
            for paragraph in article["paragraphs"]:
                context = paragraph["context"]
                for qa in paragraph["qas"]:
                    name = qa["id"]
                    answers = [(a["text"], int(a["answer_start"])) for a in qa["answers"]]
                    if not answers or qa.get("is_impossible"):
                        raise SystemExit(f"{path}: question {name} has no answer, as in SQuAD 2.0: "
                                         "give SQuAD 1.1, or delete such questions")
                    for text, start in answers:
                        held = start >= 0 and context.startswith(text, start)
                        if not held or not text.strip():
                            raise SystemExit(f"{path}: question {name}: the context does not hold "
                                             "its answer at answer_start: correct the file")
                    rows.append((name, qa["question"].strip(), context, answers))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise SystemExit(f"{path} is not in SQuAD 1.1's format, at or after question {name} "
                         f"({error!r}): put the official file there") from None
    if not rows:
        raise SystemExit(f"{path} holds no question: put the official file there")
    return rows


# ---- features: what a model reads, as lists of numbers

def text_features(rows, tokenizer, length):
    """[CLS] text [SEP], or [CLS] text [SEP] second text [SEP]; at most length tokens."""
    first, second, labels = zip(*rows)
    encoded = tokenizer(list(first), None if second[0] is None else list(second),
                        truncation=True, max_length=length, return_token_type_ids=True)
    columns = zip(encoded["input_ids"], encoded["token_type_ids"], labels)
    return [dict(input_ids=ids, token_type_ids=types, labels=label)
            for ids, types, label in columns]


def whole_spans(spans, text):
    """{span: that span with the characters around it that the tokenizer drops, such as accents}.

    spans: the (begin, end) of all tokens of the text, in order. A dropped character belongs to the
    token before it; where white space lies between these two, to the token after it.
    """
    whole = {}
    last_end = 0
    next_begins = [*(begin for begin, _ in spans[1:]), len(text)]
    for (begin, end), next_begin in zip(spans, next_begins):
        left, right = begin, end
        while left > last_end and not text[left - 1].isspace():
            left -= 1
        while right < next_begin and not text[right].isspace():
            right += 1
        whole[begin, end] = (left, right)
        last_end = right
    return whole


def squad_features(rows, tokenizer, length):
    """[CLS] question [SEP] part of the context [SEP], for each window of the context.

    Windows start 128 tokens apart, or half a window if less. As in BERT's own code, a question has
    at most 64 tokens, and a window without the whole first answer points at [CLS], token 0. Also
    kept: the row's number, and spans, each token's (begin, end) in the context (outside it, None).
    """
    if not tokenizer.is_fast:
        raise SystemExit("questions need each token's offsets in the text, and --model's "
                         f"{type(tokenizer).__name__} has none: give a BERT with a fast tokenizer")
    features = []
    for number, (_, question, context, answers) in enumerate(rows):
        longest = min(64, length // 2)
        words = tokenizer(question, add_special_tokens=False, return_offsets_mapping=True)
        if len(words["input_ids"]) > longest:
            question = question[:words["offset_mapping"][longest - 1][1]]
        room = length - 3 - min(longest, len(words["input_ids"]))      # tokens left for the context
        windows = tokenizer(question, context, truncation="only_second", max_length=length,
                            stride=room - min(128, room // 2),         # the overlap of two windows
                            return_overflowing_tokens=True, return_offsets_mapping=True)
        spans = []                              # of each window
        for i, offsets in enumerate(windows["offset_mapping"]):
            parts = windows.sequence_ids(i)
            spans.append([span if part == 1 else None for span, part in zip(offsets, parts)])
        tokens = {span for window in spans for span in window if span}
        whole = whole_spans(sorted(tokens), context)
        text, begin = answers[0]
        begin += len(text) - len(text.lstrip())
        end = begin + len(text.strip())
        for i, input_ids in enumerate(windows["input_ids"]):
            window = [span and whole[span] for span in spans[i]]
            first = token_at(window, begin)
            last = token_at(window, end - 1)
            if first is None or last is None:
                first = last = 0
            features.append(dict(
                input_ids=input_ids,
                token_type_ids=windows["token_type_ids"][i],
                start_positions=first,
                end_positions=last,
                row=number,
                spans=window))
    return features


def token_at(spans, offset):
    """The number of the first token that holds the character at this offset, or None."""
    for i, span in enumerate(spans):
        if span and span[0] <= offset < span[1]:
            return i
    return None


# ---- metrics, in percent

def context_tokens(features, width):
    """Which of a window's tokens are the context's: (windows, width), True or False."""
    inside = torch.zeros(len(features), width, dtype=torch.bool)
    for row, feature in zip(inside, features):
        row[:len(feature["spans"])] = torch.tensor([span is not None for span in feature["spans"]])
    return inside


def best_spans(starts, ends, features, longest=30):
    """The best span of at most 30 context tokens in each window, by start logit + end logit.

    starts, ends: logits, (windows, tokens), on any device. Returns [(score, begin, end)], offsets
    in the text.
    """
    width = starts.shape[1]
    outside = ~context_tokens(features, width).to(starts.device)
    starts = starts.float().masked_fill(outside, -math.inf)
    ends = ends.float().masked_fill(outside, -math.inf)
    # 0 where first <= last < first + 30, else -inf: (tokens, tokens)
    allowed = torch.ones(width, width, device=starts.device).triu().tril(longest - 1).log()
    scores = starts[:, :, None] + ends[:, None, :] + allowed            # (windows, first, last)
    best, pairs = scores.flatten(1).max(dim=1)                          # (windows,) both
    found = []
    for feature, score, pair in zip(features, best.tolist(), pairs.tolist()):
        first, last = divmod(pair, width)
        spans = feature["spans"]
        found.append((score, spans[first][0], spans[last][1]))
    return found


def normal_words(text):
    """SQuAD's official normalisation: lower case, no punctuation, no articles."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def em_f1(answer, golds):
    """(exact match, F1 over words), 0 to 1, by the official v1.1 rules: the best over the golds."""
    answer = normal_words(answer)
    golds = [normal_words(gold) for gold in golds]
    f1 = 0.0
    for gold in golds:
        same = sum((collections.Counter(answer) & collections.Counter(gold)).values())
        if same:
            f1 = max(f1, 2 * same / (len(answer) + len(gold)))
    return float(answer in golds), f1


def squad_metrics(rows, features, spans):
    """EM and F1 over all questions. A question's answer is the best span of all its windows."""
    best = {}
    for feature, span in zip(features, spans):
        best[feature["row"]] = max(span, best.get(feature["row"], span))
    scores = []
    for number, (_, _, context, answers) in enumerate(rows):
        _, begin, end = best[number]
        scores.append(em_f1(context[begin:end], [text for text, _ in answers]))
    em, f1 = 100 * np.mean(scores, axis=0)
    return {"EM": float(em), "F1": float(f1)}


def logit_spread(starts, ends, features):
    """The standard deviation of a window's logits over the context's tokens: (windows,).

    starts, ends: (windows, tokens); of the two the larger deviation counts.
    """
    inside = context_tokens(features, starts.shape[1]).to(starts.device)
    n = inside.sum(dim=1)
    both = torch.stack([starts, ends]).float()                          # (2, windows, tokens)
    mean = (both * inside).sum(dim=2) / n
    spread = (((both - mean[:, :, None]) ** 2 * inside).sum(dim=2) / n).sqrt()
    return spread.max(dim=0).values


def collapsed_answers(spreads):
    """Whether the tokens of most windows have the same logits, so that rounding picks the answers.

    The answers themselves do not tell: rounding scatters them. A spread of 0.01 means that two
    tokens differ by 1 % in probability. Our collapsed run has 0.0005 at most, and five steps of
    training on mini lead to 0.05.
    """
    return float(np.median(spreads)) < 0.01


def correlation(x, y):
    """Pearson's, times 100; 0 where one of the two is constant."""
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        return 0.0
    return 100 * float(np.corrcoef(x, y)[0, 1])


def ranks(x):
    """The rank of each element, ties sharing their mean: Spearman's is Pearson's of the ranks."""
    _, which, count = np.unique(x, return_inverse=True, return_counts=True)
    return (np.cumsum(count) - (count - 1) / 2)[which]


def glue_metrics(task, dev, logits, gold):
    """The task's own metrics. logits: (rows, classes), or (rows, 1) for STS-B; gold: (rows,)."""
    if task == "stsb":
        score = logits[:, 0]
        return {"pearson": correlation(score, gold),
                "spearman": correlation(ranks(score), ranks(gold))}
    guess = logits.argmax(axis=1)
    if task == "cola":                          # Matthews' is Pearson's of two 0/1 variables
        return {"mcc": correlation(guess, gold)}
    accuracy = 100 * float(np.mean(guess == gold))
    if task in ("qqp", "mrpc"):
        both = float(np.sum(guess * gold))
        f1 = 200 * both / max(1, int(np.sum(guess + gold)))
        return {"acc": accuracy, "F1": f1}
    return {"acc_mm" if dev == "dev_mismatched" else "acc": accuracy}


def collapsed_classes(logits):
    """Whether every row gets the same class, or the same number. logits: (rows, classes or 1)."""
    if logits.shape[1] == 1:
        return bool(np.ptp(logits) < 0.05)      # 1 % of STS-B's scale; bf16 rounds to 0.016
    return len(set(logits.argmax(axis=1))) == 1


# ---- a task's data

class Data:
    """A task's rows and features.

    train: the training features. dev: {name: features}. rows: {name: rows as read}. n_dev: rows of
    all dev files. classes: their names, in the order of the model's outputs; None for questions.
    """

    def __init__(self, task, folder, tokenizer, length):
        self.length = min(length, tokenizer.model_max_length)
        self.task = task
        self.tokenizer = tokenizer
        self.classes = None if task == "squad" else TASKS[task].classes
        self.rows = {}
        self.dev = {}
        for name, path in task_files(task, folder).items():
            if task == "squad":
                self.rows[name] = read_squad(path)
                self.dev[name] = squad_features(self.rows[name], tokenizer, self.length)
            else:
                self.rows[name], self.classes = read_tsv(path, task, self.classes)
                self.dev[name] = text_features(self.rows[name], tokenizer, self.length)
        if len({rows[0][1] is None for rows in self.rows.values()}) == 2:
            raise SystemExit(f"{path} and its train.tsv differ: one of them has no column text2: "
                             "give both the same columns")
        self.train = self.dev.pop("train")
        self.n_dev = sum(len(self.rows[name]) for name in self.dev)

    def batches(self, step, batch_size, seed):
        """The training features of this step, the next step, and so on, without end.

        An epoch is shuffled, and each stretch of 50 batches is sorted by length, for less padding.
        Then the batches are shuffled. A batch depends on (seed, step, batch_size) alone.
        """
        an_epoch = max(1, len(self.train) // batch_size)
        lengths = np.array([len(feature["input_ids"]) for feature in self.train])
        order = None
        while True:
            epoch, batch = divmod(step, an_epoch)
            if order is None or batch == 0:
                rng = np.random.default_rng([seed, epoch])
                order = rng.permutation(len(self.train))[:an_epoch * batch_size]
                for at in range(0, len(order), 50 * batch_size):
                    part = order[at:at + 50 * batch_size]
                    part[:] = part[np.argsort(lengths[part], kind="stable")]
                order = rng.permutation(order.reshape(an_epoch, -1))    # (batches, batch_size)
            yield [self.train[i] for i in order[batch]]
            step += 1

    def collate(self, features, device="cpu", targets=True):
        """Features as tensors on the device, padded on the right.

        input_ids, token_type_ids, attention_mask: (batch, longest). With targets also labels, or
        start_positions and end_positions: (batch,).
        """
        shape = len(features), max(len(feature["input_ids"]) for feature in features)
        ids = np.full(shape, self.tokenizer.pad_token_id)
        types = np.zeros(shape, dtype=np.int64)
        mask = np.zeros(shape, dtype=np.int64)
        for row, feature in enumerate(features):
            n = len(feature["input_ids"])
            ids[row, :n] = feature["input_ids"]
            types[row, :n] = feature["token_type_ids"]
            mask[row, :n] = 1
        batch = dict(
            input_ids=torch.from_numpy(ids),
            token_type_ids=torch.from_numpy(types),
            attention_mask=torch.from_numpy(mask))
        for key in ("labels", "start_positions", "end_positions"):
            if targets and key in features[0]:
                batch[key] = torch.tensor([feature[key] for feature in features])
        if torch.device(device).type == "cuda":         # pinned: copied while the CPU goes on
            batch = {key: x.pin_memory() for key, x in batch.items()}
        return {key: x.to(device, non_blocking=True) for key, x in batch.items()}

    @torch.no_grad()
    def evaluate(self, model):
        """(the task's metrics on its dev files, whether all answers to one file are alike)."""
        model.eval()
        metrics = {}
        collapsed = False
        for name, features in self.dev.items():
            results = [None] * len(features)
            spreads = []                        # of the logits of questions
            order = sorted(range(len(features)), key=lambda i: len(features[i]["input_ids"]))
            for at in tqdm(range(0, len(order), 64), desc=name, disable=None, leave=False):
                chosen = order[at:at + 64]
                part = [features[i] for i in chosen]
                out = model(**self.collate(part, model.device, targets=False))
                if not all(logits.isfinite().all() for logits in out.values()):
                    raise SystemExit("the model's outputs are not finite: give a smaller --lr")
                if self.task == "squad":
                    values = best_spans(out.start_logits, out.end_logits, part)
                    spreads += logit_spread(out.start_logits, out.end_logits, part).tolist()
                else:
                    values = out.logits.float().cpu().numpy()
                for i, value in zip(chosen, values):
                    results[i] = value
            rows = self.rows[name]
            if self.task == "squad":
                metrics |= squad_metrics(rows, features, results)
                collapsed |= collapsed_answers(spreads)
            else:
                logits = np.stack(results)      # (rows, classes)
                gold = np.array([label for _, _, label in rows])
                metrics |= glue_metrics(self.task, name, logits, gold)
                collapsed |= collapsed_classes(logits)
        return metrics, collapsed


# ---- BERT

def first_line(error):
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def load_tokenizer(name):
    """The tokenizer of a BERT: a folder, or a name on the hub."""
    try:
        config = AutoConfig.from_pretrained(name)
        tokenizer = AutoTokenizer.from_pretrained(name)
    except Exception as error:                  # each of its libraries raises its own
        raise SystemExit(f"{name} cannot be loaded ({first_line(error)}): give "
                         "the folder of a BERT, or, without a network, --preset mini") from None
    if config.model_type != "bert" or not 10 < len(tokenizer) <= config.vocab_size:
        raise SystemExit(f"{name} is a {config.model_type} model with a tokenizer of "
                         f"{len(tokenizer)} words: give a BERT with its own tokenizer")
    if "A" in tokenizer.get_vocab() and tokenizer.tokenize("A") != ["A"]:
        raise SystemExit(f"{name} has capitals in its vocabulary, and its tokenizer lower-cases: "
                         'write {"do_lower_case": false} into its tokenizer_config.json')
    tokenizer.model_max_length = config.max_position_embeddings
    return tokenizer


def check_teacher(name, data):
    """A teacher reads the student's batches: it needs the same task, words and length."""
    if data.classes is NUMBER:
        raise SystemExit(f"--teacher: {data.task} has no classes, so there is nothing to distil: "
                         "leave it out")
    tokenizer = load_tokenizer(name)
    task = getattr(AutoConfig.from_pretrained(name), "finetuning_task", None)
    if task in TASKS and task != data.task:
        raise SystemExit(f"--teacher {name} was trained on {task}: give one of {data.task}")
    same = tokenizer.get_vocab() == data.tokenizer.get_vocab()
    if not same or tokenizer.model_max_length < data.length:
        raise SystemExit(f"--teacher {name} has another vocabulary than --model, or reads fewer "
                         f"than {data.length} tokens: give one that reads what --model reads")


@torch.no_grad()
def order_head(model, folder, classes):
    """Put the rows of the folder's head, (classes, hidden), in the order of the data's classes."""
    theirs = [str(label) for _, label in sorted(model.config.id2label.items())]
    nameless = [f"LABEL_{i}" for i in range(len(classes))]
    if theirs == nameless and sorted(classes) != sorted(nameless):
        return                                  # its classes have no names: take its order as ours
    if sorted(theirs) != sorted(classes):
        raise SystemExit(f"{folder} has the classes {theirs}, and the data {classes}: give "
                         "another model, or correct or delete id2label in its config.json")
    order = [theirs.index(label) for label in classes]
    model.classifier.weight.copy_(model.classifier.weight[order])
    model.classifier.bias.copy_(model.classifier.bias[order])


def load_bert(name, data, teacher=False):
    """A BERT with the task's head, new if the folder has none. A teacher must have one."""
    if teacher:
        check_teacher(name, data)
    if data.task == "squad":
        kind = AutoModelForQuestionAnswering
        options = {"num_labels": 2}             # logits of start and end
    else:
        kind = AutoModelForSequenceClassification
        options = {"num_labels": len(data.classes), "problem_type": "single_label_classification"}
        if data.classes is NUMBER:
            options["problem_type"] = "regression"
    try:
        model, info = kind.from_pretrained(name, dtype=torch.float32, output_loading_info=True,
                                           ignore_mismatched_sizes=True, **options)
    except Exception as error:
        raise SystemExit(f"{name} has no weights that can be loaded ({first_line(error)}): "
                         "give the folder of a whole BERT") from None
    new = [*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])]
    may_be_new = () if teacher else ("classifier.", "qa_outputs.", "bert.pooler.")
    lacking = [key for key in new if not key.startswith(may_be_new)]
    if lacking:
        raise SystemExit(f"{name} has no {lacking[0]} of the right shape: give a "
                         + (f"model trained on {data.task}" if teacher else "whole BERT"))
    unused = [key for key in info["unexpected_keys"] if "encoder." in key]
    if getattr(model.config, "position_embedding_type", "absolute") != "absolute":
        unused.append("position_embedding_type")
    if unused:
        raise SystemExit(f"{name} has {unused[0]}, which transformers' BERT does not use: give a "
                         "BERT without masks or relative positions")
    if data.task != "squad":
        if "classifier.weight" not in new and data.classes is not NUMBER:
            order_head(model, name, data.classes)
        model.config.id2label = dict(enumerate(data.classes))
        model.config.label2id = {label: i for i, label in enumerate(data.classes)}
    model.config.finetuning_task = data.task
    return model


def prunable(model):
    """{name: Linear}: the six weight matrices of each encoder layer, which all methods prune.

    Query, key, value, attention.output.dense, intermediate.dense and output.dense. Biases,
    LayerNorm, embeddings, pooler and head are neither pruned nor counted.
    """
    return {name: module for name, module in model.named_modules()
            if isinstance(module, torch.nn.Linear) and ".encoder.layer." in name}


@torch.no_grad()
def count_kept(model):
    """({name of a prunable matrix: fraction of it that is not 0}, fraction of all, size of all)."""
    shares = {}
    kept = total = 0
    for name, module in prunable(model).items():
        weight = module.weight                  # as the forward pass sees it, masks included
        nonzero = int(torch.count_nonzero(weight))
        shares[name] = nonzero / weight.numel()
        kept += nonzero
        total += weight.numel()
    return shares, kept / total, total

"""Data loading and BERT loading for the six scripts; methods and training are in the scripts.

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
SQUAD_SHA256 = {
    "train-v1.1.json": "3527663986b8295af4f7fcdff1ba1ff3f72d07d61a20f487cb238a6ef92fd955",
    "dev-v1.1.json": "95aa6a52d5d6a735563366753ca50492a658031da74f301ac5238b03966972c9",
}
GLUE_URL = "https://dl.fbaipublicfiles.com/glue/data/"
SAME = ["0", "1"]
NLI = ["entailment", "neutral", "contradiction"]
ENTAILS = ["entailment", "not_entailment"]

# texts and label are names of columns. labels: None for a number, [] for the training file's own.
Glue = collections.namedtuple("Glue", "folder zip texts label labels")
TASKS = {
    "squad": None,
    "mnli": Glue("glue/MNLI", "MNLI.zip",
                 ["sentence1", "sentence2"], "gold_label", NLI),
    "qqp": Glue("glue/QQP", "QQP-clean.zip",
                ["question1", "question2"], "is_duplicate", SAME),
    "cola": Glue("glue/CoLA", "CoLA.zip", ["sentence"], "label", SAME),
    "sst2": Glue("glue/SST-2", "SST-2.zip", ["sentence"], "label", SAME),
    "mrpc": Glue("glue/MRPC", None, ["#1 String", "#2 String"], "Quality", SAME),
    "stsb": Glue("glue/STS-B", "STS-B.zip",
                 ["sentence1", "sentence2"], "score", None),
    "qnli": Glue("glue/QNLI", "QNLIv2.zip",
                 ["question", "sentence"], "label", ENTAILS),
    "rte": Glue("glue/RTE", "RTE.zip",
                ["sentence1", "sentence2"], "label", ENTAILS),
    "tsv": Glue("tsv", None, ["text", "text2"], "label", []),
}


def dev_names(task):
    return ["dev_matched", "dev_mismatched"] if task == "mnli" else ["dev"]


def fetch(url, path, sha256=None):
    """Download url to path, unless it is there, with a progress bar; sha256: of the whole file."""
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        torch.hub.download_url_to_file(url, str(path), hash_prefix=sha256)
    except (OSError, RuntimeError) as error:
        raise SystemExit(f"{url} could not be downloaded ({error}): "
                         f"put it at {path} yourself, or use --preset mini") from None


def download(task, data):
    """Fetch the task's files that are not under the folder data, from the data set's own site."""
    data = Path(data)
    if task == "squad":
        for name, sha256 in SQUAD_SHA256.items():
            fetch(SQUAD_URL + name, data / "squad" / name, sha256)
        return
    files = TASKS[task]
    paths = [data / files.folder / f"{name}.tsv" for name in ["train", *dev_names(task)]]
    missing = [path for path in paths if not path.exists()]
    if missing and files.zip:
        archive = data / "glue" / files.zip
        fetch(GLUE_URL + files.zip, archive)
        if not zipfile.is_zipfile(archive):     # the connection broke: a part was saved
            archive.unlink()
            raise SystemExit(f"{archive} was not downloaded whole: start again")
        for path in missing:
            zipfile.ZipFile(archive).extract(f"{path.parent.name}/{path.name}", archive.parent)
    elif missing and task == "mrpc":
        raise SystemExit(f"{missing[0]} is absent, and MRPC has no such file to download: "
                         "make it with GLUE's own script from Microsoft's paraphrase corpus")


def read_text(path):
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise SystemExit(f"{path} cannot be read as text ({error}): "
                         "put the file there, or name another with --data or --corpus") from None
    if not text.strip():
        raise SystemExit(f"{path} is empty: put a whole file there")
    return text


def read_tsv(path, task, labels):
    """The rows of a tab-separated file without quoting, and the task's labels.

    Returns ([(text, second text or None, label)], labels). A label is its place in labels, or a
    number where labels is None. Where labels is [], they are those of this file.
    """
    files = TASKS[task]
    lines = read_text(path).rstrip("\r\n").split("\n")
    table = [line.rstrip("\r").split("\t") for line in lines]
    if task == "cola":                          # GLUE's CoLA is the one file without a header
        table.insert(0, ["source", "label", "star", "sentence"])
    header = table[0]
    wanted = [name for name in [*files.texts, files.label] if name != "text2" or name in header]
    for name in wanted:
        if name not in header:
            raise SystemExit(f"{path}, line 1: the header has no column {name!r}: add it")
    places = [header.index(name) for name in wanted]
    first = 1 if task == "cola" else 2          # the number of the first row's line
    cells = []
    for number, row in enumerate(table[1:], first):
        if len(row) <= max(places):
            raise SystemExit(f"{path}, line {number}: the row is cut short: complete or delete it")
        cells.append([row[place] for place in places])
    if labels == []:
        labels = sorted({label for *_, label in cells})
    rows = []
    for number, (*texts, label) in enumerate(cells, first):
        try:
            value = float(label) if labels is None else labels.index(label)
        except ValueError:
            raise SystemExit(f"{path}, line {number}: label {label!r} is not "
                             f"{'a number' if labels is None else f'one of {labels}'}") from None
        rows.append((texts[0], texts[1] if len(texts) > 1 else None, value))
    if not rows:
        raise SystemExit(f"{path} has a header and no rows: put the data set's own file there")
    return rows, labels


def read_squad(path):
    """[(id, question, context, [(answer, its offset in the context)])] of a SQuAD 1.1 file."""
    rows = []
    try:
        for article in json.loads(read_text(path))["data"]:
            for paragraph in article["paragraphs"]:
                for qa in paragraph["qas"]:
                    answers = [(a["text"], int(a["answer_start"])) for a in qa["answers"]]
                    rows.append((qa["id"], qa["question"].strip(), paragraph["context"], answers))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise SystemExit(f"{path} is not in SQuAD 1.1's format ({error!r}): "
                         "put the official file there") from None
    if not rows:
        raise SystemExit(f"{path} holds no question: put the official file there")
    for name, _, context, answers in rows:
        found = [text.strip() and context.find(text, start) == start for text, start in answers]
        if not answers or not all(found):
            raise SystemExit(f"{path}: question {name}: the context does not hold its answer at "
                             "answer_start: correct the file")
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


def squad_features(rows, tokenizer, length):
    """[CLS] question [SEP] part of the context [SEP]: windows, 128 tokens apart or half a window.

    As in BERT's own code, the question has at most 64 tokens, and a window that lacks part of the
    first answer points at [CLS], place 0. A feature also keeps the number of its row, and spans:
    for each token its (begin, end) in the context's text, None outside the context.
    """
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
        text, begin = answers[0]
        begin += len(text) - len(text.lstrip())
        for i, input_ids in enumerate(windows["input_ids"]):
            first = windows.char_to_token(i, begin, sequence_index=1)
            last = windows.char_to_token(i, begin + len(text.strip()) - 1, sequence_index=1)
            if first is None or last is None:
                first = last = 0
            spans = zip(windows["offset_mapping"][i], windows.sequence_ids(i))
            features.append(dict(
                input_ids=input_ids,
                token_type_ids=windows["token_type_ids"][i],
                start_positions=first,
                end_positions=last,
                row=number,
                spans=[span if part == 1 else None for span, part in spans]))
    return features


# ---- metrics, in percent

def best_spans(starts, ends, features, longest=30):
    """The best span of at most 30 context tokens in each window, by start logit + end logit.

    starts, ends: logits, (windows, tokens). Returns [(score, begin, end)], offsets in the text.
    """
    width = starts.shape[1]
    outside = torch.ones(len(features), width, dtype=torch.bool)
    for row, feature in zip(outside, features):
        row[:len(feature["spans"])] = torch.tensor([span is None for span in feature["spans"]])
    starts = starts.float().cpu().masked_fill(outside, -math.inf)
    ends = ends.float().cpu().masked_fill(outside, -math.inf)
    # 0 where first <= last < first + 30, else -inf
    allowed = torch.ones(width, width).triu().tril(longest - 1).log()
    scores = (starts[:, :, None] + ends[:, None, :] + allowed).flatten(1)
    best, places = scores.max(dim=1)
    spans = []
    for feature, score, place in zip(features, best.tolist(), places.tolist()):
        first, last = divmod(place, width)
        spans.append((score, feature["spans"][first][0], feature["spans"][last][1]))
    return spans


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
    """EM and F1 over all questions: the best-scoring span of all its windows answers."""
    best = {}
    for feature, span in zip(features, spans):
        best[feature["row"]] = max(span, best.get(feature["row"], span))
    scores = []
    for number, (_, _, context, answers) in enumerate(rows):
        _, begin, end = best[number]
        scores.append(em_f1(context[begin:end], [text for text, _ in answers]))
    em, f1 = 100 * np.mean(scores, axis=0)
    return {"EM": float(em), "F1": float(f1)}


def correlation(x, y):
    """Pearson's, times 100; 0 where one of the two is constant."""
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        return 0.0
    return 100 * float(np.corrcoef(x, y)[0, 1])


def ranks(x):
    """The rank of each element, ties sharing their mean: Spearman's is Pearson's of the ranks."""
    _, place, count = np.unique(x, return_inverse=True, return_counts=True)
    return (np.cumsum(count) - (count - 1) / 2)[place]


def glue_metrics(task, dev, logits, gold):
    """The task's own metrics. logits: (rows, classes), or (rows, 1) for STS-B; gold: (rows,)."""
    if task == "stsb":
        score = logits[:, 0]
        return {
            "pearson": correlation(score, gold),
            "spearman": correlation(ranks(score), ranks(gold))
        }
    guess = logits.argmax(axis=1)
    if task == "cola":                          # Matthews' is Pearson's of two 0/1 variables
        return {"mcc": correlation(guess, gold)}
    accuracy = 100 * float(np.mean(guess == gold))
    if task in ("qqp", "mrpc"):
        f1 = 200 * float(np.sum(guess * gold)) / max(1, int(np.sum(guess + gold)))
        return {"acc": accuracy, "F1": f1}
    return {"acc_mm" if dev == "dev_mismatched" else "acc": accuracy}


# ---- a task's data

class Data:
    """A task's rows and features.

    train: the training features. dev: {name: features}. rows: {name: rows as read}. labels: the
    names of the classes; None where the label is a number or a place. n_dev: rows of all dev files.
    """

    def __init__(self, task, folder, tokenizer, length):
        folder = Path(folder)
        self.length = min(length, tokenizer.model_max_length)
        self.task = task
        self.tokenizer = tokenizer
        self.labels = None if task == "squad" else TASKS[task].labels
        self.rows = {}
        self.dev = {}
        for name in ["train", *dev_names(task)]:
            if task == "squad":
                self.rows[name] = read_squad(folder / "squad" / f"{name}-v1.1.json")
                self.dev[name] = squad_features(self.rows[name], tokenizer, self.length)
            else:
                path = folder / TASKS[task].folder / f"{name}.tsv"
                self.rows[name], self.labels = read_tsv(path, task, self.labels)
                self.dev[name] = text_features(self.rows[name], tokenizer, self.length)
        self.train = self.dev.pop("train")
        self.n_dev = sum(len(self.rows[name]) for name in self.dev)

    def batches(self, step, batch_size, seed):
        """The training features of this step, the next step, and so on, without end.

        An epoch is shuffled, then sorted by length in stretches of 50 batches, for less padding.
        Each batch depends on (seed, step) alone.
        """
        an_epoch = max(1, len(self.train) // batch_size)
        lengths = np.array([len(feature["input_ids"]) for feature in self.train])
        order = None
        while True:
            epoch, place = divmod(step, an_epoch)
            if order is None or place == 0:
                rng = np.random.default_rng([seed, epoch])
                order = rng.permutation(len(self.train))[:an_epoch * batch_size]
                for at in range(0, len(order), 50 * batch_size):
                    part = order[at:at + 50 * batch_size]
                    part[:] = part[np.argsort(lengths[part], kind="stable")]
                order = rng.permutation(order.reshape(an_epoch, -1))
            yield [self.train[i] for i in order[place]]
            step += 1

    def collate(self, features, targets=True):
        """Features as tensors: input_ids, token_type_ids, attention_mask, (batch, longest)."""
        keys = ["input_ids", "token_type_ids"]
        if targets:                             # labels or positions: (batch,)
            keys += ["labels", "start_positions", "end_positions"]
        chosen = [{key: f[key] for key in keys if key in f} for f in features]
        return self.tokenizer.pad(chosen, return_tensors="pt")

    @torch.no_grad()
    def evaluate(self, model):
        """The task's metrics on its dev files."""
        model.eval()
        metrics = {}
        for name, features in self.dev.items():
            results = [None] * len(features)
            order = sorted(range(len(features)), key=lambda i: len(features[i]["input_ids"]))
            for at in tqdm(range(0, len(order), 64), desc=name, disable=None, leave=False):
                places = order[at:at + 64]
                chosen = [features[i] for i in places]
                out = model(**self.collate(chosen, targets=False).to(model.device))
                if self.task == "squad":
                    values = best_spans(out.start_logits, out.end_logits, chosen)
                else:
                    values = out.logits.float().cpu().numpy()
                for i, value in zip(places, values):
                    results[i] = value
            rows = self.rows[name]
            if self.task == "squad":
                metrics |= squad_metrics(rows, features, results)
            else:
                gold = np.array([label for _, _, label in rows])
                metrics |= glue_metrics(self.task, name, np.stack(results), gold)
        return metrics


# ---- BERT

def load_tokenizer(name):
    """The tokenizer of a BERT: a folder, or a name on the hub."""
    try:
        config = AutoConfig.from_pretrained(name)
        tokenizer = AutoTokenizer.from_pretrained(name)
    except Exception as error:                  # each of its libraries raises its own
        raise SystemExit(f"{name} cannot be loaded ({str(error).strip().splitlines()[0]}): give "
                         "the folder of a BERT, or use --preset mini without a network") from None
    if config.model_type != "bert" or not 10 < len(tokenizer) <= config.vocab_size:
        raise SystemExit(f"{name} is a {config.model_type} model with a tokenizer of "
                         f"{len(tokenizer)} words: give a BERT with its own tokenizer")
    tokenizer.model_max_length = config.max_position_embeddings
    return tokenizer


def load_bert(name, data, teacher=False):
    """A BERT with the task's head. The head is new if the folder has none; a teacher must have one.
    """
    tokenizer = load_tokenizer(name)
    task = getattr(AutoConfig.from_pretrained(name), "finetuning_task", None)
    other_task = task in TASKS and task != data.task
    if teacher and (other_task or len(tokenizer) != len(data.tokenizer)
                    or tokenizer.model_max_length < data.length):
        raise SystemExit(f"--teacher {name} was trained on {task}, with {len(tokenizer)} words: "
                         f"give one of {data.task} that reads what --model reads")
    if data.task == "squad":
        kind, options = AutoModelForQuestionAnswering, {"num_labels": 2}
    else:
        kind = AutoModelForSequenceClassification
        labels = dict(enumerate(data.labels or ["score"]))
        options = {"id2label": labels, "label2id": {label: i for i, label in labels.items()},
                   "problem_type": "single_label_classification"}
        if data.labels is None:
            options["problem_type"] = "regression"
    try:
        model, info = kind.from_pretrained(name, dtype=torch.float32, output_loading_info=True,
                                           ignore_mismatched_sizes=True, **options)
    except Exception as error:
        raise SystemExit(f"{name} has no weights that can be loaded ({error}): "
                         "give the folder of a whole BERT") from None
    new = [*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])]
    may_be_new = () if teacher else ("classifier.", "qa_outputs.", "bert.pooler.")
    lacking = [key for key in new if not key.startswith(may_be_new)]
    if lacking:
        raise SystemExit(f"{name} has no {lacking[0]} of the right shape: give a "
                         + (f"model trained on {data.task}" if teacher else "whole BERT"))
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

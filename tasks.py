"""Mistakes and flags, the tasks' files and metrics, pre-training's text and loss; common.py makes features and batches of the tasks.

In order: mistakes · flags and exit · files (download, TSV, SQuAD) · metrics · pre-training (text, held-out text, loss).
"""
import argparse, collections, contextlib, hashlib, http.client, json, math, os, re, shlex, shutil, string, sys, time, zipfile
from pathlib import Path
from urllib.request import urlopen

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tqdm import tqdm

MINI = Path(__file__).resolve().parent / "mini"


# ---- mistakes, files written whole, folders locked

class Mistake(Exception):
    """A user's mistake, told in one sentence that says what to do: launch() prints it and exits with status 2."""


def demand(good, message):
    if not good:
        raise Mistake(message)


@contextlib.contextmanager
def blame(errors, message):
    """Any of these errors inside becomes a Mistake with this message, where {} stands for the error's own first line."""
    try:
        yield
    except Mistake:
        raise
    except errors as error:
        raise Mistake(message.replace("{}", f"{type(error).__name__}: {(str(error).strip() or '-').splitlines()[0][:150]}")) from error


def write_whole(path, write):
    """write, a text or a function of an open file, under a temporary name, synced and renamed: path never holds a part."""
    part = Path(f"{path}.part")
    try:
        with open(part, "wb") as f:
            f.write(write.encode()) if isinstance(write, str) else write(f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def folder_whole(path, write=None):
    """A folder that write(folder) fills under a temporary name, renamed when whole: path never holds a part. Without write: none."""
    part = Path(f"{path}.part")
    for old in (part, path):
        if old.exists():
            os.replace(old, part)                                   # at once, and then file by file
            shutil.rmtree(part)
    if write:
        write(part)
        os.replace(part, path)


locked = []                                         # the open folder that lock() holds


def lock(folder, message):
    """Hold the folder for this run alone until leave(), another lock() or the process's end; a Mistake, this message, if another holds it."""
    with contextlib.suppress(ImportError, OSError), blame(BlockingIOError, message):
        import fcntl                                # not on Windows; nor can every network's folders be locked: those go without
        os.close(locked.pop()) if locked else None
        locked.append(os.open(folder, os.O_RDONLY))
        fcntl.flock(locked[-1], fcntl.LOCK_EX | fcntl.LOCK_NB)


# ---- flags and exit

class Parser(argparse.ArgumentParser):
    def __init__(self, doc):
        super().__init__(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)

    def error(self, message):                                       # argparse would print the whole usage first
        leave(2, f"{self.prog}: {message}; see python {self.prog} --help")


def number(kind, low, high=math.inf):
    """An argparse type: an int that is low or more, or a float above low; at most high, and finite."""
    def parse(text):
        with contextlib.suppress(ValueError, OverflowError):
            x = kind(text)
            if (x >= low if kind is int else x > low) and x <= high and math.isfinite(x):
                return x
        raise argparse.ArgumentTypeError(f"{text} is not a{' whole' * (kind is int)} number {'of at least' if kind is int else 'above'} "
                                         f"{low}" + f" and at most {high}" * (high < math.inf))
    return parse


def leave(code, text=None):
    """Exit, with a sentence on stderr. Under torchrun a machine's first process speaks; the others wait 5 s, in which torchrun ends those
    that would only repeat it. What befell one of them alone is so said by that one."""
    while locked:
        os.close(locked.pop())
    if text:
        time.sleep(5 * (os.environ.get("LOCAL_RANK", "0") != "0"))
        print(text, file=sys.stderr, flush=True)
    sys.exit(code)


def launch(main, args):
    """Run main(args) and exit with the status it returns; a mistake, a full disk, a lost process or Ctrl-C ends in one sentence on stderr."""
    getattr(sys.stdout, "reconfigure", dict)(errors="replace")      # a terminal that has no █ shows ?
    many = int(os.environ.get("WORLD_SIZE", 1)) > 1

    def again():                                    # before restore() there is nothing to --resume
        return shlex.join([*(["torchrun", "..."] if many else ["python"]), *sys.argv, *["--resume"] * (launch.begun and "--resume" not in sys.argv)])
    try:
        code = main(args)
    except KeyboardInterrupt:
        leave(130, f"\nstopped; to go on: {again()}" if os.environ.get("LOCAL_RANK", "0") == "0" else None)
    except Exception as error:              # torch and safetensors wrap the system's errors in classes of their own: by their words, then
        said = f"{error} {error.__context__}"
        text = (error if isinstance(error, Mistake) else
                f"the disk is full: free some space, then go on with {again()}"
                if re.search("No space left|Disk quota|os error 2[78]|Errno 2[78]|file write failed", said) else
                f"{error}: mend that, then go on with {again()}" if isinstance(error, OSError) else
                "the GPU's memory is full: give a smaller --batch_size" if isinstance(error, torch.OutOfMemoryError) else
                f"another process has ended, and so does this one ({str(error).splitlines()[0][:150]}); when its message is dealt with, "
                f"go on with {again()}" if many and re.search("by peer|gloo|NCCL", said) else None)
        if text is None:
            raise
        leave(2, f"{Path(sys.argv[0]).name}: {text}")
    if dist.is_initialized() and not code:
        dist.destroy_process_group()
    leave(code)


launch.begun = False                                # is there something in --out to --resume?


# ---- files: download, GLUE's TSV, SQuAD's JSON

SQUAD_URL, GLUE_URL = "https://rajpurkar.github.io/SQuAD-explorer/dataset/", "https://dl.fbaipublicfiles.com/glue/data/"
MRPC_URL = "https://dl.fbaipublicfiles.com/senteval/senteval_data/msr_paraphrase_train.txt"
CHECKS = {"dev-v1.1.json": ("sha256", "95aa6a52d5d6a735563366753ca50492a658031da74f301ac5238b03966972c9"),
          "train-v1.1.json": ("git blob id", "77f1d9a7daee11f7bc293832020f7709f63410ad")}
# folder | dev files | text columns by header name (CoLA has no header: positions) | label column | labels (None: a number; []: those of
# the training file) | zip on GLUE's site
Files = collections.namedtuple("Files", "folder devs texts label labels zip")
NLI, SAME, ENTAILS = ["entailment", "neutral", "contradiction"], ["0", "1"], ["entailment", "not_entailment"]
TASKS = {
    "squad": Files("squad", ["dev"], [], "", [], ""),
    "mnli": Files("glue/MNLI", ["dev_matched", "dev_mismatched"], ["sentence1", "sentence2"], "gold_label", NLI, "MNLI.zip"),
    "qqp": Files("glue/QQP", ["dev"], ["question1", "question2"], "is_duplicate", SAME, "QQP-clean.zip"),
    "cola": Files("glue/CoLA", ["dev"], [3], 1, SAME, "CoLA.zip"),
    "sst2": Files("glue/SST-2", ["dev"], ["sentence"], "label", SAME, "SST-2.zip"),
    "mrpc": Files("glue/MRPC", ["dev"], ["#1 String", "#2 String"], "Quality", SAME, ""),
    "stsb": Files("glue/STS-B", ["dev"], ["sentence1", "sentence2"], "score", None, "STS-B.zip"),
    "qnli": Files("glue/QNLI", ["dev"], ["question", "sentence"], "label", ENTAILS, "QNLIv2.zip"),
    "rte": Files("glue/RTE", ["dev"], ["sentence1", "sentence2"], "label", ENTAILS, "RTE.zip"),
    "tsv": Files("tsv", ["dev"], ["text", "text2"], "label", [], "")}


def download(url, path, check=None):
    """url to path, whole or not at all, with a progress bar. check: (kind, hex digest) as in CHECKS."""
    with blame((OSError, ValueError, http.client.HTTPException), f"{url} could not be downloaded ({{}}): put it at {path} yourself, or use --preset mini"):
        path.parent.mkdir(parents=True, exist_ok=True)
        with urlopen(url, timeout=30) as reply:
            size = int(reply.headers.get("Content-Length") or 0)
            with tqdm.wrapattr(reply, "read", total=size or None, desc=path.name) as body:
                whole = b"".join(iter(lambda: body.read(1 << 20), b""))
        digest = hashlib.sha256(whole) if check and check[0] == "sha256" else hashlib.sha1(b"blob %d\0" % len(whole) + whole)
        demand(not size or len(whole) == size, f"{url} was cut off at {len(whole)} of {size} bytes: try again, or put it at {path} yourself")
        demand(not check or check[1] == digest.hexdigest(), f"{url} has not the {check and check[0]} of the original: put that at {path} yourself")
        write_whole(path, lambda f: f.write(whole))


def fetch(data, task):
    """Download those of the task's files that are not under data, each from the data set's own site."""
    files, folder = TASKS[task], data / TASKS[task].folder
    for path in [folder / (f"{name}-v1.1.json" if task == "squad" else f"{name}.tsv") for name in [*files.devs, "train"]]:
        if path.exists() or task == "tsv":
            continue
        if task == "squad":
            download(SQUAD_URL + path.name, path, CHECKS[path.name])
        elif task == "mrpc":                                        # dev: those of the first training pairs that GLUE's list names
            both, ids = folder / "msr_paraphrase_train.txt", folder / "mrpc_dev_ids.tsv"
            both.exists() or download(MRPC_URL, both)
            ids.exists() or download(GLUE_URL + ids.name, ids)
            listed, (head, *rows) = set(read_text(ids).splitlines()), read_text(both).rstrip("\n").split("\n")
            rows = [row for row in rows if ("\t".join(row.split("\t")[1:3]) in listed) == (path.stem == "dev")]
            write_whole(path, "\n".join([head, *rows, ""]))
        else:
            (folder.parent / files.zip).exists() or download(GLUE_URL + files.zip, folder.parent / files.zip)
            unzip(folder.parent / files.zip, f"{folder.name}/{path.name}", path)


def unzip(archive, member, path):
    """One member of a zip to path, whole or not at all; a zip with any member that points outside is refused."""
    with blame(Exception, f"{archive} is no whole zip with {member} in it ({{}}): delete it and try again"):    # damage has many names
        with zipfile.ZipFile(archive) as z:
            outside = any(re.match(r"[/\\]|.*(^|[/\\])\.\.([/\\]|$)|.:", name) for name in z.namelist())
            demand(not outside, f"{archive} has a member that points outside its folder: delete it, and put {path} there yourself")
            text = z.read(member)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, lambda f: f.write(text))


def read_text(path):
    with blame((OSError, UnicodeDecodeError), f"{path} cannot be read as UTF-8 text ({{}}): put the data set's own file there"):
        demand(path.exists(), f"{path} is not there: put it there, or give the folder of your data with --data")
        text = path.read_bytes().decode("utf-8-sig")
    demand(text.strip() and "\0" not in text, f"{path} is {'binary' if text.strip() else 'empty'}: put the data set's own file there")
    return text


def read_tsv(path, texts, label, labels, say=print):
    """([(text, text2 or None, label)], labels) of a TSV without quoting; a label is its place in labels, or a float if that is None.

    Some of GLUE's QQP rows are cut short: up to one row in a thousand is left out, with a word; more is a mistake."""
    rows = [(n, line.rstrip("\r").split("\t")) for n, line in enumerate(read_text(path).rstrip("\r\n").split("\n"), 1)]
    columns, result = [*texts, label], []
    if isinstance(label, str):
        header = rows.pop(0)[1]
        columns = [c for c in columns if c != "text2" or c in header]
        for c in columns:
            demand(c in header, f"{path}, line 1: no column {c!r} in the header ({', '.join(header)[:150]}): name it, tab-separated")
        columns = [header.index(c) for c in columns]
    short = [n for n, row in rows if len(row) <= max(columns)]
    demand(len(short) <= len(rows) / 1000, f"{path}, line {[*short, 0][0]}: fewer columns than the {max(columns) + 1} needed: complete it")
    if short:
        say(f"{path}: left out {len(short)} rows that are cut short, the first in line {short[0]}")
    rows = [(n, [row[c] for c in columns]) for n, row in rows if len(row) > max(columns)]
    labels = sorted({row[-1] for _, row in rows}) if labels == [] else labels
    demand(rows and (labels is None or len(labels) > 1), f"{path} holds {'one class only' if rows else 'no rows'}: put the data set's own there")
    for n, (*text, y) in rows:
        with blame(ValueError, f"{path}, line {n}: label {y!r} is not {'one of ' + ', '.join(labels) if labels else 'a number'}: correct it"):
            value = labels.index(y) if labels else float(y)
            demand(math.isfinite(value), f"{path}, line {n}: the score is {y}: correct it")
            result.append((text[0], text[1] if len(text) > 1 else None, value))
    return result, labels


def read_squad(path):
    """[(id, question, context, [(answer, its offset in context)])] of a SQuAD 1.1 file; each offset must hold its answer."""
    with blame((ValueError, KeyError, TypeError, AttributeError), f"{path} is not in SQuAD 1.1's format ({{}}): put the official file there"):
        rows = [(q["id"], q["question"].strip(), p["context"], [(a["text"], a["answer_start"]) for a in q["answers"]])
                for article in json.loads(read_text(path))["data"] for p in article["paragraphs"] for q in p["qas"]]
        demand(rows, f"{path} holds no questions: put the official file there")
        for q, _, context, answers in rows:
            demand(answers, f"{path}: question {q} has no answer, and in SQuAD 1.1 each has one: put a 1.1 file there")
            for text, start in answers:
                demand(text.strip() and start >= 0 and context[start:start + len(text)] == text,
                       f"{path}: question {q}: the context does not hold {text!r} at answer_start {start}: correct it")
    return rows


# ---- metrics

def best_spans(starts, ends, features, longest=30):
    """Per window (score, from, to): its span of at most 30 context tokens with the largest start + end logit; characters from, to."""
    width = starts.shape[1]
    outside = torch.tensor([[not s for s in f["spans"]] + [True] * (width - len(f["spans"])) for f in features])
    starts, ends = (x.float().cpu().masked_fill(outside, -math.inf) for x in (starts, ends))
    band = torch.ones(width, width).triu().tril(longest - 1).log()              # 0 where start <= end < start + 30, else -inf
    best, place = (starts[:, :, None] + ends[:, None, :] + band).flatten(1).max(1)      # over all (start, end)
    return [(score, f["spans"][p // width][0], f["spans"][p % width][1]) if score > -math.inf else (score, 0, 0)
            for f, score, p in zip(features, best.tolist(), place.tolist())]


def em_f1(answer, golds):
    """(exact match, F1), 0 to 1, by the official v1.1 rules: lower case, no punctuation, no articles; the best over the golds."""
    def words(text):
        return re.sub(r"\b(a|an|the)\b", " ", "".join(c for c in text.lower() if c not in string.punctuation)).split()

    def f1(a, b):
        same = sum((collections.Counter(a) & collections.Counter(b)).values())
        return 2 * same / (len(a) + len(b)) if same else 0.0
    answer, golds = words(answer), [words(gold) for gold in golds]
    return float(answer in golds), max(f1(answer, gold) for gold in golds)


def squad_metrics(rows, features, spans):
    """EM and F1 over questions: of a question's windows, the best span answers."""
    best = {}
    for feature, span in zip(features, spans):
        best[feature["row"]] = max(best.get(feature["row"], span), span)
    scores = [em_f1(context[best[n][1]:best[n][2]], [text for text, _ in answers]) for n, (_, _, context, answers) in enumerate(rows)]
    return dict(zip(("EM", "F1"), (100 * np.mean(scores, axis=0)).tolist()))


def glue_metrics(task, logits, gold, dev="dev"):
    """GLUE's metrics for the task, in percent. logits: (n, classes), or (n, 1) for STS-B; gold: (n,)."""
    def ranks(x):                                                   # ties share their mean rank
        _, place, count = np.unique(x, return_inverse=True, return_counts=True)
        return (np.cumsum(count) - (count - 1) / 2)[place]

    def correlation(x, y):
        return 100 * float(np.corrcoef(x, y)[0, 1]) if np.ptp(x) and np.ptp(y) else 0.0
    if task == "stsb":
        return {"pearson": correlation(logits[:, 0], gold), "spearman": correlation(ranks(logits[:, 0]), ranks(gold))}
    guess = logits.argmax(1)
    if task == "cola":                                              # Matthews' coefficient is Pearson's of two 0/1 variables
        return {"mcc": correlation(guess, gold)}
    metrics = {"acc_mm" if dev.endswith("mismatched") else "acc": 100 * float(np.mean(guess == gold))}
    if task in ("qqp", "mrpc"):
        metrics["F1"] = 200 * float(np.sum(guess * gold)) / max(1, int(np.sum(guess + gold)))
    return metrics


# ---- pre-training

def read_corpus(path, tokenizer, at_once=10_000):
    """[document = [line = [token id]]] of a text file: a sentence or paragraph a line, a blank line between documents."""
    lines, documents = [line.strip() for line in read_text(Path(path)).split("\n")], [[]]
    # so many lines at once, for the tokenizer's own objects take a hundred bytes a token
    for at in tqdm(range(0, len(lines), at_once), desc=f"reading {Path(path).name}", disable=None if len(lines) > 10 * at_once else True, leave=False):
        part = lines[at:at + at_once]
        for line, ids in zip(part, tokenizer(part, add_special_tokens=False, verbose=False)["input_ids"]):
            if not line:
                documents.append([])
            elif ids:
                documents[-1].append(ids)
    demand(any(documents), f"{path} holds no text: put one sentence or paragraph a line, with a blank line between documents")
    return [document for document in documents if document]


def mlm_nsp_batch(documents, tokenizer, batch_size, length, rng):
    """A batch of BERT's pre-training (arXiv 1810.04805, A.2), with the keys of BertForPreTraining; rng: a numpy Generator.

    A and B: consecutive lines of a document; half of the time, and where A is a whole document, B is lines of another (next_sentence_label 1). Of the tokens
    15 % are to be predicted: 80 % of those become [MASK], 10 % a random token, 10 % stay. labels is -100 elsewhere."""
    rows, swapped = [], np.zeros(batch_size, dtype=np.int64)
    for i in range(batch_size):
        home = int(rng.integers(len(documents)))
        document, at = documents[home], int(rng.integers(max(1, len(documents[home]) - 1)))
        cut = at + 1 + int(rng.integers(max(1, min(len(document) - at - 1, length // 8))))
        a = [t for ids in document[at:cut] for t in ids]
        if cut >= len(document) or rng.random() < 0.5:
            swapped[i], document = 1, documents[(home + int(rng.integers(1, max(2, len(documents))))) % len(documents)]
            cut = int(rng.integers(len(document)))
        b = [t for ids in document[cut:cut + length // 8] for t in ids]
        n = min(len(a), max(length - 3 - len(b), (length - 3) // 2))                # too long: the longer one is cut
        b = b[:length - 3 - n]
        rows.append(dict(input_ids=[tokenizer.cls_token_id, *a[len(a) - n:], tokenizer.sep_token_id, *b, tokenizer.sep_token_id],
                         token_type_ids=[0] * (n + 2) + [1] * (len(b) + 1)))
    batch = dict(tokenizer.pad(rows, return_tensors="np"))
    ids = batch["input_ids"]
    chosen = ~np.isin(ids, tokenizer.all_special_ids) & (rng.random(ids.shape) < 0.15)
    batch["labels"], dice = np.where(chosen, ids, -100), rng.random(ids.shape)
    words = np.setdiff1d(np.arange(len(tokenizer)), tokenizer.all_special_ids)
    batch["input_ids"] = np.select([chosen & (dice < 0.8), chosen & (dice < 0.9)], [tokenizer.mask_token_id, rng.choice(words, ids.shape)], ids)
    return {key: torch.from_numpy(np.asarray(column)) for key, column in (batch | {"next_sentence_label": swapped}).items()}


class Corpus:
    """The text of a pre-training. Every 20th document, and two at least, is held out: batch() never draws from it.

    held: batches of pairs from the held-out documents, always the same ones, as many as there are documents and at most 512."""
    def __init__(self, run, path, tokenizer, batch_size, length):
        self.run, self.path = run, Path(path or run.data / "corpus.txt")
        if not path and not self.path.exists():
            demand(run.args.preset == "mini", "there is no text to pre-train on: give --corpus FILE, or use --preset mini")
            self.path = MINI / "corpus.txt"
        demand(self.path.is_file(), f"--corpus {self.path} is not there: give a text file")
        documents = read_corpus(self.path, tokenizer)
        demand(len(documents) > 3, f"{self.path} has {len(documents)} documents, and two are held out: give four, a blank line between them")
        every = min(20, len(documents) // 2)
        held, train, self.pairs = documents[::every], [d for i, d in enumerate(documents) if i % every], min(512, len(documents[::every]))
        make = lambda documents, size, *seed: mlm_nsp_batch(documents, tokenizer, size, length, np.random.default_rng(seed))
        self.held = [make(held, min(32, self.pairs - i), i) for i in range(0, self.pairs, 32)]
        self.make = lambda step: make(train, batch_size, run.args.seed, step)

    def batch(self, step):
        """The batch of this step, a function of (seed, step) alone; each of N processes takes every N-th row of it."""
        return {key: x[self.run.rank::self.run.world].to(self.run.device) for key, x in self.make(step).items()}

    @torch.no_grad()
    def accuracy(self, net):
        """{"MLM": percent, "NSP": percent} of right answers on the held-out pairs."""
        net.eval()
        with self.run.autocast():
            right = [net(**{key: x.to(self.run.device) for key, x in batch.items()})[1:] for batch in self.held]
        net.train()
        return {name: 100 * torch.cat(x).float().mean().item() for name, x in zip(("MLM", "NSP"), zip(*right))}


class PreTraining(torch.nn.Module):
    """BERT with its two heads; words are guessed only where one is asked for, at a seventh of the tokens: so much less costs the largest matrix."""
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, labels, next_sentence_label, **batch):
        """(MLM + NSP loss, which of the words asked for were right, which of the pairs)."""
        hidden, pooled = self.model.bert(**batch, return_dict=False)[:2]
        words, order = self.model.cls.predictions(hidden[labels >= 0]), self.model.cls.seq_relationship(pooled)
        labels = labels[labels >= 0]                                # none, perhaps: then their mean counts as 0
        loss = F.cross_entropy(words, labels, reduction="sum") / max(1, len(labels)) + F.cross_entropy(order, next_sentence_label)
        return loss, words.argmax(-1) == labels, order.argmax(-1) == next_sentence_label

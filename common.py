"""Data and BERT loading for the six scripts: what dense fine-tuning needs too, and nothing of a method.

In order: mistakes and flags · the run (preset, processes, log, checkpoint) · files (download, TSV, SQuAD) · the task (features,
batches, evaluation) · metrics · text for pre-training · BERT (load, prunable, loss) · the report.
"""
import argparse, bisect, collections, contextlib, functools, hashlib, json, math, os, platform, re, shlex, string, sys, time, zipfile
from pathlib import Path
from urllib.request import urlopen

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForQuestionAnswering, AutoModelForSequenceClassification, AutoTokenizer

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
MINI = Path(__file__).resolve().parent / "mini"
DISK_FULL = "No space left|os error 28|Errno 28|File too large|Errno 27|os error 27|file write failed"


# ---- mistakes and flags

class Mistake(Exception):
    """A user's mistake, told in one sentence that says what to do: launch() prints it and exits with status 2."""


class Parser(argparse.ArgumentParser):
    def __init__(self, doc):
        super().__init__(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)

    def error(self, message):                                       # argparse would print the whole usage first
        self.exit(2, f"{self.prog}: {message}; see python {self.prog} --help\n")


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


def launch(main, args):
    """Run main(args) and exit with the status it returns; a mistake, a full disk or Ctrl-C ends in one sentence on stderr."""
    again = shlex.join(["python", *(a for a in sys.argv if a != "--resume"), "--resume"])
    try:
        code = main(args)
    except KeyboardInterrupt:
        code = print(f"\nstopped; to go on: {again}", file=sys.stderr) or 130
    except Exception as error:              # torch and safetensors wrap the system's "disk full" in classes of their own
        if not isinstance(error, Mistake) and not re.search(DISK_FULL, str(error)):
            raise
        text = error if isinstance(error, Mistake) else f"the disk is full: free some space, then go on with {again}"
        code = print(f"{Path(sys.argv[0]).name}: {text}", file=sys.stderr) or 2
    if dist.is_initialized() and not code:
        dist.destroy_process_group()
    sys.exit(code)


# ---- the run: preset, device, processes, seed, log, checkpoint

class Run:
    """One run of one script, in all that is no part of the method. Raises Mistake.

    script: its __file__. args: its flags. hyper: {preset: {task or "*": {name: value}}}, for flags left at None and for constants.
    """
    def __init__(self, script, args, hyper):
        self.method, self.args, cuda = Path(script).stem, args, torch.cuda.is_available()
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        why = "as asked" if args.preset else "CUDA is here" if cuda else "no CUDA here"
        args.preset = args.preset or ("paper" if cuda else "mini")
        self.flags = {key: value for key, value in vars(args).items() if key != "resume"}
        for key, value in (hyper[args.preset]["*"] | hyper[args.preset].get(args.task, {})).items():
            setattr(args, key, value if getattr(args, key, None) is None else getattr(args, key))
        args.model = args.model or (str(MINI / "bert") if args.preset == "mini" else "bert-base-uncased")
        self.data = Path(args.data or (MINI if args.preset == "mini" else "data"))
        self.out = Path(args.out or f"out/{self.method}-{args.task}-{args.sparsity:g}-s{args.seed}")
        if args.batch_size % self.world:
            raise Mistake(f"--batch_size {args.batch_size} cannot be split over {self.world} processes: give a multiple of {self.world}")
        try:
            self.device = torch.device(args.device or ("cuda" if cuda else "cpu"))
            if self.device.type == "cuda" and self.world > 1:
                self.device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.zeros(1, device=self.device).item()
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            raise Mistake(f"--device {args.device} cannot be used here ({str(error).splitlines()[0]}): give cpu, cuda or cuda:N")
        if self.world > 1:
            dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo")
        # bf16 where the hardware multiplies in it; but the mini preset on a CPU is fp32, alike on every machine
        self.bf16 = self.device.type == "cuda" or (args.preset == "paper" and torch.cpu._is_avx512_bf16_supported())
        self.say(f"{self.method} {args.task}: {keeps(args.sparsity)} of the encoder's weights | preset {args.preset} ({why}) | "
                 f"{self.device}{' bf16' * self.bf16}{f' x {self.world}' * (self.world > 1)} | seed {args.seed}")
        if 0.5 < args.sparsity < 1:
            self.say(f"--sparsity is the share KEPT: {args.sparsity:g} keeps {args.sparsity:.0%}; did you mean {1 - args.sparsity:g}?")
        self.open_out()
        self.before, self.started, self.ends, self.losses = 0.0, time.time(), [time.time()], []    # before: seconds before --resume
        self.next_log, self.next_write = 0.0, 2.0
        torch.manual_seed(args.seed)

    def open_out(self):
        """Make --out or, on --resume, check that it holds a run with these flags: log.jsonl, whose first line they are."""
        args, out, log = self.args, self.out, self.out / "log.jsonl"
        try:
            held = os.listdir(out) if out.exists() else []
            for flag in ("model", "teacher"):
                if getattr(args, flag) and Path(getattr(args, flag)).resolve() == out.resolve():
                    raise Mistake(f"--out {out} is the --{flag} folder and would overwrite it: give another")
            if args.resume:
                if "log.jsonl" not in held:
                    raise Mistake(f"--resume: {out} holds no run: give the --out of the run to go on with, or leave --resume out")
                before = json.loads(log.read_text().partition("\n")[0] or "{}").get("args", {})
                for key in before:
                    if before[key] != self.flags.get(key):
                        raise Mistake(f"--resume: {out} was run with --{key} {before[key]}, not {self.flags.get(key)}: give the same flags")
            elif held and "log.jsonl" not in held:
                raise Mistake(f"--out {out} holds files that are no run of ours: give a new folder")
            elif self.rank == 0:
                out.mkdir(parents=True, exist_ok=True)
                for old in ("checkpoint.pt", "result.json"):
                    (out / old).unlink(missing_ok=True)
                write_whole(log, json.dumps({"args": self.flags}) + "\n")
        except (OSError, ValueError) as error:
            raise Mistake(f"--out {out} cannot be used ({getattr(error, 'strerror', error)}): give a folder that can be written")
        self.barrier()

    def finished(self):
        """Whether --resume finds a finished run; its RESULT line is then printed again."""
        done = self.args.resume and (self.out / "result.json").exists()
        if done:
            self.say(json.loads((self.out / "result.json").read_text())["line"])
        return done

    def say(self, text):
        if self.rank == 0:
            print(text, flush=True)

    def barrier(self):
        if self.world > 1:
            dist.barrier()

    def seconds(self):
        return self.before + time.time() - self.started

    def ms_per_step(self):
        return 1000 * float(np.median(np.diff(self.ends)[-1000:])) if len(self.ends) > 1 else 0.0

    def seed_step(self, step):
        """Dropout depends on (seed, step, rank) alone: a resumed run draws what the run never stopped would have drawn."""
        torch.manual_seed((self.args.seed * 1_000_003 + step) * self.world + self.rank)

    def autocast(self):
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)

    def parallel(self, model):
        """The model to call in training: under torchrun, DistributedDataParallel's, which averages the gradients."""
        return torch.nn.parallel.DistributedDataParallel(model, broadcast_buffers=False) if self.world > 1 else model

    def log(self, step, loss, penalty, kept, goal, lr):
        """One line every ten seconds and at the last step. kept: a function, called only for a line. goal: a share, or None."""
        self.ends.append(time.time())
        self.losses.append(loss.detach())
        if self.rank or (self.seconds() < self.next_log and step < self.args.steps):
            return
        row = dict(step=step, loss=torch.stack(self.losses).float().mean().item(), penalty=float(torch.as_tensor(penalty).detach()), kept=kept(), goal=goal, lr=lr,
                   ms=self.ms_per_step(), seconds=self.seconds())
        left, self.losses, self.next_log = (self.args.steps - step) * row["ms"] / 1000, [], self.seconds() + 10
        self.say(f"step {step:05d}/{self.args.steps:05d}  loss {row['loss']:.4f}  penalty {row['penalty']:.4f}  kept {row['kept']:.2%} "
                 f"({'no goal' if goal is None else f'goal {goal:.2%}'})  lr {lr:.1e}  {row['ms']:.0f} ms  "
                 f"eta {f'{left / 60:.0f}m' if left > 90 else f'{left:.0f}s'}")
        with open(self.out / "log.jsonl", "a") as f:
            f.write(json.dumps(row) + "\n")
        if not math.isfinite(row["loss"]):
            raise Mistake(f"the loss is {row['loss']} at step {step}: give a smaller --lr")

    def checkpoint(self, step, **parts):
        """Write what a resumed run needs, at most once in 60 times what a write takes: under 2 % of the run."""
        if self.rank or self.seconds() < self.next_write or step == self.args.steps:
            return
        begun, parts = time.time(), {k: p if isinstance(p, dict) else p.state_dict() for k, p in parts.items()}
        write_whole(self.out / "checkpoint.pt", lambda f: torch.save(parts | {"step": step, "seconds": self.seconds()}, f))
        self.next_write = self.seconds() + max(2.0, 60 * (time.time() - begun))

    def restore(self, **parts):
        """On --resume, load the last checkpoint into parts, dicts or what has load_state_dict. Returns the steps already done."""
        path, log = self.out / "checkpoint.pt", self.out / "log.jsonl"
        if self.args.resume and not path.exists():
            self.say("this run was stopped before its first checkpoint: it starts again from step 0")
        if not self.args.resume or not path.exists():
            return 0
        saved = torch.load(path, map_location=self.device, weights_only=True)
        for key, part in parts.items():
            part.update(saved[key]) if isinstance(part, dict) else part.load_state_dict(saved[key])
        self.before, self.next_write = saved["seconds"], saved["seconds"] + self.next_write
        self.say(f"going on from step {saved['step']}")
        if self.rank == 0:                  # lines logged after the checkpoint will be logged again
            lines = [line for line in log.read_text().splitlines(True) if line.endswith("\n")]
            write_whole(log, "".join(line for line in lines if json.loads(line).get("step", 0) <= saved["step"]))
        return saved["step"]


def keeps(v):
    return f"keeps {100 * v:.2f}% (prunes {100 * (1 - v):.2f}%)"


def write_whole(path, write):
    """write, a text or a function of an open file, under a temporary name, synced and renamed: path never holds a part."""
    part = Path(f"{path}.part")
    try:
        with open(part, "wb") as f:
            f.write(write.encode()) if isinstance(write, str) else write(f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


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
    def copy(f):
        with urlopen(url, timeout=30) as reply:
            size, whole = int(reply.headers.get("Content-Length") or 0), b""
            with tqdm(total=size or None, unit="B", unit_scale=True, desc=path.name) as bar:
                while block := reply.read(1 << 20):
                    whole += block
                    bar.update(len(block))
        if size and len(whole) != size:
            raise OSError(f"cut off at {len(whole)} of {size} bytes")
        if check and check[1] != (hashlib.sha256(whole) if check[0] == "sha256" else hashlib.sha1(b"blob %d\0" % len(whole) + whole)).hexdigest():
            raise OSError(f"its {check[0]} is not {check[1]}")
        f.write(whole)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, copy)
    except (OSError, ValueError) as error:                          # no network, time-outs and HTTP's errors are all OSErrors
        raise Mistake(f"{url} could not be downloaded ({error}): put it at {path} yourself, or use --preset mini")


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
            archive, member = folder.parent / files.zip, f"{folder.name}/{path.name}"
            archive.exists() or download(GLUE_URL + files.zip, archive)
            unzip(archive, member, path)


def unzip(archive, member, path):
    """One member of a zip to path, whole or not at all; a zip with any member that points outside is refused."""
    try:
        with zipfile.ZipFile(archive) as z:
            if any(re.match(r"[/\\]|.*(^|[/\\])\.\.([/\\]|$)|.:", name) for name in z.namelist()):
                raise Mistake(f"{archive} has a member that points outside its folder: delete it, and put {path} there yourself")
            text = z.read(member)
    except (zipfile.BadZipFile, KeyError):
        raise Mistake(f"{archive} is no whole zip with {member} in it: delete it and try again, or put {path} there yourself")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, lambda f: f.write(text))


def read_text(path):
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise Mistake(f"{path} is not there: put it there, or give the folder of your data with --data")
    except (UnicodeDecodeError, OSError) as error:
        raise Mistake(f"{path} is no UTF-8 text file ({error}): give the data set's own file")
    if not text.strip() or "\0" in text:
        raise Mistake(f"{path} is {'binary' if text.strip() else 'empty'}: give the data set's own file")
    return text


def read_tsv(path, texts, label, labels):
    """([(text, text2 or None, label)], labels) of a TSV without quoting; a label is its place in labels, or a float if that is None.

    Some of GLUE's QQP rows are cut short: up to one row in a thousand is left out, with a word; more is a mistake."""
    lines, columns, first = [line.rstrip("\r") for line in read_text(path).rstrip("\r\n").split("\n")], [*texts, label], 0
    if isinstance(label, str):
        header, first = lines[0].split("\t"), 1
        columns = [c for c in columns if c != "text2" or c in header]
        for c in columns:
            if c not in header:
                raise Mistake(f"{path}, line 1: no column {c!r} in the header ({', '.join(header)[:150]}): name it, tab-separated")
        columns = [header.index(c) for c in columns]
    rows = [(n, line.split("\t")) for n, line in enumerate(lines[first:], first + 1)]
    short = [n for n, row in rows if len(row) <= max(columns)]
    if len(short) > len(rows) / 1000:
        raise Mistake(f"{path}, line {short[0]}: fewer columns than the {max(columns) + 1} needed: complete or delete the line")
    if short:
        print(f"{path}: left out {len(short)} rows that are cut short, the first in line {short[0]}")
    rows, result = [(n, [row[c] for c in columns]) for n, row in rows if len(row) > max(columns)], []
    labels = sorted({row[-1] for _, row in rows}) if labels == [] else labels
    if not rows or labels and len(labels) < 2:
        raise Mistake(f"{path} holds {'one class only' if rows else 'no rows under its header'}: give the data set's own file")
    for n, (*text, y) in rows:
        try:
            result.append((text[0], text[1] if len(text) > 1 else None, labels.index(y) if labels else float(y)))
        except ValueError:
            raise Mistake(f"{path}, line {n}: label {y!r} is not {'one of ' + ', '.join(labels) if labels else 'a number'}: correct it")
    return result, labels


def read_squad(path):
    """[(id, question, context, [(answer, its offset in context)])] of a SQuAD 1.1 file; each offset must hold its answer."""
    try:
        rows = [(q["id"], q["question"], p["context"], [(a["text"], a["answer_start"]) for a in q["answers"]])
                for article in json.loads(read_text(path))["data"] for p in article["paragraphs"] for q in p["qas"]]
        for q, _, context, answers in rows:
            if not answers:
                raise Mistake(f"{path}: question {q} has no answer, and in SQuAD 1.1 each has one: give a 1.1 file")
            for text, start in answers:
                if not text.strip() or start < 0 or context[start:start + len(text)] != text:
                    raise Mistake(f"{path}: question {q}: the context does not hold {text!r} at answer_start {start}: correct it")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Mistake(f"{path} is not in SQuAD 1.1's format ({type(error).__name__}: {error}): give the official file")
    if not rows:
        raise Mistake(f"{path} holds no questions: give the official file")
    return rows


# ---- the task: features, batches, evaluation

class Task:
    """A task's data. train and dev[name]: features, dicts of input_ids, token_type_ids, and labels or start_positions, end_positions."""
    def __init__(self, run):
        self.run, self.name, args, files = run, run.args.task, run.args, TASKS[run.args.task]
        self.squad, self.labels, folder, rows = self.name == "squad", files.labels, run.data / files.folder, {}
        if run.data == MINI and not folder.exists():
            raise Mistake(f"mini/ does not hold {self.name}: give --data DIR with {files.folder}/ in it, or --preset paper")
        if args.preset == "paper" and run.rank == 0:
            fetch(run.data, self.name)
        run.barrier()
        for name in ["train", *files.devs]:
            if self.squad:
                rows[name] = read_squad(folder / f"{name}-v1.1.json")
            else:
                rows[name], self.labels = read_tsv(folder / f"{name}.tsv", files.texts, files.label, self.labels)
        config, self.tokenizer = load_config(args.model)
        self.length = min(args.length, config.max_position_embeddings)
        self.dev = {name: self.windows(r) if self.squad else self.pairs(r) for name, r in rows.items()}
        self.rows, self.train, self.n_dev = rows, self.dev.pop("train"), sum(len(rows[name]) for name in files.devs)
        self.per_epoch = max(1, len(self.train) // args.batch_size)
        args.steps = args.steps or round(args.epochs * self.per_epoch)
        run.say(f"{len(self.train)} training {'windows' if self.squad else 'rows'}, {self.n_dev} dev rows | {args.steps} steps of "
                f"{args.batch_size} = {args.steps / self.per_epoch:.1f} epochs | lr {args.lr:g} | {args.model}")

    def pairs(self, rows):
        a, b, labels = zip(*rows)
        enc = self.tokenizer(list(a), None if b[0] is None else list(b), truncation=True, max_length=self.length, return_token_type_ids=True)
        return [dict(input_ids=i, token_type_ids=t, labels=y) for i, t, y in zip(enc["input_ids"], enc["token_type_ids"], labels)]

    def windows(self, rows):
        """[CLS] question (64 tokens at most) [SEP] context [SEP], in windows that start 128 tokens apart, as in BERT's own code.

        A window without the whole of the first answer points at [CLS]. Each feature also keeps row, its question's number, and spans:
        of each of its tokens the characters (from, to) in the context, None outside it."""
        encode = functools.partial(self.tokenizer, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        encode_context, features = functools.lru_cache(8)(encode), []       # the questions of a context follow each other
        cls, sep = self.tokenizer.cls_token_id, self.tokenizer.sep_token_id
        for n, ((_, _, context, answers), question) in enumerate(zip(rows, encode([row[1] for row in rows])["input_ids"])):
            ids, spans = (encode_context(context)[key] for key in ("input_ids", "offset_mapping"))
            first = bisect.bisect_right([s[1] for s in spans], answers[0][1])           # the answer's first token in the context,
            last = bisect.bisect_left([s[0] for s in spans], answers[0][1] + len(answers[0][0])) - 1                # and its last
            question = question[:min(64, self.length // 2)]
            head, room = len(question) + 2, self.length - len(question) - 3
            for at in range(0, max(1, len(ids)), min(128, room // 2)):
                piece, inside = ids[at:at + room], at <= first <= last < at + room
                features.append(dict(
                    input_ids=[cls, *question, sep, *piece, sep], token_type_ids=[0] * head + [1] * (len(piece) + 1),
                    start_positions=head + first - at if inside else 0, end_positions=head + last - at if inside else 0,
                    row=n, spans=[None] * head + spans[at:at + room] + [None]))
                if at + room >= len(ids):
                    break
        return features

    def collate(self, features, keys=("input_ids", "token_type_ids", "labels", "start_positions", "end_positions")):
        """Features to tensors on the device: input_ids, token_type_ids, attention_mask (batch, longest); labels or positions (batch,)."""
        batch = self.tokenizer.pad([{k: f[k] for k in keys if k in f} for f in features], return_tensors="pt")
        return {key: column.to(self.run.device) for key, column in batch.items()}

    @functools.lru_cache(maxsize=1)
    def epoch(self, number):
        """(steps, batch_size) of feature numbers: shuffled, then sorted by length in stretches of 50 batches, for less padding."""
        rng, size = np.random.default_rng([self.run.args.seed, number]), self.run.args.batch_size
        lengths, order = np.array([len(f["input_ids"]) for f in self.train]), rng.permutation(len(self.train))[:self.per_epoch * size]
        stretches = np.split(order, range(50 * size, len(order), 50 * size))
        order = np.concatenate([part[np.argsort(lengths[part], kind="stable")] for part in stretches])
        return rng.permutation(order.reshape(self.per_epoch, -1))

    def batch(self, step):
        """The batch of this step, a function of (seed, step) alone; each of N processes gets every N-th row."""
        rows = self.epoch(step // self.per_epoch)[step % self.per_epoch][self.run.rank::self.run.world]
        return self.collate([self.train[i] for i in rows])

    @torch.no_grad()
    def evaluate(self, model):
        """The task's metrics on its dev sets, in percent (Pearson, Spearman and Matthews times 100)."""
        model.eval()
        metrics = {}
        for name, features in self.dev.items():
            outputs, order = [None] * len(features), sorted(range(len(features)), key=lambda i: len(features[i]["input_ids"]))
            for at in tqdm(range(0, len(order), 64), desc=f"evaluating {name}", disable=None, leave=False):
                chosen = [features[i] for i in order[at:at + 64]]
                with self.run.autocast():
                    out = model(**self.collate(chosen, ("input_ids", "token_type_ids")))
                values = best_spans(out.start_logits, out.end_logits, chosen) if self.squad else out.logits.float().cpu().numpy()
                for i, value in zip(order[at:at + 64], values):
                    outputs[i] = value
            rows = self.rows[name]
            metrics.update(squad_metrics(rows, features, outputs) if self.squad else
                           glue_metrics(self.name, np.stack(outputs), np.array([row[2] for row in rows]), name))
        return metrics


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


# ---- text for pre-training

def read_corpus(path, tokenizer):
    """Text file (a sentence or paragraph a line, a blank line between documents) -> [document = [line = [token id]]].
    Raises ValueError, in one sentence, if the file holds no text."""
    try:
        with open(path, encoding="utf-8-sig") as f:
            lines = [line.strip() for line in f]
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not UTF-8 text: save it as UTF-8, one sentence or paragraph a line") from None
    ids = tokenizer(lines or [""], add_special_tokens=False, verbose=False)["input_ids"]
    documents = [[]]
    for line, tokens in zip(lines, ids):
        if not line:
            documents.append([])
        elif tokens:
            documents[-1].append(tokens)
    documents = [document for document in documents if document]
    if not documents:
        raise ValueError(f"{path} holds no text: put one sentence or paragraph a line, with a blank line between documents")
    return documents


def mlm_nsp_batch(documents, tokenizer, batch_size, length, rng):
    """One batch of BERT's own pre-training (arXiv 1810.04805, appendix A): masked words and next sentence.

    A and B are consecutive lines of one document; half of the time B comes from another document instead
    (always, where a document has one line only). 15 % of the tokens are to be predicted: 80 % of them become
    [MASK], 10 % a random token, 10 % stay. rng: np.random.Generator. Returns the keys of BertForPreTraining,
    each (batch_size, width <= length) but next_sentence_label (batch_size,): 0 = B follows A, 1 = random."""
    room = length - 3                                                    # [CLS] A [SEP] B [SEP]
    rows, is_random = [], np.zeros(batch_size, dtype=np.int64)
    for i in range(batch_size):
        home = int(rng.integers(len(documents)))
        document = documents[home]
        at = int(rng.integers(max(1, len(document) - 1)))                # a line that has a successor, if any has
        end, total = at, 0
        while end < len(document) and (total < room or end < at + 2):
            total += len(document[end])
            end += 1
        cut = int(rng.integers(at + 1, max(at + 2, end)))
        a = [t for line in document[at:cut] for t in line]
        if cut >= end or rng.random() < 0.5:
            is_random[i] = 1                                             # with one document only: another place in it
            document = documents[(home + int(rng.integers(1, max(2, len(documents))))) % len(documents)]
            cut = int(rng.integers(len(document)))
            end = len(document)
        b = []
        for line in document[cut:end]:
            b += line
            if len(b) >= room:
                break
        n = min(len(a), max(room - len(b), room // 2))                   # too long: the longer one gives way ...
        m = min(len(b), room - n)
        a = a[:n] if rng.random() < 0.5 else a[len(a) - n:]              # ... at its front or its back
        b = b[:m] if rng.random() < 0.5 else b[len(b) - m:]
        rows.append((a, b))

    width = max(len(a) + len(b) for a, b in rows) + 3
    ids = np.full((batch_size, width), tokenizer.pad_token_id, dtype=np.int64)
    types, attend = np.zeros_like(ids), np.zeros_like(ids)
    free = np.zeros(ids.shape, dtype=bool)                               # True: an ordinary token, may be predicted
    for i, (a, b) in enumerate(rows):
        n, m = len(a) + 2, len(a) + len(b) + 3
        ids[i, :m] = [tokenizer.cls_token_id, *a, tokenizer.sep_token_id, *b, tokenizer.sep_token_id]
        types[i, n:m], attend[i, :m], free[i, 1:m] = 1, 1, True
        free[i, [n - 1, m - 1]] = False

    rank = np.where(free, rng.random(ids.shape), 2.0).argsort(1).argsort(1)
    chosen = free & (rank < np.maximum(1, np.rint(0.15 * free.sum(1, keepdims=True))))
    labels = np.where(chosen, ids, -100)
    dice = rng.random(ids.shape)
    words = np.setdiff1d(np.arange(len(tokenizer)), tokenizer.all_special_ids)
    ids[chosen & (dice < 0.8)] = tokenizer.mask_token_id
    swap = chosen & (dice >= 0.9)
    ids[swap] = rng.choice(words, int(swap.sum()))
    batch = dict(input_ids=ids, token_type_ids=types, attention_mask=attend, labels=labels, next_sentence_label=is_random)
    return {name: torch.from_numpy(array) for name, array in batch.items()}


# ---- BERT

def load_config(name):
    """(config, tokenizer) of a BERT, a folder or a name on the hub."""
    with loading(name):
        config = AutoConfig.from_pretrained(name)
        if config.model_type != "bert":
            raise Mistake(f"--model {name} is a {config.model_type} model: give a BERT")
        return config, AutoTokenizer.from_pretrained(name)


@contextlib.contextmanager
def loading(name):
    """Whatever transformers raises for a model that is absent or broken becomes one sentence."""
    try:
        yield
    except Mistake:
        raise
    except Exception as error:              # json, safetensors, tokenizers, the hub and torch each have their own
        what = "cannot be read as a model folder" if Path(name).exists() else "is no folder here and could not be had from the hub"
        raise Mistake(f"{name} {what} ({type(error).__name__}: {str(error).strip().splitlines()[0][:150]}): give a folder with a BERT's "
                      "config.json, model.safetensors and tokenizer, or use --preset mini") from error


def load_bert(run, task, name=None, strict=False):
    """A BERT with the task's head, on the device, its embeddings frozen. strict: the head must be in the folder too (a teacher's)."""
    name, labels, new_head = name or run.args.model, task.labels, () if strict else ("classifier.", "qa_outputs.", "bert.pooler.")
    kind, options = AutoModelForQuestionAnswering, {}
    if not task.squad:
        kind, names = AutoModelForSequenceClassification, labels or ["score"]
        options = dict(id2label=dict(enumerate(names)), label2id={x: i for i, x in enumerate(names)}, problem_type=None if labels else "regression")
    with loading(name):
        model, info = kind.from_pretrained(name, dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True, **options)
    for key in sorted({*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])}):
        if not key.startswith(new_head) if new_head else True:
            raise Mistake(f"{name} has no {key} of the right shape: give {f'a model fine-tuned on {task.name}' if strict else 'a BERT'}")
    model.bert.embeddings.requires_grad_(False)         # as the movement paper does while it prunes; so do all six, the dense runs too
    return model.to(run.device).train()


def load_teacher(run, task):
    """The fine-tuned model in --teacher, frozen; None without the flag."""
    return load_bert(run, task, run.args.teacher, strict=True).eval().requires_grad_(False) if run.args.teacher else None


def prunable(model):
    """{name: Linear}: query, key, value, attention.output.dense, intermediate.dense and output.dense of every encoder layer."""
    return {name: m for name, m in model.named_modules() if isinstance(m, torch.nn.Linear) and ".encoder.layer." in name}


@torch.no_grad()
def kept(weights):
    """({name: share of the matrix that is not zero}, the share of all of them), as the forward pass sees them."""
    count = {name: (int(torch.count_nonzero(w)), w.numel()) for name, w in ((name, m.weight) for name, m in weights.items())}
    return {name: n / size for name, (n, size) in count.items()}, sum(n for n, _ in count.values()) / sum(s for _, s in count.values())


def lr_factor(step, steps, warmup):
    """Linear from 0 to 1 over the first warmup * steps steps, then linear to 0."""
    return min((step + 1) / max(1, warmup * steps), (steps - step) / max(1, steps - warmup * steps))


def task_loss(net, batch, teacher=None, T=2.0):
    """The task's loss; with a teacher 0.1 of it + 0.9 T^2 KL(teacher || student), for SQuAD the mean of start and end, for STS-B squares."""
    out = net(**batch)
    if teacher is None:
        return out.loss
    with torch.no_grad():
        target = teacher(**batch)
    pairs = [(out[key].float(), target[key].float()) for key in ("logits", "start_logits", "end_logits") if key in out]
    kl = [F.mse_loss(s, t) if s.shape[-1] == 1 else T * T * F.kl_div((s / T).log_softmax(-1), (t / T).softmax(-1), reduction="batchmean")
          for s, t in pairs]
    return 0.1 * out.loss + 0.9 * sum(kl) / len(kl)


# ---- the report

def report(run, task, model, goal):
    """Save the model, reload it, count its zeros, evaluate it, print RESULT. goal: the share to keep, or None. Returns the exit status."""
    if run.rank:
        return 0
    args = run.args
    model.save_pretrained(run.out)
    task.tokenizer.save_pretrained(run.out)
    saved = type(model).from_pretrained(run.out).to(run.device)
    (shares, share), metrics = kept(prunable(saved)), task.evaluate(saved)
    layers = [" ".join(f"{100 * s:7.2f}" for name, s in shares.items() if f".layer.{i}." in name) for i in range(saved.config.num_hidden_layers)]
    run.say("kept, %   query     key   value attn.out   inter  output")
    for i, row in enumerate(layers):
        run.say(f"layer {i:2d} {row} {'█' * round(np.mean([float(x) for x in row.split()]) * 0.4 + 0.49)}")
    missed = goal is not None and abs(share - goal) > (0.001 if goal >= 0.02 else 0.05 * goal)
    line = (f"RESULT {run.method} {task.name} {keeps(share)} {' '.join(f'{k} {v:.1f}' for k, v in metrics.items())} | {args.steps} steps "
            f"{run.seconds():.0f} s seed {args.seed} | {run.out}{f' | MISSED the goal of {100 * goal:.2f}%' if missed else ''}")
    result = dict(method=run.method, task=task.name, preset=args.preset, sparsity=goal, kept=share, kept_per_layer=shares, metrics=metrics,
                  seed=args.seed, steps=args.steps, seconds=run.seconds(), ms_per_step=run.ms_per_step(), n_train=len(task.train), n_dev=task.n_dev,
                  n_prunable=sum(m.weight.numel() for m in prunable(saved).values()), model=args.model, data=str(run.data), device=str(run.device),
                  versions=dict(python=platform.python_version(), torch=torch.__version__, transformers=transformers.__version__,
                                numpy=np.__version__), args=vars(args), line=line)
    write_whole(run.out / "result.json", json.dumps(result, indent=1) + "\n")
    (run.out / "checkpoint.pt").unlink(missing_ok=True)
    run.say(line)
    return 3 if missed else 0

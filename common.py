"""Data and BERT loading for the six scripts: what dense fine-tuning needs too. Of a method there is RPP's loading of pre-trained models alone.

In order: the run (preset, processes, seed, log, checkpoint) · the task (features, batches, evaluation) · BERT (load, prunable,
loss) · the report. Mistakes, flags and exit, files, metrics and text for pre-training are in tasks.py.
"""
import _thread, bisect, functools, json, math, os, platform, signal, sys, threading, time, warnings
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForQuestionAnswering, AutoModelForSequenceClassification, AutoTokenizer, BertForPreTraining

from tasks import (MINI, TASKS, Corpus, Mistake, Parser, PreTraining, best_spans, blame, demand, fetch, folder_whole, glue_metrics, launch,
                   lock, number, read_squad, read_tsv, squad_metrics, write_whole)

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()


# ---- the run: preset, device, processes, seed, log, checkpoint

def interrupt(number, frame):
    """Ctrl-C, but never within a __del__, where Python would print and drop it: then it comes a moment later."""
    while frame and frame.f_code.co_name != "__del__":
        frame = frame.f_back
    if frame is None:
        raise KeyboardInterrupt
    threading.Timer(0.01, _thread.interrupt_main).start()


class Run:
    """One run of one script, in all that is no part of the method. Raises Mistake.

    script: its __file__. args: its flags. hyper: {preset: {task or "*": {name: value}}}, for flags left at None and for constants."""
    def __init__(self, script, args, hyper):
        signal.signal(signal.SIGINT, interrupt) if threading.current_thread() is threading.main_thread() else None
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
        demand(args.batch_size % self.world == 0, f"--batch_size {args.batch_size} cannot be split over {self.world} processes: give a multiple")
        with blame(Exception, f"--device {args.device or 'cuda'} is not to be had ({{}}): give cpu or cuda{', or start fewer processes' * (self.world > 1)}"):
            self.device = torch.device(args.device or ("cuda" if cuda else "cpu"))
            if self.device.type == "cuda" and self.world > 1:
                self.device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
                torch.cuda.set_device(self.device)          # nccl's barriers too shall be on it
            torch.zeros(1, device=self.device).item()
        if self.world > 1:
            dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo")
        # bf16 where the hardware multiplies in it; but the mini preset on a CPU is fp32, alike on every machine
        self.bf16 = (torch.cuda.is_bf16_supported(including_emulation=False) if self.device.type == "cuda" else
                     args.preset == "paper" and getattr(torch.cpu, "_is_avx512_bf16_supported", bool)())
        free = next((f" if --{flag} finds so many" for flag in ("penalty", "gamma") if getattr(args, flag, None)), "")
        self.say(f"{self.method} {args.task}: {keeps(args.sparsity)} of the encoder's weights{free} | preset {args.preset} ({why}) | "
                 f"{self.device}{' bf16' * self.bf16}{f' x {self.world}' * (self.world > 1)} | seed {args.seed}")
        if 0.5 < args.sparsity < 1:
            self.say(f"--sparsity is the share KEPT: {args.sparsity:g} keeps {args.sparsity:.0%}; did you mean {1 - args.sparsity:g}?")
        self.check_out()
        self.before, self.started, self.next_log, self.phase, self.every, self.extra = 0.0, time.time(), 0.0, None, None, {}
        torch.manual_seed(args.seed % 2 ** 63)

    def check_out(self):
        """--out must be new, or a run of ours (log.jsonl, whose first line is its flags), on --resume one with these flags; writes nothing."""
        args, out, log = self.args, self.out, self.out / "log.jsonl"
        with blame(Exception, f"--out {out} cannot be used ({{}}): give a new folder, or one with a run of ours, that can be written"):
            str(out).encode()                       # safetensors writes to no name that is not UTF-8
            held = set(os.listdir(out) if out.exists() else []) - {"log.jsonl.part"}
            for flag in ("model", "teacher", "support"):
                same = getattr(args, flag, None) and Path(getattr(args, flag)).resolve() in (out.resolve(), out.resolve() / "support")
                demand(not same, f"--out {out} is the --{flag} folder and would overwrite it: give another")
            demand("log.jsonl" in held or not args.resume, f"--resume: {out} holds no run: give its --out, or leave --resume out")
            demand("log.jsonl" in held or not held, f"--out {out} holds files that are no run of ours: give a new folder")
            demand(os.access(next(p for p in (out, *out.absolute().parents) if p.exists()), os.W_OK), f"--out {out} may not be written: give another")
            ran = json.loads(log.read_text().partition("\n")[0])["args"].items() if "log.jsonl" in held else ()
            for key, was in ran if args.resume else ():
                same = key == "out" or was == self.flags.get(key)           # --out may be written in another way
                demand(same, f"--resume: {out} ran with --{key} {was}, not {self.flags.get(key)}: give the same flags")
            if args.resume and "result.json" in held:
                line = json.loads((out / "result.json").read_text())["line"]
                self.say(f"this run is finished:\n{line}")
                sys.exit(3 if "MISSED" in line else 0)
        self.barrier()

    def say(self, text):
        print(text, flush=True) if self.rank == 0 else None

    def barrier(self):
        dist.barrier() if self.world > 1 else None

    def seconds(self):
        return self.before + time.time() - self.started

    def ms_per_step(self):
        return 1000 * float(np.median(np.diff(self.ends)[-1000:])) if len(self.ends) > 1 else 0.0

    def seed_step(self, step):
        """Dropout depends on (seed, step, rank) alone: a resumed run draws what the run never stopped would have drawn."""
        torch.manual_seed(((self.args.seed * 1_000_003 + step) * self.world + self.rank) % 2 ** 63)

    def autocast(self):
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)

    def parallel(self, model):
        """The model to call in training: under torchrun, DistributedDataParallel's, which averages the gradients."""
        warnings.filterwarnings("ignore", ".*broadcast_buffers", FutureWarning)         # its new name is not known to torch 2.11
        return torch.nn.parallel.DistributedDataParallel(model, broadcast_buffers=False) if self.world > 1 else model

    def log(self, step, loss, penalty, kept, goal, lr):
        """One line every ten seconds and at the last step. kept: a function, called only for a line. goal: a share, or None."""
        self.ends.append(time.time())
        self.losses += [] if self.rank else [loss.detach()]             # of this process's part of the batch
        if self.rank or (self.seconds() < self.next_log and step < self.steps):
            return
        row = dict(phase=self.phase, step=step, loss=torch.stack(self.losses).float().mean().item(), penalty=float(torch.as_tensor(penalty).detach()),
                   kept=kept(), goal=goal, lr=lr, ms=self.ms_per_step(), seconds=self.seconds())
        left, self.losses, self.next_log = (self.steps - step) * row["ms"] / 1000, [], self.seconds() + 10
        self.say(f"step {step:05d}/{self.steps:05d}  loss {row['loss']:.4f}  penalty {row['penalty']:.4f}  kept {row['kept']:.2%} "
                 f"({'no goal' if goal is None else f'goal {goal:.2%}'})  lr {lr:.1e}  {row['ms']:.0f} ms  "
                 f"eta {f'{left / 60:.0f}m' if left > 90 else f'{left:.0f}s'}")
        with open(self.out / "log.jsonl", "a") as f:
            f.write(json.dumps(row) + "\n")
        demand(math.isfinite(row["loss"]), f"the loss is {row['loss']} at step {step}: give a smaller --lr")

    def checkpoint(self, step, **parts):
        """Write what a resumed run needs, at most once in 60 times what a write takes: under 2 % of the run."""
        if self.rank or self.seconds() < self.next_write or step == self.steps:
            return
        begun, parts = time.time(), {k: p if isinstance(p, dict) else p.state_dict() for k, p in parts.items()}
        write_whole(self.out / "checkpoint.pt", lambda f: torch.save(parts | dict(phase=self.phase, step=step, seconds=self.seconds()), f))
        took, told, self.every = time.time() - begun, self.every, max(2.0, 60 * (time.time() - begun))
        self.next_write = self.seconds() + self.every
        told or self.say(f"checkpoint at step {step}, written in {took:.2f} s; from now on one every {self.every:.0f} s: under 2 % of the time")

    def begin(self):
        """Make --out and log.jsonl, the first that a run writes, once every flag and file has been found good; on --resume nothing."""
        path = self.out / "checkpoint.pt"
        with blame(OSError, f"--out {self.out} cannot be written ({{}}): give another folder"):
            self.out.mkdir(parents=True, exist_ok=True)
            lock(self.out, f"--out {self.out} is in use by a run that has not ended: wait for its end, or give another")
            if self.args.resume and path.exists():
                return
            if self.args.resume or path.exists():
                self.say("this run was stopped before its first checkpoint: it starts again from step 0" if self.args.resume else
                         f"{self.out} holds an unfinished run: starting it anew (--resume would have gone on)")
            if not self.args.resume and (self.out / "result.json").exists():
                self.say(f"{self.out} holds a finished run: this one takes its place")
            for old in (path, self.out / "result.json"):
                old.unlink(missing_ok=True)
            self.args.resume or folder_whole(self.out / "support")      # rpp's; on --resume it is complete, and of these flags
            write_whole(self.out / "log.jsonl", json.dumps({"args": self.flags}) + "\n")

    def restore(self, phase="fine-tuning", steps=None, **parts):
        """Open --out and begin a phase of so many steps; on --resume load the phase's last checkpoint into parts, dicts or what has
        load_state_dict. Returns the steps already done."""
        path, log, first = self.out / "checkpoint.pt", self.out / "log.jsonl", self.phase is None
        if first and self.rank == 0:
            self.begin()
        self.phase, self.steps, self.ends, self.losses, launch.begun = phase, steps or self.args.steps, [time.time()], [], True
        self.barrier()                      # no process looks for the checkpoint before an old one is gone
        with blame(Exception, f"{path} or log.jsonl beside it cannot be read ({{}}): delete both, and start anew without --resume"):
            saved = torch.load(path, map_location=self.device, weights_only=True) if self.args.resume and path.exists() else {"phase": None}
            done = saved["step"] if saved["phase"] == phase else 0          # 0: no checkpoint, or that of an earlier phase, which is complete
            for key, part in parts.items() if done else ():
                part.update(saved[key]) if isinstance(part, dict) else part.load_state_dict(saved[key])
            text = log.read_text() if self.rank == 0 else ""
            rows = [(line, json.loads(line)) for line in text.splitlines(True) if line.endswith("\n")]      # the last may be torn
        self.before = saved.get("seconds", 0.0) if first else self.before
        self.say(f"going on from step {done}{f' of {phase}' if steps else ''}") if done else None
        if self.rank == 0:                  # lines logged after the checkpoint will be logged again
            write_whole(log, "".join(line for line, row in rows if row.get("phase") != phase or row["step"] <= done))
        # The first write should take no more than its 2 % either: with Adam's moments three times the parameters, at 400 MB a second.
        size = 3 * sum(p.nbytes for part in parts.values() if isinstance(part, torch.nn.Module) for p in part.parameters())
        self.next_write = self.seconds() + max(2.0, 60 * size / 400e6)
        return done


def keeps(v):
    return f"keeps {100 * v:.2f}% (prunes {100 * (1 - v):.2f}%)"


# ---- the task: features, batches, evaluation

class Task:
    """A task's data. train and dev[name]: features, dicts of input_ids, token_type_ids, and labels or start_positions, end_positions."""
    def __init__(self, run):
        self.run, self.name, args, files = run, run.args.task, run.args, TASKS[run.args.task]
        self.squad, self.labels, folder, rows = self.name == "squad", files.labels, run.data / files.folder, {}
        demand(run.data != MINI or folder.exists(), f"mini/ does not hold {self.name}: give --data DIR with {files.folder}/, or --preset paper")
        fetch(run.data, self.name) if args.preset == "paper" and run.rank == 0 else None
        run.barrier()
        for name in ["train", *files.devs]:
            if self.squad:
                rows[name] = read_squad(folder / f"{name}-v1.1.json")
            else:
                rows[name], self.labels = read_tsv(folder / f"{name}.tsv", files.texts, files.label, self.labels, run.say)
                demand((rows[name][0][1] is None) == (rows["train"][0][1] is None), f"{folder}: text2 must be in both {name}.tsv and train.tsv")
        config, self.tokenizer = load_config(args.model)
        self.positions, self.vocab_size = config.max_position_embeddings, config.vocab_size
        self.length = min(args.length, self.positions)
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
            outputs, order = {}, sorted(range(len(features)), key=lambda i: len(features[i]["input_ids"]))
            for at in tqdm(range(0, len(order), 64), desc=f"evaluating {name}", disable=None, leave=False):
                chosen = [features[i] for i in order[at:at + 64]]
                with self.run.autocast():
                    out = model(**self.collate(chosen, ("input_ids", "token_type_ids")))
                values = best_spans(out.start_logits, out.end_logits, chosen) if self.squad else out.logits.float().cpu().numpy()
                outputs.update(zip(order[at:at + 64], values))
            rows, outputs = self.rows[name], [outputs[i] for i in range(len(features))]
            metrics |= squad_metrics(rows, features, outputs) if self.squad else glue_metrics(
                self.name, np.stack(outputs), np.array([row[2] for row in rows]), name)
        return metrics


# ---- BERT

def load_config(name):
    """(config, tokenizer) of a BERT, a folder or a name on the hub."""
    with loading(name):
        config = AutoConfig.from_pretrained(name)
        demand(config.model_type == "bert", f"--model {name} is a {config.model_type} model: give a BERT")
        tokenizer = AutoTokenizer.from_pretrained(name)             # an empty one, where its files are missing
        demand(10 < len(tokenizer) <= config.vocab_size, f"{name} has a tokenizer of {len(tokenizer)} words for a vocabulary of {config.vocab_size}: "
               "give a folder with its own tokenizer.json or vocab.txt")
        return config, tokenizer


def loading(name):
    """Whatever transformers raises for a model that is absent or broken (json, safetensors, tokenizers, hub, torch: each its own)."""
    what = "cannot be read as a model folder" if Path(name).exists() else "is no folder here and could not be had from the hub"
    return blame(Exception, f"{name} {what} ({{}}): give a folder with a BERT's config.json, weights and tokenizer, or use --preset mini")


def load_bert(run, task, name=None):
    """A BERT with the task's head, on the device, its embeddings frozen. name: a teacher's folder, which must hold that head too."""
    kind, options, heads = AutoModelForQuestionAnswering, {"num_labels": 2}, ("classifier.", "qa_outputs.", "bert.pooler.")
    if not task.squad:
        kind, labels = AutoModelForSequenceClassification, dict(enumerate(task.labels or ["score"]))
        options = dict(id2label=labels, label2id={x: i for i, x in labels.items()}, problem_type=None if task.labels else "regression")
    with loading(name or run.args.model):
        config = AutoConfig.from_pretrained(name or run.args.model)         # a folder of ours names its task; labels may be in another order
        taught, theirs = getattr(config, "finetuning_task", None) or task.name, [str(config.id2label[i]).lower() for i in sorted(config.id2label)]
        ours = [label.lower() for label in task.labels or []]
        same = taught.lower().removeprefix("glue:").replace("-", "") == task.name                # as others may write it: sst-2, glue:sst2
        demand(not name or same, f"--teacher {name} was fine-tuned on {taught}, not on {task.name}: give one of this task")
        demand(not name or sorted(theirs) != sorted(ours) or theirs == ours, f"--teacher {name} has its labels in the order "
               f"{', '.join(theirs)}, not {', '.join(ours)}: give one with this order")
        demand(not name or config.vocab_size == task.vocab_size and config.max_position_embeddings >= task.length,
               f"--teacher {name} has {config.vocab_size} words and {config.max_position_embeddings} positions, --model {run.args.model} has "
               f"{task.vocab_size} and texts of {task.length} tokens: give a teacher that reads the same")
        model, info = kind.from_pretrained(name or run.args.model, dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True, **options)
    lacking = sorted(k for k in {*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])} if name or not k.startswith(heads))
    demand(not lacking, f"{name or run.args.model} has no {(lacking or [''])[0]} that fits: give a {f'model fine-tuned on {task.name}' if name else 'BERT'}")
    model.config.finetuning_task = task.name
    model.bert.embeddings.requires_grad_(False)         # as the movement paper does while it prunes; so do all six, the dense runs too
    return model.to(run.device).train()


def load_pretraining(run, name):
    """A BERT with its pre-training heads, MLM's and NSP's, on the device, and the names of what its folder lacks and so is new: heads, pooler."""
    with loading(name):
        model, info = BertForPreTraining.from_pretrained(name, dtype=torch.float32, output_loading_info=True)
    demand(all(k.startswith(("cls.", "bert.pooler.")) for k in info["missing_keys"]), f"{name} lacks some of a BERT's weights: give one that has all")
    return model.to(run.device).train(), info["missing_keys"]


def load_teacher(run, task):
    """The fine-tuned model in --teacher, frozen; None without the flag."""
    return load_bert(run, task, run.args.teacher).eval().requires_grad_(False) if run.args.teacher else None


def prunable(model):
    """{name: Linear}: query, key, value, attention.output.dense, intermediate.dense and output.dense of every encoder layer."""
    return {name: m for name, m in model.named_modules() if isinstance(m, torch.nn.Linear) and ".encoder.layer." in name}


@torch.no_grad()
def kept(weights):
    """({name: share of the matrix that is not zero}, the share of all of them), as the forward pass sees them."""
    count = {name: (int(torch.count_nonzero(w)), w.numel()) for name, w in ((name, m.weight) for name, m in weights.items())}
    return {name: n / size for name, (n, size) in count.items()}, sum(n for n, _ in count.values()) / sum(s for _, s in count.values())


def lr_factor(step, steps, warmup, end=0.0):
    """Linear from 0 to 1 over the first warmup * steps steps, then linear to end, a share of the peak."""
    return min(1.0, (step + 1) / max(1, warmup * steps), end + (1 - end) * (steps - step) / max(1, steps - warmup * steps))


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
    model.save_pretrained(run.out)
    task.tokenizer.save_pretrained(run.out)
    args, saved = run.args, type(model).from_pretrained(run.out).to(run.device)
    (shares, share), metrics = kept(prunable(saved)), task.evaluate(saved)
    run.say("kept, %   query     key   value attn.out   inter  output")
    for i in range(saved.config.num_hidden_layers):
        row = [100 * s for name, s in shares.items() if f".layer.{i}." in name]
        run.say(f"layer {i:2d} {' '.join(f'{x:7.2f}' for x in row)} {'█' * math.ceil(0.4 * np.mean(row))}")
    missed = goal is not None and abs(share - goal) > (0.001 if goal >= 0.02 else 0.05 * goal)
    line = (f"RESULT {run.method} {task.name} {keeps(share)} {' '.join(f'{k} {v:.1f}' for k, v in metrics.items())} | {args.steps} steps "
            f"{run.seconds():.0f} s seed {args.seed} | {run.out}{f' | MISSED the goal of {100 * goal:.2f}%' if missed else ''}")
    result = dict(method=run.method, task=task.name, preset=args.preset, sparsity=goal, kept=share, kept_per_layer=shares, metrics=metrics,
                  seed=args.seed, steps=args.steps, seconds=run.seconds(), ms_per_step=run.ms_per_step(), n_train=len(task.train),
                  n_dev=task.n_dev, n_prunable=sum(m.weight.numel() for m in prunable(saved).values()), model=args.model, data=str(run.data),
                  device=str(run.device), threads=torch.get_num_threads(), args=vars(args), line=line, versions=dict(
                      python=platform.python_version(), torch=torch.__version__, transformers=transformers.__version__, numpy=np.__version__), **run.extra)
    write_whole(run.out / "result.json", json.dumps(result, indent=1) + "\n")
    for old in ("checkpoint.pt", "checkpoint.pt.part"):         # .part: of a run killed while it wrote
        (run.out / old).unlink(missing_ok=True)
    run.say(line)
    return 3 if missed else 0

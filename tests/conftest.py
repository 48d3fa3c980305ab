"""What several test files use: the scripts run in a worker, in a fork or in a process of their own, on a few questions of mini/."""
import collections
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
SHORT = ["--steps", "12", "--batch_size", "8"]
# no network, and none by accident either: a proxy that nobody answers; one script as good as another, so no CUDA
ENV = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "TOKENIZERS_PARALLELISM": "false",
       **{f"{kind}_proxy": "http://127.0.0.1:9" for kind in ("http", "https")}}
Ended = collections.namedtuple("Ended", "code out err")


class OnGPU(torch.Tensor):
    """A CPU tensor that says it is on a GPU: what is written for one runs here, on torch's own operations."""
    device = property(lambda self: torch.device("cuda"))


# ---- running

DRIVER = r'''
import json, os, resource, runpy, sys, traceback
import common

checkpoint, answers = common.Run.checkpoint, os.fdopen(os.dup(1), "w")


def interrupted(at):                                    # write one checkpoint two steps before, then Ctrl-C
    def patched(self, step, **parts):
        self.next_write = 0.0 if step == at - 2 else float("inf")
        checkpoint(self, step, **parts)
        if step == at:
            raise KeyboardInterrupt
    return patched


for line in sys.stdin:
    ask = json.loads(line)
    os.chdir(ask["cwd"])
    sys.argv = [ask["script"], *ask["flags"]]
    held = os.dup(1), os.dup(2)
    for fd, path in ((1, ask["out"]), (2, ask["err"])):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), fd)
    common.Run.checkpoint = interrupted(ask["interrupt"]) if ask["interrupt"] else checkpoint
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (ask["largest"] or limits[0], limits[1]))
    try:
        runpy.run_path(ask["script"], run_name="__main__")
        code = 0
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        traceback.print_exc()
        code = 1
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    sys.stdout.flush(), sys.stderr.flush()
    os.dup2(held[0], 1), os.dup2(held[1], 2), os.close(held[0]), os.close(held[1])
    print(code, file=answers, flush=True)
'''


@pytest.fixture(scope="session")
def call(tmp_path_factory):
    """call(script, *flags, cwd, interrupt=step, largest=bytes a file may have) -> Ended, in the worker."""
    folder = tmp_path_factory.mktemp("worker")
    worker = subprocess.Popen([sys.executable, "-c", DRIVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=ENV)

    def ask(script, *flags, cwd, interrupt=None, largest=None):
        out, err = folder / "out", folder / "err"
        print(json.dumps(dict(script=str(ROOT / f"{script}.py"), flags=[str(f) for f in flags], cwd=str(cwd), out=str(out), err=str(err),
                              interrupt=interrupt, largest=largest)), file=worker.stdin, flush=True)
        answer = worker.stdout.readline()
        assert answer, f"the worker died in {script} {flags}"
        return Ended(int(answer), out.read_text(), err.read_text())
    yield ask
    worker.stdin.close()
    worker.wait(timeout=60)


# Forks a fresh process for each run, so that it may be killed. It starts no threads of its own: the children inherit none that are gone.
# every: a checkpoint at each step. cut: [a file's name, n]: at the n-th sync of that file it is cut in half and the process killed; for
# model.safetensors, which transformers writes, when it has been written. fail: [name, n, errno]: there the system says no. when, after,
# signal: so many seconds after the text has been printed the process gets the signal. ascii: its terminal has no other characters. patch:
# Python to run first. world: 1, or 2 processes as torchrun would start them; the second's output goes to files of its own.
FORKER = r'''
import json, os, runpy, signal, socket, sys, time, traceback
import torch
import transformers.models.bert.modeling_bert
import common

common.load_config(str(common.MINI / "bert"))           # what transformers imports late is imported
checkpoint, fsync, save, written = common.Run.checkpoint, os.fsync, transformers.PreTrainedModel.save_pretrained, []


def child(ask, rank):
    def every_step(self, step, **parts):
        self.next_write = 0.0
        checkpoint(self, step, **parts)

    def die(fd):
        os.ftruncate(fd, os.fstat(fd).st_size // 2)
        os.kill(os.getpid(), signal.SIGKILL)

    def synced(fd):
        name = os.path.basename(os.readlink(f"/proc/self/fd/{fd}"))
        written.append(name)
        for what in ("cut", "fail"):
            if ask[what] and name.startswith(ask[what][0]) and sum(w.startswith(ask[what][0]) for w in written) == ask[what][1]:
                if what == "cut":
                    die(fd)
                raise OSError(ask["fail"][2], os.strerror(ask["fail"][2]), name)
        fsync(fd)

    def saved(self, folder, **more):
        save(self, folder, **more)
        if ask["cut"] and ask["cut"][0] == "model.safetensors":
            die(os.open(os.path.join(folder, "model.safetensors"), os.O_RDWR))

    signal.alarm(60)                                    # no run of these tests takes so long
    signal.signal(signal.SIGINT, signal.default_int_handler)        # which a shell's background jobs do without
    os.chdir(ask["cwd"])
    for fd, path in ((1, ask["out"]), (2, ask["err"])):
        os.dup2(os.open(path + "1" * rank, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), fd)
    if ask["world"] > 1:                                    # as torchrun does it
        torch.set_num_threads(1)
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ask["world"]), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(ask["port"]))
    exec(ask["patch"], {})
    os.fsync, transformers.PreTrainedModel.save_pretrained = synced, saved
    if ask["ascii"]:
        sys.stdout.reconfigure(encoding="ascii", errors="strict")
    if ask["every"]:
        common.Run.checkpoint = every_step
    sys.argv = [ask["script"], *ask["flags"]]
    runpy.run_path(ask["script"], run_name="__main__")


answers = os.fdopen(os.dup(1), "w")
for line in sys.stdin:
    ask = json.loads(line)
    open(ask["out"], "w").close()
    with socket.create_server(("127.0.0.1", 0)) as free:
        ask["port"] = free.getsockname()[1]
    pids = []
    for rank in range(ask["world"]):
        pids.append(os.fork())
        if pids[-1]:
            continue
        code = 1
        try:
            child(ask, rank)
            code = 0
        except SystemExit as end:
            code = end.code or 0
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)
    pid, ended, begun = pids[0], (0, 0), None
    while ask["signal"] and not ended[0]:
        if begun is None and ask["when"] in open(ask["out"]).read():
            begun = time.time()
        if begun is not None and time.time() - begun >= ask["after"]:
            os.kill(pid, ask["signal"])
            ask["after"] += 5                           # again, if Python lost it: an interrupt within a __del__ is ignored
        time.sleep(0.005)
        ended = os.waitpid(pid, os.WNOHANG)
    status = ended[1] if ended[0] else os.waitpid(pid, 0)[1]
    print(*(os.waitstatus_to_exitcode(s) for s in [status, *(os.waitpid(pid, 0)[1] for pid in pids[1:])]), file=answers, flush=True)
'''


@pytest.fixture(scope="session")
def fork(tmp_path_factory):
    """fork(script, *flags, cwd, every, ...) -> Ended, of a process of its own, or with world=2 [Ended, Ended]: see FORKER."""
    folder = tmp_path_factory.mktemp("forks")
    forker = subprocess.Popen([sys.executable, "-c", FORKER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=ENV)

    def ask(script, *flags, cwd, every=False, cut=None, fail=None, when="", after=0.0, signal=0, ascii=False, patch="", world=1):
        out, err = folder / "out", folder / "err"
        print(json.dumps(dict(script=str(ROOT / f"{script}.py"), flags=[str(f) for f in flags], cwd=str(cwd), out=str(out), err=str(err),
                              every=every, cut=cut, fail=fail, when=when, after=after, signal=signal, ascii=ascii, patch=patch, world=world)),
              file=forker.stdin, flush=True)
        answer = forker.stdout.readline()
        assert answer, f"the forker died in {script} {flags}"
        both = [Ended(int(code), Path(f"{out}{rank}").read_text(), Path(f"{err}{rank}").read_text()) for code, rank in zip(answer.split(), ("", "1"))]
        return both if world > 1 else both[0]
    yield ask
    forker.stdin.close()
    forker.wait(timeout=60)


def spawn(*command, cwd, timeout=120):
    """A process of its own -> Ended."""
    run = subprocess.run([sys.executable, *map(str, command)], cwd=cwd, env=ENV, text=True, capture_output=True, timeout=timeout)
    return Ended(run.returncode, run.stdout, run.stderr)


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """A folder with the first 200 training and 60 dev rows of each of mini/'s tasks; SQuAD's of contexts that fit one window."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "squad").mkdir()
    for name, most in (("train", 200), ("dev", 60)):
        paragraphs, n = [], 0
        for article in json.loads((ROOT / f"mini/squad/{name}-v1.1.json").read_text())["data"]:
            for p in article["paragraphs"]:
                if len(p["context"]) <= 320 and n < most:
                    paragraphs.append(p)
                    n += len(p["qas"])
        (folder / f"squad/{name}-v1.1.json").write_text(json.dumps({"version": "1.1", "data": [{"title": "", "paragraphs": paragraphs}]}))
    for task, files in (("MNLI", ("train", "dev_matched", "dev_mismatched")), ("QQP", ("train", "dev"))):
        (folder / "glue" / task).mkdir(parents=True)
        for name in files:
            lines = (ROOT / f"mini/glue/{task}/{name}.tsv").read_text().splitlines(True)
            (folder / f"glue/{task}/{name}.tsv").write_text("".join(lines[:201 if name == "train" else 61]))
    (folder / "corpus.txt").write_text("\n\n".join((ROOT / "mini/corpus.txt").read_text().split("\n\n")[:300]) + "\n")       # rpp's
    return folder


def a_bert(folder, kind="BertForPreTraining", **changes):
    """A new BERT of mini's words, one layer of 32, in folder: a run on it takes a quarter of a second. changes: of mini's config."""
    import common                                       # which silences transformers
    import torch
    import transformers
    torch.manual_seed(0)
    tiny = dict(num_hidden_layers=1, hidden_size=32, num_attention_heads=2, intermediate_size=64)
    config = json.loads((ROOT / "mini/bert/config.json").read_text()) | tiny | changes
    getattr(transformers, kind)(transformers.BertConfig.from_dict(config)).save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(common.MINI / "bert").save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    return a_bert(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def dropout(tmp_path_factory):
    """mini/bert with dropout, which its own config has not: only with it do a step's random numbers show in the weights."""
    folder = shutil.copytree(ROOT / "mini/bert", tmp_path_factory.mktemp("models") / "dropout")
    config = json.loads((folder / "config.json").read_text())
    assert config["hidden_dropout_prob"] == config["attention_probs_dropout_prob"] == 0
    (folder / "config.json").write_text(json.dumps(config | {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}))
    return folder


@pytest.fixture(scope="session")
def trained(call, data, tmp_path_factory):
    """trained(script, task, V, *flags) -> (Ended, its folder): each asked for is run once."""
    done, cwd = {}, tmp_path_factory.mktemp("runs")

    def train(script, task, v, *flags):
        key = (script, task, v, *flags)
        if key not in done:
            out = cwd / f"{len(done)}"
            done[key] = call(script, "--task", task, "--sparsity", v, "--data", data, "--out", out, *SHORT, *flags, cwd=cwd), out
        return done[key]
    return train

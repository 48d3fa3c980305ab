"""What several test files use: a few rows of mini/ as data, and scripts run on them."""
import importlib
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
METHODS = ["magnitude", "mvp", "soft_mvp", "l0", "mgpp", "rpp"]
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"             # before torch is imported


def load(path):
    """A Python file that stands in no package, as a module."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def first_questions(path, count):
    squad = json.loads(path.read_text())
    squad["data"] = squad["data"][:count]
    return json.dumps(squad)


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """A folder of data: a few articles of mini's SQuAD, a few rows of its MNLI, a small TSV."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "squad").mkdir()
    for name, count in (("train", 30), ("dev", 4)):
        path = ROOT / "mini" / "squad" / f"{name}-v1.1.json"
        (folder / "squad" / path.name).write_text(first_questions(path, count))
    (folder / "glue" / "MNLI").mkdir(parents=True)
    for name in ("train", "dev_matched", "dev_mismatched"):
        lines = (ROOT / "mini" / "glue" / "MNLI" / f"{name}.tsv").read_text().split("\n")
        (folder / "glue" / "MNLI" / f"{name}.tsv").write_text("\n".join(lines[:65]) + "\n")
    (folder / "tsv").mkdir()
    rows = ["text\tlabel"]
    rows += [f"he stole {n} drums\t{'few' if n < 20 else 'many'}" for n in range(40)]
    for name in ("train", "dev"):
        (folder / "tsv" / f"{name}.tsv").write_text("\n".join(rows) + "\n")
    corpus = (ROOT / "mini" / "corpus.txt").read_text().split("\n\n")
    (folder / "corpus.txt").write_text("\n\n".join(corpus[:100]))
    return folder


def arguments(data, out, *flags):
    words = ["--preset", "mini", "--device", "cpu", "--data", data, "--out", out]
    words += ["--steps", "8", "--batch_size", "8", *flags]
    if "--task" not in flags:
        words += ["--task", "squad"]
    if "--pretrain_steps" in flags:
        words += ["--corpus", data / "corpus.txt"]
    return [str(word) for word in words]


def run(method, data, out, *flags):
    """Run a script in this process. Returns its result.json."""
    script = importlib.import_module(method)
    script.main(script.flags().parse_args(arguments(data, out, *flags)))
    return json.loads((out / "result.json").read_text())


def start(words, **more):
    """Run a command in a process of its own, to its end. One that stands still is a failure."""
    return subprocess.run([str(word) for word in words], cwd=ROOT, capture_output=True, text=True,
                          timeout=300, **more)


def start_script(method, data, out, *flags):
    return start([sys.executable, f"{method}.py", *arguments(data, out, *flags)])

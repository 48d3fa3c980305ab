"""README: every command in a code block is run, in their order and for a few steps; every number that other files hold is theirs.

pip and pytest themselves are for .ci/run."""
import argparse
import contextlib
import importlib
import io
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import BertConfig, BertForPreTraining

from conftest import ENV, ROOT, SHORT, Ended

sys.path.insert(0, str(ROOT / "results"))
import grid                                             # noqa: E402

README = ROOT / "README.md"
SET_UP = ["pip install -r requirements.txt && python soft_mvp.py --task squad --sparsity 0.03", "pip install -r requirements.txt && pytest"]


def blocks(text):
    """[(line number, line)] of the code blocks: fenced by ``` or ~~~, or indented by four spaces after a blank line."""
    found, fence, indented, before = [], None, False, ""
    for n, line in enumerate(text.splitlines(), 1):
        mark = re.match(r" {0,3}(```+|~~~+)", line)
        if fence:
            if mark and line.strip().startswith(fence) and not line.strip().strip("`~"):
                fence = None
            else:
                found.append((n, line))
        elif mark:
            fence = mark.group(1)
        else:
            indented = line.startswith("    ") and (indented or not before.strip()) or indented and not line.strip()
            if indented and line.strip():
                found.append((n, line[4:]))
        before = line
    return found


def commands(text):
    """[(line number, [words])]: lines joined at a trailing backslash, split at && and ;, without prompt, comment and VARIABLE=value."""
    found, held, start = [], "", 0
    for n, line in blocks(text):
        start = start if held else n
        held += line
        if held.endswith("\\"):
            held = held[:-1] + " "
            continue
        line, held = re.sub(r"^\s*\$ ", "", held), ""
        try:
            lexer = shlex.shlex(line, posix=True, punctuation_chars="&;|")
            lexer.whitespace_split = True
            words = list(lexer)
        except ValueError:                              # an apostrophe in printed output: no command
            continue
        piece = []
        for word in [*words, "&&"]:
            if re.fullmatch(r"[&;|]+", word):
                while piece and re.fullmatch(r"[A-Z_]+=.*", piece[0]):
                    piece.pop(0)
                if piece:
                    found.append((start, piece))
                piece = []
            else:
                piece.append(word)
    return found


def mistake(words):
    """What is wrong with a command, or None. Only what starts with python, torchrun, pip or pytest is looked at."""
    program, *rest = words
    if program == "pip":
        files = [rest[i + 1] for i, word in enumerate(rest[:-1]) if word == "-r"]
        return next((f"{f} is not here" for f in files if not (ROOT / f).exists()), None)
    if program == "pytest":
        return next((f"{f} is not here" for f in rest if not f.startswith("-") and not (ROOT / f.split("::")[0]).exists()), None)
    if not re.fullmatch(r"python3?|torchrun", program) or rest[:1] == ["-c"]:
        return None
    at = next((i for i, word in enumerate(rest) if word.endswith(".py")), None)
    if at is None:
        return None if rest[:1] == ["-m"] else "no script in it"
    script, flags = rest[at], rest[at + 1:]
    if not (ROOT / script).exists():
        return f"{script} is not here"
    sys.path.insert(0, str((ROOT / script).parent))
    error = io.StringIO()
    try:
        with contextlib.redirect_stderr(error), contextlib.redirect_stdout(io.StringIO()):
            importlib.import_module(Path(script).stem).flags().parse_args(flags)
    except SystemExit as end:
        return None if end.code == 0 else error.getvalue().strip()
    finally:
        sys.path.pop(0)
    return None


def inline(text):
    """[[words]] of the commands within sentences, `python ...`, lines joined; SCRIPT and V stand for any script and share."""
    text = "\n".join("" if n in {n for n, _ in blocks(text)} else line for n, line in enumerate(text.splitlines(), 1))
    return [[{"SCRIPT": "magnitude.py", "V": "0.1"}.get(word, word) for word in shlex.split(found)]
            for found in re.findall(r"`((?:[A-Z_]+=\S+ )?python [^`]+)`", text)]


def test_the_reading_of_blocks():
    text = ("Text `python none.py`:\n\n```sh\n$ OMP_NUM_THREADS=1 python a.py --x 1 && pytest   # why\npython b.py \\\n  --y \"2 3\"\n```\npython c.py\n\n"
            "    pip install -r r.txt; python d.py\n    it's output\n\n- a list\n    python e.py\n")
    assert commands(text) == [(4, ["python", "a.py", "--x", "1"]), (4, ["pytest"]), (5, ["python", "b.py", "--y", "2 3"]),
                              (10, ["pip", "install", "-r", "r.txt"]), (10, ["python", "d.py"])]


@pytest.mark.parametrize("command, wrong", [
    ("python soft_mvp.py --task squad --sparsity 0.03", None), ("torchrun --standalone --nproc_per_node=2 mvp.py --task mnli", None),
    ("python mvp.py --help", None), ("python missing.py --task squad", "missing.py is not here"), ("python mvp.py --task squat", "squat"),
    ("python mvp.py --sparsity 3", "--sparsity"), ("python magnitude.py --score_lr 1e-2", "--score_lr"), ("torchrun x", "no script"),
    ("torchrun --standalone mvp.py --spars 0.1", "--spars"), ("pip install -r requirement.txt", "requirement.txt is not here"),
    ("python figures/draw.py --only score", None), ("python results/grid.py sst3", "sst3"), ("python tests/bench.py --shaped mini", "--shaped"),
    ("pytest tests/test_none.py", "not here"), ("pytest tests/test_readme.py -q", None)])
def test_the_judging_of_commands(command, wrong):
    found = mistake(shlex.split(command))
    assert found is None if wrong is None else found and wrong in found


def test_every_command_parses():
    found = commands(README.read_text(encoding="utf-8"))
    wrong = [f"README.md, line {n}: {shlex.join(words)}: {mistake(words)}" for n, words in found if mistake(words)]
    wrong += [f"README.md: {shlex.join(words)}: {mistake(words)}" for words in inline(README.read_text(encoding="utf-8")) if mistake(words)]
    assert wrong == [], "\n".join(wrong)
    shown = {words[1] for _, words in found if words[0] == "python" and len(words) > 1}
    assert {"magnitude.py", "mvp.py", "soft_mvp.py"} <= shown, f"README shows no command of {sorted({'magnitude.py', 'mvp.py', 'soft_mvp.py'} - shown)}"


@pytest.fixture(scope="module")
def stand_ins(data, tmp_path_factory):
    """What README's capitals stand for: DIR, the few questions of conftest.py with a sst2 and a tsv; FOLDER, a BERT of one layer that
    takes 512 tokens, as --preset paper wants it; FILE, a text."""
    base = tmp_path_factory.mktemp("readme")
    shutil.copytree(data, base / "data")
    rows = [("what a fine drum", 1), ("a broken drum", 0)] * 20
    for folder, head in (("glue/SST-2", "sentence\tlabel"), ("tsv", "text\tlabel")):
        (base / "data" / folder).mkdir(parents=True)
        for part in ("train", "dev"):
            (base / f"data/{folder}/{part}.tsv").write_text("\n".join([head, *(f"{text}\t{label}" for text, label in rows)]) + "\n")
    shutil.copytree(ROOT / "mini/bert", base / "bert")
    known = json.loads((base / "bert/config.json").read_text())
    small = dict(vocab_size=known["vocab_size"], hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
    BertForPreTraining(BertConfig(**small)).save_pretrained(base / "bert")
    return {"DIR": base / "data", "FOLDER": base / "bert", "FILE": base / "data/corpus.txt", "cuda": "cpu"}


def shortened(words, stand_ins):
    """The words for a few steps, on what stands in; so does it for what a preset would take from mini/ or load down."""
    flags = [str(stand_ins.get(word, word)) for word in words]
    flags += [] if "--data" in flags else ["--data", str(stand_ins["DIR"])]
    flags += ["--model", str(stand_ins["FOLDER"])] if "paper" in flags and "--model" not in flags else []
    return [*flags, *SHORT]


def test_every_command_runs(call, stand_ins, tmp_path):
    """All but torchrun's, in README's order, for one may need what another left. What the last one counts is what the first one kept."""
    ran, kept = [], None
    for n, (program, *rest) in commands(README.read_text(encoding="utf-8")):
        if program == "diff":
            assert subprocess.run(["diff", *rest], cwd=ROOT, capture_output=True).returncode == 1, f"README.md, line {n}"
        elif program == "python" and rest[0] == "-c":
            ended = subprocess.run([sys.executable, *rest], cwd=tmp_path, env=ENV, text=True, capture_output=True)
            kept = float(ended.stdout)
        elif program == "python":
            ended = call(rest[0][:-3], *shortened(rest[1:], stand_ins), cwd=tmp_path)
            assert ended.code == 0 and ended.out.splitlines()[-1].startswith(f"RESULT {rest[0][:-3]} "), f"README.md, line {n}: {ended}"
            ran.append(rest[0])
    assert len(ran) >= 8 and {"soft_mvp.py", "mvp.py", "magnitude.py", "rpp.py"} <= {*ran} and round(kept, 4) == 0.03


def test_every_torchrun_runs(stand_ins, tmp_path):
    """On two processes: of one machine, and one of each of two, which start together and both end well; rank 0 alone reports."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    seen = [words for _, words in commands(README.read_text(encoding="utf-8")) if words[0] == "torchrun"]
    alone, several = [words for words in seen if "--standalone" in words], [words for words in seen if "--standalone" not in words]
    assert len(alone) == 1 and [next(w for w in words if "node_rank" in w)[-1] for words in several] == ["0", "1"]
    for machines in (alone, several):
        started = []
        for words in machines:
            script = next(i for i, word in enumerate(words) if word.endswith(".py"))
            own = [re.sub("master_addr=.*", "master_addr=127.0.0.1", re.sub("master_port=.*", f"master_port={port}", word)) for word in words[1:script]]
            own = [re.sub("nproc_per_node=.*", f"nproc_per_node={2 // len(machines)}", word) for word in own]
            line = [sys.executable, "-m", "torch.distributed.run", *own, ROOT / words[script], *shortened(words[script + 1:], stand_ins)]
            started.append(subprocess.Popen(line, cwd=tmp_path, env=ENV, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True))
        try:
            said = [process.communicate(timeout=200) for process in started]
        finally:                                        # torchrun's children too
            for process in started:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
        ended = [Ended(process.returncode, *texts) for process, texts in zip(started, said)]
        assert [e.code for e in ended] == [0] * len(machines) and "Traceback" not in "".join(e.err for e in ended), ended
        assert [e.out.count("RESULT") for e in ended] == [1, 0][:len(machines)] and re.search("cpu.* x 2 ", ended[0].out), ended


def test_the_ladders_numbers():
    """The table of scripts: the lines of each, and how many of them diff prints from the neighbour that is named there."""
    rows = re.findall(r"^\| `(\w+)\.py` \|.*\| (\d+) \| (?:`(\w+)\.py`)? ?\| (\d*) ?\|$", README.read_text(encoding="utf-8"), flags=re.M)
    assert [row[0] for row in rows] == ["magnitude", "mvp", "soft_mvp", "l0", "mgpp", "rpp"]
    for script, lines, neighbour, changed in rows:
        assert int(lines) == len((ROOT / f"{script}.py").read_text(encoding="utf-8").splitlines()), script
        if neighbour:
            printed = subprocess.run(["diff", f"{neighbour}.py", f"{script}.py"], cwd=ROOT, capture_output=True, text=True).stdout
            assert int(changed) == sum(line[:1] in "<>" for line in printed.splitlines()), f"diff {neighbour}.py {script}.py"


def results(name):
    """[{column: text}] of results/NAME.tsv."""
    head, *rows = [line.split("\t") for line in (ROOT / f"results/{name}.tsv").read_text().splitlines()]
    return [dict(zip(head, row)) for row in rows]


def scores(name, method, task, v, metric):
    """Of each seed."""
    rows = [r for r in results(name) if (r["method"], r["task"], r["sparsity"]) == (method, task, v)]
    return [float(dict(zip(r["scores"].split()[::2], r["scores"].split()[1::2]))[metric]) for r in rows]


def test_the_ladders_scores():
    """The same table's F1, the means over results/embedded.tsv of squad at 3 %, and seconds, those of results/default.tsv."""
    shown = re.findall(r"^\| `(\w+)\.py` \|(?:[^|]*\|){2} ([\d.]+) \| (\d+) \|", README.read_text(encoding="utf-8"), flags=re.M)
    assert [row[0] for row in shown] == ["magnitude", "mvp", "soft_mvp", "l0", "mgpp", "rpp"]
    for script, f1, seconds in shown:
        exact = scores("embedded", script, "squad", "0.03", "F1")
        assert exact and f1 == f"{sum(exact) / len(exact):.1f}", script
        assert [seconds] == [r["seconds"] for r in results("default") if r["method"] == script], script


@pytest.mark.parametrize("script", ["magnitude", "mvp", "soft_mvp", "l0", "mgpp", "rpp"])
def test_the_docstrings_scores(script):
    """Of each script's Result: seed by seed, the embedded squad's F1 and SST-2's accuracy, at the shares that it names."""
    said, seen = " ".join(importlib.import_module(script).__doc__.split("\nIdea")[0].split()), []
    for label, name, task, metric in (("Embedded squad, F1", "embedded", "squad", "F1"), ("SST-2 with a 6-layer MiniLM, accuracy", "sst2", "sst2", "acc")):
        for share, numbers in re.findall(r"([\d.]+) % ([\d., ]+)", said.partition(f"{label}: ")[2].partition("(")[0]):
            assert numbers.strip().split(", ") == [f"{x:.1f}" for x in scores(name, script, task, f"{float(share) / 100:g}", metric)], (label, share)
            seen.append((task, share))
    assert seen[:2] == [("squad", "3.00"), ("squad", "10.00")] and (script == "rpp" or seen[2:] == [("sst2", "3.00"), ("sst2", "10.00")]), seen


@pytest.mark.parametrize("name", ["embedded", "sst2"])
def test_the_tables_are_those_of_the_results(name):
    lines = README.read_text(encoding="utf-8").splitlines()
    table = (ROOT / f"results/{name}.md").read_text().splitlines()
    assert len(table) > 3 and table == lines[lines.index(table[0]):][:len(table)]


@pytest.mark.parametrize("name", ["embedded", "sst2", "default"])
def test_the_tables_are_those_of_the_runs(name, tmp_path):
    """results/NAME.md is what grid.py makes of results/NAME.tsv when no run's folder is there."""
    shutil.copy(ROOT / f"results/{name}.tsv", tmp_path)
    grid.write(argparse.Namespace(grid=name, model=None, data=None, corpus=None, runs=str(tmp_path / "none"), results=str(tmp_path)))
    for kind in ("tsv", "md"):
        assert (tmp_path / f"{name}.{kind}").read_text() == (ROOT / f"results/{name}.{kind}").read_text()


def test_the_shares_of_the_dense_score():
    """Ours are means over the results' seeds by those of the dense runs, the papers' the numbers of README's own table of them."""
    text, six = README.read_text(encoding="utf-8"), ["magnitude", "mvp", "soft_mvp", "l0", "mgpp", "rpp"]
    cells = lambda start: [c.strip() for c in next(line for line in text.splitlines() if line.startswith(f"| {start} |")).split("|")[2:-1]]
    assert cells("of the dense score, %") == six and cells("the papers, BERT-base, SQuAD F1")[:6] == ["dense", *six[:4], "rpp"]
    for v in ("0.1", "0.03"):
        for label, name, task, metric in (("embedded squad, F1", "embedded", "squad", "F1"), ("SST-2, accuracy", "sst2", "sst2", "acc")):
            dense, *ours = (scores(name, *of, metric) for of in [("magnitude", task, "1"), *((m, task, v) for m in six)])
            assert all(len(x) == len(dense) == 3 for x in ours)
            assert cells(f"{label}, {100 * float(v):g} %") == [f"{100 * sum(x) / sum(dense):.0f}" for x in ours]
        dense, *theirs = cells(f"{100 * float(v):g} %")
        assert cells(f"the papers, SQuAD F1, {100 * float(v):g} %") == [x and f"{100 * float(x) / float(dense):.0f}" for x in [*theirs[:4], "", theirs[4]]]


def test_it_opens_with_the_set_up():
    """Both set-up commands of CONTRACT.md, to the letter, in a code block within the first 40 lines."""
    opening = [line.strip().removeprefix("$ ").split("#")[0].strip() for n, line in blocks(README.read_text(encoding="utf-8")) if n <= 40]
    for command in SET_UP:
        assert command in opening, f"{command!r} is not among {opening}"


def test_requirements_are_pinned():
    lines = [line.split("#")[0].strip() for line in (ROOT / "requirements.txt").read_text().splitlines()]
    lines = [line for line in lines if line]
    assert "torch==2.13.0" in lines
    assert all(re.fullmatch(r"[\w-]+==[\w.]+", line) for line in lines), lines
    assert {line.split("==")[0] for line in lines} == {"torch", "numpy", "transformers", "pytest"}

"""Every script, run as a user runs it, on a few questions of mini/: what it prints, what it leaves, how it stops and goes on, what it
says to a mistake. Expected values come from plain transformers, safetensors and numpy, and from CONTRACT's wording.

Most runs go through a worker, one Python process that runs script after script as __main__ and so starts torch once; those that are
about processes (killed ones, torchrun, the same bytes from another process) start their own.
"""
import argparse
import contextlib
import fcntl
import importlib
import json
import math
import os
import pickle
import random
import re
import shutil
import signal
import string
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import transformers
from torch.nn.utils import parametrize
from torch.optim.optimizer import register_optimizer_step_pre_hook

import common
from conftest import ENV, ROOT, SHORT, a_bert, spawn

SCRIPTS = [name for name in ("magnitude", "mvp", "soft_mvp", "l0", "rpp", "mgpp") if (ROOT / f"{name}.py").exists()]
MODULES = {name: importlib.import_module(name) for name in SCRIPTS}
SIX = ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense", "intermediate.dense", "output.dense")


def has(script, flag):
    return flag in MODULES[script].flags()._option_string_actions


def tree(folder):
    """{path: bytes} of all files under a folder."""
    return {str(f.relative_to(folder)): f.read_bytes() for f in Path(folder).rglob("*") if f.is_file()}


def weights_of(folder):
    """{name: array} of the prunable matrices in a saved model, by BERT's own names: six a layer, found with no code of ours."""
    saved = safetensors.torch.load_file(Path(folder) / "model.safetensors")
    layers = json.loads((Path(folder) / "config.json").read_text())["num_hidden_layers"]
    return {f"bert.encoder.layer.{i}.{name}": saved[f"bert.encoder.layer.{i}.{name}.weight"].numpy() for i in range(layers) for name in SIX}


def logged(folder):
    """{phase: [steps]} of log.jsonl; all scripts have the phase fine-tuning, rpp has one before it."""
    rows = [row for row in map(json.loads, (Path(folder) / "log.jsonl").read_text().splitlines()) if "step" in row]
    return {phase: [row["step"] for row in rows if row["phase"] == phase] for phase in sorted({row["phase"] for row in rows})}


def main(script, *flags):
    """main() of a script in this process, on the mini preset, in 2 steps of 4 unless flags say otherwise -> its exit status."""
    start = ["--preset", "mini", "--device", "cpu", "--steps", "2", "--batch_size", "4"]
    return MODULES[script].main(MODULES[script].flags().parse_args([*start, *map(str, flags)]))


def nonzero(folder):
    weights = weights_of(folder)
    return sum(int((w != 0).sum()) for w in weights.values()), sum(w.size for w in weights.values())


def same_bytes(a, b):
    return (Path(a) / "model.safetensors").read_bytes() == (Path(b) / "model.safetensors").read_bytes()


def one_sentence(ended):
    """A mistake's answer: exit 2 and one line on stderr that is no traceback and says more than a word or two."""
    assert ended.code == 2, ended
    assert ended.err.count("\n") == 1 and ended.err.endswith("\n"), ended.err
    assert "Traceback" not in ended.err + ended.out and len(ended.err.split()) >= 6, ended.err
    assert re.match(r"\w+\.py: \S", ended.err), ended.err
    return ended.err


# ---- flags and presets

OWN = {"magnitude": {"--scope"}, "mvp": {"--scope", "--score_lr"}, "soft_mvp": {"--score_lr", "--penalty"}, "l0": {"--score_lr", "--penalty"},
       "mgpp": {"--mix", "--spike", "--slab", "--interval"}, "rpp": {"--corpus", "--pretrain_steps", "--gamma", "--rounds", "--nip", "--support"}}


def test_six_scripts_and_their_flags():
    """What the tests below go by: a script or a flag under another name would lose its tests without a word."""
    common_to_all = "-h --help --task --sparsity --preset --model --data --teacher --out --resume --seed --steps --batch_size --lr --device"
    assert {s: set(MODULES[s].flags()._option_string_actions) - set(common_to_all.split()) for s in SCRIPTS} == OWN
    assert all(has(s, flag) for s in SCRIPTS for flag in common_to_all.split())


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_says_what_is_kept_and_what_pruned(script):
    parser = MODULES[script].flags()
    told = re.search(r" --sparsity V (.*?) --preset ", " ".join(parser.format_help().partition("options:")[2].split()))[1]
    assert "KEPT" in told and "keeps 3.00 %" in told and "prunes 97.00 %" in told and parser.get_default("sparsity") == 0.03


@pytest.mark.parametrize("cuda, asked, preset, why", [(True, None, "paper", "CUDA is here"), (False, None, "mini", "no CUDA here"),
                                                      (True, "mini", "mini", "as asked"), (False, "paper", "paper", "as asked")])
def test_default_preset(tmp_path, monkeypatch, capsys, cuda, asked, preset, why):
    """paper where CUDA is, else mini; the first line says which and why, and the values are that preset's."""
    class Enough(Exception):
        pass

    def stop(run):
        raise Enough
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(common, "Task", stop)
    args = MODULES["magnitude"].flags().parse_args(["--device", "cpu", *["--preset", asked] * bool(asked)])
    with pytest.raises(Enough):
        MODULES["magnitude"].main(args)
    first, *more = capsys.readouterr().out.splitlines()
    assert f"| preset {preset} ({why}) | cpu" in first and "keeps 3.00% (prunes 97.00%)" in first and more == []
    assert (args.preset, args.lr, getattr(args, "epochs", None)) == {"paper": ("paper", 3e-5, 10), "mini": ("mini", 5e-4, None)}[preset]
    assert args.model == ("bert-base-uncased" if preset == "paper" else str(ROOT / "mini/bert")) and not list(tmp_path.iterdir())


# ---- what a run prints and leaves

CASES = [(script, *case) for script in SCRIPTS for case in (("squad", 0.03), ("squad", 0.1), ("mnli", 0.1), ("qqp", 0.03))]
METRICS = {"squad": ["EM", "F1"], "mnli": ["acc", "acc_mm"], "qqp": ["acc", "F1"]}
RESULT = re.compile(r"RESULT (\w+) (\w+) keeps (\d+\.\d\d)% \(prunes (\d+\.\d\d)%\)((?: \w+ -?\d+\.\d)+) \| (\d+) steps (\d+) s seed (\d+) \| (.+)")
LOG = re.compile(r"step \d{5,}/\d{5,}  loss \d+\.\d{4}  penalty -?\d+\.\d{4}  "
                 r"kept \d+\.\d+% \((?:no goal|goal \d+\.\d+%)\)  lr \d\.\de[+-]\d\d  \d+ ms  eta \d+[sm]")


@pytest.mark.parametrize("script, task, v", CASES)
def test_what_a_run_prints(trained, script, task, v):
    ended, out = trained(script, task, v)
    assert ended.code == 0 and ended.err == "", ended
    lines = ended.out.splitlines()
    both = f"keeps {100 * v:.2f}% (prunes {100 - 100 * v:.2f}%)"
    assert script in lines[0] and task in lines[0] and both in lines[0] and "preset mini" in lines[0]
    result = json.loads((out / "result.json").read_text())
    found = RESULT.fullmatch(lines[-1])
    assert found and sum(line.startswith("RESULT") for line in lines) == 1, lines[-1]
    method, name, kept, prunes, metrics, steps, seconds, seed, folder = found.groups()
    assert (method, name, steps, seed, folder) == (script, task, "12", "0", str(out))
    assert kept == f"{100 * result['kept']:.2f}" and abs(float(kept) + float(prunes) - 100) < 0.011
    assert dict(zip(metrics.split()[::2], metrics.split()[1::2])) == {k: f"{x:.1f}" for k, x in result["metrics"].items()}
    assert abs(float(seconds) - result["seconds"]) <= 1
    log = [line for line in lines if line.startswith("step ")]
    assert len(log) >= 2 and all(LOG.fullmatch(line) for line in log), log
    assert log[-1].startswith("step 00012/00012") and sum(line.startswith("layer ") for line in lines) == len(weights_of(out)) / 6


@pytest.mark.parametrize("script, task, v", CASES)
def test_kept_is_what_the_saved_file_holds(trained, script, task, v):
    _, out = trained(script, task, v)
    result = json.loads((out / "result.json").read_text())
    left, n = nonzero(out)
    assert result["n_prunable"] == n and result["kept"] == left / n and result["sparsity"] == v
    assert abs(left / n - v) <= (0.001 if v >= 0.02 else 0.05 * v)
    each = {name: float((w != 0).mean()) for name, w in weights_of(out).items()}
    assert result["kept_per_layer"].keys() == each.keys() and len(each) == 24
    assert all(abs(result["kept_per_layer"][name] - each[name]) < 1e-12 for name in each)


@pytest.mark.parametrize("script, task, v", CASES)
def test_result_and_log_files(trained, script, task, v):
    _, out = trained(script, task, v)
    result = json.loads((out / "result.json").read_text())
    keys = "method task preset sparsity kept kept_per_layer metrics seed steps seconds ms_per_step n_train n_dev n_prunable model data device versions args"
    assert set(keys.split()) <= result.keys()
    assert (result["method"], result["task"], result["preset"], result["seed"], result["steps"], result["device"]) == (script, task, "mini", 0, 12, "cpu")
    assert list(result["metrics"]) == METRICS[task] and all(0 <= x <= 100 for x in result["metrics"].values())
    assert result["n_train"] >= 200 and result["n_dev"] == {"squad": 60, "mnli": 120, "qqp": 60}[task]
    assert result["ms_per_step"] > 0 and result["seconds"] > 0 and {"torch", "transformers"} <= result["versions"].keys()
    assert result["args"]["sparsity"] == v and result["args"]["batch_size"] == 8 and result["args"]["lr"] > 0
    assert list(logged(out)) == ["fine-tuning", "pre-training"][:2 if script == "rpp" else 1]
    assert all(steps[0] >= 1 and steps[-1] == 12 and steps == sorted(set(steps)) for steps in logged(out).values())
    files = {f.name for f in out.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "result.json", "log.jsonl"} <= files
    assert not [f for f in files if f.endswith((".part", ".tmp", ".pt"))], files


# ---- GLUE's other tasks

# each as GLUE's own file has it: header (CoLA has none), row n of twenty; metrics by CONTRACT; classes in GLUE's order, or one number
GLUE = {
    "cola": ("CoLA", "", lambda n: f"gj04\t{n % 2}\t{'' if n % 2 else '*'}\tThe cat sat on {n} mats.", ["mcc"], ["0", "1"]),
    "sst2": ("SST-2", "sentence\tlabel", lambda n: f"a film of {n} charms \t{n % 2}", ["acc"], ["0", "1"]),
    "mrpc": ("MRPC", "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String",
             lambda n: f"{n % 2}\t{n}\t{n + 50}\tHe said \"{n}.\tShe heard {n}.\r", ["acc", "F1"], ["0", "1"]),
    "stsb": ("STS-B", "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore",
             lambda n: f"{n}\tmain-captions\tMSRvid\t2012test\t{n}\tnone\tnone\tA plane {n}.\tA bird.\t{n / 4:.3f}", ["pearson", "spearman"], None),
    "qnli": ("QNLI", "index\tquestion\tsentence\tlabel",
             lambda n: f"{n}\tWho was {n}?\tIt was {n + n % 2}.\t{'not_' * (n % 2)}entailment", ["acc"], ["entailment", "not_entailment"]),
    "rte": ("RTE", "index\tsentence1\tsentence2\tlabel",
            lambda n: f"{n}\tNo {n}.\tYes.\t{'not_' * (n % 3 > 0)}entailment", ["acc"], ["entailment", "not_entailment"]),
}


@pytest.fixture(scope="session")
def glue(tmp_path_factory):
    """A folder with twenty rows of training and of dev data for each of these tasks."""
    folder = tmp_path_factory.mktemp("twenty")
    for name, head, row, _, _ in GLUE.values():
        (folder / "glue" / name).mkdir(parents=True)
        for file, at in (("train", 0), ("dev", 7)):
            (folder / f"glue/{name}/{file}.tsv").write_text("\n".join([*[head] * bool(head), *map(row, range(at, at + 20)), ""]))
    return folder


@pytest.mark.parametrize("task", GLUE)
def test_a_task_of_glue(call, glue, tiny, tmp_path, task):
    """From GLUE's own files to a saved model that plain transformers opens, with the task's classes or, for STS-B, one number to regress."""
    *_, metrics, labels = GLUE[task]
    ended = call("magnitude", "--task", task, "--data", glue, "--model", tiny, "--out", "o", "--steps", 3, "--batch_size", 4, cwd=tmp_path)
    assert (ended.code, ended.err) == (0, ""), ended
    result = json.loads((tmp_path / "o/result.json").read_text())
    assert (result["n_train"], result["n_dev"]) == (20, 20) and list(result["metrics"]) == metrics and all(abs(x) <= 100 for x in result["metrics"].values())
    assert RESULT.fullmatch(ended.out.splitlines()[-1])[5].split()[::2] == metrics
    opened = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "o")
    assert opened.config.num_labels == opened.classifier.out_features == len(labels or [1])
    assert (opened.config.problem_type == "regression") == (task == "stsb")
    assert task == "stsb" or opened.config.id2label == dict(enumerate(labels))


# ---- the saved model, in plain transformers

def plain(text):
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return [w for w in text.split() if w not in ("a", "an", "the")]


def em_f1(answer, golds):
    em = f1 = 0.0
    for gold in golds:
        a, g = plain(answer), plain(gold)
        common_words = sum(min(a.count(w), g.count(w)) for w in set(a))
        em = max(em, float(a == g))
        f1 = max(f1, 2 * common_words / (len(a) + len(g)) if common_words else 0.0)
    return em, f1


def squad_by_hand(folder, data):
    """EM and F1 of a saved folder by plain transformers and a loop over all spans, one question at a time."""
    model = transformers.AutoModelForQuestionAnswering.from_pretrained(folder).eval()
    tokenizer, scores = transformers.AutoTokenizer.from_pretrained(folder), []
    for p in json.loads((data / "squad/dev-v1.1.json").read_text())["data"][0]["paragraphs"]:
        for q in p["qas"]:
            enc = tokenizer(q["question"], p["context"], return_offsets_mapping=True, return_tensors="pt")
            offsets, inside = enc.pop("offset_mapping")[0].tolist(), [s == 1 for s in enc.sequence_ids()]
            assert len(inside) <= 128
            with torch.no_grad():
                out = model(**enc)
            start, end, best = out.start_logits[0].tolist(), out.end_logits[0].tolist(), (-math.inf, 0, 0)
            for i in range(len(inside)):
                for j in range(i, min(i + 30, len(inside))):
                    if inside[i] and inside[j] and start[i] + end[j] > best[0]:
                        best = (start[i] + end[j], i, j)
            scores.append(em_f1(p["context"][offsets[best[1]][0]:offsets[best[2]][1]], [a["text"] for a in q["answers"]]))
    return dict(zip(("EM", "F1"), 100 * np.mean(scores, axis=0)))


def glue_by_hand(folder, data, task):
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer, metrics = transformers.AutoTokenizer.from_pretrained(folder), {}
    files, a, b, y = {"mnli": (["MNLI/dev_matched", "MNLI/dev_mismatched"], "sentence1", "sentence2", "gold_label"),
                      "qqp": (["QQP/dev"], "question1", "question2", "is_duplicate")}[task]
    for file, key in zip(files, ("acc", "acc_mm")):
        head, *rows = [line.split("\t") for line in (data / f"glue/{file}.tsv").read_text().splitlines()]
        guess, gold = [], [row[head.index(y)] for row in rows]
        for row in rows:
            with torch.no_grad():
                logits = model(**tokenizer(row[head.index(a)], row[head.index(b)], return_tensors="pt")).logits[0]
            guess.append(model.config.id2label[int(logits.argmax())])
        metrics[key] = 100 * np.mean([g == t for g, t in zip(guess, gold)])
        if task == "qqp":
            hits = sum(g == t == "1" for g, t in zip(guess, gold))
            metrics["F1"] = 100 * 2 * hits / max(1, guess.count("1") + gold.count("1"))
    return metrics


@pytest.mark.parametrize("script, task, v", [c for c in CASES if c[2] == 0.1 or c[1] == "qqp"])
def test_metrics_are_those_of_the_saved_model(trained, data, script, task, v):
    _, out = trained(script, task, v)
    reported = json.loads((out / "result.json").read_text())["metrics"]
    found = squad_by_hand(out, data) if task == "squad" else glue_by_hand(out, data, task)
    assert reported.keys() == found.keys() and all(abs(reported[k] - found[k]) < 1e-6 for k in found), (reported, found)


@pytest.mark.parametrize("script, task", [(script, task) for script in SCRIPTS for task in ("squad", "mnli")])
def test_saved_model_is_the_masked_model_that_was_trained(script, task, data, tmp_path, monkeypatch, capsys):
    """The logits just before the masks are baked in, the model with its W * M, and those of the folder opened by plain transformers."""
    module, seen, load, report, remove = MODULES[script], {}, common.load_bert, common.report, parametrize.remove_parametrizations

    def load_bert(*args, **more):
        model = load(*args, **more)
        return seen.setdefault("model", model) if "model" not in seen else model

    def logits(model):
        ids = torch.randint(5, 1000, (6, 40), generator=torch.Generator().manual_seed(1))
        training, _ = model.training, model.eval()
        with torch.no_grad():
            out = model(input_ids=ids)
        model.train(training)
        return torch.cat([out[k].flatten() for k in ("logits", "start_logits", "end_logits") if k in out])

    def look():
        if "logits" not in seen:
            seen["logits"] = logits(seen["model"])
            seen["W * M"] = {name: (m.parametrizations.weight.original * m.parametrizations.weight[0].mask).detach().clone()
                             for name, m in seen["model"].named_modules() if hasattr(m, "parametrizations")
                             and hasattr(m.parametrizations.weight[0], "mask")}
    monkeypatch.setattr(common, "load_bert", load_bert)
    monkeypatch.setattr(parametrize, "remove_parametrizations", lambda *args, **more: (look(), remove(*args, **more))[1])
    monkeypatch.setattr(common, "report", lambda *args: (look(), report(*args))[1])
    args = module.flags().parse_args(["--task", task, "--sparsity", "0.1", "--data", str(data), "--out", str(tmp_path / "o"), "--device", "cpu",
                                      "--preset", "mini", *SHORT])
    assert module.main(args) == 0
    auto = transformers.AutoModelForQuestionAnswering if task == "squad" else transformers.AutoModelForSequenceClassification
    opened = auto.from_pretrained(tmp_path / "o").eval()
    assert torch.equal(logits(opened), seen["logits"]) and seen["logits"].std() > 0
    saved = weights_of(tmp_path / "o")
    if script in ("magnitude", "mvp", "soft_mvp"):
        assert len(seen["W * M"]) == len(saved) == 24
    for name, w in seen["W * M"].items():
        assert np.array_equal(saved[name], w.numpy()), name
    assert not hasattr(opened.bert.encoder.layer[0].output.dense, "parametrizations")


@pytest.mark.parametrize("says", ["0", "1"])
def test_the_report_is_of_the_file_that_was_saved(data, tiny, tmp_path, monkeypatch, capsys, says):
    """A matrix is zeroed and the head made to say one class always, in the file alone, as it is written: what is kept, the metrics and the
    exit status are the file's, not those of the model in memory."""
    save = transformers.PreTrainedModel.save_pretrained

    def altered(self, folder, **more):
        save(self, folder, **more)
        tensors = safetensors.torch.load_file(Path(folder) / "model.safetensors")
        for name, value in (("bert.encoder.layer.0.intermediate.dense.weight", 0.0), ("classifier.weight", 0.0),
                            ("classifier.bias", torch.tensor([0.0, 1.0] if says == "1" else [1.0, 0.0]))):
            tensors[name][:] = value
        safetensors.torch.save_file(tensors, Path(folder) / "model.safetensors", metadata={"format": "pt"})
    monkeypatch.setattr(transformers.PreTrainedModel, "save_pretrained", altered)
    assert main("magnitude", "--task", "qqp", "--data", data, "--model", tiny, "--out", tmp_path / "o", "--sparsity", 0.1) == 3
    result, each = json.loads((tmp_path / "o/result.json").read_text()), {n: float((w != 0).mean()) for n, w in weights_of(tmp_path / "o").items()}
    assert result["kept_per_layer"] == pytest.approx(each, abs=1e-12) and [n for n in each if each[n] == 0] == ["bert.encoder.layer.0.intermediate.dense"]
    assert result["kept"] == (4 * 102 + 205) / 8192 and "keeps 7.48% (prunes 92.52%)" in result["line"] and "MISSED" in result["line"]
    gold = [line.split("\t")[-1] for line in (data / "glue/QQP/dev.tsv").read_text().splitlines()[1:]]
    right, ones = gold.count(says), gold.count("1") * (says == "1")                     # F1 = 2 tp / (guessed + there)
    assert 0 < right < 60 and result["metrics"] == pytest.approx({"acc": 100 * right / 60, "F1": 200 * ones / (60 + ones)})


# ---- how much is kept, where, and when

@pytest.mark.parametrize("script", SCRIPTS)
def test_v_of_one_is_dense(trained, script):
    ended, out = trained(script, "squad", 1)
    left, n = nonzero(out)
    assert ended.code == 0 and left == n and "keeps 100.00% (prunes 0.00%)" in ended.out.splitlines()[-1]
    if script != "mgpp":                                                            # dense fine-tuning is one thing: no scores, gates, pre-training
        assert same_bytes(out, trained("magnitude", "squad", 1)[1])


def test_v_of_one_of_mgpp_is_dense_without_clipping(trained, data, tiny, tmp_path, monkeypatch, capsys):
    """Its paper clips nothing: that apart it too is magnitude.py's dense run."""
    flags = ["--data", data, "--model", tiny, "--sparsity", 1, "--steps", 4]
    assert main("mgpp", *flags, "--out", tmp_path / "mgpp") == main("magnitude", *flags, "--out", tmp_path / "clipped") == 0
    monkeypatch.setitem(MODULES["magnitude"].HYPER["mini"]["*"], "clip", math.inf)
    assert main("magnitude", *flags, "--out", tmp_path / "not clipped") == 0
    assert same_bytes(tmp_path / "mgpp", tmp_path / "not clipped") and not same_bytes(tmp_path / "mgpp", tmp_path / "clipped")


@pytest.mark.parametrize("script", SCRIPTS)
def test_embeddings_are_frozen(trained, script):
    """In the saved file they are what the run began with, byte for byte: mini's, and rpp's after its pre-training, where they learn."""
    out = trained(script, "squad", 0.1)[1]
    before, after = (safetensors.torch.load_file(Path(f) / "model.safetensors") for f in (out / "support" if script == "rpp" else ROOT / "mini/bert", out))
    frozen = [name for name in before if name.startswith("bert.embeddings.")]
    assert len(frozen) == 5 and all(before[name].numpy().tobytes() == after[name].numpy().tobytes() for name in frozen)
    bias = "bert.encoder.layer.0.output.LayerNorm.bias"
    assert not torch.equal(before[bias], after[bias])


@pytest.mark.parametrize("v, kept, code", [(0.1, 0.1012, 3), (0.1, 0.0988, 3), (0.1, 0.1008, 0), (0.1, 0.0992, 0),
                                           (0.01, 0.0106, 3), (0.01, 0.0094, 3), (0.01, 0.0104, 0), (0.01, 0.0096, 0)])
def test_a_goal_that_is_missed(call, data, tiny, tmp_path, monkeypatch, capsys, v, kept, code):
    """By more than 0.1 point, or for V below 2 % by more than 5 % of V: the last line says so and the status is 3, also when --resume tells
    it once more; the model is saved all the same. --scope global, so that 24 roundings do not add up."""
    module, flags = MODULES["magnitude"], ["--data", data, "--model", tiny, "--out", tmp_path / "o", "--sparsity", v, "--scope", "global",
                                           "--preset", "mini", "--device", "cpu", "--steps", 2, "--batch_size", 4]
    update = module.update_masks
    monkeypatch.setattr(module, "update_masks", lambda masked, scores, share, scope: update(masked, scores, kept if share == v else share, scope))
    with pytest.raises(SystemExit) as end:
        common.launch(module.main, module.flags().parse_args([*map(str, flags)]))
    lines, result = capsys.readouterr().out.splitlines(), json.loads((tmp_path / "o/result.json").read_text())
    assert end.value.code == code and nonzero(tmp_path / "o") == (round(kept * 8192), 8192) and result["kept"] == round(kept * 8192) / 8192
    assert RESULT.fullmatch(lines[-1]) and ["MISSED" in line for line in lines] == [False] * (len(lines) - 1) + [code == 3]
    assert code == 0 or lines[-1].endswith(f" | MISSED the goal of {100 * v:.2f}%")
    again = call("magnitude", *flags, "--resume", cwd=tmp_path)
    assert (again.code, again.err, again.out.splitlines()[-1]) == (code, "", lines[-1])


def test_a_finished_run_is_replaced_with_a_word(call, data, tiny, tmp_path):
    flags, said = ["--data", data, "--model", tiny, "--out", "o", "--steps", 1, "--batch_size", 4], "o holds a finished run: this one takes its place\n"
    for seed, told in ((0, False), (1, True)):
        ended = call("magnitude", *flags, "--seed", seed, cwd=tmp_path)
        assert ended.code == 0 and (said in ended.out) == told and json.loads((tmp_path / "o/result.json").read_text())["seed"] == seed
    assert said not in call("magnitude", *flags, "--seed", 1, "--resume", cwd=tmp_path).out


@pytest.mark.parametrize("script", [s for s in SCRIPTS if has(s, "--scope")])
@pytest.mark.parametrize("v", [0.03, 0.1])
def test_local_scope_keeps_the_share_of_each_matrix(trained, script, v):
    _, out = trained(script, "squad", v)                                            # local is the default
    for name, w in weights_of(out).items():
        assert (w != 0).sum() == round(v * w.size), name


@pytest.mark.parametrize("script, flags", [(s, ("--scope", "global")) for s in SCRIPTS if has(s, "--scope")] + [("soft_mvp", ())])
def test_global_scope_keeps_the_share_of_all(trained, script, flags):
    ended, out = trained(script, "squad", 0.1, *flags)
    left, n = nonzero(out)
    assert ended.code == 0 and left == round(0.1 * n)
    assert len({round(float((w != 0).mean()), 3) for w in weights_of(out).values()}) > 3    # and not the same share of each


def cubic(t, T, v_f, t_i, t_f):
    return 1.0 if t <= t_i * T else v_f if t > T - t_f * T else v_f + (1 - v_f) * (1 - (t - t_i * T) / (T - t_i * T - t_f * T)) ** 3


@pytest.mark.parametrize("script", [s for s in SCRIPTS if s in ("magnitude", "mvp", "soft_mvp")])
def test_masks_follow_the_schedule_at_every_step(script, data, tmp_path, monkeypatch, capsys):
    """The run itself, spied upon: v of each step, the masks it led to, the parameters that are clipped, the optimiser's groups."""
    module, calls, clipped, adams = MODULES[script], [], [], []
    update, clip, adam = module.update_masks, torch.nn.utils.clip_grad_norm_, torch.optim.AdamW

    def update_masks(masked, scores, v, *scope):
        update(masked, scores, v, *scope)
        calls.append((v, [int(m.mask.sum()) for m in masked], [m.mask.numel() for m in masked]))
    monkeypatch.setattr(module, "update_masks", update_masks)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda p, norm, *a, **k: (clipped.append((len(list(p)), norm)), clip(p, norm, *a, **k))[1])
    monkeypatch.setattr(torch.optim, "AdamW", lambda *a, **k: (adams.append(adam(*a, **k)), adams[-1])[1])
    args = module.flags().parse_args(["--data", str(data), "--out", str(tmp_path / "o"), "--device", "cpu", "--preset", "mini", "--steps", "20",
                                      "--batch_size", "4", "--sparsity", "0.05"])
    assert module.main(args) == 0
    expected = [cubic(t, 20, 0.05, args.t_i, args.t_f) for t in range(20)] + [0.05]                      # and once more for the bake
    np.testing.assert_allclose([v for v, _, _ in calls], expected, atol=1e-12)
    for v, counts, sizes in calls:
        if script == "soft_mvp":
            assert sum(counts) == round(v * sum(sizes))
        else:
            assert counts == [max(1, round(v * n)) for n in sizes]
    groups = adams[0].param_groups
    assert len(adams) == 1 and all(g["weight_decay"] == 0 and g["eps"] == 1e-8 for g in groups)          # AdamW's default is 0.01
    assert [g["peak"] for g in groups] == ([args.lr] if script == "magnitude" else [args.lr, args.score_lr])
    assert set(clipped) == {(sum(len(g["params"]) for g in groups), 1.0)} and len(clipped) == 20         # one clip over weights and scores
    frozen = {p.shape for g in groups for p in g["params"]}
    assert not any(1000 < shape[0] for shape in frozen)                                                  # no word embeddings


def falls(T, warm, end=0.0):
    """The factors of T steps: over `warm` of them up to 1 in equal parts, then in equal parts down to end, reached after the last step."""
    return [*(np.arange(1, warm + 1) / warm), *(end + (1 - end) * (T - np.arange(warm, T)) / (T - warm))]


@pytest.mark.parametrize("script, flags, peaks, factors", [
    ("magnitude", [], [5e-4], falls(40, 2)), ("mvp", [], [5e-4, 1e-2], falls(40, 2)), ("soft_mvp", [], [5e-4, 1e-2], falls(40, 2)),
    ("l0", [], [5e-4, 1e-1], falls(40, 2)), ("mgpp", [], [5e-4], falls(40, 2)), ("rpp", [], [5e-4], falls(40, 2)),
    ("mvp", ["--lr", 7e-4, "--score_lr", 2e-2], [7e-4, 2e-2], falls(40, 2)), ("l0", ["--score_lr", 0.3], [5e-4, 0.3], falls(40, 2)),
    ("rpp", ["--lr", 7e-4], [7e-4], falls(40, 2)), ("magnitude", ["--preset", "paper"], [3e-5], falls(40, 4)),
    ("mgpp", ["--preset", "paper"], [5e-5], falls(40, 0, 0.1))])
def test_learning_rates_of_every_step(data, tiny, tmp_path, capsys, script, flags, peaks, factors):
    """As the optimiser has them when it makes its step, the weights' and the scores': warm-up over 5 % of the run (the paper's SQuAD: 10 %),
    then down to nothing; in MGPP's paper from the first step, to a tenth. RPP's pre-training has a peak of its own, unless --lr is given."""
    steps = []
    hook = register_optimizer_step_pre_hook(lambda optimizer, *_: steps.append((optimizer, [group["lr"] for group in optimizer.param_groups])))
    try:
        code = main(script, "--data", data, "--model", tiny, "--out", tmp_path / "o", "--sparsity", 0.5, "--steps", 40, "--batch_size", 1,
                    *["--pretrain_steps", 20] * (script == "rpp"), *flags)
    finally:
        hook.remove()
    fine, before = ([rates for optimizer, rates in steps if (optimizer is steps[-1][0]) == last] for last in (True, False))
    assert code == 0 and len(fine) == 40 and len(before) == 20 * (script == "rpp")
    np.testing.assert_allclose(fine, np.outer(factors, peaks), rtol=1e-12)
    if before:
        np.testing.assert_allclose(before, np.outer(falls(20, 1), [7e-4 if flags else 1e-3]), rtol=1e-12)
    row = json.loads((tmp_path / "o/log.jsonl").read_text().splitlines()[-1])
    assert row["step"] == 40 and row["lr"] == pytest.approx(peaks[0] * factors[-1], rel=1e-12)             # and the log tells that of the weights


# ---- soft movement's open loop, the advice, the teacher

def test_open_loop(trained, data):
    ended, out = trained("soft_mvp", "squad", 0.03, "--penalty", "500", "--score_lr", "0.7")
    left, n = nonzero(out)
    result = json.loads((out / "result.json").read_text())
    assert ended.code == 0 and result["kept"] == left / n and 0.005 <= left / n < 0.999, ended              # an outcome, not the 3 % asked
    assert RESULT.fullmatch(ended.out.splitlines()[-1]) and "no goal" in ended.out
    told = "keeps 3.00% (prunes 97.00%) of the encoder's weights if --penalty finds so many |"                # a wish, then, and not a promise
    assert told in ended.out.splitlines()[0] and "finds" not in trained("soft_mvp", "squad", 0.03)[0].out.splitlines()[0]
    gentle, out = trained("soft_mvp", "squad", 0.03, "--penalty", "1e-6")
    assert gentle.code == 0 and nonzero(out)[0] == n                                                        # nothing presses, nothing goes


@pytest.mark.parametrize("flags, lambda_f", [(["--penalty", 300], 300), ([], 1000)], ids=["open loop", "default"])
def test_threshold_and_lambda_ramp(data, tiny, tmp_path, monkeypatch, capsys, flags, lambda_f):
    """lambda_t = lambda_f tau_t / 0.1, on the cubic, times the mean over matrices of the mean of sigmoid(S), of the scores with which the step
    began: at every step, lambda_f given by --penalty or, where tau is solved for, 1000."""
    module, levels, means, rows, log = MODULES["soft_mvp"], [], [], [], common.Run.log

    def spied(update):
        def update_masks(masked, scores, level):
            levels.append(level)
            means.append(np.mean([np.mean(1 / (1 + np.exp(-s.detach().numpy().astype(float)))) for s in scores]))
            update(masked, scores, level)
        return update_masks
    for name in ("update_masks", "update_masks_open"):
        monkeypatch.setattr(module, name, spied(getattr(module, name)))
    monkeypatch.setattr(common.Run, "log", lambda self, step, loss, penalty, *more: (rows.append(penalty.item()), log(self, step, loss, penalty, *more)))
    assert main("soft_mvp", "--data", data, "--model", tiny, "--out", tmp_path / "o", "--steps", 20, "--sparsity", 0.05, *flags) == 0
    ramp = np.array([1 - cubic(t, 20, 0.0, 0.05, 0.3) for t in range(20)])
    assert ramp[0] == 0 and ramp[-6:].tolist() == [1] * 6 and means[0] == 0.5 > means[-1] > 0.2
    expected = [*(0.1 * ramp), 0.1] if flags else [*(1 - 0.95 * ramp), 0.05]                               # and once more for the bake
    np.testing.assert_allclose(levels, expected, atol=1e-12)
    np.testing.assert_allclose(rows, lambda_f * ramp * means[:20], rtol=1e-5)
    assert json.loads((tmp_path / "o/log.jsonl").read_text().splitlines()[-1])["penalty"] == rows[-1]


def test_advice_on_keeping_most(trained):
    ended, out = trained("magnitude", "squad", 0.97)
    lines = ended.out.splitlines()
    assert ended.code == 0 and "did you mean 0.03?" in ended.out and "97" in next(line for line in lines if "did you mean" in line)
    assert sum("did you mean" in line for line in lines) == 1 and "keeps 97.00% (prunes 3.00%)" in lines[-1]
    for v in (0.03, 0.1, 1):
        assert "did you mean" not in trained("magnitude", "squad", v)[0].out


@pytest.mark.parametrize("script", SCRIPTS)
def test_teacher(trained, script):
    _, teacher = trained("magnitude", "squad", 1)
    before = tree(teacher)
    ended, out = trained(script, "squad", 0.1, "--teacher", str(teacher))
    assert ended.code == 0 and ended.err == "" and not same_bytes(out, trained(script, "squad", 0.1)[1])
    assert tree(teacher) == before


def test_distillation_loss():
    """0.1 CE + 0.9 T^2 KL(teacher || student), T = 2, in numpy; SQuAD averages start and end."""
    def soft(x):
        x = np.exp(x / 2 - np.max(x / 2, -1, keepdims=True))
        return x / x.sum(-1, keepdims=True)

    def kl(teacher, student):
        return np.mean(np.sum(soft(teacher) * np.log(soft(teacher) / soft(student)), -1))
    rng = np.random.default_rng(0)
    s, t, s2, t2 = rng.normal(size=(4, 5, 7)) * 3
    give = lambda kind, **arrays: lambda **batch: kind(loss=torch.tensor(1.5), **{k: torch.tensor(x) for k, x in arrays.items()})
    one, two = transformers.modeling_outputs.SequenceClassifierOutput, transformers.modeling_outputs.QuestionAnsweringModelOutput
    assert abs(common.task_loss(give(one, logits=s), {}, give(one, logits=t)).item() - (0.15 + 0.9 * 4 * kl(t, s))) < 1e-5
    got = common.task_loss(give(two, start_logits=s, end_logits=s2), {}, give(two, start_logits=t, end_logits=t2)).item()
    assert abs(got - (0.15 + 0.9 * 4 * (kl(t, s) + kl(t2, s2)) / 2)) < 1e-5
    assert common.task_loss(give(one, logits=s), {}).item() == 1.5


# ---- the same bytes: twice, stopped, killed

@pytest.mark.parametrize("script", SCRIPTS)
def test_same_seed_same_bytes_in_another_process(trained, fork, data, script, tmp_path):
    _, out = trained(script, "squad", 0.1)
    ended = fork(script, "--task", "squad", "--sparsity", 0.1, "--data", data, "--out", "again", *SHORT, cwd=tmp_path)
    assert ended.code == 0 and ended.err == "" and RESULT.fullmatch(ended.out.splitlines()[-1])
    assert same_bytes(out, tmp_path / "again")
    assert json.loads((out / "result.json").read_text())["metrics"] == json.loads((tmp_path / "again/result.json").read_text())["metrics"]
    assert not same_bytes(out, trained(script, "squad", 0.1, "--seed", "1")[1])


@pytest.mark.parametrize("script", SCRIPTS)
def test_stopped_and_resumed(trained, call, data, dropout, script, tmp_path):
    """Ctrl-C says how to go on and exits 130; the run that goes on, from a checkpoint two steps back, ends in the same bytes. mvp and rpp with
    dropout: a step draws what it would have drawn. rpp is stopped at step 8 of its pre-training, and at step 11 of fine-tuning."""
    own = ["--model", str(dropout)] * (script in ("mvp", "rpp")) + ["--pretrain_steps", "9"] * (script == "rpp")
    flags = ["--task", "squad", "--sparsity", "0.1", "--data", str(data), "--out", "o", *SHORT, *own]
    ended = call(script, *flags, cwd=tmp_path, interrupt=8)
    assert ended.code == 130 and "Traceback" not in ended.err and f"{script}.py" in ended.err and "--resume" in ended.err
    assert (tmp_path / "o/checkpoint.pt").exists() and not (tmp_path / "o/result.json").exists()
    ended = call(script, *flags, "--resume", cwd=tmp_path, interrupt=11)
    assert ended.code == 130 and f"going on from step 6{' of pre-training' * (script == 'rpp')}\n" in ended.out
    ended = call(script, *flags, "--resume", cwd=tmp_path)
    assert ended.code == 0 and "going on from step 9\n" in ended.out and RESULT.fullmatch(ended.out.splitlines()[-1])
    whole = trained(script, "squad", 0.1, *own)[1]
    assert same_bytes(tmp_path / "o", whole) and (script != "rpp" or same_bytes(tmp_path / "o/support", whole / "support"))
    assert {phase: (steps == sorted(set(steps)), steps[-1]) for phase, steps in logged(tmp_path / "o").items()} == {
        "fine-tuning": (True, 12), **({"pre-training": (True, 9)} if script == "rpp" else {})}
    before = tree(tmp_path)
    again = call(script, *flags, "--resume", cwd=tmp_path)                                                   # finished: says so once more
    assert again.code == 0 and again.out.splitlines()[-1] == ended.out.splitlines()[-1] and tree(tmp_path) == before


# Kills the process at a step of a phase, between its line of the log and its checkpoint.
KILL = r'''
import os, signal
import common

log = common.Run.log


def killed(self, step, *more):
    log(self, step, *more)
    if (self.phase, step) == AT:
        os.kill(os.getpid(), signal.SIGKILL)


common.Run.log = killed
'''


@pytest.mark.parametrize("script", ["magnitude", "l0", "rpp"])      # what a method has to remember: nothing, multipliers, a phase more
def test_killed_and_resumed(trained, fork, data, script, tmp_path):
    """SIGKILL in the middle of a checkpoint, twice between two, and in the middle of the model's file, for rpp of its support's: each after the
    step at which it was to be; then to the end: the same bytes."""
    rng, out, rpp = random.Random(script), tmp_path / "o", script == "rpp"
    flags = ["--task", "squad", "--sparsity", "0.1", "--data", str(data), "--out", "o", *SHORT]
    first, (a, b) = rng.randint(2, 4), sorted(rng.sample(range(5, 12), 2))
    at = lambda phase, step: dict(patch=f"AT = {phase, step}\n{KILL}")
    cut, model = dict(cut=["checkpoint.pt", first]), dict(cut=["model.safetensors", 1])
    kills = [(cut, first - 1), (at("pre-training", a), a - 1), (model, 11), (at("fine-tuning", b), b - 1)] if rpp else [
             (cut, first - 1), (at("fine-tuning", a), a - 1), (at("fine-tuning", b), b - 1), (model, 11)]
    for n, (kill, left) in enumerate(kills):
        ended = fork(script, *flags, *["--resume"] * (n > 0), cwd=tmp_path, every=True, **kill)
        assert (ended.code, ended.err) == (-signal.SIGKILL, "") and not (out / "result.json").exists(), (n, ended)
        assert torch.load(out / "checkpoint.pt", weights_only=True)["step"] == left, n          # whole, whatever was being written
    ended = fork(script, *flags, "--resume", cwd=tmp_path)
    assert ended.code == 0 and f"going on from step {left}\n" in ended.out, ended
    assert same_bytes(out, trained(script, "squad", 0.1)[1])
    for phase in ["pre-training"] * rpp + ["fine-tuning"]:
        steps = logged(out)[phase]
        assert steps == sorted(set(steps)) and steps[-1] == 12
    assert not [f.name for f in out.iterdir() if f.name.endswith((".part", ".pt"))]


def test_killed_wherever_a_file_is_written(trained, fork, data, tmp_path):
    """The n-th write of each of a run's files, cut in half: log.jsonl before the first step, the first checkpoint, the third, log.jsonl once
    more as the run goes on, the model, result.json."""
    flags, out = ["--task", "squad", "--sparsity", "0.1", "--data", str(data), "--out", "o", *SHORT], tmp_path / "o"
    kills = [("log.jsonl", 1, None), ("checkpoint.pt", 1, None), ("checkpoint.pt", 3, 2), ("log.jsonl", 1, 2), ("model.safetensors", 1, 11),
             ("result.json", 1, 11)]
    for name, n, step in kills:
        resume = ["--resume"] * (out / "log.jsonl").exists()
        ended = fork("soft_mvp", *flags, *resume, cwd=tmp_path, every=True, cut=[name, n])
        assert ended.code == -signal.SIGKILL and ended.err == "" and not (out / "result.json").exists(), ended
        assert (torch.load(out / "checkpoint.pt", weights_only=True)["step"] if (out / "checkpoint.pt").exists() else None) == step, (name, n)
        assert (out / f"{name}.part").exists() or name == "model.safetensors"       # half of it, under another name
        with open(out / "log.jsonl", "a") if step else open(os.devnull, "a") as f:
            f.write('{"phase": "fine-tuning", "step": 1')                           # killed within a log line
    ended = fork("soft_mvp", *flags, "--resume", cwd=tmp_path)
    assert ended.code == 0 and "going on from step 11" in ended.out and same_bytes(out, trained("soft_mvp", "squad", 0.1)[1])
    assert logged(out)["fine-tuning"][-1] == 12 and not [f.name for f in out.iterdir() if f.name.endswith((".part", ".pt"))]
    again = fork("soft_mvp", *flags[:6], "--out", str(out), *SHORT, "--resume", cwd=tmp_path)          # the same folder in other words
    assert again.code == 0 and "this run is finished" in again.out


def a_run(out, **flags):
    args = dict(task="squad", sparsity=0.1, preset="mini", model=None, data=None, teacher=None, out=str(out), resume=False, seed=0, steps=9,
                batch_size=4, lr=1e-3, device="cpu")
    return common.Run("mvp.py", argparse.Namespace(**args | flags), {"mini": {"*": {}}})


def test_random_numbers_of_a_step(tmp_path, capsys):
    """Those of (seed, step, process) alone: no two alike, and the same once more, whatever was drawn in between."""
    run, drawn = a_run(tmp_path / "o"), {}
    cases = [(seed, step, rank, world) for seed in (0, 1) for step in (0, 1, 2, 500) for rank, world in ((0, 1), (0, 2), (1, 2))]
    for case in [*cases, *reversed(cases)]:
        run.args.seed, step, run.rank, run.world = case
        run.seed_step(step)
        drawn.setdefault(case, []).append(torch.rand(3).tolist())
    assert all(one == other for one, other in drawn.values())
    # one process and the first of two may share their numbers: they are never in one run
    for world in (1, 2):
        mine = [tuple(one) for case, (one, _) in drawn.items() if case[3] == world]
        assert len(set(mine)) == len(mine) == 8 * world


@pytest.mark.parametrize("stop", range(1, 14))
def test_a_run_of_two_phases_stopped_in_either(tmp_path, capsys, stop):
    """Five steps of one net, then nine of another that begins where it ended; a checkpoint at every other step. Stopped after any step, and
    once more three steps later: the numbers of the run never stopped, and every step in the log once."""
    class Stop(Exception):
        pass

    def two_phases(out, resume, left):
        run, first, second = a_run(out, resume=resume), torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)
        for net, more in ((first, dict(phase="pre-training", steps=5)), (second, {})):
            optimizer = torch.optim.AdamW(net.parameters(), lr=0.1)
            if net is second:
                net.load_state_dict(first.state_dict())
            for step in range(run.restore(model=net, optimizer=optimizer, **more), more.get("steps", 9)):
                run.seed_step(step)
                loss = (net(torch.randn(4, 3)) ** 2).sum()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                run.next_log, run.next_write = 0.0, 0.0 if step % 2 else math.inf
                run.log(step + 1, loss, 0.0, lambda: 1.0, None, 0.1)
                run.checkpoint(step + 1, model=net, optimizer=optimizer)
                left -= 1
                if left == 0:
                    raise Stop
        return torch.cat([p.flatten() for p in net.parameters()])
    whole = two_phases(tmp_path / "whole", False, math.inf)
    with pytest.raises(Stop):
        two_phases(tmp_path / "o", False, stop)
    with contextlib.suppress(Stop):
        two_phases(tmp_path / "o", True, 3)
    assert torch.equal(two_phases(tmp_path / "o", True, math.inf), whole)
    rows = [(row["phase"], row["step"]) for row in map(json.loads, (tmp_path / "o/log.jsonl").read_text().splitlines()[1:])]
    assert rows == [("pre-training", n) for n in range(1, 6)] + [("fine-tuning", n) for n in range(1, 10)]


def test_a_checkpoint_takes_two_percent_of_the_time(tmp_path, monkeypatch, capsys):
    """On a clock of the test's own: whatever a step, a write and the run take, from the first write on; and the log says how often."""
    for parameters, step_takes, write_takes, steps in ((10 ** 6, 0.05, 0.01, 9000), (10 ** 8, 0.2, 3.0, 9000), (10 ** 8, 0.2, 30.0, 90_000),
                                                       (10 ** 6, 3.0, 2.0, 900), (10 ** 8, 0.1, 3.0, 1000)):
        clock, writes, model = [1000.0], [], torch.nn.Linear(1, 1)
        model.weight = torch.nn.Parameter(torch.empty(parameters, device="meta"))

        def write(path, text):
            if str(path).endswith("checkpoint.pt"):
                writes.append(clock[0])
                clock[0] += write_takes
        monkeypatch.setattr(common.time, "time", lambda: clock[0])
        monkeypatch.setattr(common, "write_whole", write)
        run = a_run(tmp_path / "o", steps=steps)
        monkeypatch.setattr(run, "begin", lambda: (tmp_path / "log.jsonl").write_text(""))
        run.out = tmp_path
        for step in range(run.restore(model=model), steps):
            clock[0] += step_takes
            run.checkpoint(step + 1, model=model)
        total, out = clock[0] - 1000, capsys.readouterr().out
        assert len(writes) * write_takes <= 0.02 * total, (parameters, step_takes, write_takes, len(writes), total)
        if steps * step_takes > 1000:
            assert len(writes) >= min(0.01 * total / write_takes, total / 10), (len(writes), total)      # and not much rarer
            every = float(re.findall(r"checkpoint at step \d+, written in [\d.]+ s; from now on one every (\d+) s", out)[0])
            gaps = np.diff(writes)
            assert abs(np.median(gaps) - write_takes - every) <= 1 + step_takes


def test_disk_full(call, data, tmp_path):
    """Files of over a megabyte cannot be written: the first checkpoint stays what it was, and one sentence says so."""
    flags = ["--data", str(data), "--out", "o", *SHORT]
    assert call("mvp", *flags, cwd=tmp_path, interrupt=6).code == 130
    before = (tmp_path / "o/checkpoint.pt").read_bytes()
    for more in (dict(interrupt=10), {}):                                           # at the next checkpoint; at the end, saving the model
        ended = call("mvp", *flags, "--resume", cwd=tmp_path, largest=1_000_000, **more)
        assert "full" in one_sentence(ended) and "--resume" in ended.err
        assert (tmp_path / "o/checkpoint.pt").read_bytes() == before and not (tmp_path / "o/checkpoint.pt.part").exists()
    assert call("mvp", *flags, "--resume", cwd=tmp_path).code == 0


def test_disk_full_in_the_small_files(fork, data, tmp_path):
    """At the first line of the log, at a checkpoint, at result.json, and with a quota: one sentence each; what was there stays, and the run
    goes on from it. So with a file that may not be written."""
    flags, out = ["--data", str(data), "--out", "o", *SHORT], tmp_path / "o"
    assert "o" in one_sentence(fork("mvp", *flags, cwd=tmp_path, fail=["log.jsonl", 1, 28])) and not (out / "log.jsonl").exists()
    for name, n, errno, step in (("checkpoint.pt", 3, 28, 2), ("checkpoint.pt", 3, 122, 4), ("result.json", 1, 28, 11), ("result.json", 1, 13, 11)):
        ended = fork("mvp", *flags, *["--resume"] * (step > 2), cwd=tmp_path, every=True, fail=[name, n, errno])
        assert ("Permission denied" if errno == 13 else "the disk is full") in one_sentence(ended)
        assert ended.err.endswith(" --out o --steps 12 --batch_size 8 --resume\n")
        assert torch.load(out / "checkpoint.pt", weights_only=True)["step"] == step and not (out / "result.json").exists()
        assert not list(out.glob("*.part"))
    assert fork("mvp", *flags, "--resume", cwd=tmp_path).code == 0


@pytest.mark.parametrize("script", ["mvp", "rpp"])      # the frame is one; rpp has a phase more
def test_ctrl_c(fork, data, script, tmp_path):
    """A real SIGINT, in training and before: the words say how to go on, and those words work."""
    flags = ["--out", "o", "--steps", "100000", "--batch_size", "8"]                                   # all of mini's squad: a second or two to read
    flags += ["--corpus", str(data / "corpus.txt")] * (script == "rpp")
    ended = fork(script, *flags, cwd=tmp_path, when="keeps", signal=signal.SIGINT)                      # before anything is written ...
    assert ended.code == 130 and "Traceback" not in ended.err and not (tmp_path / "o").exists()
    assert ended.err == f"\nstopped; to go on: python {ROOT / script}.py {' '.join(flags)}\n"            # ... there is nothing to resume
    ended = fork(script, *flags, cwd=tmp_path, when="\nstep ", after=0.1, signal=signal.SIGINT)
    assert ended.code == 130 and ended.err == f"\nstopped; to go on: python {ROOT / script}.py {' '.join(flags)} --resume\n"
    ended = fork(script, *flags, "--resume", cwd=tmp_path, when="\nstep ", signal=signal.SIGINT)
    assert ended.code == 130 and re.search("starts again from step 0|going on from step", ended.out) and ended.err.count("--resume") == 1


def test_one_run_at_a_time(call, data, tmp_path, monkeypatch, capsys):
    """A run holds its folder to its end; another in that folder is a mistake that changes nothing, resumed or not."""
    def free(folder):
        fd = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            return False
        finally:
            os.close(fd)
    log, seen, flags = common.Run.log, [], ["--data", str(data), "--preset", "mini", "--device", "cpu", *SHORT]
    monkeypatch.setattr(common.Run, "log", lambda self, *row: (seen.append(free(tmp_path / "p")), log(self, *row)))
    with pytest.raises(SystemExit):
        common.launch(MODULES["mvp"].main, MODULES["mvp"].flags().parse_args([*flags, "--out", str(tmp_path / "p")]))
    assert seen == [False] * 12 and free(tmp_path / "p")
    assert call("mvp", *flags, "--out", "o", cwd=tmp_path, interrupt=8).code == 130
    before, fd = tree(tmp_path), os.open(tmp_path / "o", os.O_RDONLY)
    fcntl.flock(fd, fcntl.LOCK_EX)
    for resume in ([], ["--resume"]):
        assert "in use" in one_sentence(call("mvp", *flags, "--out", "o", *resume, cwd=tmp_path)) and tree(tmp_path) == before
    os.close(fd)
    assert call("mvp", *flags, "--out", "o", "--resume", cwd=tmp_path).code == 0


def test_a_terminal_without_our_characters(fork, data, tmp_path):
    """The bars of the report are not worth a run's end; nor is a folder with an umlaut, or a seed of thirty digits."""
    ended = fork("mvp", "--data", data, "--out", "ö", "--seed", 10 ** 30, *SHORT, cwd=tmp_path, ascii=True)
    assert ended.code == 0 and ended.err == "" and ended.out.splitlines()[-1].startswith("RESULT") and (tmp_path / "ö/result.json").exists()


# ---- two processes

# Hashes each step's masks; with STOP writes a checkpoint at the sixth step and is stopped at the eighth; with SLOW rank 0 is slow to make its
# files whole, while rank 1 looks into --out at the worst moment.
SPY = r'''
import hashlib, os, time
import common

rank, replace, say, prunable, log, checkpoint, seen = os.environ["RANK"], os.replace, common.Run.say, common.prunable, common.Run.log, common.Run.checkpoint, []


def slow_replace(part, path):
    time.sleep(0.5 if str(path).endswith("log.jsonl") else 0)
    replace(part, path)


def late(self, text):
    time.sleep(0.25)
    common.Run.say = say


def spied_prunable(model):                              # the task's model; rpp: the pre-training's too
    seen.append(prunable(model))
    return seen[-1]


def spied_log(self, step, *more):
    masks = b"".join((m.weight != 0).detach().numpy().tobytes() for weights in seen for m in weights.values())
    with open(f"masks{rank}", "a") as f:
        print(step, hashlib.sha1(masks).hexdigest(), file=f)
    log(self, step, *more)


def spied_checkpoint(self, step, **parts):
    self.next_write = 0.0 if step == 6 else float("inf")
    checkpoint(self, step, **parts)
    if step == 8 and STOP:
        raise KeyboardInterrupt


if SLOW and rank == "0":
    os.replace = slow_replace
elif SLOW:
    common.Run.say = late
common.prunable, common.Run.log, common.Run.checkpoint = spied_prunable, spied_log, spied_checkpoint
'''
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")


def moved(folder):
    """How far the encoder's biases and LayerNorms, which nobody prunes, are from where mini/bert has them: one long vector."""
    before, after = (safetensors.torch.load_file(Path(f) / "model.safetensors") for f in (ROOT / "mini/bert", folder))
    return torch.cat([after[k] - before[k] for k in sorted(after) if ".encoder.layer." in k and after[k].ndim == 1]).double()


def cosine(a, b):
    return float(a @ b / (a.norm() * b.norm()))


@pytest.mark.parametrize("script", ["soft_mvp", "l0", "rpp"])       # scores, noise, two phases; torchrun itself: test_readme.py
def test_two_processes(trained, fork, data, dropout, script, tmp_path):
    """On two gloo processes: one RESULT, the same kept, the same masks on both at every step, and about those of one process. Stopped at the
    eighth step both go on from rank 0's checkpoint of the sixth, with the masks that they would have had, to the same bytes. soft_mvp with
    dropout, so that each draws what it would have drawn: not what one process would have."""
    own = ["--model", str(dropout)] * (script == "soft_mvp")

    def run(out, stop, *flags):
        for rank in (0, 1):
            (tmp_path / f"masks{rank}").unlink(missing_ok=True)
        one, other = fork(script, "--task", "squad", "--sparsity", 0.1, "--data", data, "--out", out, *SHORT, *own, *flags, cwd=tmp_path, world=2,
                          patch=f"STOP, SLOW = {stop}, {out == 'o'}\n{SPY}")
        assert (other.out, other.err) == ("", "") and one.code == other.code, (one, other)                   # rank 1 prints nothing
        masks = [(tmp_path / f"masks{rank}").read_text().splitlines() for rank in (0, 1)]
        assert masks[0] == masks[1]
        return one, masks[0]
    ended, masks = run("o", False)
    assert (ended.code, ended.err) == (0, "") and [line.split()[0] for line in masks] == [str(n) for n in range(1, 13)] * (1 + (script == "rpp"))
    assert len({line.split()[1] for line in masks}) > 3
    assert ended.out.count("RESULT") == 1 and sum(line.startswith(f"{script} squad") for line in ended.out.splitlines()) == 1
    _, alone = trained(script, "squad", 0.1)
    assert nonzero(tmp_path / "o") == nonzero(alone)
    if not own:     # the same global batch, its gradient averaged: biases and LayerNorms move as in one process, and not as with other batches
        assert cosine(moved(tmp_path / "o"), moved(alone)) > 0.9 > 0.5 > cosine(moved(trained(script, "squad", 0.1, "--seed", "1")[1]), moved(alone))
    stopped, first = run("p", True)
    assert stopped.code == 130 and first == masks[:8] and re.fullmatch(rf"\nstopped; to go on: torchrun \.\.\. \S*{script}\.py .*--resume\n", stopped.err)
    ended, rest = run("p", False, "--resume")
    assert (ended.code, ended.err) == (0, "") and "going on from step 6" in ended.out and rest == masks[6:]
    assert same_bytes(tmp_path / "o", tmp_path / "p")


# Sends torchrun a Ctrl-C at the third step.
INTERRUPTED = r'''
import os, runpy, signal, sys
import common

log = common.Run.log


def interrupted(self, step, *more):
    log(self, step, *more)
    if step == 3 and os.environ["RANK"] == "0":
        os.kill(os.getppid(), signal.SIGINT)


common.Run.log = interrupted
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
'''


def test_ctrl_c_of_torchrun(data, tmp_path):
    """Ends both, with torchrun's own message and one of ours, on how to go on; no traceback from our files."""
    (tmp_path / "interrupted.py").write_text(INTERRUPTED)
    ended = spawn(*TORCHRUN, "interrupted.py", ROOT / "mvp.py", "--data", data, "--out", "o", "--steps", 500, "--batch_size", 8, cwd=tmp_path, timeout=60)
    assert ended.code != 0 and "RESULT" not in ended.out and ended.err.count("stopped; to go on: torchrun ... ") == 1
    assert "[rank" not in ended.err and not re.search(r"Error: .*(gloo|peer)", ended.err) and not re.search("^mvp.py: ", ended.err, re.M), ended.err


def test_a_process_of_two_that_dies_ends_the_other(fork, data, tmp_path):
    """In a sentence on how to go on, without torchrun, which would end it too; nobody waits for the dead."""
    one, other = fork("mvp", "--data", data, "--out", "o", "--steps", 500, "--batch_size", 8, cwd=tmp_path, world=2,
                      patch=f"import os\nAT = os.environ['RANK'] == '1' and ('fine-tuning', 3)\n{KILL}")
    assert other.code == -signal.SIGKILL and "RESULT" not in one.out and "another process has ended" in one_sentence(one)
    assert re.search(r"go on with torchrun \.\.\. \S*mvp\.py .*--resume$", one.err.strip())


def test_a_mistake_of_two_processes_is_told_once(data, tmp_path):
    ended = spawn(*TORCHRUN, ROOT / "mvp.py", "--data", data, "--out", "o", "--steps", 2, "--batch_size", 7, cwd=tmp_path)
    assert ended.code != 0 and sum("--batch_size 7 cannot be split over 2 processes" in line for line in ended.err.splitlines()) == 1, ended.err
    assert not (tmp_path / "o").exists()


def test_what_befalls_another_process_alone_is_told(fork, data, tmp_path):
    """As on a second machine that has not all the files, or a second GPU that is not there: rank 1 says it, after a while. Rank 0, which waits for
    it, is ended by torchrun, here by its alarm."""
    alone = """import os, signal, time
import common
time.sleep = int                # a while
init = common.Run.__init__
def other(self, script, args, hyper):
    if os.environ["RANK"] == "1":
        args.device = "cuda:7"
    init(self, script, args, hyper)
common.Run.__init__ = other
signal.alarm(2 if os.environ["RANK"] == "0" else 60)"""
    one, other = fork("mvp", "--data", data, "--out", "o", "--steps", 2, cwd=tmp_path, world=2, patch=alone)
    assert one.code == -signal.SIGALRM and one.err == "" and "RESULT" not in one.out
    assert other.out == "" and one_sentence(other).startswith("mvp.py: --device cuda:7")


# ---- mistakes

WRONG_FLAGS = {
    "unknown task": ["--task", "squat"], "task without a value": ["--task"],
    **{f"V of {v}": ["--sparsity", v] for v in ("0", "-1", "2", "1.0001", "nan", "inf", "three", "3%", "")},
    **{f"steps {n}": ["--steps", n] for n in ("0", "-3", "1.5", "many")},
    **{f"batch {n}": ["--batch_size", n] for n in ("0", "-8", "8.5")},
    **{f"lr {x}": ["--lr", x] for x in ("-0.5", "0", "nan", "inf", "fast")},
    "seed -1": ["--seed", "-1"], "seed x": ["--seed", "x"],
    **{f"device {d}": ["--device", d] for d in ("abacus", "cuda", "cuda:99", "cpu:x", "meta", "mps", "xpu", "hpu", "privateuseone")},
    "preset": ["--preset", "maxi"], "unknown flag": ["--sparsety", "0.1"], "abbreviated flag": ["--spars", "0.1"], "stray word": ["squad"],
}
OWN_FLAGS = {"--gamma": ["-1", "0", "nan"], "--rounds": ["0", "2.5"], "--corpus": ["nowhere.txt"], "--support": ["nowhere"], "--pretrain_steps": ["0"],
             "--scope": ["everywhere"], "--score_lr": ["-1", "0", "nan"], "--penalty": ["-1", "nan", "inf", "much"],
             "--mix": ["1.5", "0", "nan"], "--spike": ["0", "-1"], "--slab": ["0"], "--interval": ["0", "2.5"]}


@pytest.fixture
def nothing_written(tmp_path):
    """The folder to run in; afterwards its files must be what they were."""
    (tmp_path / "mine.txt").write_text("mine")
    yield tmp_path
    found = tree(tmp_path)
    assert found.pop("mine.txt") == b"mine" and found == {}, f"written in spite of the mistake: {sorted(found)}"


@pytest.mark.parametrize("name", WRONG_FLAGS)
def test_wrong_flag(call, data, nothing_written, name):
    flags = WRONG_FLAGS[name]
    error = one_sentence(call("magnitude", "--data", data, "--out", "o", *SHORT, *flags, cwd=nothing_written))
    assert flags[0] in error and (len(flags) < 2 or flags[1] in error)                                   # it names what is wrong


@pytest.mark.parametrize("script, flag, value", [(s, f, v) for s in SCRIPTS for f in OWN_FLAGS for v in OWN_FLAGS[f] if has(s, f)])
def test_wrong_flag_of_its_own(call, data, nothing_written, script, flag, value):
    error = one_sentence(call(script, "--data", data, "--out", "o", *SHORT, flag, value, cwd=nothing_written))
    assert (flag in error or flag == "--support") and value in error


@pytest.mark.parametrize("script", SCRIPTS)
def test_mistakes_of_every_script(call, nothing_written, script):
    """The few of them that every script answers alike, for the frame leaves no other way."""
    for flags, names in ((["--sparsity", "97"], "--sparsity"), (["--data", "nowhere"], "nowhere"), (["--resume", "--out", "nowhere"], "nowhere")):
        error = one_sentence(call(script, *flags, *SHORT, cwd=nothing_written))
        assert names in error and error.startswith(f"{script}.py: ")


@pytest.mark.parametrize("task, file", [("squad", "squad/train-v1.1.json"), ("mnli", "glue/MNLI/train.tsv"), ("tsv", "tsv/train.tsv")])
def test_data_that_is_not_there(call, nothing_written, task, file):
    assert f"nowhere/{file}" in one_sentence(call("mvp", "--task", task, "--data", "nowhere", "--out", "o", *SHORT, cwd=nothing_written))
    assert "mine.txt" in one_sentence(call("mvp", "--task", task, "--data", "mine.txt", "--out", "o", *SHORT, cwd=nothing_written))


@pytest.mark.parametrize("task, file", [("squad", "squad/dev-v1.1.json"), ("mnli", "glue/MNLI/dev_mismatched.tsv"), ("qqp", "glue/QQP/dev.tsv")])
def test_dev_file_that_is_not_there(call, data, tmp_path, task, file):
    shutil.copytree(data, tmp_path / "d")
    (tmp_path / "d" / file).unlink()
    error = one_sentence(call("mvp", "--task", task, "--data", "d", "--out", "o", *SHORT, cwd=tmp_path))
    assert f"d/{file}" in error and not (tmp_path / "o").exists()


@pytest.mark.parametrize("pairs, single", [("train", "dev"), ("dev", "train")])
def test_pairs_in_one_file_and_single_texts_in_the_other(call, tiny, tmp_path, pairs, single):
    (tmp_path / "tsv").mkdir()
    (tmp_path / f"tsv/{pairs}.tsv").write_text("text\ttext2\tlabel\nA\tB\tyes\nC\tD\tno\n")
    (tmp_path / f"tsv/{single}.tsv").write_text("text\tlabel\nA\tyes\nC\tno\n")
    before = tree(tmp_path)
    error = one_sentence(call("magnitude", "--task", "tsv", "--data", tmp_path, "--model", tiny, "--out", "o", *SHORT, cwd=tmp_path))
    assert f"{tmp_path / 'tsv'}: text2 must be in both dev.tsv and train.tsv" in error and tree(tmp_path) == before


@pytest.mark.parametrize("task", ["cola", "sst2", "mrpc", "stsb", "qnli", "rte", "tsv"])
def test_tasks_that_mini_does_not_hold(call, nothing_written, task):
    error = one_sentence(call("mvp", "--task", task, "--out", "o", *SHORT, cwd=nothing_written))
    assert task in error and "mini" in error and "--data" in error


def test_paper_preset_without_network(call, data, nothing_written):
    for flags, names in ((["--data", "d"], "dev-v1.1.json"), (["--task", "mrpc", "--data", "d"], "msr_paraphrase_train.txt"),
                         (["--data", str(data)], "bert-base-uncased")):
        error = one_sentence(call("soft_mvp", "--preset", "paper", "--out", "o", "--device", "cpu", *flags, *SHORT, cwd=nothing_written))
        assert names in error and "--preset mini" in error


def model_folders(folder):
    """Folders that are no BERT, each in its own way, made from mini's."""
    bert = ROOT / "mini/bert"

    def copy(name):
        shutil.copytree(bert, folder / name)
        return folder / name
    (folder / "empty").mkdir()
    (copy("no config") / "config.json").unlink()
    (copy("config cut short") / "config.json").write_text((bert / "config.json").read_text()[:50])
    (copy("config a list") / "config.json").write_text("[]")
    (copy("no weights") / "model.safetensors").unlink()
    (copy("weights cut short") / "model.safetensors").write_bytes((bert / "model.safetensors").read_bytes()[:100_000])
    (copy("weights of text") / "model.safetensors").write_text("weights " * 1000)
    for file in ("tokenizer.json", "vocab.txt"):
        (folder / "no tokenizer" if file == "vocab.txt" else copy("no tokenizer")).joinpath(file).unlink(missing_ok=True)
    (copy("tokenizer broken") / "tokenizer.json").write_text("{")
    other = json.loads((bert / "config.json").read_text()) | {"model_type": "distilbert", "architectures": ["DistilBertModel"]}
    (copy("distilbert") / "config.json").write_text(json.dumps(other))
    wider = json.loads((bert / "config.json").read_text()) | {"intermediate_size": 640}
    (copy("config of another size") / "config.json").write_text(json.dumps(wider))
    tensors = safetensors.torch.load_file(bert / "model.safetensors")
    part = {k: v for k, v in tensors.items() if ".layer.1." not in k}
    assert 0 < len(part) < len(tensors)
    safetensors.torch.save_file(part, copy("a layer missing") / "model.safetensors", metadata={"format": "pt"})


BROKEN = ["empty", "no config", "config cut short", "config a list", "no weights", "weights cut short", "weights of text", "no tokenizer",
          "tokenizer broken", "distilbert", "config of another size", "a layer missing", "nowhere", "no/such-model", "a file"]


@pytest.fixture(scope="session")
def broken(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    model_folders(folder)
    (folder / "a file").write_text("file")
    return folder


@pytest.mark.parametrize("name", BROKEN)
def test_model_that_is_none(call, data, broken, nothing_written, name):
    model = broken / name if name != "no/such-model" else name
    error = one_sentence(call("magnitude", "--model", model, "--data", data, "--out", "o", *SHORT, cwd=nothing_written))
    assert str(model) in error and ("distilbert" in error) == (name == "distilbert")


def test_teacher_that_is_none(call, trained, data, nothing_written):
    mnli, qqp = trained("magnitude", "mnli", 0.1)[1], trained("magnitude", "qqp", 0.03)[1]
    for task, teacher in (("squad", "nowhere"), ("squad", mnli), ("squad", ROOT / "mini/bert"), ("mnli", qqp), ("qqp", mnli), ("mnli", ROOT / "mini/bert")):
        error = one_sentence(call("mvp", "--task", task, "--teacher", teacher, "--data", data, "--out", "o", *SHORT, cwd=nothing_written))
        assert str(teacher) in error


def test_teacher_that_reads_other_texts(call, data, tiny, nothing_written, tmp_path_factory):
    """Of another vocabulary, or too short for these texts: its logits would be of other words. One of more positions reads the same."""
    folder = tmp_path_factory.mktemp("teachers")
    for name, change, told in (("other words", dict(vocab_size=1400), "1400 words"), ("short", dict(max_position_embeddings=64), "64 positions")):
        teacher = a_bert(folder / name, "BertForQuestionAnswering", **change)
        error = one_sentence(call("mvp", "--teacher", teacher, "--model", tiny, "--data", data, "--out", "o", *SHORT, cwd=nothing_written))
        assert f"--teacher {teacher}" in error and told in error and "has 1302 and texts of 128 tokens" in error
    teacher = a_bert(folder / "long", "BertForQuestionAnswering", max_position_embeddings=256)
    assert call("mvp", "--teacher", teacher, "--model", tiny, "--data", data, "--out", folder / "o", "--steps", 1, "--batch_size", 4, cwd=folder).code == 0


def test_teachers_of_others(call, glue, tiny, tmp_path):
    """Who made it may have left its task open, or written it in another way; another task is a mistake."""
    config = json.loads((a_bert(tmp_path / "t", "BertForSequenceClassification") / "config.json").read_text())
    for n, (named, good) in enumerate(((None, True), ("sst-2", True), ("glue:sst2", True), ("SST-2", True), ("cola", False))):
        (tmp_path / "t/config.json").write_text(json.dumps(config | {"finetuning_task": named}))
        ended = call("magnitude", "--task", "sst2", "--data", glue, "--model", tiny, "--teacher", "t", "--out", f"o{n}", "--steps", 1,
                     "--batch_size", 4, cwd=tmp_path)
        assert (ended.code, ended.err) == (0, "") if good else "--teacher t was fine-tuned on cola" in one_sentence(ended), named


def test_squad_from_a_classifier(call, data, tmp_path):
    """A model whose config counts three classes: SQuAD's head has two outputs all the same, start and end."""
    a_bert(tmp_path / "three", "BertForSequenceClassification", num_labels=3)
    assert transformers.AutoConfig.from_pretrained(tmp_path / "three").num_labels == 3
    ended = call("magnitude", "--model", "three", "--data", data, "--out", "o", "--steps", 2, "--batch_size", 4, cwd=tmp_path)
    assert (ended.code, ended.err) == (0, "")
    opened = transformers.AutoModelForQuestionAnswering.from_pretrained(tmp_path / "o")
    assert opened.config.num_labels == opened.qa_outputs.out_features == 2


def test_out_that_cannot_be(call, data, nothing_written):
    for out in ("mine.txt", "mine.txt/below", "/proc/here", "."):
        error = one_sentence(call("mvp", "--data", data, "--out", out, *SHORT, cwd=nothing_written))
        assert out in error and "--out" in error


def test_out_with_a_name_that_is_none(call, data, nothing_written):
    """Bytes that are not UTF-8, which safetensors would refuse when the model is saved; a link to nowhere."""
    assert "--out" in one_sentence(call("mvp", "--data", data, "--out", os.fsdecode(b"\xff"), *SHORT, cwd=nothing_written))
    (nothing_written / "link").symlink_to("no/where")
    assert "--out link" in one_sentence(call("mvp", "--data", data, "--out", "link", *SHORT, cwd=nothing_written))
    assert (nothing_written / "link").is_symlink()


def test_out_that_holds_the_log_of_another_program(call, data, tmp_path):
    """log.jsonl is a common name: one that does not begin as ours is not ours, nor is the checkpoint.pt beside it."""
    flags = ["--data", str(data), "--out", "o", *SHORT]
    (tmp_path / "o").mkdir()
    (tmp_path / "o/checkpoint.pt").write_text("theirs")
    for text in ("", "[]\n", "7\n", '{"loss": 1.5}\n', '{"args": [1]}\n', "epoch 1\n", b"\xff\n"):
        (tmp_path / "o/log.jsonl").write_bytes(text if isinstance(text, bytes) else text.encode())
        before = tree(tmp_path)
        for resume in ([], ["--resume"]):
            assert "--out o" in one_sentence(call("mvp", *flags, *resume, cwd=tmp_path)) and tree(tmp_path) == before, text


class Bomb:
    """Unpickled, it makes a file."""
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def test_a_checkpoint_that_is_none(call, data, tmp_path):
    """Cut short, empty, a text, of another program, a bomb: one sentence that names it, nothing changed, and nothing unpickled."""
    flags, path = ["--data", str(data), "--out", "o", *SHORT], tmp_path / "o/checkpoint.pt"
    assert call("mvp", *flags, cwd=tmp_path, interrupt=8).code == 130
    good = torch.load(path, weights_only=True)
    torch.save({"model": Bomb(tmp_path / "bang")}, tmp_path / "bomb.pt")
    torch.save({key: part for key, part in good.items() if key != "optimizer"}, tmp_path / "part.pt")
    torch.save(good | {"model": {k: v[:1] for k, v in good["model"].items()}}, tmp_path / "small.pt")
    torch.save([1], tmp_path / "list.pt")
    torch.load(tmp_path / "bomb.pt", weights_only=False)["model"].close()
    (tmp_path / "bang").unlink()                                                    # the bomb does go off where it is let
    texts = [path.read_bytes()[:n] for n in (0, 50_000, -100)] + [b"text", pickle.dumps(Bomb(tmp_path / "bang"), protocol=2)]
    for content in texts + [(tmp_path / f"{name}.pt").read_bytes() for name in ("bomb", "part", "small", "list")]:
        path.write_bytes(content)
        before = tree(tmp_path)
        assert "checkpoint.pt" in one_sentence(call("mvp", *flags, "--resume", cwd=tmp_path)) and tree(tmp_path) == before


def test_a_model_that_is_a_bomb(call, data, nothing_written, tmp_path_factory):
    model = tmp_path_factory.mktemp("bomb") / "model"
    shutil.copytree(ROOT / "mini/bert", model, ignore=shutil.ignore_patterns("*.safetensors"))
    for write in (torch.save, lambda bomb, path: path.write_bytes(pickle.dumps(bomb, protocol=2))):
        write(Bomb(nothing_written / "bang"), model / "pytorch_model.bin")
        for flag in ("--model", "--teacher"):
            assert str(model) in one_sentence(call("mvp", flag, model, "--data", data, "--out", "o", *SHORT, cwd=nothing_written))


def test_out_that_is_the_model_or_the_teacher(call, trained, data, tmp_path):
    shutil.copytree(trained("magnitude", "squad", 1)[1], tmp_path / "dense")
    before = tree(tmp_path)
    for flag in ("--model", "--teacher"):
        error = one_sentence(call("mvp", "--data", data, flag, "dense", "--out", tmp_path / "dense", *SHORT, cwd=tmp_path))
        assert flag in error and tree(tmp_path) == before


def test_a_mistake_leaves_the_run_that_is_there_alone(call, data, tmp_path):
    """A second command with the same --out and a mistake in it must not cost the first run's checkpoint."""
    flags = ["--data", str(data), "--out", "o", *SHORT]
    assert call("mvp", *flags, cwd=tmp_path, interrupt=8).code == 130
    before = tree(tmp_path)
    for wrong in (["--data", "nowhere"], ["--model", "nowhere"], ["--teacher", "nowhere"], ["--task", "tsv"]):
        one_sentence(call("mvp", *flags, *wrong, cwd=tmp_path))
        assert tree(tmp_path) == before, f"{wrong} changed {[f for f in before if tree(tmp_path).get(f) != before[f]]}"


@pytest.mark.parametrize("script", SCRIPTS)
def test_resume_with_other_flags(call, data, script, tmp_path):
    flags = ["--data", str(data), "--out", "o", *SHORT]
    assert call(script, *flags, cwd=tmp_path, interrupt=4).code == 130
    before = tree(tmp_path)
    for other in (["--seed", "1"], ["--lr", "1e-5"], ["--sparsity", "0.5"], ["--task", "qqp"], ["--steps", "13"], ["--batch_size", "4"]):
        error = one_sentence(call(script, *flags, *other, "--resume", cwd=tmp_path))
        assert other[0] in error and tree(tmp_path) == before


def test_resume_with_a_result_that_is_none(call, data, tmp_path):
    assert call("mvp", "--data", data, "--out", "o", *SHORT, cwd=tmp_path, interrupt=4).code == 130
    for text in ("", "{}", "[]", '{"line": '):
        (tmp_path / "o/result.json").write_text(text)
        assert "o" in one_sentence(call("mvp", "--data", data, "--out", "o", *SHORT, "--resume", cwd=tmp_path))


def test_resume_with_nothing(call, data, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other/letter.txt").write_text("Dear")
    for out in ("nowhere", "empty", "other"):
        error = one_sentence(call("mvp", "--data", data, "--out", out, "--resume", *SHORT, cwd=tmp_path))
        assert out in error and "--resume" in error and tree(tmp_path) == {"other/letter.txt": b"Dear"}
    assert "other" in one_sentence(call("mvp", "--data", data, "--out", "other", *SHORT, cwd=tmp_path))      # nor a new run among its files
    assert tree(tmp_path) == {"other/letter.txt": b"Dear"}


def test_a_loss_that_is_not_finite(call, data, tmp_path):
    error = one_sentence(call("magnitude", "--data", data, "--out", "o", "--lr", "1e30", *SHORT, cwd=tmp_path))
    assert "--lr" in error and ("nan" in error or "inf" in error)
    assert not (tmp_path / "o/result.json").exists()

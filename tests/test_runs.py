"""What a run leaves and prints: measured sparsity and scores, resumed runs, two processes."""
import importlib
import json
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import METHODS, ROOT, arguments, run, start, start_script
from transformers import AutoModelForQuestionAnswering, AutoModelForSequenceClassification

import common

KEYS = {"method", "task", "kept", "kept_per_layer", "metrics", "seconds", "ms_per_step", "n_train",
        "n_dev", "n_prunable", "device", "card", "precision", "peak_memory", "threads", "versions",
        "collapsed", "args", "line"}
PRETRAIN = {"rpp": ["--pretrain_steps", "4"]}


def bytes_of(folder):
    return (folder / "model.safetensors").read_bytes()


def fraction_kept(folder, kind=AutoModelForQuestionAnswering):
    """Counted in the plain transformers model, by names written here."""
    kept = total = 0
    for name, weight in kind.from_pretrained(folder).named_parameters():
        if re.search(r"encoder\.layer\.\d+\.(attention|intermediate|output).*dense\.weight"
                     r"|encoder\.layer\.\d+\.attention\.self\.(query|key|value)\.weight", name):
            kept += int((weight != 0).sum())
            total += weight.numel()
    assert total == 786432
    return kept / total


@pytest.fixture(scope="module")
def ended(data, tmp_path_factory):
    """Each script, from its command line, at 10 %."""
    folder = tmp_path_factory.mktemp("runs")

    def whole_run(method):
        flags = ["--sparsity", "0.1", *PRETRAIN.get(method, [])]
        return folder / method, start_script(method, data, folder / method, *flags)

    with ThreadPoolExecutor(2) as two_cores:
        return dict(zip(METHODS, two_cores.map(whole_run, METHODS)))


@pytest.mark.parametrize("method", METHODS)
def test_command_line(ended, method):
    out, process = ended[method]
    assert process.returncode == 0, process.stderr
    lines = process.stdout.strip().split("\n")
    assert "keeps 10.00% (prunes 90.00%)" in lines[0] and "preset mini" in lines[0]
    result = json.loads((out / "result.json").read_text())
    assert set(result) == KEYS and result["line"] == lines[-1]
    scores = "EM {EM:.1f} F1 {F1:.1f}".format(**result["metrics"])
    assert re.fullmatch(rf"RESULT {method} squad keeps 10\.00% \(prunes 90\.00%\) {scores} \| "
                        rf"8 steps \d+ s seed 0 \| {re.escape(str(out))}", lines[-1])
    assert abs(fraction_kept(out) - 0.1) < 1e-4
    assert result["kept"] == pytest.approx(fraction_kept(out))
    assert result["args"]["sparsity"] == 0.1 and result["args"]["lr"] == 5e-4
    assert result["n_prunable"] == 786432 and not (out / "checkpoint.pt").exists()
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().split("\n")[:-1]]
    assert log[-1]["step"] == 8 and {"loss", "penalty", "kept", "goal", "lr"} <= set(log[-1])
    step = r"step 8  loss [\d.]+  penalty [-+\d.e]+  goal 0.1\d*  kept [\d.]+  lr .* of about \d+"
    assert re.search(step, process.stdout)
    names = ("step", "loss", "penalty", "goal", "kept", "lr")
    assert "  ".join(f"{name} {log[-1][name]:.6g}" for name in names) in process.stdout


@pytest.mark.parametrize("method", METHODS)
def test_metrics_are_of_the_saved_model(ended, data, method):
    out, _ = ended[method]
    task = common.Data("squad", data, common.load_tokenizer(str(out)), 128)
    model = AutoModelForQuestionAnswering.from_pretrained(out)
    result = json.loads((out / "result.json").read_text())
    metrics, collapsed = task.evaluate(model)
    assert metrics == pytest.approx(result["metrics"]) and collapsed == result["collapsed"]


@pytest.fixture(scope="module")
def killed(data, tmp_path_factory):
    """Each script killed by SIGKILL once a checkpoint is there; its folder and flags."""
    folder = tmp_path_factory.mktemp("killed")

    def start_and_kill(method):
        out = folder / method
        flags = ["--sparsity", "0.1", "--checkpoint_every", "3", *PRETRAIN.get(method, [])]
        command = [sys.executable, f"{method}.py", *arguments(data, out, *flags)]
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
        checkpoint = out / ("pretraining.pt" if method == "rpp" else "checkpoint.pt")
        while not checkpoint.exists() and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not (out / "result.json").exists()
        return out, flags

    with ThreadPoolExecutor(2) as two_cores:
        return dict(zip(METHODS, two_cores.map(start_and_kill, METHODS)))


@pytest.mark.parametrize("method", METHODS)
def test_same_seed_same_bytes_and_resumed_too(ended, killed, data, method, capsys):
    out, flags = killed[method]
    run(method, data, out, *flags, "--resume")
    assert "from step" in capsys.readouterr().out
    assert bytes_of(out) == bytes_of(ended[method][0])


def test_killed_after_the_last_step(ended, data, tmp_path, monkeypatch):
    """The last checkpoint is at the last step: what is left is to save and evaluate."""
    class Killed(Exception):
        pass

    def killed(*_):
        raise Killed

    flags = ["--sparsity", "0.1", "--checkpoint_every", "4"]
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(common.Data, "evaluate", killed)
        run("mvp", data, tmp_path, *flags)
    result = run("mvp", data, tmp_path, *flags, "--resume")
    assert result["ms_per_step"] > 0 and result["args"]["out"] == str(tmp_path)
    assert bytes_of(tmp_path) == bytes_of(ended["mvp"][0])


def test_killed_before_the_first_checkpoint(data, tmp_path, capsys):
    run("magnitude", data, tmp_path, "--sparsity", "0.1")
    (tmp_path / "result.json").unlink()
    before = bytes_of(tmp_path)
    run("magnitude", data, tmp_path, "--resume", "--sparsity", "0.1")
    assert "the run goes on from step 0" in capsys.readouterr().out
    assert bytes_of(tmp_path) == before


@pytest.mark.parametrize("method, flags, word", [
    ("mvp", ["--lr", "1e-3"], "lr"), ("mvp", ["--seed", "1"], "seed"),
    ("mvp", ["--steps", "9"], "steps"), ("soft_mvp", [], "script")])
def test_resume_with_another_command(killed, data, tmp_path, method, flags, word):
    out, first_flags = killed["mvp"]
    log = (out / "log.jsonl").read_bytes()
    (tmp_path / "log.jsonl").write_bytes(log)
    with pytest.raises(SystemExit, match=f"begun with another .*{word}"):
        run(method, data, tmp_path, *first_flags, "--resume", *flags)
    assert (tmp_path / "log.jsonl").read_bytes() == log


def test_dense(data, tmp_path):
    """V = 1 is a plain loop of torch and transformers, written out here."""
    assert run("magnitude", data, tmp_path / "magnitude", "--sparsity", "1")["kept"] > 0.9999
    tokenizer = common.load_tokenizer(str(ROOT / "mini" / "bert"))
    task = common.Data("squad", data, tokenizer, 128)
    torch.manual_seed(0)
    model = AutoModelForQuestionAnswering.from_pretrained(ROOT / "mini" / "bert").train()
    for p in model.bert.embeddings.parameters():
        p.requires_grad = False
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.0, weight_decay=0.0, fused=True)
    batches = task.batches(0, 8, 0)
    for step in range(8):
        torch.manual_seed(step)
        rise, fall = (step + 1) / max(1, 0.05 * 8), (8 - step) / (8 - 0.05 * 8)
        optimizer.param_groups[0]["lr"] = 5e-4 * min(1.0, rise, fall)
        optimizer.zero_grad()
        model(**task.collate(next(batches))).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    saved = AutoModelForQuestionAnswering.from_pretrained(tmp_path / "magnitude").state_dict()
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(saved[name], weight, rtol=1e-4, atol=1e-5)


def test_tasks_of_one_text_and_of_two(data, tmp_path):
    result = run("soft_mvp", data, tmp_path / "tsv", "--task", "tsv", "--sparsity", "0.2")
    assert abs(fraction_kept(tmp_path / "tsv", AutoModelForSequenceClassification) - 0.2) < 1e-4
    labels = json.loads((tmp_path / "tsv" / "config.json").read_text())["id2label"]
    assert labels == {"0": "few", "1": "many"} and set(result["metrics"]) == {"acc"}
    result = run("mgpp", data, tmp_path / "mnli", "--task", "mnli", "--sparsity", "0.2")
    assert set(result["metrics"]) == {"acc", "acc_mm"} and result["n_dev"] == 128


@pytest.mark.parametrize("method, own, shared", [
    ("mvp", ["--scope", "global"], []), ("magnitude", ["--scope", "global"], []),
    ("mgpp", ["--mix", "1"], []), ("rpp", ["--nip"], PRETRAIN["rpp"])])
def test_own_flags_meet_the_goal(data, tmp_path, method, own, shared):
    result = run(method, data, tmp_path / "own", "--sparsity", "0.1", *shared, *own)
    assert result["kept"] == pytest.approx(0.1, abs=1e-4)
    run(method, data, tmp_path / "plain", "--sparsity", "0.1", *shared)
    assert bytes_of(tmp_path / "own") != bytes_of(tmp_path / "plain")


@pytest.mark.parametrize("method, flags", [
    ("soft_mvp", ["--penalty", "100"]), ("l0", ["--penalty", "100"]),
    ("rpp", ["--gamma", "1e-3", *PRETRAIN["rpp"]])])
def test_open_loops_have_no_goal(data, tmp_path, method, flags):
    result = run(method, data, tmp_path, *flags)
    assert result["args"]["goal"] is None and "MISSED" not in result["line"]


def test_control_of_rpp(data, tmp_path):
    """V = 1 reads the text and prunes nothing."""
    result = run("rpp", data, tmp_path, "--sparsity", "1", *PRETRAIN["rpp"])
    assert result["kept"] > 0.9999 and (tmp_path / "support" / "model.safetensors").exists()


def test_collapsed_runs_say_so(data, tmp_path, capsys):
    """One class for every example: a run of one step is that, or the other way about, by chance."""
    result = run("magnitude", data, tmp_path / "one", "--task", "tsv", "--sparsity", "0.01")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "one")
    task = common.Data("tsv", data, common.load_tokenizer(str(tmp_path / "one")), 128)
    guesses = {int(model(**task.collate([f], targets=False)).logits.argmax()) for f in
               task.dev["dev"]}
    assert result["collapsed"] == (len(guesses) == 1)
    assert ("COLLAPSED" in capsys.readouterr().out.strip().split("\n")[-1]) == result["collapsed"]


def test_teacher(ended, data, tmp_path):
    teacher, _ = ended["magnitude"]
    run("soft_mvp", data, tmp_path, "--sparsity", "0.1", "--teacher", teacher)
    assert bytes_of(tmp_path) != bytes_of(ended["soft_mvp"][0])


def test_support_serves_another_task(ended, data, tmp_path):
    support, _ = ended["rpp"]
    run("rpp", data, tmp_path, "--task", "tsv", "--support", support)
    ours = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    theirs = AutoModelForQuestionAnswering.from_pretrained(support)
    for name, layer in common.prunable(ours).items():
        assert torch.equal(layer.weight == 0, common.prunable(theirs)[name].weight == 0)
    words = arguments(data, tmp_path / "next", "--task", "tsv", "--support", tmp_path)
    process = start([sys.executable, "rpp.py", *words])
    assert process.returncode == 1 and "holds no support" in process.stderr


def test_missed_goal(data, tmp_path, monkeypatch, capsys):
    script = importlib.import_module("magnitude")
    right = script.update_masks
    monkeypatch.setattr(script, "update_masks", lambda m, s, v, scope: right(m, s, 2 * v, scope))
    monkeypatch.setattr(script, "schedule", lambda *_: 0.3)
    with pytest.raises(SystemExit) as error:
        run("magnitude", data, tmp_path, "--sparsity", "0.1")
    assert error.value.code == 3
    assert "MISSED the goal of 10.00%" in capsys.readouterr().out.strip().split("\n")[-1]
    assert fraction_kept(tmp_path) == pytest.approx(0.2, abs=1e-3)


def test_scores_have_their_own_rate_and_no_decay(data, tmp_path, monkeypatch):
    seen = []
    real = torch.optim.AdamW

    def watched(groups, **options):
        optimizer = real(groups, **options)
        seen.append(optimizer)
        return optimizer

    monkeypatch.setattr(torch.optim, "AdamW", watched)
    for method, rate in (("mvp", 1e-2), ("soft_mvp", 1e-2), ("l0", 1e-1)):
        run(method, data, tmp_path / method, "--sparsity", "0.1")
        weights, scores = seen[-1].param_groups
        assert (weights["initial_lr"], scores["initial_lr"]) == (5e-4, rate)
        assert scores["lr"] / scores["initial_lr"] == pytest.approx(weights["lr"] / 5e-4)
        assert weights["weight_decay"] == scores["weight_decay"] == 0.0


def test_two_processes(data, tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    flags = ["--sparsity", "0.1", *PRETRAIN["rpp"]]
    process = start([*torchrun, "rpp.py", *arguments(data, tmp_path, *flags)])
    assert process.returncode == 0, process.stderr
    assert process.stdout.count("RESULT") == 1
    assert abs(fraction_kept(tmp_path) - 0.1) < 1e-4


def test_two_processes_train_as_one(data, tmp_path):
    """mini/'s BERT has no dropout, so two halves of a batch make the same step as the whole."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    flags = ["--sparsity", "1"]
    process = start([*torchrun, "magnitude.py", *arguments(data, tmp_path / "two", *flags)])
    assert process.returncode == 0, process.stderr
    run("magnitude", data, tmp_path / "one", *flags)
    states = []
    for name in ("one", "two"):
        model = AutoModelForQuestionAnswering.from_pretrained(tmp_path / name)
        states.append(model.state_dict())
    apart = [(states[0][key] - states[1][key]).abs().flatten() for key in states[0]
             if not key.endswith("key.bias")]           # its gradient is rounding alone
    assert (torch.cat(apart) > 1e-4).float().mean() < 1e-3

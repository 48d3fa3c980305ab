"""Reweighted proximal pruning: its equations by brute force and numpy, its moments and accuracies by plain transformers, its runs as a
user sees them. What all scripts have in common is tested for it in test_scripts.py."""
import json
import os
import shutil
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.torch
import torch
import transformers

import common
import tasks
import rpp
from conftest import ROOT, OnGPU
from test_scripts import logged, nonzero, one_sentence, same_bytes, tree, weights_of

SHORT = ["--steps", "6", "--batch_size", "4"]


def run(data, out, *flags):
    """main() in this process, on the mini preset, in 6 steps of 4 unless flags say otherwise."""
    return rpp.main(rpp.flags().parse_args(["--data", str(data), "--out", str(out), "--preset", "mini", "--device", "cpu", *SHORT, *map(str, flags)]))


def zeros(folder):
    return {name: w == 0 for name, w in weights_of(folder).items()}


def same_zeros(a, b):
    return all(np.array_equal(z, zeros(b)[name]) for name, z in zeros(a).items())


# ---- the equations

POINTS = [-2.0, -1.0, -0.75, -0.5, -0.1, -1e-8, -0.0, 0.0, 1e-8, 0.1, 0.25, 0.5, 0.75, 1.0, 2.0]
THRESHOLDS = [0.0, 1e-8, 0.1, 0.25, 0.5, 0.75, 1.0, 3.0]                             # with many |a| equal to the threshold


def test_prox_by_brute_force():
    """argmin_w (w - a)^2 / 2 + t |w|: on a grid of step 1e-3 that holds 0 and a, no point is better, and the best one is as near as the grid is fine."""
    pairs = [(a, t) for a in POINTS for t in THRESHOLDS]
    pairs += [tuple(x) for x in np.random.default_rng(0).normal(size=(300, 2)) * [1, 0.5] if x[1] >= 0]
    a, t = (np.array(x) for x in zip(*pairs))
    got = rpp.prox(torch.tensor(a), torch.tensor(t)).numpy()
    objective = lambda w, a, t: (w - a) ** 2 / 2 + t * np.abs(w)
    for a, t, w in zip(a, t, got):
        grid = np.r_[np.arange(-4, 4, 1e-3), 0.0, a]
        best = grid[np.argmin(objective(grid, a, t))]
        assert objective(w, a, t) <= objective(best, a, t) + 1e-15 and abs(w - best) <= 1e-3, (a, t, w, best)
        assert (w == 0) == (abs(a) <= t) and not (w == 0 and t > 0 and np.signbit(w)), (a, t, w)     # a tie is a zero, and never -0


def test_prox_of_matrices_is_elementwise():
    a, t = np.random.default_rng(1).normal(size=(2, 5, 7)).astype(np.float32)
    t = np.abs(t)
    np.testing.assert_allclose(rpp.prox(torch.tensor(a), torch.tensor(t)).numpy(), np.sign(a) * np.maximum(np.abs(a) - t, 0), atol=1e-7)


@pytest.mark.parametrize("p", [1, 2, 5])
def test_reweight(p):
    w = np.array([[0.0, -0.0, 1e-9, 0.5], [-0.5, 2.0, -1.0, 0.03]])
    alpha = rpp.reweight(torch.tensor(w), p, 1e-9).numpy()
    np.testing.assert_allclose(alpha, 1 / (np.abs(w) ** p + 1e-9), rtol=1e-12)
    assert alpha[0, 0] == alpha[0, 1] == alpha.max() and alpha[0, 3] == alpha[1, 0] and alpha[1, 1] < 1 / 2 ** p + 1e-9
    if p == 1:
        np.testing.assert_allclose((alpha * np.abs(w))[w != 0], [0.5, 1, 1, 1, 1, 1], atol=1e-6)     # a count of weights; 1e-9 is as small as eps


@pytest.mark.parametrize("place", [torch.Tensor, OnGPU])
@pytest.mark.parametrize("v", [1e-9, 0.003, 0.1, 0.5, 0.97, 1.0])
def test_largest_to_go(v, place):
    xs = [np.random.default_rng(6).integers(0, 5000, size=s) / 1000 for s in ((40, 50), (7, 7))]
    rising = np.sort(np.concatenate([x.flatten() for x in xs]))
    go = len(rising) - max(1, round(v * len(rising)))
    assert rpp.largest_to_go([torch.tensor(x).as_subclass(place) for x in xs], v) == (rising[go - 1] if go else 0)


@pytest.mark.parametrize("v", [1e-9, 0.003, 0.1, 0.5, 0.97, 1.0])
@pytest.mark.parametrize("held", [0.0, 0.8])
def test_gamma_is_the_one_that_leaves_v(v, held):
    """Some weights zero before (held of them, those with the largest alpha), three matrices of different alpha; counted after the step."""
    rng = np.random.default_rng(2)
    a = [rng.normal(size=s) * scale for s, scale in (((40, 50), 1), ((30, 20), 0.1), ((7, 7), 5))]
    for x in a:
        x[rng.random(x.shape) < held] = 0
    alpha = [1 / (np.abs(x) + rng.random(x.shape) * 0.1 + 1e-9) for x in a]
    n, lr = sum(x.size for x in a), 2e-4
    gamma = rpp.solve_gamma([torch.tensor(x) for x in a], [torch.tensor(y) for y in alpha], v, lr)
    left = sum(int((np.sign(x) * np.maximum(np.abs(x) - lr * gamma * y, 0) != 0).sum()) for x, y in zip(a, alpha))
    before = sum(int((x != 0).sum()) for x in a)
    assert abs(left - min(max(1, round(v * n)), before)) <= 1 and gamma >= 0                # one weight may be left by rounding
    assert gamma == 0 or v < 1


def test_gamma_of_ties_never_keeps_more():
    a, alpha = torch.ones(10, 10), torch.ones(10, 10)
    a[0] = 2.0
    gamma = rpp.solve_gamma([a], [alpha], 0.3, 0.5)
    assert gamma == 2.0 and int((rpp.prox(a, 0.5 * gamma * alpha) != 0).sum()) == 10          # those tied go together


# ---- the proximal step is no part of Adam's

class Stop(Exception):
    pass


def one_step(monkeypatch, data, out, *flags):
    """The pre-training's first step: {parameter: (exp_avg, exp_avg_sq, value after it)}."""
    seen = {}

    def checkpoint(self, step, model, optimizer, state):
        names = {id(p): name for name, p in model.named_parameters()}
        seen.update({names[id(p)]: (s["exp_avg"].clone(), s["exp_avg_sq"].clone(), p.detach().clone()) for p, s in optimizer.state.items()})
        raise Stop
    monkeypatch.setattr(common.Run, "checkpoint", checkpoint)
    with pytest.raises(Stop):
        run(data, out, *flags)
    return seen


def test_the_l1_term_never_enters_adams_moments(data, tmp_path, monkeypatch, capsys):
    """The same first step with a penalty that prunes, one that does not, and none (--nip): the same moments, those of MLM + NSP alone by
    plain transformers; and the weights differ by the soft threshold alone."""
    hard = one_step(monkeypatch, data, tmp_path / "a", "--gamma", 30)
    soft = one_step(monkeypatch, data, tmp_path / "b", "--gamma", 1e-30)
    nip = one_step(monkeypatch, data, tmp_path / "c", "--nip")
    matrices = [k for k in hard if ".encoder.layer." in k and hard[k][0].ndim == 2]
    assert len(matrices) == 24 and hard.keys() == soft.keys() == nip.keys()
    for k in hard:
        assert all(torch.equal(hard[k][i], soft[k][i]) and torch.equal(hard[k][i], nip[k][i]) for i in (0, 1)), k
    # plain transformers: the gradient of its own loss, clipped to 1 -> moments after one step, 0.1 g and 0.001 g^2; lr of the first step
    tokenizer = transformers.AutoTokenizer.from_pretrained(ROOT / "mini/bert")
    model = transformers.BertForPreTraining.from_pretrained(ROOT / "mini/bert").train()
    documents = tasks.read_corpus(data / "corpus.txt", tokenizer)
    hyper = rpp.HYPER["mini"]["*"]["pretrain"]
    train = [d for i, d in enumerate(documents) if i % 20]
    model(**tasks.mlm_nsp_batch(train, tokenizer, 4, hyper["length"], np.random.default_rng([0, 0]))).loss.backward()
    norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm().item()
    lr = hyper["lr"] * common.lr_factor(0, 6, hyper["warmup"])
    for k, p in model.named_parameters():
        g = p.grad.numpy().astype(np.float64) * min(1.0, 1.0 / norm)
        np.testing.assert_allclose(hard[k][0], 0.1 * g, atol=2e-7)
        np.testing.assert_allclose(hard[k][1], 0.001 * g ** 2, atol=1e-8)
        after = soft[k][2].numpy().astype(np.float64)
        want = np.sign(after) * np.maximum(np.abs(after) - lr * 30, 0) if k in matrices else after          # alpha = 1 in the first round
        np.testing.assert_allclose(hard[k][2], want, atol=1e-6)
    assert 0.1 < np.mean([(hard[k][2] == 0).float().mean() for k in matrices]) < 0.9


# ---- what is kept

@pytest.mark.parametrize("v, steps", [(0.003, 1), (0.02, 2), (0.6, 5), (0.97, 3)])
def test_the_goal_is_met_by_any_run(data, tmp_path, capsys, v, steps):
    assert run(data, tmp_path / "o", "--sparsity", v, "--steps", steps, "--batch_size", 2, "--task", "qqp") == 0
    left, n = nonzero(tmp_path / "o/support")
    assert abs(left - round(v * n)) <= 3 and nonzero(tmp_path / "o") == (left, n)


def spied(data, out, monkeypatch, *flags):
    """[(step, zeros as one row, goal)] after every step of the pre-training."""
    rows, prunable, models = [], common.prunable, []

    def log(self, step, loss, penalty, kept, goal, lr):
        if self.phase == "pre-training":
            rows.append((step, np.concatenate([(m.weight.detach().numpy() == 0).reshape(-1) for m in models[-1].values()]), goal))
    monkeypatch.setattr(common, "prunable", lambda model: (models.append(prunable(model)), models[-1])[1])
    monkeypatch.setattr(common.Run, "log", log)
    assert run(data, out, *flags) == 0
    return rows


def test_the_share_falls_on_the_cubic_and_rests(data, tmp_path, monkeypatch, capsys):
    rows = spied(data, tmp_path / "o", monkeypatch, "--sparsity", 0.1, "--steps", 20, "--rounds", 3, "--task", "qqp", "--batch_size", 2)
    last = round(0.7 * 20)
    for step, zero, goal in rows:
        want = 0.1 + 0.9 * (1 - min(1, step / last)) ** 3
        assert abs(goal - want) < 1e-12 and abs(1 - zero.mean() - want) < 5 / zero.size
        if step > last:
            assert np.array_equal(zero, rows[last - 1][1])                                  # it rests: the same zeros


def test_a_zero_may_come_back_until_its_round_ends(data, tmp_path, monkeypatch, capsys):
    """--gamma, so that the threshold does not rise to hold them; two rounds, of which the first ends with step 5."""
    rows = spied(data, tmp_path / "o", monkeypatch, "--gamma", 0.5, "--steps", 14, "--rounds", 2, "--task", "qqp", "--batch_size", 4)
    back = lambda one, other: int((rows[one - 1][1] & ~rows[other - 1][1]).sum())            # zero after the one step, no more after the other
    assert back(2, 3) > 100 and back(4, 5) > 100
    assert [back(5, step) for step in range(6, 15)] == [0] * 9


def test_nip_goes_down_in_stairs_and_zeros_stay(data, tmp_path, monkeypatch, capsys):
    rows = spied(data, tmp_path / "o", monkeypatch, "--sparsity", 0.4, "--steps", 20, "--nip", "--task", "qqp", "--batch_size", 2)
    kept = [1 - zero.mean() for _, zero, _ in rows]
    want = [1 - 0.1 * int(6 * min(1, step / 14) + 1e-9) for step, _, _ in rows]
    np.testing.assert_allclose(kept, want, atol=1e-5)
    assert all((before[1] & ~after[1]).sum() == 0 for before, after in zip(rows, rows[1:]))


def test_open_loop(trained):
    """--gamma: what is kept is what comes out, and more of gamma keeps less."""
    (gentle, a), (hard, b) = (trained("rpp", "squad", 0.1, *SHORT, "--gamma", g) for g in ("1e-9", "3"))
    assert gentle.code == hard.code == 0 and "no goal" in hard.out and "goal 10" not in hard.out
    assert "keeps 10.00% (prunes 90.00%) of the encoder's weights if --gamma finds so many |" in hard.out.splitlines()[0]
    assert nonzero(a)[0] / nonzero(a)[1] > 0.999 > 0.9 > nonzero(b)[0] / nonzero(b)[1]
    result = json.loads((b / "result.json").read_text())
    assert result["sparsity"] is None and result["pretraining"]["kept"] == result["kept"]


def test_open_loop_has_no_need_of_a_goal(call, data, tiny, tmp_path):
    """--gamma with --sparsity 1, which alone is dense fine-tuning: there is a pre-training, and it prunes."""
    ended = call("rpp", "--gamma", 30, "--sparsity", 1, "--model", tiny, "--data", data, "--out", "o", *SHORT, cwd=tmp_path)
    assert ended.code == 0 and "pre-training on " in ended.out and "keeps 100.00% (prunes 0.00%) of the encoder's weights if --gamma " in ended.out
    result, (left, n) = json.loads((tmp_path / "o/result.json").read_text()), nonzero(tmp_path / "o")
    assert left < 0.99 * n and nonzero(tmp_path / "o/support") == (left, n) and (result["sparsity"], result["kept"]) == (None, left / n)


def test_two_phases_of_their_own_length(trained):
    """--steps holds in both, unless --pretrain_steps sets the first."""
    for flags, first in (((), 6), (("--pretrain_steps", 9), 9)):
        ended, out = trained("rpp", "squad", 0.1, *SHORT, *flags)
        assert ended.code == 0 and f": {first} steps of 4 pairs" in ended.out and "RESULT" in ended.out.splitlines()[-1]
        told = json.loads((out / "result.json").read_text())
        assert (told["steps"], told["pretraining"]["steps"]) == (6, first) and nonzero(out)[0] == round(0.1 * nonzero(out)[1])


# ---- the support

def test_fine_tuning_keeps_the_support(trained):
    """The zeros before and after, bit for bit; all are +0; and the other weights did learn."""
    _, out = trained("rpp", "squad", 0.1, *SHORT)
    before, after = weights_of(out / "support"), weights_of(out)
    for name, w in before.items():
        zero = w == 0
        assert np.array_equal(zero, after[name] == 0) and not after[name][zero].tobytes().strip(b"\0"), name
        assert zero.any() and (w != after[name])[~zero].mean() > 0.5, name
    assert not trained("rpp", "squad", 1)[1].joinpath("support").exists()


def test_accuracies_are_those_of_the_saved_support(trained, data):
    """Printed, and stored in result.json; found again with plain transformers on the same held-out pairs."""
    ended, out = trained("rpp", "squad", 0.1, *SHORT)
    told = json.loads((out / "result.json").read_text())["pretraining"]
    tokenizer, hyper = transformers.AutoTokenizer.from_pretrained(out / "support"), rpp.HYPER["mini"]["*"]["pretrain"]
    held = tasks.read_corpus(data / "corpus.txt", tokenizer)[::20]
    batch = tasks.mlm_nsp_batch(held, tokenizer, len(held), hyper["length"], np.random.default_rng([0]))
    assert len(held) == 15
    for folder, when in ((ROOT / "mini/bert", "before"), (out / "support", "after")):
        model = transformers.BertForPreTraining.from_pretrained(folder).eval()
        with torch.no_grad():
            got = model(**{k: x for k, x in batch.items() if "label" not in k})
        asked = batch["labels"] != -100
        want = {"MLM": (got.prediction_logits.argmax(-1) == batch["labels"])[asked],
                "NSP": got.seq_relationship_logits.argmax(-1) == batch["next_sentence_label"]}
        want = {name: 100 * float(x.float().mean()) for name, x in want.items()}
        assert told[when].keys() == want.keys() and all(abs(told[when][k] - want[k]) < 1e-4 for k in want)
        line = next(line for line in ended.out.splitlines() if line.startswith(f"{when} pruning: "))
        assert f"MLM {want['MLM']:.1f} NSP {want['NSP']:.1f}" in line
    assert told["before"]["MLM"] > told["after"]["MLM"] and told["kept"] == nonzero(out)[0] / nonzero(out)[1]


def test_one_support_serves_every_task(trained, tmp_path):
    _, squad = trained("rpp", "squad", 0.1, *SHORT)
    plain = shutil.copytree(squad, tmp_path / "plain", ignore=shutil.ignore_patterns("support"))          # fine-tuned, support not there
    before = tree(squad)
    for task, folder in (("mnli", squad), ("qqp", squad / "support"), ("mnli", plain), ("squad", squad)):
        ended, out = trained("rpp", task, 0.03, *SHORT, "--support", str(folder))
        assert ended.code == 0 and ended.err == "" and same_zeros(out, squad) and not (out / "support").exists()
        assert sum("10.00%" in line and "--sparsity 0.03" in line for line in ended.out.splitlines()) == 1
        result = json.loads((out / "result.json").read_text())
        assert result["sparsity"] == result["kept"] and list(logged(out)) == ["fine-tuning"]
    assert same_bytes(out, squad) and tree(squad) == before                                 # the support itself, fine-tuned once more on squad
    assert not same_bytes(trained("rpp", "mnli", 0.03, *SHORT, "--support", str(squad))[1], trained("rpp", "mnli", 0.03, *SHORT, "--support", str(plain))[1])


def test_support_that_is_none(call, trained, data, tmp_path, monkeypatch):
    _, squad = trained("rpp", "squad", 0.1, *SHORT)
    config = transformers.BertConfig.from_pretrained(ROOT / "mini/bert")
    for name, change in (("fewer layers", dict(num_hidden_layers=2)), ("narrower", dict(intermediate_size=64)), ("other words", dict(vocab_size=1400))):
        other = transformers.BertForPreTraining(transformers.BertConfig.from_dict(config.to_dict() | change))
        other.bert.encoder.layer[0].output.dense.weight.data[0] = 0
        other.save_pretrained(tmp_path / name)
    (tmp_path / "a file").write_text("x")
    (tmp_path / "empty").mkdir()
    before = tree(tmp_path)
    for name in ("nowhere", "a file", "empty", ROOT / "mini/bert", "fewer layers", "narrower", "other words"):
        error = one_sentence(call("rpp", "--support", name, "--data", data, "--out", "o", *SHORT, cwd=tmp_path))
        assert str(name) in error and tree(tmp_path) == before
    for more in (["--nip"], ["--gamma", "1"], ["--rounds", "2"], ["--corpus", "x"]):
        assert "--support" in one_sentence(call("rpp", "--support", squad, *more, "--data", data, "--out", "o", *SHORT, cwd=tmp_path))
    shutil.copytree(squad, tmp_path / "squad")
    for folder in ("squad", "squad/support"):
        assert "--support" in one_sentence(call("rpp", "--support", folder, "--data", data, "--out", "squad", *SHORT, cwd=tmp_path))
    assert tree(tmp_path / "squad") == tree(squad)


# ---- mistakes, and models without heads

def test_corpus_that_is_none(call, data, tiny, tmp_path):
    (tmp_path / "empty.txt").write_text("\n\n")
    (tmp_path / "one.txt").write_text("One line.\nAnother line.\n")
    (tmp_path / "three.txt").write_text("A line.\nAnother.\n\nA third.\n\n\nA fourth.\nAnd more.\n")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9\n\nb\n\nc\n\nd\n")
    before = tree(tmp_path)
    for name in ("nowhere.txt", "empty.txt", "one.txt", "three.txt", "latin.txt", "."):
        error = one_sentence(call("rpp", "--corpus", name, "--data", data, "--out", "o", *SHORT, cwd=tmp_path))
        assert name in error and ("has 3 documents" in error) == (name == "three.txt") and tree(tmp_path) == before
    error = one_sentence(call("rpp", "--nip", "--gamma", "1", "--data", data, "--out", "o", *SHORT, cwd=tmp_path))
    assert "--nip" in error and "--gamma" in error and tree(tmp_path) == before
    (tmp_path / "four.txt").write_text((tmp_path / "three.txt").read_text() + "\nThe fourth document.\n")             # two to learn from, two held out
    ended = call("rpp", "--corpus", "four.txt", "--model", tiny, "--data", data, "--out", "o", *SHORT, cwd=tmp_path)
    assert ended.code == 0 and "on 2 held-out pairs" in ended.out


def test_paper_preset_wants_a_corpus(call, data, tmp_path):
    bare = shutil.copytree(data, tmp_path / "data", ignore=shutil.ignore_patterns("corpus.txt"))
    before = tree(tmp_path)
    error = one_sentence(call("rpp", "--preset", "paper", "--model", ROOT / "mini/bert", "--data", bare, "--out", "o", "--device", "cpu", *SHORT, cwd=tmp_path))
    assert "--corpus FILE" in error and "--preset mini" in error and tree(tmp_path) == before


def test_heads_that_are_not_there_are_started_anew(call, data, tmp_path):
    tensors = safetensors.torch.load_file(ROOT / "mini/bert/model.safetensors")
    for name, lacks in (("both", ("cls.", "bert.pooler.")), ("nsp", ("cls.seq_relationship.",))):
        shutil.copytree(ROOT / "mini/bert", tmp_path / name)
        left = {k: x for k, x in tensors.items() if not k.startswith(lacks)}
        safetensors.torch.save_file(left, tmp_path / name / "model.safetensors", metadata={"format": "pt"})
        ended = call("rpp", "--model", name, "--data", data, "--out", f"{name} out", "--steps", 1, "--batch_size", 2, cwd=tmp_path)
        assert ended.code == 0 and ("no MLM head" in ended.out) == (name == "both") and "no NSP head" in ended.out
        model = transformers.BertForPreTraining.from_pretrained(tmp_path / f"{name} out/support")
        assert model.cls.predictions.decoder.weight is model.bert.embeddings.word_embeddings.weight


# ---- stopped, killed, started anew

KILL = r'''
import os, signal
import common

folder_whole = common.folder_whole


def half(part, write):
    write(part)
    os.remove(os.path.join(part, "config.json"))
    os.kill(os.getpid(), signal.SIGKILL)


common.folder_whole = lambda path, write=None: folder_whole(path, write and (lambda part: half(part, write)))
'''


def is_whole(out, whole):
    """A run that was stopped and went on ended as the one never stopped: in bytes, in what it tells, and in its log."""
    assert same_bytes(out, whole) and same_bytes(out / "support", whole / "support")
    assert json.loads((out / "result.json").read_text())["pretraining"] == json.loads((whole / "result.json").read_text())["pretraining"]
    assert not [f for f in os.listdir(out) if f.endswith((".part", ".pt"))]
    assert all(steps == sorted(set(steps)) and steps[-1] == 6 for steps in logged(out).values()) and len(logged(out)) == 2


def test_killed_while_the_support_is_written(call, fork, trained, data, tmp_path):
    flags = ["--task", "squad", "--sparsity", "0.1", "--data", str(data), "--out", "o", *SHORT]
    dead = fork("rpp", *flags, cwd=tmp_path, patch=KILL)
    assert dead.code == -signal.SIGKILL and (tmp_path / "o/support.part").exists() and not (tmp_path / "o/support").exists()
    ended = call("rpp", *flags, "--resume", cwd=tmp_path)
    assert ended.code == 0 and "before pruning" in ended.out
    is_whole(tmp_path / "o", trained("rpp", "squad", 0.1, *SHORT)[1])


@pytest.mark.parametrize("saved", [(), ("pre-training",), ("pre-training", "fine-tuning")], ids=["no checkpoint", "one of pre-training", "one of either"])
def test_stopped_in_fine_tuning(trained, data, tmp_path, monkeypatch, capsys, saved):
    """The pre-training is not done again, whichever checkpoints were written, and its log lines are still there where one was."""
    checkpoint = common.Run.checkpoint

    def stopping(self, step, **parts):
        if self.phase in saved and step == 3:
            self.next_write = 0.0
            checkpoint(self, step, **parts)
        if self.phase == "fine-tuning" and step == 5:
            raise Stop
    with monkeypatch.context() as patched:
        patched.setattr(common.Run, "checkpoint", stopping)
        patched.setattr(common.Run, "seconds", lambda self: 0.0)
        with pytest.raises(Stop):
            run(data, tmp_path / "o", "--sparsity", 0.1)
        assert (tmp_path / "o/support").exists() and (tmp_path / "o/checkpoint.pt").exists() == bool(saved)
    capsys.readouterr()
    assert run(data, tmp_path / "o", "--sparsity", 0.1, "--resume") == 0
    said = capsys.readouterr().out
    assert "before pruning" not in said and ("going on from step 3\n" in said) == ("fine-tuning" in saved)
    if saved:
        is_whole(tmp_path / "o", trained("rpp", "squad", 0.1, *SHORT)[1])
    assert same_bytes(tmp_path / "o", trained("rpp", "squad", 0.1, *SHORT)[1])


def test_a_mistake_leaves_the_support_alone_and_a_new_start_does_not(call, trained, data, tmp_path):
    shutil.copytree(trained("rpp", "squad", 0.1, *SHORT)[1], tmp_path / "o")
    before, flags = tree(tmp_path), ["--data", str(data), "--out", "o", *SHORT]
    for wrong in (["--corpus", "nowhere"], ["--support", "nowhere"], ["--teacher", "nowhere"], ["--data", "nowhere"]):
        one_sentence(call("rpp", *flags, *wrong, cwd=tmp_path))
        assert tree(tmp_path) == before
    assert call("rpp", *flags, "--sparsity", "0.5", cwd=tmp_path, interrupt=3).code == 130
    assert not (tmp_path / "o/support").exists()                                            # it was that of other flags
    assert call("rpp", *flags, "--sparsity", "1", cwd=tmp_path).code == 0 and not (tmp_path / "o/support").exists()


# ---- what tasks.py has for it: held-out text, a folder that is whole

def corpus_of(tmp_path, rank=0, world=1):
    """60 documents of one word each, every one its own; the Corpus, and its words by document."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(ROOT / "mini/bert")
    words = [w for w in sorted(tokenizer.get_vocab()) if w.isalpha() and len(w) > 3][:60]
    (tmp_path / "corpus.txt").write_text("\n\n".join(f"{w} {w} {w}\n{w} {w}" for w in words))
    given = SimpleNamespace(data=tmp_path, rank=rank, world=world, device="cpu", args=SimpleNamespace(preset="paper", seed=0))
    return common.Corpus(given, None, tokenizer, 8, 32), tokenizer.convert_tokens_to_ids(words)


def tokens(batch):
    return set(torch.where(batch["labels"] == -100, batch["input_ids"], batch["labels"]).flatten().tolist())


def test_held_out_documents_are_never_trained_on(tmp_path):
    corpus, ids = corpus_of(tmp_path)
    held, train = set(ids[::20]), set(ids) - set(ids[::20])
    seen = set().union(*(tokens(corpus.batch(step)) for step in range(60)))
    assert not seen & held and seen & train == train
    assert corpus.pairs == 3 and set().union(*map(tokens, corpus.held)) & set(ids) <= held


def test_two_processes_share_the_batch(tmp_path):
    whole, parts = corpus_of(tmp_path)[0].batch(5), [corpus_of(tmp_path, rank, 2)[0].batch(5) for rank in (0, 1)]
    for key, x in whole.items():
        assert len(x) == 8 and all(torch.equal(x[rank::2], part[key]) for rank, part in enumerate(parts))


def test_a_batch_without_a_word_to_guess_has_a_finite_loss():
    model = transformers.BertForPreTraining.from_pretrained(ROOT / "mini/bert")
    ids, none = torch.tensor([[2, 7, 3, 8, 3]]), torch.full((1, 5), -100)
    loss, words, order = common.PreTraining(model)(input_ids=ids, labels=none, next_sentence_label=torch.tensor([1]))
    loss.backward()
    assert torch.isfinite(loss) and len(words) == 0 and len(order) == 1 and all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_folder_whole(tmp_path):
    def write(part, stop=False):
        part.mkdir()
        (part / "a").write_text("new")
        if stop:
            raise Stop
    common.folder_whole(tmp_path / "f")
    common.folder_whole(tmp_path / "f", write)
    with pytest.raises(Stop):
        common.folder_whole(tmp_path / "g", lambda part: write(part, stop=True))
    assert tree(tmp_path) == {"f/a": b"new", "g.part/a": b"new"}
    common.folder_whole(tmp_path / "g", write)
    common.folder_whole(tmp_path / "f", lambda part: (write(part), (part / "a").write_text("newer")))
    assert tree(tmp_path) == {"f/a": b"newer", "g/a": b"new"}
    common.folder_whole(tmp_path / "f")
    assert tree(tmp_path) == {"g/a": b"new"}

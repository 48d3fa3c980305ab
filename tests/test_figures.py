"""figures/draw.py: the data of its figures against hand-made arrays and folders, its looks inside short runs, and, where matplotlib is, the PNGs."""
import importlib.util
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

import mgpp
import mvp

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "figures/draw.py"
spec = importlib.util.spec_from_file_location("draw", SCRIPT)
draw = importlib.util.module_from_spec(spec)
spec.loader.exec_module(draw)


def model(rng, layers=2, width=8, kept=1.0, prefix="bert."):
    """Tensors of a BERT so small, named as in a saved model, with other tensors around them."""
    held = {f"{prefix}embeddings.word_embeddings.weight": rng.normal(size=(5, width)), "qa_outputs.weight": rng.normal(size=(2, width))}
    for layer in range(layers):
        for kind in draw.KINDS:
            shape = {"intermediate.dense.weight": (4 * width, width), "output.dense.weight": (width, 4 * width)}.get(kind, (width, width))
            held[f"{prefix}encoder.layer.{layer}.{kind}"] = rng.normal(size=shape) * (rng.random(shape) < kept)
            held[f"{prefix}encoder.layer.{layer}.{kind.replace('weight', 'bias')}"] = rng.normal(size=shape[0])
    return {name: x.astype(np.float32) for name, x in held.items()}


def saved(folder, tensors):
    folder.mkdir(parents=True, exist_ok=True)
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    return folder


def run(folder, method, v, f1, seed=0, task="squad", tensors=None, **flags):
    """A run's folder, as common.report leaves it."""
    folder.mkdir(parents=True)
    (folder / "result.json").write_text(json.dumps(dict(method=method, task=task, sparsity=v, kept=v, seed=seed, metrics={"EM": 0.0, "F1": f1})))
    given = dict(task=task, sparsity=v, preset="mini", teacher=None, scope="local", mix=None, seed=seed) | flags
    (folder / "log.jsonl").write_text(json.dumps({"args": given}) + '\n{"step": 1}\n')
    (folder / "config.json").write_text(json.dumps(dict(num_attention_heads=2, num_hidden_layers=2)))
    return saved(folder, tensors) if tensors else folder


def test_nothing_heavy_is_imported_before_it_is_needed():
    """--help works without matplotlib, and so does this file."""
    code = f"import runpy, sys; runpy.run_path({str(SCRIPT)!r}); print({{'matplotlib', 'torch', 'safetensors', 'PIL'}} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "set()"


def test_one_palette():
    names, colours, marks = zip(*draw.METHODS.values())
    assert list(draw.METHODS) == ["magnitude", "mvp", "soft_mvp", "l0", "rpp", "mgpp"]
    assert len(set(names)) == len(set(colours)) == len(set(marks)) == 6


def test_the_papers_points():
    """README's column of the paper's share of dense at 3 %: 0.62, 0.87, 0.91, the last between two trained points."""
    at = {m: {v: f1 / dense for v, f1 in points} for m, (dense, points) in draw.PAPER.items()}
    assert round(at["magnitude"][3], 2) == 0.62 and round(at["mvp"][3], 2) == 0.87
    assert at["soft_mvp"][2.56] < 0.907 < at["soft_mvp"][3.99]
    assert all(0 < v <= 100 and 0 < share <= 1 for points in at.values() for v, share in points.items())


# ---- runs

def test_runs_are_told_apart_by_their_flags(tmp_path):
    run(tmp_path / "b", "mvp", 0.03, 70.0, seed=1)
    run(tmp_path / "a", "mvp", 0.03, 60.0, seed=2)
    run(tmp_path / "c", "mvp", 0.03, 50.0, scope="global")
    run(tmp_path / "d", "mgpp", 0.03, 40.0, mix=1.0)
    run(tmp_path / "e", "mvp", 0.03, 30.0, task="qqp")
    run(tmp_path / "inside" / "f", "mvp", 0.03, 20.0)               # a look's own run is none of the table's
    (tmp_path / "unfinished").mkdir()
    runs = draw.Runs(tmp_path)
    assert [r["metrics"]["F1"] for r in runs.find("mvp", 0.03)] == [70.0, 60.0]
    assert runs.first("mvp", scope="global")["metrics"]["F1"] == 50.0 and runs.first("mgpp", mix=1)["metrics"]["F1"] == 40.0
    assert runs.lacks == []
    assert runs.first("mgpp") is None and runs.first("l0", 0.1) is None
    assert runs.lacks == [f"python mgpp.py --task squad --sparsity 0.03 --preset mini --out {tmp_path}/mgpp-squad-0.03-s0",
                          f"python l0.py --task squad --sparsity 0.1 --preset mini --out {tmp_path}/l0-squad-0.1-s0"]


def test_the_command_it_names_is_one_that_runs(tmp_path):
    runs = draw.Runs(tmp_path)
    runs.first("mvp", scope="global"), runs.first("mgpp", mix=1)
    for line, script in zip(runs.lacks, (mvp, mgpp)):
        args = script.flags().parse_args(line.split()[2:])
        assert args.sparsity == 0.03 and args.preset == "mini"
    assert "--scope global" in runs.lacks[0] and "--mix 1 " in runs.lacks[1]


def test_share_of_dense(tmp_path):
    for name, what in dict(a=("magnitude", 1, 80.0, 0), b=("magnitude", 1, 120.0, 1), c=("mvp", 0.03, 70.0, 0), d=("mvp", 0.03, 90.0, 1),
                           e=("mvp", 0.1, 95.0, 0), f=("l0", 0.03, 50.0, 0)).items():
        run(tmp_path / name, what[0], what[1], what[2], seed=what[3])
    run(tmp_path / "g", "mvp", 0.03, 1.0, teacher="t")              # distilled: not compared with what is not
    table = draw.share_of_dense(draw.Runs(tmp_path))
    assert set(table) == {"mvp", "l0"}
    v, mean, low, high = table["mvp"]
    np.testing.assert_allclose([v, mean, low, high], [[0.03, 0.1, 1], [0.8, 0.95, 1], [0.7, 0.95, 0.8], [0.9, 0.95, 1.2]])
    assert draw.share_of_dense(draw.Runs(tmp_path / "nothing")) == {}
    # rows of a results file count where there is no folder, and only there; rpp's baseline is not rpp
    rows = ["head", "mvp\tsquad\t0.03\t0\t3.0\tEM 1.0 F1 2.0", "mvp\tsquad\t0.03\t2\t3.0\tEM 1.0 F1 50.0", "mvp\tmnli\t0.1\t1\t10.0\tacc 9.0 acc_mm 9.0",
            "rpp\tsquad\t0.1\t0\t10.0\tEM 1.0 F1 60.0", "nip\tsquad\t0.1\t0\t10.0\tEM 1.0 F1 5.0"]
    (tmp_path / "r.tsv").write_text("\n".join(rows) + "\n")
    table = draw.share_of_dense(draw.Runs(tmp_path, results=tmp_path / "r.tsv"))
    np.testing.assert_allclose([x[:2] for x in table["mvp"][:2]], [[0.03, 0.1], [0.7, 0.95]])
    np.testing.assert_allclose(table["rpp"][1], [0.6, 1])


@pytest.mark.parametrize("prefix", ["bert.", ""])
def test_encoder(tmp_path, prefix):
    """The prunable matrices and nothing else, layer 10 after layer 9."""
    tensors = model(np.random.default_rng(0), layers=11, prefix=prefix)
    held = draw.encoder(saved(tmp_path, tensors))
    assert list(held) == [f"{i}.{kind}" for i in range(11) for kind in draw.KINDS]
    assert all(np.array_equal(x, tensors[f"{prefix}encoder.layer.{name}"]) for name, x in held.items())
    assert draw.flat(held).shape == (sum(x.size for x in held.values()),)


def test_kept_by():
    a, b, c = np.zeros((2, 4)), np.zeros((4, 4)), np.ones((1, 1))
    a[0, 0] = a[1, 3] = b[2, 2] = -1e-30
    assert draw.kept_by({"0.x": a, "0.y": b, "1.x": c}, lambda name: name[0]) == {"0": 3 / 24, "1": 1.0}


def test_spread():
    np.testing.assert_allclose(draw.spread([0.5, 0.1, 0.9], 0.1), [0.5, 0.1, 0.9])
    np.testing.assert_allclose(draw.spread([0.5, 0.5], 0.2), [0.4, 0.6])
    np.testing.assert_allclose(draw.spread([0.6, 0.5, 0.05], 0.2), [0.65, 0.45, 0.05])
    rng = np.random.default_rng(0)
    for _ in range(50):
        y = rng.random(6)
        out, order = draw.spread(y, 0.1), np.argsort(y)
        assert (np.diff(out[order]) > 0.1 - 1e-9).all()
        assert out.mean() == pytest.approx(y.mean())                # pushed apart, not aside


# ---- the prior

def test_mixture_penalty_is_the_prior_of_mgpp():
    """Its slope by differences is mgpp.prior_gradient, and it is zero at zero."""
    import torch
    prior = dict(lam=1e-6, s0=1e-7, s1=0.1)
    edge = draw.mixture_edge(**prior)
    w = np.linspace(-3, 3, 401) * edge
    slope = (draw.mixture_penalty(w + 1e-9, **prior) - draw.mixture_penalty(w - 1e-9, **prior)) / 2e-9
    np.testing.assert_allclose(slope, mgpp.prior_gradient(torch.tensor(w), *prior.values()).numpy(), rtol=1e-3, atol=1e-3)
    assert draw.mixture_penalty([0.0], **prior)[0] == 0
    spike, slab = ((share / math.sqrt(s) * math.exp(-edge ** 2 / (2 * s))) for share, s in ((1 - 1e-6, 1e-7), (1e-6, 0.1)))
    assert spike == pytest.approx(slab)


# ---- looking inside

def short(data, folder, method, steps):               
    """A saved run with the flags of a short one, so that look() runs that again."""
    run(folder, method, 0.03, 50.0, data=str(data), steps=steps, batch_size=4, device="cpu", sparsity=0.03)


def test_a_look_inside_movement(data, tmp_path, capsys):              
    short(data, tmp_path / "m", "mvp", 2)
    runs = draw.Runs(tmp_path)
    assert draw.look(runs, "mvp") is None and "--train" in runs.lacks[0]
    runs.train = True
    seen = draw.look(runs, "mvp")
    assert "two to four minutes" in capsys.readouterr().out                 # announced
    final = draw.flat(draw.encoder(tmp_path / "inside/mvp-squad-0.03-s0"))
    np.testing.assert_array_equal(seen["weights"] * seen["mask"], final)    # and the order is the saved model's
    assert seen["mask"].mean() == pytest.approx(0.03, abs=1e-3) and np.ptp(seen["scores"]) > 0
    again = draw.look(draw.Runs(tmp_path), "mvp")                           # from the cache: without train
    assert capsys.readouterr().out == "" and np.array_equal(again["scores"], seen["scores"])


def test_a_look_inside_mgpp(data, tmp_path):                          
    short(data, tmp_path / "m", "mgpp", 20)
    run(tmp_path / "other", "mgpp", 0.03, 50.0, seed=3)
    seen = draw.look(draw.Runs(tmp_path, train=True), "mgpp", mix=1)
    assert seen["step"].tolist() == [10, 14]                                # every tenth, and the last before t_f
    np.testing.assert_allclose(seen["kept"], [mgpp.schedule(t, 20, 0.03, 0.05, 0.3, 0.7) for t in (10, 14)])
    start = np.sort(np.abs(draw.flat(draw.encoder(ROOT / "mini/bert"))))
    assert seen["threshold"][0] == pytest.approx(start[-round(seen["kept"][0] * len(start))], rel=0.05)     # few steps: near the start's quantile
    final = draw.flat(draw.encoder(tmp_path / "inside/mgpp-mix_1-squad-0.03-s0"))
    np.testing.assert_array_equal(seen["weights"], final[final != 0])


# ---- the pictures

def test_every_figure_is_drawn(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib", reason="matplotlib is not here: pip install -r figures/requirements.txt")
    rng = np.random.default_rng(0)
    start = saved(tmp_path / "start", model(rng))
    flags = dict(model=str(start))
    run(tmp_path / "runs/dense", "magnitude", 1, 90.0, tensors=model(rng), **flags)
    for method in draw.METHODS:
        run(tmp_path / f"runs/{method}", method, 0.03, 50.0, tensors=model(rng, kept=0.1), **flags)
    for method in ("magnitude", "mvp"):
        run(tmp_path / f"runs/{method}-global", method, 0.03, 50.0, tensors=model(rng, kept=0.1), scope="global", **flags)
    w = rng.normal(size=1000).astype(np.float32)
    for name, seen in (("mvp", dict(weights=w, scores=w ** 2, mask=w > 1)), ("mgpp", dict(step=[1, 2], threshold=[0.1, 0.2], weights=w)),
                       ("mgpp-mix_1", dict(step=[1, 2], threshold=[0.1, 0.1], weights=w))):
        folder = tmp_path / f"runs/inside/{name}-squad-0.03-s0"
        folder.mkdir(parents=True)
        np.savez(folder / "inside.npz", **seen)
    monkeypatch.setattr(sys, "argv", ["draw.py", "--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "png"), "--results", "none"])
    draw.main()
    sizes = {path.stem: path.stat().st_size for path in (tmp_path / "png").iterdir()}
    assert set(sizes) == set(draw.FIGURES) and max(sizes.values()) < 120_000
    out = capsys.readouterr().out
    assert "not drawn" not in out and out.count("python ") == 1 and "rpp.py --task squad --sparsity 0.1 " in out


def test_what_is_lacking_is_said(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib", reason="matplotlib is not here: pip install -r figures/requirements.txt")
    monkeypatch.setattr(sys, "argv", ["draw.py", "--runs", str(tmp_path / "none"), "--out", str(tmp_path / "png"), "--only", "score,scores", "--results", "none"])
    draw.main()
    out = capsys.readouterr().out
    assert out.count("not drawn") == 2 and "python magnitude.py --task squad --sparsity 1 " in out and not (tmp_path / "png").exists()

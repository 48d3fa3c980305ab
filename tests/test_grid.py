"""results/grid.py: every command that it would run is one that the script accepts, and the files it writes hold what the runs measured."""
import argparse
import importlib
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "results"))
import grid                                             # noqa: E402


def arguments(name, folder):
    return argparse.Namespace(grid=name, model="M", data="D", corpus="C", runs=str(folder), results=str(folder), keep=False)


@pytest.mark.parametrize("name", grid.GRIDS)
def test_every_command_parses(name, tmp_path):
    args, seen = arguments(name, tmp_path), set()
    for run in grid.runs(name):
        script, *flags = grid.command(args, run)
        parsed = importlib.import_module(script[:-3]).flags().parse_args(flags)
        assert (parsed.task, parsed.sparsity, parsed.seed, parsed.model) == (*run[1:], "M")
        assert script == {"nip": "rpp.py", "mvp_global": "mvp.py"}.get(run[0], run[0].removesuffix("_kd") + ".py")
        assert getattr(parsed, "nip", False) == (run[0] == "nip") and (getattr(parsed, "scope", None) == "global") == (run[0] == "mvp_global")
        assert bool(parsed.teacher) == run[0].endswith("_kd")
        if script == "rpp.py" and name in ("sst2", "paper"):                       # one support a share kept, for all seeds and tasks
            first = ("rpp", {"sst2": "cola", "paper": "sst2"}[name], run[2], 0)
            assert (parsed.corpus, parsed.support) == (("C", None) if run == first else (None, str(grid.folder(args, first))))
            assert first in grid.runs(name)
        seen.add(grid.folder(args, run))
    assert len(seen) == len(grid.runs(name))                                       # a folder each


def test_the_embedded_grid_is_what_was_asked_for():
    """squad: six methods at 10 % and 3 % and dense, three seeds; mnli and qqp: dense and 3 %; rpp at 40 % on all three; its baseline, a
    teacher, and movement with one threshold beside them."""
    runs, plain = grid.runs("embedded"), {*grid.METHODS}
    assert len(runs) == len(set(runs)) == 3 * (1 + 2 * 6) + 2 * (1 + 6) + 5 + 2 + 4 + 6
    for v in (0.1, 0.03):
        assert {(r[0], r[3]) for r in runs if r[1:3] == ("squad", v) and r[0] in plain} == {(m, s) for m in plain for s in (0, 1, 2)}
    assert {(r[1], r[2], r[3]) for r in runs if r[2] == 1} == {("squad", 1, 0), ("squad", 1, 1), ("squad", 1, 2), ("mnli", 1, 0), ("qqp", 1, 0)}
    assert {r[1:] for r in runs if r[2] == 0.4} == {("squad", 0.4, 0), ("squad", 0.4, 1), ("squad", 0.4, 2), ("mnli", 0.4, 0), ("qqp", 0.4, 0)}
    others = {(m, s): v for m, _, v, s in runs if m not in plain and m != "mvp_global"}
    assert others == {("nip", 0): 0.1, ("nip", 1): 0.1} | {(m, s): 0.03 for m in ("mvp_kd", "soft_mvp_kd") for s in (0, 1)}
    assert [r[3] for r in runs] == sorted(r[3] for r in runs)                      # one seed of everything first


@pytest.mark.parametrize("name", ["sst2", "paper"])
def test_the_real_grids_are_what_was_asked_for(name):
    """Dense, and six methods at 10 % and 3 %, with and without a teacher for mvp and soft_mvp, three seeds each."""
    tasks = {"sst2": ("sst2",), "paper": ("sst2", "squad")}[name]
    wanted = {(m, task, v, s) for task in tasks for v in (0.1, 0.03) for s in (0, 1, 2) for m in [*grid.METHODS, "mvp_kd", "soft_mvp_kd"]}
    wanted |= {("magnitude", task, 1, s) for task in tasks for s in (0, 1, 2)}
    assert {run for run in grid.runs(name) if run[1] != "cola"} == wanted


def test_rpp_and_its_baseline_have_the_same_budget():
    args = arguments("embedded", Path("runs"))
    budget = {run: words[words.index("--pretrain_steps") + 1] for run in grid.runs("embedded") if "--pretrain_steps" in (words := grid.command(args, run))}
    assert {run[0] for run in budget} == {"rpp", "nip"} and all(run[1] == "squad" for run in budget)
    assert all(budget["rpp", *run[1:]] == steps for run, steps in budget.items() if run[0] == "nip")
    assert not any("--support" in grid.command(args, run) for run in budget)


def test_what_it_writes(tmp_path):
    args = arguments("embedded", tmp_path)
    for seed, f1 in ((0, 80.0), (1, 90.0)):
        out = grid.folder(args, ("mvp", "squad", 0.03, seed))
        out.mkdir(parents=True)
        (out / "result.json").write_text(json.dumps(dict(metrics=dict(EM=f1 - 1, F1=f1), kept=0.03, steps=7, seconds=3.4, threads=2, versions=dict(
            torch="t", transformers="f"))))
        Path(f"{out}.txt").write_text("commit abc1234\nstep 00001/00007\ncommit abc1234+\nRESULT\n")
    grid.write(args)
    head, *rows = [line.split("\t") for line in (tmp_path / "embedded.tsv").read_text().splitlines()]
    assert len(rows) == 2 and rows[1][:9] == ["mvp", "squad", "0.03", "1", "3.000", "EM 89.00 F1 90.00", "7", "3", "2"] and len(head) == len(rows[0])
    assert rows[0][-2] == "abc1234 abc1234+" and rows[0][-1] == "python mvp.py --task squad --sparsity 0.03 --seed 0 --preset mini --device cpu --model MODEL --data DATA"
    table = (tmp_path / "embedded.md").read_text().splitlines()
    assert next(line for line in table if line.startswith("| squad, 3 %")).split("|")[4].strip() == "84.0 / 85.0 (2)"       # means, and of how many


def test_a_run_that_is_finished_is_not_run_again_and_one_that_was_stopped_goes_on(tmp_path, monkeypatch):
    args, started = argparse.Namespace(**vars(arguments("sst2", tmp_path)), jobs=1), []
    run = ("mvp", "sst2", 0.1, 0)

    def fake(words, **more):
        if words[0] == "git":
            return argparse.Namespace(stdout="abc1234" if "rev-parse" in words else "")
        started.append(words)
        out = Path(words[words.index("--out") + 1])
        out.mkdir(exist_ok=True)
        (out / ("result.json" if "--resume" in words else "log.jsonl")).write_text(json.dumps(dict(
            metrics=dict(acc=1.0), kept=0.1, steps=1, seconds=1, threads=1, versions=dict(torch="", transformers=""))))
        return argparse.Namespace(returncode=0)
    monkeypatch.setattr(grid.subprocess, "run", fake)
    for _ in range(3):
        grid.execute(args, run)
    assert [("--resume" in words) for words in started] == [False, True]


def test_rows_that_are_kept_are_not_run_again_and_stay(tmp_path, monkeypatch):
    args, run = arguments("sst2", tmp_path), ("mvp", "sst2", 0.1, 0)
    row = "mvp\tsst2\t0.1\t0\t10.000\tacc 77.25\t7\t3\t2\tt\tf\tc\tpython mvp.py"
    (tmp_path / "sst2.tsv").write_text(f"head\n{row}\n")
    monkeypatch.setattr(grid.subprocess, "run", lambda *words, **more: pytest.fail("it was run"))
    grid.execute(argparse.Namespace(**vars(args) | {"keep": True}), run)
    grid.write(args)                                    # without --keep too, until the run has been made again
    assert (tmp_path / "sst2.tsv").read_text().splitlines()[1:] == [row] and "| 77.2 (1) |" in (tmp_path / "sst2.md").read_text()

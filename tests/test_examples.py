"""The examples: their copies, their scores, short runs; and whether a method can be copied."""
import argparse
import ast
import importlib
import io
import json
import re
import shutil
import sys
import textwrap
import tokenize
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from conftest import METHODS, ROOT, load, start
from safetensors.torch import load_file, save_file
from test_frame import SLOT
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    EncoderDecoderModel,
    TrainingArguments,
)

EXAMPLES = ROOT / "examples"
BANNER = re.compile(r"(?m)^ *# ---- (?:copied from (\w+)\.py: <method: ([^>]*)>)?.*$")
SILENT = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT,
          tokenize.ENDMARKER)
# What generate.py leaves out: soft_mvp.py's open loop, which needs --penalty. What it changes: n
# of mgpp.py, the number of terms in the mean that the loss is, counts tokens.
LEFT_OUT = [
    ("if args.penalty is None: update_masks(masked, scores, v, args.scope) "
     "else: update_masks_open(masked, scores, tau=TAU_F * ramp) v = None",
     "update_masks(masked, scores, v, args.scope)"),
    ("args.lambda_f if args.penalty is None else args.penalty", "args.lambda_f"),
    ("if args.penalty is None: update_masks(masked, scores, goal, args.scope) "
     "else: update_masks_open(masked, scores, tau=TAU_F) goal = None",
     "update_masks(masked, scores, goal, args.scope)"),
    ("1 / len(data.train)", "1 / n"),
]


def load_example(name="generate"):
    return load(EXAMPLES / f"{name}.py")


def slots(method):
    return dict(SLOT.findall((ROOT / f"{method}.py").read_text()))


def tokens_of(text):
    """The tokens of a text between blanks, without comments and line ends."""
    text = "\n".join(line.strip() for line in text.split("\n"))
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    return " ".join(token.string for token in tokens if token.type not in SILENT)


def definitions(text):
    """{name: source without comments} of the functions and classes at the top of a text."""
    return {node.name: ast.unparse(node) for node in ast.parse(text).body
            if isinstance(node, (ast.FunctionDef, ast.ClassDef))}


# ---- the copies

def copies(name):
    """[(script, slot, the text under the banner)] of an example."""
    text = (EXAMPLES / f"{name}.py").read_text()
    banners = list(BANNER.finditer(text))
    ends = [banner.start() for banner in banners[1:]] + [len(text)]
    return [(banner[1], banner[2], text[banner.end():end])
            for banner, end in zip(banners, ends) if banner[1]]


SOFT_MVP = ["schedule", "kth_largest", "top_v", "least_share", "update_masks", "sigmoid_penalty",
            "StraightThrough", "Masked"]
MGPP = ["schedule", "fraction_left", "mixing_weight", "prior_gradient", "kth_largest", "top_v",
        "zero_smallest"]


@pytest.mark.parametrize("name, script, names", [
    ("generate", "mgpp", MGPP),
    ("generate", "soft_mvp", [name for name in SOFT_MVP if name not in MGPP]),
    ("trainer", "soft_mvp", SOFT_MVP)])
def test_definitions_are_the_scripts_own(name, script, names):
    found = []
    for origin, slot, text in copies(name):
        if (origin, slot) == (script, "definitions"):
            theirs = definitions(slots(script)["definitions"])
            for copied, ours in definitions(text).items():
                assert ours == theirs[copied], f"{script}.py has another {copied}"
                found.append(copied)
    assert sorted(found) == sorted(names)


def test_slots_are_the_scripts_own():
    found = []
    for script, slot, text in copies("generate"):
        if slot in ("definitions", "hyper-parameters"):
            continue
        theirs = tokens_of(slots(script)[slot])
        for old, new in LEFT_OUT:
            theirs = theirs.replace(tokens_of(old), tokens_of(new))
        ours = tokens_of(text)
        assert ours.startswith(theirs), f"{script}.py has another slot {slot}"
        found.append((script, slot))
    missing = {(script, slot) for script in ("mgpp", "soft_mvp") for slot, text in
               slots(script).items() if tokens_of(text)} - set(found)
    assert {slot for _, slot in missing} == {"imports", "hyper-parameters", "flags", "checks",
                                             "definitions", "before the loop", "penalty"}
    assert ("soft_mvp", "penalty") in found


def test_constants_are_the_scripts_own():
    mgpp, soft = importlib.import_module("mgpp").MINI, importlib.import_module("soft_mvp").MINI
    theirs = soft | mgpp | {"mix": None}
    constants = load_example().HYPER
    assert constants == {name: theirs[name] for name in constants}


# ---- ROUGE

def test_rouge_by_hand():
    example = load_example()
    guess = "the cat sat on the mat".split()
    gold = "the cat was on a mat".split()
    assert example.rouge_n(guess, gold, 1) == pytest.approx(8 / 12)      # the, cat, on, mat
    assert example.rouge_n(guess, gold, 2) == pytest.approx(2 / 10)      # the cat
    assert example.rouge_l(guess, gold) == pytest.approx(8 / 12)         # the cat .. on .. mat
    assert example.rouge_l("a b c".split(), "c b a".split()) == pytest.approx(1 / 3)
    assert example.rouge_l("a x b y c".split(), "a b c d".split()) == pytest.approx(6 / 9)
    assert example.rouge_n("a a a".split(), "a b".split(), 1) == pytest.approx(2 / 5)
    assert example.rouge_n([], gold, 1) == example.rouge_l([], gold) == 0


def test_score():
    scores = load_example().score(["where was Ada born ?", ""], ["Where was ada born?", "When?"])
    assert scores == {"EM": 50, "ROUGE-1": 50, "ROUGE-2": 50, "ROUGE-L": 50}


# ---- generate.py: a short run

@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    """{method: (its folder, its process)}"""
    folder = tmp_path_factory.mktemp("generate")
    for name, count in (("train", 40), ("dev", 3)):
        lines = (ROOT / "mini" / "generate" / f"{name}.tsv").read_text().split("\n")
        (folder / f"{name}.tsv").write_text("\n".join(lines[:count]) + "\n")

    def whole_run(method):
        out = folder / method
        return out, start([sys.executable, EXAMPLES / "generate.py", "--method", method,
                           "--sparsity", "0.1", "--steps", "8", "--batch_size", "4",
                           "--data", folder, "--out", out,
                           "--max_new_tokens", "4", "--device", "cpu"])

    methods = ["mgpp", "soft_mvp"]
    with ThreadPoolExecutor(2) as two_cores:
        return dict(zip(methods, two_cores.map(whole_run, methods)))


@pytest.mark.parametrize("method", ["mgpp", "soft_mvp"])
def test_example_prunes(ended, method):
    out, process = ended[method]
    assert process.returncode == 0, process.stderr
    assert f"RESULT {method} generate keeps 10.00% (prunes 90.00%) EM" in process.stdout
    example = load_example()
    layers = example.prunable(EncoderDecoderModel.from_pretrained(out)).values()
    assert len(layers) == 4 * 6 + 4 * 10        # cross-attention has four more
    n = sum(layer.weight.numel() for layer in layers)
    kept = sum(int(torch.count_nonzero(layer.weight)) for layer in layers)
    assert kept == round(0.1 * n)
    assert json.loads((out / "result.json").read_text())["kept"] == pytest.approx(kept / n)


# ---- trainer.py: transformers' Trainer needs accelerate, which requirements.txt does not have

@pytest.fixture(scope="module")
def trainer():
    pytest.importorskip("accelerate", reason="examples/trainer.py needs: pip install accelerate")
    return load_example("trainer")


def fine_tune(trainer, folder, batch_size, accumulate):
    """8 steps of 16 on a small BERT in float64. Returns (scores, weights, logs, penalties)."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "bert", vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32, hidden_dropout_prob=0, attention_probs_dropout_prob=0)
    model = AutoModelForSequenceClassification.from_config(config).double()
    rows = [{"input_ids": torch.randint(50, (8,)), "label": i % 2} for i in range(64)]
    method = trainer.SoftMovement(0.1)
    layers = trainer.prunable(model)
    method.attach(layers)
    seen = {"penalties": []}
    penalty, bake = method.penalty, method.bake

    def watched_penalty():
        seen["penalties"].append(penalty())
        return seen["penalties"][-1]

    def watched_bake():
        seen["scores"] = [s.detach().clone() for s in method.scores()]
        bake()

    method.penalty, method.bake = watched_penalty, watched_bake
    settings = TrainingArguments(
        output_dir=folder, max_steps=8, per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulate, eval_strategy="steps", eval_steps=2,
        logging_steps=2, save_strategy="no", report_to="none", disable_tqdm=True,
        dataloader_pin_memory=False)
    run = trainer.PruningTrainer(model, args=settings, method=method, train_dataset=rows,
                                 eval_dataset=rows)
    run.train()
    lrs = [(group["initial_lr"], group["weight_decay"]) for group in run.optimizer.param_groups]
    assert lrs == [(5e-5, 0), (5e-5, 0), (1e-2, 0)]
    assert len(run.optimizer.param_groups[2]["params"]) == len(layers) == 12
    return (seen["scores"], [layer.weight for layer in layers], run.state.log_history,
            seen["penalties"])


def test_accumulated_steps_are_the_same(trainer, tmp_path):
    """Four micro-batches of 4 are one batch of 16: in masks, scores, and how often penalised."""
    scores, weights, logs, penalties = fine_tune(trainer, tmp_path, 16, 1)
    again = fine_tune(trainer, tmp_path, 4, 4)
    n = sum(weight.numel() for weight in weights)
    for other in (weights, again[1]):
        assert sum(int(torch.count_nonzero(weight)) for weight in other) == round(0.1 * n)
    for a, b in zip(scores + weights, again[0] + again[1]):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9)
    assert min(float(s.std()) for s in scores) > 1e-4
    assert len(penalties) == len(again[3]) == 8
    assert float(penalties[-1].detach()) > 400
    for run in (logs, again[2]):                # the logged and evaluated loss have no penalty
        losses = [log[key] for log in run for key in ("loss", "eval_loss") if key in log]
        assert len(losses) == 8 and max(losses) < 1


@pytest.mark.parametrize("kind, count", [("bert", 72), ("roberta", 72), ("distilbert", 36),
                                         ("albert", 6), ("electra", 72), ("modernbert", 88)])
def test_layers_of_any_encoder(trainer, kind, count):
    with torch.device("meta"):
        model = AutoModelForSequenceClassification.from_config(AutoConfig.for_model(kind))
    assert len(trainer.prunable(model)) == count


def test_a_model_without_linear_layers_is_refused(trainer):
    with torch.device("meta"):
        model = AutoModelForSequenceClassification.from_config(AutoConfig.for_model("gpt2"))
    with pytest.raises(SystemExit, match="no layer to prune"):
        trainer.SoftMovement(0.1).attach(trainer.prunable(model))


def questions(folder):
    """A folder of a few rows of mini's QQP."""
    folder.mkdir()
    for name in ("train", "dev"):
        lines = (ROOT / "mini" / "glue" / "QQP" / f"{name}.tsv").read_text().split("\n")[:65]
        (folder / f"{name}.tsv").write_text("\n".join(lines) + "\n")
    return folder


def arguments(trainer, data, out, *more):
    words = ["--data", data, "--out", out, "--steps", "8", "--checkpoint_every", "4",
             "--batch_size", "4", "--accumulate", "2", *more]
    return trainer.flags().parse_args([str(word) for word in words])


def test_trainer_resumes(trainer, tmp_path, monkeypatch, capsys):
    """Killed in its sixth step and resumed: the same file. It opens with plain transformers.

    The model names the weights of its norms as BERT's own files do.
    """
    data = questions(tmp_path / "data")
    old = tmp_path / "old"
    shutil.copytree(ROOT / "mini" / "bert", old)
    state = {name.replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta"): value
             for name, value in load_file(old / "model.safetensors").items()}
    save_file(state, old / "model.safetensors", metadata={"format": "pt"})
    model = ["--model", str(old)]
    trainer.main(arguments(trainer, data, tmp_path / "whole", *model))
    line = "RESULT trainer keeps 10.00% (prunes 90.00%) accuracy "
    assert line in capsys.readouterr().out
    whole = trainer.SoftMovement.before_forward

    def killed(method, step, steps):
        if step == 5:
            raise KeyboardInterrupt
        whole(method, step, steps)

    monkeypatch.setattr(trainer.SoftMovement, "before_forward", killed)
    with pytest.raises(KeyboardInterrupt):
        trainer.main(arguments(trainer, data, tmp_path / "killed", *model))
    monkeypatch.undo()
    with pytest.raises(SystemExit, match="holds another run"):
        trainer.main(arguments(trainer, data, tmp_path / "killed", *model))
    trainer.main(arguments(trainer, data, tmp_path / "killed", *model, "--resume"))
    assert line in capsys.readouterr().out
    files = [tmp_path / name / "model.safetensors" for name in ("whole", "killed")]
    assert files[0].read_bytes() == files[1].read_bytes()
    model, report = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "killed", output_loading_info=True)
    assert not any(report.values())
    weights = [layer.weight for layer in trainer.prunable(model)]
    kept = sum(int(torch.count_nonzero(weight)) for weight in weights)
    assert len(weights) == 24 and kept == round(0.1 * sum(weight.numel() for weight in weights))
    assert model.config.id2label == {0: "0", 1: "1"}


def test_trainer_refuses_a_row_that_is_cut_short(trainer, tmp_path):
    data = questions(tmp_path / "data")
    with open(data / "train.tsv", "a") as file:
        file.write("64\t1\t2\tWho?\n")
    with pytest.raises(SystemExit, match="line 66"):
        trainer.main(arguments(trainer, data, tmp_path / "out"))


# ---- copying is safe: a script's slots in a loop around another network

LOOP = """
import numpy as np
import torch
from torch import nn
{imports}
{definitions}

def train(model, layers, data, args):
    device = torch.device("cpu")
    groups = [{{"params": list(model.parameters()), "lr": args.lr}}]
{setup}
    optimizer = torch.optim.AdamW(groups)
    for step in range(args.steps):
{before forward}
        x, y = data.train[step % len(data.train)]
        loss = nn.functional.mse_loss(model(x), y)
{penalty}
        optimizer.zero_grad()
        (loss + penalty).backward()
{gradient}
        optimizer.step()
{after step}
{bake}
    return optimizer
"""


def network():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 50), nn.ReLU(), nn.Linear(50, 60), nn.ReLU(),
                          nn.Linear(60, 4))
    layers = {"first": model[0], "second": model[2]}
    data = argparse.Namespace(train=[(torch.randn(8, 20), torch.randn(8, 4)) for _ in range(10)])
    return model, layers, data


def check(model, layers, v):
    kept = [int(torch.count_nonzero(layer.weight)) for layer in layers.values()]
    assert sum(kept) == round(v * 4000)
    for layer in layers.values():
        assert type(layer) is nn.Linear and set(layer.state_dict()) == {"weight", "bias"}
    assert bool((model[4].weight != 0).all())


@pytest.mark.parametrize("method", METHODS[:-1])
def test_slots_in_another_loop(method):
    script = importlib.import_module(method)
    model, layers, data = network()
    flags = vars(script.flags().parse_args(["--sparsity", "0.1"]))
    given = {name: value for name, value in flags.items() if value is not None}
    args = argparse.Namespace(**(flags | script.MINI | given | {"steps": 100}))
    copied = {}
    exec(LOOP.format(**slots(method)), copied)
    before = [layer.weight.clone() for layer in layers.values()]
    optimizer = copied["train"](model, layers, data, args)
    check(model, layers, 0.1)
    assert optimizer.param_groups[0]["lr"] == args.lr
    for weight, layer in zip(before, layers.values()):      # what is kept has been trained
        moved = (layer.weight - weight)[layer.weight != 0].detach()
        assert float(moved.abs().max()) > 1e-4
    if "score_lr" in vars(args):
        _, scores = optimizer.param_groups
        assert (scores["lr"], scores["weight_decay"]) == (args.score_lr, 0)
        moments = optimizer.state[scores["params"][0]]
        assert int(moments["step"]) == 100 and float(moments["exp_avg_sq"].max()) > 0
        assert float(scores["params"][0].detach().std()) > 0.1 * args.score_lr


def test_prox_in_another_loop():
    copied = {}
    exec("import numpy as np\nimport torch\nfrom torch import nn\n"
         + slots("rpp")["imports"] + slots("rpp")["definitions"], copied)
    model, layers, data = network()
    weights = [layer.weight for layer in layers.values()]
    alphas = [torch.ones_like(w) for w in weights]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    for step in range(100):
        x, y = data.train[step % 10]
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()
        with torch.no_grad():
            gamma = copied["solve_gamma"](weights, alphas, 1 - 0.9 * (step + 1) / 100, 1e-3)
            for w, alpha in zip(weights, alphas):
                w.copy_(copied["prox"](w, 1e-3 * gamma * alpha))
            if step % 20 == 19:
                alphas = [copied["reweight"](w, 1, 1e-9) for w in weights]
    check(model, layers, 0.1)


def test_l0_presses_harder_while_too_much_is_kept():
    scores = [torch.tensor([5.0, 2.0, 0.0, -9.0], requires_grad=True)]      # 3 of 4 are open
    model = argparse.Namespace(mu1=torch.tensor(1.0, dtype=torch.float64),
                               mu2=torch.tensor(10.0, dtype=torch.float64))
    space = dict(gated=scores, scores=scores, v=0.5, model=model,
                 args=argparse.Namespace(penalty=None, ascent=(2.0, 60.0)))
    exec("import numpy as np\nimport torch\nfrom torch import nn\n" + "".join(
        textwrap.dedent(slots("l0")[name]) for name in
        ("imports", "definitions", "penalty", "after step")), space)
    assert float(space["penalty"].detach()) == pytest.approx(1 * 0.5 + 10 * 0.5 ** 2)
    assert float(model.mu1) == pytest.approx(1 + 2 * 0.5)
    assert float(model.mu2) == pytest.approx(10 + 60 * 0.5 ** 2)
    space["penalty"].backward()
    opened = 1 / (1 + np.exp(-np.array([5.0, 2.0, 0.0, -9.0]) + 2 / 3 * np.log(0.1 / 1.1)))
    slope = (1 + 2 * 10 * 0.5) / 0.5 / 4 * opened * (1 - opened)
    np.testing.assert_allclose(scores[0].grad.numpy(), slope, rtol=1e-5, atol=1e-6)

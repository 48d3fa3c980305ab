"""examples/generate.py: its copies, its scores, a short run; and whether a method can be copied."""
import argparse
import ast
import importlib
import importlib.util
import io
import json
import re
import sys
import textwrap
import tokenize
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from conftest import METHODS, ROOT, start
from test_frame import SILENT, SLOT
from torch import nn
from transformers import EncoderDecoderModel

EXAMPLE = ROOT / "examples" / "generate.py"
BANNER = re.compile(r"(?m)^ *# ---- (?:copied from (\w+)\.py: <method: ([^>]*)>)?.*$")
# What the example leaves out: soft_mvp.py's open loop, which needs --penalty, and mgpp.py's log.
LEFT_OUT = [
    ("args.sparsity < 1 or args.penalty", "args.sparsity < 1"),
    ("if args.penalty: update_masks_open(masked, scores, 0.1 * ramp) v = None elif", "if"),
    ("(args.penalty or args.lambda_f)", "args.lambda_f"),
    ("if args.penalty: goal = None update_masks_open(masked, scores, 0.1) "
     "elif masked: update_masks(masked, scores, goal) if masked:",
     "if masked: update_masks(masked, scores, goal)"),
    ("if pruning and not due: v = None remains", "remains"),
]


def load_example():
    spec = importlib.util.spec_from_file_location("generate", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


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

def copies():
    """[(script, slot, the text under the banner)] of the example."""
    text = EXAMPLE.read_text()
    banners = list(BANNER.finditer(text))
    ends = [banner.start() for banner in banners[1:]] + [len(text)]
    return [(banner[1], banner[2], text[banner.end():end])
            for banner, end in zip(banners, ends) if banner[1]]


def test_definitions_are_the_scripts_own():
    found = {}
    for script, slot, text in copies():
        if slot == "definitions":
            theirs = definitions(slots(script)["definitions"])
            for name, ours in definitions(text).items():
                assert ours == theirs[name], f"{script}.py has another {name}"
                found[script, name] = ours
    assert len(found) == 13


def test_slots_are_the_scripts_own():
    found = []
    for script, slot, text in copies():
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
    assert {slot for _, slot in missing} == {"imports", "hyper-parameters", "flags", "definitions",
                                             "penalty"}
    assert ("soft_mvp", "penalty") in found


@pytest.mark.parametrize("name, scripts", [
    ("lr_factor", METHODS), ("task_loss", METHODS),
    ("schedule", ["magnitude", "mvp", "soft_mvp", "l0"]),
    ("kth_largest", ["magnitude", "mvp", "soft_mvp", "mgpp"]),
    ("top_v", ["magnitude", "mvp", "soft_mvp", "mgpp"]),
    ("floor", ["magnitude", "mvp", "soft_mvp"]),
    ("StraightThrough", ["mvp", "soft_mvp"]), ("Masked", ["mvp", "soft_mvp"])])
def test_definition_is_the_same_in_all(name, scripts):
    assert len({definitions(slots(script)["definitions"])[name] for script in scripts}) == 1


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


# ---- a short run

@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    """{method: (its folder, its process)}"""
    folder = tmp_path_factory.mktemp("generate")
    for name, count in (("train", 40), ("dev", 3)):
        lines = (ROOT / "mini" / "generate" / f"{name}.tsv").read_text().split("\n")
        (folder / f"{name}.tsv").write_text("\n".join(lines[:count]) + "\n")

    def whole_run(method):
        out = folder / method
        return out, start([sys.executable, EXAMPLE, "--method", method, "--sparsity", "0.1",
                           "--steps", "8", "--batch_size", "4", "--data", folder, "--out", out,
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
    state = {{}}
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
    space = dict(gated=scores, scores=scores, v=0.5, state=dict(mu1=1.0, mu2=10.0),
                 args=argparse.Namespace(penalty=None, ascent=(2.0, 60.0)))
    exec("import numpy as np\nimport torch\nfrom torch import nn\n" + "".join(
        textwrap.dedent(slots("l0")[name]) for name in
        ("imports", "definitions", "penalty", "after step")), space)
    assert float(space["penalty"].detach()) == pytest.approx(1 * 0.5 + 10 * 0.5 ** 2)
    assert space["state"] == pytest.approx(dict(mu1=1 + 2 * 0.5, mu2=10 + 60 * 0.5 ** 2))
    space["penalty"].backward()
    opened = 1 / (1 + np.exp(-np.array([5.0, 2.0, 0.0, -9.0]) + 2 / 3 * np.log(0.1 / 1.1)))
    slope = (1 + 2 * 10 * 0.5) / 0.5 / 4 * opened * (1 - opened)
    np.testing.assert_allclose(scores[0].grad.numpy(), slope, rtol=1e-5, atol=1e-6)

"""The methods' equations against oracles that share no code with them: numpy formulas, brute force, finite differences.

A test here is run for every script that defines the function it is about, so a new script is tested as soon as it exists.
"""
import ast
import importlib
import inspect
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from conftest import OnGPU

ROOT = Path(__file__).resolve().parent.parent
MODULES = {name: importlib.import_module(name) for name in ("magnitude", "mvp", "soft_mvp", "l0", "rpp", "mgpp")
           if (ROOT / f"{name}.py").exists()}


def having(*names):
    """The scripts that define all of these names, as pytest parameters."""
    return [pytest.param(m, id=name) for name, m in MODULES.items() if all(hasattr(m, n) for n in names)]


def parameters(function):
    return list(inspect.signature(function).parameters)


def test_which_scripts_are_tested():
    """The tests below go by names and parameters: a function under another name would lose its tests without a word."""
    mask, scored, all_six = {"magnitude", "mvp", "soft_mvp"}, {"mvp", "soft_mvp"}, {"magnitude", "mvp", "soft_mvp", "l0", "mgpp", "rpp"}
    for names, scripts in ((["schedule"], all_six - {"rpp"}), (["top_v"], mask | {"mgpp"}), (["kth_largest"], mask | {"mgpp"}),
                           (["update_masks", "top_v"], mask), (["Masked"], mask), (["Masked", "StraightThrough"], scored),
                           (["sigmoid_penalty", "update_masks_open"], {"soft_mvp"}), (["floor", "update_masks"], {"soft_mvp"}),
                           (["Gated", "gate", "expected_l0", "close_gap"], {"l0"}), (["prior_gradient", "mixing_weight", "zero_smallest"], {"mgpp"}),
                           (["prox", "reweight", "solve_gamma", "pretrain", "find_support"], {"rpp"}), (["HYPER", "flags", "main"], all_six)):
        assert {p.id for p in having(*names)} == scripts, names
    assert {p.id for p in CUBIC} == mask | {"l0"}                                       # mgpp's starts below 1: test_mgpp.py
    assert {p.id for p in having("update_masks") if "scope" in parameters(p.values[0].update_masks)} == {"magnitude", "mvp"}


# ---- the papers' hyper-parameters

# METHODS.md. movement's: epochs, batch, lr, score_lr (L0's), length, rows or windows, warm-up steps, t_i and t_f in warm-ups (L0's t_i, t_f)
SANH = {"squad": (10, 16, 3e-5, 1e-2, 1e-1, 384, 88_000, 5400, (1, 2), (1, 1)),
        "mnli": (6, 32, 3e-5, 1e-2, 1e-1, 128, 392_702, 12000, (1, 1), (1, 1)),
        "qqp": (10, 32, 3e-6, 1e-2, 1e-2, 128, 363_846, 11000, (2, 3), (1, 1))}
# MGPP's: epochs, batch, lr, share of it at the end, t_i in epochs (or steps, where more than 100), v_i, interval, s0, s1, rows or windows
ZHANG = {"mnli": (8, 32, 5e-5, 0.1, 1, 0.7, 100, 1e-10, 0.05, 392_702), "qqp": (10, 32, 5e-5, 0.1, 2, 0.7, 100, 1e-10, 0.05, 363_846),
         "qnli": (10, 32, 5e-5, 0.1, 2, 0.5, 100, 1e-9, 0.05, 104_743), "sst2": (6, 32, 5e-5, 0.01, 1000, 0.7, 10, 1e-9, 0.1, 67_349),
         "squad": (10, 16, 5e-5, 0.1, 11000, 0.5, 100, 1e-10, 0.05, 88_000)}


def paper(script, task):
    hyper = MODULES[script].HYPER["paper"]
    return hyper["*"] | hyper.get(task, {})


@pytest.mark.parametrize("task", SANH)
@pytest.mark.parametrize("script", ["magnitude", "mvp", "soft_mvp", "l0", "rpp"])
def test_movements_hyper_parameters(script, task):
    """The run sheet's, under --preset paper; its steps as shares of the run, to a hundredth. rpp fine-tunes with magnitude's."""
    epochs, batch, lr, score_lr, score_lr_l0, length, rows, warm_up, t, t_l0 = SANH[task]
    ours, share = paper(script, task), warm_up / (epochs * rows / batch)
    assert [ours[key] for key in ("epochs", "batch_size", "lr", "length", "lr_end", "clip")] == [epochs, batch, lr, length, 0.0, 1.0] and "steps" not in ours
    assert ours["warmup"] == pytest.approx(share, abs=0.0101)
    if script != "rpp":
        assert [ours["t_i"], ours["t_f"]] == pytest.approx([share * n for n in (t_l0 if script == "l0" else t)], abs=0.0101)
    assert ours.get("score_lr") == {"mvp": score_lr, "soft_mvp": score_lr, "l0": score_lr_l0}.get(script)


@pytest.mark.parametrize("task", ZHANG)
def test_mgpps_hyper_parameters(task):
    epochs, batch, lr, end, t_i, v_i, interval, s0, s1, rows = ZHANG[task]
    ours = paper("mgpp", task)
    keys = ("epochs", "batch_size", "lr", "lr_end", "v_i", "interval", "spike", "slab")
    assert [ours[key] for key in keys] == [epochs, batch, lr, end, v_i, interval, s0, s1]
    assert ours["t_i"] == pytest.approx(t_i / epochs if t_i < 100 else t_i / (epochs * rows / batch), abs=0.0011)
    assert ours["warmup"] == 0 and ours["clip"] == np.inf and "steps" not in ours       # no warm-up, no clipping


def test_rpps_hyper_parameters():
    """Of pre-training: 6 rounds, lr 2e-5, batch 256, eps 1e-9."""
    ours = paper("rpp", "squad")
    assert (ours["rounds"], ours["pretrain"]["lr"], ours["pretrain"]["batch_size"], ours["pretrain"]["eps"]) == (6, 2e-5, 256, 1e-9)


# ---- the schedule

CUBIC = [m for m in having("schedule") if parameters(m.values[0].schedule) == ["step", "steps", "v", "t_i", "t_f"]]


def cubic(t, T, v_f, t_i, t_f):
    """METHODS.md, literally, t_i and t_f in steps: v = 1 while t <= t_i; v = v_f once t > T - t_f; the cubic between them."""
    if t <= t_i:
        return 1.0
    if t > T - t_f:
        return v_f
    return v_f + (1.0 - v_f) * (1.0 - (t - t_i) / (T - t_i - t_f)) ** 3


@pytest.mark.parametrize("module", CUBIC)
@pytest.mark.parametrize("T, t_i, t_f", [(10, 0.05, 0.3), (10, 0.2, 0.3), (60, 0.05, 0.3), (1000, 0.05, 0.3), (55000, 0.1, 0.2), (7, 0.16, 0.16)])
@pytest.mark.parametrize("v_f", [0.03, 0.1, 1.0, 0.0])
def test_schedule_is_the_cubic(module, T, t_i, t_f, v_f):
    steps = np.unique(np.r_[0, np.linspace(0, T, 41).astype(int), np.round([t_i * T, (1 - t_f) * T]), T - 1].astype(int))
    ours = np.array([module.schedule(int(t), T, v_f, t_i, t_f) for t in steps])
    np.testing.assert_allclose(ours, [cubic(t, T, v_f, t_i * T, t_f * T) for t in steps], atol=1e-12)
    assert ours[0] == 1.0 and ours[-1] == v_f                                      # exactly: the goal is met to the last weight
    assert np.all(np.diff(ours) <= 0) and ours.min() >= v_f and ours.max() <= 1.0


@pytest.mark.parametrize("module", CUBIC)
def test_schedule_corners_by_hand(module):
    at = [module.schedule(t, 100, 0.1, 0.2, 0.3) for t in (0, 19, 20, 45, 70, 71, 99)]
    np.testing.assert_allclose(at, [1, 1, 1, 0.1 + 0.9 / 8, 0.1, 0.1, 0.1], atol=1e-12)          # 45 is half way: (1/2)^3
    assert module.schedule(20, 100, 0.1, 0.2, 0.3) == 1 and module.schedule(21, 100, 0.1, 0.2, 0.3) < 1
    assert module.schedule(70, 100, 0.1, 0.2, 0.3) == 0.1 < module.schedule(69, 100, 0.1, 0.2, 0.3)


@pytest.mark.parametrize("module", CUBIC)
def test_schedule_of_short_runs(module):
    assert module.schedule(0, 1, 0.03, 0.05, 0.3) == 1                             # one step: dense; the bake prunes
    ten = [module.schedule(t, 10, 0.03, 0.05, 0.3) for t in range(10)]
    assert ten[0] == 1 and ten[7:] == [0.03] * 3 and all(a > b for a, b in zip(ten[:7], ten[1:8]))   # 10 steps do prune, to the goal
    for T in range(1, 12):
        assert all(0.03 <= module.schedule(t, T, 0.03, 0.05, 0.3) <= 1 for t in range(T + 1))


def test_schedule_is_the_same_in_all_scripts():
    """Duplication on purpose, so the copies must not drift apart: the same statements in each, docstrings aside."""
    bodies = {}
    for p in CUBIC:
        function = ast.parse(inspect.getsource(p.values[0].schedule)).body[0]
        bodies[p.id] = ast.dump(ast.Module(body=[s for s in function.body if not isinstance(getattr(s, "value", None), ast.Constant)],
                                           type_ignores=[]))
    assert {"magnitude", "mvp", "soft_mvp"} <= set(bodies)
    assert len(set(bodies.values())) == 1, f"schedule() differs between {sorted(bodies)}"


# ---- Top_v

def brute_top_v(x, v):
    """Sort all; the round(v n) largest, at least one; of equal ones the first in the matrix."""
    flat = np.asarray(x, dtype=np.float64).reshape(-1)
    k = max(1, int(np.rint(v * flat.size)))
    mask = np.zeros(flat.size, dtype=bool)
    mask[np.argsort(-flat, kind="stable")[:k]] = True
    return mask.reshape(np.shape(x))


MATRICES = {
    "normal": np.random.default_rng(0).normal(size=(4, 4)),
    "negative": -np.random.default_rng(1).random((4, 4)) - 1,
    "zeros": np.zeros((4, 4)),
    "minus ones": -np.ones((4, 4)),
    "few values": np.random.default_rng(2).integers(-1, 2, size=(4, 4)),
    "one apart": np.eye(4)[[0, 1, 2, 2]] * [[0], [0], [0], [1]],
    "largest last": np.arange(16.0).reshape(4, 4),
    "largest first": -np.arange(16.0).reshape(4, 4),
    "tied pairs": np.repeat(np.random.default_rng(3).permutation(8), 2).reshape(4, 4),
    "infinite": np.array([[np.inf, -np.inf, 0, 1], [2, np.inf, -1, 0], [0, 0, 0, 0], [-np.inf, 3, 3, 3]]),
}


@pytest.mark.parametrize("module", having("top_v"))
@pytest.mark.parametrize("v", [1e-9, 0.01, 1 / 16, 0.1, 0.25, 5 / 16, 0.5, 0.75, 15 / 16, 0.99, 1.0])
@pytest.mark.parametrize("name", MATRICES)
def test_top_v_by_brute_force(module, v, name):
    x = MATRICES[name].astype(np.float32)
    mask = module.top_v(torch.tensor(x), v)
    assert mask.shape == (4, 4) and int(mask.sum()) == max(1, round(v * 16))       # exactly, ties or not
    assert np.array_equal(mask.bool().numpy(), brute_top_v(x, v))


@pytest.mark.parametrize("module", having("top_v"))
def test_top_v_of_other_shapes(module):
    x = np.random.default_rng(4).normal(size=(3, 5, 7)).astype(np.float32)
    assert np.array_equal(module.top_v(torch.tensor(x), 0.3).numpy(), brute_top_v(x, 0.3))
    assert np.array_equal(module.top_v(torch.tensor(x).transpose(0, 2), 0.3).numpy(), brute_top_v(x.transpose(2, 1, 0), 0.3))
    assert module.top_v(torch.zeros(1, 1), 0.5).all()


N = 40_001
rng = np.random.default_rng(5)
LARGE = {
    "normal": rng.normal(size=N),
    "constant": np.full(N, 0.25),
    "zeros": np.zeros(N),
    "ascending": np.arange(N) / N,
    "descending": -np.arange(N) / N,
    "half zeros": np.where(rng.random(N) < 0.5, 0.0, rng.normal(size=N)),
    "three values": rng.integers(-1, 2, size=N),
    "two values, one rare": (rng.random(N) < 1e-4),
    "periodic": np.arange(N) % 35,
    "one far out": np.where(np.arange(N) == 7_777, 1e30, 0.0),
    "infinite": np.where(rng.random(N) < 0.3, np.where(rng.random(N) < 0.5, np.inf, -np.inf), rng.normal(size=N)),
    "negative": -rng.random(N) - 5,
    "heavy tails": rng.standard_cauchy(N),
    "sorted halves": np.r_[np.sort(rng.normal(size=N // 2)), np.sort(rng.normal(size=N - N // 2))[::-1] + 100],
}


@pytest.mark.parametrize("place", [torch.Tensor, OnGPU])
@pytest.mark.parametrize("module", having("kth_largest"))
@pytest.mark.parametrize("name", LARGE)
def test_kth_largest_of_many(module, name, place):
    x = LARGE[name].astype(np.float32)
    falling = np.sort(x)[::-1]
    for k in (1, 2, 15, int(0.005 * N), round(0.03 * N), round(0.1 * N), N // 2, round(0.9 * N), N - 1, N):
        got = module.kth_largest(torch.tensor(x).as_subclass(place), k)
        assert got.numel() == 1 and float(got) == falling[k - 1], (name, k)


@pytest.mark.parametrize("module", having("kth_largest"))
@pytest.mark.parametrize("place", [torch.Tensor, OnGPU])
@pytest.mark.parametrize("n", [1, 2, 3, 100, 30_001, 131_072])
def test_kth_largest_of_any_size(module, n, place):
    x = np.random.default_rng(n).normal(size=n).astype(np.float32)
    falling = np.sort(x)[::-1]
    for k in {1, max(1, n // 33), max(1, n // 2), n // 2 + 1, n}:
        assert float(module.kth_largest(torch.tensor(x).as_subclass(place), k)) == falling[k - 1], k


@pytest.mark.parametrize("module", having("top_v"))
@pytest.mark.parametrize("name", ["normal", "zeros", "half zeros", "three values", "periodic", "infinite"])
def test_top_v_of_many(module, name):
    x = LARGE[name].astype(np.float32)[:-1].reshape(100, 400)
    for v in (1e-6, 0.03, 0.1, 0.6, 1.0):
        mask = module.top_v(torch.tensor(x), v).numpy()
        assert mask.sum() == max(1, round(v * x.size)) and np.array_equal(mask, brute_top_v(x, v)), v


# ---- masks of several matrices

SHAPES = [(4, 4), (3, 8), (8, 2), (1, 5), (7, 7)]


def score_sets():
    rng = np.random.default_rng(6)
    return {"zeros": [np.zeros(s) for s in SHAPES],
            "normal": [rng.normal(size=s) for s in SHAPES],
            "scales": [rng.normal(size=s) * 10.0 ** (i - 2) for i, s in enumerate(SHAPES)],
            "ties": [rng.integers(0, 3, size=s) for s in SHAPES],
            # of the 11 that 10 % keeps the first matrix has ten and the second one, until the floors of the others take three of them
            "stairs": [np.where(np.arange(np.prod(s)).reshape(s) < (10, 1, 0, 0, 0)[i], 9 - i, rng.random(s)) for i, s in enumerate(SHAPES)]}


def masks_of(module, scores, v, scope):
    """update_masks of any of the scripts, called on bare holders of a mask that is wrong everywhere beforehand."""
    held = [SimpleNamespace(mask=torch.full(s.shape, 9.0)) for s in scores]
    given = dict(scope=scope) if "scope" in parameters(module.update_masks) else {}
    module.update_masks(held, [torch.tensor(s, dtype=torch.float32, requires_grad=True) for s in scores], v, **given)
    for h, s in zip(held, scores):
        assert h.mask.shape == s.shape and not h.mask.requires_grad and set(np.unique(h.mask)) <= {0.0, 1.0}
    return [h.mask.numpy().astype(bool) for h in held]


@pytest.mark.parametrize("module", [m for m in having("update_masks") if "scope" in parameters(m.values[0].update_masks)])
@pytest.mark.parametrize("v", [1e-6, 0.03, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("name", score_sets())
def test_local_masks(module, v, name):
    scores = score_sets()[name]
    for mask, s in zip(masks_of(module, scores, v, "local"), scores):
        assert mask.sum() == max(1, round(v * s.size)) and np.array_equal(mask, brute_top_v(s.astype(np.float32), v))


@pytest.mark.parametrize("module", [m for m in having("update_masks", "top_v")])
@pytest.mark.parametrize("v", [1e-6, 0.03, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("name", score_sets())
def test_global_masks(module, v, name):
    scores = score_sets()[name]
    flat = np.concatenate([s.astype(np.float32).reshape(-1) for s in scores])
    if hasattr(module, "floor"):                            # soft movement: the best 0.5 % of each matrix rank before all others
        first = [brute_top_v(s.astype(np.float32), min(v, (int(0.005 * s.size) + 1) / s.size)) if v < 1 else np.zeros(s.shape, bool) for s in scores]
        flat = np.where(np.concatenate([f.reshape(-1) for f in first]), np.inf, flat)
    masks = masks_of(module, scores, v, "global")
    assert sum(m.sum() for m in masks) == max(1, round(v * flat.size))
    assert np.array_equal(np.concatenate([m.reshape(-1) for m in masks]), brute_top_v(flat, v))


def test_scopes_differ():
    """The two scopes are two things: with scales apart, global keeps nearly all of one matrix and local its share of each."""
    scores = score_sets()["scales"]
    for p in having("update_masks"):
        if "scope" in parameters(p.values[0].update_masks):
            assert masks_of(p.values[0], scores, 0.5, "global")[0].sum() < 8 == masks_of(p.values[0], scores, 0.5, "local")[0].sum()


# ---- gradients through the mask: y = x W'^T, W' = W * M, L = sum (y - t)^2 / 2, so dL/dW' = (y - t)^T x

def small_problem(seed=7, out=5, inside=4, batch=6):
    rng = np.random.default_rng(seed)
    return dict(W=rng.normal(size=(out, inside)), S=rng.normal(size=(out, inside)), x=rng.normal(size=(batch, inside)),
                t=rng.normal(size=(batch, out)), M=(rng.random((out, inside)) < 0.4).astype(float))


def masked_loss(W, M, x, t):
    return 0.5 * np.sum((x @ (W * M).T - t) ** 2)


def slopes(f, x, h=1e-6):
    """(index, df/dx there) for each element of x, by central differences."""
    for i in np.ndindex(x.shape):
        up, down = x.copy(), x.copy()
        up[i] += h
        down[i] -= h
        yield i, (f(up) - f(down)) / (2 * h)


def layer_of(module, p):
    """A Linear in float64 with the script's own parametrization, its mask set to M and its scores, if it has any, to S."""
    layer = nn.Linear(*p["W"].shape[::-1], bias=False, dtype=torch.float64)
    layer.weight.data = torch.tensor(p["W"])
    masked = module.Masked(layer.weight)
    parametrize.register_parametrization(layer, "weight", masked)
    masked.mask.copy_(torch.tensor(p["M"]))
    if hasattr(masked, "scores"):
        masked.scores.data = torch.tensor(p["S"])
    loss = 0.5 * ((layer(torch.tensor(p["x"])) - torch.tensor(p["t"])) ** 2).sum()
    loss.backward()
    return layer, masked, loss.item(), layer.parametrizations.weight.original.grad.numpy()


@pytest.mark.parametrize("module", having("Masked"))
def test_weight_gradient_is_masked(module):
    p = small_problem()
    layer, _, loss, grad = layer_of(module, p)
    assert np.isclose(loss, masked_loss(p["W"], p["M"], p["x"], p["t"]), rtol=1e-12)
    assert np.array_equal(layer.weight.detach().numpy(), p["W"] * p["M"])
    dW_ = (p["x"] @ (p["W"] * p["M"]).T - p["t"]).T @ p["x"]                       # dL/dW'
    np.testing.assert_allclose(grad, dW_ * p["M"], rtol=1e-12)
    assert (grad[p["M"] == 0] == 0).all() and (grad[p["M"] == 1] != 0).all()       # exactly zero where masked


@pytest.mark.parametrize("module", having("Masked"))
def test_weight_gradient_by_finite_differences(module):
    """The masked loss is differentiable in W at a fixed mask: there the gradient is no estimate."""
    p = small_problem(8)
    _, _, _, grad = layer_of(module, p)
    for i, slope in slopes(lambda W: masked_loss(W, p["M"], p["x"], p["t"]), p["W"]):
        assert abs(grad[i] - slope) < 1e-6, i


@pytest.mark.parametrize("module", having("Masked", "StraightThrough"))
def test_score_gradient_is_straight_through(module):
    """dL/dS = dL/dW' * W, of masked weights too: they are scored while they are away, and may come back."""
    p = small_problem(9)
    _, masked, _, _ = layer_of(module, p)
    dW_ = (p["x"] @ (p["W"] * p["M"]).T - p["t"]).T @ p["x"]
    grad = masked.scores.grad.numpy()
    np.testing.assert_allclose(grad, dW_ * p["W"], rtol=1e-12)
    assert (grad[p["M"] == 0] != 0).all()


@pytest.mark.parametrize("module", having("Masked", "StraightThrough"))
def test_score_gradient_by_finite_differences_of_a_real_valued_mask(module):
    """Straight through is the derivative of L(W * m) in a real-valued m, taken at m = M."""
    p = small_problem(10)
    _, masked, _, _ = layer_of(module, p)
    for i, slope in slopes(lambda m: masked_loss(p["W"], m, p["x"], p["t"]), p["M"]):
        assert abs(masked.scores.grad[i].item() - slope) < 1e-6, i


@pytest.mark.parametrize("module", having("Masked", "StraightThrough"))
def test_scores_add_up_the_movement(module):
    """S = -alpha_S * sum_t (dL/dW') W, from S = 0, by plain gradient descent on both; and scores start at zero, mask at one."""
    p, lr, score_lr = small_problem(11), 0.01, 0.1
    layer = nn.Linear(4, 5, bias=False, dtype=torch.float64)
    layer.weight.data = torch.tensor(p["W"])
    masked = module.Masked(layer.weight)
    assert masked.scores.dtype == torch.float64 and not masked.scores.any() and masked.mask.all()
    parametrize.register_parametrization(layer, "weight", masked)
    original = layer.parametrizations.weight.original
    W, S = p["W"].copy(), np.zeros_like(p["W"])
    optimizer = torch.optim.SGD([{"params": [original], "lr": lr}, {"params": [masked.scores], "lr": score_lr}])
    for step in range(5):
        v = [1, 0.8, 0.5, 0.3, 0.3][step]
        extra = ["local"] if "scope" in parameters(module.update_masks) else []
        module.update_masks([masked], [masked.scores], v, *extra)
        M = brute_top_v(S, v).astype(float)
        assert np.array_equal(masked.mask.numpy(), M), step
        optimizer.zero_grad()
        (0.5 * ((layer(torch.tensor(p["x"])) - torch.tensor(p["t"])) ** 2).sum()).backward()
        optimizer.step()
        dW_ = (p["x"] @ (W * M).T - p["t"]).T @ p["x"]
        W, S = W - lr * dW_ * M, S - score_lr * dW_ * W
        np.testing.assert_allclose(masked.scores.detach().numpy(), S, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(original.detach().numpy(), W, rtol=1e-9)


@pytest.mark.parametrize("module", having("Masked"))
def test_mask_is_not_a_parameter_and_bakes_into_the_weight(module):
    p = small_problem(12)
    layer, masked, _, _ = layer_of(module, p)
    assert "mask" not in dict(masked.named_parameters())
    parametrize.remove_parametrizations(layer, "weight")
    assert type(layer) is nn.Linear and list(layer.state_dict()) == ["weight"]
    assert np.array_equal(layer.weight.detach().numpy(), p["W"] * p["M"])


# ---- soft movement: the penalty, the paper's threshold

SOFT = having("sigmoid_penalty", "update_masks_open")


def penalty_by_formula(scores):
    return np.mean([np.mean(1 / (1 + np.exp(-s))) for s in scores])                # a mean of means: small matrices weigh more per element


@pytest.mark.parametrize("module", SOFT)
def test_sigmoid_penalty(module):
    rng = np.random.default_rng(13)
    scores = [rng.normal(size=s) * 3 for s in SHAPES]
    given = [torch.tensor(s, requires_grad=True) for s in scores]
    penalty = module.sigmoid_penalty(given)
    assert np.isclose(penalty.item(), penalty_by_formula(scores), rtol=1e-12)
    assert not np.isclose(penalty.item(), np.mean(1 / (1 + np.exp(-np.concatenate([s.reshape(-1) for s in scores])))), rtol=1e-4)
    assert module.sigmoid_penalty([torch.zeros(s) for s in SHAPES]).item() == 0.5
    penalty.backward()
    h = 1e-6
    for n, g in enumerate(given):
        for i in np.ndindex(scores[n].shape):
            keep = scores[n][i]
            scores[n][i] = keep + h
            up = penalty_by_formula(scores)
            scores[n][i] = keep - h
            down = penalty_by_formula(scores)
            scores[n][i] = keep
            assert abs(g.grad[i].item() - (up - down) / (2 * h)) < 1e-9, (n, i)


def open_masks(module, scores, tau):
    held = [SimpleNamespace(mask=torch.full(s.shape, 9.0)) for s in scores]
    module.update_masks_open(held, [torch.tensor(s, dtype=torch.float32, requires_grad=True) for s in scores], tau)
    assert all(h.mask.shape == s.shape and not h.mask.requires_grad for h, s in zip(held, scores))
    return [h.mask.numpy() for h in held]


@pytest.mark.parametrize("module", SOFT)
@pytest.mark.parametrize("tau", [0.0, 0.02, 0.1, 0.5, 0.7])
def test_open_loop_threshold(module, tau):
    """M = (sigmoid(S) > tau) wherever that leaves 0.5 %, which is one weight of these matrices: int(0.005 n) + 1 = 1."""
    rng = np.random.default_rng(14)
    scores = [np.float32(rng.normal(size=s) * 3) for s in SHAPES]
    for mask, s in zip(open_masks(module, scores, tau), scores):
        above = 1 / (1 + np.exp(-s.astype(np.float64))) > tau
        assert above.any()                                                         # so that the floor has no part in it
        assert np.array_equal(mask, above.astype(np.float32))


@pytest.mark.parametrize("module", SOFT)
def test_open_loop_threshold_is_strict(module):
    assert (open_masks(module, [np.zeros((4, 4))], 0.5)[0] == np.eye(1, 16).reshape(4, 4)).all()    # 0.5 > 0.5 is not so: the floor
    assert open_masks(module, [np.zeros((4, 4))], 0.4999)[0].all()


@pytest.mark.parametrize("module", SOFT)
@pytest.mark.parametrize("shape, least", [((4, 4), 1), ((20, 10), 2), ((40, 25), 6), ((64, 100), 33), ((399, 1), 2), ((512, 128), 328), ((512, 300), 769)])
def test_open_loop_floor(module, shape, least):
    """A matrix below the threshold keeps its top int(0.005 n) + 1; one with just as many above it is left as it is."""
    rng = np.random.default_rng(15)
    n = shape[0] * shape[1]
    assert least == int(0.005 * n) + 1
    low = np.float32(rng.permutation(n).reshape(shape) / n - 10)                   # sigmoid about 1e-4 and all different
    mask = open_masks(module, [low], 0.1)[0]
    assert mask.sum() == least and mask.reshape(-1)[np.argsort(-low.reshape(-1))[:least]].all()
    rich = low.reshape(-1).copy()
    rich[:least] = 5.0
    rich = rich.reshape(shape)
    assert np.array_equal(open_masks(module, [rich], 0.1)[0], (rich == 5.0).astype(np.float32))
    both = open_masks(module, [low, np.full((4, 4), 3.0)], 0.1)                    # the floor is of each matrix, not of all
    assert both[0].sum() == least and both[1].all()


@pytest.mark.parametrize("module", SOFT)
def test_the_ramp(module):
    """lambda_t = lambda_f tau_t / 0.1, and tau_t on the cubic from 0 to 0.1: both are 1 - schedule(to 0) of what they end at."""
    T, t_i, t_f = 200, 0.1, 0.2
    for t in range(T):
        ramp = 1 - module.schedule(t, T, 0.0, t_i, t_f)
        tau = 0.0 if t <= 20 else 0.1 if t > 160 else 0.1 + (0.0 - 0.1) * (1 - (t - 20) / (200 - 20 - 40)) ** 3
        assert abs(0.1 * ramp - tau) < 1e-12, t


@pytest.mark.parametrize("module", having("floor", "update_masks"))
def test_every_matrix_keeps_its_floor(module):
    """A matrix whose scores are all the worst keeps int(0.005 n) + 1 = 6 of 1,000, and the total is exact all the same."""
    scores = [torch.randn(20, 50) - 100.0, torch.randn(40, 50)]
    held = [SimpleNamespace(mask=torch.zeros_like(s)) for s in scores]
    module.update_masks(held, scores, 0.03)
    assert held[0].mask.sum() == 6 and held[1].mask.sum() == 84                      # 90 of 3,000
    assert held[0].mask[scores[0] >= scores[0].flatten().sort().values[-6]].all()

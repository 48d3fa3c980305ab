"""l0.py: the hard concrete gate, its gradient and E[L0] against numpy, finite differences and Monte Carlo; what a run counts and saves;
the multipliers' ascent."""
import math
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn
from torch.nn.utils import parametrize

import common
import l0


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def gate(S, u=None):
    """METHODS.md, literally, in float64; u in (0, 1), or None: no noise and no temperature."""
    s = sigmoid(S) if u is None else sigmoid((np.log(u) - np.log(1 - u) + S) / (2 / 3))
    return np.minimum(1, np.maximum(0, s * (1.1 - -0.1) + -0.1))


def test_gate_with_noise():
    rng = np.random.default_rng(0)
    S, u = rng.normal(size=(40, 50)) * 3, rng.uniform(1e-4, 1 - 1e-4, size=(40, 50))
    z = l0.gate(torch.tensor(S), torch.logit(torch.tensor(u))).numpy()
    np.testing.assert_allclose(z, gate(S, u), atol=1e-12)
    assert (z == 0).mean() > 0.05 and (z == 1).mean() > 0.05 and ((z > 0) & (z < 1)).mean() > 0.05           # all three happen


def test_gate_without_noise():
    S = np.linspace(-8, 8, 1601)
    z = l0.gate(torch.tensor(S)).numpy()
    np.testing.assert_allclose(z, gate(S), atol=1e-12)
    assert np.array_equal(z > 0, S > math.log(0.1 / 1.1)) and z[0] == 0 and z[-1] == 1                       # -2.398
    assert l0.share_kept([torch.tensor(S[:1000]), torch.tensor(S[1000:].reshape(1, -1))]) == np.mean(gate(S) > 0)


@pytest.mark.parametrize("S", [-6.0, -4.0, -2.398, -1.0, 0.0, 2.197, 5.0])
def test_expected_l0_by_monte_carlo(S):
    """P(z > 0) by drawing 400,000 gates, u over all of (0, 1) as in the formula; five standard errors."""
    u = np.random.default_rng(1).random(400_000)
    drawn, closed = np.mean(gate(S, u) > 0), float(l0.expected_l0([torch.full((3, 4), S, dtype=torch.float64)]))
    assert abs(drawn - closed) < 5 * np.sqrt(closed * (1 - closed) / len(u)) + 1e-9
    ours = float((l0.gate(torch.full((400_000,), S, dtype=torch.float64), torch.logit(torch.tensor(u))) > 0).double().mean())
    assert ours == drawn                                                                                     # and our gate says the same


def test_expected_l0_is_a_mean_of_means_with_its_own_gradient():
    """A matrix of any size weighs the same, as in the official code; the gradient by central differences."""
    rng = np.random.default_rng(2)
    S = [rng.normal(size=(2, 2)) * 2, rng.normal(size=(4, 5)) * 2]

    def value(S):
        return np.mean([np.mean(sigmoid(s - 2 / 3 * np.log(0.1 / 1.1))) for s in S])
    held = [torch.tensor(s, requires_grad=True) for s in S]
    penalty = l0.expected_l0(held)
    penalty.backward()
    assert penalty.item() == pytest.approx(value(S), rel=1e-12)
    for m in (0, 1):
        for i in np.ndindex(S[m].shape):
            up, down = [s.copy() for s in S], [s.copy() for s in S]
            up[m][i] += 1e-5
            down[m][i] -= 1e-5
            assert float(held[m].grad[i]) == pytest.approx((value(up) - value(down)) / 2e-5, abs=1e-9)


def gated_layer(W, S, noise):
    layer = nn.Linear(*W.shape[::-1], bias=False, dtype=torch.float64)
    layer.weight.data = torch.tensor(W)
    gated = l0.Gated(layer.weight)
    parametrize.register_parametrization(layer, "weight", gated)
    gated.scores.data = torch.tensor(S)
    gated.noise = torch.tensor(noise)
    return layer, gated


def test_gradients_through_the_gate_by_finite_differences():
    """L = sum (y - t)^2 / 2, y = x (W * z)^T with the noise held: dL/dW and dL/dS, gates shut and wide open included."""
    rng = np.random.default_rng(3)
    W, S, u, x, t = rng.normal(size=(5, 4)), rng.normal(size=(5, 4)) * 2, rng.uniform(0.05, 0.95, (5, 4)), rng.normal(size=(6, 4)), rng.normal(size=(6, 5))
    layer, gated = gated_layer(W, S, np.log(u / (1 - u)))
    loss = 0.5 * ((layer(torch.tensor(x)) - torch.tensor(t)) ** 2).sum()
    loss.backward()

    def value(W, S):
        return 0.5 * np.sum((x @ (W * gate(S, u)).T - t) ** 2)
    assert loss.item() == pytest.approx(value(W, S), rel=1e-12)
    z = gate(S, u)
    assert (z == 0).any() and (z == 1).any() and ((z > 0) & (z < 1)).any()
    for i in np.ndindex(W.shape):
        step = np.zeros_like(W)
        step[i] = 1e-6
        assert float(layer.parametrizations.weight.original.grad[i]) == pytest.approx((value(W + step, S) - value(W - step, S)) / 2e-6, abs=1e-6)
        assert float(gated.scores.grad[i]) == pytest.approx((value(W, S + step) - value(W, S - step)) / 2e-6, abs=1e-6)


def test_without_a_gradient_there_is_no_noise():
    """Counting, evaluation and the bake see the noise-free gate: W * z exactly, and so does the layer once baked."""
    rng = np.random.default_rng(4)
    W, S, noise = rng.normal(size=(30, 40)), rng.normal(size=(30, 40)) * 3, rng.normal(size=(30, 40)) * 3
    layer, _ = gated_layer(W, S, noise)
    np.testing.assert_allclose(layer.weight.detach().numpy(), W * gate(S, sigmoid(noise)), atol=1e-12)       # with a gradient: noise
    assert common.kept({"layer": layer})[1] == np.mean(gate(S) > 0)
    parametrize.remove_parametrizations(layer, "weight")
    np.testing.assert_allclose(layer.weight.detach().numpy(), W * gate(S), atol=1e-12)


@pytest.mark.parametrize("v", [1e-6, 0.03, 0.1, 0.5, 0.97, 1 - 1e-9])
def test_close_gap(v):
    """Exactly round(v n) gates are open, the largest scores; what is moved ends at the threshold, and nothing else moves."""
    rng = np.random.default_rng(5)
    S = [rng.normal(size=(20, 30)).astype(np.float32) * 2 - 2, rng.normal(size=(7, 9)).astype(np.float32) - 3]
    held = [torch.tensor(s, requires_grad=True) for s in S]
    moved = l0.close_gap(held, v)
    old, new = (np.concatenate([np.asarray(x, float).ravel() for x in xs]) for xs in (S, [h.detach().numpy() for h in held]))
    k = max(1, round(v * len(old)))
    assert np.array_equal(np.flatnonzero(gate(new) > 0), np.sort(np.argsort(-old)[:k]))
    assert moved == k - np.sum(gate(old) > 0)
    changed = new != old
    assert np.abs(new[changed] - math.log(0.1 / 1.1)).max(initial=0) < 1.001e-3 and gate(new[changed]).max(initial=0) < 1e-3
    stayed = (gate(old) > 0) == (gate(new) > 0)
    assert not changed[stayed & (np.abs(old - math.log(0.1 / 1.1)) > 1e-3)].any()


# ---- in a run

def run_of(data, tmp_path, monkeypatch, *flags, steps=12):
    """Run main() and look on: per step the noise, scores, the logged share and goal, the multipliers; W and S just before the bake."""
    seen = dict(noise=[], kept=[], goal=[], state=[], penalty=[], S=[])
    load, log, checkpoint, report, remove = common.load_bert, common.Run.log, common.Run.checkpoint, common.report, parametrize.remove_parametrizations

    def gates():
        return {name: m.parametrizations.weight for name, m in seen["model"].named_modules() if hasattr(m, "parametrizations")}

    def spy_load(*args, **more):
        return seen.setdefault("model", load(*args, **more))

    def spy_log(self, step, loss, penalty, kept, goal, lr):
        seen["noise"].append([g[0].noise.numpy().copy() for g in gates().values()])
        seen["S"].append([g[0].scores.detach().numpy().astype(float) for g in gates().values()])
        seen["kept"].append(kept())
        seen["goal"].append(goal)
        seen["penalty"].append(float(torch.as_tensor(penalty).detach()))
        return log(self, step, loss, penalty, kept, goal, lr)

    def spy_checkpoint(self, step, **parts):
        seen["state"].append(dict(parts["state"]))
        return checkpoint(self, step, **parts)

    def spy_remove(*args, **more):
        seen.setdefault("before", {name: (g.original.detach().numpy().copy(), g[0].scores.detach().numpy().copy()) for name, g in gates().items()})
        return remove(*args, **more)
    for place, name, spy in ((common, "load_bert", spy_load), (common.Run, "log", spy_log), (common.Run, "checkpoint", spy_checkpoint),
                             (parametrize, "remove_parametrizations", spy_remove)):
        monkeypatch.setattr(place, name, spy)
    out = tmp_path / f"o{len(list(tmp_path.iterdir()))}"
    args = l0.flags().parse_args(["--task", "squad", "--data", str(data), "--out", str(out), "--device", "cpu", "--preset", "mini",
                                  "--batch_size", "4", "--steps", str(steps), *flags])
    seen.update(code=l0.main(args), saved=safetensors.torch.load_file(Path(out) / "model.safetensors"))
    monkeypatch.undo()
    return seen


def test_a_run(data, tmp_path, monkeypatch):
    seen = run_of(data, tmp_path, monkeypatch, "--sparsity", "0.1")
    # what is logged as kept is counted without noise
    for kept, S in zip(seen["kept"], seen["S"]):
        assert kept == pytest.approx(np.mean(np.concatenate([(s > math.log(0.1 / 1.1)).ravel() for s in S])), abs=1e-6)
    # fresh noise at every step, logit of U(1e-4, 1 - 1e-4)
    noise = [np.concatenate([x.ravel() for x in step]) for step in seen["noise"]]
    assert all((a != b).mean() > 0.99 for a, b in zip(noise, noise[1:]))
    u = sigmoid(noise[0].astype(float))
    assert np.abs(noise[0]).max() < math.log((1 - 1e-4) / 1e-4) + 1e-3
    assert np.abs(np.histogram(u, 10, (0, 1))[0] / len(u) - 0.1).max() < 0.005
    # the ascent: h = kept / v - 1 of the scores as the step began, l1 += 2 h, l2 += 60 h^2; the penalty that was paid
    l1 = l2 = 0.0
    shares = [1.0, *seen["kept"]]
    for share, goal, state, penalty in zip(shares, seen["goal"], seen["state"], seen["penalty"]):
        h = share / goal - 1
        assert penalty == pytest.approx(l1 * h + l2 * h * h, rel=1e-4, abs=1e-6)
        l1, l2 = l1 + 2 * h, l2 + 60 * h * h
        assert (state["l1"], state["l2"]) == pytest.approx((l1, l2), rel=1e-4, abs=1e-6)
    assert l1 > 1 and seen["S"][-1][0].mean() < seen["S"][0][0].mean() < 2.3           # and the scores went down for it
    # the goal is met; saved is W * z, of the gates that were moved a W * z of about 0
    assert seen["code"] == 0 and len(seen["before"]) == 24
    kept = 0
    for name, (W, S) in seen["before"].items():
        saved = seen["saved"][f"{name}.weight"].numpy()
        np.testing.assert_allclose(saved, W * gate(S.astype(float)), atol=1e-6)
        kept += np.count_nonzero(saved)
    assert 0 <= kept - round(0.1 * sum(W.size for W, _ in seen["before"].values())) <= 3                     # equal scores at the last place


def test_the_open_loop(data, tmp_path, monkeypatch):
    """--penalty: constant from the first step on, no goal, no multipliers; a larger one presses harder."""
    weak, strong = (run_of(data, tmp_path, monkeypatch, "--penalty", str(x), steps=4) for x in (1e-3, 1e4))
    assert weak["goal"] == [None] * 4 and weak["code"] == 0 and weak["state"][-1] == dict(l1=0.0, l2=0.0)
    start = sigmoid(2.197 - 2 / 3 * math.log(0.1 / 1.1))                       # E[L0] of the first gate
    assert weak["penalty"][0] == pytest.approx(1e-3 * start, rel=1e-5) and strong["penalty"][0] == pytest.approx(1e4 * start, rel=1e-5)
    assert np.mean([s.mean() for s in strong["S"][-1]]) < np.mean([s.mean() for s in weak["S"][-1]]) - 0.05


def test_v_of_one_has_no_gates(data, tmp_path, monkeypatch):
    seen = run_of(data, tmp_path, monkeypatch, "--sparsity", "1", steps=2)
    assert seen["noise"] == [[], []] and seen["kept"] == [1.0, 1.0] and seen["penalty"] == [0.0, 0.0] and seen["code"] == 0

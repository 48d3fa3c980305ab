"""mgpp.py: the prior's gradient against autograd of the log mixture in float64, the zeroings by brute force, and the life of a zero in a
run: zeroed, regrown, zeroed again, frozen."""
import math
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

import common
import mgpp

PRIORS = [(0.1, 1e-10, 0.05), (1e-4, 1e-10, 0.05), (1e-7, 1e-12, 0.05), (1e-6, 1e-7, 0.1), (0.9, 1e-9, 0.1), (0.5, 1e-2, 0.05), (1 - 1e-9, 1e-10, 1.0)]
SIZES = np.r_[0.0, np.logspace(-8, 1, 400)]


def log_prior(w, lam, s0, s1):
    """log(lam N(w; 0, s1) + (1 - lam) N(w; 0, s0)), s0 and s1 variances."""
    parts = [math.log(share) - 0.5 * math.log(2 * math.pi * s) - w ** 2 / (2 * s) for share, s in ((lam, s1), (1 - lam, s0))]
    return torch.logsumexp(torch.stack(parts), 0)


@pytest.mark.parametrize("lam, s0, s1", PRIORS)
def test_prior_gradient_by_autograd(lam, s0, s1):
    w = torch.tensor(np.r_[-SIZES, SIZES], requires_grad=True)
    (expected,) = torch.autograd.grad(-log_prior(w, lam, s0, s1).sum(), w)
    ours = mgpp.prior_gradient(w.detach(), lam, s0, s1)
    np.testing.assert_allclose(ours.numpy(), expected.numpy(), rtol=1e-9, atol=1e-12)
    assert ours[0] == 0 and torch.equal(ours[:len(SIZES)], -ours[len(SIZES):])                            # odd
    single = mgpp.prior_gradient(w.detach().float(), lam, s0, s1)
    assert torch.isfinite(single).all()
    np.testing.assert_allclose(single.numpy(), mgpp.prior_gradient(w.detach().float().double(), lam, s0, s1).numpy(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("lam, s0, s1", PRIORS)
def test_prior_gradient_far_out_and_in_half_precision_is_finite(lam, s0, s1):
    far = torch.tensor([1e-30, 1e-20, 1e3, 1e10, 1e18, 3e38])
    assert torch.isfinite(mgpp.prior_gradient(far, lam, s0, max(s1, 1.0))).all()
    np.testing.assert_allclose(mgpp.prior_gradient(far[2:5], lam, s0, s1).numpy(), far[2:5].numpy() / s1, rtol=1e-6)     # the slab's alone


def test_prior_gradient_needs_variances():
    """At the middle of the spike the pull is w / s0: a variance. (With standard deviations it would be w / s0^2.)"""
    assert float(mgpp.prior_gradient(torch.tensor(1e-7, dtype=torch.float64), 0.1, 1e-10, 0.05)) == pytest.approx(1e-7 / 1e-10, rel=1e-3)


def test_mix_of_one_is_plain_l2():
    """One Adam step with the prior's gradient added is torch's own Adam with L2 of weight 1 / (n s1), in the gradient."""
    rng, n, s1 = np.random.default_rng(0), 500, 0.05
    start, grad = rng.normal(size=(4, 4)), rng.normal(size=(4, 4))
    ours, theirs = (torch.nn.Parameter(torch.tensor(start)) for _ in range(2))
    for p in (ours, theirs):
        p.grad = torch.tensor(grad)
    ours.grad.add_(mgpp.prior_gradient(ours.detach(), 1.0, 1e-10, s1), alpha=1 / n)
    torch.optim.AdamW([ours], lr=0.1, weight_decay=0.0).step()
    torch.optim.Adam([theirs], lr=0.1, weight_decay=1 / (n * s1)).step()
    assert torch.equal(ours, theirs) and not torch.equal(ours.detach(), torch.tensor(start))
    w = torch.tensor(SIZES)
    np.testing.assert_allclose(mgpp.prior_gradient(w, 1.0, 1e-10, s1).numpy(), SIZES / s1, rtol=1e-12)
    np.testing.assert_allclose(mgpp.prior_gradient(w[1:], 1 - 1e-15, 1e-2, s1).numpy(), SIZES[1:] / s1, rtol=1e-6)       # and its limit


# ---- schedules

@pytest.mark.parametrize("T, v, t_i, t_f, v_i", [(1000, 0.03, 0.05, 0.3, 0.7), (55000, 0.1, 0.2, 0.0, 0.5), (10, 0.1, 0.1, 0.2, 0.7), (40, 0.8, 0.1, 0.3, 0.7)])
def test_schedule(T, v, t_i, t_f, v_i):
    """1 before t_i, v_i (or v, if that is more) at t_i, the cubic of METHODS.md, v from T - t_f on."""
    for t in np.unique(np.linspace(0, T, 41).astype(int)):
        if t < t_i * T:
            expected = 1.0
        elif t >= T - t_f * T:
            expected = v
        else:
            expected = v + (max(v, v_i) - v) * (1 - (t - t_i * T) / (T - t_i * T - t_f * T)) ** 3
        assert mgpp.schedule(int(t), T, v, t_i, t_f, v_i) == pytest.approx(expected, abs=1e-12), t
    assert mgpp.schedule(T, T, v, t_i, t_f, v_i) == v


def test_mixing_weight_by_hand():
    at = [mgpp.mixing_weight(t, 100, 0.2, 0.3) for t in (0, 20, 45, 70, 99)]
    assert at == pytest.approx([0.1, 0.1, (0.1 + 1e-4) / 2, 1e-4, 1e-4])


# ---- zeroing

@pytest.mark.parametrize("v", [1e-6, 0.1, 0.25, 0.5, 0.9, 1.0])
def test_zero_smallest_by_brute_force(v):
    rng = np.random.default_rng(1)
    matrices = [rng.normal(size=(4, 4)) * 3, rng.normal(size=(2, 8)), rng.integers(-1, 2, size=(4, 4)) * 0.5, np.zeros((3, 2))]
    held = [torch.nn.Parameter(torch.tensor(m)) for m in matrices]
    mgpp.zero_smallest(held, v)
    flat = np.concatenate([m.ravel() for m in matrices])
    stay = np.zeros(flat.size, bool)
    stay[np.argsort(-np.abs(flat), kind="stable")[:max(1, round(v * flat.size))]] = True
    assert np.array_equal(np.concatenate([h.detach().numpy().ravel() for h in held]), np.where(stay, flat, 0))


# ---- the life of a zero, in a run

def run_of(data, tmp_path, monkeypatch, *flags, steps=40):
    """Run main() and look on: weights after each step (flat arrays), the gradients before and after the prior's part, the lam of each."""
    seen, prunable, log, clip, prior = dict(w=[], g=[], lam=[]), common.prunable, common.Run.log, torch.nn.utils.clip_grad_norm_, mgpp.prior_gradient

    def flat(tensors):
        return torch.cat([t.detach().flatten() for t in tensors]).numpy().copy()

    def spy_prunable(model):
        seen.setdefault("layers", list(prunable(model).values()))
        return prunable(model)

    def spy_clip(parameters, most, *args, **more):
        seen["g"].append(flat([layer.weight.grad for layer in seen["layers"]]))
        seen["clip"] = most
        return clip(parameters, most, *args, **more)

    def spy_log(self, *args):
        seen["w"].append(flat([layer.weight for layer in seen["layers"]]))
        return log(self, *args)

    def spy_prior(w, lam, s0, s1):
        seen["lam"].append(lam)
        return prior(w, lam, s0, s1) * seen.get("strength", 1)
    monkeypatch.setattr(common, "prunable", spy_prunable)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", spy_clip)
    monkeypatch.setattr(common.Run, "log", spy_log)
    monkeypatch.setattr(mgpp, "prior_gradient", spy_prior)
    if "none" in flags:
        seen["strength"], flags = 0, [f for f in flags if f != "none"]
    args = mgpp.flags().parse_args(["--task", "squad", "--data", str(data), "--out", str(tmp_path / f"o{len(list(tmp_path.iterdir()))}"), "--device",
                                    "cpu", "--preset", "mini", "--batch_size", "4", "--steps", str(steps), *flags])
    seen.update(code=mgpp.main(args), args=args)
    monkeypatch.undo()
    return seen


def test_zeros_regrow_and_then_freeze(data, tmp_path, monkeypatch):
    seen = run_of(data, tmp_path, monkeypatch, "--sparsity", "0.1", "--interval", "5")
    w, (T, t_i, t_f), n = seen["w"], (40, 2, 12), len(seen["w"][0])
    zeros = [x == 0 for x in w]                                             # zeros[i]: after step i + 1
    assert seen["code"] == 0 and len(w) == T and seen["clip"] == math.inf
    for step in range(1, T - t_f):
        share = np.mean(~zeros[step - 1])
        if step >= t_i and step % 5 == 0:
            v = 0.1 + 0.6 * (1 - (step - t_i) / (T - t_i - t_f)) ** 3       # what remains after a zeroing: the cubic from v_i = 0.7
            assert np.sum(~zeros[step - 1]) == round(v * n), step
        else:
            assert share > 0.9, (step, share)                               # one step later almost all have left zero: no mask holds them
    assert np.mean(w[5][zeros[4]] != 0) > 0.9                               # zeroed at step 5, back after step 6
    kept = round(0.1 * n)
    for step in range(T - t_f, T + 1):
        assert np.sum(~zeros[step - 1]) == kept and np.array_equal(zeros[step - 1], zeros[T - t_f - 1]), step
    moved = w[-2] != w[T - t_f - 1]
    assert not moved[zeros[-1]].any() and moved[~zeros[-1]].mean() > 0.99   # the zeroed stay put, the kept go on learning
    saved = safetensors.torch.load_file(Path(seen["args"].out) / "model.safetensors")
    assert sum(int((x != 0).sum()) for name, x in saved.items() if ".encoder.layer." in name and x.dim() == 2) == kept


def test_the_prior_is_in_the_gradient_once_in_n(data, tmp_path, monkeypatch):
    """The first step's gradient, with the prior and without: they differ by its formula over the number of training windows."""
    with_prior = run_of(data, tmp_path, monkeypatch, "--sparsity", "0.1", "--slab", "1e-4", "--spike", "1e-6", steps=2)
    without = run_of(data, tmp_path, monkeypatch, "--sparsity", "0.1", "--slab", "1e-4", "--spike", "1e-6", "none", steps=2)
    start = safetensors.torch.load_file(Path(common.MINI) / "bert/model.safetensors")
    six = ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense", "intermediate.dense", "output.dense")
    w = torch.cat([start[f"bert.encoder.layer.{i}.{name}.weight"].flatten() for i in range(4) for name in six]).double().requires_grad_()
    (pull,) = torch.autograd.grad(-log_prior(w, 0.1, 1e-6, 1e-4).sum(), w)
    n = sum(1 for _ in common.read_squad(Path(data) / "squad/train-v1.1.json"))           # contexts of one window each
    difference = with_prior["g"][0].astype(float) - without["g"][0]
    np.testing.assert_allclose(difference, pull.numpy() / n, rtol=1e-3, atol=1e-4)        # weight by weight
    assert np.abs(difference).max() > 1                                     # and it is no small thing that was compared


def test_lam_falls_while_pruning_and_mix_fixes_it(data, tmp_path, monkeypatch):
    falling = run_of(data, tmp_path, monkeypatch, "--sparsity", "0.5", steps=10)["lam"][::24]
    assert falling == pytest.approx([0.1 + (1e-4 - 0.1) * min(max((t - 0.5) / 6.5, 0), 1) for t in range(10)])
    assert set(run_of(data, tmp_path, monkeypatch, "--sparsity", "0.5", "--mix", "1", steps=2)["lam"]) == {1.0}
    assert run_of(data, tmp_path, monkeypatch, "--sparsity", "1", steps=2)["lam"] == []        # V = 1 is dense fine-tuning: no prior


def test_spike_and_slab_the_wrong_way_round(data, tmp_path, monkeypatch):
    with pytest.raises(common.Mistake, match="--spike"):
        run_of(data, tmp_path, monkeypatch, "--spike", "0.1", "--slab", "0.01", steps=2)

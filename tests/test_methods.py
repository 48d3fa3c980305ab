"""The methods' definitions against formulas in numpy, brute force and finite differences."""
import importlib
import math

import numpy as np
import pytest
import torch
from conftest import METHODS, ROOT

import common
import l0
import magnitude
import mgpp
import mvp
import rpp
import soft_mvp

# ---- the learning rate, the loss with a teacher, the schedules

def test_lr_factor_by_hand():
    factors = [magnitude.lr_factor(step, 10, 0.2, 0.0) for step in range(10)]
    falling = [7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8]
    assert factors == pytest.approx([0.5, 1.0, 1.0, *falling])
    factors = [magnitude.lr_factor(step, 4, 0.0, 0.1) for step in range(4)]
    assert factors == pytest.approx([1.0, 0.775, 0.55, 0.325])


class Answer(dict):
    @property
    def loss(self):
        return self["loss"]


@pytest.mark.parametrize("method", METHODS)
def test_distillation_by_hand(method):
    task_loss = importlib.import_module(method).task_loss
    start = np.array([[1.0, 3.0], [0.5, 0.0]])          # (batch, tokens)
    end = np.array([[0.0, 0.5], [2.0, 1.0]])
    taught_start = np.array([[2.0, 0.0], [0.0, 3.0]])
    taught_end = np.array([[1.0, 1.0], [1.0, 0.0]])

    def answer(a, b):
        return Answer(loss=torch.tensor(0.7), start_logits=torch.tensor(a),
                      end_logits=torch.tensor(b))

    def kl(student, teacher):
        p = np.exp(teacher / 2) / np.exp(teacher / 2).sum(axis=1, keepdims=True)
        q = np.exp(student / 2) / np.exp(student / 2).sum(axis=1, keepdims=True)
        return (p * np.log(p / q)).sum(axis=1).mean()

    expected = 0.1 * 0.7 + 0.9 * 4 * (kl(start, taught_start) + kl(end, taught_end)) / 2
    loss = task_loss(lambda: answer(start, end), {}, lambda: answer(taught_start, taught_end))
    assert float(loss) == pytest.approx(expected, rel=1e-5)
    assert float(task_loss(lambda: answer(start, end), {}, None)) == pytest.approx(0.7)


def test_cubic_schedule():
    values = [magnitude.schedule(step, 100, 0.1, 0.2, 0.3) for step in range(100)]
    assert values[:21] == [1.0] * 21
    assert values[70:] == pytest.approx([0.1] * 30)
    assert values[45] == pytest.approx(0.1 + 0.9 * 0.5 ** 3)
    assert all(a >= b for a, b in zip(values, values[1:]))


def test_mgpp_schedules():
    values = [mgpp.fraction_left(step, 100, 0.1, 0.2, 0.3, 0.7) for step in range(101)]
    assert values[:20] == [1.0] * 20 and values[20] == pytest.approx(0.7)
    assert values[45] == pytest.approx(0.1 + 0.6 * 0.5 ** 3)
    assert values[70:] == pytest.approx([0.1] * 31)
    weights = [mgpp.mixing_weight(step, 100, 0.2, 0.3) for step in (0, 20, 45, 70, 99)]
    assert weights == pytest.approx([0.1, 0.1, 0.05005, 1e-4, 1e-4])


# ---- masks

def brute_force_top(scores, k):
    """The places of the k largest, of equal ones the first."""
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    return set(order[:k])


@pytest.mark.parametrize("script", [magnitude, mvp, soft_mvp, mgpp])
def test_top_v_brute_force(script):
    rng = np.random.default_rng(0)
    for levels in (2, 4, 1000):                 # few levels: many ties
        for v in (0.01, 0.1, 0.5, 0.9, 1.0):
            scores = rng.integers(levels, size=(4, 4)).astype(np.float32)
            mask = script.top_v(torch.tensor(scores), v)
            expected = brute_force_top(scores.flatten().tolist(), max(1, round(v * 16)))
            assert set(mask.flatten().nonzero().flatten().tolist()) == expected
            assert mask.shape == (4, 4)


def test_top_v_of_equal_scores_is_exact():
    assert int(mvp.top_v(torch.zeros(30, 40), 0.03).sum()) == 36


def test_kth_largest_as_on_a_gpu():
    class OnGPU(torch.Tensor):
        device = property(lambda self: torch.device("cuda"))

    x = torch.randn(101)
    for k in (1, 50, 101):
        expected = sorted(x.tolist())[-k]
        assert float(mvp.kth_largest(x, k)) == expected
        assert float(mvp.kth_largest(x.as_subclass(OnGPU), k)) == expected


def masked_layers(script, shapes):
    return [script.Masked(torch.randn(shape)) for shape in shapes]


@pytest.mark.parametrize("script", [magnitude, mvp])
def test_local_and_global_masks(script):
    torch.manual_seed(0)
    masked = masked_layers(script, [(20, 30), (40, 50)])
    scores = [torch.randn(20, 30), 3 + torch.randn(40, 50)]
    script.update_masks(masked, scores, 0.1, "local")
    assert [int(m.mask.sum()) for m in masked] == [60, 200]
    script.update_masks(masked, scores, 0.1, "global")
    row = np.concatenate([s.numpy().flatten() for s in scores])
    first = brute_force_top(row[:600].tolist(), int(0.005 * 600) + 1)           # the floor
    rest = row.copy()
    rest[list(first)] = np.inf
    expected = brute_force_top(rest.tolist(), 260)
    got = torch.cat([m.mask.flatten() for m in masked]).nonzero().flatten().tolist()
    assert set(got) == expected and first <= set(got)
    script.update_masks(masked, scores, 1, "local")
    assert all(bool(m.mask.all()) for m in masked)


@pytest.mark.parametrize("v", [0.5, 0.1, 0.03, 0.006, 0.002])
def test_soft_movement_counts_and_floors(v):
    """The total is exact, each matrix has its floor, the rest are the highest scores of all."""
    torch.manual_seed(1)
    shapes = [(20, 30), (40, 50), (30, 100)]
    masked = masked_layers(soft_mvp, shapes)
    scores = [torch.randn(shape) + 4 * i for i, shape in enumerate(shapes)]
    soft_mvp.update_masks(masked, scores, v, "global")
    floors = []
    for s in scores:                            # of the official code; less if v is below 0.5 %
        n = s.numel()
        floors.append(min(int(0.005 * n) + 1, max(1, round(v * n))))
    row = np.concatenate([s.numpy().flatten() for s in scores])
    starts = np.cumsum([0] + [s.numel() for s in scores])
    for start, s, floor in zip(starts, scores, floors):
        first = brute_force_top(s.flatten().tolist(), floor)
        row[[start + place for place in first]] = np.inf
    expected = brute_force_top(row.tolist(), round(v * 5600))
    got = torch.cat([m.mask.flatten() for m in masked]).nonzero().flatten().tolist()
    assert set(got) == expected and len(got) == round(v * 5600)
    for m, floor in zip(masked, floors):
        assert int(m.mask.sum()) >= floor


def test_soft_movement_open_loop():
    torch.manual_seed(2)
    masked = masked_layers(soft_mvp, [(20, 30), (20, 30)])
    scores = [torch.randn(20, 30), torch.full((20, 30), -9.0)]
    soft_mvp.update_masks_open(masked, scores, 0.1)
    assert torch.equal(masked[0].mask.bool(), 1 / (1 + torch.exp(-scores[0])) > 0.1)
    assert int(masked[1].mask.sum()) == 4 and bool(masked[1].mask.flatten()[:4].all())


# ---- gradients

def test_magnitude_gradient_is_masked():
    masked = magnitude.Masked(torch.zeros(3, 4))
    masked.mask[0] = 0
    weight = torch.randn(3, 4, requires_grad=True)
    upstream = torch.randn(3, 4)
    (masked(weight) * upstream).sum().backward()
    assert torch.equal(weight.grad, upstream * masked.mask)


@pytest.mark.parametrize("script", [mvp, soft_mvp])
def test_straight_through(script):
    """dL/dW = dL/dW' M and dL/dS = dL/dW' W for L = sum of squares of (W' x)."""
    torch.manual_seed(0)
    masked = script.Masked(torch.zeros(3, 4))
    masked.mask.copy_(torch.tensor([[1.0, 0, 1, 0]] * 3))
    weight = torch.randn(3, 4, requires_grad=True)
    x = torch.randn(4, 5)
    (masked(weight) @ x).square().sum().backward()
    effective = (weight * masked.mask).detach().numpy()
    upstream = 2 * effective @ x.numpy() @ x.numpy().T
    np.testing.assert_allclose(weight.grad, upstream * masked.mask.numpy(), rtol=1e-4)
    np.testing.assert_allclose(masked.scores.grad, upstream * weight.detach().numpy(), rtol=1e-4)


def test_sigmoid_penalty():
    scores = [torch.zeros(2, 3), torch.full((4, 5), 1.0)]
    expected = (0.5 + 1 / (1 + math.exp(-1))) / 2
    assert float(soft_mvp.sigmoid_penalty(scores)) == pytest.approx(expected)


# ---- L0

def test_gate_is_louizos():
    u = np.array([1e-4, 0.1, 0.5, 0.9, 1 - 1e-4])
    for log_alpha in (-3.0, 0.0, 2.0):
        s = 1 / (1 + np.exp(-(np.log(u) - np.log(1 - u) + log_alpha) / (2 / 3)))
        expected = np.clip(s * 1.2 - 0.1, 0, 1)
        noise = torch.tensor(np.log(u) - np.log(1 - u))
        got = l0.gate(torch.full((5,), log_alpha, dtype=torch.float64), noise)
        np.testing.assert_allclose(got, expected, atol=1e-9)
    still = np.clip(1.2 / (1 + np.exp(3.0)) - 0.1, 0, 1)
    assert float(l0.gate(torch.tensor(-3.0))) == pytest.approx(still)
    assert float(l0.gate(torch.tensor(l0.THRESHOLD - 1e-3))) == 0.0
    assert float(l0.gate(torch.tensor(l0.THRESHOLD + 1e-3))) > 0.0


def test_expected_l0_is_the_frequency_of_open_gates():
    torch.manual_seed(0)
    for score in (-2.0, 0.0, 1.0):
        u = torch.rand(200_000)
        z = l0.gate(torch.full_like(u, score), u.logit())
        frequency = (z > 0).float().mean()
        expected = float(l0.expected_l0([torch.tensor([score])]))
        assert expected == pytest.approx(float(frequency), abs=5e-3)
    pair = [torch.zeros(2), torch.full((6,), -5.0)]     # a mean over matrices, not over weights
    separate = [float(l0.expected_l0([scores])) for scores in pair]
    assert float(l0.expected_l0(pair)) == pytest.approx(sum(separate) / 2)


def test_gate_gradient_by_finite_differences():
    scores = torch.tensor([-1.0, 0.3, 2.0], dtype=torch.float64, requires_grad=True)
    noise = torch.tensor([0.5, -0.7, -1.0], dtype=torch.float64)
    l0.gate(scores, noise).sum().backward()
    h = 1e-6
    up = l0.gate(scores.detach() + h, noise)
    down = l0.gate(scores.detach() - h, noise)
    np.testing.assert_allclose(scores.grad, (up - down) / (2 * h), atol=1e-7)


def test_gated_has_noise_in_training_alone():
    gated = l0.Gated(torch.ones(2, 2))
    gated.noise.fill_(-9.0)
    assert float(gated(torch.ones(2, 2)).detach().sum()) == 0.0
    with torch.no_grad():
        assert float(gated(torch.ones(2, 2)).sum()) > 3.9


@pytest.mark.parametrize("level", [-9.0, None])
def test_close_gap_is_exact(level):
    """10 of 100 wanted; tied scores too."""
    torch.manual_seed(0)
    scores = [torch.randn(6, 10) - 2.4, torch.randn(4, 10) - 2.4]
    if level is not None:
        scores = [torch.full((6, 10), level), torch.full((4, 10), level)]
    l0.close_gap(scores, 0.1)
    assert sum(int((s > l0.THRESHOLD).sum()) for s in scores) == 10
    assert l0.share_kept(scores) == pytest.approx(0.1)


# ---- MGPP

def test_prior_gradient_by_finite_differences():
    def log_prior(w, lam, s0, s1):
        slab = lam * np.exp(-w ** 2 / (2 * s1)) / np.sqrt(2 * np.pi * s1)
        spike = (1 - lam) * np.exp(-w ** 2 / (2 * s0)) / np.sqrt(2 * np.pi * s0)
        return np.log(slab + spike)

    w = np.array([-0.4, -0.02, 1e-3, 0.011, 0.3])
    h = 1e-7
    for lam, s0, s1 in ((0.1, 1e-4, 0.05), (1e-4, 1e-5, 0.05)):
        slope = (log_prior(w + h, lam, s0, s1) - log_prior(w - h, lam, s0, s1)) / (2 * h)
        got = mgpp.prior_gradient(torch.tensor(w), lam, s0, s1)
        np.testing.assert_allclose(got, -slope, rtol=1e-4)
    np.testing.assert_allclose(mgpp.prior_gradient(torch.tensor(w), 1, 1e-10, 0.05), w / 0.05)
    extreme = torch.tensor([0.0, 1e-12, 5.0])
    assert bool(torch.isfinite(mgpp.prior_gradient(extreme, 1e-7, 1e-12, 0.05)).all())


def test_zero_smallest_over_all_matrices():
    weights = [torch.tensor([[1.0, -5.0]]), torch.tensor([[0.5, 3.0], [-0.1, 4.0]])]
    mgpp.zero_smallest(weights, 0.5)
    assert weights[0].tolist() == [[0.0, -5.0]]
    assert weights[1].tolist() == [[0.0, 3.0], [0.0, 4.0]]


# ---- RPP

def test_prox_is_the_argmin():
    grid = np.linspace(-3, 3, 6001)
    for a, threshold in ((1.3, 0.5), (-0.2, 0.5), (0.5, 0.5), (-2.0, 0.1)):
        best = grid[np.argmin((grid - a) ** 2 / 2 + threshold * np.abs(grid))]
        got = rpp.prox(torch.tensor([a]), torch.tensor([threshold]))
        assert float(got) == pytest.approx(best, abs=1e-3)
    assert str(float(rpp.prox(torch.tensor([-0.2]), torch.tensor([0.5])))) == "0.0"


def test_reweight():
    w = torch.tensor([0.0, -0.5, 2.0])
    np.testing.assert_allclose(rpp.reweight(w, 1, 1e-9), [1e9, 2.0, 0.5], rtol=1e-5)
    np.testing.assert_allclose(rpp.reweight(w, 2, 1e-9), [1e9, 4.0, 0.25], rtol=1e-5)


def test_proximal_step_and_the_end_of_a_round():
    """Against the formulas, in numpy."""
    torch.manual_seed(0)
    a = torch.randn(4, 4)
    alpha = 0.5 + torch.rand(4, 4)
    weights, alphas = [a.clone()], [alpha.clone()]
    gamma = rpp.proximal_step(weights, alphas, 0.25, lr=0.1, p=2, eps=1e-3)
    pulled = np.abs(a.numpy()) - 0.1 * gamma * alpha.numpy()
    expected = np.sign(a.numpy()) * np.maximum(pulled, 0)
    np.testing.assert_allclose(weights[0], expected, atol=1e-6)
    assert abs(np.count_nonzero(expected > 1e-6) + np.count_nonzero(expected < -1e-6) - 4) <= 1
    np.testing.assert_allclose(alphas[0], 1 / (weights[0].numpy() ** 2 + 1e-3), rtol=1e-5)
    assert rpp.proximal_step(weights, alphas, 0.25, lr=0.1, gamma=0.5) == 0.5


def test_solve_gamma_leaves_the_share():
    torch.manual_seed(0)
    weights = [torch.randn(10, 10), 5 * torch.randn(20, 10)]
    alphas = [1 / torch.rand(10, 10), 1 / torch.rand(20, 10)]
    for v in (0.5, 0.1, 0.01):
        gamma = rpp.solve_gamma(weights, alphas, v, lr=0.01)
        left = [rpp.prox(a, 0.01 * gamma * alpha) for a, alpha in zip(weights, alphas)]
        count = sum(int(torch.count_nonzero(w)) for w in left)
        assert abs(count - round(v * 300)) <= 1


def test_mlm_nsp_batch():
    tokenizer = common.load_tokenizer(str(ROOT / "mini" / "bert"))
    documents = [[[100 + 10 * d + line] * 6 for line in range(8)] for d in range(6)]
    rng = np.random.default_rng(0)
    words = np.arange(100, 160)
    batch = rpp.mlm_nsp_batch(documents, tokenizer, words, 400, 40, rng)
    asked = batch["labels"] >= 0
    n_words = (batch["attention_mask"] == 1).sum() - 3 * 400
    assert float(asked.sum() / n_words) == pytest.approx(0.15, abs=0.02)
    masked = (batch["input_ids"] == tokenizer.mask_token_id) & asked
    assert float(masked.sum() / asked.sum()) == pytest.approx(0.8, abs=0.03)
    assert batch["input_ids"].shape[1] <= 40
    swapped = batch["next_sentence_label"].float().mean()
    assert 0.45 < float(swapped) < 0.65
    original = torch.where(asked, batch["labels"], batch["input_ids"])
    for row, types, label in zip(original, batch["token_type_ids"], batch["next_sentence_label"]):
        text = row[(row >= 100) & (row < 160)]
        home = set(((row[types == 0] - 100) // 10)[row[types == 0] >= 100].tolist())
        assert len(home) == 1 and len(text) > 0
        second = row[types == 1]
        other = set(((second - 100) // 10)[(second >= 100) & (second < 160)].tolist())
        assert (other == home) == (int(label) == 0)


def test_read_corpus(tmp_path):
    tokenizer = common.load_tokenizer(str(ROOT / "mini" / "bert"))
    path = tmp_path / "corpus.txt"
    text = "\n\nhe stole\n\na drum\na chair\n \nhe\n\n\u200b\n\nhe read\n\n"
    path.write_text(text, encoding="utf-8")
    documents = rpp.read_corpus(path, tokenizer)
    assert [len(document) for document in documents] == [1, 2, 1, 1]
    path.write_text("one document\n")
    with pytest.raises(SystemExit, match="give four at least"):
        rpp.read_corpus(path, tokenizer)
    with pytest.raises(SystemExit, match="No such file"):
        rpp.read_corpus(tmp_path / "nothing.txt", tokenizer)


# ---- hyper-parameters

@pytest.mark.parametrize("method", METHODS)
def test_papers_hyper_parameters(method):
    paper = importlib.import_module(method).HYPER["paper"]
    squad = paper["*"] | paper["squad"]
    assert (squad["epochs"], squad["batch_size"], squad["length"]) == (10, 16, 384)
    assert squad["lr"] == (5e-5 if method == "mgpp" else 3e-5)
    if method in ("mvp", "soft_mvp"):
        assert squad["score_lr"] == 1e-2 and (squad["t_i"], squad["t_f"]) == (0.1, 0.2)
    if method == "l0":
        assert squad["score_lr"] == 1e-1 and squad["t_f"] == 0.1
        assert (paper["*"] | paper["qqp"])["score_lr"] == 1e-2
    if method == "mgpp":
        assert (squad["v_i"], squad["spike"], squad["slab"]) == (0.5, 1e-10, 0.05)
        sst2 = paper["*"] | paper["sst2"]
        assert (sst2["spike"], sst2["slab"], sst2["interval"]) == (1e-9, 0.1, 10)
        assert sst2["adam"] == dict(betas=[0.9, 0.98], eps=1e-6)
        assert squad["adam"] == dict(betas=[0.9, 0.999], eps=1e-8)

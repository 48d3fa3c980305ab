"""The methods' functions against the numbers of the papers' official code.

official.json holds 40 small cases. Each names its source (repository, commit, file, function), its
input in full, and the output that the official code gave for it in float64. It holds numbers only.
Matrices are (out, in), inputs x and gradients (batch, features). L = sum(output * upstream), where
output = x W'^T, so that upstream is dL/d output.

Where several scripts hold a copy of a function, each copy is held. Masks, places and counts must
be equal. The other numbers may differ by 2e-6 max(1, |theirs|), those of MGPP's prior and lambda
by 2e-6 |theirs|, in float64.

Left out are the inputs for which ours differs on purpose: v n that is not whole (theirs is cut to
an integer, ours is rounded), and which of equal scores are kept (theirs is up to the sort).
"""
import importlib
import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from conftest import METHODS, run
from torch.testing import assert_close
from transformers.modeling_outputs import QuestionAnsweringModelOutput, SequenceClassifierOutput

import l0
import magnitude
import mgpp
import mvp
import soft_mvp

CASES = json.loads((Path(__file__).parent / "official.json").read_text())["cases"]


def tensor(numbers):
    return torch.tensor(numbers, dtype=torch.float64)


def same(ours, theirs):
    assert torch.as_tensor(ours).tolist() == theirs


def near(ours, theirs):
    """As above: atol + rtol |theirs| is at most 2e-6 max(1, |theirs|)."""
    ours = torch.as_tensor(ours, dtype=torch.float64)
    assert_close(ours, tensor(theirs), rtol=1e-6, atol=1e-6)


def relatively_near(ours, theirs):
    ours = torch.as_tensor(ours, dtype=torch.float64)
    assert_close(ours, tensor(theirs), rtol=2e-6, atol=0.0)


# ---- magnitude, movement and soft movement: masks, and the gradients through them

def scopes(script):
    """The arguments of update_masks after v: one matrix has the same mask by each of them."""
    if script is mgpp:
        return []                               # it has no masks, but a top_v
    if script is soft_mvp:
        return [()]
    return [("local",), ("global",)]


def masks_of(script, scores, v):
    """The mask as top_v gives it, then as update_masks writes it."""
    yield script.top_v(scores, v).int()
    for scope in scopes(script):
        masked = script.Masked(torch.zeros_like(scores))
        masked.mask.fill_(0.5)                  # all of the mask must be written
        script.update_masks([masked], [scores], v, *scope)
        yield masked.mask


def hold_gradients(masked, given, theirs):
    """The output and the gradients through a layer whose weight goes through `masked`."""
    weight = tensor(given["weight"]).requires_grad_()
    output = tensor(given["x"]) @ masked(weight).T                      # (batch, out)
    (output * tensor(given["upstream"])).sum().backward()
    near(output, theirs["output"])
    near(weight.grad, theirs["weight_grad"])
    if "scores_grad" in theirs:
        near(masked.scores.grad, theirs["scores_grad"])


def hold_selection(script, scores, v, theirs):
    """The masks, and the lowest score that is kept."""
    for mask in masks_of(script, scores, v):
        same(mask, theirs["mask"])
    kept = scores[tensor(theirs["mask"]) == 1]
    same(script.kth_largest(scores.flatten(), len(kept)), kept.min().item())


def hold_masked(script, given, theirs):
    masked = script.Masked(tensor(given["weight"]))
    masked.mask.copy_(tensor(theirs["mask"]))
    hold_gradients(masked, given, theirs)


def hold_magnitude(given, theirs):
    hold_selection(magnitude, tensor(given["weight"]).abs(), given["v"], theirs)
    hold_masked(magnitude, given, theirs)


def hold_movement(given, theirs):
    for script in (magnitude, mvp, soft_mvp, mgpp):
        hold_selection(script, tensor(given["scores"]), given["v"], theirs)
    for script in (mvp, soft_mvp):
        hold_masked(script, given, theirs)


def hold_ties(given, theirs):
    scores = tensor(given["scores"])
    for script in (magnitude, mvp, soft_mvp, mgpp):
        for mask in masks_of(script, scores, given["v"]):
            same(mask.sum(), theirs["kept"])
            same(scores[mask == 1].sort().values, theirs["kept_scores_sorted"])


def open_mask(given):
    """soft_mvp's module with the mask that the open loop writes into it."""
    scores = tensor(given["scores"])
    masked = soft_mvp.Masked(torch.zeros_like(scores))
    masked.mask.fill_(0.5)
    soft_mvp.update_masks_open([masked], [scores], given["tau"])
    return masked


def hold_soft_movement(given, theirs):
    masked = open_mask(given)
    same(masked.mask, theirs["mask"])
    hold_gradients(masked, given, theirs)


def hold_soft_movement_least(given, theirs):
    """Too few scores pass tau: the highest are kept all the same."""
    mask = open_mask(given).mask
    same(mask.sum(), theirs["kept"])
    same(mask.flatten().nonzero().flatten(), theirs["kept_places"])


# ---- penalties and L0's gate

def hold_penalty(function, given, theirs):
    scores = [tensor(numbers).requires_grad_() for numbers in given["scores"]]
    penalty = function(scores)
    penalty.backward()
    near(penalty, theirs["penalty"])
    for s, gradient in zip(scores, theirs["scores_grad"], strict=True):
        near(s.grad, gradient)


def hold_sigmoid_penalty(given, theirs):
    hold_penalty(soft_mvp.sigmoid_penalty, given, theirs)


def hold_expected_l0(given, theirs):
    hold_penalty(l0.expected_l0, given, theirs)


def hold_gate(given, theirs):
    scores = tensor(given["scores"])
    u = tensor(given["u"])
    noise = u.log() - (1 - u).log()
    near(l0.gate(scores, noise), theirs["gate"])
    near(l0.gate(scores), theirs["evaluation_gate"])
    gated = l0.Gated(tensor(given["weight"]))
    gated.scores.data.copy_(scores)
    gated.noise.copy_(noise)
    hold_gradients(gated, given, theirs)
    with torch.no_grad():
        near(gated(torch.ones_like(scores)), theirs["evaluation_gate"])
    left = tensor(theirs["evaluation_gate"]) > 0
    near(l0.share_kept([scores]), left.double().mean().item())


# ---- the cubic schedule, and the penalty's weight

def cubic(script, given, v_f):
    """schedule() at all steps of a case. The official code counts its pauses in warm-ups."""
    warmup = given["warmup_steps"] / given["total_step"]
    t_i = given["initial_warmup"] * warmup
    t_f = given["final_warmup"] * warmup
    steps = given["step"]
    return tensor([script.schedule(t, given["total_step"], v_f, t_i, t_f) for t in steps])


def hold_cubic(given, theirs):
    for script in (magnitude, mvp, soft_mvp, l0):
        near(cubic(script, given, given["final_threshold"]), theirs["threshold"])


def hold_ramp(given, theirs):
    """tau and lambda both rise with 1 - v of a schedule that ends at 0."""
    for script in (magnitude, mvp, soft_mvp, l0):
        ramp = 1 - cubic(script, given, 0.0)
        near(given["final_threshold"] * ramp, theirs["threshold"])
        near(given["final_lambda"] * ramp, theirs["regu_lambda"])


def hold_l0_lambda(given, theirs):
    """L0's threshold and lambda do not move."""
    near(cubic(l0, given, given["final_threshold"]), theirs["threshold"])
    same([given["final_lambda"]] * len(given["step"]), theirs["regu_lambda"])


# ---- MGPP

def hold_prior(given, theirs):
    prior = mgpp.prior_gradient(tensor(given["w"]), given["lambda_mix"], given["sigma0"],
                                given["sigma1"])
    relatively_near(prior / given["train_size"], theirs["gradient_added"])


def times(given):
    """The steps, t_i and t_f of ours: the official code's last step index is its steps - 1."""
    steps = given["max_train_steps"] - 1
    return steps, given["initial_warmup_steps"] / steps, given["sparse_finetune_steps"] / steps


def hold_prior_at_a_step(given, theirs):
    lam = mgpp.mixing_weight(given["train_step_index"], *times(given))
    relatively_near(lam, theirs["lambda_mix"])
    prior = mgpp.prior_gradient(tensor(given["weight"]), lam, given["sigma0"], given["sigma1"])
    gradient = tensor(given["gradient"]) + prior / given["train_size"]
    relatively_near(gradient, theirs["gradient"])


def hold_mgpp_schedules(given, theirs):
    steps, t_i, t_f = times(given)
    v_i = 1 - given["initial_sparsity"]
    v_f = 1 - given["final_sparsity"]
    index = given["train_step_index"]
    lam = [mgpp.mixing_weight(t, steps, t_i, t_f) for t in index]
    left = [mgpp.fraction_left(t, steps, v_f, t_i, t_f, v_i) for t in index]
    relatively_near(lam, theirs["lambda_mix"])
    near(1 - tensor(left), theirs["sparsity"])


def hold_zeroing(given, theirs):
    weights = [tensor(numbers) for numbers in given["weights"]]
    total = sum(w.numel() for w in weights)
    mgpp.zero_smallest(weights, theirs["remain"] / total)
    for w, left in zip(weights, theirs["weights"], strict=True):
        same(w, left)


# ---- distillation

def hold_distillation(given, theirs):
    kind = QuestionAnsweringModelOutput if "start_logits" in given else SequenceClassifierOutput
    names = [name for name in ("logits", "start_logits", "end_logits") if name in given]
    for method in METHODS:
        logits = {name: tensor(given[name]).requires_grad_() for name in names}
        taught = {name: tensor(given[f"teacher_{name}"]) for name in names}
        student = kind(loss=tensor(given["task_loss"]), **logits)
        task_loss = importlib.import_module(method).task_loss
        teacher = kind(**taught)
        loss = task_loss(lambda out=student: out, {}, lambda out=teacher: out)
        loss.backward()
        near(loss, theirs["loss"])
        for name in names:
            near(logits[name].grad, theirs[f"{name}_grad"])


# ---- the cases

# {how the id of a case begins: (what holds it, how many cases there are)}
KINDS = {
    "magnitude": (hold_magnitude, 4),
    "movement": (hold_movement, 4),
    "movement ties": (hold_ties, 1),
    "movement all scores 0": (hold_ties, 1),
    "soft movement": (hold_soft_movement, 3),
    "soft movement floor": (hold_soft_movement_least, 2),
    "soft movement penalty": (hold_sigmoid_penalty, 1),
    "L0 gate": (hold_gate, 2),
    "L0 penalty": (hold_expected_l0, 1),
    "L0 lambda": (hold_l0_lambda, 1),
    "cubic": (hold_cubic, 3),
    "tau and lambda": (hold_ramp, 2),
    "MGPP prior gradient": (hold_prior, 7),
    "MGPP gradient with prior": (hold_prior_at_a_step, 1),
    "MGPP schedules": (hold_mgpp_schedules, 2),
    "MGPP zeroing": (hold_zeroing, 2),
    "distillation": (hold_distillation, 3),
}


def kind_of(case):
    """The longest key of KINDS with which the id begins."""
    return max((key for key in KINDS if case["id"].startswith(key)), key=len)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["id"])
def test_official(case):
    hold, _ = KINDS[kind_of(case)]
    hold(case["input"], case["output"])


def test_all_cases_are_held():
    assert len({case["id"] for case in CASES}) == 40
    found = Counter(kind_of(case) for case in CASES)
    assert found == {key: count for key, (_, count) in KINDS.items()}


def test_mgpp_zeroes_at_the_official_steps(monkeypatch, data, tmp_path):
    """The pauses between zeroings are main()'s: a run whose loss is 0, with a count of its steps.

    The official code zeroes after step index i, ours after i steps (see times()).
    """
    case = next(case for case in CASES if case["id"] == "MGPP schedules, to the end")
    given = case["input"]
    steps, t_i, t_f = times(given)
    done = []                                   # one entry per step
    zeroed = []                                 # numbers of steps after which weights were zeroed

    def no_loss(net, batch, teacher):
        done.append(batch)
        return 0 * sum(p.sum() for p in net.parameters())

    monkeypatch.setattr(mgpp, "task_loss", no_loss)
    monkeypatch.setattr(mgpp, "zero_smallest", lambda weights, v: zeroed.append(len(done)))
    presets = dict(t_i=t_i, t_f=t_f, v_i=1 - given["initial_sparsity"])
    monkeypatch.setitem(mgpp.HYPER["mini"], "tsv", presets)
    with pytest.raises(SystemExit):             # it misses its goal: nothing is zeroed here
        run("mgpp", data, tmp_path / "out", "--task", "tsv", "--steps", steps, "--interval",
            given["pruning_interval"], "--sparsity", 1 - given["final_sparsity"])
    zeroed.pop()                                # the call after the loop, before the model is saved
    same([int(index in zeroed) for index in given["train_step_index"]], case["output"]["zeroes"])

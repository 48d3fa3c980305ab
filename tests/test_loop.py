"""Whole runs against loops written here, with plain tensors and a sort in place of our classes."""
import json
import math

import numpy as np
import pytest
import torch
from conftest import ROOT, run
from torch.func import functional_call
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import common

STEPS, V, LR, SCORE_LR, LAMBDA = 8, 0.1, 5e-4, 1e-2, 1000.0
T_I, T_F = 0.2 * STEPS, 0.3 * STEPS
SPIKE, SLAB = 1e-10, 5.0               # with a narrower slab the prior would drown the loss


def cubic(step, highest, lowest):
    share = min(1.0, max(0.0, 1 - (step - T_I) / (STEPS - T_I - T_F)))
    return lowest + (highest - lowest) * share ** 3


def largest(scores, v):
    """A mask of the largest round(v n) elements; of equal ones the first."""
    order = np.argsort(-scores.detach().numpy().flatten(), kind="stable")
    mask = torch.zeros(scores.numel())
    mask[order[:round(v * len(order))].copy()] = 1
    return mask.view_as(scores)


def largest_of_all(scores, v):
    """One ranking of all matrices; each has its floor, int(0.005 n) + 1 elements."""
    row = torch.cat([s.detach().flatten() for s in scores]).numpy().copy()
    start = 0
    for s in scores:
        order = np.argsort(-row[start:start + s.numel()], kind="stable")
        row[start + order[:int(0.005 * s.numel()) + 1]] = np.inf
        start += s.numel()
    mask = largest(torch.tensor(row), v)
    return [m.view_as(s) for m, s in zip(mask.split([s.numel() for s in scores]), scores)]


def masks_of(method, weights, scores, v):
    if method == "magnitude":
        return [largest(w.abs(), v) for w in weights]
    if method == "mvp":
        return [largest(s, v) for s in scores]
    return largest_of_all(scores, v)


def pull_of_the_prior(w, lam):
    """-grad log(lam N(0, SLAB) + (1 - lam) N(0, SPIKE)), by automatic differentiation."""
    w = w.detach().double().requires_grad_()
    slab = math.log(lam / math.sqrt(SLAB)) - w ** 2 / (2 * SLAB)
    spike = math.log((1 - lam) / math.sqrt(SPIKE)) - w ** 2 / (2 * SPIKE)
    torch.logaddexp(slab, spike).sum().backward()
    return -w.grad.float()


def zero_all_but(weights, v):
    row = torch.cat([w.detach().flatten().abs() for w in weights])
    for w, stays in zip(weights, largest(row, v).split([w.numel() for w in weights])):
        w.data[stays.view_as(w) == 0] = 0


def by_hand(method, data):
    """The model that a method should leave after STEPS steps on the task tsv."""
    bert = ROOT / "mini" / "bert"
    task = common.Data("tsv", data, AutoTokenizer.from_pretrained(bert), 128)
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(bert).train()
    model.bert.embeddings.requires_grad_(False)
    names = [name for name, p in model.named_parameters() if ".encoder." in name and p.dim() == 2]
    weights = [model.get_parameter(name) for name in names]
    scores = [torch.zeros_like(w, requires_grad=True) for w in weights]
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW([{"params": trained, "lr": LR}], weight_decay=0.0, fused=True)
    if method in ("mvp", "soft_mvp"):
        optimizer.add_param_group({"params": scores, "lr": SCORE_LR})
    rates = [group["lr"] for group in optimizer.param_groups]
    for step, batch in zip(range(STEPS), task.batches(0, 8, 0)):
        torch.manual_seed(step)
        warmup = 0.05 * STEPS
        for group, rate in zip(optimizer.param_groups, rates):
            rise = (step + 1) / max(1, warmup)
            group["lr"] = rate * min(1.0, rise, (STEPS - step) / (STEPS - warmup))
        masks = [torch.ones_like(w) for w in weights]
        if method != "mgpp":
            masks = masks_of(method, weights, scores, cubic(step, 1.0, V))
        leaves = [(w.detach() * m).requires_grad_() for w, m in zip(weights, masks)]
        inputs = dict(task.collate(batch))
        loss = functional_call(model, dict(zip(names, leaves)), kwargs=inputs).loss
        optimizer.zero_grad()
        loss.backward()
        remains = [w != 0 for w in weights]
        pruning = step < round(STEPS - T_F)
        lam = 0.1 + (1e-4 - 0.1) * max(0.0, (step - T_I) / (STEPS - T_I - T_F))
        for w, s, m, leaf in zip(weights, scores, masks, leaves):
            w.grad = leaf.grad * m
            s.grad = leaf.grad * w.detach()
            if method == "soft_mvp":
                ramp = 1 - cubic(step, 1.0, 0.0)
                sigmoid = torch.sigmoid(s.detach())
                s.grad += LAMBDA * ramp * sigmoid * (1 - sigmoid) / s.numel() / len(weights)
            if method == "mgpp" and pruning:
                w.grad += pull_of_the_prior(w, lam) / 40            # 40 training rows
        if method != "mgpp":
            everything = [p for group in optimizer.param_groups for p in group["params"]]
            torch.nn.utils.clip_grad_norm_(everything, 1.0)
        optimizer.step()
        done = step + 1
        if method == "mgpp" and done in (2, 4, 6):                  # first, --interval 2, last
            zero_all_but(weights, cubic(done, 0.7, V))
        elif method == "mgpp" and not pruning:
            for w, stays in zip(weights, remains):
                w.data *= stays
    if method == "mgpp":
        zero_all_but(weights, V)
    else:
        for w, m in zip(weights, masks_of(method, weights, scores, V)):
            w.data *= m
    return model


@pytest.mark.parametrize("method", ["magnitude", "mvp", "soft_mvp", "mgpp"])
def test_whole_run_by_hand(data, tmp_path, method):
    flags = ["--task", "tsv", "--sparsity", str(V), "--t_i", str(T_I / STEPS)]
    if method == "mgpp":
        flags += ["--interval", "2", "--slab", str(SLAB)]
    run(method, data, tmp_path, *flags)
    if method == "mgpp":                        # after the last zeroing no weight grows again
        last = json.loads((tmp_path / "log.jsonl").read_text().split("\n")[-2])
        assert last["kept"] == pytest.approx(V, abs=1e-5)
    saved = AutoModelForSequenceClassification.from_pretrained(tmp_path).state_dict()
    wrong = []
    for name, weight in by_hand(method, data).state_dict().items():
        if not name.endswith("key.bias"):       # softmax cancels it: its gradient is rounding
            wrong.append(((saved[name] - weight).abs() > 1e-4).flatten())
    # A step is 5e-4 at most. After Adam's first step all scores are equal but for rounding, so the
    # optimizer of by_hand is fused, as in the scripts; on other machines a few weights may differ.
    assert torch.cat(wrong).float().mean() < 1e-3

"""Draws the pictures. matplotlib is needed here and nowhere else.

    pip install -r figures/requirements.txt
    python figures/draw.py                  all pictures whose inputs are there
    python figures/draw.py score            one of them

Drawn from files of the repository:
score.png      F1 against the fraction kept: the papers (PAPERS below), mini (results/mini.tsv)
runs.png       loss and fraction kept, step by step (figures/logs/)
rates.png      scores by learning rate (results/: mini*, squad_*, sst2_10000, why/speed.tsv)
speed.png      hard movement's loss while it prunes, by depth and steps (the same)
scores.png     movement's scores against the weights (figures/scores.npz, from figures/watch.py)
threshold.png  the smallest weight that each zeroing of MGPP leaves (figures/threshold.tsv, same)
prior.png      MGPP's prior and L2 (formulas of mgpp.py)

Drawn from saved models, which lie in the folder --runs:
movement.png   weights before fine-tuning and their change (movement paper, Fig. 1)
layers.png     the fraction kept in each layer and each kind of matrix (its Fig. 6)
patterns.png   which weights of query and key matrices RPP keeps (RPP paper, Fig. 3)
words.png      word embeddings before and after RPP, by t-SNE (its Fig. 4)

These commands make the models, minutes each:
    python magnitude.py --task squad --sparsity 1 --preset mini --device cpu
    python SCRIPT.py --task squad --sparsity 0.1 --preset mini --device cpu        each of the six
The logs are of the same runs: out/SCRIPT-squad-0.1-s0/log.jsonl is
figures/logs/SCRIPT-squad-0.1-s0.jsonl.
"""
import argparse
import json
import sys
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image
from safetensors.numpy import load_file

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.colors import ListedColormap  # noqa: E402

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path[:0] = [str(ROOT / "mini"), str(ROOT / "results"), str(ROOT / "results" / "why")]
import grid  # noqa: E402
import tables  # noqa: E402
import words  # noqa: E402

# name, colour, mark: the same in every picture
METHODS = {
    "magnitude": ("magnitude", "#3D4451", "s"),
    "mvp": ("movement", "#2B6CB0", "^"),
    "soft_mvp": ("soft movement", "#A04A8F", "v"),
    "l0": ("L0", "#B9851C", "o"),
    "mgpp": ("MGPP", "#C4532F", "P"),
    "rpp": ("RPP", "#2E8B74", "D"),
}
PRUNED = "#BDC2C9"
INK = "#2A2E35"
FAINT = "#7A808A"
# The dense F1, then {% kept: F1} of the papers' own runs on SQuAD 1.1 with BERT-base, no teacher.
# RPP: Guo et al. 2019. The others: the run sheet of Sanh, Wolf and Rush 2020, local rankings, from
# 2.5 to 70 %. No run of MGPP is known.
PAPERS_DENSE = 88.07
PAPERS = {
    "magnitude": {60: 87.32, 40: 87.00, 30: 86.25, 20: 84.80, 10: 78.51, 6: 70.74, 3: 54.49},
    "mvp": {70: 85.02, 50: 83.16, 30: 82.38, 10: 81.72, 8: 81.21, 5: 79.59, 3: 76.28},
    "soft_mvp": {59.57: 86.55, 45.46: 85.77, 31.21: 84.60, 13.87: 82.17, 7.08: 80.97,
                 3.99: 80.39, 2.56: 79.62},
    "l0": {66.79: 84.56, 58.36: 84.65, 40.65: 83.91, 17.75: 81.76, 14.79: 80.89, 9.80: 80.01,
           6.06: 78.06, 2.87: 73.09},
    "rpp": {59: 88.5},
}
# the prunable matrices of a layer, and their labels
KINDS = {
    "attention.self.query": "query",
    "attention.self.key": "key",
    "attention.self.value": "value",
    "attention.output.dense": "attention\noutput",
    "intermediate.dense": "inter-\nmediate",
    "output.dense": "output",
}
plt.rcParams.update({
    "figure.dpi": 130,
    "font.size": 12, "axes.titlesize": 13, "axes.labelsize": 12, "axes.titlelocation": "left",
    "xtick.labelsize": 11, "ytick.labelsize": 11,
    "axes.spines.top": False, "axes.spines.right": False,
    "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": FAINT,
    "xtick.color": INK, "ytick.color": INK,
})


# ---- what was measured

def read_tsv(path):
    header, *lines = path.read_text().splitlines()
    return [dict(zip(header.split("\t"), line.split("\t"))) for line in lines]


def read_log(path):
    """The lines of a log.jsonl that have a loss. RPP's pre-training steps have a name of their own.
    """
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [line for line in lines if "loss" in line]


def encoder(folder):
    """{(layer, kind): (out, in)}: the prunable matrices of a saved model."""
    matrices = {}
    for name, weight in load_file(folder / "model.safetensors").items():
        if "encoder.layer." in name and weight.ndim == 2:
            layer, kind = name.split("encoder.layer.")[1].removesuffix(".weight").split(".", 1)
            matrices[int(layer), kind] = weight
    return matrices


def flat(matrices):
    """(N,): all weights in one row, in the same order for every model."""
    return np.concatenate([matrices[key].ravel() for key in sorted(matrices)])


def run_folder(runs, method):
    return runs / f"{method}-squad-0.1-s0"


# ---- helpers of the pictures

def panels(title, columns, height, width=9.5, rows=1, **more):
    """A figure under a title that says what is seen, and its axes."""
    fig, axes = plt.subplots(rows, columns, figsize=(width, height), layout="constrained", **more)
    fig.suptitle(title, x=0.01, ha="left", fontsize=15, weight="bold")
    fig.get_layout_engine().set(w_pad=0.1, h_pad=0.1)
    return fig, axes


def apart(heights, gap):
    """The heights, moved up where they would be closer than gap to the next one below."""
    order = np.argsort(heights)
    places = np.array(heights, dtype=float)
    for lower, upper in zip(order, order[1:]):
        places[upper] = max(places[upper], places[lower] + gap)
    return places


def shade_floor(ax, lowest):
    ax.axhspan(0, lowest, color="#EEF0F2", zorder=0)
    ax.axhline(lowest, color=FAINT, linewidth=1.2, linestyle="--")


def score_lines(ax, dense, lowest):
    """Dense: the score of the unpruned model. Below the floor a guesser is better."""
    left, right = ax.get_xlim()
    ax.axhline(dense, color=INK, linewidth=1.2)
    ax.text(1.05 * left, dense + 1, f"dense {dense:.1f}", va="bottom")
    shade_floor(ax, lowest)
    ax.text(right, lowest - 1.5, f"floor {lowest:.1f}: a guesser", ha="right", va="top")
    ax.set_ylim(0, 106)


def save(figure, path):
    """A PNG in 64 colours: a third of the bytes, and nothing that the eye would miss."""
    figure.canvas.draw()
    pixels = np.asarray(figure.canvas.buffer_rgba())[..., :3]               # (height, width, 3)
    image = Image.fromarray(pixels).quantize(64, dither=Image.Dither.NONE)
    image.save(path, optimize=True)
    plt.close(figure)
    print(f"{path.name}: {path.stat().st_size / 1000:.0f} KB")


# ---- pictures of scores and logs

def draw_score(runs):
    fig, axes = panels("With few weights left magnitude falls, learned scores hold",
                       2, 5.3, sharey=True)
    rows = read_tsv(ROOT / "results" / "mini.tsv")
    rows = [row for row in rows if row["task"] == "squad"]
    ours = {}
    for row in rows:
        points = ours.setdefault(row["method"], {})
        kept = 100 * float(row["sparsity"])
        points.setdefault(kept, []).append(grid.score("squad", row["scores"]))
    dense = np.mean(ours["magnitude"].pop(100))
    papers = {method: {kept: [x] for kept, x in points.items()}
              for method, points in PAPERS.items()}
    floors = [grid.floor(world, "squad") for world in ("real", "mini")]
    parts = (
        (axes[0], "The papers: SQuAD, BERT-base", PAPERS_DENSE, floors[0], papers),
        (axes[1], "Here: mini at lr 5e-4, three seeds (small marks)", dense, floors[1], ours))
    for ax, title, top, lowest, lines in parts:
        ends = {}
        for method, (_, colour, mark) in METHODS.items():
            if method not in lines:
                continue
            kept = sorted(lines[method])
            means = [np.mean(lines[method][v]) for v in kept]
            ax.plot(kept, means, color=colour, marker=mark, linewidth=2)
            for v in kept:
                seeds = lines[method][v]
                if len(seeds) > 1:
                    ax.scatter([v] * len(seeds), seeds, s=22, marker=mark,
                               facecolor="none", edgecolor=colour)
            if kept[0] < 4:
                ends[method] = means[0]
        places = apart(list(ends.values()), 6)
        for method, place in zip(ends, places):
            name, colour, _ = METHODS[method]
            ax.text(2.3, place, name, color=colour, ha="right", va="center", weight="bold")
        ax.set_xscale("log")
        ax.set_xticks([3, 5, 10, 20, 40, 70], ["3", "5", "10", "20", "40", "70"])
        ax.minorticks_off()
        ax.set_xlim(0.3, 85)
        score_lines(ax, top, lowest)
        ax.set_title(title)
        ax.set_xlabel("% of the weights kept")
    axes[0].set_ylabel("F1")
    axes[0].text(59, 93, "RPP", color=METHODS["rpp"][1], ha="center", weight="bold")
    axes[1].text(11, 27, "1 run of 3\ncollapsed", color=METHODS["mvp"][1], va="center")
    return fig


def draw_loss(ax, lines, **style):
    ax.plot([line["step"] for line in lines], [line["loss"] for line in lines], **style)


def draw_runs(runs):
    """RPP prunes in pre-training, which stands left of step 0; its loss there is another one."""
    logs = HERE / "logs"
    fig, axes = panels(
        "While a method prunes, its loss stays above the dense run's",
        3, 6.2, rows=2, sharey=True)
    dense = read_log(logs / "magnitude-squad-1-s0.jsonl")
    for ax, (method, (name, colour, _)) in zip(axes.flat, METHODS.items()):
        lines = read_log(logs / f"{method}-squad-0.1-s0.jsonl")
        pretraining = [line for line in lines if "pretraining_step" in line]
        lines = [line for line in lines if "step" in line]
        start = 0
        if pretraining:
            start = -pretraining[-1]["pretraining_step"]
        steps = [start]
        kept = [100]
        for line in pretraining:
            steps.append(start + line["pretraining_step"])
            kept.append(100 * line["kept"])
        for line in lines:
            steps.append(line["step"])
            kept.append(100 * line["kept"])
        share = ax.twinx()
        share.fill_between(steps, kept, color="#E3E6EA", linewidth=0)
        share.set_ylim(0, 105)
        share.set_yticks([0, 50, 100] if ax in axes[:, 2] else [])
        share.spines["right"].set_visible(False)
        ax.set_zorder(share.get_zorder() + 1)           # the lines before the area
        ax.patch.set_visible(False)
        draw_loss(ax, dense, color=INK, linewidth=1.2, linestyle=":")
        draw_loss(ax, lines, color=colour, linewidth=2)
        ax.set_title(name, color=colour, weight="bold")
        ax.set_xticks([0, 500, 1000])
        if method == "mvp" and (logs / "mvp-squad-0.1-s1.jsonl").exists():
            draw_loss(ax, read_log(logs / "mvp-squad-0.1-s1.jsonl"), color=colour, linewidth=1)
        if ax in axes[:, 2]:
            share.set_ylabel("% kept", color=FAINT)
    axes[0, 0].set_ylim(0)
    axes[0, 0].text(0.98, 0.9, "grey: % kept", color=FAINT, ha="right",
                    transform=axes[0, 0].transAxes)
    axes[0, 0].text(0.98, 0.78, "dotted: dense run", ha="right", transform=axes[0, 0].transAxes)
    axes[1, 2].text(0.98, 0.3, "pruned in 200 steps\nof pre-training,\nbefore step 0", ha="right",
                    transform=axes[1, 2].transAxes)
    for ax in axes[:, 0]:
        ax.set_ylabel("loss of one batch")
    for ax in axes[1]:
        ax.set_xlabel("step")
    return fig


def draw_rates(runs):
    """Scores by learning rate: mini (means of the seeds there are), SQuAD, SST-2."""
    found = tables.by_rate()
    fig, axes = panels("Magnitude and MGPP gain most from a higher learning rate", 4, 4.6, width=14)
    parts = (
        ("mini", "0.1", "Mini, 10 % kept", "F1", grid.floor("mini", "squad"), (0, 104)),
        ("mini", "0.03", "Mini, 3 % kept", "F1", grid.floor("mini", "squad"), (0, 104)),
        ("squad", "0.1", "SQuAD, 10 % kept", "F1", grid.floor("real", "squad"), (0, 104)),
        ("sst2", "0.1", "SST-2, 10 % kept", "accuracy", grid.floor("real", "sst2"), (76, 89)))
    lines = {"dense": ("dense", FAINT, "_")}
    lines |= {method: METHODS[method] for method in grid.FINE_TUNED}
    for ax, (data, v, title, metric, lowest, limits) in zip(axes, parts):
        names = sorted({run[2] for run in found if run[:2] == (data, v)}, key=float)
        rates = [float(name) for name in names]
        for method, (label, colour, mark) in lines.items():
            kept = "1" if method == "dense" else v
            means = [np.mean(found.get((data, kept, name, method), np.nan)) for name in names]
            size = 14 if method == "dense" else 7
            ax.plot(rates, means, color=colour, marker=mark, ms=size, linewidth=2, label=label)
        ax.set_xscale("log")
        ax.set_xticks(rates, names)
        ax.minorticks_off()
        ax.set_xlim(rates[0] / 1.3, rates[-1] * 1.3)
        ax.set_ylim(*limits)
        shade_floor(ax, lowest)
        ax.text(rates[-1] * 1.27, limits[0], f"floor {lowest:.1f}", ha="right", va="bottom")
        ax.set_title(title)
        ax.set_xlabel("learning rate of the weights")
        ax.set_ylabel(metric)
    handles, names = axes[0].get_legend_handles_labels()
    fig.legend(handles, names, loc="outside lower center", ncols=len(names), frameon=False)
    return fig


def draw_speed(runs):
    """Each loss is a mean over the steps in which about so much is kept; the last, of the end."""
    rows = read_tsv(ROOT / "results" / "why" / "speed.tsv")
    rows = [row for row in rows
            if (row["script"], row["kept"], row["seed"]) == ("mvp", "0.1", "0")]
    kept = [98, 92, 85, 70, 60, 45, 25, 13, 10]
    names = [f"loss_{v}" for v in kept[:-1]] + ["loss_end"]
    depths = sorted({int(row["layers"]) for row in rows})
    fig, axes = panels("Movement pruning can fall to chance, with more layers or fewer steps",
                       len(depths), 4.4, sharey=True)
    shades = {1000: "#8DB4DF", 2000: "#6A9AD0", 4000: "#4480BE", 10000: "#1F5A9C", 20000: "#0B3468"}
    for ax, depth in zip(axes, depths):
        lines = [row for row in rows if int(row["layers"]) == depth]
        ends = apart([float(row["loss_end"]) for row in lines], 0.033)
        for row, end in zip(lines, ends):
            shade = shades[int(row["steps"])]
            ax.plot(kept, [float(row[name]) for name in names], color=shade, linewidth=2.2)
            ax.text(7, end, f"{int(row['steps']):,}", color=shade, va="center", weight="bold")
        ax.text(7, max(ends) + 0.03, "steps", va="center")
        ax.plot([100, 10], [0.69, 0.69], color=FAINT, linestyle="--")
        ax.set_title(f"{depth} layer" + "s" * (depth > 1))
        ax.set_xlim(100, -30)
        ax.set_xticks([100, 70, 40, 10])
        ax.spines["bottom"].set_bounds(100, 10)
        ax.set_xlabel("% kept")
    axes[0].set_ylabel("training loss")
    axes[0].text(10, 0.697, "chance", color=FAINT, ha="right")
    return fig


def draw_prior(runs):
    spike = 1e-10
    slab = 0.05
    w = np.linspace(-1.5e-4, 1.5e-4, 2001)
    colour = METHODS["mgpp"][1]
    fig, axes = panels("MGPP's prior pulls small weights to 0, and lets large ones go", 2, 4.3)
    for lam, shade in ((0.1, "#E0A08C"), (1e-4, colour)):
        in_spike = (1 - lam) * np.exp(-w ** 2 / (2 * spike)) / np.sqrt(2 * np.pi * spike)
        in_slab = lam * np.exp(-w ** 2 / (2 * slab)) / np.sqrt(2 * np.pi * slab)
        g = in_spike / (in_spike + in_slab)
        pull = w * (g / spike + (1 - g) / slab)
        density = np.log(in_spike + in_slab)
        axes[0].plot(1e4 * w, density, color=shade, linewidth=2)
        axes[0].text(1.5, density[-1] + 0.4, f"λ = {lam:g}", color=shade, weight="bold",
                     ha="right")
        axes[1].plot(1e4 * w, pull / 1e5, color=shade, linewidth=2)
    axes[1].plot(1e4 * w, w / slab / 1e5, color=FAINT, linestyle="--")
    axes[1].text(-1.5, 0.3, "L2 hardly\npulls", color=FAINT)
    axes[1].text(0.75, 4.4, "pulled hard", color=colour, weight="bold")
    axes[1].text(0.75, 0.3, "let go", color=colour, weight="bold")
    axes[0].set_title("log π(w): a spike on a flat slab")
    axes[1].set_title("pull to 0, −d log π / dw, in 100,000")
    for ax in axes:
        ax.set_xlabel("weight w, in 0.0001")
    return fig


# ---- pictures of saved models

def draw_movement(runs):
    """A kept weight is drawn where its run took it, a pruned one where the dense run took it."""
    before = flat(encoder(ROOT / "mini" / "bert"))
    dense = flat(encoder(runs / "magnitude-squad-1-s0"))
    some = np.random.default_rng(0).permutation(len(before))
    fig, axes = panels("Magnitude keeps large weights, movement those that move away from 0",
                       2, 5.2, sharex=True, sharey=True)
    for ax, method in zip(axes, ("magnitude", "mvp")):
        name, colour, _ = METHODS[method]
        after = flat(encoder(run_folder(runs, method)))
        kept = after != 0
        grew = np.mean(np.abs(after[kept]) > np.abs(before[kept]))
        for chosen, model, shade, size, dots in ((~kept, dense, PRUNED, 3, 12000),
                                                 (kept, after, colour, 5, 5000)):
            dots = some[chosen[some]][:dots]
            ax.scatter(before[dots], (model - before)[dots], s=size, color=shade, linewidth=0)
        ax.axhline(0, color=INK, linewidth=1)
        ax.axvline(0, color=INK, linewidth=1)
        ax.set_title(f"{name} pruning", color=colour, weight="bold")
        ax.text(0.31, -0.086, f"of those kept {100 * grew:.0f} % moved away from 0",
                color=colour, ha="right", bbox=dict(color="white", pad=1))
        ax.set_xlim(-0.32, 0.32)
        ax.set_ylim(-0.09, 0.09)
        ax.set_xlabel("weight before fine-tuning")
    axes[0].set_ylabel("its change in fine-tuning")
    axes[0].text(-0.31, 0.07, "kept: far from 0", color=METHODS["magnitude"][1], weight="bold")
    axes[0].text(-0.01, 0.042, "pruned:\nclose to 0", color=FAINT, weight="bold", ha="right")
    axes[1].text(0.02, 0.07, "kept: moves\naway from 0", color=METHODS["mvp"][1], weight="bold",
                 va="center")
    axes[1].text(0.02, -0.052, "pruned: moves\ntowards 0", color=FAINT, weight="bold")
    return fig


def draw_scores(runs):
    seen = np.load(HERE / "scores.npz")
    name, colour, _ = METHODS["mvp"]
    fig, ax = panels("Movement keeps weights of any size but the smallest: the scores draw a v",
                     1, 4.8)
    for kept, shade, size in ((False, PRUNED, 4), (True, colour, 8)):
        chosen = seen["kept"] == kept
        ax.scatter(seen["weight"][chosen], seen["score"][chosen], s=size, color=shade, linewidth=0)
    ax.text(-0.33, 0.75, "kept: the 10 % with\nthe highest scores", color=colour, weight="bold")
    ax.text(-0.33, -0.6, "pruned", color=FAINT, weight="bold")
    ax.annotate("near 0 no score is high", (0, 0.12), (0, 0.88), ha="center",
                arrowprops=dict(arrowstyle="->", color=INK))
    ax.set_xlim(-0.34, 0.34)
    ax.set_ylim(-0.75, 1.05)
    ax.set_xlabel("weight at the end of the run")
    ax.set_ylabel("score")
    return fig


def draw_threshold(runs):
    rows = read_tsv(HERE / "threshold.tsv")
    fig, ax = panels("MGPP and plain L2 cut at nearly the same size", 1, 4.3)
    ends = {}
    for run, name, colour, style in (("l2", "L2 alone", FAINT, "--"),
                                     ("mgpp", "MGPP", METHODS["mgpp"][1], "-")):
        line = [row for row in rows if row["run"] == run]
        steps = [int(row["step"]) for row in line]
        threshold = [float(row["threshold"]) for row in line]
        ax.plot(steps, threshold, color=colour, linewidth=2.2, linestyle=style)
        ends[name] = (threshold[-1], colour)
    places = apart([end for end, _ in ends.values()], 0.009)
    for (name, (_, colour)), place in zip(ends.items(), places):
        ax.text(1.01 * steps[-1], place, name, color=colour, va="center", weight="bold")
    ax.set_xlim(0, 1.12 * steps[-1])
    ax.set_ylim(0)
    ax.set_xlabel("step")
    ax.set_ylabel("smallest |w| that stays")
    return fig


def percent_kept(matrices, part):
    """{part: % kept}, part being 0 for the layer and 1 for the kind of a matrix's key."""
    shares = {}
    for value in dict.fromkeys(key[part] for key in sorted(matrices)):
        weights = [w for key, w in matrices.items() if key[part] == value]
        kept = sum(np.count_nonzero(w) for w in weights)
        shares[value] = 100 * kept / sum(w.size for w in weights)
    return shares


def draw_layers(runs):
    """Magnitude and movement are left out: each of their matrices keeps the same."""
    fig, axes = panels("Learned scores keep most in the first layer, and little of attention",
                       2, 4.8, sharey=True, width_ratios=[1, 1.2])
    starts = {}
    for method in ("soft_mvp", "l0", "mgpp", "rpp"):
        _, colour, mark = METHODS[method]
        matrices = encoder(run_folder(runs, method))
        by_layer = percent_kept(matrices, 0)
        by_kind = percent_kept(matrices, 1)
        layers = [layer + 1 for layer in by_layer]
        starts[method] = by_layer[0]
        axes[0].plot(layers, by_layer.values(), color=colour, marker=mark, linewidth=2)
        axes[1].plot(list(KINDS.values()), [by_kind[kind] for kind in KINDS], color=colour,
                     marker=mark, linewidth=2)
    for method, place in zip(starts, apart(list(starts.values()), 2)):
        name, colour, _ = METHODS[method]
        axes[0].text(0.85, place, name, color=colour, ha="right", va="center", weight="bold")
    for ax in axes:
        ax.axhline(10, color=FAINT, linestyle=":")
    axes[0].set_xticks(layers)
    axes[0].set_xlim(-0.7, layers[-1] + 0.2)
    axes[0].set_ylim(0)
    axes[0].set_ylabel("% kept (10 % of all)")
    axes[0].set_xlabel("layer")
    return fig


def draw_patterns(runs):
    matrices = encoder(run_folder(runs, "rpp") / "support")
    heads = json.loads((ROOT / "mini" / "bert" / "config.json").read_text())["num_attention_heads"]
    colours = ListedColormap(["white", METHODS["rpp"][1]])
    depth = 1 + max(layer for layer, _ in matrices)
    fig, axes = panels("RPP keeps twice as much of some heads as of others",
                       depth, 5.6, rows=2)
    for row, kind in zip(axes, ("query", "key")):
        for layer, ax in enumerate(row):
            kept = matrices[layer, f"attention.self.{kind}"] != 0           # (out, in)
            ax.imshow(kept, cmap=colours, interpolation="nearest")
            for head in range(1, heads):
                ax.axhline(head * len(kept) / heads - 0.5, color=INK, linewidth=0.8)
            ax.set_title(f"{kind}, layer {layer + 1}", fontsize=12)
            ax.set_xticks([])
            ax.set_yticks([])
            ax.spines[:].set_visible(True)
        row[0].set_ylabel(f"outputs: {heads} heads")
    axes[1][0].set_xlabel("inputs")
    return fig


def tsne(x, y, early, perplexity=30, steps=500):
    """t-SNE (van der Maaten and Hinton 2008): x (n, d) on a plane, from the places y (n, 2)."""
    def squares(x):
        """(n, n): the squared distance of each two points."""
        norms = (x ** 2).sum(1)
        return np.maximum(norms[:, None] + norms - 2 * x @ x.T, 0)

    # Neighbours: a normal density around each point, as wide as makes `perplexity` of them likely.
    near = squares(x)
    low = np.zeros((len(x), 1))
    high = np.full((len(x), 1), np.inf)
    sharp = np.full((len(x), 1), 1 / np.median(near))
    for _ in range(60):
        p = np.exp(-sharp * (near - np.sort(near)[:, 1:2]))
        np.fill_diagonal(p, 0)
        p /= p.sum(1, keepdims=True)
        entropy = -(p * np.log(p + 1e-300)).sum(1, keepdims=True)
        wide = entropy > np.log(perplexity)
        low = np.where(wide, sharp, low)
        high = np.where(wide, high, sharp)
        sharp = np.where(np.isinf(high), 2 * sharp, (low + high) / 2)
    p = (p + p.T) / (2 * len(x))
    # On the plane the density is Student's t. Gradient descent makes the two alike; p counts
    # `early` times as much at first, so that clusters gather.
    speed = np.zeros_like(y)
    for step in range(steps):
        t = 1 / (1 + squares(y))
        np.fill_diagonal(t, 0)
        more = early if step < 100 else 1
        pull = (more * p - t / t.sum()) * t             # (n, n)
        gradient = 4 * (pull.sum(1, keepdims=True) * y - pull @ y)
        speed = (0.5 if step < 100 else 0.8) * speed - len(x) / 12 * gradient
        y = y + speed
    return y


def draw_words(runs):
    """The single words of mini/words.py that have a kind. The right plane starts as the left one,
    so that what moves there has been moved by RPP."""
    kinds = {"towns": (words.PLACES, "#6C8EBF"), "years": (words.YEARS, "#D9A05B"),
             "first names": (words.FIRST, "#7FA87F"), "things": (words.NOUN, "#C0645F"),
             "trades": (words.TRADES, "#8E79B5"), "goods": (words.GOODS, "#8C7662")}
    vocabulary = (ROOT / "mini" / "bert" / "vocab.txt").read_text().split("\n")
    ids = {word: i for i, word in enumerate(vocabulary)}
    chosen = [ids[word.lower()] for found, _ in kinds.values() for word in found]
    fig, axes = panels("RPP prunes the encoder; words of a kind stay together", 2, 5)
    folders = {"before": ROOT / "mini" / "bert", "after RPP": run_folder(runs, "rpp") / "support"}
    y = None
    for ax, (title, folder) in zip(axes, folders.items()):
        table = load_file(folder / "model.safetensors")["bert.embeddings.word_embeddings.weight"]
        x = table[chosen].astype(float)                                     # (n, hidden)
        x -= x.mean(0)
        if y is None:
            components = np.linalg.svd(x, full_matrices=False)[0][:, :2]
            y = tsne(x, 1e-2 * components / components.std(), early=12)
        else:
            y = tsne(x, y, early=1)
        first = 0
        for kind, (found, colour) in kinds.items():
            places = y[first:first + len(found)]                            # (words, 2)
            first += len(found)
            ax.scatter(*places.T, s=9, color=colour)
            ax.text(*np.median(places, axis=0), kind, weight="bold", ha="center", va="center",
                    bbox=dict(facecolor="white", alpha=0.75, linewidth=0, pad=1.5))
        ax.set_title(title)
        ax.set_xticks([])
        ax.set_yticks([])
        ax.spines[:].set_visible(False)
    return fig


PICTURES = {"movement": draw_movement, "score": draw_score, "runs": draw_runs,
            "rates": draw_rates, "speed": draw_speed, "scores": draw_scores,
            "threshold": draw_threshold, "prior": draw_prior, "layers": draw_layers,
            "patterns": draw_patterns, "words": draw_words}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="a picture; default: all")
    parser.add_argument("--runs", type=Path, default=ROOT / "out", help="the folder of the runs")
    parser.add_argument("--out", type=Path, default=HERE)
    args = parser.parse_args()
    unknown = set(args.names) - set(PICTURES)
    if unknown:
        parser.error(f"no picture {', '.join(unknown)}: there are {', '.join(PICTURES)}")
    for name in args.names or PICTURES:
        try:
            figure = PICTURES[name](args.runs)
        except FileNotFoundError as error:
            print(f"{name}.png: not drawn. {error} (--help says what makes it)")
            continue
        save(figure, args.out / f"{name}.png")


if __name__ == "__main__":
    main()

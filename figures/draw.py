"""Draws the pictures. matplotlib is needed here and nowhere else.

    pip install -r figures/requirements.txt
    python figures/draw.py                          score.png and prior.png
    python figures/draw.py --runs out/mini      and those that look into saved models

score.png      What fraction of the dense score remains when a fraction of the weights is kept?
               The papers (PAPERS below), mini's questions (results/mini.tsv), and SQuAD
               with a small real BERT (results/squad11.tsv). Lines join means, hollow marks are
               single seeds. Grey: below the floor, what a guesser gets that has understood nothing
               (results/floor.tsv)
prior.png      MGPP's prior pulls small weights to 0 and leaves large ones alone; L2 pulls on all
               (formulas of mgpp.py, no run)
movement.png   Magnitude keeps the weights that were large before fine-tuning, movement those
               that grew in it (the movement paper's Fig. 1)
remains.png    The values of the weights that remain (its Fig. 4a)
layers.png     The fraction kept in each layer and in each kind of matrix (its Fig. 6)

The last three read RUNS/METHOD-squad-0.03-s0/model.safetensors, and movement.png also
RUNS/magnitude-squad-1-s0, the dense run. Each run's command is in its row of results/mini.tsv:
add `--out RUNS/METHOD-squad-0.03-s0`. (`results/grid.py mini` makes only runs without a row.)
A picture is left out if a run that it needs is absent; layers.png draws the methods that are there.
"""
import argparse
from pathlib import Path

import matplotlib
import numpy as np
from safetensors.numpy import load_file

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
# name, colour, mark; the colours are Okabe and Ito's, which colour-blind readers tell apart
METHODS = {
    "magnitude": ("magnitude", "#000000", "s"),
    "mvp": ("movement", "#0072B2", "^"),
    "soft_mvp": ("soft movement", "#CC79A7", "v"),
    "l0": ("L0", "#E69F00", "o"),
    "mgpp": ("MGPP", "#D55E00", "P"),
    "rpp": ("RPP", "#009E73", "D"),
}
# The dense F1, then {% kept: F1} of the papers' own runs on SQuAD 1.1 with BERT-base, no teacher.
# RPP: Guo et al. 2019. The others: the run sheet of Sanh, Wolf and Rush 2020, local rankings, from
# 2.5 to 70 %. No run of MGPP is known.
PAPERS = {
    "magnitude": (88.07, {60: 87.32, 40: 87.00, 30: 86.25, 20: 84.80, 10: 78.51, 6: 70.74,
                          3: 54.49}),
    "mvp": (88.07, {70: 85.02, 50: 83.16, 30: 82.38, 10: 81.72, 8: 81.21, 5: 79.59, 3: 76.28}),
    "soft_mvp": (88.07, {59.57: 86.55, 45.46: 85.77, 31.21: 84.60, 13.87: 82.17, 7.08: 80.97,
                         3.99: 80.39, 2.56: 79.62}),
    "l0": (88.07, {66.79: 84.56, 58.36: 84.65, 40.65: 83.91, 17.75: 81.76, 14.79: 80.89,
                   9.80: 80.01, 6.06: 78.06, 2.87: 73.09}),
    "rpp": (88.5, {59: 88.5}),
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
LOCAL = {"magnitude", "mvp"}            # these rank each matrix alone
PRUNED = "#B5B5B5"
plt.rcParams.update({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False,
                     "legend.frameon": False})


# ---- what was measured

def read_tsv(name):
    path = ROOT / "results" / name
    if not path.exists():
        return []
    header, *lines = path.read_text().splitlines()
    return [dict(zip(header.split("\t"), line.split("\t"))) for line in lines]


def score(row):
    """F1 of SQuAD, else the first metric."""
    values = [float(x) for x in row["scores"].split()[1::2]]
    if row["task"] == "squad":
        return values[1]
    return values[0]


def curves(rows, task):
    """The dense score, and {method: {% kept: [% of the dense score, one a seed]}}."""
    rows = [row for row in rows if row["task"] == task and row["method"] in METHODS]
    dense = np.mean([score(row) for row in rows if float(row["sparsity"]) == 1])
    lines = {}
    for row in rows:
        kept = 100 * float(row["sparsity"])
        if kept < 100:
            line = lines.setdefault(row["method"], {})
            line.setdefault(kept, []).append(100 * score(row) / dense)
    return dense, lines


def floor(data, task):
    rows = [row for row in read_tsv("floor.tsv") if row["data"] == data and row["task"] == task]
    return max(score(row) for row in rows)


def encoder(folder):
    """{(layer, kind): (out, in)}: the prunable matrices of a saved model."""
    matrices = {}
    for name, weight in load_file(folder / "model.safetensors").items():
        if "encoder.layer." in name and weight.ndim == 2:
            layer, kind = name.split("encoder.layer.")[1].removesuffix(".weight").split(".", 1)
            matrices[int(layer), kind] = weight
    return matrices


def flat(matrices):
    """(n,): all weights in one row, in the same order for every model."""
    return np.concatenate([matrices[key].ravel() for key in sorted(matrices)])


# ---- pictures

def draw_panel(ax, title, metric, dense, lowest, lines):
    for method, (name, colour, mark) in METHODS.items():
        if method not in lines:
            continue
        kept = sorted(lines[method])
        means = [np.mean(lines[method][v]) for v in kept]
        ax.plot(kept, means, color=colour, marker=mark, label=name)
        for v in kept:
            seeds = lines[method][v]
            if len(seeds) > 1:
                ax.scatter([v] * len(seeds), seeds, s=26, marker=mark,
                           facecolor="none", edgecolor=colour)
    ax.axhspan(0, 100 * lowest / dense, color="#EEEEEE", zorder=0)
    ax.axhline(100 * lowest / dense, color="#666666", linestyle="--")
    ax.text(78, 100 * lowest / dense - 1.5, f"floor {lowest:.1f}", ha="right", va="top")
    ax.set_xscale("log")
    ax.set_xticks([3, 5, 10, 20, 40], ["3", "5", "10", "20", "40"])
    ax.minorticks_off()
    ax.set_xlim(2.3, 80)
    ax.set_ylim(0, 104)
    ax.set_title(f"{title}\n{metric}, dense {dense:.1f}", fontsize=11)
    ax.set_xlabel("% of the weights kept")


def draw_score():
    fig, axes = plt.subplots(1, 3, figsize=(12, 4.6), sharey=True)
    lines = {}
    for method, (dense, points) in PAPERS.items():
        lines[method] = {kept: [100 * f1 / dense] for kept, f1 in points.items()}
    papers = PAPERS["magnitude"][0]
    draw_panel(axes[0], "The papers: SQuAD, BERT-base", "F1", papers, floor("real", "squad"), lines)
    dense, lines = curves(read_tsv("mini.tsv"), "squad")
    draw_panel(axes[1], "mini: questions", "F1", dense, floor("mini", "squad"), lines)
    rows = read_tsv("squad11.tsv")
    dense, lines = curves(rows, "squad")
    title = f"Real data: SQuAD, MiniLM, {rows[0]['steps']} steps"
    draw_panel(axes[2], title, "F1", dense, floor("real", "squad"), lines)
    axes[0].set_ylabel("% of the dense score")
    handles = {}
    for ax in axes:
        shown, names = ax.get_legend_handles_labels()
        handles |= dict(zip(names, shown))
    names = [name for name, _, _ in METHODS.values()]
    fig.legend([handles[name] for name in names], names, loc="lower center", ncol=6)
    fig.tight_layout(rect=(0, 0.07, 1, 1))
    return fig


def draw_prior():
    spike = 1e-10
    slab = 0.05
    w = np.linspace(-1.5e-4, 1.5e-4, 2001)
    fig, axes = plt.subplots(1, 2, figsize=(9, 3.8))
    for lam, colour in ((0.1, "#D55E00"), (1e-4, "#0072B2")):
        in_spike = (1 - lam) * np.exp(-w ** 2 / (2 * spike)) / np.sqrt(2 * np.pi * spike)
        in_slab = lam * np.exp(-w ** 2 / (2 * slab)) / np.sqrt(2 * np.pi * slab)
        g = in_spike / (in_spike + in_slab)
        pull = w * (g / spike + (1 - g) / slab)
        axes[0].plot(1e4 * w, np.log(in_spike + in_slab), color=colour, label=f"λ = {lam:g}")
        axes[1].plot(1e4 * w, pull / 1e5, color=colour, label=f"λ = {lam:g}")
    axes[1].plot(1e4 * w, w / slab / 1e5, color="black", linestyle="--", label="L2 (slab alone)")
    axes[0].set_title("log π(w): a spike on a flat slab", fontsize=11)
    axes[1].set_title("Pull to 0, −d log π / dw, in 100,000", fontsize=11)
    for ax in axes:
        ax.set_xlabel("weight w, in 0.0001")
    axes[0].legend(loc="upper right")
    axes[1].legend(loc="upper left", fontsize=9)
    fig.tight_layout()
    return fig


def draw_movement(before, dense, pruned):
    some = np.random.default_rng(0).choice(len(before), min(len(before), 200000), replace=False)
    fig, axes = plt.subplots(1, 2, figsize=(10, 5.4), sharex=True, sharey=True)
    for ax, method in zip(axes, ("magnitude", "mvp")):
        name, colour, _ = METHODS[method]
        after = flat(pruned[method])
        kept = after != 0
        grew = np.mean(np.abs(after[kept]) > np.abs(before[kept]))
        gone = some[~kept[some]]
        left = some[kept[some]]
        ax.scatter(before[gone], dense[gone], s=1, color=PRUNED,
                   label="pruned: its value in the dense run")
        ax.scatter(before[left], after[left], s=3, color=colour, label="kept")
        ax.axline((0, 0), slope=1, color="#777777", linewidth=0.8)
        ax.axhline(0, color="#777777", linewidth=0.8)
        ax.axvline(0, color="#777777", linewidth=0.8)
        ax.set_title(f"{name}: {100 * grew:.0f} % of the kept grew", color=colour)
        ax.set_xlabel("weight before fine-tuning")
        ax.set_xlim(-0.4, 0.4)
        ax.set_ylim(-0.4, 0.4)
        ax.set_aspect("equal")
        ax.legend(loc="lower right", fontsize=8, markerscale=3, handletextpad=0)
    axes[0].set_ylabel("weight after fine-tuning")
    fig.tight_layout()
    return fig


def draw_remains(pruned):
    fig, ax = plt.subplots(figsize=(8, 3.8))
    for method in ("magnitude", "mvp"):
        name, colour, _ = METHODS[method]
        after = flat(pruned[method])
        ax.hist(after[after != 0], bins=100, range=(-0.4, 0.4), histtype="stepfilled",
                density=True, facecolor=f"{colour}26", edgecolor=colour, label=name)
    ax.set_xlabel("value of the 3 % of the weights that remain")
    ax.set_ylabel("density")
    ax.legend()
    fig.tight_layout()
    return fig


def percent_kept(weights):
    return 100 * sum(map(np.count_nonzero, weights)) / sum(weight.size for weight in weights)


def draw_layers(pruned):
    fig, axes = plt.subplots(1, 2, figsize=(10, 4.6), sharey=True)
    for method, (name, colour, mark) in METHODS.items():
        if method not in pruned or method in LOCAL:
            continue
        matrices = pruned[method]
        layers = sorted({layer for layer, _ in matrices})
        by_layer = [percent_kept([w for key, w in matrices.items() if key[0] == layer])
                    for layer in layers]
        by_kind = [percent_kept([w for key, w in matrices.items() if key[1] == kind])
                   for kind in KINDS]
        axes[0].plot([layer + 1 for layer in layers], by_layer, color=colour, marker=mark)
        axes[0].set_xticks([layer + 1 for layer in layers])
        axes[1].plot(list(KINDS.values()), by_kind, color=colour, marker=mark, label=name)
    for ax in axes:
        ax.axhline(3, color="#666666", linestyle=":", label="magnitude, movement: 3 % of each")
    axes[0].set_ylim(0)
    axes[0].set_xlabel("layer")
    axes[0].set_ylabel("% kept, 3 % in all")
    axes[1].tick_params(axis="x", labelsize=9)
    handles, names = axes[1].get_legend_handles_labels()
    fig.legend(handles, names, loc="lower center", ncol=5, fontsize=9)
    fig.tight_layout(rect=(0, 0.06, 1, 1))
    return fig


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, help="folder of the runs of grid.py mini")
    parser.add_argument("--out", type=Path, default=ROOT / "figures")
    args = parser.parse_args()
    figures = {"score": draw_score(), "prior": draw_prior()}
    if args.runs:
        pruned = {}
        for method in METHODS:
            folder = args.runs / f"{method}-squad-0.03-s0"
            if (folder / "result.json").exists():
                pruned[method] = encoder(folder)
        dense = args.runs / "magnitude-squad-1-s0"
        if set(pruned) >= LOCAL:
            figures["remains"] = draw_remains(pruned)
        if set(pruned) >= LOCAL and (dense / "result.json").exists():
            before = flat(encoder(ROOT / "mini" / "bert"))
            figures["movement"] = draw_movement(before, flat(encoder(dense)), pruned)
        if set(pruned) - LOCAL:
            figures["layers"] = draw_layers(pruned)
    for name, figure in figures.items():
        figure.savefig(args.out / f"{name}.png", dpi=110, metadata={"Software": None})
        print(args.out / f"{name}.png")


if __name__ == "__main__":
    main()

"""Draws the pictures. matplotlib is needed here and nowhere else.

    pip install -r figures/requirements.txt
    python figures/draw.py                                  score.png and prior.png
    python figures/draw.py --runs out/embedded              and those that look into saved models

score.png      share of the dense score against share kept: the papers (their own runs), the
               embedded world (results/embedded.tsv), SST-2 (results/sst2.tsv);
               dashed: the floor (results/floor.tsv)
prior.png      MGPP's prior and its pull, beside L2 (a formula; its paper's Fig. 1)
movement.png   fine-tuned against pre-trained weights, kept and pruned (the movement paper's Fig. 1)
remains.png    the distribution of the weights that remain (its Fig. 4a)
layers.png     fraction kept in each layer (its Fig. 6)
The last three need the folders of grid.py's runs at 3 % (results/grid.py embedded).
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
# (% kept, F1) of the papers' own runs on SQuAD 1.1 with BERT-base, no teacher: the run sheet of
# Sanh, Wolf and Rush 2020 (dense 88.07), and Guo et al. 2019 (dense 88.5). None is known for MGPP.
PAPERS = {
    "magnitude": [(60, 87.32), (40, 87.00), (30, 86.25), (20, 84.80), (10, 78.51), (6, 70.74),
                  (3, 54.49)],
    "mvp": [(70, 85.02), (50, 83.16), (30, 82.38), (10, 81.72), (8, 81.21), (5, 79.59), (3, 76.28)],
    "soft_mvp": [(59.57, 86.55), (45.46, 85.77), (31.21, 84.60), (13.87, 82.17), (7.08, 80.97),
                 (3.99, 80.39), (2.56, 79.62)],
    "l0": [(66.79, 84.56), (40.65, 83.91), (17.75, 81.76), (14.79, 80.89), (9.80, 80.01),
           (6.06, 78.06), (2.87, 73.09)],
    "rpp": [(59, 88.07)],                       # as good as its dense
}


# ---- what is measured

def read_tsv(name):
    path = ROOT / "results" / name
    if not path.exists():
        return []
    lines = path.read_text().split("\n")
    header = lines[0].split("\t")
    return [dict(zip(header, line.split("\t"))) for line in lines[1:-1]]


def score(row):
    """F1 of SQuAD, else the first metric."""
    values = [float(x) for x in row["scores"].split()[1::2]]
    return values[1] if row["task"] == "squad" else values[0]


def curves(names, task):
    """({method: [(% kept, mean score over the seeds)]}, the dense score)."""
    scores = {}
    for row in [row for name in names for row in read_tsv(name)]:
        if row["task"] == task:
            key = row["method"], float(row["sparsity"])
            scores.setdefault(key, []).append(score(row))
    dense = float(np.mean(scores.pop(("magnitude", 1.0))))
    lines = {}
    for (method, v), values in sorted(scores.items()):
        if method in METHODS:
            lines.setdefault(method, []).append((100 * v, float(np.mean(values))))
    return lines, dense


def floor(data, task):
    return max(score(row) for row in read_tsv("floor.tsv")
               if row["data"] == data and row["task"] == task)


# ---- pictures

def panel(ax, title, lines, dense, lowest, what):
    for method, (name, colour, mark) in METHODS.items():
        if method in lines:
            kept, values = zip(*sorted(lines[method]))
            ax.plot(kept, 100 * np.array(values) / dense, color=colour, marker=mark, label=name)
    if lowest:
        ax.axhline(100 * lowest / dense, color="grey", linestyle="--", label="floor")
    ax.set_xscale("log")
    ax.set_xticks([3, 5, 10, 20, 40], ["3", "5", "10", "20", "40"])
    ax.minorticks_off()
    ax.set_xlim(2.5, 75)
    ax.set_ylim(0, 104)
    ax.set_title(f"{title}\n{what}, dense {dense:.1f}")
    ax.set_xlabel("% of the weights kept")


def draw_score():
    fig, axes = plt.subplots(1, 3, figsize=(12, 4.4), sharey=True)
    panel(axes[0], "the papers: SQuAD, BERT-base", PAPERS, 88.07, None, "F1")
    lines, dense = curves(["embedded.tsv"], "squad")
    panel(axes[1], "embedded world: questions", lines, dense, floor("embedded", "squad"), "F1")
    lines, dense = curves(["sst2.tsv"], "sst2")
    panel(axes[2], "SST-2, MiniLM, 1,200 steps", lines, dense, floor("real", "sst2"), "accuracy")
    axes[0].set_ylabel("% of the dense score")
    handles = {}
    for ax in axes:
        handles |= dict(zip(*reversed(ax.get_legend_handles_labels())))
    fig.legend(handles.values(), handles.keys(), loc="lower center", ncol=7, frameon=False)
    fig.tight_layout(rect=(0, 0.07, 1, 1))
    return fig


def draw_prior():
    w = np.linspace(-3e-4, 3e-4, 2001)
    fig, axes = plt.subplots(1, 2, figsize=(9, 3.6))
    for lam, colour in ((0.1, "#D55E00"), (1e-4, "#0072B2")):
        spike = (1 - lam) * np.exp(-w ** 2 / 2e-10) / np.sqrt(2 * np.pi * 1e-10)
        slab = lam * np.exp(-w ** 2 / 0.1) / np.sqrt(2 * np.pi * 0.05)
        share = spike / (spike + slab)
        pull = w * (share / 1e-10 + (1 - share) / 0.05)
        axes[0].plot(w, np.log(spike + slab), color=colour, label=f"lam = {lam:g}")
        axes[1].plot(w, pull, color=colour, label=f"lam = {lam:g}")
    axes[1].plot(w, w / 0.05, color="black", linestyle="--", label="L2 (the slab alone)")
    for ax, title in zip(axes, ("log of the prior", "its pull to 0, before 1/n")):
        ax.set_title(title)
        ax.set_xlabel("weight")
        ax.legend(frameon=False)
    fig.tight_layout()
    return fig


def encoder(folder):
    """{name: (out, in)}: the prunable matrices of a saved model."""
    held = load_file(folder / "model.safetensors")
    return {name: w for name, w in held.items()
            if "encoder.layer" in name and name.endswith("weight") and w.ndim == 2}


def row(matrices):
    return np.concatenate([w.ravel() for w in matrices.values()])


def run_folder(args, method, v="0.03"):
    return args.runs / f"{method}-squad-{v}-s0"


def draw_movement(args):
    before = row(encoder(ROOT / "mini" / "bert"))
    some = np.random.default_rng(0).choice(len(before), 20000, replace=False)
    fig, axes = plt.subplots(1, 2, figsize=(9, 4.4), sharey=True)
    for ax, method in zip(axes, ("magnitude", "mvp")):
        after = row(encoder(run_folder(args, method)))
        kept = after != 0
        ax.scatter(before[some], before[some], s=1, color="#B5B5B5", label="pruned")
        chosen = some[kept[some]]
        ax.scatter(before[chosen], after[chosen], s=4, color=METHODS[method][1], label="kept")
        ax.set_title(METHODS[method][0])
        ax.set_xlabel("weight before fine-tuning")
        ax.legend(frameon=False, markerscale=3)
    axes[0].set_ylabel("after (pruned ones: before)")
    fig.tight_layout()
    return fig


def draw_remains(args):
    fig, ax = plt.subplots(figsize=(6, 3.8))
    for method in ("magnitude", "mvp"):
        after = row(encoder(run_folder(args, method)))
        ax.hist(after[after != 0], bins=100, histtype="step", density=True,
                color=METHODS[method][1], label=METHODS[method][0])
    ax.set_xlabel("weights that remain at 3 %")
    ax.set_ylabel("density")
    ax.legend(frameon=False)
    fig.tight_layout()
    return fig


def draw_layers(args):
    fig, ax = plt.subplots(figsize=(6, 3.8))
    for method, (name, colour, mark) in METHODS.items():
        if not run_folder(args, method).exists():
            continue
        matrices = encoder(run_folder(args, method))
        shares = []
        for layer in range(4):
            weights = row({k: w for k, w in matrices.items() if f"layer.{layer}." in k})
            shares.append(100 * np.mean(weights != 0))
        ax.plot(range(1, 5), shares, color=colour, marker=mark, label=name)
    ax.set_xticks(range(1, 5))
    ax.set_xlabel("layer")
    ax.set_ylabel("% kept, 3 % in all")
    ax.legend(frameon=False)
    fig.tight_layout()
    return fig


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path)
    parser.add_argument("--out", type=Path, default=ROOT / "figures")
    args = parser.parse_args()
    figures = {"score": draw_score(), "prior": draw_prior()}
    if args.runs:
        figures["movement"] = draw_movement(args)
        figures["remains"] = draw_remains(args)
        figures["layers"] = draw_layers(args)
    for name, figure in figures.items():
        figure.savefig(args.out / f"{name}.png", dpi=110, metadata={"Software": None})
        print(args.out / f"{name}.png")


if __name__ == "__main__":
    main()

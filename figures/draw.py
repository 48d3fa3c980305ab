"""Draws the README's figures from saved runs: one function a figure, each with the paper's figure it answers and what to see in it.

Run        pip install -r figures/requirements.txt                                   matplotlib is needed here and nowhere else
           python figures/draw.py --runs out/embedded --out figures                  every figure whose runs are there
           python figures/draw.py --runs out/embedded --out figures --train          and those that need a look inside a run

A figure whose runs are not all there is drawn without them or left out, and the command that makes the missing run is printed. Runs are
told apart by what their own result.json and log.jsonl say, not by the names of their folders. What a finished run no longer holds (movement's
scores, MGPP's threshold at each zeroing) is seen by running the script's main() again with the saved run's flags and looking on: two to four
minutes each on one core, only with --train, and kept under RUNS/inside. Every number drawn is from a run, but for the hollow marks: those are
the papers', and prior.png, which is a formula.
"""
import argparse, importlib, io, json, math, sys
from pathlib import Path
from unittest import mock

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
# name, colour and mark of each method: Okabe and Ito's colours, which colour-blind readers tell apart; printed in grey the marks do it
METHODS = {"magnitude": ("magnitude", "#000000", "s"), "mvp": ("movement", "#0072B2", "^"), "soft_mvp": ("soft movement", "#CC79A7", "v"),
           "l0": ("L0", "#E69F00", "o"), "rpp": ("RPP", "#009E73", "D"), "mgpp": ("MGPP", "#D55E00", "P")}
SERIES = METHODS | {"mvp_global": ("movement, global", "#0072B2", "^")}                # of the one picture with both of movement's scopes
PRUNED, OTHER, INK = "#B5B5B5", "#777777", "#333333"             # what is pruned; what is none of the six; letters and axes
KINDS = {"attention.self.query.weight": "query", "attention.self.key.weight": "key", "attention.self.value.weight": "value",
         "attention.output.dense.weight": "attention\noutput", "intermediate.dense.weight": "inter-\nmediate", "output.dense.weight": "output"}

# The papers' own results on SQuAD 1.1 with BERT-base, without a teacher: (% kept, F1), and the dense F1. From the run sheet of Sanh, Wolf and
# Rush 2020 (local scope; for magnitude and movement the final v of the schedule, for the others what the sheet counts, up to 0.14 too much), and
# from Guo et al. 2019. None is known for MGPP.
PAPER = {"magnitude": (88.07, [(90, 87.55), (60, 87.32), (40, 87.00), (30, 86.25), (20, 84.80), (10, 78.51), (6, 70.74), (3, 54.49)]),
         "mvp": (88.07, [(90, 87.24), (70, 85.02), (50, 83.16), (30, 82.38), (10, 81.72), (8, 81.21), (5, 79.59), (3, 76.28)]),
         "soft_mvp": (88.07, [(93.64, 86.93), (83.11, 87.03), (59.57, 86.55), (45.46, 85.77), (31.21, 84.60), (13.87, 82.17), (7.08, 80.97),
                              (3.99, 80.39), (2.56, 79.62), (1.21, 77.46)]),
         "l0": (88.07, [(66.79, 84.56), (58.36, 84.65), (40.65, 83.91), (17.75, 81.76), (14.79, 80.89), (9.80, 80.01), (6.06, 78.06), (2.87, 73.09)]),
         "rpp": (88.5, [(59, 88.5)])}


# ---- runs: which there are, which are lacking, what they hold

# A run with one of these flags is not the method's plain run of README's tables.
OWN = ("scope", "mix", "spike", "slab", "interval", "penalty", "score_lr", "gamma", "rounds", "nip", "teacher")
# The other names of results/grid.py's: the script, and what sets it off.
COLUMNS = {"mvp_global": ("mvp", {"scope": "global"}), "mvp_kd": ("mvp", {"teacher": True}), "soft_mvp_kd": ("soft_mvp", {"teacher": True}),
         "nip": ("rpp", {"nip": True})}
SHARED = ("preset", "model", "data", "steps", "batch_size", "lr", "device")


class Runs:
    """The finished runs of one task in a folder. v: the share kept that the figures of one share look at. results: a file of
    results/grid.py's, whose rows count as runs where scores alone are asked for (self.scored)."""
    def __init__(self, folder, task="squad", v=0.03, train=False, results=None):
        self.folder, self.task, self.v, self.train, self.lacks, self.held = Path(folder), task, v, train, [], []
        for path in sorted(self.folder.glob("*/result.json")):
            result, log = json.loads(path.read_text()), path.parent / "log.jsonl"
            if result["task"] == task and log.exists():
                flags = json.loads(log.read_text().partition("\n")[0]).get("args", {})          # as given, before the preset filled them in
                own = {key: flags[key] for key in OWN if flags.get(key) not in (None, False, "local")}
                self.held.append(result | dict(folder=path.parent, flags=flags, own=own))
        self.scored, known = [*self.held], {(r["method"], r["sparsity"], r["seed"], *r["own"]) for r in self.held}
        for line in Path(results).read_text().splitlines()[1:] if results and Path(results).exists() else ():
            method, of, v, seed, _, metrics = line.split("\t")[:6]
            method, own = COLUMNS.get(method, (method, {}))
            if of == task and (method, float(v), int(seed), *own) not in known:
                numbers = dict(zip(metrics.split()[::2], map(float, metrics.split()[1::2])))
                self.scored.append(dict(method=method, task=of, sparsity=float(v), seed=int(seed), metrics=numbers, own=own))

    def find(self, method, v, **own):
        """All such runs, by seed; own: the flags that set it off from the method's plain run."""
        return self.among(self.held, method, v, own)

    @staticmethod
    def among(runs, method, v, own):
        found = [r for r in runs if (r["method"], r["own"]) == (method, own) and r["sparsity"] is not None and math.isclose(r["sparsity"], v)]
        return sorted(found, key=lambda r: r["seed"])

    def first(self, method, v=None, **own):
        """The run of the lowest seed; None, and a line in self.lacks, if there is none."""
        v = v or self.v
        found = self.find(method, v, **own)
        if not found:
            shared = {key: self.held[0]["flags"].get(key) for key in SHARED} if self.held else {"preset": "mini"}
            flags = {"task": self.task, "sparsity": f"{v:g}", **shared, **own, "out": self.folder / self.name(method, v, **own)}
            self.lacks.append(" ".join([f"python {method}.py", *(f"--{key} {x}" for key, x in flags.items() if x is not None)]))
        return found[0] if found else None

    def name(self, method, v, seed=0, **own):
        """A folder's name: results/grid.py's, and the method's own flags."""
        return "-".join([method, *(f"{key}_{x}" for key, x in own.items()), self.task, f"{v:g}", f"s{seed}"])


def encoder(folder):
    """{"0.attention.self.query.weight": (out, in), ...}: the prunable matrices of a model folder, in the model's order."""
    from safetensors.numpy import load_file
    held = {name.partition("encoder.layer.")[2]: x for name, x in load_file(Path(folder) / "model.safetensors").items()}
    names = [f"{layer}.{kind}" for layer in range(1 + max(int(n.split(".")[0]) for n in held if n)) for kind in KINDS]
    return {name: held[name] for name in names}


def flat(matrices):
    """All weights of a model in one row, (n,), in the order of encoder()."""
    return np.concatenate([w.ravel() for w in matrices.values()])


def pretrained(run):
    """The matrices that a run began from."""
    return encoder(run["flags"].get("model") or ROOT / "mini/bert")


def score(result):
    """The one number of a run's metrics: F1 where SQuAD has it, else the task's first."""
    metrics = result["metrics"]
    return metrics["F1"] if result["task"] == "squad" else next(iter(metrics.values()))


def share_of_dense(runs):
    """{series: (shares kept, mean, lowest and highest score over the seeds)}, scores as shares of the dense runs' mean; {} without a dense run."""
    dense = [score(r) for r in runs.among(runs.scored, "magnitude", 1, {})]
    table = {}
    for series in SERIES if dense else ():
        method, own = COLUMNS.get(series, (series, {}))
        shares = sorted({r["sparsity"] for r in runs.scored if (r["method"], r["own"]) == (method, own) and r["sparsity"]})
        scores = [[score(r) / np.mean(dense) for r in runs.among(runs.scored, method, v, own)] for v in shares if v < 1]
        if scores:
            rows = [(v, np.mean(s), min(s), max(s)) for v, s in zip(shares, scores)]
            table[series] = tuple(np.array(rows + [(1.0, 1.0, min(dense) / np.mean(dense), max(dense) / np.mean(dense))]).T)
    return table


def kept_by(matrices, part):
    """{part(name): share of the weights that are not zero}, matrices of the same part counted together."""
    count = {}
    for name, w in matrices.items():
        kept, size = count.get(part(name), (0, 0))
        count[part(name)] = (kept + np.count_nonzero(w), size + w.size)
    return {key: kept / size for key, (kept, size) in count.items()}


def spread(heights, gap):
    """Heights for labels: the nearest in squares to those given, in the same order, none closer than gap to the next."""
    order, step = np.argsort(heights, kind="stable"), gap * np.arange(len(heights))
    blocks = []                                                     # [mean, count]: less the gaps, heights only have to be in order
    for y in np.array(heights, dtype=float)[order] - step:
        blocks.append([y, 1])
        while len(blocks) > 1 and blocks[-2][0] > blocks[-1][0]:
            y, n = blocks.pop()
            blocks[-1] = [(blocks[-1][0] * blocks[-1][1] + y * n) / (blocks[-1][1] + n), blocks[-1][1] + n]
    out = np.empty(len(heights))
    out[order] = np.repeat(*zip(*blocks)) + step
    return out


# ---- looking inside a run

def look(runs, method, **own):
    """What a run of the method does not leave behind: {name: array}, from the cache, else with --train by watching a run; else None."""
    base = runs.first(method)
    if base is None:
        return None
    file = runs.folder / "inside" / runs.name(method, runs.v, base["seed"], **own) / "inside.npz"
    if not file.exists():
        if not runs.train:
            runs.lacks.append(f"the inside of {file.parent.name}: the same command with --train runs it again and looks on, two to four minutes")
            return None
        print(f"running {file.parent.name} again to look inside: two to four minutes on one core, then kept as {file}", flush=True)
        sys.path.insert(0, str(ROOT))
        script = importlib.import_module(method)
        args = script.flags().parse_args([])
        for key, x in (base["flags"] | own | {"out": str(file.parent)}).items():
            setattr(args, key, x)
        seen = WATCH[method](script, args)
        with open(file.with_suffix(".part"), "wb") as f:            # renamed when whole: a stopped run leaves no half of a cache
            np.savez_compressed(f, **seen)
        file.with_suffix(".part").rename(file)
    return dict(np.load(file))


def watch_scores(script, args):
    """Run mvp.py and copy W, S and M just before the bake makes one matrix of them. Each (n,), in the order of the model."""
    seen, bake = {"weights": [], "scores": [], "mask": []}, script.parametrize.remove_parametrizations

    def spy(layer, name):
        held = layer.parametrizations.weight
        for key, x in (("weights", held.original), ("scores", held[0].scores), ("mask", held[0].mask)):
            seen[key].append(x.detach().cpu().numpy().ravel().copy())
        return bake(layer, name)
    with mock.patch.object(script.parametrize, "remove_parametrizations", spy):
        script.main(args)
    return {key: np.concatenate(x) for key, x in seen.items()}


def watch_threshold(script, args):
    """Run mgpp.py and note at each zeroing the smallest |w| that stays. step, threshold, kept: each (zeroings,); weights: what remains, (m,)."""
    rows, at, schedule, zero, dense = [], [0], script.schedule, script.zero_smallest, []

    def spy_schedule(step, *rest):
        at[0] = step
        return schedule(step, *rest)

    def spy_zero(matrices, v):
        zero(matrices, v)
        dense[:] = matrices
        rows.append((at[0], min(float(w.detach().abs()[w != 0].min()) for w in matrices if (w != 0).any()), v))
    with mock.patch.object(script, "schedule", spy_schedule), mock.patch.object(script, "zero_smallest", spy_zero):
        script.main(args)
    # the last call is the bake's, when nothing is zeroed any more
    weights = np.concatenate([w.detach().cpu().numpy().ravel() for w in dense])
    return dict(zip(("step", "threshold", "kept"), np.array(rows[:-1]).T), weights=weights[weights != 0])


WATCH = {"mvp": watch_scores, "mgpp": watch_threshold}


# ---- the prior, a formula

def mixture_penalty(w, lam, s0, s1):
    """-log pi(w) + log pi(0) of pi = lam N(0, s1) + (1 - lam) N(0, s0), s0 and s1 variances. Same shape as w."""
    def log_pi(w):
        return np.logaddexp(math.log(lam) - 0.5 * math.log(s1) - w ** 2 / (2 * s1), math.log(1 - lam) - 0.5 * math.log(s0) - w ** 2 / (2 * s0))
    return log_pi(np.zeros(1)) - log_pi(np.asarray(w, dtype=float))


def mixture_edge(lam, s0, s1):
    """The |w| at which spike and slab are equally dense: c1 + c2 w^2 = 0."""
    c1, c2 = math.log(lam / (1 - lam)) + 0.5 * math.log(s0 / s1), 0.5 / s0 - 0.5 / s1
    return math.sqrt(-c1 / c2)


# ---- drawing

def style():
    """pyplot, in one look for all figures: at half size the letters are still 9 points."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    pyplot.rcParams.update({
        "font.family": "DejaVu Sans", "font.size": 18, "axes.titlesize": 18, "figure.titlesize": 20, "axes.titlelocation": "left",
        "axes.titlepad": 12, "lines.linewidth": 2.5, "lines.markersize": 11, "axes.linewidth": 1.2,
        "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": INK, "xtick.color": INK, "ytick.color": INK,
        "axes.spines.top": False, "axes.spines.right": False, "figure.constrained_layout.use": True})
    return pyplot


def panels(plt, title, columns=2, rows=1, height=6.2, **more):
    """A figure of the common width with a headline, and its axes."""
    fig, axes = plt.subplots(rows, columns, figsize=(12, height), **more)
    fig.get_layout_engine().set(w_pad=0.12, h_pad=0.12)             # inches: nothing touches the edge
    fig.suptitle(title, x=0.012, ha="left", weight="bold")
    return fig, axes


def ink(colour):
    """The colour of a method's label: darker than its marks, letters being thinner."""
    return tuple(0.72 * int(colour[i:i + 2], 16) / 255 for i in (1, 3, 5))


def label_ends(ax, ends, side="right", gap=0.085):
    """A name beside the end of each line, and a thin line to it where it had to move. ends: {method or text: (x, y)}; gap: in axes' heights."""
    ax.figure.canvas.draw()                                         # now the axes are where they will be
    places = [ax.transAxes.inverted().transform(ax.transData.transform(xy)) for xy in ends.values()]         # (0, 0) to (1, 1)
    heights, sign = spread([y for _, y in places], gap), 1 if side == "right" else -1
    at = sign * (max(sign * x for x, _ in places) + 0.06)
    for (x, y), what, height in zip(places, ends, heights):
        name, colour, _ = SERIES.get(what, (what, OTHER, ""))
        ax.plot([x + sign * 0.02, at - sign * 0.005], [y, height], color=colour, linewidth=1, transform=ax.transAxes, clip_on=False)
        ax.text(at, height, name, color=ink(colour), transform=ax.transAxes, va="center_baseline", ha="left" if sign > 0 else "right", weight="bold")


def draw_score(plt, runs):
    """Score against the share kept, movement paper Fig. 2: left these runs, right the papers' results as hollow marks.

    See: with a third of the weights all are within a few points; at 3 % magnitude has fallen away, and those that learn what to keep hold."""
    table = share_of_dense(runs)
    if not set(METHODS) <= set(table):                              # then say which runs would make it whole
        runs.first("magnitude", 1)
        for method in METHODS:
            runs.first(method)
    if not table:
        return None
    fig, (ours, theirs) = panels(plt, "The fewer weights are kept, the more the method matters", sharey=True, width_ratios=[1.25, 1])
    for method, (v, mean, low, high) in table.items():
        _, colour, mark = SERIES[method]
        ours.plot(100 * v, 100 * mean, "-" if method in METHODS else ":", color=colour, marker=mark, clip_on=False)
        ours.vlines(100 * v, 100 * low, 100 * high, color=colour, linewidth=1.5, clip_on=False)             # from the lowest to the highest seed
    for method, (dense, points) in PAPER.items():
        _, colour, mark = METHODS[method]
        v, f1 = np.array(sorted([*points, (100, dense)])).T
        theirs.plot(v, 100 * f1 / dense, "--", color=colour, marker=mark, markerfacecolor="white", markeredgewidth=2, linewidth=1.8, clip_on=False)
        if method not in table:
            theirs.text(v[0], 100 * f1[0] / dense - 14, METHODS[method][0], color=ink(colour), weight="bold", ha="center")
    for ax in (ours, theirs):
        ax.set(xscale="log", xlabel="kept of the encoder's weights, %")
        ax.set_xticks([1, 3, 10, 30, 100], ["1", "3", "10", "30", "100"]), ax.minorticks_off()
        ax.grid(axis="y", color="#E4E4E4", linewidth=1)
        ax.set_axisbelow(True)
    ours.set(xlim=(0.06, 100), ylim=(0, 104), ylabel="score, % of the dense score"), theirs.set(xlim=(0.9, 100))
    seeds, world = len({r["seed"] for r in runs.scored}), "embedded " * all(r.get("preset", "mini") == "mini" for r in runs.scored)
    ours.set_title(f"these runs: {world}{runs.task}, {f'{seeds} seeds' if seeds > 1 else '1 seed'}")
    theirs.set_title("the papers: BERT-base, SQuAD 1.1")
    label_ends(ours, {m: (100 * v[0], 100 * mean[0]) for m, (v, mean, *_) in table.items()}, "left")
    return fig


def draw_movement(plt, runs):
    """Fine-tuned against pre-trained weights, what is pruned in grey: movement paper Fig. 1.

    See: magnitude keeps what was large before fine-tuning, a band along zero is gone; movement keeps what moved away from zero, on either side
    of the diagonal, large or small. A pruned weight has no value of its own: it is drawn where the dense run has it."""
    dense, chosen = runs.first("magnitude", 1), {m: runs.first(m) for m in ("magnitude", "mvp")}
    if not dense or not all(chosen.values()):
        return None
    before, free, rng = flat(pretrained(dense)), flat(encoder(dense["folder"])), np.random.default_rng(0)
    fig, axes = panels(plt, "Magnitude keeps what was large, movement what grew", sharex=True, sharey=True, height=7)
    reach = np.percentile(np.abs(free), 99.99) * 1.1
    for ax, (method, run) in zip(axes, chosen.items()):
        after, colour = flat(encoder(run["folder"])), METHODS[method][1]
        grew = np.mean(np.abs(after) > np.abs(before), where=after != 0)
        some = rng.permutation(len(after))                          # a share of the dots: more would only be more ink
        gone, stays = some[after[some] == 0][:30_000], some[after[some] != 0][:8_000]
        ax.scatter(before[gone], free[gone], s=2, color=PRUNED, linewidth=0)
        ax.scatter(before[stays], after[stays], s=4, color=colour, linewidth=0)
        for line in (ax.axline((0, 0), slope=1), ax.axhline(0), ax.axvline(0)):
            line.set(color=OTHER, linewidth=1, zorder=0)
        ax.set(xlim=(-reach, reach), ylim=(-reach, reach), aspect="equal", xlabel="pre-trained weight")
        ax.set_title(f"{METHODS[method][0]}: {100 * grew:.0f} % of the kept grew", color=ink(colour), weight="bold")
        ax.text(0.98, 0.16, f"kept, {100 * run['kept']:.3g} %", color=ink(colour), transform=ax.transAxes, ha="right", weight="bold")
        ax.text(0.98, 0.03, "pruned, as they are\nin the dense run", color=OTHER, transform=ax.transAxes, ha="right", fontsize=16)
    axes[0].set_ylabel("fine-tuned weight")
    return fig


def histogram(ax, weights, reach, colour, line="-"):
    """The density of the weights between -reach and reach, on the axes; returns the place of its right peak, (x, y)."""
    n, edges = np.histogram(weights, 121, (-reach, reach))
    density = n / len(weights) / (edges[1] - edges[0])
    ax.stairs(density, edges, color=colour, fill=True, alpha=0.15)
    ax.stairs(density, edges, color=colour, linewidth=2.2, linestyle=line)
    ax.set(xlim=(-reach, reach), yticks=[], ylabel="density")
    peak = np.argmax(density * (edges[:-1] > 0))
    return edges[peak + 1], density[peak]


def draw_remains(plt, runs):
    """The distribution of the weights that remain, magnitude against movement: movement paper Fig. 4, left.

    See: magnitude's two clusters with nothing between them; movement's remain at every size, few of them near zero."""
    chosen = {m: runs.first(m) for m in ("magnitude", "mvp")}
    if not all(chosen.values()):
        return None
    left = {m: w[w != 0] for m, w in ((m, flat(encoder(run["folder"]))) for m, run in chosen.items())}
    reach = max(np.percentile(np.abs(w), 99.8) for w in left.values())
    fig, ax = panels(plt, "What remains: magnitude's two clusters, movement's spread", 1, height=5.8)
    for method, w in left.items():
        name, colour, _ = METHODS[method]
        x, y = histogram(ax, w, reach, colour)
        ax.text(x + 0.02 * reach, y, name, color=ink(colour), weight="bold")
    ax.set(xlabel=f"weight, of the {100 * runs.v:.3g} % that remain")
    return fig


def draw_scores(plt, runs):
    """Score against weight in a finished movement run: movement paper Fig. 4, right. Needs a look inside.

    See: a "v": what has a high score has left zero, and a weight near zero gets neither a high nor a low one (dL/dS = dL/dW' W)."""
    seen = look(runs, "mvp")
    if seen is None:
        return None
    colour, kept, some = METHODS["mvp"][1], seen["mask"] != 0, np.random.default_rng(0).permutation(len(seen["mask"]))
    fig, ax = panels(plt, "Movement's scores draw a v over the weights", 1)
    for chosen, size, shade in ((some[~kept[some]][:25_000], 2, PRUNED), (some[kept[some]][:8_000], 4, colour)):
        ax.scatter(seen["weights"][chosen], seen["scores"][chosen], s=size, color=shade, linewidth=0)
    reach = 1.2 * np.percentile(np.abs(seen["weights"]), 99.9)
    ax.axhline(0, color=INK, linewidth=1), ax.axvline(0, color=INK, linewidth=1)
    ax.set(xlim=(-reach, reach), xlabel="weight", ylabel="score")
    ax.text(0.02, 0.93, f"kept, {100 * kept.mean():.3g} %", color=ink(colour), transform=ax.transAxes, weight="bold")
    ax.text(0.02, 0.04, "pruned", color=OTHER, transform=ax.transAxes)
    return fig


def draw_layers(plt, runs):
    """What is kept in each layer and in each kind of matrix, local and global: movement paper Fig. 6.

    See: local keeps the same everywhere by its rule (dotted); with one ranking or one threshold over all, movement and its kin choose layers
    and kinds, magnitude hardly does."""
    chosen = {m: runs.first(m, scope="global") if m in ("magnitude", "mvp") else runs.first(m) for m in METHODS}
    chosen["local"] = runs.first("magnitude") or runs.first("mvp")
    chosen = {m: encoder(run["folder"]) for m, run in chosen.items() if run}
    if len(chosen) < 2:
        return None
    fig, axes = panels(plt, "A global ranking chooses layers and kinds, a local one cannot", sharey=True, width_ratios=[1, 1.35])
    for ax, part in zip(axes, (lambda name: int(name.split(".")[0]) + 1, lambda name: KINDS[name.split(".", 1)[1]])):
        for method, matrices in chosen.items():
            shares = kept_by(matrices, part)
            name, colour, mark = METHODS.get(method, ("each matrix alone", OTHER, ""))
            values, label = [100 * share for share in shares.values()], name + ", global" * (method in ("magnitude", "mvp"))
            ax.plot(range(len(values)), values, color=colour, marker=mark, linestyle="-" if mark else ":", label=label, clip_on=False)
        ax.set_xticks(range(len(shares)), list(shares)), ax.set_xlim(-0.1, len(shares) - 0.9)
    axes[0].set(xlabel="layer", ylabel="kept, %", ylim=(0, None)), axes[1].tick_params(axis="x", labelsize=16)
    axes[1].legend(ncols=2, frameon=False, fontsize=16, loc="upper left", labelcolor=INK)         # at the ends the lines lie together
    return fig


def draw_prior(plt, runs):
    """The mixture prior beside l1, l2 and L0, as penalties and as pulls towards zero: MGPP paper Fig. 1, with its lam 1e-6, s0 1e-7, s1 0.1.

    See: like l2 near zero, like L0 further out; its pull ends where spike and slab are equally dense, while l1 and l2 go on pulling at what
    is large. l1 and l2 are drawn to meet L0 at twice that edge."""
    prior = dict(lam=1e-6, s0=1e-7, s1=0.1)
    x = np.linspace(-2.5, 2.5, 2001)                                # |w| over the edge of the spike
    mixture = mixture_penalty(x * mixture_edge(**prior), **prior)
    curves = {"mgpp": mixture / mixture[-1], "l0": np.where(x == 0, np.nan, 1.0), "l1": np.abs(x) / 2, "l2": x ** 2 / 4}
    looks = {"mgpp": (METHODS["mgpp"][1], "-", 4.5), "l0": (METHODS["l0"][1], "-", 2), "l1": (OTHER, "--", 2.5), "l2": (OTHER, ":", 3)}
    fig, (penalty, pull) = panels(plt, "The mixture prior: l2 near zero, L0 further out")
    right = x > 0.005
    for name, y in curves.items():
        colour, line, width = looks[name]
        penalty.plot(x, y, color=colour, linestyle=line, linewidth=width)
        pull.plot(x[right], np.gradient(y, x)[right], color=colour, linestyle=line, linewidth=width)
    for y, face in ((0, looks["l0"][0]), (1, "white")):             # L0 costs nothing at 0 alone
        penalty.plot([0], [y], "o", color=looks["l0"][0], markerfacecolor=face, zorder=5, clip_on=False)
    penalty.set(xlabel="weight, in edges of the spike", ylim=(0, 1.6), xlim=(-2.5, 2.5), yticks=[0, 1])
    pull.set(xlabel="weight, in edges of the spike", ylim=(0, None), xlim=(0, 2.5), xticks=[0, 1, 2], yticks=[0])
    penalty.set_title("penalty: -log prior"), pull.set_title("pull towards zero: its slope")
    label_ends(penalty, {name: (2.5, y[-1]) for name, y in curves.items()})
    label_ends(pull, {name: (2.5, np.gradient(y, x)[-1]) for name, y in curves.items()})
    return fig


def draw_threshold(plt, runs):
    """What remains, and the pruning threshold through training, MGPP against plain L2: MGPP paper Fig. 2. Needs two looks inside.

    See: both keep the same share at each zeroing; where the smallest weight that stays lies tells how the prior has shaped the rest."""
    seen = {"mgpp": look(runs, "mgpp"), "L2": look(runs, "mgpp", mix=1)}
    if any(x is None for x in seen.values()):
        return None
    fig, (left, right) = panels(plt, "The mixture prior against plain L2, at the same shares kept")
    reach = max(np.percentile(np.abs(x["weights"]), 99.8) for x in seen.values())
    for name, x in seen.items():
        colour, line = (METHODS["mgpp"][1], "-") if name == "mgpp" else (OTHER, "--")
        histogram(left, x["weights"], reach, colour, line)
        right.plot(x["step"], x["threshold"], color=colour, linestyle=line)
    left.set(xlabel="weight that remains"), left.set_title("what remains")
    right.set(xlabel="step", ylabel="smallest |weight| that stays", ylim=(0, None)), right.set_title("threshold at each zeroing")
    label_ends(right, {name: (x["step"][-1], x["threshold"][-1]) for name, x in seen.items()})
    return fig


def draw_patterns(plt, runs):
    """Where the weights that remain stand in three query and three key matrices of an RPP run: RPP paper Fig. 3.

    See: no random scatter. In the paper rows and columns stand out; here it is the heads (the lines part them), dense or thin."""
    from matplotlib.colors import ListedColormap
    run = runs.first("rpp", 0.1) or runs.first("rpp")
    if run is None:
        return None
    matrices, colours = encoder(run["folder"]), ListedColormap(["white", METHODS["rpp"][1]])
    heads, depth = (json.loads((run["folder"] / "config.json").read_text())[key] for key in ("num_attention_heads", "num_hidden_layers"))
    layers = sorted({0, depth // 2, depth - 1})                     # the first, one from the middle, the last
    fig, axes = panels(plt, f"Where RPP keeps {100 * run['kept']:.3g} %: some heads are dense, some thin", len(layers), 2, 9, squeeze=False)
    for row, kind in zip(axes, ("query", "key")):
        for ax, layer in zip(row, layers):
            kept = matrices[f"{layer}.attention.self.{kind}.weight"] != 0           # (out, in)
            ax.imshow(kept, cmap=colours, interpolation="nearest")
            for head in range(1, heads):
                ax.axhline(head * len(kept) / heads - 0.5, color=INK, linewidth=1)
            ax.set(xticks=[], yticks=[]), ax.set_title(f"{kind}, layer {layer + 1}: {100 * kept.mean():.3g} %", fontsize=17)
            ax.spines[:].set_visible(True)
        row[0].set_ylabel(f"outputs, {heads} heads")
    axes[1][0].set_xlabel("inputs")
    return fig


FIGURES = {"score": draw_score, "movement": draw_movement, "remains": draw_remains, "scores": draw_scores, "layers": draw_layers, "prior": draw_prior,
           "threshold": draw_threshold, "patterns": draw_patterns}


def save(plt, fig, path):
    """A PNG of 1800 pixels' width, in 64 colours, which is a third of the bytes and no loss to the eye."""
    from PIL import Image
    drawn = io.BytesIO()
    fig.savefig(drawn, format="png", dpi=150, facecolor="white")
    plt.close(fig)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.open(drawn).convert("RGB").quantize(64, dither=Image.Dither.NONE).save(path, optimize=True)
    return path.stat().st_size


def flags():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--runs", default="out/embedded", help="the folder of the runs' folders")
    p.add_argument("--results", default=str(ROOT / "results/embedded.tsv"), help="scores of runs whose folders are not there")
    p.add_argument("--out", default="figures", help="where the PNGs go")
    p.add_argument("--task", default="squad")
    p.add_argument("--sparsity", default=0.03, type=float, metavar="V", help="share kept in the figures that look at one share")
    p.add_argument("--only", default=",".join(FIGURES), help="figures, separated by commas")
    p.add_argument("--train", action="store_true", help="run again, and look inside, what a figure needs and no saved run holds")
    return p


def main():
    args = flags().parse_args()
    unknown = set(args.only.split(",")) - set(FIGURES)
    if unknown:
        flags().error(f"there is no figure {', '.join(sorted(unknown))}: give some of {', '.join(FIGURES)}")
    runs, plt = Runs(args.runs, args.task, args.sparsity, args.train, args.results), style()
    for name in args.only.split(","):
        runs.lacks = []
        fig = FIGURES[name](plt, runs)
        size = save(plt, fig, Path(args.out) / f"{name}.png") if fig else 0
        print(f"{name}.png: {size / 1000:.0f} kB" if fig else f"{name}.png: not drawn", end="")
        print(f"{', drawn' * bool(fig)} without what this would make:" if runs.lacks else "", *dict.fromkeys(runs.lacks), sep="\n    ")


if __name__ == "__main__":
    main()

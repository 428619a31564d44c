"""Figures for a paper, from finished runs: PNG (200 dpi), SVG, and JSON of the statistics shown.

    python -m shared.figures similarity RUN --rows alone crrcd [--name results-lr-hr] [--out PATH]
    python -m shared.figures tsne RUN --rows alone crrcd
    python -m shared.figures curve RUN RUN ... --field n

They are 7 inches wide, a page of two columns, or 3.5, one of them. `shared.report` draws its page
with the same style and panels.
"""

from __future__ import annotations

import argparse
import difflib
import io
import json
import sys
import textwrap
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.stats import ttest_ind, wasserstein_distance

from shared import cli
from shared.config import SCHEMA, Run, locate, to_dict
from shared.evaluate.intervals import Interval, bootstrap
from shared.evaluate.verify import histogram_statistics
from shared.files import write_bytes
from shared.results import arrays_of

INK, PAPER = "#010203", "#fefdfc"  # become the page's own colours in the report's SVG
OWN, REFERENCE = "#d55e00", "#808080"
OTHERS = ("#0072b2", "#009e73", "#e69f00", "#56b4e9", "#cc79a7")  # Okabe and Ito's, with OWN
MARKERS = "o^sDvPX*p<"  # with OTHERS, filled and then hollow: 100 classes that differ
NUMBERED = 25  # classes; the numbers of more would hide the points
STYLE: dict[Any, Any] = {
    "font.size": 9, "text.color": INK, "axes.edgecolor": INK, "axes.labelcolor": INK,
    "xtick.color": INK, "ytick.color": INK, "grid.color": INK, "grid.alpha": 0.12,
    "axes.grid": True, "axes.axisbelow": True, "axes.spines.top": False,
    "axes.spines.right": False, "axes.titlesize": 9, "axes.titlelocation": "left",
    "legend.frameon": False, "legend.fontsize": 7.5, "text.parse_math": False,
    "svg.hashsalt": "report",  # the same run gives the same bytes
}  # fmt: skip
POINTS = 4000  # of a t-SNE, 400 of each of 10 classes: some 40 s on one core for each panel
BINS = np.linspace(-1, 1, 101)  # of cosines: those that the overlap is measured with
MEAN_BINS = 60
AXES = {
    "n": "negatives of each sample, n", "tau": "temperature of the critic, τ",
    "d": "dimension of a relation, d",
}  # fmt: skip
# Fields that say where and how a run was made, not what was trained.
APART = {
    "recipe", "device", "threads", "compile", "evaluate_every", "checkpoint_seconds", "log_every",
    "folder", "runs", "cache", "resume", "tensorboard", "report", "vary", "figure", "data.root",
    "data.workers", "data.resident_gib", "teacher.outputs", "teacher.outputs_gib",
}  # fmt: skip


# -- the figures ---------------------------------------------------------------------------------


@mpl.rc_context(STYLE)
def curve(
    runs: Sequence[Path], field: str, out: Path, *, arm: str, column: str = "verification"
) -> Path:
    """CRRCD's Fig. 3, AIRD's Fig. 6: the row `arm` of finished runs over a field of their configs.

    field: dotted, such as "n" or "optim.lr"; numbers are joined, on a log axis where they span more
    than a decade, words stand apart. Bars, and the grey band of the reference row of each run: 95 %
    intervals of results.json, percent. Fields that differ besides are named under the figure.
    Returns OUT.png; beside it OUT.svg and OUT.json.

    ValueError: fewer than two runs, an unfinished one, no such field, row or column, two runs with
    one value, runs scored on different items.
    """
    if len(runs) < 2:
        raise ValueError(f"a curve over {field} needs two runs or more, got {len(runs)}")
    tables = [Table(run) for run in runs]
    configs = [_fields(read_record(Path(run) / "config.json")["config"]) for run in runs]
    first, base = tables[0], tables[0].record["reference"]
    points: dict[Any, dict[str, Any]] = {}
    for table, config in zip(tables, configs, strict=True):
        if field not in config:
            near = difflib.get_close_matches(field, config, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ValueError(f"{table.run / 'config.json'}: no field {field!r}{hint}")
        value = config[field]
        value = value if isinstance(value, int | float | str) else json.dumps(value)
        if value in points:
            raise ValueError(f"{field} is {value} in two runs: {points[value]['run']}, {table.run}")
        groups = table.array(f"groups/{column}", f"column {column!r}")
        if not np.array_equal(groups, first.array(f"groups/{column}", f"column {column!r}")):
            raise ValueError(f"{table.run}: not scored on the same items as {first.run}")
        points[value] = {"run": str(table.run), "arm": table.cell(arm, column)}
        if base not in (None, arm):
            points[value]["reference"] = table.cell(base, column)
    numeric = all(isinstance(v, int | float) and not isinstance(v, bool) for v in points)
    values: list[Any] = sorted(points) if numeric else list(points)
    x = np.array(values if numeric else range(len(values)), dtype=float)

    figure, (axes,) = _grid(1, 0.7)
    for name, who, colour in (("reference", base, REFERENCE), ("arm", arm, OWN)):
        cells = [points[v][name] for v in values if name in points[v]]
        if not cells:
            continue
        mean, low, high = np.array([[c[k] for k in ("value", "low", "high")] for c in cells]).T
        if name == "arm":
            axes.vlines(x, low, high, color=colour, lw=1.3, zorder=3)
            line = "o-" if numeric else "o"
            axes.plot(x, mean, line, ms=4, lw=1.3, color=colour, label=who, zorder=4)
        elif numeric:
            axes.fill_between(x, low, high, color=colour, alpha=0.25, lw=0)
            axes.plot(x, mean, "--", lw=1, color=colour, label=who)
        else:
            axes.use_sticky_edges = False  # or the lowest bar stands on the axis
            axes.bar(x, high - low, 0.6, low, color=colour, alpha=0.25, lw=0)
            axes.hlines(mean, x - 0.3, x + 0.3, color=colour, lw=1, ls="--", label=who)
    if numeric and x.min() > 0 and x.max() > 10 * x.min():
        axes.set_xscale("log")
        axes.minorticks_off()
    shown = [f"{v:g}" if numeric else str(v) for v in values]
    axes.set_xticks(x, shown, rotation=45 if len("".join(shown)) > 26 else 0)
    if not numeric:
        axes.set_xlim(-0.5, len(x) - 0.5)
    heading, unit = first.record["columns"][column], first.record["unit"]
    axes.set(xlabel=AXES.get(field, field), ylabel=f"{heading} (%)")
    items = len(groups)
    drawn = len(np.unique(groups))
    sample = f"n = {items:,}" + (f" {unit}" if drawn == items else f" of {drawn:,} {unit}")
    differ = sorted(
        k for k in set().union(*configs) - {field}
        if k not in APART and len({json.dumps(c.get(k)) for c in configs}) > 1
    )  # fmt: skip
    note = f"{first.record['evaluation']}: {sample}; 95 % intervals"
    _caption(figure, note + (f"; also different: {', '.join(differ)}" if differ else ""))
    legend(figure)
    shown_points = [{"value": v} | points[v] for v in values]
    return _save(figure, out, {
        "figure": "curve", "field": field, "arm": arm, "reference": base, "column": column,
        "unit": "percent", "evaluation": first.record["evaluation"], "items": items,
        "resampled": unit, "units": drawn, "also different": differ, "points": shown_points,
    })  # fmt: skip


def recipe_curve(
    paper: str, config: Run, wanted: Sequence[Run], runs: Sequence[Path], out: Path, *,
    arm: str, column: str = "verification",
) -> Path | None:  # fmt: skip
    """`curve` of a recipe whose runs, `wanted`, differ in one field; None with fewer than two.

    Takes the finished `runs` and every earlier one in `config.runs` that was trained as one of
    `wanted`, so that it grows with --only and --resume. Those that are missing are said.
    """
    keys = [_trained(to_dict(one)) for one in wanted]
    (field,) = (k for k in keys[0] if len({json.dumps(key[k]) for key in keys}) > 1)
    tables = (locate(config.runs) / paper).glob(f"{config.recipe}-*/results.json")
    earlier = [table.parent for table in sorted(tables, key=lambda table: table.stat().st_mtime)]
    found: dict[int, Path] = {}
    for run in [*earlier, *runs]:
        try:
            its = _trained(read_record(run / "config.json")["config"])
        except ValueError:  # of another version
            continue
        if its in keys:
            found[keys.index(its)] = run
    if missing := [k for k in range(len(keys)) if k not in found]:
        each = "; ".join(f"train.py {config.recipe} --only {k + 1}" for k in missing)
        print(f"{config.recipe}: {len(found)} of {len(keys)} runs; not yet: {each}",
              file=sys.stderr)  # fmt: skip
    if len(found) < 2:
        return None
    return curve([found[k] for k in sorted(found)], field, out, arm=arm, column=column)


@mpl.rc_context(STYLE)
def bars(
    run: Path, rows: Sequence[str], out: Path, *, column: str, name: str = "results"
) -> Path:
    """HORKD's Fig. 4: rows of one table below each other, with 95 % intervals, percent.

    The table's reference row is a grey line with its interval. Returns OUT.png; beside it OUT.svg
    and OUT.json. ValueError: no finished table, no such row or column.
    """
    table = Table(run, name)
    count = _some(rows)
    if column not in table.record["columns"]:
        raise ValueError(f"{table.path}: no column {column!r}")
    cells = {row: table.cell(row, column) for row in rows}
    figure = Figure(figsize=(3.5, 0.8 + 0.17 * count), layout="constrained")
    axes = figure.subplots()
    base = table.record["reference"]
    if base is not None and base not in rows:
        own = table.cell(base, column)
        axes.axvspan(own["low"], own["high"], color=REFERENCE, alpha=0.25, lw=0)
        axes.axvline(own["value"], color=REFERENCE, lw=1, ls="--", label=base)
    value, low, high = (np.array([c[k] for c in cells.values()]) for k in ("value", "low", "high"))
    y = np.arange(count)
    axes.hlines(y, low, high, color=OWN, lw=1.3)
    axes.plot(value, y, "o", ms=4, color=OWN)
    axes.set_yticks(y, list(rows))
    axes.set(ylim=(count - 0.5, -0.5), xlabel=f"{table.record['columns'][column]} (%)")
    _caption(figure, f"{table.record['evaluation']}; 95 % intervals over {table.record['unit']}")
    legend(figure)
    return _save(figure, out, {
        "figure": "bars", **table.source(), "column": column, "unit": "percent",
        "reference": base, "rows": cells,
    })  # fmt: skip


@mpl.rc_context(STYLE)
def similarity(run: Path, rows: Sequence[str], out: Path, *, name: str = "results") -> Path:
    """CRRCD's Fig. 5, AIRD's Fig. 3: cosines of positive and of negative pairs, a panel a row.

    The two statistics are CRRCD's, of `shared.evaluate.verify.histogram_statistics`. Returns
    OUT.png; beside it OUT.svg and OUT.json. ValueError: no finished table, no such row, no pairs.
    """
    table = Table(run, name)
    same = table.array("pairs/same", "pairs")
    labels = (f"same person ({np.count_nonzero(same):,} pairs)",
              f"different people ({np.count_nonzero(~same):,} pairs)")  # fmt: skip
    figure, panels = _grid(_some(rows), 0.75, share=True)
    shown: dict[str, Any] = {}
    for row, axes in zip(rows, panels, strict=True):
        scores = table.array(f"{row}/scores", "pair scores", row)
        threshold = float(table.array(f"{row}/threshold", "threshold", row))
        try:
            margin, overlap = histogram_statistics(scores, same)
        except ValueError as error:
            raise ValueError(f"{table.path}: row {row!r}: {error}") from None
        pair_panel(axes, pair_shares(scores, same), threshold, (OWN, OTHERS[0]), labels)
        axes.set_title(f"{row}\nmargin {margin:.3f}, overlap {overlap:.3f}")
        axes.set(xlabel="cosine of a pair")
        shown[row] = {
            "margin": margin, "overlap": overlap, "threshold": threshold,
            "mean positive": float(scores[same].mean(dtype=float)),
            "mean negative": float(scores[~same].mean(dtype=float)),
        }  # fmt: skip
    every = np.concatenate([table.array(f"{row}/scores", "pair scores", row) for row in rows])
    panels[0].set(xlim=(every.min() - 0.02, 1), ylim=(0, None))
    for axes in panels[:: _columns(len(rows))]:
        axes.set_ylabel("pairs of the kind (%)")
    _caption(figure, f"{table.record['evaluation']}. Margin: mean of positive minus mean of "
             "negative pairs; overlap: histogram intersection, 0 apart, 1 the same; bins of 0.02; "
             "dashed: verification threshold, mean over folds")  # fmt: skip
    legend(figure, len(panels))
    return _save(figure, out, {
        "figure": "similarity", **table.source(), "bins": len(BINS) - 1, "range": [-1, 1],
        "positive pairs": int(same.sum()), "negative pairs": int((~same).sum()), "rows": shown,
    })  # fmt: skip


@mpl.rc_context(STYLE)
def tsne(run: Path, rows: Sequence[str], out: Path, *, name: str = "results") -> Path:
    """CRRCD's Fig. 4, AIRD's Fig. 4: a map of the points of a table, a panel a row.

    Up to `POINTS` images are drawn, evenly thinned where there are more; L2-normalised where faces
    are compared. Class agreement and silhouette are of the embeddings themselves (`clusters`): the
    map proves nothing. Returns OUT.png; beside it OUT.svg and OUT.json.

    ValueError: no finished table, no such row, fewer than four points or two classes.
    """
    table = Table(run, name)
    whole = table.array("points/labels", "points")
    some = thinned(len(whole), POINTS)
    labels, faces = whole[some], table.record["task"] == "faces"
    classes, counts = np.unique(labels, return_counts=True)
    if len(labels) < 4 or not 2 <= len(classes) < len(labels):
        raise ValueError(
            f"{table.path}: {len(labels)} points of {len(classes)} classes: a map needs 4 or more, "
            "of 2 classes or more, and one class with two"
        )
    figure, panels = _grid(_some(rows), 1.1)
    shown: dict[str, Any] = {}
    for row, axes in zip(rows, panels, strict=True):
        points = table.array(f"{row}/points", "points", row)[some].astype(np.float64)
        if points.ndim != 2 or len(points) != len(labels):
            raise ValueError(f"{table.path}: points of row {row!r} do not fit their labels")
        points = directions(points) if faces else points
        found = clusters(points, labels, labels if faces else None)
        class_panel(axes, embedded(points), labels)
        axes.spines[:].set(visible=True)
        agreement, silhouette = found["1-NN"], found["silhouette"]
        axes.set_title(
            f"{row}\n1-NN {_shown(agreement, '.1f')} %\nsilhouette {_shown(silhouette, '.2f')}"
        )
        shown[row] = {k: vars(v) for k, v in found.items()} | {"dimensions": points.shape[1]}
    kind = "identities" if faces else "classes"
    chance = float(100 * (counts * (counts - 1)).sum() / (len(labels) * (len(labels) - 1)))
    sample = f"n = {len(labels):,} images of {len(classes)} {kind}"
    _caption(figure, f"{table.record['evaluation']}: {sample}; t-SNE, axes without unit. "
             f"1-NN: images whose nearest other one is of their class (chance {chance:.1f} %). "
             "1-NN and silhouette are of the embeddings, not of the map; "
             f"in brackets: 95 % intervals over {kind if faces else 'images'}")  # fmt: skip
    return _save(figure, out, {
        "figure": "tsne", **table.source(), "images": len(labels), "of": len(whole),
        "classes": len(classes), "chance of 1-NN": chance,
        "distance": "Euclidean" + (" of L2-normalised embeddings" if faces else ""),
        "perplexity": _perplexity(len(labels)), "seed": 0, "rows": shown,
    })  # fmt: skip


@mpl.rc_context(STYLE)
def means(groups: Mapping[str, Mapping[str, np.ndarray]], out: Path) -> Path:
    """AIRD's Fig. 5: how the mean of a feature map is distributed over the images of two data sets.

    groups: panel ("before", "after") -> data set -> means [N], the same two data sets in each. In
    title and JSON the Wasserstein-1 distance of the two, and the first one's mean minus the
    second's with a 95 % interval (Welch); both in units of the feature. Returns OUT.png; beside it
    OUT.svg and OUT.json.

    ValueError: other than two data sets, NaN or infinite means, or all of them the same.
    """
    panels = {p: {s: np.asarray(v, dtype=np.float64) for s, v in g.items()}
              for p, g in groups.items()}  # fmt: skip
    sets = list(next(iter(panels.values()), ()))
    for panel, values in panels.items():
        if len(sets) != 2 or set(values) != set(sets):
            raise ValueError(f"{panel}: data sets {list(values)}, needs the same two in each panel")
        for name, v in values.items():
            if v.ndim != 1 or len(v) < 2 or not 0 < np.ptp(v) < np.inf:  # NaN fails too
                raise ValueError(f"{panel}, {name}: needs finite means [N], not all the same")
    figure, drawn = _grid(_some(panels), 0.75, share=True)
    every = np.concatenate([v for values in panels.values() for v in values.values()])
    bins = np.histogram_bin_edges(every, MEAN_BINS)
    shown: dict[str, Any] = {}
    for (panel, values), axes in zip(panels.items(), drawn, strict=True):
        for k, name in enumerate(sets):
            sizes = dict.fromkeys(len(v[name]) for v in panels.values())
            label = f"{name} (n = {', '.join(f'{n:,}' for n in sizes)})"
            share = 100 * np.histogram(values[name], bins)[0] / len(values[name])
            axes.stairs(share, bins, fill=True, color=OTHERS[k], alpha=0.35)
            axes.stairs(share, bins, color=OTHERS[k], lw=1.3, ls=("-", "--")[k], label=label)
        a, b = (values[name] for name in sets)
        distance = float(wasserstein_distance(a, b))
        welch = ttest_ind(a, b, equal_var=False).confidence_interval()
        gap = Interval(float(a.mean() - b.mean()), float(welch.low), float(welch.high))
        axes.set_title(f"{panel}\nW1 {distance:#.3g}\nΔ {_shown(gap, '+#.3g')}")
        axes.set(xlabel="mean of an image's feature map", ylim=(0, None))
        shown[panel] = {"Wasserstein-1": distance, "difference of means": vars(gap)} | {
            name: {"n": len(v), "mean": float(v.mean()), "sd": float(v.std(ddof=1))}
            for name, v in values.items()
        }
    for axes in drawn[:: _columns(len(panels))]:
        axes.set_ylabel("images (%)")
    _caption(figure, f"W1: Wasserstein-1 distance of the two distributions; Δ: mean of "
             f"{sets[0]} minus mean of {sets[1]} [95 % interval]")  # fmt: skip
    legend(figure, len(panels))
    return _save(figure, out, {"figure": "means", "bins": bins.tolist(), "panels": shown})


# -- panels, also the report's -------------------------------------------------------------------


def pair_shares(scores: np.ndarray, same: np.ndarray) -> list[np.ndarray]:
    """Percent of the positive and of the negative pairs in each of `BINS`; cosines, same: [P]."""
    return [100 * np.histogram(scores[k], BINS)[0] / max(1, k.sum()) for k in (same, ~same)]


def pair_panel(
    axes: Axes,
    shares: Sequence[np.ndarray],
    threshold: float,
    colours: tuple[str, str],
    labels: tuple[str, str] = ("same person", "different people"),
    bins: np.ndarray = BINS,
) -> None:
    """`pair_shares` as a filled and an outlined histogram, with the verification threshold."""
    positive, negative = shares
    axes.stairs(positive, bins, fill=True, color=colours[0], alpha=0.7, label=labels[0])
    axes.stairs(negative, bins, color=colours[1], lw=1.2, label=labels[1])
    axes.axvline(threshold, color=INK, ls="--", lw=0.8)


def class_panel(axes: Axes, flat: np.ndarray, labels: np.ndarray) -> None:
    """A map [N, 2]: a colour and marker for each class, numbered where there are few of them."""
    classes = np.unique(labels)
    size = min(14, 14_000 / len(labels))
    for k, c in enumerate(classes):
        x, y = flat[labels == c].T
        ink: dict[str, Any] = {"color": OTHERS[k % 5], "lw": 0}
        if k // 50 % 2:
            ink = {"fc": "none", "ec": OTHERS[k % 5], "lw": 0.5}
        axes.scatter(x, y, s=size, alpha=0.8, marker=MARKERS[k // 5 % 10], **ink)
        if len(classes) <= NUMBERED:
            box = {"fc": PAPER, "alpha": 0.5, "ec": "none", "boxstyle": "round,pad=.1"}
            axes.text(np.median(x), np.median(y), f"{c}", ha="center", va="center", fontsize=8,
                      weight="bold", bbox=box)  # fmt: skip
    axes.set(xticks=[], yticks=[])


def thinned(count: int, most: int) -> slice:
    """Every k-th of `count`, so that no more than `most` are left."""
    return slice(None, None, max(1, -(-count // most)))


def directions(points: np.ndarray) -> np.ndarray:
    """[N, D] L2-normalised; a row of zeros stays one."""
    return points / np.linalg.norm(points, axis=1, keepdims=True).clip(1e-12)


def embedded(points: np.ndarray) -> np.ndarray:
    """[N, D] to [N, 2] by t-SNE, always the same for the same points."""
    from sklearn.manifold import TSNE  # two seconds to import, and only figures need it

    # scikit-learn's start by PCA is NaN for a collapsed network, and the process dies of it
    spread = points.shape[1] > 1 and np.ptp(points, axis=0).max() > 1e-6 * np.abs(points).max()
    start = "pca" if spread else "random"
    perplexity = _perplexity(len(points))
    return TSNE(init=start, perplexity=perplexity, random_state=0).fit_transform(points)


def _perplexity(count: int) -> float:
    return min(30.0, (count - 1) / 3)


def clusters(
    points: np.ndarray, labels: np.ndarray, groups: np.ndarray | None = None
) -> dict[str, Interval]:
    """How well classes stand apart in points [N, D], by Euclidean distance, with 95 % intervals.

    1-NN: percent of points whose nearest other point is of their class (of equally near ones, the
    share that is). silhouette: mean over points (Rousseeuw 1987), -1 to 1. Intervals resample the
    points, or whole groups [N], and hold their neighbours fixed. Memory: N^2 floats.
    """
    from sklearn.metrics import pairwise_distances, silhouette_samples

    distances = pairwise_distances(points)
    silhouettes = silhouette_samples(distances, labels, metric="precomputed")
    np.fill_diagonal(distances, np.inf)
    nearest = distances == distances.min(axis=1, keepdims=True)
    alike = labels[:, None] == labels
    agreement = 100 * (nearest & alike).sum(axis=1) / nearest.sum(axis=1)
    return {"1-NN": bootstrap(agreement, groups), "silhouette": bootstrap(silhouettes, groups)}


def legend(figure: Figure, columns: int = 4) -> None:
    """One legend for all panels, above them, where they have labels."""
    handles, labels = figure.axes[0].get_legend_handles_labels()
    if labels:
        figure.legend(
            handles, labels, loc="outside upper left", ncols=columns, columnspacing=1,
            handlelength=1.3,
        )  # fmt: skip


def rendered(figure: Figure, dpi: int, *, transparent: bool = False) -> tuple[bytes, bytes]:
    """The figure as PNG, on white, and as SVG; the same bytes whenever it is drawn."""
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=dpi, facecolor="white", metadata={"Software": None})
    return png.getvalue(), as_svg(figure, transparent=transparent)


def as_svg(figure: Figure, *, transparent: bool = False) -> bytes:
    svg = io.BytesIO()
    ground: dict[str, Any] = {"transparent": True} if transparent else {"facecolor": "white"}
    figure.savefig(svg, format="svg", metadata={"Date": None}, **ground)
    return svg.getvalue()


def _grid(count: int, tall: float, *, share: bool = False) -> tuple[Figure, list[Axes]]:
    """Panels side by side, `tall` times as high as wide, and room for the caption below them."""
    columns = _columns(count)
    lines, wide = -(-count // columns), 7 / max(2, columns)  # inches
    size = (wide * columns, lines * tall * wide + 0.7)
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(lines, columns, sharex=share, sharey=share, squeeze=False).ravel()
    for k, axes in enumerate(grid):
        axes.tick_params(labelbottom=True)  # also above a place that stays empty
        if k >= count:
            axes.remove()
    return figure, list(grid[:count])


def _columns(count: int) -> int:
    return 2 if count == 4 else min(count, 3)


def _caption(figure: Figure, text: str) -> None:
    wide = int(19 * figure.get_figwidth())  # characters of 7 points to an inch
    text = text.replace(" %", "\N{NO-BREAK SPACE}%")
    figure.supxlabel(textwrap.fill(text, wide), fontsize=7)


def _shown(interval: Interval, form: str) -> str:
    return f"{interval.mean:{form}} [{interval.low:{form}}, {interval.high:{form}}]"


def _some(panels: Sequence[str] | Mapping[str, Any]) -> int:
    """How many panels there are to draw."""
    if not panels or len(set(panels)) < len(panels):
        raise ValueError(f"{list(panels)}: name one row or more, none twice")
    return len(panels)


def _save(figure: Figure, out: Path, statistics: dict[str, Any]) -> Path:
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    png, svg = rendered(figure, 200)
    text = json.dumps(statistics, indent=1, allow_nan=False)
    for suffix, content in ((".svg", svg), (".json", text.encode()), (".png", png)):
        write_bytes(out.with_name(out.name + suffix), content)
    return out.with_name(out.name + ".png")


# -- run folders ---------------------------------------------------------------------------------


class Table:
    """A result table of a run and its arrays. ValueError: missing, torn or of another schema."""

    def __init__(self, run: Path, name: str = "results") -> None:
        self.run, self.name = Path(run), name
        self.path = arrays_of(self.run, name)
        if name != "results" and not self.path.is_file():
            there = sorted(p.stem for p in self.run.glob("*.npz") if p.stem != "arrays")
            others = "".join(f", {t}" for t in there)
            raise ValueError(f"{self.path}: no such file (tables with arrays: results{others})")
        self.record = read_record(self.run / f"{name}.json")
        self.arrays = read_arrays(self.path)

    def array(self, key: str, what: str, row: str | None = None) -> np.ndarray:
        """A finite array by its key; `what` and `row` are for the message."""
        self._has(row)
        if key not in self.arrays:
            of = "" if row is None else f" of row {row!r}"
            raise ValueError(f"{self.path}: no {what}{of} in this table")
        if not np.isfinite(self.arrays[key]).all():
            raise ValueError(f"{self.path}: {key}: NaN or infinite")
        return self.arrays[key]

    def cell(self, row: str, column: str) -> dict[str, Any]:
        self._has(row)
        return self.record["rows"][row]["cells"][column]

    def source(self) -> dict[str, str]:
        return {"run": str(self.run), "table": self.name, "evaluation": self.record["evaluation"]}

    def _has(self, row: str | None) -> None:
        rows = self.record["rows"]
        if row is not None and row not in rows:
            path = self.run / f"{self.name}.json"
            raise ValueError(f"{path}: no row {row!r} (there are: {'; '.join(rows)})")


def headline(run: Path, name: str = "results") -> str:
    """The column that a finished table is judged by."""
    return str(read_record(Path(run) / f"{name}.json")["headline"])


def read_record(path: Path) -> dict[str, Any]:
    """A run folder's config.json or table. ValueError: missing, torn or of another schema."""
    _must_exist(path)
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not readable as JSON ({error})") from None
    found = record.get("schema") if isinstance(record, dict) else None
    if found != SCHEMA:
        raise ValueError(f"{path}: schema {found}, this code reads {SCHEMA}")
    return record


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """Every array of an .npz. ValueError: missing or torn."""
    _must_exist(path)
    torn = (OSError, ValueError, EOFError, RuntimeError, MemoryError, zlib.error)
    try:
        with np.load(path) as stored:
            return dict(stored)
    except (*torn, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: not readable ({error})") from None


def _must_exist(path: Path) -> None:
    if not path.is_file():
        raise ValueError(f"{path.parent}: no finished run here ({path.name} is missing)")


def _fields(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The values of a config.json by dotted name."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        name = prefix + key
        found |= _fields(value, f"{name}.") if isinstance(value, dict) else {name: value}
    return found


def _trained(config: Mapping[str, Any]) -> dict[str, Any]:
    """What decides the students of a config.json."""
    return {k: v for k, v in _fields(config).items() if k not in APART}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m shared.figures",
        description="A figure of finished runs as PNG, SVG and JSON of the statistics it shows.",
    )
    kinds = parser.add_subparsers(dest="kind", required=True)
    drawers: dict[str, Callable[..., Path]] = {"similarity": similarity, "tsne": tsne}
    for kind, draw in drawers.items():
        one = kinds.add_parser(kind, help=(draw.__doc__ or "").split("\n")[0])
        one.add_argument("run", type=Path, metavar="RUN", help="the run's folder")
        one.add_argument("--rows", nargs="+", required=True, help="rows of its table")
        one.add_argument("--name", default="results", help="of the table")
    several = kinds.add_parser("curve", help=(curve.__doc__ or "").split("\n")[0])
    several.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folders of runs")
    several.add_argument("--field", required=True, help="of their configs, such as n or optim.lr")
    several.add_argument("--arm", help="row of their tables; default: the last of the first")
    several.add_argument("--column", default="verification", help="of their tables")
    for one in kinds.choices.values():
        one.add_argument("--out", type=Path, help="path without suffix; default: in the first run")
    args = parser.parse_args()
    if args.kind == "curve":
        first = Table(args.runs[0]).record
        arm = args.arm or first.get("own") or list(first["rows"])[-1]  # the paper's
        out = args.out or args.runs[0] / "figures" / f"curve-{args.field}"
        print(curve(args.runs, args.field, out, arm=arm, column=args.column))
    else:
        stem = args.kind if args.name == "results" else f"{args.kind}-{args.name}"
        out = args.out or args.run / "figures" / stem
        print(drawers[args.kind](args.run, args.rows, out, name=args.name))


if __name__ == "__main__":
    cli.guarded(main)

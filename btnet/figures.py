"""Figures 1, 5, 6 and 7 as PNG, SVG and JSON of what they show, and a run's tables as text."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn

from btnet.model import BTNet
from shared import figures
from shared.degrade import down_up, to_float
from shared.files import write_bytes
from shared.models import count_parameters

FULL = 112  # pixels a side of the paper's faces; its numbers are of this size
KNEE = 32  # pixels: "the error soars up when the resolution drops below 32" (Sec. 3.1)
# Sec. 3.4: 1.1 to 48.9 % of the trunk's parameters, which are those of 28 and of 7 px.
SHARES = {28: 1.1, 7: 48.9}
# Fig. 7: the part that the branch for 14 px ends with -> stored parameters in millions, as printed.
# S1, S2 U1, S2, S3 U1 (the paper's own choice), S3, S4 U1, S4, and the whole network.
ENDS = {
    "stage1.3": "0.261", "stage2.1": "0.491", "stage2.4": "1.376", "stage3.1": "2.294",
    "stage3.14": "17.63", "stage4.1": "21.30", "stage4.3": "30.74", "head": "43.59",
}  # fmt: skip
LUMA = (0.299, 0.587, 0.114)  # of RGB, ITU-R BT.601


@mpl.rc_context(figures.STYLE)
def interpolation_error(images: Tensor, out: Path, sizes: Sequence[int]) -> Path:
    """Fig. 1: what up-sampling from r px costs, for each r of `sizes`; means over the images.

    images: uint8 [N, 3, S, S], S at least 3; of them the luma in [0, 1]. Ours, as the paper has no
    formula: the bound of bilinear interpolation, (h^2 / 8) (max |f_xx| + max |f_yy|) with h = S / r
    px and f's second differences on the grid of S, and beside it what is lost by going down to
    r (bilinear, antialiased) and back up (bilinear), mean and maximum of |difference|.
    The bound is of samples taken in points, without antialiasing: it may be above 1, and is no
    bound of what is measured. Returns OUT.png; beside it .svg and .json.

    Raises ValueError for other images, and for sizes that are none, below 1 or above S.
    """
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3 or not len(images):
        found = f"{images.dtype} {list(images.shape)}"
        raise ValueError(f"images are {found}: must be uint8 [N, 3, S, S], N at least 1")
    side = images.shape[-1]
    if side < 3 or images.shape[-2] != side:
        raise ValueError(f"images of {images.shape[-2]}x{side} px: must be square, 3 px or more")
    if not sizes or min(sizes) < 1 or max(sizes) > side:
        raise ValueError(f"sizes {list(sizes)}: give one or more, from 1 to the images' {side} px")
    curvature, lost = 0.0, torch.zeros(len(sizes), 2, dtype=torch.float64)
    for some in images.split(256):
        x = to_float(some)
        luma = _luma(x)
        f_xx = luma[:, :, 2:] - 2 * luma[:, :, 1:-1] + luma[:, :, :-2]
        f_yy = luma[:, 2:] - 2 * luma[:, 1:-1] + luma[:, :-2]
        curvature += sum(float(d.abs().amax((1, 2)).sum()) for d in (f_xx, f_yy))
        for k, r in enumerate(sizes):
            back = down_up(x, r, mode="bilinear", antialias=True)
            difference = (_luma(back) - luma).abs()
            lost[k] += torch.stack([difference.mean((1, 2)).sum(), difference.amax((1, 2)).sum()])
    points = [
        {
            "resolution": r, "bound": (side / r) ** 2 / 8 * curvature / len(images),
            "mean": mean / len(images), "max": most / len(images),
        }
        for r, (mean, most) in sorted(zip(sizes, lost.tolist(), strict=True))
    ]  # fmt: skip

    figure = Figure(figsize=(7, 2.9), layout="constrained")
    left, right = figure.subplots(1, 2)
    x_axis = [point["resolution"] for point in points]
    drawn = ((left, "bound", figures.OWN, "o-"), (right, "max", figures.OTHERS[0], "s--"),
             (right, "mean", figures.OTHERS[1], "^-"))  # fmt: skip
    for axes, key, colour, line in drawn:
        axes.plot(x_axis, [p[key] for p in points], line, ms=3, lw=1.3, color=colour, label=key)
    left.set(title="bound of bilinear interpolation", ylabel="luma, of a range of 1")
    right.set(title="measured, down and back up")
    for axes in (left, right):
        if side == FULL:
            axes.axvline(KNEE, color=figures.INK, ls="--", lw=0.8)
        axes.set(xlabel="resolution (px)", ylim=(0, None))
    right.legend()
    knee = f"; dashed: {KNEE} px, where the paper sees the knee" if side == FULL else ""
    _caption(figure, f"n = {len(images):,} images of {side} px, means over them{knee}")
    return _write(figure, out, {
        "figure": "interpolation error", "images": len(images), "side": side,
        "unit": "luma, of a range of 1", "points": points,
    })  # fmt: skip


@mpl.rc_context(figures.STYLE)
def storage(resolutions: Sequence[int], trunk: nn.Module, out: Path) -> Path:
    """Fig. 5: parameters stored for each resolution, a copy of the trunk against BTNet's delta.

    resolutions, trunk: of `btnet.model.BTNet`, whose own counts are drawn; the largest resolution
    is the trunk itself, which is stored once. Returns OUT.png; beside it .svg and .json, with
    the paper's shares where they are of a 112 px trunk.
    """
    model, full = BTNet(tuple(resolutions), trunk), count_parameters(trunk)
    side, stored = max(resolutions), {r: model.stored_parameters(r) for r in sorted(resolutions)}
    points = [
        {"resolution": r, "stored": n, "full": full, "share": 100 * n / full}
        | ({"published share": SHARES[r]} if side == FULL and r in SHARES else {})
        for r, n in stored.items()
    ]
    total = {"stored": sum(stored.values()), "full": full * len(stored)}

    figure = Figure(figsize=(3.5, 2.9), layout="constrained")
    axes = figure.subplots()
    names = [*(f"{r} px" for r in stored), "all"]
    shown: list[Mapping[str, Any]] = [*points, total]
    each = [[p[key] / 1e6 for p in shown] for key in ("full", "stored")]
    labels = [f"{100 * p['stored'] / p['full']:.1f} %" for p in shown]
    _pairs(axes, names, each, ("a copy for each resolution", "BTNet"), labels)
    axes.set(xlabel="stored parameters (M)")
    _caption(figure, f"percent: of the copies; the trunk takes {side} px and is stored once")
    figures.legend(figure)
    return _write(figure, out, {"figure": "storage", "points": points, "all": total})


@mpl.rc_context(figures.STYLE)
def cost(resolutions: Sequence[int], trunk: nn.Module, out: Path) -> Path:
    """Fig. 6: multiply-accumulates of one image, up-sampled for the trunk against BTNet's branch.

    resolutions, trunk: of `btnet.model.BTNet`; counted by `shared.models.macs`. The paper's figure
    says FLOPs and prints no numbers. Returns OUT.png; beside it .svg and .json.
    """
    model, side = BTNet(tuple(resolutions), trunk), max(resolutions)
    full = model.macs(side)
    counted = {r: model.macs(r) for r in sorted(resolutions)}
    points = [
        {"resolution": r, "macs": n, "trunk": full, "share": 100 * n / full}
        for r, n in counted.items()
    ]

    figure = Figure(figsize=(3.5, 2.9), layout="constrained")
    axes = figure.subplots()
    unit, word = (1e9, "G") if full >= 1e9 else (1e6, "M")
    each = [[p[key] / unit for p in points] for key in ("trunk", "macs")]
    names, labels = [f"{r} px" for r in counted], [f"{n / unit:.2f}" for n in counted.values()]
    _pairs(axes, names, each, (f"trunk, up-sampled to {side} px", "BTNet"), labels)
    axes.set(xlabel=f"multiply-accumulates of an image ({word})")
    figures.legend(figure)
    return _write(figure, out, {"figure": "cost", "points": points})


@mpl.rc_context(figures.STYLE)
def ends(points: Sequence[Mapping[str, Any]], out: Path) -> Path:
    """Fig. 7: accuracy, and parameters stored for a resolution, against where its branch ends.

    points: "name" (of the branch's last part), "parameters", "setting" ("112&14", "14&14"),
    "accuracy", "low", "high" (percent). Drawn in the order of parameters. Returns OUT.png; beside
    it .svg and .json. Raises ValueError without points.
    """
    if not points:
        raise ValueError("a figure of where branches end needs one point or more")
    stored = {p["name"]: p["parameters"] for p in points}
    names = sorted(stored, key=lambda name: stored[name])

    figure = Figure(figsize=(7, 3.1), layout="constrained")
    axes = figure.subplots()
    beside = axes.twinx()
    labels = [f"{n}\n{stored[n] / 1e6:.3g} M" for n in names]
    beside.bar(labels, [stored[n] / 1e6 for n in names], 0.5, color=figures.REFERENCE, alpha=0.25,
               lw=0)  # fmt: skip
    beside.set(ylabel="stored parameters (M, bars)")
    beside.grid(False)
    axes.set_zorder(beside.get_zorder() + 1)
    axes.patch.set_visible(False)
    for k, setting in enumerate(dict.fromkeys(p["setting"] for p in points)):
        own = {names.index(p["name"]): p for p in points if p["setting"] == setting}
        x = sorted(own)
        value, low, high = ([own[i][key] for i in x] for key in ("accuracy", "low", "high"))
        colour = (figures.OWN, *figures.OTHERS)[k]
        axes.vlines(x, low, high, color=colour, lw=1.3)
        axes.plot(x, value, f"{figures.MARKERS[k]}-", ms=4, lw=1.3, color=colour, label=setting)
    axes.set(xlabel="last part of the branch, stored parameters", ylabel="verification (%)")
    _caption(figure, "95 % intervals")
    figures.legend(figure)
    shown = [dict(p) for p in points]
    return _write(figure, out, {"figure": "ends", "unit": "percent", "points": shown})


def table(run: Path, name: str = "results") -> str:
    """NAME.json of a run folder as text: Table 1 turned round, a line for each setting and a column
    for each model, with 95 % intervals and, beside it, the gain of Eq. 4 or 5 where the file has
    "gains".

    Raises ValueError for a file that is missing, torn or of another schema.
    """
    record = figures.read_record(Path(run) / f"{name}.json")
    rows, gains = record["rows"], record.get("gains", {})
    lines = [["", *(head for model in rows for head in (f"{model} [95 %]", "gain"))]]
    for column, heading in record["columns"].items():
        line = [heading]
        for model, row in rows.items():
            cell = row["cells"].get(column)
            line += [f"{cell['value']:.2f} [{cell['low']:.2f}, {cell['high']:.2f}]" if cell else ""]
            gain = gains.get(model, {}).get(column, math.nan)
            line += ["" if math.isnan(gain) else f"{gain:+.2f}"]
        lines.append(line)
    of = f"{record['evaluation']} split, {record['epoch']} epoch; "
    of += f"intervals by bootstrap over {record['unit']}"
    return "\n".join([*_columns(lines), "", of, f"written to {run}"])


def costs(record: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    """costs.json as text: a line for each resolution; for each model the parameters that it stores
    for it, multiply-accumulates of one image, and images a second.

    record: model -> resolution in pixels, as text -> "parameters", "macs", "images_per_second".
    """
    heads = ("parameters", "MACs", "images/s")
    lines = [["px", *(f"{model}: {head}" for model in record for head in heads)]]
    for side in sorted({int(r) for models in record.values() for r in models}):
        line = [str(side)]
        for models in record.values():
            cell = models.get(str(side))
            line += [
                f"{cell['parameters']:,}",
                f"{cell['macs'] / 1e6:,.1f} M",
                f"{cell['images_per_second']:,.0f}",
            ] if cell else [""] * 3  # fmt: skip
        lines.append(line)
    return "\n".join(_columns(lines))


def _columns(lines: list[list[str]]) -> list[str]:
    """Cells of a table, the first line its head, in columns; those without a cell are left out."""
    kept = [cells for cells in zip(*lines, strict=True) if any(cells[1:])]
    widths = [max(map(len, cells)) for cells in kept]
    text = []
    for first, *rest in zip(*kept, strict=True):
        padded = [cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True)]
        text.append("  ".join([first.ljust(widths[0]), *padded]).rstrip())
    return [text[0], "-" * len(text[0]), *text[1:]]


def _luma(x: Tensor) -> Tensor:
    """[B, 3, H, W] to [B, H, W]."""
    return (x * x.new_tensor(LUMA)[:, None, None]).sum(1)


def _pairs(
    axes: Axes, names: Sequence[str], each: Sequence[Sequence[float]], labels: Sequence[str],
    beside: Sequence[str],
) -> None:  # fmt: skip
    """Two bars for each name, the reference above ours; `beside`: what is said of ours."""
    for k, (colour, values) in enumerate(zip((figures.REFERENCE, figures.OWN), each, strict=True)):
        at = [i + 0.4 * (k - 0.5) for i in range(len(names))]
        bars = axes.barh(at, values, 0.4, color=colour, lw=0, label=labels[k])
    axes.bar_label(bars, beside, padding=2, fontsize=7)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.margins(x=0.1)


def _caption(figure: Figure, text: str) -> None:
    figure.supxlabel(text, fontsize=7)


def _write(figure: Figure, out: Path, statistics: dict[str, Any]) -> Path:
    """PNG, SVG, and the numbers as JSON; returns the first one's path."""
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    png, svg = figures.rendered(figure, 200)
    text = json.dumps(statistics, indent=1)
    for suffix, content in ((".svg", svg), (".json", text.encode()), (".png", png)):
        write_bytes(out.with_suffix(suffix), content)
    return out.with_suffix(".png")

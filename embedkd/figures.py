"""Fig. 4, from finished runs: what each weight of either teacher scored."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from embedkd.config import OWN, Config
from shared import figures
from shared.files import write_bytes, write_text

LAMBDA = {"abs": "lambda_abs", "rel": "lambda_rel"}
Points = Mapping[str, Mapping[float, Mapping[str, float]]]


def points(runs: Sequence[Path]) -> Points:
    """The headline's cell (value, low, high; percent) of each teacher's student by its lambda.

    Raises ValueError for a run that is not finished.
    """
    found: dict[str, dict[float, Mapping[str, float]]] = {arm: {} for arm in LAMBDA}
    for run in runs:
        record = figures.read_record(run / "results.json")
        config = figures.read_record(run / "config.json")["config"]
        for arm, field in LAMBDA.items():
            if arm in record["rows"]:
                cell = record["rows"][arm]["cells"][record["headline"]]
                found[arm][config[field]] = {k: cell[k] for k in ("value", "low", "high")}
    return {arm: dict(sorted(cells.items())) for arm, cells in found.items()}


def draw(config: Config, runs: Sequence[Path]) -> Path | None:
    """`over_lambda` of a recipe's finished runs, into the folder of the last one; its path, which
    is also printed. None with fewer than two runs."""
    if len(runs) < 2:
        return None
    drawn = over_lambda(runs, runs[-1] / "figures" / config.recipe)
    print(f"figure: {drawn}")
    return drawn


@mpl.rc_context(figures.STYLE)
def over_lambda(runs: Sequence[Path], out: Path) -> Path:
    """Fig. 4: the score of the absolute and of the relative teacher's student over lambda.

    Bars: 95 % intervals of results.json, percent. lambda 0 has no place on the logarithmic axis and
    is left out. Returns OUT.png; beside it OUT.svg and OUT.json.
    """
    table = figures.Table(runs[0]).record
    shown = {arm: {v: c for v, c in cells.items() if v > 0} for arm, cells in points(runs).items()}
    figure = Figure(figsize=(3.5, 2.9), layout="constrained")
    axes = figure.subplots()
    for arm, colour in (("abs", figures.OTHERS[0]), (OWN, figures.OWN)):
        x, cells = list(shown[arm]), list(shown[arm].values())
        value, low, high = ([cell[k] for cell in cells] for k in ("value", "low", "high"))
        axes.vlines(x, low, high, color=colour, lw=1.3)
        axes.plot(x, value, "o-" if arm == OWN else "s--", ms=4, lw=1.3, color=colour, label=arm)
    ticks = sorted({v for cells in shown.values() for v in cells})
    axes.set_xscale("log")
    axes.minorticks_off()
    axes.set_xticks(ticks, [f"{v:g}" for v in ticks])
    axes.set(xlabel="weight of the teacher, λ", ylabel=f"{table['columns'][table['headline']]} (%)")
    figure.supxlabel(f"{table['evaluation']} classes; 95 % intervals over {table['unit']}",
                     fontsize=7)  # fmt: skip
    figures.legend(figure)
    statistics: dict[str, Any] = {
        "figure": "lambda", "evaluation": table["evaluation"], "column": table["headline"],
        "unit": "percent", "runs": [str(run) for run in runs],
        "points": {arm: [{"lambda": v, **c} for v, c in own.items()] for arm, own in shown.items()},
    }  # fmt: skip
    out.parent.mkdir(parents=True, exist_ok=True)
    png, svg = figures.rendered(figure, 200)
    write_bytes(out.with_name(f"{out.name}.png"), png)
    write_bytes(out.with_name(f"{out.name}.svg"), svg)
    write_text(out.with_name(f"{out.name}.json"), json.dumps(statistics, indent=1))
    return out.with_name(f"{out.name}.png")

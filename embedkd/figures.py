"""Fig. 4, from finished runs: what each weight of a teacher scored.

    python -m embedkd.figures RUN RUN ... [--out PATH]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from embedkd.config import OWN, WEIGHT, Config
from shared import cli, figures
from shared.files import write_bytes, write_text

AXES = {
    "lambda_abs": "weight of the teacher, λ", "lambda_rel": "weight of the teacher, λ",
    "rho": "weight of the hints, ρ", "kappa": "weight of the attention, κ",
}  # fmt: skip
Points = Mapping[str, Mapping[float, Mapping[str, float]]]


def points(runs: Sequence[Path]) -> Points:
    """The headline's cell (value, low, high; percent) of each student by its own weight (WEIGHT):
    of students that all runs have, each with another weight than in the others.

    Raises ValueError for a run that is not finished, and where there is no such student.
    """
    found: dict[str, dict[float, Mapping[str, float]]] = {arm: {} for arm in WEIGHT}
    for run in runs:
        record = figures.read_record(run / "results.json")
        config = figures.read_record(run / "config.json")["config"]
        for arm in WEIGHT.keys() & record["rows"].keys():
            cell = record["rows"][arm]["cells"][record["headline"]]
            found[arm][config[WEIGHT[arm]]] = {k: cell[k] for k in ("value", "low", "high")}
    varied = {
        arm: dict(sorted(cells.items())) for arm, cells in found.items()
        if len(cells) == len(runs) > 1
    }  # fmt: skip
    if not varied:
        raise ValueError(f"{len(runs)} runs: none of their students has another weight in each")
    return varied


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
    """Fig. 4: the scores of the absolute and of the relative teacher's student over lambda, or of
    others over their own weight (`points`).

    Bars: 95 % intervals of results.json, percent. A weight of 0 has no place on the logarithmic
    axis and is left out. Returns OUT.png; beside it OUT.svg and OUT.json. Raises ValueError for
    runs that `points` refuses, and for those scored on different items.
    """
    _same_items(runs)
    table = figures.read_record(runs[0] / "results.json")
    shown = {arm: {v: c for v, c in cells.items() if v > 0} for arm, cells in points(runs).items()}
    figure = Figure(figsize=(3.5, 2.9), layout="constrained")
    axes = figure.subplots()
    others = [arm for arm in shown if arm != OWN]
    colours = dict(zip(others, figures.OTHERS * 2, strict=False)) | {OWN: figures.OWN}
    for arm in shown:
        x, cells = list(shown[arm]), list(shown[arm].values())
        value, low, high = ([cell[k] for cell in cells] for k in ("value", "low", "high"))
        axes.vlines(x, low, high, color=colours[arm], lw=1.3)
        axes.plot(x, value, "o-" if arm == OWN else "s--", ms=4, lw=1.3, color=colours[arm],
                  label=arm)  # fmt: skip
    ticks = sorted({v for cells in shown.values() for v in cells})
    axes.set_xscale("log")
    axes.minorticks_off()
    axes.set_xticks(ticks, [f"{v:g}" for v in ticks])
    named = dict.fromkeys(AXES.get(WEIGHT[arm], "weight of the loss") for arm in shown)
    axes.set(xlabel=" or ".join(named), ylabel=f"{table['columns'][table['headline']]} (%)")
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


def _same_items(runs: Sequence[Path]) -> None:
    """ValueError for runs that were not scored on the same classes."""
    tables = [figures.Table(run) for run in runs]
    key = f"groups/{tables[0].record['headline']}"
    first = tables[0].array(key, "items")
    for other in tables[1:]:
        if not np.array_equal(first, other.array(key, "items")):
            raise ValueError(f"{other.run}: not scored on the same items as {runs[0]}")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m embedkd.figures",
        description="Fig. 4 of finished runs that differ in a weight, as PNG, SVG and JSON.",
        allow_abbrev=False,
    )
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folders of runs")
    parser.add_argument("--out", type=Path, help="path without suffix; default: in the first run")
    args = parser.parse_args()
    print(over_lambda(args.runs, args.out or args.runs[0] / "figures" / "fig4"))


if __name__ == "__main__":
    cli.guarded(main)

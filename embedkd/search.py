"""Choose lambda as the paper does, then train with it: `python search.py [RECIPE] [--flags]`.

Students of the absolute and of the relative teacher, or those of `--arms`, are trained for each
weight of `--grid` and scored on the development classes: the recipe's own, or where it keeps none a
fifth of the training classes (Sec. 5.1: 80 % training, 20 % validation; by class is ours). The best
weights then train the recipe itself. A student's weight is lambda, that of its loss (pkt,
darkrank), of its hints (rel+hint: rho) or of its attention (rel+at: kappa). Finished runs are kept:
an interrupted call goes on where it stopped.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from embedkd.config import (
    ABOUT,
    DEVELOPMENT,
    GRID,
    NAME,
    RECIPES,
    WEIGHT,
    Config,
    members,
)
from embedkd.figures import Points, over_lambda, points
from embedkd.train import train
from shared import cli
from shared.config import digest, locate, to_dict


def search(
    config: Config, grid: Sequence[float] | None = None, arms: Sequence[str] = ("abs", "rel")
) -> Path:
    """The run that was trained with the chosen weights; what chose them is in its parent folder.

    config: one run of a recipe. grid: weights to try, default GRID's of its relative_mode. arms:
    students whose own weight (WEIGHT) is chosen. Raises ValueError for a data set without
    development classes, and for arms of which one is trained with a weight of another one.
    """
    grid = sorted(set(GRID[config.relative_mode] if grid is None else grid))
    if len(grid) < 2 or not all(math.isfinite(weight) and weight > 0 for weight in grid):
        raise ValueError(f"--grid {' '.join(map(str, grid))}: give two weights or more, above 0")
    if odd := [arm for arm in arms if arm not in WEIGHT]:
        raise ValueError(f"--arms {odd[0]}: none of {', '.join(WEIGHT)} (a recipe comes first)")
    for arm in arms:
        used = {WEIGHT[arm], WEIGHT[arm.partition("+")[0]]}
        if both := [other for other in arms if other != arm and WEIGHT[other] in used]:
            raise ValueError(f"--arms {arm} {both[0]}: both are trained with {WEIGHT[both[0]]}; "
                             "choose it for one of them at a time")  # fmt: skip
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError("search.py is one process: start it with python, not with torchrun")
    students: Any = tuple(arm for arm in WEIGHT if arm in arms)
    key = digest(to_dict(replace(config, **_all(students, 0.0), threads=0, vary=())), students)
    folder = locate(config.runs) / NAME / f"search-{config.recipe}-{key}"
    kept = config.data.development or DEVELOPMENT.get(config.data.name, 0)
    trial = replace(
        config, data=replace(config.data, development=kept), score_on="development",
        students=students, figure="", report=False, vary=(),
    )  # fmt: skip
    tried = [_run(replace(trial, **_all(students, w)), folder / f"weight-{w:g}") for w in grid]
    found = points(tried)
    best = choose(found)
    print(table(found))
    print(f"figure: {over_lambda(tried, folder / 'fig4')}")
    told = ", ".join(f"{WEIGHT[arm]} {weight:g}" for arm, weight in best.items())
    print(f"chosen on {kept} development classes: {told}")
    for arm, weight in best.items():
        for end, name, more in ((grid[0], "smallest", "smaller"), (grid[-1], "largest", "larger")):
            if weight == end:
                print(f"{arm}: {weight:g} is the {name} weight tried; try {more} ones by --grid")
    name = "-".join(f"{arm}-{weight:g}" for arm, weight in best.items())
    chosen: dict[str, Any] = {WEIGHT[arm]: weight for arm, weight in best.items()}
    final = replace(config, score_on="test", figure="", vary=(), **chosen)
    return _run(final, folder / f"chosen-{name}")


def _all(arms: Sequence[str], weight: float) -> dict[str, Any]:
    return {WEIGHT[arm]: weight for arm in arms}


def choose(found: Points) -> dict[str, float]:
    """The weight of the highest score for each student; of equal ones the smallest."""
    return {
        arm: min(cells, key=lambda weight: (-cells[weight]["value"], weight))
        for arm, cells in found.items()
    }


def table(found: Points) -> str:
    """A line for each weight, a column for each student, percent."""
    lines = ["weight".rjust(10) + "".join(arm.rjust(26) for arm in found)]
    for weight in sorted({w for cells in found.values() for w in cells}):
        shown = (cells[weight] for cells in found.values())
        cells = (f"{c['value']:.2f} [{c['low']:.2f}, {c['high']:.2f}]" for c in shown)
        lines.append(f"{weight:10g}" + "".join(cell.rjust(26) for cell in cells))
    return "\n".join(lines)


def _run(config: Config, folder: Path) -> Path:
    """A run in `folder`: found finished, gone on with, or trained."""
    if (folder / "results.json").is_file():
        print(f"{folder}: finished", file=sys.stderr)
        return folder
    resume = str(folder) if (folder / "config.json").is_file() else ""
    return train(replace(config, folder=str(folder), resume=resume))


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python search.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        epilog="All other flags: those of train.py.",
    )
    parser.add_argument("--grid", nargs="+", metavar="WEIGHT", help="default: "
                        + "; ".join(f"{m}: {' '.join(map(str, g))}" for m, g in GRID.items()))
    parser.add_argument("--arms", nargs="+", metavar="STUDENT", default=("abs", "rel"),
                        help=f"whose weights are chosen: abs rel (default), {', '.join(WEIGHT)}")
    args, flags = parser.parse_known_args()
    config = cli.parse(NAME, RECIPES, ABOUT, members, argv=flags)
    if config.count:
        raise ValueError(f"{config.recipe} trains nothing")
    if config.resume or config.folder:
        raise ValueError("search.py keeps its own folders, and goes on by itself: give neither "
                         "--folder nor --resume")  # fmt: skip
    if len(members(config)) > 1:
        raise ValueError(f"{config.recipe} is {len(members(config))} runs: choose one by --only K")
    grid = None if args.grid is None else [_number(text) for text in args.grid]
    print(f"chosen run: {search(replace(config, vary=()), grid, args.arms)}")


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"--grid {text}: not a number (a recipe comes first)") from None


if __name__ == "__main__":
    cli.guarded(main)

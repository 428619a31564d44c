"""Choose lambda as the paper does, then train with it: `python search.py [RECIPE] [--flags]`.

Students of the absolute and of the relative teacher are trained for each weight of `--grid` and
scored on the development classes: the recipe's own, or where it keeps none a fifth of the training
classes (Sec. 5.1: 80 % training, 20 % validation; by class is ours). The best weights then train
the recipe itself. Finished runs are kept: an interrupted call goes on where it stopped.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from embedkd.config import (
    ABOUT,
    DEVELOPMENT,
    GRID,
    NAME,
    RECIPES,
    Config,
    Variant,
    members,
)
from embedkd.figures import LAMBDA, Points, over_lambda, points
from embedkd.train import train
from shared import cli
from shared.config import digest, locate, to_dict


def search(config: Config, grid: Sequence[float] = GRID) -> Path:
    """The run that was trained with the chosen weights; what chose them is in its parent folder.

    config: one run of a recipe. Raises ValueError for a data set without development classes.
    """
    grid = sorted(set(grid))
    if len(grid) < 2 or grid[0] <= 0:
        raise ValueError(f"--grid {' '.join(map(str, grid))}: give two weights or more, above 0")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError("search.py is one process: start it with python, not with torchrun")
    key = digest(to_dict(replace(config, lambda_abs=0.0, lambda_rel=0.0, threads=0, vary=())))
    folder = locate(config.runs) / NAME / f"search-{config.recipe}-{key}"
    kept = config.data.development or DEVELOPMENT.get(config.data.name, 0)
    trial = replace(
        config, data=replace(config.data, development=kept), score_on="development",
        students=("abs", "rel"), figure="", report=False,
        vary=tuple(Variant(weight=weight) for weight in grid),
    )  # fmt: skip
    tried = [_run(one, folder / f"lambda-{one.lambda_abs:g}") for one in members(trial)]
    found = points(tried)
    best = choose(found)
    print(table(found))
    print(f"figure: {over_lambda(tried, folder / 'fig4')}")
    told = ", ".join(f"{LAMBDA[arm]} {weight:g}" for arm, weight in best.items())
    print(f"chosen on {kept} development classes: {told}")
    name = "-".join(f"{arm}-{weight:g}" for arm, weight in best.items())
    chosen = {LAMBDA[arm]: weight for arm, weight in best.items()}
    final = replace(config, score_on="test", figure="", vary=(), **chosen)  # type: ignore[arg-type]
    return _run(final, folder / f"chosen-{name}")


def choose(found: Points) -> dict[str, float]:
    """The weight of the highest score for each teacher; of equal ones the smallest."""
    return {
        arm: min(cells, key=lambda weight: (-cells[weight]["value"], weight))
        for arm, cells in found.items()
    }


def table(found: Points) -> str:
    """A line for each weight, a column for each teacher, percent."""
    lines = ["lambda".rjust(10) + "".join(arm.rjust(26) for arm in found)]
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
    parser.add_argument("--grid", type=float, nargs="+", default=GRID, help="weights to try")
    args, flags = parser.parse_known_args()
    config = cli.parse(NAME, RECIPES, ABOUT, members, argv=flags)
    if config.count:
        raise ValueError(f"{config.recipe} trains nothing")
    if config.resume or config.folder:
        raise ValueError("search.py keeps its own folders, and goes on by itself: give neither "
                         "--folder nor --resume")  # fmt: skip
    if len(members(config)) > 1:
        raise ValueError(f"{config.recipe} is {len(members(config))} runs: choose one by --only K")
    print(f"chosen run: {search(replace(config, vary=()), args.grid)}")


if __name__ == "__main__":
    cli.guarded(main)

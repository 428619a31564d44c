"""The figures of the paper, drawn from finished runs (shared/figures.py)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from horkd.config import ASSISTANT, NAME, RECIPES, Config, arms, members
from shared import figures


def draw(config: Config, runs: Sequence[Path]) -> Path | None:
    """The figure `config.figure` of finished `runs`, into the folder of the last one; its path,
    which is also printed.

    curve (Fig. 3): HORKD over the students' sizes, the student without assistant as the reference.
    terms (Fig. 4): a line for each subset of Eq. 8's terms. None where a curve has fewer than two
    runs. Raises ValueError where the runs lack what the figure shows.
    """
    last = runs[-1]
    out = last / "figures" / config.recipe
    column = figures.headline(last)
    if config.figure == "curve":
        wanted = members(replace(config, vary=RECIPES[config.recipe].vary))
        drawn = figures.recipe_curve(NAME, config, wanted, runs, out, arm=NAME, column=column)
    else:
        rows = [arm for arm in arms(config) if arm not in (ASSISTANT, "alone")]
        drawn = figures.bars(last, rows, out, column=column)
    if drawn:
        print(f"figure: {drawn}")
    return drawn

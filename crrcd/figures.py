"""The figure of a recipe that has one, from its runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from crrcd.config import NAME, RECIPES, Config, arms, members
from shared import figures


def draw(config: Config, runs: Sequence[Path]) -> Path | None:
    """The figure `config.figure` of finished `runs`, into the folder of the last one; its path.

    None where a curve has fewer than two runs. Raises ValueError where the runs lack what the
    figure shows.
    """
    out = runs[-1] / "figures" / config.recipe
    if config.figure == "tsne":
        return _told(figures.tsne(runs[-1], list(arms(config)), out))
    if config.figure == "similarity":
        return _told(figures.similarity(runs[-1], list(arms(config)), out))
    wanted = members(replace(config, vary=RECIPES[config.recipe].vary))
    return _told(figures.recipe_curve(NAME, config, wanted, runs, out, arm=NAME))


def _told(figure: Path | None) -> Path | None:
    if figure:
        print(f"figure: {figure}")
    return figure

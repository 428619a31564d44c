"""The figure of a recipe that has one, from its runs."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from crrcd.config import NAME, RECIPES, Config, Variant, arms, members
from shared import cli, figures
from shared.config import locate


def draw(config: Config, runs: Sequence[Path]) -> Path | None:
    """The figure `config.figure` of finished `runs`, into the folder of the last one; its path.

    A curve takes every run of the recipe that is there and differs in nothing else, so that it
    grows with the runs of --only and --resume; which are missing is said, and None returned where
    there are fewer than two. Raises ValueError where the runs lack what the figure shows.
    """
    out = runs[-1] / "figures" / config.recipe
    if config.figure == "tsne":
        return _told(figures.tsne(runs[-1], list(arms(config)), out))
    if config.figure == "similarity":
        return _told(figures.similarity(runs[-1], list(arms(config)), out))
    vary = RECIPES[config.recipe].vary
    wanted = members(replace(config, vary=vary))
    found = {k: run for run in _finished(config, runs) for k, one in enumerate(wanted, 1)
             if _as_trained(cli.stored(Config, run)) == _as_trained(one)}  # fmt: skip
    missing = [k for k in range(1, len(wanted) + 1) if k not in found]
    if missing:
        each = "; ".join(f"train.py {config.recipe} --only {k}" for k in missing)
        print(f"{config.recipe}: {len(found)} of {len(wanted)} runs; not yet: {each}",
              file=sys.stderr)  # fmt: skip
    if len(found) < 2:
        return None
    some = [found[k] for k in sorted(found)]
    return _told(figures.curve(some, varied(vary), out, arm=NAME))


def varied(vary: Sequence[Variant]) -> str:
    """The one field in which the runs of a curve differ."""
    (field,) = {name for v in vary for name, value in vars(v).items() if value is not None}
    return field


def _finished(config: Config, runs: Sequence[Path]) -> list[Path]:
    """Finished runs of the recipe by age; `runs`, which are, come last."""
    below = locate(config.runs) / NAME
    tables = below.glob(f"{config.recipe}-*/results.json")
    earlier = [table.parent for table in sorted(tables, key=lambda table: table.stat().st_mtime)]
    return [*filter(_readable, earlier), *runs]


def _readable(run: Path) -> bool:
    try:
        cli.stored(Config, run)
    except ValueError:  # of another version
        return False
    return True


def _as_trained(config: Config) -> Config:
    """Without the fields that no student depends on."""
    return replace(
        config, device="", threads=0, checkpoint_seconds=0.0, log_every=1, folder="", runs="",
        cache="", resume="", tensorboard=False, report=False,
    )  # fmt: skip


def _told(figure: Path) -> Path:
    print(f"figure: {figure}")
    return figure

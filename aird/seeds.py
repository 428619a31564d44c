"""Paired seeds: `python -m aird.seeds --seeds 10 [--jobs 2] [RECIPE]`; see shared/seeds.py."""

from __future__ import annotations

from aird.config import ABOUT, RECIPES, members
from aird.train import NAME
from shared import cli, seeds

DIFFERENCES = (
    ("alone-long", "alone"), ("iid", "alone"), ("rid", "alone"), ("aird", "alone"),
    ("aird", "alone-long"), ("aird", "iid"), ("aird", "rid"),
    ("aird + FaceBN", "aird"), ("aird + FaceBN anchored", "aird"),
)  # fmt: skip
TABLES = ("results", "results-shifted")


if __name__ == "__main__":
    cli.guarded(lambda: seeds.main(NAME, RECIPES, ABOUT, members, DIFFERENCES, TABLES))

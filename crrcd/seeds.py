"""Paired seeds: `python -m crrcd.seeds --seeds 10 [--jobs 2] [RECIPE]`; see shared/seeds.py."""

from __future__ import annotations

from crrcd.config import ABOUT, RECIPES, members
from crrcd.train import NAME
from shared import cli, seeds

DIFFERENCES = (
    ("alone-long", "alone"), ("kd", "alone"), ("crrcd", "alone"),
    ("kd", "alone-long"), ("crrcd", "alone-long"), ("crrcd", "kd"),
)  # fmt: skip


if __name__ == "__main__":
    cli.guarded(lambda: seeds.main(NAME, RECIPES, ABOUT, members, DIFFERENCES))

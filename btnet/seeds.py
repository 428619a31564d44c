"""Paired seeds: `python -m btnet.seeds --seeds 5 [--jobs 2] [RECIPE]`; see shared/seeds.py."""

from __future__ import annotations

from btnet.config import ABOUT, NAME, RECIPES, members
from shared import cli, seeds

DIFFERENCES = (
    ("mr", "hr"), ("mm", "hr"), ("bt", "hr"), ("bt", "mr"), ("bt", "mm"),
    ("bct", "pretrain"), ("fixed", "bct"), ("bt", "fixed"),
    ("max+ceil", "mr"), ("max+near", "mr"), ("max+floor", "mr"), ("max+ceil", "max+floor"),
)  # fmt: skip
TABLES = ("results", "results-rank1", "results-native")


if __name__ == "__main__":
    cli.guarded(lambda: seeds.main(NAME, RECIPES, ABOUT, members, DIFFERENCES, TABLES))

"""Paired seeds: `python -m embedkd.seeds --seeds 10 [--jobs 2] [RECIPE]`; see shared/seeds.py."""

from __future__ import annotations

from embedkd.config import ABOUT, NAME, RECIPES, members
from shared import cli, seeds

DIFFERENCES = (
    ("alone-long", "alone"), ("pkt", "alone"), ("darkrank", "alone"), ("abs", "alone"),
    ("rel", "alone"), ("abs", "alone-long"), ("rel", "alone-long"), ("rel", "abs"),
    ("rel", "pkt"), ("rel", "darkrank"),
    ("abs+hint", "abs"), ("rel+hint", "rel"), ("abs+at", "abs"), ("rel+at", "rel"),
    ("abs+unlabelled", "abs"), ("rel+unlabelled", "rel"), ("abs-only", "alone"),
    ("rel-only", "alone"),
)  # fmt: skip


if __name__ == "__main__":
    cli.guarded(lambda: seeds.main(NAME, RECIPES, ABOUT, members, DIFFERENCES))

"""Paired seeds: `python -m horkd.seeds --seeds 10 [--jobs 2] [RECIPE]`; see shared/seeds.py."""

from __future__ import annotations

from horkd.config import ABOUT, NAME, RECIPES, members
from shared import cli, seeds

DIFFERENCES = (
    ("alone-long", "alone"), ("kd", "alone"), ("rkd", "alone"), ("direct", "alone"),
    ("horkd", "alone"), ("horkd", "alone-long"), ("horkd", "kd"), ("horkd", "rkd"),
    ("horkd", "direct"), ("L2+L3+LC", "alone"), ("L2+L3+LC", "horkd"),
)  # fmt: skip


if __name__ == "__main__":
    cli.guarded(lambda: seeds.main(NAME, RECIPES, ABOUT, members, DIFFERENCES))

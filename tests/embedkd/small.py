"""A run of EmbedKD in a second or two."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from embedkd.config import RECIPES, Config

ROWS = ["alone", "alone-long", "pkt", "darkrank", "abs", "rel"]


def tiny(tmp: Path, kept: Path, **changes: object) -> Config:
    """The smoke recipe, smaller: students of some 12 steps, in fp32 so that bits repeat."""
    smoke = RECIPES["smoke"]
    config = replace(
        smoke,
        data=replace(smoke.data, identities=8, instances=6, development=12, test=12),
        teacher=replace(
            smoke.teacher, identities=8, optim=replace(smoke.teacher.optim, epochs=1, batch=16)
        ),
        optim=replace(smoke.optim, epochs=4, batch=16),
        unlabelled=8, precision="fp32", threads=1, log_every=1, evaluate_every=2,
        runs=str(tmp / "runs"), cache=str(kept), report=False,
    )  # fmt: skip
    return replace(config, **changes)  # type: ignore[arg-type]


def table(run: Path, name: str = "results") -> dict:
    return json.loads((run / f"{name}.json").read_text())


def logged(run: Path) -> list[dict]:
    """The steps of students."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [x for x in lines if "loss" in x and x["phase"] != "teacher"]

"""Score the students of a run: `python eval.py RUN [--on shifted] [--face-bn] [--scenario lr-hr]`.

On a public test set (docs/data.md): `python eval.py RUN --on tinyface --root FOLDER`.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from aird.config import Config, arms
from aird.scoring import Mode, adaptations, lr_hr, lr_lr, noted
from aird.train import NAME, load_student
from shared import cli, rescore
from shared.evaluate.score import BATCH


def evaluate(
    run: Path,
    on: str = "test",
    root: str = "",
    best: bool = False,
    device: str = "cpu",
    face_bn: Mode | None = None,
    gamma: float | None = None,
    scenario: Literal["lr-lr", "lr-hr"] = "lr-lr",
    batch: int = BATCH,
    **data: Any,
) -> str:
    """Score every student of a run; returns the table, and keeps it in the run's folder as JSON.

    on, root, best, data: see shared.rescore. face_bn: a row of AIRD's student with FaceBN besides,
    with `gamma` (None: the run's), which depends on `batch`, the images of a forward pass.
    scenario: "lr-lr", or "lr-hr" with faces enrolled at HR, read by the student.
    """
    config = rescore.stored(Config, run, data)
    students = rescore.students_of(run, arms(config), load_student, best=best, device=device)
    if on == "native":
        if face_bn or scenario != "lr-lr":
            raise ValueError("--on native takes neither --face-bn nor --scenario")
        return rescore.native(run, config.data, config.cache, students)
    if face_bn and NAME not in students:
        raise ValueError(f"--face-bn: {run} has no finished student {NAME!r}")
    if gamma is not None and not face_bn:
        raise ValueError(f"--gamma {gamma} is FaceBN's: add --face-bn")
    if batch < 2:
        raise ValueError(f"--batch {batch}: must be 2 or more")
    gamma = config.gamma if gamma is None else gamma
    if not 0 <= gamma <= 1:
        raise ValueError(f"--gamma {gamma}: must lie between 0 and 1")
    opened = rescore.opened(run, config, students, on=on, root=root, best=best)
    adapt = adaptations(gamma, *([face_bn] if face_bn else []))
    score = lr_hr if scenario == "lr-hr" else lr_lr
    rows = score(students, opened.evaluation, adapt=adapt, batch=batch)
    told = noted(opened.evaluation, gamma, adapt, batch)
    name = opened.name + ("-lr-hr" if scenario == "lr-hr" else "")
    name += f"-face-bn-{face_bn}-{gamma:g}-{batch}" if face_bn else ""
    return replace(opened, evaluation=told, name=name).write(rows)


def main() -> None:
    parser = rescore.parser(NAME)
    parser.add_argument("--face-bn", nargs="?", const="online", choices=("online", "anchored"),
                        help="adapt AIRD's batch norm to the test faces, batch after batch; "
                        "anchored: each batch from the training statistics")  # fmt: skip
    parser.add_argument("--gamma", type=float, help="of FaceBN, the run's where not given")
    parser.add_argument("--batch", type=int, default=BATCH,
                        help="images a forward pass: FaceBN depends on it")  # fmt: skip
    parser.add_argument("--scenario", choices=("lr-lr", "lr-hr"), default="lr-lr",
                        help="lr-hr: LR probes against faces enrolled at HR")  # fmt: skip
    print(evaluate(**rescore.arguments(parser)))


if __name__ == "__main__":
    cli.guarded(main)

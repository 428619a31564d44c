"""Score the students of a run: `python eval.py RUN [--on shifted] [--best]`.

On a public test set (docs/data.md): `python eval.py RUN --on tinyface --root FOLDER`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from baselines.config import NAME, Config, arms
from baselines.train import load_student
from shared import cli, rescore, results


def evaluate(
    run: Path,
    on: str = "test",
    root: str = "",
    best: bool = False,
    device: str = "cpu",
    **data: Any,
) -> str:
    """Score every student of a run; returns the table, and keeps it in the run's folder as JSON.

    on: "test", "development", "shifted" (faces), "native" (faces of 6 to 60 px, open set), or with
    `root` "folder" (ROOT/<class>/*) and the test sets of shared.data.protocols. best: the students
    of the best development epoch. data: fields of the run's Data to replace, such as counts="any".
    """
    config = rescore.stored(Config, run, data)
    students = rescore.students_of(run, arms(config), load_student, best=best, device=device)
    if on == "native":
        return rescore.native(run, config.data, config.cache, students)
    opened = rescore.opened(run, config, students, on=on, root=root, best=best)
    return opened.write(
        {arm: results.student_row(student, opened.evaluation) for arm, student in students.items()}
    )


def main() -> None:
    print(evaluate(**rescore.arguments(rescore.parser(NAME))))


if __name__ == "__main__":
    cli.guarded(main)

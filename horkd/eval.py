"""Score the students of a run: `python eval.py RUN [--on shifted] [--best]`.

On a public test set (docs/data.md): `python eval.py RUN --on tinyface --root FOLDER`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from horkd.config import ASSISTANT, NAME, Config, arms, shown
from horkd.train import load_student
from shared import cli, rescore, results


def evaluate(
    run: Path,
    on: str = "test",
    root: str = "",
    best: bool = False,
    device: str = "cpu",
    **data: Any,
) -> str:
    """Score every network of a run; returns the table, and keeps it in the run's folder as JSON.

    on, root, best, data: see shared.rescore. The assistant is scored at HR.
    """
    config = rescore.stored(Config, run, data)
    students = rescore.students_of(run, arms(config), load_student, best=best, device=device)
    if on == "native":  # faces of 6 to 60 px: none is HR
        students.pop(ASSISTANT, None)
        return rescore.native(run, config.data, config.cache, students)
    opened = rescore.opened(run, config, students, on=on, root=root, best=best)
    if opened.evaluation.native:
        students.pop(ASSISTANT, None)
    rows = {
        shown(arm): results.student_row(student, opened.evaluation)
        for arm, student in students.items()
    }
    return opened.write(rows)


def main() -> None:
    print(evaluate(**rescore.arguments(rescore.parser(NAME))))


if __name__ == "__main__":
    cli.guarded(main)

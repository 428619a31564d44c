"""Score the students of a run: `python eval.py RUN [--on shifted] [--root FOLDER] [--best]`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from crrcd.config import Config, arms
from crrcd.train import NAME, load_student
from shared import cli, results
from shared.config import locate
from shared.data import procedural
from shared.data.sets import evaluation
from shared.evaluate.score import score_native
from shared.files import write_text
from shared.run import choose_device


def evaluate(
    run: Path, on: str = "test", root: str = "", best: bool = False, device: str = "cpu"
) -> str:
    """Score every student of a run; returns the table, and keeps it in the run's folder as JSON.

    on: "test", "development", "shifted" (faces), "native" (faces of 6 to 60 px, open set) or
    "folder" with `root` (ROOT/<class>/*). best: the students of the best development epoch.
    """
    config = cli.stored(Config, run)
    cache = locate(config.cache)
    students = {
        arm: load_student(run, arm, best=best)
        for arm in arms(config)
        if (run / "students" / f"{arm}.safetensors").is_file()
    }
    if not students:
        raise ValueError(f"{run}: no finished student in it yet; go on with --resume {run}")
    task = next(iter(students.values())).task
    if on == "native":
        return _native(config, students, run, cache)
    if on == "folder" and not root:
        raise ValueError("--on folder needs --root FOLDER (FOLDER/<class>/<image>)")
    classes = next(iter(students.values())).classes
    wanted = evaluation(
        config.data, on, root, cache=cache, task=task, classes=classes,
        teachers=config.teacher.identities,
    )  # fmt: skip
    rows = {
        arm: results.student_row(student.to(device), wanted) for arm, student in students.items()
    }
    name = f"eval-{on}{'-best' if best else ''}"
    epoch = "best" if best else "last"
    results.write(run, rows, wanted, reference="alone", name=name, epoch=epoch)
    return results.table(run, name)


def _native(config: Config, students: dict, run: Path, cache: Path) -> str:
    data = config.data
    if data.name != "faces":
        raise ValueError("--on native: only procedural faces have a split of native sizes")
    faces = procedural.Faces(size=data.hr, seed=data.seed, coarse=data.coarse, fine=data.fine)
    native = procedural.native(faces, identities=300, unmated=300, per_identity=4, cache=cache)
    found = {
        arm: score_native(student.to("cpu"), native, data.lr) for arm, student in students.items()
    }
    write_text(run / "eval-native.json", json.dumps(found, indent=1))
    columns = list(next(iter(found.values())))
    lines = [" " * 12 + "".join(c.rjust(20) for c in columns)]
    lines += [arm.ljust(12) + "".join(f"{v:20.2f}" for v in m.values()) for arm, m in found.items()]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="eval.py", description=f"Score a run of {NAME}.")
    parser.add_argument("run", type=Path, help="the run's folder")
    parser.add_argument(
        "--on",
        default="test",
        help="test, development, shifted or native (faces), or folder with --root",
    )
    parser.add_argument("--root", default="", help="for --on folder: FOLDER/<class>/<image>")
    parser.add_argument("--best", action="store_true", help="the best development epoch's students")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1")
    args = parser.parse_args()
    device = str(choose_device(args.device))
    print(evaluate(args.run, args.on, args.root, args.best, device))


if __name__ == "__main__":
    cli.guarded(main)

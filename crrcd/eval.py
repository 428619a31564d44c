"""Score the students of a run: `python eval.py RUN [--on shifted] [--best]`.

On a public test set (docs/data.md): `python eval.py RUN --on tinyface --root FOLDER`.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from crrcd.config import Config, arms
from crrcd.train import NAME, load_student
from shared import cli, results
from shared.config import locate
from shared.data import procedural
from shared.data.protocols import TEST_SETS, check_alignment
from shared.data.sets import evaluation
from shared.evaluate.score import score_native
from shared.files import write_text
from shared.run import choose_device


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
    config = cli.stored(Config, run)
    config = replace(config, data=replace(config.data, **data))
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
    if on in ("folder", *TEST_SETS) and not root:
        raise ValueError(f"--on {on} needs --root: where it lies (docs/data.md)")
    classes = next(iter(students.values())).classes
    wanted = evaluation(
        config.data, on, root, cache=cache, task=task, classes=classes,
        teachers=config.teacher.identities,
    )  # fmt: skip
    check_alignment(next(iter(students.values())).alignment, wanted, config.data)
    rows = {
        arm: results.student_row(student.to(device), wanted) for arm, student in students.items()
    }
    name = f"eval-{wanted.name if on == 'bin' else on}{'-best' if best else ''}"
    epoch = "best" if best else "last"
    results.write(run, rows, wanted, reference="alone", name=name, epoch=epoch)
    return results.table(run, name, details=True)


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
        help="test, development, shifted or native (faces); with --root: folder, "
        + ", ".join(TEST_SETS),
    )
    parser.add_argument("--root", default="", help="where a test set lies; folder: <class>/<image>")
    parser.add_argument("--best", action="store_true", help="the best development epoch's students")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1")
    parser.add_argument("--landmarks", nargs="+", type=str,
                        help="CSV files of five points a face (docs/data.md)")  # fmt: skip
    parser.add_argument("--no-landmarks", choices=("error", "centre-crop"),
                        help="a face that they lack")  # fmt: skip
    parser.add_argument("--margin", type=float, help="around face boxes, as a share of the box")
    parser.add_argument("--any-alignment", action="store_const", const=True,
                        help="accept faces cut out otherwise than those trained on")  # fmt: skip
    parser.add_argument("--counts", choices=("published", "any"), help="any: take what is there")
    args = vars(parser.parse_args())
    run, on, root, best = (args.pop(name) for name in ("run", "on", "root", "best"))
    device = str(choose_device(args.pop("device")))
    changed = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in args.items()
        if value is not None
    }
    print(evaluate(run, on, root, best, device, **changed))


if __name__ == "__main__":
    cli.guarded(main)

"""What every paper's eval.py shares: its flags, and the students and test set that they ask for."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from shared import cli, results
from shared.config import Data, locate
from shared.data import procedural
from shared.data.protocols import TEST_SETS, Evaluation, check_alignment
from shared.data.sets import evaluation
from shared.evaluate.score import score_native
from shared.files import write_text
from shared.models.recogniser import Student
from shared.run import choose_device


@dataclass(frozen=True)
class Opened:
    """What a finished run's students are to be scored on, and where the table goes."""

    run: Path
    evaluation: Evaluation
    name: str  # of the table
    epoch: str

    def write(self, rows: dict[str, results.Row]) -> str:
        """Keep a table in the run's folder as JSON; returns it as text."""
        reference = "alone" if "alone" in rows else "direct"  # HORKD's student without assistant
        results.write(
            self.run, rows, self.evaluation, reference=reference, name=self.name, epoch=self.epoch
        )
        return results.table(self.run, self.name, details=True)


def students_of(
    run: Path,
    arms: Iterable[str],
    load_student: Callable[..., Student],
    *,
    best: bool = False,
    device: str = "cpu",
) -> dict[str, Student]:
    """Those of `arms` that a run has finished. Raises ValueError where there is none."""
    found = {
        arm: load_student(run, arm, best=best).to(device)
        for arm in arms
        if (run / "students" / f"{arm}.safetensors").is_file()
    }
    if not found:
        raise ValueError(f"{run}: no finished student in it yet; go on with --resume {run}")
    return found


def opened(
    run: Path,
    config: Any,
    students: dict[str, Student],
    *,
    on: str = "test",
    root: str = "",
    best: bool = False,
) -> Opened:
    """The test set `on` for a run's students; see `parser` for the names.

    Raises ValueError for one that is not known or not there, and for faces that are cut out
    otherwise than those trained on.
    """
    if on in ("folder", *TEST_SETS) and not root:
        raise ValueError(f"--on {on} needs --root: where it lies (docs/data.md)")
    some = next(iter(students.values()))
    wanted = evaluation(
        config.data, on, root, cache=locate(config.cache), task=some.task, classes=some.classes,
        teachers=config.teacher.identities,
    )  # fmt: skip
    check_alignment(some.alignment, wanted, config.data)
    name = f"eval-{wanted.name if on == 'bin' else on}{'-best' if best else ''}"
    return Opened(run, wanted, name, "best" if best else "last")


def native(run: Path, data: Data, cache: str, students: dict[str, Student]) -> str:
    """Identification of procedural faces of 6 to 60 px, open set; kept in eval-native.json."""
    if data.name != "faces":
        raise ValueError("--on native: only procedural faces have a split of native sizes")
    faces = procedural.Faces(size=data.hr, seed=data.seed, coarse=data.coarse, fine=data.fine)
    drawn = procedural.native(
        faces, identities=300, unmated=300, per_identity=4, cache=locate(cache)
    )
    found = {
        arm: score_native(student.to("cpu"), drawn, data.lr) for arm, student in students.items()
    }
    write_text(run / "eval-native.json", json.dumps(found, indent=1))
    columns = list(next(iter(found.values())))
    lines = [" " * 12 + "".join(c.rjust(20) for c in columns)]
    lines += [arm.ljust(12) + "".join(f"{v:20.2f}" for v in m.values()) for arm, m in found.items()]
    return "\n".join(lines)


def parser(paper: str) -> argparse.ArgumentParser:
    """The flags of every eval.py; a paper adds its own."""
    made = argparse.ArgumentParser(prog="eval.py", description=f"Score a run of {paper}.")
    made.add_argument("run", type=Path, help="the run's folder")
    made.add_argument(
        "--on",
        default="test",
        help="test, development, shifted (procedural) or native (faces); with --root: folder, "
        + ", ".join(TEST_SETS),
    )
    made.add_argument("--root", default="", help="where a test set lies; folder: <class>/<image>")
    made.add_argument("--best", action="store_true", help="the best development epoch's students")
    made.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1")
    data = made.add_argument_group("the test set", "instead of the run's own (--data.NAME there)")
    data.add_argument("--landmarks", nargs="+", type=str,
                      help="CSV files of five points a face (docs/data.md)")  # fmt: skip
    data.add_argument("--no-landmarks", choices=("error", "centre-crop"),
                      help="a face that they lack")  # fmt: skip
    data.add_argument("--margin", type=float, help="around face boxes, as a share of the box")
    data.add_argument("--any-alignment", action="store_const", const=True,
                      help="accept faces cut out otherwise than those trained on")  # fmt: skip
    data.add_argument("--counts", choices=("published", "any"), help="any: take what is there")
    return made


def arguments(made: argparse.ArgumentParser) -> dict[str, Any]:
    """What `evaluate` of a paper is called with: the device settled, fields of Data where given."""
    args = vars(made.parse_args())
    args["device"] = str(choose_device(args["device"]))
    for name in ("landmarks", "no_landmarks", "margin", "any_alignment", "counts"):
        if args[name] is None:
            del args[name]
        elif isinstance(args[name], list):
            args[name] = tuple(args[name])
    return args


def stored(cls: type, run: Path, data: dict[str, Any]) -> Any:
    """The configuration of a run, with fields of its Data replaced."""
    config: Any = cli.stored(cls, run)
    return replace(config, data=replace(config.data, **data))

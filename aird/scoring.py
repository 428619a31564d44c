"""What AIRD's students are scored by: LR-LR and LR-HR, with and without FaceBN.

LR-LR: every image is degraded. LR-HR: probes are, faces are enrolled at HR, read by the student
(resized to its own input size; a student of native size sees there what it sees in LR-LR, so both
protocols agree) or by the teacher. Accuracy with the threshold of the other nine folds and at the
best threshold on the test pairs, which is the paper's, side by side.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from aird.config import Config
from aird.model import Mode, face_bn
from shared import report, results
from shared.config import Data, locate
from shared.data.pipeline import Images, normalise, student_input, upsampled_input
from shared.data.protocols import Evaluation
from shared.data.sets import DataSet, evaluation
from shared.degrade import low
from shared.evaluate.score import BATCH, embed, score
from shared.models.recogniser import Student, enrolled_reader
from shared.results import Row
from shared.run import Run
from shared.teacher import FrozenTeacher

Adapt = Callable[[nn.Module], AbstractContextManager]
OWN = "aird"
ADAPTED = f"{OWN} + FaceBN"


def adaptations(gamma: float, *modes: Mode) -> dict[str, Adapt]:
    """What is added to a row's name -> how its batch norm adapts; "" leaves it as trained."""
    made: dict[str, Adapt] = {mode: partial(face_bn, gamma=gamma, mode=mode) for mode in modes}
    return {"": nullcontext} | {
        " + FaceBN" if mode == "online" else f" + FaceBN {mode}": adapt
        for mode, adapt in made.items()
    }


def noted(
    evaluation: Evaluation, gamma: float, adapt: Mapping[str, Adapt], batch: int = BATCH
) -> Evaluation:
    """The evaluation with what FaceBN's figures depend on, for the table's record."""
    if len(adapt) == 1:
        return evaluation
    how = f"gamma {gamma:g}, batches of {batch} in the set's order"
    how += ", each before its mirror images" if evaluation.mirror else ""
    return replace(evaluation, notes={**evaluation.notes, "FaceBN": how})


def tables(
    run: Run, config: Config, data: DataSet, students: Mapping[str, Student], teacher: FrozenTeacher
) -> None:
    """Write and print the tables of a finished run: LR-LR and LR-HR of each test set, and for
    procedural faces LR-LR of the shifted ones. The report follows the first."""
    adapt = adaptations(config.gamma, "online", "anchored")

    def tell(name: str, rows: Mapping[str, Row], test: Evaluation) -> None:
        told = noted(test, config.gamma, adapt)
        results.write(run.folder, rows, told, reference="alone", name=name, own=OWN)
        print(results.table(run.folder, name))

    for name, test in data.tests():
        rows = {}
        if config.score_teacher:
            with run.autocast():
                rows = results.teacher_rows(teacher, test, config.data, best=True)
        tell(name, rows | lr_lr(students, test, adapt=adapt), test)
        run.note(seconds=run.seconds())
        if config.report and name == "results":
            report.write(run.folder)
        known = test.pairs is not None or test.gallery is not None
        if config.lr_hr and known and not test.native:
            rows = lr_hr(students, test, teacher=teacher, autocast=run.autocast, adapt=adapt)
            tell(f"{name}-lr-hr", rows, test)
    if config.data.name == "faces":
        cache = locate(config.cache)
        test = evaluation(config.data, "shifted", "", cache=cache, task="faces", classes=0)
        tell("results-shifted", lr_lr(students, test, adapt=adapt), test)


def lr_lr(
    students: Mapping[str, Student],
    test: Evaluation,
    *,
    adapt: Mapping[str, Adapt],
    batch: int = BATCH,
) -> dict[str, Row]:
    """The rows of LR images: each student, and AIRD's as `adapt` has it."""
    return {
        arm + suffix: results.student_row(student, test, best=True, batch=batch, adapt=how)
        for arm, student in students.items()
        for suffix, how in adapt.items()
        if not suffix or arm == OWN
    }


def lr_hr(
    students: Mapping[str, Student],
    test: Evaluation,
    *,
    adapt: Mapping[str, Adapt],
    teacher: FrozenTeacher | None = None,
    autocast: Callable[[], AbstractContextManager] = nullcontext,
    batch: int = BATCH,
) -> dict[str, Row]:
    """The rows of LR probes against faces enrolled at HR, by each student and by the teacher.

    teacher: read under `autocast`; its rows are left out where its embeddings have another size
    than the student's. Raises ValueError for a test set without pairs or a gallery of HR faces.
    """
    if test.native:
        raise ValueError(f"{test.name}: its faces are small by nature, none is at HR")
    if test.pairs is None and test.gallery is None:
        raise ValueError(f"{test.name}: LR-HR needs pairs, or probes and a gallery")
    rows = {}
    data = next(iter(students.values())).data
    if teacher is not None:
        hr, lr = (_teacher(teacher, data, view) for view in (normalise, upsampled_input))
        with autocast():
            known = embed(hr, test.images, mirror=test.mirror)
            found = score(lr, test, enrolled=known, best=True)
        rows["teacher"] = Row(found, *results.teacher_cost(teacher, data))
    for arm, student in students.items():
        own = enrolled_reader(student.recogniser, data)
        for suffix, how in adapt.items():
            if suffix and arm != OWN:
                continue
            row = partial(results.student_row, student, test, best=True, batch=batch, adapt=how)
            rows[arm + suffix] = row(enrolled=own)
            if teacher is not None and teacher.dim == student.recogniser.dim:
                rows[f"{arm}{suffix}, HR by teacher"] = row(enrolled=known)
    return rows


def _teacher(
    teacher: FrozenTeacher, data: Data, view: Callable[[Tensor, Data], Tensor]
) -> Callable[[Tensor], Tensor]:
    device = next(teacher.parameters()).device
    return lambda pixels: teacher.output(view(pixels.to(device), data), "faces")


@torch.inference_mode()
def feature_means(student: Student, images: Images, adapt: Adapt, *, count: int) -> np.ndarray:
    """Mean of the last feature map over channels and positions, for `count` images: [count].

    The images are spread over the set, and degraded to LR. Source: Fig. 5.
    """
    data, backbone = student.data, student.recogniser.backbone
    device = next(student.parameters()).device
    chosen = torch.linspace(0, len(images) - 1, min(count, len(images))).long()
    found = []
    with adapt(student.recogniser.eval()):
        for _, pixels in images.batches(list(chosen.split(BATCH))):
            x = low(pixels.to(device), data.lr, mode=data.kernel, antialias=data.antialias)
            *_, last = backbone(student_input(x, data))[1].values()
            found.append(last.float().flatten(1).mean(1).cpu())
    return torch.cat(found).numpy()

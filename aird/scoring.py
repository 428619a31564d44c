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

from aird.model import Mode, face_bn
from shared.config import Data
from shared.data.pipeline import Images, normalise, upsampled_input
from shared.data.protocols import Evaluation
from shared.degrade import low
from shared.evaluate.score import BATCH, score
from shared.models.recogniser import Student, enrolled_reader
from shared.results import Row, student_row, teacher_cost, teacher_rows
from shared.teacher import FrozenTeacher

Adapt = Callable[[nn.Module], AbstractContextManager]
OWN = "aird"


def adaptations(gamma: float, *modes: Mode) -> dict[str, Adapt]:
    """What is added to a row's name -> how its batch norm adapts; "" leaves it as trained."""
    made: dict[str, Adapt] = {mode: partial(face_bn, gamma=gamma, mode=mode) for mode in modes}
    return {"": nullcontext} | {
        " + FaceBN" if mode == "online" else f" + FaceBN {mode}": adapt
        for mode, adapt in made.items()
    }


def noted(evaluation: Evaluation, gamma: float, adapt: Mapping[str, Adapt]) -> Evaluation:
    """The evaluation with what FaceBN's figures depend on, for the table's record."""
    if len(adapt) == 1:
        return evaluation
    how = f"gamma {gamma:g}, batches of {BATCH} in the set's order, each before its mirror images"
    return replace(evaluation, notes={**evaluation.notes, "FaceBN": how})


def lr_lr(
    students: Mapping[str, Student],
    evaluation: Evaluation,
    *,
    teacher: FrozenTeacher | None = None,
    adapt: Mapping[str, Adapt],
) -> dict[str, Row]:
    """The table of LR images: the teacher (model_I of Table I), each student, AIRD with FaceBN."""
    rows = {}
    if teacher is not None:
        data = next(iter(students.values())).data
        rows = teacher_rows(teacher, evaluation, data, best=True)
    for arm, student in students.items():
        for suffix, how in adapt.items():
            if not suffix or arm == OWN:
                rows[arm + suffix] = student_row(student, evaluation, best=True, adapt=how)
    return rows


def lr_hr(
    students: Mapping[str, Student],
    evaluation: Evaluation,
    *,
    teacher: FrozenTeacher | None = None,
    adapt: Mapping[str, Adapt],
) -> dict[str, Row]:
    """The table of LR probes against faces enrolled at HR, by each student and by the teacher.

    The teacher's embeddings are left out where they have another size than the student's. Raises
    ValueError for an evaluation without pairs or a gallery of HR faces.
    """
    if evaluation.native:
        raise ValueError(f"{evaluation.name}: its faces are small by nature, none is at HR")
    if evaluation.pairs is None and evaluation.gallery is None:
        raise ValueError(f"{evaluation.name}: LR-HR needs pairs, or probes and a gallery")
    rows = {}
    data = next(iter(students.values())).data
    if teacher is not None:
        hr, lr = (_teacher(teacher, data, view) for view in (normalise, upsampled_input))
        found = score(lr, evaluation, enrolled=hr, best=True)
        rows["teacher"] = Row(found, *teacher_cost(teacher, data))
    for arm, student in students.items():
        for suffix, how in adapt.items():
            if suffix and arm != OWN:
                continue
            enrolled = enrolled_reader(student.recogniser, data)
            rows[arm + suffix] = student_row(
                student, evaluation, enrolled=enrolled, best=True, adapt=how
            )
            if teacher is not None and teacher.dim == student.recogniser.dim:
                rows[f"{arm}{suffix}, HR by teacher"] = student_row(
                    student, evaluation, enrolled=hr, best=True, adapt=how
                )
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
            *_, last = backbone(normalise(x, data))[1].values()
            found.append(last.float().flatten(1).mean(1).cpu())
    return torch.cat(found).numpy()

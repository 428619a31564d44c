"""Whose pictures a row of the result table is scored on, and what it costs."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from shared.config import Data, Network, Teacher
from shared.data.pipeline import Resident
from shared.data.protocols import Evaluation, face_folders
from shared.evaluate.score import score
from shared.models.recogniser import Recogniser, Student, reader
from shared.results import student_cost, student_row, teacher_rows
from shared.teacher import FrozenTeacher

DATA = Data(hr=16, lr=8)


def faces(seed: int) -> Evaluation:
    drawn = np.random.default_rng(seed).integers(0, 256, (200, 3, 16, 16), dtype=np.uint8)
    return face_folders("some", Resident(drawn, np.repeat(np.arange(40), 5)))


@pytest.fixture
def localised() -> Evaluation:
    """Pictures cut to their boxes, and whole ones."""
    return replace(faces(0), whole=faces(1).images)


def embeddings(row) -> np.ndarray:
    return row.score.extra["embeddings"]


def test_a_student_is_scored_on_whole_pictures_where_there_are_some(localised) -> None:
    torch.manual_seed(0)
    student = Student(Recogniser(Network(), 8, 5).eval(), DATA, "faces")
    found = student_row(student, localised)
    expected = score(reader(student.recogniser, DATA, "faces"), faces(1))
    assert np.array_equal(embeddings(found), expected.extra["embeddings"])
    assert found.score.metrics == expected.metrics
    plain = student_row(student, faces(1))
    assert np.array_equal(embeddings(plain), embeddings(found))
    assert not np.array_equal(embeddings(student_row(student, faces(0))), embeddings(found))


def test_a_teacher_is_scored_on_boxes_at_hr_and_on_the_students_pictures_at_lr(localised) -> None:
    torch.manual_seed(0)
    teacher = FrozenTeacher(Recogniser(Teacher(), 16, 5), 5)
    both = teacher_rows(teacher, localised, DATA)
    box, whole = (teacher_rows(teacher, faces(k), DATA) for k in (0, 1))
    assert np.array_equal(embeddings(both["teacher, HR"]), embeddings(box["teacher, HR"]))
    assert np.array_equal(embeddings(both["teacher, LR"]), embeddings(whole["teacher, LR"]))
    assert not np.array_equal(embeddings(both["teacher, LR"]), embeddings(box["teacher, LR"]))


def test_what_students_see_keeps_the_protocol(localised) -> None:
    seen = localised.as_student()
    assert seen.images is localised.whole and seen.whole is None and seen.as_student() is seen
    assert seen.pairs is localised.pairs and seen.gallery is localised.gallery
    plain = faces(0)
    assert plain.as_student() is plain


def test_an_enlarged_image_costs_what_the_network_does_at_that_size() -> None:
    large = replace(DATA, quality="enlarged")
    costs = {}
    for data in (DATA, large, replace(DATA, lr=16)):
        recogniser = Recogniser(Network(), data.lr_input, 5)
        costs[data.quality, data.lr] = student_cost(Student(recogniser, data, "faces"))
    assert costs["enlarged", 8] == costs["small", 16]
    assert costs["enlarged", 8][1] > 3 * costs["small", 8][1]

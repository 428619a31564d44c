"""A run's result table: results.json, arrays.npz, and the table as text."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from shared.config import SCHEMA, Data
from shared.data.pipeline import normalise, upsampled_input
from shared.data.protocols import Evaluation, Task
from shared.evaluate.intervals import paired
from shared.evaluate.score import BATCH, Network, Score, score
from shared.files import write_bytes, write_text
from shared.models import count_parameters, macs
from shared.models.recogniser import Student, reader
from shared.teacher import FrozenTeacher

EXAMPLES = 6  # pairs of each kind kept for the report
# Of the t-SNE: CRRCD's Fig. 4 has 400 images of each of 10 classes, AIRD's 100 people of UCCS.
POINTS_PER_CLASS, POINT_CLASSES, POINT_PEOPLE = 400, 10, 100


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    score: Score
    parameters: int
    macs: int  # of one image, multiply-accumulates


def student_row(
    student: Student,
    evaluation: Evaluation,
    *,
    enrolled: Network | tuple[torch.Tensor, torch.Tensor] | None = None,
    best: bool = False,
    batch: int = BATCH,
    adapt: Callable[[nn.Module], AbstractContextManager] = nullcontext,
) -> Row:
    """The student on LR images made from the evaluation's HR ones (Evaluation.as_student).

    enrolled, best, batch: see shared.evaluate.score.score. adapt: a context for the student's
    network that is entered anew for each set of images.
    """
    data, recogniser = student.data, student.recogniser
    evaluation = evaluation.as_student()
    task = student.task if evaluation.fit is None else "faces"  # a fit starts from features
    found = score(
        reader(recogniser, data, task), evaluation, enrolled=enrolled, best=best, batch=batch,
        adapt=lambda: adapt(recogniser),
    )  # fmt: skip
    if task == "objects":  # scored by logits; figures show features
        with adapt(recogniser):
            found.extra["points"] = _features(reader(recogniser, data, "faces"), evaluation)
    return Row(found, *student_cost(student))


def student_cost(student: Student) -> tuple[int, int]:
    """(parameters, multiply-accumulates of one image)."""
    backbone = student.recogniser.backbone
    return count_parameters(backbone), macs(backbone, student.data.lr_input)


def teacher_rows(
    teacher: FrozenTeacher, evaluation: Evaluation, data: Data, *, best: bool = False
) -> dict[str, Row]:
    """The teacher on HR images, and on the student's LR images up-sampled to its size (natively
    small ones: only that)."""
    cost = teacher_cost(teacher, data)
    device = next(teacher.parameters()).device
    rows = {}
    task = evaluation.task if evaluation.fit is None else "faces"  # a fit starts from features
    views = {
        "teacher, HR": (normalise, evaluation),
        "teacher, LR": (upsampled_input, evaluation.as_student()),
    }
    if evaluation.native:
        del views["teacher, HR"]
    for name, (view, shown) in views.items():

        def network(pixels: torch.Tensor, view: Any = view, task: Task = task) -> torch.Tensor:
            return teacher.output(view(pixels.to(device), data), task)

        found = score(network, shown, best=best)
        if task == "objects":
            found.extra["points"] = _features(partial(network, task="faces"), shown)
        rows[name] = Row(found, *cost)
    return rows


def teacher_cost(teacher: FrozenTeacher, data: Data) -> tuple[int, int]:
    """(parameters, multiply-accumulates of one image)."""
    backbone = teacher.recogniser.backbone
    return count_parameters(backbone), macs(backbone, data.hr)


def write(
    folder: Path,
    rows: Mapping[str, Row],
    evaluation: Evaluation,
    *,
    reference: str,
    name: str = "results",
    epoch: str = "last",
    own: str = "",
) -> None:
    """NAME.json (numbers with intervals, and paired differences to `reference`); for the results of
    a run (NAME begins with "results") also what lies behind them, see `arrays_of`: per-item
    outcomes, pair scores, points and example pairs."""
    some = next(iter(rows.values())).score
    columns = some.columns
    table: dict[str, Any] = {}
    arrays: dict[str, np.ndarray] = {}
    for who, row in rows.items():
        cells: dict[str, dict[str, Any]] = {}
        for column in columns:
            interval = row.score.interval(column)
            cells[column] = {"value": interval.mean, "low": interval.low, "high": interval.high}
            arrays[f"{who}/correct/{column}"] = np.packbits(row.score.correct[column])
            if reference in rows and who != reference and column != "verification_best":
                base = rows[reference].score
                gain = paired(
                    100.0 * row.score.correct[column],
                    100.0 * base.correct[column],
                    base.groups[column],
                )
                cells[column]["difference"] = {
                    "value": gain.mean, "low": gain.low, "high": gain.high
                }  # fmt: skip
        table[who] = {
            "cells": cells,
            "metrics": row.score.metrics,
            "parameters": row.parameters,
            "macs": row.macs,
        }
    shown = own if own in rows else list(rows)[-1]
    record = {
        "schema": SCHEMA,
        "evaluation": evaluation.name,
        "task": evaluation.task,
        "epoch": epoch,
        "columns": columns,
        "headline": some.headline,
        "unit": some.unit,
        "alignment": evaluation.alignment,
        "notes": dict(evaluation.notes),
        "reference": reference if reference in rows else None,
        "own": shown,  # the paper's
        "rows": table,
    }
    if name.startswith("results"):
        for column in columns:
            arrays[f"groups/{column}"] = some.groups[column].astype(np.int64)
        if "embeddings" in some.extra:
            _figures(arrays, rows, evaluation, shown)
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]
        write_bytes(arrays_of(folder, name), buffer.getvalue())
    write_text(folder / f"{name}.json", json.dumps(record, indent=1))


def arrays_of(folder: Path, name: str = "results") -> Path:
    """Where the arrays of the table NAME lie."""
    return folder / ("arrays.npz" if name == "results" else f"{name}.npz")


def table(folder: Path, name: str = "results", *, details: bool = False) -> str:
    """NAME.json of a run folder as text: 95 % intervals, paired differences to the reference.

    details: below it the other numbers of the protocol (rank-k, mAP, TAR at FAR, ...).
    """
    record = json.loads((folder / f"{name}.json").read_text())
    columns, reference = record["columns"], record["reference"]
    compared = [
        column
        for column in columns
        if any("difference" in row["cells"][column] for row in record["rows"].values())
    ]
    head = ["", "parameters", "MACs"]
    for column, heading in columns.items():
        head += [f"{heading} [95 %]"]
        head += [f"minus {reference} [95 %]"] if column in compared else []
    lines = [head]
    for name, row in record["rows"].items():
        line = [name, f"{row['parameters']:,}", f"{row['macs'] / 1e6:.1f} M"]
        for column in columns:
            cell = row["cells"][column]
            line.append(f"{cell['value']:.2f} [{cell['low']:.2f}, {cell['high']:.2f}]")
            if column in compared:
                gain = cell.get("difference")
                line.append(
                    f"{gain['value']:+.2f} [{gain['low']:+.2f}, {gain['high']:+.2f}]"
                    if gain
                    else ""
                )
        lines.append(line)
    text = aligned(lines)
    others = [k for k in next(iter(record["rows"].values()))["metrics"] if k not in columns]
    if details and others:
        lines = [["", *others]]
        for name, row in record["rows"].items():
            lines.append([name, *(f"{row['metrics'][k]:.2f}" for k in others)])
        text += ["", *aligned(lines)]
    split = f"{record['evaluation']} split, {record['epoch']} epoch"
    by = f"intervals by bootstrap over {record['unit']}"
    notes = ", ".join(f"{what}: {n}" for what, n in record.get("notes", {}).items())
    return "\n".join([*text, "", f"{split}; {by}", *filter(None, [notes]), f"written to {folder}"])


def aligned(lines: list[list[str]]) -> list[str]:
    """Cells of a table, the first line its head, in columns."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = []
    for first, *rest in lines:
        padded = [cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True)]
        text.append("  ".join([first.ljust(widths[0]), *padded]))
    return [text[0], "-" * len(text[0]), *text[1:]]


def _chosen(evaluation: Evaluation) -> np.ndarray:
    """Numbers of the images that a t-SNE shows."""
    labels = evaluation.images.labels.numpy()
    classes = np.unique(labels)[: POINT_CLASSES if evaluation.fit is None else POINT_PEOPLE]
    return np.concatenate([np.flatnonzero(labels == c)[:POINTS_PER_CLASS] for c in classes])


@torch.inference_mode()
def _features(network: Network, evaluation: Evaluation) -> np.ndarray:
    """[P, D] of those images."""
    order = list(torch.as_tensor(_chosen(evaluation)).split(BATCH))
    found = [network(pixels).float().cpu() for _, pixels in evaluation.images.batches(order)]
    return torch.cat(found).numpy()


def _figures(
    arrays: dict[str, np.ndarray], rows: Mapping[str, Row], evaluation: Evaluation, own: str
) -> None:
    """What the report draws: pair scores, points for t-SNE, example pairs."""
    chosen = _chosen(evaluation)
    arrays["points/labels"] = evaluation.images.labels.numpy()[chosen]
    for name, row in rows.items():
        points = row.score.extra.get("points")
        if points is None:
            points = row.score.extra["embeddings"][chosen]
        arrays[f"{name}/points"] = points.astype(np.float32)
        if "scores" in row.score.extra:
            arrays[f"{name}/scores"] = row.score.extra["scores"].astype(np.float32)
            arrays[f"{name}/threshold"] = row.score.extra["threshold"]
    if evaluation.pairs is None:
        return
    first, second, same = evaluation.pairs
    arrays["pairs/same"] = same.numpy()
    mine = rows[own].score  # of several columns of pairs the headline is shown
    last = mine.correct["verification" if "verification" in mine.correct else mine.headline]
    kept = np.concatenate(
        [
            np.flatnonzero((last == right) & (same.numpy() == alike))[:EXAMPLES]
            for right in (True, False)
            for alike in (True, False)
        ]
    )
    both = torch.stack([first[kept], second[kept]], dim=1)  # [E, 2]
    _, pixels = next(evaluation.images.batches([both.flatten()]))
    arrays["examples/pair"] = kept
    arrays["examples/images"] = pixels.reshape(len(kept), 2, *pixels.shape[1:]).cpu().numpy()

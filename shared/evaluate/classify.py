"""Closed-set classification from logits: top-k, per-class accuracy, confusion."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike

from shared.evaluate.intervals import Interval, as_array, bootstrap


@dataclass(frozen=True, eq=False)
class Classification:
    top: dict[int, float]  # k -> share of examples whose class is among the k largest logits
    correct: np.ndarray  # [N] bool, top-1
    per_class: np.ndarray  # [C] top-1 accuracy within a class, NaN where a class has no example
    confusion: np.ndarray  # [C, C] counts: rows are the truth, columns the prediction

    def interval(self, groups: torch.Tensor | ArrayLike | None = None) -> Interval:
        """95 % bootstrap interval of top-1, by image, or by groups [N] (a person, a video)."""
        return bootstrap(self.correct, groups)


def classification(
    logits: torch.Tensor | ArrayLike,
    labels: torch.Tensor | ArrayLike,
    *,
    topk: Sequence[int] = (1, 5),
) -> Classification:
    """Score logits [N, C] against integer labels [N] in [0, C).

    Equal logits rank by class index, lowest first: a tie is lost unless the target's index comes
    first. Top-1 is then `argmax`, and agrees with the confusion. A k larger than C is left out (it
    would be 1 for any model).

    ValueError: wrong shapes, no example, NaN logits, labels that are not integers in [0, C), k < 1.
    """
    z, y = as_array(logits), as_array(labels)
    if z.ndim != 2 or z.size == 0:
        raise ValueError(f"logits: shape {z.shape}, needs [N, C] with at least one example")
    n, classes = z.shape
    if y.shape != (n,) or y.dtype.kind not in "iu":
        raise ValueError(f"labels: {y.dtype} of shape {y.shape}, needs {n} integers")
    if y.min() < 0 or y.max() >= classes:
        raise ValueError(
            f"labels: range {y.min()} to {y.max()}, but logits have classes 0 to {classes - 1}"
        )
    if np.isnan(z).any():
        row = int(np.isnan(z).any(axis=1).argmax())
        raise ValueError(f"logits: NaN in row {row}; check the model for non-finite outputs")
    if any(k < 1 for k in topk):
        raise ValueError(f"topk={tuple(topk)}: every k must be at least 1")
    y = y.astype(np.int64)  # uint8 labels would wrap in the confusion's index below

    target = z[np.arange(n), y][:, None]
    ahead = (z > target) | ((z == target) & (np.arange(classes) < y[:, None]))
    rank = 1 + ahead.sum(axis=1)
    prediction = z.argmax(axis=1)
    confusion = np.bincount(y * classes + prediction, minlength=classes**2).reshape(classes, -1)
    examples = confusion.sum(axis=1)
    per_class = np.full(classes, np.nan)
    np.divide(confusion.diagonal(), examples, out=per_class, where=examples > 0)
    return Classification(
        top={int(k): float((rank <= k).mean()) for k in topk if k <= classes},
        correct=rank == 1,
        per_class=per_class,
        confusion=confusion,
    )

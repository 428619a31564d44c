"""Sums over pairs and triplets of a batch, and what they are divided by."""

from __future__ import annotations

from typing import Literal

Reduction = Literal["mean", "sum", "rkd"]


def pairs(op: str, n: int, reduction: str) -> float:
    """The factor on a sum over the unordered pairs {i, j} of n rows."""
    return _factor(op, reduction, distinct=n * (n - 1) // 2, entries=n**2)


def triplets(op: str, n: int, reduction: str) -> float:
    """The factor on a sum over (j; {i, k}), all distinct, of n rows."""
    return _factor(op, reduction, distinct=n * (n - 1) * (n - 2) // 2, entries=n**3)


def _factor(op: str, reduction: str, *, distinct: int, entries: int) -> float:
    """sum: 1. mean: over the distinct. rkd: over all ordered entries, where each counts twice."""
    if reduction == "sum":
        return 1.0
    if reduction == "mean":
        return 1 / max(1, distinct)
    if reduction == "rkd":
        return 2 / max(1, entries)
    raise ValueError(f"{op}: no reduction {reduction!r}; there are: mean, sum, rkd")

"""What the tests of Triton paths share."""

from __future__ import annotations

import torch
from torch import Tensor

SHAPES = [1, 2, 3, 15, 16, 17, 33]  # rows: one tile of 16, several, and a ragged tail


def error(result: Tensor, truth: Tensor) -> float:
    """Largest difference, over the largest true value (1e-6 if that is less).

    Infinite where shapes differ, or where one of them is not finite.
    """
    truth = truth.to(result.device, torch.float64)
    if result.shape != truth.shape or not bool(result.isfinite().all() & truth.isfinite().all()):
        return float("inf")
    if not truth.numel():
        return 0.0
    return float((result.double() - truth).abs().max() / truth.abs().max().clamp(min=1e-6))


def expanded(x: Tensor, n: int) -> Tensor:
    """n times the first row of x, with stride 0."""
    return x[:1].expand(n, -1)


def strided(x: Tensor) -> Tensor:
    """The values of x, with neither of its strides 1."""
    rows, columns = x.shape
    wide = x.new_full((columns, 2 * rows, 2), -7.0)
    wide[:, ::2, 0] = x.T
    return wide[:, ::2, 0].T

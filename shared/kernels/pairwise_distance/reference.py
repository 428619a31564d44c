"""The equation of `pairwise_distance`, readable; autograd gives its gradient. Holds [M, N, D]."""

from __future__ import annotations

import torch
from torch import Tensor


def pairwise_distance(x: Tensor, y: Tensor | None, squared: bool) -> Tensor:
    square = (x[:, None, :] - (x if y is None else y)[None, :, :]).square().sum(-1)
    if squared:
        return square
    same = square == 0  # the root has no derivative there: the subgradient is 0
    return torch.where(same, 0, torch.where(same, 1, square).sqrt())

"""The equation of `center_distance_loss`, readable, under autograd. Holds [B, C, D]."""

from __future__ import annotations

import torch
from torch import Tensor


def center_distance_loss(student: Tensor, teacher: Tensor, centers: Tensor) -> Tensor:
    """Sum over rows and centres."""
    d_t = torch.linalg.vector_norm(teacher[:, None] - centers, dim=-1)  # [B, C]
    d_s = torch.linalg.vector_norm(student[:, None] - centers, dim=-1)
    error = d_t - d_s
    error = error + 0 * error.detach()  # NaN where it is inf, in the gradient too
    return error.square().sum()

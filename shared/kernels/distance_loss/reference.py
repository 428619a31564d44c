"""The equation of `distance_loss`, readable; autograd gives its gradient. Holds [N, N, D]."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from shared.kernels.pairwise_distance.reference import pairwise_distance


def distance_loss(student: Tensor, teacher: Tensor, penalty: str, delta: float) -> Tensor:
    """Sum over unordered {i, j}."""
    psi_s, psi_t = relative(student), relative(teacher)
    if penalty == "squared":
        return 0.5 * (psi_s - psi_t).square().sum()
    return 0.5 * F.huber_loss(psi_s, psi_t, reduction="sum", delta=delta)


def relative(x: Tensor) -> Tensor:
    """[N, D] -> [N, N]: distances over the mean of those above 0."""
    d = pairwise_distance(x, None, squared=False)
    above = d > 0
    mean = (d * above).sum() / above.sum().clamp(min=1)
    return d / (mean + (~above.any()))

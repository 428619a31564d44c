"""`distance_loss` on the CPU: value and gradient in a few passes over N^2 numbers."""

from __future__ import annotations

import torch
from torch import Tensor

from shared.kernels.distances import half_squares, pull_back


def distance_loss(
    student: Tensor, teacher: Tensor, penalty: str, delta: float, wants: bool
) -> tuple[Tensor, Tensor]:
    """(sum over pairs, its gradient [N, D_s] where it is wanted)."""
    n, dtype = len(student), student.dtype
    (ps, x, fine_s), (pt, _, fine_t) = half_squares(student), half_squares(teacher)
    if not (fine_s and fine_t):
        nan = student.new_full(student.shape, torch.nan)
        return torch.tensor(torch.nan, dtype=dtype), nan if wants else nan.new_empty(0)
    if ps.dtype != pt.dtype:  # one of them has near pairs: both in float64
        ps, pt, x = ps.double(), pt.double(), x.double()
    d, mean, count = _relative(ps)
    error = d.sub(_relative(pt)[0])
    if penalty == "squared":
        total, g = error.square().sum(), error.mul_(2)
    else:
        g = error.clamp(-delta, delta)
        total = (g * (error - 0.5 * g)).sum()
    if not wants:
        return total.to(dtype), student.new_empty(0)
    # L depends on d_ij = mean * psi_ij directly, and through the mean of all of them
    through_mean = (g * d).sum() / count
    above = d > 0
    w = torch.where(above, (g - through_mean) / torch.where(above, d, 1), 0) / mean**2
    return total.to(dtype), pull_back(w[:n, :n], x).to(dtype)


def _relative(p: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(distances over their mean, the mean, how many are above 0) from half squared distances."""
    d = p.mul(2).sqrt_()
    count = (d > 0).sum().clamp(min=1)
    mean = d.sum() / count
    mean = torch.where(mean > 0, mean, 1)
    return d.div_(mean), mean, count

"""`angle_loss` on the CPU from N^2 numbers: compiled.py where numba is, else tiles of torch."""

from __future__ import annotations

import torch
from torch import Tensor

from shared.kernels.dispatch import NUMBA
from shared.kernels.distances import SMALL, half_squares, pull_back

TILE = 1 << 18  # angles of one tile of the torch path


def angle_loss(
    student: Tensor, teacher: Tensor, delta: float, wants: bool
) -> tuple[Tensor, Tensor]:
    """(sum over triplets, its gradient [N, D_s] where it is wanted)."""
    n, dtype = len(student), student.dtype
    if NUMBA and n * n * max(student.shape[1], teacher.shape[1]) <= SMALL:
        return _few(student, teacher, delta, wants)
    (ps, x, fine_s), (pt, _, fine_t) = half_squares(student), half_squares(teacher)
    if not (fine_s and fine_t):
        nan = student.new_full(student.shape, torch.nan)
        return torch.tensor(torch.nan, dtype=dtype), nan if wants else nan.new_empty(0)
    if ps.dtype != pt.dtype:  # one of them has near pairs: both in float64
        ps, pt, x = ps.double(), pt.double(), x.double()
    total, w = (_compiled if NUMBA else _tiled)(ps, pt, min(delta, 4.0))
    gradient = pull_back(w[:n, :n], x).to(dtype) if wants else student.new_empty(0)
    return torch.tensor(total, dtype=dtype), gradient


def _few(student: Tensor, teacher: Tensor, delta: float, wants: bool) -> tuple[Tensor, Tensor]:
    """In one call, since calls are what a small batch costs."""
    from shared.kernels.angle_loss.compiled import few

    s, t = student.contiguous().numpy(), teacher.contiguous().numpy()
    gradient = torch.zeros_like(student, memory_format=torch.contiguous_format)
    total = few(s, t, min(delta, 4.0), gradient.numpy())
    return torch.tensor(total, dtype=student.dtype), gradient if wants else gradient.new_empty(0)


def _compiled(ps: Tensor, pt: Tensor, delta: float) -> tuple[float, Tensor]:
    from shared.kernels import compiled
    from shared.kernels.angle_loss.compiled import triangles

    rs, rt, w = torch.empty_like(ps), torch.empty_like(pt), torch.zeros_like(ps)
    Ps, Pt, Rs, Rt = ps.numpy(), pt.numpy(), rs.numpy(), rt.numpy()
    compiled.arms(Ps, Pt, Rs, Rt)
    return triangles(Ps, Rs, Pt, Rt, Ps.dtype.type(delta), w.numpy()), w


def _tiled(ps: Tensor, pt: Tensor, delta: float) -> tuple[float, Tensor]:
    """A few vertices j at a time: the closed form of shared/kernels/README.md, in plain torch."""
    n = len(ps)
    ps, pt = ps + ps.T, pt + pt.T
    there = (ps > 0) & (pt > 0)
    rs = torch.where(there, (2 * ps).rsqrt(), 0)
    rt = torch.where(there, (2 * pt).rsqrt(), 0)
    opposite, arm = torch.zeros_like(ps), torch.empty_like(ps)
    distinct = 1 - torch.eye(n, dtype=ps.dtype)
    total = 0.0
    for j in torch.arange(n).split(max(1, TILE // max(1, n * n))):
        scale = rs[j, :, None] * rs[j, None, :]
        c = _angles(ps, j).mul_(scale)
        error = _angles(pt, j).mul_(rt[j, :, None]).mul_(rt[j, None, :]).sub_(c).neg_()
        error *= distinct
        g = error.clamp(-delta, delta)
        total += float((g * (error - 0.5 * g)).sum()) / 2
        c *= g
        scale *= g
        opposite += scale.sum(0)
        arm[j] = scale.sum(2) - c.sum(2) * rs[j].square()
    return total, (arm + arm.T).sub_(opposite).triu_(1)


def _angles(p: Tensor, j: Tensor) -> Tensor:
    """Inner products [J, N, N] of the arms at vertices j, from half squared distances."""
    return p[j, :, None] + p[j, None, :] - p

"""`center_distance_loss` in tiles of rows and centres, in plain torch, for the CPU and CUDA.

|g - u|^2 = |g|^2 + |u|^2 - 2 <g, u> with all rows centred by the mean of the centres, so that a
tile of distances is a matrix product; with w_ic = 2 (d_s - d_t) / d_s the gradient is another:
    dL/dg_i = sum over c of w_ic (g_i - u_c) = (sum of w_ic) g_i - (W U)_i.
Pairs closer than NEAR, of which there are few since the centres lie about their mean, are left out
of both and done from the differences of the rows as given, as shared/kernels/distances.py says why.
"""

from __future__ import annotations

import torch
from torch import Tensor

from shared.kernels.distances import NEAR

ROWS, COLUMNS = 256, 1024  # of a tile
NUMBERS = 1 << 18  # of the differences of pairs done at once


def center_distance_loss(
    student: Tensor, teacher: Tensor, centers: Tensor, wants: bool
) -> tuple[Tensor, Tensor]:
    """(sum over rows and centres, its gradient [B, D] where it is wanted)."""
    total = student.new_zeros((), dtype=torch.float64)
    gradient = student.new_zeros(student.shape)
    if len(student) and len(centers):
        mean = centers.mean(0)
        s, t = student - mean, teacher - mean
        s_square, t_square = s.square().sum(1), t.square().sum(1)
        bad = 0 * (s_square + t_square)  # NaN for a row with inf: none of its pairs is near
        s_square, t_square = s_square + bad, t_square + bad
        for c in range(0, len(centers), COLUMNS):
            given = centers[c : c + COLUMNS]
            u = given - mean
            u_square = u.square().sum(1)
            for i in range(0, len(student), ROWS):
                rows = slice(i, i + ROWS)
                d_s, near = _distances(s[rows], u, s_square[rows], u_square)
                d_t, near_t = _distances(t[rows], u, t_square[rows], u_square)
                near |= near_t
                error = d_t.sub_(d_s).neg_()
                pairs = near.nonzero()
                if len(pairs):
                    error.masked_fill_(near, 0)
                    d_s.masked_fill_(near, 1)
                    part = _near(student[rows], teacher[rows], given, pairs, gradient[rows])
                    total += part
                total += error.square().sum(dtype=torch.float64)
                if wants:
                    w = error.div_(d_s)
                    gradient[rows] += w.sum(1, keepdim=True) * s[rows]
                    gradient[rows] -= w @ u
    loss = total.to(student.dtype)
    return loss, 2 * gradient if wants else student.new_empty(0)


def _distances(x: Tensor, u: Tensor, xx: Tensor, uu: Tensor) -> tuple[Tensor, Tensor]:
    """(distances [R, C], those of them to do again)."""
    sums = xx[:, None] + uu
    square = torch.addmm(sums, x, u.T, alpha=-2)
    near = square <= sums.mul_(NEAR)
    return square.clamp_(min=0).sqrt_(), near


def _near(student: Tensor, teacher: Tensor, centers: Tensor, pairs: Tensor, out: Tensor) -> Tensor:
    """The sum over some (row, centre) pairs; adds half their gradient to out."""
    total = out.new_zeros((), dtype=torch.float64)
    for part in pairs.split(max(1, NUMBERS // max(1, student.shape[1]))):
        i, c = part.unbind(1)
        u = centers[c]
        arm = student[i] - u  # [P, D]
        d_s = torch.linalg.vector_norm(arm, dim=1)
        error = d_s - torch.linalg.vector_norm(teacher[i] - u, dim=1)
        total += error.square().sum(dtype=torch.float64)
        arm *= torch.where(d_s > 0, error / d_s, 0)[:, None]
        # A product with a 0-1 matrix, not index_add_: that has no order of summation on CUDA.
        member = torch.arange(len(student), device=i.device)[:, None] == i
        out += member.to(arm.dtype) @ arm
    return total

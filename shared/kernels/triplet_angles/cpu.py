"""`triplet_angles` on the CPU from N^2 numbers, a slice of the result at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from shared.kernels.distances import half_squares, pull_back

SLICE = 1 << 16  # angles of a slice: stays in a core's second-level cache


def forward(x: Tensor) -> Tensor:
    """[N, N, N] cosines."""
    n = len(x)
    out = x.new_empty(n, n, n)
    p, r, _, finite = _sides(x)
    if not finite:
        return out.fill_(torch.nan)
    for i in _slices(n):
        out[i] = _slice(p, r, i)
    return out


def backward(grad: Tensor, x: Tensor) -> Tensor:
    """dL/dx from dL/dcosines [N, N, N], which need not be symmetric in i and k."""
    p, r, centred, finite = _sides(x)
    if not finite:
        return x.new_full(x.shape, torch.nan)
    w = torch.zeros_like(p)  # dL/d(half a squared distance), both orders of a pair apart
    square = r.square()
    for i in _slices(len(x)):
        straight = grad[i].to(p.dtype) * r[i, :, None] * r  # [i, j, k]
        turned = grad[i] * _slice(p, r, i)
        w[i] -= straight.sum(1)  # the side i k, opposite j
        w[i] += straight.sum(2) - turned.sum(2) * square[i]  # the arm i j
        w += straight.sum(0) - turned.sum(0) * square  # the arm j k
    w.fill_diagonal_(0)
    return pull_back((w + w.T).triu_(1), centred).to(x.dtype)


def _sides(x: Tensor) -> tuple[Tensor, Tensor, Tensor, bool]:
    """(half squared distances [N, N], 1 / distance or 0, centred x, whether all is finite)."""
    n = len(x)
    p, centred, finite = half_squares(x)
    p = p[:n, :n]
    p = p + p.T
    return p, torch.where(p > 0, (2 * p).rsqrt(), 0), centred, finite


def _slices(n: int) -> list[slice]:
    step = max(1, SLICE // max(1, n * n))
    return [slice(i, i + step) for i in range(0, n, step)]


def _slice(p: Tensor, r: Tensor, i: slice) -> Tensor:
    """Cosines at j between the rows i and k, [i, j, k]."""
    return (p[i, :, None] + p).sub_(p[i, None, :]).mul_(r[i, :, None]).mul_(r)

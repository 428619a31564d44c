"""`pairwise_distance` on the CPU: a matrix product, finished in place."""

from __future__ import annotations

import torch
from torch import Tensor

from shared.kernels.dispatch import NUMBA
from shared.kernels.distances import NEAR, TINY

CHUNK = 1 << 18  # numbers that torch finishes at a time
SMALL = 0.03  # of the largest row: a gradient through a shorter distance is taken in float64


def forward(x: Tensor, y: Tensor | None, squared: bool) -> Tensor:
    """[M, N] distances."""
    a, b = _centred(x, y)
    norms_a, norms_b = (a * a).sum(1), (b * b).sum(1)
    out = a @ b.T
    y = x if y is None else y
    (_compiled if NUMBA else _torch)(out, x, norms_a, y, norms_b, squared)
    return out


def backward(
    grad: Tensor, x: Tensor, y: Tensor | None, d: Tensor, squared: bool
) -> tuple[Tensor, Tensor]:
    """With w = dL/d(d^2) * 2: dx_i = sum over j of w_ij (x_i - y_j)."""
    alone, dtype = y is None, x.dtype
    w = 2 * grad if squared else torch.where(d == 0, 0, grad / torch.where(d == 0, 1, d))
    a, b = _centred(x, y)
    short = torch.where(d > 0, d, torch.inf).min() if d.numel() else d.new_tensor(1.0)
    if not (short.sqrt() if squared else short) >= SMALL * max(_largest(a), _largest(b)):
        w = w.double()
        a, b = _centred(x.double(), None if y is None else y.double())
    if alone:
        w = w + w.T
    dx = torch.addmm(w.sum(1, keepdim=True) * a, w, b, alpha=-1)
    if alone:
        return dx.to(dtype), dx.new_empty(0, dtype=dtype)
    dy = torch.addmm(w.sum(0)[:, None] * b, w.T, a, alpha=-1)
    return dx.to(dtype), dy.to(dtype)


def _largest(x: Tensor) -> float:
    return float(torch.linalg.vector_norm(x, dim=1).max()) if x.numel() else 0.0


def _centred(x: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor]:
    """Both less one centre that is finite even where a row is not."""
    centre = (x if y is None else y).sum(0) / max(1, len(x if y is None else y))
    if not bool(centre.isfinite().all()):
        rows = x if y is None else y
        rows = rows[rows.isfinite().all(1)]
        centre = (rows / max(1, len(rows))).sum(0)
    if y is None:
        x = x - centre
        return x, x
    return x - centre, y - centre


def _compiled(
    out: Tensor, x: Tensor, norms_x: Tensor, y: Tensor, norms_y: Tensor, squared: bool
) -> None:
    from shared.kernels import compiled

    given = (out, x.contiguous(), norms_x, y.contiguous(), norms_y)
    compiled.finish(*(t.numpy() for t in given), NEAR, squared)


def _torch(
    out: Tensor, x: Tensor, norms_x: Tensor, y: Tensor, norms_y: Tensor, squared: bool
) -> None:
    rows = max(1, CHUNK // max(1, len(y)))
    for part, a, norms in zip(out.split(rows), x.split(rows), norms_x.split(rows), strict=True):
        sums = norms[:, None] + norms_y
        part.mul_(-2).add_(sums)
        at = []
        for pairs in (~(part > NEAR * sums + TINY)).nonzero().split(1 << 12):
            i, j = pairs.unbind(1)
            exact = (a[i].double() - y[j]).square().sum(-1)
            at.append((i, j, exact if squared else exact.sqrt()))
        if not squared:
            part.sqrt_()
        for i, j, exact in at:
            part[i, j] = exact.to(part.dtype)

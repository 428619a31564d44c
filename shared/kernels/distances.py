"""Squared distances between the rows of a batch, right also where two rows nearly coincide.

|x_i - x_j|^2 = |x_i|^2 + |x_j|^2 - 2 <x_i, x_j> costs one matrix product, and its error is about
EPS (|x_i|^2 + |x_j|^2) whatever the distance. So rows are centred first (an offset costs nothing
then), a batch with a pair closer than NEAR is done again in float64, and pairs closer than DIRECT
even there are taken from the differences of their rows, which are exactly 0 for duplicates.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from shared.kernels.dispatch import NUMBA

NEAR = 0.04  # of |x_i|^2 + |x_j|^2: above it float32 tells a cosine to 1e-5
DIRECT = 1e-6  # the same in float64
TINY = 1e-30  # a square below it is near the end of float32's range
SMALL = 1 << 16  # numbers in [N, N, D]: below, all differences cost less than the calls they save
LANES = 16  # N is padded to whole vectors


def half_squares(x: Tensor) -> tuple[Tensor, Tensor, bool]:
    """(P, centred x, whether all is finite) of x [N, D] on the CPU.

    P: [M, M], half the squared distances, strictly upper triangle, M = N padded to LANES. Both are
    float64 where x is, and where a float32 Gram matrix would not do.
    """
    p, centred, finite, near = _half_squares(x)
    if x.dtype != torch.float64 and (near or not finite):
        p, centred, finite, _ = _half_squares(x.double())
    return p, centred, finite


def _half_squares(x: Tensor) -> tuple[Tensor, Tensor, bool, bool]:
    n, padded = len(x), -(-len(x) // LANES) * LANES
    if NUMBA and n * n * x.shape[1] <= SMALL:
        from shared.kernels import compiled

        exact = torch.zeros(padded, padded, dtype=torch.float64)
        near, finite = compiled.small(x.contiguous().numpy(), NEAR, exact.numpy())
        return exact.to(x.dtype), x - x.mean(0), finite, near
    x = x - x.mean(0)
    p = x.new_zeros(padded, padded)
    gram = x @ x.T
    norms = gram.diagonal()
    if not math.isfinite(4 * float(norms.sum())):
        return p, x, False, False
    if NUMBA:
        from shared.kernels import compiled

        near = compiled.half_squares(gram.numpy(), NEAR, p.numpy())
        if near and x.dtype == torch.float64:
            compiled.direct(x.numpy(), gram.numpy(), DIRECT, p.numpy())
        return p, x, True, near
    sums = norms[:, None] + norms
    square = torch.sub(sums, gram, alpha=2).clamp_(min=0)
    upper = torch.ones(n, n, dtype=torch.bool).triu_(1)
    near = bool((upper & (square <= NEAR * sums + TINY)).any())
    if near and x.dtype == torch.float64:
        for pairs in (upper & (square <= DIRECT * sums)).nonzero().split(1 << 12):
            i, j = pairs.unbind(1)
            square[i, j] = (x[i] - x[j]).square().sum(-1)
    p[:n, :n] = (0.5 * square).triu_(1)
    return p, x, True, near


def pull_back(w: Tensor, x: Tensor) -> Tensor:
    """sum over j of w_ij (x_i - x_j): from 2 dL/d|x_i - x_j|^2 (upper triangle) to dL/dx [N, D]."""
    w = w + w.T
    return torch.addmm(w.sum(1, keepdim=True) * x, w, x, alpha=-1)

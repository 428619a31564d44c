"""`distance_loss` on a GPU: two [N, N] matrices of distances, and three passes over them.

Tiles first measure both spaces and add up what the means need; then value and gradient's share
through the student's mean; then w = (dL/dd_ij) / d_ij, written over the student's distances. What
tiles add up goes to a buffer that is summed in a fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from shared.kernels import gpu


def distance_loss(
    student: Tensor, teacher: Tensor, penalty: str, delta: float, wants: bool
) -> tuple[Tensor, Tensor]:
    """(sum over pairs, its gradient [N, D_s] where it is wanted)."""
    n = len(student)
    if n == 0:
        return student.new_zeros(()), student.new_empty(student.shape if wants else 0)
    dtype = torch.promote_types(student.dtype, teacher.dtype)
    block = gpu.tile(n, dtype)
    xs, xt = gpu.columns(student.to(dtype), block), gpu.columns(teacher.to(dtype), block)
    padded, count = xs.shape[1], gpu.pairs_of_tiles(n, block)
    ds, dt = xs.new_empty(padded, padded), xs.new_empty(padded, padded)
    sums, parts = xs.new_empty(count, 4), xs.new_empty(count, 2)
    squared = penalty == "squared"
    with torch.cuda.device_of(student):
        _distances[(count,)](
            xs, xt, ds, dt, sums, n, len(xs), len(xt), padded, BLOCK=block, **gpu.OPTIONS
        )
        totals = sums.sum(0, dtype=torch.float64)
        means = torch.where(totals[2:] == 0, 1, totals[:2] / totals[2:])
        limit = torch.full_like(totals[:1], delta)
        numbers = torch.cat((1 / means, limit)).to(xs.dtype)  # 1 / mean of both, delta
        _errors[(count,)](
            ds, dt, numbers, parts, padded, SQUARED=squared, BLOCK=block, **gpu.OPTIONS
        )
        total, turned = parts.sum(0, dtype=torch.float64).unbind()
        if not wants:
            return total.to(student.dtype), student.new_empty(0)
        # L depends on d_ij = mean * psi_ij directly, and through the mean of all of them
        through_mean = (turned / totals[2].clamp(min=1)).to(xs.dtype)
        _weights[(padded // block, padded // block)](
            ds, dt, numbers, through_mean, padded, SQUARED=squared, BLOCK=block, **gpu.OPTIONS
        )
    gradient = gpu.pull_back(ds, student, student)
    # A NaN reached the value, and not all of the gradient.
    return total.to(student.dtype), gradient.add_(0 * total).to(student.dtype)


def compiled_forms() -> list[gpu.Form]:
    """What is launched at typical sizes: the compile-only test walks it."""
    stride, block = {"stride": "i32:16"}, {"BLOCK": 32}
    inputs = dict.fromkeys(("xs", "xt", "ds", "dt", "sums"), "*fp32") | stride
    inputs |= {"n": "i32", "dim_s": "i32:16", "dim_t": "i32:16"}
    forms: list[gpu.Form] = [(_distances, inputs, block, gpu.OPTIONS)]
    inputs = dict.fromkeys(("ds", "dt", "numbers"), "*fp32") | stride
    settings = {"SQUARED": False, **block}
    forms.append((_errors, inputs | {"parts": "*fp32"}, settings, gpu.OPTIONS))
    forms.append((_weights, inputs | {"through_mean": "*fp32"}, settings, gpu.OPTIONS))
    return forms


@triton.jit
def _distances(xs, xt, ds, dt, sums, n, dim_s, dim_t, stride, BLOCK: tl.constexpr):
    """Distances of both spaces; of each pair once, a tile's sums and how many are above 0."""
    a, b = gpu.upper_tile(tl.program_id(0))
    i = a * BLOCK + tl.arange(0, BLOCK)[:, None]
    j = b * BLOCK + tl.arange(0, BLOCK)[None, :]
    here = (i < n) & (j < n)
    s = gpu.root(tl.where(here, gpu.squares(xs, xs, i, j, dim_s, stride, stride, BLOCK), 0.0))
    t = gpu.root(tl.where(here, gpu.squares(xt, xt, i, j, dim_t, stride, stride, BLOCK), 0.0))
    gpu.store_both(ds, i, j, stride, s)
    gpu.store_both(dt, i, j, stride, t)
    once = (j < i).to(s.dtype)  # multiplied: a NaN on the diagonal stays
    at = sums + tl.program_id(0) * 4
    tl.store(at, tl.sum(s * once))
    tl.store(at + 1, tl.sum(t * once))
    tl.store(at + 2, tl.sum((s > 0).to(s.dtype) * once))
    tl.store(at + 3, tl.sum((t > 0).to(s.dtype) * once))


@triton.jit
def _errors(ds, dt, numbers, parts, stride, SQUARED: tl.constexpr, BLOCK: tl.constexpr):
    """A tile's part of the sums of h(e) and of h'(e) d / mean."""
    a, b = gpu.upper_tile(tl.program_id(0))
    i = a * BLOCK + tl.arange(0, BLOCK)[:, None]
    j = b * BLOCK + tl.arange(0, BLOCK)[None, :]
    s, e, g = _error(ds, dt, numbers, i.to(tl.int64) * stride + j, SQUARED)
    once = (j < i).to(s.dtype)
    h = e * e if SQUARED else g * (e - 0.5 * g)
    tl.store(parts + tl.program_id(0) * 2, tl.sum(h * once))
    tl.store(parts + tl.program_id(0) * 2 + 1, tl.sum(g * s * tl.load(numbers) * once))


@triton.jit
def _weights(ds, dt, numbers, through_mean, stride, SQUARED: tl.constexpr, BLOCK: tl.constexpr):
    """(dL/dd) / d over d of the student."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[:, None]
    j = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    at = i.to(tl.int64) * stride + j
    s, e, g = _error(ds, dt, numbers, at, SQUARED)
    w = (g - tl.load(through_mean)) * tl.load(numbers) / tl.where(s > 0, s, 1.0)
    tl.store(ds + at, tl.where(s > 0, w, 0.0))


@triton.jit
def _error(ds, dt, numbers, at, SQUARED: tl.constexpr):
    """(student's distance, e, h'(e))."""
    s = tl.load(ds + at)
    e = s * tl.load(numbers) - tl.load(dt + at) * tl.load(numbers + 1)
    delta = tl.load(numbers + 2)
    g = 2.0 * e if SQUARED else tl.minimum(tl.maximum(e, -delta), delta)
    return s, e, g

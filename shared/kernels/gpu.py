"""What the Triton paths share: tiles of N x N matrices, squared distances, the way back to rows.

Every kernel here owns a tile [i, j] and walks one further index, of which it reads a column of i
and a row of j at a time. Those few numbers come from the first-level cache, so that a program is
all arithmetic: no tensor cores (TF32 would break the accuracy), no barriers, no atomics, and
one fixed order of summation. Matrices are padded with zeros to whole tiles, so that the inner loops
need no masks.

Squared distances are sums of squared differences of rows, never a Gram matrix: an offset common to
all rows costs nothing then, duplicates are at exactly 0, and nearly coinciding rows keep their
relative accuracy, with no look at the data from the host. For angles they are float64: in
c = (P + Q - R) / (2 |p| |q|) two of them all but cancel where one arm is short, and with arms of
lengths 1 and 1e-4 the rounding of a float32 P, 6e-8, would be 1e-3 in c. By count of instructions
that is about 1 ms on an H200 at N = 4096, D = 1024; where float64 runs at 1/64 of float32's speed
it is some 30 times that, still about the time of the angles themselves.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

CHUNK = tl.constexpr(64)  # terms that are summed before they join the rest: less rounding
OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}  # said, since triton's default may change
DOUBLE = OPTIONS | {"num_warps": 8}  # where a tile is float64: half the entries a thread

# (kernel, types of its arguments, constexprs, launch options): see compiled_forms
Form = tuple[Any, dict[str, str], dict[str, Any], dict[str, Any]]


def tile(n: int, dtype: torch.dtype) -> int:
    """Rows of a tile: small where there would be fewer programs than a GPU has processors.

    At 32 a thread of 128 has 8 entries: enough to hide what it loads for them, and few enough that
    three accumulators and the four numbers of a pair stay in registers, in float32.
    """
    return 16 if n <= 512 or dtype == torch.float64 else 32


def pairs_of_tiles(n: int, block: int) -> int:
    """How many tiles the upper triangle of an n x n matrix has."""
    count = triton.cdiv(n, block)
    return count * (count + 1) // 2


def columns(x: Tensor, block: int) -> Tensor:
    """x [N, D] as [D, M]: neighbouring rows side by side, M = N rounded up to whole tiles."""
    n, dim = x.shape
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    out = x.new_zeros(dim, triton.cdiv(n, block) * block, dtype=dtype)
    out[:, :n] = x.T
    return out


def pull_back(wt: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """dx_i = sum over j of w_ij (x_i - y_j), [M, D]; wt[j, i] = w_ij in whole rows, [N, M] or more.

    From differences too, so that an offset costs nothing, and TF32 has no say.
    """
    (m, dim), n = x.shape, len(y)
    out = torch.empty(m, dim, dtype=wt.dtype, device=x.device)
    options = DOUBLE if wt.dtype == torch.float64 else OPTIONS
    grid = (triton.cdiv(m, 32), triton.cdiv(dim, 32))
    with torch.cuda.device_of(x):
        _pull_back[grid](
            wt, x.contiguous(), y.contiguous(), out, m, n, dim, wt.stride(0), BLOCK=32, **options
        )
    return out


def compiled_forms() -> list[Form]:
    """What is launched at typical sizes: the compile-only test walks it."""
    counts = {"m": "i32", "n": "i32", "dim": "i32:16", "stride": "i32:16"}
    return [
        (
            _pull_back,
            dict.fromkeys(("wt", "x", "y", "out"), f"*{kind}") | counts,
            {"BLOCK": 32},
            options,
        )
        for kind, options in (("fp32", OPTIONS), ("fp64", DOUBLE))
    ]


@triton.jit
def _pull_back(wt, x, y, out, m, n, dim, stride, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[:, None]
    k = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    here = (i < m) & (k < dim)
    own = tl.load(x + i.to(tl.int64) * dim + k, mask=here, other=0.0).to(wt.dtype.element_ty)
    total = tl.zeros([BLOCK, BLOCK], wt.dtype.element_ty)
    for first in range(0, n, CHUNK):
        part = tl.zeros([BLOCK, BLOCK], wt.dtype.element_ty)
        for j in range(first, tl.minimum(first + CHUNK, n)):
            w = tl.load(wt + tl.cast(j, tl.int64) * stride + i, mask=i < m, other=0.0)
            row = tl.load(y + tl.cast(j, tl.int64) * dim + k, mask=k < dim, other=0.0)
            part += w * (own - row.to(wt.dtype.element_ty))
        total += part
    tl.store(out + i.to(tl.int64) * dim + k, total, mask=here)


@triton.jit
def upper_tile(t):
    """(a, b), b <= a, of the t-th tile of a triangle."""
    a = ((tl.sqrt(8.0 * t + 1.0) - 1.0) * 0.5).to(tl.int32)
    a = tl.where(a * (a + 1) // 2 > t, a - 1, a)  # float32 may be off by one
    a = tl.where((a + 1) * (a + 2) // 2 <= t, a + 1, a)
    return a, t - a * (a + 1) // 2


@triton.jit
def squares(xt, yt, i, j, dim, stride_x, stride_y, BLOCK: tl.constexpr):
    """|x_i - y_j|^2 of a tile; i [BLOCK, 1], j [1, BLOCK]; xt [D, M], yt [D, N]."""
    total = tl.zeros([BLOCK, BLOCK], xt.dtype.element_ty)
    for first in range(0, dim, CHUNK):
        part = tl.zeros([BLOCK, BLOCK], xt.dtype.element_ty)
        for k in range(first, tl.minimum(first + CHUNK, dim)):
            a = tl.load(xt + tl.cast(k, tl.int64) * stride_x + i)
            b = tl.load(yt + tl.cast(k, tl.int64) * stride_y + j)
            d = a - b
            part += d * d
        total += part
    return total


@triton.jit
def half_squares(xt, i, j, n, dim, stride, BLOCK: tl.constexpr):
    """|x_i - x_j|^2 / 2 of a tile in float64; 0 beyond the n rows."""
    total = tl.zeros([BLOCK, BLOCK], tl.float64)
    for k in range(dim):
        a = tl.load(xt + tl.cast(k, tl.int64) * stride + i).to(tl.float64)
        b = tl.load(xt + tl.cast(k, tl.int64) * stride + j).to(tl.float64)
        d = a - b
        total += d * d
    return tl.where((i < n) & (j < n), 0.5 * total, 0.0)


@triton.jit
def inverse_length(p, there):
    """1 / distance from half its square, 0 where there is none."""
    safe = tl.where(there, 2.0 * p, 1.0)
    r = 1.0 / tl.sqrt(safe) if p.dtype == tl.float64 else tl.div_rn(1.0, tl.sqrt_rn(safe))
    return tl.where(there, r, 0.0)


@triton.jit
def has_length(p):
    """Whether a half square is a distance: under 1e-18, float32's squares and inverses end."""
    return p > (1e-290 if p.dtype == tl.float64 else 1e-36)


@triton.jit
def root(square):
    """The square root, right to the last digit."""
    return tl.sqrt(square) if square.dtype == tl.float64 else tl.sqrt_rn(square)


@triton.jit
def store_both(out, i, j, stride, value):
    """value [i, j] of a symmetric matrix, and its mirror image.

    A tile on the diagonal holds both, which may differ in the last digit: the lower one counts.
    """
    lower = j <= i
    tl.store(out + i.to(tl.int64) * stride + j, value, mask=lower)
    tl.store(out + j.to(tl.int64) * stride + i, value, mask=lower)

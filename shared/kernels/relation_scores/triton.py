"""`relation_scores` on a GPU: no [B, K, d] in the forward pass, chunks of one in the backward pass.

The mathematics is that of cpu.py: r = relu(anchor_b - bank_k), one product r A with A = W Wᵀ. A
program owns BLOCK entries of one query, makes r from rows it reads where they lie, and goes through
the columns of r A in blocks; r is made again for each of them, from the first-level cache. Products
are float32 throughout ("ieee"): TF32 would lose three digits.
Backward, the gradient of r is made CHUNK numbers at a time; each program writes its share of the
gradients by anchor, u and v apart, and the shares are summed in a fixed order; rows of the bank are
summed by the program that owns them, after a stable sort of the index. dA = ½ Σ s rᵀr is summed in
at most PARTS parts. No atomics. An index out of range is not followed: its score is NaN.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from shared.kernels import gpu
from shared.kernels.nce_scores.triton import by_row
from shared.kernels.relation_scores import TINY, gradients

BLOCK = 32  # entries of a program
COLUMNS, INNER = 32, 16  # of a tile of r A, and what a step of its product sums over
CHUNK = 1 << 24  # numbers of the gradient of r that exist at once
PARTS = 64  # of the sum over entries in dA
BLOCK_M = 16  # rows of the bank that one program owns


def forward(
    anchor: Tensor,
    bank: Tensor,
    index: Tensor,
    u: Tensor,
    a: Tensor,
    v: Tensor,
    bq: Tensor,
    bb: Tensor,
    wants: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(scores, dot, norm [B, K], nothing)."""
    anchor, bank, index, u, a, v, bq = (x.contiguous() for x in (anchor, bank, index, u, a, v, bq))
    (b, k), (m, dim) = index.shape, bank.shape
    dot, norm = anchor.new_empty(b, k), anchor.new_empty(b, k)
    if dot.numel():
        blocks = triton.cdiv(k, BLOCK)
        with torch.cuda.device_of(anchor):
            _measure[(b * blocks,)](
                anchor, bank, index, u, a, v, bq, bb, dot, norm, m, k, dim, blocks,
                TINY=TINY, BLOCK=BLOCK, COLUMNS=COLUMNS, INNER=INNER, **gpu.OPTIONS,
            )  # fmt: skip
    return dot / norm, dot, norm, anchor.new_empty(0)


def backward(
    grad: Tensor,
    anchor: Tensor,
    bank: Tensor,
    index: Tensor,
    u: Tensor,
    a: Tensor,
    v: Tensor,
    dot: Tensor,
    norm: Tensor,
    kept: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients by anchor, bank, u, A and v."""
    anchor, bank, index, u, a, v = (x.contiguous() for x in (anchor, bank, index, u, a, v))
    p, s = (x.contiguous() for x in gradients(grad, dot, norm))
    (b, k), (m, dim) = index.shape, bank.shape
    d_anchor, d_bank, d_u = (torch.zeros_like(x) for x in (anchor, bank, u))
    if not (index.numel() and dim):
        return d_anchor, d_bank, d_u, torch.zeros_like(a), torch.zeros_like(v)
    blocks, step = triton.cdiv(k, BLOCK), max(1, CHUNK // (k * dim))
    d_v = v.new_empty(b, dim)
    with torch.cuda.device_of(anchor):
        for i in range(0, b, step):
            rows = slice(i, min(i + step, b))
            count = rows.stop - i
            dr, shares = anchor.new_empty(count, k, dim), anchor.new_empty(3, count, blocks, dim)
            _spread[(count * blocks,)](
                p[rows], s[rows], anchor[rows], bank, index[rows], u[rows], a, v,
                dr, shares, m, k, dim, blocks, count,
                BLOCK=BLOCK, COLUMNS=COLUMNS, INNER=INNER, **gpu.OPTIONS,
            )  # fmt: skip
            d_anchor[rows], d_u[rows], d_v[rows] = shares.sum(2)
            order, starts = by_row(index[rows], m)
            grid = (triton.cdiv(m, BLOCK_M), triton.cdiv(dim, 64))
            _subtract[grid](
                dr, order, starts, d_bank, m, dim, BLOCK_M=BLOCK_M, BLOCK_D=64, **gpu.OPTIONS
            )
        parts = min(PARTS, triton.cdiv(b * k, INNER))
        length = triton.cdiv(triton.cdiv(b * k, INNER), parts) * INNER
        tiles = triton.cdiv(dim, COLUMNS)
        d_a = a.new_empty(parts, dim, dim)
        owner = torch.arange(b, device=index.device).repeat_interleave(k)
        _products[(parts, tiles, tiles)](
            s, anchor, bank, index, owner, d_a, m, dim, b * k, length,
            COLUMNS=COLUMNS, INNER=INNER, **gpu.OPTIONS,
        )  # fmt: skip
    return d_anchor, d_bank, d_u, 0.5 * d_a.sum(0), d_v.sum(0)


def compiled_forms() -> list[gpu.Form]:
    """What is launched at typical sizes: the compile-only test walks it."""
    forms: list[gpu.Form] = []
    for kind in ("*fp32", "*fp64"):
        numbers = {"m": "i32", "k": "i32", "dim": "i32:16"}
        rows = {"anchor": kind, "bank": kind, "index": "*i64"} | numbers
        tiles = {"COLUMNS": COLUMNS, "INNER": INNER}
        signature = dict.fromkeys(("u", "a", "v", "bq", "bb", "dot", "norm"), kind)
        signature |= {"blocks": "i32"} | rows
        settings = {"TINY": TINY, "BLOCK": BLOCK} | tiles
        forms.append((_measure, signature, settings, gpu.OPTIONS))
        signature = dict.fromkeys(("p", "s", "u", "a", "v", "dr", "shares"), kind)
        signature |= {"blocks": "i32", "count": "i32"} | rows
        forms.append((_spread, signature, {"BLOCK": BLOCK} | tiles, gpu.OPTIONS))
        signature = {"dr": kind, "order": "*i64", "starts": "*i64", "out": kind}
        signature |= {"m": "i32", "dim": "i32:16"}
        settings = {"BLOCK_M": BLOCK_M, "BLOCK_D": 64}
        forms.append((_subtract, signature, settings, gpu.OPTIONS))
        signature = {"s": kind, "out": kind, "owner": "*i64", "entries": "i32"} | rows
        signature["length"] = signature.pop("k") + ":16"
        forms.append((_products, signature, tiles, gpu.OPTIONS))
    return forms


@triton.jit
def _measure(
    anchor, bank, index, u, a, v, bq, bb, dot, norm, m, k, dim, blocks,
    TINY: tl.constexpr, BLOCK: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """dot = <r, u> + bq; norm = the root of <r, rA> + 2 <r, v> + bb."""
    b = (tl.program_id(0) // blocks).to(tl.int64)
    i = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(index + b * k + i, mask=i < k, other=-1)
    there = (row >= 0) & (row < m)
    first = tl.zeros([BLOCK], anchor.dtype.element_ty)
    second = tl.zeros([BLOCK], anchor.dtype.element_ty)
    for c in range(0, dim, COLUMNS):
        d = c + tl.arange(0, COLUMNS)
        r = _relations(anchor + b * dim, bank, row, there, d, dim)
        ra = _product(anchor + b * dim, bank, row, there, a, d, dim, BLOCK, COLUMNS, INNER)
        own = tl.load(u + b * dim + d, mask=d < dim, other=0.0)
        shift = tl.load(v + d, mask=d < dim, other=0.0)
        first += tl.sum(r * own[None, :], 1)
        second += tl.sum(r * (ra + 2.0 * shift[None, :]), 1)
    first = tl.where(there, first + tl.load(bq + b), float("nan"))
    second += tl.load(bb)
    tl.store(dot + b * k + i, first, mask=i < k)
    tl.store(norm + b * k + i, gpu.root(tl.where(second < TINY, TINY, second)), mask=i < k)


@triton.jit
def _spread(
    p, s, anchor, bank, index, u, a, v, dr, shares, m, k, dim, blocks, count,
    BLOCK: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """dr = p u + s (rA + v) where r > 0; shares: the sums of dr, p r and s r over BLOCK entries."""
    pid = tl.program_id(0).to(tl.int64)
    b = pid // blocks
    i = (pid % blocks) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(index + b * k + i, mask=i < k, other=-1)
    there = (row >= 0) & (row < m)
    by_dot = tl.load(p + b * k + i, mask=there, other=0.0)[:, None]
    by_square = tl.load(s + b * k + i, mask=there, other=0.0)[:, None]
    apart = count.to(tl.int64) * blocks * dim
    for c in range(0, dim, COLUMNS):
        d = c + tl.arange(0, COLUMNS)
        r = _relations(anchor + b * dim, bank, row, there, d, dim)
        ra = _product(anchor + b * dim, bank, row, there, a, d, dim, BLOCK, COLUMNS, INNER)
        own = tl.load(u + b * dim + d, mask=d < dim, other=0.0)[None, :]
        shift = tl.load(v + d, mask=d < dim, other=0.0)[None, :]
        # A NaN of r goes on: it is not <= 0.
        g = tl.where(r <= 0.0, 0.0, by_dot * own + by_square * (ra + shift))
        tl.store(
            dr + (b * k + i)[:, None] * dim + d[None, :],
            g,
            mask=(i < k)[:, None] & (d < dim)[None, :],
        )
        at = shares + pid * dim + d
        tl.store(at, tl.sum(g, 0), mask=d < dim)
        tl.store(at + apart, tl.sum(by_dot * r, 0), mask=d < dim)
        tl.store(at + 2 * apart, tl.sum(by_square * r, 0), mask=d < dim)


@triton.jit
def _subtract(dr, order, starts, out, m, dim, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr):
    """out_i -= sum of dr over the entries that name row i of the bank."""
    i = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    start = tl.load(starts + i, mask=i < m, other=0)
    number = tl.load(starts + i + 1, mask=i < m, other=0) - start
    total = tl.zeros([BLOCK_M, BLOCK_D], dr.dtype.element_ty)
    for step in range(tl.max(number, 0)):
        there = step < number
        entry = tl.load(order + start + step, mask=there, other=0)
        here = there[:, None] & (d < dim)[None, :]
        total += tl.load(dr + entry[:, None] * dim + d[None, :], mask=here, other=0.0)
    at = out + i[:, None] * dim + d[None, :]
    here = ((i < m) & (number > 0))[:, None] & (d < dim)[None, :]
    tl.store(at, tl.load(at, mask=here, other=0.0) - total, mask=here)


@triton.jit
def _products(
    s, anchor, bank, index, owner, out, m, dim, entries, length,
    COLUMNS: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """out[part] = sum over `length` entries of s rᵀr, a tile of it."""
    begin = tl.program_id(0).to(tl.int64) * length
    x = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    y = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros([COLUMNS, COLUMNS], anchor.dtype.element_ty)
    for first in range(begin, tl.minimum(begin + length, entries), INNER):
        e = first + tl.arange(0, INNER)
        row = tl.load(index + e, mask=e < entries, other=-1)
        there = (row >= 0) & (row < m)
        weight = tl.load(s + e, mask=there, other=0.0)
        own = anchor + tl.load(owner + e, mask=there, other=0)[:, None] * dim
        left = _relations(own, bank, row, there, x, dim)
        right = _relations(own, bank, row, there, y, dim) * weight[:, None]
        total = tl.dot(tl.trans(left), right, total, input_precision="ieee")
    at = out + (tl.program_id(0).to(tl.int64) * dim + x)[:, None] * dim + y[None, :]
    tl.store(at, total, mask=(x < dim)[:, None] & (y < dim)[None, :])


@triton.jit
def _product(
    anchor, bank, row, there, a, d, dim,
    BLOCK: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """Columns d of r A."""
    total = tl.zeros([BLOCK, COLUMNS], bank.dtype.element_ty)
    for c in range(0, dim, INNER):
        e = c + tl.arange(0, INNER)
        r = _relations(anchor, bank, row, there, e, dim)
        here = (e < dim)[:, None] & (d < dim)[None, :]
        part = tl.load(a + e[:, None].to(tl.int64) * dim + d[None, :], mask=here, other=0.0)
        total = tl.dot(r, part, total, input_precision="ieee")
    return total


@triton.jit
def _relations(anchor, bank, row, there, d, dim):
    """Columns d of r; 0 where there is no entry. anchor: one row for all of them, or one each."""
    here = there[:, None] & (d < dim)[None, :]
    own = tl.load(anchor + d[None, :], mask=here, other=0.0)
    difference = own - tl.load(bank + row[:, None] * dim + d[None, :], mask=here, other=0.0)
    return tl.where(difference < 0.0, 0.0, difference)

"""`relation_scores` on a GPU: no [B, K, d] in the forward pass, chunks of it in the backward pass.

With r = relu(anchor_b - bank_k), key = r W + bias, norm = max(|key|, 1e-12) and <key, q> / norm the
score, g its gradient, p = g / norm and s = -g score / norm² (0 where the norm is held at 1e-12):
    dkey = p q + s key;  dq = Σ p key;  dbias = Σ dkey;  dW = Σ rᵀ dkey;  dr = dkey Wᵀ where r > 0
The norm is of the key itself: by the quadratic form of r it would cancel where bias and r W do.

A program owns BLOCK entries of one query, makes r from rows it reads where they lie, and goes
through the columns of a product in blocks; r is made again for each of them, from the first-level
cache. Products are float32 throughout ("ieee"): TF32 would lose three digits.
Backward, dkey and dr are made CHUNK numbers at a time, and the key again with them; each program
writes its shares of the sums over a query's entries apart, and the shares are summed in a fixed
order; rows of the bank are summed by the program that owns them, after a stable sort of the index.
dW is summed in at most PARTS parts of a chunk. No atomics. An index out of range is not followed:
its score is NaN. Without a weight the key is r: dkey is masked where it is made, and is dr.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from shared.kernels import gpu
from shared.kernels.nce_scores.triton import by_row

BLOCK = 32  # entries of a program
COLUMNS, INNER = 32, 16  # of a tile of a product, and what a step of it sums over
CHUNK = 1 << 24  # numbers of dkey, and of dr, that exist at once
PARTS = 64  # of the sum over a chunk's entries in dW
BLOCK_M = 16  # rows of the bank that one program owns
SMALLEST = 1e-12  # norm, as F.normalize has it


def forward(
    query: Tensor,
    anchor: Tensor,
    bank: Tensor,
    index: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    wants: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(scores, norm [B, K], nothing)."""
    query, anchor, bank, index = (x.contiguous() for x in (query, anchor, bank, index))
    weight, bias = (None if x is None else x.contiguous() for x in (weight, bias))
    (b, k), m, dim, width = index.shape, len(bank), anchor.shape[1], query.shape[1]
    scores, norm = anchor.new_empty(b, k), anchor.new_empty(b, k)
    if scores.numel():
        blocks = triton.cdiv(k, BLOCK)
        with torch.cuda.device_of(anchor):
            _scores[(b * blocks,)](
                query, anchor, bank, index, weight, bias, scores, norm, m, k, dim, width, blocks,
                SMALLEST=SMALLEST, BLOCK=BLOCK, COLUMNS=COLUMNS, INNER=INNER, **gpu.OPTIONS,
            )  # fmt: skip
    return scores, norm, anchor.new_empty(0, k, width)


def backward(
    grad: Tensor,
    query: Tensor,
    anchor: Tensor,
    bank: Tensor,
    index: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    scores: Tensor,
    norm: Tensor,
    kept: Tensor,
) -> tuple[Tensor, ...]:
    """Gradients by query, anchor, bank, weight and bias."""
    query, anchor, bank, index = (x.contiguous() for x in (query, anchor, bank, index))
    weight, bias = (None if x is None else x.contiguous() for x in (weight, bias))
    p = (grad / norm).contiguous()
    s = torch.where(norm <= SMALLEST, 0, -grad * scores / norm.square()).contiguous()
    (b, k), m, dim, width = index.shape, len(bank), anchor.shape[1], query.shape[1]
    d_query, d_anchor, d_bank, d_weight, d_bias = found = tuple(
        grad.new_zeros(0 if x is None else x.shape) for x in (query, anchor, bank, weight, bias)
    )
    if not (index.numel() and width):
        return found
    blocks, step = triton.cdiv(k, BLOCK), max(1, CHUNK // (k * max(dim, width)))
    tiles = {"COLUMNS": COLUMNS, "INNER": INNER, **gpu.OPTIONS}
    for i in range(0, b, step):
        rows = slice(i, min(i + step, b))
        count = rows.stop - i
        own, named = anchor[rows], index[rows]
        d_key = anchor.new_empty(count, k, width)
        shares = anchor.new_empty(2, count, blocks, width)
        with torch.cuda.device_of(anchor):
            _keys[(count * blocks,)](
                p[rows], s[rows], query[rows], own, bank, named, weight, bias,
                d_key, shares, m, k, dim, width, blocks, count, BLOCK=BLOCK, **tiles,
            )  # fmt: skip
            d_query[rows] = shares[0].sum(1)
            d_r, share = d_key, shares[1]
            if weight is not None:
                d_bias += share.sum((0, 1))
                if not dim:
                    continue
                d_r, share = anchor.new_empty(count, k, dim), anchor.new_empty(count, blocks, dim)
                _spread[(count * blocks,)](
                    d_key, own, bank, named, weight.T.contiguous(), d_r, share,
                    m, k, dim, width, blocks, BLOCK=BLOCK, **tiles,
                )  # fmt: skip
            d_anchor[rows] = share.sum(1)
            order, starts = by_row(named, m)
            grid = (triton.cdiv(m, BLOCK_M), triton.cdiv(dim, 64))
            _subtract[grid](
                d_r, order, starts, d_bank, m, dim, BLOCK_M=BLOCK_M, BLOCK_D=64, **gpu.OPTIONS
            )
            if weight is None:
                continue
            parts = min(PARTS, triton.cdiv(count * k, INNER))
            length = triton.cdiv(triton.cdiv(count * k, INNER), parts) * INNER
            part = weight.new_empty(parts, dim, width)
            _products[(parts, triton.cdiv(dim, COLUMNS), triton.cdiv(width, COLUMNS))](
                d_key, own, bank, named, part, m, k, dim, width, count * k, length, **tiles
            )
            d_weight += part.sum(0)
    return found


def compiled_forms() -> list[gpu.Form]:
    """What is launched at typical sizes: the compile-only test walks it."""
    forms: list[gpu.Form] = []
    tiles = {"COLUMNS": COLUMNS, "INNER": INNER}
    for kind in ("*fp32", "*fp64"):
        rows = {"anchor": kind, "bank": kind, "index": "*i64", "m": "i32", "k": "i32"}
        rows |= {"dim": "i32:16", "width": "i32:16"}
        blocks = {"BLOCK": BLOCK} | tiles
        for maps in (dict.fromkeys(("weight", "bias"), kind), {}):
            none = {} if maps else {"weight": None, "bias": None}
            signature = dict.fromkeys(("query", "scores", "norm"), kind) | maps | rows
            settings = {"SMALLEST": SMALLEST} | blocks | none
            forms.append((_scores, signature | {"blocks": "i32"}, settings, gpu.OPTIONS))
            signature = dict.fromkeys(("p", "s", "query", "d_key", "shares"), kind) | maps | rows
            signature |= {"blocks": "i32", "count": "i32"}
            forms.append((_keys, signature, blocks | none, gpu.OPTIONS))
        signature = dict.fromkeys(("d_key", "turned", "d_r", "share"), kind) | rows
        forms.append((_spread, signature | {"blocks": "i32"}, blocks, gpu.OPTIONS))
        signature = {"d_r": kind, "order": "*i64", "starts": "*i64", "out": kind}
        signature |= {"m": "i32", "dim": "i32:16"}
        settings = {"BLOCK_M": BLOCK_M, "BLOCK_D": 64}
        forms.append((_subtract, signature, settings, gpu.OPTIONS))
        signature = {"d_key": kind, "out": kind, "entries": "i32", "length": "i32:16"} | rows
        forms.append((_products, signature, tiles, gpu.OPTIONS))
    return forms


@triton.jit
def _scores(
    query, anchor, bank, index, weight, bias, scores, norm, m, k, dim, width, blocks,
    SMALLEST: tl.constexpr, BLOCK: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """<key, query> / norm, and the norm."""
    b = (tl.program_id(0) // blocks).to(tl.int64)
    i = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(index + b * k + i, mask=i < k, other=-1)
    there = (row >= 0) & (row < m)
    dot = tl.zeros([BLOCK], anchor.dtype.element_ty)
    square = tl.zeros([BLOCK], anchor.dtype.element_ty)
    for c in range(0, width, COLUMNS):
        e = c + tl.arange(0, COLUMNS)
        own = anchor + b * dim
        key = _key(own, bank, row, there, weight, bias, e, dim, width, BLOCK, COLUMNS, INNER)
        q = tl.load(query + b * width + e, mask=e < width, other=0.0)
        dot += tl.sum(key * q[None, :], 1)
        square += tl.sum(key * key, 1)
    length = gpu.root(square)
    length = tl.where(length < SMALLEST, SMALLEST, length)  # a NaN is not below
    score = tl.where(there, dot / length, float("nan"))
    tl.store(scores + b * k + i, score, mask=i < k)
    tl.store(norm + b * k + i, length, mask=i < k)


@triton.jit
def _keys(
    p, s, query, anchor, bank, index, weight, bias,
    d_key, shares, m, k, dim, width, blocks, count,
    BLOCK: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """dkey = p query + s key, dr without a weight; shares: sums of p key and of it over BLOCK."""
    pid = tl.program_id(0).to(tl.int64)
    b = pid // blocks
    i = (pid % blocks) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(index + b * k + i, mask=i < k, other=-1)
    there = (row >= 0) & (row < m)
    by_dot = tl.load(p + b * k + i, mask=there, other=0.0)[:, None]
    by_length = tl.load(s + b * k + i, mask=there, other=0.0)[:, None]
    apart = tl.cast(count, tl.int64) * blocks * width
    for c in range(0, width, COLUMNS):
        e = c + tl.arange(0, COLUMNS)
        own = anchor + b * dim
        key = _key(own, bank, row, there, weight, bias, e, dim, width, BLOCK, COLUMNS, INNER)
        q = tl.load(query + b * width + e, mask=e < width, other=0.0)
        g = by_dot * q[None, :] + by_length * key
        if weight is None:
            g = tl.where(key <= 0.0, 0.0, g)  # a NaN goes on: it is not <= 0
        tl.store(
            d_key + (b * k + i)[:, None] * width + e[None, :],
            g,
            mask=(i < k)[:, None] & (e < width)[None, :],
        )
        at = shares + pid * width + e
        tl.store(at, tl.sum(by_dot * key, 0), mask=e < width)
        tl.store(at + apart, tl.sum(g, 0), mask=e < width)


@triton.jit
def _spread(
    d_key, anchor, bank, index, turned, d_r, share, m, k, dim, width, blocks,
    BLOCK: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """dr = dkey Wᵀ where r > 0; share: its sum over BLOCK entries. turned: Wᵀ."""
    pid = tl.program_id(0).to(tl.int64)
    b = pid // blocks
    i = (pid % blocks) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(index + b * k + i, mask=i < k, other=-1)
    there = (row >= 0) & (row < m)
    entry = (b * k + i)[:, None]
    for c in range(0, dim, COLUMNS):
        d = c + tl.arange(0, COLUMNS)
        total = tl.zeros([BLOCK, COLUMNS], anchor.dtype.element_ty)
        for first in range(0, width, INNER):
            e = first + tl.arange(0, INNER)
            here = (i < k)[:, None] & (e < width)[None, :]
            g = tl.load(d_key + entry * width + e[None, :], mask=here, other=0.0)
            total = tl.dot(g, _tile(turned, e, d, width, dim), total, input_precision="ieee")
        r = _relations(anchor + b * dim, bank, row, there, d, dim)
        total = tl.where(r <= 0.0, 0.0, total)  # a NaN of r goes on: it is not <= 0
        here = (i < k)[:, None] & (d < dim)[None, :]
        tl.store(d_r + entry * dim + d[None, :], total, mask=here)
        tl.store(share + pid * dim + d, tl.sum(total, 0), mask=d < dim)


@triton.jit
def _subtract(d_r, order, starts, out, m, dim, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr):
    """out_i -= sum of dr over the entries that name row i of the bank."""
    i = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    start = tl.load(starts + i, mask=i < m, other=0)
    number = tl.load(starts + i + 1, mask=i < m, other=0) - start
    total = tl.zeros([BLOCK_M, BLOCK_D], d_r.dtype.element_ty)
    for step in range(tl.max(number, 0)):
        there = step < number
        entry = tl.load(order + start + step, mask=there, other=0)
        here = there[:, None] & (d < dim)[None, :]
        total += tl.load(d_r + entry[:, None] * dim + d[None, :], mask=here, other=0.0)
    at = out + i[:, None] * dim + d[None, :]
    here = ((i < m) & (number > 0))[:, None] & (d < dim)[None, :]
    tl.store(at, tl.load(at, mask=here, other=0.0) - total, mask=here)


@triton.jit
def _products(
    d_key, anchor, bank, index, out, m, k, dim, width, entries, length,
    COLUMNS: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """out[part] = sum over `length` entries of rᵀ dkey, a tile of it."""
    begin = tl.program_id(0).to(tl.int64) * length
    d = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    e = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros([COLUMNS, COLUMNS], anchor.dtype.element_ty)
    for first in range(begin, tl.minimum(begin + length, entries), INNER):
        entry = first + tl.arange(0, INNER)
        row = tl.load(index + entry, mask=entry < entries, other=-1)
        there = (row >= 0) & (row < m)
        own = anchor + (entry // k)[:, None] * dim
        r = _relations(own, bank, row, there, d, dim)
        g = _tile(d_key, entry, e, entries, width)
        total = tl.dot(tl.trans(r), g, total, input_precision="ieee")
    at = out + (tl.program_id(0).to(tl.int64) * dim + d)[:, None] * width + e[None, :]
    tl.store(at, total, mask=(d < dim)[:, None] & (e < width)[None, :])


@triton.jit
def _key(
    anchor, bank, row, there, weight, bias, e, dim, width,
    BLOCK: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """Columns e of r W + bias, or of r; 0 beyond the last of them."""
    if weight is None:
        key = _relations(anchor, bank, row, there, e, dim)
    else:
        key = tl.zeros([BLOCK, COLUMNS], bank.dtype.element_ty)
        for first in range(0, dim, INNER):
            d = first + tl.arange(0, INNER)
            r = _relations(anchor, bank, row, there, d, dim)
            key = tl.dot(r, _tile(weight, d, e, dim, width), key, input_precision="ieee")
        key += tl.load(bias + e, mask=e < width, other=0.0)[None, :]
    return key


@triton.jit
def _tile(x, i, j, rows, columns):
    """x[i, j], 0 outside."""
    here = (i < rows)[:, None] & (j < columns)[None, :]
    return tl.load(x + i[:, None].to(tl.int64) * columns + j[None, :], mask=here, other=0.0)


@triton.jit
def _relations(anchor, bank, row, there, d, dim):
    """Columns d of r; 0 where there is no entry. anchor: one row for all of them, or one each."""
    here = there[:, None] & (d < dim)[None, :]
    own = tl.load(anchor + d[None, :], mask=here, other=0.0)
    difference = own - tl.load(bank + row[:, None] * dim + d[None, :], mask=here, other=0.0)
    return tl.where(difference < 0.0, 0.0, difference)

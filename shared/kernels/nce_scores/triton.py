"""`nce_scores` on a GPU: rows of the bank are read where they lie, and nothing is gathered first.

A program of the forward pass owns some k of one query, and has that many rows under way at once:
all the work is waiting for memory. Backward, the query's gradient is summed by one program for each
SPLIT of its k; the bank's by the programs that own its rows, after a stable sort of the index: no
atomics, and one order of summation. A row that very many entries name is a long loop of one
program. An index out of range is not followed: its score is NaN.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from shared.kernels import gpu

BLOCK_K = 32  # rows of 128 floats: 8 loads of 16 bytes under way for each of 128 threads
SPLIT = 1024  # k of a part of the query's gradient: enough programs for small batches
BLOCK_M = 16  # rows of the bank that one program owns


def forward(query: Tensor, bank: Tensor, index: Tensor) -> Tensor:
    """Scores [B, K]."""
    query, bank, index = query.contiguous(), bank.contiguous(), index.contiguous()
    (b, k), (m, dim) = index.shape, bank.shape
    out = query.new_empty(b, k)
    if out.numel():
        blocks = triton.cdiv(k, BLOCK_K)
        with torch.cuda.device_of(query):
            _scores[(b * blocks,)](
                query, bank, index, out, m, k, dim, blocks,
                BLOCK_K=BLOCK_K, BLOCK_D=_columns(dim, query.dtype), **gpu.OPTIONS,
            )  # fmt: skip
    return out


def backward(
    grad: Tensor, query: Tensor, bank: Tensor, index: Tensor, wants_bank: bool
) -> tuple[Tensor, Tensor]:
    """(d_query [B, D], d_bank [M, D]; the latter empty unless it is wanted)."""
    grad, query, bank, index = (x.contiguous() for x in (grad, query, bank, index))
    (b, k), (m, dim) = index.shape, bank.shape
    if not (index.numel() and dim):
        return torch.zeros_like(query), bank.new_zeros(bank.shape if wants_bank else 0)
    columns = _columns(dim, query.dtype)
    parts = query.new_empty(b, triton.cdiv(k, SPLIT), dim)
    grid = (b * parts.shape[1], triton.cdiv(dim, columns))
    with torch.cuda.device_of(query):
        _query_gradient[grid](
            grad, bank, index, parts, m, k, dim, parts.shape[1],
            SPLIT=SPLIT, BLOCK_K=BLOCK_K, BLOCK_D=columns, **gpu.OPTIONS,
        )  # fmt: skip
    d_query = parts.sum(1)
    if not wants_bank:
        return d_query, bank.new_empty(0)
    order, starts = by_row(index, m)
    d_bank = bank.new_empty(m, dim)
    owner, weight = order // k, grad.view(-1)[order]
    grid = (triton.cdiv(m, BLOCK_M), triton.cdiv(dim, columns))
    with torch.cuda.device_of(query):
        _bank_gradient[grid](
            weight, query, owner, starts, d_bank, m, dim,
            BLOCK_M=BLOCK_M, BLOCK_D=columns, **gpu.OPTIONS,
        )  # fmt: skip
    return d_query, d_bank


def by_row(index: Tensor, m: int) -> tuple[Tensor, Tensor]:
    """(order [B K], starts [M + 1]): entries order[starts[i] : starts[i + 1]] name row i."""
    named, order = index.flatten().sort(stable=True)
    return order, torch.searchsorted(named, torch.arange(m + 1, device=index.device))


def compiled_forms() -> list[gpu.Form]:
    """What is launched at typical sizes: the compile-only test walks it."""
    forms: list[gpu.Form] = []
    for kind, columns in (("*fp32", 128), ("*fp64", 64)):
        numbers = {"m": "i32", "k": "i32:16", "dim": "i32:16"}
        rows = {"bank": kind, "index": "*i64"} | numbers
        blocks = {"BLOCK_K": BLOCK_K, "BLOCK_D": columns}
        signature = {"query": kind, "out": kind, "blocks": "i32"} | rows
        forms.append((_scores, signature, blocks, gpu.OPTIONS))
        signature = {"grad": kind, "parts": kind, "splits": "i32"} | rows
        forms.append((_query_gradient, signature, {"SPLIT": SPLIT} | blocks, gpu.OPTIONS))
        signature = dict.fromkeys(("weight", "query", "out"), kind)
        signature |= {"owner": "*i64", "starts": "*i64", "m": "i32", "dim": "i32:16"}
        blocks = {"BLOCK_M": BLOCK_M, "BLOCK_D": columns}
        forms.append((_bank_gradient, signature, blocks, gpu.OPTIONS))
    return forms


def _columns(dim: int, dtype: torch.dtype) -> int:
    most = 64 if dtype == torch.float64 else 128
    return max(16, min(most, triton.next_power_of_2(dim)))


@triton.jit
def _scores(
    query, bank, index, out, m, k, dim, blocks, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr
):
    b = (tl.program_id(0) // blocks).to(tl.int64)
    i = (tl.program_id(0) % blocks) * BLOCK_K + tl.arange(0, BLOCK_K)
    row = tl.load(index + b * k + i, mask=i < k, other=-1)
    there = (row >= 0) & (row < m)
    total = tl.zeros([BLOCK_K, BLOCK_D], query.dtype.element_ty)
    for first in range(0, dim, BLOCK_D):
        d = first + tl.arange(0, BLOCK_D)
        q = tl.load(query + b * dim + d, mask=d < dim, other=0.0)
        at = bank + row[:, None] * dim + d[None, :]
        total += q[None, :] * tl.load(at, mask=there[:, None] & (d < dim)[None, :], other=0.0)
    score = tl.where(there, tl.sum(total, 1), float("nan"))
    tl.store(out + b * k + i, score, mask=i < k)


@triton.jit
def _query_gradient(
    grad, bank, index, parts, m, k, dim, splits,
    SPLIT: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """parts[b, split] = sum over SPLIT k of grad[b, k] bank_index[b,k]."""
    b = (tl.program_id(0) // splits).to(tl.int64)
    begin = (tl.program_id(0) % splits) * SPLIT
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    total = tl.zeros([BLOCK_K, BLOCK_D], grad.dtype.element_ty)
    for first in range(begin, tl.minimum(begin + SPLIT, k), BLOCK_K):
        i = first + tl.arange(0, BLOCK_K)
        row = tl.load(index + b * k + i, mask=i < k, other=-1)
        there = (row >= 0) & (row < m)
        g = tl.load(grad + b * k + i, mask=i < k, other=0.0)
        at = bank + row[:, None] * dim + d[None, :]
        total += g[:, None] * tl.load(at, mask=there[:, None] & (d < dim)[None, :], other=0.0)
    tl.store(parts + tl.program_id(0).to(tl.int64) * dim + d, tl.sum(total, 0), mask=d < dim)


@triton.jit
def _bank_gradient(
    weight, query, owner, starts, out, m, dim, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr
):
    """out_i = sum over the entries that name row i of their weight times their query."""
    i = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    start = tl.load(starts + i, mask=i < m, other=0)
    count = tl.load(starts + i + 1, mask=i < m, other=0) - start
    total = tl.zeros([BLOCK_M, BLOCK_D], query.dtype.element_ty)
    for step in range(tl.max(count, 0)):
        there = step < count
        b = tl.load(owner + start + step, mask=there, other=0)
        g = tl.load(weight + start + step, mask=there, other=0.0)
        at = query + b[:, None] * dim + d[None, :]
        # Where there is no entry the query is not read: 0 times its NaN would be one.
        total += g[:, None] * tl.load(at, mask=there[:, None] & (d < dim)[None, :], other=0.0)
    tl.store(out + i[:, None] * dim + d[None, :], total, mask=(i < m)[:, None] & (d < dim)[None, :])

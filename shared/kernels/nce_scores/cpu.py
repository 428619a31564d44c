"""`nce_scores` on the CPU: gathered rows, or a matrix product with the whole bank.

Gathering costs B K D and waits for memory; the product costs B M D at the processor's full speed,
and reads out B K scores of B M. Which is cheaper goes by costs measured on one core (2024 x86
server, float32), in nanoseconds: they decide when to switch, not what comes out.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from shared.kernels.dispatch import NUMBA

DENSE = 1 << 22  # numbers of [queries, M] that the product path holds at once
GATHER = 1 << 18  # numbers of [queries, K, D] that gathering in torch holds: the second-level cache
# Costs of one number:
GATHERED = 0.45 if NUMBA else 1.6  # of a gathered row
CACHED = 0.2 if NUMBA else 1.0  # the same where the bank fits the second-level cache
CACHE = 1 << 21  # bytes
PRODUCT = 0.035  # of a row of the bank, for each query
STREAMED = 0.6  # of a row of the bank, for all queries of a product
WRITTEN, READ = 1.0, 4.0  # of one entry of [B, M], of one of [B, K]


def forward(query: Tensor, bank: Tensor, index: Tensor) -> Tensor:
    """Scores [B, K]."""
    out = query.new_empty(index.shape)
    if not out.numel():
        return out
    (b, k), (m, d) = index.shape, bank.shape
    if dense_is_cheaper(b, k, m, d, bank.element_size()):
        for rows in _chunks(len(query), DENSE // len(bank)):
            torch.gather(query[rows] @ bank.T, 1, index[rows], out=out[rows])
    elif NUMBA:
        from shared.kernels.nce_scores import compiled

        compiled.scores(*_arrays(query, bank, index), out.numpy())
    else:
        for rows in _chunks(len(query), GATHER // (index.shape[1] * max(1, query.shape[1]))):
            torch.bmm(_gather(bank, index[rows]), query[rows, :, None], out=out[rows, :, None])
    return out


def backward(
    grad: Tensor, query: Tensor, bank: Tensor, index: Tensor, wants_bank: bool
) -> tuple[Tensor, Tensor]:
    """(d_query [B, D], d_bank [M, D]; the latter empty unless it is wanted)."""
    (b, k), (m, d) = index.shape, bank.shape
    if index.numel() and dense_is_cheaper(b, k, m, d, bank.element_size()):
        d_query, d_bank = _dense_backward(grad, query, bank, index, wants_bank)
        # 0 times inf is NaN, and reaches rows that no index names: those are done by gathering.
        if bool((d_query.sum() + query.sum()).isfinite()):
            return d_query, d_bank
    d_query = torch.zeros_like(query, memory_format=torch.contiguous_format)
    d_bank = bank.new_zeros(bank.shape if wants_bank else 0)
    if NUMBA:
        from shared.kernels.nce_scores import compiled

        grads, queries, banks, i = _arrays(grad, query, bank, index)
        compiled.query_gradient(grads, banks, i, d_query.numpy())
        if wants_bank:
            compiled.bank_gradient(grads, queries, i, d_bank.numpy())
        return d_query, d_bank
    for rows in _chunks(len(query), GATHER // max(1, index.shape[1] * query.shape[1])):
        g, i = grad[rows, :, None], index[rows]
        d_query[rows] = torch.bmm(g.mT, _gather(bank, i)).squeeze(1)
        if wants_bank:
            d_bank.index_add_(0, i.flatten(), (g * query[rows, None]).flatten(0, 1))
    return d_query, d_bank


def dense_is_cheaper(b: int, k: int, m: int, d: int, size: int) -> bool:
    """Whether the product with all M rows beats gathering K of them for each of B queries."""
    gathered = k * d * (CACHED if m * d * size <= CACHE else GATHERED)
    rows = min(b, max(1, DENSE // m))
    product = m * (d * (PRODUCT + STREAMED / rows) + WRITTEN) + k * READ
    return product < gathered


def _dense_backward(
    grad: Tensor, query: Tensor, bank: Tensor, index: Tensor, wants_bank: bool
) -> tuple[Tensor, Tensor]:
    d_query = query.new_empty(query.shape)
    d_bank = bank.new_zeros(bank.shape if wants_bank else 0)
    for rows in _chunks(len(query), DENSE // len(bank)):
        g = grad.new_zeros(len(query[rows]), len(bank)).scatter_add_(1, index[rows], grad[rows])
        torch.mm(g, bank, out=d_query[rows])
        if wants_bank:
            d_bank.addmm_(g.T, query[rows])
    return d_query, d_bank


def _gather(bank: Tensor, index: Tensor) -> Tensor:
    """bank_index [B, K, D]."""
    return bank.index_select(0, index.flatten()).view(*index.shape, bank.shape[1])


def _chunks(n: int, size: int) -> Iterator[slice]:
    size = max(1, size)
    return (slice(i, i + size) for i in range(0, n, size))


def _arrays(*tensors: Tensor) -> list:
    return [t.contiguous().numpy() for t in tensors]

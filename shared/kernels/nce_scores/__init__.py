"""Scores of queries against chosen rows of a bank, without gathering the rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from shared.kernels import dispatch
from shared.kernels.nce_scores import reference

OP = "nce_scores"


def nce_scores(
    query: Tensor,
    bank: Tensor,
    index: Tensor,
    *,
    temperature: float = 1.0,
    backend: str = "auto",
) -> Tensor:
    """out[b, k] = <query_b, bank_index[b,k]> / temperature, [B, K].

    query: [B, D], bank: [M, D], index: [B, K] int64, rows of bank. Differentiates query and bank;
    the gradient of the bank is a dense [M, D], and is not computed where the bank wants none.
    B = 0 or K = 0: an empty [B, K], and zero gradients. A row of the bank that no index names
    changes nothing, also where it is NaN. The bank is kept for the backward pass, not copied where
    it has the type that is computed in (float64 where one is, else float32): change it in place (a
    memory bank's update) only after that, or autograd refuses.

    Source: the inner products of losses with a memory bank or a queue, as CRD, Tian et al. 2020,
    has them. Memory: the results and 16 MiB, never [B, K, D]. But a bank of another type (float16,
    bfloat16, or float32 beside float64 queries) is converted whole at every call, and the copy kept
    for the backward pass; and one that is not contiguous may be copied in either pass. Cost on the
    CPU: the cheaper of B K D by gathered rows and B M D as a matrix product (cpu.py).
    backend: "reference" is the equation under autograd, and holds [B, K, D] twice.
    Raises ValueError for shapes that do not fit, an index that is not int64 or, on the CPU, not in
    [0, M), temperature <= 0, and a backend that cannot take the tensors. On CUDA an index out of
    range scores NaN. Not twice differentiable, except by "reference".
    """
    dispatch.matrix(OP, "query", query)
    dispatch.matrix(OP, "bank", bank)
    if query.shape[1] != bank.shape[1]:
        raise ValueError(
            f"{OP}: query {tuple(query.shape)} and bank {tuple(bank.shape)} do not fit "
            "[B, D], [M, D]"
        )
    dispatch.indices(OP, index, rows=len(query), into=bank)
    if not temperature > 0:
        raise ValueError(f"{OP}: temperature is {temperature}; it should be positive")
    path = dispatch.choose(OP, backend, query, bank, index)
    (q, rows), dtype = dispatch.common(OP, query, bank)
    q = q / temperature
    if path == "reference":
        with dispatch.without_autocast(q):
            return reference.forward(q, rows, index).to(dtype)
    return _nce_scores(q, rows, index, path).to(dtype)


@torch.library.custom_op("lowres::nce_scores", mutates_args=())
def _nce_scores(query: Tensor, bank: Tensor, index: Tensor, path: str) -> Tensor:
    # Again, as compiled code comes here without a check, and numba would read what lies beyond.
    dispatch.indices(OP, index, rows=len(query), into=bank)
    return dispatch.module(OP, path).forward(query, bank, index)


@_nce_scores.register_fake
def _(query: Tensor, bank: Tensor, index: Tensor, path: str) -> Tensor:
    return query.new_empty(index.shape)


@torch.library.custom_op("lowres::nce_scores_backward", mutates_args=())
def _backward(
    grad: Tensor, query: Tensor, bank: Tensor, index: Tensor, wants_bank: bool, path: str
) -> tuple[Tensor, Tensor]:
    """(d_query [B, D], d_bank [M, D]; the latter empty unless it is wanted)."""
    return dispatch.module(OP, path).backward(grad, query, bank, index, wants_bank)


@_backward.register_fake
def _(
    grad: Tensor, query: Tensor, bank: Tensor, index: Tensor, wants_bank: bool, path: str
) -> tuple[Tensor, Tensor]:
    return query.new_empty(query.shape), bank.new_empty(bank.shape if wants_bank else (0,))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    query, bank, index, ctx.path = inputs
    ctx.save_for_backward(query, bank, index)


def _autograd(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    wants_bank = ctx.needs_input_grad[1]
    d_query, d_bank = _backward(grad, *ctx.saved_tensors, wants_bank, ctx.path)
    return d_query, d_bank if wants_bank else None, None, None


_nce_scores.register_autograd(_autograd, setup_context=_setup)
dispatch.in_float32(_nce_scores)

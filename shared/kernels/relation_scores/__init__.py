"""Scores of relation vectors against queries: the inner product of CRRCD's Eq. 10."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from shared.kernels import dispatch
from shared.kernels.relation_scores import reference

OP = "relation_scores"


def relation_scores(
    query: Tensor,
    anchor: Tensor,
    bank: Tensor,
    index: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    temperature: float = 1.0,
    backend: str = "auto",
) -> Tensor:
    """norm(relu(anchor_b - bank_index[b,k]) @ weight + bias) . query_b / temperature

    query: [B, e], unit rows for cosines. anchor: [B, d]. bank: [M, d]. index: [B, K] int64 into
    bank. weight: [d, e], bias: [e]. Returns [B, K]; a relation vector of norm 0 scores 0.
    Differentiates query, anchor, bank, weight and bias. B = 0 or K = 0 gives an empty result. A
    NaN makes the scores NaN that it enters. Source: CRRCD Sec. III-A and Eq. 10, with the two
    linear maps after the ReLU merged into `weight` and `bias`.

    Memory: [B, K], and for "cpu" .6 of one [B, K, d] up to 256 MiB, between forward and backward
    pass; "reference", the equation under autograd, keeps several [B, K, d]. Cost: three products
    [BK, d] x [d, d], two for what is kept.
    Raises ValueError for a backend that cannot take the tensors, for shapes that do not fit, an
    index that is not int64 or (on the CPU) not in the bank, and a temperature not above 0. Not
    twice differentiable, except by "reference".
    """
    for name, x in (("query", query), ("anchor", anchor), ("bank", bank), ("weight", weight)):
        dispatch.matrix(OP, name, x)
    b, d = anchor.shape
    if (
        query.shape[0] != b
        or bank.shape[1] != d
        or weight.shape != (d, query.shape[1])
        or (bias is not None and bias.shape != weight.shape[1:])
    ):
        raise ValueError(
            f"{OP}: query {tuple(query.shape)}, anchor {tuple(anchor.shape)}, bank "
            f"{tuple(bank.shape)}, weight {tuple(weight.shape)}, bias "
            f"{None if bias is None else tuple(bias.shape)} do not fit "
            "[B,e], [B,d], [M,d], [d,e], [e]"
        )
    dispatch.indices(OP, index, rows=b, into=bank)
    if not temperature > 0:
        raise ValueError(f"{OP}: temperature is {temperature}; it should be positive")
    given = [query, anchor, bank, weight] + ([] if bias is None else [bias])
    path = dispatch.choose(OP, backend, *given, index)
    given, dtype = dispatch.common(OP, *given)
    q, a, m, w = given[:4]
    c = given[4] if bias is not None else None
    if path == "reference":
        with dispatch.without_autocast(q):
            scores = reference.relation_scores(q, a, m, index, w, c)
        return (scores / temperature).to(dtype)
    if c is None:
        c = w.new_zeros(w.shape[1])
    wants = torch.is_grad_enabled() and any(x.requires_grad for x in given)
    with dispatch.without_autocast(q):
        scores = _relation_scores(
            a, m, index, q @ w.T, w @ w.T, w @ c, q @ c, c @ c, wants, path
        )[0]
    return (scores / temperature).to(dtype)


@torch.library.custom_op("lowres::relation_scores", mutates_args=())
def _relation_scores(
    anchor: Tensor,
    bank: Tensor,
    index: Tensor,
    u: Tensor,
    a: Tensor,
    v: Tensor,
    bq: Tensor,
    bb: Tensor,
    wants: bool,
    path: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(scores, <q, key>, |key| [B, K], what the path keeps for the backward pass)."""
    # Again, as compiled code comes here without a check, and numba would read what lies beyond.
    dispatch.indices(OP, index, rows=len(anchor), into=bank)
    return dispatch.module(OP, path).forward(anchor, bank, index, u, a, v, bq, bb, wants)


@_relation_scores.register_fake
def _(
    anchor: Tensor,
    bank: Tensor,
    index: Tensor,
    u: Tensor,
    a: Tensor,
    v: Tensor,
    bq: Tensor,
    bb: Tensor,
    wants: bool,
    path: str,
) -> Any:
    (b, k), d = index.shape, anchor.shape[1]
    keep = 0
    if wants and path == "cpu":
        keep = dispatch.module(OP, path).kept_rows(b, k, d, anchor)
    kept = anchor.new_empty((keep, k, d) if path == "cpu" else (0,))
    return *(anchor.new_empty(b, k) for _ in range(3)), kept


@torch.library.custom_op("lowres::relation_scores_backward", mutates_args=())
def _backward(
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
    path: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients by anchor, bank, u, a and v from `grad` [B, K]."""
    return dispatch.module(OP, path).backward(
        grad, anchor, bank, index, u, a, v, dot, norm, kept
    )


@_backward.register_fake
def _(
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
    path: str,
) -> Any:
    return tuple(x.new_empty(x.shape) for x in (anchor, bank, u, a, v))


def gradients(grad: Tensor, dot: Tensor, norm: Tensor) -> tuple[Tensor, Tensor]:
    """(p, s) [B, K]: the gradient by <q, key>, and by half of |key|^2; 0 where the norm is."""
    p = grad / norm
    s = -p * dot / norm.square()
    return p, torch.where(norm <= TINY**0.5, 0, s)


TINY = 1e-24  # a relation vector of square norm below this scores 0, as F.normalize has it


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    anchor, bank, index, u, a, v, _, _, _, ctx.path = inputs
    ctx.save_for_backward(anchor, bank, index, u, a, v, *output[1:])
    ctx.set_materialize_grads(False)


def _autograd(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 10
    dot, norm = ctx.saved_tensors[6:8]
    d_anchor, d_bank, d_u, d_a, d_v = _backward(grad, *ctx.saved_tensors, ctx.path)
    p, s = gradients(grad, dot, norm)
    return d_anchor, d_bank, None, d_u, d_a, d_v, p.sum(1), 0.5 * s.sum(), None, None


_relation_scores.register_autograd(_autograd, setup_context=_setup)
dispatch.in_float32(_relation_scores)

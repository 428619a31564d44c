"""Scores of relation vectors against queries: the inner product of CRRCD's Eq. 10, and AIRD's."""

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
    weight: Tensor | None,
    bias: Tensor | None = None,
    *,
    temperature: float = 1.0,
    backend: str = "auto",
) -> Tensor:
    """norm(relu(anchor_b - bank_index[b,k]) @ weight + bias) . query_b / temperature

    query: [B, e], unit rows for cosines. anchor: [B, d]. bank: [M, d]. index: [B, K] int64 into
    bank. weight: [d, e], bias: [e]; no weight (then no bias): the relation vector is the relu
    itself, e = d. Returns [B, K]; a relation vector of norm 0 scores 0.
    Differentiates query, anchor, bank, weight and bias. B = 0 or K = 0 gives an empty result. A
    NaN makes the scores NaN that it enters. Source: CRRCD Sec. III-A and Eq. 10, with the two
    linear maps after the ReLU merged into `weight` and `bias`; AIRD Eq. 2 and 4 without a weight.

    Memory: [B, K], and for "cpu" with a weight .6 of one [B, K, e] up to 256 MiB, between forward
    and backward pass; "reference", the equation under autograd, keeps several [B, K, d]. Cost:
    four products [BK, d] x [d, e], three for what is kept; without a weight none.
    Raises ValueError for a backend that cannot take the tensors, for shapes that do not fit, a bias
    without a weight, an index that is not int64 or (on the CPU) not in the bank, and a temperature
    not above 0. Not twice differentiable, except by "reference".
    """
    if weight is None and bias is not None:
        raise ValueError(f"{OP}: a bias without a weight: leave it out")
    named = {"query": query, "anchor": anchor, "bank": bank, "weight": weight, "bias": bias}
    given = {name: x for name, x in named.items() if x is not None}
    for name, x in given.items():
        if name != "bias":
            dispatch.matrix(OP, name, x)
    (b, d), e = anchor.shape, query.shape[1]
    wanted = {"query": (b, e), "bank": (len(bank), d), "weight": (d, e), "bias": (e,)}
    if weight is None:
        wanted["query"] = (b, d)
    if any(given[name].shape != shape for name, shape in wanted.items() if name in given):
        shapes = ", ".join(f"{name} {tuple(x.shape)}" for name, x in given.items())
        fit = "[B,e], [B,d], [M,d], [d,e], [e]" if weight is not None else "[B,d], [B,d], [M,d]"
        raise ValueError(f"{OP}: {shapes} do not fit {fit}")
    dispatch.indices(OP, index, rows=b, into=bank)
    if not temperature > 0:
        raise ValueError(f"{OP}: temperature is {temperature}; it should be positive")
    path = dispatch.choose(OP, backend, *given.values(), index)
    floats, dtype = dispatch.common(OP, *given.values())
    q, a, m = floats[:3]
    w, c = (*floats[3:], None, None)[:2]
    if path == "reference":
        with dispatch.without_autocast(q):
            scores = reference.relation_scores(q, a, m, index, w, c)
        return (scores / temperature).to(dtype)
    if w is not None and c is None:
        c = w.new_zeros(e)
    wants = torch.is_grad_enabled() and any(x.requires_grad for x in floats)
    scores = _relation_scores(q, a, m, index, w, c, wants, path)[0]
    return (scores / temperature).to(dtype)


@torch.library.custom_op("lowres::relation_scores", mutates_args=())
def _relation_scores(
    query: Tensor,
    anchor: Tensor,
    bank: Tensor,
    index: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    wants: bool,
    path: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """(scores [B, K], |key| [B, K], what the path keeps for the backward pass)."""
    # Again, as compiled code comes here without a check, and numba would read what lies beyond.
    dispatch.indices(OP, index, rows=len(anchor), into=bank)
    return dispatch.module(OP, path).forward(query, anchor, bank, index, weight, bias, wants)


@_relation_scores.register_fake
def _(
    query: Tensor,
    anchor: Tensor,
    bank: Tensor,
    index: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    wants: bool,
    path: str,
) -> Any:
    (b, k), e, keep = index.shape, query.shape[1], 0
    if wants and path == "cpu" and weight is not None:
        keep = dispatch.module(OP, path).kept_rows(b, k, e, query)
    return anchor.new_empty(b, k), anchor.new_empty(b, k), anchor.new_empty(keep, k, e)


@torch.library.custom_op("lowres::relation_scores_backward", mutates_args=())
def _backward(
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
    path: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients by query, anchor, bank, weight and bias from `grad` [B, K]; empty for a None."""
    return dispatch.module(OP, path).backward(
        grad, query, anchor, bank, index, weight, bias, scores, norm, kept
    )


@_backward.register_fake
def _(
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
    path: str,
) -> Any:
    inputs = (query, anchor, bank, weight, bias)
    return tuple(grad.new_empty(0 if x is None else x.shape) for x in inputs)


TINY = 1e-12  # a relation vector shorter than this is divided by it, as F.normalize does


def gradients(grad: Tensor, scores: Tensor, norm: Tensor) -> tuple[Tensor, Tensor]:
    """(p, s) [B, K]: the gradient of a score by its key is p query + s key."""
    p = grad / norm
    return p, torch.where(norm <= TINY, 0, -p * scores / norm)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    query, anchor, bank, index, weight, bias, _, ctx.path = inputs
    ctx.save_for_backward(query, anchor, bank, index, weight, bias, *output)
    ctx.set_materialize_grads(False)


def _autograd(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 8
    query, anchor, bank, weight, bias = _backward(grad, *ctx.saved_tensors, ctx.path)
    if ctx.saved_tensors[4] is None:
        weight = bias = None
    return query, anchor, bank, None, weight, bias, None, None


_relation_scores.register_autograd(_autograd, setup_context=_setup)
dispatch.in_float32(_relation_scores)

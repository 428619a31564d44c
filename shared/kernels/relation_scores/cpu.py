"""`relation_scores` a few queries at a time, with a backward of its own: holds [B, K, d] once.

With r = relu(anchor_b - bank_k), A = W Wᵀ, u = W q, v = W b:
    dot    = <q, rW + b> = <r, u> + <b, q>
    square = |rW + b|²   = <r, rA> + 2 <r, v> + <b, b>,  score = dot / sqrt(square) / temperature
so that one [K, d] x [d, d] product serves the forward pass, and rA + v is kept for the backward
pass, which has one more. With g the gradient of a score,
p = g / norm and s = -g dot / norm³ (the gradient of the score by ½ square):
    dr = p u + s (rA + v);  dA = ½ Σ s rᵀr;  du = Σ p r;  dv = Σ s r;  d<b,q> = Σ p;  d<b,b> = ½ Σ s
r is gathered again in the backward pass: that costs less than keeping it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

CHUNK_BYTES = 1 << 20  # r of one chunk: stays in a core's second-level cache
TINY = 1e-24  # a relation vector of square norm below this scores 0, as F.normalize has it


def relation_scores(
    query: Tensor,
    anchor: Tensor,
    bank: Tensor,
    index: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    temperature: float,
) -> Tensor:
    if bias is None:
        bias = weight.new_zeros(weight.shape[1])
    return (
        _Scores.apply(
            anchor,
            bank,
            index,
            query @ weight.T,
            weight @ weight.T,
            weight @ bias,
            query @ bias,
            bias @ bias,
        )
        / temperature
    )


class _Scores(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        anchor: Tensor,
        bank: Tensor,
        index: Tensor,
        u: Tensor,
        a: Tensor,
        v: Tensor,
        bq: Tensor,
        bb: Tensor,
    ) -> Tensor:
        dot, square = torch.empty_like(index, dtype=u.dtype), torch.empty_like(index, dtype=u.dtype)
        rav = anchor.new_empty(*index.shape, anchor.shape[1])
        for rows in _chunks(index, anchor):
            r = _relations(anchor, bank, index, rows)
            part, flat = rav[rows], r.view(-1, r.shape[-1])
            torch.mm(flat, a, out=part.view_as(flat))
            part += v
            torch.bmm(r, u[rows, :, None], out=dot[rows, :, None])
            square[rows] = (flat @ v).view(r.shape[:2]) + r.mul_(part).sum(-1)
        dot += bq[:, None]
        norm = square.add_(bb).clamp_(min=TINY).sqrt_()
        ctx.save_for_backward(anchor, bank, index, u, rav, dot, norm)
        return dot / norm

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        anchor, bank, index, u, rav, dot, norm = ctx.saved_tensors
        p = grads[0] / norm
        s = -p * dot / norm.square()
        s[norm <= TINY**0.5] = 0
        d_anchor, d_bank = torch.empty_like(anchor), torch.zeros_like(bank)
        du, da, dv = (
            torch.empty_like(u),
            u.new_zeros(u.shape[1], u.shape[1]),
            u.new_zeros(u.shape[1]),
        )
        for rows in _chunks(index, anchor):
            r = _relations(anchor, bank, index, rows)
            flat, ps, ss = r.view(-1, r.shape[-1]), p[rows, :, None], s[rows, :, None]
            du[rows] = torch.bmm(ps.transpose(1, 2), r).squeeze(1)
            dv += torch.bmm(ss.transpose(1, 2), r).sum((0, 1))
            dr = rav[rows] * ss
            dr.addcmul_(ps, u[rows, None, :])
            dr.mul_(r > 0)
            d_anchor[rows] = dr.sum(1)
            d_bank.index_add_(0, index[rows].flatten(), dr.view_as(flat), alpha=-1)
            da.addmm_(flat.T, r.mul(ss).view_as(flat), alpha=0.5)
        return d_anchor, d_bank, None, du, da, dv, p.sum(1), 0.5 * s.sum()


def _relations(anchor: Tensor, bank: Tensor, index: Tensor, rows: slice) -> Tensor:
    """r [c, K, d] of a chunk of queries."""
    chosen = bank.index_select(0, index[rows].flatten()).view(*index[rows].shape, -1)
    return torch.sub(anchor[rows, None, :], chosen, out=chosen).relu_()


def _chunks(index: Tensor, anchor: Tensor) -> list[slice]:
    size = max(1, CHUNK_BYTES // max(1, index.shape[1] * anchor.shape[1] * anchor.element_size()))
    return [slice(i, i + size) for i in range(0, len(index), size)]

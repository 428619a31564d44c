"""`relation_scores` a few queries at a time, with a backward pass of its own.

With r = relu(anchor_b - bank_k), A = W Wᵀ, u = W q, v = W b:
    dot    = <q, rW + b> = <r, u> + <b, q>
    square = |rW + b|²   = <r, rA> + 2 <r, v> + <b, b>,  score = dot / sqrt(square)
so that one [K, d] x [d, d] product serves the forward pass. rA + v is kept for the backward pass
of the first KEPT of the queries, and made again for the others. With g the gradient of a score,
p = g / norm and s = -g dot / norm³ (the gradient of the score by ½ square):
    dr = p u + s (rA + v);  dA = ½ Σ s rᵀr;  du = Σ p r;  dv = Σ s r;  d<b,q> = Σ p;  d<b,b> = ½ Σ s
r is gathered again in the backward pass: that costs less than keeping it. Around the two products,
compiled.py reads and writes each number once; without numba, torch does the same in more passes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from shared.kernels.dispatch import NUMBA
from shared.kernels.relation_scores import TINY, gradients

CHUNK_BYTES = 1 << 20  # r of one chunk: stays in a core's second-level cache
# Keeping all would save a sixth of the time; this stays below an eighth of eager autograd's peak.
KEPT = 0.6
KEPT_BYTES = 1 << 28


def kept_rows(b: int, k: int, d: int, x: Tensor) -> int:
    """Queries whose rA + v is kept."""
    return min(int(KEPT * b), KEPT_BYTES // max(1, k * d * x.element_size()))


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
    """(scores, dot, norm [B, K], rA + v [B, K, d] where a gradient is wanted)."""
    (b, k), d = index.shape, anchor.shape[1]
    anchor, bank, index, u, v = (x.contiguous() for x in (anchor, bank, index, u, v))
    dot, square = anchor.new_empty(b, k), anchor.new_empty(b, k)
    keep = kept_rows(b, k, d, anchor) if wants else 0
    kept = anchor.new_empty(keep, k, d)
    step = _step(k, d, anchor)
    r, ra = anchor.new_empty(step, k, d), anchor.new_empty(step, k, d)
    for rows in _chunks(b, step, keep):
        count = len(anchor[rows])
        r_c, ra_c = r[:count], kept[rows] if rows.start < keep else ra[:count]
        _relations(anchor[rows], bank, index[rows], r_c)
        torch.mm(r_c.view(-1, d), a, out=ra_c.view(-1, d))
        (_measure_compiled if NUMBA else _measure)(r_c, ra_c, u[rows], v, dot[rows], square[rows])
    dot += bq[:, None]
    norm = square.add_(bb).clamp_(min=TINY).sqrt_()
    return dot / norm, dot, norm, kept


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
    (b, k), d = index.shape, anchor.shape[1]
    anchor, bank, index, u = (x.contiguous() for x in (anchor, bank, index, u))
    p, s = (x.contiguous() for x in gradients(grad, dot, norm))
    d_anchor, d_u = torch.zeros_like(anchor), torch.zeros_like(u)
    d_bank, d_a, d_v = torch.zeros_like(bank), a.new_zeros(d, d), v.new_zeros(d)
    step, keep = _step(k, d, anchor), len(kept)
    r, sr, ra = (anchor.new_empty(step, k, d) for _ in range(3))
    for rows in _chunks(b, step, keep):
        count = len(anchor[rows])
        r_c, sr_c, ra_c, at = r[:count], sr[:count], ra[:count], index[rows]
        _relations(anchor[rows], bank, at, r_c)
        if rows.start < keep:
            ra_c = kept[rows]
        else:
            torch.addmm(v, r_c.view(-1, d), a, out=ra_c.view(-1, d))
        (_spread_compiled if NUMBA else _spread)(
            p[rows], s[rows], r_c, u[rows], ra_c, at, d_anchor[rows], d_bank, sr_c
        )
        d_u[rows] = torch.bmm(p[rows, None, :], r_c).squeeze(1)
        d_v += sr_c.sum((0, 1))
        d_a.addmm_(r_c.view(-1, d).T, sr_c.view(-1, d), alpha=0.5)
    return d_anchor, d_bank, d_u, d_a, d_v


def _step(k: int, d: int, x: Tensor) -> int:
    return max(1, CHUNK_BYTES // max(1, k * d * x.element_size()))


def _chunks(b: int, step: int, keep: int) -> list[slice]:
    """Queries of a chunk: all kept, or none."""
    ends = [range(0, keep, step), range(keep, b, step)]
    return [slice(i, min(i + step, part.stop)) for part in ends for i in part]


def _relations(anchor: Tensor, bank: Tensor, index: Tensor, r: Tensor) -> None:
    """r [c, K, d] of a chunk of queries."""
    if NUMBA:
        from shared.kernels.relation_scores import compiled

        compiled.relations(anchor.numpy(), bank.numpy(), index.numpy(), r.numpy())
        return
    chosen = torch.index_select(bank, 0, index.flatten(), out=r.view(-1, r.shape[-1])).view_as(r)
    torch.sub(anchor[:, None, :], chosen, out=chosen).relu_()


def _measure(r: Tensor, ra: Tensor, u: Tensor, v: Tensor, dot: Tensor, square: Tensor) -> None:
    """ra += v; dot = <r, u>; square = <r, rA> + 2 <r, v>."""
    ra += v
    dot.copy_(torch.bmm(r, u[:, :, None]).squeeze(2))
    square.copy_(r @ v + (r * ra).sum(-1))


def _measure_compiled(
    r: Tensor, ra: Tensor, u: Tensor, v: Tensor, dot: Tensor, square: Tensor
) -> None:
    from shared.kernels.relation_scores import compiled

    compiled.measure(r.numpy(), ra.numpy(), u.numpy(), v.numpy(), dot.numpy(), square.numpy())


def _spread(
    p: Tensor,
    s: Tensor,
    r: Tensor,
    u: Tensor,
    kept: Tensor,
    index: Tensor,
    d_anchor: Tensor,
    d_bank: Tensor,
    sr: Tensor,
) -> None:
    """dr to the anchors and, negative, to the bank; sr = s r."""
    dr = kept * s[:, :, None]
    dr.addcmul_(p[:, :, None], u[:, None, :])
    dr.mul_(r > 0)
    d_anchor += dr.sum(1)
    d_bank.index_add_(0, index.flatten(), dr.view(-1, dr.shape[-1]), alpha=-1)
    torch.mul(r, s[:, :, None], out=sr)


def _spread_compiled(
    p: Tensor,
    s: Tensor,
    r: Tensor,
    u: Tensor,
    kept: Tensor,
    index: Tensor,
    d_anchor: Tensor,
    d_bank: Tensor,
    sr: Tensor,
) -> None:
    from shared.kernels.relation_scores import compiled

    compiled.spread(*(x.numpy() for x in (p, s, r, u, kept, index, d_anchor, d_bank, sr)))

"""`relation_scores` a few queries at a time, with a backward pass of its own.

With r = relu(anchor_b - bank_k), key = r W + b, norm = |key|, score = <key, q> / norm, and with g
the gradient of a score, p = g / norm, s = -g score / norm^2:
    dkey = p q + s key,  dq = sum p key,  db = sum dkey,  dW = sum r' dkey,
    dr = dkey W' where r > 0
Keys are kept for the backward pass of the first KEPT of the queries, and made again for the others;
r is gathered again, which costs less than keeping it. Around the products, compiled.py reads and
writes each number once; without numba, torch does the same in more passes. Without a weight the
relation vector is r itself, there is no product, and compiled.py keeps no more than one r.

(|key|^2 = <r, r W W'> + 2 <r, W b> + <b, b> would save a product, but cancels where keys are
short.)
"""

from __future__ import annotations

import torch
from torch import Tensor

from shared.kernels.dispatch import NUMBA
from shared.kernels.relation_scores import TINY, gradients

CHUNK_BYTES = 1 << 20  # r of one chunk: stays in a core's second-level cache
# Keeping all would save a tenth of the time; this stays below an eighth of eager autograd's peak.
KEPT = (3, 5)
KEPT_BYTES = 1 << 28


def kept_rows(b: int, k: int, e: int, x: Tensor) -> int:
    """Queries whose keys are kept."""
    return min(b * KEPT[0] // KEPT[1], KEPT_BYTES // max(1, k * e * x.element_size()))


def forward(
    query: Tensor,
    anchor: Tensor,
    bank: Tensor,
    index: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    wants: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(scores, norm [B, K], the first keys [., K, e] where a gradient is wanted)."""
    (b, k), d, e = index.shape, anchor.shape[1], query.shape[1]
    query, anchor, bank, index = (x.contiguous() for x in (query, anchor, bank, index))
    scores, norm = anchor.new_empty(b, k), anchor.new_empty(b, k)
    keep = kept_rows(b, k, e, query) if wants and weight is not None else 0
    kept = anchor.new_empty(keep, k, e)
    if weight is None and NUMBA:
        _compiled("scores", anchor, bank, index, query, scores, norm)
    else:
        step = _step(k, max(d, e), anchor)
        r, room = anchor.new_empty(step, k, d), anchor.new_empty(step, k, e)
        for rows in _chunks(b, step, keep):
            count = len(anchor[rows])
            key = r_c = r[:count]
            _relations(anchor[rows], bank, index[rows], r_c)
            if weight is not None:
                key = kept[rows] if rows.start < keep else room[:count]
                torch.mm(r_c.flatten(0, 1), weight, out=key.flatten(0, 1))
            _measure(key, query[rows], bias, scores[rows], norm[rows])
    norm.clamp_(min=TINY)
    return scores.div_(norm), norm, kept


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
    """Gradients by query, anchor, bank, weight and bias; empty where there is none of them."""
    k, d, e = index.shape[1], anchor.shape[1], query.shape[1]
    query, anchor, bank, index = (x.contiguous() for x in (query, anchor, bank, index))
    p, s = (x.contiguous() for x in gradients(grad, scores, norm))
    d_query, d_anchor, d_bank, d_weight, d_bias = found = tuple(
        grad.new_zeros(0 if x is None else x.shape) for x in (query, anchor, bank, weight, bias)
    )
    if weight is None and NUMBA:
        _compiled("gradients", anchor, bank, index, query, p, s, d_query, d_anchor, d_bank)
        return found
    step, keep = _step(k, max(d, e), anchor), len(kept)
    r, dr = anchor.new_empty(step, k, d), anchor.new_empty(step, k, d)
    room, d_key = anchor.new_empty(step, k, e), anchor.new_empty(step, k, e)
    for rows in _chunks(len(anchor), step, keep):
        count = len(anchor[rows])
        r_c, dr_c, key, d_key_c = r[:count], dr[:count], room[:count], d_key[:count]
        _relations(anchor[rows], bank, index[rows], r_c)
        if weight is None or bias is None:
            key, d_key_c = r_c, dr_c
        elif rows.start < keep:
            key = kept[rows]
        else:
            torch.addmm(bias, r_c.flatten(0, 1), weight, out=key.flatten(0, 1))
        _turn(key, query[rows], p[rows], s[rows], d_key_c, d_query[rows], d_bias)
        if weight is not None:
            flat = d_key_c.flatten(0, 1)
            d_weight.addmm_(r_c.flatten(0, 1).T, flat)
            torch.mm(flat, weight.T, out=dr_c.flatten(0, 1))
        _spread(r_c, dr_c, index[rows], d_anchor[rows], d_bank)
    return found


def _step(k: int, d: int, x: Tensor) -> int:
    return max(1, CHUNK_BYTES // max(1, k * d * x.element_size()))


def _chunks(b: int, step: int, keep: int) -> list[slice]:
    """Queries of a chunk: all kept, or none."""
    ends = [range(0, keep, step), range(keep, b, step)]
    return [slice(i, min(i + step, part.stop)) for part in ends for i in part]


def _compiled(name: str, *tensors: Tensor) -> None:
    from shared.kernels.relation_scores import compiled

    getattr(compiled, name)(*(x.numpy() for x in tensors))


def _relations(anchor: Tensor, bank: Tensor, index: Tensor, r: Tensor) -> None:
    """r [c, K, d] of a chunk of queries."""
    if NUMBA:
        return _compiled("relations", anchor, bank, index, r)
    chosen = torch.index_select(bank, 0, index.flatten(), out=r.flatten(0, 1)).view_as(r)
    torch.sub(anchor[:, None, :], chosen, out=chosen).relu_()


def _measure(key: Tensor, query: Tensor, bias: Tensor | None, dot: Tensor, norm: Tensor) -> None:
    """key += bias; dot = <key, query>; norm = |key|."""
    if bias is not None:
        if NUMBA:
            return _compiled("measure", key, query, bias.contiguous(), dot, norm)
        key += bias
    dot.copy_(torch.bmm(key, query[:, :, None]).squeeze(2))
    norm.copy_(torch.linalg.vector_norm(key, dim=-1))


def _turn(
    key: Tensor,
    query: Tensor,
    p: Tensor,
    s: Tensor,
    d_key: Tensor,
    d_query: Tensor,
    d_bias: Tensor,
) -> None:
    """d_key = p query + s key; adds sum p key to d_query and sum d_key to d_bias, if not empty."""
    if NUMBA:
        return _compiled("turn", key, query, p, s, d_key, d_query, d_bias)
    torch.mul(key, s[:, :, None], out=d_key)
    d_key.addcmul_(p[:, :, None], query[:, None, :])
    d_query += torch.bmm(p[:, None, :], key).squeeze(1)
    if len(d_bias):
        d_bias += d_key.sum((0, 1))


def _spread(r: Tensor, dr: Tensor, index: Tensor, d_anchor: Tensor, d_bank: Tensor) -> None:
    """dr where r > 0: to the anchors and, negative, to the bank."""
    if NUMBA:
        return _compiled("spread", r, dr, index, d_anchor, d_bank)
    dr.mul_(r > 0)
    d_anchor += dr.sum(1)
    d_bank.index_add_(0, index.flatten(), dr.flatten(0, 1), alpha=-1)

"""The methods that the papers' tables compare against, one function each.

e_s, e_t: embeddings of student and teacher, rows of one batch; a, b: feature maps of student and
teacher. Only the student's receive gradient. Computed in float32 (float64 when given it), also
under autocast. A NaN in any input gives NaN. Plain KD is shared.losses.kd.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from shared.kernels import angle_loss, dispatch, distance_loss, pairwise_distance
from shared.losses import at_least_float32, same_shape, unit, unit_maps


def pkt(e_s: Tensor, e_t: Tensor) -> Tensor:
    """PKT (Passalis & Tefas 2018): mean over i, j of P^t_ij ln(P^t_ij / P^s_ij).

    e_s: [B, D_s], e_t: [B, D_t]. P_ij = K_ij / sum over j of K_ij, K = (cosine + 1) / 2. As the
    authors' code and not their paper has it: rows are normalised over all j, i = j included, 1e-7
    is added to both sides of the ratio, and the sum over entries is divided by B^2 (so a divergence
    of rows, divided by B once more: its weight is in the thousands). A row of zeros has cosine 0.
    Raises ValueError for other numbers of rows.
    """
    dispatch.same_rows("pkt", e_s, e_t)
    with dispatch.without_autocast(e_s):
        p_s, p_t = (_affinity(at_least_float32(e)) for e in (e_s, e_t.detach()))
    return (p_t * ((p_t + 1e-7) / (p_s + 1e-7)).log()).mean()


def darkrank(
    e_s: Tensor, e_t: Tensor, *, alpha: float = 2.0, beta: float = 3.0, length: int = 4
) -> Tensor:
    """DarkRank (Chen et al. 2018), hard transfer: -ln of the likelihood of the teacher's ranking.

    e_s: [B, D_s], e_t: [B, D_t]. Every row of the batch is a query; its list are its `length`
    nearest other rows by the teacher, nearest first (fewer where the batch has fewer; ties in the
    order of the batch). With the student's scores s_i = -alpha d_i^beta along the list, d the
    distance to the query, the loss is the mean over queries of
        - sum over i of (s_i - ln sum over k >= i of exp(s_k)),
    the source's product over positions as a sum of logarithms, which cannot overflow. Of its two
    forms, "soft" is a divergence over all length! rankings; this is "hard", the teacher's one best
    ranking. Form, list, alpha, beta and length are those of RKD's comparison (its public code).
    Fewer than two rows: 0.
    Raises ValueError for length < 2 and for other numbers of rows.
    """
    dispatch.same_rows("darkrank", e_s, e_t)
    if length < 2:
        raise ValueError(f"darkrank: a list of {length} has one ranking; length should be >= 2")
    d_s, d_t = (pairwise_distance(at_least_float32(e)) for e in (e_s, e_t.detach()))
    others = d_t.fill_diagonal_(torch.inf).argsort(dim=1, stable=True)
    length = min(length, len(d_s) - 1)
    scores = -alpha * d_s.gather(1, others[:, :length]) ** beta
    # 0, and NaN where an input has one: a ranking alone would hide the teacher's
    total = 0 * (d_s.sum() + at_least_float32(e_t.detach()).sum())
    for i in range(length):
        total = total + (scores[:, i:].logsumexp(1) - scores[:, i]).mean()
    return total


def fitnet(a: Tensor, b: Tensor) -> Tensor:
    """FitNets' hint (Romero et al. 2015, Eq. 3): mean over all elements of (a - b)^2.

    a: [B, C, h, w], the student's map after the regressor; b: the teacher's, of the same shape. The
    source takes half the sum over an image. Raises ValueError where the shapes differ.
    """
    same_shape("fitnet", a, b)
    return F.mse_loss(at_least_float32(a), at_least_float32(b.detach()))


def attention_transfer(a: Tensor, b: Tensor) -> Tensor:
    """Attention transfer (Zagoruyko & Komodakis 2017): mean of (Q_s / |Q_s| - Q_t / |Q_t|)^2.

    a: [B, C_s, h, w], b: [B, C_t, h', w']. Q: sum over channels of F^2, flattened. The mean is over
    the batch and the positions, as in the authors' code; their Eq. 2 prints the norm. For other
    h, w see `unit_maps`.
    """
    dispatch.same_rows("attention_transfer", a, b)
    student, teacher = (at_least_float32(x).square().sum(1) for x in (a, b.detach()))
    return F.mse_loss(*unit_maps(student, teacher))


def rkd(e_s: Tensor, e_t: Tensor, *, distance: float = 25.0, angle: float = 50.0) -> Tensor:
    """RKD (Park et al. 2019): distance * RKD-D + angle * RKD-A, Huber with delta 1.

    e_s: [B, D_s], e_t: [B, D_t]. Means over all B^2 and B^3 ordered entries, as in the authors'
    code. 25 and 50 are the weights of its widely used re-implementation; the source has 1 : 2.
    """
    e_s = at_least_float32(e_s)
    pairs = distance_loss(e_s, e_t, penalty="huber", reduction="rkd")
    return distance * pairs + angle * angle_loss(e_s, e_t, reduction="rkd")


def _affinity(e: Tensor) -> Tensor:
    """P of PKT, [B, B], rows that sum to 1."""
    u = unit(e)
    k = u @ u.T + 1  # without the 2 of (cosine + 1) / 2, which cancels
    return k / k.sum(1, keepdim=True)

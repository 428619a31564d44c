"""CRRCD's numbered equations as pure functions. Paper letters: see the table in README.md."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from shared.losses import nce


def critic(cosine: Tensor, *, n: int, m: int, tau: float, log_z: float | Tensor = 0.0) -> Tensor:
    """Eq. 10: h = e^(cos / tau) / (e^(cos / tau) + n / m), in [0, 1].

    cosine: any shape, h_1(v^t) . h_2(v^{t,s}) of unit vectors. n: negatives. m: training-set size.
    log_z (ours, 0 in the paper): the log of a normaliser that divides e^(cos / tau), as CRD has.
    """
    return torch.sigmoid(cosine / tau - math.log(n / m) - log_z)


def L_rcd(
    query: Tensor,
    positive: Tensor,
    negatives: Tensor,
    *,
    tau: float,
    m: int,
    log_z: float | Tensor = 0.0,
) -> Tensor:
    """Eq. 11: mean over B of -ln h(positive) - sum over the n negatives of ln(1 - h(negative)).

    query: [B, d] = h_2(v^{t,s}); positive: [B, d], negatives: [B, n, d] = h_1(v^t); unit rows.
    Eq. 7 writes n * E and Eq. 11 n * sum; summing over the n draws is the first, and the second
    would count n twice. The paper sums over the batch; we take its mean, so that beta does not
    depend on the batch size.

    train.py never holds `negatives`: it calls `nce` on the scores of the kernel.
    """
    cos_pos = (query * positive).sum(-1)
    cos_neg = (negatives @ query[:, :, None]).squeeze(-1)
    return nce(cos_pos, cos_neg, tau=tau, m=m, log_z=log_z)


def L_kd(z_s: Tensor, z_t: Tensor, rho: float) -> Tensor:
    """Eq. 12 as printed: rho^2 * H(softmax(z^t / rho), softmax(z^s / rho)), mean over the batch.

    z_s, z_t: [B, C]. train.py uses shared.losses.kd, the KL divergence: same gradient, and 0 where
    the student agrees; it differs by rho^2 times the teacher's entropy.
    """
    p_t = F.softmax(z_t / rho, dim=1)
    return -(rho**2) * (p_t * F.log_softmax(z_s / rho, dim=1)).sum(1).mean()


def L_total(cls: Tensor, kd: Tensor, rcd: Tensor, *, alpha: float, beta: float) -> Tensor:
    """Eq. 13: L_cls + alpha L_kd + beta L_rcd, scalars."""
    return cls + alpha * kd + beta * rcd

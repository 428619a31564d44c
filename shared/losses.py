"""Losses that several papers use unchanged."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def kd(z_s: Tensor, z_t: Tensor, temperature: float) -> Tensor:
    """T^2 * KL(softmax(z_t / T) || softmax(z_s / T)), mean over the batch (Hinton et al. 2015).

    z_s, z_t: [B, C] logits of student and teacher. Computed in float32 (float64 when given it).
    Equals CRRCD's Eq. 12 up to T^2 times the teacher's entropy, which has no gradient.
    """
    work = torch.promote_types(z_s.dtype, torch.float32)
    log_s = F.log_softmax(z_s.to(work) / temperature, dim=1)
    log_t = F.log_softmax(z_t.to(work) / temperature, dim=1)
    return temperature**2 * F.kl_div(log_s, log_t, reduction="batchmean", log_target=True)


def nce(
    positive: Tensor, negatives: Tensor, *, tau: float, m: int, log_z: float | Tensor = 0.0
) -> Tensor:
    """Noise-contrastive loss in the log domain: the critic behind CRRCD's L_rcd and AIRD's RID.

    positive: [B], negatives: [B, n] cosines. With u = cosine / tau - ln(n / m) - log_z the critic
    is h = sigmoid(u) (CRRCD Eq. 10: e^(cos/tau) / (e^(cos/tau) + n/m) for log_z = 0), and the loss
    is the mean over B of -ln h(positive) - sum over n of ln(1 - h(negative)) (Eq. 11).
    tau: temperature. m: size of the training set. log_z: log of the critic's normaliser.
    Never exponentiates a score, so it is finite wherever the cosines are.
    Raises ValueError for n = 0.
    """
    n = negatives.shape[1]
    if n == 0:
        raise ValueError("nce needs at least one negative")
    offset = math.log(n / m)
    u_pos = positive / tau - offset - log_z
    u_neg = negatives / tau - offset - log_z
    return F.softplus(-u_pos).mean() + F.softplus(u_neg).sum(dim=1).mean()

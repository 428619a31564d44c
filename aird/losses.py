"""AIRD's numbered equations as pure functions. Paper letters: see the table in README.md."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from shared.losses import decoupled, kd, nce, target_split, warm_up

__all__ = ["L_iid", "L_rid", "L_total", "decoupled", "rid", "target_split", "warm_up"]


def L_rid(
    query: Tensor,
    positive: Tensor,
    negatives: Tensor,
    *,
    tau: float,
    m: int,
    log_z: float | Tensor = 0.0,
) -> Tensor:
    """Eq. 4: mean over B of -ln h(positive) - sum over the n negatives of ln(1 - h(negative)).

    query: [B, d] = r^{t,s}_{ij}; positive: [B, d] = r^t_{ij}; negatives: [B, n, d] = r^t_{ik};
    unit rows. The paper leaves h open; ours is CRD's, e^(cos/tau) / (e^(cos/tau) + n/m), m the size
    of the training set, log_z 0 or the log of a normaliser. Eq. 4 writes n * sum over q(k=0), an
    expectation in its source (CRD): summing over the n draws is that. The paper sums over the
    batch; we take its mean, so that beta does not depend on the batch size.

    train.py never holds `negatives`: it calls `rid` on the scores of the kernel.
    """
    cos_pos = (query * positive).sum(-1)
    cos_neg = (negatives @ query[:, :, None]).squeeze(-1)
    return nce(cos_pos, cos_neg, tau=tau, m=m, log_z=log_z)


def rid(
    cos_pos: Tensor,
    cos_neg: Tensor,
    paired: Tensor,
    *,
    tau: float,
    m: int,
    log_z: float | Tensor = 0.0,
) -> Tensor:
    """L_rid of cosines [B] and [B, n], without the samples whose `paired` [B] (bool) is False.

    They add 0 to the sum, which is still divided by B: every pair weighs the same in every batch.
    """
    # a score of -inf (+inf for the positive) costs nothing and has no gradient
    cos_pos = torch.where(paired, cos_pos, torch.inf)
    cos_neg = torch.where(paired[:, None], cos_neg, -torch.inf)
    return nce(cos_pos, cos_neg, tau=tau, m=m, log_z=log_z)


def L_iid(
    z_t: Tensor,
    z_s: Tensor,
    y: Tensor,
    *,
    temperature: float = 1.0,
    mode: Literal["paper", "dkd"] = "paper",
    target: float = 1.0,
    non_target: float = 8.0,
) -> Tensor:
    """Eq. 6, mean over the batch, times T^2 (ours, as in Hinton et al. 2015).

    z_t, z_s: [B, C] logits of teacher and student, y: [B] labels.
    paper: TCKD + (1 - p_t^tar) NCKD as printed, which is KL(teacher || student) and computed as
    that. dkd: target * TCKD + non_target * NCKD (Decoupled KD, Zhao et al. 2022), the weights that
    the printed equation ties together; `target` and `non_target` are read in this mode only.
    Computed in float32 (float64 when given it). Raises ValueError for another mode, and in dkd for
    fewer than two classes.
    """
    if mode == "paper":
        return kd(z_s, z_t, temperature)
    if mode != "dkd":
        raise ValueError(f"no mode {mode!r} of L_iid; there are: paper, dkd")
    tckd, nckd, _ = decoupled(z_t, z_s, y, temperature)
    return temperature**2 * (target * tckd + non_target * nckd).mean()


def L_total(cls: Tensor, iid: Tensor, rid: Tensor, *, alpha: float, beta: float) -> Tensor:
    """Eq. 7: alpha L_iid + beta L_rid + L_cls, scalars."""
    return alpha * iid + beta * rid + cls

"""AIRD's numbered equations as pure functions. Paper letters: see the table in README.md."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from shared.kernels.dispatch import without_autocast
from shared.losses import kd, nce


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


def target_split(z: Tensor, y: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Eq. 5 in logarithms: (ln p^tar [B], ln(1 - p^tar) [B]) of softmax(z / T).

    z: [B, C], y: [B]. The paper exponentiates "probabilities"; read: logits. The second is a
    log-sum-exp over the other classes and not 1 - p^tar, so it stays exact where p^tar rounds to 1.
    """
    log_tar, log_rest, _ = _split(z / temperature, y)
    return log_tar, log_rest


def decoupled(
    z_t: Tensor, z_s: Tensor, y: Tensor, temperature: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """The parts of Eq. 6: (TCKD [B], NCKD [B], 1 - p_t^tar [B]), without T^2.

    TCKD: KL between the teacher's and the student's (p^tar, 1 - p^tar). NCKD: KL between their
    distributions over the other classes. KL(teacher || student) = TCKD + (1 - p_t^tar) NCKD
    (Zhao et al., CVPR 2022). Computed in float32 (float64 when given it).
    Raises ValueError for fewer than two classes.
    """
    if z_t.shape != z_s.shape or z_t.shape[1] < 2:
        raise ValueError(
            f"logits of teacher {tuple(z_t.shape)} and student {tuple(z_s.shape)}: both must be "
            "[B, C] of the same C >= 2"
        )
    work = torch.promote_types(z_s.dtype, torch.float32)
    with without_autocast(z_s):
        tar_t, rest_t, others_t = _split(z_t.to(work) / temperature, y)
        tar_s, rest_s, others_s = _split(z_s.to(work) / temperature, y)
        tckd = tar_t.exp() * (tar_t - tar_s) + rest_t.exp() * (rest_t - rest_s)
        nckd = (others_t.exp() * (others_t - others_s)).sum(1)
    return tckd, nckd, rest_t.exp()


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


def warm_up(epoch: int, epochs: int) -> float:
    """Factor on L_iid in mode dkd: min((epoch + 1) / epochs, 1), epoch from 0 (Zhao et al. 2022).

    epochs: length of the linear rise; 0: none.
    """
    return min((epoch + 1) / epochs, 1.0) if epochs else 1.0


def L_total(cls: Tensor, iid: Tensor, rid: Tensor, *, alpha: float, beta: float) -> Tensor:
    """Eq. 7: alpha L_iid + beta L_rid + L_cls, scalars."""
    return alpha * iid + beta * rid + cls


def _split(z: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """ln p^tar [B], ln(1 - p^tar) [B], and ln of the softmax over the other classes [B, C].

    That one is 0 at the target, in both networks, and so adds nothing to a divergence.
    """
    y = y[:, None]
    total = torch.logsumexp(z, dim=1, keepdim=True)
    others = z.scatter(1, y, -torch.inf)
    rest = torch.logsumexp(others, dim=1, keepdim=True)
    log_tar, log_rest = (z.gather(1, y) - total).squeeze(1), (rest - total).squeeze(1)
    return log_tar, log_rest, (others - rest).scatter(1, y, 0)

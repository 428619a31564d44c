"""Losses that several papers use unchanged."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from shared.kernels import pairwise_distance
from shared.kernels.dispatch import without_autocast


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


def target_split(z: Tensor, y: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """(ln p^tar [B], ln(1 - p^tar) [B]) of softmax(z / T), p^tar the label's (AIRD Eq. 5).

    z: [B, C], y: [B]. AIRD exponentiates "probabilities"; read: logits. The second is a
    log-sum-exp over the other classes and not 1 - p^tar, so it stays exact where p^tar rounds to 1.
    """
    log_tar, log_rest, _ = _split(z / temperature, y)
    return log_tar, log_rest


def decoupled(
    z_t: Tensor, z_s: Tensor, y: Tensor, temperature: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """The parts of DKD and AIRD Eq. 6: (TCKD [B], NCKD [B], 1 - p_t^tar [B]), without T^2.

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


def warm_up(epoch: int, epochs: int) -> float:
    """DKD's factor on its loss: min((epoch + 1) / epochs, 1), epoch from 0 (Zhao et al. 2022).

    epochs: length of the linear rise; 0: none.
    """
    return min((epoch + 1) / epochs, 1.0) if epochs else 1.0


def triplet(e: Tensor, y: Tensor, margin: float) -> Tensor:
    """Batch-hard triplet loss (EmbedKD Eq. 1): mean over anchors of max(0, d_+ - d_- + margin).

    e: [B, D] embeddings, y: [B] labels. d_+ is the anchor's largest distance to another row of its
    class, d_- its smallest to a row of another class, unsquared. Rows that tie share the gradient,
    and distance 0 has subgradient 0. An anchor that lacks either kind in the batch does not count;
    with none left the loss is 0, with a gradient of 0.
    Computed in float32 (float64 when given it). Memory: O(B^2).
    """
    d = pairwise_distance(at_least_float32(e))
    same = y[:, None] == y
    # the anchor is among its own class here: at distance 0 it is never farther than a positive
    positive = torch.where(same, d, 0).amax(1)
    negative = torch.where(same, torch.inf, d).amin(1)
    counts = (same.sum(1) > 1) & ~same.all(1)
    # a product and not a choice: a NaN stays one
    return (F.relu(positive - negative + margin) * counts).sum() / counts.sum().clamp(min=1)


def unit_maps(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Attention maps as unit vectors of one size: [B, h, w] of student and teacher -> two [B, h w].

    Where the sizes differ, the larger is averaged (adaptive pooling) to the smaller before it is
    flattened and L2-normalised; the sources of attention transfer compare maps of equal size only.
    """
    if a.shape[1:] != b.shape[1:]:  # the gradient of pooling is not deterministic on CUDA
        size = min(a.shape[1], b.shape[1]), min(a.shape[2], b.shape[2])
        a, b = (F.adaptive_avg_pool2d(x, size) for x in (a, b))
    return unit(a.flatten(1)), unit(b.flatten(1))


def unit(x: Tensor) -> Tensor:
    """x / |x| over the last dimension, any shape. A row of zeros stays one, with gradient 0."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x / torch.where(norm == 0, torch.inf, norm)


def at_least_float32(x: Tensor) -> Tensor:
    """x in float32; float64 stays float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def same_shape(loss: str, student: Tensor, teacher: Tensor) -> None:
    """Raises ValueError, which names the loss, unless both have one shape: nothing broadcasts."""
    if student.shape != teacher.shape:
        raise ValueError(
            f"{loss}: student {tuple(student.shape)} and teacher {tuple(teacher.shape)} differ in "
            "shape; project one to the other first"
        )


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

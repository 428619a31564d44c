"""Losses that several papers use unchanged."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from shared.kernels import pairwise_distance


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

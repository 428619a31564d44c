"""HORKD's numbered equations as pure functions. Paper letters: see the table in README.md.

f: features of the teacher, g: of the student, rows of one mini-batch of m. Eq. 1 sums each loss
over the n-tuples of distinct rows; reduction "sum" is that, "mean" divides by the number of tuples,
and "rkd" counts as the published RKD code does. Only g receives gradient. Computed in float32
(float64 when given it), also under autocast. A NaN in any input gives NaN.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from shared.kernels import angle_loss, center_distance_loss, distance_loss
from shared.kernels.reductions import Reduction
from shared.losses import at_least_float32, same_shape

CHUNK = 1 << 14  # rows that class_centers holds in float64 at a time


def L1(f: Tensor, g: Tensor, *, reduction: Reduction = "sum") -> Tensor:
    """Eq. 2: sum over i of |f_i - g_i|_1, the sum of absolute differences.

    f, g: [m, D]. reduction: "mean" divides by the m images, and not by their D elements; "rkd" (RKD
    has no such term) is the same. Raises ValueError where the shapes differ: the paper is silent on
    features of two sizes, which train.py projects first. Subgradient 0 where elements are equal.
    """
    same_shape("L1", g, f)
    total = (at_least_float32(g) - f.detach()).abs().sum()
    if reduction == "sum":
        return total
    if reduction in ("mean", "rkd"):
        return total / max(1, len(g))
    raise ValueError(f"L1: no reduction {reduction!r}; there are: mean, sum, rkd")


def L2(
    f: Tensor,
    g: Tensor,
    *,
    reduction: Reduction = "sum",
    penalty: Literal["squared", "huber"] = "squared",
) -> Tensor:
    """Eq. 3: sum over pairs {i, j} of (|f_i - f_j| / mu_f - |g_i - g_j| / mu_g)^2.

    f: [m, D_t], g: [m, D_s]. mu: mean distance of the pairs, one for each network; the student's
    carries gradient. Ours: each unordered pair counts once, as in the paper's C(m, 2) tuples, and
    duplicates (distance 0) do not enter mu, as in RKD. penalty: "huber" (delta 1, RKD's) instead of
    the paper's square. reduction: "rkd" is the mean over all m^2 ordered entries.
    """
    return distance_loss(at_least_float32(g), f, penalty=penalty, reduction=reduction)


def L3(f: Tensor, g: Tensor, *, reduction: Reduction = "sum") -> Tensor:
    """Eq. 4-5: sum over angles of h(cos_f - cos_g), h the Huber loss with delta 1 (ours).

    f: [m, D_t], g: [m, D_s]. The cosine at vertex j of (i, j, k) is that of f_i - f_j and
    f_k - f_j. Ours, since the paper counts C(m, 3) triples and does not say which vertex: all three
    angles of every unordered triple of distinct rows. An angle with an arm of length 0 in either
    network counts as 0. reduction: "mean" divides by m (m - 1) (m - 2) / 2 angles; "rkd" is the
    mean over all m^3 ordered entries.
    """
    return angle_loss(at_least_float32(g), f, reduction=reduction)


def L_C(f: Tensor, g: Tensor, u: Tensor, *, reduction: Reduction = "sum") -> Tensor:
    """Eq. 7: sum over i and c of (|f_i - u_c| - |g_i - u_c|)^2.

    f, g: [m, D], u: [C, D] of `class_centers`. reduction: "mean" divides by m C; "rkd" (RKD has no
    such term) is the same. Raises ValueError for shapes that do not fit.
    """
    mean = "mean" if reduction == "rkd" else reduction
    return center_distance_loss(at_least_float32(g), f, u, reduction=mean)


def class_centers(f: Tensor, y: Tensor, classes: int) -> Tensor:
    """Eq. 6: u_c, the mean of the features of class c; [C, D] in float32 (float64 when given it).

    f: [N, D] features of the teacher, y: [N] labels in 0 ... classes - 1, C = classes. The paper
    sums over chi^1, its mini-batch; ours: the whole training set, since a batch lacks classes.
    Summed in float64 on the CPU, so the same bits everywhere.
    Raises ValueError for labels that do not fit, and naming the first class without an image.
    """
    if len(y) != len(f) or (len(y) and not 0 <= int(y.min()) <= int(y.max()) < classes):
        raise ValueError(
            f"class_centers: {len(f)} features and {len(y)} labels do not fit; "
            f"give each feature a label from 0 to {classes - 1}"
        )
    y = y.cpu()
    counts = torch.bincount(y, minlength=classes)
    if len(empty := (counts == 0).nonzero()):
        raise ValueError(
            f"class_centers: class {int(empty[0])} of {classes} has no image; "
            "leave it out of the labels or add images of it"
        )
    sums = torch.zeros(classes, f.shape[1], dtype=torch.float64)
    for part, labels in zip(f.detach().split(CHUNK), y.split(CHUNK), strict=True):
        sums.index_add_(0, labels, part.cpu().double())
    return (sums / counts[:, None]).to(f.device, torch.promote_types(f.dtype, torch.float32))

"""EmbedKD's numbered equations as pure functions. Paper letters: see the table in README.md.

e_s, e_t: embeddings of student and teacher, rows of one batch; a, b: feature maps of student and
teacher at one stage. Only the student's receive gradient. Computed in float32 (float64 when given
it), also under autocast. A NaN in any input gives NaN.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from shared.kernels import dispatch, pairwise_distance
from shared.losses import at_least_float32, same_shape, unit_maps
from shared.losses import triplet as triplet  # Eq. 1


def absolute(e_s: Tensor, e_t: Tensor) -> Tensor:
    """Eq. 4, the absolute teacher: mean over the batch of |F^S(x_i) - F^T(x_i)|, unsquared.

    e_s, e_t: [B, D]. The mean over the batch is ours (and the official code's): the paper prints
    one image. Subgradient 0 where both are equal. Raises ValueError where the shapes differ.
    """
    same_shape("absolute", e_s, e_t)
    return torch.linalg.vector_norm(at_least_float32(e_s) - e_t.detach(), dim=1).mean()


def relative(
    e_s: Tensor, e_t: Tensor, mode: Literal["mean_abs", "frobenius"] = "mean_abs"
) -> Tensor:
    """Eq. 5-6, the relative teacher: |d^S_ij - d^T_ij|, d_ij = |F(x_i) - F(x_j)|, unsquared.

    e_s: [B, D_s], e_t: [B, D_t]. mean_abs: the mean over pairs i < j (the mean is ours: the paper
    prints one pair). frobenius: the Frobenius norm of the B x B matrix of differences, as the
    official code takes it: B times their root mean square, so a lambda that goes with it holds for
    one batch size only. Subgradient 0 where distances agree. Fewer than two rows: 0.
    Memory: O(B^2). Raises ValueError for another mode and for other numbers of rows.
    """
    dispatch.same_rows("relative", e_s, e_t)
    d_s, d_t = (pairwise_distance(at_least_float32(e)) for e in (e_s, e_t.detach()))
    if mode == "frobenius":
        return torch.linalg.vector_norm(d_s - d_t)
    if mode != "mean_abs":
        raise ValueError(f"relative: no mode {mode!r}; there are: mean_abs, frobenius")
    # each pair is there twice, and the diagonal is 0
    return (d_s - d_t).abs().sum() / max(1, len(d_s) * (len(d_s) - 1))


def hint(a: Tensor, b: Tensor) -> Tensor:
    """Eq. 8: mean over all elements of (F^S_hint - F^T_hint)^2.

    a, b: [B, C, h, w]. The paper prints the norm of the difference and no reduction; ours is the
    mean square, as in FitNets (Romero et al. 2015), which it cites for it: stages of every size
    then weigh alike in rho. Raises ValueError where the shapes differ.
    """
    same_shape("hint", a, b)
    return F.mse_loss(at_least_float32(a), at_least_float32(b.detach()))


def attention_map(maps: Tensor) -> Tensor:
    """Eq. 10: A_sum, the sum over channels of |F|; [B, C, h, w] -> [B, h, w]."""
    return at_least_float32(maps).abs().sum(1)


def attention(a: Tensor, b: Tensor) -> Tensor:
    """Eq. 11: mean over the batch of |A^T / |A^T| - A^S / |A^S||, A of Eq. 10, flattened.

    a: [B, C_s, h, w], b: [B, C_t, h', w']. Ours: the mean over the batch, and for other h, w the
    average of the larger map at the size of the smaller (`unit_maps`). A map of zeros, as ReLU may
    leave, stays 0 and has no gradient; subgradient 0 where both maps are equal.
    """
    dispatch.same_rows("attention", a, b)
    student, teacher = unit_maps(attention_map(a), attention_map(b.detach()))
    return torch.linalg.vector_norm(student - teacher, dim=1).mean()

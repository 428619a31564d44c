"""BTNet's numbered equations as pure functions. Paper letters: see the table in README.md."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from shared.losses import at_least_float32, same_shape


def L_influence(feature: Tensor, y: Tensor, head: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Eq. 1: the classification loss of a branch under kappa*, mean over the batch.

    feature: [B, D] embeddings of the branch, y: [B] labels, head: the trunk's classifier, whose
    weight is kappa* (CurricularFace in the paper, others in its Table 4). Cross-entropy of the
    head's logits; a head's regulariser (`head.penalty`) is not in it. The paper fixes kappa*;
    that is the head's to do, its running statistics move.
    """
    return F.cross_entropy(head(feature, y), y)


def L_branch(
    z_r: Tensor, z_s: Tensor, *, mode: Literal["official", "paper"] = "official"
) -> Tensor:
    """Eq. 2: (1 / V) sum over v of (z_{r_v} - z_{s_v})^2.

    z_r: [B, C, r, r] output of the branch, z_s: the same of the pretrained trunk on the HR view,
    which receives no gradient. paper: V is "the batch size", so B divides the sum of all squares.
    official: the mean over all elements, as in the authors' code: C r^2 times smaller, 50,176 at
    r = 14. Computed in float32 (float64 when given it). Raises ValueError for shapes that differ,
    and for another mode.
    """
    same_shape("L_branch", z_r, z_s)
    squares = (at_least_float32(z_r) - z_s.detach()).square()
    if mode == "paper":
        return squares.sum() / len(z_r)
    if mode == "official":
        return squares.mean()
    raise ValueError(f"L_branch: no mode {mode!r}; there are: official, paper")


def L_total(influence: Tensor, branch: Tensor, lambda_branch: float) -> Tensor:
    """Eq. 3: L_influence + lambda_branch L_branch, scalars. The paper's weight is .5 throughout."""
    return influence + lambda_branch * branch


def gain_cross(m: float, m_hr: float, m_mr: float) -> float:
    """Eq. 4: (M(phi) - M(phi_hr)) / |M(phi_mr) - M(phi_hr)| of two different resolutions.

    m, m_hr, m_mr: the metric of the model, of phi_hr and of phi_mr, in one unit. nan (ours) where
    the two baselines agree.
    """
    return _gain(m, m_hr, m_mr)


def gain_same(m: float, m_hr: float, m_r: float) -> float:
    """Eq. 5: (M(phi) - M(phi_hr)) / |M(phi_r) - M(phi_hr)| at one resolution r.

    As `gain_cross`; m_r: the metric of phi_r, the member of phi_mm that is trained at r.
    """
    return _gain(m, m_hr, m_r)


def _gain(m: float, m_hr: float, baseline: float) -> float:
    if baseline == m_hr:
        return math.nan
    return (m - m_hr) / abs(baseline - m_hr)

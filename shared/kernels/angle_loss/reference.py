"""The equation of `angle_loss`, readable; autograd gives its gradient. Holds [N, N, D] and N^3."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from shared.kernels.triplet_angles.reference import arms


def angle_loss(student: Tensor, teacher: Tensor, delta: float) -> Tensor:
    """Sum over j and unordered {i, k}."""
    e_s, e_t = arms(student), arms(teacher)  # [N, N, D]: unit vectors from j to i
    there = (e_s.any(-1) & e_t.any(-1)).to(student.dtype)  # 0 on degenerate arms
    error = F.huber_loss(
        torch.einsum("jid,jkd->jik", e_s, e_s),
        torch.einsum("jid,jkd->jik", e_t, e_t),
        reduction="none",
        delta=delta,
    )
    # both orders of {i, k} are there; i = k adds h(1 - 1) = 0
    return 0.5 * (error * there[:, :, None] * there[:, None, :]).sum()

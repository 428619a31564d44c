"""The equation of `triplet_angles`, readable; autograd gives its gradient."""

from __future__ import annotations

import torch
from torch import Tensor


def arms(x: Tensor) -> Tensor:
    """[N, D] -> [N, N, D]: out[j, i] = (x_i - x_j) / |x_i - x_j|, 0 (and no gradient) where equal.

    The largest coordinate is divided out first: squares of very small ones would underflow.
    """
    difference = x[None, :, :] - x[:, None, :]
    largest = difference.detach().abs().amax(-1, keepdim=True) if x.shape[1] else difference
    same = largest == 0
    difference = difference / torch.where(same, 1, largest)
    square = difference.square().sum(-1, keepdim=True)
    return torch.where(same, 0, difference / torch.where(same, 1, square).sqrt())


def triplet_angles(x: Tensor) -> Tensor:
    e = arms(x)
    return torch.einsum("jid,jkd->ijk", e, e)

"""The equation of `nce_scores`, readable; autograd gives its gradient. Holds [B, K, D] twice."""

from __future__ import annotations

from torch import Tensor


def forward(query: Tensor, bank: Tensor, index: Tensor) -> Tensor:
    return (query[:, None] * bank[index]).sum(-1)

"""The equation of `relation_scores`, readable; autograd gives its gradient."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def relation_scores(
    query: Tensor,
    anchor: Tensor,
    bank: Tensor,
    index: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
) -> Tensor:
    key = F.relu(anchor[:, None, :] - bank[index])  # [B, K, d]
    if weight is not None:
        key = key @ weight  # [B, K, e]
    if bias is not None:
        key = key + bias
    key = F.normalize(key, dim=-1)
    return (key @ query[:, :, None]).squeeze(-1)

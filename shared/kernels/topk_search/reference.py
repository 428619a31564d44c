"""The meaning of `topk_search`, readable: every score in float64, a stable sort. [Q, G, D].

On devices other than the CPU and CUDA, of which some have no float64, in the type of the rows.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def topk_search(queries: Tensor, gallery: Tensor, k: int, cosine: bool) -> tuple[Tensor, Tensor]:
    work = torch.float64 if queries.device.type in ("cpu", "cuda") else queries.dtype
    q, g = queries.to(work), gallery.to(work)
    if cosine:
        scores = (_unit(q)[:, None] * _unit(g)).sum(-1)
    else:
        scores = torch.linalg.vector_norm(q[:, None] - g, dim=-1)
    usable = q.isfinite().all(1)[:, None] & g.isfinite().all(1)
    scores = scores.where(usable, torch.nan)
    rank = scores.where(usable, -torch.inf if cosine else torch.inf)
    indices = rank.sort(dim=1, descending=cosine, stable=True)[1][:, :k]
    return scores.gather(1, indices).to(queries.dtype), indices


def _unit(x: Tensor) -> Tensor:
    return F.normalize(x, dim=-1, eps=torch.finfo(x.dtype).tiny)

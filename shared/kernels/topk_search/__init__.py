"""The k nearest rows of a gallery for each query, without holding [Q, G]."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from shared.kernels import dispatch

OP = "topk_search"


def topk_search(
    queries: Tensor,
    gallery: Tensor,
    k: int,
    *,
    metric: Literal["cosine", "euclidean"] = "cosine",
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """(scores [Q, k], indices [Q, k] int64 into the gallery), the nearest first. No gradient.

    queries: [Q, D], gallery: [G, D]. metric: "cosine" gives cosines, descending (0 with a row of
    zeros); "euclidean" gives distances, ascending (exactly 0 between equal rows). Equal scores go
    by the lower index. A row that holds NaN or inf (or, in float64, is longer than 1e154) scores
    NaN with every other, and NaN comes last, by index. k = 0 or Q = 0: empty results.

    Exact: matrix products only choose candidates, whose scores are measured in float64 from the
    rows as given; on the CPU no true neighbour is lost to rounding, whatever precision torch is
    told to give its products (cpu.py says how). On CUDA that holds of float32 products; where TF32
    is allowed, the sums of tensor cores are not in the bound. So ties are those of the float64
    scores, before rounding to the result's type: near-duplicates that differ come in their true
    order.

    Memory: a copy of the gallery, the results, and tiles and lists of candidates: a few MiB, up to
    some 100 MiB where k is in the thousands. Cost: Q G D as tiles of a product, and D for each of
    k + 8 candidates (k + k / 8 if that is more). A query with more near-ties about place k than
    that allows (1e-5 of a cosine) is done again in float64, and where even that leaves ties,
    against the whole gallery: several times slower, and rare in ordinary data. For one query, or k
    near G, a product and torch.topk are faster (by 1.3, and by 1.6 at k = G / 6).
    backend: "cpu" goes by tiles; without numba, and on CUDA, where "auto" takes them too, they are
    plain torch. "reference" holds [Q, G, D] in float64; "auto" takes it on other devices, of which
    some have no float64: there it computes, and ranks, in the type of the rows.
    Raises ValueError for shapes that do not fit, k below 0 or above G, another metric, and a
    backend that cannot take the tensors.
    """
    dispatch.matrix(OP, "queries", queries)
    dispatch.matrix(OP, "gallery", gallery)
    if queries.shape[1] != gallery.shape[1]:
        raise ValueError(
            f"{OP}: queries {tuple(queries.shape)} and gallery {tuple(gallery.shape)} differ in "
            "their columns"
        )
    if not 0 <= k <= len(gallery):
        raise ValueError(f"{OP}: k is {k}; it should be 0 to {len(gallery)}, the gallery's rows")
    if metric not in ("cosine", "euclidean"):
        raise ValueError(f"{OP}: no metric {metric!r}; there are: cosine, euclidean")
    path = dispatch.choose(OP, backend, queries, gallery, paths=("reference", "cpu"))
    with torch.no_grad():
        (q, g), dtype = dispatch.common(OP, queries.detach(), gallery.detach())
        scores, indices = _topk_search(q, g, k, metric == "cosine", path)
    return scores.to(dtype), indices


@torch.library.custom_op("lowres::topk_search", mutates_args=())
def _topk_search(
    queries: Tensor, gallery: Tensor, k: int, cosine: bool, path: str
) -> tuple[Tensor, Tensor]:
    with dispatch.without_autocast(queries):
        return dispatch.module(OP, path).topk_search(queries, gallery, k, cosine)


@_topk_search.register_fake
def _(queries: Tensor, gallery: Tensor, k: int, cosine: bool, path: str) -> tuple[Tensor, Tensor]:
    shape = (len(queries), k)
    return queries.new_empty(shape), queries.new_empty(shape, dtype=torch.int64)


dispatch.in_float32(_topk_search)

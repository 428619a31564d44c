"""Scores of relation vectors against queries: the inner product of CRRCD's Eq. 10."""

from __future__ import annotations

from torch import Tensor

from shared.kernels.relation_scores import cpu, reference

BACKENDS = ("auto", "reference", "cpu")


def relation_scores(
    query: Tensor,
    anchor: Tensor,
    bank: Tensor,
    index: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    temperature: float = 1.0,
    backend: str = "auto",
) -> Tensor:
    """norm(relu(anchor_b - bank_index[b,k]) @ weight + bias) . query_b / temperature

    query: [B, e], unit rows for cosines. anchor: [B, d]. bank: [M, d]. index: [B, K] int64 into
    bank. weight: [d, e], bias: [e]. Returns [B, K]; a relation vector of norm 0 scores 0.
    Differentiates query, anchor, bank, weight and bias. Source: CRRCD Sec. III-A and Eq. 10, with
    the two linear maps after the ReLU merged into `weight` and `bias`.

    backend: "reference" is the equation under autograd, which keeps several [B, K, d] tensors;
    "cpu" goes a few queries at a time with a backward of its own and keeps one; "auto" is "cpu"
    for CPU tensors. Raises ValueError for another backend, for "cpu" on another device and for
    shapes that do not fit.
    """
    if backend not in BACKENDS:
        raise ValueError(f"relation_scores has no backend {backend!r}; there are: {BACKENDS}")
    b, d = anchor.shape
    if query.shape[0] != b or index.shape[0] != b or bank.shape[1] != d or weight.shape[0] != d:
        raise ValueError(
            f"relation_scores: query {tuple(query.shape)}, anchor {tuple(anchor.shape)}, bank "
            f"{tuple(bank.shape)}, index {tuple(index.shape)}, weight {tuple(weight.shape)} "
            "do not fit [B,e], [B,d], [M,d], [B,K], [d,e]"
        )
    on_cpu = query.device.type == "cpu"
    if backend == "cpu" and not on_cpu:
        raise ValueError(f"relation_scores: backend 'cpu' takes CPU tensors, not {query.device}")
    path = cpu if on_cpu and backend != "reference" else reference
    return path.relation_scores(query, anchor, bank, index, weight, bias, temperature)

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.kernels import relation_scores
from shared.kernels.relation_scores import cpu


def inputs(b: int, k: int, m: int, d: int, e: int, seed: int = 0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)

    def r(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g, dtype=dtype).requires_grad_()

    index = torch.randint(m, (b, k), generator=g)
    return r(b, e), r(b, d), r(m, d), index, r(d, e), r(e)


def as_a_loop(query, anchor, bank, index, weight, bias, temperature: float) -> list[list[float]]:
    """norm(relu(anchor_b - bank_k) W + bias) . query_b / temperature, on Python floats."""
    q, a, n, w, c = (t.tolist() for t in (query, anchor, bank, weight, bias))
    rows = []
    for b, picked in enumerate(index.tolist()):
        row = []
        for k in picked:
            r = [max(0.0, x - y) for x, y in zip(a[b], n[k], strict=True)]
            v = [sum(r[i] * w[i][o] for i in range(len(r))) + c[o] for o in range(len(c))]
            norm = math.sqrt(sum(x * x for x in v))
            row.append(sum(x * y for x, y in zip(v, q[b], strict=True)) / norm / temperature)
        rows.append(row)
    return rows


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_value_matches_plain_loop(backend: str) -> None:
    args = inputs(3, 5, 7, 4, 6)
    found = relation_scores(*args, temperature=0.1, backend=backend)
    expected = torch.tensor(as_a_loop(*args, 0.1), dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("e", [1, 2, 4, 40])
@pytest.mark.parametrize("cancelling", [False, True])
def test_short_keys_lose_no_accuracy(e: int, cancelling: bool, cpu_path: str) -> None:
    """<r, r W W'> + ... in place of |r W + b|^2 is off by any factor where the key is short."""
    query, anchor, bank, index, weight, bias = inputs(8, 60, 90, 24, e, dtype=torch.float32)
    if cancelling:
        with torch.no_grad():
            r = torch.relu(anchor[3] - bank[index[3, 5]])
            bias.copy_(-1.001 * (r @ weight))
    args = [query, anchor, bank, index, weight, bias]

    def found(backend: str, dtype: torch.dtype) -> list[torch.Tensor]:
        given = [x.detach().to(dtype) if x.is_floating_point() else x for x in args]
        leaves = [x.requires_grad_() for x in given if x.is_floating_point()]
        scores = relation_scores(*given, backend=backend)
        return [scores.detach(), *torch.autograd.grad(scores.sum(), leaves)]

    truth = found("reference", torch.float64)
    eager, ours = found("reference", torch.float32), found("cpu", torch.float32)
    for t, a, b in zip(truth, eager, ours, strict=True):
        allowed = 4 * (a - t).abs().max() + 5e-6 * t.abs().max().clamp(min=1)
        assert (b - t).abs().max() <= allowed


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_gradcheck(backend: str) -> None:
    query, anchor, bank, index, weight, bias = inputs(3, 4, 5, 3, 4, seed=1)

    def f(*floats: torch.Tensor) -> torch.Tensor:
        q, a, n, w, c = floats
        return relation_scores(q, a, n, index, w, c, temperature=0.5, backend=backend)

    assert torch.autograd.gradcheck(f, (query, anchor, bank, weight, bias), atol=1e-6)


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 9), st.integers(1, 40), st.integers(1, 30), st.integers(1, 9), st.integers(1, 9)
)
def test_chunks_of_any_shape_give_the_reference(b: int, k: int, m: int, d: int, e: int) -> None:
    args = inputs(b, k, m, d, e, seed=b + k)
    wanted = relation_scores(*args, backend="reference")
    kept, cpu.CHUNK_BYTES = cpu.CHUNK_BYTES, 600  # a few queries a chunk, with a ragged tail
    try:
        found = relation_scores(*args, backend="cpu")
    finally:
        cpu.CHUNK_BYTES = kept
    torch.testing.assert_close(found, wanted, rtol=1e-8, atol=1e-10)


def test_float32_is_as_near_to_float64_as_the_reference_is() -> None:
    args = inputs(8, 33, 50, 32, 32, seed=3)
    truth = relation_scores(*args, backend="reference")
    single = [t.detach().float() if t.is_floating_point() else t for t in args]
    error = {
        backend: (relation_scores(*single, backend=backend).double() - truth).abs().max().item()
        for backend in ("reference", "cpu")
    }
    assert error["cpu"] <= error["reference"] + 1e-6 * truth.abs().max().item()


def test_a_relation_vector_of_zero_scores_zero_and_has_no_gradient() -> None:
    query = torch.ones(1, 2, requires_grad=True)
    anchor = torch.zeros(1, 3, requires_grad=True)
    bank = torch.ones(2, 3, requires_grad=True)  # relu(0 - 1) = 0
    weight = torch.ones(3, 2, requires_grad=True)
    scores = relation_scores(query, anchor, bank, torch.tensor([[0, 1]]), weight, backend="cpu")
    scores.sum().backward()
    assert (scores == 0).all()
    for leaf in (query, anchor, bank, weight):
        assert leaf.grad is not None and (leaf.grad == 0).all()


def test_no_bias_is_a_bias_of_zero() -> None:
    query, anchor, bank, index, weight, _ = inputs(2, 3, 4, 3, 3)
    none = relation_scores(query, anchor, bank, index, weight)
    zero = relation_scores(query, anchor, bank, index, weight, torch.zeros(3).double())
    assert torch.equal(none, zero)


def test_wrong_shapes_and_backends_are_named() -> None:
    query, anchor, bank, index, weight, bias = inputs(2, 3, 4, 3, 3)
    with pytest.raises(ValueError, match="do not fit"):
        relation_scores(query[:1], anchor, bank, index, weight, bias)
    with pytest.raises(ValueError, match="no backend 'tpu'"):
        relation_scores(query, anchor, bank, index, weight, bias, backend="tpu")

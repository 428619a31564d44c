from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.kernels import relation_scores
from shared.kernels.relation_scores import cpu

either = pytest.mark.parametrize("weighted", [True, False], ids=["weight", "no weight"])


def inputs(b: int, k: int, m: int, d: int, e: int | None, seed: int = 0, dtype=torch.float64):
    """e None: no weight."""
    g = torch.Generator().manual_seed(seed)

    def r(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g, dtype=dtype).requires_grad_()

    index = torch.randint(m, (b, k), generator=g)
    if e is None:
        return r(b, d), r(b, d), r(m, d), index, None, None
    return r(b, e), r(b, d), r(m, d), index, r(d, e), r(e)


def as_a_loop(query, anchor, bank, index, weight, bias, temperature: float) -> list[list[float]]:
    """norm(relu(anchor_b - bank_k) W + bias) . query_b / temperature, on Python floats."""
    q, a, n = (t.tolist() for t in (query, anchor, bank))
    rows = []
    for b, picked in enumerate(index.tolist()):
        row = []
        for k in picked:
            r = [max(0.0, x - y) for x, y in zip(a[b], n[k], strict=True)]
            v = r
            if weight is not None:
                w, c = weight.tolist(), bias.tolist()
                v = [sum(r[i] * w[i][o] for i in range(len(r))) + c[o] for o in range(len(c))]
            norm = math.sqrt(sum(x * x for x in v))
            row.append(sum(x * y for x, y in zip(v, q[b], strict=True)) / norm / temperature)
        rows.append(row)
    return rows


@either
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_value_matches_plain_loop(backend: str, weighted: bool, cpu_path: str) -> None:
    args = inputs(3, 5, 7, 5, 6 if weighted else None)
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


@either
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_gradcheck(backend: str, weighted: bool, cpu_path: str) -> None:
    args = inputs(3, 4, 5, 4, 3 if weighted else None, seed=1)

    def f(*floats: torch.Tensor) -> torch.Tensor:
        q, a, n, *maps = floats
        return relation_scores(
            q, a, n, args[3], *(maps or (None, None)), temperature=0.5, backend=backend
        )

    leaves = [x for x in args if x is not None and x.is_floating_point()]
    assert torch.autograd.gradcheck(f, leaves, atol=1e-6)


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 9), st.integers(1, 40), st.integers(1, 30), st.integers(1, 9),
    st.none() | st.integers(1, 9), st.booleans(),
)  # fmt: skip
def test_chunks_of_any_shape_give_the_reference(
    b: int, k: int, m: int, d: int, e: int | None, numba: bool
) -> None:
    args = inputs(b, k, m, d, e, seed=b + k)
    leaves = [x for x in args if x is not None and x.is_floating_point()]

    def found(backend: str) -> list[torch.Tensor]:
        scores = relation_scores(*args, backend=backend)
        return [scores, *torch.autograd.grad(scores.square().sum(), leaves)]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "CHUNK_BYTES", 600)  # a few queries a chunk, with a ragged tail
        patch.setattr(cpu, "NUMBA", cpu.NUMBA and numba)
        for ours, wanted in zip(found("cpu"), found("reference"), strict=True):
            torch.testing.assert_close(ours, wanted, rtol=1e-7, atol=1e-9)


@either
def test_float32_is_as_near_to_float64_as_the_reference_is(weighted: bool, cpu_path: str) -> None:
    args = inputs(8, 33, 50, 32, 32 if weighted else None, seed=3)
    truth = relation_scores(*args, backend="reference")
    single = [None if t is None else t.detach().float() for t in args]
    single[3] = args[3]
    error = {
        backend: (relation_scores(*single, backend=backend).double() - truth).abs().max().item()
        for backend in ("reference", "cpu")
    }
    assert error["cpu"] <= error["reference"] + 1e-6 * truth.abs().max().item()


@either
def test_a_relation_vector_of_zero_scores_zero_and_has_no_gradient(
    weighted: bool, cpu_path: str
) -> None:
    query = torch.ones(1, 2 if weighted else 3, requires_grad=True)
    anchor = torch.zeros(1, 3, requires_grad=True)
    bank = torch.ones(2, 3, requires_grad=True)  # relu(0 - 1) = 0
    weight = torch.ones(3, 2, requires_grad=True) if weighted else None
    scores = relation_scores(query, anchor, bank, torch.tensor([[0, 1]]), weight, backend="cpu")
    scores.sum().backward()
    assert (scores == 0).all()
    for leaf in (query, anchor, bank, *([weight] if weighted else [])):
        assert leaf.grad is not None and (leaf.grad == 0).all()


def test_without_a_weight_is_the_identity_as_weight() -> None:
    query, anchor, bank, index, _, _ = inputs(3, 8, 9, 6, None)
    eye = torch.eye(6, dtype=torch.float64)
    torch.testing.assert_close(
        relation_scores(query, anchor, bank, index, None),
        relation_scores(query, anchor, bank, index, eye),
    )


def test_no_bias_is_a_bias_of_zero() -> None:
    query, anchor, bank, index, weight, _ = inputs(2, 3, 4, 3, 3)
    none = relation_scores(query, anchor, bank, index, weight)
    zero = relation_scores(query, anchor, bank, index, weight, torch.zeros(3).double())
    assert torch.equal(none, zero)


def test_wrong_shapes_and_backends_are_named() -> None:
    query, anchor, bank, index, weight, bias = inputs(2, 3, 4, 3, 3)
    with pytest.raises(ValueError, match="do not fit"):
        relation_scores(query[:1], anchor, bank, index, weight, bias)
    with pytest.raises(ValueError, match=r"\[B,d\], \[B,d\], \[M,d\]$"):
        relation_scores(query[:, :2], anchor, bank, index, None)
    with pytest.raises(ValueError, match="a bias without a weight"):
        relation_scores(query, anchor, bank, index, None, bias)
    with pytest.raises(ValueError, match="weight is \\(3,\\); it should be"):
        relation_scores(query, anchor, bank, index, weight[0])
    with pytest.raises(ValueError, match="no backend 'tpu'"):
        relation_scores(query, anchor, bank, index, weight, bias, backend="tpu")

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from shared.kernels.nce_scores import cpu, nce_scores, reference

WAYS = ["product", "gathered", "gathered by torch"]


@pytest.fixture(params=WAYS)
def way(request, monkeypatch) -> str:
    """Each of the ways the CPU path can go, whatever it would choose."""
    take(request.param, monkeypatch)
    return request.param


def take(way: str, monkeypatch) -> None:
    monkeypatch.setattr(cpu, "dense_is_cheaper", lambda *_: way == "product")
    monkeypatch.setattr(cpu, "NUMBA", cpu.NUMBA and way == "gathered")


def inputs(b: int, k: int, m: int, d: int, seed: int = 0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    query = torch.randn(b, d, generator=g, dtype=torch.float64).to(dtype)
    bank = torch.randn(m, d, generator=g, dtype=torch.float64).to(dtype)
    return query, bank, torch.randint(m, (b, k), generator=g)


def as_a_loop(query, bank, index, temperature: float) -> torch.Tensor:
    q, n = query.tolist(), bank.tolist()
    rows = [
        [math.fsum(x * y for x, y in zip(q[b], n[i], strict=True)) / temperature for i in picked]
        for b, picked in enumerate(index.tolist())
    ]
    return torch.tensor(rows, dtype=torch.float64)


def gradients_as_a_loop(grad, query, bank, index, temperature: float):
    d_query, d_bank = torch.zeros_like(query), torch.zeros_like(bank)
    for b, picked in enumerate(index.tolist()):
        for k, i in enumerate(picked):
            d_query[b] += grad[b, k] / temperature * bank[i]
            d_bank[i] += grad[b, k] / temperature * query[b]
    return d_query, d_bank


def test_scores_and_gradients_match_plain_loops(way: str) -> None:
    query, bank, index = inputs(4, 11, 6, 5)  # each row of the bank is named several times
    query.requires_grad_(), bank.requires_grad_()
    grad = torch.randn(4, 11, dtype=torch.float64)
    for backend in ("cpu", "reference"):
        found = nce_scores(query, bank, index, temperature=0.07, backend=backend)
        torch.testing.assert_close(found.detach(), as_a_loop(query, bank, index, 0.07))
        expected = gradients_as_a_loop(grad, query.detach(), bank.detach(), index, 0.07)
        for a, b in zip(torch.autograd.grad(found, (query, bank), grad), expected, strict=True):
            torch.testing.assert_close(a, b)


def test_gradcheck(way: str) -> None:
    query, bank, index = inputs(3, 7, 5, 4, seed=1)
    leaves = query.requires_grad_(), bank.requires_grad_()
    f = lambda q, n: nce_scores(q, n, index, temperature=0.5, backend="cpu")  # noqa: E731
    assert torch.autograd.gradcheck(f, leaves)


@settings(max_examples=60, deadline=None)
@given(
    b=st.integers(0, 9),
    k=st.integers(0, 23),
    m=st.integers(1, 40),
    d=st.integers(0, 35),
    chunk=st.integers(1, 400),
    way=st.sampled_from(WAYS),
    seed=st.integers(0, 99),
)
def test_chunks_of_any_shape_give_the_reference(b, k, m, d, chunk, way, seed) -> None:
    query, bank, index = inputs(b, k, m, d, seed)
    grad = torch.randn(b, k, dtype=torch.float64)
    leaves = query.requires_grad_(), bank.requires_grad_()
    expected = reference.forward(query, bank, index)
    wanted = torch.autograd.grad(expected, leaves, grad)
    with pytest.MonkeyPatch.context() as patch:
        take(way, patch)
        patch.setattr(cpu, "DENSE", chunk)
        patch.setattr(cpu, "GATHER", chunk)
        found = nce_scores(query, bank, index, backend="cpu")
        gradients = torch.autograd.grad(found, leaves, grad)
    torch.testing.assert_close(found, expected)
    for a, c in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(a, c)


@pytest.mark.parametrize("wants", [(True, False), (False, True)])
def test_only_gradients_that_are_wanted(way: str, wants, monkeypatch) -> None:
    query, bank, index = inputs(3, 7, 5, 4)
    query.requires_grad_(wants[0]), bank.requires_grad_(wants[1])
    seen = []
    backward = cpu.backward
    monkeypatch.setattr(cpu, "backward", lambda *a: seen.append(backward(*a)) or seen[-1])
    nce_scores(query, bank, index, backend="cpu").sum().backward()
    ones = torch.ones(3, 7, dtype=torch.float64)
    d_query, d_bank = gradients_as_a_loop(ones, query.detach(), bank.detach(), index, 1.0)
    if wants[0]:
        torch.testing.assert_close(query.grad, d_query)
        assert bank.grad is None and seen[0][1].numel() == 0
    else:
        torch.testing.assert_close(bank.grad, d_bank)
        assert query.grad is None


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_rows_that_no_index_names_change_nothing(way: str, bad: float) -> None:
    """0 times inf is NaN: a product with the whole bank would spread it."""
    query, bank, index = inputs(3, 7, 5, 4)
    index[index == 2] = 1
    leaf, clean = query.clone().requires_grad_(), bank.clone()
    bank[2] = bad
    results = []
    for rows in (clean.requires_grad_(), bank.requires_grad_()):
        scores = nce_scores(leaf, rows, index, backend="cpu")
        results.append([scores, *torch.autograd.grad(scores.square().sum(), (leaf, rows))])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_nan_reaches_its_own_scores_and_gradients_alone(way: str) -> None:
    query, bank, _ = inputs(3, 2, 5, 4)
    index = torch.tensor([[0, 1], [1, 2], [3, 4]])
    query[0, 0] = math.nan
    leaves = query.requires_grad_(), bank.requires_grad_()
    scores = nce_scores(*leaves, index, backend="cpu")
    assert scores.isnan().tolist() == [[True, True], [False, False], [False, False]]
    d_query, d_bank = torch.autograd.grad(scores.sum(), leaves)
    assert d_query.isfinite().all()
    assert d_bank.isnan().any(1).tolist() == [True, True, False, False, False]


def test_the_cheaper_way_goes_by_the_measured_sizes() -> None:
    """Side by side on one thread, 32 x 4096 of 20k: product 16 ms, gathered 25."""
    if cpu.NUMBA:
        assert cpu.dense_is_cheaper(32, 4096, 20_000, 128, 4)
        assert cpu.dense_is_cheaper(64, 16384, 50_000, 128, 4)
        assert not cpu.dense_is_cheaper(96, 512, 4096, 128, 4)
        assert not cpu.dense_is_cheaper(96, 512, 50_000, 128, 4)
    assert not cpu.dense_is_cheaper(32, 4096, 1_000_000, 128, 4)


class Largest(TorchDispatchMode):
    """Numbers in the largest tensor that is made."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else [out]:
            if isinstance(x, torch.Tensor):
                self.numbers = max(self.numbers, x.untyped_storage().nbytes() // x.element_size())
        return out


def test_memory_is_the_result_and_a_bounded_chunk(way: str, monkeypatch) -> None:
    b, k, m, d = 16, 200, 300, 24
    monkeypatch.setattr(cpu, "DENSE", 1000)
    monkeypatch.setattr(cpu, "GATHER", 5000)
    query, bank, index = inputs(b, k, m, d)
    with Largest() as largest:
        scores = cpu.forward(query, bank, index)
        cpu.backward(torch.ones_like(scores), query, bank, index, True)
    assert largest.numbers <= max(b * k, m * d)  # the results; [B, K, D] would be 24 times that


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_bank_is_copied_only_where_its_type_is_another(dtype: torch.dtype, way: str) -> None:
    """As the docstring says: what is kept for the backward pass is the bank, or its float32."""
    query, bank, index = inputs(3, 7, 5, 4, dtype=dtype)
    kept = []
    pack = lambda x: kept.append(x) or x  # noqa: E731
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        nce_scores(query.requires_grad_(), bank, index, backend="cpu")
    (rows,) = (x for x in kept if x.shape == bank.shape)
    assert rows.dtype == torch.float32
    assert (rows.data_ptr() == bank.data_ptr()) == (dtype == torch.float32)


def test_same_bits_twice_and_all_written(way: str, poisoned: None) -> None:
    query, bank, index = inputs(7, 33, 12, 19, dtype=torch.float32)
    leaves = query.requires_grad_(), bank.requires_grad_()
    results = []
    for _ in "ab":
        scores = nce_scores(*leaves, index, backend="cpu")
        results.append([scores, *torch.autograd.grad(scores.square().sum(), leaves)])
    for a, b in zip(*results, strict=True):
        assert a.isfinite().all() and torch.equal(a, b)


def test_wrong_input_is_named_in_one_line() -> None:
    query, bank, index = inputs(3, 4, 5, 2)
    wrong = [
        ((query[0], bank, index), {}, r"query is \(2,\)"),
        ((query, bank[:, :1], index), {}, r"query \(3, 2\) and bank \(5, 1\) do not fit"),
        ((query, bank, index[:2]), {}, r"index is \(2, 4\); it should be \[3, K\]"),
        ((query, bank, index.int()), {}, "index is torch.int32; it should be torch.int64"),
        ((query, bank, index + 3), {}, "stay within 0 to 4"),
        ((query, bank, index - 5), {}, "index goes from -5"),
        ((query, bank, index), {"temperature": 0.0}, "temperature is 0.0; it should be positive"),
        ((query, bank, index), {"temperature": math.nan}, "temperature is nan"),
        ((query, bank[:0], index), {}, "stay within 0 to -1"),
    ]
    for arguments, more, message in wrong:
        for backend in ("cpu", "reference"):
            with pytest.raises(ValueError, match=message) as error:
                nce_scores(*arguments, backend=backend, **more)
            assert "\n" not in str(error.value)


def test_compiled_code_refuses_an_index_out_of_range() -> None:
    """There the check is in the op, as the graph has none."""
    query, bank, index = inputs(3, 4, 5, 2)
    torch._dynamo.reset()
    f = torch.compile(nce_scores, fullgraph=True, backend="eager")
    torch.testing.assert_close(f(query, bank, index), nce_scores(query, bank, index))
    with pytest.raises(ValueError, match="stay within 0 to 4"):
        f(query, bank, index + 5)

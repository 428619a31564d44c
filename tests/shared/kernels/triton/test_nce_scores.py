from __future__ import annotations

from importlib import import_module

import pytest
import torch

from tests.shared.kernels.triton.helpers import error, expanded, strided


@pytest.fixture
def op():
    return import_module("shared.kernels.nce_scores.triton")


def picks(make, b, k, m, seed=5):
    return torch.randint(m, (b, k), generator=torch.Generator().manual_seed(seed)).to(
        make(1).device
    )


def truth(grad, query, bank, index):
    """Scores and both gradients in float64, an entry at a time."""
    grad, query, bank = grad.double(), query.double(), bank.double()
    scores, d_query, d_bank = (
        torch.zeros_like(grad),
        torch.zeros_like(query),
        torch.zeros_like(bank),
    )
    for b, row in enumerate(index.tolist()):
        for k, i in enumerate(row):
            scores[b, k] = (query[b] * bank[i]).sum()
            d_query[b] += grad[b, k] * bank[i]
            d_bank[i] += grad[b, k] * query[b]
    return scores, d_query, d_bank


def check(op, grad, query, bank, index, bound):
    scores, d_query, d_bank = truth(grad, query, bank, index)
    assert error(op.forward(query, bank, index), scores) < bound
    found = op.backward(grad, query, bank, index, True)
    assert error(found[0], d_query) < bound
    assert error(found[1], d_bank) < bound


@pytest.mark.parametrize("b, k, m, d", [
    (1, 1, 1, 1), (2, 31, 5, 3), (3, 32, 15, 16), (2, 33, 16, 17), (3, 70, 17, 128), (1, 5, 40, 150)
])  # fmt: skip
def test_matches_plain_loop(op, make, b, k, m, d):
    query, bank, grad = make(b, d), make(m, d, seed=1), make(b, k, seed=2)
    check(op, grad, query, bank, picks(make, b, k, m), 1e-6)


def test_several_parts_of_the_query_gradient(op, make, monkeypatch):
    monkeypatch.setattr(op, "SPLIT", 64)
    query, bank, grad = make(2, 9), make(20, 9, seed=1), make(2, 150, seed=2)
    check(op, grad, query, bank, picks(make, 2, 150, 20), 1e-6)


def test_rows_that_no_entry_names_get_zero_and_change_nothing(op, make):
    query, bank, grad = make(3, 8), make(40, 8, seed=1), make(3, 6, seed=2)
    index = picks(make, 3, 6, 4) + 30
    check(op, grad, query, bank, index, 1e-6)
    clean = op.backward(grad, query, bank, index, True)
    bank[7] = torch.nan
    for a, b in zip(op.backward(grad, query, bank, index, True), clean, strict=True):
        assert torch.equal(a, b)


def test_the_gradient_of_the_bank_only_if_wanted(op, make):
    query, bank, grad = make(3, 8), make(9, 8, seed=1), make(3, 6, seed=2)
    index = picks(make, 3, 6, 9)
    d_query, nothing = op.backward(grad, query, bank, index, False)
    assert nothing.numel() == 0
    assert torch.equal(d_query, op.backward(grad, query, bank, index, True)[0])


@pytest.mark.parametrize("b, k, m, d", [(0, 4, 5, 3), (4, 0, 5, 3), (0, 4, 0, 3), (2, 3, 5, 0)])
def test_nothing_to_do(op, make, b, k, m, d):
    query, bank, grad = make(b, d), make(m, d, seed=1), make(b, k, seed=2)
    index = torch.zeros(b, k, dtype=torch.int64, device=query.device)
    assert error(op.forward(query, bank, index), torch.zeros(b, k)) == 0
    d_query, d_bank = op.backward(grad, query, bank, index, True)
    assert d_query.shape == (b, d) and d_bank.shape == (m, d)
    assert not d_query.any() and not d_bank.any()


def test_an_index_out_of_range_scores_nan_and_is_not_followed(op, make):
    query, bank, grad = make(2, 8), make(9, 8, seed=1), make(2, 3, seed=2)
    index = torch.tensor([[0, -1, 2], [9, 3, 1 << 40]], device=query.device)
    scores = op.forward(query, bank, index)
    assert scores.isnan().tolist() == [[False, True, False], [True, False, True]]
    d_query, d_bank = op.backward(grad, query, bank, index, True)
    inside = torch.where((index >= 0) & (index < 9), grad, 0)
    wanted = truth(inside, query, bank, index.clamp(0, 8))
    assert error(d_query, wanted[1]) < 1e-6 and error(d_bank, wanted[2]) < 1e-6


def test_nan_reaches_its_own_scores_and_gradients_alone(op, make):
    query, bank = make(3, 4), make(5, 4, seed=1)
    query[0, 0] = torch.nan
    index = torch.tensor([[0, 1], [1, 2], [3, 4]], device=query.device)
    scores = op.forward(query, bank, index)
    assert scores.isnan().tolist() == [[True, True], [False, False], [False, False]]
    d_query, d_bank = op.backward(torch.ones_like(scores), query, bank, index, True)
    assert d_query.isfinite().all()
    assert d_bank.isnan().any(1).tolist() == [True, True, False, False, False]


def test_other_types_and_strides(op, make):
    double = torch.float64
    given = make(2, 35, seed=2, dtype=double), make(2, 70, dtype=double), make(9, 70, dtype=double)
    check(op, *given, picks(make, 2, 35, 9), 1e-14)
    query, bank, grad = make(3, 8), make(9, 8, seed=1), make(3, 6, seed=2)
    index = picks(make, 3, 6, 9)
    apart = strided(query), strided(bank), strided(index)
    assert torch.equal(op.forward(*apart), op.forward(query, bank, index))
    found = op.backward(strided(grad), *apart, True)
    for a, b in zip(found, op.backward(grad, query, bank, index, True), strict=True):
        assert torch.equal(a, b)
    check(op, grad.new_ones(()).expand(3, 6), expanded(query, 3), bank, index, 1e-6)


def test_same_bits_twice(op, make, device):
    b, k, m, d = (64, 4096, 5000, 128) if device == "cuda" else (3, 40, 20, 24)
    query, bank, grad = make(b, d), make(m, d, seed=1), make(b, k, seed=2)
    index = picks(make, b, k, m)
    assert torch.equal(op.forward(query, bank, index), op.forward(query, bank, index))
    for a, c in zip(*(op.backward(grad, query, bank, index, True) for _ in "ab"), strict=True):
        assert torch.equal(a, c)

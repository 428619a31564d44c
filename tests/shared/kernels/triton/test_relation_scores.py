from __future__ import annotations

from importlib import import_module

import pytest
import torch
import torch.nn.functional as F

from tests.shared.kernels.triton.helpers import error, strided


@pytest.fixture
def op():
    return import_module("shared.kernels.relation_scores.triton")


def inputs(make, b, k, m, d, e=5, dtype=torch.float32):
    """anchor, bank, index, query, weight, bias, grad."""
    anchor, bank, query = make(b, d, dtype=dtype), make(m, d, seed=1), make(b, e, seed=2)
    generator = torch.Generator().manual_seed(5)
    index = torch.randint(m, (b, k), generator=generator).to(anchor.device)
    rest = make(d, e, seed=3), make(e, seed=4), make(b, k, seed=6)
    return anchor, bank.to(dtype), index, *(x.to(dtype) for x in (query, *rest))


def merged(query, weight, bias):
    """u, A, v, <b, q>, <b, b>: what the public function hands on."""
    return query @ weight.T, weight @ weight.T, weight @ bias, query @ bias, bias @ bias


def truth(anchor, bank, index, query, weight, bias, grad):
    """Scores by the definition in float64, and gradients through u, A and v alone."""
    anchor, bank, query, weight, bias, grad = (
        x.double() for x in (anchor, bank, query, weight, bias, grad)
    )
    r = F.relu(anchor[:, None] - bank[index])
    key = r @ weight + bias
    scores = (F.normalize(key, dim=2) * query[:, None]).sum(2)
    leaves = [x.requires_grad_() for x in (anchor, bank)]
    u, a, v, bq, bb = (x.detach().requires_grad_() for x in merged(query, weight, bias))
    r = F.relu(leaves[0][:, None] - leaves[1][index])
    square = ((r @ a) * r).sum(2) + 2 * r @ v + bb
    again = ((r * u[:, None]).sum(2) + bq[:, None]) / square.clamp(min=1e-24).sqrt()
    torch.testing.assert_close(again.detach(), scores)
    return scores, torch.autograd.grad((again * grad).sum(), (*leaves, u, a, v))


def check(op, given, bound):
    anchor, bank, index, query, weight, bias, grad = given
    u, a, v, bq, bb = merged(query, weight, bias)
    scores, dot, norm, kept = op.forward(anchor, bank, index, u, a, v, bq, bb, True)
    expected, gradients = truth(*given)
    assert error(scores, expected) < bound
    found = op.backward(grad, anchor, bank, index, u, a, v, dot, norm, kept)
    for x, y in zip(found, gradients, strict=True):
        assert error(x, y) < bound


@pytest.mark.parametrize("b, k, m, d", [
    (1, 1, 1, 1), (2, 31, 5, 3), (1, 32, 15, 16), (2, 33, 16, 17), (3, 20, 17, 33), (1, 3, 40, 70),
])  # fmt: skip
def test_matches_the_definition(op, make, b, k, m, d):
    check(op, inputs(make, b, k, m, d), 3e-6)


@pytest.mark.parametrize("chunk, parts", [(1, 1), (70, 3), (1 << 24, 64)])
def test_chunks_of_queries_and_parts_of_the_products(op, make, monkeypatch, chunk, parts):
    monkeypatch.setattr(op, "CHUNK", chunk)
    monkeypatch.setattr(op, "PARTS", parts)
    check(op, inputs(make, 3, 12, 7, 5), 3e-6)


def test_float64(op, make):
    check(op, inputs(make, 2, 33, 9, 18, dtype=torch.float64), 1e-12)


def test_rows_of_the_bank_that_no_entry_names(op, make):
    anchor, bank, index, query, weight, bias, grad = inputs(make, 2, 6, 5, 8)
    bank = torch.cat([bank, torch.full_like(bank[:1], torch.nan).expand(30, -1)])
    u, a, v, bq, bb = merged(query, weight, bias)
    _, dot, norm, kept = op.forward(anchor, bank, index, u, a, v, bq, bb, True)
    found = op.backward(grad, anchor, bank, index, u, a, v, dot, norm, kept)
    wanted = truth(anchor, bank[:5], index, query, weight, bias, grad)[1]
    assert not found[1][5:].any()
    for x, y in zip((found[0], found[1][:5], *found[2:]), wanted, strict=True):
        assert error(x, y) < 3e-6


def test_a_relation_of_norm_zero_scores_zero(op, make):
    anchor, bank, index, query, weight, bias, grad = inputs(make, 2, 6, 5, 8)
    bank = bank.abs() + 10  # all relations are 0
    u, a, v, bq, bb = merged(query, weight, 0 * bias)
    scores, dot, norm, kept = op.forward(anchor, bank, index, u, a, v, bq, bb, True)
    assert not scores.any()
    for x in op.backward(grad, anchor, bank, index, u, a, v, dot, norm, kept):
        assert not x.any()


@pytest.mark.parametrize("b, k, m, d", [(0, 4, 5, 3), (4, 0, 5, 3), (2, 3, 5, 0)])
def test_nothing_to_do(op, make, b, k, m, d):
    anchor, bank, index, query, weight, bias, grad = inputs(make, b, k, m, d)
    u, a, v, bq, bb = merged(query, weight, bias)
    scores, dot, norm, kept = op.forward(anchor, bank, index, u, a, v, bq, bb, True)
    assert scores.shape == (b, k) and scores.isfinite().all()
    found = op.backward(grad, anchor, bank, index, u, a, v, dot, norm, kept)
    for x, y in zip(found, (anchor, bank, u, a, v), strict=True):
        assert x.shape == y.shape and not x.any()


def test_an_index_out_of_range_scores_nan_and_is_not_followed(op, make):
    anchor, bank, index, query, weight, bias, _ = inputs(make, 2, 3, 9, 8)
    index = torch.tensor([[0, -1, 2], [9, 3, 1 << 40]], device=index.device)
    scores = op.forward(anchor, bank, index, *merged(query, weight, bias), False)[0]
    assert scores.isnan().tolist() == [[False, True, False], [True, False, True]]


@pytest.mark.parametrize("which", [0, 1])
def test_nan_reaches_its_own_scores(op, make, which):
    given = inputs(make, 3, 2, 5, 4)
    given[which][0, 1] = torch.nan
    index = torch.tensor([[0, 1], [1, 2], [3, 0]], device=given[2].device)
    anchor, bank, _, query, weight, bias, grad = given
    u, a, v, bq, bb = merged(query, weight, bias)
    scores, dot, norm, kept = op.forward(anchor, bank, index, u, a, v, bq, bb, True)
    named = [[True, True], [False, False], [False, False]]
    assert scores.isnan().tolist() == (named if which == 0 else (index == 0).tolist())
    found = op.backward(grad, anchor, bank, index, u, a, v, dot, norm, kept)
    assert found[0].isnan().any(1)[0] and found[3].isnan().any() and not found[0][1].isnan().any()


def test_strides_change_nothing(op, make):
    anchor, bank, index, query, weight, bias, grad = inputs(make, 3, 6, 9, 8)
    u, a, v, bq, bb = merged(query, weight, bias)
    _, dot, norm, kept = plain = op.forward(anchor, bank, index, u, a, v, bq, bb, True)
    apart = [strided(x) for x in (anchor, bank, index, u, a)]
    for x, y in zip(op.forward(*apart, v, bq, bb, True), plain, strict=True):
        assert torch.equal(x, y)
    found = op.backward(strided(grad), *apart, v, strided(dot), strided(norm), kept)
    wanted = op.backward(grad, anchor, bank, index, u, a, v, dot, norm, kept)
    for x, y in zip(found, wanted, strict=True):
        assert torch.equal(x, y)


def test_same_bits_twice(op, make, device):
    b, k, m, d = (64, 513, 1000, 128) if device == "cuda" else (2, 40, 9, 20)
    anchor, bank, index, query, weight, bias, grad = inputs(make, b, k, m, d)
    u, a, v, bq, bb = merged(query, weight, bias)
    _, dot, norm, kept = op.forward(anchor, bank, index, u, a, v, bq, bb, True)
    twice = [op.backward(grad, anchor, bank, index, u, a, v, dot, norm, kept) for _ in "ab"]
    for x, y in zip(*twice, strict=True):
        assert torch.equal(x, y)

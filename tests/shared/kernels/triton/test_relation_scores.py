from __future__ import annotations

from importlib import import_module

import pytest
import torch
import torch.nn.functional as F

from tests.shared.kernels.triton.helpers import error, strided

either = pytest.mark.parametrize("e", [5, None], ids=["weight", "no weight"])


@pytest.fixture
def op():
    return import_module("shared.kernels.relation_scores.triton")


def inputs(make, b, k, m, d, e=5, dtype=torch.float32):
    """query, anchor, bank, index, weight, bias, and a gradient of the scores; e None: no weight."""
    generator = torch.Generator().manual_seed(5)
    given = make(b, d if e is None else e, seed=2), make(b, d), make(m, d, seed=1)
    index = torch.randint(m, (b, k), generator=generator).to(given[0].device)
    maps = (None, None) if e is None else (make(d, e, seed=3), make(e, seed=4))
    rest = *maps, make(b, k, seed=6)
    query, anchor, bank, *rest = (None if x is None else x.to(dtype) for x in (*given, *rest))
    return query, anchor, bank, index, *rest


def truth(query, anchor, bank, index, weight, bias, grad):
    """Scores and gradients by the definition under autograd, in float64."""
    maps = () if weight is None else (weight, bias)
    leaves = [x.detach().double().requires_grad_() for x in (query, anchor, bank, *maps)]
    query, anchor, bank, *maps = leaves
    key = F.relu(anchor[:, None] - bank[index])
    if maps:
        key = key @ maps[0] + maps[1]
    scores = (F.normalize(key, dim=2) * query[:, None]).sum(2)
    found = torch.autograd.grad((scores * grad.double()).sum(), leaves)
    return scores.detach(), (*found, *[query.new_empty(0)] * (5 - len(found)))


def run(op, *given):
    """(scores, gradients)."""
    *inputs, grad = given
    scores, norm, kept = op.forward(*inputs, True)
    assert kept.shape == (0, inputs[3].shape[1], inputs[0].shape[1])
    return scores, op.backward(grad, *inputs, scores, norm, kept)


def check(op, given, bound):
    scores, found = run(op, *given)
    expected, gradients = truth(*given)
    assert error(scores, expected) < bound
    for x, y in zip(found, gradients, strict=True):
        assert error(x, y) < bound


@pytest.mark.parametrize("b, k, m, d, e", [
    (1, 1, 1, 1, 5), (2, 31, 5, 3, 5), (1, 32, 15, 16, 40), (3, 20, 17, 33, 5), (1, 3, 40, 70, 40),
    (1, 2, 3, 9, None), (2, 31, 5, 3, None), (3, 33, 17, 32, None), (1, 20, 40, 70, None),
])  # fmt: skip
def test_matches_the_definition(op, make, b, k, m, d, e):
    check(op, inputs(make, b, k, m, d, e), 3e-6)


@pytest.mark.parametrize("b, k, m, d", [(1, 1, 1, 1), (2, 33, 16, 17)])
def test_keys_of_one_column_score_the_query_or_its_negative(op, make, b, k, m, d):
    given = inputs(make, b, k, m, d, 1)
    scores, (d_query, *found) = run(op, *given)
    expected, (wanted, *_) = truth(*given)
    assert error(scores, expected) < 3e-6 and error(d_query, wanted) < 3e-6
    for x in found:  # a length does not matter: what is left is the rounding of p q + s key
        assert float(x.abs().max()) < 1e-5


@either
@pytest.mark.parametrize("chunk, parts", [(1, 1), (70, 3), (150, 2), (1 << 24, 64)])
def test_chunks_of_queries_and_parts_of_the_products(op, make, monkeypatch, chunk, parts, e):
    monkeypatch.setattr(op, "CHUNK", chunk)
    monkeypatch.setattr(op, "PARTS", parts)
    check(op, inputs(make, 3, 12, 7, 5, e), 3e-6)


@either
def test_float64(op, make, e):
    check(op, inputs(make, 2, 33, 9, 18, e, dtype=torch.float64), 1e-12)


def test_a_key_that_bias_and_product_cancel_keeps_its_digits(op, make):
    query, anchor, bank, index, weight, _, grad = inputs(make, 1, 1, 1, 40, 8)
    r = F.relu(anchor - bank)
    bias = (r @ weight)[0] * (1e-3 - 1)
    # A key of 1e-3 of its terms has 1e-4 left of float32's digits; |key|² by its terms has none.
    check(op, (query, anchor, bank, index, weight, bias, grad), 1e-3)


@either
def test_rows_of_the_bank_that_no_entry_names(op, make, e):
    query, anchor, bank, *rest = inputs(make, 2, 6, 5, 8, e)
    more = torch.cat([bank, torch.full_like(bank[:1], torch.nan).expand(30, -1)])
    _, found = run(op, query, anchor, more, *rest)
    wanted = truth(query, anchor, bank, *rest)[1]
    assert not found[2][5:].any()
    for x, y in zip((*found[:2], found[2][:5], *found[3:]), wanted, strict=True):
        assert error(x, y) < 3e-6


@either
def test_a_relation_of_norm_zero_scores_zero(op, make, e):
    query, anchor, bank, index, weight, bias, grad = inputs(make, 2, 6, 5, 8, e)
    bias = None if bias is None else 0 * bias
    given = query, anchor, bank.abs() + 10, index, weight, bias, grad  # all relations are 0
    scores, found = run(op, *given)
    assert not scores.any()
    for x, y in zip(found, truth(*given)[1], strict=True):
        assert error(x, y) < 3e-6


@pytest.mark.parametrize("b, k, m, d", [(0, 4, 5, 3), (4, 0, 5, 3), (2, 3, 5, 0)])
@either
def test_nothing_to_gather(op, make, b, k, m, d, e):
    check(op, inputs(make, b, k, m, d, e), 3e-6)


def test_keys_without_columns_score_zero(op, make):
    check(op, inputs(make, 2, 3, 5, 4, 0), 3e-6)


@either
def test_an_index_out_of_range_scores_nan_and_is_not_followed(op, make, e):
    query, anchor, bank, index, weight, bias, grad = inputs(make, 2, 3, 9, 8, e)
    index = torch.tensor([[0, -1, 2], [9, 3, 1 << 40]], device=index.device)
    scores, found = run(op, query, anchor, bank, index, weight, bias, grad)
    assert scores.isnan().tolist() == [[False, True, False], [True, False, True]]
    assert all(x.isfinite().all() for x in found)


@pytest.mark.parametrize("e, which", [
    *((5, name) for name in ("query", "anchor", "bank", "weight", "bias")),
    *((None, name) for name in ("query", "anchor", "bank")),
])  # fmt: skip
def test_nan_reaches_its_own_scores(op, make, e, which):
    names = ("query", "anchor", "bank", "index", "weight", "bias")
    *given, grad = inputs(make, 3, 2, 5, 4, e)
    given = dict(zip(names, given, strict=True))
    given[which].view(-1)[1] = torch.nan
    given["index"] = index = torch.tensor([[0, 1], [1, 2], [3, 0]], device=grad.device)
    scores, found = run(op, *given.values(), grad)
    first = [[True, True], [False, False], [False, False]]
    own = {"query": first, "anchor": first, "bank": (index == 0).tolist()}
    assert scores.isnan().tolist() == own.get(which, [[True, True]] * 3)
    d_query, d_anchor, _, d_weight, d_bias = found
    assert d_anchor[0].isnan().any()
    assert e is None or (d_weight.isnan().any() and d_bias.isnan().any())
    if which in own:
        assert not d_anchor[1].isnan().any() and not d_query[1].isnan().any()
    if which != "query":
        assert d_query[0].isnan().any()


@either
def test_strides_change_nothing(op, make, e):
    *given, grad = inputs(make, 3, 6, 9, 8, e)
    scores, norm, kept = op.forward(*given, True)
    maps = (None, None)
    if e is not None:
        maps = strided(given[4]), torch.stack([given[5], given[5]], 1)[:, 0]
    apart = [*(strided(x) for x in given[:4]), *maps]
    for x, y in zip(op.forward(*apart, True), (scores, norm, kept), strict=True):
        assert torch.equal(x, y)
    found = op.backward(strided(grad), *apart, strided(scores), strided(norm), kept)
    for x, y in zip(found, op.backward(grad, *given, scores, norm, kept), strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("e", [20, None])
def test_same_bits_twice(op, make, device, e):
    b, k, m, d = (64, 513, 1000, 128) if device == "cuda" else (2, 40, 9, 20)
    given = inputs(make, b, k, m, d, e)
    (first, found), (second, again) = run(op, *given), run(op, *given)
    for x, y in zip((first, *found), (second, *again), strict=True):
        assert torch.equal(x, y)

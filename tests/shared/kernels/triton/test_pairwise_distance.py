from __future__ import annotations

from importlib import import_module

import pytest
import torch

from tests.shared.kernels.triton.helpers import SHAPES, error, expanded, strided


@pytest.fixture
def op():
    return import_module("shared.kernels.pairwise_distance.triton")


def truth(x, y, squared):
    """|x_i - y_j| as a plain loop in float64, with its derivative 0 at 0."""
    out = torch.zeros(len(x), len(y), dtype=torch.float64, device=x.device)
    for i in range(len(x)):
        for j in range(len(y)):
            square = (x[i] - y[j]).square().sum()
            if float(square.detach()) > 0:
                out[i, j] = square if squared else square.sqrt()
    return out


@pytest.mark.parametrize("m", SHAPES)
@pytest.mark.parametrize("squared", [False, True])
def test_matches_plain_loop(op, make, m, squared):
    n, dim = (m * 7) % 37, (m * 5) % 70 + 1
    x, y = make(m, dim), make(n, dim, seed=1)
    d = op.forward(x, y, squared)
    assert error(d, truth(x.double(), y.double(), squared)) < 1e-6
    alone = op.forward(x, None, squared)
    assert error(alone, truth(x.double(), x.double(), squared)) < 1e-6
    assert not alone.diagonal().any()
    assert torch.equal(alone, alone.T)


@pytest.mark.parametrize("m, squared", [(1, False), (2, True), (17, False), (17, True)])
def test_gradient_matches_plain_loop(op, make, m, squared):
    n = 41 - m
    x, y, grad = make(m, 35), make(n, 35, seed=1), make(m, n, seed=2)
    x64, y64 = x.double().requires_grad_(), y.double().requires_grad_()
    tx, ty = torch.autograd.grad((truth(x64, y64, squared) * grad).sum(), (x64, y64))
    dx, dy = op.backward(grad, x, y, op.forward(x, y, squared), squared)
    assert error(dx, tx) < 1e-6
    assert error(dy, ty) < 1e-6
    grad = make(m, m, seed=3)
    (tx,) = torch.autograd.grad((truth(x64, x64, squared) * grad).sum() + 0 * x64.sum(), x64)
    dx, dy = op.backward(grad, x, None, op.forward(x, None, squared), squared)
    assert dy.numel() == 0
    assert error(dx, tx) < 1e-6


def test_more_columns_than_are_summed_at_a_time(op, make):
    x = make(5, 200)
    assert error(op.forward(x, None, False), truth(x.double(), x.double(), False)) < 5e-7


def test_tiles_of_32(op, make, monkeypatch):
    monkeypatch.setattr("shared.kernels.gpu.tile", lambda *_: 32)
    x, y = make(33, 9), make(65, 9, seed=1)
    assert error(op.forward(x, y, False), truth(x.double(), y.double(), False)) < 1e-6
    assert error(op.forward(y, None, False), truth(y.double(), y.double(), False)) < 1e-6


@pytest.mark.parametrize("m, n, dim", [(0, 3, 4), (3, 0, 4), (0, 0, 4), (3, 2, 0)])
def test_empty_inputs(op, make, m, n, dim):
    x, y = make(m, dim), make(n, dim)
    d = op.forward(x, y, False)
    assert d.shape == (m, n) and not d.any()
    dx, dy = op.backward(torch.ones_like(d), x, y, d, False)
    assert dx.shape == x.shape and dy.shape == y.shape and not dx.any() and not dy.any()
    assert op.forward(x, None, False).shape == (m, m)


def test_offset_costs_nothing_and_near_duplicates_are_right(op, make):
    x = make(20, 30)
    x[1] = x[0]  # a duplicate
    x[3] = x[2] + 1e-4 * make(30, seed=1)  # nearly one
    x = (x + 1000).float()
    x64 = x.double()
    d, t = op.forward(x, None, False), truth(x64, x64, False)
    assert d[0, 1] == 0
    assert float(((d - t).abs() / t.clamp(min=1e-9)).max()) < 1e-6
    x64.requires_grad_()
    (g,) = torch.autograd.grad(truth(x64, x64, False).sum(), x64)
    assert error(op.backward(torch.ones_like(d), x, None, d, False)[0], g) < 1e-5


def test_other_types_and_strides(op, make):
    half, double = make(18, 6, dtype=torch.float16), make(18, 6, dtype=torch.float64)
    d = op.forward(half, None, False)
    assert d.dtype == torch.float32
    assert error(d, truth(half.double(), half.double(), False)) < 1e-6
    d = op.forward(double, None, False)
    assert d.dtype == torch.float64
    assert error(d, truth(double, double, False)) < 1e-14
    x = make(18, 6)
    y = expanded(x, 5)
    d = op.forward(strided(x), y, False)
    assert torch.equal(d, op.forward(x, y.contiguous(), False))
    grad = torch.ones((), device=x.device).expand(18, 5)
    for a, b in zip(
        op.backward(grad, strided(x), y, d, False),
        op.backward(grad.contiguous(), x, y.contiguous(), d, False),
        strict=True,
    ):
        assert torch.equal(a, b)


def test_nan_stays_in_its_row_and_inf_is_far(op, make):
    x, y = make(18, 6), make(5, 6, seed=1)
    x[17, 2], x[3, 0] = torch.nan, torch.inf
    d = op.forward(x, y, False)
    assert d[17].isnan().all() and d[3].isinf().all()
    rest = [i for i in range(17) if i != 3]
    assert d[rest].isfinite().all()
    dx, dy = op.backward(torch.ones_like(d), x, y, d, False)
    assert dx[17].isnan().all() and dy.isnan().all() and dx[rest].isfinite().all()


def test_same_bits_twice(op, make, device):
    n = 1000 if device == "cuda" else 17
    x, grad = make(n, 20), make(n, n, seed=1)
    first, second = (op.forward(x, None, False) for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(
        op.backward(grad, x, None, first, False)[0], op.backward(grad, x, None, first, False)[0]
    )


def test_public_function_and_registration(make):
    public = import_module("shared.kernels.pairwise_distance")
    x, y = (make(4, 3, seed=i, dtype=torch.float64).requires_grad_() for i in (0, 1))
    for other in (y, None):
        assert torch.autograd.gradcheck(
            lambda *given: public.pairwise_distance(*given, backend="triton"),
            (x,) if other is None else (x, other),
            fast_mode=True,
        )
        torch.library.opcheck(public._pairwise_distance, (x, other, False, "triton"))

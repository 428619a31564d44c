from __future__ import annotations

from importlib import import_module

import pytest
import torch

from tests.shared.kernels.triton.helpers import SHAPES, error, expanded, strided


@pytest.fixture
def op():
    return import_module("shared.kernels.triplet_angles.triton")


def truth(x):
    """Cosines at each vertex from the definition, in float64; 0 on arms of length 0."""
    x = x.double()
    slices = []
    for j in range(len(x)):
        arms = x - x[j]
        there = arms.any(1, keepdim=True)
        unit = torch.where(there, arms, 0) / torch.where(there, arms, 1).norm(dim=1, keepdim=True)
        slices.append(unit @ unit.T)
    return torch.stack(slices, 1)


@pytest.mark.parametrize("n", SHAPES)
def test_matches_plain_loop(op, make, n):
    x = make(n, (3 * n) % 50 + 3)
    assert error(op.forward(x), truth(x)) < 1e-6


@pytest.mark.parametrize("n", [1, 2, 3, 16, 18])
def test_gradient_matches_plain_loop(op, make, n):
    x, grad = make(n, 5), make(n, n, n, seed=1)  # not symmetric
    x64 = x.double().requires_grad_()
    (g,) = torch.autograd.grad((truth(x64) * grad).sum(), x64)
    assert error(op.backward(grad, x), g) < 2e-6


def test_tiles_of_32(op, make, monkeypatch):
    monkeypatch.setattr("shared.kernels.gpu.tile", lambda *_: 32)
    x, grad = make(33, 9), make(33, 33, 33, seed=1)
    assert error(op.forward(x), truth(x)) < 1e-6
    x64 = x.double().requires_grad_()
    (g,) = torch.autograd.grad((truth(x64) * grad).sum(), x64)
    assert error(op.backward(grad, x), g) < 2e-6


def test_no_rows_and_no_columns(op, make):
    assert op.forward(make(0, 4)).shape == (0, 0, 0)
    assert op.backward(make(0, 0, 0), make(0, 4)).shape == (0, 4)
    cosines = op.forward(make(3, 0))
    assert cosines.shape == (3, 3, 3) and not cosines.any()
    assert op.backward(cosines, make(3, 0)).shape == (3, 0)


def test_duplicates_have_no_angle(op, make):
    x, grad = make(9, 6), make(9, 9, 9, seed=1)
    x[7], x[8] = x[0], x[0]
    x = x + 1000
    cosines = op.forward(x)
    assert error(cosines, truth(x)) < 1e-6
    assert not cosines[7, 0].any() and not cosines[:, 8, 0].any()
    x64 = x.double().requires_grad_()
    (g,) = torch.autograd.grad((truth(x64) * grad).sum(), x64)
    assert error(op.backward(grad, x), g) < 2e-6
    same = expanded(x, 5)
    assert not op.forward(same).any() and not op.backward(grad[:5, :5, :5], same).any()


@pytest.mark.parametrize("dim", [1, 2, 3, 64])
@pytest.mark.parametrize("distance", [1e-2, 1e-4])
def test_near_duplicates_keep_their_angles(op, make, dim, distance):
    x = make(16, dim)
    x /= x.norm(dim=1, keepdim=True).clamp(min=1)
    for i in range(0, 16, 2):
        step = make(dim, seed=i)
        x[i + 1] = x[i] + distance * step / step.norm()
    assert float((op.forward(x) - truth(x)).abs().max()) < 1e-6


def test_other_types_and_strides(op, make):
    half, double = make(9, 6, dtype=torch.float16), make(9, 6, dtype=torch.float64)
    assert error(op.forward(half), truth(half)) < 1e-6
    assert error(op.forward(double), truth(double)) < 1e-14
    grad = make(9, 9, 9, seed=1, dtype=torch.float64)
    x64 = double.clone().requires_grad_()
    (g,) = torch.autograd.grad((truth(x64) * grad).sum(), x64)
    assert error(op.backward(grad, double), g) < 1e-12
    x = make(7, 6)
    assert torch.equal(op.forward(strided(x)), op.forward(x))
    turned = make(7, 7, 7, seed=1).permute(2, 0, 1)
    everywhere = torch.ones((), device=x.device).expand(7, 7, 7)
    for grad in (turned, everywhere):
        assert torch.equal(op.backward(grad, strided(x)), op.backward(grad.contiguous(), x))


@pytest.mark.parametrize("n", [1, 2, 5])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_nan_and_inf_give_nan(op, make, n, value):
    x = make(n, 6)
    x[n - 1, 2] = value
    assert op.forward(x).isnan().all()
    assert op.backward(make(n, n, n), x).isnan().all()


def test_nan_in_the_gradient_stays(op, make):
    grad = make(5, 5, 5)
    grad[3, 4, 3] = torch.nan
    assert op.backward(grad, make(5, 6)).isnan().any()


def test_same_bits_twice(op, make, device):
    n = 100 if device == "cuda" else 4
    x, grad = make(n, 6), make(n, n, n, seed=1)
    assert torch.equal(op.forward(x), op.forward(x))
    assert torch.equal(op.backward(grad, x), op.backward(grad, x))


def test_public_function_and_registration(make):
    public = import_module("shared.kernels.triplet_angles")
    x = make(4, 3, dtype=torch.float64).requires_grad_()
    weight = make(4, 4, 4, seed=1, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda x: (public.triplet_angles(x, backend="triton") * weight).sum(), x, fast_mode=True
    )
    torch.library.opcheck(public._triplet_angles, (x, "triton"))

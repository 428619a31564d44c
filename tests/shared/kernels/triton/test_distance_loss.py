from __future__ import annotations

from importlib import import_module

import pytest
import torch

from tests.shared.kernels.triton.helpers import SHAPES, error, expanded, strided


@pytest.fixture
def op():
    return import_module("shared.kernels.distance_loss.triton")


def truth(student, teacher, penalty, delta):
    """(sum over unordered pairs, its gradient), from the definition, in float64."""
    student, teacher = student.double().requires_grad_(), teacher.double()
    i, j = torch.combinations(torch.arange(len(student), device=student.device), 2).T

    def relative(x):
        difference = x[i] - x[j]
        apart = difference.any(1)
        d = torch.zeros(len(i), dtype=x.dtype, device=x.device)
        d[apart] = difference[apart].norm(dim=1)
        return d / d[apart].mean() if apart.any() else d

    e = relative(student) - relative(teacher)
    if penalty == "squared":
        h = e * e
    else:
        h = torch.where(e.abs() <= delta, e * e / 2, delta * (e.abs() - delta / 2))
    total = h.sum() + 0 * student.sum()
    return total.detach(), torch.autograd.grad(total, student)[0]


PENALTIES = [("squared", 1.0), ("huber", 1.0), ("huber", 0.1)]


@pytest.mark.parametrize(
    "n, penalty, delta", [*((n, "huber", 0.1) for n in SHAPES), *((16, *p) for p in PENALTIES)]
)
def test_matches_plain_loop(op, make, n, penalty, delta):
    student, teacher = make(n, n % 7 + 2), make(n, (3 * n) % 50 + 3, seed=1)
    total, gradient = op.distance_loss(student, teacher, penalty, delta, True)
    true_total, true_gradient = truth(student, teacher, penalty, delta)
    assert error(total, true_total) < 1e-6
    assert error(gradient, true_gradient) < 2e-6
    value, nothing = op.distance_loss(student, teacher, penalty, delta, False)
    assert torch.equal(value, total) and nothing.numel() == 0


@pytest.mark.parametrize("n", [32, 41])
def test_tiles_of_32(op, make, monkeypatch, n):
    monkeypatch.setattr("shared.kernels.gpu.tile", lambda *_: 32)
    student, teacher = make(n, 9), make(n, 40, seed=1)
    total, gradient = op.distance_loss(student, teacher, "huber", 0.3, True)
    true_total, true_gradient = truth(student, teacher, "huber", 0.3)
    assert error(total, true_total) < 1e-6
    assert error(gradient, true_gradient) < 2e-6


def test_no_rows_and_no_columns(op, make):
    total, gradient = op.distance_loss(make(0, 4), make(0, 5), "squared", 1.0, True)
    assert total == 0 and gradient.shape == (0, 4)
    total, gradient = op.distance_loss(make(3, 0), make(3, 5), "squared", 1.0, True)
    assert error(total, truth(make(3, 0), make(3, 5), "squared", 1.0)[0]) < 1e-6
    assert gradient.shape == (3, 0)


@pytest.mark.parametrize("penalty, delta", PENALTIES)
def test_duplicates_do_not_enter_the_mean(op, make, penalty, delta):
    student, teacher = make(20, 6), make(20, 9, seed=1)
    student[7], student[19] = student[0], student[0]
    teacher[3] = teacher[2]
    total, gradient = op.distance_loss(student, teacher, penalty, delta, True)
    true_total, true_gradient = truth(student, teacher, penalty, delta)
    assert error(total, true_total) < 1e-6
    assert error(gradient, true_gradient) < 2e-6
    same = expanded(student, 18)
    total, gradient = op.distance_loss(same, teacher[:18], penalty, delta, True)
    assert error(total, truth(same, teacher[:18], penalty, delta)[0]) < 1e-6
    assert not gradient.any()


def test_offset_and_near_duplicates(op, make):
    student, teacher = make(18, 6), make(18, 9, seed=1)
    student[5] = student[4] + 1e-4 * make(6, seed=2)
    student += 1000
    total, gradient = op.distance_loss(student, teacher, "huber", 1.0, True)
    true_total, true_gradient = truth(student, teacher, "huber", 1.0)
    assert error(total, true_total) < 1e-6
    assert error(gradient, true_gradient) < 2e-6


def test_other_types_and_strides(op, make):
    half = make(18, 6, dtype=torch.float16), make(18, 9, seed=1, dtype=torch.float16)
    total, gradient = op.distance_loss(*half, "squared", 1.0, True)
    true_total, true_gradient = truth(*half, "squared", 1.0)
    assert error(total, true_total) < 1e-3
    assert error(gradient, true_gradient) < 1e-3
    double = make(18, 6, dtype=torch.float64), make(18, 9, seed=1, dtype=torch.float64)
    total, gradient = op.distance_loss(*double, "huber", 0.3, True)
    true_total, true_gradient = truth(*double, "huber", 0.3)
    assert error(total, true_total) < 1e-14
    assert error(gradient, true_gradient) < 1e-13
    student, teacher = make(18, 6), make(18, 9, seed=1)
    for a, b in zip(
        op.distance_loss(strided(student), strided(teacher), "squared", 1.0, True),
        op.distance_loss(student, teacher, "squared", 1.0, True),
        strict=True,
    ):
        assert torch.equal(a, b)


@pytest.mark.parametrize("n", [1, 2, 9])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_nan_and_inf_give_nan(op, make, n, value):
    for which in (0, 1):
        for penalty in ("squared", "huber"):
            given = [make(n, 6), make(n, 9, seed=1)]
            given[which][n - 1, 2] = value
            total, gradient = op.distance_loss(*given, penalty, 1.0, True)
            assert total.isnan() and gradient.isnan().all()


def test_same_bits_twice(op, make, device):
    n = 1000 if device == "cuda" else 17
    given = make(n, 6), make(n, 9, seed=1), "squared", 1.0, True
    for a, b in zip(*(op.distance_loss(*given) for _ in range(2)), strict=True):
        assert torch.equal(a, b)


def test_public_function_and_registration(make):
    public = import_module("shared.kernels.distance_loss")
    student, teacher = (make(4, 3, seed=i, dtype=torch.float64) for i in (0, 1))
    student.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda s: public.distance_loss(s, teacher, penalty="huber", delta=0.3, backend="triton"),
        student,
        fast_mode=True,
    )
    given = student, teacher, "squared", 1.0, True, "triton"
    torch.library.opcheck(public._distance_loss, given)

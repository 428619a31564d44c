from __future__ import annotations

from importlib import import_module

import pytest
import torch

from tests.shared.kernels.triton.helpers import SHAPES, error, expanded, strided


@pytest.fixture
def op():
    return import_module("shared.kernels.angle_loss.triton")


def truth(student, teacher, delta):
    """(sum over j and unordered {i, k}, its gradient), from the definition, in float64."""
    student, teacher = student.double().requires_grad_(), teacher.double()
    total = 0 * student.sum()
    for j in range(len(student)):
        arms_s, arms_t = student - student[j], teacher - teacher[j]
        there = arms_s.any(1) & arms_t.any(1)  # duplicates of j, and j itself, have no arm
        i, k = torch.combinations(there.nonzero().flatten(), 2).T
        cosine_s = torch.cosine_similarity(arms_s[i], arms_s[k], eps=0)
        cosine_t = torch.cosine_similarity(arms_t[i], arms_t[k], eps=0)
        e = (cosine_s - cosine_t).abs()
        total = total + torch.where(e <= delta, e * e / 2, delta * (e - delta / 2)).sum()
    return total.detach(), torch.autograd.grad(total, student)[0]


@pytest.mark.parametrize("n, delta", [*((n, 0.3) for n in SHAPES), (16, 1.0), (16, 10.0)])
def test_matches_plain_loop(op, make, n, delta):
    student, teacher = make(n, n % 7 + 2), make(n, (3 * n) % 50 + 3, seed=1)
    total, gradient = op.angle_loss(student, teacher, delta, True)
    true_total, true_gradient = truth(student, teacher, delta)
    assert error(total, true_total) < 1e-6
    assert error(gradient, true_gradient) < 2e-6
    value, nothing = op.angle_loss(student, teacher, delta, False)
    assert error(value, true_total) < 1e-6 and nothing.numel() == 0


@pytest.mark.parametrize("n", [32, 41])
def test_tiles_of_32(op, make, monkeypatch, n):
    monkeypatch.setattr("shared.kernels.gpu.tile", lambda *_: 32)
    student, teacher = make(n, 9), make(n, 4, seed=1)
    total, gradient = op.angle_loss(student, teacher, 0.5, True)
    true_total, true_gradient = truth(student, teacher, 0.5)
    assert error(total, true_total) < 1e-6
    assert error(gradient, true_gradient) < 2e-6


def test_no_rows_and_no_columns(op, make):
    for n, dim in [(0, 4), (3, 0)]:
        total, gradient = op.angle_loss(make(n, dim), make(n, 5), 1.0, True)
        assert total.shape == () and total == 0
        assert gradient.shape == (n, dim)


def test_duplicates_count_as_nothing(op, make):
    student, teacher = make(20, 6), make(20, 9, seed=1)
    student[7], student[19] = student[0], student[0]
    teacher[3] = teacher[2]
    total, gradient = op.angle_loss(student, teacher, 1.0, True)
    true_total, true_gradient = truth(student, teacher, 1.0)
    assert error(total, true_total) < 1e-6
    assert error(gradient, true_gradient) < 2e-6
    total, gradient = op.angle_loss(expanded(student, 18), expanded(teacher, 18), 1.0, True)
    assert total == 0 and not gradient.any()


def test_offset_costs_nothing(op, make):
    student, teacher = make(18, 6) + 1000, make(18, 9, seed=1) - 1000
    total, gradient = op.angle_loss(student, teacher, 1.0, True)
    true_total, true_gradient = truth(student, teacher, 1.0)
    assert error(total, true_total) < 1e-6
    assert error(gradient, true_gradient) < 2e-6


@pytest.mark.parametrize("which", [0, 1])  # apart: a short arm of the student hides other errors
@pytest.mark.parametrize("dim", [2, 100])
@pytest.mark.parametrize("distance", [0.1, 1e-2, 1e-4])
def test_near_duplicates_cost_nothing(op, make, which, dim, distance):
    given = [make(10, dim) + 10, make(10, dim, seed=1)]
    given[which][5] = given[which][4] + distance * make(dim, seed=2)
    total, gradient = op.angle_loss(*given, 1.0, True)
    true_total, true_gradient = truth(*given, 1.0)
    assert error(total, true_total) < 1e-6
    assert error(gradient, true_gradient) < 5e-6
    assert error(op.angle_loss(*given, 1.0, False)[0], true_total) < 1e-6


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_scale_does_not_matter(op, make, scale):
    student, teacher = make(18, 6), make(18, 9, seed=1)
    total, gradient = op.angle_loss(student * scale, teacher / scale, 1.0, True)
    true_total, true_gradient = truth(student * scale, teacher / scale, 1.0)
    assert error(total, true_total) < 1e-6
    assert error(gradient * scale, true_gradient * scale) < 2e-6


def test_other_types_and_strides(op, make):
    half = make(18, 6, dtype=torch.float16), make(18, 9, seed=1, dtype=torch.float16)
    total, gradient = op.angle_loss(*half, 1.0, True)
    true_total, true_gradient = truth(*half, 1.0)
    assert total.dtype == gradient.dtype == torch.float16
    assert error(total, true_total) < 1e-3
    assert error(gradient, true_gradient) < 1e-3
    double = make(18, 6, dtype=torch.float64), make(18, 9, seed=1, dtype=torch.float64)
    total, gradient = op.angle_loss(*double, 0.3, True)
    true_total, true_gradient = truth(*double, 0.3)
    assert error(total, true_total) < 1e-14
    assert error(gradient, true_gradient) < 1e-13
    student, teacher = make(18, 6), make(18, 9, seed=1)
    for a, b in zip(
        op.angle_loss(strided(student), strided(teacher), 1.0, True),
        op.angle_loss(student, teacher, 1.0, True),
        strict=True,
    ):
        assert torch.equal(a, b)


@pytest.mark.parametrize("n", [1, 2, 9])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_nan_and_inf_give_nan(op, make, n, value):
    for which in (0, 1):
        given = [make(n, 6), make(n, 9, seed=1)]
        given[which][n - 1, 2] = value
        total, gradient = op.angle_loss(*given, 1.0, True)
        assert total.isnan() and gradient.isnan().all()
        assert op.angle_loss(*given, 1.0, False)[0].isnan()


def test_same_bits_twice(op, make, device):
    n = 1000 if device == "cuda" else 17
    student, teacher = make(n, 6), make(n, 9, seed=1)
    for a, b in zip(*(op.angle_loss(student, teacher, 1.0, True) for _ in range(2)), strict=True):
        assert torch.equal(a, b)


def test_public_function_and_registration(make):
    public = import_module("shared.kernels.angle_loss")
    student, teacher = (make(4, 3, seed=i, dtype=torch.float64) for i in (0, 1))
    student.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda s: public.angle_loss(s, teacher, delta=0.3, backend="triton"),
        student,
        fast_mode=True,
    )
    torch.library.opcheck(public._angle_loss, (student, teacher, 1.0, True, "triton"))

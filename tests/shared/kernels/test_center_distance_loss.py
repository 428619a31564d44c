from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from shared.kernels.center_distance_loss import center_distance_loss, cpu


def inputs(b: int, c: int, d: int, seed: int = 0, dtype=torch.float64) -> tuple[Tensor, ...]:
    g = torch.Generator().manual_seed(seed)
    shapes = (b, d), (b, d), (c, d)
    return tuple(torch.randn(s, generator=g, dtype=torch.float64).to(dtype) for s in shapes)


def as_a_loop(student: Tensor, teacher: Tensor, centers: Tensor) -> float:
    terms = [
        (math.dist(f, u) - math.dist(g, u)) ** 2
        for g, f in zip(student.tolist(), teacher.tolist(), strict=True)
        for u in centers.tolist()
    ]
    return math.fsum(terms)


def gradient_as_a_loop(student: Tensor, teacher: Tensor, centers: Tensor) -> Tensor:
    student, teacher, centers = student.double(), teacher.double(), centers.double()
    out = torch.zeros_like(student)
    for i, (g, f) in enumerate(zip(student, teacher, strict=True)):
        for u in centers:
            d_s, d_t = (g - u).norm(), (f - u).norm()
            if d_s > 0:
                out[i] += 2 * (d_s - d_t) * (g - u) / d_s
    return out


def value_and_gradient(student: Tensor, *others: Tensor, backend="cpu") -> tuple[Tensor, Tensor]:
    leaf = student.detach().clone().requires_grad_()
    loss = center_distance_loss(leaf, *others, reduction="sum", backend=backend)
    return loss.detach(), torch.autograd.grad(loss, leaf)[0]


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_eq7_matches_plain_loop(backend: str) -> None:
    given = inputs(5, 7, 4)
    loss, gradient = value_and_gradient(*given, backend=backend)
    assert loss.item() == pytest.approx(as_a_loop(*given), rel=1e-12)
    torch.testing.assert_close(gradient, gradient_as_a_loop(*given))
    mean = center_distance_loss(*given, backend=backend)
    assert mean.item() == pytest.approx(as_a_loop(*given) / 35, rel=1e-12)


def test_gradcheck() -> None:
    student, teacher, centers = inputs(4, 6, 3)
    centers[2] = student[1] + 1e-2  # near: done from differences
    f = lambda s: center_distance_loss(s, teacher, centers, backend="cpu")  # noqa: E731
    assert torch.autograd.gradcheck(f, student.requires_grad_())


@settings(max_examples=60, deadline=None)
@given(
    b=st.integers(0, 12),
    c=st.integers(0, 20),
    d=st.integers(0, 9),
    tile=st.sampled_from([(1, 1), (3, 4), (5, 20), (16, 7)]),
    numbers=st.sampled_from([1, 20, 1 << 18]),
    near=st.integers(0, 12),
    seed=st.integers(0, 99),
)
def test_tiles_of_any_shape_give_the_reference(b, c, d, tile, numbers, near, seed) -> None:
    student, teacher, centers = inputs(b, c, d, seed)
    for i in range(min(near, b, c)):  # rows near and on centres, the student's and the teacher's
        student[i] = centers[i] + (1e-2 if i % 2 else 0)
        teacher[i] = centers[-1 - i] + (0 if i % 3 else 1e-3)
    loss, gradient = value_and_gradient(student, teacher, centers, backend="reference")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "ROWS", tile[0])
        patch.setattr(cpu, "COLUMNS", tile[1])
        patch.setattr(cpu, "NUMBERS", numbers)
        found = value_and_gradient(student, teacher, centers)
    torch.testing.assert_close(found[0], loss)
    torch.testing.assert_close(found[1], gradient, rtol=1e-7, atol=1e-9)


def test_an_offset_costs_nothing() -> None:
    near = inputs(20, 30, 8, dtype=torch.float32)
    far = tuple(x + 1000 for x in near)
    truth = as_a_loop(*far)
    wanted = gradient_as_a_loop(*far)
    loss, gradient = value_and_gradient(*far)
    assert loss.item() == pytest.approx(truth, rel=1e-5)
    torch.testing.assert_close(gradient.double(), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("offset", [0.0, 1000.0])
@pytest.mark.parametrize("distance", [0.3, 1e-2, 1e-3])
def test_students_near_their_centres_keep_their_accuracy(offset: float, distance: float) -> None:
    """A trained student; a float32 product alone is off by 2e-2 at a distance of 1e-3."""
    _, teacher, centers = inputs(24, 24, 16, dtype=torch.float32)
    g = torch.Generator().manual_seed(5)
    student = centers + offset + distance * torch.randn(24, 16, generator=g) / 4
    teacher, centers = teacher + offset, centers + offset
    truth, wanted = (
        as_a_loop(student, teacher, centers),
        gradient_as_a_loop(student, teacher, centers),
    )
    loss, gradient = value_and_gradient(student, teacher, centers)
    assert loss.item() == pytest.approx(truth, rel=1e-6)
    eager = value_and_gradient(student, teacher, centers, backend="reference")[1]
    allowed = (eager.double() - wanted).abs().max() + 1e-5 * wanted.abs().max()
    assert (gradient.double() - wanted).abs().max() <= allowed


def test_no_gradient_from_a_centre_at_distance_zero() -> None:
    student, teacher, centers = inputs(3, 1, 4, dtype=torch.float32)
    for backend in ("cpu", "reference"):
        at = centers.expand(3, -1)
        loss, gradient = value_and_gradient(at, teacher, centers, backend=backend)
        assert loss.item() == pytest.approx(as_a_loop(at, teacher, centers), rel=1e-6)
        assert not gradient.any()


def test_student_equal_to_teacher_is_zero_with_no_gradient() -> None:
    student, _, centers = inputs(30, 40, 8, dtype=torch.float32)
    loss, gradient = value_and_gradient(student, student, centers)
    assert loss == 0 and not gradient.any()


def test_teacher_and_centres_receive_no_gradient() -> None:
    given = [x.requires_grad_() for x in inputs(4, 5, 3)]
    for backend in ("cpu", "reference"):
        center_distance_loss(*given, backend=backend).backward()
    assert given[0].grad is not None and given[1].grad is None and given[2].grad is None


@pytest.mark.parametrize("backend", ["auto", "cpu", "reference"])
@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("near", [False, True])
def test_nan_and_inf_give_nan(backend: str, which: int, bad: float, near: bool) -> None:
    """The loss, and the gradients of the rows that meet it and of no others."""
    given = list(inputs(6, 7, 3, dtype=torch.float32))
    if near:  # pairs that cpu.py does from the differences of their rows
        given[0][:] = given[2][:6] + 1e-3
        given[1][:] = given[2][:6] + 2e-3
    given[which][2, 1] = bad
    loss, gradient = value_and_gradient(*given, backend=backend)
    assert loss.isnan()
    assert gradient.isnan().any(1).tolist() == [which == 2 or i == 2 for i in range(6)]


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("which", [0, 1])
def test_inf_gives_nan_with_a_single_centre(backend: str, which: int) -> None:
    given = list(inputs(3, 1, 4, dtype=torch.float32))
    given[0][1] = given[2][0] + 1e-3
    given[which][1, 2] = math.inf
    loss, gradient = value_and_gradient(*given, backend=backend)
    assert loss.isnan()
    assert gradient.isnan().any(1).tolist() == [False, True, False]


def test_same_bits_twice_and_all_written(poisoned: None) -> None:
    given = inputs(33, 65, 8, dtype=torch.float32)
    given[0][3] = given[2][4]
    first, second = value_and_gradient(*given), value_and_gradient(*given)
    for a, b in zip(first, second, strict=True):
        assert a.isfinite().all() and torch.equal(a, b)


class Largest(TorchDispatchMode):
    """Bytes of the largest tensor that is made."""

    def __init__(self, *given: Tensor) -> None:
        super().__init__()
        self.size, self.given = 0, {x.untyped_storage().data_ptr() for x in given}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.untyped_storage().data_ptr() not in self.given:
            self.size = max(self.size, out.untyped_storage().nbytes())
        return out


def test_memory_is_tiles_whatever_the_number_of_centres(monkeypatch) -> None:
    monkeypatch.setattr(cpu, "ROWS", 16)
    monkeypatch.setattr(cpu, "COLUMNS", 16)
    monkeypatch.setattr(cpu, "NUMBERS", 64)
    student, teacher, centers = inputs(40, 1000, 8, dtype=torch.float32)
    student[:20] = centers[:20]
    with Largest(student, teacher, centers) as largest:
        cpu.center_distance_loss(student, teacher, centers, True)
    # [B, D]; a tile of 16 x 16, of which the near pairs are listed as two int64 each
    assert largest.size <= max(40 * 8 * 4, 16 * 16 * 2 * 8)


def test_small_batches_go_by_the_reference_unless_told() -> None:
    """There the calls of the tiles would cost more than the whole loss."""
    given = inputs(4, 5, 3, dtype=torch.float32)
    found = [center_distance_loss(*given, backend=b) for b in ("auto", "reference")]
    assert torch.equal(*found)


def test_a_device_that_may_lack_float64_is_given_none() -> None:
    """The meta device stands for it: no tensor of the loss or its gradient is float64 there."""
    student, teacher, centers = (x.to("meta") for x in inputs(4, 5, 3, dtype=torch.float32))
    with Types() as types:
        center_distance_loss(student.requires_grad_(), teacher, centers).backward()
    assert types.seen == {torch.float32}


class Types(TorchDispatchMode):
    """The floating-point types of all tensors that are made."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[torch.dtype] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else [out]:
            if isinstance(x, Tensor) and x.dtype.is_floating_point:
                self.seen.add(x.dtype)
        return out


def test_wrong_input_is_named_in_one_line() -> None:
    student, teacher, centers = inputs(4, 5, 3)
    wrong = [
        ((student[0], teacher, centers), {}, r"student is \(3,\)"),
        ((student, teacher[:2], centers), {}, r"teacher \(2, 3\)"),
        ((student, teacher, centers[:, :2]), {}, r"centers \(5, 2\) do not fit"),
        ((student, teacher, centers), {"reduction": "rkd"}, "no reduction 'rkd'"),
        ((student, teacher, centers), {"backend": "triton"}, "no backend 'triton'"),
        ((student, teacher, centers.long()), {}, "floating-point"),
    ]
    for arguments, more, message in wrong:
        with pytest.raises(ValueError, match=message) as error:
            center_distance_loss(*arguments, **more)
        assert "\n" not in str(error.value)


def test_under_autocast_the_products_are_float32() -> None:
    given = inputs(40, 90, 64, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss = center_distance_loss(*given)
    assert loss.dtype == torch.float32 and torch.equal(loss, center_distance_loss(*given))

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.kernels import angle_loss
from shared.kernels.angle_loss import compiled, cpu
from shared.kernels.reductions import pairs, triplets
from tests.shared.kernels import oracles


def features(n: int, d: int, seed: int = 0, dtype=torch.float64) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=g, dtype=torch.float64).to(dtype)


def published(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """RKD's angle loss as its equations read: mean over N^3 ordered entries."""

    def angles(x: torch.Tensor) -> torch.Tensor:
        e = F.normalize(x[None] - x[:, None], dim=2)
        return torch.bmm(e, e.transpose(1, 2))

    return F.smooth_l1_loss(angles(student), angles(teacher))


@pytest.mark.parametrize("n", [0, 1, 2, 3, 4, 7])
@pytest.mark.parametrize("delta", [0.2, 1.0])
def test_eq5_matches_plain_loop(n: int, delta: float, cpu_path: str) -> None:
    s, t = features(n, 5), features(n, 3, seed=1)
    expected = oracles.angle_sum(s.tolist(), t.tolist(), delta)
    for backend in ("cpu", "reference"):
        found = angle_loss(s, t, delta=delta, reduction="sum", backend=backend)
        assert found.item() == pytest.approx(expected, rel=1e-12, abs=1e-14)


def test_reductions_count_what_they_say() -> None:
    s, t = features(6, 4), features(6, 4, seed=1)
    total = angle_loss(s, t, reduction="sum").item()
    assert angle_loss(s, t).item() == pytest.approx(total / (6 * math.comb(5, 2)))
    assert angle_loss(s, t, reduction="rkd").item() == pytest.approx(2 * total / 6**3)


def test_factors_of_the_smallest_batches() -> None:
    """Losses are 0 there, so that only the factors themselves can be looked at."""
    assert [pairs("x", n, "mean") for n in (0, 1, 2, 3)] == [1, 1, 1, 1 / 3]
    assert [pairs("x", n, "rkd") for n in (0, 1, 2)] == [2, 2, 1 / 2]
    assert [triplets("x", n, "mean") for n in (0, 2, 3, 4)] == [1, 1, 1 / 3, 1 / 12]
    assert [triplets("x", n, "rkd") for n in (0, 1, 2)] == [2, 2, 1 / 4]


def test_rkd_equals_the_published_loss_and_gradient(cpu_path: str) -> None:
    t = features(40, 24, seed=1, dtype=torch.float32)
    s = features(40, 16, dtype=torch.float32).requires_grad_()
    expected = published(s, t)
    (wanted,) = torch.autograd.grad(expected, s)
    found = angle_loss(s, t, reduction="rkd", backend="cpu")
    (gradient,) = torch.autograd.grad(found, s)
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-9)


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(0, 70),
    d_s=st.integers(1, 9),
    d_t=st.integers(1, 9),
    delta=st.sampled_from([0.1, 0.5, 1.0, 3.0, math.inf]),
    twins=st.booleans(),
    seed=st.integers(0, 999),
)
def test_paths_agree_with_the_reference_on_any_shape(n, d_s, d_t, delta, twins, seed) -> None:
    s, t = features(n, d_s, seed), features(n, d_t, seed + 1)
    if twins and n > 4:
        s[3], t[4] = s[0], t[1]
    s.requires_grad_()
    expected = angle_loss(s, t, delta=delta, reduction="sum", backend="reference")
    found = angle_loss(s, t, delta=delta, reduction="sum", backend="cpu")
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    if n:
        (wanted,), (got,) = (torch.autograd.grad(x, s) for x in (expected, found))
        short = torch.pdist(s.detach())
        short = short[short > 0].min() if (short > 0).any() else 1.0
        torch.testing.assert_close(got, wanted, rtol=1e-7, atol=float(1e-10 * (1 + short**-2)))


@pytest.mark.parametrize("columns", [16, 32, 48])
@pytest.mark.parametrize("n", [15, 16, 17, 31, 33, 64, 97])
def test_the_loop_is_right_at_every_tile_edge(n: int, columns: int, monkeypatch) -> None:
    """One tile, several and a ragged tail, with tiles small enough to cross many edges."""
    monkeypatch.setattr(compiled, "COLUMNS", columns)
    monkeypatch.setattr(compiled, "ROWS", 3 if n % 2 else 8)
    monkeypatch.setattr(compiled, "triangles", compiled.triangles.py_func)
    n = min(n, 49)  # plain Python is slow
    s, t = features(n, 3).requires_grad_(), features(n, 2, seed=1)
    if compiled.ROWS == 3 and -(-n // 16) * 16 % 3:
        monkeypatch.setattr(compiled, "ROWS", 4)
    found = angle_loss(s, t, reduction="sum", backend="cpu")
    expected = angle_loss(s, t, reduction="sum", backend="reference")
    torch.testing.assert_close(found, expected)
    for a, b in zip(torch.autograd.grad(found, s), torch.autograd.grad(expected, s), strict=True):
        torch.testing.assert_close(a, b)


def test_gradcheck(cpu_path: str) -> None:
    s, t = features(7, 3).requires_grad_(), features(7, 4, seed=1)
    assert torch.autograd.gradcheck(lambda s: angle_loss(s, t, delta=0.3, backend="cpu"), s)


def test_teacher_receives_no_gradient() -> None:
    s, t = features(6, 3).requires_grad_(), features(6, 3, seed=1).requires_grad_()
    for backend in ("cpu", "reference"):
        angle_loss(s, t, backend=backend).backward()
    assert t.grad is None and s.grad is not None


def test_unchanged_by_rotation_shift_and_scale() -> None:
    s, t = features(20, 6), features(20, 4, seed=1)
    rotation = torch.linalg.qr(features(6, 6, seed=2)).Q
    moved = 7.5 * s @ rotation - 3
    torch.testing.assert_close(angle_loss(moved, t), angle_loss(s, t), rtol=1e-9, atol=0)
    assert angle_loss(moved, s).item() == pytest.approx(0, abs=1e-18)


def test_duplicates_count_as_zero_and_have_no_gradient(cpu_path: str) -> None:
    """Naive code gives gradients of about 1e9 here."""
    s, t = features(8, 4, dtype=torch.float32), features(8, 4, seed=1, dtype=torch.float32)
    s[5] = s[2]
    for backend in ("cpu", "reference"):
        leaf = s.clone().requires_grad_()
        loss = angle_loss(leaf, t, reduction="sum", backend=backend)
        expected = oracles.angle_sum(s.tolist(), t.tolist(), 1.0)
        assert loss.item() == pytest.approx(expected, rel=1e-5)
        (gradient,) = torch.autograd.grad(loss, leaf)
        assert gradient.abs().max() < 10
    same = torch.ones(6, 4, requires_grad=True)
    loss = angle_loss(same, t[:6], backend="cpu")
    loss.backward()
    assert loss.item() == 0 and same.grad is not None and not same.grad.any()


def test_near_duplicates_are_told_apart(cpu_path: str) -> None:
    """Arms of 1e-4 of the rows' length: naive float32 Gram code is off by .17 in the cosine."""
    s, t = features(12, 16, dtype=torch.float32), features(12, 16, seed=1, dtype=torch.float32)
    for i, (a, b) in enumerate([(0, 1), (2, 3), (2, 4)]):
        s[b] = s[a] + 1e-4 * s[a].norm() * F.normalize(features(1, 16, 9 + i)[0].float(), dim=0)
    leaf = s.clone().requires_grad_()
    loss = angle_loss(leaf, t, reduction="sum", backend="cpu")
    (gradient,) = torch.autograd.grad(loss, leaf)
    exact = s.double().requires_grad_()
    truth = angle_loss(exact, t.double(), reduction="sum", backend="reference")
    (wanted,) = torch.autograd.grad(truth, exact)
    assert loss.item() == pytest.approx(truth.item(), rel=1e-6)
    torch.testing.assert_close(gradient.double(), wanted, rtol=1e-5, atol=1e-6 * wanted.abs().max())


def test_an_offset_of_1000_costs_no_more_than_the_rounding_of_the_input(cpu_path: str) -> None:
    s = (features(30, 16) + 1000).float()
    t = (features(30, 16, seed=1) + 1000).float()
    truth = angle_loss(s.double(), t.double(), backend="reference").item()
    assert angle_loss(s, t, backend="cpu").item() == pytest.approx(truth, rel=1e-5)


@pytest.mark.parametrize("scale", [1e-30, 1e-22, 1e-21, 3e-21, 1e-12, 1e18, 3e18, 1e19, 1e30])
@pytest.mark.parametrize("shape", [(9, 4), (40, 100)])
def test_scale_does_not_matter_even_where_squares_leave_float32(scale: float, shape) -> None:
    """Below and above the size where all differences are taken."""
    s, t = features(*shape, dtype=torch.float32), features(*shape, seed=1, dtype=torch.float32)
    expected = angle_loss(s, t).item()
    for backend in ("cpu", "reference"):
        found = angle_loss(s * scale, t, backend=backend).item()
        assert found == pytest.approx(expected, rel=1e-4)
    leaf = (s * scale).requires_grad_()
    (gradient,) = torch.autograd.grad(angle_loss(leaf, t, backend="cpu"), leaf)
    assert gradient.isfinite().all() and gradient.any()


def test_a_second_derivative_is_refused_and_not_left_out() -> None:
    s, t = features(5, 3).requires_grad_(), features(5, 3, seed=1)
    (gradient,) = torch.autograd.grad(angle_loss(s, t), s, create_graph=True)
    with pytest.raises(RuntimeError, match="not twice differentiable"):
        gradient.square().sum().backward()
    (gradient,) = torch.autograd.grad(angle_loss(s, t, backend="reference"), s, create_graph=True)
    gradient.square().sum().backward()
    assert s.grad is not None and s.grad.any()


def test_memory_stays_at_n_squared(cpu_path: str) -> None:
    """No tensor of the CPU path is larger than its inputs, N^2 padded, or a tile."""
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = 0

    class Meter(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for x in out if isinstance(out, tuple | list) else [out]:
                if isinstance(x, torch.Tensor):
                    largest = max(largest, x.untyped_storage().nbytes())
            return out

    s, t = features(300, 8, dtype=torch.float32), features(300, 8, seed=1, dtype=torch.float32)
    with Meter():
        cpu.angle_loss(s, t, 1.0, True)
    assert 0 < largest <= max(8 * 304**2, 8 * max(cpu.TILE, 300**2))

"""pairwise_distance, distance_loss and triplet_angles."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.kernels import distance_loss, pairwise_distance, triplet_angles
from tests.shared.kernels import oracles
from tests.shared.kernels.test_angle_loss import features


@pytest.mark.parametrize("squared", [False, True])
@pytest.mark.parametrize(("m", "n"), [(0, 3), (3, 0), (1, 1), (5, 2), (33, 17)])
def test_distances_match_plain_loop(m: int, n: int, squared: bool, cpu_path: str) -> None:
    x, y = features(m, 4), features(n, 4, seed=1)
    for backend in ("cpu", "reference"):
        found = pairwise_distance(x, y, squared=squared, backend=backend)
        assert found.shape == (m, n)
        for i, a in enumerate(x.tolist()):
            for j, b in enumerate(y.tolist()):
                d = oracles.distance(a, b)
                assert found[i, j].item() == pytest.approx(d * d if squared else d, rel=1e-12)


def test_self_distance_and_duplicates_are_exactly_0(cpu_path: str) -> None:
    """torch.cdist gives 6.9 on the diagonal here."""
    x = (features(40, 64, dtype=torch.float32) + 1000).requires_grad_()
    with torch.no_grad():
        x[7] = x[3]
    d = pairwise_distance(x, backend="cpu")
    assert not d.diagonal().any() and d[7, 3] == 0 and d[3, 7] == 0
    truth = pairwise_distance(x.detach().double(), backend="reference")
    torch.testing.assert_close(d.detach().double(), truth, rtol=1e-6, atol=0)
    (gradient,) = torch.autograd.grad(d[3, 7] + d[5, 5], x)
    assert not gradient.any()


@pytest.mark.parametrize("scale", [1e-4, 1e-6, 1e-10])
def test_near_duplicates_keep_relative_accuracy(scale: float, cpu_path: str) -> None:
    """A float32 Gram matrix is off by .17 of the distance at a relative distance of 1e-4."""
    x = features(20, 32, dtype=torch.float32)
    x[1] = x[0] + scale * features(1, 32, seed=5)[0].float()
    truth = pairwise_distance(x.double(), backend="reference")
    leaf = x.clone().requires_grad_()
    found = pairwise_distance(leaf, backend="cpu")
    torch.testing.assert_close(found.double(), truth, rtol=2e-6, atol=0)
    if truth[0, 1] > 0:
        (gradient,) = torch.autograd.grad(found[0, 1], leaf)
        wanted = (x[0] - x[1]).double() / truth[0, 1]
        torch.testing.assert_close(gradient[0].double(), wanted, rtol=1e-4, atol=1e-5)


@settings(max_examples=40, deadline=None)
@given(
    m=st.integers(0, 40),
    n=st.integers(0, 40),
    d=st.integers(0, 9),
    squared=st.booleans(),
    alone=st.booleans(),
    seed=st.integers(0, 999),
)
def test_distances_agree_with_the_reference_on_any_shape(m, n, d, squared, alone, seed) -> None:
    x, y = features(m, d, seed).requires_grad_(), features(n, d, seed + 1).requires_grad_()
    leaves = (x,) if alone else (x, y)
    found, expected = (
        pairwise_distance(*leaves, squared=squared, backend=b) for b in ("cpu", "reference")
    )
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    weights = features(*found.shape, seed=seed + 2) if found.numel() else found.detach()
    for a, b in zip(
        torch.autograd.grad((found * weights).sum(), leaves, allow_unused=True),
        torch.autograd.grad((expected * weights).sum(), leaves, allow_unused=True),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)


def test_one_bad_row_leaves_the_others_right(cpu_path: str) -> None:
    x = features(6, 3, dtype=torch.float32)
    x[2, 1], x[4, 0] = math.nan, math.inf
    d = pairwise_distance(x, backend="cpu")
    good = [0, 1, 3, 5]
    truth = pairwise_distance(x[good].double(), backend="reference")
    torch.testing.assert_close(d[good][:, good].double(), truth, rtol=1e-5, atol=0)
    assert d[2].isnan().all() and d[:, 2].isnan().all() and (d[4, good] == math.inf).all()


def test_squares_that_leave_float32_do_not_spoil_distances(cpu_path: str) -> None:
    for scale in (1e-30, 1e-22, 1e-21, 3e18, 1e25):
        x = features(40, 60, dtype=torch.float32) * scale
        truth = pairwise_distance(x.double(), backend="reference")
        found = pairwise_distance(x, backend="cpu").double()
        torch.testing.assert_close(found / scale, truth / scale, rtol=1e-5, atol=0)


@pytest.mark.parametrize("scale", [1e-22, 2e-23, 1e20])
@pytest.mark.parametrize("shape", [(8, 8), (40, 100)])
def test_distance_loss_does_not_depend_on_a_scale_near_the_ends_of_float32(scale, shape) -> None:
    """Also where all rows are about equally far apart, so that none is near another."""
    rows = torch.eye(*shape, dtype=torch.float64) * (1 + 0.05 * features(*shape).abs())
    t = features(*shape, seed=1)
    expected = distance_loss(rows, t, backend="reference").item()
    found = distance_loss((rows * scale).float(), t.float(), backend="cpu").item()
    assert found == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize("squared", [False, True])
def test_distance_gradcheck(alone: bool, squared: bool, cpu_path: str) -> None:
    leaves = (features(5, 3).requires_grad_(), features(4, 3, seed=1).requires_grad_())

    def f(*leaves: torch.Tensor) -> torch.Tensor:
        return pairwise_distance(*leaves, squared=squared, backend="cpu").clamp(min=1e-3)

    assert torch.autograd.gradcheck(f, leaves[: 1 if alone else 2])


@pytest.mark.parametrize("penalty", ["squared", "huber"])
@pytest.mark.parametrize("n", [0, 1, 2, 3, 9])
def test_eq3_matches_plain_loop(n: int, penalty: str, cpu_path: str) -> None:
    s, t = features(n, 5), features(n, 3, seed=1)
    if n > 5:
        s[4], t[3] = s[2], t[1]
    expected = oracles.distance_sum(s.tolist(), t.tolist(), penalty, 0.3)
    count = max(1, math.comb(n, 2))
    for backend in ("cpu", "reference"):
        for reduction, factor in (("sum", 1), ("mean", 1 / count), ("rkd", 2 / max(1, n * n))):
            found = distance_loss(
                s, t, penalty=penalty, delta=0.3, reduction=reduction, backend=backend
            )
            assert found.item() == pytest.approx(expected * factor, rel=1e-11, abs=1e-14)


def test_rkd_distance_equals_the_published_loss_and_gradient(cpu_path: str) -> None:
    def published(x: torch.Tensor) -> torch.Tensor:
        d = (x[:, None] - x[None]).square().sum(-1).clamp(min=1e-12).sqrt()
        d = d * (1 - torch.eye(len(x)))
        return d / d[d > 0].mean()

    s = features(40, 16, dtype=torch.float32).requires_grad_()
    t = features(40, 24, seed=1, dtype=torch.float32)
    expected = F.smooth_l1_loss(published(s), published(t))
    found = distance_loss(s, t, penalty="huber", reduction="rkd", backend="cpu")
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    (wanted,), (gradient,) = (torch.autograd.grad(x, s) for x in (expected, found))
    torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("penalty", ["squared", "huber"])
def test_distance_loss_gradcheck_also_through_the_mean(penalty: str, cpu_path: str) -> None:
    s, t = features(6, 3).requires_grad_(), features(6, 3, seed=1)

    def f(s: torch.Tensor) -> torch.Tensor:
        return distance_loss(s, t, penalty=penalty, delta=0.3, reduction="sum", backend="cpu")

    assert torch.autograd.gradcheck(f, s)


def test_distance_loss_is_unchanged_by_scale_and_shift_of_either_side() -> None:
    s, t = features(20, 6), features(20, 4, seed=1)
    expected = distance_loss(s, t).item()
    assert distance_loss(3 * s + 5, 0.1 * t - 2).item() == pytest.approx(expected, rel=1e-9)
    assert distance_loss(s, 4 * s).item() == pytest.approx(0, abs=1e-20)


def test_all_rows_equal_is_a_loss_without_gradient(cpu_path: str) -> None:
    s, t = torch.ones(5, 3, requires_grad=True), features(5, 3, dtype=torch.float32)
    loss = distance_loss(s, t, reduction="sum", backend="cpu")
    loss.backward()
    expected = oracles.distance_sum(s.tolist(), t.tolist(), "squared", 1.0)
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert s.grad is not None and not s.grad.any()


@pytest.mark.parametrize("n", [0, 1, 2, 5, 18])
def test_eq4_matches_plain_loop(n: int, cpu_path: str) -> None:
    x = features(n, 3)
    if n > 4:
        x[4] = x[1]
    for backend in ("cpu", "reference"):
        found = triplet_angles(x, backend=backend)
        assert found.shape == (n, n, n)
        for i in range(n):
            for j in range(n):
                for k in range(n):
                    c = oracles.cosine(x.tolist(), i, j, k) or 0.0
                    assert found[i, j, k].item() == pytest.approx(c, abs=1e-12)


@settings(max_examples=25, deadline=None)
@given(n=st.integers(0, 45), d=st.integers(2, 9), seed=st.integers(0, 999))
def test_angles_agree_with_the_reference_on_any_shape(n, d, seed) -> None:
    x = features(n, d, seed).requires_grad_()
    found, expected = (triplet_angles(x, backend=b) for b in ("cpu", "reference"))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)
    weights = features(n * n, n, seed + 1).view(n, n, n) if n else found.detach()
    for a, b in zip(
        torch.autograd.grad((found * weights).sum(), x),
        torch.autograd.grad((expected * weights).sum(), x),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6 * float(1 + b.abs().sum()))


def test_angle_gradcheck(cpu_path: str) -> None:
    x = features(5, 3).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: triplet_angles(x, backend="cpu"), x)


def test_angles_of_near_duplicates_are_within_the_bar(cpu_path: str) -> None:
    """|cosine error| <= 1e-3 at a relative distance of 1e-4, <= 1e-5 for ordinary rows."""
    x = features(16, 32, dtype=torch.float32)
    ordinary = triplet_angles(x, backend="cpu").double()
    truth = triplet_angles(x.double(), backend="reference")
    assert (ordinary - truth).abs().max() <= 1e-5
    for b in (3, 7):
        x[b] = x[0] + 1e-4 * x[0].norm() * F.normalize(features(1, 32, 9 + b)[0].float(), dim=0)
    truth = triplet_angles(x.double(), backend="reference")
    assert (triplet_angles(x, backend="cpu").double() - truth).abs().max() <= 1e-3

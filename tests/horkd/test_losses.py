"""HORKD's equations against plain float64 loops, in value and gradient."""

from __future__ import annotations

import math
from itertools import combinations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from horkd import losses
from horkd.losses import L1, L2, L3, L_C, class_centers


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def agrees(ours, loop, g: Tensor) -> None:
    a, b = g.clone().requires_grad_(), g.clone().requires_grad_()
    found, wanted = ours(a), loop(b)
    assert found.item() == pytest.approx(wanted.item(), rel=1e-10, abs=1e-14)
    found, wanted = torch.autograd.grad(found, a)[0], torch.autograd.grad(wanted, b)[0]
    torch.testing.assert_close(found, wanted, rtol=1e-8, atol=1e-12)


def distance(x: Tensor, y: Tensor) -> Tensor:
    return sum((p - q) ** 2 for p, q in zip(x, y, strict=True)) ** 0.5


def huber(e: Tensor) -> Tensor:
    return e**2 / 2 if abs(e) <= 1 else abs(e) - 0.5


def l1_as_a_loop(f: Tensor, g: Tensor) -> Tensor:
    return sum(abs(p - q) for a, b in zip(f, g, strict=True) for p, q in zip(a, b, strict=True))


def l2_as_a_loop(f: Tensor, g: Tensor, penalty=lambda e: e**2) -> Tensor:
    pairs = list(combinations(range(len(f)), 2))
    d_f, d_g = ({p: distance(x[p[0]], x[p[1]]) for p in pairs} for x in (f, g))
    mu_f, mu_g = (sum(d.values()) / len(pairs) for d in (d_f, d_g))
    return sum(penalty(d_g[p] / mu_g - d_f[p] / mu_f) for p in pairs)


def l3_as_a_loop(f: Tensor, g: Tensor) -> Tensor:
    def cosine(x: Tensor, i: int, j: int, k: int) -> Tensor:
        dot = sum((x[i] - x[j]) * (x[k] - x[j]))
        return dot / (distance(x[i], x[j]) * distance(x[k], x[j]))

    total = torch.zeros((), dtype=torch.float64)
    for triple in combinations(range(len(f)), 3):
        for j in triple:
            i, k = (v for v in triple if v != j)
            total = total + huber(cosine(g, i, j, k) - cosine(f, i, j, k))
    return total


def lc_as_a_loop(f: Tensor, g: Tensor, u: Tensor) -> Tensor:
    return sum((distance(a, c) - distance(b, c)) ** 2 for a, b in zip(f, g, strict=True) for c in u)


# -- the equations -------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.integers(3, 7), st.integers(2, 5), st.integers(2, 5), st.integers(0, 999))
def test_eq2_to_eq7_match_plain_loops(m: int, d_t: int, d_s: int, seed: int) -> None:
    f, g, u = (normal(rows, d_s, seed=seed + i) for i, rows in enumerate((m, m, 4)))
    f_t = normal(m, d_t, seed=seed + 3)
    agrees(lambda g: L1(f, g), lambda g: l1_as_a_loop(f, g), g)
    agrees(lambda g: L2(f_t, g), lambda g: l2_as_a_loop(f_t, g), g)
    agrees(lambda g: L3(f_t, g), lambda g: l3_as_a_loop(f_t, g), g)
    agrees(lambda g: L_C(f, g, u), lambda g: lc_as_a_loop(f, g, u), g)


def test_eq3_with_rkds_penalty_matches_plain_loop() -> None:
    f, g = normal(7, 3, seed=1), 5 * normal(7, 2, seed=2) ** 3  # so that both branches occur
    agrees(lambda g: L2(f, g, penalty="huber"), lambda g: l2_as_a_loop(f, g, huber), g)


@pytest.mark.parametrize("reduction", ["mean", "rkd"])
def test_reductions_divide_the_sum_by_its_tuples(reduction: str) -> None:
    f, g, u, m = normal(6, 4, seed=1), normal(6, 4, seed=2), normal(5, 4, seed=3), 6
    rkd = reduction == "rkd"
    for loss, inputs, divisor in (
        (L1, (f, g), m),
        (L2, (f, g), m**2 / 2 if rkd else math.comb(m, 2)),
        (L3, (f, g), m**3 / 2 if rkd else 3 * math.comb(m, 3)),
        (L_C, (f, g, u), m * len(u)),
    ):
        found = loss(*inputs, reduction=reduction).item()
        assert found == pytest.approx(loss(*inputs).item() / divisor, rel=1e-12), loss.__name__


def test_the_mean_over_one_image_is_its_sum() -> None:
    f, g, u = normal(1, 3, seed=1), normal(1, 3, seed=2), normal(1, 3, seed=3)
    assert L1(f, g, reduction="mean").item() == L1(f, g).item() > 0
    assert L_C(f, g, u, reduction="mean").item() == L_C(f, g, u).item() > 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_rkd_preset_is_the_published_formula(dtype: torch.dtype) -> None:
    """25 RKD-D + 50 RKD-A over all N^2 and N^3 entries, with the tensors written out."""
    f = F.normalize(normal(24, 40, seed=1)).to(dtype)
    g = F.normalize(normal(24, 16, seed=2)).to(dtype).requires_grad_()

    def parts(x: Tensor) -> tuple[Tensor, Tensor]:
        difference = x[None] - x[:, None]
        square = difference.square().sum(-1)
        d = torch.where(square == 0, 1, square).sqrt() * (square > 0)
        arms = F.normalize(difference, dim=2)
        return d / d[d > 0].mean(), arms @ arms.transpose(1, 2)

    (d_t, angle_t), (d_s, angle_s) = parts(f), parts(g)
    wanted = 25 * F.smooth_l1_loss(d_s, d_t) + 50 * F.smooth_l1_loss(angle_s, angle_t)
    found = 25 * L2(f, g, penalty="huber", reduction="rkd") + 50 * L3(f, g, reduction="rkd")
    rounding = 1e-11 if dtype == torch.float64 else 1e-5
    assert found.item() == pytest.approx(wanted.item(), rel=rounding)
    found, wanted = torch.autograd.grad(found, g)[0], torch.autograd.grad(wanted, g)[0]
    assert (found - wanted).norm() <= rounding * wanted.norm()


def test_l2_and_l3_do_not_see_scale_shift_or_rotation() -> None:
    f = normal(9, 5, seed=3)
    turn = torch.linalg.qr(normal(5, 5, seed=4))[0]
    same = 3 * f @ turn + 7
    assert L2(f, same).item() == pytest.approx(0, abs=1e-20)
    assert L3(f, same).item() == pytest.approx(0, abs=1e-20)
    assert L1(f, same) > 1 and L_C(f, same, normal(3, 5, seed=5)) > 1


def test_sums_of_unit_features_have_the_size_that_the_weights_expect() -> None:
    """m 64, D 512, C 100: weighted, L1 is far above the rest, as the paper's ablation has it."""
    centers = normal(100, 512, seed=1)
    y = torch.arange(64) % 100
    f = F.normalize(F.normalize(centers)[y] + normal(64, 512, seed=2) / 512**0.5)
    g = F.normalize(f + 0.45 * normal(64, 512, seed=3) / 512**0.5)
    u = 0.7 * F.normalize(centers)
    found = [L1(f, g), 0.02 * L2(f, g), 0.01 * L3(f, g), L_C(f, g, u)]
    for value, expected in zip(found, (518, 0.012, 0.25, 1.5), strict=True):
        assert expected / 4 < value < expected * 4


# -- degenerate input ----------------------------------------------------------------------------


def all_four(f: Tensor, g: Tensor, u: Tensor) -> list[Tensor]:
    return [L1(f, g), L2(f, g), L3(f, g), L_C(f, g, u)]


@pytest.mark.parametrize("m", [1, 2])
def test_small_batches_have_a_value_and_a_gradient(m: int) -> None:
    f, g, u = normal(m, 3, seed=1), normal(m, 3, seed=2).requires_grad_(), normal(2, 3, seed=3)
    found = all_four(f, g, u)
    sum(found).backward()
    assert g.grad.isfinite().all()
    assert found[1].item() == found[2].item() == 0  # one distance over its own mean is 1


def test_duplicates_zero_rows_and_rows_on_centres_have_a_finite_gradient() -> None:
    f, g = normal(6, 3, seed=1), normal(6, 3, seed=2)
    g[1], g[2], g[3] = g[0], 0, 0
    f[4] = f[5]
    u = torch.stack([g[0], f[0], torch.zeros(3, dtype=torch.float64)])
    g.requires_grad_()
    for loss in all_four(f, g, u):
        (gradient,) = torch.autograd.grad(loss, g)
        assert loss.isfinite() and gradient.isfinite().all() and gradient.abs().max() < 100


def test_a_student_that_agrees_costs_nothing() -> None:
    f, u = normal(6, 3, seed=1), normal(2, 3, seed=2)
    g = f.clone().requires_grad_()
    for loss in all_four(f, g, u):
        assert loss.item() == pytest.approx(0, abs=1e-20)
        assert torch.autograd.grad(loss, g)[0].abs().max() < 1e-12


@pytest.mark.parametrize("which", [0, 1, 2])
def test_a_nan_makes_each_loss_nan(which: int) -> None:
    given = [normal(5, 3, seed=1), normal(5, 3, seed=2), normal(2, 3, seed=3)]
    given[which][1, 1] = math.nan
    found = all_four(*given)
    assert all(loss.isnan() for loss in (found if which < 2 else found[3:]))


def test_only_the_student_receives_gradient() -> None:
    given = [normal(5, 3, seed=1), normal(5, 3, seed=2), normal(2, 3, seed=3)]
    f, g, u = (x.requires_grad_() for x in given)
    for loss in all_four(f, g, u):
        found = torch.autograd.grad(loss, (f, g, u), allow_unused=True)
        assert found[0] is None and found[2] is None and (found[1] != 0).any()


def test_gradients_are_those_of_the_values() -> None:
    f, u = normal(5, 3, seed=1), normal(2, 3, seed=3)
    for loss in (L1, L2, L3, lambda f, g: L_C(f, g, u)):
        g = normal(5, 3, seed=2).requires_grad_()
        assert torch.autograd.gradcheck(lambda g, loss=loss: loss(f, g), g)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    low = [normal(40, 70, seed=s).to(dtype) for s in (1, 2, 3)]
    expected = [loss.item() for loss in all_four(*(x.float() for x in low))]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = all_four(*low)
    assert [loss.dtype for loss in found] == [torch.float32] * 4
    assert [loss.item() for loss in found] == expected


def test_bad_input_is_refused_in_one_line() -> None:
    f, g = normal(4, 3, seed=1), normal(4, 2, seed=2)
    with pytest.raises(ValueError, match=r"L1: student \(4, 2\) and teacher \(4, 3\) differ"):
        L1(f, g)
    with pytest.raises(ValueError, match="do not fit"):
        L_C(f, g, f)
    for loss in (L1, L2, L3, lambda f, g, reduction: L_C(f, g, f, reduction=reduction)):
        with pytest.raises(ValueError, match="no reduction 'other'; there are: mean, sum"):
            loss(f, f, reduction="other")


# -- class centres -------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [1, 7, 100])
def test_eq6_matches_plain_loop(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "CHUNK", chunk)
    f = normal(50, 3, seed=1)
    y = torch.randperm(50, generator=torch.Generator().manual_seed(0)) % 6
    found = class_centers(f.requires_grad_(), y, 6)
    assert found.shape == (6, 3) and not found.requires_grad
    for c in range(6):
        rows = [row.tolist() for row, label in zip(f, y, strict=True) if label == c]
        for d in range(3):
            wanted = math.fsum(row[d] for row in rows) / len(rows)
            assert found[c, d].item() == pytest.approx(wanted, rel=1e-12)


def test_class_centers_sums_in_float64_and_gives_float32() -> None:
    f = torch.tensor([[1e8], [1.0], [-1e8], [5.0]])
    found = class_centers(f, torch.tensor([0, 0, 0, 1]), 2)
    assert found.dtype == torch.float32
    assert found.flatten().tolist() == pytest.approx([1 / 3, 5], rel=1e-7)
    assert class_centers(f.bfloat16(), torch.tensor([0, 0, 0, 1]), 2).dtype == torch.float32
    assert class_centers(f.double(), torch.tensor([0, 0, 0, 1]), 2).dtype == torch.float64


def test_a_class_without_an_image_is_named() -> None:
    f = normal(4, 2, seed=1)
    with pytest.raises(ValueError, match="class 1 of 4 has no image"):
        class_centers(f, torch.tensor([0, 2, 2, 0]), 4)
    with pytest.raises(ValueError, match="class 0 of 2 has no image"):
        class_centers(f[:0], torch.zeros(0, dtype=torch.int64), 2)


@pytest.mark.parametrize("y", [[0, 1, 2, 3], [0, 1, -1, 2], [0, 1, 2]])
def test_labels_that_do_not_fit_are_refused(y: list[int]) -> None:
    with pytest.raises(ValueError, match="give each feature a label from 0 to 2"):
        class_centers(normal(4, 2, seed=1), torch.tensor(y), 3)

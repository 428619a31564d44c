"""EmbedKD's equations against plain float64 loops, in value and gradient."""

from __future__ import annotations

import math
from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import shared.losses
from embedkd.losses import absolute, attention, attention_map, hint, relative, triplet


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def agrees(ours, loop, x: Tensor) -> None:
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    found, wanted = ours(a), loop(b)
    assert found.item() == pytest.approx(wanted.item(), rel=1e-10, abs=1e-14)
    found, wanted = torch.autograd.grad(found, a)[0], torch.autograd.grad(wanted, b)[0]
    torch.testing.assert_close(found, wanted, rtol=1e-8, atol=1e-12)


def distance(x: Tensor, y: Tensor) -> Tensor:
    return sum((p - q) ** 2 for p, q in zip(x, y, strict=True)) ** 0.5


def absolute_as_a_loop(s: Tensor, t: Tensor) -> Tensor:
    return sum(distance(a, b) for a, b in zip(s, t, strict=True)) / len(s)


def relative_as_a_loop(s: Tensor, t: Tensor) -> Tensor:
    pairs = list(combinations(range(len(s)), 2))
    return sum(abs(distance(s[i], s[j]) - distance(t[i], t[j])) for i, j in pairs) / len(pairs)


def frobenius_as_a_loop(s: Tensor, t: Tensor) -> Tensor:
    """Over the whole matrix: both orders of each pair, and a diagonal of zeros."""
    total = torch.zeros((), dtype=torch.float64)
    for i in range(len(s)):
        for j in range(len(s)):
            if i != j:
                total = total + (distance(s[i], s[j]) - distance(t[i], t[j])) ** 2
    return total**0.5


def hint_as_a_loop(a: Tensor, b: Tensor) -> Tensor:
    return sum((p - q) ** 2 for p, q in zip(a.flatten(), b.flatten(), strict=True)) / a.numel()


def attention_as_a_loop(a: Tensor, b: Tensor) -> Tensor:
    def unit_map(image: Tensor) -> list[Tensor]:
        flat = [
            sum(abs(channel[i, j]) for channel in image)
            for i in range(image.shape[1])
            for j in range(image.shape[2])
        ]
        norm = sum(v**2 for v in flat) ** 0.5
        return [v / norm for v in flat]

    rows = [distance(unit_map(s), unit_map(t)) for s, t in zip(a, b, strict=True)]
    return sum(rows) / len(rows)


# -- the equations -------------------------------------------------------------------------------


def test_eq1_is_the_shared_triplet_loss() -> None:
    assert triplet is shared.losses.triplet


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.integers(2, 7), st.integers(2, 5), st.integers(2, 5), st.integers(0, 999))
def test_eq4_to_eq6_match_plain_loops(b: int, d_s: int, d_t: int, seed: int) -> None:
    s, t = normal(b, d_s, seed=seed), normal(b, d_s, seed=seed + 1)
    t_d = normal(b, d_t, seed=seed + 2)
    agrees(lambda s: absolute(s, t), lambda s: absolute_as_a_loop(s, t), s)
    agrees(lambda s: relative(s, t_d), lambda s: relative_as_a_loop(s, t_d), s)
    agrees(lambda s: relative(s, t_d, "frobenius"), lambda s: frobenius_as_a_loop(s, t_d), s)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    st.integers(1, 3), st.integers(1, 4), st.integers(1, 3), st.integers(2, 3), st.integers(0, 999)
)
def test_eq8_to_eq11_match_plain_loops(b: int, c: int, h: int, w: int, seed: int) -> None:
    a, same = normal(b, c, h, w, seed=seed), normal(b, c, h, w, seed=seed + 1)
    other = normal(b, c + 2, h, w, seed=seed + 2)
    agrees(lambda a: hint(a, same), lambda a: hint_as_a_loop(a, same), a)
    agrees(lambda a: attention(a, other), lambda a: attention_as_a_loop(a, other), a)


@pytest.mark.parametrize("b", [2, 5, 64])
def test_frobenius_is_the_batch_size_times_the_root_mean_square(b: int) -> None:
    """So a lambda for it holds for one batch size."""
    s, t = normal(b, 40, seed=1), normal(b, 60, seed=2)
    errors = [
        (s[i] - s[j]).square().sum().sqrt() - (t[i] - t[j]).square().sum().sqrt()
        for i in range(b)
        for j in range(b)
    ]
    assert len(errors) == b**2
    rms = math.sqrt(math.fsum(float(e) ** 2 for e in errors) / b**2)
    assert relative(s, t, "frobenius").item() == pytest.approx(b * rms, rel=1e-10)


def test_relative_does_not_see_a_shift_that_absolute_sees() -> None:
    """The paper's Fig. 2."""
    t = normal(6, 4, seed=1)
    assert relative(t + 2, t).item() == pytest.approx(0, abs=1e-14)
    assert absolute(t + 2, t).item() == pytest.approx(2 * 4**0.5)


def test_eq10_sums_absolute_values_over_channels() -> None:
    maps = torch.tensor([[[[1.0, -2.0]], [[-3.0, 4.0]]]])
    assert attention_map(maps).tolist() == [[[4.0, 6.0]]]


def test_attention_averages_the_larger_map() -> None:
    """A map that repeats each position 2 x 2 is the small one; else it is the loop on averages."""
    small, a = normal(2, 3, 2, 3, seed=1), normal(2, 4, 4, 6, seed=2)
    large = small.repeat_interleave(2, 2).repeat_interleave(2, 3)
    assert attention(small, large).item() == pytest.approx(0, abs=1e-15)
    sums = a.abs().sum(1, keepdim=True)
    averaged = (sums[..., ::2, ::2] + sums[..., 1::2, ::2] + sums[..., ::2, 1::2]
                + sums[..., 1::2, 1::2]) / 4  # fmt: skip
    wanted = attention_as_a_loop(averaged, small).item()
    assert attention(a, small).item() == pytest.approx(wanted, rel=1e-12)


# -- degenerate input ----------------------------------------------------------------------------


def all_five(s: Tensor, t: Tensor, a: Tensor, b: Tensor) -> list[Tensor]:
    """Of embeddings s, t and maps a, b."""
    return [
        absolute(s, t), relative(s, t), relative(s, t, "frobenius"), hint(a, b), attention(a, b)
    ]  # fmt: skip


def inputs(b: int = 4) -> list[Tensor]:
    return [normal(b, 3, seed=1), normal(b, 3, seed=2), normal(b, 2, 3, 2, seed=3),
            normal(b, 2, 3, 2, seed=4)]  # fmt: skip


def test_one_row_has_no_relation_but_a_gradient() -> None:
    s, t, a, b = inputs(1)
    for loss in all_five(s.requires_grad_(), t, a.requires_grad_(), b):
        loss.backward()
    assert s.grad.isfinite().all() and a.grad.isfinite().all()
    assert relative(s, t).item() == relative(s, t, "frobenius").item() == 0


def test_a_student_that_agrees_costs_nothing_and_has_gradient_zero() -> None:
    _, t, _, b = inputs()
    s, a = t.clone().requires_grad_(), b.clone().requires_grad_()
    for loss, x in zip(all_five(s, t, a, b), (s, s, s, a, a), strict=True):
        assert loss.item() == 0 and (torch.autograd.grad(loss, x)[0] == 0).all()


def test_duplicates_and_maps_of_zeros_have_a_finite_gradient() -> None:
    s, t, a, b = inputs()
    s[1], s[2], t[3], a[0], b[1] = s[0], t[2], t[2], 0, 0
    s.requires_grad_(), a.requires_grad_()
    for loss, x in zip(all_five(s, t, a, b), (s, s, s, a, a), strict=True):
        (gradient,) = torch.autograd.grad(loss, x)
        assert loss.isfinite() and gradient.isfinite().all() and gradient.abs().max() < 10
    assert (torch.autograd.grad(attention(a, b), a)[0][0] == 0).all()


@pytest.mark.parametrize("which", [0, 1, 2, 3])
def test_a_nan_makes_each_loss_nan(which: int) -> None:
    given = inputs()
    given[which].view(-1)[4] = math.nan
    found = all_five(*given)
    assert all(loss.isnan() for loss in (found[:3] if which < 2 else found[3:]))
    assert all(loss.isfinite() for loss in (found[3:] if which < 2 else found[:3]))


def test_only_the_student_receives_gradient() -> None:
    s, t, a, b = (x.requires_grad_() for x in inputs())
    for loss, x in zip(all_five(s, t, a, b), (s, s, s, a, a), strict=True):
        found = torch.autograd.grad(loss, (t, b, x), allow_unused=True)
        assert found[0] is None and found[1] is None and (found[2] != 0).any()


def test_gradients_are_those_of_the_values() -> None:
    s, t, a, b = inputs()
    s.requires_grad_(), a.requires_grad_()
    for loss in (absolute, relative, lambda s, t: relative(s, t, "frobenius")):
        assert torch.autograd.gradcheck(lambda s, loss=loss: loss(s, t), s)
    for loss in (hint, attention):
        assert torch.autograd.gradcheck(lambda a, loss=loss: loss(a, b), a)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    low = [normal(*shape, seed=i).to(dtype) for i, shape in enumerate(
        [(40, 90), (40, 90), (3, 5, 4, 4), (3, 5, 4, 4)])]  # fmt: skip
    expected = [loss.item() for loss in all_five(*(x.float() for x in low))]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = all_five(*low)
    assert [loss.dtype for loss in found] == [torch.float32] * 5
    assert [loss.item() for loss in found] == expected


def test_bad_input_is_refused_in_one_line() -> None:
    s, _, a, _ = inputs()
    with pytest.raises(ValueError, match="no mode 'other'; there are: mean_abs, frobenius"):
        relative(s, s, "other")
    with pytest.raises(ValueError, match=r"absolute: student \(4, 3\) and teacher \(4, 2\)"):
        absolute(s, s[:, :2])
    with pytest.raises(ValueError, match="relative: student has 4 rows and teacher 1"):
        relative(s, s[:1])
    with pytest.raises(ValueError, match="hint: student"):
        hint(a, a[:, :1])
    with pytest.raises(ValueError, match="attention: student has 4 rows and teacher 1"):
        attention(a, a[:1])

"""The baselines against plain float64 loops, in value and gradient."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from shared.baselines import attention_transfer, darkrank, fitnet, pkt, rkd


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


def pkt_as_a_loop(s: Tensor, t: Tensor) -> Tensor:
    def affinity(x: Tensor) -> list[list[Tensor]]:
        norms = [sum(row**2) ** 0.5 for row in x]
        k = [
            [(sum(x[i] * x[j]) / (norms[i] * norms[j]) + 1) / 2 for j in range(len(x))]
            for i in range(len(x))
        ]
        return [[v / sum(row) for v in row] for row in k]

    total = torch.zeros((), dtype=torch.float64)
    for row_s, row_t in zip(affinity(s), affinity(t), strict=True):
        for p_s, p_t in zip(row_s, row_t, strict=True):
            total = total + p_t * torch.log((p_t + 1e-7) / (p_s + 1e-7))
    return total / len(s) ** 2


def darkrank_as_a_loop(s: Tensor, t: Tensor, alpha: float, beta: float, length: int) -> Tensor:
    """The likelihood as the product that the source prints."""
    total = torch.zeros((), dtype=torch.float64)
    for q in range(len(s)):
        others = [i for i in range(len(s)) if i != q]
        others.sort(key=lambda i: float(distance(t[q], t[i])))
        e = [torch.exp(-alpha * distance(s[q], s[i]) ** beta) for i in others[:length]]
        likelihood = math.prod([e[i] / sum(e[i:]) for i in range(len(e))])
        total = total - torch.log(likelihood)
    return total / len(s)


def attention_transfer_as_a_loop(a: Tensor, b: Tensor) -> Tensor:
    total, positions = torch.zeros((), dtype=torch.float64), a.shape[2] * a.shape[3]
    for image_a, image_b in zip(a, b, strict=True):
        rows = []
        for image in (image_a, image_b):
            flat = [sum(v**2 for v in image[:, i, j])
                    for i in range(image.shape[1]) for j in range(image.shape[2])]  # fmt: skip
            norm = sum(v**2 for v in flat) ** 0.5
            rows.append([v / norm for v in flat])
        total = total + distance(*rows) ** 2 / positions
    return total / len(a)


def rkd_written_out(s: Tensor, t: Tensor, distance: float, angle: float) -> Tensor:
    """Over all N^2 and N^3 entries."""
    parts = []
    for x in (s, t):
        difference = x[None] - x[:, None]
        square = difference.square().sum(-1)
        d = torch.where(square == 0, 1, square).sqrt() * (square > 0)
        arms = F.normalize(difference, dim=2)
        parts.append((d / d[d > 0].mean(), arms @ arms.transpose(1, 2)))
    (d_s, angle_s), (d_t, angle_t) = parts
    return distance * F.smooth_l1_loss(d_s, d_t) + angle * F.smooth_l1_loss(angle_s, angle_t)


# -- the formulas --------------------------------------------------------------------------------


@settings(max_examples=20, deadline=None, derandomize=True)
@given(st.integers(3, 7), st.integers(2, 5), st.integers(2, 5), st.integers(0, 999))
def test_losses_of_embeddings_match_plain_loops(b: int, d_s: int, d_t: int, seed: int) -> None:
    s, t = F.normalize(normal(b, d_s, seed=seed)), normal(b, d_t, seed=seed + 1)
    agrees(lambda s: pkt(s, t), lambda s: pkt_as_a_loop(s, t), s)
    agrees(lambda s: darkrank(s, t), lambda s: darkrank_as_a_loop(s, t, 2, 3, 4), s)
    agrees(lambda s: darkrank(s, t, alpha=1.5, beta=2.0, length=3),
           lambda s: darkrank_as_a_loop(s, t, 1.5, 2.0, 3), s)  # fmt: skip
    agrees(lambda s: rkd(s, t), lambda s: rkd_written_out(s, t, 25, 50), s)
    agrees(lambda s: rkd(s, t, distance=1.0, angle=2.0),
           lambda s: rkd_written_out(s, t, 1, 2), s)  # fmt: skip


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    st.integers(1, 3), st.integers(1, 4), st.integers(1, 3), st.integers(2, 3), st.integers(0, 999)
)
def test_losses_of_maps_match_plain_loops(b: int, c: int, h: int, w: int, seed: int) -> None:
    a, same = normal(b, c, h, w, seed=seed), normal(b, c, h, w, seed=seed + 1)
    other = normal(b, c + 2, h, w, seed=seed + 2)
    agrees(lambda a: fitnet(a, same), lambda a: sum((a - same).flatten() ** 2) / a.numel(), a)
    agrees(lambda a: attention_transfer(a, other),
           lambda a: attention_transfer_as_a_loop(a, other), a)  # fmt: skip


def test_darkrank_is_finite_where_the_product_is_not() -> None:
    s, t = (50 * normal(8, 3, seed=1)).requires_grad_(), normal(8, 3, seed=2)
    assert not darkrank_as_a_loop(s, t, 2, 3, 4).isfinite()
    loss = darkrank(s, t)
    loss.backward()
    assert loss.isfinite() and s.grad.isfinite().all()


def test_darkrank_prefers_the_teachers_order_and_takes_ties_as_they_come() -> None:
    t = torch.tensor([[0.0], [1.0], [2.5], [4.5]])
    turned = t[[0, 3, 2, 1]]
    assert darkrank(t, t) < darkrank(turned, t)
    # a teacher that sees no difference ranks by the order of the batch, as the loop's sort does
    s, blind = normal(40, 1, seed=1), torch.zeros(40, 1)
    wanted = darkrank_as_a_loop(s, blind, 2, 3, 4).item()
    assert darkrank(s, blind).item() == pytest.approx(wanted, rel=1e-10)


# -- degenerate input ----------------------------------------------------------------------------


def all_five(s: Tensor, t: Tensor, a: Tensor, b: Tensor) -> list[Tensor]:
    """Of embeddings s, t and maps a, b."""
    return [pkt(s, t), darkrank(s, t), rkd(s, t), fitnet(a, b), attention_transfer(a, b)]


def inputs(b: int = 5) -> list[Tensor]:
    return [normal(b, 3, seed=1), normal(b, 3, seed=2), normal(b, 2, 3, 2, seed=3),
            normal(b, 2, 3, 2, seed=4)]  # fmt: skip


@pytest.mark.parametrize("rows", [1, 2])
def test_small_batches_have_a_gradient(rows: int) -> None:
    s, t, a, b = inputs(rows)
    found = all_five(s.requires_grad_(), t, a.requires_grad_(), b)
    sum(found).backward()
    assert s.grad.isfinite().all() and a.grad.isfinite().all()
    assert found[1].item() == found[2].item() == 0
    if rows == 1:
        assert found[0].item() == darkrank(s * 0, t * 0).item() == 0


def test_a_student_that_agrees_has_the_least_loss() -> None:
    _, t, _, b = inputs()
    s, a = t.clone().requires_grad_(), b.clone().requires_grad_()
    for i, (loss, x) in enumerate(zip(all_five(s, t, a, b), (s, s, s, a, a), strict=True)):
        if i != 1:  # a likelihood of the ranking never is 1
            assert loss.item() == pytest.approx(0, abs=1e-15)
            # the 1e-7 of PKT moves its minimum by as much
            assert torch.autograd.grad(loss, x)[0].abs().max() < (1e-6 if i == 0 else 1e-12)


def test_duplicates_and_zeros_have_a_finite_gradient() -> None:
    s, t, a, b = inputs()
    s[1], s[2], s[3], t[3], t[4], a[0], b[1] = s[0], 0, -s[0], t[2], 0, 0, 0
    s.requires_grad_(), a.requires_grad_()
    for loss, x in zip(all_five(s, t, a, b), (s, s, s, a, a), strict=True):
        (gradient,) = torch.autograd.grad(loss, x)
        assert loss.isfinite() and gradient.isfinite().all() and gradient.abs().max() < 1e3


def test_opposite_rows_have_a_finite_pkt_in_float32() -> None:
    """Where a cosine rounds to just below -1."""
    s = normal(16, 7, seed=1).float()
    s[8:] = -3 * s[:8]
    assert pkt(s, s.flip(0)).isfinite() and pkt(s, normal(16, 2, seed=2)).isfinite()


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
    for loss in (pkt, darkrank, rkd):
        assert torch.autograd.gradcheck(lambda s, loss=loss: loss(s, t), s)
    for loss in (fitnet, attention_transfer):
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
    with pytest.raises(ValueError, match="a list of 1 has one ranking; length should be >= 2"):
        darkrank(s, s, length=1)
    darkrank(s, s, length=2)
    for loss, x in ((pkt, s), (darkrank, s), (rkd, s), (attention_transfer, a)):
        with pytest.raises(ValueError, match="student has 5 rows and teacher 1"):
            loss(x, x[:1])
    with pytest.raises(ValueError, match="fitnet: student"):
        fitnet(a, a[:, :1])

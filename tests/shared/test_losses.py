"""The losses that several papers share, against plain float64 loops in value and gradient."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from shared.losses import (
    at_least_float32,
    decoupled,
    kd,
    nce,
    same_shape,
    target_split,
    triplet,
    unit,
    unit_maps,
    warm_up,
)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def labels(b: int, classes: int, seed: int) -> Tensor:
    return torch.randint(classes, (b,), generator=torch.Generator().manual_seed(seed))


def triplet_as_a_loop(e: Tensor, y: Tensor, margin: float) -> Tensor:
    """Mean over the anchors that have both kinds of row, over torch scalars; 0 where none has."""
    terms = []
    for a in range(len(e)):
        d = [((e[a] - e[i]) ** 2).sum().sqrt() if i != a else None for i in range(len(e))]
        positives = [d[i] for i in range(len(e)) if i != a and y[i] == y[a]]
        negatives = [d[i] for i in range(len(e)) if y[i] != y[a]]
        if positives and negatives:
            hinge = torch.stack(positives).max() - torch.stack(negatives).min() + margin
            terms.append(hinge if hinge > 0 else 0 * hinge)
    return sum(terms) / len(terms) if terms else 0 * e.sum()


def agrees(ours, loop, x: Tensor) -> None:
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    found, wanted = ours(a), loop(b)
    assert found.item() == pytest.approx(wanted.item(), rel=1e-10, abs=1e-14)
    found, wanted = torch.autograd.grad(found, a)[0], torch.autograd.grad(wanted, b)[0]
    torch.testing.assert_close(found, wanted, rtol=1e-8, atol=1e-12)


# -- triplet -------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.integers(1, 12),
    st.integers(1, 7),
    st.integers(1, 5),
    st.sampled_from([0.0, 0.2, 3.0]),
    st.integers(0, 999),
)
def test_triplet_matches_plain_loop(b: int, d: int, classes: int, margin: float, seed: int) -> None:
    """Also batches of one row, of one class, and with classes of one image."""
    y = labels(b, classes, seed)
    agrees(lambda e: triplet(e, y, margin), lambda e: triplet_as_a_loop(e, y, margin),
           normal(b, d, seed=seed))  # fmt: skip


def test_triplet_matches_plain_loop_at_a_size_of_the_fast_kernel() -> None:
    y = labels(60, 9, 1)
    agrees(lambda e: triplet(e, y, 0.2), lambda e: triplet_as_a_loop(e, y, 0.2),
           normal(60, 65, seed=2))  # fmt: skip


def test_triplet_on_a_line_by_hand() -> None:
    e = torch.tensor([[0.0], [1.0], [3.0], [7.0]])
    # d+ 1, 1, 4, 4; d- 3, 2, 2, 6
    assert triplet(e, torch.tensor([5, 5, 2, 2]), 0.5).item() == (0 + 0 + 2.5 + 0) / 4
    # class 2 has one image: its anchor does not count
    assert triplet(e[:3], torch.tensor([5, 5, 2]), 2.5).item() == (0.5 + 1.5) / 2


@pytest.mark.parametrize(
    "y", [[0], [3, 3, 3, 3], [0, 1, 2, 3]], ids=["one row", "one class", "all"]
)
def test_triplet_without_an_anchor_is_zero_with_a_gradient_of_zero(y: list[int]) -> None:
    e = normal(len(y), 3).requires_grad_()
    loss = triplet(e, torch.tensor(y), 0.2)
    loss.backward()
    assert loss.item() == 0 and (e.grad == 0).all()


def test_triplet_of_duplicates_has_a_finite_gradient() -> None:
    e = torch.ones(4, 3, requires_grad=True)
    loss = triplet(e, torch.tensor([0, 0, 1, 1]), 0.25)
    loss.backward()
    assert loss.item() == 0.25 and (e.grad == 0).all()


def test_rows_that_tie_share_the_gradient_of_triplet() -> None:
    e = torch.tensor([[0.0, 0.0], [3.0, 4.0], [3.0, -4.0], [1.0, 0.0]], requires_grad=True)
    y = torch.tensor([0, 0, 0, 1])
    triplet(e, y, 0.0).backward()
    torch.testing.assert_close(e.grad[1], e.grad[2] * torch.tensor([1.0, -1.0]))


def test_gradcheck_of_triplet() -> None:
    e, y = normal(7, 4, seed=5).requires_grad_(), torch.tensor([0, 1, 0, 1, 2, 2, 3])
    assert torch.autograd.gradcheck(lambda e: triplet(e, y, 0.5), e)


@pytest.mark.parametrize("y", [[0, 0, 1, 1], [0, 0, 0, 0], [0, 1, 2, 3], [0, 1, 1, 1]])
def test_a_nan_row_makes_triplet_nan(y: list[int]) -> None:
    e = normal(4, 3)
    e[0, 1] = math.nan
    assert triplet(e, torch.tensor(y), 0.2).isnan()


def test_triplet_computes_in_float32_or_better() -> None:
    e, y = normal(12, 8), labels(12, 3, 0)
    low = e.bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, same = triplet(low, y, 0.2), triplet(e, y, 0.2)
    assert found.dtype == torch.float32 and found.item() == triplet(low.float(), y, 0.2).item()
    assert same.dtype == torch.float64 and same.item() == triplet(e, y, 0.2).item()


# -- decoupled distillation ----------------------------------------------------------------------


def logits(b: int, c: int, seed: int, scale: float = 3.0) -> tuple[Tensor, Tensor, Tensor]:
    """Of the teacher and the student, and labels."""
    return (scale * normal(b, c, seed=seed), scale * normal(b, c, seed=seed + 1000),
            labels(b, c, seed))  # fmt: skip


def softmax(z: list[float], temperature: float) -> list[float]:
    total = math.fsum(math.exp(v / temperature) for v in z)
    return [math.exp(v / temperature) / total for v in z]


def test_target_split_matches_plain_loop() -> None:
    z, _, y = logits(6, 9, 0)
    log_tar, log_rest = target_split(z, y, 2.5)
    for row in range(6):
        p = softmax(z[row].tolist(), 2.5)
        others = math.fsum(v for c, v in enumerate(p) if c != y[row])
        assert log_tar[row].exp().item() == pytest.approx(p[y[row]], rel=1e-12)
        assert log_rest[row].exp().item() == pytest.approx(others, rel=1e-12)
    assert target_split(z, y)[0].exp()[0].item() == pytest.approx(softmax(z[0].tolist(), 1)[y[0]])


def test_target_split_is_exact_where_the_target_rounds_to_certainty() -> None:
    log_tar, log_rest = target_split(torch.tensor([[60.0, 0.0, 0.0]]), torch.tensor([0]))
    assert log_rest.item() == pytest.approx(math.log(2) - 60, rel=1e-6)
    assert log_tar.item() == 0


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_the_decoupled_parts_match_plain_loops(temperature: float) -> None:
    z_t, z_s, y = logits(5, 7, 1)
    tckd, nckd, not_target = decoupled(z_t, z_s, y, temperature)
    for row, tar in enumerate(y.tolist()):
        p_t, p_s = (softmax(z[row].tolist(), temperature) for z in (z_t, z_s))
        rest = [c for c in range(7) if c != tar]
        not_t, not_s = (math.fsum(p[c] for c in rest) for p in (p_t, p_s))
        binary = p_t[tar] * math.log(p_t[tar] / p_s[tar]) + not_t * math.log(not_t / not_s)
        among = math.fsum(
            p_t[c] / not_t * math.log((p_t[c] / not_t) / (p_s[c] / not_s)) for c in rest
        )
        assert tckd[row].item() == pytest.approx(binary, rel=1e-10)
        assert nckd[row].item() == pytest.approx(among, rel=1e-10)
        assert not_target[row].item() == pytest.approx(not_t, rel=1e-12)
    default = decoupled(z_t, z_s, y)[0]
    assert (default == decoupled(z_t, z_s, y, 1.0)[0]).all()


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.integers(1, 6), st.integers(2, 40), st.floats(0.3, 9), st.floats(0.1, 20), st.integers(0, 99)
)
def test_the_decoupled_parts_make_up_plain_distillation(
    b: int, c: int, temperature: float, scale: float, seed: int
) -> None:
    """KL(teacher || student) = TCKD + (1 - p_t) NCKD, whatever the logits."""
    z_t, z_s, y = logits(b, c, seed, scale)
    tckd, nckd, rest = decoupled(z_t, z_s, y, temperature)
    kl = kd(z_s, z_t, temperature) / temperature**2
    assert (tckd + rest * nckd).mean().item() == pytest.approx(kl.item(), rel=1e-8, abs=1e-13)


def test_decoupled_refuses_a_single_class_and_other_shapes_and_has_a_gradient() -> None:
    z_t, z_s, y = logits(3, 4, 2)
    for t, s in ((z_t[:, :1], z_s[:, :1]), (z_t, z_s[:, :2])):
        with pytest.raises(ValueError, match="of the same C >= 2"):
            decoupled(t, s, y * 0)
    decoupled(z_t[:, :2], z_s[:, :2], y * 0)
    assert torch.autograd.gradcheck(
        lambda s: sum(part.sum() for part in decoupled(z_t, s, y, 2.0)), z_s.requires_grad_()
    )


def test_decoupled_computes_in_float32_or_better() -> None:
    z_t, z_s, y = logits(4, 30, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = decoupled(z_t.bfloat16(), z_s.bfloat16(), y)
    expected = decoupled(z_t.bfloat16().float(), z_s.bfloat16().float(), y)
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == torch.float32 and (a == b).all()


def test_warm_up_rises_linearly_to_one() -> None:
    assert [warm_up(e, 4) for e in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert warm_up(0, 0) == 1.0


# -- attention maps ------------------------------------------------------------------------------


def test_unit_maps_of_one_size_are_the_rows_over_their_norms() -> None:
    a, b = unit_maps(normal(2, 3, 5, seed=1), normal(2, 3, 5, seed=2))
    for found, maps in ((a, normal(2, 3, 5, seed=1)), (b, normal(2, 3, 5, seed=2))):
        for row, wanted in zip(found, maps, strict=True):
            flat = [float(v) for line in wanted for v in line]
            norm = math.sqrt(math.fsum(v * v for v in flat))
            assert row.tolist() == pytest.approx([v / norm for v in flat], rel=1e-12)


@pytest.mark.parametrize("sizes", [((4, 6), (2, 3)), ((2, 3), (4, 6)), ((4, 3), (2, 6))])
def test_the_larger_map_is_averaged_to_the_smaller(sizes: tuple) -> None:
    given = [normal(2, *size, seed=i) for i, size in enumerate(sizes)]
    for found, maps in zip(unit_maps(*given), given, strict=True):
        h, w = maps.shape[1] // 2, maps.shape[2] // 3
        for row, whole in zip(found, maps, strict=True):
            cells = torch.stack(
                [
                    whole[h * i : h * i + h, w * j : w * j + w].mean()
                    for i in (0, 1)
                    for j in (0, 1, 2)
                ]
            )
            torch.testing.assert_close(row, cells / cells.square().sum().sqrt())


def test_a_row_of_zeros_stays_one_with_gradient_zero() -> None:
    x = normal(3, 4)
    x[1] = 0
    x.requires_grad_()
    found = unit(x)
    (found * normal(3, 4, seed=1)).sum().backward()
    assert (found[1] == 0).all() and (x.grad[1] == 0).all()
    assert x.grad.isfinite().all() and (x.grad[0] != 0).all()
    assert torch.autograd.gradcheck(unit, normal(2, 3, 4).requires_grad_())
    assert unit(torch.tensor([math.nan, 1.0])).isnan().all()


# -- the rest ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "computed"),
    [("float16", "float32"), ("bfloat16", "float32"), ("float32", "float32"), ("float64",) * 2],
)
def test_at_least_float32(given: str, computed: str) -> None:
    x = torch.ones(2, dtype=getattr(torch, given))
    assert at_least_float32(x).dtype == getattr(torch, computed)


def test_shapes_that_would_broadcast_are_refused() -> None:
    same_shape("some", torch.ones(2, 3), torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"some: student \(2, 3\) and teacher \(1, 3\) differ"):
        same_shape("some", torch.ones(2, 3), torch.ones(1, 3))


def test_kd_matches_plain_loop_in_value_and_gradient() -> None:
    z_t, temperature = normal(4, 5, seed=3), 2.5

    def loop(z_s: Tensor) -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for s, t in zip(z_s, z_t, strict=True):
            p_s, p_t = (torch.exp(z / temperature) for z in (s, t))
            p_s, p_t = p_s / p_s.sum(), p_t / p_t.sum()
            total = total + sum(p_t[c] * torch.log(p_t[c] / p_s[c]) for c in range(5))
        return temperature**2 * total / 4

    agrees(lambda z: kd(z, z_t, temperature), loop, normal(4, 5, seed=4))


def test_nce_matches_plain_loop_in_value_and_gradient() -> None:
    tau, m, z = 0.4, 70, 3.0

    def loop(cosines: Tensor) -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for row in cosines:
            h = [torch.exp(c / tau) / z for c in row]
            h = [e / (e + 4 / m) for e in h]
            total = total - torch.log(h[0]) - sum(torch.log(1 - v) for v in h[1:])
        return total / len(cosines)

    agrees(lambda c: nce(c[:, 0], c[:, 1:], tau=tau, m=m, log_z=math.log(z)), loop,
           torch.tanh(normal(3, 5)))  # fmt: skip
    cosines = torch.full((2,), 0.5), torch.full((2, 3), 0.1)
    assert nce(*cosines, tau=tau, m=m).item() == nce(*cosines, tau=tau, m=m, log_z=0.0).item()
    with pytest.raises(ValueError, match="at least one negative"):
        nce(torch.ones(2), torch.ones(2, 0), tau=0.1, m=5)

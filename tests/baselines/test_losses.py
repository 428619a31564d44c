"""The baselines' losses against plain float64 loops, in value and gradient."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from baselines import losses
from baselines.losses import (
    adadistill,
    cc,
    cosine,
    crcd,
    crd,
    dkd,
    moved_centers,
    relation_cosines,
    sp,
    vid,
)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def unit(*shape: int, seed: int) -> Tensor:
    return torch.nn.functional.normalize(normal(*shape, seed=seed), dim=-1)


def labels(b: int, classes: int, seed: int) -> Tensor:
    return torch.randint(classes, (b,), generator=torch.Generator().manual_seed(seed))


def agrees(ours: Callable, loop: Callable, *given: Tensor) -> None:
    """In value, and in the gradient of each of `given`."""
    a, b = ([x.clone().requires_grad_() for x in given] for _ in range(2))
    found, wanted = ours(*a), loop(*b)
    assert found.item() == pytest.approx(wanted.item(), rel=1e-10, abs=1e-14)
    for x, y in zip(torch.autograd.grad(found, a), torch.autograd.grad(wanted, b), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-8, atol=1e-11)


# -- the equations, over scalars -----------------------------------------------------------------


def dot(a, b):
    return sum(x * y for x, y in zip(a, b, strict=True))


def angle(a, b):
    return dot(a, b) / (dot(a, a) * dot(b, b)) ** 0.5


def cosine_as_a_loop(s: Tensor, t: Tensor) -> Tensor:
    return sum(1 - angle(s[i], t[i]) for i in range(len(s))) / len(s)


def sp_as_a_loop(a: Tensor, b: Tensor) -> Tensor:
    grams = []
    for x in (a, b):
        f = [list(row.flatten()) for row in x]
        g = [[dot(p, q) for q in f] for p in f]
        grams.append([[v / dot(row, row) ** 0.5 for v in row] for row in g])
    n = len(a)
    return sum((grams[0][i][j] - grams[1][i][j]) ** 2 for i in range(n) for j in range(n)) / n**2


def cc_as_a_loop(s: Tensor, t: Tensor) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for i in range(len(s) - 1):
        for d in range(s.shape[1]):
            total = total + abs(s[i, d] - t[i, d]) * abs(s[i + 1, d] - t[i + 1, d])
    return total / (len(s) - 1)


def vid_as_a_loop(mu: Tensor, f: Tensor, rho: Tensor) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for c in range(len(rho)):
        v = torch.log(1 + torch.exp(rho[c])) + 1e-5
        for x, y in zip(mu[:, c].flatten(), f[:, c].flatten(), strict=True):
            total = total + 0.5 * ((x - y) ** 2 / v + torch.log(v))
    return total / mu.numel()


def nce_as_a_loop(positive, negatives, tau: float, m: int, z: float):
    """Of critics e / (e + n/m), e = e^(cos/tau) / z."""
    n, total = len(negatives[0]), 0
    for i in range(len(positive)):
        e = torch.exp(positive[i] / tau) / z
        total = total - torch.log(e / (e + n / m))
        for k in range(n):
            e = torch.exp(negatives[i][k] / tau) / z
            total = total - torch.log(1 - e / (e + n / m))
    return total / len(positive)


def dkd_as_a_loop(z_s: Tensor, z_t: Tensor, y: Tensor, t: float, target: float, other: float):
    total = torch.zeros((), dtype=torch.float64)
    for s, u, label in zip(z_s, z_t, y.tolist(), strict=True):
        p_s, p_t = ([v / sum(e) for v in e] for e in (torch.exp(s / t), torch.exp(u / t)))
        rest = [c for c in range(len(s)) if c != label]
        not_s, not_t = sum(p_s[c] for c in rest), sum(p_t[c] for c in rest)
        tckd = p_t[label] * torch.log(p_t[label] / p_s[label]) + not_t * torch.log(not_t / not_s)
        nckd = sum(p_t[c] / not_t * torch.log(p_t[c] / not_t / (p_s[c] / not_s)) for c in rest)
        total = total + target * tckd + other * nckd
    return t**2 * total / len(y)


def adadistill_as_a_loop(e: Tensor, centers: Tensor, y: Tensor, scale: float, margin: float):
    total = torch.zeros((), dtype=torch.float64)
    for i, label in enumerate(y.tolist()):
        z = [scale * (angle(e[i], c) - margin * (j == label)) for j, c in enumerate(centers)]
        total = total - torch.log(torch.exp(z[label]) / sum(torch.exp(v) for v in z))
    return total / len(y)


def centers_as_a_loop(centers, e_s, e_t, y) -> list[list[float]]:
    """Over Python's floats."""
    old = [row[:] for row in centers]
    moved: dict[int, list[list[float]]] = {}
    for s, t, label in zip(e_s, e_t, y, strict=True):
        c = old[label]
        alpha = min(max(angle(s, t) * min(max(angle(c, t), 1e-6), 1), 1e-6), 1)
        u = [v / dot(t, t) ** 0.5 for v in t]
        moved.setdefault(label, []).append(
            [alpha * a + (1 - alpha) * b for a, b in zip(c, u, strict=True)]
        )
    return [
        [sum(column) / len(column) for column in zip(*moved[j], strict=True)] if j in moved else c
        for j, c in enumerate(old)
    ]


# -- the formulas --------------------------------------------------------------------------------

SIZE = st.integers(1, 4)


@settings(max_examples=10, deadline=None, derandomize=True)
@given(SIZE, SIZE, st.integers(0, 999))
def test_cosine_and_cc_match_plain_loops(b: int, d: int, seed: int) -> None:
    s, t = normal(b, d, seed=seed), normal(b, d, seed=seed + 1)
    agrees(lambda s: cosine(s, t), lambda s: cosine_as_a_loop(s, t), s)
    if b > 1:
        agrees(cc, cc_as_a_loop, s, t)  # both projections are learned


@settings(max_examples=8, deadline=None, derandomize=True)
@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), SIZE, st.integers(0, 999))
def test_sp_and_vid_match_plain_loops(b: int, c: int, h: int, w: int, seed: int) -> None:
    a, other = normal(b, c, h, w, seed=seed), normal(b, c + 2, h + 1, 2, seed=seed + 1)
    agrees(lambda a: sp(a, other), lambda a: sp_as_a_loop(a, other), a)
    same, rho = normal(b, c, h, w, seed=seed + 2), normal(c, seed=seed + 3)
    agrees(lambda a, rho: vid(a, same, rho), lambda a, rho: vid_as_a_loop(a, same, rho), a, rho)


@pytest.mark.parametrize("tau", [0.07, 0.5])
@pytest.mark.parametrize("z", [(1.0, 1.0), (29.0, 700.0)])
@pytest.mark.parametrize("loss", [crd, crcd])
def test_crd_and_crcd_match_the_sum_of_two_plain_loops(loss, tau: float, z) -> None:
    given = [torch.tanh(normal(*shape, seed=i)) for i, shape in enumerate([(3,), (3, 5)] * 2)]

    def ours(p, n, q, k):
        return loss((p, n), (q, k), tau=tau, m=90, log_z=(math.log(z[0]), math.log(z[1])))

    def loop(p, n, q, k):
        return nce_as_a_loop(p, n, tau, 90, z[0]) + nce_as_a_loop(q, k, tau, 90, z[1])

    agrees(ours, loop, *given)
    if z == (1.0, 1.0):
        p, n, q, k = given
        assert loss((p, n), (q, k), tau=tau, m=90).item() == ours(*given).item()


@settings(max_examples=10, deadline=None, derandomize=True)
@given(st.integers(2, 9), st.integers(0, 999))
def test_relation_cosines_are_those_of_normalised_differences(d: int, seed: int) -> None:
    q, k, a = (unit(d, seed=seed + i) for i in range(3))

    def written_out(q: Tensor) -> Tensor:
        return angle([x - y for x, y in zip(q, a, strict=True)],
                     [x - y for x, y in zip(k, a, strict=True)])  # fmt: skip

    ours, loop = q.clone().requires_grad_(), q.clone().requires_grad_()
    found, wanted = relation_cosines(ours @ k, ours @ a, k @ a), written_out(loop)
    assert found.item() == pytest.approx(wanted.item(), rel=1e-6, abs=1e-9)
    # q stays a unit vector: gradients agree along the sphere
    x, y = torch.autograd.grad(found, ours)[0], torch.autograd.grad(wanted, loop)[0]
    torch.testing.assert_close(x - (x @ q) * q, y - (y @ q) * q, rtol=1e-5, atol=1e-7)


def test_a_relation_to_itself_is_finite() -> None:
    one = torch.ones((), requires_grad=True)
    found = relation_cosines(0.5 * one, one, 0.5 * one)
    found.backward()
    assert found.item() == 0 and one.grad.isfinite()
    # lengths of .002 and 1: nothing is held at 1e-6
    near = torch.tensor(1 - 2e-6, dtype=torch.float64)
    assert relation_cosines(torch.tensor(0.51), near, torch.tensor(0.5)).item() == pytest.approx(
        (0.01 + 2e-6) / math.sqrt(4e-6), rel=1e-5
    )


@settings(max_examples=8, deadline=None, derandomize=True)
@given(SIZE, st.integers(2, 7), st.integers(0, 999))
def test_dkd_matches_plain_loop(b: int, c: int, seed: int) -> None:
    z_s, z_t, y = normal(b, c, seed=seed), 2 * normal(b, c, seed=seed + 1), labels(b, c, seed)
    agrees(lambda s: dkd(s, z_t, y), lambda s: dkd_as_a_loop(s, z_t, y, 4, 1, 8), z_s)
    agrees(lambda s: dkd(s, z_t, y, temperature=1.5, target=0.5, non_target=2.0),
           lambda s: dkd_as_a_loop(s, z_t, y, 1.5, 0.5, 2), z_s)  # fmt: skip


@settings(max_examples=10, deadline=None, derandomize=True)
@given(SIZE, SIZE, st.integers(1, 5), st.integers(0, 999))
def test_adadistill_matches_plain_loops(b: int, d: int, classes: int, seed: int) -> None:
    """Also where a class has several images in the batch, and where it has none."""
    e_s, e_t, y = normal(b, d, seed=seed), normal(b, d, seed=seed + 1), labels(b, classes, seed)
    e_t += 0.7 * e_s  # some students that are near, some that are not
    centers = normal(classes, d, seed=seed + 2) + e_t.mean(0)
    agrees(lambda e: adadistill(e, centers, y, scale=7.0, margin=0.4),
           lambda e: adadistill_as_a_loop(e, centers, y, 7, 0.4), e_s)  # fmt: skip
    found = moved_centers(centers, e_s, e_t, y)
    wanted = centers_as_a_loop(centers.tolist(), e_s.tolist(), e_t.tolist(), y.tolist())
    torch.testing.assert_close(found, torch.tensor(wanted, dtype=torch.float64))


# -- properties ----------------------------------------------------------------------------------


def all_losses(e: Tensor, f: Tensor, a: Tensor, b: Tensor) -> dict[str, Tensor]:
    """Of student e and teacher f [B, 4], of maps a and b [B, 4, 2, 3]."""
    y, rho = labels(len(e), 4, 5), torch.ones(4, dtype=a.dtype)
    return {
        "cosine": cosine(e, f), "cc": cc(e, f), "dkd": dkd(e, f, y), "sp": sp(a, b),
        "vid": vid(a, b, rho), "adadistill": adadistill(e, f[:4], y, scale=9.0, margin=0.2),
    }  # fmt: skip


def inputs(b: int = 5) -> list[Tensor]:
    return [normal(b, 4, seed=1), normal(b, 4, seed=2), normal(b, 4, 2, 3, seed=3),
            normal(b, 4, 2, 3, seed=4)]  # fmt: skip


def test_a_student_that_agrees_costs_nothing() -> None:
    e, _, a, _ = inputs()
    found = all_losses(e, e, a, a)
    for name in ("cosine", "cc", "dkd", "sp"):
        assert found[name].item() == pytest.approx(0, abs=1e-14)
    v = math.log(1 + math.e) + 1e-5
    assert found["vid"].item() == pytest.approx(0.5 * math.log(v), rel=1e-12)


def test_what_each_loss_does_not_see() -> None:
    e, f, a, b = inputs()
    assert cosine(3 * e, 0.2 * f).item() == pytest.approx(cosine(e, f).item(), rel=1e-12)
    # a rotation of all features of an image, and one length for all images
    q, _ = torch.linalg.qr(normal(24, 24))
    turned = 5 * (a.flatten(1) @ q).view_as(a)
    assert sp(turned, b).item() == pytest.approx(sp(a, b).item(), rel=1e-10)
    assert dkd(e + 3, f - 1, labels(5, 4, 0)).item() == pytest.approx(
        dkd(e, f, labels(5, 4, 0)).item(), rel=1e-12
    )


def test_only_the_students_side_receives_gradient() -> None:
    e, f, a, b = (x.requires_grad_() for x in inputs())
    for name, loss in all_losses(e, f, a, b).items():
        own, other = (a, b) if name in ("sp", "vid") else (e, f)
        found = torch.autograd.grad(loss, (own, other), allow_unused=True)
        assert (found[0] != 0).any(), name
        assert (found[1] is None) == (name != "cc"), name  # its teacher's projection is learned
    assert not moved_centers(f, e, f, labels(5, 5, 0)).requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    low = [x.to(dtype) for x in inputs(40)]
    expected = all_losses(*(x.float() for x in low))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = all_losses(*low)
    for name, loss in found.items():
        assert loss.dtype == torch.float32 and loss.item() == expected[name].item(), name
    y = labels(40, 5, 0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        centers = moved_centers(low[1][:5].float(), low[0], low[1], y)
    assert (centers == moved_centers(low[1][:5].float(), *(x.float() for x in low[:2]), y)).all()


@pytest.mark.parametrize("which", [0, 1, 2, 3])
def test_a_nan_makes_each_loss_nan(which: int) -> None:
    given = inputs()
    given[which].view(-1)[4] = math.nan
    for name, loss in all_losses(*given).items():
        assert loss.isnan() == ((name in ("sp", "vid")) == (which > 1)), name


def test_rows_of_zeros_have_a_finite_gradient() -> None:
    e, f, a, b = inputs()
    e[0], f[1], a[0], b[1] = 0, 0, 0, 0
    e.requires_grad_(), a.requires_grad_()
    for name, loss in all_losses(e, f, a, b).items():
        (gradient,) = torch.autograd.grad(loss, a if name in ("sp", "vid") else e)
        assert loss.isfinite() and gradient.isfinite().all(), name


# -- AdaDistill's centres ------------------------------------------------------------------------


def test_a_centre_is_the_sample_at_first_and_stays_later() -> None:
    t = unit(1, 6, seed=1)
    far = unit(1, 6, seed=2)
    far = far - (far @ t.T) * t  # a student at a right angle: alpha is at its least
    start, y = normal(2, 6, seed=3), torch.tensor([1])
    torch.testing.assert_close(moved_centers(start, far, t, y)[1:], t, rtol=0, atol=1e-5)
    # a student that agrees, and a centre in the sample's direction: alpha is 1
    start[1] = 0.3 * t
    assert torch.allclose(moved_centers(start, 5 * t, 2 * t, y), start)


def test_a_hard_sample_moves_its_centre_more() -> None:
    center = torch.tensor([[1.0, 0.0]])
    moved = []
    for degrees in (10, 60):
        t = torch.tensor([[math.cos(math.radians(degrees)), math.sin(math.radians(degrees))]])
        new = moved_centers(center, t, t, torch.tensor([0]))
        moved.append((new - center).norm().item() / (t - center).norm().item())
    assert moved[0] == pytest.approx(1 - math.cos(math.radians(10)), rel=1e-4)
    assert moved[1] == pytest.approx(1 - math.cos(math.radians(60)), rel=1e-4)


# -- bad input -----------------------------------------------------------------------------------


def test_bad_input_is_refused_in_one_line() -> None:
    e, _, a, _ = inputs()
    with pytest.raises(ValueError, match="cosine: student .* differ in shape"):
        cosine(e, e[:, :2])
    with pytest.raises(ValueError, match="cc: student .* differ in shape"):
        cc(e, e[:2])
    with pytest.raises(ValueError, match="cc: a batch of one image has no neighbours"):
        cc(e[:1], e[:1])
    with pytest.raises(ValueError, match="vid: student .* differ in shape"):
        vid(a, a[:, :2], torch.ones(4))
    with pytest.raises(ValueError, match="sp: student has 5 rows and teacher 2"):
        sp(a, a[:2])
    with pytest.raises(ValueError, match="of the same C >= 2"):
        dkd(e[:, :1], e[:, :1], labels(5, 1, 0))
    with pytest.raises(ValueError, match="embeddings of 4 and centres of 3 numbers differ"):
        adadistill(e, e[:, :3], labels(5, 4, 0), scale=1.0, margin=0.0)
    with pytest.raises(ValueError, match="at least one negative"):
        crd((e[:, 0], e[:, :0]), (e[:, 0], e[:, :0]), tau=0.1, m=9)


def test_the_file_lists_every_method() -> None:
    """Those of the papers are shared, and named here again."""
    for name in ("kd", "fitnet", "attention_transfer", "pkt", "rkd", "warm_up"):
        assert callable(getattr(losses, name))
    assert set(losses.__all__) <= set(dir(losses))

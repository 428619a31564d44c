"""AIRD's equations against plain float64 loops, in value and gradient."""

from __future__ import annotations

import math

import pytest
import torch

from aird.losses import L_iid, L_rid, L_total, rid


def unit(*shape: int, seed: int) -> torch.Tensor:
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.nn.functional.normalize(x, dim=-1)


def logits(b: int, c: int, *, seed: int, scale: float = 3.0) -> tuple[torch.Tensor, ...]:
    g = torch.Generator().manual_seed(seed)
    z_t, z_s = (scale * torch.randn(b, c, generator=g, dtype=torch.float64) for _ in range(2))
    return z_t, z_s, torch.randint(c, (b,), generator=g)


# -- Eq. 4 ---------------------------------------------------------------------------------------


def rid_as_a_loop(q, pos, neg, tau: float, m: int, z: float):
    """Eq. 4 with h = e^(cos/tau)/z / (e^(cos/tau)/z + n/m), over torch scalars."""
    b, n, d = neg.shape
    total = torch.zeros((), dtype=torch.float64)
    for j in range(b):
        e = torch.exp(sum(q[j, c] * pos[j, c] for c in range(d)) / tau) / z
        total = total - torch.log(e / (e + n / m))
        for k in range(n):
            e = torch.exp(sum(q[j, c] * neg[j, k, c] for c in range(d)) / tau) / z
            total = total - torch.log(1 - e / (e + n / m))
    return total / b


@pytest.mark.parametrize("tau", [0.1, 0.5])
@pytest.mark.parametrize("z", [1.0, 29.0])
def test_eq4_matches_plain_loop_in_value_and_gradient(tau: float, z: float) -> None:
    inputs = [unit(3, 4, seed=1), unit(3, 4, seed=2), unit(3, 5, 4, seed=3)]
    ours = [t.clone().requires_grad_() for t in inputs]
    loop = [t.clone().requires_grad_() for t in inputs]
    loss = L_rid(*ours, tau=tau, m=200, log_z=math.log(z))
    expected = rid_as_a_loop(*loop, tau=tau, m=200, z=z)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-10)
    for a, b in zip(
        torch.autograd.grad(loss, ours), torch.autograd.grad(expected, loop), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_samples_without_a_partner_add_nothing_and_get_no_gradient() -> None:
    q, pos, neg = unit(4, 6, seed=4), unit(4, 6, seed=5), unit(4, 3, 6, seed=6)
    paired = torch.tensor([True, False, True, False])
    cos_pos = (q * pos).sum(1).requires_grad_()
    cos_neg = torch.einsum("bd,bnd->bn", q, neg).requires_grad_()
    loss = rid(cos_pos, cos_neg, paired, tau=0.2, m=50)
    expected = rid_as_a_loop(q[paired], pos[paired], neg[paired], 0.2, 50, 1.0) * 2 / 4
    assert loss.item() == pytest.approx(expected.item(), rel=1e-10)
    loss.backward()
    assert (cos_pos.grad[~paired] == 0).all() and (cos_neg.grad[~paired] == 0).all()
    assert (cos_pos.grad[paired] != 0).all() and (cos_neg.grad[paired] != 0).all()


def test_a_batch_without_any_pair_costs_nothing() -> None:
    cos = torch.full((3,), 0.5, requires_grad=True)
    loss = rid(cos, cos[:, None].expand(3, 4), torch.zeros(3, dtype=torch.bool), tau=0.1, m=9)
    loss.backward()
    assert loss.item() == 0 and (cos.grad == 0).all()


def test_rid_of_all_samples_is_eq4() -> None:
    q, pos, neg = unit(4, 6, seed=4), unit(4, 6, seed=5), unit(4, 3, 6, seed=6)
    found = rid((q * pos).sum(1), torch.einsum("bd,bnd->bn", q, neg),
                torch.ones(4, dtype=torch.bool), tau=0.2, m=50)  # fmt: skip
    assert found.item() == pytest.approx(L_rid(q, pos, neg, tau=0.2, m=50).item(), rel=1e-12)


# -- Eq. 6 ---------------------------------------------------------------------------------------


def parts_as_a_loop(z_t, z_s, y, temperature: float):
    """(TCKD, NCKD, 1 - p_t) of each sample as Eq. 6 prints them, over torch scalars."""
    rows = []
    for t, s, tar in zip(z_t, z_s, y.tolist(), strict=True):
        e_t, e_s = torch.exp(t / temperature), torch.exp(s / temperature)
        p_t, p_s = e_t / e_t.sum(), e_s / e_s.sum()
        rest = [c for c in range(len(t)) if c != tar]
        not_t, not_s = sum(p_t[c] for c in rest), sum(p_s[c] for c in rest)
        tckd = p_t[tar] * torch.log(p_t[tar] / p_s[tar]) + not_t * torch.log(not_t / not_s)
        nckd = sum(p_t[c] / not_t * torch.log((p_t[c] / not_t) / (p_s[c] / not_s)) for c in rest)
        rows.append((tckd, nckd, not_t))
    return [torch.stack(column) for column in zip(*rows, strict=True)]


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_eq6_matches_plain_loop_in_value_and_gradient(temperature: float) -> None:
    z_t, z_s, y = logits(5, 7, seed=1)
    a, b = z_s.clone().requires_grad_(), z_s.clone().requires_grad_()
    loss = L_iid(z_t, a, y, temperature=temperature)
    tckd, nckd, rest = parts_as_a_loop(z_t, b, y, temperature)
    expected = temperature**2 * (tckd + rest * nckd).mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-11)
    found, wanted = torch.autograd.grad(loss, a)[0], torch.autograd.grad(expected, b)[0]
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_dkd_matches_plain_loop_in_value_and_gradient(temperature: float) -> None:
    z_t, z_s, y = logits(5, 7, seed=2)
    a, b = z_s.clone().requires_grad_(), z_s.clone().requires_grad_()
    loss = L_iid(z_t, a, y, temperature=temperature, mode="dkd", target=0.7, non_target=3.0)
    tckd, nckd, _ = parts_as_a_loop(z_t, b, y, temperature)
    expected = temperature**2 * (0.7 * tckd + 3 * nckd).mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-11)
    found, wanted = torch.autograd.grad(loss, a)[0], torch.autograd.grad(expected, b)[0]
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("mode", ["paper", "dkd"])
def test_l_iid_gradient_is_that_of_its_value(mode: str) -> None:
    z_t, z_s, y = logits(3, 5, seed=3)
    z_s.requires_grad_()
    assert torch.autograd.gradcheck(lambda s: L_iid(z_t, s, y, temperature=2.0, mode=mode), z_s)


@pytest.mark.parametrize("mode", ["paper", "dkd"])
def test_l_iid_is_finite_for_huge_logits_and_a_certain_teacher(mode: str) -> None:
    z_t = torch.tensor([[1e6, 0.0, -1e6], [200.0, 0.0, 0.0]])
    z_s = torch.tensor([[-1e6, 0.0, 1e6], [0.0, 200.0, 0.0]], requires_grad=True)
    loss = L_iid(z_t, z_s, torch.tensor([0, 0]), temperature=1.0, mode=mode)
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(z_s.grad).all()
    assert loss > 1e5


@pytest.mark.parametrize("mode", ["paper", "dkd"])
def test_l_iid_computes_in_float32_or_better(mode: str) -> None:
    z_t, z_s, y = logits(4, 30, seed=4)
    assert L_iid(z_t, z_s, y, mode=mode).dtype == torch.float64
    low_t, low_s = z_t.bfloat16(), z_s.bfloat16()
    expected = L_iid(low_t.float(), low_s.float(), y, mode=mode)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = L_iid(low_t, low_s, y, mode=mode)
        same = L_iid(z_t, z_s, y, mode=mode)
    assert found.dtype == torch.float32 and found.item() == expected.item()
    assert same.item() == L_iid(z_t, z_s, y, mode=mode).item()


def test_a_student_that_agrees_costs_nothing() -> None:
    z, _, y = logits(4, 6, seed=5)
    for mode in ("paper", "dkd"):
        assert L_iid(z, z + 3, y, temperature=4.0, mode=mode).item() == pytest.approx(0, abs=1e-14)


def test_bad_input_is_refused_in_one_line() -> None:
    z_t, z_s, y = logits(2, 3, seed=6)
    with pytest.raises(ValueError, match="no mode 'other' of L_iid; there are: paper, dkd"):
        L_iid(z_t, z_s, y, mode="other")
    with pytest.raises(ValueError, match="of the same C >= 2"):
        L_iid(z_t[:, :1], z_s[:, :1], y * 0, mode="dkd")
    with pytest.raises(ValueError, match="at least one negative"):
        rid(z_t[:, 0], z_t[:, :0], y == y, tau=0.1, m=5)


# -- weights -------------------------------------------------------------------------------------


def test_eq7_weighs_the_terms() -> None:
    cls, iid, rid_ = (torch.tensor(v) for v in (1.0, 2.0, 3.0))
    assert L_total(cls, iid, rid_, alpha=0.5, beta=2.0).item() == 0.5 * 2 + 2 * 3 + 1

"""CRRCD's equations against plain float64 loops, in value and gradient."""

from __future__ import annotations

import math

import pytest
import torch

from crrcd.losses import L_kd, L_rcd, L_total, critic
from shared.losses import kd, nce


def unit(*shape: int, seed: int) -> torch.Tensor:
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.nn.functional.normalize(x, dim=-1)


def rcd_as_a_loop(q, pos, neg, tau: float, m: int, z: float):
    """Eq. 10 and 11 as printed, over Python numbers and torch scalars (for the gradient)."""
    b, n, d = neg.shape
    total = torch.zeros((), dtype=torch.float64)
    for j in range(b):
        score = sum(q[j, c] * pos[j, c] for c in range(d))
        e = torch.exp(score / tau) / z
        total = total - torch.log(e / (e + n / m))
        for k in range(n):
            score = sum(q[j, c] * neg[j, k, c] for c in range(d))
            e = torch.exp(score / tau) / z
            total = total - torch.log(1 - e / (e + n / m))
    return total / b


@pytest.mark.parametrize("tau", [0.07, 0.5])
@pytest.mark.parametrize("z", [1.0, 37.0])
def test_eq11_matches_plain_loop_in_value_and_gradient(tau: float, z: float) -> None:
    inputs = [unit(3, 4, seed=1), unit(3, 4, seed=2), unit(3, 5, 4, seed=3)]
    ours = [t.clone().requires_grad_() for t in inputs]
    loop = [t.clone().requires_grad_() for t in inputs]
    loss = L_rcd(*ours, tau=tau, m=200, log_z=math.log(z))
    expected = rcd_as_a_loop(*loop, tau=tau, m=200, z=z)
    # the loop's 1 - h cancels; ours does not
    assert loss.item() == pytest.approx(expected.item(), rel=1e-10)
    for a, b in zip(
        torch.autograd.grad(loss, ours), torch.autograd.grad(expected, loop), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_without_a_normaliser_eq11_is_as_printed() -> None:
    inputs = [unit(3, 4, seed=1), unit(3, 4, seed=2), unit(3, 5, 4, seed=3)]
    expected = rcd_as_a_loop(*inputs, tau=0.5, m=200, z=1.0)
    assert L_rcd(*inputs, tau=0.5, m=200).item() == pytest.approx(expected.item(), rel=1e-10)


def test_eq10_matches_the_printed_ratio() -> None:
    for cosine in (-1.0, -0.3, 0.0, 0.8, 1.0):
        e = math.exp(cosine / 0.1)
        expected = e / (e + 512 / 50_000)
        found = critic(torch.tensor(cosine, dtype=torch.float64), n=512, m=50_000, tau=0.1)
        assert found.item() == pytest.approx(expected, rel=1e-12)


def test_nce_is_the_mean_log_likelihood_of_the_critic() -> None:
    pos, neg = torch.linspace(-1, 1, 6).double(), torch.linspace(-1, 1, 42).double().view(6, 7)
    h = {"n": 7, "m": 90, "tau": 0.1, "log_z": 0.4}
    expected = -(critic(pos, **h).log().sum() + (1 - critic(neg, **h)).log().sum()) / 6
    found = nce(pos, neg, tau=0.1, m=90, log_z=0.4)
    assert found.item() == pytest.approx(expected.item(), rel=1e-10)


def test_nce_is_finite_where_the_exponentials_are_not() -> None:
    pos, neg = torch.tensor([-1.0, 1.0]), torch.ones(2, 3)
    loss = nce(pos.requires_grad_(), neg, tau=1e-3, m=10)  # e^1000 overflows
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(pos.grad).all()


def test_nce_without_negatives_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one negative"):
        nce(torch.ones(2), torch.ones(2, 0), tau=0.1, m=5)


def kl_as_a_loop(z_s, z_t, temperature: float) -> torch.Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for s, t in zip(z_s, z_t, strict=True):
        p_t = torch.exp(t / temperature) / torch.exp(t / temperature).sum()
        p_s = torch.exp(s / temperature) / torch.exp(s / temperature).sum()
        for c in range(len(s)):
            total = total + p_t[c] * (torch.log(p_t[c]) - torch.log(p_s[c]))
    return temperature**2 * total / len(z_s)


def test_kd_matches_plain_loop_in_value_and_gradient() -> None:
    g = torch.Generator().manual_seed(0)
    z_s = torch.randn(4, 6, generator=g, dtype=torch.float64).requires_grad_()
    z_t = torch.randn(4, 6, generator=g, dtype=torch.float64)
    loss, expected = kd(z_s, z_t, 4.0), kl_as_a_loop(z_s, z_t, 4.0)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    ours, loop = torch.autograd.grad(loss, z_s)[0], torch.autograd.grad(expected, z_s)[0]
    torch.testing.assert_close(ours, loop, rtol=1e-9, atol=1e-12)


def test_eq12_has_the_gradient_of_kd_and_differs_by_the_entropy() -> None:
    g = torch.Generator().manual_seed(1)
    z_s = torch.randn(5, 7, generator=g, dtype=torch.float64).requires_grad_()
    z_t = torch.randn(5, 7, generator=g, dtype=torch.float64)
    printed, ours = L_kd(z_s, z_t, 4.0), kd(z_s, z_t, 4.0)
    a, b = torch.autograd.grad(printed, z_s)[0], torch.autograd.grad(ours, z_s)[0]
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    p = torch.softmax(z_t / 4, dim=1)
    entropy = -(p * p.log()).sum(1).mean()
    assert (printed - ours).item() == pytest.approx(16 * entropy.item(), rel=1e-10)


def test_kd_works_in_float32_for_half_precision_logits() -> None:
    z = torch.randn(4, 100, generator=torch.Generator().manual_seed(2))
    found = kd(z.bfloat16(), z.flip(0).bfloat16(), 4.0)
    expected = kd(z.bfloat16().float(), z.flip(0).bfloat16().float(), 4.0)
    assert found.dtype == torch.float32 and found.item() == expected.item()


def test_eq13_weighs_the_terms() -> None:
    one, two, three = (torch.tensor(v) for v in (1.0, 2.0, 3.0))
    assert L_total(one, two, three, alpha=0.5, beta=2.0).item() == 1 + 0.5 * 2 + 2 * 3

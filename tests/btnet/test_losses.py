"""BTNet's equations against plain float64 loops, and against the printed gains of Table 1."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from btnet.losses import L_branch, L_influence, L_total, gain_cross, gain_same
from shared.models.heads import ArcFace, CosFace, CurricularFace


def maps(seed: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(3, 4, 5, 5, generator=g, dtype=torch.float64) for _ in range(2))  # type: ignore[return-value]


# -- Eq. 1 ---------------------------------------------------------------------------------------


def curricular(feature: Tensor, y: Tensor, weight: Tensor, scale: float, margin: float) -> Tensor:
    """-ln p of the target, over torch scalars; t after its first step from 0."""
    b, c = len(feature), len(weight)
    dot = [[(feature[i] * weight[k]).sum() for k in range(c)] for i in range(b)]
    length = [v.square().sum().sqrt() for v in feature], [w.square().sum().sqrt() for w in weight]
    cos = [[dot[i][k] / length[0][i] / length[1][k] for k in range(c)] for i in range(b)]
    t = 0.01 * sum(cos[i][int(y[i])].item() for i in range(b)) / b
    total = torch.zeros((), dtype=torch.float64)
    for i in range(b):
        shifted = torch.cos(torch.acos(cos[i][int(y[i])]) + margin)
        logits = []
        for k in range(c):
            if k == int(y[i]):
                logits.append(scale * shifted)
            else:
                hard = bool(cos[i][k] > shifted)
                logits.append(scale * (cos[i][k] * (t + cos[i][k]) if hard else cos[i][k]))
        total = total + torch.log(sum(torch.exp(z) for z in logits)) - logits[int(y[i])]
    return total / b


def test_eq1_is_curricularface_on_kappa_as_a_plain_loop_in_value_and_gradient() -> None:
    g = torch.Generator().manual_seed(0)
    feature = torch.randn(6, 8, generator=g, dtype=torch.float64).requires_grad_()
    y = torch.tensor([0, 3, 3, 1, 4, 2])
    head = CurricularFace(8, 5, scale=4.0, margin=0.3).double().requires_grad_(False)
    with torch.no_grad():
        head.weight.copy_(torch.randn(5, 8, generator=g))
    loss = L_influence(feature, y, head)
    expected = curricular(feature, y, head.weight, 4.0, 0.3)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)  # t is a float32 buffer's
    (ours,), (theirs,) = (torch.autograd.grad(v, feature) for v in (loss, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("head", [ArcFace, CosFace, CurricularFace])
def test_a_fixed_classifier_gets_no_gradient_and_the_branch_does(head: type) -> None:
    kappa = head(4, 3).requires_grad_(False)
    feature = torch.randn(5, 4, requires_grad=True)
    L_influence(feature, torch.tensor([0, 1, 2, 0, 1]), kappa).backward()
    assert kappa.weight.grad is None and feature.grad is not None and feature.grad.any()


# -- Eq. 2 and 3 ---------------------------------------------------------------------------------


def squares(a: Tensor, b: Tensor) -> float:
    total = 0.0
    for x, y in zip(a.flatten().tolist(), b.flatten().tolist(), strict=True):
        total += (x - y) ** 2
    return total


def test_eq2_matches_plain_loop_over_the_batch_and_over_the_elements() -> None:
    z_r, z_s = maps(1)
    assert L_branch(z_r, z_s, mode="paper").item() == pytest.approx(squares(z_r, z_s) / 3)
    assert L_branch(z_r, z_s).item() == pytest.approx(squares(z_r, z_s) / (3 * 4 * 5 * 5))


def test_eq2_of_the_paper_is_50176_times_that_of_the_code_at_14() -> None:
    z_r, z_s = torch.randn(2, 256, 14, 14), torch.randn(2, 256, 14, 14)
    ratio = L_branch(z_r, z_s, mode="paper") / L_branch(z_r, z_s, mode="official")
    assert ratio.item() == pytest.approx(50_176, rel=1e-5)


@pytest.mark.parametrize("mode, divisor", [("paper", 3), ("official", 300)])
def test_eq2_teaches_the_branch_and_not_the_trunk(mode, divisor: int) -> None:
    z_r, z_s = (z.requires_grad_() for z in maps(2))
    L_branch(z_r, z_s, mode=mode).backward()
    torch.testing.assert_close(z_r.grad, 2 * (z_r - z_s).detach() / divisor)
    assert z_s.grad is None


def test_eq2_of_bf16_maps_is_computed_in_float32() -> None:
    z_r, z_s = (z.bfloat16() for z in maps(3))
    loss = L_branch(z_r, z_s, mode="paper")
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(squares(z_r, z_s) / 3, rel=1e-6)


def test_maps_of_two_shapes_and_an_unknown_mode_are_refused() -> None:
    z_r, z_s = maps(4)
    with pytest.raises(ValueError, match="L_branch: .* differ in shape"):
        L_branch(z_r, z_s[:, :, :1])
    with pytest.raises(ValueError, match="no mode 'mean'; there are: official, paper"):
        L_branch(z_r, z_s, mode="mean")  # type: ignore[arg-type]


def test_eq3_weighs_the_branch_loss_only() -> None:
    total = L_total(torch.tensor(2.0), torch.tensor(6.0), 0.5)
    assert total.item() == 5.0


# -- Eq. 4 and 5 ---------------------------------------------------------------------------------

# Table 1: phi_hr, the baseline of the gain (phi_mr, phi_mm), phi_mr(v3), phi_bt, and their printed
# gains. Accuracies are printed to .01 as well, so a gain is known to about .02 / the denominator.
CROSS = {
    "112&7": (57.75, 65.85, (68.80, 1.36), (86.10, 3.50)),
    "112&14": (81.02, 87.47, (88.13, 1.10), (94.08, 2.02)),
    "112&28": (95.90, 96.05, (96.62, 4.80), (96.65, 5.00)),
}
SAME = {
    "7&7": (60.70, 62.57, (61.62, 0.49), (77.78, 9.13)),
    "14&14": (73.88, 78.00, (80.55, 1.62), (90.90, 4.13)),
    "28&28": (93.58, 94.68, (94.78, 1.09), (96.27, 2.45)),
}


@pytest.mark.parametrize(
    "gain, row",
    [*((gain_cross, row) for row in CROSS.values()), *((gain_same, row) for row in SAME.values())],
)
def test_gains_of_table1_are_the_printed_ones(gain, row) -> None:
    hr, baseline, *models = row
    for m, printed in models:
        assert gain(m, hr, baseline) == pytest.approx(printed, abs=0.006)
    assert gain(hr, hr, baseline) == 0
    assert gain(baseline, hr, baseline) == pytest.approx(1)


def test_a_loss_is_a_negative_gain_even_under_a_baseline_that_is_worse() -> None:
    assert gain_cross(50.0, 60.0, 55.0) == -2.0  # |.|: the denominator is 5
    assert gain_cross(70.0, 60.0, 55.0) == 2.0


def test_equal_baselines_have_no_gain() -> None:
    assert math.isnan(gain_cross(90.0, 80.0, 80.0)) and math.isnan(gain_same(80.0, 80.0, 80.0))

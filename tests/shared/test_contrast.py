"""What relational contrastive losses share."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.contrast import CollapseAlarm, Normaliser, derangement, log_normaliser


def test_normaliser_is_the_log_of_m_times_the_mean_exponential() -> None:
    scores = torch.linspace(-3, 9, 40, dtype=torch.float64).view(4, 10)
    expected = math.log(500 * sum(math.exp(s) for s in scores.flatten().tolist()) / 40)
    assert log_normaliser(scores, m=500).item() == pytest.approx(expected, rel=1e-12)


def test_the_three_normalisers() -> None:
    batches = [(torch.full((2,), 0.1 * k), torch.full((2, 3), 0.2 * k)) for k in range(1, 4)]
    expected = [log_normaliser(torch.cat([p[:, None], n], 1) / 0.1, m=50) for p, n in batches]
    paper = Normaliser("paper", m=50, tau=0.1)
    assert [paper(*b).item() for b in batches] == [0.0, 0.0, 0.0]
    crd = Normaliser("crd", m=50, tau=0.1)
    assert [crd(*b).item() for b in batches] == [pytest.approx(expected[0].item())] * 3
    ema = Normaliser("crd-ema", m=50, tau=0.1, momentum=0.5)
    ema(*batches[0])
    second = 0.5 * expected[0] + 0.5 * expected[1]
    assert ema(*batches[1]).item() == pytest.approx(second.item(), rel=1e-6)
    assert ema(*batches[2]).item() == pytest.approx((0.5 * (second + expected[2])).item(), rel=1e-6)


def test_collapse_alarm_speaks_once_and_only_of_a_lasting_collapse() -> None:
    said: list[str] = []
    alarm = CollapseAlarm(said.append, gap=0.02, patience=3)
    for gap in (0.0, 0.0, 0.5, 0.0, 0.0, 0.0, 0.0, 0.0):
        alarm.watch({"cos_pos": gap, "cos_neg": 0.0})
        alarm.watch(None)
    assert len(said) == 1 and "collapse" in said[0]


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 200), st.integers(0, 10**6))
def test_derangement_is_a_permutation_without_fixed_points(size: int, seed: int) -> None:
    partner = derangement(size, torch.Generator().manual_seed(seed))
    assert sorted(partner.tolist()) == list(range(size))
    assert (partner != torch.arange(size)).all()


def test_a_single_image_has_no_partner() -> None:
    with pytest.raises(ValueError, match="no partner"):
        derangement(1, torch.Generator())

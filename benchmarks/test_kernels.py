"""Every kernel at or above its bar and its last bound: speed by ratio, memory by count."""

from __future__ import annotations

import pytest

from benchmarks.cases import CASES, Case
from benchmarks.measure import confirmed, peak_bytes, ratio

by_name = pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)


@by_name
def test_speed(case: Case, bounds, record, benchmark) -> None:
    baseline, ours = case.make()
    bound = max(case.speed, bounds.get(case.name, {}).get("speed", 0))
    found = confirmed(baseline, ours, bound, case.rounds)
    record(case.name, speed=found)
    benchmark.extra_info["times the baseline's speed"] = found
    benchmark.pedantic(ours, rounds=3, warmup_rounds=1)
    assert found >= bound


@pytest.mark.parametrize("case", [c for c in CASES if c.memory], ids=lambda c: c.name)
def test_memory(case: Case, bounds, record) -> None:
    baseline, ours = case.make()
    share = peak_bytes(ours) / peak_bytes(baseline)
    record(case.name, memory=share)
    assert share <= min(case.memory or 0, bounds.get(case.name, {}).get("memory", 1))


def test_the_gate_catches_a_kernel_made_twice_as_slow() -> None:
    case = next(c for c in CASES if c.name.startswith("angle_loss N=64"))
    _, ours = case.make()

    def twice() -> None:
        ours(), ours()

    assert ratio(ours, twice, 20) < 0.75  # bound 1.0, had it been this one's
    assert confirmed(ours, ours, 0.75, 20) >= 0.75


def test_the_memory_gate_sees_what_a_kernel_holds() -> None:
    import torch

    x = torch.zeros(1 << 18)

    def hold() -> None:
        a = x + 1
        b = a + 1
        del a
        c = b + 1
        del b, c

    assert 2 << 20 <= peak_bytes(hold) < (2 << 20) + 100  # two of the three at a time

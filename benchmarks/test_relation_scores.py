"""`relation_scores`: the CPU path against the reference, side by side in one process.

The gate is the ratio of forward + backward (reference A B B A candidate, median over rounds, one
thread), confirmed by a second measurement before it fails, and the bytes saved for the backward
pass, which are the same every time.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from shared.kernels import relation_scores

BOUNDS = json.loads((Path(__file__).parent / "bounds.json").read_text())["relation_scores"]


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def step(backend: str) -> Callable[[], None]:
    g = torch.Generator().manual_seed(0)
    b, k, m, d = (BOUNDS["shape"][name] for name in ("B", "K", "M", "d"))
    leaves = [torch.randn(*s, generator=g).requires_grad_() for s in ((b, d), (b, d), (m, d))]
    weight, bias = torch.randn(d, d, generator=g).requires_grad_(), torch.zeros(d)
    index = torch.randint(m, (b, k), generator=g)

    def run() -> None:
        query, anchor, bank = leaves
        scores = relation_scores(query, anchor, bank, index, weight, bias, backend=backend)
        scores.square().sum().backward()

    return run


def ratio(slow: Callable[[], None], fast: Callable[[], None], rounds: int = 5) -> float:
    """Median of time(slow) / time(fast), measured A B B A."""

    def seconds(run: Callable[[], None]) -> float:
        began = time.perf_counter()
        run()
        return time.perf_counter() - began

    slow(), fast()
    found = []
    for _ in range(rounds):
        a, b, c, d = seconds(slow), seconds(fast), seconds(fast), seconds(slow)
        found.append((a + d) / (b + c))
    return statistics.median(found)


def gate(slow: Callable[[], None], fast: Callable[[], None], bound: float) -> float:
    """The ratio, measured again before it counts as too low."""
    found = ratio(slow, fast)
    return found if found >= bound else max(found, ratio(slow, fast))


def saved_bytes(run: Callable[[], None]) -> int:
    total = 0

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal total
        total += tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        run()
    return total


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_time(benchmark, backend: str) -> None:
    benchmark.pedantic(step(backend), rounds=5, warmup_rounds=1)


def test_cpu_path_is_faster_than_the_reference() -> None:
    found = gate(step("reference"), step("cpu"), BOUNDS["speed"])
    print(f"relation_scores: {found:.2f} times the reference (bound {BOUNDS['speed']})")
    assert found >= BOUNDS["speed"]


def test_cpu_path_saves_less_for_the_backward_pass() -> None:
    share = saved_bytes(step("cpu")) / saved_bytes(step("reference"))
    print(f"relation_scores: {share:.2f} of the reference's saved bytes")
    assert share <= BOUNDS["saved_bytes"]


def test_the_gate_catches_a_path_made_twice_as_slow() -> None:
    fast = step("cpu")

    def twice() -> None:
        fast(), fast()

    assert gate(fast, twice, 0.75) < 0.75

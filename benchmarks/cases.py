"""The gates: which kernel against which baseline, at which size, and the bar it has to clear.

A bar is what the kernel promises. bounds.json holds what is enforced besides: `slack` of the ratio
last measured by `nox -s bench -- --update`, so that a slow-down shows long before the bar is
reached.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from benchmarks import baselines
from shared import kernels

Run = Callable[[], object]


@dataclass(frozen=True)
class Case:
    """One size of one kernel against one baseline, forward and backward."""

    kernel: str
    size: str
    baseline: str
    make: Callable[[], tuple[Run, Run]] = field(repr=False)  # (baseline, ours)
    speed: float  # bar: times the baseline's speed
    memory: float | None = None  # bar: share of the baseline's peak
    rounds: int = 5
    slack: float = 0.6  # of the measured ratio is the bound: two runs on a shared machine differ

    @property
    def name(self) -> str:
        return f"{self.kernel} {self.size} against {self.baseline}"


def _random(*shapes: tuple[int, ...]) -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    return [torch.randn(*s, generator=g) for s in shapes]


def _step(function: Callable[..., Tensor], leaves: list[Tensor]) -> Run:
    """Forward and backward to `leaves`."""

    def run() -> None:
        torch.autograd.grad(function().square().sum(), leaves)

    return run


def angle(n: int, d_t: int, d_s: int, baseline: Callable[..., Tensor]) -> tuple[Run, Run]:
    s, t = _random((n, d_s), (n, d_t))
    s.requires_grad_()
    return (
        _step(lambda: baseline(s, t), [s]),
        _step(lambda: kernels.angle_loss(s, t, reduction="rkd"), [s]),
    )


def distance(n: int, d: int, baseline: Callable[..., Tensor]) -> tuple[Run, Run]:
    s, t = _random((n, d), (n, d))
    s.requires_grad_()
    return (
        _step(lambda: baseline(s, t), [s]),
        _step(lambda: kernels.distance_loss(s, t, penalty="huber", reduction="rkd"), [s]),
    )


def pairwise(m: int, n: int, d: int) -> tuple[Run, Run]:
    x, y = _random((m, d), (n, d))
    return lambda: torch.cdist(x, y), lambda: kernels.pairwise_distance(x, y)


def angles(n: int, d: int) -> tuple[Run, Run]:
    (x,) = _random((n, d))
    x.requires_grad_()
    return (
        _step(lambda: kernels.triplet_angles(x, backend="reference"), [x]),
        _step(lambda: kernels.triplet_angles(x), [x]),
    )


def relation(b: int, k: int, m: int, d: int, *, weight: bool = True) -> tuple[Run, Run]:
    leaves = _random((b, d), (b, d), (m, d), *([(d, d), (d,)] if weight else []))
    for x in leaves:
        x.requires_grad_()
    index = torch.randint(m, (b, k), generator=torch.Generator().manual_seed(1))

    def run(backend: str) -> Run:
        q, a, n, *linear = leaves
        w, c = linear or (None, None)
        return _step(lambda: kernels.relation_scores(q, a, n, index, w, c, backend=backend), leaves)

    return run("reference"), run("auto")


def nce(b: int, k: int, m: int, d: int) -> tuple[Run, Run]:
    query, bank = _random((b, d), (m, d))
    query.requires_grad_()
    index = torch.randint(m, (b, k), generator=torch.Generator().manual_seed(1))

    def run(backend: str) -> Run:
        return _step(lambda: kernels.nce_scores(query, bank, index, backend=backend), [query])

    return run("reference"), run("auto")


def centers(b: int, c: int, d: int) -> tuple[Run, Run]:
    s, t, u = _random((b, d), (b, d), (c, d))
    s.requires_grad_()

    def run(backend: str) -> Run:
        return _step(lambda: kernels.center_distance_loss(s, t, u, backend=backend), [s])

    return run("reference"), run("auto")


def search(q: int, g: int, d: int, k: int) -> tuple[Run, Run]:
    queries, gallery = _random((q, d), (g, d))
    return (
        lambda: baselines.naive_search(queries, gallery, k),
        lambda: kernels.topk_search(queries, gallery, k),
    )


def _angle_cases() -> list[Case]:
    naive, gram = baselines.naive_angle, baselines.gram_angle
    made = [
        Case("angle_loss", f"N={n}", "naive", lambda n=n: angle(n, 64, 64, naive), 1.0, rounds=50)
        for n in (8, 16, 32, 64)
    ]
    for n, d_t, d_s, bar in ((128, 2048, 512, 100.0), (256, 512, 512, 120.0)):
        size = f"N={n} D_t={d_t} D_s={d_s}"

        def make(baseline, n=n, d_t=d_t, d_s=d_s):
            return lambda: angle(n, d_t, d_s, baseline)

        made.append(Case("angle_loss", size, "naive", make(naive), bar, memory=0.05, rounds=3))
        made.append(Case("angle_loss", size, "eager Gram", make(gram), 4.0))
    return made


CASES = [
    *_angle_cases(),
    Case(
        "distance_loss", "N=16 D=64", "naive",
        lambda: distance(16, 64, baselines.naive_distance), 1.0, rounds=50,
    ),
    Case(
        "distance_loss", "N=128 D=512", "naive",
        lambda: distance(128, 512, baselines.naive_distance), 10.0, memory=0.05,
        slack=0.25,  # most of naive's time is fresh memory: 20 to 68 times ours, seen
    ),
    Case(
        "triplet_angles", "N=128 D=512", "naive", lambda: angles(128, 512), 10.0, memory=0.5
    ),
    Case(
        "pairwise_distance", "4096 x 4096 x 512", "torch.cdist",
        lambda: pairwise(4096, 4096, 512), 0.75,
    ),
    Case(
        "relation_scores", "B=96 K=513 d=128", "naive", lambda: relation(96, 513, 4192, 128),
        2.0, memory=1 / 8,
    ),
    Case(
        "relation_scores", "B=96 K=513 d=128, no weight", "naive",
        lambda: relation(96, 513, 4192, 128, weight=False), 6.0, memory=1 / 8,
    ),
    Case(
        "nce_scores", "B=32 K=4096 M=20000 D=128", "naive", lambda: nce(32, 4096, 20_000, 128),
        1.0, memory=0.25,
    ),
    Case(
        "nce_scores", "B=96 K=512 M=4096 D=128", "naive", lambda: nce(96, 512, 4096, 128),
        1.0, memory=0.25,
    ),
    Case(
        "nce_scores", "B=64 K=16384 M=50000 D=128", "naive",
        lambda: nce(64, 16_384, 50_000, 128), 1.0, memory=0.25, rounds=3,
    ),
    Case(
        "center_distance_loss", "B=64 C=100 D=512", "naive", lambda: centers(64, 100, 512), 1.0,
    ),
    Case(
        "center_distance_loss", "B=128 C=1000 D=512", "naive", lambda: centers(128, 1000, 512),
        1.0, memory=0.5,
    ),
    Case(
        "topk_search", "6000 x 6000 x 512 k=10", "naive", lambda: search(6000, 6000, 512, 10),
        0.9, memory=0.5, rounds=3,  # level: the product is nearly all there is to do
    ),
    Case(
        "topk_search", "6000 x 20000 x 128 k=2", "naive", lambda: search(6000, 20_000, 128, 2),
        1.0, memory=0.5, rounds=3,
    ),
]

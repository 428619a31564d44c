"""Evaluators against straightforward versions: speed by ratio, memory by count.

The straightforward versions hold the whole matrix, at sizes where that fits; the evaluators also
count ties, which those do not. Bars have room for a machine that does other things beside.
"""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks.measure import confirmed, peak_bytes
from shared.evaluate.identify import closed_set, open_set
from shared.evaluate.probe import linear_probe
from shared.evaluate.retrieve import recall_at_k
from shared.evaluate.verify import verification

Run = Callable[[], object]


def people(images: int, identities: int, spread: float = 2.0) -> tuple[Tensor, Tensor]:
    """Embeddings [images, 512] in float32 and their identities, one after the other."""
    g = torch.Generator().manual_seed(0)
    ids = torch.arange(images) % identities
    centre = torch.randn(identities, 512, generator=g)
    e = centre[ids] + spread * torch.randn(images, 512, generator=g)
    return torch.nn.functional.normalize(e), ids


def cosines(a: Tensor, b: Tensor) -> Tensor:
    return a.double() @ b.double().T


def closed() -> tuple[Run, Run]:
    """TinyFace, an eighth of its gallery, and fewer probes still."""
    e, ids = people(256 + 19_700, 6_000)
    probes, gallery, p_id, g_id = e[:256], e[256:], ids[:256], ids[256:]

    def sorted_rows() -> tuple[float, float]:
        order = cosines(probes, gallery).argsort(dim=1, descending=True)
        mates = g_id[order] == p_id[:, None]
        j = mates.cumsum(1) / torch.arange(1, mates.shape[1] + 1)
        return (
            float(mates[:, :20].any(1).float().mean()),
            float(((j * mates).sum(1) / mates.sum(1)).mean()),
        )

    return sorted_rows, lambda: closed_set(probes, p_id, gallery, g_id)


def opened() -> tuple[Run, Run]:
    """QMUL-SurvFace, a hundredth of its probes, against all its prototypes."""
    e, ids = people(5_319 + 600, 5_319)
    gallery, g_id, mated, m_id = e[:5_319], ids[:5_319], e[5_319:], ids[5_319:]
    unmated = people(1_400, 1_400)[0].flip(1)

    def sorted_rows() -> float:
        scores = cosines(mated, gallery)
        order = scores.argsort(dim=1, descending=True)[:, :20]
        mates = g_id[order] == m_id[:, None]
        unknown = cosines(unmated, gallery).max(dim=1)[0].sort(descending=True)[0]
        threshold = unknown[int(0.1 * len(unknown))]
        return float((mates & (scores.gather(1, order) > threshold)).any(1).float().mean())

    return sorted_rows, lambda: open_set(mated, m_id, unmated, gallery, g_id)


def retrieved(images: int, classes: int, k: int, block: int) -> tuple[Run, Run]:
    """Products of `block` queries with all images and torch.topk: the search, nothing counted."""
    e, ids = people(images, classes, 2.5)

    def blocks() -> None:
        for rows in torch.arange(images).split(block):
            (e[rows] @ e.T).topk(k + 1, dim=1)

    return blocks, lambda: recall_at_k(e, ids, (1, k))


def cub() -> tuple[Run, Run]:
    return retrieved(5_924, 100, 16, block=5_924)


def sop() -> tuple[Run, Run]:
    return retrieved(6_050, 1_132, 100, block=256)


def verified() -> tuple[Run, Run]:
    """Each distinct score as a threshold, for each of ten folds."""
    pairs = 1_000
    g = np.random.default_rng(0)
    e1 = g.standard_normal((pairs, 512))
    same = np.arange(pairs) % 2 == 0
    e2 = np.where(same[:, None], e1, 0) + g.standard_normal((pairs, 512)) * 1.5

    def thresholds() -> float:
        a, b = (e / np.linalg.norm(e, axis=1, keepdims=True) for e in (e1, e2))
        score, right = (a * b).sum(1), []
        for fold in np.array_split(np.arange(pairs), 10):
            train = np.setdiff1d(np.arange(pairs), fold)
            accuracy = [((score[train] >= t) == same[train]).mean() for t in score[train]]
            best = score[train][int(np.argmax(accuracy))]
            right.append(((score[fold] >= best) == same[fold]).mean())
        return float(np.mean(right))

    return thresholds, lambda: verification(e1, e2, same)


def probed() -> tuple[Run, Run]:
    """SGD with momentum, 100 epochs, as such layers are usually trained."""
    e, y = people(2_000, 20, 4.0)
    e, tests = 20 * e, 500

    def sgd() -> None:
        torch.manual_seed(0)
        layer = torch.nn.Linear(512, 20)
        optimiser = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9)
        for _ in range(100):
            for rows in torch.randperm(1_500).split(64):
                optimiser.zero_grad()
                torch.nn.functional.cross_entropy(layer(e[rows]), y[rows]).backward()
                optimiser.step()

    train, test = slice(None, -tests), slice(-tests, None)
    return sgd, lambda: linear_probe(e[train], y[train], e[test], y[test], classes=20)


@dataclass(frozen=True)
class Case:
    name: str
    make: Callable[[], tuple[Run, Run]]  # (baseline, ours)
    speed: float  # bar: times the baseline's speed
    memory: float | None = None  # bar: share of the baseline's peak
    rounds: int = 2


CASES = [
    Case("closed_set 256 x 19,700 against sorted rows", closed, 1.3),
    Case("open_set 2,000 x 5,319 against sorted rows", opened, 0.7, 0.8),
    Case("recall_at_k CUB against the whole matrix", cub, 0.4, 0.8),
    Case("recall_at_k SOP / 10, K=100, against blocks", sop, 0.4),
    Case("verification 1,000 pairs against all thresholds", verified, 4.0),
    Case("linear_probe 1,500 x 512, 20 classes, against SGD", probed, 2.0),
]


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_speed(case: Case, bounds, record) -> None:
    baseline, ours = case.make()
    bound = max(case.speed, bounds.get(case.name, {}).get("speed", 0))
    found = confirmed(baseline, ours, bound, case.rounds)
    record(case.name, speed=found)
    assert found >= bound


@pytest.mark.parametrize("case", [c for c in CASES if c.memory], ids=lambda c: c.name)
def test_memory(case: Case, bounds, record) -> None:
    baseline, ours = case.make()
    share = peak(ours) / peak(baseline)
    record(case.name, memory=share)
    assert share <= min(case.memory or 0, bounds.get(case.name, {}).get("memory", 1))


def peak(run: Run) -> int:
    """The most held at once in bytes: by torch, and by numpy, whose peaks may not coincide."""
    held = peak_bytes(run)
    tracemalloc.start()
    try:
        run()
        return held + tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()

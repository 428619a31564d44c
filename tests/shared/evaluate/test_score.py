"""Scoring by two networks, one for probes and one for enrolled faces, and what surrounds a pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from shared.data.pipeline import Resident
from shared.data.protocols import Evaluation, face_folders
from shared.evaluate.score import embed, score


def features(seed: int, size: int = 5) -> torch.nn.Module:
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 8 * 8, size))


def network(seed: int, size: int = 5):
    module = features(seed, size)
    return lambda pixels: module(pixels.float() / 255)


@pytest.fixture
def faces() -> Evaluation:
    pixels = np.random.default_rng(0).integers(0, 256, (200, 3, 8, 8), dtype=np.uint8)
    return face_folders("some", Resident(pixels, np.repeat(np.arange(40), 5)))


def cosine(a: Tensor, b: Tensor) -> float:
    dot = sum(float(x) * float(y) for x, y in zip(a, b, strict=True))
    norms = [sum(float(x) ** 2 for x in v) ** 0.5 for v in (a, b)]
    return dot / (norms[0] * norms[1])


def both(net, pixels: Tensor) -> Tensor:
    return (net(pixels[None]) + net(pixels[None].flip(-1)))[0].detach()


def test_enrolled_faces_are_read_by_the_other_network(faces: Evaluation) -> None:
    lr, hr = network(1), network(2)
    found = score(lr, faces, enrolled=hr)
    assert faces.pairs is not None and faces.gallery is not None and faces.probes is not None
    pixels, labels = faces.images.pixels, faces.images.labels  # type: ignore[attr-defined]
    first, second, _ = faces.pairs
    for p in range(0, len(first), 17):
        want = cosine(both(lr, pixels[first[p]]), both(hr, pixels[second[p]]))
        assert found.extra["scores"][p] == pytest.approx(want, abs=1e-5)
    right = 0
    for probe in faces.probes.tolist():
        scores = [cosine(both(lr, pixels[probe]), both(hr, pixels[g])) for g in faces.gallery]
        right += bool(labels[faces.gallery[int(np.argmax(scores))]] == labels[probe])
    assert found.metrics["rank1"] == pytest.approx(100 * right / len(faces.probes))


def test_one_network_on_both_sides_is_the_ordinary_score(faces: Evaluation) -> None:
    net = network(1)
    assert score(net, faces, enrolled=net).metrics == score(net, faces).metrics


def test_embeddings_of_two_sizes_are_refused(faces: Evaluation) -> None:
    with pytest.raises(ValueError, match="embeddings of 5 and 6 numbers cannot be compared"):
        score(network(1), faces, enrolled=network(2, 6))


def test_best_threshold_is_the_best_of_all_and_above_the_folds(faces: Evaluation) -> None:
    found = score(network(1), faces, best=True)
    scores, same = found.extra["scores"], faces.pairs[2].numpy()  # type: ignore[index]
    tried = [*scores, scores.max() + 1]
    best = max(float(((scores >= t) == same).mean()) for t in tried)
    assert found.metrics["verification_best"] == pytest.approx(100 * best)
    assert found.correct["verification_best"].mean() == pytest.approx(best)
    assert found.metrics["verification_best"] >= found.metrics["verification"]
    assert "verification_best" not in score(network(1), faces).correct


def test_adaptation_is_entered_anew_for_each_set_of_images(faces: Evaluation) -> None:
    seen: list[str] = []

    @contextmanager
    def adapt() -> Iterator[None]:
        seen.append("in")
        yield
        seen.append("out")

    score(network(1), faces, adapt=adapt)
    assert seen == ["in", "out"]
    score(network(1), faces, enrolled=network(2), adapt=adapt)
    assert seen == ["in", "out"] * 3
    fitted = replace(faces, pairs=None, gallery=None, probes=None, fit=faces.images)
    score(network(1), fitted, adapt=adapt)
    assert seen == ["in", "out"] * 5


def test_batches_come_in_order_each_before_its_mirror_image(faces: Evaluation) -> None:
    seen: list[Tensor] = []

    def watch(pixels: Tensor) -> Tensor:
        seen.append(pixels)
        return pixels.flatten(1).float()

    embed(watch, faces.images, mirror=True, batch=80)
    pixels = faces.images.pixels  # type: ignore[attr-defined]
    want = [part for chunk in pixels.split(80) for part in (chunk, chunk.flip(-1))]
    assert len(seen) == len(want) == 6
    assert all(torch.equal(a, b) for a, b in zip(seen, want, strict=True))

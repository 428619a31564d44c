import numpy as np
import pytest
import torch

from shared.evaluate.classify import classification


def test_every_number_matches_a_plain_loop():
    rng = np.random.default_rng(0)
    logits = rng.integers(0, 6, size=(200, 7)).astype(np.float32)  # small integers: many ties
    labels = rng.integers(0, 6, size=200)  # class 6 has no example
    result = classification(logits, labels, topk=(1, 2, 5, 7, 8))

    confusion = np.zeros((7, 7), dtype=int)
    hits = dict.fromkeys((1, 2, 5, 7), 0)
    for z, y in zip(logits, labels, strict=True):
        ranking = sorted(range(7), key=lambda c: (-z[c], c))  # the largest first, then the index
        confusion[y, ranking[0]] += 1
        for k in hits:
            hits[k] += y in ranking[:k]
    assert result.top == {k: h / 200 for k, h in hits.items()}  # 8 classes do not exist: left out
    assert (result.confusion == confusion).all()
    assert result.correct.mean() == pytest.approx(result.top[1])
    assert np.isnan(result.per_class[6])
    for c in range(6):
        assert result.per_class[c] == result.correct[labels == c].mean()


def test_a_tie_is_lost_unless_the_target_comes_first():
    logits = np.zeros((3, 3))
    result = classification(logits, [0, 1, 2], topk=(1, 2, 3))
    assert result.correct.tolist() == [True, False, False]
    assert result.top == {1: 1 / 3, 2: 2 / 3, 3: 1.0}


def test_k_above_the_number_of_classes_is_left_out():
    assert classification([[1.0, 0.0]], [0]).top == {1: 1.0}


def test_tensors_and_small_integer_labels():
    logits = torch.eye(100).bfloat16()
    for dtype in (torch.uint8, torch.int64):
        result = classification(logits, torch.arange(100).to(dtype))
        assert result.top == {1: 1.0, 5: 1.0}
        assert (result.confusion == np.eye(100)).all()


def test_minus_infinity_masks_a_class():
    result = classification([[-np.inf, 0.0], [-np.inf, 0.0]], [1, 0])
    assert result.correct.tolist() == [True, False]


@pytest.mark.parametrize(
    ("logits", "labels", "words"),
    [
        ([[0.0, 1.0]], [2], "range 2 to 2, but logits have classes 0 to 1"),
        ([[0.0, 1.0]], [-1], "range -1"),
        ([[0.0, 1.0]], [1.0], "needs 1 integers"),
        ([[0.0, 1.0]], [0, 1], "needs 1 integers"),
        ([[0.0, 1.0], [np.nan, 0.0]], [0, 1], "NaN in row 1"),
        ([0.0, 1.0], [0], "needs \\[N, C\\]"),
        (np.zeros((0, 3)), [], "at least one example"),
    ],
)
def test_bad_input_is_refused(logits, labels, words):
    with pytest.raises(ValueError, match=words):
        classification(np.array(logits), np.array(labels))


def test_k_below_one_is_refused():
    with pytest.raises(ValueError, match="topk"):
        classification([[0.0, 1.0]], [0], topk=(0,))


def test_interval_is_by_image_or_by_group():
    rng = np.random.default_rng(0)
    groups = np.arange(600) // 20  # thirty videos, of which a model gets all frames or none
    logits = np.eye(4)[np.where(rng.random(30) < 0.7, 1, 2)[groups]]
    result = classification(logits, np.ones(600, dtype=int))
    by_image, by_video = result.interval(), result.interval(groups)
    assert by_image.mean == by_video.mean == result.top[1]
    half = 1.96 * np.sqrt(result.top[1] * (1 - result.top[1]) / 600)
    assert by_image.high - by_image.low == pytest.approx(2 * half, rel=0.1)
    assert by_video.high - by_video.low == pytest.approx(2 * half * 20**0.5, rel=0.2)

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.evaluate.intervals import compare
from shared.evaluate.verify import (
    best_threshold,
    flip_sum,
    histogram_statistics,
    roc,
    verification,
)


def noisy_pairs(pairs, dim=8, noise=1.0, seed=0):
    """Alternating positive and negative pairs; positives are noisy copies."""
    rng = np.random.default_rng(seed)
    same = np.arange(pairs) % 2 == 0
    e1 = rng.normal(size=(pairs, dim))
    e2 = np.where(same[:, None], e1 + noise * rng.normal(size=e1.shape), rng.normal(size=e1.shape))
    return e1, e2, same


def at_cosines(cosines):
    """Pairs of plane vectors that have these cosines; equal cosines give equal scores."""
    c = np.asarray(cosines, dtype=float)
    return np.tile([1.0, 0.0], (len(c), 1)), np.stack([c, np.sqrt(1 - c**2)], axis=1)


def brute_force_best(scores, same):
    """Every possible decision, tried one by one, from the strictest: (accuracy, its pairs)."""
    best, accepted = -1.0, None
    for t in [np.inf, *sorted(set(scores), reverse=True)]:
        right = sum((s >= t) == y for s, y in zip(scores, same, strict=True))
        if right / len(scores) > best:
            best, accepted = right / len(scores), [s >= t for s in scores]
    return best, accepted


def midway(scores, accepted):
    inside = [s for s, a in zip(scores, accepted, strict=True) if a] or [2.0]
    outside = [s for s, a in zip(scores, accepted, strict=True) if not a] or [-2.0]
    return (min(inside) + max(outside)) / 2


def test_folds_match_brute_force_over_all_thresholds():
    e1, e2, same = noisy_pairs(43)  # 43 pairs in 10 folds: three of five, seven of four
    result = verification(e1, e2, same)
    scores = [a @ b / np.sqrt((a @ a) * (b @ b)) for a, b in zip(e1, e2, strict=True)]
    assert np.allclose(result.scores, scores, atol=1e-15)

    sizes, start, accuracies, thresholds, correct = [5] * 3 + [4] * 7, 0, [], [], []
    for size in sizes:
        test = range(start, start + size)
        train = [i for i in range(43) if i not in test]
        _, accepted = brute_force_best([scores[i] for i in train], same[train])
        t = midway([scores[i] for i in train], accepted)
        decisions = [(scores[i] >= t) == same[i] for i in test]
        accuracies.append(sum(decisions) / size)
        thresholds.append(t)
        correct += decisions
        start += size
    mean = sum(accuracies) / 10
    assert result.accuracy == pytest.approx(mean, abs=1e-12)
    assert result.std == pytest.approx((sum((a - mean) ** 2 for a in accuracies) / 10) ** 0.5)
    assert result.threshold == pytest.approx(sum(thresholds) / 10, abs=1e-12)
    assert result.correct.tolist() == correct
    assert np.bincount(result.fold).tolist() == sizes
    assert (np.diff(result.fold) >= 0).all()
    assert result.best_accuracy == brute_force_best(scores, same)[0]


@given(
    st.lists(st.tuples(st.integers(-4, 4), st.booleans()), min_size=2, max_size=14).filter(
        lambda pairs: len({y for _, y in pairs}) == 2
    )
)
def test_best_threshold_is_the_highest_of_the_best_with_ties(pairs):
    scores = np.array([s / 4 for s, _ in pairs])
    same = np.array([y for _, y in pairs])
    threshold, accuracy = best_threshold(scores, same)
    expected, accepted = brute_force_best(scores, same)
    assert accuracy == expected
    assert (scores >= threshold).tolist() == accepted
    assert threshold == midway(scores, accepted)


def test_threshold_splits_neighbouring_floats():
    low, high = 0.5, np.nextafter(0.5, 1)
    threshold, accuracy = best_threshold([low, high], [False, True])
    assert accuracy == 1 and low < threshold <= high


@given(st.integers(0, 50), st.integers(-20, 20), st.booleans())
@settings(max_examples=30, deadline=None)
def test_scaling_the_embeddings_changes_nothing(seed, exponent, per_row):
    e1, e2, same = noisy_pairs(40, seed=seed)
    scale = 2.0 ** (exponent * (np.arange(40)[:, None] % 3 if per_row else 1))
    a, b = verification(e1, e2, same), verification(e1 * scale, e2 * 3.7, same)
    for name in ("accuracy", "std", "best_accuracy", "auc", "eer"):
        assert getattr(a, name) == getattr(b, name)
    assert (a.correct == b.correct).all()
    assert a.threshold == pytest.approx(b.threshold, abs=1e-12)


def test_extreme_scales_neither_overflow_nor_vanish():
    e1, e2, same = noisy_pairs(20)
    a = verification(e1, e2, same, folds=2)
    b = verification(e1 * 1e-300, e2 * 1e300, same, folds=2)
    assert np.allclose(a.scores, b.scores, atol=1e-12)


def test_tensors_and_arrays_agree():
    e1, e2, same = noisy_pairs(40)
    e1, e2 = e1.astype(np.float32), e2.astype(np.float32)
    a = verification(e1, e2, same)
    b = verification(torch.tensor(e1, requires_grad=True), torch.tensor(e2), torch.tensor(same))
    assert a.accuracy == b.accuracy and (a.scores == b.scores).all()
    c = verification(
        torch.tensor(e1).bfloat16(), torch.tensor(e2).half(), same.astype(int).tolist()
    )
    assert np.allclose(a.scores, c.scores, atol=0.02)


@given(
    st.lists(st.integers(-4, 4), min_size=1, max_size=12),
    st.lists(st.integers(-4, 4), min_size=1, max_size=12),
)
@settings(deadline=None)
def test_auc_is_the_mann_whitney_count_and_eer_lies_between_the_steps(positives, negatives):
    e1, e2 = at_cosines(np.array(positives + negatives) / 4)
    same = [True] * len(positives) + [False] * len(negatives)
    # Every pair twice, once in each fold: no fold may leave one class only to train on.
    result = verification(np.tile(e1, (2, 1)), np.tile(e2, (2, 1)), same * 2, folds=2)
    wins = sum((p > n) + (p == n) / 2 for p in positives for n in negatives)
    assert result.auc == pytest.approx(wins / len(positives) / len(negatives), abs=1e-12)

    points = []
    for t in [99, *range(4, -5, -1)]:
        far = sum(n >= t for n in negatives) / len(negatives)
        points.append((far, sum(p < t for p in positives) / len(positives)))
    before = min((p for p in points if p[0] < p[1] - 1e-12), key=lambda p: p[1] - p[0])
    after = min((p for p in points if p[0] >= p[1] - 1e-12), key=lambda p: p[0] - p[1])
    assert before[0] - 1e-12 <= result.eer <= after[0] + 1e-12  # between the two FARs
    assert after[1] - 1e-12 <= result.eer <= before[1] + 1e-12  # and between the two FRRs


def test_eer_by_hand():
    # From the top + - + + - -: FAR 0, 1/3, 1/3 against FRR 2/3, 2/3, 1/3: they meet at 1/3.
    far, tar, thresholds = roc([6, 5, 4, 3, 2, 1], [1, 0, 1, 1, 0, 0])
    assert thresholds.tolist() == [np.inf, 6, 5, 4, 3, 2, 1]
    assert np.allclose(far * 3, [0, 0, 1, 1, 1, 2, 3])
    assert np.allclose(tar * 3, [0, 1, 1, 2, 3, 3, 3])
    e1, e2 = at_cosines(np.array([6, 5, 4, 3, 2, 1]) / 8)
    same = np.array([1, 0, 1, 1, 0, 0], dtype=bool)
    result = verification(np.tile(e1, (2, 1)), np.tile(e2, (2, 1)), np.tile(same, 2), folds=2)
    assert result.eer == pytest.approx(1 / 3)
    # One tied block of everything: the line from (0, 0) to (1, 1) meets FAR = FRR in the middle.
    ones = np.ones((4, 2))
    tied = verification(ones, ones, [1, 0, 1, 0], folds=2)
    assert tied.eer == 0.5 and tied.auc == 0.5


def test_roc_admits_equal_scores_together():
    far, tar, thresholds = roc([0.5, 0.5, 0.5, 0.25], [True, True, False, False])
    assert thresholds.tolist() == [np.inf, 0.5, 0.25]
    assert far.tolist() == [0, 0.5, 1] and tar.tolist() == [0, 1, 1]


@given(st.integers(0, 1000), st.integers(1, 20))
@settings(max_examples=50, deadline=None)
def test_tar_at_far_matches_brute_force(seed, twentieths):
    rng = np.random.default_rng(seed)
    scores = rng.integers(-8, 9, size=40) / 8
    same = np.arange(40) % 2 == 0
    result = verification(*at_cosines(scores), same)
    far = twentieths / 20
    best = 0.0
    for t in [2.0, *scores]:
        false_accepts = sum(s >= t for s, y in zip(scores, same, strict=True) if not y)
        if false_accepts <= twentieths:
            best = max(best, sum(s >= t for s, y in zip(scores, same, strict=True) if y) / 20)
    assert result.tar_at(far) == best


def test_tar_at_a_rate_the_negatives_cannot_show_is_refused():
    e1, e2, same = noisy_pairs(600)
    result = verification(e1, e2, same)
    assert 0 <= result.tar_at(1 / 300) <= result.tar_at(0.29) <= result.tar_at(1) == 1
    with pytest.raises(ValueError, match="300 negatives"):
        result.tar_at(1e-3)
    for far in (0, -1, 1.5, float("nan")):
        with pytest.raises(ValueError, match="must lie in"):
            result.tar_at(far)


def insightface_rule(e1, e2, same, folds):
    """The rule as its script states it, one pair and one threshold at a time."""

    def unit(e):
        return [x / sum(v * v for v in x) ** 0.5 for x in e]

    pairs = zip(unit(e1), unit(e2), strict=True)
    distance = [sum((x - y) ** 2 for x, y in zip(a, b, strict=True)) for a, b in pairs]
    size, accuracies, chosen, correct = len(same) // folds, [], [], []
    for f in range(folds):
        test = range(f * size, (f + 1) * size)
        best, best_t = -1, None
        for step in range(400):
            t = step * 0.01
            hits = sum((distance[i] < t) == same[i] for i in range(len(same)) if i not in test)
            if hits > best:
                best, best_t = hits, t
        decisions = [(distance[i] < best_t) == same[i] for i in test]
        accuracies.append(sum(decisions) / size)
        chosen.append(best_t)
        correct += decisions
    return accuracies, chosen, correct


def test_insightface_mode_matches_a_literal_loop_of_its_rule():
    e1, e2, same = noisy_pairs(60, dim=4, noise=0.8, seed=3)
    result = verification(e1, e2, same, folds=5, compat="insightface")
    accuracies, chosen, correct = insightface_rule(e1, e2, same, 5)
    assert result.accuracy == pytest.approx(np.mean(accuracies))
    assert result.std == pytest.approx(np.std(accuracies))
    assert result.threshold == pytest.approx(np.mean(chosen))
    assert result.correct.tolist() == correct
    assert result.best_accuracy == verification(e1, e2, same, folds=5).best_accuracy


def test_insightface_mode_is_strict_and_takes_the_first_maximum():
    # Distances 0 (same) and 2 (not): any grid point in (0, 2] is perfect, and 0 < 0 is false.
    e1 = np.tile([1.0, 0.0], (8, 1))
    same = np.arange(8) % 2 == 0
    e2 = np.where(same[:, None], [1.0, 0.0], [0.0, 1.0])
    result = verification(e1, e2, same, folds=4, compat="insightface")
    assert result.accuracy == 1 and result.threshold == pytest.approx(0.01)


def test_exact_sweep_beats_the_grid_in_a_narrow_cone():
    rng = np.random.default_rng(0)
    same = np.arange(400) % 2 == 0
    axis = np.eye(16)[0]
    a = rng.normal(size=(400, 16))
    b = np.where(same[:, None], a + 0.3 * rng.normal(size=a.shape), rng.normal(size=a.shape))
    e1, e2 = axis + 0.005 * a, axis + 0.005 * b  # squared distances below .01, the grid's one step
    exact = verification(e1, e2, same)
    grid = verification(e1, e2, same, compat="insightface")
    assert exact.accuracy > 0.98
    assert grid.accuracy < 0.75


def test_folds_that_leave_one_class_to_train_on_are_refused():
    e1, e2, _ = noisy_pairs(10)
    with pytest.raises(ValueError, match="fold 0: the other folds hold negative pairs only"):
        verification(e1, e2, [1] * 5 + [0] * 5, folds=2)
    with pytest.raises(ValueError, match="fold 1: the other folds hold positive pairs only"):
        verification(e1, e2, [1] * 5 + [0] + [1] * 4, folds=2, compat="insightface")


def test_bad_input_is_refused_with_its_place():
    e1, e2, same = noisy_pairs(20)
    for value, words in ((np.nan, "NaN or infinity in 1 rows, first row 7"), (0, "norm zero")):
        bad = e1.copy()
        bad[7] = value
        with pytest.raises(ValueError, match=f"e1: .*{words}"):
            verification(bad, e2, same)
        with pytest.raises(ValueError, match=f"e2: .*{words}"):
            verification(e2, torch.tensor(bad), same)
    with pytest.raises(ValueError, match="same pairs"):
        verification(e1, e2[:19], same)
    with pytest.raises(ValueError, match="needs one a pair"):
        verification(e1, e2, same[:19])
    with pytest.raises(ValueError, match="one class"):
        verification(e1, e2, np.ones(20, dtype=bool))
    with pytest.raises(ValueError, match="other than 0 and 1"):
        verification(e1, e2, np.arange(20))
    with pytest.raises(ValueError, match="compat"):
        verification(e1, e2, same, compat="facenet")
    for folds in (1, 21):
        with pytest.raises(ValueError, match="folds="):
            verification(e1, e2, same, folds=folds)
    with pytest.raises(ValueError, match="needs embeddings"):
        verification(e1[0], e2[0], same)


def test_flip_sum_adds_before_it_normalises():
    e, e_flip = np.array([[3.0, 0.0], [1.0, 1.0]]), np.array([[0.0, 4.0], [1.0, 1.0]])
    expected = [[0.6, 0.8], [0.5**0.5, 0.5**0.5]]  # not the mean direction of two unit vectors
    assert np.allclose(flip_sum(e, e_flip), expected)
    out = flip_sum(torch.tensor(e).half(), torch.tensor(e_flip).half())
    assert isinstance(out, torch.Tensor) and out.dtype == torch.float32
    assert torch.allclose(out, torch.tensor(expected).float())
    with pytest.raises(ValueError, match="norm zero"):
        flip_sum(e, -e)
    with pytest.raises(ValueError, match="shapes differ"):
        flip_sum(e, e_flip[:1])


def test_histogram_statistics_by_hand():
    # Bins of width 1/2. Positives: [.5, 1] twice, [0, .5) once, [-.5, 0) once. Negatives: [0, .5)
    # once, [-.5, 0) once, [-1, -.5) twice. Shared: a quarter in each of two bins.
    scores = [0.5, 1.0, 0.25, -0.25, 0.0, -0.5, -1.0, -0.75]
    margin, overlap = histogram_statistics(scores, [1, 1, 1, 1, 0, 0, 0, 0], bins=4)
    assert margin == pytest.approx(1.5 / 4 - (-2.25 / 4))
    assert overlap == pytest.approx(0.5)


def test_histogram_overlap_is_one_for_equal_and_zero_for_separate_distributions():
    scores = np.random.default_rng(0).uniform(-1, 1, size=500)
    same = np.repeat([True, False], 500)
    assert histogram_statistics(np.tile(scores, 2), same) == (pytest.approx(0), pytest.approx(1))
    split = np.concatenate([np.abs(scores), -np.abs(scores)])
    assert histogram_statistics(split, same)[1] == 0
    with pytest.raises(ValueError, match="cosines"):
        histogram_statistics([2.0, 0.0], [True, False])


def test_the_grid_loses_whole_points_where_distances_are_small():
    # One overlap of positives and negatives, at its own size and with all distances x .01.
    rng = np.random.default_rng(0)
    same = np.arange(2000) % 2 == 0
    distance = rng.normal(np.where(same, 0.9, 1.6), 0.2)  # apart at 1.25; x .01 between two steps
    accuracy = {}
    for factor in (1, 0.01):
        pairs = at_cosines(1 - factor * distance / 2)  # |a - b|^2 = 2 - 2 cos
        accuracy[factor] = [
            verification(*pairs, same, compat=compat).accuracy for compat in (None, "insightface")
        ]
    assert accuracy[0.01][0] == pytest.approx(accuracy[1][0])  # the exact sweep does not mind
    assert accuracy[1][1] == pytest.approx(accuracy[1][0], abs=0.01)
    assert accuracy[1][0] > 0.95 and accuracy[0.01][1] < accuracy[0.01][0] - 0.1


def test_a_fold_of_one_class_is_scored_where_the_others_hold_both():
    e1, e2 = at_cosines([0.9, 0.8, 0.9, 0.1, 0.2, 0.9])
    result = verification(e1, e2, [1, 1, 1, 0, 0, 1], folds=3)
    assert result.accuracy == 1 and result.fold.tolist() == [0, 0, 1, 1, 2, 2]


def test_interval_is_by_pair_or_by_identity():
    e1, e2, same = noisy_pairs(600, dim=16, noise=1.5)
    result = verification(e1, e2, same)
    by_pair = result.interval()
    assert by_pair.mean == pytest.approx(result.accuracy)
    half = 1.96 * np.sqrt(result.accuracy * (1 - result.accuracy) / 600)
    assert by_pair.high - by_pair.low == pytest.approx(2 * half, rel=0.1)
    # Every pair ten times over is no more evidence when all ten are of one identity.
    again = verification(np.repeat(e1, 10, 0), np.repeat(e2, 10, 0), np.repeat(same, 10))
    by_identity = again.interval(np.repeat(np.arange(600), 10))
    assert by_identity.high - by_identity.low == pytest.approx(2 * half, rel=0.1)
    assert again.interval().high - again.interval().low < half


def test_two_models_on_the_same_pairs_are_compared_pair_by_pair():
    e1, e2, same = noisy_pairs(1000, dim=16, noise=1.2)
    blurred = e2.copy()
    blurred[::30] = np.random.default_rng(1).normal(size=blurred[::30].shape)  # positives
    good, bad = verification(e1, e2, same), verification(e1, blurred, same)
    difference, p = compare(good.correct, bad.correct)
    assert difference.mean == pytest.approx(good.accuracy - bad.accuracy)
    assert difference.low > 0 and p < 0.001
    assert bad.interval().high > good.interval().low  # apart, the two intervals do not show it

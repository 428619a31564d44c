import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from shared.evaluate import intervals
from shared.evaluate.intervals import (
    bootstrap,
    compare,
    holm,
    mean_interval,
    paired,
    paired_p,
    paired_seeds,
)


def test_bootstrap_of_two_items_is_the_exact_binomial():
    # Means of two draws from {0, 1}: 0, .5, 1 with 1/4, 1/2, 1/4: 95 % spans all, 40 % only .5.
    assert bootstrap([0, 1]) == intervals.Interval(0.5, 0.0, 1.0)
    assert bootstrap([0, 1], level=0.4) == intervals.Interval(0.5, 0.5, 0.5)


def test_bootstrap_has_the_spread_of_the_mean():
    x = np.random.default_rng(0).normal(size=400)
    interval = bootstrap(x, resamples=20_000)
    half = 1.96 * x.std() / 20
    assert interval.mean == pytest.approx(x.mean())
    assert interval.low == pytest.approx(x.mean() - half, abs=0.05 * half)
    assert interval.high == pytest.approx(x.mean() + half, abs=0.05 * half)


def test_bootstrap_covers_the_true_mean_about_as_often_as_it_says():
    rng = np.random.default_rng(1)
    covered = 0
    for trial in range(400):
        interval = bootstrap(rng.normal(3.0, 2.0, size=50), resamples=400, seed=trial)
        covered += interval.low <= 3.0 <= interval.high
    assert 0.88 <= covered / 400 <= 0.98


def test_cluster_bootstrap_covers_where_the_item_bootstrap_does_not():
    rng = np.random.default_rng(2)
    covered = np.zeros(2)
    for trial in range(200):
        groups = np.repeat(np.arange(30), rng.integers(2, 9, size=30))
        values = rng.normal(size=30)[groups] + 0.3 * rng.normal(size=len(groups))
        for way, by in enumerate((None, groups)):
            interval = bootstrap(values, by, resamples=300, seed=trial)
            covered[way] += interval.low <= 0 <= interval.high
    by_item, by_group = covered / 200
    assert by_group >= 0.86 and by_item <= 0.75


def test_cluster_mean_is_a_ratio_of_sums():
    # Two groups: (1 item at 0) and (3 items at 1): drawn twice 0, mixed 3/4, drawn twice 1.
    interval = bootstrap([0, 1, 1, 1], ["a", "b", "b", "b"], level=0.4)
    assert interval == intervals.Interval(0.75, 0.75, 0.75)


def test_groups_of_one_item_equal_no_groups():
    x = np.random.default_rng(3).normal(size=40)
    assert bootstrap(x, np.arange(40)) == bootstrap(x)


def test_same_seed_same_interval_and_chunks_change_nothing(monkeypatch):
    x = np.random.default_rng(4).normal(size=(3, 50))
    groups = np.arange(50) % 11
    results = []
    for at_once in (intervals.DRAWS_AT_ONCE, 1100):
        monkeypatch.setattr(intervals, "DRAWS_AT_ONCE", at_once)
        results.append(bootstrap(x[0], groups))
    assert results[0] == results[1]
    assert paired_seeds(x, x[::-1], seed=5) == paired_seeds(x, x[::-1], seed=5)
    assert bootstrap(x[0], seed=1) != bootstrap(x[0], seed=2)


def test_paired_sees_what_two_separate_intervals_hide():
    rng = np.random.default_rng(5)
    difficulty = rng.normal(size=300)
    a, b = difficulty + 0.1 + 0.05 * rng.normal(size=300), difficulty
    interval = paired(a, torch.tensor(b))
    assert 0 < interval.low < interval.mean < interval.high
    assert bootstrap(a).low < bootstrap(b).high  # separately they overlap
    assert interval.mean == pytest.approx((a - b).mean())
    assert paired(np.array([True, False]), np.array([False, True])).mean == 0


def test_paired_p_matches_its_definition_on_two_items():
    # Differences 0 and 1: d = .5; d* - d is -.5, 0, .5 with 1/4, 1/2, 1/4, so half are as extreme.
    assert paired_p([0, 1], [0, 0], resamples=20_000) == pytest.approx(0.5, abs=0.02)


def test_paired_p_is_one_for_equal_models_and_never_zero():
    x = np.random.default_rng(6).normal(size=30)
    assert paired_p(x, x) == 1
    assert paired_p(x + 5, x, resamples=999) == 1 / 1000


def test_paired_p_is_about_uniform_under_the_null():
    rng = np.random.default_rng(7)
    ps = [
        paired_p(rng.normal(size=60), rng.normal(size=60), resamples=300, seed=i)
        for i in range(300)
    ]
    assert 0.02 <= np.mean(np.array(ps) <= 0.05) <= 0.10
    assert 0.4 <= np.mean(ps) <= 0.6


def test_two_way_bootstrap_matches_a_plain_loop():
    rng = np.random.default_rng(8)
    groups = rng.integers(0, 6, size=40)
    a = rng.normal(size=(4, 40)) + rng.normal(size=(4, 1))
    b = rng.normal(size=(4, 40))
    means = []
    for _ in range(3000):
        seeds, names = rng.integers(4, size=4), rng.choice(np.unique(groups), size=6)
        total = count = 0.0
        for g in names:
            items = np.flatnonzero(groups == g)
            for s in seeds:
                total += (a[s, items] - b[s, items]).sum()
                count += len(items)
        means.append(total / count)
    interval = paired_seeds(a, b, groups, resamples=20_000)
    width = interval.high - interval.low
    assert interval.mean == pytest.approx((a - b).mean())
    assert interval.low == pytest.approx(np.quantile(means, 0.025), abs=0.08 * width)
    assert interval.high == pytest.approx(np.quantile(means, 0.975), abs=0.08 * width)


def test_two_way_bootstrap_sees_seeds_and_items():
    rng = np.random.default_rng(9)
    only_seeds = np.repeat(rng.normal(size=(8, 1)), 100, axis=1)
    only_items = np.repeat(rng.normal(size=(1, 100)), 8, axis=0)
    zero = np.zeros((8, 100))
    for values, effects in ((only_seeds, only_seeds[:, 0]), (only_items, only_items[0])):
        interval = paired_seeds(values, zero, resamples=8000)
        alone = bootstrap(effects, resamples=8000)
        width = alone.high - alone.low
        assert interval.low == pytest.approx(alone.low, abs=0.08 * width)
        assert interval.high == pytest.approx(alone.high, abs=0.08 * width)


def test_mean_interval_is_student_t():
    x = [71.2, 70.8, 71.9, 71.4]
    interval = mean_interval(x)
    expected = stats.ttest_1samp(x, 0).confidence_interval(0.95)
    assert (interval.low, interval.high) == pytest.approx((expected.low, expected.high))
    # By hand: for 1, 2, 3 the mean is 2, s / sqrt(3) = .57735, t(.975, 2) = 4.30265.
    assert mean_interval([1, 2, 3]).high == pytest.approx(2 + 4.30265 * 0.57735, abs=1e-4)


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.9]) == pytest.approx([1.0, 1.0])


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
@settings(deadline=None)
def test_holm_rejects_as_the_step_down_procedure_does(p):
    adjusted = holm(p)
    assert (adjusted >= np.array(p)).all() and (adjusted <= 1).all()
    for alpha in (0.01, 0.05, 0.2):
        rejected = set()
        for step, i in enumerate(sorted(range(len(p)), key=lambda i: p[i])):
            if p[i] * (len(p) - step) > alpha:
                break
            rejected.add(i)
        assert {i for i in range(len(p)) if adjusted[i] <= alpha} == rejected


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: bootstrap([1.0]), "needs at least 2"),
        (lambda: bootstrap([1.0, 2.0], ["a", "a"]), "needs at least 2"),
        (lambda: bootstrap([1.0, np.nan]), "values: 1 NaN"),
        (lambda: bootstrap([]), "at least one value"),
        (lambda: bootstrap([[1.0, 2.0]]), "needs \\[N\\]"),
        (lambda: bootstrap([1.0, 2.0], [1]), "needs one group for each of 2 items"),
        (lambda: bootstrap([1.0, 2.0], level=95), "level=95"),
        (lambda: bootstrap([1.0, 2.0], resamples=0), "resamples=0"),
        (lambda: paired([1.0, 2.0], [1.0]), "same items"),
        (lambda: paired_seeds(np.ones((1, 4)), np.ones((1, 4))), "use paired"),
        (lambda: paired_seeds(np.ones(4), np.ones(4)), "needs \\[S, N\\]"),
        (lambda: mean_interval([1.0]), "at least 2 seeds"),
        (lambda: holm([1.5]), "must lie in"),
    ],
)
def test_bad_input_is_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_compare_of_hits_and_misses_is_mcnemar_by_hand():
    # One model alone is right 8 times, the other once: 2 (C(9,0) + C(9,1)) / 2^9.
    a = np.array([True] * 8 + [False] + [True] * 30 + [False] * 20)
    b = np.array([False] * 8 + [True] + [True] * 30 + [False] * 20)
    difference, p = compare(a, torch.tensor(b))
    assert p == pytest.approx(2 * (1 + 9) / 2**9)
    assert difference == paired(a, b) and difference.mean == pytest.approx(7 / 59)
    assert compare(b, a)[1] == p and compare(a, a)[1] == 1


def test_compare_of_groups_or_scores_is_the_paired_bootstrap():
    rng = np.random.default_rng(11)
    a, b, groups = rng.random(60) < 0.6, rng.random(60) < 0.5, np.arange(60) // 4
    assert compare(a, b, groups) == (paired(a, b, groups), paired_p(a, b, groups))
    x = rng.normal(size=60)
    assert compare(x, b, seed=3) == (paired(x, b, seed=3), paired_p(x, b, seed=3))
    with pytest.raises(ValueError, match="same items"):
        compare(a, b[:59])


def test_compare_of_one_identity_after_the_other_does_not_count_its_images_as_independent():
    # 40 images of the same two people decide all: by image certain, by identity nothing.
    groups = np.arange(400) // 20
    a, b = groups < 12, groups < 10
    assert compare(a, b)[1] < 1e-9 and compare(a, b, groups)[1] > 0.05

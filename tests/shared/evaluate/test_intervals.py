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
    compare_seeds,
    holm,
    kendall,
    mean_interval,
    paired,
    paired_p,
    paired_seeds,
    paired_seeds_p,
    ranks,
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


def two_way_means(values, groups, resamples, rng):
    """Plain loops: [resamples, K] means of values [K, S, N], one draw for all K."""
    people, seeds = np.unique(groups), values.shape[1]
    means = []
    for _ in range(resamples):
        drawn, names = rng.integers(seeds, size=seeds), rng.choice(people, size=len(people))
        items = np.concatenate([np.flatnonzero(groups == g) for g in names])
        means.append([np.mean([one[s, items] for s in drawn]) for one in values])
    return np.array(means)


def methods(seed=12):
    """[5, 3, 40] scores of methods that share people and seeds, and their groups."""
    rng = np.random.default_rng(seed)
    groups = rng.integers(0, 8, size=40)
    shared = rng.normal(size=8)[groups] + rng.normal(size=(3, 1))
    own = np.linspace(0, 0.6, 5)[:, None, None] + 0.8 * rng.normal(size=(5, 3, 40))
    return own + shared, groups


def test_p_over_seeds_matches_plain_loops():
    values, groups = methods()
    for k in range(1, 5):
        drawn = two_way_means(values[[k, 0]], groups, 1500, np.random.default_rng(k))
        d = (values[k] - values[0]).mean()
        expected = np.mean(np.abs(drawn[:, 0] - drawn[:, 1] - d) >= abs(d))
        p = paired_seeds_p(values[k], values[0], groups, resamples=5000)
        assert p == pytest.approx(expected, abs=0.04)


def test_interval_and_p_over_seeds_come_from_one_draw():
    values, groups = methods()
    both = compare_seeds(values[3], values[0], groups, seed=4)
    assert both == (
        paired_seeds(values[3], values[0], groups, seed=4),
        paired_seeds_p(values[3], values[0], groups, seed=4),
    )
    assert paired_seeds_p(values[1], values[1], groups) == 1
    assert paired_seeds_p(values[1] + 9, values[1], groups, resamples=999) == 1 / 1000


def test_over_seeds_the_truth_is_covered_and_the_null_rarely_rejected():
    # The truth is over new seeds and new people: 0 for the mean of both effects.
    rng = np.random.default_rng(13)
    groups, covered, rejected = np.repeat(np.arange(40), 3), 0, 0
    for trial in range(200):
        people, seeds = rng.normal(size=40)[groups], 0.15 * rng.normal(size=(8, 1))
        noise = 0.5 * rng.normal(size=(8, 120))
        interval, p = compare_seeds(people + seeds + noise, np.zeros((8, 120)), groups,
                                    resamples=400, seed=trial)  # fmt: skip
        covered += interval.low <= 0 <= interval.high
        rejected += p <= 0.05
    assert 0.89 <= covered / 200 <= 0.99 and 0.01 <= rejected / 200 <= 0.11


def test_ranks_match_plain_loops():
    values, groups = methods()
    found = ranks(values, groups, resamples=8000, level=0.8)
    drawn = two_way_means(values, groups, 1500, np.random.default_rng(0))
    means = values.mean(axis=(1, 2))
    for k, interval in enumerate(found):
        assert interval.mean == 1 + sum(m > means[k] for m in means)
        places = 1 + (drawn > drawn[:, [k]]).sum(axis=1)
        # a quantile of whole numbers may sit on an edge: it must be one of its neighbours'
        for share, bound in ((0.1, interval.low), (0.9, interval.high)):
            near = np.quantile(places, [share - 0.05, share + 0.05])
            assert near[0] <= bound <= near[1]


def test_equal_means_share_their_mean_rank():
    x = np.random.default_rng(14).random((3, 30)) < 0.5
    found = ranks(np.stack([x, x, x | True, x & False]))
    assert [one.mean for one in found] == [2.5, 2.5, 1, 4]
    assert all(one.low == one.mean == one.high for one in found)  # equal in every resample too


def test_what_methods_share_does_not_blur_their_ranks():
    # Seeds and people differ by far more than the two methods do, who are otherwise alike.
    rng = np.random.default_rng(15)
    shared = rng.normal(size=(6, 1)) + rng.normal(size=(1, 50))
    better, worse = ranks(np.stack([shared + 0.01, shared]))
    assert better == intervals.Interval(1, 1, 1) and worse == intervals.Interval(2, 2, 2)


def test_kendall_matches_plain_loops():
    values, groups = methods()
    reference = np.array([0.1, 0.5, 0.3, 0.5, 0.9])  # two of them tied
    found, p = kendall(values, groups, reference, resamples=8000, level=0.8)
    means = values.mean(axis=(1, 2))

    def tau_b(x, y):
        concordant = ties_x = ties_y = 0
        for i in range(len(x)):
            for j in range(i):
                concordant += np.sign(x[i] - x[j]) * np.sign(y[i] - y[j])
                ties_x += x[i] == x[j]
                ties_y += y[i] == y[j]
        pairs = len(x) * (len(x) - 1) / 2
        return concordant / np.sqrt((pairs - ties_x) * (pairs - ties_y))

    assert found.mean == pytest.approx(tau_b(means, reference))
    assert p == stats.kendalltau(means, reference).pvalue
    drawn = two_way_means(values, groups, 800, np.random.default_rng(1))
    taus = [tau_b(row, reference) for row in drawn]
    for share, bound in ((0.1, found.low), (0.9, found.high)):
        low, high = np.quantile(taus, [share - 0.06, share + 0.06])
        assert low - 1e-9 <= bound <= high + 1e-9


def test_kendall_is_one_for_the_same_order_and_minus_one_for_the_other():
    x = np.random.default_rng(16).random((4, 40)) < 0.5
    values = np.stack([x & False, x, x | True]) * 100.0
    assert kendall(values, None, [1, 2, 3])[0] == intervals.Interval(1, 1, 1)
    assert kendall(values, None, [3, 2, 1])[0] == intervals.Interval(-1, -1, -1)


def test_joint_resamples_of_a_whole_comparison_are_drawn_in_small_chunks(monkeypatch):
    monkeypatch.setattr(intervals, "DRAWS_AT_ONCE", 20_000)
    values = np.random.default_rng(17).random((40, 10, 2000)) < 0.5
    groups = np.arange(2000) // 2
    seen = []
    drawn = intervals._times

    def watched(*args):
        seen.append(drawn(*args).size)
        return drawn(*args)

    monkeypatch.setattr(intervals, "_times", watched)
    assert len(ranks(values, groups)) == 40
    assert max(seen) <= 20_000


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
        (lambda: ranks(np.ones((2, 4))), "needs \\[K, S, N\\]"),
        (lambda: ranks(np.ones((2, 1, 4))), "needs at least 2"),
        (lambda: kendall(np.ones((2, 2, 4)), None, [1.0]), "one for each of 2"),
        (lambda: kendall(np.ones((2, 2, 4)), None, [1.0, 2.0]), "nothing to order"),
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

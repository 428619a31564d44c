import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.evaluate import identify
from shared.evaluate.identify import closed_set, open_set, prototypes


def plane(cosines):
    """Vectors whose cosine with (1, 0) is as given."""
    c = np.asarray(cosines, dtype=float)
    return np.stack([c, np.sqrt(1 - c**2)], axis=-1)


PROBE = np.array([[1.0, 0.0]])


def cosine(a, b):
    return sum(x * y for x, y in zip(a, b, strict=True)) / np.sqrt((a @ a) * (b @ b))


def brute_force(probe, identity, gallery, ids):
    """Rank of the first mate, its score, average precision: ties go to the non-mate."""
    entries = [
        (round(cosine(probe, g), 9), i == identity) for g, i in zip(gallery, ids, strict=True)
    ]
    entries.sort(key=lambda e: (-e[0], e[1]))
    places = [n for n, (_, mate) in enumerate(entries, 1) if mate]
    precision = sum(found / place for found, place in enumerate(places, 1)) / len(places)
    return places[0], entries[places[0] - 1][0], precision


def small_world(seed, dim=2):
    """Vectors on a coarse integer lattice: many exactly equal directions, several mates."""
    rng = np.random.default_rng(seed)

    def vectors(n):
        v = rng.integers(-2, 3, size=(n, dim)).astype(float)
        return np.where(v.any(axis=1, keepdims=True), v, 1.0)

    gallery, gallery_ids = vectors(23), np.concatenate([np.arange(5), rng.integers(0, 9, 18)])
    return vectors(11), rng.integers(0, 5, 11), vectors(13), gallery, gallery_ids


@given(st.integers(0, 10_000), st.sampled_from([2, 3]))
@settings(max_examples=60, deadline=None)
def test_closed_set_matches_brute_force_with_ties_and_several_mates(seed, dim):
    probes, ids, _, gallery, gallery_ids = small_world(seed, dim)
    result = closed_set(probes, ids, gallery, gallery_ids, ranks=range(1, 24))
    truth = [brute_force(p, i, gallery, gallery_ids) for p, i in zip(probes, ids, strict=True)]
    rank = np.array([t[0] for t in truth])
    assert result.rank.tolist() == rank.tolist()
    assert np.allclose(result.average_precision, [t[2] for t in truth])
    assert result.map == pytest.approx(np.mean([t[2] for t in truth]))
    assert result.correct.tolist() == (rank == 1).tolist()
    assert result.cmc == {k: (rank <= k).mean() for k in range(1, 24)}
    values = list(result.cmc.values())
    assert values == sorted(values) and values[-1] == 1  # never decreasing, all found in the end


@given(st.integers(0, 10_000), st.sampled_from([1, 2, 5]))
@settings(max_examples=60, deadline=None)
def test_open_set_matches_brute_force_over_all_thresholds(seed, rank):
    mated, ids, unmated, gallery, gallery_ids = small_world(seed)
    targets = (1.0, 0.5, 3 / 13, 1 / 13, 0.01)
    result = open_set(mated, ids, unmated, gallery, gallery_ids, rank=rank, fpir=targets)
    truth = [brute_force(p, i, gallery, gallery_ids) for p, i in zip(mated, ids, strict=True)]
    maxima = [max(round(cosine(u, g), 9) for g in gallery) for u in unmated]

    def highest(target):
        best = 0.0
        for t in [2.0, *(s for _, s, _ in truth)]:
            if sum(m >= t for m in maxima) / 13 <= target + 1e-12:
                best = max(best, sum(r <= rank and s >= t for r, s, _ in truth) / 11)
        return best

    for target in targets[:-1]:
        assert result.tpir[target] == pytest.approx(highest(target))
    assert np.isnan(result.tpir[0.01]) and np.isnan(result.threshold[0.01])
    assert result.auc == pytest.approx(sum(highest(k / 13) for k in range(13)) / 13)
    assert np.allclose(result.unmated_score, maxima, atol=1e-8)
    assert np.allclose(result.score, [s for _, s, _ in truth], atol=1e-8)
    for target in targets[:-1]:  # the threshold reproduces both rates by their definitions
        t = result.threshold[target]
        assert (result.unmated_score >= t).mean() <= target
        found = ((result.rank <= rank) & (result.score >= t)).mean()
        assert found == pytest.approx(result.tpir[target])


def test_rank_and_average_precision_by_hand():
    # Order: other, mate, other, other, mate: first mate second; (1/2 + 2/5) / 2.
    result = closed_set(PROBE, [7], plane([0.9, 0.8, 0.7, 0.6, 0.5]), [1, 7, 2, 1, 7], ranks=(1, 2))
    assert result.rank.tolist() == [2]
    assert result.map == pytest.approx((1 / 2 + 2 / 5) / 2)
    assert result.cmc == {1: 0.0, 2: 1.0}


def test_a_tie_goes_to_the_non_mate():
    # Mates at .75 and .5, others at .75 and .5: places 2 and 4 in the worst order.
    gallery = plane([0.75, 0.75, 0.5, 0.5])
    result = closed_set(PROBE, [1], gallery, [1, 2, 1, 2])
    assert result.rank.tolist() == [2] and result.map == pytest.approx((1 / 2 + 2 / 4) / 2)


@pytest.mark.parametrize("seed", range(6))
def test_a_collapsed_network_finds_nothing(seed):
    # Equal directions of other lengths: unrounded cosines differ in the last bits on most seeds.
    rng = np.random.default_rng(seed)
    point = rng.normal(size=512)
    probes = np.tile(point, (37, 1))
    gallery = np.tile(point, (301, 1)) * rng.uniform(0.5, 2, size=(301, 1))
    result = closed_set(probes, np.arange(37), gallery, np.arange(301))
    assert (result.rank == 301).all() and result.cmc == {1: 0, 5: 0, 10: 0, 20: 0}


def test_mates_do_not_stand_in_each_others_way():
    result = closed_set(PROBE, ["a"], plane([0.9, 0.8, 0.7]), ["a", "a", "a"])
    assert result.map == 1 and result.rank.tolist() == [1]


@pytest.mark.parametrize(("probes", "gallery"), [(1, 1), (3, 4), (100, 100)])
def test_tiles_do_not_change_the_result_and_bound_the_memory(monkeypatch, probes, gallery):
    mated, ids, unmated, images, image_ids = small_world(5)
    whole = open_set(mated, ids, unmated, images, image_ids, fpir=(0.5,))
    closed = closed_set(mated, ids, images, image_ids)
    monkeypatch.setattr(identify, "PROBES", probes)
    monkeypatch.setattr(identify, "GALLERY", gallery)
    shapes = []
    rounded = identify._rounded
    monkeypatch.setattr(identify, "_rounded", lambda x: shapes.append(x.shape) or rounded(x))
    tiled = open_set(mated, ids, unmated, images, image_ids, fpir=(0.5,))
    assert tiled.tpir == whole.tpir and tiled.auc == whole.auc
    again = closed_set(mated, ids, images, image_ids)
    assert again.cmc == closed.cmc and again.map == closed.map
    tiles = [s for s in shapes if len(s) == 2]
    assert max(r for r, _ in tiles) <= probes and max(c for _, c in tiles) <= gallery


def test_open_set_by_hand():
    # Unmated maxima .9 .7 .5 .3 (the one direction each is nearest to), mates at .8 .7 .2.
    mated, gallery = np.eye(8)[:3], np.zeros((3, 8))
    for i, c in enumerate((0.8, 0.7, 0.2)):
        gallery[i, i], gallery[i, 7 - i] = c, np.sqrt(1 - c * c)
    unmated = np.zeros((4, 8))
    for i, c in enumerate((0.9, 0.7, 0.5, 0.3)):
        unmated[i] = c * gallery[0]
        unmated[i, 3] = np.sqrt(1 - c * c)
    targets = (1, 0.75, 0.5, 0.25, 0.2)
    result = open_set(mated, [0, 1, 2], unmated, gallery, [0, 1, 2], fpir=targets)
    assert np.allclose(result.unmated_score, [0.9, 0.7, 0.5, 0.3])
    expected = {
        1: 1.0,  # all admitted
        0.75: 2 / 3,  # above .3
        0.5: 2 / 3,  # above .5
        0.25: 1 / 3,  # above .7: the mate at .7 ties with the one that must stay out
    }
    assert {k: v for k, v in result.tpir.items() if k != 0.2} == pytest.approx(expected)
    assert np.isnan(result.tpir[0.2])  # 4 probes cannot show one in five
    assert result.threshold[0.5] == pytest.approx(0.5) and result.threshold[0.5] > 0.5
    assert result.threshold[1] == -np.inf
    # Steps of width 1/4: nothing above .9, then above .7, .5, .3.
    assert result.auc == pytest.approx((0 + 1 / 3 + 2 / 3 + 2 / 3) / 4)


def test_a_mate_beyond_the_rank_is_not_found():
    gallery = plane([0.9, 0.8, 0.7])
    unmated = [[0.0, -1.0]]
    for rank, tpir in ((2, 0.0), (3, 1.0)):
        result = open_set(PROBE, [3], unmated, gallery, [1, 2, 3], rank=rank, fpir=(1,))
        assert result.tpir == {1: tpir}


def test_tensors_give_the_same():
    mated, ids, unmated, gallery, gallery_ids = small_world(3)
    a = closed_set(mated, ids, gallery, gallery_ids)
    b = closed_set(
        torch.tensor(mated).bfloat16(),
        torch.tensor(ids),
        torch.tensor(gallery),
        gallery_ids.tolist(),
    )
    assert a.cmc == b.cmc and a.map == b.map
    assert open_set(mated, ids, torch.tensor(unmated), gallery, gallery_ids).auc == pytest.approx(
        open_set(mated, ids, unmated, gallery, gallery_ids).auc
    )


def test_a_probe_without_a_mate_is_open_set():
    with pytest.raises(ValueError, match="probes: 1 have no mate.* first row 1 .id 9"):
        closed_set(np.eye(2), [1, 9], np.eye(2), [1, 2])
    with pytest.raises(ValueError, match="mated: 1 have no mate"):
        open_set(np.eye(2), [1, 9], np.eye(2), np.eye(2), [1, 2])


def test_bad_input_is_refused():
    eye = np.eye(3)
    for bad, words in ((np.nan, "NaN"), (0.0, "norm zero")):
        broken = eye.copy()
        broken[1] = bad
        with pytest.raises(ValueError, match=f"gallery: .*{words}.* first row 1"):
            closed_set(eye, [0, 1, 2], broken, [0, 1, 2])
        with pytest.raises(ValueError, match=f"unmated: .*{words}"):
            open_set(eye, [0, 1, 2], broken, eye, [0, 1, 2])
    with pytest.raises(ValueError, match="dimensions differ"):
        closed_set(eye, [0, 1, 2], np.eye(4), range(4))
    with pytest.raises(ValueError, match="ids: shapes"):
        closed_set(eye, [0, 1], eye, [0, 1, 2])
    with pytest.raises(ValueError, match="both numbers or both strings"):
        closed_set(eye, [0, 1, 2], eye, ["0", "1", "2"])
    with pytest.raises(ValueError, match="rank"):
        closed_set(eye, [0, 1, 2], eye, [0, 1, 2], ranks=(0,))
    with pytest.raises(ValueError, match="rank"):
        open_set(eye, [0, 1, 2], eye, eye, [0, 1, 2], rank=0)
    with pytest.raises(ValueError, match="target"):
        open_set(eye, [0, 1, 2], eye, eye, [0, 1, 2], fpir=(0.0,))
    with pytest.raises(ValueError, match="unmated: shape"):
        open_set(eye, [0, 1, 2], np.zeros((0, 3)), eye, [0, 1, 2])


def test_intervals_are_by_probe_or_by_identity():
    rng = np.random.default_rng(0)
    centre, ids = rng.normal(size=(40, 16)), np.repeat(np.arange(40), 10)
    noise = rng.uniform(0.3, 2.5, size=40)[ids, None]  # people differ: their probes fail together
    probes, unmated = centre[ids] + noise * rng.normal(size=(400, 16)), rng.normal(size=(100, 16))
    closed = closed_set(probes, ids, centre, np.arange(40))
    opened = open_set(probes, ids, unmated, centre, np.arange(40), fpir=(0.3, 0.001))
    for interval, mean in (
        (closed.interval, closed.cmc[1]),
        (lambda groups=None: opened.interval(0.3, groups), opened.tpir[0.3]),
    ):
        by_probe, by_identity = interval(), interval(ids)
        assert by_probe.mean == by_identity.mean == pytest.approx(mean)
        half = 1.96 * np.sqrt(mean * (1 - mean) / 400)
        assert by_probe.high - by_probe.low == pytest.approx(2 * half, rel=0.1)
        assert by_identity.high - by_identity.low > 1.3 * (by_probe.high - by_probe.low)
    # 0.001 is finer than 100 unmated probes show; 0.2 was not asked for.
    for target in (0.001, 0.2):
        with pytest.raises(ValueError, match=f"fpir={target}: no TPIR at it, there are .0.3."):
            opened.interval(target)


@given(st.integers(0, 10_000), st.sampled_from([1, 2, 20]))
@settings(max_examples=25, deadline=None)
def test_btnet_mode_matches_a_literal_loop_of_its_rule(seed, rank):
    rng = np.random.default_rng(seed)
    gallery, ids = rng.normal(size=(12, 4)), np.arange(12) % 7
    mated_ids = rng.integers(0, 7, size=15)
    mated, unmated = gallery[mated_ids] + rng.normal(size=(15, 4)), rng.normal(size=(30, 4))
    targets = (0.3, 0.2, 0.1, 0.01)
    result = open_set(
        mated, mated_ids, unmated, gallery, ids, rank=rank, fpir=targets, compat="btnet"
    )

    known = [sorted(((cosine(p, g), i) for g, i in zip(gallery, ids, strict=True)), reverse=True)
             for p in mated]  # fmt: skip
    known = [row[:rank] for row in known]
    maxima = [max(cosine(u, g) for g in gallery) for u in unmated]
    low = min(min(s for row in known for s, _ in row), min(maxima))
    points = []
    for step in range(1000):
        t = low + (max(maxima) - low) * step / 999
        far = sum(m > t + 1e-12 for m in maxima) / 30
        hits = [
            any(i == own and s > t + 1e-12 for s, i in row)
            for row, own in zip(known, mated_ids, strict=True)
        ]
        points.append((t, sum(hits) / 15, far))
    for target in targets:
        t, tpir, _ = min(points, key=lambda p: abs(p[2] - target))
        assert result.tpir[target] == pytest.approx(tpir)
        assert result.threshold[target] == pytest.approx(t, abs=1e-9)
        assert result.found[target].mean() == pytest.approx(tpir)
    area = sum((a[1] + b[1]) / 2 * (a[2] - b[2]) for a, b in zip(points, points[1:], strict=False))
    assert result.auc == pytest.approx(area)
    with pytest.raises(ValueError, match="compat='btn'"):
        open_set(mated, mated_ids, unmated, gallery, ids, compat="btn")


def test_btnet_mode_may_overshoot_the_rate_that_the_exact_threshold_keeps():
    # Six in ten unmated probes tie: a rate of one half is not to be had, and .6 is nearer than 0.
    unmated = plane(np.repeat([0.7, 0.2], [60, 40]))
    exact = open_set(PROBE, [1], unmated, PROBE, [1], fpir=(0.5,))
    steps = open_set(PROBE, [1], unmated, PROBE, [1], fpir=(0.5,), compat="btnet")
    assert (exact.unmated_score >= exact.threshold[0.5]).mean() == 0
    assert (steps.unmated_score > steps.threshold[0.5]).mean() == pytest.approx(0.6)


def test_btnet_mode_does_not_find_a_mate_that_equals_the_threshold():
    # The mate and the highest unmated maximum score 1: the last step, where the rate is 0.
    unmated = np.concatenate([PROBE, plane(np.full(9, 0.5))])
    steps = open_set(PROBE, [1], unmated, PROBE, [1], fpir=(0.01, 0.2), compat="btnet")
    assert steps.threshold[0.01] == steps.score[0] == 1
    assert steps.tpir == {0.01: 0, 0.2: 1}


def test_prototypes_are_means_of_raw_embeddings_and_then_unit():
    rng = np.random.default_rng(0)
    x, ids = rng.normal(size=(30, 5)).astype(np.float32), rng.integers(3, 9, size=30)
    found, known = prototypes(torch.tensor(x), torch.tensor(ids))
    assert known.tolist() == sorted(set(ids.tolist())) and found.dtype == np.float32
    for row, i in zip(found, known, strict=True):
        mean = sum(v.astype(float) for v, own in zip(x, ids, strict=True) if own == i)
        mean = mean / (ids == i).sum()
        assert np.allclose(row, mean / np.sqrt((mean**2).sum()), atol=1e-6)
    found, known = prototypes([[3.0, 0.0], [0.0, 1.0], [0.0, 2.0]], ["b", "b", "a"])
    assert known.tolist() == ["a", "b"]
    assert np.allclose(found, [[0, 1], [3 / 10**0.5, 1 / 10**0.5]])  # the longer one weighs more
    with pytest.raises(ValueError, match="prototypes: 1 rows of norm zero, first row 0"):
        prototypes([[1.0, 0.0], [-1.0, 0.0]], [4, 4])
    with pytest.raises(ValueError, match="ids: shape"):
        prototypes(np.eye(3), [1, 2])

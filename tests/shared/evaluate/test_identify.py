import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.evaluate import identify
from shared.evaluate.identify import closed_set, open_set


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

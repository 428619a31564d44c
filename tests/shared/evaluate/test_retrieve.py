import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.evaluate import retrieve
from shared.evaluate.intervals import compare
from shared.evaluate.retrieve import recall_at_k
from tests.conftest import python


def small_world(seed, n=40, dim=2):
    """Vectors on a coarse lattice (many ties and duplicates), classes of one to six images."""
    rng = np.random.default_rng(seed)
    x = rng.integers(-2, 3, size=(n, dim)).astype(float)
    labels = np.repeat(np.arange(n), rng.integers(1, 7, size=n))[:n]
    return np.where(x.any(axis=1, keepdims=True), x, 1.0), rng.permutation(labels)


def cosine(a, b):
    return sum(x * y for x, y in zip(a, b, strict=True)) / np.sqrt((a @ a) * (b @ b))


def closeness(a, b):
    return -np.sqrt(sum((x - y) ** 2 for x, y in zip(a, b, strict=True)))


def brute_force(x, labels, ks, score):
    """The definitions over whole rankings, in the order in which ties go against the query."""
    recall, r_precision, average = dict.fromkeys(ks, 0), [], []
    for i in range(len(x)):
        others = [j for j in range(len(x)) if j != i]
        entries = [(round(score(x[i], x[j]), 9), labels[j] == labels[i]) for j in others]
        relevant = [mate for _, mate in sorted(entries, key=lambda e: (-e[0], e[1]))]
        for k in ks:
            recall[k] += any(relevant[:k])
        r = sum(relevant)
        if r:
            r_precision.append(sum(relevant[:r]) / r)
            precisions = [sum(relevant[: n + 1]) / (n + 1) for n in range(r)]
            average.append(sum(precisions[n] for n in range(r) if relevant[n]) / r)
        else:
            average.append(np.nan)
    return {k: v / len(x) for k, v in recall.items()}, np.mean(r_precision), average


@given(st.integers(0, 10_000), st.sampled_from([2, 3]), st.sampled_from(["cosine", "euclidean"]))
@settings(max_examples=25, deadline=None)
def test_every_number_matches_brute_force_with_ties_duplicates_and_lone_images(seed, dim, metric):
    x, labels = small_world(seed, dim=dim)
    ks = (1, 2, 3, 50)  # lists of 3 + 5 or fewer of the 40 decide all but the last
    score = cosine if metric == "cosine" else closeness
    for chosen in (ks[:3], ks):
        result = recall_at_k(x, labels, chosen, metric=metric)
        recall, r_precision, average = brute_force(x, labels, chosen, score)
        assert result.recall == pytest.approx(recall)
        assert result.r_precision == pytest.approx(r_precision)
        assert np.allclose(result.average_precision, average, equal_nan=True)
        assert result.map_at_r == pytest.approx(np.nanmean(average))
        assert result.correct.mean() == pytest.approx(recall[1])


@given(st.integers(0, 10_000))
@settings(max_examples=15, deadline=None)
def test_ordinary_float32_embeddings_match_brute_force(seed):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 12, size=60)
    x = (rng.normal(size=(12, 8))[labels] + rng.normal(size=(60, 8))).astype(np.float32)
    result = recall_at_k(torch.tensor(x), torch.tensor(labels), (1, 2, 4, 8, 16))
    recall, r_precision, average = brute_force(x.astype(float), labels, (1, 2, 4, 8, 16), cosine)
    assert result.recall == pytest.approx(recall)
    assert result.r_precision == pytest.approx(r_precision)
    assert result.map_at_r == pytest.approx(np.nanmean(average))


def test_numbers_by_hand():
    # Query 0 (angle 0), class a: a at 10, b at 20, a at 30, b at 40, a at 50 degrees. R = 3: a b a
    # among the first three: AP at R is (1/1 + 2/3) / 3; the mate at place 5 is past R.
    angle = np.radians([0, 10, 20, 30, 40, 50])
    x = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    result = recall_at_k(x, list("aababa"), (1, 5))
    assert result.average_precision[0] == pytest.approx((1 + 2 / 3) / 3)
    # Image 2 (b): a at 10 and 30 on either side, then a at 0, and b at 40 ties with that a: missed.
    assert result.average_precision[2] == 0 and not result.correct[2]
    assert result.recall[5] == 1


def test_the_query_is_left_out_by_index_and_its_duplicate_stays():
    # 0 and 1 are one picture in two classes, 0 and 2 mates. A search that drops "the nearest", or
    # all at distance 0, would find 2 first.
    x = np.array([[1.0, 0.0], [1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.1, 0.9]])
    for order in (np.arange(5), np.array([1, 0, 2, 3, 4])):
        labels = np.array([0, 1, 0, 2, 2])[order]
        result = recall_at_k(x, labels)
        at = {int(i): r for i, r in zip(order, result.correct, strict=True)}
        assert at == {0: False, 1: False, 2: False, 3: True, 4: True}
        assert result.recall[2] == 4 / 5  # 0 and 2 find each other behind the duplicate
    same_class = recall_at_k(x[:3], [0, 0, 1])
    assert same_class.correct.tolist() == [True, True, False]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("lengths", [1.0, np.linspace(0.5, 2, 90)[:, None]])
def test_a_collapsed_network_finds_nothing(dtype, lengths):
    point = np.random.default_rng(0).normal(size=64)
    x = (np.tile(point, (90, 1)) * lengths).astype(dtype)
    result = recall_at_k(x, np.arange(90) // 3, (1, 2, 4, 50, 87, 88))
    # Two mates behind 87 others: place 88 is the first.
    assert result.recall == {1: 0, 2: 0, 4: 0, 50: 0, 87: 0, 88: 1}
    assert result.r_precision == result.map_at_r == 0


def test_a_collapsed_network_finds_no_mate_where_classes_are_pairs():
    for ks in ((1,), (2, 18), (19,)):  # lists as short as K allows, and whole
        result = recall_at_k(np.ones((20, 3)), np.arange(20) // 2, ks)
        assert result.recall == {k: float(k == 19) for k in ks} and result.map_at_r == 0


def test_a_narrow_cone_is_not_a_tie():
    # Cosines 1 - 5e-9 and 1 - 6e-9, both 1 in float32.
    angle = np.array([0, 1e-4, -1.1e-4, 2.2e-4])
    x = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    assert recall_at_k(x, [0, 0, 1, 1]).correct.tolist() == [True, True, False, False]
    assert recall_at_k(x, [0, 1, 0, 1]).correct.tolist() == [False, False, True, True]


def test_an_image_without_mate_is_missed_by_recall_and_left_out_of_the_rest():
    x = np.eye(4)[[0, 0, 1, 1, 2]]
    result = recall_at_k(x, ["a", "a", "b", "b", "c"], (1, 100))
    assert result.recall == {1: 4 / 5, 100: 4 / 5}
    assert result.r_precision == result.map_at_r == 1
    assert np.isnan(result.average_precision[4]) and not result.correct[4]


def test_blocks_of_queries_change_nothing(monkeypatch):
    x, labels = small_world(3)
    whole = recall_at_k(x, labels, (1, 2, 4))
    for numbers in (1, 100, 777):
        monkeypatch.setattr(retrieve, "NUMBERS", numbers)
        calls = []
        search = retrieve.topk_search

        def spy(q, g, k, *, metric, calls=calls, search=search):
            calls.append((len(q), k))
            return search(q, g, k, metric=metric)

        monkeypatch.setattr(retrieve, "topk_search", spy)
        again = recall_at_k(x, labels, (1, 2, 4))
        monkeypatch.setattr(retrieve, "topk_search", search)
        assert again.recall == whole.recall and again.map_at_r == whole.map_at_r
        assert np.array_equal(again.average_precision, whole.average_precision, equal_nan=True)
        assert all(rows == 1 or rows * k <= numbers for rows, k in calls)


def test_metrics_agree_on_unit_rows_and_differ_otherwise():
    rng = np.random.default_rng(0)
    labels = np.arange(200) % 20
    x = rng.normal(size=(20, 6))[labels] + 0.8 * rng.normal(size=(200, 6))
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    a, b = recall_at_k(x, labels), recall_at_k(unit, labels, metric="euclidean")
    assert a.recall == b.recall and a.map_at_r == pytest.approx(b.map_at_r)
    stretched = x * rng.uniform(0.2, 5, size=(200, 1))
    assert recall_at_k(stretched, labels).recall == a.recall  # cosine: length means nothing
    assert recall_at_k(stretched, labels, metric="euclidean").recall[1] < a.recall[1]
    zero = recall_at_k([[0.0], [0.1], [1.0], [1.1]], [0, 0, 1, 1], metric="euclidean")
    assert zero.recall[1] == 1  # a row of zeros is a point like any other


def test_extreme_scales_neither_overflow_nor_vanish():
    rng = np.random.default_rng(0)
    labels = np.arange(60) // 3
    x = rng.normal(size=(20, 8))[labels] + 0.7 * rng.normal(size=(60, 8))
    plain = recall_at_k(x, labels)
    for scale in (1e-300, 1e300, np.where(np.arange(60) % 2, 1e-200, 1e200)[:, None]):
        assert recall_at_k(x * scale, labels).map_at_r == pytest.approx(plain.map_at_r)


def test_nmi_is_one_for_clusters_that_are_the_classes_and_zero_for_independent_ones():
    rng = np.random.default_rng(0)
    where = np.arange(60) % 3
    x = 10 * np.eye(3)[where] + 0.01 * rng.normal(size=(60, 3))
    assert recall_at_k(x, where).nmi is None
    assert recall_at_k(x, where, nmi=True).nmi == pytest.approx(1)
    # 20 images of each class in every cluster's 20: as many of each pair, nothing in common.
    x = np.eye(3)[np.arange(63) % 3] + 0.01 * rng.normal(size=(63, 3))
    assert recall_at_k(x, np.arange(63) // 3 % 3, nmi=True).nmi == pytest.approx(0, abs=1e-9)


def test_interval_is_by_query_or_by_class():
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(40), 10)
    hard = rng.uniform(0.2, 3, size=40)[labels, None]  # classes differ: their queries fail together
    x = rng.normal(size=(40, 16))[labels] + hard * rng.normal(size=(400, 16))
    result = recall_at_k(x, labels)
    by_query, by_class = result.interval(), result.interval(labels)
    assert by_query.mean == by_class.mean == pytest.approx(result.recall[1])
    assert by_class.high - by_class.low > 1.3 * (by_query.high - by_query.low)
    better = recall_at_k(x + 2 * rng.normal(size=(40, 16))[labels], labels)
    difference, p = compare(better.correct, result.correct, labels)
    assert difference.low > 0 and p < 0.01


def test_bad_input_is_refused():
    x = np.eye(4)
    with pytest.raises(ValueError, match="labels: shape .3,., needs one for each of 4"):
        recall_at_k(x, [0, 0, 1])
    with pytest.raises(ValueError, match="4 classes of one image each"):
        recall_at_k(x, range(4))
    with pytest.raises(ValueError, match="each at least 1"):
        recall_at_k(x, [0, 0, 1, 1], (0, 1))
    with pytest.raises(ValueError, match="at least one K"):
        recall_at_k(x, [0, 0, 1, 1], ())
    with pytest.raises(ValueError, match="metric='l1'"):
        recall_at_k(x, [0, 0, 1, 1], metric="l1")
    for metric in ("cosine", "euclidean"):
        with pytest.raises(ValueError, match="embeddings: NaN or infinity in 1 rows, first row 2"):
            bad = x.copy()
            bad[2] = np.inf
            recall_at_k(bad, [0, 0, 1, 1], metric=metric)
    with pytest.raises(ValueError, match="norm zero"):
        recall_at_k(np.zeros((4, 2)), [0, 0, 1, 1])


SOP = """
import json, resource, numpy as np, torch
from shared.evaluate.retrieve import recall_at_k

def resident():  # the most that the process has held, in bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

torch.manual_seed(0)
labels = torch.arange(60_502) % 11_316  # five or six images a class
x = torch.empty(60_502, 512)
centre = torch.randn(11_316, 512)
for rows in torch.arange(60_502).split(4096):
    images = centre[labels[rows]] + 2.5 * torch.randn(len(rows), 512)
    x[rows] = torch.nn.functional.normalize(images)
recall_at_k(x[:200], labels[:200] // 2)  # compiled loops are loaded
before = resident()
result = recall_at_k(x, labels, (1, 10, 100, 1000))
score = lambda i: np.delete((x[i] @ x.T).numpy(), i)
mates = lambda i: np.delete((labels == labels[i]).numpy(), i)
hits = lambda i: bool(mates(i)[score(i).argmax()])
checked = list(range(0, 60_502, 607))
agree = [hits(i) == bool(result.correct[i]) for i in checked]
recall = result.recall[1], result.recall[1000]
print(json.dumps([resident() - before, *recall, sum(agree), len(agree)]))
"""


@pytest.mark.slow
def test_the_size_of_sop_stays_far_below_two_gib():
    done = python("-c", SOP)
    assert done.returncode == 0, done.stderr
    extra, first, thousandth, agree, checked = json.loads(done.stdout)
    assert extra < 2**29  # 60,502 x 60,502 in float32 would be 13.6 GiB, and the limit is 2 GiB
    assert 0.2 < first < 0.6 < thousandth and agree == checked

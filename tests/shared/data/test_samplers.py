"""P x K batches, counted class by class and image by image."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.data.samplers import HalfLabelled, PKSampler


@st.composite
def samplers(draw):
    """(labels, P, K) of which at least one batch can be made."""
    counts = draw(st.lists(st.integers(1, 12), min_size=2, max_size=20))
    p = draw(st.integers(1, len(counts)))
    k = draw(st.integers(1, 5))
    counts[0] += max(0, p * k - sum(counts))
    labels = np.repeat(np.arange(len(counts)), counts)
    return np.random.default_rng(draw(st.integers(0, 99))).permutation(labels), p, k


def batches(labels, p, k, epoch):
    return PKSampler(labels, p, k, seed=3).order(epoch).view(-1, p * k).tolist()


@given(samplers(), st.integers(0, 5))
@settings(deadline=None, derandomize=True, max_examples=150)
def test_every_batch_is_p_distinct_classes_of_k_images(case, epoch):
    labels, p, k = case
    found = batches(labels, p, k, epoch)
    assert len(found) == len(labels) // (p * k)
    sizes = Counter(labels.tolist())
    for batch in found:
        groups = [batch[g * k : (g + 1) * k] for g in range(p)]
        classes = [{int(labels[i]) for i in group} for group in groups]
        assert all(len(c) == 1 for c in classes) and len(set.union(*classes)) == p
        for group, (c,) in zip(groups, classes, strict=True):
            times = Counter(group).values()  # repeated only where the class is too small
            assert len(times) == min(k, sizes[c]) and max(times) - min(times) <= 1


@given(samplers(), st.integers(0, 5))
@settings(deadline=None, derandomize=True, max_examples=150)
def test_an_epoch_visits_classes_evenly_and_no_image_again_before_its_whole_class(case, epoch):
    labels, p, k = case
    order = PKSampler(labels, p, k, seed=3).order(epoch)
    visits = Counter({int(c): 0 for c in labels})
    visits.update(labels[order[::k].numpy()].tolist())
    assert max(visits.values()) - min(visits.values()) <= 1
    for c in set(labels.tolist()):
        size = int((labels == c).sum())
        own = [i for i in order.tolist() if labels[i] == c]
        for n, image in enumerate(own):
            assert image not in own[max(0, n - size + 1) : n]


@given(samplers(), st.integers(0, 9), st.integers(0, 9))
@settings(deadline=None, derandomize=True, max_examples=50)
def test_an_epoch_is_a_function_of_seed_and_number(case, seed, epoch):
    labels, p, k = case
    sampler = PKSampler(labels, p, k, seed=seed)
    first = sampler.order(epoch)
    sampler.order(epoch + 1)
    assert torch.equal(sampler.order(epoch), first)
    assert torch.equal(PKSampler(torch.tensor(labels), p, k, seed=seed).order(epoch), first)
    assert first.dtype == torch.int64 and len(first) == sampler.steps * p * k


def test_seeds_and_epochs_give_other_orders():
    labels = np.arange(400) % 20
    orders = [
        tuple(PKSampler(labels, 4, 4, seed=s).order(e).tolist()) for s in (0, 1) for e in (0, 1)
    ]
    assert len(set(orders)) == 4


@given(samplers(), st.integers(0, 9))
@settings(deadline=None, derandomize=True, max_examples=50)
def test_gaps_in_the_numbering_of_labels_change_nothing(case, epoch):
    labels, p, k = case
    steps = np.random.default_rng(0).integers(1, 10**9, labels.max() + 1)
    gapped = (np.cumsum(steps) - 10**9)[labels]
    assert batches(gapped, p, k, epoch) == batches(labels, p, k, epoch)


def test_pairs_of_classes_meet_as_often_as_chance_has_it():
    labels = np.arange(600) % 6
    sampler = PKSampler(labels, 4, 2, seed=0)
    met = torch.zeros(6, 6)
    for epoch in range(20):
        for batch in sampler.order(epoch).view(-1, 8):
            classes = torch.as_tensor(labels[batch[::2]])
            met[classes[:, None], classes] += 1
    steps = 20 * sampler.steps
    assert torch.equal(met.diagonal(), met.diagonal().mean().expand(6))  # 4 of 6 in each
    expected = steps * (4 * 3) / (6 * 5)
    away = met[~torch.eye(6, dtype=torch.bool)] - expected
    # By chance alone a pair's count has a deviation of sqrt(steps * .4 * .6), here 19.
    assert away.abs().max() < 4 * (steps * 0.24) ** 0.5


def test_over_the_epochs_every_image_of_a_large_class_is_seen():
    labels = np.repeat([0, 1, 2, 3], [400, 8, 8, 8])
    sampler = PKSampler(labels, 2, 4, seed=0)
    seen = set(torch.cat([sampler.order(e) for e in range(40)]).tolist())
    assert seen == set(range(424)) and sampler.small == 0


def test_small_classes_are_counted_and_told_of():
    few = PKSampler(np.repeat([5, 7, 9], [1, 3, 8]), 2, 4, seed=0)
    assert few.small == 2 and few.size == 8
    assert few.note == (
        "2 of 3 classes have fewer than 4 images: theirs are repeated within a batch"
    )
    assert PKSampler(np.arange(40) % 4, 2, 4, seed=0).note == ""


@pytest.mark.parametrize(
    ("labels", "p", "k", "words"),
    [
        (np.arange(12) % 3, 4, 2, "3 classes do not fill a batch of P = 4"),
        (np.arange(12) % 6, 4, 4, "12 images do not fill a batch of 4 x 4"),
        (np.arange(12) % 6, 0, 2, "P is 0 and K 2"),
        (np.arange(12) % 6, 2, 0, "P is 2 and K 0"),
        (np.ones((4, 4), int), 1, 2, "labels must be whole numbers"),
        (np.ones(4), 1, 2, "labels must be whole numbers"),
        (np.array([], int), 1, 1, "0 classes"),
    ],
)
def test_what_cannot_be_sampled_is_refused(labels, p, k, words):
    with pytest.raises(ValueError, match=words):
        PKSampler(labels, p, k, seed=0)


@pytest.mark.slow
def test_five_million_labels_are_sampled_within_the_budget_of_this_file():
    labels = torch.randint(93431, (5_179_510,), generator=torch.Generator().manual_seed(0))
    sampler = PKSampler(labels, 32, 4, seed=0)
    order = sampler.order(7).view(sampler.steps, 32, 4)
    classes = labels[order]
    assert (classes == classes[:, :, :1]).all()
    assert (classes[:, :, 0].sort(dim=1).values.diff(dim=1) > 0).all()
    visits = classes[:, :, 0].flatten().bincount(minlength=93431)
    assert visits.max() - visits.min() <= 1


# -- some labelled, others not -------------------------------------------------------------------


@st.composite
def halves(draw):
    """(labels, labelled, P, K, unlabelled) of which at least one batch can be made."""
    labels, p, k = draw(samplers())
    more = draw(st.integers(1, 30))
    both = np.concatenate([labels, np.full(more, -1)])
    known = np.arange(len(both)) < len(labels)
    order = np.random.default_rng(draw(st.integers(0, 99))).permutation(len(both))
    return both[order], known[order], p, k, draw(st.integers(0, more))


@given(halves(), st.integers(0, 5))
@settings(deadline=None, derandomize=True, max_examples=100)
def test_a_batch_is_pk_labelled_images_then_others_each_once_a_cycle(case, epoch):
    labels, known, p, k, count = case
    sampler = HalfLabelled(labels, known, p, k, unlabelled=count, seed=3)
    assert sampler.labelled == p * k and sampler.size == p * k + count
    assert sampler.steps == known.sum() // (p * k)
    order = sampler.order(epoch).view(sampler.steps, sampler.size)
    numbers = np.flatnonzero(known)
    pairs = PKSampler(labels[known], p, k, seed=3)
    assert torch.equal(order[:, : p * k].flatten(), torch.tensor(numbers)[pairs.order(epoch)])
    others = order[:, p * k :].flatten().tolist()
    assert not known[others].any() and sampler.note == pairs.note
    for batch in order[:, p * k :].tolist():
        assert len(set(batch)) == count
    cycle = int((~known).sum())
    for n in range(0, len(others), cycle):  # every image of a cycle once, in one order
        assert len(set(others[n : n + cycle])) == len(others[n : n + cycle])
        assert others[n : n + cycle] == others[: min(cycle, len(others) - n)]
    assert torch.equal(sampler.order(epoch).view(order.shape), order)


@given(halves(), st.integers(0, 5))
@settings(deadline=None, derandomize=True, max_examples=50)
def test_without_labelled_images_batches_are_of_the_others_alone(case, epoch):
    labels, known, _, k, count = case
    if not count:
        return
    sampler = HalfLabelled(labels, known, 0, k, unlabelled=count, seed=3)
    assert sampler.steps == (~known).sum() // count and sampler.size == count
    order = sampler.order(epoch).tolist()
    assert len(set(order)) == len(order) == sampler.steps * count
    assert not known[order].any() and sampler.note == ""


def test_unlabelled_images_change_with_seed_and_epoch_and_follow_no_labelled_order():
    labels, known = np.arange(200) % 10, np.arange(200) % 2 == 0
    orders = [
        tuple(HalfLabelled(labels, known, 2, 5, unlabelled=10, seed=s).order(e).tolist())
        for s in (0, 1) for e in (0, 1)
    ]  # fmt: skip
    assert len(set(orders)) == 4
    shuffled = torch.randperm(100, generator=torch.Generator().manual_seed(0))
    sampler = HalfLabelled(labels, known, 2, 5, unlabelled=10, seed=0)
    first = sampler.order(0).view(-1, 20)[:, 10:].flatten()
    assert not torch.equal(first, 1 + 2 * shuffled)


@pytest.mark.parametrize(
    ("known", "p", "unlabelled", "words"),
    [
        (np.arange(12) < 6, 2, 7, "6 unlabelled images do not give 7 for a batch"),
        (np.arange(12) < 6, 2, -1, "do not give -1"),
        (np.arange(12) < 6, 0, 0, "nothing fills a batch"),
        (np.arange(12) < 6, 4, 2, "3 classes do not fill a batch of P = 4"),
        (np.arange(12), 2, 2, "labelled must be true or false for each of 12 images"),
        (np.ones(11, bool), 2, 0, r"each of 12 images, not torch.bool \[11\]"),
    ],
)
def test_halves_that_cannot_be_sampled_are_refused(known, p, unlabelled, words):
    with pytest.raises(ValueError, match=words):
        HalfLabelled(np.arange(12) % 3, known, p, 2, unlabelled=unlabelled, seed=0)

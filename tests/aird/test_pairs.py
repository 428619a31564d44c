"""Pair selection against brute force, and its cache against damage."""

from __future__ import annotations

import itertools
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aird import pairs
from aird.config import Config
from aird.pairs import Pairs, check, choose_pool, hardest, offline
from shared.data.kept import Rows

CPU = torch.device("cpu")


def people(count: int, dim: int, classes: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Embeddings [N, D] float32 around a centre for each identity, and labels [N]."""
    g = np.random.default_rng(seed)
    labels = g.integers(classes, size=count)
    labels[:classes] = np.arange(classes)  # nobody is missing
    e = g.normal(size=(classes, dim))[labels] + 0.7 * g.normal(size=(count, dim))
    return e.astype(np.float32), labels.astype(np.int64)


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    a, b = a.astype(float), b.astype(float)
    return float(a @ b / np.sqrt((a @ a) * (b @ b)))


def selected(e: np.ndarray, y: np.ndarray, n: int, folder: Path, size: int = 10**9) -> Pairs:
    """What `offline` makes of embeddings and labels."""
    pool = choose_pool(y, size, seed=0)
    rows = hardest(e, y, pool, n, folder, CPU, lambda _: None)
    return Pairs(torch.from_numpy(e[pool]), torch.from_numpy(y[pool]), e, rows, n)


def read(rows: Rows) -> np.ndarray:
    number = torch.arange(rows.count)
    return rows.read(torch.zeros_like(number), number).numpy()


# -- the pool ------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(3, 60), st.integers(1, 8), st.integers(1, 70), st.integers(0, 5))
def test_pool_visits_every_identity_before_any_a_second_time(
    count: int, classes: int, size: int, seed: int
) -> None:
    _, y = people(max(count, classes), 2, classes, seed)
    pool = choose_pool(y, size, seed=seed)
    assert len(set(pool.tolist())) == len(pool) == min(size, len(y))
    assert sorted(pool.tolist(), key=lambda i: (y[i], i)) == pool.tolist()
    inside, total = np.bincount(y[pool], minlength=classes), np.bincount(y, minlength=classes)
    for a in range(classes):  # who has an image left has no two fewer than another
        assert inside[a] == total[a] or inside[a] >= inside.max() - 1


def test_pool_depends_on_the_seed_only() -> None:
    _, y = people(200, 2, 20)
    assert np.array_equal(choose_pool(y, 50, seed=1), choose_pool(y, 50, seed=1))
    assert not np.array_equal(choose_pool(y, 50, seed=1), choose_pool(y, 50, seed=2))
    assert np.array_equal(np.sort(choose_pool(y, 200, seed=1)), np.arange(200))


def test_a_pool_with_too_few_other_people_is_refused() -> None:
    y = np.array([0] * 7 + [1, 1, 2])
    everyone = np.arange(10)
    check(y, everyone, 3)
    with pytest.raises(
        ValueError, match="pool of 10 .* has 3 of other people than 0, and 4 .*lower"
    ):
        check(y, everyone, 4)
    with pytest.raises(ValueError, match="raise --pool or lower --n"):
        check(y, everyone[:9], 4)
    with pytest.raises(ValueError, match="has 0 of other people than 0 and 1, and 1"):
        check(np.array([0, 1, 0]), np.arange(3), 1, apart=2)


# -- negatives -----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [40, 1000])
def test_negatives_are_the_hardest_of_other_people_as_by_brute_force(
    tmp_path: Path, monkeypatch, size: int
) -> None:
    monkeypatch.setattr(pairs, "BLOCK", 37)
    e, y = people(150, 6, 12)
    found = selected(e, y, 9, tmp_path, size)
    bank, classes = found.bank.numpy(), found.classes.numpy()
    for image, row in enumerate(read(found.negatives)):
        others = sorted((cosine(e[image], b) for b, c in zip(bank, classes, strict=True)
                         if c != y[image]), reverse=True)  # fmt: skip
        assert (classes[row] != y[image]).all() and len(set(row.tolist())) == 9
        ours = [cosine(e[image], bank[k]) for k in row]
        np.testing.assert_allclose(ours, others[:9], atol=1e-6)


@pytest.mark.parametrize(
    ("size", "dtype"), [(100, torch.uint8), (256, torch.uint8), (257, torch.int16)]
)
def test_negatives_take_the_smallest_type(tmp_path: Path, size: int, dtype: torch.dtype) -> None:
    e, y = people(300, 3, 100)
    rows = selected(e, y, 4, tmp_path, size).negatives
    assert rows.dtype == dtype and rows.path.stat().st_size == 300 * 4 * dtype.itemsize
    assert read(rows).min() >= 0 and read(rows).max() < size


class Interrupted(Exception):
    pass


def test_an_interrupted_search_goes_on_where_it_stopped(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(pairs, "BLOCK", 20)
    e, y = people(100, 5, 10)
    written: list[int] = []
    write = Rows.write

    def noted(self, view: int, part: int, rows: torch.Tensor) -> None:
        if len(written) == 3:
            written.clear()
            raise Interrupted
        written.append(part)
        write(self, view, part, rows)

    monkeypatch.setattr(Rows, "write", noted)
    with pytest.raises(Interrupted):
        selected(e, y, 6, tmp_path)
    selected(e, y, 6, tmp_path)
    assert written == [3, 4]
    written.clear()
    whole = selected(e, y, 6, tmp_path)
    assert written == []
    other = tmp_path / "other"
    with pytest.raises(Interrupted):
        selected(e, y, 6, other)
    assert np.array_equal(read(whole.negatives), read(selected(e, y, 6, other).negatives))


@pytest.mark.parametrize("harm", ["byte", "cut", "emptied", "sums", "gone"])
def test_a_damaged_cache_is_made_again(tmp_path: Path, monkeypatch, harm: str) -> None:
    monkeypatch.setattr(pairs, "BLOCK", 20)
    e, y = people(100, 5, 10)
    rows = selected(e, y, 6, tmp_path).negatives
    content = rows.path.read_bytes()
    if harm == "byte":
        rows.path.write_bytes(content[:250] + bytes([content[250] ^ 1]) + content[251:])
    elif harm == "cut":
        rows.path.write_bytes(content[:250])
    elif harm == "emptied":
        rows.path.write_bytes(b"")
    elif harm == "sums":
        rows.sums.write_bytes(b"x" + rows.sums.read_bytes()[1:20])
    else:
        rows.path.unlink()
    said: list[str] = []
    pool = choose_pool(y, 100, seed=0)
    again = hardest(e, y, pool, 6, tmp_path, CPU, said.append)
    assert again.path == rows.path and again.path.read_bytes() == content
    assert np.array_equal(read(again), np.frombuffer(content, np.uint8).reshape(100, 6))
    assert "damaged" in said[0] and len(said) == 2


def test_whatever_decides_the_negatives_decides_their_file(tmp_path: Path) -> None:
    e, y = people(60, 5, 6)
    pool = choose_pool(y, 50, seed=0)
    moved, named = e.copy(), y.copy()
    moved[7, 2] += 1e-3
    named[30] = (named[30] + 1) % 6
    variants = [
        (e, y, pool, 5), (moved, y, pool, 5), (e, named, pool, 5), (e, y, pool[1:], 5),
        (e, y, pool, 6),
    ]  # fmt: skip
    paths = {hardest(*v, tmp_path, CPU, lambda _: None).path for v in variants}
    assert len(paths) == len(variants)
    assert hardest(*variants[0], tmp_path, CPU, lambda _: None).path in paths


def test_an_embedding_that_is_not_finite_is_named(tmp_path: Path) -> None:
    e, y = people(60, 5, 6)
    e[41, 3] = np.nan
    pool = choose_pool(y, 60, seed=0)
    with pytest.raises(ValueError, match="training image 41 is not finite"):
        hardest(e, y, pool[pool != 41], 5, tmp_path, CPU, lambda _: None)


# -- the draws of a step -------------------------------------------------------------------------


def partner(j: int, index: list[int], e: np.ndarray, y: np.ndarray) -> int | None:
    """Image number of the first in j's offline order, hardest first, that is in the batch."""
    own = [i for i in range(len(y)) if y[i] == y[index[j]] and i != index[j]]
    own.sort(key=lambda i: (round(cosine(e[index[j]], e[i]), 9), i))
    return next((i for i in own if i in index), None)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.data())
def test_partner_is_the_first_of_the_offline_order_that_is_in_the_batch(data) -> None:
    e, y = people(40, 4, 7, seed=3)
    e[20:] = e[:20]  # equal embeddings: ties go by image number
    y[20:] = y[:20]
    batch = data.draw(st.lists(st.integers(0, 39), min_size=2, max_size=16))
    index = torch.tensor(batch)
    rows = _Fixed(np.arange(40 * 3).reshape(40, 3) % 39)
    chosen = Pairs(torch.from_numpy(e), torch.arange(40), e, rows, 3)
    i, k, paired = chosen.draw(index, torch.from_numpy(y)[index], torch.Generator())
    for j in range(len(batch)):
        expected = partner(j, batch, e, y)
        assert paired[j] == (expected is not None)
        if expected is None:
            assert i[j] == j
        else:
            assert batch[i[j]] == expected
        assert torch.equal(k[j], torch.from_numpy(rows.rows[batch[i[j]]]))


class _Fixed:
    """Negatives that tell whose they are."""

    def __init__(self, rows: np.ndarray) -> None:
        self.rows = rows

    def read(self, view: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        assert (view == 0).all()
        return torch.from_numpy(self.rows)[index]


def test_negatives_of_a_step_are_those_of_the_partner_and_of_other_people(tmp_path: Path) -> None:
    e, y = people(120, 6, 10)
    chosen = selected(e, y, 8, tmp_path, 70)
    index = torch.from_numpy(np.random.default_rng(1).permutation(120)[:24])
    i, k, paired = chosen.draw(index, torch.from_numpy(y)[index], torch.Generator())
    assert paired.sum() > 12 and k.dtype == torch.int64 and k.shape == (24, 8)
    kept = read(chosen.negatives)
    for j in range(24):
        assert (k[j].numpy() == kept[index[i[j]]]).all()
        assert (chosen.classes[k[j]] != y[index[j]]).all()


def test_a_copy_of_the_same_image_is_no_partner() -> None:
    e, y = people(12, 4, 3)
    y[:] = [0, 1] + [2] * 10
    index = torch.tensor([0, 0, 1, 5, 6, 5])
    chosen = Pairs(torch.from_numpy(e), torch.arange(12), e, _Fixed(np.zeros((12, 2), int)), 2)
    i, _, paired = chosen.draw(index, torch.from_numpy(y)[index], torch.Generator())
    assert paired.tolist() == [False, False, False, True, True, True]
    assert i.tolist()[:3] == [0, 1, 2] and i[3] == i[5] == 4


def random_pairs(classes: list[int], n: int) -> Pairs:
    bank = torch.zeros(len(classes), 2)
    return Pairs(bank, torch.tensor(sorted(classes)), bank.numpy(), None, n)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.data())
def test_random_pairs_leave_nobody_with_himself_or_his_own_people(data) -> None:
    classes = data.draw(st.lists(st.integers(0, 4), min_size=6, max_size=30))
    classes += [0, 1, 2, 3, 4]
    chosen = random_pairs(classes, 40)
    size = data.draw(st.integers(2, 12))
    draws = st.lists(st.integers(0, 4), min_size=size, max_size=size)
    y, index = torch.tensor(data.draw(draws)), torch.tensor(data.draw(draws))
    i, k, paired = chosen.draw(index, y, torch.Generator().manual_seed(1))
    assert sorted(i.tolist()) == list(range(size)) and (i != torch.arange(size)).all()
    assert torch.equal(paired, index[i] != index)
    shown = chosen.classes[k]
    assert k.min() >= 0 and (shown != y[:, None]).all() and (shown != y[i][:, None]).all()


def test_random_negatives_are_drawn_evenly() -> None:
    chosen = random_pairs([0] * 5 + [1] * 3 + [2] * 4 + [3] * 6, 20_000)
    y = torch.tensor([1, 3])  # partners of each other: rows 0-4 and 8-11 are left
    _, k, _ = chosen.draw(torch.tensor([7, 8]), y, torch.Generator().manual_seed(0))
    counts = torch.bincount(k.flatten(), minlength=18)
    left = [*range(5), *range(8, 12)]
    assert counts.nonzero().flatten().tolist() == left
    expected = 40_000 / 9
    assert sum((counts[p].item() - expected) ** 2 / expected for p in left) < 32  # 99.99 %, 8 d.f.


def test_random_pairs_are_keyed_by_the_generator() -> None:
    chosen = random_pairs([0, 1, 2, 3] * 5, 6)
    y = index = torch.arange(4)
    one, two, other = (
        chosen.draw(index, y, torch.Generator().manual_seed(seed)) for seed in (3, 3, 4)
    )
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    assert not torch.equal(one[1], other[1])


# -- as a run calls it ---------------------------------------------------------------------------


def stub(e: np.ndarray, y: np.ndarray) -> tuple:
    """A run, a teacher and a loader, of what `offline` asks them for."""
    run = SimpleNamespace(device=CPU, say=lambda _: None, in_turn=lambda make: make())
    images = SimpleNamespace(labels=torch.from_numpy(y))
    return run, SimpleNamespace(embeddings=lambda: e), SimpleNamespace(images=images)


@pytest.mark.parametrize("sampling", ["preselected", "random"])
def test_offline_makes_the_pairs_that_the_configuration_asks_for(tmp_path: Path, sampling) -> None:
    e, y = people(80, 5, 8)
    e[17] = 0  # an image that could not be decoded
    config = Config(n=6, pool=60, sampling=sampling, cache=str(tmp_path))
    found = offline(*stub(e, y), config)
    assert found.bank.shape == (60, 5) and (found.bank.abs().sum(1) > 0).all()
    assert (found.negatives is None) == (sampling == "random")
    index = torch.arange(20)
    _, k, _ = found.draw(index, torch.from_numpy(y)[index], torch.Generator().manual_seed(0))
    assert k.shape == (20, 6) and (found.classes[k] != torch.from_numpy(y)[index, None]).all()
    assert [a <= b for a, b in itertools.pairwise(found.classes.tolist())].count(False) == 0


@pytest.mark.parametrize("sampling", ["preselected", "random"])
def test_offline_refuses_what_it_cannot_use(tmp_path: Path, sampling: str) -> None:
    config = Config(n=6, pool=60, sampling=sampling, cache=str(tmp_path))
    e, y = people(80, 5, 8)
    with pytest.raises(ValueError, match="the pool of 60"):
        offline(*stub(e, y % 2 if sampling == "random" else y * 0), config)
    e[:] = np.inf
    with pytest.raises(ValueError, match="is not finite"):
        offline(*stub(e, y), config)

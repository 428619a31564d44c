from __future__ import annotations

import errno
import hashlib
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from shared.data import portrait, procedural
from shared.data.procedural import Faces, gallery_probes, native, pairs, render, split

SMALL = Faces(size=32)


def paired(identities: list[int], instances: int) -> tuple[np.ndarray, np.ndarray]:
    return np.repeat(identities, instances), np.tile(np.arange(instances), len(identities))


# determinism: an image depends on its parameters, its identity and its instance, nothing else


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("size", [33, 64])
def test_image_alone_equals_image_in_a_batch(size: int, shifted: bool) -> None:
    faces = Faces(size=size)
    who, which = paired([3, 2_000_000, 17], 19)  # more than one chunk an identity
    together = render(faces, who, which, shifted=shifted)
    for i in (0, 5, 15, 16, 18, 19, 40, 56):
        alone = render(faces, [who[i]], [which[i]], shifted=shifted)
        assert np.array_equal(alone[0], together[i])


def test_order_and_workers_do_not_change_a_bit() -> None:
    who, which = paired([0, 1, 2, 3], 5)
    expected = render(SMALL, who, which)
    order = np.random.default_rng(0).permutation(len(who))
    assert np.array_equal(render(SMALL, who[order], which[order]), expected[order])
    for workers in (1, 2):
        assert np.array_equal(render(SMALL, who, which, workers=workers), expected)


@pytest.fixture
def restore_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_thread_count_changes_no_bit_and_is_left_alone(restore_threads: None) -> None:
    who, which = paired([5, 6], 16)
    images = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        images.append(render(Faces(), who, which, shifted=True))
        assert torch.get_num_threads() == threads
    assert np.array_equal(*images)


def test_callers_random_states_and_default_dtype_do_not_matter() -> None:
    states = torch.get_rng_state(), np.random.get_state()[1].copy()
    expected = render(SMALL, [1], [1])
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.array_equal(np.random.get_state()[1], states[1])
    torch.set_default_dtype(torch.float64)
    try:
        portrait.stage.cache_clear()
        assert np.array_equal(render(SMALL, [1], [1]), expected)
    finally:
        torch.set_default_dtype(torch.float32)


def test_another_process_draws_the_same_bits() -> None:
    code = (
        "import hashlib; from shared.data.procedural import *;"
        "print(hashlib.sha256(render(Faces(size=32), [4, 9], [0, 3]).tobytes()).hexdigest())"
    )
    here = hashlib.sha256(render(SMALL, [4, 9], [0, 3]).tobytes()).hexdigest()
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert there.stdout.strip() == here


def test_seed_identity_instance_and_conditions_all_change_the_image() -> None:
    base = render(SMALL, [1], [1])
    others = [
        render(Faces(size=32, seed=1), [1], [1]),
        render(SMALL, [2], [1]),
        render(SMALL, [1], [2]),
        render(SMALL, [1], [1], shifted=True),
    ]
    for other in others:
        assert np.abs(base.astype(int) - other).mean() > 2


@pytest.mark.parametrize("size", [16, 17, 47, 112])
def test_every_size_gives_a_picture(size: int) -> None:
    images = render(Faces(size=size), [0, 1], [0, 0])
    assert images.shape == (2, 3, size, size) and images.dtype == np.uint8
    assert images.std() > 20


def test_the_same_face_at_two_sizes_is_the_same_picture() -> None:
    """Details scale with the picture: 112 reduced to 56 looks like 56."""
    who, which = paired(list(range(6)), 2)
    large = torch.from_numpy(render(Faces(size=112), who, which)).float()
    small = render(Faces(size=56), who, which)
    reduced = F.interpolate(large, size=56, mode="bicubic", antialias=True).numpy()
    like = np.abs(reduced - small).mean()
    unlike = np.abs(reduced - np.roll(small, 2, axis=0)).mean()
    assert like < 0.25 * unlike


# what the knobs do


def still(faces: Faces, identities: list[int]) -> np.ndarray:
    """Canvases [N, 3, A, A] of identities: no instance's pose, light, scene or noise."""
    people = [portrait._person(faces, identity) for identity in identities]
    return np.stack([person.looks[1, :3].numpy() * 255 for person in people])


def test_coarse_0_and_fine_0_leave_one_face() -> None:
    one = still(Faces(coarse=0, fine=0), [0, 1, 2])
    assert np.array_equal(one[0], one[1]) and np.array_equal(one[0], one[2])
    assert not np.array_equal(*still(Faces(coarse=0), [0, 1]))
    assert not np.array_equal(*still(Faces(fine=0), [0, 1]))


@pytest.mark.parametrize("knob", ["coarse", "fine"])
def test_a_knob_widens_only_its_own_numbers(knob: str) -> None:
    names = {
        "coarse": (*portrait._COARSE, *portrait._COARSE_U),
        "fine": (*portrait._FINE, *portrait._FINE_U),
    }
    other = "fine" if knob == "coarse" else "coarse"
    spread = []
    for value in (0.0, 0.5, 1.0):
        drawn = [portrait._numbers(Faces(**{knob: value}), i) for i in range(40)]
        spread.append([np.ptp([getattr(p, n) for p in drawn]) for n in names[knob]])
        fixed = [[getattr(p, n) for n in names[other]] for p in drawn]
        assert fixed == [
            [getattr(portrait._numbers(Faces(), i), n) for n in names[other]] for i in range(40)
        ]
    assert np.all(np.array(spread[0]) == 0)
    assert np.all(np.array(spread[0]) < spread[1]) and np.all(np.array(spread[1]) < spread[2])


def test_fine_details_vanish_at_16_and_coarse_ones_stay() -> None:
    """Contrast kept by 64 -> 16 where only the fine, or only the coarse numbers differ."""

    def kept(faces: Faces) -> float:
        images = torch.from_numpy(still(faces, list(range(24)))).float()
        images = images - images.mean(0)
        small = F.interpolate(images, size=20, mode="bicubic", antialias=True)  # 80 -> 20
        return float(small.pow(2).mean() / images.pow(2).mean())

    fine, coarse = kept(Faces(coarse=0)), kept(Faces(fine=0))
    assert fine < 0.45 and coarse > 0.75 and coarse > 2 * fine


def test_two_instances_differ_in_pose_but_identity_is_closer_than_strangers() -> None:
    who, which = paired(list(range(30)), 4)
    x = render(SMALL, who, which).astype(np.float32)
    x = x - x.mean((2, 3), keepdims=True)
    x = x.reshape(len(x), -1)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    s = x @ x.T
    same = (who[:, None] == who) & ~np.eye(len(who), dtype=bool)
    assert s[same].mean() > s[who[:, None] != who].mean() + 0.02
    assert s[same].max() < 0.999


def test_skin_is_never_green() -> None:
    """Skin has red > green > blue, from the lightest to the darkest."""
    stage = portrait.stage(64)
    tones = [portrait._Painter(stage, portrait._numbers(Faces(), i)).skin for i in range(200)]
    assert all(red > green > blue for red, green, blue in tones)
    brightness = [tone.mean() for tone in tones]
    assert min(brightness) < 0.35 and max(brightness) > 0.82


# splits and the cache


def test_splits_are_ordered_and_disjoint(tmp_path: Path) -> None:
    seen: dict[bytes, str] = {}
    for name in ("train", "development", "test", "shifted"):
        pixels, labels = split(SMALL, name, 5, 3, cache=tmp_path, progress=False)
        assert pixels.shape == (15, 3, 32, 32) and pixels.dtype == np.uint8
        assert labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3, 4, 4, 4]
        assert labels.dtype == np.int64
        with pytest.raises(ValueError):
            pixels[0] = 0
        for image in pixels:
            assert image.tobytes() not in seen
            seen[image.tobytes()] = name
    offsets = procedural.FIRST
    assert offsets["shifted"] == offsets["test"]
    starts = sorted({*offsets.values(), procedural.NATIVE_FIRST})
    assert min(np.diff(starts)) >= procedural.RANGE


def test_split_equals_render(tmp_path: Path) -> None:
    pixels, _ = split(SMALL, "shifted", 3, 2, cache=tmp_path, progress=False)
    who, which = paired([2_000_000, 2_000_001, 2_000_002], 2)
    assert np.array_equal(pixels, render(SMALL, who, which, shifted=True))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("train", 0, 3), "identities is 0"),
        (("train", 1_000_001, 3), "identities is 1000001; give 1 to 1000000"),
        (("train", 3, 0), "instances is 0"),
        (("validation", 3, 3), "train, development, test, shifted"),
    ],
)
def test_bad_split_is_refused(tmp_path: Path, arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        split(SMALL, *arguments, cache=tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("field", [dict(size=15), dict(size=113), dict(seed=-1), dict(fine=-0.1)])
def test_bad_parameters_are_refused(field: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(field))):
        Faces(**field)


def test_unpaired_lists_are_refused() -> None:
    with pytest.raises(ValueError, match="paired"):
        render(SMALL, [1, 2], [0])
    with pytest.raises(ValueError, match="negative"):
        render(SMALL, [-1], [0])
    assert render(SMALL, [], []).shape == (0, 3, 32, 32)


def test_cache_is_drawn_once_for_each_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    draw = procedural.render
    monkeypatch.setattr(procedural, "render", lambda *a, **k: calls.append(0) or draw(*a, **k))

    def ask(faces: Faces = SMALL, name: str = "train", identities: int = 2, instances: int = 2):
        return split(faces, name, identities, instances, cache=tmp_path, progress=False)  # type: ignore[arg-type]

    ask()
    ask()
    assert len(calls) == 1
    ask(Faces(size=32, seed=1))
    ask(Faces(size=32, coarse=0.5))
    ask(Faces(size=32, fine=0.5))
    ask(Faces(size=33))
    ask(name="test")
    ask(identities=3)
    ask(instances=3)
    monkeypatch.setattr(procedural, "VERSION", procedural.VERSION + 1)
    ask()
    assert len(calls) == 9
    assert len(list(tmp_path.glob("*.npy"))) == 9
    description = json.loads(next(tmp_path.glob("*.json")).read_text())
    assert {"size", "seed", "coarse", "fine", "version", "split"} <= set(description["parameters"])


@pytest.mark.parametrize("damage", ["cut", "flip", "empty", "no description", "bad description"])
def test_damaged_cache_is_drawn_again(
    tmp_path: Path, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = np.array(split(SMALL, "train", 2, 2, cache=tmp_path, progress=False)[0])
    (path,) = tmp_path.glob("*.npy")
    (sidecar,) = tmp_path.glob("*.json")
    content = bytearray(path.read_bytes())
    if damage == "cut":
        path.write_bytes(content[:-100])
    elif damage == "flip":
        content[500] ^= 1
        path.write_bytes(content)
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "no description":
        sidecar.unlink()
    else:
        sidecar.write_text('{"bytes": ')
    again, _ = split(SMALL, "train", 2, 2, cache=tmp_path, progress=False)
    assert np.array_equal(again, expected)
    message = capsys.readouterr().err.strip()
    assert path.name in message and len(message.splitlines()) == 1
    split(SMALL, "train", 2, 2, cache=tmp_path, progress=False)
    assert not capsys.readouterr().err


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()]
)
def test_a_broken_run_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(procedural, "render", broken)
    with pytest.raises(type(error)) as caught:
        split(SMALL, "train", 2, 2, cache=tmp_path, progress=False)
    assert not list(tmp_path.iterdir())
    if isinstance(error, OSError):
        assert str(tmp_path) in str(caught.value) and "No space" in str(caught.value)


def test_two_at_once_do_not_harm_each_other(tmp_path: Path) -> None:
    got: list[np.ndarray] = []

    def ask() -> None:
        got.append(split(SMALL, "train", 4, 4, cache=tmp_path, progress=False)[0])

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(got) == 3 and all(np.array_equal(g, got[0]) for g in got)
    assert sorted(p.suffix for p in tmp_path.iterdir()) == [".json", ".npy"]


# native sizes


def test_native_sizes_are_those_of_survface(tmp_path: Path) -> None:
    data = native(SMALL, 40, 60, 5, cache=tmp_path, progress=False)
    shapes = np.array([i.shape for i in data.images])
    assert len(shapes) == 40 * 5 + 60 and set(shapes[:, 0]) == {3}
    assert shapes[:, 1:].min() >= 6 and shapes[:, 1:].max() <= 60
    assert len(np.unique(shapes, axis=0)) > 60
    width, height = shapes[:, 2].mean(), shapes[:, 1].mean()
    assert 18 < width < 22 and 22 < height < 26  # 24/20 in height/width: BTNet, Sec. 4.1
    assert all(i.dtype == np.uint8 for i in data.images)

    assert {r: int((data.role == r).sum()) for r in ("gallery", "mated", "unmated")} == {
        "gallery": 120, "mated": 80, "unmated": 60,
    }  # fmt: skip
    assert set(data.ids[data.role == "gallery"]) == set(data.ids[data.role == "mated"])
    assert np.array_equal(data.ids == -1, data.role == "unmated")
    again = native(SMALL, 40, 60, 5, cache=tmp_path, progress=False)
    assert all(np.array_equal(a, b) for a, b in zip(data.images, again.images, strict=True))


def test_native_size_of_one_picture_does_not_depend_on_the_others(tmp_path: Path) -> None:
    few = native(SMALL, 2, 0, 3, cache=tmp_path, progress=False)
    more = native(SMALL, 3, 1, 3, cache=tmp_path, progress=False)
    assert all(np.array_equal(a, b) for a, b in zip(few.images, more.images[:6], strict=True))
    with pytest.raises(ValueError, match="per_identity is 1"):
        native(SMALL, 2, 0, 1, cache=tmp_path)
    with pytest.raises(ValueError, match="unmated"):
        native(SMALL, 10, 1_000_000, 2, cache=tmp_path)


# protocols


@pytest.mark.parametrize(("identities", "instances", "count"), [(100, 6, 600), (300, 6, 6000)])
def test_pairs_are_balanced_disjoint_and_unique(
    identities: int, instances: int, count: int
) -> None:
    labels = np.random.default_rng(1).permutation(np.repeat(np.arange(identities), instances))
    first, second, same = pairs(labels, count=count)
    assert len(first) == len(second) == len(same) == count and same.dtype == bool
    assert np.array_equal(labels[first] == labels[second], same) and np.all(first != second)
    assert len({frozenset(p) for p in zip(first.tolist(), second.tolist(), strict=True)}) == count
    folds = [
        set(labels[first[s]]) | set(labels[second[s]]) for s in np.arange(count).reshape(10, -1)
    ]
    assert sum(map(len, folds)) == len(set().union(*folds))
    assert np.all(same.reshape(10, -1).sum(1) == count // 20)
    assert all(
        np.array_equal(a, b)
        for a, b in zip(pairs(labels, count), pairs(labels, count), strict=True)
    )
    assert not np.array_equal(pairs(labels, count, seed=1)[0], first)


@pytest.mark.parametrize(
    ("labels", "count", "message"),
    [
        ([0, 0, 1, 1], 6000, "fold 1 of 10 needs 300"),
        (np.arange(1000), 20, "0 same"),
        ([0] * 40, 20, "0 different"),
        ([0, 1], 25, "multiple"),
    ],
)
def test_impossible_pairs_are_refused(labels: list[int], count: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pairs(labels, count=count)


def test_gallery_is_the_first_image_of_everybody() -> None:
    gallery, probes = gallery_probes([4, 4, 2, 4, 2, 9])
    assert gallery.tolist() == [0, 2, 5] and probes.tolist() == [1, 3, 4]


# command line


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    start = [sys.executable, "-W", "error::RuntimeWarning", "-m", "shared.data.procedural"]
    return subprocess.run([*start, *arguments], capture_output=True, text=True, check=False)


def test_sheet_is_written_as_png(tmp_path: Path) -> None:
    out = tmp_path / "sheet.png"
    done = command("--sheet", str(out), "--size", "32", "--identities", "2", "--instances", "3")
    assert done.returncode == 0 and not done.stderr
    content = out.read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = (int.from_bytes(content[i : i + 4], "big") for i in (16, 20))
    assert (width, height) == (2 * 3 * 32, 2 * 32)


@pytest.mark.parametrize(
    "bad",
    [["--size", "8"], ["--lr", "0"], ["--identities", "x"], ["--split", "no"], ["--seed", "-1"]],
)
def test_bad_command_line_ends_with_2_and_one_line(
    tmp_path: Path, bad: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        procedural.main(["--sheet", str(tmp_path / "sheet.png"), *bad])
    assert ended.value.code == 2
    message = capsys.readouterr().err.strip()
    assert len(message.splitlines()) == 1 and bad[0].lstrip("-") in message
    assert not list(tmp_path.iterdir())

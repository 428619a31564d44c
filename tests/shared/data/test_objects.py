from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from shared.config import Data
from shared.data import objects, procedural, sets
from shared.data.objects import KINDS, SPECIES, Objects
from shared.data.procedural import Faces, render, split

SMALL = Objects(size=32)


def paired(classes: list[int], instances: int) -> tuple[np.ndarray, np.ndarray]:
    return np.repeat(classes, instances), np.tile(np.arange(instances), len(classes))


def looks(family: Objects, classes: list[int]) -> np.ndarray:
    """Canvases [N, 4, A, A] of classes: no instance's pose, light, background or noise."""
    return np.stack([objects._thing(family, number).look.numpy() for number in classes])


# determinism: an image depends on its parameters, its class and its instance, nothing else


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("size", [33, 64])
def test_image_alone_equals_image_in_a_batch(size: int, shifted: bool) -> None:
    family = Objects(size=size)
    who, which = paired([0, 5, 2_000_011, 16], 19)  # more than one chunk a class
    together = render(family, who, which, shifted=shifted)
    for i in (0, 5, 15, 16, 18, 19, 40, 75):
        alone = render(family, [who[i]], [which[i]], shifted=shifted)
        assert np.array_equal(alone[0], together[i])


def test_order_and_other_processes_do_not_change_a_bit() -> None:
    who, which = paired(list(range(0, 30, 3)), 3)
    expected = render(SMALL, who, which)
    order = np.random.default_rng(0).permutation(len(who))
    assert np.array_equal(render(SMALL, who[order], which[order]), expected[order])
    assert np.array_equal(render(SMALL, who, which, workers=2), expected)


@pytest.fixture
def restore_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_thread_count_changes_no_bit_and_is_left_alone(restore_threads: None) -> None:
    who, which = paired([5, 60], 16)
    images = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        images.append(render(Objects(), who, which, shifted=True))
        assert torch.get_num_threads() == threads
    assert np.array_equal(*images)


def test_seed_class_instance_and_conditions_all_change_the_image() -> None:
    base = render(SMALL, [1], [1])
    others = [
        render(Objects(size=32, seed=1), [1], [1]),
        render(SMALL, [1 + SPECIES], [1]),
        render(SMALL, [1], [2]),
        render(SMALL, [1], [1], shifted=True),
        render(Faces(size=32), [1], [1]),
    ]
    for other in others:
        assert np.abs(base.astype(int) - other).mean() > 2


@pytest.mark.parametrize("size", [8, 17, 112, 256])
def test_every_size_gives_a_picture_with_something_on_it(size: int) -> None:
    images = render(Objects(size=size), [0, 5], [0, 0])
    assert images.shape == (2, 3, size, size) and images.dtype == np.uint8
    assert images.std() > 15


def test_the_same_object_at_two_sizes_is_the_same_picture() -> None:
    """Details scale with the picture: 112 reduced to 56 looks like 56."""
    who, which = paired(list(range(0, 60, 4)), 2)
    large = torch.from_numpy(render(Objects(size=112), who, which)).float()
    small = render(Objects(size=56), who, which)
    reduced = F.interpolate(large, size=56, mode="bicubic", antialias=True).numpy()
    like = np.abs(reduced - small).mean()
    unlike = np.abs(reduced - np.roll(small, 2, axis=0)).mean()
    assert like < 0.25 * unlike


def test_a_canvas_is_premultiplied_and_leaves_a_border() -> None:
    """Colours never exceed their alpha, objects cover a fair part, nothing is cut off."""
    drawn = looks(Objects(), list(range(0, 300, SPECIES)))
    alpha = drawn[:, 3]
    assert drawn.min() >= 0 and alpha.max() <= 1 + 1e-5
    assert np.all(drawn[:, :3] <= 1.15 * alpha[:, None] + 1e-5)  # a rim is lit from above
    cover = alpha.mean((1, 2))
    assert cover.min() > 0.05 and cover.max() < 0.6
    edge = np.concatenate([alpha[:, [0, -1]].ravel(), alpha[:, :, [0, -1]].ravel()])
    assert edge.max() == 0


# what the knobs do


def test_coarse_0_and_fine_0_leave_one_object() -> None:
    one = looks(Objects(coarse=0, fine=0), [0, 1, SPECIES, 100])
    assert all(np.array_equal(one[0], other) for other in one[1:])


def test_fine_0_makes_the_species_of_a_genus_agree() -> None:
    genera = [looks(Objects(fine=0), list(range(g, g + SPECIES))) for g in (0, 5, 10, 15)]
    for genus in genera:
        assert all(np.array_equal(genus[0], other) for other in genus[1:])
    assert not any(np.array_equal(genera[0][0], genus[0]) for genus in genera[1:])


def test_coarse_0_makes_the_outlines_of_genera_agree() -> None:
    """All the same kind and width; the species's patterns inside differ."""
    drawn = looks(Objects(coarse=0), list(range(0, 100, SPECIES)))
    assert all(np.array_equal(drawn[0, 3], other) for other in drawn[1:, 3])
    assert not any(np.array_equal(drawn[0, :3], other) for other in drawn[1:, :3])
    spread = looks(Objects(), list(range(0, 100, SPECIES)))[:, 3].std(0).mean()
    assert spread > 0.05


def test_genera_are_of_every_kind_at_the_defaults() -> None:
    kinds = [int(objects._numbers(Objects(), g * SPECIES).kind * len(KINDS)) for g in range(200)]
    share = np.bincount(kinds, minlength=len(KINDS)) / len(kinds)
    assert len(share) == len(KINDS) and share.min() > 0.15


@pytest.mark.parametrize("knob", ["coarse", "fine"])
def test_a_knob_widens_only_its_own_numbers(knob: str) -> None:
    names = {"coarse": objects._COARSE, "fine": objects._FINE}
    other = "fine" if knob == "coarse" else "coarse"
    classes = range(0, 200, SPECIES)
    spread = []
    for value in (0.0, 0.5, 1.0):
        drawn = [objects._numbers(Objects(**{knob: value}), i) for i in classes]
        spread.append([np.ptp([getattr(p, n) for p in drawn]) for n in names[knob]])
        assert [[getattr(p, n) for n in names[other]] for p in drawn] == [
            [getattr(objects._numbers(Objects(), i), n) for n in names[other]] for i in classes
        ]
    assert np.all(np.array(spread[0]) == 0)
    assert np.all(np.array(spread[0]) < spread[1]) and np.all(np.array(spread[1]) < spread[2])


def test_species_vanish_at_16_and_genera_stay() -> None:
    """Contrast kept by 64 -> 16: of species within their genus, and of genera among themselves."""
    drawn = torch.from_numpy(looks(Objects(), list(range(40 * SPECIES)))[:, :3])
    small = F.interpolate(drawn, size=20, mode="bicubic", antialias=True)  # 80 -> 20

    def contrasts(x: torch.Tensor) -> tuple[float, float]:
        x = x.reshape(40, SPECIES, *x.shape[1:])
        genus = x.mean(1, keepdim=True)
        return float((x - genus).pow(2).mean()), float((genus - genus.mean(0)).pow(2).mean())

    (fine, coarse), (fine_16, coarse_16) = contrasts(drawn), contrasts(small)
    assert fine_16 < 0.35 * fine and coarse_16 > 0.7 * coarse


# splits and the cache


def test_splits_are_of_disjoint_classes_or_of_other_instances(tmp_path: Path) -> None:
    seen: dict[bytes, str] = {}
    names = ("train", "development", "test", "shifted", *procedural.KNOWN)
    for name in names:
        pixels, labels = split(SMALL, name, 6, 2, cache=tmp_path, progress=False)  # type: ignore[arg-type]
        assert pixels.shape == (12, 3, 32, 32) and pixels.dtype == np.uint8
        assert labels.tolist() == np.repeat(np.arange(6), 2).tolist()
        for image in pixels:
            assert image.tobytes() not in seen
            seen[image.tobytes()] = name
    assert len(seen) == 12 * len(names)
    assert procedural.RANGE % SPECIES == 0  # a genus is in one split


@pytest.mark.parametrize(
    ("name", "first_class", "first_instance", "shifted"),
    [
        ("train", 0, 0, False),
        ("test", 2_000_000, 0, False),
        ("known-development", 0, 1_000_000, False),
        ("known-test", 0, 2_000_000, False),
        ("known-shifted", 0, 2_000_000, True),
    ],
)
def test_split_equals_render(
    tmp_path: Path, name: str, first_class: int, first_instance: int, shifted: bool
) -> None:
    pixels, _ = split(SMALL, name, 3, 2, cache=tmp_path, progress=False)  # type: ignore[arg-type]
    who, which = paired([0, 1, 2], 2)
    wanted = render(SMALL, who + first_class, which + first_instance, shifted=shifted)
    assert np.array_equal(pixels, wanted)


def test_faces_keep_the_file_names_of_their_cache(tmp_path: Path) -> None:
    """The key as it was before there were objects: JSON of these names, sorted."""
    faces = Faces(size=32, seed=3)
    split(faces, "train", 2, 2, cache=tmp_path, progress=False)
    split(Objects(size=32, seed=3), "train", 2, 2, cache=tmp_path, progress=False)
    key = (
        '{"coarse": 0.6, "fine": 1.4, "identities": 2, "instances": 2, "seed": 3, "size": 32, '
        '"split": "train", "version": 1}'
    )
    name = f"procedural-{hashlib.sha256(key.encode()).hexdigest()[:16]}-train.npy"
    assert (tmp_path / name).is_file() and len(list(tmp_path.glob("*.npy"))) == 2


def test_cache_depends_on_the_version_and_is_drawn_again_when_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = np.array(split(SMALL, "train", 2, 2, cache=tmp_path, progress=False)[0])
    (path,) = tmp_path.glob("*.npy")
    sidecar = json.loads((tmp_path / f"{path.name}.json").read_text())
    assert sidecar["parameters"]["family"] == "objects"
    content = bytearray(path.read_bytes())
    content[500] ^= 1
    path.write_bytes(content)
    again, _ = split(SMALL, "train", 2, 2, cache=tmp_path, progress=False)
    assert np.array_equal(again, expected) and path.name in capsys.readouterr().err
    monkeypatch.setattr(objects, "VERSION", objects.VERSION + 1)
    split(SMALL, "train", 2, 2, cache=tmp_path, progress=False)
    assert len(list(tmp_path.glob("*.npy"))) == 2


@pytest.mark.parametrize("field", [dict(size=7), dict(size=257), dict(seed=-1), dict(coarse=3.1)])
def test_bad_parameters_are_refused(field: dict) -> None:
    with pytest.raises(ValueError, match=f"Objects.{next(iter(field))} is .*; give"):
        Objects(**field)


def test_sheet_of_objects_is_written(tmp_path: Path) -> None:
    out = tmp_path / "sheet.png"
    flags = ["--family", "objects", "--size", "32", "--identities", "2", "--instances", "3"]
    procedural.main(["--sheet", str(out), "--split", "known-test", *flags])
    content = out.read_bytes()
    width, height = (int.from_bytes(content[i : i + 4], "big") for i in (16, 20))
    assert (width, height) == (2 * 3 * 32, 2 * 32)


# the two data sets

DATA = Data(name="objects", hr=32, lr=8, identities=6, instances=3, development=4, test=7)
RETRIEVAL = replace(DATA, name="objects-retrieval")


def test_objects_are_told_apart_on_other_images_of_the_same_classes(tmp_path: Path) -> None:
    found = sets.load(DATA, cache=tmp_path, teacher_identities=9)
    assert found.task == "objects" and found.classes == found.teacher_classes == 6
    assert found.train.labels.tolist() == np.repeat(np.arange(6), 3).tolist()
    assert len(found.teacher_train) == 18
    assert found.selection == "development" and set(found.evaluations) == {"development", "test"}
    for name, each in (("development", 4), ("test", 6)):
        assert found.evaluations[name].task == "objects"
        assert found.evaluations[name].images.labels.tolist() == np.repeat(range(6), each).tolist()
    alone = sets.load(replace(DATA, development=0), cache=tmp_path)
    assert alone.selection == "test" and set(alone.evaluations) == {"test"}
    assert found.fingerprint == f"objects {objects.VERSION}"


def test_objects_test_images_do_not_depend_on_the_training_ones(tmp_path: Path) -> None:
    few = sets.load(DATA, cache=tmp_path).evaluations["test"].images
    more = sets.load(replace(DATA, instances=5), cache=tmp_path).evaluations["test"].images
    assert torch.equal(few.pixels, more.pixels)  # type: ignore[attr-defined]


def test_objects_retrieval_holds_classes_out(tmp_path: Path) -> None:
    found = sets.load(RETRIEVAL, cache=tmp_path, teacher_identities=9)
    assert found.task == "faces" and (found.classes, found.teacher_classes) == (6, 9)
    assert len(found.train) == 18 and len(found.teacher_train) == 27
    for name, classes in (("development", 4), ("test", 7)):
        evaluation = found.evaluations[name]
        assert evaluation.recall_at == (1, 2, 4, 8) and evaluation.pairs is None
        assert evaluation.images.labels.tolist() == np.repeat(np.arange(classes), 6).tolist()
    alone = sets.load(replace(RETRIEVAL, development=0), cache=tmp_path)
    assert alone.selection == "test" and set(alone.evaluations) == {"test"}


def test_shifted_shows_what_test_shows_in_other_conditions(tmp_path: Path) -> None:
    for data in (DATA, RETRIEVAL):
        first = {"objects": 0, "objects-retrieval": 2_000_000}[data.name]
        instance = {"objects": 2_000_000, "objects-retrieval": 0}[data.name]
        found = sets.evaluation(data, "shifted", "", cache=tmp_path, task="objects", classes=6)
        test = sets.load(data, cache=tmp_path).evaluations["test"]
        assert torch.equal(found.images.labels, test.images.labels)
        assert found.recall_at == test.recall_at and found.task == test.task
        wanted = render(Objects(size=32), [first], [instance], shifted=True)
        assert np.array_equal(found.images.pixels[:1].numpy(), wanted)  # type: ignore[attr-defined]
        with pytest.raises(ValueError, match="development, test, shifted;"):
            sets.evaluation(data, "native", "", cache=tmp_path, task="objects", classes=6)


def test_views_that_are_crops_get_room_in_training_only(tmp_path: Path) -> None:
    data = replace(DATA, pad="image", shift=4)
    found = sets.load(data, cache=tmp_path)
    test = found.evaluations["test"].images
    assert found.train.pixels.shape[-1] == 40 and test.pixels.shape[-1] == 32  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ["objects", "objects-retrieval"])
def test_what_does_not_apply_is_refused(tmp_path: Path, name: str) -> None:
    data = replace(DATA, name=name)
    with pytest.raises(ValueError, match="--data.test-sets: objects.* a test part of its own"):
        sets.load(replace(data, test_sets=("stl10=x",)), cache=tmp_path)
    with pytest.raises(ValueError, match="--data.quality unlocalised: objects.* no boxes"):
        sets.load(replace(data, quality="unlocalised"), cache=tmp_path)
    with pytest.raises(ValueError, match="Objects.size is 300"):
        sets.load(replace(data, hr=300), cache=tmp_path)

"""From the field's files to a trained, scored student: small trees in the published formats."""

from __future__ import annotations

import itertools
import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from crrcd.eval import evaluate
from crrcd.train import load_student, train
from shared.config import Data
from shared.data import align, classification, sets
from shared.data.items import fit
from shared.data.pipeline import Loader, normalise
from shared.data.protocols import TEST_SETS, public_set
from shared.data.sets import FACE_SETS, LICENCES, RETRIEVAL, evaluation, load
from shared.degrade import low
from tests.conftest import tiny
from tests.shared.data import trees

SMALL = Data(name="recordio", hr=32, lr=16, counts="any", development=4, workers=0)


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """pack/ (with two .bin), lfw/, tinyface/, survface/, cub/: the same procedural people."""
    root = tmp_path_factory.mktemp("disk")
    faces = trees.people(14, 8)
    others = trees.people(12, 3, first=50_000)
    trees.write_pack(root / "pack", faces)
    trees.write_bin(root / "pack" / "lfw.bin", others)
    trees.write_bin(root / "pack" / "agedb_30.bin", others)
    trees.write_lfw(root / "lfw", others)
    trees.write_tinyface(root / "tinyface", others[:8], others[8:, 0])
    trees.write_survface(root / "survface", others, trees.people(12, 1, first=60_000)[:, 0])
    noise = np.random.default_rng(0).integers(0, 256, (200, 2, 12, 10, 3), dtype=np.uint8)
    trees.write_cub(root / "cub", noise)
    return root


@pytest.fixture(scope="module")
def run(disk: Path, tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
    torch.set_num_threads(1)
    config = tiny(tmp_path_factory.mktemp("runs"), cache)
    teacher = replace(config.teacher, optim=replace(config.teacher.optim, epochs=1))
    data = replace(SMALL, root=str(disk / "pack"))
    return train(replace(config, data=data, teacher=teacher, optim=replace(config.optim, epochs=2)))


def test_a_pack_is_trained_on_and_scored_on_the_bin_beside_it(run: Path) -> None:
    record = json.loads((run / "results.json").read_text())
    assert list(record["columns"]) == ["verification"] and record["unit"] == "pairs"
    assert set(record["rows"]) == {"teacher, HR", "teacher, LR", "alone", "crrcd"}
    told = json.loads((run / "config.json").read_text())
    assert told["alignment"] == "arcface" and told["test_sets"] == ["lfw", "agedb_30"]
    other = json.loads((run / "results-agedb_30.json").read_text())
    assert other["evaluation"] == "agedb_30" and set(other["rows"]) == set(record["rows"])
    assert "InsightFace" in told["licence"] and told["selection"] == "development"
    assert load_student(run).alignment == "arcface"
    lines = [json.loads(x) for x in (run / "metrics.jsonl").read_text().splitlines()]
    assert any("development" in x and "rank1" in x for x in lines)


@pytest.mark.parametrize(
    "on,where,columns",
    [
        ("bin", "pack/agedb_30.bin", ["verification"]),
        ("tinyface", "tinyface", ["rank1"]),
        ("survface", "survface", ["tpir20_at_fpir_0.1", "rank1"]),
        ("cub", "cub", ["recall1"]),
    ],
)
def test_a_trained_student_is_scored_on_a_public_set(
    run: Path, disk: Path, on: str, where: str, columns: list[str]
) -> None:
    told = evaluate(run, on, str(disk / where), any_alignment=True)
    name = Path(where).stem if on == "bin" else on
    record = json.loads((run / f"eval-{name}.json").read_text())
    assert {"bin": "eer", "tinyface": "rank20", "survface": "rank20", "cub": "recall16"}[on] in told
    assert list(record["columns"]) == columns and "crrcd" in told
    for cell in record["rows"]["crrcd"]["cells"].values():
        assert 0 <= cell["low"] <= cell["value"] <= cell["high"] <= 100


def test_faces_cut_out_otherwise_stop_the_evaluation_with_a_line(run: Path, disk: Path) -> None:
    with pytest.raises(ValueError, match="lfw: faces are cut out as 'whole', .* as 'arcface'"):
        evaluate(run, "lfw", str(disk / "lfw"))
    assert "verification" in evaluate(run, "lfw", str(disk / "lfw"), any_alignment=True)


def test_development_identities_are_not_trained_on(disk: Path, cache: Path) -> None:
    found = load(replace(SMALL, root=str(disk / "pack")), cache=cache)
    assert found.classes == 10 and len(found.train) == 80
    held = found.evaluations["development"].images
    assert len(held) == 32
    _, own = next(found.train.batches([torch.arange(80)]))
    _, kept = next(held.batches([torch.arange(32)]))
    assert not {x.numpy().tobytes() for x in own} & {x.numpy().tobytes() for x in kept}


def test_streaming_gives_what_resident_gives(disk: Path, cache: Path) -> None:
    data = replace(SMALL, root=str(disk / "pack"), development=0)
    index = torch.tensor([5, 0, 111])
    resident = load(data, cache=cache)
    streaming = load(replace(data, resident_gib=0.0), cache=cache)
    a, b = (next(d.train.batches([index]))[1] for d in (resident, streaming))
    assert torch.equal(a, b)
    expected = trees.people(14, 8).reshape(-1, 32, 32, 3)[index]
    assert np.array_equal(a.permute(0, 2, 3, 1).numpy(), expected)
    assert resident.selection == "test" and resident.fingerprint == streaming.fingerprint


def test_native_low_resolution_goes_whole_to_the_students_size(disk: Path) -> None:
    found = public_set("tinyface", disk / "tinyface", SMALL)
    assert found.images.labels.tolist() == [*range(1, 9), *range(1, 9), -1, -1, -1, -1]
    assert next(found.images.batches([torch.arange(3)]))[1].shape == (3, 3, 16, 16)
    assert found.probes.tolist() == list(range(8)) and len(found.gallery) == 12


def test_wrong_input_is_told_in_a_line(disk: Path, cache: Path) -> None:
    pack = replace(SMALL, root=str(disk / "pack"))
    for changes, line in [
        (dict(root=""), "needs --data.root"),
        (dict(root=str(disk / "gone")), "no such folder"),
        (dict(development=13), "14 training classes, of which --data.development keeps 13"),
        (dict(classes=14), "10 classes to train on, --data.classes says 14"),
        (dict(test_sets=("lfw",)), "give NAME=PATH"),
        (dict(test_sets=("lfw=/gone",)), "lfw=/gone: no such file or folder"),
        (dict(test_sets=("mars=/gone",)), "recordio is scored on no test set 'mars'"),
        (dict(test_sets=(f"lfw={disk / 'lfw'}",)), "cut out as 'whole'"),
        (dict(counts="published"), "40 pairs instead of 6,000"),
        (dict(name="cub", root=str(disk / "cub"), development=99), "keeps 99"),
        (dict(name="cub", landmarks=("x.csv",)), "cub has no faces to align"),
        (dict(name="faces", test_sets=("lfw=/x",)), "faces has a test part of its own"),
        (dict(name="digits", test_sets=("lfw=/x",)), "digits is scored on no test set 'lfw'"),
        (dict(name="digits", test_sets=("stl10=",)), "stl10=: give NAME=PATH, NAME one of stl10"),
        (dict(name="tinyface", root=str(disk / "tinyface")), "Training_Set: no such folder"),
    ]:
        with pytest.raises(ValueError, match=line) as caught:
            load(replace(pack, **changes), cache=cache)
        assert "\n" not in str(caught.value)


def test_a_pack_without_a_bin_asks_what_to_score_on(disk: Path, tmp_path: Path) -> None:
    trees.write_pack(tmp_path, trees.people(3, 2))
    data = replace(SMALL, root=str(tmp_path), development=0)
    with pytest.raises(ValueError, match="no test part: say what to score on"):
        load(data, cache=tmp_path)
    named = replace(data, test_sets=(f"mine={disk / 'pack' / 'lfw.bin'}",))
    assert len(load(named, cache=tmp_path).evaluations["test"].pairs[0]) == 40


def test_retrieval_classes_are_apart(disk: Path, cache: Path) -> None:
    found = load(replace(SMALL, name="cub", root=str(disk / "cub"), development=20), cache=cache)
    assert found.classes == 80 and len(found.train) == 160
    held, test = found.evaluations["development"], found.evaluations["test"]
    assert len(held.images) == 40 and len(test.images) == 200 and test.recall_at == (1, 2, 4, 8, 16)
    assert test.images.labels.unique().tolist() == list(range(100, 200))


def test_landmarks_align_faces_and_are_reported(disk: Path, tmp_path: Path, cache: Path) -> None:
    lines = []
    for p in range(12):
        for i in (1, 2):
            points = np.array([[10, 12], [22, 12], [16, 17], [11, 24], [21, 24]]) + 0.1 * i
            values = ",".join(f"{v:.2f}" for v in points.ravel())
            lines.append(f"Person_{p}/Person_{p}_{i:04d}.png,{values}")
    csv = tmp_path / "points.csv"
    csv.write_text("\n".join(lines[:-1]) + "\n")
    data = replace(SMALL, landmarks=(str(csv),))
    with pytest.raises(ValueError, match="Person_11_0002.png: no landmarks"):
        public_set("lfw", disk / "lfw", data)
    some = public_set("lfw", disk / "lfw", replace(data, no_landmarks="centre-crop"))
    assert some.notes == {"images": 23, "aligned": 22, "centre-crop": 1, "counts": "any"}
    csv.write_text("\n".join(lines) + "\n")
    found = public_set("lfw", disk / "lfw", data)
    assert found.alignment == "arcface:error" and found.notes["aligned"] == 23
    pack = replace(data, root=str(disk / "pack"), test_sets=(f"lfw={disk / 'lfw'}",))
    assert load(pack, cache=cache).alignment == "arcface"  # aligned already: left as it is
    bin_too = replace(pack, no_landmarks="drop", test_sets=(f"a={disk / 'pack' / 'lfw.bin'}",))
    assert load(bin_too, cache=cache).evaluations["test"].alignment == "arcface"
    csv.write_text("\n".join(lines[:-1]) + "\n")
    with pytest.raises(ValueError, match="no landmarks"):  # a protocol drops no face
        public_set("lfw", disk / "lfw", replace(data, no_landmarks="drop"))


def test_every_set_has_its_licence_and_its_place_in_the_document() -> None:
    text = (Path(__file__).parents[3] / "docs" / "data.md").read_text()
    for name in (*FACE_SETS, *RETRIEVAL, *TEST_SETS):
        assert f"`{name}`" in text, name
    named = set(LICENCES) | set(classification.LICENCES)
    assert {*FACE_SETS, *RETRIEVAL, *TEST_SETS} <= named


def test_the_fingerprint_is_of_the_files_wherever_they_lie(tmp_path: Path) -> None:
    """Two trees with the same names and sizes, other pixels: a cached teacher must not serve."""
    seen = []
    for place, shift in (("one", 0), ("two", 60)):
        for p, own in enumerate(trees.people(3, 2)):
            for i, image in enumerate(own):
                path = tmp_path / place / "train" / f"n{p:06d}" / f"{i:04d}_01.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes((image + np.uint8(shift)).tobytes()[:900])
                os.utime(path, ns=(shift, shift))
        raw = FACE_SETS["vggface2"](tmp_path / place, SMALL)
        seen.append(sets._fingerprint(raw, SMALL))
    assert seen[0] != seen[1]


def test_a_test_set_that_cannot_be_read_keeps_no_other_back(disk: Path, cache: Path) -> None:
    pack = disk / "pack"
    sets_named = (f"a={pack / 'lfw.bin'}", f"lfw={disk / 'lfw'}", f"b={pack / 'agedb_30.bin'}")
    found = load(replace(SMALL, root=str(pack), test_sets=sets_named), cache=cache)
    seen = []
    with pytest.raises(ValueError, match="^not scored: lfw: faces are cut out as 'whole'"):
        for name, _ in found.tests():
            seen.append(name)
    assert seen == ["results", "results-b"]


def test_a_native_test_set_has_no_high_resolution_row(
    disk: Path, tmp_path: Path, cache: Path
) -> None:
    """Its faces are natively small: the teacher sees them enlarged, and only so."""
    config = tiny(tmp_path, cache)
    data = replace(SMALL, root=str(disk / "pack"), test_sets=(f"tinyface={disk / 'tinyface'}",),
                   any_alignment=True)  # fmt: skip
    run = train(replace(config, data=data, optim=replace(config.optim, epochs=1)))
    record = json.loads((run / "results.json").read_text())
    assert list(record["rows"]) == ["teacher, LR", "alone", "crrcd"]
    assert record["notes"] == {"counts": "any"}


def test_identities_of_a_folder_are_aligned_where_landmarks_are_given(
    disk: Path, tmp_path: Path, cache: Path
) -> None:
    lines = []
    for part, first in (("train", 0), ("test", 50_000)):
        for p, own in enumerate(trees.people(20, 4, first=first)):
            for i, image in enumerate(own):
                name = f"{part}{p}/{i}.png"
                trees.put(tmp_path / part / name, image)
                lines.append(f"{name},10,12,22,12,16,17,11,24,21,24")
    csv = tmp_path / "points.csv"
    csv.write_text("\n".join(lines) + "\n")
    plain = Data(name="folder", root=str(tmp_path), hr=32, lr=16)
    aligned = load(replace(plain, landmarks=(str(csv),)), cache=cache)
    assert aligned.alignment == "arcface:error" and load(plain, cache=cache).alignment == ""
    assert aligned.evaluations["test"].alignment == "arcface:error"
    first = next(aligned.train.batches([torch.tensor([0])]))[1][0]
    points = [[10, 12], [22, 12], [16, 17], [11, 24], [21, 24]]
    cut = align.align(trees.people(1, 1)[0, 0], points)
    assert torch.equal(first, fit(cut, 32))


# -- crops of pictures, and what of them is localised --------------------------------------------

CROPS = Data(
    name="cub", hr=8, lr=4, shift=2, shift_step=1, pad="image", counts="any", development=10,
    workers=0,
)  # fmt: skip


@pytest.fixture(scope="module")
def boxed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, np.ndarray]:
    """cub/ and cars196/ of the same noise [200, 2, 14, 19, 3], each with a box."""
    root = tmp_path_factory.mktemp("boxed")
    noise = np.random.default_rng(1).integers(0, 256, (200, 2, 14, 19, 3), dtype=np.uint8)
    trees.write_cub(root / "cub", noise, box=(3.0, 2.0, 11.0, 7.0))
    trees.write_cars(root / "cars196", noise[:196], box=(4, 3, 14, 9))
    trees.write_cub(root / "off", noise, box=(19.0, 2.0, 5.0, 5.0))
    return root, noise


def squeezed(picture: np.ndarray, side: int = 12) -> torch.Tensor:
    resized = Image.fromarray(np.ascontiguousarray(picture)).resize(
        (side, side), Image.Resampling.BICUBIC
    )
    return torch.from_numpy(np.array(resized)).permute(2, 0, 1)


def pictures(name: str, noise: np.ndarray, part: str) -> list[np.ndarray]:
    """In the lists' order: of the CSV release official training images come first."""
    half = 100 if name == "cub" else 98
    own = noise[:half] if part == "train" else noise[half : 2 * half]
    if name == "cub":
        return list(own.reshape(-1, *own.shape[2:]))
    return [*own[:, 0], *own[:, 1]]


@pytest.mark.parametrize("name", ["cub", "cars196"])
@pytest.mark.parametrize("streamed", [False, True])
def test_unlocalised_shows_the_box_to_the_teacher_and_all_of_it_to_the_student(
    boxed, cache: Path, name: str, streamed: bool
) -> None:
    """Rows 2 to 8, columns 3 to 13: CUB has x, y, width, height, Cars corners counted from 1."""
    root, noise = boxed
    data = replace(CROPS, name=name, root=str(root / name), quality="unlocalised",
                   resident_gib=0.0 if streamed else 4.0)  # fmt: skip
    found = load(data, cache=cache)
    assert found.train_whole is not None
    known = pictures(name, noise, "train")
    labels = found.train.labels.tolist()
    # the last ten classes are kept for development
    kept = [i for i in range(len(known)) if (i // 2 < 90 if name == "cub" else i % 98 < 88)]
    assert labels == [(i // 2 if name == "cub" else i % 98) for i in kept]
    loader = Loader(found.train, data, 6, seed=2, device=torch.device("cpu"),
                    whole=found.train_whole)  # fmt: skip
    views = loader.views
    for batch in itertools.islice(loader.epoch(1), 4):
        for k, (i, view) in enumerate(zip(batch.index.tolist(), batch.view.tolist(), strict=True)):
            picture = known[kept[i]]
            y, x = 2 + int(views.dy[view]), 2 + int(views.dx[view])
            both = [squeezed(p)[:, y : y + 8, x : x + 8] for p in (picture[2:9, 3:14], picture)]
            part, whole = (p.flip(-1) if views.mirrored[view] else p for p in both)
            assert torch.equal(batch.x_h()[k : k + 1], normalise(part[None], data))
            small = low(whole[None], 4, mode="bicubic", antialias=True)
            assert torch.equal(batch.x_l()[k : k + 1], normalise(small, data))
    for split, kept in (("test", None), ("development", 20)):
        scored = found.evaluations[split]
        assert scored.whole is not None and scored.as_student().whole is None
        first = pictures(name, noise, "test")[:3]
        if split == "development":
            start = [180, 181, 182] if name == "cub" else [88, 89, 90]
            first = [known[i] for i in start]
        for images, cut in ((scored.images, True), (scored.as_student().images, False)):
            assert len(images) == (kept or len(pictures(name, noise, "test")))
            ((_, seen),) = images.batches([torch.arange(3)])
            for image, picture in zip(seen, first, strict=True):
                shown = squeezed(picture[2:9, 3:14] if cut else picture)
                assert torch.equal(image, shown[:, 2:10, 2:10])
        assert torch.equal(scored.as_student().images.labels, scored.images.labels)
    again = evaluation(data, "test", "", cache=cache, task="faces", classes=0)
    assert again.whole is not None and len(again.whole) == len(found.evaluations["test"].images)


@pytest.mark.parametrize("quality", ["small", "enlarged"])
def test_otherwise_boxes_are_not_looked_at(boxed, cache: Path, quality) -> None:
    root, noise = boxed
    data = replace(CROPS, root=str(root / "off"), quality=quality)
    found = load(data, cache=cache)
    assert found.train_whole is None and found.evaluations["test"].whole is None
    assert found.evaluations["test"].as_student() is found.evaluations["test"]
    ((_, seen),) = found.train.batches([torch.tensor([5])])
    assert torch.equal(seen[0], squeezed(noise[2, 1]))
    plain = replace(data, pad="edge", shift=2)  # as ever: the shorter side, then the centre
    ((_, seen),) = load(plain, cache=cache).train.batches([torch.tensor([5])])
    assert torch.equal(seen[0], fit(noise[2, 1], 8))


def test_a_teachers_key_changes_with_the_boxes(boxed, cache: Path) -> None:
    root, _ = boxed
    data = replace(CROPS, root=str(root / "cub"), quality="unlocalised")
    before = load(data, cache=cache).fingerprint
    path = root / "cub" / "bounding_boxes.txt"
    text = path.read_text()
    path.write_text(text.replace("\n7 3.0", "\n7 2.0"))
    assert load(data, cache=cache).fingerprint != before
    path.write_text(text)
    assert load(data, cache=cache).fingerprint == before
    assert load(replace(data, quality="small"), cache=cache).fingerprint != before


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(quality="unlocalised", root="off"),
         r"Bird_1_0000.png: its box \(19, 2, 24, 7\) holds no pixel of the picture of 19 x 14 px"),
        (dict(quality="unlocalised", on_error="skip"), "--data.on-error skip might leave out one"),
        (dict(quality="unlocalised", name="sop"), "sop has no boxes for the teacher to see .*cub"),
        (dict(quality="unlocalised", name="faces"), "faces has no boxes for the teacher"),
        (dict(name="tinyface"), "--data.pad image: tinyface has tight crops"),
        (dict(name="survface", pad="edge", crop="resized"), "--data.crop resized: survface has"),
        (dict(name="digits"), "--data.hr 8, and 4 px for crops: the images of digits are 8 px"),
    ],
)  # fmt: skip
def test_what_has_no_boxes_or_no_room_is_refused(boxed, cache: Path, changes, words) -> None:
    changes = {"root": "cub", **changes}
    data = replace(CROPS, **{**changes, "root": str(boxed[0] / changes["root"])})
    with pytest.raises(ValueError, match=words) as error:
        load(data, cache=cache)
    assert "\n" not in str(error.value)


def test_images_of_one_size_give_their_middle_to_evaluations(cache: Path) -> None:
    data = Data(name="digits", hr=6, lr=3, shift=1, shift_step=1, pad="image")
    found, plain = load(data, cache=cache), load(replace(data, hr=8, pad="edge"), cache=cache)
    assert torch.equal(found.train.pixels, plain.train.pixels)
    for name in ("development", "test"):
        wide = plain.evaluations[name].images.pixels
        assert torch.equal(found.evaluations[name].images.pixels, wide[:, :, 1:7, 1:7])


def test_drawn_faces_are_drawn_larger_and_scored_in_the_middle(cache: Path) -> None:
    data = Data(hr=24, lr=8, shift=4, pad="image", identities=4, instances=2, development=24,
                test=24)  # fmt: skip
    found = load(data, cache=cache)
    plain = load(replace(data, hr=32, pad="edge"), cache=cache)
    assert torch.equal(found.train.pixels, plain.train.pixels)
    for name in ("development", "test"):
        wide = plain.evaluations[name].images.pixels
        assert torch.equal(found.evaluations[name].images.pixels, wide[:, :, 4:28, 4:28])
    shifted = evaluation(data, "shifted", "", cache=cache, task="faces", classes=0)
    assert shifted.images.pixels.shape[-2:] == (24, 24)

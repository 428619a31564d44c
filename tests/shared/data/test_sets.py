"""From the field's files to a trained, scored student: small trees in the published formats."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from crrcd.eval import evaluate
from crrcd.train import load_student, train
from shared.config import Data
from shared.data import align, classification, sets
from shared.data.items import fit
from shared.data.protocols import TEST_SETS, public_set
from shared.data.sets import FACE_SETS, LICENCES, RETRIEVAL, load
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

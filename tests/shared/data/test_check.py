"""`python -m shared.data.check`: what a user sees before she trains."""

from __future__ import annotations

import typing
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from shared import cli
from shared.config import Data
from shared.data import check
from shared.data.sets import FACE_SETS, PROCEDURAL, RETRIEVAL
from tests.conftest import python
from tests.shared.data import trees


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("disk") / "pack"
    trees.write_pack(root, trees.people(6, 3))
    return root


def test_a_sound_pack_is_told_with_counts_sizes_licence_and_a_sheet(
    pack: Path, tmp_path: Path
) -> None:
    found = python("-m", "shared.data.check", "recordio", str(pack), cwd=tmp_path)
    assert found.returncode == 0, found.stderr
    assert "training: 18 images of 6 labels; width x height 32x32 to 32x32 px" in found.stdout
    assert "non-commercial" in found.stdout and "nothing wrong found" in found.stdout
    with Image.open(tmp_path / "recordio-sheet.png") as page:
        pixels = np.asarray(page)
    assert pixels.shape[1] == 8 * 64 and pixels.std() > 10
    first = trees.people(6, 3)[0, 0]
    enlarged = Image.fromarray(first).resize((64, 64), Image.Resampling.BICUBIC)
    assert np.array_equal(pixels[14:78, :64], np.asarray(enlarged))


def test_wrong_counts_and_damaged_images_are_named_with_exit_code_1(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    trees.write_tinyface(tmp_path, trees.people(8, 2), trees.people(2, 1, first=90_000)[:, 0])
    bad = tmp_path / "Testing_Set" / "Probe" / "3_1.png"
    bad.write_bytes(bad.read_bytes()[:100])
    with pytest.raises(SystemExit) as stopped:
        check.main(["tinyface", str(tmp_path), "--sheet", str(tmp_path / "s.png")])
    out = capsys.readouterr().out
    assert stopped.value.code == 1
    assert "probes: 8 images of 8 labels" in out
    assert "gallery: 10 images of 8 labels, 2 of nobody" in out
    assert "wrong: TinyFace in" in out and "instead of 153,428" in out
    assert "wrong: probes: 1 images cannot be decoded" in out
    assert f"{bad}: not a readable image" in out


@pytest.mark.parametrize(
    "name,place,line",
    [
        ("recordio", "gone", "gone: no such file or folder"),
        ("martians", ".", "no data set 'martians' (there are: "),
        ("sop", ".", "no Ebay_train.txt"),
        ("lfw", ".", "pairs.txt"),
    ],
)
def test_what_cannot_be_read_is_one_line_and_exit_code_2(
    tmp_path: Path, name: str, place: str, line: str, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.guarded(lambda: check.main([name, str(tmp_path / place)]))
    out, err = capsys.readouterr()
    assert stopped.value.code == 2 and line in err
    assert len(err.strip().splitlines()) == 1 and not out


def test_pairs_lie_side_by_side_on_the_sheet(tmp_path: Path) -> None:
    people = trees.people(12, 3)
    trees.write_lfw(tmp_path, people)
    parts = check.SETS["lfw"](tmp_path, "any")
    assert {name: len(items) for name, items in parts.items()} == {
        "pairs of the same": 40,
        "pairs of different": 40,
    }
    same, other = parts.values()
    assert np.array_equal(same.image(0), people[0, 0])
    assert np.array_equal(same.image(1), people[0, 1])
    assert np.array_equal(other.image(1), people[1, 1])
    assert check.sheet(parts).size[0] == 512


def test_classification_sets_and_retrieval_sets_are_known() -> None:
    known = typing.get_args(typing.get_type_hints(Data)["name"])
    trained = {*FACE_SETS, *RETRIEVAL, *check.NATIVE}
    assert trained <= set(check.SETS)
    assert set(known) == trained | {*PROCEDURAL, "digits", "folder"}

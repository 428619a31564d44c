"""Face sets from trees and lists written here line by line."""

from __future__ import annotations

import io
import os
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from shared.data import faces
from shared.data.faces import (
    bin_pairs,
    calfw,
    casia,
    cfp,
    cplfw,
    lfw,
    read_bin,
    umdfaces,
    vggface2,
)
from shared.evaluate.verify import verification


def pixels(number: int, side: int = 2) -> np.ndarray:
    return np.full((side, side, 3), (number % 256, number // 256, 7), np.uint8)


def png(number: int, side: int = 2) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels(number, side)).save(out, "PNG")
    return out.getvalue()


def put(path: Path, data: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


def tree(root: Path, files: list[str]) -> dict[str, int]:
    """Image k is the colour k, so that a reader that mixes images up is seen."""
    numbers = {file: number for number, file in enumerate(sorted(set(files)))}
    for file, number in numbers.items():
        put(root / file, png(number))
    return numbers


def rows(pairs) -> list[tuple[str, str, bool]]:
    name = pairs.items.name
    sides = zip(pairs.first, pairs.second, pairs.same, strict=True)
    return [(name(a), name(b), bool(s)) for a, b, s in sides]


def check_folds(pairs) -> None:
    """The blocks that `verification` cuts are equal and hold pairs of both kinds."""
    rng = np.random.default_rng(0)
    e1, e2 = rng.normal(size=(2, len(pairs.same), 4))
    fold = verification(e1, e2, pairs.same, folds=pairs.folds).fold
    for k in range(pairs.folds):
        assert len(set(pairs.same[fold == k].tolist())) == 2
    assert pairs.first.dtype == pairs.second.dtype == np.int64 and pairs.same.dtype == bool


def refused(call, match: str) -> str:
    with pytest.raises(ValueError, match=match) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


# -- .bin ----------------------------------------------------------------------------------------


def bin_file(path: Path, same, images=None, protocol: int = 4) -> Path:
    images = [png(k) for k in range(2 * len(same))] if images is None else images
    return put(path, pickle.dumps((images, same), protocol))


def python2(images: list[bytes], same: list[bool]) -> bytes:
    """Protocol 2 with str, the way the public files were written."""
    out = b"\x80\x02]("
    for data in images:
        out += b"T" + len(data).to_bytes(4, "little") + data
    return out + b"e](" + b"".join(b"\x88" if s else b"\x89" for s in same) + b"e\x86."


def test_read_bin_of_python_2(tmp_path):
    images = [png(k) for k in range(4)]
    path = put(tmp_path / "lfw.bin", python2(images, [True, False]))
    assert read_bin(path) == read_bin(str(path)) == (images, [True, False])


@pytest.mark.parametrize(
    "same", [[True, False], (1, 0), np.array([True, False]), [np.bool_(True), np.bool_(False)]]
)
@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_read_bin_takes_arrays_and_every_form_of_labels(tmp_path, same, protocol):
    images = [pixels(k, side=5) for k in range(4)]
    found, truth = read_bin(bin_file(tmp_path / "x.bin", same, images, protocol))
    assert isinstance(found, list)
    assert all(np.array_equal(a, b) for a, b in zip(found, images, strict=True))
    assert truth == [True, False] and all(type(value) is bool for value in truth)


@pytest.mark.parametrize(
    ("content", "finding"),
    [
        ([], "not a pair"),
        (None, "not a pair"),
        (([b"a", b"b"], [True], 1), "not a pair"),
        ((b"ab", [True]), r"\(bytes, list\), not"),
        (([b"a"], [True]), "1 images for 1 pairs"),
        (([b"a"] * 3, [True]), "3 images for 1 pairs"),
        (([], []), "0 images for 0 pairs"),
        (([b"a", "b"], [True]), "image 1 is neither"),
        (([b"a", b""], [True]), "image 1 is neither"),
        (([b"a", [b"b"]], [True]), "image 1 is neither"),
        (([b"a", np.zeros((2, 2, 3))], [True]), "image 1 is an array of float64"),
        (([b"a", b"b"], [2]), "label of pair 0"),
        (([b"a", b"b"], [None]), "label of pair 0"),
        (([b"a", b"b"], [np.float64(1)]), "label of pair 0"),
        (([b"a", b"b"], np.array([[True]])), "label of pair 0"),
    ],
)
def test_read_bin_refuses_other_content(tmp_path, content, finding):
    path = put(tmp_path / "x.bin", pickle.dumps(content))
    assert refused(lambda: read_bin(path), finding).startswith(f"{path}: ")


class Evil:
    def __reduce__(self):
        return os.mkdir, ("canary",)


def test_read_bin_runs_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = put(tmp_path / "x.bin", pickle.dumps(([Evil(), b"a"], [True])))
    refused(lambda: read_bin(path), "asks for 'posix.mkdir'|asks for 'nt.mkdir'")
    assert not Path("canary").exists()
    pickle.loads(path.read_bytes())  # the file is live
    assert Path("canary").exists()


def test_bin_pairs_keep_the_order_of_the_file(tmp_path):
    same = [True, True, False] * 10 + [False, True, True] * 10
    pairs = bin_pairs(bin_file(tmp_path / "mine.bin", same))
    assert (pairs.name, pairs.folds, len(pairs.items)) == ("mine", 10, 120)
    assert pairs.same.tolist() == same
    assert pairs.first.tolist() == list(range(0, 120, 2))
    assert pairs.second.tolist() == list(range(1, 120, 2))
    assert np.array_equal(pairs.items.image(77), pixels(77)) and pairs.items.name(3) == "mine.bin#3"
    check_folds(pairs)


def test_bin_pairs_of_a_file_without_folds_are_spread_in_its_order(tmp_path):
    pairs = bin_pairs(bin_file(tmp_path / "mine.bin", [True] * 25 + [False] * 28))
    check_folds(pairs)
    first = (pairs.first // 2).tolist()
    assert sorted(first) == list(range(53))
    for kind in (True, False):  # within a kind the file's order stands
        own = [p for p, s in zip(first, pairs.same, strict=True) if s == kind]
        assert own == sorted(own)
    refused(lambda: bin_pairs(bin_file(tmp_path / "a.bin", [True] * 50 + [False] * 9)), "10 equal")
    refused(lambda: bin_pairs(bin_file(tmp_path / "a.bin", [True] * 50)), "cannot be cut into")
    refused(lambda: bin_pairs(bin_file(tmp_path / "a.bin", [True, False])), "cannot be cut into")


def test_bin_pairs_decode_encoded_bytes_that_come_as_arrays(tmp_path):
    encoded = [np.frombuffer(png(k), np.uint8) for k in range(40)]
    images = [a if k % 2 else a[:, None] for k, a in enumerate(encoded)]
    pairs = bin_pairs(bin_file(tmp_path / "x.bin", [True, False] * 10, images))
    assert all(np.array_equal(pairs.items.image(k), pixels(k)) for k in range(40))
    images[5] = np.zeros((3, 4, 4), np.uint8)
    path = bin_file(tmp_path / "x.bin", [True, False] * 10, images)
    refused(lambda: bin_pairs(path), r"image 5 of shape \(3, 4, 4\)")


@pytest.mark.parametrize(("name", "published"), faces.PAIRS.items())
def test_published_counts_of_bins_are_asserted(tmp_path, name, published):
    block = [True] * (published // 20) + [False] * (published // 20)
    images = [b"x"] * (2 * published)
    assert len(bin_pairs(bin_file(tmp_path / f"{name}.bin", block * 10, images)).same) == published
    path = bin_file(tmp_path / f"{name}.bin", block * 9, images[: 36 * len(block) // 2])
    refused(lambda: bin_pairs(path), f"{9 * len(block):,} pairs instead of {published:,}")
    assert len(bin_pairs(path, counts="any").same) == 9 * len(block)


def test_published_numbers_are_those_of_the_protocols():
    """LFW, CALFW, CPLFW, AgeDB-30: 10 folds of 300 + 300; CFP: 10 folds of 350 + 350."""
    assert faces.PAIRS == {
        "lfw": 10 * (300 + 300), "calfw": 10 * (300 + 300), "cplfw": 10 * (300 + 300),
        "agedb_30": 10 * (300 + 300), "cfp_ff": 10 * (350 + 350), "cfp_fp": 10 * (350 + 350),
    }  # fmt: skip
    assert faces.CASIA == {"identities": 10_575, "images": 494_414}
    assert faces.VGGFACE2 == {"train": 8_631, "test": 500}
    assert faces.UMDFACES == {"identities": 8_277, "images": 367_888}


# -- LFW -----------------------------------------------------------------------------------------

PEOPLE = {"Abel_Pacheco": 4, "Zoë-Ann_O'Hara": 3, "X_2": 12}


def lfw_list(folds: int, half: int) -> tuple[str, list[tuple[str, str, bool]]]:
    """The list, and what it says."""
    rng = np.random.default_rng(1)
    names = list(PEOPLE)
    lines, said = [f"{folds}\t{half}"], []
    for _ in range(folds):
        for _ in range(half):
            a = names[rng.integers(3)]
            i, j = rng.choice(PEOPLE[a], 2, replace=False) + 1
            lines.append(f"{a}\t{i}\t{j}")
            said.append((f"{a}/{a}_{i:04d}", f"{a}/{a}_{j:04d}", True))
        for _ in range(half):
            a, b = rng.choice(names, 2, replace=False)
            i, j = rng.integers(PEOPLE[a]) + 1, rng.integers(PEOPLE[b]) + 1
            lines.append(f"{a}\t{i}\t{b}\t{j}")
            said.append((f"{a}/{a}_{i:04d}", f"{b}/{b}_{j:04d}", False))
    return "\n".join(lines) + "\n", said


def lfw_tree(root: Path, suffix: str = ".jpg") -> dict[str, int]:
    """PNG data under any suffix: the decoder looks at the bytes."""
    return tree(root, [f"{n}/{n}_{i:04d}{suffix}" for n, c in PEOPLE.items()
                       for i in range(1, c + 1)])  # fmt: skip


@pytest.mark.parametrize("suffix", [".jpg", ".png"])
@pytest.mark.parametrize("beside", [False, True])
def test_lfw_at_published_size(tmp_path, suffix, beside):
    root = tmp_path / "lfw-112"
    numbers = lfw_tree(root, suffix)
    text, said = lfw_list(10, 300)
    put((tmp_path if beside else root) / "pairs.txt", text)
    pairs = lfw(root)
    assert (pairs.name, pairs.folds) == ("lfw", 10)
    assert rows(pairs) == [(a + suffix, b + suffix, s) for a, b, s in said]
    check_folds(pairs)
    items = pairs.items
    assert len({items.name(i) for i in range(len(items))}) == len(items) == sum(PEOPLE.values())
    for i in range(len(items)):
        assert np.array_equal(items.image(i), pixels(numbers[items.name(i)]))
    names = sorted(PEOPLE)
    assert [names[k] for k in items.labels] == [
        items.name(i).split("/")[0] for i in range(len(items))
    ]


def test_lfw_counts_and_folds_come_from_the_header(tmp_path):
    lfw_tree(tmp_path)
    text, said = lfw_list(3, 4)
    path = put(tmp_path / "pairs.txt", text.replace("\n", "\r\n"))
    refused(lambda: lfw(tmp_path), "3 folds instead of 10, 24 pairs instead of 6,000")
    pairs = lfw(tmp_path, path, counts="any")
    assert pairs.folds == 3 and [row[2] for row in rows(pairs)] == [s for _, _, s in said]
    check_folds(pairs)


def test_lfw_view_1_has_no_folds_and_is_spread(tmp_path):
    lfw_tree(tmp_path)
    text, said = lfw_list(1, 500)
    path = put(tmp_path / "pairsDevTest.txt", text.removeprefix("1\t"))
    pairs = lfw(tmp_path, path)
    check_folds(pairs)
    assert pairs.same.reshape(10, 100)[:, :50].all() and pairs.same.sum() == 500
    assert sorted(rows(pairs)) == sorted((a + ".jpg", b + ".jpg", s) for a, b, s in said)
    put(path, lfw_list(1, 499)[0].removeprefix("1\t"))
    refused(lambda: lfw(tmp_path, path), "998 pairs instead of 1,000")


def test_missing_images_are_counted_and_the_first_is_named(tmp_path):
    lfw_tree(tmp_path)
    path = put(tmp_path / "pairs.txt", lfw_list(10, 300)[0])
    for number in (3, 7):
        (tmp_path / "X_2" / f"X_2_{number:04d}.jpg").unlink()
    message = refused(lambda: lfw(tmp_path), "2 of its 19 images are not in")
    assert str(path) in message and "X_2/X_2_000" in message


@pytest.mark.parametrize(
    ("line", "text"),
    [
        (1, ""),
        (1, "ten 300"),
        (1, "10"),
        (1, "10 2 3"),
        (1, "0 2"),
        (1, "-10 2"),
        (2, "Abel_Pacheco 1"),
        (2, "Abel_Pacheco 1 2 3"),
        (2, "Abel_Pacheco one 2"),
        (2, "Abel_Pacheco -1 2"),
        (2, "Abel_Pacheco ² 2"),
        (2, "../Abel_Pacheco 1 2"),
        (2, ".. 1 2"),
        (2, "a\\b 1 2"),
        (2, "a\0b 1 2"),
        (2, ""),
        (4, "Abel_Pacheco 1 2"),
        (4, "Abel_Pacheco 1 X_2"),
        (4, "Abel_Pacheco 1 ../X_2 2"),
        (4, "1 Abel_Pacheco 2 X_2"),
    ],
)
def test_malformed_lines_of_lfw_are_named(tmp_path, line, text):
    lfw_tree(tmp_path)
    lines = lfw_list(10, 2)[0].splitlines()
    lines[line - 1] = text
    path = put(tmp_path / "pairs.txt", "\n".join(lines))
    message = refused(lambda: lfw(tmp_path, counts="any"), "expected|its header says")
    assert message.startswith(str(path))
    assert f"line {line}: " in message or (line, text) == (1, "10")


def test_files_that_are_no_lists(tmp_path):
    lfw_tree(tmp_path)
    refused(lambda: lfw(tmp_path), "pairs.txt: no such file")
    put(tmp_path / "pairs.txt", "\n")
    refused(lambda: lfw(tmp_path), "pairs.txt: empty")
    put(tmp_path / "pairs.txt", b"10\t1\n\xff\xfe\n")
    refused(lambda: lfw(tmp_path), "pairs.txt: byte 5: not text")
    put(tmp_path / "pairs.txt", lfw_list(10, 2)[0] + "Abel_Pacheco\t1\t2\n")
    refused(lambda: lfw(tmp_path), r"41 lines of pairs, its header says 40 \(10 times 2 \+ 2\)")


# -- CALFW, CPLFW --------------------------------------------------------------------------------


def two_lines(tokens: list[int]) -> tuple[str, list[tuple[str, str, int]]]:
    said = []
    for k, token in enumerate(tokens):
        a = f"Person_{k % 7}_{k % 3 + 1:04d}.jpg"
        b = f"Person_{(k + (token == 0)) % 7}_0009.jpg"
        said.append((a, b, token))
    return "".join(f"{a} {t}\n{b} {t}\n" for a, b, t in said), said


@pytest.mark.parametrize(("read", "name"), [(calfw, "CALFW"), (cplfw, "CPLFW")])
@pytest.mark.parametrize("ordered", [True, False])
def test_two_line_lists_at_published_size(tmp_path, read, name, ordered):
    """Positives stand in the fold of their token, negatives fill each in the list's order."""
    tokens = [k // 300 + 1 for k in range(3_000)] + [0] * 3_000
    if not ordered:
        tokens = np.random.default_rng(0).permutation(tokens).tolist()
    text, said = two_lines(tokens)
    put(tmp_path / f"pairs_{name}.txt", text)
    tree(tmp_path / "aligned images", [file for a, b, _ in said for file in (a, b)])
    tree(tmp_path / "images", ["other.jpg"])
    pairs = read(tmp_path)
    check_folds(pairs)
    found = rows(pairs)
    negatives = [(a, b, False) for a, b, token in said if token == 0]
    for k in range(10):
        block = found[600 * k : 600 * (k + 1)]
        assert [r for r in block if r[2]] == [(a, b, True) for a, b, t in said if t == k + 1]
        assert [r for r in block if not r[2]] == negatives[300 * k : 300 * (k + 1)]
    items = pairs.items
    persons = [items.name(i).rsplit("_", 1)[0] for i in range(len(items))]
    assert [sorted(set(persons))[k] for k in items.labels] == persons


def test_a_list_of_zeros_and_ones_is_spread_in_its_order(tmp_path):
    text, said = two_lines(([1] * 300 + [0] * 300) * 10)
    put(tmp_path / "pairs_CPLFW.txt", text)
    tree(tmp_path / "images", [file for a, b, _ in said for file in (a, b)])
    pairs = cplfw(tmp_path)
    check_folds(pairs)
    assert rows(pairs) == [(a, b, t == 1) for a, b, t in said]  # it was in folds already


def test_aligned_copies_may_be_png(tmp_path):
    text, said = two_lines([1, 0] * 10)
    put(tmp_path / "pairs_CALFW.txt", text)
    tree(
        tmp_path / "aligned images", [f.replace(".jpg", ".png") for a, b, _ in said for f in (a, b)]
    )
    assert calfw(tmp_path, counts="any").items.name(0) == "Person_0_0001.png"


def test_folds_that_cannot_be_balanced_are_refused(tmp_path):
    for tokens in ([1] * 30 + [2] * 2 + [0] * 30, [1] * 9 + [0] * 40, [1] * 40 + [0] * 9, [3] * 40):
        put(tmp_path / "pairs_CALFW.txt", two_lines(tokens)[0])
        tree(tmp_path, [f for a, b, _ in two_lines(tokens)[1] for f in (a, b)])
        refused(lambda: calfw(tmp_path, counts="any"), "pairs_CALFW.txt: .*both kinds")


@pytest.mark.parametrize(
    ("line", "text"),
    [
        (1, "a.jpg"), (1, "a.jpg 1 1"), (3, "a.jpg 11"), (3, "a.jpg x"), (3, "a.jpg -1"), (3, ""),
        (3, "../a.jpg 0"), (2, "a.jpg 0"), (3, "a/b.jpg 0"), (3, "a.jpg 01"),
    ],
)  # fmt: skip
def test_malformed_lines_of_two_line_lists_are_named(tmp_path, line, text):
    lines = two_lines([1, 0] * 10)[0].splitlines()
    lines[line - 1] = text
    path = put(tmp_path / "pairs_CALFW.txt", "\n".join(lines))
    message = refused(lambda: calfw(tmp_path, counts="any"), f"line {line}: expected")
    assert message.startswith(str(path))


def test_an_odd_line_and_wrong_counts_are_refused(tmp_path):
    path = put(tmp_path / "pairs_CALFW.txt", two_lines([1, 0] * 10)[0] + "a.jpg 0\n")
    refused(lambda: calfw(tmp_path), f"{re.escape(str(path))}: 41 lines, needs two a pair")
    put(path, two_lines([1, 0] * 10)[0])
    refused(lambda: calfw(tmp_path), "20 pairs instead of 6,000")
    refused(lambda: calfw(tmp_path, counts="any"), "images are not in .*Person_0_0001.jpg")


# -- CFP -----------------------------------------------------------------------------------------


def cfp_tree(root: Path, half: int) -> dict[str, list[tuple[str, str, bool]]]:
    """40 people, 2 frontal and 1 profile image each; what the protocol says, per view."""
    lists = {
        "F": [f"Data/Images/{p:03d}/frontal/{k:02d}.jpg" for p in range(1, 41) for k in (1, 2)],
        "P": [f"Data/Images/{p:03d}/profile/01.jpg" for p in range(1, 41)],
    }
    tree(root, lists["F"] + lists["P"])
    for kind, files in lists.items():
        lines = [f"{k} ../{file}" for k, file in enumerate(files, 1)]
        put(root / "Protocol" / f"Pair_list_{kind}.txt", "\n".join(lines) + "\n")
    rng, said = np.random.default_rng(2), {}
    for view in ("FF", "FP"):
        said[view] = []
        for fold in range(1, 11):
            for kind in ("same", "diff"):
                lines = []
                for _ in range(half):
                    i, j = (rng.integers(len(lists[side])) for side in view)
                    lines.append(f"{i + 1},{j + 1}")
                    said[view].append((lists["F"][i], lists[view[1]][j], kind == "same"))
                folder = root / "Protocol" / "Split" / view / f"{fold:02d}"
                put(folder / f"{kind}.txt", "\n".join(lines) + "\n")
    return said


def test_cfp_at_published_size(tmp_path):
    said = cfp_tree(tmp_path, 350)
    for view in ("FF", "FP"):
        pairs = cfp(tmp_path, view)
        assert pairs.name == f"cfp_{view.lower()}" and rows(pairs) == said[view]
        check_folds(pairs)
    items = pairs.items
    assert {items.name(i).split("/")[3] for i in pairs.first} == {"frontal"}
    assert {items.name(i).split("/")[3] for i in pairs.second} == {"profile"}
    assert [f"{k + 1:03d}" for k in items.labels] == [
        items.name(i).split("/")[2] for i in range(len(items))
    ]


def test_cfp_refuses_damaged_protocols(tmp_path):
    cfp_tree(tmp_path, 2)
    refused(lambda: cfp(tmp_path, "FF"), "40 pairs instead of 7,000")
    assert len(cfp(tmp_path, "FP", counts="any").same) == 40
    same = tmp_path / "Protocol/Split/FP/07/same.txt"
    for bad in ("1", "1,2,3", "1;2", "0,1", "1,41", "01,1", "a,b"):
        put(same, f"1,1\n{bad}\n")
        message = refused(lambda: cfp(tmp_path, "FP", counts="any"), "line 2: expected two numbers")
        assert message.startswith(str(same))
    put(same, "1,1\n")
    refused(lambda: cfp(tmp_path, "FP", counts="any"), "folds of .*must be equal")
    same.unlink()
    refused(lambda: cfp(tmp_path, "FP", counts="any"), "07/same.txt: no such file")
    for bad in ("1", "x ../a.jpg", "2 ../Data/a.jpg\n2 ../b.jpg", "1 ../../a.jpg", "1 /etc/a.jpg"):
        path = put(tmp_path / "Protocol/Pair_list_F.txt", bad)
        refused(
            lambda: cfp(tmp_path, "FF", counts="any"), f"{re.escape(str(path))}: line [12]: exp"
        )


# -- training faces ------------------------------------------------------------------------------


def test_folders_of_identities_are_numbered_in_sorted_order(tmp_path):
    files = ["0000102/002.jpg", "0000102/001.jpg", "0000045/010.JPG", "0000045/009.png"]
    numbers = tree(tmp_path, files)
    put(tmp_path / "0000045/Thumbs.db", "x")
    put(tmp_path / "names.txt", "x")
    (tmp_path / ".cache").mkdir()
    refused(lambda: casia(tmp_path), "2 identities instead of 10,575, 4 images instead of 494,414")
    items, names = casia(tmp_path, counts="any")
    assert names == ["0000045", "0000102"]
    assert [items.name(i) for i in range(4)] == sorted(files)
    assert items.labels.tolist() == [0, 0, 1, 1] and items.boxes is None
    assert all(np.array_equal(items.image(i), pixels(numbers[items.name(i)])) for i in range(4))
    put(tmp_path / "0000500/readme", "x")
    refused(lambda: casia(tmp_path, counts="any"), "0000500: no image in it")
    refused(lambda: casia(tmp_path / "absent", counts="any"), "absent: no such folder")
    (tmp_path / "empty").mkdir()
    refused(lambda: casia(tmp_path / "empty", counts="any"), "empty: no folders in it")


def test_vggface2_splits(tmp_path):
    tree(tmp_path / "train", ["n000003/0001_01.jpg", "n000002/0001_01.jpg", "n000002/0002_01.jpg"])
    tree(tmp_path / "test", [f"n{k:06d}/0001_01.jpg" for k in range(500)])
    refused(lambda: vggface2(tmp_path), "2 identities instead of 8,631")
    items, names = vggface2(tmp_path, counts="any")
    assert names == ["n000002", "n000003"] and items.labels.tolist() == [0, 0, 1]
    assert len(vggface2(tmp_path, "test")[1]) == 500


COLUMNS = "SUBJECT_ID,FILE,FACE_ID,UF,FACE_X,FACE_Y,FACE_WIDTH,FACE_HEIGHT,YAW"


def umd_tree(root: Path) -> None:
    """Subject numbers start anew in each batch; one image shows two faces of one list row each."""
    rows_1 = ["1,zoe/zoe_1.jpg,7,0,1.5,2,10,20.25,0", "2,abe/abe_1.jpg,8,0,0,0,4,4,0",
              '1,"zoe/zoe_2.jpg",9,0,-3,1e1,5,6,0']  # fmt: skip
    rows_2 = ["1,kim/kim_1.jpg,7,0,1,1,2,2,0"]
    for batch, rows_ in ((1, rows_1), (2, rows_2)):
        folder = root / f"umdfaces_batch{batch}"
        put(folder / f"umdfaces_batch{batch}_ultraface.csv", "\n".join([COLUMNS, *rows_]) + "\n")
        tree(folder, [row.split(",")[1].strip('"') for row in rows_])


def test_umdfaces_boxes_and_identities(tmp_path):
    umd_tree(tmp_path)
    refused(
        lambda: umdfaces(tmp_path), "3 identities instead of 8,277, 4 images instead of 367,888"
    )
    items, names = umdfaces(tmp_path, counts="any")
    assert names == ["abe", "kim", "zoe"] and items.labels.tolist() == [2, 0, 2, 1]
    assert items.name(2) == "umdfaces_batch1/zoe/zoe_2.jpg"
    assert items.name(3) == "umdfaces_batch2/kim/kim_1.jpg"
    assert items.boxes.tolist() == [
        [1.5, 2, 11.5, 22.25], [0, 0, 4, 4], [-3, 10, 2, 16], [1, 1, 3, 3]
    ]  # fmt: skip
    assert items.image(0).shape == (2, 2, 3)
    one, _ = umdfaces(tmp_path / "umdfaces_batch2", counts="any")  # one batch alone
    assert one.name(0) == "kim/kim_1.jpg" and one.image(0).shape == (2, 2, 3)
    for batch in (1, 2):  # the lists beside the folders
        name = f"umdfaces_batch{batch}_ultraface.csv"
        (tmp_path / f"umdfaces_batch{batch}" / name).rename(tmp_path / name)
    moved, _ = umdfaces(tmp_path, counts="any")
    assert moved.files == items.files and np.array_equal(moved.boxes, items.boxes)


@pytest.mark.parametrize(
    "row",
    [
        "",
        "1,abe/abe_1.jpg,8,0,0,0,4",
        "1,abe/abe_1.jpg,8,0,0,0,4,0,0",
        "1,abe/abe_1.jpg,8,0,0,0,-4,4,0",
        "1,abe/abe_1.jpg,8,0,nan,0,4,4,0",
        "1,abe/abe_1.jpg,8,0,0,nan,4,4,0",
        "1,abe/abe_1.jpg,8,0,0,0,inf,4,0",
        "1,abe/abe_1.jpg,8,0,1e9,0,4,4,0",
        "1,abe/abe_1.jpg,8,0,x,0,4,4,0",
        "1,abe.jpg,8,0,0,0,4,4,0",
        "1,../abe.jpg,8,0,0,0,4,4,0",
        "1,abe/../x.jpg,8,0,0,0,4,4,0",
        "1,abe/" + "x" * 200_000 + ",8,0,0,0,4,4,0",
    ],
)
def test_malformed_rows_of_umdfaces_are_named(tmp_path, row):
    umd_tree(tmp_path)
    path = tmp_path / "umdfaces_batch2/umdfaces_batch2_ultraface.csv"
    put(path, f"{COLUMNS}\n1,kim/kim_1.jpg,7,0,1,1,2,2,0\n{row}\n")
    message = refused(lambda: umdfaces(tmp_path, counts="any"), "line 3: expected FILE")
    assert message.startswith(str(path)) and len(message) < 400


def test_umdfaces_says_what_is_missing(tmp_path):
    refused(lambda: umdfaces(tmp_path), "no umdfaces_batch")
    umd_tree(tmp_path)
    (tmp_path / "umdfaces_batch1/zoe/zoe_2.jpg").unlink()
    refused(lambda: umdfaces(tmp_path), "1 of its 3 images are not in .*zoe/zoe_2.jpg the first")
    path = tmp_path / "umdfaces_batch1/umdfaces_batch1_ultraface.csv"
    put(path, "FILE,SUBJECT_ID,FACE_X\n")
    refused(lambda: umdfaces(tmp_path), "line 1: no column FACE_Y, FACE_WIDTH, FACE_HEIGHT")
    put(path, b"\xff\xfe" * 50)
    refused(lambda: umdfaces(tmp_path), f"{re.escape(str(path))}: ")


# -- damage --------------------------------------------------------------------------------------


@pytest.mark.slow
@settings(deadline=None, derandomize=True, max_examples=1_500)
@given(st.data())
def test_damaged_lists_are_errors_that_name_the_file_or_sound_pairs(tmp_path_factory, data):
    root = tmp_path_factory.getbasetemp() / "damaged-lists"
    if not root.exists():
        lfw_tree(root)
        tree(root, [f for a, b, _ in two_lines([1, 0] * 20)[1] for f in (a, b)])
    kind = data.draw(st.sampled_from(["pairs.txt", "pairs_CALFW.txt"]))
    text = lfw_list(10, 2)[0] if kind == "pairs.txt" else two_lines([1, 0] * 20)[0]
    raw = bytearray(text.encode())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(raw)))
        raw[at : at + data.draw(st.integers(0, 9))] = data.draw(
            st.binary(max_size=4)
            | st.sampled_from([b"\n", b"\t", b" 1", b"\0", b"/", b"\x1d", b"0"])
        )
    put(root / kind, bytes(raw))
    try:
        pairs = (lfw if kind == "pairs.txt" else calfw)(root, counts="any")
    except ValueError as error:
        assert str(root) in str(error) and "\n" not in str(error)
    else:
        check_folds(pairs)

"""Retrieval readers on trees in the true formats, written here line by line."""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import scipy.io
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from shared.data import retrieval
from shared.data.retrieval import Retrieval, cars196, cub, sop

NAMES = [f"Maker Model {k} 2012" for k in range(1, 196)] + ["Ram C/V Cargo Van Minivan 2012"]


def jpeg(path: Path, level: int, mode: str = "RGB") -> None:
    """20 x 16 px of one grey level."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (20, 16), level).convert(mode).save(path, "JPEG")


def facts(found: Retrieval) -> dict[str, tuple]:
    """By file: part, label, box."""
    return {
        file: (part, int(images.labels[k]), None if images.boxes is None else (*images.boxes[k],))
        for part, images in (("train", found.train), ("test", found.test))
        for k, file in enumerate(images.files)
    }


def refused(read: Callable[[], object]) -> str:
    """The message of a ValueError of one line."""
    with pytest.raises(ValueError) as error:
        read()
    assert "\n" not in str(error.value) and len(str(error.value)) < 600
    return str(error.value)


# -- CUB-200-2011 --------------------------------------------------------------------------------

BIRDS = {
    1: ("001.Black_footed_Albatross/Black_Footed_Albatross_0046_18.jpg", 1, (60, 27, 325, 304)),
    2: ("001.Black_footed_Albatross/Black_Footed_Albatross_0009_34.jpg", 1, (139, 30, 153, 264)),
    3: ("100.Brown_Pelican/Brown_Pelican_0122_94022.jpg", 100, (14, 112, 388, 186)),
    4: ("101.White_Pelican/White_Pelican_0080_96834.jpg", 101, (112.5, 90, 255, 242)),
    5: ("200.Common_Yellowthroat/Common_Yellowthroat_0003_190521.jpg", 200, (0, 50, 206, 301)),
}


def cub_tree(root: Path, newline: str = "\n") -> Path:
    home = root / "CUB_200_2011"
    for number, (file, _, _) in BIRDS.items():
        jpeg(home / "images" / file, 40 * number, "L" if number == 4 else "RGB")
    jpeg(home / "images" / "001.Black_footed_Albatross" / "not_listed.jpg", 0)
    lists = {
        "images.txt": [f"{k} {file}" for k, (file, _, _) in BIRDS.items()],
        "image_class_labels.txt": [f"{k} {label}" for k, (_, label, _) in BIRDS.items()],
        "bounding_boxes.txt": [
            f"{k} {' '.join(f'{v:.1f}' for v in box)}" for k, (_, _, box) in BIRDS.items()
        ],
        "train_test_split.txt": ["nothing that anybody reads"],
    }
    for name, lines in lists.items():
        (home / name).write_bytes("".join(line + newline for line in lines).encode())
    return home


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_cub_is_split_by_class_with_corners_of_its_boxes(tmp_path: Path, newline: str) -> None:
    home = cub_tree(tmp_path, newline)
    for root in (home, tmp_path):
        found = cub(root, "any")
        assert facts(found) == {
            f"images/{file}": ("train" if k <= 3 else "test", label - 1, (x, y, x + w, y + h))
            for k, (file, label, (x, y, w, h)) in BIRDS.items()
        }
        assert found.train.name(1) == f"images/{BIRDS[2][0]}" and len(found.names) == 200
        assert found.names[0] == "Black_footed_Albatross" and found.names[1] == ""
        assert found.names[199] == "Common_Yellowthroat"
        assert found.train.labels.dtype == np.int64


def test_images_are_decoded_when_asked_for_also_grey_ones_and_after_pickling(
    tmp_path: Path,
) -> None:
    found = pickle.loads(pickle.dumps(cub(cub_tree(tmp_path), "any")))
    for part, k, level in ((found.train, 1, 80), (found.test, 0, 160)):
        image = part.image(k)
        assert image.shape == (16, 20, 3) and image.dtype == np.uint8
        assert (np.abs(image.astype(int) - level) <= 2).all()


def test_lists_are_joined_by_image_id_not_by_line(tmp_path: Path) -> None:
    home = cub_tree(tmp_path)
    before = facts(cub(home, "any"))
    for name in ("images.txt", "image_class_labels.txt", "bounding_boxes.txt"):
        lines = (home / name).read_text().splitlines()
        order = np.random.default_rng(len(name)).permutation(len(lines))
        (home / name).write_text("\n".join(lines[k] for k in order) + "\n\n")
    assert facts(cub(home, "any")) == before


@pytest.mark.parametrize(
    ("name", "old", "new", "words"),
    [
        ("images.txt", b"2 001.Black_footed", b"2 Black_footed", "images.txt, line 2: expected <i"),
        ("images.txt", b"3 100.", b"3 extra 100.", "images.txt, line 3: expected <image id> <cl"),
        ("images.txt", b"Pelican_0122", b"Pelic\xe4n_0122", "images.txt, line 3: expected"),
        ("images.txt", b"0009_34", b"0009_35", "1 of the 5 images it names are not there, the fi"),
        ("images.txt", b"2 001", b"1 001", "images.txt: image 1 has two lines"),
        ("images.txt", b"Albatross_0009_34", b"Albatross_0046_18", "names images/001.*_18.jpg tw"),
        ("image_class_labels.txt", b"5 200", b"5 201", "labels.txt, line 5: expected .*1-200>, fo"),
        ("image_class_labels.txt", b"5 200", b"5 0", "image_class_labels.txt, line 5: expected"),
        ("image_class_labels.txt", b"5 200", b"5", "image_class_labels.txt, line 5: expected"),
        ("image_class_labels.txt", b"5 200", b"6 200", "ids are not those of images.txt .2 diff"),
        ("image_class_labels.txt", b"5 200", b"", "ids are not those of images.txt .1 diff"),
        ("image_class_labels.txt", b"3 100", b"3 101", "image 3 has class 101, but it is 100.Br"),
        ("bounding_boxes.txt", b"153.0", b"0.0", "bounding_boxes.txt, line 2: expected"),
        ("bounding_boxes.txt", b"153.0", b"nan", "bounding_boxes.txt, line 2: expected"),
        ("bounding_boxes.txt", b"153.0", b"1_3", "bounding_boxes.txt, line 2: expected"),
        ("bounding_boxes.txt", b"153.0", b"9" * 400, "bounding_boxes.txt, line 2: expected"),
        ("bounding_boxes.txt", b"153.0 ", b"", "bounding_boxes.txt, line 2: expected"),
    ],
)  # fmt: skip
def test_a_damaged_list_of_cub_is_named_with_its_line(
    tmp_path: Path, name: str, old: bytes, new: bytes, words: str
) -> None:
    path = cub_tree(tmp_path) / name
    content = path.read_bytes()
    assert content.count(old) == 1
    path.write_bytes(content.replace(old, new))
    with pytest.raises(ValueError, match=words):
        cub(tmp_path, "any")
    assert str(path) in refused(lambda: cub(tmp_path, "any"))


def test_missing_things_are_named_whatever_the_counts(tmp_path: Path) -> None:
    home = cub_tree(tmp_path)
    (home / "bounding_boxes.txt").rename(home / "boxes")
    assert f"{home / 'bounding_boxes.txt'}: cannot be read" in refused(lambda: cub(home, "any"))
    (home / "boxes").rename(home / "bounding_boxes.txt")
    shutil.rmtree(home / "images")
    assert "images.txt: 5 of the 5 images it names are not" in refused(lambda: cub(home, "any"))
    (home / "images.txt").write_bytes(b"")
    assert "images.txt: nothing in it" in refused(lambda: cub(home, "any"))
    (home / "images.txt").unlink()
    assert "no CUB-200-2011 in it" in refused(lambda: cub(home, "any"))
    assert "no such folder" in refused(lambda: cub(tmp_path / "none", "any"))


def test_two_copies_below_one_parent_must_be_told_apart(tmp_path: Path) -> None:
    shutil.copytree(cub_tree(tmp_path), tmp_path / "copy")
    assert "several folders may be CUB-200-2011 (CUB_200_2011, copy)" in refused(
        lambda: cub(tmp_path, "any")
    )


def test_a_list_cannot_reach_outside_its_folder(tmp_path: Path) -> None:
    home = cub_tree(tmp_path)
    jpeg(home / "secret.jpg", 0)
    text = (home / "images.txt").read_text().replace(BIRDS[3][0], "100.Brown_Pelican/..")
    (home / "images.txt").write_text(text)
    assert "not there" in refused(lambda: cub(home, "any"))


# -- Cars196 -------------------------------------------------------------------------------------

# official part, file, box, class
CARS = [
    ("train", "00001.jpg", (39, 116, 569, 375), 14),
    ("train", "00002.jpg", (36, 116, 868, 587), 98),
    ("train", "00003.jpg", (85, 109, 601, 381), 196),
    ("test", "00001.jpg", (30, 52, 246, 147), 14),
    ("test", "00002.jpg", (100, 19, 576, 203), 99),
]  # fmt: skip


def struct(rows: list[tuple], name: str, labelled: bool = True) -> np.ndarray:
    """A 1 x N struct array as MATLAB has it: corners of 16 bits, classes of 8."""
    fields = ["bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2", *["class"] * labelled, name]
    made = np.zeros((1, len(rows)), dtype=[(field, object) for field in fields])
    for k, (file, box, label) in enumerate(rows):
        for field, value in zip(fields, (*box, *[label] * labelled, file), strict=True):
            made[field][0, k] = value if isinstance(value, str) else np.uint16(value)
    return made


def cell(names: list[str]) -> np.ndarray:
    made = np.zeros((1, len(names)), dtype=object)
    made[0, :] = names
    return made


def pooled(home: Path) -> list[str]:
    """car_ims/: one numbering of all images."""
    home.mkdir(parents=True)
    files = [f"car_ims/{k:06d}.jpg" for k in range(1, len(CARS) + 1)]
    for k, file in enumerate(files):
        jpeg(home / file, 40 * k)
    rows = [(file, box, label) for file, (_, _, box, label) in zip(files, CARS, strict=True)]
    variables = {"annotations": struct(rows, "relative_im_path"), "class_names": cell(NAMES)}
    scipy.io.savemat(home / "cars_annos.mat", variables, do_compression=True)
    return files


def devkit(home: Path, beside: bool = True, nested: bool = False) -> list[str]:
    """cars_train/, cars_test/, devkit/, and the labels of the test images that came later."""
    (home / "devkit").mkdir(parents=True)
    files = [f"cars_{part}/{f'cars_{part}/' * nested}{file}" for part, file, _, _ in CARS]
    for k, file in enumerate(files):
        jpeg(home / file, 40 * k)
    own = {part: [row[1:] for row in CARS if row[0] == part] for part in ("train", "test")}
    labelled = "cars_test_annos_withlabels.mat"
    for path, rows, classes in (
        ("devkit/cars_train_annos.mat", own["train"], True),
        ("devkit/cars_test_annos.mat", own["test"], False),
        (labelled if beside else f"devkit/{labelled}", own["test"], True),
    ):
        scipy.io.savemat(home / path, {"annotations": struct(rows, "fname", classes)})
    scipy.io.savemat(home / "devkit" / "cars_meta.mat", {"class_names": cell(NAMES)})
    return files


def csv(home: Path, nested: str = "car_data/car_data/", newline: str = "\r\n") -> list[str]:
    """Folders by class name, where the one slash of a name has become a dash."""
    home.mkdir(parents=True)
    folders = [NAMES[label - 1].replace("/", "-") for _, _, _, label in CARS]
    files = [f"{nested}{c[0]}/{f}/{c[1]}" for c, f in zip(CARS, folders, strict=True)]
    for k, file in enumerate(files):
        jpeg(home / file, 40 * k)
        (home / file).with_name("Thumbs.db").write_bytes(b"")
    for part in ("train", "test"):
        lines = [f"{c[1]},{','.join(map(str, c[2]))},{c[3]}" for c in CARS if c[0] == part]
        (home / f"anno_{part}.csv").write_bytes("".join(x + newline for x in lines).encode())
    (home / "names.csv").write_bytes("".join(name + newline for name in NAMES).encode())
    return files


LAYOUTS: dict[str, Callable[[Path], list[str]]] = {
    "car_ims": pooled,
    "devkit, test labels beside it": devkit,
    "devkit, test labels in it": lambda home: devkit(home, beside=False),
    "devkit, folders nested": lambda home: devkit(home, nested=True),
    "csv, folders nested twice": csv,
    "csv, folders nested once": lambda home: csv(home, "car_data/", "\n"),
    "csv, folders beside it": lambda home: csv(home, ""),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_of_cars_pools_the_official_parts_and_splits_by_class(
    tmp_path: Path, layout: str
) -> None:
    home = tmp_path / "stanford_cars"
    files = LAYOUTS[layout](home)
    for root in (home, tmp_path):
        found = cars196(root, "any")
        assert facts(found) == {
            file: ("train" if label <= 98 else "test", label - 1, tuple(map(float, box)))
            for file, (_, _, box, label) in zip(files, CARS, strict=True)
        }
        assert found.names == tuple(NAMES)
        assert [found.train.image(k)[0, 0, 0] // 38 for k in range(3)] == [0, 1, 3]
        assert [found.test.image(k)[0, 0, 0] // 38 for k in range(2)] == [2, 4]


def test_one_annotation_is_an_array_of_one(tmp_path: Path) -> None:
    devkit(tmp_path / "c")
    one = {"annotations": struct([("00002.jpg", (1, 2, 3, 4), 99)], "fname")}
    scipy.io.savemat(tmp_path / "c" / "cars_test_annos_withlabels.mat", one)
    found = cars196(tmp_path, "any")
    assert found.test.files == ["cars_train/00003.jpg", "cars_test/00002.jpg"]
    assert found.test.boxes.tolist() == [[85, 109, 601, 381], [1, 2, 3, 4]]


def test_classes_saved_again_as_doubles_are_whole_numbers(tmp_path: Path) -> None:
    devkit(tmp_path / "c")
    rows = struct([("00002.jpg", (1, 2, 3, 4), 99)], "fname")
    rows["class"][0, 0] = np.float64(99)
    path = tmp_path / "c" / "cars_test_annos_withlabels.mat"
    scipy.io.savemat(path, {"annotations": rows})
    assert cars196(tmp_path, "any").test.labels.tolist() == [195, 98]


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("class", 197, r"annos\.mat, annotation 2: expected a file, a box of numbers and a class"),
        ("class", 14.5, "annotation 2: expected"),
        ("class", np.array([14, 15]), "annotation 2: expected"),
        ("class", np.zeros(0), "annotation 2: expected"),
        ("bbox_x2", 36, "annotation 2: expected a box x1 < x2, y1 < y2, found 36, 116, 36, 587"),
        ("bbox_x2", np.nan, "annotation 2: expected"),
        ("bbox_x2", "wide", "annotation 2: expected"),
        ("fname", "00009.jpg", "1 of the 3 images it names are not there, the first: '00009.jpg'"),
        ("fname", "", "1 of the 3 images it names are not there"),
        ("fname", "00001.jpg", "names 00001.jpg twice"),
    ],
)
def test_a_bad_annotation_is_named_by_number(tmp_path, field, value, words) -> None:
    devkit(tmp_path / "c")
    rows = struct([row[1:] for row in CARS if row[0] == "train"], "fname")
    rows[field][0, 1] = value
    path = tmp_path / "c" / "devkit" / "cars_train_annos.mat"
    scipy.io.savemat(path, {"annotations": rows})
    with pytest.raises(ValueError, match=words):
        cars196(tmp_path, "any")
    assert str(path) in refused(lambda: cars196(tmp_path, "any"))


@pytest.mark.parametrize(
    "variables",
    [
        {"annotations": struct([("00001.jpg", (1, 2, 3, 4), 0)], "fname", labelled=False)},
        {"annotations": np.arange(6)},
        {"annotations": np.zeros((0, 0))},
        {"annotations": struct([], "fname")},
        {"other": 1},
    ],
)
def test_a_mat_file_of_other_content_is_refused(tmp_path: Path, variables: dict) -> None:
    devkit(tmp_path / "c")
    scipy.io.savemat(tmp_path / "c" / "devkit" / "cars_train_annos.mat", variables)
    words = refused(lambda: cars196(tmp_path, "any"))
    assert "cars_train_annos.mat: expected a struct array 'annotations' with the fields" in words


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"class_names": np.arange(196)}, "expected a cell array 'class_names' of strings"),
        ({"class_names": np.zeros((0, 0))}, "expected a cell array 'class_names' of strings"),
        ({"class_names": cell(NAMES[:1])}, "1 class names; Cars196 has 196"),
        ({"names": cell(NAMES)}, "expected a cell array 'class_names' of strings"),
    ],
)
def test_class_names_must_be_196_strings(tmp_path: Path, variables: dict, words: str) -> None:
    devkit(tmp_path / "c")
    scipy.io.savemat(tmp_path / "c" / "devkit" / "cars_meta.mat", variables)
    assert words in refused(lambda: cars196(tmp_path, "any"))


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b"00002.jpg,36,116,868,587", "line 2: expected file,x1,y1,x2,y2,class (1-196), found"),
        (b"00002.jpg,36,116,868,587,98,9", "line 2: expected file,x1"),
        (b"00002.jpg,36,116,868,587,197", "line 2: expected file,x1"),
        (b"00002.jpg,36,116,30,587,98", "line 2: expected a box x1 < x2"),
        (b"\xff\xfe.jpg,36,116,868,587,98", "line 2: expected file,x1"),
        (b"", "line 2: expected file,x1"),
        (b"../test/x/00002.jpg,36,116,868,587,98", "1 of the 3 images it names are not there"),
        (b"00001.jpg,36,116,868,587,98", "names 00001.jpg twice"),
    ],
)
def test_a_bad_line_of_a_csv_is_named(tmp_path: Path, line: bytes, words: str) -> None:
    csv(tmp_path / "c")
    path = tmp_path / "c" / "anno_train.csv"
    lines = path.read_bytes().split(b"\r\n")
    path.write_bytes(b"\r\n".join([lines[0], line, *lines[2:]]))
    message = refused(lambda: cars196(tmp_path, "any"))
    assert words in message and str(path) in message


def test_what_is_missing_of_cars_is_named(tmp_path: Path) -> None:
    assert "no Cars196 in it or in a folder of it: no cars_annos.mat or devkit/" in refused(
        lambda: cars196(tmp_path, "any")
    )
    devkit(tmp_path / "a" / "b")
    (tmp_path / "a" / "b" / "cars_test_annos_withlabels.mat").unlink()
    assert "devkit/cars_test_annos_withlabels.mat: no such file" in refused(
        lambda: cars196(tmp_path / "a", "any")
    )
    pooled(tmp_path / "p" / "b")
    shutil.rmtree(tmp_path / "p" / "b" / "car_ims")
    assert "but not its images (car_ims/)" in refused(lambda: cars196(tmp_path / "p", "any"))
    files = csv(tmp_path / "d" / "b")
    again = tmp_path / "d" / "b" / files[0].replace(NAMES[13], NAMES[14])
    jpeg(again, 1)
    message = refused(lambda: cars196(tmp_path / "d", "any"))
    assert "two images of one name" in message and files[0] in message and NAMES[14] in message


# -- Stanford Online Products --------------------------------------------------------------------

HEADER = "image_id class_id super_class_id path"
# image, class, kind, path
PRODUCTS = {
    "Ebay_train.txt": [
        (1, 1, 1, "bicycle_final/111085122871_0.JPG"),
        (2, 1, 1, "bicycle_final/111085122871_1.JPG"),
        (3, 2, 1, "bicycle_final/111265328556_0.JPG"),
        (4, 11318, 12, "toaster_final/390838796852_2.JPG"),
    ],
    "Ebay_test.txt": [
        (59552, 11319, 1, "bicycle_final/251952414262_0.JPG"),
        (59553, 22634, 8, "mug_final/400917344700_1.JPG"),
    ],
}  # fmt: skip


def sop_tree(root: Path, newline: str = "\n") -> Path:
    home = root / "Stanford_Online_Products"
    for name, rows in PRODUCTS.items():
        for image, _, _, file in rows:
            jpeg(home / file, image % 250)
        lines = [HEADER, *(" ".join(map(str, row)) for row in rows)]
        (home / name).write_bytes("".join(line + newline for line in lines).encode())
    return home


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_the_two_lists_of_sop_are_the_split(tmp_path: Path, newline: str) -> None:
    home = sop_tree(tmp_path, newline)
    for root in (home, tmp_path):
        found = sop(root, "any")
        assert facts(found) == {
            file: (part, label - 1, None)
            for part, name in (("train", "Ebay_train.txt"), ("test", "Ebay_test.txt"))
            for _, label, _, file in PRODUCTS[name]
        }
        assert found.names[1] == "bicycle 2" and found.names[22633] == "mug 22634"
        assert found.names[5] == "" and len(found.names) == 22634
        assert found.train.image(3).shape == (16, 20, 3)


@pytest.mark.parametrize(
    ("name", "old", "new", "words"),
    [
        ("Ebay_train.txt", b"image_id ", b"", "Ebay_train.txt, line 1: expected image_id class_id"),
        ("Ebay_train.txt", HEADER.encode() + b"\n", b"", "line 1: expected image_id class_id"),
        ("Ebay_train.txt", b"\n3 2 1 ", b"\n3 2 ", "Ebay_train.txt, line 4: expected image_id cla"),
        ("Ebay_train.txt", b"\n3 2 1 ", b"\n3 22635 1 ", "line 4: expected .*class_id at most 226"),
        ("Ebay_train.txt", b"\n3 2 1 ", b"\n3 2 13 ", "Ebay_train.txt, line 4: expected image_id"),
        ("Ebay_train.txt", b"\n3 2 1 ", b"\n3 \xb2 1 ", "Ebay_train.txt, line 4: expected image"),
        ("Ebay_train.txt", b"871_1", b"871_7", "1 of the 4 images it names are not there, the"),
        ("Ebay_train.txt", b"871_1", b"871_0", "names bicycle_final/111085122871_0.JPG twice"),
        ("Ebay_test.txt", b" 11319 ", b" 11318 ", "class 11318 is in Ebay_train.txt too"),
        ("Ebay_test.txt", b"251952414262_0", b"111085122871_0", "871_0.JPG is in Ebay_train.txt t"),
    ],
)  # fmt: skip
def test_a_damaged_list_of_sop_is_named_with_its_line(
    tmp_path: Path, name: str, old: bytes, new: bytes, words: str
) -> None:
    path = sop_tree(tmp_path) / name
    content = path.read_bytes()
    assert content.count(old) == 1
    path.write_bytes(content.replace(old, new))
    with pytest.raises(ValueError, match=words):
        sop(tmp_path, "any")
    assert str(path) in refused(lambda: sop(tmp_path, "any"))


# -- published counts ----------------------------------------------------------------------------


def test_a_set_that_is_not_complete_is_refused_unless_asked_for(tmp_path: Path) -> None:
    cub_tree(tmp_path / "cub")
    devkit(tmp_path / "cars")
    sop_tree(tmp_path / "sop")
    message = refused(lambda: cub(tmp_path / "cub"))
    assert "3 training images instead of 5,864" in message and "--data.counts any" in message
    assert "2 test classes instead of 100" in message
    message = refused(lambda: cars196(tmp_path / "cars"))
    assert "3 training images instead of 8,054" in message
    assert "2 test images instead of 8,131, 2 test classes instead of 98" in message
    message = refused(lambda: sop(tmp_path / "sop"))
    assert "4 training images instead of 59,551, 3 training classes instead of 11,318" in message
    assert "2 test images instead of 60,502, 2 test classes instead of 11,316" in message


def spread(images: int, classes: range) -> list[int]:
    """`images` classes in ascending order, evenly."""
    return [classes[k * len(classes) // images] for k in range(images)]


def test_a_complete_cub_and_a_complete_cars_are_read_as_published(tmp_path: Path) -> None:
    """Of published size; the images are empty files, since nothing is decoded."""
    classes = spread(5864, range(1, 101)) + spread(5924, range(101, 201))
    home = tmp_path / "CUB_200_2011"
    files = [f"{c:03d}.Bird/Bird_{k}.jpg" for k, c in enumerate(classes)]
    for c in set(classes):
        (home / "images" / f"{c:03d}.Bird").mkdir(parents=True)
    for file in files:
        (home / "images" / file).touch()
    for name, rest in (
        ("images.txt", files),
        ("image_class_labels.txt", classes),
        ("bounding_boxes.txt", ["1.0 2.0 3.0 4.0"] * len(files)),
    ):
        (home / name).write_text("".join(f"{k} {v}\n" for k, v in enumerate(rest, 1)))
    found = cub(home)
    assert (len(found.train), len(found.test)) == (5864, 5924)
    assert set(found.train.labels) == set(range(100))
    assert set(found.test.labels) == set(range(100, 200))
    (home / "images" / files[7]).unlink()
    assert f"1 of the 11,788 images it names are not there, the first: 'images/{files[7]}'" in (
        refused(lambda: cub(home))
    )

    home = tmp_path / "cars"
    (home / "train").mkdir(parents=True)
    (home / "test").mkdir()
    classes = spread(8054, range(1, 99)) + spread(8131, range(99, 197))
    for part, own in (("train", classes[::2]), ("test", classes[1::2])):
        lines = [f"{k:05d}.jpg,1,2,3,4,{c}\n" for k, c in enumerate(own, 1)]
        (home / f"anno_{part}.csv").write_text("".join(lines))
        for k in range(1, len(own) + 1):
            (home / part / f"{k:05d}.jpg").touch()
    (home / "names.csv").write_text("\n".join(NAMES))
    found = cars196(home)
    assert (len(found.train), len(found.test)) == (8054, 8131)
    assert set(found.train.labels) | set(found.test.labels) == set(range(196))


@pytest.mark.slow
def test_a_complete_sop_is_read_as_published(tmp_path: Path) -> None:
    home = tmp_path / "Stanford_Online_Products"
    (home / "mug_final").mkdir(parents=True)
    for name, images, classes in (
        ("Ebay_train.txt", 59551, range(1, 11319)),
        ("Ebay_test.txt", 60502, range(11319, 22635)),
    ):
        lines = [HEADER + "\n"]
        for k, c in enumerate(spread(images, classes), 1):
            (home / "mug_final" / f"{c}_{k}.JPG").touch()
            lines.append(f"{k} {c} 8 mug_final/{c}_{k}.JPG\n")
        (home / name).write_text("".join(lines))
    found = sop(home)
    assert (len(found.train), len(found.test)) == (59551, 60502)
    assert "" not in found.names


# -- damage --------------------------------------------------------------------------------------


@st.composite
def damage(draw, content: bytes) -> bytes:
    """Cut off, cut out, repeated, overwritten or inserted bytes; lines lost or put elsewhere."""
    kind = draw(st.sampled_from(["end", "out", "twice", "over", "in", "lose line", "move line"]))
    a, b = sorted(draw(st.integers(0, len(content))) for _ in range(2))
    b = min(b, a + draw(st.sampled_from([1, 3, 40, 10_000])))
    noise = draw(
        st.binary(min_size=1, max_size=6)
        | st.text("0123456789 ,.\r\n/-_", min_size=1, max_size=4).map(str.encode)
    )
    lines = content.splitlines(keepends=True)
    line = lines.pop(a % len(lines))
    return {
        "end": content[:a],
        "out": content[:a] + content[b:],
        "twice": content[:b] + content[a:],
        "over": content[:a] + noise + content[a + len(noise) :],
        "in": content[:a] + noise + content[a:],
        "lose line": b"".join(lines),
        "move line": b"".join([*lines[: b % 3], line, *lines[b % 3 :]]),
    }[kind]


def small(found: Retrieval) -> dict[str, int]:
    """The counts of a tree of this file, in the place of the published ones."""
    train, test = found.train, found.test
    return {
        "training images": len(train), "training classes": len(set(train.labels)),
        "test images": len(test), "test classes": len(set(test.labels)),
    }  # fmt: skip


SETS: dict[str, tuple] = {
    "cub": (cub, cub_tree, retrieval.CUB,
            ["images.txt", "image_class_labels.txt", "bounding_boxes.txt"]),
    "csv": (cars196, lambda root: csv(root / "c"), retrieval.CARS,
            ["anno_train.csv", "anno_test.csv"]),
    "sop": (sop, sop_tree, retrieval.SOP, ["Ebay_train.txt", "Ebay_test.txt"]),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", SETS)
def test_a_damaged_list_is_refused_or_reads_as_the_same_images(tmp_path: Path, name: str) -> None:
    """A changed number can go unseen. A lost, doubled or invented image never does, nor a class
    outside the set, nor, in CUB (whose folders say it too), any other class."""
    read, write, published, lists = SETS[name]
    write(tmp_path)
    whole = read(tmp_path, "any")
    paths = [next(tmp_path.rglob(file)) for file in lists]
    original = {path: path.read_bytes() for path in paths}
    outcomes = {"refused": 0, "same": 0, "other numbers": 0}

    @settings(max_examples=700, deadline=None, derandomize=True)
    @given(st.data())
    def once(data) -> None:
        path = data.draw(st.sampled_from(paths))
        path.write_bytes(data.draw(damage(original[path])))
        try:
            found = read(tmp_path)
        except ValueError as error:
            assert "\n" not in str(error) and str(tmp_path) in str(error)
            outcomes["refused"] += 1
            return
        finally:
            path.write_bytes(original[path])
        before, after = facts(whole), facts(found)
        assert before.keys() == after.keys() and small(found) == small(whole)
        outcomes["same" if before == after else "other numbers"] += 1
        for file, (part, label, box) in after.items():
            assert part == before[file][0] and 0 <= label < len(found.names)
            if name == "cub":
                assert label == before[file][1]
            if box is not None:
                assert np.isfinite(box).all() and box[0] < box[2] and box[1] < box[3]

    with mock.patch.dict(published, small(whole)):
        once()
    assert outcomes["refused"] > 100 and outcomes["same"] > 10, outcomes


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["car_ims", "devkit, test labels beside it"])
def test_a_damaged_mat_file_is_refused_or_reads_as_the_same_images(
    tmp_path: Path, layout: str
) -> None:
    LAYOUTS[layout](tmp_path / "c")
    whole = cars196(tmp_path, "any")
    path = next(p for p in sorted(tmp_path.rglob("cars_*annos*.mat")))
    original = path.read_bytes()
    rng = np.random.default_rng(0)
    refusals = 0
    for _ in range(500):
        content = bytearray(original)
        for _ in range(rng.integers(1, 4)):
            content[rng.integers(128, len(content))] = rng.integers(256)
        path.write_bytes(content[: rng.integers(len(content))] if rng.random() < 0.2 else content)
        with mock.patch.dict(retrieval.CARS, small(whole)):
            try:
                found = cars196(tmp_path)
            except ValueError as error:
                assert "\n" not in str(error) and str(tmp_path) in str(error)
                refusals += 1
                continue
        assert facts(found).keys() == facts(whole).keys()
    assert refusals > 100

"""Retrieval sets, trained on some classes and tested on others: CUB-200-2011, Cars196, SOP.

Splits as usual in deep metric learning (Oh Song et al., CVPR 2016): the first half of the classes
trains, the other half is query and gallery; EmbedKD follows them. Sources: Wah et al. 2011
(CNS-TR-2011-001), Krause et al. 2013 (3dRR), Oh Song et al. 2016.

A list and the folder it describes must agree: a file that a list names and that is not there stops
the reading, whatever `counts` says.
"""

from __future__ import annotations

import functools
import os
import re
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from shared.data.items import SUFFIXES, Counts, Files, check_counts
from shared.data.mat import read_mat


@dataclass(frozen=True)
class Retrieval:
    """Labels count the classes of the whole set from 0, so that no label is in both parts."""

    train: Files
    test: Files
    names: tuple[str, ...]  # of class k; "" for a class without an image


CUB = {"training images": 5_864, "training classes": 100,
       "test images": 5_924, "test classes": 100}  # fmt: skip
CARS = {"training images": 8_054, "training classes": 98,
        "test images": 8_131, "test classes": 98}  # fmt: skip
SOP = {"training images": 59_551, "training classes": 11_318,
       "test images": 60_502, "test classes": 11_316}  # fmt: skip


def cub(root: Path, counts: Counts = "published") -> Retrieval:
    """CUB_200_2011/{images,image_class_labels,bounding_boxes}.txt and images/; or its parent.

    Classes 1-100 train, 101-200 test; the official train_test_split.txt is not looked at. Boxes
    are x, y, x + width, y + height of the file. Raises ValueError naming file and line.
    """
    home = home_of(root, "CUB-200-2011", "images.txt")
    images = _by_id(home / "images.txt", "<image id> <class folder>/<file>", _bird)
    whose = home / "image_class_labels.txt"
    labels = _by_id(whose, "<image id> <class, 1-200>", functools.partial(_whole, most=200))
    where = home / "bounding_boxes.txt"
    box = (_number, _number, _size, _size)
    boxes = _by_id(where, "<image id> <x> <y> <width> <height>", *box)
    for path, found in ((whose, labels), (where, boxes)):
        if odd := images.keys() ^ found.keys():
            raise ValueError(
                f"{path}: its image ids are not those of images.txt ({len(odd):,} differ, the "
                f"first: {min(odd)})"
            )
    names = [""] * 200
    for image, (file,) in images.items():
        (label,) = labels[image]
        if int(file[:3]) != label:
            raise ValueError(f"{whose}: image {image} has class {label}, but it is {file}")
        names[label - 1] = file.split("/")[0][4:]
    files = [f"images/{file}" for (file,) in images.values()]
    check_files(home / "images.txt", files, set(_below(home, 3)))
    corners = np.array([boxes[image] for image in images])
    corners[:, 2:] += corners[:, :2]
    classes = np.array([labels[image][0] for image in images])
    return _halves("CUB-200-2011", home, files, classes, corners, 100, names, CUB, counts)


def cars196(root: Path, counts: Counts = "published") -> Retrieval:
    """Stanford Cars in any of three layouts, in `root` or in a folder of it:

    - cars_annos.mat and car_ims/;
    - devkit/{cars_train_annos,cars_meta}.mat, cars_test_annos_withlabels.mat there or beside it,
      cars_train/ and cars_test/;
    - anno_train.csv, anno_test.csv (file, x1, y1, x2, y2, class; no header), names.csv, and
      train/<class>/ and test/<class>/, however nested.

    Classes 1-98 train, 99-196 test, of the official training and test images together. Boxes are
    the numbers of the files (which count pixels from 1). Raises ValueError naming file and line.
    """
    devkit = "devkit/cars_train_annos.mat"
    home = home_of(root, "Cars196", "cars_annos.mat", devkit, "anno_train.csv")
    there = set(_below(home, 5))
    if (home / "cars_annos.mat").is_file() and (home / "car_ims").is_dir():
        names = _class_names(home / "cars_annos.mat")
        lists = [("car_ims", home / "cars_annos.mat")]
    elif (home / devkit).is_file():
        names = _class_names(home / "devkit" / "cars_meta.mat")
        labelled = "cars_test_annos_withlabels.mat"  # cars_test_annos.mat has no classes
        test = home / labelled if (home / labelled).is_file() else home / "devkit" / labelled
        lists = [("cars_train", home / devkit), ("cars_test", test)]
    elif (home / "anno_train.csv").is_file():
        found = rows(home / "names.csv", "<class name>", str, separator="\n")
        names = [name for (name,) in found]
        lists = [("train", home / "anno_train.csv"), ("test", home / "anno_test.csv")]
    else:
        raise ValueError(f"{home}: cars_annos.mat is there, but not its images (car_ims/)")
    if len(names) != 196:
        raise ValueError(f"{home}: {len(names)} class names; Cars196 has 196")
    files: list[str] = []
    labels: list[int] = []
    boxes: list[tuple[float, ...]] = []
    for folder, path in lists:
        read = _annotated if path.suffix == ".mat" else _anno_csv
        own = read(path)
        unit = "annotation" if path.suffix == ".mat" else "line"
        for number, (_, x1, y1, x2, y2, _) in enumerate(own, 1):
            if not (x1 < x2 and y1 < y2):
                raise ValueError(
                    f"{path}, {unit} {number}: expected a box x1 < x2, y1 < y2, found "
                    f"{x1:g}, {y1:g}, {x2:g}, {y2:g}"
                )
        by_name = _by_name(home, there, folder)
        check_files(path, [row[0] for row in own], by_name)
        files += [by_name[row[0]] for row in own]
        labels += [row[5] for row in own]
        boxes += [row[1:5] for row in own]
    return _halves(
        "Cars196", home, files, np.array(labels), np.array(boxes), 98, names, CARS, counts
    )


def sop(root: Path, counts: Counts = "published") -> Retrieval:
    """Stanford_Online_Products/{Ebay_train,Ebay_test}.txt and *_final/; or its parent.

    The two lists are the split; no class is in both. A class is named by its kind and its number,
    as in "bicycle 1". No boxes. Raises ValueError naming file and line.
    """
    home = home_of(root, "Stanford Online Products", "Ebay_train.txt")
    header = "image_id class_id super_class_id path"
    most = 22_634  # class ids: 1-11318 and 11319-22634
    kinds = (_whole, functools.partial(_whole, most=most), functools.partial(_whole, most=12), str)
    there = set(_below(home, 2))
    parts, names = [], [""] * most
    for name in ("Ebay_train.txt", "Ebay_test.txt"):
        form = f"{header} (class_id at most {most})"
        found = rows(home / name, form, *kinds, header=header)
        files = [row[3] for row in found]
        check_files(home / name, files, there)
        labels = np.array([row[1] for row in found]) - 1
        for label, file in zip(labels, files, strict=True):
            names[label] = f"{file.split('/')[0].removesuffix('_final')} {label + 1}"
        parts.append(Files(home, files, labels))
    train, test = parts
    if both := set(train.labels) & set(test.labels):
        raise ValueError(
            f"{home / 'Ebay_test.txt'}: class {min(both) + 1} is in Ebay_train.txt too "
            f"({len(both):,} such classes)"
        )
    if twice := set(train.files) & set(test.files):
        raise ValueError(f"{home / 'Ebay_test.txt'}: {min(twice)} is in Ebay_train.txt too")
    _check("Stanford Online Products", train, test, SOP, counts)
    return Retrieval(train, test, tuple(names))


def _halves(
    what: str,
    home: Path,
    files: list[str],
    classes: np.ndarray,
    boxes: np.ndarray,
    last: int,
    names: Sequence[str],
    published: dict[str, int],
    counts: Counts,
) -> Retrieval:
    """Classes (from 1) up to `last` train, the others test; in the order of the lists."""
    parts = []
    for part in (classes <= last, classes > last):
        own = [file for file, mine in zip(files, part, strict=True) if mine]
        parts.append(Files(home, own, classes[part] - 1, boxes[part]))
    train, test = parts
    _check(what, train, test, published, counts)
    return Retrieval(train, test, tuple(names))


def _check(what: str, train: Files, test: Files, published: dict[str, int], counts: Counts) -> None:
    found = {
        "training images": len(train),
        "training classes": len(set(train.labels)),
        "test images": len(test),
        "test classes": len(set(test.labels)),
    }
    check_counts(what, train.root, found, published, counts)


# -- Cars196's lists: (file, x1, y1, x2, y2, class) ----------------------------------------------


def _anno_csv(path: Path) -> list[tuple[Any, ...]]:
    form = "file,x1,y1,x2,y2,class (1-196)"
    return rows(path, form, str, *[_number] * 4, _car, separator=",")


def _annotated(path: Path) -> list[tuple[Any, ...]]:
    """The struct array `annotations`: of one element scipy makes a scalar."""
    found = np.atleast_1d(read_mat(path).get("annotations", np.zeros(0))).reshape(-1)
    name = "relative_im_path" if path.name == "cars_annos.mat" else "fname"
    fields = (name, "bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2", "class")
    kinds: tuple[Callable[[str], Any], ...] = (str, *[_number] * 4, _car)
    if not len(found) or not set(fields) <= set(found.dtype.names or ()):
        raise ValueError(
            f"{path}: expected a struct array 'annotations' with the fields {', '.join(fields)}"
        )
    own = []
    for number, entry in enumerate(found, 1):
        # a class saved again as a double reads 14.0; cars_annos.mat writes car_ims/000001.jpg
        values = [str(entry[field]).removesuffix(".0").removeprefix("car_ims/") for field in fields]
        try:
            own.append(tuple(kind(value) for kind, value in zip(kinds, values, strict=True)))
        except ValueError:
            raise ValueError(
                f"{path}, annotation {number}: expected a file, a box of numbers and a class "
                f"1-196, found {', '.join(values)[:80]!a}"
            ) from None
    return own


def _class_names(path: Path) -> list[str]:
    names = np.atleast_1d(read_mat(path).get("class_names", np.zeros(0))).reshape(-1).tolist()
    if not names or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{path}: expected a cell array 'class_names' of strings")
    return names


def _by_name(home: Path, there: Iterable[str], folder: str) -> dict[str, str]:
    """Images anywhere below a folder of that name. The class folders in between say nothing: none
    can have the slash of "Ram C/V Cargo Van Minivan 2012"."""
    found: dict[str, str] = {}
    for file in there:
        *folders, name = file.split("/")
        if folder in folders and name.lower().endswith(SUFFIXES):
            if name in found:
                two = sorted((found[name], file))
                raise ValueError(f"{home}: two images of one name, {two[0]} and {two[1]}")
            found[name] = file
    return found


# -- lists and folders ---------------------------------------------------------------------------


def home_of(root: Path, what: str, *marks: str) -> Path:
    """`root`, or the one folder directly in it, that has one of the files `marks`.

    Raises ValueError when there is none, or several.
    """
    if not root.is_dir():
        raise ValueError(f"{root}: no such folder")
    for folders in ([root], sorted(p for p in root.iterdir() if p.is_dir())):
        found = [p for p in folders if any((p / mark).is_file() for mark in marks)]
        if len(found) > 1:
            several = ", ".join(p.name for p in found)
            raise ValueError(f"{root}: several folders may be {what} ({several}); name one of them")
        if found:
            return found[0]
    raise ValueError(f"{root}: no {what} in it or in a folder of it: no {' or '.join(marks)}")


def rows(
    path: Path,
    form: str,
    *kinds: Callable[[str], Any],
    separator: str | None = None,
    header: str = "",
) -> list[tuple[Any, ...]]:
    """The fields of every line of a UTF-8 text, each as its kind makes it of the text.

    form: what a line must be, for messages. separator: None for white space. Windows line ends, a
    byte order mark and empty lines at the end are taken. Raises ValueError with file and line when
    the number of fields is another one, or a kind raises ValueError; and for an empty list.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from None
    found = []
    for number, line in enumerate(content.removeprefix(b"\xef\xbb\xbf").rstrip().splitlines(), 1):
        try:
            fields = line.decode().split(separator)
            if number == 1 and header:
                if fields != header.split():
                    raise ValueError
                continue
            pairs = zip(kinds, fields, strict=True)
            found.append(tuple(kind(field.strip()) for kind, field in pairs))
        except ValueError:
            raise ValueError(
                f"{path}, line {number}: expected {header if header and number == 1 else form}, "
                f"found {line[:80].decode(errors='replace')!a}"
            ) from None
    if not found:
        raise ValueError(f"{path}: nothing in it (expected lines of {form})")
    return found


def check_files(path: Path, files: Sequence[str], there: Container[str]) -> None:
    """Every file that the list `path` names is in `there`, and is named once; else ValueError."""
    if gone := [file for file in files if file not in there]:
        raise ValueError(
            f"{path}: {len(gone):,} of the {len(files):,} images it names are not there, the "
            f"first: {gone[0]!a}"
        )
    if len(set(files)) < len(files):
        raise ValueError(f"{path}: names {Counter(files).most_common(1)[0][0]} twice")


def _by_id(path: Path, form: str, *kinds: Callable[[str], Any]) -> dict[int, tuple[Any, ...]]:
    found = rows(path, form, _whole, *kinds)
    by_id = {row[0]: row[1:] for row in found}
    if len(by_id) < len(found):
        twice = Counter(row[0] for row in found).most_common(1)[0][0]
        raise ValueError(f"{path}: image {twice} has two lines")
    return by_id


def _below(folder: Path, depth: int) -> Iterator[str]:
    """Every file at most `depth` names down: one listing a folder, not a look at each file."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if not entry.is_dir():
                yield entry.name
            elif depth > 1:
                for file in _below(Path(entry.path), depth - 1):
                    yield f"{entry.name}/{file}"


# -- kinds of fields -----------------------------------------------------------------------------


def _whole(text: str, most: int = 999_999_999) -> int:
    if not re.fullmatch("[0-9]{1,9}", text) or not 1 <= int(text) <= most:
        raise ValueError
    return int(text)


_car = functools.partial(_whole, most=196)


def _number(text: str) -> float:
    if not re.fullmatch(r"-?[0-9]{1,9}(\.[0-9]{1,9})?", text):
        raise ValueError
    return float(text)


def _size(text: str) -> float:
    if _number(text) <= 0:
        raise ValueError
    return float(text)


def _bird(text: str) -> str:
    """001.Black_footed_Albatross/Black_Footed_Albatross_0046_18.jpg: the class stands in it."""
    if not re.fullmatch(r"[0-9]{3}\.[^/]+/[^/]+", text):
        raise ValueError
    return text

"""Identification of native low-resolution faces: TinyFace, QMUL-SurvFace, UCCS.

Who is on an image is what the published .mat lists say, in their order; a list and the folder it
describes must name the same images, whatever `counts` says. Labels are the lists' own ids; -1
stands for persons that no list names (distractors, unmated probes), and no listed id is negative.

Published counts, and which of them `counts="published"` holds a copy against:

- TinyFace (Cheng et al., ACCV 2018): all, 4,443 + 153,428 gallery images, 3,728 probes, and 7,804
  training images of 2,570 identities.
- QMUL-SurvFace (Cheng et al., arXiv 1804.09691): 60,294 gallery images, 60,423 mated probes, 5,319
  training identities. Left open, since a public inventory of the archive differs from its page:
  training images (220,890 published, 220,888 found) and unmated probes (121,900 left of the 242,617
  published test images, 121,736 found); and the verification pairs, of which no paper was at hand.
- UCCS: see `uccs`.
"""

from __future__ import annotations

import csv
import hashlib
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from shared.data.faces import Pairs
from shared.data.items import SUFFIXES, Counts, Files, check_counts
from shared.data.mat import read_mat
from shared.data.retrieval import check_files, home_of

TINYFACE = {"probes": 3_728, "gallery images": 4_443, "distractors": 153_428}
TINYFACE_TRAIN = {"images": 7_804, "identities": 2_570}
SURVFACE = {"mated probes": 60_423, "gallery images": 60_294}
SURVFACE_TRAIN = {"identities": 5_319}
UCCS = {"subjects": 1_732, "images": 16_149}  # CRRCD and HORKD, of the whole set
UCCS_DRAWN = {"drawn subjects": 180}

MOST_CSV = 1 << 26  # bytes


@dataclass(frozen=True, eq=False)
class Identification:
    """Every probe has a mate, an image of its label, in the gallery."""

    probes: Files
    gallery: Files  # the last `distractors` of it have label -1, as no probe has
    unmated: Files | None = None  # probes of nobody in the gallery, label -1: for the open set
    distractors: int = 0


@dataclass(frozen=True, eq=False)
class Labelled:
    items: Files  # labels from 0, in the order of `names`
    names: tuple[str, ...]  # folders, sorted as text


@dataclass(frozen=True, eq=False)
class Split:
    """Closed set: other images of the same subjects."""

    train: Files
    test: Files
    names: tuple[str, ...]  # subject of label k


# -- TinyFace ------------------------------------------------------------------------------------


def tinyface(root: Path, counts: Counts = "published") -> Identification:
    """Testing_Set/{Gallery_Match,Probe,Gallery_Distractor} and its two .mat lists.

    `root` is the release's folder or its parent. The gallery is Gallery_Match, then all
    distractors by name. Raises ValueError naming the file or folder: missing, damaged, not as
    listed, a probe without a mate, other counts.
    """
    home = home_of(root, "TinyFace", "Testing_Set/probe_img_ID_pairs.mat")
    test = home / "Testing_Set"
    probes = _listed(home, test / "probe_img_ID_pairs.mat", test / "Probe", "probe")
    path = test / "gallery_match_img_ID_pairs.mat"
    match = _listed(home, path, test / "Gallery_Match", "gallery")
    others = [f"Testing_Set/Gallery_Distractor/{f}" for f in _images(test / "Gallery_Distractor")]
    labels = np.concatenate([match.labels, np.full(len(others), -1)])
    _check_mates(path, probes, match)
    found = {"probes": len(probes), "gallery images": len(match), "distractors": len(others)}
    check_counts("TinyFace", home, found, TINYFACE, counts)
    gallery = Files(home, match.files + others, labels)
    return Identification(probes, gallery, distractors=len(others))


def tinyface_train(root: Path, counts: Counts = "published") -> Labelled:
    """Training_Set/<identity>/*. Raises ValueError: no such folders, other counts."""
    found = _folders(root, "Training_Set")
    sizes = {"images": len(found.items), "identities": len(found.names)}
    check_counts("TinyFace's training set", root, sizes, TINYFACE_TRAIN, counts)
    return found


# -- QMUL-SurvFace -------------------------------------------------------------------------------


def survface(root: Path, counts: Counts = "published") -> Identification:
    """Face_Identification_Test_Set/{gallery,mated_probe,unmated_probe}.

    `root` is the release's folder or its parent. The .mat lists lie beside these folders or in
    Face_Identification_Evaluation/. Unmated images are probes, by name; they are never in the
    gallery. Raises ValueError as `tinyface`.
    """
    folder, other = "Face_Identification_Test_Set", "Face_Identification_Evaluation"
    lists = ("gallery_img_ID_pairs.mat", "mated_probe_img_ID_pairs.mat")
    home = home_of(root, "QMUL-SurvFace", f"{folder}/{lists[0]}", f"{other}/{lists[0]}")
    where = [home / (folder if (home / folder / f).is_file() else other) / f for f in lists]
    test = home / folder
    gallery = _listed(home, where[0], test / "gallery", "gallery")
    probes = _listed(home, where[1], test / "mated_probe", "mated_probe")
    _check_mates(where[0], probes, gallery)
    others = [f"{folder}/unmated_probe/{f}" for f in _images(test / "unmated_probe")]
    found = {"mated probes": len(probes), "gallery images": len(gallery)}
    check_counts("QMUL-SurvFace", home, found, SURVFACE, counts)
    return Identification(probes, gallery, Files(home, others, np.full(len(others), -1)))


def survface_pairs(root: Path) -> Pairs:
    """Face_Verification_Test_Set/{positive,negative}_pairs_names.mat and verification_images/.

    Positive and negative pairs are spread evenly over the order, each kind in that of its list, so
    that every contiguous fold holds both (the release defines no folds). Only images that are in a
    pair are kept. Raises ValueError as `tinyface`; images that no pair names may be there.
    """
    folder = "Face_Verification_Test_Set"
    home = home_of(root, "QMUL-SurvFace", f"{folder}/positive_pairs_names.mat")
    there = set(_images(home / folder / "verification_images"))
    pairs, same, place = [], [], []
    for kind in ("positive", "negative"):
        path = home / folder / f"{kind}_pairs_names.mat"
        (cells,) = _variables(path, f"{kind}_pairs_names")
        if cells.shape[-1] != 2:
            raise ValueError(f"{path}: shape {cells.shape}, expected two names a pair")
        names = _names(path, cells)
        check_files(path, sorted(set(names)), there)
        own = list(zip(names[::2], names[1::2], strict=True))
        pairs += own
        same += [kind == "positive"] * len(own)
        place += [(i + 0.5) / len(own) for i in range(len(own))]
    order = np.argsort(place, kind="stable")
    files = sorted({name for pair in pairs for name in pair})
    number = {name: i for i, name in enumerate(files)}
    sides = np.array([(number[a], number[b]) for a, b in pairs], dtype=np.int64)[order]
    paths = [f"{folder}/verification_images/{name}" for name in files]
    items = Files(home, paths, np.zeros(len(files)))
    return Pairs("QMUL-SurvFace", items, sides[:, 0], sides[:, 1], np.array(same)[order])


def survface_train(root: Path, counts: Counts = "published") -> Labelled:
    """training_set/<person>/*. Raises ValueError: no such folders, other counts."""
    found = _folders(root, "training_set")
    sizes = {"identities": len(found.names)}
    check_counts("QMUL-SurvFace's training set", root, sizes, SURVFACE_TRAIN, counts)
    return found


# -- UCCS ----------------------------------------------------------------------------------------


def uccs(root: Path, seed: int = 0, fewest: int = 5, counts: Counts = "published") -> Split:
    """The closed set of CRRCD, AIRD and HORKD: 180 subjects, images divided 4:1.

    Layouts: <subject>/*, faces cut out; or the open-set challenge's validation.csv (FILE,
    SUBJECT_ID, FACE_X, FACE_Y, FACE_WIDTH, FACE_HEIGHT in any order) with whole images in
    validation_images/ (or beside it) and boxes on them; subject -1 is nobody known and left out,
    and so is what gallery.csv lists: crops of faces that validation.csv has as well, which would
    stand in both parts.

    Of the subjects with `fewest` images or more, the 180 whose name has the smallest SHA-256 of
    "<seed>/<name>" are drawn; of the n images of each, the first n // 5 in the order of the SHA-256
    of "<seed>/<file>" (with boxes "<seed>/<file>,<x>,<y>,<width>,<height>") are test images. So
    the split depends on names and seed alone, not on versions, and a lost image moves few others.

    The papers have 3,918 training and 907 test images and name neither subjects nor seed, so these
    two numbers are no condition here: len(train) and len(test) are what a score must be told with.
    180 of all 1,732 subjects would have 1,680 images on average, so theirs have more than most:
    `fewest` brings the size near.

    counts="published": 180 subjects can be drawn, and folders hold 1,732 subjects with 16,149
    images. Raises ValueError: neither layout, a damaged line (named), a missing image, too few
    subjects, other counts.
    """
    if fewest < 5:
        raise ValueError(f"fewest={fewest}: 4:1 needs 5 images of a subject or more")
    if not root.is_dir():
        raise ValueError(f"{root}: no such folder")
    faces: dict[str, list[_Face]] = {}
    if (root / "validation.csv").is_file():
        for subject, face in _challenge(root):
            faces.setdefault(subject, []).append(face)
    else:
        found = _folders(root, "")
        sizes = {"subjects": len(found.names), "images": len(found.items)}
        check_counts("UCCS", root, sizes, UCCS, counts)
        for file, label in zip(found.items.files, found.items.labels, strict=True):
            faces.setdefault(found.names[label], []).append(_Face(file, file))
    able = [subject for subject, own in faces.items() if len(own) >= fewest]
    names = tuple(sorted(sorted(able, key=lambda s: _rank(seed, s))[:180]))
    check_counts("UCCS", root, {"drawn subjects": len(names)}, UCCS_DRAWN, counts)
    if len(names) < 2:
        raise ValueError(f"{root}: {len(names)} subjects with {fewest} images or more")
    train: list[tuple[_Face, int]] = []
    test: list[tuple[_Face, int]] = []
    for label, subject in enumerate(names):
        own = sorted(faces[subject], key=lambda face: _rank(seed, face.key))
        fifth = len(own) // 5
        test += [(face, label) for face in own[:fifth]]
        train += [(face, label) for face in own[fifth:]]
    return Split(_faces(root, train), _faces(root, test), names)


@dataclass(frozen=True)
class _Face:
    file: str
    key: str  # what tells it from every other face
    box: tuple[float, float, float, float] | None = None  # x1, y1, x2, y2


def _rank(seed: int, name: str) -> bytes:
    return hashlib.sha256(f"{seed}/{name}".encode()).digest()


def _faces(root: Path, drawn: list[tuple[_Face, int]]) -> Files:
    boxes = [face.box for face, _ in drawn if face.box]
    return Files(
        root,
        [face.file for face, _ in drawn],
        [label for _, label in drawn],
        np.array(boxes, dtype=np.float64) if boxes else None,
    )


def _challenge(root: Path) -> Iterable[tuple[str, _Face]]:
    """(subject, face) of each line of validation.csv with a known subject."""
    path = root / "validation.csv"
    columns = ("FILE", "SUBJECT_ID", "FACE_X", "FACE_Y", "FACE_WIDTH", "FACE_HEIGHT")
    folder = "validation_images/" if (root / "validation_images").is_dir() else ""
    there = {folder + file for file in _images(root / folder)}
    if path.stat().st_size > MOST_CSV:
        raise ValueError(f"{path}: {path.stat().st_size:,} bytes is too large for a list of faces")
    seen: set[str] = set()
    with path.open(encoding="utf-8-sig", newline="") as lines:
        table = csv.DictReader(lines, strict=True)
        try:
            if missing := set(columns) - set(table.fieldnames or ()):
                raise ValueError(f"no column {', '.join(sorted(missing))}")
            for row in table:
                if None in row or None in row.values():
                    raise ValueError(f"expected {len(table.fieldnames or ())} fields")
                subject = int(row["SUBJECT_ID"])
                x, y, width, height = (float(row[name]) for name in columns[2:])
                if not (math.isfinite(x + y + width + height) and width > 0 and height > 0):
                    raise ValueError(f"box {x:g}, {y:g}, {width:g}, {height:g}")
                file = folder + row["FILE"]
                if file not in there:
                    raise ValueError(f"no image {file!a}")
                key = f"{file},{x:g},{y:g},{width:g},{height:g}"
                if key in seen:
                    raise ValueError("the face of an earlier line")
                seen.add(key)
                if subject >= 0:
                    yield str(subject), _Face(file, key, (x, y, x + width, y + height))
        except (ValueError, csv.Error) as error:
            finding = str(error).split("\n")[0][:100]
            raise ValueError(f"{path}, line {table.line_num}: {finding}") from None


# -- lists and folders ---------------------------------------------------------------------------


def _listed(home: Path, path: Path, folder: Path, prefix: str) -> Files:
    """The images `<prefix>_set` of a .mat list with the ids `<prefix>_ids`, all of `folder`."""
    cells, ids = _variables(path, f"{prefix}_set", f"{prefix}_ids")
    names, ids = _names(path, cells), ids.ravel()
    if ids.dtype.kind not in "iuf" or (ids < 0).any() or (ids > 1e9).any() or (ids % 1).any():
        raise ValueError(f"{path}: {prefix}_ids: expected whole numbers from 0")
    if len(ids) != len(names):
        raise ValueError(f"{path}: {len(names):,} images, but {len(ids):,} ids")
    there = _images(folder)
    check_files(path, names, set(there))
    if more := sorted(set(there) - set(names)):
        raise ValueError(
            f"{folder}: {len(more):,} images that {path.name} does not name: {more[0]!a}"
        )
    below = folder.relative_to(home).as_posix()
    return Files(home, [f"{below}/{name}" for name in names], ids.astype(np.int64))


def _variables(path: Path, *names: str) -> list[np.ndarray]:
    found = read_mat(path)
    if gone := [name for name in names if name not in found]:
        raise ValueError(f"{path}: no variable {gone[0]} (there are: {ascii(list(found))[:80]})")
    return [np.atleast_1d(found[name]) for name in names]


def _names(path: Path, cells: np.ndarray) -> list[str]:
    names = cells.ravel().tolist()
    if not names or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{path}: expected a cell array of file names")
    return names


def _check_mates(path: Path, probes: Files, gallery: Files) -> None:
    alone = ~np.isin(probes.labels, gallery.labels)
    if alone.any():
        first = int(alone.argmax())
        raise ValueError(
            f"{path}: no image of the identity of {alone.sum():,} probes, the first: "
            f"{probes.labels[first]} ({probes.files[first]})"
        )


def _images(folder: Path) -> list[str]:
    """Names of the images in a folder, sorted; ValueError if there is none."""
    try:
        with os.scandir(folder) as entries:
            found = sorted(e.name for e in entries if _is_image(e.name))
    except OSError as error:
        raise ValueError(f"{folder}: cannot be listed ({error.strerror})") from None
    if not found:
        raise ValueError(f"{folder}: no image in it ({', '.join(SUFFIXES)})")
    return found


def _is_image(name: str) -> bool:
    return name.lower().endswith(SUFFIXES) and not name.startswith(".")  # "._x.jpg" is macOS's


def _folders(root: Path, below: str) -> Labelled:
    """<root>/<below>/<class>/*, or of the one folder in `root` that has `below`."""
    within = sorted(root.glob(f"*/{below}")) if below and not (root / below).is_dir() else []
    root = within[0].parent if len(within) == 1 else root
    folder = root / below
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder")
    names: Sequence[str] = sorted(
        p.name for p in folder.iterdir() if p.is_dir() and p.name[0] != "."
    )
    if not names:
        raise ValueError(f"{folder}: no folders in it (expected <identity>/<image>)")
    files, labels = [], []
    for label, name in enumerate(names):
        own = _images(folder / name)
        files += [(Path(below) / name / file).as_posix() for file in own]
        labels += [label] * len(own)
    return Labelled(Files(root, files, labels), tuple(names))

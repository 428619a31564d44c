"""Face sets: verification pairs (.bin, LFW, CALFW, CPLFW, CFP) and folders of training faces.

Pairs come ordered so that equal contiguous blocks are the protocol's folds, which is how
shared.evaluate.verify cuts them. Where a list leaves a part of the folds open, that part is filled
in the list's order, and each reader says so.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NoReturn

import numpy as np

from shared.data.items import SUFFIXES, Counts, Encoded, Files, Items, check_counts
from shared.data.unpickle import load

FOLDS = 10
PAIRS = {
    "lfw": 6_000,
    "calfw": 6_000,
    "cplfw": 6_000,
    "agedb_30": 6_000,
    "cfp_ff": 7_000,
    "cfp_fp": 7_000,
}
LFW_DEVELOPMENT = {"pairsDevTrain.txt": 2_200, "pairsDevTest.txt": 1_000}  # LFW's View 1
# Yi et al. 2014; Cao et al. 2018 (VGGFace2); Bansal et al. 2017 (UMDFaces).
CASIA = {"identities": 10_575, "images": 494_414}
VGGFACE2 = {"train": 8_631, "test": 500}  # identities
UMDFACES = {"identities": 8_277, "images": 367_888}
MOST_BYTES = 1 << 26  # of a list of pairs: the public ones are below 1 MB


@dataclass(frozen=True, eq=False)
class Pairs:
    """A verification set: the P pairs (items[first[p]], items[second[p]])."""

    name: str
    items: Items  # labels: identities where the list names them, zeros for a .bin
    first: np.ndarray  # [P] int64
    second: np.ndarray  # [P] int64
    same: np.ndarray  # [P] bool
    folds: int = FOLDS  # blocks of np.array_split over P, each with pairs of both kinds


# -- verification .bin ---------------------------------------------------------------------------


def read_bin(path: Path | str) -> tuple[list[bytes | np.ndarray], list[bool]]:
    """(images, same) of a verification .bin: pair i is images[2i], images[2i + 1].

    The pickle of (images, same) that InsightFace publishes; read by shared.data.unpickle, which
    runs nothing of it. images: encoded bytes or uint8 arrays, as they are in the file.
    ValueError naming the file: a pickle of anything else, a damaged or a malicious one.
    """
    path = Path(path)
    found = load(path)
    if type(found) not in (tuple, list) or len(found) != 2:
        _fail(path, "not a pair (images, same)")
    images, same = found
    if type(images) not in (tuple, list) or type(same) not in (tuple, list, np.ndarray):
        _fail(path, f"({type(images).__name__}, {type(same).__name__}), not (images, same)")
    if not len(images) == 2 * len(same) > 0:
        _fail(path, f"{len(images):,} images for {len(same):,} pairs, needs two a pair")
    for i, image in enumerate(images):
        if isinstance(image, np.ndarray):
            if image.dtype != np.uint8:
                _fail(path, f"image {i} is an array of {image.dtype}, not of uint8")
        elif type(image) is not bytes or not image:
            _fail(path, f"image {i} is neither encoded bytes nor an array")
    truth = same.tolist() if isinstance(same, np.ndarray) else same
    for i, value in enumerate(truth):
        if type(value) not in (bool, int) or value not in (0, 1):
            _fail(path, f"the label of pair {i} is neither True nor False")
    return list(images), [bool(value) for value in truth]


def bin_pairs(path: Path, counts: Counts = "published") -> Pairs:
    """The pairs of a .bin in its own order, which is fold after fold in the public ones.

    Where a tenth of the file holds pairs of one kind only, the file is not written in folds: then
    each kind is spread over the ten in the file's order. Published counts are asserted for the
    public names (lfw.bin, agedb_30.bin, ...). ValueError naming the file, as `read_bin`.
    """
    images, truth = read_bin(path)
    if path.stem in PAIRS:
        published = {"pairs": PAIRS[path.stem]}
        check_counts(path.name, path.parent, {"pairs": len(truth)}, published, counts)
    for i, image in enumerate(images):
        if isinstance(image, np.ndarray) and not (image.ndim == 3 and image.shape[2] == 3):
            if image.size != max(image.shape):
                _fail(path, f"image {i} of shape {image.shape} is not [H, W, 3], nor encoded bytes")
            images[i] = image.tobytes()  # an encoded image as an array [n] or [n, 1]
    same = np.array(truth)
    number = np.arange(len(same))
    fold = _spread(len(same))
    if any(len(set(block.tolist())) == 1 for block in np.array_split(same, FOLDS)):
        fold = _filled(path, same, _spread(same.sum()))
    items = Encoded(path.name, images, aligned=True)  # the format of InsightFace's aligned crops
    return _pairs(path.stem, path, items, 2 * number, 2 * number + 1, same, fold)


# -- lists of pairs ------------------------------------------------------------------------------


def lfw(root: Path, pairs: Path | None = None, counts: Counts = "published") -> Pairs:
    """LFW: pairs.txt (in `root` or beside it) and root/<name>/<name>_0001.jpg (or .png, ...).

    View 2 has the header "folds<TAB>N"; each fold has N lines "name i j" of one person, then N
    lines "name1 i name2 j" of two. View 1 (pairsDevTest.txt) has the header "N" and no folds: its
    pairs of each kind are spread over ten in the list's order. Huang et al. 2007.
    ValueError: a malformed line (file and number), missing images, counts other than published.
    """
    if pairs is None:
        pairs = root / "pairs.txt"
        if not pairs.is_file() and (root.parent / "pairs.txt").is_file():
            pairs = root.parent / "pairs.txt"
    header, *lines = _lines(pairs)
    numbers = [int(word) for word in header.split() if _is_number(word)]
    if not 1 <= len(numbers) == len(header.split()) <= 2 or 0 in numbers:
        _fail(pairs, "line 1: expected the header 'folds<TAB>pairs' or 'pairs'")
    folds, half = (1, *numbers)[-2:]
    if len(lines) != 2 * folds * half:
        total = f"{2 * folds * half:,} ({folds} times {half} + {half})"
        _fail(pairs, f"{len(lines):,} lines of pairs, its header says {total}")
    files, same = [], []
    for number, line in enumerate(lines):
        words, one = line.split(), number // half % 2 == 0
        full = [*words[:2], words[0], *words[2:]] if one and words else words
        good = len(full) == 4 and all(map(_is_name, full[::2])) and all(map(_is_number, full[1::2]))
        if not good:
            _fail_line(pairs, number + 2, "name i j" if one else "name1 i name2 j", line)
        a, i, b, j = full
        files.append((f"{a}/{a}_{int(i):04d}.jpg", f"{b}/{b}_{int(j):04d}.jpg"))
        same.append(one)
    published = {"folds": FOLDS, "pairs": PAIRS["lfw"]}
    if pairs.name in LFW_DEVELOPMENT:
        published = {"folds": 1, "pairs": LFW_DEVELOPMENT[pairs.name]}
    check_counts("LFW", pairs, {"folds": folds, "pairs": len(files)}, published, counts)
    truth = np.array(same)
    if folds == 1:
        fold, folds = _filled(pairs, truth, _spread(truth.sum())), FOLDS
    else:
        fold = np.repeat(np.arange(folds), 2 * half)
    return _listed("lfw", pairs, root, files, os.path.dirname, truth, fold, folds)


def calfw(root: Path, counts: Counts = "published") -> Pairs:
    """CALFW: root/pairs_CALFW.txt; images in "aligned images", else as `cplfw`. Zheng et al. 2017.

    Two lines a pair, "file token": tokens 1 to 10 are the fold of a positive pair, 0 is a negative
    one. The list gives negatives no fold: in its order they fill the folds up to equal sizes.
    ValueError: a malformed line (file and number), missing images, folds that cannot be equal,
    counts other than published.
    """
    return _two_lines("calfw", root / "pairs_CALFW.txt", root, counts)


def cplfw(root: Path, counts: Counts = "published") -> Pairs:
    """CPLFW: root/pairs_CPLFW.txt, images in "aligned images" or "images". Zheng, Deng 2018.

    As `calfw`; a list that marks every positive pair with 1 has no folds, and its pairs of each
    kind are spread over the ten in its order.
    """
    return _two_lines("cplfw", root / "pairs_CPLFW.txt", root, counts)


def _two_lines(name: str, pairs: Path, root: Path, counts: Counts) -> Pairs:
    rows: list[tuple[str, str]] = []
    for number, line in enumerate(_lines(pairs), 1):
        words = line.split()
        if len(words) != 2 or not _is_name(words[0]) or words[1] not in map(str, range(11)):
            _fail_line(pairs, number, "file token, a token from 0 to 10", line)
        if number % 2 == 0 and words[1] != rows[-1][1]:
            _fail_line(pairs, number, f"token {rows[-1][1]}, as on the pair's first line", line)
        rows.append((words[0], words[1]))
    if len(rows) % 2:
        _fail(pairs, f"{len(rows):,} lines, needs two a pair")
    check_counts(name.upper(), pairs, {"pairs": len(rows) // 2}, {"pairs": PAIRS[name]}, counts)
    token = np.array([int(token) for _, token in rows[::2]])
    positive = token[token > 0] - 1
    fold = _filled(pairs, token > 0, positive if positive.any() else _spread(len(positive)))
    for folder in ("aligned images", "images&landmarks/images", "images", "."):
        if (root / folder).is_dir():
            break
    files = [(a, b) for (a, _), (b, _) in zip(rows[::2], rows[1::2], strict=True)]
    return _listed(name, pairs, root / folder, files, _before_number, token > 0, fold)


def cfp(root: Path, view: Literal["FF", "FP"], counts: Counts = "published") -> Pairs:
    """CFP: frontal with frontal faces (FF) or with profiles (FP), ten folds. Sengupta et al. 2016.

    root/Protocol/Pair_list_{F,P}.txt: "number path", paths from Protocol/;
    root/Protocol/Split/{FF,FP}/{01..10}/{same,diff}.txt: "number,number" in those lists.
    ValueError: a malformed line (file and number), missing images, folds of unequal size, counts
    other than published.
    """
    protocol = root / "Protocol"
    sides = [_cfp_images(protocol / f"Pair_list_{kind}.txt", root) for kind in view]
    files, same, fold = [], [], []
    for k in range(FOLDS):
        for kind in ("same", "diff"):
            path = protocol / "Split" / view / f"{k + 1:02d}" / f"{kind}.txt"
            for number, line in enumerate(_lines(path), 1):
                words = [word.strip() for word in line.split(",")]
                if len(words) != 2 or any(w not in s for w, s in zip(words, sides, strict=True)):
                    _fail_line(path, number, f"two numbers of Pair_list_{{{view}}}.txt", line)
                files.append((sides[0][words[0]], sides[1][words[1]]))
                same.append(kind == "same")
                fold.append(k)
    name = f"cfp_{view.lower()}"
    check_counts(f"CFP-{view}", root, {"pairs": len(files)}, {"pairs": PAIRS[name]}, counts)
    return _listed(name, protocol, root, files, _person_of_cfp, np.array(same), np.array(fold))


def _cfp_images(path: Path, root: Path) -> dict[str, str]:
    """Number to file below root."""
    images = {}
    for number, line in enumerate(_lines(path), 1):
        words = line.split()
        if len(words) != 2 or not _is_number(words[0]) or words[0] in images:
            _fail_line(path, number, "number path, each number once", line)
        file = os.path.normpath(os.path.join("Protocol", words[1]))
        if os.path.isabs(file) or file.startswith("..") or "\0" in file:
            _fail_line(path, number, f"a path inside {root}", line)
        images[words[0]] = file
    return images


def _person_of_cfp(file: str) -> str:
    return os.path.dirname(os.path.dirname(file))  # Data/Images/001 of Data/Images/001/frontal/01


def _before_number(file: str) -> str:
    return file.rpartition("_")[0]  # Aaron_Eckhart of Aaron_Eckhart_0001.jpg


def _listed(
    name: str,
    where: Path,
    root: Path,
    files: list[tuple[str, str]],
    person: Callable[[str], str],
    same: np.ndarray,
    fold: np.ndarray,
    folds: int = FOLDS,
) -> Pairs:
    """Each image once, in the order in which the list first names it."""
    numbers: dict[str, int] = {}
    sides = np.array([[numbers.setdefault(f, len(numbers)) for f in pair] for pair in files])
    labels, _ = _labels(person(file) for file in numbers)
    items = Files(root, _present(where, root, numbers), labels)
    return _pairs(name, where, items, sides[:, 0], sides[:, 1], same, fold, folds)


def _present(where: Path, root: Path, wanted: Iterable[str]) -> list[str]:
    """The files as they lie below root; aligned copies may have another image suffix."""
    found, missing = [], []
    for file in wanted:
        stem, own = os.path.splitext(file)
        for suffix in (own, *SUFFIXES):
            if os.path.isfile(f"{root}/{stem}{suffix}"):
                found.append(stem + suffix)
                break
        else:
            missing.append(file)
    if missing:
        _fail_missing(where, missing, len(found) + len(missing), root)
    return found


# -- folds ---------------------------------------------------------------------------------------


def _spread(count: int, folds: int = FOLDS) -> np.ndarray:
    """Folds [count] of things in order, cut as np.array_split does."""
    return np.repeat(np.arange(folds), _sizes(count, folds))


def _sizes(count: int, folds: int) -> list[int]:
    return [count // folds + (k < count % folds) for k in range(folds)]


def _filled(where: Path, same: np.ndarray, positive: np.ndarray) -> np.ndarray:
    """Folds [P] from those of the positive pairs: negatives fill each up, in their order."""
    room = np.array(_sizes(len(same), FOLDS)) - np.bincount(positive, minlength=FOLDS)
    if (room < 1).any():
        counts = f"{len(same):,} pairs, {len(positive):,} of them positive"
        _fail(where, f"{counts}: cannot be cut into {FOLDS} equal folds of both kinds")
    fold = np.empty(len(same), np.int64)
    fold[same], fold[~same] = positive, np.repeat(np.arange(FOLDS), room)
    return fold


def _pairs(
    name: str,
    where: Path,
    items: Items,
    first: np.ndarray,
    second: np.ndarray,
    same: np.ndarray,
    fold: np.ndarray,
    folds: int = FOLDS,
) -> Pairs:
    """Ordered fold after fold. ValueError where a fold is not a block of both kinds."""
    sizes = np.bincount(fold, minlength=folds)
    positives = np.bincount(fold[same], minlength=folds)
    both_kinds = (positives > 0) & (positives < sizes)
    if sizes.tolist() != _sizes(len(same), folds) or not both_kinds.all():
        both = ", ".join(f"{p}+{n - p}" for p, n in zip(positives, sizes, strict=True))
        _fail(where, f"folds of {both} pairs (same + different); they must be equal, of both kinds")
    order = np.argsort(fold, kind="stable")
    return Pairs(name, items, first[order], second[order], same[order], folds)


# -- training faces ------------------------------------------------------------------------------


def casia(root: Path, counts: Counts = "published") -> tuple[Files, list[str]]:
    """CASIA-WebFace, raw: (images, identity names) of root/<identity>/*, e.g. 0000045/001.jpg.

    ValueError: no such folder, an identity without images, counts other than published.
    """
    files, names = _identities(root)
    found = {"identities": len(names), "images": len(files)}
    check_counts("CASIA-WebFace", root, found, CASIA, counts)
    return files, names


def vggface2(
    root: Path, split: Literal["train", "test"] = "train", counts: Counts = "published"
) -> tuple[Files, list[str]]:
    """VGGFace2: (images, identity names) of root/<split>/<identity>/*, e.g. n000002/0001_01.jpg.

    ValueError: no such folder, an identity without images, counts other than published.
    """
    files, names = _identities(root / split)
    found, published = {"identities": len(names)}, {"identities": VGGFACE2[split]}
    check_counts("VGGFace2", root / split, found, published, counts)
    return files, names


def umdfaces(root: Path, counts: Counts = "published") -> tuple[Files, list[str]]:
    """UMDFaces stills with face boxes: (images, identity names); one row of the lists is one face.

    root/umdfaces_batchN_ultraface.csv or root/umdfaces_batchN/umdfaces_batchN_ultraface.csv, its
    FILE (<person>/<image>) in root/umdfaces_batchN or in root. The identity is the person's folder:
    SUBJECT_ID counts anew in each batch. ValueError: no list, a malformed row (file and number),
    missing images, counts other than published.
    """
    lists = sorted(root.glob("umdfaces_batch*_ultraface.csv"))
    lists += sorted(root.glob("umdfaces_batch*/umdfaces_batch*_ultraface.csv"))
    if not lists:
        _fail(root, "no umdfaces_batch*_ultraface.csv in it, nor in a umdfaces_batch* folder")
    files: list[str] = []
    boxes: list[tuple[float, ...]] = []
    for path in lists:
        batch = path.parent / path.name.removesuffix("_ultraface.csv")
        folder = batch if batch.is_dir() else path.parent
        prefix = "" if folder == root else f"{folder.relative_to(root)}/"
        own, own_boxes = _umdfaces_rows(path)
        _check_listed(path, folder, own)
        files += [prefix + file for file in own]
        boxes += own_boxes
    labels, names = _labels(file.split("/")[-2] for file in files)
    found = {"identities": len(names), "images": len(files)}
    check_counts("UMDFaces", root, found, UMDFACES, counts)
    return Files(root, files, labels, np.array(boxes).reshape(-1, 4)), names


UMDFACES_COLUMNS = ("FILE", "FACE_X", "FACE_Y", "FACE_WIDTH", "FACE_HEIGHT")


def _umdfaces_rows(path: Path) -> tuple[list[str], list[tuple[float, ...]]]:
    """FILE and the box x1, y1, x2, y2 of each row."""
    files: list[str] = []
    boxes: list[tuple[float, ...]] = []
    with path.open(encoding="utf-8", newline="") as text:
        rows = csv.reader(text)
        finding = "expected FILE as person/image and a box in px"
        try:
            columns = [word.strip() for word in next(rows, [])]
            if missing := [name for name in UMDFACES_COLUMNS if name not in columns]:
                finding = f"no column {', '.join(missing)}"
                raise ValueError
            places = [columns.index(name) for name in UMDFACES_COLUMNS]
            for row in rows:
                file, *sides = (row[place].strip() for place in places)
                x, y, width, height = map(float, sides)
                person, _, image = file.partition("/")
                sound = all(abs(side) < 1e6 for side in (x, y, width, height))  # NaN is not
                if not (sound and width > 0 < height and _is_name(person) and _is_name(image)):
                    raise ValueError
                files.append(file)
                boxes.append((x, y, x + width, y + height))
        except (ValueError, IndexError, csv.Error):  # also of text that is no UTF-8
            raise ValueError(f"{path}: line {rows.line_num}: {finding}") from None
    return files, boxes


def _check_listed(where: Path, folder: Path, files: list[str]) -> None:
    """By one listing of each person's folder, not by a look at each file."""
    persons = {file.partition("/")[0] for file in files}
    there = {
        f"{person}/{image}"
        for person in persons
        if (folder / person).is_dir()
        for image in os.listdir(folder / person)
    }
    missing = [file for file in files if file not in there]
    if missing:
        _fail_missing(where, missing, len(files), folder)


def _identities(folder: Path) -> tuple[Files, list[str]]:
    """folder/<identity>/<image>, identities numbered in sorted order; no look at any file."""
    if not folder.is_dir():
        _fail(folder, "no such folder")
    with os.scandir(folder) as entries:
        names = sorted(e.name for e in entries if e.name[0] != "." and e.is_dir())
    if not names:
        _fail(folder, "no folders in it, expected <identity>/<image>")
    files: list[str] = []
    sizes = []
    for name in names:
        own = sorted(f for f in os.listdir(folder / name) if f.lower().endswith(SUFFIXES))
        if not own:
            _fail(folder / name, f"no image in it ({', '.join(SUFFIXES)})")
        files += [f"{name}/{file}" for file in own]
        sizes.append(len(own))
    return Files(folder, files, np.repeat(np.arange(len(names)), sizes)), names


# -- small things --------------------------------------------------------------------------------


def _labels(persons: Iterable[str]) -> tuple[list[int], list[str]]:
    """Numbers [N] and the names they count, sorted."""
    each = list(persons)
    names = sorted(set(each))
    number = {name: k for k, name in enumerate(names)}
    return [number[name] for name in each], names


def _lines(path: Path) -> list[str]:
    """A list's lines, those that are empty at its end left out."""
    if not path.is_file():
        _fail(path, "no such file")
    if path.stat().st_size > MOST_BYTES:
        _fail(path, f"{path.stat().st_size:,} bytes, too large for a list of pairs")
    try:
        lines = path.read_text(encoding="utf-8-sig").rstrip().splitlines()
    except UnicodeDecodeError as error:
        _fail(path, f"byte {error.start:,}: not text (UTF-8)")
    return lines or _fail(path, "empty")


def _is_number(word: str) -> bool:
    return word.isascii() and word.isdigit() and len(word) <= 7


def _is_name(word: str) -> bool:
    """One component of a path, below the folder it is looked for in."""
    return word not in ("", ".", "..") and not set(word) & set("/\\\0")


def _fail_missing(where: Path, missing: list[str], total: int, root: Path) -> NoReturn:
    first = f"{missing[0]} the first"
    _fail(where, f"{len(missing):,} of its {total:,} images are not in {root}, {first}")


def _fail_line(path: Path, number: int, expected: str, line: str) -> NoReturn:
    _fail(path, f"line {number:,}: expected {expected}; found {line[:60]!r}")


def _fail(where: Path, finding: str) -> NoReturn:
    raise ValueError(f"{where}: {finding}")

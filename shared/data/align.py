"""Faces cut out of photographs: five landmarks to the ArcFace template, or a box with a margin.

Landmarks are px in the image as it is stored, (0, 0) being the centre of its first pixel, in the
order left eye, right eye, nose, left and right mouth corner as seen by the viewer: what RetinaFace
and MTCNN give. They come from a CSV file of `path,x1,y1,...,x5,y5`, the path being `Items.name`.
Any detector writes one; with `detect` standing for yours, image -> [5, 2] or None:

    from shared.data.align import write_landmarks

    rows = []
    for i in range(len(items)):
        points = detect(items.image(i))
        if points is not None:
            rows.append((items.name(i), points))
    write_landmarks(Path("landmarks.csv"), rows)
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike
from PIL import Image

from shared.config import Data
from shared.data.items import Items
from shared.files import write_text

Policy = Literal["centre-crop", "drop", "error"]

# Of a 112 x 112 face (Deng et al. 2019; InsightFace's packs are cut so). Other sizes scale it.
TEMPLATE = np.array(
    [
        [38.2946, 51.6963],
        [73.5318, 51.5014],
        [56.0252, 71.7366],
        [41.5493, 92.3655],
        [70.7299, 92.2041],
    ]
)
HEADER = ["path", *(f"{axis}{k}" for k in range(1, 6) for axis in "xy")]


def similarity(landmarks: ArrayLike, target: ArrayLike) -> np.ndarray:
    """The scaling, rotation and shift that takes landmarks [5, 2] to target [5, 2] best.

    Least squares without reflection (Umeyama 1991). Returns [2, 3]: (x, y, 1) -> (x', y').
    Raises ValueError for landmarks that are not finite, that lie in one point, or whose mirror
    image fits much better (left and right exchanged).
    """
    points, goal = np.asarray(landmarks, np.float64), np.asarray(target, np.float64)
    if points.shape != goal.shape or points.ndim != 2 or points.shape[1] != 2:
        raise ValueError(f"landmarks {points.shape}: expected {goal.shape}")
    fault = _faults(points[None], goal)[0]
    if fault:
        raise ValueError(f"landmarks {fault}")
    # A plane similarity is one complex product, w = a z + b, and this its linear regression.
    z, w = points @ (1, 1j), goal @ (1, 1j)
    a = (z - z.mean()).conj() @ (w - w.mean()) / (abs(z - z.mean()) ** 2).sum()
    b = w.mean() - a * z.mean()
    return np.array([[a.real, -a.imag, b.real], [a.imag, a.real, b.imag]])


def _faults(points: np.ndarray, goal: np.ndarray) -> list[str]:
    """What is wrong with each face's landmarks [N, 5, 2]; "" where nothing is."""
    with np.errstate(invalid="ignore", over="ignore"):
        z, w = points @ (1, 1j), goal @ (1, 1j)
        z = z - z.mean(axis=1, keepdims=True)
        spread = np.abs(z).max(axis=1)
        upright = np.abs(z.conj() @ (w - w.mean()))
        mirrored = np.abs(z @ (w - w.mean()))
    faults = np.full(len(points), "", dtype=object)
    # The factor spares profiles: of points on a line the mirror image fits as well.
    faults[mirrored > 2 * upright] = "are mirrored: left and right are exchanged"
    faults[~(spread > 1e-6)] = "lie in one point"
    faults[~(np.abs(points) < 1e9).all(axis=(1, 2))] = "are not finite"
    return faults.tolist()


def align(image: np.ndarray, landmarks: ArrayLike, size: int = 112) -> np.ndarray:
    """The face at the template: image uint8 [H, W, 3], landmarks [5, 2] -> uint8 [size, size, 3].

    Bilinear between four pixels, black outside, rounded: OpenCV's warpAffine without its rounding
    of positions to 1/32 px. No antialiasing where the face is larger than the output, as in the
    code that cut the public packs and feeds the public networks. Raises ValueError, see
    `similarity`.
    """
    matrix = similarity(landmarks, TEMPLATE * (size / 112))
    inverse = np.linalg.inv(matrix[:, :2])
    rows, columns = np.mgrid[:size, :size]
    x, y = np.tensordot(inverse, np.stack([columns, rows]) - matrix[:, 2, None, None], axes=1)
    left, top = np.floor(x), np.floor(y)
    out = np.zeros((size, size, image.shape[2]))
    for right in (0, 1):
        for low in (0, 1):
            u, v = left + right, top + low
            inside = (u >= 0) & (u < image.shape[1]) & (v >= 0) & (v < image.shape[0])
            weight = (1 - np.abs(x - u)) * (1 - np.abs(y - v)) * inside
            u, v = np.where(inside, u, 0).astype(np.int64), np.where(inside, v, 0).astype(np.int64)
            out += weight[:, :, None] * image[v, u]
    return np.floor(out + 0.5).astype(np.uint8)


def centre_square(image: np.ndarray, size: int) -> np.ndarray:
    """The largest centred square, by antialiased bicubic: [H, W, 3] -> [size, size, 3] uint8."""
    side = min(image.shape[:2])
    top, left = (image.shape[0] - side) // 2, (image.shape[1] - side) // 2
    square = Image.fromarray(np.ascontiguousarray(image[top : top + side, left : left + side]))
    return np.array(square.resize((size, size), Image.Resampling.BICUBIC))


def crop_box(image: np.ndarray, box: ArrayLike, margin: float) -> np.ndarray:
    """A square around a box: image uint8 [H, W, 3], box (x1, y1, x2, y2) px -> uint8 [S, S, 3].

    S is the box's longer side times 1 + margin, rounded; what lies outside the image is black, as
    in `align`. Raises ValueError for a box without area, off the image, or more than 4 times as
    large as it.
    """
    height, width = image.shape[:2]
    x1, y1, x2, y2 = (float(v) for v in np.asarray(box))
    shown = f"box ({x1:g}, {y1:g}, {x2:g}, {y2:g})"
    if not (np.isfinite([x1, y1, x2, y2]).all() and x1 < x2 and y1 < y2):
        raise ValueError(f"{shown}: expected x1 < x2 and y1 < y2")
    if x1 >= width or y1 >= height or x2 <= 0 or y2 <= 0:
        raise ValueError(f"{shown}: outside the image of {width} x {height} px")
    longer = max(x2 - x1, y2 - y1)
    if longer > 4 * max(width, height):
        raise ValueError(f"{shown}: no box of an image of {width} x {height} px")
    side = max(1, int(longer * (1 + margin) + 0.5))
    left = math.floor((x1 + x2 - side) / 2 + 0.5)
    top = math.floor((y1 + y2 - side) / 2 + 0.5)
    out = np.zeros((side, side, image.shape[2]), np.uint8)
    inner = image[max(top, 0) : max(top + side, 0), max(left, 0) : max(left + side, 0)]
    down, right = max(-top, 0), max(-left, 0)
    out[down : down + inner.shape[0], right : right + inner.shape[1]] = inner
    return out


# -- landmark files ------------------------------------------------------------------------------


def read_landmarks(path: Path) -> dict[str, np.ndarray]:
    """{name: float64 [5, 2]} of a CSV file `path,x1,y1,...,x5,y5`, with that header or without.

    Raises ValueError naming file and line for another number of columns, what is no finite number,
    and a path that comes twice, and where there is no file.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file; expected lines of {','.join(HEADER)}")
    found: dict[str, np.ndarray] = {}
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:  # -sig: a mark Excel writes
            reader = csv.reader(file, strict=True)
            for cells in reader:
                if not cells or [c.strip().lower() for c in cells] == HEADER and not found:
                    continue
                where = f"{path}, line {reader.line_num}"
                if len(cells) != len(HEADER):
                    raise ValueError(f"{where}: {len(cells)} columns; expected {','.join(HEADER)}")
                try:
                    numbers = np.array([float(c) for c in cells[1:]])
                except ValueError:
                    numbers = np.array([np.nan])
                if not np.isfinite(numbers).all():
                    raise ValueError(f"{where}: coordinates of {cells[0]} must be finite numbers")
                if cells[0] in found:
                    raise ValueError(f"{where}: {cells[0]} comes twice; keep one face an image")
                found[cells[0]] = numbers.reshape(5, 2)
    except UnicodeDecodeError:
        raise ValueError(f"{path}: not a text file in UTF-8") from None
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num}: {error}") from None
    if not found:
        raise ValueError(f"{path}: no landmarks in it; expected lines of {','.join(HEADER)}")
    return found


def write_landmarks(path: Path, rows: Iterable[tuple[str, ArrayLike]]) -> None:
    """Write (name, landmarks [5, 2]) as the CSV file that `read_landmarks` reads, exactly.

    Raises ValueError for a name that comes twice and landmarks that are not [5, 2] or not finite.
    """
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(HEADER)
    names = set()
    for name, landmarks in rows:
        points = np.asarray(landmarks, np.float64)
        if points.shape != (5, 2) or not np.isfinite(points).all():
            raise ValueError(f"{path}: landmarks of {name} must be [5, 2] finite numbers")
        if name in names:
            raise ValueError(f"{path}: {name} comes twice; keep one face an image")
        names.add(name)
        writer.writerow([name, *(repr(float(v)) for v in points.flatten())])
    write_text(path, text.getvalue())


# -- sets of images ------------------------------------------------------------------------------


def placed(items: Items, data: Data) -> tuple[Items, str]:
    """Faces cut out as `data` says, and the name of that: what a network and its data must share.

    "arcface": five landmarks on ArcFace's template, by the data set's makers; "arcface:POLICY": by
    the files `data.landmarks`, with the policy for faces that they lack. Both are 112 px, from
    where every other size is made: cut at another size at once, a face would lie otherwise, by a
    third of a pixel at 64. "box+M": the data set's boxes with `data.margin` M. "whole": images as
    they are.
    """
    if getattr(items, "aligned", False):
        return items, "arcface"
    if data.landmarks:
        points: dict[str, np.ndarray] = {}
        for name in data.landmarks:
            more = read_landmarks(Path(name).expanduser())
            if twice := points.keys() & more.keys():
                raise ValueError(f"{name}: {min(twice)} stands in another landmark file, too")
            points |= more
        cut = Aligned(items, points, policy=data.no_landmarks)
        return cut, f"arcface:{data.no_landmarks}"
    if getattr(items, "boxes", None) is not None:
        return Cropped(items, margin=data.margin), f"box+{data.margin:g}"
    return items, "whole"


class Aligned:
    """Items whose faces are at the ArcFace template: uint8 [size, size, 3].

    landmarks: {name: [5, 2]}, see `read_landmarks`. policy: a face without landmarks is taken from
    the centre of its image ("centre-crop"), left out ("drop"), or an error. `report` counts them.
    Raises ValueError for the first face without landmarks where the policy is "error", and for
    landmarks that cannot be a face's (one point, mirrored) under every policy: a line to correct
    or to take out of the file.
    """

    def __init__(
        self,
        items: Items,
        landmarks: Mapping[str, np.ndarray],
        policy: Policy,
        size: int = 112,
    ) -> None:
        if policy not in ("centre-crop", "drop", "error"):
            raise ValueError(f"policy {policy!r}: must be centre-crop, drop or error")
        if size < 1:
            raise ValueError(f"size {size}: must be 1 px or more")
        points = np.full((len(items), 5, 2), np.nan)
        found = np.zeros(len(items), dtype=bool)
        for i in range(len(items)):
            face = landmarks.get(items.name(i))
            if face is not None:
                points[i], found[i] = face, True
        missing = np.flatnonzero(~found)
        if len(missing) == len(items):
            example = next(iter(landmarks), "nothing")
            raise ValueError(
                f"no image has landmarks: the file names {example}, the data set "
                f"{items.name(0) if len(items) else 'nothing'}; paths must be the same"
            )
        if len(missing) and policy == "error":
            raise ValueError(
                f"{items.name(int(missing[0]))}: no landmarks, nor have {len(missing) - 1} others "
                f"of {len(items)}; add them, or say --data.no-landmarks centre-crop or drop"
            )
        faults = _faults(points[found], TEMPLATE)
        for i, fault in zip(np.flatnonzero(found).tolist(), faults, strict=True):
            if fault:
                raise ValueError(f"{items.name(i)}: its landmarks {fault}")
        self.items, self.size = items, size
        self.kept = np.flatnonzero(found) if policy == "drop" else np.arange(len(items))
        self.points = points[self.kept]
        self.labels = items.labels[self.kept]
        self.report = {"images": len(items), "aligned": int(found.sum())}
        if policy != "error":
            self.report["dropped" if policy == "drop" else policy] = len(missing)

    def __len__(self) -> int:
        return len(self.kept)

    def image(self, i: int) -> np.ndarray:
        image = self.items.image(int(self.kept[i]))
        if np.isnan(self.points[i, 0, 0]):
            return centre_square(image, self.size)
        return align(image, self.points[i], self.size)

    def name(self, i: int) -> str:
        return self.items.name(int(self.kept[i]))


class Cropped:
    """Items with `boxes` [N, 4] cut to them, see `crop_box`: uint8 [S, S, 3], S an image's own.

    Raises ValueError where there are no boxes; image(i) raises it for a box that is none.
    """

    def __init__(self, items: Items, margin: float) -> None:
        boxes = getattr(items, "boxes", None)
        if boxes is None:
            raise ValueError("these images have no boxes to be cut to")
        if not 0 <= margin <= 10:
            raise ValueError(f"margin {margin}: must be from 0 to 10 (.2: 20 % larger)")
        self.items, self.boxes, self.margin = items, np.asarray(boxes, np.float64), margin
        self.labels = items.labels

    def __len__(self) -> int:
        return len(self.items)

    def image(self, i: int) -> np.ndarray:
        try:
            return crop_box(self.items.image(i), self.boxes[i], self.margin)
        except ValueError as error:
            said = str(error)
            name = self.name(i)
            raise ValueError(said if name in said else f"{name}: {said}") from None

    def name(self, i: int) -> str:
        return self.items.name(i)

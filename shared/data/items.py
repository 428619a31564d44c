"""Images where they lie: files, records, encoded bytes; decoded when they are asked for."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import simplejpeg
import torch
from PIL import Image
from torch import Tensor

Counts = Literal["published", "any"]

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".ppm", ".pgm", ".tif", ".tiff")
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "PPM", "TIFF")  # Pillow's EPS would start Ghostscript
MOST_PIXELS = 1 << 26  # of one image, 192 MiB decoded: what says more is damaged, or an attack


class Items(Protocol):
    """Labelled images by number; picklable, so that worker processes can decode them."""

    labels: np.ndarray  # [N] int64

    def __len__(self) -> int: ...

    def image(self, i: int) -> np.ndarray:
        """uint8 [H, W, 3] RGB at native size. ValueError, naming it, if it cannot be decoded."""
        ...

    def name(self, i: int) -> str:
        """Path from the root, or container#number: for messages, and the key of landmarks."""
        ...


class Files:
    """Image files below `root`; boxes [N, 4]: x1, y1, x2, y2 in px where the set has them."""

    def __init__(
        self,
        root: Path,
        files: Sequence[str],
        labels: np.ndarray | Sequence[int],
        boxes: np.ndarray | None = None,
    ) -> None:
        self.root, self.files, self.boxes = root, list(files), boxes
        self.labels = np.asarray(labels, dtype=np.int64)
        if len(self.labels) != len(self.files) or (boxes is not None and len(boxes) != len(files)):
            raise ValueError(f"{root}: {len(files)} files, but {len(self.labels)} labels or boxes")

    def __len__(self) -> int:
        return len(self.files)

    def image(self, i: int) -> np.ndarray:
        return decode(self.root / self.files[i])

    def name(self, i: int) -> str:
        return self.files[i]


class Encoded:
    """Images in memory: encoded bytes (JPEG, PNG) or uint8 arrays [H, W, 3] RGB.

    aligned: they are faces at the ArcFace template already.
    """

    def __init__(
        self,
        where: str,
        images: Sequence[bytes | np.ndarray],
        labels: np.ndarray | Sequence[int] | None = None,
        aligned: bool = False,
    ) -> None:
        self.where, self.images, self.aligned = where, images, aligned
        self.labels = np.asarray(np.zeros(len(images)) if labels is None else labels, np.int64)

    def __len__(self) -> int:
        return len(self.images)

    def image(self, i: int) -> np.ndarray:
        image = self.images[i]
        return image if isinstance(image, np.ndarray) else decode(image, self.name(i))

    def name(self, i: int) -> str:
        return f"{self.where}#{i}"


class Subset:
    """Some images of others, by number, with labels of their own."""

    def __init__(self, items: Items, numbers: np.ndarray, labels: np.ndarray) -> None:
        self.items, self.numbers = items, np.asarray(numbers)
        self.labels = np.asarray(labels, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.numbers)

    def image(self, i: int) -> np.ndarray:
        return self.items.image(int(self.numbers[i]))

    def name(self, i: int) -> str:
        return self.items.name(int(self.numbers[i]))


class Boxed:
    """Image files cut to their boxes, without a margin; of a box that reaches outside, what is in.

    first: what the boxes call a picture's first pixel. 0: a box is its edges, x1 <= x < x2. 1:
    pixels are counted from 1, and x2 is in it. image(i) raises ValueError, naming the file, for a
    box that holds no pixel of the picture.
    """

    def __init__(self, files: Files, first: Literal[0, 1]) -> None:
        if files.boxes is None:
            raise ValueError(f"{files.root}: these images have no boxes")
        self.files, self.labels = files, files.labels
        self.corners = np.floor(files.boxes - [first, first, 0, 0] + 0.5).astype(np.int64)

    def __len__(self) -> int:
        return len(self.files)

    def image(self, i: int) -> np.ndarray:
        image = self.files.image(i)
        x1, y1, x2, y2 = self.corners[i].tolist()
        part = image[max(y1, 0) : max(y2, 0), max(x1, 0) : max(x2, 0)]
        if not part.size:
            box = ", ".join(f"{v:g}" for v in self.files.boxes[i])  # type: ignore[index]
            raise ValueError(
                f"{self.files.root / self.name(i)}: its box ({box}) holds no pixel of the picture "
                f"of {image.shape[1]} x {image.shape[0]} px"
            )
        return part

    def name(self, i: int) -> str:
        return self.files.name(i)


class Joined:
    """Several one after the other; boxes where all of them have some."""

    def __init__(self, parts: Sequence[Items]) -> None:
        self.parts = list(parts)
        self.labels = np.concatenate([part.labels for part in parts])
        self.ends = np.cumsum([len(part) for part in parts])
        boxes = [b for part in parts if (b := getattr(part, "boxes", None)) is not None]
        self.boxes = np.concatenate(boxes) if len(boxes) == len(parts) else None

    def __len__(self) -> int:
        return int(self.ends[-1])

    def image(self, i: int) -> np.ndarray:
        part, number = self._place(i)
        return part.image(number)

    def name(self, i: int) -> str:
        part, number = self._place(i)
        return part.name(number)

    def _place(self, i: int) -> tuple[Items, int]:
        k = int(np.searchsorted(self.ends, i, side="right"))
        return self.parts[k], i - (int(self.ends[k - 1]) if k else 0)


def decode(source: bytes | Path, where: str = "") -> np.ndarray:
    """An encoded image as uint8 [H, W, 3] RGB. Raises ValueError, naming it or `where`, in a line.

    A truncated file is an error, never a half-grey image, and so is a scan that libjpeg finds
    corrupt; stray bytes between two markers are not (many photographs of the web have some). A
    JPEG has no checksum: damage that still decodes cannot be seen. The bits are Pillow's.
    """
    name = where or str(source)
    try:
        data = source if isinstance(source, bytes) else source.read_bytes()
        image = _turbo(data) if data[:2] == b"\xff\xd8" else None
        return _pillow(data) if image is None else image
    except Exception as error:  # the decoders raise a dozen types for damaged bytes
        if isinstance(error, OSError) and error.errno:
            finding = error.strerror or type(error).__name__
        elif "cannot identify" in str(error):
            finding = "no known format"
        else:
            finding = str(error).split("\n")[0][:80]
        raise ValueError(f"{name}: not a readable image ({finding})") from None


def _turbo(data: bytes) -> np.ndarray | None:
    """By libjpeg-turbo alone, twice as fast as through Pillow; None for what it leaves to that."""
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
        _check_size(height, width)
        return None if colours in ("CMYK", "YCCK") else simplejpeg.decode_jpeg(data, "RGB")
    except ValueError as error:
        if "extraneous bytes" in str(error) or "subsampling level" in str(error):
            return None
        raise


def _pillow(data: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(data), formats=FORMATS) as image:  # reads only the header
        _check_size(image.height, image.width)
        if image.mode in ("I", "F"):
            raise ValueError("32 bits a pixel, of no known range; save it with 8")
        if image.mode.startswith("I;16"):  # Pillow would clip it
            return np.repeat((np.array(image) >> 8).astype(np.uint8)[:, :, None], 3, axis=2)
        return np.array(image.convert("RGB"))


def _check_size(height: int, width: int) -> None:
    if not 0 < height * width <= MOST_PIXELS:
        raise ValueError(f"{width} x {height} pixels")


def fit(image: np.ndarray, size: int, *, whole: bool = False) -> Tensor:
    """uint8 [H, W, 3] to uint8 [3, size, size], by antialiased bicubic resizing.

    Shorter side to `size`, then the centre; `whole` keeps all of it and changes its shape instead
    (tight face crops, which are taller than wide).
    """
    height, width = image.shape[:2]
    if height == width == size:
        return torch.from_numpy(np.require(image, requirements="W")).permute(2, 0, 1)
    picture = Image.fromarray(image)
    if whole:
        sides = (size, size)
    else:
        scale = size / min(height, width)
        sides = (max(size, round(width * scale)), max(size, round(height * scale)))
    if sides != (width, height):
        picture = picture.resize(sides, Image.Resampling.BICUBIC)
    left, top = (picture.width - size) // 2, (picture.height - size) // 2
    if picture.size != (size, size):
        picture = picture.crop((left, top, left + size, top + size))
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


def check_counts(
    what: str,
    root: Path,
    found: Mapping[str, int],
    published: Mapping[str, int],
    counts: Counts,
) -> None:
    """ValueError where `found` differs from the published numbers, unless counts is "any"."""
    odd = [f"{n:,} {k} instead of {published[k]:,}" for k, n in found.items() if n != published[k]]
    if odd and counts == "published":
        raise ValueError(
            f"{what} in {root}: {', '.join(odd)}; complete the copy, or take what is there with "
            "--data.counts any (scores are then not comparable with published ones)"
        )

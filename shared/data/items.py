"""Images where they lie: files, records, encoded bytes; decoded when they are asked for."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg

Counts = Literal["published", "any"]

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".ppm", ".pgm", ".tif", ".tiff")
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "PPM", "TIFF")  # Pillow's EPS would start Ghostscript
MOST_PIXELS = 1 << 27  # of one image, 384 MiB decoded: what says more is damaged, or an attack


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
    """Images in memory: encoded bytes (JPEG, PNG) or uint8 arrays [H, W, 3] RGB."""

    def __init__(
        self,
        where: str,
        images: Sequence[bytes | np.ndarray],
        labels: np.ndarray | Sequence[int] | None = None,
    ) -> None:
        self.where, self.images = where, images
        self.labels = np.asarray(np.zeros(len(images)) if labels is None else labels, np.int64)

    def __len__(self) -> int:
        return len(self.images)

    def image(self, i: int) -> np.ndarray:
        image = self.images[i]
        return image if isinstance(image, np.ndarray) else decode(image, self.name(i))

    def name(self, i: int) -> str:
        return f"{self.where}#{i}"


def decode(source: bytes | Path, where: str = "") -> np.ndarray:
    """An encoded image as uint8 [H, W, 3] RGB. Raises ValueError, naming it or `where`, in a line.

    A truncated file is an error, never a half-grey image. JPEG goes through torchvision's
    libjpeg-turbo: the bits of Pillow, in little more than half its time on face crops.
    """
    name = where or str(source)
    try:
        data = source if isinstance(source, bytes) else source.read_bytes()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's of size and Exif: size is checked here
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:  # only the header
                if not 0 < image.width * image.height <= MOST_PIXELS:
                    raise ValueError(f"{image.width} x {image.height} pixels")
                if image.format == "JPEG" and image.mode in ("RGB", "L"):
                    buffer = torch.frombuffer(bytearray(data), dtype=torch.uint8)
                    pixels = decode_jpeg(buffer, ImageReadMode.RGB)
                    return pixels.permute(1, 2, 0).contiguous().numpy()
                return np.array(image.convert("RGB"))
    except Exception as error:  # the decoders raise a dozen types for damaged bytes
        if isinstance(error, OSError) and error.errno:
            finding = error.strerror or type(error).__name__
        elif "cannot identify" in str(error):
            finding = "no known format"
        else:  # torchvision begins with the place in its own source
            finding = re.sub(r"^decode_jpeg, \S*, ", "", str(error).split("\n")[0])[:80]
        raise ValueError(f"{name}: not a readable image ({finding})") from None


def fit(image: np.ndarray, size: int, *, whole: bool = False) -> Tensor:
    """uint8 [H, W, 3] to uint8 [3, size, size], by antialiased bicubic resizing.

    Shorter side to `size`, then the centre; `whole` keeps all of it and changes its shape instead
    (tight face crops, which are taller than wide).
    """
    height, width = image.shape[:2]
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

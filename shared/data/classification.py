"""Labelled images: CIFAR-10/100 and SVHN through torchvision, digits, any folder of images.

All come as square uint8 RGB images of `data.hr` px, in memory where they fit.
"""

from __future__ import annotations

import functools
import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from shared.config import Data, digest
from shared.data.pipeline import Images, Resident, Streaming

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".ppm", ".pgm", ".tif", ".tiff")

LICENCES = {
    "cifar10": "CIFAR-10 (Krizhevsky 2009), no stated licence, research use",
    "cifar100": "CIFAR-100 (Krizhevsky 2009), no stated licence, research use",
    "svhn": "SVHN (Netzer et al. 2011), non-commercial use only",
    "digits": "UCI optical recognition of handwritten digits (Alpaydin, Kaynak 1998), CC BY 4.0",
    "folder": "the user's own",
}


@dataclass(frozen=True)
class Parts:
    """What a reader found."""

    train: Images
    held_out: dict[str, Images]  # "test" always, "development" where there is one
    classes: int
    where: str
    licence: str
    shared_classes: bool = True  # False: held-out classes are other than the training ones
    fingerprint: str = ""  # changes when the files do
    skipped: tuple[str, ...] = ()


def read(data: Data, cache: Path) -> Parts:
    """Read what `data` names. Raises ValueError with one line where it cannot."""
    if data.root and not Path(data.root).expanduser().is_dir():
        raise ValueError(f"--data.root {data.root}: no such folder")
    if data.name == "digits":
        return _digits(data)
    if data.name == "folder":
        return _folder(data)
    return _torchvision(data, cache)


def _torchvision(data: Data, cache: Path) -> Parts:
    """CIFAR: the python-format archive's folder; SVHN: {train,test}_32x32.mat. 32x32 images."""
    from torchvision import datasets

    root = Path(data.root).expanduser() if data.root else cache / data.name
    download = not data.root

    def split(train: bool) -> Resident:
        try:
            if data.name == "svhn":
                part = datasets.SVHN(str(root), "train" if train else "test", download=download)
                return _resident(part.data, part.labels, data)
            reader = datasets.CIFAR100 if data.name == "cifar100" else datasets.CIFAR10
            part = reader(str(root), train=train, download=download)
            return _resident(part.data.transpose(0, 3, 1, 2), part.targets, data)
        except (RuntimeError, OSError, KeyError, EOFError, ValueError, pickle.PickleError) as error:
            reason = str(error).split("\n")[0]
            if isinstance(error, ValueError) and "--" in reason:
                raise
            help_ = (
                "the download failed; fetch it elsewhere and name its folder with --data.root"
                if download
                else "expected torchvision's layout (cifar-100-python/, cifar-10-batches-py/ or "
                "{train,test}_32x32.mat), complete"
            )
            raise ValueError(f"{data.name} in {root}: {help_} ({reason})") from None

    classes = 100 if data.name == "cifar100" else 10
    held_out: dict[str, Images] = {"test": split(False)}
    where = str(root.resolve())
    return Parts(split(True), held_out, classes, where, LICENCES[data.name], fingerprint=where)


def _digits(data: Data) -> Parts:
    """scikit-learn's 1,797 handwritten digits, 8x8, 17 grey levels: 1,000 / 297 / 500 images."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    pixels = np.rint(bunch.images * (255 / 16)).astype(np.uint8)
    pixels = np.repeat(pixels[:, None], 3, axis=1)
    order = np.random.default_rng(data.seed).permutation(len(pixels))
    parts = np.split(order, [1000, 1297])
    train, development, test = (_resident(pixels[p], bunch.target[p], data) for p in parts)
    return Parts(
        train,
        {"development": development, "test": test},
        10,
        "scikit-learn",
        LICENCES["digits"],
    )


def _resident(pixels: np.ndarray, labels: Sequence[int] | np.ndarray, data: Data) -> Resident:
    """Images of a fixed native size: `data.hr` must be that size."""
    if pixels.shape[-1] != data.hr:
        raise ValueError(
            f"--data.hr {data.hr}: the images of {data.name} are {pixels.shape[-1]} px"
        )
    return Resident(np.ascontiguousarray(pixels), np.asarray(labels))


# -- folders -------------------------------------------------------------------------------------


def _folder(data: Data) -> Parts:
    """ROOT/train/<class>/* and ROOT/test/<class>/* (or val); with both, val selects the best epoch.

    Where the held-out classes are the training ones this is classification; where none of them is,
    the classes are taken for identities: verification and identification.
    """
    if not data.root:
        raise ValueError("--data.name folder needs --data.root: the folder with train/ and test/")
    root = Path(data.root).expanduser()
    if not (root / "train").is_dir():
        raise ValueError(f"{root}: no train/ folder in it (expected train/<class>/<image>)")
    names = [name for name in ("test", "val") if (root / name).is_dir()]
    if not names:
        raise ValueError(f"{root}: no test/ or val/ folder in it (expected test/<class>/<image>)")
    files, labels, classes = _scan(root / "train")
    if len(classes) < 2:
        raise ValueError(f"{root / 'train'}: {len(classes)} class; training needs 2 or more")
    found = {name: _scan(root / name) for name in names}
    overlap = {name: set(classes) & set(found[name][2]) for name in names}
    for name in names:
        if overlap[name] and set(found[name][2]) - set(classes):
            odd = sorted(set(found[name][2]) - set(classes))
            raise ValueError(
                f"{root / name}: classes that train/ does not have: {', '.join(odd[:5])}; "
                "name either the same classes (classification) or none of them (identities)"
            )
    shared_classes = bool(overlap[names[0]])
    if any(bool(overlap[name]) != shared_classes for name in names):
        raise ValueError(f"{root}: test/ and val/ must both hold train/'s classes, or neither any")
    train, skipped = _images(files, labels, data)
    held_out = {}
    for name in names:
        held_files, held_labels, held_classes = found[name]
        if shared_classes:  # a held-out folder may lack a class: number them as train/ does
            number = [classes.index(c) for c in held_classes]
            held_labels = [number[k] for k in held_labels]
        if data.on_error == "skip":  # an evaluation has no stand-ins: look at every file first
            held_files, held_labels, odd_files = _decodable(held_files, held_labels, data)
            skipped += odd_files
        images, odd_files = _images(held_files, held_labels, data)
        role = "development" if name == "val" and len(names) == 2 else "test"
        held_out[role] = images
        skipped += odd_files
    return Parts(
        train,
        held_out,
        len(classes),
        str(root / "train"),
        LICENCES["folder"],
        shared_classes=shared_classes,
        fingerprint=_fingerprint(root, files),
        skipped=tuple(skipped),
    )


def _fingerprint(root: Path, files: list[Path]) -> str:
    """Of names, sizes and times of the training files: a teacher's cache key holds it."""
    facts = [(str(p.relative_to(root)), (s := p.stat()).st_size, s.st_mtime_ns) for p in files]
    return digest(facts)


def labelled_folder(folder: Path, data: Data) -> tuple[Images, list[str]]:
    """FOLDER/<class>/* as images of `data.hr` px, and the files left out."""
    if not folder.is_dir():
        raise ValueError(f"--root {folder}: no such folder")
    files, labels, _ = _scan(folder)
    return _images(files, labels, data)


def _scan(folder: Path) -> tuple[list[Path], list[int], list[str]]:
    """Image files, their class numbers, and the class names in sorted order."""
    classes = sorted(p.name for p in folder.iterdir() if p.is_dir() and p.name[0] != ".")
    files, labels = [], []
    for number, name in enumerate(classes):
        own = sorted(p for p in (folder / name).rglob("*") if p.suffix.lower() in SUFFIXES)
        if not own:
            raise ValueError(f"{folder / name}: no image in it ({', '.join(SUFFIXES)})")
        files += own
        labels += [number] * len(own)
    if not files:
        raise ValueError(f"{folder}: no class folders in it (expected <class>/<image>)")
    return files, labels, classes


def _images(files: list[Path], labels: list[int], data: Data) -> tuple[Images, list[str]]:
    """Decoded into memory where that fits, else decoded on demand."""
    decode = functools.partial(_decode_number, files, data.hr)
    numbers = torch.tensor(labels)
    if len(files) * 3 * data.hr**2 > data.resident_gib * 2**30:
        stream = Streaming(decode, numbers, workers=data.workers, on_error=data.on_error)
        return stream, []
    pixels = torch.empty((len(files), 3, data.hr, data.hr), dtype=torch.uint8)
    kept: list[int] = []
    skipped: list[str] = []
    for number, path in enumerate(tqdm(files, desc="decoding", leave=False, disable=None)):
        try:
            pixels[len(kept)] = decode(number)
            kept.append(number)
        except ValueError:
            if data.on_error == "stop":
                raise
            skipped.append(str(path))
    if not kept:
        raise ValueError(f"{files[0].parents[1]}: none of its {len(files)} images can be decoded")
    return Resident(pixels[: len(kept)], numbers[kept]), skipped


def _decodable(
    files: list[Path], labels: list[int], data: Data
) -> tuple[list[Path], list[int], list[str]]:
    """The files that can be decoded, their labels, and the others."""
    good, kept, odd = [], [], []
    for path, label in zip(files, labels, strict=True):
        try:
            decode_image(path, data.hr)
        except ValueError:
            odd.append(str(path))
            continue
        good.append(path)
        kept.append(label)
    return good, kept, odd


def _decode_number(files: list[Path], size: int, number: int) -> Tensor:
    return decode_image(files[number], size)


def decode_image(path: Path, size: int) -> Tensor:
    """An image file as uint8 [3, size, size] RGB: shorter side to `size` (antialiased bicubic),
    centre crop. Raises ValueError naming the file when it cannot be decoded whole."""
    try:
        with Image.open(path) as image:
            image.load()
            rgb = image.convert("RGB")
    except Exception as error:  # Pillow's readers raise a dozen types for damaged bytes
        raise ValueError(
            f"{path}: not a readable image ({str(error)[:80]}); "
            "--data.on-error skip counts such files and goes on"
        ) from None
    scale = size / min(rgb.size)
    if scale != 1:
        width, height = (max(size, round(side * scale)) for side in rgb.size)
        rgb = rgb.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (rgb.width - size) // 2, (rgb.height - size) // 2
    rgb = rgb.crop((left, top, left + size, top + size))
    return torch.from_numpy(np.asarray(rgb).copy()).permute(2, 0, 1)

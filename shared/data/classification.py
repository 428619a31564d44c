"""Labelled images: CIFAR-10/100, SVHN, STL-10, Tiny ImageNet, digits, any folder of images.

All come as square uint8 RGB images of `data.hr` px, in memory where they fit. CIFAR, SVHN and
digits have one size, and `data.hr` must be it; the others are resized while they are read.
"""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from shared.config import Data, digest
from shared.data.align import placed
from shared.data.items import SUFFIXES, Files, check_counts, fit
from shared.data.pipeline import Images, Resident, centre, prepared
from shared.data.retrieval import check_files, home_of, rows

LICENCES = {
    "cifar10": "CIFAR-10 (Krizhevsky 2009), no stated licence, research use",
    "cifar100": "CIFAR-100 (Krizhevsky 2009), no stated licence, research use",
    "svhn": "SVHN (Netzer et al. 2011), non-commercial use only",
    "stl10": "STL-10 (Coates, Ng, Lee 2011), no stated licence, images of ImageNet, research use",
    "tinyimagenet": "Tiny ImageNet (Stanford CS231n), images of ImageNet, non-commercial use only",
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
    alignment: str = ""  # of faces that landmarks were given for


def read(data: Data, cache: Path) -> Parts:
    """Read what `data` names. Raises ValueError with one line where it cannot."""
    if data.root and not Path(data.root).expanduser().is_dir():
        raise ValueError(f"--data.root {data.root}: no such folder")
    if data.name == "digits":
        return _digits(data)
    if data.name == "folder":
        return _folder(data)
    if data.name == "stl10":
        return _stl10(data, cache)
    if data.name == "tinyimagenet":
        return _tiny_imagenet(data)
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
                return _resident(part.data, part.labels, data, held_out=not train)
            reader = datasets.CIFAR100 if data.name == "cifar100" else datasets.CIFAR10
            part = reader(str(root), train=train, download=download)
            pixels = part.data.transpose(0, 3, 1, 2)
            return _resident(pixels, part.targets, data, held_out=not train)
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


STL10 = {"training images": 5_000, "test images": 8_000}
STL10_SIDE = 96


def _stl10(data: Data, cache: Path) -> Parts:
    """stl10_binary/{train,test}_{X,y}.bin, the labelled images only; ROOT is that folder or its
    parent. 96x96 images; with another `data.hr` (CRRCD's Table IV: 32) they are resized here,
    antialiased bicubic.

    torchvision downloads, but does not read: its reader wants the archive's whole content, and
    hashes the 2.6 GB of unlabelled images first.
    """
    from torchvision import datasets

    root = Path(data.root).expanduser() if data.root else cache / data.name
    home = root if (root / "train_X.bin").is_file() else root / "stl10_binary"
    parts = [(home / f"{part}_X.bin", home / f"{part}_y.bin") for part in ("train", "test")]
    files = [path for part in parts for path in part]
    if not data.root and not all(path.is_file() for path in files):
        try:
            datasets.STL10(str(root), download=True)
        except (RuntimeError, OSError, EOFError, ValueError) as error:
            reason = str(error).split("\n")[0]
            raise ValueError(
                f"stl10 in {root}: the download failed; fetch it elsewhere and name its folder "
                f"with --data.root ({reason})"
            ) from None
    train, test = (_stl10_part(*files, data, held_out=k > 0) for k, files in enumerate(parts))
    found = {"training images": len(train), "test images": len(test)}
    check_counts("stl10", home, found, STL10, data.counts)
    where = str(home.resolve())
    facts = _fingerprint(home, [path.name for path in files])
    return Parts(train, {"test": test}, 10, where, LICENCES["stl10"], fingerprint=facts)


def _stl10_part(pixels: Path, labels: Path, data: Data, *, held_out: bool) -> Resident:
    """Bytes: R, G and B planes of an image, each column after column; labels 1 to 10."""
    for path in (pixels, labels):
        if not path.is_file():
            raise ValueError(f"{path}: no such file (expected stl10_binary/{{train,test}}_?.bin)")
    y = np.fromfile(labels, np.uint8)
    size = pixels.stat().st_size
    if size != len(y) * 3 * STL10_SIDE**2 or not size:
        raise ValueError(
            f"{pixels}: {size:,} bytes are not the {len(y):,} images of 3 x 96 x 96 bytes that "
            f"{labels.name} has labels for"
        )
    if y.min() < 1 or y.max() > 10:
        odd = int(np.argmax((y < 1) | (y > 10)))
        raise ValueError(f"{labels}: label {odd} is {y[odd]}, not 1 to 10")
    x = np.fromfile(pixels, np.uint8).reshape(-1, 3, STL10_SIDE, STL10_SIDE).transpose(0, 3, 2, 1)
    if data.kept == STL10_SIDE:
        return _resident(x.transpose(0, 3, 1, 2), y - 1, data, held_out=held_out)
    fitted = torch.stack([fit(image, data.kept) for image in x]).numpy()
    return _resident(fitted, y - 1, data, held_out=held_out)


TINY_IMAGENET = {"classes": 200, "training images": 100_000, "test images": 10_000}


def _tiny_imagenet(data: Data) -> Parts:
    """tiny-imagenet-200/: wnids.txt, train/<wnid>/images/*, val/val_annotations.txt, val/images/;
    ROOT is that folder or its parent. Classes in the order of their sorted wnids. The labelled
    validation images are the test set, as usual: the labels of test/ were never published.

    64x64 images; with another `data.hr` (CRRCD's Table IV: 32) they are resized while they are
    read, antialiased bicubic.
    """
    if not data.root:
        raise ValueError("--data.name tinyimagenet needs --data.root: the folder tiny-imagenet-200")
    home = home_of(Path(data.root).expanduser(), "Tiny ImageNet", "wnids.txt")
    wnids = {wnid for (wnid,) in rows(home / "wnids.txt", "<wnid>", str)}
    if not (home / "train").is_dir():
        raise ValueError(f"{home}: no train/ folder in it (expected train/<wnid>/images/)")
    training, classes = _scan(home / "train")
    if odd := wnids ^ set(classes):
        raise ValueError(f"{home}: train/ and wnids.txt differ in {len(odd)} wnids, as {min(odd)}")
    number = {wnid: k for k, wnid in enumerate(classes)}

    def label(wnid: str) -> int:
        if wnid not in number:
            raise ValueError
        return number[wnid]

    listed = home / "val" / "val_annotations.txt"
    kinds = (str, label, int, int, int, int)
    held = rows(listed, "<file> <wnid of wnids.txt> <x1> <y1> <x2> <y2>", *kinds)
    folder = home / "val" / "images"
    there = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    check_files(listed, [row[0] for row in held], there)
    found = {"classes": len(classes), "training images": len(training), "test images": len(held)}
    check_counts("tinyimagenet", home, found, TINY_IMAGENET, data.counts)
    train, skipped = prepared(training, data, data.hr, role="training")
    asked = Files(folder, [row[0] for row in held], [row[1] for row in held])
    test, more = prepared(asked, data, data.hr, role="held out")
    return Parts(
        train,
        {"test": test},
        len(classes),
        str(home.resolve()),
        LICENCES["tinyimagenet"],
        fingerprint=_fingerprint(home / "train", training.files),
        skipped=(*skipped, *more),
    )


def _digits(data: Data) -> Parts:
    """scikit-learn's 1,797 handwritten digits, 8x8, 17 grey levels: 1,000 / 297 / 500 images."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    pixels = np.rint(bunch.images * (255 / 16)).astype(np.uint8)
    pixels = np.repeat(pixels[:, None], 3, axis=1)
    order = np.random.default_rng(data.seed).permutation(len(pixels))
    parts = np.split(order, [1000, 1297])
    train, development, test = (
        _resident(pixels[p], bunch.target[p], data, held_out=k > 0) for k, p in enumerate(parts)
    )
    return Parts(
        train,
        {"development": development, "test": test},
        10,
        "scikit-learn",
        LICENCES["digits"],
    )


def _resident(
    pixels: np.ndarray, labels: Sequence[int] | np.ndarray, data: Data, *, held_out: bool
) -> Resident:
    """Images of a fixed native size: `data.hr`, with the room for crops, must be that size."""
    if pixels.shape[-1] != data.kept:
        room = f", and {data.kept - data.hr} px for crops" if data.kept > data.hr else ""
        raise ValueError(
            f"--data.hr {data.hr}{room}: the images of {data.name} are {pixels.shape[-1]} px"
        )
    shown = centre(pixels, data.hr) if held_out else pixels
    return Resident(np.ascontiguousarray(shown), np.asarray(labels))


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
    training, classes = _scan(root / "train")
    if len(classes) < 2:
        raise ValueError(f"{root / 'train'}: {len(classes)} class; training needs 2 or more")
    found = {name: _scan(root / name) for name in names}
    overlap = {name: set(classes) & set(found[name][1]) for name in names}
    for name in names:
        if overlap[name] and set(found[name][1]) - set(classes):
            odd = sorted(set(found[name][1]) - set(classes))
            raise ValueError(
                f"{root / name}: classes that train/ does not have: {', '.join(odd[:5])}; "
                "name either the same classes (classification) or none of them (identities)"
            )
    shared_classes = bool(overlap[names[0]])
    if any(bool(overlap[name]) != shared_classes for name in names):
        raise ValueError(f"{root}: test/ and val/ must both hold train/'s classes, or neither any")
    if data.landmarks and shared_classes:
        raise ValueError("--data.landmarks: test/ holds the classes of train/: no identities")
    faces, alignment = placed(training, data) if data.landmarks else (training, "")
    train, skipped = prepared(faces, data, data.hr, role="training")
    held_out = {}
    for name in names:
        files, own = found[name]
        if shared_classes:  # a held-out folder may lack a class: number them as train/ does
            number = np.array([classes.index(c) for c in own])
            files.labels = number[files.labels]
        cut = placed(files, data)[0] if data.landmarks else files
        images, more = prepared(cut, data, data.hr, role="held out")
        role = "development" if name == "val" and len(names) == 2 else "test"
        held_out[role] = images
        skipped += more
    return Parts(
        train,
        held_out,
        len(classes),
        str(root / "train"),
        LICENCES["folder"],
        shared_classes=shared_classes,
        fingerprint=_fingerprint(root / "train", training.files, *data.landmarks),
        skipped=tuple(skipped),
        alignment=alignment,
    )


def _fingerprint(root: Path, files: Sequence[str], *others: str) -> str:
    """Of names, sizes and times of the training files: a teacher's cache key holds it."""
    paths = {name: root / name for name in files}
    paths |= {name: Path(name).expanduser() for name in others}
    facts = [(name, (s := path.stat()).st_size, s.st_mtime_ns) for name, path in paths.items()]
    return digest(facts)


def labelled_folder(folder: Path, data: Data) -> tuple[Images, str]:
    """FOLDER/<class>/* as images of `data.hr` px to score on, and the alignment of faces."""
    if not folder.is_dir():
        raise ValueError(f"--root {folder}: no such folder")
    files = _scan(folder)[0]
    cut, alignment = placed(files, data) if data.landmarks else (files, "")
    return prepared(cut, data, data.hr, role="held out")[0], alignment


def _scan(folder: Path) -> tuple[Files, list[str]]:
    """The images of FOLDER/<class>/, and the class names in sorted order."""
    classes = sorted(p.name for p in folder.iterdir() if p.is_dir() and p.name[0] != ".")
    files: list[str] = []
    labels: list[int] = []
    for number, name in enumerate(classes):
        found = (folder / name).rglob("*")
        own = sorted(p.relative_to(folder) for p in found if p.suffix.lower() in SUFFIXES)
        if not own:
            raise ValueError(f"{folder / name}: no image in it ({', '.join(SUFFIXES)})")
        files += map(str, own)
        labels += [number] * len(own)
    if not files:
        raise ValueError(f"{folder}: no class folders in it (expected <class>/<image>)")
    return Files(folder, files, labels), classes

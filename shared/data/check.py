"""Look at a data set before it is trained on: `python -m shared.data.check NAME FOLDER`.

Prints counts, sizes, licence and what is wrong, and draws a contact sheet. Exit code 0: as
published; 1: it can be read, but something is wrong; 2: it cannot be read.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw
from tqdm import tqdm

from shared import cli
from shared.config import Data
from shared.data import classification, faces, identification
from shared.data.items import Counts, Encoded, Items, Subset, fit
from shared.data.pipeline import Images, Resident
from shared.data.sets import FACE_SETS, LICENCES, RETRIEVAL, check_pack

TILE, ACROSS, TILES = 64, 8, 64  # px of a picture on the sheet, pictures in a row and of a part
NAMED = 5  # files that are named of many that cannot be decoded
NATIVE = {"cifar10": 32, "cifar100": 32, "svhn": 32, "stl10": 96, "tinyimagenet": 64}

Parts = Mapping[str, Items]


def _trained(name: str) -> Callable[[Path, Counts], Parts]:
    def parts(root: Path, counts: Counts) -> Parts:
        data = Data(counts=counts)
        found = FACE_SETS[name](root, data)
        if name == "recordio":
            check_pack(found, root, data)
        return {"training": found}

    return parts


def _retrieved(name: str) -> Callable[[Path, Counts], Parts]:
    def parts(root: Path, counts: Counts) -> Parts:
        found = RETRIEVAL[name](root, counts)
        return {"training": found.train, "test": found.test}

    return parts


def _classified(name: Any) -> Callable[[Path, Counts], Parts]:
    def parts(root: Path, counts: Counts) -> Parts:
        on_error: Any = "stop" if counts == "published" else "skip"
        data = replace(Data(), name=name, root=str(root), hr=NATIVE[name], counts=counts,
                       on_error=on_error)  # fmt: skip
        found = classification.read(data, root)
        return {"training": _items(found.train), "test": _items(found.held_out["test"])}

    return parts


def _items(images: Images) -> Items:
    if isinstance(images, Resident):
        pixels = images.pixels.permute(0, 2, 3, 1).numpy()
        return Encoded("image", list(pixels), images.labels.numpy())
    raise ValueError("too large to be decoded into memory")


def _paired(read: Callable[[Path, Counts], faces.Pairs]) -> Callable[[Path, Counts], Parts]:
    def parts(root: Path, counts: Counts) -> Parts:
        found = read(root, counts)
        both = np.stack([found.first, found.second], axis=1)
        kinds = {"pairs of the same": both[found.same], "pairs of different": both[~found.same]}
        return {
            kind: Subset(found.items, some.reshape(-1), np.repeat(np.arange(len(some)), 2))
            for kind, some in kinds.items()
        }

    return parts


def _tinyface(root: Path, counts: Counts) -> Parts:
    found = _identified(identification.tinyface(root, counts))
    try:
        return found | {"training": identification.tinyface_train(root, counts).items}
    except ValueError:
        if counts == "published":
            raise
        return found


def _identified(found: identification.Identification) -> dict[str, Items]:
    parts: dict[str, Items] = {"probes": found.probes, "gallery": found.gallery}
    return parts | ({"unmated probes": found.unmated} if found.unmated is not None else {})


def _uccs(root: Path, counts: Counts) -> Parts:
    found = identification.uccs(root, counts=counts)
    return {"training": found.train, "test": found.test}


SETS: dict[str, Callable[[Path, Counts], Parts]] = {
    **{name: _classified(name) for name in NATIVE},
    **{name: _trained(name) for name in FACE_SETS if name not in ("tinyface", "survface")},
    "bin": _paired(faces.bin_pairs),
    "lfw": _paired(lambda root, counts: faces.lfw(root, counts=counts)),
    "calfw": _paired(faces.calfw),
    "cplfw": _paired(faces.cplfw),
    "cfp-ff": _paired(lambda root, counts: faces.cfp(root, "FF", counts)),
    "cfp-fp": _paired(lambda root, counts: faces.cfp(root, "FP", counts)),
    "tinyface": _tinyface,
    "survface": lambda root, counts: _identified(identification.survface(root, counts)),
    "survface-pairs": _paired(lambda root, counts: identification.survface_pairs(root)),
    "survface-training": lambda root, counts: {
        "training": identification.survface_train(root, counts).items
    },
    "uccs": _uccs,
    **{name: _retrieved(name) for name in RETRIEVAL},
}


@dataclass(frozen=True)
class Look:
    """What decoding some images of a part showed."""

    sizes: np.ndarray  # [N, 2] height, width in px
    wrong: tuple[str, ...]


def look(items: Items, most: int) -> Look:
    """Decode `most` images spread over the part (0: all)."""
    count = len(items) if most == 0 else min(most, len(items))
    numbers = np.unique(np.linspace(0, len(items) - 1, count).astype(int))
    sizes, wrong = [], []
    for i in tqdm(numbers.tolist(), desc="decoding", leave=False, disable=None):
        try:
            sizes.append(items.image(i).shape[:2])
        except ValueError as error:
            wrong.append(str(error))
    return Look(np.array(sizes).reshape(-1, 2), tuple(wrong))


def describe(name: str, items: Items, seen: Look) -> str:
    """A line: images, labels, how large they are, and what one is called (in landmark files)."""
    known = np.unique(items.labels[items.labels >= 0])
    line = f"{name}: {len(items):,} images"
    if len(known) > 1:
        line += f" of {len(known):,} " + ("pairs" if name.startswith("pairs") else "labels")
    if outside := int((items.labels < 0).sum()):
        line += f", {outside:,} of nobody"
    if len(seen.sizes):
        (least, most), middle = np.quantile(seen.sizes, (0, 1), axis=0), np.median(seen.sizes, 0)
        sides = [f"{int(w)}x{int(h)}" for h, w in (least, most, middle)]
        line += f"; width x height {sides[0]} to {sides[1]} px, median {sides[2]}"
        line += f" ({len(seen.sizes):,} decoded)"
    return line + (f"; the first: {items.name(0)}" if len(items) else "")


def sheet(parts: Parts) -> Image.Image:
    """Pictures of every part, those of a label side by side."""
    blocks = [(name, _tiles(items)) for name, items in parts.items()]
    heights = [14 + TILE * -(-len(tiles) // ACROSS) for _, tiles in blocks]
    page = Image.new("RGB", (TILE * ACROSS, sum(heights)), "white")
    pen, top = ImageDraw.Draw(page), 0
    for (name, tiles), height in zip(blocks, heights, strict=True):
        pen.text((2, top + 1), name, fill="black")
        for k, tile in enumerate(tiles):
            page.paste(tile, (TILE * (k % ACROSS), top + 14 + TILE * (k // ACROSS)))
        top += height
    return page


def _tiles(items: Items) -> list[Image.Image]:
    labels, counts = np.unique(items.labels, return_counts=True)
    each = min(ACROSS, int(np.median(counts))) if len(labels) > 1 else TILES
    some = labels[np.unique(np.linspace(0, len(labels) - 1, TILES // each).astype(int))]
    tiles = []
    for label in some:
        own = np.flatnonzero(items.labels == label)
        for i in own[np.unique(np.linspace(0, len(own) - 1, min(each, len(own))).astype(int))]:
            try:
                pixels = fit(items.image(int(i)), TILE, whole=True).permute(1, 2, 0).numpy()
                tiles.append(Image.fromarray(pixels))
            except ValueError:
                tiles.append(Image.new("RGB", (TILE, TILE), "red"))
    return tiles


def check(name: str, root: Path, out: Path, most: int) -> list[str]:
    """Print what is there and write the sheet to `out`; returns what is wrong.

    Raises ValueError for a name that is not known and a set that cannot be read at all.
    """
    if name not in SETS:
        raise ValueError(f"no data set {name!r} (there are: {', '.join(SETS)})")
    root, wrong = root.expanduser(), []
    if not root.exists():
        raise ValueError(f"{root}: no such file or folder")
    try:
        parts = SETS[name](root, "published")
    except ValueError as error:
        wrong.append(str(error))
        parts = SETS[name](root, "any")
    print(f"{name} in {root.resolve()}")
    if name == "uccs":
        print("  the 180 subjects of seed 0")
    for part, items in parts.items():
        seen = look(items, most)
        print(f"  {describe(part, items, seen)}")
        if seen.wrong:
            wrong.append(f"{part}: {len(seen.wrong)} images cannot be decoded")
            wrong += seen.wrong[:NAMED]
    licences = LICENCES | classification.LICENCES
    print(f"  licence: {licences[name.removesuffix('-training')]}")
    sheet({part: items for part, items in parts.items() if len(items)}).save(out)
    print(f"  contact sheet: {out}")
    print("\n".join(f"  wrong: {line}" for line in wrong) or "  nothing wrong found")
    return wrong


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m shared.data.check", description=__doc__)
    parser.add_argument("name", help=", ".join(SETS))
    parser.add_argument("folder", type=Path, help="where it lies (bin: the file)")
    parser.add_argument("--sheet", type=Path, help="contact sheet; NAME-sheet.png if not given")
    parser.add_argument("--decode", type=int, default=500, metavar="N",
                        help="images of each part to decode, spread over it; 0: all")  # fmt: skip
    a = parser.parse_args(arguments)
    if check(a.name, a.folder, a.sheet or Path(f"{a.name}-sheet.png"), a.decode):
        raise SystemExit(1)


if __name__ == "__main__":
    cli.guarded(main)

"""Procedural faces, the embedded data set every recipe trains on by default, and objects.

No download. Splits of disjoint people or classes, pairs, gallery and probes, faces of mixed native
sizes, a cache on disk and a contact sheet:

    python -m shared.data.procedural --family objects --sheet out.png

How a face is drawn, and why the same face always has the same bits: `shared.data.portrait`; an
object: `shared.data.objects`. An identity is a person or a class of objects.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, Literal, NoReturn

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from shared.data import objects
from shared.data.objects import Objects
from shared.data.portrait import VERSION, Array, Faces, Family, generator, render

__all__ = [
    "VERSION", "Faces", "Family", "Objects", "Split", "gallery_probes", "native", "pairs",
    "render", "split",
]  # fmt: skip

RANGE = 1_000_000  # identities a split may have
FIRST = {"train": 0, "development": RANGE, "test": 2 * RANGE, "shifted": 2 * RANGE}
NATIVE_FIRST = 3 * RANGE
# Training identities again, in instances that training never shows: number of the first.
KNOWN = {"known-development": RANGE, "known-test": 2 * RANGE, "known-shifted": 2 * RANGE}

Split = Literal[
    "train", "development", "test", "shifted", "known-development", "known-test", "known-shifted"
]


# -------------------------------------------------------------------------- splits and protocols


def split(
    family: Family,
    name: Split,
    identities: int,
    instances: int,
    *,
    cache: Path,
    progress: bool = True,
) -> tuple[Array, Array]:
    """Pixels uint8 [N, 3, S, S] (memory-mapped, read-only) and labels int64 [N], 0..identities-1.

    Ordered by identity, then instance. Identities of train, development and test are disjoint;
    known-development and known-test are those of train, in other instances. shifted and
    known-shifted show what test and known-test do in other light, with noise, blur and compression
    artefacts. Rendered once for each (VERSION, family, name, identities, instances) into ``cache``;
    a damaged file is rendered again. Raises ValueError for an unknown name or a number out of
    range, OSError when the cache cannot be written.
    """
    if name not in {**FIRST, **KNOWN}:
        raise ValueError(f"unknown split {name!r}; there are {', '.join([*FIRST, *KNOWN])}")
    _check_count("identities", identities, RANGE)
    _check_count("instances", instances, RANGE)
    parameters = dict(**_made_by(family), split=name, identities=identities, instances=instances)

    def write(file: IO[bytes]) -> None:
        shape = (identities * instances, 3, family.size, family.size)
        np.lib.format.write_array_header_1_0(
            file, dict(descr="|u1", fortran_order=False, shape=shape)
        )
        for who, which in _batches(identities, instances, name, progress):
            file.write(_drawn(family, name, who, which).data)

    path = _cached(Path(cache), f"procedural-{_key(parameters)}-{name}.npy", parameters, write)
    return np.load(path, mmap_mode="r"), np.repeat(np.arange(identities), instances)


def _made_by(family: Family) -> dict[str, Any]:
    """What the pixels depend on; for faces as it was when there were only faces."""
    if isinstance(family, Objects):
        return dict(family="objects", version=objects.VERSION, **asdict(family))
    return dict(version=VERSION, **asdict(family))


def _drawn(family: Family, name: str, who: Array, which: Array) -> Array:
    """Images of a split, by identity and instance numbered from 0."""
    who, which = who + FIRST.get(name, 0), which + KNOWN.get(name, 0)
    return render(family, who, which, shifted=name.endswith("shifted"))


@dataclass(frozen=True)
class Native:
    """Images at their own small sizes, for open-set identification."""

    images: list[Array]  # uint8 [3, h, w], 6..60 px a side
    ids: Array  # int64 [N]; -1 for unmated
    role: Array  # str [N]: "gallery", "mated" or "unmated"


def native(
    faces: Faces,
    identities: int,
    unmated: int,
    per_identity: int,
    *,
    cache: Path,
    progress: bool = True,
) -> Native:
    """Native-LR faces: ``identities`` people with ``per_identity`` images, ``unmated`` strangers.

    Half of a person's images (the larger half) are gallery, the others mated probes; a stranger
    has one image, an unmated probe, which is never in the gallery. Sizes are log-normal, 6..60 px,
    with a mean of about 20 wide x 24 high, as in QMUL-SurvFace (BTNet, Sec. 4.1). Pictures are
    drawn at ``faces.size`` (at least 64), cropped to their shape and reduced by antialiased
    bicubic interpolation. Raises ValueError for a number out of range, OSError as ``split`` does.
    """
    _check_count("identities", identities, RANGE)
    _check_count("unmated", unmated, RANGE - identities, least=0)
    _check_count("per_identity", per_identity, RANGE, least=2)
    sharp = Faces(**{**asdict(faces), "size": max(faces.size, 64)})
    parameters = dict(
        version=VERSION, **asdict(sharp), split="native, tall", identities=identities,
        unmated=unmated, per_identity=per_identity,
    )  # fmt: skip
    galleries = (per_identity + 1) // 2

    def write(file: IO[bytes]) -> None:
        images: list[Array] = []
        plan = [(identities, per_identity, 0), (unmated, 1, identities)]
        for people, each, first in plan:
            for who, which in _batches(people, each, "native", progress):
                who = who + NATIVE_FIRST + first
                pixels = render(sharp, who, which)
                images += [_reduce(sharp, *pair) for pair in zip(pixels, who, which, strict=True)]
        np.savez(
            file,
            pixels=np.concatenate([i.ravel() for i in images]),
            shapes=np.array([i.shape for i in images]),
        )

    path = _cached(Path(cache), f"procedural-{_key(parameters)}-native.npz", parameters, write)
    with np.load(path) as stored:
        pixels, shapes = stored["pixels"], stored["shapes"]
    ends = np.cumsum(shapes.prod(1))[:-1]
    images = [p.reshape(s) for p, s in zip(np.split(pixels, ends), shapes, strict=True)]
    roles = (["gallery"] * galleries + ["mated"] * (per_identity - galleries)) * identities
    return Native(
        images=images,
        ids=np.concatenate([np.repeat(np.arange(identities), per_identity), np.full(unmated, -1)]),
        role=np.array(roles + ["unmated"] * unmated),
    )


def _reduce(faces: Faces, image: Array, identity: int, instance: int) -> Array:
    """One picture [3, S, S] at a native size [3, h, w]."""
    a, b = generator(faces.seed, int(identity), 3, int(instance)).standard_normal(2)
    height = 22.6 * math.exp(0.36 * a)
    width = 0.83 * height * math.exp(0.10 * b)
    w, h = (min(max(round(v), 6), 60) for v in (width, height))
    size = faces.size
    high, wide = (min(size, round(size * r)) for r in (h / w, w / h))
    top, left = (size - high) * 2 // 5, (size - wide) // 2  # the head is above the middle
    crop = torch.from_numpy(image[:, top : top + high, left : left + wide].astype(np.float32))
    small = F.interpolate(crop[None], size=(h, w), mode="bicubic", antialias=True)[0]
    return small.round_().clamp_(0, 255).to(torch.uint8).numpy()


def pairs(
    labels: Sequence[int] | Array, count: int = 6000, folds: int = 10, seed: int = 0
) -> tuple[Array, Array, Array]:
    """Verification pairs: indices first [P], second [P] and same [P] (bool), P = count.

    As in LFW's view 2 (Huang et al. 2007): fold k is pairs k P/folds..(k+1) P/folds, half of each
    fold is of the same identity, no identity is in two folds, and no pair comes twice. Raises
    ValueError when the labels cannot give that many.
    """
    labels = np.asarray(labels)
    if labels.ndim != 1 or folds < 1 or count < 1 or count % (2 * folds):
        raise ValueError(
            f"labels must be a list, and count ({count}) a multiple of 2 x folds ({folds})"
        )
    rng = np.random.Generator(np.random.Philox(key=[seed, 21]))
    half = count // folds // 2
    parts = np.array_split(rng.permutation(np.unique(labels)), folds)
    first, second = [], []
    for k, people in enumerate(parts):
        members = [np.flatnonzero(labels == i) for i in people]
        mates = [np.stack(np.triu_indices(len(m), 1), 1) for m in members]
        mated = np.concatenate(
            [m[t] for m, t in zip(members, mates, strict=True)] or [np.empty((0, 2), int)]
        )
        here = np.concatenate(members or [np.empty(0, int)])
        possible = len(here) * (len(here) - 1) // 2 - len(mated)
        if min(len(mated), possible) < half:
            raise ValueError(
                f"fold {k + 1} of {folds} needs {half} pairs of each kind, but its {len(people)} "
                f"identities give {len(mated)} same and {possible} different; ask for fewer pairs "
                "or give more images"
            )
        mated = mated[rng.choice(len(mated), half, replace=False)]
        other: dict[tuple[int, int], None] = {}  # ordered, so that the draw is reproducible
        while len(other) < half:
            for i, j in np.sort(rng.choice(here, (4 * half, 2)), axis=1).tolist():
                if labels[i] != labels[j] and len(other) < half:
                    other[i, j] = None
        both = np.concatenate([mated, np.array(list(other))])
        first.append(both[:, 0])
        second.append(both[:, 1])
    same = np.tile(np.repeat([True, False], half), folds)
    return np.concatenate(first), np.concatenate(second), same


def gallery_probes(labels: Sequence[int] | Array) -> tuple[Array, Array]:
    """Closed-set identification: the first image of each identity [C] and all others [N - C]."""
    labels = np.asarray(labels)
    gallery = np.sort(np.unique(labels, return_index=True)[1])
    return gallery, np.setdiff1d(np.arange(len(labels)), gallery)


def _check_count(what: str, value: int, most: int, least: int = 1) -> None:
    if not least <= value <= most:
        raise ValueError(f"{what} is {value}; give {least} to {most}")


# --------------------------------------------------------------------------------------- cache


def _batches(
    identities: int, instances: int, name: str, progress: bool
) -> Iterator[tuple[Array, Array]]:
    """Identities [n] and instances [n] in order, some whole identities at a time, with progress."""
    step = max(1, 512 // instances)
    terminal = sys.stderr.isatty()
    start = said = time.monotonic()
    with tqdm(total=identities * instances, desc=f"drawing {name} images", unit="image",
              disable=not (progress and terminal)) as bar:  # fmt: skip
        for first in range(0, identities, step):
            who = np.arange(first, min(first + step, identities))
            yield np.repeat(who, instances), np.tile(np.arange(instances), len(who))
            bar.update(len(who) * instances)
            if progress and not terminal and time.monotonic() - said > 10:
                said = time.monotonic()
                done = (first + len(who)) / identities
                left = (said - start) * (1 - done) / done
                print(f"drawing {name} images: {done:.0%}, {left:.0f} s left", file=sys.stderr)


def _key(parameters: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(parameters, sort_keys=True).encode()).hexdigest()[:16]


def _cached(
    cache: Path, name: str, parameters: dict[str, Any], write: Callable[[IO[bytes]], None]
) -> Path:
    """The file cache/name, written if it is missing or not what its JSON sidecar says."""
    path, sidecar = cache / name, cache / f"{name}.json"
    if path.exists():
        fault = _fault(path, sidecar, parameters)
        if not fault:
            return path
        print(f"{path}: {fault}; drawing it again", file=sys.stderr)
    cache.mkdir(parents=True, exist_ok=True)
    with _replacing(path) as (file, temporary):
        write(file)
        file.flush()
        described = dict(parameters=parameters, **_fingerprint(temporary))
    with _replacing(sidecar) as (file, _):
        file.write(json.dumps(described, indent=1).encode())
    return path


def _fingerprint(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return dict(bytes=path.stat().st_size, sha256=digest)


def _fault(path: Path, sidecar: Path, parameters: dict[str, Any]) -> str:
    """What is wrong with a cached file; empty if nothing is."""
    try:
        said = json.loads(sidecar.read_bytes())
    except (OSError, ValueError):
        return "its description is missing or damaged"
    if said != dict(parameters=parameters, **_fingerprint(path)):
        return "it is not what its description says (damaged or cut short)"
    return ""


@contextmanager
def _replacing(path: Path) -> Iterator[tuple[IO[bytes], Path]]:
    """A temporary file in path's folder that becomes path when the block ends well."""
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            yield file, Path(name)
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException as error:
        Path(name).unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


# ----------------------------------------------------------------------------------------- sheet


def sheet(family: Family, name: str, identities: int, instances: int, lr: int) -> Array:
    """Contact sheet uint8 [rows, columns, 3]: HR at the left, the same at ``lr`` at the right."""
    who, which = np.divmod(np.arange(identities * instances), instances)
    pixels = _drawn(family, name, who, which)
    small = F.interpolate(torch.from_numpy(pixels).float(), size=lr, mode="bicubic", antialias=True)
    small = F.interpolate(small.round_().clamp_(0, 255), size=family.size, mode="nearest")
    halves = [pixels, small.to(torch.uint8).numpy()]
    shape = (identities, instances, 3, family.size, family.size)
    both = [h.reshape(shape).transpose(0, 3, 1, 4, 2) for h in halves]
    rows = identities * family.size
    return np.concatenate([h.reshape(rows, instances * family.size, 3) for h in both], axis=1)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: {message}", file=sys.stderr)
        raise SystemExit(2)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = _Parser(prog="python -m shared.data.procedural", description=sheet.__doc__)
    parser.add_argument("--sheet", type=Path, required=True, metavar="OUT.png")
    families = {"faces": Faces, "objects": Objects}
    parser.add_argument("--family", choices=tuple(families), default="faces")
    parser.add_argument("--split", choices=(*FIRST, *KNOWN), default="train")
    defaults = Faces()
    for option, value in (
        ("size", 64),
        ("identities", 8),
        ("instances", 8),
        ("lr", 16),
        ("seed", 0),
    ):
        parser.add_argument(f"--{option}", type=int, default=value)
    for option in ("coarse", "fine"):
        parser.add_argument(f"--{option}", type=float, default=getattr(defaults, option))
    a = parser.parse_args(arguments)
    try:
        family = families[a.family](size=a.size, seed=a.seed, coarse=a.coarse, fine=a.fine)
        _check_count("--identities", a.identities, 200)
        _check_count("--instances", a.instances, 100)
        _check_count("--lr", a.lr, a.size)
        picture = sheet(family, a.split, a.identities, a.instances, a.lr)
        from matplotlib.image import imsave  # only the sheet needs it

        imsave(a.sheet, picture)
    except (ValueError, OSError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()

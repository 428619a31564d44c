"""What a trained network is scored on: images, and the parts of the protocols that apply to them.

The public test sets by name, from the files they are published as: `TEST_SETS`. Licences, layouts
and what to download: docs/data.md.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from shared.config import Data
from shared.data import classification, faces, identification, procedural, retrieval
from shared.data.align import placed
from shared.data.items import Boxed, Files, Items, Joined, Subset
from shared.data.pipeline import Centred, Images, prepared

Task = Literal["faces", "objects"]


@dataclass(frozen=True)
class Evaluation:
    """Images and what they are scored by; numbers are of images. See shared.evaluate.score.

    faces networks give embeddings, objects networks logits. A protocol applies where its parts are
    there: verification of `pairs` (first [P], second [P], same [P]; folds in order), rank-k of
    `probes` in `gallery`, TPIR at FPIR with `unmated` probes besides, Recall@K of all images
    (`recall_at`), a linear classifier fitted on frozen features of `fit`.
    """

    name: str
    task: Task
    images: Images
    whole: Images | None = None  # what a student sees of them, where teachers see their boxes
    pairs: tuple[Tensor, Tensor, Tensor] | None = None
    gallery: Tensor | None = None
    probes: Tensor | None = None
    unmated: Tensor | None = None
    recall_at: tuple[int, ...] = ()  # the K of retrieval's Recall@K
    fit: Images | None = None
    mirror: bool = False  # the mirror image's embedding is added
    native: bool = False  # small by nature: `images` are at the LR size, there are no HR ones
    alignment: str = ""  # how faces were cut out, where that is known; see shared.data.align.placed
    notes: Mapping[str, object] = field(default_factory=dict)  # what a score must be told with

    def as_student(self) -> Evaluation:
        """Of what students see: with the whole pictures for `images`, where there are some."""
        return self if self.whole is None else replace(self, images=self.whole, whole=None)


def public_set(name: str, path: Path, data: Data) -> Evaluation:
    """The public test set `name` at `path`, at the sizes and with the alignment of `data`.

    Raises ValueError for an unknown name, missing or damaged files, and counts that differ from
    the published ones while `data.counts` is "published".
    """
    if name not in TEST_SETS:
        raise ValueError(f"no test set {name!r} (there are: {', '.join(TEST_SETS)})")
    if not path.exists():
        raise ValueError(f"{name}: {path}: no such file or folder")
    found = TEST_SETS[name](path, data)
    partial = {"counts": "any"} if data.counts == "any" else {}
    return replace(found, notes={**found.notes, **partial})


def check_alignment(trained: str, evaluation: Evaluation, data: Data) -> None:
    """ValueError where faces are scored that are cut out otherwise than those trained on."""
    scored = evaluation.alignment
    known = trained and scored and not data.any_alignment
    if known and trained.partition(":")[0] != scored.partition(":")[0]:
        raise ValueError(
            f"{evaluation.name}: faces are cut out as {scored!r}, those trained on as {trained!r}; "
            "align them alike (--landmarks, --margin), or say --any-alignment (in train.py: "
            "--data.landmarks, ...)"
        )


def face_folders(name: str, images: Images) -> Evaluation:
    """Pairs of identity-disjoint folds, and the first image of everybody as the gallery."""
    first, second, same = map(torch.as_tensor, _drawn_pairs(images.labels.numpy()))
    return replace(identities(name, images), pairs=(first, second, same))


def identities(name: str, images: Images) -> Evaluation:
    """Identification: the first image of everybody is the gallery, the others are probes."""
    gallery, probes = procedural.gallery_probes(images.labels.numpy())
    if not len(probes):
        raise ValueError(f"{name}: nobody has a second image, so nobody can be looked for")
    return Evaluation(
        name=name,
        task="faces",
        images=images,
        gallery=torch.as_tensor(gallery),
        probes=torch.as_tensor(probes),
        mirror=True,
    )


def _drawn_pairs(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """6,000 pairs as in LFW, or as many as the images allow."""
    for count in (6000, 3000, 1200, 600, 200):
        try:
            return procedural.pairs(labels, count=count)
        except ValueError as error:
            reason = error
    raise ValueError(f"too few images for a verification protocol of 10 folds: {reason}")


# -- the public ones -----------------------------------------------------------------------------


def _cut(items: Items, data: Data) -> tuple[Items, str]:
    """`placed` for a protocol, which names images by number and can miss none."""
    policy = "error" if data.no_landmarks == "drop" else data.no_landmarks
    return placed(items, replace(data, no_landmarks=policy))


def _pairs(pairs: faces.Pairs, data: Data, *, native: bool = False) -> Evaluation:
    items, alignment = _cut(pairs.items, data)
    images, _ = prepared(items, data, data.lr if native else data.hr, whole=native)
    first, second, same = map(torch.as_tensor, (pairs.first, pairs.second, pairs.same))
    return Evaluation(
        name=pairs.name,
        task="faces",
        images=images,
        pairs=(first, second, same),
        mirror=True,
        native=native,
        alignment=alignment,
        notes=getattr(items, "report", {}),
    )


def _identified(name: str, found: identification.Identification, data: Data) -> Evaluation:
    """Natively small faces: the whole crop at the LR size, neither enlarged nor cut before."""
    parts: list[Items] = [found.probes, found.gallery]
    if found.unmated is not None:
        parts.append(found.unmated)
    ends = np.cumsum([0, *map(len, parts)])
    numbers = [torch.arange(a, b) for a, b in zip(ends[:-1], ends[1:], strict=True)]
    items, alignment = _cut(Joined(parts), data)
    images, _ = prepared(items, data, data.lr, whole=True)
    return Evaluation(
        name=name,
        task="faces",
        images=images,
        probes=numbers[0],
        gallery=numbers[1],
        unmated=numbers[2] if found.unmated is not None else None,
        mirror=True,
        native=True,
        alignment=alignment,
        notes=getattr(items, "report", {}),
    )


def _uccs(path: Path, data: Data) -> Evaluation:
    """CRRCD Table VI: a 180-way layer on frozen features."""
    found = identification.uccs(path, seed=data.seed, counts=data.counts)
    both, alignment = _cut(Joined([found.train, found.test]), data)
    count, total = len(found.train), len(both)
    halves = np.split(np.arange(total), [count])
    parts = [Subset(both, numbers, both.labels[numbers]) for numbers in halves]
    known, asked = (prepared(items, data, data.hr)[0] for items in parts)
    sizes = {"training images": count, "test images": total - count, "seed": data.seed}
    notes = {**sizes, **getattr(both, "report", {})}
    return Evaluation("UCCS", "faces", asked, fit=known, alignment=alignment, notes=notes)


def _probed(name: Literal["stl10", "tinyimagenet"], path: Path, data: Data) -> Evaluation:
    """CRRCD Table IV: a linear layer on the frozen features of a network trained elsewhere."""
    data = replace(data, name=name, root=str(path), on_error="stop")
    parts = classification.read(data, path)
    known = Centred(parts.train, data.hr)  # training images leave room for views
    return Evaluation(name, "objects", parts.held_out["test"], fit=known)


RECALL_AT = {
    "cub": (1, 2, 4, 8, 16),
    "cars196": (1, 2, 4, 8, 16),
    "sop": (1, 10, 100, 1000),
    "objects-retrieval": (1, 2, 4, 8),
}


def retrieved(kind: str, name: str, images: Images) -> Evaluation:
    """Recall@K of all images among themselves, at the K of EmbedKD; kind: cub, cars196, sop."""
    ks = tuple(k for k in RECALL_AT[kind] if k < len(images))
    return Evaluation(name, "faces", images, recall_at=ks)


# Sets that give an object's box, and what it calls the first pixel: CUB's x, y are a distance.
FIRST_PIXEL: dict[str, Literal[0, 1]] = {"cub": 0, "cars196": 1}


def localised(kind: str, files: Files, data: Data) -> Items:
    """What a teacher sees: pictures cut to their boxes where the student's are not localised."""
    if data.quality != "unlocalised" or kind not in FIRST_PIXEL:
        return files
    return Boxed(files, FIRST_PIXEL[kind])


def retrieved_test(kind: str, found: retrieval.Retrieval, data: Data) -> Evaluation:
    """Recall@K of the test part of a retrieval set."""
    items = localised(kind, found.test, data)
    images, _ = prepared(items, data, data.hr)
    whole = None if items is found.test else prepared(found.test, data, data.hr)[0]
    return replace(retrieved(kind, kind, images), whole=whole)


TEST_SETS: dict[str, Callable[[Path, Data], Evaluation]] = {
    "bin": lambda path, data: _pairs(faces.bin_pairs(path, counts=data.counts), data),
    "lfw": lambda path, data: _pairs(faces.lfw(path, counts=data.counts), data),
    "calfw": lambda path, data: _pairs(faces.calfw(path, counts=data.counts), data),
    "cplfw": lambda path, data: _pairs(faces.cplfw(path, counts=data.counts), data),
    "cfp-ff": lambda path, data: _pairs(faces.cfp(path, "FF", counts=data.counts), data),
    "cfp-fp": lambda path, data: _pairs(faces.cfp(path, "FP", counts=data.counts), data),
    "tinyface": lambda path, data: _identified(
        "TinyFace", identification.tinyface(path, counts=data.counts), data
    ),
    "survface": lambda path, data: _identified(
        "QMUL-SurvFace", identification.survface(path, counts=data.counts), data
    ),
    "survface-pairs": lambda path, data: _pairs(
        identification.survface_pairs(path), data, native=True
    ),
    "uccs": _uccs,
    "stl10": lambda path, data: _probed("stl10", path, data),
    "tinyimagenet": lambda path, data: _probed("tinyimagenet", path, data),
    "cub": lambda path, data: retrieved_test("cub", retrieval.cub(path, data.counts), data),
    "cars196": lambda path, data: retrieved_test(
        "cars196", retrieval.cars196(path, data.counts), data
    ),
    "sop": lambda path, data: retrieved_test("sop", retrieval.sop(path, data.counts), data),
}

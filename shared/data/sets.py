"""What a run needs of its data, by the name in its `Data` configuration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from shared.config import Data
from shared.data import classification, procedural
from shared.data.pipeline import Images, Resident

Task = Literal["faces", "objects"]


@dataclass(frozen=True)
class Evaluation:
    """HR images and the protocol they are scored by.

    faces: verification on `pairs` (first [P], second [P], same [P]; 10 folds in order) and rank-k
    identification of `probes` in `gallery` (image numbers). objects: classification.
    """

    name: str
    task: Task
    images: Images
    pairs: tuple[Tensor, Tensor, Tensor] | None = None
    gallery: Tensor | None = None
    probes: Tensor | None = None


@dataclass(frozen=True)
class DataSet:
    """Everything a run needs of its data."""

    task: Task
    train: Images  # the student's
    classes: int
    teacher_train: Images  # the teacher's: the same, or more identities (its first classes agree)
    teacher_classes: int
    evaluations: Mapping[str, Evaluation]
    selection: str  # the evaluation that picks the best epoch
    licence: str
    fingerprint: str = ""  # changes when the training files do
    skipped: tuple[str, ...] = ()  # files left out because they could not be decoded

    def left_out(self) -> list[str]:
        """Files left out so far, also while streaming."""
        return [*self.skipped, *getattr(self.train, "skipped", {}).values()]


def load(data: Data, *, cache: Path, teacher_identities: int = 0) -> DataSet:
    """The data set that `data` names.

    Raises ValueError, saying what is missing where: a folder, a class, an image, a size.
    """
    if not 1 <= data.lr <= data.hr:
        raise ValueError(
            f"--data.lr {data.lr}: the LR size must lie between 1 and --data.hr {data.hr}"
        )
    if data.name == "faces":
        return _faces(data, cache, teacher_identities)
    parts = classification.read(data, cache)
    if data.classes and data.classes != parts.classes:
        raise ValueError(
            f"{data.name}: {parts.classes} classes found in {parts.where}, --data.classes says "
            f"{data.classes}"
        )
    task: Task = "objects" if parts.shared_classes else "faces"
    evaluations = {
        name: _face_evaluation(name, images) if task == "faces" else Evaluation(name, task, images)
        for name, images in parts.held_out.items()
    }
    return DataSet(
        task=task,
        train=parts.train,
        classes=parts.classes,
        teacher_train=parts.train,
        teacher_classes=parts.classes,
        evaluations=evaluations,
        selection="development" if "development" in evaluations else "test",
        licence=parts.licence,
        fingerprint=parts.fingerprint,
        skipped=parts.skipped,
    )


def _faces(data: Data, cache: Path, teacher_identities: int) -> DataSet:
    faces = procedural.Faces(size=data.hr, seed=data.seed, coarse=data.coarse, fine=data.fine)
    identities = max(data.identities, teacher_identities)
    pixels, labels = procedural.split(faces, "train", identities, data.instances, cache=cache)
    own = data.identities * data.instances  # ordered by identity: the student's come first
    evaluations: dict[str, Evaluation] = {}
    held_out: dict[Literal["development", "test"], int] = {
        "development": data.development,
        "test": data.test,
    }
    for name, count in held_out.items():
        images = Resident(*procedural.split(faces, name, count, TEST_INSTANCES, cache=cache))
        evaluations[name] = _face_evaluation(name, images)
    return DataSet(
        task="faces",
        train=Resident(pixels[:own], labels[:own]),
        classes=data.identities,
        teacher_train=Resident(pixels, labels),
        teacher_classes=identities,
        evaluations=evaluations,
        selection="development",
        licence="procedural, of this project's own licence",
    )


TEST_INSTANCES = 6  # images of each development or test identity: one in the gallery, five probes


def evaluation(
    data: Data, name: str, root: str, *, cache: Path, task: Task, classes: int, teachers: int = 0
) -> Evaluation:
    """Something else to score a trained student on.

    name: "shifted" (faces: the test identities under other lighting, noise, blur, compression),
    "folder" (ROOT/<class>/*; the classes in sorted order, or identities), or a split of the data
    set that `data` names ("test", "development"). classes: of the student. teachers: identities
    of its teacher, whose rendered faces are then found in the cache.
    Raises ValueError, naming what there is, for anything else.
    """
    if name == "folder":
        images, _ = classification.labelled_folder(Path(root).expanduser(), data)
        if task == "faces":
            return _face_evaluation(root, images)
        found = int(images.labels.max()) + 1
        if found != classes:
            raise ValueError(f"--root {root}: {found} class folders, the student knows {classes}")
        return Evaluation(root, task, images)
    if name == "shifted" and data.name == "faces":
        faces = procedural.Faces(size=data.hr, seed=data.seed, coarse=data.coarse, fine=data.fine)
        drawn = procedural.split(faces, "shifted", data.test, TEST_INSTANCES, cache=cache)
        return _face_evaluation("shifted", Resident(*drawn))
    splits = load(data, cache=cache, teacher_identities=teachers).evaluations
    if name not in splits:
        more = ", shifted, native" if data.name == "faces" else ""
        raise ValueError(
            f"--on {name}: no such split (there are: {', '.join(splits)}{more}, folder)"
        )
    return splits[name]


def _face_evaluation(name: str, images: Images) -> Evaluation:
    """Pairs of identity-disjoint folds, and the first image of everybody as the gallery."""
    labels = images.labels.numpy()
    first, second, same = _pairs(labels)
    gallery, probes = procedural.gallery_probes(labels)
    return Evaluation(
        name=name,
        task="faces",
        images=images,
        pairs=tuple(torch.as_tensor(t) for t in (first, second, same)),  # type: ignore[arg-type]
        gallery=torch.as_tensor(gallery),
        probes=torch.as_tensor(probes),
    )


def _pairs(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """6,000 pairs as in LFW, or as many as the images allow."""
    for count in (6000, 3000, 1200, 600, 200):
        try:
            return procedural.pairs(labels, count=count)
        except ValueError as error:
            reason = error
    raise ValueError(f"too few images for a verification protocol of 10 folds: {reason}")

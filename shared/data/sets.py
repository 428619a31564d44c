"""What a run needs of its data, by the name in its `Data` configuration."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np

from shared.config import Data, digest
from shared.data import classification, faces, identification, objects, procedural, retrieval
from shared.data.align import Aligned, placed
from shared.data.items import Files, Items, Subset, check_counts
from shared.data.pipeline import Images, Resident, centre, prepared
from shared.data.protocols import (
    FIRST_PIXEL,
    TEST_SETS,
    Evaluation,
    Task,
    check_alignment,
    face_folders,
    identities,
    localised,
    public_set,
    retrieved,
    retrieved_test,
)
from shared.data.recordio import RecordIODataset


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
    alignment: str = ""  # how training faces were cut out; see shared.data.protocols.placed
    notes: Mapping[str, object] = field(default_factory=dict)  # for the run's record
    more_tests: Mapping[str, Callable[[], Evaluation]] = field(default_factory=dict)
    train_whole: Images | None = None  # what the student sees of `train`, which is cut to boxes

    @property
    def selecting(self) -> Evaluation:
        """What picks the best epoch, as a student sees it."""
        return self.evaluations[self.selection].as_student()

    def tests(self) -> Iterator[tuple[str, Evaluation]]:
        """What to score on at the end, one after the other, and the name of each table.

        One that cannot be read does not keep the others back: its ValueError comes last.
        """
        yield "results", self.evaluations["test"]
        failed = []
        for name, load in self.more_tests.items():
            try:
                found = load()
            except ValueError as error:
                failed.append(str(error))
                continue
            yield f"results-{name}", found
        if failed:
            raise ValueError(f"not scored: {'; '.join(failed)}")

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
    if data.test_sets and data.name in (*PROCEDURAL, *RETRIEVAL):
        raise ValueError(f"--data.test-sets: {data.name} has a test part of its own")
    if data.quality == "unlocalised" and data.name not in FIRST_PIXEL:
        raise ValueError(
            f"--data.quality unlocalised: {data.name} has no boxes for the teacher to see (there "
            f"are some in {', '.join(FIRST_PIXEL)})"
        )
    if data.kept > data.hr and data.name in NATIVE:
        how = "--data.crop resized" if data.crop == "resized" else "--data.pad image"
        raise ValueError(f"{how}: {data.name} has tight crops, there is nothing around a face")
    if data.landmarks and data.name not in (*FACE_SETS, "folder"):
        raise ValueError(f"--data.landmarks: {data.name} has no faces to align")
    if data.name in PROCEDURAL:
        return _procedural(data, cache, teacher_identities)
    if data.name in FACE_SETS:
        return _face_set(data)
    if data.name in RETRIEVAL:
        return _retrieval_set(data)
    probes = _test_sets(data, PROBES, data.name) if data.test_sets else {}
    parts = classification.read(data, cache)
    if probes and not parts.shared_classes:
        raise ValueError("--data.test-sets: a folder of identities has a test part of its own")
    if data.classes and data.classes != parts.classes:
        raise ValueError(
            f"{data.name}: {parts.classes} classes found in {parts.where}, --data.classes says "
            f"{data.classes}"
        )
    task: Task = "objects" if parts.shared_classes else "faces"
    evaluations = {
        name: replace(face_folders(name, images), alignment=parts.alignment)
        if task == "faces"
        else Evaluation(name, task, images)
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
        alignment=parts.alignment,
        more_tests={name: partial(public_set, *where, data) for name, where in probes.items()},
    )


PROCEDURAL = ("faces", "objects", "objects-retrieval")
TEST_INSTANCES = 6  # images of each test or development identity; faces: one is in the gallery
DEVELOPMENT_INSTANCES = 4  # objects: images of each class, other than the training and test ones


def _procedural(data: Data, cache: Path, teacher_identities: int) -> DataSet:
    """faces, objects-retrieval: scored on other identities than the training ones. objects: on
    other images of the same classes, which are the teacher's too."""
    known = data.name == "objects"
    identities = data.identities if known else max(data.identities, teacher_identities)
    pixels, labels = procedural.split(
        _family(data), "train", identities, data.instances, cache=cache
    )
    own = data.identities * data.instances  # ordered by identity: the student's come first
    held_out: tuple[HeldOut, ...] = ("development", "test") if data.development else ("test",)
    return DataSet(
        task="objects" if known else "faces",
        train=Resident(pixels[:own], labels[:own]),
        classes=data.identities,
        teacher_train=Resident(pixels, labels),
        teacher_classes=identities,
        evaluations={name: _held_out(data, name, cache) for name in held_out},
        selection=held_out[0],
        licence="procedural, of this project's own licence",
        fingerprint="" if data.name == "faces" else f"objects {objects.VERSION}",
    )


def _family(data: Data) -> procedural.Family:
    kind = procedural.Faces if data.name == "faces" else procedural.Objects
    return kind(size=data.kept, seed=data.seed, coarse=data.coarse, fine=data.fine)


HeldOut = Literal["development", "test", "shifted"]


def _held_out(data: Data, name: HeldOut, cache: Path) -> Evaluation:
    split: procedural.Split = name
    count = data.development if name == "development" else data.test
    each = TEST_INSTANCES
    if data.name == "objects":
        known: dict[HeldOut, procedural.Split] = {
            "development": "known-development",
            "test": "known-test",
            "shifted": "known-shifted",
        }
        split, count = known[name], data.identities
        each = DEVELOPMENT_INSTANCES if name == "development" else TEST_INSTANCES
    drawn, labels = procedural.split(_family(data), split, count, each, cache=cache)
    images = Resident(centre(drawn, data.hr), labels)
    if data.name == "faces":
        return face_folders(name, images)
    if data.name == "objects":
        return Evaluation(name, "objects", images)
    return retrieved(data.name, name, images)


# -- training faces ------------------------------------------------------------------------------

RESEARCH = "non-commercial research only, by the set's agreement; faces of real people"
LICENCES = {
    "recordio": "the pack's own; InsightFace's packs: non-commercial research only",
    "casia": f"CASIA-WebFace (Yi et al. 2014): {RESEARCH}",
    "vggface2": f"VGGFace2 (Cao et al. 2018): {RESEARCH}",
    "umdfaces": f"UMDFaces (Bansal et al. 2017): {RESEARCH}",
    "tinyface": f"TinyFace (Cheng et al. 2018): {RESEARCH}",
    "survface": f"QMUL-SurvFace (Cheng et al. 2018): {RESEARCH}",
    "bin": f"of the set that it was made from, mostly {RESEARCH}",
    "lfw": "LFW (Huang et al. 2007): no stated licence, research use; faces of real people",
    "calfw": f"CALFW (Zheng et al. 2017): {RESEARCH}",
    "cplfw": f"CPLFW (Zheng, Deng 2018): {RESEARCH}",
    "cfp-ff": f"CFP (Sengupta et al. 2016): {RESEARCH}",
    "cfp-fp": f"CFP (Sengupta et al. 2016): {RESEARCH}",
    "survface-pairs": f"QMUL-SurvFace (Cheng et al. 2018): {RESEARCH}",
    "uccs": f"UCCS (Sapkota, Boult 2013): {RESEARCH}",
    "cub": "CUB-200-2011 (Wah et al. 2011): non-commercial research; photographs of Flickr users",
    "cars196": "Cars196 (Krause et al. 2013): non-commercial research; photographs of ImageNet",
    "sop": "Stanford Online Products (Song et al. 2016): no stated licence; photographs of eBay",
}

# Of InsightFace's data zoo, by their number of identities.
PACKS = {10_572: ("CASIA-WebFace", 490_623), 93_431: ("MS1MV3", 5_179_510)}
NATIVE = ("tinyface", "survface")  # small by nature; their releases have a test part
PROBES = ("stl10", "tinyimagenet")  # what features of objects are probed on, beside the test part

FACE_SETS: dict[str, Callable[[Path, Data], Items]] = {
    "recordio": lambda root, data: RecordIODataset(root),
    "casia": lambda root, data: faces.casia(root, data.counts)[0],
    "vggface2": lambda root, data: faces.vggface2(root, counts=data.counts)[0],
    "umdfaces": lambda root, data: faces.umdfaces(root, data.counts)[0],
    "tinyface": lambda root, data: identification.tinyface_train(root, data.counts).items,
    "survface": lambda root, data: identification.survface_train(root, data.counts).items,
}
RETRIEVAL: dict[str, Callable[[Path, Literal["published", "any"]], retrieval.Retrieval]] = {
    "cub": retrieval.cub,
    "cars196": retrieval.cars196,
    "sop": retrieval.sop,
}


def _root(data: Data) -> Path:
    if not data.root:
        raise ValueError(f"--data.name {data.name} needs --data.root: where it lies (docs/data.md)")
    root = Path(data.root).expanduser()
    if not root.exists():
        raise ValueError(f"--data.root {data.root}: no such folder")
    return root


def _face_set(data: Data) -> DataSet:
    """Scored on `data.test_sets`; without any a RecordIO pack on the .bin files beside it, and a
    natively small set on its own test part."""
    root = _root(data)
    tests = _face_tests(data, root)  # all is looked for first: decoding may take long
    first, *others = tests
    raw = FACE_SETS[data.name](root, data)
    if data.name == "recordio":
        check_pack(raw, root, data)
    test = public_set(*tests[first], data)

    def other(name: str) -> Evaluation:
        found = public_set(*tests[name], data)
        check_alignment(alignment, found, data)
        return found

    items, alignment = placed(raw, data)
    check_alignment(alignment, test, data)
    train, classes, held, skipped = _divided(items, data, native=data.name in NATIVE)
    evaluations = {"test": test}
    if held is not None:
        kept = identities("development", held)
        evaluations["development"] = replace(kept, native=data.name in NATIVE)
    notes: dict[str, object] = {"alignment": alignment, "test_sets": list(tests)}
    if isinstance(items, Aligned):
        notes["landmarks"] = items.report
    return DataSet(
        task="faces",
        train=train,
        classes=classes,
        teacher_train=train,
        teacher_classes=classes,
        evaluations=evaluations,
        selection="development" if held is not None else "test",
        licence=LICENCES[data.name],
        fingerprint=_fingerprint(raw, data),
        skipped=tuple(skipped),
        alignment=alignment,
        notes=notes,
        more_tests={name: partial(other, name) for name in others},
    )


def check_pack(pack: Items, root: Path, data: Data) -> None:
    """Published sizes, where a pack's number of identities tells which it is."""
    identities = len(np.unique(pack.labels))
    if identities in PACKS:
        name, images = PACKS[identities]
        check_counts(name, root, {"images": len(pack)}, {"images": images}, data.counts)


def _divided(
    items: Items, data: Data, native: bool = False
) -> tuple[Images, int, Images | None, list[str]]:
    """(training images, their classes, those of the last `data.development` classes, left out).

    native: tight, small crops, taken whole; for development at the LR size, as they are tested.
    """
    names, number = np.unique(items.labels, return_inverse=True)
    classes = len(names) - data.development
    if classes < 2:
        raise ValueError(
            f"{data.name} in {data.root}: {len(names):,} training classes, of which "
            f"--data.development keeps {data.development}; keep fewer, or 0"
        )
    if data.classes and data.classes != classes:
        raise ValueError(
            f"{data.name} in {data.root}: {classes:,} classes to train on, --data.classes says "
            f"{data.classes:,} ({data.development} are kept by --data.development)"
        )
    own, kept = np.flatnonzero(number < classes), np.flatnonzero(number >= classes)
    train, skipped = prepared(
        Subset(items, own, number[own]), data, data.hr, whole=native, role="training"
    )
    held = None
    if len(kept):
        rest = Subset(items, kept, number[kept])
        side = data.lr if native else data.hr
        held, more = prepared(rest, data, side, whole=native, role="held out")
        skipped += more
    return train, classes, held, skipped


def _test_sets(data: Data, known: Collection[str], whose: str) -> dict[str, tuple[str, Path]]:
    """What `data.test_sets` names of the `known` sets: name -> (kind, path)."""
    found: dict[str, tuple[str, Path]] = {}
    for entry in data.test_sets:
        name, _, path = entry.partition("=")
        kind = "bin" if path.endswith(".bin") and "bin" in known else name
        if not name or not path:
            bins = " (or any name for a .bin)" if "bin" in known else ""
            raise ValueError(
                f"--data.test-sets {entry}: give NAME=PATH, NAME one of {', '.join(known)}{bins}"
            )
        if kind not in known:
            raise ValueError(
                f"--data.test-sets {entry}: {whose} is scored on no test set {name!r} (there are: "
                f"{', '.join(known)})"
            )
        found[name] = (kind, Path(path).expanduser())
        if not found[name][1].exists():
            raise ValueError(f"--data.test-sets {entry}: no such file or folder (docs/data.md)")
    return found


def _face_tests(data: Data, root: Path) -> dict[str, tuple[str, Path]]:
    """What to score faces on: name -> (kind, path)."""
    found = _test_sets(data, TEST_SETS, data.name)
    if not found and data.name in NATIVE:
        return {data.name: (data.name, root)}
    if not found and data.name == "recordio":
        folder = root if root.is_dir() else root.parent
        found = {path.stem: ("bin", path) for path in sorted(folder.glob("*.bin"))}
        if "lfw" in found:  # what the papers report first
            found = {"lfw": found["lfw"]} | found
    if not found:
        raise ValueError(
            f"{data.name} has no test part: say what to score on, --data.test-sets NAME=PATH "
            f"(such as lfw=FOLDER; there are: {', '.join(TEST_SETS)})"
        )
    return found


def _fingerprint(raw: Items, data: Data) -> str:
    """Of what the training files are called, and of the size and time of a thousand of them."""
    some = range(0, len(raw), max(1, len(raw) // 1000))
    if isinstance(raw, RecordIODataset):
        paths = [raw.path]
    elif isinstance(raw, Files):
        paths = [raw.root / raw.files[i] for i in some]
    else:
        raise TypeError(f"{type(raw).__name__} has no files to know it by")
    paths += [Path(name).expanduser() for name in data.landmarks]
    stamps = [(p.stat().st_size, p.stat().st_mtime_ns) for p in paths]
    return digest(len(raw), np.bincount(raw.labels).tolist(), [*map(raw.name, some)], stamps)


# -- retrieval -----------------------------------------------------------------------------------


def _retrieval_set(data: Data) -> DataSet:
    """Classes to train on, and other classes to retrieve images of."""
    root = _root(data)
    found = RETRIEVAL[data.name](root, data.counts)
    items = localised(data.name, found.train, data)
    if items is not found.train and data.on_error == "skip":
        raise ValueError(
            "--data.quality unlocalised: a picture and its box are two images, of which "
            "--data.on-error skip might leave out one; say stop"
        )
    train, classes, held, skipped = _divided(items, data)
    whole, held_whole, fingerprint = None, None, _fingerprint(found.train, data)
    if items is not found.train:
        whole, _, held_whole, _ = _divided(found.train, data)
        fingerprint = digest(fingerprint, np.asarray(found.train.boxes).tolist())
    evaluations = {"test": replace(retrieved_test(data.name, found, data), name="test")}
    if held is not None:
        development = retrieved(data.name, "development", held)
        evaluations["development"] = replace(development, whole=held_whole)
    return DataSet(
        task="faces",
        train=train,
        classes=classes,
        teacher_train=train,
        teacher_classes=classes,
        evaluations=evaluations,
        selection="development" if held is not None else "test",
        licence=LICENCES[data.name],
        fingerprint=fingerprint,
        skipped=tuple(skipped),
        train_whole=whole,
    )


# -- other evaluations ---------------------------------------------------------------------------


def evaluation(
    data: Data, name: str, root: str, *, cache: Path, task: Task, classes: int, teachers: int = 0
) -> Evaluation:
    """Something else to score a trained student on.

    name: "shifted" (procedural: the test classes under other lighting, noise, blur, compression),
    "folder" (ROOT/<class>/*; the classes in sorted order, or identities), a public test set of
    shared.data.protocols at `root`, or a split of the data set that `data` names ("test",
    "development"). classes: of the student. teachers: identities of its teacher, whose rendered
    faces are then found in the cache.
    Raises ValueError, naming what there is, for anything else.
    """
    if name == "folder":
        images, alignment = classification.labelled_folder(Path(root).expanduser(), data)
        if task == "faces":
            return replace(face_folders(root, images), alignment=alignment)
        found = int(images.labels.max()) + 1
        if found != classes:
            raise ValueError(f"--root {root}: {found} class folders, the student knows {classes}")
        return Evaluation(root, task, images)
    if name == "shifted" and data.name in PROCEDURAL:
        return _held_out(data, "shifted", cache)
    if name in TEST_SETS and root:
        return public_set(name, Path(root).expanduser(), data)
    if name == "test" and data.name in FACE_SETS:  # without the training images
        return public_set(*next(iter(_face_tests(data, _root(data)).values())), data)
    if name == "test" and data.name in RETRIEVAL:
        return replace(public_set(data.name, _root(data), data), name="test")
    if data.name not in FACE_SETS:  # its probe sets are not asked for
        data = replace(data, test_sets=())
    splits = load(data, cache=cache, teacher_identities=teachers).evaluations
    if name not in splits:
        more = ", shifted" if data.name in PROCEDURAL else ""
        more += ", native" if data.name == "faces" else ""
        known = ", ".join(TEST_SETS)
        raise ValueError(
            f"--on {name}: no such split (there are: {', '.join(splits)}{more}; with --root: "
            f"folder, {known})"
        )
    return splits[name]

"""What every recipe is made of: frozen values, composed with `dataclasses.replace`.

A paper's own `Config` inherits `Run` and adds `data`, `teacher`, `student`, `optim` and its own
fields, so that `--seed 3` and `--optim.lr .1` are flags of every script (shared/cli.py).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

ROOT = Path(__file__).resolve().parents[1]  # the clone: runs/ and cache/ lie here
SCHEMA = 1  # raised whenever an older config.json or checkpoint can no longer be read


@dataclass(frozen=True)
class Data:
    """The data set, its two resolutions and its training views."""

    name: Literal[
        "faces", "objects", "objects-retrieval",
        "digits", "folder", "cifar10", "cifar100", "svhn", "stl10", "tinyimagenet",
        "recordio", "casia", "vggface2", "umdfaces", "tinyface", "survface",
        "cub", "cars196", "sop",
    ] = "faces"  # fmt: skip
    """faces, objects (told apart), objects-retrieval (held-out classes): procedural, no download.
    digits: scikit-learn's. Others: see docs/data.md."""
    root: str = ""
    """Folder of the data (docs/data.md); empty: a download (cifar10, cifar100, svhn, stl10)."""
    hr: int = 64
    """Side of the teacher's input in px."""
    lr: int = 16
    """Side of the student's input in px; at most hr."""
    kernel: Literal["bicubic", "bilinear", "area", "nearest"] = "bicubic"
    """Down-sampling kernel, HR to LR."""
    antialias: bool = True
    """Widen the kernel by the scale; in PyTorch it also changes bicubic's coefficient."""
    quality: Literal["small", "enlarged", "unlocalised"] = "small"
    """What the student sees. small: the LR image. enlarged: the LR image brought back to hr px
    (bicubic). unlocalised: the LR image of the whole picture, where the teacher sees the box."""
    degradation: Literal["plain", "realistic"] = "plain"
    """Of training views. realistic: blur, then the kernel, noise and JPEG, of strengths drawn anew
    for each image and epoch."""
    flip: bool = True
    """Mirror half of the training views; HR and LR alike."""
    shift: int = 4
    """Largest shift of a training view in HR px; HR and LR alike."""
    shift_step: int = 4
    """Distance between two shifts in HR px: views are a finite set, flips x shifts."""
    pad: Literal["edge", "zero", "image"] = "edge"
    """What a shift brings in at the border. image: the picture itself, which is brought to hr + 2
    shift px a side, so that a view is a crop of hr px, and an evaluation sees the centre one."""
    crop: Literal["shift", "resized"] = "shift"
    """resized: a training view is a random part of the picture's centre square (8 to 100 % of its
    area, sides 3:4 to 4:3) brought to hr px, drawn anew for each image and epoch."""
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    """Per RGB channel, of values in [0, 1]."""
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    """Per RGB channel, of values in [0, 1]."""
    classes: int = 0
    """How many classes there must be; 0: as many as are found."""
    counts: Literal["published", "any"] = "published"
    """published: a data set must be complete. any: what is there is taken."""
    test_sets: tuple[str, ...] = ()
    """Training faces: what to score on, such as lfw=FOLDER or agedb=FILE.bin. Objects: what frozen
    features are probed on, stl10=FOLDER or tinyimagenet=FOLDER."""
    landmarks: tuple[str, ...] = ()
    """CSV files of five points a face (path,x1,y1,...,x5,y5), to align to ArcFace's template."""
    no_landmarks: Literal["error", "centre-crop", "drop"] = "error"
    """A face that the CSV files lack; counted and reported. A test set never drops one."""
    any_alignment: bool = False
    """Score faces also where they are cut out otherwise than the training ones."""
    margin: float = 0.2
    """Of sets with face boxes: the square is as much larger than the box's longer side."""
    on_error: Literal["stop", "skip"] = "stop"
    """An image that cannot be decoded: stop and name it, or count it and go on."""
    resident_gib: float = 4.0
    """Images up to this many GiB stay in memory; more are decoded as they are needed."""
    workers: int = 2
    """Decoding processes for images that are not resident."""
    seed: int = 0
    """Seed of the data themselves (faces: which people; digits: which split)."""
    identities: int = 200
    """faces, objects: identities or classes the student is trained on."""
    instances: int = 12
    """faces, objects: training images of each."""
    development: int = 300
    """Identities (cub, ...: classes) for choosing hyper-parameters and the best epoch; disjoint
    from the training and the test ones. 0: the test set chooses."""
    test: int = 1000
    """faces, objects-retrieval: test identities or classes, disjoint from all others."""
    coarse: float = 0.6
    """faces, objects: how far they differ in what survives at LR (head, hair, skin; shape)."""
    fine: float = 1.4
    """faces, objects: how far they differ in what only HR shows (brows, moles; texture, marks)."""

    def __post_init__(self) -> None:
        _at_least(1, "data", self, "hr", "lr", "shift_step", "identities", "instances")
        _at_least(0, "data", self, "shift", "classes", "workers", "resident_gib", "margin")
        if self.pad == "image" and self.crop == "resized":
            raise ValueError("--data.pad image and --data.crop resized: take one of the two")
        if min(self.std) <= 0:
            raise ValueError(f"--data.std {self.std}: every deviation must be above 0")

    @property
    def kept(self) -> int:
        """Side in px at which pictures are kept: hr, and room for the crops."""
        if self.crop == "resized":
            return self.hr * 8 // 7  # 256 for 224
        return self.hr + (2 * self.shift if self.pad == "image" else 0)

    @property
    def lr_input(self) -> int:
        """Side of the student's input in px."""
        return self.hr if self.quality == "enlarged" else self.lr


@dataclass(frozen=True)
class Optim:
    """The optimiser and its schedule (shared/optim.py)."""

    method: Literal["sgd", "adam"] = "sgd"
    """adam: with its usual betas; the decay is added to the gradient, as in the papers."""
    lr: float = 0.1
    """Peak learning rate, for this batch size."""
    momentum: float = 0.9
    """Of SGD."""
    nesterov: bool = True
    """Nesterov's form of momentum."""
    weight_decay: float = 5e-4
    """On every parameter."""
    batch: int = 64
    """Images a step, over all ranks."""
    epochs: int = 24
    """Passes over the training images."""
    schedule: Literal["cosine", "step", "poly"] = "cosine"
    """cosine: to 0 after the warm-up. step: times gamma at each milestone. poly: to 0 as the share
    of the steps that are left, to the power."""
    warmup: float = 0.1
    """Share of all steps over which the rate rises linearly."""
    milestones: tuple[int, ...] = ()
    """Epochs, for step."""
    gamma: float = 0.1
    power: float = 2.0
    """Of poly."""
    clip: float = 0.0
    """Largest norm of the whole gradient; 0: measured, not clipped."""

    def longer(self, times: float) -> Optim:
        """The same over `times` as many epochs, milestones included."""
        later = tuple(round(times * m) for m in self.milestones)
        epochs = max(1, round(times * self.epochs))
        return dataclasses.replace(self, epochs=epochs, milestones=later)

    def __post_init__(self) -> None:
        _at_least(1, "optim", self, "epochs")
        _at_least(2, "optim", self, "batch")
        _at_least(0, "optim", self, "lr", "clip", "warmup", "momentum", "weight_decay", "power")


@dataclass(frozen=True)
class Network:
    """A backbone and what stands on it."""

    name: str = "small-student"
    """A name of shared.models.create."""
    input: Literal["native", "upsample"] = "native"
    """iresnet and adaface networks: built for the images' size, or images enlarged to 112 px."""
    weights: str = ""
    """What the trunk starts from: imagenet (torchvision's, downloaded once) or a file of weights;
    empty: random numbers."""
    head: Literal[
        "softmax", "arcface", "cosface", "curricularface", "magface", "adaface", "none"
    ] = "cosface"  # fmt: skip
    """softmax: the backbone's own classifier and cross-entropy. none: no classes, the unit
    embedding is learnt from triplets (metric learning)."""
    scale: float = 16.0
    """s of the margin heads."""
    margin: float = 0.2
    """m of the margin heads (cosface: of the cosine; others: radians; magface: the smallest); none:
    of the triplet loss."""


@dataclass(frozen=True)
class Teacher(Network):
    """The high-resolution network: trained once, cached by the hash of what made it."""

    name: str = "small-teacher"
    checkpoint: str = ""
    """Weights of your own (.safetensors, .pth) for the backbone, instead of training one."""
    colours: Literal["auto", "rgb", "bgr"] = "auto"
    """What images its weights are for; auto: bgr for AdaFace's files, else rgb."""
    identities: int = 400
    """faces, objects: identities or classes the teacher is trained on; the student's are the first
    of them."""
    images_per_class: int = 4
    """K of the P x K batches that a teacher without classes (head none) is trained on."""
    outputs: Literal["auto", "always", "never"] = "auto"
    """Keep its outputs for every training view in the cache, instead of asking it at each step.
    auto: where the views are no more than the passes over the data that it saves, or are there."""
    outputs_gib: float = 32.0
    """Most that these may take on disk, LR views included."""
    optim: Optim = field(default_factory=lambda: Optim(epochs=20))

    def __post_init__(self) -> None:
        _at_least(0, "teacher", self, "outputs_gib")


@dataclass(frozen=True)
class Run:
    """One training run (shared/run.py). A paper's Config inherits these fields."""

    recipe: str = ""
    """Name of the recipe; part of the run folder's name."""
    seed: int = 0
    """Initialisation, order, views and draws."""
    device: str = "auto"
    """auto: cuda where there is one, else cpu."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto: three timed steps of each decide, and the choice is recorded."""
    threads: int = 0
    """CPU threads; 0: PyTorch's own choice. Recorded: other counts give other bits."""
    compile: bool = False
    """torch.compile the student; worth it for long runs only."""
    evaluate_every: int = 4
    """Epochs between two scores on the development split."""
    checkpoint_seconds: float = 20.0
    """Seconds between two writes of last.ckpt; never changes the result."""
    log_every: int = 10
    """Steps between two lines of metrics.jsonl."""
    folder: str = ""
    """The run's folder; empty: RUNS/<paper>/<recipe>-<time>."""
    runs: str = "runs"
    """Where run folders go, from the clone's root or absolute."""
    cache: str = "cache"
    """Where rendered data, downloads and teachers are kept, from the clone's root or absolute."""
    resume: str = ""
    """A run folder to go on with, under its own configuration."""
    tensorboard: bool = False
    """Also write TensorBoard events into the run folder (needs the tensorboard extra)."""
    score_teacher: bool = True
    """Also score the teacher, on HR images and on the student's LR ones enlarged."""
    report: bool = True
    """Write report.html at the end."""

    def __post_init__(self) -> None:
        _at_least(0, "", self, "threads", "checkpoint_seconds")
        _at_least(1, "", self, "log_every", "evaluate_every")


def _at_least(least: float, prefix: str, config: Any, *names: str) -> None:
    """Raises ValueError for a field below `least`, by the name of its flag."""
    for name in names:
        if getattr(config, name) < least:
            flag = ".".join(filter(None, (prefix, name.replace("_", "-"))))
            raise ValueError(f"--{flag} {getattr(config, name)}: must be {least} or more")


# What the comparison holds equal in every paper: data, teacher, student, schedule.
MATCHED: dict[str, Any] = dict(
    data=Data(),
    teacher=Teacher(),
    student=Network(),
    optim=Optim(clip=5.0),  # of 1, 5 and 20 the best on development identities, for every student
)

T = TypeVar("T")


def to_dict(config: Any) -> dict[str, Any]:
    """A configuration as JSON-ready values (tuples become lists)."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def from_dict(cls: type[T], values: dict[str, Any], where: str = "config") -> T:
    """The inverse of `to_dict`.

    Raises ValueError, naming the fields, when `values` has others than `cls`.
    """
    hints = typing.get_type_hints(cls)
    fields = {f.name for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    if set(values) != fields:
        odd = sorted(set(values) ^ fields)
        raise ValueError(
            f"{where}: written by another version of this code (fields that differ: "
            f"{', '.join(odd)}); use the commit named in its config.json"
        )
    built = {}
    for name, value in values.items():
        hint = hints[name]
        if dataclasses.is_dataclass(hint):
            value = from_dict(typing.cast(type, hint), value, f"{where}.{name}")
        elif isinstance(value, list):
            inner = next(iter(typing.get_args(hint)), None)
            if dataclasses.is_dataclass(inner):
                value = [from_dict(typing.cast(type, inner), v, f"{where}.{name}") for v in value]
            value = _tuple(value)
        built[name] = value
    return cls(**built)


def _tuple(value: Any) -> Any:
    return tuple(_tuple(v) for v in value) if isinstance(value, list) else value


def digest(*parts: Any) -> str:
    """12 hex digits that name what was made from `parts` (dataclasses or JSON values)."""
    plain = [dataclasses.asdict(p) if dataclasses.is_dataclass(p) else p for p in parts]  # type: ignore[arg-type]
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:12]


def locate(path: str) -> Path:
    """A folder named in a configuration: absolute, or from the clone's root."""
    return Path(path).expanduser() if Path(path).expanduser().is_absolute() else ROOT / path

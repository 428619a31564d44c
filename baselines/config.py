"""The baselines' configuration: every method's weights, and a recipe for each method."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

from shared.config import MATCHED, Data, Network, Optim, Run, Teacher

NAME = "baselines"
Method = Literal[
    "none", "cosine", "kd", "fitnet", "at", "pkt", "sp", "rkd", "cc", "vid", "crd", "crcd", "dkd",
    "adadistill",
]  # fmt: skip


@dataclass(frozen=True)
class Arm:
    """One student: weights of the task loss, the method's own, and of plain KD beside it."""

    cls: float = 1.0
    own: float = 0.0
    kd: float = 0.0


# As published: of RepDistiller's scripts where the papers' tables were made with it (fitnet to
# crd), else of the method's own paper. cosine is ours. RKD's 25 and 50 are inside its loss.
WEIGHTS: dict[Method, Arm] = {
    "none": Arm(),
    "cosine": Arm(own=10.0),
    "kd": Arm(cls=0.1, own=0.9),
    "fitnet": Arm(own=100.0),
    "at": Arm(own=1000.0),
    "pkt": Arm(own=30_000.0),
    "sp": Arm(own=3000.0),
    "rkd": Arm(own=1.0),
    "cc": Arm(own=0.02),
    "vid": Arm(own=1.0),
    "crd": Arm(own=0.8, kd=1.0),
    "crcd": Arm(own=1.0, kd=0.9),
    "dkd": Arm(own=1.0),
    "adadistill": Arm(cls=0.0, own=1.0),
}
WITH_CLASSES = ("kd", "crd", "crcd", "dkd", "adadistill")
"""Methods that read the classifiers' logits, or make classes of their own."""


@dataclass(frozen=True)
class Variant:
    """What one run of a table changes; None: nothing."""

    teacher: str | None = None
    student: str | None = None


@dataclass(frozen=True)
class Config(Run):
    """What is trained beside a student alone."""

    data: Data = field(default_factory=lambda: MATCHED["data"])
    teacher: Teacher = field(default_factory=lambda: MATCHED["teacher"])
    student: Network = field(default_factory=lambda: MATCHED["student"])
    optim: Optim = field(default_factory=lambda: MATCHED["optim"])
    students: tuple[Method, ...] = tuple(WEIGHTS)
    """Rows of the table. none: the student alone."""
    scale: float = 1.0
    """Every distillation weight of WEIGHTS times this; the task loss keeps its own."""
    vary: tuple[Variant, ...] = ()
    """The runs of a table, one after the other; --only K takes the K-th."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.students or len(set(self.students)) < len(self.students):
            raise ValueError(f"--students {' '.join(self.students)}: name each once, at least one")
        if self.scale <= 0:
            raise ValueError(f"--scale {self.scale}: must be above 0")
        logits = [name for name in self.students if name in WITH_CLASSES]
        if logits and "none" in (self.teacher.head, self.student.head):
            raise ValueError(f"--students {logits[0]}: there are no classes with head none")
        if "adadistill" in self.students and self.student.head == "softmax":
            raise ValueError(
                "--students adadistill: it trains embeddings by a margin loss of its own, and a "
                "softmax classifier would stay untrained; take another head, or leave it out"
            )


_EMBEDDED = Config()

# CRRCD's Tables I and II, whose numbers for these methods are RepDistiller's: see crrcd/config.py.
_CIFAR = Data(
    name="cifar100", hr=32, lr=32, shift=4, shift_step=1, pad="zero", classes=100,
    mean=(0.5071, 0.4867, 0.4408), std=(0.2675, 0.2565, 0.2761),
)  # fmt: skip
_CIFAR_OPTIM = Optim(
    lr=0.05, nesterov=False, batch=64, epochs=240, schedule="step", warmup=0.0,
    milestones=(150, 180, 210), clip=1.0,
)  # fmt: skip
_TABLE1 = (
    ("wrn-40-2", "wrn-16-2"), ("wrn-40-2", "wrn-40-1"), ("resnet56", "resnet20"),
    ("resnet110", "resnet20"), ("resnet110", "resnet32"), ("resnet32x4", "resnet8x4"),
    ("vgg13", "vgg8"),
)  # fmt: skip
_OBJECTS = Config(
    data=_CIFAR,
    teacher=Teacher(name="wrn-40-2", head="softmax", optim=replace(_CIFAR_OPTIM, clip=0.0)),
    student=Network(name="wrn-16-2", head="softmax"),
    optim=_CIFAR_OPTIM,
    students=tuple(name for name in WEIGHTS if name != "adadistill"),
    evaluate_every=1,
    seed=5,
)

_TABLE = {
    "embedded": ("procedural faces 64 -> 16, no download: every method", _EMBEDDED),
    "smoke": (
        "the embedded recipe in seconds, to see that everything runs",
        replace(
            _EMBEDDED,
            data=replace(_EMBEDDED.data, identities=20, instances=8, development=30, test=40),
            teacher=Teacher(identities=24, optim=Optim(epochs=2, batch=32)),
            optim=replace(_EMBEDDED.optim, epochs=2, batch=32),
            evaluate_every=1,
        ),
    ),
    "matched": ("what compare.py holds equal in every paper: the embedded setting", _EMBEDDED),
    "table1": (
        "CIFAR-100, the seven pairs of CRRCD's Table I",
        replace(_OBJECTS, vary=tuple(Variant(teacher=t, student=s) for t, s in _TABLE1)),
    ),
} | {
    name: (f"procedural faces: the student alone, and {name}",
           replace(_EMBEDDED, students=("none", name)))
    for name in WEIGHTS if name != "none"
}  # fmt: skip
RECIPES: dict[str, Config] = {
    name: replace(config, recipe=name) for name, (_, config) in _TABLE.items()
}
ABOUT: dict[str, str] = {name: about for name, (about, _) in _TABLE.items()}


def members(config: Config) -> list[Config]:
    """The runs of a recipe: one, or as many as its table has."""
    runs = []
    for v in config.vary:
        one = replace(config, vary=())
        if v.teacher is not None:
            one = replace(one, teacher=replace(one.teacher, name=v.teacher))
        if v.student is not None:
            one = replace(one, student=replace(one.student, name=v.student))
        runs.append(one)
    return runs or [config]


def arms(config: Config) -> dict[str, Arm]:
    """The students of one run by name, each with the weights it is trained with."""
    scaled = {
        name: replace(arm, own=config.scale * arm.own, kd=config.scale * arm.kd)
        for name, arm in WEIGHTS.items()
    }
    return {name: scaled[name] for name in config.students}

"""HORKD's configuration, and a recipe for every table and figure."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import Any, Literal

from shared.config import MATCHED, Data, Network, Optim, Run, Teacher

NAME = "horkd"
ASSISTANT = "assistant"
TERMS = ("L1", "L2", "L3", "LC")  # of Eq. 8
BASELINES = ("alone", "alone-long", "kd", "fitnet", "at", "rkd", "direct")
Stages = Literal["1", "2", "both", "direct"]


@dataclass(frozen=True)
class Variant:
    """What one run of a table or figure changes; None: nothing."""

    lr: int | None = None
    network: str | None = None  # assistant and student
    data: str | None = None
    students: tuple[str, ...] | None = None
    stages: Stages | None = None


@dataclass(frozen=True)
class Config(Run):
    """The paper's letters, and what it is silent on (see README.md)."""

    data: Data = field(default_factory=lambda: MATCHED["data"])
    teacher: Teacher = field(default_factory=lambda: MATCHED["teacher"])
    student: Network = field(default_factory=lambda: MATCHED["student"])
    optim: Optim = field(default_factory=lambda: MATCHED["optim"])
    assistant: Network = field(default_factory=lambda: Network(name="small-assistant"))
    """The student's network for HR images: learns from the teacher, then teaches the student."""
    stages: Stages = "both"
    """1: the assistant and nothing else (cross-structure). 2: the students of an assistant that is
    there (cross-resolution; --assistant-run). direct: teacher to student, without an assistant."""
    assistant_run: str = ""
    """--stages 2: folder of the run whose assistant teaches."""
    student_init: Literal["scratch", "assistant"] = "scratch"
    """What a student of stage 2 starts from."""
    l1: float = 1.0
    """Weight of L1 (Eq. 8, where it is 1)."""
    alpha: float = 0.02
    """Weight of L2."""
    beta: float = 0.01
    """Weight of L3."""
    gamma: float = 1.0
    """Weight of L_C."""
    reduction: Literal["sum", "image", "mean", "rkd"] = "sum"
    """sum: as printed. image: that over the images of the batch, as the task loss is. mean: over
    images, pairs, triplets. rkd: L2 and L3 over all N^2 and N^3 entries, as the code of RKD has it
    (L1 and L_C: the mean)."""
    penalty: Literal["squared", "huber"] = "squared"
    """Of L2; RKD's is huber."""
    cls: float = 1.0
    """Weight of the task loss beside Eq. 8 (1 in the paper for classification, else 0), and beside
    KD and RKD."""
    kd: float = 1.0
    """Weight of plain KD in the row kd."""
    temperature: float = 4.0
    """Of kd."""
    fitnet: float = 100.0
    """Weight of FitNet's hint in the row fitnet."""
    attention: float = 1000.0
    """Weight of attention transfer in the row at."""
    images_per_class: int = 4
    """K of the P x K batches that a student without classes (head none) is trained on."""
    students: tuple[str, ...] = ("alone", "alone-long", "kd", "rkd", "direct", "horkd")
    """Rows of the table, of which --stages 1 and 2 train their own: task loss only (also longer),
    KD, FitNet, AT, RKD, HORKD without the assistant, horkd, and terms of Eq. 8 joined by +
    (L2+L3+LC), each taught as horkd is."""
    long: float = 2.0
    """Epochs of alone-long, as a multiple."""
    figure: Literal["", "curve", "terms"] = ""
    """Drawn after the run, or after the last of a recipe's runs."""
    vary: tuple[Variant, ...] = ()
    """The runs of a table or figure, one after the other; --only K takes the K-th."""

    def __post_init__(self) -> None:
        super().__post_init__()
        weights = ("l1", "alpha", "beta", "gamma", "cls", "kd", "fitnet", "attention")
        for name in weights:
            if getattr(self, name) < 0:
                raise ValueError(f"--{name} {getattr(self, name)}: must be 0 or more")
        if not self.students or len(set(self.students)) < len(self.students):
            raise ValueError(f"--students {' '.join(self.students)}: name each once, at least one")
        for name in self.students:
            known = (*BASELINES, NAME)
            if name not in known and (wrong := set(name.split("+")) - set(TERMS)):
                raise ValueError(
                    f"--students {name}: no such row (there are: {', '.join(known)}, and terms "
                    f"of {' '.join(TERMS)} joined by +, not {min(wrong)!r})"
                )
        if "kd" in self.students and "none" in (self.teacher.head, self.student.head):
            raise ValueError("--students kd: there are no logits with head none")
        of_terms = [name for name in self.students if set(name.split("+")) <= set(TERMS)]
        if self.figure == "terms" and not of_terms:
            raise ValueError("--figure terms: no row of --students is of terms (L2+L3+LC)")
        if self.data.quality == "unlocalised":
            raise ValueError("--data.quality unlocalised: HORKD's networks see one picture")
        if self.temperature <= 0 or self.long <= 0:
            raise ValueError("--temperature and --long must be above 0")
        if self.images_per_class < 2:
            raise ValueError("--images-per-class must be 2 or more: a pair has two images")
        if self.student.head == "none" and self.optim.batch % self.images_per_class:
            raise ValueError(
                f"--optim.batch {self.optim.batch} is no multiple of --images-per-class "
                f"{self.images_per_class}"
            )


_EMBEDDED = Config()

# CIFAR-100. The paper names no schedule: RepDistiller's form, by 60, 120 and 160 of 200 epochs.
_CIFAR_OPTIM = Optim(
    lr=0.1, nesterov=False, batch=128, epochs=200, schedule="step", warmup=0.0,
    milestones=(60, 120, 160), gamma=0.2, clip=5.0,
)  # fmt: skip
_CIFAR = Config(
    data=Data(
        name="cifar100", classes=100, hr=32, lr=16, shift=4, shift_step=1, pad="zero",
        mean=(0.5071, 0.4867, 0.4408), std=(0.2675, 0.2565, 0.2761),
    ),
    teacher=Teacher(name="ResNet50", head="softmax", optim=_CIFAR_OPTIM),
    assistant=Network(name="ResNet18", head="softmax"),
    student=Network(name="ResNet18", head="softmax"),
    optim=_CIFAR_OPTIM,
    reduction="image",  # sums against a task loss that is a mean: training falls apart (README)
    students=("alone", "kd", "direct", "horkd"),
    evaluate_every=10,
)  # fmt: skip
_TABLE1 = (
    Variant(network="ResNet18"),
    Variant(network="vgg11"),
    # the methods beside it are quoted at 32 px
    Variant(
        network="ResNet18", lr=32, stages="direct", students=("kd", "fitnet", "at", "rkd", "horkd")
    ),
)

# Faces: Eq. 8 alone (no task loss); the head is there for the student alone.
_ARCFACE: dict[str, Any] = {"head": "arcface", "scale": 64.0, "margin": 0.5}
_FACES_OPTIM = Optim(
    lr=0.05, nesterov=False, batch=128, epochs=34, schedule="step", warmup=0.0,
    milestones=(21, 28, 32), clip=5.0,
)  # fmt: skip
_FACES = Config(
    data=Data(name="umdfaces", hr=112, lr=16, shift=0, development=0, test_sets=("lfw=FOLDER",)),
    teacher=Teacher(name="iresnet50", **_ARCFACE, optim=_FACES_OPTIM),
    assistant=Network(name="slim-resnet34", **_ARCFACE),
    student=Network(name="slim-resnet34", **_ARCFACE),
    optim=_FACES_OPTIM,
    cls=0.0,
    students=("alone", "direct", "horkd"),
    evaluate_every=1,
)
_UCCS = replace(_FACES.data, test_sets=("uccs=FOLDER",))
_SUBSETS = tuple("+".join(s) for n in range(1, 5) for s in combinations(TERMS, n))

# Metric learning: distillation only. ImageNet trunks; Adam and its rate as in RKD's code.
_TRIPLET: dict[str, Any] = {"head": "none", "margin": 0.2, "weights": "imagenet"}
_METRIC_OPTIM = Optim(
    method="adam", lr=1e-4, weight_decay=1e-5, batch=128, epochs=80, schedule="step", warmup=0.0,
    milestones=(40, 60),
)  # fmt: skip
_METRIC = Config(
    data=Data(
        name="cars196", hr=256, lr=256, pad="image", shift=16, shift_step=1, development=0,
        mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225),
    ),
    teacher=Teacher(name="imagenet-resnet50", **_TRIPLET, optim=_METRIC_OPTIM),
    assistant=Network(name="imagenet-resnet18", **_TRIPLET),
    student=Network(name="imagenet-resnet18", **_TRIPLET),
    optim=_METRIC_OPTIM,
    cls=0.0,
    students=("alone", "horkd"),
    evaluate_every=10,
)  # fmt: skip
_SIZES = (256, 224, 160, 128, 96)
# the assistant of each run is the table's 256
_TABLE4 = tuple(Variant(data=d, lr=r) for d in ("cars196", "cub", "sop") for r in _SIZES[1:])
_FIG3 = tuple(Variant(lr=r) for r in _SIZES)

_NONE: dict[str, Any] = {"head": "none", "margin": 0.2}
_RETRIEVAL = replace(
    _EMBEDDED,
    data=replace(_EMBEDDED.data, name="objects-retrieval"),
    assistant=replace(_EMBEDDED.assistant, **_NONE),
    student=replace(_EMBEDDED.student, **_NONE),
    cls=0.0,
    students=("alone", "rkd", "direct", "horkd", "L2+L3+LC"),
)
_OBJECTS = replace(
    _EMBEDDED,
    data=replace(_EMBEDDED.data, name="objects"),
    students=("alone", "kd", "rkd", "direct", "horkd", "L2+L3+LC"),
)

_TABLE = {
    "embedded": ("procedural faces 64 -> 16, no download: the default", _EMBEDDED),
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
    "embedded-objects": ("procedural objects 64 -> 16, told apart", _OBJECTS),
    "embedded-retrieval": ("procedural objects 64 -> 16, held-out classes retrieved", _RETRIEVAL),
    "table1": (
        "Table 1: CIFAR-100, ResNet50 -> ResNet18, VGG11 at 32 (assistant) and 16; KD, FitNet, "
        "AT, RKD at 32",
        replace(_CIFAR, vary=_TABLE1),
    ),
    "table2": (
        "Table 2: LFW, students at 32 and 16; --data.test-sets lfw=FOLDER",
        replace(_FACES, vary=(Variant(lr=32), Variant(lr=16))),
    ),
    "table3": (
        "Table 3: UCCS, 180 people at 16; --data.test-sets uccs=FOLDER",
        replace(_FACES, data=_UCCS),
    ),
    "table4": (
        "Table 4: Cars196, CUB, SOP, ResNet50 at 256 -> ResNet18 at 256 (assistant) to 96",
        replace(_METRIC, vary=_TABLE4),
    ),
    "fig3": (
        "Fig. 3: Cars196 at 256 to 96, with the assistant and without",
        replace(_METRIC, students=("direct", "horkd"), vary=_FIG3, figure="curve"),
    ),
    "fig4": (
        "Fig. 4: every subset of the terms, faces at 32, cross-structure stage only",
        replace(
            _FACES, data=replace(_UCCS, hr=32, lr=32), stages="direct", students=_SUBSETS,
            figure="terms",
        ),
    ),
    "direct": (
        "Sec. 4.4: CUB at 96, with the assistant and without",
        replace(
            _METRIC, data=replace(_METRIC.data, name="cub", lr=96), students=("direct", "horkd")
        ),
    ),
    "ablation-terms": (
        "embedded: every subset of the terms, without an assistant (Fig. 4)",
        replace(_EMBEDDED, stages="direct", students=("alone", *_SUBSETS), figure="terms"),
    ),
}  # fmt: skip
RECIPES: dict[str, Config] = {
    name: replace(config, recipe=name) for name, (_, config) in _TABLE.items()
}
ABOUT: dict[str, str] = {name: about for name, (about, _) in _TABLE.items()}


def members(config: Config) -> list[Config]:
    """The runs of a recipe: one, or as many as its table or figure has."""
    if not config.vary:
        return [config]
    runs = []
    for v in config.vary:
        changes = {k: getattr(v, k) for k in ("students", "stages") if getattr(v, k)}
        one = replace(config, vary=(), **changes)
        if v.lr is not None:
            one = replace(one, data=replace(one.data, lr=v.lr))
        if v.data is not None:
            own: Any = v.data
            one = replace(one, data=replace(one.data, name=own))
        if v.network is not None:
            one = replace(
                one,
                assistant=replace(one.assistant, name=v.network),
                student=replace(one.student, name=v.network),
            )
        runs.append(one)
    return runs


def at_hr(data: Data) -> Data:
    """The assistant's data: it sees HR images."""
    return replace(data, lr=data.hr, quality="small", degradation="plain")


def shown(arm: str) -> str:
    """The name of its row."""
    return "assistant, HR" if arm == ASSISTANT else arm


def arms(config: Config) -> dict[str, Config]:
    """The networks of one run by name, each as it is trained, the assistant before its students.

    `stages` of each says what teaches it: "1" and "direct" the teacher, "2" the assistant.
    """
    off: dict[str, Any] = dict.fromkeys(("kd", "fitnet", "attention"), 0.0)
    own = replace(config, **off, stages="direct" if config.stages == "direct" else "2")
    if config.stages in ("1", "both"):
        assistant = replace(own, stages="1", data=at_hr(config.data), student=config.assistant)
        if config.stages == "1":
            return {ASSISTANT: assistant}
    none: dict[str, Any] = dict.fromkeys(("l1", "alpha", "beta", "gamma"), 0.0)
    distilled = replace(own, stages="direct", **none)
    alone = replace(distilled, cls=1.0)
    longer = config.optim.longer(config.long)
    rkd: dict[str, Any] = {"alpha": 25.0, "beta": 50.0, "reduction": "rkd", "penalty": "huber"}
    known = {
        "alone": alone,
        "alone-long": replace(alone, optim=longer),
        "kd": replace(distilled, kd=config.kd),
        "fitnet": replace(alone, fitnet=config.fitnet),  # these two teach no embedding
        "at": replace(alone, attention=config.attention),
        "rkd": replace(distilled, **rkd),
        "direct": replace(own, stages="direct"),
    }
    found: dict[str, Config] = {}
    if config.stages != "2":
        skipped = "direct" if config.stages == "direct" else ""  # there it is the row horkd
        found = {row: known[row] for row in config.students if row in known and row != skipped}
    if config.stages == "both":
        found[ASSISTANT] = assistant
    for name in config.students:
        if name in known:
            continue
        kept = TERMS if name == NAME else name.split("+")
        fields = zip(TERMS, ("l1", "alpha", "beta", "gamma"), strict=True)
        left_out: dict[str, Any] = {field: 0.0 for term, field in fields if term not in kept}
        found[name] = replace(own, **left_out)
    return found

"""EmbedKD's configuration, and a recipe for every table and figure."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from shared.config import MATCHED, Data, Network, Optim, Run, Teacher

NAME, OWN = "embedkd", "rel"  # the paper's own student is that of the relative teacher
Students = tuple[
    Literal[
        "alone", "alone-long", "pkt", "darkrank", "abs", "rel", "abs+hint", "rel+hint", "abs+at",
        "rel+at", "abs+unlabelled", "rel+unlabelled", "abs-only", "rel-only",
    ], ...,
]  # fmt: skip


@dataclass(frozen=True)
class Variant:
    """What one run of a table or figure changes; None: nothing."""

    data: Literal["cub", "cars196"] | None = None
    quality: Literal["enlarged", "unlocalised"] | None = None
    weight: float | None = None
    """lambda, of either teacher."""


@dataclass(frozen=True)
class Config(Run):
    """The paper's letters, and what it is silent on (see README.md)."""

    data: Data = field(default_factory=lambda: MATCHED["data"])
    teacher: Teacher = field(default_factory=lambda: MATCHED["teacher"])
    student: Network = field(default_factory=lambda: MATCHED["student"])
    optim: Optim = field(default_factory=lambda: MATCHED["optim"])
    lambda_abs: float = 30.0
    """lambda of the absolute teacher, L_KD^abs (Eq. 4, 7)."""
    lambda_rel: float = 30.0
    """lambda of the relative teacher, L_KD^rel (Eq. 5 to 7)."""
    relative_mode: Literal["mean_abs", "frobenius"] = "mean_abs"
    """mean_abs: Eq. 5, mean over pairs. frobenius: the official code's norm of all differences; its
    lambdas then depend on the batch size."""
    rho: float = 1.0
    """Weight of the hints, L_hint (Eq. 9)."""
    kappa: float = 1.0
    """Weight of the attention, L_AT (Eq. 12)."""
    lambda_pkt: float = 30_000.0
    """Weight of PKT's loss, a mean over B^2 small numbers; this is its usual one."""
    lambda_darkrank: float = 0.1
    """Weight of DarkRank's loss."""
    images_per_class: int = 4
    """K of the P x K batches; P is the batch divided by it."""
    labelled: float = 1.0
    """Share of each class's training images whose labels are known, to the teacher too; drawn by
    data.seed."""
    unlabelled: int = 32
    """Images without a label a batch, beside P x K labelled ones or alone (students whose name ends
    in unlabelled or only)."""
    students: Students = ("alone", "alone-long", "pkt", "darkrank", "abs", "rel")
    """Rows of the table: L_ML only (also longer); with PKT's loss, DarkRank's, the absolute or the
    relative teacher's, hints or attention besides; these two with unlabelled images too or only."""
    long: float = 2.0
    """Epochs of alone-long, as a multiple."""
    score_on: Literal["test", "development"] = "test"
    """What the tables at the end are of."""
    figure: Literal["", "lambda"] = ""
    """Drawn after the last run: R@1 over lambda (Fig. 4)."""
    count: tuple[str, ...] = ()
    """Networks whose parameters are counted; nothing is trained."""
    vary: tuple[Variant, ...] = ()
    """The runs of a table or figure, one after the other; --only K takes the K-th."""

    def __post_init__(self) -> None:
        super().__post_init__()
        weights = ("lambda_abs", "lambda_rel", "rho", "kappa", "lambda_pkt", "lambda_darkrank")
        for name in (*weights, "unlabelled"):
            value, flag = getattr(self, name), name.replace("_", "-")
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"--{flag} {value}: must be a finite number, 0 or more")
        if not self.students or len(set(self.students)) < len(self.students):
            raise ValueError(f"--students {' '.join(self.students)}: name each once, at least one")
        if self.student.head == "none":  # P x K batches
            if self.images_per_class < 2:
                raise ValueError("--images-per-class must be 2 or more: a positive is another one")
            if self.optim.batch % self.images_per_class:
                raise ValueError(
                    f"--optim.batch {self.optim.batch} is no multiple of --images-per-class "
                    f"{self.images_per_class}"
                )
        if not 0 <= self.labelled <= 1:
            raise ValueError(f"--labelled {self.labelled}: must lie between 0 and 1")
        if self.long <= 0:
            raise ValueError(f"--long {self.long}: must be above 0")
        if self.score_on == "development" and not self.data.development:
            raise ValueError("--score-on development: --data.development keeps no classes for it")


# Without a download: objects of held-out classes are found again. The teacher is that of the other
# embedded recipes, trained on classes by CosFace: one trained by triplets (--teacher.head none)
# retrieved half as much in as many epochs. lambdas: the best of .3 to 300 on development classes.
_EMBEDDED = Config(
    data=replace(MATCHED["data"], name="objects-retrieval"), student=Network(head="none")
)

# The paper's: 256 x 256 px, of which 224 x 224 are seen; Adam at a constant 1e-5, batches of 32.
# The official code's: decay 2e-4, 4 classes x 8 images a batch, ImageNet weights, its lambdas for
# its Frobenius norm, and a number of iterations, here as epochs of N // 32 steps:
#   CUB    50,000 / (5,864 // 32 = 183)    = 273
#   Cars   72,000 / (8,054 // 32 = 251)    = 287
#   SOP    141,000 / (59,551 // 32 = 1,860) = 76
# and of CUB's labelled half 50,000 / (2,932 // 32 = 91) = 549.
_SETS: dict[str, dict[str, Any]] = {
    "cub": {"epochs": 273, "lambda_abs": 1.0, "lambda_rel": 0.3},
    "cars196": {"epochs": 287, "lambda_abs": 1.5, "lambda_rel": 0.1},
    "sop": {"epochs": 76, "lambda_abs": 2.0, "lambda_rel": 1.0},
}
_HALF = 549
# 80 to 20: classes that are kept for choosing lambda, of 100, 98 and 11,318
DEVELOPMENT = {"cub": 20, "cars196": 20, "sop": 2264}
# Weights to try, by relative_mode: the norm of B x B differences is far larger than their mean
GRID = {
    "mean_abs": (0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0),
    "frobenius": (0.1, 0.3, 1.0, 3.0, 10.0, 30.0),
}
# The field that is a student's own weight: what search.py chooses for it
WEIGHT = {
    "abs": "lambda_abs", "rel": "lambda_rel", "pkt": "lambda_pkt", "darkrank": "lambda_darkrank",
    "abs+hint": "rho", "rel+hint": "rho", "abs+at": "kappa", "rel+at": "kappa",
}  # fmt: skip
_PHOTOGRAPHS = Data(
    name="cub", hr=224, lr=224, kernel="bicubic", pad="image", shift=16, shift_step=1,
    mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), development=0,
)  # fmt: skip
_ADAM = Optim(
    method="adam", lr=1e-5, weight_decay=2e-4, batch=32, epochs=273, schedule="step", warmup=0.0
)
_IMAGENET: dict[str, Any] = {"head": "none", "margin": 0.2, "weights": "imagenet"}
_BASE = Config(
    data=_PHOTOGRAPHS,
    teacher=Teacher(name="imagenet-resnet101", **_IMAGENET, images_per_class=8, optim=_ADAM),
    student=Network(name="imagenet-resnet18", **_IMAGENET),
    optim=_ADAM,
    relative_mode="frobenius",
    images_per_class=8,
    students=("alone", "abs", "rel"),
)


def _on(config: Config, name: Literal["cub", "cars196", "sop"], **changes: Any) -> Config:
    """`config` on another data set, with its epochs and lambdas."""
    own = dict(_SETS[name])
    epochs = own.pop("epochs")
    return _for(replace(config, data=replace(config.data, name=name), **own), epochs, **changes)


def _for(config: Config, epochs: int, **changes: Any) -> Config:
    teacher = replace(config.teacher, optim=replace(config.teacher.optim, epochs=epochs))
    optim = replace(config.optim, epochs=epochs)
    return replace(config, teacher=teacher, optim=optim, **changes)


_PAPER = _on(_BASE, "cub")
_OFFICIAL = replace(
    _PAPER,
    data=replace(_PAPER.data, crop="resized", pad="edge", shift=0),
    teacher=replace(_PAPER.teacher, margin=0.0),
    student=replace(_PAPER.student, margin=0.0),
)
_SLOW = replace(_ADAM, lr=1e-6)  # its run_main.sh, for SOP
_SAME = replace(_PAPER, teacher=replace(_PAPER.teacher, name="imagenet-resnet18"))
_EVERY: Students = (
    "alone", "pkt", "darkrank", "abs", "rel", "abs+hint", "rel+hint", "abs+at", "rel+at",
)  # fmt: skip
_SEMI: Students = (
    "alone", "abs", "rel", "abs+unlabelled", "rel+unlabelled", "abs-only", "rel-only",
)  # fmt: skip
_TABLE = {
    "embedded": ("procedural objects 64 -> 16, no download: the default", _EMBEDDED),
    "smoke": (
        "the embedded recipe in seconds, to see that everything runs",
        replace(
            _EMBEDDED,
            data=replace(_EMBEDDED.data, identities=20, instances=8, development=20, test=30),
            teacher=replace(_EMBEDDED.teacher, identities=24, optim=Optim(epochs=2, batch=32)),
            optim=replace(_EMBEDDED.optim, epochs=2, batch=32),
            evaluate_every=1,
        ),
    ),
    "matched": ("what compare.py holds equal in every paper: faces, CosFace as L_ML", Config()),
    "table1": (
        "Table 1: CUB, Cars; hints, attention, PKT, DarkRank beside abs and rel",
        replace(_PAPER, students=_EVERY, vary=(Variant(data="cub"), Variant(data="cars196"))),
    ),
    "table2": ("Table 2: Stanford Online Products", _on(_PAPER, "sop")),
    "table3": (
        "Table 3: CUB with half of the labels: labelled, unlabelled images too, or only these",
        _for(_PAPER, _HALF, labelled=0.5, students=_SEMI),
    ),
    "table4": (
        "Table 4: parameters of the networks; trains nothing",
        replace(_PAPER, count=("imagenet-resnet101", "imagenet-resnet18", "mobilenet-0.25")),
    ),
    "table5": (
        "Table 5: a MobileNet-0.25 on CUB; needs --student.weights FILE for the paper's start",
        # torchvision has no weights of that width
        replace(
            _PAPER,
            student=replace(_PAPER.student, name="mobilenet-0.25", weights=""),
            students=("alone", "rel"),
        ),
    ),
    "table6": (
        "Table 6: CUB, Cars; students see 50 px enlarged, or the whole image for the box",
        replace(
            _SAME,
            vary=tuple(
                Variant(data=name, quality=quality)
                for quality in ("enlarged", "unlocalised")
                for name in ("cub", "cars196")
            ),
        ),
    ),
    "fig4": (
        "Fig. 4: R@1 over lambda on 20 of CUB's training classes",
        replace(
            _PAPER,
            data=replace(_PAPER.data, development=DEVELOPMENT["cub"]),
            students=("abs", "rel"),
            score_on="development",
            figure="lambda",
            vary=tuple(Variant(weight=v) for v in GRID["frobenius"]),
        ),
    ),
    "official": (
        "CUB where the official code differs: margin 0, random resized crops",
        _OFFICIAL,
    ),
    "official-sop": (
        "as official, on Stanford Online Products, at its learning rate of 1e-6",
        _on(
            replace(_OFFICIAL, optim=_SLOW, teacher=replace(_OFFICIAL.teacher, optim=_SLOW)), "sop"
        ),
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
        one = replace(config, vary=())
        if v.data is not None:
            one = _on(one, v.data)
        if v.quality is not None:
            lr = 50 if v.quality == "enlarged" else one.data.hr
            one = replace(one, data=replace(one.data, quality=v.quality, lr=lr))
        if v.weight is not None:
            one = replace(one, lambda_abs=v.weight, lambda_rel=v.weight)
        runs.append(one)
    return runs


def arms(config: Config) -> dict[str, Config]:
    """The students of one run by name, each with the weights and images it is trained with.

    Of an arm, labelled 0 and unlabelled 0 say that it sees no images of the kind. Raises ValueError
    for students that the other fields leave nothing to learn from.
    """
    none = {"lambda_abs": 0.0, "lambda_rel": 0.0, "lambda_pkt": 0.0, "lambda_darkrank": 0.0}
    alone = replace(config, **none, rho=0.0, kappa=0.0, unlabelled=0)  # type: ignore[arg-type]
    absolute = replace(alone, lambda_abs=config.lambda_abs)
    relative = replace(alone, lambda_rel=config.lambda_rel)
    longer = config.optim.longer(config.long)
    known: dict[str, Config] = {
        "alone": alone,
        "alone-long": replace(alone, optim=longer),
        "pkt": replace(alone, lambda_pkt=config.lambda_pkt),
        "darkrank": replace(alone, lambda_darkrank=config.lambda_darkrank),
    }
    for name, one in (("abs", absolute), ("rel", relative)):
        known |= {
            name: one,
            f"{name}+hint": replace(one, rho=config.rho),
            f"{name}+at": replace(one, kappa=config.kappa),
            f"{name}+unlabelled": replace(one, unlabelled=config.unlabelled),
            f"{name}-only": replace(one, unlabelled=config.unlabelled, labelled=0.0),
        }
    found: dict[str, Config] = {name: known[name] for name in config.students}
    semi = [name for name, one in found.items() if name.endswith(("+unlabelled", "-only"))]
    if not config.labelled:
        raise ValueError("--labelled 0.0: the teacher needs labels")
    if config.labelled < 1 and config.student.head != "none":
        raise ValueError(f"--labelled {config.labelled} needs --student.head none: no classes")
    if semi and config.labelled == 1:
        raise ValueError(f"--students {semi[0]}: every image has its label; add --labelled .5")
    if semi and not config.unlabelled:
        raise ValueError(f"--students {semi[0]} needs --unlabelled above 0")
    return found


def weights(config: Config) -> dict[str, float]:
    """Weights of a student's distillation terms that are not 0, by the name of the term."""
    named = {
        "abs": config.lambda_abs, "rel": config.lambda_rel, "pkt": config.lambda_pkt,
        "darkrank": config.lambda_darkrank, "hint": config.rho, "at": config.kappa,
    }  # fmt: skip
    return {name: weight for name, weight in named.items() if weight}

"""CRRCD's configuration, and a recipe for every table and figure."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal

from shared.config import MATCHED, Data, Network, Optim, Run, Teacher

NAME = "crrcd"


@dataclass(frozen=True)
class Variant:
    """What one run of a table or figure changes; None: nothing."""

    teacher: str | None = None
    student: str | None = None
    n: int | None = None
    tau: float | None = None
    d: int | None = None
    policy: Literal["supervised", "unsupervised"] | None = None


@dataclass(frozen=True)
class Config(Run):
    """The paper's letters, and what it is silent on (see README.md)."""

    data: Data = field(default_factory=lambda: MATCHED["data"])
    teacher: Teacher = field(default_factory=lambda: MATCHED["teacher"])
    student: Network = field(default_factory=lambda: MATCHED["student"])
    optim: Optim = field(default_factory=lambda: MATCHED["optim"])
    alpha: float = 0.5
    """Weight of L_kd (Eq. 13)."""
    beta: float = 2.0
    """Weight of L_rcd (Eq. 13)."""
    rho: float = 4.0
    """Temperature of L_kd (Eq. 12)."""
    tau: float = 0.1
    """Temperature of the critic (Eq. 10)."""
    n: int = 512
    """Negatives of each sample."""
    d: int = 128
    """Size of a relation vector."""
    queue: int = 4096
    """Teacher features that negatives are drawn from."""
    policy: Literal["supervised", "unsupervised"] = "supervised"
    """Negatives of other classes, or of other images."""
    normaliser: Literal["paper", "crd", "crd-ema"] = "paper"
    """Z of the critic: 1, CRD's constant, or its running average."""
    baselines: tuple[Literal["alone", "alone-long", "kd"], ...] = ("alone", "alone-long", "kd")
    """Students trained beside the paper's: L_cls only (also longer), and L_cls + alpha L_kd."""
    long: float = 2.0
    """Epochs of alone-long, as a multiple."""
    start: str = ""
    """A finished run: its students are fine-tuned with L_cls on this data, without a teacher."""
    figure: Literal["", "curve", "tsne", "similarity"] = ""
    """Drawn after the last run: scores over what differs between the runs, a map of test images, or
    histograms of pair scores."""
    vary: tuple[Variant, ...] = ()
    """The runs of a table or figure, one after the other; --only K takes the K-th."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.n, self.d, self.queue) < 1 or min(self.tau, self.rho) <= 0:
            raise ValueError(
                f"--n {self.n}, --d {self.d}, --queue {self.queue} must be 1 or more, and "
                f"--tau {self.tau}, --rho {self.rho} above 0"
            )
        if self.start and (self.alpha or self.beta):
            raise ValueError("--start: fine-tuning has no teacher, so give --alpha 0 --beta 0")


# CIFAR-100 as in RepDistiller: crop with padding 4, flip, and both networks see 32x32, because the
# paper's baselines are those published at 32x32 (README.md, "where the paper is silent").
_CIFAR = Data(
    name="cifar100", hr=32, lr=32, shift=4, shift_step=1, pad="zero", classes=100,
    mean=(0.5071, 0.4867, 0.4408), std=(0.2675, 0.2565, 0.2761),
)  # fmt: skip
_CIFAR_OPTIM = Optim(
    lr=0.05, nesterov=False, batch=64, epochs=240, schedule="step", warmup=0.0,
    milestones=(150, 180, 210), clip=1.0,
)  # fmt: skip
_SHUFFLE = 0.01  # RepDistiller's rate for ShuffleNets
_PAPER_OPTIM = replace(_CIFAR_OPTIM, batch=96, epochs=34, milestones=(21, 28, 32))


def _objects(
    teacher: str, student: str, data: Data = _CIFAR, optim: Optim = _CIFAR_OPTIM, **changes: object
) -> Config:
    base = Config(
        data=data,
        teacher=Teacher(name=teacher, head="softmax", optim=replace(optim, clip=0.0)),
        student=Network(name=student, head="softmax"),
        optim=optim,
        baselines=("alone", "kd"),
        evaluate_every=1,
        seed=5,  # the paper's
    )
    return replace(base, **changes)  # type: ignore[arg-type]


_TABLE1 = (
    ("wrn-40-2", "wrn-16-2"), ("wrn-40-2", "wrn-40-1"), ("resnet56", "resnet20"),
    ("resnet110", "resnet20"), ("resnet110", "resnet32"), ("resnet32x4", "resnet8x4"),
    ("vgg13", "vgg8"),
)  # fmt: skip
_TABLE2 = (
    ("ResNet18", "vgg8"), ("vgg11", "shufflenet-v1"), ("ResNet18", "shufflenet-v2"),
    ("wrn50-2", "shufflenet-v1"), ("wrn50-2", "vgg8"),
)  # fmt: skip
_SVHN = replace(_CIFAR, name="svhn", classes=10, lr=8, flip=False,
                mean=(0.4377, 0.4438, 0.4728), std=(0.1980, 0.2010, 0.1970))  # fmt: skip

# CASIA-WebFace 112 -> 16 by bilinear down-sampling. How the ResNet50 was trained is not printed: it
# gets the students' schedule, and arcface_torch's clipping.
_ARCFACE: dict[str, Any] = {"head": "arcface", "scale": 64.0, "margin": 0.5}
_LFW = Config(
    data=Data(name="recordio", hr=112, lr=16, kernel="bilinear", shift=0, development=0),
    teacher=Teacher(name="iresnet50", **_ARCFACE, optim=replace(_PAPER_OPTIM, clip=5.0)),
    student=Network(name="iresnet18", **_ARCFACE),
    optim=_PAPER_OPTIM,
    baselines=("alone", "kd"),
    evaluate_every=1,
    seed=5,
)
# Fine-tuning: native faces, whole, at the student's size at once. The paper gives no schedule.
_TINYFACE = replace(
    _LFW,
    data=Data(name="tinyface", hr=16, lr=16, shift=0, development=0),
    optim=Optim(lr=0.005, nesterov=False, batch=96, epochs=10, clip=1.0),
    alpha=0.0,
    beta=0.0,
    start="RUN",
)

_PROBED = replace(_CIFAR, test_sets=("stl10=FOLDER", "tinyimagenet=FOLDER"))
_DIGITS = Data(name="digits", hr=8, lr=4, flip=False, shift=1, shift_step=1, classes=10)
_DIGITS_OPTIM = Optim(lr=0.05, batch=50, epochs=30, clip=1.0)

_EMBEDDED = Config()
_ABLATION = replace(_EMBEDDED, baselines=("alone",), figure="curve")
_FIG3 = replace(_LFW, baselines=(), figure="curve")
_NEGATIVES = tuple(Variant(n=n) for n in (64, 128, 256, 512, 1024))
_TAUS = tuple(Variant(tau=t) for t in (0.02, 0.04, 0.06, 0.08, 0.1, 0.12, 0.15, 0.2, 0.3))


def _pairs(table: tuple[tuple[str, str], ...]) -> tuple[Variant, ...]:
    return tuple(Variant(teacher=t, student=s) for t, s in table)


_TABLE = {
    "embedded": ("procedural faces 64 -> 16, no download: the default", _EMBEDDED),
    "smoke": (
        "the embedded recipe in seconds, to see that everything runs",
        replace(
            _EMBEDDED,
            data=replace(_EMBEDDED.data, identities=20, instances=8, development=30, test=40),
            teacher=Teacher(identities=24, optim=Optim(epochs=2, batch=32)),
            optim=replace(_EMBEDDED.optim, epochs=2, batch=32),
            n=32,
            queue=128,
            evaluate_every=1,
        ),
    ),
    "matched": ("what compare.py holds equal in every paper: the embedded setting", _EMBEDDED),
    "digits": (
        "scikit-learn's handwritten digits 8 -> 4: small but real",
        _objects("resnet20", "resnet8", _DIGITS, _DIGITS_OPTIM, n=128, queue=1000, seed=0,
                 evaluate_every=5, baselines=("alone", "alone-long", "kd")),
    ),
    "table1": (
        "Table I: CIFAR-100, seven pairs of one architecture",
        _objects(*_TABLE1[0], vary=_pairs(_TABLE1)),
    ),
    "table2": (
        "Table II: CIFAR-100, five pairs of two architectures",
        _objects(*_TABLE2[0], vary=_pairs(_TABLE2)),
    ),
    "table3": (
        "Table III: SVHN, ResNet56 at 32 -> VGG8 at 8",
        _objects("resnet56", "vgg8", _SVHN),
    ),
    "table4": (
        "Table IV: CIFAR-100's students probed on STL10 and TinyImageNet",
        replace(
            _objects("wrn-40-2", "shufflenet-v1", _PROBED), optim=replace(_CIFAR_OPTIM, lr=_SHUFFLE)
        ),
    ),
    "table5": ("Table V: LFW at 16 px, ResNet50 at 112 -> ResNet18, CASIA-WebFace", _LFW),
    "table6": (
        "Table VI: the students of Table V on 180 people of UCCS",
        replace(_LFW, data=replace(_LFW.data, test_sets=("uccs=FOLDER",))),
    ),
    "table7": (
        "Table VII: the students of a run of table5 (--start) fine-tuned on TinyFace",
        _TINYFACE,
    ),
    "paper-schedule": (
        "Table I with the schedule the paper prints: batch 96, x.1 at 21, 28, 32, 34 epochs",
        _objects(*_TABLE1[0], _CIFAR, _PAPER_OPTIM, vary=_pairs(_TABLE1)),
    ),
    "fig3-negatives": (
        "Fig. 3 left: LFW over 64 to 1024 negatives",
        replace(_FIG3, vary=_NEGATIVES),
    ),
    "fig3-tau": (
        "Fig. 3 right: LFW over the temperature of the critic, .02 to .3",
        replace(_FIG3, vary=_TAUS),
    ),
    "fig4": (
        "Fig. 4: t-SNE of SVHN's digits, softmax alone against CRRCD",
        _objects("resnet56", "vgg8", _SVHN, baselines=("alone",), figure="tsne"),
    ),
    "fig5": (
        "Fig. 5: similarities of LFW's pairs, ArcFace alone against CRRCD",
        replace(_LFW, baselines=("alone",), figure="similarity"),
    ),
    "ablation-negatives": (
        "embedded: 64 to 1024 negatives (Fig. 3 left)",
        replace(_ABLATION, vary=_NEGATIVES),
    ),
    "ablation-tau": (
        "embedded: temperature of the critic, .02 to .3 (Fig. 3 right)",
        replace(_ABLATION, vary=_TAUS),
    ),
    "ablation-policy": (
        "embedded: negatives of other people against negatives of other images",
        replace(_ABLATION, vary=(Variant(policy="supervised"), Variant(policy="unsupervised"))),
    ),
    "ablation-dimension": (
        "embedded: size of the relation vectors, 32 to 512",
        replace(_ABLATION, vary=tuple(Variant(d=d) for d in (32, 64, 128, 256, 512))),
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
        changes = {k: getattr(v, k) for k in ("n", "tau", "d", "policy") if getattr(v, k)}
        one = replace(config, vary=(), **changes)
        if v.teacher is not None:
            one = replace(one, teacher=replace(one.teacher, name=v.teacher))
        if v.student is not None:
            one = replace(one, student=replace(one.student, name=v.student))
            if v.student.startswith("shufflenet"):
                one = replace(one, optim=replace(one.optim, lr=_SHUFFLE))
        runs.append(one)
    return runs


def arms(config: Config) -> dict[str, Config]:
    """The students of one run by name: the baselines, then the paper's."""
    kd = replace(config, beta=0.0)
    alone = replace(kd, alpha=0.0)
    longer = config.optim.longer(config.long)
    known = {
        "alone": alone,
        "alone-long": replace(alone, optim=longer),
        "kd": kd,
    }
    return {name: known[name] for name in config.baselines} | {"crrcd": config}

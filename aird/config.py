"""AIRD's configuration, and a recipe for every table and figure."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal

from shared.config import MATCHED, Data, Network, Optim, Run, Teacher

Students = tuple[Literal["alone", "alone-long", "iid", "rid", "aird"], ...]


@dataclass(frozen=True)
class Variant:
    """What one run of a table or figure changes; None: nothing."""

    lr: int | None = None
    head: Literal["arcface", "cosface", "magface"] | None = None
    students: Students | None = None
    n: int | None = None
    sampling: Literal["preselected", "random"] | None = None


@dataclass(frozen=True)
class Config(Run):
    """The paper's letters, and what it is silent on (see README.md)."""

    data: Data = field(default_factory=lambda: MATCHED["data"])
    teacher: Teacher = field(default_factory=lambda: MATCHED["teacher"])
    student: Network = field(default_factory=lambda: MATCHED["student"])
    optim: Optim = field(default_factory=lambda: MATCHED["optim"])
    alpha: float = 1.0
    """Weight of L_IID (Eq. 7)."""
    beta: float = 2.0
    """Weight of L_RID (Eq. 7)."""
    temperature: float = 4.0
    """Of L_IID's logits; its factor T^2 is inside the loss."""
    mode: Literal["paper", "dkd"] = "paper"
    """paper: Eq. 6, which is KL(teacher || student). dkd: its two parts, weighed apart."""
    target: float = 1.0
    """dkd: weight of the target part."""
    non_target: float = 8.0
    """dkd: weight of the non-target part."""
    warm_epochs: int = 20
    """dkd: epochs over which L_IID's weight rises linearly."""
    tau: float = 0.1
    """Temperature of the critic h of Eq. 4."""
    normaliser: Literal["paper", "crd", "crd-ema"] = "crd"
    """Z of the critic: 1, CRD's constant, or its running average. With 1 relations die (README)."""
    n: int = 512
    """Negatives of each sample."""
    d: int = 128
    """Size of a relation vector."""
    sampling: Literal["preselected", "random"] = "preselected"
    """preselected: hard pairs, chosen offline from one teacher pass, and P x K batches. random:
    shuffled batches, any partner, any negatives of other people (Fig. 6)."""
    images_per_class: int = 4
    """K of the P x K batches; P is the batch divided by it."""
    pool: int = 4096
    """Training images that negatives are chosen from, drawn once."""
    gamma: float = 0.1
    """FaceBN: share of the statistics so far (Eq. 9); 1 leaves batch norm as it was trained."""
    students: Students = ("alone", "alone-long", "iid", "rid", "aird")
    """Rows of the table: L_cls only (also longer), with L_IID (which is plain KD), L_RID, both."""
    long: float = 2.0
    """Epochs of alone-long, as a multiple."""
    lr_hr: bool = True
    """Also score LR probes against faces enrolled at HR."""
    figure: Literal["", "curve", "similarity", "tsne", "means"] = ""
    """Drawn after the run, or after the last of a recipe's runs."""
    vary: tuple[Variant, ...] = ()
    """The runs of a table or figure, one after the other; --only K takes the K-th."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.n, self.d, self.pool) < 1 or min(self.tau, self.temperature) <= 0:
            raise ValueError(
                f"--n {self.n}, --d {self.d}, --pool {self.pool} must be 1 or more, and "
                f"--tau {self.tau}, --temperature {self.temperature} above 0"
            )
        if not 0 <= self.gamma <= 1:
            raise ValueError(f"--gamma {self.gamma}: must lie between 0 and 1")
        if not self.students or len(set(self.students)) < len(self.students):
            raise ValueError(f"--students {' '.join(self.students)}: name each once, at least one")
        if self.images_per_class < 2:
            raise ValueError("--images-per-class must be 2 or more: a pair has two images")
        if self.sampling == "preselected" and self.optim.batch % self.images_per_class:
            raise ValueError(
                f"--optim.batch {self.optim.batch} is no multiple of --images-per-class "
                f"{self.images_per_class}"
            )
        if self.n > self.pool:
            raise ValueError(f"--n {self.n} negatives cannot come from --pool {self.pool} images")
        weights = ("alpha", "beta", "target", "non_target", "warm_epochs")
        if bad := [name for name in weights if getattr(self, name) < 0]:
            flag = bad[0].replace("_", "-")
            raise ValueError(f"--{flag} {getattr(self, bad[0])}: must be 0 or more")
        if self.long <= 0:
            raise ValueError(f"--long {self.long}: must be above 0")


_EMBEDDED = Config()
_SHORT = replace(_EMBEDDED, students=("alone", "aird"), lr_hr=False)

# CASIA-WebFace 112 -> 16. The teacher is given by --teacher.checkpoint, or trained here.
_ARCFACE: dict[str, Any] = {"head": "arcface", "scale": 64.0, "margin": 0.5}
_MARGINS = {"arcface": 0.5, "cosface": 0.4, "magface": 0.45}
_PAPER_OPTIM = Optim(
    lr=0.05, nesterov=False, batch=96, epochs=34, schedule="step", warmup=0.0,
    milestones=(21, 28, 32), clip=5.0,
)  # fmt: skip
_FACES = Config(
    data=Data(name="recordio", hr=112, lr=16, kernel="bicubic", shift=0, development=0),
    teacher=Teacher(name="iresnet50", **_ARCFACE, optim=_PAPER_OPTIM),
    student=Network(name="iresnet18", **_ARCFACE),
    optim=_PAPER_OPTIM,
    students=("alone", "aird"),
    evaluate_every=1,
)
_UCCS = replace(_FACES.data, test_sets=("uccs=FOLDER",))


def _table1() -> tuple[Variant, ...]:
    """The paper's students, and model_I (the teacher on LR) and model_II (alone) of three heads."""
    own = [Variant(lr=lr) for lr in (16, 32, 64)]
    alone: Students = ("alone",)
    heads: tuple[Literal["cosface", "magface"], ...] = ("cosface", "magface")
    return (*own, *(Variant(lr=r, head=h, students=alone) for h in heads for r in (16, 32, 64)))


_NEGATIVES = tuple(Variant(n=n) for n in (64, 128, 256, 512, 1024))
_POLICIES = (Variant(sampling="preselected"), Variant(sampling="random"))
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
            evaluate_every=1,
        ),
    ),
    "matched": ("what compare.py holds equal in every paper: the embedded setting", _EMBEDDED),
    "table1": (
        "Table I: LFW, LR-LR and LR-HR at 16, 32, 64; ArcFace, CosFace, MagFace beside",
        replace(_FACES, vary=_table1()),
    ),
    "table2": ("Table II: LFW, LR-LR and LR-HR at 16", _FACES),
    "table3": ("Table III: AgeDB-30, LR-LR and LR-HR at 16 (agedb_30.bin in the pack)", _FACES),
    "table4": (
        "Table IV: UCCS, 180 people at 16; --data.test-sets uccs=FOLDER",
        replace(_FACES, data=_UCCS, lr_hr=False),
    ),
    "table5": (
        "Table V: what each component adds, LFW and AgeDB-30",
        replace(_FACES, students=("alone", "iid", "rid", "aird"), lr_hr=False),
    ),
    "fig3": (
        "Fig. 3: similarities of LFW's pairs, LR-LR and LR-HR",
        replace(_FACES, figure="similarity"),
    ),
    "fig4": (
        "Fig. 4: t-SNE of 100 people of UCCS, four models; --data.test-sets uccs=FOLDER",
        replace(_FACES, data=_UCCS, students=("alone", "iid", "aird"), lr_hr=False, figure="tsne"),
    ),
    "fig5": (
        "Fig. 5: feature means of LFW against the training faces, before and after FaceBN",
        replace(_FACES, students=("aird",), lr_hr=False, figure="means"),
    ),
    "fig6-sampling": (
        "Fig. 6 left: pairs selected offline against random ones",
        replace(_FACES, vary=_POLICIES, lr_hr=False, figure="curve"),
    ),
    "fig6-negatives": (
        "Fig. 6 right: 64 to 1024 negatives",
        replace(_FACES, vary=_NEGATIVES, lr_hr=False, figure="curve"),
    ),
    "ablation-sampling": (
        "embedded: pairs selected offline against random ones",
        replace(_SHORT, vary=_POLICIES, figure="curve"),
    ),
    "ablation-negatives": (
        "embedded: 64 to 1024 negatives",
        replace(_SHORT, vary=_NEGATIVES, figure="curve"),
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
        changes = {k: getattr(v, k) for k in ("n", "sampling", "students") if getattr(v, k)}
        one = replace(config, vary=(), **changes)
        if v.lr is not None:
            one = replace(one, data=replace(one.data, lr=v.lr))
        if v.head is not None:
            net: dict[str, Any] = {"head": v.head, "margin": _MARGINS[v.head]}
            one = replace(
                one, teacher=replace(one.teacher, **net), student=replace(one.student, **net)
            )
        runs.append(one)
    return runs


def arms(config: Config) -> dict[str, Config]:
    """The students of one run by name, each with the weights and length it is trained with."""
    alone = replace(config, alpha=0.0, beta=0.0)
    longer = config.optim.longer(config.long)
    known = {
        "alone": alone,
        "alone-long": replace(alone, optim=longer),
        "iid": replace(config, beta=0.0),
        "rid": replace(config, alpha=0.0),
        "aird": config,
    }
    return {name: known[name] for name in config.students}

"""BTNet's configuration, and a recipe for every table and figure."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal

from shared.config import MATCHED, Data, Network, Optim, Run, Teacher
from shared.models.recogniser import HEADS

NAME = "btnet"
Mixed = Literal["mr", "mr-v2", "mr-v3"]
TRUNKS: tuple[Mixed, ...] = ("mr", "mr-v2", "mr-v3")  # trained on images of mixed resolution
BRANCHES = ("pretrain", "bct", "fixed", "bt")  # Table 3, each with one thing more; bt: the paper's
ROWS = ("hr", "mm", *TRUNKS, *BRANCHES)
Both = Literal["paper", "official"]


@dataclass(frozen=True)
class Variant:
    """What one run of a table or figure changes; None: nothing."""

    influence: str | None = None
    influence_margin: float | None = None
    end: str | None = None


@dataclass(frozen=True)
class Config(Run):
    """The paper's letters, and what it is silent on (see README.md)."""

    data: Data = field(
        default_factory=lambda: Data(hr=48, lr=12, kernel="bilinear", identities=200)
    )
    """lr: the resolution of the report's figures."""
    teacher: Teacher = field(
        default_factory=lambda: Teacher(
            name="small-iresnet", identities=200, optim=Optim(epochs=12, clip=5.0)
        )
    )
    """The row hr: phi_hr, trained on HR images."""
    student: Network = field(default_factory=lambda: Network(name="small-iresnet"))
    """The network of trunk and branches, and the trunk's head."""
    optim: Optim = field(default_factory=lambda: Optim(epochs=12, clip=5.0))
    """Of phi_mm."""
    trunk_optim: Optim = field(default_factory=lambda: Optim(epochs=28, clip=5.0))
    """Of the trunk, which shares its epochs among its sizes."""
    branch_optim: Optim = field(default_factory=lambda: Optim(epochs=10, clip=5.0))
    """Of whatever starts from the trunk."""
    resolutions: tuple[int, ...] = (6, 12, 24, 48)
    """Ascending; the last is --data.hr, which the trunk itself takes."""
    trunk: Mixed = "mr"
    """Which trunk the branches belong to."""
    sizes: int = 4
    """What the trunk's images are brought down to: --data.hr, half of it, ..., so many."""
    trunk_run: str = ""
    """Folder of a run whose trunk is taken, not trained again; data and network must be its."""
    start_run: str = ""
    """Folder of a run whose trunk and branches are gone on from, with other data (Table 2)."""
    influence: Literal["trunk", "curricularface", "cosface", "arcface"] = "trunk"
    """The branches' loss on the trunk's classifier (Eq. 1); trunk: its own head."""
    influence_margin: float = 0.0
    """Of that loss; 0: the trunk's."""
    lambda_branch: float = 10.0
    """Weight of branch distillation (Eq. 3); .5 in the paper and its tables."""
    branch_mse: Both = "official"
    """Eq. 2. paper: divided by the images of the batch; official: by all elements of the map."""
    embedding_mse: Both = "paper"
    """official: the code's MSE between the raw embeddings of branch and trunk besides, which the
    paper does not mention."""
    bn: Both = "paper"
    """Which batch norms are stored for each resolution. paper: all; official: behind the branch not
    weights and biases of shortcuts' and of the embedding's, which the code's search for names
    misses."""
    end: str = ""
    """Part that a branch ends with, such as stage2.1, or head (the whole network, Fig. 7); empty:
    the first at which the trunk has the branch's resolution."""
    indicator: Literal["max", "min", "avg"] = "max"
    """Of the router: which side of an image is compared with the resolutions."""
    rounding: Literal["ceil", "near", "floor"] = "ceil"
    """Of the router."""
    students: tuple[str, ...] = ("hr", "mm", "mr", "bt")
    """Rows of the table. hr, mm (a network for each resolution), mr, mr-v2, mr-v3; from the trunk:
    pretrain, bct (its classifier fixed), fixed (all but branches and batch norms fixed), bt (with
    branch distillation). None: nothing is trained, the figure is drawn."""
    figure: Literal["", "error", "storage", "cost", "ends"] = ""
    """Drawn after the run, or after the last of a recipe's runs."""
    vary: tuple[Variant, ...] = ()
    """The runs of a table or figure, one after the other; --only K takes the K-th."""

    def __post_init__(self) -> None:
        super().__post_init__()
        r = self.resolutions
        if len(r) < 2 or list(r) != sorted(set(r)) or r[0] < 1 or r[-1] != self.data.hr:
            raise ValueError(
                f"--resolutions {' '.join(map(str, r))}: give two or more, ascending, the last "
                f"--data.hr {self.data.hr}"
            )
        if self.students and self.data.lr not in r[:-1]:
            raise ValueError(
                f"--data.lr {self.data.lr}: must be one of --resolutions below --data.hr"
            )
        if len(set(self.students)) < len(self.students) or set(self.students) - set(ROWS):
            raise ValueError(
                f"--students {' '.join(self.students)}: each once, of {', '.join(ROWS)}"
            )
        if not self.students and self.figure in ("", "ends"):
            raise ValueError("--students: name at least one")
        if self.student.head not in HEADS:
            raise ValueError(
                f"--student.head {self.student.head}: BTNet's classifier is one of "
                f"{', '.join(HEADS)}"
            )
        if self.data.quality != "small":
            raise ValueError(f"--data.quality {self.data.quality}: a branch takes small images")
        if self.data.degradation != "plain":
            raise ValueError(
                f"--data.degradation {self.data.degradation}: the trunk's images are only resized"
            )
        for name in ("lambda_branch", "influence_margin"):
            if getattr(self, name) < 0:
                flag = name.replace("_", "-")
                raise ValueError(f"--{flag} {getattr(self, name)}: must be 0 or more")
        if self.trunk_run and self.start_run:
            raise ValueError("--trunk-run and --start-run: take one of the two")


@dataclass(frozen=True)
class Arm:
    """One network of a run as it is trained."""

    row: str
    resolution: int
    optim: Optim
    from_trunk: bool = False  # else from random numbers
    fixed_classifier: bool = False  # Eq. 1: kappa*
    end: str = "head"  # what is its own ends with this part (and batch norms after it)
    lambda_branch: float = 0.0
    mixed: Mixed | None = None  # of a trunk: how its images' sizes are drawn


def arms(config: Config) -> dict[str, Arm]:
    """The networks of one run by name, in order: the trunk before what starts from it. phi_hr is
    the teacher and none of them."""
    s, rows = config.data.hr, list(config.students)
    if set(rows) & set(BRANCHES) and config.trunk not in rows:
        rows.insert(0, config.trunk)  # trained, and left out of the table
    found: dict[str, Arm] = {
        row: Arm(row, s, config.trunk_optim, mixed=row) for row in TRUNKS if row in rows
    }
    smaller = config.resolutions[:-1]
    for row in rows:
        if row not in ("mm", *BRANCHES):
            continue
        k = BRANCHES.index(row) if row in BRANCHES else -1
        arm = Arm(
            row, s, config.optim if row == "mm" else config.branch_optim,
            from_trunk=k >= 0, fixed_classifier=k >= 1, end=config.end if k >= 2 else "head",
            lambda_branch=config.lambda_branch if k >= 3 else 0.0,
        )  # fmt: skip
        found |= {f"{row}-{r}": replace(arm, resolution=r) for r in smaller}
    return found


_EMBEDDED = Config()

# MS1MV3 at 112 px. The paper gives no schedule; this one is that of its code.
_FACE: dict[str, Any] = {
    "name": "iresnet50", "head": "curricularface", "scale": 64.0, "margin": 0.5
}  # fmt: skip
_FACES_OPTIM = Optim(
    lr=0.2, nesterov=False, batch=512, epochs=25, schedule="poly", power=2.0, warmup=2 / 25,
    clip=5.0,
)  # fmt: skip
_BRANCH_OPTIM = replace(_FACES_OPTIM, lr=0.02, epochs=10, warmup=0.0)
_FACES = Config(
    data=Data(name="recordio", hr=112, lr=14, kernel="bilinear", shift=0, development=0),
    teacher=Teacher(**_FACE, optim=_FACES_OPTIM),
    student=Network(**_FACE),
    optim=_FACES_OPTIM,
    trunk_optim=_FACES_OPTIM,
    branch_optim=_BRANCH_OPTIM,
    lambda_branch=0.5,
    resolutions=(7, 14, 28, 112),
    sizes=5,
    evaluate_every=1,
)
_AT_14 = replace(_FACES, resolutions=(14, 112))
_SURVFACE = replace(
    _FACES,
    data=replace(_FACES.data, name="survface"),
    teacher=replace(_FACES.teacher, optim=_BRANCH_OPTIM),
    trunk_optim=_BRANCH_OPTIM,
    students=("mr", "bt"),
)
_TABLE4 = (
    Variant(influence="cosface", influence_margin=0.4),
    Variant(influence="arcface"),
    Variant(influence="curricularface"),
)
# Fig. 7 at r = 14: stage 1, the first unit of stage 2, stage 2, ... (btnet.figures.ENDS)
_FIG7 = tuple(
    Variant(end=e)
    for e in ("stage1.3", "stage2.1", "stage2.4", "stage3.1", "stage3.14", "stage4.1", "stage4.3",
              "head")
)  # fmt: skip
_COUNTED = replace(_FACES, students=(), resolutions=(7, 14, 28, 56, 112), figure="storage")

# What compare.py holds equal in every paper: one low resolution, where mm is the student alone.
_MATCHED = replace(
    _EMBEDDED,
    **{k: MATCHED[k] for k in ("teacher", "optim")},
    data=replace(MATCHED["data"], kernel="bilinear"),
    student=Network(name="small-teacher"),
    trunk_optim=MATCHED["optim"].longer(2),
    branch_optim=MATCHED["optim"],
    sizes=3,  # 64, 32, 16
    resolutions=(MATCHED["data"].lr, MATCHED["data"].hr),
)
_ABLATION = replace(_EMBEDDED, resolutions=(12, 48), students=("mr", "mm", *BRANCHES))

_TABLE = {
    "embedded": (
        "procedural faces of 48 px, branches for 24, 12, 6, no download: the default",
        _EMBEDDED,
    ),
    "smoke": (
        "the embedded recipe in seconds, to see that everything runs",
        replace(
            _EMBEDDED,
            data=replace(_EMBEDDED.data, identities=20, instances=8, development=30, test=40),
            teacher=replace(
                _EMBEDDED.teacher, identities=20, optim=Optim(epochs=2, batch=32, clip=5.0)
            ),
            optim=replace(_EMBEDDED.optim, epochs=2, batch=32),
            trunk_optim=replace(_EMBEDDED.trunk_optim, epochs=3, batch=32),
            branch_optim=replace(_EMBEDDED.branch_optim, epochs=2, batch=32),
            evaluate_every=1,
        ),
    ),
    "matched": ("as compare.py holds it in every paper: 64 and 16 px, small-teacher", _MATCHED),
    "table1": (
        "Table 1: MS1MV3, six benchmarks, cross- and same-resolution",
        replace(_FACES, students=("hr", "mm", *TRUNKS, "bt")),
    ),
    "table2": (
        "Table 2: QMUL-SurvFace, fine-tuned, nine routing strategies; --start-run RUN (table1)",
        _SURVFACE,
    ),
    "table3": (
        "Table 3: training at 14, a thing more in each row; --trunk-run RUN saves the trunk",
        replace(_AT_14, students=("mm", *BRANCHES)),
    ),
    "table4": (
        "Table 4: three influence losses at 14",
        replace(_AT_14, students=("bt",), vary=_TABLE4),
    ),
    "fig1": (
        "Fig. 1: interpolation error, on procedural faces of 112 px or --data.name, --data.root",
        replace(
            _COUNTED,
            data=Data(hr=112, lr=14, kernel="bilinear", identities=100, instances=1, shift=0,
                      development=0, test=20),
            figure="error",
        ),
    ),
    "fig5": ("Fig. 5: parameters stored for each resolution", _COUNTED),
    "fig6": ("Fig. 6: MACs at each resolution", replace(_COUNTED, figure="cost")),
    "fig7": (
        "Fig. 7: where the branch for 14 ends",
        replace(_AT_14, students=("bt",), vary=_FIG7, figure="ends"),
    ),
    "ablation-training": ("embedded: Table 3 at 12 px", _ABLATION),
    "ablation-influence": (
        "embedded: Table 4 at 12 px",
        replace(
            _ABLATION,
            students=("bt",),
            vary=tuple(replace(v, influence_margin=0.2) for v in _TABLE4),
        ),
    ),
    "ablation-ends": (
        "embedded: Fig. 7 at 12 px",
        replace(
            _ABLATION,
            students=("bt",),
            vary=tuple(Variant(end=e) for e in ("stage1.1", "stage2.1", "stage3.1", "stage4.1",
                                                "head")),
            figure="ends",
        ),
    ),
}  # fmt: skip
RECIPES: dict[str, Config] = {
    name: replace(config, recipe=name) for name, (_, config) in _TABLE.items()
}
ABOUT: dict[str, str] = {name: about for name, (about, _) in _TABLE.items()}


def members(config: Config) -> list[Config]:
    """The runs of a recipe: one, or as many as its table or figure has."""
    fields = ("influence", "influence_margin", "end")
    return [
        replace(config, vary=(), **{k: getattr(v, k) for k in fields if getattr(v, k) is not None})
        for v in config.vary
    ] or [config]

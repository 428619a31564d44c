"""Every paper and every baseline from the same teachers, data, student and budget, in one table.

    python compare.py                               # matched: 10 seeds, hours, in stages
    python compare.py --recipe smoke                # minutes, to see that everything runs
    python compare.py --papers crrcd horkd --baselines kd rkd --seeds 3 --resolution 8 16
    python compare.py --recipe paper --root DIR     # CIFAR-100, the first pair of CRRCD's Table I
    python compare.py --report-only                 # the page again, from what is finished

Ends in the table, and in report.html, comparison.md and comparison.json in the comparison's folder.
Each student is a run of its own paper's train.py, in a subprocess: one that fails is named with its
reason, the rest stand, and the same command goes on where an interrupted one stopped.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

import aird.train
import baselines.train
import btnet.train
import crrcd.train
import embedkd.train
import horkd.train
from baselines.config import WEIGHTS
from shared import cli
from shared.comparison import page, statistics
from shared.comparison.jobs import Job, run_jobs
from shared.comparison.statistics import Claim, Row
from shared.config import ROOT, SCHEMA, locate
from shared.figures import read_record
from shared.files import write_text
from shared.models.recogniser import Recogniser
from shared.run import choose_device, faster_precision

MULTIPLIERS = (1.0, 1 / 3, 3.0)  # of a method's distillation weights; 1 is the default
TUNING_SEEDS = (1000, 1001)  # none of the table's
TUNING_PEOPLE = 20  # test identities of a trial, which nobody reads: a trial sees development only
TIMED_EPOCHS = 3
SHARED = ("data", "teacher", "student", "optim")  # fields that every row has from one place
PAPERS: dict[str, Any] = {
    "horkd": horkd.train, "crrcd": crrcd.train, "aird": aird.train, "btnet": btnet.train,
    "embedkd": embedkd.train,
}  # fmt: skip
OTHER_NETWORK = "one network takes every resolution, so it is the teacher's, not the student's"


@dataclass(frozen=True)
class Part:
    """What one subprocess trains: changes to the paper's recipe, and how its time is measured."""

    paper: Any  # its train module
    changes: dict[str, Any]
    tuned: tuple[str, ...] = ()  # fields that a trial multiplies
    only: dict[str, Any] = field(default_factory=dict)  # of a trial: without rows nobody chooses by
    floor: dict[str, Any] = field(default_factory=dict)  # of the timing run: the student alone too
    cost: float = 1.0  # of a student with its outputs kept


# Of baselines that take longer than KD: none scores the teacher too, a teacher's maps are not kept.
COSTS = {"none": 1.6, "fitnet": 2.4, "at": 2.8, "sp": 2.6, "vid": 3.0, "crcd": 1.6}
PARTS: dict[str, Part] = {
    name: Part(
        baselines.train, {"students": (name,)}, () if name == "none" else ("scale",),
        floor={"students": ("none", name) if name != "none" else ("none",)},
        cost=COSTS.get(name, 1.1),
    )
    for name in WEIGHTS
} | {
    "crrcd": Part(
        crrcd.train, {"baselines": ()}, ("alpha", "beta"), floor={"baselines": ("alone",)}, cost=3.4
    ),
    "crrcd-kd": Part(
        crrcd.train, {"baselines": (), "beta": 0.0}, floor={"baselines": ("alone",)}, cost=1.2
    ),
    "crrcd-rcd": Part(
        crrcd.train, {"baselines": (), "alpha": 0.0}, floor={"baselines": ("alone",)}, cost=3.2
    ),
    "aird": Part(
        aird.train, {"students": ("aird",), "lr_hr": False}, ("alpha", "beta"),
        floor={"students": ("alone", "aird")}, cost=1.6,
    ),
    "aird-random": Part(
        aird.train, {"students": ("aird",), "lr_hr": False, "sampling": "random"},
        floor={"students": ("alone", "aird")}, cost=1.6,
    ),
    "horkd": Part(
        horkd.train, {"students": ("horkd", "L2+L3+LC")}, ("l1", "alpha", "beta", "gamma"),
        only={"students": ("horkd",)}, floor={"students": ("alone", "horkd", "L2+L3+LC")}, cost=4.4,
    ),
    "horkd-direct": Part(
        horkd.train, {"students": ("horkd",), "stages": "direct"},
        floor={"students": ("alone", "horkd")}, cost=1.2,
    ),
    "embedkd-abs": Part(
        embedkd.train, {"students": ("abs",)}, ("lambda_abs",), floor={"students": ("alone", "abs")}
    ),
    "embedkd-rel": Part(
        embedkd.train, {"students": ("rel",)}, ("lambda_rel",), floor={"students": ("alone", "rel")}
    ),
    "embedkd-rel-at": Part(
        embedkd.train, {"students": ("rel+at",)}, floor={"students": ("alone", "rel+at")}, cost=2.0
    ),
    "btnet": Part(
        btnet.train, {"students": ("mm", "mr", "pretrain", "bct", "fixed", "bt")},
        ("lambda_branch",), only={"students": ("mr", "bt")}, cost=20.0,
    ),
}  # fmt: skip

SOURCES = {
    "none": "the student alone", "cosine": "1 - cosine of the embeddings; ours",
    "kd": "Hinton et al. 2015", "fitnet": "Romero et al. 2015",
    "at": "Zagoruyko & Komodakis 2017", "pkt": "Passalis & Tefas 2018", "sp": "Tung & Mori 2019",
    "rkd": "Park et al. 2019", "cc": "Peng et al. 2019", "vid": "Ahn et al. 2019",
    "crd": "Tian et al. 2020", "crcd": "Zhu et al. 2021", "dkd": "Zhao et al. 2022",
    "adadistill": "Boutros et al. 2024",
}  # fmt: skip
SOURCES_OF_PAPERS = {
    "crrcd": "Zhang et al. 2024", "aird": "Shi et al. 2024", "horkd": "Ge et al. 2020",
    "embedkd": "Yu et al. 2019", "btnet": "He et al. 2022",
}  # fmt: skip
NOTES = {  # what a reader of a row's numbers must know
    "adadistill": "no task loss beside it: a multiple of its weight is one of the learning rate",
    "dkd": "its warm-up of 20 epochs is most of the training here",
    "horkd": "at the paper's weights every step's gradient is clipped, to a norm of 5: a common "
             "multiple of them changes how much the task loss counts, not the length of a step",
    "embedkd: rel": "its default weight was chosen here before, on objects",
    "embedkd: abs": "its default weight was chosen here before, on objects",
    "btnet": "its trunk trains for twice a student's epochs on images of every size, then its "
             "branch for a student's epochs; its default weight was chosen here before, on "
             "development people",
}  # fmt: skip
TITLES = {
    "none": "student alone", "cosine": "cosine", "kd": "KD", "fitnet": "FitNet", "at": "AT",
    "pkt": "PKT", "sp": "SP", "rkd": "RKD", "cc": "CC", "vid": "VID", "crd": "CRD", "crcd": "CRCD",
    "dkd": "DKD", "adadistill": "AdaDistill",
}  # fmt: skip

# Table I of CRRCD (CIFAR-100, top-1), its seven pairs in order; None: not printed. The ranking that
# ours is compared with is that of the mean gains over the student alone.
TABLE1: dict[str, tuple[float | None, ...]] = {
    "none": (73.26, 71.98, 69.06, 69.06, 71.14, 72.50, 70.36),
    "kd": (74.92, 73.54, 70.66, 70.67, 73.08, 73.33, 72.98),
    "fitnet": (73.58, 72.24, 69.21, 68.99, 71.06, 73.50, 71.02),
    "at": (74.08, 72.77, 70.55, 70.22, 72.31, 73.44, 71.43),
    "pkt": (74.54, 73.45, 70.34, 70.25, 72.61, 73.64, 72.88),
    "sp": (73.83, 72.43, 69.67, 70.04, 72.69, 72.94, 72.68),
    "rkd": (73.35, 72.22, 69.61, 69.25, 71.82, 71.90, 71.48),
    "cc": (73.56, 72.21, 69.63, 69.48, 71.48, 72.97, 70.71),
    "vid": (74.11, 73.30, 70.38, 70.16, 72.61, 73.09, 71.23),
    "crd": (75.48, 74.14, 71.16, 71.46, 73.48, 75.51, 73.94),
    "crcd": (76.37, 73.84, 70.89, 70.98, 73.32, 73.50, 73.89),
    "dkd": (76.24, 74.81, 71.97, None, 74.11, 76.32, 74.68),
    "crrcd": (76.43, 74.83, 72.10, 71.92, 74.05, 75.14, 74.04),
}


PUBLISHED_ORDER = "CIFAR-100, Table I of CRRCD (its CRD is without KD)"


def published_gain(method: str) -> float:
    """Mean gain of TABLE1 over the student alone, in points, over the pairs that are printed."""
    both = zip(TABLE1[method], TABLE1["none"], strict=True)
    return fmean(ours - alone for ours, alone in both if ours is not None and alone is not None)


def rows(hr: int, columns: Mapping[str, str]) -> list[Row]:
    """Every row of the table, in order. hr: side of the teacher's images in px. columns: name in
    our table -> column of a run's results."""
    plain = {ours: ("results", theirs) for ours, theirs in columns.items()}

    def row(name: str, title: str, paper: str, group: Any, job: str, arm: str, **more: Any) -> Row:
        given = {"tables": plain, "phases": (arm,), "floor": "alone", "against": "none",
                 "source": SOURCES_OF_PAPERS.get(paper, ""), "note": NOTES.get(name, "")} | more
        gain = published_gain(name) if name in TABLE1 and name != "none" else None
        return Row(name=name, title=title, group=group, job=job, arm=arm, paper=paper,
                   published=gain, **given)  # fmt: skip

    def crossed(kind: str) -> dict[str, tuple[str, str]]:
        return {"rank1": ("results-rank1", kind), "verification": ("results", kind)}

    found = [
        row(name, name, "baselines", "teacher", "none", name, phases=(), source="")
        for name in ("teacher, HR", "teacher, LR")
    ]
    found += [
        row(name, TITLES[name], "baselines", "baseline", name, name, source=SOURCES[name],
            floor="none", tuned=bool(PARTS[name].tuned))
        for name in WEIGHTS
    ]  # fmt: skip
    shifted = {column: ("results-shifted", name) for column, (_, name) in plain.items()}
    staged = ("assistant",)
    found += [
        row("crrcd", "CRRCD", "crrcd", "paper", "crrcd", "crrcd", tuned=True),
        row("crrcd: kd", "CRRCD without relations", "crrcd", "component", "crrcd-kd", "crrcd"),
        row("crrcd: rcd", "CRRCD's relations alone", "crrcd", "component", "crrcd-rcd", "crrcd"),
        row("aird", "AIRD", "aird", "paper", "aird", "aird", tuned=True),
        row("aird + FaceBN", "AIRD, FaceBN", "aird", "component", "aird", "aird + FaceBN",
            phases=("aird",)),
        row("aird: random pairs", "AIRD, random pairs", "aird", "component", "aird-random", "aird"),
        row("horkd", "HORKD", "horkd", "paper", "horkd", "horkd", tuned=True,
            phases=(*staged, "horkd")),
        row("horkd: L2+L3+LC", "HORKD without L1", "horkd", "component", "horkd", "L2+L3+LC",
            phases=(*staged, "L2+L3+LC")),
        row("horkd: direct", "HORKD, no assistant", "horkd", "component", "horkd-direct", "horkd"),
        row("embedkd: rel", "EmbedKD, relative", "embedkd", "paper", "embedkd-rel", "rel",
            tuned=True),
        row("embedkd: abs", "EmbedKD, absolute", "embedkd", "paper", "embedkd-abs", "abs",
            tuned=True),
        row("embedkd: rel+at", "EmbedKD, relative, attention", "embedkd", "component",
            "embedkd-rel-at", "rel+at"),
        row("aird, shifted", "AIRD", "aird", "shifted", "aird", "aird", tables=shifted,
            against="aird, shifted"),
        row("aird + FaceBN, shifted", "AIRD, FaceBN", "aird", "shifted", "aird", "aird + FaceBN",
            tables=shifted, phases=("aird",), against="aird, shifted"),
    ]  # fmt: skip
    trunk = ("mr",)
    for arm, title, phases in (
        ("bt", "BTNet", (*trunk, "bt-{lr}")), ("mm", "BTNet's network alone", ("mm-{lr}",)),
        ("mr", "BTNet's trunk, enlarging", trunk),
        ("pretrain", "BTNet, pretrained branch", (*trunk, "pretrain-{lr}")),
        ("bct", "BTNet, and BCT", (*trunk, "bct-{lr}")),
        ("fixed", "BTNet, and fixed trunk", (*trunk, "fixed-{lr}")),
    ):  # fmt: skip
        own = arm == "bt"
        name = "btnet" if own else f"btnet: {arm}"
        common: dict[str, Any] = {
            "phases": phases, "floor": "mm-{lr}", "exempt": {"student.name": OTHER_NETWORK},
        }  # fmt: skip
        against = "none" if arm == "mm" else "btnet: mm"
        found.append(row(name, title, "btnet", "network", "btnet", arm,
                         tables=crossed("{lr}&{lr}"), against=against, tuned=own,
                         **common))  # fmt: skip
        found.append(row(f"{name}, HR gallery", title, "btnet", "crossed", "btnet", arm,
                         tables=crossed(f"{hr}&{{lr}}"), against="btnet: mm, HR gallery",
                         **common))  # fmt: skip
    return found


def claims(lr: int, column: str) -> list[Claim]:
    """What the papers claim and this comparison can test; lr, column: by what, where no other."""

    def claim(text: str, paper: str, better: str, worse: str, note: str = "", kind: str = "greater",
              at: int = lr) -> Claim:  # fmt: skip
        return Claim(text=text, source=paper, rows=(better, worse), resolution=str(at),
                     column=column, kind=kind, note=note)  # type: ignore[arg-type]  # fmt: skip

    enlarging = "branches beat enlarging at {} px, 1/{} of HR"
    same, cross = "LR against LR", "LR against HR"
    return [
        claim("relations help beyond KD", "CRRCD", "crrcd", "crrcd: kd"),
        claim("contrastive relations help more than low-order ones", "CRRCD", "crrcd: rcd", "rkd",
              "neither with KD"),
        claim("the assistant helps", "HORKD", "horkd", "horkd: direct"),
        claim("leaving L1 out helps", "HORKD", "horkd: L2+L3+LC", "horkd"),
        claim("relative beats absolute", "EmbedKD", "embedkd: rel", "embedkd: abs"),
        claim("attention adds little", "EmbedKD", "embedkd: rel+at", "embedkd: rel", kind="close"),
        claim("hard pairs beat random ones", "AIRD", "aird", "aird: random pairs",
              "batches of people against shuffled ones"),
        claim("FaceBN helps under shift", "AIRD", "aird + FaceBN, shifted", "aird, shifted"),
        claim(enlarging.format(4, 16), "BTNet", "btnet", "btnet: mr",
              "as 7 of 112 px; a branch is trained after its trunk, for half as long", at=4),
        claim(enlarging.format(8, 8), "BTNet", "btnet", "btnet: mr",
              "as 14 of 112 px; likewise", at=8),
        claim("BCT helps", "BTNet", "btnet: bct, HR gallery", "btnet: pretrain, HR gallery", cross),
        claim("branch distillation helps", "BTNet", "btnet", "btnet: fixed", same),
        claim("branch distillation helps", "BTNet", "btnet, HR gallery", "btnet: fixed, HR gallery",
              cross),
    ]  # fmt: skip


@dataclass(frozen=True)
class Published:
    """A number that a paper prints, and the recipe here that would give ours."""

    paper: str
    recipe: str
    what: str
    published: str
    why: str
    today: str = ""
    column: str = "verification"
    arm: str = ""
    """Where a run has it; empty: it is of several runs or tables."""
    ours: str = ""
    """A count, which no run is needed for."""


_FACES, _LIKEWISE = "not run: needs CASIA-WebFace and a GPU", "not run: likewise"
_SETS = "not run: needs the data set and a GPU"
PUBLISHED = (
    Published("CRRCD", "table1", "CIFAR-100, seven pairs, mean (Table I)", "74.07", _SETS),
    Published("CRRCD", "table3", "SVHN 8x8 (Table III)", "89.33", _SETS, "", "top1", "crrcd"),
    Published("CRRCD", "table4", "STL10, TinyImageNet, linear probe (Table IV)", "75.15, 35.17",
              _LIKEWISE),
    Published("CRRCD", "table5", "LFW 16x16 (Table V)", "95.25", _FACES, arm="crrcd"),
    Published("CRRCD", "table6", "UCCS 180-way (Table VI)", "97.27", _LIKEWISE, "",
              "top1", "crrcd"),
    Published("CRRCD", "table7", "TinyFace rank-1 (Table VII)", "35", _LIKEWISE,
              "56 to 76 by large models", "rank1", "crrcd"),
    Published("AIRD", "table2", "LFW 16x16, LR-LR and LR-HR (Table II)", "96.02, 91.52", _FACES),
    Published("AIRD", "table3", "AgeDB-30 16x16, LR-LR and LR-HR (Table III)", "80.45, 66.25",
              _LIKEWISE),
    Published("AIRD", "table4", "UCCS 180-way (Table IV)", "97.58", _LIKEWISE, "", "top1", "aird"),
    Published("HORKD", "table1", "CIFAR-100, ResNet18 at 32 and 16 (Table 1)", "76.68, 74.65",
              _SETS),
    Published("HORKD", "table2", "LFW 32 and 16 (Table 2)", "93.83, 90.03",
              "not run: needs UMDFaces and a GPU"),
    Published("HORKD", "table3", "UCCS 16x16, top-1 and top-5 error (Table 3)", "22.19, 10.23",
              "not run: needs UCCS besides"),
    Published("HORKD", "table4", "Cars196, CUB, SOP at 96 px, Recall@1 (Table 4)",
              "73.41, 53.53, 66.42", "not run: needs the sets and a GPU"),
    Published("EmbedKD", "table1", "CUB, Cars196: relative teacher, Recall@1 (Table 1)",
              "58.0, 76.6", "not run: needs the sets and a GPU"),
    Published("EmbedKD", "table2", "SOP: absolute and relative teacher (Table 2)", "68.0, 67.7",
              _LIKEWISE),
    Published("EmbedKD", "table5", "CUB, MobileNet-0.25 (Table 5)", "44.6", _LIKEWISE, "",
              "recall1", "rel"),
    Published("BTNet", "table1", "six face benchmarks, 112&7, 112&14, 112&28 (Table 1)",
              "86.10, 94.08, 96.65", "not run: needs MS1MV3 and a GPU"),
    Published("BTNet", "table1", "likewise, 7&7, 14&14, 28&28 (Table 1)", "77.78, 90.90, 96.27",
              _LIKEWISE),
    Published("BTNet", "table2", "QMUL-SurvFace, TPIR20 at FPIR .3, .2, .1 (Table 2)",
              "31.2, 26.9, 20.6", _LIKEWISE),
    Published("BTNet", "fig5", "parameters stored for 14 px (Table 3)", "2.29M", "",
              ours="2,293,568"),
)  # fmt: skip


# -- what a job trains ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Setting:
    """What one --recipe compares: what is shared, what is scored, and which parts fit."""

    shared: Any  # a Config whose data, teacher, student and optim every row gets
    columns: dict[str, str]
    seeds: int
    multipliers: tuple[float, ...] = MULTIPLIERS
    tuning_seeds: tuple[int, ...] = TUNING_SEEDS
    left_out: tuple[str, ...] = ()  # parts that do not fit
    resolution: int = 16


def setting(recipe: str, root: str) -> Setting:
    faces = {"rank1": "rank1", "verification": "verification"}
    known = baselines.train.RECIPES
    if recipe == "matched":
        return Setting(known["matched"], faces, seeds=10)
    if recipe == "smoke":
        return Setting(known["smoke"], faces, 2, MULTIPLIERS[::2], TUNING_SEEDS[:1])
    shared = baselines.config.members(known["table1"])[0]
    shared = replace(shared, data=replace(shared.data, root=root))
    # CIFAR-100 has no development split to search on. Left out: what trains no classifier, and what
    # has no setting for CIFAR-100 in its paper. HORKD without assistant: both networks see 32 px.
    others = [n for n in PARTS if n.startswith(("adadistill", "btnet", "aird", "embedkd"))]
    return Setting(shared, {"top1": "top1"}, 3, tuning_seeds=(), left_out=("horkd", *others),
                   resolution=shared.data.lr)  # fmt: skip


def config_of(
    part: Part, setting: Setting, recipe: str, lr: int, seed: int, *, changes: Mapping[str, Any]
) -> Any:
    """The complete configuration of one job: the paper's own recipe, with what all rows share."""
    known = part.paper.RECIPES
    is_btnet = part.paper is btnet.train
    base = known["smoke" if recipe == "smoke" and not is_btnet else "matched"]
    if recipe == "paper" and part.paper is horkd.train:
        base = replace(base, reduction=known["table1"].reduction)
    shared = {name: getattr(setting.shared, name) for name in SHARED}
    shared["data"] = replace(shared["data"], lr=lr)
    made = dict(part.changes)
    if is_btnet:
        hr, epochs = shared["data"].hr, shared["optim"]
        halvings = max(1, (hr // lr).bit_length())  # HR, half of it, ..., down to LR
        made |= {"student": base.student, "resolutions": (lr, hr), "sizes": halvings,
                 "trunk_optim": epochs.longer(2), "branch_optim": epochs}  # fmt: skip
        shared.pop("student")
    every = setting.shared.evaluate_every if recipe == "smoke" else 4
    if seed:  # curves are drawn of seed 0
        every = shared["optim"].epochs
    made |= {"recipe": "matched" if recipe == "paper" else recipe, "seed": seed,
             "evaluate_every": every, "report": False, "score_teacher": False}  # fmt: skip
    return replace(base, **shared, **made | dict(changes))


def scaled(part: Part, config: Any, multiplier: float) -> Any:
    return replace(config, **{name: multiplier * getattr(config, name) for name in part.tuned})


class Comparison:
    """The jobs of one comparison, by stage."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.parts = args, {name: PARTS[name] for name in args.parts}
        self.setting = setting(args.recipe, args.root)
        self.folder: Path = args.folder
        self.machine = {"precision": args.precision, "threads": args.threads, "cache": args.cache,
                        "device": args.device}  # fmt: skip

    def settle(self) -> None:
        """What the folder keeps between calls: the resolution that claims are tested at, and what
        --precision auto was timed to be (rows of two precisions are not comparable)."""
        path = self.folder / "settings.json"
        kept: dict[str, Any] = {"schema": SCHEMA, "resolution": self.args.resolution[0]}
        if path.is_file():
            kept = read_record(path)
        if self.args.precision == "auto":
            if "precision" not in kept:
                torch.set_num_threads(self.args.threads)
                shared = self.setting.shared
                side, batch = shared.data.lr_input, shared.optim.batch
                net = Recogniser(shared.student, side, shared.data.identities)
                device = choose_device(self.args.device)
                kept["precision"], _ = faster_precision(net, side, batch, device)
            self.machine["precision"] = kept["precision"]
        write_text(path, json.dumps(kept))

    @property
    def searches(self) -> bool:
        return bool(self.setting.tuning_seeds) and not self.args.no_tuning

    def cost(self) -> float:
        """Of all stages; half of what is searched is taken to be trained again."""
        (lr, *_), lrs = self.args.resolution, self.args.resolution
        jobs = [job for one in lrs for job in self.main(one)] + self.timing(lr)
        jobs += self.trials(lr, self.setting.multipliers) if self.searches else []
        again = sum(part.cost for part in self.parts.values() if part.tuned) * self.args.seeds / 2
        return sum(job.cost for job in jobs) + (again * lr / 16 if self.searches else 0.0)

    def first(self) -> int:
        """The resolution that claims are tested at: the first one asked for in this folder."""
        path = self.folder / "settings.json"
        return read_record(path)["resolution"] if path.is_file() else self.args.resolution[0]

    def job(self, where: str, part: Part, config: Any, cost: float) -> Job:
        config = replace(config, folder=str(self.folder / where), **self.machine)
        optim = self.setting.shared.optim
        cost *= config.optim.epochs / optim.epochs * config.data.lr / 16
        return Job(where, part.paper.train, config, taught=f"seed {config.seed}", cost=cost)

    def main(self, lr: int) -> list[Job]:
        """Every part with its default weights, seed by seed."""
        found = []
        for seed in range(self.args.seeds):
            for name, part in self.parts.items():
                changes = {"score_teacher": name == "none"}
                config = config_of(
                    part, self.setting, self.args.recipe, lr, seed, changes=changes
                )
                found.append(self.job(f"{lr}px/{name}/seed-{seed}", part, config, part.cost))
        return found

    def trials(self, lr: int, multipliers: Sequence[float]) -> list[Job]:
        """The search of every tuned part, scored on development identities."""
        found = []
        for k, seed in enumerate(self.setting.tuning_seeds):
            for name, part in self.parts.items():
                for times in multipliers if part.tuned else ():
                    config = config_of(
                        part, self.setting, self.args.recipe, lr, seed, changes=part.only
                    )
                    people = min(TUNING_PEOPLE, config.data.test)
                    config = replace(config, data=replace(config.data, test=people))
                    where = f"{lr}px/tuning/{name}/x{times:.4g}/seed-{k}"
                    found.append(
                        self.job(where, part, scaled(part, config, times), part.cost * 0.7)
                    )
        return found

    def tuned(self, lr: int) -> list[Job]:
        """The parts for which another weight than the default won, with that weight."""
        found = []
        searched = {row.job: row.at(lr) for row in self.rows() if row.tuned}
        for seed in range(self.args.seeds):
            for name, part in self.parts.items():
                row = searched.get(name)
                times = row and statistics.choose(
                    self.folder / f"{lr}px", row, self.setting.multipliers,
                    len(self.setting.tuning_seeds),
                )
                if not times or times == 1:
                    continue
                changes = dict(part.only)
                if part.paper is btnet.train:  # the trunk has no such weight
                    changes["trunk_run"] = str(self.folder / f"{lr}px/{name}/seed-{seed}")
                config = config_of(part, self.setting, self.args.recipe, lr, seed, changes=changes)
                where = f"{lr}px/tuned/{name}/seed-{seed}"
                found.append(self.job(where, part, scaled(part, config, times), part.cost))
        return found

    def timing(self, lr: int) -> list[Job]:
        """Short runs of seed 0: each part and the student alone, one after the other."""
        found = []
        for name, part in self.parts.items():
            config = config_of(part, self.setting, self.args.recipe, lr, 0, changes=part.floor)
            people = min(TUNING_PEOPLE, config.data.test)
            short: dict[str, Any] = {
                field: replace(getattr(config, field), epochs=TIMED_EPOCHS)
                for field in ("optim", "trunk_optim", "branch_optim") if hasattr(config, field)
            }  # fmt: skip
            # as in a whole run a step reads the teacher's outputs, however few steps there are
            kept = replace(config.teacher, outputs="always")
            config = replace(config, data=replace(config.data, test=people), teacher=kept,
                             evaluate_every=TIMED_EPOCHS, **short)  # fmt: skip
            found.append(self.job(f"{lr}px/timing/{name}", part, config, 2 * part.cost))
        return found

    def rows(self) -> list[Row]:
        found = rows(self.setting.shared.data.hr, self.setting.columns)
        people = "rank1" in self.setting.columns
        unfit = ("shifted", "crossed") if not people else ()  # test images of faces only
        left_out = self.setting.left_out  # what was chosen to train is no matter here
        return [row for row in found if row.job not in left_out and row.group not in unfit]


# -- the command ---------------------------------------------------------------------------------


def published(runs: Path) -> list[dict[str, str]]:
    """PUBLISHED beside what the newest finished run of that recipe found here."""
    found = []
    for one in PUBLISHED:
        told = dataclasses.asdict(one)
        column, arm = told.pop("column"), told.pop("arm")
        for run in sorted((runs / one.paper.lower()).glob(f"{one.recipe}-*")):
            if not (run / "results.json").is_file():
                continue
            told["why"] = f"run, see {run.name}"
            cells = read_record(run / "results.json")["rows"].get(arm, {}).get("cells", {})
            if column in cells:
                cell = cells[column]
                told["ours"] = f"{cell['value']:.2f} [{cell['low']:.2f}, {cell['high']:.2f}]"
        found.append(told)
    return found


def chosen(names: Sequence[str] | None, known: Sequence[str], flag: str) -> list[str]:
    """The names asked for; all where none are. Raises ValueError for one that is not known."""
    for name in names or ():
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ValueError(f"{flag} {name}: not known{hint} (there are: {', '.join(known)})")
    return list(known if names is None else dict.fromkeys(names))


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python compare.py", description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add("--recipe", choices=("matched", "smoke", "paper"), default="matched")
    add("--papers", nargs="*", metavar="PAPER", help=f"of {', '.join(PAPERS)}; default: all")
    add("--baselines", nargs="*", metavar="METHOD",
        help=f"of {', '.join(WEIGHTS)}; default: all; none is always there")  # fmt: skip
    add("--seeds", type=int, default=0, help="paired seeds 0 to N - 1 (matched: 10)")
    add("--resolution", type=int, nargs="+", default=[],
        help="sides of the student's images in px, of which the first is tuned and timed "
             "(matched: 16)")  # fmt: skip
    add("--no-tuning", action="store_true", help="default weights only")
    add("--jobs", type=int, default=2, help="subprocesses at a time")
    add("--threads", type=int, default=1, help="CPU threads of each; another count, other bits")
    add("--precision", choices=("auto", "fp32", "bf16"), default="auto",
        help="auto: timed once, and kept for the comparison")  # fmt: skip
    add("--device", default="auto")
    add("--root", default="", help="paper: the folder of CIFAR-100; empty: a download")
    add("--folder", default="", help="of the comparison; default: runs/compare/RECIPE")
    add("--cache", default="cache", help="of data, teachers and their outputs")
    add("--report-only", action="store_true", help="train nothing: the page of what is finished")
    args = parser.parse_args(argv)
    if args.seeds < 0 or args.jobs < 1 or args.threads < 1:
        raise ValueError("--seeds, --jobs and --threads must be 1 or more")
    here = setting(args.recipe, args.root)
    args.seeds = args.seeds or here.seeds
    args.resolution = list(dict.fromkeys(args.resolution)) or [here.resolution]
    if args.recipe == "paper" and args.resolution != [here.resolution]:
        raise ValueError(f"--resolution: CIFAR-100 is compared at its {here.resolution} px")
    papers = chosen(args.papers, list(PAPERS), "--papers")
    methods = chosen(args.baselines, list(WEIGHTS), "--baselines")
    for lr in args.resolution:
        if not 4 <= lr < here.shared.data.hr and args.recipe != "paper":
            raise ValueError(f"--resolution {lr}: must be 4 or more and below the teacher's "
                             f"{here.shared.data.hr}")  # fmt: skip
        times, rest = divmod(here.shared.data.hr, lr)
        if "btnet" in papers and (rest or times & (times - 1)):
            raise ValueError(f"--resolution {lr}: BTNet's trunk sees {here.shared.data.hr} px "
                             "halved some times; take such a size, or --papers without "
                             "btnet")  # fmt: skip
    args.folder = Path(args.folder or f"runs/compare/{args.recipe}").expanduser()
    args.folder = args.folder if args.folder.is_absolute() else ROOT / args.folder
    asked = {"none", *methods}
    args.parts = [
        name for name, part in PARTS.items()
        if (name in asked or any(part.paper is PAPERS[paper] for paper in papers))
        and name not in here.left_out
    ]  # fmt: skip
    return args


def written(record: Mapping[str, Any]) -> str:
    """The record as JSON, a list of numbers on one line."""
    text = json.dumps(record, indent=1)
    return re.sub(r"\[[-+.\deE,\s]+\]", lambda found: " ".join(found[0].split()), text)


def main() -> int:
    args = arguments()
    comparison = Comparison(args)
    folder, lrs = args.folder, args.resolution
    failed: dict[str, str] = {}
    if not args.report_only:
        folder.mkdir(parents=True, exist_ok=True)
        comparison.settle()
        later = comparison.cost()

        def stage(name: str, jobs: Sequence[Job], workers: int = args.jobs) -> None:
            nonlocal later
            later = max(0.0, later - sum(job.cost for job in jobs))
            if jobs:
                print(f"{name}: {len(jobs)} runs", file=sys.stderr)
                failed.update(run_jobs(jobs, workers=workers, later=later))

        for lr in lrs:
            stage(f"students of {lr} px", comparison.main(lr))
        if comparison.searches:
            default, *others = comparison.setting.multipliers
            stage("trials, default weights", comparison.trials(lrs[0], [default]))
            stage("trials, other weights", comparison.trials(lrs[0], others))
            stage("students with the weights found", comparison.tuned(lrs[0]))
        # one at a time, for they are measured; a smoke run measures nothing
        alone = args.jobs if args.recipe == "smoke" else 1
        stage("training steps, timed", comparison.timing(lrs[0]), workers=alone)

    for name, reason in failed.items():
        print(f"failed: {name}: {reason}", file=sys.stderr)
    setting = comparison.setting
    headline = next(iter(setting.columns))
    there = [lr for lr in range(1, setting.shared.data.hr + 1) if (folder / f"{lr}px").is_dir()]
    record = statistics.summarise(
        folder, comparison.rows(), claims(comparison.first(), headline), recipe=args.recipe,
        resolutions=there, seeds=args.seeds, multipliers=setting.multipliers,
        trials=len(setting.tuning_seeds), headline=headline, label=PUBLISHED_ORDER,
    )  # fmt: skip
    record["published"] = published(locate("runs"))
    write_text(folder / "comparison.json", written(record))
    html = page.write(folder)
    for lr in lrs:
        if lr in there:
            print(page.text(record, str(lr)))
    print(f"written to {html}")
    return 1 if failed else 0


if __name__ == "__main__":
    cli.guarded(lambda: sys.exit(main()))

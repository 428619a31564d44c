"""What finished runs say of methods that were trained alike: means, paired differences, ranks,
verdicts, costs. Knows no paper.

A comparison's folder holds, for students of LR px,
    <LR>px/<job>/seed-<s>/                  a run: config.json, results.json, arrays.npz, ...
    <LR>px/tuning/<job>/x<m>/seed-<s>/      trials: weights times m, scored on development faces
    <LR>px/tuned/<job>/seed-<s>/            where the chosen m is not 1
    <LR>px/timing/<job>/                    a short run of the row and the student alone
A run that failed has a failed.txt of one line. The record depends on the finished runs alone, not
on when or in what order they were made.
"""

from __future__ import annotations

import json
import math
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

import numpy as np
from scipy import stats

from shared.comparison.jobs import OPEN
from shared.config import SCHEMA
from shared.evaluate.intervals import (
    Interval,
    compare_seeds,
    holm,
    kendall,
    mean_interval,
    ranks,
)
from shared.results import arrays_of

Group = Literal["teacher", "baseline", "paper", "component", "network", "shifted", "crossed"]
OTHER_ITEMS = ("shifted", "crossed")  # groups scored on images of their own
COMPARED = ("baseline", "paper")  # groups that are ranked, and whose p-values are one family
ALPHA = 0.05
SEEDS_OF_A_VERDICT = 5
MARGIN = 1.0  # points (percent of items) within which something "adds little"
BINS = 60  # of a histogram of cosines, over [-1, 1]
# What must be the same in all runs that are compared: these parts of a run's configuration, and
# these facts of it.
PARTS = ("data", "teacher", "student", "optim")
FACTS = ("precision", "threads", "ranks", "device")


@dataclass(frozen=True)
class Row:
    """A trained student of the comparison, and where its numbers lie.

    "{lr}" in arm, tables, phases and floor stands for the side of its images in px.
    """

    name: str
    title: str
    paper: str
    source: str
    group: Group
    job: str
    """Name of the job folder that holds it."""
    arm: str
    """Row of that run's tables."""
    against: str = "none"
    """Name of the row it is measured against."""
    tables: Mapping[str, tuple[str, str]] = field(
        default_factory=lambda: {
            "rank1": ("results", "rank1"),
            "verification": ("results", "verification"),
        }
    )
    """Of each column of the comparison: the run's table, and the column in that table."""
    phases: tuple[str, ...] = ()
    """Training phases that the student needs, its own last; none: not trained (a teacher)."""
    floor: str = "alone"
    """Phase of the student alone in the timing run."""
    tuned: bool = False
    """Whether its weights are searched."""
    exempt: Mapping[str, str] = field(default_factory=dict)
    """Configuration fields that may differ from the other rows', with the reason."""
    published: float | None = None
    """Its number in the published ranking that Kendall's tau compares with."""
    note: str = ""
    """What a reader of its numbers must know."""

    def at(self, lr: int) -> Row:
        """The row of students of lr px."""

        def filled(text: str) -> str:
            return text.replace("{lr}", str(lr))

        return replace(
            self,
            arm=filled(self.arm),
            floor=filled(self.floor),
            phases=tuple(map(filled, self.phases)),
            tables={c: (filled(t), filled(inner)) for c, (t, inner) in self.tables.items()},
        )


@dataclass(frozen=True)
class Claim:
    """A claim of a paper that two rows test: by their paired difference, better minus worse.

    "greater" (better is better) is confirmed when the interval lies above 0 and the p-value,
    adjusted by Holm over all tested claims of this kind, is at most .05; contradicted when the
    interval lies below 0 and that p-value is at most .05. "close" (it adds little) is confirmed
    when the whole interval lies within +-1 point, and contradicted when it lies wholly outside. All
    else is not confirmed, or not tested where fewer than five seeds are paired.
    """

    text: str
    source: str
    rows: tuple[str, str]
    """(better, worse)"""
    resolution: str
    """Side of the student's images in px."""
    column: str = "rank1"
    kind: Literal["greater", "close"] = "greater"
    note: str = ""


@dataclass(frozen=True)
class _Trained:
    """The finished seeds of a row."""

    values: dict[str, dict[int, float]]  # column -> seed -> percent
    hits: dict[str, dict[int, np.ndarray]]  # column -> seed -> bool [N]
    groups: dict[str, np.ndarray]  # column -> identity of each item [N]
    headings: dict[str, str]  # of columns
    cost: dict[str, int]  # parameters, macs
    failed: dict[str, str]  # seed -> reason

    @property
    def seeds(self) -> list[int]:
        """Of the first column: a finished run has them all."""
        return sorted(next(iter(self.values.values())))


View = Mapping[str, _Trained]  # of rows by name
# of each group with images of its own ("": all others) and column: the first run, and the
# identities of its items
Items = dict[tuple[str, str], tuple[Path, np.ndarray]]


def summarise(
    folder: Path,
    rows: Sequence[Row],
    claims: Sequence[Claim],
    *,
    recipe: str,
    resolutions: Sequence[int],
    seeds: int,
    multipliers: Sequence[float],
    trials: int = 1,
    reference: str = "none",
    second: str = "kd",
    headline: str = "rank1",
    label: str = "",
) -> dict[str, Any]:
    """The record of a comparison (comparison.json), from whatever finished runs lie in `folder`.

    seeds: 0 .. seeds - 1 are read; trials: as many seeds of each multiplier's trials, likewise from
    0. label: of the ranking in Row.published. Values are percent.

    A row's mean has Student's t interval over its seeds. A difference is paired, over the seeds
    both rows have, by the two-way bootstrap of shared.evaluate.intervals.compare_seeds, widened for
    few seeds; fewer than two seeds give a value alone. Holm's families: at one resolution and
    column, and for default and tuned weights each by itself, the differences of all baselines and
    papers to `reference`, and those to `second`. Ranks (of the headline) and Kendall's tau are over
    the seeds that all ranked rows have; a row with fewer than half as many as the fullest is not
    ranked.

    Raises ValueError: no finished run, a file that cannot be read, rows scored on other items, or
    configurations that differ in what must be equal (`check_equal`).
    """
    columns = {headline: headline} | {column: column for row in rows for column in row.tables}
    parts: dict[str, Any] = {}
    curves: dict[str, Any] = {}
    histograms: dict[str, Any] = {}
    views: dict[str, View] = {}
    runs: list[Path] = []
    equal: list[dict[str, Any]] = []
    exempt: dict[str, dict[str, str]] = {}
    for lr in resolutions:
        base, here = folder / f"{lr}px", [row.at(lr) for row in rows]
        finished, same, differing = _checked(base, here, seeds, multipliers, trials)
        runs += finished
        equal.append(same)
        for name, fields in differing.items():
            exempt[name] = exempt.get(name, {}) | fields
        items: Items = {}
        view = {row.name: _trained(base / row.job, row, seeds, items) for row in here}
        for row in here:
            columns |= view[row.name].headings
        tuning = {row.name: _tuning(base, row, multipliers, trials) for row in here if row.tuned}
        # a row whose weights are not searched has its default ones among the tuned too
        best = dict(view)
        for name, found in tuning.items():
            if found is None or found["chosen"] is None:
                del best[name]
            elif found["chosen"] != 1:
                row = next(row for row in here if row.name == name)
                best[name] = _trained(base / "tuned" / row.job, row, seeds, items)
        default = _table(here, view, reference, second, headline)
        searched = [row for row in here if row.tuned or row.group in COMPARED]
        searched = searched if any(tuning.values()) else []
        tuned = _table(searched, best, reference, second, headline)
        alone = next((row for row in here if row.name == reference), None)
        lines = {}
        for row in here:
            lines[row.name] = {
                "title": row.title,
                "paper": row.paper,
                "source": row.source,
                "group": row.group,
                "note": row.note,
                "against": row.against,
                "parameters": view[row.name].cost.get("parameters"),
                "macs": view[row.name].cost.get("macs"),
                **default[row.name],
                "tuning": tuning.get(row.name),
                "tuned": tuned.get(row.name) if row.tuned else None,
                "cost": _cost(base, row, alone),
            }
        parts[str(lr)] = {
            "seeds": max(len(one.seeds) for one in view.values()),
            "identities": len(np.unique(items["", headline][1])) if ("", headline) in items else 0,
            "rows": lines,
            "kendall": _kendall(here, view, headline, label),
        }
        views[str(lr)] = view
        networks = {(row.job, row.phases[-1]): row for row in reversed(here) if row.phases}
        # of a network with several rows (other test images, FaceBN) the first one's
        curve = {row.name: _curve(base, row, headline) for row in reversed(networks.values())}
        curves[str(lr)] = {name: one for name, one in curve.items() if one}
        pairs = {row.name: _histogram(base, row) for row in here}
        histograms[str(lr)] = {name: one for name, one in pairs.items() if one}
    if not runs:
        raise ValueError(
            f"{folder}: no finished run here, nothing to compare"
        )
    return {
        "schema": SCHEMA,
        "recipe": recipe,
        "headline": headline,
        "reference": reference,
        "second": second,
        "columns": columns,
        "made_by": _made_by(runs),
        "equal": _merged(equal),
        "exempt": exempt,
        "resolutions": parts,
        "claims": _verdicts(claims, views),
        "curves": curves,
        "histograms": histograms,
        "published": [],
    }


def check_equal(
    runs: Mapping[str, Path], exempt: Mapping[str, Mapping[str, str]]
) -> tuple[dict[str, Any], dict[str, dict[str, str]]]:
    """(field -> the value all runs share, run -> its fields that differ with leave -> the reason).

    runs: name -> folder of a run; exempt: the same names -> fields that may differ -> the reason.
    Compared are data.*, teacher.*, student.* and optim.* of the configuration, and precision,
    threads, ranks and device. Raises ValueError naming run, field, both values and the other run.
    """
    equal: dict[str, Any] = {}
    first: dict[str, str] = {}
    flat = {name: _fields(_json(folder / "config.json")) for name, folder in runs.items()}
    for name, fields in flat.items():
        for key, value in fields.items():
            if key in exempt.get(name, {}):
                continue
            if equal.setdefault(key, value) != value:
                raise ValueError(
                    f"{name}: {key} is {value!r}, but {equal[key]!r} in {first[key]}; rows are "
                    "compared only where it is the same: remove the run that is wrong, and go on"
                )
            first.setdefault(key, name)
    differing: dict[str, dict[str, str]] = {}
    for name, fields in flat.items():
        mine = exempt.get(name, {})
        for key in sorted({*equal, *fields}):
            if key in fields and key in equal and fields[key] == equal[key]:
                continue
            if key in mine:
                differing.setdefault(name, {})[key] = mine[key]
            elif key in equal:
                raise ValueError(
                    f"{name}: {key} is not in its config.json, but {equal[key]!r} in {first[key]}"
                )
    return equal, differing


def choose(folder: Path, row: Row, multipliers: Sequence[float], seeds: int) -> float | None:
    """The multiplier of the row's weights with the best mean development score over the seeds 0 ..
    seeds - 1 of its trials; None where the trials of x1 did not all finish.

    folder: .../<LR>px; row: `Row.at` that resolution. The score is that of the last epoch. A
    multiplier with a trial that failed or is missing is out; of equal ones the nearest to 1 (by
    ratio) is taken, then the smaller.
    """
    means = {}
    for multiplier in multipliers:
        scores = [_score(_trial(folder, row, multiplier, seed), row) for seed in range(seeds)]
        done = [score for score in scores if score is not None]
        if done and len(done) == len(scores):
            means[multiplier] = fmean(done)
    if 1 not in means:
        return None
    return min(means, key=lambda m: (-means[m], abs(math.log(m)), m))


def _checked(
    base: Path, rows: Sequence[Row], seeds: int, multipliers: Sequence[float], trials: int
) -> tuple[list[Path], dict[str, Any], dict[str, dict[str, str]]]:
    """The finished runs with default and tuned weights, and `check_equal` of them, with what
    differs by row. Trials must equal one another."""
    leave: dict[str, dict[str, str]] = {}
    jobs: dict[Path, str] = {}
    searched: dict[Path, str] = {}
    for row in rows:
        leave[row.job] = leave.get(row.job, {}) | dict(row.exempt)
        for seed in range(seeds):
            for run in (base / row.job / f"seed-{seed}", base / "tuned" / row.job / f"seed-{seed}"):
                jobs |= {run: row.job} if _finished(run, row) else {}
        for run in (_trial(base, row, m, s) for m in multipliers for s in range(trials)):
            searched |= {run: row.job} if row.tuned and _finished(run, row) else {}

    def check(found: Mapping[Path, str]) -> tuple[dict[str, Any], dict[str, dict[str, str]]]:
        names = {str(run.relative_to(base.parent)): run for run in found}
        return check_equal(names, {name: leave[found[run]] for name, run in names.items()})

    check(searched)
    equal, differing = check(jobs)
    odd = {(jobs[base.parent / run], key) for run, fields in differing.items() for key in fields}
    by_row = {r.name: {k: why for k, why in r.exempt.items() if (r.job, k) in odd} for r in rows}
    return list(jobs), equal, {name: fields for name, fields in by_row.items() if fields}


# -- the statistics of one resolution ------------------------------------------------------------


def _table(
    rows: Sequence[Row], view: View, reference: str, second: str, headline: str
) -> dict[str, dict[str, Any]]:
    """row -> its seeds, rank, and cells: of each column the mean and the differences."""
    placed = _ranks(rows, view, headline)
    found: dict[str, dict[str, Any]] = {}
    for row in (row for row in rows if row.name in view):
        mine = view[row.name]
        others = [row.against] if row.group in OTHER_ITEMS else [reference, second, row.against]
        if row.name == reference:  # minus the second: the second's own difference once more
            others = []
        cells = {}
        for column, per_seed in mine.values.items():
            minus = {
                other: _difference(mine, view[other], column)
                for other in dict.fromkeys(others)
                if other != row.name and other in view
            }
            if per_seed:
                minus = {other: gain for other, gain in minus.items() if gain}
                cells[column] = _mean(list(per_seed.values())) | {"minus": minus}
        found[row.name] = {
            "seeds": mine.seeds,
            "failed": mine.failed,
            "cells": cells,
            "rank": placed.get(row.name),
        }
    compared = [
        found[row.name]["cells"] for row in rows if row.group in COMPARED and row.name in view
    ]
    for column in dict.fromkeys(column for cells in compared for column in cells):
        family = [cells[column]["minus"] for cells in compared if column in cells]
        for other in (reference, second):
            _adjust([gains[other] for gains in family if other in gains])
    return found


def _mean(values: Sequence[float]) -> dict[str, Any]:
    if len(values) < 2:
        return {"value": values[0], "low": None, "high": None, "seeds": list(values)}
    return _told(mean_interval(values)) | {"seeds": list(values)}


def _difference(a: _Trained, b: _Trained, column: str) -> dict[str, Any] | None:
    """a minus b over the seeds both have, in points; None where there is no such seed."""
    both = sorted(a.hits.get(column, {}).keys() & b.hits.get(column, {}).keys())
    if not both:
        return None
    x, y = (100.0 * np.stack([row.hits[column][seed] for seed in both]) for row in (a, b))
    if len(both) < 2:
        value = float(x.mean() - y.mean())
        return {"value": value, "low": None, "high": None, "p": None, "holm": None}
    interval, p = compare_seeds(x, y, a.groups[column], few_seeds=True)
    return _told(interval) | {"p": p, "holm": None}


def _adjust(family: Sequence[dict[str, Any]]) -> None:
    """Fill in Holm's adjusted p-values of the differences that have a p."""
    tested = [one for one in family if one["p"] is not None]
    if tested:
        for one, p in zip(tested, holm([one["p"] for one in tested]), strict=True):
            one["holm"] = float(p)


def _ranked(rows: Sequence[Row], view: View, column: str) -> tuple[list[Row], np.ndarray]:
    """The rows that have a rank, and their hits [K, S, N] in percent over the seeds all have."""
    known = [row for row in rows if row.group in COMPARED and row.name in view]
    seeds = {row.name: set(view[row.name].hits.get(column, {})) for row in known}
    fullest = max(map(len, seeds.values()), default=0)
    known = [row for row in known if len(seeds[row.name]) >= max(1, fullest / 2)]
    common = sorted(set.intersection(*(seeds[row.name] for row in known))) if known else []
    if not common:
        return [], np.empty((0, 0, 0))
    hits = (view[row.name].hits[column] for row in known)
    return known, np.stack([100.0 * np.stack([mine[seed] for seed in common]) for mine in hits])


def _ranks(rows: Sequence[Row], view: View, column: str) -> dict[str, dict[str, Any]]:
    known, values = _ranked(rows, view, column)
    if values.shape[1] < 2:
        alone = stats.rankdata(-values.mean(axis=(1, 2))) if known else []
        found = [{"value": float(rank), "low": None, "high": None} for rank in alone]
    else:
        found = [_told(one) for one in ranks(values, view[known[0].name].groups[column])]
    return {row.name: one for row, one in zip(known, found, strict=True)}


def _kendall(rows: Sequence[Row], view: View, column: str, label: str) -> dict[str, Any] | None:
    """None: fewer than two methods, or nothing to order."""
    known, values = _ranked([row for row in rows if row.published is not None], view, column)
    published = [row.published for row in known if row.published is not None]
    ours = values.mean(axis=(1, 2)).tolist() if known else []
    if len(set(published)) < 2 or len(set(ours)) < 2:
        return None
    if values.shape[1] < 2:
        tau = stats.kendalltau(ours, published)
        found = {"value": float(tau.statistic), "low": None, "high": None, "p": float(tau.pvalue)}
    else:
        interval, p = kendall(values, view[known[0].name].groups[column], published)
        found = _told(interval) | {"p": p}
    names = [row.name for row in known]
    return found | {"methods": names, "published": published, "ours": ours, "label": label}


def _told(interval: Interval) -> dict[str, Any]:
    return {"value": interval.mean, "low": interval.low, "high": interval.high}


def _verdicts(claims: Sequence[Claim], views: Mapping[str, View]) -> list[dict[str, Any]]:
    """Every claim with its difference and verdict; the rules: see Claim. views: by LR."""
    nothing = {"value": None, "low": None, "high": None, "p": None, "holm": None}
    found, whys = [], []
    for claim in claims:
        view = views.get(claim.resolution, {})
        missing = [r for r in claim.rows if r not in view or not view[r].hits.get(claim.column)]
        unscored = [r for r in missing if r in view and view[r].seeds]
        better, worse = claim.rows
        gain = None if missing else _difference(view[better], view[worse], claim.column)
        if claim.resolution not in views:
            why = f"nothing was trained at {claim.resolution} px"
        elif unscored:
            why = f"{unscored[0]} was not scored by {claim.column}"
        elif missing:
            why = f"no finished run of {' and of '.join(missing)}"
        elif gain is None:
            why = "no seed that both rows have"
        else:
            both = view[better].hits[claim.column].keys() & view[worse].hits[claim.column].keys()
            few = len(both) < SEEDS_OF_A_VERDICT
            why = f"{len(both)} paired seeds, a verdict needs {SEEDS_OF_A_VERDICT}" if few else ""
        found.append(gain or dict(nothing))
        whys.append(why)
    told = zip(found, claims, whys, strict=True)
    _adjust([gain for gain, c, why in told if c.kind == "greater" and not why])
    return [
        {
            "claim": claim.text,
            "source": claim.source,
            "rows": list(claim.rows),
            "resolution": claim.resolution,
            "column": claim.column,
            "kind": claim.kind,
            **gain,
            "verdict": "not tested" if why else _verdict(claim, gain),
            "note": "; ".join(filter(None, (why, claim.note))),
        }
        for claim, gain, why in zip(claims, found, whys, strict=True)
    ]


def _verdict(claim: Claim, gain: Mapping[str, float]) -> str:
    low, high = gain["low"], gain["high"]
    if claim.kind == "close":
        yes, no = max(-low, high) <= MARGIN, low > MARGIN or high < -MARGIN
    else:
        sure = gain["holm"] <= ALPHA
        yes, no = low > 0 and sure, high < 0 and sure
    return "confirmed" if yes else "contradicted" if no else "not confirmed"


# -- tuning, cost, figures -----------------------------------------------------------------------


def _trial(base: Path, row: Row, multiplier: float, seed: int) -> Path:
    return base / "tuning" / row.job / f"x{multiplier:.4g}" / f"seed-{seed}"


def _score(run: Path, row: Row) -> float | None:
    """The last development score of the row in a finished trial."""
    if not _finished(run, row):
        return None
    lines = _development(run, row)
    return float(lines[-1]["development"]) if lines else None


def _development(run: Path, row: Row) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl with a development score of the row's own phase."""
    path = run / "metrics.jsonl"
    found = []
    for line in _text(path).splitlines():
        one = _parsed(line, path)
        if one.get("phase") == row.phases[-1] and "development" in one:
            found.append(one)
    return found


def _tuning(
    base: Path, row: Row, multipliers: Sequence[float], seeds: int
) -> dict[str, Any] | None:
    """What each multiplier scored; None where no trial has finished."""
    found: dict[str, Any] = {}
    for m in multipliers:
        runs = [_trial(base, row, m, seed) for seed in range(seeds)]
        scores = [_score(run, row) for run in runs]
        done = [score for score in scores if score is not None]
        whole = len(done) == len(scores) > 0
        reasons = {str(seed): _failure(run) for seed, run in enumerate(runs)}
        found[f"{m:.4g}"] = {
            "value": fmean(done) if whole else None,
            "seeds": scores,
            "failed": {seed: reason for seed, reason in reasons.items() if reason},
        }
    if all(score is None for one in found.values() for score in one["seeds"]):
        return None
    return {"multipliers": found, "chosen": choose(base, row, multipliers, seeds)}


def _cost(base: Path, row: Row, alone: Row | None) -> dict[str, float] | None:
    """Times the student alone: a step, and the whole training with what it needs first.

    Step times are of the short timing run, where the row and its floor follow one another in one
    process; numbers of steps are of seed 0's full runs; alone: the row of the student alone. A
    row of another network (exempt) has that network alone as its floor, and its whole training is
    told in times of the student alone, of a timing run of its own.
    """
    files = [base / "timing" / row.job, base / row.job / "seed-0"]
    files += [base / alone.job / "seed-0", base / "timing" / alone.job] if alone else []
    if not row.phases or not alone or not alone.phases:
        return None
    if not all((run / "config.json").is_file() for run in files):
        return None
    timed, full, short, timed_alone = (
        _json(run / "config.json").get("steps", {}) for run in files
    )
    last = alone.phases[-1]
    if not {*row.phases, row.floor} <= timed.keys() or not set(row.phases) <= full.keys():
        return None
    if last not in short or last not in timed_alone:
        return None
    if any(timed[phase]["median_ms"] is None for phase in {*row.phases, row.floor}):
        return None
    floor = timed[row.floor]["median_ms"]
    spent = sum(full[phase]["count"] * timed[phase]["median_ms"] for phase in row.phases)
    whole = short[last]["count"] * (timed_alone[last]["median_ms"] if row.exempt else floor)
    return {"step": timed[row.phases[-1]]["median_ms"] / floor, "whole": spent / whole}


def _curve(base: Path, row: Row, headline: str) -> dict[str, Any] | None:
    """Development scores of seed 0 over the epochs."""
    run = base / row.job / "seed-0"
    lines = _development(run, row) if _finished(run, row) else []
    if not lines:
        return None
    scores = [line.get(headline, line["development"]) for line in lines]
    return {"seed": 0, "epochs": [line["epoch"] for line in lines], headline: scores}


def _histogram(base: Path, row: Row) -> dict[str, Any] | None:
    """Densities of the cosines of seed 0's same and different pairs; None where there are none."""
    run = base / row.job / "seed-0"
    if "verification" not in row.tables or not _finished(run, row):
        return None
    table, inner = row.tables["verification"]
    # of several kinds of pairs a run keeps the scores of its headline
    if inner not in ("verification", _json(run / f"{table}.json")["headline"]):
        return None
    names = ("pairs/same", f"{row.arm}/scores", f"{row.arm}/threshold")
    same, scores, threshold = _arrays(arrays_of(run, table), *names)
    if same is None or scores is None or threshold is None or same.all() or not same.any():
        return None
    edges = np.linspace(-1, 1, BINS + 1)

    def density(chosen: np.ndarray) -> list[float]:
        inside = np.clip(scores[chosen], -1, 1)  # a cosine of float32 may be 1 + 1e-7
        return np.histogram(inside, edges, density=True)[0].round(4).tolist()

    return {
        "edges": edges.round(6).tolist(),
        "same": density(same),
        "different": density(~same),
        "threshold": float(threshold),
    }


# -- files ---------------------------------------------------------------------------------------


def _finished(run: Path, row: Row) -> bool:
    return all((run / f"{table}.json").is_file() for table, _ in row.tables.values())


def _failure(run: Path) -> str:
    """Why a run failed; empty where it did not, or is not over."""
    path = run / "failed.txt"
    reason = _text(path).strip() if path.is_file() else ""
    return "" if reason == OPEN else reason


def _trained(job: Path, row: Row, seeds: int, items: Items) -> _Trained:
    """What lies in job/seed-0 .. job/seed-<seeds - 1>; new kinds of items are added to `items`."""
    found = _Trained({c: {} for c in row.tables}, {c: {} for c in row.tables}, {}, {}, {}, {})
    for seed in range(seeds):
        run = job / f"seed-{seed}"
        if not _finished(run, row):
            if reason := _failure(run):
                found.failed[str(seed)] = reason
            continue
        for column, (table, inner) in row.tables.items():
            record, path = _json(run / f"{table}.json"), arrays_of(run, table)
            line = record["rows"].get(row.arm, {"cells": {}})
            bits, groups = _arrays(path, f"{row.arm}/correct/{inner}", f"groups/{inner}")
            if inner not in line["cells"] or bits is None or groups is None:
                raise ValueError(f"{run}: {table} has no {inner} of {row.arm}; remove this run")
            key = (row.group if row.group in OTHER_ITEMS else "", column)
            first, known = items.setdefault(key, (run, groups))
            if not np.array_equal(known, groups):
                raise ValueError(
                    f"{run}: {column} was scored on other items ({len(groups)}) than in {first} "
                    f"({len(known)}); rows are compared on the same ones: remove the run that is "
                    "wrong"
                )
            found.values[column][seed] = line["cells"][inner]["value"]
            found.hits[column][seed] = np.unpackbits(bits, count=len(groups)).astype(bool)
            found.groups[column] = known
            found.cost.update(parameters=line["parameters"], macs=line["macs"])
            if inner == column:
                found.headings[column] = record["columns"][inner]
    return found


def _fields(record: Mapping[str, Any]) -> dict[str, Any]:
    """What is compared of a config.json, by dotted name."""
    flat = {fact: record[fact] for fact in FACTS}

    def walk(name: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                walk(f"{name}.{key}", inner)
        else:
            flat[name] = value

    for part in PARTS:
        if part in record["config"]:
            walk(part, record["config"][part])
    return flat


def _merged(equal: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Of all resolutions: the value, or the values where they differ (data.lr)."""
    found: dict[str, Any] = {}
    for key in dict.fromkeys(key for same in equal for key in same):
        values = [same[key] for same in equal if key in same]
        found[key] = values[0] if all(value == values[0] for value in values) else values
    return found


def _made_by(runs: Sequence[Path]) -> dict[str, list[str]]:
    """Distinct values over the runs, and over those who went on with one."""
    found: dict[str, set[str]] = {}
    for run in runs:
        record = _json(run / "config.json")
        for made in (record, *record.get("resumed", [])):
            facts = {key: made[key] for key in ("git", "machine", *FACTS) if key in made}
            for key, value in (facts | made.get("versions", {})).items():
                found.setdefault(key, set()).add(str(value))
    return {key: sorted(values) for key, values in sorted(found.items())}


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from None


def _parsed(text: str, path: Path) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise _unreadable(path, error) from None


def _json(path: Path) -> Any:
    return _parsed(_text(path), path)


def _arrays(path: Path, *names: str) -> list[np.ndarray | None]:
    """Arrays of an npz file; None for one that it does not have."""
    try:
        with np.load(path, allow_pickle=False) as stored:
            return [stored.get(name) for name in names]
    except (OSError, ValueError, EOFError, AttributeError, zipfile.BadZipFile, zlib.error) as error:
        raise _unreadable(path, error) from None


def _unreadable(path: Path, error: Exception) -> ValueError:
    line = (str(error).splitlines() or [type(error).__name__])[0][:120]
    return ValueError(f"{path}: not readable ({line}); remove its folder, and it is made again")

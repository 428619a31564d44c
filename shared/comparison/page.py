"""A comparison's comparison.json becomes report.html and comparison.md; its table also as text.

The page is one file and needs no network. Plots in which every row has a line of its own are HTML
with a strip of SVG a line, so that they fit a phone; the others are drawn as in `shared.report`.
The papers' methods have one colour, the reference is grey, and what is second (KD) is blue.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from shared import figures
from shared.figures import INK, OTHERS, OWN, PAPER, REFERENCE, STYLE
from shared.files import write_text
from shared.report import html_table, page, plot
from shared.results import aligned

RANKED = ("baseline", "paper")  # groups that compete; the others explain
OTHER_ITEMS = {  # groups that are not compared with all: another network, or other test images
    "network": "One network of the teacher's size for all resolutions",
    "shifted": "On shifted test images",
    "crossed": "Gallery and probes of two sizes",
}
LEVEL = 0.05  # of a p-value after Holm's correction
WIDTH = 140  # characters of a line of `text`
NAME = 26  # characters of a name in a plot
SECOND = OTHERS[0]
VERDICTS = {"confirmed": "✓", "not confirmed": "○", "contradicted": "✗", "not tested": "·"}
# What is held equal, in words: the fields that tell it, and how each is told.
HELD = {
    "teacher": {"teacher.name": "{}"},
    "data": {"data.name": "{}", "data.hr": "{} px"},
    "student": {"student.name": "{}"},
    "degradation": {"data.kernel": "{}", "data.antialias": "antialiased"},
    "schedule": {"optim.method": "{}", "optim.epochs": "{} epochs"},
}


def write(folder: Path) -> Path:
    """Write report.html and comparison.md beside a folder's comparison.json; returns the page.

    Raises ValueError for a record that is missing, torn or of another schema; a page that stood
    there still stands then, and after an interrupted write.
    """
    folder = Path(folder)
    if not (folder / "comparison.json").is_file():
        raise ValueError(f"{folder}: no comparison here (comparison.json is missing)")
    record = figures.read_record(folder / "comparison.json")
    title = f"Comparison: {record['recipe']}"
    with mpl.rc_context(STYLE):
        sections = {
            "Every row, sorted": _each(record, _forest),
            "The papers’ claims": _claims(record),
            "Table": _each(record, _tables),
            "Accuracy against training cost": _each(record, _cost),
            "Accuracy against resolution": _resolutions(record),
            "While they learn": _each(record, _curves),
            "Similarity of pairs": _each(record, _similarity),
            "Our order and the published one": _each(record, _order),
            "Tuning": _each(record, _tuning),
            "What the papers print": _published(record),
            "How this was made": _made(record),
        }
    findings = _findings(record)
    lines = [f"# {title}", "", _told(record), "", *(f"- {found}" for found in findings)]
    for at in record["resolutions"]:
        lines += ["", f"## {at} px", "", markdown(record, at)]
    if record.get("claims"):
        lines += ["", "## The papers' claims", "", markdown_claims(record)]
    write_text(folder / "comparison.md", "\n".join([*lines, ""]))
    found = "".join(f"<li>{escape(line)}</li>\n" for line in findings)
    about = f'<p>{escape(_told(record))}</p>\n<ul class="found">\n{found}</ul>\n'
    write_text(folder / "report.html", page(title, about, sections, CSS))
    return folder / "report.html"


# -- the table as text ---------------------------------------------------------------------------


def markdown(record: dict[str, Any], resolution: str) -> str:
    """The table of one resolution: means in percent, differences in points, 95 % intervals.

    A difference is bold where its p-value after Holm's correction is .05 or less.
    """
    first, second = record["reference"], record["second"]
    found, text = record["resolutions"][resolution], []
    for part, rows in _parts(record, resolution).items():
        others = [first, second] if not part else ["its own reference"]
        head = ["", _heading(record), *(f"− {other}" for other in others)]
        head += ["tuned", "rank", "step", "whole"] if not part else ["tuned", "whole"]
        head += ["parameters", "MACs"]
        lines = [head, ["---"] * len(head)]
        for row in rows.values():
            cell = _cell(row, record["headline"])
            if cell is None:
                lines.append([row["title"], _state(row), *[""] * (len(head) - 2)])
                continue
            line = [row["title"], _interval(cell) + _some(row, found)]
            for other in others if not part else [row["against"]]:
                gain = cell.get("minus", {}).get(other)
                shown = _interval(gain, "+.2f") if gain else ""
                value, *interval = shown.split(" ", 1)
                if gain and _clear(gain):
                    shown = " ".join([f"**{value}**", *interval])
                line.append(shown)
            tuned = _cell(row.get("tuned"), record["headline"])
            line += ["" if tuned is None else f"{tuned['value']:.2f}"]
            line += [_rank(row), _times(row, "step")] if not part else []
            lines.append([*line, _times(row, "whole"), *_size(row)])
        text += [f"{OTHER_ITEMS[part]}:", ""] if part else []
        text += [*(_piped(line) for line in lines), ""]
    text += [f"- {title}: {note}." for title, note in _notes(found).items()]
    return "\n".join(text).rstrip()


def markdown_claims(record: dict[str, Any]) -> str:
    """A line a claim: verdict, difference in points with its 95 % interval, Holm's p, the rows."""
    head = ["claim", "of", "verdict", "difference", "Holm p", "rows", "px"]
    lines = [head, ["---"] * len(head)]
    for claim in record.get("claims", []):
        gain = claim if claim.get("value") is not None else None
        shown = _interval(gain, "+.2f") if gain else ""
        verdict = claim["verdict"] + ("" if gain else f": {claim.get('note', '')}".rstrip(": "))
        lines.append([claim["claim"], claim["source"], verdict, shown, _p(claim.get("holm")),
                      " − ".join(claim["rows"]), str(claim.get("resolution") or "")])  # fmt: skip
    return "\n".join(_piped(line) for line in lines)


def text(record: dict[str, Any], resolution: str) -> str:
    """The table of one resolution for a terminal, at most `WIDTH` characters wide.

    A star follows a difference whose p-value after Holm's correction is .05 or less.
    """
    found = record["resolutions"][resolution]
    first, second = record["reference"], record["second"]
    lines = [["", f"{_heading(record)} [95 %]"[:28], f"- {first}"[:12], f"- {second}"[:12], "tuned",
              "rank", "step", "whole", "parameters", "MACs"]]  # fmt: skip
    notes = []
    for part, row in ((part, r) for part, rows in _parts(record, resolution).items()
                      for r in rows.values()):  # fmt: skip
        cell = _cell(row, record["headline"])
        title = _plain(row["title"], 30) + (f" ({part})" if part else "")
        if row.get("failed"):
            notes.append(_plain(f"{title}: {_failures(row)}", WIDTH))
        if cell is None:
            lines.append([title, "failed" if row.get("failed") else "not run", *[""] * 8])
            continue
        others = (first, second) if not part else (row["against"], "")
        gains = [cell.get("minus", {}).get(other) for other in others]
        tuned = _cell(row.get("tuned"), record["headline"])
        lines.append([
            title, _interval(cell),
            *(f"{g['value']:+.2f}{'*' if _clear(g) else ' '}" if g else "" for g in gains),
            "" if tuned is None else f"{tuned['value']:.2f}",
            _rank(row), _times(row, "step"), _times(row, "whole"), *_size(row),
        ])  # fmt: skip
    about = (
        f"{record['recipe']}, {resolution} px, {_count(found['seeds'], 'seed')}, "
        f"{found['identities']:,} {_kind(record)}; * Holm p <= {LEVEL:g}; step, whole: times the "
        "student alone"
    )
    table = [line.rstrip() for line in aligned(lines)]
    return "\n".join([*table, "", *textwrap.wrap(about, WIDTH), *notes])


def _piped(cells: Sequence[str]) -> str:
    plain = (" ".join(c.split()).replace("|", "/").replace("<", "&lt;") for c in cells)
    return f"| {' | '.join(plain)} |"


def _plain(words: str, most: int) -> str:
    """One line of at most so many characters."""
    words = " ".join(words.split())
    return words if len(words) <= most else words[: most - 1] + "…"


# -- parts of a record ---------------------------------------------------------------------------


def _cell(row: dict[str, Any] | None, column: str) -> dict[str, Any] | None:
    """A row's (or its tuned twin's) cell; None where it failed or was not scored so."""
    cell = (row or {}).get("cells", {}).get(column)
    return cell if cell and cell.get("value") is not None else None


def _parts(record: dict[str, Any], at: str) -> dict[str, dict[str, Any]]:
    """The rows by what they were scored on: "" for the comparison's own test images."""
    rows = record["resolutions"][at]["rows"]
    found = {
        part: {n: row for n, row in rows.items()
               if (row["group"] if row["group"] in OTHER_ITEMS else "") == part}
        for part in ("", *OTHER_ITEMS)
    }  # fmt: skip
    column = record["headline"]
    return {k: v for k, v in found.items() if not k or any(_cell(r, column) for r in v.values())}


def _notes(found: dict[str, Any]) -> dict[str, str]:
    """What a reader of some rows' numbers must know, by title."""
    return {row["title"]: row["note"] for row in found["rows"].values() if row.get("note")}


def _state(row: dict[str, Any]) -> str:
    """Why a row has no score."""
    return f"failed: {_failures(row)}" if row.get("failed") else "not run"


def _some(row: dict[str, Any], found: dict[str, Any]) -> str:
    """How many seeds, of a row that has fewer than others."""
    done, most = len(row.get("seeds") or ()), found["seeds"]
    return f" ({done} of {most} seeds)" if done < most else ""


def _rows(record: dict[str, Any], at: str, groups: Iterable[str] = RANKED) -> dict[str, Any]:
    """Rows of the groups that have the headline's score, best first."""
    found = {
        name: row for name, row in record["resolutions"][at]["rows"].items()
        if row["group"] in groups and _cell(row, record["headline"])
    }  # fmt: skip
    return dict(sorted(found.items(), key=lambda item: -_score(record, item[1])))


def _score(record: dict[str, Any], row: dict[str, Any]) -> float:
    return row["cells"][record["headline"]]["value"]


def _colour(record: dict[str, Any], name: str, row: dict[str, Any]) -> str:
    known = {record["reference"]: REFERENCE, record["second"]: SECOND}
    return known.get(name, OWN if row["group"] == "paper" else INK)


def _main(record: dict[str, Any]) -> str:
    """The resolution that the findings are told of: most seeds, and of equals most claims."""
    claims = [str(claim.get("resolution")) for claim in record.get("claims", [])]
    return max(record["resolutions"],
               key=lambda at: (record["resolutions"][at]["seeds"], claims.count(at)))  # fmt: skip


def _heading(record: dict[str, Any]) -> str:
    return record["columns"][record["headline"]]


def _kind(record: dict[str, Any]) -> str:
    """What is scored: by rank-1 people, by accuracy every image for itself."""
    return "images" if record["headline"] == "top1" else "identities"


def _interval(cell: dict[str, Any], form: str = ".2f") -> str:
    """The value, and its interval where there is one (two seeds or more)."""
    value = f"{cell['value']:{form}}"
    return f"{value} [{cell['low']:{form}}, {cell['high']:{form}}]" if _sure(cell) else value


def _sure(cell: dict[str, Any]) -> bool:
    return cell.get("low") is not None and cell.get("high") is not None


def _small(cell: dict[str, Any], form: str = ".2f") -> str:
    """The same as HTML, the interval small."""
    value, *interval = _interval(cell, form).split(" ", 1)
    return " ".join([value, *(f"<small>{part}</small>" for part in interval)])


def _clear(gain: dict[str, Any]) -> bool:
    return gain.get("holm") is not None and gain["holm"] <= LEVEL


def _p(value: float | None) -> str:
    if value is None:
        return ""
    return "< .001" if value < 0.001 else f"{value:.3f}".removeprefix("0")


def _rank(row: dict[str, Any]) -> str:
    rank = row.get("rank")
    return _interval(rank, ".3g") if rank else ""


def _times(row: dict[str, Any], what: str) -> str:
    value = (row.get("cost") or {}).get(what)
    return "" if value is None else f"{value:.2f}×"


def _size(row: dict[str, Any]) -> list[str]:
    parameters, macs = row.get("parameters"), row.get("macs")
    return [
        "" if parameters is None else f"{parameters:,}",
        "" if macs is None else f"{macs / 1e6:,.1f} M",
    ]


def _failures(row: dict[str, Any]) -> str:
    """Each reason once, with the seeds that failed so."""
    seeds: dict[str, list[str]] = {}
    for seed, reason in (row.get("failed") or {}).items():
        seeds.setdefault(reason, []).append(seed)
    told = (
        f"{reason} ({'seed ' + s[0] if len(s) == 1 else _count(len(s), 'seed')})"
        for reason, s in seeds.items()
    )
    return "; ".join(told) or "no scores"


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _listed(words: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(words[:-1]), *words[-1:]]))


# -- what was compared, and what was found -------------------------------------------------------


def _told(record: dict[str, Any]) -> str:
    """What was compared, and what was held equal."""
    found, at = record["resolutions"][_main(record)], list(record["resolutions"])
    groups = (*RANKED, "component")
    students = sum(row["group"] in groups for row in found["rows"].values())
    told = (
        f"{students} ways to train one small network on images of {_listed(at)} px, each with "
        f"{_count(found['seeds'], 'paired seed')}, scored on {found['identities']:,} "
        f"{_kind(record)} that no network has seen (recipe {record['recipe']})."
    )
    equal, same = record.get("equal") or {}, []
    for what, fields in HELD.items():
        parts = []
        for field, form in fields.items():
            if field in equal:
                off = "" if equal[field] is not False else "not "
                parts.append(off + form.format(equal[field]))
        if parts:
            same.append(f"{what} ({', '.join(parts)})")
    trials = {
        len(row["tuning"]["multipliers"]) for row in found["rows"].values() if row.get("tuning")
    }
    if len(trials) == 1:
        same.append(f"tuning budget ({trials.pop()} weights each)")
    return told + (f" Equal for all rows of a seed: {_listed(same)}." if same else "")


def _findings(record: dict[str, Any]) -> list[str]:
    """What the numbers support: the best row, those that beat the second, and the claims."""
    at, second, told = _main(record), record["second"], []
    where = f" at {at} px" if len(record["resolutions"]) > 1 else ""
    every = record["resolutions"][at]["rows"]
    rows = _rows(record, at)
    if rows:
        best = next(iter(rows.values()))
        rank = best.get("rank")
        line = f"Best {_heading(record)}{where}: {best['title']}, "
        line += f"{_interval(_cell(best, record['headline']) or {})} %"
        if rank and _sure(rank):
            line += f"; its rank among {len(rows)} is {rank['low']:.3g} to {rank['high']:.3g}"
        others = [
            f"{rows[n]['title']} has {_score(record, rows[n]):.2f}"
            for n in (record["reference"], second)
            if n in rows and rows[n] is not best
        ]
        told.append(line + (f"; {_listed(others)}" if others else "") + ".")
    gains = {
        kind: [
            gain for name, row in rows.items()
            if name not in (record["reference"], second)
            and (cell := _cell(row if kind == "default" else row.get("tuned"), record["headline"]))
            and (gain := cell.get("minus", {}).get(second))
        ]
        for kind in ("default", "tuned")
    }  # fmt: skip
    if gains["default"]:
        name = every[second]["title"] if second in every else second
        parts = []
        for kind, found in gains.items():
            clear = [g["value"] > 0 for g in found if _clear(g)]
            better, worse = sum(clear), len(clear) - sum(clear)
            if found:
                parts.append(
                    f"{'with tuned weights ' * (kind == 'tuned')}{better} of {len(found)} "
                    f"beat{'s' * (better == 1)} {name}, {worse} fall{'s' * (worse == 1)} short of "
                    f"it, {len(found) - len(clear)} cannot be told from it"
                )
        told.append(f"Of the methods {'; '.join(parts)} (p ≤ {LEVEL:g} after Holm’s correction).")
    verdicts = [claim["verdict"] for claim in record.get("claims", [])]
    tested = [v for v in verdicts if v != "not tested"]
    if tested:
        parts = [f"{tested.count(v)} {v}" for v in VERDICTS if v in tested]
        told.append(f"Of the papers’ claims {len(tested)} are tested here: {', '.join(parts)}.")
    return told


# -- strips: a line for each row -----------------------------------------------------------------


def _forest(record: dict[str, Any], at: str) -> str:
    """Dot and interval of every row's mean, best first; none and KD run through as lines."""
    head = record["headline"]
    own = _rows(record, at)
    every = record["resolutions"][at]["rows"]
    parts = _rows(record, at, ("component",))
    if not own:
        return ""

    def strips(rows: dict[str, Any], guides: Sequence[str], around: dict[str, Any]) -> str:
        lines = []
        for name, row in rows.items():
            kind = {record["reference"]: "ref", record["second"]: "second"}.get(
                name, "other" if row["group"] in ("baseline", "component") else "own"
            )
            moved = (row.get("tuning") or {}).get("chosen") != 1
            ring = _cell(row.get("tuned"), head) if moved else None
            marks = [(_cell(row, head), kind), (ring, f"{kind} ring")]
            cell = row["cells"][head]
            lines.append((f"<b>{escape(row['title'])}</b>", marks, _small(cell, ".1f")))
        drawn = {
            every[g]["title"]: (_score(record, every[g]), kind)
            for g, kind in zip(guides, ("ref", "second"), strict=False)
            if g in every and _cell(every[g], head)
        }
        cells = [c for r in around.values() for c in (_cell(r, head), _cell(r.get("tuned"), head))]
        return _strips(lines, drawn, cells, "%")

    lines = (record["reference"], record["second"])
    tuned = any(_cell(r.get("tuned"), head) for r in own.values())
    teachers = _rows(record, at, ("teacher",))
    text = (
        f"<p>{escape(_heading(record))} in percent with 95 % intervals. Dot: the default weight"
        + ("; ring: the tuned one, where that is another" if tuned else "")
        + '. <span class="own">In colour: the papers’ methods.</span></p>\n'
        + strips(own, lines, own | parts)
    )
    if teachers:
        told = (f"{escape(r['title'])} {_score(record, r):.1f}" for r in teachers.values())
        text += f"<p>Not drawn, for scale: {'; '.join(told)}.</p>\n"
    if parts:
        text += "<h4>Parts of the papers’ methods</h4>\n" + strips(parts, lines, own | parts)
    for group, heading in OTHER_ITEMS.items():
        others = _rows(record, at, (group,))
        if others:
            text += f"<h4>{heading}</h4>\n" + strips(others, (), others)
    return text


def _claims(record: dict[str, Any]) -> str:
    """The verdicts, and their differences on one axis."""
    claims = record.get("claims") or []
    lines = []
    several = len(record["resolutions"]) > 1
    for claim in claims:
        verdict = claim["verdict"]
        kind = verdict.replace(" ", "-")
        rows = " − ".join(_title(record, claim, name) for name in claim["rows"])
        about = [claim["source"], rows, record["columns"].get(claim.get("column"), "")]
        if several and claim.get("resolution"):
            about.append(f"{claim['resolution']} px")
        about.append(claim.get("note") or "")
        drawn = claim if claim.get("value") is not None else None
        label = (
            f'<span class="verdict {kind}">{VERDICTS.get(verdict, "")} {escape(verdict)}</span>'
            f"<b>{escape(claim['claim'])}</b> "
            f"<small>{escape(' · '.join(filter(None, about)))}</small>"
        )
        shown = ""
        if drawn:
            shown = _small(claim, "+.2f")
            if claim.get("holm") is not None:
                shown += f" <small>p {escape(_p(claim['holm']))}</small>"
        lines.append((label, [(drawn, kind)], shown))
    if not lines:
        return ""
    cells = [claim if claim.get("value") is not None else None for claim in claims]
    strips = _strips(lines, {"0": (0.0, "ref")}, cells, "points")
    return (
        "<p>Each is a paired difference of two rows with its 95 % interval, in points; p is after "
        f'Holm’s correction.</p>\n<div class="claims">{strips}</div>\n'
    )


def _title(record: dict[str, Any], claim: dict[str, Any], name: str) -> str:
    rows = record["resolutions"].get(str(claim.get("resolution")), {}).get("rows", {})
    return rows[name]["title"] if name in rows else name


def _strips(
    lines: Sequence[tuple[str, list[tuple[dict[str, Any] | None, str]], str]],
    guides: dict[str, tuple[float, str]],
    cells: Sequence[dict[str, Any] | None],
    unit: str,
) -> str:
    """A plot of one line of HTML each: label, marks (cell, CSS classes), value.

    guides: lines through all of them, by label. cells: what the axis spans; what lies far outside
    the middle half is drawn at the edge, as a triangle.
    """
    drawn = [cell for cell in cells if cell]
    ends = np.array(
        [c[k] for c in drawn for k in (("low", "high") if _sure(c) else ("value",))]
        + [v for v, _ in guides.values()]
    )
    quarter, half = np.percentile(ends, [25, 75])
    reach = 4 * max(half - quarter, 1e-9)
    low, high = max(ends.min(), quarter - reach), min(ends.max(), half + reach)
    low, high = low - 0.04 * (high - low or 1), high + 0.04 * (high - low or 1)

    def x(value: float) -> str:
        return f"{100 * (min(max(value, low), high) - low) / (high - low):.2f}%"

    ticks = [t for t in MaxNLocator(5).tick_values(low, high) if low <= t <= high]
    ground = "".join(f'<line class="grid" x1="{x(t)}" x2="{x(t)}" y2="100%"/>' for t in ticks)
    ground += "".join(
        f'<line class="{kind} guide" x1="{x(v)}" x2="{x(v)}" y2="100%"/>'
        for v, kind in guides.values()
    )
    text = ""
    named = sorted(guides.items(), key=lambda item: item[1][0])
    if named and unit == "%":
        left = [f'<text class="{k}" x="{x(v)}" dx="{-4 if i == 0 and len(named) > 1 else 4}" y="14"'
                f' text-anchor="{"end" if i == 0 and len(named) > 1 else "start"}">{escape(n)}'
                "</text>" for i, (n, (v, k)) in enumerate(named)]  # fmt: skip
        text += f'<div></div><svg height="20" aria-hidden="true">{"".join(left)}</svg><div></div>\n'
    for label, marks, value in lines:
        present = [(cell, kind) for cell, kind in marks if cell]
        shapes = ""
        heights = (34, 68) if len(present) > 1 else (50,)
        for (cell, kind), y in zip(present, heights, strict=False):
            if not low <= cell["value"] <= high:
                side, anchor = ("◀", "start") if cell["value"] < low else ("▶", "end")
                shapes += (f'<text class="{kind}" x="{x(cell["value"])}" y="{y}%" dy=".35em" '
                           f'text-anchor="{anchor}">{side}</text>')  # fmt: skip
                continue
            if _sure(cell):
                shapes += (f'<line class="{kind}" x1="{x(cell["low"])}" x2="{x(cell["high"])}" '
                           f'y1="{y}%" y2="{y}%"/>')  # fmt: skip
            shapes += (f'<circle class="{kind}" cx="{x(cell["value"])}" cy="{y}%" '
                       f'r="{3.2 if "ring" in kind else 4}"/>')  # fmt: skip
        text += (
            f'<div class="label">{label}</div><svg aria-hidden="true">{ground}{shapes}</svg>'
            f'<div class="value">{value}</div>\n'
        )
    if "◀<" in text or "▶<" in text:
        unit += "; ◀ ▶ beyond"
    names = "".join(f'<text x="{x(t)}" y="13" text-anchor="middle">{t:g}</text>' for t in ticks)
    return (
        f'<div class="strips">\n{text}<div class="label"></div><svg class="axis" aria-hidden="true"'
        f' height="18">{names}</svg><div class="value"><small>{unit}</small></div>\n</div>\n'
    )


# -- tables --------------------------------------------------------------------------------------


def _tables(record: dict[str, Any], at: str) -> str:
    """The headline's table, those of the other columns folded, and what failed."""
    found = record["resolutions"][at]
    ranked = len(_rows(record, at))
    note = (
        f"{_count(found['seeds'], 'paired seed')}, {found['identities']:,} test {_kind(record)}. "
        f"Means in percent with 95 % intervals; differences in points, bold and starred where p "
        f"after Holm’s correction is {LEVEL:g} or less. Rank: among the {ranked} baselines and "
        "papers’ methods. Step and whole training: times the student alone; whole counts what must "
        "be trained first but for the teacher, which all rows of a seed share. (A step of another "
        "network: times that network alone.)"
    )
    failed = "".join(
        f"<li><b>{escape(row['title'])}</b>: {escape(_failures(row))}</li>\n"
        for row in found["rows"].values()
        if row.get("failed")
    )
    failed += "".join(
        f"<li><b>{escape(row['title'])}, tuned</b>: {escape(_failures(row['tuned']))}</li>\n"
        for row in found["rows"].values()
        if (row.get("tuned") or {}).get("failed")
    )
    failed += "".join(
        f"<li><b>{escape(row['title'])}, trial of ×{_fraction(float(m))}</b>: "
        f"{escape(_failures(trial))}</li>\n"
        for row in found["rows"].values()
        for m, trial in ((row.get("tuning") or {}).get("multipliers") or {}).items()
        if trial.get("failed")
    )
    text = f"<p>{escape(note)}</p>\n{_table(record, at, record['headline'])}"
    notes = "".join(
        f"<li><b>{escape(title)}</b>: {escape(told)}.</li>\n"
        for title, told in _notes(found).items()
    )
    text += f'<ul class="notes">\n{notes}</ul>\n' if notes else ""
    if failed:
        text += f'<p>Failed:</p>\n<ul class="failed">\n{failed}</ul>\n'
    for column, heading in record["columns"].items():
        some = any(_cell(row, column) for row in found["rows"].values())
        if column != record["headline"] and some:
            text += f"<details><summary>The same for {escape(heading)}</summary>\n"
            text += f"{_table(record, at, column)}</details>\n"
    titles = (found["rows"][n]["title"] for n in record.get("exempt", {}) if n in found["rows"])
    exempt = ", ".join(dict.fromkeys(titles))
    if exempt:
        text += f'<p>Not equal in all: {escape(exempt)} (see <a href="#exempt">below</a>).</p>\n'
    return text


def _table(record: dict[str, Any], at: str, column: str) -> str:
    first, second, found = record["reference"], record["second"], record["resolutions"][at]
    full = column == record["headline"]
    head = ["row", f"{record['columns'][column]} (%)", *["rank"] * full, f"minus {first}",
            f"minus {second}", "tuned (%)", f"tuned, minus {second}"]  # fmt: skip
    if full:
        head += ["tuned rank", "weight ×", "step", "whole training", "parameters", "MACs"]
    body: list[list[str]] = []
    rows = [(name, row) for part in _parts(record, at).values() for name, row in part.items()]
    for name, row in rows:
        colour = _colour(record, name, row).replace(INK, "var(--ink)")
        label = f'<i style="background:{colour}"></i>{escape(row["title"])}'
        if source := row.get("source"):
            label += f"<small>{escape(source)}</small>"
        if row["group"] in OTHER_ITEMS:
            label += f"<small>{OTHER_ITEMS[row['group']].lower()}</small>"
        cell, tuned = _cell(row, column), _cell(row.get("tuned"), column)
        if cell is None:
            why = "failed" if row.get("failed") else "not run"
            body.append([label, f"<small>{why}</small>", *[""] * (len(head) - 2)])
            continue
        mean, gain = _small(cell), _gain(cell, first)
        if few := _some(row, found):
            mean += f"<small>{few}</small>"
        if lost := row.get("failed"):
            mean += f"<br><small>{_count(len(lost), 'seed')} failed</small>"
        if not gain and (to := row.get("against")) in cell.get("minus", {}):
            title = found["rows"][to]["title"] if to in found["rows"] else to
            gain = f"{_gain(cell, to)}<br><small>minus {escape(title)}</small>"
        unranked = "" if row["group"] in RANKED else "<small>not ranked</small>"
        line = [label, mean, *[_rank(row) or unranked] * full, gain, _gain(cell, second)]
        none = "<small>not tuned</small>" if not row.get("tuning") else "<small>failed</small>"
        line += [_small(tuned) if tuned else none, _gain(tuned, second) if tuned else ""]
        if full:
            chosen = (row.get("tuning") or {}).get("chosen")
            line += [_rank(row.get("tuned") or {}), _fraction(chosen) if chosen else "",
                     _times(row, "step") or "<small>not timed</small>", _times(row, "whole"),
                     *_size(row)]  # fmt: skip
        body.append(line)
    return html_table(head, body)


def _gain(cell: dict[str, Any], other: str) -> str:
    gain = cell.get("minus", {}).get(other)
    if not gain:
        return ""
    value, *interval = _small(gain, "+.2f").split(" ", 1)
    value = f"<b>{value}*</b>" if _clear(gain) else f"{value}\N{PUNCTUATION SPACE}"
    return " ".join([value, *interval])


def _published(record: dict[str, Any]) -> str:
    body = [
        [
            f"{escape(x['paper'])} <small>{escape(x['recipe'])}</small>",
            f'<span class="wrap">{escape(x["what"])}</span>',
            escape(x["published"]),
            f'<span class="wrap">{escape(x.get("ours") or x.get("why") or "")}</span>',
            escape(x.get("today") or ""),
        ]
        for x in record.get("published") or []
    ]
    if not body:
        return ""
    if not any(line[4] for line in body):
        body = [line[:4] for line in body]
    head = ["recipe", "what it is", "published", "ours", "field today"][: len(body[0])]
    return (
        "<p>Every recipe that repeats a table or figure, the paper’s number and ours. Those of "
        "today come from larger networks and larger data, for scale.</p>\n"
        f'<div class="published">{html_table(head, body)}</div>'
    )


def _made(record: dict[str, Any]) -> str:
    facts = "".join(
        f"<div><dt>{escape(key)}</dt><dd>{escape(', '.join(map(str, values)))}</dd></div>"
        for key, values in (record.get("made_by") or {}).items()
    )
    text = f"<dl>{facts}</dl>\n" if facts else ""
    text += (
        "<p>A mean has Student’s t interval over its seeds; a difference is paired, over the seeds "
        "that both rows have, with a bootstrap over seeds and test identities, widened for few "
        "seeds; ranks and τ are of the same bootstrap, as it is. A verdict needs five "
        "paired seeds. p-values are corrected by Holm’s method: all baselines and papers against "
        "one row are "
        "a family, and so are all claims that one row is better than another.</p>\n"
    )
    exempt = record.get("exempt") or {}
    if exempt:
        body = [
            [escape(name), f"<code>{escape(field)}</code>",
             f'<span class="wrap">{escape(str(reason))}</span>']
            for name, fields in exempt.items() for field, reason in fields.items()
        ]  # fmt: skip
        text += '<h3 id="exempt">Declared exceptions</h3>\n<div class="published">'
        text += html_table(["row", "field", "reason"], body) + "</div>\n"
    if record.get("equal"):
        lines = "\n".join(f"{key}: {value}" for key, value in record["equal"].items())
        text += f"<details><summary>What was found equal in all rows: {len(record['equal'])} fields"
        text += f"</summary><pre>{escape(lines)}</pre></details>\n"
    return text


# -- plots ---------------------------------------------------------------------------------------


def _each(record: dict[str, Any], draw: Callable[[dict[str, Any], str], str]) -> str:
    """A part for every resolution, headed where there are several."""
    parts = {at: draw(record, at) for at in record["resolutions"]}
    heading = "<h3>{} px</h3>\n" if len(parts) > 1 else ""
    return "".join(heading.format(escape(at)) + text for at, text in parts.items() if text)


def _wide(lines: int) -> tuple[Figure, Axes]:
    """A figure with room for so many labels beside it."""
    figure = Figure(figsize=(4.3, min(6, max(2.9, 0.17 * lines + 0.8))), layout="constrained")
    return figure, figure.add_subplot()


def _labelled(figure: Figure, axes: Axes, points: Sequence[tuple[float, float, str, str]]) -> None:
    """Names of points (x, y, text, colour) right of the axes, moved apart, a hairline to each."""
    from sklearn.isotonic import isotonic_regression  # two seconds to import

    figure.draw_without_rendering()
    gap = 8.6 * figure.dpi / 72 / axes.get_window_extent().height  # of a line, in axes
    flat = axes.transAxes.inverted().transform(
        axes.transData.transform([(px, py) for px, py, *_ in points])
    )
    order = np.argsort(flat[:, 1], kind="stable")
    steps = gap * np.arange(len(order))
    # The least squares nearest heights that keep the order and the gap.
    places = isotonic_regression(flat[order, 1] - steps, y_min=0, y_max=max(0, 1 - steps[-1]))
    for k, place in zip(order, places + steps, strict=True):
        _, _, name, colour = points[k]
        axes.annotate(
            _plain(name, NAME), flat[k], (1.05, place), xycoords="axes fraction", va="center",
            textcoords="axes fraction", color=colour, fontsize=7.5, annotation_clip=False,
            arrowprops={"arrowstyle": "-", "lw": 0.4, "color": colour, "alpha": 0.6,
                        "relpos": (0, 0.5), "shrinkA": 1, "shrinkB": 2.5},
        )  # fmt: skip


def _cost(record: dict[str, Any], at: str) -> str:
    """The headline against the whole training's cost."""
    rows = {
        name: row for name, row in _rows(record, at).items()
        if (row.get("cost") or {}).get("whole") is not None
    }  # fmt: skip
    if len(rows) < 2:
        return ""
    figure, axes = _wide(len(rows))
    points = []
    for name, row in rows.items():
        x, cell = row["cost"]["whole"], row["cells"][record["headline"]]
        colour = _colour(record, name, row)
        if _sure(cell):
            axes.vlines(x, cell["low"], cell["high"], color=colour, lw=0.8, alpha=0.5)
        axes.plot(x, cell["value"], "o", ms=4, color=colour, zorder=3)
        points.append((x, cell["value"], row["title"], colour))
    spread = [x for x, *_ in points]
    if max(spread) > 4 * min(spread) > 0:
        axes.set_xscale("log")
        axes.minorticks_off()
        axes.set_xticks([t for t in (0.5, 1, 2, 3, 5, 10, 20, 50) if t <= 1.3 * max(spread)
                         and t >= min(spread) / 1.3])  # fmt: skip
    axes.xaxis.set_major_formatter("{x:g}×")
    axes.set(xlabel="training cost, times the student alone", title=f"{_heading(record)} (%)")
    _labelled(figure, axes, points)
    alt = f"{_heading(record)} against training cost of {len(rows)} rows; the numbers are above"
    return (
        "<p>The whole training with what it needs first (an assistant, a trunk), as multiples of "
        f'the student alone. Upper left is better.</p>\n<div class="one">{_image(figure, alt)}'
        "</div>\n"
    )


def _resolutions(record: dict[str, Any]) -> str:
    """The headline of each row at each resolution."""
    sizes = sorted(record["resolutions"], key=int)
    if len(sizes) < 2:
        return ""
    lines: dict[str, list[tuple[int, dict[str, Any]]]] = {}
    for at in sizes:
        for name in _rows(record, at):
            lines.setdefault(name, []).append((int(at), record["resolutions"][at]["rows"][name]))
    lines = {name: found for name, found in lines.items() if len(found) > 1}
    if not lines:
        return ""
    figure, axes = _wide(len(lines))
    points = []
    for name, found in lines.items():
        x = [at for at, _ in found]
        y = [_score(record, row) for _, row in found]
        colour = _colour(record, name, found[-1][1])
        own = colour in (OWN, SECOND, REFERENCE)
        axes.plot(x, y, "o-", ms=3, color=colour, lw=1.4 if own else 0.8, alpha=1 if own else 0.5,
                  zorder=3 if own else 2)  # fmt: skip
        points.append((x[-1], y[-1], found[-1][1]["title"], colour))
    axes.set_xscale("log", base=2)
    axes.minorticks_off()
    axes.set_xticks([int(at) for at in sizes], sizes)
    axes.set(xlabel="side of the student’s image (px)", title=f"{_heading(record)} (%)")
    _labelled(figure, axes, points)
    alt = f"{_heading(record)} of {len(lines)} rows at {_listed(sizes)} px; numbers are above"
    return f'<div class="one">{_image(figure, alt)}</div>\n'


def _panel(title: str, colour: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(2.1, 1.6), layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(_plain(title, NAME), color=colour)
    axes.tick_params(labelsize=8)
    return figure, axes


def _curves(record: dict[str, Any], at: str) -> str:
    """Development scores over epochs, a panel a row, none and KD behind."""
    curves, rows = (record.get("curves") or {}).get(at) or {}, record["resolutions"][at]["rows"]
    head = record["headline"]
    curves = {n: c for n, c in curves.items() if n in rows and c.get(head)}
    if not curves:
        return ""
    behind = [n for n in (record["reference"], record["second"]) if n in curves]
    every = np.concatenate([c[head] for c in curves.values()])
    text = ""
    for name in sorted(curves, key=lambda n: -curves[n][head][-1]):
        colour = _colour(record, name, rows[name])
        figure, axes = _panel(rows[name]["title"], colour)
        for other in (*behind, name):
            width, alpha = (1.6, 1.0) if other == name else (0.9, 0.55)
            axes.plot(curves[other]["epochs"], curves[other][head], lw=width, alpha=alpha,
                      color=_colour(record, other, rows[other]))  # fmt: skip
        last = max(curves[n]["epochs"][-1] for n in (*behind, name))  # a trunk's is longer
        axes.set(xlim=(0, 1.03 * last), ylim=(0.97 * every.min(), 1.03 * every.max()))
        axes.xaxis.set_major_locator(MaxNLocator(3, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(3))
        end = curves[name][head][-1]
        alt = f"{_heading(record)} of {rows[name]['title']} over epochs, at the end {end:.1f} %"
        text += _image(figure, alt)
    names = [f'<span class="{k}">{escape(rows[n]["title"])}</span>'
             for n, k in zip(behind, ("ref", "second"), strict=False)]  # fmt: skip
    line = f" Behind each: {_listed(names)}." if names else ""
    return text and (
        f"<p>{escape(_heading(record))} on {_kind(record)} of development (%) over epochs, seed 0, "
        f'best last score first.{line}</p>\n<div class="small">{text}</div>\n'
    )


def _similarity(record: dict[str, Any], at: str) -> str:
    """Cosines of pairs for the teacher, none, KD and the two best papers' methods."""
    found = (record.get("histograms") or {}).get(at) or {}
    rows = record["resolutions"][at]["rows"]
    teachers = [n for n in rows if rows[n]["group"] == "teacher"][:1]
    best = list(_rows(record, at, ("paper",)))[:2]
    names = [n for n in (*teachers, record["reference"], record["second"], *best) if n in found]
    names = list(dict.fromkeys(n for n in names if n in rows))
    if not names:
        return ""
    left = min(_first(found[n]) for n in names)
    text = ""
    for name in names:
        one, colour = found[name], _colour(record, name, rows[name])
        figure, axes = _panel(rows[name]["title"], colour)
        same, different, edges = (np.array(one[k]) for k in ("same", "different", "edges"))
        figures.pair_panel(axes, [same, different], one["threshold"], (colour, INK), bins=edges)
        axes.set(xlim=(left, 1), ylim=(0, None), yticks=[])
        axes.spines["left"].set_visible(False)
        axes.xaxis.set_major_locator(MaxNLocator(4))
        alt = f"Cosines of pairs, {rows[name]['title']}, threshold {one['threshold']:.2f}"
        text += _image(figure, alt)
    return (
        "<p>Cosines of test pairs, seed 0. Filled: the same person; line: different people; "
        f'dashed: the threshold.</p>\n<div class="small">{text}</div>\n'
    )


def _first(histogram: dict[str, Any]) -> float:
    """The left edge of the first bin with pairs in it."""
    some = np.add(histogram["same"], histogram["different"]) > 0
    return float(np.array(histogram["edges"])[int(some.argmax())]) if some.any() else -1.0


def _order(record: dict[str, Any], at: str) -> str:
    """Kendall's tau, and a line for each method from the published rank to ours."""
    found = record["resolutions"][at].get("kendall")
    if not found:
        return ""
    rows = record["resolutions"][at]["rows"]
    names = found["methods"]
    theirs, ours = (_ranks(found[k]) for k in ("published", "ours"))
    figure = Figure(figsize=(4.0, 0.24 * len(names) + 0.7), layout="constrained")
    axes = figure.add_subplot()
    for name, a, b in zip(names, theirs, ours, strict=True):
        row = rows.get(name, {"title": name, "group": "baseline"})
        colour = _colour(record, name, row)
        axes.plot([0, 1], [a, b], "o-", ms=4, lw=1.2, color=colour, clip_on=False)
        for side, y in ((0, a), (1, b)):
            title = _plain(row["title"], NAME)
            axes.annotate(f"{title}  {y}" if side == 0 else f"{y}  {title}",
                          (side, y), (-8 if side == 0 else 8, 0), textcoords="offset points",
                          ha="right" if side == 0 else "left", va="center", fontsize=8,
                          color=colour, annotation_clip=False)  # fmt: skip
    axes.set(xlim=(0, 1), ylim=(len(names) + 0.5, 0.5), xticks=[0, 1], yticks=[])
    axes.set_xticklabels(["published", "here"])
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.grid(False)
    p = f", p {_p(found['p'])}" if found.get("p") is not None else ""
    told = (
        f"Kendall’s τ of our order with {found.get('label') or 'the published one'}: "
        f"{_interval(found)}{p}; 1 is the same order, -1 the reverse."
    )
    alt = f"Ranks of {len(names)} methods, published and here"
    return f'<p>{escape(told)}</p>\n<div class="one">{_image(figure, alt)}</div>\n'


def _ranks(scores: Sequence[float]) -> list[int]:
    """1 for the highest score."""
    order = np.argsort(-np.asarray(scores, dtype=float), kind="stable")
    ranks = np.empty(len(order), dtype=int)
    ranks[order] = np.arange(1, len(order) + 1)
    return ranks.tolist()


def _tuning(record: dict[str, Any], at: str) -> str:
    """The development score over each method's multiplier, the chosen one marked."""
    text = ""
    for name, row in record["resolutions"][at]["rows"].items():
        trials = (row.get("tuning") or {}).get("multipliers") or {}
        scored = [(float(m), t["value"]) for m, t in trials.items() if t.get("value") is not None]
        scored.sort()
        if len(scored) < 2:
            continue
        chosen = row["tuning"].get("chosen")
        colour = _colour(record, name, row)
        figure, axes = _panel(row["title"], colour)
        x, y = zip(*scored, strict=True)
        axes.plot(x, y, "-", color=colour, lw=1.2)
        axes.plot(x, y, "o", ms=4, mfc=PAPER, mec=colour)
        for m, value in scored:
            if chosen is not None and abs(m - chosen) < 0.01 * m:
                axes.plot(m, value, "o", ms=6, color=colour)
        axes.set_xscale("log")
        axes.minorticks_off()
        axes.set_xticks(x, [f"×{_fraction(m)}" for m in x])
        axes.margins(0.15, 0.2)
        axes.yaxis.set_major_locator(MaxNLocator(3))
        shown = "; ".join(f"×{_fraction(m)}: {value:.1f}" for m, value in scored)
        text += _image(figure, f"Development score of {row['title']} by weight, {shown}")
    return text and (
        f"<p>{escape(_heading(record))} on {_kind(record)} of development (%) over multiples of "
        f"the default weight. Filled: the one that was chosen.</p>\n"
        f'<div class="small">{text}</div>\n'
    )


def _fraction(multiplier: float) -> str:
    """1/3 rather than .3333."""
    inverse = 1 / multiplier
    whole = multiplier < 1 and abs(inverse - round(inverse)) < 0.01
    return f"1/{round(inverse)}" if whole else f"{multiplier:.3g}"


def _image(figure: Figure, alt: str) -> str:
    return plot(figures.as_svg(figure, transparent=True), alt)


CSS = f"""
h4{{margin:1.6rem 0 .3rem;font-size:.9375rem}}
.found{{max-width:46rem;padding-left:1.2rem;font-size:1.0625rem}}
.found li,.notes li{{margin:.4rem 0}}
.notes{{max-width:46rem;padding-left:1.2rem;font-size:.875rem}}
.strips{{display:grid;grid-template-columns:minmax(0,11rem) minmax(0,1fr) 9.5rem;align-items:center;
 font-size:.875rem;margin:1rem 0;font-variant-numeric:tabular-nums}}
.strips svg{{width:100%;height:0;min-height:max(1.7rem,100%);display:block;overflow:visible}}
.strips svg[height]{{min-height:1.25rem}}
.strips .label{{padding-right:.8rem;line-height:1.25;overflow-wrap:anywhere}}
.strips .value{{padding-left:.9rem;white-space:nowrap}}
.strips b{{font-weight:500}}
line{{stroke:currentColor;stroke-width:1.6}} circle{{fill:currentColor;stroke:currentColor}}
svg text{{fill:currentColor;font-size:.75rem}} .axis{{opacity:.75}}
line.grid{{stroke-width:1;opacity:.14}} line.guide{{stroke-width:1.2;opacity:.65}}
line.ring{{stroke-width:1;opacity:.7}} circle.ring{{fill:var(--paper);stroke-width:1.4}}
.own{{color:{OWN}}} .ref{{color:{REFERENCE}}} .second{{color:{SECOND}}}
.confirmed{{color:{OTHERS[1]}}} .contradicted{{color:{OTHERS[4]}}}
.not-confirmed,.not-tested{{color:{REFERENCE}}}
.claims .strips{{grid-template-columns:minmax(0,24rem) minmax(0,1fr) 13rem}}
.claims .label{{padding-block:.5rem}}
.verdict{{font-weight:600;display:block}} .claims small{{display:block}}
.claims .value small{{display:inline}}
tbody th small{{display:block;font-weight:400}}
.wrap{{display:inline-block;white-space:normal;min-width:13rem;max-width:24rem;text-align:left}}
.published td,.published th{{text-align:left;vertical-align:top}}
.one{{max-width:37rem}}
.small{{display:grid;grid-template-columns:repeat(auto-fill,minmax(10.5rem,1fr));gap:.8rem 1rem}}
@media screen and (prefers-color-scheme:dark){{.second{{color:#4aa3df}}}}
@media screen and (min-width:68rem){{.scroll{{margin-right:calc(50% - min(50vw - 1rem,45rem))}}}}
@media (max-width:40rem){{
.strips{{grid-template-columns:minmax(0,6.6rem) minmax(0,1fr) 2.6rem}}
.strips .value{{padding-left:.5rem;text-align:right}} .strips .value small{{display:none}}
.claims .strips{{grid-template-columns:minmax(0,1fr)}}
.claims .label{{padding:1rem 0 0}} .claims .value{{text-align:left;padding:0}}
.claims .strips .value small{{display:inline}}
.small{{grid-template-columns:1fr 1fr}}
th:first-child{{min-width:7rem;white-space:normal}} th i{{float:left;margin-top:.4em}}
}}
@media print{{.small{{grid-template-columns:repeat(4,1fr)}} .strips>*,.one,tr{{break-inside:avoid}}
 section>p{{break-after:avoid}} .strips svg{{print-color-adjust:exact}} .wrap{{min-width:6rem}}
 table{{font-size:.5rem}} th,td{{padding:.2rem .35rem .2rem 0}} td small{{white-space:nowrap}}
 tbody th small{{display:none}} .published th small{{display:block}}}}
"""

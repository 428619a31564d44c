from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.text import Text

from shared.comparison import page

VOID = {"meta", "img", "br", "hr", "link", "input"}
Record = dict[str, Any]

TRAINED = {  # name: (title, group, rank-1, training cost)
    "none": ("Student alone", "baseline", 36.9, 1.0),
    "kd": ("KD", "baseline", 42.4, 1.04),
    "fitnet": ("FitNet", "baseline", 37.2, 1.15),
    "at": ("AT", "baseline", 38.1, 1.08),
    "pkt": ("PKT", "baseline", 41.3, 1.03),
    "sp": ("SP", "baseline", 40.2, 1.03),
    "rkd": ("RKD", "baseline", 39.5, 1.05),
    "cc": ("CC", "baseline", 37.0, 1.02),
    "vid": ("VID", "baseline", 39.9, 1.31),
    "crd": ("CRD", "baseline", 42.8, 1.22),
    "crcd": ("CRCD", "baseline", 42.6, 1.35),
    "dkd": ("DKD", "baseline", 43.1, 1.05),
    "adadistill": ("AdaDistill", "baseline", 42.9, 1.06),
    "crrcd": ("CRRCD", "paper", 42.35, 1.27),
    "horkd": ("HORKD", "paper", 43.76, 2.21),
    "aird": ("AIRD", "paper", 42.2, 1.09),
    "bt": ("BTNet, branch", "paper", 40.7, 2.9),
    "rel": ("EmbedKD, relative teacher", "paper", 38.4, 1.02),
    "crrcd: rcd": ("CRRCD without KD", "component", 39.0, 1.25),
    "horkd: direct": ("HORKD without its assistant", "component", 45.5, 1.1),
    "aird: shifted": ("AIRD", "shifted", 35.3, 1.09),
    "aird + facebn": ("AIRD + FaceBN", "shifted", 36.2, 1.09),
}
COLUMNS = {"rank1": "rank-1", "verification": "verification"}


def interval(value: float, half: float = 0.7) -> Record:
    return {"value": value, "low": value - half, "high": value + half}


def cells(score: float, name: str, group: str, rng: np.random.Generator) -> Record:
    found: Record = {}
    for column in COLUMNS:
        mean = score if column == "rank1" else 80 + score / 3
        minus = {}
        others = {"none": 36.9, "kd": 42.4}
        if group == "shifted":
            others = {"aird: shifted": 35.3}
        if group == "teacher" or name == "none":
            others = {}
        for other, base in others.items():
            if other != name:
                gain = score - base
                p = 0.001 if abs(gain) > 0.9 else 0.4
                minus[other] = interval(gain, 0.9) | {"p": p / 20, "holm": p}
        found[column] = interval(mean) | {
            "seeds": rng.normal(mean, 1, 10).tolist(), "minus": minus
        }  # fmt: skip
    return found


def make(*resolutions: str, drawn: int = 3) -> Record:
    """A full record of made-up numbers, in the shape that compare.py leaves; of so many rows with
    curves and trials, which take most of the time."""
    rng = np.random.default_rng(0)
    parts, curves, histograms = {}, {}, {}
    for at in resolutions or ("16",):
        shift = {"8": -14.0, "16": 0.0, "32": 9.0}[at]
        rows: Record = {}
        for title, score in (("teacher, HR", 64.06), ("teacher, LR", 41.2)):
            rows[title] = {
                "title": title, "paper": "baselines", "source": "", "group": "teacher",
                "against": "none", "parameters": 565264, "macs": 11700000, "seeds": list(range(10)),
                "failed": {}, "cells": cells(score, title, "teacher", rng), "rank": None,
                "tuning": None, "tuned": None, "cost": None,
            }  # fmt: skip
        order = sorted(TRAINED, key=lambda n: -TRAINED[n][2] * (TRAINED[n][1] in page.RANKED))
        for name, (title, group, score, cost) in TRAINED.items():
            score += shift * (1 + 0.1 * (len(name) % 3))
            rank = None
            if group in page.RANKED:
                k = 1 + order.index(name)
                rank = {"value": k, "low": max(1, k - 2), "high": min(18, k + 2)}
            tuning = tuned = None
            if group in page.RANKED and name != "none":
                few = list(TRAINED).index(name) <= drawn
                chosen = (1.0, 3.0, 0.3333)[len(name) % 3]
                trial = {
                    m: {"value": score - 5 - 2 * abs(np.log(float(m) / chosen)), "seeds": [0, 1],
                        "failed": {}}
                    for m in ("0.3333", "1", "3")[: 3 if few else 1]
                }
                tuning = {"multipliers": trial, "chosen": chosen}
                tuned = {"cells": cells(score + 0.7 * (chosen != 1), name, group, rng),
                         "seeds": list(range(10)), "failed": {}, "rank": rank}  # fmt: skip
            rows[name] = {
                "title": title, "paper": "baselines" if group == "baseline" else name.split(":")[0],
                "source": f"{title.split(',')[0]}, 2019", "group": group,
                "against": "aird: shifted" if group == "shifted" else "none", "parameters": 208720,
                "macs": 3300000, "seeds": list(range(10)), "failed": {},
                "cells": cells(score, name, group, rng), "rank": rank, "tuning": tuning,
                "tuned": tuned, "cost": {"step": 1 + (cost - 1) / 2, "whole": cost},
            }  # fmt: skip
        rows["at"] |= {"seeds": list(range(9)), "failed": {"9": "not finite: L_at at step 12"}}
        rows["at"]["tuning"]["multipliers"]["3"] = {
            "value": None, "seeds": [30.1, None], "failed": {"1": "no memory"}
        }  # fmt: skip
        rows["at"]["note"] = "its maps are averaged"
        rows["diverged"] = rows["cc"] | {
            "title": "Diverged", "cells": {}, "rank": None, "tuning": None, "tuned": None,
            "cost": None, "parameters": None, "macs": None, "seeds": [],
            "failed": {str(s): "loss is not finite at step 3: lower --optim.lr" for s in range(10)},
        }  # fmt: skip
        methods = [n for n, v in TRAINED.items() if v[1] == "baseline" and n not in ("none", "dkd")]
        kendall = interval(0.42, 0.3) | {
            "p": 0.03, "methods": methods, "published": rng.uniform(70, 76, len(methods)).tolist(),
            "ours": [rows[m]["cells"]["rank1"]["value"] for m in methods],
            "label": "CIFAR-100, Table I of CRRCD",
        }  # fmt: skip
        parts[at] = {"seeds": 10, "identities": 1000, "rows": rows, "kendall": kendall}
        epochs = list(range(4, 25, 4))
        curves[at] = {
            n: {"seed": 0, "epochs": epochs,
                "rank1": [(v[2] + shift) * (1 - 0.7 ** (e / 2)) for e in epochs]}
            for n, v in list(TRAINED.items())[:drawn]
        }  # fmt: skip
        edges = np.linspace(-1, 1, 61)
        middle = (edges[1:] + edges[:-1]) / 2

        def bell(centre: float, x: np.ndarray = middle) -> list[float]:
            high = np.exp(-(((x - centre) / 0.18) ** 2))
            return np.where(abs(x - centre) < 0.6, high, 0).tolist()

        histograms[at] = {
            n: {"edges": edges.tolist(), "same": bell(0.3 + v / 200), "different": bell(0.05),
                "threshold": 0.31}
            for n, v in [("teacher, HR", 64), *((n, v[2]) for n, v in TRAINED.items())]
        }  # fmt: skip
    first = next(iter(parts))
    claims = [
        ("relations help beyond KD", "CRRCD", ["crrcd", "kd"], -0.04, "not confirmed", 1.0),
        ("the assistant helps", "HORKD", ["horkd", "horkd: direct"], -1.73, "contradicted", 0.001),
        ("relative beats absolute", "EmbedKD", ["rel", "kd"], -4.0, "contradicted", 0.0004),
        ("contrastive relations beyond low-order ones", "CRRCD", ["crrcd", "rkd"], 2.85,
         "confirmed", 0.002),
        ("FaceBN helps under shift", "AIRD", ["aird + facebn", "aird: shifted"], 0.94, "confirmed",
         0.012),
    ]  # fmt: skip
    listed: list[Record] = [
        {"claim": c, "source": s, "rows": r, "resolution": first, "column": "rank1",
         **interval(v, 0.6), "p": h / 10, "holm": h, "verdict": d, "note": ""}
        for c, s, r, v, d, h in claims
    ]  # fmt: skip
    listed.append({
        "claim": "branches beat up-sampling at 7 px", "source": "BTNet", "rows": ["bt", "hr"],
        "resolution": first, "column": "rank1", "value": None, "low": None, "high": None, "p": None,
        "holm": None, "verdict": "not tested", "note": "no finished pair of seeds",
    })  # fmt: skip
    why = "not run: needs CASIA-WebFace and a GPU"
    return {
        "schema": 1, "recipe": "matched", "headline": "rank1", "reference": "none", "second": "kd",
        "columns": COLUMNS,
        "made_by": {"git": ["abcdef123456"], "precision": ["fp32"], "threads": ["1"],
                    "torch": ["2.15.0"], "machine": ["2 cores of a machine"]},
        "equal": {"data.name": "faces", "data.hr": 64, "data.kernel": "bicubic",
                  "data.antialias": True, "teacher.name": "small-teacher", "optim.method": "sgd",
                  "student.name": "small-student", "optim.epochs": 24},
        "exempt": {"bt": {"student.name": "a branch is a stem before the shared trunk"}},
        "resolutions": parts, "claims": listed, "curves": curves, "histograms": histograms,
        "published": [
            {"paper": "CRRCD", "recipe": "table5", "what": "LFW 16×16 (Table V)",
             "published": "95.25", "ours": "", "why": why, "today": ""},
            {"paper": "CRRCD", "recipe": "table7", "what": "TinyFace rank-1 (Table VII), of a "
             "ResNet18 that sees 16×16 px", "published": ".35", "ours": "", "why": why,
             "today": ".56–.76"},
            {"paper": "HORKD", "recipe": "embedded", "what": "faces drawn here", "published": "",
             "ours": "43.8 [42.7, 44.8]", "why": "", "today": ""},
        ],
    }  # fmt: skip


def put(folder: Path, record: Record) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "comparison.json").write_text(json.dumps(record))
    return folder


class Page(HTMLParser):
    """Elements and text of a page; fails on a tag that is closed out of order or not at all."""

    def __init__(self, content: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(content)
        self.close()
        assert self.open == [], f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len(dict(attrs)) == len(attrs), f"<{tag}> has an attribute twice"
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["style"]:
            self.text += data


def lines_of(content: str) -> list[str]:
    """The tables' rows as text."""
    found = [x.replace("</th>", "|", 1) for x in content.split("\n") if x.startswith("<tr><th>")]
    return [html.unescape(re.sub("<small>(?=[^<]*, 2019)|<.*?>", "|", x)) for x in found]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A comparison at one resolution with its page."""
    folder = put(tmp_path_factory.mktemp("compare"), make())
    assert page.write(folder) == folder / "report.html"
    return folder


def bare(record: Record) -> Record:
    """Without all that a record need not have: one seed, no interval, no cost, no extra part."""
    for part in record["resolutions"].values():
        part |= {"seeds": 1, "kendall": None}
        for row in part["rows"].values():
            row |= {"rank": None, "tuning": None, "tuned": None, "cost": None}
            for cell in row["cells"].values():
                cell |= {"low": None, "high": None, "minus": {}}
    return record | {"claims": [], "curves": {}, "histograms": {}, "published": [], "exempt": {},
                     "equal": {}, "made_by": {}}  # fmt: skip


def test_page_needs_no_network_and_no_script(finished: Path) -> None:
    content = (finished / "report.html").read_text()
    for tag, attributes in Page(content).tags:
        assert tag not in ("script", "link", "iframe", "object")
        for name in ("src", "href", "srcset", "action", "data"):
            assert (attributes.get(name) or "data:").startswith(("data:", "#"))
        assert not any(name.startswith("on") for name in attributes)
    assert "http:" not in content and "https:" not in content
    assert "url(" not in content and "@import" not in content


def test_every_number_of_the_record_stands_in_the_table(finished: Path) -> None:
    record = make()
    lines = lines_of((finished / "report.html").read_text())
    for row in record["resolutions"]["16"]["rows"].values():
        mine = (x for x in lines if row["title"] in x.split("|"))
        shown = " ".join(" / ".join(mine).replace("|", " ").split())
        for cells in (row["cells"], (row["tuned"] or {}).get("cells", {})):
            for cell in cells.values():
                assert "{value:.2f} [{low:.2f}, {high:.2f}]".format(**cell) in shown
        for cell in row["cells"].values():
            for gain in cell["minus"].values():
                star = r"\*" if gain["holm"] <= 0.05 else "\N{PUNCTUATION SPACE}?"
                found = re.escape("{value:+.2f}".format(**gain)) + star
                interval = re.escape("[{low:+.2f}, {high:+.2f}]".format(**gain))
                assert re.search(rf"{found}\s+{interval}", shown)
        if row["rank"]:
            assert "{value} [{low}, {high}]".format(**row["rank"]) in shown
        if row["cost"]:
            assert f"{row['cost']['step']:.2f}×" in shown
            assert f"{row['cost']['whole']:.2f}×" in shown
        if row["cells"]:
            assert f"{row['parameters']:,}" in shown and f"{row['macs'] / 1e6:,.1f} M" in shown


def test_a_row_far_outside_is_marked_at_the_edge_and_does_not_squeeze_the_others(
    tmp_path: Path, finished: Path
) -> None:
    record = make()
    record["resolutions"]["16"]["rows"]["cc"]["cells"]["rank1"] |= interval(0.3, 0.1)
    content = page.write(put(tmp_path, record)).read_text()
    assert "◀ ▶ beyond" in content and "◀ ▶" not in (finished / "report.html").read_text()
    forest = content.split("<h2>")[1].split("<h4>")[0]
    places = [float(x) for x in re.findall('<circle class="own" cx="(.*?)%"', forest)]
    assert len(places) == 5 and max(places) - min(places) > 10  # percent of the width


def test_failed_rows_are_told_with_their_reason(finished: Path) -> None:
    shown = Page((finished / "report.html").read_text()).text
    assert "Diverged: loss is not finite at step 3: lower --optim.lr (10 seeds)" in shown
    assert "AT: not finite: L_at at step 12 (seed 9)" in shown
    assert "AT, trial of ×3: no memory (seed 1)" in shown
    for form in (page.text(make(), "16"), page.markdown(make(), "16")):
        assert "loss is not finite at step 3" in form


def test_what_a_reader_must_know_of_a_row_stands_behind_the_table(finished: Path) -> None:
    assert "AT: its maps are averaged." in Page((finished / "report.html").read_text()).text
    assert page.markdown(make(), "16").endswith("\n\n- AT: its maps are averaged.")


def test_findings_are_counted_from_the_record(finished: Path) -> None:
    record = make()
    rows = record["resolutions"]["16"]["rows"]
    clear = [
        c["minus"]["kd"]["value"] > 0 for n, r in rows.items()
        if r["group"] in ("baseline", "paper") and n not in ("none", "kd") and r["cells"]
        and (c := r["cells"]["rank1"])["minus"]["kd"]["holm"] <= 0.05
    ]  # fmt: skip
    shown = Page((finished / "report.html").read_text()).text
    assert "Best rank-1: HORKD, 43.76" in shown and "its rank among 18 is 1 to 3" in shown
    assert f"{sum(clear)} of 16 beats KD, {len(clear) - sum(clear)} fall short" in shown
    assert "5 are tested here: 2 confirmed, 1 not confirmed, 2 contradicted" in shown


@pytest.mark.parametrize("sizes", [("16",), ("8", "16", "32")])
def test_headings_follow_the_parts_of_the_record(tmp_path: Path, sizes: tuple[str, ...]) -> None:
    expected = ["Every row, sorted", "The papers’ claims", "Table",
                "Accuracy against training cost", "Accuracy against resolution", "While they learn",
                "Similarity of pairs", "Our order and the published one", "Tuning",
                "What the papers print", "How this was made"]  # fmt: skip
    content = page.write(put(tmp_path, make(*sizes))).read_text()
    several = len(sizes) > 1
    assert re.findall("<h2>(.*?)</h2>", content) == [
        h for h in expected if several or h != "Accuracy against resolution"
    ]
    assert content.count(f"<h3>{sizes[-1]} px</h3>") == (7 if several else 0)


def test_absent_parts_are_left_out(tmp_path: Path) -> None:
    content = page.write(put(tmp_path, bare(make()))).read_text()
    assert re.findall("<h2>(.*?)</h2>", content) == ["Every row, sorted", "Table",
                                                     "How this was made"]  # fmt: skip
    shown = Page(content).text
    assert "Tuning" not in shown and "None" not in shown and "nan" not in shown
    for form in (page.text(bare(make()), "16"), page.markdown(bare(make()), "16")):
        assert "42.40" in form and "None" not in form and "nan" not in form


def test_a_comparison_of_nothing_but_failures_is_told(tmp_path: Path) -> None:
    record = bare(make())
    for row in record["resolutions"]["16"]["rows"].values():
        row |= {"cells": {}, "failed": {"0": "no memory"}, "parameters": None, "macs": None}
    shown = Page(page.write(put(tmp_path, record)).read_text()).text
    assert shown.count("no memory (seed 0)") == len(record["resolutions"]["16"]["rows"])


def test_names_from_the_record_cannot_break_the_page(tmp_path: Path) -> None:
    evil = '"><script>alert(1)</script>&amp;$\\frac{|'
    record = make()
    rows = record["resolutions"]["16"]["rows"]
    rows["kd"] |= {"title": evil, "source": evil}
    rows["diverged"]["failed"] = {"0": evil}
    rows["at"]["tuned"]["failed"] = {"0": evil}
    record |= {"recipe": evil, "made_by": {evil: [evil]}, "equal": {evil: evil}}
    record["exempt"] = {"kd": {evil: evil}}
    record["columns"] = {"rank1": evil, "verification": evil}
    for part in record["claims"] + record["published"]:
        part |= {key: evil for key in ("claim", "source", "paper", "recipe", "what", "published",
                                       "ours", "today", "note") if key in part}  # fmt: skip
    content = page.write(put(tmp_path, record)).read_text()
    parsed = Page(content)
    assert "<script" not in content and "script" not in [tag for tag, _ in parsed.tags]
    assert parsed.text.count(evil) > 20  # as text it is shown as it is


@pytest.mark.parametrize("cut", ["markdown", "claims"])
def test_markdown_has_a_line_for_each_with_equal_columns(cut: str) -> None:
    record = make()
    record["resolutions"]["16"]["rows"]["at"]["title"] = "a | b\nc"
    if cut == "markdown":
        tables = tables_of(page.markdown(record, "16"))
        rows = record["resolutions"]["16"]["rows"].values()
        apart = ("shifted", "crossed")  # in tables of their own, behind the others
        ordered = [row for row in rows if row["group"] not in apart]
        ordered += [row for group in apart for row in rows if row["group"] == group]
        names = [row["title"] for row in ordered]
    else:
        tables = tables_of(page.markdown_claims(record))
        names = [claim["claim"] for claim in record["claims"]]
    assert all(len({line.count("|") for line in lines}) == 1 for lines in tables)
    firsts = [line.split("|")[1].strip() for lines in tables for line in lines[2:]]
    assert firsts == [" ".join(name.split()).replace("|", "/") for name in names]


def tables_of(text: str) -> list[list[str]]:
    """The lines of each table."""
    found = [[line for line in part.split("\n") if line.startswith("|")]
             for part in text.split("\n\n")]  # fmt: skip
    return [lines for lines in found if lines]


def test_markdown_marks_what_holm_leaves() -> None:
    record = make()
    rows = record["resolutions"]["16"]["rows"].values()
    ours = [row for row in rows if row["group"] not in ("shifted", "crossed")]
    for line, row in zip(tables_of(page.markdown(record, "16"))[0][2:], ours, strict=True):
        minus = row["cells"]["rank1"]["minus"] if row["cells"] else {}
        against = [minus.get(other) for other in ("none", "kd")]
        assert line.count("**") == 2 * sum(g["holm"] <= 0.05 for g in against if g)


def test_text_fits_a_terminal_and_is_aligned() -> None:
    record = make()
    rows = record["resolutions"]["16"]["rows"]
    rows["vid"]["title"] = "a title that is much longer than a terminal has room for " * 3
    rows["diverged"]["failed"] = {"0": "a reason " * 40}
    lines = page.text(record, "16").split("\n")
    assert max(map(len, lines)) <= 140
    table = lines[2 : 2 + len(rows)]
    assert len({line.index(" [") for line in table if " [" in line}) == 1  # all of two digits
    kd = next(line.split() for line in table if line.startswith("KD "))
    assert kd[1:4] == ["42.40", "[41.70,", "43.10]"] and kd[4] == "+5.50*"


def test_same_record_gives_the_same_bytes(tmp_path: Path, finished: Path) -> None:
    again = page.write(put(tmp_path, make()))
    for name in ("report.html", "comparison.md"):
        assert (again.parent / name).read_bytes() == (finished / name).read_bytes()


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda path: path.unlink(), "no comparison here"),
        (lambda path: path.write_text(path.read_text()[:999]), "not readable as JSON"),
        (lambda path: path.write_text('{"schema": 99}'), "schema 99, this code reads 1"),
    ],
)
def test_unreadable_record_is_refused_in_one_line(
    tmp_path: Path, damage: Callable[[Path], Any], told: str
) -> None:
    folder = put(tmp_path, make())
    (folder / "report.html").write_text("old")
    damage(folder / "comparison.json")
    with pytest.raises(ValueError, match=told) as caught:
        page.write(folder)
    assert "\n" not in str(caught.value) and "comparison.json" in str(caught.value)
    assert (folder / "report.html").read_text() == "old"


def test_labels_beside_a_plot_do_not_overlap() -> None:
    figure, axes = page._wide(20)
    points = [(1.0 + k / 50, 40 + (k % 3) / 100, f"row {k}", "k") for k in range(20)]
    axes.plot([x for x, *_ in points], [y for _, y, *_ in points], "o")
    page._labelled(figure, axes, points)
    figure.draw_without_rendering()
    boxes = [Text.get_window_extent(label) for label in axes.texts]  # without their hairlines
    heights = sorted((box.y0, box.y1) for box in boxes)
    assert len(heights) == 20
    assert all(top <= bottom for (_, top), (bottom, _) in zip(heights, heights[1:], strict=False))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium")
@pytest.mark.parametrize("width", [390, 1280])
def test_browser_logs_no_error_and_page_does_not_scroll_sideways(
    tmp_path: Path, finished: Path, width: int
) -> None:
    """The second page shows the first in a frame so wide, which tells how wide it came out."""
    probe = "<script>parent.postMessage(document.documentElement.scrollWidth, '*')</script></body>"
    content = (finished / "report.html").read_text().replace("</body>", probe)
    content = content.replace("default-src", "script-src 'unsafe-inline'; default-src")
    (tmp_path / "probe.html").write_text(content)
    (tmp_path / "frame.html").write_text(
        "<script>onmessage = event => document.title = event.data</script><h1></h1>"
        f'<iframe src="probe.html" style="width:{width}px;border:0"></iframe>'
    )
    for path in (finished / "report.html", tmp_path / "frame.html"):
        done = subprocess.run(
            ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr",
             f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=5000", "--dump-dom",
             path.as_uri()],
            capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        assert "<h1>" in done.stdout and "CONSOLE" not in done.stderr
    found = re.search(r"<title>(\d+)</title>", done.stdout)
    assert found and int(found[1]) <= width

from __future__ import annotations

import base64
import html
import io
import json
import os
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from shared import cli, figures, report

VOID = {"meta", "img", "br", "hr", "link", "input"}
HR, LR, PAIRS = 8, 4, 40


class Page(HTMLParser):
    """Elements of a page; fails on a tag that is closed out of order or not at all."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == [], f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len(dict(attrs)) == len(attrs), f"<{tag}> has an attribute twice"
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["style"]:
            self.text += data


def config(**changes: Any) -> dict[str, Any]:
    data = {"name": "faces", "hr": HR, "lr": LR, "kernel": "area", "antialias": False}
    return {
        "schema": 1,
        "paper": "crrcd",
        "config": {
            "recipe": "smoke",
            "seed": 3,
            "data": data,
            "teacher": {"name": "small-teacher"},
            "student": {"name": "small-student"},
        },
        "precision": "fp32",
        "threads": 1,
        "ranks": 1,
        "device": "cpu",
        "machine": "a machine",
        "versions": {"python": "3.11", "torch": "2.15"},
        "git": "abcdef123456",
        "licence": "CC BY 4.0",
        "skipped": [],
    } | changes


def make(
    folder: Path,
    task: str = "faces",
    names: tuple[str, ...] = ("teacher, HR", "alone", "crrcd"),
    reference: str | None = "alone",
    phases: tuple[str, ...] = ("alone", "crrcd"),
) -> Path:
    """A run folder as a run leaves it, of random numbers."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    faces = task == "faces"
    columns = {"verification": "verification", "rank1": "rank-1"} if faces else {"top1": "top-1"}
    rows: dict[str, Any] = {}
    arrays: dict[str, Any] = {"points/labels": np.repeat(np.arange(4), 5)}
    for name in names:
        cells: dict[str, Any] = {}
        for column in columns:
            v: Any = dict(
                zip(("value", "low", "high"), rng.uniform(1, 99, 3).tolist(), strict=True)
            )
            if reference and name != reference:
                d = zip(("value", "low", "high"), rng.uniform(-9, 9, 3).tolist(), strict=True)
                v["difference"] = dict(d)
            cells[column] = v
        keys = ("verification", "auc", "margin", "overlap") if faces else ("top1", "top5")
        metrics = {k: float(rng.uniform(0, 1 if k in ("margin", "overlap") else 99)) for k in keys}
        counts = rng.integers(10**5, 10**7, 2).tolist()
        rows[name] = {"cells": cells, "metrics": metrics} | dict(
            zip(("parameters", "macs"), counts, strict=True)
        )
        arrays[f"{name}/points"] = rng.normal(size=(20, 6)).astype(np.float32)
        if faces:
            arrays[f"{name}/scores"] = rng.uniform(-1, 1, PAIRS).astype(np.float32)
            arrays[f"{name}/threshold"] = np.array(0.25)
            arrays[f"{name}/correct/verification"] = np.packbits(np.arange(PAIRS) % 3 > 0)
    if faces:
        arrays["pairs/same"] = np.arange(PAIRS) % 2 == 0
        arrays["examples/pair"] = np.array([2, 4, 1, 0, 3])  # wrong: 0 (same), 3 (different)
        shape = (5, 2, 3, HR, HR)
        arrays["examples/images"] = rng.integers(0, 256, shape).astype(np.uint8)
    record = {"schema": 1, "evaluation": "test", "task": task, "columns": columns}
    record |= {"headline": "rank1" if faces else "top1", "unit": "identities"}
    record |= {"reference": reference, "rows": rows}
    (folder / "config.json").write_text(json.dumps(config()))
    (folder / "results.json").write_text(json.dumps(record))
    np.savez_compressed(folder / "arrays.npz", **arrays)
    with open(folder / "metrics.jsonl", "w") as file:
        for phase in phases:
            for epoch in (1, 2, 3):
                step = epoch * 10 - 1
                terms = {"loss": 9 / epoch, "cls": 2.0, "kd": 0.0, "gradient": 100.0 / epoch**4}
                terms |= {"cos_pos": 0.5, "cos_neg": -0.5} if phase == "crrcd" else {}
                line = {"phase": phase, "step": step - 5, "epoch": epoch - 1, "lr": 0.1, **terms}
                file.write(json.dumps(line) + "\n")
                score = [40.25, 61.5, 61.5][epoch - 1]
                found = {"phase": phase, "step": step, "epoch": epoch, "development": score}
                file.write(json.dumps(found) + "\n")
    return folder


def change(folder: Path, name: str, edit: Callable[[Any], Any]) -> None:
    path = folder / name
    path.write_text(json.dumps(edit(json.loads(path.read_text()))))


def without(folder: Path, *starts: str) -> None:
    with np.load(folder / "arrays.npz") as stored:
        kept: Any = {k: v for k, v in stored.items() if not k.startswith(starts)}
    np.savez_compressed(folder / "arrays.npz", **kept)


def sources(page: Page, kind: str) -> list[str]:
    found = [a["src"] or "" for tag, a in page.tags if tag == "img"]
    return [s for s in found if s.startswith(f"data:image/{kind};base64,")]


@pytest.fixture(scope="module", params=["faces", "objects"])
def finished(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of each task, with its report."""
    folder = make(tmp_path_factory.mktemp("runs") / "smoke-20260203-040506", request.param)
    assert report.write(folder) == folder / "report.html"
    return folder


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first two coordinates instead of t-SNE, which takes most of the time."""
    monkeypatch.setattr(figures, "embedded", lambda points: points[:, :2])


def test_page_needs_no_network_and_no_script(finished: Path) -> None:
    text = (finished / "report.html").read_text()
    page = Page(text)
    for tag, attributes in page.tags:
        assert tag not in ("script", "link", "iframe", "object")
        for name in ("src", "href", "srcset", "action", "data"):
            assert (attributes.get(name) or "data:").startswith("data:")
    assert "url(" not in text and "@import" not in text
    for source in sources(page, "svg+xml"):
        svg = base64.b64decode(source.split(",")[1]).decode()
        assert not re.search(r'(?:href|src)="(?!#|data:)', svg)


def test_every_image_is_described_and_every_plot_is_also_a_png(finished: Path) -> None:
    page = Page((finished / "report.html").read_text())
    assert all(a["alt"] for tag, a in page.tags if tag == "img")
    pngs = list((finished / "figures").glob("*.png"))
    assert len(pngs) == len(sources(page, "svg+xml")) > 0
    assert all(p.read_bytes().startswith(b"\x89PNG") for p in pngs)


def test_every_number_of_results_stands_rounded_in_its_row(finished: Path) -> None:
    text = (finished / "report.html").read_text()
    record = json.loads((finished / "results.json").read_text())
    lines = [html.unescape(re.sub("<.*?>", "", x)) for x in text.split("\n") if "<tr>" in x]
    for name, row in record["rows"].items():
        shown = " ".join(x for x in lines if x.startswith(name))
        for cell in row["cells"].values():
            assert "{value:.2f} [{low:.2f}, {high:.2f}]".format(**cell) in shown
            if "difference" in cell:
                gain = "{value:+.2f} [{low:+.2f}, {high:+.2f}]".format(**cell["difference"])
                assert gain in shown
        for key, value in row["metrics"].items():
            assert f"{value:.{3 if key in ('margin', 'overlap') else 2}f}" in shown
        assert f"{row['parameters']:,}" in shown
        assert f"{row['macs'] / 1e6:,.1f} M" in shown


def test_only_columns_with_differences_have_one_more(tmp_path: Path, plain: None) -> None:
    folder = make(tmp_path / "run")

    def bare(record: dict[str, Any]) -> dict[str, Any]:
        for row in record["rows"].values():
            row["cells"]["rank1"].pop("difference", None)
        return record

    change(folder, "results.json", bare)
    head, *lines = re.findall("<tr>(.*?)</tr>", report.write(folder).read_text())[:4]
    names = re.findall("<th>(.*?)</th>", head)
    assert names[1:4] == ["verification (%)", "minus alone", "rank-1 (%)"]
    assert all(line.count("<td>") == len(names) - 1 for line in lines)


def test_facts_of_the_run_are_told(finished: Path) -> None:
    text = Page((finished / "report.html").read_text()).text
    for fact in ("8 px down to 4 px", "small-teacher", "small-student", "fp32", "a machine",
                 "abcdef123456", "CC BY 4.0", "03 February 2026, 04:05", "last epoch"):  # fmt: skip
        assert fact in text


def test_sections_of_faces_are_absent_for_objects(finished: Path) -> None:
    text = (finished / "report.html").read_text()
    faces = json.loads((finished / "results.json").read_text())["task"] == "faces"
    headings = re.findall("<h2>(.*?)</h2>", text)
    expected = ["Result", "Training", "Similarity of pairs", "Embeddings", "Example pairs",
                "Configuration"]  # fmt: skip
    dropped = () if faces else ("Similarity of pairs", "Example pairs")
    assert headings == [h for h in expected if h not in dropped]


def test_best_epoch_is_the_first_of_equal_development_scores(finished: Path) -> None:
    text = Page((finished / "report.html").read_text()).text
    assert text.count("2 of 3 (61.50)") == 2  # alone and crrcd; the teacher has none


def test_only_terms_that_are_not_zero_have_a_panel(finished: Path) -> None:
    names = {p.stem for p in (finished / "figures").glob("training-*.png")}
    terms = ("loss", "cls", "cos", "gradient", "lr", "development")
    assert names == {f"training-{term}" for term in terms}


def test_same_run_gives_the_same_bytes(tmp_path: Path) -> None:
    folder = make(tmp_path / "run", "objects", names=("crrcd",), reference=None, phases=())
    assert report.write(folder).read_bytes() == report.write(folder).read_bytes()


def test_example_pairs_show_the_pixels_the_student_saw(tmp_path: Path, plain: None) -> None:
    folder = make(tmp_path / "run", names=("crrcd",), reference=None, phases=())
    images = np.load(folder / "arrays.npz")["examples/images"].astype(np.float64)
    text = report.write(folder).read_text()
    files = [base64.b64decode(s.split(",")[1]) for s in sources(Page(text), "png")]
    shown = [np.asarray(Image.open(io.BytesIO(f))).transpose(2, 0, 1) for f in files]
    for k, pair in enumerate(images):  # in the order of the headings below
        high, small = shown[4 * k : 4 * k + 2], shown[4 * k + 2 : 4 * k + 4]
        for side in (0, 1):
            assert (high[side] == pair[side]).all()
            blocks = pair[side].reshape(3, LR, HR // LR, LR, HR // LR)
            assert np.abs(small[side] - blocks.mean(axis=(2, 4))).max() <= 0.5 + 1e-4
    headings = [html.unescape(h) for h in re.findall("<h3>(.*?)</h3>", text)]
    assert headings == [
        "Right: the same person, taken for the same person",
        "Right: different people, taken for different people",
        "Wrong: the same person, taken for different people",
        "Wrong: different people, taken for the same person",
    ]
    assert [part.count("<figure>") for part in text.split("<h3>")[1:]] == [2, 1, 1, 1]


def test_example_pairs_of_two_sizes_show_each_image_at_its_own(tmp_path: Path, plain: None) -> None:
    """As BTNet's headline has them: the first image at 8 px (HR here), the second at 4."""
    folder = make(tmp_path / "run", names=("crrcd",), reference=None, phases=())
    with np.load(folder / "arrays.npz") as stored:
        arrays: Any = {k.replace("/verification", "/8&4"): v for k, v in stored.items()}
    np.savez_compressed(folder / "arrays.npz", **arrays)
    text = (folder / "results.json").read_text()
    text = text.replace('"verification": {"value"', '"8&4": {"value"')
    results = json.loads(text) | {"columns": {"8&4": "8&4"}, "headline": "8&4"}
    (folder / "results.json").write_text(json.dumps(results))
    page = Page(report.write(folder).read_text())
    files = [base64.b64decode(s.split(",")[1]) for s in sources(page, "png")]
    shown = [np.asarray(Image.open(io.BytesIO(f))).transpose(2, 0, 1) for f in files]
    for k, pair in enumerate(arrays["examples/images"]):
        assert (shown[4 * k + 2] == pair[0]).all() and shown[4 * k + 3].shape == (3, LR, LR)
    assert "below at 8 and 4 px" in " ".join(page.text.split())


def test_names_from_the_run_cannot_break_the_page(tmp_path: Path, plain: None) -> None:
    evil = '"><script>alert(1)</script>&amp;$\\frac{'
    folder = make(tmp_path / "run", names=(evil,), reference=evil, phases=(evil,))
    values = config(licence=evil, machine=evil)
    values["config"] |= {"recipe": evil, "student": {"name": evil}}
    values["config"]["data"]["name"] = evil
    (folder / "config.json").write_text(json.dumps(values))
    text = report.write(folder).read_text()
    page = Page(text)
    assert "<script" not in text and "script" not in [tag for tag, _ in page.tags]
    assert page.text.count(evil) > 6  # as text it is shown as it is
    assert any(evil in (a.get("alt") or "") for _, a in page.tags)


@pytest.mark.parametrize("task", ["faces", "objects"])
def test_optional_parts_may_be_missing(tmp_path: Path, plain: None, task: str) -> None:
    one = make(tmp_path / "one", task, names=("crrcd",), reference=None, phases=())
    assert "<th>minus" not in report.write(one).read_text()
    bare = make(tmp_path / "bare", task, names=("crrcd",), reference="crrcd")
    (bare / "metrics.jsonl").unlink()
    without(bare, "crrcd/", "points", "pairs", "examples")
    page = Page(report.write(bare).read_text())
    assert sources(page, "svg+xml") == sources(page, "png") == []
    assert "best epoch" not in page.text


def test_terms_of_another_paper_and_phases_without_scores_are_drawn(
    tmp_path: Path, plain: None
) -> None:
    folder = make(tmp_path / "run", "objects", names=("crrcd",), reference=None, phases=())
    lines = [{"phase": "horkd", "step": s, "epoch": s // 10, "L_2": 1.0 + s} for s in range(0, 900)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    report.write(folder)
    assert [p.name for p in (folder / "figures").glob("training-*")] == ["training-l-2.png"]


def test_many_points_are_thinned_evenly(
    tmp_path: Path, plain: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "EMBEDDED", 7)
    folder = make(tmp_path / "run", "objects", names=("crrcd",), reference=None, phases=())
    assert "t-SNE of 7 images of 4 classes" in Page(report.write(folder).read_text()).text


@pytest.mark.parametrize("name", ["config.json", "results.json", "arrays.npz"])
@pytest.mark.parametrize("damage", ["missing", "torn"])
def test_unfinished_run_is_refused_in_one_line(tmp_path: Path, name: str, damage: str) -> None:
    folder = make(tmp_path / "run", "objects")
    (folder / "report.html").write_text("old")
    if damage == "missing":
        (folder / name).unlink()
    else:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=re.escape(name)) as caught:
        report.write(folder)
    assert "\n" not in str(caught.value)
    assert (folder / "report.html").read_text() == "old"


def test_other_schema_and_torn_metrics_are_refused(tmp_path: Path) -> None:
    folder = make(tmp_path / "run", "objects")
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"phase": "crr')
    with pytest.raises(ValueError, match="line 13 is not readable"):
        report.write(folder)
    change(folder, "results.json", lambda record: record | {"schema": 99})
    with pytest.raises(ValueError, match="schema 99, this code reads 1"):
        report.write(folder)


def test_interrupted_write_leaves_the_old_report(
    tmp_path: Path, plain: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make(tmp_path / "run", "objects", names=("crrcd",), reference=None, phases=())
    (folder / "report.html").write_text("old")
    replace = os.replace

    def full(source: Any, target: Any) -> None:
        if Path(target).name == "report.html":
            raise OSError(28, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="report.html: cannot be written"):
        report.write(folder)
    assert (folder / "report.html").read_text() == "old"
    assert [p.name for p in folder.iterdir() if p.name.startswith(".")] == []


def test_command_line_ends_with_one_line_and_code_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["report", str(tmp_path)])
    with pytest.raises(SystemExit) as stop:
        cli.guarded(report.main)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and "config.json" in error

from __future__ import annotations

import io
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image
from scipy.stats import t as student_t

from shared import cli, figures
from shared.evaluate.intervals import bootstrap

PAIRS, CLASSES, EACH, DIM = 400, 5, 8, 6
ROWS = ("teacher, LR", "alone", "own")


def make(folder: Path, value: float = 90.0, task: str = "faces", **changes: Any) -> Path:
    """A run folder as a run leaves it, of random numbers; changes: of its configuration."""
    rng = np.random.default_rng(round(value * 100))
    folder.mkdir(parents=True)
    config = {"n": 64, "tau": 0.1, "policy": "supervised", "folder": str(folder)}
    config |= {"optim": {"lr": 0.1, "milestones": [1, 2]}, "report": True} | changes
    same = rng.random(PAIRS) < 0.4
    arrays: dict[str, Any] = {
        "groups/verification": np.arange(PAIRS) // 8,
        "pairs/same": same,
        "points/labels": np.repeat(10 * np.arange(CLASSES), EACH),
    }
    rows = {}
    for k, row in enumerate(ROWS):
        cell = {"value": value + k, "low": value + k - 1.5, "high": value + k + 1.0}
        rows[row] = {"cells": {"verification": cell}, "metrics": {}, "parameters": 1, "macs": 1}
        arrays[f"{row}/scores"] = rng.normal(0.1 + 0.3 * same, 0.2).clip(-1, 1).astype(np.float32)
        arrays[f"{row}/threshold"] = np.array(0.25)
        spread = rng.normal(size=(CLASSES, DIM)).repeat(EACH, axis=0)
        arrays[f"{row}/points"] = (spread + rng.normal(size=spread.shape)).astype(np.float32)
    record = {"schema": 1, "evaluation": "LFW", "task": task, "unit": "identities", "rows": rows}
    record |= {"columns": {"verification": "verification"}, "reference": "alone"}
    write(folder / "config.json", {"schema": 1, "paper": "own", "config": config})
    write(folder / "results.json", record)
    np.savez(folder / "arrays.npz", **arrays)
    return folder


def write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value))


def change(folder: Path, name: str, edit: Callable[[dict[str, Any]], None]) -> None:
    value = json.loads((folder / name).read_text())
    edit(value)
    write(folder / name, value)


def change_arrays(folder: Path, **changes: Any) -> None:
    """Arrays replaced by their key with _ for /; None takes one away."""
    with np.load(folder / "arrays.npz") as stored:
        arrays = {k: changes.get(k.replace("/", "_"), v) for k, v in stored.items()}
    np.savez(folder / "arrays.npz", **{k: v for k, v in arrays.items() if v is not None})


def two_means() -> dict[str, dict[str, np.ndarray]]:
    rng = np.random.default_rng(1)
    return {
        "before": {"LFW": rng.normal(0.3, 0.1, 50), "CASIA": rng.normal(0.1, 0.2, 70)},
        "after": {"LFW": rng.normal(0.1, 0.1, 50), "CASIA": rng.normal(0.1, 0.2, 70)},
    }


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first two coordinates instead of t-SNE, which takes most of the time."""
    monkeypatch.setattr(figures, "embedded", lambda points: points[:, :2])


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that are written, as matplotlib holds them."""
    kept: list[Figure] = []
    save = figures._save

    def keep(figure: Figure, out: Path, statistics: dict[str, Any]) -> Path:
        kept.append(figure)
        return save(figure, out, statistics)

    monkeypatch.setattr(figures, "_save", keep)
    return kept


def numbers(png: Path) -> dict[str, Any]:
    return json.loads(png.with_suffix(".json").read_text())


def arrays_of(folder: Path) -> dict[str, np.ndarray]:
    with np.load(folder / "arrays.npz") as stored:
        return dict(stored)


def draw(kind: str, tmp_path: Path, out: Path) -> Path:
    if kind == "means":
        return figures.means(two_means(), out)
    if kind == "curve":
        runs = [make(tmp_path / f"run{n}", 90 + n / 64, n=n) for n in (64, 256)]
        return figures.curve(runs, "n", out, arm="own")
    run = make(tmp_path / "run")
    return getattr(figures, kind)(run, ["alone", "own"], out)


# -- files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["curve", "similarity", "tsne", "means"])
def test_png_svg_and_json_are_whole(tmp_path: Path, kind: str) -> None:
    png = draw(kind, tmp_path, tmp_path / "new" / "fig-0.1")  # no suffix: the point is the name's
    assert png == tmp_path / "new" / "fig-0.1.png"
    found = sorted(p.name for p in png.parent.iterdir())
    assert found == ["fig-0.1.json", "fig-0.1.png", "fig-0.1.svg"]
    with Image.open(png) as image:
        inches = 3.5 if kind == "curve" else 7
        assert image.width == round(200 * inches) and image.height > 400
        assert [round(x) for x in image.info["dpi"]] == [200, 200]
        grey = np.asarray(image.convert("L"))
    assert (grey[[0, -1]] == 255).all() and (grey[:, [0, -1]] == 255).all()  # nothing is cut off
    assert 0.005 < (grey < 200).mean() < 0.5  # ink, and paper
    root = ElementTree.parse(png.with_suffix(".svg")).getroot()
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert float(root.attrib["width"].removesuffix("pt")) == 72 * inches
    assert numbers(png)["figure"] == kind


def test_same_run_gives_the_same_bytes(tmp_path: Path) -> None:
    run = make(tmp_path / "run")
    for name in ("a", "b"):
        figures.tsne(run, ["own"], tmp_path / name)
    for suffix in ("png", "svg", "json"):
        assert (tmp_path / f"a.{suffix}").read_bytes() == (tmp_path / f"b.{suffix}").read_bytes()


@pytest.mark.parametrize("rows", [1, 2, 3, 5])
def test_titles_captions_and_legends_lie_inside_and_apart(
    tmp_path: Path, plain: None, drawn: list[Figure], rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(figures, "rendered", lambda figure, dpi: (b"", b""))  # drawn below
    run = make(tmp_path / "run")
    names = [f"row {k}" for k in range(rows)]

    def more(record: dict[str, Any]) -> None:
        record["rows"] = {name: record["rows"]["own"] for name in names}

    change(run, "results.json", more)
    pairs = ("scores", "same")  # as many as LFW's, whose count is wide
    arrays = {k: np.tile(v, 15) if k.endswith(pairs) else v for k, v in arrays_of(run).items()}
    own = {k.partition("/")[2]: v for k, v in arrays.items() if k.startswith("own/")}
    arrays |= {f"{name}/{key}": v for name in names for key, v in own.items()}
    np.savez(run / "arrays.npz", **arrays)  # type: ignore[arg-type]
    figures.tsne(run, names, tmp_path / "tsne")
    figures.similarity(run, names, tmp_path / "similarity")
    values = two_means()["before"]
    figures.means(dict.fromkeys(names, values), tmp_path / "means")
    for figure in drawn:
        figure.set_dpi(200)
        FigureCanvasAgg(figure).draw()
        texts = [axes.title for axes in figure.axes] + [figure._supxlabel]  # type: ignore[attr-defined]
        texts += [axes._left_title for axes in figure.axes] + figure.legends  # type: ignore[attr-defined]
        boxes = [x.get_window_extent() for x in texts if x.get_window_extent().width > 1]
        assert len(boxes) >= rows + 1
        for k, box in enumerate(boxes):
            assert box.x0 >= 0 and box.y0 >= 0
            assert box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1
            assert not any(box.overlaps(other) for other in boxes[:k])


# -- similarity ----------------------------------------------------------------------------------


def test_margin_and_overlap_are_those_of_a_plain_loop(tmp_path: Path, drawn: list[Figure]) -> None:
    run = make(tmp_path / "run")
    shown = numbers(figures.similarity(run, ["own", "alone"], tmp_path / "fig"))
    arrays = arrays_of(run)
    same = [bool(s) for s in arrays["pairs/same"]]
    assert (shown["positive pairs"], shown["negative pairs"]) == (sum(same), PAIRS - sum(same))
    assert list(shown["rows"]) == ["own", "alone"] and shown["evaluation"] == "LFW"
    for row, axes in zip(("own", "alone"), drawn[0].axes, strict=True):
        counts = {True: [0] * 100, False: [0] * 100}
        sums = {True: 0.0, False: 0.0}
        for score, kind in zip(map(float, arrays[f"{row}/scores"]), same, strict=True):
            counts[kind][min(99, math.floor((score + 1) * 50))] += 1
            sums[kind] += score
        shares = {k: [c / sum(counts[k]) for c in counts[k]] for k in counts}
        overlap = sum(min(a, b) for a, b in zip(shares[True], shares[False], strict=True))
        margin = sums[True] / sum(same) - sums[False] / (PAIRS - sum(same))
        assert shown["rows"][row]["overlap"] == pytest.approx(overlap, abs=1e-12)
        assert shown["rows"][row]["margin"] == pytest.approx(margin, abs=1e-7)
        assert shown["rows"][row]["threshold"] == 0.25
        assert f"margin {margin:.3f}, overlap {overlap:.3f}" in axes.get_title("left")
        for patch, kind in zip(axes.patches, (True, False), strict=True):
            bars = patch.get_data().values  # type: ignore[attr-defined]
            np.testing.assert_allclose(bars, [100 * s for s in shares[kind]], atol=1e-9)
    labels = [text.get_text() for text in drawn[0].legends[0].get_texts()]
    assert labels == [f"same person ({sum(same):,} pairs)",
                      f"different people ({PAIRS - sum(same):,} pairs)"]  # fmt: skip


def test_another_table_of_the_run_is_drawn_by_its_name(tmp_path: Path) -> None:
    run, other = make(tmp_path / "run"), make(tmp_path / "other", 80)
    (other / "results.json").rename(run / "results-lr-hr.json")
    (other / "arrays.npz").rename(run / "results-lr-hr.npz")
    plain = numbers(figures.similarity(run, ["own"], tmp_path / "a"))
    named = numbers(figures.similarity(run, ["own"], tmp_path / "b", name="results-lr-hr"))
    assert named["table"] == "results-lr-hr" and named["rows"] != plain["rows"]
    with pytest.raises(ValueError, match=r"results-hr\.npz: .*tables .*: results, results-lr-hr\)"):
        figures.similarity(run, ["own"], tmp_path / "c", name="results-hr")


# -- t-SNE ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["faces", "objects"])
def test_agreement_and_silhouette_are_those_of_a_plain_loop(
    tmp_path: Path, plain: None, task: str
) -> None:
    run = make(tmp_path / "run", task=task)
    shown = numbers(figures.tsne(run, ["own"], tmp_path / "fig"))
    arrays = arrays_of(run)
    labels = arrays["points/labels"].tolist()
    points = [[float(x) for x in p] for p in arrays["own/points"]]
    if task == "faces":  # compared by their directions
        points = [[x / math.hypot(*p) for x in p] for p in points]
    hits, silhouettes, alike = [], [], 0
    for i, p in enumerate(points):
        far = {j: math.dist(p, q) for j, q in enumerate(points) if j != i}
        hits.append(100.0 * (labels[min(far, key=lambda j: far[j])] == labels[i]))
        alike += sum(labels[j] == labels[i] for j in far)
        means = {
            c: np.mean([d for j, d in far.items() if labels[j] == c]) for c in sorted({*labels})
        }
        a, b = means.pop(labels[i]), min(means.values())
        silhouettes.append((b - a) / max(a, b))
    row = shown["rows"]["own"]
    groups = labels if task == "faces" else None  # whole identities are drawn, or images
    for found, items in ((row["1-NN"], hits), (row["silhouette"], silhouettes)):
        assert found["mean"] == pytest.approx(np.mean(items), abs=1e-9)
        expected = bootstrap(items, groups)
        assert found == pytest.approx(vars(expected), abs=1e-9)
    chance = 100 * alike / (len(points) * (len(points) - 1))
    assert shown["chance of 1-NN"] == pytest.approx(chance)
    assert (shown["images"], shown["of"], shown["classes"]) == (40, 40, CLASSES)
    assert row["dimensions"] == DIM


def test_ties_of_the_nearest_count_by_their_share() -> None:
    points = np.array([[0.0], [1.0], [-1.0], [5.0]])  # the first has two nearest ones
    found = figures.clusters(points, np.array([0, 0, 1, 1]))["1-NN"]
    assert found.mean == 100 * (0.5 + 1 + 0 + 0) / 4


def test_apart_and_mixed_classes_have_the_agreement_they_must() -> None:
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(4), 50)
    apart = figures.clusters(100.0 * labels[:, None] + rng.random((200, 3)), labels)
    mixed = figures.clusters(rng.random((200, 3)), labels)
    assert apart["1-NN"].mean == 100 and apart["silhouette"].mean > 0.95
    assert mixed["1-NN"].mean < 40 and abs(mixed["silhouette"].mean) < 0.1


def test_map_keeps_classes_that_stand_apart_together() -> None:
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(4), 30)
    points = 20.0 * np.eye(4, 8)[labels] + rng.normal(size=(120, 8))
    flat = figures.embedded(points)
    assert (flat == figures.embedded(points.copy())).all()
    assert figures.clusters(flat, labels)["1-NN"].mean == 100


def test_collapsed_and_few_points_do_not_end_the_run() -> None:
    for points in (np.ones((20, 6)), np.zeros((20, 6)), np.zeros((20, 1)), np.eye(4), np.eye(5)):
        for x in (points, figures.directions(points)):
            flat = figures.embedded(x)
            assert flat.shape == (len(points), 2) and np.isfinite(flat).all()


def test_more_points_than_allowed_are_thinned_evenly(
    tmp_path: Path, plain: None, drawn: list[Figure], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(figures, "POINTS", 39)
    shown = numbers(figures.tsne(make(tmp_path / "run"), ["own"], tmp_path / "fig"))
    assert (shown["images"], shown["of"]) == (20, 40)
    sizes = [len(np.asarray(c.get_offsets())) for c in drawn[0].axes[0].collections]
    assert sizes == [EACH // 2] * CLASSES


def test_hundred_classes_differ_and_only_few_are_numbered() -> None:
    for count in (25, 26, 100):
        axes = Figure().subplots()
        labels = np.repeat(np.arange(count), 2)
        figures.class_panel(axes, np.random.default_rng(0).random((2 * count, 2)), labels)
        looks = {
            (c.get_paths()[0].vertices.tobytes(), c.get_facecolor().tobytes(),  # type: ignore[union-attr]
             c.get_edgecolor().tobytes())  # type: ignore[union-attr]
            for c in axes.collections
        }  # fmt: skip
        assert len(looks) == count
        assert [t.get_text() for t in axes.texts] == [str(c) for c in range(count) if count < 26]


# -- curve ---------------------------------------------------------------------------------------


def test_curve_shows_the_cells_of_each_run_in_order(tmp_path: Path, drawn: list[Figure]) -> None:
    runs = [make(tmp_path / f"n{n}", 80 + k, n=n) for k, n in enumerate((256, 64, 1024))]
    shown = numbers(figures.curve(runs, "n", tmp_path / "fig", arm="own"))
    assert [p["value"] for p in shown["points"]] == [64, 256, 1024]
    assert [p["run"] for p in shown["points"]] == [str(runs[k]) for k in (1, 0, 2)]
    for point, value in zip(shown["points"], (81, 80, 82), strict=True):  # as `make` puts them
        assert point["arm"] == {"value": value + 2, "low": value + 0.5, "high": value + 3}
        assert point["reference"] == {"value": value + 1, "low": value - 0.5, "high": value + 2}
    assert (shown["items"], shown["units"], shown["resampled"]) == (PAIRS, PAIRS // 8, "identities")
    axes = drawn[0].axes[0]
    lines = {str(line.get_label()): np.asarray(line.get_xydata()) for line in axes.lines}
    np.testing.assert_array_equal(lines["own"], [[64, 83], [256, 82], [1024, 84]])
    np.testing.assert_array_equal(lines["alone"], [[64, 82], [256, 81], [1024, 83]])
    band, bars = axes.collections
    corners = set(map(tuple, np.asarray(band.get_paths()[0].vertices).tolist()))
    assert corners == {(64, 80.5), (256, 79.5), (1024, 81.5), (64, 83), (256, 82), (1024, 84)}
    segments = [np.asarray(s).tolist() for s in bars.get_segments()]  # type: ignore[attr-defined]
    assert segments[0] == [[64, 81.5], [64, 84]]
    assert axes.get_ylabel() == "verification (%)" and "LFW: n = 400 of 50 identities" in str(
        drawn[0]._supxlabel.get_text()  # type: ignore[attr-defined]
    )


@pytest.mark.parametrize("values, scale", [((10, 100), "linear"), ((10, 101), "log"),
                                           ((0.0, 0.3), "linear"), ((-1, 20), "linear"),
                                           ((0.02, 0.3), "log")])  # fmt: skip
def test_more_than_a_decade_has_a_log_axis(
    tmp_path: Path, drawn: list[Figure], values: tuple[float, float], scale: str
) -> None:
    runs = [make(tmp_path / str(v), tau=v) for v in values]
    figures.curve(runs, "tau", tmp_path / "fig", arm="own")
    axes = drawn[0].axes[0]
    assert axes.get_xscale() == scale
    assert [float(t.get_text().replace("−", "-")) for t in axes.get_xticklabels()] == list(values)


def test_words_stand_apart_in_the_order_given(tmp_path: Path, drawn: list[Figure]) -> None:
    runs = [make(tmp_path / v, 80 + k, policy=v) for k, v in enumerate(("unsupervised", "hard"))]
    shown = numbers(figures.curve(runs, "policy", tmp_path / "fig", arm="own"))
    assert [p["value"] for p in shown["points"]] == ["unsupervised", "hard"]
    axes = drawn[0].axes[0]
    (points,) = axes.lines
    assert points.get_linestyle() == "None"
    assert np.asarray(points.get_xydata()).tolist() == [[0, 82], [1, 83]]
    assert [t.get_text() for t in axes.get_xticklabels()] == ["unsupervised", "hard"]
    low, high = axes.get_ylim()
    assert low < 79.5 and high > 84
    boxes = [(b.get_y(), b.get_y() + b.get_height()) for b in axes.patches]  # type: ignore[attr-defined]
    assert boxes == [(79.5, 82), (80.5, 83)]


def test_fields_that_differ_besides_are_told(tmp_path: Path, drawn: list[Figure]) -> None:
    runs = [make(tmp_path / "a", optim={"lr": 0.1, "milestones": [1]}),
            make(tmp_path / "b", n=128, optim={"lr": 0.05, "milestones": [1]})]  # fmt: skip
    assert numbers(figures.curve(runs, "n", tmp_path / "c", arm="own"))["also different"] == [
        "optim.lr"  # and not the folder
    ]
    assert "also different: optim.lr" in drawn[0]._supxlabel.get_text().replace("\n", " ")  # type: ignore[attr-defined]
    shown = numbers(figures.curve(runs, "optim.lr", tmp_path / "d", arm="alone"))
    assert [p["value"] for p in shown["points"]] == [0.05, 0.1]
    assert all("reference" not in p for p in shown["points"])  # it is the arm itself


def test_runs_that_make_no_curve_are_refused(tmp_path: Path) -> None:
    a, b, again = (make(tmp_path / name, n=n) for name, n in (("a", 64), ("b", 128), ("c", 64)))
    other = make(tmp_path / "d", n=256)
    change_arrays(other, groups_verification=np.arange(PAIRS))
    bad: list[tuple[list[Path], dict[str, str], str]] = [
        ([a], {}, "two runs or more, got 1"),
        ([a, tmp_path / "none"], {}, r"none: no finished run here \(results.json is missing\)"),
        ([a, again], {}, f"n is 64 in two runs: {a}, {again}"),
        ([a, other], {}, f"{other}: not scored on the same items as {a}"),
        ([a, b], {"field": "nn"}, "no field 'nn'; did you mean n?"),
        ([a, b], {"arm": "crd"}, r"no row 'crd' \(there are: teacher, LR; alone; own\)"),
        ([a, b], {"column": "rank1"}, "no column 'rank1' in this table"),
    ]
    for runs, changed, message in bad:
        kinds: Any = {"field": "n", "arm": "own"} | changed
        with pytest.raises(ValueError, match=message) as caught:
            figures.curve(runs, out=tmp_path / "fig", **kinds)
        assert "\n" not in str(caught.value)
    assert list(tmp_path.glob("fig*")) == []


# -- means ---------------------------------------------------------------------------------------


def test_distance_and_difference_are_those_of_plain_loops(tmp_path: Path) -> None:
    groups = two_means()
    shown = numbers(figures.means(groups, tmp_path / "fig"))
    assert list(shown["panels"]) == ["before", "after"]
    for panel, found in shown["panels"].items():
        a, b = (groups[panel][k].tolist() for k in ("LFW", "CASIA"))
        # the area between the two distribution functions, step by step
        steps, distance = sorted(a + b), 0.0
        for left, right in zip(steps, steps[1:], strict=False):
            f, g = (sum(v <= left for v in values) / len(values) for values in (a, b))
            distance += (right - left) * abs(f - g)
        assert found["Wasserstein-1"] == pytest.approx(distance, rel=1e-9)
        mean, square = {}, {}
        for name, values in (("LFW", a), ("CASIA", b)):
            mean[name] = math.fsum(values) / len(values)
            variance = math.fsum((v - mean[name]) ** 2 for v in values) / (len(values) - 1)
            square[name] = variance / len(values)
            assert found[name]["n"] == len(values)
            assert found[name]["mean"] == pytest.approx(mean[name])
            assert found[name]["sd"] == pytest.approx(math.sqrt(variance))
        gap, error = mean["LFW"] - mean["CASIA"], math.sqrt(sum(square.values()))
        # Welch and Satterthwaite's degrees of freedom
        freedom = error**4 / (square["LFW"] ** 2 / 49 + square["CASIA"] ** 2 / 69)
        half = student_t.ppf(0.975, freedom) * error
        expected = {"mean": gap, "low": gap - half, "high": gap + half}
        assert found["difference of means"] == pytest.approx(expected)


def test_histograms_of_means_hold_every_image(tmp_path: Path, drawn: list[Figure]) -> None:
    figures.means(two_means(), tmp_path / "fig")
    for axes in drawn[0].axes:
        totals = [p.get_data().values.sum() for p in axes.patches]  # type: ignore[attr-defined]
        np.testing.assert_allclose(totals, 100)
    labels = [text.get_text() for text in drawn[0].legends[0].get_texts()]
    assert labels == ["LFW (n = 50)", "CASIA (n = 70)"]


@pytest.mark.parametrize(
    "groups, message",
    [
        ({}, "name one row or more"),
        ({"a": {"LFW": [0.0, 1.0]}}, "needs the same two"),
        ({"a": {"x": [0.0, 1.0], "y": [0.0, 1.0]}, "b": {"x": [0.0, 1.0], "z": [0.0, 1.0]}}, "b: "),
        ({"a": {"x": [0.0, math.nan], "y": [0.0, 1.0]}}, "a, x: needs finite"),
        ({"a": {"x": [0.0, math.inf], "y": [0.0, 1.0]}}, "a, x: needs finite"),
        ({"a": {"x": [0.0, 1.0], "y": [0.5, 0.5]}}, "a, y: .*not all the same"),
        ({"a": {"x": [[0.0, 1.0]], "y": [0.0, 1.0]}}, "a, x: "),
    ],
)
def test_means_that_make_no_figure_are_refused(
    tmp_path: Path, groups: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        figures.means(groups, tmp_path / "fig")


# -- bad runs, command line ----------------------------------------------------------------------


@pytest.mark.parametrize("draw_", [figures.similarity, figures.tsne])
def test_unfinished_and_damaged_runs_are_refused_in_one_line(
    tmp_path: Path, plain: None, draw_: Callable[..., Path]
) -> None:
    similar = draw_ is figures.similarity
    nan = np.full(PAIRS, math.nan, np.float32)
    labels = np.repeat(np.arange(CLASSES), EACH)
    damage: list[tuple[Callable[[Path], object], str]] = [
        (lambda run: (run / "results.json").unlink(), "results.json is missing"),
        (lambda run: (run / "arrays.npz").unlink(), "arrays.npz is missing"),
        (lambda run: (run / "results.json").write_text("{"), "not readable as JSON"),
        (lambda run: (run / "arrays.npz").write_bytes(b"PK\x03\x04"), "arrays.npz: not readable"),
        (lambda run: change(run, "results.json", lambda r: r.update(schema=9)), "schema 9"),
        (lambda run: change(run, "results.json", lambda r: r["rows"].pop("own")), "no row 'own'"),
    ]
    if similar:
        damage += [
            (lambda run: change_arrays(run, pairs_same=None), "no pairs in this table"),
            (lambda run: change_arrays(run, own_scores=None), "no pair scores of row 'own'"),
            (lambda run: change_arrays(run, own_scores=nan), "own/scores: NaN or infinite"),
            (lambda run: change_arrays(run, own_scores=np.ones(3)), "row 'own': same: shape"),
            (lambda run: change_arrays(run, own_scores=np.full(PAIRS, 2.0)), "'own': .* cosines"),
        ]
    else:
        damage += [
            (lambda run: change_arrays(run, points_labels=None), "no points in this table"),
            (lambda run: change_arrays(run, own_points=None), "no points of row 'own'"),
            (lambda run: change_arrays(run, own_points=np.ones((3, DIM))), "do not fit"),
            (lambda run: change_arrays(run, points_labels=0 * labels), "40 points of 1 classes"),
            (lambda run: change_arrays(run, points_labels=labels[:2]), "2 points"),
        ]
    for k, (harm, message) in enumerate(damage):
        run = make(tmp_path / f"run{k}")
        harm(run)
        with pytest.raises(ValueError, match=message) as caught:
            draw_(run, ["alone", "own"], tmp_path / "fig")
        assert str(run) in str(caught.value) and "\n" not in str(caught.value)
    for rows in ([], ["own", "own"]):
        with pytest.raises(ValueError, match="one row or more, none twice"):
            draw_(make(tmp_path / f"rows{len(rows)}"), rows, tmp_path / "fig")
    assert list(tmp_path.glob("fig*")) == []


def test_damaged_bytes_of_the_arrays_are_one_line(tmp_path: Path) -> None:
    run = make(tmp_path / "run")
    packed = io.BytesIO()
    np.savez_compressed(packed, **arrays_of(run))  # type: ignore[arg-type]
    whole = packed.getvalue()
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(60):
        damaged = bytearray(whole)
        for at in rng.integers(0, len(whole), 3):
            damaged[at] ^= 1 << rng.integers(8)
        (run / "arrays.npz").write_bytes(damaged)
        try:
            figures.read_arrays(run / "arrays.npz")
        except ValueError as error:
            refused += 1
            assert "arrays.npz: not readable" in str(error)
    assert refused > 30  # the rest hit what nobody reads
    for at, value in ((8, 1), (10, 99)):  # encrypted; packed by an unknown method
        damaged = bytearray(whole)
        damaged[whole.index(b"PK\1\2") + at] = value  # of the central directory
        (run / "arrays.npz").write_bytes(damaged)
        with pytest.raises(ValueError, match=r"arrays\.npz: not readable"):
            figures.read_arrays(run / "arrays.npz")


def test_command_line_draws_beside_the_run_or_where_told(
    tmp_path: Path, plain: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = str(make(tmp_path / "a")), str(make(tmp_path / "b", n=128))
    calls = {
        f"similarity {a} --rows alone own": f"{a}/figures/similarity.png",
        f"tsne {a} --rows own --out {tmp_path}/map": f"{tmp_path}/map.png",
        f"curve {a} {b} --field n": f"{a}/figures/curve-n.png",
        f"curve {a} {b} --field n --arm alone --out {tmp_path}/x": f"{tmp_path}/x.png",
    }
    for call, path in calls.items():
        monkeypatch.setattr("sys.argv", ["figures", *call.split()])
        cli.guarded(figures.main)
        assert capsys.readouterr().out == f"{path}\n" and Path(path).is_file()
    assert numbers(Path(a) / "figures" / "curve-n.png")["arm"] == "own"  # the last row


@pytest.mark.parametrize(
    "call",
    [
        "similarity RUN --rows nobody",
        "tsne RUN/none --rows own",
        "tsne RUN --rows own --name results-hr",
        "curve RUN --field n",
        "curve RUN RUN --field n",
        "curve RUN/none RUN --field n",
    ],
)
def test_command_line_ends_with_one_line_and_code_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], call: str
) -> None:
    run = make(tmp_path / "run")
    monkeypatch.setattr("sys.argv", ["figures", *call.replace("RUN", str(run)).split()])
    with pytest.raises(SystemExit) as stop:
        cli.guarded(figures.main)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert re.fullmatch("error: [^\n]*\n", error)

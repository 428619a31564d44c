"""Figures of BTNet hold what plain loops and the paper say; tables as text hold every number."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from btnet import figures
from btnet.model import Branch, parts
from shared.models import create


@pytest.fixture(scope="module")
def trunk() -> torch.nn.Module:
    with torch.device("meta"):  # counted, not run
        return create("iresnet50")


def numbers(png: Path) -> dict[str, Any]:
    """What is written beside a figure, which has to be whole."""
    with Image.open(png) as image:
        image.verify()
    assert png.suffix == ".png" and b"</svg>" in png.with_suffix(".svg").read_bytes()
    return json.loads(png.with_suffix(".json").read_text())


def noise(count: int, side: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (count, 3, side, side), generator=generator, dtype=torch.uint8)


# -- Fig. 1 --------------------------------------------------------------------------------------


def test_bound_of_a_parabola_is_its_closed_form(tmp_path: Path) -> None:
    side = 15
    x = torch.arange(side).double()
    level = (x**2)[None, :] + (2 * x[:, None] - 7).clamp(min=0)  # bent by 2 a column, 1 a row
    images = level.to(torch.uint8).expand(4, 3, side, side)
    drawn = figures.interpolation_error(images, tmp_path / "fig1", [3, 5, 15])
    points = {p["resolution"]: p for p in numbers(drawn)["points"]}
    for r in (3, 5, 15):
        expected = (side / r) ** 2 / 8 * (2 + 1) / 255
        assert points[r]["bound"] == pytest.approx(expected, rel=1e-4)
    assert points[15]["mean"] == points[15]["max"] == 0


def test_a_line_of_samples_in_points_is_off_by_the_bound(tmp_path: Path) -> None:
    """A parabola, of which every 4th pixel is kept: linear interpolation is as wrong as said."""
    side, h = 13, 4
    level = torch.arange(side).double() ** 2 / 255
    kept = np.interp(np.arange(side), np.arange(0, side, h), level[::h])
    images = (level * 255).to(torch.uint8).expand(1, 3, side, side)
    drawn = figures.interpolation_error(images, tmp_path / "fig1", [1])
    at_1 = numbers(drawn)["points"][0]["bound"]
    assert at_1 * (h / side) ** 2 == pytest.approx(abs(kept - level.numpy()).max(), rel=1e-4)


def test_bound_and_residual_are_those_of_plain_loops_and_pillow(tmp_path: Path) -> None:
    images, side, sizes = noise(3, 12), 12, (4, 9)
    drawn = figures.interpolation_error(images, tmp_path / "fig1", sizes)
    points = {p["resolution"]: p for p in numbers(drawn)["points"]}

    bend, lost = 0.0, {r: np.zeros(2) for r in sizes}
    for image in images.double() / 255:
        luma = (0.299 * image[0] + 0.587 * image[1] + 0.114 * image[2]).numpy()
        f_xx = f_yy = 0.0
        for y in range(side):
            for x in range(side):
                if 0 < x < side - 1:
                    f_xx = max(f_xx, abs(luma[y, x - 1] - 2 * luma[y, x] + luma[y, x + 1]))
                if 0 < y < side - 1:
                    f_yy = max(f_yy, abs(luma[y - 1, x] - 2 * luma[y, x] + luma[y + 1, x]))
        bend += (f_xx + f_yy) / len(images)
        plane = Image.fromarray(luma.astype(np.float32), "F")
        for r in sizes:  # Pillow's bilinear is antialiased on the way down
            back = plane.resize((r, r), Image.Resampling.BILINEAR)
            back = back.resize((side, side), Image.Resampling.BILINEAR)
            off = abs(np.asarray(back, dtype=np.float64) - luma)
            lost[r] += np.array([off.mean(), off.max()]) / len(images)
    for r in sizes:
        assert points[r]["bound"] == pytest.approx((side / r) ** 2 / 8 * bend, rel=1e-5)
        assert [points[r]["mean"], points[r]["max"]] == pytest.approx(lost[r], abs=1e-5)


def test_error_is_a_mean_over_images_however_many_there_are(tmp_path: Path) -> None:
    images = noise(2, 6)
    few = numbers(figures.interpolation_error(images, tmp_path / "few", [2]))["points"]
    many = images.repeat(150, 1, 1, 1)  # more than are taken at a time
    found = numbers(figures.interpolation_error(many, tmp_path / "many", [2]))
    assert found["images"] == 300
    for key in ("bound", "mean", "max"):
        assert found["points"][0][key] == pytest.approx(few[0][key], rel=1e-6)


@pytest.mark.parametrize(
    ("images", "sizes", "said"),
    [
        (torch.zeros(1, 3, 8, 8), [4], "float32"),
        (torch.zeros(1, 1, 8, 8, dtype=torch.uint8), [4], "3, S, S"),
        (torch.zeros(0, 3, 8, 8, dtype=torch.uint8), [4], "N at least 1"),
        (torch.zeros(1, 3, 8, 6, dtype=torch.uint8), [4], "8x6 px"),
        (torch.zeros(1, 3, 2, 2, dtype=torch.uint8), [1], "3 px or more"),
        (noise(1, 8), [], "one or more"),
        (noise(1, 8), [0, 4], "from 1"),
        (noise(1, 8), [4, 9], "8 px"),
    ],
)
def test_images_and_sizes_that_make_no_figure_are_refused(
    tmp_path: Path, images: torch.Tensor, sizes: list[int], said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        figures.interpolation_error(images, tmp_path / "fig1", sizes)


# -- Fig. 5, 6, 7 --------------------------------------------------------------------------------


def test_fig5_has_the_published_shares_and_the_counts_behind_them(
    tmp_path: Path, trunk: torch.nn.Module
) -> None:
    found = numbers(figures.storage((7, 14, 28, 112), trunk, tmp_path / "fig5"))
    points = {p["resolution"]: p for p in found["points"]}
    stored = {7: 21_302_848, 14: 2_293_568, 28: 490_688, 112: 43_590_848}
    assert {r: p["stored"] for r, p in points.items()} == stored
    assert {p["full"] for p in points.values()} == {43_590_848}
    assert found["all"] == {"stored": sum(stored.values()), "full": 4 * 43_590_848}
    published = {r: p["published share"] for r, p in points.items() if "published share" in p}
    assert published == {7: 48.9, 28: 1.1}  # Sec. 3.4
    for r, share in published.items():
        assert round(points[r]["share"], 1) == share


def test_fig6_has_the_macs_of_every_resolution(tmp_path: Path, trunk: torch.nn.Module) -> None:
    found = numbers(figures.cost((7, 28, 112), trunk, tmp_path / "fig6.png"))
    points = {p["resolution"]: p for p in found["points"]}
    for r, giga in {7: 1.517, 28: 5.236, 112: 6.309}.items():
        assert points[r]["macs"] / 1e9 == pytest.approx(giga, rel=0.01)
        assert points[r]["share"] == pytest.approx(100 * giga / 6.309, rel=0.01)


def test_a_trunk_of_another_size_has_no_published_numbers(tmp_path: Path) -> None:
    small = create("small-teacher", size=48)
    found = numbers(figures.storage((6, 12, 24, 48), small, tmp_path / "fig5"))
    assert not any("published share" in p for p in found["points"])
    assert numbers(figures.cost((12, 48), small, tmp_path / "fig6"))["points"][1]["share"] == 100


@pytest.mark.parametrize(("part", "millions"), figures.ENDS.items())
def test_fig7_every_published_count_is_that_of_a_branch_that_ends_there(
    trunk: torch.nn.Module, part: str, millions: str
) -> None:
    names = [name for name, _ in parts(trunk)] + ["head"]
    branch = Branch(trunk, 14, end=names.index(part))
    digits = len(millions.partition(".")[2])
    assert f"{branch.stored_parameters / 1e6:.{digits}f}" == millions


def point(name: str, setting: str, parameters: int, accuracy: float) -> dict[str, Any]:
    return {"name": name, "setting": setting, "parameters": parameters, "accuracy": accuracy,
            "low": accuracy - 1, "high": accuracy + 2}  # fmt: skip


def test_fig7_shows_both_settings_in_the_order_of_parameters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    points = [
        point("head", "48&12", 900_000, 80.0), point("head", "12&12", 900_000, 70.0),
        point("stage1.1", "48&12", 20_000, 75.0), point("stage1.1", "12&12", 20_000, 65.0),
    ]  # fmt: skip
    kept: list[Any] = []
    rendered = figures.figures.rendered

    def keep(figure: Any, dpi: int) -> tuple[bytes, bytes]:
        kept.append(figure)
        return rendered(figure, dpi)

    monkeypatch.setattr(figures.figures, "rendered", keep)
    drawn = figures.ends(points, tmp_path / "deep" / "ends.png")
    assert drawn == tmp_path / "deep" / "ends.png" and numbers(drawn)["points"] == points
    axes, bars = kept[0].axes
    lines = {line.get_label(): list(line.get_ydata()) for line in axes.get_lines()}
    assert lines == {"48&12": [75, 80], "12&12": [65, 70]}
    assert [bar.get_height() for bar in bars.patches] == [0.02, 0.9]
    ticks = [tick.get_text() for tick in bars.get_xticklabels()]
    assert ticks == ["stage1.1\n0.02 M", "head\n0.9 M"]


def test_fig7_of_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="one point or more"):
        figures.ends([], tmp_path / "ends")


# -- tables as text ------------------------------------------------------------------------------

# Table 1 of the paper, first and last cross-resolution setting, and gains that it prints
TABLE1 = {"hr": (57.75, 95.90), "mr": (65.85, 96.05), "bt": (86.10, 96.65)}
GAINS = {"mr": {"112&7": 1.0, "112&28": 1.0}, "bt": {"112&7": 3.5, "112&28": math.nan}}


def write_run(folder: Path, **more: Any) -> Path:
    columns = ("112&7", "112&28")
    rows = {
        model: {"cells": {c: {"value": v, "low": v - 0.5, "high": v + 0.25}
                          for c, v in zip(columns, values, strict=True)}}
        for model, values in TABLE1.items()
    }  # fmt: skip
    record = {"schema": 1, "evaluation": "test", "epoch": "last", "unit": "identities",
              "columns": {c: c for c in columns}, "rows": rows}  # fmt: skip
    (folder / "results.json").write_text(json.dumps(record | more))
    return folder


def cells(line: str) -> list[str]:
    return re.split(" {2,}", line)


def test_table_has_a_line_for_each_setting_and_gains_only_where_there_are_some(
    tmp_path: Path,
) -> None:
    text = figures.table(write_run(tmp_path, gains=GAINS), "results").split("\n")
    assert cells(text[0].strip()) == ["hr [95 %]", "mr [95 %]", "gain", "bt [95 %]", "gain"]
    assert cells(text[2]) == [
        "112&7", "57.75 [57.25, 58.00]", "65.85 [65.35, 66.10]", "+1.00", "86.10 [85.60, 86.35]",
        "+3.50",
    ]  # fmt: skip
    assert cells(text[3])[-2:] == ["+1.00", "96.65 [96.15, 96.90]"]  # not a number: left out
    ends = {text[0].find("bt [95 %]") + 9, text[2].find("86.35]") + 6, text[3].find("96.90]") + 6}
    assert len(ends) == 1  # in columns
    assert "test split, last epoch; intervals by bootstrap over identities" in text
    assert "gain" not in figures.table(write_run(tmp_path))


def test_table_of_an_unfinished_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no finished run"):
        figures.table(tmp_path)
    write_run(tmp_path, schema=99)
    with pytest.raises(ValueError, match="schema 99"):
        figures.table(tmp_path)


def test_costs_have_a_line_for_each_resolution_in_order() -> None:
    def cost(parameters: int, macs: int, speed: float) -> dict[str, float]:
        return {"parameters": parameters, "macs": macs, "images_per_second": speed}

    record = {
        "hr": {"112": cost(43_590_848, 6_309_000_000, 12.4)},
        "bt": {"112": cost(43_590_848, 6_309_000_000, 12.4), "7": cost(21_302_848, 1_517, 1234.4)},
    }
    text = figures.costs(record).split("\n")
    heads = ("parameters", "MACs", "images/s")
    assert re.split(" {2,}", text[0]) == ["px", *(f"{m}: {h}" for m in record for h in heads)]
    assert text[2].split() == ["7", "21,302,848", "0.0", "M", "1,234"]
    assert text[3].split() == ["112", *2 * ["43,590,848", "6,309.0", "M", "12"]]
    assert text[2].index("21,302,848") == text[3].rindex("43,590,848")  # below each other

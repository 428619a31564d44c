"""Every table and figure is one command, here on small files in the published formats."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from embedkd.config import RECIPES
from embedkd.train import main
from shared import cli
from tests.conftest import ROOT
from tests.shared.data import trees

# Recall@1 of EmbedKD's tables, as the README gives them.
PUBLISHED = {
    "table1": "51.7 53.1 56.2 54.9 58.0 55.0 57.4 55.0 58.1 58.9 "
    "46.7 46.9 74.3 70.6 76.6 71.3 76.4 71.1 76.4 74.8",
    "table2": "61.7 68.0 67.7 69.5",
    "table3": "51.0 51.7 56.0 53.9 57.2 49.8 55.5 58.1",
    "table5": "27.5 44.6 58.9",
    "table6": "44.4 45.7 46.2 53.7 37.5 58.6 58.9 71.0 43.6 43.0 45.9 54.8 54.0 57.7 61.9 67.8",
}
RUN = (
    "--optim.epochs", "1", "--optim.batch", "16", "--teacher.optim.epochs", "1",
    "--teacher.optim.batch", "16", "--images-per-class", "4", "--teacher.images-per-class", "4",
    "--data.counts", "any", "--threads", "1", "--precision", "fp32", "--no-report",
    "--log-every", "1", "--data.workers", "0", "--teacher.weights", "", "--student.weights", "",
)  # fmt: skip
# 32 of 40 px, as 224 of 256
SMALL = ("--teacher.name", "small-teacher", "--student.name", "small-student", "--data.hr", "32",
         "--data.lr", "32", "--data.shift", "4")  # fmt: skip

Train = Callable[..., Path]


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """CUB, Cars and SOP of 12 classes to train on and 12 to test on."""
    root = tmp_path_factory.mktemp("disk")
    drawn = trees.people(24, 6, first=70_000)
    trees.write_cub(root / "CUB_200_2011", drawn, [*range(1, 13), *range(101, 113)])
    trees.write_cars(root / "cars196", drawn, [*range(1, 13), *range(99, 111)])
    trees.write_sop(root / "Stanford_Online_Products", drawn)
    return root


@pytest.fixture
def train(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, cache: Path, disk: Path) -> Train:
    """The newest run folder after `python train.py RECIPE` with short training."""

    def call(recipe: str, *flags: object) -> Path:
        argv = [recipe, "--data.root", disk, *RUN, "--runs", tmp_path, "--cache", cache, *flags]
        monkeypatch.setattr(sys, "argv", ["train.py", *map(str, argv)])
        cli.guarded(main)
        return max(tmp_path.glob(f"embedkd/{recipe}-*"), key=lambda p: p.stat().st_mtime_ns)

    return call


def record(run: Path, name: str = "results") -> dict:
    return json.loads((run / f"{name}.json").read_text())


def looks_drawn(run: Path, name: str) -> bool:
    """A picture that is not of one colour."""
    pixels = np.asarray(Image.open(run / "figures" / f"{name}.png").convert("L"))
    return min(pixels.shape) > 300 and pixels.std() > 5


@pytest.mark.parametrize("recipe", PUBLISHED)
def test_published_numbers_of_the_readme_are_the_papers(recipe: str) -> None:
    lines = (ROOT / "embedkd" / "README.md").read_text().splitlines()
    (row,) = [line for line in lines if line.startswith(f"| `{recipe}` |")]
    assert re.findall(r"\d+\.\d+", row.split("|")[3]) == PUBLISHED[recipe].split()


def test_table1_is_cub_with_every_method_and_never_looks_at_test_recall(train: Train) -> None:
    # hints need equal channels
    flags = (*SMALL, "--teacher.name", "mobilenet-0.25", "--student.name", "mobilenet-0.25")
    run = train("table1", *flags, "--only", 1)
    rows = list(record(run)["rows"])
    assert rows == ["teacher, HR", "teacher, LR", *RECIPES["table1"].students]
    assert record(run)["columns"] == {"recall1": "recall@1"} and record(run)["own"] == "rel"
    metrics = record(run)["rows"]["rel"]["metrics"]
    found = [k for k in metrics if k.startswith("recall")]
    assert found == [f"recall{k}" for k in (1, 2, 4, 8, 16)]
    assert record(run, "config")["selection"] == "test"
    assert not list((run / "students").glob("*-best.safetensors"))
    assert "development" not in (run / "metrics.jsonl").read_text()
    terms = {x["phase"]: set(x) for x in steps(run)}
    assert {"rel", "hint"} <= terms["rel+hint"] and {"abs", "at"} <= terms["abs+at"]


def steps(run: Path) -> list[dict]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [x for x in lines if "ml" in x]


def test_table1_has_cars_beside_cub_below_one_root(train: Train) -> None:
    run = train("table1", *SMALL, "--students", "alone", "--only", 2)
    assert record(run, "config")["config"]["data"]["name"] == "cars196"


def test_table2_repeats_images_of_small_products_and_says_so(
    train: Train, capsys: pytest.CaptureFixture[str]
) -> None:
    run = train("table2", *SMALL, "--images-per-class", 8)
    assert list(record(run)["rows"])[2:] == ["alone", "abs", "rel"]
    assert "12 of 12 classes have fewer than 8 images" in capsys.readouterr().err
    assert "recall10" in record(run)["rows"]["rel"]["metrics"]


def test_table3_has_students_of_labelled_of_all_and_of_unlabelled_images(train: Train) -> None:
    run = train("table3", *SMALL, "--images-per-class", 2, "--unlabelled", 16)
    assert list(record(run)["rows"])[2:] == list(RECIPES["table3"].students)
    assert record(run, "config")["labelled"] == 36
    ml = {arm: [x["ml"] for x in steps(run) if x["phase"] == arm] for arm in ("rel", "rel-only")}
    assert all(ml["rel"]) and ml["rel-only"] and not any(ml["rel-only"])


def test_table5_is_a_mobilenet(train: Train) -> None:
    run = train("table5", *SMALL, "--student.name", "mobilenet-0.25")
    counts = {name: row["parameters"] for name, row in record(run)["rows"].items()}
    assert 344_000 < counts["alone"] == counts["rel"] < 346_000


@pytest.mark.parametrize("only", [1, 4])
def test_table6_students_see_less_than_their_teacher(train: Train, only: int) -> None:
    lr = ("--data.lr", 8) if only == 1 else ()
    run = train("table6", *SMALL, *lr, "--only", only)
    made = record(run, "config")["config"]["data"]
    assert (made["name"], made["quality"]) == (
        ("cub", "enlarged") if only == 1 else ("cars196", "unlocalised")
    )
    rows = record(run)["rows"]
    assert list(rows)[2:] == ["alone", "abs", "rel"]
    # a network of one size: the student's input is as large as the teacher's
    assert rows["teacher, HR"]["metrics"] != rows["teacher, LR"]["metrics"]


def test_official_crops_at_random_with_margin_0(train: Train) -> None:
    run = train("official", *SMALL, "--data.shift", "0")
    made = record(run, "config")["config"]
    assert (made["data"]["crop"], made["student"]["margin"]) == ("resized", 0.0)
    # of two classes a hinge without margin is 0 where it is satisfied, never below
    assert all(x["ml"] >= 0 for x in steps(run))


def test_fig4_is_a_curve_over_lambda_for_both_teachers(train: Train) -> None:
    run = train("fig4", *SMALL, "--data.development", 4)
    shown = record(run / "figures", "fig4")
    assert shown["evaluation"] == "development"
    own = record(run)
    for arm in ("abs", "rel"):
        assert [p["lambda"] for p in shown["points"][arm]] == [0.1, 0.3, 1.0, 3.0, 10.0, 30.0]
        assert shown["points"][arm][-1]["value"] == own["rows"][arm]["cells"]["recall1"]["value"]
    assert looks_drawn(run, "fig4")


def test_a_missing_root_is_one_line(train: Train, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        train("table2", "--data.root", "nowhere")
    *_, last = capsys.readouterr().err.strip().splitlines()
    assert last == "error: --data.root nowhere: no such folder"


@pytest.mark.slow
def test_the_papers_networks_take_a_step(train: Train) -> None:
    run = train("table1", "--students", "rel+hint", "abs+at", "--only", 1)
    assert {x["phase"] for x in steps(run)} == {"rel+hint", "abs+at"}

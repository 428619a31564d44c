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

from aird.config import RECIPES, members
from aird.eval import evaluate
from aird.train import main
from shared import cli
from tests.conftest import ROOT
from tests.shared.data import trees

# Published in AIRD's tables I to V, as the README gives them.
PUBLISHED = {
    "table1": "96.02 98.63 99.20 91.52 94.50 99.45",
    "table2": "96.02 91.52",
    "table3": "80.45 66.25",
    "table4": "97.58",
    "table5": "92.30 93.83 95.25 95.76 96.02 77.75 78.05 79.72 79.85 80.45",
}
RUN = (
    "--optim.epochs", "1", "--optim.batch", "16", "--teacher.optim.epochs", "1",
    "--teacher.optim.batch", "16", "--data.counts", "any", "--threads", "1", "--precision", "fp32",
    "--no-report", "--log-every", "1", "--data.workers", "0",
)  # fmt: skip
SMALL = ("--teacher.name", "small-teacher", "--student.name", "small-student", "--data.hr", "32")

Train = Callable[..., Path]


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("disk")
    faces, others = trees.people(8, 4), trees.people(12, 6, first=50_000)
    trees.write_pack(root / "pack", faces)
    trees.write_bin(root / "pack" / "lfw.bin", others)
    trees.write_bin(root / "pack" / "agedb_30.bin", others[::-1])
    trees.write_folders(root / "uccs", trees.people(12, 10, first=60_000))  # 2 of each are tested
    return root


@pytest.fixture
def train(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, cache: Path) -> Train:
    """The newest run folder after `python train.py RECIPE` with short training."""

    def call(recipe: str, *flags: object) -> Path:
        own = () if "--n" in flags or "negatives" in recipe else ("--n", "16")
        argv = [recipe, *RUN, *own, "--runs", tmp_path, "--cache", cache, *flags]
        monkeypatch.setattr(sys, "argv", ["train.py", *map(str, argv)])
        cli.guarded(main)
        return max(tmp_path.glob(f"aird/{recipe}-*"), key=lambda p: p.stat().st_mtime_ns)

    return call


def record(run: Path, name: str = "results") -> dict:
    return json.loads((run / f"{name}.json").read_text())


def looks_drawn(run: Path, name: str) -> bool:
    """A picture that is not of one colour."""
    pixels = np.asarray(Image.open(run / "figures" / f"{name}.png").convert("L"))
    return min(pixels.shape) > 300 and pixels.std() > 5


def test_face_recipes_are_the_papers_setting() -> None:
    """Sec. IV: batch 96, rate .05, x.1 at 21, 28, 32; alpha 1, beta 2, gamma .1; ResNet50 at 112 ->
    ResNet18 at 16, 32, 64, bicubic; ArcFace."""
    names = [name for name in RECIPES if name.startswith(("table", "fig"))]
    assert len(names) == 10
    for name in names:
        for c in members(RECIPES[name]):
            o = c.optim
            assert (o.batch, o.lr, o.gamma, o.milestones) == (96, 0.05, 0.1, (21, 28, 32))
            assert (c.alpha, c.beta, c.gamma, c.mode) == (1.0, 2.0, 0.1, "paper")
            assert (c.data.hr, c.data.kernel, c.data.flip) == (112, "bicubic", True)
            assert (c.teacher.name, c.student.name) == ("iresnet50", "iresnet18")
            if name != "table1":
                assert (c.student.head, c.student.scale, c.student.margin) == ("arcface", 64.0, 0.5)
                assert c.data.lr == 16
    assert [c.n for c in members(RECIPES["fig6-negatives"])] == [64, 128, 256, 512, 1024]


@pytest.mark.parametrize("recipe", PUBLISHED)
def test_published_numbers_of_the_readme_are_the_papers(recipe: str) -> None:
    lines = (ROOT / "aird" / "README.md").read_text().splitlines()
    (row,) = [line for line in lines if line.startswith(f"| `{recipe}` |")]
    assert re.findall(r"\d+\.\d+", row.split("|")[3]) == PUBLISHED[recipe].split()


@pytest.mark.parametrize(("number", "head"), [(1, "arcface"), (2, "arcface"), (9, "magface")])
def test_table1_has_model_i_and_model_ii_in_both_scenarios(
    train: Train, disk: Path, number: int, head: str
) -> None:
    run = train("table1", *SMALL, "--only", number, "--data.root", disk / "pack", "--data.hr", 64)
    assert record(run, "config")["config"]["student"]["head"] == head
    plain, mixed = record(run)["rows"], record(run, "results-lr-hr")["rows"]
    assert {"teacher, LR", "alone"} <= set(plain) and {"teacher", "alone"} <= set(mixed)
    assert ("aird" in plain) == (head == "arcface")
    assert ("aird, HR by teacher" in mixed) == (head == "arcface")


def test_table3_scores_agedb_in_both_scenarios(train: Train, disk: Path) -> None:
    run = train("table3", *SMALL, "--data.root", disk / "pack")
    for name in ("results-agedb_30", "results-agedb_30-lr-hr"):
        assert {"verification", "verification_best"} <= set(record(run, name)["columns"])
        assert "aird + FaceBN" in record(run, name)["rows"]
    text = evaluate(run, "bin", str(disk / "pack" / "agedb_30.bin"), face_bn="online",
                    scenario="lr-hr", counts="any")  # fmt: skip
    assert "aird + FaceBN" in text
    again = record(run, "eval-agedb_30-lr-hr-face-bn-online-0.1-500")["rows"]["aird + FaceBN"]
    own = record(run, "results-agedb_30-lr-hr")["rows"]["aird + FaceBN"]
    assert again["metrics"] == own["metrics"]


def test_table4_and_fig4_show_uccs(train: Train, disk: Path) -> None:
    at = ("--data.root", disk / "pack", "--data.test-sets", f"uccs={disk / 'uccs'}",
          "--data.any-alignment")  # fmt: skip
    run = train("table4", *SMALL, *at)
    assert record(run)["evaluation"] == "UCCS" and list(record(run)["columns"]) == ["top1"]
    assert "aird + FaceBN" in record(run)["rows"]
    run = train("fig4", *SMALL, *at)
    four = ["teacher, LR", "alone", "iid", "aird + FaceBN"]
    assert list(record(run / "figures", "fig4")["rows"]) == four
    assert looks_drawn(run, "fig4")


def test_table4_without_its_test_set_is_one_line(
    train: Train, disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        train("table4", *SMALL, "--data.root", disk / "pack")
    assert "uccs=FOLDER: no such file or folder" in capsys.readouterr().err


def test_table5_is_the_component_ablation_of_both_sets(train: Train, disk: Path) -> None:
    run = train("table5", *SMALL, "--data.root", disk / "pack")
    rows = ["alone", "iid", "rid", "aird", "aird + FaceBN"]
    for name in ("results", "results-agedb_30"):
        assert [r for r in record(run, name)["rows"] if r in rows] == rows


def test_fig3_has_lr_lr_and_lr_hr_and_its_statistics_are_those_of_the_scores(
    train: Train, disk: Path
) -> None:
    run = train("fig3", *SMALL, "--data.root", disk / "pack")
    for figure, table in (("fig3", "arrays"), ("fig3-lr-hr", "results-lr-hr")):
        arrays = np.load(run / f"{table}.npz")
        same = arrays["pairs/same"]
        for row, cell in record(run / "figures", figure)["rows"].items():
            scores = arrays[f"{row}/scores"].astype(float)
            assert cell["margin"] == pytest.approx(scores[same].mean() - scores[~same].mean())
        assert looks_drawn(run, figure)


def test_fig5_compares_test_with_training_features_before_and_after(
    train: Train, disk: Path
) -> None:
    run = train("fig5", *SMALL, "--data.root", disk / "pack")
    shown = record(run / "figures", "fig5")
    text = json.dumps(shown)
    assert all(name in text for name in ("batch norm", "FaceBN", "training"))
    assert looks_drawn(run, "fig5")


def test_fig6_is_a_curve_over_negatives_and_over_the_policy(train: Train, disk: Path) -> None:
    train("fig6-negatives", *SMALL, "--data.root", disk / "pack", "--only", 1, "--n", 8)
    last = train("fig6-sampling", *SMALL, "--data.root", disk / "pack")
    points = record(last / "figures", "fig6-sampling")["points"]
    assert [p["value"] for p in points] == ["preselected", "random"]
    assert looks_drawn(last, "fig6-sampling")


@pytest.mark.slow
def test_the_papers_networks_take_a_step(train: Train, disk: Path) -> None:
    run = train("table5", "--data.root", disk / "pack", "--data.hr", 112, "--students", "aird")
    assert "aird + FaceBN" in record(run)["rows"]

"""Every table and figure is one command, here on small files in the published formats."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from horkd.config import RECIPES
from horkd.eval import evaluate
from horkd.train import main
from shared import cli
from tests.conftest import ROOT
from tests.shared.data import trees
from tests.shared.data.test_classification import cifar100

# Published in HORKD's tables 1 to 4 and Sec. 4.4, in the order of the README.
PUBLISHED = {
    "table1": "73.54 69.87 76.68 74.65 77.76 70.08 72.68 72.97 74.26",
    "table2": "93.83 90.03",
    "table3": "22.19 10.23",
    "table4": "82.23 80.03 79.04 77.85 73.41 57.82 57.14 57.19 55.37 53.53 "
    "68.13 69.90 68.87 67.66 66.42",
    "direct": "3.03",
}
RUN = (
    "--optim.epochs", "1", "--optim.batch", "16", "--teacher.optim.epochs", "1",
    "--teacher.optim.batch", "16", "--data.counts", "any", "--threads", "1", "--precision", "fp32",
    "--no-report", "--log-every", "1", "--data.workers", "0",
)  # fmt: skip
CIFAR = ("--teacher.name", "resnet8", "--assistant.name", "resnet8", "--student.name", "resnet8")
SMALL = ("--teacher.name", "small-teacher", "--assistant.name", "small-assistant",
         "--student.name", "small-student")  # fmt: skip
FACES = (*SMALL, "--data.hr", "64")
RANDOM = ("--teacher.weights", "", "--assistant.weights", "", "--student.weights", "")
METRIC = (*RANDOM, "--data.shift", "4")
TINY = (*METRIC, *SMALL, "--data.hr", "32", "--data.lr", "16")
DRAWN = ("--data.identities", "8", "--data.instances", "6", "--data.development", "12",
         "--data.test", "12", "--teacher.identities", "8")  # fmt: skip
TERMS = {"L1", "L2", "L3", "LC"}

Train = Callable[..., Path]


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for each data set; what is retrieved is of 6 classes to train on and 6 to test on.

    The faces come with their landmarks, which are those of ArcFace's template.
    """
    root = tmp_path_factory.mktemp("disk")
    cifar100(root / "cifar", 100)
    others = trees.people(12, 10, first=60_000)
    write_landmarks(root / "umdfaces.csv",
                    trees.write_umdfaces(root / "umdfaces", trees.people(8, 4)))  # fmt: skip
    trees.write_lfw(root / "lfw", others[:3, :2])
    names = [f"Person_{p}/Person_{p}_{i:04d}.png" for p in range(3) for i in (1, 2)]
    write_landmarks(root / "lfw.csv", names)
    trees.write_folders(root / "uccs", others)
    trees.write_survface(root / "survface", others[:8], others[8:, 0])
    drawn = trees.people(12, 6, first=70_000)
    trees.write_cub(root / "retrieval" / "CUB_200_2011", drawn, [*range(1, 7), *range(101, 107)])
    trees.write_cars(root / "retrieval" / "cars196", drawn, [*range(1, 7), *range(99, 105)])
    trees.write_sop(root / "retrieval" / "Stanford_Online_Products", drawn)
    return root


def write_landmarks(path: Path, names: Iterable[str]) -> None:
    """Five points of every image, in px of 32: ArcFace's template at 112."""
    points = (38.2946, 51.6963, 73.5318, 51.5014, 56.0252, 71.7366, 41.5493, 92.3655, 70.7299,
              92.2041)  # fmt: skip
    own = ",".join(f"{v * trees.SIZE / 112:.4f}" for v in points)
    path.write_text("".join(f"{name},{own}\n" for name in names))


@pytest.fixture(scope="module")
def train(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Train:
    """The last run folder of `python train.py RECIPE` with short training; torchvision is not to
    mind the checksums of our small files."""
    runs = tmp_path_factory.mktemp("runs")

    def call(recipe: str, *flags: object) -> Path:
        before = set(runs.glob(f"horkd/{recipe}-*"))
        argv = [recipe, *RUN, "--runs", runs, "--cache", cache, *flags]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("torchvision.datasets.cifar.check_integrity", lambda path, md5=None: True)
            patch.setattr(sys, "argv", ["train.py", *map(str, argv)])
            cli.guarded(main)
        made = set(runs.glob(f"horkd/{recipe}-*")) - before
        return max(made, key=lambda p: p.stat().st_mtime_ns)

    return call


@pytest.fixture(scope="module")
def cars(train: Train, disk: Path) -> Path:
    """The first run of table4."""
    return train("table4", *TINY, "--only", 1, "--data.root", disk / "retrieval")


def record(run: Path, name: str = "results") -> dict:
    return json.loads((run / f"{name}.json").read_text())


def rows(run: Path, name: str = "results") -> list[str]:
    return list(record(run, name)["rows"])


def settings(run: Path) -> dict:
    return record(run, "config")["config"]


def steps(run: Path) -> dict[str, set[str]]:
    """What each network's loss is made of, by its name."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {x["phase"]: set(x) for x in lines if "cls" in x}


def looks_drawn(run: Path, name: str) -> bool:
    """A picture that is not of one colour."""
    pixels = np.asarray(Image.open(run / "figures" / f"{name}.png").convert("L"))
    return min(pixels.shape) > 200 and pixels.std() > 5


def refused(capsys: pytest.CaptureFixture[str], train: Train, *argv: object) -> str:
    """The one line that bad input ends in."""
    capsys.readouterr()
    with pytest.raises(SystemExit, match="2"):
        train(*argv)
    text = capsys.readouterr().err
    assert "Traceback" not in text
    *_, last = text.strip().splitlines()
    assert last.startswith("error: ")
    return last


# -- recipes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", PUBLISHED)
def test_published_numbers_of_the_readme_are_the_papers(recipe: str) -> None:
    lines = (ROOT / "horkd" / "README.md").read_text().splitlines()
    (row,) = [line for line in lines if line.startswith(f"| `{recipe}` |")]
    assert re.findall(r"\d+\.\d+", row.split("|")[3]) == PUBLISHED[recipe].split()


def test_every_recipe_stands_in_the_readme_and_every_table_and_figure_is_one() -> None:
    text = (ROOT / "horkd" / "README.md").read_text()
    assert all(f"`{recipe}`" in text for recipe in RECIPES)
    assert set(PUBLISHED) | {"fig3", "fig4"} < set(RECIPES)


def test_table1_has_the_assistant_at_32_and_its_student_at_16(train: Train, disk: Path) -> None:
    run = train("table1", *CIFAR, "--only", 1, "--data.root", disk / "cifar")
    found = record(run)["rows"]
    assert list(found) == [
        "teacher, HR", "teacher, LR", "alone", "kd", "direct", "assistant, HR", "horkd"
    ]  # fmt: skip
    assert record(run)["evaluation"] == "test" and list(record(run)["columns"]) == ["top1"]
    # one network for all: OUR-32 costs what the teacher does, OUR-16 about a quarter
    assert found["assistant, HR"]["macs"] == found["teacher, HR"]["macs"]
    assert 3.9 < found["assistant, HR"]["macs"] / found["horkd"]["macs"] < 4
    taught = steps(run)
    for name in ("direct", "assistant", "horkd"):
        assert taught[name] > TERMS  # beside the task loss
    assert "kd" in taught["kd"] and not taught["kd"] & TERMS
    assert settings(run)["reduction"] == "image"


def test_table1_has_the_other_methods_at_32(train: Train, disk: Path) -> None:
    run = train("table1", *CIFAR, "--only", 3, "--data.root", disk / "cifar")
    found = record(run)["rows"]
    assert list(found) == ["teacher, HR", "teacher, LR", "kd", "fitnet", "at", "rkd", "horkd"]
    assert found["teacher, HR"]["metrics"] == found["teacher, LR"]["metrics"]  # 32 is both
    every = {*TERMS, "kd", "fitnet", "at"}
    own = {"kd": {"kd"}, "fitnet": {"fitnet"}, "at": {"at"}, "rkd": {"L2", "L3"}, "horkd": TERMS}
    assert {name: found & every for name, found in steps(run).items()} == own


def test_table2_is_the_readmes_command(train: Train, disk: Path) -> None:
    at = ("--data.root", disk / "umdfaces", "--data.test-sets", f"lfw={disk / 'lfw'}",
          "--data.landmarks", disk / "umdfaces.csv", disk / "lfw.csv")  # fmt: skip
    last = train("table2", *FACES, *at)
    runs = sorted(last.parent.glob("table2-*"))
    assert sorted(settings(run)["data"]["lr"] for run in runs) == [16, 32]
    assert settings(last)["data"]["lr"] == 16
    for run in runs:
        assert rows(run)[2:] == ["alone", "direct", "assistant, HR", "horkd"]
        assert "verification" in record(run)["columns"]
        assert record(run, "config")["alignment"] == "arcface:error"
    one, other = (load_file(run / "students" / "assistant.safetensors") for run in runs)
    assert all(torch.equal(one[k], other[k]) for k in one)  # whatever its student sees


def test_faces_cut_out_otherwise_than_the_test_sets_are_one_line(
    train: Train, disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = refused(capsys, train, "table2", *FACES, "--data.root", disk / "umdfaces",
                   "--data.test-sets", f"lfw={disk / 'lfw'}", "--only", 1)  # fmt: skip
    assert "cut out as 'whole', those trained on as 'box+0.2'" in said


def test_table3_is_uccs_and_natively_small_faces_are_none_for_the_assistant(
    train: Train, disk: Path
) -> None:
    run = train("table3", *FACES, "--data.root", disk / "umdfaces", "--data.any-alignment",
                "--data.test-sets", f"uccs={disk / 'uccs'}",
                f"survface={disk / 'survface'}")  # fmt: skip
    own, small = record(run), record(run, "results-survface")
    assert own["evaluation"] == "UCCS" and list(own["columns"]) == ["top1"]
    assert "top5" in own["rows"]["horkd"]["metrics"]  # of which the paper gives the errors
    assert rows(run)[2:] == ["alone", "direct", "assistant, HR", "horkd"]
    assert small["evaluation"] == "QMUL-SurvFace"
    assert list(small["rows"]) == ["teacher, LR", "alone", "direct", "horkd"]
    evaluate(run, "survface", str(disk / "survface"))
    again = record(run, "eval-survface")["rows"]
    assert again == {k: again[k] for k in ("alone", "direct", "horkd")}
    assert all(again[k]["metrics"] == small["rows"][k]["metrics"] for k in again)
    evaluate(run, "test")
    assert [*record(run, "eval-test")["rows"]] == rows(run)[2:]


def test_fig4_shows_subsets_of_the_terms_without_an_assistant(train: Train, disk: Path) -> None:
    run = train("fig4", *SMALL, "--data.root", disk / "umdfaces", "--data.any-alignment",
                "--data.test-sets", f"uccs={disk / 'uccs'}",
                "--students", "L1", "L2+L3+LC")  # fmt: skip
    assert (settings(run)["data"]["hr"], settings(run)["data"]["lr"]) == (32, 32)
    assert settings(run)["stages"] == "direct"
    shown = record(run / "figures", "fig4")
    assert list(shown["rows"]) == ["L1", "L2+L3+LC"] == rows(run)[2:]
    for row, cell in shown["rows"].items():
        assert cell["value"] == record(run)["rows"][row]["cells"]["top1"]["value"]
    assert {name: found & TERMS for name, found in steps(run).items()} == {
        "L1": {"L1"}, "L2+L3+LC": {"L2", "L3", "LC"}
    }  # fmt: skip
    assert looks_drawn(run, "fig4")


def test_table4_retrieves_cars_and_never_chooses_by_the_test_classes(cars: Path) -> None:
    found = record(cars)
    assert list(found["rows"])[2:] == ["alone", "assistant, HR", "horkd"]
    assert found["columns"] == {"recall1": "recall@1"}
    assert settings(cars)["data"]["name"] == "cars196"
    assert "recall16" in found["rows"]["horkd"]["metrics"]
    assert not list((cars / "students").glob("*-best.safetensors"))
    assert not steps(cars)["alone"] & TERMS and steps(cars)["horkd"] > TERMS


def test_table4_has_cub_and_the_retrieval_networks(train: Train, disk: Path) -> None:
    """imagenet-resnet18 for all three, whose sizes differ by nothing but their input."""
    name = "imagenet-resnet18"
    run = train("table4", *METRIC, "--only", 5, "--data.root", disk / "retrieval", "--data.hr", 48,
                "--data.lr", 32, "--teacher.name", name, "--students", "horkd")  # fmt: skip
    made = settings(run)
    assert made["data"]["name"] == "cub"
    assert made["assistant"]["name"] == made["student"]["name"] == name
    found = record(run)["rows"]
    assert len({row["parameters"] for row in found.values()}) == 1
    assert found["assistant, HR"]["macs"] == found["teacher, HR"]["macs"] > found["horkd"]["macs"]


def test_table4_has_sop(train: Train, disk: Path) -> None:
    run = train("table4", *TINY, "--only", 9, "--data.root", disk / "retrieval",
                "--students", "horkd")  # fmt: skip
    assert settings(run)["data"]["name"] == "sop"
    assert {"recall1", "recall10"} <= set(record(run)["rows"]["horkd"]["metrics"])


def test_one_assistant_teaches_the_students_of_every_size(
    train: Train, disk: Path, cars: Path
) -> None:
    """The README's way to save training it: the same student as in one run of both stages."""
    at = (*TINY, "--data.root", disk / "retrieval", "--stages", 2, "--assistant-run", cars)
    same = train("table4", *at, "--only", 1)
    assert rows(same) == ["teacher, HR", "teacher, LR", "horkd"]
    ours, theirs = (load_file(r / "students" / "horkd.safetensors") for r in (same, cars))
    assert all(torch.equal(ours[k], theirs[k]) for k in ours)
    other = train("table4", *at, "--only", 2, "--data.lr", 8)
    assert rows(other) == rows(same)


def test_fig3_is_a_curve_over_sizes_with_the_student_of_no_assistant_beside_it(
    train: Train, disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """At 128 and 96 px, of networks that are small there."""
    at = (*METRIC, *SMALL, "--student.name", "small-assistant", "--data.hr", 128,
          "--data.root", disk / "retrieval")  # fmt: skip
    first = train("fig3", *at, "--only", 4)
    assert "fig3: 1 of 5 runs; not yet: train.py fig3 --only 1" in capsys.readouterr().err
    assert not (first / "figures").exists()
    last = train("fig3", *at, "--only", 5)
    points = record(last / "figures", "fig3")["points"]
    assert [p["value"] for p in points] == [96, 128]
    for point, run in zip(points, (last, first), strict=True):
        found = record(run)["rows"]
        assert list(found)[2:] == ["direct", "assistant, HR", "horkd"]
        assert point["arm"]["value"] == found["horkd"]["cells"]["recall1"]["value"]
        assert point["reference"]["value"] == found["direct"]["cells"]["recall1"]["value"]
    assert looks_drawn(last, "fig3")


def test_direct_is_a_paired_difference_and_the_same_when_images_are_streamed(
    train: Train, disk: Path
) -> None:
    at = (*TINY, "--data.root", disk / "retrieval")
    run = train("direct", *at)
    found = record(run)
    assert settings(run)["data"]["name"] == "cub" and found["reference"] == "direct"
    value = {row: line["cells"]["recall1"]["value"] for row, line in found["rows"].items()}
    gain = found["rows"]["horkd"]["cells"]["recall1"]["difference"]
    assert gain["value"] == pytest.approx(value["horkd"] - value["direct"])
    assert gain["low"] <= gain["value"] <= gain["high"]
    streamed = train("direct", *at, "--data.resident-gib", 0)
    for name in ("assistant", "direct", "horkd"):
        ours, theirs = (load_file(r / f"students/{name}.safetensors") for r in (run, streamed))
        assert all(torch.equal(ours[k], theirs[k]) for k in ours)
    assert record(streamed)["rows"] == found["rows"]


@pytest.mark.parametrize("gib", [4, 0])
def test_a_broken_image_can_be_left_out_of_both_stages(
    train: Train, tmp_path: Path, gib: int
) -> None:
    drawn = trees.people(12, 6, first=70_000)
    trees.write_cub(tmp_path, drawn, [*range(1, 7), *range(101, 107)])
    broken = tmp_path / "images" / "002.Bird_2" / "Bird_2_0003.png"
    broken.write_bytes(broken.read_bytes()[:300])
    run = train("direct", *TINY, "--data.root", tmp_path, "--data.on-error", "skip",
                "--data.resident-gib", gib, "--students", "horkd")  # fmt: skip
    (said,) = record(run, "config")["skipped"]
    assert broken.name in said and rows(run)[2:] == ["assistant, HR", "horkd"]
    for name in ("assistant", "horkd"):
        weights = load_file(run / "students" / f"{name}.safetensors")
        assert all(w.isfinite().all() for w in weights.values())


def test_embedded_objects_are_told_apart(train: Train) -> None:
    run = train("embedded-objects", *DRAWN)
    assert list(record(run)["columns"]) == ["top1"] and record(run)["reference"] == "alone"
    assert rows(run)[2:] == ["alone", "kd", "rkd", "direct", "assistant, HR", "horkd", "L2+L3+LC"]


def test_embedded_retrieval_finds_classes_that_nobody_was_taught(train: Train) -> None:
    run = train("embedded-retrieval", *DRAWN)
    assert list(record(run)["columns"]) == ["recall1"]
    assert rows(run)[2:] == ["alone", "rkd", "direct", "assistant, HR", "horkd", "L2+L3+LC"]
    assert record(run, "config")["selection"] == "development"


def test_ablation_terms_is_a_figure_against_the_student_alone(train: Train) -> None:
    run = train("ablation-terms", *DRAWN, "--data.development", 24, "--data.test", 24,
                "--students", "alone", "L3", "L2+L3")  # fmt: skip
    shown = record(run / "figures", "ablation-terms")
    assert (list(shown["rows"]), shown["reference"]) == (["L3", "L2+L3"], "alone")
    assert looks_drawn(run, "ablation-terms")


# -- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", ["table2", "table3", "fig4"])
def test_a_missing_test_set_is_one_line(
    train: Train, disk: Path, capsys: pytest.CaptureFixture[str], recipe: str
) -> None:
    said = refused(capsys, train, recipe, *SMALL, "--data.root", disk / "umdfaces")
    assert "=FOLDER: no such file or folder" in said


def test_a_root_without_the_set_is_one_line(
    train: Train, disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "needs --data.root" in refused(capsys, train, "table4", *TINY, "--only", 1)
    said = refused(capsys, train, "direct", *TINY, "--data.root", disk / "cifar")
    assert "no CUB-200-2011 in it or in a folder of it" in said


def test_an_assistant_of_another_data_set_is_one_line(
    train: Train, disk: Path, cars: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = refused(capsys, train, "table4", *TINY, "--data.root", disk / "retrieval",
                   "--only", 5, "--stages", 2, "--assistant-run", cars)  # fmt: skip
    assert f"--assistant-run {cars}: trained otherwise (--data.name)" in said


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--student.head", "none"), "--student.head none: objects is scored by classes"),
        (("--cls", 0), "--cls 0: objects is scored by classes, which the task loss teaches"),
    ],
)
def test_objects_without_classes_are_one_line(
    train: Train, capsys: pytest.CaptureFixture[str], flags: tuple, words: str
) -> None:
    at = (*DRAWN, "--students", "horkd", *flags)
    assert words in refused(capsys, train, "embedded-objects", *at)


# -- at their own size ---------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("only", "students"), [(1, ["horkd"]), (2, ["horkd"]), (3, ["fitnet", "at"])]
)
def test_the_networks_of_table1_take_two_steps(
    train: Train, disk: Path, only: int, students: list[str]
) -> None:
    run = train("table1", "--only", only, "--data.root", disk / "cifar", "--optim.batch", 50,
                "--teacher.optim.batch", 50, "--students", *students)  # fmt: skip
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert {x["step"] for x in lines} == {0, 1} and all(np.isfinite(x["loss"]) for x in lines)
    assert set(students) <= set(steps(run))


@pytest.mark.slow
def test_the_networks_of_table4_take_two_steps_at_96_px(train: Train, disk: Path) -> None:
    run = train("table4", *METRIC, "--only", 8, "--data.root", disk / "retrieval", "--data.hr", 96)
    found = record(run)["rows"]
    assert settings(run)["data"]["lr"] == 96
    assert found["teacher, HR"]["parameters"] > found["horkd"]["parameters"]
    # L1 and LC through the projector: 2048 numbers of the teacher, 512 of the assistant
    assert steps(run)["assistant"] > TERMS

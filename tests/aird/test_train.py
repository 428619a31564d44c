"""AIRD's loop, recipes and scores as a whole."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from aird.config import RECIPES, arms, members
from aird.eval import evaluate
from aird.model import face_bn
from aird.train import load_student, train
from shared import models
from shared.models.recogniser import Recogniser, read_metadata
from tests.conftest import tiny_aird
from tests.forked import forked

ROWS = ["alone", "alone-long", "iid", "rid", "aird"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
    torch.set_num_threads(1)
    return train(tiny_aird(tmp_path_factory.mktemp("runs"), cache))


def table(run: Path, name: str = "results") -> dict:
    return json.loads((run / f"{name}.json").read_text())


def logged(run: Path) -> list[dict]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [x for x in lines if "loss" in x and x["phase"] != "teacher"]


def test_arms_are_the_rows_of_table_v() -> None:
    found = arms(RECIPES["embedded"])
    assert {a: (c.alpha, c.beta, c.optim.epochs) for a, c in found.items()} == {
        "alone": (0, 0, 24), "alone-long": (0, 0, 48), "iid": (1, 0, 24), "rid": (0, 2, 24),
        "aird": (1, 2, 24),
    }  # fmt: skip


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_names_networks_that_take_its_images(name: str) -> None:
    for one in members(RECIPES[name]):
        for network in (one.teacher, one.student):
            assert network.name in models.MODELS
        student = Recogniser(one.student, one.data.lr, 4).eval()
        with torch.inference_mode():
            assert student(torch.zeros(2, 3, one.data.lr, one.data.lr)).shape == (2, student.dim)


def test_table1_has_the_papers_sizes_and_the_baselines_of_three_heads() -> None:
    found = [(m.student.head, m.teacher.head, m.data.lr, m.students) for m in members(RECIPES["table1"])]  # noqa: E501
    assert found[:3] == [("arcface", "arcface", lr, ("alone", "aird")) for lr in (16, 32, 64)]
    assert found[3:] == [
        (head, head, lr, ("alone",)) for head in ("cosface", "magface") for lr in (16, 32, 64)
    ]


def test_the_table_is_the_component_ablation_on_plain_and_shifted_faces(run: Path) -> None:
    adapted = ["aird + FaceBN", "aird + FaceBN anchored"]
    assert list(table(run)["rows"]) == ["teacher, HR", "teacher, LR", *ROWS, *adapted]
    assert list(table(run, "results-shifted")["rows"]) == [*ROWS, *adapted]
    for name in ("results", "results-shifted"):
        assert list(table(run, name)["columns"]) == ["verification", "verification_best", "rank1"]
        assert "gamma 0.1, batches of 500" in table(run, name)["notes"]["FaceBN"]
        for row in table(run, name)["rows"].values():
            cells = row["cells"]
            assert cells["verification_best"]["value"] >= cells["verification"]["value"] - 1e-9


def test_a_native_student_sees_in_lr_hr_what_it_sees_in_lr_lr(run: Path) -> None:
    plain, mixed = table(run)["rows"], table(run, "results-lr-hr")["rows"]
    for arm in ROWS:
        assert mixed[arm]["metrics"] == plain[arm]["metrics"]
        assert mixed[f"{arm}, HR by teacher"]["metrics"] != plain[arm]["metrics"]
    assert mixed["teacher"]["metrics"] != plain["teacher, LR"]["metrics"]


def test_loss_terms_add_up_to_eq7(run: Path) -> None:
    weights = {"alone": (0, 0), "alone-long": (0, 0), "iid": (1, 0), "rid": (0, 2), "aird": (1, 2)}
    assert {x["phase"] for x in logged(run)} == set(weights)
    for x in logged(run):
        alpha, beta = weights[x["phase"]]
        assert x["loss"] == pytest.approx(x["cls"] + alpha * x["iid"] + beta * x["rid"], rel=1e-5)


def test_all_students_start_from_the_same_weights_and_see_the_same_images(run: Path) -> None:
    first = {x["phase"]: x["cls"] for x in logged(run) if x["step"] == 0}
    assert len(first) == 5 and len(set(first.values())) == 1


def test_an_interrupted_run_ends_in_the_same_bits(tmp_path: Path, cache: Path) -> None:
    config = tiny_aird(tmp_path, cache, students=("aird",), lr_hr=False, checkpoint_seconds=0.0)
    whole = train(replace(config, folder=str(tmp_path / "whole")))
    part = tmp_path / "part"
    stop = (
        "import sys; from pathlib import Path; from dataclasses import replace\n"
        "from shared.phase import Phase\n"
        "from tests.conftest import tiny_aird; from aird.train import train\n"
        "log = Phase.log\n"
        "def once(self, batch, **terms):\n"
        "    if self.name == 'aird' and self.step == 9: sys.exit(7)\n"
        "    return log(self, batch, **terms)\n"
        "Phase.log = once\n"
        f"train(tiny_aird(Path({str(tmp_path)!r}), Path({str(cache)!r}), students=('aird',),\n"
        f"      lr_hr=False, checkpoint_seconds=0.0, folder={str(part)!r}))\n"
    )
    assert forked("-c", stop).returncode == 7
    assert not (part / "results.json").exists()
    train(replace(config, folder=str(part), resume=str(part)))
    for name in ("student.safetensors", "students/aird.safetensors"):
        ours, theirs = load_file(whole / name), load_file(part / name)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize("sampling", ["preselected", "random"])
@pytest.mark.parametrize("mode", ["paper", "dkd"])
def test_every_policy_and_mode_trains(tmp_path: Path, cache: Path, sampling, mode) -> None:
    config = tiny_aird(tmp_path, cache, students=("aird",), lr_hr=False)
    found = logged(train(replace(config, sampling=sampling, mode=mode)))
    assert all(x["rid"] > 0 and x["iid"] > 0 for x in found)


def test_eval_adds_face_bn_and_leaves_the_student_as_it_is(run: Path) -> None:
    text = evaluate(run, "shifted", face_bn="online")
    assert "aird + FaceBN" in text and "batches of 500" in text
    kept = table(run, "eval-shifted-face-bn-online-0.1-500")["rows"]
    ours = table(run, "results-shifted")["rows"]
    assert kept["aird + FaceBN"]["metrics"] == ours["aird + FaceBN"]["metrics"]
    still = evaluate(run, "shifted", face_bn="online", gamma=1.0)
    assert "gamma 1" in still
    rows = table(run, "eval-shifted-face-bn-online-1-500")["rows"]
    assert rows["aird + FaceBN"]["metrics"] == rows["aird"]["metrics"] == ours["aird"]["metrics"]


def test_eval_of_lr_hr_keeps_a_table_of_its_own(run: Path) -> None:
    evaluate(run, "test", scenario="lr-hr")
    mixed = table(run, "eval-test-lr-hr")["rows"]
    assert mixed["aird"]["metrics"] == table(run, "results-lr-hr")["rows"]["aird"]["metrics"]


def test_the_student_is_used_as_the_readme_says(run: Path) -> None:
    student = load_student(run)
    images = torch.randint(0, 256, (12, 3, 16, 16), dtype=torch.uint8)
    before = student(images)
    with face_bn(student, gamma=0.1):
        inside = student(images)
    assert inside.shape == before.shape and not torch.equal(inside, before)
    assert torch.equal(student(images), before)
    assert read_metadata(run / "student.safetensors")["task"] == "faces"


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--images-per-class", "3"], "--optim.batch 64 is no multiple of --images-per-class 3"),
        (["--images-per-class", "1"], "--images-per-class must be 2 or more"),
        (["--gamma", "1.5"], "--gamma 1.5: must lie between 0 and 1"),
        (["--students", "aird", "aird"], "name each once"),
        (["--temperature", "0"], "--temperature 0.0 above 0"),
        (["--mode", "kd"], "mode"),
        (["--n", "9000"], "--n 9000 negatives cannot come from --pool 4096 images"),
        (["--n", "480"], "480 negatives are asked for"),
        (["--images-per-class", "0"], "--images-per-class must be 2 or more"),
        (["--warm-epochs", "-5"], "--warm-epochs -5: must be 0 or more"),
        (["--figure", "curve"], "--figure curve: embedded is a single run"),
    ],
)
def test_a_bad_flag_is_one_line(tmp_path: Path, cache: Path, flags: list[str], said: str) -> None:
    small = ["--data.identities", "40", "--data.development", "24", "--data.test", "24",
             "--teacher.identities", "40", "--teacher.optim.epochs", "1",
             "--cache", str(cache), "--runs", str(tmp_path), "--precision", "fp32"]  # fmt: skip
    done = forked("-m", "aird.train", *small, *flags)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    *_, last = done.stderr.strip().splitlines()
    assert last.startswith("error: ") and said in last


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--on", "shifted", "--face-bn", "often"], "invalid choice: 'often'"),
        (["--on", "shifted", "--face-bn", "--gamma", "-1"], "--gamma -1"),
        (["--on", "native", "--face-bn"], "--on native takes neither"),
        (["--on", "shifted", "--gamma", "0.5"], "--gamma 0.5 is FaceBN's: add --face-bn"),
        (["--on", "shifted", "--face-bn", "--batch", "1"], "--batch 1: must be 2 or more"),
        (["--on", "development", "--scenario", "hr-hr"], "invalid choice: 'hr-hr'"),
    ],
)
def test_a_bad_flag_of_eval_is_one_line(run: Path, flags: list[str], said: str) -> None:
    done = forked("-m", "aird.eval", str(run), *flags)
    assert done.returncode == 2 and "Traceback" not in done.stderr and said in done.stderr

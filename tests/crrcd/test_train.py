"""CRRCD's loop and recipes as a whole."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from crrcd.config import RECIPES, arms, members
from crrcd.eval import evaluate
from crrcd.seeds import DIFFERENCES
from crrcd.train import load_student, train
from shared import models
from shared.evaluate.intervals import mean_interval
from shared.models.recogniser import Recogniser
from shared.seeds import summarise, table
from tests.conftest import python, tiny


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("runs")
    return train(tiny(folder, cache, baselines=("alone", "alone-long", "kd")))


def test_arms_differ_in_what_they_are_named_for() -> None:
    found = arms(RECIPES["embedded"])
    assert list(found) == ["alone", "alone-long", "kd", "crrcd"]
    assert {a: (c.alpha, c.beta, c.optim.epochs) for a, c in found.items()} == {
        "alone": (0, 0, 24), "alone-long": (0, 0, 48), "kd": (0.5, 0, 24), "crrcd": (0.5, 2.0, 24)
    }  # fmt: skip


def test_the_long_budget_stretches_the_whole_schedule() -> None:
    table1 = replace(RECIPES["table1"], baselines=("alone-long",), long=2.0)
    long = arms(table1)["alone-long"].optim
    assert (long.epochs, long.milestones) == (480, (300, 360, 420))


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_names_networks_that_exist(name: str) -> None:
    for one in members(RECIPES[name]):
        for network in (one.teacher, one.student):
            assert network.name in models.MODELS
        classes = one.data.classes or 4
        student = Recogniser(one.student, one.data.lr, classes).eval()
        with torch.inference_mode():
            x = torch.zeros(2, 3, one.data.lr, one.data.lr)
            assert student.logits(student(x)).shape == (2, classes)


def test_the_table_has_the_six_rows_and_paired_differences(run: Path) -> None:
    record = json.loads((run / "results.json").read_text())
    names = ["teacher, HR", "teacher, LR", "alone", "alone-long", "kd", "crrcd"]
    assert list(record["rows"]) == names
    for name, row in record["rows"].items():
        for cell in row["cells"].values():
            assert cell["low"] <= cell["value"] <= cell["high"]
            assert ("difference" in cell) == (name != "alone")
    alone, ours = record["rows"]["alone"]["cells"], record["rows"]["crrcd"]["cells"]
    gain = ours["rank1"]["value"] - alone["rank1"]["value"]
    assert ours["rank1"]["difference"]["value"] == pytest.approx(gain, abs=1e-9)


def test_loss_terms_add_up_to_eq13(run: Path) -> None:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [x for x in lines if "loss" in x and x["phase"] != "teacher"]
    weights = {"alone": (0, 0), "alone-long": (0, 0), "kd": (0.5, 0), "crrcd": (0.5, 2)}
    assert {x["phase"] for x in steps} == set(weights)
    for x in steps:
        alpha, beta = weights[x["phase"]]
        expected = x["cls"] + alpha * x["kd"] + beta * x["rcd"]
        assert x["loss"] == pytest.approx(expected, rel=1e-5)


def test_all_students_start_from_the_same_weights_and_see_the_same_images(run: Path) -> None:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    first = {x["phase"]: x["cls"] for x in lines if x.get("step") == 0 and "cls" in x}
    assert len(first) == 4 and len(set(first.values())) == 1


@pytest.mark.parametrize("on", ["test", "development", "shifted"])
def test_eval_scores_a_run_on(run: Path, on: str) -> None:
    text = evaluate(run, on)
    assert "crrcd" in text and (run / f"eval-{on}.json").is_file()
    if on == "test":
        kept = json.loads((run / "eval-test.json").read_text())["rows"]["crrcd"]["metrics"]
        ours = json.loads((run / "results.json").read_text())["rows"]["crrcd"]["metrics"]
        assert kept == ours


def test_eval_scores_native_sizes(run: Path, monkeypatch) -> None:
    from shared.data import procedural

    draw = procedural.native
    monkeypatch.setattr(
        procedural, "native", lambda faces, cache, **_: draw(faces, 30, 20, 3, cache=cache)
    )
    assert "tpir20_at_fpir_0.3" in evaluate(run, "native")


def test_eval_of_what_is_not_there_is_one_line(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such split .*shifted, native"):
        evaluate(run, "imagenet")
    with pytest.raises(ValueError, match="needs --root"):
        evaluate(run, "folder")
    done = python("-m", "crrcd.eval", str(tmp_path))
    assert done.returncode == 2 and "no run folder here" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_best_epoch_is_the_one_development_chose(run: Path) -> None:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    scores = {x["epoch"]: x["development"] for x in lines
              if x["phase"] == "crrcd" and "development" in x}  # fmt: skip
    best = torch.load(run / "best.ckpt", weights_only=True)
    assert best["score"] == max(scores.values()) == scores[best["epoch"]]
    assert load_student(run, best=True) is not None


def test_seeds_summary_is_the_mean_over_runs(make_config, run: Path, tmp_path: Path) -> None:
    runs = [train(make_config(seed=s, runs=str(tmp_path / f"r{s}"))) for s in (1, 2, 3)]
    summary = summarise(runs, DIFFERENCES)
    records = [json.loads((r / "results.json").read_text())["rows"] for r in runs]
    values = [r["crrcd"]["cells"]["rank1"]["value"] for r in records]
    assert summary["rows"]["crrcd"]["rank1"]["value"] == pytest.approx(mean_interval(values).mean)
    alone = [r["alone"]["cells"]["rank1"]["value"] for r in records]
    gains = [ours - theirs for ours, theirs in zip(values, alone, strict=True)]
    found = summary["differences"]["crrcd - alone"]["rank1"]
    assert found["value"] == pytest.approx(sum(gains) / 3)
    assert found["low"] <= found["value"] <= found["high"]
    assert "crrcd - alone" in table(summary)


def test_own_teacher_checkpoint_is_used_and_its_head_fitted(make_config, tmp_path: Path) -> None:
    torch.manual_seed(7)
    teacher = models.create("small-teacher")
    torch.save({"state_dict": teacher.state_dict()}, tmp_path / "mine.pth")
    config = make_config()
    config = replace(config, teacher=replace(config.teacher, checkpoint=str(tmp_path / "mine.pth")))
    assert (train(config) / "results.json").is_file()
    (tmp_path / "bad.pth").write_bytes(b"no weights")
    config = replace(config, teacher=replace(config.teacher, checkpoint=str(tmp_path / "bad.pth")))
    with pytest.raises(ValueError, match="bad.pth is no readable checkpoint"):
        train(config)

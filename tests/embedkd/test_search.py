"""lambda is chosen by development classes, and the choice is trained on everything."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import embedkd.figures
import embedkd.search
from embedkd.config import GRID, Config
from embedkd.figures import points
from embedkd.search import choose, main, search
from shared import cli
from shared.config import to_dict
from tests.embedkd.small import table, tiny


def cell(value: float) -> dict[str, float]:
    return {"value": value, "low": value - 1, "high": value + 1}


def test_the_best_weight_of_each_teacher_is_chosen_and_of_equal_ones_the_smallest() -> None:
    found = {
        "abs": {0.1: cell(20), 1.0: cell(31), 10.0: cell(30)},
        "rel": {0.1: cell(33), 1.0: cell(33), 10.0: cell(12)},
    }
    assert choose(found) == {"abs": 1.0, "rel": 0.1}


def test_a_search_goes_on_where_it_stopped_and_trains_what_it_chose(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    config = tiny(tmp_path, cache, students=("alone", "rel"))
    config = replace(config, optim=replace(config.optim, epochs=1))
    trained: list[Config] = []
    real = embedkd.search.train

    def watched(one: Config) -> Path:
        trained.append(one)
        return real(one)

    monkeypatch.setattr(embedkd.search, "train", watched)
    final = search(config, [0.5, 5.0])
    said = capsys.readouterr().out
    assert [c.score_on for c in trained] == ["development", "development", "test"]
    assert [c.lambda_rel for c in trained[:2]] == [0.5, 5.0]
    assert trained[2].students == ("alone", "rel") and list(table(final)["rows"])[2:] == [
        "alone", "rel"
    ]  # fmt: skip
    tried = sorted(final.parent.glob("weight-*"))
    assert [table(run)["evaluation"] for run in tried] == ["development"] * 2
    assert table(final)["evaluation"] == "test"
    best = choose(points(tried))
    assert (trained[2].lambda_abs, trained[2].lambda_rel) == (best["abs"], best["rel"])
    assert f"lambda_rel {best['rel']:g}" in said
    for arm, weight in best.items():  # of two weights either is an end of the grid
        end, more = ("smallest", "smaller") if weight == 0.5 else ("largest", "larger")
        assert f"{arm}: {weight:g} is the {end} weight tried; try {more} ones by --grid" in said
    shown = json.loads((final.parent / "fig4.json").read_text())["points"]
    assert [p["lambda"] for p in shown["abs"]] == [0.5, 5.0]

    trained.clear()
    assert search(config, [0.5, 5.0]) == final and not trained
    shutil.rmtree(tried[0])
    assert search(config, [0.5, 5.0]) == final and len(trained) == 1


def test_a_set_without_development_classes_of_its_own_keeps_a_fifth_for_the_search(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CUB's recipes train on all of its 100 classes, their search on 80 of them."""
    trained: list[Config] = []

    def stub(one: Config) -> Path:
        trained.append(one)
        folder = Path(one.folder)
        folder.mkdir(parents=True)
        record = {"schema": 1, "config": to_dict(one)}
        (folder / "config.json").write_text(json.dumps(record))
        rows = {arm: {"cells": {"recall1": cell(50)}} for arm in one.students}
        made = {"schema": 1, "headline": "recall1", "rows": rows}
        (folder / "results.json").write_text(json.dumps(made))
        return folder

    monkeypatch.setattr(embedkd.search, "train", stub)
    monkeypatch.setattr(embedkd.search, "over_lambda", lambda runs, out: out)
    config = tiny(tmp_path, cache)
    config = replace(config, data=replace(config.data, name="cub", development=0))
    search(config, [1.0, 2.0])
    assert [c.data.development for c in trained] == [20, 20, 0]

    trained.clear()
    search(config, arms=("abs", "rel+hint"))  # which no recipe here could train
    *tried, chosen = trained
    assert [(c.lambda_abs, c.rho) for c in tried] == [(w, w) for w in GRID["mean_abs"]]
    assert all(c.students == ("abs", "rel+hint") for c in tried)
    assert {c.lambda_rel for c in trained} == {config.lambda_rel}  # as it was
    assert (chosen.lambda_abs, chosen.rho, chosen.students) == (0.3, 0.3, config.students)
    trained.clear()
    search(replace(config, relative_mode="frobenius"), arms=("rel+at",))
    assert [c.kappa for c in trained[:-1]] == list(GRID["frobenius"])


def test_finished_runs_are_drawn_and_those_that_cannot_be_compared_are_not(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    config = tiny(tmp_path, cache, students=("rel",))
    config = replace(config, optim=replace(config.optim, epochs=1))
    runs = [
        embedkd.search.train(replace(config, lambda_rel=w, folder=str(tmp_path / f"{w}")))
        for w in (3.0, 0.5)
    ]

    def call(*args: object) -> None:
        monkeypatch.setattr(sys, "argv", ["figures", *map(str, args)])
        cli.guarded(embedkd.figures.main)

    call(*runs, "--out", tmp_path / "drawn")
    assert (tmp_path / "drawn.png").is_file() and (tmp_path / "drawn.svg").is_file()
    shown = json.loads((tmp_path / "drawn.json").read_text())["points"]
    wanted = [table(run)["rows"]["rel"]["cells"]["recall1"]["value"] for run in reversed(runs)]
    assert [(p["lambda"], p["value"]) for p in shown["rel"]] == [
        (0.5, wanted[0]), (3.0, wanted[1])
    ]  # fmt: skip
    other = replace(config.data, test=9)
    less = embedkd.search.train(
        replace(config, data=other, lambda_rel=1.0, folder=str(tmp_path / "less"))
    )
    for args, said in (
        ((runs[0],), "1 runs: none of their students has another weight in each"),
        ((runs[0], tmp_path), "no finished run here"),
        ((runs[0], less), "not scored on the same items"),
    ):
        with pytest.raises(SystemExit, match="2"):
            call(*args)
        assert said in capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--grid", "1"], "--grid 1.0: give two weights or more"),
        (["--grid", "0", "1"], "--grid 0.0 1.0: give two weights or more, above 0"),
        (["--grid", "1", "inf"], "--grid 1.0 inf: give two weights or more"),
        (["--grid", "1", "nan"], "give two weights or more, above 0"),
        (["--grid", "1", "3", "smoke"], "--grid smoke: not a number (a recipe comes first)"),
        (["--arms", "alone"], "--arms alone: none of abs, rel,"),
        (["--arms", "abs+hint", "rel+hint"], "--arms abs+hint rel+hint: both are trained with rho"),
        (["--arms", "rel", "rel+at"], "--arms rel+at rel: both are trained with lambda_rel"),
        (["table1"], "table1 is 2 runs: choose one by --only K"),
        (["table4"], "table4 trains nothing"),
        (["--folder", "here"], "give neither --folder nor --resume"),
    ],
)
def test_a_bad_flag_is_one_line(monkeypatch, capsys, flags: list[str], said: str) -> None:
    monkeypatch.setattr(sys, "argv", ["search.py", *flags])
    with pytest.raises(SystemExit, match="2"):
        cli.guarded(main)
    *_, last = capsys.readouterr().err.strip().splitlines()
    assert last.startswith("error: ") and said in last

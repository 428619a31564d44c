"""EmbedKD's eval.py: any run, on any of its splits."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from embedkd.eval import evaluate, main
from embedkd.train import train
from shared import cli
from tests.embedkd.small import table, tiny


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
    torch.set_num_threads(1)
    return train(tiny(tmp_path_factory.mktemp("runs"), cache, students=("alone", "rel")))


def test_the_test_split_gives_the_runs_own_numbers(run: Path) -> None:
    text = evaluate(run)
    assert "recall@1" in text
    found, own = table(run, "eval-test")["rows"], table(run)["rows"]
    for arm in ("alone", "rel"):
        assert found[arm]["metrics"] == own[arm]["metrics"]


def test_the_best_epoch_is_scored_on_the_classes_that_chose_it(run: Path) -> None:
    evaluate(run, on="development", best=True)
    found = table(run, "eval-development-best")
    assert list(found["rows"]) == ["alone", "rel"] and found["epoch"] == "best"


@pytest.mark.parametrize(
    ("on", "said"),
    [
        ("native", "only procedural faces have a split of native sizes"),
        ("cub", "--on cub needs --root"),
        ("nowhere", "--on nowhere: no such split"),
    ],
)
def test_a_set_that_is_not_there_is_refused(run: Path, on: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        evaluate(run, on=on)


def test_a_run_that_is_not_there_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["eval.py", str(tmp_path)])
    with pytest.raises(SystemExit, match="2"):
        cli.guarded(main)
    said = f"error: {tmp_path}: no run folder here (config.json is missing)\n"
    assert capsys.readouterr().err == said

"""The READMEs' numbers are those of the committed results."""

from __future__ import annotations

import json

import pytest

import aird.config
import crrcd.config
from shared.seeds import markdown
from tests.conftest import ROOT

RECIPES = {"aird": aird.config.RECIPES, "crrcd": crrcd.config.RECIPES}


def summary(paper: str) -> dict:
    return json.loads((ROOT / "results" / f"{paper}-embedded-seeds.json").read_text())


@pytest.mark.parametrize("paper", RECIPES)
def test_the_seeds_table_is_the_committed_summary(paper: str) -> None:
    for found in summary(paper).values():
        assert markdown(found) in (ROOT / paper / "README.md").read_text()
    assert markdown(summary(paper)["results"]) in (ROOT / "README.md").read_text()


@pytest.mark.parametrize("paper", RECIPES)
def test_the_summary_has_ten_paired_seeds_of_one_make(paper: str) -> None:
    for found in summary(paper).values():
        assert found["seeds"] >= 10
        for made in found["made_by"].values():
            assert len(made) == 1
        for cells in found["rows"].values():
            assert all(len(cell["seeds"]) == found["seeds"] for cell in cells.values())


@pytest.mark.parametrize("paper", RECIPES)
def test_every_recipe_is_in_the_papers_readme(paper: str) -> None:
    text = (ROOT / paper / "README.md").read_text()
    for name in RECIPES[paper]:
        assert name in text or name.replace("ablation", "") in text, name


def test_both_commands_stand_on_the_first_screen() -> None:
    first = "\n".join((ROOT / "README.md").read_text().splitlines()[:30])
    assert "python -m pip install -e . && cd crrcd && python train.py" in first
    assert "python -m pip install nox && nox -s tests" in first

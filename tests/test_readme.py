"""The READMEs' numbers are those of the committed results."""

from __future__ import annotations

import json

import pytest

from crrcd.config import RECIPES
from crrcd.seeds import markdown
from tests.conftest import ROOT

SUMMARY = json.loads((ROOT / "results" / "crrcd-embedded-seeds.json").read_text())


@pytest.mark.parametrize("path", ["README.md", "crrcd/README.md"])
def test_the_seeds_table_is_the_committed_summary(path: str) -> None:
    assert markdown(SUMMARY) in (ROOT / path).read_text()


def test_the_summary_has_ten_paired_seeds_of_one_make() -> None:
    assert SUMMARY["seeds"] >= 10
    for made in SUMMARY["made_by"].values():
        assert len(made) == 1
    for cells in SUMMARY["rows"].values():
        assert all(len(cell["seeds"]) == SUMMARY["seeds"] for cell in cells.values())


def test_every_recipe_is_in_the_papers_readme() -> None:
    text = (ROOT / "crrcd" / "README.md").read_text()
    for name in RECIPES:
        assert name in text or name.replace("ablation", "") in text, name


def test_both_commands_stand_on_the_first_screen() -> None:
    first = "\n".join((ROOT / "README.md").read_text().splitlines()[:30])
    assert "python -m pip install -e . && cd crrcd && python train.py" in first
    assert "python -m pip install nox && nox -s tests" in first

"""The READMEs' numbers are those of the committed results."""

from __future__ import annotations

import json

import pytest

import aird.config
import btnet.config
import crrcd.config
import embedkd.config
import horkd.config
from shared.comparison import page
from shared.seeds import markdown
from tests.conftest import ROOT

PAPERS = {"aird": aird, "crrcd": crrcd, "embedkd": embedkd, "horkd": horkd}
RECIPES = {name: paper.config.RECIPES for name, paper in PAPERS.items()}
ALL = {**RECIPES, "btnet": btnet.config.RECIPES}  # BTNet has a front table of its own
SEEDS = dict.fromkeys(RECIPES, 10) | {"btnet": 6}  # fewest


def summary(paper: str) -> dict:
    return json.loads((ROOT / "results" / f"{paper}-embedded-seeds.json").read_text())


def cell(found: dict[str, float], sign: str = "") -> str:
    return f"{found['value']:{sign}.2f} [{found['low']:{sign}.2f}, {found['high']:{sign}.2f}]"


@pytest.mark.parametrize("paper", ALL)
def test_the_seeds_table_is_the_committed_summary(paper: str) -> None:
    for found in summary(paper).values():
        assert markdown(found) in (ROOT / paper / "README.md").read_text()


@pytest.mark.parametrize("paper", RECIPES)
def test_the_front_table_is_of_the_committed_summaries(paper: str) -> None:
    found = summary(paper)["results"]
    lines = [[c.strip() for c in line.strip("|").split("|")]
             for line in (ROOT / "README.md").read_text().splitlines()
             if line.startswith(f"| {paper} |") and "[" in line]  # fmt: skip
    assert lines
    for _, row, value, gain in lines:
        column = "rank1" if "rank1" in found["rows"][row] else "recall1"
        assert value == cell(found["rows"][row][column])
        pair = found["differences"].get(f"{row} - alone")
        assert gain == (cell(pair[column], "+") if pair else "")


def test_btnets_front_table_is_of_the_committed_summary() -> None:
    found = summary("btnet")["results-rank1"]
    text = (ROOT / "README.md").read_text().splitlines()
    table = [[c.strip() for c in line.strip("|").split("|")] for line in text
             if line.startswith(("| rank-1, 6 seeds |", "| btnet: "))]  # fmt: skip
    (_, *columns), *rows = table
    assert [row[0] for row in rows] == [f"btnet: {n}" for n in ("hr", "mm", "mr", "bt", "bt − mr")]
    for name, *cells in rows:
        row = name.removeprefix("btnet: ")
        if row in found["rows"]:
            assert cells == [f"{found['rows'][row][c]['value']:.2f}" for c in columns]
        else:
            assert cells == [cell(found["differences"]["bt - mr"][c], "+") for c in columns]


def test_the_comparisons_tables_are_of_the_committed_record() -> None:
    record = json.loads((ROOT / "results" / "compare-matched.json").read_text())
    text = (ROOT / "README.md").read_text()
    assert page.markdown(record, "16") in text and page.markdown_claims(record) in text
    found = record["resolutions"]["16"]
    assert found["seeds"] == 10 and found["identities"] >= 1000


@pytest.mark.parametrize("paper", ALL)
def test_the_summary_has_paired_seeds_of_one_make(paper: str) -> None:
    for found in summary(paper).values():
        assert found["seeds"] >= SEEDS[paper]
        for made in found["made_by"].values():
            assert len(made) == 1
        for cells in found["rows"].values():
            assert all(len(cell["seeds"]) == found["seeds"] for cell in cells.values())


@pytest.mark.parametrize("paper", ALL)
def test_every_recipe_is_in_the_papers_readme(paper: str) -> None:
    text = (ROOT / paper / "README.md").read_text()
    for name in ALL[paper]:
        assert name in text or name.replace("ablation", "") in text, name


def test_both_commands_stand_on_the_first_screen() -> None:
    first = "\n".join((ROOT / "README.md").read_text().splitlines()[:30])
    assert "python -m pip install -e . && cd crrcd && python train.py" in first
    assert "python -m pip install nox && nox -s tests" in first

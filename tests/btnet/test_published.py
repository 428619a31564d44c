"""What BTNet's README says of the paper."""

from __future__ import annotations

import re

import pytest

from btnet.config import RECIPES
from tests.conftest import ROOT

# Published in BTNet's tables 1 to 4 and Sec. 3.3, in the order of the README.
PUBLISHED = {
    "table1": "86.10 94.08 96.65 77.78 90.90 96.27 97.25",
    "table2": "35.4 31.2 26.9 20.6",
    "table3": "49.90 78.00 78.05 76.87 85.90 78.04 85.07 77.22 94.08 90.90",
    "table4": "94.10 90.78 94.17 90.88 94.08 90.90",
    "fig5": "1.1 48.9",
}


@pytest.mark.parametrize("recipe", PUBLISHED)
def test_published_numbers_of_the_readme_are_the_papers(recipe: str) -> None:
    lines = (ROOT / "btnet" / "README.md").read_text().splitlines()
    (row,) = [line for line in lines if re.match(rf"\| `{recipe}`[ ,]", line)]
    assert re.findall(r"\d+\.\d+", row.split("|")[3]) == PUBLISHED[recipe].split()


def test_every_recipe_stands_in_the_readme() -> None:
    text = (ROOT / "btnet" / "README.md").read_text()
    assert all(f"`{recipe}`" in text for recipe in RECIPES)

"""The Triton source, run on the CPU by Triton's interpreter in a process of its own."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests.conftest import python
from tests.shared.kernels.triton.conftest import HERE, ON_DEVICE
from tests.shared.kernels.triton.resources import folders

pytest.importorskip("triton")


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> list[ElementTree.Element]:
    """Every test case of the files that need a device, as the interpreter ran it."""
    report = tmp_path_factory.mktemp("interpreter") / "report.xml"
    # The interpreter changes triton when it is imported, so this process cannot run it.
    done = python(
        "-m", "pytest", str(HERE), f"--junitxml={report}", "-q", "-p", "no:cacheprovider",
        TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return list(ElementTree.parse(report).iter("testcase"))


@pytest.mark.parametrize("name", ON_DEVICE)
def test_all_tests_of_file_pass_in_interpreter(cases, name: str):
    of_file = [c for c in cases if c.attrib["classname"].split(".")[-1] == name.removesuffix(".py")]
    ran = {re.sub(r"\[.*", "", case.attrib["name"]) for case in of_file}
    assert ran == written(HERE / name), "tests that were never collected"
    assert not [c.attrib["name"] for c in of_file if len(c)], "tests that were skipped, or failed"


def test_every_triton_path_has_tests():
    assert {f"test_{op}.py" for op in folders()} <= set(ON_DEVICE)


def written(path: Path) -> set[str]:
    """Names of the test functions in a file."""
    functions = ast.walk(ast.parse(path.read_text()))
    return {
        f.name for f in functions if isinstance(f, ast.FunctionDef) and f.name.startswith("test_")
    }

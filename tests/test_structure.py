"""Rules of the house that a program can check."""

from __future__ import annotations

import ast
import dataclasses
import sys
import tomllib
import typing
from pathlib import Path

import pytest

from aird import config as aird
from baselines import config as baselines
from btnet import config as btnet
from crrcd import config as crrcd
from embedkd import config as embedkd
from horkd import config as horkd
from tests.conftest import ROOT, python

PAPERS = ("horkd", "crrcd", "aird", "btnet", "embedkd", "baselines")
SOURCES = [p for top in ("shared", *PAPERS) for p in sorted((ROOT / top).rglob("*.py"))]


def imports(path: Path) -> list[tuple[str, int]]:
    """(top-level package or relative dots, line) of every import."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(alias.name.split(".")[0], node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            top = "." if node.level else (node.module or "").split(".")[0]
            found.append((top, node.lineno))
    return found


def forbidden(path: Path) -> list[str]:
    """Imports that break the layout: shared knows no paper, a paper no other, none is relative."""
    own = path.relative_to(ROOT).parts[0]
    barred = {*PAPERS, "compare", "."} - {own}
    where = path.relative_to(ROOT)
    return [f"{where}:{line} {top}" for top, line in imports(path) if top in barred]


def test_no_package_imports_what_it_may_not() -> None:
    assert [line for path in SOURCES for line in forbidden(path)] == []


@pytest.mark.parametrize(
    "line", ["import aird.losses", "from btnet import model", "from . import x"]
)
def test_a_forbidden_import_is_caught(tmp_path: Path, monkeypatch, line: str) -> None:
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    path = tmp_path / "shared" / "x.py"
    path.parent.mkdir()
    path.write_text(f"def f():\n    {line}\n")
    assert len(forbidden(path)) == 1


def test_no_file_is_named_like_a_standard_module() -> None:
    """`cd crrcd && python train.py` puts that folder first on the path."""
    for paper in PAPERS:
        for path in (ROOT / paper).glob("*.py"):
            assert path.stem not in sys.stdlib_module_names


def fields(cls: type) -> set[str]:
    names = set()
    for field in dataclasses.fields(cls):
        names.add(field.name)
        hint = typing.get_type_hints(cls)[field.name]
        if dataclasses.is_dataclass(hint):
            names |= fields(typing.cast(type, hint))
    return names


@pytest.mark.parametrize("paper", [aird, baselines, btnet, crrcd, embedkd, horkd])
def test_every_configuration_field_is_read(paper) -> None:
    read = {
        node.attr
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)
    }
    by_name = fields(paper.Variant)  # getattr over names in members()
    assert sorted(fields(paper.Config) - read - by_name) == []


def test_pyproject_lists_every_package() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    listed = set(project["tool"]["setuptools"]["packages"])
    there = {".".join(p.parent.relative_to(ROOT).parts) for p in SOURCES if p.name == "__init__.py"}
    assert listed == there


def test_tyro_is_imported_only_when_a_command_line_is_read() -> None:
    for path in SOURCES:
        for node in ast.parse(path.read_text()).body:
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            assert "tyro" not in names, path


def test_a_script_starts_without_what_few_runs_need() -> None:
    """torchvision alone takes as long to import as torch."""
    scripts = {f"{paper}.{name}" for paper in PAPERS for name in ("train", "eval")}
    asked = f"import sys, {', '.join(sorted(scripts))}; print(*sys.modules)"
    loaded = set(python("-c", asked).stdout.split())
    assert scripts <= loaded
    assert not loaded & {"torchvision", "timm", "tyro", "numba", "sklearn"}

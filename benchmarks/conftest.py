"""`pytest benchmarks`: gates, a table of what was measured, and `--update` of the bounds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.cases import CASES
from benchmarks.measure import one_thread

BOUNDS = Path(__file__).parent / "bounds.json"
SLACK = 0.6  # of a measured ratio, where a case does not say otherwise
ROOM = 1.1  # times a measured share of memory

measured: dict[str, dict[str, float]] = {}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update", action="store_true", help="write bounds.json anew, show old | new")


@pytest.fixture(autouse=True)
def _one_thread():
    one_thread()


@pytest.fixture(scope="session")
def bounds(request: pytest.FixtureRequest) -> dict[str, dict[str, float]]:
    """What was enforced last; nothing while it is being measured anew."""
    return {} if request.config.getoption("--update") else json.loads(BOUNDS.read_text())


@pytest.fixture
def record():
    """record(name, speed=..., memory=...): for the table, and for --update."""

    def note(name: str, **values: float) -> None:
        measured.setdefault(name, {}).update(values)

    return note


def pytest_terminal_summary(terminalreporter, exitstatus, config: pytest.Config) -> None:
    if not measured:
        return
    old = json.loads(BOUNDS.read_text())
    slack = {case.name: case.slack for case in CASES}
    new = {
        name: {
            what: round(value * (ROOM if what == "memory" else slack.get(name, SLACK)), 4)
            for what, value in values.items()
        }
        for name, values in measured.items()
    }
    write = terminalreporter.write_line
    terminalreporter.section("measured (times the baseline's speed; share of its peak memory)")
    width = max(map(len, measured))
    for name, values in measured.items():
        for what, value in values.items():
            bound = old.get(name, {}).get(what)
            line = f"{name:<{width}}  {what:<6} {value:8.3g}"
            line += f"   bound {bound:.3g}" if bound is not None else "   no bound yet"
            if config.getoption("--update"):
                line += f" -> {new[name][what]:.3g}"
            write(line)
    if config.getoption("--update"):
        BOUNDS.write_text(json.dumps({**old, **new}, indent=1) + "\n")
        write(f"wrote {BOUNDS}: look at the change before you commit it")

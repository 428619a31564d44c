"""Every check of the project: `nox` runs lint, types and tests; `nox -l` lists the rest.

`nox -r` keeps the virtual environments between calls.
"""

from __future__ import annotations

import sys
from pathlib import Path

import nox

nox.options.sessions = ["lint", "types", "tests"]
nox.options.error_on_missing_interpreters = True
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg"}
# Two processes of one thread each; a file's tests stay together, for what they share.
TWO_AT_ONCE = ("-n", "2", "--dist", "loadfile")


@nox.session
def lint(session: nox.Session) -> None:
    """ruff: rules and format of imports."""
    session.install("ruff>=0.14,<0.16")
    session.run("ruff", "check", ".")


@nox.session(venv_backend="none")
def types(session: nox.Session) -> None:
    """mypy over the packages, in the environment of the tests: a second torch takes 6 GB."""
    python = Path(".nox", "tests", "bin", "python").absolute()  # a link: not resolved
    if not python.exists():
        session.run(sys.executable, "-m", "nox", "--install-only", "-s", "tests")
    session.run(python, "-m", "pip", "install", "mypy>=1.18,<3", "types-tqdm")
    session.run(python, "-m", "mypy")


@nox.session
def tests(session: nox.Session) -> None:
    """The test suite without what is marked gpu or slow: under 15 minutes on 2 cores."""
    session.install("-e", ".[tests]")
    session.run(
        "pytest", "-m", "not gpu and not slow", *TWO_AT_ONCE, *session.posargs, env=ONE_THREAD
    )


@nox.session
def slow(session: nox.Session) -> None:
    """Tests marked slow: readers under thousands of damaged files, large searches."""
    session.install("-e", ".[tests]")
    session.run("pytest", "-m", "slow", *session.posargs, env=ONE_THREAD)


@nox.session
def smoke(session: nox.Session) -> None:
    """`nox -s smoke -- crrcd`: the smoke recipe of a paper (default: all), from its own folder."""
    session.install("-e", ".")
    for paper in session.posargs or ["crrcd", "aird", "horkd", "embedkd", "btnet", "baselines"]:
        with session.chdir(paper):
            session.run("python", "train.py", "smoke")


@nox.session
def bench(session: nox.Session) -> None:
    """Kernel benchmarks on one thread: gates of speed and memory, then curves. About 15 minutes.

    `nox -s bench -- --update` measures the bounds anew and shows old beside new. Measurements,
    machine and versions go to .benchmarks/ (kernels.json, sweep.json, sweep.png).
    """
    session.install("-e", ".[tests]")
    session.run("python", "-c", "import os; os.makedirs('.benchmarks', exist_ok=True)")
    session.run(
        "pytest", "benchmarks", "-q", "--benchmark-columns=min,median,rounds",
        "--benchmark-json=.benchmarks/kernels.json", *session.posargs, env=ONE_THREAD,
    )  # fmt: skip
    session.run("python", "-m", "benchmarks.sweep", env=ONE_THREAD)


@nox.session
def mutation(session: nox.Session) -> None:
    """Changes the equations one operator at a time: the tests have to notice. Some 10 minutes."""
    session.install("-e", ".[tests]")
    session.run("python", "tests/mutation.py", *session.posargs, env=ONE_THREAD)


@nox.session
def gpu(session: nox.Session) -> None:
    """Tests marked gpu: needs a CUDA device."""
    session.install("-e", ".[tests]")
    session.run("pytest", "-m", "gpu", *session.posargs)

"""What several tests share: one thread, and a tiny data set and teacher made once a session."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import aird.config
import btnet.config
import horkd.config
from crrcd.config import RECIPES, Config

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def _one_thread():
    """Small tensors: more threads only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rendered faces and trained teachers, shared by all tests of a session."""
    return tmp_path_factory.mktemp("cache")


def tiny(tmp: Path, kept: Path, **changes: object) -> Config:
    """The smoke recipe, smaller: two students of some 16 steps, in fp32 so that bits repeat."""
    smoke = RECIPES["smoke"]
    config = replace(
        smoke,
        data=replace(smoke.data, identities=8, instances=8, development=24, test=24),
        teacher=replace(
            smoke.teacher,
            identities=8,
            optim=replace(smoke.teacher.optim, epochs=1, batch=16),
        ),
        optim=replace(smoke.optim, epochs=4, batch=16),
        baselines=("alone",),
        n=16,
        queue=64,
        precision="fp32",
        threads=1,
        log_every=1,
        evaluate_every=2,
        runs=str(tmp / "runs"),
        cache=str(kept),
        report=False,
    )
    return replace(config, **changes)  # type: ignore[arg-type]


def tiny_aird(tmp: Path, kept: Path, **changes: object) -> aird.config.Config:
    """As `tiny`, of AIRD, with all its students."""
    smoke = aird.config.RECIPES["smoke"]
    optim = replace(smoke.teacher.optim, epochs=1, batch=16)
    config = replace(
        smoke,
        data=replace(smoke.data, identities=8, instances=8, development=24, test=24),
        teacher=replace(smoke.teacher, identities=8, optim=optim),
        optim=replace(smoke.optim, epochs=4, batch=16),
        n=16, precision="fp32", threads=1, log_every=1, evaluate_every=2,
        runs=str(tmp / "runs"), cache=str(kept), report=False,
    )  # fmt: skip
    return replace(config, **changes)  # type: ignore[arg-type]


def tiny_horkd(tmp: Path, kept: Path, **changes: object) -> horkd.config.Config:
    """As `tiny`, of HORKD, with all its networks."""
    smoke = horkd.config.RECIPES["smoke"]
    optim = replace(smoke.teacher.optim, epochs=1, batch=16)
    config = replace(
        smoke,
        data=replace(smoke.data, identities=8, instances=8, development=24, test=24),
        teacher=replace(smoke.teacher, identities=8, optim=optim),
        optim=replace(smoke.optim, epochs=2, batch=16),
        precision="fp32", threads=1, log_every=1, evaluate_every=2,
        runs=str(tmp / "runs"), cache=str(kept), report=False,
    )  # fmt: skip
    return replace(config, **changes)  # type: ignore[arg-type]


def tiny_btnet(tmp: Path, kept: Path, **changes: object) -> btnet.config.Config:
    """As `tiny`, of BTNet, with a branch for each resolution."""
    smoke = btnet.config.RECIPES["smoke"]
    optim = replace(smoke.optim, epochs=1, batch=16)
    config = replace(
        smoke,
        data=replace(smoke.data, identities=8, instances=8, development=24, test=24),
        teacher=replace(smoke.teacher, identities=8, optim=optim),
        optim=replace(optim, epochs=2),
        trunk_optim=replace(optim, epochs=2),
        branch_optim=replace(smoke.branch_optim, epochs=2, batch=16),
        precision="fp32", threads=1, log_every=1, evaluate_every=2,
        runs=str(tmp / "runs"), cache=str(kept), report=False,
    )  # fmt: skip
    return replace(config, **changes)  # type: ignore[arg-type]


@pytest.fixture
def make_config(tmp_path: Path, cache: Path) -> Callable[..., Config]:
    return lambda **changes: tiny(tmp_path, cache, **changes)


def python(*arguments: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess:
    """Run Python as a user would, and wait for it."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=env, capture_output=True, text=True, timeout=300
    )

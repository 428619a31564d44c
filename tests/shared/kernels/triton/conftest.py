"""Tests of the Triton paths: on a GPU where there is one, else in Triton's interpreter.

To add an operation `op`:
1. shared/kernels/op/triton.py gets `compiled_forms()`, as resources.py says; run that --update.
2. test_op.py in this folder calls the module's functions (forward, backward, ...) on tensors made
   with the fixture `make` and compares them with a float64 equation written in the test. Import the
   module inside the tests or fixtures, not at the top. The fixture `poisoned` is in force in all of
   them: every `torch.empty` holds NaN. `helpers.py` has what they share.
That is all: test_interpreter.py runs all of these files in a process of its own, with
TRITON_INTERPRET=1, and asserts that each of their tests passed and none was skipped. On a machine
with CUDA the same tests run on the GPU (`pytest -m gpu`). In a process with neither they are not
collected.
By hand: TRITON_INTERPRET=1 python -m pytest tests/shared/kernels/triton/test_op.py
The interpreter takes some 20 microseconds an operation of a tile: keep N under about 50.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
ON_GPU = torch.cuda.is_available() and not INTERPRETED
HERE = Path(__file__).parent
WITHOUT_DEVICE = {"test_interpreter.py", "test_resources.py"}  # run in any process
ON_DEVICE = sorted(set(p.name for p in HERE.glob("test_*.py")) - WITHOUT_DEVICE)

collect_ignore = list(WITHOUT_DEVICE if INTERPRETED else [] if ON_GPU else ON_DEVICE)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if ON_GPU and item.path.parent == HERE and item.path.name in ON_DEVICE:
            item.add_marker(pytest.mark.gpu)


@pytest.fixture
def device() -> str:
    return "cuda" if ON_GPU else "cpu"


@pytest.fixture
def make(device: str) -> Callable[..., Tensor]:
    """make(3, 5, seed=1, dtype=torch.float16): normal numbers on the device."""

    def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, dtype)

    return normal


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Memory that nobody wrote reads as NaN (an integer's largest value), not as a lucky zero."""

    def poison(tensor: Tensor) -> Tensor:
        if tensor.dtype.is_floating_point:
            tensor.fill_(torch.nan)
        elif tensor.dtype not in (torch.bool,):
            tensor.fill_(torch.iinfo(tensor.dtype).max)
        return tensor

    def poisoning(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *args, **kwargs: poison(function(*args, **kwargs))

    for owner, name in (
        (torch, "empty"),
        (torch, "empty_like"),
        (torch, "empty_strided"),
        (Tensor, "new_empty"),
        (Tensor, "new_empty_strided"),
    ):
        monkeypatch.setattr(owner, name, poisoning(getattr(owner, name)))
    yield

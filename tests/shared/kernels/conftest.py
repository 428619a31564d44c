"""What the tests of kernels share."""

from __future__ import annotations

from importlib import import_module

import pytest
import torch

FACTORIES = ("empty", "empty_like", "empty_strided")
COMPILED = ("angle_loss", "nce_scores", "pairwise_distance", "relation_scores", "topk_search")
METHODS = ("new_empty", "new_empty_strided")


@pytest.fixture
def poisoned(monkeypatch):
    """Tensors made without values hold NaN, so that a part never written shows."""

    def poison(make):
        def made(*args, **kwargs):
            x = make(*args, **kwargs)
            return x.fill_(torch.nan) if x.is_floating_point() else x

        return made

    for name in FACTORIES:
        monkeypatch.setattr(torch, name, poison(getattr(torch, name)))
    for name in METHODS:
        monkeypatch.setattr(torch.Tensor, name, poison(getattr(torch.Tensor, name)))


@pytest.fixture(params=["numba", "torch"])
def cpu_path(request, monkeypatch) -> str:
    """The CPU path as it is with numba, and as it is where numba is missing."""
    if request.param == "torch":
        for name in ("distances", *(f"{op}.cpu" for op in COMPILED)):
            monkeypatch.setattr(import_module(f"shared.kernels.{name}"), "NUMBA", False)
    return request.param

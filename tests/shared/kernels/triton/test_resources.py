"""Every Triton kernel compiles for three GPUs that need not be there, and fits them."""

from __future__ import annotations

import json

import pytest

from tests.conftest import python
from tests.shared.kernels.triton import resources

triton = pytest.importorskip("triton")

SHARED_BYTES = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10}  # of a block at most


@pytest.fixture(scope="module")
def found() -> dict:
    done = python(resources.__file__)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_every_module_with_kernels_is_compiled(found):
    compiled = {name.split("/")[0] for name in found["kernels"]}
    assert compiled == set(resources.modules())


def test_no_kernel_spills_or_exceeds_shared_memory(found):
    for name, architectures in found["kernels"].items():
        assert set(architectures) == set(SHARED_BYTES)
        for sm, used in architectures.items():
            assert used["shared"] <= SHARED_BYTES[sm], (name, sm)
            assert used["stack"] == used["local"] == 0, (name, sm)
            assert 0 < used["registers"] <= 255, (name, sm)


def test_every_kernel_compiles_where_its_numbers_are_one(found):
    assert found["fails_at_one"] == {}


def test_resources_are_the_committed_ones(found):
    committed = json.loads(resources.COMMITTED.read_text())
    if committed["triton"] != found["triton"]:
        pytest.skip(f"resources.json is of triton {committed['triton']}")
    assert found["kernels"] == committed["kernels"], f"run {resources.__file__} --update"

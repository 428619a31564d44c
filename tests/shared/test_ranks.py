"""Several ranks: the losses and gradients of one process with the whole batch."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from shared.config import to_dict
from tests.conftest import python, tiny_aird, tiny_btnet, tiny_horkd
from tests.forked import ranks

# Batch norm frozen everywhere; the gradient of every parameter is kept after each of three steps.
RANKED = """
import importlib, json, sys, torch
from shared.config import from_dict
paper = sys.argv[1]
Config = importlib.import_module(f"{paper}.config").Config
torch.nn.modules.batchnorm._BatchNorm.train = (
    lambda self, mode=True: torch.nn.Module.train(self, False))
train = importlib.import_module(f"{paper}.train").train
grads = []
step = torch.optim.SGD.step
def kept(self, *args, **kwargs):
    grads.append([p.grad.clone() for g in self.param_groups for p in g["params"]
                  if p.grad is not None])
    return step(self, *args, **kwargs)
torch.optim.SGD.step = kept
run = train(from_dict(Config, json.loads(sys.argv[2])))
import os
if int(os.environ.get("RANK", 0)) == 0:
    torch.save(grads, run / "grads.pt")
"""


@pytest.mark.parametrize(
    "paper",
    [
        "crrcd", "aird", "horkd",
        *(pytest.param(p, marks=pytest.mark.slow) for p in ("aird, random pairs", "btnet")),
    ],
)  # fmt: skip
def test_two_gloo_ranks_give_the_losses_and_gradients_of_one(
    make_config, tmp_path: Path, cache: Path, paper: str
) -> None:
    config: Any
    if paper == "crrcd":
        config = make_config()
    elif paper == "horkd":
        config = tiny_horkd(tmp_path, cache, students=("horkd",))
    elif paper == "btnet":
        config = tiny_btnet(tmp_path, cache, students=("mr", "bt"), resolutions=(12, 48))
        still = replace(config.trunk_optim, lr=1e-6)  # without batch norm gradients are large
        config = replace(config, trunk_optim=still, branch_optim=still)
    else:
        sampling = "random" if "random" in paper else "preselected"
        # all 56 images of other people: which are hardest may differ where teachers round apart
        config = tiny_aird(tmp_path, cache, students=("aird",), n=56, sampling=sampling)
    # a small rate: rounding is compared, not how training amplifies it
    config = replace(config, optim=replace(config.optim, epochs=2, lr=1e-3))
    script = tmp_path / "ranked.py"
    runs = []
    for number in (1, 2):
        # a cache of its own: the teacher too is trained here, with batch norm frozen
        folder, kept = str(tmp_path / f"ranks-{number}"), str(tmp_path / "cache")
        one = replace(config, folder=folder, cache=kept)
        given = (paper.partition(",")[0], json.dumps(to_dict(one)))
        if (paper, number) == ("crrcd", 2):  # as a user starts it
            script.write_text(RANKED)
            launcher = ("-m", "torch.distributed.run", f"--nproc-per-node={number}", "--standalone")
            every = [python(*launcher, str(script), *given)]
        else:
            every = ranks(number, "-c", RANKED, *given)
        for done in every:
            assert done.returncode == 0, done.stderr[-3000:]
        runs.append(Path(one.folder))
    one, two = (
        [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        for run in runs
    )
    assert len(one) == len(two)
    for a, b in zip(one, two, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            if key not in ("phase",) and "development" not in a:
                assert b[key] == pytest.approx(a[key], rel=2e-5, abs=2e-5), (key, a, b)
    first, second = (torch.load(run / "grads.pt") for run in runs)
    for a, b in zip(first[-8:], second[-8:], strict=True):  # the paper's student's steps
        for p, q in zip(a, b, strict=True):
            assert (p - q).norm() <= 1e-4 * p.norm() + 1e-6

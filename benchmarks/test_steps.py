"""A whole distilled step against the student's own forward and backward pass on the same batch.

The student's own: network, head, cross-entropy. A distilled step: the same and what the method
adds, with the teacher's outputs at hand (a cached teacher costs nothing). Two scales: the papers'
faces (iresnet18 on 16 px, 10,572 identities) and the embedded recipe. The goal of the project is
1.10: shared/kernels/README.md says where each of them is, and what is in the way.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import aird.config
import aird.losses
import aird.model
import crrcd.config
import crrcd.losses
import crrcd.model
from aird.pairs import Pairs
from benchmarks.measure import confirmed, median
from shared.config import Network
from shared.contrast import Normaliser, derangement
from shared.data.kept import Rows
from shared.losses import kd, nce
from shared.models.recogniser import Recogniser

Step = Callable[[], None]
KEPT = 6400  # images with a row in memory: a training set of any size is mapped from disk
SIZE = 16  # px
IMAGES_PER_CLASS = 4  # in a batch: AIRD needs positives


@dataclass(frozen=True)
class Scale:
    """Sizes of a step; the rest is the embedded recipe's."""

    student: Network
    batch: int
    classes: int
    dim_t: int
    images: int


SCALES = {
    "paper": Scale(Network("iresnet18", head="arcface", scale=64, margin=0.5), 96, 10_572, 512,
                   490_623),
    "embedded": Scale(Network(), 64, 320, 256, 6400),
}  # fmt: skip


class Own:
    """One batch and one student."""

    def __init__(self, scale: Scale, precision: torch.dtype | None, folder: Path) -> None:
        torch.manual_seed(0)
        self.scale, self.precision, self.folder = scale, precision, folder
        self.student = Recogniser(scale.student, SIZE, scale.classes)
        self.student.to(memory_format=torch.channels_last)
        x = torch.randn(scale.batch, 3, SIZE, SIZE)
        self.x = x.to(memory_format=torch.channels_last)
        people = torch.randperm(scale.classes)[: scale.batch // IMAGES_PER_CLASS]
        self.y = people.repeat_interleave(IMAGES_PER_CLASS)
        self.index = torch.randperm(KEPT)[: scale.batch]
        self.e_t = torch.randn(scale.batch, scale.dim_t)
        self.z_t = torch.randn(scale.batch, scale.classes)

    def embedding(self) -> Tensor:
        enabled = self.precision is not None
        with torch.autocast("cpu", self.precision or torch.bfloat16, enabled=enabled):
            return self.student(self.x)

    def step(self) -> None:
        self.student.zero_grad(set_to_none=True)
        F.cross_entropy(self.student.logits(self.embedding(), self.y), self.y).backward()

    def outputs(self) -> tuple[Tensor, Tensor, Tensor]:
        """(embedding, cross-entropy, margin-free logits)."""
        e_s = self.embedding()
        z_margin, z_s = self.student.logit_pair(e_s, self.y)
        return e_s, F.cross_entropy(z_margin, self.y), z_s


def crrcd_step(own: Own) -> Step:
    c, scale = crrcd.config.RECIPES["embedded"], own.scale
    relation = crrcd.model.RelationCritic(scale.dim_t, own.student.dim, c.d)
    queue = crrcd.model.FeatureQueue(c.queue, scale.dim_t)
    normaliser = Normaliser(c.normaliser, m=scale.images, tau=c.tau)
    labels = torch.randint(scale.classes, (c.queue,))
    queue.push(torch.randn(c.queue, scale.dim_t), labels, torch.arange(c.queue))
    draws = torch.Generator().manual_seed(1)

    def step() -> None:
        for module in (own.student, relation):
            module.zero_grad(set_to_none=True)
        e_s, cls, z_s = own.outputs()
        kd_ = kd(z_s, own.z_t, c.rho)
        i = derangement(scale.batch, draws)
        k = queue.sample(own.y, c.n, exclude=own.index[i], generator=draws)
        positive, negatives = relation(own.e_t, e_s, own.e_t[i], queue.features, k)
        log_z = normaliser(positive.detach(), negatives.detach())
        rcd = nce(positive, negatives, tau=c.tau, m=scale.images, log_z=log_z)
        queue.push(own.e_t, own.y, own.index)
        crrcd.losses.L_total(cls, kd_, rcd, alpha=c.alpha, beta=c.beta).backward()

    return step


def aird_step(own: Own) -> Step:
    c, scale = aird.config.RECIPES["embedded"], own.scale
    relation = aird.model.RelationCritic(scale.dim_t, own.student.dim, c.d)
    normaliser = Normaliser(c.normaliser, m=scale.images, tau=c.tau)
    negatives = Rows(own.folder / "negatives", 1, KEPT, c.n, torch.int16, KEPT)
    negatives.create()
    negatives.write(0, 0, torch.randint(c.pool, (KEPT, c.n), dtype=torch.int16))
    embeddings = torch.randn(KEPT, scale.dim_t).numpy()
    classes = torch.arange(c.pool)
    pairs = Pairs(torch.randn(c.pool, scale.dim_t), classes, embeddings, negatives, c.n)
    draws = torch.Generator().manual_seed(1)

    def step() -> None:
        for module in (own.student, relation):
            module.zero_grad(set_to_none=True)
        e_s, cls, z_s = own.outputs()
        iid = aird.losses.L_iid(own.z_t, z_s, own.y, temperature=c.temperature, mode="paper")
        i, k, paired = pairs.draw(own.index, own.y, draws)
        cos_pos, cos_neg = relation(own.e_t, e_s, own.e_t[i], pairs.bank, k)
        log_z = normaliser(cos_pos.detach(), cos_neg.detach())
        rid = aird.losses.rid(cos_pos, cos_neg, paired, tau=c.tau, m=scale.images, log_z=log_z)
        aird.losses.L_total(cls, iid, rid, alpha=c.alpha, beta=c.beta).backward()

    return step


METHODS = {"crrcd": crrcd_step, "aird": aird_step}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("method", METHODS)
def test_whole_step(method: str, scale: str, precision: str, tmp_path, bounds, record) -> None:
    own = Own(SCALES[scale], torch.bfloat16 if precision == "bf16" else None, tmp_path)
    if precision == "bf16" and median(own.step) > median(Own(SCALES[scale], None, tmp_path).step):
        pytest.skip("bf16 is slower than fp32 on this processor, and no run would choose it")
    name = f"{method} step against the student's own, {scale}, {precision}"
    bound = bounds.get(name, {}).get("speed", 0)
    found = confirmed(own.step, METHODS[method](own), bound)
    record(name, speed=found)
    print(f"{name}: {1 / found:.2f} times as long")
    assert found >= bound

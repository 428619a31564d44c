"""A whole CRRCD step against the student's own forward and backward pass on the same batch.

Embedded recipe, teacher outputs at hand (a cached teacher costs nothing): what is left is what the
method itself adds. The goal of the project is 1.10; see shared/kernels/README.md for where this is.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from benchmarks.measure import confirmed, median
from crrcd.config import RECIPES
from crrcd.losses import L_total
from crrcd.model import FeatureQueue, Normaliser, RelationCritic, derangement
from shared.losses import kd, nce
from shared.models.recogniser import Recogniser

NAME = "crrcd step against the student's own"
CLASSES, DIM_T, IMAGES = 320, 256, 6400  # identities, teacher features, images


def steps(precision: torch.dtype | None) -> tuple[Callable[[], None], Callable[[], None]]:
    """(the student's forward and backward, the same with kd, relations and the queue)."""
    c = RECIPES["embedded"]
    torch.manual_seed(0)
    batch = c.optim.batch
    student = Recogniser(c.student, c.data.lr, CLASSES).to(memory_format=torch.channels_last)
    relation = RelationCritic(DIM_T, student.dim, c.d)
    queue, normaliser = FeatureQueue(c.queue, DIM_T), Normaliser("crd", m=IMAGES, tau=c.tau)
    x = torch.randn(batch, 3, c.data.lr, c.data.lr).to(memory_format=torch.channels_last)
    y, index = torch.randint(CLASSES, (batch,)), torch.randperm(IMAGES)[:batch]
    e_t, z_t = torch.randn(batch, DIM_T), torch.randn(batch, CLASSES)
    labels = torch.randint(CLASSES, (c.queue,))
    queue.push(torch.randn(c.queue, DIM_T), labels, torch.arange(c.queue))
    draws = torch.Generator().manual_seed(1)

    def forward() -> tuple[torch.Tensor, torch.Tensor]:
        with torch.autocast("cpu", precision or torch.bfloat16, enabled=precision is not None):
            e_s = student(x)
        return e_s, F.cross_entropy(student.logits(e_s, y), y)

    def alone() -> None:
        student.zero_grad(set_to_none=True)
        forward()[1].backward()

    def distilled() -> None:
        for module in (student, relation):
            module.zero_grad(set_to_none=True)
        e_s, cls = forward()
        kd_ = kd(student.logits(e_s), z_t, c.rho)
        i = derangement(batch, draws)
        k = queue.sample(y, c.n, exclude=index[i], generator=draws)
        positive, negatives = relation(e_t, e_s, e_t[i], queue.features, k)
        log_z = normaliser(positive.detach(), negatives.detach())
        rcd = nce(positive, negatives, tau=c.tau, m=IMAGES, log_z=log_z)
        queue.push(e_t, y, index)
        L_total(cls, kd_, rcd, alpha=c.alpha, beta=c.beta).backward()

    return alone, distilled


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_whole_step(precision: str, bounds, record) -> None:
    alone, distilled = steps(torch.bfloat16 if precision == "bf16" else None)
    if precision == "bf16" and median(alone) > median(steps(None)[0]):
        pytest.skip("bf16 is slower than fp32 on this processor, and no run would choose it")
    name = f"{NAME}, {precision}"
    bound = bounds.get(name, {}).get("speed", 0)
    found = confirmed(alone, distilled, bound)
    record(name, speed=found)
    print(f"{name}: {1 / found:.2f} times as long")
    assert found >= bound

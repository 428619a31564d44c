"""What relational contrastive losses share beside the loss itself (shared.losses.nce)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Literal

import torch
from torch import Tensor, nn


def log_normaliser(scores: Tensor, *, m: int) -> Tensor:
    """ln Z, Z = m * mean of e^score over `scores` (cosine / tau, any shape): CRD's constant."""
    return math.log(m) + torch.logsumexp(scores.flatten(), 0) - math.log(scores.numel())


class Normaliser(nn.Module):
    """ln Z of the critic. paper: 0. crd: set by the first batch, then frozen. crd-ema: averaged.

    m: training-set size. tau: temperature of the scores.
    """

    log_z: Tensor
    seen: Tensor

    def __init__(
        self,
        mode: Literal["paper", "crd", "crd-ema"],
        *,
        m: int,
        tau: float,
        momentum: float = 0.99,
    ) -> None:
        super().__init__()
        self.mode, self.m, self.tau, self.momentum = mode, m, tau, momentum
        self.register_buffer("log_z", torch.zeros(()))
        self.register_buffer("seen", torch.zeros((), dtype=torch.bool))

    @torch.no_grad()
    def forward(self, positive: Tensor, negatives: Tensor) -> Tensor:
        """Cosines [B], [B, n] of the global batch -> ln Z, a scalar that waits for nothing."""
        if self.mode != "paper":
            scores = torch.cat([positive[:, None], negatives], dim=1) / self.tau
            now = log_normaliser(scores, m=self.m)
            kept = self.log_z
            if self.mode == "crd-ema":
                kept = self.momentum * self.log_z + (1 - self.momentum) * now
            self.log_z.copy_(torch.where(self.seen, kept, now))
            self.seen.fill_(True)
        return self.log_z


class CollapseAlarm:
    """Watches cos+ - cos-: where it stays at 0, relations say nothing and L_rcd teaches nothing.

    say: called with one line after `patience` logged steps in a row below `gap`; the run goes on.
    """

    def __init__(self, say: Callable[[str], None], gap: float = 0.02, patience: int = 20) -> None:
        self.say, self.gap, self.patience, self.low = say, gap, patience, 0

    def watch(self, logged: Mapping[str, float] | None) -> None:
        """The terms of a logged step, or None between two of them."""
        if not logged or "cos_pos" not in logged:
            return
        self.low = self.low + 1 if logged["cos_pos"] - logged["cos_neg"] < self.gap else 0
        if self.low == self.patience:
            self.say(
                f"warning: collapse: cos+ - cos- below {self.gap} for {self.patience} logged steps "
                "in a row; try --optim.clip 1, a longer --optim.warmup or a lower --optim.lr"
            )


def derangement(size: int, generator: torch.Generator) -> Tensor:
    """partner[j] != j for every j: a random cycle through the batch, [size] int64."""
    if size < 2:
        raise ValueError("a batch of one image has no partner")
    order = torch.randperm(size, generator=generator, device=generator.device)
    partner = torch.empty_like(order)
    partner[order] = order.roll(1)
    return partner

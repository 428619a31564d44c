"""Optimiser and schedule from `Optim`. The rate is a function of the step, so nothing is stored."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from shared.config import Optim


def make(optim: Optim, modules: Iterable[nn.Module]) -> torch.optim.Optimizer:
    """SGD or Adam over the trainable parameters of `modules`; decay on all of them, as in the
    papers: added to the gradient (not decoupled). Adam: Kingma and Ba 2015, betas .9 and .999."""
    parameters = [p for m in modules for p in m.parameters() if p.requires_grad]
    if optim.method == "adam":
        return torch.optim.Adam(
            parameters, lr=optim.lr, weight_decay=optim.weight_decay, fused=True
        )
    return torch.optim.SGD(
        parameters,
        lr=optim.lr,
        momentum=optim.momentum,
        nesterov=optim.nesterov,
        weight_decay=optim.weight_decay,
        fused=True,
    )


def rate(optim: Optim, step: int, steps: int, steps_per_epoch: int) -> float:
    """Learning rate of step `step` (from 0) of `steps`.

    Linear warm-up over the first `optim.warmup` share of the steps, then a half cosine to 0, the
    share of the later steps that are left to a power ("poly"), or the peak times gamma for every
    milestone (in epochs) already reached.
    """
    warm = int(optim.warmup * steps)
    if step < warm:
        return optim.lr * (step + 1) / warm
    if optim.schedule == "cosine":
        return optim.lr * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))
    if optim.schedule == "poly":
        return optim.lr * (1 - (step - warm) / max(1, steps - warm)) ** optim.power
    epoch = step // steps_per_epoch
    return optim.lr * optim.gamma ** sum(epoch >= m for m in optim.milestones)


def set_rate(optimiser: torch.optim.Optimizer, value: float) -> None:
    for group in optimiser.param_groups:
        group["lr"] = value


def clip(optimiser: torch.optim.Optimizer, norm: float) -> Tensor:
    """Scale the whole gradient down to `norm` (0: leave it); returns the norm it had, a scalar."""
    parameters = [p for group in optimiser.param_groups for p in group["params"]]
    if norm > 0:
        return nn.utils.clip_grad_norm_(parameters, norm)
    grads = [p.grad for p in parameters if p.grad is not None]
    return nn.utils.get_total_norm(grads)

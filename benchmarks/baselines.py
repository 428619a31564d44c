"""What the kernels are compared with: the equations as anyone would write them first."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def naive_angle(student: Tensor, teacher: Tensor) -> Tensor:
    """RKD's angle loss: [N, N, D] differences, [N, N, N] cosines, mean over all entries."""

    def angles(x: Tensor) -> Tensor:
        e = F.normalize(x[None] - x[:, None], p=2, dim=2)
        return torch.bmm(e, e.transpose(1, 2))

    with torch.no_grad():
        target = angles(teacher)
    return F.smooth_l1_loss(angles(student), target)


def gram_angle(student: Tensor, teacher: Tensor) -> Tensor:
    """The same from Gram matrices, a few vertices at a time, gradient by autograd: six lines."""

    def angles(x: Tensor, vertices: slice) -> Tensor:
        g = x @ x.T
        square = g.diagonal()[:, None] + g.diagonal() - 2 * g
        r = (square + torch.eye(len(x), dtype=x.dtype)).rsqrt() * (1 - torch.eye(len(x)))
        at = g[vertices]
        num = g - at[:, :, None] - at[:, None, :] + g.diagonal()[vertices, None, None]
        return num * r[vertices, :, None] * r[vertices, None, :]

    step = max(1, (1 << 18) // len(student) ** 2)
    total = student.new_zeros(())
    for j in range(0, len(student), step):
        at = slice(j, j + step)
        with torch.no_grad():
            target = angles(teacher, at)
        total = total + F.smooth_l1_loss(angles(student, at), target, reduction="sum")
    return total / len(student) ** 3


def naive_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """RKD's distance loss: [N, N, D] differences, mean over all entries."""

    def relative(x: Tensor) -> Tensor:
        d = (x[None] - x[:, None]).square().sum(-1).clamp(min=1e-12).sqrt()
        d = d * (1 - torch.eye(len(x)))
        return d / d[d > 0].mean()

    with torch.no_grad():
        target = relative(teacher)
    return F.smooth_l1_loss(relative(student), target)


def cdist_distance(student: Tensor, teacher: Tensor) -> Tensor:
    def relative(x: Tensor) -> Tensor:
        d = torch.cdist(x, x)
        return d / d[d > 0].mean()

    with torch.no_grad():
        target = relative(teacher)
    return F.smooth_l1_loss(relative(student), target)


def naive_search(queries: Tensor, gallery: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """All cosines at once, then their top k."""
    return (F.normalize(queries) @ F.normalize(gallery).T).topk(k)


@functools.cache
def compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor] | None:
    """`function` through torch.compile; None on a machine without a C++ compiler."""
    if not (shutil.which("g++") or shutil.which("clang++")):
        return None
    return torch.compile(function, dynamic=False)

"""Distances to class centres, the student's against the teacher's, without holding [B, C]."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from shared.kernels import dispatch
from shared.kernels.center_distance_loss import reference

OP = "center_distance_loss"
SMALL = 1 << 16  # numbers in [B, C, D]: below, the calls of the tiles cost more than all of it


def center_distance_loss(
    student: Tensor,
    teacher: Tensor,
    centers: Tensor,
    *,
    reduction: Literal["mean", "sum"] = "mean",
    backend: str = "auto",
) -> Tensor:
    """sum over i and c of (|f_i - u_c| - |g_i - u_c|)^2; a scalar.

    student: g, [B, D], teacher: f, [B, D], centers: u, [C, D]; only student receives gradient.
    reduction: "sum", or "mean", which divides by B C. No rows or no centres: 0. A student's row on
    a centre has no gradient from that centre. A NaN or inf in any input: NaN, and NaN gradients of
    the rows it meets.

    Source: HORKD Eq. 6-7 (L_C). Memory: four times [B, D] and some 10 MiB of tiles. Cost: three
    B C D, one pass for value and gradient, and D for each pair that float32 needs done from the
    differences of its rows (cpu.py). backend: "cpu" goes by tiles; they are plain torch, and "auto"
    takes them on CUDA too. "reference" is the equation under autograd, and holds [B, C, D]; "auto"
    takes it for small inputs on the CPU, and on other devices, of which some have no float64.
    Raises ValueError for shapes that do not fit, another reduction, and a backend that cannot take
    the tensors. Not twice differentiable, except by "reference".
    """
    for name, x in (("student", student), ("teacher", teacher), ("centers", centers)):
        dispatch.matrix(OP, name, x)
    if student.shape != teacher.shape or student.shape[1] != centers.shape[1]:
        raise ValueError(
            f"{OP}: student {tuple(student.shape)}, teacher {tuple(teacher.shape)} and centers "
            f"{tuple(centers.shape)} do not fit [B, D], [B, D], [C, D]"
        )
    if reduction not in ("mean", "sum"):
        raise ValueError(f"{OP}: no reduction {reduction!r}; there are: mean, sum")
    numbers = student.numel() * len(centers)
    paths, small = ("reference", "cpu"), numbers <= SMALL
    path = dispatch.choose(OP, backend, student, teacher, centers, paths=paths, small=small)
    (s, t, u), dtype = dispatch.common(OP, student, teacher.detach(), centers.detach())
    if path == "reference":
        with dispatch.without_autocast(s):
            total = reference.center_distance_loss(s, t, u)
    else:
        wants = student.requires_grad and torch.is_grad_enabled()
        total = _loss(s, t, u, wants)
    scale = 1 / max(1, len(s) * len(u)) if reduction == "mean" else 1.0
    return (total * scale).to(dtype)


def _compute(
    student: Tensor, teacher: Tensor, centers: Tensor, wants: bool
) -> tuple[Tensor, Tensor]:
    """(sum over rows and centres, its gradient [B, D]; empty unless `wants`)."""
    return dispatch.module(OP, "cpu").center_distance_loss(student, teacher, centers, wants)


_center_distance_loss = torch.library.custom_op(
    "lowres::center_distance_loss", _compute, mutates_args=()
)


@_center_distance_loss.register_fake
def _(student: Tensor, teacher: Tensor, centers: Tensor, wants: bool) -> Any:
    return student.new_empty(()), student.new_empty(student.shape if wants else (0,))


_loss = dispatch.loss_with_gradient(_center_distance_loss, _compute)

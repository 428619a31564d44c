"""Angle-wise relational distillation without the N^3 tensor."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from shared.kernels import dispatch
from shared.kernels.angle_loss import reference
from shared.kernels.reductions import Reduction, triplets

OP = "angle_loss"


def angle_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    delta: float = 1.0,
    reduction: Reduction = "mean",
    backend: str = "auto",
) -> Tensor:
    """Huber loss between the angles of the student's and of the teacher's triplets; a scalar.

    student: [N, D_s], teacher: [N, D_t], rows of one batch; only student receives gradient. At
    vertex j, c_jik = <x_i - x_j, x_k - x_j> / (|x_i - x_j| |x_k - x_j|), and
        L = sum over j and unordered {i, k}, all distinct, of h(c_jik(student) - c_jik(teacher)),
        h(e) = e^2 / 2 where |e| <= delta, else delta (|e| - delta / 2).
    reduction: "sum" is L; "mean" divides by N (N-1) (N-2) / 2; "rkd" is the mean over all N^3
    ordered entries, degenerate ones as zeros, as the published RKD code has it.
    A triplet with an arm of length 0 in either space (exact duplicates) counts as 0 and has no
    gradient. Fewer than three rows: 0. A NaN or inf in either input: NaN, and a NaN gradient. The
    result has the inputs' type: a sum in float16 overflows at 65504.

    Source: HORKD Eq. 4-5 (L_3); RKD, Park et al. 2019, Eq. 6-7.
    Memory: O(N^2) and both inputs. Cost: N^2 (D_s + D_t) and N^3 / 2 angles, one pass for value
    and gradient. backend: "reference" is the equation under autograd, N^2 D and N^3 in memory.
    Raises ValueError for shapes that do not fit, delta <= 0, another reduction, and a backend that
    cannot take the tensors. Not twice differentiable, except by "reference".
    """
    dispatch.matrix(OP, "student", student)
    dispatch.matrix(OP, "teacher", teacher)
    dispatch.same_rows(OP, student, teacher)
    if not delta > 0:
        raise ValueError(f"{OP}: delta is {delta}; it should be positive")
    path = dispatch.choose(OP, backend, student, teacher)
    (s, t), dtype = dispatch.common(OP, student, teacher.detach())
    scale = triplets(OP, len(s), reduction)
    if path == "reference":
        with dispatch.without_autocast(s):
            total = reference.angle_loss(s, t, delta)
    else:
        wants = student.requires_grad and torch.is_grad_enabled()
        total = _loss(s, t, float(delta), wants, path)
    return (total * scale).to(dtype)


def _compute(
    student: Tensor, teacher: Tensor, delta: float, wants: bool, path: str
) -> tuple[Tensor, Tensor]:
    """(sum over triplets, its gradient [N, D_s]; empty unless `wants`)."""
    return dispatch.module(OP, path).angle_loss(student, teacher, delta, wants)


_angle_loss = torch.library.custom_op("lowres::angle_loss", _compute, mutates_args=())


@_angle_loss.register_fake
def _(student: Tensor, teacher: Tensor, delta: float, wants: bool, path: str) -> Any:
    return student.new_empty(()), student.new_empty(student.shape if wants else (0,))


_loss = dispatch.loss_with_gradient(_angle_loss, _compute)

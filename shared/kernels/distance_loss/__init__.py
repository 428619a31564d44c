"""Distance-wise relational distillation."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from shared.kernels import dispatch
from shared.kernels.distance_loss import reference
from shared.kernels.reductions import Reduction, pairs

OP = "distance_loss"
PENALTIES = ("squared", "huber")


def distance_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    penalty: Literal["squared", "huber"] = "squared",
    delta: float = 1.0,
    reduction: Reduction = "mean",
    backend: str = "auto",
) -> Tensor:
    """Penalty on the difference of the student's and the teacher's relative distances; a scalar.

    student: [N, D_s], teacher: [N, D_t], rows of one batch; only student receives gradient, also
    through its mean distance. With d_ij = |x_i - x_j| and mu the mean of the d_ij above 0,
        L = sum over unordered {i, j} of h(d_ij / mu (student) - d_ij / mu (teacher)),
        h(e) = e^2 ("squared"), or e^2 / 2 up to delta and delta (|e| - delta / 2) beyond ("huber").
    reduction: "sum" is L; "mean" divides by N (N-1) / 2; "rkd" is the mean over all N^2 ordered
    entries, the diagonal as zeros, as the published RKD code has it.
    Duplicate rows have distance 0, which is compared like any other and has subgradient 0; they do
    not enter mu. Fewer than two rows, or no distance above 0 in a space: distances there are 0. A
    NaN or inf in either input: NaN, and a NaN gradient. The result has the inputs' type: a sum of
    float16 overflows at 65504.

    Source: HORKD Eq. 3 (L_2); RKD, Park et al. 2019, Eq. 4-5.
    Memory: O(N^2) and both inputs. Cost: N^2 (D_s + D_t). backend: "reference" is the equation
    under autograd, N^2 D in memory. Raises ValueError for shapes that do not fit, delta <= 0,
    another penalty or reduction, and a backend that cannot take the tensors. Not twice
    differentiable, except by "reference".
    """
    dispatch.matrix(OP, "student", student)
    dispatch.matrix(OP, "teacher", teacher)
    dispatch.same_rows(OP, student, teacher)
    if penalty not in PENALTIES:
        raise ValueError(f"{OP}: no penalty {penalty!r}; there are: {', '.join(PENALTIES)}")
    if not delta > 0:
        raise ValueError(f"{OP}: delta is {delta}; it should be positive")
    path = dispatch.choose(OP, backend, student, teacher)
    (s, t), dtype = dispatch.common(OP, student, teacher.detach())
    scale = pairs(OP, len(s), reduction)
    if path == "reference":
        with dispatch.without_autocast(s):
            total = reference.distance_loss(s, t, penalty, delta)
    else:
        wants = student.requires_grad and torch.is_grad_enabled()
        total = _loss(s, t, penalty, float(delta), wants, path)
    return (total * scale).to(dtype)


def _compute(
    student: Tensor, teacher: Tensor, penalty: str, delta: float, wants: bool, path: str
) -> tuple[Tensor, Tensor]:
    """(sum over pairs, its gradient [N, D_s]; empty unless `wants`)."""
    return dispatch.module(OP, path).distance_loss(student, teacher, penalty, delta, wants)


_distance_loss = torch.library.custom_op("lowres::distance_loss", _compute, mutates_args=())


@_distance_loss.register_fake
def _(
    student: Tensor, teacher: Tensor, penalty: str, delta: float, wants: bool, path: str
) -> Any:
    return student.new_empty(()), student.new_empty(student.shape if wants else (0,))


_loss = dispatch.loss_with_gradient(_distance_loss, _compute)

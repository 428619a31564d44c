"""Cosines of the angles between all triplets of rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from shared.kernels import dispatch
from shared.kernels.triplet_angles import reference

OP = "triplet_angles"


def triplet_angles(x: Tensor, *, backend: str = "auto") -> Tensor:
    """out[i, j, k] = <x_i - x_j, x_k - x_j> / (|x_i - x_j| |x_k - x_j|): the angle at vertex j.

    x: [N, D] -> [N, N, N] cosines, symmetric in i and k; 0 where an arm has length 0 (i = j, k = j,
    or duplicate rows), without gradient there. N = 0 gives an empty result. A NaN or inf in x makes
    all of the result NaN.

    Source: HORKD Eq. 4 (psi_a); RKD, Park et al. 2019, Eq. 6.
    Memory: the result and O(N^2). Cost: N^2 D + N^3; `angle_loss` compares two of them without
    holding either. backend: "reference" is the equation under autograd, N^2 D more in memory.
    Raises ValueError for another shape and a backend that cannot take x. Not twice differentiable,
    except by "reference".
    """
    dispatch.matrix(OP, "x", x)
    path = dispatch.choose(OP, backend, x)
    (x,), dtype = dispatch.common(OP, x)
    if path == "reference":
        with dispatch.without_autocast(x):
            return reference.triplet_angles(x).to(dtype)
    return _triplet_angles(x, path).to(dtype)


@torch.library.custom_op("lowres::triplet_angles", mutates_args=())
def _triplet_angles(x: Tensor, path: str) -> Tensor:
    return dispatch.module(OP, path).forward(x)


@_triplet_angles.register_fake
def _(x: Tensor, path: str) -> Tensor:
    return x.new_empty(x.shape[0], x.shape[0], x.shape[0])


@torch.library.custom_op("lowres::triplet_angles_backward", mutates_args=())
def _backward(grad: Tensor, x: Tensor, path: str) -> Tensor:
    return dispatch.module(OP, path).backward(grad, x)


@_backward.register_fake
def _(grad: Tensor, x: Tensor, path: str) -> Tensor:
    return x.new_empty(x.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, ctx.path = inputs
    ctx.save_for_backward(x)


def _autograd(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    return _backward(grad, *ctx.saved_tensors, ctx.path), None


_triplet_angles.register_autograd(_autograd, setup_context=_setup)
dispatch.in_float32(_triplet_angles)

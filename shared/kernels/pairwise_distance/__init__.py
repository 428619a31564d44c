"""Euclidean distances between rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from shared.kernels import dispatch
from shared.kernels.pairwise_distance import reference

OP = "pairwise_distance"
SMALL = 1 << 17  # numbers in [M, N, D]: measured, the reference is faster below on one core


def pairwise_distance(
    x: Tensor, y: Tensor | None = None, *, squared: bool = False, backend: str = "auto"
) -> Tensor:
    """out[i, j] = |x_i - y_j|, or its square; y = x where y is not given.

    x: [M, D], y: [N, D] -> [M, N]; 0 rows give an empty result. The distance of a row to itself and
    to its duplicates is exactly 0, with subgradient 0. An offset common to all rows costs no
    accuracy; pairs that nearly coincide are measured from their difference. A row with a NaN gives
    a row (or column) of NaN, and the others stay right.

    Memory: the result and a copy of the inputs. Cost: one product of [M, D] and [D, N].
    backend: "reference" is the equation under autograd and holds [M, N, D]. Raises ValueError for
    shapes that do not fit and for a backend that cannot take the tensors. Not twice differentiable,
    except by "reference".
    """
    dispatch.matrix(OP, "x", x)
    if y is not None:
        dispatch.matrix(OP, "y", y)
        if y.shape[1] != x.shape[1]:
            raise ValueError(f"{OP}: x has {x.shape[1]} columns and y {y.shape[1]}")
    given = [x] if y is None else [x, y]
    small = x.shape[0] * given[-1].shape[0] * x.shape[1] <= SMALL
    path = dispatch.choose(OP, backend, *given, small=small)
    given, dtype = dispatch.common(OP, *given)
    other = None if y is None else given[1]
    if path == "reference":
        with dispatch.without_autocast(x):
            return reference.pairwise_distance(given[0], other, squared).to(dtype)
    return _pairwise_distance(given[0], other, squared, path).to(dtype)


@torch.library.custom_op("lowres::pairwise_distance", mutates_args=())
def _pairwise_distance(x: Tensor, y: Tensor | None, squared: bool, path: str) -> Tensor:
    return dispatch.module(OP, path).forward(x, y, squared)


@_pairwise_distance.register_fake
def _(x: Tensor, y: Tensor | None, squared: bool, path: str) -> Tensor:
    return x.new_empty(x.shape[0], (x if y is None else y).shape[0])


@torch.library.custom_op("lowres::pairwise_distance_backward", mutates_args=())
def _backward(
    grad: Tensor, x: Tensor, y: Tensor | None, d: Tensor, squared: bool, path: str
) -> tuple[Tensor, Tensor]:
    """(gradient by x, gradient by y; empty without y)."""
    return dispatch.module(OP, path).backward(grad, x, y, d, squared)


@_backward.register_fake
def _(
    grad: Tensor, x: Tensor, y: Tensor | None, d: Tensor, squared: bool, path: str
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(0 if y is None else y.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, y, ctx.squared, ctx.path = inputs
    ctx.save_for_backward(x, y, output)


def _autograd(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, y, d = ctx.saved_tensors
    dx, dy = _backward(grad, x, y, d, ctx.squared, ctx.path)
    return dx, None if y is None else dy, None, None


_pairwise_distance.register_autograd(_autograd, setup_context=_setup)
dispatch.in_float32(_pairwise_distance)

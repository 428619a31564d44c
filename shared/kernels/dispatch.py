"""What every kernel does before it starts: check its tensors, pick a path, pick a type.

A path is a module of the operation's folder: reference.py (the equation), cpu.py, triton.py. Only
the chosen one is imported, so that a machine without triton, or without numba, loses that path
and nothing else.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

TRITON = find_spec("triton") is not None
NUMBA = find_spec("numba") is not None
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # triton's own name: run on the CPU
AUTOCAST = ("cpu", "cuda")
PATHS = ("reference", "cpu", "triton")


def choose(
    op: str, backend: str, *tensors: Tensor, paths: tuple[str, ...] = PATHS, small: bool = False
) -> str:
    """The path that `backend` means for these tensors; a path named is taken or refused.

    "auto": "cpu" for CPU tensors, but "reference" for those so small that the call itself is what
    costs; for CUDA tensors "triton" where it is installed, and for an op without one "cpu", whose
    torch code serves both; else "reference". Raises ValueError where a path does not exist or
    cannot take the tensors.
    """
    device = tensors[0].device.type
    if any(t.device != tensors[0].device for t in tensors):
        where = ", ".join(str(t.device) for t in tensors)
        raise ValueError(f"{op}: tensors lie on different devices ({where}); move them to one")
    if backend == "auto":
        if device == "cpu":
            return "reference" if small else "cpu"
        if device == "cuda" and "triton" not in paths:
            return "cpu"  # plain torch there
        return "triton" if device == "cuda" and TRITON else "reference"
    if backend not in paths:
        raise ValueError(f"{op}: no backend {backend!r}; there are: auto, {', '.join(paths)}")
    if backend == "cpu" and device != "cpu":
        raise ValueError(f"{op}: backend 'cpu' takes CPU tensors, and these lie on {device}")
    if backend == "triton":
        if not TRITON:
            raise ValueError(f"{op}: backend 'triton' needs triton, which is not installed")
        if device != "cuda" and not (INTERPRETED and device == "cpu"):
            raise ValueError(f"{op}: backend 'triton' takes CUDA tensors, these lie on {device}")
    return backend


def module(op: str, path: str) -> ModuleType:
    """shared.kernels.<op>.<path>, imported at its first use."""
    return import_module(f"shared.kernels.{op}.{path}")


def common(op: str, *tensors: Tensor) -> tuple[list[Tensor], torch.dtype]:
    """The tensors in the type that is computed in, and the type of the result.

    float64 where one of them is, else float32; the result has the type they promote to, except
    under autocast, where it stays float32. Raises ValueError for tensors that are not floats.
    """
    result = tensors[0].dtype
    for t in tensors:
        if not t.dtype.is_floating_point:
            raise ValueError(f"{op}: takes floating-point tensors, not {t.dtype}")
        result = torch.promote_types(result, t.dtype)
    compute = torch.float64 if result == torch.float64 else torch.float32
    if tensors[0].device.type in AUTOCAST and torch.is_autocast_enabled(tensors[0].device.type):
        result = compute
    return [t if t.dtype == compute else t.to(compute) for t in tensors], result


def without_autocast(x: Tensor) -> AbstractContextManager:
    """A context in which the reference, too, computes in the type of its tensors."""
    if x.device.type in AUTOCAST:
        return torch.autocast(x.device.type, enabled=False)
    return nullcontext()


def matrix(op: str, name: str, x: Tensor) -> None:
    """Raises ValueError unless x is [N, D]."""
    if x.ndim != 2:
        raise ValueError(f"{op}: {name} is {tuple(x.shape)}; it should be [N, D]")


def same_rows(op: str, student: Tensor, teacher: Tensor) -> None:
    """Raises ValueError unless both are features of the same N rows."""
    if len(student) != len(teacher):
        raise ValueError(
            f"{op}: student has {len(student)} rows and teacher {len(teacher)}; "
            "give both the same batch"
        )


def loss_with_gradient(op: Any, function: Callable[..., tuple[Tensor, Tensor]]) -> Callable:
    """The differentiable loss of `op`, whose `function` gives (loss, its gradient by input 0).

    The backward pass is one multiplication, so nothing else is kept between the passes. Registers
    the op's autograd and autocast; outside torch.compile the function is called without the
    dispatcher, which costs more than the loss of a small batch.
    """

    def setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(output[1])
        ctx.others = len(inputs) - 1

    def backward(ctx: Any, loss: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
        return (loss * ctx.saved_tensors[0], *[None] * ctx.others)

    op.register_autograd(backward, setup_context=setup)
    in_float32(op)

    def loss(*inputs: Any) -> Tensor:
        if torch.compiler.is_compiling():
            return op(*inputs)[0]
        return _LossWithGradient.apply(function, *inputs)

    return loss


class _LossWithGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, function: Callable[..., tuple[Tensor, Tensor]], *inputs: Any) -> Tensor:
        given = [x.detach() if isinstance(x, Tensor) else x for x in inputs]
        with without_autocast(given[0]):
            loss, gradient = function(*given)
        ctx.save_for_backward(inputs[0], gradient)
        ctx.others = len(inputs) - 1
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        student, gradient = ctx.saved_tensors
        found = grads[0] * gradient
        if torch.is_grad_enabled():  # create_graph: refuse instead of leaving a term out
            found = _Once.apply(student, found)
        return (None, found, *[None] * ctx.others)


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, student: Tensor, gradient: Tensor) -> Tensor:
        return gradient.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        raise RuntimeError("this loss is not twice differentiable: use backend='reference'")


def in_float32(op: Any) -> None:
    """Under autocast an op's inputs come in float32."""
    for device in AUTOCAST:
        op.register_autocast(device, torch.float32)


def indices(op: str, index: Tensor, *, rows: int, into: Tensor) -> None:
    """Raises ValueError unless index is [rows, K] int64, and on the CPU inside `into`."""
    if index.ndim != 2 or index.shape[0] != rows:
        raise ValueError(f"{op}: index is {tuple(index.shape)}; it should be [{rows}, K]")
    if index.dtype != torch.int64:
        raise ValueError(f"{op}: index is {index.dtype}; it should be torch.int64")
    if torch.compiler.is_compiling() or index.device.type != "cpu" or index.numel() == 0:
        return  # a wait for the device costs more than the check is worth
    low, high = (int(x) for x in index.aminmax())
    if low < 0 or high >= len(into):
        raise ValueError(
            f"{op}: index goes from {low} to {high}; it should stay within 0 to {len(into) - 1}"
        )

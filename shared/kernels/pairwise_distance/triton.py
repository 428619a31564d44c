"""`pairwise_distance` on a GPU: a program owns a tile [i, j] and sums squared differences over D.

See shared/kernels/gpu.py for why there is no matrix product. Without y only the tiles with j <= i
are computed, and each is written twice.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from shared.kernels import gpu


def forward(x: Tensor, y: Tensor | None, squared: bool) -> Tensor:
    """[M, N] distances."""
    m, n = len(x), len(x if y is None else y)
    block = gpu.tile(max(m, n), x.dtype)
    xt = gpu.columns(x, block)
    yt = xt if y is None else gpu.columns(y, block)
    out = torch.empty(m, n, dtype=xt.dtype, device=x.device)
    if not out.numel():
        return out
    if y is None:
        tiles = gpu.pairs_of_tiles(m, block)
    else:
        tiles = triton.cdiv(m, block) * triton.cdiv(n, block)
    with torch.cuda.device_of(x):
        _distances[(tiles,)](
            xt, yt, out, m, n, x.shape[1], xt.shape[1], yt.shape[1],
            SQUARED=squared, ALONE=y is None, BLOCK=block, **gpu.OPTIONS,
        )  # fmt: skip
    return out


def backward(
    grad: Tensor, x: Tensor, y: Tensor | None, d: Tensor, squared: bool
) -> tuple[Tensor, Tensor]:
    """With w = dL/d(d^2) * 2: dx_i = sum over j of w_ij (x_i - y_j)."""
    grad = grad.to(d.dtype)
    w = 2 * grad if squared else torch.where(d == 0, 0, grad / torch.where(d == 0, 1, d))
    if y is None:
        return gpu.pull_back((w + w.T).contiguous(), x, x), d.new_empty(0)
    return gpu.pull_back(w.T.contiguous(), x, y), gpu.pull_back(w.contiguous(), y, x)


def compiled_forms() -> list[gpu.Form]:
    """What is launched at typical sizes: the compile-only test walks it."""
    forms: list[gpu.Form] = []
    for kind, alone, block in (
        ("*fp32", True, 32),
        ("*fp32", False, 32),
        ("*fp64", True, 16),
    ):
        signature = dict.fromkeys(("xt", "yt", "out"), kind) | dict.fromkeys(("m", "n"), "i32")
        signature |= dict.fromkeys(("dim", "stride_x", "stride_y"), "i32:16")
        settings = {"SQUARED": False, "ALONE": alone, "BLOCK": block}
        forms.append((_distances, signature, settings, gpu.OPTIONS))
    return forms


@triton.jit
def _distances(
    xt, yt, out, m, n, dim, stride_x, stride_y,
    SQUARED: tl.constexpr, ALONE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    if ALONE:
        a, b = gpu.upper_tile(tl.program_id(0))
    else:
        rows = tl.cdiv(m, BLOCK)  # one axis: a second one ends at 65535 tiles
        a, b = tl.program_id(0) % rows, tl.program_id(0) // rows
    i = a * BLOCK + tl.arange(0, BLOCK)[:, None]
    j = b * BLOCK + tl.arange(0, BLOCK)[None, :]
    d = gpu.squares(xt, yt, i, j, dim, stride_x, stride_y, BLOCK)
    if not SQUARED:
        d = gpu.root(d)
    here = (i < m) & (j < n)
    tl.store(out + i.to(tl.int64) * n + j, d, mask=here)
    if ALONE:
        tl.store(out + j.to(tl.int64) * n + i, d, mask=here)

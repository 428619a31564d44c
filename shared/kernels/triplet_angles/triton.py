"""`triplet_angles` on a GPU: N^3 numbers written once, and read three times on the way back.

With P half the squared distances and r = 1 / length (0 for degenerate arms), the cosine at j is
    c_ijk = (P_ji + P_jk - P_ik) r_ji r_jk,
so that the forward pass is bound by writing its result. Backward, with h_ijk = g_ijk + g_kji, twice
the gradient by the squared length of the side ik is W_ik + M_ik + M_ki:
    W_ik = - sum over j of h_ijk r_ji r_jk                             (the side opposite j)
    M_ji = r_ji sum over k of h_ijk r_jk - r_ji^2 sum over k of h_ijk c_ijk     (an arm at j)
Both kernels take the two terms of h from tiles of either orientation, so that each is read along
its rows, and add them up apart until the end. P is float64 throughout: there is time for it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from shared.kernels import gpu

ROWS = 16  # vertices j a program of the forward pass writes for: it reads its tile of P once


def forward(x: Tensor) -> Tensor:
    """[N, N, N] cosines."""
    n = len(x)
    if n == 0:
        return x.new_empty(0, 0, 0)
    p, r, bad, block = _measured(x)
    out = r.new_empty(n, n, n)
    tiles = len(p) // block
    with torch.cuda.device_of(x):
        _angles[(tiles, tiles, triton.cdiv(n, ROWS))](
            p, r, bad, out, n, len(p), ROWS=ROWS, BLOCK=block, **gpu.OPTIONS
        )
    return out


def backward(grad: Tensor, x: Tensor) -> Tensor:
    """dL/dx from dL/dcosines [N, N, N], which need not be symmetric in i and k."""
    n = len(x)
    if n == 0:
        return x.new_empty(x.shape)
    p, r, bad, block = _measured(x)
    opposite, arms = torch.empty_like(r), torch.empty_like(r)  # padding is not read
    tiles = len(p) // block
    with torch.cuda.device_of(x):
        _opposite[(gpu.pairs_of_tiles(n, block),)](
            grad, *grad.stride(), r, opposite, n, len(p), BLOCK=block, **gpu.OPTIONS
        )
        _arms[(tiles, n)](grad, *grad.stride(), p, r, arms, n, len(p), BLOCK=block, **gpu.OPTIONS)
    w = opposite.add_(arms).add_(arms.T)
    return gpu.pull_back(w, x, x).add_(bad).to(x.dtype)


def _measured(x: Tensor) -> tuple[Tensor, Tensor, Tensor, int]:
    """(half squared distances, 1 / distance or 0, 0 or NaN where x is not finite, tile)."""
    n, block = len(x), gpu.tile(len(x), x.dtype)
    xt = gpu.columns(x, block)
    r = xt.new_empty(xt.shape[1], xt.shape[1])
    p = torch.empty_like(r, dtype=torch.float64)
    with torch.cuda.device_of(x):
        _sides[(gpu.pairs_of_tiles(n, block),)](
            xt, p, r, n, len(xt), len(p), BLOCK=block, **gpu.DOUBLE
        )
    return p, r, (0 * p.diagonal().sum()).to(r.dtype), block


def compiled_forms() -> list[gpu.Form]:
    """What is launched at typical sizes: the compile-only test walks it."""
    counts = {"n": "i32:16", "stride": "i32:16"}
    inputs = {"xt": "*fp32", "p": "*fp64", "r": "*fp32", "dim": "i32:16"} | counts
    forms: list[gpu.Form] = [(_sides, inputs, {"BLOCK": 32}, gpu.DOUBLE)]
    inputs = {"p": "*fp64"} | dict.fromkeys(("r", "bad", "out"), "*fp32") | counts
    forms.append((_angles, inputs, {"ROWS": ROWS, "BLOCK": 32}, gpu.OPTIONS))
    settings = {"step_k": 1, "BLOCK": 32}
    inputs = dict.fromkeys(("grad", "r", "out"), "*fp32") | counts
    inputs |= {"step_i": "i32:16", "step_j": "i32:16"}
    forms.append((_opposite, inputs, settings, gpu.OPTIONS))
    forms.append((_arms, inputs | {"p": "*fp64"}, settings, gpu.OPTIONS))
    return forms


@triton.jit
def _sides(xt, p, r, n, dim, stride, BLOCK: tl.constexpr):
    a, b = gpu.upper_tile(tl.program_id(0))
    i = a * BLOCK + tl.arange(0, BLOCK)[:, None]
    j = b * BLOCK + tl.arange(0, BLOCK)[None, :]
    half = gpu.half_squares(xt, i, j, n, dim, stride, BLOCK)
    gpu.store_both(p, i, j, stride, half)
    half = half.to(xt.dtype.element_ty)
    gpu.store_both(r, i, j, stride, gpu.inverse_length(half, gpu.has_length(half)))


@triton.jit
def _angles(p, r, bad, out, n, stride, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[:, None]
    k = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[None, :]
    here = (i < n) & (k < n)
    p_ik = tl.load(p + i.to(tl.int64) * stride + k)
    poison = tl.load(bad)
    first = tl.program_id(2) * ROWS
    for j in range(first, tl.minimum(first + ROWS, n)):
        row = tl.cast(j, tl.int64) * stride
        p_ji, p_jk = tl.load(p + row + i), tl.load(p + row + k)
        r_ji, r_jk = tl.load(r + row + i), tl.load(r + row + k)
        c = (p_ji + (p_jk - p_ik)).to(r_ji.dtype) * (r_ji * r_jk) + poison
        tl.store(out + (i.to(tl.int64) * n + j) * n + k, c, mask=here)


@triton.jit
def _opposite(grad, step_i, step_j, step_k, r, out, n, stride, BLOCK: tl.constexpr):
    """W of a tile and its mirror image."""
    a, b = gpu.upper_tile(tl.program_id(0))
    i = a * BLOCK + tl.arange(0, BLOCK)
    k = b * BLOCK + tl.arange(0, BLOCK)
    at = grad + i[:, None].to(tl.int64) * step_i + k[None, :].to(tl.int64) * step_k  # g_ijk
    mirror = grad + k[:, None].to(tl.int64) * step_i + i[None, :].to(tl.int64) * step_k  # g_kji
    here = (i[:, None] < n) & (k[None, :] < n)
    here_mirror = (k[:, None] < n) & (i[None, :] < n)
    total = tl.zeros([BLOCK, BLOCK], r.dtype.element_ty)
    total_mirror = tl.zeros([BLOCK, BLOCK], r.dtype.element_ty)
    for j in range(n):
        row = r + tl.cast(j, tl.int64) * stride
        step = tl.cast(j, tl.int64) * step_j
        g = tl.load(at + step, mask=here, other=0.0).to(total.dtype)
        g_mirror = tl.load(mirror + step, mask=here_mirror, other=0.0).to(total.dtype)
        total += g * (tl.load(row + i[:, None]) * tl.load(row + k[None, :]))
        total_mirror += g_mirror * (tl.load(row + k[:, None]) * tl.load(row + i[None, :]))
    w = -(total + tl.trans(total_mirror)) * (i[:, None] != k[None, :]).to(total.dtype)
    gpu.store_both(out, i[:, None], k[None, :], stride, w)


@triton.jit
def _arms(grad, step_i, step_j, step_k, p, r, out, n, stride, BLOCK: tl.constexpr):
    """M_ji of one j and a tile of i."""
    j = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row_p, row_r = p + j * stride, r + j * stride
    p_ji, r_ji = tl.load(row_p + i[:, None]), tl.load(row_r + i[:, None])  # down a tile [i, k]
    p_ij, r_ij = tl.load(row_p + i[None, :]), tl.load(row_r + i[None, :])  # along a tile [k, i]
    straight = tl.zeros([BLOCK, BLOCK], r.dtype.element_ty)
    turned = tl.zeros([BLOCK, BLOCK], r.dtype.element_ty)
    straight_mirror = tl.zeros([BLOCK, BLOCK], r.dtype.element_ty)
    turned_mirror = tl.zeros([BLOCK, BLOCK], r.dtype.element_ty)
    for first in range(0, n, BLOCK):
        k = first + tl.arange(0, BLOCK)
        across = i[:, None].to(tl.int64) * step_i + j * step_j + k[None, :].to(tl.int64) * step_k
        g = tl.load(grad + across, mask=(i[:, None] < n) & (k[None, :] < n), other=0.0)
        # An angle between an arm and itself has no gradient. By multiplication: a NaN stays.
        g = g.to(straight.dtype) * (i[:, None] != k[None, :]).to(straight.dtype)
        p_jk, r_jk = tl.load(row_p + k[None, :]), tl.load(row_r + k[None, :])
        p_ik = tl.load(p + i[:, None].to(tl.int64) * stride + k[None, :])
        straight += g * r_jk
        turned += g * ((p_ji + (p_jk - p_ik)).to(g.dtype) * (r_ji * r_jk))

        down = k[:, None].to(tl.int64) * step_i + j * step_j + i[None, :].to(tl.int64) * step_k
        g = tl.load(grad + down, mask=(k[:, None] < n) & (i[None, :] < n), other=0.0)
        g = g.to(straight.dtype) * (k[:, None] != i[None, :]).to(straight.dtype)
        p_jk, r_jk = tl.load(row_p + k[:, None]), tl.load(row_r + k[:, None])
        p_ik = tl.load(p + k[:, None].to(tl.int64) * stride + i[None, :])
        straight_mirror += g * r_jk
        turned_mirror += g * ((p_ij + (p_jk - p_ik)).to(g.dtype) * (r_ij * r_jk))
    along = tl.sum(straight, 1) + tl.sum(straight_mirror, 0)
    around = tl.sum(turned, 1) + tl.sum(turned_mirror, 0)
    r_ji = tl.load(row_r + i)
    tl.store(out + j * stride + i, r_ji * (along - r_ji * around))

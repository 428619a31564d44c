"""`angle_loss` on a GPU: N^3 / 2 visits, N^2 numbers, each written by the one program that owns it.

With P, Q, R half the squared lengths of pm, qm, pq, and r = 1 / length, the triangle p, q, m has
    c_m = (P + Q - R) r_pm r_qm,   c_p = (R + P - Q) r_pq r_pm,   c_q = (R + Q - P) r_pq r_qm
and with g = h'(c_student - c_teacher), twice the gradient by the squared length of the side pq is
    W_pq = sum over m of r_pq (g_p r_pm + g_q r_qm) - g_m r_pm r_qm - r_pq^2 (g_p c_p + g_q c_q).
A program owns a tile [p, q] with q's block <= p's, walks all m, and reads 8 numbers a row and a
column of its tile for each: 38 instructions a visit, nothing between programs. Each triangle is met
three times, once by each side's owner; meeting it once would need 1/3 of the visits, and sums
between programs: atomics, or an N^3 / 32 buffer. The loss of an angle is taken from the owner of
the side opposite to it. r = 0 on degenerate arms, so that duplicates, m = p and m = q need no test
(a cosine of 1 in both spaces is left of them at most, and its rounding).

N = 4096: 34 G visits x 38 instructions / (132 x 128 lanes x 1.8 GHz) = 43 ms on an H200 if every
cycle issued one, and seven [N, N] matrices, 448 MiB.

In float32 a cosine is right to about 1e-7 times the longer over the shorter arm. Where a batch's
longest over its shortest distance is above RATIO (measured on the device: the host does not wait),
P is read as two numbers: a multiple of one grid for all, so that sums and differences of three are
exact, and the rest. That is 23 instructions more a visit, and as good as float64. Both kernels are
launched, and the one that is not meant returns at once. Distances below 1e-18 or above 1e18 leave
float32's range here.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from shared.kernels import gpu

RATIO = tl.constexpr(16)  # of distances: float32 is right to 1e-6 below


def angle_loss(
    student: Tensor, teacher: Tensor, delta: float, wants: bool
) -> tuple[Tensor, Tensor]:
    """(sum over triplets, its gradient [N, D_s] where it is wanted)."""
    n = len(student)
    if n == 0:
        return student.new_zeros(()), student.new_empty(student.shape if wants else 0)
    dtype = torch.promote_types(student.dtype, teacher.dtype)
    block = gpu.tile(n, dtype)
    xs, xt = gpu.columns(student.to(dtype), block), gpu.columns(teacher.to(dtype), block)
    padded, count = xs.shape[1], gpu.pairs_of_tiles(n, block)
    # For each row and tile of columns: P, r of the student, P, r of the teacher, rests of both P.
    # Side by side they are read at fixed distances from one address: addresses were a tenth of all
    # instructions.
    sides = xs.new_empty(padded, padded // block, 6, block)
    peaks = xs.new_empty(count, 4)
    w = xs.new_empty(padded, padded) if wants else sides  # not touched where not wanted
    loss = xs.new_empty(count)
    limit = xs.new_full((1,), min(delta, 4.0))  # cosines differ by 2 at most
    with torch.cuda.device_of(student):
        _sides[(count,)](
            xs, xt, sides, peaks, n, len(xs), len(xt), padded, BLOCK=block, **gpu.DOUBLE
        )
        peak = peaks.amax(0)
        for split in (False, True):
            _triangles[(count,)](
                sides, peak, limit, w, loss, n, padded,
                SPLIT=split, GRADIENT=wants, BLOCK=block, **gpu.OPTIONS,
            )  # fmt: skip
    total = loss.sum(dtype=torch.float64)
    if not wants:
        return total.to(student.dtype), student.new_empty(0)
    gradient = gpu.pull_back(w, student, student)
    gradient += 0 * total  # the clamp drops a NaN that the value carries
    return total.to(student.dtype), gradient.to(student.dtype)


def compiled_forms() -> list[gpu.Form]:
    """What is launched at typical sizes: the compile-only test walks it."""
    counts = {"n": "i32", "stride": "i32:16"}
    inputs = dict.fromkeys(("xs", "xt", "sides", "peaks"), "*fp32") | counts
    inputs |= {"dim_s": "i32:16", "dim_t": "i32:16"}
    forms: list[gpu.Form] = [(_sides, inputs, {"BLOCK": 32}, gpu.DOUBLE)]
    for kind, split, gradient, block in (
        ("*fp32", False, True, 32),
        ("*fp32", True, True, 32),
        ("*fp32", False, False, 32),
        ("*fp32", False, True, 16),
        ("*fp64", False, True, 16),
    ):
        inputs = dict.fromkeys(("sides", "peak", "limit", "w", "loss"), kind) | counts
        settings = {"SPLIT": split, "GRADIENT": gradient, "BLOCK": block}
        forms.append((_triangles, inputs, settings, gpu.OPTIONS))
    return forms


@triton.jit
def _sides(xs, xt, sides, peaks, n, dim_s, dim_t, stride, BLOCK: tl.constexpr):
    """Half squared distances of both spaces, and 1 / distance where both have one, else 0.

    peaks: the largest of each in a tile.
    """
    a, b = gpu.upper_tile(tl.program_id(0))
    lane = tl.arange(0, BLOCK)
    i = a * BLOCK + lane[:, None]
    j = b * BLOCK + lane[None, :]
    s64 = gpu.half_squares(xs, i, j, n, dim_s, stride, BLOCK)
    t64 = gpu.half_squares(xt, i, j, n, dim_t, stride, BLOCK)
    s, t = s64.to(xs.dtype.element_ty), t64.to(xs.dtype.element_ty)
    s_rest, t_rest = (s64 - s).to(s.dtype), (t64 - t).to(s.dtype)
    there = gpu.has_length(s) & gpu.has_length(t)
    r, rt = gpu.inverse_length(s, there), gpu.inverse_length(t, there)
    # Twice, for the mirror image.
    at = sides + i.to(tl.int64) * (6 * stride) + b * (6 * BLOCK) + lane[None, :]
    _store(at, s, r, t, rt, s_rest, t_rest, BLOCK)
    at = sides + j.to(tl.int64) * (6 * stride) + a * (6 * BLOCK) + lane[:, None]
    _store(at, s, r, t, rt, s_rest, t_rest, BLOCK)
    at = peaks + 4 * tl.program_id(0)
    tl.store(at, tl.max(s))
    tl.store(at + 1, tl.max(r))
    tl.store(at + 2, tl.max(t))
    tl.store(at + 3, tl.max(rt))


@triton.jit
def _store(at, s, r, t, rt, s_rest, t_rest, BLOCK: tl.constexpr):
    tl.store(at, s)
    tl.store(at + BLOCK, r)
    tl.store(at + 2 * BLOCK, t)
    tl.store(at + 3 * BLOCK, rt)
    tl.store(at + 4 * BLOCK, s_rest)
    tl.store(at + 5 * BLOCK, t_rest)


@triton.jit
def _triangles(
    sides, peak, limit, w, loss, n, stride,
    SPLIT: tl.constexpr, GRADIENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """W of a tile and its mirror image, and a tile's part of the loss."""
    peak_s, peak_t = tl.load(peak), tl.load(peak + 2)
    ratio_s = tl.sqrt(2.0 * peak_s) * tl.load(peak + 1)
    ratio_t = tl.sqrt(2.0 * peak_t) * tl.load(peak + 3)
    if ((ratio_s > RATIO) | (ratio_t > RATIO)) != SPLIT:
        return
    a, b = gpu.upper_tile(tl.program_id(0))
    lane = tl.arange(0, BLOCK)
    p = a * BLOCK + lane[:, None]
    q = b * BLOCK + lane[None, :]
    at_p = sides + a * (6 * BLOCK) + lane[:, None]
    at_q = sides + b * (6 * BLOCK) + lane[None, :]
    at = at_q + p.to(tl.int64) * (6 * stride)
    R, r_pq = tl.load(at), tl.load(at + BLOCK)
    Rt, rt_pq = tl.load(at + 2 * BLOCK), tl.load(at + 3 * BLOCK)
    if SPLIT:
        R, R_rest = _split(R, tl.load(at + 4 * BLOCK), peak_s)
        Rt, Rt_rest = _split(Rt, tl.load(at + 5 * BLOCK), peak_t)
    delta = tl.load(limit)
    total = tl.zeros([BLOCK, BLOCK], R.dtype)
    straight = tl.zeros([BLOCK, BLOCK], R.dtype)
    turned = tl.zeros([BLOCK, BLOCK], R.dtype)
    for _ in range(n):
        P, r_pm = tl.load(at_p), tl.load(at_p + BLOCK)
        Q, r_qm = tl.load(at_q), tl.load(at_q + BLOCK)
        Pt, rt_pm = tl.load(at_p + 2 * BLOCK), tl.load(at_p + 3 * BLOCK)
        Qt, rt_qm = tl.load(at_q + 2 * BLOCK), tl.load(at_q + 3 * BLOCK)
        if SPLIT:
            P, P_rest = _split(P, tl.load(at_p + 4 * BLOCK), peak_s)
            Q, Q_rest = _split(Q, tl.load(at_q + 4 * BLOCK), peak_s)
            Pt, Pt_rest = _split(Pt, tl.load(at_p + 5 * BLOCK), peak_t)
            Qt, Qt_rest = _split(Qt, tl.load(at_q + 5 * BLOCK), peak_t)
        at_p += 6 * stride
        at_q += 6 * stride

        n_m, nt_m = P + (Q - R), Pt + (Qt - Rt)
        if SPLIT:
            n_m += P_rest + (Q_rest - R_rest)
            nt_m += Pt_rest + (Qt_rest - Rt_rest)
        u_m = r_pm * r_qm
        e = n_m * u_m - nt_m * (rt_pm * rt_qm)
        g_m = tl.minimum(tl.maximum(e, -delta), delta)
        total += g_m * (e - 0.5 * g_m)
        if GRADIENT:
            s, t = P - Q, Pt - Qt
            n_p, n_q, nt_p, nt_q = R + s, R - s, Rt + t, Rt - t
            if SPLIT:
                s, t = P_rest - Q_rest, Pt_rest - Qt_rest
                n_p += R_rest + s
                n_q += R_rest - s
                nt_p += Rt_rest + t
                nt_q += Rt_rest - t
            u_p, u_q = r_pq * r_pm, r_pq * r_qm
            c_p, c_q = n_p * u_p, n_q * u_q
            e = c_p - nt_p * (rt_pq * rt_pm)
            g_p = tl.minimum(tl.maximum(e, -delta), delta)
            e = c_q - nt_q * (rt_pq * rt_qm)
            g_q = tl.minimum(tl.maximum(e, -delta), delta)
            straight += g_p * u_p
            straight += g_q * u_q
            straight -= g_m * u_m
            turned += g_p * c_p
            turned += g_q * c_q
    # By multiplication: a NaN stays.
    tl.store(loss + tl.program_id(0), tl.sum(total * (q < p).to(total.dtype)))
    if GRADIENT:
        both = (straight - r_pq * (r_pq * turned)) * (p != q).to(total.dtype)
        gpu.store_both(w, p, q, stride, both)


@triton.jit
def _split(p, rest, peak):
    """p as a multiple of float32's spacing at 4 peak, and what is left; p is at most peak.

    Up to peak there are at most 2^22 multiples: P + Q - R is a whole number of them below 2^24.
    4 peak is exact, so that it does not matter whether the compiler fuses it with the sum.
    """
    coarse = (p + 4.0 * peak) - 4.0 * peak
    return coarse, (p - coarse) + rest

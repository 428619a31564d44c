"""What `relation_scores` does around its matrix products, compiled by numba: serial, GIL-free.

Rows are read by one short loop a result: each has few enough arrays for the compiler to prove apart
and to use vectors, and the rows are in the first-level cache after the first loop.
"""

from __future__ import annotations

import numpy as np

from shared.kernels.compiled import loop


@loop
def relations(anchor, bank, index, r):
    """r[b, k] = relu(anchor_b - bank_index[b, k])."""
    zero = r.dtype.type(0)
    for b in range(index.shape[0]):
        near = anchor[b]
        for k in range(index.shape[1]):
            far, out = bank[index[b, k]], r[b, k]
            for j in range(out.shape[0]):
                e = near[j] - far[j]
                out[j] = zero if e <= zero else e  # NaN stays


@loop
def measure(r, ra, u, v, dot, square):
    """ra += v; dot = <r, u>; square = <r, rA> + 2 <r, v>."""
    zero = r.dtype.type(0)
    for b in range(r.shape[0]):
        own = u[b]
        for k in range(r.shape[1]):
            x, y = r[b, k], ra[b, k]
            along, length = zero, zero
            for j in range(x.shape[0]):
                z = y[j] + v[j]
                along += x[j] * own[j]
                length += x[j] * (z + v[j])
                y[j] = z
            dot[b, k] = along
            square[b, k] = length


@loop
def spread(p, s, r, u, kept, index, d_anchor, d_bank, sr):
    """dr = p u + s kept where r > 0: to the anchors and, negative, to the bank; sr = s r."""
    zero = r.dtype.type(0)
    dr = np.empty(r.shape[2], r.dtype)
    for b in range(r.shape[0]):
        own, into = u[b], d_anchor[b]
        for k in range(r.shape[1]):
            x, key, out, far = r[b, k], kept[b, k], sr[b, k], d_bank[index[b, k]]
            straight, turned = p[b, k], s[b, k]
            for j in range(dr.shape[0]):
                e = straight * own[j] + turned * key[j]
                dr[j] = e if x[j] > zero else zero
            for j in range(dr.shape[0]):
                out[j] = turned * x[j]
            for j in range(dr.shape[0]):
                into[j] += dr[j]
            for j in range(dr.shape[0]):
                far[j] -= dr[j]

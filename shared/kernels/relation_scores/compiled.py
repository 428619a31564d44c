"""What `relation_scores` does around its matrix products, compiled by numba: serial, GIL-free.

Where a row gives several results, one short loop for each or one loop for all is what was measured
faster: the first has few enough arrays for the compiler to prove apart, and the row is in the
first-level cache after the first loop; the second waits for the bank's rows only once.
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
def measure(key, query, bias, dot, norm):
    """key += bias; dot = <key, query>; norm = |key|."""
    zero = key.dtype.type(0)
    for b in range(key.shape[0]):
        own = query[b]
        for k in range(key.shape[1]):
            x = key[b, k]
            along, square = zero, zero
            for j in range(x.shape[0]):
                y = x[j] + bias[j]
                along += y * own[j]
                square += y * y
                x[j] = y
            dot[b, k] = along
            norm[b, k] = np.sqrt(square)


@loop
def turn(key, query, p, s, d_key, d_query, d_bias):
    """d_key = p query + s key; adds sum p key to d_query and sum d_key to d_bias."""
    for b in range(key.shape[0]):
        own, back = query[b], d_query[b]
        for k in range(key.shape[1]):
            x, to, straight, turned = key[b, k], d_key[b, k], p[b, k], s[b, k]
            for j in range(x.shape[0]):
                to[j] = straight * own[j] + turned * x[j]
            for j in range(x.shape[0]):
                back[j] += straight * x[j]
            for j in range(x.shape[0]):
                d_bias[j] += to[j]


@loop
def spread(r, dr, index, d_anchor, d_bank):
    """dr where r > 0: to the anchors and, negative, to the bank."""
    zero = r.dtype.type(0)
    for b in range(r.shape[0]):
        into = d_anchor[b]
        for k in range(r.shape[1]):
            x, whole, far = r[b, k], dr[b, k], d_bank[index[b, k]]
            for j in range(x.shape[0]):
                e = zero if x[j] <= zero else whole[j]  # NaN stays
                into[j] += e
                far[j] -= e


@loop
def scores(anchor, bank, index, query, dot, norm):
    """<r, query> and |r| of r = relu(anchor_b - bank_index[b, k]), which nobody keeps."""
    zero = dot.dtype.type(0)
    for b in range(index.shape[0]):
        near, own = anchor[b], query[b]
        for k in range(index.shape[1]):
            far = bank[index[b, k]]
            along, square = zero, zero
            for j in range(far.shape[0]):
                e = near[j] - far[j]
                e = zero if e <= zero else e
                along += e * own[j]
                square += e * e
            dot[b, k] = along
            norm[b, k] = np.sqrt(square)


@loop
def gradients(anchor, bank, index, query, p, s, d_query, d_anchor, d_bank):
    """Adds sum p r to d_query; dr = p query + s r where r > 0 to d_anchor and, negative, d_bank."""
    zero = anchor.dtype.type(0)
    for b in range(index.shape[0]):
        near, own, back, into = anchor[b], query[b], d_query[b], d_anchor[b]
        for k in range(index.shape[1]):
            far, to, straight, turned = bank[index[b, k]], d_bank[index[b, k]], p[b, k], s[b, k]
            for j in range(far.shape[0]):
                e = near[j] - far[j]
                r = zero if e <= zero else e  # NaN stays
                dr = zero if e <= zero else straight * own[j] + turned * r
                back[j] += straight * r
                into[j] += dr
                to[j] -= dr

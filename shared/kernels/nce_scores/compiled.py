"""Gathered rows times queries, compiled by numba: serial, GIL-free, and no copy of the rows.

Four rows at a time: their loads from memory overlap, and the query or the sum is touched once.
"""

from __future__ import annotations

from shared.kernels.compiled import loop


@loop
def scores(query, bank, index, out):
    """out[b, k] = <query_b, bank_index[b,k]>."""
    for b in range(index.shape[0]):
        q, i = query[b], index[b]
        fours = len(i) // 4 * 4
        zero = query.dtype.type(0)
        for k in range(0, fours, 4):
            r0, r1, r2, r3 = bank[i[k]], bank[i[k + 1]], bank[i[k + 2]], bank[i[k + 3]]
            s0, s1, s2, s3 = zero, zero, zero, zero
            for d in range(len(q)):
                s0 += q[d] * r0[d]
                s1 += q[d] * r1[d]
                s2 += q[d] * r2[d]
                s3 += q[d] * r3[d]
            out[b, k], out[b, k + 1], out[b, k + 2], out[b, k + 3] = s0, s1, s2, s3
        for k in range(fours, len(i)):
            r0, s0 = bank[i[k]], zero
            for d in range(len(q)):
                s0 += q[d] * r0[d]
            out[b, k] = s0


@loop
def query_gradient(grad, bank, index, out):
    """out_b += sum over k of grad[b, k] bank_index[b,k]."""
    for b in range(index.shape[0]):
        g, i, to = grad[b], index[b], out[b]
        fours = len(i) // 4 * 4
        for k in range(0, fours, 4):
            r0, r1, r2, r3 = bank[i[k]], bank[i[k + 1]], bank[i[k + 2]], bank[i[k + 3]]
            g0, g1, g2, g3 = g[k], g[k + 1], g[k + 2], g[k + 3]
            for d in range(len(to)):
                to[d] += (g0 * r0[d] + g1 * r1[d]) + (g2 * r2[d] + g3 * r3[d])
        for k in range(fours, len(i)):
            r0, g0 = bank[i[k]], g[k]
            for d in range(len(to)):
                to[d] += g0 * r0[d]


@loop
def bank_gradient(grad, query, index, out):
    """out_index[b,k] += grad[b, k] query_b, in the order of b, then k."""
    for b in range(index.shape[0]):
        g, i, q = grad[b], index[b], query[b]
        for k in range(len(i)):
            to, scale = out[i[k]], g[k]
            for d in range(len(q)):
                to[d] += scale * q[d]

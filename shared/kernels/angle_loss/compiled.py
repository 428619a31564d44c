"""The loop of `angle_loss` over triangles, compiled by numba: serial, and free of the GIL.

A triangle p < q < m has three angles, and each of its sides is arm of two and opposite of one. With
P, Q, R half the squared lengths of pm, qm, pq, and r = 1 / length:
    c_m = (P + Q - R) r_pm r_qm,   c_p = (R + P - Q) r_pq r_pm,   c_q = (R + Q - P) r_pq r_qm
so that the N^3 / 6 triangles, each taken once, need N^2 numbers and no differences of rows. With
g = h'(c_student - c_teacher), twice the gradient by the squared length of a side is
    W_pm = g_m r_pm r_qm + g_p r_pq r_pm - g_q r_pq r_qm - r_pm^2 (g_m c_m + g_p c_p)
and likewise for the other two.
"""

from __future__ import annotations

import numpy as np

from shared.kernels.compiled import arms, loop, small

ROWS = 8  # p that share a pass over q
COLUMNS = 512  # m of a pass: what is read and written per p stays in the second-level cache
LANES = 16  # rows are padded to whole vectors, so that no loop has a scalar tail


@loop
def triangles(Ds, Rs, Dt, Rt, delta, W):
    """Sum of h over all angles; adds W_pq to the upper triangle of W.

    Ds, Dt: [M, M] half squared distances; Rs, Rt: [M, M] 1 / distance, strictly upper triangle, 0
    where there is no arm; M a multiple of LANES. One type for all of them and delta.
    """
    n = Ds.shape[0]
    zero = delta - delta
    half = delta / (delta + delta)
    total = 0.0
    # Rows are copied into two blocks, at distances known when this is compiled: the compiler then
    # sees that a single test tells writes from reads, and uses vectors.
    bp = np.empty((ROWS, 5, COLUMNS), Ds.dtype)
    bq = np.empty((5, COLUMNS), Ds.dtype)
    for p0 in range(0, n, ROWS):
        for m0 in range(p0 // COLUMNS * COLUMNS, n, COLUMNS):
            columns = min(COLUMNS, n - m0)
            for i in range(ROWS):
                for m in range(columns):
                    bp[i, 0, m] = Ds[p0 + i, m0 + m]
                    bp[i, 1, m] = Rs[p0 + i, m0 + m]
                    bp[i, 2, m] = Dt[p0 + i, m0 + m]
                    bp[i, 3, m] = Rt[p0 + i, m0 + m]
                    bp[i, 4, m] = zero
            for q in range(p0 + 1, m0 + columns):
                first = max(0, q - m0) // LANES * LANES
                length = columns - first
                Q, rq, Qt, rqt, wq = bq[0], bq[1], bq[2], bq[3], bq[4]
                for m in range(length):
                    Q[m] = Ds[q, m0 + first + m]
                    rq[m] = Rs[q, m0 + first + m]
                    Qt[m] = Dt[q, m0 + first + m]
                    rqt[m] = Rt[q, m0 + first + m]
                    wq[m] = zero
                for i in range(min(ROWS, q - p0)):
                    p = p0 + i
                    P, rp, Pt = bp[i, 0, first:], bp[i, 1, first:], bp[i, 2, first:]
                    rpt, wp = bp[i, 3, first:], bp[i, 4, first:]
                    R, rr, Rt_, rrt = Ds[p, q], Rs[p, q], Dt[p, q], Rt[p, q]
                    if q >= m0:  # from here on this row counts only where m > q
                        rp[q - m0 - first] = zero
                        rpt[q - m0 - first] = zero
                    loss, straight, turned = zero, zero, zero
                    for m in range(length):
                        u, v, w = rr * rp[m], rr * rq[m], rp[m] * rq[m]
                        s, st = P[m] - Q[m], Pt[m] - Qt[m]
                        cm = (P[m] + (Q[m] - R)) * w
                        cp = (R + s) * u
                        cq = (R - s) * v
                        dm = cm - (Pt[m] + (Qt[m] - Rt_)) * (rpt[m] * rqt[m])
                        dp = cp - (Rt_ + st) * (rrt * rpt[m])
                        dq = cq - (Rt_ - st) * (rrt * rqt[m])
                        gm = min(max(dm, -delta), delta)
                        gp = min(max(dp, -delta), delta)
                        gq = min(max(dq, -delta), delta)
                        loss += (
                            gm * (dm - half * gm) + gp * (dp - half * gp) + gq * (dq - half * gq)
                        )
                        a, b, c = gm * w, gp * u, gq * v
                        A, B, C = gm * cm, gp * cp, gq * cq
                        wp[m] += (a + (b - c)) - rp[m] * rp[m] * (A + B)
                        wq[m] += (a - (b - c)) - rq[m] * rq[m] * (A + C)
                        straight += b + c - a
                        turned += B + C
                    total += loss
                    W[p, q] += straight - rr * rr * turned
                for m in range(length):
                    W[q, m0 + first + m] += wq[m]
            for i in range(ROWS):
                for m in range(columns):
                    W[p0 + i, m0 + m] += bp[i, 4, m]
    return total


@loop
def few(student, teacher, delta, gradient):
    """The whole loss of few rows in float64; adds its gradient [N, D_s] to `gradient`."""
    n = len(student)
    padded = -(-n // LANES) * LANES
    Ds, Dt, Rs, Rt, W = np.zeros((5, padded, padded))
    fine_s, fine_t = small(student, 0.0, Ds)[1], small(teacher, 0.0, Dt)[1]
    if not (fine_s and fine_t):
        gradient[:] = np.nan
        return np.nan
    arms(Ds, Dt, Rs, Rt)
    total = triangles(Ds, Rs, Dt, Rt, delta, W)
    for i in range(n):
        for j in range(i + 1, n):
            for k in range(student.shape[1]):
                e = W[i, j] * (np.float64(student[i, k]) - np.float64(student[j, k]))
                gradient[i, k] += e
                gradient[j, k] -= e
    return total

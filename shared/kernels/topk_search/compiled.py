"""The passes of `topk_search` that are no matrix product, compiled by numba: serial, GIL-free."""

from __future__ import annotations

from functools import partial

import numpy as np

from shared.kernels.compiled import FAST, loop

# Here and not in cpu.py: numba's cache on disk sees no change of another file.
BLOCK = 32  # gallery rows that one test covers
TILE = 512  # gallery rows that all queries measure before the next: they stay in the cache


@loop
def lengths(x, out):
    """out_i = |x_i| in float64."""
    for i in range(len(x)):
        row = x[i]
        square = 0.0
        for d in range(len(row)):
            square += np.float64(row[d]) * np.float64(row[d])
        out[i] = np.sqrt(square)


@loop
def centre(x, factors, mean, out, norms, along):
    """y_i = factors_i x_i - m in float64: out_i = y_i, norms_i = |y_i|, along_i = <m, y_i>."""
    for i in range(len(x)):
        row, to, factor = x[i], out[i], factors[i]
        square, inner = 0.0, 0.0
        for d in range(len(mean)):
            y = factor * np.float64(row[d]) - mean[d]
            to[d] = y
            square += y * y
            inner += y * mean[d]
        norms[i], along[i] = np.sqrt(square), inner


@loop
def test(tile, slack, norms, bias, bounds, hits):
    """hits[r, i]: how many entries of block i of a tile are above their row's bound.

    tile: [R, T] products with T gallery rows, T a multiple of BLOCK; an entry's key is
    tile[r, j] + slack[r] norms[j] + bias[j]. Apart from `collect`, beside which it got no vectors.
    """
    for r in range(tile.shape[0]):
        bound, a = bounds[r], slack[r]
        for i in range(tile.shape[1] // BLOCK):
            row = tile[r, i * BLOCK : i * BLOCK + BLOCK]
            n, b = norms[i * BLOCK : i * BLOCK + BLOCK], bias[i * BLOCK : i * BLOCK + BLOCK]
            above = np.int32(0)  # as wide as what is compared
            for j in range(BLOCK):
                above += np.int32(row[j] + (a * n[j] + b[j]) > bound)
            hits[r, i] = above


@loop
def collect(tile, slack, norms, bias, hits, first, keep, keys, places, counts, bounds):
    """Appends the entries of a tile that are above their row's bound to its list.

    first: the place of the tile's first gallery row. keys, places: [R, L], L > keep + BLOCK,
    counts: [R], bounds: [R]. A list without room for a block is cut to its `keep` best, and the
    bound raised to what leaves no more of it. Entries come by index, so of equal keys the lower
    index stays. Without branches, as each would be a guess at random: every entry is written, few
    are counted.
    """
    for r in range(hits.shape[0]):
        bound, a, count = bounds[r], slack[r], counts[r]
        row, own, at = tile[r], keys[r], places[r]
        for i in range(hits.shape[1]):
            if hits[r, i] == 0:
                continue
            to = np.uint64(count)  # unsigned: an index that might be negative costs a branch
            for j in range(np.uint64(i * BLOCK), np.uint64(i * BLOCK + BLOCK)):
                key = row[j] + (a * norms[j] + bias[j])
                own[to], at[to] = key, np.uint64(first) + j
                to += np.uint64(key > bound)
            count = np.int64(to)
            if count + BLOCK > len(own):
                bound = cut(own[:count], at, keep)
                count = keep
        bounds[r], counts[r] = bound, count


@loop
def finish(keep, keys, places, counts, bounds):
    """Cuts every list to `keep`; no entry left out is above its bound."""
    for r in range(len(counts)):
        bounds[r] = cut(keys[r, : counts[r]], places[r], keep)


@loop
def cut(keys, places, keep):
    """The `keep` best by key, then by order, stay, in order; returns what no other is above."""
    bound = select(keys, keep)
    room = keep - count_above(keys, bound)
    to = 0
    for i in range(len(keys)):
        key, place = keys[i], places[i]
        tie = (key == bound) & (room > 0)
        room -= tie
        keys[to], places[to] = key, place
        to += (key > bound) | tie
    return bound


@partial(loop, fastmath=FAST | {"nnan"})  # else min and max are no vectors
def select(keys, keep):
    """A number that `keep` of the keys are above, or fewer, where as many equal it as there lack.

    By halving, since counting is done in vectors. The keys are finite: no NaN is above a bound.
    """
    low, high = keys[0], keys[0]
    for i in range(len(keys)):
        low, high = min(low, keys[i]), max(high, keys[i])
    if count_above(keys, low) < keep:
        return low
    while True:
        middle = low + (high - low) / 2
        if middle <= low or middle >= high:
            return high
        above = count_above(keys, middle)
        if above == keep:
            return middle
        if above > keep:
            low = middle
        else:
            high = middle


@loop
def count_above(keys, bound):
    above = np.int32(0)
    for i in range(len(keys)):
        above += np.int32(keys[i] > bound)
    return above


@loop
def measure(queries, gallery, places, cosine, out):
    """out[r, c] = <q_r, g> or |q_r - g|^2 in float64, g = gallery[places[r, c]], places ascending.

    Always four rows at a time, the last one repeated: every pair is summed in the same order, so
    that equal rows get equal bits.
    """
    rows, columns = places.shape
    step = TILE if columns * TILE >= 8 * len(gallery) else len(gallery)
    at = np.zeros(rows, np.int64)
    q = np.empty(queries.shape[1])
    for stop in range(step, len(gallery) + step, step):
        for r in range(rows):
            c, end = at[r], at[r]
            while end < columns and places[r, end] < stop:
                end += 1
            if c == end:
                continue
            at[r] = end
            for d in range(len(q)):
                q[d] = np.float64(queries[r, d])
            for i in range(c, end, 4):
                j, k, m = min(i + 1, end - 1), min(i + 2, end - 1), min(i + 3, end - 1)
                g0, g1 = gallery[places[r, i]], gallery[places[r, j]]
                g2, g3 = gallery[places[r, k]], gallery[places[r, m]]
                s0, s1, s2, s3 = 0.0, 0.0, 0.0, 0.0
                if cosine:
                    for d in range(len(q)):
                        s0 += q[d] * np.float64(g0[d])
                        s1 += q[d] * np.float64(g1[d])
                        s2 += q[d] * np.float64(g2[d])
                        s3 += q[d] * np.float64(g3[d])
                else:
                    for d in range(len(q)):
                        s0 += (q[d] - np.float64(g0[d])) ** 2
                        s1 += (q[d] - np.float64(g1[d])) ** 2
                        s2 += (q[d] - np.float64(g2[d])) ** 2
                        s3 += (q[d] - np.float64(g3[d])) ** 2
                out[r, i], out[r, j], out[r, k], out[r, m] = s0, s1, s2, s3

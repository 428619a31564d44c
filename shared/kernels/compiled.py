"""Passes over N x N matrices that several kernels share, compiled by numba: serial, GIL-free."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy as np

# No nnan or ninf: what is not finite has to come out as such.
FAST = {"reassoc", "contract", "nsz", "arcp"}
# Numba keeps machine code by the file of a function: constants belong into the file that uses them.
TINY = 1e-30  # a square below it is near the end of float32's range
LARGE = 1e37


def loop(function: Callable, fastmath: set[str] = FAST) -> Callable:
    """`function` compiled at its first call, and kept on disk where there is a place to write."""
    options: dict[str, Any] = {"nogil": True, "fastmath": fastmath, "error_model": "numpy"}
    try:
        return numba.njit(cache=True, **options)(function)
    except RuntimeError:  # neither the package's folder nor the user's cache can be written
        return numba.njit(**options)(function)


@loop
def half_squares(gram, near, P):
    """P[i, j] = |x_i - x_j|^2 / 2 for i < j. Returns whether a pair is near."""
    n = gram.shape[0]
    norms = np.empty(n, gram.dtype)
    for i in range(n):
        norms[i] = gram[i, i]
    limit, tiny = gram.dtype.type(near), gram.dtype.type(TINY)
    half = gram.dtype.type(0.5)
    zero = gram.dtype.type(0)
    one = gram.dtype.type(1)
    close = zero
    for i in range(n):
        sums, squares, row, own = norms[i + 1 :], P[i, i + 1 : n], gram[i, i + 1 :], norms[i]
        for j in range(n - i - 1):
            s = own + sums[j]
            d = max(s - row[j] - row[j], zero)
            close += one if d <= limit * s + tiny else zero
            squares[j] = half * d
    return close > zero


@loop
def direct(x, gram, limit, P):
    """P[i, j] from the difference of rows where it is below limit (|x_i|^2 + |x_j|^2) / 2."""
    n, dim = x.shape
    for i in range(n):
        for j in range(i + 1, n):
            if 2 * P[i, j] <= limit * (gram[i, i] + gram[j, j]):
                square = 0.0
                for k in range(dim):
                    square += (x[i, k] - x[j, k]) ** 2
                P[i, j] = 0.5 * square


@loop
def small(x, near, P):
    """P[i, j] of few rows from their differences. Returns (whether a pair is near, all finite)."""
    n, dim = x.shape
    least, most = np.inf, 0.0
    for i in range(n):
        for j in range(i + 1, n):
            square = 0.0
            for k in range(dim):
                e = np.float64(x[i, k]) - np.float64(x[j, k])
                square += e * e
            P[i, j] = 0.5 * square
            least, most = min(least, square), max(most, square)
            if not square < np.inf:
                return False, False
    # |x_i|^2 + |x_j|^2 of centred rows is at most twice the largest squared distance
    return least <= 2 * near * most + TINY or most > LARGE, n > 1 or np.isfinite(x).all()


@loop
def arms(Ps, Pt, Rs, Rt):
    """Rs, Rt = 1 / distance where both spaces have one, else 0, from half squared distances."""
    n = Ps.shape[0]
    zero = Ps.dtype.type(0)
    one = Ps.dtype.type(1)
    for i in range(n):
        for j in range(n):
            s, t = Ps[i, j], Pt[i, j]
            there = (s > zero) & (t > zero)
            Rs[i, j] = one / np.sqrt(s + s) if there else zero
            Rt[i, j] = one / np.sqrt(t + t) if there else zero


@loop
def finish(part, x, norms_x, y, norms_y, near, squared):
    """part[i, j]: <x_i, y_j> on entry, |x_i - y_j| (or its square) on return.

    x, y: the rows as given, norms of the rows as centred for the product. What a product cannot
    tell (a near pair, and anything that is not finite or overflows) is taken from the difference
    of the rows, in float64.
    """
    limit, zero, one = part.dtype.type(near), part.dtype.type(0), part.dtype.type(1)
    tiny = part.dtype.type(TINY)
    for i in range(part.shape[0]):
        row, own = part[i], norms_x[i]
        close = zero
        for j in range(part.shape[1]):
            s = own + norms_y[j]
            d = s - row[j] - row[j]
            close += zero if d > limit * s + tiny else one
            row[j] = d
        if close > zero:
            for j in range(part.shape[1]):
                if row[j] > limit * (own + norms_y[j]) + tiny:
                    row[j] = row[j] if squared else np.sqrt(row[j])
                    continue
                square = 0.0
                for k in range(x.shape[1]):
                    e = np.float64(x[i, k]) - np.float64(y[j, k])
                    square += e * e
                row[j] = square if squared else np.sqrt(square)
        elif not squared:
            for j in range(part.shape[1]):
                row[j] = np.sqrt(row[j])

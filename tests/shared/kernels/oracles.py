"""The equations of the distance and angle kernels as plain float64 loops over Python floats."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations

Rows = Sequence[Sequence[float]]


def distance(a: Sequence[float], b: Sequence[float]) -> float:
    return math.dist(a, b)


def cosine(x: Rows, i: int, j: int, k: int) -> float | None:
    """Of the angle at j between i and k; None where an arm has length 0."""
    a = [p - q for p, q in zip(x[i], x[j], strict=True)]
    b = [p - q for p, q in zip(x[k], x[j], strict=True)]
    lengths = math.hypot(*a) * math.hypot(*b)
    return math.fsum(p * q for p, q in zip(a, b, strict=True)) / lengths if lengths else None


def huber(e: float, delta: float) -> float:
    return e * e / 2 if abs(e) <= delta else delta * (abs(e) - delta / 2)


def angle_sum(student: Rows, teacher: Rows, delta: float) -> float:
    """Sum over vertices j and unordered {i, k} of h(difference of cosines)."""
    terms = []
    for j in range(len(student)):
        for i, k in combinations([r for r in range(len(student)) if r != j], 2):
            a, b = cosine(student, i, j, k), cosine(teacher, i, j, k)
            if a is not None and b is not None:
                terms.append(huber(a - b, delta))
    return math.fsum(terms)


def relative(x: Rows) -> dict[tuple[int, int], float]:
    """Distances over the mean of those above 0, by pair i < j."""
    d = {(i, j): distance(x[i], x[j]) for i, j in combinations(range(len(x)), 2)}
    above = [v for v in d.values() if v > 0]
    mean = math.fsum(above) / len(above) if above else 1.0
    return {pair: v / mean for pair, v in d.items()}


def distance_sum(student: Rows, teacher: Rows, penalty: str, delta: float) -> float:
    s, t = relative(student), relative(teacher)
    terms = [s[pair] - t[pair] for pair in s]
    return math.fsum(e * e if penalty == "squared" else huber(e, delta) for e in terms)

"""How sure a score is: bootstrap intervals by item, by identity and by seed; paired comparisons.

Every function takes per-item results (a hit or a miss, a reciprocal rank, a loss), as torch tensors
or numpy arrays, and is deterministic in `seed`. An item is a pair, a probe or an image. Items that
share an identity are not independent: pass their identities as `groups`, and whole identities are
resampled (cluster bootstrap: the mean is a ratio of sums, since identities differ in size).

Percentile intervals and the two-way bootstrap follow Efron and Tibshirani, "An Introduction to the
Bootstrap" (1993), and Owen, "The pigeonhole bootstrap" (2007).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from scipy import stats

DRAWS_AT_ONCE = 2**21  # indices held in memory at once: 16 MB, and a few temporaries of that size


@dataclass(frozen=True)
class Interval:
    mean: float
    low: float
    high: float


def as_array(x: torch.Tensor | ArrayLike) -> np.ndarray:
    """The numpy array of a tensor on any device, or of anything array-like; bfloat16 as float32."""
    if isinstance(x, torch.Tensor):
        x = x.detach().cpu()
        return (x.float() if x.dtype == torch.bfloat16 else x).numpy()
    return np.asarray(x)


def bootstrap(
    values: torch.Tensor | ArrayLike,
    groups: torch.Tensor | ArrayLike | None = None,
    *,
    resamples: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Percentile bootstrap interval of the mean of `values` [N].

    groups [N] (numbers or strings) name the unit that is drawn with replacement; without them it is
    the item. ValueError: values not a finite vector, lengths that differ, fewer than two units.
    """
    sums, counts = _per_group(_vector(values, "values")[None], groups)
    low, high = _quantiles(_resampled_means(sums[0], counts, resamples, seed), level)
    return Interval(float(sums.sum() / counts.sum()), low, high)


def paired(
    a: torch.Tensor | ArrayLike,
    b: torch.Tensor | ArrayLike,
    groups: torch.Tensor | ArrayLike | None = None,
    *,
    resamples: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Interval of mean(a - b) for two models scored on the same items: a, b [N], in one order."""
    difference = _difference(_vector(a, "a"), _vector(b, "b"))
    return bootstrap(difference, groups, resamples=resamples, level=level, seed=seed)


def paired_p(
    a: torch.Tensor | ArrayLike,
    b: torch.Tensor | ArrayLike,
    groups: torch.Tensor | ArrayLike | None = None,
    *,
    resamples: int = 2000,
    seed: int = 0,
) -> float:
    """Two-sided bootstrap p-value of "mean(a - b) is 0"; a, b [N], in one order.

    With d the observed mean and d* a resampled one, d* - d stands for the noise under the null:
    p = (1 + #{|d* - d| >= |d|}) / (resamples + 1). The observed sample counts as one resample, so p
    is never 0 and its floor is 1 / (resamples + 1).
    """
    difference = _difference(_vector(a, "a"), _vector(b, "b"))
    sums, counts = _per_group(difference[None], groups)
    observed = sums.sum() / counts.sum()
    noise = _resampled_means(sums[0], counts, resamples, seed) - observed
    return _two_sided(noise, observed, np.abs(difference).max())


def compare(
    a: torch.Tensor | ArrayLike,
    b: torch.Tensor | ArrayLike,
    groups: torch.Tensor | ArrayLike | None = None,
    *,
    resamples: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> tuple[Interval, float]:
    """(interval of mean(a - b), two-sided p-value of "it is 0") of two models on the same items.

    a, b [N] in one order: what the evaluators give as `correct`, or any score of an item. Hits and
    misses (bool) of independent items (no groups) are compared by McNemar's exact test: of the
    items that one model alone gets right, either has half under the null (1 where there are none).
    All else by `paired_p`.
    """
    x, y = as_array(a), as_array(b)
    interval = paired(x, y, groups, resamples=resamples, level=level, seed=seed)
    if groups is None and x.dtype == y.dtype == bool:
        ahead, behind = np.count_nonzero(x & ~y), np.count_nonzero(y & ~x)
        p = stats.binomtest(ahead, ahead + behind).pvalue if ahead + behind else 1.0
        return interval, float(p)
    return interval, paired_p(x, y, groups, resamples=resamples, seed=seed)


def paired_seeds(
    a: torch.Tensor | ArrayLike,
    b: torch.Tensor | ArrayLike,
    groups: torch.Tensor | ArrayLike | None = None,
    *,
    resamples: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Interval of mean(a - b) over seeds and items: a, b [S, N], all seeds on the same items.

    Two-way bootstrap: each resample draws S seeds and, independently, all groups (or items), both
    with replacement. It covers new seeds and new identities at once. With few seeds the part due to
    them is about (S - 1) / S of its variance: three seeds are a look, not a proof.

    ValueError: shapes that differ, values that are not finite, fewer than two seeds or groups.
    """
    return compare_seeds(a, b, groups, resamples=resamples, level=level, seed=seed)[0]


def paired_seeds_p(
    a: torch.Tensor | ArrayLike,
    b: torch.Tensor | ArrayLike,
    groups: torch.Tensor | ArrayLike | None = None,
    *,
    resamples: int = 2000,
    seed: int = 0,
) -> float:
    """Two-sided p-value of "mean(a - b) over seeds and items is 0", defined as in `paired_p`, by
    the resamples of `paired_seeds`; a, b [S, N]."""
    return compare_seeds(a, b, groups, resamples=resamples, seed=seed)[1]


def compare_seeds(
    a: torch.Tensor | ArrayLike,
    b: torch.Tensor | ArrayLike,
    groups: torch.Tensor | ArrayLike | None = None,
    *,
    resamples: int = 2000,
    level: float = 0.95,
    seed: int = 0,
    few_seeds: bool = False,
) -> tuple[Interval, float]:
    """(`paired_seeds`, `paired_seeds_p`) from the same resamples: a, b [S, N].

    few_seeds: what a bootstrap of S seeds lacks is made up for: resampled deviations are multiplied
    by sqrt(S / (S - 1)) and by Student's t of S - 1 degrees of freedom over the normal's quantile
    (1.22 for 10 seeds). Where items and not seeds are most of the noise that is wider than need be.
    """
    difference = _difference(_matrix(a, "a"), _matrix(b, "b"))
    means, (observed,) = _two_way(difference[None], groups, resamples, seed)
    noise = means[:, 0] - observed
    if few_seeds:
        _check_level(level)
        s, tail = len(difference), (1 + level) / 2
        noise *= np.sqrt(s / (s - 1)) * stats.t.ppf(tail, s - 1) / stats.norm.ppf(tail)
    low, high = _quantiles(noise, level)
    interval = Interval(float(observed), float(observed + low), float(observed + high))
    return interval, _two_sided(noise, float(observed), np.abs(difference).max())


def ranks(
    values: torch.Tensor | ArrayLike,
    groups: torch.Tensor | ArrayLike | None = None,
    *,
    resamples: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> list[Interval]:
    """Rank of each method's mean, 1 the highest (equal means share their mean rank): values
    [K, S, N], K methods on the same seeds and items.

    Interval.mean is the observed rank. The two-way bootstrap of `paired_seeds`, with one draw of
    seeds and groups for all methods, so that what they share does not blur their order.
    """
    means, observed = _two_way(_finite(values, "values", 3), groups, resamples, seed)
    drawn = stats.rankdata(-means, axis=1)
    ours = stats.rankdata(-observed)
    return [
        Interval(float(rank), *_quantiles(column, level))
        for rank, column in zip(ours, drawn.T, strict=True)
    ]


def kendall(
    values: torch.Tensor | ArrayLike,
    groups: torch.Tensor | ArrayLike | None,
    reference: torch.Tensor | ArrayLike,
    *,
    resamples: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> tuple[Interval, float]:
    """(Kendall's tau-b between the means of K methods and fixed numbers of theirs, p of "there is
    no association"): values [K, S, N] as in `ranks`, reference [K], both higher for the better.

    The interval is over resamples of the values alone: the reference is taken as it is. p is
    scipy's for the observed ranking, exact for few methods without ties. Means that are all equal
    in a resample agree with nothing: tau 0. ValueError: all means, or all references, are equal.
    """
    means, observed = _two_way(_finite(values, "values", 3), groups, resamples, seed)
    fixed = _vector(reference, "reference")
    if len(fixed) != len(observed):
        raise ValueError(f"reference: {len(fixed)} numbers, needs one for each of {len(observed)}")
    tau = stats.kendalltau(observed, fixed)
    if np.isnan(tau.statistic):
        raise ValueError("kendall: all means or all references are equal, nothing to order")
    first, second = np.triu_indices(len(fixed), 1)
    wanted = np.sign(fixed[first] - fixed[second])  # [pairs]
    found = np.sign(means[:, first] - means[:, second])  # [resamples, pairs]
    untied = np.sqrt(np.count_nonzero(found, axis=1) * np.count_nonzero(wanted))
    low, high = _quantiles(found @ wanted / np.maximum(untied, 1), level)
    return Interval(float(tau.statistic), low, high), float(tau.pvalue)


def mean_interval(values: torch.Tensor | ArrayLike, *, level: float = 0.95) -> Interval:
    """Student t interval (S - 1 degrees of freedom) of a mean over runs: values [S], one a seed."""
    v = _vector(values, "values")
    if len(v) < 2:
        raise ValueError(f"mean_interval: {len(v)} value, needs at least 2 seeds")
    _check_level(level)
    half = stats.t.ppf((1 + level) / 2, len(v) - 1) * v.std(ddof=1) / np.sqrt(len(v))
    return Interval(float(v.mean()), float(v.mean() - half), float(v.mean() + half))


def holm(p_values: torch.Tensor | ArrayLike) -> np.ndarray:
    """Holm's step-down adjusted p-values [K], in the order given (Holm 1979).

    Adjusted p <= alpha rejects with a family-wise error of at most alpha, whatever the dependence.
    """
    p = _vector(p_values, "p_values")
    if (p < 0).any() or (p > 1).any():
        raise ValueError("holm: p_values must lie in [0, 1]")
    order = np.argsort(p, kind="stable")
    stepped = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(stepped, 1.0)
    return adjusted


def _resampled_means(sums: np.ndarray, counts: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """[resamples] means, each of len(counts) groups drawn with replacement: a ratio of sums."""
    rng = np.random.default_rng(seed)
    means = []
    for rows in _chunks(resamples, len(counts)):
        drawn = rng.integers(len(counts), size=(rows, len(counts)))
        means.append(sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1))
    return np.concatenate(means)


def _two_way(
    values: np.ndarray, groups: Any, resamples: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Means [resamples, K] of values [K, S, N] over drawn seeds x drawn groups, one draw for all K,
    and the observed means [K]."""
    methods, seeds, _ = values.shape
    if seeds < 2:
        raise ValueError(f"bootstrap over seeds: {seeds} seed, needs at least 2; use paired()")
    sums, counts = _per_group(values.reshape(methods * seeds, -1), groups)
    rng = np.random.default_rng(seed)
    means = []
    for rows in _chunks(resamples, len(counts)):
        seed_times = _times(rng, rows, seeds)
        group_times = _times(rng, rows, len(counts))
        # sums of hits are whole numbers, so these are exact however the products are ordered
        totals = (group_times @ sums.T).reshape(rows, methods, seeds)
        items = seeds * (group_times @ counts)
        means.append(np.einsum("rks,rs->rk", totals, seed_times) / items[:, None])
    observed = sums.reshape(methods, -1).sum(axis=1) / (seeds * counts.sum())
    return np.concatenate(means), observed


def _times(rng: np.random.Generator, rows: int, size: int) -> np.ndarray:
    """[rows, size]: how often each of `size` things is drawn by `size` draws with replacement."""
    drawn = rng.integers(size, size=(rows, size)) + size * np.arange(rows)[:, None]
    return np.bincount(drawn.ravel(), minlength=rows * size).reshape(rows, size).astype(float)


def _two_sided(noise: np.ndarray, observed: float, scale: float) -> float:
    """The p-value of `paired_p`; scale: the largest difference of an item."""
    # Hits and misses give few distinct means: a tie must not be lost to the last bit.
    extreme = np.abs(noise) >= abs(observed) - 1e-12 * scale
    return float((1 + np.count_nonzero(extreme)) / (len(noise) + 1))


def _chunks(resamples: int, groups: int) -> Iterator[int]:
    if resamples < 1:
        raise ValueError(f"resamples={resamples}: must be at least 1")
    rows = max(1, DRAWS_AT_ONCE // groups)
    for start in range(0, resamples, rows):
        yield min(rows, resamples - start)


def _per_group(values: np.ndarray, groups: Any) -> tuple[np.ndarray, np.ndarray]:
    """Sums [S, G] and item counts [G] of values [S, N] by group."""
    n = values.shape[1]
    if groups is None:
        sums, counts = values, np.ones(n)
    else:
        names = as_array(groups)
        if names.shape != (n,):
            raise ValueError(f"groups: shape {names.shape}, needs one group for each of {n} items")
        _, code = np.unique(names, return_inverse=True)
        counts = np.bincount(code).astype(float)
        sums = np.stack([np.bincount(code, weights=row) for row in values])
    if len(counts) < 2:
        raise ValueError(f"bootstrap: {len(counts)} group to resample, needs at least 2")
    return sums, counts


def _quantiles(means: np.ndarray, level: float) -> tuple[float, float]:
    _check_level(level)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise ValueError(f"level={level}: must lie between 0 and 1, such as 0.95")


def _difference(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    if a.shape != b.shape:
        raise ValueError(f"a {a.shape} and b {b.shape}: must be scores of the same items")
    return a - b


def _vector(x: Any, name: str) -> np.ndarray:
    return _finite(x, name, 1)


def _matrix(x: Any, name: str) -> np.ndarray:
    return _finite(x, name, 2)


def _finite(x: Any, name: str, ndim: int) -> np.ndarray:
    v = as_array(x).astype(np.float64)
    if v.ndim != ndim or v.size == 0:
        axes = {1: "[N]", 2: "[S, N]", 3: "[K, S, N]"}[ndim]
        raise ValueError(f"{name}: shape {v.shape}, needs {axes} and at least one value")
    if not np.isfinite(v).all():
        raise ValueError(f"{name}: {np.count_nonzero(~np.isfinite(v))} NaN or infinite values")
    return v

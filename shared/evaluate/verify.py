"""1:1 verification (LFW protocol and its descendants) from the embeddings of pairs.

A pair is accepted as "same" when its cosine is at or above the threshold. Everything is exact:
every distinct score is a possible threshold, equal scores are admitted together, nothing is binned.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, TypeVar

import numpy as np
import torch
from numpy.typing import ArrayLike

from shared.evaluate.intervals import Interval, as_array, bootstrap

Embeddings = TypeVar("Embeddings", torch.Tensor, np.ndarray)


@dataclass(frozen=True, eq=False)
class Verification:
    accuracy: float  # mean over folds, each at the threshold of the other folds
    std: float  # over folds (population: divided by the number of folds, as is usual for LFW)
    threshold: float  # mean over folds: a cosine, or a squared distance with compat="insightface"
    best_accuracy: float  # at the best threshold on all pairs: optimistic, some papers report it
    best_threshold: float
    auc: float  # a positive outscores a negative, ties count half (Mann-Whitney)
    eer: float  # see equal_error_rate
    scores: np.ndarray  # [P] cosine
    same: np.ndarray  # [P] bool, the truth
    correct: np.ndarray  # [P] bool, the decision at the threshold of the pair's fold is right
    fold: np.ndarray  # [P] int

    def interval(self, groups: torch.Tensor | ArrayLike | None = None) -> Interval:
        """95 % bootstrap interval of the share of pairs that are decided right, thresholds fixed.

        By pair, or by identity where groups [P] name one for each pair, such as that of its first
        image (a negative pair has two; the other one is not resampled). Its mean is `accuracy`
        where folds are of one size.
        """
        return bootstrap(self.correct, groups)

    def tar_at(self, far: float) -> float:
        """The highest true accept rate of any threshold whose false accept rate is <= far.

        No interpolation: a threshold admits all equal scores, and `far` must be a rate that the
        negatives can show. ValueError: far outside (0, 1], or below 1 / number of negatives.
        """
        positives, negatives = self.scores[self.same], self.scores[~self.same]
        if not 0 < far <= 1:
            raise ValueError(f"far={far}: must lie in (0, 1]")
        admitted = whole(far * len(negatives))
        if admitted < 1:
            raise ValueError(
                f"far={far:g} cannot be resolved by {len(negatives)} negatives: the smallest rate "
                f"they show is 1/{len(negatives)}; use a larger far or more negative pairs"
            )
        if admitted >= len(negatives):
            return 1.0
        # The threshold lies just above the first negative that must stay out.
        return float((positives > np.sort(negatives)[::-1][admitted]).mean())


def verification(
    e1: torch.Tensor | ArrayLike,
    e2: torch.Tensor | ArrayLike,
    same: torch.Tensor | ArrayLike,
    *,
    folds: int = 10,
    compat: Literal["insightface"] | None = None,
) -> Verification:
    """Score pairs (e1[i], e2[i]), embeddings [P, D] of any scale, against same [P].

    Embeddings are L2-normalised here in float64. Folds are contiguous blocks in the given order
    (LFW and the .bin files are written fold after fold); where P is not divisible, sizes differ by
    one and the first folds are larger. `accuracy` is the mean of the folds' accuracies.

    compat=None chooses each fold's threshold by `best_threshold` on the other folds.
    compat="insightface" repeats the rule of its evaluation script: squared distance, grid
    arange(0, 4, .01), strict <, first maximum. It decides accuracy, std, threshold and correct; the
    other fields stay exact. The grid is coarse where distances are small.

    ValueError: wrong shapes, NaN, infinite or zero-norm embeddings, pairs (or the training folds of
    a selection) of one class only, fewer pairs than folds.
    """
    a, b = embedding_rows(e1, "e1"), embedding_rows(e2, "e2")
    if a.shape != b.shape:
        raise ValueError(f"e1 {a.shape} and e2 {b.shape}: must be the two sides of the same pairs")
    if compat not in (None, "insightface"):
        raise ValueError(f"compat={compat!r}: must be None or 'insightface'")
    a, b = unit_rows(a), unit_rows(b)
    scores = np.einsum("pd,pd->p", a, b).clip(-1, 1)
    truth = _labels(scores, same)
    if not 2 <= folds <= len(scores):
        raise ValueError(f"folds={folds}: must lie between 2 and the number of pairs {len(scores)}")

    fold = np.repeat(np.arange(folds), [len(p) for p in np.array_split(truth, folds)])
    distances = np.square(a - b).sum(axis=1)
    thresholds, accuracies = [], []
    correct = np.empty(len(scores), dtype=bool)
    for f in range(folds):
        train, test = fold != f, fold == f
        if truth[train].all() or not truth[train].any():
            kind = "positive" if truth[train].any() else "negative"
            raise ValueError(
                f"fold {f}: the other folds hold {kind} pairs only, no threshold can be chosen; "
                "order the pairs so that positives and negatives are spread over the folds"
            )
        if compat == "insightface":
            threshold = _grid_threshold(distances[train], truth[train])
            accepted = distances[test] < threshold
        else:
            threshold, _ = best_threshold(scores[train], truth[train])
            accepted = scores[test] >= threshold
        correct[test] = accepted == truth[test]
        thresholds.append(threshold)
        accuracies.append(correct[test].mean())

    top_threshold, top_accuracy = best_threshold(scores, truth)
    far, tar, _ = roc(scores, truth)
    return Verification(
        accuracy=float(np.mean(accuracies)),
        std=float(np.std(accuracies)),
        threshold=float(np.mean(thresholds)),
        best_accuracy=top_accuracy,
        best_threshold=top_threshold,
        auc=float((np.diff(far) * (tar[1:] + tar[:-1]) / 2).sum()),
        eer=equal_error_rate(far, tar),
        scores=scores,
        same=truth,
        correct=correct,
        fold=fold,
    )


def best_threshold(
    scores: torch.Tensor | ArrayLike, same: torch.Tensor | ArrayLike
) -> tuple[float, float]:
    """(threshold, accuracy) of the most accurate decision "same if cosine >= threshold".

    Sorted sweep over cosines [P]: a threshold lies midway between neighbouring distinct scores, or
    beyond both ends (accept all, reject all), so every possible decision is tried. Of equally
    accurate thresholds the highest is taken: it accepts the fewest pairs, and it is the one that
    "first maximum over ascending distances", the usual rule on a grid, arrives at.
    """
    s = as_array(scores).astype(np.float64)
    truth = _labels(s, same)
    values, positives, negatives = _counts_from_the_top(s, truth)
    correct = positives + (np.count_nonzero(~truth) - negatives)  # [K + 1]: the k highest accepted
    k = int(correct.argmax())
    edges = np.concatenate([[2.0], values, [-2.0]])  # +-2 stand beyond any cosine
    upper, lower = edges[k], edges[k + 1]
    middle = (upper + lower) / 2
    # Neighbouring floats have no middle: the upper one splits them just as well under >=.
    return float(middle if middle > lower else upper), float(correct[k] / len(s))


def roc(
    scores: torch.Tensor | ArrayLike, same: torch.Tensor | ArrayLike
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(far, tar, thresholds), each [K + 1], for the K distinct scores, from the strictest down.

    Point k is the decision "same if score >= thresholds[k]"; the first threshold is infinity, which
    accepts nothing: (0, 0). The last point is (1, 1). Scores [P] may be on any scale.
    """
    s = as_array(scores).astype(np.float64)
    truth = _labels(s, same)
    values, positives, negatives = _counts_from_the_top(s, truth)
    thresholds = np.concatenate([[np.inf], values])
    return negatives / negatives[-1], positives / positives[-1], thresholds


def equal_error_rate(far: np.ndarray, tar: np.ndarray) -> float:
    """Where FAR equals FRR = 1 - TAR, from `roc`'s far and tar [K + 1].

    FAR climbs and FRR falls in steps that seldom meet. Between the last point with FAR < FRR and
    the next one, the ROC is the straight line that the AUC also assumes; the EER is where that line
    meets FAR = FRR, so it lies between the two steps (and on a step that meets it exactly).
    """
    gap = (1 - tar) - far  # falls from 1 to -1
    after = int((gap <= 0).argmax())
    before = after - 1
    weight = gap[before] / (gap[before] - gap[after])
    return float(far[before] + weight * (far[after] - far[before]))


def histogram_statistics(
    scores: torch.Tensor | ArrayLike, same: torch.Tensor | ArrayLike, bins: int = 100
) -> tuple[float, float]:
    """(margin, overlap) of the similarity distributions, CRRCD Fig. 5, from cosines [P].

    margin: mean positive similarity minus mean negative similarity. overlap: histogram
    intersection, the sum over `bins` equal bins of [-1, 1] of the smaller of the two shares; 0 is
    apart, 1 is the same. The paper does not give its bins; the more bins, the smaller the overlap.
    """
    s = as_array(scores).astype(np.float64)
    truth = _labels(s, same)
    if np.abs(s).max() > 1 + 1e-6:
        raise ValueError(f"scores: {s.min():g} to {s.max():g}, needs cosines in [-1, 1]")
    s = s.clip(-1, 1)
    if bins < 1:
        raise ValueError(f"bins={bins}: must be at least 1")
    positives, negatives = s[truth], s[~truth]
    shares = [np.histogram(p, bins, (-1, 1))[0] / len(p) for p in (positives, negatives)]
    return float(positives.mean() - negatives.mean()), float(np.minimum(*shares).sum())


def flip_sum(e: Embeddings, e_flip: Embeddings) -> Embeddings:
    """The protocol's embedding [N, D]: e + e_flip (of the mirrored image), then L2.

    The two are summed as they come, not normalised first (a longer embedding weighs more). A tensor
    gives a tensor on its device, an array an array; half precision becomes float32. ValueError:
    shapes that differ, NaN, infinite or zero-norm sums.
    """
    if e.shape != e_flip.shape:
        raise ValueError(f"e {tuple(e.shape)} and e_flip {tuple(e_flip.shape)}: shapes differ")
    if isinstance(e, torch.Tensor):
        dtype = torch.promote_types(e.dtype, torch.float32)
        total = embedding_rows(e.to(dtype) + e_flip.to(dtype), "e + e_flip")
        return torch.from_numpy(unit_rows(total)).to(dtype).to(e.device)
    total = embedding_rows(e.astype(np.float64) + e_flip, "e + e_flip")
    return unit_rows(total).astype(np.result_type(e.dtype, np.float32))


def embedding_rows(e: torch.Tensor | ArrayLike, name: str, *, zeros: bool = False) -> np.ndarray:
    """Embeddings as an array [N, D] of float32 or float64; ValueError names the first bad row.

    zeros: rows of norm zero are let through, for distances.
    """
    x = as_array(e)
    if x.ndim != 2 or x.size == 0:
        raise ValueError(f"{name}: shape {x.shape}, needs embeddings [N, D] and at least one row")
    x = x.astype(np.result_type(x.dtype, np.float32), copy=False)
    finite = np.isfinite(x).all(axis=1)
    if not finite.all():
        raise ValueError(
            f"{name}: NaN or infinity in {np.count_nonzero(~finite)} rows, first row "
            f"{finite.argmin()}; check the network's outputs"
        )
    nonzero = x.any(axis=1)
    if not (zeros or nonzero.all()):
        raise ValueError(
            f"{name}: {np.count_nonzero(~nonzero)} rows of norm zero, first row "
            f"{nonzero.argmin()}; an all-zero embedding has no direction to compare"
        )
    return x


def unit_rows(x: np.ndarray) -> np.ndarray:
    """Rows [N, D] divided by their L2 norm, in float64; rows come from `embedding_rows`."""
    # By the largest entry first, so that no square overflows or underflows.
    x = x / np.abs(x).max(axis=1, keepdims=True).astype(np.float64)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def _counts_from_the_top(
    scores: np.ndarray, same: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Distinct scores [K], highest first; positives and negatives [K + 1] among the k highest."""
    order = np.argsort(-scores, kind="stable")
    s, truth = scores[order], same[order]
    last = np.append(np.flatnonzero(np.diff(s)), len(s) - 1)  # the last pair of each distinct score
    positives = np.concatenate([[0], np.cumsum(truth)[last]])
    negatives = np.concatenate([[0], np.cumsum(~truth)[last]])
    return s[last], positives, negatives


def _grid_threshold(distances: np.ndarray, same: np.ndarray) -> float:
    grid = np.arange(0, 4, 0.01)
    accuracy = [((distances < threshold) == same).mean() for threshold in grid]
    return float(grid[int(np.argmax(accuracy))])


def _labels(scores: np.ndarray, same: torch.Tensor | ArrayLike) -> np.ndarray:
    """`same` as bool [P], checked against scores [P]: both classes present, nothing NaN."""
    truth = as_array(same)
    if scores.ndim != 1 or truth.shape != scores.shape:
        raise ValueError(f"same: shape {truth.shape} for scores {scores.shape}, needs one a pair")
    if not np.isfinite(scores).all():
        raise ValueError(f"scores: {np.count_nonzero(~np.isfinite(scores))} NaN or infinite")
    if truth.dtype != bool:
        if not np.isin(truth, (0, 1)).all():
            raise ValueError("same: values other than 0 and 1 (or False and True)")
        truth = truth.astype(bool)
    if truth.all() or not truth.any():
        raise ValueError(f"same: all {len(truth)} pairs are of one class, needs both")
    return truth


def whole(x: float) -> int:
    """Floor, forgiving the last bits: .29 * 100 is 28.999999999999996."""
    return math.floor(x + 1e-9)

"""Image retrieval, all against all: Recall@K, R-precision, MAP@R and, when asked, NMI.

Every image is a query against all others (EmbedKD Sec. 4; Musgrave et al., "A Metric Learning
Reality Check", ECCV 2020, for R-precision and MAP@R). The search is exact and runs over blocks of
queries: no N x N matrix is held.

The query itself is left out by its index, so that an exact duplicate of it stays. Ties are
pessimistic, as in identify.py: an image of another class that is as near as a mate (an image of the
query's class) stands before it, so that a network that maps everything to one point finds nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import ArrayLike

from shared.evaluate.intervals import Interval, as_array, bootstrap
from shared.evaluate.verify import embedding_rows, unit_rows
from shared.kernels import topk_search

NUMBERS = 1 << 22  # neighbours of a block of queries: 48 MB, and some temporaries of that size


@dataclass(frozen=True, eq=False)
class Retrieval:
    recall: dict[int, float]  # K -> share of all queries with a mate among the K nearest
    r_precision: float  # mean over queries with a mate
    map_at_r: float  # mean over queries with a mate
    nmi: float | None  # None where it was not asked for
    correct: np.ndarray  # [N] bool, the nearest is a mate (Recall@1); False without a mate
    average_precision: np.ndarray  # [N] AP at R, whose mean is MAP@R; NaN without a mate

    def interval(self, groups: torch.Tensor | ArrayLike | None = None) -> Interval:
        """95 % bootstrap interval of Recall@1, by query; by class where groups [N] are labels."""
        return bootstrap(self.correct, groups)


def recall_at_k(
    embeddings: torch.Tensor | ArrayLike,
    labels: torch.Tensor | ArrayLike,
    ks: Sequence[int] = (1, 2, 4, 8),
    *,
    metric: Literal["cosine", "euclidean"] = "cosine",
    nmi: bool = False,
) -> Retrieval:
    """Search embeddings [N, D] among themselves; labels [N] are numbers or strings.

    A query has R mates, the j-th nearest of which stands at place p_j = j + (images of other
    classes that are at least as near). Recall@K is the share of queries with p_1 <= K.
    R-precision is #{j: p_j <= R} / R, and the average precision at R is the sum of j / p_j over
    the same j, divided by R.

    A query without a mate (a class of one image) is a miss for Recall@K, which is a share of *all*
    queries, as the usual code of that measure counts it; R-precision and MAP@R, which divide by R,
    are means over the others.

    Cosines are tied where they agree to a multiple of 2^-40 (about 1e-12), distances where they are
    equal in float64. On unit-norm embeddings both metrics rank alike.

    nmi=True adds the normalised mutual information (arithmetic mean) of the labels and a k-means
    clustering (scikit-learn, one k-means++ start, seed 0) of the embeddings, unit-norm for cosines,
    into as many clusters as there are classes, C. It costs N C D a few times over to start and
    again for each iteration: seconds for CUB, some twenty minutes for SOP on one thread.

    Cost: one product N x N x D. Memory: two copies of the embeddings, and max(K, R) + R neighbours
    of each query of a block: for SOP (60,502 x 512, K = 1000) under half a GiB. A network that maps
    most images to exactly one point takes up to ten times as long (see `topk_search`).

    ValueError: wrong shapes, NaN or infinite embeddings (cosine: or of norm zero), K < 1, another
    metric, no class with two images.
    """
    if metric not in ("cosine", "euclidean"):
        raise ValueError(f"metric={metric!r}: must be 'cosine' or 'euclidean'")
    if not ks or min(ks) < 1:
        raise ValueError(f"ks={tuple(ks)}: needs at least one K, each at least 1")
    x = embedding_rows(embeddings, "embeddings", zeros=metric == "euclidean")
    if metric == "cosine":  # by powers of two, which is exact, so that no square overflows
        x = np.ldexp(x, -np.frexp(np.abs(x).max(axis=1, keepdims=True))[1])
    names = as_array(labels)
    if names.shape != (len(x),):
        raise ValueError(f"labels: shape {names.shape}, needs one for each of {len(x)} embeddings")
    _, y, sizes = np.unique(names, return_inverse=True, return_counts=True)
    mates = sizes[y] - 1
    if not mates.any():
        raise ValueError(f"labels: {len(sizes)} classes of one image each, nothing can be found")

    first = np.full(len(x), np.inf)  # place of the nearest mate
    r_precision, average = np.full(len(x), np.nan), np.full(len(x), np.nan)
    queries = np.argsort(-mates, kind="stable")[: np.count_nonzero(mates)]
    while len(queries):
        # A mate that the list leaves out, or that ties with its last entry, stands behind all that
        # the list holds of other classes: at least max(K, R) of its max(K, R) + R. It counts for
        # nothing wherever it is, so no list has to be longer (one more, for the query itself).
        most = int(mates[queries[0]])
        k = min(len(x), max(*ks, most) + most + 1)
        rows, queries = np.split(queries, [max(1, NUMBERS // k)])
        row, j, place = _places(x, y, rows, k, metric)
        first[rows[row[j == 1]]] = place[j == 1]
        r, counted = mates[rows], place <= mates[rows[row]]
        r_precision[rows] = np.bincount(row[counted], minlength=len(rows)) / r
        average[rows] = np.bincount(row[counted], (j / place)[counted], len(rows)) / r
    return Retrieval(
        recall={int(k): float((first <= k).mean()) for k in ks},
        r_precision=float(np.nanmean(r_precision)),
        map_at_r=float(np.nanmean(average)),
        nmi=_nmi(unit_rows(x) if metric == "cosine" else x, y) if nmi else None,
        correct=first == 1,
        average_precision=average,
    )


def _places(
    x: np.ndarray, y: np.ndarray, rows: np.ndarray, k: int, metric: Literal["cosine", "euclidean"]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(which of `rows`, j, p_j) of every mate among their k nearest of x, in this order.

    p_j counts images of other classes among the k nearest only.
    """
    gallery = torch.from_numpy(x)
    found, nearest = topk_search(gallery[rows], gallery, k, metric=metric)
    score, index = found.float().numpy(), nearest.numpy()  # in their order by float64
    mate = (y[index] == y[rows, None]) & (index != rows[:, None])
    # What is equal in float32 may differ, or not, in float64: asked where a place depends on it.
    equal = score[:, 1:] == score[:, :-1]
    new = np.ones(score.shape, dtype=bool)
    new[:, 1:] = ~equal
    for i in np.flatnonzero((equal & (mate[:, 1:] != mate[:, :-1])).any(axis=1)):
        value = _measure(x[rows[i]], x[index[i]], metric)
        order = np.argsort(value, kind="stable")
        mate[i], index[i] = mate[i, order], index[i, order]
        new[i, 1:] = np.diff(value[order]) > 0
    other = np.cumsum(y[index] != y[rows, None], axis=1, dtype=np.int32)
    # Of each entry, the last one of the same score.
    last = np.where(np.roll(new, -1, axis=1), np.arange(k, dtype=np.int32), np.int32(k))
    last = np.minimum.accumulate(last[:, ::-1], axis=1)[:, ::-1]
    row, column = np.nonzero(mate)
    j = 1 + np.arange(len(row)) - np.searchsorted(row, row)
    return row, j, j + other[row, last[row, column]]


def _measure(query: np.ndarray, x: np.ndarray, metric: str) -> np.ndarray:
    """[k] of a query [D] and rows x [k, D], the nearest the smallest."""
    if metric == "cosine":
        return -np.rint(unit_rows(x) @ unit_rows(query[None])[0] * 2.0**40)
    return np.linalg.norm(x.astype(np.float64) - query, axis=1)


def _nmi(x: np.ndarray, y: np.ndarray) -> float:
    from sklearn.cluster import KMeans  # a second to import, for what is seldom asked
    from sklearn.metrics import normalized_mutual_info_score

    found = KMeans(int(y.max()) + 1, n_init=1, random_state=0).fit_predict(x)
    return float(normalized_mutual_info_score(y, found))

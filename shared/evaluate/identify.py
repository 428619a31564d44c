"""1:N identification from embeddings: closed set (CMC, mAP) and open set (TPIR at FPIR).

Scores are cosines, computed tile by tile: memory does not grow with probes x gallery. A mate is a
gallery image of the probe's identity; an identity may have several. Ties are pessimistic
everywhere: a non-mate that scores as high as a mate stands before it, so that a network that maps
everything to one point is not credited with finding anything.

Scores are rounded to a multiple of 2^-40 (about 1e-12). A matrix product rounds the last bits of
two equal gallery vectors differently, by their place in a block; without this, ties would be luck.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import ArrayLike

from shared.evaluate.intervals import Interval, as_array, bootstrap
from shared.evaluate.verify import embedding_rows, unit_rows, whole
from shared.kernels import topk_search

PROBES, GALLERY = 1024, 8192  # a tile of scores: 64 MB in float64
STEPS = 1000  # of thresholds, with compat="btnet"


@dataclass(frozen=True, eq=False)
class ClosedSet:
    cmc: dict[int, float]  # k -> share of probes with a mate among the k first (rank-k accuracy)
    map: float  # mean over probes of the average precision
    rank: np.ndarray  # [Q] int, of the first mate: 1 + non-mates that score at least as high
    average_precision: np.ndarray  # [Q]
    correct: np.ndarray  # [Q] bool, rank 1

    def interval(self, groups: torch.Tensor | ArrayLike | None = None) -> Interval:
        """95 % bootstrap interval of rank-1, by probe; by identity where groups [Q] are its ids."""
        return bootstrap(self.correct, groups)


@dataclass(frozen=True, eq=False)
class OpenSet:
    tpir: dict[float, float]  # FPIR -> TPIR; NaN where the FPIR is finer than 1 / unmated probes
    threshold: dict[float, float]  # FPIR -> the lowest threshold that keeps it; NaN likewise
    auc: float  # area under TPIR against FPIR over [0, 1], the exact steps
    rank: np.ndarray  # [Q] int, of a mated probe's first mate
    score: np.ndarray  # [Q] of a mated probe's best mate
    unmated_score: np.ndarray  # [U] best score of an unmated probe against the whole gallery
    found: dict[float, np.ndarray]  # FPIR -> [Q] bool, whose mean is the TPIR; where that is no NaN

    def interval(self, fpir: float, groups: torch.Tensor | ArrayLike | None = None) -> Interval:
        """95 % bootstrap interval of the TPIR at a target `fpir` of this search.

        By mated probe, or by identity where groups [Q] are its ids. The threshold is held fixed:
        how it would differ with other unmated probes is not part of the interval. ValueError: a
        target that was not asked for, or that the unmated probes cannot show.
        """
        if fpir not in self.found:
            raise ValueError(f"fpir={fpir:g}: no TPIR at it, there are {sorted(self.found)}")
        return bootstrap(self.found[fpir], groups)


def closed_set(
    probes: torch.Tensor | ArrayLike,
    probe_ids: torch.Tensor | ArrayLike,
    gallery: torch.Tensor | ArrayLike,
    gallery_ids: torch.Tensor | ArrayLike,
    ranks: Sequence[int] = (1, 5, 10, 20),
) -> ClosedSet:
    """Rank a gallery [G, D] for every probe [Q, D]; ids [Q], [G] are numbers or strings.

    Distractors are gallery images whose id no probe has. The rank of a probe is 1 + the number of
    non-mates whose score is at least its best mate's. With M mates, the j-th best of which stands
    at position p_j = j + (non-mates that score at least as high), its average precision is
    (1/M) sum_j j / p_j.

    ValueError: wrong shapes, NaN, infinite or zero-norm embeddings, a rank below 1, a probe without
    a mate in the gallery (that is open-set identification).
    """
    if any(k < 1 for k in ranks):
        raise ValueError(f"ranks={tuple(ranks)}: every rank must be at least 1")
    mates = _search(probes, probe_ids, gallery, gallery_ids, "probes")
    rank = np.array([1 + ahead[0] for _, ahead in mates])
    precision = []
    for scores, ahead in mates:
        j = np.arange(1, len(scores) + 1)
        precision.append((j / (j + ahead)).mean())
    return ClosedSet(
        cmc={int(k): float((rank <= k).mean()) for k in ranks},
        map=float(np.mean(precision)),
        rank=rank,
        average_precision=np.array(precision),
        correct=rank == 1,
    )


def open_set(
    mated: torch.Tensor | ArrayLike,
    mated_ids: torch.Tensor | ArrayLike,
    unmated: torch.Tensor | ArrayLike,
    gallery: torch.Tensor | ArrayLike,
    gallery_ids: torch.Tensor | ArrayLike,
    *,
    rank: int = 20,
    fpir: Sequence[float] = (0.3, 0.2, 0.1, 0.01),
    compat: Literal["btnet"] | None = None,
) -> OpenSet:
    """Watch-list search: mated [Q, D] and unmated [U, D] probes against gallery [G, D].

    FPIR(t): share of unmated probes with any candidate that scores >= t. TPIR(t): share of mated
    probes whose first mate is within `rank` (as in `closed_set`) and scores >= t. (QMUL-SurvFace
    protocol.)

    For each target the threshold is the lowest with FPIR(t) <= target, hence the highest TPIR: just
    above (the next float) the first unmated maximum that must stay out. A threshold admits all
    equal scores, so tied unmated maxima are kept out together, and a mate that ties with the one
    kept out is not found. A target below 1 / U gives NaN: the only rate that U probes show below it
    is 0, and TPIR at no false alarm in U is not TPIR at that rate. A target of 1 admits all:
    threshold -infinity.

    The AUC is of the same function, constant from one multiple of 1 / U to the next.

    compat="btnet" repeats the rule of BTNet's official script: 1,000 thresholds, evenly from the
    lowest of all unmated maxima and of the mated probes' `rank`-th best scores up to the highest
    unmated maximum; strict >; for each target the first threshold whose FPIR is nearest, on either
    side; the trapezoidal AUC of these 1,000 points. It decides tpir, threshold, auc and found.

    ValueError: as `closed_set`; rank < 1; a target outside (0, 1]; another compat.
    """
    if rank < 1:
        raise ValueError(f"rank={rank}: must be at least 1")
    if not all(0 < f <= 1 for f in fpir):
        raise ValueError(f"fpir={tuple(fpir)}: every target must lie in (0, 1]")
    if compat not in (None, "btnet"):
        raise ValueError(f"compat={compat!r}: must be None or 'btnet'")
    mates = _search(mated, mated_ids, gallery, gallery_ids, "mated")
    ranks = np.array([1 + ahead[0] for _, ahead in mates])
    score = np.array([scores[0] for scores, _ in mates])

    outside = embedding_rows(unmated, "unmated")
    inside = embedding_rows(gallery, "gallery")
    _check_width(outside, inside, "unmated")
    maxima = np.full(len(outside), -np.inf)
    for rows, _, tile in _tiles(outside, inside):
        maxima[rows] = np.maximum(maxima[rows], tile.max(axis=1))

    within = ranks <= rank
    if compat == "btnet":
        candidates = topk_search(
            torch.from_numpy(embedding_rows(mated, "mated")),
            torch.from_numpy(inside),
            min(rank, len(inside)),
        )[0]
        threshold, auc = _steps(maxima, score[within], len(score), float(candidates.min()), fpir)
        found = {f: within & (score > t) for f, t in threshold.items()}
    else:
        threshold, auc = _exact(maxima, score[within], len(score), fpir)
        found = {f: within & (score >= t) for f, t in threshold.items() if not np.isnan(t)}
    return OpenSet(
        tpir={f: float(found[f].mean()) if f in found else float("nan") for f in fpir},
        threshold=threshold,
        auc=auc,
        rank=ranks,
        score=score,
        unmated_score=maxima,
        found=found,
    )


def prototypes(
    embeddings: torch.Tensor | ArrayLike, ids: torch.Tensor | ArrayLike
) -> tuple[np.ndarray, np.ndarray]:
    """(templates [I, D] of unit norm, their ids [I], sorted) from embeddings [N, D] and ids [N].

    A template is the mean of its identity's embeddings as they come (a longer one weighs more),
    then L2 (BTNet, the gallery of QMUL-SurvFace). ValueError: wrong shapes, NaN, infinite or
    zero-norm embeddings or means.
    """
    x, names = embedding_rows(embeddings, "embeddings"), as_array(ids)
    if names.shape != (len(x),):
        raise ValueError(f"ids: shape {names.shape}, needs one for each of {len(x)} embeddings")
    order = np.argsort(names, kind="stable")
    known, first = np.unique(names[order], return_index=True)
    total = np.add.reduceat(x[order], first, axis=0, dtype=np.float64)  # n times the mean
    return unit_rows(embedding_rows(total, "prototypes")).astype(x.dtype), known


def _exact(
    maxima: np.ndarray, found: np.ndarray, mated: int, fpir: Sequence[float]
) -> tuple[dict[float, float], float]:
    """Thresholds and AUC as `open_set` defines them, from the scores of mates within the rank."""
    kept_out = np.sort(maxima)[::-1]
    threshold: dict[float, float] = {}
    for f in fpir:
        admitted = whole(f * len(maxima))
        if admitted < 1:
            threshold[f] = float("nan")
        elif admitted == len(maxima):
            threshold[f] = -np.inf
        else:
            threshold[f] = float(np.nextafter(kept_out[admitted], np.inf))
    # The TPIR where k unmated probes may be admitted and the (k + 1)-th is kept out, k < U.
    beaten = np.searchsorted(np.sort(found), kept_out, side="right")
    return threshold, float((len(found) - beaten).mean() / mated)


def _steps(
    maxima: np.ndarray, found: np.ndarray, mated: int, lowest: float, fpir: Sequence[float]
) -> tuple[dict[float, float], float]:
    """The same by the rule of compat="btnet"."""
    steps = np.linspace(min(lowest, maxima.min()), maxima.max(), STEPS)

    def above(scores: np.ndarray) -> np.ndarray:
        return len(scores) - np.searchsorted(np.sort(scores), steps, side="right")

    rate, tpir = above(maxima) / len(maxima), above(found) / mated
    nearest = {f: float(steps[np.abs(rate - f).argmin()]) for f in fpir}
    return nearest, float(-np.trapezoid(tpir, rate))


def _search(
    probes: torch.Tensor | ArrayLike,
    probe_ids: torch.Tensor | ArrayLike,
    gallery: torch.Tensor | ArrayLike,
    gallery_ids: torch.Tensor | ArrayLike,
    name: str,
) -> list[tuple[np.ndarray, np.ndarray]]:
    """For every probe, of its M mates, best first: scores [M], non-mates at or above each [M]."""
    p, g = embedding_rows(probes, name), embedding_rows(gallery, "gallery")
    _check_width(p, g, name)
    p_id, g_id = _codes(probe_ids, gallery_ids, len(p), len(g), name)
    order = np.argsort(g_id, kind="stable")
    start, stop = (np.searchsorted(g_id[order], p_id, side=side) for side in ("left", "right"))
    if (start == stop).any():
        first = int((start == stop).argmax())
        raise ValueError(
            f"{name}: {np.count_nonzero(start == stop)} have no mate in the gallery, first row "
            f"{first} (id {as_array(probe_ids)[first]}); give them to open_set as unmated"
        )

    mates, ahead = [], []
    for i in range(len(p)):
        row = unit_rows(g[order[start[i] : stop[i]]]) @ unit_rows(p[i : i + 1])[0]
        mates.append(np.sort(_rounded(row)))  # ascending here: searchsorted wants it so
        ahead.append(np.zeros(len(row), dtype=np.int64))
    for rows, columns, tile in _tiles(p, g):
        tile[p_id[rows, None] == g_id[None, columns]] = -np.inf  # only non-mates stand in the way
        for i, row in zip(range(rows.start, rows.stop), tile, strict=True):
            rivals = row[row >= mates[i][0]]
            beaten = np.searchsorted(mates[i], rivals, side="right")  # how many mates, lowest first
            by_count = np.bincount(beaten, minlength=len(mates[i]) + 1)
            ahead[i] += by_count[::-1].cumsum()[::-1][1:]
    return [(s[::-1], a[::-1]) for s, a in zip(mates, ahead, strict=True)]


def _tiles(probes: np.ndarray, gallery: np.ndarray) -> Iterator[tuple[slice, slice, np.ndarray]]:
    """(rows, columns, cosines [rows, columns]) that cover probes x gallery.

    The next tile is written where the last one was.
    """
    room = np.empty(min(PROBES, len(probes)) * min(GALLERY, len(gallery)))
    for c in range(0, len(gallery), GALLERY):
        columns = slice(c, min(c + GALLERY, len(gallery)))
        block = unit_rows(gallery[columns]).T
        for r in range(0, len(probes), PROBES):
            rows = slice(r, min(r + PROBES, len(probes)))
            shape = rows.stop - rows.start, columns.stop - columns.start
            tile = room[: shape[0] * shape[1]].reshape(shape)
            yield rows, columns, _rounded(np.matmul(unit_rows(probes[rows]), block, out=tile))


def _rounded(cosines: np.ndarray) -> np.ndarray:
    """In place, to a multiple of 2^-40, the distance of two floats between 2^12 and 2^13."""
    cosines += 6144.0
    cosines -= 6144.0
    return cosines


def _codes(
    probe_ids: torch.Tensor | ArrayLike,
    gallery_ids: torch.Tensor | ArrayLike,
    q: int,
    g: int,
    name: str,
) -> tuple[np.ndarray, np.ndarray]:
    """Both id lists as integers that agree."""
    a, b = as_array(probe_ids), as_array(gallery_ids)
    if a.shape != (q,) or b.shape != (g,):
        raise ValueError(
            f"ids: shapes {a.shape} and {b.shape}, needs one for each of {q} {name} and {g} gallery"
        )
    if (a.dtype.kind in "US") != (b.dtype.kind in "US"):
        raise ValueError(f"ids: {name} {a.dtype}, gallery {b.dtype}; both numbers or both strings")
    _, code = np.unique(np.concatenate([a, b]), return_inverse=True)
    return code[:q], code[q:]


def _check_width(probes: np.ndarray, gallery: np.ndarray, name: str) -> None:
    if probes.shape[1] != gallery.shape[1]:
        raise ValueError(f"{name} {probes.shape} and gallery {gallery.shape}: dimensions differ")

"""What BTNet's tables are made of: pairs of resolutions, templates of several, and watch lists.

A setting (a, b) compares images at a x a with images at b x b px and is the column "a&b": cross-
resolution where they differ, same-resolution where they do not.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from btnet.losses import gain_cross, gain_same
from btnet.model import Indicator, Rounding, aggregate, select_branch
from shared.data.protocols import Evaluation
from shared.evaluate.identify import closed_set
from shared.evaluate.score import BATCH, Network, Score, embed, opened, pair_groups
from shared.evaluate.verify import flip_sum, verification

Embedded = Mapping[int, tuple[Tensor, Tensor]]  # resolution -> (e, e of the mirror images) [N, D]
ALARMS = (0.3, 0.2, 0.1)  # the FPIRs of Table 2

# Of the router, in the order of Table 2: name -> (indicator, rounding).
INDICATORS: tuple[Indicator, ...] = ("avg", "min", "max")
ROUNDINGS: tuple[Rounding, ...] = ("floor", "near", "ceil")
STRATEGIES = {f"{i}+{r}": (i, r) for i in INDICATORS for r in ROUNDINGS}


def settings(resolutions: Iterable[int]) -> list[tuple[int, int]]:
    """The columns of Table 1: (S, r) of every r below S, then (r, r), ascending; S the largest."""
    known = sorted(set(resolutions))
    return [(known[-1], r) for r in known[:-1]] + [(r, r) for r in known]


def column(setting: tuple[int, int]) -> str:
    """Its name, such as "112&14"."""
    return "{}&{}".format(*setting)


def embed_at(
    networks: Mapping[int, Network], evaluation: Evaluation
) -> dict[int, tuple[Tensor, Tensor]]:
    """Each network's outputs on the evaluation's images, mirrored where it says so (`embed`).

    networks: for each resolution one of uint8 HR [B, 3, S, S] -> [B, D].
    """
    return {
        r: embed(network, evaluation.images, mirror=evaluation.mirror)
        for r, network in networks.items()
    }


def verified(embedded: Embedded, evaluation: Evaluation, headline: str) -> Score:
    """Verification accuracy of every setting: first images of the pairs at its first resolution,
    second ones at its second.

    Thresholds of the other nine folds, a setting's own. extra: "embeddings" [N, D] (at the second
    resolution), "scores" and "threshold" of the column `headline`. Raises ValueError for an
    evaluation without pairs and for another column.
    """
    if evaluation.pairs is None:
        raise ValueError(f"{evaluation.name}: no pairs to verify")
    columns = _columns(embedded, headline)
    e, labels = _protocol(embedded, evaluation), evaluation.images.labels.cpu().numpy()
    first, second, same = evaluation.pairs
    by, unit = pair_groups(labels, first.numpy())
    found = {
        name: verification(e[a][first], e[b][second], same) for name, (a, b) in columns.items()
    }
    shown = found[headline]
    return Score(
        metrics={name: 100 * pairs.accuracy for name, pairs in found.items()},
        correct={name: pairs.correct for name, pairs in found.items()},
        groups=dict.fromkeys(found, by),
        extra={
            "embeddings": e[columns[headline][1]].numpy(),
            "scores": shown.scores,
            "threshold": np.array(shown.threshold),
        },
        unit=unit,
        main=headline,
    )


def ranked(embedded: Embedded, evaluation: Evaluation, headline: str) -> Score | None:
    """Rank-1 of every setting: gallery at its first resolution, probes at its second.

    The column "templates" is multi-resolution feature aggregation: of each identity the probe
    images, at the resolutions in turn (ascending, the first image at the lowest), are summed as
    the network gives them into one template, which is looked for in the gallery at S. None where
    the evaluation has no gallery. Raises ValueError for a headline that is none of the settings.
    """
    if evaluation.gallery is None or evaluation.probes is None:
        return None
    columns = _columns(embedded, headline)
    e, labels = _protocol(embedded, evaluation), evaluation.images.labels.cpu().numpy()
    known, asked = labels[evaluation.gallery.numpy()], labels[evaluation.probes.numpy()]
    correct = {
        name: closed_set(e[b][evaluation.probes], asked, e[a][evaluation.gallery], known).correct
        for name, (a, b) in columns.items()
    }
    groups = dict.fromkeys(correct, asked)

    steps = sorted(embedded)
    raw = torch.stack([_raw(*embedded[r])[evaluation.probes] for r in steps])  # [R, Q, D]
    turn = torch.from_numpy(_turn(asked) % len(steps))
    templates, people = aggregate(raw[turn, torch.arange(len(turn))], torch.as_tensor(asked))
    who = people.numpy()
    search = closed_set(templates, who, e[steps[-1]][evaluation.gallery], known)
    correct["templates"], groups["templates"] = search.correct, who
    return Score(
        metrics={name: 100 * float(right.mean()) for name, right in correct.items()},
        correct=correct,
        groups=groups,
        main=headline,
    )


def gains(values: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """The gain of every model but "hr": Eq. 4 by "mr" where a column's resolutions differ, Eq. 5 by
    "mm" where they are one.

    values[model][column] in any unit. A cell is left out where a baseline has no such column, or
    the two baselines agree (112&112, where phi_mm is phi_hr).
    """
    hr, mr, mm = (values.get(model, {}) for model in ("hr", "mr", "mm"))

    def gain(name: str, value: float) -> float:
        a, _, b = name.partition("&")
        if not b or name not in hr or name not in (mm if a == b else mr):
            return math.nan
        if a == b:
            return gain_same(value, hr[name], mm[name])
        return gain_cross(value, hr[name], mr[name])

    found = {
        model: {name: gain(name, value) for name, value in cells.items()}
        for model, cells in values.items()
        if model != "hr"
    }
    return {
        model: {name: value for name, value in cells.items() if not math.isnan(value)}
        for model, cells in found.items()
    }


def mean(scores: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Each column averaged over test sets (Table 1: six). Raises ValueError where they differ in
    columns, or there is none."""
    if not scores or any(score.keys() != scores[0].keys() for score in scores):
        raise ValueError("mean: give one test set or more, all with the same columns")
    return {name: statistics.fmean(score[name] for score in scores) for name in scores[0]}


# -- watch lists of native sizes (Table 2) -------------------------------------------------------


def routed(
    images: Sequence[Tensor | np.ndarray],
    resolutions: Sequence[int],
    strategies: Iterable[str] = tuple(STRATEGIES),
) -> dict[str, dict[int, int]]:
    """How many images [3, h, w] each strategy sends to each resolution."""
    return {
        name: {r: int((routes == r).sum()) for r in sorted(resolutions)}
        for name, routes in _routes(images, resolutions, strategies).items()
    }


@torch.inference_mode()
def watch_list(
    networks: Callable[[list[Tensor], int], Tensor],
    images: Sequence[Tensor | np.ndarray],
    ids: np.ndarray,
    roles: np.ndarray,
    resolutions: Sequence[int],
    strategies: Iterable[str] = tuple(STRATEGIES),
) -> dict[str, Score]:
    """Open-set search among faces of native sizes by each routing strategy (QMUL-SurvFace).

    networks: ([3, h, w] uint8 images, resolution r) -> [B, D] through r. images: N of them; ids:
    [N], -1 for unmated; roles: [N] of "gallery", "mated", "unmated". An image is embedded once for
    each resolution that some strategy sends it to, e(x) + e(flip x). Columns: TPIR20 at the FPIRs
    of Table 2 that so many unmated probes can show; metrics: also the area under its curve, rank-k
    and mAP. Raises ValueError for an unknown strategy.
    """
    ids, roles = np.asarray(ids), np.asarray(roles)
    gallery, mated, unmated = (roles == role for role in ("gallery", "mated", "unmated"))
    routes = _routes(images, resolutions, strategies)
    embedded: dict[int, tuple[np.ndarray, Tensor]] = {}  # resolution -> numbers of images, e
    for r in sorted(resolutions):
        numbers = np.flatnonzero(np.any([way == r for way in routes.values()], axis=0))
        if len(numbers):
            embedded[r] = numbers, _embedded(networks, images, numbers, r)
    width = next(iter(embedded.values()))[1].shape[1]
    found = {}
    for name, way in routes.items():
        e = torch.empty(len(images), width)
        for r, (numbers, rows) in embedded.items():
            mine = way[numbers] == r
            e[numbers[mine]] = rows[mine]
        metrics, correct = opened(
            e[mated], ids[mated], e[unmated], e[gallery], ids[gallery], alarms=ALARMS
        )
        del correct["rank1"]  # not a column of Table 2
        found[name] = Score(metrics, correct, dict.fromkeys(correct, ids[mated]))
    return found


def _embedded(
    networks: Callable[[list[Tensor], int], Tensor],
    images: Sequence[Tensor | np.ndarray],
    numbers: np.ndarray,
    r: int,
) -> Tensor:
    """e(x) + e(flip x) through r of the images `numbers`: [M, D] on the CPU."""
    parts = []
    for start in range(0, len(numbers), BATCH):
        some = [torch.as_tensor(images[k]) for k in numbers[start : start + BATCH]]
        flipped = [image.flip(-1) for image in some]
        parts.append(_raw(networks(some, r).float().cpu(), networks(flipped, r).float().cpu()))
    return torch.cat(parts)


def _routes(
    images: Sequence[Tensor | np.ndarray], resolutions: Sequence[int], strategies: Iterable[str]
) -> dict[str, np.ndarray]:
    """The resolution int [N] that each strategy sends each image to."""
    names = list(strategies)
    if unknown := [name for name in names if name not in STRATEGIES]:
        raise ValueError(f"no strategy {unknown[0]!r}; there are: {', '.join(STRATEGIES)}")
    sizes = [image.shape[-2:] for image in images]
    return {
        name: np.array(
            [select_branch(w, h, *STRATEGIES[name], resolutions=resolutions) for h, w in sizes]
        )
        for name in names
    }


# -- inside --------------------------------------------------------------------------------------


def _columns(embedded: Embedded, headline: str) -> dict[str, tuple[int, int]]:
    columns = {column(setting): setting for setting in settings(embedded)}
    if headline not in columns:
        raise ValueError(f"no column {headline!r}; there are: {', '.join(columns)}")
    return columns


def _raw(e: Tensor, mirrored: Tensor) -> Tensor:
    """The two summed as they come; the mirrored ones may be empty."""
    return e + mirrored if len(mirrored) else e


def _protocol(embedded: Embedded, evaluation: Evaluation) -> dict[int, Tensor]:
    """The embeddings [N, D] that are compared: see Evaluation.mirror."""
    return {r: flip_sum(*pair) if evaluation.mirror else pair[0] for r, pair in embedded.items()}


def _turn(ids: np.ndarray) -> np.ndarray:
    """0, 1, 2, ... of each row among those of its id, in order."""
    order = np.argsort(ids, kind="stable")
    ordered = ids[order]
    turn = np.empty(len(ids), dtype=np.int64)
    turn[order] = np.arange(len(ids)) - np.searchsorted(ordered, ordered)
    return turn

"""Score a network on an `Evaluation` by its protocol."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from shared.data import procedural
from shared.data.pipeline import Images
from shared.data.protocols import Evaluation
from shared.degrade import to_float, to_uint8
from shared.evaluate.classify import Classification, classification
from shared.evaluate.identify import closed_set, open_set, prototypes
from shared.evaluate.intervals import Interval, bootstrap
from shared.evaluate.probe import linear_probe
from shared.evaluate.retrieve import recall_at_k
from shared.evaluate.verify import Verification, flip_sum, histogram_statistics, verification

Network = Callable[[Tensor], Tensor]  # uint8 HR [B, 3, S, S] -> [B, D]
BATCH = 500  # images a forward pass; larger ones are no faster on a CPU

# Headings of a result table's columns: the outcomes that a score may have.
HEADINGS = {
    "verification": "verification",
    "verification_best": "best threshold",
    "rank1": "rank-1",
    "tpir20_at_fpir_0.3": "TPIR20 at FPIR .3",
    "tpir20_at_fpir_0.2": "TPIR20 at FPIR .2",
    "tpir20_at_fpir_0.1": "TPIR20 at FPIR .1",
    "recall1": "recall@1",
    "top1": "top-1",
}
ALARM = 0.1  # the FPIR of the column


@dataclass(frozen=True)
class Score:
    """What a network scored: numbers in percent, and the items behind the first ones.

    correct[column] is a bool [items]; groups[column] the identity (objects: the image) of each
    item, by which intervals resample; `unit` says what these are. extra: "embeddings" [N, D]
    (objects: logits), and where there are pairs their "scores" [P] and "threshold".
    """

    metrics: dict[str, float]
    correct: dict[str, np.ndarray]
    groups: dict[str, np.ndarray]
    extra: dict[str, np.ndarray] = field(default_factory=dict)
    unit: str = "identities"
    main: str = ""  # the headline, where it is not the usual one

    @property
    def headline(self) -> str:
        """The column that picks the best epoch: rank-1 where there is one (it separates better)."""
        return self.main or ("rank1" if "rank1" in self.correct else next(iter(self.correct)))

    @property
    def columns(self) -> dict[str, str]:
        """Heading of each column of a result table: its own name where HEADINGS has none."""
        return {column: HEADINGS.get(column, column) for column in self.correct}

    def interval(self, column: str) -> Interval:
        """95 % bootstrap interval, in percent."""
        found = bootstrap(self.correct[column].astype(float) * 100, self.groups[column])
        return Interval(self.metrics[column], found.low, found.high)


@torch.inference_mode()
def embed(
    network: Network,
    images: Images,
    *,
    mirror: bool = False,
    batch: int = BATCH,
    adapt: Callable[[], AbstractContextManager] = nullcontext,
) -> tuple[Tensor, Tensor]:
    """Outputs of `network` (uint8 HR [B,3,S,S] -> [B, D]) on every image and on its mirror image.

    In order, `batch` at a time, each batch and then its mirror image, all inside `adapt()` (for
    networks that adapt to what they see). Returns two float32 tensors [N, D], the second one empty
    without `mirror`. Rows of images that could not be decoded repeat another's.
    """
    spans = list(torch.arange(len(images)).split(batch))
    plain, mirrored = [], []
    with adapt():
        for _, pixels in images.batches(spans):
            plain.append(network(pixels).float().cpu())
            if mirror:
                mirrored.append(network(pixels.flip(-1)).float().cpu())
    return torch.cat(plain), torch.cat(mirrored) if mirrored else torch.empty(0)


@torch.inference_mode()
def score_native(
    network: Network, native: procedural.Native, size: int
) -> dict[str, float]:
    """Identification of faces at their native sizes, 6 to 60 px: closed-set rank-k of the mated
    probes, and open-set TPIR20 at FPIR with the unmated ones (the QMUL-SurvFace protocol).

    network: uint8 LR [B, 3, size, size] -> [B, D]. Each face is resized to size x size by
    antialiased bicubic; an identity's gallery images are summed. Percent.
    """
    resized = torch.cat(
        [
            to_uint8(F.interpolate(to_float(torch.as_tensor(image))[None], size=(size, size),
                                   mode="bicubic", antialias=True))
            for image in native.images
        ]
    )  # fmt: skip
    parts = resized.split(BATCH)
    e = flip_sum(
        torch.cat([network(x).float() for x in parts]),
        torch.cat([network(x.flip(-1)).float() for x in parts]),
    )
    ids, role = torch.as_tensor(native.ids), np.asarray(native.role)
    gallery, mated, unmated = (torch.as_tensor(role == r) for r in ("gallery", "mated", "unmated"))
    known = ids[gallery].unique()
    template = torch.stack([e[gallery][ids[gallery] == i].mean(0) for i in known])
    closed = closed_set(e[mated], ids[mated], template, known)
    opened = open_set(e[mated], ids[mated], e[unmated], template, known)
    found = {f"rank{k}": 100 * v for k, v in closed.cmc.items()}
    return found | {f"tpir20_at_fpir_{f:g}": 100 * v for f, v in opened.tpir.items()}


def score(
    network: Network,
    evaluation: Evaluation,
    *,
    enrolled: Network | tuple[Tensor, Tensor] | None = None,
    best: bool = False,
    batch: int = BATCH,
    adapt: Callable[[], AbstractContextManager] = nullcontext,
) -> Score:
    """By the protocols that the evaluation has the parts of. See `embed` for `network`.

    pairs: 10-fold verification. gallery and probes: rank-k and mAP; with unmated probes TPIR at
    FPIR, against one prototype for each identity. recall_at: Recall@K, all against all. fit: a
    linear classifier on frozen features. None of them: top-k of the logits. Cosines throughout; of
    e(x) + e(flip x) where `evaluation.mirror` says so.

    enrolled: another network for the second image of each pair and for the gallery, such as one
    that sees them at HR (LR-HR), or what `embed` gave of it; None: the same. best: also the
    accuracy at the best threshold on all pairs (optimistic, as some papers report it). batch,
    adapt: see `embed`; `adapt` is entered anew for each set of images. Raises ValueError where two
    networks' embeddings differ in size.
    """
    images = evaluation.images
    how: dict[str, Any] = {"batch": batch, "adapt": adapt}
    out, mirrored = embed(network, images, mirror=evaluation.mirror, **how)
    labels = images.labels.cpu().numpy()
    if evaluation.fit is not None:
        features, _ = embed(network, evaluation.fit, **how)
        taught = evaluation.fit.labels.cpu()
        with torch.autocast(features.device.type, enabled=False):
            probed = linear_probe(features, taught, out, labels, classes=int(taught.max()) + 1)
        return _classified(probed.test, out)
    if evaluation.task == "objects":
        return _classified(classification(out, labels), out)
    raw = out + mirrored if evaluation.mirror else out
    e = flip_sum(out, mirrored) if evaluation.mirror else out
    known_raw, known_e = raw, e  # of the enrolled images
    if enrolled is not None:
        if callable(enrolled):
            enrolled = embed(enrolled, images, mirror=evaluation.mirror, **how)
        out, mirrored = enrolled
        known_raw = out + mirrored if evaluation.mirror else out
        known_e = flip_sum(out, mirrored) if evaluation.mirror else out
        if known_e.shape[1] != e.shape[1]:
            raise ValueError(
                f"embeddings of {e.shape[1]} and {known_e.shape[1]} numbers cannot be compared"
            )
    metrics: dict[str, float] = {}
    correct: dict[str, np.ndarray] = {}
    groups: dict[str, np.ndarray] = {}
    extra, unit = {"embeddings": e.numpy()}, "identities"
    if evaluation.pairs is not None:
        first, second, same = evaluation.pairs
        pairs = verification(e[first], known_e[second], same)
        metrics |= _verified(pairs)
        correct["verification"] = pairs.correct
        groups["verification"], unit = pair_groups(labels, first.numpy())
        if best:
            accepted = pairs.scores >= pairs.best_threshold
            correct["verification_best"] = accepted == pairs.same
            groups["verification_best"] = groups["verification"]
        extra |= {"scores": pairs.scores, "threshold": np.array(pairs.threshold)}
    if evaluation.gallery is not None and evaluation.probes is not None:
        known, asked = labels[evaluation.gallery.numpy()], labels[evaluation.probes.numpy()]
        probes, rows = e[evaluation.probes], evaluation.gallery
        if evaluation.unmated is None:
            told, right = _closed(probes, asked, known_e[rows], known)
        else:
            told, right = opened(probes, asked, e[evaluation.unmated], known_raw[rows], known)
        metrics |= told
        correct |= right
        groups |= dict.fromkeys(right, asked)
    if evaluation.recall_at:
        found = recall_at_k(e, labels, ks=evaluation.recall_at)
        metrics |= {f"recall{k}": 100 * v for k, v in found.recall.items()}
        metrics |= {"r_precision": 100 * found.r_precision, "map_at_r": 100 * found.map_at_r}
        correct["recall1"], groups["recall1"] = found.correct, labels
    return Score(metrics, correct, groups, extra, unit)


def pair_groups(labels: np.ndarray, first: np.ndarray) -> tuple[np.ndarray, str]:
    """What pairs are resampled by, [P], and its name: the identity of each pair's first image
    (numbers [P] of labels [N]), or the pair where all labels are one (a .bin names nobody)."""
    if len(np.unique(labels)) > 1:
        return labels[first], "identities"
    return np.arange(len(first)), "pairs"


def opened(
    mated: Tensor,
    ids: np.ndarray,
    unmated: Tensor,
    gallery: Tensor,
    gallery_ids: np.ndarray,
    *,
    alarms: Sequence[float] = (ALARM,),
) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """Watch-list search: metrics in percent, and correct[column] bool [Q] of the mated probes.

    mated: [Q, D], unmated: [U, D], gallery: [G, D] as the network gives them, of which each
    identity's mean is its prototype. metrics: TPIR20 at every FPIR of `open_set`, the area under
    it, and rank-k and mAP of the mated probes. Columns: TPIR20 at the FPIRs `alarms` that so many
    unmated probes can show, then rank-1.
    """
    template, known = prototypes(gallery, gallery_ids)
    found = open_set(mated, ids, unmated, template, known)
    metrics = {_tpir20(f): 100 * v for f, v in found.tpir.items()}
    metrics["tpir20_fpir_auc"] = 100 * found.auc
    ranks, first = _closed(mated, ids, template, known)
    correct = {_tpir20(f): found.found[f] for f in alarms if f in found.found}
    return metrics | ranks, correct | first


def _closed(
    probes: Tensor, ids: np.ndarray, gallery: Tensor | np.ndarray, gallery_ids: np.ndarray
) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    search = closed_set(probes, ids, gallery, gallery_ids)
    metrics = {f"rank{k}": 100 * v for k, v in search.cmc.items()} | {"map": 100 * search.map}
    return metrics, {"rank1": search.correct}


def _tpir20(fpir: float) -> str:
    return f"tpir20_at_fpir_{fpir:g}"


def _classified(found: Classification, out: Tensor) -> Score:
    metrics = {f"top{k}": 100 * v for k, v in found.top.items()}
    items = {"top1": np.arange(len(found.correct))}
    extra = {"embeddings": out.numpy()}
    return Score(metrics, {"top1": found.correct}, items, extra, "images")


def _verified(pairs: Verification) -> dict[str, float]:
    margin, overlap = histogram_statistics(pairs.scores, pairs.same)
    metrics = {
        "verification": 100 * pairs.accuracy,
        "verification_std": 100 * pairs.std,
        "verification_best": 100 * pairs.best_accuracy,
        "auc": 100 * pairs.auc,
        "eer": 100 * pairs.eer,
        "margin": margin,
        "overlap": overlap,
    }
    for far in (1e-2, 1e-3):
        if (~pairs.same).sum() * far >= 1:  # fewer negatives cannot resolve it
            metrics[f"tar_at_far_{far:g}"] = 100 * pairs.tar_at(far)
    return metrics

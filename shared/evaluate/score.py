"""Score a network on an `Evaluation` by its protocol."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from shared.data import procedural
from shared.data.sets import Evaluation
from shared.degrade import to_float, to_uint8
from shared.evaluate.classify import classification
from shared.evaluate.identify import closed_set, open_set
from shared.evaluate.intervals import Interval, bootstrap
from shared.evaluate.verify import flip_sum, histogram_statistics, verification

BATCH = 500  # images a forward pass; larger ones are no faster on a CPU

# The columns of a result table, per task: key, heading.
COLUMNS = {
    "faces": {"verification": "verification", "rank1": "rank-1"},
    "objects": {"top1": "top-1"},
}
# The column that picks the best epoch on the development split.
HEADLINE = {"faces": "rank1", "objects": "top1"}


@dataclass(frozen=True)
class Score:
    """What a network scored: numbers in percent, and the items behind the first ones.

    correct[column] is a bool [items]; groups[column] the identity (objects: the image) of each
    item, by which intervals resample. extra: "embeddings" [N, D] (objects: logits), for faces
    "scores" [P] of the pairs and their "threshold".
    """

    metrics: dict[str, float]
    correct: dict[str, np.ndarray]
    groups: dict[str, np.ndarray]
    extra: dict[str, np.ndarray] = field(default_factory=dict)

    def interval(self, column: str) -> Interval:
        """95 % bootstrap interval by identity, in percent."""
        found = bootstrap(self.correct[column].astype(float) * 100, self.groups[column])
        return Interval(self.metrics[column], found.low, found.high)


@torch.inference_mode()
def embed(network: Callable[[Tensor], Tensor], evaluation: Evaluation) -> tuple[Tensor, Tensor]:
    """Outputs of `network` (uint8 HR [B,3,S,S] -> [B, D]) on every image and on its mirror image.

    Returns two [N, D] float32 tensors; rows of images that could not be decoded repeat another's.
    """
    spans = list(torch.arange(len(evaluation.images)).split(BATCH))
    plain, mirrored = [], []
    for _, pixels in evaluation.images.batches(spans):
        plain.append(network(pixels).float().cpu())
        if evaluation.task == "faces":
            mirrored.append(network(pixels.flip(-1)).float().cpu())
    return torch.cat(plain), torch.cat(mirrored) if mirrored else torch.empty(0)


@torch.inference_mode()
def score_native(
    network: Callable[[Tensor], Tensor], native: procedural.Native, size: int
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


def score(network: Callable[[Tensor], Tensor], evaluation: Evaluation) -> Score:
    """Faces: 10-fold verification and rank-k identification of e(x) + e(flip x), by cosine.
    Objects: top-1 and top-5 of the logits. See `embed` for `network`."""
    out, mirrored = embed(network, evaluation)
    labels = evaluation.images.labels.cpu().numpy()
    if evaluation.task == "objects":
        found = classification(out, labels)
        metrics = {f"top{k}": 100 * v for k, v in found.top.items()}
        items = {"top1": np.arange(len(labels))}
        return Score(metrics, {"top1": found.correct}, items, {"embeddings": out.numpy()})
    assert evaluation.pairs is not None
    assert evaluation.gallery is not None and evaluation.probes is not None
    e = torch.as_tensor(flip_sum(out, mirrored))
    first, second, same = evaluation.pairs
    pairs = verification(e[first], e[second], same)
    gallery, probes = evaluation.gallery.numpy(), evaluation.probes.numpy()
    search = closed_set(e[probes], labels[probes], e[gallery], labels[gallery])
    margin, overlap = histogram_statistics(pairs.scores, same.numpy())
    metrics = {
        "verification": 100 * pairs.accuracy,
        "verification_std": 100 * pairs.std,
        "verification_best": 100 * pairs.best_accuracy,
        "auc": 100 * pairs.auc,
        "eer": 100 * pairs.eer,
        **{f"rank{k}": 100 * v for k, v in search.cmc.items()},
        "map": 100 * search.map,
        "margin": margin,
        "overlap": overlap,
    }
    for far in (1e-2, 1e-3):
        if (~same).sum() * far >= 1:  # fewer negatives cannot resolve it
            metrics[f"tar_at_far_{far:g}"] = 100 * pairs.tar_at(far)
    return Score(
        metrics,
        {"verification": pairs.correct, "rank1": search.correct},
        {"verification": labels[first.numpy()], "rank1": labels[probes]},
        {"scores": pairs.scores, "embeddings": e.numpy(), "threshold": np.array(pairs.threshold)},
    )

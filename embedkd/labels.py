"""Semi-supervised training: some images keep their labels, the teacher learns from those alone."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from embedkd.config import Config
from shared.config import digest
from shared.data.pipeline import Part
from shared.data.sets import DataSet


def known(labels: Tensor, share: float, seed: int) -> Tensor:
    """Which images keep their labels: bool [N], `share` of each class, rounded, at least one.

    labels: [N]. Source: Sec. 5.2, "we randomly select half of the training images per class".
    """
    kept = torch.zeros(len(labels), dtype=torch.bool)
    generator = torch.Generator().manual_seed(seed)
    for label in labels.unique().tolist():
        own = (labels == label).nonzero()[:, 0]
        order = torch.randperm(len(own), generator=generator)
        kept[own[order[: max(1, round(share * len(own)))]]] = True
    return kept


def restrict(data: DataSet, config: Config) -> tuple[DataSet, Tensor]:
    """(data whose teacher sees labelled images only, which training images those are [N]).

    With all of them labelled the data are what they were.
    """
    labelled = known(data.train.labels.cpu(), config.labelled, config.data.seed)
    if config.labelled == 1:
        return data, labelled
    seen = labelled.nonzero()[:, 0]
    made_of = digest(data.fingerprint, "labelled", config.labelled, config.data.seed)
    return replace(
        data,
        teacher_train=Part(data.train, seen),
        teacher_classes=data.classes,
        fingerprint=made_of,
    ), labelled

"""Stage 1's result as the teacher of stage 2, and the class centres of either teacher."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from horkd.config import ASSISTANT, Config, at_hr
from horkd.losses import class_centers
from shared import teacher
from shared.data.pipeline import Loader
from shared.data.sets import DataSet
from shared.models.recogniser import load_trained
from shared.run import Run
from shared.teacher import FrozenTeacher


def assistant(
    run: Run, config: Config, data: DataSet, loader: Loader, passes: int
) -> FrozenTeacher:
    """The assistant of this run, or of --assistant-run, frozen, with kept outputs of its own.

    passes: how often it will be asked about the training images. Raises ValueError for a run
    without a finished assistant, or whose assistant is another network or knows other classes.
    """
    folder = Path(config.assistant_run).expanduser() if config.assistant_run else run.folder
    trained = load_trained(folder, config.assistant, at_hr(config.data), ASSISTANT)
    if trained.classes != data.classes:
        raise ValueError(
            f"--assistant-run {folder}: its assistant knows {trained.classes} classes, these data "
            f"have {data.classes}"
        )
    network = dataclasses.asdict(config.assistant)
    made_by = dataclasses.replace(config.teacher, **network, checkpoint="", optim=config.optim)
    recogniser = run.place(trained.recogniser)
    return teacher.of(run, recogniser, made_by, data, loader=loader, passes=passes)


def centers_of(taught_by: FrozenTeacher, data: DataSet) -> Tensor:
    """u of Eq. 6 for who teaches: of the unit features of every training image as it is,
    un-augmented; [classes, D]. The features are those of the teacher cache."""
    f = F.normalize(torch.tensor(taught_by.embeddings()))
    return class_centers(f, data.train.labels, data.classes)

"""Stage 1's result as the teacher of stage 2, and the class centres of either teacher."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from horkd.config import ASSISTANT, Config, at_hr
from horkd.losses import class_centers
from shared import cli, teacher
from shared.config import locate
from shared.data.pipeline import Loader
from shared.data.sets import DataSet
from shared.models.recogniser import Recogniser, Student, load_trained
from shared.run import Run
from shared.teacher import FrozenTeacher

# Fields of Data that another run's assistant must have been trained with.
_ALIKE = ("name", "hr", "mean", "std", "seed", "identities", "instances", "coarse", "fine",
          "development", "pad", "crop")  # fmt: skip


def check(config: Config, data: DataSet) -> None:
    """What can be known before anything is trained. Raises ValueError, naming the flag."""
    if data.task == "objects":
        if "none" in (config.student.head, config.assistant.head):
            raise ValueError(
                f"--student.head none: {config.data.name} is scored by classes, not by embeddings"
            )
        if not config.cls:
            raise ValueError(
                f"--cls 0: {config.data.name} is scored by classes, which the task loss teaches"
            )
    if config.assistant_run:
        _given(config, data)
    elif config.stages != "direct":
        with torch.device("meta"):
            Recogniser(config.assistant, config.data.hr, data.classes)


def assistant(
    run: Run, config: Config, data: DataSet, loader: Loader, passes: int
) -> FrozenTeacher:
    """The assistant of this run, or of --assistant-run, frozen, with kept outputs of its own.

    passes: how often it will be asked about the training images.
    """
    if config.assistant_run:
        trained = _given(config, data)
    else:
        trained = load_trained(run.folder, config.assistant, at_hr(config.data), ASSISTANT)
    network = dataclasses.asdict(config.assistant)
    made_by = dataclasses.replace(config.teacher, **network, checkpoint="", optim=config.optim)
    recogniser = run.place(trained.recogniser)
    return teacher.of(run, recogniser, made_by, data, loader=loader, passes=passes)


def _given(config: Config, data: DataSet) -> Student:
    """The assistant of --assistant-run. Raises ValueError where it was trained on other data, is
    another network, or is not there."""
    folder = Path(config.assistant_run).expanduser()
    theirs = cli.stored(Config, folder if folder.is_dir() else locate(config.assistant_run))
    differ = [k for k in _ALIKE if getattr(theirs.data, k) != getattr(config.data, k)]
    if differ or theirs.assistant != config.assistant:
        told = ", ".join([f"--data.{k}" for k in differ] or ["--assistant"])
        raise ValueError(f"--assistant-run {folder}: trained otherwise ({told.replace('_', '-')})")
    folder = folder if folder.is_dir() else locate(config.assistant_run)
    trained = load_trained(folder, config.assistant, at_hr(config.data), ASSISTANT)
    if trained.classes != data.classes:
        raise ValueError(
            f"--assistant-run {folder}: its assistant knows {trained.classes} classes, these data "
            f"have {data.classes}"
        )
    return trained


def centers_of(taught_by: FrozenTeacher, data: DataSet) -> Tensor:
    """u of Eq. 6 for who teaches: of the unit features of every training image as it is,
    un-augmented; [classes, D]. The features are those of the teacher cache; images that could not
    be decoded, which have zeros there, are left out."""
    f = F.normalize(torch.tensor(taught_by.embeddings()))
    there = f.any(dim=1)
    return class_centers(f[there], data.train.labels.cpu()[there], data.classes)

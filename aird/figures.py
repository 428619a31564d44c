"""The figures of the paper, drawn from finished runs (shared/figures.py)."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path

from aird.config import Config, arms
from aird.model import face_bn
from aird.scoring import OWN, feature_means
from shared import figures
from shared.config import locate
from shared.data.sets import load
from shared.models.recogniser import load_trained
from shared.run import choose_device

IMAGES = 2000  # of each data set in Fig. 5


def draw(config: Config, folders: Sequence[Path]) -> Path:
    """The figure that `config.figure` names, into the last of `folders`; returns the PNG's path."""
    last = folders[-1]
    out = last / "figures" / config.recipe
    out.parent.mkdir(exist_ok=True)
    rows = list(arms(config))
    if config.figure == "curve":
        field = "sampling" if "sampling" in config.recipe else "n"
        return figures.curve(folders, field, out, arm=OWN)
    if config.figure == "similarity":
        figures.similarity(last, rows, out)
        return figures.similarity(last, rows, out.with_name(f"{out.name}-lr-hr"),
                                  name="results-lr-hr")  # fmt: skip
    if config.figure == "tsne":
        return figures.tsne(last, ["teacher, LR", *rows], out)
    return means(config, last, out)


def means(config: Config, run: Path, out: Path) -> Path:
    """Fig. 5: feature means of test and training faces with the training statistics, and with
    FaceBN for the test faces."""
    device = choose_device(config.device)
    data = load(config.data, cache=locate(config.cache))
    student = load_trained(run, config.student, config.data, OWN).to(device)
    name, test = next(data.tests())
    adapted = partial(face_bn, gamma=config.gamma, mode="online")
    measure = partial(feature_means, student, count=IMAGES)
    trained_on = measure(data.train, nullcontext)
    before, after = measure(test.images, nullcontext), measure(test.images, adapted)
    groups = {
        "batch norm": {"training": trained_on, test.name: before},
        "FaceBN": {"training": trained_on, test.name: after},
    }
    return figures.means(groups, out)

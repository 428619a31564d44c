"""The figures of the paper, drawn from finished runs (shared/figures.py)."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

from aird.config import RECIPES, Config, arms, members
from aird.model import face_bn
from aird.scoring import ADAPTED, OWN, feature_means
from shared import figures
from shared.config import locate
from shared.data.sets import load
from shared.models.recogniser import load_trained
from shared.run import choose_device

IMAGES = 2000  # of each data set in Fig. 5


def draw(config: Config, runs: Sequence[Path]) -> Path | None:
    """The figure `config.figure` of finished `runs`, into the folder of the last one; its path,
    which is also printed.

    None where a curve has fewer than two runs. Raises ValueError where the runs lack what the
    figure shows.
    """
    last = runs[-1]
    rows = [ADAPTED if arm == OWN else arm for arm in arms(config)]  # the paper's AIRD has FaceBN
    out = last / "figures" / config.recipe
    if config.figure == "curve":
        wanted = members(replace(config, vary=RECIPES[config.recipe].vary))
        drawn = figures.recipe_curve(OWN, config, wanted, runs, out, arm=ADAPTED,
                                     column="verification_best")  # fmt: skip
    elif config.figure == "similarity":
        drawn = figures.similarity(last, ["teacher, LR", *rows], out)
        other = out.with_name(f"{out.name}-lr-hr")
        mixed = figures.similarity(last, ["teacher", *rows], other, name="results-lr-hr")
        print(f"figure: {mixed}")
    elif config.figure == "tsne":
        drawn = figures.tsne(last, ["teacher, LR", *rows], out)
    else:
        drawn = means(config, last, out)
    if drawn:
        print(f"figure: {drawn}")
    return drawn


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
        "batch norm": {test.name: before, "training": trained_on},
        "FaceBN": {test.name: after, "training": trained_on},
    }
    return figures.means(groups, out)

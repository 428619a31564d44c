"""Score the networks of a run: `python eval.py RUN [--on shifted] [--best]`.

On a public test set (docs/data.md): `python eval.py RUN --on lfw --root FOLDER`, cross- and
same-resolution. Faces of native sizes, by nine routing strategies: `--on native` (procedural) or
`--on survface --root FOLDER`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from btnet import tables
from btnet.config import NAME, Config
from btnet.networks import readers
from shared import cli, rescore
from shared.models.recogniser import Recogniser, Student, read_metadata


def evaluate(
    run: Path,
    on: str = "test",
    root: str = "",
    best: bool = False,
    device: str = "cpu",
    **data: Any,
) -> str:
    """Score every row of a run; returns the tables, and keeps them in the run's folder as JSON.

    on, root, best, data: see shared.rescore.
    """
    config = rescore.stored(Config, run, data)
    rows = readers(run, config, lambda network: network.to(torch.device(device)), best=best)
    name = f"eval-{on}{'-best' if best else ''}"
    if on in ("native", "survface"):
        if on == "survface" and not root:
            raise ValueError("--on survface needs --root: where it lies (docs/data.md)")
        found = tables.routing(run, config, rows, root=root, name=name)
        if not found:
            raise ValueError(
                "--on native: only procedural faces have a split of native sizes, and only runs "
                "with branches a router"
            )
        return found
    some = next((run / "students").glob("*.safetensors"), None)  # all are of the same images
    if some is None:
        raise ValueError(f"{run}: no finished network in it yet; go on with --resume {run}")
    facts = read_metadata(some)
    recogniser = Recogniser(config.student, config.data.hr, int(facts["classes"]))
    student = Student(recogniser, config.data, "faces", facts["alignment"])
    opened = rescore.opened(run, config, {some.stem: student}, on=on, root=root, best=best)
    if opened.evaluation.native:
        raise ValueError(f"--on {on}: small by nature, there is no HR to bring down; try survface")
    return tables.matching(
        run, config, rows, opened.evaluation, name=opened.name, epoch=opened.epoch
    )


def main() -> None:
    print(evaluate(**rescore.arguments(rescore.parser(NAME))))


if __name__ == "__main__":
    cli.guarded(main)

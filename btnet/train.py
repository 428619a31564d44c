"""Train BTNet: `python train.py [RECIPE] [--flags]`, `python train.py --help`.

"Learning Unified Representations for Multi-Resolution Face Recognition", BMVC 2022. One run trains
phi_hr (cached), the trunk phi_mr on images of mixed resolution, a branch for each smaller
resolution, and beside them phi_mm, a network of its own for each; and ends in a table of cross- and
same-resolution matching, what each costs, and nine routing strategies on faces of native sizes.
"""

from __future__ import annotations

import functools
import os
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F

from btnet import tables
from btnet.config import ABOUT, NAME, RECIPES, Config, arms, members
from btnet.losses import L_branch, L_influence, L_total
from btnet.model import BTNet, trunk_map
from btnet.networks import (
    Reader,
    assembled,
    check,
    export,
    keep_hr,
    readers,
    started,
    take_trunk,
    trunk_of,
)
from btnet.views import draw_sizes, mixed
from shared import cli, optim, report, teacher
from shared.config import locate
from shared.data.pipeline import Loader
from shared.data.sets import load
from shared.evaluate.score import score
from shared.models.recogniser import Recogniser
from shared.run import Run

__all__ = ["NAME", "RECIPES", "load_student", "train"]


def train(config: Config) -> Path:
    """phi_hr, trunk, branches and phi_mm of one configuration; returns the run's folder."""
    run = Run.start(NAME, config)
    if not config.students:
        return tables.drawn(run, config)

    # ---- data
    c, largest = config.data, config.resolutions[-1]
    data = run.in_turn(lambda: load(c, cache=locate(config.cache)))
    if data.task != "faces":
        raise ValueError(f"--data.name {c.name}: BTNet compares embeddings, give it identities")

    @functools.cache
    def loader(size: int, batch: int) -> Loader:
        return Loader(data.train, replace(c, lr=size), batch, seed=config.seed, device=run.device,
                      rank=run.rank, world=run.world)  # fmt: skip

    run.note(licence=data.licence, selection=data.selection, **data.notes)

    # ---- networks
    check(config)
    if config.trunk_run and not run.has_student(config.trunk):
        take_trunk(run, config, data.classes)
    run.choose_precision(Recogniser(config.student, largest, data.classes), largest, 64)
    facts = {"task": data.task, "classes": data.classes, "alignment": data.alignment}
    if {"hr", "mm"} & {*config.students}:
        hr = teacher.get(run, config.teacher, c, data)
        keep_hr(run, hr, **facts | {"classes": data.teacher_classes})
    trunk: Recogniser | None = None
    for arm, wanted in arms(config).items():
        if run.has_student(arm):
            continue
        if wanted.from_trunk and trunk is None:
            trunk = run.place(trunk_of(run.folder, config))
        # networks of random numbers are independent: of equal ones some compatibility would remain
        torch.manual_seed(config.seed + 1000 * (1 + wanted.resolution))
        student = started(run, config, wanted, data.classes, trunk)
        head, branch = student.head, cast(Any, student.backbone)
        assert head is not None
        kept = student if wanted.mixed else branch
        net = run.wrap(student)

        # ---- optimiser
        optimiser = optim.make(wanted.optim, [student])
        modules = {"student": kept, "head": head}
        phase = run.phase(
            arm, modules, optimiser, loader(wanted.resolution, wanted.optim.batch), wanted.optim
        )

        # ---- loop
        for batch in phase:
            student.train()
            with run.autocast():
                if wanted.mixed:
                    sizes = draw_sizes(wanted.mixed, largest, config.seed, batch.index, batch.epoch,
                                       count=config.sizes)  # fmt: skip
                    x = mixed(batch.x_h(), sizes, c)
                else:
                    x = batch.x_l()
                e_s, maps = net(x, maps=True)
                if wanted.lambda_branch and trunk is not None:
                    with torch.no_grad():
                        z_s = trunk_map(trunk.backbone, batch.x_h(), branch.at)
                        if config.embedding_mse == "official":
                            e_t = trunk(batch.x_h())
            cls = L_influence(e_s, batch.y, head) + student.penalty
            terms = {"cls": cls}
            loss = cls
            if wanted.lambda_branch:
                terms["branch"] = distilled = L_branch(maps["z"], z_s, mode=config.branch_mse)
                if config.embedding_mse == "official":
                    terms["embedding"] = F.mse_loss(e_s.float(), e_t.float())
                    distilled = distilled + terms["embedding"]
                loss = L_total(cls, distilled, wanted.lambda_branch)
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            norm = optim.clip(optimiser, wanted.optim.clip)
            phase.log(batch, loss=loss, gradient=norm, **terms)
            optimiser.step()
            if data.selection != "test" and phase.due(batch):
                student.eval()
                read = Reader(branch, c, wanted.resolution, enlarged=wanted.mixed is not None)
                with run.autocast():
                    found = score(read, data.selecting)
                phase.keep_best(kept, found.headline, found.metrics)
        phase.finish(kept, own=False, **facts)

    # ---- score
    if run.rank == 0:
        run.note(skipped=data.left_out())
        if any(arm.from_trunk for arm in arms(config).values()):
            export(run.folder, config)
        rows = readers(run.folder, config, run.place)
        print(tables.costs(run, rows))
        for name, test in data.tests():
            if not test.native:
                with run.autocast():
                    print(tables.matching(run.folder, config, rows, test, name=name))
        print(tables.mean(run.folder))
        with run.autocast():
            print(tables.routing(run.folder, config, rows))
        run.note(seconds=run.seconds())
        if config.report and (run.folder / "results.json").is_file():
            report.write(run.folder)
    return run.folder


def load_student(run: str | Path, arm: str = NAME, *, best: bool = False) -> BTNet:
    """A run's BTNet, ready for images of any size: see btnet.model.BTNet.forward.

    arm: "btnet", the trunk and its branches; "pretrain", "bct" or "fixed" (Table 3), likewise; or
    a trunk alone, which enlarges whatever it gets: "mr", "mr-v2", "mr-v3". best: of the epochs with
    the best development score instead of the last. Raises ValueError where there is none.
    """
    config = cli.stored(Config, run)
    return assembled(Path(run), config, "bt" if arm == NAME else arm, best=best)


def main() -> None:
    config = cli.parse(NAME, RECIPES, ABOUT, members)
    runs = members(config)
    if len(runs) > 1 and runs[0].folder:
        raise ValueError(f"--folder is for one run, this recipe has {len(runs)}: add --only K")
    if len(runs) > 1 and config.start_run:
        raise ValueError(f"--start-run: {config.recipe} has {len(runs)} runs: add --only K")
    if config.figure == "ends" and RECIPES[config.recipe].figure != "ends":
        raise ValueError(f"--figure ends: {config.recipe} does not vary where branches end")
    folders: list[Path] = []
    for one in runs:
        if folders and not one.trunk_run:  # they differ in their branches only
            one = replace(one, trunk_run=str(folders[0]))
        folders.append(train(one))
    if config.figure == "ends" and int(os.environ.get("RANK", 0)) == 0:
        tables.ends(folders)


if __name__ == "__main__":
    cli.guarded(main)

"""Train the baselines: `python train.py [RECIPE] [--flags]`, `python train.py --help`.

The methods that the papers' tables compare with, in one loop. One run trains the high-resolution
teacher (cached), the low-resolution student alone, and with each method; and ends in one table.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from baselines.config import ABOUT, NAME, RECIPES, Config, arms, members
from baselines.model import KD, METHODS, Seen, sizes
from shared import cli, optim, report, results, teacher
from shared.config import locate
from shared.data.pipeline import Loader
from shared.data.sets import load
from shared.evaluate.score import score
from shared.losses import kd
from shared.models.recogniser import Recogniser, Student, begin, load_trained, reader
from shared.run import Run

__all__ = ["NAME", "RECIPES", "load_student", "train"]


def train(config: Config) -> Path:
    """Teacher, student alone and the students of the other methods; returns the run's folder."""
    run = Run.start(NAME, config)
    c = config.data

    # ---- data
    cache, known = locate(config.cache), config.teacher.identities
    data = run.in_turn(lambda: load(c, cache=cache, teacher_identities=known))
    loader = Loader(data.train, c, config.optim.batch, seed=config.seed, device=run.device,
                    rank=run.rank, world=run.world, whole=data.train_whole)  # fmt: skip
    run.note(licence=data.licence, selection=data.selection, **data.notes)

    # ---- networks
    probe = Recogniser(config.student, c.lr_input, data.classes)
    run.choose_precision(probe, c.lr_input, config.optim.batch)
    students = arms(config)
    to_train = {arm: one for arm, one in students.items() if not run.has_student(arm)}
    asked = [arm for arm, one in to_train.items() if one.own or one.kd]
    kept = [arm for arm in asked if "maps" not in METHODS[arm].needs]
    passes = config.optim.epochs * len(kept)  # maps are never kept
    taught_by = teacher.get(run, config.teacher, c, data, loader=loader, passes=passes)
    for arm, wanted in to_train.items():
        torch.manual_seed(config.seed)  # every student starts from the same weights
        student = begin(run, config.student, c.lr_input, data.classes)
        method: nn.Module = nn.Identity()
        needs: frozenset[str] = frozenset()
        if wanted.own:
            made_for = sizes(student, taught_by.recogniser, c, images=len(data.train),
                             classes=data.classes, scale=config.student.scale,
                             margin=config.student.margin)  # fmt: skip
            method, needs = run.place(METHODS[arm](made_for)), METHODS[arm].needs
        net = run.wrap(student)

        # ---- optimiser
        optimiser = optim.make(config.optim, [student, method])
        modules = {"student": student, "method": method}
        phase = run.phase(arm, modules, optimiser, loader, config.optim)

        # ---- loop
        for batch in phase:
            student.train()
            maps_s: dict[str, Tensor] = {}
            maps_t: dict[str, Tensor] = {}
            with run.autocast():
                if "maps" in needs:
                    e_s, maps_s = net(batch.x_l(), maps=True)
                    e_t, maps_t = taught_by.maps(batch)
                    z_t = taught_by.logits(e_t)
                else:
                    e_s = net(batch.x_l())
                    if needs or wanted.kd:
                        e_t, z_t = taught_by.targets(batch)
            z_margin, z_s = student.logit_pair(e_s, batch.y)
            # (weight, value); a task loss of weight 0 stays in, for ranks wait for its head
            terms = {"cls": (wanted.cls, F.cross_entropy(z_margin, batch.y) + student.penalty)}
            if wanted.kd:
                terms["kd"] = wanted.kd, kd(z_s, z_t, KD.TEMPERATURE)
            if wanted.own:  # relations and memories are of the global batch, the same on every rank
                gather, own = run.gather, run.gather_with_gradient
                seen = Seen(
                    e_s=own(e_s), e_t=gather(e_t), z_s=own(z_s), z_t=gather(z_t),
                    maps_s={name: own(value) for name, value in maps_s.items()},
                    maps_t={name: gather(value) for name, value in maps_t.items()},
                    y=gather(batch.y), index=gather(batch.index.to(run.device)),
                    epoch=batch.epoch, generator=run.generator(phase.step),
                )  # fmt: skip
                terms[arm] = wanted.own, method(seen)
            loss = torch.stack([weight * value for weight, value in terms.values()]).sum()
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            run.mean_gradients(method)
            norm = optim.clip(optimiser, config.optim.clip)
            phase.log(batch, loss=loss, gradient=norm, **{k: v for k, (_, v) in terms.items()})
            optimiser.step()
            if phase.due(batch):
                with run.autocast():
                    found = score(reader(student, c, data.task), data.selecting)
                phase.keep_best(student, found.headline, found.metrics)
        phase.finish(student, own=arm == config.students[-1], task=data.task,
                     classes=data.classes, alignment=data.alignment)  # fmt: skip

    # ---- score
    if run.rank == 0:
        run.note(skipped=data.left_out())
        if data.left_out():
            run.say(f"{len(data.left_out())} images could not be decoded and were left out")
        for name, test in data.tests():
            with run.autocast():
                rows = results.teacher_rows(taught_by, test, c) if config.score_teacher else {}
            rows |= {
                arm: results.student_row(run.place(load_student(run.folder, arm)), test)
                for arm in students
            }
            results.write(run.folder, rows, test, reference="none", name=name)
            run.note(seconds=run.seconds())
            print(results.table(run.folder, name))
            if config.report and name == "results":
                report.write(run.folder)
    return run.folder


def load_student(run: str | Path, arm: str = "", *, best: bool = False) -> Student:
    """A run's student, ready for LR images at native size: see shared.models.recogniser.Student.

    run: the run's folder. arm: one of Config.students; empty: the last of them. best: of the epoch
    with the best development score instead of the last. Raises ValueError where there is no such
    student.
    """
    config = cli.stored(Config, run)
    arm = arm or config.students[-1]
    return load_trained(Path(run), config.student, config.data, arm, best=best)


def main() -> None:
    runs = members(cli.parse(NAME, RECIPES, ABOUT, members))
    if len(runs) > 1 and runs[0].folder:
        raise ValueError(f"--folder is for one run, this recipe has {len(runs)}: add --only K")
    for config in runs:
        train(config)


if __name__ == "__main__":
    cli.guarded(main)

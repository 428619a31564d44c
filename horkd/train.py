"""Train HORKD: `python train.py [RECIPE] [--flags]`, `python train.py --help`.

"Look One and More: Distilling Hybrid Order Relational Knowledge for Cross-Resolution Image
Recognition", AAAI 2020. One run trains the high-resolution teacher (cached), the assistant it
teaches (stage 1, HR), and the low-resolution student that the assistant teaches (stage 2), beside
students without the assistant, with other distillation, and alone; and ends in one table.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from horkd import figures
from horkd.config import ABOUT, ASSISTANT, NAME, RECIPES, Config, arms, at_hr, members, shown
from horkd.losses import L1, L2, L3, L_C
from horkd.model import Projector, Regressor
from horkd.stages import assistant, centers_of, check
from shared import cli, optim, report, results, teacher
from shared.baselines import attention_transfer, fitnet
from shared.config import locate
from shared.data.pipeline import Loader
from shared.data.samplers import PKSampler
from shared.data.sets import load
from shared.evaluate.score import score
from shared.losses import kd, triplet
from shared.models.recogniser import (
    Recogniser,
    Student,
    begin,
    copy_matching,
    load_trained,
    reader,
)
from shared.run import Run
from shared.teacher import FrozenTeacher

__all__ = ["NAME", "RECIPES", "load_student", "train"]


def train(config: Config) -> Path:
    """Teacher, assistant and students of one configuration; returns the run's folder."""
    if (config.stages == "2") != bool(config.assistant_run):
        raise ValueError("--stages 2 and --assistant-run RUN go together")
    if not arms(config):
        raise ValueError(f"--students {' '.join(config.students)}: --stages {config.stages} trains "
                         "none of them")  # fmt: skip
    run = Run.start(NAME, config)
    c, batch_size = config.data, config.optim.batch

    # ---- data
    cache, known = locate(config.cache), config.teacher.identities
    data = run.in_turn(lambda: load(c, cache=cache, teacher_identities=known))
    sampler = None
    if config.student.head == "none":  # triplets need pairs of one class in a batch
        each = config.images_per_class
        sampler = PKSampler(data.train.labels, batch_size // each, each, seed=config.seed)
        run.say(sampler.note) if sampler.note else None
    low, high = (
        Loader(data.train, seen, batch_size, seed=config.seed, device=run.device, rank=run.rank,
               world=run.world, sampler=sampler)
        for seen in (c, at_hr(c))
    )  # fmt: skip
    run.note(licence=data.licence, selection=data.selection, **data.notes)

    # ---- networks
    probe = Recogniser(config.student, c.lr_input, data.classes)
    run.choose_precision(probe, c.lr_input, batch_size)
    networks = arms(config)
    to_train = {arm: one for arm, one in networks.items() if not run.has_student(arm)}
    asked = [one for one in to_train.values() if one.stages != "2"]
    passes = sum(one.optim.epochs for one in asked if _distilled(one) or one.kd)
    check(config, data)
    first = teacher.get(run, config.teacher, c, data, loader=low, passes=passes)
    second: FrozenTeacher | None = None  # the assistant, once it is trained
    centers: dict[FrozenTeacher, Tensor] = {}
    for arm, wanted in to_train.items():
        taught_by = first
        if wanted.stages == "2":
            if second is None:
                passes = sum(one.optim.epochs for one in to_train.values() if one.stages == "2")
                second = assistant(run, config, data, low, passes)
            taught_by = second
        if wanted.gamma and taught_by not in centers:
            centers[taught_by] = centers_of(taught_by, data).to(run.device)
        torch.manual_seed(config.seed)  # every student starts from the same weights
        flag = "--assistant" if arm == ASSISTANT else "--student"
        student = begin(run, wanted.student, wanted.data.lr_input, data.classes, flag)
        if wanted.stages == "2" and wanted.student_init == "assistant":
            left = copy_matching(taught_by.recogniser, student)
            run.say(f"{arm}: starts from the assistant, but for {len(left)} tensors of other shape")
        projector = run.place(Projector(student.dim, taught_by.dim))
        regressor: nn.Module = nn.Identity()
        if wanted.fitnet:
            regressor = run.place(Regressor(student, taught_by.recogniser, wanted.data))
        net = run.wrap(student)

        # ---- optimiser
        loader = high if wanted.stages == "1" else low
        optimiser = optim.make(wanted.optim, [student, projector, regressor])
        modules = {"student": student, "projector": projector, "regressor": regressor}
        phase = run.phase(arm, modules, optimiser, loader, wanted.optim)

        # ---- loop
        for batch in phase:
            student.train()
            with run.autocast():
                e_s, maps_s = net(batch.x_l(), maps=True)
                if wanted.fitnet or wanted.attention:
                    e_t, maps_t = taught_by.maps(batch)
                elif _distilled(wanted) or wanted.kd:
                    e_t, z_t = taught_by.targets(batch)
            # relations are those of the global batch, the same on every rank
            g, y = run.gather_with_gradient(F.normalize(e_s.float())), run.gather(batch.y)
            z_margin, z_s = student.logit_pair(e_s, batch.y)
            if wanted.student.head == "none":
                cls = triplet(g, y, wanted.student.margin)
            else:
                cls = F.cross_entropy(z_margin, batch.y) + student.penalty
            # (weight, value); a task loss of weight 0 stays in, for ranks wait for its head
            terms = {"cls": (wanted.cls, cls)}
            if _distilled(wanted):
                f, how, share = F.normalize(run.gather(e_t)), wanted.reduction, 1.0
                if how == "image":
                    how, share = "sum", 1 / len(f)
                g_f = run.gather_with_gradient(F.normalize(projector(e_s.float())))
                if wanted.l1:
                    terms["L1"] = share * wanted.l1, L1(f, g_f, reduction=how)
                if wanted.alpha:
                    l_2 = L2(f, g, reduction=how, penalty=wanted.penalty)
                    terms["L2"] = share * wanted.alpha, l_2
                if wanted.beta:
                    terms["L3"] = share * wanted.beta, L3(f, g, reduction=how)
                if wanted.gamma:
                    l_c = L_C(f, g_f, centers[taught_by], reduction=how)
                    terms["LC"] = share * wanted.gamma, l_c
            if wanted.kd:
                terms["kd"] = wanted.kd, kd(z_s, z_t, wanted.temperature)
            if wanted.fitnet:
                terms["fitnet"] = wanted.fitnet, fitnet(*regressor(maps_s, maps_t))
            if wanted.attention:
                stages = [k for k in maps_s if k in maps_t and k.startswith("stage")]
                at = torch.stack([attention_transfer(maps_s[k], maps_t[k]) for k in stages])
                terms["at"] = wanted.attention, at.sum()
            loss = torch.stack([weight * value for weight, value in terms.values()]).sum()
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            run.mean_gradients(projector, regressor)
            norm = optim.clip(optimiser, wanted.optim.clip)
            phase.log(batch, loss=loss, gradient=norm, **{k: v for k, (_, v) in terms.items()})
            optimiser.step()
            # a test split picks no epoch, and an assistant sees no natively small image
            seen = wanted.stages != "1" or not data.selecting.native
            if data.selection != "test" and seen and phase.due(batch):
                with run.autocast():
                    found = score(reader(student, wanted.data, data.task), data.selecting)
                phase.keep_best(student, found.headline, found.metrics)
        phase.finish(student, task=data.task, classes=data.classes, alignment=data.alignment)

    # ---- score
    if run.rank == 0:
        run.note(skipped=data.left_out())
        if data.left_out():
            run.say(f"{len(data.left_out())} images could not be decoded and were left out")
        reference = "alone" if "alone" in networks else "direct"
        for name, test in data.tests():
            with run.autocast():
                rows = results.teacher_rows(first, test, c) if config.score_teacher else {}
            for arm in networks:
                if arm != ASSISTANT or not test.native:
                    trained = run.place(load_student(run.folder, arm))
                    rows[shown(arm)] = results.student_row(trained, test)
            results.write(run.folder, rows, test, reference=reference, name=name, own=NAME)
            run.note(seconds=run.seconds())
            print(results.table(run.folder, name))
            if config.report and name == "results":
                report.write(run.folder)
    return run.folder


def _distilled(wanted: Config) -> bool:
    """Whether a term of Eq. 8 has a weight."""
    return any((wanted.l1, wanted.alpha, wanted.beta, wanted.gamma))


def load_student(run: str | Path, arm: str = NAME, *, best: bool = False) -> Student:
    """A run's student, ready for LR images at native size: see shared.models.recogniser.Student.

    run: the run's folder. arm: "horkd" or another of Config.students, or "assistant", which takes
    HR images. best: of the epoch with the best development score instead of the last. Raises
    ValueError where there is no such student.
    """
    config = cli.stored(Config, run)
    if arm == ASSISTANT:
        return load_trained(Path(run), config.assistant, at_hr(config.data), arm, best=best)
    return load_trained(Path(run), config.student, config.data, arm, best=best)


def main() -> None:
    config = cli.parse(NAME, RECIPES, ABOUT, members)
    runs = members(config)
    if len(runs) > 1 and runs[0].folder:
        raise ValueError(f"--folder is for one run, this recipe has {len(runs)}: add --only K")
    if config.figure == "curve" and RECIPES[config.recipe].figure != "curve":
        raise ValueError(f"--figure curve: {config.recipe} is no curve over one field")
    folders = [train(one) for one in runs]
    if config.figure and int(os.environ.get("RANK", 0)) == 0:
        figures.draw(config, folders)


if __name__ == "__main__":
    cli.guarded(main)

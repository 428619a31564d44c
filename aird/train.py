"""Train AIRD: `python train.py [RECIPE] [--flags]`, `python train.py --help`.

"Low-Resolution Face Recognition via Adaptable Instance-Relation Distillation", IJCNN 2024. One run
trains the high-resolution teacher (cached) and one low-resolution student for each component of the
method, and ends in the paper's ablation table, with FaceBN on the plain and on the shifted faces.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
import torch.nn.functional as F

from aird import figures
from aird.config import ABOUT, RECIPES, Config, arms, members
from aird.losses import L_iid, L_total, rid, warm_up
from aird.model import RelationCritic
from aird.pairs import offline
from aird.scoring import tables
from shared import cli, optim, teacher
from shared.config import locate
from shared.contrast import CollapseAlarm, Normaliser
from shared.data.pipeline import Loader
from shared.data.samplers import PKSampler
from shared.data.sets import load
from shared.evaluate.score import score
from shared.models.recogniser import Recogniser, Student, load_trained, reader
from shared.run import Run

__all__ = ["NAME", "RECIPES", "load_student", "train"]
NAME = "aird"


def train(config: Config) -> Path:
    """Teacher and students of one configuration; returns the run's folder."""
    run = Run.start(NAME, config)
    c, batch_size = config.data, config.optim.batch

    # ---- data
    cache, known = locate(config.cache), config.teacher.identities
    data = run.in_turn(lambda: load(c, cache=cache, teacher_identities=known))
    sampler = None
    if config.sampling == "preselected":  # a shuffled batch holds next to no pairs of one person
        each = config.images_per_class
        sampler = PKSampler(data.train.labels, batch_size // each, each, seed=config.seed)
    loader = Loader(data.train, c, batch_size, seed=config.seed, device=run.device,
                    rank=run.rank, world=run.world, sampler=sampler,
                    whole=data.train_whole)  # fmt: skip
    run.note(licence=data.licence, selection=data.selection, **data.notes)

    # ---- networks
    probe = Recogniser(config.student, c.lr_input, data.classes)
    run.choose_precision(probe, c.lr_input, batch_size)
    students = arms(config)
    to_train = {arm: one for arm, one in students.items() if not run.has_student(arm)}
    passes = sum(one.optim.epochs for one in to_train.values() if one.alpha or one.beta)
    taught_by = teacher.get(run, config.teacher, c, data, loader=loader, passes=passes)
    pairs = None
    if any(one.beta for one in to_train.values()):
        pairs = offline(run, taught_by, loader, config)
    for arm, wanted in to_train.items():
        torch.manual_seed(config.seed)  # every student starts from the same weights
        student = run.place(Recogniser(wanted.student, c.lr_input, data.classes))
        relation = run.place(RelationCritic(taught_by.dim, student.dim, wanted.d))
        normaliser = Normaliser(wanted.normaliser, m=len(data.train), tau=wanted.tau).to(run.device)
        alarm = CollapseAlarm(run.say)
        net = run.wrap(student)

        # ---- optimiser
        optimiser = optim.make(wanted.optim, [student, relation])
        modules = {"student": student, "relation": relation, "z": normaliser}
        phase = run.phase(arm, modules, optimiser, loader, wanted.optim)

        # ---- loop
        zero = torch.zeros((), device=run.device)
        for batch in phase:
            student.train()
            with run.autocast():
                f_s = net(batch.x_l())
                if wanted.alpha or wanted.beta:
                    f_t, z_t = taught_by.targets(batch)
            z_margin, z_s = student.logit_pair(f_s, batch.y)
            cls = F.cross_entropy(z_margin, batch.y)
            penalty = student.penalty  # MagFace's; of the call before
            iid_, rid_, watched = zero, zero, {}
            if wanted.alpha:
                iid_ = L_iid(z_t, z_s, batch.y, temperature=wanted.temperature, mode=wanted.mode,
                             target=wanted.target, non_target=wanted.non_target)  # fmt: skip
                if wanted.mode == "dkd":
                    iid_ = warm_up(batch.epoch, wanted.warm_epochs) * iid_
            if wanted.beta and pairs is not None:
                # pairs are drawn over the global batch, the same on every rank
                f_all, y_all = run.gather(f_t), run.gather(batch.y)
                i, k, paired = pairs.draw(run.gather(batch.index), y_all, run.generator(phase.step))
                cos_pos, cos_neg = relation(f_t, f_s, run.own(f_all[i]), pairs.bank, run.own(k))
                log_z = normaliser(run.gather(cos_pos.detach()), run.gather(cos_neg.detach()))
                rid_ = rid(cos_pos, cos_neg, run.own(paired), tau=wanted.tau, m=len(data.train),
                           log_z=log_z)  # fmt: skip
                watched = {"cos_pos": cos_pos.mean(), "cos_neg": cos_neg.mean()}
            loss = L_total(cls + penalty, iid_, rid_, alpha=wanted.alpha, beta=wanted.beta)
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            run.mean_gradients(relation)
            norm = optim.clip(optimiser, wanted.optim.clip)
            logged = phase.log(batch, loss=loss, cls=cls, penalty=penalty, iid=iid_, rid=rid_,
                               gradient=norm, **watched)  # fmt: skip
            alarm.watch(logged)
            optimiser.step()
            if phase.due(batch):
                with run.autocast():
                    found = score(reader(student, c, data.task), data.selecting)
                phase.keep_best(student, found.headline, found.metrics)
        phase.finish(student, task=data.task, classes=data.classes, alignment=data.alignment)

    # ---- score
    if run.rank == 0:
        run.note(skipped=data.left_out())
        if data.left_out():
            run.say(f"{len(data.left_out())} images could not be decoded and were left out")
        trained = {arm: run.place(load_student(run.folder, arm)) for arm in students}
        tables(run, config, data, trained, taught_by)
    return run.folder


def load_student(run: str | Path, arm: str = NAME, *, best: bool = False) -> Student:
    """A run's student, ready for LR images at native size: see shared.models.recogniser.Student.

    run: the run's folder. arm: "aird" or another of Config.students. best: of the epoch with the
    best development score instead of the last. Raises ValueError where there is no such student.
    """
    config = cli.stored(Config, run)
    return load_trained(Path(run), config.student, config.data, arm, best=best)


def main() -> None:
    config = cli.parse(NAME, RECIPES, ABOUT, members)
    runs = members(config)
    if len(runs) > 1 and runs[0].folder:
        raise ValueError(f"--folder is for one run, this recipe has {len(runs)}: add --only K")
    if config.teacher.checkpoint and len({one.teacher.head for one in runs}) > 1:
        raise ValueError("--teacher.checkpoint is of one head, these runs have several: add --only")
    if config.figure == "curve" and not RECIPES[config.recipe].vary:
        raise ValueError(f"--figure curve: {config.recipe} is a single run")
    folders = [train(one) for one in runs]
    if config.figure and int(os.environ.get("RANK", 0)) == 0:
        figures.draw(config, folders)


if __name__ == "__main__":
    cli.guarded(main)

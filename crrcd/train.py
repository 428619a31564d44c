"""Train CRRCD: `python train.py [RECIPE] [--flags]`, `python train.py --help`.

"Low-Resolution Object Recognition with Cross-Resolution Relational Contrastive Distillation",
TCSVT 2024. One run trains the high-resolution teacher (cached), the low-resolution student alone,
with plain KD, and with CRRCD, and ends in one table.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
import torch.nn.functional as F

from crrcd.config import ABOUT, NAME, RECIPES, Config, arms, members
from crrcd.figures import draw
from crrcd.finetune import finetune
from crrcd.losses import L_total
from crrcd.model import FeatureQueue, RelationCritic
from shared import cli, optim, report, results, teacher
from shared.config import locate
from shared.contrast import CollapseAlarm, Normaliser, derangement
from shared.data.pipeline import Loader
from shared.data.sets import load
from shared.evaluate.score import score
from shared.losses import kd, nce
from shared.models.recogniser import Recogniser, Student, load_trained, reader
from shared.run import Run

__all__ = ["NAME", "RECIPES", "load_student", "train"]


def train(config: Config) -> Path:
    """Teacher, baselines and CRRCD student of one configuration; returns the run's folder."""
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
    students = arms(config)  # the baselines, then the paper's
    to_train = {arm: one for arm, one in students.items() if not run.has_student(arm)}
    passes = sum(one.optim.epochs for one in to_train.values() if one.alpha or one.beta)
    taught_by = teacher.get(run, config.teacher, c, data, loader=loader, passes=passes)
    for arm, wanted in to_train.items():
        torch.manual_seed(config.seed)  # every student starts from the same weights
        student = run.place(Recogniser(wanted.student, c.lr_input, data.classes))
        relation = run.place(RelationCritic(taught_by.dim, student.dim, wanted.d))
        queue = FeatureQueue(wanted.queue, taught_by.dim).to(run.device)
        normaliser = Normaliser(wanted.normaliser, m=len(data.train), tau=wanted.tau).to(run.device)
        alarm = CollapseAlarm(run.say)
        net = run.wrap(student)

        # ---- optimiser
        optimiser = optim.make(wanted.optim, [student, relation])
        modules = {"student": student, "relation": relation, "queue": queue, "z": normaliser}
        phase = run.phase(arm, modules, optimiser, loader, wanted.optim)
        if wanted.beta and phase.step == 0:
            queue.fill(taught_by, loader.plain(len(queue)))

        # ---- loop
        zero = torch.zeros((), device=run.device)
        for batch in phase:
            student.train()
            with run.autocast():
                e_s = net(batch.x_l())
                if wanted.alpha or wanted.beta:
                    e_t, z_t = taught_by.targets(batch)
            z_margin, z_s = student.logit_pair(e_s, batch.y)
            cls = F.cross_entropy(z_margin, batch.y)
            penalty = student.penalty  # MagFace's; of the call before
            kd_ = kd(z_s, z_t, wanted.rho) if wanted.alpha else zero
            rcd, watched = zero, {}
            if wanted.beta:
                # relations are drawn over the global batch, the same on every rank
                draws = run.generator(phase.step)
                e_all, y_all = run.gather(e_t), run.gather(batch.y)
                i_all = run.gather(batch.index.to(run.device))
                i = derangement(len(y_all), draws)  # partner i of sample j
                barred = i_all[i] if wanted.policy == "supervised" else i_all
                k = queue.sample(y_all, wanted.n, exclude=barred, policy=wanted.policy,
                                 generator=draws)  # fmt: skip
                cos_pos, cos_neg = relation(e_t, e_s, run.own(e_all[i]), queue.features, run.own(k))
                log_z = normaliser(run.gather(cos_pos.detach()), run.gather(cos_neg.detach()))
                rcd = nce(cos_pos, cos_neg, tau=wanted.tau, m=len(data.train), log_z=log_z)
                queue.push(e_all, y_all, i_all)
                watched = {"cos_pos": cos_pos.mean(), "cos_neg": cos_neg.mean()}
            loss = L_total(cls + penalty, kd_, rcd, alpha=wanted.alpha, beta=wanted.beta)
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            run.mean_gradients(relation)
            norm = optim.clip(optimiser, wanted.optim.clip)
            logged = phase.log(batch, loss=loss, cls=cls, penalty=penalty, kd=kd_, rcd=rcd,
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
        for name, test in data.tests():
            with run.autocast():
                rows = results.teacher_rows(taught_by, test, c) if config.score_teacher else {}
            rows |= {
                arm: results.student_row(run.place(load_student(run.folder, arm)), test)
                for arm in students
            }
            results.write(run.folder, rows, test, reference="alone", name=name)
            run.note(seconds=run.seconds())
            print(results.table(run.folder, name))
            if config.report and name == "results":
                report.write(run.folder)
    return run.folder


def load_student(run: str | Path, arm: str = NAME, *, best: bool = False) -> Student:
    """A run's student, ready for LR images at native size: see shared.models.recogniser.Student.

    run: the run's folder. arm: "crrcd" or one of its baselines. best: of the epoch with the best
    development score instead of the last. Raises ValueError where there is no such student.
    """
    config = cli.stored(Config, run)
    return load_trained(Path(run), config.student, config.data, arm, best=best)


def main() -> None:
    runs = members(cli.parse(NAME, RECIPES, ABOUT, members))
    if len(runs) > 1 and runs[0].folder:
        raise ValueError(f"--folder is for one run, this recipe has {len(runs)}: add --only K")
    if runs[0].figure == "curve" and not RECIPES[runs[0].recipe].vary:
        raise ValueError(f"--figure curve: {runs[0].recipe} is a single run")
    done = [finetune(config) if config.start else train(config) for config in runs]
    if runs[0].figure and int(os.environ.get("RANK", 0)) == 0:
        draw(runs[0], done)


if __name__ == "__main__":
    cli.guarded(main)

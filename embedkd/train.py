"""Train EmbedKD: `python train.py [RECIPE] [--flags]`, `python train.py --help`.

"Learning Metrics from Teachers: Compact Networks for Image Embedding", CVPR 2019. One run trains
the high-resolution teacher (cached), the low-resolution student alone, and with the absolute and
the relative teacher (and what else Config.students names), and ends in one table.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from embedkd.config import ABOUT, NAME, OWN, RECIPES, Config, arms, members, weights
from embedkd.figures import draw
from embedkd.labels import restrict
from embedkd.losses import absolute, attention, hint, relative, triplet
from embedkd.networks import check, sizes, stages
from shared import cli, optim, report, results, teacher
from shared.baselines import darkrank, pkt
from shared.config import locate
from shared.data.pipeline import Loader
from shared.data.samplers import HalfLabelled
from shared.data.sets import load
from shared.evaluate.score import score
from shared.models.recogniser import Recogniser, Student, begin, load_trained, reader
from shared.run import Run

__all__ = ["NAME", "RECIPES", "load_student", "train"]


def train(config: Config) -> Path:
    """Teacher and students of one configuration; returns the run's folder."""
    if config.count:
        name = config.recipe
        raise ValueError(f"{name} trains nothing: python train.py {name} prints the counts")
    students = arms(config)
    check(config, students.values())
    run = Run.start(NAME, config)
    c, each, batch_size = config.data, config.images_per_class, config.optim.batch
    p_all = batch_size // each if config.student.head == "none" else 0  # P of P x K batches

    # ---- data
    cache, known = locate(config.cache), config.teacher.identities
    data = run.in_turn(lambda: load(c, cache=cache, teacher_identities=known))
    if data.task == "objects" and config.student.head == "none":
        raise ValueError(f"--student.head none: {c.name} is scored by classes, not by embeddings")
    data, labelled = restrict(data, config)

    @functools.cache
    def loader(p: int, unlabelled: int) -> Loader:
        """Batches of P x K labelled images, then unlabelled ones; shuffled ones with a head."""
        sampler = None
        if config.student.head == "none":
            sampler = HalfLabelled(data.train.labels, labelled, p, each, unlabelled=unlabelled,
                                   seed=config.seed)  # fmt: skip
            if sampler.note:
                run.say(sampler.note)
        return Loader(data.train, c, sampler.size if sampler else batch_size, seed=config.seed,
                      device=run.device, rank=run.rank, world=run.world, sampler=sampler,
                      whole=data.train_whole)  # fmt: skip

    to_train = {arm: one for arm, one in students.items() if not run.has_student(arm)}
    of_labelled = loader(p_all, 0)
    loaders = {  # all of them before hours are spent on a teacher
        arm: loader(p_all if one.labelled else 0, one.unlabelled) for arm, one in to_train.items()
    }
    run.note(licence=data.licence, selection=data.selection, labelled=int(labelled.sum()),
             **data.notes)  # fmt: skip

    # ---- networks
    side = c.lr_input
    run.choose_precision(Recogniser(config.student, side, data.classes), side, batch_size)
    if config.teacher.weights and not config.student.weights:
        run.say(f"{config.student.name} starts from random numbers, the paper's from ImageNet's: "
                "--student.weights FILE")  # fmt: skip
    passes = sum(one.optim.epochs for one in to_train.values()  # maps are never kept
                 if weights(one) and not one.rho and not one.kappa)  # fmt: skip
    taught_by = teacher.get(run, config.teacher, c, data, loader=of_labelled, passes=passes)
    for one_loader in loaders.values():  # LR views that are kept are of all images
        one_loader.kept_low = of_labelled.kept_low
    of_embeddings: dict[str, Callable[..., Tensor]] = {
        "abs": absolute, "rel": functools.partial(relative, mode=config.relative_mode),
        "pkt": pkt, "darkrank": darkrank,
    }  # fmt: skip
    of_maps = {"hint": hint, "at": attention}
    for arm, wanted in to_train.items():
        torch.manual_seed(config.seed)  # every student starts from the same weights
        student = begin(run, wanted.student, side, data.classes)
        net = run.wrap(student)

        # ---- optimiser
        optimiser = optim.make(wanted.optim, [student])
        phase = run.phase(arm, {"student": student}, optimiser, loaders[arm], wanted.optim)
        pairs = p_all * each if wanted.labelled else 0  # images of a batch whose labels are used

        # ---- loop
        weight, zero = weights(wanted), torch.zeros((), device=run.device)
        for batch in phase:
            student.train()
            with run.autocast():
                f_s, maps_s = net(batch.x_l(), maps=True)
                if weight.keys() & of_maps.keys():
                    f_t, maps_t = taught_by.maps(batch)
                elif weight:
                    f_t, _ = taught_by.targets(batch)
            # triplets and pairs are of the global batch, the same on every rank
            e_s = F.normalize(run.gather_with_gradient(f_s.float()))
            e_t = F.normalize(run.gather(f_t)) if weight else e_s
            if wanted.student.head != "none":  # a comparison that holds L_ML equal
                ml = F.cross_entropy(student.logits(f_s, batch.y), batch.y) + student.penalty
            elif pairs:  # without their labels, the images behind the P x K ones are in no triplet
                ml = triplet(e_s[:pairs], run.gather(batch.y)[:pairs], wanted.student.margin)
            else:
                ml = zero
            sets = [(e_s, e_t)]
            if pairs and wanted.unlabelled:  # two mechanisms on two sets (Sec. 5.2)
                sets = [(e_s[:pairs], e_t[:pairs]), (e_s[pairs:], e_t[pairs:])]
            kd = {
                term: sum((of_embeddings[term](s, t) for s, t in sets), zero)
                for term in weight if term in of_embeddings
            }  # fmt: skip
            for term in (name for name in of_maps if name in weight):
                kd[term] = sum((of_maps[term](a, b) for a, b in stages(maps_s, maps_t).values()),
                               zero)  # fmt: skip
            loss = ml + sum(weight[term] * value for term, value in kd.items())
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            norm = optim.clip(optimiser, wanted.optim.clip)
            phase.log(batch, loss=loss, ml=ml, gradient=norm, **kd)
            optimiser.step()
            if data.selection != "test" and phase.due(batch):
                with run.autocast():
                    found = score(reader(student, c, data.task), data.selecting)
                phase.keep_best(student, found.headline, found.metrics)
        phase.finish(student, own=arm == OWN, task=data.task, classes=data.classes,
                     alignment=data.alignment)  # fmt: skip

    # ---- score
    if run.rank == 0:
        run.note(skipped=data.left_out())
        if data.left_out():
            run.say(f"{len(data.left_out())} images could not be decoded and were left out")
        kept = {"results": data.evaluations[config.score_on]}
        for name, test in data.tests() if config.score_on == "test" else kept.items():
            with run.autocast():
                rows = results.teacher_rows(taught_by, test, c) if config.score_teacher else {}
            rows |= {
                arm: results.student_row(run.place(load_student(run.folder, arm)), test)
                for arm in students
            }
            results.write(run.folder, rows, test, reference="alone", name=name, own=OWN)
            run.note(seconds=run.seconds())
            print(results.table(run.folder, name))
            if config.report and name == "results":
                report.write(run.folder)
    return run.folder


def load_student(run: str | Path, arm: str = OWN, *, best: bool = False) -> Student:
    """A run's student, ready for LR images at native size: see shared.models.recogniser.Student.

    run: the run's folder. arm: "rel" or another of Config.students. best: of the epoch with the
    best development score instead of the last. Raises ValueError where there is no such student.
    """
    config = cli.stored(Config, run)
    return load_trained(Path(run), config.student, config.data, arm, best=best)


def main() -> None:
    config = cli.parse(NAME, RECIPES, ABOUT, members)
    if config.count:
        print(sizes(config.count))
        return
    runs = members(config)
    if len(runs) > 1 and runs[0].folder:
        raise ValueError(f"--folder is for one run, this recipe has {len(runs)}: add --only K")
    if config.teacher.checkpoint and len({one.data.name for one in runs}) > 1:
        raise ValueError("--teacher.checkpoint: these runs have teachers of their own: add --only")
    folders = [train(one) for one in runs]
    if config.figure and int(os.environ.get("RANK", 0)) == 0:
        draw(config, folders)


if __name__ == "__main__":
    cli.guarded(main)

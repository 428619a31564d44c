"""Fine-tune the students of a run: Table VII, `python train.py table7 --start RUN --data.root DIR`.

"We finetune basic models on its training set and then evaluate": TinyFace's faces are natively
small, so there is no high resolution that a teacher could see, and nothing is distilled. Every
student of the run goes on from its backbone with L_cls alone, and is scored before and after.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F

from crrcd.config import NAME, Config, arms
from shared import cli, optim, report, results
from shared.config import locate
from shared.data.pipeline import Loader
from shared.data.protocols import check_alignment
from shared.data.sets import load
from shared.evaluate.score import embed, score
from shared.models.recogniser import Recogniser, Student, class_means, load_trained, reader
from shared.run import Run


def finetune(config: Config) -> Path:
    """Train the students of the run `config.start` on this data; returns the new run's folder.

    The new head starts from the mean embedding of each class. Raises ValueError for a run that is
    missing, unfinished, of objects, of other networks or sizes, or of faces cut out otherwise.
    """
    config, before = started(config)
    run = Run.start(NAME, config)
    c = config.data

    # ---- data
    data = run.in_turn(lambda: load(c, cache=locate(config.cache)))
    for known in before.values():
        check_alignment(known.alignment, data.evaluations["test"], c)
    loader = Loader(data.train, c, config.optim.batch, seed=config.seed, device=run.device,
                    rank=run.rank, world=run.world)  # fmt: skip
    run.note(licence=data.licence, selection=data.selection, **data.notes)

    # ---- networks
    probe = Recogniser(config.student, c.lr_input, data.classes)
    run.choose_precision(probe, c.lr_input, config.optim.batch)
    for arm in before:
        if run.has_student(arm):
            continue
        torch.manual_seed(config.seed)
        student = run.place(Recogniser(config.student, c.lr_input, data.classes))
        student.backbone.load_state_dict(before[arm].recogniser.backbone.state_dict())
        with run.autocast():
            e_s, _ = embed(reader(student, c, "faces"), data.train)
        class_means(student, [(e_s, data.train.labels)])
        net = run.wrap(student)

        # ---- optimiser
        optimiser = optim.make(config.optim, [student])
        phase = run.phase(arm, {"student": student}, optimiser, loader, config.optim)

        # ---- loop
        for batch in phase:
            student.train()
            with run.autocast():
                e_s = net(batch.x_l())
            cls = F.cross_entropy(student.logits(e_s, batch.y), batch.y)
            penalty = student.penalty
            loss = cls + penalty
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            norm = optim.clip(optimiser, config.optim.clip)
            phase.log(batch, loss=loss, cls=cls, penalty=penalty, gradient=norm)
            optimiser.step()
            if phase.due(batch) and data.selection != "test":  # 153,428 distractors take too long
                with run.autocast():
                    found = score(reader(student, c, "faces"), data.evaluations[data.selection])
                phase.keep_best(student, found.headline, found.metrics)
        phase.finish(student, task="faces", classes=data.classes, alignment=data.alignment)

    # ---- score
    if run.rank == 0:
        run.note(skipped=data.left_out())
        after = {arm: load_trained(run.folder, config.student, c, arm) for arm in before}
        for name, test in data.tests():
            students = {f"{arm}, before": s for arm, s in before.items()} | after
            rows = {row: results.student_row(run.place(s), test) for row, s in students.items()}
            results.write(run.folder, rows, test, reference="alone", name=name)
            run.note(seconds=run.seconds())
            print(results.table(run.folder, name, details=True))
            if config.report and name == "results":
                report.write(run.folder)
    return run.folder


def started(config: Config) -> tuple[Config, dict[str, Student]]:
    """The configuration for the students of the run `config.start`, and these, all of them."""
    start = Path(config.start).expanduser()
    start = (start if start.is_dir() else locate(config.start)).resolve()
    if not start.is_dir():
        raise ValueError(f"--start {config.start}: no such run; name the folder of a finished one")
    its = cli.stored(Config, start)
    files = {arm: start / "students" / f"{arm}.safetensors" for arm in arms(its)}
    if gone := [arm for arm, path in files.items() if not path.is_file()]:
        raise ValueError(
            f"--start {start}: unfinished, without its student {', '.join(gone)}; go on with "
            f"--resume {start}"
        )
    ours = _seen(config)
    if other := [f"{k} {v}" for k, v in _seen(its).items() if v != ours[k]]:
        raise ValueError(f"--start {start}: trained with {', '.join(other)}; give the same here")
    students = {arm: load_trained(start, its.student, its.data, arm) for arm in files}
    if any(student.task != "faces" for student in students.values()):
        raise ValueError(f"--start {start}: a run of objects; only faces are fine-tuned")
    return replace(config, start=str(start), baselines=its.baselines), students


def _seen(config: Config) -> dict[str, object]:
    """What a backbone fits to, by flag."""
    c, s = config.data, config.student
    mean, std = (" ".join(map(str, values)) for values in (c.mean, c.std))
    return {"--student.name": s.name, "--student.input": s.input, "--data.lr": c.lr,
            "--data.mean": mean, "--data.std": std}  # fmt: skip

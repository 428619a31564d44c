"""Many training runs, some at a time, each in a process of its own; knows no paper.

    failed = run_jobs([Job("16px/crrcd/seed-3", crrcd.train.train, config, taught="3")], workers=2)

A call that was killed or interrupted, or that left failed runs, is simply made again: finished runs
stay as they are, half-finished ones go on from their last checkpoint, failed ones are tried again.

What a run prints goes to <its folder>.log; why it failed, or that it has not come to its end, is in
failed.txt of its folder. A lock there keeps a second process from writing into it. SIGTERM and
Ctrl-C make the runs save before they end; they also do when the calling process is killed.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from multiprocessing import resource_tracker
from multiprocessing.connection import wait
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from types import FrameType
from typing import Any

from tqdm import tqdm

from shared import cli
from shared.config import to_dict
from shared.data.kept import locked
from shared.files import write_text

# Imported once; every job begins as a fork of the process that has them.
PRELOAD = ("torch", "torchvision", "numpy", "shared.run", "shared.teacher", "shared.results",
           "shared.report")  # fmt: skip
_STOPPING = (signal.SIGINT, signal.SIGTERM)
# say where, not what
_APART = ("--resume", "--folder", "--runs", "--cache", "--trunk-run", "--assistant-run")
OPEN = "has not come to its end"
# By these a run knows what was done.
_DONE = ("results*.json", "config.json", "*.ckpt", "metrics.jsonl", "student.safetensors",
         "students/*.safetensors")  # fmt: skip


@dataclass(frozen=True)
class Job:
    """One training run."""

    name: str  # what is shown, and its folder below the comparison's: 16px/crrcd/seed-3
    train: Callable[[Any], Path]  # a function of a module: a paper's train
    config: Any  # a paper's Config, complete: with folder, seed and cache
    taught: str  # jobs of the same `taught` share a teacher
    cost: float = 1.0  # expected time, relative to other jobs

    @property
    def folder(self) -> Path:
        return Path(self.config.folder).expanduser().resolve()

    def finished(self) -> bool:
        """A run with several tables is killed between them: failed.txt stands until the last."""
        results, failed = self.folder / "results.json", self.folder / "failed.txt"
        return results.is_file() and not failed.exists()


@dataclass(frozen=True)
class _Running:
    job: Job
    process: ForkServerProcess
    began: float  # time.monotonic()
    whole: bool  # not the rest of a run that was interrupted


def run_jobs(
    jobs: Sequence[Job], *, workers: int, preload: Sequence[str] = (), later: float = 0.0
) -> dict[str, str]:
    """Run what is not finished, `workers` at a time; returns the reason of every job that failed.

    preload: modules to import once, beside PRELOAD and those of the jobs' functions. later: cost of
    what the caller will run after these, for the time that is left.

    Raises ValueError, before anything runs, where a job's folder holds a run of another
    configuration. SIGTERM and Ctrl-C: the runs save, then SystemExit with code 143 or 130; a second
    one ends them at once.
    """
    for job in jobs:
        _check(job)
    waiting = [job for job in jobs if not job.finished()]
    made = {job.taught for job in jobs if job.finished()}
    running: list[_Running] = []
    failed: dict[str, str] = {}
    stopped: list[int] = []
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*PRELOAD, *preload, *{job.train.__module__ for job in waiting}])
    resource_tracker.ensure_running()  # its start would unblock what is blocked below
    progress = _Progress(jobs, waiting, workers, later)

    def stop(number: int, frame: FrameType | None) -> None:
        for one in running:
            one.process.kill() if stopped else one.process.terminate()
        stopped.append(number)

    with _handling(stop), progress.bar:
        try:
            while running or (waiting and not stopped):
                while waiting and len(running) < workers and not stopped:
                    job = _next(waiting, {one.job.taught for one in running} - made)
                    waiting.remove(job)
                    job.folder.mkdir(parents=True, exist_ok=True)
                    whole = not (job.folder / "config.json").exists()
                    process = context.Process(target=_child, args=(job,), name=job.name)
                    # the process that forks, too, is not to hear of Ctrl-C: `_child` unblocks it
                    with _blocked():
                        process.start()
                        running.append(_Running(job, process, time.monotonic(), whole))
                    if stopped:  # by another thread's ears, before `running` had it
                        process.terminate()
                wait([one.process.sentinel for one in running], timeout=0.5)
                for one in [one for one in running if not one.process.is_alive()]:
                    running.remove(one)
                    if stopped:
                        continue
                    reason = _reason(one.job, one.process.exitcode)
                    if reason:
                        failed[one.job.name] = reason
                    else:
                        made.add(one.job.taught)
                    progress.ended(one, reason, waiting, running)
                progress.show(waiting, running, stopping=bool(stopped))
        finally:
            for one in running:
                one.process.terminate()
    if stopped:
        done = sum(job.finished() for job in jobs)
        print(f"stopped, {done} of {len(jobs)} runs are finished; the same command goes on",
              file=sys.stderr)  # fmt: skip
        raise SystemExit(128 + stopped[0])
    return failed


def _next(waiting: Sequence[Job], making: Collection[str]) -> Job:
    """The first one that need not wait for a teacher which another job is making, if there is."""
    return next((job for job in waiting if job.taught not in making), waiting[0])


def _check(job: Job) -> None:
    """Raises ValueError where the folder holds another run, or one whose record is not readable."""
    if not job.config.folder:
        raise ValueError(f"{job.name}: its configuration names no folder")
    path, results = job.folder / "config.json", job.folder / "results.json"
    if not (path.exists() or results.exists()):
        return
    way_out = f"remove {job.folder} or give another --folder"
    try:
        there = _flat(to_dict(cli.stored(type(job.config), job.folder)))
    except ValueError as error:
        raise ValueError(f"{job.name}: {error}; {way_out}") from None
    except (AttributeError, KeyError, TypeError):
        raise ValueError(f"{job.name}: {path} is no record of a run; {way_out}") from None
    for flag, value in _flat(to_dict(job.config)).items():
        if flag not in _APART and there[flag] != value:
            raise ValueError(
                f"{job.name}: {flag} is {there[flag]!r} in {path} and {value!r} now; {way_out}"
            )


def _flat(values: dict[str, Any], prefix: str = "--") -> dict[str, Any]:
    """Values by the names of their flags."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        flag = prefix + name.replace("_", "-")
        found |= _flat(value, f"{flag}.") if isinstance(value, dict) else {flag: value}
    return found


def _reason(job: Job, code: int | None) -> str:
    """Why a job that ended with this exit code failed; empty if it did not. Kept in failed.txt."""
    path = job.folder / "failed.txt"
    if code == 0 and job.finished():
        return ""
    told = path.read_text().strip() if path.is_file() else ""
    if code == 1 and told not in ("", OPEN):
        return told
    log = _log(job.folder)
    if code == 0:
        reason = f"ended without results.json; see {log}"
    elif code is not None and code < 0:
        reason = f"killed by signal {-code}" + (", perhaps out of memory" if code == -9 else "")
    else:
        reason = f"ended with code {code}; see {log}"
    with contextlib.suppress(OSError):  # a full disk: it is said all the same
        write_text(path, reason + "\n")
    return reason


def _log(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.log")


# -- in the process of a job ----------------------------------------------------------------------


def _child(job: Job) -> None:
    log = os.open(_log(job.folder), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    for stream in (1, 2):
        os.dup2(log, stream)
    os.close(log)
    threading.Thread(target=_follow_parent, daemon=True).start()
    for number in _STOPPING:  # outside of loops over batches, where shared.phase has its own
        signal.signal(number, _leave)
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOPPING)
        with locked(job.folder, lambda line: print(line, file=sys.stderr)):
            _train(job)
    except Exception as error:
        traceback.print_exc()
        text = " ".join(str(error).split())
        kind = type(error).__name__
        plain = isinstance(error, ValueError) and text
        reason = text if plain else f"{kind}: {text}"
        write_text(job.folder / "failed.txt", reason + "\n")
        raise SystemExit(1) from None


def _train(job: Job) -> None:
    """Under the folder's lock; another call may have worked there in the meantime."""
    _check(job)
    if job.finished():
        return
    write_text(job.folder / "failed.txt", OPEN + "\n")
    if not (job.folder / "config.json").exists():
        for pattern in _DONE:  # without its config.json nobody knows whose they are
            for path in job.folder.glob(pattern):
                path.unlink()
        job.train(job.config)
    else:
        job.train(replace(job.config, resume=str(job.folder)))
    (job.folder / "failed.txt").unlink()


def _leave(number: int, frame: FrameType | None) -> None:
    for one in _STOPPING:  # one is enough: what is open is being closed
        signal.signal(one, signal.SIG_IGN)
    raise SystemExit(128 + number)


def _follow_parent() -> None:
    """When the calling process is gone, end as by SIGTERM."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)


# -- in the calling process -----------------------------------------------------------------------


class _Progress:
    """A line for every job that ends and, on a terminal, a bar over the jobs' costs."""

    def __init__(
        self, jobs: Sequence[Job], waiting: Sequence[Job], workers: int, later: float = 0.0
    ) -> None:
        self.count, self.workers, self.later = len(jobs), workers, later
        self.done = len(jobs) - len(waiting)
        self.seconds = self.cost = 0.0  # of the jobs that ran from beginning to end in this call
        total = sum(job.cost for job in jobs)
        self.bar = tqdm(
            total=total, initial=total - sum(job.cost for job in waiting), leave=False,
            bar_format="{percentage:3.0f}%|{bar}| {elapsed}{postfix}", file=sys.stderr,
            disable=not sys.stderr.isatty(),
        )  # fmt: skip

    def ended(
        self, one: _Running, reason: str, waiting: Sequence[Job], running: Collection[_Running]
    ) -> None:
        seconds = time.monotonic() - one.began
        self.done += 1
        if one.whole and not reason:
            self.seconds, self.cost = self.seconds + seconds, self.cost + one.job.cost
        what = f"failed: {reason}" if reason else f"{seconds:.0f} s"
        left = self._left(waiting, running) if waiting or running else ""
        tqdm.write(f"[{self.done}/{self.count}] {one.job.name} {what}{left}", file=sys.stderr)
        self.bar.update(one.job.cost)

    def show(
        self, waiting: Sequence[Job], running: Collection[_Running], *, stopping: bool
    ) -> None:
        names = ", ".join(one.job.name for one in running)
        left = "saving" if stopping else self._left(waiting, running).removeprefix(", ")
        self.bar.set_postfix_str(", ".join(filter(None, (left, names))))

    def _left(self, waiting: Sequence[Job], running: Collection[_Running]) -> str:
        """By the seconds that a unit of cost took so far."""
        if not self.cost:
            return ""
        pace, now = self.seconds / self.cost, time.monotonic()
        left = pace * (self.later + sum(job.cost for job in waiting))
        left += sum(max(0.0, pace * one.job.cost - (now - one.began)) for one in running)
        return f", {timedelta(seconds=round(left / self.workers))} left"


@contextlib.contextmanager
def _handling(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    before: dict[signal.Signals, Any] = {}
    with contextlib.suppress(ValueError):  # not the main thread: leave signals alone
        for number in _STOPPING:
            before[number] = signal.signal(number, handler)
    try:
        yield
    finally:
        for number, was in before.items():
            signal.signal(number, was)


@contextlib.contextmanager
def _blocked() -> Iterator[None]:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _STOPPING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)

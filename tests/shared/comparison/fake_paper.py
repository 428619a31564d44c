"""A paper whose training is a chain of hashes: a step needs all before it and takes no time."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

from shared import config as shared_config
from shared.comparison import jobs
from shared.comparison.jobs import Job
from shared.config import SCHEMA, Optim
from shared.files import write_text
from shared.run import Run


@dataclass(frozen=True)
class Config(shared_config.Run):
    optim: Optim = field(default_factory=Optim)
    steps: int = 5
    pause: float = 0.0  # seconds a step
    trace: str = ""  # a file of lines "<run> <pid> <what>"
    fault: str = ""  # a file that says what goes wrong; none: nothing


def train(config: Config) -> Path:
    run = Run.start("fake", config)
    note(config, "began")
    kept, value, step = run.folder / "last.ckpt", "", 0
    if kept.is_file():
        value, step = json.loads(kept.read_text())
    for now in range(step, config.steps):
        time.sleep(config.pause)
        value = hashlib.sha256(f"{value} {config.seed} {now}".encode()).hexdigest()
        write_text(kept, json.dumps([value, now + 1]))
        note(config, f"step-{now}")
        if now == 2:
            go_wrong(config)
    write_text(run.folder / "results.json", json.dumps({"schema": SCHEMA, "value": value}))
    if Path(config.fault).is_file() and Path(config.fault).read_text() == "late":
        os.kill(os.getpid(), signal.SIGKILL)
    write_text(run.folder / "results-more.json", json.dumps({"schema": SCHEMA, "value": value}))
    note(config, "ended")
    return run.folder


def go_wrong(config: Config) -> None:
    fault = Path(config.fault).read_text() if Path(config.fault).is_file() else ""
    if fault == "ValueError":
        raise ValueError("loss is not finite at step 2;\n try a lower --optim.lr")
    if fault == "KeyError":
        raise KeyError("left")
    if fault == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if fault == "exit":
        sys.exit(3)


def no_results(config: Config) -> Path:
    return Run.start("fake", config).folder


def note(config: Config, what: str) -> None:
    name = "/".join(Path(config.resume or config.folder).parts[-2:])
    with open(config.trace, "a") as file:
        file.write(f"{name} {os.getpid()} {what}\n")


def make(folder: Path, trace: Path, seeds: int = 2, **changes: object) -> list[Job]:
    """Seed by seed, three jobs of each."""
    base = replace(Config(precision="fp32", threads=1, trace=str(trace)), **changes)  # type: ignore[arg-type]
    return [
        Job(
            f"{name}/seed-{seed}", train,
            replace(base, seed=seed, folder=str(folder / name / f"seed-{seed}")), f"seed {seed}",
        )
        for seed in range(seeds) for name in ("a", "b", "c")
    ]  # fmt: skip


def main() -> None:
    """Six jobs in a process of its own: FOLDER TRACE WORKERS."""
    folder, trace, workers = sys.argv[1:]
    jobs.PRELOAD = ("torchvision", "tests.shared.comparison.fake_paper")
    print(jobs.run_jobs(make(Path(folder), Path(trace), pause=0.1), workers=int(workers)))

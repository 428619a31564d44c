"""A run that is killed, interrupted, broken or shared by two ranks."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from crrcd.config import Config
from crrcd.train import load_student, train
from shared.config import to_dict
from shared.data.pipeline import Loader, Resident
from shared.files import write_bytes, write_checkpoint
from shared.models.recogniser import Recogniser
from shared.phase import Phase
from shared.run import Run
from tests.conftest import ROOT, python
from tests.forked import forked

# A run of train() in a process of its own that ends itself by a signal at step STEP of phase ARM.
KILLED = """
import dataclasses, json, os, signal, sys
from shared.models.recogniser import Recogniser
from shared.phase import Phase
from shared.run import Run
from shared.config import from_dict
from crrcd.config import Config
from crrcd.train import train
config = from_dict(Config, json.loads(sys.argv[1]))
arm, step, number = sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
log = Phase.log
def noted(self, batch, **terms):
    if self.name == arm and self.step == step:
        os.kill(os.getpid(), number)
    return log(self, batch, **terms)
Phase.log = noted
train(config)
"""


def run_until(config: Config, arm: str, step: int, number: int) -> subprocess.CompletedProcess:
    return forked("-c", KILLED, json.dumps(to_dict(config)), arm, str(step), str(number))


def outcome(run: Path) -> dict:
    """Everything a run decides: weights, metrics, results; not the time it took."""
    students = [*sorted((run / "students").glob("*.safetensors")), run / "student.safetensors"]
    weights = {p.name: {k: v.numpy().tobytes() for k, v in load_file(p).items()} for p in students}
    return {
        "weights": weights,
        "metrics": [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()],
        "results": json.loads((run / "results.json").read_text()),
    }


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
    """A run that nothing disturbed."""
    from tests.conftest import tiny

    torch.set_num_threads(1)
    return train(tiny(tmp_path_factory.mktemp("whole"), cache))


SAMPLE = random.Random(20261122)


@pytest.mark.parametrize(
    ("arm", "step", "seconds"),
    [("alone", SAMPLE.randrange(1, 16), 0.0), ("crrcd", SAMPLE.randrange(1, 16), 0.0),
     ("crrcd", SAMPLE.randrange(8, 16), 0.15)],
)  # fmt: skip
def test_resume_after_kill_9_is_bit_exact(
    make_config, whole: Path, arm: str, step: int, seconds: float
) -> None:
    """Checkpoints at every step, and at whatever step 0.15 s had passed."""
    config = make_config(checkpoint_seconds=seconds)
    done = run_until(config, arm, step, signal.SIGKILL)
    assert done.returncode == -signal.SIGKILL, done.stderr
    (run,) = Path(config.runs).glob("crrcd/*")
    assert not (run / "results.json").exists()
    train(replace(config, resume=str(run)))
    assert outcome(run) == outcome(whole)


def test_resume_of_a_teacher_killed_in_training_is_bit_exact(
    make_config, whole: Path, tmp_path: Path
) -> None:
    config = make_config(checkpoint_seconds=0.0, cache=str(tmp_path / "cache"))
    done = run_until(config, "teacher", 3, signal.SIGKILL)
    assert done.returncode == -signal.SIGKILL, done.stderr
    (run,) = Path(config.runs).glob("crrcd/*")
    train(replace(config, resume=str(run)))
    assert outcome(run) == outcome(whole)


def test_a_resumed_run_ends_in_its_report_and_keeps_its_first_record(make_config) -> None:
    config = make_config(checkpoint_seconds=0.0, report=True)
    run_until(config, "crrcd", 3, signal.SIGKILL)
    (run,) = Path(config.runs).glob("crrcd/*")
    before = json.loads((run / "config.json").read_text())
    train(replace(config, resume=str(run)))
    after = json.loads((run / "config.json").read_text())
    assert (run / "report.html").is_file() and len(after["resumed"]) == 1
    first, steps = before.pop("steps"), after.pop("steps")
    assert all(after[key] == value for key, value in before.items())
    assert steps["alone"] == first["alone"]  # of the process that did it
    assert "crrcd" not in first and steps["crrcd"]["count"] == 16


@pytest.mark.parametrize("stop", [0, 6])
def test_a_phase_keeps_its_steps_and_their_median_time(make_config, stop: int) -> None:
    """20 ms a step, half of them while the batch is loaded; not the scores, nor the checkpoints.

    stop: the run was interrupted there, and the median is that of the steps done since.
    """
    config = make_config(checkpoint_seconds=0.0)
    run = Run.start("crrcd", config)
    run.note(steps={"alone": {"count": 5, "median_ms": 1.5}})
    images = Resident(np.zeros((64, 3, 64, 64), np.uint8), np.arange(64) % 8)
    model = torch.nn.Linear(1, 1)

    class Slow(Loader):
        def epoch(self, epoch: int, start: int = 0):
            for batch in super().epoch(epoch, start):
                time.sleep(0.01)
                yield batch

    def phase(run: Run, pause: float, until: int) -> None:
        loader = Slow(images, config.data, 16, seed=0, device=run.device)
        for batch in (found := run.phase(
            "crrcd", {"model": model}, torch.optim.SGD(model.parameters(), 0.1), loader,
            config.optim,
        )):  # fmt: skip
            time.sleep(pause + 0.5 * batch.last)  # a score at the end of an epoch of 4 steps
            if found.step + 1 == until:
                found.step += 1
                found.save()
                return

    if stop:
        phase(run, 0.2, stop)
        assert "crrcd" not in json.loads((run.folder / "config.json").read_text())["steps"]
        run = Run.start("crrcd", replace(config, resume=str(run.folder)))
    phase(run, 0.01, 0)
    steps = json.loads((run.folder / "config.json").read_text())["steps"]
    assert steps["alone"] == {"count": 5, "median_ms": 1.5} and steps["crrcd"]["count"] == 16
    assert 20 <= steps["crrcd"]["median_ms"] < 200


def test_a_precision_settled_after_a_resume_is_recorded_and_kept(make_config) -> None:
    """Killed before the probe, a run's record still says auto: the resumed one settles it."""
    config = make_config(precision="auto", checkpoint_seconds=0.0)
    run = Run.start("crrcd", config)  # as far as a run killed at once gets
    assert json.loads((run.folder / "config.json").read_text())["precision"] == "auto"
    again = Run.start("crrcd", replace(config, resume=str(run.folder)))
    again.choose_precision(Recogniser(config.student, 16, 8), 16, 16)
    record = json.loads((run.folder / "config.json").read_text())
    assert record["precision"] == again.precision in ("fp32", "bf16")
    third = Run.start("crrcd", replace(config, resume=str(run.folder)))
    assert third.precision == again.precision


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_first_and_says_how_to_go_on(make_config, whole: Path, number: int) -> None:
    config = make_config(checkpoint_seconds=1e9)
    done = run_until(config, "crrcd", 5, number)
    (run,) = Path(config.runs).glob("crrcd/*")
    assert done.returncode == 128 + number
    assert f"--resume {run}" in done.stderr
    state = torch.load(run / "last.ckpt", weights_only=True)
    assert (state["phase"], state["step"]) == ("crrcd", 6)  # the step in progress was finished
    train(replace(config, resume=str(run)))
    assert outcome(run) == outcome(whole)


def test_resuming_a_finished_run_changes_nothing(make_config, whole: Path) -> None:
    before = outcome(whole)
    train(make_config(resume=str(whole)))
    assert outcome(whole) == before


def test_a_loss_that_is_not_finite_stops_the_run(make_config, monkeypatch) -> None:
    """Step, term and indices are named, and the last good checkpoint stands."""
    config = make_config(checkpoint_seconds=0.0)
    log = Phase.log

    def poisoned(self, batch, **terms):
        if self.name == "crrcd" and self.step == 7:
            terms["rcd"] = terms["rcd"] * float("nan")
        return log(self, batch, **terms)

    monkeypatch.setattr(Phase, "log", poisoned)
    with pytest.raises(ValueError) as error:
        train(config)
    (run,) = Path(config.runs).glob("crrcd/*")
    line = str(error.value)
    assert "rcd is not finite at step 7" in line and str(run / "last.ckpt") in line
    batch = json.loads(line[line.index("indices ") + 8 : line.index("])") + 1])
    assert len(batch) == config.optim.batch and len(set(batch)) == len(batch)
    state = torch.load(run / "last.ckpt", weights_only=True)
    assert state["step"] == 7
    tensors = [t for m in state["modules"].values() for t in m.values() if t.is_floating_point()]
    assert all(torch.isfinite(t).all() for t in tensors)


def test_a_gradient_that_is_not_finite_stops_the_run(make_config, monkeypatch) -> None:
    import shared.losses

    def inf_gradient(z_s, z_t, temperature):
        loss = shared.losses.kd(z_s, z_t, temperature)
        return loss + torch.sqrt((z_s - z_s.detach()).square().sum())  # value 0, gradient NaN

    monkeypatch.setattr("crrcd.train.kd", inf_gradient)
    with pytest.raises(ValueError, match="gradient is not finite at step 0"):
        train(make_config())


def test_a_full_disk_leaves_the_last_good_checkpoint(tmp_path: Path) -> None:
    """A limit on file size stands in for a full disk: a short write, then a system error."""
    script = textwrap.dedent(
        """
        import resource, signal, sys, torch
        from pathlib import Path
        from shared.files import write_checkpoint
        path = Path(sys.argv[1])
        write_checkpoint(path, {"schema": 1, "x": torch.ones(8)})
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        try:
            write_checkpoint(path, {"schema": 1, "x": torch.ones(1 << 16)})
        except OSError as error:
            print(error)
        """
    )
    path = tmp_path / "last.ckpt"
    done = forked("-c", script, str(path))
    assert done.stdout.count("\n") == 1 and str(path) in done.stdout, done
    assert "the last good one stands" in done.stdout
    assert torch.load(path, weights_only=True)["x"].shape == (8,)
    assert [p.name for p in tmp_path.iterdir()] == ["last.ckpt"]


def test_write_is_whole_or_not_at_all(tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "file"
    write_bytes(path, b"old")

    def broken(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", broken)
    with pytest.raises(OSError, match="No space left on device"):
        write_bytes(path, b"new")
    assert path.read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("damage", ["schema", "truncated", "architecture"])
def test_a_checkpoint_that_does_not_fit_is_refused(make_config, damage: str) -> None:
    config = make_config(checkpoint_seconds=0.0)
    run_until(config, "crrcd", 4, signal.SIGKILL)
    (run,) = Path(config.runs).glob("crrcd/*")
    path = run / "last.ckpt"
    state = torch.load(path, weights_only=True)
    if damage == "schema":
        write_checkpoint(path, state | {"schema": 99})
    elif damage == "truncated":
        path.write_bytes(path.read_bytes()[:5000])
    else:
        student = state["modules"]["student"]
        student["backbone.linear.weight"] = student["backbone.linear.weight"][:, :7].clone()
        write_checkpoint(path, state)
    expected = {
        "schema": "checkpoint of schema 99, this code reads 1",
        "truncated": "not a readable checkpoint",
        "architecture": "a checkpoint of another architecture",
    }
    with pytest.raises(ValueError, match=expected[damage]) as error:
        train(replace(config, resume=str(run)))
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_checkpoint_seconds_never_change_the_result(make_config, whole: Path) -> None:
    assert outcome(train(make_config(checkpoint_seconds=0.0))) == outcome(whole)


def test_bf16_resumes_bit_exact_too(make_config) -> None:
    config = make_config(checkpoint_seconds=0.0, precision="bf16")
    run = train(config)
    expected = outcome(run)
    again = replace(config, runs=config.runs + "-again")
    run_until(again, "crrcd", 9, signal.SIGKILL)
    (killed,) = Path(again.runs).glob("crrcd/*")
    train(replace(again, resume=str(killed)))
    assert outcome(killed) == expected


def test_precision_auto_measures_and_records(make_config) -> None:
    run = train(make_config(precision="auto"))
    record = json.loads((run / "config.json").read_text())
    assert record["precision"] in ("fp32", "bf16") and record["config"]["precision"] == "auto"


def test_run_folder_holds_what_a_run_is_known_by(whole: Path) -> None:
    record = json.loads((whole / "config.json").read_text())
    assert {"schema", "paper", "config", "versions", "git", "machine", "licence"} <= set(record)
    assert (whole / "best.ckpt").exists() and (whole / "last.ckpt").exists()
    best = torch.load(whole / "best.ckpt", weights_only=True)
    kept = load_file(whole / "students" / "crrcd-best.safetensors")
    assert all(torch.equal(best["state"][k], v) for k, v in kept.items())


def test_load_student_takes_lr_images_at_native_size(whole: Path) -> None:
    student = load_student(whole)
    x = torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8)
    with torch.inference_mode():
        from_bytes, from_floats = student(x), student(x.float() / 255)
    assert from_bytes.shape == (3, 128) and torch.equal(from_bytes, from_floats)
    with pytest.raises(ValueError, match="no student 'none'"):
        load_student(whole, "none")


def test_a_batch_that_ranks_cannot_share_is_refused(make_config) -> None:
    images = Resident(np.zeros((20, 3, 64, 64), np.uint8), np.arange(20))
    with pytest.raises(ValueError, match="a batch of 15 cannot be shared by 2 ranks"):
        Loader(images, make_config().data, 15, seed=0, device=torch.device("cpu"), world=2)


def test_progress_is_plain_lines_without_a_terminal_and_a_bar_on_one(make_config) -> None:
    import fcntl
    import pty
    import struct
    import termios

    config = make_config()
    plain = run_until(config, "none", 0, 0)
    assert plain.returncode == 0, plain.stderr
    assert "img/s" in plain.stderr and "left" in plain.stderr and "\r" not in plain.stderr
    assert "minus alone" in plain.stdout  # the table
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 120, 0, 0))
    other = replace(config, runs=config.runs + "-tty")
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, json.dumps(to_dict(other)), "none", "0", "0"],
        cwd=ROOT, stderr=follower, stdout=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    os.close(follower)
    seen, end = b"", time.monotonic() + 120
    while time.monotonic() < end:
        try:
            part = os.read(leader, 65536)
        except OSError:  # the other end closed
            break
        if not part:
            break
        seen += part
    assert process.wait(60) == 0
    assert b"\r" in seen and b"img/s" in seen and b"step/s" in seen


def test_tensorboard_events_hold_the_metrics(make_config) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run = train(make_config(tensorboard=True))
    events = accumulator.EventAccumulator(str(run / "events" / "crrcd"))
    events.Reload()
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    expected = [(x["step"], x["rcd"]) for x in lines if x["phase"] == "crrcd" and "rcd" in x]
    found = [(e.step, e.value) for e in events.Scalars("rcd")]
    assert found == [(s, pytest.approx(v, rel=1e-6)) for s, v in expected]


def test_the_default_run_works_where_bf16_is_slow(tmp_path: Path, cache: Path) -> None:
    """With AVX2 only, bf16 is emulated: the timed steps must say so, and the faster one is used."""
    done = python(
        "-m", "crrcd.train", "smoke", "--runs", str(tmp_path), "--cache", str(cache),
        "--optim.epochs", "2", "--baselines", "alone", "--no-report",
        ONEDNN_MAX_CPU_ISA="AVX2",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = re.search(r"precision: (\w+) \(.*fp32 ([\d.]+) ms, bf16 ([\d.]+) ms\)", done.stderr)
    assert found is not None
    assert found[1] == ("fp32" if float(found[2]) <= float(found[3]) else "bf16")
    (run,) = tmp_path.glob("crrcd/*")
    assert json.loads((run / "config.json").read_text())["precision"] == found[1]

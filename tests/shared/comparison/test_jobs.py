"""Many runs: what is finished stays, what broke is told, and a killed call is simply made again."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file

from shared.comparison import jobs
from shared.comparison.jobs import Job, run_jobs
from shared.config import to_dict
from tests.conftest import ROOT
from tests.shared.comparison import fake_paper as fake


@pytest.fixture(autouse=True)
def _light(monkeypatch) -> None:
    """Without what only real runs need."""
    monkeypatch.setattr(jobs, "PRELOAD", ("torchvision",))


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    return tmp_path / "trace"


def lines(trace: Path) -> list[list[str]]:
    """[run, process, what] in the order in which it happened."""
    return [line.split() for line in trace.read_text().splitlines()] if trace.is_file() else []


def happened(trace: Path, what: str) -> list[str]:
    return [run for run, _, found in lines(trace) if found == what]


def results(folder: Path) -> dict[str, str]:
    """What every run ended in."""
    paths = sorted(folder.rglob("results*.json"))
    return {str(p.relative_to(folder)): json.loads(p.read_text())["value"] for p in paths}


@pytest.fixture
def script(trace: Path) -> Iterator[Callable[[Path], subprocess.Popen]]:
    """Starts a process group of its own that runs six jobs, two at a time."""
    started = []

    def start(folder: Path) -> subprocess.Popen:
        call = "from tests.shared.comparison.fake_paper import main; main()"
        process = subprocess.Popen(
            [sys.executable, "-c", call, str(folder), str(trace), "2"],
            cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip
        started.append(process)
        return process

    yield start
    for process in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def until(condition, seconds: float = 600) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)


def alive(trace: Path) -> list[str]:
    """Processes of jobs that have not ended; one that nobody waited for does not count."""
    found = []
    for pid in {pid for _, pid, _ in lines(trace)}:
        path = Path(f"/proc/{pid}/stat")
        if path.exists() and path.read_text().rsplit(")", 1)[1].split()[0] != "Z":
            found.append(pid)
    return found


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> dict[str, str]:
    """The results of the six jobs, trained here one after the other."""
    folder = tmp_path_factory.mktemp("whole")
    for job in fake.make(folder / "runs", folder / "trace"):
        job.train(job.config)
    return results(folder / "runs")


def test_what_is_finished_stays_and_the_rest_is_trained(tmp_path: Path, trace: Path, whole) -> None:
    made = fake.make(tmp_path / "runs", trace)
    assert run_jobs(made[:2], workers=2) == {}
    before = [(job.folder / "results.json").stat() for job in made[:2]]
    assert run_jobs(made, workers=2) == {}
    assert [(job.folder / "results.json").stat() for job in made[:2]] == before
    assert sorted(happened(trace, "began")) == sorted(job.name for job in made)
    assert results(tmp_path / "runs") == whole
    assert not list(tmp_path.rglob("failed.txt"))
    assert "fake" in (tmp_path / "runs/a/seed-0.log").read_text()  # what Run.start says


@pytest.mark.parametrize(
    ("fault", "reason"),
    [("ValueError", r"loss is not finite at step 2; try a lower --optim\.lr"),
     ("KeyError", "KeyError: 'left'"),
     ("killed", "killed by signal 9, perhaps out of memory"),
     ("exit", r"ended with code 3; see \S+/b/seed-0\.log"),
     ("late", "killed by signal 9, perhaps out of memory")],
)  # fmt: skip
def test_one_that_fails_tells_why_and_the_rest_stands(
    tmp_path: Path, trace: Path, whole, fault: str, reason: str
) -> None:
    """late: killed after its first table."""
    path = tmp_path / "fault"
    path.write_text(fault)
    made = fake.make(tmp_path / "runs", trace, seeds=1)
    made[1] = replace(made[1], config=replace(made[1].config, fault=str(path)))
    failed = run_jobs(made, workers=1)
    assert list(failed) == ["b/seed-0"] and re.fullmatch(reason, failed["b/seed-0"])
    assert (tmp_path / "runs/b/seed-0/failed.txt").read_text() == failed["b/seed-0"] + "\n"
    assert sorted(happened(trace, "ended")) == ["a/seed-0", "c/seed-0"]
    log = (tmp_path / "runs/b/seed-0.log").read_text()
    assert ("Traceback" in log) == (fault in ("ValueError", "KeyError"))
    path.unlink()  # it is tried again, from where it stopped, and the others are not
    assert run_jobs(made, workers=1) == {}
    assert results(tmp_path / "runs") == {k: v for k, v in whole.items() if "seed-0" in k}
    assert happened(trace, "began").count("b/seed-0") == 2
    assert all(happened(trace, f"step-{k}").count("b/seed-0") == 1 for k in range(5))
    assert len(happened(trace, "ended")) == 3 and not list(tmp_path.rglob("failed.txt"))


def test_one_that_leaves_no_results_has_failed(tmp_path: Path, trace: Path) -> None:
    (job, *_) = fake.make(tmp_path / "runs", trace)
    failed = run_jobs([replace(job, train=fake.no_results)], workers=1)
    assert failed[job.name].startswith("ended without results.json; see ")


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize(
    ("change", "told"),
    [({"steps": 6}, "--steps is 5 in {} and 6 now"),
     ({"seed": 7}, "--seed is 0 in {} and 7 now"),
     ({"lr": 0.5}, "--optim.lr is 0.1 in {} and 0.5 now")],
)  # fmt: skip
def test_another_configuration_is_refused_by_name_before_anything_runs(
    tmp_path: Path, trace: Path, finished: bool, change: dict, told: str
) -> None:
    made = fake.make(tmp_path / "runs", trace, seeds=1)
    made[2].train(made[2].config)
    if not finished:
        (made[2].folder / "results.json").unlink()
    trace.unlink()
    config = made[2].config
    if "lr" in change:
        config = replace(config, optim=replace(config.optim, **change))
    else:
        config = replace(config, **change)
    with pytest.raises(ValueError) as error:
        run_jobs([*made[:2], replace(made[2], config=config)], workers=2)
    folder = made[2].folder
    assert str(error.value) == (
        f"c/seed-0: {told.format(folder / 'config.json')}; "
        f"remove {folder} or give another --folder"
    )
    assert not trace.exists() and not made[0].folder.exists()


def test_where_a_run_lies_and_its_cache_are_no_difference(tmp_path: Path, trace: Path) -> None:
    made = fake.make(tmp_path / "runs", trace, seeds=1)
    assert run_jobs(made, workers=2) == {}
    shutil.move(tmp_path / "runs", tmp_path / "moved")
    moved = fake.make(tmp_path / "moved", trace, seeds=1, cache="other", runs="elsewhere")
    assert run_jobs(moved, workers=2) == {}
    assert len(happened(trace, "began")) == 3


@pytest.mark.parametrize("record", ["{", "[]", "{}", '{"schema": 1, "config": 3}', "\udcff", None])
def test_a_record_that_cannot_be_read_is_one_line(
    tmp_path: Path, trace: Path, record: str | None
) -> None:
    """None: a table without a record."""
    (job, *_) = fake.make(tmp_path / "runs", trace)
    job.folder.mkdir(parents=True)
    (job.folder / "results.json").write_text("{}")
    if record is not None:
        (job.folder / "config.json").write_bytes(record.encode(errors="surrogateescape"))
    with pytest.raises(ValueError) as error:
        run_jobs([job], workers=1)
    line = str(error.value)
    assert line.startswith("a/seed-0: ") and str(job.folder) in line and "\n" not in line
    assert line.endswith(f"remove {job.folder} or give another --folder")
    assert not trace.exists()


def test_a_folder_without_a_record_starts_anew(tmp_path: Path, trace: Path, whole) -> None:
    """What nobody knows the configuration of is not gone on from; what is not a run's stays."""
    made = fake.make(tmp_path / "runs", trace)
    for name in ("last.ckpt", "students/a.safetensors", "notes.txt"):
        (made[0].folder / name).parent.mkdir(parents=True, exist_ok=True)
        (made[0].folder / name).write_text('["of another run", 3]')
    assert run_jobs(made, workers=2) == {}
    assert results(tmp_path / "runs") == whole
    assert not (made[0].folder / "students/a.safetensors").exists()
    assert (made[0].folder / "notes.txt").exists()


def test_kill_9_of_all_and_a_second_call_end_as_if_nothing_had_happened(
    tmp_path: Path, trace: Path, whole, script
) -> None:
    folder = tmp_path / "runs"
    process = script(folder)
    until(lambda: happened(trace, "ended") and happened(trace, "step-1")[2:])
    os.killpg(process.pid, signal.SIGKILL)
    process.wait(300)
    assert 0 < len(happened(trace, "ended")) < 6
    until(lambda: not alive(trace))
    assert run_jobs(fake.make(folder, trace, pause=0.1), workers=2) == {}
    assert results(folder) == whole
    for k in range(5):  # a step may be done again where its checkpoint was written and not yet told
        assert set(happened(trace, f"step-{k}")) == {job.name for job in fake.make(folder, trace)}


@pytest.mark.parametrize(
    ("number", "to_all"), [(signal.SIGINT, True), (signal.SIGTERM, False)]
)
def test_a_signal_ends_all_jobs_and_the_same_call_goes_on(
    tmp_path: Path, trace: Path, whole, script, number: int, to_all: bool
) -> None:
    """Ctrl-C reaches the jobs too, kill -TERM does not."""
    folder = tmp_path / "runs"
    process = script(folder)
    until(lambda: len(set(happened(trace, "step-0"))) > 1)
    (os.killpg if to_all else os.kill)(process.pid, number)
    _, told = process.communicate(timeout=600)
    assert process.returncode == 128 + number, told
    assert re.search(r"^stopped, \d of 6 runs are finished; the same command goes on$", told, re.M)
    assert not alive(trace)
    kept = {p.read_text() for p in folder.rglob("failed.txt")}
    assert kept <= {"has not come to its end\n"}
    assert run_jobs(fake.make(folder, trace, pause=0.1), workers=2) == {}
    assert results(folder) == whole


@pytest.mark.slow
def test_ctrl_c_while_the_first_job_is_being_started(tmp_path: Path, trace: Path, script) -> None:
    """The process that forks the jobs is importing modules then, and must not die of it."""
    folder = tmp_path / "runs"
    process = script(folder)
    until(folder.exists)
    time.sleep(0.3)
    os.killpg(process.pid, signal.SIGINT)
    _, told = process.communicate(timeout=600)
    assert process.returncode == 130 and "Traceback" not in told, told
    assert told.endswith("stopped, 0 of 6 runs are finished; the same command goes on\n")
    assert not alive(trace)


@pytest.mark.slow
def test_jobs_end_when_the_calling_process_is_killed(tmp_path: Path, trace: Path, script) -> None:
    process = script(tmp_path / "runs")
    until(lambda: len(set(happened(trace, "step-0"))) > 1)
    process.kill()
    process.communicate(timeout=600)
    until(lambda: not alive(trace))
    assert len(happened(trace, "ended")) < 6


def test_two_calls_at_once_never_write_one_folder(
    tmp_path: Path, trace: Path, whole, script
) -> None:
    processes = [script(tmp_path / "runs") for _ in range(2)]
    for process in processes:
        told = process.communicate(timeout=600)
        assert process.returncode == 0 and told[0] == "{}\n", told
    assert results(tmp_path / "runs") == whole
    at: dict[str, str] = {}  # the process that works on a run
    for run, pid, what in lines(trace):
        assert at.setdefault(run, pid) == pid
        if what == "ended":
            del at[run]
    assert at == {}
    began = happened(trace, "began")
    assert len(began) == len(set(began)) == 6


def job(name: str, taught: str) -> Job:
    return Job(name, fake.train, fake.Config(), taught)


def test_no_job_waits_for_a_teacher_while_another_could_run() -> None:
    a0, b0, a1, b1 = job("a0", "0"), job("b0", "0"), job("a1", "1"), job("b1", "1")
    assert jobs._next([a0, b0, a1, b1], set()) == a0
    assert jobs._next([b0, a1, b1], {"0"}) == a1  # a0 is making teacher 0
    assert jobs._next([b0, b1], {"0", "1"}) == b0  # both are being made: it waits
    assert jobs._next([b0, b1], {"1"}) == b0


def test_two_at_a_time_begin_with_two_teachers(tmp_path: Path, trace: Path) -> None:
    made = fake.make(tmp_path / "runs", trace, pause=0.1)
    assert run_jobs(made, workers=2) == {}
    began = happened(trace, "began")
    assert {run[-1] for run in began[:2]} == {"0", "1"}
    assert {run[0] for run in began[:2]} == {"a"}


def test_a_line_a_job_tells_how_far_and_how_long(tmp_path: Path, trace: Path, capfd) -> None:
    fault = tmp_path / "fault"
    fault.write_text("ValueError")
    made = fake.make(tmp_path / "runs", trace, seeds=1, pause=0.1)
    made[0].train(made[0].config)
    made[2] = replace(made[2], config=replace(made[2].config, fault=str(fault)))
    capfd.readouterr()
    run_jobs(made, workers=1)
    first, second = capfd.readouterr().err.splitlines()
    assert re.fullmatch(r"\[2/3\] b/seed-0 \d+ s, 0:00:\d\d left", first)
    assert second.startswith("[3/3] c/seed-0 failed: loss is not finite") and "left" not in second


def test_time_left_is_that_of_the_units_that_are_left() -> None:
    """4 s a unit so far; 6 units wait, a job of 2 has run for 3 s: (24 + 5) / 2 s for 2 workers."""
    waiting = [replace(job("c", "0"), cost=6.0)]
    progress = jobs._Progress([job("a", "0"), *waiting], waiting, workers=2)
    assert progress._left(waiting, []) == ""
    progress.seconds, progress.cost = 12.0, 3.0
    one = jobs._Running(replace(job("b", "0"), cost=2.0), None, time.monotonic() - 3.0, True)  # type: ignore[arg-type]
    assert progress._left(waiting, [one]) in (", 0:00:14 left", ", 0:00:15 left")


@pytest.mark.slow
def test_a_real_paper_killed_in_the_middle_ends_in_the_same_bits(tmp_path: Path, cache) -> None:
    """CRRCD's smoke recipe: a signal to the jobs themselves, then kill -9, then to the end."""
    from crrcd.config import RECIPES
    from crrcd.train import train

    config = replace(
        RECIPES["smoke"], precision="fp32", threads=1, report=False, checkpoint_seconds=0.0,
        cache=str(cache), folder=str(tmp_path / "whole"),
    )  # fmt: skip
    assert run_jobs([Job("whole", train, config, "0")], workers=1) == {}
    folder = tmp_path / "killed"
    again = replace(config, folder=str(folder))
    call = (
        "import json, sys; from crrcd.config import Config; from crrcd.train import train; "
        "from shared.config import from_dict; from shared.comparison.jobs import Job, run_jobs; "
        "config = from_dict(Config, json.loads(sys.argv[1])); "
        "run_jobs([Job('killed', train, config, '0')], workers=1)"
    )
    for arm, number in (("alone", signal.SIGINT), ("crrcd", signal.SIGKILL)):
        process = subprocess.Popen(
            [sys.executable, "-c", call, json.dumps(to_dict(again))],
            cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
            start_new_session=True,
        )  # fmt: skip
        metrics = folder / "metrics.jsonl"
        until(lambda a=arm, m=metrics: m.is_file() and f'"phase": "{a}"' in m.read_text())
        os.killpg(process.pid, number)
        assert process.wait(300) == (-9 if number == signal.SIGKILL else 130)
        assert not (folder / "results.json").exists()
    assert run_jobs([Job("killed", train, again, "0")], workers=1) == {}
    students = sorted((tmp_path / "whole" / "students").iterdir())
    assert len(students) == 2 * (len(config.baselines) + 1)
    for path in students:  # their tensors: a header's own order differs from process to process
        expected, found = load_file(path), load_file(folder / "students" / path.name)
        assert {k: v.numpy().tobytes() for k, v in found.items()} == {
            k: v.numpy().tobytes() for k, v in expected.items()
        }
    for name in ("results.json", "metrics.jsonl"):
        assert (folder / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()

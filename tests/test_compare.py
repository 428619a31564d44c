"""compare.py: every row trains what it says, from the same teacher, data, network and schedule."""

from __future__ import annotations

import dataclasses
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import compare
from baselines.config import WEIGHTS
from tests.conftest import ROOT

FACES = {"rank1": "rank1", "verification": "verification"}
MATCHED = compare.setting("matched", "")


def run(*args: object, folder: Path | None = None) -> subprocess.CompletedProcess:
    command = [sys.executable, "compare.py", *map(str, args)]
    command += ["--folder", str(folder)] if folder else []
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def config(name: str, lr: int = 16, seed: int = 3):
    return compare.config_of(compare.PARTS[name], MATCHED, "matched", lr, seed, changes={})


@pytest.mark.parametrize("lr", [4, 8, 16, 32])
def test_every_part_has_the_same_data_teacher_student_and_schedule(lr: int) -> None:
    first = config("none", lr)
    assert first.data.lr == lr
    for name, part in compare.PARTS.items():
        one = config(name, lr)
        assert (one.data, one.teacher, one.optim, one.seed) == (
            first.data, first.teacher, first.optim, 3
        ), name  # fmt: skip
        assert one.student == first.student or part.paper is compare.PAPERS["btnet"], name


def test_every_row_is_trained_by_its_part() -> None:
    found = compare.rows(64, FACES)
    assert len({row.name for row in found}) == len(found)
    named = {row.name for row in found}
    for row in (r.at(16) for r in found):
        part = compare.PARTS[row.job]
        assert row.against in named
        assert row.paper == part.paper.NAME
        arms = vars(sys.modules[f"{row.paper}.config"])["arms"](config(row.job))
        if row.phases:
            assert set(row.phases) <= set(arms), row.name
            assert row.arm.split(" + ")[0] in {*arms, *(a.rsplit("-", 1)[0] for a in arms)}
        if row.tuned:
            assert part.tuned
    tuned = {row.job for row in found if row.tuned}
    assert tuned == {name for name, part in compare.PARTS.items() if part.tuned}
    assert {row.job for row in found} == set(compare.PARTS)


def test_every_paper_and_baseline_takes_part() -> None:
    assert {part.paper.NAME for part in compare.PARTS.values()} == {*compare.PAPERS, "baselines"}
    assert set(WEIGHTS) <= set(compare.PARTS)
    assert set(WEIGHTS) == set(compare.TITLES) == set(compare.SOURCES)


def test_a_trial_changes_the_weights_and_nothing_else() -> None:
    for name, part in compare.PARTS.items():
        before, after = config(name), compare.scaled(part, config(name), 3.0)
        for field in dataclasses.fields(before):
            was, now = getattr(before, field.name), getattr(after, field.name)
            assert now == (3 * was if field.name in part.tuned else was), (name, field.name)


def test_a_trial_sees_other_seeds_than_the_table() -> None:
    assert not set(MATCHED.tuning_seeds) & set(range(MATCHED.seeds))


def test_claims_compare_rows_that_are_there() -> None:
    named = {row.name for row in compare.rows(64, FACES)}
    for claim in compare.claims(16, "rank1"):
        assert set(claim.rows) <= named


def test_published_gains_are_means_over_the_printed_pairs() -> None:
    table = compare.TABLE1
    for method, values in table.items():
        total, pairs = 0.0, 0
        for ours, alone in zip(values, table["none"], strict=True):
            if ours is not None:
                total, pairs = total + ours - alone, pairs + 1
        assert compare.published_gain(method) == pytest.approx(total / pairs, abs=1e-12)
    assert sum(table["crrcd"]) / 7 == pytest.approx(74.07, abs=0.005)


def test_the_published_recipes_are_there() -> None:
    for one in compare.PUBLISHED:
        assert one.recipe in compare.PAPERS[one.paper.lower()].RECIPES


@pytest.mark.parametrize(
    "args, told",
    [
        (["--baselines", "kdd"], "--baselines kdd: not known; did you mean kd?"),
        (["--papers", "crcd"], "--papers crcd: not known; did you mean crrcd?"),
        (["--resolution", "64"], "--resolution 64: must be 4 or more and below"),
        (["--recipe", "paper", "--resolution", "16"], "--resolution: CIFAR-100"),
        (["--resolution", "12"], "--resolution 12: BTNet's trunk sees 64 px halved some times"),
        (["--seeds", "-1"], "--seeds, --jobs and --threads must be 1 or more"),
    ],
)
def test_wrong_input_is_told_before_anything_runs(args: list[str], told: str) -> None:
    with pytest.raises(ValueError) as error:
        compare.arguments(args)
    assert str(error.value).startswith(told)


def test_papers_and_baselines_are_chosen_by_name() -> None:
    parts = compare.arguments(["--papers", "horkd", "--baselines", "kd", "rkd"]).parts
    assert parts == ["none", "kd", "rkd", "horkd", "horkd-direct"]
    assert compare.arguments(["--papers", "--baselines"]).parts == ["none"]
    assert compare.arguments(["--papers", "crrcd", "--resolution", "12"]).resolution == [12]
    assert compare.arguments([]).parts == list(compare.PARTS)


def test_an_empty_folder_has_nothing_to_report(tmp_path: Path) -> None:
    done = run("--report-only", folder=tmp_path)
    assert done.returncode == 2
    assert "no finished run" in done.stderr and done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_what_is_trained_next_does_not_choose_what_is_told(tmp_path: Path) -> None:
    """Holm's families are those of the folder, whatever --papers a later call names."""
    few = compare.Comparison(
        compare.arguments(["--papers", "crrcd", "--baselines", "--folder", str(tmp_path)])
    )
    every = compare.Comparison(compare.arguments(["--folder", str(tmp_path)]))
    assert few.rows() == every.rows()
    assert len(few.main(16)) < len(every.main(16))


def test_claims_stay_at_the_resolution_that_came_first(tmp_path: Path) -> None:
    flags = ["--folder", str(tmp_path), "--precision", "fp32"]
    compare.Comparison(compare.arguments(flags)).settle()
    later = compare.Comparison(compare.arguments([*flags, "--resolution", "8", "16"]))
    later.settle()
    assert later.first() == 16


def test_a_step_is_timed_as_it_is_trained() -> None:
    """A short run, too, reads the teacher's outputs."""
    comparison = compare.Comparison(compare.arguments([]))
    for job in comparison.timing(16):
        assert job.config.teacher.outputs == "always"
        assert job.config.optim.epochs == compare.TIMED_EPOCHS


def test_cifar_has_no_people_to_choose_weights_on() -> None:
    comparison = compare.Comparison(compare.arguments(["--recipe", "paper", "--root", "x"]))
    assert not comparison.searches
    assert {job.config.data.name for job in comparison.main(32)} == {"cifar100"}
    assert {row.paper for row in comparison.rows()} == {"baselines", "crrcd", "horkd"}
    (direct,) = (part for name, part in comparison.parts.items() if name == "horkd-direct")
    made = compare.config_of(direct, comparison.setting, "paper", 32, 0, changes={})
    assert (made.reduction, made.stages) == ("image", "direct")


@pytest.mark.slow
def test_killed_and_started_again_it_ends_in_the_same_table(tmp_path: Path) -> None:
    """crrcd, KD and none, two seeds; killed three times on the way."""
    args = ["--recipe", "smoke", "--papers", "crrcd", "--baselines", "kd", "--precision", "fp32",
            "--cache", str(tmp_path / "cache")]  # fmt: skip
    whole = run(*args, folder=tmp_path / "whole")
    assert whole.returncode == 0, whole.stderr
    for seconds in (8, 14, 20):
        command = [sys.executable, "compare.py", *args, "--folder", str(tmp_path / "parts")]
        killed = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
        time.sleep(seconds)
        killed.send_signal(signal.SIGKILL)
        killed.wait()
        time.sleep(2)  # its runs notice, and save
    again = run(*args, folder=tmp_path / "parts")
    assert again.returncode == 0, again.stderr
    records = [json.loads((tmp_path / p / "comparison.json").read_text()) for p in
               ("whole", "parts")]  # fmt: skip
    for record in records:  # what is measured in seconds differs
        for view in record["resolutions"].values():
            for row in view["rows"].values():
                row.pop("cost")
    assert records[0] == records[1]

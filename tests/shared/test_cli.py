"""Bad input gets one clear line and exit code 2; help is for people."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from crrcd.config import ABOUT, RECIPES, Config, members
from shared import cli
from shared.config import Data, from_dict, to_dict
from tests.conftest import ROOT, python
from tests.forked import forked


def parse(*argv: str) -> Config:
    return cli.parse("crrcd", RECIPES, ABOUT, members, argv=list(argv))


def refusal(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    with pytest.raises(SystemExit) as stop:
        parse(*argv)
    assert stop.value.code == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and line.startswith("error: ")
    return line


def test_a_recipe_and_typed_overrides() -> None:
    config = parse("digits", "--seed", "3", "--optim.lr", ".5", "--data.on-error", "skip",
                   "--compile", "--optim.milestones", "3", "5")  # fmt: skip
    assert (config.recipe, config.seed, config.optim.lr) == ("digits", 3, 0.5)
    assert config.data.on_error == "skip" and config.compile and config.optim.milestones == (3, 5)
    assert parse() == RECIPES["embedded"]


def test_only_takes_one_run_of_a_table() -> None:
    (one,) = members(parse("table1", "--only", "3", "--seed", "9"))
    assert (one.teacher.name, one.student.name, one.seed) == ("resnet56", "resnet20", 9)
    (other,) = members(parse("table1", "--only", "3", "--student.name", "vgg8"))
    assert (other.teacher.name, other.student.name) == ("resnet56", "vgg8")
    assert len(members(parse("table1"))) == 7 and len(members(parse("table2"))) == 5


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (("table1", "--only", "8"), "--only 8: this recipe has 7 to choose from"),
        (("--only", "2"), "this recipe has 1 to choose from"),
        (("table1", "--student.name", "vgg8"), "--student.name differs between the runs"),
        (("ablation-tau", "--tau", ".5"), "--tau differs between the runs of ablation-tau"),
        (("embeded",), "no recipe 'embeded' in crrcd; did you mean embedded?"),
        (("--optim.lrr", "1"), "no flag --optim.lrr; did you mean --optim.lr?"),
        (("--nonsense",), "no flag --nonsense"),
        (("--seed", "three"), "Error parsing --seed: "),
        (("--seed", "three"), "three"),
        (("--data.name", "imagenet"), "imagenet"),
        (("--seed",), "--seed"),
        (("embedded", "surplus"), "surplus"),
        (("--resume", "x", "--seed", "3"), "takes the run's own configuration"),
    ],
)
def test_bad_arguments_end_in_one_line(capsys, argv: tuple[str, ...], words: str) -> None:
    assert words in refusal(capsys, *argv)


@pytest.mark.parametrize(
    ("flag", "value"),
    [("--threads", "-1"), ("--log-every", "0"), ("--optim.epochs", "0"), ("--d", "0"),
     ("--data.shift-step", "0"), ("--tau", "0")],
)  # fmt: skip
def test_values_out_of_range_are_named(capsys, flag: str, value: str) -> None:
    assert f"{flag} {value}" in refusal(capsys, flag, value)


def test_help_lists_every_recipe_with_its_line(capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        parse("--help")
    assert stop.value.code == 0
    text = re.sub(r"[│\s]+", " ", capsys.readouterr().out)
    for name, about in ABOUT.items():
        assert f"{name} {about}" in text
    assert "--optim.lr" in text and "Temperature of the critic (Eq. 10)" in text


def test_every_recipe_survives_json() -> None:
    for config in RECIPES.values():
        assert from_dict(Config, to_dict(config)) == config


def test_a_configuration_of_another_version_names_the_fields() -> None:
    values = to_dict(RECIPES["smoke"])
    values["data"]["colour"] = values["data"].pop("kernel")
    with pytest.raises(ValueError, match=r"config\.data.*another version.*colour, kernel"):
        from_dict(Config, values)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "no run folder here"),
        ("{", "not readable as JSON"),
        (json.dumps({"schema": 99, "git": "abc"}), "schema 99, this code reads 1"),
    ],
)
def test_resume_of_what_is_no_run(tmp_path: Path, content: str | None, words: str) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=words):
        parse("--resume", str(tmp_path))


# -- as a user sees it ---------------------------------------------------------------------------


def folder(root: Path, train: dict[str, int], test: dict[str, int], size: int = 20) -> Path:
    rng = np.random.default_rng(0)
    for part, classes in (("train", train), ("test", test)):
        for name, count in classes.items():
            (root / part / name).mkdir(parents=True)
            for k in range(count):
                pixels = rng.integers(0, 256, (size, size + k % 3, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / part / name / f"{k}.png")
    return root


BAD = {
    "missing folder": (["--data.name", "folder", "--data.root", "{tmp}/none"], "no such folder"),
    "no root": (["--data.name", "folder"], "needs --data.root"),
    "LR above HR": (["--data.lr", "80"], "--data.lr 80"),
    "number of classes": (
        ["--data.name", "folder", "--data.root", "{tmp}/set", "--data.classes", "5"],
        "2 classes found in {tmp}/set/train, --data.classes says 5",
    ),
    "other model": (["--student.name", "resnet9000"], "resnet9000"),
    "no classifier": (["--student.head", "softmax"], "no classifier of its own"),
    "no checkpoint": (["--teacher.checkpoint", "{tmp}/none.pth"], "none.pth: no such file"),
    "no GPU": (["--device", "cuda"], "--device cuda"),
    "size of images": (["--data.name", "digits"], "the images of digits are 8 px"),
    "batch": (["--data.identities", "2"], "do not fill a batch"),
    "shift": (["--data.shift", "3"], "no multiple of data.shift_step"),
    "download": (["--data.name", "cifar10", "--data.hr", "32"], "cifar10"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_exit_2(tmp_path: Path, cache: Path, case: str) -> None:
    if case == "no GPU":
        import torch

        if torch.cuda.is_available():
            pytest.skip("there is a CUDA device here")
    if case == "number of classes":
        folder(tmp_path / "set", {"a": 3, "b": 3}, {"a": 2, "b": 2})
    flags, words = BAD[case]
    flags = [f.format(tmp=tmp_path) for f in flags]
    kept = str(tmp_path / "cache") if case == "download" else str(cache)
    done = forked(
        "-m", "crrcd.train", "smoke", "--runs", str(tmp_path / "runs"), "--cache", kept,
        "--data.test", "24", "--data.development", "24", *flags,
    )  # fmt: skip
    assert done.returncode == 2, done
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and words.format(tmp=tmp_path) in errors[0], done.stderr
    assert "Traceback" not in done.stderr


def test_ctrl_c_outside_training_is_no_traceback(capsys) -> None:
    def script() -> None:
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as stop:
        cli.guarded(script)
    assert stop.value.code == 130 and capsys.readouterr().err == "interrupted\n"


def test_script_runs_from_its_own_folder() -> None:
    done = python("train.py", "--help", cwd=ROOT / "crrcd")
    assert done.returncode == 0 and "Recipes:" in done.stdout


def test_data_defaults_are_a_valid_configuration() -> None:
    assert from_dict(Data, to_dict(Data())) == Data()

"""Every table and figure is one command, here on small files in the published formats."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from crrcd.config import RECIPES, members
from crrcd.eval import evaluate
from crrcd.train import load_student, main
from shared import cli
from tests.conftest import ROOT
from tests.shared.data import trees
from tests.shared.data.test_classification import cifar100, stl10, tiny_imagenet

# Published in CRRCD's tables I to VII, in their order; Fig. 3's text.
PUBLISHED = {
    "table1": "76.43 74.83 72.10 71.92 74.05 75.14 74.04",
    "table2": "74.49 74.35 77.06 76.53 74.26",
    "table3": "89.33",
    "table4": "75.15 35.17",
    "table5": "95.25",
    "table6": "97.27",
    "table7": ".35 .47 .50",
}
RUN = (
    "--optim.epochs", "1", "--optim.batch", "16", "--teacher.optim.epochs", "1",
    "--teacher.optim.batch", "16", "--queue", "64", "--data.counts", "any", "--threads", "1",
    "--precision", "fp32", "--no-report", "--log-every", "1", "--data.workers", "0",
)  # fmt: skip
OBJECTS = ("--teacher.name", "resnet8", "--student.name", "resnet8", "--data.shift", "0")
FACES = ("--teacher.name", "small-teacher", "--student.name", "small-student", "--data.hr", "32")
NATIVE = ("--student.name", "small-student", "--data.any-alignment")

Train = Callable[..., Path]


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for each data set; the faces are of procedural people."""
    root = tmp_path_factory.mktemp("disk")
    faces, others = trees.people(8, 4), trees.people(12, 6, first=50_000)
    trees.write_pack(root / "pack", faces)
    trees.write_bin(root / "pack" / "lfw.bin", others)
    trees.write_folders(root / "casia", faces)
    trees.write_folders(root / "uccs", others)
    trees.write_lfw(root / "lfw", others[:3, :2])
    trees.write_tinyface(root / "tinyface", others[:8], others[8:, 0])
    trees.write_folders(root / "tinyface" / "Training_Set", trees.people(8, 4, first=60_000))
    cifar100(root / "cifar", 200)
    (root / "svhn").mkdir()
    trees.write_svhn(root / "svhn", 4)
    stl10(root / "stl10", 12, 6)
    tiny_imagenet(root / "tiny")
    return root


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """runs/ and cache/ of this file."""
    return tmp_path_factory.mktemp("kept")


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Callable[[Sequence[object]], None]:
    """`python train.py ...`; torchvision is not to mind the checksums of our small files."""
    for module in ("cifar", "svhn"):
        monkeypatch.setattr(
            f"torchvision.datasets.{module}.check_integrity", lambda path, md5=None: True
        )

    def call(argv: Sequence[object]) -> None:
        monkeypatch.setattr(sys, "argv", ["train.py", *map(str, argv)])
        cli.guarded(main)

    return call


@pytest.fixture
def train(command: Callable[[Sequence[object]], None], kept: Path) -> Train:
    """The newest run folder after `python train.py RECIPE` with short training."""

    def call(recipe: str, *flags: object, runs: Path = kept / "runs") -> Path:
        before = set(runs.glob(f"crrcd/{recipe}-*"))
        command([recipe, *RUN, "--runs", runs, "--cache", kept / "cache", *flags])
        return max(set(runs.glob(f"crrcd/{recipe}-*")) - before, key=lambda p: p.stat().st_mtime)

    return call


@pytest.fixture
def table5(train: Train, disk: Path, kept: Path) -> Path:
    """A run of table5, of two students; made once."""
    done = sorted((kept / "table5").glob("crrcd/*"))
    flags = (*FACES, "--baselines", "alone")
    return done[0] if done else train("table5", *flags, "--data.root", disk / "pack",
                                      runs=kept / "table5")  # fmt: skip


def record(run: Path, name: str = "results") -> dict:
    return json.loads((run / f"{name}.json").read_text())


# -- recipes -------------------------------------------------------------------------------------


def test_face_recipes_are_the_papers_setting() -> None:
    """Sec. IV: batch 96, rate .05, x.1 at 21, 28, 32, seed 5, T 4; 512 negatives, 128 dimensions;
    ResNet50 at 112 -> ResNet18 at 16, bilinear; ArcFace."""
    for name in ("table5", "table6", "fig3-negatives", "fig3-tau", "fig5"):
        for c in members(RECIPES[name]):
            o = c.optim
            assert (o.batch, o.lr, o.gamma, o.milestones) == (96, 0.05, 0.1, (21, 28, 32))
            assert (c.seed, c.rho, c.d, c.alpha, c.beta) == (5, 4.0, 128, 0.5, 2.0)
            assert (c.data.hr, c.data.lr, c.data.kernel) == (112, 16, "bilinear")
            assert (c.teacher.name, c.student.name) == ("iresnet50", "iresnet18")
            for network in (c.teacher, c.student):
                assert (network.head, network.scale, network.margin) == ("arcface", 64.0, 0.5)
    assert [c.n for c in members(RECIPES["fig3-negatives"])] == [64, 128, 256, 512, 1024]
    taus = [c.tau for c in members(RECIPES["fig3-tau"])]
    assert taus[0] == 0.02 and taus[-1] == 0.3 and {0.08, 0.1} <= set(taus)
    assert {c.n for c in members(RECIPES["fig3-tau"])} == {512}


def test_every_table_and_figure_has_a_recipe() -> None:
    assert set(PUBLISHED) | {"fig4", "fig5"} < set(RECIPES)
    assert {name for name, c in RECIPES.items() if c.figure == "curve"} == {
        "fig3-negatives", "fig3-tau", "ablation-negatives", "ablation-tau", "ablation-policy",
        "ablation-dimension",
    }  # fmt: skip


@pytest.mark.parametrize("recipe", PUBLISHED)
def test_published_numbers_of_the_readme_are_the_papers(recipe: str) -> None:
    lines = (ROOT / "crrcd" / "README.md").read_text().splitlines()
    (row,) = [line for line in lines if line.startswith(f"| `{recipe}` |")]
    published = row.split("|")[3]
    assert re.findall(r"\d*\.\d+", published) == PUBLISHED[recipe].split()


# -- objects -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "recipe",
    ["table1", *(pytest.param(r, marks=pytest.mark.slow) for r in ("table2", "paper-schedule"))],
)
def test_a_pair_of_the_cifar_tables_is_a_command(train: Train, disk: Path, recipe: str) -> None:
    run = train(recipe, *OBJECTS, "--only", 2, "--data.root", disk / "cifar")
    assert list(record(run)["rows"]) == ["teacher, HR", "teacher, LR", "alone", "kd", "crrcd"]


def test_table3_is_a_command(train: Train, disk: Path) -> None:
    run = train("table3", *OBJECTS, "--data.root", disk / "svhn")
    assert record(run)["evaluation"] == "test" and "top1" in record(run)["columns"]


def test_table4_probes_every_student_and_the_teacher(train: Train, disk: Path) -> None:
    run = train("table4", *OBJECTS, "--data.root", disk / "cifar", "--data.test-sets",
                f"stl10={disk / 'stl10'}", f"tinyimagenet={disk / 'tiny'}")  # fmt: skip
    own = record(run)
    for name, images in (("stl10", 6), ("tinyimagenet", 4)):
        found = record(run, f"results-{name}")
        assert found["evaluation"] == name and list(found["rows"]) == list(own["rows"])
        value = found["rows"]["crrcd"]["cells"]["top1"]["value"] * images / 100
        assert value == pytest.approx(round(value))  # of so many images
        evaluate(run, name, str(disk / {"stl10": "stl10", "tinyimagenet": "tiny"}[name]),
                 counts="any")  # fmt: skip
        again = record(run, f"eval-{name}")["rows"]
        for arm in ("alone", "kd", "crrcd"):
            assert again[arm]["metrics"] == found["rows"][arm]["metrics"]
    evaluate(run, "test")  # does not ask for the probe sets
    assert record(run, "eval-test")["rows"]["kd"]["metrics"] == own["rows"]["kd"]["metrics"]


def test_fig4_is_a_map_of_alone_and_crrcd(train: Train, disk: Path) -> None:
    run = train("fig4", *OBJECTS, "--data.root", disk / "svhn")
    shown = record(run / "figures", "fig4")
    assert list(shown["rows"]) == ["alone", "crrcd"] and shown["classes"] == 10
    assert shown["images"] == 40 and (run / "figures" / "fig4.png").is_file()


# -- faces ---------------------------------------------------------------------------------------


def test_table5_reads_a_pack_with_the_bin_beside_it(table5: Path) -> None:
    found = record(table5)
    assert list(found["rows"]) == ["teacher, HR", "teacher, LR", "alone", "crrcd"]
    assert record(table5, "config")["test_sets"] == ["lfw"]


def test_table5_reads_raw_folders(train: Train, disk: Path) -> None:
    run = train("table5", *FACES, "--data.name", "casia", "--data.root", disk / "casia",
                "--data.test-sets", f"lfw={disk / 'lfw'}")  # fmt: skip
    assert list(record(run)["rows"]) == ["teacher, HR", "teacher, LR", "alone", "kd", "crrcd"]
    assert "verification" in record(run)["columns"]


def test_table6_is_table5_scored_on_uccs(
    train: Train, table5: Path, disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = train("table6", *FACES, "--baselines", "alone", "--data.root", disk / "pack",
                "--data.test-sets", f"uccs={disk / 'uccs'}", "--data.any-alignment")  # fmt: skip
    assert record(run)["evaluation"] == "UCCS"
    evaluate(table5, "uccs", str(disk / "uccs"), counts="any", any_alignment=True)
    scored, own = record(table5, "eval-uccs")["rows"], record(run)["rows"]
    assert {arm: row["cells"] for arm, row in scored.items()} == {
        arm: own[arm]["cells"] for arm in scored
    }


def test_fig5_shows_the_statistics_of_the_pair_scores(train: Train, disk: Path) -> None:
    run = train("fig5", *FACES, "--data.root", disk / "pack")
    shown = record(run / "figures", "fig5")
    assert list(shown["rows"]) == ["alone", "crrcd"]
    arrays = np.load(run / "arrays.npz")
    same = arrays["pairs/same"]
    for row, cell in shown["rows"].items():
        scores = arrays[f"{row}/scores"].astype(float)
        margin = scores[same].mean() - scores[~same].mean()
        assert cell["margin"] == pytest.approx(margin, abs=1e-6)


def test_a_curve_grows_with_the_runs_of_only_and_resume(
    train: Train, command: Callable, disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = (*FACES, "--n", "16", "--data.root", disk / "pack")
    first = train("fig3-tau", *flags, "--only", 5)
    assert "1 of 9 runs; not yet: train.py fig3-tau --only 1" in capsys.readouterr().err
    assert not (first / "figures").exists()
    train("fig3-tau", *flags, "--only", 6, "--seed", 6)  # no point of this curve
    assert "fig3-tau: 1 of 9 runs" in capsys.readouterr().err
    second = train("fig3-tau", *flags, "--only", 2)
    values = [p["value"] for p in record(second / "figures", "fig3-tau")["points"]]
    assert values == [0.04, 0.1]
    third = train("fig3-tau", *flags, "--only", 9)
    (third / "results.json").unlink()  # as if it had been stopped while it was scored
    (third / "figures" / "fig3-tau.json").unlink()
    command(["--resume", third])
    points = record(third / "figures", "fig3-tau")["points"]
    assert [p["value"] for p in points] == [0.04, 0.1, 0.3]
    for point in points:
        cells = record(Path(point["run"]))["rows"]["crrcd"]["cells"]
        assert point["arm"]["value"] == cells["verification"]["value"]
    assert "6 of 9 runs" not in capsys.readouterr().err


def test_a_recipe_of_several_runs_ends_in_its_figure(train: Train, capsys) -> None:
    small = ("--data.identities", 8, "--data.instances", 8, "--data.development", 24,
             "--data.test", 24, "--teacher.identities", 8, "--n", 16)  # fmt: skip
    last = train("ablation-policy", *small)
    assert "not yet" not in capsys.readouterr().err
    points = record(last / "figures", "ablation-policy")["points"]
    assert [p["value"] for p in points] == ["supervised", "unsupervised"]
    assert all("reference" in point for point in points)


# -- fine-tuning ---------------------------------------------------------------------------------


def test_table7_fine_tunes_every_student_and_scores_before_and_after(
    train: Train, table5: Path, disk: Path
) -> None:
    run = train("table7", *NATIVE, "--start", table5, "--data.root", disk / "tinyface")
    found = record(run)
    assert list(found["rows"]) == ["alone, before", "crrcd, before", "alone", "crrcd"]
    assert {"rank1", "rank5", "rank10", "rank20", "map"} <= set(found["rows"]["crrcd"]["metrics"])
    evaluate(table5, "tinyface", str(disk / "tinyface"), counts="any", any_alignment=True)
    for arm, row in record(table5, "eval-tinyface")["rows"].items():
        assert row["metrics"] == found["rows"][f"{arm}, before"]["metrics"]
    evaluate(run, "test")
    for arm, row in record(run, "eval-test")["rows"].items():
        assert row["metrics"] == found["rows"][arm]["metrics"]
    lines = [json.loads(x) for x in (run / "metrics.jsonl").read_text().splitlines()]
    assert {x["phase"] for x in lines} == {"alone", "crrcd"}  # no teacher
    assert all(x["loss"] == pytest.approx(x["cls"]) for x in lines)
    before, after = (load_file(r / "students" / "crrcd.safetensors") for r in (table5, run))
    assert any(not torch.equal(before[k], after[k]) for k in before if k.startswith("backbone."))
    assert load_student(run).alignment == "whole" and load_student(table5).alignment == "arcface"


def test_fine_tuning_starts_from_the_backbone_and_class_means(
    train: Train, table5: Path, disk: Path
) -> None:
    """With a rate of 0 the parameters stay where training starts."""
    run = train("table7", *NATIVE, "--start", table5, "--data.root", disk / "tinyface",
                "--optim.lr", 0)  # fmt: skip
    student = load_student(table5)
    at_first = dict(student.recogniser.backbone.named_parameters())
    for name, weight in load_student(run).recogniser.backbone.named_parameters():
        assert torch.equal(weight, at_first[name])
    weight = load_file(run / "students" / "crrcd.safetensors")["head.weight"]
    faces = torch.from_numpy(trees.people(8, 4, first=60_000)).permute(0, 1, 4, 2, 3).float()
    for own, mean in zip(faces, weight, strict=True):
        small = torch.nn.functional.interpolate(own, size=16, mode="bicubic", antialias=True)
        with torch.inference_mode():
            e = student(small.round().clamp(0, 255).to(torch.uint8)).double()
        expected = torch.zeros(e.shape[1], dtype=torch.float64)
        for row in e:
            expected += row / row.norm()
        cosine = mean.double() @ expected / (mean.double().norm() * expected.norm())
        assert cosine > 0.999  # the reader's resize may differ by a grey level


def test_fine_tuning_goes_on_bit_for_bit(
    train: Train, command: Callable, table5: Path, disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = (*NATIVE, "--start", table5, "--data.root", disk / "tinyface", "--optim.epochs", 3,
             "--checkpoint-seconds", 0)  # fmt: skip
    whole = train("table7", *flags)
    seen = []

    def dies(*args: object, **kwargs: object) -> torch.Tensor:
        seen.append(1)
        if len(seen) == 9:  # in the second student
            raise KeyboardInterrupt
        return cross_entropy(*args, **kwargs)  # type: ignore[arg-type]

    cross_entropy = torch.nn.functional.cross_entropy
    with monkeypatch.context() as patched, pytest.raises(SystemExit):
        patched.setattr("crrcd.finetune.F.cross_entropy", dies)
        train("table7", *flags)
    stopped = max((whole.parent).glob("table7-*"), key=lambda p: p.stat().st_mtime)
    assert not (stopped / "results.json").exists()
    command(["--resume", stopped])
    for arm in ("alone", "crrcd"):
        a, b = (load_file(r / "students" / f"{arm}.safetensors") for r in (whole, stopped))
        assert all(torch.equal(a[k], b[k]) for k in a)
    assert record(whole)["rows"] == record(stopped)["rows"]


# -- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["table4", "--data.root", "{disk}/cifar"],
         "--data.test-sets stl10=FOLDER: no such file or folder"),
        (["table4", "--data.root", "{disk}/cifar", "--data.test-sets", "lfw={disk}/lfw"],
         "cifar100 is scored on no test set 'lfw' (there are: stl10, tinyimagenet)"),
        (["table6", "--data.root", "{disk}/pack"], "--data.test-sets uccs=FOLDER: no such file"),
        (["table5", "--data.root", "{disk}/pack", "--start", "{table5}"], "--alpha 0 --beta 0"),
        (["table7", "--data.root", "{disk}/tinyface"], "--start RUN: no such run"),
        (["table7", "--data.root", "{disk}/tinyface", "--start", "{disk}"], "no run folder here"),
        (["table7", "--data.root", "{disk}/tinyface", "--start", "{unfinished}"],
         "unfinished, without its student crrcd; go on with --resume"),
        (["table7", "--data.root", "{disk}/tinyface", "--start", "{table5}"],
         "trained with --student.name small-student; give the same here"),
        (["table7", "--data.root", "{disk}/tinyface", "--start", "{table5}", "--data.lr", "8",
          "--student.name", "small-student"], "trained with --data.lr 16; give"),
        (["table7", "--data.root", "{disk}/tinyface", "--start", "{table5}", "--student.name",
          "small-student"], "TinyFace: faces are cut out as 'whole', those trained"),
        (["table7", "--data.root", "{disk}/uccs", "--start", "{table5}", *NATIVE],
         "no such folder"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_and_exit_2(
    command: Callable, disk: Path, table5: Path, tmp_path: Path, kept: Path, capsys,
    argv: list[str], words: str,
) -> None:  # fmt: skip
    unfinished = tmp_path / "unfinished"
    (unfinished / "students").mkdir(parents=True)
    for name in ("config.json", "students/alone.safetensors"):
        (unfinished / name).write_bytes((table5 / name).read_bytes())
    places = {"disk": disk, "table5": table5, "unfinished": unfinished}
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        command([*(a.format(**places) for a in argv[:1]), *RUN, "--runs", tmp_path / "runs",
                 "--cache", kept / "cache", *(a.format(**places) for a in argv[1:])])  # fmt: skip
    errors = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error: ")]
    assert stop.value.code == 2 and len(errors) == 1 and words in errors[0], errors


def test_a_run_of_objects_is_not_fine_tuned(
    train: Train, command: Callable, disk: Path, capsys
) -> None:
    run = train("digits", *OBJECTS, "--baselines", "alone", "--n", "16")
    with pytest.raises(SystemExit):
        command(["table7", "--start", run, "--student.name", "resnet8", "--student.head",
                 "cosface", "--data.lr", 4, "--data.hr", 4,
                 "--data.root", disk / "tinyface"])  # fmt: skip
    assert "a run of objects; only faces are fine-tuned" in capsys.readouterr().err


# -- the real networks ---------------------------------------------------------------------------


@pytest.mark.slow
def test_table5_takes_a_step_with_its_own_networks(train: Train, disk: Path, tmp_path) -> None:
    """iresnet50 at 112 and iresnet18 at 16."""
    trees.write_pack(tmp_path, trees.people(4, 2))
    batch = ("--optim.batch", 8, "--teacher.optim.batch", 8, "--queue", 8, "--n", 8)
    run = train("table5", *batch, "--baselines", "alone", "--data.root", tmp_path,
                "--data.test-sets", f"lfw={disk / 'lfw'}", "--data.any-alignment")  # fmt: skip
    rows = record(run)["rows"]
    size = {row: round(rows[row]["parameters"] / 1e6, 2) for row in ("teacher, HR", "crrcd")}
    smaller = 512 * 512 * (7 * 7 - 1 * 1) / 1e6  # the linear layer sees a map of 1 x 1
    assert size == {"teacher, HR": 43.59, "crrcd": pytest.approx(24.03 - smaller, abs=0.01)}

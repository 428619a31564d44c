"""Every table and figure is one command, here on small files in the published formats."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import btnet.eval
from btnet import tables
from btnet.config import BRANCHES, RECIPES, TRUNKS
from btnet.eval import evaluate
from btnet.figures import ENDS
from btnet.train import load_student, main
from shared import cli
from tests.shared.data import trees

RUN = (
    *(word for which in ("", "trunk-", "branch-", "teacher.")
      for word in (f"--{which}optim.epochs", "1", f"--{which}optim.batch", "16")),
    "--data.counts", "any", "--threads", "1", "--precision", "fp32", "--no-report",
    "--log-every", "1", "--data.workers", "0",
)  # fmt: skip
SMALL = ("--teacher.name", "small-iresnet", "--student.name", "small-iresnet")
DRAWN = ("--data.identities", "8", "--data.instances", "2", "--data.development", "0",
         "--data.test", "24", "--teacher.identities", "8")  # fmt: skip
STRATEGIES = [f"{i}+{w}" for i in ("avg", "min", "max") for w in ("floor", "near", "ceil")]
NATIVE = [(6, 7), (9, 13), (20, 25), (70, 90), (26, 31)]  # width, height in px
FOUR = ["hr", "mm", "mr", "bt"]
TABLE1 = ["112&7", "112&14", "112&28", "7&7", "14&14", "28&28", "112&112"]

Train = Callable[..., Path]


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for each data set, of procedural people."""
    root = tmp_path_factory.mktemp("disk")
    others = trees.people(16, 3, first=50_000)
    trees.write_pack(root / "pack", trees.people(8, 2))
    for name, some in (("lfw", others[:4]), ("agedb_30", others[4:8])):
        trees.write_bin(root / "pack" / f"{name}.bin", some, half=1)
    trees.write_lfw(root / "lfw", others[:3, :2])
    trees.write_survface(root / "survface", others[:4], others[6:, 0])
    trees.write_folders(root / "survface" / "training_set", trees.people(6, 3, first=60_000))
    for k, path in enumerate(sorted((root / "survface").rglob("*.png"))):
        Image.open(path).resize(NATIVE[k % len(NATIVE)]).save(path)
    return root


@pytest.fixture(scope="module")
def train(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Train:
    """The last run folder of `python train.py RECIPE`, with short training, hasty timing and few
    faces of native sizes."""
    runs = tmp_path_factory.mktemp("runs")

    def call(recipe: str, *flags: object) -> Path:
        before = set(runs.glob(f"btnet/{recipe}-*"))
        argv = [recipe, *RUN, "--runs", runs, "--cache", cache, *flags]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tables, "TIMED", 2)
            patch.setattr(tables, "PEOPLE", 8)
            patch.setattr(sys, "argv", ["train.py", *map(str, argv)])
            cli.guarded(main)
        made = set(runs.glob(f"btnet/{recipe}-*")) - before
        return max(made, key=lambda p: p.stat().st_mtime_ns)

    return call


@pytest.fixture(scope="module")
def faces(train: Train, disk: Path) -> Path:
    """table1's run."""
    return train("table1", *SMALL, "--data.root", disk / "pack", *lfw(disk))


@pytest.fixture(scope="module")
def tuned(train: Train, disk: Path, faces: Path) -> Path:
    """table2's run that begins there, at rate 0."""
    return train("table2", *SMALL, "--data.root", disk / "survface", "--start-run", faces,
                 "--trunk-optim.lr", 0, "--branch-optim.lr", 0)  # fmt: skip


def lfw(disk: Path) -> tuple[object, ...]:
    """To be scored on six pictures, where nothing hangs on the .bin files."""
    return "--data.any-alignment", "--data.test-sets", f"lfw={disk / 'lfw'}"


def record(run: Path, name: str = "results") -> dict:
    return json.loads((run / f"{name}.json").read_text())


def rows(run: Path, name: str = "results") -> list[str]:
    return list(record(run, name)["rows"])


def settings(run: Path) -> dict:
    return record(run, "config")["config"]


def values(run: Path, name: str = "results") -> dict[str, dict[str, float]]:
    found = record(run, name)["rows"]
    return {
        row: {column: cell["value"] for column, cell in line["cells"].items()}
        for row, line in found.items()
    }


def logged(run: Path) -> dict[str, list[dict]]:
    """The steps of each network by its name."""
    found: dict[str, list[dict]] = {}
    for line in (run / "metrics.jsonl").read_text().splitlines():
        step = json.loads(line)
        if "cls" in step:
            found.setdefault(step["phase"], []).append(step)
    return found


def weights(run: Path, name: str) -> dict[str, torch.Tensor]:
    return load_file(run / "students" / f"{name}.safetensors")


def same_bits(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def looks_drawn(path: Path) -> bool:
    """A picture that is not of one colour."""
    pixels = np.asarray(Image.open(path).convert("L"))
    return min(pixels.shape) > 200 and pixels.std() > 5


def refused(capsys: pytest.CaptureFixture[str], call: Callable[..., object], *argv: object) -> str:
    """The one line that bad input ends in."""
    capsys.readouterr()
    with pytest.raises(SystemExit, match="2"):
        call(*argv)
    text = capsys.readouterr().err
    assert "Traceback" not in text
    *_, last = text.strip().splitlines()
    assert last.startswith("error: ")
    return last.removeprefix("error: ")


# -- recipes -------------------------------------------------------------------------------------


def test_every_table_and_figure_is_a_recipe() -> None:
    papers = {f"table{k}" for k in (1, 2, 3, 4)} | {f"fig{k}" for k in (1, 5, 6, 7)}
    assert papers | {"embedded", "smoke", "matched"} < set(RECIPES)


def test_table1_trains_its_rows_at_the_papers_resolutions(faces: Path) -> None:
    assert rows(faces) == ["hr", "mm", *TRUNKS, "bt"] and list(record(faces)["columns"]) == TABLE1
    small = [f"{row}-{r}" for row in ("mm", "bt") for r in (7, 14, 28)]
    steps = logged(faces)
    assert list(steps) == [*TRUNKS, *small]
    # of equal images and weights, and sizes drawn in three ways
    assert len({steps[row][0]["cls"] for row in TRUNKS}) == 3
    costs = record(faces, "costs")
    for r in ("7", "14", "28"):  # a branch is stored and spent less than enlarging to 112 is
        for count in ("parameters", "macs"):
            assert costs["bt"][r][count] < costs["mr"][r][count]
        assert costs["mm"][r]["macs"] == costs["bt"][r]["macs"]
    assert costs["bt"]["112"] == costs["mr"]["112"]
    model = load_student(faces)
    assert model.resolutions == (7, 14, 28, 112) and model.trunk.size == 112


def test_table1_is_a_mean_over_the_bins_beside_the_pack_with_the_gains_of_the_mean(
    train: Train, disk: Path, faces: Path
) -> None:
    """At two resolutions, for 40 images of a .bin take long at 112 px."""
    run = train("table1", *SMALL, "--data.root", disk / "pack", "--trunk-run", faces,
                "--resolutions", 14, 112, "--students", *FOUR)  # fmt: skip
    mean = record(run, "mean")
    assert mean["test sets"] == ["results-agedb_30.json", "results.json"]
    one, other = values(run), values(run, "results-agedb_30")
    assert one != other and list(mean["rows"]) == FOUR
    for row, cells in mean["rows"].items():
        assert list(cells) == ["112&14", "14&14", "112&112"]
        for column, value in cells.items():
            assert value == pytest.approx((one[row][column] + other[row][column]) / 2)
    assert any(mean["gains"].values())
    for row in FOUR[1:]:
        for column, gain in mean["gains"][row].items():
            a, b = column.split("&")
            least, most = (mean["rows"][k][column] for k in ("hr", "mm" if a == b else "mr"))
            assert gain == pytest.approx((mean["rows"][row][column] - least) / abs(most - least))


@pytest.mark.parametrize("on", ["lfw", "survface"])
def test_table1s_run_is_scored_on_other_faces(faces: Path, disk: Path, on: str) -> None:
    text = evaluate(faces, on, str(disk / on))
    if on == "lfw":
        assert rows(faces, "eval-lfw") == rows(faces)
        assert list(record(faces, "eval-lfw")["columns"]) == TABLE1
        assert text.startswith("verification")
    else:
        assert rows(faces, "eval-survface") == [*STRATEGIES, "hr", *TRUNKS]
        sizes = [Image.open(p).size for p in (disk / on).glob("Face_Id*/*/*.png")]
        known = np.array([7, 14, 28, 112])
        longer, shorter = (np.array([f(s) for s in sizes]) for f in (max, min))
        up = known[np.searchsorted(known, longer)]  # the first not below
        down = known[np.maximum(np.searchsorted(known, shorter, "right") - 1, 0)]
        routed = record(faces, "eval-survface")["notes"]["images by resolution"]
        assert len(sizes) == 4 * 3 + 10 and set(up) == set(known)
        for name, ways in (("max+ceil", up), ("min+floor", down)):
            assert routed[name] == {str(r): int((ways == r).sum()) for r in known}
        assert "tpir20_at_fpir_0.1" in record(faces, "eval-survface")["columns"]


def test_table2_goes_on_from_table1s_trunk_and_branches(tuned: Path, faces: Path) -> None:
    """At rate 0 all is where it began, but for the classifier of other people and statistics."""
    run = tuned
    assert settings(run)["data"]["name"] == "survface"
    assert list(logged(run)) == ["mr", "bt-7", "bt-14", "bt-28"]
    assert rows(run, "results-native") == [*STRATEGIES, "mr"]
    assert not (run / "results.json").exists()  # natively small: there is nothing to bring down
    for name in ("mr", "bt-7", "bt-14", "bt-28"):
        ours, theirs = weights(run, name), weights(faces, name)
        assert ours.keys() == theirs.keys()
        for key, value in ours.items():
            if not key.startswith("head.") and "running" not in key and "tracked" not in key:
                assert torch.equal(value, theirs[key]), (name, key)
    assert len(weights(run, "mr")["head.weight"]) == 6


def test_table2s_run_is_scored_again_as_it_was(tuned: Path, disk: Path) -> None:
    evaluate(tuned, "survface", str(disk / "survface"))
    again, first = (values(tuned, name) for name in ("eval-survface", "results-native"))
    assert again == first


def test_table3_takes_the_trunk_of_table1(train: Train, disk: Path, faces: Path) -> None:
    run = train("table3", *SMALL, "--data.root", disk / "pack", "--trunk-run", faces,
                *lfw(disk))  # fmt: skip
    assert rows(run) == ["mm", *BRANCHES]
    assert list(record(run)["columns"]) == ["112&14", "14&14", "112&112"]
    assert list(logged(run)) == ["mm-14", "pretrain-14", "bct-14", "fixed-14", "bt-14"]
    assert same_bits(weights(run, "mr"), weights(faces, "mr"))
    # Eq. 2 in the last row only; three rows begin with one classifier, bt with the same loss
    assert {name for name, steps in logged(run).items() if "branch" in steps[0]} == {"bt-14"}
    first = {name: steps[0]["cls"] for name, steps in logged(run).items()}
    assert first["bct-14"] == first["pretrain-14"]  # a fixed classifier gets no gradient
    assert first["bt-14"] == first["fixed-14"]
    assert first["mm-14"] != first["pretrain-14"]
    for name in ("pretrain-14", "bct-14"):  # a network of its own
        assert "fc.weight" in weights(run, name)
    assert "fc.weight" not in weights(run, "bt-14")


def test_table4_trains_one_trunk_for_its_three_losses(train: Train, disk: Path) -> None:
    last = train("table4", *SMALL, "--data.root", disk / "pack",
                 *lfw(disk))  # fmt: skip
    runs = sorted(last.parent.glob("table4-*"), key=lambda p: p.stat().st_mtime_ns)
    made = [settings(run) for run in runs]
    assert [m["influence"] for m in made] == ["cosface", "arcface", "curricularface"]
    assert [m["trunk_run"] for m in made] == ["", str(runs[0]), str(runs[0])]
    assert [list(logged(run)) for run in runs] == [["mr", "bt-14"], ["bt-14"], ["bt-14"]]
    assert all(same_bits(weights(run, "mr"), weights(runs[0], "mr")) for run in runs)
    first = [logged(run)["bt-14"][0] for run in runs]
    assert len({step["cls"] for step in first}) == 3 and len({s["branch"] for s in first}) == 1
    assert all(rows(run) == ["bt"] for run in runs)


def test_fig7_is_drawn_of_the_runs_that_it_is_given(
    train: Train, disk: Path, faces: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its ends are iresnet50's: of a unit a stage there are others, but for the whole network."""
    at = (*SMALL, "--data.root", disk / "pack", "--trunk-run", faces, *lfw(disk))
    said = refused(capsys, train, "fig7", *at)
    assert said == (
        "--end stage1.3: small-iresnet has no such part (stem, stage1.1, stage2.1, stage3.1, "
        "stage4.1, head)"
    )
    run = train("fig7", *at, "--only", len(ENDS))
    assert settings(run)["end"] == "head"
    assert looks_drawn(run / "ends.png") and (run / "ends.svg").is_file()
    points = record(run, "ends")["points"]
    assert [p["setting"] for p in points] == ["112&14", "14&14"]
    shared = load_student(faces).stored_parameters(14)  # of the paper's own end
    assert all(p["parameters"] > shared and p["name"] == "head" for p in points)
    for p in points:
        assert p["accuracy"] == values(run)["bt"][p["setting"]]


def test_fig1_measures_what_up_sampling_costs(train: Train) -> None:
    run = train("fig1", "--data.identities", 3, "--data.test", 24)
    assert looks_drawn(run / "error.png")
    found = record(run, "error")
    assert (found["images"], found["side"]) == (3, 112)
    points = found["points"]
    assert [p["resolution"] for p in points] == list(range(4, 112, 4))
    # ever less is lost, and the bound falls with the square of the resolution
    assert points[0]["mean"] > points[5]["mean"] > points[-1]["mean"] > 0
    assert points[0]["bound"] == pytest.approx(points[1]["bound"] * 4)


def test_fig5_and_fig6_count_the_papers_networks_without_data(train: Train) -> None:
    stored = train("fig5")
    assert looks_drawn(stored / "storage.png")
    points = {p["resolution"]: p for p in record(stored, "storage")["points"]}
    # published, in parameters of each resolution's delta and of the trunk
    assert {r: points[r]["stored"] for r in (7, 14, 28, 112)} == {
        7: 21_302_848, 14: 2_293_568, 28: 490_688, 112: 43_590_848
    }  # fmt: skip
    for r, p in points.items():
        if "published share" in p:
            assert p["share"] == pytest.approx(p["published share"], abs=0.05), r
    spent = train("fig6", "--resolutions", 14, 112)
    assert looks_drawn(spent / "cost.png")
    macs = {p["resolution"]: p["macs"] / 1e9 for p in record(spent, "cost")["points"]}
    assert macs == pytest.approx({14: 4.276, 112: 6.309}, rel=0.01)
    for run in (stored, spent):
        assert not (run / "metrics.jsonl").exists() and not (run / "results.json").exists()


@pytest.mark.slow  # table3 is the same on a pack
def test_ablation_training_is_table3_on_procedural_faces(train: Train) -> None:
    run = train("ablation-training", *DRAWN)
    assert rows(run) == ["mr", "mm", *BRANCHES]
    assert list(record(run)["columns"]) == ["48&12", "12&12", "48&48"]
    assert rows(run, "results-rank1") == rows(run)
    assert rows(run, "results-native") == [*STRATEGIES, "mr"]


@pytest.mark.slow  # table4 is the same on a pack
def test_ablation_influence_differs_in_one_loss(train: Train) -> None:
    last = train("ablation-influence", *DRAWN)
    runs = sorted(last.parent.glob("ablation-influence-*"), key=lambda p: p.stat().st_mtime_ns)
    made = [settings(run) for run in runs]
    assert [m["influence"] for m in made] == ["cosface", "arcface", "curricularface"]
    assert {m["influence_margin"] for m in made} == {0.2}
    assert len({logged(run)["bt-12"][0]["cls"] for run in runs}) == 3


@pytest.mark.slow  # fig7 is the same on a pack
def test_ablation_ends_stores_more_the_later_a_branch_ends(train: Train) -> None:
    last = train("ablation-ends", *DRAWN)
    assert looks_drawn(last / "ends.png")
    points = record(last, "ends")["points"]
    assert {p["setting"] for p in points} == {"48&12", "12&12"}
    names = ["stage1.1", "stage2.1", "stage3.1", "stage4.1", "head"]
    for setting in ("48&12", "12&12"):
        own = [p for p in points if p["setting"] == setting]
        assert [p["name"] for p in own] == names
        assert all(p["low"] <= p["accuracy"] <= p["high"] for p in own)
        assert own == sorted(own, key=lambda p: p["parameters"])
        assert len({p["parameters"] for p in own}) == len(names)
    trunks = last.parent.glob("ablation-ends-*/metrics.jsonl")
    assert sum("mr" in logged(path.parent) for path in trunks) == 1


def test_matched_is_one_resolution_with_the_networks_of_every_paper(train: Train) -> None:
    run = train("matched", *DRAWN)
    made = settings(run)
    assert (made["data"]["hr"], made["data"]["lr"], made["resolutions"]) == (64, 16, [16, 64])
    assert made["teacher"]["name"] == made["student"]["name"] == "small-teacher"
    assert rows(run) == ["hr", "mm", "mr", "bt"]
    assert list(record(run)["columns"]) == ["64&16", "16&16", "64&64"]


# -- bad input -----------------------------------------------------------------------------------


def test_a_missing_pack_is_one_line(
    train: Train, disk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "needs --data.root" in refused(capsys, train, "table1", *SMALL)
    said = refused(capsys, train, "table1", *SMALL, "--data.root", tmp_path)
    assert "has no test part: say what to score on, --data.test-sets NAME=PATH" in said
    trees.write_bin(tmp_path / "lfw.bin", trees.people(4, 2))
    said = refused(capsys, train, "table1", *SMALL, "--data.root", tmp_path)
    assert said == (
        f"{tmp_path / 'train.rec'}: no such file; name a folder with train.rec (and train.idx, "
        "property)"
    )


def test_survface_without_unmated_probes_is_one_line_before_anything_is_trained(
    train: Train, disk: Path, tmp_path: Path, faces: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    people = trees.people(8, 3)
    trees.write_survface(tmp_path, people, people[:0, 0])
    trees.write_folders(tmp_path / "training_set", people)
    unmated = tmp_path / "Face_Identification_Test_Set" / "unmated_probe"
    for words in ("cannot be listed", "no image in it"):
        said = refused(capsys, train, "table2", *SMALL, "--data.root", tmp_path)
        assert said.startswith(f"{unmated}: {words}")
        unmated.mkdir(exist_ok=True)
    said = refused(capsys, scored, faces, "--on", "survface", "--root", tmp_path)
    assert said.startswith(f"{unmated}: no image in it")


def scored(run: Path, *flags: object) -> None:
    """`python eval.py RUN`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["eval.py", *map(str, (run, *flags))])
        cli.guarded(btnet.eval.main)


def test_other_faces_that_are_not_there_are_one_line(
    faces: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "needs --root" in refused(capsys, scored, faces, "--on", "survface")
    said = refused(capsys, scored, faces, "--on", "native")
    assert "only procedural faces have a split of native sizes" in said


def test_a_start_run_that_lacks_a_branch_or_has_another_network_is_one_line(
    train: Train, disk: Path, faces: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before the trunk is trained, which may take days."""
    at = (*SMALL, "--data.root", disk / "survface", "--start-run")
    partial = tmp_path / "partial"
    (partial / "students").mkdir(parents=True)
    for name in ("mr", "bt-14"):
        file = f"students/{name}.safetensors"
        (partial / file).symlink_to(faces / file)
    (partial / "config.json").symlink_to(faces / "config.json")
    runs = tmp_path / "runs"
    said = refused(capsys, train, "table2", *at, partial, "--runs", runs)
    assert said == f"{partial}: no network 'bt-7' (there are: bt-14, mr)"
    said = refused(capsys, train, "table2", *at, faces, "--student.name", "iresnet18",
                   "--runs", runs)  # fmt: skip
    assert f"--start-run {faces}: of other networks (--student.name)" in said
    said = refused(capsys, train, "table2", *at, faces, "--bn", "official", "--end", "head",
                   "--runs", runs)  # fmt: skip
    assert f"--start-run {faces}: of other networks (--end, --bn)" in said
    assert "no run folder here" in refused(capsys, train, "table2", *at, disk, "--runs", runs)
    assert not list(runs.glob("**/metrics.jsonl"))


def test_a_trunk_of_other_people_is_one_line(
    train: Train, tmp_path: Path, faces: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trees.write_pack(tmp_path, trees.people(9, 4))
    trees.write_bin(tmp_path / "lfw.bin", trees.people(4, 2))
    said = refused(capsys, train, "table3", *SMALL, "--data.root", tmp_path, "--trunk-run", faces)
    assert f"--trunk-run {faces}: trained otherwise (8 classes, not 9)" in said


def test_class_folders_of_objects_are_one_line(
    train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for part in ("train", "test"):  # the same classes: objects to be told apart
        trees.write_folders(tmp_path / part, trees.people(3, 2))
    said = refused(capsys, train, "table1", *SMALL, "--data.name", "folder",
                   "--data.root", tmp_path)  # fmt: skip
    assert said == "--data.name folder: BTNet compares embeddings, give it identities"


# -- at their own size ---------------------------------------------------------------------------


@pytest.mark.slow
def test_iresnet50_takes_two_steps_of_trunk_and_of_a_branch(train: Train, disk: Path) -> None:
    run = train("table3", "--data.root", disk / "pack", "--students", "bt", "--trunk-optim.batch",
                8, "--branch-optim.batch", 8, *lfw(disk))  # fmt: skip
    assert settings(run)["student"]["name"] == "iresnet50"
    found = logged(run)
    assert {name: [x["step"] for x in steps] for name, steps in found.items()} == {
        "mr": [0, 1], "bt-14": [0, 1]
    }  # fmt: skip
    assert all(np.isfinite(x["loss"]) for steps in found.values() for x in steps)
    costs = record(run, "costs")["bt"]
    assert (costs["14"]["parameters"], costs["112"]["parameters"]) == (2_293_568, 43_590_848)

"""HORKD's two stages, recipes and scores as a whole."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from horkd.config import RECIPES, arms, members
from horkd.eval import evaluate
from horkd.losses import L_C
from horkd.model import Projector, Regressor
from horkd.stages import centers_of
from horkd.train import load_student, main, train
from shared import cli, models
from shared.config import locate
from shared.data.pipeline import Loader, Resident, normalise
from shared.data.sets import load
from shared.models.recogniser import Recogniser
from tests.conftest import tiny_horkd
from tests.forked import forked

ROWS = ["alone", "alone-long", "kd", "rkd", "direct", "assistant", "horkd"]
WEIGHTS = {"L1": 1.0, "L2": 0.02, "L3": 0.01, "LC": 1.0}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
    torch.set_num_threads(1)
    return train(tiny_horkd(tmp_path_factory.mktemp("runs"), cache))


def table(run: Path, name: str = "results") -> dict:
    return json.loads((run / f"{name}.json").read_text())


def logged(run: Path) -> list[dict]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [x for x in lines if "loss" in x and x["phase"] != "teacher"]


def same_bits(one: Path, other: Path) -> bool:
    ours, theirs = load_file(one), load_file(other)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


# -- recipes -------------------------------------------------------------------------------------


def test_every_recipe_names_networks_that_take_its_images() -> None:
    every = [one for recipe in RECIPES.values() for run in members(recipe)
             for one in (*arms(run).values(), run)]  # fmt: skip
    students = {(one.student, one.data.lr_input) for one in every}
    for network, size in sorted(students, key=str):
        student = Recogniser(network, size, 4).eval()
        with torch.inference_mode():
            assert student(torch.zeros(2, 3, size, size)).shape == (2, student.dim)
    assert {one.teacher.name for one in every} <= set(models.MODELS)


def test_published_settings_are_the_papers() -> None:
    """Eq. 8's weights (Sec. 4.4), the sizes of Table 4, the networks of Sec. 4.1 to 4.3."""
    for name, recipe in RECIPES.items():
        for one in members(recipe):
            assert (one.l1, one.alpha, one.beta, one.gamma) == (1.0, 0.02, 0.01, 1.0), name
            assert one.reduction == ("image" if name == "table1" else "sum")
            assert one.penalty == "squared"
    found = {(m.data.name, m.data.hr, m.data.lr) for m in members(RECIPES["table4"])}
    sizes = (224, 160, 128, 96)  # 256 is the assistant
    assert found == {(d, 256, s) for d in ("cars196", "cub", "sop") for s in sizes}
    assert [m.cls for m in members(RECIPES["table1"])] == [1.0] * 3
    assert [m.cls for m in members(RECIPES["table2"])] == [0.0] * 2
    named = [(m.student.name, m.data.lr) for m in members(RECIPES["table1"])]
    assert named == [("ResNet18", 16), ("vgg11", 16), ("ResNet18", 32)]


def test_arms_are_what_their_names_say() -> None:
    found = arms(RECIPES["embedded"])
    assert list(found) == ROWS
    taught = {name: one.stages for name, one in found.items()}
    assert [n for n, stage in taught.items() if stage == "2"] == ["horkd"]
    assert [n for n, stage in taught.items() if stage == "1"] == ["assistant"]
    assert found["assistant"].data.lr == found["assistant"].data.hr == 64
    assert found["assistant"].student == RECIPES["embedded"].assistant
    rkd = found["rkd"]
    assert (rkd.l1, rkd.alpha, rkd.beta, rkd.gamma) == (0, 25, 50, 0)
    assert (rkd.reduction, rkd.penalty) == ("rkd", "huber")
    students = (*ROWS[:4], "at")
    paper = arms(replace(RECIPES["embedded"], cls=0.0, kd=0.5, fitnet=2.0, students=students))
    assert {name: one.cls for name, one in paper.items() if name in ROWS[:4]} == {
        "alone": 1.0, "alone-long": 1.0, "kd": 0.0, "rkd": 0.0
    }  # fmt: skip
    others = {name: (one.kd, one.fitnet, one.attention) for name, one in paper.items()}
    assert others.pop("kd") == (0.5, 0, 0) and others.pop("at") == (0, 0, 1000)
    assert set(others.values()) == {(0, 0, 0)}
    assert found["alone-long"].optim.epochs == 2 * found["alone"].optim.epochs


def test_the_ablation_has_every_subset_of_the_terms() -> None:
    config = RECIPES["ablation-terms"]
    found = arms(config)
    names = [n for n in found if n != "alone"]
    assert len(names) == 15
    for n in range(1, 5):
        for subset in combinations(WEIGHTS, n):
            one = found["+".join(subset)]
            weights = dict(zip(WEIGHTS, (one.l1, one.alpha, one.beta, one.gamma), strict=True))
            assert weights == {t: w if t in subset else 0.0 for t, w in WEIGHTS.items()}
            assert one.stages == "direct"


@pytest.mark.parametrize(
    ("stages", "rows"),
    [
        ("1", ["assistant"]),
        ("2", ["horkd"]),
        ("both", ["alone", "direct", "assistant", "horkd"]),
        ("direct", ["alone", "horkd"]),
    ],
)
def test_stages_choose_what_is_trained(stages, rows: list[str]) -> None:
    config = replace(RECIPES["embedded"], stages=stages, students=("alone", "direct", "horkd"))
    found = arms(config)
    assert list(found) == rows
    if "horkd" in found:
        assert found["horkd"].stages == ("direct" if stages == "direct" else "2")


# -- the loop ------------------------------------------------------------------------------------


def test_loss_terms_add_up_to_eq8_beside_the_task_loss(run: Path) -> None:
    weights = {arm: {} for arm in ("alone", "alone-long")} | {
        "kd": {"kd": 1.0}, "rkd": {"L2": 25.0, "L3": 50.0},
        "direct": WEIGHTS, "assistant": WEIGHTS, "horkd": WEIGHTS,
    }  # fmt: skip
    assert {x["phase"] for x in logged(run)} == set(weights)
    for x in logged(run):
        terms = weights[x["phase"]]
        expected = x["cls"] + sum(w * x[term] for term, w in terms.items())
        assert x["loss"] == pytest.approx(expected, rel=1e-5)
        assert all(x[t] > 0 for t in terms)
        assert not ({"L1", "L2", "L3", "LC", "kd"} - set(terms)) & set(x)


def test_students_of_one_size_start_from_the_same_weights_and_see_the_same_images(
    run: Path,
) -> None:
    first = {x["phase"]: x["cls"] for x in logged(run) if x["step"] == 0}
    assistant = first.pop("assistant")
    assert len(set(first.values())) == 1 and assistant not in first.values()


def test_the_first_step_of_stage_2_is_eq7_of_the_assistants_features_and_centres(
    run: Path, tmp_path: Path, cache: Path
) -> None:
    """By hand: centres of the assistant's unit features of all training images, and a student
    that starts where the run's did, on the run's first batch."""
    config = tiny_horkd(tmp_path, cache)
    data = load(config.data, cache=locate(config.cache), teacher_identities=8)
    assistant = load_student(run, "assistant")
    seen = normalise(data.train.pixels, config.data)
    with torch.inference_mode():
        f = F.normalize(assistant.recogniser(seen))
    y = data.train.labels
    u = torch.stack([f[y == c].double().mean(0).float() for c in range(8)])
    order = torch.Generator().manual_seed(config.seed << 20)
    index = torch.randperm(len(y), generator=order)[:16]
    loader = Loader(data.train, config.data, 16, seed=config.seed, device=torch.device("cpu"))
    batch = next(loader.epoch(0))
    assert torch.equal(batch.index, index)
    torch.manual_seed(config.seed)
    student = Recogniser(config.student, 16, 8).to(memory_format=torch.channels_last).train()
    with torch.inference_mode():
        g = F.normalize(student(batch.x_l()))
        taught = F.normalize(assistant.recogniser(batch.x_h()))
    (first,) = [x for x in logged(run) if x["phase"] == "horkd" and x["step"] == 0]
    assert first["LC"] == pytest.approx(float(L_C(taught, g, u)), rel=1e-4)


def test_stage_1_then_stage_2_of_its_assistant_are_both_in_one_bit_for_bit(
    run: Path, tmp_path: Path, cache: Path
) -> None:
    config = tiny_horkd(tmp_path, cache, students=("horkd",))
    one = train(replace(config, stages="1"))
    assert not (one / "student.safetensors").exists()
    assert same_bits(one / "students/assistant.safetensors", run / "students/assistant.safetensors")
    two = train(replace(config, stages="2", assistant_run=str(one)))
    assert same_bits(two / "student.safetensors", run / "student.safetensors")
    assert list(table(two)["rows"]) == ["teacher, HR", "teacher, LR", "horkd"]


def test_an_assistant_of_another_network_is_refused(
    run: Path, tmp_path: Path, cache: Path
) -> None:
    config = tiny_horkd(tmp_path, cache, students=("horkd",), stages="2", assistant_run=str(run))
    other = replace(config, assistant=replace(config.assistant, name="small-teacher"))
    with pytest.raises(ValueError, match="trained otherwise .--assistant."):
        train(other)
    other = replace(config, data=replace(config.data, instances=9))
    with pytest.raises(ValueError, match="trained otherwise .--data.instances."):
        train(other)
    with pytest.raises(ValueError, match="no run folder here"):
        train(replace(config, assistant_run=str(tmp_path)))
    assert not list(tmp_path.glob("runs/horkd/*/metrics.jsonl"))  # before anything is trained


def test_the_sums_over_the_images_are_the_mean_of_every_image(
    run: Path, tmp_path: Path, cache: Path
) -> None:
    config = tiny_horkd(tmp_path, cache, students=("horkd",), reduction="image", stages="direct")
    first = logged(train(config))[0]
    (summed,) = [x for x in logged(run) if x["phase"] == "direct" and x["step"] == 0]
    for term in WEIGHTS:
        assert first[term] == pytest.approx(summed[term], rel=1e-5)
    eq8 = sum(w * first[t] for t, w in WEIGHTS.items())
    assert first["loss"] == pytest.approx(first["cls"] + eq8 / 16, rel=1e-5)


def test_centres_leave_out_images_that_could_not_be_decoded(tmp_path: Path, cache: Path) -> None:
    class Teacher:
        def embeddings(self):
            return np.array([[3.0, 4.0], [0.0, 0.0], [0.0, 2.0]], np.float32)

    images = Resident(np.zeros((3, 3, 2, 2), np.uint8), np.array([0, 0, 1]))
    data = SimpleNamespace(train=images, classes=2)
    assert torch.allclose(centers_of(Teacher(), data), torch.tensor([[0.6, 0.8], [0.0, 1.0]]))


def test_a_student_can_start_from_the_assistant(run: Path, tmp_path: Path, cache: Path) -> None:
    config = tiny_horkd(tmp_path, cache, students=("horkd",), stages="2", assistant_run=str(run))
    found = logged(train(replace(config, student_init="assistant")))
    ours = [x for x in logged(run) if x["phase"] == "horkd"]
    assert found[0]["loss"] != ours[0]["loss"]


def test_an_interrupted_run_ends_in_the_same_bits(run: Path, tmp_path: Path, cache: Path) -> None:
    """Killed in stage 2: the assistant is not trained again, and its outputs are found."""
    config = tiny_horkd(tmp_path, cache, students=("horkd",), checkpoint_seconds=0.0)
    part = tmp_path / "part"
    stop = (
        "import sys; from pathlib import Path\n"
        "from shared.phase import Phase\n"
        "from tests.conftest import tiny_horkd; from horkd.train import train\n"
        "log = Phase.log\n"
        "def once(self, batch, **terms):\n"
        "    if self.name == 'horkd' and self.step == 5: sys.exit(7)\n"
        "    return log(self, batch, **terms)\n"
        "Phase.log = once\n"
        f"train(tiny_horkd(Path({str(tmp_path)!r}), Path({str(cache)!r}), students=('horkd',),\n"
        f"      checkpoint_seconds=0.0, folder={str(part)!r}))\n"
    )
    assert forked("-c", stop).returncode == 7
    assert not (part / "results.json").exists()
    train(replace(config, folder=str(part), resume=str(part)))
    for name in ("student.safetensors", "students/assistant.safetensors"):
        assert same_bits(part / name, run / name)


def test_every_reduction_and_baseline_trains(tmp_path: Path, cache: Path) -> None:
    config = tiny_horkd(tmp_path, cache, stages="direct", cls=0.0)
    config = replace(config, students=("fitnet", "at", "horkd", "L2+L3+LC"))
    for reduction in ("mean", "rkd"):
        found = logged(train(replace(config, reduction=reduction, penalty="huber")))
        for x in found:
            if x["phase"] in ("fitnet", "at"):
                assert x[x["phase"]] > 0
            else:
                assert x["L2"] > 0 and ("L1" in x) == (x["phase"] == "horkd")
                weighted = sum(w * x.get(t, 0.0) for t, w in WEIGHTS.items())
                assert x["loss"] == pytest.approx(weighted, rel=1e-5)  # no task loss


def test_metric_learning_needs_no_classes(tmp_path: Path, cache: Path) -> None:
    config = tiny_horkd(tmp_path, cache, students=("alone", "horkd"), cls=0.0)
    none = {"head": "none", "margin": 0.2}
    config = replace(
        config,
        data=replace(config.data, name="objects-retrieval"),
        teacher=replace(config.teacher, **none),
        assistant=replace(config.assistant, **none),
        student=replace(config.student, **none),
    )
    run = train(config)
    assert list(table(run)["columns"]) == ["recall1"]
    assert all(x["LC"] > 0 for x in logged(run) if x["phase"] == "horkd")
    assert any(x["cls"] > 0 for x in logged(run) if x["phase"] == "alone")


# -- scores --------------------------------------------------------------------------------------


def test_the_assistant_is_scored_at_hr(run: Path) -> None:
    rows = table(run)["rows"]
    assert [r for r in rows if "teacher" not in r] == [
        "assistant, HR" if row == "assistant" else row for row in ROWS
    ]
    assistant, student = rows["assistant, HR"], rows["horkd"]
    assert assistant["macs"] > student["macs"]
    found = load_student(run, "assistant")
    assert found(torch.zeros(2, 3, 64, 64, dtype=torch.uint8)).shape == (2, 128)


def test_eval_scores_every_network_of_the_run(run: Path) -> None:
    evaluate(run, "test")
    kept = table(run, "eval-test")["rows"]
    ours = {row: cells for row, cells in table(run)["rows"].items() if "teacher" not in row}
    assert list(kept) == list(ours)
    assert all(kept[row]["metrics"] == ours[row]["metrics"] for row in ours)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--students", "horkd", "L2+L5"], "--students L2+L5: no such row"),
        (["--students", "horkd", "horkd"], "name each once"),
        (["--beta", "-1"], "--beta -1.0: must be 0 or more"),
        (["--stages", "2"], "--stages 2 and --assistant-run RUN go together"),
        (["--assistant-run", "runs"], "--stages 2 and --assistant-run RUN go together"),
        (["--stages", "3"], "stages"),
        (["--stages", "direct", "--students", "direct"], "--stages direct trains none of them"),
        (["--temperature", "0"], "--temperature and --long must be above 0"),
        (["--student.head", "none", "--students", "alone", "--images-per-class", "5"], "multiple"),
        (["--figure", "curve"], "--figure curve: embedded is no curve over one field"),
        (["--figure", "terms"], "--figure terms: no row of --students is of terms"),
        (["--student.head", "none"], "--students kd: there are no logits with head none"),
    ],
)
def test_a_bad_flag_is_one_line(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str], flags: list[str], said: str,
) -> None:  # fmt: skip
    argv = ["train.py", "--runs", str(tmp_path), "--cache", str(cache), *flags]
    monkeypatch.setattr(sys, "argv", argv)
    with pytest.raises(SystemExit, match="2"):
        cli.guarded(main)
    *_, last = capsys.readouterr().err.strip().splitlines()
    assert last.startswith("error: ") and said in last


# -- what is added for training ------------------------------------------------------------------


def test_projector_is_there_only_where_sizes_differ() -> None:
    g = torch.randn(3, 5)
    assert torch.equal(Projector(5, 5)(g), g) and not list(Projector(5, 5).parameters())
    assert Projector(5, 7)(g).shape == (3, 7)


def test_regressor_brings_the_students_map_to_the_teachers_channels_and_the_smaller_size() -> None:
    config = RECIPES["embedded"]
    student = Recogniser(config.student, 16, 4)
    teacher = Recogniser(config.teacher, 64, 4)
    regressor = Regressor(student, teacher, config.data)
    _, ours = student(torch.randn(2, 3, 16, 16), maps=True)
    _, theirs = teacher(torch.randn(2, 3, 64, 64), maps=True)
    made, wanted = regressor(ours, theirs)
    assert made.shape == (2, 64, 8, 8) == wanted.shape and ours["stage2"].shape == (2, 32, 8, 8)
    assert theirs["stage2"].shape == (2, 64, 8, 8)
    made, wanted = regressor(ours, {"stage2": torch.arange(512.0).view(2, 1, 16, 16)})
    assert made.shape[2:] == (8, 8)
    assert wanted[1, 0, 0, 0] == (256 + 257 + 272 + 273) / 4

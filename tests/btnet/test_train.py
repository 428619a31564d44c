"""BTNet's run as a whole: trunk, branches, baselines, tables."""

from __future__ import annotations

import copy
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from btnet.config import BRANCHES, RECIPES, arms, members
from btnet.eval import evaluate
from btnet.model import Branch, BTNet
from btnet.networks import finished, influence, trunk_of
from btnet.train import load_student, main, train
from shared import cli
from shared.config import locate
from shared.data.pipeline import Loader
from shared.data.sets import load
from shared.models import build
from tests.conftest import tiny_btnet
from tests.forked import forked

SETTINGS = ["48&6", "48&12", "48&24", "6&6", "12&12", "24&24", "48&48"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
    torch.set_num_threads(1)
    return train(tiny_btnet(tmp_path_factory.mktemp("runs"), cache))


def table(run: Path, name: str = "results") -> dict:
    return json.loads((run / f"{name}.json").read_text())


def logged(run: Path) -> list[dict]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [x for x in lines if "cls" in x]


def same_bits(one: Path, other: Path) -> bool:
    ours, theirs = load_file(one), load_file(other)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


# -- configuration -------------------------------------------------------------------------------


def test_rows_of_table3_each_have_one_thing_more() -> None:
    config = RECIPES["table3"]
    found = {name: arm for name, arm in arms(config).items() if arm.row != "mr"}
    assert list(found) == [f"{row}-14" for row in ("mm", *BRANCHES)]
    facts = [
        (a.from_trunk, a.fixed_classifier, a.end, a.lambda_branch) for a in found.values()
    ]
    assert facts == [
        (False, False, "head", 0.0),  # scratch
        (True, False, "head", 0.0),  # + pretraining
        (True, True, "head", 0.0),  # + BCT
        (True, True, "", 0.0),  # + fix trunk
        (True, True, "", 0.5),  # + branch distillation
    ]
    assert [a.optim for a in found.values()] == [config.optim] + [config.branch_optim] * 4


def test_published_settings_are_the_papers() -> None:
    """Eq. 3's weight, the schedule and head of Sec. 3.3, the sizes of Table 1."""
    config = RECIPES["table1"]
    assert config.resolutions == (7, 14, 28, 112) and config.data.kernel == "bilinear"
    for network in (config.teacher, config.student):
        assert (network.name, network.head) == ("iresnet50", "curricularface")
        assert (network.scale, network.margin) == (64.0, 0.5)
    assert config.optim == config.trunk_optim == config.teacher.optim
    o = config.optim
    assert (o.lr, o.batch, o.epochs, o.weight_decay, o.momentum) == (0.2, 512, 25, 5e-4, 0.9)
    assert (o.schedule, o.power, o.warmup * o.epochs, o.clip) == ("poly", 2.0, 2.0, 5.0)
    assert (config.branch_optim.lr, config.branch_optim.epochs) == (0.02, 10)
    for name, recipe in RECIPES.items():
        for one in members(recipe):
            assert one.lambda_branch == 0.5 or not name.startswith(("table", "fig"))
            assert one.branch_mse == "official"
            assert (one.bn, one.embedding_mse) == ("paper", "paper")
    assert [m.influence for m in members(RECIPES["table4"])] == [
        "cosface", "arcface", "curricularface"
    ]  # fmt: skip


# -- training ------------------------------------------------------------------------------------


def test_terms_add_up_to_eq3_and_only_branches_are_distilled(run: Path) -> None:
    found = logged(run)
    small = {f"{row}-{r}" for row in ("mm", "bt") for r in (6, 12, 24)}
    assert {x["phase"] for x in found} == {"mr"} | small
    for x in found:
        assert ("branch" in x) == x["phase"].startswith("bt")
        assert x["loss"] == pytest.approx(x["cls"] + 10 * x.get("branch", 0.0), rel=1e-5)
        assert x.get("branch", 1.0) > 0


def test_the_first_step_of_a_branch_is_eq1_and_eq2_by_hand(
    run: Path, tmp_path: Path, cache: Path
) -> None:
    """Input at r, kappa* of the trunk, z_s the trunk's map of the HR view in evaluation mode."""
    config = tiny_btnet(tmp_path, cache)
    data = load(config.data, cache=locate(config.cache))
    seen = replace(config.data, lr=12)
    loader = Loader(data.train, seen, 16, seed=config.seed, device=torch.device("cpu"))
    batch = next(loader.epoch(0))
    trunk = trunk_of(run, config)
    branch = Branch(trunk.backbone, 12).train()
    e, maps = branch(batch.x_l().contiguous(memory_format=torch.channels_last))
    head = copy.deepcopy(trunk.head)
    with torch.no_grad():
        # the small trunk has one unit a stage: side 12 is stage 2
        stages = trunk.backbone(batch.x_h())[1]
        cosine = F.normalize(e) @ F.normalize(head.weight).T
        cosine[torch.arange(16), batch.y] -= config.student.margin
        cls = F.cross_entropy(config.student.scale * cosine, batch.y)
        mse = (maps["z"] - stages["stage2"]).square().mean()
    (first,) = [x for x in logged(run) if x["phase"] == "bt-12" and x["step"] == 0]
    assert first["cls"] == pytest.approx(float(cls), rel=1e-4)
    assert first["branch"] == pytest.approx(float(mse), rel=1e-4)


def test_branches_leave_the_trunk_as_it_was(run: Path, tmp_path: Path, cache: Path) -> None:
    config = tiny_btnet(tmp_path, cache)
    trunk = load_file(run / "students" / "mr.safetensors")
    for r in (6, 12, 24):
        branch = finished(run, config, f"bt-{r}")
        whole = branch.network.state_dict()
        for name in branch.shared:
            assert torch.equal(whole[name], trunk[f"backbone.{name}"])
        delta = load_file(run / "students" / f"bt-{r}.safetensors")
        assert not branch.shared & set(delta)
        moved = [k for k, v in delta.items() if not torch.equal(v, trunk[f"backbone.{k}"])]
        assert any("running_mean" in k for k in moved) and any("conv" in k for k in moved)


def test_the_kept_trunk_and_deltas_are_the_student_bit_for_bit(run: Path) -> None:
    trunk = build("small-iresnet", size=48, classes=1)
    trunk.load_state_dict(load_file(run / "student.safetensors"))
    model = BTNet((6, 12, 24, 48), trunk).eval()
    found = {model.load_branch(path) for path in (run / "branches").glob("*.safetensors")}
    assert found == {6, 12, 24}
    student = load_student(run)
    sizes = [(5, 6), (20, 24), (48, 48), (9, 11), (60, 50), (1, 1)]
    images = [torch.randint(0, 256, (3, h, w), dtype=torch.uint8) for h, w in sizes]
    with torch.inference_mode():
        assert torch.equal(model(images), student(images))
        assert student(torch.rand(2, 3, 12, 12)).shape == (2, 128)


def test_a_trunk_of_another_run_gives_the_same_branches(
    run: Path, tmp_path: Path, cache: Path
) -> None:
    config = tiny_btnet(tmp_path, cache, students=("bt",), trunk_run=str(run))
    found = train(config)
    assert {x["phase"] for x in logged(found)} == {"bt-6", "bt-12", "bt-24"}
    for r in (6, 12, 24):
        name = f"students/bt-{r}.safetensors"
        assert same_bits(found / name, run / name)
    assert list(table(found)["rows"]) == ["bt"]
    other = replace(config, data=replace(config.data, instances=9))
    with pytest.raises(ValueError, match="trained otherwise .--data.instances."):
        train(other)


def test_an_interrupted_run_ends_in_the_same_bits(run: Path, tmp_path: Path, cache: Path) -> None:
    """Killed in the second branch: trunk and first branch are not trained again."""
    part = tmp_path / "part"
    stop = (
        "import sys; from pathlib import Path\n"
        "from shared.phase import Phase\n"
        "from tests.conftest import tiny_btnet; from btnet.train import train\n"
        "log = Phase.log\n"
        "def once(self, batch, **terms):\n"
        "    if self.name == 'bt-12' and self.step == 5: sys.exit(7)\n"
        "    return log(self, batch, **terms)\n"
        "Phase.log = once\n"
        f"train(tiny_btnet(Path({str(tmp_path)!r}), Path({str(cache)!r}), students=('mr', 'bt'),\n"
        f"      checkpoint_seconds=0.0, folder={str(part)!r}))\n"
    )
    assert forked("-c", stop).returncode == 7
    assert not (part / "results.json").exists()
    config = tiny_btnet(tmp_path, cache, students=("mr", "bt"), checkpoint_seconds=0.0)
    train(replace(config, folder=str(part), resume=str(part)))
    for arm in ("mr", "bt-6", "bt-12", "bt-24"):
        name = f"students/{arm}.safetensors"
        assert same_bits(part / name, run / name)


def test_every_switch_changes_the_loss_it_says(run: Path, tmp_path: Path, cache: Path) -> None:
    plain = {x["phase"]: x for x in logged(run) if x["step"] == 0}["bt-12"]
    base = tiny_btnet(tmp_path, cache, students=("bt",), trunk_run=str(run))
    base = replace(base, resolutions=(12, 48), branch_optim=replace(base.branch_optim, epochs=1))

    def first(**changes: object) -> dict:
        return {x["phase"]: x for x in logged(train(replace(base, **changes))) if x["step"] == 0}[
            "bt-12"
        ]

    paper = first(branch_mse="paper")
    elements = 32 * 12 * 12  # of z_r, an image
    assert paper["branch"] == pytest.approx(elements * plain["branch"], rel=1e-4)
    both = first(embedding_mse="official")
    assert both["embedding"] > 0 and both["branch"] == pytest.approx(plain["branch"], rel=1e-5)
    expected = both["cls"] + 10 * (both["branch"] + both["embedding"])
    assert both["loss"] == pytest.approx(expected, rel=1e-5)
    other = first(influence="arcface")
    assert other["cls"] != plain["cls"] and other["branch"] == pytest.approx(plain["branch"])
    official = first(bn="official")
    assert official["cls"] == pytest.approx(plain["cls"], rel=1e-5)  # what is trained differs


def test_all_influence_losses_look_at_kappa_star(run: Path, tmp_path: Path, cache: Path) -> None:
    config = tiny_btnet(tmp_path, cache)
    trunk = trunk_of(run, config)
    feature = torch.randn(4, 128)
    for name in ("curricularface", "cosface", "arcface"):
        head = influence(trunk, replace(config, influence=name, influence_margin=0.3))
        assert torch.allclose(head(feature), trunk.head(feature)) and head.margin == 0.3


def test_table3_trains_all_its_rows(run: Path, tmp_path: Path, cache: Path) -> None:
    config = tiny_btnet(
        tmp_path, cache, students=("mm", *BRANCHES), resolutions=(12, 48), trunk_run=str(run)
    )
    found = train(config)
    assert list(table(found)["rows"]) == ["mm", *BRANCHES]
    costs = table(found, "costs")
    whole = sum(p.numel() for p in build("small-iresnet", size=48, classes=1).parameters())
    for row in ("mm", "pretrain", "bct"):  # but for the shortcut of stage 1, which is no more
        assert 0.98 * whole < costs[row]["12"]["parameters"] <= whole
    assert costs["fixed"]["12"]["parameters"] == costs["bt"]["12"]["parameters"] < whole / 3
    kept = load_file(found / "students/pretrain-12.safetensors")
    fixed = load_file(found / "students/bct-12.safetensors")
    assert kept.keys() == fixed.keys() and "fc.weight" in kept and "fc.weight" not in load_file(
        found / "students/fixed-12.safetensors"
    )


# -- scores --------------------------------------------------------------------------------------


def test_the_table_has_every_setting_and_gains_of_its_own_numbers(run: Path) -> None:
    found = table(run)
    assert list(found["columns"]) == SETTINGS and list(found["rows"]) == ["hr", "mm", "mr", "bt"]
    cells = {row: r["cells"] for row, r in found["rows"].items()}
    value = {row: {c: cell["value"] for c, cell in own.items()} for row, own in cells.items()}
    for column in SETTINGS:
        a, b = column.split("&")
        baseline = value["mm" if a == b else "mr"][column]
        hr, ours = value["hr"][column], value["bt"][column]
        if baseline == hr:
            assert column not in found["gains"]["bt"]
        else:
            expected = (ours - hr) / abs(baseline - hr)
            assert found["gains"]["bt"][column] == pytest.approx(expected)
    # at HR phi_mm is phi_hr, and BTNet its trunk
    assert value["mm"]["48&48"] == value["hr"]["48&48"]
    assert value["bt"]["48&48"] == value["mr"]["48&48"]
    assert set(table(run, "results-rank1")["columns"]) == {*SETTINGS, "templates"}


def test_what_is_stored_and_spent_is_counted_from_the_networks(run: Path) -> None:
    costs = table(run, "costs")
    model = load_student(run)
    for r in (6, 12, 24, 48):
        assert costs["bt"][str(r)]["parameters"] == model.stored_parameters(r)
        assert costs["bt"][str(r)]["macs"] == model.macs(r)
        assert costs["hr"][str(r)]["macs"] == model.macs(48)  # enlarged first
        assert costs["bt"][str(r)]["images_per_second"] > 0
    rows = table(run)["rows"]
    assert rows["bt"]["parameters"] == sum(model.stored_parameters(r) for r in (6, 12, 24, 48))


def test_native_sizes_are_searched_by_nine_strategies(run: Path) -> None:
    found = table(run, "results-native")
    names = [f"{i}+{w}" for i in ("avg", "min", "max") for w in ("floor", "near", "ceil")]
    assert list(found["rows"]) == [*names, "hr", "mr"]
    for counts in found["notes"]["images by resolution"].values():
        assert sum(counts.values()) == 24 * 4 + 24


def test_eval_repeats_the_runs_tables(run: Path) -> None:
    evaluate(run, "test")
    assert table(run, "eval-test")["rows"]["bt"]["metrics"] == table(run)["rows"]["bt"]["metrics"]
    evaluate(run, "native")
    ours, theirs = (table(run, name)["rows"] for name in ("results-native", "eval-native"))
    assert ours.keys() == theirs.keys()
    assert all(ours[row]["metrics"] == theirs[row]["metrics"] for row in ours)


def test_a_trunk_alone_can_be_loaded_and_what_is_not_there_cannot(run: Path) -> None:
    mr = load_student(run, "mr")
    assert mr.resolutions == (48,) and mr([torch.zeros(3, 9, 7)]).shape == (1, 128)
    assert load_student(run, best=True).resolutions == (6, 12, 24, 48)
    with pytest.raises(ValueError, match="no network 'bct-6'"):
        load_student(run, "bct")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--resolutions", "12", "6", "48"], "--resolutions 12 6 48: give two or more, ascending"),
        (["--resolutions", "6", "12"], "the last --data.hr 48"),
        (["--resolutions", "12", "20", "48"], "no branch of 20 px"),
        (["--data.lr", "16"], "--data.lr 16: must be one of --resolutions"),
        (["--students", "bt", "kd"], "--students bt kd: each once, of hr, mm"),
        (["--students", "bt", "--end", "stage9.1"], "--end stage9.1: small-iresnet has no such"),
        (["--student.head", "softmax"], "--student.head softmax: BTNet's classifier"),
        (["--student.name", "resnet8", "--student.head", "cosface"], "cannot be a trunk"),
        (["--lambda-branch", "-1"], "--lambda-branch -1.0: must be 0 or more"),
        (["--trunk-run", "a", "--start-run", "b"], "take one of the two"),
        (["--trunk-run", "nowhere"], "nowhere: no run folder here"),
        (["--figure", "ends"], "--figure ends: smoke does not vary"),
        (["--data.name", "objects"], "BTNet compares embeddings"),
    ],
)
def test_a_bad_flag_is_one_line_before_anything_is_trained(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str], flags: list[str], said: str,
) -> None:  # fmt: skip
    argv = ["train.py", "smoke", "--runs", str(tmp_path), "--cache", str(cache), *flags]
    monkeypatch.setattr(sys, "argv", argv)
    with pytest.raises(SystemExit, match="2"):
        cli.guarded(main)
    *_, last = capsys.readouterr().err.strip().splitlines()
    assert last.startswith("error: ") and said in last
    assert not list(tmp_path.glob("**/metrics.jsonl"))

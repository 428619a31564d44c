"""EmbedKD's recipes are the paper's settings, and what cannot be trained is refused."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
import torch

from embedkd.config import DEVELOPMENT, RECIPES, arms, members, weights
from embedkd.labels import known
from embedkd.networks import check, sizes, stages
from embedkd.train import main
from shared import cli, models
from shared.data.retrieval import CARS, CUB, SOP
from shared.models.recogniser import Recogniser

PAPER = ("table1", "table2", "table3", "table5", "table6", "fig4", "official")
IMAGES = {"cub": CUB["training images"], "cars196": CARS["training images"],
          "sop": SOP["training images"]}  # fmt: skip


def test_every_recipe_names_networks_that_take_its_images() -> None:
    seen = set()
    for one in (one for recipe in RECIPES.values() for one in members(recipe)):
        side = one.data.lr_input
        key = (one.teacher.name, one.student.name, one.student.head, one.students, side)
        if key in seen:
            continue
        seen.add(key)
        check(one, arms(one).values())
        assert one.teacher.name in models.MODELS
        student = Recogniser(one.student, side, 4).eval()
        with torch.inference_mode():
            assert student(torch.zeros(2, 3, side, side)).shape == (2, student.dim)


@pytest.mark.parametrize("name", PAPER)
def test_paper_recipes_are_the_papers_setting(name: str) -> None:
    """Sec. 5.1: Adam 1e-5, batches of 32, 224 of 256 px, flip, ImageNet weights; the official
    code's 4 x 8 images, decay 2e-4 and no schedule."""
    for c in members(RECIPES[name]):
        for o in (c.optim, c.teacher.optim):
            assert (o.method, o.lr, o.batch, o.weight_decay) == ("adam", 1e-5, 32, 2e-4)
            assert (o.schedule, o.milestones, o.warmup, o.clip) == ("step", (), 0.0, 0.0)
        assert (c.images_per_class, c.teacher.images_per_class) == (8, 8)
        assert (c.data.hr, c.data.kept, c.data.flip) == (224, 256, True)
        assert c.data.kernel == "bicubic" and c.relative_mode == "frobenius"
        assert (c.student.head, c.teacher.head, c.teacher.weights) == ("none", "none", "imagenet")
        small = "mobilenet-0.25" if name == "table5" else "imagenet-resnet18"
        large = "imagenet-resnet18" if name == "table6" else "imagenet-resnet101"
        assert (c.student.name, c.teacher.name) == (small, large)
        margin = 0.0 if name == "official" else 0.2
        assert (c.student.margin, c.teacher.margin) == (margin, margin)
        assert c.data.crop == ("resized" if name == "official" else "shift")


def test_epochs_are_the_official_codes_iterations_to_within_one_epoch() -> None:
    wanted = {"cub": 50_000, "cars196": 72_000, "sop": 141_000}
    found = {c.data.name: c for name in ("table1", "table2") for c in members(RECIPES[name])}
    for name, iterations in wanted.items():
        steps = IMAGES[name] // 32
        assert abs(found[name].optim.epochs * steps - iterations) < steps
    half = RECIPES["table3"]
    assert abs(half.optim.epochs * (IMAGES["cub"] // 2 // 32) - 50_000) < 92


def test_lambdas_are_the_official_codes() -> None:
    found = {
        c.data.name: (c.lambda_abs, c.lambda_rel)
        for name in ("table1", "table2")
        for c in members(RECIPES[name])
    }
    assert found == {"cub": (1.0, 0.3), "cars196": (1.5, 0.1), "sop": (2.0, 1.0)}


def test_rows_of_the_tables_are_the_papers() -> None:
    methods = ("alone", "pkt", "darkrank", "abs", "rel", "abs+hint", "rel+hint", "abs+at", "rel+at")
    assert [(c.data.name, c.students) for c in members(RECIPES["table1"])] == [
        ("cub", methods), ("cars196", methods)
    ]  # fmt: skip
    assert RECIPES["table2"].students == ("alone", "abs", "rel")
    assert RECIPES["table5"].students == ("alone", "rel")
    found = [(c.data.name, c.data.quality, c.data.lr) for c in members(RECIPES["table6"])]
    assert found == [
        ("cub", "enlarged", 50), ("cars196", "enlarged", 50),
        ("cub", "unlocalised", 224), ("cars196", "unlocalised", 224),
    ]  # fmt: skip
    assert all(c.data.lr_input == 224 for c in members(RECIPES["table6"]))


def test_fig4_varies_lambda_of_both_teachers_on_a_fifth_of_the_classes() -> None:
    runs = members(RECIPES["fig4"])
    assert all(c.lambda_abs == c.lambda_rel and c.score_on == "development" for c in runs)
    assert len({c.lambda_abs for c in runs}) == len(runs) >= 6
    assert {c.data.development for c in runs} == {20}
    classes = {"cub": 100, "cars196": 98, "sop": 11_318}
    assert {k: round(v / 5) for k, v in classes.items()} == DEVELOPMENT


def test_each_student_has_the_terms_of_its_name() -> None:
    names = (
        "alone", "alone-long", "pkt", "darkrank", "abs", "rel", "abs+hint", "rel+hint", "abs+at",
        "rel+at", "abs+unlabelled", "rel+unlabelled", "abs-only", "rel-only",
    )  # fmt: skip
    config = replace(RECIPES["table3"], students=names)
    found = arms(config)
    terms = {name: set(weights(one)) for name, one in found.items()}
    assert terms == {
        "alone": set(), "alone-long": set(), "pkt": {"pkt"}, "darkrank": {"darkrank"},
        "abs": {"abs"}, "rel": {"rel"}, "abs+hint": {"abs", "hint"}, "rel+hint": {"rel", "hint"},
        "abs+at": {"abs", "at"}, "rel+at": {"rel", "at"}, "abs+unlabelled": {"abs"},
        "rel+unlabelled": {"rel"}, "abs-only": {"abs"}, "rel-only": {"rel"},
    }  # fmt: skip
    seen = {name: (one.labelled, one.unlabelled) for name, one in found.items()}
    assert seen["rel"] == (0.5, 0) and seen["rel+unlabelled"] == (0.5, 32)
    assert seen["abs-only"] == (0.0, 32)
    assert found["alone-long"].optim.epochs == 2 * found["alone"].optim.epochs


def test_half_of_the_images_of_each_class_keep_their_labels() -> None:
    labels = torch.arange(7).repeat_interleave(torch.tensor([60, 41, 1, 59, 2, 10, 5]))
    labels = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(1))]
    kept = known(labels, 0.5, seed=3)
    assert labels[kept].bincount().tolist() == [30, 20, 1, 30, 1, 5, 2]  # round half to even
    assert torch.equal(kept, known(labels, 0.5, seed=3))
    assert not torch.equal(kept, known(labels, 0.5, seed=4))
    assert known(labels, 1.0, seed=3).all()


def test_hints_meet_the_last_3x3_of_a_bottleneck_and_outputs_elsewhere() -> None:
    """Sec. 4.2, footnote 2: 64, 128, 256, 512 channels on both sides."""
    with torch.device("meta"):
        x = torch.zeros(2, 3, 64, 64)
        made = {n: models.create(f"imagenet-resnet{n}")(x)[1] for n in (18, 50)}
    for teacher in (50, 18):
        found = stages(made[18], made[teacher])
        shapes = [(tuple(a.shape[1:]), tuple(b.shape[1:])) for a, b in found]
        sides = ((64, 16), (128, 8), (256, 4), (512, 2))
        assert shapes == [((c, s, s), (c, s, s)) for c, s in sides]
    assert found[0][1] is made[18]["stage1"]
    assert stages(made[18], made[50])[3][1] is made[50]["stage4.inner"]


def test_table4_counts_the_networks_themselves(capsys, monkeypatch) -> None:
    """The spec's 43.55M (the paper's 48.1M is a slip), 11.4M and .345M with the 512-d embedding."""
    monkeypatch.setattr(sys, "argv", ["train.py", "table4"])
    main()
    assert capsys.readouterr().out.strip() == sizes(RECIPES["table4"].count)
    counts = [int(line.split()[1].replace(",", "")) for line in sizes(
        RECIPES["table4"].count).splitlines()]  # fmt: skip
    assert [round(n / 1e6, 2) for n in counts[:2]] == [43.55, 11.44]
    assert round(counts[2] / 1e3) == 345


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--images-per-class", "3"], "--optim.batch 64 is no multiple of --images-per-class 3"),
        (["--images-per-class", "1"], "--images-per-class must be 2 or more"),
        (["--lambda-abs", "-1"], "--lambda-abs -1.0: must be 0 or more"),
        (["--lambda-", "3"], "no flag --lambda-"),
        (["--students", "rel", "rel"], "name each once"),
        (["--students", "rel+hints"], "students"),
        (["--students", "rel-only"], "every image has its label; add --labelled .5"),
        (["--students", "rel-only", "--labelled", ".5", "--unlabelled", "0"], "--unlabelled above"),
        (["--labelled", "0"], "the teacher needs labels"),
        (["--labelled", "1.5"], "--labelled 1.5: must lie between 0 and 1"),
        (["--labelled", ".5", "--student.head", "cosface"], "needs --student.head none"),
        (["--students", "rel+hint"], "stage 1 has 32 and 16 channels"),
        (["--student.name", "imagenet-resnet18"], "embeddings of 128 and 512 numbers"),
        (["--relative-mode", "huber"], "relative-mode"),
        (["--score-on", "development", "--data.development", "0"], "keeps no classes for it"),
        (["--long", "0"], "--long 0.0: must be above 0"),
        (["embeded"], "no recipe 'embeded' in embedkd; did you mean embedded?"),
    ],
)
def test_a_bad_flag_is_one_line(
    monkeypatch, capsys: pytest.CaptureFixture[str], flags: list[str], said: str
) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py", *flags])
    with pytest.raises(SystemExit, match="2"):
        cli.guarded(main)
    *_, last = capsys.readouterr().err.strip().splitlines()
    assert last.startswith("error: ") and said in last

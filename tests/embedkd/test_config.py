"""EmbedKD's recipes are the paper's settings, and what cannot be trained is refused."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
import torch

from embedkd.config import DEVELOPMENT, GRID, RECIPES, Config, arms, members, weights
from embedkd.labels import known
from embedkd.networks import check, sizes, stages
from embedkd.train import main, train
from shared import cli, models
from shared.data.retrieval import CARS, CUB, SOP
from shared.models.recogniser import Recogniser

PAPER = ("table1", "table2", "table3", "table5", "table6", "fig4", "official",
         "official-sop")
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
    code's 4 x 8 images, decay 2e-4 and no schedule, and its 1e-6 for SOP."""
    rate, official = (1e-6 if name == "official-sop" else 1e-5), name.startswith("official")
    for c in members(RECIPES[name]):
        for o in (c.optim, c.teacher.optim):
            assert (o.method, o.lr, o.batch, o.weight_decay) == ("adam", rate, 32, 2e-4)
            assert (o.schedule, o.milestones, o.warmup, o.clip) == ("step", (), 0.0, 0.0)
        assert (c.images_per_class, c.teacher.images_per_class) == (8, 8)
        assert (c.data.hr, c.data.kept, c.data.flip) == (224, 256, True)
        assert c.data.kernel == "bicubic" and c.relative_mode == "frobenius"
        assert (c.student.head, c.teacher.head, c.teacher.weights) == ("none", "none", "imagenet")
        small = "mobilenet-0.25" if name == "table5" else "imagenet-resnet18"
        large = "imagenet-resnet18" if name == "table6" else "imagenet-resnet101"
        assert (c.student.name, c.teacher.name) == (small, large)
        margin = 0.0 if official else 0.2
        assert (c.student.margin, c.teacher.margin) == (margin, margin)
        assert c.data.crop == ("resized" if official else "shift")


def test_epochs_are_the_official_codes_iterations_to_within_one_epoch() -> None:
    wanted = {"cub": 50_000, "cars196": 72_000, "sop": 141_000}
    found = {c.data.name: c for name in ("table1", "table2") for c in members(RECIPES[name])}
    assert RECIPES["official-sop"].optim.epochs == found["sop"].optim.epochs
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
    again = RECIPES["official-sop"]
    assert (again.data.name, again.lambda_abs, again.lambda_rel) == ("sop", 2.0, 1.0)


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
    assert len({c.lambda_abs for c in runs}) == len(GRID["frobenius"])
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
        assert list(stages(made[18], made[teacher])) == ["stage1", "stage2", "stage3", "stage4"]
        found = list(stages(made[18], made[teacher]).values())
        shapes = [(tuple(a.shape[1:]), tuple(b.shape[1:])) for a, b in found]
        sides = ((64, 16), (128, 8), (256, 4), (512, 2))
        assert shapes == [((c, s, s), (c, s, s)) for c, s in sides]
    assert found[0][1] is made[18]["stage1"]
    assert stages(made[18], made[50])["stage4"][1] is made[50]["stage4.inner"]


def test_a_student_with_bottlenecks_gives_its_outputs_only_and_four_stages() -> None:
    with torch.device("meta"):
        maps = models.create("imagenet-resnet50")(torch.zeros(2, 3, 64, 64))[1]
    found = stages(maps, maps)
    assert list(found) == ["stage1", "stage2", "stage3", "stage4"]
    for name, (s, t) in found.items():
        assert s is maps[name] and t is maps[f"{name}.inner"] and s.shape[1] == 4 * t.shape[1]
    config = replace(RECIPES["table1"], vary=(), students=("rel+hint",))
    config = replace(config, student=replace(config.student, name="imagenet-resnet50"))
    with pytest.raises(ValueError, match="stage1 is 64 x 56 x 56 and 256 x 56 x 56 "):
        check(config, arms(config).values())


def test_hints_refuse_maps_of_other_height_and_attention_takes_them() -> None:
    """Table 6's networks with the student at 112 px: equal channels, half the side."""
    config = replace(RECIPES["table6"], vary=(), students=("rel+hint",))
    config = replace(config, data=replace(config.data, lr=112))
    with pytest.raises(ValueError, match="stage1 is 64 x 56 x 56 and 64 x 28 x 28 "):
        check(config, arms(config).values())
    config = replace(config, students=("rel+at",))
    check(config, arms(config).values())


def test_p_x_k_batches_are_asked_for_only_where_there_are_some() -> None:
    optim = replace(Config().optim, batch=30)
    for k in (1, 4, 0):  # with a head
        assert replace(Config(), optim=optim, images_per_class=k).student.head == "cosface"
    with pytest.raises(ValueError, match="30 is no multiple of --images-per-class 4"):
        replace(RECIPES["embedded"], optim=optim)


def test_a_recipe_that_counts_is_not_trained() -> None:
    with pytest.raises(ValueError, match=r"table4 trains nothing: python train\.py table4 prints"):
        train(RECIPES["table4"])


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
        (["--lambda-abs", "-1"], "--lambda-abs -1.0: must be a finite number, 0 or"),
        (["--rho", "inf"], "--rho inf: must be a finite number, 0 or more"),
        (["--lambda-rel", "nan"], "--lambda-rel nan: must be a finite number, 0 or more"),
        (["--lambda-", "3"], "no flag --lambda-"),
        (["--students", "rel", "rel"], "name each once"),
        (["--students", "rel+hints"], "students"),
        (["--students", "rel-only"], "every image has its label; add --labelled .5"),
        (["--students", "rel-only", "--labelled", ".5", "--unlabelled", "0"], "--unlabelled above"),
        (["--labelled", "0"], "the teacher needs labels"),
        (["--labelled", "1.5"], "--labelled 1.5: must lie between 0 and 1"),
        (["--labelled", ".5", "--student.head", "cosface"], "needs --student.head none"),
        (["--students", "rel+hint"], "stage1 is 32 x 16 x 16 and 16 x 16 x 16"),
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

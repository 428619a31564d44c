"""The face networks against layouts and forward passes written here from the public descriptions.

The oracle never looks at the model: `layout_*` writes the public names and shapes, `forward_*` runs
such a state dict by plain functional calls.
"""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shared.models import build, count_parameters, create, macs
from shared.models.checkpoints import load_backbone
from shared.models.iresnet import IResNet, Unit

Layout = dict[str, tuple[int, ...]]

UNITS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 14, 3), 100: (3, 13, 30, 3)}
INSIGHTFACE = {f"iresnet{depth}": units for depth, units in UNITS.items()}
ADAFACE = {
    "adaface-ir18": UNITS[18],
    "adaface-ir34": UNITS[34],
    "adaface-ir50": UNITS[50],
    "adaface-ir101": UNITS[100],
}


def bn(key: str, c: int, affine: bool = True) -> Layout:
    fields = (("weight", "bias") if affine else ()) + ("running_mean", "running_var")
    return {f"{key}.{field}": (c,) for field in fields} | {f"{key}.num_batches_tracked": ()}


def layout_insightface(units: tuple[int, ...], side: int = 7) -> Layout:
    out = {"conv1.weight": (64, 3, 3, 3)} | bn("bn1", 64) | {"prelu.weight": (64,)}
    c_in = 64
    for stage, (count, c) in enumerate(zip(units, (64, 128, 256, 512), strict=True), start=1):
        for i in range(count):
            key = f"layer{stage}.{i}"
            out |= bn(f"{key}.bn1", c_in) | {f"{key}.conv1.weight": (c, c_in, 3, 3)}
            out |= bn(f"{key}.bn2", c) | {f"{key}.prelu.weight": (c,)}
            out |= {f"{key}.conv2.weight": (c, c, 3, 3)} | bn(f"{key}.bn3", c)
            if i == 0:
                out |= {f"{key}.downsample.0.weight": (c, c_in, 1, 1)}
                out |= bn(f"{key}.downsample.1", c)
            c_in = c
    out |= bn("bn2", 512) | {"fc.weight": (512, 512 * side * side), "fc.bias": (512,)}
    return out | bn("features", 512)


def layout_adaface(units: tuple[int, ...]) -> Layout:
    out = {"input_layer.0.weight": (64, 3, 3, 3)} | bn("input_layer.1", 64)
    out |= {"input_layer.2.weight": (64,)}
    body, c_in = 0, 64
    for count, c in zip(units, (64, 128, 256, 512), strict=True):
        for _ in range(count):
            key = f"body.{body}"
            if c_in != c:
                out |= {f"{key}.shortcut_layer.0.weight": (c, c_in, 1, 1)}
                out |= bn(f"{key}.shortcut_layer.1", c)
            out |= bn(f"{key}.res_layer.0", c_in) | {f"{key}.res_layer.1.weight": (c, c_in, 3, 3)}
            out |= bn(f"{key}.res_layer.2", c) | {f"{key}.res_layer.3.weight": (c,)}
            out |= {f"{key}.res_layer.4.weight": (c, c, 3, 3)} | bn(f"{key}.res_layer.5", c)
            body, c_in = body + 1, c
    out |= bn("output_layer.0", 512)
    out |= {"output_layer.3.weight": (512, 25088), "output_layer.3.bias": (512,)}
    return out | bn("output_layer.4", 512, affine=False)


def drawn(layout: Layout, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Weights for a layout at which every layer's output is of the order of its input."""
    generator = torch.Generator().manual_seed(0)
    state = {}
    for name, shape in layout.items():
        if name.endswith("num_batches_tracked"):
            state[name] = torch.tensor(1000)
        elif len(shape) > 1:
            fan_in = math.prod(shape[1:])
            state[name] = torch.randn(shape, generator=generator, dtype=dtype) / fan_in**0.5
        elif name.endswith(("weight", "running_var")):
            state[name] = torch.rand(shape, generator=generator, dtype=dtype) + 0.5
        else:
            state[name] = torch.randn(shape, generator=generator, dtype=dtype) / 4
    return state


def unfilled(name: str, **kwargs) -> nn.Module:
    """A network about to be loaded: drawing initial weights would take most of a test's time."""
    with torch.device("meta"):
        model = create(name, **kwargs)
    return model.to_empty(device="cpu")


def norm(state: dict[str, Tensor], key: str, x: Tensor) -> Tensor:
    statistics = state[f"{key}.running_mean"], state[f"{key}.running_var"]
    affine = state.get(f"{key}.weight"), state.get(f"{key}.bias")
    return F.batch_norm(x, *statistics, *affine, training=False, eps=1e-5)


def forward_insightface(state: dict[str, Tensor], units, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    x = F.conv2d(x, state["conv1.weight"], padding=1)
    x = F.prelu(norm(state, "bn1", x), state["prelu.weight"])
    maps = [x]
    for stage, count in enumerate(units, start=1):
        for i in range(count):
            key, stride = f"layer{stage}.{i}", 2 if i == 0 else 1
            out = F.conv2d(norm(state, f"{key}.bn1", x), state[f"{key}.conv1.weight"], padding=1)
            out = F.prelu(norm(state, f"{key}.bn2", out), state[f"{key}.prelu.weight"])
            out = F.conv2d(out, state[f"{key}.conv2.weight"], stride=stride, padding=1)
            out = norm(state, f"{key}.bn3", out)
            if i == 0:
                x = F.conv2d(x, state[f"{key}.downsample.0.weight"], stride=2)
                x = norm(state, f"{key}.downsample.1", x)
            x = out + x
        maps.append(x)
    x = norm(state, "bn2", x).flatten(1)
    x = F.linear(x, state["fc.weight"], state["fc.bias"])
    return norm(state, "features", x), maps


def forward_adaface(state: dict[str, Tensor], units, x: Tensor) -> Tensor:
    x = F.conv2d(x, state["input_layer.0.weight"], padding=1)
    x = F.prelu(norm(state, "input_layer.1", x), state["input_layer.2.weight"])
    firsts = {sum(units[:stage]) for stage in range(4)}
    for body in range(sum(units)):
        key, stride = f"body.{body}", 2 if body in firsts else 1
        out = F.conv2d(
            norm(state, f"{key}.res_layer.0", x), state[f"{key}.res_layer.1.weight"], padding=1
        )
        out = F.prelu(norm(state, f"{key}.res_layer.2", out), state[f"{key}.res_layer.3.weight"])
        out = F.conv2d(out, state[f"{key}.res_layer.4.weight"], stride=stride, padding=1)
        out = norm(state, f"{key}.res_layer.5", out)
        if f"{key}.shortcut_layer.0.weight" in state:
            x = F.conv2d(x, state[f"{key}.shortcut_layer.0.weight"], stride=stride)
            x = norm(state, f"{key}.shortcut_layer.1", x)
        else:
            x = x[:, :, ::stride, ::stride]  # a max pool over one pixel
        x = out + x
    x = norm(state, "output_layer.0", x).flatten(1)
    x = F.linear(x, state["output_layer.3.weight"], state["output_layer.3.bias"])
    return norm(state, "output_layer.4", x)


@pytest.mark.parametrize("name", INSIGHTFACE)
def test_names_and_shapes_are_insightfaces(name):
    with torch.device("meta"):
        state = create(name).state_dict()
    assert {key: tuple(value.shape) for key, value in state.items()} == layout_insightface(
        INSIGHTFACE[name]
    )


@pytest.mark.parametrize(
    ("name", "millions", "gmacs"),
    [
        ("iresnet18", "24.03", "2.61"),
        ("iresnet34", "34.14", "4.46"),
        ("iresnet50", "43.59", "6.31"),
        ("iresnet100", "65.16", "12.09"),
    ],
)
def test_published_parameters_and_macs(name, millions, gmacs):
    with torch.device("meta"):
        model = create(name)
    assert f"{count_parameters(model) / 1e6:.2f}" == millions
    assert f"{macs(model, 112) / 1e9:.2f}" == gmacs


def test_small_iresnet_is_the_same_layout_narrower_and_with_one_unit_a_stage():
    state = build("small-iresnet", size=48, classes=9).state_dict()
    expected = layout_insightface((1, 1, 1, 1), side=3)
    assert state.keys() == expected.keys()
    for key, shape in expected.items():
        narrow = tuple(n // 4 if n in (64, 128, 256, 512) else n for n in shape)
        if key == "fc.weight":
            narrow = (128, 128 * 3 * 3)
        assert tuple(state[key].shape) == narrow
    with pytest.raises(ValueError, match="4 units and 2 widths"):
        IResNet((1, 1, 1, 1), widths=(16, 32))


@pytest.mark.parametrize("name", ADAFACE)
def test_adaface_has_insightfaces_parameters_less_one_shortcut_and_the_last_affine(name):
    with torch.device("meta"):
        ours = create(name)
        theirs = create(name.replace("101", "100").replace("adaface-ir", "iresnet"))
    assert count_parameters(theirs) - count_parameters(ours) == (64 * 64 + 2 * 64) + 2 * 512
    by_hand = sum(
        math.prod(shape)
        for key, shape in layout_adaface(ADAFACE[name]).items()
        if not key.endswith(("running_mean", "running_var", "num_batches_tracked"))
    )
    assert count_parameters(ours) == by_hand


def test_plain_strict_loading_takes_the_public_names_alone_nested_and_copied():
    state = drawn(layout_insightface(UNITS[18], side=1))
    names = list(state)
    model = unfilled("iresnet18", size=16)
    copied = copy.deepcopy(nn.Sequential(model))
    model.load_state_dict(state, strict=True)
    assert list(state) == names  # the caller's dict is its own
    copied.load_state_dict({f"0.{key}": value for key, value in state.items()}, strict=True)
    for read in (model.state_dict(), copied[0].state_dict()):
        assert read.keys() == state.keys()
        assert all(torch.equal(read[key], state[key]) for key in state)
    assert {key.removeprefix("0.") for key in copied.state_dict()} == set(state)
    del state["features.running_var"]
    state["features.gamma"] = torch.zeros(512)
    with pytest.raises(RuntimeError, match=r"Missing key(.|\n)*Unexpected key"):
        model.load_state_dict(state, strict=True)


def test_insightfaces_backbone_file_loads_strictly(tmp_path):
    state = drawn(layout_insightface(UNITS[18]))
    torch.save(state, tmp_path / "backbone.pth")
    model = unfilled("iresnet18")
    found = load_backbone(model, tmp_path / "backbone.pth")
    assert (found.layout, found.left_out, found.kept, found.bgr) == ("state dict", (), (), False)
    read = model.state_dict()
    assert all(torch.equal(read[key], state[key]) for key in state)


def test_iresnet_matches_a_plain_functional_forward():
    state = drawn(layout_insightface(UNITS[18], side=2), torch.float64)
    model = unfilled("iresnet18", size=31).double().eval()
    model.load_state_dict(state, strict=True)
    x = torch.randn(2, 3, 31, 31, dtype=torch.float64)
    expected, expected_maps = forward_insightface(state, UNITS[18], x)
    embedding, maps = model(x)
    torch.testing.assert_close(embedding, expected)
    assert embedding.std() > 0.1  # the comparison is not one of zeros
    assert list(maps) == ["stem", "stage1", "stage2", "stage3", "stage4"]
    for got, map_ in zip(maps.values(), expected_maps, strict=True):
        torch.testing.assert_close(got, map_)
    assert torch.equal(model.features(x), embedding)


def test_adafaces_lightning_file_gives_for_rgb_what_its_network_gives_for_bgr(tmp_path):
    state = drawn(layout_adaface(UNITS[18]))
    heads = {"kernel": torch.zeros(512, 7), "t": torch.zeros(1)}
    heads |= {"batch_mean": torch.full((1,), 20.0), "batch_std": torch.full((1,), 100.0)}
    torch.save(
        {
            "epoch": 25,
            "pytorch-lightning_version": "1.8.6",
            "state_dict": {f"model.{key}": value for key, value in state.items()}
            | {f"head.{key}": value for key, value in heads.items()},
            "hyper_parameters": {"arch": "ir_18", "lr_milestones": [12, 20, 24], "gpus": None},
        },
        tmp_path / "adaface_ir18.ckpt",
    )
    model = unfilled("adaface-ir18", size=97)
    found = load_backbone(model, tmp_path / "adaface_ir18.ckpt")
    assert found.bgr and found.kept == ()
    assert found.left_out == ("head.kernel", "head.t", "head.batch_mean", "head.batch_std")
    assert "AdaFace" in str(found) and "head.kernel" in str(found) and "BGR" in str(found)
    rgb = torch.randn(1, 3, 97, 97, dtype=torch.float64)  # 7x7 at the end, as 112 gives
    state = {key: value.double() for key, value in state.items()}
    expected = forward_adaface(state, UNITS[18], rgb.flip(1))
    torch.testing.assert_close(model.double().eval().features(rgb), expected)
    assert expected.std() > 0.1

    load_backbone(model, tmp_path / "adaface_ir18.ckpt", bgr=False)
    torch.testing.assert_close(model.features(rgb.flip(1)), expected)


@pytest.mark.parametrize("name", ADAFACE)
def test_every_adaface_name_has_its_place(name, tmp_path):
    """All four layouts, as a bare state dict, without the weight of the real tensors."""
    layout = layout_adaface(ADAFACE[name])
    state = {
        key: torch.full((), 7.0).expand(shape).long()
        if key.endswith("tracked")
        else torch.full((), 7.0).expand(shape)
        for key, shape in layout.items()
    }
    torch.save(state, tmp_path / "bare.pth")
    model = unfilled(name)
    found = load_backbone(model, tmp_path / "bare.pth")
    assert found.bgr and found.layout == "AdaFace, state dict" and found.left_out == ()
    assert all((value == 7).all() for value in model.state_dict().values())


def test_a_saved_adaface_network_is_rgb_and_stays_so(tmp_path):
    """Its own names tell it from AdaFace's file: the colours are not exchanged a second time."""
    model = IResNet((1, 1, 1, 1), size=16, dim=8, adaface=True)
    torch.save(model.state_dict(), tmp_path / "ours.pth")
    other = IResNet((1, 1, 1, 1), size=16, dim=8, adaface=True)
    assert not load_backbone(other, tmp_path / "ours.pth").bgr
    assert torch.equal(other.conv1.weight, model.conv1.weight)


@pytest.mark.parametrize("family", [INSIGHTFACE, ADAFACE], ids=["insightface", "adaface"])
def test_one_familys_file_is_refused_by_the_others_network(tmp_path, family):
    layout = layout_insightface if family is INSIGHTFACE else layout_adaface
    state = {key: torch.zeros(()).expand(shape) for key, shape in layout(UNITS[18]).items()}
    torch.save(state, tmp_path / "file.pth")
    with pytest.raises(ValueError, match=r"file\.pth does not fit IResNet") as info:
        load_backbone(
            unfilled("adaface-ir18" if family is INSIGHTFACE else "iresnet18"),
            tmp_path / "file.pth",
        )
    assert "layer1.0.downsample.0.weight" in str(info.value)


@pytest.mark.parametrize("adaface", [False, True])
@pytest.mark.parametrize("input", ["native", "upsample"])
@pytest.mark.parametrize("size", [1, 7, 16, 17, 32, 64])
def test_small_inputs_give_an_embedding_and_maps_of_documented_shape(adaface, input, size):
    model = IResNet((1, 1, 1, 1), size=size, input=input, dim=64, adaface=adaface)
    embedding, maps = model(torch.randn(2, 3, size, size))
    assert embedding.shape == (2, model.dim) == (2, 64)
    seen = size if input == "native" else 112
    shapes = {"stem": (64, seen)}
    for stage, width in enumerate((64, 128, 256, 512), start=1):
        seen = math.ceil(seen / 2)
        shapes[f"stage{stage}"] = (width, seen)
    assert {k: tuple(m.shape) for k, m in maps.items()} == {
        k: (2, c, side, side) for k, (c, side) in shapes.items()
    }
    if input == "native":
        assert model.fc.in_features == 512 * math.ceil(size / 16) ** 2
        (embedding * torch.randn(2, 64)).sum().backward()
        trained = [p for p in model.parameters() if p.requires_grad]
        assert all(p.grad is not None and p.grad.isfinite().all() for p in trained)
    assert macs(model, size) > 0


@pytest.mark.parametrize("size", [14, 112, 150])
def test_upsample_is_a_bilinear_resize_before_the_network_of_112(size):
    model = IResNet((1, 1, 1, 1), dim=8, input="upsample").eval()
    native = IResNet((1, 1, 1, 1), dim=8).eval()
    native.load_state_dict(model.state_dict())  # the linear layers have one shape
    x = torch.randn(1, 3, size, size)
    resized = F.interpolate(x, (112, 112), mode="bilinear", align_corners=False, antialias=True)
    torch.testing.assert_close(model.features(x), native.features(resized))


def test_stem_stages_and_head_make_up_the_forward():
    model = create("iresnet18", size=16).eval()
    x = torch.randn(2, 3, 16, 16)
    out = model.stem(x)
    assert [len(stage) for stage in model.stages] == [2, 2, 2, 2]
    for stage in model.stages:
        for unit in stage:
            assert isinstance(unit, Unit)
            out = unit(out)
    assert torch.equal(model.head(out), model.features(x))


def test_the_last_weight_of_iresnet_is_one_and_never_learns():
    model = create("iresnet18", size=16)
    names = [name for name, p in model.named_parameters() if not p.requires_grad]
    assert len(names) == 1
    assert torch.equal(model.state_dict()["features.weight"], torch.ones(512))
    assert all(p.requires_grad for p in create("adaface-ir18", size=16).parameters())
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d)]
    assert len(norms) == 3 + 3 * 8 + 4 and {m.eps for m in norms} == {1e-5}


def test_dropout_is_adafaces_four_tenths_and_none_for_insightface():
    assert create("adaface-ir18", size=16).dropout.p == 0.4
    assert create("iresnet18", size=16).dropout.p == 0
    assert create("iresnet18", size=16, dropout=0.2).dropout.p == 0.2


def test_initial_weights_have_the_public_spread():
    insightface, adaface = create("iresnet18", size=16), create("adaface-ir18", size=16)
    for model, std in ((insightface, 0.1), (adaface, (2 / (512 * 9)) ** 0.5)):
        assert model.layer4[1].conv2.weight.std().item() == pytest.approx(std, rel=0.01)
    assert adaface.fc.weight.std().item() == pytest.approx((2 / 512) ** 0.5, rel=0.01)
    assert not adaface.fc.bias.any()


def test_export_keeps_the_embedding():
    """A student leaves by torch.export: the name that the last batch norm has must not break it."""
    model = IResNet((1, 1, 1, 1), size=16, dim=8).eval()
    x = torch.randn(2, 3, 16, 16)
    embedding, _ = torch.export.export(model, (x,)).module()(x)
    torch.testing.assert_close(embedding, model.features(x))


def test_bad_sizes_inputs_and_a_classifier_are_clear_errors():
    model = create("iresnet18", size=16)
    with pytest.raises(ValueError, match=r"expected images \[B, 3, 16, 16\], got \[2, 3, 32, 32\]"):
        model(torch.randn(2, 3, 32, 32))
    with pytest.raises(ValueError, match="input is 'resize': it must be native or upsample"):
        create("iresnet18", input="resize")
    with pytest.raises(ValueError, match="size is 0"):
        create("iresnet18", size=0)
    assert model.classes is None
    with pytest.raises(ValueError, match="head of shared.models.heads"):
        model.classify(torch.randn(2, 512))


@pytest.mark.parametrize(
    ("name", "classes"),
    [("resnet8", 7), ("small-student", None), ("iresnet18", None), ("mobilenet-0.25", None)],
)
def test_build_gives_every_family_what_it_takes(name, classes):
    model = build(name, size=16, classes=7)
    embedding, _ = model(torch.randn(2, 3, 16, 16))
    assert embedding.shape == (2, model.dim) and model.classes == classes
    with pytest.raises(ValueError, match=r"unknown model 'iresnet-18'; did you mean iresnet18"):
        build("iresnet-18", size=16, classes=7)


def test_the_embedding_is_float32_under_autocast():
    """Lengths and cosines are read from it; bf16 has a step of .004 near 1."""
    model = IResNet((1, 1, 1, 1), size=16, dim=8).eval()
    x = torch.randn(2, 3, 16, 16)
    with torch.autocast("cpu", torch.bfloat16):
        embedding, maps = model(x)
    assert embedding.dtype == torch.float32 and maps["stage1"].dtype == torch.bfloat16

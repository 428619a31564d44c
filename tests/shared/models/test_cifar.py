"""The CIFAR family against layouts and forward passes derived here from the published papers.

The oracle never looks at the model: `layout_*` writes names and shapes from the architecture,
`forward_*` runs such a state dict by plain functional calls with the fixed pools of 32x32 inputs.
"""

import math

import pytest
import torch
import torch.nn.functional as F

from shared.models import count_parameters, create, macs

Layout = dict[str, tuple[int, ...]]

RESNETS = {
    "resnet8": (8, (16, 16, 32, 64)),
    "resnet14": (14, (16, 16, 32, 64)),
    "resnet20": (20, (16, 16, 32, 64)),
    "resnet32": (32, (16, 16, 32, 64)),
    "resnet44": (44, (16, 16, 32, 64)),
    "resnet56": (56, (16, 16, 32, 64)),
    "resnet110": (110, (16, 16, 32, 64)),
    "resnet8x4": (8, (32, 64, 128, 256)),
    "resnet32x4": (32, (32, 64, 128, 256)),
}
WIDE = {"wrn-16-1": (16, 1), "wrn-16-2": (16, 2), "wrn-40-1": (40, 1), "wrn-40-2": (40, 2)}
VGGS = {
    "vgg8": (1, 1, 1, 1, 1),
    "vgg11": (1, 1, 2, 2, 2),
    "vgg13": (2, 2, 2, 2, 2),
    "vgg16": (2, 2, 3, 3, 3),
    "vgg19": (2, 2, 4, 4, 4),
}
IMAGENET = {  # convolutions a block, blocks, width factor inside a bottleneck
    "ResNet18": (2, (2, 2, 2, 2), 1),
    "ResNet34": (2, (3, 4, 6, 3), 1),
    "ResNet50": (3, (3, 4, 6, 3), 1),
    "wrn50-2": (3, (3, 4, 6, 3), 2),
}
SMALL = [*RESNETS, *WIDE, *VGGS, "shufflenet-v1", "shufflenet-v2", "mobilenet-v2"]
ALL = [*SMALL, *IMAGENET]


def conv(key: str, c_in: int, c_out: int, kernel: int, groups: int = 1) -> Layout:
    return {f"{key}.weight": (c_out, c_in // groups, kernel, kernel)}


def bn(key: str, c: int) -> Layout:
    fields = ("weight", "bias", "running_mean", "running_var")
    return {f"{key}.{field}": (c,) for field in fields} | {f"{key}.num_batches_tracked": ()}


def linear(key: str, c_in: int, c_out: int) -> Layout:
    return {f"{key}.weight": (c_out, c_in), f"{key}.bias": (c_out,)}


def layout_resnet(depth: int, widths: tuple[int, ...]) -> Layout:
    out = conv("conv1", 3, widths[0], 3) | bn("bn1", widths[0])
    for stage in (1, 2, 3):
        for i in range((depth - 2) // 6):
            c_in = widths[stage - 1] if i == 0 else widths[stage]
            c, key = widths[stage], f"layer{stage}.{i}"
            out |= conv(f"{key}.conv1", c_in, c, 3) | bn(f"{key}.bn1", c)
            out |= conv(f"{key}.conv2", c, c, 3) | bn(f"{key}.bn2", c)
            if i == 0 and (stage > 1 or c_in != c):
                out |= conv(f"{key}.downsample.0", c_in, c, 1) | bn(f"{key}.downsample.1", c)
    return out | linear("fc", widths[3], 100)


def layout_wide(depth: int, widen: int) -> Layout:
    widths = (16, 16 * widen, 32 * widen, 64 * widen)
    out = conv("conv1", 3, 16, 3)
    for stage in (1, 2, 3):
        for i in range((depth - 4) // 6):
            c_in = widths[stage - 1] if i == 0 else widths[stage]
            c, key = widths[stage], f"block{stage}.layer.{i}"
            out |= bn(f"{key}.bn1", c_in) | conv(f"{key}.conv1", c_in, c, 3)
            out |= bn(f"{key}.bn2", c) | conv(f"{key}.conv2", c, c, 3)
            if c_in != c:
                out |= conv(f"{key}.convShortcut", c_in, c, 1)
    return out | bn("bn1", widths[3]) | linear("fc", widths[3], 100)


def layout_vgg(counts: tuple[int, ...]) -> Layout:
    out: Layout = {}
    c_in = 3
    for block, (count, c) in enumerate(zip(counts, (64, 128, 256, 512, 512), strict=True)):
        for i in range(count):  # convolution, BN, ReLU take three indices
            key = f"block{block}.{3 * i}"
            out |= (
                conv(key, c_in, c, 3) | {f"{key}.bias": (c,)} | bn(f"block{block}.{3 * i + 1}", c)
            )
            c_in = c
    return out | linear("classifier", 512, 100)


def layout_imagenet(convolutions: int, blocks: tuple[int, ...], widen: int) -> Layout:
    out = conv("conv1", 3, 64, 3) | bn("bn1", 64)
    c_in = 64
    for stage, (count, width) in enumerate(zip(blocks, (64, 128, 256, 512), strict=True), start=1):
        c_out = width if convolutions == 2 else 4 * width
        inner = width * widen
        for i in range(count):
            key = f"layer{stage}.{i}"
            if convolutions == 2:
                out |= conv(f"{key}.conv1", c_in, width, 3) | bn(f"{key}.bn1", width)
                out |= conv(f"{key}.conv2", width, width, 3) | bn(f"{key}.bn2", width)
            else:
                out |= conv(f"{key}.conv1", c_in, inner, 1) | bn(f"{key}.bn1", inner)
                out |= conv(f"{key}.conv2", inner, inner, 3) | bn(f"{key}.bn2", inner)
                out |= conv(f"{key}.conv3", inner, c_out, 1) | bn(f"{key}.bn3", c_out)
            if i == 0 and (stage > 1 or c_in != c_out):
                out |= conv(f"{key}.shortcut.0", c_in, c_out, 1) | bn(f"{key}.shortcut.1", c_out)
            c_in = c_out
    return out | linear("linear", c_in, 100)


def layout_shuffle_v1() -> Layout:
    out = conv("conv1", 3, 24, 1) | bn("bn1", 24)
    c_in = 24
    for stage, (width, count) in enumerate(((240, 4), (480, 8), (960, 4)), start=1):
        for i in range(count):
            key = f"layer{stage}.{i}"
            branch = width - c_in if i == 0 else width
            mid = branch // 4
            out |= conv(f"{key}.conv1", c_in, mid, 1, 1 if c_in == 24 else 3)
            out |= bn(f"{key}.bn1", mid)
            out |= conv(f"{key}.conv2", mid, mid, 3, mid) | bn(f"{key}.bn2", mid)
            out |= conv(f"{key}.conv3", mid, branch, 1, 3) | bn(f"{key}.bn3", branch)
            c_in = width
    return out | linear("linear", 960, 100)


def layout_shuffle_v2() -> Layout:
    out = conv("conv1", 3, 24, 1) | bn("bn1", 24)
    c_in = 24
    for stage, (width, count) in enumerate(((116, 4), (232, 8), (464, 4)), start=1):
        h, key = width // 2, f"layer{stage}.0"
        out |= conv(f"{key}.conv1", c_in, c_in, 3, c_in) | bn(f"{key}.bn1", c_in)
        out |= conv(f"{key}.conv2", c_in, h, 1) | bn(f"{key}.bn2", h)
        out |= conv(f"{key}.conv3", c_in, h, 1) | bn(f"{key}.bn3", h)
        out |= conv(f"{key}.conv4", h, h, 3, h) | bn(f"{key}.bn4", h)
        out |= conv(f"{key}.conv5", h, h, 1) | bn(f"{key}.bn5", h)
        for i in range(1, count):
            key = f"layer{stage}.{i}"
            out |= conv(f"{key}.conv1", h, h, 1) | bn(f"{key}.bn1", h)
            out |= conv(f"{key}.conv2", h, h, 3, h) | bn(f"{key}.bn2", h)
            out |= conv(f"{key}.conv3", h, h, 1) | bn(f"{key}.bn3", h)
        c_in = width
    return out | conv("conv2", 464, 1024, 1) | bn("bn2", 1024) | linear("linear", 1024, 100)


# expansion, width, blocks, stride: Table 2 of Sandler et al. at half width, second stride 1
MOBILE = (
    (1, 8, 1, 1),
    (6, 12, 2, 1),
    (6, 16, 3, 2),
    (6, 32, 4, 2),
    (6, 48, 3, 1),
    (6, 80, 3, 2),
    (6, 160, 1, 1),
)


def layout_mobile() -> Layout:
    out = conv("conv1.0", 3, 16, 3) | bn("conv1.1", 16)
    c_in = 16
    for stage, (expansion, c, count, _) in enumerate(MOBILE):
        for i in range(count):
            key, inner = f"blocks.{stage}.{i}.conv", c_in * expansion
            out |= conv(f"{key}.0", c_in, inner, 1) | bn(f"{key}.1", inner)
            out |= conv(f"{key}.3", inner, inner, 3, inner) | bn(f"{key}.4", inner)
            out |= conv(f"{key}.6", inner, c, 1) | bn(f"{key}.7", c)
            c_in = c
    out |= conv("conv2.0", 160, 1280, 1) | bn("conv2.1", 1280)
    return out | linear("classifier.0", 1280, 100)


def layout(name: str) -> Layout:
    if name in RESNETS:
        return layout_resnet(*RESNETS[name])
    if name in WIDE:
        return layout_wide(*WIDE[name])
    if name in VGGS:
        return layout_vgg(VGGS[name])
    if name in IMAGENET:
        return layout_imagenet(*IMAGENET[name])
    by_name = {
        "shufflenet-v1": layout_shuffle_v1,
        "shufflenet-v2": layout_shuffle_v2,
        "mobilenet-v2": layout_mobile,
    }
    return by_name[name]()


def random_state(shapes: Layout) -> dict[str, torch.Tensor]:
    """A state dict in float64 whose every number matters and whose activations stay near 1."""
    generator = torch.Generator().manual_seed(0)
    state = {}
    for name, shape in shapes.items():
        value = torch.randn(shape, generator=generator, dtype=torch.float64)
        if name.endswith("running_var") or (len(shape) == 1 and name.endswith("weight")):
            value = 0.5 + value.abs()
        elif name.endswith("num_batches_tracked"):
            value = torch.tensor(3)
        elif len(shape) > 1:
            value = value * (2 / math.prod(shape[1:])) ** 0.5
        state[name] = value
    return state


class Plain:
    """Functional layers on a state dict."""

    def __init__(self, state: dict[str, torch.Tensor]) -> None:
        self.state = state

    def conv(self, key: str, x: torch.Tensor, stride: int = 1, groups: int = 1) -> torch.Tensor:
        weight, bias = self.state[f"{key}.weight"], self.state.get(f"{key}.bias")
        return F.conv2d(x, weight, bias, stride, weight.shape[-1] // 2, groups=groups)

    def bn(self, key: str, x: torch.Tensor) -> torch.Tensor:
        weight, bias, mean, var = (
            self.state[f"{key}.{field}"][:, None, None]
            for field in ("weight", "bias", "running_mean", "running_var")
        )
        return (x - mean) / (var + 1e-5).sqrt() * weight + bias

    def linear(self, key: str, x: torch.Tensor) -> torch.Tensor:
        return x @ self.state[f"{key}.weight"].T + self.state[f"{key}.bias"]


def shuffled(x: torch.Tensor, groups: int) -> torch.Tensor:
    """Output channel i * groups + g is channel i of group g."""
    per_group = x.shape[1] // groups
    order = [g * per_group + i for i in range(per_group) for g in range(groups)]
    return x[:, order]


def forward_resnet(net: Plain, x: torch.Tensor, depth: int) -> torch.Tensor:
    x = net.bn("bn1", net.conv("conv1", x)).relu()
    for stage in (1, 2, 3):
        for i in range((depth - 2) // 6):
            key, stride = f"layer{stage}.{i}", 2 if stage > 1 and i == 0 else 1
            out = net.bn(f"{key}.bn1", net.conv(f"{key}.conv1", x, stride)).relu()
            out = net.bn(f"{key}.bn2", net.conv(f"{key}.conv2", out))
            if f"{key}.downsample.0.weight" in net.state:
                x = net.bn(f"{key}.downsample.1", net.conv(f"{key}.downsample.0", x, stride))
            x = (out + x).relu()
    return net.linear("fc", F.avg_pool2d(x, 8).flatten(1))


def forward_wide(net: Plain, x: torch.Tensor, depth: int) -> torch.Tensor:
    x = net.conv("conv1", x)
    for stage in (1, 2, 3):
        for i in range((depth - 4) // 6):
            key, stride = f"block{stage}.layer.{i}", 2 if stage > 1 and i == 0 else 1
            active = net.bn(f"{key}.bn1", x).relu()
            out = net.bn(f"{key}.bn2", net.conv(f"{key}.conv1", active, stride)).relu()
            out = net.conv(f"{key}.conv2", out)
            if f"{key}.convShortcut.weight" in net.state:
                x = net.conv(f"{key}.convShortcut", active, stride)
            x = x + out
    return net.linear("fc", F.avg_pool2d(net.bn("bn1", x).relu(), 8).flatten(1))


def forward_vgg(net: Plain, x: torch.Tensor, counts: tuple[int, ...]) -> torch.Tensor:
    for block, count in enumerate(counts):
        for i in range(count):
            x = net.bn(f"block{block}.{3 * i + 1}", net.conv(f"block{block}.{3 * i}", x)).relu()
        if block < 3:  # no fourth pool at 32x32
            x = F.max_pool2d(x, 2)
    return net.linear("classifier", F.avg_pool2d(x, 4).flatten(1))


def forward_imagenet(net: Plain, x: torch.Tensor, last: int, blocks: tuple[int, ...]):
    x = net.bn("bn1", net.conv("conv1", x)).relu()
    for stage, count in enumerate(blocks, start=1):
        for i in range(count):
            key, stride = f"layer{stage}.{i}", 2 if stage > 1 and i == 0 else 1
            out = x
            for k in range(1, last + 1):  # the 3x3 has the stride: the first of 2, the second of 3
                step = stride if k == last - 1 else 1
                out = net.bn(f"{key}.bn{k}", net.conv(f"{key}.conv{k}", out, step))
                out = out.relu() if k < last else out
            if f"{key}.shortcut.0.weight" in net.state:
                x = net.bn(f"{key}.shortcut.1", net.conv(f"{key}.shortcut.0", x, stride))
            x = (out + x).relu()
    return net.linear("linear", F.avg_pool2d(x, 4).flatten(1))


def forward_shuffle_v1(net: Plain, x: torch.Tensor) -> torch.Tensor:
    x = net.bn("bn1", net.conv("conv1", x)).relu()
    for stage, count in enumerate((4, 8, 4), start=1):
        for i in range(count):
            key, down = f"layer{stage}.{i}", i == 0
            groups = 1 if stage == 1 and down else 3
            out = net.bn(f"{key}.bn1", net.conv(f"{key}.conv1", x, groups=groups)).relu()
            out = shuffled(out, groups)
            out = net.conv(f"{key}.conv2", out, 2 if down else 1, groups=out.shape[1])
            out = net.bn(f"{key}.bn2", out).relu()
            out = net.bn(f"{key}.bn3", net.conv(f"{key}.conv3", out, groups=3))
            joined = torch.cat([out, F.avg_pool2d(x, 3, 2, 1)], 1) if down else out + x
            x = joined.relu()
    return net.linear("linear", F.avg_pool2d(x, 4).flatten(1))


def forward_shuffle_v2(net: Plain, x: torch.Tensor) -> torch.Tensor:
    x = net.bn("bn1", net.conv("conv1", x)).relu()
    for stage, count in enumerate((4, 8, 4), start=1):
        key = f"layer{stage}.0"
        left = net.bn(f"{key}.bn1", net.conv(f"{key}.conv1", x, 2, groups=x.shape[1]))
        left = net.bn(f"{key}.bn2", net.conv(f"{key}.conv2", left)).relu()
        right = net.bn(f"{key}.bn3", net.conv(f"{key}.conv3", x)).relu()
        right = net.conv(f"{key}.conv4", right, 2, groups=right.shape[1])
        right = net.conv(f"{key}.conv5", net.bn(f"{key}.bn4", right))
        x = shuffled(torch.cat([left, net.bn(f"{key}.bn5", right).relu()], 1), 2)
        for i in range(1, count):
            key, half = f"layer{stage}.{i}", x.shape[1] // 2
            kept, out = x[:, :half], x[:, half:]
            out = net.bn(f"{key}.bn1", net.conv(f"{key}.conv1", out)).relu()
            out = net.bn(f"{key}.bn2", net.conv(f"{key}.conv2", out, groups=half))
            out = net.bn(f"{key}.bn3", net.conv(f"{key}.conv3", out)).relu()
            x = shuffled(torch.cat([kept, out], 1), 2)
    x = net.bn("bn2", net.conv("conv2", x)).relu()
    return net.linear("linear", F.avg_pool2d(x, 4).flatten(1))


def forward_mobile(net: Plain, x: torch.Tensor) -> torch.Tensor:
    x = net.bn("conv1.1", net.conv("conv1.0", x, 2)).relu()
    for stage, (_, c, count, first) in enumerate(MOBILE):
        for i in range(count):
            key, stride = f"blocks.{stage}.{i}.conv", first if i == 0 else 1
            out = net.bn(f"{key}.1", net.conv(f"{key}.0", x)).relu()
            out = net.conv(f"{key}.3", out, stride, groups=out.shape[1])
            out = net.conv(f"{key}.6", net.bn(f"{key}.4", out).relu())
            out = net.bn(f"{key}.7", out)
            x = x + out if stride == 1 and x.shape[1] == c else out
    x = net.bn("conv2.1", net.conv("conv2.0", x)).relu()
    return net.linear("classifier.0", F.avg_pool2d(x, 2).flatten(1))


@pytest.mark.parametrize("name", ALL)
def test_names_and_shapes_are_the_published_ones(name):
    model = create(name)
    own = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    expected = layout(name)
    assert own == expected
    trained = [
        shape for key, shape in expected.items() if "running" not in key and "num_" not in key
    ]
    assert count_parameters(model) == sum(map(math.prod, trained))


@pytest.mark.parametrize(
    ("name", "millions", "dim"),
    [
        ("resnet20", "0.278", 64),
        ("resnet32", "0.473", 64),
        ("resnet56", "0.862", 64),
        ("resnet110", "1.737", 64),
        ("resnet8x4", "1.23", 256),
        ("resnet32x4", "7.43", 256),
        ("wrn-16-2", "0.703", 128),
        ("wrn-40-2", "2.255", 128),
        ("wrn-40-1", "0.570", 64),
        ("vgg8", "3.97", 512),
        ("vgg11", "9.28", 512),
        ("vgg13", "9.46", 512),
        ("shufflenet-v1", "0.949", 960),
        ("shufflenet-v2", "1.356", 1024),
        ("ResNet18", "11.2", 512),
        ("ResNet50", "23.7", 2048),
    ],
)
def test_parameter_counts_round_to_the_published_ones(name, millions, dim):
    model = create(name)
    digits = len(millions.split(".")[1])
    assert f"{count_parameters(model) / 1e6:.{digits}f}" == millions
    assert model.dim == dim
    assert model.classes == 100


@pytest.mark.parametrize(
    ("name", "forward"),
    [
        ("resnet14", lambda net, x: forward_resnet(net, x, 14)),
        ("resnet8x4", lambda net, x: forward_resnet(net, x, 8)),
        ("wrn-16-1", lambda net, x: forward_wide(net, x, 16)),
        ("wrn-16-2", lambda net, x: forward_wide(net, x, 16)),
        ("vgg8", lambda net, x: forward_vgg(net, x, VGGS["vgg8"])),
        ("vgg11", lambda net, x: forward_vgg(net, x, VGGS["vgg11"])),
        ("shufflenet-v1", forward_shuffle_v1),
        ("shufflenet-v2", forward_shuffle_v2),
        ("mobilenet-v2", forward_mobile),
        ("ResNet18", lambda net, x: forward_imagenet(net, x, 2, (2, 2, 2, 2))),
        ("ResNet50", lambda net, x: forward_imagenet(net, x, 3, (3, 4, 6, 3))),
    ],
)
def test_a_published_state_dict_loads_strictly_and_gives_the_functional_logits(name, forward):
    state = random_state(layout(name))
    model = create(name).double().eval()
    model.load_state_dict(state, strict=True)
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits = model.classify(model.features(x))
        expected = forward(Plain(state), x)
    assert expected.std() > 0.01  # a dead network would agree with anything
    torch.testing.assert_close(logits, expected, rtol=1e-9, atol=1e-9 * expected.abs().max().item())


@pytest.mark.parametrize("name", ALL)
def test_sizes_are_native_and_the_face_is_uniform(name):
    model = create(name, classes=7).eval()
    for size in (8, 32) if name in IMAGENET else (8, 16, 32, 64):
        x = torch.randn(2, 3, size, size)
        with torch.no_grad():
            embedding, maps = model(x)
            features = model.features(x)
            logits = model.classify(embedding)
        assert embedding.shape == (2, model.dim)
        assert torch.equal(embedding, features)
        assert logits.shape == (2, 7) and logits.isfinite().all()
        assert model.classes == 7
        assert list(maps) == ["stem", *(f"stage{i}" for i in range(1, len(maps)))]
        sides = [m.shape[-1] for m in maps.values()]
        assert sides == sorted(sides, reverse=True) and sides[-1] >= 1
        assert all(m.shape[0] == 2 and m.shape[-1] == m.shape[-2] for m in maps.values())


@pytest.mark.parametrize(
    ("name", "shapes"),
    [
        ("resnet8x4", [(32, 32), (64, 32), (128, 16), (256, 8)]),
        ("wrn-16-2", [(16, 32), (32, 32), (64, 16), (128, 8)]),
        ("vgg8", [(64, 32), (128, 16), (256, 8), (512, 4), (512, 4)]),
        ("shufflenet-v1", [(24, 32), (240, 16), (480, 8), (960, 4)]),
        ("shufflenet-v2", [(24, 32), (116, 16), (232, 8), (464, 4)]),
        ("mobilenet-v2", [(16, 16), (12, 16), (16, 8), (48, 4), (160, 2)]),
        ("ResNet18", [(64, 32), (64, 32), (128, 16), (256, 8), (512, 4)]),
    ],
)
def test_maps_at_32_have_the_documented_shapes(name, shapes):
    with torch.no_grad():
        _, maps = create(name).eval()(torch.randn(1, 3, 32, 32))
    assert [(m.shape[1], m.shape[2]) for m in maps.values()] == shapes


def test_vgg_takes_its_fourth_pool_at_64_and_keeps_one_pixel_at_4():
    model = create("vgg8").eval()
    with torch.no_grad():
        assert [m.shape[-1] for m in model(torch.randn(1, 3, 64, 64))[1].values()] == [
            64,
            32,
            16,
            8,
            4,
        ]
        assert [m.shape[-1] for m in model(torch.randn(1, 3, 4, 4))[1].values()] == [4, 2, 1, 1, 1]


@pytest.mark.parametrize(
    "name",
    ["resnet8", "wrn-16-1", "vgg8", "shufflenet-v1", "shufflenet-v2", "mobilenet-v2", "ResNet18"],
)
def test_every_parameter_gets_a_gradient(name):
    torch.manual_seed(0)
    model = create(name, classes=5)
    logits = model.classify(model.features(torch.randn(4, 3, 16, 16)))
    F.cross_entropy(logits, torch.tensor([0, 1, 2, 3])).backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), key


@pytest.mark.parametrize("name", ["resnet20", "wrn-16-2", "vgg8", "mobilenet-v2"])
def test_initial_convolutions_have_kaiming_fan_out_spread(name):
    torch.manual_seed(0)
    for key, weight in create(name).named_parameters():
        if weight.ndim == 4 and weight.numel() > 10_000:
            expected = (2 / (weight.shape[0] * weight.shape[2] * weight.shape[3])) ** 0.5
            assert weight.std().item() == pytest.approx(expected, rel=0.05), key


def test_macs_of_resnet20_match_plain_arithmetic():
    # per stage: six 3x3 convolutions of c channels on a side of s, the first from the last width
    total = 9 * 3 * 16 * 32**2
    for c_in, c, side in ((16, 16, 32), (16, 32, 16), (32, 64, 8)):
        total += 9 * (c_in * c + 5 * c * c) * side**2
        total += c_in * c * side**2 if c_in != c else 0
    assert macs(create("resnet20"), 32) == total + 64 * 100


@pytest.mark.parametrize(("size", "sides"), [(32, (32, 16, 8, 4, 4)), (16, (16, 8, 4, 2, 2))])
def test_vgg11_drops_its_last_pool_and_costs_what_its_convolutions_do(size, sides):
    with torch.device("meta"):
        model = create("vgg11")
        _, maps = model(torch.empty(2, 3, size, size))
    assert tuple(m.shape[-1] for m in maps.values()) == sides
    total, c_in = 512 * 100, 3
    for c, count, side in zip((64, 128, 256, 512, 512), (1, 1, 2, 2, 2), sides, strict=True):
        for _ in range(count):
            total += 9 * c_in * c * side**2
            c_in = c
    assert macs(model, size) == total


@pytest.mark.parametrize("name", ["ResNet18", "ResNet50"])
def test_wide_resnets_keep_a_2x2_map_at_16_px_for_a_quarter_of_the_cost_at_32(name):
    with torch.device("meta"):
        model = create(name)
        embedding, maps = model(torch.empty(2, 3, 16, 16))
        linear = model.dim * 100
        assert 4 * (macs(model, 16) - linear) == macs(model, 32) - linear
    assert [m.shape[-1] for m in maps.values()] == [16, 16, 8, 4, 2]
    assert embedding.shape == (2, {"ResNet18": 512, "ResNet50": 2048}[name])


def test_macs_count_grouped_convolutions_once_and_leave_the_model_alone():
    model = create("shufflenet-v1")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    # A convolution's multiply-accumulates are its weights times its output pixels.
    total = 24 * 3 * 32**2
    for stage, side in ((1, 16), (2, 8), (3, 4)):
        for key, shape in layout_shuffle_v1().items():
            if key.startswith(f"layer{stage}.") and len(shape) == 4:
                wide = f"layer{stage}.0.conv1" in key  # runs before the stride
                total += math.prod(shape) * (2 * side if wide else side) ** 2
    assert macs(model, 32) == total + 960 * 100
    assert model.training
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_an_unknown_name_lists_near_matches_and_all_names():
    with pytest.raises(
        ValueError, match=r"unknown model 'wrn_40_2'; did you mean wrn-40-2"
    ) as info:
        create("wrn_40_2")
    assert all(name in str(info.value) for name in [*ALL, "small-teacher", "small-student"])
    with pytest.raises(ValueError, match="ResNet50"):
        create("resnet50")

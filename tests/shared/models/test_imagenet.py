"""The retrieval networks against torchvision's own forward, and a MobileNet written out here."""

import math
import socket
import sys

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from shared.models import count_parameters, create, macs
from shared.models.checkpoints import load_backbone

RESNETS = {"imagenet-resnet18": 512, "imagenet-resnet50": 2048, "imagenet-resnet101": 2048}
ALL = [*RESNETS, "mobilenet-0.25"]
STAGES = ["stem", "stage1", "stage2", "stage3", "stage4"]


def theirs(name: str, **kwargs) -> nn.Module:
    """torchvision's network with running statistics of its own."""
    model = torchvision.models.get_model(name.removeprefix("imagenet-"), **kwargs)
    for key, buffer in model.named_buffers():
        if key.endswith(("running_mean", "running_var")):
            buffer.copy_(torch.rand_like(buffer) + 0.5)
    return model


@pytest.mark.parametrize(
    ("name", "published", "exact"),
    [
        # trunk as torchvision documents it with 1000 classes, less those, plus the embedding
        ("imagenet-resnet18", "11.4", 11_689_512 - 513_000 + 512 * 513),
        ("imagenet-resnet50", "24.6", 25_557_032 - 2_049_000 + 512 * 2049),
        ("imagenet-resnet101", "43.5", 44_549_160 - 2_049_000 + 512 * 2049),
    ],
)
def test_parameters_are_torchvisions_with_the_classifier_exchanged(name, published, exact):
    with torch.device("meta"):
        found = count_parameters(create(name))
    assert found == exact and f"{found / 1e6:.1f}" == published


def test_table_4_of_embedkd():
    with torch.device("meta"):
        assert f"{count_parameters(create('imagenet-resnet101')) / 1e6:.2f}" == "43.55"
        assert f"{count_parameters(create('imagenet-resnet18')) / 1e6:.1f}" == "11.4"
        assert f"{count_parameters(create('mobilenet-0.25')) / 1e6:.3f}" == "0.345"


@pytest.mark.parametrize("name", RESNETS)
def test_trunk_names_are_torchvisions(name):
    with torch.device("meta"):
        ours, public = create(name).state_dict(), theirs(name).state_dict()
    expected = {key: value.shape for key, value in public.items() if not key.startswith("fc.")}
    expected |= {"embedding.weight": (512, RESNETS[name]), "embedding.bias": (512,)}
    assert {key: value.shape for key, value in ours.items()} == expected


@pytest.mark.parametrize("name", ["imagenet-resnet18", "imagenet-resnet50"])
def test_embedding_and_maps_are_those_of_torchvisions_forward(name, tmp_path):
    """Maps by hooks on torchvision's network, whose classifier takes the embedding's place."""
    public = theirs(name, num_classes=512).double().eval()
    model = create(name).double().eval()
    state = public.state_dict()
    state["embedding.weight"], state["embedding.bias"] = (
        state.pop("fc.weight"),
        state.pop("fc.bias"),
    )
    model.load_state_dict(state, strict=True)

    seen: dict[str, Tensor] = {}

    def keep(key, relu=False):
        return lambda module, inputs, output: seen.update(
            {key: F.relu(output) if relu else output.clone()}
        )

    public.bn1.register_forward_hook(keep("stem", relu=True))
    for i in range(1, 5):
        stage = getattr(public, f"layer{i}")
        stage.register_forward_hook(keep(f"stage{i}"))
        if name == "imagenet-resnet50":
            stage[-1].bn2.register_forward_hook(keep(f"stage{i}.inner", relu=True))
    x = torch.randn(2, 3, 65, 65, dtype=torch.float64)
    expected = public(x)
    embedding, maps = model(x)
    torch.testing.assert_close(embedding, expected)
    assert torch.equal(model.features(x), embedding)
    assert maps.keys() == seen.keys() and set(STAGES) <= maps.keys()
    for key in maps:
        torch.testing.assert_close(maps[key], seen[key])


def test_inner_maps_of_a_teacher_have_the_shape_of_a_students_stages():
    x = torch.randn(1, 3, 64, 64, device="meta")
    with torch.device("meta"):
        _, student = create("imagenet-resnet18")(x)
        _, teacher = create("imagenet-resnet101")(x)
    for i, width in enumerate((64, 128, 256, 512), start=1):
        assert teacher[f"stage{i}.inner"].shape == student[f"stage{i}"].shape
        assert student[f"stage{i}"].shape[1] == width
        assert teacher[f"stage{i}"].shape[1] == 4 * width


def test_maps_are_not_overwritten_by_what_follows():
    """torchvision's blocks rectify in place: a map must be the same after the pass as within it."""
    model = create("imagenet-resnet50").eval()
    x = torch.randn(1, 3, 32, 32)
    _, maps = model(x)
    again = F.relu(model.bn1(model.conv1(x)))
    assert torch.equal(maps["stem"], again)
    out = F.max_pool2d(again, 3, 2, 1)
    for i in range(1, 5):
        out = getattr(model, f"layer{i}")(out)
        torch.testing.assert_close(maps[f"stage{i}"], out.clone())
        assert (maps[f"stage{i}.inner"] >= 0).all()


# Howard et al. 2017, Table 1: depthwise and pointwise pairs, (output channels, stride), at width 1.
TABLE_1 = [(64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2)]
TABLE_1 += [(512, 1)] * 5 + [(1024, 2), (1024, 1)]


def test_mobilenet_matches_a_plain_functional_forward_and_count():
    model = create("mobilenet-0.25").double().eval()
    for buffer in model.buffers():
        if buffer.is_floating_point():
            buffer.copy_(torch.rand_like(buffer) + 0.5)
    values = iter(value for value in model.state_dict().values() if value.is_floating_point())
    x = torch.randn(2, 3, 47, 47, dtype=torch.float64)
    # the embedding was registered before the trunk
    weight, bias = next(values), next(values)
    count = weight.numel() + bias.numel()

    def layer(x: Tensor, shape: tuple[int, ...], stride: int, groups: int) -> Tensor:
        nonlocal count
        kernel, gamma, beta, mean, var = (next(values) for _ in range(5))
        assert kernel.shape == shape
        count += math.prod(shape) + 2 * shape[0]
        x = F.conv2d(x, kernel, stride=stride, padding=shape[-1] // 2, groups=groups)
        return F.relu(F.batch_norm(x, mean, var, gamma, beta, eps=1e-5))

    out, c_in = layer(x, (8, 3, 3, 3), 2, 1), 8
    expected = {"stem": out}
    for i, (channels, stride) in enumerate(TABLE_1):
        out = layer(out, (c_in, 1, 3, 3), stride, c_in)
        out = layer(out, (channels // 4, c_in, 1, 1), 1, 1)
        c_in = channels // 4
        if i + 1 in (3, 5, 11, 13):  # the next one halves the map, or there is none
            expected[f"stage{len(expected)}"] = out
    assert next(values, None) is None
    embedding, maps = model(x)
    torch.testing.assert_close(embedding, F.linear(out.mean((2, 3)), weight, bias))
    assert list(maps) == STAGES
    for name in STAGES:
        torch.testing.assert_close(maps[name], expected[name])
    assert count_parameters(model) == count


@pytest.mark.parametrize(
    ("name", "published"),
    [  # MobileNet: Table 6 of the paper; the others: torchvision's documentation
        ("mobilenet-0.25", "0.041"),
        ("imagenet-resnet18", "1.81"),
        ("imagenet-resnet50", "4.09"),
        ("imagenet-resnet101", "7.80"),
    ],
)
def test_macs_at_224_are_the_published_ones(name, published):
    with torch.device("meta"):
        giga = macs(create(name), 224) / 1e9
    assert f"{giga:.{len(published) - 2}f}" == published


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("size", [16, 32, 33, 64])
def test_small_inputs_halve_the_map_at_the_stem_and_every_stage(name, size):
    with torch.device("meta"):
        model = create(name, dim=64)
        embedding, maps = model(torch.empty(2, 3, size, size))
    assert embedding.shape == (2, model.dim) == (2, 64)
    for i, key in enumerate(STAGES, start=1):
        assert maps[key].shape[2:] == (math.ceil(size / 2**i),) * 2
    assert macs(model, size) > 0


@pytest.mark.parametrize("name", ["imagenet-resnet18", "imagenet-resnet50"])
@pytest.mark.parametrize("size", [96, 128, 160, 224, 256])
def test_the_sizes_of_horkds_table_4_end_in_whole_maps(name, size):
    """All are multiples of 32: what is not the linear layer costs in proportion to the pixels."""
    with torch.device("meta"):
        model = create(name)
        embedding, maps = model(torch.empty(2, 3, size, size))
        linear = model.embedding.in_features * 512
        assert (macs(model, size) - linear) * 224**2 == (macs(model, 224) - linear) * size**2
    assert embedding.shape == (2, 512) and maps["stage4"].shape[2:] == (size // 32,) * 2


@pytest.mark.parametrize("name", ["imagenet-resnet18", "mobilenet-0.25"])
def test_every_parameter_gets_a_gradient(name):
    model = create(name)
    embedding, _ = model(torch.randn(2, 3, 32, 32))
    embedding.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_there_is_no_classifier():
    model = create("imagenet-resnet18")
    assert model.classes is None
    with pytest.raises(ValueError, match="RetrievalResNet has no classifier: use a head"):
        model.classify(torch.randn(2, 512))


@pytest.fixture
def published(tmp_path, monkeypatch):
    """A stand-in for the file torchvision downloads, in the cache of torch's hub."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    model = theirs("imagenet-resnet18")
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    torch.save(model.state_dict(), folder / "resnet18-f37072fd.pth")
    return model.state_dict()


def test_imagenet_weights_fill_the_trunk_from_torchs_cache(published):
    state = create("imagenet-resnet18", weights="imagenet").state_dict()
    trunk = [key for key in published if not key.startswith("fc.")]
    assert all(torch.equal(state[key], published[key]) for key in trunk)
    assert state["embedding.weight"].any()


def test_without_a_network_the_error_says_what_to_fetch(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))

    def unreachable(*args, **kwargs):
        raise socket.gaierror(-3, "Temporary failure in name resolution")

    monkeypatch.setattr(socket, "getaddrinfo", unreachable)
    for proxy in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.delenv(proxy, raising=False)
    with pytest.raises(
        ValueError, match=r"resnet18 could not be had from https://.*resnet18.*pth .*load_backbone"
    ) as info:
        create("imagenet-resnet18", weights="imagenet")
    assert "\n" not in str(info.value)
    with pytest.raises(ValueError, match="weights is 'cifar': it must be imagenet"):
        create("imagenet-resnet18", weights="cifar")


def test_a_torchvision_file_fills_the_trunk_and_says_what_it_left(published, tmp_path):
    model = create("imagenet-resnet18")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    found = load_backbone(model, tmp_path / "hub" / "checkpoints" / "resnet18-f37072fd.pth")
    assert found.layout == "torchvision, state dict" and not found.bgr
    assert found.left_out == ("fc.weight", "fc.bias")
    assert found.kept == ("embedding.weight", "embedding.bias")
    assert "fc.weight" in str(found) and "embedding.weight" in str(found)
    for key, value in model.state_dict().items():
        kept = key.startswith("embedding.")
        assert torch.equal(value, before[key] if kept else published[key])


def test_a_trunk_that_is_not_whole_is_refused_and_so_is_a_missing_embedding(published, tmp_path):
    path = tmp_path / "resnet18.pth"
    model = create("imagenet-resnet18")
    part = {key: value for key, value in published.items() if key != "layer4.1.bn2.running_var"}
    torch.save(part | {"layer5.weight": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match=r"1 missing \(layer4\.1\.bn2\.running_var\)") as info:
        load_backbone(model, path)
    assert "1 unexpected (layer5.weight)" in str(info.value)
    torch.save({k: v for k, v in published.items() if not k.startswith("fc.")}, path)
    with pytest.raises(ValueError, match=r"2 missing \(embedding\.weight, embedding\.bias\)"):
        load_backbone(model, path)  # no classifier: not torchvision's file, whatever else it is


def test_a_network_of_ours_loads_with_its_embedding(tmp_path):
    one, other = create("mobilenet-0.25"), create("mobilenet-0.25")
    torch.save(one.state_dict(), tmp_path / "ours.pth")
    found = load_backbone(other, tmp_path / "ours.pth")
    assert (found.layout, found.left_out, found.kept) == ("state dict", (), ())
    assert torch.equal(other.embedding.weight, one.embedding.weight)


def test_without_timm_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ValueError, match="timm:resnet10t needs timm.*pip install timm"):
        create("timm:resnet10t")


@pytest.mark.parametrize("name", ["mobilenetv4_conv_small", "resnet10t"])
def test_a_timm_model_has_the_face(name):
    timm = pytest.importorskip("timm")
    model = create(f"timm:{name}", classes=7).eval()
    x = torch.randn(2, 3, 64, 64)
    embedding, maps = model(x)
    public = timm.create_model(name, num_classes=0).eval()
    public.load_state_dict(model.net.state_dict(), strict=True)
    torch.testing.assert_close(embedding, public(x))
    assert torch.equal(model.features(x), embedding)
    assert embedding.shape == (2, model.dim)
    assert model.classify(embedding).shape == (2, model.classes) == (2, 7)
    assert list(maps) == [f"stage{i}" for i in range(1, 6)]
    assert [m.shape[2] for m in maps.values()] == [32, 16, 8, 4, 2]
    assert maps["stage5"].shape == public.forward_features(x).shape
    assert macs(model, 64) > 0


def test_timm_passes_arguments_on_and_refuses_what_it_does_not_know():
    pytest.importorskip("timm")
    model = create("timm:vit_tiny_patch16_224", img_size=32)
    embedding, maps = model(torch.randn(1, 3, 32, 32))
    assert embedding.shape == (1, model.dim) == (1, 192) and len(maps) == 12
    assert model.classes is None
    with pytest.raises(ValueError, match="created without classes"):
        model.classify(embedding)
    with pytest.raises(ValueError, match="timm:nonesuch cannot be made"):
        create("timm:nonesuch")
    with pytest.raises(ValueError, match="timm:resnet10t cannot be made"):
        create("timm:resnet10t", colour=3)

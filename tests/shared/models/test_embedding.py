import pytest
import torch

from shared.models import count_parameters, create, macs
from shared.models.embedding import SmallNet
from shared.models.heads import CosFace

SMALL = ["small-teacher", "small-student", "small-assistant"]


def parameters_by_hand(stem: int, widths: list[int], strides: list[int], last_side: int) -> int:
    """Convolutions, two numbers a channel and BN, 1x1 + BN shortcuts, linear, last BN."""
    total, c_in = 27 * stem + 2 * stem, stem
    for c, stride in zip(widths, strides, strict=True):
        total += 9 * c_in * c + 9 * c * c + 4 * c
        if stride != 1 or c_in != c:
            total += c_in * c + 2 * c
        c_in = c
    return total + c_in * last_side**2 * 128 + 2 * 128


@pytest.mark.parametrize(
    ("name", "by_hand", "with_head"),
    [
        ("small-teacher", parameters_by_hand(16, [32, 64, 128], [2, 2, 2], 4), "0.62"),
        ("small-student", parameters_by_hand(16, [16, 32, 64], [1, 2, 2], 4), "0.26"),
        ("small-assistant", parameters_by_hand(16, [16, 32, 64], [2, 2, 2], 4), "0.26"),
    ],
)
def test_parameter_counts_match_arithmetic_and_the_published_prototype(name, by_hand, with_head):
    model = create(name)
    assert count_parameters(model) == by_hand
    assert f"{(by_hand + count_parameters(CosFace(128, 400))) / 1e6:.2f}" == with_head


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("size", [4, 5, 8, 16, 24, 32, 64, 112])
def test_any_size_from_4_works_and_the_face_is_uniform(name, size):
    model = create(name, size=size)
    embedding, maps = model(torch.randn(2, 3, size, size))
    assert embedding.shape == (2, model.dim) == (2, 128)
    assert list(maps) == ["stem", "stage1", "stage2", "stage3"]
    embedding.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    model.eval()
    x = torch.randn(3, 3, size, size)
    assert torch.equal(model.features(x), model(x)[0])
    assert macs(model, size) > 0


@pytest.mark.parametrize("name", SMALL)
def test_the_published_sizes_flatten_a_4x4_map(name):
    model = create(name)
    _, maps = model(torch.randn(2, 3, model.size, model.size))
    assert maps["stage3"].shape[-2:] == (4, 4)


def test_every_pixel_of_the_last_map_has_weights_of_its_own():
    """Flatten, not average: moving one spot of the last map changes the embedding."""
    model = create("small-student").eval()
    a, b = torch.zeros(1, 64, 4, 4), torch.zeros(1, 64, 4, 4)
    a[0, 3, 0, 0], b[0, 3, 2, 1] = 1, 1
    spread = model.linear(a.flatten(1)) - model.linear(b.flatten(1))
    assert spread.abs().max() > 1e-3


def test_channels_last_gives_the_same_embedding():
    model = create("small-student").double().eval()
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    expected = model.features(x)
    got = model.to(memory_format=torch.channels_last).features(
        x.to(memory_format=torch.channels_last)
    )
    torch.testing.assert_close(got, expected)


def test_another_size_is_a_clear_error():
    model = create("small-student")
    with pytest.raises(ValueError, match=r"expected images \[B, 3, 16, 16\], got \[2, 3, 32, 32\]"):
        model(torch.randn(2, 3, 32, 32))
    with pytest.raises(ValueError, match="at least 4 pixels"):
        create("small-student", size=3)
    with pytest.raises(ValueError, match="2 widths but 3 strides"):
        SmallNet(16, (16, 32), 16, 1)


def test_there_is_no_classifier():
    model = create("small-student", dim=32)
    assert model.classes is None and model.dim == 32
    with pytest.raises(ValueError, match="head of shared.models.heads"):
        model.classify(torch.randn(2, 32))


@pytest.mark.parametrize("size", [4, 5, 8, 16])
def test_the_assistant_is_the_student_for_images_four_times_as_large(size):
    """Every weight of the student has its counterpart; the assistant has one shortcut more."""
    with torch.device("meta"):
        student = create("small-student", size=size)
        assistant = create("small-assistant", size=4 * size)
        ours = {k: v.shape for k, v in student.state_dict().items()}
        theirs = {k: v.shape for k, v in assistant.state_dict().items()}
        _, low = student(torch.empty(2, 3, size, size))
        _, high = assistant(torch.empty(2, 3, 4 * size, 4 * size))
    more = {key for key in theirs if key not in ours}
    assert {k: v for k, v in theirs.items() if k not in more} == ours
    assert more and all(key.startswith("stages.0.downsample.") for key in more)
    assert low["stage3"].shape == high["stage3"].shape


def slim_by_hand(width: int, dim: int) -> tuple[int, int]:
    """(trunk, embedding) of a 3-4-6-3 ResNet of basic blocks with a 3x3 stem: convolutions, two
    numbers a channel and BN, a 1x1 shortcut where the width changes; a linear layer with bias."""
    total, c_in = 27 * width + 2 * width, width
    for stage, blocks in enumerate((3, 4, 6, 3)):
        c = width * 2**stage
        for _ in range(blocks):
            total += 9 * c_in * c + 9 * c * c + 4 * c
            total += c_in * c + 2 * c if c_in != c else 0
            c_in = c
    return total, c_in * dim + dim


def test_slim_resnet34_has_about_the_7_8_million_parameters_of_the_paper():
    with torch.device("meta"):
        found = count_parameters(create("slim-resnet34"))
        wider = count_parameters(create("slim-resnet34", width=39))
    (trunk, head), (trunk_39, head_39) = slim_by_hand(38, 512), slim_by_hand(39, 512)
    assert (found, wider) == (trunk + head, trunk_39 + head_39)
    assert (f"{found / 1e6:.2f}", f"{trunk_39 / 1e6:.2f}") == ("7.66", "7.91")
    # torchvision's resnet34: 21.28M with width 64, a 7x7 stem and 1000 classes
    assert slim_by_hand(64, 1000)[0] + 40 * 3 * 64 + 512 * 1000 + 1000 == 21_797_672


@pytest.mark.parametrize("size", [16, 17, 32, 112])
def test_slim_resnet34_takes_images_of_any_size_with_the_same_weights(size):
    with torch.device("meta"):
        model = create("slim-resnet34")
        embedding, maps = model(torch.empty(2, 3, size, size))
    assert embedding.shape == (2, 512) == (2, model.dim)
    assert list(maps) == ["stem", "stage1", "stage2", "stage3", "stage4"]
    shapes = [(38, 1), (38, 1), (76, 2), (152, 4), (304, 8)]
    assert [(m.shape[1], m.shape[2]) for m in maps.values()] == [
        (channels, -(-size // down)) for channels, down in shapes
    ]


def macs_by_hand(size: int) -> int:
    """Of slim-resnet34: a convolution costs its weights at every pixel that it puts out."""
    total, c_in, side = 27 * 38 * size**2, 38, size
    for stage, blocks in enumerate((3, 4, 6, 3)):
        c, side = 38 * 2**stage, side if stage == 0 else side // 2
        for block in range(blocks):
            shortcut = c_in * c if stage and block == 0 else 0
            total += (9 * c_in * c + 9 * c * c + shortcut) * side**2
            c_in = c
    return total + 304 * 512


@pytest.mark.parametrize("size", [16, 32])
def test_slim_resnet34_costs_what_its_convolutions_do(size):
    with torch.device("meta"):
        assert macs(create("slim-resnet34"), size) == macs_by_hand(size)


def test_slim_resnet34_has_the_common_face_and_trains():
    torch.manual_seed(0)
    model = create("slim-resnet34", width=4, dim=8)
    model(torch.randn(4, 3, 16, 16))[0].square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    model.eval()
    x = torch.randn(2, 3, 16, 16)
    assert torch.equal(model.features(x), model(x)[0])
    with pytest.raises(ValueError, match="SlimResNet34 has no classifier: use a head"):
        model.classify(torch.randn(2, 8))

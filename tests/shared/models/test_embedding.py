import pytest
import torch

from shared.models import count_parameters, create, macs
from shared.models.embedding import SmallNet
from shared.models.heads import CosFace


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
    ],
)
def test_parameter_counts_match_arithmetic_and_the_published_prototype(name, by_hand, with_head):
    model = create(name)
    assert count_parameters(model) == by_hand
    assert f"{(by_hand + count_parameters(CosFace(128, 400))) / 1e6:.2f}" == with_head


@pytest.mark.parametrize("name", ["small-teacher", "small-student"])
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


@pytest.mark.parametrize("name", ["small-teacher", "small-student"])
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

"""Images of mixed resolution: which size each gets, and what it looks like at it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import chisquare
from torch import Tensor

from btnet.views import down_up, draw_sizes, mixed
from shared.config import Data
from shared.data.pipeline import normalise

LINEAR = Data(hr=48, lr=12, kernel="bilinear")
MANY = torch.arange(40_000)


def pictures(count: int, side: int = 48) -> Tensor:
    pixels = np.random.default_rng(0).integers(0, 256, (count, 3, side, side), dtype=np.uint8)
    return torch.from_numpy(pixels)


# -- which size ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "how, shares",
    [("mr", (0.2, 0.2, 0.2, 0.2, 0.2)), ("mr-v2", (0.3, 0.25, 0.2, 0.15, 0.1))],
)
def test_the_five_sizes_come_as_often_as_the_paper_says(how, shares: tuple[float, ...]) -> None:
    sizes = draw_sizes(how, 112, 0, MANY, 1)
    counts = [int((sizes == s).sum()) for s in (112, 56, 28, 14, 7)]
    assert sum(counts) == len(MANY) and sizes.dtype == torch.int64
    assert chisquare(counts, [p * len(MANY) for p in shares]).pvalue > 0.01


def test_v3_draws_every_whole_size_from_4_up_equally_often() -> None:
    sizes = draw_sizes("mr-v3", 112, 0, MANY, 1)
    assert (int(sizes.min()), int(sizes.max())) == (4, 112)
    assert chisquare(torch.bincount(sizes)[4:].numpy()).pvalue > 0.01


@pytest.mark.parametrize("how", ["mr", "mr-v2", "mr-v3"])
def test_an_image_gets_its_size_in_whatever_batch_it_is(how) -> None:
    whole = draw_sizes(how, 48, 5, MANY[:100], 2)
    some = torch.tensor([93, 0, 17, 17])
    assert torch.equal(draw_sizes(how, 48, 5, some, 2), whole[some])


def test_sizes_change_with_epoch_and_seed() -> None:
    sizes = [draw_sizes("mr", 48, seed, MANY, epoch) for seed, epoch in [(0, 0), (0, 1), (1, 0)]]
    for a, b in [(0, 1), (0, 2), (1, 2)]:  # independent: they agree one time in five
        assert float((sizes[a] == sizes[b]).double().mean()) == pytest.approx(0.2, abs=0.01)


def test_an_unknown_way_and_a_side_that_cannot_be_halved_are_refused() -> None:
    with pytest.raises(ValueError, match="there are: mr, mr-v2, mr-v3"):
        draw_sizes("v3", 48, 0, MANY, 0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="--data.hr 100, --sizes 5: mr halves the first 4 times"):
        draw_sizes("mr", 100, 0, MANY, 0)
    assert set(draw_sizes("mr", 100, 0, MANY, 0, count=3).tolist()) == {100, 50, 25}
    assert int(draw_sizes("mr-v3", 100, 0, MANY, 0).max()) == 100


# -- what it looks like --------------------------------------------------------------------------


def resized(plane: np.ndarray, size: int, kernel: str) -> np.ndarray:
    """By Pillow, in floats, and then rounded as a file is."""
    image = Image.fromarray(plane.astype(np.float32)).resize(
        (size, size), Image.Resampling[kernel.upper()]
    )
    return np.array(image).round().clip(0, 255)


@pytest.mark.parametrize("kernel", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [3, 13, 24])
def test_down_and_up_are_those_of_an_8_bit_lr_file(kernel, size: int) -> None:
    pixels = pictures(2)
    ours = down_up(pixels, size, Data(hr=48, lr=12, kernel=kernel))
    assert ours.dtype == torch.uint8 and ours.shape == pixels.shape
    off = []
    for plane, out in zip(pixels.flatten(0, 1).numpy(), ours.flatten(0, 1).numpy(), strict=True):
        off.append(np.abs(out - resized(resized(plane, size, kernel), 48, kernel)))
    # a level at a half may be rounded either way: at 24 px, whose weights are (1 3 3 1) / 8 in each
    # direction, that is one LR pixel in 64, which shows in a few of the 48 x 48
    assert np.max(off) <= 1 and np.mean(np.array(off) > 0) < 0.03


@pytest.mark.parametrize("kernel", ["area", "nearest"])
def test_area_and_nearest_repeat_the_lr_pixels(kernel) -> None:
    out = down_up(pictures(1), 12, Data(hr=48, lr=12, kernel=kernel))
    assert torch.equal(out, out[..., ::4, ::4].repeat_interleave(4, -1).repeat_interleave(4, -2))


def test_the_full_size_leaves_an_image_as_it_is_and_a_larger_one_is_refused() -> None:
    pixels = pictures(2)
    assert torch.equal(down_up(pixels, 48, LINEAR), pixels)
    with pytest.raises(ValueError, match="cannot down-sample 48x48 px to 49 px"):
        down_up(pixels, 49, LINEAR)


# -- a batch -------------------------------------------------------------------------------------

IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


@pytest.mark.parametrize("numbers", [{}, IMAGENET])
def test_a_mixed_batch_is_each_image_alone_bit_for_bit(numbers: dict) -> None:
    data = Data(hr=48, lr=12, kernel="bilinear", **numbers)
    pixels, sizes = pictures(7), torch.tensor([12, 48, 3, 12, 31, 48, 4])
    out = mixed(normalise(pixels, data), sizes, data)
    assert out.is_contiguous(memory_format=torch.channels_last)
    for k, size in enumerate(sizes.tolist()):
        alone = normalise(down_up(pixels[k : k + 1], size, data), data)
        assert torch.equal(out[k : k + 1], alone)


@pytest.mark.parametrize("numbers", [{}, IMAGENET])
def test_taking_the_normalisation_back_gives_every_level_again(numbers: dict) -> None:
    """A constant image is constant at every size: each of the 256 levels must come through."""
    data = Data(hr=48, lr=12, kernel="bilinear", **numbers)
    levels = torch.arange(256, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 16, 16)
    x = normalise(levels.contiguous(), data)
    assert torch.equal(mixed(x, torch.full((256,), 4), data), x)


def test_the_loaders_batch_is_left_alone() -> None:
    x = normalise(pictures(2), LINEAR)
    before = x.clone()
    mixed(x, torch.tensor([3, 3]), LINEAR)
    assert torch.equal(x, before)

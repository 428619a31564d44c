"""Random parts of pictures, against torchvision one picture at a time."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import ks_2samp
from torchvision.transforms import v2

from shared.data.crops import TRIES, boxes, resized
from shared.degrade import keys


def pixels(count: int, side: int, seed: int = 0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, side, side), generator=g, dtype=torch.uint8)


@pytest.mark.parametrize(("side", "size"), [(256, 224), (73, 64), (16, 14), (9, 8), (5, 5)])
def test_a_part_is_what_torchvision_cuts_out_and_resizes_to_a_rounding(side: int, size: int):
    x, box = pixels(12, side), boxes(keys(5, torch.arange(12), 2), side)
    box[0] = torch.tensor([0, 0, side, side])  # the largest scale
    mirrored = torch.arange(12) % 2 == 1
    found = resized(x, box, size, mirrored)
    assert found.shape == (12, 3, size, size) and found.dtype == torch.uint8
    for k, (top, left, height, width) in enumerate(box.tolist()):
        part = v2.functional.resized_crop(
            x[k].double(), top, left, height, width, [size, size], antialias=True
        )
        part = part.flip(-1) if mirrored[k] else part
        assert (found[k] - part).abs().max() <= 0.5 + 1e-4


def test_a_part_of_the_outputs_size_is_the_part_itself() -> None:
    x, box = pixels(3, 20), torch.tensor([[0, 0, 12, 12], [8, 3, 12, 12], [1, 8, 12, 12]])
    found = resized(x, box, 12, torch.tensor([False, True, False]))
    assert torch.equal(found[0], x[0, :, :12, :12])
    assert torch.equal(found[1], x[1, :, 8:, 3:15].flip(-1))
    assert torch.equal(found[2], x[2, :, 1:13, 8:])


def test_one_picture_alone_gives_the_bits_it_gives_in_a_batch() -> None:
    x, box, mirrored = pixels(9, 64), boxes(keys(1, torch.arange(9), 0), 64), torch.arange(9) > 4
    together = resized(x, box, 56, mirrored)
    for k in range(9):
        own = slice(k, k + 1)
        assert torch.equal(resized(x[own], box[own], 56, mirrored[own]), together[own])


def test_areas_ratios_and_places_are_torchvisions() -> None:
    """Kolmogorov-Smirnov of 4,000 parts each; at p < 1e-4 there would be a difference."""
    box = boxes(keys(0, torch.arange(4000), 7), 256).double().numpy()
    torch.manual_seed(0)
    draw = v2.RandomResizedCrop(224).make_params
    drawn = [draw([torch.empty(3, 256, 256)]) for _ in range(4000)]
    other = np.array([[d["top"], d["left"], d["height"], d["width"]] for d in drawn], float)
    for f in (
        lambda b: b[:, 2] * b[:, 3],
        lambda b: b[:, 3] / b[:, 2],
        lambda b: b[:, 0],
        lambda b: b[:, 1],
        lambda b: (b[:, 0] + 0.5) / (257 - b[:, 2]),
        lambda b: (b[:, 1] + 0.5) / (257 - b[:, 3]),
    ):
        assert ks_2samp(f(box), f(other)).pvalue > 1e-4


@pytest.mark.parametrize("side", [1, 2, 3, 8, 40])
def test_parts_lie_in_the_picture_and_reach_its_borders(side: int) -> None:
    top, left, height, width = boxes(keys(2, torch.arange(5000), 1), side).T
    assert (height >= 1).all() and (width >= 1).all() and (top >= 0).all() and (left >= 0).all()
    assert int((top + height).max()) == int((left + width).max()) == side
    assert not int(top.min()) and not int(left.min())


def test_what_never_fits_is_the_whole_picture(monkeypatch) -> None:
    """Of area 1 only a square fits: the ratio is then drawn as 4:3 in every try."""
    ones = torch.ones(3, 4 * TRIES, dtype=torch.float64)
    monkeypatch.setattr("shared.data.crops.uniform", lambda *_, **__: ones)
    assert boxes(torch.zeros(3, dtype=torch.int64), 30).tolist() == [[0, 0, 30, 30]] * 3


def test_the_first_try_that_fits_is_taken(monkeypatch) -> None:
    draw = torch.ones(1, TRIES, 4, dtype=torch.float64)
    draw[0, 2] = torch.tensor([0.0, 0.5, 0.0, 0.0])
    draw[0, 5] = torch.tensor([0.2, 0.5, 0.9, 0.9])
    monkeypatch.setattr("shared.data.crops.uniform", lambda *_, **__: draw.view(1, -1))
    side = round((0.08 * 100**2) ** 0.5)
    assert boxes(torch.zeros(1, dtype=torch.int64), 100).tolist() == [[0, 0, side, side]]


def test_parts_depend_on_seed_picture_and_epoch_and_on_nothing_else() -> None:
    image = torch.tensor([7, 3, 7, 900])
    box = boxes(keys(1, image, 4), 64)
    assert torch.equal(box[0], box[2])
    assert torch.equal(boxes(keys(1, image.flip(0), 4), 64), box.flip(0))
    for other in (keys(2, image, 4), keys(1, image, 5), keys(1, image + 1, 4)):
        assert (boxes(other, 64) != box).any(1).all()

"""What the trunk and the multi-resolution baselines are trained on: images down and up again."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from shared import degrade
from shared.config import Data
from shared.data.pipeline import normalise
from shared.degrade import low, to_float, to_uint8

How = Literal["mr", "mr-v2", "mr-v3"]
SHARES = (0.3, 0.25, 0.2, 0.15, 0.1)  # of mr-v2, from the largest of five sizes down
SMALLEST = 4  # px, of mr-v3


def draw_sizes(
    how: How, largest: int, seed: int, index: Tensor, epoch: int, *, count: int = 5
) -> Tensor:
    """The size in px that each image is brought down to in an epoch: int64 [B] on the CPU.

    mr: one of `largest` / 2^i, i < count, with equal probability; mr-v2: with probabilities .3 .25
    .2 .15 .1 from the largest down (of fewer sizes: the first ones, to a sum of 1); mr-v3: a whole
    number from 4 to `largest` (ours: uniform). index: [B] image numbers. A function of (seed,
    image, epoch), whatever the batch. Source: Sec. 4.1, Baselines, with 5 sizes. Raises ValueError
    for another word, and for a largest size that cannot be halved so often.
    """
    u = degrade.uniform(degrade.keys(seed, index.cpu(), epoch), 1)[:, 0]
    if how == "mr-v3":
        return SMALLEST + (u * (largest - SMALLEST + 1)).long()
    if how not in ("mr", "mr-v2"):
        raise ValueError(f"draw_sizes: no way {how!r}; there are: mr, mr-v2, mr-v3")
    if not 1 <= count <= len(SHARES) or largest % 2 ** (count - 1):
        raise ValueError(
            f"--data.hr {largest}, --sizes {count}: {how} halves the first {count - 1} times; give "
            f"1 to {len(SHARES)} sizes and a side that is divided so often"
        )
    shares = SHARES[:count] if how == "mr-v2" else (1 / count,) * count
    edges = torch.tensor(shares, dtype=torch.float64).cumsum(0)
    edges = edges[:-1] / edges[-1]
    return largest >> torch.bucketize(u, edges, right=True)


def down_up(pixels: Tensor, size: int, data: Data) -> Tensor:
    """uint8 [B, 3, S, S] down to `size` px and back up: uint8 [B, 3, S, S]; at S the same.

    Both ways with the kernel and antialias of `data`, and both times rounded to 8 bits: between
    them is the LR file. Raises ValueError for a size below 1 or above S.
    """
    side = pixels.shape[-1]
    if size == side:
        return pixels
    small = low(pixels, size, mode=data.kernel, antialias=data.antialias)
    return enlarged(small, side, data)


def enlarged(pixels: Tensor, size: int, data: Data) -> Tensor:
    """uint8 [B, 3, H, W] up to size x size px by the kernel of `data`, rounded to 8 bits."""
    linear = data.kernel in ("bicubic", "bilinear")
    options = {"align_corners": False, "antialias": data.antialias} if linear else {}
    return to_uint8(F.interpolate(to_float(pixels), (size, size), mode=data.kernel, **options))


def mixed(x_h: Tensor, sizes: Tensor, data: Data) -> Tensor:
    """A loader's x_h [B, 3, S, S], each image at its size [B]: normalised, channels-last.

    Takes the normalisation back, which is exact since x_h is of 8-bit images.
    """
    mean, std = (torch.tensor(v, device=x_h.device)[:, None, None] for v in (data.mean, data.std))
    out = x_h.clone(memory_format=torch.channels_last)
    for size in sizes.unique().tolist():
        if size == x_h.shape[-1]:
            continue
        rows = (sizes == size).nonzero()[:, 0].to(x_h.device)
        pixels = to_uint8(x_h[rows].contiguous() * std + mean)
        out[rows] = normalise(down_up(pixels, size, data), data)
    return out

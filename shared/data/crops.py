"""Random parts of pictures, resized in batches on the device: torchvision's RandomResizedCrop.

Which part an image gives is a function of its key (shared.degrade.keys), so an epoch can be
replayed. Resizing is bilinear and antialiased, as torchvision's default: of a part larger than the
output a pixel is the mean under a triangle as wide as the scale. Only additions and products pixel
by pixel, no convolution or matrix product: an image gets the same bits in whatever batch it is.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from shared.degrade import CROPS, uniform

AREA = (0.08, 1.0)  # share of the picture
RATIO = (3 / 4, 4 / 3)  # width / height
TRIES = 10


def boxes(key: Tensor, side: int) -> Tensor:
    """Parts of square pictures of `side` px: int64 [B, 4] of top, left, height, width; keys [B].

    The area is uniform, the logarithm of the ratio too, sides are rounded, and the place is uniform
    among all where the part lies inside. What does not fit is drawn again, after ten times it is
    the whole picture. So draws torchvision 0.8 and later (after Szegedy et al. 2015).
    """
    draw = uniform(key.cpu(), 4 * TRIES, stream=CROPS).view(-1, TRIES, 4)
    area = side**2 * (AREA[0] + (AREA[1] - AREA[0]) * draw[..., 0])
    low, high = map(math.log, RATIO)
    ratio = torch.exp(low + (high - low) * draw[..., 1])
    height, width = (area / ratio).sqrt().round(), (area * ratio).sqrt().round()
    fits = (height >= 1) & (height <= side) & (width >= 1) & (width <= side)
    top = (draw[..., 2] * (side - height + 1)).floor()
    left = (draw[..., 3] * (side - width + 1)).floor()
    tried = torch.stack([top, left, height, width], dim=-1)  # [B, TRIES, 4]
    first = tried[torch.arange(len(tried)), fits.int().argmax(1)]
    whole = torch.tensor([0.0, 0.0, side, side], dtype=torch.float64)
    return torch.where(fits.any(1)[:, None], first, whole).long()


def resized(pixels: Tensor, box: Tensor, size: int, mirrored: Tensor) -> Tensor:
    """Parts `box` [B, 4] of pixels uint8 [B, 3, H, W], resized, and mirrored where `mirrored` [B].

    Returns uint8 [B, 3, size, size], rounded.
    """
    top, left, height, width = box.cpu().T
    rows, down = _taps(top, height, size, pixels.shape[-2])
    columns, across = _taps(left, width, size, pixels.shape[-1])
    turned = mirrored.cpu()[:, None, None]
    columns = torch.where(turned, columns.flip(1), columns)
    across = torch.where(turned, across.flip(1), across)
    tall = _along(pixels.permute(0, 2, 3, 1), rows, down)  # [B, size, W, 3]
    out = _along(tall.transpose(1, 2), columns, across)  # [B, size, size, 3]: columns, rows
    return out.add_(0.5).clamp_(0, 255).to(torch.uint8).permute(0, 3, 2, 1)


def _along(lines: Tensor, index: Tensor, weight: Tensor) -> Tensor:
    """Weighted sums of lines [B, L, M, 3]: float32 [B, size, M, 3]."""
    index, weight = index.to(lines.device), weight.to(lines.device)[..., None, None]
    which = torch.arange(len(lines), device=lines.device)[:, None]
    out = weight[:, :, 0] * lines[which, index[:, :, 0]]
    for tap in range(1, index.shape[-1]):
        out += weight[:, :, tap] * lines[which, index[:, :, tap]]
    return out


def _taps(first: Tensor, length: Tensor, size: int, side: int) -> tuple[Tensor, Tensor]:
    """Lines of `length` [B] px from `first` [B] on, of `side`, resized to `size`: which pixels an
    output adds up, int64 [B, size, T], and their weights, float32."""
    scale = (length.double() / size)[:, None]  # [B, 1]
    reach = scale.clamp(min=1)
    centre = (torch.arange(size) + 0.5) * scale
    lowest = (centre - reach + 0.5).floor()[:, :, None]
    tap = lowest + torch.arange(math.ceil(2 * max(1.0, side / size)))
    weight = (1 - (tap + 0.5 - centre[:, :, None]).abs() / reach[:, :, None]).clamp(min=0)
    last = length[:, None, None] - 1
    weight = torch.where((tap >= 0) & (tap <= last), weight, 0)
    weight = weight / weight.sum(-1, keepdim=True)
    inside = tap.clamp(min=0).minimum(last).long()
    return first[:, None, None] + inside, weight.float()

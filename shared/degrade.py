"""HR to LR, on batches, on the device; kernel and antialias are always named."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Kernel = Literal["bicubic", "bilinear", "area", "nearest"]


def downsample(x: Tensor, size: int, *, mode: Kernel = "bicubic", antialias: bool = True) -> Tensor:
    """Resize images to `size` x `size` px.

    x: [B, C, H, W] float. Returns [B, C, size, size], unclamped: bicubic over- and undershoots.
    `antialias` widens the bicubic and bilinear kernels by the scale (area and nearest know none)
    and changes PyTorch's bicubic coefficient from a = -.75 to the -.5 of PIL.
    Raises ValueError for a size above the input's, and for images that are not float.
    """
    if not x.is_floating_point():
        raise ValueError(f"downsample takes float images, not {x.dtype}; see to_float")
    if size < 1 or size > min(x.shape[-2:]):
        raise ValueError(f"cannot down-sample {x.shape[-2]}x{x.shape[-1]} px to {size} px")
    if mode in ("area", "nearest"):
        return F.interpolate(x, size=(size, size), mode=mode)
    return F.interpolate(x, size=(size, size), mode=mode, align_corners=False, antialias=antialias)


def to_float(pixels: Tensor) -> Tensor:
    """uint8 [..] to float32 in [0, 1]."""
    return pixels.to(torch.float32) / 255


def to_uint8(x: Tensor) -> Tensor:
    """Float in [0, 1], clamped and rounded: what an image file or a camera would hold."""
    return x.mul(255).round_().clamp_(0, 255).to(torch.uint8)


def low(pixels: Tensor, size: int, *, mode: Kernel, antialias: bool) -> Tensor:
    """uint8 [B, C, H, W] to uint8 [B, C, size, size]: the LR image of an HR one, as 8-bit files."""
    if pixels.shape[-1] == size and pixels.shape[-2] == size:
        return pixels
    return to_uint8(downsample(to_float(pixels), size, mode=mode, antialias=antialias))

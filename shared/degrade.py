"""HR to LR, on batches, on the device; kernel and antialias are always named.

Images are float [B, C, H, W] in [0, 1]. A strength is a number, or one an image as a tensor [B] on
the CPU: kernels and tables are made there, so that no step waits for a GPU. What is random is
a function of a key an image, `keys(seed, image, epoch)`: nothing is drawn in sequence, so a run can
be replayed, and on the CPU an image gets the same bits in whatever batch it is. For that the blurs
add shifted images instead of calling a convolution, whose order of additions depends on the batch.
Blurs and JPEG carry no gradient.

"Unlocalised" is no function of pixels: it is the whole image against its box, which
`shared.data.items.Boxed` cuts out of the native image.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
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


def down_up(x: Tensor, size: int | Tensor, *, mode: Kernel, antialias: bool) -> Tensor:
    """Down to size x size px and back: an LR image at the HR image's size. Clamped to [0, 1].

    x: [B, C, H, W]; size: px, or int64 [B] on the CPU, one an image (one resize for each distinct
    size). The same kernel both ways; area and nearest both repeat pixels on the way up.
    """
    sizes = torch.as_tensor(size).expand(len(x))
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    for one in sizes.unique().tolist():
        rows = (sizes == one).nonzero()[:, 0].to(x.device)
        small = downsample(x[rows].contiguous(), one, mode=mode, antialias=antialias).clamp(0, 1)
        if mode in ("area", "nearest"):
            large = F.interpolate(small, size=x.shape[-2:], mode=mode)
        else:
            large = F.interpolate(
                small, size=x.shape[-2:], mode=mode, align_corners=False, antialias=antialias
            )
        out[rows] = large.clamp(0, 1)
    return out


def gaussian_blur(x: Tensor, sigma: float | Tensor) -> Tensor:
    """Gaussian of standard deviation `sigma` px, cut at int(4 sigma + .5) px; borders repeated.

    x: [B, C, H, W]; sigma: >= 0, or [B]; 0 leaves an image as it is.
    """
    kernel = _gaussian(_strength("sigma", sigma, len(x), 0.0, 100.0))
    return _correlate(_correlate(x, kernel[:, None, :]), kernel[:, :, None]).clamp(0, 1)


def _gaussian(sigma: Tensor) -> Tensor:
    """Weights float64 [B, K] of standard deviations [B]; K is the widest kernel's."""
    sigma = sigma[:, None]
    radius = (4 * sigma + 0.5).long()
    taps = torch.arange(int(radius.max()) + 1)
    half = torch.exp(-0.5 * (taps / sigma.clamp(min=1e-9)).square()) * (taps <= radius)
    # A running sum adds in one order, whatever zeros the widest kernel of the batch appends.
    half = half / (2 * half.cumsum(1)[:, -1:] - half[:, :1])
    return torch.cat([half[:, 1:].flip(1), half], dim=1)


def motion_blur(x: Tensor, length: float | Tensor, angle: float | Tensor) -> Tensor:
    """Mean along a straight segment of `length` px through each pixel; borders repeated.

    x: [B, C, H, W]; length: >= 0, or [B]; angle: radians from the x axis towards y (down), or [B].
    The segment is 64 points, each spread bilinearly over its four pixels.
    """
    length = _strength("length", length, len(x), 0.0, 1000.0)[:, None, None]
    angle = _strength("angle", angle, len(x), -math.inf, math.inf)[:, None, None]
    along = length * ((torch.arange(64, dtype=torch.float64) + 0.5) / 64 - 0.5)  # [B, 1, 64]
    radius = math.ceil(float(length.max()) / 2)
    taps = torch.arange(-radius, radius + 1)[:, None]  # [K, 1]
    down = (1 - (along * angle.sin() - taps).abs()).clamp(min=0)  # [B, K, 64]
    right = (1 - (along * angle.cos() - taps).abs()).clamp(min=0)
    return _correlate(x, down @ right.mT / 64).clamp(0, 1)


def _correlate(x: Tensor, kernel: Tensor) -> Tensor:
    """x [B, C, H, W] by kernel [B, Kh, Kw] (odd sizes, float64 on the CPU); borders repeated."""
    height, width = x.shape[-2:]
    rows, columns = kernel.shape[1] // 2, kernel.shape[2] // 2
    wide = F.pad(x.detach(), (columns, columns, rows, rows), mode="replicate")
    weight = kernel.to(x.device, x.dtype, non_blocking=True)[:, :, :, None, None, None]
    out, part = torch.zeros_like(x), torch.empty_like(x)
    for i, j in kernel.any(dim=0).nonzero().tolist():
        out += torch.mul(weight[:, i, j], wide[:, :, i : i + height, j : j + width], out=part)
    return out


def _strength(
    what: str, value: float | Tensor, batch: int, low: float, high: float, *, whole: bool = False
) -> Tensor:
    """A strength as float64 [B] on the CPU. ValueError outside [low, high]."""
    strength = torch.as_tensor(value, dtype=torch.float64, device="cpu")
    if strength.shape not in ((), (batch,)):
        raise ValueError(f"{what} is {list(strength.shape)}: must be a number, or one an image")
    good = (strength >= low) & (strength <= high) & strength.isfinite()
    if whole:
        good &= strength == strength.round()
    if not good.all():
        odd = float(strength[~good].flatten()[0])
        raise ValueError(f"{what} {odd:g}: must be {'whole, ' * whole}from {low:g} to {high:g}")
    return strength.expand(batch)


# -- random, by counter --------------------------------------------------------------------------

# splitmix64 (Steele, Lea, Flood 2014), whose n-th number is a function of seed + n * GAMMA; in
# int64, which wraps around like its uint64.
GAMMA = 0x9E3779B97F4A7C15 - (1 << 64)
MIX_1 = 0xBF58476D1CE4E5B9 - (1 << 64)
MIX_2 = 0x94D049BB133111EB - (1 << 64)

# What draws from a key draws from a stream of its own.
GAUSSIAN, POISSON, STRENGTHS, CROPS = range(4)


def keys(seed: int, image: Tensor, epoch: int) -> Tensor:
    """A key an image for what is random: int64 [B] of image numbers [B]; see the module's head."""
    key = torch.zeros_like(image, dtype=torch.int64)
    for part in (torch.tensor(seed), torch.tensor(epoch), image):
        key = _mix(key + GAMMA * (part.to(key.device, torch.int64) + 1))
    return key


def uniform(key: Tensor, count: int, *, stream: int = STRENGTHS) -> Tensor:
    """float64 [B, count] in [0, 1), 53 bits each, of keys [B]: strengths to draw."""
    return _shifted(_words(key, stream, count), 11).double() * 2.0**-53


def gaussian_noise(x: Tensor, sigma: float | Tensor, key: Tensor) -> Tensor:
    """x plus normal noise of standard deviation `sigma` (of a range of 1), clamped to [0, 1].

    x: [B, C, H, W]; sigma: >= 0, or [B]; key: [B]. A normal number is one of 65,536 quantiles:
    the same on every device, and never beyond 4.4 sigma.
    """
    sigma = _strength("sigma", sigma, len(x), 0.0, 10.0)
    per_image = x[0].numel()
    words = _words(key.to(x.device), GAUSSIAN, -(-per_image // 4))
    number = words.view(torch.int16).to(torch.int32)[:, :per_image] & 0xFFFF
    scale = sigma.to(x.device, x.dtype, non_blocking=True)[:, None, None, None]
    noise = _normal_quantiles(x.device)[number].view(x.shape).to(x.dtype) * scale
    return (x + noise).clamp(0, 1)


def poisson_noise(x: Tensor, peak: float | Tensor, key: Tensor) -> Tensor:
    """Photon noise: a pixel counts Poisson(peak * x) photons, and shows count / peak, at most 1.

    x: [B, C, H, W]; peak: photons of a white pixel, > 0, or [B]; key: [B]. Up to a mean of 4 the
    count is drawn exactly, by inversion; above it is the expansion of the quantile around the
    normal one (Cornish and Fisher, with Sheppard's correction for whole numbers), which at 4 is
    one off in every 200th pixel, and in fewer above.
    """
    peak = _strength("peak", peak, len(x), 1e-3, 1e9)
    scale = peak.to(x.device, non_blocking=True)[:, None, None, None]
    mean = x.double().clamp(0, 1) * scale
    words = _words(key.to(x.device), POISSON, -(-x[0].numel() // 2))
    number = words.view(torch.int32)[:, : x[0].numel()].reshape(x.shape).to(torch.int64)
    number = number & 0xFFFFFFFF
    u = (number.double() + 0.5) * 2.0**-32

    term = torch.exp(-mean)
    below, few = term.clone(), torch.zeros_like(mean)
    for k in range(1, 25):  # P(more than 24) < 2^-33 for a mean of 4
        few += u > below
        below += term.mul_(mean).div_(k)

    z = _normal_quantiles(x.device)[number >> 16].double()
    root = (mean.clamp(min=4) - 1 / 12).sqrt()
    many = (mean + root * z + (z * z - 1) / 6 + (z - z * z * z) / (72 * root)).round().clamp(min=0)
    count = torch.where(mean < 4, few, many)
    return (count / scale).to(x.dtype).clamp(0, 1)


def _words(key: Tensor, stream: int, count: int) -> Tensor:
    """int64 [B, count], all 64 bits random, of keys [B]."""
    counter = torch.arange(1, count + 1, device=key.device)
    start = _mix(key + GAMMA * torch.full_like(key, stream + 1))
    return _mix(start[:, None] + GAMMA * counter)


def _mix(z: Tensor) -> Tensor:
    z = (z ^ _shifted(z, 30)) * MIX_1
    z = (z ^ _shifted(z, 27)) * MIX_2
    return z ^ _shifted(z, 31)


def _shifted(z: Tensor, bits: int) -> Tensor:
    """Right, filling with zeros: `>>` on int64 repeats the sign."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


@functools.cache
def _normal_quantiles(device: torch.device) -> Tensor:
    """float32 [65536], made on the CPU for every device."""
    middle = (torch.arange(65536, dtype=torch.float64) + 0.5) / 65536
    return torch.special.ndtri(middle).float().to(device)


# -- JPEG ----------------------------------------------------------------------------------------

# Annex K of ITU-T T.81: quantisation at quality 50, luminance and chrominance, row by row.
LUMINANCE = """
    16 11 10 16  24  40  51  61   12 12 14 19  26  58  60  55   14 13 16 24  40  57  69  56
    14 17 22 29  51  87  80  62   18 22 37 56  68 109 103  77   24 35 55 64  81 104 113  92
    49 64 78 87 103 121 120 101   72 92 95 98 112 100 103  99"""
CHROMINANCE = """
    17 18 24 47  99  99  99  99   18 21 26 66  99  99  99  99   24 26 56 99  99  99  99  99
    47 66 99 99  99  99  99  99   99 99 99 99  99  99  99  99   99 99 99 99  99  99  99  99
    99 99 99 99  99  99  99  99   99 99 99 99  99  99  99  99"""

# 2^13 sqrt(2) cos((2x + 1) u pi / 16) for x < 4, the first row over sqrt(2); x >= 4 mirrors it. In
# places 1 off the rounded value: so add up the fixed-point constants of libjpeg's accurate integer
# transform (Loeffler, Ligtenberg, Moschytz 1989; constants of 13 bits).
HALF_COSINES = (
    (8192, 8192, 8192, 8192),
    (11363, 9633, 6437, 2260),
    (10703, 4433, -4433, -10703),
    (9633, -2259, -11362, -6436),
    (8192, -8192, -8192, 8192),
    (6437, -11362, 2261, 9633),
    (4433, -10704, 10704, -4433),
    (2260, -6436, 9633, -11363),
)


def jpeg(x: Tensor, quality: int | Tensor) -> Tensor:
    """What a JPEG file of the 8-bit image holds, as every decoder of libjpeg's kind shows it.

    x: [B, 1 or 3, H, W], grey or RGB; quality: 1 to 100, or [B]. Bit for bit what Pillow and
    libjpeg-turbo write and read with their defaults: tables of Annex K scaled by the quality,
    chroma at half size (4:2:0), accurate integer DCT, smooth chroma upsampling. In integers
    throughout (held exactly by float64 where they are multiplied), so every device gives the same
    bits. No gradient.
    """
    quality = _strength("quality", quality, len(x), 1, 100, whole=True).long()
    if x.shape[1] not in (1, 3):
        raise ValueError(f"a JPEG image has 1 or 3 channels, not {x.shape[1]}")
    percent = torch.where(quality < 50, 5000 // quality, 200 - 2 * quality)
    luminance, chrominance = (
        ((torch.tensor([int(n) for n in table.split()]) * percent[:, None] + 50) // 100)
        .clamp(1, 255)
        .view(-1, 1, 1, 1, 8, 8)
        .to(x.device, torch.float64, non_blocking=True)
        for table in (LUMINANCE, CHROMINANCE)
    )
    pixels = to_uint8(x.detach().contiguous()).to(torch.int32)
    height, width = x.shape[-2:]
    if x.shape[1] == 1:
        return to_float(_coded(pixels, luminance).to(torch.uint8)).to(x.dtype)

    r, g, b = pixels.split(1, dim=1)
    y = (19595 * r + 38470 * g + 7471 * b + 32768) >> 16
    half = (128 << 16) + 32767
    cb = (-11059 * r - 21709 * g + 32768 * b + half) >> 16
    cr = (32768 * r - 27439 * g - 5329 * b + half) >> 16

    y = _coded(y, luminance)
    chroma = _coded(_halved(torch.cat([cb, cr], dim=1)), chrominance)
    chroma = chroma[:, :, : -(-height // 2), : -(-width // 2)]
    cb, cr = (_doubled(chroma)[:, :, :height, :width] - 128).split(1, dim=1)

    r = y + ((91881 * cr + 32768) >> 16)
    g = y + ((-22554 * cb - 46802 * cr + 32768) >> 16)
    b = y + ((116130 * cb + 32768) >> 16)
    return to_float(torch.cat([r, g, b], dim=1).clamp(0, 255).to(torch.uint8)).to(x.dtype)


def _coded(plane: Tensor, table: Tensor) -> Tensor:
    """Planes int32 [B, P, H, W] through DCT, quantisation [B, 1, 1, 1, 8, 8] and back."""
    batch, planes, height, width = plane.shape
    wide = _extended(plane, -height % 8, -width % 8)
    blocks = wide.view(batch, planes, wide.shape[2] // 8, 8, wide.shape[3] // 8, 8)
    blocks = blocks.transpose(3, 4).double() - 128

    cosines = torch.tensor(HALF_COSINES, dtype=torch.float64, device=plane.device)
    sign = torch.tensor([1.0, -1.0], dtype=torch.float64, device=plane.device).repeat(4)[:, None]
    cosines = torch.cat([cosines, sign * cosines.flip(1)], dim=1)  # [frequency, position]

    def transform(values: Tensor, matrix: Tensor, bits: int) -> Tensor:
        """Along the last axis; the fixed point's last `bits` bits are rounded away."""
        return (values.contiguous() @ (matrix / 2**bits)).add_(0.5).floor_()

    rows = transform(blocks, cosines.T, 11)
    frequencies = transform(rows.mT, cosines.T, 15).mT  # 8 times the DCT
    step = 8 * table
    size = frequencies.abs().add_(step / 2).div_(step).floor_().mul_(table)
    kept = torch.copysign(size, frequencies)
    columns = transform(kept.mT, cosines, 11).mT
    blocks = (transform(columns, cosines, 18) + 128).clamp(0, 255).to(torch.int32)
    return blocks.transpose(3, 4).reshape(wide.shape)[:, :, :height, :width]


def _extended(plane: Tensor, rows: int, columns: int) -> Tensor:
    """With its last row and column repeated so often."""
    plane = torch.cat([plane, plane[:, :, -1:].expand(-1, -1, rows, -1)], dim=2)
    return torch.cat([plane, plane[:, :, :, -1:].expand(-1, -1, -1, columns)], dim=3)


def _halved(plane: Tensor) -> Tensor:
    """Means of 2 x 2, rounded down and up in turn; columns filled to a whole block."""
    height, width = plane.shape[-2:]
    plane = _extended(plane, height % 2, -width % 16)
    four = plane[:, :, ::2, ::2] + plane[:, :, ::2, 1::2]
    four = four + plane[:, :, 1::2, ::2] + plane[:, :, 1::2, 1::2]
    bias = 1 + torch.arange(four.shape[-1], dtype=torch.int32, device=plane.device) % 2
    return (four + bias) >> 2


def _doubled(plane: Tensor) -> Tensor:
    """Twice the size: 3/4 of the nearer and 1/4 of the farther pixel, in both directions."""
    if plane.shape[-1] <= 2:  # as libjpeg: too narrow for its smooth upsampling
        return plane.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    up = torch.cat([plane[:, :, :1], plane[:, :, :-1]], dim=2)
    down = torch.cat([plane[:, :, 1:], plane[:, :, -1:]], dim=2)
    tall = torch.stack([3 * plane + up, 3 * plane + down], dim=3).flatten(2, 3)
    left = torch.cat([tall[..., :1], tall[..., :-1]], dim=3)
    right = torch.cat([tall[..., 1:], tall[..., -1:]], dim=3)
    return torch.stack([(3 * tall + left + 8) >> 4, (3 * tall + right + 7) >> 4], dim=4).flatten(3)


# -- what a camera does --------------------------------------------------------------------------


@dataclass(frozen=True)
class Realistic:
    """Ranges that `realistic` draws from, uniformly. Ours: no paper gives them."""

    blur: tuple[float, float] = (0.0, 0.6)  # standard deviation in LR px
    noise: tuple[float, float] = (0.0, 0.03)  # standard deviation, of a range of 1
    quality: tuple[int, int] = (40, 95)  # of JPEG, whole numbers

    def __post_init__(self) -> None:
        for name, (low, high) in vars(self).items():
            if not low <= high:
                raise ValueError(f"{name} from {low} to {high}: the smaller number comes first")


def realistic(
    x: Tensor,
    size: int,
    key: Tensor,
    *,
    mode: Kernel,
    antialias: bool,
    ranges: Realistic | None = None,
) -> Tensor:
    """Gaussian blur, down to `size` px, Gaussian noise, JPEG; strengths drawn an image.

    x: [B, C, H, W]; key: [B] on the CPU, see `keys`. Returns [B, C, size, size] of 8-bit levels.
    """
    ranges = ranges or Realistic()
    draw = uniform(key.cpu(), 3).T

    def between(share: Tensor, low: float, high: float) -> Tensor:
        return low + (high - low) * share

    sigma = between(draw[0], *ranges.blur) * max(x.shape[-2:]) / size
    x = _blurred_down(x, size, sigma, mode=mode, antialias=antialias)
    x = gaussian_noise(x, between(draw[1], *ranges.noise), key)
    low, high = ranges.quality
    return jpeg(x, between(draw[2], low, high + 1).floor().clamp(max=high))


def _blurred_down(
    x: Tensor, size: int, sigma: Tensor, *, mode: Kernel, antialias: bool
) -> Tensor:
    """`downsample` of `gaussian_blur`, clamped: [B, C, H, W] -> [B, C, size, size].

    Both are linear and separable: one matrix an axis and image, instead of a blur at full size.
    Products are float64, so that an image's bits do not depend on its batch.
    """
    if size < 1 or size > min(x.shape[-2:]):
        raise ValueError(f"cannot down-sample {x.shape[-2]}x{x.shape[-1]} px to {size} px")
    rows, columns = (
        _down_of_blur(side, size, sigma, mode, antialias).to(x.device) for side in x.shape[-2:]
    )
    small = rows[:, None] @ x.detach().double() @ columns[:, None].mT
    return small.to(x.dtype).clamp(0, 1)


def _down_of_blur(
    side: int, size: int, sigma: Tensor, mode: Kernel, antialias: bool
) -> Tensor:
    """[B, size, side] float64: blur of `sigma` [B] px with borders repeated, then `mode`."""
    eye = torch.eye(side, dtype=torch.float64)[None, None]
    if mode in ("area", "nearest"):
        down = F.interpolate(eye, size=(size, side), mode=mode)
    else:
        down = F.interpolate(
            eye, size=(size, side), mode=mode, align_corners=False, antialias=antialias
        )
    kernel = _gaussian(sigma)  # [B, K]
    radius = kernel.shape[1] // 2
    at = torch.arange(side)[:, None] + torch.arange(-radius, radius + 1)  # [side, K]
    at = at.clamp(0, side - 1).expand(len(sigma), -1, -1)
    blur = torch.zeros(len(sigma), side, side, dtype=torch.float64)
    blur.scatter_add_(2, at, kernel[:, None, :].expand(-1, side, -1).contiguous())
    return down[0, 0] @ blur

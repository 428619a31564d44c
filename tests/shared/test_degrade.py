"""Degradations against scipy, Pillow, plain loops and the laws of their noise.

The kernels of `downsample` as loops are in tests/shared/data/test_pipeline.py.
"""

from __future__ import annotations

import io
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy import ndimage, stats

from shared import degrade
from shared.degrade import (
    Realistic,
    down_up,
    downsample,
    gaussian_blur,
    gaussian_noise,
    jpeg,
    keys,
    motion_blur,
    poisson_noise,
    realistic,
    to_float,
    to_uint8,
    uniform,
)


def pixels(count=3, height=20, width=27, channels=3, seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (count, channels, height, width), dtype=np.uint8)


def photo(height, width, seed=0):
    """Smooth colour with edges and some noise: uint8 [H, W, 3]."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (5, 5, 3), dtype=np.uint8))
    smooth = np.array(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(int)
    smooth[height // 3 :, width // 2 :] //= 2
    return np.clip(smooth + rng.integers(-9, 10, smooth.shape), 0, 255).astype(np.uint8)


def floats(*args, **kwargs):
    return to_float(torch.from_numpy(pixels(*args, **kwargs)))


# -- down, and up --------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["bicubic", "bilinear"])
@pytest.mark.parametrize("size", [7, 16, 28])
def test_antialiased_downsampling_is_pillows_to_its_rounding(mode, size):
    image = photo(112, 112)
    x = to_float(torch.from_numpy(image).permute(2, 0, 1)[None])
    found = to_uint8(downsample(x, size, mode=mode))[0].permute(1, 2, 0).numpy()
    method = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}[mode]
    expected = np.array(Image.fromarray(image).resize((size, size), method))
    # Pillow rounds to 8 bits between its two passes and in its weights.
    assert np.abs(found.astype(int) - expected).max() <= 1


@pytest.mark.parametrize("mode", ["bicubic", "bilinear"])
def test_down_up_is_pillows_two_resizes_to_their_rounding(mode):
    image = photo(56, 56)
    x = to_float(torch.from_numpy(image).permute(2, 0, 1)[None])
    found = down_up(x, 14, mode=mode, antialias=True)[0].permute(1, 2, 0).numpy() * 255
    method = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}[mode]
    expected = np.array(Image.fromarray(image).resize((14, 14), method).resize((56, 56), method))
    assert np.abs(found - expected).max() <= 2.5  # two resizes of 8 bits here, none there


def test_down_up_by_area_repeats_the_mean_of_each_block():
    x = floats(2, 12, 12)
    blocks = x.view(2, 3, 4, 3, 4, 3).mean((3, 5))
    expected = blocks.repeat_interleave(3, 2).repeat_interleave(3, 3)
    torch.testing.assert_close(down_up(x, 4, mode="area", antialias=False), expected)


def test_down_up_takes_a_size_an_image():
    x = floats(6, 16, 16)
    sizes = torch.tensor([4, 16, 7, 4, 7, 1])
    found = down_up(x, sizes, mode="bilinear", antialias=True)
    for k, size in enumerate(sizes.tolist()):
        alone = down_up(x[k : k + 1], size, mode="bilinear", antialias=True)
        assert torch.equal(found[k : k + 1], alone)
    assert torch.equal(found[1], x[1])
    assert found.min() >= 0 and found.max() <= 1
    with pytest.raises(ValueError, match="to 17 px"):
        down_up(x, 17, mode="bilinear", antialias=True)


# -- blur ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(20, 27), (5, 3), (1, 1)])
def test_gaussian_blur_is_scipys_with_repeated_borders(shape):
    x = floats(4, *shape)
    sigma = torch.tensor([0.0, 0.4, 1.3, 3.0])
    found = gaussian_blur(x, sigma)
    assert torch.equal(found[0], x[0])
    for k in range(1, 4):
        for c in range(3):
            plane = x[k, c].double().numpy()
            s = float(sigma[k].double())
            expected = ndimage.gaussian_filter(plane, s, mode="nearest", truncate=4.0)
            assert np.abs(found[k, c].numpy() - expected).max() < 1e-6


@pytest.mark.parametrize("shape", [(20, 27), (5, 3)])
def test_motion_blur_is_the_mean_along_the_segment(shape):
    x = floats(5, *shape)
    length = torch.tensor([0.0, 3.0, 5.5, 8.0, 2.5], dtype=torch.float64)
    angle = torch.tensor([1.0, 0.0, 0.7, math.pi / 2, -2.0], dtype=torch.float64)
    found = motion_blur(x, length, angle)
    assert torch.equal(found[0], x[0])
    for k in range(1, 5):
        for c in range(3):
            plane = np.pad(x[k, c].double().numpy(), 8, mode="edge")
            rows, columns = np.mgrid[8 : 8 + shape[0], 8 : 8 + shape[1]].astype(float)
            mean = np.zeros(shape)
            for point in range(64):
                t = length[k].item() * ((point + 0.5) / 64 - 0.5)
                spots = [rows + t * math.sin(angle[k]), columns + t * math.cos(angle[k])]
                mean += ndimage.map_coordinates(plane, spots, order=1) / 64
            assert np.abs(found[k, c].numpy() - mean).max() < 1e-6


def test_motion_down_leaves_what_is_the_same_in_every_row_alone():
    x = floats(1)[:, :, :1].expand(-1, -1, 20, -1).contiguous()
    assert (motion_blur(x, 7.0, math.pi / 2) - x).abs().max() < 1e-6
    assert (motion_blur(x, 7.0, 0.0) - x).abs().max() > 0.1


# -- JPEG ----------------------------------------------------------------------------------------


def pillow_jpeg(image, quality):
    """Through a real file with the encoder's defaults."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=quality)
    return np.array(Image.open(io.BytesIO(file.getvalue())))


def own_jpeg(images, quality):
    x = to_float(torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2))
    out = jpeg(x, quality)
    assert out.dtype == x.dtype and out.min() >= 0 and out.max() <= 1
    return to_uint8(out).permute(0, 2, 3, 1).numpy()


@pytest.mark.parametrize(
    ("height", "width"), [(16, 16), (17, 23), (30, 5), (5, 4), (3, 2), (1, 1), (112, 112)]
)
def test_jpeg_is_pillows_bit_for_bit_at_every_quality(height, width):
    images = [photo(height, width), pixels(1, height, width)[0].transpose(1, 2, 0)]
    for quality in range(1, 101, 1 if height < 100 else 9):
        for image, found in zip(images, own_jpeg(images, quality), strict=True):
            assert np.array_equal(found, pillow_jpeg(image, quality)), quality


def test_grey_jpeg_is_pillows_bit_for_bit():
    image = photo(19, 33)[:, :, 0]
    for quality in range(1, 101, 3):
        found = to_uint8(jpeg(to_float(torch.from_numpy(image)[None, None]), quality))[0, 0]
        assert np.array_equal(found.numpy(), pillow_jpeg(image, quality))


def test_each_image_has_its_quality_and_autocast_changes_nothing():
    images = [photo(40, 24, seed=k) for k in range(3)]
    found = own_jpeg(images, torch.tensor([10, 95, 50]))
    for image, one, quality in zip(images, found, (10, 95, 50), strict=True):
        assert np.array_equal(one, pillow_jpeg(image, quality))
    with torch.autocast("cpu", torch.bfloat16):
        assert np.array_equal(own_jpeg(images, torch.tensor([10, 95, 50])), found)


@pytest.mark.parametrize("level", [0.0, 1.0, 100 / 255])
def test_constant_images_stay_constant(level):
    x = torch.full((2, 3, 21, 19), level)
    for blurred in (gaussian_blur(x, 2.3), motion_blur(x, 6.0, 0.4)):
        assert (blurred - x).abs().max() < 1e-6
    for mode in ("bicubic", "bilinear", "area", "nearest"):
        assert (down_up(x, 5, mode=mode, antialias=True) - x).abs().max() < 1e-6
    for quality in (30, 75, 95):
        assert (jpeg(x, quality) - x).abs().max() * 255 <= 3  # a step of the mean's table is 10


# -- noise ---------------------------------------------------------------------------------------


def splitmix64(state, count):
    """The published generator in Python's own integers."""
    out = []
    for _ in range(count):
        state = (state + 0x9E3779B97F4A7C15) % 2**64
        z = state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) % 2**64
        out.append(z ^ (z >> 31))
    return out


def test_counters_are_splitmix64s_sequence():
    assert splitmix64(1234567, 3) == [  # the vector that goes round with the algorithm
        6457827717110365317, 3203168211198807973, 9817491932198370423,
    ]  # fmt: skip
    for seed, image, epoch in ((0, 0, 0), (7, 123456789, 3), (2**40, 5, 10**6)):
        state = 0
        for part in (seed, epoch, image):
            state = splitmix64((state + 0x9E3779B97F4A7C15 * part) % 2**64, 1)[0]
        key = keys(seed, torch.tensor([image]), epoch)
        assert int(key) % 2**64 == state
        stream = splitmix64((state + 0x9E3779B97F4A7C15 * 2) % 2**64, 1)[0]
        expected = [word / 2**64 for word in splitmix64(stream, 5)]
        assert uniform(key, 5)[0].tolist() == pytest.approx(expected, abs=1e-15)


def test_uniform_numbers_are_uniform_over_images_epochs_and_seeds():
    draws = uniform(keys(0, torch.arange(20000), 0), 3)
    assert draws.min() >= 0 and draws.max() < 1
    for column in draws.T:
        assert stats.kstest(column.numpy(), "uniform").pvalue > 1e-3
    assert np.abs(np.corrcoef(draws.T.numpy()) - np.eye(3)).max() < 0.03
    one = torch.zeros(1, dtype=torch.int64)
    for family in (
        [float(uniform(keys(s, one, 0), 1)) for s in range(2000)],
        [float(uniform(keys(0, one, e), 1)) for e in range(2000)],
    ):
        assert stats.kstest(family, "uniform").pvalue > 1e-3
        assert abs(np.corrcoef(family[1:], family[:-1])[0, 1]) < 0.08


def test_gaussian_noise_is_normal_with_its_deviation_and_without_a_pattern():
    x = torch.full((40, 3, 32, 32), 0.5)
    sigma = torch.linspace(0.01, 0.1, 40)
    noise = gaussian_noise(x, sigma, keys(0, torch.arange(40), 0)) - 0.5
    z = (noise / sigma[:, None, None, None]).double().numpy()
    count = z.size
    assert abs(z.mean()) < 4 / count**0.5 and abs(z.var() - 1) < 4 * (2 / count) ** 0.5
    assert stats.kstest(z.flatten(), "norm").pvalue > 1e-3
    assert 3.5 < np.abs(z).max() < 4.4
    for axis in range(4):
        a, b = np.moveaxis(z, axis, 0)[1:], np.moveaxis(z, axis, 0)[:-1]
        assert abs((a * b).mean()) < 4 / a.size**0.5


@pytest.mark.parametrize("mean", [0.02, 0.5, 1.0, 3.9, 4.1, 7.0, 30.0, 1000.0])
def test_poisson_noise_counts_photons(mean):
    white, count = 16 * math.ceil(mean) + 16, 96  # cuts nothing off
    x = torch.full((count, 3, 32, 32), mean / white, dtype=torch.float64)
    photons = poisson_noise(x, white, keys(1, torch.arange(count), 0)).numpy() * white
    assert np.abs(photons - photons.round()).max() < 1e-9 * white
    photons = photons.round()
    n, expanded = photons.size, mean >= 4  # the quantile's expansion
    assert abs(photons.mean() - mean) < 4 * math.sqrt(mean / n) + 1e-3 * expanded
    deviation = math.sqrt((2 + 1 / mean) / n)
    assert abs(photons.var() / mean - 1) < 4 * deviation + 0.003 * expanded
    counts = np.arange(stats.poisson.ppf(1e-9, mean), stats.poisson.ppf(1 - 1e-9, mean) + 1)
    share = np.array([(photons <= k).mean() for k in counts])
    # Kolmogorov's bound at 1e-4, and what the docstring allows
    assert np.abs(share - stats.poisson.cdf(counts, mean)).max() < 2.2 / n**0.5 + 0.005 * expanded


def test_black_has_no_photons_and_white_is_never_exceeded():
    key = keys(0, torch.arange(4), 0)
    x = torch.tensor([0.0, 1.0])[None, None, :, None].expand(4, 3, 2, 500)
    noisy = poisson_noise(x, torch.tensor([0.5, 3.0, 50.0, 1e6]), key)
    assert (noisy[:, :, 0] == 0).all() and noisy.max() == 1
    assert noisy[3, :, 1].min() > 0.99 and noisy[0, :, 1].min() == 0


def test_streams_of_one_key_are_independent():
    key = keys(0, torch.arange(64), 0)
    x = torch.full((64, 3, 16, 16), 0.5)
    a = (gaussian_noise(x, 0.05, key) - x).flatten().numpy()
    b = (poisson_noise(x, 500.0, key) - x).flatten().numpy()
    assert abs(np.corrcoef(a, b)[0, 1]) < 4 / a.size**0.5
    draws = uniform(key, 3 * 256).flatten().numpy()
    assert abs(np.corrcoef(a, draws)[0, 1]) < 4 / a.size**0.5


# -- replay --------------------------------------------------------------------------------------

EVERY = {
    "down_up": lambda x, key: down_up(
        x, (4 + uniform(key, 1)[:, 0] * 9).long(), mode="bicubic", antialias=True
    ),
    "gaussian_blur": lambda x, key: gaussian_blur(x, uniform(key, 1)[:, 0] * 4),
    "motion_blur": lambda x, key: motion_blur(x, *(uniform(key, 2).T * 9)),
    "gaussian_noise": lambda x, key: gaussian_noise(x, uniform(key, 1)[:, 0] * 0.2, key),
    "poisson_noise": lambda x, key: poisson_noise(x, 1 + uniform(key, 1)[:, 0] * 50, key),
    "jpeg": lambda x, key: jpeg(x, (1 + uniform(key, 1)[:, 0] * 99).long()),
    "realistic": lambda x, key: realistic(x, 13, key, mode="bicubic", antialias=True),
}


@pytest.mark.parametrize("name", EVERY)
def test_an_image_gets_the_same_bits_in_every_batch(name):
    x, image = floats(16, 23, 29), torch.arange(16) * 1000
    whole = EVERY[name](x, keys(5, image, 2))
    assert whole.shape[:2] == x.shape[:2] and whole.dtype == x.dtype
    assert whole.min() >= 0 and whole.max() <= 1 and not torch.equal(whole[0], whole[1])
    assert torch.equal(EVERY[name](x, keys(5, image, 2)), whole)
    generator = torch.Generator().manual_seed(0)
    for size in (1, 2, 3, 5, 7, 11):
        rows = torch.randperm(16, generator=generator)[:size]
        assert torch.equal(EVERY[name](x[rows], keys(5, image[rows], 2)), whole[rows])
    last = x.contiguous(memory_format=torch.channels_last)
    assert torch.equal(EVERY[name](last, keys(5, image, 2)), whole)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="compares a GPU with the CPU")
@pytest.mark.parametrize("name", ["jpeg", "gaussian_noise"])
def test_a_gpu_gives_the_bits_of_the_cpu(name):
    x, image = floats(16, 23, 29), torch.arange(16)
    found = EVERY[name](x.cuda(), keys(5, image, 2))
    assert torch.equal(found.cpu(), EVERY[name](x, keys(5, image, 2)))


@given(st.integers(0, 2**31), st.integers(0, 2**40), st.integers(0, 2**31), st.integers(0, 2))
@settings(deadline=None, derandomize=True, max_examples=30)
def test_seed_image_and_epoch_each_change_the_draw(seed, image, epoch, which):
    x = floats(1, 16, 16)
    first = [seed, image, epoch]
    second = [v + (k == which) for k, v in enumerate(first)]
    drawn = []
    for s, i, e in (first, second):
        key = keys(s, torch.tensor([i]), e)
        drawn.append(gaussian_noise(x, 0.1, key) - x)
    a, b = (d.flatten().numpy() for d in drawn)
    assert abs(np.corrcoef(a, b)[0, 1]) < 0.2 and not np.array_equal(a, b)


def test_realistic_is_blur_then_down_then_noise_then_jpeg_within_its_ranges():
    x, key = floats(8, 32, 32), keys(0, torch.arange(8), 0)
    ranges = Realistic(blur=(0.5, 1.5), noise=(0.01, 0.2), quality=(20, 22))
    found = realistic(x, 8, key, mode="bilinear", antialias=True, ranges=ranges)
    a, b, c = uniform(key, 3).T
    sharp = gaussian_blur(x, 4 * (0.5 + a))
    small = gaussian_noise(downsample(sharp, 8, mode="bilinear").clamp(0, 1), 0.01 + 0.19 * b, key)
    steps = torch.where(c < 1 / 3, 20, torch.where(c < 2 / 3, 21, 22))
    assert (found - jpeg(small, steps)).abs().mean() < 1e-3
    assert torch.equal(to_float(to_uint8(found)), found)
    clean = Realistic(blur=(0, 0), noise=(0, 0), quality=(100, 100))
    grey = x[:, :1].expand(-1, 3, -1, -1)
    plain = realistic(grey, 8, key, mode="area", antialias=False, ranges=clean)
    assert (plain - F.avg_pool2d(grey, 4)).abs().max() * 255 < 2.5  # only the file's rounding
    with pytest.raises(ValueError, match=r"noise from 0\.3 to 0\.1"):
        Realistic(noise=(0.3, 0.1))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda x: gaussian_blur(x, -1.0), "sigma -1: must be from 0 to 100"),
        (lambda x: gaussian_blur(x, torch.tensor([1.0, math.nan])), "sigma nan"),
        (lambda x: gaussian_blur(x, torch.ones(3)), r"sigma is \[3\]: must be a number, or one an"),
        (lambda x: motion_blur(x, 1e9, 0.0), "length 1e"),
        (lambda x: motion_blur(x, 3.0, math.inf), "angle inf"),
        (lambda x: jpeg(x, 0), "quality 0: must be whole, from 1 to 100"),
        (lambda x: jpeg(x, 101), "quality 101"),
        (lambda x: jpeg(x, torch.tensor([50.5, 50.0])), "quality 50.5"),
        (lambda x: jpeg(x[:, :2], 50), "1 or 3 channels, not 2"),
        (lambda x: gaussian_noise(x, -0.1, keys(0, torch.arange(2), 0)), "sigma -0.1"),
        (lambda x: poisson_noise(x, 0.0, keys(0, torch.arange(2), 0)), "peak 0: must be from"),
    ],
)
def test_strengths_that_make_no_sense_are_clear_errors(call, words):
    with pytest.raises(ValueError, match=words):
        call(floats(2))


@pytest.mark.parametrize("mode,antialias", [("bicubic", True), ("bilinear", False), ("area", True)])
def test_realistic_blurs_and_resizes_as_the_two_functions_one_after_the_other(mode, antialias):
    x = torch.rand(5, 3, 33, 28, generator=torch.Generator().manual_seed(0))
    sigma = torch.tensor([0.0, 0.3, 1.1, 2.0, 3.7], dtype=torch.float64)
    found = degrade._blurred_down(x, 9, sigma, mode=mode, antialias=antialias)
    blurred = degrade.gaussian_blur(x.double(), sigma)
    expected = degrade.downsample(blurred, 9, mode=mode, antialias=antialias).clamp(0, 1)
    assert (found - expected).abs().max() < 1e-6
    for k in range(5):
        alone = degrade._blurred_down(x[k : k + 1], 9, sigma[k : k + 1], mode=mode,
                                      antialias=antialias)  # fmt: skip
        assert torch.equal(alone[0], found[k])

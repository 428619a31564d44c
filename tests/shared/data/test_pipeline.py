"""Views, loaders and their pairing, against per-image loops."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from shared.config import Data
from shared.data.pipeline import (
    Loader,
    Resident,
    Streaming,
    Views,
    normalise,
    upsampled_input,
)
from shared.data.samplers import PKSampler
from shared.degrade import downsample, keys, low, realistic, to_float

CPU = torch.device("cpu")
DATA = Data(hr=16, lr=4, shift=2, shift_step=1)


def pixels(count: int = 12, size: int = 16, seed: int = 0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, size, size), generator=g, dtype=torch.uint8)


@pytest.mark.parametrize("pad", ["edge", "zero"])
@pytest.mark.parametrize("flip", [True, False])
def test_views_are_pad_crop_flip_of_each_image(pad: str, flip: bool) -> None:
    data = replace(DATA, pad=pad, flip=flip)
    views, x = Views(data), pixels(1)
    assert views.count == (2 if flip else 1) * 25
    seen = set()
    for view in range(views.count):
        dy, dx, mirrored = (int(t[view]) for t in (views.dy, views.dx, views.mirrored))
        seen.add((dy, dx, mirrored))
        mode = {"mode": "edge"} if pad == "edge" else {"mode": "constant"}
        wide = np.pad(x[0].numpy(), ((0, 0), (2, 2), (2, 2)), **mode)
        crop = wide[:, 2 + dy : 18 + dy, 2 + dx : 18 + dx]
        expected = crop[:, :, ::-1] if mirrored else crop
        assert np.array_equal(views.apply(x, torch.tensor([view]))[0].numpy(), expected)
    assert len(seen) == views.count
    assert torch.equal(views.apply(x, torch.tensor([views.identity])), x)


def test_one_image_alone_gets_the_same_view_as_in_a_batch() -> None:
    views, x = Views(DATA), pixels(8)
    view = torch.arange(8) * 5
    together = views.apply(x, view)
    for k in range(8):
        assert torch.equal(views.apply(x[k : k + 1], view[k : k + 1])[0], together[k])


def batches(loader: Loader, epoch: int, start: int = 0) -> list:
    return list(loader.epoch(epoch, start))


def make(count: int = 23, size: int = 5, **kwargs) -> Loader:
    images = Resident(pixels(count), torch.arange(count) % 4)
    return Loader(images, DATA, size, seed=kwargs.pop("seed", 1), device=CPU, **kwargs)


def test_hr_and_lr_of_a_batch_are_one_view() -> None:
    loader = make()
    for batch in batches(loader, 0):
        moved = loader.views.apply(loader.images.pixels[batch.index], batch.view)
        assert torch.equal(batch.x_h(), normalise(moved, DATA))
        expected = low(moved, 4, mode="bicubic", antialias=True)
        assert torch.equal(batch.x_l(), normalise(expected, DATA))
        assert torch.equal(batch.y, batch.index % 4)


def test_an_epoch_visits_every_image_at_most_once_and_fills_its_batches() -> None:
    loader = make()
    for epoch in range(3):
        got = batches(loader, epoch)
        seen = torch.cat([b.index for b in got]).tolist()
        assert len(got) == loader.steps == 4 and all(len(b.index) == 5 for b in got)
        assert len(set(seen)) == 20
        assert [b.last for b in got] == [False, False, False, True]


def test_an_epoch_can_be_entered_anywhere() -> None:
    loader, fresh = make(), make()
    whole, part = batches(loader, 3), batches(fresh, 3, start=2)
    for a, b in zip(whole[2:], part, strict=True):
        assert torch.equal(a.index, b.index) and torch.equal(a.view, b.view)
        assert torch.equal(a.x_l(), b.x_l()) and a.epoch == b.epoch == 3


def test_order_depends_on_seed_and_epoch() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        return torch.cat([b.index for b in batches(make(seed=seed), epoch)]).tolist()

    assert order(1, 0) == order(1, 0)
    assert order(1, 0) != order(1, 1) and order(1, 0) != order(2, 0)


def test_ranks_share_each_batch_in_order() -> None:
    whole = batches(make(size=6), 0)
    parts = [batches(make(size=6, rank=r, world=3), 0) for r in range(3)]
    for step, batch in enumerate(whole):
        assert torch.equal(torch.cat([p[step].index for p in parts]), batch.index)
        assert torch.equal(torch.cat([p[step].x_l() for p in parts]), batch.x_l())


class Decode:
    """Picklable; images of number 3 and 7 cannot be decoded."""

    def __init__(self, bad: tuple[int, ...] = ()) -> None:
        self.bad = bad

    def __call__(self, number: int) -> torch.Tensor:
        if number in self.bad:
            raise ValueError(f"/photos/{number}.jpg: not a readable image")
        return pixels(23)[number]


def test_streaming_gives_the_batches_of_resident_images() -> None:
    stream = Streaming(Decode(), torch.arange(23) % 4, workers=1, on_error="stop")
    one = batches(Loader(stream, DATA, 5, seed=1, device=CPU), 2)
    for a, b in zip(one, batches(make(), 2), strict=True):
        assert torch.equal(a.x_l(), b.x_l()) and torch.equal(a.x_h(), b.x_h())


def test_streaming_names_the_image_it_cannot_decode_or_counts_it() -> None:
    labels = torch.arange(23) % 4
    stop = Streaming(Decode((3, 7)), labels, workers=0, on_error="stop")
    with pytest.raises(ValueError, match=r"^/photos/(3|7)\.jpg: not a readable image$"):
        batches(Loader(stop, DATA, 23, seed=1, device=CPU), 0)
    skip = Streaming(Decode((3, 7)), labels, workers=1, on_error="skip")
    (batch,) = batches(Loader(skip, DATA, 23, seed=1, device=CPU), 0)
    assert set(skip.skipped) == {3, 7} and not {3, 7} & set(batch.index.tolist())
    assert len(batch.index) == 23 and torch.equal(batch.y, labels[batch.index])


def test_without_a_table_the_lr_views_are_the_same(monkeypatch) -> None:
    kept = batches(make(), 1)
    monkeypatch.setattr("shared.data.pipeline.LR_TABLE_BYTES", 0)
    for a, b in zip(kept, batches(make(), 1), strict=True):
        assert torch.equal(a.x_l(), b.x_l()) and torch.equal(a.x_h(), b.x_h())


def test_plain_goes_round_and_round() -> None:
    loader = make()
    index = torch.cat([i for i, _, _ in loader.plain(50)])
    assert len(index) == 50 and set(index[:23].tolist()) == set(range(23))
    assert index[:23].tolist() == index[23:46].tolist()


@pytest.mark.parametrize(
    ("count", "size", "words"),
    [(4, 5, "4 training images do not fill a batch of 5"), (9, 1, "fill")],
)
def test_a_batch_that_cannot_be_filled_is_refused(count: int, size: int, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make(count, size)


def test_inputs_of_teacher_and_student() -> None:
    x = pixels(2)
    loop = torch.stack([(x[:, c].double() / 255 - 0.5) / 0.5 for c in range(3)], dim=1)
    torch.testing.assert_close(normalise(x, DATA).double(), loop, atol=1e-6, rtol=0)
    lr = normalise(low(x, 4, mode="bicubic", antialias=True), DATA)
    assert lr.shape == (2, 3, 4, 4)
    levels = ((lr / 2 + 0.5) * 255).double()
    assert (levels - levels.round()).abs().max() < 1e-3  # an LR image is 8-bit
    assert upsampled_input(x, DATA).shape == (2, 3, 16, 16)


# -- degradation ---------------------------------------------------------------------------------


def cubic(t: float, a: float) -> float:
    t = abs(t)
    if t <= 1:
        return (a + 2) * t**3 - (a + 3) * t**2 + 1
    return a * t**3 - 5 * a * t**2 + 8 * a * t - 4 * a if t < 2 else 0.0


def triangle(t: float) -> float:
    return max(0.0, 1 - abs(t))


def resized(row: list[float], size: int, kernel, support: float, antialias: bool) -> list[float]:
    """One line of pixels, by the definition: centres at (i + .5) * scale - .5, weights normalised
    (antialias) or the border repeated (not)."""
    scale = len(row) / size
    width = scale if antialias else 1.0
    out = []
    for o in range(size):
        centre = (o + 0.5) * scale - 0.5
        if antialias:
            taps = [i for i in range(len(row)) if abs(i - centre) < support * width]
            weights = [kernel((i - centre) / width) for i in taps]
            total = sum(weights)
        else:
            base = int(np.floor(centre))
            taps = list(range(base - 1, base + 3)) if support == 2 else [base, base + 1]
            weights, total = [kernel(i - centre) for i in taps], 1.0
            taps = [min(max(i, 0), len(row) - 1) for i in taps]
        out.append(sum(w * row[i] for w, i in zip(weights, taps, strict=True)) / total)
    return out


@pytest.mark.parametrize("antialias", [True, False])
@pytest.mark.parametrize("mode", ["bicubic", "bilinear"])
def test_downsample_matches_the_kernel_as_a_loop(mode: str, antialias: bool) -> None:
    x = torch.rand(1, 1, 12, 12, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    a = -0.5 if antialias else -0.75
    kernel, support = ((lambda t: cubic(t, a)), 2.0) if mode == "bicubic" else (triangle, 1.0)
    rows = [resized(r, 5, kernel, support, antialias) for r in x[0, 0].tolist()]
    columns = [resized(list(c), 5, kernel, support, antialias) for c in zip(*rows, strict=True)]
    expected = torch.tensor(columns, dtype=torch.float64).T
    found = downsample(x, 5, mode=mode, antialias=antialias)[0, 0]
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


def test_area_is_the_mean_of_each_block_and_nearest_takes_a_pixel() -> None:
    x = to_float(pixels(1, 12))
    blocks = x.view(1, 3, 4, 3, 4, 3).mean((3, 5))
    torch.testing.assert_close(downsample(x, 4, mode="area"), blocks)
    near = downsample(x, 4, mode="nearest")
    assert all(v in x.flatten() for v in near.flatten())


def test_downsample_refuses_what_it_cannot_do() -> None:
    with pytest.raises(ValueError, match="to 17 px"):
        downsample(torch.zeros(1, 3, 16, 16), 17)
    with pytest.raises(ValueError, match="float images"):
        downsample(pixels(1), 4)


def test_a_p_x_k_sampler_orders_the_batches_of_every_rank() -> None:
    labels = torch.arange(24) % 6
    images = Resident(pixels(24), labels)
    samplers = [PKSampler(labels, 4, 3, seed=1, rank=r, world=2) for r in (0, 1)]
    loaders = [
        Loader(images, DATA, 12, seed=1, device=CPU, rank=r, world=2, sampler=s)
        for r, s in enumerate(samplers)
    ]
    for first, second in zip(loaders[0].epoch(3), loaders[1].epoch(3), strict=True):
        y = torch.cat([first.y, second.y])
        assert y.view(4, 3).eq(y.view(4, 3)[:, :1]).all() and len(y[::3].unique()) == 4
        assert torch.equal(first.y, labels[first.index])
        assert first.x_l().shape == (6, 3, 4, 4)
    with pytest.raises(ValueError, match="a batch of 10 is not 4 classes x 3 images"):
        Loader(images, DATA, 10, seed=1, device=CPU, sampler=samplers[0])


def test_realistic_views_can_be_replayed_and_change_with_the_epoch() -> None:
    data = replace(DATA, degradation="realistic", shift=0, flip=False)
    images = Resident(pixels(8), torch.arange(8))
    loader = Loader(images, data, 4, seed=3, device=CPU)
    seen: dict[tuple[int, int], torch.Tensor] = {}
    for epoch in (0, 1):
        for batch in loader.epoch(epoch):
            seen |= {(epoch, int(i)): x for i, x in zip(batch.index, batch.x_l(), strict=True)}
    for batch in Loader(images, data, 2, seed=3, device=CPU).epoch(1):
        for i, x in zip(batch.index, batch.x_l(), strict=True):
            assert torch.equal(x, seen[1, int(i)])  # whatever batch it is in
            assert not torch.equal(x, seen[0, int(i)])
    x = to_float(images.pixels[:1])
    expected = realistic(x, 4, keys(3, torch.tensor([0]), 1), mode="bicubic", antialias=True)
    assert torch.allclose(seen[1, 0] * 0.5 + 0.5, expected[0], atol=1e-6)

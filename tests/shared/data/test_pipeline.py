"""Views, loaders and their pairing, against per-image loops."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from shared.config import Data
from shared.data.crops import boxes
from shared.data.crops import resized as cut_out
from shared.data.items import Encoded
from shared.data.pipeline import (
    Centred,
    Images,
    Loader,
    Part,
    Resident,
    Streaming,
    Views,
    centre,
    enlarged,
    normalise,
    prepared,
    student_input,
    upsampled_input,
)
from shared.data.samplers import HalfLabelled, PKSampler
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
    sampler = PKSampler(labels, 4, 3, seed=1)
    loaders = [
        Loader(images, DATA, 12, seed=1, device=CPU, rank=r, world=2, sampler=sampler)
        for r in (0, 1)
    ]
    for first, second in zip(loaders[0].epoch(3), loaders[1].epoch(3), strict=True):
        y = torch.cat([first.y, second.y])
        assert y.view(4, 3).eq(y.view(4, 3)[:, :1]).all() and len(y[::3].unique()) == 4
        assert torch.equal(first.y, labels[first.index])
        assert first.x_l().shape == (6, 3, 4, 4)
    with pytest.raises(ValueError, match="a batch of 10 is not the 12 images of the sampler's"):
        Loader(images, DATA, 10, seed=1, device=CPU, sampler=sampler)


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


# -- pictures that leave room for crops ----------------------------------------------------------

ROOM = replace(DATA, pad="image")  # 20 px kept, views of 16
RANDOM = Data(hr=14, lr=4, crop="resized")  # 16 px kept


@pytest.mark.parametrize("flip", [True, False])
def test_views_of_pictures_with_room_are_plain_slices_of_them(flip: bool) -> None:
    views, x = Views(replace(ROOM, flip=flip)), pixels(1, 20)
    assert views.count == (2 if flip else 1) * 25
    seen = set()
    for view in range(views.count):
        dy, dx, mirrored = (int(t[view]) for t in (views.dy, views.dx, views.mirrored))
        seen.add((dy, dx, mirrored))
        expected = x[0, :, 2 + dy : 18 + dy, 2 + dx : 18 + dx]
        expected = expected.flip(-1) if mirrored else expected
        assert torch.equal(views.apply(x, torch.tensor([view]))[0], expected)
    assert len(seen) == views.count
    assert torch.equal(views.apply(x, torch.tensor([views.identity])), x[:, :, 2:18, 2:18])
    alone = Views(replace(ROOM, shift=0, flip=False))
    assert torch.equal(alone.apply(x, torch.tensor([0])), x)


def test_a_picture_is_resized_whole_or_to_its_centre_square_and_evaluations_see_the_centre() -> (
    None
):
    """Whole where crops are shifts; shorter side, then the centre, where they are random parts."""
    drawn = np.random.default_rng(0).integers(0, 256, (3, 30, 47, 3), dtype=np.uint8)
    items = Encoded("some", list(drawn), np.arange(3))
    for data, side, size in ((ROOM, 20, 16), (RANDOM, 16, 14), (replace(RANDOM, hr=12), 13, 12)):
        first = (side - size) // 2
        for gib in (4.0, 0.0):
            how = replace(data, resident_gib=gib, workers=0)
            train, _ = prepared(items, how, data.hr, role="training")
            test, _ = prepared(items, how, data.hr)
            both = (next(images.batches([torch.arange(3)]))[1] for images in (train, test))
            for k, (whole, middle) in enumerate(zip(*both, strict=True)):
                wide = side if data.pad == "image" else round(side * 47 / 30)
                expected = Image.fromarray(drawn[k]).resize((wide, side), Image.Resampling.BICUBIC)
                left = (wide - side) // 2
                expected = expected.crop((left, 0, left + side, side))
                assert np.array_equal(whole.permute(1, 2, 0).numpy(), np.array(expected))
                part = slice(first, first + size)
                assert torch.equal(middle, whole[:, part, part])
    tight, _ = prepared(items, ROOM, 4, whole=True, role="training")
    assert tight.pixels.shape == (3, 3, 4, 4)  # type: ignore[attr-defined]


def with_room(data: Data, images: Images | None = None, size: int = 5, **kwargs) -> Loader:
    images = images or Resident(pixels(23, data.kept), torch.arange(23) % 4)
    return Loader(images, data, size, seed=kwargs.pop("seed", 1), device=CPU, **kwargs)


def levels(x: torch.Tensor) -> torch.Tensor:
    """Normalised images as uint8."""
    return ((x / 2 + 0.5) * 255).round().to(torch.uint8)


@pytest.mark.parametrize("data", [ROOM, RANDOM])
def test_plain_images_are_the_centres_and_so_is_the_identity(data: Data) -> None:
    loader = with_room(data)
    kept = loader.images.pixels  # type: ignore[attr-defined]
    middle = centre(kept, data.hr)
    for index, x, y in loader.plain():
        assert torch.equal(levels(x), middle[index]) and torch.equal(y, index % 4)
    identity = torch.full((23,), loader.views.identity)
    assert torch.equal(loader.views.apply(kept, identity), middle)
    expected = low(middle, 4, mode="bicubic", antialias=True)
    assert torch.equal(loader.low_view(kept, loader.views.identity), expected)
    shown = Centred(loader.images, data.hr)
    assert len(shown) == 23 and torch.equal(shown.labels, loader.images.labels)
    ((index, seen),) = shown.batches([torch.tensor([4, 2])])
    assert torch.equal(seen, middle[index])


@pytest.mark.parametrize("streamed", [False, True])
def test_random_parts_depend_on_seed_image_and_epoch_and_hr_and_lr_share_them(streamed) -> None:
    kept = pixels(23, 16)
    images: Images = Resident(kept, torch.arange(23) % 4)
    if streamed:
        images = Streaming(kept.__getitem__, torch.arange(23) % 4, workers=0, on_error="stop")
    loader = with_room(RANDOM, images)
    assert not loader.views.finite and Views(ROOM).finite
    seen = {}
    for epoch in (0, 1):
        for batch in loader.epoch(epoch):
            x_h, x_l = levels(batch.x_h()), batch.x_l()
            box = boxes(keys(1, batch.index, epoch), 16)
            expected = cut_out(kept[batch.index], box, 14, loader.views.mirrored[batch.view])
            assert torch.equal(x_h, expected)
            small = low(expected, 4, mode="bicubic", antialias=True)
            assert torch.equal(x_l, normalise(small, RANDOM))
            seen |= {(epoch, int(i)): x for i, x in zip(batch.index, x_h, strict=True)}
    for batch in with_room(RANDOM, images, size=2).epoch(1, start=3):
        for i, view, x in zip(batch.index, batch.view, levels(batch.x_h()), strict=True):
            part = boxes(keys(1, i[None], 1), 16)
            mirrored = loader.views.mirrored[view][None]
            assert torch.equal(x, cut_out(kept[i][None], part, 14, mirrored)[0])
    both = [i for i in range(23) if (0, i) in seen and (1, i) in seen]
    assert both and not any(torch.equal(seen[0, i], seen[1, i]) for i in both)


def test_half_of_the_random_parts_are_mirrored_and_none_without_flip() -> None:
    views = torch.cat([b.view for e in range(20) for b in with_room(RANDOM).epoch(e)])
    share = float(Views(RANDOM).mirrored[views].float().mean())
    assert abs(share - 0.5) < 4 * 0.5 / len(views) ** 0.5
    assert not Views(replace(RANDOM, flip=False)).mirrored.any()


def test_an_image_that_comes_again_in_an_epoch_shows_another_part() -> None:
    labels = torch.tensor([0] * 2 + [1] * 10)
    images = Resident(pixels(1, 16).expand(12, -1, -1, -1).contiguous(), labels)
    sampler = PKSampler(labels, 2, 4, seed=0)
    data = replace(RANDOM, flip=False)
    (batch,) = with_room(data, images, size=8, sampler=sampler).epoch(0)
    again = [levels(x) for i, x in zip(batch.index, batch.x_h(), strict=True) if i == 0]
    assert len(again) == 2 and not torch.equal(*again)
    first = boxes(keys(1, torch.tensor([0]), 0), 16)
    assert torch.equal(again[0], cut_out(images.pixels[:1], first, 14, torch.tensor([False]))[0])


# -- what the student sees -----------------------------------------------------------------------


@pytest.mark.parametrize("degradation", ["plain", "realistic"])
def test_enlarged_is_the_lr_image_brought_back_to_hr_px(degradation) -> None:
    data = replace(DATA, degradation=degradation)
    small, large = (with_room(replace(data, quality=q)) for q in ("small", "enlarged"))
    for a, b in zip(large.epoch(2), small.epoch(2), strict=True):
        expected = torch.nn.functional.interpolate(
            (levels(b.x_l()).double() / 255), size=(16, 16), mode="bicubic", align_corners=False
        )
        assert a.x_l().shape == (5, 3, 16, 16) and torch.equal(a.x_h(), b.x_h())
        found = levels(a.x_l()).double() / 255
        assert (found - expected.clamp(0, 1)).abs().max() <= 0.5 / 255 + 1e-6
        if degradation == "plain":  # what a teacher is shown of LR images
            assert torch.equal(a.x_l(), upsampled_input(levels(a.x_h()), data))


def test_an_lr_image_of_the_hr_size_is_the_view_itself_and_nothing_is_kept() -> None:
    for quality in ("small", "enlarged"):
        loader = with_room(replace(DATA, lr=16, quality=quality))
        for batch in loader.epoch(0):
            assert torch.equal(batch.x_l(), batch.x_h())
        assert loader._low is None


def test_the_inputs_side_is_the_configurations() -> None:
    x = pixels(2, 4)
    assert student_input(x, DATA).shape[-1] == DATA.lr_input == 4
    large = replace(DATA, quality="enlarged")
    assert student_input(x, large).shape[-1] == large.lr_input == 16
    assert torch.equal(student_input(x, large), normalise(enlarged(x, 16), DATA))


@pytest.mark.parametrize("data", [ROOM, RANDOM, DATA])
@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("lr", [4, None])
def test_the_whole_picture_is_seen_by_the_student_in_the_teachers_view(data, streamed, lr) -> None:
    data = replace(data, quality="unlocalised", lr=lr or data.hr)
    labels = torch.arange(23) % 4
    kept = [pixels(23, data.kept, seed) for seed in (0, 1)]
    box, whole = (
        Streaming(x.__getitem__, labels, workers=0, on_error="stop") if streamed
        else Resident(x, labels) for x in kept
    )  # fmt: skip
    loader = with_room(data, box, whole=whole)
    for batch, alone in zip(loader.epoch(1), with_room(data, whole).epoch(1), strict=True):
        assert torch.equal(batch.index, alone.index)
        expected = low(levels(alone.x_h()), data.lr, mode="bicubic", antialias=True)
        assert torch.equal(batch.x_l(), normalise(expected, data))
        with pytest.raises(ValueError, match="--data.quality unlocalised: this training knows no"):
            alone.x_l()
    teachers = with_room(replace(data, quality="small"), box)
    for a, b in zip(loader.epoch(1), teachers.epoch(1), strict=True):
        assert torch.equal(a.x_h(), b.x_h())


def test_whole_pictures_must_be_those_of_the_parts() -> None:
    one, other = (Resident(pixels(9), torch.arange(9) % k) for k in (2, 3))
    with pytest.raises(ValueError, match="whole pictures and their parts differ"):
        Loader(one, DATA, 3, seed=0, device=CPU, whole=other)


# -- some of the images --------------------------------------------------------------------------


@pytest.mark.parametrize("streamed", [False, True])
def test_a_part_has_the_images_and_labels_of_its_numbers(streamed: bool) -> None:
    numbers = torch.tensor([9, 2, 22, 5, 0, 14])
    labels = torch.arange(23) % 4
    images: Images = Resident(pixels(23), labels)
    if streamed:
        images = Streaming(Decode((3,)), labels, workers=0, on_error="stop")
    part = Part(images, numbers)
    assert len(part) == 6 and part.labels.tolist() == labels[numbers].tolist()
    order = [torch.tensor([5, 0]), torch.tensor([2, 2, 3])]
    for wanted, (index, seen) in zip(order, part.batches(order), strict=True):
        assert torch.equal(index, wanted)
        assert torch.equal(seen, pixels(23)[numbers[wanted]])
    copy = Resident(pixels(23)[numbers], labels[numbers])
    loaders = (Loader(some, DATA, 3, seed=4, device=CPU) for some in (part, copy))
    for a, b in zip(*(loader.epoch(1) for loader in loaders), strict=True):
        assert torch.equal(a.index, b.index) and torch.equal(a.y, b.y)
        assert torch.equal(a.x_h(), b.x_h()) and torch.equal(a.x_l(), b.x_l())


def test_a_stand_in_has_its_number_in_the_part() -> None:
    stream = Streaming(Decode((3,)), torch.arange(23), workers=0, on_error="skip")
    part = Part(stream, torch.tensor([8, 3, 6]))
    ((index, seen),) = part.batches([torch.arange(3)])
    assert index.tolist() == [0, 0, 2] and torch.equal(seen, pixels(23)[[8, 8, 6]])


def test_labelled_and_other_images_share_a_loaders_batches() -> None:
    labels, known = torch.arange(24) % 4, torch.arange(24) < 8
    images = Resident(pixels(24), labels)
    sampler = HalfLabelled(labels, known, 2, 2, unlabelled=14, seed=1)
    loader = Loader(images, DATA, 18, seed=1, device=CPU, sampler=sampler)
    assert loader.steps == 2  # 36 places of 24 images
    for batch in loader.epoch(0):
        assert known[batch.index[:4]].all() and not known[batch.index[4:]].any()
        moved = loader.views.apply(images.pixels[batch.index], batch.view)
        assert torch.equal(batch.x_h(), normalise(moved, DATA))

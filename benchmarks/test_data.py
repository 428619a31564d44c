"""Reading images: images/s printed, ratios to a plain Pillow loop gated, in one process."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from benchmarks.measure import Run, confirmed, median
from shared.config import Data
from shared.data.items import Encoded, Files, decode
from shared.data.pipeline import prepared


def photographs(count: int, height: int, width: int) -> list[bytes]:
    """JPEG files with the statistics of photographs: smooth, with some noise, quality 95."""
    rng = np.random.default_rng(0)
    made = []
    for _ in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (14, 14, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), np.int16)
        noisy = (smooth + rng.normal(0, 4, smooth.shape)).clip(0, 255).astype(np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(noisy).save(buffer, "JPEG", quality=95)
        made.append(buffer.getvalue())
    return made


def pillow(data: bytes | Path) -> Image.Image:
    source = io.BytesIO(data) if isinstance(data, bytes) else data
    with Image.open(source) as image:
        return image.convert("RGB")


def decoding() -> tuple[Run, Run, int]:
    """Face crops of 112 px in memory, as RecordIO and .bin hold them: decoding alone."""
    faces = photographs(200, 112, 112)
    return (
        lambda: [np.array(pillow(data)) for data in faces],
        lambda: [decode(data, "x") for data in faces],
        len(faces),
    )


def resident_faces() -> tuple[Run, Run, int]:
    """The same into one uint8 tensor [N, 3, 112, 112]."""
    faces = photographs(200, 112, 112)
    items = Encoded("faces", faces)

    def plain() -> Tensor:
        return torch.stack([torch.from_numpy(np.array(pillow(f))).permute(2, 0, 1) for f in faces])

    return plain, lambda: prepared(items, Data(workers=2), 112), len(faces)


def resident_folder(folder: Path) -> tuple[Run, Run, int]:
    """Photographs of 500 x 375 from files to 256 px: shorter side, centre crop."""
    names = []
    for k, data in enumerate(photographs(64, 375, 500)):
        names.append(f"{k}.jpg")
        (folder / names[-1]).write_bytes(data)
    items = Files(folder, names, np.zeros(len(names)))

    def plain() -> Tensor:
        made = []
        for name in names:
            image = pillow(folder / name).resize((341, 256), Image.Resampling.BICUBIC)
            made.append(torch.from_numpy(np.array(image.crop((42, 0, 298, 256)))).permute(2, 0, 1))
        return torch.stack(made)

    return plain, lambda: prepared(items, Data(workers=2), 256), len(names)


# Bars below what a busy core gives.
@pytest.mark.parametrize(
    "name,bar", [("decoding", 1.3), ("resident faces", 1.2), ("resident folder", 1.0)]
)
def test_images_a_second(name: str, bar: float, record, benchmark, tmp_path) -> None:
    made = {
        "decoding": decoding,
        "resident faces": resident_faces,
        "resident folder": lambda: resident_folder(tmp_path),
    }
    plain, ours, count = made[name]()
    found = confirmed(plain, ours, bar, rounds=5)
    rate, theirs = count / median(ours), count / median(plain)
    print(f"\n{name}: {rate:,.0f} images/s, {found:.2f} times a Pillow loop's {theirs:,.0f}")
    record(f"{name} against a Pillow loop", speed=found)
    benchmark.extra_info["images/s"] = rate
    benchmark.pedantic(ours, rounds=3, warmup_rounds=1)
    assert found >= bar

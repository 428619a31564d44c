"""BTNet on a stream of mixed sizes, as in QMUL-SurvFace, for each of its nine routing strategies:
against the same images enlarged to 112 px for the trunk, and against its own networks on groups
that are made already, which is what routing, resizing and reordering cost.

The trunk is iresnet50 at half its channels (1.6 GMACs at 112 px instead of 6.3), to keep this
short; what is not convolution weighs the more. The MACs promise more or less than what is measured
as a machine does small maps less or more efficiently: both are printed.
"""

from __future__ import annotations

from collections import Counter
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.measure import confirmed
from btnet.model import BTNet
from shared.models.iresnet import IResNet

IMAGES = 24
OVERHEAD = 1.1  # most that a mixed stream may take, of ready-made groups' and the MACs' time
STRATEGIES = list(product(("max", "min", "avg"), ("ceil", "near", "floor")))


def stream() -> list[Tensor]:
    """Sizes log-normal, 20 wide x 24 high in the mean (Sec. 4.1), from 6 to 124 px a side."""
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, IMAGES, generator=g)
    height = 22.6 * torch.exp(0.36 * a)
    width = 0.83 * height * torch.exp(0.10 * b)
    sizes = torch.stack([height, width], dim=1).round().clamp(6, 124).int().tolist()
    return [torch.randint(256, (3, h, w), generator=g, dtype=torch.uint8) for h, w in sizes]


@pytest.fixture(scope="module")
def model() -> BTNet:
    torch.manual_seed(0)
    trunk = IResNet((3, 4, 14, 3), widths=(32, 64, 128, 256))
    return BTNet(trunk=trunk).eval().to(memory_format=torch.channels_last)  # type: ignore[call-overload]


@pytest.mark.parametrize(("indicator", "rounding"), STRATEGIES)
@torch.inference_mode()
def test_mixed_stream(model: Any, indicator, rounding) -> None:
    model.indicator, model.rounding = indicator, rounding
    images = stream()
    routed = model.route([(image.shape[2], image.shape[1]) for image in images])
    counts = Counter(routed)
    groups = {r: model.prepare([i for i, at in zip(images, routed, strict=True) if at == r], r)
              for r in sorted(counts)}  # fmt: skip

    def mixed() -> None:
        model(images)

    def ready_made() -> None:
        for r, x in groups.items():
            model.embed(x, r)

    def enlarged() -> None:
        model.embed(model.prepare(images, 112), 112)

    predicted = IMAGES * model.macs(112) / sum(n * model.macs(r) for r, n in counts.items())
    name = f"btnet {indicator}+{rounding}, mixed sizes against"
    own = confirmed(ready_made, mixed, 1 / OVERHEAD, rounds=2)
    bound = predicted / OVERHEAD
    found = confirmed(enlarged, mixed, bound, rounds=2)
    sent = ", ".join(f"{n} at {r} px" for r, n in sorted(counts.items()))
    print(f"{name}: {found:.2f} times as fast, {predicted:.2f} by MACs; {1 / own:.3f} of the time "
          f"of ready-made groups; {sent}")  # fmt: skip
    assert own >= 1 / OVERHEAD
    assert found >= bound

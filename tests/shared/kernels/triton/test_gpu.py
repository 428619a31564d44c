from __future__ import annotations

import torch
import triton
import triton.language as tl

from shared.kernels import gpu


@triton.jit
def _fill(out, stride, a, b, BLOCK: tl.constexpr):
    i = a * BLOCK + tl.arange(0, BLOCK)[:, None]
    j = b * BLOCK + tl.arange(0, BLOCK)[None, :]
    gpu.store_both(out, i, j, stride, (i * stride + j).to(tl.float32))


def test_a_value_and_its_mirror_image_are_the_lower_one(device):
    # Where a tile holds both and they differ, which one stays must not be left to chance.
    out = torch.empty(32, 32, device=device)
    for a, b in ((0, 0), (1, 0), (1, 1)):
        _fill[(1,)](out, 32, a, b, BLOCK=16)
    lower = torch.arange(1024.0, device=device).view(32, 32).tril()
    assert torch.equal(out, lower + lower.tril(-1).T)

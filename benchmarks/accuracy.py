"""Errors against float64 on easy and hard rows: `python -m benchmarks.accuracy` prints the table.

Truth is the reference in float64 on the same float32 rows. Distances: largest error over the
largest distance. Angles: largest error of a cosine. Gradient: of the angle loss, largest error over
the largest entry.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import baselines
from shared import kernels

N, D = 48, 64


def rows() -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(N, D, generator=g)
    near = x.clone()
    for b in (5, 9, 13):
        step = F.normalize(torch.randn(D, generator=g), dim=0)
        near[b] = near[0] + 1e-4 * near[0].norm() * step
    same = x.clone()
    same[7] = same[2]
    return {"ordinary": x, "offset 1000": x + 1000, "near-duplicates (1e-4)": near,
            "duplicates": same}  # fmt: skip


def gram_distance(x: Tensor) -> Tensor:
    n = x.square().sum(1)
    return (n[:, None] + n - 2 * x @ x.T).clamp(min=0).sqrt()


def gram_cosines(x: Tensor) -> Tensor:
    g = x @ x.T
    diagonal = g.diagonal()
    square = (diagonal[:, None] + diagonal - 2 * g).clamp(min=0)
    r = torch.where(square > 0, square.rsqrt(), 0)
    num = g[:, None, :] - g[:, :, None] - g[None] + diagonal[None, :, None]
    return num * r[:, :, None] * r[None]


def gradient(loss, x: Tensor) -> Tensor:
    leaf = x.clone().requires_grad_()
    return torch.autograd.grad(loss(leaf), leaf)[0]


def error(found: Tensor, truth: Tensor, scale: float) -> str:
    return f"{float((found.double() - truth).abs().max()) / scale:.0e}"


def main() -> None:
    torch.set_num_threads(1)
    teacher = torch.randn(N, D, generator=torch.Generator().manual_seed(1))
    print("| rows | distance: ours | eager | float32 Gram | torch.cdist "
          "| cosine: ours | eager | float32 Gram | gradient: ours | naive |")  # fmt: skip
    print("|---" * 10 + "|")
    for name, x in rows().items():
        d = kernels.pairwise_distance(x.double(), backend="reference")
        size = float(d.max())
        cells = [
            error(found, d, size)
            for found in (
                kernels.pairwise_distance(x, backend="cpu"),
                kernels.pairwise_distance(x, backend="reference"),
                gram_distance(x),
                torch.cdist(x, x),
            )
        ]
        c = kernels.triplet_angles(x.double(), backend="reference")
        cells += [
            error(found, c, 1)
            for found in (
                kernels.triplet_angles(x, backend="cpu"),
                kernels.triplet_angles(x, backend="reference"),
                gram_cosines(x),
            )
        ]
        truth = gradient(
            lambda s: kernels.angle_loss(s, teacher.double(), backend="reference"), x.double()
        )
        ours = gradient(lambda s: kernels.angle_loss(s, teacher), x)
        size = float(truth.abs().max())
        scale = N * (N - 1) * (N - 2) / N**3  # ours: mean over triplets; naive: over N^3 entries
        naive = gradient(lambda s: baselines.naive_angle(s, teacher), x) / scale
        cells += [error(ours, truth, size), error(naive, truth, size)]
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()

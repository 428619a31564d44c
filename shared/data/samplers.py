"""P x K batches: P classes, K images of each, for losses that need pairs of one class in a batch.

Labels alone decide; no image is opened. There is no state: any epoch can be asked for.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor


class PKSampler:
    """Batches of `classes_per_batch` (P) distinct classes x `images_per_class` (K) images.

    labels: [N] whole numbers, any numbering. An epoch is N // (P K) batches, keyed by (seed,
    epoch). Classes come in rounds, each a fresh permutation of all of them, so that over an epoch
    their visits differ by at most 1: images of small classes are seen more often than those of
    large ones. A class hands out its images in one shuffled cycle an epoch, and none again before
    all others; a class of fewer than K images (`small` counts them) repeats its own within a batch.
    A batch is K images of the first class, K of the second, and so on; rank r of `world` takes the
    r-th contiguous part, which holds whole classes: P must be a multiple of `world`.

    Raises ValueError where P classes or P K images are not there.
    """

    def __init__(
        self,
        labels: Tensor | np.ndarray,
        classes_per_batch: int,
        images_per_class: int,
        *,
        seed: int,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        p, k = classes_per_batch, images_per_class
        labels = torch.as_tensor(labels).cpu()
        if labels.dim() != 1 or labels.is_floating_point() or labels.is_complex():
            raise ValueError(f"labels must be whole numbers [N], not {labels.dtype} {labels.shape}")
        if p < 1 or k < 1:
            raise ValueError(f"P is {p} and K {k}: a batch needs 1 class and 1 image or more")
        if not 0 <= rank < world:
            raise ValueError(f"rank {rank} of {world}: must be from 0 to {world - 1}")
        if p % world:
            raise ValueError(
                f"P = {p} classes cannot be shared by {world} ranks: take a multiple of {world}"
            )
        _, self.number, self.counts = labels.unique(return_inverse=True, return_counts=True)
        if len(self.counts) < p:
            raise ValueError(f"{len(self.counts)} classes do not fill a batch of P = {p}")
        if len(labels) < p * k:
            raise ValueError(f"{len(labels)} images do not fill a batch of {p} x {k}")
        self.p, self.k, self.seed, self.rank, self.world = p, k, seed, rank, world
        self.steps = len(labels) // (p * k)
        self.small = int((self.counts < k).sum())

    def order(self, epoch: int) -> Tensor:
        """Image numbers int64 [steps * P * K] of an epoch: global batches, one after another."""
        generator = torch.Generator().manual_seed((self.seed << 20) + epoch)
        shuffled = torch.randperm(len(self.number), generator=generator)
        cycle = shuffled[self.number[shuffled].argsort(stable=True)]  # class after class
        visits = self.steps * self.p
        classes = self._rounds(-(-visits // len(self.counts)), generator)
        chosen = classes.flatten()[:visits]
        visit = torch.arange(visits) // len(self.counts)  # a round visits every class once
        place = (visit * self.k)[:, None] + torch.arange(self.k)
        first = self.counts.cumsum(0) - self.counts
        return cycle[(first[chosen][:, None] + place % self.counts[chosen][:, None]).flatten()]

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Tensor]:
        """This rank's batches, int64 [P * K / world], from step `start` on."""
        own = self.p * self.k // self.world
        batches = self.order(epoch).view(self.steps, self.world, own)
        yield from batches[start:, self.rank]

    def _rounds(self, rounds: int, generator: torch.Generator) -> Tensor:
        """Permutations of the classes [rounds, C] in which any P successive ones of a batch differ.

        Where a batch reaches from one round into the next, a class that would come twice changes
        places with the next one that does not.
        """
        total = len(self.counts)
        random = torch.rand(rounds, total, generator=generator, dtype=torch.float64)
        order = random.argsort(dim=1, stable=True)
        if total % self.p == 0:
            return order
        rows = order.numpy()
        for r in range(1, rounds):
            begun = r * total % self.p  # classes that the last round left in an unfinished batch
            taken = set(rows[r - 1, total - begun :].tolist())
            free = self.p - begun  # how many of this round complete it
            row, other = rows[r], free
            for place in range(free if taken else 0):
                if int(row[place]) in taken:
                    while int(row[other]) in taken:
                        other += 1
                    row[place], row[other] = row[other], row[place]
        return order

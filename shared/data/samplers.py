"""Which images make a batch: P classes, K images of each, for losses that need pairs of one class.

Labels alone decide; no image is opened. There is no state: any epoch can be asked for.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
from torch import Tensor


class Sampler(Protocol):
    """What orders the images of an epoch (shared.data.pipeline.Loader)."""

    size: int  # images of a global batch
    steps: int  # batches of an epoch

    def order(self, epoch: int) -> Tensor:
        """Image numbers int64 [steps * size]: global batches, one after another."""
        ...


class PKSampler:
    """Batches of `classes_per_batch` (P) distinct classes x `images_per_class` (K) images.

    labels: [N] whole numbers, any numbering. An epoch is N // (P K) batches, keyed by (seed,
    epoch). Classes come in rounds, each a fresh permutation of all of them, so that over an epoch
    their visits differ by at most 1: images of small classes are seen more often than those of
    large ones. A class hands out its images in one shuffled cycle an epoch, and none again before
    all others; a class of fewer than K images (`small` counts them) repeats its own within a batch.
    A batch is K images of the first class, K of the second, and so on.

    Raises ValueError where P classes or P K images are not there.
    """

    def __init__(
        self,
        labels: Tensor | np.ndarray,
        classes_per_batch: int,
        images_per_class: int,
        *,
        seed: int,
    ) -> None:
        p, k = classes_per_batch, images_per_class
        labels = torch.as_tensor(labels).cpu()
        if labels.dim() != 1 or labels.is_floating_point() or labels.is_complex():
            raise ValueError(f"labels must be whole numbers [N], not {labels.dtype} {labels.shape}")
        if p < 1 or k < 1:
            raise ValueError(f"P is {p} and K {k}: a batch needs 1 class and 1 image or more")
        _, self.number, self.counts = labels.unique(return_inverse=True, return_counts=True)
        if len(self.counts) < p:
            raise ValueError(f"{len(self.counts)} classes do not fill a batch of P = {p}")
        if len(labels) < p * k:
            raise ValueError(f"{len(labels)} images do not fill a batch of {p} x {k}")
        self.p, self.k, self.seed = p, k, seed
        self.size = p * k
        self.steps = len(labels) // self.size
        self.small = int((self.counts < k).sum())

    @property
    def note(self) -> str:
        """A line to print where small classes repeat their images; else ""."""
        if not self.small:
            return ""
        return (
            f"{self.small:,} of {len(self.counts):,} classes have fewer than {self.k} images: "
            "theirs are repeated within a batch"
        )

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


class HalfLabelled:
    """Batches of P x K labelled images, then `unlabelled` others: EmbedKD's Table 3.

    labels: [N] whole numbers, of which only those with `labelled` (bool [N]) are looked at. The
    labelled part of a batch is `PKSampler`'s, its classes one after the other; the others come in
    one shuffled cycle an epoch, keyed by (seed, epoch), so that a batch has none of them twice. An
    epoch is as many batches as the labelled images fill; with P = 0 there are only unlabelled ones,
    and it is as many as those fill. unlabelled = 0: labelled ones alone.

    Raises ValueError where classes or images are missing for a batch.
    """

    def __init__(
        self,
        labels: Tensor | np.ndarray,
        labelled: Tensor | np.ndarray,
        classes_per_batch: int,
        images_per_class: int,
        *,
        unlabelled: int,
        seed: int,
    ) -> None:
        labels, known = torch.as_tensor(labels).cpu(), torch.as_tensor(labelled).cpu()
        if known.dtype != torch.bool or known.shape != labels.shape:
            raise ValueError(
                f"labelled must be true or false for each of {len(labels):,} images, not "
                f"{known.dtype} {list(known.shape)}"
            )
        self.known, self.other = known.nonzero()[:, 0], (~known).nonzero()[:, 0]
        if unlabelled < 0 or unlabelled > len(self.other):
            raise ValueError(
                f"{len(self.other):,} unlabelled images do not give {unlabelled} for a batch"
            )
        if not classes_per_batch and not unlabelled:
            raise ValueError("P is 0 and no unlabelled image is asked for: nothing fills a batch")
        self.pairs = None
        if classes_per_batch:
            self.pairs = PKSampler(labels[known], classes_per_batch, images_per_class, seed=seed)
        self.unlabelled, self.seed = unlabelled, seed
        self.labelled = self.pairs.size if self.pairs else 0  # of a batch; they come first
        self.size = self.labelled + unlabelled
        self.steps = self.pairs.steps if self.pairs else len(self.other) // unlabelled

    @property
    def note(self) -> str:
        """See PKSampler.note."""
        return self.pairs.note if self.pairs else ""

    def order(self, epoch: int) -> Tensor:
        """Image numbers int64 [steps * size] of an epoch: global batches, one after another."""
        # another seed than PKSampler's, whose permutation it might repeat
        generator = torch.Generator().manual_seed(~((self.seed << 20) + epoch))
        cycle = self.other[torch.randperm(len(self.other), generator=generator)]
        place = torch.arange(self.steps * self.unlabelled) % max(1, len(cycle))
        parts = [cycle[place].view(self.steps, self.unlabelled)]
        if self.pairs:
            parts.insert(0, self.known[self.pairs.order(epoch)].view(self.steps, self.labelled))
        return torch.cat(parts, dim=1).flatten()

"""Pairs selected offline: "In a mini-batch, we select positive and negative pairs offline in
advance" (Sec. III-B), hardest first, by one teacher pass over the un-augmented training images.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from aird.config import Config
from shared.config import locate
from shared.contrast import derangement
from shared.data.kept import Rows, locked
from shared.data.pipeline import Loader
from shared.run import Run
from shared.teacher import FrozenTeacher

BLOCK = 2048  # images whose negatives are searched, kept and checked together


@dataclass(frozen=True)
class Pairs:
    """The pairs of each step. Make one with `offline`.

    bank: [M, D] teacher embeddings of the pool, whose rows lie by identity and then image number.
    classes: [M] their labels, ascending. embeddings: [N, D] of all training images. negatives:
    [N, n] rows of the bank, hardest first, on disk; None: pairs are random.
    """

    bank: Tensor
    classes: Tensor
    embeddings: np.ndarray
    negatives: Rows | None
    n: int

    def draw(
        self, index: Tensor, y: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(i [B], k [B, n], paired [B]) for the samples j of a batch: image numbers and labels [B].

        i: place in the batch of the partner of each j. k: rows of the bank, of other people than i.
        paired: False where j has no partner (its i is j itself): to be left out of the loss.

        Selected: i is the hardest other image of j's identity in the batch, that of the lowest
        teacher cosine (ties by image number; another copy of j's own image is none), and k are the
        negatives of image i. Random: i is any other image, and k are drawn evenly, with
        replacement, from the bank's people other than i's and j's; `generator` is read here only.
        Embeddings and negatives are read by `index` on the CPU and copied to the device.
        """
        numbers = index.cpu()
        index, places = index.to(y.device), torch.arange(len(y), device=y.device)
        if self.negatives is None:
            i = derangement(len(y), generator)
            return i, self._others(y, y[i], generator), index[i] != index
        e = torch.from_numpy(self.embeddings[numbers.numpy()]).to(y.device, torch.float64)
        e = F.normalize(e, dim=1)
        cosine = (e @ e.T).round(decimals=12)  # equal images tie, however a product adds up
        allowed = (y[:, None] == y) & (index[:, None] != index)
        order = index.argsort(stable=True)  # argmin takes the first of a tie
        hardest = cosine.masked_fill(~allowed, torch.inf)[:, order].argmin(1)
        paired = allowed.any(1)
        i = torch.where(paired, order[hardest], places)
        k = self.negatives.read(torch.zeros_like(numbers), numbers).to(y.device)
        return i, k[i].long(), paired

    def _others(self, y: Tensor, y_i: Tensor, generator: torch.Generator) -> Tensor:
        """[B, n] rows of the bank, uniform over those of neither label: two runs are skipped."""
        first, second = torch.minimum(y, y_i), torch.maximum(y, y_i)
        start = [torch.searchsorted(self.classes, c) for c in (first, second)]
        end = [torch.searchsorted(self.classes, c, right=True) for c in (first, second)]
        length = [end[0] - start[0], torch.where(first == second, 0, end[1] - start[1])]
        allowed = len(self.classes) - length[0] - length[1]
        u = torch.rand(len(y), self.n, generator=generator, device=y.device, dtype=torch.float64)
        k = (u * allowed[:, None]).long()
        for s, width in zip(start, length, strict=True):
            k = k + (k >= s[:, None]) * width[:, None]
        return k


def offline(run: Run, teacher: FrozenTeacher, loader: Loader, config: Config) -> Pairs:
    """The pairs of the loader's images; every rank has to call it.

    teacher: one that was given the loader (shared.teacher.get), for its embeddings of all images.
    Raises ValueError where the pool has too few images of other people, and for an embedding that
    is not finite.
    """
    labels = loader.images.labels.cpu().numpy()
    embeddings = teacher.embeddings()
    known = np.flatnonzero(embeddings.any(1))  # zeros: an image that could not be decoded
    pool = known[choose_pool(labels[known], config.pool, seed=config.seed)]
    random = config.sampling == "random"
    check(labels, pool, 1 if random else config.n, apart=2 if random else 1)
    bank = torch.from_numpy(embeddings[pool]).to(run.device)
    _finite(bank, pool)
    negatives = None
    if not random:
        folder, n = locate(config.cache) / "pairs", config.n
        negatives = run.in_turn(
            lambda: hardest(embeddings, labels, pool, n, folder, run.device, run.say)
        )
    classes = torch.from_numpy(labels[pool]).to(run.device)
    return Pairs(bank, classes, embeddings, negatives, config.n)


def choose_pool(labels: np.ndarray, size: int, *, seed: int) -> np.ndarray:
    """Image numbers [min(size, N)] that negatives are taken from, by identity and then number.

    An image of every identity, in random order, then a second of those that have one, and so on
    until there are `size`. labels: [N].
    """
    order = np.random.default_rng(seed).permutation(len(labels))
    shuffled = labels[order]
    by_class = np.argsort(shuffled, kind="stable")
    _, first, inverse = np.unique(shuffled[by_class], return_index=True, return_inverse=True)
    turn = np.empty(len(labels), np.int64)  # how many of its identity come before it
    turn[by_class] = np.arange(len(labels)) - first[inverse]
    chosen = order[np.argsort(turn, kind="stable")[:size]]
    return chosen[np.lexsort((chosen, labels[chosen]))]


def check(labels: np.ndarray, pool: np.ndarray, n: int, *, apart: int = 1) -> None:
    """Raises ValueError unless n images of the pool show none of any `apart` identities."""
    known, counts = np.unique(labels[pool], return_counts=True)
    largest = np.argsort(counts)[::-1][:apart]
    left = len(pool) - int(counts[largest].sum())
    if left < n:
        whole = len(pool) == len(labels)
        raise ValueError(
            f"the pool of {len(pool)} training images has {left} of other people than "
            f"{' and '.join(str(known[c]) for c in largest)}, and {n} negatives are asked for: "
            + ("lower --n" if whole else "raise --pool or lower --n")
        )


def hardest(
    embeddings: np.ndarray,
    labels: np.ndarray,
    pool: np.ndarray,
    n: int,
    folder: Path,
    device: torch.device,
    say: Callable[[str], None],
) -> Rows:
    """[1, N, n] places in `pool` of the images most like each one among other identities.

    By cosine, the largest first. embeddings: [N, D], labels: [N], pool: [M] image numbers. Kept in
    folder/KEY/negatives, in the smallest integer type, by what decides it; an interrupted search
    goes on, and what was damaged is searched again (shared.data.kept). Holds BLOCK x M cosines.
    Raises ValueError for an embedding that is not finite and for a pool too small (see `check`).
    """
    check(labels, pool, n)
    made_of = hashlib.sha256(f"{embeddings.shape} {n}".encode())
    for array in (embeddings, labels, pool):
        made_of.update(np.ascontiguousarray(array).data)
    folder = folder / made_of.hexdigest()[:12]
    types = (torch.uint8, torch.int16, torch.int32)
    small = next(t for t in types if torch.iinfo(t).max >= len(pool) - 1)
    rows = Rows(folder / "negatives", 1, len(labels), n, small, BLOCK)
    bank = F.normalize(torch.from_numpy(embeddings[pool]).to(device), dim=1)
    classes = torch.from_numpy(labels[pool]).to(device)
    with locked(folder, say):
        rows.create()
        good, damaged = rows.check([0], range(rows.parts))
        if damaged:
            say(f"{rows.path}: {damaged} damaged blocks are searched anew")
        todo = (~good[0]).nonzero()[0]
        for part in tqdm(todo, "hard negatives", unit="block", leave=False, disable=None):
            span = slice(part * BLOCK, (part + 1) * BLOCK)
            e = torch.from_numpy(embeddings[span].copy()).to(device)
            _finite(e, np.arange(len(labels))[span])
            y = torch.from_numpy(labels[span]).to(device)
            cosine = F.normalize(e, dim=1) @ bank.T
            cosine.masked_fill_(y[:, None] == classes, -torch.inf)
            rows.write(0, int(part), cosine.topk(n, dim=1).indices.cpu())
        if len(todo):
            say(f"pairs: the {n} hardest of {len(pool):,} negatives, kept in {folder}")
    return rows


def _finite(e: Tensor, numbers: np.ndarray) -> None:
    """Raises ValueError naming the first image whose embedding is NaN or infinite."""
    bad = (~torch.isfinite(e).all(1)).nonzero()
    if len(bad):
        raise ValueError(
            f"the teacher's embedding of training image {numbers[int(bad[0])]} is not finite; "
            "try --precision fp32 or another teacher"
        )

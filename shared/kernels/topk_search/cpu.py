"""`topk_search` by tiles of a matrix product: compiled.py for the rest on the CPU, else torch.

With rows centred by some mean m of the gallery's (unit rows for cosines), so that an offset or a
collapsed embedding costs no accuracy, what ranks the gallery for a query is
    key_j = <q - m, g_j - m> + b_j,    b_j = -|g_j - m|^2 / 2, or <m, g_j - m> for cosines,
    distance^2 = |q - m|^2 - 2 key,    cosine = <m, q> + key.
A computed key is off by at most c |q - m| |g_j - m| + 2 u |b_j|, c = (D + 8) u + 2 r, with u the
roundoff of sums and r that of a product's factors (on CUDA with TF32, whose tensor cores sum less
exactly, it is not proven). Rows are ranked by their key plus this bound; the k + MARGIN best are
measured in float64 from the rows as given; and a query is settled where its k-th best is above what
any row left out can reach. The others go through a product in float64, and those that it leaves
open too, which have many exact ties, are measured against the whole gallery.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from shared.kernels.dispatch import NUMBA

# Of a tile: it stays in the second-level cache. COLUMNS is a multiple of compiled.BLOCK.
ROWS, COLUMNS = 512, 512
MARGIN = 8  # measured beyond k, or an eighth of k
SAMPLE = 1024  # rows, or a few more, whose mean is m
CHUNK = 1 << 15  # numbers done at once in float64
NUMBERS = 1 << 22  # in the lists of a block of queries; fewer queries a block where k is large
TINY = 1e-37  # products too small for float32
# r, by the names that torch's settings of precision have; any other name is taken for the widest.
FACTORS = {"highest": 0.0, "ieee": 0.0, "none": 0.0, "high": 2.0**-10, "tf32": 2.0**-10}
WIDEST = 2.0**-8  # bfloat16


def topk_search(queries: Tensor, gallery: Tensor, k: int, cosine: bool) -> tuple[Tensor, Tensor]:
    """(scores [Q, k], indices [Q, k])."""
    queries, gallery = queries.contiguous(), gallery.contiguous()
    scores = queries.new_full((len(queries), k), torch.nan)
    indices = torch.arange(k, device=queries.device).repeat(len(queries), 1)
    lengths, of_gallery = _lengths(queries), _lengths(gallery)
    left = lengths.isfinite().nonzero().squeeze(1)
    usable = of_gallery.isfinite().nonzero().squeeze(1)
    n = min(k, len(usable))
    if len(usable) < len(gallery):
        rest = (~of_gallery.isfinite()).nonzero().squeeze(1)
        indices[left] = torch.cat([usable, rest])[:k]
        gallery, of_gallery = gallery[usable], of_gallery[usable]
    # First in the type given, then, for what that leaves open, in float64, then without a product.
    for work in dict.fromkeys((queries.dtype, torch.float64, None)):
        if not n or not len(left):
            break
        largest = max(float(lengths[left].max()), float(of_gallery.max()))
        search = _Search(gallery, of_gallery, n, cosine, 1 / largest, work)
        open_ = []
        for rows in left.split(search.rows):
            found, places, settled = search(queries[rows], lengths[rows])
            scores[rows, :n] = found.to(scores.dtype)
            indices[rows, :n] = usable[places]
            open_.append(rows[~settled])
        left = torch.cat(open_)
    return scores, indices


class _Search:
    """The n best of a gallery of finite rows, for blocks of at most `rows` queries.

    work: the type of the products; None: there are none, and all rows are candidates.
    """

    def __init__(
        self,
        gallery: Tensor,
        lengths: Tensor,
        n: int,
        cosine: bool,
        scale: float,
        work: torch.dtype | None,
    ) -> None:
        self.gallery, self.lengths, self.n, self.cosine = gallery, lengths, n, cosine
        self.compiled, block = NUMBA and gallery.device.type == "cpu", 1
        if self.compiled:
            from shared.kernels.topk_search import compiled

            block = compiled.BLOCK
        self.scale, self.work = scale, work  # scale: so that no square overflows
        self.keep = len(gallery) if work is None else min(len(gallery), n + max(MARGIN, n // 8))
        self.length = self.keep + self.keep // 2 + 2 * block  # of a list, cut to `keep` when full
        self.rows = max(1, min(ROWS, NUMBERS // self.length))
        if work is None:
            return
        some = slice(None, None, max(1, len(gallery) // SAMPLE))
        self.mean = self._given(gallery[some], lengths[some]).mean(0)
        padded = -(-len(gallery) // block) * block
        self.centred = gallery.new_empty(padded, gallery.shape[1], dtype=work)
        self.centred[len(gallery) :] = 0
        norms, along = self._centre(gallery, lengths, self.centred[: len(gallery)])
        bias = along if cosine else -0.5 * norms.square()
        bias = bias + torch.finfo(work).eps * bias.abs() + TINY
        rest = (0, padded - len(gallery))
        self.norms = F.pad(norms, rest).to(work)
        self.bias = F.pad(bias, rest, value=-torch.inf).to(work)

    def __call__(self, q: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(scores [R, n] in float64, places [R, n], which are settled [R]) of queries [R, D]."""
        if self.work is None:
            every = torch.arange(len(self.gallery), device=q.device).repeat(len(q), 1)
            value, places = self._measure(q, lengths, every)
            return value, places, torch.ones_like(lengths, dtype=torch.bool)
        centred = q.new_empty(q.shape, dtype=self.work)
        norms, along = self._centre(q, lengths, centred)
        factors = _factors() if self.work == torch.float32 else 0.0
        bound = (q.shape[1] + 8) * torch.finfo(self.work).eps / 2 + 2 * factors
        pick = self._pick_compiled if self.compiled else self._pick
        places, reach = pick(centred, (norms * bound).to(self.work))
        value, places = self._measure(q, lengths, places)
        if self.keep == len(self.gallery):
            return value, places, torch.ones_like(lengths, dtype=torch.bool)
        if self.cosine:
            last, offset = value[:, -1], along + self.mean.square().sum()
            key = last - offset
        else:
            last, offset = (value[:, -1] * self.scale).square(), norms.square()
            key = 0.5 * (offset - last)
        error = (q.shape[1] + 8) * 2.0**-50 * (last.abs() + offset.abs())
        return value, places, key - error > reach.double()

    def _given(self, x: Tensor, lengths: Tensor) -> Tensor:
        """What is compared, in float64: unit rows, or rows of at most unit length."""
        return x.double() * (1 / lengths[:, None] if self.cosine else self.scale)

    def _centre(self, x: Tensor, lengths: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
        """Writes x - m to out; (|x - m|, <m, x - m>), in float64."""
        norms, along = torch.empty_like(lengths), torch.empty_like(lengths)
        if self.compiled:
            from shared.kernels.topk_search import compiled

            factors = 1 / lengths if self.cosine else torch.full_like(lengths, self.scale)
            arrays = (t.numpy() for t in (x, factors, self.mean, out, norms, along))
            compiled.centre(*arrays)
            return norms, along
        for c in _chunks(x):
            centred = self._given(x[c], lengths[c]) - self.mean
            out[c], along[c] = centred, centred @ self.mean
            norms[c] = torch.linalg.vector_norm(centred, dim=1)
        return norms, along

    def _pick_compiled(self, q: Tensor, slack: Tensor) -> tuple[Tensor, Tensor]:
        """(places [R, keep], ascending, and what no other row's key exceeds [R])."""
        from shared.kernels.topk_search import compiled

        keys = q.new_empty(len(q), self.length)
        places = torch.empty_like(keys, dtype=torch.int64)
        counts, bounds = places.new_zeros(len(q)), q.new_full((len(q),), -torch.inf)
        lists = [t.numpy() for t in (keys, places, counts, bounds)]
        room = q.new_empty(len(q) * COLUMNS)
        for j in range(0, len(self.centred), COLUMNS):
            g = self.centred[j : j + COLUMNS]
            tile = room[: len(q) * len(g)].view(len(q), len(g))
            torch.mm(q, g.T, out=tile)
            norms, bias = self.norms[j : j + COLUMNS], self.bias[j : j + COLUMNS]
            terms = [t.numpy() for t in (tile, slack, norms, bias)]
            hits = np.empty((len(q), len(g) // compiled.BLOCK), np.int32)
            compiled.test(*terms, bounds.numpy(), hits)
            compiled.collect(*terms, hits, j, self.keep, *lists)
        compiled.finish(self.keep, *lists)
        return places[:, : self.keep].contiguous(), bounds

    def _pick(self, q: Tensor, slack: Tensor) -> tuple[Tensor, Tensor]:
        """The same in plain torch."""
        keys, places = q.new_empty(len(q), 0), q.new_empty(len(q), 0, dtype=torch.int64)
        for j in range(0, len(self.centred), COLUMNS):
            norms, bias = self.norms[j : j + COLUMNS], self.bias[j : j + COLUMNS]
            tile = q @ self.centred[j : j + COLUMNS].T
            tile.add_(torch.addcmul(bias, slack[:, None], norms))
            tile, here = tile.topk(min(self.keep, len(norms)), dim=1)
            keys, places = torch.cat([keys, tile], 1), torch.cat([places, here + j], 1)
            keys, best = keys.topk(min(self.keep, keys.shape[1]), dim=1)
            places = places.gather(1, best)
        return places.sort(dim=1)[0], keys[:, -1]

    def _measure(self, q: Tensor, lengths: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
        """(scores [R, n], places [R, n]): the best of places [R, C], ascending, in float64."""
        value = torch.empty_like(places, dtype=torch.float64)
        if self.compiled:
            from shared.kernels.topk_search import compiled

            arrays = [t.numpy() for t in (q, self.gallery, places)]
            compiled.measure(*arrays, self.cosine, value.numpy())
        else:
            flat, columns = places.view(-1), places.shape[1]
            pairs = torch.arange(len(flat), device=q.device)
            for c in pairs.split(max(1, CHUNK // max(1, q.shape[1]))):
                a, b = q[c // columns].double(), self.gallery[flat[c]].double()
                value.view(-1)[c] = (a * b if self.cosine else (a - b).square()).sum(1)
        if self.cosine:
            value /= lengths[:, None] * self.lengths[places]
        else:
            value.sqrt_()
        value, order = value.sort(dim=1, descending=self.cosine, stable=True)
        return value[:, : self.n], places.gather(1, order[:, : self.n])


def _factors() -> float:
    """The r that the settings of today's torch allow, the widest of them, whichever would win."""
    try:
        names = [torch.get_float32_matmul_precision()]
    except RuntimeError:  # what the backends were told has no name there
        return WIDEST
    mkldnn, cuda = getattr(torch.backends, "mkldnn", None), torch.backends.cuda.matmul
    for where in (torch.backends, mkldnn, getattr(mkldnn, "matmul", None), cuda):
        names.append(getattr(where, "fp32_precision", "none"))
    return max(FACTORS.get(name, WIDEST) for name in names)


def _lengths(x: Tensor) -> Tensor:
    """|row| in float64, and 1 for rows of zeros: their cosines are then 0."""
    lengths = torch.empty(len(x), dtype=torch.float64, device=x.device)
    if NUMBA and x.device.type == "cpu":
        from shared.kernels.topk_search import compiled

        compiled.lengths(x.numpy(), lengths.numpy())
    else:
        for c in _chunks(x):
            lengths[c] = torch.linalg.vector_norm(x[c].double(), dim=1)
    return lengths.masked_fill_(lengths == 0, 1)


def _chunks(x: Tensor) -> Iterator[slice]:
    size = max(1, CHUNK // max(1, x.shape[1]))
    return (slice(i, min(i + size, len(x))) for i in range(0, len(x), size))

from __future__ import annotations

import ast
import math
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from shared.kernels.topk_search import cpu, reference, topk_search

METRICS = ["cosine", "euclidean"]
metrics = pytest.mark.parametrize("metric", METRICS)


@pytest.fixture(params=["numba", "torch"])
def path(request, monkeypatch) -> str:
    """The tiles as they are with numba, and as they are without, or on another device."""
    if request.param == "torch":
        monkeypatch.setattr(cpu, "NUMBA", False)
    return request.param


def features(n: int, d: int, seed: int = 0, dtype=torch.float32) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=g, dtype=torch.float64).to(dtype)


def score(q: list[float], g: list[float], metric: str) -> float:
    if metric == "euclidean":
        return math.dist(q, g)
    lengths = math.hypot(*q) * math.hypot(*g)
    return math.fsum(x * y for x, y in zip(q, g, strict=True)) / lengths if lengths else 0.0


def as_a_loop(queries: Tensor, gallery: Tensor, k: int, metric: str):
    """([[score]], [[index]]) by a plain sort; rows that are not finite score NaN and come last."""
    scores, indices = [], []
    for q in queries.tolist():
        entries = []
        for i, g in enumerate(gallery.tolist()):
            fine = all(map(math.isfinite, [*q, *g]))
            s = score(q, g, metric) if fine else math.nan
            entries.append((not fine, -s if metric == "cosine" else s, i, s))
        entries.sort(key=lambda e: (e[0], 0.0 if e[0] else e[1], e[2]))
        scores.append([e[3] for e in entries[:k]])
        indices.append([e[2] for e in entries[:k]])
    return torch.tensor(scores, dtype=torch.float64), torch.tensor(indices)


def agrees(found, queries: Tensor, gallery: Tensor, k: int, metric: str, **tolerance) -> None:
    scores, indices = as_a_loop(queries, gallery, k, metric)
    torch.testing.assert_close(found[0].double(), scores, equal_nan=True, **tolerance)
    assert torch.equal(found[1], indices)


@metrics
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_matches_a_plain_sort(metric: str, backend: str, path: str) -> None:
    queries, gallery = features(9, 5), features(70, 5, seed=1)
    found = topk_search(queries, gallery, 11, metric=metric, backend=backend)
    assert found[0].dtype == torch.float32 and found[1].dtype == torch.int64
    agrees(found, queries, gallery, 11, metric, rtol=1e-6, atol=1e-7)


@settings(max_examples=80, deadline=None)
@given(
    q=st.integers(0, 13),
    n=st.integers(0, 150),
    d=st.integers(1, 6),
    k=st.integers(0, 150),
    rows=st.sampled_from([1, 4, 512]),
    columns=st.sampled_from([32, 64, 512]),
    chunk=st.sampled_from([1, 50, 1 << 15]),
    metric=st.sampled_from(METRICS),
    integers=st.booleans(),
    numba=st.booleans(),
    seed=st.integers(0, 99),
)
def test_tiles_of_any_shape(q, n, d, k, rows, columns, chunk, metric, integers, numba, seed):
    """One tile, several and a ragged tail; integers, of which many rows tie."""
    queries, gallery = features(q, d, seed), features(n, d, seed + 1)
    if integers:
        queries, gallery = queries.round(), gallery.round()
        if metric == "cosine":  # lengths that are exact, so that what ties ties in float64
            queries, gallery = (torch.eye(d)[x.abs().argmax(1)] * 4 for x in (queries, gallery))
    k = min(k, n)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "ROWS", rows)
        patch.setattr(cpu, "COLUMNS", columns)
        patch.setattr(cpu, "CHUNK", chunk)
        patch.setattr(cpu, "NUMBA", cpu.NUMBA and numba)
        found = topk_search(queries, gallery, k, metric=metric, backend="cpu")
    if not (q and k):
        assert found[0].shape == found[1].shape == (q, k)
        return
    agrees(found, queries, gallery, k, metric, rtol=1e-6, atol=1e-7)


@metrics
@pytest.mark.parametrize("k", [1, 3, 20])
def test_equal_rows_go_by_the_lower_index_also_across_tiles(metric, k, path, monkeypatch) -> None:
    monkeypatch.setattr(cpu, "COLUMNS", 64)
    kinds = features(7, 33, seed=2)
    gallery = kinds[torch.randint(7, (300,), generator=torch.Generator().manual_seed(3))]
    queries = kinds + 0.1 * features(7, 33, seed=4)
    scores, indices = topk_search(queries, gallery, k, metric=metric, backend="cpu")
    for i in range(7):
        same = (gallery == kinds[i]).all(1).nonzero().squeeze(1)
        assert indices[i, : len(same)].tolist() == same[:k].tolist()
        assert scores[i, : len(same)].unique().numel() == 1


@metrics
def test_a_gallery_of_one_row_repeated(metric: str, path: str) -> None:
    """All of it ties: nothing but the whole gallery, measured, decides."""
    gallery, queries = features(1, 24).expand(200, -1), features(3, 24, seed=1)
    scores, indices = topk_search(queries, gallery, 5, metric=metric, backend="cpu")
    assert (indices == torch.arange(5)).all()
    assert (scores == scores[:, :1]).all()


def test_identical_rows_are_at_distance_zero_and_themselves_come_first(path: str) -> None:
    x = features(300, 40) + 1000
    scores, indices = topk_search(x, x, 2, metric="euclidean", backend="cpu")
    assert (scores[:, 0] == 0).all() and torch.equal(indices[:, 0], torch.arange(300))
    assert (scores[:, 1] > 1).all()


@metrics
@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_near_duplicates_come_in_their_true_order(metric: str, offset: float, path: str) -> None:
    """40 rows within 1e-3 of each query, more than MARGIN: a float32 product cannot tell them."""
    kinds = features(5, 32) * 3 + offset
    noise = 1e-3 * features(200, 32, seed=1)
    gallery = torch.cat([kinds.repeat(40, 1) + noise, features(100, 32, seed=2) + offset])
    found = topk_search(kinds, gallery, 12, metric=metric, backend="cpu")
    agrees(found, kinds, gallery, 12, metric, rtol=1e-6, atol=1e-7)


@metrics
def test_a_collapsed_embedding_still_has_an_order(metric: str, path: str) -> None:
    """Rows 1e-4 about one point: cosines of 1 - 1e-8, beyond float32, are still told apart."""
    centre = features(1, 16)
    queries, gallery = (centre + 1e-4 * features(n, 16, seed=n) for n in (6, 120))
    found = topk_search(queries, gallery, 9, metric=metric, backend="cpu")
    agrees(found, queries, gallery, 9, metric, rtol=1e-6, atol=1e-7)


@metrics
@pytest.mark.parametrize("precision", ["high", "medium"])
def test_a_lower_precision_of_products_changes_nothing(metric: str, precision: str, path) -> None:
    queries, gallery = features(20, 64), features(700, 64, seed=1)
    expected = topk_search(queries, gallery, 10, metric=metric, backend="cpu")
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(precision)
        found = topk_search(queries, gallery, 10, metric=metric, backend="cpu")
    finally:
        torch.set_float32_matmul_precision(before)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


@pytest.fixture
def settings_of_products():
    """torch.backends, whose fp32_precision is put back where it was, and its mkldnn.matmul's."""
    where = [torch.backends, torch.backends.mkldnn.matmul, torch.backends.cuda.matmul]
    if not all(hasattr(x, "fp32_precision") for x in where):
        pytest.skip("this torch has only set_float32_matmul_precision")
    before = [x.fp32_precision for x in where]
    yield where
    for x, name in zip(where, before, strict=True):
        x.fp32_precision = name


@metrics
@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("name", ["ieee", "tf32", "bf16"])
def test_backends_precision_changes_nothing(metric, which, name, path, settings_of_products):
    """The newer settings, of which the older knows nothing or makes a RuntimeError."""
    queries, gallery = features(20, 64), features(700, 64, seed=1)
    expected = topk_search(queries, gallery, 10, metric=metric, backend="cpu")
    settings_of_products[which].fp32_precision = name
    found = topk_search(queries, gallery, 10, metric=metric, backend="cpu")
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("which", [0, 1, 2])
def test_the_bound_follows_the_backends_precision(which, settings_of_products, monkeypatch):
    """Also where the older setting still answers, and says that nothing is rounded."""
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "highest")
    for name, rounding in (("ieee", 0.0), ("tf32", 2.0**-10)):
        settings_of_products[which].fp32_precision = name
        assert cpu._factors() == rounding
    settings_of_products[1].fp32_precision = "bf16"
    assert cpu._factors() == 2.0**-8


def test_products_that_are_off_by_their_bound_lose_no_neighbour(monkeypatch) -> None:
    """The proof in cpu.py, tried: products wrong by as much as it allows, in either direction."""
    monkeypatch.setattr(cpu, "NUMBA", False)
    queries, gallery = features(10, 24), features(400, 24, seed=1)
    expected = topk_search(queries, gallery, 7, backend="cpu")
    bound = (24 + 8) * 2.0**-24
    matmul = Tensor.__matmul__

    def off(a: Tensor, b: Tensor) -> Tensor:
        exact = matmul(a, b)
        if a.dtype != torch.float32 or b.ndim != 2:
            return exact
        sign = torch.randint(2, exact.shape, generator=torch.Generator().manual_seed(6)) * 2 - 1
        sizes = a.norm(dim=1, keepdim=True) * b.norm(dim=0)
        return exact + 0.9 * bound * sizes * sign

    monkeypatch.setattr(Tensor, "__matmul__", off)
    found = topk_search(queries, gallery, 7, backend="cpu")
    assert torch.equal(found[1], expected[1]) and torch.equal(found[0], expected[0])


@metrics
@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_rows_that_are_not_finite_score_nan_and_come_last(metric, backend, bad, path) -> None:
    queries, gallery = features(5, 4), features(40, 4, seed=1)
    queries[3, 1] = bad
    gallery[[0, 17, 39], 2] = bad
    for k in (5, 38, 40):
        found = topk_search(queries, gallery, k, metric=metric, backend=backend)
        agrees(found, queries, gallery, k, metric, rtol=1e-6, atol=1e-7)
    gallery[:] = bad
    scores, indices = topk_search(queries, gallery, 3, metric=metric, backend=backend)
    assert scores.isnan().all() and (indices == torch.arange(3)).all()


@metrics
def test_rows_of_zeros(metric: str, path: str) -> None:
    queries, gallery = features(4, 6), features(50, 6, seed=1)
    queries[1], gallery[7] = 0, 0
    found = topk_search(queries, gallery, 50, metric=metric, backend="cpu")
    agrees(found, queries, gallery, 50, metric, rtol=1e-6, atol=1e-7)
    if metric == "cosine":
        assert not found[0][1].any() and (found[1][1] == torch.arange(50)).all()


@metrics
@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_squares_beyond_float32_do_not_matter(metric: str, scale: float, path: str) -> None:
    queries, gallery = features(4, 6) * scale, features(50, 6, seed=1) * scale
    found = topk_search(queries, gallery, 9, metric=metric, backend="cpu")
    agrees(found, queries, gallery, 9, metric, rtol=1e-6, atol=scale * 1e-7)


@metrics
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_result_has_the_type_of_the_rows(metric: str, dtype: torch.dtype, path: str) -> None:
    queries, gallery = features(5, 8, dtype=dtype), features(90, 8, seed=1, dtype=dtype)
    found = topk_search(queries, gallery, 6, metric=metric, backend="cpu")
    assert found[0].dtype == dtype
    slack = {torch.float16: 1e-3, torch.bfloat16: 1e-2, torch.float64: 1e-12}[dtype]
    agrees(found, queries, gallery, 6, metric, rtol=slack, atol=slack)


def test_any_layout_gives_the_same(path: str) -> None:
    queries, gallery = features(5, 8), features(90, 8, seed=1)
    expected = topk_search(queries, gallery, 6, backend="cpu")
    wide = torch.stack([gallery, gallery + 1], -1)[..., 0]
    for g in (wide, gallery.T.contiguous().T):
        found = topk_search(queries.T.contiguous().T, g, 6, backend="cpu")
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    same = topk_search(queries[:1].expand(5, -1), gallery, 6, backend="cpu")
    assert all(torch.equal(a, b[:1].expand(5, -1)) for a, b in zip(same, expected, strict=True))


@metrics
def test_same_bits_twice_and_all_written(metric: str, path: str, poisoned: None) -> None:
    queries, gallery = features(40, 8), features(900, 8, seed=1)
    first, second = (topk_search(queries, gallery, 6, metric=metric, backend="cpu") for _ in "ab")
    assert first[0].isfinite().all()
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_autocast_changes_nothing_but_the_type() -> None:
    queries, gallery = features(9, 16), features(200, 16, seed=1)
    with torch.autocast("cpu", torch.bfloat16):
        found = topk_search(queries, gallery, 5)
        half = topk_search(queries.bfloat16(), gallery.bfloat16(), 5)
    expected = topk_search(queries, gallery, 5)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert half[0].dtype == torch.float32


def test_no_gradient() -> None:
    queries, gallery = features(3, 4).requires_grad_(), features(9, 4).requires_grad_()
    for backend in ("cpu", "reference"):
        assert not topk_search(queries, gallery, 2, backend=backend)[0].requires_grad


def test_compiles_as_one_graph_and_passes_opcheck() -> None:
    queries, gallery = features(3, 4), features(9, 4)
    torch._dynamo.reset()
    compiled = torch.compile(topk_search, fullgraph=True, backend="aot_eager")
    for a, b in zip(compiled(queries, gallery, 2), topk_search(queries, gallery, 2), strict=True):
        assert torch.equal(a, b)
    op = torch.ops.lowres.topk_search.default
    found = torch.library.opcheck(op, (queries, gallery, 2, True, "cpu"))
    assert set(found.values()) == {"SUCCESS"}


def test_what_numba_keeps_on_disk_depends_on_no_number_of_another_file() -> None:
    """Its cache is keyed on the kernel's file: a size changed elsewhere would go unseen."""
    compiled = pytest.importorskip("shared.kernels.topk_search.compiled")
    tree = ast.parse(Path(compiled.__file__).read_text())
    assigned = {
        target.id
        for node in tree.body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    numbers = {name for name, x in vars(compiled).items() if isinstance(x, int | float)}
    assert "BLOCK" in numbers and numbers == assigned


class Types(TorchDispatchMode):
    """The floating-point types of all tensors that are made."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[torch.dtype] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else [out]:
            if isinstance(x, Tensor) and x.dtype.is_floating_point:
                self.seen.add(x.dtype)
        return out


@metrics
def test_a_device_that_may_lack_float64_is_given_none(metric: str, monkeypatch) -> None:
    """The meta device stands for it: "auto" takes the reference, in float32."""
    queries, gallery = features(3, 4).to("meta"), features(9, 4).to("meta")
    paths = []

    def op(q: Tensor, g: Tensor, k: int, cosine: bool, path: str) -> tuple[Tensor, Tensor]:
        paths.append(path)
        return reference.topk_search(q, g, k, cosine)

    monkeypatch.setattr(sys.modules["shared.kernels.topk_search"], "_topk_search", op)
    with Types() as types:
        topk_search(queries, gallery, 2, metric=metric)
    assert paths == ["reference"] and types.seen == {torch.float32}


@metrics
def test_the_reference_in_float32_has_the_order_of_the_plain_sort(metric, monkeypatch) -> None:
    """What a device without float64 computes, rows of zeros among them."""
    queries, gallery = features(9, 5), features(70, 5, seed=1)
    gallery[3] = 0
    monkeypatch.setattr(Tensor, "device", property(lambda _: torch.device("mps")))
    found = reference.topk_search(queries, gallery, 11, metric == "cosine")
    monkeypatch.undo()
    agrees(found, queries, gallery, 11, metric, rtol=1e-5, atol=1e-6)


class Largest(TorchDispatchMode):
    """Bytes of the largest tensor that is made."""

    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else [out]:
            if isinstance(x, Tensor):
                self.size = max(self.size, x.untyped_storage().nbytes())
        return out


@metrics
def test_memory_is_tiles_and_a_copy_of_the_gallery(metric: str, path: str, monkeypatch) -> None:
    monkeypatch.setattr(cpu, "ROWS", 16)
    monkeypatch.setattr(cpu, "COLUMNS", 64)
    monkeypatch.setattr(cpu, "CHUNK", 256)
    queries, gallery = features(1000, 4), features(1000, 4, seed=1)
    with Largest() as largest:
        cpu.topk_search(queries, gallery, 3, metric == "cosine")
    assert largest.size <= 1024 * 4 * 8  # [Q, G] would be 4 MB


def test_wrong_input_is_named_in_one_line() -> None:
    queries, gallery = features(3, 4), features(9, 4)
    wrong = [
        ((queries[0], gallery, 2), {}, r"queries is \(4,\)"),
        ((queries, gallery[:, :2], 2), {}, "differ in their columns"),
        ((queries, gallery, 10), {}, "k is 10; it should be 0 to 9"),
        ((queries, gallery, -1), {}, "k is -1"),
        ((queries, gallery, 2), {"metric": "dot"}, "no metric 'dot'"),
        ((queries, gallery, 2), {"backend": "gpu"}, "no backend 'gpu'"),
        ((queries, gallery, 2), {"backend": "triton"}, "no backend 'triton'"),
        ((queries.long(), gallery, 2), {}, "floating-point"),
    ]
    for arguments, more, message in wrong:
        with pytest.raises(ValueError, match=message) as error:
            topk_search(*arguments, **more)
        assert "\n" not in str(error.value)

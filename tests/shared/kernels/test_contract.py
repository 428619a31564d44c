"""What holds for every kernel: types, layouts, registration, and what is refused."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from shared import kernels
from shared.kernels import dispatch
from tests.conftest import python

B, K, M, D = 12, 9, 20, 6


@dataclass(frozen=True)
class Case:
    """One kernel with its float tensors; the first `leaves` of them receive gradient."""

    call: Callable[..., Tensor]
    shapes: tuple[tuple[int, ...], ...]
    leaves: int
    path: str = "cpu"  # the one that is the kernel on this machine
    triton: bool = True

    def tensors(self, dtype: torch.dtype = torch.float64, rows: int | None = None) -> list[Tensor]:
        g = torch.Generator().manual_seed(3)
        shapes = [tuple(rows if n == B and rows is not None else n for n in s) for s in self.shapes]
        return [torch.randn(s, generator=g, dtype=torch.float64).to(dtype) for s in shapes]


INDEX = torch.randint(M, (B, K), generator=torch.Generator().manual_seed(4))


def index(x: Tensor) -> Tensor:
    return INDEX[: len(x)]


CASES = {
    "pairwise_distance": Case(
        lambda x, y, **k: kernels.pairwise_distance(x, y, **k), ((B, D), (M, D)), 2
    ),
    "pairwise_distance of one": Case(
        lambda x, **k: kernels.pairwise_distance(x, **k), ((B, D),), 1
    ),
    "distance_loss": Case(
        lambda s, t, **k: kernels.distance_loss(s, t, penalty="huber", delta=0.3, **k),
        ((B, D), (B, 4)),
        1,
    ),
    "triplet_angles": Case(lambda x, **k: kernels.triplet_angles(x, **k), ((B, D),), 1),
    "angle_loss": Case(
        lambda s, t, **k: kernels.angle_loss(s, t, **k), ((B, D), (B, 4)), 1
    ),
    "relation_scores": Case(
        lambda q, a, b, w, c, **k: kernels.relation_scores(q, a, b, index(q), w, c, **k),
        ((B, 5), (B, D), (M, D), (D, 5), (5,)),
        5,
    ),
    "relation_scores without a weight": Case(
        lambda q, a, b, **k: kernels.relation_scores(q, a, b, index(q), None, **k),
        ((B, D), (B, D), (M, D)),
        3,
    ),
    "nce_scores": Case(
        lambda q, b, **k: kernels.nce_scores(q, b, index(q), temperature=0.5, **k),
        ((B, D), (M, D)),
        2,
    ),
    "center_distance_loss": Case(
        lambda s, t, c, **k: kernels.center_distance_loss(s, t, c, **k),
        ((B, D), (B, D), (M, D)),
        1,
        triton=False,
    ),
}
SLACK = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 1e-2}
every = pytest.mark.parametrize("name", CASES)


def value_and_gradients(case: Case, tensors: list[Tensor], backend: str) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in tensors[: case.leaves]]
    out = case.call(*leaves, *tensors[case.leaves :], backend=backend)
    g = torch.Generator().manual_seed(5)
    weights = torch.randn(out.shape, generator=g, dtype=torch.float64).to(out.dtype)
    return [out.detach(), *torch.autograd.grad((out * weights).sum(), leaves)]


@every
@pytest.mark.parametrize("dtype", SLACK)
def test_error_is_no_worse_than_eager_float32(name: str, dtype: torch.dtype) -> None:
    """Truth is float64 on the same (rounded) input."""
    case = CASES[name]
    tensors = case.tensors(dtype)
    truth = value_and_gradients(case, [x.double() for x in tensors], "reference")
    eager = value_and_gradients(case, [x.float() for x in tensors], "reference")
    found = value_and_gradients(case, tensors, "cpu")
    for t, e, f in zip(truth, eager, found, strict=True):
        assert f.dtype == dtype
        size = float(t.abs().max())
        allowed = float((e.double() - t).abs().max()) + SLACK[dtype] * size
        assert float((f.double() - t).abs().max()) <= allowed


@every
def test_float64_is_computed_in_float64(name: str) -> None:
    case = CASES[name]
    truth, found = (value_and_gradients(case, case.tensors(), b) for b in ("reference", "cpu"))
    for t, f in zip(truth, found, strict=True):
        assert f.dtype == torch.float64
        torch.testing.assert_close(f, t, rtol=1e-9, atol=1e-11)


@every
def test_any_layout_gives_the_same(name: str) -> None:
    case = CASES[name]
    tensors = case.tensors(torch.float32)
    expected = value_and_gradients(case, tensors, "cpu")
    strided = [torch.stack([x, x + 1], -1)[..., 0] for x in tensors]
    assert not strided[0].is_contiguous()
    for a, b in zip(value_and_gradients(case, strided, "cpu"), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@every
def test_expanded_input_and_gradient(name: str) -> None:
    """Stride 0: rows that are one row, and the gradient of a sum."""
    case = CASES[name]
    tensors = case.tensors(torch.float32)
    tensors = [x[:1].expand_as(x) if x.ndim > 1 and i else x for i, x in enumerate(tensors)]
    for backend in ("cpu", "reference"):
        leaf = tensors[0].clone().requires_grad_()
        out = case.call(leaf, *tensors[1:], backend=backend)
        (gradient,) = torch.autograd.grad(out.sum(), leaf)
        if backend == "cpu":
            found = out.detach(), gradient
    torch.testing.assert_close(found[0], out.detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found[1], gradient, rtol=1e-3, atol=1e-4)


@every
def test_same_bits_twice(name: str) -> None:
    case = CASES[name]
    first, second = (value_and_gradients(case, case.tensors(torch.float32), "cpu") for _ in "ab")
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@every
def test_every_number_of_a_result_is_written(name: str, poisoned: None, cpu_path: str) -> None:
    case = CASES[name]
    for x in value_and_gradients(case, case.tensors(torch.float32), "cpu"):
        assert x.isfinite().all()


@every
def test_nan_in_is_nan_out(name: str, cpu_path: str) -> None:
    case = CASES[name]
    for i in range(len(case.shapes)):
        tensors = case.tensors(torch.float32)
        tensors[i].view(-1)[0] = torch.nan
        out, reference = (case.call(*tensors, backend=b) for b in ("cpu", "reference"))
        assert out.isnan().any()
        assert not (reference.isnan() & ~out.isnan()).any()


@every
@pytest.mark.parametrize("rows", [0, 1])
def test_no_row_and_one_row_have_a_result(name: str, rows: int, cpu_path: str) -> None:
    case = CASES[name]
    tensors = case.tensors(torch.float32, rows)
    found, expected = (value_and_gradients(case, tensors, b) for b in ("cpu", "reference"))
    for f, e in zip(found, expected, strict=True):
        assert f.isfinite().all()
        torch.testing.assert_close(f, e, rtol=1e-4, atol=1e-5)


@every
def test_under_autocast_the_result_is_float32(name: str) -> None:
    case = CASES[name]
    tensors = [x.bfloat16() for x in case.tensors()]
    for backend in ("cpu", "reference"):
        with torch.autocast("cpu", torch.bfloat16):
            out = case.call(*tensors, backend=backend)
        assert out.dtype == torch.float32
        exact = case.call(*[x.double() for x in tensors], backend="reference")
        torch.testing.assert_close(out.double(), exact, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("loss", [kernels.angle_loss, kernels.distance_loss])
def test_a_loss_of_batch_size_under_autocast_is_float32_throughout(loss) -> None:
    """Large enough for the Gram matrix, which autocast would make in bfloat16."""
    g = torch.Generator().manual_seed(0)
    s, t = (torch.randn(64, 512, generator=g) for _ in "st")
    leaf = s.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        found = loss(leaf, t)
        found.backward()
    exact = s.double().requires_grad_()
    truth = loss(exact, t.double(), backend="reference")
    truth.backward()
    assert found.item() == pytest.approx(truth.item(), rel=1e-5)
    torch.testing.assert_close(leaf.grad.double(), exact.grad, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("name", ["nce_scores", "relation_scores"])
@pytest.mark.parametrize("bad", [-1, M])
def test_an_index_outside_the_bank_is_refused_also_when_compiled(name, bad, monkeypatch) -> None:
    case = CASES[name]
    wrong = INDEX.clone()
    wrong[3, 2] = bad
    monkeypatch.setitem(globals(), "INDEX", wrong)
    low, high = min(0, bad), max(M - 1, bad)
    line = f"index goes from {low} to {high}; it should stay within 0 to {M - 1}"
    with pytest.raises(ValueError, match=line):
        case.call(*case.tensors())
    torch._dynamo.reset()
    compiled = torch.compile(lambda *x: case.call(*x), fullgraph=True, backend="aot_eager")
    with pytest.raises(ValueError, match=line):
        compiled(*case.tensors())


@every
def test_integers_are_refused(name: str) -> None:
    case = CASES[name]
    with pytest.raises(ValueError, match="floating-point"):
        case.call(*[x.long() for x in case.tensors()])


@every
def test_a_backend_named_is_taken_or_refused(name: str) -> None:
    case = CASES[name]
    tensors = case.tensors()
    with pytest.raises(ValueError, match="no backend 'gpu'; there are: auto, reference, cpu"):
        case.call(*tensors, backend="gpu")
    wrong = "takes CUDA tensors, these lie on cpu" if case.triton else "no backend 'triton'"
    with pytest.raises(ValueError, match=wrong):
        case.call(*tensors, backend="triton")


def test_cpu_backend_refuses_tensors_elsewhere() -> None:
    x = torch.empty(4, 3, device="meta")
    with pytest.raises(ValueError, match="'cpu' takes CPU tensors, and these lie on meta"):
        kernels.pairwise_distance(x, backend="cpu")
    with pytest.raises(ValueError, match="different devices"):
        kernels.angle_loss(x, torch.zeros(4, 3))


def test_auto_goes_by_device_and_by_what_an_op_has(monkeypatch) -> None:
    def chosen(device: str, **kwargs) -> str:
        return dispatch.choose("op", "auto", SimpleNamespace(device=torch.device(device)), **kwargs)

    without = {"paths": ("reference", "cpu")}
    for triton in (True, False):
        monkeypatch.setattr(dispatch, "TRITON", triton)
        assert chosen("cpu") == chosen("cpu", **without) == "cpu"
        assert chosen("cpu", small=True) == chosen("meta") == "reference"
        assert chosen("mps", **without) == "reference"
        assert chosen("cuda") == chosen("cuda", small=True) == ("triton" if triton else "reference")
        assert chosen("cuda", **without) == chosen("cuda", small=True, **without) == "cpu"


def test_triton_missing_is_said_and_auto_goes_on(monkeypatch) -> None:
    monkeypatch.setattr(dispatch, "TRITON", False)
    x = torch.randn(5, 3)
    with pytest.raises(ValueError, match="needs triton, which is not installed"):
        kernels.angle_loss(x, x, backend="triton")
    assert kernels.angle_loss(x, x).item() == pytest.approx(0, abs=1e-12)


@every
def test_compiles_as_one_graph_with_its_backward_pass(name: str) -> None:
    case = CASES[name]
    tensors = case.tensors()

    def f(*leaves: Tensor) -> Tensor:
        out = case.call(*[2 * x for x in leaves], *tensors[case.leaves :], backend="cpu")
        return (out * out).sum()

    leaves = [x.clone().requires_grad_() for x in tensors[: case.leaves]]
    torch._dynamo.reset()
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    expected, found = f(*leaves), compiled(*leaves)
    torch.testing.assert_close(found, expected)
    for a, b in zip(
        torch.autograd.grad(found, leaves), torch.autograd.grad(expected, leaves), strict=True
    ):
        torch.testing.assert_close(a, b)


def test_a_transposed_input_compiles_to_machine_code_with_its_backward_pass() -> None:
    """Inductor checks strides that the eager back ends of torch.compile do not."""
    if not (shutil.which("g++") or shutil.which("clang++")):
        pytest.skip("torch.compile needs a C++ compiler")
    x = torch.randn(32, 80, requires_grad=True)

    def f(x: Tensor) -> Tensor:
        return (kernels.pairwise_distance(x.t(), backend="cpu") * 2).sum()

    torch._dynamo.reset()
    torch.compile(f, fullgraph=True)(x).backward()
    (expected,) = torch.autograd.grad(f(x), x)
    torch.testing.assert_close(x.grad, expected)


def registered(monkeypatch) -> list[tuple[str, tuple]]:
    """(op, arguments) of every custom op, recorded from a call of each kernel."""
    # losses go past the dispatcher in eager mode
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    seen: dict[str, tuple] = {}

    class Record(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.namespace == "lowres":
                seen.setdefault(str(func.name()), (func, args))
            return func(*args, **(kwargs or {}))

    for case in CASES.values():
        with Record():
            value_and_gradients(case, case.tensors(), "cpu")
    x = torch.randn(7, 3)
    with Record():
        kernels.topk_search(x, x, 2, backend="cpu")
    monkeypatch.undo()
    return sorted(seen.items())


def test_every_custom_op_passes_opcheck(monkeypatch) -> None:
    found = registered(monkeypatch)
    assert len(found) >= 12
    for name, (op, arguments) in found:
        leaf = not name.endswith("_backward") and "topk" not in name
        given = list(arguments)
        for i, x in enumerate(given):
            if isinstance(x, Tensor) and x.is_floating_point():
                # of a loss, only the student receives gradient
                given[i] = x.detach().requires_grad_(leaf and (i == 0 or "loss" not in name))
        assert set(torch.library.opcheck(op, tuple(given)).values()) == {"SUCCESS"}, name


def test_importing_the_kernels_imports_neither_triton_nor_numba() -> None:
    code = (
        "import sys, shared.kernels; "
        "print(sorted(m for m in ('triton', 'numba') if m in sys.modules), "
        "'torch.cuda' in sys.modules and __import__('torch').cuda.is_initialized())"
    )
    assert python("-c", code).stdout.split("\n")[0] == "[] False"


def test_every_function_of_the_contract_is_exported() -> None:
    names = {name.split()[0] for name in CASES} | {"topk_search"}
    assert set(kernels.__all__) == names and len(names) == 8
    for name in names:
        assert callable(getattr(kernels, name))
        assert import_module(f"shared.kernels.{name}.reference")

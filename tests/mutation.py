"""Do the tests notice when an equation is wrong? `nox -s mutation [-- MODULE]`, ten minutes.

Every operator, comparison, number and flag of the files in TARGETS is changed, one at a time, and
the tests named there are run on the changed module in a process of their own. A change that no test
notices is a survivor; the script fails unless EXPLAINED says why it changes nothing that matters.
"""

from __future__ import annotations

import ast
import contextlib
import copy
import importlib
import importlib.abc
import importlib.util
import io
import os
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
KERNELS = "tests/shared/kernels"
TARGETS = {
    "shared.kernels.pairwise_distance.reference": [f"{KERNELS}/test_distances.py"],
    "shared.kernels.distance_loss.reference": [f"{KERNELS}/test_distances.py"],
    "shared.kernels.triplet_angles.reference": [
        f"{KERNELS}/test_distances.py",
        f"{KERNELS}/test_angle_loss.py",
    ],
    "shared.kernels.angle_loss.reference": [f"{KERNELS}/test_angle_loss.py"],
    "shared.kernels.center_distance_loss.reference": [f"{KERNELS}/test_center_distance_loss.py"],
    "shared.kernels.nce_scores.reference": [f"{KERNELS}/test_nce_scores.py"],
    "shared.kernels.relation_scores.reference": [f"{KERNELS}/test_relation_scores.py"],
    "shared.kernels.topk_search.reference": [f"{KERNELS}/test_topk_search.py"],
    "shared.kernels.reductions": [f"{KERNELS}/test_angle_loss.py", f"{KERNELS}/test_distances.py"],
    "baselines.losses": ["tests/baselines/test_losses.py"],
    "aird.losses": ["tests/aird/test_losses.py"],
    "crrcd.losses": ["tests/crrcd/test_losses.py"],
    "horkd.losses": ["tests/horkd/test_losses.py"],
    "btnet.losses": ["tests/btnet/test_losses.py"],
    "embedkd.losses": ["tests/embedkd/test_losses.py"],
    "shared.baselines": ["tests/shared/test_baselines.py"],
    "shared.losses": ["tests/shared/test_losses.py"],
}
# (module, line without its indentation, change): why no test can notice, or need not
MASKED = "a stand-in for 0 where the result is masked: any value other than 0 will do"
EXPLAINED: dict[tuple[str, str, str], str] = {
    (
        "shared.kernels.pairwise_distance.reference",
        "return torch.where(same, 0, torch.where(same, 1, square).sqrt())",
        "1 -> 2",
    ): MASKED,
    (
        "shared.kernels.triplet_angles.reference",
        "difference = difference / torch.where(same, 1, largest)",
        "1 -> 2",
    ): MASKED,
    (
        "shared.kernels.triplet_angles.reference",
        "return torch.where(same, 0, difference / torch.where(same, 1, square).sqrt())",
        "1 -> 2",
    ): MASKED,
    (
        "shared.kernels.distance_loss.reference",
        "mean = (d * above).sum() / above.sum().clamp(min=1)",
        "1 -> 2",
    ): "both orders of a pair are counted: there are none, or two and more",
    (
        "crrcd.losses",
        "cos_pos = (query * positive).sum(-1)",
        "USub -> UAdd",
    ): "the last of two dimensions is dimension 1",
    (
        "crrcd.losses",
        "cos_neg = (negatives @ query[:, :, None]).squeeze(-1)",
        "USub -> UAdd",
    ): "[B, n, 1] has the same sum over n and mean over the rest",
    (
        "crrcd.losses",
        "cos_neg = (negatives @ query[:, :, None]).squeeze(-1)",
        "1 -> 2",
    ): "[B, n, 1] has the same sum over n and mean over the rest",
    (
        "shared.kernels.center_distance_loss.reference",
        "error = error + 0 * error.detach()  # NaN where it is inf, in the gradient too",
        "Add -> Sub",
    ): "0 either way where it is finite, NaN either way where it is not",
    (
        "shared.kernels.topk_search.reference",
        "return F.normalize(x, dim=-1, eps=torch.finfo(x.dtype).tiny)",
        "USub -> UAdd",
    ): "the last of two dimensions is dimension 1",
    (
        "horkd.losses",
        "CHUNK = 1 << 14  # rows that class_centers holds in float64 at a time",
        "1 -> 2",
    ): "any number of rows will do",
    (
        "horkd.losses",
        "CHUNK = 1 << 14  # rows that class_centers holds in float64 at a time",
        "14 -> 15",
    ): "any number of rows will do",
    (
        "horkd.losses",
        "for part, labels in zip(f.detach().split(CHUNK), y.split(CHUNK), strict=True):",
        "True -> False",
    ): "features and labels of other lengths are refused before",
    (
        "embedkd.losses",
        "return (d_s - d_t).abs().sum() / max(1, len(d_s) * (len(d_s) - 1))",
        "1 -> 2",
    ): "both orders of a pair are counted: there are none, or two and more",
    (
        "baselines.losses",
        "hard = (unit(own) * t).sum(1, keepdim=True).clamp(1e-6, 1)",
        "1 -> 2",
    ): "a cosine is above 1 by rounding only",
    (
        "baselines.losses",
        "alpha = ((s * t).sum(1, keepdim=True) * hard).clamp(1e-6, 1)",
        "1 -> 2",
    ): "a cosine is above 1 by rounding only",
    (
        "shared.baselines",
        "total = 0 * (d_s.sum() + at_least_float32(e_t.detach()).sum())",
        "Add -> Sub",
    ): "0 either way, NaN either way",
    (
        "shared.baselines",
        "return k / k.sum(1, keepdim=True)",
        "True -> False",
    ): "k is symmetric: the transpose, and the mean is over all entries",
    (
        "shared.losses",
        "if a.shape[1:] != b.shape[1:]:  # the gradient of pooling is not deterministic on CUDA",
        "1 -> 2",
    ): "pooling to the size that a map has changes nothing",
    (
        "shared.losses",
        "return (F.relu(positive - negative + margin) * counts).sum() / counts.sum().clamp(min=1)",
        "1 -> 2",
    ): "a class with a positive has two anchors: there are none, or two and more",
}

OPERATORS = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.Pow: ast.Mult,
    ast.FloorDiv: ast.Mult, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd, ast.Gt: ast.GtE,
    ast.Lt: ast.LtE, ast.GtE: ast.Gt, ast.LtE: ast.Lt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.USub: ast.UAdd, ast.Is: ast.IsNot, ast.IsNot: ast.Is,
}  # fmt: skip


def sites(tree: ast.Module) -> Iterator[tuple[ast.AST, str, object, str]]:
    """(node, field, new value, description) of every change; annotations are left alone."""
    skipped: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            notes = [a.annotation for a in [*node.args.args, *node.args.kwonlyargs]]
            notes.append(node.returns)
            skipped |= {id(n) for note in notes if note for n in ast.walk(note)}
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Subscript):
            skipped |= {id(n) for n in ast.walk(node.value)}  # an alias of a type
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.BinOp | ast.UnaryOp | ast.AugAssign) and type(node.op) in OPERATORS:
            new = OPERATORS[type(node.op)]
            yield node, "op", new(), f"{type(node.op).__name__} -> {new.__name__}"
        elif isinstance(node, ast.Compare) and type(node.ops[0]) in OPERATORS:
            new = OPERATORS[type(node.ops[0])]
            yield node, "ops", [new()], f"{type(node.ops[0]).__name__} -> {new.__name__}"
        elif isinstance(node, ast.Constant):
            if isinstance(node.value, bool):
                yield node, "value", not node.value, f"{node.value} -> {not node.value}"
            elif isinstance(node.value, int | float):
                yield node, "value", node.value + 1, f"{node.value} -> {node.value + 1}"


def mutants(source: str) -> Iterator[tuple[str, str, str]]:
    """(line of the change, what changed, the changed source)."""
    lines = source.splitlines()
    for number in range(len(list(sites(ast.parse(source))))):
        tree = copy.deepcopy(ast.parse(source))
        node, field, value, description = list(sites(tree))[number]
        setattr(node, field, value)
        line = lines[getattr(node, "lineno", 1) - 1].strip()
        yield line, description, ast.unparse(ast.fix_missing_locations(tree))


class Changed(importlib.abc.MetaPathFinder, importlib.abc.SourceLoader):
    """Gives one module with another source."""

    def __init__(self, module: str, path: Path, source: str) -> None:
        self.module, self.path, self.source = module, path, source

    def find_spec(self, name, path=None, target=None):
        if name == self.module:
            return importlib.util.spec_from_file_location(name, self.path, loader=self)
        return None

    def get_filename(self, fullname: str) -> str:
        return str(self.path)

    def get_data(self, path: str) -> bytes:
        return self.source.encode()

    def path_stats(self, path: str):
        raise OSError  # so that no byte code is read or kept


def survives(module: str, path: Path, source: str, tests: list[str]) -> bool:
    """Whether the tests pass on the changed module, in a forked process."""
    child = os.fork()
    if child == 0:
        import pytest

        sys.meta_path.insert(0, Changed(module, path, source))
        sink = io.StringIO()
        with contextlib.redirect_stdout(sink), contextlib.redirect_stderr(sink):
            code = pytest.main(["-x", "-q", "-p", "no:cacheprovider", *tests])
        os._exit(1 if code else 0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def main() -> int:
    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT))
    for name in ("hypothesis", "numba", "pytest", "torch._dynamo", "torchvision"):
        importlib.import_module(name)  # loaded once, before the forks
    import torch

    torch.set_num_threads(1)
    tried, unexplained = 0, []
    for module in sys.argv[1:] or TARGETS:
        tests = TARGETS[module]
        path = ROOT / (module.replace(".", "/") + ".py")
        source = path.read_text()
        if not survives(module, path, ast.unparse(ast.parse(source)), tests):
            print(f"{module}: its tests fail before anything is changed")
            return 1
        for line, change, changed in mutants(source):
            tried += 1
            if survives(module, path, changed, tests):
                reason = EXPLAINED.get((module, line, change))
                print(f"survived: {module}: {line}: {change}: {reason or 'NOT EXPLAINED'}")
                unexplained += [line] if reason is None else []
        print(f"{module}: done, {tried} changes so far", flush=True)
    print(f"{tried} changes tried, {len(unexplained)} unexplained survivors")
    return 1 if unexplained else 0


if __name__ == "__main__":
    raise SystemExit(main())

"""Kernels on a CUDA device: `python -m benchmarks.gpu --out benchmarks/results/kernels-NAME.json`.

For each size: milliseconds of ours (forward and backward), ratio to naive eager and to compiled
naive where they fit, peak memory, and the share of the floor that is reached: arithmetic for the
angle loss, copied bytes for gathered scores. A floor is measured on the same device, just before.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from datetime import date
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import baselines
from shared import kernels
from shared.run import provenance

Run = Callable[[], object]
ANGLE_FLOPS = 38  # instructions of one visit of a pair and a third row, value and gradient


def milliseconds(run: Run) -> float:
    from triton.testing import do_bench

    return float(do_bench(run, warmup=50, rep=300, return_mode="median"))


def peak(run: Run) -> int:
    run()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def step(function: Callable[[], Tensor], leaves: list[Tensor]) -> Run:
    return lambda: torch.autograd.grad(function().square().sum(), leaves)


def instructions_per_second() -> float:
    """What the device issues at best: one float32 instruction a lane and cycle."""
    device = torch.cuda.get_device_properties(0)
    return device.multi_processor_count * 128 * device.clock_rate * 1e3


def copied_bytes_per_second() -> float:
    a = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    b = torch.empty_like(a)
    return 2 * a.numel() / (milliseconds(lambda: b.copy_(a)) / 1e3)


def angle(n: int, d: int) -> dict[str, float]:
    s, t = torch.randn(n, d, device="cuda", requires_grad=True), torch.randn(n, d, device="cuda")
    ours = step(lambda: kernels.angle_loss(s, t, reduction="rkd"), [s])
    found = {"ms": milliseconds(ours), "peak_bytes": float(peak(ours))}
    visits = n * (n + 1) / 2 * n
    found["floor_share"] = visits * ANGLE_FLOPS / instructions_per_second() / found["ms"] * 1e3
    if 8 * 4 * (n * n * d + n**3) < torch.cuda.mem_get_info()[0]:
        naive = step(lambda: baselines.naive_angle(s, t), [s])
        found["times_naive"] = milliseconds(naive) / found["ms"]
        if compiled := baselines.compiled(baselines.naive_angle):
            run = step(lambda: compiled(s, t), [s])
            found["times_compiled_naive"] = milliseconds(run) / found["ms"]
    return found


def nce(b: int, k: int, m: int, d: int, copy: float) -> dict[str, float]:
    query = torch.randn(b, d, device="cuda", requires_grad=True)
    bank, index = torch.randn(m, d, device="cuda"), torch.randint(m, (b, k), device="cuda")
    forward = milliseconds(lambda: kernels.nce_scores(query.detach(), bank, index))
    naive = milliseconds(
        lambda: kernels.nce_scores(query.detach(), bank, index, backend="reference")
    )
    return {
        "ms": forward,
        "times_naive": naive / forward,
        "copy_share": b * k * d * 4 / (forward / 1e3) / copy,
        "ms_with_gradient": milliseconds(
            step(lambda: kernels.nce_scores(query, bank, index), [query])
        ),
    }


def relation(b: int, k: int, m: int, d: int) -> dict[str, float]:
    shapes = ((b, d), (b, d), (m, d), (d, d), (d,))
    leaves = [torch.randn(*s, device="cuda", requires_grad=True) for s in shapes]
    index = torch.randint(m, (b, k), device="cuda")
    q, a, n, w, c = leaves

    def run(backend: str) -> Run:
        return step(lambda: kernels.relation_scores(q, a, n, index, w, c, backend=backend), leaves)

    ours, naive = run("triton"), run("reference")
    took = milliseconds(ours)
    return {
        "ms": took,
        "times_naive": milliseconds(naive) / took,
        "peak_bytes": float(peak(ours)),
        "share_of_naive_peak": peak(ours) / peak(naive),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks.gpu: no CUDA device here; on a CPU use `nox -s bench`")
    copy = copied_bytes_per_second()
    found: dict[str, dict[str, float]] = {}
    for n in (256, 1024, 2048, 4096):
        found[f"angle_loss N={n} D=512"] = angle(n, 512)
    for b, k, m in ((32, 4096, 1 << 20), (64, 16_384, 1 << 21)):
        found[f"nce_scores B={b} K={k} M={m} D=128"] = nce(b, k, m, 128, copy)
    for b, k in ((96, 513), (256, 4097)):
        found[f"relation_scores B={b} K={k} d=128"] = relation(b, k, 1 << 14, 128)
    for name, values in found.items():
        print(name + ": " + ", ".join(f"{k} {v:.3g}" for k, v in values.items()), flush=True)
    whole = {
        "date": date.today().isoformat(),
        **provenance(),
        "device": torch.cuda.get_device_name(),
        "copied_bytes_per_second": copy,
        "kernels": found,
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(whole, indent=1) + "\n")


if __name__ == "__main__":
    main()

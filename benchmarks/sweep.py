"""Curves of time and peak memory against N, K and B: `python -m benchmarks.sweep`.

Writes sweep.json (with machine, versions and commit) and sweep.png into --out. Absolute seconds of
a shared CPU mean little by themselves: every point of a curve set is measured within the same
minute, in turns, and what is to be read is the distance between the curves.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from datetime import date
from pathlib import Path

import torch

from benchmarks import baselines, cases
from benchmarks.measure import one_thread, peak_bytes, seconds
from shared.run import provenance

Run = Callable[[], object]
D = 512
LARGEST = 1 << 31  # bytes: a baseline whose N^2 D or N^3 tensors would exceed it is left out


def angle(n: int) -> dict[str, Run]:
    def against(baseline) -> Run:
        return cases.angle(n, D, D, baseline)[0]

    found = {"ours": cases.angle(n, D, D, baselines.naive_angle)[1]}
    if n <= 512:
        found["eager Gram"] = against(baselines.gram_angle)
    if n <= 256 and 4 * 4 * (n * n * D + n**3) < LARGEST:
        found["naive eager"] = against(baselines.naive_angle)
        if compiled := baselines.compiled(baselines.naive_angle):
            found["naive compiled"] = against(compiled)
    return found


def distance(n: int) -> dict[str, Run]:
    def against(baseline) -> Run:
        return cases.distance(n, D, baseline)[0]

    found = {
        "ours": cases.distance(n, D, baselines.naive_distance)[1],
        "torch.cdist": against(baselines.cdist_distance),
    }
    if 4 * 4 * n * n * D < LARGEST:
        found["naive eager"] = against(baselines.naive_distance)
        if n <= 256 and (compiled := baselines.compiled(baselines.naive_distance)):
            found["naive compiled"] = against(compiled)
    return found


def relation(k: int = 512, b: int = 96) -> dict[str, Run]:
    naive, ours = cases.relation(b, k, 4192, 128)
    return {"ours": ours} | ({"naive eager": naive} if 7 * 4 * b * k * 128 < LARGEST else {})


def nce(k: int) -> dict[str, Run]:
    naive, ours = cases.nce(32, k, 20_000, 128)
    return {"ours": ours} | ({"naive eager": naive} if 3 * 4 * 32 * k * 128 < LARGEST else {})


SWEEPS: dict[str, tuple[str, tuple[int, ...], Callable[[int], dict[str, Run]]]] = {
    f"angle_loss, D = {D}": ("N", (8, 16, 32, 64, 128, 256, 512, 1024), angle),
    f"distance_loss, D = {D}": ("N", (8, 32, 128, 512), distance),
    "relation_scores, B = 96, d = 128": ("K", (64, 256, 512, 1024), relation),
    "relation_scores, K = 512, d = 128": ("B", (16, 64, 256), lambda b: relation(b=b)),
    "nce_scores, B = 32, M = 20000, D = 128": ("K", (64, 512, 4096, 16_384), nce),
}


def points(runs: dict[str, Run], rounds: int) -> dict[str, dict[str, float]]:
    """Least seconds, measured in turns, and peak bytes of each."""
    for run in runs.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            times[name].append(seconds(run))
    return {
        name: {"seconds": min(times[name]), "peak_bytes": peak_bytes(run)}
        for name, run in runs.items()
    }


def plot(sweeps: dict, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        2, len(sweeps), figsize=(4 * len(sweeps), 6.5), squeeze=False, layout="constrained"
    )
    colours = {"ours": "C0", "naive eager": "C3", "eager Gram": "C1", "naive compiled": "C2"}
    for column, (title, sweep) in enumerate(sweeps.items()):
        names = {name for point in sweep["points"].values() for name in point}
        for row, (what, unit, factor) in enumerate(
            (("seconds", "ms, forward + backward", 1e3), ("peak_bytes", "peak MiB", 2**-20))
        ):
            axis = axes[row][column]
            for name in sorted(names, key=lambda name: (name != "ours", name)):
                at = [(int(x), p[name][what]) for x, p in sweep["points"].items() if name in p]
                axis.plot(
                    [x for x, _ in at], [y * factor for _, y in at], marker="o", markersize=3,
                    label=name, color=colours.get(name, "C4"),
                )
            axis.set(xscale="log", yscale="log", xlabel=sweep["axis"], ylabel=unit)
            axis.set_title(title if row == 0 else "", fontsize=10)
            sizes = [int(x) for x in sweep["points"]]
            axis.set_xticks(sizes, labels=[str(x) for x in sizes], fontsize=8)
            axis.minorticks_off()
            axis.grid(alpha=0.3)
        axes[0][column].legend(fontsize=8)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(".benchmarks"), help="folder")
    parser.add_argument("--rounds", type=int, default=5, help="measurements of a point")
    arguments = parser.parse_args()
    one_thread()
    arguments.out.mkdir(parents=True, exist_ok=True)
    found: dict[str, dict] = {}
    for title, (axis, sizes, make) in SWEEPS.items():
        print(f"{title} (times of ours)", flush=True)
        found[title] = {"axis": axis, "points": {}}
        for size in sizes:
            point = points(make(size), arguments.rounds)
            found[title]["points"][str(size)] = point
            ours = point["ours"]
            others = ", ".join(
                f"{name} x{other['seconds'] / ours['seconds']:.3g}"
                f" and x{other['peak_bytes'] / ours['peak_bytes']:.3g} memory"
                for name, other in point.items()
                if name != "ours"
            )
            print(
                f"  {axis}={size}: {1e3 * ours['seconds']:.3g} ms, "
                f"{ours['peak_bytes'] / 2**20:.3g} MiB; {others or 'no baseline fits'}",
                flush=True,
            )
    whole = {
        "date": date.today().isoformat(),
        **provenance(),
        "threads": torch.get_num_threads(),
        "sweeps": found,
    }
    (arguments.out / "sweep.json").write_text(json.dumps(whole, indent=1) + "\n")
    plot(found, arguments.out / "sweep.png")
    print(f"wrote {arguments.out / 'sweep.json'} and {arguments.out / 'sweep.png'}")


if __name__ == "__main__":
    main()

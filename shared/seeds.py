"""Paired seeds of any paper: `python -m crrcd.seeds --seeds 10 [--jobs 2] [RECIPE] [--flags]`.

Each seed is one run of train.py with its own teacher, initialisation, order and draws, on the same
data; all students of a seed share its teacher. Ends in the mean of every row and the mean paired
differences with 95 % intervals by a bootstrap over seeds x identities. Finished seeds are kept: an
interrupted call goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from shared import cli
from shared.config import digest, locate, to_dict
from shared.evaluate.intervals import Interval, mean_interval, paired_seeds
from shared.files import write_text
from shared.results import arrays_of

Differences = Sequence[tuple[str, str]]  # (row, the row it is compared with)


def run_seeds(
    paper: str, config: Any, seeds: int, jobs: int, flags: list[str],
    tables: Sequence[str], differences: Differences,
) -> Path:  # fmt: skip
    """Train seeds 0 .. seeds - 1, `jobs` at a time; returns the folder with summary.json.

    config: a paper's. tables: of a run; only procedural faces have more than the first.
    """
    tables = tables if config.data.name == "faces" else tables[:1]
    key = digest(to_dict(replace(config, seed=0, threads=0)))
    folder = locate(config.runs) / paper / f"seeds-{config.recipe}-{key}"
    folder.mkdir(parents=True, exist_ok=True)

    def one(seed: int) -> None:
        run = folder / f"seed-{seed}"
        if all((run / f"{table}.json").is_file() for table in tables):
            return
        command = [sys.executable, "-m", f"{paper}.train"]
        if (run / "config.json").is_file():
            command += ["--resume", str(run)]
        else:
            command += [config.recipe, *flags, "--seed", str(seed), "--folder", str(run)]
            if jobs > 1:
                command += ["--threads", "1"]
        with open(folder / f"seed-{seed}.log", "a") as log:
            done = subprocess.run(command, stdout=log, stderr=log)
        if done.returncode:
            raise ValueError(f"seed {seed} failed (exit {done.returncode}): see {log.name}")
        print(f"{time.strftime('%H:%M:%S')} seed {seed} done", file=sys.stderr)

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(one, range(seeds)))
    runs = [folder / f"seed-{s}" for s in range(seeds)]
    summary = {table: summarise(runs, differences, table) for table in tables}
    write_text(folder / "summary.json", json.dumps(summary, indent=1))
    return folder


def summarise(runs: Sequence[Path], differences: Differences, name: str = "results") -> dict:
    """Of the runs' table `name`, in percent: means over seeds (t intervals), and paired differences
    (bootstrap over seeds x identities)."""
    records = [json.loads((run / f"{name}.json").read_text()) for run in runs]
    arrays = [np.load(arrays_of(run, name)) for run in runs]
    made = [json.loads((run / "config.json").read_text()) for run in runs]
    by = {key: sorted({str(m[key]) for m in made}) for key in ("git", "precision", "threads")}
    summary: dict = {"seeds": len(runs), "made_by": by, "rows": {}, "differences": {}}
    for column in records[0]["columns"]:
        groups = arrays[0][f"groups/{column}"]

        def correct(row: str, column: str = column, n: int = len(groups)) -> np.ndarray:
            bits = [np.unpackbits(a[f"{row}/correct/{column}"], count=n) for a in arrays]
            return 100.0 * np.stack(bits)

        for row in records[0]["rows"]:
            values = [r["rows"][row]["cells"][column]["value"] for r in records]
            cell = _cell(mean_interval(values)) | {"seeds": values}
            summary["rows"].setdefault(row, {})[column] = cell
        for row, reference in differences:
            if row in records[0]["rows"] and reference in records[0]["rows"]:
                gain = paired_seeds(correct(row), correct(reference), groups)
                pair = summary["differences"].setdefault(f"{row} - {reference}", {})
                pair[column] = _cell(gain)
    return summary


def table(summary: dict) -> str:
    columns = list(next(iter(summary["rows"].values())))
    mixed = [f"{k}: {', '.join(v)}" for k, v in summary["made_by"].items() if len(v) > 1]
    lines = [f"warning: seeds made differently ({'; '.join(mixed)})"] if mixed else []
    lines += [f"{summary['seeds']} seeds".ljust(22) + "".join(c.rjust(28) for c in columns)]
    for part in ("rows", "differences"):
        for name, cells in summary[part].items():
            shown = (f"{c['value']:.2f} [{c['low']:.2f}, {c['high']:.2f}]" for c in cells.values())
            lines.append(name.ljust(22) + "".join(s.rjust(28) for s in shown))
        lines.append("")
    return "\n".join(lines)


def markdown(summary: dict) -> str:
    """The table of the READMEs: means and differences in percent with 95 % intervals."""
    columns = list(next(iter(summary["rows"].values())))
    text = [f"| {summary['seeds']} seeds | " + " | ".join(columns) + " |"]
    text.append("|---" * (len(columns) + 1) + "|")
    for part, sign in (("rows", ""), ("differences", "+")):
        for name, cells in summary[part].items():
            shown = (
                f"{c['value']:{sign}.2f} [{c['low']:{sign}.2f}, {c['high']:{sign}.2f}]"
                for c in cells.values()
            )
            text.append(f"| {name.replace(' - ', ' − ')} | " + " | ".join(shown) + " |")
    return "\n".join(text)


def _cell(interval: Interval) -> dict[str, float]:
    return {"value": interval.mean, "low": interval.low, "high": interval.high}


def main(
    paper: str,
    recipes: Mapping[str, Any],
    about: Mapping[str, str],
    members: Callable[[Any], list[Any]],
    differences: Differences,
    tables: Sequence[str] = ("results",),
) -> None:
    """The script of a paper: its name, recipes, and what its tables compare."""
    parser = argparse.ArgumentParser(
        prog=f"python -m {paper}.seeds",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, one thread each")
    args, flags = parser.parse_known_args()
    if args.seeds < 2 or args.jobs < 1:
        raise ValueError("--seeds must be 2 or more and --jobs 1 or more")
    config = cli.parse(paper, recipes, about, members, argv=flags)
    if len(members(config)) > 1:
        raise ValueError(f"{config.recipe} is {len(members(config))} runs: choose one by --only K")
    rest = flags[1:] if flags and not flags[0].startswith("-") else flags
    folder = run_seeds(
        paper, config, args.seeds, args.jobs, [*rest, "--no-report"], tables, differences
    )
    for name, summary in json.loads((folder / "summary.json").read_text()).items():
        print(f"{name}\n{table(summary)}")
    print(f"written to {folder / 'summary.json'}")

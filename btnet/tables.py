"""What a run of BTNet ends in: matching across resolutions, what each costs, routing strategies.

    python -m btnet.tables RUN RUN ...      # Fig. 7 of runs that differ in --end
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from btnet import figures, scoring
from btnet.config import BRANCHES, TRUNKS, Config
from btnet.model import BTNet
from btnet.networks import Reader
from shared import cli, results
from shared.config import locate
from shared.data import identification, procedural
from shared.data.pipeline import Resident, centre
from shared.data.protocols import Evaluation
from shared.data.sets import load
from shared.evaluate.score import Score
from shared.figures import read_record
from shared.files import write_text
from shared.models import build
from shared.results import Row
from shared.run import Run

Rows = Mapping[str, Mapping[int, Reader]]
PEOPLE, EACH = 300, 4  # of the procedural faces: most known ones (as many unknown), images
TIMED = 64  # images a pass
IMAGES = 100  # of Fig. 1


def matching(
    folder: Path,
    config: Config,
    rows: Rows,
    evaluation: Evaluation,
    *,
    name: str = "results",
    epoch: str = "last",
) -> str:
    """Verification of every setting (48&6, ..., 6&6, ...) and, where there is a gallery, rank-1,
    kept as NAME.json and NAME-rank1.json with the gains of Eq. 4 and 5; returns both as text."""
    asked = {id(reader): reader for row in rows.values() for reader in row.values()}
    shared = {(r.network, r.size): k for k, r in asked.items()}  # rows share networks
    read = scoring.embed_at({k: asked[k] for k in shared.values()}, evaluation)
    embedded = {
        row: {size: read[shared[r.network, size]] for size, r in readers.items()}
        for row, readers in rows.items()
    }
    shown = scoring.column((config.resolutions[-1], config.data.lr))
    text = []
    for kind, score in (("", scoring.verified), ("-rank1", scoring.ranked)):
        scores = {row: score(e, evaluation, headline=shown) for row, e in embedded.items()}
        found = {row: s for row, s in scores.items() if s is not None}
        if found:
            table = f"{name}{kind}"
            _write(folder, table, config, rows, found, evaluation, epoch)
            text.append(("rank-1\n" if kind else "verification\n") + figures.table(folder, table))
    return "\n\n".join(text) + "\n"


def _write(
    folder: Path,
    name: str,
    config: Config,
    rows: Rows,
    scores: Mapping[str, Score],
    evaluation: Evaluation,
    epoch: str,
) -> None:
    table = {row: _cost(score, rows[row], config.data.lr) for row, score in scores.items()}
    reference = config.trunk if config.trunk in table else next(iter(table))
    own = next((row for row in reversed(BRANCHES) if row in table), list(table)[-1])
    results.write(
        folder, table, evaluation, reference=reference, name=name, epoch=epoch, own=own
    )
    path = folder / f"{name}.json"
    record = json.loads(path.read_text())
    record["gains"] = scoring.gains({row: score.metrics for row, score in scores.items()})
    write_text(path, json.dumps(record, indent=1))


def mean(folder: Path) -> str:
    """Table 1: verification averaged over a run's test sets, where there are several; kept in
    mean.json."""
    names = sorted(p.name for p in folder.glob("results*.json"))
    names = [n for n in names if not n.endswith(("-rank1.json", "-native.json"))]
    if len(names) < 2:
        return ""
    records = [json.loads((folder / n).read_text()) for n in names]
    values = {
        row: scoring.mean([
            {k: cell["value"] for k, cell in record["rows"][row]["cells"].items()}
            for record in records
        ])
        for row in records[0]["rows"]
    }  # fmt: skip
    gains = scoring.gains(values)
    found = {"test sets": names, "rows": values, "gains": gains}
    write_text(folder / "mean.json", json.dumps(found, indent=1))
    lines = [f"mean of {len(names)} test sets"]
    for row, cells in values.items():
        gain = gains.get(row, {})
        shown = (
            f"{column} {v:.2f}" + (f" ({gain[column]:+.2f})" if column in gain else "")
            for column, v in cells.items()
        )
        lines.append(f"{row:8}" + "  ".join(shown))
    return "\n".join(lines)


def costs(run: Run, rows: Rows) -> str:
    """Parameters stored, multiply-accumulates and images a second of every row at every resolution,
    kept in costs.json; returns them as text. Timed on `TIMED` images at a time, the best of 5."""
    seconds: dict[tuple[int, int], float] = {}
    found: dict[str, dict[str, dict[str, float]]] = {}
    for row, readers in rows.items():
        found[row] = {}
        for size, reader in readers.items():
            key = id(reader.network), reader.side
            if key not in seconds:
                seconds[key] = _seconds(run, reader)
            found[row][str(size)] = {
                "parameters": reader.stored,
                "macs": reader.macs,
                "images_per_second": TIMED / seconds[key],
            }
    write_text(run.folder / "costs.json", json.dumps(found, indent=1))
    return figures.costs(found) + "\n"


@torch.inference_mode()
def _seconds(run: Run, reader: Reader) -> float:
    x = torch.zeros(TIMED, 3, reader.side, reader.side, device=run.device)
    x = x.to(memory_format=torch.channels_last)
    best = float("inf")
    for _ in range(5):
        began = time.perf_counter()
        with run.autocast():
            reader.network.features(x)  # type: ignore[operator]
        if run.device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - began)
    return best


# -- faces at their native sizes -----------------------------------------------------------------


def routing(
    folder: Path, config: Config, rows: Rows, *, root: str = "", name: str = "results-native"
) -> str:
    """Table 2: open-set identification of faces at their native sizes by nine routing strategies,
    beside phi_hr and the trunk, which enlarge all; kept as NAME.json, returned as text.

    Of QMUL-SurvFace (--data.name survface, or its folder `root`) or procedural faces; "" for other
    data, and without branches.
    """
    c = config.data
    row = next((row for row in reversed(BRANCHES) if row in rows), None)
    if row is None or not (root or c.name in ("faces", "survface")):
        return ""
    if root or c.name == "survface":
        title = "QMUL-SurvFace"
        images, ids, roles = _survface(Path(root or c.root).expanduser(), config)
    else:
        title = "procedural faces of native sizes"
        faces = procedural.Faces(size=c.hr, seed=c.seed, coarse=c.coarse, fine=c.fine)
        people = min(PEOPLE, c.test)
        native = procedural.native(faces, people, people, EACH, cache=locate(config.cache))
        images = [torch.from_numpy(np.array(image)) for image in native.images]
        ids, roles = native.ids, np.asarray(native.role)
    model = _router(config, rows[row])
    found = scoring.watch_list(_through(model), images, ids, roles, config.resolutions)
    largest, plain = config.resolutions[-1], next(iter(scoring.STRATEGIES))
    for other in ("hr", *TRUNKS):
        if other in rows:
            whole = _router(config, {largest: rows[other][largest]})
            (found[other],) = scoring.watch_list(
                _through(whole), images, ids, roles, (largest,), (plain,)
            ).values()
    sent = scoring.routed(images, config.resolutions)
    table = {}
    for who, score in found.items():
        if who in rows:
            table[who] = _cost(score, rows[who], largest)
            continue
        spent = sum(count * rows[row][r].macs for r, count in sent[who].items())
        table[who] = replace(_cost(score, rows[row], c.lr), macs=spent // len(images))
    pictures = Resident(torch.zeros(len(ids), 3, 1, 1, dtype=torch.uint8), ids)  # sizes differ
    told = {"images by resolution": sent}
    evaluation = Evaluation(title, "faces", pictures, native=True, notes=told)
    reference = next((other for other in (*TRUNKS, "hr") if other in rows), "max+ceil")
    results.write(folder, table, evaluation, reference=reference, name=name, own="max+ceil")
    return f"open-set identification, {title}\n" + results.table(folder, name, details=True)


def _router(config: Config, readers: Mapping[int, Reader]) -> BTNet:
    """A row's networks behind a router."""
    c, largest = config.data, config.resolutions[-1]
    model = BTNet(
        tuple(readers), readers[largest].network, kernel=c.kernel, antialias=c.antialias,
        mean=c.mean, std=c.std, bn=config.bn,
    )  # fmt: skip
    for r, reader in readers.items():
        if r != largest:
            model.branches[str(r)] = reader.network
    return model.eval()


def _through(model: BTNet) -> Callable[[list[Tensor], int], Tensor]:
    return lambda images, r: model.embed(model.prepare(images, r), r)


def _cost(score: Score, readers: Mapping[int, Reader], size: int) -> Row:
    """A line of a table: all that is stored for a row, and the multiply-accumulates at `size`."""
    stored = {id(reader.network): reader.stored for reader in readers.values()}
    return Row(score, sum(stored.values()), readers[size].macs)


def _survface(root: Path, config: Config) -> tuple[list[Tensor], np.ndarray, np.ndarray]:
    """QMUL-SurvFace's test images as they are, [3, h, w], ids and roles."""
    found = identification.survface(root, config.data.counts)
    if found.unmated is None or not len(found.unmated):
        raise ValueError(f"{root}: no unmated probes, so there is no open set")
    parts = {"gallery": found.gallery, "mated": found.probes, "unmated": found.unmated}
    images = [
        torch.from_numpy(items.image(k)).permute(2, 0, 1)
        for items in parts.values()
        for k in range(len(items))
    ]
    ids = np.concatenate([items.labels for items in parts.values()])
    roles = np.repeat(list(parts), [len(items) for items in parts.values()])
    return images, ids, roles


# -- figures -------------------------------------------------------------------------------------


def drawn(run: Run, config: Config) -> Path:
    """Figures that need no training: 1, 5 and 6."""
    out = run.folder / f"{config.figure}.png"
    if config.figure == "error":
        data = load(config.data, cache=locate(config.cache))
        run.note(licence=data.licence)
        order = torch.arange(min(IMAGES, len(data.train)))
        _, pixels = next(data.train.batches([order]))
        sizes = range(4, config.data.hr, 4)
        path = figures.interpolation_error(centre(pixels, config.data.hr), out, sizes)
    else:
        trunk = build(config.student.name, size=config.data.hr, classes=1)
        draw = figures.storage if config.figure == "storage" else figures.cost
        path = draw(config.resolutions, trunk, out)
    print(f"written to {path}")
    return run.folder


def ends(folders: list[Path]) -> None:
    """Fig. 7: runs that differ in where branches end, into the last one's folder."""
    points = []
    for folder in folders:
        one = cli.stored(Config, folder)
        hr, lr = one.resolutions[-1], one.data.lr
        rows = read_record(folder / "results.json")["rows"]
        stored = json.loads((folder / "costs.json").read_text())["bt"][str(lr)]["parameters"]
        for setting in ((hr, lr), (lr, lr)):
            cell = rows["bt"]["cells"][scoring.column(setting)]
            points.append({
                "name": one.end or "reach", "parameters": stored,
                "setting": scoring.column(setting), "accuracy": cell["value"],
                "low": cell["low"], "high": cell["high"],
            })  # fmt: skip
    print(f"written to {figures.ends(points, folders[-1] / 'ends.png')}")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m btnet.tables", description=ends.__doc__)
    parser.add_argument("runs", nargs="+", type=Path)
    ends(parser.parse_args().runs)


if __name__ == "__main__":
    cli.guarded(main)

"""A finished run folder becomes report.html: one file, no network, figures inside it.

    python -m shared.report RUN                            # write it again

Every plot is an SVG inside the page (its ink follows the reader's light or dark scheme) and a PNG
under RUN/figures/. In all of them the paper's own method has one colour and the reference is grey.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import re
import time
from collections.abc import Iterable
from html import escape
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

from shared import cli, figures
from shared.degrade import low
from shared.figures import INK, OTHERS, OWN, PAPER, REFERENCE, STYLE
from shared.files import write_bytes, write_text

POINTS = 300  # of a curve; more are averaged in windows
EMBEDDED = 1000  # points of a t-SNE: about 5 s on one core
TERMS = {
    "loss": "total loss", "cls": "cls: classification (nats)", "kd": "kd: distillation (nats)",
    "rcd": "rcd: relational contrast (nats)", "cos": "mean cosine of relations",
    "gradient": "gradient norm before clipping", "lr": "learning rate",
}  # fmt: skip


class Finished:
    """What a run left. Raises ValueError for a folder that is no finished run of this schema."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config, self.results = (
            figures.read_record(folder / f"{n}.json") for n in ("config", "results")
        )
        self.rows: dict[str, Any] = self.results["rows"]
        if not self.rows:
            raise ValueError(f"{folder / 'results.json'}: no rows in the table")
        self.arrays = figures.read_arrays(folder / "arrays.npz")
        self.metrics: dict[str, list[dict[str, float]]] = {}  # by phase
        path = folder / "metrics.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        for number, text in enumerate(lines, start=1):
            try:
                line = json.loads(text)
                self.metrics.setdefault(line.pop("phase"), []).append(line)
            except (ValueError, KeyError, AttributeError):
                raise ValueError(f"{path}: line {number} is not readable") from None
        self.faces = self.results["task"] == "faces"
        self.selection = self.config.get("selection", "development")  # split that picks the epoch
        self.reference: str | None = self.results["reference"]
        self.own: str = self.results.get("own") or list(self.rows)[-1]  # the paper's
        rest = [n for n in dict.fromkeys([*self.rows, *self.metrics]) if n != self.reference]
        self.colour = {name: OTHERS[k % len(OTHERS)] for k, name in enumerate(rest)}
        self.colour |= {self.reference or "": REFERENCE} | {self.own: OWN}


def write(folder: Path) -> Path:
    """Write report.html and figures/ into a finished run's folder; returns the report's path.

    Raises ValueError for a folder that is no finished run of this schema; a report that stood there
    still stands then, and after an interrupted write.
    """
    run = Finished(Path(folder))
    (run.folder / "figures").mkdir(exist_ok=True)
    with mpl.rc_context(STYLE):
        sections = {
            "Result": _table(run),
            "Training": _training(run),
            "Similarity of pairs": _similarity(run) if run.faces else "",
            "Embeddings": _tsne(run),
            "Example pairs": _examples(run) if run.faces else "",
            "Configuration": "<details><summary>config.json</summary>"
            f"<pre>{escape(json.dumps(run.config, indent=1))}</pre></details>",
        }
    title = f"{run.config['paper']}: {run.config['config']['recipe'] or 'run'}"
    write_text(run.folder / "report.html", page(title, _about(run), sections))
    return run.folder / "report.html"


# -- text and table ------------------------------------------------------------------------------


def _about(run: Finished) -> str:
    record, config, data = run.config, run.config["config"], run.config["config"]["data"]
    stamp = re.search(r"-(\d{8}-\d{6})(-\d+)?$", run.folder.resolve().name)
    if stamp:
        date = "begun " + time.strftime("%d %B %Y, %H:%M", time.strptime(stamp[1], "%Y%m%d-%H%M%S"))
    else:
        written = time.localtime((run.folder / "results.json").stat().st_mtime)
        date = "results of " + time.strftime("%d %B %Y, %H:%M", written)
    if record.get("seconds") is not None:
        date += f", took {record['seconds'] / 60:,.1f} min"
    versions = ", ".join(f"{k} {v}" for k, v in record["versions"].items())
    facts = {
        "seed": config["seed"],
        "precision": record["precision"],
        "machine": f"{record['device']}; {record['machine']}; threads: {record['threads']}, "
        f"ranks: {record['ranks']}",
        "software": f"{versions}; git {record['git']}",
        "date": date,
        "licence of the data": record.get("licence", "not recorded"),
    }
    if record.get("skipped"):
        facts["left out"] = f"{len(record['skipped'])} files that could not be decoded"
    listed = "".join(f"<div><dt>{k}</dt><dd>{escape(str(v))}</dd></div>" for k, v in facts.items())
    kernel = data["kernel"] + (", antialiased" if data["antialias"] else "")
    return (
        f"<p>Data <b>{escape(data['name'])}</b>, {data['hr']} px down to <b>{data['lr']} px</b> "
        f"({escape(kernel)}). The teacher <b>{escape(config['teacher']['name'])}</b> sees "
        f"{data['hr']} × {data['hr']} px, the student <b>{escape(config['student']['name'])}</b> "
        f"{data['lr']} × {data['lr']} px.</p>\n<dl>{listed}</dl>\n"
    )


def _table(run: Finished) -> str:
    best = {name: found for name, lines in run.metrics.items() if (found := _best(lines))}
    head, body = ["network"], []
    compared = {
        c for row in run.rows.values() for c, cell in row["cells"].items() if "difference" in cell
    }
    for column, heading in run.results["columns"].items():
        head += [f"{heading} (%)"] + ([f"minus {run.reference}"] if column in compared else [])
    head += ["parameters", "MACs"] + (["best epoch"] if best else [])
    for name, row in run.rows.items():
        line = [f'<i style="background:{run.colour[name]}"></i>{escape(name)}']
        for column in run.results["columns"]:
            cell = row["cells"][column]
            line.append(interval_cell(cell, ".2f"))
            if column in compared:
                line.append(interval_cell(cell.get("difference"), "+.2f"))
        line += [f"{row['parameters']:,}", f"{row['macs'] / 1e6:,.1f} M"]
        body.append(line + ([best.get(name, "")] if best else []))
    note = (
        f"The {escape(run.results['evaluation'])} split, every student after its last epoch. In "
        "brackets: 95 % percentile bootstrap intervals, resampling "
        f"{'whole identities' if run.faces else 'images'}."
    )
    if run.reference:
        note += f""" Differences to {escape(run.reference)} are paired (the same items, resampled
            together), in percentage points; bold where the interval leaves out 0."""
    if best:
        note += f""" The best epoch is that of the highest {_headline(run)} on the
            {escape(run.selection)} split, in brackets; the table does not use it."""
    keys = list(dict.fromkeys(key for row in run.rows.values() for key in row["metrics"]))
    every = [
        [escape(name)]
        + [_metric(k, row["metrics"][k]) if k in row["metrics"] else "" for k in keys]
        for name, row in run.rows.items()
    ]
    return (
        f"<p>{note}</p>\n{html_table(head, body)}<details><summary>Every metric (percent; margin: "
        f"cosine; overlap: share)</summary>\n{html_table(['network', *keys], every)}</details>"
    )


def html_table(head: list[str], body: list[list[str]]) -> str:
    """A table that scrolls sideways alone, its first column in place. head: text; body: HTML."""
    rows = [[f"<th>{line[0]}</th>"] + [f"<td>{cell}</td>" for cell in line[1:]] for line in body]
    lines = "".join(f"<tr>{''.join(row)}</tr>\n" for row in rows)
    names = "".join(f"<th>{escape(name.replace('_', ' '))}</th>" for name in head)
    return (
        '<div class="scroll" role="region" tabindex="0" aria-label="table"><table><thead><tr>'
        f"{names}</tr></thead>\n<tbody>\n{lines}</tbody></table></div>\n"
    )


def interval_cell(cell: dict[str, float] | None, form: str) -> str:
    """A value with its interval as HTML; with a sign in `form`, bold where it leaves out 0."""
    if cell is None:
        return ""
    value = f"{cell['value']:{form}}"
    if "+" in form and cell["low"] * cell["high"] > 0:
        value = f"<b>{value}</b>"
    return f"{value} <small>[{cell['low']:{form}}, {cell['high']:{form}}]</small>"


def _metric(name: str, value: float) -> str:
    return f"{value:.3f}" if name in ("margin", "overlap") else f"{value:.2f}"


def _best(lines: Iterable[dict[str, float]]) -> str:
    scored = [(x["epoch"], x["development"]) for x in lines if "development" in x]
    if not scored:
        return ""
    epoch, score = max(scored, key=lambda pair: pair[1])  # the first of equals, as it is kept
    return f"{epoch} of {scored[-1][0]} <small>({score:.2f})</small>"


def _headline(run: Finished) -> str:
    return run.results["columns"][run.results["headline"]]


# -- figures -------------------------------------------------------------------------------------


def _image(run: Finished, name: str, figure: Figure, alt: str) -> str:
    """figures/NAME.png, and the <img> that holds the figure as SVG."""
    figures.legend(figure)
    png, svg = figures.rendered(figure, 150, transparent=True)
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    write_bytes(run.folder / "figures" / f"{slug}.png", png)
    return plot(svg, alt)


def plot(svg: bytes, alt: str) -> str:
    """The <img> that holds an SVG of `figures`, in the colours of the reader's scheme."""
    text = svg.decode().replace(INK, "var(--ink)").replace(PAPER, "var(--paper)")
    text = text.replace('<style type="text/css">', f'<style type="text/css">{SCHEME}', 1)
    code = base64.b64encode(text.encode()).decode()
    return f'<img class="plot" src="data:image/svg+xml;base64,{code}" alt="{escape(alt)}">\n'


def _panel(width: float = 3.4, height: float = 2.5) -> tuple[Figure, Any]:
    figure = Figure(figsize=(width, height), layout="constrained")  # inches
    return figure, figure.add_subplot()


def _training(run: Finished) -> str:
    logged = dict.fromkeys(k for lines in run.metrics.values() for x in lines
                           if "development" not in x for k in x)  # fmt: skip
    known = {"step", "epoch", "cos_pos", "cos_neg", *TERMS}
    other = [key for key in logged if key not in known]  # terms of another paper
    order = ["loss", "cls", "kd", "rcd", *other, "cos", "gradient", "lr", "development"]
    plots = "".join(_curves(run, term) for term in order)
    return plots and (
        "<p>A line for each phase, against epochs done; terms before their weights; a term that "
        f"stays zero is left out. Of more than {POINTS} logged steps, means of equal windows are "
        f'drawn.</p>\n<div class="plots">{plots}</div>'
    )


def _curves(run: Finished, term: str) -> str:
    scores = term == "development"
    figure, axes = _panel()
    shown, values = [], []
    for phase, entries in run.metrics.items():
        per_epoch = _steps_per_epoch(entries)
        for key in ("cos_pos", "cos_neg") if term == "cos" else (term,):
            found = [x for x in entries if key in x and ("development" in x) == scores]
            epochs = [x["epoch"] if scores else x["step"] / per_epoch for x in found]
            points = np.array([epochs, [x[key] for x in found]], dtype=float).T
            if not len(points) or not points[:, 1].any():
                continue
            windows = np.array_split(points, min(POINTS, len(points)))
            points = np.array([window.mean(axis=0) for window in windows])
            shown.append(f"{phase} {key}" if term == "cos" else phase)
            values.append(points)
            axes.plot(*points.T, ":" if key == "cos_neg" else "-", color=run.colour[phase],
                      lw=1.8 if phase == run.own else 1.3, zorder=3 if phase == run.own else 2,
                      marker="o" if len(points) < 13 else "", ms=3, label=shown[-1])  # fmt: skip
    if not shown:
        return ""
    x, y = np.concatenate(values).T
    if term != "lr" and not scores and 0 < 30 * y.min() < y.max():
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("")
    axes.set_xlim(-0.03 * max(1, x.max()), 1.03 * max(1, x.max()))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    title = f"{run.selection} {_headline(run)} (%)" if scores else TERMS.get(term, term)
    axes.set(xlabel="epoch", title=title)
    return _image(run, f"training-{term}", figure, f"{title} against epochs: {', '.join(shown)}")


def _steps_per_epoch(entries: list[dict[str, float]]) -> float:
    """A development score stands at an epoch's last step; without one this is an estimate."""
    for entry in entries:
        if "development" in entry:
            return (entry["step"] + 1) / entry["epoch"]
    return max((entry["step"] + 1) / (entry["epoch"] + 1) for entry in entries)


def _similarity(run: Finished) -> str:
    """CRRCD's Fig. 5 for every row: cosines of pairs of the same and of different people."""
    scores = {n: run.arrays[f"{n}/scores"] for n in run.rows if f"{n}/scores" in run.arrays}
    if not scores:
        return ""
    same = run.arrays["pairs/same"]
    shares = {name: figures.pair_shares(s, same) for name, s in scores.items()}
    left, top = min(s.min() for s in scores.values()) - 0.02, np.max(list(shares.values())) * 1.05
    plots = ""
    for name, share in shares.items():
        measured = run.rows[name]["metrics"]
        found = [f"; {k} {_metric(k, measured[k])}" for k in ("margin", "overlap") if k in measured]
        title = name + "".join(found)
        figure, axes = _panel()
        threshold = float(run.arrays[f"{name}/threshold"])
        figures.pair_panel(axes, share, threshold, (run.colour[name], INK))
        axes.set(xlim=(left, 1), ylim=(0, top), xlabel="cosine", ylabel="pairs (%)", title=title)
        plots += _image(run, f"similarity-{name}", figure, f"Histograms of cosines, {title}")
    return (
        "<p>Margin: mean cosine of pairs of the same person minus that of different people. "
        "Overlap: intersection of the two histograms, 0 apart, 1 the same; bins of 0.02. Dashed: "
        f'the verification threshold, mean over folds.</p>\n<div class="plots">{plots}</div>'
    )


def _tsne(run: Finished) -> str:
    """CRRCD's Fig. 4: the reference and the paper's own, coloured by class."""
    labels = run.arrays.get("points/labels", np.empty(0))
    some = figures.thinned(len(labels), EMBEDDED)
    labels, plots = labels[some], ""
    classes = np.unique(labels)
    for name in dict.fromkeys([run.reference or run.own, run.own]):
        if len(labels) < 4 or f"{name}/points" not in run.arrays:
            continue
        points = run.arrays[f"{name}/points"][some].astype(np.float64)
        flat = figures.embedded(figures.directions(points) if run.faces else points)
        figure, axes = _panel(3.6, 3.6)
        figures.class_panel(axes, flat, labels)
        axes.spines[:].set(visible=True, color=run.colour[name], lw=1.5)
        axes.set_title(name, color=run.colour[name])
        alt = f"t-SNE of {len(flat)} embeddings of {name}, {len(classes)} classes"
        plots += _image(run, f"tsne-{name}", figure, alt)
    kind = "identities" if run.faces else "classes"
    marked = "coloured" + (" and numbered" if len(classes) <= figures.NUMBERED else "")
    return plots and (
        f"<p>t-SNE of {len(labels)} images of {len(classes)} {kind}, {marked}. The "
        "axes have no unit, and distances between clusters no meaning.</p>\n"
        f'<div class="plots wide">{plots}</div>'
    )


def _examples(run: Finished) -> str:
    """Pairs that the paper's student gets right and wrong, at HR and as it sees them."""
    arrays, own, data = run.arrays, run.own, run.config["config"]["data"]
    if f"{own}/scores" not in arrays or not len(arrays.get("examples/pair", ())):
        return ""
    same, scores = arrays["pairs/same"], arrays[f"{own}/scores"]
    found = run.results["columns"]
    column = "verification" if "verification" in found else run.results["headline"]
    correct = np.unpackbits(arrays[f"{own}/correct/{column}"], count=len(same)).astype(bool)
    sides = _sides(column, data["lr"])
    groups: dict[tuple[bool, bool], str] = {}
    for pair, images in zip(arrays["examples/pair"], arrays["examples/images"], strict=True):
        high = torch.as_tensor(images)  # [2, 3, H, W]
        small = [
            low(one[None], side, mode=data["kernel"], antialias=data["antialias"])[0]
            for one, side in zip(high, sides, strict=True)
        ]
        faces = "".join(
            f'<img src="data:image/png;base64,{_png(x)}" alt="face {k} at {x.shape[-1]} px">'
            for view in (high, small)
            for k, x in zip("AB", view, strict=True)
        )
        key = bool(correct[pair]), bool(same[pair])
        caption = f"<figcaption>{scores[pair]:.3f}</figcaption>"
        groups[key] = groups.get(key, "") + f"<figure>{faces}{caption}</figure>\n"
    text = (
        f"<p>Above at {data['hr']} px, below at {' and '.join(map(str, dict.fromkeys(sides)))} px "
        f"as <b>{escape(own)}</b> sees them, "
        f"with its cosine. Its threshold is {float(arrays[f'{own}/threshold']):.3f}, the mean over "
        "folds; right and wrong are by the threshold of the pair's own fold.</p>\n"
    )
    for right, alike in sorted(groups, reverse=True):
        who = "the same person" if alike else "different people"
        told = "the same person" if alike == right else "different people"
        text += f"<h3>{'Right' if right else 'Wrong'}: {who}, taken for {told}</h3>\n"
        text += f'<div class="pairs">{groups[right, alike]}</div>\n'
    return text


def _sides(column: str, lr: int) -> tuple[int, int]:
    """Of the two images of a pair, in px: those that a column such as 48&6 says, else lr."""
    said = re.fullmatch(r"(\d+)&(\d+)", column)
    return (int(said[1]), int(said[2])) if said else (lr, lr)


def _png(pixels: torch.Tensor) -> str:
    """uint8 [3, H, W] as base64 PNG."""
    png = io.BytesIO()
    Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(png, "PNG")
    return base64.b64encode(png.getvalue()).decode()


# -- page ----------------------------------------------------------------------------------------


def page(title: str, about: str, sections: dict[str, str], style: str = "") -> str:
    """The whole file. title: text; about: HTML below it; sections: HTML by heading, empty ones are
    left out; style: CSS besides the report's."""
    body = "\n".join(f"<section><h2>{h}</h2>\n{t}\n</section>" for h, t in sections.items() if t)
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n{HEAD}<title>{escape(title)}</title>\n'
        f"<style>{CSS}{style}</style>\n</head>\n<body>\n<header><h1>{escape(title)}</h1>\n"
        f"{about}</header>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


SCHEME = """:root{--ink:#222;--paper:#fff}
@media screen and (prefers-color-scheme:dark){:root{--ink:#ddd;--paper:#16181b}}"""
HEAD = """<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
"""
CSS = (
    f"{SCHEME}\n:root{{color-scheme:light dark}}"
    + """
body{max-width:64rem;margin:0 auto;padding:1.5rem 1rem 4rem;font:1rem/1.55 system-ui,sans-serif;
 color:var(--ink);background:var(--paper)}
h1{font-size:1.9rem;line-height:1.2;margin:.5rem 0 1rem;overflow-wrap:anywhere}
h2{font-size:1.25rem;margin:2.8rem 0 .6rem;padding-top:.8rem;border-top:1px solid #8884}
h3{font-size:1rem;margin:1.4rem 0 .5rem}
p,dl{max-width:46rem}
dl{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,13rem),1fr));
 gap:.6rem 1.5rem;font-size:.875rem}
dd{margin:0;overflow-wrap:anywhere}
dt,small,figcaption{opacity:.75}
.scroll{overflow-x:auto;margin:1rem 0}
table{border-collapse:collapse;font-size:.875rem;font-variant-numeric:tabular-nums;
 white-space:nowrap}
th,td{padding:.4rem .9rem .4rem 0;text-align:right;border-bottom:1px solid #8883}
th:first-child{text-align:left;position:sticky;left:0;background:var(--paper)}
tbody th{font-weight:500}
th i{display:inline-block;width:.7em;height:.7em;border-radius:50%;margin-right:.5em;
 print-color-adjust:exact}
.plots{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,17rem),1fr));gap:1rem}
.plots.wide{grid-template-columns:repeat(auto-fill,minmax(min(100%,22rem),1fr))}
.plot{width:100%;height:auto}
.pairs{display:grid;grid-template-columns:repeat(auto-fill,minmax(8rem,1fr));gap:1rem}
figure{margin:0;display:grid;grid-template-columns:1fr 1fr;gap:3px}
figure img{width:100%;image-rendering:pixelated}
figcaption{grid-column:1/3;font-size:.8125rem;font-variant-numeric:tabular-nums}
summary{cursor:pointer;margin:.6rem 0}
pre{overflow-x:auto;font-size:.8125rem;line-height:1.4}
@media print{:root{color-scheme:light}body{max-width:none;padding:0}.scroll{overflow:visible}
 .plots{grid-template-columns:repeat(3,1fr)}.plots.wide{grid-template-columns:1fr 1fr}
 .pairs{grid-template-columns:repeat(6,1fr)}table{font-size:.6rem;white-space:normal}figure,.plot{break-inside:avoid}h2,h3{break-after:avoid}}
"""
)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m shared.report", description="Write a finished run's report.html again."
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="the run's folder")
    print(write(parser.parse_args().run))


if __name__ == "__main__":
    cli.guarded(main)

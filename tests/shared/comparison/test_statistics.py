"""Run folders are fabricated here by a writer of their own: json, np.savez and np.packbits."""

import json
import shutil
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import norm

from shared.comparison import statistics
from shared.comparison.statistics import Claim, Row, check_equal, choose, summarise

N, PER = 240, 4  # items, items of an identity
GROUPS = np.arange(N) // PER
COLUMNS = {"rank1": "rank-1", "verification": "verification"}
SEEDS = 4
LEVEL = {"none": 0.4, "kd": 0.5, "rkd": 0.5, "ours": 0.7, "ours: part": 0.69, "far": 0.2}
PUBLISHED = {"kd": 1.5, "rkd": 0.3, "ours": 2.5}


@pytest.fixture(autouse=True)
def verdicts_from_three_seeds(monkeypatch):
    """Five need not be written each time."""
    assert statistics.SEEDS_OF_A_VERDICT == 5
    monkeypatch.setattr(statistics, "SEEDS_OF_A_VERDICT", 3)


def row(name, group="paper", job="", arm="", **more):
    given = {"phases": (arm or name,), "floor": "none", "published": PUBLISHED.get(name)} | more
    return Row(name=name, title=name.upper(), paper="p", source="someone 2020", group=group,
               job=job or name, arm=arm or name, **given)  # fmt: skip


ROWS = [
    row("teacher, HR", "teacher", job="none", phases=()),
    row("none", "baseline"),
    row("kd", "baseline"),
    row("rkd", "baseline"),
    row("ours", job="shared", phases=("before", "ours"), tuned=True),
    row("ours: part", "component", job="shared", arm="part", against="ours"),
]


def config(**changes):
    """A config.json; changes by dotted name."""
    record = {
        "config": {
            "seed": 0, "folder": "x", "own": 3,
            "data": {"name": "faces", "hr": 64, "lr": 16, "mean": [0.5, 0.5, 0.5]},
            "teacher": {"name": "big", "optim": {"lr": 0.1}},
            "student": {"name": "small"}, "optim": {"epochs": 24},
        },
        "precision": "fp32", "threads": 1, "ranks": 1, "device": "cpu", "machine": "m",
        "versions": {"torch": "2.15"}, "git": "abc",
    }  # fmt: skip
    for name, value in changes.items():
        *path, last = name.split("__")
        place = record
        for part in path:
            place = place.setdefault(part, {})
        place[last] = value
    return record


def hits(name, seed, column="rank1", level=None):
    """Hits of a row: what people and seeds have in common is shared by all rows."""
    people = np.random.default_rng(7).normal(size=N // PER)[GROUPS]
    own = np.random.default_rng([len(column), seed, *name.encode()]).normal(size=N)
    level = LEVEL.get(name, 0.9) if level is None else level
    return 0.6 * people + own < norm.ppf(level) * np.sqrt(1.36)


def write(folder, arms, *, groups=GROUPS, table="results", columns=COLUMNS, headline="rank1",
          development=(), steps=None, scores=None, **changes):  # fmt: skip
    """arms: name -> column -> bool [N]."""
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {f"groups/{column}": groups for column in columns}
    lines = {}
    for arm, found in arms.items():
        cells = {c: {"value": 100.0 * float(np.mean(x)), "low": 0, "high": 0}
                 for c, x in found.items()}  # fmt: skip
        lines[arm] = {"cells": cells, "metrics": {}, "parameters": 1000, "macs": 2000}
        arrays |= {f"{arm}/correct/{c}": np.packbits(x) for c, x in found.items()}
        if scores is not None:
            same, cosines, threshold = scores
            arrays |= {"pairs/same": same, f"{arm}/scores": cosines, f"{arm}/threshold": threshold}
    record = config(**changes) | ({"steps": steps} if steps else {})
    (folder / "config.json").write_text(json.dumps(record))
    with open(folder / "metrics.jsonl", "a") as file:
        for phase, epoch, score in development:
            file.write(json.dumps({"phase": phase, "step": 9 * epoch, "loss": 1.0}) + "\n")
            line = {"phase": phase, "step": 10 * epoch, "epoch": epoch, "development": score}
            file.write(json.dumps(line | {"rank1": score}) + "\n")
    arrays_name = "arrays" if table == "results" else table
    np.savez_compressed(folder / f"{arrays_name}.npz", **arrays)
    result = {"columns": columns, "headline": headline, "rows": lines}
    (folder / f"{table}.json").write_text(json.dumps(result))


def arms_of(job, seed):
    names = {"none": {"none": "none", "teacher, HR": "teacher, HR"},
             "shared": {"ours": "ours", "part": "ours: part"}}.get(job, {job: job})  # fmt: skip
    return {a: {c: hits(n, seed, c) for c in COLUMNS} for a, n in names.items()}


def comparison(folder, seeds=SEEDS, lr=16):
    for job in ("none", "kd", "rkd", "shared"):
        for seed in range(seeds):
            write(folder / f"{lr}px" / job / f"seed-{seed}", arms_of(job, seed),
                  config__data__lr=lr, config__seed=seed)  # fmt: skip
    return folder


def summary(folder, rows=ROWS, claims=(), **more):
    given = {"recipe": "matched", "resolutions": (16,), "seeds": SEEDS, "label": "Table I",
             "multipliers": (1.0, 1 / 3, 3.0), "trials": 2}  # fmt: skip
    record = summarise(folder, rows, claims, **(given | more))
    return json.loads(json.dumps(record, allow_nan=False))  # plain JSON, no NaN


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    return comparison(tmp_path_factory.mktemp("done"))


@pytest.fixture(scope="module")
def record(done):
    return summary(done)


def step_down(ps):
    """Holm (1979) as a plain loop."""
    adjusted, largest = {}, 0.0
    for place, name in enumerate(sorted(ps, key=ps.get)):
        largest = max(largest, ps[name] * (len(ps) - place))
        adjusted[name] = min(1.0, largest)
    return adjusted


def test_means_and_differences_match_plain_loops(record):
    rows = record["resolutions"]["16"]["rows"]
    assert list(rows) == [r.name for r in ROWS] and record["columns"] == COLUMNS
    for name, line in rows.items():
        assert line["seeds"] == [0, 1, 2, 3] and line["failed"] == {}
        assert (line["parameters"], line["macs"], line["title"]) == (1000, 2000, name.upper())
        for column in COLUMNS:
            cell = line["cells"][column]
            means = [100 * sum(map(bool, hits(name, s, column))) / N for s in range(SEEDS)]
            assert cell["seeds"] == pytest.approx(means)
            assert cell["value"] == pytest.approx(sum(means) / SEEDS)
            assert cell["low"] < cell["value"] < cell["high"]
            for other, gain in cell["minus"].items():
                total = 0.0
                for s in range(SEEDS):
                    for x, y in zip(hits(name, s, column), hits(other, s, column), strict=True):
                        total += float(x) - float(y)
                assert gain["value"] == pytest.approx(100 * total / (SEEDS * N))
                assert gain["low"] <= gain["value"] <= gain["high"] and 0 < gain["p"] <= 1
    assert record["resolutions"]["16"]["identities"] == N // PER


def test_each_row_is_measured_against_none_kd_and_its_own_reference(record):
    rows = record["resolutions"]["16"]["rows"]
    others = {name: list(line["cells"]["rank1"]["minus"]) for name, line in rows.items()}
    assert others == {
        "teacher, HR": ["none", "kd"], "none": [], "kd": ["none"], "rkd": ["none", "kd"],
        "ours": ["none", "kd"], "ours: part": ["none", "kd", "ours"],
    }  # fmt: skip


@pytest.mark.parametrize("column", COLUMNS)
@pytest.mark.parametrize("other", ["none", "kd"])
def test_holm_is_over_baselines_and_papers_of_one_column(record, column, other):
    rows = record["resolutions"]["16"]["rows"]
    family = {"none": ["kd", "rkd", "ours"], "kd": ["rkd", "ours"]}[other]
    gains = {name: line["cells"][column]["minus"].get(other) for name, line in rows.items()}
    expected = step_down({name: gains[name]["p"] for name in family})
    for name, gain in gains.items():
        if gain:
            assert gain["holm"] == (pytest.approx(expected[name]) if name in family else None)


def test_ranks_and_kendall_are_of_baselines_and_papers(record):
    part = record["resolutions"]["16"]
    means = {name: part["rows"][name]["cells"]["rank1"]["value"]
             for name in ("none", "kd", "rkd", "ours")}  # fmt: skip
    for name, line in part["rows"].items():
        if name not in means:
            assert line["rank"] is None
            continue
        above = sum(v > means[name] for v in means.values())
        equal = sum(v == means[name] for v in means.values())
        assert line["rank"]["value"] == above + (equal + 1) / 2
        assert 1 <= line["rank"]["low"] <= line["rank"]["high"] <= 4
    tau = part["kendall"]
    assert tau["methods"] == ["kd", "rkd", "ours"] and tau["published"] == [1.5, 0.3, 2.5]
    assert tau["ours"] == pytest.approx([means[name] for name in tau["methods"]])
    signs = [np.sign((PUBLISHED[a] - PUBLISHED[b]) * (means[a] - means[b]))
             for a, b in combinations(PUBLISHED, 2)]  # fmt: skip
    ties = sum(s == 0 for s in signs)
    assert tau["value"] == pytest.approx(sum(signs) / np.sqrt(3 * (3 - ties)))
    assert tau["low"] <= tau["value"] <= tau["high"] and tau["label"] == "Table I"


def test_a_seed_more_or_less_uses_the_seeds_both_have(tmp_path):
    comparison(tmp_path)
    (tmp_path / "16px/kd/seed-1/results.json").unlink()
    (tmp_path / "16px/kd/seed-1/failed.txt").write_text("loss is not finite at step 3\n")
    shutil.rmtree(tmp_path / "16px/rkd")
    for seed in range(1, SEEDS):
        shutil.rmtree(tmp_path / f"16px/shared/seed-{seed}")
    (tmp_path / "16px/rkd/seed-0").mkdir(parents=True)
    (tmp_path / "16px/rkd/seed-0/failed.txt").write_text("out of memory")
    claims = [Claim("a", "P", ("ours", "kd"), "16"), Claim("b", "P", ("rkd", "kd"), "16"),
              Claim("c", "P", ("kd", "none"), "8"), Claim("d", "P", ("kd", "none"), "16"),
              Claim("e", "P", ("nobody", "none"), "16", note="why")]  # fmt: skip
    record = summary(tmp_path, claims=claims)
    part = record["resolutions"]["16"]
    kd, rkd, ours = (part["rows"][name] for name in ("kd", "rkd", "ours"))
    assert kd["seeds"] == [0, 2, 3] and kd["failed"] == {"1": "loss is not finite at step 3"}
    expected = np.mean([hits("kd", s).mean() - hits("none", s).mean() for s in (0, 2, 3)])
    assert kd["cells"]["rank1"]["minus"]["none"]["value"] == pytest.approx(100 * expected)
    assert rkd["seeds"] == [] and rkd["cells"] == {} and rkd["failed"] == {"0": "out of memory"}
    assert rkd["parameters"] is None and rkd["rank"] is None
    one = ours["cells"]["rank1"]
    assert one["seeds"] == [one["value"]] and one["low"] is None and ours["rank"] is None
    gain = one["minus"]["kd"]
    only = hits("ours", 0).mean() - hits("kd", 0).mean()
    assert gain == {"value": pytest.approx(100 * only), "low": None, "high": None, "p": None,
                    "holm": None}  # fmt: skip
    verdicts = [(c["verdict"], c["note"]) for c in record["claims"]]
    assert verdicts[0] == ("not tested", "1 paired seeds, a verdict needs 3")
    assert verdicts[1] == ("not tested", "no finished run of rkd")
    assert verdicts[2] == ("not tested", "nothing was trained at 8 px")
    assert verdicts[3][0] != "not tested" and record["claims"][3]["holm"] is not None
    assert verdicts[4] == ("not tested", "no finished run of nobody; why")
    assert part["kendall"] is None  # of the ranked rows only kd has a published number


def test_one_seed_gives_values_without_intervals(tmp_path):
    part = summary(comparison(tmp_path, seeds=1), seeds=1)["resolutions"]["16"]
    assert part["rows"]["ours"]["rank"] == {"value": 1.0, "low": None, "high": None}
    assert part["rows"]["ours"]["cells"]["rank1"]["minus"]["kd"]["low"] is None
    assert part["kendall"]["low"] is None and -1 <= part["kendall"]["value"] <= 1


def test_verdicts_follow_the_stated_rules(tmp_path):
    """better - worse of hits that differ by design: by much, by nothing, by a hair."""
    rng = np.random.default_rng(3)
    base = [rng.random(N) < 0.5 for _ in range(6)]

    def changed(x, share, to):
        return np.where(rng.random(N) < share, to, x)

    made = {
        "none": base, "kd": base,
        "up": [changed(x, 0.4, True) for x in base],
        "noise": [x ^ (rng.random(N) < 0.2) for x in base],
        "same": [x.copy() for x in base],
    }  # fmt: skip
    for name, found in made.items():
        for seed, x in enumerate(found):
            write(tmp_path / f"16px/{name}/seed-{seed}", {name: {c: x for c in COLUMNS}})
    pairs = [("up", "none", "greater"), ("none", "up", "greater"), ("noise", "none", "greater"),
             ("same", "none", "close"), ("up", "none", "close"), ("noise", "none", "close"),
             ("none", "up", "close")]  # fmt: skip
    claims = [Claim(str(k), "P", (a, b), "16", kind=kind) for k, (a, b, kind) in enumerate(pairs)]
    record = summary(tmp_path, [row(name, "baseline") for name in made], claims, seeds=6)
    found = record["claims"]
    assert [c["verdict"] for c in found] == [
        "confirmed", "contradicted", "not confirmed",
        "confirmed", "contradicted", "not confirmed", "contradicted",
    ]  # fmt: skip
    expected = step_down({c["claim"]: c["p"] for c in found[:3]})
    assert [c["holm"] for c in found] == [*(pytest.approx(expected[c["claim"]]) for c in found[:3]),
                                          None, None, None, None]  # fmt: skip


def test_many_claims_make_one_harder_to_confirm(tmp_path):
    # 16 more people have an item more right, the same in each seed: z is sqrt(16), and 2.1 when
    # it is widened for 4 seeds: p about .02.
    rng = np.random.default_rng(5)
    base = rng.random(N) < 0.5
    better = base.copy()
    better[np.flatnonzero(~base)[::6][:16]] = True
    names = {"none": base, "kd": better}
    names |= {f"n{k}": base ^ (rng.random(N) < 0.3) for k in range(9)}
    for name, x in names.items():
        for seed in range(SEEDS):
            write(tmp_path / f"16px/{name}/seed-{seed}", {name: {c: x for c in COLUMNS}})
    one = Claim("one", "P", ("kd", "none"), "16")
    others = [Claim(f"n{k}", "P", (f"n{k}", "none"), "16") for k in range(9)]
    rows = [row(name, "baseline") for name in names]
    alone = summary(tmp_path, rows, [one])["claims"][0]
    among = summary(tmp_path, rows, [one, *others])["claims"][0]
    assert alone["low"] > 0 and 0.005 < alone["p"] <= 0.05 and alone["verdict"] == "confirmed"
    assert among["p"] == alone["p"] and among["holm"] > 0.05
    assert among["verdict"] == "not confirmed"


def test_configs_that_differ_are_refused_by_run_field_and_values(tmp_path):
    comparison(tmp_path)
    write(tmp_path / "16px/rkd/seed-2", arms_of("rkd", 2), config__teacher__optim__lr=0.3)
    with pytest.raises(ValueError, match=r"^16px/rkd/seed-2: teacher\.optim\.lr is 0\.3, but 0\.1 "
                       r"in 16px/none/seed-0; [^\n]*$"):  # fmt: skip
        summary(tmp_path)


@pytest.mark.parametrize(
    ("change", "value"),
    [("threads", 2), ("precision", "bf16"), ("device", "cuda:0"), ("ranks", 2),
     ("config__data__mean", [0.4, 0.5, 0.5]), ("config__student__head", "softmax"),
     ("config__optim__epochs", 12)],
)  # fmt: skip
def test_every_part_and_fact_must_be_equal(tmp_path, change, value):
    write(tmp_path / "a", {}, config__seed=1, config__own=1)
    write(tmp_path / "b", {}, config__seed=2, config__own=2, git="other", config__folder="y")
    runs = {"a": tmp_path / "a", "b": tmp_path / "b"}
    equal, differing = check_equal(runs, {})
    assert equal["data.hr"] == 64 and "seed" not in equal and "own" not in equal
    assert equal["teacher.optim.lr"] == 0.1 and not differing
    write(tmp_path / "c", {}, **{change: value})
    field = change.removeprefix("config__").replace("__", ".")
    runs |= {"c": tmp_path / "c"}
    with pytest.raises(ValueError, match=rf"{field} is"):
        check_equal(runs, {})
    equal, differing = check_equal(runs, {"c": {field: "on purpose", "data.lr": "may"}})
    assert differing == {"c": {field: "on purpose"}} and equal["data.lr"] == 16


def test_declared_exceptions_are_reported_for_their_row_only(tmp_path):
    comparison(tmp_path)
    for seed in range(SEEDS):
        write(tmp_path / f"16px/shared/seed-{seed}", arms_of("shared", seed),
              config__student__name="own", git="def")  # fmt: skip
    rows = [*ROWS[:4], row("ours", job="shared", exempt={"student.name": "one network for all",
                                                          "optim.epochs": "unused"})]  # fmt: skip
    record = summary(tmp_path, rows)
    assert record["exempt"] == {"ours": {"student.name": "one network for all"}}
    assert record["equal"]["student.name"] == "small" and record["made_by"]["git"] == ["abc", "def"]


def test_rows_scored_on_other_items_are_refused_but_not_those_of_other_images(tmp_path):
    comparison(tmp_path)
    other = GROUPS[::-1].copy()
    for job in ("kd", "shared"):
        for seed in range(SEEDS):
            run = tmp_path / f"16px/{job}/seed-{seed}"
            found = {"s": {c: hits(job + "s", seed, c) for c in COLUMNS}}
            write(run, found, table="results-shifted", groups=other)
    tables = {column: ("results-shifted", column) for column in COLUMNS}
    shifted = [row("kd, shifted", "shifted", "kd", "s", tables=tables),
               row("ours, shifted", "shifted", "shared", "s", tables=tables,
                   against="kd, shifted")]  # fmt: skip
    lines = summary(tmp_path, [*ROWS, *shifted])["resolutions"]["16"]["rows"]
    gain = lines["ours, shifted"]["cells"]["rank1"]["minus"]
    expected = np.mean([hits("shareds", s).mean() - hits("kds", s).mean() for s in range(SEEDS)])
    assert list(gain) == ["kd, shifted"]
    assert gain["kd, shifted"]["value"] == pytest.approx(100 * expected)
    write(tmp_path / "16px/kd/seed-3", arms_of("kd", 3), groups=other)
    with pytest.raises(ValueError, match=r"kd/seed-3: rank1 was scored on other items"):
        summary(tmp_path)


def test_columns_and_phases_may_depend_on_the_resolution(tmp_path):
    comparison(tmp_path)
    cross = {"16&16": "16&16", "64&16": "64&16"}
    for seed in range(SEEDS):
        write(tmp_path / f"16px/bt/seed-{seed}", {"bt": {c: hits("bt", seed, c) for c in cross}},
              columns=cross, development=[("bt-16", 2, 31.0)])  # fmt: skip
    tables = {column: ("results", "{lr}&{lr}") for column in COLUMNS}
    bt = row("bt", tables=tables, phases=("mr", "bt-{lr}"))
    record = summary(tmp_path, [*ROWS, bt])
    cell = record["resolutions"]["16"]["rows"]["bt"]["cells"]["rank1"]
    assert cell["seeds"][1] == pytest.approx(100 * hits("bt", 1, "16&16").mean())
    assert record["columns"] == COLUMNS and "none" in cell["minus"]
    assert record["curves"]["16"]["bt"] == {"seed": 0, "epochs": [2], "rank1": [31.0]}


def trial(folder, multiplier, seed, scores, finished=True, lr=16):
    run = folder / f"{lr}px/tuning/shared/x{multiplier}/seed-{seed}"
    development = [("before", 9, 99.0), *(("ours", 4 * k + 4, s) for k, s in enumerate(scores))]
    write(run, arms_of("shared", seed), development=development, config__data__test=20)
    if not finished:
        (run / "results.json").unlink()


TRIALS = {"1": (30.0, 32.0), "0.3333": (20.0, 21.0), "3": (33.0, 35.0)}


def test_the_chosen_multiplier_has_the_best_mean_of_last_development_scores(tmp_path):
    ours = ROWS[4]
    for m, found in TRIALS.items():
        for seed, score in enumerate(found):
            trial(tmp_path, m, seed, [80.0, score])
    base, all_of = tmp_path / "16px", (1.0, 1 / 3, 3.0)
    assert choose(base, ours, all_of, 2) == 3.0
    assert choose(base, ours, (1.0, 1 / 3), 2) == 1.0
    assert choose(base, ours, (1 / 3, 3.0), 2) is None
    (base / "tuning/shared/x3/seed-1/results.json").unlink()  # failed: out, not the mean of one
    assert choose(base, ours, all_of, 2) == 1.0
    (base / "tuning/shared/x1/seed-0/results.json").unlink()
    assert choose(base, ours, all_of, 2) is None


def test_ties_of_the_search_go_to_the_multiplier_nearest_1(tmp_path):
    for m in ("1", "0.3333", "3", "10"):
        trial(tmp_path, m, 0, [10.0 if m == "1" else 40.0])
    assert choose(tmp_path / "16px", ROWS[4], (1.0, 10.0, 3.0), 1) == 3.0
    trial(tmp_path, "1", 0, [40.0])
    assert choose(tmp_path / "16px", ROWS[4], (10.0, 3.0, 1 / 3, 1.0), 1) == 1.0


def test_tuned_numbers_come_from_the_tuned_runs_or_are_the_default_ones(tmp_path):
    comparison(tmp_path)
    for m, found in TRIALS.items():
        for seed, score in enumerate(found):
            trial(tmp_path, m, seed, [score])
    for seed in range(SEEDS - 1):
        write(tmp_path / f"16px/tuned/shared/seed-{seed}",
              {"ours": {c: hits("ours", seed, c, 0.8) for c in COLUMNS}})  # fmt: skip
    (tmp_path / "16px/tuned/shared/seed-3").mkdir()
    (tmp_path / "16px/tuned/shared/seed-3/failed.txt").write_text("killed")
    record = summary(tmp_path)
    ours = record["resolutions"]["16"]["rows"]["ours"]
    assert ours["tuning"] == {
        "chosen": 3.0,
        "multipliers": {
            "1": {"value": 31.0, "seeds": [30.0, 32.0], "failed": {}},
            "0.3333": {"value": 20.5, "seeds": [20.0, 21.0], "failed": {}},
            "3": {"value": 34.0, "seeds": [33.0, 35.0], "failed": {}},
        },
    }
    tuned = ours["tuned"]
    expected = [hits("ours", s, level=0.8).mean() - hits("none", s).mean() for s in range(3)]
    gain = tuned["cells"]["rank1"]["minus"]["none"]
    assert tuned["seeds"] == [0, 1, 2] and tuned["failed"] == {"3": "killed"}
    assert gain["value"] == pytest.approx(100 * np.mean(expected)) and gain["holm"] >= gain["p"]
    assert tuned["cells"]["rank1"]["value"] > ours["cells"]["rank1"]["value"]
    assert record["resolutions"]["16"]["rows"]["kd"]["tuned"] is None
    for seed in range(2):
        shutil.rmtree(tmp_path / f"16px/tuning/shared/x3/seed-{seed}")
    ours = summary(tmp_path)["resolutions"]["16"]["rows"]["ours"]
    assert ours["tuning"]["chosen"] == 1.0 and ours["tuned"]["seeds"] == ours["seeds"]
    assert ours["tuned"]["cells"] == ours["cells"]


def test_trials_must_equal_one_another(tmp_path):
    comparison(tmp_path)
    for m in TRIALS:
        trial(tmp_path, m, 0, [1.0])
    summary(tmp_path)  # their test people differ from the runs', with leave
    run = tmp_path / "16px/tuning/shared/x3/seed-0"
    write(run, arms_of("shared", 0), config__data__test=20, config__optim__epochs=48)
    with pytest.raises(ValueError, match=r"tuning/shared/x3/seed-0: optim\.epochs is 48, but 24"):
        summary(tmp_path)


def test_cost_is_step_times_and_counts_by_hand(tmp_path):
    comparison(tmp_path)
    steps = {"none": {"count": 100, "median_ms": 999.0}}
    write(tmp_path / "16px/none/seed-0", arms_of("none", 0), steps=steps)
    full = {"before": {"count": 50, "median_ms": 9.0}, "ours": {"count": 100, "median_ms": 9.0}}
    write(tmp_path / "16px/shared/seed-0", arms_of("shared", 0), steps=full)
    timed = {"none": {"count": 5, "median_ms": 10.0}, "before": {"count": 5, "median_ms": 8.0},
             "ours": {"count": 5, "median_ms": 12.0}}  # fmt: skip
    write(tmp_path / "16px/timing/shared", {}, steps=timed)
    write(tmp_path / "16px/timing/none", {}, steps={"none": {"count": 5, "median_ms": 4.0}})
    rows = summary(tmp_path)["resolutions"]["16"]["rows"]
    # step 12 / 10; whole (50 x 8 + 100 x 12) / (100 x 10)
    assert rows["ours"]["cost"] == {"step": pytest.approx(1.2), "whole": pytest.approx(1.6)}
    assert rows["kd"]["cost"] is None and rows["teacher, HR"]["cost"] is None
    assert rows["ours: part"]["cost"] is None  # not in the timing run


def test_curves_and_histograms_are_of_seed_0(tmp_path):
    comparison(tmp_path)
    rng = np.random.default_rng(0)
    same = rng.random(500) < 0.5
    cosines = np.where(same, 0.6, 0.1) + rng.normal(0, 0.2, 500)
    cosines = np.minimum(cosines, 1 + 1e-6).astype(np.float32)
    write(tmp_path / "16px/kd/seed-0", arms_of("kd", 0), scores=(same, cosines, 0.37),
          development=[("kd", 4, 20.0), ("other", 6, 1.0), ("kd", 8, 25.0)])  # fmt: skip
    again = row("kd: again", "component", job="kd", arm="kd")  # the same network, another row
    record = summary(tmp_path, rows=[*ROWS, again])
    assert record["curves"]["16"] == {"kd": {"seed": 0, "epochs": [4, 8], "rank1": [20.0, 25.0]}}
    assert list(record["histograms"]["16"]) == ["kd", "kd: again"]
    shown = record["histograms"]["16"]["kd"]
    assert len(shown["edges"]) == 61 and shown["edges"][::30] == [-1, 0, 1]
    assert shown["threshold"] == 0.37
    for kind, chosen in (("same", same), ("different", ~same)):
        counts = [0] * 60
        for x in cosines[chosen]:
            counts[min(59, int((float(x) + 1) * 30))] += 1
        expected = np.array(counts) / chosen.sum() * 30
        assert shown[kind] == pytest.approx(expected, abs=1e-4)


def test_the_record_is_that_of_an_uninterrupted_comparison(done, tmp_path, record):
    """Killed halfway, reported on, and gone on with in another order."""
    comparison(tmp_path, seeds=2)
    (tmp_path / "16px/kd/seed-2").mkdir()
    (tmp_path / "16px/kd/seed-2/failed.txt").write_text("killed")
    (tmp_path / "16px/rkd/seed-2").mkdir()
    (tmp_path / "16px/rkd/seed-2/config.json").write_text(json.dumps(config()))
    half = summary(tmp_path)
    assert half["resolutions"]["16"]["rows"]["kd"]["failed"] == {"2": "killed"}
    assert half != record
    (tmp_path / "16px/kd/seed-2/failed.txt").unlink()
    for run in sorted(Path(done).glob("16px/*/seed-[23]"), reverse=True):
        shutil.copytree(run, tmp_path / run.relative_to(done), dirs_exist_ok=True)
    assert json.dumps(summary(tmp_path)) == json.dumps(record)


def test_resolutions_stand_beside_each_other(tmp_path):
    comparison(tmp_path)
    comparison(tmp_path, lr=8)
    record = summary(tmp_path, resolutions=(8, 16))
    assert list(record["resolutions"]) == ["8", "16"] and record["equal"]["data.lr"] == [8, 16]
    assert record["equal"]["data.hr"] == 64


def test_an_empty_folder_and_damaged_files_are_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match="no finished run here, nothing to compare"):
        summary(tmp_path / "nowhere")
    comparison(tmp_path)
    for name, keep in (("results.json", 50), ("arrays.npz", 300), ("config.json", 20)):
        path = tmp_path / "16px/rkd/seed-1" / name
        whole = path.read_bytes()
        path.write_bytes(whole[:keep])
        with pytest.raises(ValueError, match=rf"rkd/seed-1/{name}: not readable[^\n]*$"):
            summary(tmp_path)
        path.write_bytes(whole)
    write(tmp_path / "16px/rkd/seed-1", {"other": {c: hits("rkd", 1, c) for c in COLUMNS}})
    with pytest.raises(ValueError, match="rkd/seed-1: results has no rank1 of rkd"):
        summary(tmp_path)

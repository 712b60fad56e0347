"""Every claim on both sides of its bar, and without the records it needs."""

import json

from lab import runs
from lab.claims import FAILS, HOLDS, UNDECIDED, UNKNOWN
from lab.records import long

import numpy as np
import pandas as pd
import pytest
from scipy import stats

import claims
import methods
import printed
from printed import ALL

KEYS = {"setting": "s", "run": "r", "variant": "", "seed": 0}
DEMO = ("Drawn characters", "MNIST (5,000)", "8x8 digits")


def frame(*rows: tuple, apart: float = 0.0) -> pd.DataFrame:
    """(table, dataset, method, metric, value) for two seeds, `apart` from each other around it: for a difference of
    two seeds the half width of the interval is 6.35 of it."""
    names = ("table", "dataset", "method", "metric", "value")
    found = []
    for r in rows:
        row = {**KEYS, **dict(zip(names, r, strict=True))}
        found += [{**row, "seed": k, "value": row["value"] + (k - 0.5) * apart} for k in (0, 1)]
    return pd.DataFrame(found, columns=long([]).columns)


def gains(table: str, datasets, method: str, other: str, value: float) -> list[tuple]:
    return [(table, d, method, f"gain over {other}", value) for d in datasets]


def over_tasks(table: str, datasets, method: str, other: str, value: float, metric: str = "") -> list[tuple]:
    """A record's mean over 50 tasks, its interval and their number."""
    metric = metric or f"gain over {other}"
    numbers = {
        metric: value,
        f"{metric} ci95": 0.1 if "gain" in metric else 0.001,
        "tasks": 50,
        f"won over {other}": 60,
    }
    return [(table, d, method, k, v) for d in datasets for k, v in numbers.items()]


def accuracies(table: str, datasets, **by_method: float) -> list[tuple]:
    names = {"no_tpm": "MOKD(no TPM)"}
    return [(table, d, names.get(m, m), "accuracy", v) for d in datasets for m, v in by_method.items()]


def cosines(ours: float, theirs: float) -> list[tuple]:
    return [("demo", d, m, "cross_cosine", v) for d in DEMO for m, v in (("MOKD", ours), ("NCC", theirs))]


def curve(best: float) -> list[tuple]:
    grid = {"0": 50, "0.5": 55, "1": 56, "2": 57, "3": 56, "4": 55, "5": best}
    return [
        ("figure-gamma", d, f"MOKD(gamma={g})", "accuracy", v) for d in ("ImageNet", "MNIST") for g, v in grid.items()
    ]


FIVE, THREE = claims.UNSEEN_2, claims.UNSEEN_REAL
CASES = {
    "1": [gains("demo", DEMO[1:], "MOKD", "NCC", v) for v in (0.8, -0.6)],
    "2": [gains("demo", DEMO[:2], "MOKD", "MOKD(gamma=0)", v) for v in (0.8, -0.6)],
    "3": [cosines(0.5 - v, 0.5) for v in (0.1, -0.1)],
    "4": [gains("random", DEMO[:1], "MOKD(lr=1,weight_decay=0)", "NCC", v) for v in (0.8, -0.6)],
    "R1": [over_tasks("real", THREE, "MOKD", "URL", v) for v in (0.8, -0.6)],
    "R2": [over_tasks("real", THREE, "MOKD", "URL", v) for v in (0.8, -0.6)],
    "R3": [over_tasks("real", THREE, claims.MOKD, claims.URL, v) for v in (0.8, -0.6)],
    "R4": [over_tasks("real", THREE, claims.MOKD, claims.URL, v) for v in (0.8, -0.6)],
    "R4b": [over_tasks("real", THREE, claims.MOKD, claims.URL, v) for v in (0.8, -0.6)],
    "R5": [over_tasks("real", THREE, claims.MOKD, claims.LINEAR, v) for v in (0.8, -0.6)],
    "R6": [over_tasks("real", THREE[2:], "MOKD", "MOKD(no TPM)", v) for v in (0.8, -0.6)],
    "R7": [over_tasks("real", THREE[1:2], "MOKD", "MOKD(gamma=0)", v) for v in (0.8, -0.6)],
    "R8": [over_tasks("real", THREE[:1], "MOKD", "NCC", v, "cross_cosine over NCC") for v in (-0.1, 0.1)],
    "R9": [over_tasks("real", THREE, "MOKD", "NCC", v) for v in (0.0, 0.4)],
    "R10": [over_tasks("real-lite2", THREE[1:], claims.MOKD, claims.URL, v) for v in (0.8, -0.6)],
    "A": [accuracies("table1", ALL, MOKD=50 + v, URL=50) for v in (0.1, -0.1)],
    "B": [accuracies("table2", FIVE, MOKD=50 + v, URL=50) for v in (0.1, -0.1)],
    "C": [accuracies("table2", ALL[:8], MOKD=50 + v, URL=50) for v in (-0.4, -0.6)],
    "D": [accuracies("table2", ALL, MOKD=50 + v, no_tpm=50) for v in (0.1, -0.1)],
    "E": [curve(55), curve(60)],
    "G": [over_tasks("omniglot", ("MNIST",), "MOKD", "URL", v) for v in (0.8, -0.6)],
    "H": [over_tasks("omniglot", ("Omniglot",), "MOKD", "NCC", v) for v in (0.8, -0.6)],
}
SETTINGS = {"R4": "5-way 5-shot", "R4b": "5-way 1-shot", "R9": "5-way 1-shot"}


def by_id(name: str):
    return next(c for c in claims.CLAIMS if c.id == name)


@pytest.mark.parametrize("claim", [c for c in claims.CLAIMS if c.id in CASES], ids=lambda c: c.id)
def test_both_sides_of_the_bar(claim):
    setting = SETTINGS.get(claim.id, claims.VARIED)

    def judged(rows) -> str:
        return claim.judge(frame(*rows).assign(setting=setting))[0]

    holds, fails = CASES[claim.id]
    assert judged(holds) == HOLDS and judged(fails) == FAILS
    several = len({r[1] for r in holds}) > 1
    # A part of the numbers is no verdict.
    assert judged([r for r in holds if r[1] != holds[-1][1]]) == UNKNOWN or not several
    assert judged([("another", *r[1:]) for r in holds]) == UNKNOWN
    if claim.scale == "real":
        assert claim.judge(frame(*holds).assign(setting="another law"))[0] == UNKNOWN


def test_one_worse_data_set_decides():
    rows = gains("demo", DEMO[1:2], "MOKD", "NCC", 5) + gains("demo", DEMO[2:], "MOKD", "NCC", -0.1)
    assert by_id("1").judge(frame(*rows))[0] == FAILS


def test_seeds_far_apart_decide_nothing():
    rows = gains("demo", DEMO[1:], "MOKD", "NCC", 0.8)
    assert [by_id("1").judge(frame(*rows, apart=a))[0] for a in (0.1, 0.2)] == [HOLDS, UNDECIDED]


def test_average_is_over_the_seeds_that_have_every_set():
    rows = frame(*accuracies("table2", FIVE, MOKD=51, URL=50))
    cut = rows[~((rows["dataset"] == FIVE[0]) & (rows["seed"] == 1))]
    assert by_id("B").judge(rows) == (HOLDS, "MOKD - URL, mean over 5 sets: +1.00 ± 0.00 points (2 seeds; above 0)")
    assert by_id("B").judge(cut)[0] == UNDECIDED  # one seed is left


def recorded(parts: list[np.ndarray]) -> pd.DataFrame:
    """The records of some seeds whose tasks have these differences, MOKD - URL on MNIST."""
    rows = []
    for seed, x in enumerate(parts):
        numbers = {"gain over URL": x.mean(), "gain over URL ci95": 1.96 * x.std() / len(x) ** 0.5, "tasks": len(x)}
        base = {**KEYS, "table": "real", "dataset": "MNIST", "method": "MOKD", "seed": seed}
        rows += [{**base, "metric": k, "value": v} for k, v in numbers.items()]
    return pd.DataFrame(rows, columns=long([]).columns)


def test_tasks_of_all_seeds_make_one_interval():
    """From the seeds' means and intervals comes what the tasks themselves give, by Student's t."""
    rng = np.random.default_rng(0)
    parts = [rng.normal(k, 1 + k, n) for k, n in enumerate((20, 30, 25))]
    mean, half, n = claims.pooled(recorded(parts), "gain over URL", table="real", dataset="MNIST", method="MOKD")
    whole = np.concatenate(parts)
    low, high = stats.t.interval(0.95, len(whole) - 1, whole.mean(), stats.sem(whole))
    assert n == 75 and mean == pytest.approx(whole.mean()) and half == pytest.approx((high - low) / 2)


def test_networks_are_judged_apart():
    """Three networks, of which one is worse: no joint interval hides it."""
    rng = np.random.default_rng(1)
    f = recorded([rng.normal(m, 1, 600) for m in (1.0, 1.0, -0.5)]).assign(table="omniglot")
    verdict, text = by_id("G").judge(f)
    assert verdict == FAILS and text.count("600 tasks") == 3 and "network 2" in text


def test_how_many_tasks_would_decide():
    assert (
        claims.Tasks("a", 0.5, 1.0, 100).text() == "a: +0.50 ± 1.00 points (100 tasks; above 0; about 400 would decide)"
    )
    assert claims.Tasks("a", 0.0, 0.05, 9, above=-0.1, below=0.1).verdict() == HOLDS
    assert claims.Tasks("a", 0.2, 0.05, 9, above=-0.1, below=0.1).verdict() == FAILS
    assert "no number" in claims.Tasks("a", 0.0, 1.0, 9).text()


def test_one_shot():
    for value, verdict in ((0.05, HOLDS), (-0.05, HOLDS), (0.3, FAILS), (-0.3, FAILS)):
        found = frame(("shots", "MNIST", "MOKD", "gain over NCC", value))
        assert by_id("F").judge(found.assign(setting="5-way 1-shot"))[0] == verdict
        assert by_id("F").judge(found.assign(setting="varied-way 5-shot"))[0] == UNKNOWN


def test_the_papers_own_gaps_stand_behind_the_claims():
    for name, told in {
        "R1": "+1.5, +2.1, +2.7",
        "A": "+1.6",
        "B": "+1.0",
        "R6": "+0.6",
        "R7": "+3.4",
        "G": "+2.1",
    }.items():
        assert f"(paper: {told}" in by_id(name).text, name


def test_printed_averages_are_recomputed_from_printed_rows():
    found = printed.averages()
    wrong = {tuple(w.partition(":")[0].split(", ")) for w in found.wrong}
    assert ("Table2", "Tri-M", "Average Seen") in wrong and ("Table2", "SSL-HSIC", "Average Unseen") in wrong
    assert not any(m == "MOKD" for _, m, _ in wrong) and found.verdict() == FAILS
    assert any("76.2 printed, 74.53 by its rows" in w for w in found.wrong)
    own = [printed.number("table2", d, "Tri-M") for d in ALL[:8]]
    assert sum(own) / 8 == pytest.approx(74.5, abs=0.05)


def test_every_claim_is_tried_here():
    assert {c.id for c in claims.CLAIMS} == {*CASES, "F", "P"}
    assert all(c.judge(long([]))[0] == UNKNOWN for c in claims.CLAIMS)
    assert all(c.explanation for c in claims.CLAIMS if c.control)


@pytest.mark.parametrize(("value", "word"), [(0.8, "beats"), (-0.8, "does not beat"), (0.01, "is not shown to beat")])
def test_bottom_line_answers_in_three_sentences(value, word):
    rows = over_tasks("real", THREE, claims.MOKD, "URL", value) + over_tasks("real", THREE, "MOKD", "URL", 1)
    rows += [r for r in over_tasks("real", THREE, claims.MOKD, "MOKD", -2) if r[3] != "tasks"]
    first, second, third = claims.bottom_line({"real": frame(*rows).assign(setting=claims.VARIED)})
    assert f"MOKD {word} URL on the mean of 3 ({value:+.2f} ± " in first and "60 % of them won" in first
    assert first.count(f"{value:+.2f} ± ") == 4 and "(paper: +2.1)" in second and third.count("-2.0 ±") == 3
    assert claims.bottom_line({"demo": long([])}) == []


def test_domains_that_differ_are_said():
    """A mean over tasks that is sure says nothing of other domains where these differ among themselves."""
    rows = [
        r for d, v in zip(THREE, (2.0, 1.0, -0.6), strict=True) for r in over_tasks("real", [d], claims.MOKD, "URL", v)
    ]
    rows += over_tasks("real", THREE, "MOKD", "URL", 1)
    rows += [r for r in over_tasks("real", THREE, claims.MOKD, "MOKD", -2) if r[3] != "tasks"]
    first = claims.bottom_line({"real": frame(*rows).assign(setting=claims.VARIED)})[0]
    assert "-0.60 ± 0.07 on CIFAR-10; with the domains as the unit that is ± 3.3" in first


def test_the_common_setting_is_the_best_of_its_grid():
    """By the committed records of the calibration: chosen on other domains than those that are reported, once for each
    method, on the same grid."""
    path = runs.HERE / "results" / "real.jsonl"
    found = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    grid = [r for r in found if r["table"] == "calibration"]
    assert grid, "the records of the calibration are committed"
    assert not {r["dataset"] for r in grid} & set(THREE) and min(r["seed"] for r in grid) >= 100
    mean: dict[str, list[float]] = {}
    for r in grid:
        mean.setdefault(r["method"], []).append(r["metrics"]["accuracy"])
    assert claims.URL == "URL" and methods.settings(methods.parse("url"), "mnist", "varied", False, {}) == {
        **{"lr": 1.0, "weight_decay": 0.0}
    }
    for chosen in (claims.MOKD, "URL(lr=1,weight_decay=0)", claims.LINEAR):
        kind = chosen.partition("(")[0]
        rivals = {m: sum(v) / len(v) for m, v in mean.items() if m.partition("(")[0] == kind}
        assert max(rivals, key=rivals.get) == chosen and len(rivals) == (4 if chosen == claims.LINEAR else 10)

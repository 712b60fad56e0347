"""Every claim on both sides of its bar, and without the records it needs."""

from lab.claims import FAILS, HOLDS, UNDECIDED, UNKNOWN
from lab.records import long

import pandas as pd
import pytest

import claims
from sets import PAPER, TITLES

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


ALL = [TITLES[n] for n in PAPER]
FIVE = claims.UNSEEN_2
CASES = {
    "1": [gains("demo", DEMO[1:], "MOKD", "NCC", v) for v in (0.8, -0.6)],
    "2": [gains("demo", DEMO[1:], "MOKD", "URL", v) for v in (0.8, -0.6)],
    "3": [accuracies("demo", DEMO, MOKD=50 + v, URL=50) for v in (0.1, -0.1)],
    "4": [gains("demo", DEMO, "MOKD", "MOKD(gamma=0)", v) for v in (0.8, -0.6)],
    "5": [accuracies("demo", DEMO, MOKD=50 + v, no_tpm=50) for v in (0.1, -0.1)],
    "6": [cosines(0.5 - v, 0.5) for v in (0.1, -0.1)],
    "7": [gains("random", DEMO[:1], "MOKD(lr=1,weight_decay=0)", "NCC", v) for v in (0.8, -0.6)],
    "A": [accuracies("table1", ALL, MOKD=50 + v, URL=50) for v in (0.1, -0.1)],
    "B": [accuracies("table2", FIVE, MOKD=50 + v, URL=50) for v in (0.1, -0.1)],
    "C": [accuracies("table2", ALL[:8], MOKD=50 + v, URL=50) for v in (-0.4, -0.6)],
    "D": [accuracies("table2", ALL, MOKD=50 + v, no_tpm=50) for v in (0.1, -0.1)],
    "E": [curve(55), curve(60)],
    "G": [gains("omniglot", ("MNIST",), "MOKD", "URL", v) for v in (0.8, -0.6)],
    "H": [gains("omniglot", ("Omniglot",), "MOKD", "NCC", v) for v in (0.8, -0.6)],
}


@pytest.mark.parametrize("claim", [c for c in claims.CLAIMS if c.id in CASES], ids=lambda c: c.id)
def test_both_sides_of_the_bar(claim):
    holds, fails = CASES[claim.id]
    assert claim.judge(frame(*holds))[0] == HOLDS
    assert claim.judge(frame(*fails))[0] == FAILS
    several = len({r[1] for r in holds}) > 1
    # A part of the numbers is no verdict.
    assert claim.judge(frame(*(r for r in holds if r[1] != holds[-1][1])))[0] == UNKNOWN or not several
    other = [("another", *r[1:]) for r in holds]
    assert claim.judge(frame(*other))[0] == UNKNOWN


def test_one_worse_data_set_decides():
    rows = gains("demo", DEMO[1:2], "MOKD", "NCC", 5) + gains("demo", DEMO[2:], "MOKD", "NCC", -0.1)
    assert claims.CLAIMS[0].judge(frame(*rows))[0] == FAILS


def test_seeds_far_apart_decide_nothing():
    rows = gains("demo", DEMO[1:], "MOKD", "NCC", 0.8)
    assert [claims.CLAIMS[0].judge(frame(*rows, apart=a))[0] for a in (0.1, 0.2)] == [HOLDS, UNDECIDED]


def test_average_is_over_the_seeds_that_have_every_set():
    rows = frame(*accuracies("demo", DEMO, MOKD=51, URL=50))
    cut = rows[~((rows["dataset"] == DEMO[0]) & (rows["seed"] == 1))]
    claim = next(c for c in claims.CLAIMS if c.id == "3")
    assert claim.judge(rows) == (HOLDS, "MOKD - URL, mean over 3 sets: +1.00 ± 0.00 points (2 seeds; above 0)")
    assert claim.judge(cut)[0] == UNDECIDED  # one seed is left


def test_one_shot():
    claim = next(c for c in claims.CLAIMS if c.id == "F")
    for value, verdict in ((0.05, HOLDS), (-0.05, HOLDS), (0.3, FAILS), (-0.3, FAILS)):
        found = frame(("shots", "MNIST", "MOKD", "gain over NCC", value))
        assert claim.judge(found.assign(setting="5-way 1-shot"))[0] == verdict
        assert claim.judge(found.assign(setting="varied-way 5-shot"))[0] == UNKNOWN


def test_every_claim_is_tried_here():
    assert {c.id for c in claims.CLAIMS} == {*CASES, "F"}
    assert all(c.judge(long([]))[0] == UNKNOWN for c in claims.CLAIMS)


def test_bottom_line_names_what_is_there():
    rows = frame(*gains("demo", DEMO, "MOKD", "MOKD(no TPM)", -1.5))
    (line,) = claims.bottom_line({"demo": rows, "paper": long([])})
    assert line.endswith(
        "by -1.5 ± 0.0 points on Drawn characters, -1.5 ± 0.0 points on MNIST (5,000), -1.5 ± 0.0 points on 8x8 digits."
    )
    assert claims.bottom_line({"demo": long([])}) == []

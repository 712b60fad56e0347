"""Each claim on both sides of its bar, and without numbers."""

from lab.records import long

import pytest

import claims
from claims import BASE, BOTH, CLEAN, DEEM, SETS


def record(method, seed=0, setting="stage 1", table="digits", dataset="digit scenes", **metrics):
    return {
        **{"table": table, "dataset": dataset, "setting": setting, "method": method, "seed": seed, "metrics": metrics},
        **{"run": "r", "data": {"variant": ""}, "seconds": 1.0, "peak_memory_mb": 1.0},
    }


BY = {c.id: c for c in claims.CLAIMS}


def verdict(name, *records):
    return BY[name].check(long(list(records)))[0]


@pytest.mark.parametrize("b, c, holds", [(0.85, 0.99, True), (0.91, 0.99, False), (0.85, 0.96, False)])
def test_feedback(b, c, holds):
    assert verdict("1", record(DEEM, csr_ratio=b), record(CLEAN, csr_ratio=c)) is holds


@pytest.mark.parametrize("gap, holds", [(5.5, True), (4.5, False), (-3.0, False)])
def test_details(gap, holds):
    rows = [record(m, s, probe_uncaptioned=v) for s in (0, 1) for m, v in ((DEEM, 30 + gap), (CLEAN, 30.0))]
    assert verdict("2", *rows) is holds


@pytest.mark.parametrize("name, stage", [("3", "stage 1"), ("3b", "stage 2")])
@pytest.mark.parametrize("pope, robust, holds", [(1, 1, True), (1, -1, False), (-1, 1, False)])
def test_answers(name, stage, pope, robust, holds):
    rows = [record(DEEM, 0, stage, POPE_accuracy=60 + pope, RobustVQA_accuracy=60 + robust),
            record(BASE, 0, stage, POPE_accuracy=60.0, RobustVQA_accuracy=60.0)]  # fmt: skip
    assert verdict(name, *rows) is holds


@pytest.mark.parametrize("ratio, holds", [(0.99, False), (1.2, True), (1.61, False)])
def test_cost(ratio, holds):
    assert verdict("4", record(DEEM, table="cost", step_ratio=ratio)) is holds


def test_always_yes():
    assert verdict("5", record(DEEM, POPE_random_always_yes=50.0)) is True
    assert (
        verdict("5", record(DEEM, POPE_random_always_yes=50.0), record(DEEM, 1, POPE_random_always_yes=50.1)) is False
    )


@pytest.mark.parametrize("name, better, worse", [("P1", DEEM, BASE), ("P2", DEEM, BOTH), ("P5", DEEM, CLEAN)])
def test_printed_orders(name, better, worse):
    def rows(gap):
        return [
            record(m, table="main", dataset=s, accuracy=v)
            for s in SETS
            for m, v in ((better, 60.0 + gap), (worse, 60.0))
        ]

    assert verdict(name, *rows(2)) is True and verdict(name, *rows(-2)) is False
    assert verdict(name, *rows(2)[:-2]) is None


def test_no_numbers_no_verdict():
    other = record("something else", x=1.0)
    assert all(c.check(long([other]))[0] is None for c in claims.CLAIMS)


def test_seeds_are_paired():
    rows = [record(DEEM, 0, probe_uncaptioned=40.0), record(CLEAN, 1, probe_uncaptioned=10.0)]
    assert verdict("2", *rows) is None

"""Each claim on both sides of its bar, and without numbers."""

from lab.claims import FAILS, HOLDS, UNDECIDED, UNKNOWN
from lab.records import long

import pytest

import claims
from claims import BASE, BOTH, CLEAN, DEEM, SETS

SPREAD = (-0.001, 0.0, 0.001)  # of three seeds


def record(method, seed=0, setting="stage 1", table="digits", dataset="digit scenes", **metrics):
    return {
        **{"table": table, "dataset": dataset, "setting": setting, "method": method, "seed": seed, "metrics": metrics},
        **{"run": "r", "data": {"variant": ""}, "seconds": 1.0, "peak_memory_mb": 1.0},
    }


BY = {c.id: c for c in claims.CLAIMS}


def verdict(name, *records):
    return BY[name].judge(long(list(records)))[0]


def seeds(method, setting="stage 1", table="digits", dataset="digit scenes", **metrics):
    """Three seeds about the given values."""
    return [
        record(method, k, setting, table, dataset, **{m: v + d for m, v in metrics.items()})
        for k, d in enumerate(SPREAD)
    ]


def known(holds):
    return HOLDS if holds else FAILS


@pytest.mark.parametrize("b, c, holds", [(0.85, 0.99, True), (0.91, 0.99, False), (0.85, 0.96, False)])
def test_feedback(b, c, holds):
    assert verdict("1", *seeds(DEEM, csr_ratio=b), *seeds(CLEAN, csr_ratio=c)) == known(holds)


@pytest.mark.parametrize("gap, holds", [(5.5, True), (4.5, False), (-3.0, False)])
def test_details(gap, holds):
    rows = [record(m, s, probe_uncaptioned=v + s * d) for s in (0, 1, 2) for m, v, d in
            ((DEEM, 30 + gap, 1.01), (CLEAN, 30.0, 1))]  # fmt: skip
    assert verdict("2", *rows) == known(holds)


def looking(text=96.0, **gains):
    return [
        *seeds(DEEM, text_accuracy=text, caption_gain=gains.get("deem", 5.0)),
        *seeds(CLEAN, caption_gain=gains.get("clean", 5.0)),
        *seeds(BASE, caption_gain=gains.get("base", 5.0)),
    ]


@pytest.mark.parametrize("changed, holds", [({}, True), ({"text": 94.0}, False), ({"deem": -1.0}, False),
                                            ({"clean": -1.0}, False), ({"base": -1.0}, False)])  # fmt: skip
def test_every_model_sees_and_reads(changed, holds):
    assert verdict("0", *looking(**changed)) == known(holds)


@pytest.mark.parametrize("name, other", [("3", BASE), ("3c", CLEAN)])
@pytest.mark.parametrize("gained", [1, -1])
def test_hallucination(name, other, gained):
    rows = [record(DEEM, k, "stage 2", POPE_accuracy=60 + gained + d) for k, d in enumerate(SPREAD)]
    rows += [record(other, k, "stage 2", POPE_accuracy=60.0) for k in range(3)]
    rows += [record(other, k, "stage 1", POPE_accuracy=90.0) for k in range(3)]  # asked after stage 2 alone
    assert verdict(name, *rows) == known(gained > 0)


@pytest.mark.parametrize("name, other", [("4", BASE), ("4c", CLEAN)])
@pytest.mark.parametrize("pairs, single, holds", [(1, 1, True), (1, -1, False), (-1, 1, False)])
def test_fine_perception(name, other, pairs, single, holds):
    rows = [record(DEEM, k, "stage 2", MMVP_accuracy=20 + pairs + d, MMVP_single_accuracy=60 + single + d)
            for k, d in enumerate(SPREAD)]  # fmt: skip
    rows += [record(other, k, "stage 2", MMVP_accuracy=20.0, MMVP_single_accuracy=60.0) for k in range(3)]
    assert verdict(name, *rows) == known(holds)


def test_answers_that_scatter_decide_nothing():
    rows = [record(DEEM, k, "stage 2", POPE_accuracy=60.0 + d) for k, d in enumerate((-5, 1, 7))]
    rows += [record(BASE, k, "stage 2", POPE_accuracy=60.0) for k in range(3)]
    assert verdict("3", *rows) == UNDECIDED


@pytest.mark.parametrize("ratio, holds", [(0.99, False), (1.2, True), (1.61, False)])
def test_cost(ratio, holds):
    assert verdict("5", *seeds(DEEM, table="cost", step_ratio=ratio)) == known(holds)


def test_one_seed_decides_nothing():
    assert verdict("5", record(DEEM, table="cost", step_ratio=1.2)) == UNDECIDED


def test_always_yes():
    """The list that is furthest from 50 % counts, of whichever variant and stage."""
    even = [
        record(m, k, POPE_random_always_yes=50.0, POPE_popular_always_yes=50.0) for m in (DEEM, BASE) for k in (0, 1)
    ]
    odd = [record(CLEAN, k, RobustVQA_A_always_yes=50.1) for k in (0, 1)]
    assert verdict("6", *even) == HOLDS and verdict("6", *even, *odd) == FAILS


@pytest.mark.parametrize("name, better, worse", [("P1", DEEM, BASE), ("P2", DEEM, BOTH), ("P5", DEEM, CLEAN)])
def test_printed_orders(name, better, worse):
    def rows(gap):
        return [
            record(m, k, table="main", dataset=s, accuracy=v)
            for s in SETS
            for k, d in enumerate(SPREAD)
            for m, v in ((better, 60.0 + gap + d), (worse, 60.0))
        ]

    assert verdict(name, *rows(2)) == HOLDS and verdict(name, *rows(-2)) == FAILS
    assert verdict(name, *(r for r in rows(2) if r["dataset"] != SETS[-1])) == UNKNOWN


def test_no_numbers_no_verdict():
    other = record("something else", x=1.0)
    assert {c.judge(long([other]))[0] for c in claims.CLAIMS} == {UNKNOWN}
    assert claims.bottom_line({"demo": long([other])}) == claims.bottom_line({}) == []


def test_seeds_are_paired():
    rows = [record(DEEM, 0, probe_uncaptioned=40.0), record(CLEAN, 1, probe_uncaptioned=10.0)]
    assert verdict("2", *rows) == UNKNOWN


def test_what_the_paper_does_not_say_is_a_control():
    assert {c.id for c in claims.CLAIMS if c.control} == {c.id for c in claims.CLAIMS if "not in" in c.source}
    assert [c.id for c in claims.CLAIMS if c.timed] == ["5"]


@pytest.mark.parametrize("deem, told", [(50.0, "tiny-POPE less accurate"), (70.0, "tiny-POPE more accurate")])
def test_the_bottom_line_is_made_from_the_records(deem, told):
    rows = [*seeds(DEEM, csr_ratio=0.5), *seeds(CLEAN, csr_ratio=1.0), *looking()]
    rows += [*seeds(DEEM, probe_uncaptioned=37.0), *seeds(CLEAN, probe_uncaptioned=28.0)]
    for method, value in ((DEEM, deem), (CLEAN, 60.0), (BASE, 57.0)):
        some = {"POPE_accuracy": value, "MMVP_accuracy": value, "MMVP_single_accuracy": value}
        rows += [record(method, k, "stage 2", **some) for k in range(3)]
    first, second = claims.bottom_line({"demo": long(rows)})
    assert "works on the image tokens" in first and told in first and "all three models look" in second
    assert "+9.0 ±" in first and all(number in second for number in ("0.50", "1.00"))
    assert f"{deem - 60:+.1f} ± 0.0" in first and f"{deem - 57:+.1f} ± 0.0" in second
    rows += seeds(DEEM, "stage 1", "digits", "more scenes", csr_ratio=2.0)
    assert "does not clearly work" in claims.bottom_line({"demo": long(rows)})[0]
    blind = [r for r in rows if "caption_gain" not in r["metrics"]] + looking(deem=-1.0)
    assert "not shown to look at pictures: DEEM." in claims.bottom_line({"demo": long(blind)})[1]

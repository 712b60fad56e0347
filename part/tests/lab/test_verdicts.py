"""Verdicts by interval: the same tests in every folder of the workspace."""

import math

from lab.claims import FAILS, HOLDS, UNDECIDED, UNKNOWN, Claim, Difference, Either, counted, interval, judged, values

import numpy as np
import pandas as pd
import pytest
from hand import frame, record
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

NUMBERS = st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=8)


@given(NUMBERS)
def test_the_interval_is_that_of_a_t_test(found):
    mean, half = interval(found)
    if np.std(found) > 1e-6:
        low, high = stats.ttest_1samp(found, 0).confidence_interval()
        assert mean - half == pytest.approx(low, abs=1e-6) and mean + half == pytest.approx(high, abs=1e-6)


@given(NUMBERS, st.floats(-1e3, 1e3))
def test_holds_exactly_if_the_opposite_does_not(found, bar):
    v = pd.Series(found)
    up, down = Difference("x", v, above=bar).verdict(), Difference("x", v, above=None, below=bar).verdict()
    assert (up == HOLDS) <= (down == FAILS) and (down == HOLDS) <= (up == FAILS)
    assert (up == UNDECIDED) == (down == UNDECIDED)


@pytest.mark.parametrize(
    "found, above, below, verdict",
    [
        ([1.0, 1.1, 0.9], 0.0, None, HOLDS),
        ([1.0, 1.1, 0.9], 1.0, None, UNDECIDED),
        ([1.0, 1.1, 0.9], 2.0, None, FAILS),
        ([1.0, 1.1, 0.9], None, 2.0, HOLDS),
        ([1.0, 1.1, 0.9], 0.0, 2.0, HOLDS),  # within
        ([1.0, 1.1, 0.9], 1.0, 2.0, UNDECIDED),
        ([3.0, 3.1, 2.9], 0.0, 2.0, FAILS),
        ([5.0], 0.0, None, UNDECIDED),  # one decides nothing
        ([], 0.0, None, UNKNOWN),
        ([0.0, 0.0], 0.0, None, FAILS),  # not above
        ([0.0, 0.0], None, 0.5, HOLDS),
    ],
)
def test_verdicts(found, above, below, verdict):
    assert Difference("x", pd.Series(found, dtype=float), above, below).verdict() == verdict


def test_the_number_of_units_that_would_decide_does_decide():
    v = pd.Series([0.5, 2.0, -0.6, 1.5])
    d = Difference("x", v)
    assert d.verdict() == UNDECIDED
    n, std = d.needed(), v.std(ddof=1)
    half = [stats.t.ppf(0.975, k - 1) * std / math.sqrt(k) for k in (n - 1, n)]
    assert half[0] >= v.mean() > half[1] and f"about {n} would decide" in d.text()
    assert Difference("x", pd.Series([1.0, -1.0])).needed() is None


def test_the_text_says_what_was_measured():
    v = pd.Series([1.0, 3.0])
    d = Difference("ours - theirs", v, above=0, unit="points", units="tasks", digits=1)
    assert d.text().startswith("ours - theirs: +2.0 ± 12.7 points (2 tasks; above 0; about ")
    level = Difference("AUC", v / 4, above=0.1, unit="%", units="tasks", digits=1).text()
    assert level.startswith("AUC: 0.5 ± 3.2 % (2 tasks; above 0.1; about ")
    assert "one decides nothing" in Difference("x", v[:1]).text() and "(1 seed;" in Difference("x", v[:1]).text()


def parts(*verdicts: str) -> list[Difference]:
    made = {HOLDS: [1.0, 1.0], FAILS: [-1.0, -1.0], UNDECIDED: [1.0], UNKNOWN: []}
    return [Difference(v, pd.Series(made[v], dtype=float)) for v in verdicts]


@pytest.mark.parametrize(
    "verdicts, every, either",
    [
        ((HOLDS, HOLDS), HOLDS, HOLDS),
        ((HOLDS, UNDECIDED), UNDECIDED, HOLDS),
        ((HOLDS, UNKNOWN), UNKNOWN, HOLDS),
        ((UNDECIDED, FAILS), FAILS, UNDECIDED),
        ((UNKNOWN, FAILS), FAILS, UNKNOWN),
        ((FAILS, FAILS), FAILS, FAILS),
        ((), UNKNOWN, FAILS),
    ],
)
def test_several_differences_make_one_verdict(verdicts, every, either):
    some = frame(record())
    assert Claim("c", "t", "s", "demo", lambda f: parts(*verdicts)).judge(some)[0] == every
    if verdicts:
        one = Either(tuple(parts(*verdicts)))
        assert one.verdict() == either and Claim("c", "t", "s", "demo", lambda f: one).judge(some)[0] == either
    assert Claim("c", "t", "s", "demo", lambda f: parts(*verdicts)).judge(frame())[0] == UNKNOWN


def test_values_are_one_a_unit():
    found = [record(seed=k, dataset=d, metrics={"f1": v}) for k, d, v in ((1, "a", 3.0), (0, "a", 1.0), (0, "b", 5.0))]
    f = frame(*found)
    assert values(f, "f1", method="m1", dataset="a").to_dict() == {0: 1.0, 1: 3.0}
    assert values(f, "f1", "dataset").to_dict() == {"a": 2.0, "b": 5.0}
    assert values(f, "f1", dataset=["a", "b"]).to_dict() == {0: 3.0, 1: 3.0}
    assert not len(values(f, "f1", method="none"))


def test_claims_are_counted_by_scale():
    made = [
        *(Claim(str(k), "t", "s", "demo", lambda f, v=v: parts(v)) for k, v in enumerate((HOLDS, FAILS, UNDECIDED))),
        Claim("P", "t", "s", "paper", lambda f: parts(HOLDS)),
        *(
            Claim(f"C{k}", "t", "ours", "demo", lambda f, v=v: parts(v), control=True)
            for k, v in enumerate((HOLDS, FAILS))
        ),
        Claim("R", "t", "ours", "real", lambda f: parts(HOLDS), control=True),
    ]
    said = judged(made, {"demo": frame(record())})
    assert [c["verdict"] for c in said] == [HOLDS, FAILS, UNDECIDED, UNKNOWN, HOLDS, FAILS, UNKNOWN]
    assert counted(said, "demo") == "1 of 3 claims hold, 1 undecided; 1 of 2 controls"
    assert counted(said, "paper") == "0 of 1 claims hold, 1 not measured" and counted(said, "smoke") == "no claim"
    assert counted(said, "real") == "0 of 1 controls hold, 1 not measured"

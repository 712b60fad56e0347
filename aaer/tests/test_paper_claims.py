"""Claims of the demo on both sides of their bars, and without their records."""

from lab.claims import FAILS, HOLDS, UNKNOWN

import pandas as pd
import pytest

import claims

CLAIMS = {c.id: c for c in claims.CLAIMS}


def frame(*rows):
    """rows: (method, metric, value), each over two seeds a little around the value."""
    base = {"table": "main", "dataset": "Photo patches", "setting": "eps=40/255"}
    return pd.DataFrame(
        [
            {**base, "method": m, "metric": k, "value": v * (1 + 1e-4 * (2 * seed - 1)), "seed": seed}
            for m, k, v in rows
            for seed in (0, 1)
        ]
    )


def base(pgd, fgsm, clean):
    return [("V-FGSM", "pgd", pgd), ("V-FGSM", "fgsm", fgsm), ("V-FGSM", "clean", clean)]


def pair(metric, ours, theirs):
    return [("V-AAER", metric, ours), ("V-FGSM", metric, theirs)]


def onset(before, at):
    return [("V-FGSM", "abnormal_before_co", before), ("V-FGSM", "abnormal_at_co", at)]


CASES = [
    ("1", base(4.9, 41.0, 40.0), HOLDS),
    ("1", base(5.1, 41.0, 40.0), FAILS),  # robust still
    ("1", base(0.1, 39.0, 40.0), FAILS),  # not overfitted to the single step
    ("2", pair("pgd", 13.5, 3.0), HOLDS),
    ("2", pair("pgd", 12.5, 3.0), FAILS),
    ("3", onset(0.1, 0.31), HOLDS),
    ("3", onset(0.1, 0.29), FAILS),
    ("4", pair("abnormal_final", 0.1, 0.2), HOLDS),
    ("4", pair("abnormal_final", 0.2, 0.1), FAILS),
    ("5", pair("train_cpu_seconds_epoch", 1.14, 1.0), HOLDS),
    ("5", pair("train_cpu_seconds_epoch", 1.16, 1.0), FAILS),
    ("6", pair("gap_final", -1.0, 1.0), HOLDS),
    ("6", pair("gap_final", 0.5, 1.0), FAILS),
    ("6", pair("gap_final", -1.0, -0.5), FAILS),
]


@pytest.mark.parametrize(("claim", "rows", "verdict"), CASES)
def test_a_claim_on_both_sides_of_its_bar(claim, rows, verdict):
    found, text = CLAIMS[claim].judge(frame(*rows))
    assert found == verdict and text
    assert CLAIMS[claim].judge(frame(*rows[1:]))[0] in (UNKNOWN, FAILS)  # its first number was not measured
    assert CLAIMS[claim].judge(frame(*rows).assign(dataset="MNIST digits")) == (UNKNOWN, "")


def test_the_bottom_line_is_made_from_records():
    rows = [*pair("pgd", 14.0, 3.0), *pair("collapsed", 0.0, 1.0)]
    (line,) = claims.bottom_line({"demo": frame(*rows)})
    assert "at 3.0 % without" in line and "on 2 of 2 seeds without it and on 0 of 2" in line
    assert claims.bottom_line({"demo": frame(*rows[:3])}) == claims.bottom_line({}) == []

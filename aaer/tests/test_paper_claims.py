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


def real(*rows):
    """rows: (method, 255 eps, metric, value), on CIFAR-10."""
    f = frame(*[(m, k, v) for m, _, k, v in rows]).assign(dataset="CIFAR-10")
    return f.assign(setting=[f"eps={at}/255" for _, at, *_ in rows for _ in (0, 1)])


def two(metric, ours, theirs, at=12, names=("V-AAER", "V-FGSM")):
    return [(names[0], at, metric, ours), (names[1], at, metric, theirs)]


PARTS = {"R4": "difference alone", "R5": "count alone"}
REAL = [
    ("R1", [("V-FGSM", 12, "pgd", 0.3), ("V-FGSM", 12, "fgsm", 60.0)], HOLDS),
    ("R1", [("V-FGSM", 12, "pgd", 5.1), ("V-FGSM", 12, "fgsm", 60.0)], FAILS),
    ("R1", [("V-FGSM", 12, "pgd", 4.0), ("V-FGSM", 12, "fgsm", 13.0)], FAILS),  # FGSM finds as much
    ("R2", [*two("pgd", 12.0, 1.0), ("V-FGSM", 12, "collapsed", 1.0), ("V-AAER", 12, "clean", 40.0)], HOLDS),
    ("R2", [*two("pgd", 10.5, 1.0), ("V-FGSM", 12, "collapsed", 1.0), ("V-AAER", 12, "clean", 40.0)], FAILS),
    # it learnt next to nothing
    ("R2", [*two("pgd", 12.0, 1.0), ("V-FGSM", 12, "collapsed", 1.0), ("V-AAER", 12, "clean", 20.0)], FAILS),
    # nothing to be rescued from
    ("R2", [*two("pgd", 12.0, 1.0), ("V-FGSM", 12, "collapsed", 0.0), ("V-AAER", 12, "clean", 40.0)], UNKNOWN),
    ("R3", [("V-FGSM", 12, "abnormal_at_co", 0.3), ("V-FGSM", 12, "abnormal_previous_co", 0.2)], HOLDS),
    ("R3", [("V-FGSM", 12, "abnormal_at_co", 0.1), ("V-FGSM", 12, "abnormal_previous_co", 0.2)], FAILS),
    *[
        (claim, two("pgd", 20.0, pgd, names=("V-AAER", f"V-AAER, {part}")), verdict)
        for claim, part in PARTS.items()
        for pgd, verdict in ((17.5, HOLDS), (18.5, FAILS))
    ],
    *[
        ("R6", two("pgd", 20.0, pgd, names=("V-AAER, count alone", "V-AAER, random examples")), verdict)
        for pgd, verdict in ((17.5, HOLDS), (18.5, FAILS))
    ],
    *[
        (
            claim,
            [*two("clean", clean, 50.0, at, names), *two("pgd", 29.5, 30.0, at, names)],
            verdict,
        )
        for claim, start, at in (("R7", "RS", 8), ("R8", "N", 8), ("R9", "RS", 16), ("R10", "N", 16))
        for names in ((f"{start}-AAER", f"{start}-FGSM"),)
        for clean, verdict in ((49.5, HOLDS), (48.5, FAILS))
    ],
    ("R11", two("pgd", 20.0, 21.5, names=("V-AAER", "PGD-2")), HOLDS),
    ("R11", two("pgd", 20.0, 22.5, names=("V-AAER", "PGD-2")), FAILS),
    ("R12", two("abnormal_final", 0.1, 0.2), HOLDS),
    ("R12", two("abnormal_final", 0.2, 0.1), FAILS),
    *[
        case
        for collapse, rescue, at in (("R13", "R14", 24), ("R15", "R16", 32))
        for names in (("RS-AAER", "RS-FGSM"),)
        for case in (
            (collapse, [("RS-FGSM", at, "pgd", 0.3), ("RS-FGSM", at, "fgsm", 60.0)], HOLDS),
            (collapse, [("RS-FGSM", at, "pgd", 5.1), ("RS-FGSM", at, "fgsm", 60.0)], FAILS),
            (
                rescue,
                [
                    *two("pgd", 12.0, 1.0, at, names),
                    ("RS-FGSM", at, "collapsed", 1.0),
                    ("RS-AAER", at, "clean", 40.0),
                ],
                HOLDS,
            ),
            (
                rescue,
                [
                    *two("pgd", 10.5, 1.0, at, names),
                    ("RS-FGSM", at, "collapsed", 1.0),
                    ("RS-AAER", at, "clean", 40.0),
                ],
                FAILS,
            ),
        )
    ],
]


@pytest.mark.parametrize(("claim", "rows", "verdict"), REAL)
def test_a_claim_of_scale_real_on_both_sides_of_its_bar(claim, rows, verdict):
    found, text = CLAIMS[claim].judge(real(*rows))
    assert found == verdict and text and CLAIMS[claim].scale == "real"
    assert CLAIMS[claim].judge(real(*rows[1:]))[0] in (UNKNOWN, FAILS)
    elsewhere = [(m, at + 1, k, v) for m, at, k, v in rows]
    assert CLAIMS[claim].judge(real(*elsewhere)) == (UNKNOWN, "")


def test_every_claim_of_scale_real_is_tried():
    assert {c for c, *_ in REAL} == {c.id for c in claims.CLAIMS if c.scale == "real"}


def test_the_bottom_line_is_made_from_records():
    rows = [*pair("pgd", 14.0, 3.0), *pair("collapsed", 0.0, 1.0)]
    (line,) = claims.bottom_line({"demo": frame(*rows)})
    assert "at 3.0 % without and 14.0 % with the regulariser, with CO in 2 of 2 and 0 of 2 runs" in line
    assert claims.bottom_line({"demo": frame(*rows[:3])}) == claims.bottom_line({}) == []
    cells = [*two("pgd", 20.0, 0.0), *two("collapsed", 0.0, 1.0), ("V-AAER, count alone", 12, "pgd", 18.0)]
    first, second, third = claims.bottom_line({"real": real(*cells), "demo": frame(*rows)})
    assert "V at 12/255: PGD accuracy ends at 0.0 % without and 20.0 % with" in first and "RS" not in first
    assert second == "The controls at V, 12/255: 18.0 % with count alone." and third == line

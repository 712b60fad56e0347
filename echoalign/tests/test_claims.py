"""Every claim on both sides of its bar, and without its records."""

from lab.claims import FAILS, HOLDS, UNDECIDED, UNKNOWN

import pandas as pd
import pytest

import claims

JUDGES = {c.id: c.judge for c in claims.CLAIMS}
D, C = claims.DIGITS, claims.CIFAR
I3, I5 = "instance 0.3", "instance 0.5"


def frame(rows):
    """rows: (table, dataset, setting, method, metric, value), each over two seeds around the value."""
    keys = ("table", "dataset", "setting", "method", "metric")
    return pd.DataFrame(
        [
            {**dict(zip(keys, r, strict=False)), "seed": k, "value": r[5] + (2 * k - 1) / 1e6}
            for r in rows
            for k in (0, 1)
        ]
    )


def edits(fits, before):
    return [
        ("main-edits", D, s, "EchoMod (exact)", m, v)
        for s in (I3, I5)
        for m, v in (("agreement_wrong", fits), ("original_agreement_wrong", before))
    ]


def auc(a, b):
    return [("main-selection", D, s, "EchoSelect", "auc", v) for s, v in ((I3, a), (I5, b))]


def retained(share, ours, other):
    place = ("main-selection", D, I3)
    return [
        (*place, "EchoSelect", "retained_99_share", share),
        (*place, "EchoSelect", "retained_99", ours),
        (*place, "small-loss", "retained_99", other),
    ]


def accuracy(dataset, **values):
    return [("main", dataset, I5, k.replace("_", "-"), "accuracy", v) for k, v in values.items()]


def shifted(modified, selected, far, near):
    place = ("main-edits", D, I5, "EchoMod (exact)")
    rows = accuracy(D, Modified_only=modified, Selected_only=selected)
    return [*rows, (*place, "frechet_modified_test", far), (*place, "frechet_mixed_test", near)]


def kept(ours, best):
    place = ("main-selection", C, I3)
    rows = [(*place, "EchoSelect", "retained_99", ours)]
    return rows + [(*place, m, "retained_99", best if m == "cleanlab" else 5) for m in claims.SELECTORS]


def compared(ours, best):
    rows = [("main", C, I5, "EchoAlign", "accuracy", ours)]
    return rows + [("main", C, I5, m, "accuracy", best if m == "ELR" else 20) for m in claims.OTHERS]


CASES = [
    ("1", edits(70.1, 4.9), True),
    ("1", edits(69.9, 4.9), False),
    ("1", edits(70.1, 5.1), False),
    ("2", auc(0.951, 0.951), True),
    ("2", auc(0.99, 0.949), False),
    ("3", retained(60.1, 121, 100), True),
    ("3", retained(59.9, 121, 100), False),
    ("3", retained(60.1, 119, 100), False),
    ("4", accuracy(D, EchoAlign=90.1, CE=80, Modified_only=90), True),
    ("4", accuracy(D, EchoAlign=89.9, CE=80, Modified_only=80), False),
    ("4", accuracy(D, EchoAlign=90.1, CE=80, Modified_only=90.2), False),
    ("5", shifted(70, 71, 1, 2), True),
    ("5", shifted(71, 70, 2, 1), True),
    ("5", shifted(71, 70, 1, 2), False),
    ("6", accuracy(D, EchoAlign=90.1) + [("main", D, I5, claims.CLEAN, "accuracy", 90.0)], True),
    ("6", accuracy(D, EchoAlign=89.9) + [("main", D, I5, claims.CLEAN, "accuracy", 90.0)], False),
    ("A", kept(181, 100), True),
    ("A", kept(179, 100), False),
    ("B", compared(80.1, 80), True),
    ("B", compared(79.9, 80), False),
    ("C", compared(87.1, 80), True),
    ("C", compared(86.9, 80), False),
]


@pytest.mark.parametrize(("claim", "rows", "holds"), CASES)
def test_a_claim_on_both_sides_of_its_bar(claim, rows, holds):
    verdict, text = JUDGES[claim](frame(rows))
    assert verdict == (HOLDS if holds else FAILS) and text
    for k in range(len(rows)) if holds and claim != "5" else ():  # any number that was not measured
        assert JUDGES[claim](frame(rows[:k] + rows[k + 1 :]))[0] == UNKNOWN


def test_every_claim_is_tried_and_other_cells_do_not_count():
    assert {c for c, *_ in CASES} == set(JUDGES)
    for claim, rows, _ in CASES:
        assert JUDGES[claim](frame([(r[0], "elsewhere", *r[2:]) for r in rows]))[0] == UNKNOWN
        assert JUDGES[claim](frame([(r[0], r[1], "pair 0.45", *r[3:]) for r in rows]))[0] == UNKNOWN


def test_a_coin_toss_is_undecided():
    rows = frame(accuracy(D, EchoAlign=90.15, CE=70, Modified_only=90))
    assert JUDGES["4"](rows)[0] == HOLDS
    rows.loc[(rows["method"] == "EchoAlign") & (rows["seed"] == 1), "value"] -= 0.25
    assert JUDGES["4"](rows)[0] == UNDECIDED

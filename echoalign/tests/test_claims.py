"""Every claim on both sides of its bar, and without its records."""

from pathlib import Path

from lab.claims import FAILS, HOLDS, UNDECIDED, UNKNOWN, interval, paired, values
from lab.records import committed, long

import pandas as pd
import pytest

import claims
import figures

HERE = Path(__file__).parents[1]
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


def people(ce=40.0, **others):
    """Scale real: CIFAR-10N worse, every method 5 above CE and 10 below the ceiling but for the ones that are named."""
    told = {**dict.fromkeys(claims.ROBUST, 45.0), "CE-clean": 55.0, "CE": ce}
    told |= {k.replace("_", "-"): v for k, v in others.items()}
    return [("main", C, "worse", m, "accuracy", v) for m, v in told.items()]


def drawn(symmetric, instance):
    told = {"symmetric 0.4": symmetric, "instance 0.4": instance, "worse": 40.0}
    return [("main", C, s, "CE", "accuracy", v) for s, v in told.items()]


def stopped(**others):
    told = {"instance 0.4": 55.1, "symmetric 0.4": 55.1, "random1": 55.1, **others}
    rows = [(s, m, v) for s, early in told.items() for m, v in ((claims.STOPPED, early), ("ELR", 55.0))]
    return [("main", C, s, m, "accuracy", v) for s, m, v in rows]


def scratch(small, end, best):
    told = (("small-loss", "accuracy", small), ("CE", "accuracy", end), ("CE", "accuracy_best", best))
    return [("scratch", C, "worse", *row) for row in told]


def selecting(**others):
    told = {**dict.fromkeys(claims.FREE, 20.0), **others}
    return [("main-selection", C, "worse", m, "retained_99_share", v) for m, v in told.items()]


def clean(n, ours, alone, filtered):
    told = {"EchoAlign": ours, claims.CLEAN: alone, claims.FILTER: filtered}
    return [("clean-images", D, n, m, "accuracy", v) for m, v in told.items()]


CASES = [
    ("H1", drawn(40.1, 40.1), True),
    ("H1", drawn(39.9, 50), False),
    ("H1", drawn(50, 39.9), False),
    ("H2", people(), True),
    *[("H2", people(**{m.replace("-", "_"): 39.9}), False) for m in claims.ROBUST],
    ("H3", people(), True),
    *[("H3", people(**{m.replace("-", "_"): 53.1}), False) for m in claims.ROBUST],
    ("H4", selecting(), True),
    *[("H4", selecting(**{m: 33.1}), False) for m in claims.FREE],
    ("H5", people(**dict.fromkeys(("JoCoR", "small-loss", "Co-teaching"), 50.1)), True),
    ("H5", people(**{"JoCoR": 50.1, "small-loss": 50.1, "Co-teaching": 49.7}), False),
    ("H6", stopped(), True),
    *[("H6", stopped(**{s: 54.9}), False) for s in ("instance 0.4", "symmetric 0.4", "random1")],
    ("H7", scratch(50.1, 45, 50), True),
    ("H7", scratch(49.9, 45, 50), False),
    ("H7", scratch(50.1, 50.2, 50), False),
    *[(f"N{n.replace(',', '')}", clean(n, 90.1, 90, 90), True) for n in ("100", "300", "1,000")],
    *[(f"N{n.replace(',', '')}", clean(n, 90.1, 90, 90.2), False) for n in ("100", "300", "1,000")],
    *[(f"N{n.replace(',', '')}", clean(n, 90.1, 90.2, 90), False) for n in ("100", "300", "1,000")],
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
    unread = {"H2": ("CE-clean",), "H3": ("CE",), "H5": ("CE", "CE-clean")}.get(claim, ())
    for k in range(len(rows)) if holds and claim != "5" else ():  # any number that was not measured
        if rows[k][3] not in unread:
            assert JUDGES[claim](frame(rows[:k] + rows[k + 1 :]))[0] == UNKNOWN


def test_every_claim_is_tried_and_other_cells_do_not_count():
    assert {c for c, *_ in CASES} == set(JUDGES)
    for claim, rows, _ in CASES:
        assert JUDGES[claim](frame([(r[0], "elsewhere", *r[2:]) for r in rows]))[0] == UNKNOWN
        assert JUDGES[claim](frame([(r[0], r[1], "pair 0.45", *r[3:]) for r in rows]))[0] == UNKNOWN


def test_the_bottom_line_says_what_was_measured():
    digits = accuracy(D, EchoAlign=96.0, CE=77) + [("main", D, I5, claims.CLEAN, "accuracy", 97.0)]
    lines = claims.bottom_line({"demo": frame(digits)})
    assert len(lines) == 1 and "+19.0" in lines[0] and "clean images explain the gain" in lines[0]
    apart = frame(digits)
    apart.loc[(apart["method"] == claims.CLEAN) & (apart["seed"] == 1), "value"] -= 3  # an interval with zero in it
    assert claims.bottom_line({"demo": apart})[0].endswith(
        "a gain beyond what those images give by themselves is not shown."
    )
    real = people(ELR=47.0) + clean("100", 90, 80, 85) + clean("1,000", 90, 95, 94)
    lines = claims.bottom_line({"demo": frame(digits), "real": frame(real)})
    assert len(lines) == 3 and "ELR, gains +7.0" in lines[1] and "lacks 8.0 ± 0.0 to true labels." in lines[1]
    stopped = [("main", C, "worse", claims.STOPPED, "accuracy", 45.0)]
    early = claims.bottom_line({"demo": frame(digits), "real": frame(real + stopped)})[1]
    assert early.endswith("; plain training of two epochs, its rate falling, gains +5.0 ± 0.0.")
    cut = [("main", C, "worse", claims.CUT, "accuracy", 42.0)]
    early = claims.bottom_line({"demo": frame(digits), "real": frame(real + stopped + cut)})[1]
    assert early.endswith("its rate falling, gains +5.0 ± 0.0, cut after two of the twenty +2.0 ± 0.0.")
    assert "+10.0 ± 0.0 and +5.0 ± 0.0 with 100, -5.0 ± 0.0 and -4.0 ± 0.0 with 1,000." in lines[2]
    lines = claims.bottom_line({"demo": frame(digits), "real": frame(real + scratch(50, 45, 52))})
    assert len(lines) == 4 and lines[2].endswith("best epoch, +5.0 ± 0.0 and -2.0 ± 0.0 points.")
    elr = [("clean-images", D, "100", "ELR", "accuracy", 93.0)]
    assert (
        "ELR, which uses none, is +3.0 ± 0.0 points against"
        in claims.bottom_line({"demo": frame(digits), "real": frame(real + elr)})[2]
    )
    assert claims.bottom_line({"real": frame(real)}) == [] == claims.bottom_line({})


def test_a_coin_toss_is_undecided():
    rows = frame(accuracy(D, EchoAlign=90.15, CE=70, Modified_only=90))
    assert JUDGES["4"](rows)[0] == HOLDS
    rows.loc[(rows["method"] == "EchoAlign") & (rows["seed"] == 1), "value"] -= 0.25
    assert JUDGES["4"](rows)[0] == UNDECIDED


def test_the_curve_over_clean_images_is_the_first_picture(tmp_path):
    place = {"table": "clean-images", "dataset": D}
    rows = [
        {**place, "setting": str(n), "method": m, "seed": k, "metrics": {"accuracy": v + k, "curve_accuracy": [v]},
         "data": {"n_pre": n}}
        for n, v in ((100, 80.0), (300, 90.0)) for m in (*figures.CLEAN, "ELR") for k in (0, 1)
    ]  # fmt: skip
    rows += [{**r, "table": "main", "setting": I5} for r in rows]
    (first, caption), *others = figures.draw(rows, tmp_path, "real")
    assert first.name == "real-clean-images.png" and "who needs how many clean images" in caption
    assert len(others) == 1 and all(p.stat().st_size > 5000 for p, _ in (*others, (first, "")))  # none of each number
    assert not [p for p, _ in figures.draw(rows[len(rows) // 2 :], tmp_path, "real") if "clean" in p.name]
    assert "means with their 95 % intervals" in others[0][1]
    one = figures.draw(
        [r for r in rows if (r["seed"], r["table"], r["data"]["n_pre"]) == (0, "main", 100)], tmp_path, "real"
    )
    assert one[0][1].endswith("last epoch; one seed each.")  # without an interval


def rows_of(text: str, start: str) -> list[list[str]]:
    """Cells of the table of `text` whose head begins with `start`, the head first."""
    lines = text[text.index(start) :].split("\n\n")[0].splitlines()
    return [[c.strip() for c in line.strip("|").split("|")] for line in lines if not line.startswith("|---")]


def test_the_readme_says_what_the_records_of_scale_real_say():
    real = long(committed(HERE, "real"))

    def gap(table, setting, a, b):
        where = {"table": table, "setting": setting}
        found = paired(*(values(real, "accuracy", method=m, **where) for m in (a, b)))
        mean, half = interval(found)
        return f"{mean:+.2f} ± {half:.2f} ({len(found)})"

    text = (HERE / "README.md").read_text().split("## What scale real says")[1].split("\n## ")[0]
    people = rows_of(text, "| under worse")[1:]
    assert len(people) == 10
    for method, over, under in people:
        assert over == gap("main", "worse", method, "CE")
        assert under == (gap("main", "worse", claims.STOPPED, method) if method != claims.STOPPED else "")
    head, *digits = rows_of(text, "| EchoAlign, by the number")
    assert len(digits) == 3
    for other, *cells in digits:
        for n, cell in zip(head[1:], cells, strict=True):
            assert cell == "—" or cell == gap("clean-images", n, "EchoAlign", other)
    assert sum(cell == "—" for _, *cells in digits for cell in cells) == 3  # ELR was run beside 100 alone

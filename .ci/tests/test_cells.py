"""What a cell of the report says: agreement, counts, the run behind it."""

import cells
import pytest
from cells import Makers, counts, kind, place, table_html


def cell(**changes):
    return {"n": 0, "runs": [], "variants": [], "expected": True, **changes}


def table(*rows, **changes):
    out = {
        **{"id": "t", "scale": "paper", "title": "T", "note": "", "unit": "%", "digits": 1, "tolerance": None},
        **{"where": {"table": "main"}, "rows": ["**A**"], "columns": ["Set"], "cells": [list(r) for r in rows]},
        **{"row_names": ["a"], "column_names": ["set"]},
    }
    return {**out, **changes}


def run(**changes):
    out = {"command": "python train.py --out x", "hours": 1.0, "seeds": 1, "needs": [], "table": "main"}
    return {**out, "makes": ["main"], "records": 0, "seconds": 0, "commits": [], "devices": [], "data": [], **changes}


def measured(value, printed=None, printed_std=None, **changes):
    numbers = {"measured": value, "n": 1, "runs": ["r1"]}
    numbers |= {} if printed is None else {"printed": printed}
    return cell(**numbers, **({} if printed_std is None else {"printed_std": printed_std}), **changes)


@pytest.mark.parametrize(
    "unit, stated, value, printed, std, is_",
    [
        ("%", None, 51.0, 50.0, None, "agree"),  # one point, not more
        ("%", None, 51.01, 50.0, None, "outside"),
        ("per cent", None, 49.0, 50.0, 0.1, "agree"),  # the larger of point and printed ±
        ("%", None, 52.0, 50.0, 2.0, "agree"),
        ("%", None, 46.9, 45.8, 1.1, "agree"),  # 46.9 - 45.8 is 1.1000000000000014
        ("points", None, 50.9, 50.0, None, "agree"),
        ("s", None, 1.05, 1.0, None, "agree"),  # 5 % elsewhere
        ("s", None, 1.06, 1.0, None, "outside"),
        ("s", None, -1.05, -1.0, None, "agree"),
        ("", None, 0.0, 0.0, None, "agree"),
        ("s", 0.5, 1.5, 1.0, None, "agree"),  # what the table states goes first
        ("%", 0.1, 50.5, 50.0, None, "outside"),
        ("%", 0.1, 50.5, 50.0, 0.5, "agree"),
    ],
)
def test_within_is_the_printed_std_or_the_tolerance(unit, stated, value, printed, std, is_):
    assert kind(table(unit=unit, tolerance=stated), measured(value, printed, std)) == is_


def test_other_kinds_of_cells():
    assert kind(table(), cell(printed=1.0)) == kind(table(), cell()) == "missing"
    assert kind(table(), measured(1.0)) == "alone"
    assert kind(table(), measured(1.0, expected=False)) == "own"  # no number of it can be printed


def test_only_the_papers_own_cells_of_the_scale_are_counted():
    row = [measured(50.0, 50.0), measured(60.0, 50.0), measured(50.0), cell(printed=1.0), cell()]
    ours = [measured(1.0, expected=False), cell(expected=False)]
    report = {"tables": [table(row), table(ours), table(row, scale="demo")]}
    assert counts(report) == {"agree": 1, "outside": 1, "alone": 1, "missing": 2, "cells": 5, "printed": 3}


def test_a_cell_shows_measured_printed_difference_variant_and_leads_to_its_run():
    makers = Makers({"runs": {}}, "paper")
    html = table_html(table([measured(51.04, 50.0, 2.0, std=0.5, variants=["paper", "half <1>"])]), makers)
    assert '<td class="agree">' in html and "<th><b>A</b></th>" in html
    assert '<a href="runs.html#paper-r1">51.0 ± 0.5</a> <small>n=1</small>' in html
    assert "<small>printed 50.0 ± 2.0 (+1.0)</small>" in html
    assert "<small>data: half &lt;1&gt;</small>" in html
    assert "data:" not in table_html(table([measured(1.0, variants=["paper", "generated", "wheel"])]), makers)
    assert "printed —" in table_html(table([measured(1.0)]), makers)
    assert "printed" not in table_html(table([measured(1.0, expected=False)]), makers)


def test_a_cell_that_was_not_run_leads_to_the_run_that_makes_it():
    runs = {
        "main-a-b-set": run(command="python train.py --method a-b --dataset set", hours=3.0),
        "main-a-set": run(command="python train.py --method a --dataset set", hours=2.0),
        "main-a-other": run(command="python train.py --method a --dataset other"),
        "wide-a-set": run(command="python train.py --method a --dataset set", makes=["wide"], table="wide"),
    }
    makers = Makers({"runs": {"paper": runs}}, "paper")
    assert 'href="runs.html#paper-main-a-set" title="main-a-set: about 2 hours"' in table_html(table([cell()]), makers)
    one = table([cell()], row_names=["A-B"])
    assert makers.of_cell(one, 0, 0) == ["main-a-b-set"]
    assert makers.of_cell(table([cell()], row_names=["quoted"]), 0, 0) == ["main-a-b-set", "main-a-set"]
    assert makers.of_cell(table([cell()], where={"table": ["none", "wide"]}), 0, 0) == ["wide-a-set"]
    assert makers.of_cell(table([cell()], where={"table": "main", "dataset": "Other"}), 0, 0) == ["main-a-other"]
    html = table_html(table([cell()], where={"table": "none"}), makers)
    assert "not run" in html and "href" not in html


def test_a_report_of_older_tables_is_read():
    old = table([cell()])
    del old["row_names"], old["column_names"]
    runs = {"main-a-set": run()}
    del runs["main-a-set"]["makes"]
    assert "#paper-main-a-set" in table_html(old, Makers({"runs": {"paper": runs}}, "paper"))


def test_a_table_without_rows_says_so():
    makers = Makers({"runs": {"paper": {"main-a": run()}}}, "paper")
    html = table_html(table(), makers)
    assert "<table" not in html and "No records" in html and "#paper-main-a" in html


def test_places_tell_scales_apart():
    assert place("demo", "A b/0.1") == "demo-a-b-0-1" != place("paper", "A b/0.1")


def test_labels_cannot_break_the_page():
    assert cells.md("<x> **b** & c") == "&lt;x&gt; <b>b</b> &amp; c"

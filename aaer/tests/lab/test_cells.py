"""Printed numbers beside measured ones, from hand-made records: the same tests in every folder of the workspace."""

import json

from lab import cells
from lab import plan as plans
from lab.cli import HERE, UserError

import pytest
from hand import HEADER, PAPER, VIEW, frame, record


@pytest.fixture
def printed(tmp_path):
    (tmp_path / "paper.csv").write_text(PAPER)
    return cells.read_printed(tmp_path / "paper.csv")


def rows_of(text: str) -> dict[str, list[str]]:
    lines = [line for line in text.splitlines() if line.startswith("|")][2:]
    return {cells[1].strip(): [c.strip() for c in cells[2:-1]] for cells in (line.split("|") for line in lines)}


def test_printed_beside_measured_with_difference(printed):
    text, measured, total = cells.render(VIEW, frame(record(), record(seed=1, metrics={"f1": 52.0})), printed)
    assert rows_of(text) == {
        "m1": ["48.00 ± 1.00 / 51.00 ± 1.00 (+3.00)", "— / not run"],
        "m2": ["40.00 / not run", "— / not run"],
    }
    assert (measured, total) == (1, 3)  # paper.csv has no m2 on d2 and "over 2 seeds" in text


def test_unknown_printed_number_is_never_filled(printed):
    text, *_ = cells.render(VIEW, frame(record(dataset="d2")), printed)
    assert rows_of(text)["m1"][1] == "— / 50.00"


def test_other_data_and_fewer_seeds_are_said(printed):
    found = [record(), record(seed=1), record(dataset="d2", data={"variant": "jpeg"})]
    assert rows_of(cells.render(VIEW, frame(*found), printed)[0])["m1"][1] == "— / 50.00 (n=1) [jpeg]"


def test_what_all_cells_share_is_said_once(printed):
    jpeg = {"data": {"variant": "jpeg"}}
    text, *_ = cells.render(VIEW, frame(record(**jpeg), record(dataset="d2", **jpeg)), printed)
    assert "measured, one seed, on jpeg.\n" in text and rows_of(text)["m1"] == [
        "48.00 ± 1.00 / 50.00 (+2.00)",
        "— / 50.00",
    ]


def test_order_labels_and_extra_rows(printed):
    view = {
        **VIEW,
        "order": {"rows": ["m2", "m1"], "columns": ["d1"]},
        "labels": {"m2": "Second"},
        "extra_rows": {"trivial": {"metric": "all", "of": "m1"}},
    }
    text, measured, total = cells.render(view, frame(record(metrics={"all": 12.345})), printed)
    assert list(rows_of(text)) == ["Second", "m1", "trivial"] and rows_of(text)["trivial"] == ["12.35"]
    assert (measured, total) == (1, 2)


def test_metrics_as_columns_and_data_numbers(printed):
    view = {**VIEW, "rows": "dataset", "columns": "metric", "printed": {"table": "none"}, "digits": 1}
    view["order"] = {"columns": ["f1", "data.n", "seconds"]}
    text, *_ = cells.render(view, frame(record(), record(seed=1)), printed)
    assert rows_of(text) == {"d1": ["50.0 ± 0.0", "7", "3600.0 ± 0.0"]}


def test_two_records_of_one_seed_are_refused(printed):
    with pytest.raises(UserError, match="more than one record a seed"):
        cells.render(VIEW, frame(record(), record()), printed)


def test_two_printed_numbers_for_a_cell_are_refused(tmp_path):
    (tmp_path / "paper.csv").write_text(PAPER + "main,d1,other,m1,f1,47,,%,again\n")
    with pytest.raises(UserError, match="2 rows for main, m1, d1"):
        cells.render(VIEW, frame(record()), cells.read_printed(tmp_path / "paper.csv"))


def test_a_table_without_records_and_printed_numbers_says_so(printed):
    text, measured, every = cells.render({**VIEW, "where": {"table": "own"}}, frame(record()), printed)
    assert "No records yet." in text and "|" not in text and (measured, every) == (0, 0)


@pytest.mark.parametrize("mark, end", [("\ufeff", "\n"), ("", "\r\n"), ("\ufeff", "\r\n")])
def test_files_of_spreadsheets_are_read(tmp_path, printed, mark, end):
    (tmp_path / "paper.csv").write_bytes((mark + PAPER.replace("\n", end)).encode())
    assert cells.read_printed(tmp_path / "paper.csv").equals(printed)


def test_a_line_of_no_table_is_named(printed, tmp_path):
    (tmp_path / "paper.csv").write_text(PAPER + "mian,d1,s,m1,f1,1,,%,x\n")
    wrong, path = cells.read_printed(tmp_path / "paper.csv"), tmp_path / "paper.csv"
    with pytest.raises(UserError, match=r"paper.csv:5: plan.yaml has no table 'mian'; use one of main"):
        cells.check_tables({"tables": [VIEW]}, wrong, path)
    cells.check_tables({"tables": [VIEW], "facts": ["mian"]}, wrong, path)
    cells.check_tables({"tables": [{**VIEW, "where": {"table": ["main"]}}]}, printed, path)
    with pytest.raises(UserError, match="no table 'main'"):  # what `printed` selects counts, not what `where` does
        cells.check_tables({"tables": [{**VIEW, "printed": {"table": "t1"}}]}, printed, path)


def test_every_line_of_this_folder_has_a_table():
    path = HERE / "paper.csv"
    cells.check_tables(plans.load_plan(), cells.read_printed(path), path)


@pytest.mark.parametrize(
    "text, words",
    [
        ("a,b\n", "paper.csv:1: the header"),
        (HEADER + "main,d1,s,m1,f1,1,,%,x\nmain,d1\n", "paper.csv:3: 2 cells"),
        (HEADER + "main,d1,s,m1,f1,abc,,%,x\n", "paper.csv:2: value 'abc'"),
        (HEADER + "main,d1,s,m1,f1,inf,,%,x\n", "paper.csv:2: value 'inf'"),
        (HEADER + "main,d1,s,m1,f1,1,nan,%,x\n", "paper.csv:2: std 'nan'"),
        (HEADER + "main,d1,s,m1,f1,1,-2,%,x\n", "paper.csv:2: std '-2'"),
        (PAPER + "main,d2,s,m1,f1,3,,%,x\n", "paper.csv:5: the same cell as line 3"),
    ],
)
def test_a_malformed_line_is_named(tmp_path, text, words):
    (tmp_path / "paper.csv").write_text(text)
    with pytest.raises(UserError, match=words.replace("(", r"\(")):
        cells.read_printed(tmp_path / "paper.csv")


def test_a_mean_row_needs_all_its_parts(printed):
    view = {**VIEW, "order": {"rows": ["m1", "m2"], "columns": ["d1"]}, "means": {"both": ["m1", "m2"]}}
    found = [record(), record(method="m2", metrics={"f1": 70.0}), record(seed=1, metrics={"f1": 90.0})]
    assert rows_of(cells.render(view, frame(*found), printed)[0])["both"] == ["— / 60.00 (n=1)"]
    assert rows_of(cells.render(view, frame(record()), printed)[0])["both"][0].endswith("not run")


def test_what_is_so_of_some_seeds_is_counted(printed):
    view = {**VIEW, "order": {"rows": ["m1"], "columns": ["d1", "d2"]}}
    data = [{"name": "d", "variant": v} for v in ("small, one class", "small", "small, one class")]
    found = [record(seed=s, data=d) for s, d in enumerate(data)]
    other = [record(seed=s, dataset="d2", data=data[1]) for s in range(3)]
    text = cells.render(view, frame(*found, *other), printed)[0]
    assert "over 3 seeds, on small." in text  # of all: in the head
    assert rows_of(text)["m1"] == ["48.00 ± 1.00 / 50.00 ± 0.00 [one class: 2 of 3] (+2.00)", "— / 50.00 ± 0.00"]


def test_a_table_can_show_intervals(printed):
    view = {**VIEW, "spread": "interval", "order": {"rows": ["m1"], "columns": ["d1"]}}
    found = frame(record(), record(seed=1, metrics={"f1": 52.0}))
    text = cells.render(view, found, printed)[0]
    assert "mean ± 95 % interval over 2 seeds" in text  # t of one degree of freedom: 12.706
    assert rows_of(text)["m1"] == ["48.00 ± 1.00 / 51.00 ± 12.71 (+3.00)"]
    assert cells.described(view, "paper", found, printed)["cells"][0][0]["std"] == pytest.approx(12.706, abs=1e-3)


def test_a_table_as_data(printed):
    view = {**VIEW, "note": "two\nlines", "order": {"rows": ["m1", "m2"], "columns": ["d1", "d2"]}}
    found = [record(), record(seed=1, metrics={"f1": 52.0})]
    out = cells.described(view, "paper", frame(*found), printed)
    assert out["rows"] == ["m1", "m2"] and out["note"] == "two lines" and out["where"] == {"table": "main"}
    assert out["unit"] == "%"  # that of paper.csv
    cell = out["cells"][0][0]
    assert cell == {
        **{"printed": 48.0, "printed_std": 1.0, "measured": 51.0, "std": 1.0, "n": 2, "runs": ["run"]},
        **{"variants": ["paper"], "expected": True},
    }
    assert out["cells"][0][1] == {"n": 0, "runs": [], "variants": [], "expected": True}  # printed number not known
    assert out["row_names"] == ["m1", "m2"] and out["column_names"] == ["d1", "d2"]
    json.dumps(out, allow_nan=False)

"""Tables, claims and RESULTS.md from hand-made records: the same tests in every folder of the workspace."""

import copy
import json
import re
import subprocess
import sys
import types

import pandas as pd
import pytest

import differences
import plan as plans
import tables
from runs import UserError
from tables import Claim

BASE = {
    "table": "main",
    "dataset": "d1",
    "setting": "s",
    "method": "m1",
    "seed": 0,
    "metrics": {"f1": 50.0, "text": "no number"},
    "settings": {},
    "data": {"name": "d1", "variant": "paper", "n": 7},
    "code": {"commit": "0123456789abcdef", "dirty": False},
    "host": {"device": "cpu", "torch": "2", "python": "3"},
    "seconds": 3600.0,
    "peak_memory_mb": 1.0,
    "scale": "paper",
}
HEADER = "table,dataset,setting,method,metric,value,std,unit,source\n"
PAPER = HEADER + "main,d1,s,m1,f1,48,1,%,Table 1\nmain,d2,s,m1,f1,,,%,unknown\nmain,d1,s,m2,f1,40,,%,Table 1\n"
VIEW = {
    "id": "main",
    "title": "Main",
    "where": {"table": "main"},
    "rows": "method",
    "columns": "dataset",
    "metric": "f1",
}


def record(**changes) -> dict:
    out = copy.deepcopy(BASE)
    for key, value in changes.items():
        out[key] = {**out[key], **value} if isinstance(out[key], dict) else value
    return out


def frame(*found: dict) -> pd.DataFrame:
    return tables.long([{**r, "run": "run"} for r in found])


@pytest.fixture
def printed(tmp_path):
    (tmp_path / "paper.csv").write_text(PAPER)
    return tables.read_printed(tmp_path / "paper.csv")


def rows_of(text: str) -> dict[str, list[str]]:
    lines = [line for line in text.splitlines() if line.startswith("|")][2:]
    return {cells[1].strip(): [c.strip() for c in cells[2:-1]] for cells in (line.split("|") for line in lines)}


def test_printed_beside_measured_with_difference(printed):
    text, measured, total = tables.render(VIEW, frame(record(), record(seed=1, metrics={"f1": 52.0})), printed)
    assert rows_of(text) == {
        "m1": ["48.00 ± 1.00 / 51.00 ± 1.00 (+3.00)", "— / not run"],
        "m2": ["40.00 / not run", "— / not run"],
    }
    assert (measured, total) == (1, 3)  # paper.csv has no m2 on d2 and "over 2 seeds" in text


def test_unknown_printed_number_is_never_filled(printed):
    text, *_ = tables.render(VIEW, frame(record(dataset="d2")), printed)
    assert rows_of(text)["m1"][1] == "— / 50.00"


def test_other_data_and_fewer_seeds_are_said(printed):
    found = [record(), record(seed=1), record(dataset="d2", data={"variant": "jpeg"})]
    assert rows_of(tables.render(VIEW, frame(*found), printed)[0])["m1"][1] == "— / 50.00 (n=1) [jpeg]"


def test_order_labels_and_extra_rows(printed):
    view = {
        **VIEW,
        "order": {"rows": ["m2", "m1"], "columns": ["d1"]},
        "labels": {"m2": "Second"},
        "extra_rows": {"trivial": {"metric": "all", "of": "m1"}},
    }
    text, measured, total = tables.render(view, frame(record(metrics={"all": 12.345})), printed)
    assert list(rows_of(text)) == ["Second", "m1", "trivial"] and rows_of(text)["trivial"] == ["12.35"]
    assert (measured, total) == (1, 2)


def test_metrics_as_columns_and_data_numbers(printed):
    view = {**VIEW, "rows": "dataset", "columns": "metric", "printed": {"table": "none"}, "digits": 1}
    view["order"] = {"columns": ["f1", "data.n", "seconds"]}
    text, *_ = tables.render(view, frame(record(), record(seed=1)), printed)
    assert rows_of(text) == {"d1": ["50.0 ± 0.0", "7", "3600.0 ± 0.0"]}


def test_two_records_of_one_seed_are_refused(printed):
    with pytest.raises(UserError, match="more than one record a seed"):
        tables.render(VIEW, frame(record(), record()), printed)


def test_two_printed_numbers_for_a_cell_are_refused(tmp_path):
    (tmp_path / "paper.csv").write_text(PAPER + "main,d1,other,m1,f1,47,,%,again\n")
    with pytest.raises(UserError, match="2 rows for main, m1, d1"):
        tables.render(VIEW, frame(record()), tables.read_printed(tmp_path / "paper.csv"))


def test_a_table_without_records_and_printed_numbers_says_so(printed):
    text, measured, every = tables.render({**VIEW, "where": {"table": "own"}}, frame(record()), printed)
    assert "No records yet." in text and "|" not in text and (measured, every) == (0, 0)


@pytest.mark.parametrize("mark, end", [("\ufeff", "\n"), ("", "\r\n"), ("\ufeff", "\r\n")])
def test_files_of_spreadsheets_are_read(tmp_path, printed, mark, end):
    (tmp_path / "paper.csv").write_bytes((mark + PAPER.replace("\n", end)).encode())
    assert tables.read_printed(tmp_path / "paper.csv").equals(printed)


def test_a_line_of_no_table_is_named(printed, tmp_path):
    (tmp_path / "paper.csv").write_text(PAPER + "mian,d1,s,m1,f1,1,,%,x\n")
    wrong, path = tables.read_printed(tmp_path / "paper.csv"), tmp_path / "paper.csv"
    with pytest.raises(UserError, match=r"paper.csv:5: plan.yaml has no table 'mian'; use one of main"):
        tables.check_tables({"tables": [VIEW]}, wrong, path)
    tables.check_tables({"tables": [VIEW], "facts": ["mian"]}, wrong, path)
    tables.check_tables({"tables": [{**VIEW, "where": {"table": ["main"]}}]}, printed, path)
    with pytest.raises(UserError, match="no table 'main'"):  # what `printed` selects counts, not what `where` does
        tables.check_tables({"tables": [{**VIEW, "printed": {"table": "t1"}}]}, printed, path)


def test_every_line_of_this_folder_has_a_table():
    path = tables.HERE / "paper.csv"
    tables.check_tables(plans.load_plan(), tables.read_printed(path), path)


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
        tables.read_printed(tmp_path / "paper.csv")


def test_claims_are_counted_by_scale_and_verdict():
    claims = [Claim(str(k), "text", "Eq. 1", s, lambda f, v=v: (v, "1 > 0")) for k, (s, v) in enumerate(
        [("demo", True), ("demo", False), ("demo", None), ("paper", True)]
    )]  # fmt: skip
    rows, score, said = tables.claim_rows(claims, {"demo": frame(record())})
    assert [c["verdict"] for c in said][:3] == ["holds", "does not hold", "not measured"]
    assert score["demo"] == [1, 3] and score["paper"] == [0, 1]
    for row, word in zip(rows, ["**holds**", "**does not hold**", "not measured", "not measured"], strict=True):
        assert row.endswith(f"| {word} |")


# ------------------------------------------------------------------------------------------------------------ the page


@pytest.fixture
def root(tmp_path, monkeypatch):
    folder = tmp_path / "folder"
    run = folder / "runs" / "paper" / "main-m1"
    run.mkdir(parents=True)
    (run / "records.jsonl").write_text(json.dumps(record()) + "\n")
    (folder / "paper.csv").write_text(PAPER)
    (folder / "plan.yaml").write_text(
        "title: T\nsummary: S\nscales: {}\ntables:\n  - {id: main, title: Main, where: {table: main}, rows: method,"
        " columns: dataset, metric: f1}\n"
    )
    claim = Claim("A", "f1 is 50", "Table 1", "paper", lambda f: (bool((f[f.metric == "f1"].value == 50).all()), "50"))
    monkeypatch.setitem(sys.modules, "claims", types.SimpleNamespace(CLAIMS=[claim]))
    monkeypatch.setitem(sys.modules, "figures", types.SimpleNamespace(draw=lambda found, root, scale: []))
    return folder


def test_page_collects_counts_and_is_the_same_twice(root):
    tables.collect(root)
    assert (root / "results" / "main-m1.jsonl").is_file()
    summary = tables.page(root, "paper")
    assert summary == {
        **{"folder": "folder", "scale": "paper", "records": 1, "claims_held": 1, "claims_total": 1},
        **{"cells_measured": 1, "cells_total": 3, "results": "folder/RESULTS.md"},
    }
    text = (root / "RESULTS.md").read_text()
    assert "| A | f1 is 50 (Table 1) | paper | 50 | **holds** |" in text and "0123456789" in text
    tables.collect(root)
    tables.page(root, "paper")
    assert (root / "RESULTS.md").read_text() == text


def test_a_page_without_demo_records_says_what_it_loses(root, capsys):
    tables.collect(root)
    tables.page(root, "paper")
    assert "no records of scale demo here" in capsys.readouterr().err


def test_smoke_page_stays_among_the_runs(root):
    run = root / "runs" / "smoke" / "x" / "seed0"
    run.mkdir(parents=True)
    (run / "record.json").write_text(json.dumps(record(scale="smoke")))
    assert tables.page(root, "smoke")["results"] == "folder/runs/smoke/RESULTS.md"
    assert not (root / "RESULTS.md").exists()


def test_runs_by_hand_stay_out_of_the_tables(root):
    """A run that is not in the plan neither counts nor collides with the planned one of the same cell."""
    text = (root / "plan.yaml").read_text()
    entry = "[{name: main-m1, seeds: [0]}]"
    (root / "plan.yaml").write_text(text.replace("scales: {}", f"scales: {{demo: {entry}, paper: {entry}}}"))
    for scale in ("demo", "paper"):
        for name in ("main-m1", "mine"):
            seed = root / "runs" / scale / name / "seed0"
            seed.mkdir(parents=True)
            (seed / "record.json").write_text(json.dumps(record(scale=scale)))
            (seed.parent / "records.jsonl").write_text(json.dumps(record(scale=scale)) + "\n")
    tables.collect(root)
    assert [p.name for p in (root / "results").iterdir()] == ["main-m1.jsonl"]
    assert tables.page(root, "demo")["records"] == tables.page(root, "paper")["records"] == 1


def test_a_record_of_another_scale_or_a_broken_line_is_refused(root):
    tables.collect(root)
    target = root / "results" / "main-m1.jsonl"
    target.write_text(json.dumps(record(scale="demo")) + "\n")
    with pytest.raises(UserError, match="scale demo among those of scale paper"):
        tables.page(root, "paper")
    target.write_text(json.dumps(record()) + '\n{"table": \n')
    with pytest.raises(UserError, match="main-m1.jsonl:2"):
        tables.page(root, "paper")
    assert not (root / "RESULTS.md").exists()


def test_a_mean_row_needs_all_its_parts(printed):
    view = {**VIEW, "order": {"rows": ["m1", "m2"], "columns": ["d1"]}, "means": {"both": ["m1", "m2"]}}
    found = [record(), record(method="m2", metrics={"f1": 70.0}), record(seed=1, metrics={"f1": 90.0})]
    assert rows_of(tables.render(view, frame(*found), printed)[0])["both"] == ["— / 60.00 (n=1)"]
    assert rows_of(tables.render(view, frame(record()), printed)[0])["both"][0].endswith("not run")


def test_a_table_as_data(printed):
    view = {**VIEW, "note": "two\nlines", "order": {"rows": ["m1", "m2"], "columns": ["d1", "d2"]}}
    found = [record(), record(seed=1, metrics={"f1": 52.0})]
    out = tables.described(view, "paper", frame(*found), printed)
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


def test_planned_runs_as_data():
    entry = {
        "name": "a-{k}",
        "grid": {"k": [1, 2]},
        "args": {"table": "main"},
        "seeds": [0],
        "needs": ["d"],
        "hours": 2,
    }
    plan = {"scales": {"paper": [entry]}, "data": {"d": {"path": "p", "origin": "o"}}}
    out = tables.described_runs(plan, "paper", [{**record(), "run": "a-1"}])
    assert out["a-1"]["records"] == 1 and out["a-2"]["records"] == 0 and out["a-2"]["hours"] == 2
    assert "train.py" in out["a-1"]["command"] and "--k 1" in out["a-1"]["command"]
    assert out["a-1"]["needs"] == [{"path": "p", "origin": "o"}] and out["a-1"]["table"] == "main"
    assert out["a-1"]["makes"] == ["main"]
    entry["makes"] = ["{table}", "own-{k}"]
    assert tables.described_runs(plan, "paper", [])["a-2"]["makes"] == ["main", "own-2"]
    assert tables.described_runs(plan, "demo", []) == {}


def test_the_plan_says_what_runs_what_is_done_and_what_is_left_out(tmp_path, monkeypatch, capsys):
    common = {"grid": {"k": [1, 2]}, "seeds": [0, 1], "hours": 2, "gb": 0.5}
    entries = [{"name": f"{n}{{k}}", "needs": needs, **common} for n, needs in (("a", []), ("b", ["d"]), ("c", ["e"]))]
    data = {"d": {"path": "here", "origin": "o", "gb": 3}, "e": {"path": "gone", "origin": "o", "gb": 4}}
    (tmp_path / "data" / "here").mkdir(parents=True)
    (tmp_path / "runs" / "paper" / "a1").mkdir(parents=True)
    (tmp_path / "runs" / "paper" / "a1" / "records.jsonl").touch()
    monkeypatch.setattr(plans, "HERE", tmp_path)
    monkeypatch.setattr(plans, "load_plan", lambda: {"scales": {"paper": entries}, "data": data})
    monkeypatch.setattr(sys, "argv", ["plan.py", "--data-dir", str(tmp_path / "data")])
    plans.main()
    out = capsys.readouterr().out
    assert re.search(r"^a1 +2 seeds +2.000 h  done$", out, re.M) and re.search(r"^b2 .* to run$", out, re.M)
    assert re.search(r"^c1 .* left out: .*gone is missing \(from o\)$", out, re.M)
    assert "6 runs, 12 records, about 12.00 hours on one device" in out
    assert "3 to run (about 6.00 hours), 1 done, 2 left out for want of data" in out
    assert re.search(r"present +d +3.00 GB", out) and re.search(r"MISSING +e +4.00 GB", out)
    assert "disk: about 6.0 GB for the runs, 4.0 GB for missing data" in out
    assert "train.py" not in out
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--only", "b*", "--commands"])
    plans.main()
    out = capsys.readouterr().out
    assert "2 runs" in out and "python train.py --out runs/paper/b1 --scale paper --seeds 0 1 --k 1" in out


def test_several_processes_of_a_run_are_launched_together_and_ask_for_as_many_gpus(tmp_path):
    words = [sys.executable, "-m", "snakemake", "-s", "Snakefile", "-n", "-p", "--forceall", "--nolock", "--cores", "1"]
    words += ["--runtime-source-cache-path", str(tmp_path), "--config", "scale=smoke"]
    for processes, gpus, launch in (
        ((), 1, ""),
        (("processes=3",), 3, "accelerate.commands.launch --num_processes 3 "),
    ):
        done = subprocess.run([*words, *processes], cwd=tables.HERE, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        lines = (done.stdout + done.stderr).splitlines()
        runs = [line for line in lines if "--out runs/smoke/" in line and (".py --out" in line)]
        trains = [line for line in runs if " train.py " in line or " eval.py " in line]
        assert trains and all(launch in line for line in trains)
        assert all(("accelerate" in line) == bool(processes) for line in trains)
        assert any(f"gpu={gpus}" in line for line in lines)


# ------------------------------------------------------------------------------------------------------- differences

FINDING = {"finding": "a", "switch": "`--m`"}


def test_the_effect_of_a_switch_is_paired_by_seed_and_data_set():
    found = [
        record(method="on", dataset="d1", seed=0, metrics={"f1": 5.0}),
        record(method="on", dataset="d1", seed=1, metrics={"f1": 7.0}),
        record(method="on", dataset="d2", seed=0, metrics={"f1": 9.0}),
        record(method="on", dataset="d3", seed=0, metrics={"f1": 99.0}),  # no partner
        record(method="off", dataset="d1", seed=0, metrics={"f1": 4.0}),
        record(method="off", dataset="d1", seed=1, metrics={"f1": 4.0}),
        record(method="off", dataset="d2", seed=0, metrics={"f1": 4.0}),
    ]
    given = {"metric": "f1", "of": {"method": "on"}, "against": {"method": "off"}}
    out = differences.effect(given, {"paper": frame(*found)})
    assert out == {"mean": 3.0, "std": 0.0, "seeds": 2, "datasets": ["d1", "d2"]}  # (1 + 5) / 2 and 3
    plan = {"differences": [{**FINDING, "effect": {**given, "unit": "points"}}, FINDING, {**FINDING, "switch": "none"}]}
    texts = [d["effect"] for d in differences.described(plan, {"paper": frame(*found)})]
    assert texts == ["+3.00 ± 0.00 points (f1, scale paper, 2 seeds, mean of 2 data sets)", "not measured", ""]
    both = record(method="on", metrics={"f1": 5.0, "f1_released": 3.5})
    two = {"metric": "f1_released", "of": {"method": "on"}, "against": {"method": "on", "metric": "f1"}}
    assert differences.effect(two, {"paper": frame(both)})["mean"] == -1.5  # two metrics of one record
    assert differences.effect(given, {"paper": frame(found[0])}) is None
    assert differences.effect(given, {}) is None
    with pytest.raises(UserError, match="more than one record a seed"):
        differences.effect({**given, "of": {}}, {"paper": frame(*found, record(table="other", method="on"))})


@pytest.mark.parametrize(
    "wrong",
    [
        "text",
        {"finding": "a"},
        {**FINDING, "x": 1},
        {**FINDING, "effect": {"metric": "f1", "of": {"seed": 1}, "against": {}}},
    ],
)
def test_a_malformed_difference_is_named_by_its_number(wrong):
    with pytest.raises(UserError, match="difference 2"):
        differences.entries({"differences": [FINDING, wrong]})


def test_every_switch_of_this_folder_exists():
    source = "\n".join(p.read_text() for p in tables.HERE.glob("*.py"))
    found = differences.entries(plans.load_plan())
    assert found, "plan.yaml says nothing of where paper and released code differ"
    for entry in found:
        for option in re.findall(r"--([a-z][a-z0-9-]*)", entry["switch"]):
            assert re.search(rf"^    {option.replace('-', '_')}: ", source, re.M), f"no option --{option}"

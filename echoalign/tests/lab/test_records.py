"""Where records lie and how they get there: the same tests in every folder of the workspace."""

import json

from lab.cli import UserError
from lab.records import committed, local, take_over

import pytest
from hand import record
from test_tables import finished, two


def test_finished_planned_runs_are_taken_over_and_others_keep_theirs(tmp_path):
    finished(tmp_path, "demo", "a", *two("demo"))
    finished(tmp_path, "demo", "b", *two("demo", method="m2"))
    finished(tmp_path, "demo", "mine", *two("demo", method="m3"))
    assert take_over(tmp_path, "demo", {"a", "b"}) == ["a", "b"]
    assert [r["run"] for r in committed(tmp_path, "demo")] == ["a", "a", "b", "b"]
    for run in ("a", "b", "mine"):
        (tmp_path / "runs" / "demo" / run / "records.jsonl").unlink()
    assert take_over(tmp_path, "demo", {"a", "b"}) == []  # nothing finished: nothing is lost
    finished(tmp_path, "demo", "c", *two("demo", method="m4"))
    assert take_over(tmp_path, "demo", {"b", "c"}) == ["c"]  # a is no longer planned
    assert [r["run"] for r in committed(tmp_path, "demo")] == ["b", "b", "c", "c"]
    text = (tmp_path / "results" / "demo.jsonl").read_text()
    take_over(tmp_path, "demo", {"b", "c"})
    assert (tmp_path / "results" / "demo.jsonl").read_text() == text


def test_scale_paper_has_a_file_a_run(tmp_path):
    for name in ("a", "b"):
        finished(tmp_path, "paper", name, *two("paper"))
    take_over(tmp_path, "paper", None)
    paths = sorted(p.name for p in (tmp_path / "results" / "paper").iterdir())
    assert paths == ["a.jsonl", "b.jsonl"] and {r["run"] for r in committed(tmp_path, "paper")} == {"a", "b"}
    take_over(tmp_path, "paper", {"a"})
    assert {r["run"] for r in committed(tmp_path, "paper")} == {"a"}


def test_runs_by_hand_do_not_count(tmp_path):
    finished(tmp_path, "demo", "a", *two("demo"))
    finished(tmp_path, "demo", "mine", *two("demo"))
    assert {r["run"] for r in local(tmp_path, "demo", {"a"})} == {"a"}
    assert {r["run"] for r in local(tmp_path, "demo", None)} == {"a", "mine"}


def test_a_record_of_another_scale_or_a_broken_line_is_named(tmp_path):
    target = tmp_path / "results" / "demo.jsonl"
    target.parent.mkdir()
    target.write_text(json.dumps({**record(scale="paper"), "run": "a"}) + "\n")
    with pytest.raises(UserError, match="run a: a record of scale paper among those of scale demo"):
        committed(tmp_path, "demo")
    target.write_text(json.dumps({**record(scale="demo"), "run": "a"}) + '\n{"table": \n')
    with pytest.raises(UserError, match="demo.jsonl:2"):
        committed(tmp_path, "demo")
    finished(tmp_path, "demo", "a", *two("paper"))
    with pytest.raises(UserError, match="scale paper among those of scale demo"):
        take_over(tmp_path, "demo", None)

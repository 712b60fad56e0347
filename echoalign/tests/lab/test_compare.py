"""A reproduction beside the committed records: the same tests in every folder of the workspace."""

import json
import sys
import types

from lab import compare
from lab.claims import Claim, Difference, values
from lab.compare import line, numbers, overlap
from lab.records import take_over

import pytest
from hand import PAPER, record
from test_tables import finished


def records(*found: float, run: str = "a", **metrics: float) -> list[dict]:
    return [{**record(seed=k, metrics={"f1": v, **metrics}), "run": run} for k, v in enumerate(found)]


def said(verdict: str, timed: bool = False) -> list[dict]:
    return [{"id": "1", "verdict": verdict, "timed": timed}]


def test_equal_numbers_and_times_left_out():
    ours = records(50.0, 51.0, train_seconds_epoch=3.0)
    theirs = records(50.0, 51.0 * (1 + 1e-8), train_seconds_epoch=1.0)
    c = compare.compare(ours, theirs, said("holds"), said("holds"))
    assert line(c) == "verdicts 1 of 1 as committed; 2 of 2 numbers equal, 1 of 1 means within their intervals"
    assert not c.flipped and not c.largest and all("seconds" not in str(k) for k in numbers(ours))


def test_a_metric_that_a_clock_decides_is_left_out_where_the_plan_names_it():
    ours, theirs = records(50.0, auc=0.5), records(50.0, auc=0.7)
    assert compare.compare(ours, theirs, [], []).numbers == 2
    c = compare.compare(ours, theirs, [], [], ("auc",))
    assert (c.numbers, c.equal) == (1, 1)


def test_other_numbers_are_named_the_largest_first():
    c = compare.compare(records(50.0, 55.0), records(50.5, 54.0), said("undecided"), said("holds"))
    assert (c.equal, c.numbers, c.within, c.means) == (0, 2, 1, 1)
    assert [text.split(" / ")[0] for text in c.largest] == ["a, seed 1, main", "a, seed 0, main"]
    assert c.changed == ["1: undecided, committed holds"] and not c.flipped and c.kept == 0


def test_seeds_in_runs_of_their_own_make_one_mean():
    def apart(*found: float) -> list[dict]:
        return [{**r, "run": f"seed{r['seed']}"} for r in records(*found)]

    c = compare.compare(apart(50.0, 55.0), apart(50.5, 54.0), [], [])
    assert (c.numbers, c.means, c.within) == (2, 1, 1)


def test_only_verdicts_that_change_places_count_as_failure():
    flip = compare.compare(records(1.0), records(1.0), said("holds"), said("does not hold"))
    assert flip.flipped == ["1"]
    timed = compare.compare(records(1.0), records(1.0), said("holds", True), said("does not hold", True))
    assert not timed.flipped and timed.verdicts == 0


def test_intervals_overlap_or_not():
    assert overlap([1.0, 2.0, 3.0], [2.0, 3.0, 4.0]) and not overlap([1.0, 1.1, 1.2], [2.0, 2.1, 2.2])
    assert overlap([1.0], [1.0]) and not overlap([1.0], [1.1])  # one value has no interval


@pytest.mark.parametrize("now, code", [(50.0, 0), (-50.0, 1)])
def test_the_command_compares_what_both_have_and_its_exit_code_tells(tmp_path, monkeypatch, capsys, now, code):
    root = tmp_path / "folder"
    root.mkdir()
    (root / "paper.csv").write_text(PAPER)
    (root / "plan.yaml").write_text("title: T\nsummary: S\nscales: {}\ntables: []\n")
    claim = Claim("A", "t", "s", "demo", lambda f: Difference("f1", values(f, "f1")))
    monkeypatch.setattr(compare, "claims", types.SimpleNamespace(CLAIMS=[claim]))
    for name in ("a", "not-run-again"):
        finished(root, "demo", name, *(record(scale="demo", seed=k, metrics={"f1": 50.0 + k}) for k in (0, 1, 2)))
    take_over(root, "demo", None)
    for path in (root / "runs" / "demo" / "not-run-again").rglob("*.json"):
        path.unlink()
    for k in (0, 1, 2):
        path = root / "runs" / "demo" / "a" / f"seed{k}" / "record.json"
        path.write_text(json.dumps(record(scale="demo", seed=k, metrics={"f1": now + k})))
    monkeypatch.setattr(compare, "HERE", root)
    monkeypatch.setattr(sys, "argv", ["lab.compare"])
    if code:
        with pytest.raises(SystemExit) as stop:
            compare.main()
        assert stop.value.code == 1
    else:
        compare.main()
    out = capsys.readouterr()
    equal = 0 if code else 3
    assert f"{equal} of 3 numbers equal" in out.out.splitlines()[-1]
    assert ("changed places: claim A" in out.err) == bool(code)
    assert json.loads((root / "runs" / "demo" / "comparison.json").read_text())["flipped"] == ["A"] * code

"""RESULTS.md from hand-made records: the same tests in every folder of the workspace."""

import json
import shutil
import sys
import types

from lab import tables
from lab.claims import Claim, Difference, values
from lab.cli import UserError

import pytest
from hand import PAPER, record


def fifty(f):
    return Difference("f1", values(f, "f1", method="m1"), above=40.0)


@pytest.fixture
def root(tmp_path, monkeypatch):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "paper.csv").write_text(PAPER)
    views = ("main", "paper"), ("other", "paper"), ("small", "demo")
    (folder / "plan.yaml").write_text(
        "title: T\nsummary: S\nscales: {}\ntables:\n"
        + "".join(
            f"  - {{id: {n}, title: Table {n}, where: {{table: {n}}}, rows: method, columns: dataset, metric: f1, "
            f"scale: {s}}}\n"
            for n, s in views
        )
    )
    claims = [
        Claim("A", "f1 is above 40", "Table 1", "paper", fifty),
        Claim("d", "a | b", "Table 1", "demo", fifty, control=True, explanation="because of d"),
    ]
    monkeypatch.setattr(tables.claims, "CLAIMS", claims)
    monkeypatch.setattr(tables.claims, "bottom_line", lambda frames: ["First of all."], raising=False)

    def draw(found, target, scale):
        (target / f"{scale}-x.png").write_bytes(b"picture")
        return [(target / f"{scale}-x.png", f"A picture of {len(found)}.")]

    monkeypatch.setattr(tables, "figures", types.SimpleNamespace(draw=draw))
    return folder


def finished(root, scale: str, name: str, *found: dict) -> None:
    for r in found:
        seed = root / "runs" / scale / name / f"seed{r['seed']}"
        seed.mkdir(parents=True)
        (seed / "record.json").write_text(json.dumps(r))
    lines = "".join(json.dumps(r) + "\n" for r in found)
    (root / "runs" / scale / name / "records.jsonl").write_text(lines)


def two(scale: str, table: str = "main", **changes) -> list[dict]:
    return [record(scale=scale, table=table, seed=k, metrics={"f1": 50.0 + k}, **changes) for k in (0, 1)]


def test_recording_makes_the_page_of_all_committed_records_and_the_same_one_twice(root):
    finished(root, "paper", "main-m1", *two("paper"))
    finished(root, "demo", "small-m1", *two("demo", "small"))
    tables.record(root, "demo")
    assert "2 runs" not in tables.record(root, "paper")
    report = json.loads((root / "results" / "report.json").read_text())
    assert report["finding"] == ["First of all."]
    assert [c["explanation"] for c in report["claims"]] == ["", "because of d"]
    text = (root / "RESULTS.md").read_text()
    order = ("First of all.", "## Claims", "## Scale demo", "## Scale paper")
    assert [text.index(x) for x in order] == sorted(text.index(x) for x in order)
    assert "Scale demo: 1 of 1 controls hold, on d1, up to 2 seeds a number." in text
    assert "Of the paper's 3 cells 1 were measured" in text
    assert "| A | f1 is above 40 (Table 1) | paper | f1: 50.50 ± 6.35 (2 seeds; above 40) | **holds** |" in text
    assert "| d | Control: a \\| b | demo |" in text and "0123456789" in text
    assert "![A picture of 2.](results/figures/demo-x.png)" in text
    # A table without a measured cell is one line.
    assert "* Table other: 0 cells, 0 printed numbers in paper.csv; scale paper, no run of plan.yaml fills it" in text
    assert "### Table other" not in text and "### Table main" in text
    report = json.loads((root / "results" / "report.json").read_text())
    assert [c["verdict"] for c in report["claims"]] == ["holds", "holds"] and report["cells_measured"] == 1
    shutil.rmtree(root / "runs" / "demo")  # a fresh clone has no runs: the demo's numbers and pictures stay
    tables.record(root, "paper")
    assert (root / "RESULTS.md").read_text() == text


def test_looking_at_the_runs_here_changes_no_committed_file(root):
    finished(root, "demo", "small-m1", *two("demo", "small"))
    tables.record(root, "demo")
    before = {p: p.read_bytes() for p in root.rglob("*") if p.is_file() and "runs" not in p.parts}
    shutil.rmtree(root / "runs")
    said = tables.look(root, "demo")  # nothing was run: the page says so, RESULTS.md stays
    assert said.endswith("0 of 1 controls hold, 1 not measured, 0 records")
    finished(root, "demo", "small-m1", *two("demo", "small"))
    tables.look(root, "demo")
    assert "small" in (root / "runs" / "demo" / "RESULTS.md").read_text()
    assert "](figures/demo-x.png)" in (root / "runs" / "demo" / "RESULTS.md").read_text()
    assert {p: p.read_bytes() for p in root.rglob("*") if p.is_file() and "runs" not in p.parts} == before
    assert json.loads((root / "runs" / "demo" / "summary.json").read_text())["records"] == 2


def test_nothing_finished_is_an_error_and_smoke_is_not_kept(root):
    with pytest.raises(UserError, match="no finished planned run of scale demo"):
        tables.record(root, "demo")
    with pytest.raises(UserError, match="scale smoke are not kept"):
        tables.record(root, "smoke")
    assert not (root / "RESULTS.md").exists() and not (root / "results").exists()


def test_figures_of_a_scale_that_were_never_listed_are_drawn(root):
    finished(root, "paper", "main-m1", *two("paper"))
    tables.take_over(root, "paper", None)
    finished(root, "demo", "small-m1", *two("demo", "small"))
    tables.record(root, "demo")
    assert "results/figures/paper-x.png" in (root / "RESULTS.md").read_text()


def test_a_printed_number_is_put_in_without_a_run(root):
    finished(root, "paper", "main-m1", *two("paper"))
    finished(root, "demo", "small-m1", *two("demo", "small"))
    tables.record(root, "demo")
    tables.record(root, "paper")
    shutil.rmtree(root / "runs")
    (root / "paper.csv").write_text(PAPER.replace("main,d2,s,m1,f1,,,%,unknown", "main,d2,s,m1,f1,77,,%,Table 1"))
    assert tables.record(root, "demo").startswith("folder: 0 runs of scale demo recorded")
    text = (root / "RESULTS.md").read_text()
    assert "77.00 / not run" in text and "![A picture of 2.](results/figures/demo-x.png)" in text


def test_a_picture_that_is_no_longer_drawn_goes(root, monkeypatch):
    finished(root, "demo", "small-m1", *two("demo", "small"))
    tables.record(root, "demo")
    assert (root / "results" / "figures" / "demo-x.png").is_file()
    monkeypatch.setattr(tables.figures, "draw", lambda found, target, scale: [])
    tables.record(root, "demo")
    assert not (root / "results" / "figures" / "demo-x.png").exists()
    assert "demo-x.png" not in (root / "RESULTS.md").read_text()


def test_every_claim_of_this_folder_is_not_measured_without_records():
    sys.modules.pop("claims", None)
    import claims

    for claim in claims.CLAIMS:
        assert claim.scale in tables.SCALES and claim.judge(tables.long([])) == (tables.UNKNOWN, "")
        other = [{**record(table="no such table", dataset="no such set", scale=claim.scale), "run": "x"}]
        assert claim.judge(tables.long(other))[0] == tables.UNKNOWN
    assert len({c.id for c in claims.CLAIMS}) == len(claims.CLAIMS)


def test_records_of_code_in_no_commit_are_told_each_time(root):
    odd = [{**r, "code": {"commit": "0123456789", "dirty": True}} for r in two("demo", "small")]
    finished(root, "demo", "small-m1", *odd)
    assert tables.record(root, "demo").endswith("make them again: small-m1")
    shutil.rmtree(root / "runs")
    assert tables.record(root, "demo").endswith("make them again: small-m1")

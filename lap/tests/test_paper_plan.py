"""plan.yaml: every run is valid and has a cell of its own; that cell and every printed number is in some table."""

from collections import Counter

from lab import plan as plans
from lab import runs
from lab.cells import read_printed
from lab.claims import FAILS, HOLDS, UNDECIDED, UNKNOWN
from lab.cli import _number

import pandas as pd
import pytest

import claims
import figures
import readers
from settings import Settings

PLAN = plans.load_plan()
PRINTED = read_printed(runs.HERE / "paper.csv")
README = (runs.HERE / "README.md").read_text()


def resolved(job, scale):
    """Settings of a run, without the command line: parsing 140 of them takes long."""
    assert job.script == "train.py"
    given = {k: _number(v) if isinstance(v, str) and "/" in v else v for k, v in job.args.items()}
    s = Settings(**given, scale=scale, seeds=job.seeds)
    s.check()
    s.resolve()
    return s


@pytest.mark.parametrize("scale", PLAN["scales"])
def test_the_command_lines_say_the_same(scale):
    """One run of each kind of options."""
    kinds = {tuple(sorted(job.args)): job for job in plans.jobs(PLAN, scale)}
    for job in kinds.values():
        s = runs.parse(Settings, "", job.command(scale)[1:])
        s.check()
        s.resolve()
        s.out = ""
        want = resolved(job, scale)
        want.out = ""
        assert s == want


def shown(view, where, key):
    """Whether a table shows a cell: it is selected, and its row and column are named (or all are)."""
    order = view.get("order", {})
    axes = {view["rows"]: order.get("rows"), view["columns"]: order.get("columns")}
    picked = all(key[k] in (v if isinstance(v, list) else [v]) for k, v in where.items())
    return picked and all(names is None or key[k] in names for k, names in axes.items() if k != "metric")


@pytest.mark.parametrize("scale", PLAN["scales"])
def test_every_run_is_valid_and_has_a_cell_of_its_own(scale):
    cells = Counter()
    for job in plans.jobs(PLAN, scale):
        s = resolved(job, scale)
        cells.update((s.table, s.dataset, s.setting, s.label, seed) for seed in job.seeds)
    assert max(cells.values()) == 1


def test_a_run_by_hand_enters_no_table():
    """Otherwise it would be a second record for a cell of the demo, which uses the same data and method."""
    own = Settings().table
    for view in PLAN["tables"]:
        where = view.get("where", {})["table"]
        assert own != where and own not in where


def test_every_run_of_scale_paper_stands_in_a_table():
    views = [v for v in PLAN["tables"] if v.get("scale", "paper") == "paper"]
    for job in plans.jobs(PLAN, "paper"):
        s = resolved(job, "paper")
        title = readers.KINDS[s.dataset].title
        key = {"table": s.table, "dataset": title, "setting": s.setting, "method": s.label}
        metrics = {
            m
            for v in views
            if shown(v, v.get("where", {}), key)
            for m in ([v["metric"]] if "metric" in v else v["order"]["columns"])
        }
        assert {"clean", "pgd"} <= metrics, f"{job.name} is in no table"


def test_every_known_printed_number_is_shown_or_a_fact():
    """Facts are of other recipes and metrics, which no run of the plan can fill; README.md names each."""
    facts = set(PLAN["facts"])
    assert facts <= set(PRINTED["table"]) and all(f"`{k}`" in README for k in facts)
    hidden = []
    for row in PRINTED[PRINTED["value"].notna() & ~PRINTED["table"].isin(facts)].to_dict("records"):
        found = False
        for view in PLAN["tables"]:
            where = view.get("printed", view.get("where", {}))
            listed = view.get("order", {}).get("columns" if view["columns"] == "metric" else "rows")
            metrics = (
                listed if "metric" in (view["columns"], view["rows"]) else [where.get("metric", view.get("metric"))]
            )
            found = found or (metrics is None or row["metric"] in metrics) and shown(view, where, row)
        hidden += [] if found else [(row["table"], row["dataset"], row["setting"], row["method"], row["metric"])]
    assert not hidden, f"{len(hidden)} printed numbers in no table, the first {hidden[0]}"


def test_curves_of_all_starts_can_be_told_apart():
    """At scale paper V, R and N stand in one picture."""
    curve = {f"curve_{k}": [0.0, 1.0] for k in ("probe_pgd", "probe_fgsm")} | {"curve_norm": [[1.0], [2.0]]}
    names = [f"{start}-{kind}" for start in "VRN" for kind in ("FGSM", "LAP")]
    figure, _ = figures.course([{"method": m, "seed": 0, "metrics": curve} for m in names], "here")
    lines = figure.axes[0].get_legend_handles_labels()[0]
    assert len({(line.get_color(), line.get_linestyle()) for line in lines}) == len(names)


def test_a_claim_over_all_radii_holds_only_when_all_are_measured():
    def frame(cells):
        base = {"table": "main", "dataset": "CIFAR-10", "metric": "collapsed"}
        rows = [{**base, "setting": f"eps={r}/255", "method": m, "value": v} for r, m, v in cells]
        return pd.DataFrame([{**row, "seed": k} for row in rows for k in (0, 1)])

    claim = next(c for c in claims.CLAIMS if c.id == "C")
    some = [(8, "V-LAP", 0.0), (12, "R-LAP", 0.0)]
    verdict, text = claim.judge(frame(some))
    assert verdict == UNKNOWN and "V 8/255: 0.00 ± 0.00 (2 seeds; below 0.01)" in text
    assert claim.judge(frame([*some, (16, "N-LAP", 1.0)]))[0] == FAILS
    every = [(r, f"{k}-LAP", 0.0) for r in claims.RADII for k in "VRN"]
    assert claim.judge(frame(every))[0] == HOLDS and claim.judge(frame(every[1:]))[0] == UNKNOWN
    one = frame(every)
    one.loc[0, "value"] = 1.0
    assert claim.judge(one)[0] == UNDECIDED  # a single run of two
    assert claim.judge(frame([(8, "R-FGSM", 1.0)])) == (UNKNOWN, "")

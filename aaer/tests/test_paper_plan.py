"""plan.yaml: every run is valid, has a cell of its own, and that cell and every printed number is in some table."""

from collections import Counter

from lab import plan as plans
from lab import runs
from lab.cells import read_printed
from lab.claims import FAILS, HOLDS, UNDECIDED, UNKNOWN

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
    assert job.script == "train.py"
    s = runs.parse(Settings, "", job.command(scale)[1:])
    s.check()
    s.resolve()
    return s


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


def test_curves_of_all_starts_can_be_told_apart(tmp_path):
    """At scale paper V, RS and N stand in one picture."""
    curve = {f"curve_{k}": [0.0, 1.0] for k in ("abnormal", "gap", "e_a", "probe_pgd", "probe_fgsm")}
    names = [f"{start}-{kind}" for start in ("V", "RS", "N") for kind in ("FGSM", "AAER")]
    figure, _ = figures.course([{"method": m, "seed": 0, "metrics": curve} for m in names], "here")
    lines = figure.axes[0].get_legend_handles_labels()[0]
    assert len({(line.get_color(), line.get_linestyle()) for line in lines}) == len(names)


def test_figures_that_the_records_allow_are_drawn(tmp_path):
    curve = {f"curve_{k}": [0.0, 1.0] for k in ("abnormal", "gap", "e_a", "probe_pgd", "probe_fgsm")}
    metrics = {**curve, "clean": 40.0, "fgsm": 30.0, "pgd": 20.0, "collapsed": 0}
    place = {"table": "main", "dataset": "CIFAR-10", "setting": "eps=16/255", "seed": 0, "metrics": metrics}
    main = [{**place, "method": m} for m in ("V-FGSM", "V-AAER", "V-AAER, count alone", "PGD-2")]
    tried = [
        {
            **{**place, "table": "calibration", "seed": 100, "method": "x", "metrics": {**metrics, "pgd": pgd}},
            "settings": {"eps": eps / 255, "method": method, "lambda3": 1.5, "lr": lr},
        }
        for eps, method, lr, pgd in (
            (24, "fgsm", 0.2, 0.0),
            (24, "aaer", 0.2, 3.0),
            (24, "aaer", 0.1, 12.0),
            (32, "aaer", 0.2, 9.0),
        )
    ]
    drawn = [p.name for p, _ in figures.draw([*main, *tried], tmp_path, "real")]
    assert drawn == [
        "real-course-cifar-10-eps16-255.png",
        "real-variants-cifar-10-eps16-255.png",
        "real-map-cifar-10.png",
    ]
    assert all((tmp_path / name).stat().st_size > 5000 for name in drawn)
    figure, caption = figures.weights_map(tried, "here")
    texts = [t.get_text() for t in figure.axes[0].texts]
    assert texts == ["PGD 0, clean 40\nlr 0.2", "PGD 12, clean 40\nlr 0.1", "not run", "PGD 9, clean 40\nlr 0.2"]
    assert "seed 100" in caption
    assert [p.name for p, _ in figures.draw(main[:2], tmp_path, "real")] == ["real-course-cifar-10-eps16-255.png"]


def test_a_claim_over_all_radii_holds_only_when_all_are_measured():
    def frame(cells):
        base = {"table": "main", "dataset": "CIFAR-10", "metric": "collapsed"}
        rows = [{**base, "setting": f"eps={r}/255", "method": m, "value": v} for r, m, v in cells]
        return pd.DataFrame([{**row, "seed": k} for row in rows for k in (0, 1)])

    claim = next(c for c in claims.CLAIMS if c.id == "D")
    some = [(8, "RS-AAER", 0.0), (8, "N-AAER", 0.0), (12, "RS-AAER", 0.0)]
    verdict, text = claim.judge(frame(some))
    assert verdict == UNKNOWN and "RS-AAER 8/255: 0.00 ± 0.00 (2 seeds; below 0.01)" in text
    assert claim.judge(frame([*some, (16, "N-AAER", 1.0)]))[0] == FAILS
    every = [(r, m, 0.0) for r in claims.RADII for m in ("RS-AAER", "N-AAER")]
    assert claim.judge(frame(every))[0] == HOLDS
    one = frame(every)
    one.loc[0, "value"] = 1.0
    assert claim.judge(one)[0] == UNDECIDED  # a single run of two
    assert claim.judge(frame([(8, "RS-FGSM", 1.0)])) == (UNKNOWN, "")

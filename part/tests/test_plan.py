"""plan.yaml: every run is valid, has cells of its own, and these and every printed number are in some table; claims;
figures."""

from collections import Counter

from lab import plan as plans
from lab import runs, tables
from lab.claims import FAILS, HOLDS, UNDECIDED, UNKNOWN

import numpy as np
import pandas as pd
import pytest

import claims
import data
import figures
import settings

PLAN = plans.load_plan()
CPU = "train_cpu_seconds_epoch"
PRINTED = tables.read_printed(runs.HERE / "paper.csv")


def resolved(job, scale):
    assert job.script == "train.py"
    s = runs.parse(settings.Settings, "", job.command(scale)[1:])
    s.check_values()
    s.resolve()
    s.check_values()
    return s


def shown(view, where, key):
    """Whether a table shows a cell: it is selected, and its row and column are named (or all are)."""
    order = view.get("order", {})
    axes = {view["rows"]: order.get("rows"), view["columns"]: order.get("columns")}
    picked = all(key[k] in (v if isinstance(v, list) else [v]) for k, v in where.items())
    return picked and all(names is None or key[k] in names for k, names in axes.items() if k != "metric")


@pytest.mark.parametrize("scale", list(PLAN["scales"]))
def test_every_run_is_valid_and_has_cells_of_its_own(scale):
    cells = Counter()
    for job in plans.jobs(PLAN, scale):
        s = resolved(job, scale)
        for m in s.method:
            for seed in s.seeds:
                cells[s.table, s.dataset, s.setting, s.label(m), seed] += 1
    assert max(cells.values()) == 1


def test_a_run_by_hand_enters_no_table():
    own = settings.Settings().table
    for view in PLAN["tables"]:
        where = view.get("where", {})["table"]
        assert own != where and own not in where


def test_every_run_of_scale_paper_stands_in_a_table():
    views = [v for v in PLAN["tables"] if v.get("scale", "paper") == "paper"]
    for job in plans.jobs(PLAN, "paper"):
        s = resolved(job, "paper")
        for m in s.method:
            key = {"table": s.table, "dataset": data.KINDS[s.dataset].title, "setting": s.setting, "method": s.label(m)}
            found = [v for v in views if shown(v, v.get("where", {}), key)]
            assert found, f"{job.name}, {key['method']} is in no table"


def test_every_known_printed_number_is_shown():
    hidden = []
    for row in PRINTED[PRINTED["value"].notna()].to_dict("records"):
        found = False
        for view in PLAN["tables"]:
            where = view.get("printed", view.get("where", {}))
            axis = {view["rows"]: "rows", view["columns"]: "columns"}
            metrics = view.get("order", {}).get(axis.get("metric"))
            found = found or (metrics is None or row["metric"] in metrics) and shown(view, where, row)
        hidden += [] if found else [(row["table"], row["dataset"], row["setting"], row["method"], row["metric"])]
    assert not hidden, f"{len(hidden)} printed numbers in no table, the first {hidden[0]}"


def test_the_main_table_is_the_posters():
    main = PRINTED[PRINTED["table"] == "main"]
    assert len(main) == 108 and main["value"].notna().all() and main["std"].notna().all()
    cell = main[(main["dataset"] == "CIFAR-10") & (main["method"] == "PART (s=1)") & (main["metric"] == "natural")]
    assert cell["value"].tolist() == [83.42]


def frame(cells, table="main", dataset="Glyphs on texture", setting="eps=8/255"):
    base = {"table": table, "dataset": dataset, "setting": setting}
    rows = [
        {**base, "method": m, "metric": k, "seed": i, "value": v}
        for (m, k), vs in cells.items()
        for i, v in enumerate(vs)
    ]
    return pd.DataFrame(rows)


def verdict(claim, cells, **where):
    return next(c for c in claims.CLAIMS if c.id == claim).judge(frame(cells, **where))[0]


@pytest.mark.parametrize(
    ("claim", "holds", "fails"),
    [
        ("1", {("PART", "natural"): [92.1, 93.1], ("AT", "natural"): [91.0, 92.0]}, [91.2, 92.2]),
        ("2", {("PART", "pgd"): [68.1, 69.1], ("AT", "pgd"): [70.0, 71.0]}, [70.2, 71.2]),
        ("3", {("PART", "mask_inside"): [40.0, 41.0], ("PART", "mask_inside_shuffled"): [39.0, 40.1]}, [41.0, 42.0]),
        (
            "6",
            {("PART", "train_cpu_seconds_epoch"): [1.14, 1.14], ("AT", "train_cpu_seconds_epoch"): [1, 1]},
            [0.9, 0.9],
        ),
    ],
)
def test_claims_on_both_sides_of_the_bar(claim, holds, fails):
    assert verdict(claim, holds) == HOLDS
    first, other = holds
    assert verdict(claim, {**holds, other: fails}) == FAILS
    assert verdict(claim, {first: [1.0, 1.0]}) == UNKNOWN
    one = {k: v[:1] for k, v in holds.items()}
    assert verdict(claim, one) == UNDECIDED  # one seed has no interval
    assert verdict(claim, {first: [60.0, 120.0], other: [60.0, 60.0]}) == UNDECIDED  # seeds too far apart


@pytest.mark.parametrize(("claim", "base"), [("4", "PART shuffled"), ("5", "AT mean budget")])
def test_controls_ask_for_robustness_at_like_natural_accuracy(claim, base):
    cells = {("PART", "natural"): [90.0, 91.0], (base, "natural"): [90.4, 91.4]}
    cells |= {("PART", "pgd"): [70.0, 71.0], (base, "pgd"): [69.8, 70.8]}
    assert verdict(claim, cells) == HOLDS
    assert verdict(claim, {**cells, (base, "pgd"): [70.2, 71.2]}) == FAILS
    assert verdict(claim, {**cells, (base, "natural"): [90.6, 91.6]}) == FAILS
    cells.pop((base, "pgd"))
    assert verdict(claim, cells) == UNKNOWN


def real(**above):
    """Records of scale real: AT on the line PGD = 60 - natural / 2 at five budgets, and others above it by so much."""
    out = []
    for k, budget in enumerate((4, 5, 6, 7, 8)):
        m, setting = ("AT", "eps_low=4/255") if budget == 8 else ("AT at eps_low", f"eps_low={budget}/255")
        v = [60.0 - 2 * k, 61.0 - 2 * k]
        cells = {(m, "natural"): v, (m, "pgd"): [60 - x / 2 for x in v]}
        out.append(frame(cells, "tradeoff", "CIFAR-10", setting))
    for b in ("4", "7"):
        for m, gap in above.items():
            cells = {(m, "natural"): [57.0, 58.0], (m, "pgd"): [60 - 28.5 + gap, 60 - 29 + gap]}
            out.append(
                frame(
                    {(k[0].replace("_", " "), k[1]): v for k, v in cells.items()},
                    "tradeoff",
                    "CIFAR-10",
                    f"eps_low={b}/255",
                )
            )
    return pd.concat(out)


def test_a_method_is_judged_by_its_height_above_the_line_of_smaller_budgets():
    of = {c.id: c for c in claims.CLAIMS}
    f = real(PART=1.0, PART_shuffled=1.0, AT_mean_budget=0.0, PART_inverted=2.0)
    assert claims.above_curve(f, "PART", "4").round(9).tolist() == [1.0, 1.0]
    assert of["R1"].judge(f)[0] == HOLDS and of["R1"].judge(real(PART=-1.0))[0] == FAILS
    assert of["R2"].judge(f)[0] != HOLDS and of["R3"].judge(f)[0] == HOLDS and of["R4"].judge(f)[0] == FAILS
    assert of["R1"].judge(f[f["method"] != "AT"])[0] == UNKNOWN  # without the end of the line there is none
    assert of["R5"].judge(real(PART=4.0))[0] == HOLDS and of["R5"].judge(real(PART=-3.0))[0] == FAILS
    lines = claims.bottom_line({"real": f})
    assert len(lines) == 2 and "PART +1.00 ± 0.00, PART shuffled +1.00 ± 0.00, AT" in lines[0]


def test_a_claim_over_nine_cells_holds_only_when_all_are_measured():
    def rows(gap, sets=claims.PAPER_SETS):
        return pd.concat(
            [
                frame({(b, "natural"): [80.0, 81.0], (f"{o} (s=1)", "natural"): [80.0 + gap, 81.0 + gap]}, dataset=d)
                for d in sets
                for b, o in claims.PAIRS
            ]
        )

    claim = next(c for c in claims.CLAIMS if c.id == "A")
    assert claim.judge(rows(0.5))[0] == HOLDS and claim.judge(rows(-0.1))[0] == FAILS
    assert claim.judge(rows(0.5, ["CIFAR-10"]))[0] == UNKNOWN and claim.judge(rows(-0.5, ["SVHN"]))[0] == FAILS
    figure = {("AT low upper-left", k): [50.0, 51.0] for k in ("natural", "pgd")}
    figure |= {("AT low lower-right", k): [49.0, 50.0] for k in ("natural", "pgd")}
    assert verdict("E", figure, table="figure1") == HOLDS


def test_bottom_line_sets_the_budget_beside_its_place():
    cells = {(m, "natural"): [v, v + 1] for m, v in (("AT", 80), ("PART", 82), ("PART shuffled", 82))}
    (line,) = claims.bottom_line({"demo": frame(cells)})
    assert line.endswith("+2.00 ± 0.00 points against AT, +0.00 ± 0.00 points against PART shuffled.")
    assert claims.bottom_line({}) == []


def test_figures_are_drawn_and_arms_can_be_told_apart(tmp_path):
    g = np.random.default_rng(0)

    def pack(*shape):
        return g.integers(0, 256, shape, dtype=np.uint8).tobytes().hex()

    maps = {"cam": pack(2, 8, 8), "mask": pack(2, 8, 8), "shape": [2, 8, 8]}
    gallery = {"images": pack(2, 8, 8, 3), "shape": [2, 8, 8, 3], "epochs": [3], "maps": [maps]}
    curve = {f"curve_{k}": [1.0, None, 3.0] for k in ("probe_natural", "probe_pgd", "budget")}
    metrics = {"natural": 80.0, "pgd": 40.0, "gallery": gallery, **curve}
    base = {"table": "main", "dataset": "D", "setting": "eps=8/255", "seed": 0, "metrics": metrics}
    names = ["AT", "PART", "PART shuffled", "AT mean budget"]
    out = figures.draw([{**base, "method": m} for m in names], tmp_path, "smoke")
    assert len(out) == 3 and all(p.stat().st_size > 5000 for p, _ in out)
    figure, _ = figures.course([{**base, "method": m} for m in names], "here")
    lines = figure.axes[0].get_legend_handles_labels()[0]
    assert len({(line.get_color(), line.get_linestyle()) for line in lines}) == len(names)

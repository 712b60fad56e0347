"""Every number that a run of the plan will measure has its cell in a table, and no cell gets two."""

from lab import cells, runs
from lab import plan as plans
from lab.records import long

import pytest

import recipe
import train
from evaluation import asking
from evaluation.sets import BENCHMARKS
from settings import EvalSettings, Settings

PRINTED = cells.read_printed(runs.HERE / "paper.csv")
PLAN = plans.load_plan(runs.HERE / "plan.yaml")
# Of the rows of these tables only those with a printed number or a switch are shown.
SILENT = {"train"}


def settings_of(kind, job, seed=0):
    s = runs.parse(kind, "", job.command("paper")[1:])
    s.seeds, s.out = (seed,), ""
    return s


def records():
    """Records as train.py and eval.py would write them, each number of its own."""
    out = []

    def add(run, where, metrics):
        names = {m: 1000.0 + len(out) + k / 10 for k, m in enumerate(metrics)}
        more = {"seed": 0, "run": run, "data": {"variant": "paper"}, "seconds": 0.0, "peak_memory_mb": 0.0}
        out.append({**where, **more, "metrics": names})

    def benchmarks(run, names, table, label, e):
        for name in names:
            for one in BENCHMARKS[name]:
                metrics = {asking.HEADLINE[one.kind], "score"} | ({"meteor"} if one.kind == "region" else set())
                where = {"table": table, "dataset": one.label, "setting": asking.setting_of(e, name, "paper")}
                add(run, where | {"method": label}, sorted(metrics))

    for job in plans.jobs(PLAN, "paper"):
        if job.script == "train.py":
            given = settings_of(Settings, job)
            s = settings_of(Settings, job)
            s.check()
            s.resolve()
            chain, before = [(s, True)], s.out
            for stage in s.then:
                chain.append((train.following(given, stage, before, s.out), False))
                before = chain[-1][0].out
            for one, first in chain:
                add(job.name, train.place(one), ["step_seconds"])
                names = recipe.benchmarks_of(one.stage, one.variant, one.benchmarks, first=first)
                benchmarks(job.name, names, one.benchmark_table, train.row(one), EvalSettings())
        elif job.script == "eval.py":
            e = settings_of(EvalSettings, job)
            benchmarks(job.name, e.benchmark, e.table, e.label, e)
    return out


VIEWS = [v for v in PLAN["tables"] if v.get("scale", "paper") == "paper"]


def shown():
    frame, found = long(records()), {}
    for view in VIEWS:
        rows, columns, grid = cells.cells(view, frame, PRINTED)  # UserError: two records of a seed in one cell
        for (r, c), cell in grid.items():
            for v in cell.values["value"]:
                found.setdefault(v, []).append((view["id"], r, c))
    return found


def test_every_measured_number_stands_in_a_table():
    found = shown()
    lost = [
        (r["run"], r["table"], r["dataset"], r["method"])
        for r in records()
        if r["table"] not in SILENT and not any(v in found for v in r["metrics"].values())
    ]
    assert not lost, lost


@pytest.mark.parametrize(
    "view, row, column, run",
    [
        ("table1", "DEEM", "POPE-Random", "deem"), ("table1", "DEEM-VQA", "MMVP", "deem"),
        ("table2", "DEEM-VQA", "COCO", "deem"), ("table2", "DEEM-VQA", "VisDial", "deem"),
        ("table3", "DEEM*-VQA", "RobustVQA-A", "deem-deem-star"), ("table3-time", "DEEM", "step_seconds", "deem"),
        ("table3-time", "DEEM-VQA", "step_seconds", "deem"), ("table4", "DEEM 13B, 160K", "OKVQA", "table4-13b"),
        ("table3-time", "DEEM*-VQA", "step_seconds", "deem-deem-star"), ("table5", "LLaVA", "MMVP", "table5-llava"),
        ("table6", "DEEM-Mask", "meteor", "deem"), ("table7", "DEEM", "LN-COCO val", "deem"),
        ("table8", "DEEM-VQA, 448 px, lambda=5", "OKVQA", "table8-tuned-448"),
        ("table9", "yes or no", "RobustVQA-R", "table9-yes-no"),
        ("table10", "DEEM + MM-Interleaved", "POPE-Random", "deem-both"),
        ("table9", "choice [right, wrong]", "RobustVQA-R", "table9-choice"),
        ("released", "DEEM, as released, stage 2", "POPE-Random", "deem-official"),
        ("switches", "DEEM, maps on, squeeze 0.6", "RobustVQA-V", "switch-on-0.6"),
    ],
)  # fmt: skip
def test_numbers_stand_in_the_right_cell(view, row, column, run):
    frame = long(records())
    one = next(v for v in VIEWS if v["id"] == view)
    values = cells.cells(one, frame, PRINTED)[2][row, column].values
    assert list(values["run"]) == [run]


def test_printed_numbers_of_the_tables_are_all_shown():
    """But for averages, which are not measured, and what stands in no table of ours (figure 1, abstract, recipe)."""
    seen = {v["id"]: 0 for v in VIEWS}
    for view in VIEWS:
        grid = cells.cells(view, long([]), PRINTED)[2]
        seen[view["id"]] = sum(cell.expected for cell in grid.values())
    want = PRINTED[~PRINTED["dataset"].str.startswith("average")].groupby("table").size().to_dict()
    want["table3"] -= 4  # seconds a step, a table of its own
    want["table3-time"] = 4
    assert {k: n for k, n in seen.items() if n} == {k: want[k] for k, n in seen.items() if n}
    assert {*want} - {k for k, n in seen.items() if n} == {"table11", "llava-zoo", "figure1", "abstract", "section1"}

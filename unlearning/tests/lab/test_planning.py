"""The plan: what runs, what it costs, what it needs: the same tests in every folder of the workspace."""

import os
import re
import subprocess
import sys

from lab import plan as plans
from lab import tables
from lab.cli import HERE, SCALES, UserError

import pytest
from hand import record

PLAN = {
    "data": {"a": {"path": "a/file", "origin": "somewhere"}},
    "scales": {
        "demo": [
            {
                "name": "x-{method}-{h}",
                "grid": {"method": ["p", "q"], "h": [1, 2]},
                "args": {"flag": True, "off": False, "none": None, "two_words": [3, 4]},
                "seeds": [0, 5],
                "needs": ["{method}", "a"],
            }
        ]
    },
}


def test_plan_crosses_grids_and_makes_command_lines():
    jobs = plans.jobs(PLAN, "demo")
    assert [j.name for j in jobs] == ["x-p-1", "x-p-2", "x-q-1", "x-q-2"]
    assert jobs[1].command("demo") == (
        "train.py --out runs/demo/x-p-2 --scale demo --seeds 0 5 --flag --two-words 3 4 --method p --h 2".split()
    )
    assert [j.name for j in plans.jobs(PLAN, "demo", "x-q-*")] == ["x-q-1", "x-q-2"]


def test_a_scale_can_be_another_one():
    plan = {**PLAN, "scales": {**PLAN["scales"], "real": "demo"}}
    assert plans.meant(plan, "real") == plans.meant(plan, "demo") == "demo"
    assert plans.jobs(plan, "real") == plans.jobs(plan, "demo")
    assert plans.meant(plan, "paper") == "paper"


def test_plan_errors():
    with pytest.raises(UserError, match="no scale huge"):
        plans.jobs(PLAN, "huge")
    twice = {"scales": {"demo": [{"name": "same", "seeds": [0]}, {"name": "same", "seeds": [1]}]}}
    with pytest.raises(UserError, match="the name same"):
        plans.jobs(twice, "demo")


def test_plan_tells_what_is_missing(tmp_path):
    job = plans.jobs(PLAN, "demo")[0]
    assert "a/file is missing" in plans.lacking(PLAN, job, tmp_path)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "file").touch()
    assert plans.lacking(PLAN, job, tmp_path) == ""


@pytest.mark.parametrize("scale", SCALES)
def test_this_folders_plan_expands_and_its_scripts_exist(scale):
    plan = plans.load_plan()
    if scale == "real" and scale not in plan["scales"]:
        pytest.skip("no runs of scale real yet")
    jobs = plans.jobs(plan, scale)
    assert jobs
    for job in jobs:
        assert (HERE / job.script).is_file() and job.seeds and job.name == os.path.basename(job.name)


def test_plan_command_prints_cost_and_needs():
    done = subprocess.run(
        [sys.executable, "-m", "lab.plan", "--scale", "demo"], cwd=HERE, capture_output=True, text=True, check=True
    )
    assert "records, about" in done.stdout
    bad = subprocess.run(
        [sys.executable, "-m", "lab.plan", "--scale", "huge"], cwd=HERE, capture_output=True, text=True
    )
    assert bad.returncode == 2 and bad.stderr.startswith("error: no scale huge") and bad.stderr.count("\n") == 1


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
    monkeypatch.setattr(sys, "argv", ["lab.plan", "--data-dir", str(tmp_path / "data")])
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
    words = [
        sys.executable,
        "-m",
        "snakemake",
        "-s",
        "lab/Snakefile",
        "-n",
        "-p",
        "--forceall",
        "--nolock",
        "--cores",
        "1",
    ]
    words += ["--runtime-source-cache-path", str(tmp_path), "--config", "scale=smoke"]
    for processes, gpus, launch in (
        ((), 1, ""),
        (("processes=3",), 3, "accelerate.commands.launch --num_processes 3 "),
    ):
        done = subprocess.run([*words, *processes], cwd=HERE, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        lines = (done.stdout + done.stderr).splitlines()
        runs = [line for line in lines if "--out runs/smoke/" in line and (".py --out" in line)]
        trains = [line for line in runs if " train.py " in line or " eval.py " in line]
        assert trains and all(launch in line for line in trains)
        assert all(("accelerate" in line) == bool(processes) for line in trains)
        assert any(f"gpu={gpus}" in line for line in lines)

"""The plan of a folder: plan.yaml expanded into runs. The same file in every folder of the workspace.

`python -m lab.plan --scale paper` prints what would run, what it would cost and which data it needs; it runs nothing.
"""

import dataclasses
import fnmatch
import itertools
import shlex
from pathlib import Path
from typing import Any

from lab.runs import HERE, UserError, command, data_dir, parse

import yaml


@dataclasses.dataclass(frozen=True)
class Job:
    """One process of the plan: a command line, the seeds it covers, what it needs and what it is thought to cost."""

    name: str
    script: str
    args: dict[str, Any]
    seeds: tuple[int, ...]
    needs: tuple[str, ...]
    hours: float
    gb: float  # left on disk by a seed, in 1e9 bytes
    makes: tuple[str, ...]  # the tables that its records stand in

    def command(self, scale: str) -> list[str]:
        words = [self.script, "--out", f"runs/{scale}/{self.name}", "--scale", scale, "--seeds", *map(str, self.seeds)]
        for key, value in self.args.items():
            option = "--" + key.replace("_", "-")
            if value is True:
                words.append(option)
            elif value is not False and value is not None:
                words += [option, *map(str, value if isinstance(value, list) else [value])]
        return words


def load_plan(path: Path = HERE / "plan.yaml") -> dict:
    try:
        return yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {error}") from None
    except FileNotFoundError:
        raise UserError(f"no file {path}") from None


def meant(plan: dict, scale: str) -> str:
    """The scale that a name stands for: `real: paper` under `scales` says that scale real is scale paper."""
    other = plan["scales"].get(scale)
    return other if isinstance(other, str) else scale


def jobs(plan: dict, scale: str, only: str = "*") -> list[Job]:
    """Expand the grids of a scale: each entry's `grid` is crossed, `args` are common, `name` is a format string."""
    if scale not in plan["scales"]:
        raise UserError(f"no scale {scale} in plan.yaml; use one of {', '.join(plan['scales'])}")
    out: list[Job] = []
    for entry in plan["scales"][meant(plan, scale)]:
        grid = entry.get("grid", {})
        for values in itertools.product(*grid.values()):
            chosen = dict(zip(grid, values, strict=True))
            args = {**entry.get("args", {}), **chosen}
            name = entry["name"].format(**args)
            if not fnmatch.fnmatch(name, only):
                continue
            needs = tuple(n.format(**args) for n in entry.get("needs", []))
            needs = tuple(n for n in needs if n in plan.get("data", {}))
            cost = entry.get("hours", 0.0), entry.get("gb", plan.get("gb", {}).get(scale, 0.0))
            makes = tuple(n.format(**args) for n in entry.get("makes") or filter(None, [args.get("table")]))
            out.append(Job(name, entry.get("script", "train.py"), args, tuple(entry["seeds"]), needs, *cost, makes))
    names = [job.name for job in out]
    twice = {n for n in names if names.count(n) > 1}
    if twice:
        raise UserError(f"plan.yaml gives the name {sorted(twice)[0]} to more than one run of scale {scale}")
    return out


def names(path: Path, scale: str) -> set[str] | None:
    """The planned runs of a scale; None where the plan does not have it: then every run counts."""
    plan = load_plan(path)
    return {job.name for job in jobs(plan, scale)} if scale in plan["scales"] else None


def lacking(plan: dict, job: Job, folder: Path) -> str:
    """Why a job cannot run with this data folder ('' when it can)."""
    for need in job.needs:
        item = plan["data"][need]
        if not (folder / item["path"]).exists():
            return f"{folder / item['path']} is missing (from {item['origin']})"
    return ""


@dataclasses.dataclass
class PlanSettings:
    """What a scale would run, what it would cost and what it needs; nothing is run."""

    scale: str = "paper"
    """smoke, demo, real or paper."""
    only: str = "*"
    """Shell pattern of run names."""
    data_dir: str = ""
    """Data folder; default $REPRO_DATA, else ./data."""
    commands: bool = False
    """Also print each run's command line."""


def main() -> None:
    settings = parse(PlanSettings, PlanSettings.__doc__)
    plan, folder = load_plan(), data_dir(settings.data_dir)
    todo, scale = jobs(plan, settings.scale, settings.only), meant(plan, settings.scale)
    if scale != settings.scale:
        print(f"scale {settings.scale} of this folder is its scale {scale}")
    told = []
    for job in todo:
        why = lacking(plan, job, folder)
        done = (HERE / "runs" / scale / job.name / "records.jsonl").is_file()
        state = f"left out: {why}" if why else "done" if done else "to run"
        told.append(state.split(":")[0])
        print(f"{job.name:40s} {len(job.seeds):2d} seeds {job.hours:8.3f} h  {state}")
        if settings.commands:
            print("    python " + shlex.join(job.command(scale)))
    hours = sum(job.hours for job in todo)
    print(f"\n{len(todo)} runs, {sum(len(j.seeds) for j in todo)} records, about {hours:.2f} hours on one device")
    left = sum(job.hours for job, state in zip(todo, told, strict=True) if state == "to run")
    print(f"{told.count('to run')} to run (about {left:.2f} hours), {told.count('done')} done, ", end="")
    print(f"{told.count('left out')} left out for want of data")
    needed = {n: plan["data"][n] for job in todo for n in job.needs}
    gone = {n for n, item in needed.items() if not (folder / item["path"]).exists()}
    for need, item in sorted(needed.items()):
        size = f"{item['gb']:8.2f} GB" if "gb" in item else "    size ?"
        here = "MISSING" if need in gone else "present"
        print(f"  {here:8s} {need:24s} {size}  {folder / item['path']}  <- {item['origin']}")
    disk = sum(job.gb * len(job.seeds) for job in todo)
    missing = sum(needed[n].get("gb", 0.0) for n in gone)
    unknown = sum("gb" not in needed[n] for n in gone)
    more = f" and {unknown} of unknown size" if unknown else ""
    print(f"disk: about {disk:.1f} GB for the runs, {missing:.1f} GB for missing data{more}")


if __name__ == "__main__":
    command(main)

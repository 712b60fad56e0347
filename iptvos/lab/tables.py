"""Records and paper.csv to a page: RESULTS.md. The same in every folder; it knows nothing of any paper.

    python -m lab.tables --scale demo               # of the runs here: runs/demo/RESULTS.md, with its figures
    python -m lab.tables --scale demo --record      # takes finished planned runs over into results/, makes RESULTS.md

Numbers come from records only. What a table shows is said in plan.yaml under `tables`; claims.py and figures.py add
what is particular to the paper. Only `--record` changes a file that git tracks.
"""

import dataclasses
import json
import os
import shlex
from pathlib import Path

from lab import differences
from lab import plan as plans
from lab.cells import check_tables, described, read_printed, render
from lab.claims import UNKNOWN, counted, judged
from lab.cli import HERE, SCALES, UserError, command, parse
from lab.files import read_json, write_json, write_text
from lab.records import COMMITTED, KEYS, committed, local, long, take_over

import claims
import figures


@dataclasses.dataclass
class TableSettings:
    """Tables, claims and figures of a scale, made from records."""

    scale: str = "demo"
    """smoke, demo, real or paper."""
    record: bool = False
    """Take the finished planned runs of that scale over into results/; RESULTS.md is made of all committed records."""


def seconds(found: list[dict]) -> float:
    """Of all runs; several records of a seed that state the same time were made in it together."""
    return sum(s for _, _, s in {(r["run"], r["seed"], r["seconds"]) for r in found})


def described_runs(plan: dict, scale: str, found: list[dict]) -> dict:
    """Every planned run of a scale: its command, cost, needs, and the records it has."""
    out = {}
    for job in plans.jobs(plan, scale) if isinstance(plan["scales"].get(scale), list) else ():
        mine = [r for r in found if r["run"] == job.name]
        out[job.name] = {
            **{"command": "python " + shlex.join(job.command(scale)), "hours": job.hours, "seeds": len(job.seeds)},
            **{"needs": [plan["data"][n] for n in job.needs], "table": str(job.args.get("table", ""))},
            **{"makes": list(job.makes)},
            **{"records": len(mine), "seconds": round(seconds(mine), 1)},
            **{"commits": sorted({r["code"]["commit"] + ("+changes" if r["code"]["dirty"] else "") for r in mine})},
            **{"devices": sorted({r["host"]["device"] for r in mine})},
            **{"data": sorted({f"{r['data']['name']} ({r['data'].get('variant', '')})" for r in mine})},
        }
    return out


def provenance(found: list[dict]) -> list[str]:
    """Where the records of a scale come from, as list items."""
    seeds = sorted({r["seed"] for r in found})
    hosts = sorted({f"{r['host']['device']}, torch {r['host']['torch']}" for r in found})
    commits = sorted({r["code"]["commit"][:10] + ("+changes" if r["code"]["dirty"] else "") for r in found})
    sets = sorted({f"{r['data']['name']} ({r['data'].get('variant', '')})" for r in found})
    return [
        f"* {len(found)} records, {seconds(found) / 3600:.2f} hours, seeds {', '.join(map(str, seeds))}",
        f"* data: {', '.join(sets)}",
        f"* machines: {'; '.join(hosts)}",
        f"* code: {', '.join(commits)}",
    ]


def finding(frames: dict) -> list[str]:
    """The folder's own sentences on what its records show; the first has to stand alone, on the report's front page."""
    return list(claims.bottom_line(frames)) if hasattr(claims, "bottom_line") else []


def bottom_line(said: list[dict], found: dict[str, list[dict]], frames: dict, measured: int, total: int) -> str:
    """What was shown, on which data, over how many seeds, and what of the paper's tables was measured."""
    sentences = finding(frames)
    for scale, mine in found.items():
        if mine:
            sets = sorted({r["data"]["name"] for r in mine})
            data = ", ".join(sets[:4]) + (f" and {len(sets) - 4} more" if sets[4:] else "")
            seeds: dict[tuple, set[int]] = {}
            for r in mine:
                seeds.setdefault(tuple(r[k] for k in KEYS), set()).add(r["seed"])
            most = max(map(len, seeds.values()))
            told = f"up to {most} seeds" if most > 1 else "one seed"
            sentences.append(f"Scale {scale}: {counted(said, scale)}, on {data}, {told} a number.")
    if total:
        sentences.append(f"Of the paper's {total:,} cells {measured:,} were measured at its own scale.")
    return " ".join(sentences)


def claim_table(said: list[dict]) -> list[str]:
    rows = ["| | claim (source) | scale | numbers: mean ± 95 % interval | verdict |", "|---|---|---|---|---|"]
    for c in sorted(said, key=lambda c: COMMITTED.index(c["scale"]) if c["scale"] in COMMITTED else 9):
        word = c["verdict"] if c["verdict"] == UNKNOWN else f"**{c['verdict']}**"
        text = f"Control: {c['text']}" if c["control"] else f"{c['text']} ({c['source']})"
        cells = [c["id"], text, c["scale"], c["numbers"], word]
        rows.append("| " + " | ".join(x.replace("|", "\\|") for x in cells) + " |")
    return [*rows, ""]


def unmeasured(view: dict, scale: str, total: int, known: int, runs: dict) -> str:
    """One line for a table without a measured cell: what would fill it."""
    table = view.get("where", {}).get("table", view["id"])
    names = table if isinstance(table, list) else [table]
    hours = sum(r["hours"] for r in runs.values() if set(r["makes"]) & set(names))
    cost = f"about {hours:,.1f} hours" if hours else "no run of plan.yaml fills it"
    return f"* {view['title']}: {total} cells, {known} printed numbers in paper.csv; scale {scale}, {cost}"


def saved_figures(root: Path, scale: str) -> list[dict]:
    path = root / "results" / "figures" / f"{scale}.json"
    return read_json(path) if path.is_file() else []


def draw(root: Path, scale: str, found: list[dict], folder: Path) -> list[dict]:
    """Figures of a scale into a folder: [{path (from root), caption, scale}]."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn = figures.draw(found, folder, scale) if found else []
    return [{"path": p.relative_to(root).as_posix(), "caption": text, "scale": scale} for p, text in drawn]


def redraw(root: Path, scale: str, found: list[dict]) -> None:
    """The committed figures of one scale, made anew; their list stays beside them, for some are made from files of the
    runs that only this machine has."""
    folder = root / "results" / "figures"
    before, now = saved_figures(root, scale), draw(root, scale, found, folder)
    for old in {f["path"] for f in before} - {f["path"] for f in now}:
        (root / old).unlink(missing_ok=True)
    write_json(folder / f"{scale}.json", now)


def page(root: Path, found: dict[str, list[dict]], pictures: list[dict], target: Path) -> dict:
    """Write a page of the scales in `found`; returns what it shows, as data."""
    description, printed = plans.load_plan(root / "plan.yaml"), read_printed(root / "paper.csv")
    check_tables(description, printed, root / "paper.csv")
    frames = {s: long(f) for s, f in found.items()}
    said = judged([c for c in claims.CLAIMS if c.scale in found], frames)
    report = {"folder": root.name, "title": description["title"], "claims": said, "tables": [], "figures": pictures}
    report["runs"] = {s: described_runs(description, s, found[s]) for s in found}
    report["differences"] = differences.described(description, frames)
    report["finding"] = finding(frames)

    body, measured, total = [], 0, 0
    for s in found:
        views = [v for v in description["tables"] if v.get("scale", "paper") == s or list(found) == ["smoke"]]
        shown, left = [], []
        for view in views:
            table = described(view, s, frames[s], printed)
            cells = [c for row in table["cells"] for c in row]
            own = [c for c in cells if c["expected"]]
            if any(c["n"] for c in cells):
                shown.append(render(view, frames[s], printed)[0])
            else:
                known = sum("printed" in c for c in own)
                left.append(unmeasured(view, s, len(own), known, report["runs"][s]))
            report["tables"].append(table)
            if s == "paper":
                measured, total = measured + sum(c["n"] > 0 for c in own), total + len(own)
        drawn = []
        for f in (f for f in pictures if f["scale"] == s):
            link = Path(os.path.relpath(root / f["path"], target.parent)).as_posix()
            drawn += [f"![{f['caption']}]({link})", "", f"*{f['caption']}*", ""]
        if shown or drawn or left:
            body += [f"## Scale {s}", "", *drawn, *shown]
            body += ["Tables without a measured cell:", "", *left, ""] if left else []

    lines = [f"# Results: {description['title']}", ""]
    lines += [
        f"**{bottom_line(said, found, frames, measured, total)}**",
        "",
        *(" ".join(description["summary"].split()), ""),
    ]
    lines += [
        "Made from records by `lab/tables.py`; nothing here is typed by hand. `—`: the printed number is not known. "
    ]
    lines += ["`not run`: no record. Only records of scale paper stand in the paper's tables.", ""]
    lines += ["## Claims", "", *claim_table(said)] if said else []
    lines += [*body, *differences.markdown(report["differences"]), "## Where the numbers come from", ""]
    for s in found:
        if plans.meant(description, s) == s:
            lines += [f"Scale {s}:", "", *(provenance(found[s]) if found[s] else ["* no records"]), ""]
    write_text(target, "\n".join(lines).rstrip() + "\n")
    report |= {"cells_measured": measured, "cells_total": total}
    return report


def record(root: Path, scale: str) -> str:
    """Take over, redraw, write RESULTS.md and results/report.json; the line that says so. Without a finished run here
    the page is made anew of what is committed: a printed number or the layout may have changed."""
    if scale not in COMMITTED:
        raise UserError(f"records of scale {scale} are not kept; use --scale demo, real or paper")
    taken = take_over(root, scale, plans.names(root / "plan.yaml", scale))
    found = {s: committed(root, s) for s in COMMITTED}
    for s in COMMITTED:
        listed = (root / "results" / "figures" / f"{s}.json").is_file()
        if (s == scale and taken) or (found[s] and not listed):
            redraw(root, s, found[s])
    if not found[scale]:
        raise UserError(f"no finished planned run of scale {scale} in {root / 'runs' / scale}; reproduce it first")
    pictures = [f for s in COMMITTED for f in saved_figures(root, s)]
    report = page(root, found, pictures, root / "RESULTS.md")
    write_text(root / "results" / "report.json", json.dumps(report, sort_keys=True, allow_nan=False) + "\n")
    told = f"{root.name}: {len(taken)} runs of scale {scale} recorded; {counted(report['claims'], scale)}, RESULTS.md"
    odd = sorted({r["run"] for r in found[scale] if r["code"]["dirty"]})
    # A number whose code is in no commit cannot be checked by anyone: it stays, and is said each time.
    return told + (f"\nnote: run with changes that are in no commit, make them again: {', '.join(odd)}" if odd else "")


def look(root: Path, scale: str) -> str:
    """The page of the runs that are here, in runs/<scale>; the line that says so."""
    folder = root / "runs" / scale
    found = local(root, scale, plans.names(root / "plan.yaml", scale))
    pictures = draw(root, scale, found, folder / "figures")
    report = page(root, {scale: found}, pictures, folder / "RESULTS.md")
    write_json(folder / "report.json", report)
    summary = {"folder": root.name, "scale": scale, "records": len(found), "claims": counted(report["claims"], scale)}
    write_json(folder / "summary.json", summary)
    return f"{root.name}/runs/{scale}/RESULTS.md: {summary['claims']}, {len(found)} records"


def main() -> None:
    settings = parse(TableSettings, TableSettings.__doc__)
    if settings.scale not in SCALES:
        raise UserError(f"no scale {settings.scale}; use one of {', '.join(SCALES)}")
    scale = plans.meant(plans.load_plan(HERE / "plan.yaml"), settings.scale)
    print((record if settings.record else look)(HERE, scale))


if __name__ == "__main__":
    command(main)

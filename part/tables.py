"""Records + paper.csv -> RESULTS.md. The same file in every folder of the workspace; it knows nothing of any paper.

    python tables.py --scale demo      # after a run of that scale: RESULTS.md, runs/demo/summary.json
    python tables.py --scale paper     # also collects finished runs into results/<run>.jsonl

Numbers come from records only: those of scale paper out of results/, those of scale demo out of runs/demo. What a table
shows is said in plan.yaml under `tables`; claims.py and figures.py add what is particular to the paper.
"""

import csv
import dataclasses
import json
import math
import os
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import tyro

import plan as plans
from runs import HERE, SCALES, UserError, check_record, command, parse, read_record, write_json, write_text

KEYS = ["table", "dataset", "setting", "method"]
COLUMNS = [*KEYS, "metric", "value", "std", "unit", "source"]
UNKNOWN, NOT_RUN = "—", "not run"


@dataclasses.dataclass(frozen=True)
class Claim:
    """A statement of the paper as an inequality over measured metrics.

    `check(frame)` gets the long frame of one scale's records and returns (True | False | None when the numbers it needs
    were not measured, the numbers as text).
    """

    id: str
    text: str
    source: str
    scale: str
    check: Callable[[pd.DataFrame], tuple[bool | None, str]]


@dataclasses.dataclass
class TableSettings:
    scale: str = "demo"
    """smoke, demo or paper: whose runs to collect and sum up."""
    root: tyro.conf.Suppress[str] = str(HERE)


# ------------------------------------------------------------------------------------------------------------ reading


def read_lines(path: Path) -> list[dict]:
    """Records of a results file; UserError names the line that is none."""
    out = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{path}:{number}: not valid JSON ({error}); collect the run again") from None
        out.append({**check_record(value, f"{path}:{number}"), "run": path.stem})
    return out


def planned(root: Path, scale: str) -> Callable[[str], bool]:
    """Whether a run of this name stands in plan.yaml: runs started by hand lie in the same folder, and no table shows
    them. A plan without the scale lets every run through."""
    plan = plans.load_plan(root / "plan.yaml")
    if scale not in plan["scales"]:
        return lambda name: True
    names = {job.name for job in plans.jobs(plan, scale)}
    return lambda name: name in names


def collect(root: Path) -> None:
    """Copy the records of finished planned runs of scale paper to results/, one file a run, one line a record."""
    wanted = planned(root, "paper")
    for path in sorted((root / "runs" / "paper").glob("*/records.jsonl")):
        if not wanted(path.parent.name):
            continue
        target = root / "results" / f"{path.parent.name}.jsonl"
        text = path.read_text()
        if not target.exists() or target.read_text() != text:
            write_text(target, text)


def records(root: Path, scale: str) -> list[dict]:
    """All records of a scale."""
    if scale == "paper":
        found = [r for path in sorted((root / "results").glob("*.jsonl")) for r in read_lines(path)]
    else:
        paths = sorted((root / "runs" / scale).glob("*/seed*/record*.json"))
        wanted = planned(root, scale)
        found = [{**read_record(p), "run": p.parents[1].name} for p in paths if wanted(p.parents[1].name)]
    wrong = [r for r in found if r["scale"] != scale]
    if wrong:
        raise UserError(f"run {wrong[0]['run']}: a record of scale {wrong[0]['scale']} among those of scale {scale}")
    return found


def long(found: list[dict]) -> pd.DataFrame:
    """One row a record and metric. Numbers of the record's `data` part become metrics named data.<key>."""
    rows = []
    for r in found:
        numbers = {k: v for k, v in r["metrics"].items() if isinstance(v, int | float)}
        numbers |= {f"data.{k}": v for k, v in r["data"].items() if isinstance(v, int | float)}
        numbers |= {"seconds": r["seconds"], "peak_memory_mb": r["peak_memory_mb"]}
        base = {**{k: r[k] for k in KEYS}, "seed": r["seed"], "run": r["run"], "variant": r["data"].get("variant", "")}
        rows += [{**base, "metric": k, "value": float(v)} for k, v in numbers.items()]
    return pd.DataFrame(rows, columns=[*KEYS, "seed", "run", "variant", "metric", "value"])


def read_printed(path: Path) -> pd.DataFrame:
    """paper.csv; a malformed line is named by its number. An empty value is a printed number that is not known. The
    column `line` is not in the file: the line's number."""
    rows, first = [], {}
    try:
        path.read_text(encoding="utf-8-sig")
    except (FileNotFoundError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as UTF-8 text ({error})") from None
    with open(path, newline="", encoding="utf-8-sig") as file:  # with the mark that spreadsheets put in front, or not
        reader = csv.reader(file)
        if next(reader, None) != COLUMNS:
            raise UserError(f"{path}:1: the header must be {','.join(COLUMNS)}")
        for cells in reader:
            if len(cells) != len(COLUMNS):
                raise UserError(f"{path}:{reader.line_num}: {len(cells)} cells instead of {len(COLUMNS)}")
            row = dict(zip(COLUMNS, cells, strict=True))
            for key in ("value", "std"):
                try:
                    row[key] = float(row[key]) if row[key] else float("nan")
                except ValueError:
                    raise UserError(f"{path}:{reader.line_num}: {key} '{row[key]}' is not a number") from None
                if cells[COLUMNS.index(key)] and not math.isfinite(row[key]) or key == "std" and row[key] < 0:
                    raise UserError(f"{path}:{reader.line_num}: {key} '{row[key]:g}' is no printed number")
            name = tuple(cells[:5])
            if name in first:
                same = f"the same cell as line {first[name]} ({', '.join(name)})"
                raise UserError(f"{path}:{reader.line_num}: {same}; fill in that one")
            first[name] = row["line"] = reader.line_num
            rows.append(row)
    return pd.DataFrame(rows, columns=[*COLUMNS, "line"])


def check_tables(description: dict, printed: pd.DataFrame, path: Path) -> None:
    """UserError for a line of paper.csv whose table plan.yaml does not name: neither under `tables` nor as one of
    `facts`, which are kept beside the tables and shown in none."""
    named = [v.get("printed", v.get("where", {})).get("table", []) for v in description["tables"]]
    known = {*description.get("facts", []), *(n for ns in named for n in (ns if isinstance(ns, list) else [ns]))}
    for row in printed[~printed["table"].isin(known)].itertuples() if named and all(named) else ():
        use = ", ".join(sorted(known))
        raise UserError(f"{path}:{row.line}: plan.yaml has no table '{row.table}'; use one of {use}")


# ------------------------------------------------------------------------------------------------------------- tables


def number(value: float, std: float, digits: int) -> str:
    return f"{value:.{digits}f}" + (f" ± {std:.{digits}f}" if std == std else "")


@dataclasses.dataclass
class Cell:
    printed: float
    printed_std: float
    values: pd.DataFrame  # rows of the long frame, one a seed
    expected: bool  # paper.csv has a row for it, known or not

    def text(self, digits: int, beside: bool, seeds: int) -> str:
        """`printed / measured`, or the measured number alone where the paper has no such table."""
        n = len(self.values)
        measured = NOT_RUN
        if n:
            v = self.values["value"]
            measured = number(v.mean(), v.std(ddof=0) if n > 1 else float("nan"), digits)
            if self.values["metric"].iloc[0].startswith("data.") and v.nunique() == 1:
                measured = f"{v.iloc[0]:.6g}"  # a property of the data, the same for every seed
            variants = sorted(set(self.values["variant"]) - {"paper", "", "generated", "wheel"})
            measured += (f" (n={n})" if n != seeds else "") + "".join(f" [{v}]" for v in variants)
        if not beside:
            return measured
        known = self.printed == self.printed
        printed = number(self.printed, self.printed_std, digits) if known else UNKNOWN
        gap = f" ({self.values['value'].mean() - self.printed:+.{digits}f})" if n and known else ""
        return f"{printed} / {measured}{gap}"


def ordered(given: list[str] | None, *found: set[str]) -> list[str]:
    """The order of plan.yaml; what it does not name is not shown. Without an order: sorted."""
    return list(given) if given is not None else sorted(set().union(*found))


def cells(view: dict, frame: pd.DataFrame, printed: pd.DataFrame) -> tuple[list[str], list[str], dict]:
    """(rows, columns, {(row, column): Cell}) of one table of plan.yaml.

    `rows` and `columns` name a record key or `metric`; `where` selects records; `printed` selects in paper.csv
    (default: the same selection). `metric` is the metric when neither axis is.
    """
    row_key, column_key = view["rows"], view["columns"]
    where = dict(view.get("where", {}))
    paper_where = dict(view.get("printed", where))
    if "metric" not in (row_key, column_key):
        where["metric"], paper_where["metric"] = view["metric"], paper_where.get("metric", view["metric"])

    def pick(table: pd.DataFrame, conditions: dict) -> pd.DataFrame:
        for key, value in conditions.items():
            table = table[table[key].isin(value if isinstance(value, list) else [value])]
        return table

    ours, theirs = pick(frame, where), pick(printed, paper_where)
    order = view.get("order", {})
    rows = ordered(order.get("rows"), set(ours[row_key]), set(theirs[row_key]))
    columns = ordered(order.get("columns"), set(ours[column_key]), set(theirs[column_key]))
    out = {}
    for r in rows:
        for c in columns:
            p = theirs[(theirs[row_key] == r) & (theirs[column_key] == c)]
            if len(p) > 1:
                raise UserError(f"paper.csv has {len(p)} rows for {view['id']}, {r}, {c}")
            value, std = (p["value"].iloc[0], p["std"].iloc[0]) if len(p) else (float("nan"),) * 2
            m = ours[(ours[row_key] == r) & (ours[column_key] == c)]
            if m["seed"].duplicated().any():
                runs = ", ".join(sorted(set(m["run"])))
                raise UserError(f"table {view['id']}, {r}, {c}: more than one record a seed (runs {runs})")
            out[r, c] = Cell(value, std, m, len(p) > 0)
    for label, extra in view.get("extra_rows", {}).items():  # e.g. a trivial answer, kept as a metric of some method
        rows.append(label)
        source = pick(frame, {**where, "metric": extra["metric"], row_key: extra["of"]})
        for c in columns:
            out[label, c] = Cell(float("nan"), float("nan"), source[source[column_key] == c], False)
    for label, parts in view.get("means", {}).items():  # a row that is the mean of others, for seeds that have them all
        rows.append(label)
        for c in columns:
            m = ours[ours[row_key].isin(parts) & (ours[column_key] == c)]
            whole = m.groupby("seed")["value"].agg(["mean", "count"])
            whole = whole[whole["count"] == len(parts)]["mean"].rename("value").reset_index()
            variant = "+".join(sorted(set(m["variant"]) - {"paper", "", "generated", "wheel"}))
            p = theirs[(theirs[row_key] == label) & (theirs[column_key] == c)]
            value, std = (p["value"].iloc[0], p["std"].iloc[0]) if len(p) else (float("nan"),) * 2
            metric = m["metric"].iloc[0] if len(m) else ""
            out[label, c] = Cell(value, std, whole.assign(metric=metric, variant=variant), len(p) > 0)
    return rows, columns, out


def render(view: dict, frame: pd.DataFrame, printed: pd.DataFrame) -> tuple[str, int, int]:
    """(markdown, cells measured, cells in all), counted over the cells that paper.csv knows of: the paper's own."""
    rows, columns, grid = cells(view, frame, printed)
    labels, digits = view.get("labels", {}), view.get("digits", 2)
    beside = any(c.expected for c in grid.values())
    counts = [len(c.values) for c in grid.values() if len(c.values)]
    seeds = max(counts, default=0)
    head = "printed / measured" if beside else "measured"
    lines = [f"### {view['title']}", ""]
    if view.get("note"):
        lines += [" ".join(view["note"].split()), ""]
    unit = f" in {view['unit']}" if view.get("unit") else ""
    own = [cell for cell in grid.values() if cell.expected]
    if not grid:
        return "\n".join([*lines, "No records yet.", ""]), 0, 0
    lines += [f"Cells: {head}{unit}" + (f", mean ± std (ddof 0) over {seeds} seeds." if seeds else "."), ""]
    lines += ["| | " + " | ".join(str(labels.get(c, c)) for c in columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for r in rows:
        shown = [grid[r, c].text(digits, beside and r not in view.get("extra_rows", {}), seeds) for c in columns]
        lines.append(f"| {labels.get(r, r)} | " + " | ".join(shown) + " |")
    return "\n".join(lines) + "\n", sum(len(c.values) > 0 for c in own), len(own)


def described(view: dict, scale: str, frame: pd.DataFrame, printed: pd.DataFrame) -> dict:
    """One table as data: every cell with its printed and measured number, difference and runs."""
    rows, columns, grid = cells(view, frame, printed)
    labels, extra, none = view.get("labels", {}), view.get("extra_rows", {}), float("nan")
    named = view.get("printed", view.get("where", {})).get("table", [])
    units = printed[printed["table"].isin(named if isinstance(named, list) else [named])]["unit"].unique()

    def cell(r, c) -> dict:
        k, v = grid[r, c], grid[r, c].values["value"]
        n = len(v)
        numbers = {"printed": k.printed, "printed_std": k.printed_std, "measured": v.mean() if n else none}
        numbers["std"] = v.std(ddof=0) if n > 1 else none
        out = {key: round(float(x), 6) for key, x in numbers.items() if x == x}
        runs = sorted(set(k.values["run"])) if n and "run" in k.values else []
        variants = sorted(set(k.values["variant"]) - {""}) if n else []
        return {**out, "n": n, "runs": runs, "variants": variants, "expected": k.expected and r not in extra}

    return {
        **{"id": view["id"], "scale": scale, "title": view["title"], "note": " ".join(view.get("note", "").split())},
        **{
            "unit": view.get("unit") or (units[0] if len(units) == 1 else ""),
            "digits": view.get("digits", 2),
            "tolerance": view.get("tolerance"),
        },
        **{"where": {k: v for k, v in view.get("where", {}).items() if k in KEYS}},
        **{"rows": [str(labels.get(r, r)) for r in rows], "columns": [str(labels.get(c, c)) for c in columns]},
        **{"row_names": [str(r) for r in rows], "column_names": [str(c) for c in columns]},
        "cells": [[cell(r, c) for c in columns] for r in rows],
    }


def described_runs(plan: dict, scale: str, found: list[dict]) -> dict:
    """Every planned run of a scale: its command, cost, needs, and the records it has."""
    out = {}
    for job in plans.jobs(plan, scale) if scale in plan["scales"] else ():
        mine = [r for r in found if r["run"] == job.name]
        out[job.name] = {
            **{"command": "python " + shlex.join(job.command(scale)), "hours": job.hours, "seeds": len(job.seeds)},
            **{"needs": [plan["data"][n] for n in job.needs], "table": str(job.args.get("table", ""))},
            **{"makes": list(job.makes)},
            **{"records": len(mine), "seconds": round(sum(r["seconds"] for r in mine), 1)},
            **{"commits": sorted({r["code"]["commit"] + ("+changes" if r["code"]["dirty"] else "") for r in mine})},
            **{"devices": sorted({r["host"]["device"] for r in mine})},
            **{"data": sorted({f"{r['data']['name']} ({r['data'].get('variant', '')})" for r in mine})},
        }
    return out


# ------------------------------------------------------------------------------------------------------------- the page


def claim_rows(claims: list[Claim], frames: dict[str, pd.DataFrame]) -> tuple[list[str], dict, list[dict]]:
    """Markdown rows, {scale: [held, total]}, and the same as data."""
    rows, score, data = [], {scale: [0, 0] for scale in SCALES}, []
    for claim in claims:
        frame = frames.get(claim.scale, long([]))
        verdict, numbers = claim.check(frame) if len(frame) else (None, "")
        score[claim.scale][0] += verdict is True
        score[claim.scale][1] += 1
        word = {True: "**holds**", False: "**does not hold**", None: "not measured"}[verdict]
        rows.append(f"| {claim.id} | {claim.text} ({claim.source}) | {claim.scale} | {numbers} | {word} |")
        said = {"id": claim.id, "text": claim.text, "source": claim.source, "scale": claim.scale}
        data.append({**said, "numbers": numbers, "verdict": word.strip("*")})
    return rows, score, data


def provenance(found: list[dict]) -> list[str]:
    """Where the records of a scale come from, as list items."""
    seeds = sorted({r["seed"] for r in found})
    hosts = sorted({f"{r['host']['device']}, torch {r['host']['torch']}" for r in found})
    commits = sorted({r["code"]["commit"][:10] + ("+changes" if r["code"]["dirty"] else "") for r in found})
    sets = sorted({f"{r['data']['name']} ({r['data'].get('variant', '')})" for r in found})
    hours = sum(r["seconds"] for r in found) / 3600
    return [
        f"* {len(found)} records, {hours:.2f} hours, seeds {', '.join(map(str, seeds))}",
        f"* data: {', '.join(sets)}",
        f"* machines: {'; '.join(hosts)}",
        f"* code: {', '.join(commits)}",
    ]


def page(root: Path, scale: str) -> dict:
    """Write the page of a scale (RESULTS.md, for smoke runs/smoke/RESULTS.md) and summary.json; returns the latter."""
    import claims
    import differences
    import figures

    description, printed = plans.load_plan(root / "plan.yaml"), read_printed(root / "paper.csv")
    check_tables(description, printed, root / "paper.csv")
    shown = ("smoke",) if scale == "smoke" else ("demo", "paper")
    found = {s: records(root, s) for s in shown}
    frames = {s: long(f) for s, f in found.items()}
    target = root / ("runs/smoke/RESULTS.md" if scale == "smoke" else "RESULTS.md")
    if scale == "paper" and not found["demo"]:  # they are not committed: a fresh clone has none
        print(f"note: no records of scale demo here, so {target} loses its numbers; make them first", file=sys.stderr)

    rows, score, said = claim_rows([c for c in claims.CLAIMS if c.scale in shown], frames)
    lines = [f"# Results: {description['title']}", "", " ".join(description["summary"].split()), ""]
    lines += ["Made from records by `tables.py`; nothing here is typed by hand. `—`: the printed number is not known. "]
    lines += [f"`{NOT_RUN}`: no record. Only records of scale paper stand in the paper's tables.", ""]
    if rows:
        lines += [
            "## Claims",
            "",
            "| | claim (source) | scale | numbers | verdict |",
            "|---|---|---|---|---|",
            *rows,
            "",
        ]
    measured = total = 0
    report = {
        "folder": root.name,
        "title": description["title"],
        "claims": said,
        "tables": [],
        "figures": [],
        "runs": {},
    }
    for s in shown:
        views = [v for v in description["tables"] if v.get("scale", "paper") == s or scale == "smoke"]
        if views:
            lines += [f"## Scale {s}", ""]
        for view in views:
            text, some, every = render(view, frames[s], printed)
            lines.append(text)
            report["tables"].append(described(view, s, frames[s], printed))
            if s == "paper":
                measured, total = measured + some, total + every
        drawn = figures.draw(found[s], root, s) if found[s] else []
        report["runs"][s] = described_runs(description, s, found[s])
        for path, caption in drawn:
            report["figures"].append({"path": path.relative_to(root).as_posix(), "caption": caption, "scale": s})
            link = Path(os.path.relpath(path, target.parent)).as_posix()
            lines += [f"![{caption}]({link})", "", f"*{caption}*", ""]
    report["differences"] = differences.described(description, frames)
    lines += differences.markdown(report["differences"])
    lines += ["## Where the numbers come from", ""]
    for s in shown:
        lines += [f"Scale {s}:", "", *(provenance(found[s]) if found[s] else ["* no records here"]), ""]
    write_text(target, "\n".join(lines).rstrip() + "\n")
    summary = {
        **{"folder": root.name, "scale": scale, "records": len(found[scale])},
        **{"claims_held": score[scale][0], "claims_total": score[scale][1]},
        **{"cells_measured": measured, "cells_total": total, "results": f"{root.name}/{target.relative_to(root)}"},
    }
    write_json(root / "runs" / scale / "report.json", report)  # for the workspace's report
    write_json(root / "runs" / scale / "summary.json", summary)
    return summary


def main() -> None:
    settings = parse(TableSettings, __doc__)
    root = Path(settings.root)
    if settings.scale not in SCALES:
        raise UserError(f"no scale {settings.scale}; use one of {', '.join(SCALES)}")
    if settings.scale == "paper":
        collect(root)
    s = page(root, settings.scale)
    print(
        f"{s['results']}: {s['claims_held']}/{s['claims_total']} claims hold, {s['records']} records, "
        f"{s['cells_measured']}/{s['cells_total']} cells of the paper's tables measured"
    )


if __name__ == "__main__":
    command(main)

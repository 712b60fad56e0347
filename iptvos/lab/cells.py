"""Cells of the paper's tables: printed numbers beside measured ones. The same in every folder.

paper.csv holds the printed numbers, records the measured ones; plan.yaml says under `tables` what a table shows.
"""

import csv
import dataclasses
import math
from pathlib import Path

from lab.claims import interval
from lab.cli import UserError
from lab.records import KEYS

import pandas as pd

COLUMNS = [*KEYS, "metric", "value", "std", "unit", "source"]
UNKNOWN, NOT_RUN = "—", "not run"
OWN = ("paper", "generated", "wheel")  # data that need no word in a cell


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


# ---------------------------------------------------------------------------------------------------------- tables


def number(value: float, std: float, digits: int) -> str:
    return f"{value:.{digits}f}" + (f" ± {std:.{digits}f}" if std == std else "")


def spread(values: pd.Series, kind: str) -> float:
    """What stands behind `±`: the standard deviation over seeds (`std`, ddof 0), or half of the mean's 95 % interval
    (`interval`); NaN for one value."""
    if len(values) < 2:
        return float("nan")
    return interval(values)[1] if kind == "interval" else float(values.std(ddof=0))


@dataclasses.dataclass
class Cell:
    printed: float
    printed_std: float
    values: pd.DataFrame  # rows of the long frame, one a seed
    expected: bool  # paper.csv has a row for it, known or not

    @property
    def variants(self) -> list[str]:
        """What has to be said of the data: all that is not the paper's own; `[one class: 3 of 10]` where it is so of
        three seeds of ten."""
        found = [{p.strip() for p in str(v).split(",")} for v in self.values["variant"]] if len(self.values) else []
        parts = sorted(set().union(*found) - {"", *OWN})
        counts = {p: sum(p in f for f in found) for p in parts}
        return [p if n == len(found) else f"{p}: {n} of {len(found)}" for p, n in counts.items()]

    def text(self, digits: int, beside: bool, seeds: int, said: list[str], kind: str = "std") -> str:
        """`printed / measured`, or the measured number alone where the paper has no such table.

        The number of seeds is named where it is not the table's, and what `said`, the table's head, does not say.
        """
        n = len(self.values)
        measured = NOT_RUN
        if n:
            v = self.values["value"]
            measured = number(v.mean(), spread(v, kind), digits)
            if self.values["metric"].iloc[0].startswith("data.") and v.nunique() == 1:
                measured = f"{v.iloc[0]:.6g}"  # a property of the data, the same for every seed
            other = [v for v in self.variants if v not in said]
            measured += (f" (n={n})" if n != seeds else "") + "".join(f" [{v}]" for v in other)
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
    (default: the same selection). `metric` is the metric when neither axis is; `spread` says what stands behind `±`.
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
            variant = "+".join(sorted(set(m["variant"]) - {"", *OWN}))
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
    filled = [c.variants for c in grid.values() if len(c.values)]
    said = [v for v in filled[0] if all(v in f for f in filled)] if filled else []  # of all cells: once, in the head
    head = "printed / measured" if beside else "measured"
    lines = [f"### {view['title']}", ""]
    if view.get("note"):
        lines += [" ".join(view["note"].split()), ""]
    unit = f" in {view['unit']}" if view.get("unit") else ""
    own = [cell for cell in grid.values() if cell.expected]
    if not grid:
        return "\n".join([*lines, "No records yet.", ""]), 0, 0
    kind = view.get("spread", "std")
    plus = "95 % interval" if kind == "interval" else "std (ddof 0)"
    of = f", mean ± {plus} over {seeds} seeds" if seeds > 1 else ", one seed" if seeds else ""
    on = f", on {' and '.join(said)}" if said else ""
    lines += [f"Cells: {head}{unit}{of}{on}.", ""]
    lines += ["| | " + " | ".join(str(labels.get(c, c)) for c in columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for r in rows:
        both = beside and r not in view.get("extra_rows", {})
        shown = [grid[r, c].text(digits, both, seeds, said, kind) for c in columns]
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
        numbers["std"] = spread(v, view.get("spread", "std"))
        out = {key: round(float(x), 6) for key, x in numbers.items() if x == x}
        runs = sorted(set(k.values["run"])) if n and "run" in k.values else []
        variants = sorted({*k.variants, *(set(k.values["variant"]) & {*OWN})}) if n else []
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

"""Cells of the report: how far a measured number may lie from the printed one, the run behind a cell, the HTML."""

import html
import re
import shlex

POINTS, SHARE = 1.0, 0.05  # tolerance where a table states none: points of per cent, else a share of the printed number
KEY = (
    '<p class="key"><span class="agree">within</span><span class="outside">outside</span><span class="alone">printed '
    "number not known</span><span>no such cell in the paper</span>"
    '<span class="missing">not run</span></p>\n\n'
    "Each cell: the measured number (mean ± standard deviation over n seeds; 95 % interval where the table says so), "
    "below it the printed one and, in "
    f"brackets, the difference. Within: the difference is at most the printed ± or, if that is more, {POINTS:g} point "
    f"where the unit is per cent and {SHARE:.0%} of the printed number elsewhere; a table may state a tolerance in "
    "their place. A measured number leads to its run: command, records, commit, machine. “Not run” leads to the run "
    "that would make it.\n"
)


def e(text: object) -> str:
    return html.escape(str(text), quote=True)


def md(text: str) -> str:
    """The little Markdown that labels use."""
    return re.sub(r"\*\*(.+?)\*\*", r"<b>\1</b>", e(text))


def place(scale: str, run: str) -> str:
    """Of a run on the page of runs; scales may give the same name to different runs."""
    return scale + "-" + re.sub(r"[^a-z0-9]+", "-", run.lower()).strip("-")


def number(value: float, std: float | None, digits: int) -> str:
    return f"{value:.{digits}f}" + (f" ± {std:.{digits}f}" if std is not None else "")


# ------------------------------------------------------------------------------------------------------------ agreement


def tolerance(table: dict, cell: dict) -> float:
    """How far a measured number may lie from the printed one."""
    stated = table["tolerance"]
    if stated is None:
        percent = any(word in table["unit"] for word in ("cent", "%", "point"))
        stated = POINTS if percent else SHARE * abs(cell["printed"])
    return max(stated, cell.get("printed_std", 0.0))


def kind(table: dict, cell: dict) -> str:
    """agree | outside | alone (printed number not known) | own (not a cell of the paper) | missing (not measured)."""
    if "measured" not in cell:
        return "missing"
    if "printed" not in cell:
        return "alone" if cell["expected"] else "own"
    far = abs(cell["measured"] - cell["printed"])
    return "agree" if far <= tolerance(table, cell) + 1e-9 else "outside"  # 46.9 - 45.8 is a little more than 1.1


def counts(report: dict, scale: str = "paper") -> dict[str, int]:
    """Of the paper's own cells: how many there are, have a printed number, agree, ..."""
    cells = [
        (t, c) for t in report["tables"] if t["scale"] == scale for row in t["cells"] for c in row if c["expected"]
    ]
    kinds = [kind(t, c) for t, c in cells]
    out = {k: kinds.count(k) for k in ("agree", "outside", "alone", "missing")}
    return {**out, "cells": len(cells), "printed": sum("printed" in c for _, c in cells)}


# ------------------------------------------------------------------------------------------------------- runs of a cell


def plain(text: str) -> str:
    return re.sub(r"[^a-z0-9]", "", str(text).lower())


def words(name: str, run: dict) -> tuple[set[str], set[str]]:
    """What a run says of itself: the words of its command; the parts of its name, alone and joined."""
    parts = name.split("-")
    joined = {"".join(parts[i:j]) for i in range(len(parts)) for j in range(i + 1, len(parts) + 1)}
    return {plain(w) for w in shlex.split(run["command"])}, {plain(w) for w in joined}


class Makers:
    """Which planned runs of a scale make a cell: those whose records stand in its table, narrowed by the names of its
    row, column and data set where runs name them."""

    def __init__(self, report: dict, scale: str):
        self.runs = report["runs"].get(scale, {})
        self.words = {name: words(name, run) for name, run in self.runs.items()}

    def of_table(self, table: dict) -> list[str]:
        names = table["where"].get("table", [])
        names = {*(names if isinstance(names, list) else [names])}
        return [n for n, run in self.runs.items() if names & {*run.get("makes", [run["table"]])}]

    def of_cell(self, table: dict, row: int, column: int) -> list[str]:
        found = self.of_table(table)
        fixed = [v for k, v in table["where"].items() if k != "table" and isinstance(v, str)]
        rows, columns = table.get("row_names", table["rows"]), table.get("column_names", table["columns"])
        for value in (*fixed, rows[row], columns[column]):
            by_command, by_name = ([n for n in found if plain(value) in self.words[n][i]] for i in (0, 1))
            found = by_command or by_name or found
        return found

    def hours(self, names: list[str]) -> float:
        return sum(self.runs[n]["hours"] for n in names)


# ----------------------------------------------------------------------------------------------------------------- HTML


def link(table: dict, run: str, text: str, title: str = "") -> str:
    told = f' title="{e(title)}"' if title else ""
    return f'<a href="runs.html#{place(table["scale"], run)}"{told}>{text}</a>'


def cell_html(table: dict, cell: dict, makers: Makers, row: int, column: int) -> str:
    digits, lines = table["digits"], []
    if "measured" in cell:
        text = number(cell["measured"], cell.get("std"), digits)
        lines.append(link(table, cell["runs"][0], text) if cell["runs"] else text)
        lines[-1] += f" <small>n={cell['n']}</small>"
    elif names := makers.of_cell(table, row, column):
        runs = names[0] if len(names) == 1 else f"{len(names)} runs, first {names[0]}"
        lines.append(link(table, names[0], "not run", f"{runs}: about {makers.hours(names):.3g} hours"))
    else:
        lines.append("not run")
    if "printed" in cell:
        gap = f" ({cell['measured'] - cell['printed']:+.{digits}f})" if "measured" in cell else ""
        lines.append(f"<small>printed {number(cell['printed'], cell.get('printed_std'), digits)}{gap}</small>")
    elif cell["expected"]:
        lines.append("<small>printed —</small>")
    other = [v for v in cell["variants"] if v not in ("paper", "generated", "wheel")]
    lines += [f"<small>data: {e(', '.join(other))}</small>"] if other else []
    return f'<td class="{kind(table, cell)}">{"<br>".join(lines)}</td>'


def table_html(table: dict, makers: Makers) -> str:
    if not any(table["cells"]):
        names = makers.of_table(table)
        told = ", " + link(table, names[0], "the runs that make them") if names else ""
        return f"<p>No records and no printed numbers{told}.</p>"
    head = "".join(f"<th>{md(c)}</th>" for c in table["columns"])
    rows = "".join(
        f"<tr><th>{md(r)}</th>{''.join(cell_html(table, c, makers, i, j) for j, c in enumerate(cells))}</tr>\n"
        for i, (r, cells) in enumerate(zip(table["rows"], table["cells"], strict=True))
    )
    wrap = '<div class="md-typeset__scrollwrap"><div class="md-typeset__table">'
    return (
        f'{wrap}<table class="cells"><thead><tr><th></th>{head}</tr></thead><tbody>\n{rows}</tbody></table></div></div>'
    )

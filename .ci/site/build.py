"""The report as a site: the folders' READMEs, results, figures, records and commands as linked pages.

    python build.py SITE FOLDER ...        # from the workspace's root, in the environment of requirements.txt

A folder that was reproduced has runs/<scale>/report.json, written with its RESULTS.md from the same records; of another
folder only README.md and RESULTS.md are shown. Nothing is measured or judged here.
"""

import html
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import yaml

HERE = Path(__file__).resolve().parent
KEY = (
    '<p class="key"><span class="agree">within</span><span class="outside">outside</span><span class="alone">printed '
    'number not known</span><span class="missing">not measured</span></p>\n'
    "\nWithin: the difference to the printed number is at most its printed ±, or {tolerance}, whichever is larger. A "
    "measured number leads to the run behind it.\n"
)
POINTS, SHARE = 1.0, 0.05  # tolerance where a table states none: points of per cent, else a share of the printed number


def latest(folder: Path) -> dict | None:
    """The report of the last reproduction: scale demo and paper are told by either."""
    found = [folder / "runs" / scale / "report.json" for scale in ("paper", "demo")]
    found = sorted((p for p in found if p.is_file()), key=lambda p: p.stat().st_mtime)
    if not found:
        return None
    try:
        return json.loads(found[-1].read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        sys.exit(f"{found[-1]}: not valid JSON ({error}); make reproduce-{folder.name} writes it anew")


def e(text: object) -> str:
    return html.escape(str(text), quote=True)


def anchor(run: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", run.lower()).strip("-")


def date(commit: str) -> str:
    done = subprocess.run(["git", "show", "-s", "--format=%cs", commit[:40]], capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else ""


# --------------------------------------------------------------------------------------------------------------- tables


def tolerance(table: dict, cell: dict) -> float:
    """How far a measured number may lie from the printed one."""
    stated = table["tolerance"]
    if stated is None:
        percent = any(word in table["unit"] for word in ("cent", "%", "point"))
        stated = POINTS if percent else SHARE * abs(cell["printed"])
    return max(stated, cell.get("printed_std", 0.0))


def kind(table: dict, cell: dict) -> str:
    """agree | outside | alone (printed number not known) | missing (not measured)."""
    if "measured" not in cell:
        return "missing"
    if "printed" not in cell:
        return "alone"
    return "agree" if abs(cell["measured"] - cell["printed"]) <= tolerance(table, cell) else "outside"


def number(value: float, std: float | None, digits: int) -> str:
    return f"{value:.{digits}f}" + (f" ± {std:.{digits}f}" if std is not None else "")


def planned_at(table: dict, report: dict) -> str:
    """Place on the runs page where the runs behind a table begin; empty if the plan names none."""
    names = table["where"].get("table", [])
    names = names if isinstance(names, list) else [names]
    here = {r["table"] for r in report["runs"].get(table["scale"], {}).values()}
    return next((anchor(f"table-{table['scale']}-{n}") for n in names if n in here), "")


def cell_html(table: dict, cell: dict, planned: str) -> str:
    digits, lines = table["digits"], []
    if "measured" in cell:
        text = number(cell["measured"], cell.get("std"), digits)
        lines.append(f'<a href="runs.html#{anchor(cell["runs"][0])}">{text}</a>' if cell["runs"] else text)
        lines[-1] += f" <small>n={cell['n']}</small>"
    else:
        lines.append(f'<a href="runs.html#{planned}">not run</a>' if planned else "not run")
    if "printed" in cell:
        gap = f" ({cell['measured'] - cell['printed']:+.{digits}f})" if "measured" in cell else ""
        lines.append(f"<small>printed {number(cell['printed'], cell.get('printed_std'), digits)}{gap}</small>")
    elif cell["expected"]:
        lines.append("<small>printed —</small>")
    other = [v for v in cell["variants"] if v not in ("paper", "generated", "wheel")]
    lines += [f"<small>data: {e(', '.join(other))}</small>"] if other else []
    return f'<td class="{kind(table, cell)}">{"<br>".join(lines)}</td>'


def table_html(table: dict, report: dict) -> str:
    planned = planned_at(table, report)
    head = "".join(f"<th>{md(c)}</th>" for c in table["columns"])
    rows = "".join(
        f"<tr><th>{md(r)}</th>{''.join(cell_html(table, c, planned) for c in cells)}</tr>\n"
        for r, cells in zip(table["rows"], table["cells"], strict=True)
    )
    wrap = '<div class="md-typeset__scrollwrap"><div class="md-typeset__table">'
    return (
        f'{wrap}<table class="cells"><thead><tr><th></th>{head}</tr></thead><tbody>\n{rows}</tbody></table></div></div>'
    )


def md(text: str) -> str:
    """The little Markdown that labels use."""
    return re.sub(r"\*\*(.+?)\*\*", r"<b>\1</b>", e(text))


def counts(report: dict, scale: str = "paper") -> dict[str, int]:
    cells = [
        (t, c) for t in report["tables"] if t["scale"] == scale for row in t["cells"] for c in row if c["expected"]
    ]
    kinds = [kind(t, c) for t, c in cells]
    out = {k: kinds.count(k) for k in ("agree", "outside", "alone", "missing")}
    return {**out, "cells": len(cells), "printed": sum("printed" in c for _, c in cells)}


# ---------------------------------------------------------------------------------------------------------------- pages


def without_links(text: str, images: str = "") -> str:
    """Links to files of the folder become plain words: they are not part of the site. Links to elsewhere stay."""
    text = re.sub(r"(?<!!)\[([^\]]+)\]\((?!https?:|#)[^)]*\)", r"\1", text)
    return re.sub(r"!\[([^\]]*)\]\((?!https?:)([^)]*/)?([^)/]+)\)", rf"![\1]({images}\3)", text)


def results_page(folder: str, report: dict | None, docs: Path) -> str:
    here = docs / folder
    pictures = sorted(Path(folder, "results", "figures").glob("*.png"))
    (here / "figures").mkdir(parents=True, exist_ok=True)
    for p in pictures:
        shutil.copy(p, here / "figures" / p.name)
    if report is None:
        text = Path(folder, "RESULTS.md")
        body = text.read_text(encoding="utf-8") if text.is_file() else f"# {folder}\n\nNothing was run yet.\n"
        note = f"\n\n!!! note\n    `make reproduce-{folder}` makes this page with links from every cell to its run.\n"
        head, _, rest = without_links(body, "figures/").partition("\n")
        return head + note + rest
    lines = [f"# {report['title']}", "", "[How it was built](readme.md) · [every run and its command](runs.md)", ""]
    lines += ["## Claims", "", "| | claim | source | scale | numbers | verdict |", "|---|---|---|---|---|---|"]
    for c in report["claims"]:
        look = {"holds": "held", "does not hold": "failed"}.get(c["verdict"], "")
        cells = [c["id"], c["text"], c["source"], c["scale"], c["numbers"]]
        shown = " | ".join(str(x).replace("|", "\\|") for x in cells)
        lines.append(f'| {shown} | <span class="{look}">{c["verdict"]}</span> |')
    stated = f"{POINTS:g} point (per cent), {SHARE:.0%} of it elsewhere, unless the table says otherwise"
    for scale, title in (("paper", "The paper's tables"), ("demo", "Demo"), ("smoke", "Smoke")):
        tables = [t for t in report["tables"] if t["scale"] == scale]
        if not tables:
            continue
        lines += ["", f"## {title}", ""]
        if scale == "paper":
            n = counts(report)
            lines += [KEY.format(tolerance=stated), ""]
            lines += [
                f"{n['cells']} cells, {n['printed']} with a printed number; {n['cells'] - n['missing']} measured: "
            ]
            lines += [f"{n['agree']} within, {n['outside']} outside, {n['alone']} without a printed number.", ""]
        for t in tables:
            own = f" Tolerance {t['tolerance']:g}." if t["tolerance"] is not None else ""
            lines += [f"### {t['title']}", "", t["note"] + own, ""]
            lines += [f"Unit: {t['unit']}." if t["unit"] else "", "", table_html(t, report), ""]
        for f in (f for f in report["figures"] if f["scale"] == scale):
            lines += [f"![{f['caption']}](figures/{Path(f['path']).name})", "", f"*{f['caption']}*", ""]
    return "\n".join(lines)


def runs_page(folder: str, report: dict, docs: Path) -> str:
    """The audit: each run with the command that makes it, its cost, what it lacks, and its records."""
    lines = [
        f"# Runs of {folder}",
        "",
        "Commands start in the folder. Hours are estimates for one device; seconds were measured.",
        "",
    ]
    for scale in ("paper", "demo", "smoke"):
        runs = report["runs"].get(scale, {})
        if not runs:
            continue
        done = sum(r["records"] > 0 for r in runs.values())
        hours = sum(r["hours"] for r in runs.values() if not r["records"])
        lines += [
            f"## Scale {scale}",
            "",
            f"{done} of {len(runs)} runs have records; the others: about {hours:.1f} hours.",
            "",
        ]
        begun = set()
        for name, r in runs.items():
            if r["table"] not in begun:  # where a table's cells without a record lead
                begun.add(r["table"])
                lines += [f'<a id="{anchor("table-" + scale + "-" + r["table"])}"></a>', ""]
            lines += [f"### {name} {{ #{anchor(name)} }}", "", "```sh", r["command"], "```", ""]
            state = (
                f"{r['records']} records, {r['seconds']:.0f} s"
                if r["records"]
                else f"not run, about {r['hours']:g} hours"
            )
            lines += [f"* table `{r['table']}`, {r['seeds']} seeds; {state}"]
            lines += [f"* needs `{n['path']}` from {n['origin']}" for n in r["needs"]]
            if r["records"]:
                commits = ", ".join(f"`{c[:10]}{'+changes' if '+' in c else ''}` {date(c)}" for c in r["commits"])
                lines += [f"* {', '.join(r['devices'])}; code {commits}; data {', '.join(r['data'])}"]
                file = record_file(folder, scale, name, docs)
                lines += [f'* <a href="{file}">records, a line each</a>'] if file else []
            lines.append("")
    return "\n".join(lines)


def record_file(folder: str, scale: str, name: str, docs: Path) -> str:
    """The records of a run, copied into the site; the link to them."""
    source = (
        Path(folder, "results", f"{name}.jsonl")
        if scale == "paper"
        else Path(folder, "runs", scale, name, "records.jsonl")
    )
    if not source.is_file():
        return ""
    target = docs / folder / "records" / f"{scale}-{anchor(name)}.jsonl"
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(source, target)
    return f"records/{target.name}"


def front(folders: list[str], reports: dict[str, dict | None]) -> str:
    readme = Path("README.md").read_text(encoding="utf-8")
    titles = dict(re.findall(r"^\| \[?`(\w+)`\]?(?:\(\w+\))? \| (.*?) \|", readme, re.M))
    lines = ["---", "hide: [navigation, toc]", "---", "", "# Ten papers, reproduced", ""]
    lines += ["Printed numbers beside measured ones, and the run behind each.", ""]
    lines += ["| paper | claims held: demo | paper | cells: all | printed | measured | within | outside | records |"]
    lines += ["|---" * 9 + "|"]
    for folder in folders:
        title, report = titles.get(folder, ""), reports.get(folder)
        if not Path(folder, "requirements.in").is_file():
            lines.append(f"| **{folder}**: {title} | not here yet | | | | | | | |")
            continue
        if report is None:
            lines.append(f"| [**{folder}**]({folder}/index.md): {title} | not reproduced here | | | | | | | |")
            continue
        held = []
        for scale in ("demo", "paper"):
            mine = [c for c in report["claims"] if c["scale"] == scale]
            known = [c for c in mine if c["verdict"] != "not measured"]
            left = f", {len(mine) - len(known)} not measured" if len(known) < len(mine) else ""
            held.append(f"{sum(c['verdict'] == 'holds' for c in known)} of {len(known)}{left}" if mine else "")
        n = counts(report)
        runs = [r for by_name in report["runs"].values() for r in by_name.values() if r["records"]]
        commits = sorted({c[:10] for r in runs for c in r["commits"]})
        when = sorted(filter(None, (date(c) for c in commits)))
        machines = ", ".join(sorted({d for r in runs for d in r["devices"]}))
        origin = f"{machines}; {when[-1] if when else ''} `{commits[-1] if commits else ''}`" if runs else ""
        lines.append(
            f"| [**{folder}**]({folder}/index.md): {title} | {held[0]} | {held[1]} | {n['cells']} | {n['printed']} | "
            f"{n['cells'] - n['missing']} | {n['agree']} | {n['outside']} | {origin} |"
        )
    lines += [
        "",
        "Cells are those of the paper's tables; only records of scale paper stand in them. Each page has demo tables.",
        "",
    ]
    lines += ["## A printed number that is missing", "", "Add a line to `X/paper.csv`:", "", "```csv"]
    lines += ["table,dataset,setting,method,metric,value,std,unit,source", "```", ""]
    lines += ["with where it is printed, then `cd X && .venv/bin/python tables.py --scale paper` and `make report`. "]
    lines += ["Nothing is run again; a malformed line is named by its number.", ""]
    return "\n".join(lines)


def section(folder: str, heading: str) -> str:
    """The body of a section of a folder's README; empty if it has none."""
    readme = Path(folder, "README.md")
    text = readme.read_text(encoding="utf-8") if readme.is_file() else ""
    found = re.search(rf"^## {heading}\n(.*?)(?=^## |\Z)", text, re.M | re.S)
    return without_links(found[1].strip()) if found else ""


def differences(folders: list[str], reports: dict[str, dict | None]) -> str:
    """Where paper, released code and this code differ, with the switches, paper by paper."""
    lines = ["# Paper, released code and this code", ""]
    lines += ["What decides a number although the paper does not say it: findings, the switch that chooses and, where "]
    lines += ["records tell, its effect (mean over seeds of paired differences); then the folders' own words.", ""]
    for folder in folders:
        found = (reports[folder] or {}).get("differences", [])
        table = ["| finding | switch | effect of the switch |", "|---|---|---|"]
        table += [f"| {d['finding']} | {d['switch']} | {d['effect']} |" for d in found]
        parts = [section(folder, h) for h in ("(?:Implementation d|D)etails that matter", "Deviations and open points")]
        if found or any(parts):
            lines += [f"## {folder}", "", *(table if found else []), "", *(p for part in parts for p in (part, ""))]
    return "\n".join(lines)


def main() -> None:
    site, *folders = sys.argv[1:]
    source = Path(".tools/site-src")
    shutil.rmtree(source, ignore_errors=True)
    docs = source / "docs"
    docs.mkdir(parents=True)
    reports = {f: latest(Path(f)) for f in folders}
    nav: list = [{"Overview": "index.md"}]
    for folder in folders:
        if not Path(folder, "requirements.in").is_file():
            continue
        here, pages = docs / folder, []
        here.mkdir()
        (here / "index.md").write_text(results_page(folder, reports[folder], docs), encoding="utf-8")
        pages.append({"Results": f"{folder}/index.md"})
        if reports[folder]:
            (here / "runs.md").write_text(runs_page(folder, reports[folder], docs), encoding="utf-8")
            pages.append({"Runs": f"{folder}/runs.md"})
        readme = Path(folder, "README.md")
        if readme.is_file():
            text = readme.read_text(encoding="utf-8")
            for name in re.findall(r"!\[[^\]]*\]\((?!https?:)([^)]+)\)", text):
                shutil.copy(Path(folder, name), here / Path(name).name)
            (here / "readme.md").write_text(without_links(text), encoding="utf-8")
            pages.append({"README": f"{folder}/readme.md"})
        nav.append({folder: pages})
    (docs / "differences.md").write_text(differences(folders, reports), encoding="utf-8")
    nav.insert(1, {"Differences": "differences.md"})
    (docs / "index.md").write_text(front(folders, reports), encoding="utf-8")
    shutil.copy(HERE / "style.css", docs / "style.css")
    # From the file system the theme would fetch a stand-in for Worker from a CDN, unless there is one of this name.
    shutil.copy(HERE / "iframe-worker.js", docs / "iframe-worker.js")
    palette = [
        {"scheme": s, "toggle": {"icon": f"material/{i}", "name": f"to {n}"}, "media": f"(prefers-color-scheme: {m})"}
        for s, i, n, m in (("default", "weather-night", "dark", "light"), ("slate", "weather-sunny", "light", "dark"))
    ]
    config = {
        **{
            "site_name": "Ten papers, reproduced",
            "docs_dir": "docs",
            "site_dir": str(Path(site).absolute()),
            "nav": nav,
        },
        "theme": {
            **{"name": "material", "font": False, "palette": palette},
            "features": ["navigation.tabs", "navigation.sections", "navigation.top", "search.highlight", "toc.follow"],
        },
        **{"use_directory_urls": False, "extra_css": ["style.css"], "plugins": ["search", "offline"]},
        "extra": {"polyfills": ["iframe-worker.js"]},
        "markdown_extensions": [
            "tables",
            "attr_list",
            "admonition",
            "pymdownx.superfences",
            {"toc": {"permalink": True}},
        ],
    }
    (source / "mkdocs.yml").write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "-f", str(source / "mkdocs.yml")]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}  # about a successor
    sys.exit(subprocess.run(command, env=environment).returncode)


if __name__ == "__main__":
    main()

"""The report as a site: the folders' READMEs, results, figures, records and commands as linked pages.

    python build.py SITE FOLDER ...        # from the workspace's root, in the environment of requirements.txt

It shows what is committed: results/report.json, written by `make record-X` with RESULTS.md from the same records. Where
runs were made again on this machine, a line says how they compare. Nothing is measured or judged here.
"""

import csv
import functools
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import front
import yaml
from cells import KEY, Makers, counts, e, place, table_html

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent))
from workspace import lacking  # noqa: E402

NONE = "—"
SCALES = {"real": "Scale real", "demo": "Scale demo", "paper": "The paper's tables"}


def committed(folder: Path) -> dict | None:
    """What `make record-X` wrote with RESULTS.md, from the same records."""
    path = folder / "results" / "report.json"
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        sys.exit(f"{path}: not valid JSON ({error}); take it back from git, or make record-{folder.name}")


def reproduced(folder: Path) -> list[str]:
    """What reproductions on this machine gave beside the committed records, a line a scale."""
    lines = []
    for scale in SCALES:
        path = folder / "runs" / scale / "comparison.json"
        if path.is_file():
            told = json.loads(path.read_text(encoding="utf-8"))["line"].partition(": ")[2]
            lines.append(f"* Reproduced here, scale {scale}: {e(told)}.")
    return lines


@functools.cache
def date(commit: str) -> str:
    done = subprocess.run(["git", "show", "-s", "--format=%cs", commit], capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else ""


def commits(runs: list[dict]) -> list[str]:
    """`day commit` of the code that made the records, newest first; +changes: not all of it was committed."""
    found = {c for r in runs for c in r["commits"]}
    told = [(date(c.split("+")[0]), c[:10] + ("+changes" if "+" in c else "")) for c in found]
    return [f"{day or 'date not known'} `{c}`" for day, c in sorted(told, reverse=True)]


def provenance(report: dict, scale: str) -> str:
    """One line on the records of a scale: how many, data and its variant, machine, code."""
    runs = report["runs"].get(scale, {})
    mine = [r for r in runs.values() if r["records"]]
    if not mine:
        return "No records of this scale here."
    data, devices = (sorted({x for r in mine for x in r[key]}) for key in ("data", "devices"))
    hours = sum(r["seconds"] for r in mine) / 3600
    told = (
        f"{sum(r['records'] for r in mine)} records of {len(mine)} of the {len(runs)} planned runs, {hours:.2f} hours."
    )
    return f"{told} Data: {e(', '.join(data))}. Machine: {e('; '.join(devices))}. Code: {', '.join(commits(mine))}."


# ---------------------------------------------------------------------------------------------------------------- pages


def without_links(text: str, images: str = "") -> str:
    """Links to files of the folder become plain words: they are not part of the site. Links to elsewhere stay."""
    text = re.sub(r"(?<!!)\[([^\]]+)\]\((?!https?:|#)[^)]*\)", r"\1", text)
    return re.sub(r"!\[([^\]]*)\]\((?!https?:)([^)]*/)?([^)/]+)\)", rf"![\1]({images}\3)", text)


def figures(report: dict, scale: str | None) -> list[str]:
    lines = []
    for f in (f for f in report["figures"] if f["scale"] == scale):
        lines += [f"![{f['caption']}](figures/{Path(f['path']).name})", "", f"*{f['caption']}*", ""]
    return lines


def results_page(folder: str, report: dict | None, docs: Path) -> str:
    here = docs / folder
    kinds = {".png", ".jpg", ".webp", ".svg"}
    pictures = sorted(p for p in Path(folder, "results", "figures").glob("*") if p.suffix in kinds)
    (here / "figures").mkdir(parents=True, exist_ok=True)
    for p in pictures:
        shutil.copy(p, here / "figures" / p.name)
    if report is None:
        text = Path(folder, "RESULTS.md")
        body = text.read_text(encoding="utf-8") if text.is_file() else f"# {folder}\n\nNothing was run yet.\n"
        note = f"\n\n!!! note\n    `make record-{folder}` makes this page with links from every cell to its run.\n"
        head, _, rest = without_links(body, "figures/").partition("\n")
        return head + note + rest
    lines = ["---", f"title: Results of {folder}", "---", "", f"# {report['title']}", ""]
    lines += ["[How it was built](readme.md) · [every run and its command](runs.md) · "]
    lines += ["[where paper and released code differ](../differences.md)", "", *reproduced(Path(folder)), ""]
    lines += [f"**{' '.join(map(e, report['finding']))}**", ""] if report.get("finding") else []
    first = next((x for x in front.SCALES if any(f["scale"] == x for f in report["figures"])), None)
    lines += figures(report, first)
    lines += ["## Claims", "", front.claims(report["claims"]), ""]
    for scale, title in SCALES.items():
        tables = [t for t in report["tables"] if t["scale"] == scale]
        if not tables:
            continue
        lines += ["", f"## {title}", ""]
        if scale == "paper":
            n = counts(report)
            lines += [KEY, ""]
            lines += [
                f"{n['cells']} cells, {n['printed']} with a printed number; {n['cells'] - n['missing']} measured: "
            ]
            lines += [f"{n['agree']} within, {n['outside']} outside, {n['alone']} without a printed number.", ""]
        lines += [provenance(report, scale), ""]
        lines += figures(report, scale) if scale != first else []
        makers = Makers(report, scale)
        for t in tables:
            own = f" Tolerance {t['tolerance']:g}." if t["tolerance"] is not None else ""
            lines += [f"### {t['title']}", "", t["note"] + own, ""]
            lines += [f"Unit: {t['unit']}." if t["unit"] else "", "", table_html(t, makers), ""]
    return "\n".join([*lines, *facts(Path(folder))])


def facts(folder: Path) -> list[str]:
    """The printed numbers that plan.yaml lists as facts: settings and other recipes, which no run can fill."""
    plan, printed = folder / "plan.yaml", folder / "paper.csv"
    names = yaml.safe_load(plan.read_text(encoding="utf-8")).get("facts", []) if plan.is_file() else []
    if not names or not printed.is_file():
        return []
    with printed.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    lines = ["", "## Printed elsewhere", "", "Numbers of other sources and recipes; no run here can fill them.", ""]
    for name in names:
        own = [r for r in rows if r["table"] == name]
        head = ("dataset", "setting", "method", "metric", "value", "unit", "source")
        body = [f"<tr>{''.join(f'<td>{e(r[k] or NONE)}</td>' for k in head)}</tr>" for r in own]
        title = f"{e(name.replace('-', ' ').replace('_', ' '))}: {len(own)} numbers"
        lines += [f"<details><summary>{title}</summary>{front.table(head, body)}</details>", ""]
    return lines


def runs_page(folder: str, report: dict, docs: Path) -> str:
    """The audit: each run with the command that makes it, its cost, what it lacks, and its records."""
    lines = [
        *("---", f"title: Runs of {folder}", "---", ""),
        f"# Runs of {folder}",
        "",
        f"Commands start in the folder `{folder}`; `python` is that of its environment, `.venv/bin/python`. Hours are "
        "estimates for one device; seconds were measured.",
        "",
    ]
    for scale in SCALES:
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
        for name, r in runs.items():
            lines += [f"### {name} {{ #{place(scale, name)} }}", "", "```sh", r["command"], "```", ""]
            state = (
                f"{r['records']} records, {r['seconds']:.0f} s"
                if r["records"]
                else f"not run, about {r['hours']:g} hours"
            )
            tables = ", ".join(f"`{t}`" for t in r.get("makes", [r["table"]])) or "its default"
            lines += [f"* table {tables}, {r['seeds']} seed{'s' * (r['seeds'] != 1)}; {state}"]
            gone = lacking(folder, r)
            lines += [f"* needs `{n['path']}` from {n['origin']}" for n in r["needs"]]
            lines += [f"* not here: {', '.join(f'`{path}`' for path in gone)}"] if gone else []
            if r["records"]:
                lines += [
                    f"* {e(', '.join(r['devices']))}; code {', '.join(commits([r]))}; data {e(', '.join(r['data']))}"
                ]
                file = record_file(folder, scale, name, docs)
                lines += [f'* <a href="{file}">records, a line each</a>'] if file else []
            lines.append("")
    return "\n".join(lines)


def record_file(folder: str, scale: str, name: str, docs: Path) -> str:
    """The committed records of a run, copied into the site; the link to them."""
    one = Path(folder, "results", "paper", f"{name}.jsonl")
    source = one if scale == "paper" else Path(folder, "results", f"{scale}.jsonl")
    if not source.is_file():
        return ""
    lines = source.read_text(encoding="utf-8").splitlines(keepends=True)
    mine = [x for x in lines if json.loads(x).get("run", name) == name]
    target = docs / folder / "records" / f"{place(scale, name)}.jsonl"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text("".join(mine), encoding="utf-8")
    return f"records/{target.name}"


def front_page(folders: list[str], reports: dict[str, dict | None]) -> str:
    readme = Path("README.md").read_text(encoding="utf-8")
    titles = dict(re.findall(r"^\| \[?`(\w+)`\]?(?:\(\w+\))? \| (.*?) \|", readme, re.M))
    there = [f for f in folders if Path(f, "requirements.in").is_file()]
    plain = {f: re.sub(r"[*_]", "", titles.get(f, "")) for f in there}
    cards = "\n".join(front.card(f, plain[f], reports[f], date) for f in there)
    out = front.FRONT.replace("{cards}", cards).replace("{controls}", front.controls(there, reports))
    return out.replace("{measured}", front.measured(there, reports, lacking))


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
        table += [f"| {e(d['finding'])} | {d['switch']} | {e(d['effect'])} |" for d in found]
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
    reports = {f: committed(Path(f)) for f in folders}
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
            title = f"---\ntitle: README of {folder}\n---\n\n"
            (here / "readme.md").write_text(title + without_links(text), encoding="utf-8")
            pages.append({"README": f"{folder}/readme.md"})
        nav.append({folder: pages})
    (docs / "differences.md").write_text(differences(folders, reports), encoding="utf-8")
    nav.insert(1, {"Differences": "differences.md"})
    if Path("CONTRIBUTING.md").is_file():
        text = Path("CONTRIBUTING.md").read_text(encoding="utf-8")
        (docs / "contributing.md").write_text(without_links(text), encoding="utf-8")
        nav.append({"Contributing": "contributing.md"})
    (docs / "index.md").write_text(front_page(folders, reports), encoding="utf-8")
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
            "features": [
                "navigation.tabs",
                "navigation.sections",
                "navigation.top",
                "search.highlight",
                "toc.follow",
                "content.code.copy",
            ],
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

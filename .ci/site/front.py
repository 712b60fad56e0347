"""The front page: a card a paper, the controls that could break the papers' explanations, and what is measured."""

import sys
from pathlib import Path

from cells import counts, e

sys.path.append(str(Path(__file__).resolve().parents[1]))
import workspace  # noqa: E402

SCALES = ("real", "paper", "demo")  # the scale that tells most, first
WORDS = {"holds": "held", "undecided": "open", "does not hold": "failed", "not measured": "unknown"}


def verdicts(report: dict, scale: str) -> dict[str, int]:
    """How many claims and controls of a scale have each verdict; empty while none is measured."""
    mine = [c["verdict"] for c in report["claims"] if c["scale"] == scale]
    return {word: mine.count(word) for word in WORDS if word in mine} if set(mine) - {"not measured"} else {}


def told(report: dict, scale: str) -> str:
    """`6 hold, 5 undecided; controls: 1 holds`, as README's table of findings says it."""
    return workspace.verdicts([c for c in report["claims"] if c["scale"] == scale])


def finding(report: dict) -> str:
    """The first sentence that the folder makes of its records; without one, what its claims came to."""
    said = report.get("finding") or []
    if said:
        return said[0]
    best = next((s for s in SCALES if verdicts(report, s)), None)
    return f"Scale {best}, claims: {told(report, best)}." if best else "No records yet."


def bar(report: dict, scale: str) -> str:
    """The verdicts of a scale as a bar whose parts are as long as they are many."""
    found = verdicts(report, scale)
    if not found:
        return ""
    parts = "".join(f'<i class="{WORDS[word]}" style="flex:{n}"></i>' for word, n in found.items())
    return f'<div class="bar"><span>{scale}</span><b>{parts}</b><span>{told(report, scale)}</span></div>'


def origin(report: dict, date) -> str:
    """Data with its variants, and the day of the newest code, of the best scale that has records."""
    for scale in SCALES:
        runs = [r for r in report["runs"].get(scale, {}).values() if r["records"]]
        if runs:
            data = sorted({d for r in runs for d in r["data"]})
            days = sorted({date(c.split("+")[0]) for r in runs for c in r["commits"]})
            more = f" and {len(data) - 3} more" if data[3:] else ""
            return f"{scale}: {e(', '.join(data[:3]))}{more}; {e(days[-1] or 'day not known')}"
    return ""


def picture(folder: str, report: dict) -> str:
    """The first figure of the best scale that has one."""
    for scale in SCALES:
        for f in report["figures"]:
            if f["scale"] == scale:
                name = Path(f["path"]).name
                return f'<img src="{folder}/figures/{e(name)}" alt="{e(f["caption"])}" loading="lazy">'
    return ""


def card(folder: str, title: str, report: dict | None, date) -> str:
    """A paper: its figure, the finding, its verdicts, where the numbers come from."""
    head = f"<h3>{e(folder)}</h3><p class='title'>{e(title)}</p>"
    if report is None:
        return f'<a class="card" href="{folder}/index.html">{head}<p>No committed records.</p></a>'
    bars = "".join(bar(report, s) for s in SCALES)
    inner = f"{picture(folder, report)}{head}<p>{e(finding(report))}</p>{bars}<small>{origin(report, date)}</small>"
    return f'<a class="card" href="{folder}/index.html">{inner}</a>'


def controls(folders: list[str], reports: dict[str, dict | None]) -> str:
    """Controls with the explanation that they could break; those of scale real where there are some."""
    rows = []
    for folder in folders:
        mine = [c for c in (reports[folder] or {"claims": []})["claims"] if c.get("control") and c.get("explanation")]
        mine = [c for c in mine if c["verdict"] != "not measured"]
        scale = next((s for s in SCALES if any(c["scale"] == s for c in mine)), None)
        for c in (c for c in mine if c["scale"] == scale):
            look = f'<span class="{WORDS[c["verdict"]]}">{e(c["verdict"])}</span>'
            shown = [c["explanation"], c["text"], c["numbers"] or "—"]
            cells = "".join(f"<td>{e(x)}</td>" for x in shown)
            rows.append(
                f'<tr><td><a href="{folder}/index.html">{e(folder)}</a></td>{cells}<td>{look}<br>{scale}</td></tr>'
            )
    if not rows:
        return "No control was measured yet."
    return table(("paper", "its explanation", "control", "measured", "verdict"), rows)


def claims(said: list[dict]) -> str:
    """The claims and controls of a paper, those of the scale that tells most first."""
    rows = []
    for c in sorted(said, key=lambda c: SCALES.index(c["scale"]) if c["scale"] in SCALES else len(SCALES)):
        what = f"Control: {c['text']}" if c.get("control") else c["text"]
        where = f"<small>{e(c['scale'])}; {e(c['source'])}</small>"
        look = f'<span class="{WORDS[c["verdict"]]}">{e(c["verdict"])}</span>'
        rows.append(
            f"<tr><td>{e(c['id'])}</td><td>{e(what)}<br>{where}</td><td>{e(c['numbers'])}</td><td>{look}</td></tr>"
        )
    return table(("", "claim", "mean ± 95 % interval", "verdict"), rows)


def table(head: tuple[str, ...], rows: list[str]) -> str:
    body = f"<thead><tr>{''.join(f'<th>{x}</th>' for x in head)}</tr></thead><tbody>{''.join(rows)}</tbody>"
    return f'<div class="wide"><table class="cells words">{body}</table></div>'


def measured(folders: list[str], reports: dict[str, dict | None], lacking) -> str:
    """How much of the papers' tables is known, measured, and ready to be measured."""
    head = ["paper", "cells", "printed", "measured", "within", "outside", "runs: recorded / ready / all"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for folder in folders:
        report = reports[folder]
        if report is None:
            lines.append(f"| {folder} |" + " |" * (len(head) - 1))
            continue
        n, paper = counts(report), report["runs"].get("paper", {}).values()
        ready = sum(not r["records"] and not lacking(folder, r) for r in paper)
        cells = [f"[{folder}]({folder}/index.md)", n["cells"], n["printed"], n["cells"] - n["missing"], n["agree"]]
        cells += [n["outside"], f"{sum(r['records'] > 0 for r in paper)} / {ready} / {len(paper)}"]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


FRONT = """\
---
hide: [navigation, toc]
---

# Ten papers, reproduced

Ten papers, each with its method in one file, the baselines it is compared with, and controls that could break its own
explanation. Every number here was made from a committed record: a method, a seed, its data, its code, its machine.

<div class="cards-grid">
{cards}
</div>

<p class="key-bar"><i class="held"></i> holds <i class="open"></i> undecided <i class="failed"></i> does not hold
<i class="unknown"></i> not measured: a claim is a difference with a threshold, judged by its 95 % interval.</p>

## What was learnt across the ten papers

A paper says why its method works. A control takes that reason away and keeps everything else; if the gain stays, the
reason was another one. Controls are ours; "holds" means that the paper's explanation withstood this one.

{controls}

## How much of the papers' tables is measured

{measured}

Cells are those of the paper's tables and of tables of other sources quoted beside them; printed: the number is known;
measured: there are records of scale paper, within or outside the tolerance that the paper's page states. Runs: with
records / with all data and weights here but without records / in all. [Differences](differences.md) says where paper
and released code differ, by which switch one chooses, and what that is worth.
"""

"""What the Makefile needs and a shell cannot do well: stamps, counts, comparisons. Standard library only."""

import ast
import hashlib
import json
import os
import platform
import re
import sys
import xml.etree.ElementTree as xml
from pathlib import Path


def stamp(lock):
    """What an environment was made from: it is built anew when this line changes."""
    return hashlib.sha256(Path(lock).read_bytes()).hexdigest() + " " + platform.python_version()


def cache():
    """The user's uv cache if hard links from it work, else one in the workspace: ten environments share one torch."""

    def device(path):
        while not path.exists():
            path = path.parent
        return path.stat().st_dev if os.access(path, os.W_OK) else None

    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    user = Path(os.environ.get("UV_CACHE_DIR") or os.path.join(home, "uv")).absolute()
    return str(user if device(user) == os.stat(".").st_dev else Path(".cache/uv").absolute())


def closing(folder, scale, seconds):
    """The closing line of a folder that ran through."""
    s = json.loads(Path(folder, "runs", scale, "summary.json").read_text())
    return (
        f"{folder}: {s['claims_held']}/{s['claims_total']} claims hold, {int(seconds) / 60:.1f} minutes, {s['results']}"
    )


def count(*results):
    """Sums the tests of the folders. `gpl=2` is the folder's exit code: other than 0 without a failed test (nothing
    collected, a crash, no environment) it counts as one failure."""
    total = [0, 0, 0]
    for result in results:
        folder, code = result.split("=")
        try:
            suites = list(xml.parse(f"{folder}/runs/junit.xml").getroot().iter("testsuite"))
        except (OSError, xml.ParseError):
            suites, code = [], "1"
        tests, failures, errors, skipped = (
            sum(int(suite.get(key, 0)) for suite in suites) for key in ("tests", "failures", "errors", "skipped")
        )
        failed = failures + errors
        line = max(0, tests - failed - skipped), max(failed, int(code != "0")), skipped
        print("{}: {} passed, {} failed, {} skipped".format(folder, *line))
        total = [a + b for a, b in zip(total, line, strict=True)]
    return "{} passed, {} failed, {} skipped".format(*total)


def lint(here, folders, *twins):
    """Twins that differ, imports across folders, locks that name an index: a line each."""
    here, problems = here.split(), []
    for group in twins:  # "attacks.py models.py: aaer lap"
        names, where = (part.split() for part in group.split(":"))
        for name in names:
            paths = [Path(folder, name) for folder in where if folder in here]
            first = next((path for path in paths if path.exists()), None)
            for path in paths if first else []:
                if not path.exists():
                    problems.append(f"{path}: missing, its twin {first} is there")
                elif path.read_bytes() != first.read_bytes():
                    problems.append(f"{path}: differs from its twin {first}")
    for folder in here:
        others = set(folders.split()) - {folder}
        outside = re.compile(r"\.\./(shared|{})\b".format("|".join(map(re.escape, others))))
        for path in sorted(Path(folder).rglob("*")):
            inner = path.relative_to(folder).parts
            if inner[0] in ("runs", "data", "results") or any(part.startswith(".") for part in inner):
                continue
            if path.is_file() and (path.suffix in (".py", ".yaml") or path.name == "Snakefile"):
                text = path.read_text(encoding="utf-8")
                for number, line in enumerate(text.splitlines(), 1):
                    if outside.search(line):
                        problems.append(f"{path}:{number}: reaches outside its folder")
                if path.suffix == ".py":
                    problems += [
                        f"{path}:{number}: imports the folder {name}/" for number, name in imports(text, folder, others)
                    ]
        lock = Path(folder, "requirements.txt")
        if not lock.exists():
            problems.append(f"{lock}: missing: make lock-{folder}")
        elif re.search(r"^--|://", lock.read_text(), re.MULTILINE):
            problems.append(f"{lock}: names a package index: make lock-{folder}")
    return "\n".join(problems)


def imports(text, folder, others):
    """Lines that import a module named like another folder, unless the folder has a module of that name itself."""
    try:
        nodes = list(ast.walk(ast.parse(text)))
    except SyntaxError:  # ruff has named it
        return
    for node in nodes:
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        for name in {name.split(".")[0] for name in names} & others:
            if not Path(folder, name + ".py").exists():
                yield node.lineno, name


def lacking(folder, run):
    """Paths of data and weights that a run of report.json needs and that are not here."""
    root = os.environ.get("REPRO_DATA")
    place = Path(root).expanduser() if root else Path(folder, "data")
    return sorted(n["path"] for n in run["needs"] if not (place / n["path"]).exists())


def audit(*folders):
    """The runs of scale paper that have no records yet: commands, hours, data that is missing; then where paper and
    released code differ, with the switch that chooses and its effect."""
    lines = []
    for folder in folders:
        found = sorted(Path(folder).glob("runs/*/report.json"), key=lambda p: p.stat().st_mtime)
        if not found:
            lines.append(f"{folder}: {f'make reproduce-{folder} first' if Path(folder).is_dir() else 'not here yet'}")
            continue
        report = json.loads(found[-1].read_text(encoding="utf-8"))
        runs = report["runs"].get("paper", {})
        left = {name: r for name, r in runs.items() if not r["records"]}
        hours = sum(r["hours"] for r in left.values())
        lines.append(f"{folder}: {len(runs) - len(left)} of {len(runs)} runs have records, {hours:.1f} hours left")
        for name, r in left.items():
            lack = lacking(folder, r)
            tables = ", ".join(r.get("makes", [r["table"]]))
            lines.append(f"  {name} (table {tables}): {r['hours']:g} h{'; missing ' + ', '.join(lack) if lack else ''}")
            lines.append(f"    cd {folder} && .venv/bin/{r['command']}")
        for d in report.get("differences", []):
            lines.append(f"  differs: {d['finding']}")
            lines.append(f"    switch: {d['switch']}{'; effect: ' + d['effect'] if d['effect'] else ''}")
    return "\n".join(lines)


if __name__ == "__main__":
    command = {f.__name__: f for f in (stamp, cache, closing, count, lint, audit)}[sys.argv[1]]
    answer = command(*sys.argv[2:])
    if answer:
        try:
            print(answer, flush=True)
        except BrokenPipeError:  # the reader left (`make audit | head`)
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(command is lint and bool(answer))

"""What the Makefile needs and a shell cannot do well: stamps, counts, comparisons. Standard library only."""

import ast
import fcntl
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import threading
import time
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


def wait(what):
    """Takes the lock of file 9, which the calling shell holds open; says so where another make has it."""
    try:
        fcntl.flock(9, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print(f"waiting for another make: {what}", file=sys.stderr, flush=True)
        fcntl.flock(9, fcntl.LOCK_EX)


def closing(folder, scale, seconds):
    """The closing line of a folder that ran through."""
    path = Path(folder, "runs", scale, "comparison.json")
    line = json.loads(path.read_text())["line"] if path.is_file() else f"{folder}: ran through"
    return f"{line}; {int(seconds) / 60:.1f} minutes"


def tell(*lines):
    print(*lines, sep="\n", file=sys.stderr, flush=True)


def side_by_side(jobs, folders, size, work):
    """`work(folder, environment)` for each folder, so many at a time, the largest first."""
    flags = os.environ.get("MAKEFLAGS", "").split()
    flags = [w for w in flags if not w.startswith(("-j", "--jobserver"))]  # these processes share no tokens
    environment = {**os.environ, "MAKEFLAGS": " ".join(flags)}
    left = sorted(folders, key=size, reverse=True)

    def loop():
        while left:
            work(left.pop(0), environment)

    threads = [threading.Thread(target=loop) for _ in range(int(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def together(jobs, make, target, *folders):
    """`make TARGET-X` for each folder, so many at a time; the lines of one stay together. -> `X=code ...`"""
    codes, printing = {}, threading.Lock()

    def size(folder):
        return sum(p.stat().st_size for p in Path(folder, "tests").rglob("*.py"))

    def work(folder, environment):
        with printing:
            tell(f"=== {target}: {folder} begins")
        pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        done = subprocess.run([*make.split(), f"{target}-{folder}"], env=environment, **pipes)
        codes[folder] = done.returncode
        with printing:
            tell(f"=== {target}: {folder}")
            sys.stderr.buffer.write(done.stdout)
            tell(f"=== {target}: {folder} ended with {done.returncode}")

    side_by_side(jobs, folders, size, work)
    print(" ".join(f"{'.ci' if f == 'report' else f}={codes[f]}" for f in folders))
    sys.exit(int(any(codes.values())))


def reproduce(jobs, make, scale, *folders):
    """`make reproduce-X` for each folder, so many at a time, one run of each: one folder's start and tables leave a
    core that another's runs take. What they print goes to their logs. -> their closing lines."""
    lines, codes, began = {}, {}, time.monotonic()

    def size(folder):
        """Seconds of its committed runs, whose records each hold their run's."""
        path, seconds = Path(folder, "results", f"{scale}.jsonl"), {}
        for record in map(json.loads, path.read_text().splitlines() if path.is_file() else []):
            run = record["run"], record["seed"]
            seconds[run] = max(seconds.get(run, 0), record["seconds"])
        return sum(seconds.values())

    def work(folder, environment):
        log, start = Path(folder, "runs", f"reproduce-{scale}.log"), time.monotonic()
        log.parent.mkdir(parents=True, exist_ok=True)
        tell(f"=== reproduce: {folder} at scale {scale} begins, log in {log}")
        with open(log, "w") as out:
            given = {"env": environment, "stdin": subprocess.DEVNULL, "stdout": out, "stderr": subprocess.STDOUT}
            codes[folder] = subprocess.run([*make.split(), "JOBS=1", f"reproduce-{folder}"], **given).returncode
        try:
            line = f"{folder}: FAILED, see {log}" if codes[folder] else closing(folder, scale, time.monotonic() - start)
        except (OSError, ValueError, KeyError) as error:
            codes[folder], line = 1, f"{folder}: FAILED, its comparison cannot be read ({error}); see {log}"
        lines[folder] = line
        tell(f"{line} ({len(codes)} of {len(folders)}, {(time.monotonic() - began) / 60:.0f} minutes)")

    side_by_side(jobs, folders, size, work)
    print(*(lines[f] for f in folders), sep="\n")
    sys.exit(int(any(codes.values())))


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


def twins(group):
    """ "lab models.py: aaer lap" -> (names of files below a folder, folders). A folder stands for the files in it."""
    names, where = (part.split() for part in group.split(":"))
    out = []
    for name in names:
        inside = {
            p.relative_to(folder).as_posix()
            for folder in where
            for p in Path(folder, name).rglob("*")
            if p.is_file() and "__pycache__" not in p.parts
        }
        out += sorted(inside) or [name]
    return out, where


def sync(source, here, *groups):
    """Copies the twins of a folder to the others that have them; what the source lacks goes there too."""
    lines = []
    for names, where in map(twins, groups):
        if source not in where:
            continue
        for name in names:
            for folder in set(where) & set(here.split()) - {source}:
                from_, to = Path(source, name), Path(folder, name)
                if not from_.exists():
                    to.unlink(missing_ok=True)
                elif not to.exists() or to.read_bytes() != from_.read_bytes():
                    to.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copy(from_, to)
                    lines.append(str(to))
    return "\n".join(sorted(lines)) or "nothing differs"


LONGEST = 400  # lines of a module


def circles(folder):
    """Modules of a folder that import each other in a circle, inside functions too."""
    root = Path(folder)
    skip = {"tests", "runs", "data", "results"}
    modules = {}
    for path in root.rglob("*.py"):
        inner = path.relative_to(root).parts
        if not (skip & set(inner) or any(part.startswith(".") for part in inner)):
            name = ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
            modules[name] = path
    reach = {}
    for name, path in modules.items():
        found = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                found |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
        reach[name] = found & set(modules) - {name}
    for middle in modules:
        for name in modules:
            if middle in reach[name]:
                reach[name] |= reach[middle]
    rings = {tuple(sorted(m for m in reach[name] if name in reach[m])) for name in modules if name in reach[name]}
    return [f"{folder}: import each other in a circle: {', '.join(ring)}" for ring in sorted(rings)]


# Pure Python, published as source alone: they are built without a compiler.
SOURCES = {"connection-pool", "rouge-score", "tfrecord"}
PLATFORMS = ("x86_64-manylinux_2_28", "aarch64-manylinux_2_28", "macos")


def wheels(uv, *folders):
    """Locked packages that have no wheel for a platform: they would be compiled. Asked once a lock."""
    problems = []
    for folder in folders:
        lock = Path(folder, "requirements.txt")
        lines = [x for x in lock.read_text().splitlines() if x.split("==")[0] not in SOURCES]
        mark = Path(".tools", "wheels-" + hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16])
        if mark.exists():
            continue
        mine = []
        for platform_ in PLATFORMS:
            command = [uv, "pip", "compile", "-q", "--no-deps", "--only-binary", ":all:", "--python-version", "3.11"]
            command += ["--python-platform", platform_, "-", "-o", os.devnull]
            done = subprocess.run(command, input="\n".join(lines), capture_output=True, text=True)
            if done.returncode:
                mine.append(f"{lock}: no wheel for {platform_}: {' '.join(done.stderr.split())[:300]}")
        problems += mine
        if not mine:
            mark.touch()
    return "\n".join(problems)


def lint(here, folders, *groups):
    """Twins that differ, imports across folders and in circles, long modules, locks that name an index: a line each."""
    here, problems = here.split(), []
    for names, where in map(twins, groups):
        for name in names:
            paths = [Path(folder, name) for folder in where if folder in here]
            first = next((path for path in paths if path.exists()), None)
            for path in paths if first else []:
                if not path.exists():
                    problems.append(f"{path}: missing, its twin {first} is there: make sync FROM={first.parts[0]}")
                elif path.read_bytes() != first.read_bytes():
                    problems.append(f"{path}: differs from its twin {first}: make sync FROM=...")
    for folder in here:
        problems += circles(folder)
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
                lines = text.count("\n")
                if path.suffix == ".py" and inner[0] != "tests" and lines > LONGEST:
                    problems.append(f"{path}: {lines} lines, more than {LONGEST}: split it by what it serves")
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


BEGIN, END = "<!-- findings: made by make record-X and make report -->", "<!-- end of findings -->"


def verdicts(claims):
    """`2 hold, 1 undecided; controls: 1 holds`: what the paper says apart from what it does not."""
    names, parts = {"holds": "hold", "does not hold": "do not hold"}, []
    for control in (False, True):
        mine = [c["verdict"] for c in claims if c["control"] == control]
        counts = {w: mine.count(w) for w in ("holds", "does not hold", "undecided", "not measured") if w in mine}
        words = ", ".join(f"{n} {names.get(w, w) if n > 1 else w}" for w, n in counts.items())
        if words:
            parts.append(f"controls: {words}" if control else words)
    return "; ".join(parts)


def table_of_findings(folders):
    """A line a paper out of its committed report: the first sentence of its finding, the verdicts of its claims."""
    lines = ["| paper | what its records show | its claims, our controls |", "|---|---|---|"]
    for folder in folders:
        path = Path(folder, "results", "report.json")
        if not path.is_file():
            lines.append(f"| `{folder}` | no committed records | |")
            continue
        report = json.loads(path.read_text(encoding="utf-8"))
        cells = [f"[`{folder}`]({folder}/RESULTS.md)", (report.get("finding") or ["see its claims"])[0]]
        told = []
        for scale in ("real", "paper", "demo"):
            mine = [c for c in report["claims"] if c["scale"] == scale]
            if {c["verdict"] for c in mine} - {"not measured"}:
                told.append(f"{scale}: {verdicts(mine)}")
        cells.append("<br>".join(told))
        lines.append("| " + " | ".join(x.replace("|", "\\|") for x in cells) + " |")
    return "\n".join(lines)


def findings(what, readme, *folders):
    """`write`: puts the table of findings between its marks in README.md. `check`: says when it is stale."""
    path = Path(readme)
    text = path.read_text(encoding="utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        return f"{readme}: its two marks {BEGIN} and {END} are not there once each"
    before, rest = text.split(BEGIN)
    new = f"{before}{BEGIN}\n{table_of_findings(folders)}\n{END}{rest.split(END)[1]}"
    if new == text:
        return ""
    if what == "check":
        return f"{readme}: its table of findings is not that of the committed records: make report"
    path.write_text(new, encoding="utf-8")
    return f"{readme}: table of findings made anew"


def audit(*folders):
    """The runs of scale paper that have no records yet: commands, hours, data that is missing; then where paper and
    released code differ, with the switch that chooses and its effect."""
    lines = []
    for folder in folders:
        found = Path(folder, "results", "report.json")
        if not found.is_file():
            lines.append(f"{folder}: {f'make record-{folder} first' if Path(folder).is_dir() else 'not here yet'}")
            continue
        report = json.loads(found.read_text(encoding="utf-8"))
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
    known = stamp, cache, wait, closing, count, together, reproduce, lint, wheels, sync, audit, findings
    command = {f.__name__: f for f in known}[sys.argv[1]]
    answer = command(*sys.argv[2:])
    if answer:
        try:
            print(answer, flush=True)
        except BrokenPipeError:  # the reader left (`make audit | head`)
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit((command in (lint, wheels) or sys.argv[1:3] == ["findings", "check"]) and bool(answer))

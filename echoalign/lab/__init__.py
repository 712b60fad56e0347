"""What every folder needs and no paper is about; byte for byte the same in all ten.

Imported first, it sees to it that a command of the folder runs in an environment that has the folder's requirements: a
Python without them hands over to `.venv/bin/python` if that is there; else one line says how to make it, exit code 2.
"""

import os
import re
import sys
from importlib import metadata
from pathlib import Path

HERE = Path(__file__).resolve().parents[1]


def missing(requirements: Path) -> list[str]:
    """Names in a requirements file that this Python has no distribution of. Lines with a marker are not judged."""
    lines = requirements.read_text(encoding="utf-8").splitlines()
    names = [re.match(r"[A-Za-z0-9._-]+", line.split("#")[0]) for line in lines if ";" not in line.split("#")[0]]
    have = {re.sub(r"[-_.]+", "-", d.name).lower() for d in metadata.distributions() if d.name}
    return [n.group() for n in names if n and re.sub(r"[-_.]+", "-", n.group()).lower() not in have]


def started() -> str:
    """The folder's command that this process was started with, `train.py` or `-m lab.plan`; empty for anything else."""
    words = sys.orig_argv[1:]
    if sys.argv[0] == "-m":  # the module is still being looked for
        name = words[words.index("-m") + 1]
        return f"-m {name}" if name.startswith("lab.") else ""
    script = Path(sys.argv[0]).absolute()
    return script.name if script.suffix == ".py" and script.parent.resolve() == HERE else ""


def enter(command: str) -> None:
    """Go on where the requirements are, or say what is missing."""
    gone = missing(HERE / "requirements.in")
    if not gone:
        return
    python = HERE / ".venv" / "bin" / "python"
    lacks = gone[0] + (f" and {len(gone) - 1} more" if gone[1:] else "")
    if python.is_file() and Path(sys.prefix).resolve() != (HERE / ".venv").resolve():
        print(f"{command}: {sys.executable} lacks {lacks}; going on with .venv/bin/python", file=sys.stderr, flush=True)
        os.execv(python, [str(python), *sys.orig_argv[1:]])
    mend = f"`make env-{HERE.name}` in the workspace, or `pip install --no-deps -r requirements.txt` here"
    print(f"error: {sys.executable} lacks {lacks}: {mend}", file=sys.stderr)
    sys.exit(2)


if started():
    enter(started())

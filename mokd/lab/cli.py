"""Commands: settings from the command line, errors in one line, where data lies. The same in every folder."""

import contextlib
import dataclasses
import io
import math
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import tyro

HERE = Path(__file__).resolve().parents[1]  # the folder
SCALES = ("smoke", "demo", "real", "paper")


class UserError(Exception):
    """Something the user can mend; printed as one line, exit code 2."""


def command(function) -> None:
    """Run a command's main function; what the user can mend ends as one line on stderr and exit code 2."""
    try:
        function()
    except UserError as error:
        sys.exit(_fail(str(error)))
    except BrokenPipeError:  # the reader of a pipe left (`python plan.py | head`): nothing is wrong
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except OSError as error:  # read-only folder, full disk, name too long: the system's own words name the cause
        sys.exit(_fail(f"{error.strerror or error}: {error.filename or 'output'}; choose another --out or free space"))
    except KeyboardInterrupt:
        print("\ninterrupted; start again with the same command to go on", file=sys.stderr)
        sys.exit(130)


def _fail(message: str) -> int:
    print("error: " + " ".join(message.split()), file=sys.stderr)
    return 2


def _number(text: str) -> float:
    top, _, bottom = text.partition("/")
    if bottom and float(bottom) == 0:
        raise ValueError(f"{text} divides by zero")  # tyro tells of a ValueError in its own words
    value = float(top) / float(bottom) if bottom else float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is not a finite number")
    return value


# A float that may be written as a fraction: `--eps 8/255`. NaN and infinity are refused.
Number = Annotated[
    float,
    tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="FLOAT|A/B",
        instance_from_str=lambda args: _number(args[0]),
        is_instance=lambda x: isinstance(x, float | int),
        str_from_instance=lambda x: [repr(x)],
    ),
]


def parse(settings: type, description: str, args: list[str] | None = None) -> Any:
    """Command line -> settings dataclass; a wrong option is told in one line."""
    caught = io.StringIO()
    try:
        with contextlib.redirect_stderr(caught):
            parsed = tyro.cli(settings, description=description, args=args, config=(tyro.conf.FlagCreatePairsOff,))
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        lines = [line.strip("│╭╰─╮╯ ") for line in caught.getvalue().splitlines()]
        raise UserError(" ".join(line for line in lines if line) or "wrong options; see --help") from None
    for field in dataclasses.fields(settings):
        value = getattr(parsed, field.name)
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"--{field.name.replace('_', '-')} must be a finite number, not {value}")
        if isinstance(value, str) and value.startswith("~"):  # the shell leaves the ~ of --out=~/x as it is
            setattr(parsed, field.name, str(home(value)))
    seeds = getattr(parsed, "seeds", ())
    if (
        any(s < 0 or s >= 2**31 for s in seeds)
        or len(set(seeds)) != len(seeds)
        or seeds == ()
        and "seeds" in vars(parsed)
    ):
        raise UserError("--seeds takes one or more different whole numbers from 0 to 2147483647")
    return parsed


def home(path: str | Path) -> Path:
    """The path with ~ and ~user put in."""
    try:
        return Path(path).expanduser()
    except RuntimeError:  # no such user, or no home folder
        raise UserError(f"{path}: the home folder it names is not known; give a full path") from None


def data_dir(given: str) -> Path:
    """--data-dir, else $REPRO_DATA, else ./data."""
    return home(given or os.environ.get("REPRO_DATA") or HERE / "data")

"""Commands: settings from the command line, errors in one line, where data lies. The same in every folder."""

import contextlib
import dataclasses
import io
import json
import math
import os
import sys
import types
import typing
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

HERE = Path(__file__).resolve().parents[1]  # the folder
SCALES = ("smoke", "demo", "real", "paper")
LEAST = 2.0**-126  # of the normal numbers of float32


class UserError(Exception):
    """Something the user can mend; printed as one line, exit code 2."""


def command(function) -> None:
    """Run a command's main function; what the user can mend ends as one line on stderr and exit code 2."""
    try:
        function()
    except UserError as error:
        sys.exit(_fail(str(error)))
    except (MemoryError, RuntimeError) as error:
        if not _out_of_memory(error):
            raise
        sys.exit(_fail(f"no memory left; make it smaller by {_smaller() or 'a smaller model or batch'}"))
    except BrokenPipeError:  # the reader of a pipe left (`python plan.py | head`): nothing is wrong
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except OSError as error:  # read-only folder, full disk, name too long: the system's own words name the cause
        sys.exit(_fail(f"{error.strerror or error}: {error.filename or 'output'}; choose another --out or free space"))
    except KeyboardInterrupt:
        print("\ninterrupted; start again with the same command to go on", file=sys.stderr)
        sys.exit(130)


# Parts of option names that decide how much memory a run takes.
SMALLER = ("batch", "chunk", "precision", "seeds", "workers", "limit", "size", "width")
_options: list[str] = []  # of the command that parse() read last


def _out_of_memory(error: BaseException) -> bool:
    words = ("out of memory", "can't allocate memory", "not enough memory", "Unable to allocate", "CUBLAS_STATUS_ALLOC")
    return isinstance(error, MemoryError) or any(w.lower() in str(error).lower() for w in words)


def _smaller() -> str:
    """The options of this command that make it smaller."""
    return ", ".join(o for o in _options if any(part in o for part in SMALLER))


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


def _written(value: float) -> str:
    """A radius as people write it: 8/255, not 0.03137254901960784."""
    parts = round(value * 255)
    return f"{parts}/255" if parts / 255 == value and len(repr(value)) > 8 else repr(value)


# A float that may be written as a fraction: `--eps 8/255`. NaN and infinity are refused.
Number = Annotated[
    float,
    tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="FLOAT|A/B",
        instance_from_str=lambda args: _number(args[0]),
        is_instance=lambda x: isinstance(x, float | int),
        str_from_instance=lambda x: [_written(x)],
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
        # A line a box; its title, on the upper edge, says again what stands in it.
        lines = [line.strip("│╰─╯ ") for line in caught.getvalue().splitlines() if not line.startswith("╭")]
        raise UserError(" ".join(line for line in lines if line) or "wrong options; see --help") from None
    _options[:] = ["--" + field.name.replace("_", "-") for field in dataclasses.fields(settings)]
    _check(parsed, "--")
    seeds = getattr(parsed, "seeds", ())
    if (
        any(s < 0 or s >= 2**31 for s in seeds)
        or len(set(seeds)) != len(seeds)
        or seeds == ()
        and "seeds" in vars(parsed)
    ):
        raise UserError("--seeds takes one or more different whole numbers from 0 to 2147483647")
    return parsed


def _check(settings: Any, before: str) -> None:
    """Numbers that can be counted with, in option groups (nested dataclasses) too; `before` begins an option's name."""
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        option = f"{before}{field.name.replace('_', '-')}"
        if dataclasses.is_dataclass(value):
            _check(value, f"{option}.")
        for number in value if isinstance(value, tuple | list) else (value,):
            if isinstance(number, float) and not math.isfinite(number):
                raise UserError(f"{option} must be a finite number, not {number}")
            if isinstance(number, float) and 0 < abs(number) < LEAST:
                raise UserError(f"{option} {number} is too small, in float32 it is nothing; the least is {LEAST:.1e}")
            if isinstance(number, int) and abs(number) >= 2**63:
                raise UserError(f"{option} {number} is too large; whole numbers end at 9223372036854775807")
        if isinstance(value, str) and value.startswith("~"):  # the shell leaves the ~ of --out=~/x as it is
            setattr(settings, field.name, str(home(value)))


class _Misfit(Exception):
    pass


def _fitted(value: Any, kind: Any) -> Any:
    """A value out of JSON as the type of a field asks for it; _Misfit when it is none."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin is Annotated:
        return _fitted(value, inner[0])
    if origin is Literal:
        if value in inner and type(value) in {type(x) for x in inner}:
            return value
    elif origin in (typing.Union, types.UnionType):
        for one in inner:
            with contextlib.suppress(_Misfit):
                return _fitted(value, one)
    elif origin is tuple and isinstance(value, list | tuple):
        if len(inner) == 2 and inner[1] is Ellipsis:
            return tuple(_fitted(v, inner[0]) for v in value)
        if len(inner) == len(value):
            return tuple(_fitted(v, k) for v, k in zip(value, inner, strict=True))
    elif origin in (list, dict):
        if isinstance(value, origin):
            return value
    elif dataclasses.is_dataclass(kind):
        return _filled(value, kind)
    elif kind is float:
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            return float(value)
    elif kind in (None, type(None)):
        if value is None:
            return None
    elif kind is Any or type(value) is kind:
        return value
    raise _Misfit(f"{json.dumps(value)[:60]} is not {getattr(kind, '__name__', kind)}")


def _filled(value: Any, kind: type) -> Any:
    if not isinstance(value, dict):
        raise _Misfit("it holds no settings")
    hints = typing.get_type_hints(kind, include_extras=True)
    names = {f.name for f in dataclasses.fields(kind) if f.init}
    for odd in sorted(names ^ set(value)):
        raise _Misfit(f"{odd} is {'missing' if odd in names else 'no setting'}")
    out = {}
    for name in names:
        try:
            out[name] = _fitted(value[name], hints[name])
        except _Misfit as error:
            raise _Misfit(f"{name}: {error}") from None
    return kind(**out)


def settings_from(path: Path, kind: type, **changed: Any) -> Any:
    """The settings dataclass that a run's settings.json holds, with some fields changed (`device`, `data_dir`); every
    field is there and of its type, or UserError names the first that is not."""
    try:
        stored = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"no file {path}; give the folder of a run") from None
    except ValueError as error:  # no JSON, or no UTF-8
        raise UserError(f"{path} is not valid JSON ({error}); make the run again") from None
    try:
        return _filled({**stored, **changed} if isinstance(stored, dict) else stored, kind)
    except _Misfit as error:
        raise UserError(f"{path} was edited or is of another version ({error}); make the run again") from None


def default_out(*parts: str) -> str:
    """runs/<parts> of this folder as a path from where the command was started: what is not named by --out lies in the
    folder, wherever it is called from."""
    return os.path.relpath(HERE.joinpath("runs", *parts))


def home(path: str | Path) -> Path:
    """The path with ~ and ~user put in."""
    try:
        return Path(path).expanduser()
    except RuntimeError:  # no such user, or no home folder
        raise UserError(f"{path}: the home folder it names is not known; give a full path") from None


def data_dir(given: str) -> Path:
    """--data-dir, else $REPRO_DATA, else ./data."""
    return home(given or os.environ.get("REPRO_DATA") or HERE / "data")

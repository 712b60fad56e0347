"""Run folders, settings, records and errors: the same file in every folder of the workspace.

A run folder is `<out>/`: settings.json, checkpoint/, and for each seed seed<k>/ with metrics.jsonl, TensorBoard events,
model.safetensors and record*.json. `records.jsonl`, written last, says that the run is complete.
"""

import contextlib
import dataclasses
import fcntl
import functools
import io
import json
import math
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import tyro

HERE = Path(__file__).resolve().parent
SCALES = ("smoke", "demo", "paper")
RECORD_KEYS = (
    *("table", "dataset", "setting", "method", "seed", "metrics", "settings", "data", "code", "host", "seconds"),
    *("peak_memory_mb", "scale"),
)


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


def device(name: str):
    """auto | cpu | cuda[:n] -> torch.device; asks accelerate, so one process a GPU works under `accelerate launch`."""
    import torch
    from accelerate import PartialState

    if name.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"--device {name}: this machine shows no CUDA device to torch; use --device cpu or auto")
    state = PartialState(cpu=name == "cpu")
    if name == "auto" and state.num_processes == 1 and torch.cuda.is_available() and torch.cuda.device_count() > 1:
        free = _free_gpu()
        if free is not None:
            torch.cuda.set_device(free)
            return torch.device("cuda", free)
    try:
        return state.device if name == "auto" else torch.device(name)
    except RuntimeError:
        raise UserError(f"--device {name} is unknown; use auto, cpu, cuda or cuda:0") from None


_HELD: list = []  # lock files of this process: a lock lasts as long as its file is open


def _free_gpu() -> int | None:
    """A GPU that no other run on this machine has taken; it stays this process's until it ends. None: all are taken."""
    import torch

    for i in range(torch.cuda.device_count()):
        name = f"reproduction-gpu-{torch.cuda.get_device_properties(i).uuid}-{os.getuid()}.lock"
        file = open(Path(tempfile.gettempdir()) / name, "w")  # noqa: SIM115 (held until the process ends)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            continue
        _HELD.append(file)
        return i
    return None


# ---------------------------------------------------------------------------------------------- files that look whole


def write_text(path: Path, text: str) -> None:
    """Write a file so that it is there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix="." + path.name[:40], suffix=".tmp")
    try:
        with os.fdopen(handle, "w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n")


def write_tensors(path: Path, tensors: dict, meta: dict[str, str] | None = None) -> None:
    """safetensors file, whole or not at all."""
    from safetensors.torch import save

    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(save({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, metadata=meta))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def read_tensors(path: Path) -> tuple[dict, dict[str, str]]:
    """(tensors, metadata) of a safetensors file; UserError when it is missing or broken."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise UserError(f"no file {path}; train the run first")
    try:
        with safe_open(path, "pt") as file:
            return {k: file.get_tensor(k) for k in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except SafetensorError as error:
        raise UserError(f"{path} is damaged ({error}); delete it and start the run again") from None


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"no file {path}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid JSON ({error}); delete it and start the run again") from None


# ------------------------------------------------------------------------------------------------------- a run's folder


class Run:
    """A run folder held by this process: settings checked, a lock taken, time counted. `part` tells apart the processes
    of one launch that share the folder."""

    def __init__(
        self,
        out: Path,
        settings: Any,
        ignore: tuple[str, ...] = ("out", "data_dir", "device", "download"),
        part: int = 0,
    ):
        self.out, self.started, self.before = Path(out), time.perf_counter(), 0.0
        self._writers: dict = {}  # TensorBoard's, one a seed
        self.settings = json.loads(json.dumps(dataclasses.asdict(settings)))
        self.out.mkdir(parents=True, exist_ok=True)
        self._lock = open(self.out / f".lock{part or ''}", "w")  # noqa: SIM115 (held until the process ends)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another process is writing {self.out}; wait for it or choose another --out") from None
        for left in self.out.rglob(".*.tmp"):
            # Half a file of a start that was killed. Young ones may be another process's of this launch.
            with contextlib.suppress(FileNotFoundError):
                if time.time() - left.stat().st_mtime > 600:
                    left.unlink()
        path = self.out / "settings.json"
        # A start that ended before it made anything (a wrong option, missing data) must not block the next one.
        begun = any(p != path and not p.name.startswith(".") for p in self.out.iterdir())
        if path.exists() and begun:
            old = read_json(path)
            if not isinstance(old, dict):
                raise UserError(f"{path} holds no settings; delete the folder and start again")
            changed = sorted(k for k in {*old, *self.settings} - {*ignore} if old.get(k) != self.settings.get(k))
            if changed:
                k = changed[0]
                raise UserError(
                    f"{self.out} holds a run with other settings ({k}: {old.get(k)}, now {self.settings.get(k)}); "
                    "choose another --out or delete the folder"
                )
        write_json(path, self.settings)

    def seconds(self) -> float:
        """Time spent on this run so far, earlier interrupted starts included (`before`, out of the checkpoint)."""
        return self.before + time.perf_counter() - self.started

    def folder(self, seed: int) -> Path:
        path = self.out / f"seed{seed}"
        path.mkdir(exist_ok=True)
        return path

    @property
    def complete(self) -> bool:
        return (self.out / "records.jsonl").is_file()

    def log(self, seed: int, lines: list[dict], keep_to: int | None = None) -> None:
        """Append metric lines (each with "step") of a seed to metrics.jsonl and to TensorBoard; with `keep_to`, lines
        of later steps, left by an interrupted start, are dropped first."""
        path = self.folder(seed) / "metrics.jsonl"
        old = path.read_text().splitlines() if path.exists() else []
        if keep_to is not None:
            old = [line for line in old if _step(line) <= keep_to]
        write_text(path, "".join(f"{line}\n" for line in [*old, *(json.dumps(line) for line in lines)]))
        if lines or keep_to is not None:
            from torch.utils.tensorboard import SummaryWriter

            if seed not in self._writers or keep_to is not None:
                purge = None if keep_to is None else keep_to + 1
                self._writers[seed] = SummaryWriter(str(path.parent), purge_step=purge)
            for line in lines:
                for key, value in line.items():
                    if key != "step" and isinstance(value, int | float):
                        self._writers[seed].add_scalar(key, value, line["step"])
            self._writers[seed].flush()

    def record(
        self, seed: int, *, seconds: float, data: dict, metrics: dict, where: dict, device, suffix: str = ""
    ) -> dict:
        """Write seed<k>/record<suffix>.json. `where` holds table, dataset, setting, method and scale."""
        bad = [k for k, v in metrics.items() if isinstance(v, float) and not math.isfinite(v)]
        if bad:
            raise UserError(f"metric {bad[0]} of seed {seed} is not finite; no record written, see {self.folder(seed)}")
        record = {
            **{k: where[k] for k in ("table", "dataset", "setting", "method", "scale")},
            **{"seed": seed, "metrics": metrics, "settings": self.settings, "data": data, "code": code_state()},
            **{"host": host(device), "seconds": round(seconds, 2), "peak_memory_mb": peak_memory_mb(device)},
        }
        write_json(self.folder(seed) / f"record{suffix}.json", record)
        return record

    def finish(self) -> list[dict]:
        """Join the seeds' records into records.jsonl, the last file of a run."""
        paths = sorted(self.out.glob("seed*/record*.json"), key=lambda p: (len(p.parent.name), p))
        records = [read_record(path) for path in paths]
        write_text(self.out / "records.jsonl", "".join(json.dumps(r, sort_keys=True) + "\n" for r in records))
        for left in self.out.rglob(".*.tmp"):  # of starts that were killed: nobody else writes any more
            left.unlink(missing_ok=True)
        return records


def _step(line: str) -> float:
    """Step of a line of metrics.jsonl; inf for one that is damaged, so that it is dropped."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf


def check_record(record: Any, place: str) -> dict:
    if not isinstance(record, dict) or [k for k in RECORD_KEYS if k not in record]:
        raise UserError(f"{place} is not a record (missing keys); delete it and run again")
    numbers = [record["seconds"], record["peak_memory_mb"], record["seed"]]
    whole = isinstance(record["metrics"], dict) and isinstance(record["data"], dict) and record["scale"] in SCALES
    if not whole or not all(isinstance(v, int | float) and math.isfinite(v) for v in numbers):
        raise UserError(f"{place} is not a record (metrics, data, scale or a number); delete it and run again")
    odd = [k for k, v in record["metrics"].items() if isinstance(v, str) and k in ("f1", "accuracy")]
    if odd:
        raise UserError(f"{place}: metric {odd[0]} is not a number; delete it and run again")
    return record


def read_record(path: Path) -> dict:
    return check_record(read_json(path), str(path))


@functools.cache
def code_state() -> dict:
    """Commit of the code and whether the folder differs from it (results do not count)."""

    def git(*args: str) -> str:
        done = subprocess.run(["git", "-C", str(HERE), *args], capture_output=True, text=True, timeout=20)
        return done.stdout.strip() if done.returncode == 0 else ""

    try:
        commit = git("rev-parse", "HEAD")
        return {
            "commit": commit or "unknown",
            "dirty": bool(git("status", "--porcelain", "--", ".", ":!results", ":!RESULTS.md")) if commit else None,
        }
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return {"commit": "unknown", "dirty": None}


def host(device) -> dict:
    import torch

    cuda = str(device).startswith("cuda")
    name = (
        torch.cuda.get_device_name(device) if cuda else f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    )
    return {"device": name, "torch": torch.__version__, "python": platform.python_version()}


def peak_memory_mb(device) -> float:
    """Highest memory of the process (CPU) or allocated on the GPU, MiB."""
    import torch

    if str(device).startswith("cuda"):
        return round(torch.cuda.max_memory_allocated(device) / 2**20, 1)
    unit = 1 if sys.platform == "darwin" else 1024
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20, 1)

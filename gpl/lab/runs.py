"""Run folders and the device of a run. The same in every folder.

A run folder is `<out>/`: settings.json, checkpoint/, and for each seed seed<k>/ with metrics.jsonl, TensorBoard events,
model.safetensors and record*.json. `records.jsonl`, written last, says that the run is complete.
"""

import contextlib
import dataclasses
import fcntl
import functools
import json
import math
import os
import platform
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from lab.cli import HERE, SCALES, Number, UserError, command, data_dir, default_out, home, parse, settings_from
from lab.files import read_json, read_tensors, read_weights, write_json, write_tensors, write_text
from lab.records import RECORD_KEYS, check_record, read_record

# A command needs this module alone: what it says of options, files and records is at hand here too.
__all__ = ["HERE", "RECORD_KEYS", "SCALES", "Number", "Run", "UserError", "check_record", "code_state", "command"]
__all__ += [
    "data_dir",
    "default_out",
    "device",
    "home",
    "host",
    "parse",
    "peak_memory_mb",
    "read_json",
    "read_record",
    "read_tensors",
]
__all__ += ["read_weights", "settings_from", "write_json", "write_tensors", "write_text"]


def bf16_is_fast(device) -> bool:
    """Whether the torch.device computes in bf16: CUDA, and CPUs with instructions for it; others emulate it."""
    import torch

    return device.type == "cuda" or any(has for name, has in torch.cpu.get_capabilities().items() if "bf16" in name)


def device(name: str, bf16: bool = False):
    """auto | cpu | cuda[:n] -> torch.device; asks accelerate, so one process a GPU works under `accelerate launch`.
    A run in bf16 is told when the device only emulates it."""
    found = _device(name)
    if bf16 and not bf16_is_fast(found):
        print("note: this CPU has no bf16 instructions; a run in bf16 takes about ten times as long", file=sys.stderr)
    return found


def _device(name: str):
    import torch
    from accelerate import PartialState

    if not re.fullmatch(r"auto|cpu|cuda(:\d{1,4})?", name):
        raise UserError(f"--device {name} is unknown; use auto, cpu, cuda or cuda:0")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"--device {name}: this machine shows no CUDA device to torch; use --device cpu or auto")
    if name.startswith("cuda:") and int(name[5:]) >= torch.cuda.device_count():
        raise UserError(f"--device {name}: this machine has {torch.cuda.device_count()} of them, counted from cuda:0")
    state = PartialState(cpu=name == "cpu")
    if name == "auto" and state.num_processes == 1 and torch.cuda.is_available() and torch.cuda.device_count() > 1:
        free = _free_gpu()
        if free is not None:
            torch.cuda.set_device(free)
            return torch.device("cuda", free)
    return state.device if name == "auto" else torch.device(name)


def sent(x, device):
    """The tensor x on the torch.device; a GPU fetches it out of pinned memory while the host goes on."""
    held = x.pin_memory() if (x.device.type, device.type) == ("cpu", "cuda") else x
    return held.to(device, non_blocking=True)


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


def finished(out: Path, seeds: tuple[int, ...] | list[int]) -> bool:
    """Whether the run of a folder ended, and the records of its seeds are all still there."""
    if not (out / "records.jsonl").is_file():
        return False
    there = {p.parent.name for p in out.glob("seed*/record*.json")}
    return all(f"seed{k}" in there for k in seeds)


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
        try:
            self._lock = open(self.out / f".lock{part or ''}", "w")  # noqa: SIM115 (held until the process ends)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another process is writing {self.out}; wait for it or choose another --out") from None
        except PermissionError:  # somebody else's finished run may be read
            if not self.complete:
                raise
            self._same_settings(ignore)
            return
        for left in self.out.rglob(".*.tmp"):
            # Half a file of a start that was killed. Young ones may be another process's of this launch.
            with contextlib.suppress(FileNotFoundError):
                if time.time() - left.stat().st_mtime > 600:
                    left.unlink()
        self._same_settings(ignore)
        write_json(self.out / "settings.json", self.settings)

    def _same_settings(self, ignore: tuple[str, ...]) -> None:
        """UserError if the folder holds a run of other settings."""
        path = self.out / "settings.json"
        # A start that ended before it made anything (a wrong option, missing data) must not block the next one.
        begun = any(p != path and p.is_file() and not p.name.startswith(".") for p in self.out.rglob("*"))
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

    def seconds(self) -> float:
        """Time spent on this run so far, earlier interrupted starts included (`before`, out of the checkpoint)."""
        return self.before + time.perf_counter() - self.started

    def folder(self, seed: int) -> Path:
        path = self.out / f"seed{seed}"
        path.mkdir(exist_ok=True)
        return path

    def same_data(self, seed: int, checksums: list[str]) -> None:
        """UserError if this seed was begun with other data, by the checksums kept in seed<k>/.data.json: what a run
        made of one copy of a data set must not go on with another."""
        path = self.folder(seed) / ".data.json"
        if not path.exists():
            write_json(path, checksums)
        elif read_json(path) != checksums:
            raise UserError(
                f"{self.out} was begun with other data than is read now (seed {seed}); choose another --out, delete "
                "the folder, or give the data of then by --data-dir"
            )

    @property
    def complete(self) -> bool:
        return finished(self.out, self.settings.get("seeds", ()))

    def log(self, seed: int, lines: list[dict], keep_to: int | None = None) -> None:
        """Append metric lines (each with "step") of a seed to metrics.jsonl and to TensorBoard; with `keep_to`, lines
        of later steps, left by an interrupted start, are dropped first."""
        path = self.folder(seed) / "metrics.jsonl"
        old = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
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

    def finish(self, keep_checkpoint: bool = True) -> list[dict]:
        """Join the seeds' records into records.jsonl, the last file of a run. Without `keep_checkpoint` the checkpoints
        go first, those too that a start left which was killed after its record."""
        if not keep_checkpoint:
            shutil.rmtree(self.out / "checkpoint", ignore_errors=True)
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

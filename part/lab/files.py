"""Files that are there whole or not at all. The same in every folder."""

import contextlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from lab.cli import UserError


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


def read_weights(path: Path) -> tuple[dict, dict[str, str]]:
    """As read_tensors; UserError also for values that are not finite: nothing can be measured with such weights."""
    tensors, meta = read_tensors(path)
    bad = [k for k, v in tensors.items() if v.is_floating_point() and not bool(v.isfinite().all())]
    if bad:
        raise UserError(f"{path}: {bad[0]} holds values that are not finite; train the run again")
    return tensors, meta


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"no file {path}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid JSON ({error}); delete it and start the run again") from None

"""What takes long is kept under a fingerprint of what it depends on; of two processes that want the same one waits."""

import contextlib
import fcntl
import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path

from lab import runs

from torch import Tensor


def fingerprint(value: dict) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Hold a folder's lock; another process that makes the same thing is waited for."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting for the process that is making {folder}", flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        for left in folder.glob(".*.tmp"):  # half a file of a process that was killed: nobody else writes here
            left.unlink(missing_ok=True)
        yield


def kept(folder: Path, make: Callable[[Path], dict[str, Tensor]]) -> dict[str, Tensor]:
    """The tensors of folder/result.safetensors, made when missing; make(checkpoint) may leave a checkpoint to go on
    from, which is removed at the end."""
    path, half = folder / "result.safetensors", folder / "checkpoint.safetensors"
    with alone(folder):
        if not path.is_file():
            runs.write_tensors(path, make(half))
            half.unlink(missing_ok=True)
        return runs.read_tensors(path)[0]

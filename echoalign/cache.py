"""What takes long is kept under a fingerprint of what it depends on; two processes that want the same: one waits."""

import contextlib
import fcntl
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path


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

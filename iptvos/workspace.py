"""A folder that keeps a session: what was given, every object's masks, so that work goes on after a stop.

<folder>/rounds.json      the video's name and checksum, the method, and of each object what stands on which frame
<folder>/state.safetensors  low-resolution logits, confidences and the masks of interacted frames
"""

import hashlib
from pathlib import Path

from lab import checkpoints, runs
from lab.runs import UserError

import numpy as np
import torch

import prompts as P
from prompts import Interaction
from session import Session


def checksum(frames: list[np.ndarray]) -> str:
    """Of the pixels of a video."""
    digest = hashlib.sha256(str([f.shape for f in frames[:1]]).encode())
    for f in frames:
        digest.update(np.ascontiguousarray(f))
    return digest.hexdigest()


def save(folder: Path, session: Session, sha: str, settings: dict) -> None:
    """The session as it is now; each file is there whole or not at all, the logits first."""
    tensors, objects = {}, {}
    for o, s in session.states.items():
        there = [t for t, low in enumerate(s.low) if low is not None]
        tensors[f"{o}.iou"] = torch.from_numpy(s.iou)
        if there:
            tensors[f"{o}.low"] = torch.stack([s.low[t] for t in there]).half()
        if s.exact:
            masks = np.stack(list(s.exact.values()))
            tensors[f"{o}.exact"] = torch.from_numpy(np.packbits(masks, axis=None))
        given = {
            str(t): {"points": c.points.tolist(), "labels": np.asarray(c.labels).tolist()}
            | {"box": None if c.box is None else np.asarray(c.box).tolist()}
            for t, c in s.clicks.items()
        }
        before = [t for t in s.clicks if s.begun.get(t) is not None]  # what stood there before the first click
        if before:
            tensors[f"{o}.begun"] = torch.from_numpy(np.packbits(np.stack([s.begun[t] for t in before]), axis=None))
        stored = [] if s.memory is None else list(s.memory.interacted)
        objects[str(o)] = {"low": there, "exact": list(s.exact), "clicks": given, "stored": stored, "begun": before}
    info = {"sha256": sha, "settings": settings, "round": session.round, "objects": objects}
    info["first"] = session.begun_at
    run = checkpoints.fingerprint(info, [sha])
    runs.write_tensors(folder / "state.safetensors", tensors, {"run": run})
    runs.write_json(folder / "rounds.json", info)


def load(folder: Path, session: Session, sha: str, settings: dict) -> bool:
    """Take up what a folder keeps; False where it keeps nothing. UserError where it is another video's, was made with
    other settings, or is damaged."""
    path = folder / "rounds.json"
    if not path.is_file():
        return False
    info = runs.read_json(path)
    try:
        if info["sha256"] != sha:
            raise UserError(f"{folder} keeps the work on another video; choose another --workspace")
        other = sorted(k for k in settings if info["settings"].get(k) != settings[k])
        if other:
            raise UserError(
                f"{folder} was begun with --{other[0]} {info['settings'].get(other[0])}, now {settings[other[0]]}; use "
                "that, or another --workspace"
            )
        tensors, meta = runs.read_tensors(folder / "state.safetensors")
        if meta.get("run") != checkpoints.fingerprint(info, [sha]):
            raise UserError(f"{folder}: rounds.json and state.safetensors do not belong together; delete the folder")
        session.round, session.begun_at = int(info["round"]), info["first"]
        for o, s in session.states.items():
            take(s, info["objects"].get(str(o)), tensors, str(o), session)
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise UserError(f"{folder} is damaged ({type(error).__name__}: {error}); delete it") from None
    return True


def forget(folder: Path) -> None:
    """Nothing is kept from here on until the next round."""
    for name in ("rounds.json", "state.safetensors"):
        (folder / name).unlink(missing_ok=True)


def masks_of(packed: torch.Tensor, n: int, h: int, w: int) -> np.ndarray:
    return np.unpackbits(packed.numpy(), count=n * h * w).reshape(-1, h, w).astype(bool)


def take(s, told: dict | None, tensors: dict, name: str, session: Session) -> None:
    """One object out of a folder."""
    if told is None:
        return
    n, (h, w) = len(session.frames), session.frames[0].shape[:2]
    s.iou = tensors[f"{name}.iou"].numpy().copy()
    if s.iou.shape != (n,) or not np.isfinite(s.iou).all():
        raise ValueError("confidences of another length")
    for t, low in zip(told["low"], tensors.get(f"{name}.low", ()), strict=True):
        s.low[t] = low
    if told["exact"]:
        s.exact = dict(zip(told["exact"], masks_of(tensors[f"{name}.exact"], len(told["exact"]), h, w), strict=True))
    before = {}
    if told["begun"]:
        before = dict(zip(told["begun"], masks_of(tensors[f"{name}.begun"], len(told["begun"]), h, w), strict=True))
    for t, c in told["clicks"].items():
        points = np.array(c["points"], np.float32).reshape(-1, 2)
        box = None if c["box"] is None else np.array(c["box"], np.float32)
        s.clicks[int(t)] = Interaction(points=points, labels=np.array(c["labels"], int), box=box)
        s.begun[int(t)] = before.get(int(t))
    if s.memory is not None and told["stored"]:
        session.remember_basis(session.begun_at)
        for t in told["stored"]:
            if P.box_of(s.exact[t]) is not None:
                s.memory.interact(session.entry(t, session.embedding(t), s.exact[t], session.keyed(t)))

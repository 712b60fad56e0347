"""Point trackers: pyramidal Lucas-Kanade (always here), CoTracker, PIPS and TAPIR through torch.hub when their code and
weights are there."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from lab.runs import UserError

import cv2
import numpy as np
import torch

POINTS = ("lk", "cotracker", "pips", "tapir")
VISIBLE = {"cotracker": 0.7, "pips": 0.5, "tapir": 0.1}  # thresholds of the SAM-PT configurations
HUB = {
    "cotracker": ("facebookresearch/co-tracker", "cotracker2"),
    "pips": ("aharley/pips", "pips"),
    "tapir": ("google-deepmind/tapnet", "tapir"),
}
LK = dict(winSize=(21, 21), maxLevel=3, criteria=(cv2.TERM_CRITERIA_EPS | cv2.TERM_CRITERIA_COUNT, 20, 0.03))


@dataclass
class Tracks:
    """Points over the frames of a pass; row 0 is the frame they were given on."""

    places: np.ndarray  # (frames, n, 2) float32
    visible: np.ndarray  # (frames, n) bool
    error: np.ndarray  # (frames, n) forward-backward error in pixels; 0 where the tracker has none

    def at(self, i: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Places, visibility and error on the i-th frame of the order."""
        return self.places[i], self.visible[i], self.error[i]


class PointTracker(Protocol):
    def track(self, frames: Sequence[np.ndarray], order: Sequence[int], points: np.ndarray) -> Tracks:
        """Follow points given on frame order[0] through the frames in that order (running up or down)."""


class LucasKanade:
    """Pyramidal Lucas-Kanade from frame to frame and back again."""

    def __init__(self):
        self.gray: dict[int, tuple[np.ndarray, np.ndarray]] = {}  # frame -> its pixels and their gray image

    def image(self, frames: Sequence[np.ndarray], t: int) -> np.ndarray:
        if t not in self.gray or self.gray[t][0] is not frames[t]:  # the tracker may serve another video by now
            self.gray = {k: v for k, v in self.gray.items() if abs(k - t) < 3}
            self.gray[t] = frames[t], cv2.cvtColor(frames[t], cv2.COLOR_RGB2GRAY)
        return self.gray[t][1]

    def track(self, frames: Sequence[np.ndarray], order: Sequence[int], points: np.ndarray) -> Tracks:
        tracks = self.follow(frames, order, points)
        tracks.at(len(order) - 1)
        return tracks

    def follow(self, frames: Sequence[np.ndarray], order: Sequence[int], points: np.ndarray) -> "Following":
        """The same, frame by frame when it is asked for."""
        shape = len(order), len(points)
        places = np.repeat(np.asarray(points, np.float32)[None], len(order), 0)
        return Following(places, np.ones(shape, bool), np.zeros(shape, np.float32), self, frames, order)


@dataclass
class Following(Tracks):
    """Tracks that go on when a later frame is asked for."""

    tracker: LucasKanade
    frames: Sequence[np.ndarray]
    order: Sequence[int]
    done: int = 0

    def at(self, i: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        while self.done < i and self.places.shape[1]:
            k = self.done + 1
            a, b = (self.tracker.image(self.frames, self.order[j]) for j in (k - 1, k))
            there, found, self.error[k] = flow(a, b, self.places[k - 1])
            h, w = a.shape
            within = ((there >= 0) & (there <= [w - 1, h - 1])).all(1)
            self.places[k], self.done = there, k
            self.visible[k] = self.visible[k - 1] & found & within  # a lost point does not come back
        return super().at(i)


def flow(a: np.ndarray, b: np.ndarray, points: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(places in b, found, forward-backward error in pixels) of points of gray image a."""
    start = np.ascontiguousarray(points, np.float32).reshape(-1, 1, 2)
    there, ok, _ = cv2.calcOpticalFlowPyrLK(a, b, start, None, **LK)
    back, ok_back, _ = cv2.calcOpticalFlowPyrLK(b, a, there, None, **LK)
    miss = np.linalg.norm((back - start).reshape(-1, 2), axis=1)
    found = (ok.ravel() == 1) & (ok_back.ravel() == 1) & np.isfinite(miss)
    return np.nan_to_num(there.reshape(-1, 2)), found, np.where(found, miss, np.inf).astype(np.float32)


class Hub:
    """CoTracker, PIPS or TAPIR of torch.hub (a folder with their code, or the repository's name). The model is called
    as CoTracker's predictor is: model(video (1, T, 3, H, W), queries=(1, n, 3) of (t, x, y)) -> tracks (1, T, n, 2),
    visibility (1, T, n). PIPS looks at 8 frames at once and is chained."""

    def __init__(self, name: str, weights: str, repo: str, device: torch.device, model=None):
        self.name, self.device = name, device
        if model is None:
            repo = repo or HUB[name][0]
            local = Path(repo).is_dir()
            try:
                model = torch.hub.load(
                    repo, HUB[name][1], source="local" if local else "github", pretrained=not weights
                )
            except Exception as error:  # torch.hub raises whatever the repository's code raises
                raise UserError(
                    f"point tracker {name}: torch.hub could not load it from {repo} ({error}); give --tracker-repo, a "
                    "folder with its code and hubconf.py, and --tracker-weights, or use --tracker lk"
                ) from None
            if weights:
                load_strict(model, weights)
        self.model = model.to(device).eval()

    @torch.inference_mode()
    def track(self, frames: Sequence[np.ndarray], order: Sequence[int], points: np.ndarray) -> Tracks:
        video = torch.stack([torch.from_numpy(frames[t]).permute(2, 0, 1) for t in order])[None].float().to(self.device)
        given = torch.from_numpy(np.asarray(points, np.float32)).to(self.device)
        if self.name == "pips":
            places, seen = chained(self.window, video, given)
        else:
            places, seen = self.window(video, given)
        shape = seen.shape
        return Tracks(places.cpu().numpy(), (seen > VISIBLE[self.name]).cpu().numpy(), np.zeros(shape, np.float32))

    def window(self, video: torch.Tensor, points: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(T, n, 2) places and (T, n) visibility of points given on the first frame of (1, T, 3, H, W)."""
        queries = torch.cat([points.new_zeros(len(points), 1), points], 1)[None]
        places, seen = self.model(video, queries=queries)[:2]
        return places[0].float(), seen[0].float()


def chained(window, video: torch.Tensor, points: torch.Tensor, size: int = 8, sure: float = 0.9, step: float = 0.02):
    """A tracker of `size` frames over a whole video: each point goes on from the latest frame of its window whose
    visibility exceeds `sure`, which sinks by `step` until one does."""
    length, n = video.shape[1], len(points)
    places, seen = points.new_zeros(length, n, 2), points.new_zeros(length, n)
    for i in range(n):
        at, here = 0, points[i]
        places[0, i], seen[0, i] = here, 1
        while at < length - 1:
            part = video[:, at : at + size]
            short = size - part.shape[1]
            if short:  # the last window is filled with its last frame
                part = torch.cat([part, part[:, -1:].expand(-1, short, -1, -1, -1)], 1)
            p, v = window(part, here[None])
            m = size - short
            places[at : at + m, i], seen[at : at + m, i] = p[:m, 0], v[:m, 0]
            if at + m >= length:
                break
            limit, sight = sure, v[1:m, 0]
            while not (sight > limit).any():
                limit -= step
            k = 1 + int(torch.nonzero(sight > limit).max())
            at, here = at + k, p[k, 0]
    return places, seen


def mismatch(model: torch.nn.Module, state: dict) -> str:
    """In what a state dict differs from a model's, in a few words; empty: in nothing."""
    own = {k: v.shape for k, v in model.state_dict().items()}
    parts = (
        ("missing", [k for k in own if k not in state]),
        ("unknown", [k for k in state if k not in own]),
        ("of another shape", [k for k in own if k in state and getattr(state[k], "shape", None) != own[k]]),
    )
    parts += (("with values that are not finite", [k for k in own if k in state and not finite(state[k])]),)
    return ", ".join(f"{len(keys)} keys {what} (first {keys[0]})" for what, keys in parts if keys)


def finite(value) -> bool:
    return not torch.is_tensor(value) or not value.is_floating_point() or bool(value.isfinite().all())


def load_strict(model: torch.nn.Module, path: str) -> None:
    """Weights into a model, every key; UserError when they belong to another one."""
    file = Path(path).expanduser()
    if not file.is_file():
        raise UserError(f"no weights {file}")
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle, zip and type errors alike: the file is not a plain checkpoint
        raise UserError(f"{file} is no readable checkpoint of tensors ({type(error).__name__})") from None
    if not isinstance(state, dict):
        raise UserError(f"{file} holds no state dict")
    for key in ("model", "state_dict", "model_state_dict", "net"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    state = {k.removeprefix("module."): v for k, v in state.items()}
    wrong = mismatch(model, state)
    if wrong:
        raise UserError(f"{file} holds weights of another model: {wrong}")
    model.load_state_dict(state, strict=True)


def point_tracker(name: str, weights: str, repo: str, device: torch.device) -> PointTracker:
    if name not in POINTS:
        raise UserError(f"--tracker {name}: use one of {', '.join(POINTS)}")
    return LucasKanade() if name == "lk" else Hub(name, weights, repo, device)

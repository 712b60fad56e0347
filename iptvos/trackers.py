"""Point and box tracking, each with a state of its own, and the filter of unstable points.

Point trackers: pyramidal Lucas-Kanade (always here), CoTracker, PIPS and TAPIR through torch.hub when their code and
weights are there. Box trackers: optical flow inside the box with re-detection (always here), or any network that offers
`initialize(image, {"init_bbox": xywh})` and `track(image)`, as OSTrack's released tracker does.
"""

import importlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from lab.runs import UserError

import cv2
import numpy as np
import torch

from prompts import box_of, grow, inside

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


class PointTracker(Protocol):
    def track(self, frames: Sequence[np.ndarray], order: Sequence[int], points: np.ndarray) -> Tracks:
        """Follow points given on frame order[0] through the frames in that order (running up or down)."""


class LucasKanade:
    """Pyramidal Lucas-Kanade from frame to frame and back again."""

    def __init__(self):
        self.gray: dict[int, np.ndarray] = {}

    def image(self, frames: Sequence[np.ndarray], t: int) -> np.ndarray:
        if t not in self.gray:
            self.gray = {k: v for k, v in self.gray.items() if abs(k - t) < 3}
            self.gray[t] = cv2.cvtColor(frames[t], cv2.COLOR_RGB2GRAY)
        return self.gray[t]

    def track(self, frames: Sequence[np.ndarray], order: Sequence[int], points: np.ndarray) -> Tracks:
        self.gray = {}
        n = len(points)
        places = np.repeat(np.asarray(points, np.float32)[None], len(order), 0)
        visible, error = np.ones((len(order), n), bool), np.zeros((len(order), n), np.float32)
        if not n:
            return Tracks(places, visible, error)
        h, w = frames[order[0]].shape[:2]
        for k in range(1, len(order)):
            there, found, miss = flow(self.image(frames, order[k - 1]), self.image(frames, order[k]), places[k - 1])
            within = ((there >= 0) & (there <= [w - 1, h - 1])).all(1)
            places[k], error[k] = there, miss
            visible[k] = visible[k - 1] & found & within  # a lost point does not come back
        return Tracks(places, visible, error)


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
    return ", ".join(f"{len(keys)} keys {what} (first {keys[0]})" for what, keys in parts if keys)


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


# --------------------------------------------------------------------------------------------------------- box tracking


class BoxTracker(Protocol):
    def start(self, frame: np.ndarray, box: np.ndarray, mask: np.ndarray | None) -> None: ...

    def step(self, frame: np.ndarray) -> tuple[np.ndarray | None, float]:
        """Box on the next frame and its confidence in [0, 1]; None while the object is lost."""

    def correct(self, mask: np.ndarray) -> None:
        """The mask found on the same frame, which may pull the box."""


class FlowBox:
    """A box that follows its own corners: Lucas-Kanade with a check backwards, a similarity fitted by RANSAC, template
    matching when the corners fail or the picture inside no longer looks like the object, and search around the
    expected place while it is lost. It never sees the prompt points."""

    side = 20  # of the square patches that are compared

    def __init__(self, least: float = 0.35, recall: float = 0.5, pull: float = 0.3, change: float = 0.4):
        self.least, self.recall, self.pull, self.change = least, recall, pull, change
        y, x = np.mgrid[: self.side, : self.side] / (self.side - 1) * 2 - 1
        weight = np.exp(-2 * (x * x + y * y)).ravel()
        self.middle = (weight / weight.sum()).astype(np.float32)  # corners of a box are background

    def start(self, frame: np.ndarray, box: np.ndarray, mask: np.ndarray | None) -> None:
        self.gray = cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY)
        self.shape = self.gray.shape
        self.box = np.asarray(box, np.float32).copy()
        self.mask, self.area = mask, None if mask is None else float(mask.sum())
        self.speeds: list[np.ndarray] = []
        self.lost, self.largest = 0, self.area
        self.size = self.box[2:] - self.box[:2]  # when the object was last seen whole
        self.first = self.last = self.patch(frame, self.box)

    def patch(self, frame: np.ndarray, box: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Mean Lab colour (3,) of the middle of a box, and what is left of a square patch as a vector of length 1."""
        w, h = np.maximum(box[2:] - box[:2] + 1, 2)
        x, y = float(box[0] + box[2]) / 2, float(box[1] + box[3]) / 2
        m = np.array([[w / self.side, 0, x - w / 2], [0, h / self.side, y - h / 2]], np.float32)
        flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
        p = cv2.warpAffine(frame, m, (self.side, self.side), flags=flags, borderMode=cv2.BORDER_REPLICATE)
        p = cv2.cvtColor(p, cv2.COLOR_RGB2LAB).reshape(-1, 3).astype(np.float32)
        mean = self.middle @ p
        rest = ((p - mean) * np.sqrt(self.middle)[:, None]).ravel()
        return mean, rest / max(float(np.linalg.norm(rest)), 1e-6)

    def likeness(self, frame: np.ndarray, box: np.ndarray) -> float:
        """1: the first template or the last one; colour counts by its distance in Lab (8-bit units), pattern by its
        correlation, up to one half."""
        mean, rest = self.patch(frame, box)
        return max(
            float(np.exp(-np.linalg.norm(mean - m) / 25) * (0.5 + 0.5 * max(float(rest @ r), 0.0)))
            for m, r in (self.first, self.last)
        )

    def corners(self) -> np.ndarray:
        within = np.zeros(self.shape, np.uint8)
        x1, y1, x2, y2 = np.clip(self.box, 0, [self.shape[1] - 1, self.shape[0] - 1] * 2).round().astype(int)
        if self.mask is not None and self.mask.any():
            within[y1 : y2 + 1, x1 : x2 + 1] = self.mask[y1 : y2 + 1, x1 : x2 + 1]
        else:
            within[y1 : y2 + 1, x1 : x2 + 1] = 1
        away = max(2.0, math.hypot(x2 - x1, y2 - y1) / 24)
        found = cv2.goodFeaturesToTrack(self.gray, 60, 0.005, away, mask=within, blockSize=3)
        return found.reshape(-1, 2) if found is not None else np.zeros((0, 2), np.float32)

    def step(self, frame: np.ndarray) -> tuple[np.ndarray | None, float]:
        before, self.gray = self.gray, cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY)
        if self.lost:
            return self.search(frame)
        new, share = None, 0.0
        now, self.gray = self.gray, before
        points = self.corners()
        self.gray = now
        if len(points) >= 4:
            there, found, miss = flow(before, now, points)
            good = found & (miss < max(1.0, math.hypot(*self.shape) / 980))
            if good.sum() >= 4:
                cv2.setRNGSeed(0)
                m, fits = cv2.estimateAffinePartial2D(
                    points[good], there[good], method=cv2.RANSAC, ransacReprojThreshold=3.0
                )
                if m is not None:
                    new, share = self.moved(m), float(fits.mean() * good.mean())
        if new is None:
            new = self.matched(frame, 20, (0.96, 1.0, 1.04))
        alike = self.likeness(frame, new) if new is not None else 0.0
        if alike < self.least:
            again = self.matched(frame, 20, (0.96, 1.0, 1.04))
            score = self.likeness(frame, again) if again is not None else 0.0
            if score > alike:
                new, alike = again, score
        if new is None or alike < self.least or self.outside(new):
            self.lost, self.mask = 1, None
            return None, 0.0
        self.speeds = [*self.speeds, centre(new) - centre(self.box)][-15:]
        self.box, self.mask, self.frame = new, None, frame
        return new.copy(), float(np.clip(0.5 * alike + 0.5 * max(share, alike * 0.5), 0, 1))

    def moved(self, m: np.ndarray) -> np.ndarray:
        scale = float(np.clip(np.hypot(m[0, 0], m[1, 0]), 0.9, 1.1))
        c = m[:, :2] @ centre(self.box) + m[:, 2]
        half = (self.box[2:] - self.box[:2]) / 2 * scale
        return np.r_[c - half, c + half].astype(np.float32)

    def outside(self, box: np.ndarray) -> bool:
        """Whether less than a tenth of the box lies in the picture."""
        h, w = self.shape
        seen = np.maximum(np.minimum(box[2:], [w - 1, h - 1]) - np.maximum(box[:2], 0), 0).prod()
        return bool(seen < 0.1 * max(float((box[2:] - box[:2]).prod()), 1.0))

    def matched(self, frame: np.ndarray, reach: float, scales: tuple[float, ...], step: float = 0) -> np.ndarray | None:
        """Box at the best correlation of the last likely patch around the present place."""
        best, found = -1.0, None
        c, half = centre(self.box), (self.box[2:] - self.box[:2]) / 2
        step = step or max(1.0, reach / 5)
        for scale in scales:
            for dy in np.arange(-reach, reach + 1e-6, step):
                for dx in np.arange(-reach, reach + 1e-6, step):
                    p = c + [dx, dy]
                    if not (0 <= p[0] < self.shape[1] and 0 <= p[1] < self.shape[0]):
                        continue
                    box = np.r_[p - half * scale, p + half * scale].astype(np.float32)
                    score = self.likeness(frame, box)
                    if score > best:
                        best, found = score, box
        return found

    def search(self, frame: np.ndarray) -> tuple[np.ndarray | None, float]:
        """While lost: the expected place moves on with the last speed for a while, the search widens."""
        self.lost += 1
        if self.lost == 2:  # the picture inside may be a sliver by now
            half = self.size / 2
            self.box = np.r_[centre(self.box) - half, centre(self.box) + half].astype(np.float32)
        speed = np.median(self.speeds, 0) if self.speeds else np.zeros(2)
        if self.lost < 20:
            shift = np.clip(centre(self.box) + speed, 0, [self.shape[1] - 1, self.shape[0] - 1]) - centre(self.box)
            self.box = self.box + np.r_[shift, shift].astype(np.float32)
        expected = self.box
        size = float(np.sqrt(np.prod(np.maximum(self.box[2:] - self.box[:2], 1))))
        reach = min(3 * size, (0.2 + 0.1 * self.lost) * size)
        new = self.matched(frame, reach, (1.0,), max(2.0, size / 6))
        if new is not None:  # once more, finer, around the best
            self.box = new
            new = self.matched(frame, size / 6, (0.85, 0.92, 1.0, 1.09, 1.18))
        if new is None:
            return None, 0.0
        alike = self.likeness(frame, new)
        if alike < self.recall:
            self.box = expected
            return None, 0.0
        self.box, self.lost, self.mask, self.frame = new, 0, None, frame
        return new.copy(), alike

    def correct(self, mask: np.ndarray) -> None:
        """Pull towards the mask, and renew the template, as long as the object is seen whole: while it disappears
        behind something, box and template stay as they were."""
        found, area = box_of(mask), float(mask.sum())
        if self.lost or found is None:
            return
        self.mask = mask
        if self.area is None or self.largest is None:
            self.area = self.largest = area
        steady = abs(area - self.area) < self.change * self.area
        self.largest = max(0.98 * self.largest, area if steady else 0.0)
        self.area = area
        if steady and area >= 0.8 * self.largest:
            self.box = ((1 - self.pull) * self.box + self.pull * found).astype(np.float32)
            self.size = self.box[2:] - self.box[:2]
            if self.likeness(self.frame, self.box) > 0.5:
                self.last = self.patch(self.frame, self.box)


class NetworkBox:
    """OSTrack's released tracker, or another with its two methods: boxes are x, y, width, height there. `factory` is
    "module:callable" of code on PYTHONPATH that returns the tracker; confidence is what it gives as `best_score`."""

    def __init__(self, factory: str = "", tracker=None, least: float = 0.2):
        if tracker is None:
            module, _, name = factory.partition(":")
            try:
                tracker = getattr(importlib.import_module(module), name)()
            except (ImportError, AttributeError, ValueError) as error:
                raise UserError(
                    f"--box-tracker {factory}: cannot be imported ({error}); give module:callable of code "
                    "on PYTHONPATH "
                    "that returns a tracker with initialize() and track(), or use flow"
                ) from None
        if not (callable(getattr(tracker, "initialize", None)) and callable(getattr(tracker, "track", None))):
            raise UserError(
                f"--box-tracker {factory}: what it returns has no initialize() and track(), as OSTrack's has"
            )
        self.tracker, self.least = tracker, least

    def start(self, frame: np.ndarray, box: np.ndarray, mask: np.ndarray | None) -> None:
        x, y, x2, y2 = (float(v) for v in box)
        self.tracker.initialize(frame, {"init_bbox": [x, y, x2 - x + 1, y2 - y + 1]})

    def step(self, frame: np.ndarray) -> tuple[np.ndarray | None, float]:
        out = self.tracker.track(frame)
        x, y, w, h = out["target_bbox"]
        score = float(out.get("best_score", 1.0))
        return (np.array([x, y, x + w - 1, y + h - 1], np.float32), score) if score >= self.least else (None, score)

    def correct(self, mask: np.ndarray) -> None:
        """A network keeps its first template."""


def centre(box: np.ndarray) -> np.ndarray:
    return ((box[:2] + box[2:]) / 2).astype(np.float32)


def box_tracker(name: str) -> BoxTracker:
    return FlowBox() if name == "flow" else NetworkBox(name)


# ----------------------------------------------------------------------------------------------------- unstable points


@dataclass(frozen=True)
class FilterOptions:
    """Which tests a point must pass (our reading; the paper's criterion is not known)."""

    border: float = 0.01
    """Share of the picture's sides in which points are dropped; as SAM-PT."""
    back: float = 1.0
    """Largest forward-backward error in pixels at 480p, scaled with the diagonal; 0: not tested. Final."""
    box: float = 0.05
    """Positive points further outside the box than this share of its sides are dropped; after `strikes` frames in a
    row for good. Below 0: not tested."""
    shrink: float = 0.10
    """Negative points are kept only outside the box shrunk by this share."""
    strikes: int = 3
    motion: float = 3.0
    """Times the median absolute deviation (plus a pixel) by which a step may leave the median step; 0: not tested."""
    patch: float = 0.0
    """Likeness of the 3 x 3 Lab patch to the query's below which a point is dropped for good; 0: not tested."""


@dataclass
class Filter:
    """The state of the filter over one pass; one object."""

    options: FilterOptions
    labels: np.ndarray  # (n,) of the query points
    query: np.ndarray | None = None  # (n, 27) Lab patches on the query frame

    def __post_init__(self):
        self.dead = np.zeros(len(self.labels), bool)
        self.outside = np.zeros(len(self.labels), int)

    def keep(
        self,
        now: np.ndarray,
        before: np.ndarray,
        visible: np.ndarray,
        error: np.ndarray,
        box: np.ndarray | None,
        frame: np.ndarray,
    ) -> np.ndarray:
        """(n,) which points may prompt this frame."""
        o, positive = self.options, self.labels == 1
        h, w = frame.shape[:2]
        edge = np.array([w, h]) * o.border
        ok = visible & (now >= edge).all(1) & (now <= np.array([w - 1, h - 1]) - edge).all(1)
        if o.back:
            self.dead |= error > o.back * math.hypot(h, w) / math.hypot(480, 854)
        if o.patch and self.query is not None:
            away = np.linalg.norm(patches(frame, now) - self.query, axis=1)
            self.dead |= np.exp(-away / 18) < o.patch
        if o.box >= 0 and box is not None:
            out = positive & ~inside(now, grow(box, o.box))
            self.outside = np.where(out, self.outside + 1, 0)
            self.dead |= self.outside >= o.strikes
            ok &= ~out & (positive | ~inside(now, grow(box, -o.shrink)))
        ok &= ~self.dead
        if o.motion and (ok & positive).sum() >= 3:
            step = now - before
            middle = np.median(step[ok & positive], 0)
            far = np.abs(step - middle)
            spread = np.median(far[ok & positive], 0)
            ok &= ~positive | (far <= o.motion * spread + 1).all(1)
        return ok


def patches(frame: np.ndarray, points: np.ndarray) -> np.ndarray:
    """(n, 27) the 3 x 3 CIE-Lab patches around points, in Lab units."""
    lab = cv2.cvtColor(frame.astype(np.float32) / 255, cv2.COLOR_RGB2LAB)
    h, w = lab.shape[:2]
    p = points.round().astype(int)
    shifts = np.stack(np.meshgrid((-1, 0, 1), (-1, 0, 1), indexing="ij"), -1).reshape(-1, 2)
    y = np.clip(p[:, None, 1] + shifts[None, :, 0], 0, h - 1)
    x = np.clip(p[:, None, 0] + shifts[None, :, 1], 0, w - 1)
    return lab[y, x].reshape(len(points), -1)

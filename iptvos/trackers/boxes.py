"""Box trackers, which never see the prompt points: optical flow inside the box with re-detection (always here), or any
network that offers `initialize(image, {"init_bbox": xywh})` and `track(image)`, as OSTrack's released tracker does."""

import importlib
import math
from typing import Protocol

from lab.runs import UserError

import cv2
import numpy as np

from prompts import box_of
from trackers.points import flow


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

"""The filter of unstable points, by tests of each point on each frame."""

import math
from dataclasses import dataclass

import cv2
import numpy as np

from prompts import grow, inside


@dataclass(frozen=True)
class FilterOptions:
    """Which tests a point must pass (our reading; the paper's criterion is not known)."""

    border: float = 0.01
    """Share of the picture's sides in which points are dropped; as SAM-PT."""
    back: float = 1.0
    """Largest forward-backward error in pixels at 480p, scaled with the diagonal; after `strikes` frames in a row the
    point is dropped for good. 0: not tested."""
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
        self.outside, self.drifted = np.zeros((2, len(self.labels)), int)

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
            drifts = error > o.back * math.hypot(h, w) / math.hypot(480, 854)
            self.drifted = np.where(drifts, self.drifted + 1, 0)
            self.dead |= self.drifted >= o.strikes
            ok &= ~drifts
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

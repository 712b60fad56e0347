"""Interactions to prompts: query points out of masks and scribbles, boxes out of masks, scribbles to pixels.

Points are (n, 2) float32 rows of (x, y) in pixels of the frame, boxes x1, y1, x2, y2 with the maximum inside. An empty
mask has no points and no box: the object is absent there.
"""

from dataclasses import dataclass, field

import cv2
import kmedoids as fast_kmedoids
import numpy as np
from scipy import ndimage

SELECTIONS = ("kmedoids", "shi-tomasi", "random", "mixed")
NONE = np.zeros((0, 2), np.float32)


@dataclass
class Prompt:
    """What one object asks of the segmenter on one frame."""

    points: np.ndarray = field(default_factory=lambda: NONE)
    """(n, 2) float32, x, y in pixels; positives first."""
    labels: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    """(n,) 1 positive, 0 negative."""
    box: np.ndarray | None = None
    """(4,) x1, y1, x2, y2 in pixels."""
    dense: object | None = None
    """Low-resolution logits (tensor (low, low)) as mask input."""

    @property
    def positive(self) -> np.ndarray:
        return self.points[self.labels == 1]

    @property
    def empty(self) -> bool:
        return self.box is None and not (self.labels == 1).any()


@dataclass
class Interaction:
    """What the user gave for one object on one frame. A mask is taken as it is; everything else prompts the
    segmenter."""

    mask: np.ndarray | None = None
    """(H, W) boolean."""
    box: np.ndarray | None = None
    """(4,) x1, y1, x2, y2 in pixels."""
    points: np.ndarray = field(default_factory=lambda: NONE)
    labels: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    """Clicks."""


def box_of(mask: np.ndarray) -> np.ndarray | None:
    """Tight box of a mask; None with fewer than 2 pixels."""
    if np.count_nonzero(mask) < 2:
        return None
    x, y = np.flatnonzero(mask.any(0)), np.flatnonzero(mask.any(1))
    return np.array([x[0], y[0], x[-1], y[-1]], np.float32)


def grow(box: np.ndarray, share: float) -> np.ndarray:
    """Box whose sides move outwards by a share of their length (negative: inwards)."""
    w, h = box[2] - box[0], box[3] - box[1]
    return box + np.array([-w, -h, w, h], np.float32) * share


def inside(points: np.ndarray, box: np.ndarray) -> np.ndarray:
    return ((points >= box[:2]) & (points <= box[2:])).all(1)


def overlap(a: np.ndarray, b: np.ndarray) -> float:
    """Intersection over union of two boxes."""
    both = np.maximum(np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2]) + 1, 0).prod()
    return float(both / ((a[2:] - a[:2] + 1).prod() + (b[2:] - b[:2] + 1).prod() - both))


def told(p: Prompt, cell: float, shape: tuple[int, int]) -> np.ndarray:
    """What points and box say of (h, w) cells of `cell` pixels: 1 in the 3 x 3 cells around a positive point, -1 around
    a negative one and outside of the box grown by a tenth; 0: nothing."""
    h, w = shape
    out = np.zeros(shape, np.float32)
    if p.box is not None:
        x1, y1, x2, y2 = grow(np.asarray(p.box), 0.1) / cell
        out[:] = -1
        out[max(int(y1), 0) : max(int(y2) + 1, 0), max(int(x1), 0) : max(int(x2) + 1, 0)] = 0
    for value in (0, 1):  # where both are said, the object counts
        for x, y in (p.points[p.labels == value] / cell).astype(int):
            out[max(y - 1, 0) : max(y + 2, 0), max(x - 1, 0) : max(x + 2, 0)] = 1 if value else -1
    return out


def added(before: Interaction | None, one: Interaction) -> tuple[Interaction, bool]:
    """All clicks and the last box of a frame, and whether anything is new."""
    if before is None:
        return one, True
    known = {(*p, v) for p, v in zip(before.points.tolist(), before.labels.tolist(), strict=True)}
    fresh = [
        i for i, (p, v) in enumerate(zip(one.points.tolist(), one.labels.tolist(), strict=True)) if (*p, v) not in known
    ]
    same_box = one.box is None or (before.box is not None and np.array_equal(one.box, before.box))
    points = np.concatenate([before.points, one.points[fresh]])
    labels = np.r_[before.labels, np.asarray(one.labels)[fresh]].astype(int)
    return Interaction(box=before.box if one.box is None else one.box, points=points, labels=labels), bool(
        fresh
    ) or not same_box


def with_positives(mask: np.ndarray, positive: np.ndarray, old: np.ndarray | None = None) -> np.ndarray:
    """Connected parts of a mask that hold a positive point, or a pixel of the `old` mask that is being corrected; the
    mask itself when no part holds a point."""
    number, _ = ndimage.label(mask, np.ones((3, 3)))
    x, y = (
        np.clip(positive.round().astype(int).T, 0, np.array(mask.shape[::-1])[:, None] - 1)
        if len(positive)
        else ([], [])
    )
    keep = {int(v) for v in number[y, x] if v} if len(positive) else set()
    if keep and old is not None:
        keep |= {int(v) for v in np.unique(number[old]) if v}
    return np.isin(number, list(keep)) if keep else mask


# ---------------------------------------------------------------------------------------------------- points of a mask


def select(mask: np.ndarray, n: int, how: str, rng: np.random.Generator, frame: np.ndarray | None = None) -> np.ndarray:
    """n points in a boolean mask (H, W), pixels repeated in turn when it has fewer; none when it is empty."""
    y, x = np.nonzero(mask)
    if not len(x) or n <= 0:
        return NONE
    pixels = np.stack([x, y], 1).astype(np.float32)
    if len(pixels) <= n:
        return pixels[np.arange(n) % len(pixels)]
    if how == "random":
        return pixels[rng.choice(len(pixels), n, replace=False)]
    if how == "kmedoids":
        return medoids(pixels, n, rng)
    if how == "shi-tomasi":
        return corners(mask, n, frame, rng)
    if how == "mixed":
        a, b = n // 4, n // 3
        parts = [medoids(pixels, a, rng), corners(mask, b, frame, rng), select(mask, n - a - b, "random", rng)]
        return np.concatenate(parts)
    raise ValueError(f"no selection {how}")


def medoids(pixels: np.ndarray, n: int, rng: np.random.Generator, most: int = 1800) -> np.ndarray:
    """K-medoids of at most `most` of the pixels, Euclidean: FasterPAM from the medoids that BUILD finds."""
    if n <= 0:
        return NONE
    if len(pixels) > most:
        pixels = pixels[rng.choice(len(pixels), most, replace=False)]
    if len(pixels) <= n:
        return pixels[np.arange(n) % len(pixels)]
    distance = np.sqrt(((pixels[:, None] - pixels[None]) ** 2).sum(-1))
    found = fast_kmedoids.fasterpam(distance, n, init="build", n_cpu=1)
    return pixels[np.asarray(found.medoids, int)]


def corners(mask: np.ndarray, n: int, frame: np.ndarray | None, rng: np.random.Generator) -> np.ndarray:
    """Shi-Tomasi corners inside the eroded mask, filled with k-medoids of the whole one."""
    if n <= 0:
        return NONE
    whole = mask.astype(np.uint8)
    y, x = np.nonzero(mask)
    pixels = np.stack([x, y], 1).astype(np.float32)
    found = NONE
    if frame is not None:
        diagonal = np.hypot(x.max() - x.min() + 1, y.max() - y.min() + 1)
        for share in (0.06, 0.02, 0.01, 0.0):
            side = int(share * diagonal)
            part = cv2.erode(whole, np.ones((side, side), np.uint8)) if side > 0 else whole
            if np.count_nonzero(part) >= 10 or share == 0:
                break
        extent = box_of(part > 0)
        away = np.hypot(extent[2] - extent[0] + 1, extent[3] - extent[1] + 1) / n if extent is not None else 1.0
        gray = cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY)
        got = cv2.goodFeaturesToTrack(gray, n, 0.001, away, mask=part, blockSize=3, gradientSize=3)
        found = got.reshape(-1, 2).astype(np.float32) if got is not None else NONE
    if len(found) < n:
        found = np.concatenate([found, medoids(pixels, n - len(found), rng, 2000)])
    return found


# ----------------------------------------------------------------------------------------------------------- scribbles


def rasterise(scribbles: list[dict], shape: tuple[int, int]) -> np.ndarray:
    """(H, W) int map of the scribbles of one frame, -1 where there is none; each is {"path": [[x, y] in 0..1],
    "object_id"} as in the DAVIS files. Corners are truncated to pixels and joined by straight lines."""
    out = np.full(shape, -1, np.int16)
    size = np.array([shape[1] - 1, shape[0] - 1])
    for s in scribbles:
        path = np.clip(np.asarray(s["path"], float).reshape(-1, 2), 0, 1)
        corners_ = (path * size).astype(int)
        if len(corners_) == 1:
            out[corners_[0, 1], corners_[0, 0]] = s["object_id"]
        for a, b in zip(corners_[:-1], corners_[1:], strict=True):
            n = int(np.abs(b - a).max()) + 1
            x, y = np.linspace(a, b, n).round().astype(int).T
            out[y, x] = s["object_id"]
    return out


def from_scribbles(
    scribbles: list[dict], shape: tuple[int, int], objects: tuple[int, ...], n: int, rng: np.random.Generator
) -> dict[int, Interaction]:
    """Clicks for each object out of scribbles: n medoids of its own as positives, at most 8 of every other id's as
    negatives, none within 2 pixels of another id. Objects without a scribble of their own are not in the answer, unless
    a scribble of the background corrects the frame: then every object gets its negatives."""
    drawn = rasterise(scribbles, shape)
    ids = [int(i) for i in np.unique(drawn) if i >= 0]
    own = {}
    for i in ids:
        other = cv2.dilate(((drawn >= 0) & (drawn != i)).astype(np.uint8), np.ones((5, 5), np.uint8)) > 0
        free = (drawn == i) & ~other
        own[i] = free if free.any() else drawn == i
    out = {}
    for o in objects:
        positive = select(own[o], n, "kmedoids", rng) if o in own else NONE
        negatives = [select(own[i], min(8, n), "kmedoids", rng) for i in ids if i != o]
        negative = np.concatenate([NONE, *negatives])
        if len(positive) or len(negative):
            points = np.concatenate([positive, negative]).astype(np.float32)
            out[o] = Interaction(points=points, labels=np.r_[np.ones(len(positive), int), np.zeros(len(negative), int)])
    return out

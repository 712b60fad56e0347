"""A simulated user: looks at the worst frame it has not touched and gives a scribble, click, box or mask there.

Ties are broken by the lower frame and the first pixel row by row.
"""

import numpy as np
from scipy import ndimage

from prompts import Interaction, box_of, from_scribbles, select

KINDS = ("mask", "scribble", "click", "box")


def worst_frame(scores: np.ndarray, used: set[int]) -> int | None:
    """Frame with the lowest mean over objects of (J + F) / 2 among those not used; None when all are."""
    mean = scores.mean((1, 2)) if scores.shape[1] else np.full(len(scores), np.nan)
    free = [t for t in range(len(mean)) if t not in used and np.isfinite(mean[t])]
    return min(free, key=lambda t: (mean[t], t)) if free else None


def give(
    kind: str,
    truth: np.ndarray,
    labels: np.ndarray | None,
    objects: tuple[int, ...],
    rng: np.random.Generator,
    clicks: int = 1,
    points: int = 16,
) -> dict[int, Interaction]:
    """What the user gives on one frame: truth and present answer are (H, W) label maps; without an answer it is the
    first round."""
    if kind == "mask":
        return {o: Interaction(mask=truth == o) for o in objects}
    if kind == "box":
        boxes = {o: box_of(truth == o) for o in objects}
        return {o: Interaction(mask=truth == o) if b is None else Interaction(box=b) for o, b in boxes.items()}
    if labels is None:
        labels = np.zeros_like(truth)
    if kind == "scribble":
        from scribbles import scribbles  # here: networkx and skimage take a second to load, and nothing else needs them

        return from_scribbles(scribbles(truth, labels, objects), truth.shape, objects, points, rng)
    out = {}
    for o in objects:
        first = click(truth == o, labels == o)
        if first is not None:
            point, label, region = first
            more = select(region, clicks - 1, "kmedoids", rng)  # further clicks inside the same region
            out[o] = Interaction(points=np.concatenate([point[None], more]), labels=np.full(1 + len(more), label))
    return out


def largest(mask: np.ndarray) -> np.ndarray:
    """Largest connected part of a mask, the first row by row on ties."""
    number, n = ndimage.label(mask, np.ones((3, 3)))
    return number == 1 + int(np.argmax(np.bincount(number.ravel())[1:])) if n else mask


def click(truth: np.ndarray, answer: np.ndarray) -> tuple[np.ndarray, int, np.ndarray] | None:
    """Centre of the largest connected error region, its label (1 missing, 0 too much) and the region (H, W); None
    without an error."""
    parts = [(largest(e), v) for e, v in ((truth & ~answer, 1), (answer & ~truth, 0)) if e.any()]
    if not parts:
        return None
    region, label = max(parts, key=lambda p: p[0].sum())
    depth = ndimage.distance_transform_edt(np.pad(region, 1))[1:-1, 1:-1]
    y, x = np.unravel_index(np.argmax(depth), depth.shape)
    return np.array([x, y], np.float32), label, region


def first_frame(truth: list[np.ndarray | None], objects: tuple[int, ...]) -> int:
    """The frame on which the objects are largest: the smallest share of an object's own largest area decides."""
    known = [t for t, g in enumerate(truth) if g is not None]
    areas = np.array([[np.count_nonzero(truth[t] == o) for o in objects] for t in known], float)
    return known[int(np.argmax((areas / np.maximum(areas.max(0), 1)).min(1)))]

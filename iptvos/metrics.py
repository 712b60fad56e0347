"""Region similarity J, boundary accuracy F as davis2017-evaluation computes them, and the curves of interactive
rounds."""

import math

import cv2
import numpy as np


def region(prediction: np.ndarray, truth: np.ndarray) -> float:
    """J of two boolean masks (H, W): intersection over union, 1 when both are empty."""
    union = np.logical_or(prediction, truth).sum()
    return float(np.logical_and(prediction, truth).sum() / union) if union else 1.0


def boundary_map(mask: np.ndarray) -> np.ndarray:
    """Pixels that differ from their right, lower or lower-right neighbour; (H, W) boolean."""
    m = np.pad(mask.astype(bool), ((0, 1), (0, 1)), mode="edge")
    here = m[:-1, :-1]
    return (here ^ m[:-1, 1:]) | (here ^ m[1:, :-1]) | (here ^ m[1:, 1:])


def tolerance(shape: tuple[int, int]) -> int:
    """Pixels a boundary may be away: 0.8 % of the diagonal, rounded up."""
    return math.ceil(0.008 * math.hypot(*shape))


def disk(radius: int) -> np.ndarray:
    y, x = np.mgrid[-radius : radius + 1, -radius : radius + 1]
    return (x * x + y * y <= radius * radius).astype(np.uint8)


def boundary(prediction: np.ndarray, truth: np.ndarray) -> float:
    """F of two boolean masks (H, W): harmonic mean of the shares of boundary pixels that meet the other boundary."""
    p, t = boundary_map(prediction), boundary_map(truth)
    kernel = disk(tolerance(truth.shape))
    near_t, near_p = (cv2.dilate(m.astype(np.uint8), kernel).astype(bool) for m in (t, p))
    n_p, n_t = int(p.sum()), int(t.sum())
    if not n_p and not n_t:
        return 1.0
    precision = float((p & near_t).sum() / n_p) if n_p else 1.0
    recall = float((t & near_p).sum() / n_t) if n_t else 1.0
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def score(
    labels: list[np.ndarray],
    truth: list[np.ndarray | None],
    objects: tuple[int, ...],
    before: tuple[list[np.ndarray], np.ndarray] | None = None,
) -> np.ndarray:
    """(frames, objects, 2): J and F; NaN where a frame has no truth. Labels are (H, W) integer maps; void (255) in the
    truth is another label, as in the official scorers. `before`: labels and scores of which those are taken whose map
    is the same array."""
    out = np.full((len(truth), len(objects), 2), np.nan)
    for t, (p, g) in enumerate(zip(labels, truth, strict=True)):
        if before is not None and before[0][t] is p:
            out[t] = before[1][t]
        elif g is not None:
            for i, o in enumerate(objects):
                out[t, i] = region(p == o, g == o), boundary(p == o, g == o)
    return out


def auc(seconds: list[float], values: list[float], timeout: float) -> float:
    """Area under the curve of values against cumulative seconds, from (0, 0), the last value held until the
    timeout, divided by the timeout. Rounds after the timeout do not count."""
    x, y = curve(seconds, values, timeout)
    return float(np.trapezoid(y, x) / timeout)


def at(seconds: list[float], values: list[float], moment: float, timeout: float) -> float:
    """Value of the same curve at a moment (J&F@60s: 60), linear in between."""
    x, y = curve(seconds, values, timeout)
    return float(np.interp(moment, x, y))


def summary(found: list[dict], rounds: int, timeout: float) -> tuple[float, float]:
    """AUC-J&F and J&F@60s over samples as the DAVIS protocol pools them: one curve of the mean J&F after each round
    (over objects) against the mean cumulative seconds (over samples); to the timeout of an object times the mean number
    of objects. `found`: metrics `jf_r`, `seconds_r` and `objects` of each sample."""
    objects = np.array([m["objects"] for m in found], float)
    held = [in_time(m, rounds, timeout * m["objects"]) for m in found]
    values = np.average([v for v, _ in held], axis=0, weights=objects).tolist()
    seconds = np.cumsum(np.mean([s for _, s in held], axis=0)).tolist()
    whole = timeout * float(objects.mean())
    return auc(seconds, values, whole), at(seconds, values, 60.0, whole)


def in_time(m: dict, rounds: int, timeout: float) -> tuple[list[float], list[float]]:
    """J&F and seconds of each round of a sample. A round that ends after its timeout does not count: the last value is
    held (0 before the first), at no cost, as the DAVIS protocol fills them in."""
    values, seconds, total = [], [], 0.0
    for r in range(1, rounds + 1):
        total += m[f"seconds_{r}"]
        late = total > timeout
        values.append((values[-1] if values else 0.0) if late else m[f"jf_{r}"])
        seconds.append(0.0 if late else m[f"seconds_{r}"])
    return values, seconds


def curve(seconds: list[float], values: list[float], timeout: float) -> tuple[np.ndarray, np.ndarray]:
    kept = [(s, v) for s, v in zip(seconds, values, strict=True) if s <= timeout]
    x, y = [0.0, *(s for s, _ in kept)], [0.0, *(v for _, v in kept)]
    return np.array([*x, timeout]), np.array([*y, y[-1]])

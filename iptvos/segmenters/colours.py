"""Where colour alone tells an object from its surroundings.

The network of `first.py` sees too coarsely for an object of a few of its cells, and knows little of a thing unlike its
training pictures; motion says nothing of two things that both move. Colours need neither. Whether they suffice is
measured: by how many colours a mask has in common with a ring around it.
"""

from collections.abc import Sequence

import cv2
import numpy as np
from scipy import ndimage

# Between what procedural videos (seeds 100 to 114) and dog, libby and dance-twirl of DAVIS have. Objects of the first
# share up to 0.17, one 0.21 of their colours with their surroundings, the others 0.34 and more; a wrong mask is up to
# 0.39 like the object elsewhere, one with J above 0.49 from 0.58 on.
APART = 0.2
LIKE = 0.5
BINS = (8, 16, 16)  # of lightness and the two axes of Lab
Seen = Sequence[tuple[np.ndarray, np.ndarray]]  # frames (H, W, 3) and the object's masks (H, W) on them


def ring(mask: np.ndarray) -> np.ndarray:
    """What is around a mask (H, W), up to half its radius away; the pixels at its border are in neither."""
    away = cv2.distanceTransform((~mask).astype(np.uint8), cv2.DIST_L2, 5)
    return (away > 1.5) & (away < 1.5 + max(3, 0.5 * np.sqrt(np.count_nonzero(mask) / np.pi)))


def lab(frame: np.ndarray) -> np.ndarray:
    return cv2.cvtColor(cv2.GaussianBlur(frame, (0, 0), 1.0), cv2.COLOR_RGB2LAB)


def histogram(colours: Sequence[np.ndarray]) -> np.ndarray:
    """Shares of the bins, a little smoothed, of all the pixels (n, 3) of several frames."""
    pixels = np.concatenate(list(colours)).astype(float)
    counts = np.histogramdd(pixels, bins=BINS, range=((0, 256),) * 3)[0]
    return ndimage.gaussian_filter(counts / max(len(pixels), 1), 0.6)


def common(seen: Seen) -> float:
    """Which share of the colours of masks is also that of the rings around them; 1 where nothing can be said."""
    fit = [(f, m) for f, m in seen if 20 <= np.count_nonzero(m) <= 0.8 * m.size]
    pairs = [(lab(f), m, ring(m)) for f, m in fit]
    if not any(r.any() for _, _, r in pairs):
        return 1.0
    return float(np.minimum(histogram([x[m] for x, m, _ in pairs]), histogram([x[r] for x, _, r in pairs])).sum())


def told(frame: np.ndarray, seen: Seen) -> np.ndarray | None:
    """(H, W) pixels of a frame that rather have the colours of the object on frames where its mask is known than those
    of anything else there; None where its colours are not its own."""
    if common(seen) >= APART:
        return None
    pairs = [(lab(f), m) for f, m in seen]
    own, around, rest = (histogram([x[part(m)] for x, m in pairs]) for part in (lambda m: m, ring, np.logical_not))
    odds = np.log((own + 1e-5) / ((around + rest) / 2 + 1e-5))
    place = tuple((lab(frame) // (256 // np.array(BINS))).reshape(-1, 3).T)
    return odds[place].reshape(frame.shape[:2]) > 0


def like(frame: np.ndarray, mask: np.ndarray, seen: Seen) -> float:
    """Which share of the colours of a mask on a frame is also that of the object on others."""
    if not mask.any():
        return 0.0
    return float(np.minimum(histogram([lab(frame)[mask]]), histogram([lab(f)[m] for f, m in seen])).sum())

"""From a user's clicks or box to a mask, without a network that was trained for it.

A place near the clicks, or in the box, is probably the object. A ridge regression from features of the picture (network
and colour) to this guess sharpens it, and is fitted again to its own answer: an expectation-maximisation with two
classes that share a covariance. At the end GrabCut finds the border. One click says nothing of the extent, so there are
several answers, from small to large.
"""

from dataclasses import dataclass

import cv2
import numpy as np
import torch
from torch import Tensor

import crstm
from prompts import Interaction, box_of
from segmenters.interface import resample, share

SCALES = (0.05, 0.1, 0.19)  # of the long side: how far around a click the object may reach
CLICKS = 5  # more than so many are a scribble
CLOSE = 0.02  # of the long side: how far a click of a correction says what is there
FEW, MANY = (1, 2, 0), (0, 1, 2)  # which of them is meant, unless a click says otherwise: for clicks, for a scribble
SURE = 1e-3


@dataclass(frozen=True)
class Options:
    rounds: int = 4
    """Of the expectation-maximisation."""
    ridge: float = 0.02
    """Regularisation of the regression."""
    weight: float = 2.0
    """Of its answer beside the guess, in log-odds."""
    inside: float = 0.6
    """Probability of the middle of a box."""
    side: int = 300
    """Longest side of the picture that GrabCut sees."""
    iterations: int = 2
    """Of GrabCut."""
    high: float = 0.85
    """Probability from which a place is surely the object for GrabCut."""
    low: float = 0.05
    """Probability below which it surely is not."""


CORRECTION = Options(rounds=2, weight=1.0)  # beside a mask that stands there, features count for less


def vectors(frame: np.ndarray, features: Tensor, cell: float) -> Tensor:
    """(C + 7, h, w): standardised features, a constant, Lab colour and its squares, a column a cell."""
    x = crstm.Basis.of(features, 1).vector(features).cpu()
    lab = cv2.cvtColor(frame, cv2.COLOR_RGB2LAB)
    colour = torch.stack([share(lab[..., i], cell, x.shape[1:]) for i in range(3)])
    colour = (colour - colour.mean((1, 2), keepdim=True)) / (colour.std((1, 2), keepdim=True) + 1)
    return torch.cat([x, colour, colour.square() - 1])


def sharpened(x: Tensor, guess: Tensor, inside: Tensor, outside: Tensor, o: Options) -> Tensor:
    """Probabilities (h, w) of vectors (C, h, w) out of a first guess (h, w); `inside` and `outside` (h, w) boolean are
    known."""
    rows = x.flatten(1).T
    p, prior = guess.clone(), crstm.logit(guess)
    for _ in range(o.rounds):
        p[inside], p[outside] = 1.0, 0.0
        y = p.flatten()
        weight = (y / y.sum().clamp_min(1e-6) + (1 - y) / (1 - y).sum().clamp_min(1e-6)) / 2
        weighted = rows * weight[:, None]
        normal = weighted.T @ rows + o.ridge * torch.eye(rows.shape[1])
        w = torch.linalg.solve(normal, weighted.T @ (2 * y - 1))
        p = (prior + o.weight * torch.einsum("c,chw->hw", w, x)).sigmoid()
    p[inside], p[outside] = 1.0, 0.0
    return p


def bordered(frame: np.ndarray, p: np.ndarray, o: Options) -> np.ndarray:
    """The mask (H, W) of probabilities (H, W) with the border that GrabCut finds; where it disagrees altogether, what
    the probabilities say."""
    plain, possible = p > 0.5, box_of(p > o.low)
    if possible is None:
        return plain
    h, w = p.shape
    x1, y1, x2, y2 = possible.astype(int)
    pad = 8 + int(0.35 * max(x2 - x1, y2 - y1))
    x1, y1, x2, y2 = max(x1 - pad, 0), max(y1 - pad, 0), min(x2 + pad + 1, w), min(y2 + pad + 1, h)
    shrink = min(1.0, o.side / max(x2 - x1, y2 - y1))
    size = max(2, round((x2 - x1) * shrink)), max(2, round((y2 - y1) * shrink))
    crop = cv2.resize(frame[y1:y2, x1:x2], size, interpolation=cv2.INTER_AREA)
    small = cv2.resize(p[y1:y2, x1:x2].astype(np.float32), size, interpolation=cv2.INTER_AREA)
    trimap = np.where(small > 0.5, cv2.GC_PR_FGD, cv2.GC_PR_BGD).astype(np.uint8)
    trimap[small > o.high], trimap[small < o.low] = cv2.GC_FGD, cv2.GC_BGD
    inside = (trimap == cv2.GC_FGD) | (trimap == cv2.GC_PR_FGD)
    if inside.sum() < 8 or (~inside).sum() < 8:  # a colour model of 5 parts needs some pixels
        return plain
    cv2.setRNGSeed(0)  # its k-means draws; the answer must not depend on what ran before
    models = np.zeros((1, 65)), np.zeros((1, 65))
    cv2.grabCut(crop, trimap, None, *models, o.iterations, cv2.GC_INIT_WITH_MASK)
    found = ((trimap == cv2.GC_FGD) | (trimap == cv2.GC_PR_FGD)).astype(np.float32)
    out = np.zeros((h, w), bool)
    out[y1:y2, x1:x2] = cv2.resize(found, (x2 - x1, y2 - y1), interpolation=cv2.INTER_LINEAR) > 0.5
    both = np.count_nonzero(out & plain) / max(np.count_nonzero(out | plain), 1)
    return out if both > 0.5 else plain


def answer(
    frame: np.ndarray, features: Tensor, cell: float, given: Interaction, before: np.ndarray | None
) -> tuple[np.ndarray, float]:
    """The mask (H, W) of all clicks and the box of a frame, `before` what stood there before the first of them. Among
    the sizes that clicks may mean, the first of FEW or MANY counts that agrees with every click."""
    if given.box is None and before is not None:
        return corrected(frame, features, cell, given, before)
    if given.box is not None or not (given.labels == 1).any():
        return masks(frame, features, cell, given)[-1]
    positive = given.labels == 1
    alone = Interaction(points=given.points[positive], labels=given.labels[positive])
    found = masks(frame, features, cell, alone)
    x, y = np.clip(given.points.round().astype(int), 0, np.array(frame.shape[1::-1]) - 1).T
    order = FEW if len(alone.points) <= CLICKS else MANY
    for i in order:
        if (found[i][0][y, x] == positive).all():
            return found[i]
    return corrected(frame, features, cell, given, found[order[0]][0])


def masks(
    frame: np.ndarray, features: Tensor, cell: float, given: Interaction, o: Options | None = None
) -> list[tuple[np.ndarray, float]]:
    """Masks (H, W) of clicks and a box on a frame with features (C, h, w) on cells of `cell` pixels, and how sure each
    is; with a box one, else one a scale, from small to large. Clicks are always on their side of a mask's border."""
    o = o or Options()
    (h, w), grid = frame.shape[:2], features.shape[1:]
    x = vectors(frame, features, cell)
    rows, columns = torch.meshgrid(*((torch.arange(n) + 0.5) * cell for n in grid), indexing="ij")

    def near(points: np.ndarray) -> Tensor:
        """Pixels from the middle of each cell to the nearest point."""
        if not len(points):
            return torch.full(grid, float("inf"))
        return torch.stack([torch.hypot(columns - float(px), rows - float(py)) for px, py in points]).amin(0)

    to, away = near(given.points[given.labels == 1]), near(given.points[given.labels == 0])
    clicked, refused = to < 1.2 * cell, away < 1.2 * cell
    long, guesses = max(h, w), []
    if given.box is not None:
        x1, y1, x2, y2 = (float(v) for v in given.box)
        u = (columns - (x1 + x2) / 2).abs() / max((x2 - x1) / 2, cell)
        v = (rows - (y1 + y2) / 2).abs() / max((y2 - y1) / 2, cell)
        within = (u <= 1) & (v <= 1)
        guess = torch.where(within, o.inside * torch.exp(-0.5 * (u**4 + v**4)), torch.tensor(SURE))
        guess = torch.maximum(guess, 0.9 * torch.exp(-((to / (SCALES[0] * long)) ** 2))) if len(given.points) else guess
        guesses.append((guess, (u > 1.05) | (v > 1.05)))
    else:
        for s in SCALES:
            guesses.append((torch.exp(-((to / (s * long)) ** 2)).clamp(SURE, 0.9), to > 4 * s * long))
    out = []
    for guess, far in guesses:
        guess = torch.minimum(guess, 1 - torch.exp(-((away / (SCALES[0] * long)) ** 2))).clamp_min(SURE)
        p = sharpened(x, guess, clicked & ~refused, (far | refused) & ~clicked, o)
        full = resample(p.numpy(), cell, 1.0, (h, w))
        mask = bordered(frame, full, o)
        if given.box is not None:  # the box bounds the object
            bounded = np.zeros_like(mask)
            bounded[max(int(y1), 0) : int(y2) + 1, max(int(x1), 0) : int(x2) + 1] = True
            mask &= bounded
        out.append((mask, crstm.confidence(crstm.logit(p))))
    return out


def corrected(
    frame: np.ndarray, features: Tensor, cell: float, given: Interaction, before: np.ndarray, o: Options | None = None
) -> tuple[np.ndarray, float]:
    """A mask (H, W) `before`, corrected by clicks: what changes is connected to a click, the rest stays as it was. The
    many clicks of a scribble say where the border runs, so each of them changes only what is close."""
    o = o or CORRECTION
    (h, w), grid, long = frame.shape[:2], features.shape[1:], max(frame.shape[:2])
    guess = share(before, cell, grid).clamp(0.02, 0.98)
    rows, columns = torch.meshgrid(*((torch.arange(n) + 0.5) * cell for n in grid), indexing="ij")
    known = torch.zeros(2, *grid, dtype=torch.bool)
    for (px, py), label in zip(given.points, given.labels, strict=True):
        d = torch.hypot(columns - float(px), rows - float(py))
        guess = guess + torch.exp(-((d / (CLOSE * long)) ** 2)) * ((0.9 if label else 0.1) - guess)
        known[int(label)] |= d < 1.2 * cell
    p = sharpened(vectors(frame, features, cell), guess, known[1] & ~known[0], known[0] & ~known[1], o)
    found = bordered(frame, resample(p.numpy(), cell, 1.0, (h, w)), o)
    out, radius = before.copy(), max(2, round(0.004 * long))
    reach = CLOSE * long if len(given.points) > CLICKS else long
    for (px, py), label in zip(given.points.round().astype(int).tolist(), given.labels, strict=True):
        place, close = np.zeros((2, h, w), np.uint8)
        cv2.circle(place, (px, py), radius, 1, -1)
        cv2.circle(close, (px, py), max(radius, round(reach)), 1, -1)
        wrong = ((found & ~before) if label else (before & ~found)) & (close > 0)
        number = cv2.connectedComponents(wrong | place)[1]
        out[np.isin(number, np.unique(number[place > 0]))] = bool(label)
    return out, crstm.confidence(crstm.logit(p))

"""OpenCV's GrabCut as a segmenter: no weights, no network."""

import cv2
import numpy as np
import torch
from torch import Tensor

from features import lite0
from prompts import Interaction, Prompt, box_of, grow, inside, overlap
from segmenters import first
from segmenters.colours import Seen
from segmenters.interface import Decoded, Embedding, Geometry


class GrabCut:
    """OpenCV's GrabCut on a crop around the prompts. Points are sure pixels, the box bounds the object, the dense
    prompt and, without one, box or hull of the points say which pixels are probably the object. Predicted IoU stands in
    for SAM's: agreement of the mask with box, dense prompt and points."""

    cells, mask_threshold, memory_is_mask = 64, 0.0, True

    def __init__(self, side: int = 144, iterations: int = 2, device: torch.device | None = None):
        self.side, self.iterations, self.device = side, iterations, device or torch.device("cpu")

    def encode(self, frame: np.ndarray) -> Embedding:
        return Embedding(Geometry(*frame.shape[:2], self.cells), frame)

    def features(self, e: Embedding) -> Tensor:
        if e.features is None:
            e.features, e.cell = lite0(str(self.device))(e.data)
        return e.features

    def first(
        self,
        e: Embedding,
        given: Interaction,
        before: np.ndarray | None,
        other: np.ndarray | None,
        seen: Seen = (),
    ) -> tuple[np.ndarray, float]:
        """A user's clicks and box on a frame as a mask (H, W); `other` is a frame next to it in time, `seen` are frames
        on which the object's mask is known. SAM needs no such help and has no such method."""
        if e.scene is None:
            features = self.features(e)
            deep = lite0(str(self.device)).deep(features)
            e.scene = first.Scene.of(e.data, features.cpu(), deep.cpu(), e.cell, other)
        return first.answer(e.scene, given, before, seen)

    def decode(self, e: Embedding, prompts: list[Prompt]) -> list[Decoded]:
        return [self.one(e, p) for p in prompts]

    def one(self, e: Embedding, p: Prompt) -> Decoded:
        frame, g = e.data, e.geometry
        h, w = g.height, g.width
        dense = None if p.dense is None else g.full(p.dense)
        region = self.region(p, dense, h, w)
        if region is None:
            return torch.full((4 * g.cells,) * 2, -8.0), 0.0
        x1, y1, x2, y2 = region
        shrink = min(1.0, self.side / max(x2 - x1, y2 - y1))
        size = max(2, round((x2 - x1) * shrink)), max(2, round((y2 - y1) * shrink))
        crop = cv2.resize(frame[y1:y2, x1:x2], size, interpolation=cv2.INTER_AREA)
        place = np.array([x1, y1], np.float32)
        points = ((p.points - place + 0.5) * shrink - 0.5) if len(p.points) else p.points
        box = None if p.box is None else (np.asarray(p.box, np.float32) - np.tile(place, 2)) * shrink
        prior = None if dense is None else cv2.resize(dense[y1:y2, x1:x2], size, interpolation=cv2.INTER_AREA)
        trimap = self.trimap(size, points, p.labels, box, prior)
        mask = self.cut(crop, trimap)
        blurred = cv2.GaussianBlur(mask.astype(np.float32), (0, 0), 0.8)
        logits = np.log(np.clip(blurred, 2e-3, 1 - 2e-3) / np.clip(1 - blurred, 2e-3, 1 - 2e-3))
        out = np.full((h, w), -8.0, np.float32)
        out[y1:y2, x1:x2] = cv2.resize(logits, (x2 - x1, y2 - y1), interpolation=cv2.INTER_LINEAR)
        return g.low(out), self.trust(mask, points, p.labels, box, prior)

    @staticmethod
    def region(p: Prompt, dense: np.ndarray | None, h: int, w: int) -> tuple[int, int, int, int] | None:
        """The crop: box, else positive points, and the dense prompt, with room around."""
        parts = []
        if p.box is not None:
            parts.append(grow(np.asarray(p.box, np.float32), 0.15))
        elif (p.labels == 1).any():
            q = p.positive
            span = np.r_[q.min(0), q.max(0)]
            least = 0.08 * max(h, w)
            pad = np.maximum((span[2:] - span[:2]) * 0.4, least)
            parts.append(np.r_[span[:2] - pad, span[2:] + pad])
        if dense is not None:
            found = box_of(dense > 0)
            if found is not None:
                parts.append(grow(found, 0.15))
        if not parts:
            return None
        low, high = np.min([b[:2] for b in parts], 0) - 2, np.max([b[2:] for b in parts], 0) + 3
        x1, y1 = (int(np.clip(np.floor(v), 0, m - 2)) for v, m in zip(low, (w, h), strict=True))
        x2, y2 = (int(np.clip(np.ceil(v), a + 2, m)) for v, a, m in zip(high, (x1, y1), (w, h), strict=True))
        return (x1, y1, x2, y2) if h >= 2 and w >= 2 else None

    @staticmethod
    def trimap(size, points, labels, box, prior) -> np.ndarray:
        w, h = size
        out = np.full((h, w), cv2.GC_PR_BGD, np.uint8)
        y, x = np.mgrid[:h, :w]
        if prior is not None:
            out[prior > 0] = cv2.GC_PR_FGD
            out[prior < -4] = cv2.GC_BGD
            out[prior > 4] = cv2.GC_FGD
        elif box is not None:
            out[(x >= box[0]) & (x <= box[2]) & (y >= box[1]) & (y <= box[3])] = cv2.GC_PR_FGD
        elif (labels == 1).sum() >= 3:
            hull = cv2.convexHull(points[labels == 1].astype(np.float32)).round().astype(np.int32)
            area = np.zeros((h, w), np.uint8)
            cv2.fillConvexPoly(area, hull, 1)
            out[cv2.dilate(area, np.ones((5, 5), np.uint8)) > 0] = cv2.GC_PR_FGD
        if box is not None:  # the box grown by a tenth bounds the object
            b = grow(box, 0.1)
            out[(x < b[0]) | (x > b[2]) | (y < b[1]) | (y > b[3])] = cv2.GC_BGD
        radius = max(1, round(0.015 * max(w, h)))
        for (px, py), label in zip(points, labels, strict=True):
            if -radius <= px < w + radius and -radius <= py < h + radius:
                value = cv2.GC_FGD if label == 1 else cv2.GC_BGD
                cv2.circle(out, (round(float(px)), round(float(py))), radius, int(value), -1)
        return out

    def cut(self, crop: np.ndarray, trimap: np.ndarray) -> np.ndarray:
        """GrabCut, or the trimap's own guess where there is nothing to tell apart."""
        guess = (trimap == cv2.GC_FGD) | (trimap == cv2.GC_PR_FGD)
        if guess.sum() < 8 or (~guess).sum() < 8:  # a colour model of 5 parts needs some pixels
            return guess
        cv2.setRNGSeed(0)  # its k-means draws; the answer must not depend on what ran before
        work, models = trimap.copy(), (np.zeros((1, 65)), np.zeros((1, 65)))
        cv2.grabCut(crop, work, None, *models, self.iterations, cv2.GC_INIT_WITH_MASK)
        return (work == cv2.GC_FGD) | (work == cv2.GC_PR_FGD)

    @staticmethod
    def trust(mask, points, labels, box, prior) -> float:
        parts, found = [], box_of(mask)
        if found is None:
            return 0.0
        if box is not None:
            parts.append(overlap(found, box))
        if prior is not None:
            p = 1 / (1 + np.exp(-prior))
            parts.append(float(np.minimum(p, mask).sum() / max(float(np.maximum(p, mask).sum()), 1e-6)))
        if len(points):
            h, w = mask.shape
            within = inside(points, np.array([0, 0, w - 1, h - 1]))
            x, y = np.clip(points.round().astype(int), 0, [w - 1, h - 1]).T
            parts.append(float(((mask[y, x] & within) == (labels == 1)).mean()))
        return float(np.clip(np.mean(parts), 0, 1)) if parts else 0.0

"""A simulated user: looks at the worst frame it has not touched and gives a scribble, click, box or mask there.

Scribbles follow the DAVIS interactive robot's published recipe: error region of each id,
smoothing by opening, medial axis, longest path of its graph, Bezier curve. Ties are broken by the lower frame and the
first pixel row by row.
"""

from math import comb

import cv2
import networkx as nx
import numpy as np
from scipy import ndimage
from skimage.morphology import medial_axis

from metrics import disk
from prompts import NONE, Interaction, box_of, from_scribbles, select

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


# ------------------------------------------------------------------------------------------------------------ scribbles


def scribbles(truth: np.ndarray, labels: np.ndarray, objects: tuple[int, ...]) -> list[dict]:
    """Scribbles as in DAVIS files, {"path": [[x, y] in 0..1], "object_id", "start_time", "end_time"}, one a connected
    part of the skeleton of each id's missing region; id 0 is the background."""
    out = []
    h, w = truth.shape
    for o in (0, *objects):
        missing = (truth == o) & (labels != o)
        if o == 0 and not labels.any():
            continue  # nothing was answered yet, so nothing is too much
        for path in curves(missing):
            out.append(
                {
                    "path": (path / [w, h]).tolist(),
                    "object_id": int(o),
                    "start_time": len(out),
                    "end_time": len(out) + 1,
                }
            )
    return out


def curves(
    region: np.ndarray, kernel: float = 0.2, most: float = 16, least: int = 4, samples: int = 1000
) -> list[np.ndarray]:
    """Curves (samples, 2) of x, y in pixels through the skeleton of a region; none where it is too small."""
    area = int(region.sum())
    if not area:
        return []
    radius = min(kernel * np.sqrt(area) / 2, most)
    smooth = region
    while radius > 1:
        opened = cv2.morphologyEx(region.astype(np.uint8), cv2.MORPH_OPEN, disk(int(round(radius)))) > 0
        if opened.any():
            smooth = opened
            break
        radius *= 0.9
    skeleton = medial_axis(smooth, rng=np.random.default_rng(0))
    graph = nx.Graph()
    pixels = {tuple(p) for p in np.argwhere(skeleton)}
    graph.add_nodes_from(sorted(pixels))
    for y, x in sorted(pixels):
        for dy, dx in ((0, 1), (1, -1), (1, 0), (1, 1)):
            if (y + dy, x + dx) in pixels:
                graph.add_edge((y, x), (y + dy, x + dx), weight=float(np.hypot(dy, dx)))
    out = []
    for part in sorted(nx.connected_components(graph), key=min):
        if len(part) < least:
            continue
        path = np.array(skeleton_path(graph.subgraph(part)), float)[:, ::-1]  # x, y
        out.append(bezier(path, samples))
    return out


def skeleton_path(part: nx.Graph) -> list[tuple[int, int]]:
    """Longest path of a connected graph of pixels (row, column) once every cycle has lost its heaviest edge."""
    tree = nx.minimum_spanning_tree(part)
    return furthest(tree, furthest(tree, min(tree))[-1])


def furthest(tree: nx.Graph, start: tuple[int, int]) -> list[tuple[int, int]]:
    """Path to the node furthest from start, the smallest on ties."""
    lengths, paths = nx.single_source_dijkstra(tree, start)
    return paths[min(lengths, key=lambda n: (-lengths[n], n))]


def bezier(points: np.ndarray, samples: int, most: int = 60) -> np.ndarray:
    """Bezier curve of the control points; a long path is thinned to `most` of them, so that the binomials stay
    small."""
    if len(points) > most:
        points = points[np.linspace(0, len(points) - 1, most).round().astype(int)]
    n, t = len(points) - 1, np.linspace(0, 1, samples)
    basis = np.stack([comb(n, k) * t**k * (1 - t) ** (n - k) for k in range(n + 1)], 1)
    return basis @ points


__all__ = ["KINDS", "NONE", "give", "worst_frame", "first_frame", "scribbles", "click"]

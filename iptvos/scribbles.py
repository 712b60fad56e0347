"""Scribbles of the simulated user, after the DAVIS interactive robot's published recipe: error region of each id,
smoothing by opening, medial axis, longest path of its graph, Bezier curve. Ties go to the first pixel row by row."""

import cv2
import networkx as nx
import numpy as np
from scipy.stats import binom
from skimage.morphology import medial_axis

from metrics import disk


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


def bezier(points: np.ndarray, samples: int) -> np.ndarray:
    """Bezier curve (samples, 2) of the control points (n, 2): Bernstein's polynomials are the binomial distribution."""
    n, t = len(points) - 1, np.linspace(0, 1, samples)
    return binom.pmf(np.arange(n + 1), n, t[:, None]) @ points

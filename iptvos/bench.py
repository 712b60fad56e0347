"""Seconds a frame of each stage, and this code against plainer forms with the same result, in one process.

    python bench.py            # 854 x 480 procedural frames, one thread
    python bench.py --smoke    # the same at a size that takes a second

Each ratio is measured in one process.
"""

import dataclasses
import time

from lab import runs

import cv2
import numpy as np
import torch
import torch.nn.functional as F

import crstm
import data
import metrics
import prompts
from features import lite0
from methods import METHODS
from segmenters import first as first_masks
from segmenters.grabcut import GrabCut
from segmenters.interface import share
from segmenters.sam import Sam, SamSegmenter
from session import Session
from trackers.boxes import FlowBox
from trackers.points import LucasKanade


@dataclasses.dataclass
class Settings:
    smoke: bool = False
    """Tiny sizes: only shows that it runs."""
    frames: int = 12
    """Frames of the video."""
    entries: int = 8
    """Stored frames of the memory."""


def clock(function, repeats: int, times: int = 3) -> float:
    """Best of some means, seconds."""
    best = float("inf")
    for _ in range(times):
        began = time.perf_counter()
        for _ in range(repeats):
            function()
        best = min(best, (time.perf_counter() - began) / repeats)
    return best


def plain_read(key, entries, where, o):
    """The same formula in one piece: every query cell against every cell of every stored frame, what is too far from
    its tile at minus infinity, one softmax."""
    d, h, w = key.shape
    y, x = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    y, x = y.flatten(), x.flatten()
    top, left = y // o.tile * o.tile, x // o.tile * o.tile
    parts, values = [], []
    for e, around in entries:
        s = key.reshape(d, -1).T @ e.key.reshape(d, -1) / o.tau
        near_y = (y[None] >= (top - around)[:, None]) & (y[None] < (top + o.tile + around)[:, None])
        near_x = (x[None] >= (left - around)[:, None]) & (x[None] < (left + o.tile + around)[:, None])
        parts.append(s.masked_fill_(~(near_x & near_y), -torch.inf))
        values.append(e.value.reshape(-1))
    out = (torch.cat(parts, 1).softmax(1) @ torch.cat(values)).view(h, w)
    tiles = F.max_pool2d(where[None, None].float(), o.tile, o.tile, ceil_mode=True)
    inside = F.interpolate(tiles, scale_factor=o.tile)[0, 0, :h, :w] > 0
    return torch.where(inside, out, out.new_zeros(()))


def main() -> None:
    s = runs.parse(Settings, __doc__)
    if s.frames < 3 or s.entries < 1:
        raise runs.UserError("--frames must be at least 3, --entries at least 1")
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    size, repeats = ((60, 100), 1) if s.smoke else ((480, 854), 5)
    video = data.draw("plain", 0, s.frames, size)
    frames, mask = video.frames, video.truth[0] == 1
    cut, rng = GrabCut(), np.random.default_rng(0)
    e = cut.encode(frames[1])
    box = prompts.box_of(video.truth[1] == 1)
    points = prompts.select(mask, 16, "kmedoids", rng)
    ask = prompts.Prompt(points, np.ones(len(points), int), box)
    network = lite0("cpu")
    f, cell = network(frames[1])
    basis, o = crstm.Basis.of(f, crstm.Options().dim), crstm.Options()
    key, vector = basis.key(f), basis.vector(f)
    memory = crstm.Memory(o)
    for t in range(min(s.entries, s.frames)):
        g, _ = network(frames[t])
        value = share(video.truth[t] == 1, cell, key.shape[1:])
        memory.interact(crstm.Entry(t, basis.key(g), value, basis.vector(g)))
    memory.start(1)
    for t in range(2, min(5, s.frames)):
        memory.add(memory.interacted[t] if t in memory.interacted else memory.interacted[0])
    where, stored = memory.region(), memory.entries(1)
    scene = first_masks.Scene.of(frames[1], f, network.deep(f), cell, frames[0])

    def boxed() -> None:
        b = FlowBox()
        b.start(frames[0], prompts.box_of(mask), mask)
        b.step(frames[1])

    print(f"stage, milliseconds a frame of {size[1]} x {size[0]}, one thread")
    for name, function in (
        ("features, EfficientNet-Lite0", lambda: network(frames[1])),
        ("keys and vectors", lambda: (basis.key(f), basis.vector(f))),
        ("16 points, Lucas-Kanade", lambda: LucasKanade().track(frames, [0, 1], points)),
        ("box, start and step", boxed),
        ("GrabCut decode", lambda: cut.decode(e, [ask])),
        (f"memory, {len(stored)} frames", lambda: memory.answer(key, vector, 1)),
        ("what is marked: before it", lambda: first_masks.Scene.of(frames[1], f, network.deep(f), cell, frames[0])),
        ("box to a mask", lambda: first_masks.masks(scene, prompts.Interaction(box=box))),
        ("J and F", lambda: metrics.score([video.truth[1]], [video.truth[0]], (1,))),
    ):
        print(f"  {name:28s} {1000 * clock(function, repeats):9.2f}")

    fast, slow = crstm.read(key, stored, where, o), plain_read(key, stored, where, o)
    gap = float((fast - slow).abs().max())
    a, b = (
        clock(lambda: crstm.read(key, stored, where, o), repeats),
        clock(lambda: plain_read(key, stored, where, o), 1, 1),
    )
    print(
        f"memory read: by tiles {1000 * a:.1f} ms, full affinity {1000 * b:.1f} ms, {b / a:.1f} x; largest difference "
        f"{gap:.1e}"
    )

    def rounds(segmenter, cached: bool) -> tuple[float, list[np.ndarray]]:
        session = Session(frames, (1,), segmenter, LucasKanade(), FlowBox, METHODS["full"])
        began = time.perf_counter()
        for t in (0, s.frames - 1, s.frames // 2):
            if not cached:
                session.cache.clear()
            session.interact(t, {1: prompts.Interaction(mask=video.truth[t] == 1)})
        labels = session.labels()
        return time.perf_counter() - began, labels

    print("three rounds, embeddings kept for the session against encoded anew each round")
    torch.manual_seed(0)
    kinds = [("GrabCut", cut), ("tiny SAM, random weights", SamSegmenter(Sam("tiny"), torch.device("cpu")))]
    if not s.smoke:
        kinds.append(("MobileSAM, random weights", SamSegmenter(Sam("mobile"), torch.device("cpu"))))
    for name, segmenter in kinds:
        (with_cache, first), (without, second) = rounds(segmenter, True), rounds(segmenter, False)
        same = all(np.array_equal(x, y) for x, y in zip(first, second, strict=True))
        print(
            f"  {name}: {with_cache:.2f} s against {without:.2f} s, {without / with_cache:.2f} x, same masks: {same}; "
            f"{with_cache / s.frames:.3f} s a frame for all three rounds"
        )


if __name__ == "__main__":
    runs.command(main)

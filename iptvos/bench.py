"""Seconds a frame of each stage, and this code against plainer forms with the same result, in one process.

python bench.py            # 854 x 480 procedural frames, one thread
python bench.py --smoke    # the same at a size that takes a second
"""

import dataclasses
import time

from lab import runs

import cv2
import numpy as np
import torch

import crstm
import data
import metrics
import prompts
from methods import METHODS
from segmenters.grabcut import GrabCut
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


def plain_read(key, frame, length, centre, entries, o, region):
    """The same formula in one piece: every query cell against every cell of every stored frame, then one top-k."""
    c, h, w = key.shape
    x, y = crstm.places(h, w, key)
    parts, values = [], []
    for e in entries:
        s = key.reshape(c, -1).T @ e.key.reshape(c, -1) / o.tau
        dx = x[:, None] - x[None] - (centre[0] - e.centre[0])
        dy = y[:, None] - y[None] - (centre[1] - e.centre[1])
        s = s + np.log(e.weight) - o.decay * abs(frame - e.frame) / length - (dx**2 + dy**2) / (2 * o.sigma**2)
        s[(dx.abs() > o.window) | (dy.abs() > o.window)] = -np.inf
        parts.append(s)
        values.append(e.value.reshape(1, -1).expand(h * w, -1))
    s, i = torch.cat(parts, 1).topk(o.top, 1)
    a = (s - s.max(1, keepdim=True).values.clamp_min(-1e30)).exp()
    out = ((a * torch.cat(values, 1).gather(1, i)).sum(1) / a.sum(1).clamp_min(1e-12)).view(h, w)
    inside = torch.zeros_like(out)
    x0, y0, x1, y1 = region
    inside[y0:y1, x0:x1] = out[y0:y1, x0:x1]
    return inside


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
    h, w = e.geometry.valid
    centre = tuple(float(v) for v in (box[:2] + box[2:]) / 2 * e.geometry.scale)
    region = np.r_[
        np.floor(prompts.grow(box, 0.5)[:2] * e.geometry.scale),
        np.ceil(prompts.grow(box, 0.5)[2:] * e.geometry.scale) + 1,
    ]
    region = tuple(int(v) for v in np.clip(region, 0, [w, h, w, h]))
    o = crstm.Options()
    stored = [
        crstm.Entry(
            t, cut.encode(frames[t]).key, torch.rand(h, w, generator=torch.Generator().manual_seed(t)), 0.9, centre
        )
        for t in (k % s.frames for k in range(2 if s.smoke else s.entries))
    ]

    def boxed() -> None:
        b = FlowBox()
        b.start(frames[0], prompts.box_of(mask), mask)
        b.step(frames[1])

    print(f"stage, milliseconds a frame of {size[1]} x {size[0]}, one thread")
    for name, function in (
        ("encode (GrabCut's keys)", lambda: cut.encode(frames[1])),
        ("16 points, Lucas-Kanade", lambda: LucasKanade().track(frames, [0, 1], points)),
        ("box, start and step", boxed),
        ("GrabCut decode", lambda: cut.decode(e, [ask])),
        (f"memory read, {len(stored)} frames", lambda: crstm.read(e.key, 1, s.frames, centre, stored, o, region)),
        ("J and F", lambda: metrics.score([video.truth[1]], [video.truth[0]], (1,))),
    ):
        print(f"  {name:28s} {1000 * clock(function, repeats):9.2f}")

    fast = crstm.read(e.key, 1, s.frames, centre, stored, o, region)
    slow = plain_read(e.key, 1, s.frames, centre, stored, o, region)
    gap = float((fast - slow).abs().max())
    a = clock(lambda: crstm.read(e.key, 1, s.frames, centre, stored, o, region), repeats)
    b = clock(lambda: plain_read(e.key, 1, s.frames, centre, stored, o, region), 1, 1)
    print(
        f"memory read: windowed {1000 * a:.1f} ms, full affinity {1000 * b:.1f} ms, {b / a:.1f} x; "
        f"largest difference "
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

"""One interactive session: interactions in, masks of all frames out, for any number of rounds.

    session = Session(frames, (1, 2), segmenter, LucasKanade(), FlowBox, METHODS["full"])
    session.interact(0, {1: Interaction(mask=m), 2: Interaction(box=b)})
    labels = session.labels()                                     # (H, W) uint8 maps, all frames

A round: the interaction becomes masks on its frame; points and boxes are tracked apart from each other from there in
both directions, up to where another interacted frame is nearer; unstable points are filtered out; every frame is
decoded from points, box and what the memory reads; objects are merged.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

import crstm
import prompts as P
from methods import PLAIN, Method
from prompts import Interaction, Prompt
from segmenters.interface import Embedding
from trackers.boxes import BoxTracker, centre
from trackers.filter import Filter, patches
from trackers.points import PointTracker, Tracks

NOTHING = -8.0  # logit of "surely not the object"


@dataclass
class State:
    """One object."""

    low: list[Tensor | None]
    """Low-resolution logits of each frame, float16; None: absent."""
    iou: np.ndarray
    """Predicted IoU of each frame: the confidence shown to the user."""
    memory: crstm.Memory | None
    exact: dict[int, np.ndarray] = field(default_factory=dict)
    """Masks of interacted frames, as they were given or decoded."""
    clicks: dict[int, Interaction] = field(default_factory=dict)
    """All clicks and boxes of a frame so far."""


@dataclass
class Pass:
    """One object during a pass in one direction."""

    tracks: Tracks
    labels: np.ndarray
    begin: int  # place in the order of frames at which the tracks begin
    filter: Filter
    boxes: BoxTracker | None
    box: np.ndarray | None
    areas: dict[int, float] = field(default_factory=dict)
    gone: bool = False
    order: list[int] = field(default_factory=list)
    """Frames of this object's pass, the interacted one first; it may end before those of others."""
    neighbour: int | None = None
    """The interacted frame of this object that ends the pass."""


class Session:
    def __init__(
        self,
        frames: Sequence[np.ndarray],
        objects: tuple[int, ...],
        segmenter,
        tracker: PointTracker,
        box_tracker: Callable[[], BoxTracker],
        method: Method,
        seed: int = 0,
        progress: Callable[[int, int], None] | None = None,
        cache: dict[int, Embedding] | None = None,
    ):
        self.frames, self.objects, self.method = frames, tuple(objects), method
        self.segmenter, self.tracker, self.box_tracker = segmenter, tracker, box_tracker
        self.progress, self.seed, self.round = progress, seed, 0
        self.cache = {} if cache is None else cache
        n = len(frames)
        memory = method.memory
        self.states = {
            o: State([None] * n, np.zeros(n), None if memory is None else crstm.Memory(memory)) for o in self.objects
        }
        self.seconds: list[float] = []
        self.encoding = 0.0
        self.decoded = 0

    # ------------------------------------------------------------------------------------------------- interactions

    def embedding(self, t: int) -> Embedding:
        if t not in self.cache:
            began = time.perf_counter()
            self.cache[t] = self.segmenter.encode(self.frames[t])
            self.encoding += time.perf_counter() - began
        return self.cache[t]

    def interact(self, t: int, given: dict[int, Interaction]) -> float:
        """A round: what the user gave on frame t, by object; returns the seconds it took. Objects that are not named
        keep their masks."""
        began = time.perf_counter()
        self.round += 1
        rng = np.random.default_rng([self.seed, self.round, t])
        for o, one in given.items():
            self.take(t, o, one)
        active = [o for o in given if P.box_of(self.states[o].exact[t]) is not None]
        if not self.method.propagate:
            self.copy(t, active)
        elif active:
            for direction in (1, -1):
                self.run(t, direction, active, rng)
        self.seconds.append(time.perf_counter() - began)
        return self.seconds[-1]

    def take(self, t: int, o: int, one: Interaction) -> None:
        """The interaction becomes the final mask of its frame and an entry of the memory."""
        s, e = self.states[o], self.embedding(t)
        if one.mask is not None:
            mask = np.asarray(one.mask, bool)
            low, quality = e.geometry.low(np.where(mask, -NOTHING, NOTHING)), 1.0
            s.clicks.pop(t, None)
        else:
            before = s.clicks.get(t)
            if before is not None:
                points, labels = np.concatenate([before.points, one.points]), np.r_[before.labels, one.labels]
                one = Interaction(box=one.box if one.box is not None else before.box, points=points, labels=labels)
            s.clicks[t] = one
            low, quality = self.first_mask(e, one, s.low[t])
            mask, old = e.geometry.full(low) > self.segmenter.mask_threshold, None
            if s.low[t] is not None:
                old = e.geometry.full(s.low[t]) > self.segmenter.mask_threshold
            if len(one.points):
                mask = P.with_positives(mask, one.points[one.labels == 1], old)
        s.exact[t] = mask
        box = P.box_of(mask)  # None: the object is not on this frame, or a single pixel
        s.low[t], s.iou[t] = (low.half(), quality) if box is not None else (None, quality)
        if s.memory is not None:
            s.memory.forget(t)
            if box is not None:
                s.memory.interact(self.entry(t, e, low, box, 1.0))

    def first_mask(self, e: Embedding, one: Interaction, before: Tensor | None) -> tuple[Tensor, float]:
        """Positive points alone, then all points with the logits of that, then refinement by the mask's own box. A
        frame that has a mask from an earlier round starts from its logits; a box alone is one pass."""
        order = np.argsort(-one.labels, kind="stable")
        points, labels = one.points[order].astype(np.float32), one.labels[order]
        dense = None if before is None else before.float()
        p = Prompt(points, labels, one.box, dense)
        if p.empty and dense is None:
            return torch.full((4 * e.geometry.cells,) * 2, NOTHING), 0.0
        if one.box is None and (labels == 1).any() and dense is None:
            first = Prompt(points[labels == 1], labels[labels == 1])
            if hasattr(self.segmenter, "guess"):
                first.dense = self.segmenter.guess(e, first.points)
            p.dense = self.segmenter.decode(e, [first])[0][0]
        low, quality = self.segmenter.decode(e, [p])[0]
        return self.refined(e, [p], [(low, quality)], max(1, self.method.refine))[0]

    def refined(self, e: Embedding, given: list[Prompt], found: list, passes: int) -> list:
        """Decoder passes with the tight box of each mask, its points and its logits; a mask whose box no longer changes
        is done."""
        last: list = [None] * len(given)
        for _ in range(passes):
            todo = []
            for i, (p, (low, _)) in enumerate(zip(given, found, strict=True)):
                box = P.box_of(e.geometry.full(low) > self.segmenter.mask_threshold)
                if box is None or (last[i] is not None and np.array_equal(box, last[i])):
                    continue
                last[i] = box
                todo.append((i, replace(p, box=box, dense=low)))
            if not todo:
                break
            for (i, _), new in zip(todo, self.segmenter.decode(e, [p for _, p in todo]), strict=True):
                found[i] = new
        return found

    def entry(self, t: int, e: Embedding, low: Tensor, box: np.ndarray, weight: float) -> crstm.Entry:
        x, y = centre(box) * e.geometry.scale
        return crstm.Entry(t, e.key, crstm.pooled(low, e.geometry.valid).to(e.key.device), weight, (float(x), float(y)))

    # -------------------------------------------------------------------------------------------------- propagation

    def reach(self, o: int, t: int, direction: int) -> tuple[list[int], int | None]:
        """Frames of an object's pass from t, t first, and the frame interacted for that object which ends it."""
        n = len(self.frames)
        stop = n if direction > 0 else -1
        ahead = [k for k in self.states[o].exact if (k - t) * direction > 0]
        neighbour = min(ahead, key=lambda k: abs(k - t)) if ahead else None
        order = list(range(t, stop, direction))
        if neighbour is None or self.method.limits == "all":
            return order, neighbour
        if self.method.limits == "blend":
            return [k for k in order if abs(k - t) < abs(neighbour - t)], neighbour
        return [k for k in order if abs(k - t) <= abs(k - neighbour)], neighbour

    def copy(self, t: int, active: list[int]) -> None:
        for o in active:
            s = self.states[o]
            for k in (*self.reach(o, t, 1)[0][1:], *self.reach(o, t, -1)[0][1:]):
                s.low[k], s.iou[k] = s.low[t], s.iou[t]

    def sample(self, o: int, t: int, mask: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Query points of an object on a frame, positives first."""
        m, clicks = self.method, self.states[o].clicks.get(t)
        positive = P.select(mask, m.positives, m.selection, rng, self.frames[t])
        negative = P.select(~mask, m.negatives, "mixed", rng, self.frames[t])
        if clicks is not None:
            positive = np.concatenate([positive, clicks.points[clicks.labels == 1]])
            negative = np.concatenate([negative, clicks.points[clicks.labels == 0]])
        labels = np.r_[np.ones(len(positive), int), np.zeros(len(negative), int)]
        return np.concatenate([positive, negative]).astype(np.float32), labels

    def begin(self, o: int, order: list[int], at: int, mask: np.ndarray, rng, boxes, box) -> Pass:
        """Points on frame order[at] of a mask, tracked to the end of the order."""
        m, t = self.method, order[at]
        if m.points:
            points, labels = self.sample(o, t, mask, rng)
        else:
            points, labels = P.NONE, np.zeros(0, int)
        tracks = self.tracker.track(self.frames, order[at:], points)
        options = m.filter or PLAIN
        query = patches(self.frames[t], points) if options.patch else None
        return Pass(tracks, labels, at, Filter(options, labels, query), boxes, box, order=order)

    def run(self, t: int, direction: int, active: list[int], rng: np.random.Generator) -> None:
        """One pass from an interacted frame in one direction."""
        m = self.method
        passes: dict[int, Pass] = {}
        for o in active:
            order, neighbour = self.reach(o, t, direction)
            if len(order) < 2:
                continue
            mask = self.states[o].exact[t]
            box, boxes = P.box_of(mask), None
            if box is not None and m.box:
                boxes = self.box_tracker()
                boxes.start(self.frames[t], box, mask)
            passes[o] = self.begin(o, order, 0, mask, rng, boxes, box)
            passes[o].areas[0], passes[o].neighbour = float(mask.sum()), neighbour
            if self.states[o].memory is not None:
                self.states[o].memory.start()
        length = max((len(p.order) for p in passes.values()), default=0)
        for k in range(1, length):
            running = {o: p for o, p in passes.items() if k < len(p.order)}
            if m.horizon and k > 1 and (k - 1) % m.horizon == 0:
                passes |= self.renew(k - 1, running, rng)
                running = {o: passes[o] for o in running}
            self.step(t + direction * k, k, running, t)
            if self.progress:
                self.progress(k, length - 1)

    def renew(self, k: int, passes: dict[int, Pass], rng: np.random.Generator) -> dict[int, Pass]:
        """New points from a mask of the last horizon (its first quarter and areas of up to 25 pixels do not count);
        the passes that go on with them."""
        m = self.method
        span = range(k - m.horizon + 1 + m.horizon // 4, k + 1)
        fit = {o: [i for i in span if p.areas.get(i, 0) > 25] for o, p in passes.items() if not p.gone}
        chosen: dict[int, int] = {}
        for o, places in fit.items():
            p = passes[o]
            if not places:
                p.gone = True  # until the user touches it again
                continue
            if m.variant == "A":
                chosen[o] = places[-1]
            elif m.variant == "B":
                chosen[o] = sorted(places, key=lambda i: (p.areas[i], i))[len(places) // 2]
            else:
                shared = [i for i in places if i in chosen.values()] if m.variant == "D" else []
                first = p.areas[0]
                chosen[o] = min(places, key=lambda i: abs(p.areas[i] / first - 1) * 100 - 36 * (i in shared))
        out = {}
        for o, i in chosen.items():
            p, t = passes[o], passes[o].order[i]
            e = self.embedding(t)
            mask = e.geometry.full(self.states[o].low[t]) > self.segmenter.mask_threshold
            out[o] = self.begin(o, p.order, i, mask, rng, p.boxes, p.box)
            out[o].areas, out[o].neighbour = p.areas, p.neighbour
        return out

    def step(self, t: int, k: int, passes: dict[int, Pass], source: int) -> None:
        """All objects on frame t, the k-th of the pass from `source`: filter, read, decode, store."""
        m = self.method
        e, frame = self.embedding(t), self.frames[t]
        kept: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        for o, p in passes.items():
            if p.boxes is not None:
                p.box, _ = p.boxes.step(frame)
            i, tr = k - p.begin, p.tracks
            ok = p.filter.keep(
                tr.places[i], tr.places[i - 1], tr.visible[i], tr.error[i], p.box if m.box else None, frame
            )
            kept[o] = tr.places[i][ok], p.labels[ok]
        asked, confidences = {}, {}
        for o, p in passes.items():
            points, labels = kept[o]
            others = [kept[q][0][kept[q][1] == 1] for q in passes if q != o]
            other = np.concatenate([P.NONE, *others])
            prompt = Prompt(
                np.concatenate([points, other]).astype(np.float32),
                np.r_[labels, np.zeros(len(other), int)].astype(np.int64),
                p.box if m.box else None,
            )
            if p.gone or prompt.empty:  # neither a point nor a box: the object is not in sight
                asked[o] = None
                continue
            if self.states[o].memory is not None:
                prompt.dense, confidences[o] = self.remember(o, t, e, prompt)
            asked[o] = prompt
        names = [o for o, p in asked.items() if p is not None]
        found = self.segmenter.decode(e, [asked[o] for o in names]) if names else []
        self.decoded += len(names)
        if m.refine and names:
            found = self.refined(e, [asked[o] for o in names], found, m.refine)
        results = dict(zip(names, found, strict=True))
        for o, p in passes.items():
            low, quality = results.get(o, (None, 0.0))
            if low is not None and quality < m.gate:
                low = None
            mask = None if low is None else e.geometry.full(low) > self.segmenter.mask_threshold
            p.areas[k] = 0.0 if mask is None else float(mask.sum())
            box = None if mask is None else P.box_of(mask)
            if box is not None:
                if p.boxes is not None and p.box is not None:
                    p.boxes.correct(mask)
                if self.states[o].memory is not None:
                    self.states[o].memory.add(self.entry(t, e, low, p.box if p.box is not None else box, quality))
            self.store(o, t, low, quality, p.neighbour, source)

    def remember(self, o: int, t: int, e: Embedding, prompt: Prompt) -> tuple[Tensor | None, float]:
        """What the memory says about the frame, as low-resolution logits around the box (or the points)."""
        g, s = e.geometry, self.states[o]
        box = prompt.box
        if box is None:
            q = prompt.positive
            box = np.r_[q.min(0), q.max(0)]
            box = P.grow(box, 0.3)
        c = centre(box) * g.scale
        region = P.grow(box, 0.5) * g.scale
        cells = (*np.floor(region[:2]).astype(int) - 1, *np.ceil(region[2:]).astype(int) + 2)
        read = crstm.read(
            *(e.key, t, len(self.frames), (float(c[0]), float(c[1])), s.memory.entries(), s.memory.options),
            tuple(int(v) for v in cells),
        )
        dense, sure = crstm.dense_prompt(read, s.memory.options)
        if dense is None:
            return None, sure
        whole = torch.full((g.cells, g.cells), NOTHING * sure)
        whole[: dense.shape[0], : dense.shape[1]] = dense.float().cpu()
        low = torch.nn.functional.interpolate(whole[None, None], scale_factor=4, mode="bilinear", align_corners=False)
        return low[0, 0], sure

    def store(self, o: int, t: int, low: Tensor | None, quality: float, neighbour: int | None, source: int) -> None:
        s, limits = self.states[o], self.method.limits
        if t in s.exact:
            return  # final until the user touches it again
        if limits != "blend" and s.low[t] is not None and quality < s.iou[t] - self.method.keep:
            return
        if limits == "blend" and neighbour is not None and (low is not None or s.low[t] is not None):
            near = abs(t - neighbour) / abs(source - neighbour)
            new, old = (torch.tensor(NOTHING) if x is None else x.float() for x in (low, s.low[t]))
            mixed = (near * new.sigmoid() + (1 - near) * old.sigmoid()).clamp(1e-4, 1 - 1e-4)
            low, quality = mixed.logit(), near * quality + (1 - near) * float(s.iou[t])
        s.low[t], s.iou[t] = None if low is None else low.clamp(-20, 20).half(), quality

    # ------------------------------------------------------------------------------------------------------- answers

    def label_map(self, t: int) -> np.ndarray:
        """(H, W) uint8 of one frame: soft aggregation of the objects' probabilities; the background wins ties."""
        h, w = self.frames[t].shape[:2]
        p = np.zeros((len(self.objects), h, w), np.float32)
        for i, o in enumerate(self.objects):
            s = self.states[o]
            if t in s.exact:
                p[i] = s.exact[t]
            elif s.low[t] is not None:
                geometry = self.cache[t].geometry if t in self.cache else self.embedding(t).geometry
                p[i] = 1 / (1 + np.exp(-geometry.full(s.low[t])))
        return merge(p, self.objects)

    def labels(self) -> list[np.ndarray]:
        return [self.label_map(t) for t in range(len(self.frames))]


def merge(p: np.ndarray, objects: tuple[int, ...]) -> np.ndarray:
    """Probabilities (objects, H, W) -> labels: background is the product of (1 - p); all are clamped, turned into
    odds and normalised, so the largest odds win."""
    both = np.concatenate([np.prod(1 - p, 0, keepdims=True), p]).clip(1e-7, 1 - 1e-7)
    return np.array([0, *objects], np.uint8)[np.argmax(both, 0)]

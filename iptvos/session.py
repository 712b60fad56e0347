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
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

import crstm
import prompts as P
from methods import PLAIN, Method
from passes import Pass, State, renewals
from prompts import Interaction, Prompt
from segmenters.interface import Embedding, merge, resample, share
from trackers.boxes import BoxTracker
from trackers.filter import Filter, patches
from trackers.points import PointTracker

NOTHING = -8.0  # logit of "surely not the object"


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
        self.basis: crstm.Basis | None = None
        self.begun_at: int | None = None  # the first interacted frame, whose statistics the basis holds
        self.other = np.random.default_rng([seed, 2**30]).permutation(n)
        self.span: tuple[int, int] | None = None  # first and last frame that a round may change; None: all
        self.told: dict[int, tuple[list, np.ndarray]] = {}  # label maps, and of what they were made
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

    def kept(self) -> tuple:
        """All that the rounds so far have made; `restore` goes back to it."""
        states = {o: s.copy() for o, s in self.states.items()}
        return self.round, list(self.seconds), states, self.basis, self.begun_at

    def restore(self, kept: tuple) -> None:
        self.round, seconds, states, self.basis, self.begun_at = kept
        self.seconds, self.states = list(seconds), {o: s.copy() for o, s in states.items()}

    def interact(self, t: int, given: dict[int, Interaction]) -> float:
        """A round: what the user gave on frame t, by object; returns the seconds it took. Objects that are not named
        keep their masks."""
        began = time.perf_counter()
        self.round += 1
        rng = np.random.default_rng([self.seed, t])  # the same points for the same interaction, whatever its round
        changed = [o for o, one in given.items() if self.take(t, o, one)]
        active = [o for o in changed if P.box_of(self.states[o].exact[t]) is not None]
        if not self.method.propagate:
            self.copy(t, active)
        elif active:
            for direction in (1, -1):
                self.run(t, direction, active, rng)
        self.seconds.append(time.perf_counter() - began)
        return self.seconds[-1]

    def take(self, t: int, o: int, one: Interaction) -> bool:
        """The interaction becomes the final mask of its frame and an entry of the memory; False where it says nothing
        new."""
        s, e, before = self.states[o], self.embedding(t), self.states[o].exact.get(t)
        if one.mask is not None:
            mask = np.asarray(one.mask, bool)
            low, quality = e.geometry.low(np.where(mask, -NOTHING, NOTHING)), 1.0
            s.clicks.pop(t, None)
            s.begun.pop(t, None)
        else:
            one, new = P.added(s.clicks.get(t), one)
            if not new:
                return False
            s.clicks[t] = one
            low, quality, mask = self.first_mask(t, e, s, one)
        if before is not None and np.array_equal(before, mask):
            return False
        s.exact[t] = mask
        box = P.box_of(mask)  # None: the object is not on this frame, or a single pixel
        s.low[t], s.iou[t] = (low.half(), quality) if box is not None else (None, quality)
        if s.memory is not None:
            s.memory.forget(t)
            if box is not None:
                self.remember_basis(t)
                self.features(t)
                s.memory.interact(self.entry(t, e, mask, self.keyed(t)))
        return True

    def first_mask(self, t: int, e: Embedding, s: State, one: Interaction) -> tuple[Tensor, float, np.ndarray]:
        """Logits, predicted IoU and mask of all clicks and the box of a frame. SAM: positive points alone, then all
        points with the logits of that, then refinement by the mask's own box; a frame that has a mask from an earlier
        round starts from its logits."""
        old = None if s.low[t] is None else e.geometry.full(s.low[t]) > self.segmenter.mask_threshold
        if hasattr(self.segmenter, "first"):
            before = s.begun.setdefault(t, s.exact.get(t, old))
            beside = t + 1 if t + 1 < len(self.frames) else t - 1
            seen = [(self.frames[k], m) for k, m in s.exact.items() if k != t and m.any()]
            mask, quality = self.segmenter.first(e, one, before, self.frames[beside] if beside >= 0 else None, seen)
            return e.geometry.low(np.where(mask, -NOTHING, NOTHING)), quality, mask
        order = np.argsort(-one.labels, kind="stable")
        points, labels = one.points[order].astype(np.float32), one.labels[order]
        dense = None if s.low[t] is None else s.low[t].float()
        p = Prompt(points, labels, one.box, dense)
        if one.box is None and (labels == 1).any() and dense is None:
            p.dense = self.segmenter.decode(e, [Prompt(points[labels == 1], labels[labels == 1])])[0][0]
        found = self.segmenter.decode(e, [p])
        low, quality = (
            found[0] if p.empty and dense is None else self.refined(e, [p], found, max(1, self.method.refine))[0]
        )
        mask = e.geometry.full(low) > self.segmenter.mask_threshold
        return low, quality, P.with_positives(mask, points[labels == 1], old) if len(points) else mask

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

    def features(self, t: int) -> Tensor:
        e = self.embedding(t)
        if e.features is None:
            began = time.perf_counter()
            self.segmenter.features(e)
            self.encoding += time.perf_counter() - began
        return e.features

    def remember_basis(self, t: int) -> None:
        """The statistics of keys and vectors are those of the first interacted frame."""
        if self.basis is None:
            self.begun_at, self.basis = t, crstm.Basis.of(self.features(t), self.method.memory.dim)

    def stored(self, t: int, keyed) -> tuple[Tensor, Tensor]:
        """Key and vector under which a frame is stored: its own; in the control another frame's."""
        return self.keyed(int(self.other[t])) if self.method.shuffled else keyed

    def entry(self, t: int, e: Embedding, mask: np.ndarray, keyed) -> crstm.Entry:
        key, vector = self.stored(t, keyed)
        return crstm.Entry(t, key, share(mask, e.cell, key.shape[1:]).to(key.device), vector)

    # -------------------------------------------------------------------------------------------------- propagation

    def reach(self, o: int, t: int, direction: int) -> tuple[list[int], int | None]:
        """Frames of an object's pass from t, t first, and the frame interacted for that object which ends it."""
        first, last = self.span or (0, len(self.frames) - 1)
        stop = last + 1 if direction > 0 else first - 1
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
        follow = getattr(self.tracker, "follow", self.tracker.track)  # frame by frame where the tracker can
        tracks = follow(self.frames, order[at:], points)
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
                self.states[o].memory.start(t)
        length = max((len(p.order) for p in passes.values()), default=0)
        for k in range(1, length):
            running = {o: p for o, p in passes.items() if k < len(p.order)}
            if m.horizon and k > 1 and (k - 1) % m.horizon == 0:
                passes |= self.renew(k - 1, running, rng)
                running = {o: passes[o] for o in running}
            self.step(t + direction * k, k, running, t, rng)
            passes |= running
            if self.progress:
                self.progress(k, length - 1)

    def renew(self, k: int, passes: dict[int, Pass], rng: np.random.Generator) -> dict[int, Pass]:
        """New points at the end of a horizon; the passes that go on with them."""
        out = {}
        for o, i in renewals(self.method, k, passes).items():
            p, t = passes[o], passes[o].order[i]
            mask = self.embedding(t).geometry.full(self.states[o].low[t]) > self.segmenter.mask_threshold
            out[o] = self.anew(o, p, i, mask, rng)
        return out

    def anew(self, o: int, p: Pass, i: int, mask: np.ndarray, rng: np.random.Generator) -> Pass:
        """A pass that goes on with points of a mask on its i-th frame."""
        new = self.begin(o, p.order, i, mask, rng, p.boxes, p.box)
        new.areas, new.neighbour = p.areas, p.neighbour
        return new

    def step(self, t: int, k: int, passes: dict[int, Pass], source: int, rng: np.random.Generator) -> None:
        """All objects on frame t, the k-th of the pass from `source`: filter, read, decode, store."""
        m, e, frame = self.method, self.embedding(t), self.frames[t]
        kept: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        for o, p in passes.items():
            if p.boxes is not None:
                p.box, _ = p.boxes.step(frame)
            (now, visible, error), before = p.tracks.at(k - p.begin), p.tracks.at(k - p.begin - 1)[0]
            ok = p.filter.keep(now, before, visible, error, p.box if m.box else None, frame)
            kept[o] = now[ok], p.labels[ok]
        asked: dict[int, Prompt] = {}
        results: dict[int, tuple[Tensor | None, float]] = {}
        keyed = self.keyed(t) if any(self.states[o].memory is not None for o in passes) else None
        for o, p in passes.items():
            points, labels = kept[o]
            other = np.concatenate([P.NONE, *(kept[q][0][kept[q][1] == 1] for q in passes if q != o)])
            prompt = Prompt(
                np.concatenate([points, other]).astype(np.float32),
                np.r_[labels, np.zeros(len(other), int)].astype(np.int64),
                p.box if m.box else None,
            )
            if p.gone:
                continue
            if self.states[o].memory is not None:
                low, sure = self.remember(o, t, e, keyed, prompt)
                if self.segmenter.memory_is_mask:
                    results[o] = (low, sure) if sure else (None, 0.0)
                    continue
                if sure >= m.memory.least:
                    prompt.dense = low.clamp(-8, 8) * sure
            if not prompt.empty or prompt.dense is not None:
                asked[o] = prompt
        names = list(asked)
        found = self.segmenter.decode(e, list(asked.values())) if names else []
        if m.refine and names:
            found = self.refined(e, list(asked.values()), found, m.refine)
        results |= dict(zip(names, found, strict=True))
        self.decoded += len(results)
        for o, p in list(passes.items()):
            low, quality = results.get(o, (None, 0.0))
            if low is not None and quality < m.gate:
                low = None
            mask = None if low is None else e.geometry.full(low) > self.segmenter.mask_threshold
            p.areas[k] = 0.0 if mask is None else float(mask.sum())
            if self.states[o].memory is not None and not self.segmenter.memory_is_mask:
                value = np.zeros(frame.shape[:2]) if low is None else 1 / (1 + np.exp(-e.geometry.full(low)))
                self.states[o].memory.add(self.entry(t, e, value, keyed))
            if mask is not None:
                self.follow(o, p, k, frame, mask, rng, passes)
            self.store(o, t, low, quality, p.neighbour, source)

    def follow(
        self, o: int, p: Pass, k: int, frame: np.ndarray, mask: np.ndarray, rng, passes: dict[int, Pass]
    ) -> None:
        """What the mask of a frame gives back to the trackers. The memory's mask needs no box, so a box that is lost,
        or that it contradicts, begins anew from it; without a memory the mask is the box's own, and a lost box searches
        on. Points of which few are left are sampled anew."""
        m, box = self.method, P.box_of(mask)
        if box is None:
            return
        if p.boxes is not None:
            if m.memory is not None and (p.box is None or P.overlap(p.box, box) < 0.5):
                p.boxes.start(frame, box, mask)
            elif p.box is not None:
                p.boxes.correct(mask)
        if m.few and p.alive() < m.few and k - p.begin >= m.patience and k + 1 < len(p.order):
            passes[o] = self.anew(o, p, k, mask, rng)

    def keyed(self, t: int) -> tuple[Tensor, Tensor]:
        """Key and vector of a frame."""
        f = self.features(t)
        return self.basis.key(f), self.basis.vector(f)

    def remember(self, o: int, t: int, e: Embedding, keyed, prompt: Prompt) -> tuple[Tensor, float]:
        """What the memory says about the frame: low-resolution logits, and its confidence."""
        memory, (h, w) = self.states[o].memory, keyed[0].shape[1:]
        told = None if prompt.empty else torch.from_numpy(P.told(prompt, e.cell, (h, w))).to(keyed[0].device)
        answer = memory.answer(*keyed, t, told)
        p = answer.sigmoid()
        if self.segmenter.memory_is_mask:
            memory.add(crstm.Entry(t, self.stored(t, keyed)[0], p))
        side = 4 * e.geometry.cells
        low = resample(p.cpu().numpy(), e.cell, 1 / (4 * e.geometry.scale), (side, side))
        return crstm.logit(torch.from_numpy(low)), crstm.confidence(answer)

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
        """(H, W) uint8 of one frame: soft aggregation of the objects' probabilities; the background wins ties. Not to
        be written to: the next answer is the same array while nothing changes there."""
        now = [(s.low[t], s.exact.get(t)) for s in self.states.values()]
        told = self.told.get(t)
        if told is not None and all(a is c and b is d for (a, b), (c, d) in zip(told[0], now, strict=True)):
            return told[1]
        h, w = self.frames[t].shape[:2]
        p = np.zeros((len(self.objects), h, w), np.float32)
        for i, o in enumerate(self.objects):
            s = self.states[o]
            if t in s.exact:
                p[i] = s.exact[t]
            elif s.low[t] is not None:
                geometry = self.cache[t].geometry if t in self.cache else self.embedding(t).geometry
                p[i] = 1 / (1 + np.exp(-geometry.full(s.low[t])))
        self.told[t] = now, merge(p, self.objects)
        return self.told[t][1]

    def labels(self) -> list[np.ndarray]:
        return [self.label_map(t) for t in range(len(self.frames))]

"""What is known of an object, its pass over the frames of a video, and from which masks points are sampled anew."""

from dataclasses import dataclass, field, replace

import numpy as np
from torch import Tensor

import crstm
from methods import Method
from prompts import Interaction
from trackers.boxes import BoxTracker
from trackers.filter import Filter
from trackers.points import Tracks


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
    begun: dict[int, np.ndarray | None] = field(default_factory=dict)
    """What stood on a frame before the first of them."""

    def copy(self) -> "State":
        """As it is now: what is replaced later stays here."""
        memory = self.memory and replace(self.memory, interacted=dict(self.memory.interacted))
        kept = {k: dict(getattr(self, k)) for k in ("exact", "clicks", "begun")}
        return State(list(self.low), self.iou.copy(), memory, **kept)


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

    def alive(self) -> int:
        """Positive points that were not dropped for good."""
        return int((~self.filter.dead & (self.labels == 1)).sum())


def renewals(m: Method, k: int, passes: dict[int, Pass]) -> dict[int, int]:
    """From which place of its order each object's points are sampled anew at the end of a horizon (its first quarter
    and areas of up to 25 pixels do not count). An object without one is gone until the user touches it again."""
    span = range(k - m.horizon + 1 + m.horizon // 4, k + 1)
    fit = {o: [i for i in span if p.areas.get(i, 0) > 25] for o, p in passes.items() if not p.gone}
    chosen: dict[int, int] = {}
    for o, places in fit.items():
        p = passes[o]
        if not places:
            p.gone = True
            continue
        if m.variant == "A":
            chosen[o] = places[-1]
        elif m.variant == "B":
            chosen[o] = sorted(places, key=lambda i: (p.areas[i], i))[len(places) // 2]
        else:
            shared = [i for i in places if i in chosen.values()] if m.variant == "D" else []
            first = p.areas[0]
            chosen[o] = min(places, key=lambda i: abs(p.areas[i] / first - 1) * 100 - 36 * (i in shared))
    return chosen

"""The cross-round space-time module (CRSTM): a soft mask for a frame, read out of the frames that are stored.

The paper names the module and its role; this formula is our reading of it (README, "Deviations and open points"). A
frame t is a grid of cells q with features f_t(q), out of which two things are made with the statistics of the first
interacted frame (`Basis`): a key K_t(q) of unit length, and a standardised vector X_t(q). With V_m(k) the share of the
object in cell k of a stored frame m:

    s_qk = <K_t(q), K_m(k)> / tau, for the cells k of m that are near q; else minus infinity                         (1)
    R_t(q) = sum_k a_qk V_m(k), a_q the softmax over s_qk of all stored frames together                              (2)
    A_t(q) = <w, X_t(q)>, w the ridge regression of 2 V - 1 on X over the interacted frames, object and
             background of equal weight                                                                              (3)
    L_t(q) = logit(clip(R_t(q), eps, 1 - eps)) + alpha A_t(q) + beta P_t(q)                                          (4)
    c_t = mean of 2 |p - 1/2| over the cells with p = sigmoid(L_t) > 1/2, 0 without one                              (5)

P_t(q) is what the tracked prompts say: 1 in the cells around a point of the object, -1 outside of the box, else 0.
(1) and (2) follow the object from place to place, (3) knows its colours and textures, and those of the background,
wherever they are. Frames of all rounds are stored as long as they were interacted; of the frames that were propagated
only the last few. With near and far infinite and alpha 0, (1) and (2) are the read-out of space-time memories, and with
`top` their top-k form. Nothing is learned beyond the closed form of (3).
"""

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

EPS = 1e-3


@dataclass(frozen=True)
class Options:
    tau: float = 0.05
    """Temperature of the similarity of keys."""
    dim: int = 64
    """Principal directions of the key."""
    near: float = 8
    """Cells around a tile of query cells that are read on the last propagated frames; inf: all."""
    far: float = 16
    """The same on interacted frames."""
    top: int = 0
    """Scores kept for a cell; 0: all."""
    recent: int = 3
    """Last propagated frames that are read."""
    nearest: int = 3
    """Interacted frames that are read, the nearest in time."""
    rounds: int = 16
    """Interacted frames that are kept; the oldest goes first. 1: only the newest interaction."""
    alpha: float = 0.5
    """Weight of the appearance, equation (3); 0: none."""
    beta: float = 0.3
    """Weight of the tracked prompts in equation (4); 0: none."""
    ridge: float = 0.01
    """Its regularisation, for vectors of mean square 1 and weights of sum 1."""
    reach: int = 8
    """Cells around the last answer in which the object is looked for."""
    seen: float = 0.15
    """Probability from which a cell belongs to an answer."""
    tile: int = 8
    """Cells a side that are read together."""
    least: float = 0.2
    """Confidence c_t below which there is no dense prompt."""
    back: float = 0.5
    """Share of its interacted area that an object which was lost must reach before propagated frames are read again."""


@dataclass(frozen=True)
class Basis:
    """Statistics of the first interacted frame, by which features become keys and vectors."""

    mean: Tensor  # (C,)
    spread: Tensor  # (C,)
    axes: Tensor  # (dim, C)

    @classmethod
    def of(cls, features: Tensor, dim: int) -> "Basis":
        """Of features (C, h, w): the means, standard deviations, and principal directions of the unit columns."""
        x = features.float().flatten(1)
        mean, spread = x.mean(1), x.std(1) + 1e-3
        u = F.normalize(x - mean[:, None], dim=0, eps=1e-6)
        values, vectors = torch.linalg.eigh(u @ u.T)
        return cls(mean, spread, vectors[:, values.argsort(descending=True)[:dim]].T.contiguous())

    def key(self, features: Tensor) -> Tensor:
        """K: (C, h, w) -> (dim, h, w), columns of unit length."""
        c, h, w = features.shape
        x = F.normalize(features.float().reshape(c, -1) - self.mean[:, None], dim=0, eps=1e-6)
        return F.normalize(self.axes @ x, dim=0, eps=1e-6).view(-1, h, w)

    def vector(self, features: Tensor) -> Tensor:
        """X: (C, h, w) -> (C + 1, h, w), standardised columns of mean square 1, the last row a constant 1."""
        c, h, w = features.shape
        x = (features.float().reshape(c, -1) - self.mean[:, None]) / self.spread[:, None]
        x = F.normalize(x, dim=0, eps=1e-6) * math.sqrt(c)
        return torch.cat([x, torch.ones_like(x[:1])]).view(c + 1, h, w)


@dataclass
class Entry:
    """A stored frame."""

    frame: int
    key: Tensor  # (dim, h, w), columns of unit length
    value: Tensor  # (h, w) in [0, 1]
    vector: Tensor | None = None  # (C + 1, h, w), of interacted frames


@dataclass
class Memory:
    """Stored frames of one object: interacted ones over all rounds, propagated ones of the running pass."""

    options: Options = field(default_factory=Options)
    interacted: dict[int, Entry] = field(default_factory=dict)  # by frame, oldest interaction first
    passing: list[Entry] = field(default_factory=list)
    last: Tensor | None = None
    """(h, w) the last answer in which the object was seen, or the interacted mask."""
    seen: Entry | None = None
    """The last propagated frame on which the object was seen, as large as it must be to be back."""
    lost: bool = False
    """Whether the object was lost in this pass and is not yet back."""
    weights: Tensor | None = None
    """w of equation (3)."""

    def interact(self, entry: Entry) -> None:
        """A frame the user touched: replaces what was stored of it."""
        self.interacted.pop(entry.frame, None)
        self.interacted[entry.frame] = entry
        while len(self.interacted) > self.options.rounds:
            self.interacted.pop(next(iter(self.interacted)))
        self.weights = None

    def forget(self, frame: int) -> None:
        self.interacted.pop(frame, None)
        self.weights = None

    def start(self, frame: int) -> None:
        """A pass begins at an interacted frame: propagated frames of the last one go."""
        self.passing, self.seen, self.lost = [], None, False
        self.last = self.interacted[frame].value
        if self.options.alpha and self.weights is None:
            self.weights = fit(list(self.interacted.values()), self.options.ridge)

    def near(self, frame: int) -> list[Entry]:
        """Interacted frames, the nearest in time first."""
        return sorted(self.interacted.values(), key=lambda e: (abs(e.frame - frame), e.frame))

    def add(self, entry: Entry) -> None:
        """A propagated frame. One without the object teaches only that it was hidden: what comes out from behind an
        occluder looks like the background of the frames on which it was not there yet, so such frames are not read."""
        area = entry.value.gt(0.5).sum()
        if not bool(area):
            self.lost = True
            return
        self.passing = [*self.passing, entry][-self.options.recent :] if self.options.recent else []
        self.last = entry.value
        if bool(area >= self.options.back * self.near(entry.frame)[0].value.gt(0.5).sum()):
            self.lost, self.seen = False, entry
        elif self.seen is None:
            self.seen = entry

    def entries(self, frame: int) -> list[tuple[Entry, float]]:
        """What is read for a frame: stored frames and how many cells around a tile. After a loss, until the object is
        back, only frames on which it was seen well, and all of them: it may come back far from where it was."""
        o = self.options
        if self.lost:
            return self.everywhere(frame)
        return [(e, o.far) for e in self.near(frame)[: o.nearest]] + [(e, o.near) for e in self.passing]

    def region(self, told: Tensor | None = None) -> Tensor:
        """(h, w) boolean: where the object is looked for, also where the prompts `told` (h, w) that it is."""
        o = self.options
        seen = (self.last > o.seen)[None, None].float()
        seen = F.max_pool2d(seen, 2 * o.reach + 1, 1, o.reach)[0, 0] > 0
        return seen if told is None else seen | (told > 0)

    def everywhere(self, frame: int) -> list[tuple[Entry, float]]:
        """What is read once the object is lost: the nearest interacted frame and the last on which it was seen, all
        cells of them."""
        return [(e, math.inf) for e in (self.near(frame)[0], self.seen) if e is not None]

    def answer(self, key: Tensor, vector: Tensor | None, frame: int, told: Tensor | None = None) -> Tensor:
        """Equation (4): logits (h, w) of a frame with key (dim, h, w), vector (C + 1, h, w) and prompts P (h, w);
        surely nothing, the smallest logit, where the object is not looked for. It is looked for near the last answer,
        and over the whole frame where no cell there is rather object than not."""
        where = self.region(told)
        out = self.sure(key, vector, told, where, self.entries(frame))
        if not bool((out > 0).any()):
            again = self.sure(key, vector, told, torch.ones_like(where), self.everywhere(frame))
            out = again if bool((again > 0).any()) else out
        return out

    def sure(self, key: Tensor, vector: Tensor | None, told: Tensor | None, where: Tensor, entries: list) -> Tensor:
        """Equation (4) in the cells of `where` (h, w), out of some entries."""
        out = logit(read(key, entries, where, self.options))
        if self.weights is not None and vector is not None:
            out = out + self.options.alpha * torch.einsum("c,chw->hw", self.weights, vector)
        if told is not None:
            out = out + self.options.beta * told
        return torch.where(where, out, out.new_tensor(logit(out.new_zeros(())).item()))


def logit(p: Tensor) -> Tensor:
    p = p.clamp(EPS, 1 - EPS)
    return p.log() - (1 - p).log()


def read(key: Tensor, entries: list[tuple[Entry, float]], where: Tensor, o: Options) -> Tensor:
    """Equations (1) and (2): R_t (h, w) for the keys (dim, h, w) of a frame; 0 in tiles without a cell of `where`
    (h, w) boolean, and where nothing is stored. A window is measured from the tile: all its cells read the same."""
    d, h, w = key.shape
    out = key.new_zeros(h, w)
    if not entries:
        return out
    wanted = F.max_pool2d(where[None, None].float(), o.tile, o.tile, ceil_mode=True)[0, 0].nonzero().tolist()
    for row, column in wanted:
        y, x = row * o.tile, column * o.tile
        query = key[:, y : y + o.tile, x : x + o.tile]
        keys, values = [], []
        for e, around in entries:
            a = around if math.isfinite(around) else max(h, w)
            a = int(a)
            part = slice(max(0, y - a), y + o.tile + a), slice(max(0, x - a), x + o.tile + a)
            keys.append(e.key[:, *part].reshape(d, -1))
            values.append(e.value[part].reshape(-1))
        s = query.reshape(d, -1).T @ torch.cat(keys, 1) / o.tau
        v = torch.cat(values)
        if o.top and o.top < s.shape[1]:
            s, i = s.topk(o.top, 1)
            found = (s.softmax(1) * v[i]).sum(1)
        else:
            found = s.softmax(1) @ v
        out[y : y + o.tile, x : x + o.tile] = found.view(query.shape[1:])
    return out


def fit(entries: list[Entry], ridge: float) -> Tensor | None:
    """Equation (3): w (C + 1,) over the cells of the interacted frames, object and background of equal weight; None
    where either is missing."""
    x = torch.cat([e.vector.flatten(1) for e in entries], 1).T if entries else torch.zeros(0, 1)
    y = torch.cat([e.value.flatten() for e in entries]) if entries else torch.zeros(0)
    inside, outside = y.sum(), (1 - y).sum()
    if not len(y) or float(inside) < 0.5 or float(outside) < 0.5:
        return None
    weight = (y / inside + (1 - y) / outside) / 2
    weighted = x * weight[:, None]
    normal = weighted.T @ x + ridge * torch.eye(x.shape[1], device=x.device)
    return torch.linalg.solve(normal, weighted.T @ (2 * y - 1))


def confidence(logits: Tensor) -> float:
    """c_t of equation (5)."""
    p = logits.sigmoid()
    inside = p[p > 0.5]
    return float((2 * (inside - 0.5)).mean()) if len(inside) else 0.0

"""The cross-round space-time module (CRSTM): a soft mask for a frame, read out of the frames that are stored.

The paper names the module and its role; this formula is our reading of it (README, "Deviations and open points"). For a
query cell q of frame t and a cell k of a stored frame m, places x in cells:

    s_qk = <K_t(q), K_m(k)> / tau + log w_m - |x_q - x_k - delta_m|^2 / (2 sigma^2) - lambda |t - t_m| / T        (1)
    a_q  = softmax over the `top` largest s_qk of all stored frames together                                      (2)
    R_t(q) = sum_k a_qk V_m(k)                                                                                    (3)
    c_t  = mean of 2 |R_t - 1/2| over the cells with R_t > 1/2, 0 without one                                     (4)
    D_t  = clip(logit(clip(R_t, 1e-3, 1 - 1e-3)), -8, 8) c_t                                                      (5)

K has columns of unit length, V is a mask probability, w_m how far the stored mask is trusted, delta_m how far the
box of the object moved from m to t. With lambda 0, sigma infinite and w 1, (1)-(3) is the top-k read-out of space-time
memories. Nothing is learned.
"""

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

STRIP = 16  # columns of query cells that are read together


@dataclass(frozen=True)
class Options:
    tau: float = 0.07
    """Temperature of the similarity of keys."""
    sigma: float = 8.0
    """Spread of the displacement in cells; inf: anywhere."""
    window: float = 16.0
    """Cells of a stored frame further than this from the expected place in x or y are left out; inf: none."""
    decay: float = 1.0
    """lambda: what the whole length of the video costs."""
    top: int = 32
    """Scores kept for a cell."""
    least: float = 0.2
    """Confidence c_t below which there is no dense prompt."""
    trust: float = 0.7
    """Predicted IoU from which a propagated frame is stored."""
    rounds: int = 16
    """Interacted frames kept; the oldest goes first. 1: only the newest interaction."""
    recent: int = 2
    """Last propagated frames of the running pass that are kept."""
    every: int = 5
    """Every so many propagated frames one is kept longer."""
    spaced: int = 8
    """How many of those."""


@dataclass
class Entry:
    """A stored frame."""

    frame: int
    key: Tensor  # (C, h, w), columns of unit length; only cells of the picture, no padding
    value: Tensor  # (h, w) in [0, 1]
    weight: float  # w_m in (0, 1]
    centre: tuple[float, float]  # of the box of the object, (x, y) in cells


@dataclass
class Memory:
    """Stored frames of one object: interacted ones over all rounds, propagated ones of the running pass."""

    options: Options = field(default_factory=Options)
    interacted: dict[int, Entry] = field(default_factory=dict)  # by frame, oldest interaction first
    passing: list[Entry] = field(default_factory=list)
    spaced: list[Entry] = field(default_factory=list)
    count: int = 0

    def interact(self, entry: Entry) -> None:
        """A frame the user touched: replaces what was stored of it."""
        self.interacted.pop(entry.frame, None)
        self.interacted[entry.frame] = entry
        while len(self.interacted) > self.options.rounds:
            self.interacted.pop(next(iter(self.interacted)))
        self.start()

    def forget(self, frame: int) -> None:
        self.interacted.pop(frame, None)

    def start(self) -> None:
        """A new pass over the video begins: propagated frames of the last one go."""
        self.passing, self.spaced, self.count = [], [], 0

    def add(self, entry: Entry) -> None:
        """A propagated frame; stored only when it is trusted."""
        o = self.options
        self.count += 1
        if entry.weight < o.trust:
            return
        self.passing = [*self.passing, entry][-o.recent :] if o.recent else []
        if o.spaced and o.every and self.count % o.every == 0:
            self.spaced = [*self.spaced, entry][-o.spaced :]

    def entries(self) -> list[Entry]:
        found = {e.frame: e for e in (*self.spaced, *self.passing)}
        return list((found | self.interacted).values())


def pooled(logits: Tensor, cells: tuple[int, int]) -> Tensor:
    """V: probabilities of low-resolution logits (4h, 4w), averaged over 4 x 4 to the (h, w) cells of the picture."""
    p = F.avg_pool2d(logits.float().sigmoid()[None, None], 4)[0, 0]
    return p[: cells[0], : cells[1]].contiguous()


def unit(features: Tensor) -> Tensor:
    """K: (C, h, w) with columns of length 1 (a column of zeros stays)."""
    return F.normalize(features.float(), dim=0, eps=1e-6)


def places(h: int, w: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """x and y of the h w cells, row by row."""
    y, x = torch.meshgrid(
        torch.arange(h, dtype=torch.float32, device=like.device),
        torch.arange(w, dtype=torch.float32, device=like.device),
        indexing="ij",
    )
    return x.reshape(-1), y.reshape(-1)


def scores(
    query: Tensor, qx: Tensor, qy: Tensor, frame: int, length: int, centre: tuple[float, float], e: Entry, o: Options
) -> tuple[Tensor, Tensor]:
    """Equation (1) for the query columns (C, n) against one stored frame: scores (n, m) and the values (m,).

    Only the part of the stored frame that some query cell may see is multiplied; a cell outside the window of a query
    has the score -inf.
    """
    h, w = e.value.shape
    dx, dy = centre[0] - e.centre[0], centre[1] - e.centre[1]
    x0, x1, y0, y1 = 0, w, 0, h
    if math.isfinite(o.window):
        x0 = max(0, math.floor(float(qx.min()) - dx - o.window))
        x1 = min(w, math.ceil(float(qx.max()) - dx + o.window) + 1)
        y0 = max(0, math.floor(float(qy.min()) - dy - o.window))
        y1 = min(h, math.ceil(float(qy.max()) - dy + o.window) + 1)
    if x0 >= x1 or y0 >= y1:
        return query.new_empty(query.shape[1], 0), e.value.new_empty(0)
    key = e.key[:, y0:y1, x0:x1].reshape(len(query), -1)
    trusted = math.log(max(e.weight, 1e-6)) - o.decay * abs(frame - e.frame) / max(length, 1)
    s = (query.T @ key).div_(o.tau).add_(trusted)
    gx = qx[:, None] - dx - torch.arange(x0, x1, device=query.device)
    gy = qy[:, None] - dy - torch.arange(y0, y1, device=query.device)
    # What is outside the window costs infinitely much, so one addition a direction does both.
    far_x, far_y = (torch.where(g.abs() > o.window, math.inf, g.square() / (2 * o.sigma**2)) for g in (gx, gy))
    s = s.view(len(qx), y1 - y0, x1 - x0).sub_(far_y[:, :, None]).sub_(far_x[:, None, :])
    return s.flatten(1), e.value[y0:y1, x0:x1].reshape(-1)


def read(
    key: Tensor,
    frame: int,
    length: int,
    centre: tuple[float, float],
    entries: list[Entry],
    o: Options,
    region: tuple[int, int, int, int] | None = None,
) -> Tensor:
    """Equations (2) and (3): R_t (h, w) for the keys (C, h, w) of a frame; 0 outside `region` (x0, y0, x1, y1 in
    cells, x1 and y1 exclusive) and where no stored cell is in reach. The largest scores are merged frame by frame, so
    memory does not grow with their number."""
    c, h, w = key.shape
    x0, y0, x1, y1 = region or (0, 0, w, h)
    x0, y0, x1, y1 = max(0, x0), max(0, y0), min(w, x1), min(h, y1)
    out = key.new_zeros(h, w)
    if not entries or x0 >= x1 or y0 >= y1:
        return out
    for left in range(x0, x1, STRIP):  # a strip sees few columns of a stored frame, the whole region nearly all
        right = min(left + STRIP, x1)
        qx, qy = places(y1 - y0, right - left, key)
        query = key[:, y0:y1, left:right].reshape(c, -1)
        found = top_mean(query, qx + left, qy + y0, frame, length, centre, entries, o)
        if found is not None:
            out[y0:y1, left:right] = found.view(y1 - y0, right - left)
    return out


def top_mean(
    query: Tensor,
    qx: Tensor,
    qy: Tensor,
    frame: int,
    length: int,
    centre: tuple[float, float],
    entries: list[Entry],
    o: Options,
) -> Tensor | None:
    """R_t (n,) of the query columns (C, n); None where no stored cell is in reach of any."""
    best, kept = None, None
    for e in entries:
        s, v = scores(query, qx, qy, frame, length, centre, e, o)
        if not s.shape[1]:
            continue
        s, i = s.topk(min(o.top, s.shape[1]), dim=1)
        v = v[i]
        if best is not None:
            s, v = torch.cat([best, s], 1), torch.cat([kept, v], 1)
            s, i = s.topk(min(o.top, s.shape[1]), dim=1)
            v = v.gather(1, i)
        best, kept = s, v
    if best is None:
        return None
    top = best.max(1, keepdim=True).values
    a = (best - top.clamp_min(-1e30)).exp()  # rows of -inf give zeros, not NaN
    return (a * kept).sum(1) / a.sum(1).clamp_min(1e-12)


def confidence(read_out: Tensor) -> float:
    """c_t of equation (4)."""
    inside = read_out[read_out > 0.5]
    return float((2 * (inside - 0.5).abs()).mean()) if len(inside) else 0.0


def dense_prompt(read_out: Tensor, o: Options) -> tuple[Tensor | None, float]:
    """D_t of equation (5), (h, w), or None when the read-out is not trusted; and c_t."""
    c = confidence(read_out)
    if c < o.least:
        return None, c
    r = read_out.clamp(1e-3, 1 - 1e-3)
    return (r.log() - (1 - r).log()).clamp(-8, 8) * c, c

"""From a user's clicks or box to a mask, without a network that was trained for it.

What looks like the clicked place, to the network in its middle and at its end, is near it, and moves as much against
the background as it does, is probably the object; so is what in a box moves, looks like the rest of what moves there
and unlike the surroundings. A ridge regression from features of the picture (network and colour) to this guess sharpens
it, and is fitted again to its own answer: an expectation-maximisation with two classes that share a covariance. At the
end GrabCut finds the border. One click says little of the extent, so there are several answers, from small to large.

Where colour alone tells what was clicked from its surroundings (`colours.py`) it decides instead.
"""

from dataclasses import dataclass

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import crstm
from prompts import Interaction, box_of
from segmenters import colours
from segmenters.interface import resample, share

SHIFTS = (-1.5, 0.0, 1.5)  # of the log-odds of a click, from small to large
NEAR = 0.05  # of the long side: around this far from a refused click nothing is likely
CLICKS = 5  # more than so many are a scribble
CLOSE = 0.02  # of the long side: how far a click of a correction says what is there
BROAD = 0.2  # of the length of a scribble: how far to its side the object reaches
ALIKE = 0.15  # of the long side: how far it says so of what looks the same
STOOD = 2.0  # log-odds of a place in a box for which a mask that stood there speaks
FEW, MANY = (1, 2, 0), (0, 1, 2)  # which of them is meant, unless a click says otherwise: for clicks, for a scribble
SURE = 1e-3
COLOURS = 7  # the last of a scene's vectors: a constant, Lab and its squares
WIDE, NARROW = 0.1, 0.05  # of the long side: how far around a click, or one of many, colour looks for the object


@dataclass(frozen=True)
class Options:
    rounds: int = 2
    """Of the expectation-maximisation."""
    ridge: float = 0.02
    """Regularisation of the regression."""
    weight: float = 1.0
    """Of its answer beside the guess, in log-odds."""
    side: int = 400
    """Longest side of the picture that GrabCut sees."""
    iterations: int = 2
    """Of GrabCut."""
    high: float = 0.85
    """Probability from which a place is surely the object for GrabCut."""
    low: float = 0.05
    """Probability below which it surely is not."""


COLOUR = Options(rounds=4, weight=4.0)  # colours are seven numbers a cell: they overrule the guess where they can


@dataclass(frozen=True)
class Scene:
    """What is known of a frame before anything is marked; all maps on one grid (h, w) of cells of `cell` pixels."""

    frame: np.ndarray  # (H, W, 3) uint8
    cell: float
    vectors: Tensor  # (C + 7, h, w), what the regression reads
    look: Tensor  # (C, h, w) of the middle of the network, deviations from the picture's mean, columns of unit length
    kind: Tensor  # (D, h, w) the same of its end
    moves: Tensor  # (h, w) log(1 + the speed against the background, in its usual speed there); 0: nothing known

    @classmethod
    def of(cls, frame: np.ndarray, features: Tensor, deep: Tensor, cell: float, other: np.ndarray | None) -> "Scene":
        """Of a frame, its features (C, h, w) and (D, h, w), and a frame next to it in time, if there is one."""
        look, kind = (F.normalize(x.float() - x.float().mean((1, 2), keepdim=True), dim=0) for x in (features, deep))
        moves = torch.zeros(look.shape[1:]) if other is None else motion(frame, other, cell, look.shape[1:])
        return cls(frame, cell, vectors(frame, features, cell), look, kind, moves)

    def grid(self) -> tuple[Tensor, Tensor]:
        """Rows and columns (h, w) of the middles of the cells, in pixels."""
        n = self.moves.shape
        return torch.meshgrid(*((torch.arange(k) + 0.5) * self.cell for k in n), indexing="ij")

    def near(self, x: float, y: float) -> tuple[slice, slice]:
        """The 3 x 3 cells around a place in pixels."""
        h, w = self.moves.shape
        row, column = min(max(int(y / self.cell), 0), h - 1), min(max(int(x / self.cell), 0), w - 1)
        return slice(max(row - 1, 0), row + 2), slice(max(column - 1, 0), column + 2)


def motion(frame: np.ndarray, other: np.ndarray, cell: float, shape: tuple[int, int], side: int = 427) -> Tensor:
    """(h, w) log(1 + v / m): v the speed of each cell against the background, whose motion is the homography that most
    of the dense optical flow to the other frame agrees with, m its median (plus a tenth of a pixel of noise)."""
    scale = min(1.0, side / max(frame.shape[:2]))
    size = max(16, round(frame.shape[1] * scale)), max(16, round(frame.shape[0] * scale))
    a, b = (cv2.cvtColor(cv2.resize(x, size, interpolation=cv2.INTER_AREA), cv2.COLOR_RGB2GRAY) for x in (frame, other))
    there = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM).calc(a, b, None)
    place = np.stack(np.meshgrid(np.arange(size[0]), np.arange(size[1])), -1).astype(np.float32)
    sample = (slice(2, None, 8),) * 2
    cv2.setRNGSeed(0)  # RANSAC draws; the answer must not depend on what ran before
    given = place[sample].reshape(-1, 2)
    ground, _ = cv2.findHomography(given, given + there[sample].reshape(-1, 2), cv2.RANSAC, 1.0)
    if ground is not None:
        there = there - (cv2.perspectiveTransform(place.reshape(-1, 1, 2), ground).reshape(place.shape) - place)
    pixel = max(frame.shape[:2]) / max(size)  # of the frame, a pixel of the flow
    k = max(1, round(cell / pixel))
    x, y = (torch.from_numpy(resample(cv2.blur(there[..., i], (k, k)), pixel, cell, shape)) for i in (0, 1))
    speed = torch.hypot(x, y)
    return (speed / (speed.median() + 0.1)).log1p()


def alike(columns: Tensor, near: tuple[slice, slice]) -> Tensor:
    """Cosines (h, w) of unit columns (C, h, w) to the mean of those at a place."""
    return torch.einsum("chw,c->hw", columns, F.normalize(columns[:, *near].mean((1, 2)), dim=0))


def moving(value: Tensor) -> Tensor:
    """From 0 to 1: whether a place with this `Scene.moves` moves; only then does motion say what belongs to it."""
    return ((value - 0.9) / 0.5).clamp(0, 1)


def vectors(frame: np.ndarray, features: Tensor, cell: float) -> Tensor:
    """(C + 7, h, w): standardised features, a constant, Lab colour and its squares, a column a cell."""
    x = crstm.Basis.of(features, 1).vector(features).cpu()
    lab = cv2.cvtColor(frame, cv2.COLOR_RGB2LAB)
    colour = torch.stack([share(lab[..., i], cell, x.shape[1:]) for i in range(3)])
    colour = (colour - colour.mean((1, 2), keepdim=True)) / (colour.std((1, 2), keepdim=True) + 1)
    return torch.cat([x, colour, colour.square() - 1])


def sharpened(x: Tensor, guess: Tensor, inside: Tensor, outside: Tensor, o: Options) -> Tensor:
    """Probabilities (h, w) of vectors (C, h, w) out of a first guess (h, w); `inside` and `outside` (h, w) boolean are
    known."""
    rows = x.flatten(1).T
    p, prior = guess.clone(), crstm.logit(guess)
    for _ in range(o.rounds):
        p[inside], p[outside] = 1.0, 0.0
        y = p.flatten()
        weight = (y / y.sum().clamp_min(1e-6) + (1 - y) / (1 - y).sum().clamp_min(1e-6)) / 2
        weighted = rows * weight[:, None]
        normal = weighted.T @ rows + o.ridge * torch.eye(rows.shape[1])
        w = torch.linalg.solve(normal, weighted.T @ (2 * y - 1))
        p = (prior + o.weight * torch.einsum("c,chw->hw", w, x)).sigmoid()
    p[inside], p[outside] = 1.0, 0.0
    return p


def bordered(frame: np.ndarray, p: np.ndarray, o: Options) -> np.ndarray:
    """The mask (H, W) of probabilities (H, W) with the border that GrabCut finds; where it disagrees altogether, what
    the probabilities say."""
    plain, possible = p > 0.5, box_of(p > o.low)
    if possible is None:
        return plain
    h, w = p.shape
    x1, y1, x2, y2 = possible.astype(int)
    pad = 8 + int(0.35 * max(x2 - x1, y2 - y1))
    x1, y1, x2, y2 = max(x1 - pad, 0), max(y1 - pad, 0), min(x2 + pad + 1, w), min(y2 + pad + 1, h)
    shrink = min(1.0, o.side / max(x2 - x1, y2 - y1))
    size = max(2, round((x2 - x1) * shrink)), max(2, round((y2 - y1) * shrink))
    crop = cv2.resize(frame[y1:y2, x1:x2], size, interpolation=cv2.INTER_AREA)
    small = cv2.resize(p[y1:y2, x1:x2].astype(np.float32), size, interpolation=cv2.INTER_AREA)
    trimap = np.where(small > 0.5, cv2.GC_PR_FGD, cv2.GC_PR_BGD).astype(np.uint8)
    trimap[small > o.high], trimap[small < o.low] = cv2.GC_FGD, cv2.GC_BGD
    inside = (trimap == cv2.GC_FGD) | (trimap == cv2.GC_PR_FGD)
    if inside.sum() < 8 or (~inside).sum() < 8:  # a colour model of 5 parts needs some pixels
        return plain
    cv2.setRNGSeed(0)  # its k-means draws; the answer must not depend on what ran before
    models = np.zeros((1, 65)), np.zeros((1, 65))
    cv2.grabCut(crop, trimap, None, *models, o.iterations, cv2.GC_INIT_WITH_MASK)
    found = ((trimap == cv2.GC_FGD) | (trimap == cv2.GC_PR_FGD)).astype(np.float32)
    out = np.zeros((h, w), bool)
    out[y1:y2, x1:x2] = cv2.resize(found, (x2 - x1, y2 - y1), interpolation=cv2.INTER_LINEAR) > 0.5
    both = np.count_nonzero(out & plain) / max(np.count_nonzero(out | plain), 1)
    return out if both > 0.5 else plain


def clicked(scene: Scene, points: np.ndarray) -> Tensor:
    """Log-odds (h, w) that a cell belongs to the object of clicks (n, 2) at x, y. Weights by logistic regression and
    trial on dog, libby and dance-twirl of DAVIS, as are those of `boxed`."""
    rows, columns = scene.grid()
    look, kind, away = (torch.full(scene.moves.shape, v) for v in (-1.0, -1.0, float("inf")))
    speed = []
    for px, py in points.tolist():
        near = scene.near(px, py)
        speed.append(scene.moves[near].mean())
        look, kind = (torch.maximum(a, alike(m, near)) for a, m in ((look, scene.look), (kind, scene.kind)))
        away = torch.minimum(away, torch.hypot(columns - px, rows - py) / max(scene.frame.shape[:2]))
    g = moving(torch.stack(speed).median())
    odds = 7 * look + 2 * kind - 18 * away**2 + 2 * g * (scene.moves - 1.1) - 1.5 - 1.5 * g
    if len(points) > CLICKS:  # a scribble also says how large the object is
        odds = odds - (away * max(scene.frame.shape[:2]) / (BROAD * (np.ptp(points, 0).max() + scene.cell))) ** 2
    mean = F.normalize((scene.look * odds.sigmoid()).sum((1, 2)), dim=0)
    return odds + 5 * torch.einsum("chw,c->hw", scene.look, mean) - 2.5 * look - 1


def boxed(scene: Scene, box: np.ndarray) -> tuple[Tensor, Tensor]:
    """Log-odds (h, w) that a cell belongs to the object of a box, and its distance (h, w) from the middle, 1 at the
    sides."""
    (x1, y1, x2, y2), cell = (float(v) for v in box), scene.cell
    rows, columns = scene.grid()
    u = (columns - (x1 + x2) / 2).abs() / max((x2 - x1) / 2, cell)
    v = (rows - (y1 + y2) / 2).abs() / max((y2 - y1) / 2, cell)
    out = torch.maximum(u, v)
    around = (out > 1) & (out < 1.6)
    around = around if int(around.sum()) >= 4 else out > 1
    if not bool(around.any()):  # the box is the picture: nothing is known of its surroundings
        return 0.5 - 1.8 * (u**2 + v**2), out
    guess = (1.4 * scene.moves - 1.8 * (u**2 + v**2) - 2.2).sigmoid() * (out <= 1)
    other = torch.einsum("chw,cn->nhw", scene.look, scene.look[:, around])
    other = other.topk(min(5, len(other)), 0).values.mean(0)  # likeness to what is most alike outside
    speed = scene.moves.expm1()
    speed = (speed / (speed[around].median() + 0.1)).log1p()
    for _ in range(2):
        g = moving((guess * speed).sum() / guess.sum().clamp_min(1e-6))
        mean = F.normalize((scene.look * guess).sum((1, 2)), dim=0)
        look = torch.einsum("chw,c->hw", scene.look, mean)
        odds = 5.8 * look - 11.2 * other + g * (1.07 * speed + 0.6) + (1 - g) * 3.2
        guess = odds.sigmoid() * (out <= 1)
    return odds, out


def agrees(mask: np.ndarray, given: Interaction) -> bool:
    """Whether every click is on its side of a mask's border."""
    x, y = np.clip(given.points.round().astype(int), 0, np.array(mask.shape[::-1]) - 1).T
    return bool((mask[y, x] == (given.labels == 1)).all())


def answer(
    scene: Scene, given: Interaction, before: np.ndarray | None, seen: colours.Seen = ()
) -> tuple[np.ndarray, float]:
    """The mask (H, W) of all clicks and the box of a frame, `before` what stood there before the first of them, `seen`
    other frames with the object's masks. Among the sizes that clicks may mean, the first of FEW or MANY counts that
    looks like the object there and agrees with every click; if none looks like it, no more than the clicks is taken."""
    if given.box is not None:
        return masks(scene, given, before)[-1]
    told = colours.told(scene.frame, seen) if seen else None
    if before is not None or told is not None:
        before = np.zeros(scene.frame.shape[:2], bool) if before is None else before
        return corrected(scene, given, before, told=told)
    if not (given.labels == 1).any():
        return masks(scene, given)[-1]
    found = coloured(scene, given)
    if found is not None:
        return found
    positive = given.labels == 1
    alone = Interaction(points=given.points[positive], labels=given.labels[positive])
    sizes = masks(scene, alone)
    order = FEW if len(alone.points) <= CLICKS else MANY
    if seen:  # a mask that does not look like the object elsewhere would spoil the frames around it
        order = [i for i in order if colours.like(scene.frame, sizes[i][0], seen) > colours.LIKE]
    if not order:
        nothing = np.zeros(scene.frame.shape[:2], bool)
        return corrected(scene, given, nothing, told=nothing)
    for i in order:
        if agrees(sizes[i][0], given):
            return sizes[i]
    return corrected(scene, given, sizes[order[0]][0])


def coloured(scene: Scene, given: Interaction) -> tuple[np.ndarray, float] | None:
    """The mask (H, W) of clicks by colour alone; None where colour does not tell it from its surroundings."""
    (rows, columns), long, positive = scene.grid(), max(scene.frame.shape[:2]), given.points[given.labels == 1]
    to = torch.stack([torch.hypot(columns - float(px), rows - float(py)) for px, py in positive]).amin(0)
    width = (WIDE if len(positive) <= CLICKS else NARROW) * long
    guess = torch.exp(-((to / width) ** 2)).clamp(SURE, 0.9)
    p = sharpened(scene.vectors[-COLOURS:], guess, to < 1.2 * scene.cell, to > 0.45 * long, COLOUR)
    mask = bordered(scene.frame, resample(p.numpy(), scene.cell, 1.0, scene.frame.shape[:2]), COLOUR)
    if not agrees(mask, given) or colours.common([(scene.frame, mask)]) >= colours.APART:
        return None
    return mask, crstm.confidence(crstm.logit(p))


def masks(
    scene: Scene, given: Interaction, before: np.ndarray | None = None, o: Options | None = None
) -> list[tuple[np.ndarray, float]]:
    """Masks (H, W) of clicks and a box on a frame, and how sure each is; with a box one, which a mask that stood there
    `before` makes likelier where it was, else one of each of SHIFTS, from small to large. Clicks are always on their
    side of a mask's border."""
    o = o or Options()
    (h, w), (rows, columns) = scene.frame.shape[:2], scene.grid()

    def near(points: np.ndarray) -> Tensor:
        """Pixels from the middle of each cell to the nearest point."""
        if not len(points):
            return torch.full(rows.shape, float("inf"))
        return torch.stack([torch.hypot(columns - float(px), rows - float(py)) for px, py in points]).amin(0)

    to, away = near(given.points[given.labels == 1]), near(given.points[given.labels == 0])
    sure, refused, long = to < 1.2 * scene.cell, away < 1.2 * scene.cell, max(h, w)
    if given.box is not None:
        odds, out = boxed(scene, given.box)
        if before is not None:
            odds = odds + STOOD * (2 * share(before, scene.cell, odds.shape) - 1)
        guess, far = torch.where(out <= 1, odds.sigmoid(), torch.tensor(SURE)), out > 1.05
        guesses = [torch.maximum(guess, 0.9 * torch.exp(-((to / (NEAR * long)) ** 2)))]
    elif (given.labels == 1).any():
        odds, far = clicked(scene, given.points[given.labels == 1]), to > 0.45 * long
        guesses = [(odds + s).sigmoid() for s in SHIFTS]
    else:
        guesses, far = [torch.full(rows.shape, SURE)], torch.zeros(rows.shape, dtype=torch.bool)
    found = []
    for guess in guesses:
        guess = torch.minimum(guess.clamp(SURE, 0.97), 1 - torch.exp(-((away / (NEAR * long)) ** 2))).clamp_min(SURE)
        p = sharpened(scene.vectors, guess, sure & ~refused, (far | refused) & ~sure, o)
        mask = bordered(scene.frame, resample(p.numpy(), scene.cell, 1.0, (h, w)), o)
        if given.box is not None:  # the box bounds the object
            x1, y1, x2, y2 = (int(v) for v in given.box)
            bounded = np.zeros_like(mask)
            bounded[max(y1, 0) : y2 + 1, max(x1, 0) : x2 + 1] = True
            mask &= bounded
        found.append((mask, crstm.confidence(crstm.logit(p))))
    return found


def corrected(
    scene: Scene, given: Interaction, before: np.ndarray, o: Options | None = None, told: np.ndarray | None = None
) -> tuple[np.ndarray, float]:
    """A mask (H, W) `before`, corrected by clicks: what changes is connected to a click, the rest stays as it was. A
    click speaks for what is close, and for what looks the same a little further on; the many clicks of a scribble say
    where the border runs, so each of them changes only what is close. Where the object's colours are known to be its
    own, they say what it is (`told`)."""
    o, cell, few = o or Options(), scene.cell, len(given.points) <= CLICKS
    (h, w), long, (rows, columns) = scene.frame.shape[:2], max(scene.frame.shape[:2]), scene.grid()
    radius, reach = max(2, round(0.004 * long)), long if few else CLOSE * long
    if told is not None:
        found, sure, radius, reach = told, 1.0, 1, long
    else:
        guess = share(before, cell, rows.shape).clamp(0.02, 0.98)
        known = torch.zeros(2, *rows.shape, dtype=torch.bool)
        for (px, py), label in zip(given.points, given.labels, strict=True):
            d = torch.hypot(columns - float(px), rows - float(py))
            says = torch.exp(-((d / (CLOSE * long)) ** 2))
            if few:
                same = ((alike(scene.look, scene.near(float(px), float(py))) - 0.35) / 0.08).sigmoid()
                says = torch.maximum(says, same * torch.exp(-((d / (ALIKE * long)) ** 2)))
            guess = guess + says * ((0.9 if label else 0.1) - guess)
            known[int(label)] |= d < 1.2 * cell
        p = sharpened(scene.vectors, guess, known[1] & ~known[0], known[0] & ~known[1], o)
        found = bordered(scene.frame, resample(p.numpy(), cell, 1.0, (h, w)), o)
        sure = crstm.confidence(crstm.logit(p))
    out = before.copy()
    for (px, py), label in zip(given.points.round().astype(int).tolist(), given.labels, strict=True):
        place, close = np.zeros((2, h, w), np.uint8)
        cv2.circle(place, (px, py), radius, 1, -1)
        cv2.circle(close, (px, py), max(radius, round(reach)), 1, -1)
        wrong = ((found & ~before) if label else (before & ~found)) & (close > 0)
        number = cv2.connectedComponents(wrong | place)[1]
        out[np.isin(number, np.unique(number[place > 0]))] = bool(label)
    return out, sure

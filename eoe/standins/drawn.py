"""The small world of the embedded default: drawn 32x32 images, their names, and a provider that envisions by rules.

A picture shows one of 24 shapes in one of 8 colours and 4 textures ("red striped circle"), or a pattern without any
shape ("blue marble"). Names compose, so a model that has learnt the words can be asked about any of the 816 names.
"""

import random
from dataclasses import dataclass

import torch
from torch import Tensor

COLOURS = {
    **{"red": (0.9, 0.15, 0.15), "green": (0.15, 0.8, 0.2), "blue": (0.2, 0.3, 0.95), "yellow": (0.95, 0.9, 0.2)},
    **{"purple": (0.6, 0.2, 0.8), "orange": (1.0, 0.55, 0.1), "white": (0.95, 0.95, 0.95), "cyan": (0.15, 0.85, 0.9)},
}
TEXTURES = ("plain", "striped", "dotted", "checked")
OUTLINES = {
    "round": ("circle", "oval", "ring", "crescent", "lens", "dome"),
    "boxy": ("square", "bar", "frame", "diamond", "hexagon", "trapezoid"),
    "pointed": ("triangle", "star", "chevron", "fan", "arrow", "kite"),
    "crossed": ("cross", "saltire", "tee", "ell", "grid", "zed"),
}
SHAPES = tuple(s for group in OUTLINES.values() for s in group)
PATTERNS = ("gradient", "noise", "waves", "plaid", "spots", "marble")
NONSENSE = tuple(f"{a} {b}" for a in ("old", "loud", "sweet", "late") for b in ("idea", "song", "law", "hour"))
SIZE = 32


def concepts() -> list[str]:
    """All names of pictures with a shape."""
    return [f"{c} {t} {s}" for s in SHAPES for c in COLOURS for t in TEXTURES]


def patterns() -> list[str]:
    """All names of pictures without one."""
    return [f"{c} {p}" for p in PATTERNS for c in COLOURS]


# ------------------------------------------------------------------------------------------------------------- drawing


def _shape(name: str, u: Tensor, v: Tensor) -> Tensor:
    """Inside of a shape of radius 1 at local coordinates u (right), v (down); bool like u."""
    r, a, b = torch.hypot(u, v), u.abs(), v.abs()
    box = torch.maximum(a, b)
    inside = {
        "circle": lambda: r < 0.95,
        "oval": lambda: torch.hypot(u, 1.9 * v) < 1,
        "ring": lambda: (r < 1) & (r > 0.55),
        "crescent": lambda: (r < 1) & (torch.hypot(u - 0.5, v) > 0.8),
        "lens": lambda: (torch.hypot(u, v - 0.6) < 1.15) & (torch.hypot(u, v + 0.6) < 1.15),
        "dome": lambda: (torch.hypot(u, v - 0.5) < 1.0) & (v < 0.5),
        "square": lambda: box < 0.8,
        "bar": lambda: (a < 1) & (b < 0.4),
        "frame": lambda: (box < 0.9) & (box > 0.5),
        "diamond": lambda: a + b < 1,
        "hexagon": lambda: (b < 0.8) & (0.87 * a + 0.5 * b < 0.8),
        "trapezoid": lambda: (b < 0.6) & (a < 0.7 + 0.5 * v),
        "triangle": lambda: (v < 0.7) & (v > 2 * a - 1),
        "star": lambda: r < 0.68 + 0.32 * torch.cos(5 * torch.atan2(u, -v)),
        "chevron": lambda: ((v - a + 0.3).abs() < 0.32) & (a < 0.9),
        "fan": lambda: (r < 1) & (v < -0.5 * a + 0.2) & (v < 0.6 - a),
        "arrow": lambda: ((v < 0) & (v > 1.2 * a - 0.95)) | ((a < 0.25) & (v >= 0) & (v < 0.95)),
        "kite": lambda: (a < 0.6 * (v + 1)) & (a < 0.33 * (1 - v) + 0.05),
        "cross": lambda: (torch.minimum(a, b) < 0.28) & (box < 0.95),
        "saltire": lambda: (torch.minimum((u - v).abs(), (u + v).abs()) < 0.4) & (box < 0.8),
        "tee": lambda: ((v < -0.4) & (v > -0.9) & (a < 0.9)) | ((a < 0.27) & (b < 0.9)),
        "ell": lambda: ((u < -0.2) & (u > -0.7) & (b < 0.9)) | ((v > 0.4) & (v < 0.9) & (u < 0.8) & (u > -0.7)),
        "grid": lambda: (box < 0.95) & (((a - 0.45).abs() < 0.2) | ((b - 0.45).abs() < 0.2)),
        "zed": lambda: (box < 0.85) & ((b > 0.5) | ((u + v).abs() < 0.35)),
    }
    return inside[name]()


def _texture(name: str, u: Tensor, v: Tensor) -> Tensor:
    """Brightness in [0, 1] at local coordinates."""
    if name == "plain":
        return torch.ones_like(u)
    if name == "striped":
        return (torch.sin(9 * v) > 0).float()
    if name == "dotted":
        return 1 - (torch.hypot((2 * u) % 1 - 0.5, (2 * v) % 1 - 0.5) < 0.3).float()
    return (torch.sin(6.5 * u) * torch.sin(6.5 * v) > 0).float()


def _pattern(name: str, x: Tensor, y: Tensor, g: torch.Generator) -> Tensor:
    """Brightness in [0, 1] of a whole picture [n, 32, 32]; phases are random."""
    n = len(x)
    p, q = (torch.rand(n, 1, 1, generator=g) * 6.28 for _ in range(2))
    if name == "gradient":
        return 0.5 + 0.5 * (x * torch.cos(p) + y * torch.sin(p)).clamp(-1, 1)
    if name == "noise":
        return torch.rand(n, SIZE, SIZE, generator=g)
    if name == "waves":
        return 0.5 + 0.5 * torch.sin(9 * y + 1.5 * torch.sin(4 * x + p) + q)
    if name == "plaid":
        return 0.5 + 0.25 * torch.sign(torch.sin(10 * x + p)) + 0.25 * torch.sign(torch.sin(10 * y + q))
    if name == "spots":
        return (torch.hypot((2.2 * x + p) % 1 - 0.5, (2.2 * y + q) % 1 - 0.5) < 0.32).float()
    return 0.5 + 0.5 * torch.sin(5 * x + 3 * torch.sin(3 * y + p) + 2 * torch.sin(5 * x - 4 * y + q))


def draw(names: list[str], seed: int, chunk: int = 1024) -> Tensor:
    """A picture for each name, uint8 [N, 3, 32, 32]: random place, size, tilt, contrast, clutter and noise."""
    g = torch.Generator().manual_seed(seed)
    return torch.cat([_draw(names[i : i + chunk], g) for i in range(0, len(names), chunk)])


def _draw(names: list[str], g: torch.Generator) -> Tensor:
    n = len(names)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(n, *shape, generator=g)

    line = (torch.arange(SIZE) + 0.5) / SIZE * 2 - 1
    y, x = torch.meshgrid(line, line, indexing="ij")
    cx, cy, radius = uniform(-0.3, 0.3, 1, 1), uniform(-0.3, 0.3, 1, 1), uniform(0.5, 0.8, 1, 1)
    tilt, contrast = uniform(-0.25, 0.25, 1, 1), uniform(0.3, 1.0, 1, 1, 1)
    dx, dy = (x - cx) / radius, (y - cy) / radius
    u, v = dx * torch.cos(tilt) + dy * torch.sin(tilt), dy * torch.cos(tilt) - dx * torch.sin(tilt)
    words = [name.split() for name in names]
    mask, light = torch.zeros(n, SIZE, SIZE), torch.ones(n, SIZE, SIZE)

    def having(word: str) -> Tensor:
        return torch.tensor([i for i, w in enumerate(words) if word in w], dtype=torch.long)

    for shape in SHAPES:
        if len(i := having(shape)):
            mask[i] = _shape(shape, u[i], v[i]).float()
    for texture in TEXTURES:
        if len(i := having(texture)):
            light[i] = 0.3 + 0.7 * _texture(texture, u[i], v[i])
    for pattern in PATTERNS:
        if len(i := having(pattern)):
            mask[i] = 1.0
            light[i] = 0.25 + 0.75 * _pattern(pattern, x.expand(len(i), -1, -1), y.expand(len(i), -1, -1), g)
    colour = torch.tensor([COLOURS[w[0]] for w in words])[:, :, None, None]
    colour = colour * uniform(0.8, 1.0, 3, 1, 1)
    clutter = torch.nn.functional.interpolate(uniform(0.0, 0.7, 3, 4, 4), size=SIZE, mode="bilinear")
    alpha = mask[:, None] * contrast
    picture = alpha * colour * light[:, None] + (1 - alpha) * clutter
    picture = picture + 0.08 * torch.randn(n, 3, SIZE, SIZE, generator=g)
    return (picture.clamp(0, 1) * 255).round().to(torch.uint8)


# --------------------------------------------------------------------------------------------------------------- tasks


@dataclass(frozen=True)
class DrawnTask:
    """ID names, OOD names, and per set the names of the pictures to draw with the index of their class."""

    task: str  # far, near or fine: which prompt and which cleaning rule
    id_names: tuple[str, ...]
    ood_names: tuple[str, ...]

    def pictures(self, of: str, count: int, rng: random.Random) -> tuple[list[str], list[int]]:
        """`count` full picture names for each class of `of` ("id" or "ood"); a bare shape gets a random colour."""
        out, label = [], []
        for i, name in enumerate(self.id_names if of == "id" else self.ood_names):
            for _ in range(count):
                bare = name in SHAPES
                out.append(f"{rng.choice(list(COLOURS))} {rng.choice(TEXTURES)} {name}" if bare else name)
                label.append(i)
        return out, label


def tasks(seed: int, k: int = 40) -> dict[str, DrawnTask]:
    """The three kinds of outlier, drawn by the seed.

    fine-grained: k and k other names of the same world. near: 9 shapes (three of each of three outlines) against 3
    others of the same outlines; far: k names with a shape against patterns without one (three of the six kinds).
    """
    rng = random.Random(f"tasks {seed}")
    chosen = rng.sample(concepts(), 2 * k)
    near_id, near_ood = [], []
    for outline in rng.sample(list(OUTLINES), 3):
        order = rng.sample(OUTLINES[outline], 4)
        near_id += order[:3]
        near_ood += order[3:]
    kinds = rng.sample(PATTERNS, 3)
    return {
        "fine-grained": DrawnTask("fine", tuple(chosen[:k]), tuple(chosen[k:])),
        "near": DrawnTask("near", tuple(near_id), tuple(near_ood)),
        "far": DrawnTask("far", tuple(chosen[:k]), tuple(f"{c} {p}" for p in kinds for c in COLOURS)),
    }


class RuleProvider:
    """Stands in for the language model: answers the same questions in the same format, from memory.

    It remembers each name with probability 2/3, drawn by the seed and without any look at what the OOD names are.
    """

    name = "rules"

    def __init__(self, seed: int, memory: float = 2 / 3):
        self.rng = random.Random(f"provider {seed}")
        known = [n for n in [*concepts(), *patterns()] if self.rng.random() < memory]
        self.shapes = [s for s in SHAPES if self.rng.random() < memory]
        self.concepts = [n for n in known if n.split()[-1] in SHAPES]
        self.patterns = [n for n in known if n.split()[-1] in PATTERNS]

    def complete(self, messages: list[dict], question) -> str:
        """The proposed names as a hyphen list; `question` is names.prompts.Question."""
        said = {line[2:] for m in messages if m["role"] == "assistant" for line in m["content"].splitlines()}
        names = [n for n in self.propose(question) if n not in said and n not in question.id_names]
        return "\n".join(f"- {n}" for n in names[: question.n])

    def propose(self, q) -> list[str]:
        if q.task == "near":
            mine = next(g for g in OUTLINES.values() if q.id_names[0] in g)
            alike = [s for s in self.shapes if s in mine]
            unlike = [s for s in self.shapes if s not in mine]
            pool = {"resemble": alike, "dissimilar": unlike, "irrelevant": NONSENSE}[q.variant]
        else:
            words = {w for n in q.id_names for w in n.split()}
            alike = [n for n in (self.concepts if q.task == "fine" else self.patterns) if words & {*n.split()}]
            unlike = self.patterns if q.task == "fine" else self.concepts
            pool = {"resemble": alike, "dissimilar": unlike, "irrelevant": NONSENSE}[q.variant]
        return self.rng.sample(pool, len(pool))

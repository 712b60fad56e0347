"""Digit scenes: real 8x8 scans of scikit-learn placed on a 16x16 canvas, with captions that tell too little.

A scene has 2x2 cells, each empty or with one digit, moved by up to one pixel. Digits keep company (3 with 8, 1 with 7,
...: in `company` of the scenes with two or more), so that language alone gives a guess about what else is there. A
caption names one digit, the most frequent kind in the scene, and is wrong now and then. Every draw comes from a stream
of its own (streams.py).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image
from scipy import ndimage
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

from documents.readers import Document, Picture, Text
from streams import stream

SIDE, CELLS = 16, 4
NAMES = tuple("0123456789")
PARTNER = {3: 8, 8: 3, 1: 7, 7: 1, 0: 6, 6: 0, 2: 5, 5: 2, 4: 9, 9: 4}
FREQUENCY = 1 / (2 + np.arange(10))  # digit 0 is named most often; a caption names the most frequent one present
COUNTS = (0.1, 0.2, 0.3, 0.4)  # share of scenes with 1, 2, 3, 4 digits
SHAPES = 12  # principal components that describe the shape of a scan
SPARE = 600  # scans kept for tests
WORDS = (*NAMES, *"there is a an and the in image main object this on left digits yes no . ? ,".split())
WORDS = (*WORDS, "digit", "two", "mirrored", "please", "answer", "or", "are")


@cache
def scans() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(1797, 8, 8) floats in [0, 1], labels, and an order whose last SPARE are for tests."""
    d = load_digits()
    return d.images.astype(np.float32) / 16, d.target, np.random.default_rng(0).permutation(len(d.target))


def pools() -> tuple[np.ndarray, np.ndarray]:
    order = scans()[2]
    return order[:-SPARE], order[-SPARE:]


@dataclass(frozen=True)
class Scenes:
    """images (n, 16, 16) floats in [0, 1]; cells (n, 4) with the digit of each cell in row order, -1 empty; details
    (n, 4, 2 + SHAPES): how each digit is moved, in pixels, and the shape of its scan; zeros in empty cells."""

    images: np.ndarray
    cells: np.ndarray
    details: np.ndarray

    def __len__(self) -> int:
        return len(self.cells)

    def objects(self) -> list[list[str]]:
        return [[NAMES[d] for d in sorted({*c[c >= 0].tolist()})] for c in self.cells]

    def captioned(self) -> np.ndarray:
        """The digit that a caption names: the lowest, which is the most frequent one."""
        return np.where(self.cells < 0, 99, self.cells).min(1)


@cache
def shapes() -> np.ndarray:
    """(1797, SHAPES): principal components of the scans, those of the training scans with variance 1."""
    images, _, _ = scans()
    flat, train = images.reshape(len(images), -1), pools()[0]
    mean = flat[train].mean(0)
    axes = np.linalg.svd(flat[train] - mean, full_matrices=False)[2][:SHAPES]
    out = (flat - mean) @ axes.T
    return (out / out[train].std(0)).astype(np.float32)


def paste(canvas: np.ndarray, scan: np.ndarray, cell: int, dy: int, dx: int) -> None:
    y, x = 8 * (cell // 2) + dy, 8 * (cell % 2) + dx
    ys, xs = slice(max(y, 0), min(y + 8, SIDE)), slice(max(x, 0), min(x + 8, SIDE))
    part = scan[ys.start - y : ys.stop - y, xs.start - x : xs.stop - x]
    canvas[ys, xs] = np.maximum(canvas[ys, xs], part)


def make(n: int, rng: np.random.Generator, pool: np.ndarray, company: float = 0.8) -> Scenes:
    """n scenes of scans out of `pool`."""
    images, labels, _ = scans()
    of = [pool[labels[pool] == d] for d in range(10)]
    share = FREQUENCY / FREQUENCY.sum()
    out, cells = np.zeros((n, SIDE, SIDE), np.float32), np.full((n, CELLS), -1)
    details = np.zeros((n, CELLS, 2 + SHAPES), np.float32)
    for i in range(n):
        count = 1 + rng.choice(4, p=COUNTS)
        digits = [int(rng.choice(10, p=share))]
        if count > 1:
            digits.append(PARTNER[digits[0]] if rng.random() < company else int(rng.integers(10)))
        digits += rng.integers(10, size=count - len(digits)).tolist()
        for cell, d in zip(rng.permutation(CELLS)[:count], digits, strict=True):
            cells[i, cell] = d
            scan, moved = rng.choice(of[d]), rng.integers(-1, 2, size=2)
            details[i, cell] = [*moved, *shapes()[scan]]
            paste(out[i], images[scan], cell, *moved)
    return Scenes(out, cells, details)


def alone(scan: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A scene with one digit."""
    canvas = np.zeros((SIDE, SIDE), np.float32)
    paste(canvas, scan, int(rng.integers(CELLS)), *rng.integers(-1, 2, size=2))
    return canvas


def pictures_only(images: np.ndarray) -> Scenes:
    """Pictures of which nothing else is known."""
    n = len(images)
    return Scenes(images, np.full((n, CELLS), -1), np.zeros((n, CELLS, 2 + SHAPES), np.float32))


# ---------------------------------------------------------------------------------------------------------------- texts


def caption(digit: int) -> str:
    return f"there is a {digit} ."


def listing(digits) -> str:
    """A complete description: each digit once, in ascending order."""
    return "there is " + " and ".join(f"a {d}" for d in sorted({int(d) for d in digits if d >= 0})) + " ."


def ask(kind: str, digit: int) -> str:
    """The wordings of tiny-POPE, tiny-RobustVQA and tiny-MMVP."""
    return {
        "there": f"Is there a {digit} in the image?",
        "main": f"Is {digit} the main object in this image?",
        "left": f"Is the {digit} on the left?",
        "two": "Are there two digits in the image?",
        "mirrored": f"Is the {digit} mirrored?",
    }[kind]


def truth(kind: str, cells: np.ndarray, digit: int) -> bool:
    if kind == "left":
        return bool((cells[[0, 2]] == digit).any())
    if kind == "two":
        return int((cells >= 0).sum()) == 2
    return bool((cells == digit).any())


def question(rng: np.random.Generator, cells: np.ndarray) -> tuple[str, str]:
    """A random question about a scene and its answer; half of those about presence ask for what is there."""
    present = sorted({int(d) for d in cells if d >= 0})
    kind = str(rng.choice(["there", "main", "left", "two"], p=[0.6, 0.15, 0.15, 0.1]))
    if kind == "left":
        digit = int(rng.choice(present))
    elif rng.random() < 0.5:
        digit = int(rng.choice(present))
    else:
        digit = int(rng.choice([d for d in range(10) if d not in present]))
    return ask(kind, digit), "yes" if truth(kind, cells, digit) else "no"


def speech(rng: np.random.Generator, company: float = 0.8) -> list[Text]:
    """A text without picture for the warm-up of the language model: a description, complete or not, and a question."""
    s = make_cells(rng, company)
    told = listing(s) if rng.random() < 0.6 else caption(min(int(d) for d in s if d >= 0))
    if rng.random() < 0.3:
        return [Text(told)]
    asked, answer = question(rng, s)
    return [Text(told), Text(f"{asked} "), Text(answer)]


def make_cells(rng: np.random.Generator, company: float) -> np.ndarray:
    cells = np.full(CELLS, -1)
    count = 1 + rng.choice(4, p=COUNTS)
    digits = [int(rng.choice(10, p=FREQUENCY / FREQUENCY.sum()))]
    if count > 1:
        digits.append(PARTNER[digits[0]] if rng.random() < company else int(rng.integers(10)))
    digits += rng.integers(10, size=count - len(digits)).tolist()
    cells[rng.permutation(CELLS)[:count]] = digits
    return cells


# ------------------------------------------------------------------------------------------------------------ documents


def to_picture(image: np.ndarray) -> Picture:
    return Picture(Image.fromarray((image * 255).round().astype(np.uint8)).convert("RGB"))


class SceneReader:
    """Endless documents over fixed training scenes; a function of seed and position alone, like the readers of files.

    stage 1: picture and caption, in either order with equal chance; a quarter of the documents hold two scenes.
    stage 2: picture, question, answer; the answer alone is learned."""

    def __init__(
        self, seed: int, stage: int, *, n: int = 6000, company: float = 0.8, noise: float = 0.05, rank: int = 0,
        world: int = 1,
    ):  # fmt: skip
        self.seed, self.stage, self.noise, self.at, self.world = seed, stage, noise, rank, world
        self.scenes = make(n, stream(seed, "scenes"), pools()[0], company)
        self.pictures = [to_picture(x) for x in self.scenes.images]
        self.captioned = self.scenes.captioned().tolist()

    def state(self) -> dict:
        return {"at": self.at}

    def restore(self, state: dict) -> None:
        self.at = int(state["at"])

    def __iter__(self) -> Iterator[Document]:
        return self

    def __next__(self) -> Document:
        rng = stream(self.seed, f"documents of stage {self.stage}", self.at)
        self.at += self.world
        if self.stage > 1:
            i = int(rng.integers(len(self.scenes)))
            asked, answer = question(rng, self.scenes.cells[i])
            return Document((self.pictures[i], Text(asked, learn=False), Text(answer)), f"scene {i}")
        parts: list[Text | Picture] = []
        for _ in range(2 if rng.random() < 0.25 else 1):
            i = int(rng.integers(len(self.scenes)))
            named = self.captioned[i] if rng.random() >= self.noise else int(rng.integers(10))
            pair = [self.pictures[i], Text(caption(named))]
            parts += pair if rng.random() < 0.5 else pair[::-1]
        return Document(tuple(parts), "scenes")


# ----------------------------------------------------------------------------------------------------------- benchmarks


@cache
def small_clip(seed: int, labelled: int = 200) -> LogisticRegression:
    """The miniature of the CLIP that mines RobustVQA: logistic regression on pixels of a few scans."""
    images, labels, _ = scans()
    chosen = stream(seed, "small clip").choice(pools()[0], labelled, replace=False)
    return LogisticRegression(max_iter=500).fit(images[chosen].reshape(labelled, -1), labels[chosen])


def renditions(scans_: np.ndarray) -> np.ndarray:
    """Inverted picture and its edges, half and half."""
    edges = np.stack([np.hypot(ndimage.sobel(x, 0), ndimage.sobel(x, 1)) for x in scans_])
    edges /= edges.max((1, 2), keepdims=True).clip(1e-6)
    return np.clip(0.5 * (1 - scans_) + 0.5 * edges, 0, 1).astype(np.float32)


def rotated(scans_: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Turned by up to 15 degrees, with noise."""
    turned = [ndimage.rotate(x, rng.uniform(-15, 15), reshape=False, order=1) for x in scans_]
    return np.clip(np.stack(turned) + rng.normal(0, 0.15, scans_.shape), 0, 1).astype(np.float32)


def mined(seed: int) -> dict[str, list[tuple[np.ndarray, str, str]]]:
    """{subset: (scene with one digit, true name, wrong name)} of the test scans that the miniature CLIP gets wrong:
    as they are (A), as renditions (R), turned and noisy (V)."""
    images, labels, _ = scans()
    test, clip, out = pools()[1], small_clip(seed), {}
    rng = stream(seed, "mined")
    kinds = {"A": images[test], "R": renditions(images[test]), "V": rotated(images[test], rng)}
    for name, given in kinds.items():
        said = clip.predict(given.reshape(len(given), -1))
        wrong = np.flatnonzero(said != labels[test])[:150]
        out[name] = [(alone(given[i], rng), NAMES[labels[test][i]], NAMES[said[i]]) for i in wrong]
    return out


def pairs(seed: int, n: int = 60) -> list[tuple[tuple, tuple]]:
    """tiny-MMVP: (scene, question, answer) pairs that differ in the side of a digit, the count, or by mirroring."""
    images, labels, _ = scans()
    rng, test, out = stream(seed, "pairs"), pools()[1], []
    for k in range(n):
        i = int(rng.choice(test))
        d, a, b = int(labels[i]), np.zeros((SIDE, SIDE), np.float32), np.zeros((SIDE, SIDE), np.float32)
        if k % 3 == 0:
            row = 2 * int(rng.integers(2))
            paste(a, images[i], row, 0, 0)
            paste(b, images[i], row + 1, 0, 0)
            asked = ask("left", d)
        elif k % 3 == 1:
            j, other = rng.choice(test, 2, replace=False)
            for canvas, many in ((a, (i, j)), (b, (i, j, other))):
                for cell, scan in enumerate(many):
                    paste(canvas, images[scan], cell, 0, 0)
            asked = ask("two", d)
        else:
            cell = int(rng.integers(CELLS))
            paste(a, images[i][:, ::-1], cell, 0, 0)
            paste(b, images[i], cell, 0, 0)
            asked = ask("mirrored", d)
        out.append(((a, asked, "yes"), (b, asked, "no")))
    return out

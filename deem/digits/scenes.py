"""Digit scenes: real 8x8 scans of scikit-learn placed on a 16x16 canvas, with captions that tell too little.

A scene has 2x2 cells, each empty or with one digit, moved by up to one pixel. Digits keep company (3 with 8, 1 with 7,
...: in `company` of the scenes with two or more), so that language alone gives a guess about what else is there. A
short caption names one digit, the most frequent kind in the scene, and is wrong now and then; a listing names all of
them. No text tells where a digit stands or how it is written. Every draw comes from a stream of its own (streams.py).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

from documents.readers import Document, Picture, Text
from streams import stream

SIDE, CELLS = 16, 4
NAMES = tuple("0123456789")
PARTNER = {3: 8, 8: 3, 1: 7, 7: 1, 0: 6, 6: 0, 2: 5, 5: 2, 4: 9, 9: 4}
FREQUENCY = 1 / (2 + np.arange(10))  # digit 0 is named most often; a caption names the most frequent one present
COUNTS = (0.1, 0.2, 0.3, 0.4)  # share of scenes with 1, 2, 3, 4 digits
SHAPES = 12  # principal components that describe the shape of a scan
SPARE = 600  # scans kept for tests
NUMBERS = ("one", "two", "three", "four")
WORDS = (*NAMES, *NUMBERS, *"there is a an and the in image on left digits are yes no . ? ,".split())
LISTED = 0.5  # share of captions that name all digits
QUESTIONS = {"there": 0.5, "left": 0.25, "count": 0.25}  # of instruction tuning: presence, side, number


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


def ask(kind: str, what: int) -> str:
    """The wordings of tiny-POPE and tiny-MMVP; `what` is a digit, or how many there are."""
    return {
        "there": f"Is there a {what} in the image?",
        "left": f"Is the {what} on the left?",
        "count": f"Are there {NUMBERS[what - 1] if kind == 'count' else what} digits in the image?",
    }[kind]


def truth(kind: str, cells: np.ndarray, what: int) -> bool:
    if kind == "left":
        return bool((cells[[0, 2]] == what).any())
    if kind == "count":
        return int((cells >= 0).sum()) == what
    return bool((cells == what).any())


def question(rng: np.random.Generator, cells: np.ndarray, kind: str) -> tuple[str, str]:
    """A random question of a kind about a scene and its answer; half of those about presence ask for what is there,
    half of those about number for the right one."""
    present = sorted({int(d) for d in cells if d >= 0})
    right = rng.random() < 0.5
    if kind == "count":
        count = int((cells >= 0).sum())
        what = count if right else int(rng.choice([n for n in range(1, CELLS + 1) if n != count]))
    else:
        absent = [d for d in range(10) if d not in present]
        what = int(rng.choice(present if right or kind == "left" else absent))
    return ask(kind, what), "yes" if truth(kind, cells, what) else "no"


def questions(rng: np.random.Generator, cells: np.ndarray, kinds: dict[str, float], most: int = 3) -> list[Text]:
    """One to `most` questions about a scene, each followed by its answer; the answers are learned."""
    out = []
    for kind in rng.choice([*kinds], size=1 + rng.integers(most), p=[*kinds.values()]):
        asked, answer = question(rng, cells, str(kind))
        out += [Text(f" {asked}", learn=False), Text(f" {answer}")]
    return out


def speech(rng: np.random.Generator, company: float = 0.8) -> list[Text]:
    """A text without picture for the warm-up of the language model: a description and questions about it. A listing
    holds the answers about presence; after a short caption the company that digits keep is all there is to go by."""
    s = make_cells(rng, company)
    listed = rng.random() < 0.75
    told = listing(s) if listed else caption(min(int(d) for d in s if d >= 0))
    return [Text(told), *questions(rng, s, {"there": 0.9, "left": 0.05, "count": 0.05}, most=4)]


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

    stage 1: picture and caption, short or a listing, in either order with equal chance; a quarter of the documents hold
    two scenes. stage 2: picture and up to three questions with answers; the answers alone are learned."""

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
            return Document((self.pictures[i], *questions(rng, self.scenes.cells[i], QUESTIONS)), f"scene {i}")
        parts: list[Text | Picture] = []
        for _ in range(2 if rng.random() < 0.25 else 1):
            i = int(rng.integers(len(self.scenes)))
            named = self.captioned[i] if rng.random() >= self.noise else int(rng.integers(10))
            told = listing(self.scenes.cells[i]) if rng.random() < LISTED else caption(named)
            pair = [self.pictures[i], Text(told)]
            parts += pair if rng.random() < 0.5 else pair[::-1]
        return Document(tuple(parts), "scenes")


# ----------------------------------------------------------------------------------------------------------- benchmarks


def pairs(seed: int, n: int = 60) -> list[tuple[tuple, tuple]]:
    """tiny-MMVP: n pairs of (scene, question, answer) that differ in one thing, in turn the side of a digit and the
    number of digits."""
    images, labels, _ = scans()
    rng, test, out = stream(seed, "pairs"), pools()[1], []
    for k in range(n):
        a, b = np.zeros((SIDE, SIDE), np.float32), np.zeros((SIDE, SIDE), np.float32)
        if k % 2 == 0:
            i, row, moved = int(rng.choice(test)), 2 * int(rng.integers(2)), rng.integers(-1, 2, size=2)
            paste(a, images[i], row, *moved)
            paste(b, images[i], row + 1, *moved)
            asked = ask("left", int(labels[i]))
        else:
            count, cells = 1 + int(rng.integers(CELLS - 1)), rng.permutation(CELLS)
            for j, scan in enumerate(rng.choice(test, count + 1, replace=False)):
                moved = rng.integers(-1, 2, size=2)
                for canvas in (a, b) if j < count else (b,):
                    paste(canvas, images[scan], cells[j], *moved)
            asked = ask("count", count)
        first, second = (a, asked, "yes"), (b, asked, "no")
        out.append((first, second))
    return out

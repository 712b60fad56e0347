"""Scenes of 2x2 cells, each empty or with a picture of a thing of one of ten kinds; captions tell too little of them.

Things keep company (in `company` of the scenes with two or more), so that language alone gives a guess about what else
is there. A short caption names one thing, the most frequent kind in the scene, and is wrong now and then; a listing
names all of them. No text tells where a thing stands or how it looks. Every draw comes from a stream of its own
(streams.py). What the things are is a World's: digits.py, photos.py.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from PIL import Image

from documents.readers import Document, Picture, Text
from streams import stream

CELLS, KINDS = 4, 10
PARTNER = {3: 8, 8: 3, 1: 7, 7: 1, 0: 6, 6: 0, 2: 5, 5: 2, 4: 9, 9: 4}
FREQUENCY = 1 / (2 + np.arange(KINDS))  # kind 0 is named most often; a caption names the most frequent one present
COUNTS = (0.1, 0.2, 0.3, 0.4)  # share of scenes with 1, 2, 3, 4 things
SHAPES = 12  # principal components that describe how a picture looks
NUMBERS = ("one", "two", "three", "four")
LISTED = 0.5  # share of captions that name all things
QUESTIONS = {"there": 0.5, "left": 0.25, "count": 0.25}  # of instruction tuning: presence, side, number


@dataclass(frozen=True)
class Scenes:
    """images (n, H, W) or (n, H, W, 3), floats in [0, 1]; cells (n, 4): the kind of thing in each cell in row order, -1
    empty; details (n, 4, 2 + SHAPES): how each is moved, in pixels, and how its picture looks; zeros in empty cells."""

    images: np.ndarray
    cells: np.ndarray
    details: np.ndarray

    def __len__(self) -> int:
        return len(self.cells)

    def captioned(self) -> np.ndarray:
        """The kind that a caption names: the lowest, which is the most frequent one."""
        return np.where(self.cells < 0, 99, self.cells).min(1)


def pictures_only(images: np.ndarray) -> Scenes:
    """Pictures of which nothing else is known."""
    n = len(images)
    return Scenes(images, np.full((n, CELLS), -1), np.zeros((n, CELLS, 2 + SHAPES), np.float32))


def in_unit(pictures: np.ndarray) -> np.ndarray:
    """Floats in [0, 1] of uint8 or float pictures."""
    return pictures.astype(np.float32) / 255 if pictures.dtype == np.uint8 else pictures


def looks_of(things: np.ndarray, train: np.ndarray, piece: int = 4096) -> np.ndarray:
    """(N, SHAPES): principal components of the pictures `things`, those of the pictures `train` with variance 1."""
    fit = in_unit(things[train]).reshape(len(train), -1)
    mean = fit.mean(0)
    axes = np.linalg.svd(fit - mean, full_matrices=False)[2][:SHAPES]
    parts = (in_unit(things[i : i + piece]).reshape(-1, len(mean)) - mean for i in range(0, len(things), piece))
    out = np.concatenate([part @ axes.T for part in parts])
    return (out / out[train].std(0)).astype(np.float32)


@dataclass(frozen=True, eq=False)
class World:
    """What scenes are made of: pictures of things, (N, side, side) or (N, side, side, 3), floats in [0, 1] or uint8,
    their kinds (N,) in 0..9, places of those to train and to test with, how they look (N, SHAPES); by how many pixels
    they may be moved in their cell, what an empty cell shows, and whether a thing hides what lies under it."""

    title: str
    variant: str
    noun: str
    names: tuple[str, ...]
    things: np.ndarray
    kinds: np.ndarray
    train: np.ndarray
    test: np.ndarray
    looks: np.ndarray
    moves: int = 0
    blank: float = 0.0
    opaque: bool = False

    # ------------------------------------------------------------------------------------------------------- pictures

    @property
    def cell(self) -> int:
        return self.things.shape[1]

    @property
    def digest(self) -> str:
        """Of the pictures and their kinds."""
        return hashlib.sha256(self.things.tobytes() + self.kinds.tobytes()).hexdigest()[:16]

    def canvas(self, *n: int) -> np.ndarray:
        return np.full((*n, 2 * self.cell, 2 * self.cell, *self.things.shape[3:]), self.blank, np.float32)

    def paste(self, canvas: np.ndarray, thing: int, cell: int, dy: int, dx: int) -> None:
        size, end = self.cell, 2 * self.cell
        y, x = size * (cell // 2) + dy, size * (cell % 2) + dx
        ys, xs = slice(max(y, 0), min(y + size, end)), slice(max(x, 0), min(x + size, end))
        part = in_unit(self.things[thing])[ys.start - y : ys.stop - y, xs.start - x : xs.stop - x]
        canvas[ys, xs] = part if self.opaque else np.maximum(canvas[ys, xs], part)

    def moved(self, rng: np.random.Generator) -> np.ndarray:
        return rng.integers(-self.moves, self.moves + 1, size=2)

    def make(self, n: int, rng: np.random.Generator, pool: np.ndarray, company: float = 0.8) -> Scenes:
        """n scenes of things out of `pool`."""
        of = [pool[self.kinds[pool] == d] for d in range(KINDS)]
        share = FREQUENCY / FREQUENCY.sum()
        out, cells = self.canvas(n), np.full((n, CELLS), -1)
        details = np.zeros((n, CELLS, 2 + SHAPES), np.float32)
        for i in range(n):
            count = 1 + rng.choice(4, p=COUNTS)
            kinds = [int(rng.choice(KINDS, p=share))]
            if count > 1:
                kinds.append(PARTNER[kinds[0]] if rng.random() < company else int(rng.integers(KINDS)))
            kinds += rng.integers(KINDS, size=count - len(kinds)).tolist()
            for cell, d in zip(rng.permutation(CELLS)[:count], kinds, strict=True):
                cells[i, cell] = d
                thing, moved = rng.choice(of[d]), self.moved(rng)
                details[i, cell] = [*moved, *self.looks[thing]]
                self.paste(out[i], thing, cell, *moved)
        return Scenes(out, cells, details)

    def objects(self, made: Scenes) -> list[list[str]]:
        return [[self.names[d] for d in sorted({*c[c >= 0].tolist()})] for c in made.cells]

    # ---------------------------------------------------------------------------------------------------------- texts

    def caption(self, kind: int) -> str:
        return f"there is a {self.names[kind]} ."

    def listing(self, cells) -> str:
        """A complete description: each kind once, in ascending order."""
        return (
            "there is " + " and ".join(f"a {self.names[d]}" for d in sorted({int(d) for d in cells if d >= 0})) + " ."
        )

    def ask(self, question: str, what: int) -> str:
        """The wordings of tiny-POPE and tiny-MMVP; `what` is a kind, or how many there are."""
        if question == "count":
            return f"Are there {NUMBERS[what - 1]} {self.noun} in the image?"
        name = self.names[what]
        return f"Is there a {name} in the image?" if question == "there" else f"Is the {name} on the left?"

    def question(self, rng: np.random.Generator, cells: np.ndarray, kind: str) -> tuple[str, str]:
        """A random question about a scene and its answer; half of those about presence ask for what is there, half of
        those about number for the right one."""
        present = sorted({int(d) for d in cells if d >= 0})
        right = rng.random() < 0.5
        if kind == "count":
            count = int((cells >= 0).sum())
            what = count if right else int(rng.choice([n for n in range(1, CELLS + 1) if n != count]))
        else:
            absent = [d for d in range(KINDS) if d not in present]
            what = int(rng.choice(present if right or kind == "left" else absent))
        return self.ask(kind, what), "yes" if truth(kind, cells, what) else "no"

    def questions(
        self, rng: np.random.Generator, cells: np.ndarray, kinds: dict[str, float], most: int = 3
    ) -> list[Text]:
        """One to `most` questions about a scene, each followed by its answer; the answers are learned."""
        out = []
        for kind in rng.choice([*kinds], size=1 + rng.integers(most), p=[*kinds.values()]):
            asked, answer = self.question(rng, cells, str(kind))
            out += [Text(f" {asked}", learn=False), Text(f" {answer}")]
        return out

    def speech(self, rng: np.random.Generator, company: float = 0.8) -> list[Text]:
        """A text without picture for the warm-up of a language model: a description and questions about it. A listing
        holds the answers about presence; after a short caption the company that things keep is all one can go by."""
        s = make_cells(rng, company)
        listed = rng.random() < 0.75
        told = self.listing(s) if listed else self.caption(min(int(d) for d in s if d >= 0))
        return [Text(told), *self.questions(rng, s, {"there": 0.9, "left": 0.05, "count": 0.05}, most=4)]

    # ----------------------------------------------------------------------------------------------------- benchmarks

    def pairs(self, seed: int, n: int = 60) -> list[tuple[tuple, tuple]]:
        """tiny-MMVP: n pairs of (scene, question, answer) that differ in one thing, in turn the side of a thing and the
        number of things."""
        rng, out = stream(seed, "pairs"), []
        for k in range(n):
            a, b = self.canvas(), self.canvas()
            if k % 2 == 0:
                i, row, moved = int(rng.choice(self.test)), 2 * int(rng.integers(2)), self.moved(rng)
                self.paste(a, i, row, *moved)
                self.paste(b, i, row + 1, *moved)
                asked = self.ask("left", int(self.kinds[i]))
            else:
                count, cells = 1 + int(rng.integers(CELLS - 1)), rng.permutation(CELLS)
                for j, thing in enumerate(rng.choice(self.test, count + 1, replace=False)):
                    moved = self.moved(rng)
                    for canvas in (a, b) if j < count else (b,):
                        self.paste(canvas, thing, cells[j], *moved)
                asked = self.ask("count", count)
            out.append(((a, asked, "yes"), (b, asked, "no")))
        return out


def truth(question: str, cells: np.ndarray, what: int) -> bool:
    if question == "left":
        return bool((cells[[0, 2]] == what).any())
    if question == "count":
        return int((cells >= 0).sum()) == what
    return bool((cells == what).any())


def make_cells(rng: np.random.Generator, company: float) -> np.ndarray:
    cells = np.full(CELLS, -1)
    count = 1 + rng.choice(4, p=COUNTS)
    kinds = [int(rng.choice(KINDS, p=FREQUENCY / FREQUENCY.sum()))]
    if count > 1:
        kinds.append(PARTNER[kinds[0]] if rng.random() < company else int(rng.integers(KINDS)))
    kinds += rng.integers(KINDS, size=count - len(kinds)).tolist()
    cells[rng.permutation(CELLS)[:count]] = kinds
    return cells


# ------------------------------------------------------------------------------------------------------------ documents


def to_picture(image: np.ndarray) -> Picture:
    return Picture(Image.fromarray((image * 255).round().astype(np.uint8)).convert("RGB"))


class SceneReader:
    """Endless documents over fixed training scenes; a function of seed and position alone, like the readers of files.

    stage 1: picture and caption, short or a listing, in either order with equal chance; a quarter of the documents hold
    two scenes. stage 2: picture and up to three questions with answers; the answers alone are learned."""

    def __init__(
        self, world: World, seed: int, stage: int, *, n: int = 6000, company: float = 0.8, noise: float = 0.05,
        rank: int = 0, world_size: int = 1,
    ):  # fmt: skip
        self.world, self.seed, self.stage, self.noise, self.at, self.step = world, seed, stage, noise, rank, world_size
        self.scenes = world.make(n, stream(seed, "scenes"), world.train, company)
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
        self.at += self.step
        if self.stage > 1:
            i = int(rng.integers(len(self.scenes)))
            asked = self.world.questions(rng, self.scenes.cells[i], QUESTIONS)
            return Document((self.pictures[i], *asked), f"scene {i}")
        parts: list[Text | Picture] = []
        for _ in range(2 if rng.random() < 0.25 else 1):
            i = int(rng.integers(len(self.scenes)))
            named = self.captioned[i] if rng.random() >= self.noise else int(rng.integers(KINDS))
            listed = rng.random() < LISTED
            told = self.world.listing(self.scenes.cells[i]) if listed else self.world.caption(named)
            pair = [self.pictures[i], Text(told)]
            parts += pair if rng.random() < 0.5 else pair[::-1]
        return Document(tuple(parts), "scenes")

"""Generated characters in the manner of Omniglot: alphabets of characters, each drawn by many hands. No data needed.

An alphabet has a few strokes of its own; a character joins some of them at fixed places, so characters of one alphabet
look alike. A drawing moves, turns and scales strokes and page, and changes the pen.
"""

import functools

import numpy as np

SPLITS = {"train": range(0, 25), "valid": range(25, 30), "test": range(30, 40)}
CHARACTERS, DRAWINGS, STROKES, POINTS = 20, 20, 6, 14


def _stroke(rng: np.random.Generator) -> np.ndarray:
    """Points [POINTS, 2] of a quadratic curve through the unit square around 0."""
    a, b, c = rng.uniform(-0.5, 0.5, (3, 2))
    t = np.linspace(0, 1, POINTS)[:, None]
    return (1 - t) ** 2 * a + 2 * t * (1 - t) * (2 * b - (a + c) / 2) + t**2 * c


def _turn(points: np.ndarray, angle: float, scale: np.ndarray | float, shift: np.ndarray) -> np.ndarray:
    c, s = np.cos(angle), np.sin(angle)
    return points @ np.array([[c, s], [-s, c]]) * scale + shift


def character(alphabet: int, number: int) -> list[np.ndarray]:
    """The strokes of a character, as its alphabet writes it."""
    rng = np.random.default_rng([7, alphabet])
    vocabulary = [_stroke(rng) for _ in range(STROKES)]
    rng = np.random.default_rng([8, alphabet, number])
    chosen = rng.choice(STROKES, rng.integers(2, 5))
    return [_turn(vocabulary[k], rng.uniform(-0.6, 0.6), 0.75, rng.uniform(-0.22, 0.22, 2)) for k in chosen]


def draw(alphabet: int, number: int, size: int) -> np.ndarray:
    """All drawings of a character, uint8 [DRAWINGS, size, size], white on black."""
    strokes = character(alphabet, number)
    y, x = np.mgrid[0:size, 0:size]
    pixels = ((np.stack([x, y], -1).reshape(-1, 2) + 0.5) / size - 0.5).astype(np.float32)
    length = np.square(pixels).sum(1)
    out = np.zeros((DRAWINGS, size, size), dtype=np.uint8)
    for hand in range(DRAWINGS):
        rng = np.random.default_rng([9, alphabet, number, hand])
        page = rng.uniform(-0.3, 0.3), rng.uniform(0.75, 1.1, 2), rng.uniform(-0.1, 0.1, 2)
        points = [_turn(s, rng.normal(0, 0.12), rng.uniform(0.85, 1.15), rng.normal(0, 0.035, 2)) for s in strokes]
        points = _turn(np.concatenate(points), *page) + rng.normal(0, 0.006, (len(strokes) * POINTS, 2))
        middle = (points[1:] + points[:-1]) / 2  # twice as dense, but no line from one stroke to the next
        middle = np.delete(middle, np.arange(1, len(strokes)) * POINTS - 1, axis=0)
        ink = np.concatenate([points, middle]).astype(np.float32)
        near = (np.square(ink).sum(1) - 2 * (pixels @ ink.T)).min(1) + length  # squared distance to the nearest point
        pen = rng.uniform(0.025, 0.05)
        out[hand] = np.clip(255 * (1.6 - np.sqrt(near.clip(0)) / pen), 0, 255).reshape(size, size)
    return out


@functools.cache
def alphabet(number: int, size: int) -> list[np.ndarray]:
    """The characters of an alphabet, kept: every seed of a process asks for the same. Not to be written to."""
    found = [draw(number, k, size) for k in range(CHARACTERS)]
    for x in found:
        x.flags.writeable = False
    return found

"""The embedded default: glyphs on a weak texture, made to expose the mechanism of PART; no evidence about photographs.

    x = 0.5 + noise + a T_y outside the object's box + contrast glyph_y inside it

The object, a 7x7 drawing of its class at a random place, withstands an adversary of 8/255. The texture T_y, +-1 with a
period of four pixels, does not: its amplitude a ~ U(3, 7)/255 lies below that radius, so at eps everywhere it can be
forged, and at a lower budget in the background a part of it is left. In a quarter of the images the object is missing
and the texture is all there is: a network that trusts the object alone is right on 75 % + 25 %/4 = 81 %.
"""

import numpy as np

CLASSES, SIDE, BOX = 4, 16, 7
GLYPHS = (
    ("#######", "#.....#", "#.....#", "#.....#", "#.....#", "#.....#", "#######"),
    ("...#...", "...#...", "...#...", "#######", "...#...", "...#...", "...#..."),
    ("#.....#", ".#...#.", "..#.#..", "...#...", "..#.#..", ".#...#.", "#.....#"),
    ("#######", ".......", "#######", ".......", ".......", "#######", "......."),
)


def make(
    n_train: int = 1500,
    n_test: int = 1000,
    noise: float = 8 / 255,
    texture: tuple[float, float] = (3 / 255, 7 / 255),
    contrast: float = 127 / 255,
    missing: float = 0.25,
) -> tuple[np.ndarray, ...]:
    """(x_train uint8 [N, 16, 16, 3], y_train [N], x_test, y_test, box_train [N, 2], box_test): the last two hold row
    and column of the object's upper left corner, -1 where it is missing. The same images for every seed of a run."""
    rng = np.random.default_rng(0)
    tile = rng.choice([-1.0, 1.0], (CLASSES, 4, 4, 3))
    pattern = np.tile(tile, (1, SIDE // 4, SIDE // 4, 1))
    glyphs = np.array([[[c == "#" for c in row] for row in g] for g in GLYPHS], dtype=float)

    def split(n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        y = rng.permutation(np.arange(n) % CLASSES)
        x = 0.5 + noise * rng.normal(size=(n, SIDE, SIDE, 3))
        amplitude = rng.uniform(*texture, n)
        place = rng.integers(0, SIDE - BOX + 1, (n, 2))
        gone = rng.random(n) < missing
        for i in range(n):
            weak = amplitude[i] * pattern[y[i]]
            if not gone[i]:
                top, left = place[i]
                weak[top : top + BOX, left : left + BOX] = contrast * glyphs[y[i]][:, :, None]
            x[i] += weak
        place[gone] = -1
        return np.round(255 * x.clip(0, 1)).astype(np.uint8), y, place

    x, y, box = split(n_train)
    x_test, y_test, box_test = split(n_test)
    return x, y, x_test, y_test, box, box_test


def inside(box: np.ndarray) -> np.ndarray:
    """bool [N, 16, 16]: the pixels of the object's box; all False where it is missing."""
    grid = np.arange(SIDE)
    row = (grid >= box[:, :1]) & (grid < box[:, :1] + BOX)
    col = (grid >= box[:, 1:]) & (grid < box[:, 1:] + BOX)
    return row[:, :, None] & col[:, None, :] & (box[:, :1, None] >= 0)

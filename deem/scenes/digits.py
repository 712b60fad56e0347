"""Digit scenes: real 8x8 scans of scikit-learn on a canvas of 16x16, moved by up to one pixel."""

from functools import cache

import numpy as np
from sklearn.datasets import load_digits

from scenes.world import NUMBERS, World, looks_of

NAMES = tuple("0123456789")
WORDS = (*NAMES, *NUMBERS, *"there is a an and the in image on left digits are yes no . ? ,".split())
SPARE = 600  # scans kept for tests


@cache
def digits() -> World:
    d = load_digits()
    things, order = d.images.astype(np.float32) / 16, np.random.default_rng(0).permutation(len(d.target))
    train, test = order[:-SPARE], order[-SPARE:]
    looks = looks_of(things, train)
    return World("digit scenes", "wheel", "digits", NAMES, things, d.target, train, test, looks, moves=1)

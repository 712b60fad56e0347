"""Random streams: what is drawn is a function of the run's seed, a name and a place, and of nothing drawn before."""

import hashlib

import numpy as np


def stream(seed: int, name: str, *more: int) -> np.random.Generator:
    """A generator of its own for each name; no stream sees the draws of another."""
    key = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")
    return np.random.default_rng([seed, key, *more])


def torch_seed(seed: int, name: str, *more: int) -> int:
    """A seed for torch's own generator, of the same streams as numpy's."""
    return int(stream(seed, name, *more).integers(2**62))

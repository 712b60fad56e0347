"""Small models shared by the tests: the digit model, and the real classes at tiny size with random weights."""

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import scenes
import sequences
from model import Deem
from settings import Settings
from views import two_views

torch.set_num_threads(1)
HERE = Path(__file__).resolve().parents[1]


def make(preset="digits", **given):
    """(Deem, Settings) with random weights."""
    s = Settings(preset=preset, dataset="digits" if preset in ("digits", "tiny") else "files", files=("x",), **given)
    if s.stage == 3:
        s.dataset = "files"
    s.check()
    s.resolve()
    torch.manual_seed(0)
    return Deem(s.parts(), diffusion=s.stage < 3, loss=s.loss()), s


def batch_of(model, documents, masks=None, flip="none"):
    """A Batch of documents (lists of parts), one a row, with both views."""
    rows = [sequences.encode(d, model.tok, model.p.per_image) for d in documents]
    b, pictures = sequences.collate(rows, model.tok)
    sizes = (model.p.resolution, model.p.decoder_resolution)
    made = [two_views(p.load(), sizes, crop=True, flip=flip, rng=random.Random(i)) for i, p in enumerate(pictures)]
    if made:
        b.images, b.targets = (torch.stack(x) for x in zip(*made, strict=True))
    b.masks = masks
    return b


def documents(n, stage=1, seed=0):
    reader = scenes.SceneReader(seed, stage, n=50)
    return [list(next(reader).parts) for _ in range(n)]


def run(*words, cwd=HERE, env=None, timeout=300):
    """A command of the folder in a process of its own; -> CompletedProcess."""
    settings = {**os.environ, "OMP_NUM_THREADS": "1", **(env or {})}
    settings.pop("REPRO_DATA", None) if env is None else None
    words = [sys.executable, *map(str, words)]
    return subprocess.run(words, cwd=cwd, env=settings, capture_output=True, text=True, timeout=timeout)


@pytest.fixture()
def digits():
    return make("digits")


@pytest.fixture()
def tiny():
    return make("tiny")

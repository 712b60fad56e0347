"""Small models shared by the tests: the digit model, and the real classes at tiny size with random weights."""

import contextlib
import gc
import importlib
import io
import random
import sys
from pathlib import Path
from types import SimpleNamespace

from lab import runs

import pytest
import torch

from documents import sequences
from model import Deem
from scenes import study
from scenes.digits import digits
from scenes.world import SceneReader
from settings import Settings
from vision.views import two_views

torch.set_num_threads(1)
WORLD = digits()
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
    reader = SceneReader(WORLD, seed, stage, n=50)
    return [list(next(reader).parts) for _ in range(n)]


def run(script, *words):
    """A command of the folder, in this process: a start of Python costs seconds. -> returncode, stdout, stderr."""
    gc.collect()  # an exception that is kept may still hold the run before, and with it the lock of its folder
    out, err, code = io.StringIO(), io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [script, *map(str, words)])
        patch.delenv("REPRO_DATA", raising=False)
        patch.chdir(HERE)
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                runs.command(importlib.import_module(script.removesuffix(".py")).main)
            except SystemExit as stop:
                code = stop.code or 0
    return SimpleNamespace(returncode=code, stdout=out.getvalue(), stderr=err.getvalue())


@pytest.fixture(scope="module")
def quick_study():
    """Fewer scenes and timesteps in what is measured at the end of a run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study, "PROBE", (150, 50))
        patch.setattr(study, "TIMES", (300, 700))
        patch.setattr(study, "LOOKS", 60)
        patch.setattr(study, "DENOISED", 40)
        patch.setattr(study, "DRAWN", (3, 4))
        yield


@pytest.fixture()
def digits():
    return make("digits")


@pytest.fixture()
def tiny():
    return make("tiny")

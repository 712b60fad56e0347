"""Settings to a pipeline: the method, its segmenter and its trackers."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from lab import runs
from lab.runs import UserError

import numpy as np
import torch

from methods import METHODS
from prompts import Interaction
from segmenters.grabcut import GrabCut
from segmenters.interface import FILES, NAMES, Segmenter
from session import Session
from settings import Pipeline
from trackers import boxes, points


def find_weights(s: Pipeline, folder: str) -> None:
    """Weights are looked for as given, then below the data folder."""
    for key in ("weights", "tracker_weights"):
        given = getattr(s, key)
        if given and not Path(given).expanduser().is_file():
            below = runs.data_dir(folder) / given
            if below.is_file():
                setattr(s, key, str(below))


def build(s: Pipeline):
    """(method, segmenter, point tracker, maker of box trackers)."""
    m = METHODS[s.method]
    changed = {k: getattr(s, k) for k in ("positives", "negatives", "refine") if getattr(s, k) >= 0}
    if s.selection:
        changed["selection"] = s.selection
    if m.memory is not None:
        alpha = {} if m.memory.alpha == 0 else {"alpha": s.alpha}  # a method without the appearance stays without
        changed["memory"] = replace(m.memory, tau=s.tau, top=s.top, near=s.near, far=s.far, beta=s.beta, **alpha)
    device = runs.device(s.device)
    torch.backends.cuda.matmul.allow_tf32 = True
    cut = segmenter(s.segmenter, s.weights, device, side=s.side)
    tracker = points.point_tracker(s.tracker, s.tracker_weights, s.tracker_repo, device)
    return replace(m, **changed), cut, tracker, lambda: boxes.box_tracker(s.box_tracker)


def segment(frames: Sequence[np.ndarray], mask: np.ndarray, **options) -> list[np.ndarray]:
    """Label maps (H, W) uint8 of all frames (uint8 RGB, (H, W, 3)) from the mask of the first, boolean or of object ids
    1 to 254; `options` are fields of settings.Pipeline: segmenter="vit_b", weights="sam_vit_b_01ec64.pth"."""
    s = Pipeline(**options)
    s.check_pipeline()
    ids = tuple(int(o) for o in np.unique(mask) if o not in (0, 255))
    if not ids or any(f.shape != frames[0].shape for f in frames) or np.shape(mask) != frames[0].shape[:2]:
        raise ValueError("frames of one size (H, W, 3) and a mask (H, W) with an object are asked for")
    method, cut, tracker, box_tracker = build(s)
    session = Session(frames, ids, cut, tracker, box_tracker, method)
    session.interact(0, {o: Interaction(mask=np.asarray(mask) == o) for o in ids})
    return session.labels()


def segmenter(name: str, weights: str, device: torch.device, size: int = 0, side: int = 144) -> Segmenter:
    """The segmenter of a name. `weights`: file of the published checkpoint, or of a run of train.py for `tiny`;
    `random` leaves the initial weights (tests)."""
    if name not in NAMES:
        raise UserError(f"--segmenter {name}: use one of {', '.join(NAMES)}")
    if name == "grabcut":
        if weights:
            raise UserError("--segmenter grabcut takes no --weights")
        return GrabCut(side, device=device)
    if not weights:
        raise UserError(f"--segmenter {name} needs --weights: {FILES[name]}; without weights use --segmenter grabcut")
    from segmenters.sam import Sam, SamSegmenter, load  # here: segment-anything brings torchvision, which takes seconds

    sam = Sam(name, size)
    if weights != "random":
        load(sam, name, Path(weights).expanduser())
    return SamSegmenter(sam, device)

"""What of the pipeline is used: the ladder of the ablation and the baselines, by name."""

from dataclasses import dataclass

import crstm
from trackers.filter import FilterOptions


@dataclass(frozen=True)
class Method:
    """What of the pipeline is used. The ladder is METHODS below."""

    points: bool = True
    box: bool = True
    filter: FilterOptions | None = FilterOptions()
    """None: only what is invisible or at the border goes, as in SAM-PT."""
    memory: crstm.Options | None = crstm.Options()
    propagate: bool = True
    """False: masks of interacted frames are copied to the frames nearest to them."""
    selection: str = "kmedoids"
    positives: int = 16
    negatives: int = 1
    refine: int = 0
    """Further decoder passes with the box of the mask and its logits."""
    gate: float = 0.0
    """Masks of propagated frames with a lower predicted IoU are emptied (SAM-PT: 0.7)."""
    limits: str = "nearest"
    """How far a round reaches: nearest (to the middle between interacted frames, ties to the later round), blend (to
    the neighbouring interacted frame, mixed linearly), all (whole video)."""
    keep: float = 0.1
    """A propagated frame keeps the mask of an earlier round when the new one's predicted IoU is lower by more than
    this;
    1: the newer always wins."""
    few: int = 4
    """Points are sampled anew from the last mask when fewer positive ones are left; 0: never."""
    patience: int = 4
    """Frames for which new points are kept at least."""
    shuffled: bool = False
    """Control: every frame is stored under the key of another one, drawn at random."""
    horizon: int = 0
    """Frames after which points are sampled anew from a predicted mask; 0: never."""
    variant: str = "B"
    """Which mask: A last of the horizon, B median area, C area nearest to the first, D as C, one frame for all
    objects."""


PLAIN = FilterOptions(back=0, box=-1, motion=0)
METHODS = {
    "copy": Method(points=False, box=False, memory=None, propagate=False),
    "points": Method(box=False, filter=None, memory=None, few=0),
    "box": Method(points=False, memory=None),
    "points+box": Method(memory=None),
    "newest": Method(memory=crstm.Options(rounds=1)),
    "full": Method(),
    "memory": Method(points=False, box=False),
    "shuffled": Method(shuffled=True),
    "readout": Method(memory=crstm.Options(alpha=0.0)),
    "points+filter": Method(box=False, filter=FilterOptions(box=-1), memory=None),
    "points+memory": Method(box=False, filter=None),
    "reinit": Method(horizon=24),
    "blend": Method(limits="blend"),
    "all": Method(limits="all"),
    "sam-pt": Method(box=False, filter=None, memory=None, few=0, refine=12, gate=0.7),
    "sam-pt-reinit": Method(box=False, filter=None, memory=None, few=0, refine=12, gate=0.7, horizon=24),
}

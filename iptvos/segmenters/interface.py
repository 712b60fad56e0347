"""What every segmenter offers: a picture is encoded once, then prompts of any object decode to low-resolution logits.

All speak of a square of `cells` x `cells` embedding cells (4 x 4 low-resolution logits each) that holds the picture at
its top left, the long side filling it.
"""

import math
from dataclasses import dataclass
from typing import Protocol

import cv2
import numpy as np
import torch
from torch import Tensor

from prompts import Prompt

NAMES = ("grabcut", "tiny", "mobile", "vit_b", "vit_l", "vit_h", "hq_vit_b", "hq_vit_l", "hq_vit_h", "hq_tiny")
FILES = {
    "mobile": "mobile_sam.pt (github.com/ChaoningZhang/MobileSAM, weights/)",
    **{"vit_b": "sam_vit_b_01ec64.pth (github.com/facebookresearch/segment-anything)"},
    **{"vit_l": "sam_vit_l_0b3195.pth (github.com/facebookresearch/segment-anything)"},
    **{"vit_h": "sam_vit_h_4b8939.pth (github.com/facebookresearch/segment-anything)"},
    **{f"hq_{k}": f"sam_hq_{k}.pth (github.com/SysCV/sam-hq)" for k in ("vit_b", "vit_l", "vit_h", "tiny")},
    "tiny": "model.safetensors of a run of train.py",
}


@dataclass(frozen=True)
class Geometry:
    """Where a picture of height x width lies on the square of cells."""

    height: int
    width: int
    cells: int

    @property
    def scale(self) -> float:
        """Cells a pixel."""
        return self.cells / max(self.height, self.width)

    @property
    def valid(self) -> tuple[int, int]:
        """Rows and columns of cells that hold some of the picture."""
        return math.ceil(self.height * self.scale - 1e-6), math.ceil(self.width * self.scale - 1e-6)

    def full(self, low: Tensor) -> np.ndarray:
        """Low-resolution logits (4 cells, 4 cells) -> float32 logits (height, width), bilinear."""
        s = 4 * self.scale
        m = np.array([[s, 0, s / 2 - 0.5], [0, s, s / 2 - 0.5]], np.float32)
        flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
        image = low.float().cpu().numpy()
        return cv2.warpAffine(image, m, (self.width, self.height), flags=flags, borderMode=cv2.BORDER_REPLICATE)

    def low(self, logits: np.ndarray, outside: float = -8.0) -> Tensor:
        """Logits (height, width) -> (4 cells, 4 cells), averaged; padding gets `outside`."""
        side, s = 4 * self.cells, 4 * self.scale
        h, w = max(1, round(self.height * s)), max(1, round(self.width * s))
        small = cv2.resize(
            logits.astype(np.float32), (w, h), interpolation=cv2.INTER_AREA if s < 1 else cv2.INTER_LINEAR
        )
        out = np.full((side, side), outside, np.float32)
        out[:h, :w] = small[:side, :side]
        return torch.from_numpy(out)


@dataclass
class Embedding:
    """An encoded picture: `key` (C, h, w) with columns of length 1, only cells of the picture; the rest is the
    segmenter's own."""

    geometry: Geometry
    key: Tensor
    data: object


Decoded = tuple[Tensor, float]  # low-resolution logits (4 cells, 4 cells), predicted IoU


class Segmenter(Protocol):
    """What a session needs; GrabCut is in grabcut.py, the SAM family in sam.py."""

    cells: int
    mask_threshold: float
    device: torch.device

    def encode(self, frame: np.ndarray) -> Embedding: ...

    def decode(self, e: Embedding, prompts: list[Prompt]) -> list[Decoded]:
        """All prompts of one picture together, in their order."""

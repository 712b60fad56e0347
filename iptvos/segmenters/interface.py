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
import torch.nn.functional as F
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
        return resample(low.float().cpu().numpy(), 1 / (4 * self.scale), 1.0, (self.height, self.width))

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
    """An encoded picture: features (C, h, w) for the memory, made when it first asks for them; the rest is the
    segmenter's own."""

    geometry: Geometry
    data: object
    features: Tensor | None = None
    cell: float = 0.0
    """Pixels of the frame a cell of the features."""
    scene: object | None = None
    """What a segmenter without weights has made of the frame for clicks and boxes."""


def share(mask: np.ndarray, cell: float, shape: tuple[int, int]) -> Tensor:
    """The share of a mask (H, W), boolean or probabilities, in each of (h, w) cells of `cell` pixels."""
    h, w = mask.shape
    size = max(1, round(w * 4 / cell)), max(1, round(h * 4 / cell))
    small = cv2.resize(mask.astype(np.float32), size, interpolation=cv2.INTER_AREA if cell > 4 else cv2.INTER_LINEAR)
    out = np.zeros((4 * shape[0], 4 * shape[1]), np.float32)
    small = small[: len(out), : out.shape[1]]
    out[: small.shape[0], : small.shape[1]] = small
    return F.avg_pool2d(torch.from_numpy(out)[None, None], 4)[0, 0]


def resample(values: np.ndarray, cell: float, new: float, shape: tuple[int, int]) -> np.ndarray:
    """Values on a grid of cells of `cell` pixels, bilinear, on a grid (h, w) of cells of `new` pixels."""
    s = new / cell
    m = np.array([[s, 0, s / 2 - 0.5], [0, s, s / 2 - 0.5]], np.float32)
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    return cv2.warpAffine(values.astype(np.float32), m, shape[::-1], flags=flags, borderMode=cv2.BORDER_REPLICATE)


def merge(p: np.ndarray, objects: tuple[int, ...]) -> np.ndarray:
    """Probabilities (objects, H, W) -> labels: background is the product of (1 - p); all are clamped, turned into
    odds and normalised, so the largest odds win."""
    both = np.concatenate([np.prod(1 - p, 0, keepdims=True), p]).clip(1e-7, 1 - 1e-7)
    return np.array([0, *objects], np.uint8)[np.argmax(both, 0)]


Decoded = tuple[Tensor, float]  # low-resolution logits (4 cells, 4 cells), predicted IoU


class Segmenter(Protocol):
    """What a session needs; GrabCut is in grabcut.py, the SAM family in sam.py."""

    cells: int
    mask_threshold: float
    device: torch.device
    memory_is_mask: bool
    """Whether the memory's answer is the mask of a frame; else it is a dense prompt."""

    def encode(self, frame: np.ndarray) -> Embedding: ...

    def features(self, e: Embedding) -> Tensor:
        """(C, h, w) for the memory, on cells of `e.cell` pixels."""

    def decode(self, e: Embedding, prompts: list[Prompt]) -> list[Decoded]:
        """All prompts of one picture together, in their order."""

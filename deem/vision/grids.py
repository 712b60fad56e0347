"""Tables of positions and region masks on grids of any size."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def sincos_1d(width: int, positions: Tensor) -> Tensor:
    """(n,) -> (n, width): sines of positions times 10000^(-2i/width), then their cosines."""
    rates = 10000 ** (-torch.arange(width // 2, dtype=torch.float64) / (width / 2))
    angles = positions.double()[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], 1).float()


def sincos_2d(width: int, size: int) -> Tensor:
    """(size^2, width) of a square grid in row order: half of the width for the column, half for the row."""
    grid = torch.arange(size)
    x, y = grid.repeat(size), grid.repeat_interleave(size)
    return torch.cat([sincos_1d(width // 2, x), sincos_1d(width // 2, y)], 1)


def resized(table: Tensor, height: int, width: int) -> Tensor:
    """A table (n^2, C) of a square grid on another grid, bicubic: (height * width, C)."""
    n = math.isqrt(len(table))
    if (height, width) == (n, n):
        return table
    image = table.T.reshape(1, -1, n, n)
    return F.interpolate(image, (height, width), mode="bicubic", align_corners=False).flatten(2)[0].T


def binary_mask(masks: Tensor, size: tuple[int, int]) -> Tensor:
    """Region masks (B, H, W) on a map: resized bilinearly, then > 0; (B, 1, *size) float."""
    small = F.interpolate(masks[:, None].float(), size, mode="bilinear", align_corners=False)
    return (small > 0).float()

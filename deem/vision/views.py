"""Pictures to tensors: the encoder's and the decoder's view of one picture, with one decision about mirroring."""

import random
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

Flip = Literal["none", "shared", "independent"]


def to_tensor(image: Image.Image, size: int) -> Tensor:
    """PIL -> (3, size, size) in [0, 1], resized to a square (bicubic), as in stages II and III and in evaluation."""
    if image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(image, dtype=np.float32)).permute(2, 0, 1) / 255


def centre_crop(image: Image.Image, size: int) -> Image.Image:
    """The shorter side becomes `size`, then the middle square. As released: a picture whose shorter side is at least
    twice as long is halved first (means of 2 x 2 pixels), as often as that is so; the rest is one bicubic step."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    w, h = image.size
    if min(w, h) != size:
        scale = size / min(w, h)
        image = image.resize((max(size, round(w * scale)), max(size, round(h * scale))), Image.Resampling.BICUBIC)
    w, h = image.size
    left, top = (w - size) // 2, (h - size) // 2
    return image.crop((left, top, left + size, top + size))


def two_views(
    image: Image.Image, sizes: tuple[int, int], *, crop: bool, flip: Flip, rng: random.Random
) -> tuple[Tensor, Tensor]:
    """(encoder's view, decoder's view), (3, R, R) in [0, 1]. `shared`: both are mirrored or none, with equal chance;
    `independent`: each by its own toss, as in the released code."""
    first, second = rng.random() < 0.5, rng.random() < 0.5
    turned = {"none": (False, False), "shared": (first, first), "independent": (first, second)}[flip]
    out = []
    for size, mirror in zip(sizes, turned, strict=True):
        view = to_tensor(centre_crop(image, size) if crop else image, size)
        out.append(view.flip(2) if mirror else view)
    return out[0], out[1]

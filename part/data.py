"""Data sets as uint8 images [N, H, W, C] on the device, and batches of them cropped and flipped where they lie.

What a batch depends on is drawn for the whole batch. The order comes from (seed, epoch) alone, crops and flips from a
generator of their own, so all arms of a run see the same images.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from lab.runs import UserError, sent

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import generated
import glyphs
import readers
from readers import Kind

# Title, number of classes, padding of the random crop, mirror. SVHN is not augmented (released code); Tiny-ImageNet's
# augmentation is not known: the same proportion as CIFAR-10's, our choice.
KINDS: dict[str, Kind] = {
    "glyphs": Kind("Glyphs on texture", glyphs.CLASSES, (), ()),
    "patches": Kind("Photo patches", 10, (), ()),
    "digits": Kind("8x8 digits", 10, (), ()),
    "mnist": Kind("MNIST", 10, (), ()),
    "cifar10": Kind("CIFAR-10", 10, (), (), 4, True),
    "svhn": Kind("SVHN", 10, (), ()),
    "tiny-imagenet": Kind("Tiny-ImageNet", 200, (), (), 8, True),
}
WHEEL = ("glyphs", "patches", "digits")

# The 15 corruptions of the benchmark's mean; the archive holds four more.
CORRUPTIONS = (
    *("gaussian_noise", "shot_noise", "impulse_noise", "defocus_blur", "glass_blur", "motion_blur", "zoom_blur"),
    *("snow", "frost", "fog", "brightness", "contrast", "elastic_transform", "pixelate", "jpeg_compression"),
)


def balanced(y: Tensor, limit: int) -> Tensor:
    """Indices of `limit` of the labels y [N], always the same: of a fixed random order the first of each class, as many
    of each as of any other (one more or less where that does not come out even, all of a class that has fewer)."""
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    turn = torch.empty_like(order)  # the how-manieth of its class an image of this order is
    for k in y.unique():
        mine = (y[order] == k).nonzero().squeeze(1)
        turn[mine] = torch.arange(len(mine))
    return order[turn.argsort(stable=True)[:limit].sort().values]


@dataclass
class Images:
    """A split: x uint8 [N, H, W, C], y int64 [N]; inside bool [N, H, W] are the object's pixels where they are
    known."""

    x: Tensor
    y: Tensor
    inside: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.bool))

    def __len__(self) -> int:
        return len(self.y)

    def to(self, device: torch.device) -> "Images":
        return Images(self.x.to(device), self.y.to(device), self.inside.to(device))

    def subset(self, limit: int) -> "Images":
        """A fixed random subset of `limit` images, class-balanced (0: all)."""
        if not limit:
            return self
        keep = balanced(self.y, limit)
        return Images(self.x[keep], self.y[keep], self.inside[keep] if len(self.inside) else self.inside)


@dataclass
class Data:
    """A data set with its provenance."""

    name: str
    kind: Kind
    variant: str
    sha256: str
    train: Images
    test: Images

    @property
    def channels(self) -> int:
        return self.train.x.shape[3]

    @property
    def size(self) -> tuple[int, int]:
        return tuple(self.train.x.shape[1:3])

    def about(self) -> dict:
        """The `data` part of a record."""
        n = {"n": len(self.train), "n_test": len(self.test)}
        return {"name": self.kind.title, "variant": self.variant, "sha256": self.sha256, **n}


def load(name: str, folder: Path, download: bool = False, train_limit: int = 0) -> Data:
    """Read a data set; `train_limit` keeps a fixed, class-balanced subset of the training images (0: all)."""
    box = ()
    if name == "glyphs":
        *parts, a, b = glyphs.make()
        box, variant = (glyphs.inside(a), glyphs.inside(b)), "generated"
    elif name in WHEEL:
        parts, variant = generated.make(name, 1.0), "wheel"
    else:
        parts, variant = readers.READERS[name](folder, download)
    x, y, x_test, y_test = map(torch.as_tensor, parts)
    inside = [torch.from_numpy(b) for b in box] or [torch.empty(0, dtype=torch.bool)] * 2
    train, test = Images(x, y.long(), inside[0]), Images(x_test, y_test.long(), inside[1])
    digest, kind = hashlib.sha256(), KINDS[name]
    for part in (train, test):
        if not len(part) or int(part.y.min()) < 0 or int(part.y.max()) >= kind.classes:
            raise UserError(f"{kind.title} has no images, or labels outside 0 to {kind.classes - 1}; fetch it again")
        digest.update(part.x.contiguous().numpy().tobytes() + part.y.numpy().tobytes())
    if len(train.y.unique()) < 2:
        raise UserError(f"{kind.title} has training images of a single class; nothing can be learned from it")
    if train_limit > len(train):
        raise UserError(f"--train-limit {train_limit} is more than {name} has ({len(train)})")
    return Data(name, kind, variant, digest.hexdigest(), train.subset(train_limit), test)


def corrupted(folder: Path, name: str, severity: int) -> tuple[Tensor, Tensor]:
    """(x uint8 [10000, 32, 32, 3], y [10000]) of CIFAR-10-C: corruption `name` at a severity from 1 to 5."""
    root = folder / "CIFAR-10-C"
    path, labels = root / f"{name}.npy", root / "labels.npy"
    for p in (path, labels):
        if not p.is_file():
            raise UserError(
                f"CIFAR-10-C is not complete: no {p}; expected CIFAR-10-C/<corruption>.npy and labels.npy (Zenodo "
                "record 2535967, CIFAR-10-C.tar) below --data-dir or $REPRO_DATA"
            )
    try:
        x, y = np.load(path, mmap_mode="r", allow_pickle=False), np.load(labels, allow_pickle=False)
        if x.ndim != 4 or x.shape[1:] != (32, 32, 3) or x.dtype != np.uint8 or len(x) != len(y) or len(x) % 5:
            raise ValueError(f"images {x.dtype} {x.shape}, labels {y.shape}")
        n = len(x) // 5
        part = slice((severity - 1) * n, severity * n)
        x, y = torch.from_numpy(np.array(x[part])), torch.from_numpy(y[part].astype(np.int64))
    except (ValueError, EOFError, OSError) as error:
        raise UserError(f"{path} or its labels are damaged ({error}); fetch CIFAR-10-C again") from None
    return x, y


# ------------------------------------------------------------------------------------------------------------- batches


def share(total: int, rank: int, world: int) -> slice:
    """The rows of a batch of `total` images that belong to process `rank` of `world`."""
    return slice(total * rank // world, total * (rank + 1) // world)


def crop_and_flip(x: Tensor, pad: int, flip: bool, generator: torch.Generator) -> Tensor:
    """Random crop of the zero-padded images and random mirror, x uint8 [B, H, W, C] at once."""
    if not pad and not flip:
        return x
    n, h, w, _ = x.shape
    draw = torch.rand(3, n, generator=generator, device=x.device)
    top, left = (draw[:2] * (2 * pad + 1)).long()
    rows = top[:, None] + torch.arange(h, device=x.device)
    cols = left[:, None] + torch.arange(w, device=x.device)
    if flip:
        cols = torch.where(draw[2, :, None] < 0.5, cols.flip(1), cols)
    source = F.pad(x, (0, 0, pad, pad, pad, pad)) if pad else x
    each = torch.arange(n, device=x.device)[:, None, None]
    return source[each, rows[:, :, None], cols[:, None, :]]


def to_input(x: Tensor) -> Tensor:
    """uint8 [B, H, W, C] -> float32 [B, C, H, W] in [0, 1], channels_last in memory without a copy."""
    return x.float().div_(255.0).permute(0, 3, 1, 2)


class Batches:
    """Batches of a split on a device: all of one epoch in a random order, or all in order."""

    def __init__(self, part: Images, kind: Kind, batch: int, device: torch.device):
        self.part, self.kind, self.batch, self.device = part.to(device), kind, batch, device
        self._kept: tuple[int, tuple[Tensor, ...]] = (-1, ())  # the order that `one` asked for last

    def __len__(self) -> int:
        return -(-len(self.part) // self.batch)

    def epoch(self, key: int, start: int, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        """(x [b, C, H, W], y [b]) augmented, in the order of `key`, from batch `start` on; the last may be smaller."""
        for p in self._order(key)[start:]:
            x = crop_and_flip(self.part.x[p], self.kind.pad, self.kind.flip, generator)
            yield to_input(x), self.part.y[p]

    def one(self, key: int, number: int, generator: torch.Generator) -> Tensor:
        """The images of one batch of that epoch."""
        if self._kept[0] != key:
            self._kept = key, self._order(key)
        return to_input(crop_and_flip(self.part.x[self._kept[1][number]], self.kind.pad, self.kind.flip, generator))

    def _order(self, key: int) -> tuple[Tensor, ...]:
        order = torch.randperm(len(self.part), generator=torch.Generator().manual_seed(key))
        return sent(order, self.device).split(self.batch)

    def in_order(self, index: Tensor | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of the samples `index` (None: all), not augmented."""
        index = torch.arange(len(self.part)) if index is None else index
        for p in index.to(self.device).split(self.batch):
            yield to_input(self.part.x[p]), self.part.y[p]

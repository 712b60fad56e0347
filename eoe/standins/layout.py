"""Drawn pictures in the layout of real data, so that the commands of scale real run where none is: they mean nothing.

python -m standins.layout --out runs/smoke/data
"""

import io
import tarfile
from dataclasses import dataclass
from pathlib import Path

from lab import runs

import numpy as np
from PIL import Image

from real.sets import CIFAR
from standins import drawn

WORDS = 60  # nouns of each kind: together as many as the longest list needs


@dataclass
class LayoutSettings:
    out: str = "runs/smoke/data"
    """Data folder to write: CIFAR-10's name and layout, nouns, and a folder `pictures`."""
    per_class: int = 4
    """Pictures of each class."""


def write(out: Path, per_class: int) -> None:
    """cifar10/cifar10-jpeg.tar.xz, eoe/neglabel_wordnet/noun.*.txt and pictures/*.png below `out`."""
    names = [drawn.concepts()[k] for k in range(len(CIFAR)) for _ in range(per_class)]
    found = drawn.draw(names, 0).permute(0, 2, 3, 1).numpy().astype(np.uint8)
    for place in ("cifar10", "eoe/neglabel_wordnet", "pictures"):
        (out / place).mkdir(parents=True, exist_ok=True)
    with tarfile.open(out / "cifar10" / "cifar10-jpeg.tar.xz", "w:xz") as archive:
        for i, pixels in enumerate(found):
            file = io.BytesIO()
            Image.fromarray(pixels).save(file, "JPEG")
            member = tarfile.TarInfo(f"test/{CIFAR[i // per_class]}/{i:04d}.jpg")
            member.size = len(file.getvalue())
            archive.addfile(member, io.BytesIO(file.getvalue()))
    for kind in ("artifact", "body", "object", "plant"):
        lines = "".join(f"{kind} {i}\n" for i in range(WORDS))
        (out / "eoe" / "neglabel_wordnet" / f"noun.{kind}.txt").write_text(lines)
    for i, pixels in enumerate(found[::per_class]):
        Image.fromarray(pixels).save(out / "pictures" / f"{i}.png")


def main() -> None:
    s = runs.parse(LayoutSettings, __doc__)
    if s.per_class < 1:
        raise runs.UserError(f"--per-class must be at least 1, not {s.per_class}")
    write(Path(s.out), s.per_class)
    print(f"{s.out}: drawn pictures in the layout of CIFAR-10, nouns that are none")


if __name__ == "__main__":
    runs.command(main)

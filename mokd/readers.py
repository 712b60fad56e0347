"""Where the images of the 13 paper domains lie on disk, and how their archives are read.

Every reader returns the images of the asked classes in the asked order: arrays, files, or (file, place in it). Looked
for in this order: Meta-Dataset's TFRecords, its h5 export, folders <name>/<class>/<image>, the publisher's own layout.
"""

import gzip
import io
import json
import lzma
import pickle
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

from lab.runs import UserError

import numpy as np
from PIL import Image, UnidentifiedImageError

import sets

IMAGES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".webp")
RECORDS, H5 = "meta-dataset-records", "meta-dataset-h5"
# Publisher's layout below --data-dir, and who publishes it.
PLACES = {
    "ilsvrc_2012": ("ILSVRC2012/train/<wnid>/*.JPEG", "image-net.org (registration)"),
    "omniglot": (
        "omniglot/images_{background,evaluation}.zip or the folders in them",
        "github.com/brendenlake/omniglot",
    ),
    "aircraft": ("fgvc-aircraft-2013b/data", "robots.ox.ac.uk/~vgg/data/fgvc-aircraft"),
    "cu_birds": ("CUB_200_2011/images/<class>/*.jpg", "data.caltech.edu (CUB-200-2011)"),
    "dtd": ("dtd/images/<class>/*.jpg", "robots.ox.ac.uk/~vgg/data/dtd"),
    "quickdraw": ("quickdraw/<class>.npy", "console.cloud.google.com/storage quickdraw_dataset/full/numpy_bitmap"),
    "fungi": ("fungi/{train,val}.json and fungi/images", "github.com/visipedia/fgvcx_fungi_comp"),
    "vgg_flower": ("flowers-102/{jpg,imagelabels.mat}", "robots.ox.ac.uk/~vgg/data/flowers/102"),
    "traffic_sign": ("gtsrb/GTSRB/Training/<number>/*.ppm", "benchmark.ini.rub.de (training archive)"),
    "mscoco": ("coco/{train2017,annotations/instances_train2017.json}", "cocodataset.org"),
    "mnist": ("mnist/t10k-{images-idx3,labels-idx1}-ubyte.gz", "yann.lecun.com/exdb/mnist"),
    "cifar10": ("cifar10/cifar-10-batches-py or cifar10/cifar10-jpeg.tar.xz", "cs.toronto.edu/~kriz/cifar.html"),
    "cifar100": ("cifar100/cifar-100-python", "cs.toronto.edu/~kriz/cifar.html"),
}


def missing(name: str, folder: Path) -> UserError:
    place, origin = PLACES[name]
    return UserError(
        f"{sets.TITLES[name]} is not in {folder}: expected {place} ({origin}), or folders {name}/<class>/, or an "
        f"export of Meta-Dataset in {RECORDS}/{name} or {H5}/{name}; give the folder by --data-dir or $REPRO_DATA"
    )


def damaged(what: object, error: Exception) -> UserError:
    return UserError(f"{what} is damaged ({error}); fetch it again")


def pictures(folder: Path) -> list[Path]:
    """Image files of a folder, sorted by name."""
    return sorted(p for p in folder.iterdir() if p.suffix.lower() in IMAGES) if folder.is_dir() else []


def find(name: str, split: str, names: list[str], folder: Path) -> list[Sequence]:
    """Images of each class in `names`."""
    first = sets.first_id(name, split)
    if (folder / RECORDS / name).is_dir():
        return [records(folder / RECORDS / name / f"{first + i}.tfrecords") for i in range(len(names))]
    if (folder / H5 / name).is_dir():
        return [h5(folder / H5 / name / f"{first + i}.h5") for i in range(len(names))]
    if any((folder / name / n).is_dir() for n in names):
        return [pictures(folder / name / n) for n in names]
    found = OWN[name](folder, names)
    if found is None:
        raise missing(name, folder)
    return found


# ------------------------------------------------------------------------------------------ exports of Meta-Dataset


def records(path: Path) -> list[tuple[str, int]]:
    """(file, offset) of each record of a TFRecord file: length in 8 bytes, its checksum, the message, its checksum."""
    if not path.is_file():
        raise UserError(f"{path} is missing; the export needs a file for each class")
    out, size = [], path.stat().st_size
    with open(path, "rb") as file:
        while (at := file.tell()) < size:
            head = file.read(8)
            length = struct.unpack("<Q", head)[0] if len(head) == 8 else size
            if at + length + 16 > size:
                raise UserError(f"{path} is cut off in the record at byte {at}; fetch it again")
            out.append((str(path), at))
            file.seek(at + length + 16)
    return out


def record_image(path: str, offset: int) -> io.BytesIO:
    """The encoded picture of a record (feature `image` of a tf.train.Example)."""
    from google.protobuf.message import DecodeError
    from tfrecord import example_pb2

    with open(path, "rb") as file:
        file.seek(offset)
        length = struct.unpack("<Q", file.read(8))[0]
        file.seek(offset + 12)
        message = example_pb2.Example()
        try:
            message.ParseFromString(file.read(length))
        except DecodeError as error:
            raise ValueError(f"no tf.train.Example: {error}") from None
    return io.BytesIO(message.features.feature["image"].bytes_list.value[0])


def h5(path: Path) -> list[tuple[str, int]]:
    """(file, number) of each image: groups "0", "1", ... with a data set `image` [H, W, 3]."""
    import h5py

    if not path.is_file():
        raise UserError(f"{path} is missing; the export needs a file for each class")
    try:
        with h5py.File(path) as file:
            return [(str(path), i) for i in range(len(file))]
    except OSError as error:
        raise damaged(path, error) from None


# -------------------------------------------------------------------------------------------- publishers' own layouts


def by_class(*places: str) -> Callable:
    """Class folders of these names below one of the places."""

    def read(folder: Path, names: list[str]) -> list[list[Path]] | None:
        root = next((folder / p for p in places if (folder / p).is_dir()), None)
        return None if root is None else [pictures(root / n) for n in names]

    return read


def omniglot(folder: Path, names: list[str]) -> list[np.ndarray] | None:
    """Inverted to white strokes on black, [20, 105, 105] a character."""
    wanted = {n: i for i, n in enumerate(names)}
    found: list[list] = [[] for _ in names]
    place = next((folder / p for p in ("omniglot", "omniglot-py") if (folder / p).is_dir()), None)
    if place is None:
        return None
    for part in ("images_background", "images_evaluation"):
        archive, unpacked = place / f"{part}.zip", place / part
        try:
            if archive.is_file():
                with zipfile.ZipFile(archive) as zipped:
                    for entry in sorted(zipped.namelist()):
                        i = wanted.get("-".join(entry.split("/")[-3:-1]))
                        if i is not None and entry.endswith(".png"):
                            found[i].append(np.asarray(Image.open(io.BytesIO(zipped.read(entry))).convert("L")))
            elif unpacked.is_dir():
                for n, i in wanted.items():
                    alphabet, _, character = n.rpartition("-")
                    files = pictures(unpacked / alphabet / character)
                    found[i] += [np.asarray(Image.open(p).convert("L")) for p in files]
        except (zipfile.BadZipFile, zlib.error, UnidentifiedImageError, OSError) as error:
            raise damaged(archive if archive.is_file() else unpacked, error) from None
    if not any(found):
        return None
    return [255 - np.stack(x) if x else np.zeros((0, 105, 105), np.uint8) for x in found]


def aircraft(folder: Path, names: list[str]) -> list[list] | None:
    """All three published splits together, cropped to the bounding boxes."""
    root = folder / "fgvc-aircraft-2013b" / "data"
    if not root.is_dir():
        return None
    out: dict[str, list] = {n: [] for n in names}
    try:
        lines = (root / "images_box.txt").read_text().splitlines()
        boxes = {line.split()[0]: [int(v) for v in line.split()[1:5]] for line in lines if line}
        for split in ("train", "val", "test"):
            for line in (root / f"images_variant_{split}.txt").read_text().splitlines():
                image, _, variant = line.partition(" ")
                if variant in out:
                    out[variant].append((str(root / "images" / f"{image}.jpg"), boxes[image]))
    except (OSError, KeyError, ValueError) as error:
        raise damaged(root, error) from None
    return [sorted(out[n]) for n in names]


def quickdraw(folder: Path, names: list[str]) -> list[np.ndarray] | None:
    """28x28 bitmaps, white on black; mapped, not read whole."""
    if not any((folder / "quickdraw" / f"{n}.npy").is_file() for n in names):
        return None
    out = []
    for n in names:
        path = folder / "quickdraw" / f"{n}.npy"
        if not path.is_file():
            raise UserError(f"{path} is missing; Quick Draw needs a file for each class")
        try:
            out.append(np.load(path, mmap_mode="r").reshape(-1, 28, 28))
        except ValueError as error:
            raise damaged(path, error) from None
    return out


def fungi(folder: Path, names: list[str]) -> list[list[Path]] | None:
    root = folder / "fungi"
    if not (root / "train.json").is_file():
        return None
    out: dict[str, list] = {n: [] for n in names}
    try:
        for split in ("train", "val"):
            found = json.loads((root / f"{split}.json").read_text())
            files = {x["id"]: root / x["file_name"] for x in found["images"]}
            title = {x["id"]: f"{x['id']:04d}.{x['name']}" for x in found["categories"]}
            for x in found["annotations"]:
                if title[x["category_id"]] in out:
                    out[title[x["category_id"]]].append(files[x["image_id"]])
    except (OSError, KeyError, ValueError) as error:
        raise damaged(root, error) from None
    return [sorted(out[n]) for n in names]


def flowers(folder: Path, names: list[str]) -> list[list[Path]] | None:
    """All three published splits together; class names begin with the label."""
    root = folder / "flowers-102"
    if not (root / "imagelabels.mat").is_file():
        return None
    import scipy.io

    try:
        labels = scipy.io.loadmat(root / "imagelabels.mat")["labels"][0]
    except (ValueError, KeyError, OSError, zlib.error) as error:
        raise damaged(root / "imagelabels.mat", error) from None
    files = {n: [] for n in names}
    by_number = {int(n.split(".")[0]): n for n in names}
    for i, label in enumerate(labels.tolist(), 1):
        if label in by_number:
            files[by_number[label]].append(root / "jpg" / f"image_{i:05d}.jpg")
    return [files[n] for n in names]


def signs(folder: Path, names: list[str]) -> list[list[Path]] | None:
    places = ("gtsrb/GTSRB/Training", "GTSRB/Training", "GTSRB/Final_Training/Images")
    root = next((folder / p for p in places if (folder / p).is_dir()), None)
    return None if root is None else [pictures(root / f"{int(n.split('.')[0]):05d}") for n in names]


def coco(folder: Path, names: list[str]) -> list[list] | None:
    """Instances of train2017: each box enlarged 1.2 times around its centre, cut at the image, cropped."""
    root = folder / "coco"
    path = root / "annotations" / "instances_train2017.json"
    if not path.is_file():
        return None
    out: dict[str, list] = {n: [] for n in names}
    try:
        found = json.loads(path.read_text())
        images = {x["id"]: x for x in found["images"]}
        title = {x["id"]: x["name"] for x in found["categories"]}
        for x in sorted(found["annotations"], key=lambda x: x["id"]):
            if title[x["category_id"]] in out:
                image = images[x["image_id"]]
                box = enlarged(x["bbox"], image["width"], image["height"])
                out[title[x["category_id"]]].append((str(root / "train2017" / image["file_name"]), box))
    except (OSError, KeyError, ValueError) as error:
        raise damaged(path, error) from None
    return [out[n] for n in names]


def enlarged(box: Sequence[float], width: int, height: int, by: float = 1.2) -> list[int]:
    """[x, y, w, h] -> [left, top, right, bottom] in whole pixels inside the image, at least one pixel wide and high."""
    x, y, w, h = box
    left, top = max(0, int(x + w / 2 - by * w / 2)), max(0, int(y + h / 2 - by * h / 2))
    left, top = min(left, width - 1), min(top, height - 1)
    right, bottom = min(width, int(x + w / 2 + by * w / 2)), min(height, int(y + h / 2 + by * h / 2))
    return [left, top, max(right, left + 1), max(bottom, top + 1)]


OWN: dict[str, Callable] = {
    "ilsvrc_2012": by_class("ILSVRC2012/train", "imagenet/train", "ImageNet/train"),
    "omniglot": omniglot,
    "aircraft": aircraft,
    "cu_birds": by_class("CUB_200_2011/images"),
    "dtd": by_class("dtd/images", "dtd/dtd/images"),
    "quickdraw": quickdraw,
    "fungi": fungi,
    "vgg_flower": flowers,
    "traffic_sign": signs,
    "mscoco": coco,
}


# ------------------------------------------------------------------------- sets of which only the test images are used


def lanczos(x: np.ndarray, size: int) -> np.ndarray:
    """[n, H, W(, 3)] re-sampled to size x size by Lanczos, as the records of these three sets are made."""
    if x.shape[1] == size:
        return x
    return np.stack([np.asarray(Image.fromarray(i).resize((size, size), Image.Resampling.LANCZOS)) for i in x])


def mnist(folder: Path) -> tuple[np.ndarray, np.ndarray, str]:
    out = []
    for stem, head in (("t10k-images-idx3-ubyte", 16), ("t10k-labels-idx1-ubyte", 8)):
        places = [folder / d / (stem + e) for d in ("mnist", "MNIST/raw") for e in (".gz", "")]
        path = next((p for p in places if p.is_file()), None)
        if path is None:
            raise missing("mnist", folder)
        try:
            raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
            out.append(np.frombuffer(raw, np.uint8, offset=head))
        except (EOFError, zlib.error, gzip.BadGzipFile, ValueError) as error:
            raise damaged(path, error) from None
    if len(out[0]) != 784 * len(out[1]):
        raise damaged(folder / "mnist", ValueError("images and labels differ in number"))
    return out[0].reshape(-1, 28, 28), out[1], "paper" if len(out[1]) == 10_000 else f"{len(out[1])} images"


def cifar(name: str) -> Callable:
    inner, key = {
        "cifar10": ("cifar-10-batches-py/test_batch", b"labels"),
        "cifar100": ("cifar-100-python/test", b"fine_labels"),
    }[name]

    def read(folder: Path) -> tuple[np.ndarray, np.ndarray, str]:
        path = next((folder / d / inner for d in (name, ".") if (folder / d / inner).is_file()), None)
        if path is None:
            if name == "cifar10" and (folder / "cifar10" / "cifar10-jpeg.tar.xz").is_file():
                return *cifar_jpeg(folder / "cifar10" / "cifar10-jpeg.tar.xz"), "cifar10-jpeg75"
            raise missing(name, folder)
        try:
            found = Arrays(io.BytesIO(path.read_bytes()), encoding="bytes").load()
            x = np.asarray(found[b"data"], np.uint8).reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
            y = np.array(found[key])
        except (pickle.UnpicklingError, EOFError, KeyError, ValueError, TypeError) as error:
            raise damaged(path, error) from None
        return x, y, "paper" if len(y) == 10_000 else f"{len(y)} images"

    return read


class Arrays(pickle.Unpickler):
    """Reads the pickles of CIFAR, which hold NumPy arrays and nothing else; refuses any other class."""

    def find_class(self, module: str, name: str):
        if (module, name) == ("_codecs", "encode"):  # how Python 3 writes bytes in Python 2's format
            return super().find_class(module, name)
        if module.split(".")[0] == "numpy" and name in ("_reconstruct", "ndarray", "dtype"):
            return super().find_class(module.replace("numpy.core", "numpy._core"), name)
        raise pickle.UnpicklingError(f"{module}.{name} does not belong in an image set")


def cifar_jpeg(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Test images of the JPEG copy (not the original pixels), in the order of their names."""
    found = []
    try:
        with tarfile.open(path, "r:xz") as tar:  # read in memory, nothing is unpacked to disk
            for member in tar:
                parts = Path(member.name).parts
                if member.name.endswith(".jpg") and "test" in parts:
                    found.append((parts[-2], parts[-1], np.asarray(Image.open(tar.extractfile(member)).convert("RGB"))))
    except (lzma.LZMAError, tarfile.TarError, EOFError, UnidentifiedImageError, OSError) as error:
        raise damaged(path, error) from None
    found.sort(key=lambda x: x[:2])
    classes = sorted({c for c, _, _ in found})
    if len(found) != 10_000 or len(classes) != 10:
        raise UserError(f"{path} has {len(found)} test images of {len(classes)} classes instead of 10000 of 10")
    return np.stack([x for _, _, x in found]), np.array([classes.index(c) for c, _, _ in found])


ARRAYS: dict[str, Callable] = {"mnist": mnist, "cifar10": cifar("cifar10"), "cifar100": cifar("cifar100")}

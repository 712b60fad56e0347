"""ID and OOD image sets with the class lists and splits of the paper, read from where they were unpacked.

Each set is a list of files (or an array) with class indices; the class list on disk is compared with the one in splits/
before anything is scored, because a wrong or differently ordered list changes every number without an error.
"""

import functools
import hashlib
import re
import struct
from dataclasses import dataclass
from pathlib import Path

from lab import runs
from lab.runs import HERE, UserError

import numpy as np
import torch
from PIL import Image

ENDINGS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".tif", ".tiff")


@functools.cache
def split(name: str) -> dict:
    return runs.read_json(HERE / "splits" / f"{name}.json")


@dataclass(frozen=True)
class Place:
    """Where a set lies below the data folder and who hands it out."""

    path: str
    origin: str
    count: int | None  # images, None where it is not published


PLACES = {
    "cub": Place("CUB_200_2011", "CUB_200_2011.tgz, CaltechDATA", 5794),
    "cars": Place("stanford_cars", "Stanford Cars, e.g. the copy tanganke/stanford_cars on Hugging Face", 8041),
    "food": Place("food-101", "torchvision Food101 or ethz/food101 on Hugging Face", 25250),
    "pet": Place("oxford-iiit-pet", "torchvision OxfordIIITPet", 3669),
    "imagenet": Place("ImageNet/val", "image-net.org (ILSVRC 2012 validation images, a folder for each wnid)", 50000),
    "imagenet10": Place("ImageNet10/val", "10 wnid folders of ILSVRC 2012 validation", 500),
    "imagenet20": Place("ImageNet20/val", "20 wnid folders of ILSVRC 2012 validation", 1000),
    "sketch": Place("ImageNet-Sketch", "github.com/HaohanWang/ImageNet-Sketch", 50889),
    "imagenet-c": Place("ImageNet-C", "zenodo.org/records/2235448, as <corruption>/1/<wnid>/", 50000),
    "inaturalist": Place("ImageNet_OOD_dataset/iNaturalist", "github.com/deeplearning-wisc/large_scale_ood", 10000),
    "sun": Place("ImageNet_OOD_dataset/SUN", "github.com/deeplearning-wisc/large_scale_ood", 10000),
    "places": Place("ImageNet_OOD_dataset/Places", "github.com/deeplearning-wisc/large_scale_ood", 10000),
    "texture": Place("ImageNet_OOD_dataset/dtd/images", "dtd-r1.0.1.tar.gz, VGG Oxford", 5640),
    "ssb_hard": Place("ImageNet_OOD_dataset/ssb_hard", "download script of OpenOOD v1.5", 49000),
    "ninco": Place("ImageNet_OOD_dataset/ninco", "download script of OpenOOD v1.5", 5879),
    "cifar10": Place("cifar-10-batches-py", "torchvision CIFAR10", 10000),
    "cifar100": Place("cifar-100-python", "torchvision CIFAR100", 10000),
    "svhn": Place("svhn/test_32x32.mat", "torchvision SVHN, split test", None),
    "lsun": Place("LSUN", "LSUN test images of the CIFAR benchmarks", None),
}
TITLES = {
    **{"cub200": "CUB-200-2011", "cars196": "Stanford-Cars", "food101": "Food-101", "pet37": "Oxford-IIIT Pet"},
    **{"imagenet1k": "ImageNet-1K", "imagenet10": "ImageNet-10", "imagenet20": "ImageNet-20", "cifar10": "CIFAR-10"},
    **{"cifar100": "CIFAR-100", "sketch": "ImageNet-Sketch", "inaturalist": "iNaturalist", "sun": "SUN"},
    **{
        "places": "Places",
        "texture": "Texture",
        "ssb_hard": "SSB-hard",
        "ninco": "NINCO",
        "svhn": "SVHN",
        "lsun": "LSUN",
    },
    **{"cub100": "CUB-100", "cars98": "Stanford-Cars-98", "food50": "Food-50", "pet18": "Oxford-Pet-18"},
}
HALVES = {"cub100": "cub", "cars98": "cars", "food50": "food", "pet18": "pet"}  # `<half>-ood` is the complement


@dataclass(frozen=True)
class ImageSet:
    """Images in a fixed order: `items` are files or uint8 arrays; `labels` index `names` (-1 where there are none)."""

    name: str
    items: list
    labels: list[int]
    names: list[str]
    sha256: str
    variant: str

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, i: int) -> Image.Image:
        item = self.items[i]
        if not isinstance(item, Path):
            return Image.fromarray(item)
        try:
            with Image.open(item) as image:
                return image.convert("RGB")
        except (OSError, SyntaxError, ValueError, struct.error, Image.DecompressionBombError) as error:
            raise UserError(f"{item} is not a readable image ({error}); unpack the data set again") from None


class Transformed(torch.utils.data.Dataset):
    """What a DataLoader reads."""

    def __init__(self, images: ImageSet, transform):
        self.images, self.transform = images, transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> torch.Tensor:
        return self.transform(self.images[i])


def id_names(name: str) -> list[str]:
    """Prompt names of an ID set, in the order of its class indices."""
    far = split("far_id_class_names")
    if name == "cifar10-animals":  # the fine-grained task of scale real; no set of the paper
        return [n for n in far["cifar10"] if n in ("bird", "cat", "deer", "dog", "frog", "horse")]
    if name in ("imagenet1k", "sketch") or name.startswith("imagenet-c-"):
        return [c["name"] for c in split("imagenet1k_class_names")["classes"]]
    if name in ("imagenet10", "imagenet20"):
        return [c["name"] for c in split("imagenet10_imagenet20")[name]]
    if name.removesuffix("-ood") in HALVES:
        which = "ood" if name.endswith("-ood") else "id"
        s = split(
            {"cub100": "cub100", "cars98": "stanford_cars98", "food50": "food50", "pet18": "oxford_pet18"}[
                name.removesuffix("-ood")
            ]
        )
        return s.get(f"{which}_prompt_names") or s[f"{which}_classes"]
    keys = {"cub200": "cub200", "cars196": "stanford_cars196", "food101": "food101", "pet37": "oxford_pet37"}
    if (key := keys.get(name, name)) in far and key != "note":
        return list(far[key])
    raise UserError(f"no ID set {name}; use one of {', '.join([*keys, *HALVES])}, imagenet1k, imagenet10, imagenet20, "
                    "sketch, imagenet-c-<corruption>, cifar10, cifar100, or a folder")  # fmt: skip


def names_of(given: str) -> list[str]:
    """ID names by the name of a set, or out of a text file with a name a line."""
    path = Path(given)
    if path.suffix == ".txt":
        if not path.is_file():
            raise UserError(f"no file {path}; it should hold an ID name a line")
        names = [line.strip() for line in path.read_text().splitlines() if line.strip()]
        if not names:
            raise UserError(f"{path} holds no name")
        return names
    return id_names(given)


# ------------------------------------------------------------------------------------------------------------- readers


def _need(root: Path, key: str, tail: str = "") -> Path:
    place = PLACES[key]
    path = root / place.path / tail if tail else root / place.path
    if not path.exists():
        raise UserError(
            f"{path} is missing; place {place.path} from {place.origin} there, or name its folder by --data-dir"
        )
    return path


def _same(found: list[str], wanted: list[str], where: Path) -> None:
    """The class lists must agree entry by entry."""
    if found != wanted:
        i = next(
            (i for i, (a, b) in enumerate(zip(found, wanted, strict=False)) if a != b), min(len(found), len(wanted))
        )
        a, b = (x[i] if i < len(x) else "nothing" for x in (found, wanted))
        raise UserError(
            f"class list in {where} differs from splits/ at entry {i}: {a} instead of {b} "
            f"({len(found)} classes, {len(wanted)} wanted)"
        )


def _folder(path: Path) -> list[Path]:
    """All images below a folder, in the order of their path."""
    files = sorted(p for p in path.rglob("*") if p.suffix.lower() in ENDINGS)
    if not files:
        raise UserError(f"{path} holds no images")
    return files


def pictures(folder: str) -> ImageSet:
    """All images below a folder, whatever its sub-folders are called."""
    items = _folder(Path(folder))
    return made(folder, items, [-1] * len(items), [], "own folder")


def _classes(path: Path, wanted: list[str]) -> tuple[list[Path], list[int]]:
    """A folder for each class; every wanted one must be there with at least an image."""
    files, labels = [], []
    for i, name in enumerate(wanted):
        if not (path / name).is_dir():
            raise UserError(f"{path} lacks the class folder {name} ({len(wanted)} classes wanted)")
        found = _folder(path / name)
        files += found
        labels += [i] * len(found)
    return files, labels


def _cub(root: Path) -> tuple[list, list[int], list[str]]:
    base = _need(root, "cub")
    tables = {}
    for name in ("images", "image_class_labels", "train_test_split", "classes"):
        path = _need(root, "cub", f"{name}.txt")
        tables[name] = dict(line.split(None, 1) for line in path.read_text().splitlines() if line.strip())
    folders = [v.strip() for _, v in sorted(tables["classes"].items(), key=lambda kv: int(kv[0]))]
    _same([f.split(".", 1)[1].replace("_", " ") for f in folders], id_names("cub200"), base / "classes.txt")
    keep = [i for i in tables["images"] if tables["train_test_split"][i].strip() == "0"]
    files = [base / "images" / tables["images"][i].strip() for i in keep]
    return files, [int(tables["image_class_labels"][i]) - 1 for i in keep], folders


def _cars(root: Path) -> tuple[list, list[int], list[str]]:
    from scipy.io import loadmat

    base = _need(root, "cars")
    meta = loadmat(_need(root, "cars", "devkit/cars_meta.mat"), squeeze_me=True)
    names = [str(n) for n in meta["class_names"]]
    _same(names, id_names("cars196"), base / "devkit/cars_meta.mat")
    notes = loadmat(_need(root, "cars", "cars_test_annos_withlabels.mat"), squeeze_me=True)["annotations"]
    return [base / "cars_test" / str(a["fname"]) for a in notes], [int(a["class"]) - 1 for a in notes], names


def _food(root: Path) -> tuple[list, list[int], list[str]]:
    base = _need(root, "food")
    folders = _need(root, "food", "meta/classes.txt").read_text().split()
    _same([f.replace("_", " ").capitalize() for f in folders], id_names("food101"), base / "meta/classes.txt")
    lines = _need(root, "food", "meta/test.txt").read_text().split()
    return [base / "images" / f"{x}.jpg" for x in lines], [folders.index(x.split("/")[0]) for x in lines], folders


def _pet(root: Path) -> tuple[list, list[int], list[str]]:
    base = _need(root, "pet")
    lines = [x.split() for x in _need(root, "pet", "annotations/test.txt").read_text().splitlines() if x.strip()]
    stems = {int(x[1]) - 1: x[0].rsplit("_", 1)[0] for x in lines}
    names = [stems[i].replace("_", " ").title() for i in sorted(stems)]
    _same(names, id_names("pet37"), base / "annotations/test.txt")
    return [base / "images" / f"{x[0]}.jpg" for x in lines], [int(x[1]) - 1 for x in lines], names


def _torchvision(name: str, root: Path, download: bool) -> tuple[list, list[int], list[str]]:
    import torchvision.datasets as tv

    kind = {"cifar10": tv.CIFAR10, "cifar100": tv.CIFAR100, "svhn": tv.SVHN}[name]
    where = {"root": str(root / "svhn") if name == "svhn" else str(root), "download": download}
    try:
        found = kind(**where, **({"split": "test"} if name == "svhn" else {"train": False}))
    except (RuntimeError, OSError) as error:
        place = PLACES[name]
        raise UserError(
            f"{root / place.path} is missing or damaged ({error}); get it from {place.origin} or use --download"
        ) from None
    if name == "svhn":
        return list(found.data.transpose(0, 2, 3, 1)), [int(x) for x in found.labels], [str(i) for i in range(10)]
    _same(list(found.classes), id_names(name), root)
    return list(found.data), [int(x) for x in found.targets], list(found.classes)


def load(name: str, root: Path, download: bool = False) -> ImageSet:
    """A set by name (`pet37`, `pet18`, `pet18-ood`, `texture`, ...), or any folder: an ImageFolder, or just images."""
    wnids = [c["wnid"] for c in split("imagenet1k_class_names")["classes"]]
    readers = {"cub200": _cub, "cars196": _cars, "food101": _food, "pet37": _pet}
    whole = {"cub": "cub200", "cars": "cars196", "food": "food101", "pet": "pet37"}
    half = name.removesuffix("-ood")
    place = name
    if name in readers:
        items, labels, _ = readers[name](root)
        names = id_names(name)
    elif half in HALVES:
        place = HALVES[half]
        items, labels, folders = readers[whole[place]](root)
        names = id_names(name)
        order = _half_order(name, folders)
        kept = [(item, order[label]) for item, label in zip(items, labels, strict=True) if label in order]
        items, labels = [k[0] for k in kept], [k[1] for k in kept]
    elif name in ("imagenet1k", "sketch", "imagenet10", "imagenet20") or name.startswith("imagenet-c-"):
        place = {"imagenet1k": "imagenet"}.get(name, "imagenet-c" if name.startswith("imagenet-c-") else name)
        tail = f"{name.removeprefix('imagenet-c-')}/1" if place == "imagenet-c" else ""
        wanted = (
            [c["wnid"] for c in split("imagenet10_imagenet20")[name]] if name in ("imagenet10", "imagenet20") else wnids
        )
        items, labels = _classes(_need(root, place, tail), wanted)
        names = id_names(name)
    elif name in ("cifar10", "cifar100", "svhn"):
        items, labels, names = _torchvision(name, root, download)
    elif name in PLACES:
        items = _folder(_need(root, name))
        names, labels = _classes_of(name, items, root / PLACES[name].path)
    elif Path(name).is_dir():
        classes = sorted(p.name for p in Path(name).iterdir() if p.is_dir())
        items, labels = _classes(Path(name), classes) if classes else (_folder(Path(name)), [])
        labels, names = labels or [-1] * len(items), [c.replace("_", " ") for c in classes]
    else:
        raise UserError(
            f"no image set or folder {name}; sets: "
            + ", ".join(sorted({*TITLES, *PLACES} - {*HALVES.values(), "imagenet"}))
        )
    key = PLACES.get(place) or PLACES.get(
        {"cub200": "cub", "cars196": "cars", "food101": "food", "pet37": "pet"}.get(name, "")
    )
    whole_set = key is not None and key.count is not None and half not in HALVES
    variant = f"{len(items)} of {key.count} images" if whole_set and len(items) != key.count else "paper"
    return made(name, items, labels, names, "own folder" if Path(name).is_dir() else variant)


def made(name: str, items: list, labels: list[int], names: list[str], variant: str) -> ImageSet:
    """An image set with its checksum: of the pixels of arrays, of the names and sizes of files."""
    digest = hashlib.sha256()
    for item in items:
        if isinstance(item, Path):
            try:
                digest.update(f"{item.name}:{item.stat().st_size}\n".encode())
            except FileNotFoundError:
                raise UserError(f"{item} is missing; unpack the data set again") from None
        else:
            digest.update(f"{item.shape}\n".encode())
            digest.update(np.ascontiguousarray(item).tobytes())
    return ImageSet(name, items, labels, names, digest.hexdigest(), variant)


def _classes_of(name: str, items: list[Path], top: Path) -> tuple[list[str], list[int]]:
    """Class names of Texture (its folders) and Places (its file names, `b_badlands_00000192.jpg`), else none.

    They are what the paper calls Ground Truth for these two sets. One file without a class, and there are no names.
    """
    if name == "texture":
        found = [p.parent.name if p.parent != top else "" for p in items]
    elif name == "places":
        matches = [re.fullmatch(r"[a-z]_(.+)_\d{4,}", p.stem) for p in items]
        found = [m[1] if m else "" for m in matches]
    else:
        found = [""]
    if not all(found):
        return [], [-1] * len(items)
    classes = sorted({*found})
    index = {c: i for i, c in enumerate(classes)}
    return [re.sub(r"[_-]+", " ", c) for c in classes], [index[c] for c in found]


def _half_order(name: str, folders: list[str]) -> dict[int, int]:
    """Class index of the whole set -> index in the half, in the order of the split file."""
    half, which = name.removesuffix("-ood"), "ood" if name.endswith("-ood") else "id"
    s = split({"cub100": "cub100", "cars98": "stanford_cars98", "food50": "food50", "pet18": "oxford_pet18"}[half])
    wanted = s.get(f"{which}_class_dirs") or s[f"{which}_classes"]
    missing = [w for w in wanted if w not in folders]
    if missing:
        raise UserError(f"class {missing[0]} of {name} is not in the data set")
    return {folders.index(w): i for i, w in enumerate(wanted)}


def ood_names(ood: str) -> list[str]:
    """Names of an OOD set where the paper uses them as Ground Truth, else nothing."""
    if ood.endswith("-ood") or ood in ("imagenet10", "imagenet20"):
        return id_names(ood)
    return []

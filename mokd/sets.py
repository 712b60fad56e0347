"""The image sets by name: titles, splits, class lists and image counts, the last two Meta-Dataset's (specs/)."""

import functools
import json

from lab.runs import HERE

SPLITS = ("train", "valid", "test")
# The 8 training sets of Meta-Dataset, then the sets that are only tested on; the order of the paper's tables.
TRAINING = ("ilsvrc_2012", "omniglot", "aircraft", "cu_birds", "dtd", "quickdraw", "fungi", "vgg_flower")
UNSEEN = ("traffic_sign", "mscoco", "mnist", "cifar10", "cifar100")
PAPER = TRAINING + UNSEEN
SMALL = ("drawn", "mnist5k", "digits", "photographs")  # inside packages, or generated
TITLES = {
    **{"ilsvrc_2012": "ImageNet", "omniglot": "Omniglot", "aircraft": "Aircraft", "cu_birds": "Birds"},
    **{"dtd": "Textures", "quickdraw": "Quick Draw", "fungi": "Fungi", "vgg_flower": "VGG Flower"},
    **{"traffic_sign": "Traffic Sign", "mscoco": "MSCOCO", "mnist": "MNIST", "cifar10": "CIFAR-10"},
    **{"cifar100": "CIFAR-100", "drawn": "Drawn characters", "mnist5k": "MNIST (5,000)", "digits": "8x8 digits"},
    **{"photographs": "Crops of photographs", "images": "Images"},
}
CAP = {"quickdraw": 2000, "mscoco": 2000}  # images of a class that are read; the sampling law counts all


@functools.cache
def spec(name: str) -> dict:
    """Class lists, splits and image counts (specs/<name>.json)."""
    return json.loads((HERE / "specs" / f"{name}.json").read_text())


def class_names(name: str, split: str) -> list[str]:
    """Class names of a split in Meta-Dataset's order."""
    if name in ("mnist", "cifar10", "cifar100"):
        raise ValueError(f"{name} has no class list")
    s = spec(name)
    if name == "omniglot":
        return [f"{a}-character{i + 1:02d}" for a, n in s["alphabets"][split].items() for i in range(n)]
    return list(s[split])


def spec_counts(name: str, split: str) -> list[int]:
    """Images of each class, in the order of class_names."""
    s = spec(name)
    return [s["images"]] * len(class_names(name, split)) if name == "omniglot" else list(s[split].values())


def first_id(name: str, split: str) -> int:
    """Number of a split's first class among all: the files of the exports are named by it."""
    return sum(len(class_names(name, s)) for s in SPLITS[: SPLITS.index(split)])


def alphabets(name: str, split: str) -> tuple[tuple[int, ...], ...]:
    """Omniglot: class numbers of each alphabet of a split."""
    if name != "omniglot":
        return ()
    out, start = [], 0
    for n in spec(name)["alphabets"][split].values():
        out.append(tuple(range(start, start + n)))
        start += n
    return tuple(out)


def spanning(name: str, split: str) -> tuple[tuple[int, ...], ...]:
    """ImageNet: classes below each inner node of the split's part of WordNet, in a fixed order."""
    if name != "ilsvrc_2012":
        return ()
    children, number = spec(name)["nodes"][split], {c: i for i, c in enumerate(class_names(name, split))}

    @functools.cache
    def below(node: str) -> frozenset[int]:
        if node not in children:
            return frozenset([number[node]])
        return frozenset().union(*(below(c) for c in children[node]))

    return tuple(tuple(sorted(below(n))) for n in sorted(children))

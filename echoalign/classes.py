"""Class names as prompts for a text-to-image model, what of ImageNet belongs to CIFAR-10's classes, and the
superclasses of CIFAR-100 (Krizhevsky, 2009)."""

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

"""What scale real judges: which images are ID and OOD in each split, and which names stand beside the ID names."""

import itertools
import random
from dataclasses import dataclass, field
from pathlib import Path

from lab import runs
from lab.runs import UserError

import numpy as np

import data
from names import reading
from real import sets
from real.sets import CIFAR, DAVIS_ID, DAVIS_OOD, TITLES

ANIMALS = ("bird", "cat", "deer", "dog", "frog", "horse")
FAR = ("mnist", "omniglot", "texture-wheel", "faces")
STUDIES = {"near": ("cifar10",), "fine": ("cifar10",), "far": ("cifar10", *FAR), "davis": ("davis-id", "davis-ood")}
RUNS = 3  # of the language model behind the published lists
NOUNS = 2000  # WordNet nouns that a study draws from
# Lists by what they are called in the tables: file below envisioned/, and the prompt that they answer.
LISTS = {
    "own near": ("cifar10-near", "near"),
    "own far": ("cifar10-far", "far"),
    "own fine": ("cifar10-animals-fine", "fine"),
}
PUBLISHED = "published near"
ANIMAL_CLASSES = 398  # the first so many of ImageNet's classes are animals


@dataclass
class Split:
    """One ID set against one OOD set: masks over the pool, the ID names and the names of the OOD classes."""

    id_names: list[str]
    truth: list[str]
    inside: np.ndarray  # bool [N]: ID images
    outside: np.ndarray  # bool [N]: OOD images


@dataclass
class Pool:
    """All images of a study in one row, with the groups and strata that the bootstrap draws from."""

    parts: list  # ImageSets, in the order of the rows
    groups: np.ndarray
    strata: np.ndarray
    labels: np.ndarray  # class within its own set
    splits: list[Split] = field(default_factory=list)
    shown: dict[str, list[int]] = field(default_factory=dict)  # dataset of the records -> its splits

    def units(self, splits: list[int]) -> int:
        """The fewest groups of a stratum among the images of these splits; of several sets with one ID set the groups
        of that, for the sets themselves are counted beside it (study.told)."""
        side = "inside" if self.apart(splits) else None
        used = np.any([m for i in splits for m in self._masks(i, side)], 0)
        return min(len(np.unique(self.groups[used & (self.strata == k)])) for k in np.unique(self.strata[used]))

    def _masks(self, i: int, side: str | None) -> list[np.ndarray]:
        return [getattr(self.splits[i], name) for name in ([side] if side else ["inside", "outside"])]

    def apart(self, splits: list[int]) -> bool:
        """Whether these splits are OOD sets without a common image: far sets are, splits of CIFAR-10 are not."""
        return len(splits) > 1 and not np.any(np.sum([self.splits[i].outside for i in splits], 0) > 1)


def pool(study: str, root: Path, seed: int, splits: int, most: int = 0) -> Pool:
    """The images of a study and its splits. near, fine: classes of CIFAR-10 against other classes of it, all in one
    stratum, as a class is ID in one split and OOD in another; far, davis: sets of their own."""
    parts = [sets.load(name, root, most) for name in STUDIES[study]]
    start = np.cumsum([0, *(len(set(p.labels)) for p in parts)])
    labels = np.concatenate([p.labels for p in parts])
    which = np.concatenate([np.full(len(p), i) for i, p in enumerate(parts)])
    made = Pool(parts, labels + start[which], which, labels)
    if study in ("near", "fine"):
        classes, k = (CIFAR, 6) if study == "near" else (ANIMALS, 3)
        every = list(itertools.combinations(classes, k))
        chosen = random.Random(f"{study} {seed}").sample(every, min(splits, len(every)))
        made.strata = np.where(np.isin(labels, [CIFAR.index(c) for c in classes]), 0, 1)
        for ids in chosen:
            truth = [c for c in classes if c not in ids]
            masks = (np.isin(labels, [CIFAR.index(c) for c in names]) for names in (ids, truth))
            made.splits.append(Split(list(ids), truth, *masks))
        made.shown = {{"near": "near", "fine": "fine-grained"}[study]: list(range(len(chosen)))}
    elif study == "far":
        for i, name in enumerate(FAR, 1):
            made.splits.append(Split(list(CIFAR), parts[i].names, which == 0, which == i))
            made.shown[f"far: {TITLES[name]}"] = [i - 1]
        made.shown["far: mean of 4 sets"] = list(range(len(FAR)))
    else:
        ids, truth = (list(dict.fromkeys(x.values())) for x in (DAVIS_ID, DAVIS_OOD))
        made.splits.append(Split(ids, truth, which == 0, which == 1))
        made.shown["DAVIS"] = [0]
    return made


def right(made: Pool, split: Split, nearest: np.ndarray) -> float:
    """Zero-shot accuracy on the ID images of a split, per cent; nearest: index of the nearest ID name of each."""
    names = made.parts[0].names
    true = [split.id_names.index(names[k]) for k in made.labels[split.inside]]
    return 100 * float(np.mean(nearest == np.array(true)))


# --------------------------------------------------------------------------------------------------------------- names


def _names(path: Path, task: str, split: Split, n: int = 0) -> list[str]:
    """Cleaned names of a list for the ID names of a split; of a near list those written for them. n: the first so many
    (near: for each ID name), 0 all."""
    found = reading.read_names(path)
    groups = [g for k, g in found.groups.items() if task != "near" or k in split.id_names]
    return reading.clean([x for g in groups for x in g[: n or None]], split.id_names, task).names


def own(label: str, split: Split, n: int = 0) -> list[str]:
    """Names of one of LISTS for a split."""
    file, task = LISTS[label]
    return _names(runs.HERE / "envisioned" / f"{file}.json", task, split, n)


def lists(made: Pool, study: str, source: str, root: Path, llm: str) -> dict[str, list[list[list[str]]]]:
    """{list: [a run of its writer: [names of each split]]}. source: `own`, or `released` for the published ones."""
    if source == "released":
        files = [root / "eoe" / "envisioned_classes" / "near_3" / f"cifar10_{llm}_{k}.json" for k in range(RUNS)]
        gone = [p for p in files if not p.is_file()]
        if gone:
            raise UserError(
                f"no envisioned names in {gone[0]}; they are in the official repository tmlr-group/EOE, or use "
                "--labels own"
            )
        return {PUBLISHED: [[_names(p, "near", s) for s in made.splits] for p in files]}
    fine = study in ("fine", "davis")
    return {k: [[own(k, s) for s in made.splits]] for k in LISTS if k != "own fine" or fine}


def _pool_of_names(names: list[str], made: Pool) -> list[str]:
    """Names that share no word with any ID or OOD name of the study."""
    taken = [n for s in made.splits for n in (*s.id_names, *s.truth)]
    return reading.clean(names, [w.lower() for w in taken], "near").names


def is_kind(name: str, classes: list[str]) -> bool:
    """Whether a name is a kind of one of the classes, or a wider term that holds it (splits/kinds.json): an owl where
    birds are OOD. The name itself or its last word counts."""
    words = {k for c in classes for k in (c, *data.split("kinds")["kinds"].get(c, ()))}
    return bool({name.lower(), name.lower().split()[-1]} & words)


def animals(made: Pool) -> list[str]:
    """ImageNet's animals that are neither an ID nor an OOD class of the study nor a kind of one."""
    classes = list({n for s in made.splits for n in (*s.id_names, *s.truth)})
    spans = [span for c in classes for span in data.split("kinds")["imagenet"].get(c, ())]
    whole = data.split("imagenet1k_class_names")["classes"][:ANIMAL_CLASSES]
    left = [c["name"] for i, c in enumerate(whole) if not any(low <= i <= high for low, high in spans)]
    return _pool_of_names([n for n in left if not is_kind(n, classes)], made)


def controls(made: Pool, root: Path, seed: int, study: str) -> dict[str, list[str]]:
    """Names that say nothing of the ID classes, to draw as many as a list has: those that were written to be irrelevant
    (to ImageNet's classes, which hold CIFAR-10's), and nouns of WordNet at random. In the study of animals a third,
    fairer one: other animals."""
    irrelevant = reading.read_names(runs.HERE / "envisioned" / "imagenet1k-far-irrelevant.json").groups["all"]
    nouns = []
    for kind in ("artifact", "body", "object", "plant"):
        path = root / "eoe" / "neglabel_wordnet" / f"noun.{kind}.txt"
        if not path.is_file():
            raise UserError(f"no WordNet nouns in {path}; they are in the repository XueJiang16/NegLabel")
        nouns += path.read_text(encoding="utf-8").splitlines()
    nouns = sorted({n.strip() for n in nouns if n.strip() and n.strip().isprintable()})
    nouns = random.Random(f"nouns {seed}").sample(nouns, min(NOUNS, len(nouns)))
    out = {"irrelevant names": _pool_of_names(irrelevant, made), "WordNet nouns": _pool_of_names(nouns, made)}
    return out | ({"animals": animals(made)} if study == "fine" else {})


def drawn(names: list[str], n: int, *key) -> list[str]:
    """n of the names, the same for the same key."""
    if n > len(names):
        raise UserError(f"{n} names are asked of {len(names)}; take a shorter list")
    return random.Random(" ".join(map(str, key))).sample(names, n)

"""What a language model is asked: the paper's three prompts in our words, their variants, follow-ups (Sec. 3.3)."""

from dataclasses import dataclass
from typing import Literal

Task = Literal["far", "near", "fine"]
Variant = Literal["resemble", "dissimilar", "irrelevant"]
PER_CALL = 50  # names asked for in one turn (output length)
KINDS = {"cub100": "bird", "cars98": "car", "food50": "food", "pet18": "pet (cats and dogs)"}
KINDS["cifar10-animals"] = "animal"


@dataclass(frozen=True)
class Question:
    """What a turn asks for; the language model gets it as messages, a rule-based provider reads the fields."""

    task: Task
    variant: Variant
    id_names: tuple[str, ...]
    n: int
    kind: str = "object"


# ------------------------------------------------------------------------------------------------------------- prompts

DOGS = (
    "husky dog, alaskan Malamute, cossack sled dog, golden retriever, German Shepherd, Beagle, Bulldog, Poodle, "
    "Dachshund, Doberman Pinscher"
)
EXAMPLES = {
    ("far", "resemble"): (
        "husky dog, Garfield cat, churches, truck",
        "black stone, mountain, Ginkgo Tree, river, Rapeseed",
    ),
    ("far", "dissimilar"): (
        "husky dog, Garfield cat, churches, truck",
        "spoon, keyboard, cloud, pearl necklace, chess",
    ),
    ("far", "irrelevant"): ("husky dog, Garfield cat, churches, truck", "tax form, melody, galaxy, recipe, barcode"),
    ("near", "resemble"): (
        ("husky dog", "gray wolf, black stone, red panda"),
        ("basketball", "balloons, blowfish, hat"),
        ("water jug", "trumpets, helmets, rucksacks"),
    ),
    ("near", "dissimilar"): (
        ("husky dog", "bicycle, pineapple, lighthouse"),
        ("basketball", "ladder, feather, laptop"),
        ("water jug", "carpet, spider, airplane"),
    ),
    ("near", "irrelevant"): (
        ("husky dog", "stock chart, subway map, perfume"),
        ("basketball", "curtain, violin, passport"),
        ("water jug", "meadow, satellite, comic book"),
    ),
    ("fine", "resemble"): (
        DOGS,
        "Labrador Retriever, Rottweiler, Boxer, Border Collie, Shih Tzu, Akita, Saint Bernard, Australian Shepherd, "
        "Great Dane, Boston Terrier",
    ),
    ("fine", "dissimilar"): (
        DOGS,
        "moon, keyboard, waterfall, skyscraper, violin, stop sign, glass bottle, sailboat, spiral staircase, umbrella",
    ),
    ("fine", "irrelevant"): (
        DOGS,
        "tax form, subway map, circuit board, galaxy, perfume, weather chart, sheet music, neon sign, barcode, curtain",
    ),
}
DEMAND = {
    "resemble": "that look similar to these broad categories but have no direct relation to them",
    "dissimilar": "that look clearly different from these broad categories",
    "irrelevant": "that have visually nothing to do with these broad categories",
}
NEAR_DEMAND = {
    "resemble": "that share visual traits with it, come from other and broader domains, are not directly related to it "
    "and do not belong to its primary group",
    "dissimilar": "that look clearly different from it",
    "irrelevant": "that have visually nothing to do with it",
}
# Away from resemblance the answer leaves the kind of thing itself: what differs most from birds is no bird.
FINE_DEMAND = {
    "dissimilar": "that look clearly different from every one of them",
    "irrelevant": "that have visually nothing to do with any of them",
}


def _list(text: str) -> str:
    return "\n".join(f"- {name}" for name in text.split(", "))


def prompt(q: Question) -> str:
    """The first user turn. Its last line opens the answer, so that the model goes on with a hyphen list."""
    names = ", ".join(q.id_names)
    if q.task == "near":
        name = q.id_names[0].replace("_", " ")
        examples = "\n\n".join(
            f"Q: The image category is {a}. Name visually comparable categories {NEAR_DEMAND[q.variant]}.\n"
            f"A: There are 3 such categories:\n{_list(b)}"
            for a, b in EXAMPLES["near", q.variant]
        )
        ask = f"Q: The image category is {name}. Name visually comparable categories {NEAR_DEMAND[q.variant]}."
        return f"{examples}\n\n{ask}\nA: There are {q.n} such categories:"
    if q.task == "fine":
        known, answer = EXAMPLES["fine", q.variant]
        if q.variant != "resemble":
            demand = FINE_DEMAND[q.variant]
            return (
                f"Q: A data set holds 10 different species of dog: {known}. Name 10 classes {demand}, none twice.\n"
                f"A: The classes are:\n{_list(answer)}\n\n"
                f"Q: A data set holds {len(q.id_names)} different species of {q.kind}: {names}. Name {q.n} classes "
                f"{demand}, none twice.\nA: The classes are:"
            )
        return (
            f"Q: A data set holds 10 different species of dog: {known}. Name 10 other dog species that are NOT in the "
            f"data set, none twice.\nA: The other species are:\n{_list(answer)}\n\n"
            f"Q: A data set holds {len(q.id_names)} different species of {q.kind}: {names}. Name {q.n} other {q.kind} "
            f"species that are NOT in the data set, none twice.\nA: The other species are:"
        )
    known, answer = EXAMPLES["far", q.variant]
    return (
        f"Q: I collected images of 4 distinct categories: {known}. First sum up, by what they look like, which broad "
        f"categories they fall into; then name 5 classes {DEMAND[q.variant]}.\nA: The classes are:\n{_list(answer)}\n\n"
        f"Q: I collected images of {len(q.id_names)} distinct categories: {names}. First sum up, by what they "
        f"look like, which broad categories they fall into; then name {q.n} classes "
        f"{DEMAND[q.variant]}.\nA: The classes are:"
    )


def follow_up(q: Question) -> str:
    """A later user turn of the same conversation."""
    if q.task == "fine" and q.variant != "resemble":
        return f"Q: Name {q.n} more classes {FINE_DEMAND[q.variant]}, none of them among your answers.\nA:"
    if q.task == "fine":
        return f"Q: Name {q.n} more {q.kind} species that are neither in the data set nor among your answers.\nA:"
    return f"Q: Name {q.n} more classes {DEMAND[q.variant]}. Each has at most three words and none was used before.\nA:"


def prefix(q: Question) -> str:
    """What stands before a prompt whose answer held no name: that an example follows, and the format, nothing else."""
    which = "examples follow" if q.task == "near" else "example follows"
    return (
        f"The {which} first, then the question. Answer in exactly the form that is shown: each name on a line of its "
        "own that starts with a hyphen and a space, and no other word."
    )


def opening(q: Question) -> str:
    """The beginning of an answer, for models that can be made to go on from one. It ends with the hyphen: the space is
    part of the next word in the vocabularies of most models, and one that is given is followed by nothing."""
    return f"There are {q.n} such categories:\n-" if q.task == "near" else "The classes are:\n-"

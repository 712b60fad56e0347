"""Envisioning: ask a language model for names of possible outliers, read its answers, clean the names (Sec. 3.3).

    python envision.py --id pet37 --task far --url http://localhost:8000/v1 --model my-model
    python envision.py --id pet18 --task fine --model /models/some-chat-model --provider local

Needs only the ID names. Every raw answer is kept beside the names; a stopped conversation goes on where it was.
"""

import datetime
import fcntl
import hashlib
import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from lab import runs
from lab.progress import progress
from lab.runs import UserError

Task = Literal["far", "near", "fine"]
Variant = Literal["resemble", "dissimilar", "irrelevant"]
PER_CALL = 50  # names asked for in one turn (output length)
KINDS = {"cub100": "bird", "cars98": "car", "food50": "food", "pet18": "pet (cats and dogs)"}
WORDS_MOST, LETTERS_MOST = 8, 60


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


# ------------------------------------------------------------------------------------------------- reading the answers

BULLET = re.compile(r"^\s*(?:[-*•–—‣·]+|\(?\d{1,4}[.):]|\[\d+\])\s*(.*)$")


@dataclass
class Read:
    """Names in the order of the answers, and how many lines were left out and why."""

    names: list[str] = field(default_factory=list)
    dropped: dict[str, int] = field(default_factory=dict)

    def drop(self, why: str) -> None:
        self.dropped[why] = self.dropped.get(why, 0) + 1


def read_answers(answers: list[str], faithful: bool = False) -> Read:
    """Names out of raw answers.

    faithful: the rule behind the printed numbers. Answers are joined without a line break (so the last name of one and
    the first of the next fuse), only lines that start with "- " count, nothing is stripped.
    Otherwise each answer is read by itself and other bullets, numbers, bold, quotes and explanations are understood.
    """
    out = Read()
    if faithful:
        for line in "".join(answers).split("\n"):
            if line.startswith("- "):
                out.names.append(line[2:])
            elif line.strip():
                out.drop("no hyphen")
        return out
    for answer in answers:
        for line in answer.splitlines():
            if not line.strip():
                continue
            found = BULLET.match(line)
            if not found:
                out.drop("no list item")
                continue
            name = re.sub(r"[*_`]{1,3}(?=\S)|(?<=\S)[*_`]{1,3}", " ", found[1])
            name = re.split(r"\s[-–—]\s|:\s|\s\(", name + " ")[0]
            name = "".join(c if c.isprintable() else " " for c in name)
            name = " ".join(name.split()).strip(" .,;:!?\"'“”‘’«»()[]{}-–")
            if not any(c.isalnum() for c in name):
                out.drop("empty")
            elif len(name) > LETTERS_MOST or len(name.split()) > WORDS_MOST:
                out.drop("too long")
            else:
                out.names.append(name)
    return out


def clean(names: list[str], id_names: list[str], task: Task, variant: Variant = "resemble") -> Read:
    """Lower-case, once each, not an ID name; near: no word in common with any ID name. Order of first appearance.

    The word rule compares lower-cased outlier words with ID words in their own case, as the printed numbers do, so the
    ID word "Siamese" never matches "siamese". It is off for the dissimilar and irrelevant variants.
    """
    out, taken = Read(), {n.lower() for n in id_names}
    words = {w for n in id_names for w in n.split()} if task == "near" and variant == "resemble" else set()
    seen: set[str] = set()
    for name in names:
        low = name.lower()
        if low in seen:
            out.drop("repeated")
        elif low in taken:
            out.drop("ID name")
        elif words & {*low.split()}:
            out.drop("word of an ID name")
        else:
            out.names.append(low)
        seen.add(low)
    return out


# ------------------------------------------------------------------------------------------------------- conversations


def ask(provider, q: Question, answers: list[str]) -> str:
    """The next answer of a conversation whose earlier answers are given; one to the first question is a new one."""
    messages = [{"role": "user", "content": prompt(q)}]
    for earlier in answers:
        messages += [{"role": "assistant", "content": earlier}, {"role": "user", "content": follow_up(q)}]
    return provider.complete(messages, q)


def conversation(provider, q: Question, total: int, kept: list[dict] | None = None, save=None) -> list[dict]:
    """Turns until `total` names were asked for; `kept`: turns of an earlier start; `save(turns)` after each."""
    turns = list(kept or [])
    count = 1 if q.task == "near" else max(1, math.ceil(total / q.n))
    while len(turns) < count:
        text = ask(provider, q, [t["answer"] for t in turns])
        when = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        asked = prompt(q) if not turns else follow_up(q)
        turns.append({"model": provider.name, "time": when, "prompt": asked, "answer": text})
        if save:
            save(turns)
    return turns


def envision(
    provider,
    id_names: list[str],
    task: Task,
    n: int,
    variant: Variant = "resemble",
    kind: str = "object",
    save=None,
    kept: dict | None = None,
) -> dict[str, list[dict]]:
    """All conversations of a task: near has one for each ID name with n names each, the others one with n in all."""
    done = dict(kept or {})
    wanted = {name: (name,) for name in dict.fromkeys(id_names)} if task == "near" else {"all": tuple(id_names)}
    for key, names in progress(wanted.items(), "asking", len(wanted), hide=len(wanted) == 1):
        q = Question(task, variant, names, n if task == "near" else min(n, PER_CALL), kind)

        def keep(turns: list[dict], key: str = key) -> None:
            done[key] = turns
            if save:
                save(done)

        done[key] = conversation(provider, q, n, done.get(key), keep)
    return done


# ---------------------------------------------------------------------------------------------------------- name files


@dataclass(frozen=True)
class Names:
    """Envisioned names as read from a file, before cleaning."""

    groups: dict[str, list[str]]  # near: by ID name; else one entry
    made_by: str
    sha256: str

    def take(self, task: Task, n: int) -> list[str]:
        """The first n names (near: the first n for each ID name)."""
        if task == "near":
            return [x for group in self.groups.values() for x in group[:n]]
        return [x for group in self.groups.values() for x in group][:n]


def read_names(path: Path) -> Names:
    """A name file of this project ({"names": ...}), or one in the published layout ({task or ID name: [...]})."""
    value = runs.read_json(path)
    groups = value.get("names", value) if isinstance(value, dict) else None
    groups = {"all": groups} if isinstance(groups, list) else groups
    if not isinstance(groups, dict) or not all(
        isinstance(g, list) and all(isinstance(x, str) for x in g) for g in groups.values()
    ):
        raise UserError(f"{path} holds no lists of names; expected {{'names': [...]}} or {{ID name: [...]}}")
    digest = hashlib.sha256(json.dumps(groups, sort_keys=True).encode()).hexdigest()
    return Names(groups, str(value.get("made_by", "not stated")) if "names" in value else "published list", digest)


@dataclass
class EnvisionSettings:
    id: str = "pet37"
    """ID set whose names are shown to the model (see data.py), or a text file with a name a line."""
    task: Task = "far"
    """far, near or fine: which prompt (Fig. 3-5)."""
    variant: Variant = "resemble"
    """What the names shall be to the ID classes; the paper's is resemble (Table 23 has the others)."""
    n: int = 500
    """Names asked for (paper: 500; near: for each ID class, paper: 3)."""
    provider: Literal["endpoint", "local"] = "endpoint"
    """endpoint: any OpenAI-compatible server. local: a chat model folder for transformers."""
    url: str = "https://api.openai.com/v1"
    """Base address of the endpoint."""
    model: str = "gpt-3.5-turbo-16k"
    """Model name (paper: gpt-3.5-turbo-16k), or the folder of a local one."""
    key_variable: str = "OPENAI_API_KEY"
    """Environment variable that holds the key; the key itself is never written anywhere."""
    timeout: float = 120.0
    """Seconds to wait for an answer."""
    retries: int = 4
    """Tries after a failure that may pass (timeout, 429, 5xx, malformed answer)."""
    out: str = ""
    """Name file to write; default envisioned/made/<id>-<task>-<variant>.json. Raw answers go beside it."""


def _alone(out: Path):
    """A lock beside the name file: a second process would ask, and pay for, everything again."""
    out.parent.mkdir(parents=True, exist_ok=True)
    lock = open(out.with_name(f".{out.name}.lock"), "w")  # noqa: SIM115
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"another process is writing {out}; wait for it or choose another --out") from None
    return lock


def _whole(answers) -> bool:
    """{ID name or "all": [{"answer": text, ...}, ...]}"""
    return isinstance(answers, dict) and all(
        isinstance(turns, list) and all(isinstance(t, dict) and isinstance(t.get("answer"), str) for t in turns)
        for turns in answers.values()
    )


def main() -> None:
    import data
    import providers

    s = runs.parse(EnvisionSettings, __doc__)
    if s.n < 1 or s.retries < 0 or s.timeout <= 0:
        raise UserError("--n is at least 1, --retries at least 0, --timeout above 0")
    id_names = data.names_of(s.id)
    out = Path(s.out or runs.HERE / "envisioned" / "made" / f"{Path(s.id).stem}-{s.task}-{s.variant}.json")
    raw = out.with_suffix(".answers.json")
    about = {"id": s.id, "task": s.task, "variant": s.variant, "n": s.n, "model": s.model}
    if s.provider == "local":
        provider = providers.LocalModel(s.model)
    else:
        provider = providers.Endpoint(s.url, s.model, s.key_variable, s.timeout, s.retries)
    lock = _alone(out)  # noqa: F841 (held until the process ends)
    kept = runs.read_json(raw) if raw.is_file() else {"about": about, "answers": {}}
    if not isinstance(kept, dict) or kept.get("about") != about:
        raise UserError(f"{raw} holds answers to another question; delete it or choose another --out")
    if not _whole(kept.get("answers")):
        raise UserError(f"{raw} is damaged; mend it by hand or delete it to ask again")

    def save(answers: dict) -> None:
        runs.write_json(raw, {"about": about, "answers": answers})

    kind = KINDS.get(s.id, "object")
    answers = envision(provider, id_names, s.task, s.n, s.variant, kind, save, kept["answers"])
    read = {key: read_answers([t["answer"] for t in turns]) for key, turns in answers.items()}
    dropped = sum(sum(r.dropped.values()) for r in read.values())
    names = {key: r.names for key, r in read.items()} if s.task == "near" else read["all"].names
    made = {"made_by": s.model, "prompt": f"{s.task}/{s.variant}/1", "date": datetime.date.today().isoformat()}
    runs.write_json(out, {**about, **made, "names": names})
    left = clean([n for r in read.values() for n in r.names], id_names, s.task, s.variant)
    print(f"{out}: {sum(len(r.names) for r in read.values())} names, {len(left.names)} after cleaning {left.dropped}")
    print(f"{dropped} lines of the answers were no names; raw answers in {raw}")


if __name__ == "__main__":
    runs.command(main)

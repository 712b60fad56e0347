"""Names out of a language model's answers and out of files, and their cleaning before they are scored (Sec. 3.3)."""

import hashlib
import json
import re
from dataclasses import dataclass, field
from pathlib import Path

from lab import runs
from lab.runs import UserError

from names.prompts import Task, Variant

WORDS_MOST, LETTERS_MOST = 8, 60
WIDTH = 120  # columns of a name file

# One mark of a list item or two: `- 1. Snow leopard`. The second needs a space, as in no "3.5 mm jack".
BULLET = re.compile(
    r"^\s*(?:[-*•–—‣·]+|\(?\d{1,4}[.):]|\[\d+\])(?:\s+(?:[-*•–—‣·]+|\(?\d{1,4}[.):]|\[\d+\])(?=\s))?\s*(.*)$"
)


@dataclass
class Read:
    """Names in the order of the answers, and how many lines were left out and why."""

    names: list[str] = field(default_factory=list)
    dropped: dict[str, int] = field(default_factory=dict)

    def drop(self, why: str) -> None:
        self.dropped[why] = self.dropped.get(why, 0) + 1


def read_answers(answers: list[str], faithful: bool = False) -> Read:
    """Names out of raw answers; one that is no text is dropped and counted.

    faithful: the rule behind the printed numbers. Answers are joined without a line break (so the last name of one and
    the first of the next fuse), only lines that start with "- " count, nothing is stripped.
    Otherwise each answer is read by itself and other bullets, numbers, bold, quotes and explanations are understood.
    """
    out = Read()
    texts = [a for a in answers if isinstance(a, str)]
    for _ in range(len(answers) - len(texts)):
        out.drop("no text")
    if faithful:
        for line in "".join(texts).split("\n"):
            if line.startswith("- "):
                out.names.append(line[2:])
            elif line.strip():
                out.drop("no hyphen")
        return out
    for answer in texts:
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
    """A name file of this project ({"names": ...}), or one in the published layout ({task or ID name: [...]}).

    Blanks around a name go, and a name that is nothing else is refused; published lists stay as they are, since the
    printed numbers hold their blanks."""
    value = runs.read_json(path)
    own = isinstance(value, dict) and "names" in value
    groups = value.get("names", value) if isinstance(value, dict) else value
    groups = {"all": groups} if isinstance(groups, list) else groups
    if not isinstance(groups, dict) or not all(
        isinstance(g, list) and all(isinstance(x, str) for x in g) for g in groups.values()
    ):
        raise UserError(f"{path} holds no lists of names; expected {{'names': [...]}} or {{ID name: [...]}}")
    if own or isinstance(value, list):
        groups = {k: [" ".join(x.split()) for x in g] for k, g in groups.items()}
        if not all(map(all, groups.values())):
            raise UserError(f"{path} holds a name without a letter; take it out")
    digest = hashlib.sha256(json.dumps(groups, sort_keys=True).encode()).hexdigest()
    return Names(groups, str(value.get("made_by", "not stated")) if own else "published list", digest)


def layout(value: dict) -> str:
    """JSON text of a name or class list: a key of the object a line, long lists filled to WIDTH columns."""

    def one(x) -> str:
        return json.dumps(x, ensure_ascii=False)

    def filled(parts: list[str], marks: str) -> str:
        lines, line = [], " "
        for i, part in enumerate(parts):
            part += "," * (i + 1 < len(parts))
            if len(line) + 1 + len(part) > WIDTH and line.strip():
                lines, line = [*lines, line], " "
            line += " " + part
        return "\n".join([marks[0], *lines, line, " " + marks[1]])

    out = []
    for key, item in value.items():
        if isinstance(item, list) and item:
            text = filled([one(x) for x in item], "[]")
        elif isinstance(item, dict) and item:
            text = filled([f"{one(k)}: {one(v)}" for k, v in item.items()], "{}")
        else:
            text = one(item)
        out.append(f" {one(key)}: {text}")
    return "{\n" + ",\n".join(out) + "\n}\n"

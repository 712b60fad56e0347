"""Questions with yes/no and choice answers: POPE, RobustVQA, MMVP. Builders and readers; how answers are read
and scored stands in parsers.py."""

import csv
import json
import random
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lab.runs import UserError, command, parse, write_text

POPE_KINDS = ("random", "popular", "adversarial")
ROBUST_SETS = {"imagenet_a": "RobustVQA-A", "imagenet_r": "RobustVQA-R", "imagenet_v2": "RobustVQA-V"}
ROBUST_SEED = 8823


@dataclass(frozen=True)
class Question:
    """One benchmark item.

    `image` is whatever names the picture (file name, index, PIL image); `answer` the label; `group` the subset it is
    scored in; `pair` joins items that count together; `meta` carries ids and what a score needs besides the label.
    """

    image: Any
    question: str
    answer: str
    group: str = ""
    pair: str = ""
    meta: dict = field(default_factory=dict)


# ----------------------------------------------------------------------------------------------------------------- POPE


def ask_pope(name: str) -> str:
    """POPE's template with the article by the first letter, as the authors choose it."""
    return f"Is there {'an' if name[:1] in 'aeiou' else 'a'} {name} in the image?"


def build_pope(
    scene_lists: Sequence[Iterable[str]],
    names: Sequence[str],
    *,
    kind: str = "random",
    per_image: int = 3,
    images: int | None = 500,
    seed: int = 0,
) -> list[Question]:
    """POPE questions from the objects of each picture; `Question.image` is the picture's index in `scene_lists`.

    Of the pictures with at least `per_image` different objects, `images` are drawn (None: all, in order); each gives
    `per_image` present objects (label yes), each followed by an absent one (label no) that is chosen by `kind`:
    random = uniform over the names; popular = the most frequent name not yet asked; adversarial = the name that occurs
    most often together with the present one. Where no such name is left, a random one. Frequencies are counted over the
    drawn pictures, ties go to the name that appears first in them, as the authors' builder breaks them (a list of names
    is read in its order, a set in that of `names`), and no name is asked twice for a picture.

    Pictures and present objects depend on `seed` alone, so the three kinds ask about the same of them. UserError:
    unknown kind, a name outside `names`, too few pictures, or a picture without enough absent names.
    """
    if kind not in POPE_KINDS:
        raise UserError(f"POPE kind {kind} is unknown; use one of {', '.join(POPE_KINDS)}")
    if per_image < 1 or (images is not None and images < 1):
        raise UserError("POPE needs at least one question a picture and one picture")
    rank = {name: k for k, name in enumerate(names)}
    scenes = [
        sorted(s, key=lambda n: rank.get(n, 0)) if isinstance(s, set) else [*dict.fromkeys(s)] for s in scene_lists
    ]
    for k, scene in enumerate(scenes):
        unknown = [name for name in scene if name not in rank]
        if unknown:
            raise UserError(f"picture {k} holds {unknown[0]}, which is not among the {len(rank)} names")
    chosen = [k for k, scene in enumerate(scenes) if len(scene) >= per_image]
    draw = random.Random(f"pope {seed} pictures")
    if images is not None:
        if len(chosen) < images:
            raise UserError(f"{len(chosen)} pictures have {per_image} or more objects, {images} are wanted")
        chosen = draw.sample(chosen, images)
    count = Counter(name for k in chosen for name in scenes[k])
    together = {name: Counter() for name in rank}
    for k in chosen:
        for name in scenes[k]:
            together[name].update(other for other in scenes[k] if other != name)
    annotated = [name for name in names if count[name]]  # as the authors: names that occur in the drawn pictures
    popular = [n for n, _ in count.most_common()]
    near = {n: [m for m, _ in c.most_common()] for n, c in together.items()}

    negatives, out = random.Random(f"pope {seed} {kind}"), []
    for k in chosen:
        asked = set(scenes[k])  # present names are never asked as absent ones
        for j, present in enumerate(draw.sample(scenes[k], per_image)):
            ordered = {"random": [], "popular": popular, "adversarial": near[present]}[kind]
            absent = next((n for n in ordered if n not in asked), None)
            if absent is None:
                free = [n for n in annotated if n not in asked] or [n for n in names if n not in asked]
                if not free:
                    raise UserError(f"picture {k} has fewer than {per_image} absent names")
                absent = negatives.choice(free)
            asked.add(absent)
            for name, label in ((present, "yes"), (absent, "no")):
                meta = {"question_id": len(out) + 1, "object": name, "slot": j}
                out.append(Question(k, ask_pope(name), label, kind, "", meta))
    return out


def coco_scenes(path: Path) -> tuple[list[str], list[list[str]], list[str]]:
    """(file names, object names of each picture, all category names) of a COCO instances JSON; crowd regions count."""
    if not path.is_file():
        raise UserError(f"no file {path}; give COCO's instances JSON by --annotations (cocodataset.org)")
    data = _json(path)
    try:
        category = {c["id"]: c["name"] for c in data["categories"]}
        files = {i["id"]: i["file_name"] for i in data["images"]}
        found: dict[Any, dict] = {key: {} for key in files}
        for a in data["annotations"]:
            found[a["image_id"]][category[a["category_id"]]] = None
    except (KeyError, TypeError) as error:
        raise UserError(f"{path} is not a COCO instances file ({error!r})") from None
    return list(files.values()), [list(found[k]) for k in files], list(category.values())


def read_pope(path: Path, group: str = "") -> list[Question]:
    """A POPE question file: JSON lines (COCO) or one JSON array (A-OKVQA, GQA). UserError names a broken line."""
    text = _text(path)
    if text.lstrip().startswith("["):
        rows = list(enumerate(_json(path), 1))
    else:
        rows = []
        for number, line in enumerate(text.splitlines(), 1):
            if not line.strip():
                continue
            try:
                rows.append((number, json.loads(line)))
            except json.JSONDecodeError as error:
                raise UserError(f"{path}:{number}: not valid JSON ({error}); fetch the file again") from None
    out = []
    for number, row in rows:
        if not isinstance(row, dict) or not {"image", "text", "label"} <= {*row} or row["label"] not in ("yes", "no"):
            raise UserError(f"{path}:{number}: needs image, text and label yes or no; fetch the file again")
        meta = {"question_id": row.get("question_id", number)}
        out.append(Question(row["image"], row["text"], row["label"], group or path.stem, "", meta))
    if not out:
        raise UserError(f"{path} holds no question; fetch the file again")
    return out


def write_pope(path: Path, questions: Sequence[Question], files: Sequence[str] | None = None) -> None:
    """JSON lines in the official format; `files` turns picture indices into file names."""
    rows = [
        {
            "question_id": q.meta.get("question_id", k),
            "image": files[q.image] if files is not None else str(q.image),
            "text": q.question,
            "label": q.answer,
        }
        for k, q in enumerate(questions, 1)
    ]
    write_text(path, "".join(json.dumps(r) + "\n" for r in rows))


# ------------------------------------------------------------------------------------------------------------ RobustVQA


def ask_robust(name: str) -> str:
    return f"Is {name} the main object in this image?"


def build_robustvqa(
    mined: dict[str, list[dict]], *, seed: int = ROBUST_SEED, underscores: bool = True
) -> dict[str, list[Question]]:
    """Yes and no items of every mined picture, a shuffled list a subset.

    `mined` is the official JSON: {subset: [{file_name, gt_caption, error_caption}]}. Each picture gives "Is <true
    class> the main object" (yes) and the same with the mined class (no), so chance and always-yes are 50 %. The list is
    built in order and shuffled as Python's `random.seed(seed); random.shuffle(...)` does. `underscores=False` writes
    the class names with blanks.
    """
    out = {}
    for subset, rows in mined.items():
        items = []
        for k, row in enumerate(rows):
            for key, label in (("gt_caption", "yes"), ("error_caption", "no")):
                name = row[key] if underscores else row[key].replace("_", " ")
                meta = {"object": name, "item": k}
                items.append(Question(row["file_name"], ask_robust(name), label, subset, f"{subset}-{k}", meta))
        random.Random(seed).shuffle(items)
        out[subset] = items
    return out


def build_choice(mined: dict[str, list[dict]], *, right_first: bool) -> dict[str, list[Question]]:
    """Table 9's multiple choice: the same mined pictures, the two names as a list in a fixed order; the answer is the
    name."""
    out = {}
    for subset, rows in mined.items():
        items = []
        for k, row in enumerate(rows):
            names = [row["gt_caption"], row["error_caption"]]
            listed = names if right_first else names[::-1]
            text = f"What is the main object in this image? Choose from the following list:[{listed[0]}, {listed[1]}]"
            meta = {"options": listed, "item": k}
            items.append(Question(row["file_name"], text, row["gt_caption"], subset, f"{subset}-{k}", meta))
        out[subset] = items
    return out


# ----------------------------------------------------------------------------------------------------------------- MMVP


def build_mmvp(pairs: Iterable[Sequence[tuple]], group: str = "mmvp") -> list[Question]:
    """Questions in pairs, each pair two (image, question, answer[, options]); a pair counts when both are right."""
    out = []
    for k, pair in enumerate(pairs):
        if len(pair) != 2:
            raise UserError(f"MMVP pair {k} has {len(pair)} questions instead of 2")
        for j, (image, question, answer, *rest) in enumerate(pair):
            meta = {"question_id": 2 * k + j + 1} | ({"options": rest[0]} if rest else {})
            out.append(Question(image, question, answer, group, f"{group}-{k}", meta))
    return out


def read_mmvp(folder: Path) -> list[Question]:
    """MMVP as published: Questions.csv (Index, Question, Options, Correct Answer) and `MMVP Images/<k>.jpg`;
    consecutive rows are a pair."""
    rows = _csv(folder / "Questions.csv", ("Question", "Options", "Correct Answer"))
    if len(rows) % 2:
        raise UserError(f"{folder / 'Questions.csv'} has an odd number of questions; fetch it again")
    items = []
    for k, row in enumerate(rows, 1):
        choices = split_options(row["Options"])
        answer = row["Correct Answer"].strip()
        if len(choices) < 2 or answer not in [c[0] for c in choices]:
            raise UserError(f"{folder / 'Questions.csv'}: question {k} has no answer {answer} among {row['Options']}")
        image = f"MMVP Images/{row.get('Index') or k}.jpg"
        items.append((image, f"{row['Question'].strip()} {row['Options'].strip()}", answer, choices))
    return build_mmvp(zip(items[::2], items[1::2], strict=True))


def split_options(text: str) -> list[tuple[str, str]]:
    """'(a) Open (b) Closed' -> [('(a)', 'Open'), ('(b)', 'Closed')]."""
    parts = text.replace("(", "\n(").split("\n")
    return [(p[:3], p[3:].strip()) for p in map(str.strip, parts) if len(p) > 3 and p[0] == "(" and p[2] == ")"]


# ---------------------------------------------------------------------------------------------------------------- files


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"no file {path}; see the README for what to place where, or give another --data-dir") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text ({error.reason}); fetch it again") from None


def _json(path: Path) -> Any:
    try:
        return json.loads(_text(path))
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not valid JSON ({error}); fetch it again") from None


def _csv(path: Path, needed: Sequence[str]) -> list[dict]:
    reader = csv.DictReader(_text(path).lstrip("\ufeff").splitlines())
    gone = [c for c in needed if c not in (reader.fieldnames or [])]
    if gone:
        raise UserError(f"{path}: no column {gone[0]}; columns are {', '.join(reader.fieldnames or ['none'])}")
    return [{k: v or "" for k, v in row.items() if k} for row in reader]


# -------------------------------------------------------------------------------------------------------------- command


@dataclass
class BuildSettings:
    """Build the three POPE question lists from a COCO instances file: python -m evaluation.benchmarks"""

    annotations: str
    """COCO instances JSON, e.g. instances_val2014.json."""
    out: str = "data/deem/pope"
    """Folder for coco_pope_{random,popular,adversarial}.json."""
    images: int = 500
    """Pictures to ask about (POPE: 500)."""
    per_image: int = 3
    """Present and absent objects a picture (POPE: 3)."""
    seed: int = 0
    """Seed of the draws; the published lists' is not known."""


def main() -> None:
    s = parse(BuildSettings, BuildSettings.__doc__)
    files, scenes, names = coco_scenes(Path(s.annotations))
    for kind in POPE_KINDS:
        found = build_pope(scenes, names, kind=kind, per_image=s.per_image, images=s.images, seed=s.seed)
        path = Path(s.out) / f"coco_pope_{kind}.json"
        write_pope(path, found, files)
        print(f"{path}: {len(found)} questions")


if __name__ == "__main__":
    command(main)

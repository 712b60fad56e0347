"""The benchmarks by name: which sets they have, where their files lie, how they are asked and scored."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from lab.runs import UserError

from evaluation import benchmarks as bm
from evaluation import robustvqa, vqa
from evaluation.benchmarks import Question


@dataclass(frozen=True)
class Set:
    """One column of a table: its questions, how they are asked and scored.

    `kind`: yesno, choice, name (Table 9), vqa, vizwiz, exact, rank, caption, paragraph, region, draw.
    `images` is joined to a question's image below `<data-dir>/deem`.
    """

    label: str
    load: Callable[[Path], list[Question]]
    kind: str
    images: str = ""


def _pope(file: str) -> Callable[[Path], list[Question]]:
    return lambda root: bm.read_pope(root / "pope" / f"{file}.json", file)


def _robust(subset: str, order: str = "") -> Callable[[Path], list[Question]]:
    def load(root: Path) -> list[Question]:
        path = root / "robustvqa" / robustvqa.FILE
        if not path.is_file():
            raise UserError(
                f"no file {path}; mine it with mining.py, or place the annotation of the official repository"
            )
        mined = robustvqa.read_robustvqa(path)
        if subset not in mined:
            raise UserError(f"{path} has no items of {subset}; mine it again")
        part = {subset: mined[subset]}
        if order:
            return bm.build_choice(part, right_first=order == "right")[subset]
        return bm.build_robustvqa(part)[subset]

    return load


def _mmvp(root: Path) -> list[Question]:
    return bm.read_mmvp(root / "mmvp")


COCO = "coco/val2014"
BENCHMARKS: dict[str, list[Set]] = {
    "pope": [Set(f"POPE-{k.capitalize()}", _pope(f"coco_pope_{k}"), "yesno", COCO) for k in bm.POPE_KINDS],
    "pope-2910": [Set("POPE-Random (2910)", _pope("coco_pope_random_2910"), "yesno", COCO)],
    "pope-aokvqa": [
        Set(f"A-OKVQA-POPE-{k.capitalize()}", _pope(f"aokvqa_pope_seem_{k}"), "yesno", COCO) for k in bm.POPE_KINDS
    ],
    "pope-gqa": [
        Set(f"GQA-POPE-{k.capitalize()}", _pope(f"gqa_pope_seem_{k}"), "yesno", "gqa/images") for k in bm.POPE_KINDS
    ],
    "robustvqa": [Set(label, _robust(key), "yesno") for key, label in bm.ROBUST_SETS.items()],
    "robustvqa-wrong-first": [Set(label, _robust(key, "wrong"), "name") for key, label in bm.ROBUST_SETS.items()],
    "robustvqa-right-first": [Set(label, _robust(key, "right"), "name") for key, label in bm.ROBUST_SETS.items()],
    "mmvp": [Set("MMVP", _mmvp, "choice", "mmvp")],
    "vqav2": [Set("VQAv2", vqa.vqav2, "vqa")],
    "okvqa": [Set("OKVQA", vqa.okvqa, "vqa")],
    "vizwiz": [Set("VizWiz", vqa.vizwiz, "vizwiz")],
    "gqa": [Set("GQA", vqa.gqa, "exact")],
    "visdial": [Set("VisDial", vqa.visdial, "rank")],
    "coco": [Set("COCO", vqa.coco_captions, "caption")],
    "i2p": [Set("Image2Paragraph", vqa.paragraphs, "paragraph")],
    "refcocog": [Set("RefCOCOg val", vqa.refcocog, "region")],
    "fid-coco": [Set("MS-COCO val-30K", vqa.coco30k, "draw")],
    "fid-lncoco": [Set("LN-COCO val", vqa.lncoco, "draw")],
}
SETTINGS_OF = {"robustvqa-wrong-first": "choice [wrong, right]", "robustvqa-right-first": "choice [right, wrong]"}
# Splits and lists that are not those of the paper's numbers.
SPLITS = {"vqav2": ["val2014"], "vizwiz": ["val"], "fid-coco": ["own list of captions"]}
POPE_DIGESTS = {  # the published question files, by `digest`
    "aokvqa_pope_seem_adversarial": "1b1a2923ea71a073",
    "aokvqa_pope_seem_popular": "3ed1f87d29e8bfd1",
    "aokvqa_pope_seem_random": "6abd89ba308609c9",
    "coco_pope_adversarial": "90a05b95734e6e6c",
    "coco_pope_popular": "2c7e936b1b96db62",
    "coco_pope_random": "4a3148335ef4322f",
    "coco_pope_random_2910": "37b1597b4bd8b8df",
    "gqa_pope_seem_adversarial": "1fc65ed563d98765",
    "gqa_pope_seem_popular": "a7ee258943e64a63",
    "gqa_pope_seem_random": "eec839e21e989ee3",
}


def questions_of(s, one: Set, root: Path) -> list[Question]:
    """The questions of a set with image paths joined and checked; pairs stay whole under --items."""
    found = one.load(root)
    if not found:
        raise UserError(f"{one.label} has no question in {root}")
    if s.items:
        n = s.items
        if one.kind == "choice":
            n += n % 2
        found = found[:n]
    gone = sorted({str(q.image) for q in found if not (root / one.images / str(q.image)).is_file()})
    if gone:
        raise UserError(
            f"{one.label}: {len(gone)} pictures are missing, the first is {root / one.images / gone[0]}; place them "
            "there (see the README) or give another --data-dir"
        )
    return found


def digest(questions: Sequence[Question]) -> str:
    rows = [[str(q.image), q.question, q.answer] for q in questions]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def variant_of(s, name: str, one: Set, questions: Sequence[Question], root: Path) -> str:
    """What of a set is not the paper's; "paper" when nothing is known to differ."""
    words = []
    if s.items:
        words.append(f"first {s.items}")
    elif name.startswith("pope") and digest(questions)[:16] != POPE_DIGESTS.get(questions[0].group):
        words.append("own questions")
    if name.startswith("robustvqa"):  # the published annotation's contents are not known
        words.append("mined here" if (root / "robustvqa" / "report.json").is_file() else "annotation as placed")
    words += SPLITS.get(name, [])
    if one.kind in ("caption", "paragraph", "region") and s.tokenize == "plain":
        words.append("plain tokenizer")
    return ", ".join(words) or "paper"

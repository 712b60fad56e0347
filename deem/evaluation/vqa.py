"""Readers of the question, dialog, caption and drawing sets of Table 2, 6 and 7, each as published on disk.

Each returns a list of `benchmarks.Question`; image paths are relative to the data set folder `<data-dir>/deem`.
"""

import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from lab.runs import UserError

from documents.readers import region_mask
from evaluation.benchmarks import Question, _json, _text

BROKEN = (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError)


def _broken(path: Path, error: Exception) -> UserError:
    return UserError(f"{path} does not have the published format ({error!r}); fetch it again")


def _checked(path: Path, found: list[Question]) -> list[Question]:
    """The questions; UserError where one has something else than text in place of its words."""
    for k, q in enumerate(found):
        words = (q.image, q.question, q.answer, *q.meta.get("references", ()), *q.meta.get("options", ()))
        if not all(isinstance(w, str) for w in (*words, q.meta.get("caption", ""))):
            raise UserError(f"{path}: entry {k} lacks words of its picture, question or answer; fetch it again")
    return found


def read_vqa(questions: Path, annotations: Path, images: str, group: str) -> list[Question]:
    """VQAv2 or OK-VQA: the ten annotators' answers stand in `meta["answers"]`; the answer is the most frequent one."""
    asked, told = _json(questions), _json(annotations)
    try:
        answers = {a["question_id"]: a for a in told["annotations"]}
        out = []
        for q in asked["questions"]:
            a = answers.get(q["question_id"])
            if a is None:
                raise UserError(f"{annotations} has no answer for question {q['question_id']}; fetch it again")
            ten = [str(x["answer"]) for x in a["answers"]]
            best = a.get("multiple_choice_answer") or max(ten, key=ten.count)
            image = images.format(q["image_id"])
            meta = {"question_id": q["question_id"], "answers": ten, "type": a.get("answer_type", "")}
            out.append(Question(image, q["question"], best, group, "", meta))
        return _checked(questions, out)
    except BROKEN as error:
        raise _broken(questions, error) from None


def vqav2(root: Path) -> list[Question]:
    folder = root / "vqav2"
    return read_vqa(
        folder / "v2_OpenEnded_mscoco_val2014_questions.json",
        folder / "v2_mscoco_val2014_annotations.json",
        "coco/val2014/COCO_val2014_{:012d}.jpg",
        "vqav2",
    )


def okvqa(root: Path) -> list[Question]:
    folder = root / "okvqa"
    return read_vqa(
        folder / "OpenEnded_mscoco_val2014_questions.json",
        folder / "mscoco_val2014_annotations.json",
        "coco/val2014/COCO_val2014_{:012d}.jpg",
        "okvqa",
    )


def vizwiz(root: Path) -> list[Question]:
    """VizWiz-VQA val: a list of {image, question, answers}; many answers are "unanswerable"."""
    path, out = root / "vizwiz" / "val.json", []
    try:
        for k, row in enumerate(_json(path)):
            ten = [str(a["answer"]) for a in row["answers"]]
            meta = {"question_id": k, "answers": ten, "type": row.get("answer_type", "")}
            image = f"vizwiz/val/{row['image']}"
            out.append(Question(image, row["question"], max(ten, key=ten.count), "vizwiz", "", meta))
    except BROKEN as error:
        raise _broken(path, error) from None
    return _checked(path, out)


def gqa(root: Path) -> list[Question]:
    """GQA testdev balanced: {id: {question, answer, imageId}}, or the flat list of the released code."""
    path = root / "gqa" / "testdev_balanced_questions.json"
    rows, out = _json(path), []
    try:
        items = rows.items() if isinstance(rows, dict) else ((r["question_id"], r) for r in rows)
        for key, row in items:
            name = row["image"] if "image" in row else f"{row['imageId']}.jpg"
            out.append(Question(f"gqa/images/{name}", row["question"], row["answer"], "gqa", "", {"question_id": key}))
    except BROKEN as error:
        raise _broken(path, error) from None
    return _checked(path, out)


def visdial(root: Path) -> list[Question]:
    """VisDial v1.0 val with dense annotations: one question a dialog, that of the annotated round; 100 options and
    their relevance stand in `meta`."""
    path = root / "visdial" / "visdial_1.0_val.json"
    dense = root / "visdial" / "visdial_1.0_val_dense_annotations.json"
    data, out = _json(path), []
    try:
        asked, answers = data["data"]["questions"], data["data"]["answers"]
        dialogs = {d["image_id"]: d for d in data["data"]["dialogs"]}
        for k, row in enumerate(_json(dense)):
            d, number = dialogs[row["image_id"]], int(row["round_id"]) - 1
            relevance = [float(x) for x in (row["gt_relevance"] if "gt_relevance" in row else row["relevance"])]
            this = d["dialog"][number]
            options = [answers[i] for i in this["answer_options"]]
            if not all(0 <= x <= 1 for x in relevance) or this.get("gt_index", 0) not in range(len(options)):
                raise ValueError(f"relevance or gt_index of entry {k}")
            if len(options) != len(relevance):
                raise UserError(f"{dense}: entry {k} has {len(relevance)} relevances for {len(options)} options")
            turns = [(asked[t["question"]] + "?", answers[t["answer"]] + ".") for t in d["dialog"][:number]]
            meta = {"caption": d["caption"], "turns": turns, "options": options, "relevance": relevance}
            image = f"visdial/VisualDialog_val2018/VisualDialog_val2018_{row['image_id']:012d}.jpg"
            meta |= {"question_id": row["image_id"], "right": this.get("gt_index")}
            out.append(
                Question(image, asked[this["question"]] + "?", options[this.get("gt_index", 0)], "visdial", "", meta)
            )
    except BROKEN as error:
        raise _broken(path, error) from None
    return _checked(path, out)


def coco_captions(root: Path) -> list[Question]:
    """COCO Karpathy test split out of `dataset_coco.json`; five references a picture in `meta["references"]`."""
    path, out = root / "coco" / "annotations" / "dataset_coco.json", []
    try:
        for row in _json(path)["images"]:
            if row["split"] == "test":
                said = [s["raw"].strip() for s in row["sentences"]]
                image = f"coco/{row['filepath']}/{row['filename']}"
                meta = {"question_id": row["cocoid"], "references": said}
                out.append(Question(image, "", said[0], "coco", "", meta))
    except BROKEN as error:
        raise _broken(path, error) from None
    return _checked(path, out)


def paragraphs(root: Path) -> list[Question]:
    """Image2Paragraph test split: paragraphs_v1.json and test_split.json beside the Visual Genome pictures."""
    path = root / "vg" / "paragraphs_v1.json"
    try:
        test, out = set(_json(root / "vg" / "test_split.json")), []
        for row in _json(path):
            if row["image_id"] in test:
                folder = next((f for f in ("VG_100K", "VG_100K_2") if f in row.get("url", "").split("/")), "VG_100K")
                meta = {"question_id": row["image_id"], "references": [row["paragraph"].strip()]}
                image = f"vg/{folder}/{row['image_id']}.jpg"
                out.append(Question(image, "", row["paragraph"].strip(), "i2p", "", meta))
    except BROKEN as error:
        raise _broken(path, error) from None
    return _checked(path, out)


def refcocog(root: Path) -> list[Question]:
    """RefCOCOg val as COCO-style JSON: all captions of one object are the references of its masked picture."""
    path = root / "coco" / "annotations" / "finetune_refcocog_val.json"
    data, found = _json(path), {}
    try:
        images = {i["id"]: i for i in data["images"]}
        for a in data["annotations"]:
            image = images[a["image_id"]]
            caption = str(a.get("caption") or image["caption"]).strip()
            key = (image.get("original_id", image["file_name"]), a.get("original_id", a["id"]))
            if key in found:
                found[key].meta["references"].append(caption)
                continue
            shape = {"segmentation": a["segmentation"], "height": image["height"], "width": image["width"]}
            meta = {"question_id": a["id"], "references": [caption], **shape}
            found[key] = Question(f"coco/train2014/{image['file_name']}", "", caption, "refcocog", "", meta)
    except BROKEN as error:
        raise _broken(path, error) from None
    return _checked(path, list(found.values()))


def mask_of(q: Question):
    """[H, W] bool mask of a region question, None for the others."""
    if "segmentation" not in q.meta:
        return None
    return region_mask(q.meta["segmentation"], q.meta["height"], q.meta["width"], f"question {q.meta['question_id']}")


def coco30k(root: Path, n: int = 30_000, seed: int = 0) -> list[Question]:
    """Captions to draw for the COCO FID: one caption of each of `n` val2014 pictures, drawn by `seed` (the paper's own
    list is not known). `image` is the real picture."""
    path, by_image = root / "coco" / "annotations" / "captions_val2014.json", {}
    data = _json(path)
    try:
        files = {i["id"]: i["file_name"] for i in data["images"]}
        for a in sorted(data["annotations"], key=lambda a: a["id"]):
            by_image.setdefault(a["image_id"], []).append(a["caption"].strip())
        keys = [k for k in sorted(by_image) if files[k]]  # a KeyError for a caption of no picture
    except BROKEN as error:
        raise _broken(path, error) from None
    draw = random.Random(f"coco30k {seed}")
    chosen = draw.sample(keys, min(n, len(keys)))
    return [
        Question(f"coco/val2014/{files[k]}", "", draw.choice(by_image[k]), "coco30k", "", {"question_id": k})
        for k in chosen
    ]


def lncoco(root: Path) -> list[Question]:
    """Localized Narratives of COCO val: JSON lines with image_id and caption."""
    path, out = root / "lncoco" / "coco_val_localized_narratives.jsonl", []
    for number, line in enumerate(_text(path).splitlines(), 1):
        try:
            row = json.loads(line)
            image = f"coco/val2017/{int(row['image_id']):012d}.jpg"
            out.append(Question(image, "", row["caption"].strip(), "lncoco", "", {"question_id": number}))
        except BROKEN as error:
            raise UserError(f"{path}:{number}: not a narrative ({error!r}); fetch it again") from None
    return _checked(path, out)


SETS: dict[str, Callable[[Path], list[Question]]] = {
    "vqav2": vqav2,
    "okvqa": okvqa,
    "vizwiz": vizwiz,
    "gqa": gqa,
    "visdial": visdial,
    "coco": coco_captions,
    "i2p": paragraphs,
    "refcocog": refcocog,
    "coco30k": coco30k,
    "lncoco": lncoco,
}


def for_training(items: list[Question], image_root: str = "") -> list[Question]:
    """The same questions for `readers.questions`: images joined to a root."""
    return [replace(q, image=str(Path(image_root) / str(q.image))) for q in items]

"""Readers of pages, conversations and regions on small files."""

import gzip
import json

from lab.runs import UserError

import numpy as np
import pytest
from test_readers import take

from documents import readers
from documents.readers import Text

SQUARE = [[1, 1, 5, 1, 5, 4, 1, 4]]


def page(n_images: int, sims=None, sentences=4) -> dict:
    sims = sims or [0.3] * n_images
    infos = [
        {"image_name": f"{k}.png", "matched_text_index": k % sentences, "matched_sim": s}
        for k, s in zip(range(n_images), sims, strict=True)
    ]
    return {"text_list": [f"Sentence {k}. " for k in range(sentences)], "image_info": infos, "similarity_matrix": []}


def lines(path, rows) -> object:
    text = "".join(json.dumps(r) + "\n" for r in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def test_mmc4_filters(tmp_path):
    rows = [page(3, [0.23, 0.24, 0.5]), page(2, [0.1, 0.2]), page(12, sentences=20)]
    reader = readers.mmc4([lines(tmp_path / "a.jsonl.gz", rows)], tmp_path, shuffle=False, keep_single=1.0)
    first, second, again = take(reader, 3)
    assert [str(p.source) for p in first.pictures] == [str(tmp_path / "1.png"), str(tmp_path / "2.png")]
    assert first.text.count("Sentence") == 4
    kept = [int(p.source.stem) for p in second.pictures]
    assert len(kept) == 6 and kept == sorted(kept)  # a random subset in the original order
    assert len({tuple(p.source.stem for p in d.pictures) for d in take(reader, 12)}) > 2  # another one each epoch
    assert len(again.pictures) == 2


def test_mmc4_sentences_and_pictures_stand_in_order(tmp_path):
    reader = readers.mmc4([lines(tmp_path / "a.jsonl", [page(2, sentences=3)])], tmp_path)
    sides = set()
    for document in take(reader, 40):
        shown = "".join(p.text if isinstance(p, Text) else f"<{p.source.stem}>" for p in document.parts)
        assert (
            shown.replace("<0>", "|").replace("<1>", "|").replace("|", " ").split()
            == "Sentence 0. Sentence 1. Sentence 2.".split()
        )
        assert " <" not in shown and "> " not in shown  # no blank beside a picture
        sides.add(shown)
        for k in (0, 1):
            at = shown.index(f"<{k}>")
            assert shown[:at].count("Sentence") in (k, k + 1)
    assert len(sides) == 4  # each picture on either side


def test_half_of_the_single_picture_pages_are_kept(tmp_path):
    rows = [{**page(1), "text_list": [f"page number {k}"]} for k in range(300)]
    path = lines(tmp_path / "a.jsonl", rows)
    reader = readers.mmc4([path], tmp_path, window=50)
    names = []
    while reader.state()["epoch"] == 0:
        names.append(next(reader).name)
    assert 0.4 < (len(names) - 1) / 300 < 0.6
    with pytest.raises(UserError, match="passes the filters"):
        next(readers.mmc4([path], tmp_path, keep_single=0.0))


def test_broken_mmc4_lines_are_named_by_number(tmp_path):
    path = tmp_path / "a.jsonl"
    for bad, words in (
        ("{half", "is not valid JSON"),
        ('{"text_list": []}', "is not an MMC4 document"),
        (json.dumps({**page(1), "text_list": []}), "puts a picture at sentence 0 of 0"),
    ):
        path.write_text(json.dumps(page(2)) + "\n" + bad + "\n")
        with pytest.raises(UserError, match=rf"a\.jsonl:2 {words}"):
            take(readers.mmc4([path], tmp_path, shuffle=False), 2)
    (tmp_path / "b.jsonl.gz").write_bytes(lines(tmp_path / "c.jsonl.gz", [page(2)] * 9).read_bytes()[:-12])
    with pytest.raises(UserError, match="b.jsonl.gz is damaged after line"):
        take(readers.mmc4([tmp_path / "b.jsonl.gz"], tmp_path), 9)


def talk(*pairs, image: str | None = "x.jpg") -> dict:
    turns = [t for q, a in pairs for t in ({"from": "human", "value": q}, {"from": "gpt", "value": a})]
    return {"id": "1", "conversations": turns} | ({"image": image} if image else {})


def test_llava_rounds_and_what_is_learned(tmp_path):
    items = [talk(("<image>\nWhat?", "A cat."), ("Where?", "Here.")), talk(("No picture?", "No."), image=None)]
    (tmp_path / "l.json").write_text(json.dumps(items))
    single = readers.llava665k(tmp_path / "l.json", tmp_path, shuffle=False)
    first, second, third = take(single, 3)
    assert first.text == "Based on the image, please answer the question. What?. The answer is: A cat."
    assert second.text.endswith("Where?. The answer is: Here.") and third.text == first.text
    assert [p.text for p in first.parts if isinstance(p, Text) and p.learn] == [" A cat."]
    assert first.pictures[0].source == tmp_path / "x.jpg" and "item 0 round 1" in second.name
    whole = next(readers.llava665k(tmp_path / "l.json", tmp_path, form="code", rounds="all"))
    assert len(whole.pictures) == 1 and "<image>" not in whole.text
    assert [p.text for p in whole.parts if isinstance(p, Text) and p.learn] == [" A cat.", " Here."]
    assert "## USER: Where?\n ## ASSISTANT: The answer is" in whole.text


def test_broken_conversations_are_named(tmp_path):
    path = tmp_path / "l.json"
    for bad in (
        {"image": "x", "conversations": []},
        talk(("q", "a")) | {"conversations": [{"from": "gpt"}]},
        7,
        {"image": "x"},
    ):
        path.write_text(json.dumps([talk(("fine", "yes")), bad]))
        with pytest.raises(UserError, match="l.json item 1 is not a conversation"):
            take(readers.llava665k(path, tmp_path, shuffle=False), 2)
    path.write_text('{"a": 1}')
    with pytest.raises(UserError, match="is not a list of items"):
        next(readers.llava665k(path, tmp_path))
    with pytest.raises(UserError, match="no file .*gone.json"):
        next(readers.llava665k(tmp_path / "gone.json", tmp_path))
    with pytest.raises(UserError, match="rounds are to be"):
        readers.llava665k(path, tmp_path, rounds="two")


def test_pictures_that_are_no_pictures_names_are_told(tmp_path):
    import pyarrow as pa
    from pyarrow import parquet

    (tmp_path / "l.json").write_text(json.dumps([{**talk(("q", "a")), "image": None}]))
    with pytest.raises(UserError, match="l.json item 0 is not a conversation"):
        next(readers.llava665k(tmp_path / "l.json", tmp_path))
    parquet.write_table(pa.table({"image": [3], "caption": ["a long caption"]}), tmp_path / "p.parquet")
    with pytest.raises(UserError, match="p.parquet:1 has no picture"):
        next(readers.captions_parquet([tmp_path / "p.parquet"]))
    odd = page(2)
    odd["image_info"][0]["matched_text_index"] = float("inf")
    with pytest.raises(UserError, match="m.jsonl:1 is not an MMC4 document"):
        next(readers.mmc4([lines(tmp_path / "m.jsonl", [odd])], tmp_path))


def test_benchmark_questions_become_training_documents(tmp_path):
    from evaluation.benchmarks import Question

    items = [Question("a.jpg", f"What is {k}", f"thing {k}", "okvqa") for k in range(3)]
    made = take(readers.questions(items, tmp_path, shuffle=False), 4)
    assert made[1].text.endswith("What is 1. The answer is: thing 1") and made[3].text == made[0].text
    assert made[0].pictures[0].source == tmp_path / "a.jpg"


def test_region_captions_in_coco_form(tmp_path):
    data = {
        "images": [{"id": 3, "file_name": "i.jpg", "height": 6, "width": 8, "caption": "the left one"}],
        "annotations": [
            {"image_id": 3, "segmentation": SQUARE},
            {"image_id": 3, "segmentation": SQUARE, "caption": "own words"},
        ],
    }
    (tmp_path / "r.json").write_text(json.dumps(data))
    first, second = take(readers.regions(tmp_path / "r.json", tmp_path, shuffle=False), 2)
    assert first.text.endswith(" the left one") and second.text.endswith(" own words")
    whole, region = first.pictures
    assert whole.mask is None and region.mask.shape == (6, 8) and region.mask.sum() == 12 and region.mask[2, 3]
    assert [p.text for p in first.parts if isinstance(p, Text) and p.learn] == [" the left one"]
    data["annotations"][0]["image_id"] = 9
    (tmp_path / "r.json").write_text(json.dumps(data))
    with pytest.raises(UserError, match="not a COCO-style file"):
        next(readers.regions(tmp_path / "r.json", tmp_path))


def test_region_conversations_in_ospreys_form(tmp_path):
    from pycocotools import mask as coco

    code = coco.encode(np.asfortranarray(np.eye(6, 8, dtype=np.uint8)))
    item = {
        "file_name": "i.jpg", "height": 6, "width": 8,
        "annotation": [{"segmentation": SQUARE}, {"segmentation": {**code, "counts": code["counts"].decode()}}],
        "conversations": [
            {"from": "human", "value": "<image>\nIs <region1> left of <region2>?"}, {"from": "gpt", "value": "Yes."},
        ],
    }  # fmt: skip
    (tmp_path / "o.json").write_text(json.dumps([item]))
    made = next(readers.regions(tmp_path / "o.json", tmp_path))
    shown = [p.text if isinstance(p, Text) else "-" if p.mask is None else int(p.mask.sum()) for p in made.parts]
    assert shown == ["-", "Is ", 12, " left of ", 6, "?", " Yes."]
    assert [p.text for p in made.parts if isinstance(p, Text) and p.learn] == [" Yes."]
    item["conversations"][0]["value"] = "<region3>?"
    (tmp_path / "o.json").write_text(json.dumps([item]))
    with pytest.raises(UserError, match="names region 3 of 2"):
        next(readers.regions(tmp_path / "o.json", tmp_path))
    for bad in ({"counts": "x", "size": [1]}, "mask", {"size": [2, 2]}):
        with pytest.raises(UserError, match="has no readable segmentation"):
            readers.region_mask(bad, 6, 8)
    for bad in (float("nan"), float("inf"), -1e9, None):  # these end the process in pycocotools, or mark nothing
        with pytest.raises(UserError, match="has no readable segmentation"):
            readers.region_mask([[1, 1, 5, 1, 5, bad, 1, 4]], 6, 8)
    assert readers.region_mask([[-3, -3, 50, -3, 50, 50, -3, 50]], 6, 8).all()  # outlines may leave the picture
    with pytest.raises(UserError, match="mask of"):
        readers.region_mask(code, 7, 8)

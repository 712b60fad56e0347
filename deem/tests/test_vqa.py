"""The published files of Table 2, 6 and 7 in miniature."""

import json

from lab.runs import UserError

import pytest

from evaluation import vqa
from evaluation.benchmarks import Question


def put(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(value if isinstance(value, str) else json.dumps(value))


def ten(*words):
    return [{"answer": w, "answer_id": k} for k, w in enumerate(words, 1)]


def test_vqav2_and_okvqa(tmp_path):
    asked = {"questions": [{"question_id": 10, "image_id": 7, "question": "What?"}]}
    told = {
        "annotations": [{"question_id": 10, "image_id": 7, "answers": ten("cat", "cat", "dog"), "answer_type": "other"}]
    }
    put(tmp_path / "vqav2" / "v2_OpenEnded_mscoco_val2014_questions.json", asked)
    put(tmp_path / "vqav2" / "v2_mscoco_val2014_annotations.json", told)
    put(tmp_path / "okvqa" / "OpenEnded_mscoco_val2014_questions.json", asked)
    put(tmp_path / "okvqa" / "mscoco_val2014_annotations.json", told)
    for name in ("vqav2", "okvqa"):
        (q,) = vqa.SETS[name](tmp_path)
        assert (q.image, q.question, q.answer) == ("coco/val2014/COCO_val2014_000000000007.jpg", "What?", "cat")
        assert q.meta["answers"] == ["cat", "cat", "dog"]
    put(tmp_path / "vqav2" / "v2_mscoco_val2014_annotations.json", {"annotations": []})
    with pytest.raises(UserError, match="no answer for question 10"):
        vqa.vqav2(tmp_path)
    put(tmp_path / "okvqa" / "mscoco_val2014_annotations.json", {"wrong": 1})
    with pytest.raises(UserError, match="does not have the published format"):
        vqa.okvqa(tmp_path)


def test_vizwiz_and_gqa(tmp_path):
    put(
        tmp_path / "vizwiz" / "val.json",
        [{"image": "v.jpg", "question": "Colour?", "answers": ten("red", "blue", "blue")}],
    )
    (q,) = vqa.vizwiz(tmp_path)
    assert q.image == "vizwiz/val/v.jpg" and q.answer == "blue"
    path = tmp_path / "gqa" / "testdev_balanced_questions.json"
    put(path, {"05": {"question": "Left?", "answer": "yes", "imageId": "n12"}})
    (q,) = vqa.gqa(tmp_path)
    assert (q.image, q.answer, q.meta["question_id"]) == ("gqa/images/n12.jpg", "yes", "05")
    put(path, [{"question_id": 5, "image": "n12.jpg", "question": "Left?", "answer": "yes"}])
    assert vqa.gqa(tmp_path)[0].image == "gqa/images/n12.jpg"
    put(path, [{"question": "Left?"}])
    with pytest.raises(UserError, match="published format"):
        vqa.gqa(tmp_path)


def dialogs(options=(0, 1), relevance=(1.0, 0.0)):
    turn = {"question": 0, "answer": 1, "answer_options": [*options], "gt_index": 0}
    dialog = {"image_id": 3, "caption": "a dog", "dialog": [{**turn}, {**turn, "question": 1}]}
    data = {"questions": ["is it big", "is it red"], "answers": ["yes", "no"], "dialogs": [dialog]}
    return {"data": data}, [{"image_id": 3, "round_id": 2, "gt_relevance": [*relevance]}]


def test_visdial(tmp_path):
    data, dense = dialogs()
    put(tmp_path / "visdial" / "visdial_1.0_val.json", data)
    put(tmp_path / "visdial" / "visdial_1.0_val_dense_annotations.json", dense)
    (q,) = vqa.visdial(tmp_path)
    assert q.question == "is it red?" and q.meta["turns"] == [("is it big?", "no.")] and q.meta["caption"] == "a dog"
    assert q.meta["options"] == ["yes", "no"] and q.meta["relevance"] == [1.0, 0.0] and q.meta["right"] == 0
    assert q.image == "visdial/VisualDialog_val2018/VisualDialog_val2018_000000000003.jpg"
    put(tmp_path / "visdial" / "visdial_1.0_val_dense_annotations.json", dialogs(relevance=(1.0,))[1])
    with pytest.raises(UserError, match="has 1 relevances for 2 options"):
        vqa.visdial(tmp_path)


def test_captions_paragraphs_and_narratives(tmp_path):
    rows = [
        {
            "split": s,
            "filepath": "val2014",
            "filename": f"{s}.jpg",
            "cocoid": k,
            "sentences": [{"raw": "A dog. "}, {"raw": "Dog."}],
        }
        for k, s in enumerate(("test", "val", "restval"))
    ]
    put(tmp_path / "coco" / "annotations" / "dataset_coco.json", {"images": rows})
    (q,) = vqa.coco_captions(tmp_path)
    assert q.image == "coco/val2014/test.jpg" and q.meta["references"] == ["A dog.", "Dog."]
    put(tmp_path / "vg" / "test_split.json", [5])
    put(
        tmp_path / "vg" / "paragraphs_v1.json",
        [
            {"image_id": 5, "url": "https://x/VG_100K_2/5.jpg", "paragraph": " Long. "},
            {"image_id": 6, "url": "https://x/VG_100K/6.jpg", "paragraph": "Other"},
        ],
    )
    (q,) = vqa.paragraphs(tmp_path)
    assert q.image == "vg/VG_100K_2/5.jpg" and q.answer == "Long."
    put(tmp_path / "lncoco" / "coco_val_localized_narratives.jsonl", '{"image_id": "139", "caption": "In this."}\n')
    assert vqa.lncoco(tmp_path)[0].image == "coco/val2017/000000000139.jpg"
    put(tmp_path / "lncoco" / "coco_val_localized_narratives.jsonl", '{"image_id": "139"}\n')
    with pytest.raises(UserError, match="narratives.jsonl:1: not a narrative"):
        vqa.lncoco(tmp_path)


def test_captions_to_draw_are_one_a_picture_and_seeded(tmp_path):
    images = [{"id": k, "file_name": f"{k}.jpg"} for k in range(20)]
    notes = [{"id": 100 + 2 * k + j, "image_id": k, "caption": f"c{k} {j}"} for k in range(20) for j in range(2)]
    put(tmp_path / "coco" / "annotations" / "captions_val2014.json", {"images": images, "annotations": notes})
    first = vqa.coco30k(tmp_path, n=12)
    assert first == vqa.coco30k(tmp_path, n=12) != vqa.coco30k(tmp_path, n=12, seed=1)
    assert len({q.image for q in first}) == 12
    assert all(q.answer.startswith(f"c{q.image.split('/')[-1][:-4]} ") for q in first)
    assert {q.answer[-1] for q in vqa.coco30k(tmp_path)} == {"0", "1"}


def test_regions_join_the_captions_of_an_object(tmp_path):
    square = [[0, 0, 4, 0, 4, 3, 0, 3]]
    images = [
        {"id": k, "file_name": "i.jpg", "height": 5, "width": 6, "caption": c, "original_id": 77}
        for k, c in enumerate(("left cup", "the cup", "a plate"))
    ]
    notes = [{"id": k, "image_id": k, "segmentation": square, "original_id": o} for k, o in enumerate((1, 1, 2))]
    put(tmp_path / "coco" / "annotations" / "finetune_refcocog_val.json", {"images": images, "annotations": notes})
    cup, plate = vqa.refcocog(tmp_path)
    assert cup.meta["references"] == ["left cup", "the cup"] and plate.meta["references"] == ["a plate"]
    assert vqa.mask_of(cup).shape == (5, 6) and vqa.mask_of(cup).sum() == 12
    assert vqa.mask_of(Question("i", "q", "a")) is None


def test_questions_for_training_get_their_image_root():
    (q,) = vqa.for_training([Question("a.jpg", "q", "x")], "/data")
    assert q.image == "/data/a.jpg"


@pytest.mark.parametrize(
    "name, path, value",
    [
        ("gqa", "gqa/testdev_balanced_questions.json", {"5": {"question": "Left?", "answer": None, "imageId": "n"}}),
        ("gqa", "gqa/testdev_balanced_questions.json", {"5": {"question": None, "answer": "yes", "imageId": "n"}}),
        ("vizwiz", "vizwiz/val.json", [{"image": "v.jpg", "question": None, "answers": ten("red")}]),
        ("vizwiz", "vizwiz/val.json", [{"image": "v.jpg", "question": "Colour?", "answers": []}]),
        ("coco", "coco/annotations/dataset_coco.json",
         {"images": [{"split": "test", "filepath": "v", "filename": "f", "cocoid": 1, "sentences": [{"raw": None}]}]}),
        ("i2p", "vg/paragraphs_v1.json", [{"image_id": 5, "url": None, "paragraph": "a dog"}]),
        ("i2p", "vg/paragraphs_v1.json", [{"image_id": 5, "paragraph": None}]),
        ("coco30k", "coco/annotations/captions_val2014.json",
         {"images": [], "annotations": [{"id": 1, "image_id": 1, "caption": "a dog"}]}),
        ("lncoco", "lncoco/coco_val_localized_narratives.jsonl", '{"image_id": "5", "caption": null}'),
        ("lncoco", "lncoco/coco_val_localized_narratives.jsonl", '{"image_id": 1e999, "caption": "a dog"}'),
    ],
)  # fmt: skip
def test_files_that_lack_words_are_named(tmp_path, name, path, value):
    put(tmp_path / "vg" / "test_split.json", [5])
    put(tmp_path / path, value)
    with pytest.raises(UserError, match=path):
        vqa.SETS[name](tmp_path)


@pytest.mark.parametrize("relevance", [(1.0, "x"), (1.0, None), (1.0, -1.0), (1.0, float("nan"))])
def test_relevances_that_are_no_shares_are_told(tmp_path, relevance):
    data, dense = dialogs(relevance=relevance)
    put(tmp_path / "visdial" / "visdial_1.0_val.json", data)
    put(tmp_path / "visdial" / "visdial_1.0_val_dense_annotations.json", dense)
    with pytest.raises(UserError, match="published format"):
        vqa.visdial(tmp_path)
    data["data"]["dialogs"][0]["dialog"][1]["gt_index"] = 2
    put(tmp_path / "visdial" / "visdial_1.0_val.json", data)
    put(tmp_path / "visdial" / "visdial_1.0_val_dense_annotations.json", dialogs()[1])
    with pytest.raises(UserError, match="gt_index"):
        vqa.visdial(tmp_path)

"""Questions put to a model: batches, logs, resume, what each kind of score needs; drawings."""

import json
from collections import Counter

from lab.runs import UserError

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from documents.readers import Picture
from evaluation import asking, drawing, sets
from evaluation.benchmarks import Question
from scenes.world import to_picture
from settings import EvalSettings
from streams import stream


class Oracle:
    """Stands for a model: says yes for pictures with an even number, and counts what it encodes."""

    def __init__(self):
        self.encoded: list[int] = []
        self.asked = 0

    def pictures(self, found):
        return torch.tensor([p.source for p in found])

    def encode_images(self, images):
        self.encoded += images.tolist()
        return Seen(images)

    def generate(self, prompts, *, images, **more):
        self.asked += len(prompts)
        self.more = more
        return [" Yes" if n % 2 == 0 else "no way" for n in images.numbers.tolist()]

    def yes_no(self, prompts, images):
        return torch.stack([1.0 - images.numbers % 2, images.numbers % 2 * 1.0], 1)

    def option_scores(self, prompts, options, images):
        return [torch.arange(len(o)).float() for o in options]


class Seen:
    def __init__(self, numbers):
        self.numbers = numbers

    def select(self, index):
        return Seen(self.numbers[index])


def questions(images: list[int]) -> list[Question]:
    return [
        Question(i, f"Is there a {k} in the image?", "yes" if i % 2 == 0 else "no", "g") for k, i in enumerate(images)
    ]


def ask(model, asked, **more):
    return asking.ask(model, asked, "yesno", form="plain", picture=lambda q: Picture(q.image), **more)


@given(st.lists(st.integers(0, 6), min_size=1, max_size=30), st.integers(1, 8))
def test_batches_hold_every_question_once_and_each_picture_in_one_batch(images, size):
    got = asking.batches(questions(images), size)
    assert sorted(k for b in got for k in b) == list(range(len(images)))
    for image in set(images):
        assert sum(any(images[k] == image for k in b) for b in got) == 1
    most = max(Counter(images).values())
    assert all(0 < len(b) <= max(size, most) for b in got)


def test_each_picture_is_encoded_once_and_the_order_is_kept():
    images = [3, 1, 3, 2, 1, 3]
    model = Oracle()
    got = ask(model, questions(images), batch_size=3)
    assert sorted(model.encoded) == [1, 2, 3]
    assert [r["index"] for r in got] == list(range(6)) and [r["image"] for r in got] == images
    assert [r["answer"] for r in got] == ["no way", "no way", "no way", "Yes", "no way", "no way"]
    assert [r["parsed"] for r in got] == ["", "", "", "yes", "", ""] and got[0]["parsed_pope"] == "no"
    assert model.more == {"num_beams": 3, "max_new_tokens": 10, "length_penalty": 0.0}  # the paper's
    fast = ask(Oracle(), questions(images), batch_size=4, fast=True)
    assert [r["answer"] for r in fast] == ["no", "no", "no", "yes", "no", "no"]
    assert fast[3]["log_yes"] > fast[3]["log_no"]


def test_generation_is_the_papers():
    g = asking.GENERATION
    assert g["vqa"] == g["yesno"] == {"num_beams": 3, "max_new_tokens": 10, "length_penalty": 0.0}
    assert g["caption"] == {"num_beams": 5, "min_new_tokens": 8, "max_new_tokens": 20}
    assert g["paragraph"]["min_new_tokens"] == g["paragraph"]["max_new_tokens"] == 90
    assert g["paragraph"]["repetition_penalty"] == 1.2


def test_scores_that_are_not_finite_are_no_answers():
    class Broken(Oracle):
        def yes_no(self, prompts, images):
            return torch.full((len(prompts), 2), float("nan"))

    with pytest.raises(UserError, match="not finite"):
        ask(Broken(), questions([1]), fast=True)


@pytest.mark.parametrize("damage", ["cut", "garbage", "missing", "none"])
def test_a_half_written_log_is_taken_over_and_finished(tmp_path, damage):
    images = [0, 1, 2, 3, 4, 5, 6]
    whole, log = tmp_path / "whole.jsonl", tmp_path / "log.jsonl"
    expected = ask(Oracle(), questions(images), batch_size=2, log=whole)
    lines = whole.read_text().splitlines(keepends=True)
    if damage == "cut":
        log.write_text("".join(lines[:5]) + lines[5][:25])
    elif damage == "garbage":
        log.write_text("".join(lines[:4]) + "\x00\x01\n" + "".join(lines[5:]))
    elif damage == "none":
        log.write_text("".join(lines))
    model = Oracle()
    assert ask(model, questions(images), batch_size=2, log=log) == expected
    assert model.asked == {"cut": 3, "garbage": 3, "missing": 7, "none": 0}[damage]
    assert log.read_text() == whole.read_text()


@pytest.mark.parametrize(
    "change, again", [({"label": "no"}, 0), ({"parsed": None}, 0), ({"answer": 5}, 7), (b"\xff\n", 7)]
)
def test_an_edited_log_gives_its_answers_and_nothing_else(tmp_path, change, again):
    images, log = [0, 1, 2, 3, 4, 5, 6], tmp_path / "log.jsonl"
    expected = ask(Oracle(), questions(images), batch_size=2, log=log)
    whole, lines = log.read_text(), log.read_bytes().splitlines(keepends=True)
    first = change if isinstance(change, bytes) else json.dumps({**json.loads(lines[0]), **change}).encode() + b"\n"
    log.write_bytes(first + b"".join(lines[1:]))
    log.with_suffix(".seconds").write_text("nan")
    model = Oracle()
    assert ask(model, questions(images), batch_size=2, log=log) == expected
    assert model.asked == again and log.read_text() == whole
    assert asking.seconds_of(log) >= 0  # not NaN


def test_a_log_of_other_questions_is_refused(tmp_path):
    ask(Oracle(), questions([0, 1]), log=tmp_path / "log.jsonl")
    other = [Question(0, "Is it another?", "yes", "g")]
    with pytest.raises(UserError, match="answers other questions; choose another --out"):
        ask(Oracle(), other, log=tmp_path / "log.jsonl")


def test_rankings_choices_and_captions_carry_what_their_scores_need():
    q = Question(
        0, "is it?", "b", "v", "", {"caption": "c", "turns": [], "options": ["a", "b"], "relevance": [0, 1], "right": 1}
    )
    (r,) = asking.ask(Oracle(), [q], "rank", form="plain", picture=lambda q: Picture(q.image))
    assert asking.score("rank", [r])["ndcg"] == 100.0 and r["scores"] == [0.0, 1.0]
    pair = [
        Question(k, "(a) Yes (b) No", m, "m", "p0", {"options": [("(a)", "Yes"), ("(b)", "No")]})
        for k, m in ((0, "(a)"), (1, "(b)"))
    ]
    got = asking.ask(Oracle(), pair, "choice", form="plain", picture=lambda q: Picture(q.image))
    assert [r["parsed"] for r in got] == ["(a)", ""] and asking.score("choice", got)["score"] == 0.0
    named = [
        {"answer": "Yes.", "label": "yes"},
        {"answer": "the [hen]", "label": "hen"},
        {"answer": "cock", "label": "hen"},
    ]
    assert asking.score("name", named)["accuracy"] == pytest.approx(200 / 3)
    vqa = asking.score("vqa", [{"answer": "dog", "answers": ["dog"] * 10}])
    assert vqa["score"] == vqa["accuracy"] == 100.0
    s = EvalSettings(tokenize="plain", metrics=("cider",))
    said = [{"answer": "a dog", "references": ["a dog"]}, {"answer": "two cats", "references": ["two cats"]}]
    caption = asking.score("caption", said, s)
    assert caption["score"] == caption["cider"] > 0


def test_regions_are_asked_with_their_masks():
    from conftest import WORLD, make

    model, _ = make("tiny", stage=3)
    square = {"segmentation": [[0, 0, 40, 0, 40, 30, 0, 30]], "height": 60, "width": 60}
    q = Question(0, "", "there is a 3", "refcocog", "", {"question_id": 1, "references": ["there is a 3"], **square})
    image = to_picture(WORLD.make(1, stream(0, "x"), WORLD.train).images[0]).load().resize((60, 60))
    masks, real = [], model.encode_images
    model.encode_images = lambda images, m=None: masks.append(m) or real(images, m)
    (r,) = asking.ask(model.eval(), [q], "region", form="plain", picture=lambda q: Picture(image))
    assert masks[0] is not None and 0 < float(masks[0].mean()) < 1 and isinstance(r["answer"], str)


class Painter:
    """Draws one colour a caption and seed, and counts its drawings."""

    def __init__(self):
        self.drawn = 0

    def draw(self, documents, *, steps, guidance, seed):
        self.drawn += len(documents)
        g = torch.Generator().manual_seed(seed)
        return torch.rand(len(documents), 3, 16, 16, generator=g)


def test_fid_draws_once_keeps_the_best_and_goes_on(monkeypatch, tmp_path):
    root, folder = tmp_path / "deem", tmp_path / "drawn"
    root.mkdir()
    asked = []
    for k in range(6):
        Image.new("RGB", (20, 16), (40 * k, 9, 9)).save(root / f"{k}.png")
        asked.append(Question(f"{k}.png", "", f"Caption {k}", "x", "", {}))

    class Features(torch.nn.Module):
        def forward(self, x):
            x = x.float().flatten(2) / 255
            return torch.cat([x.mean(2), x.std(2)], 1)

    distance = drawing.scores.Fid
    monkeypatch.setattr(drawing.scores, "Fid", lambda **more: distance(Features(), more["device"]))
    s = EvalSettings(batch_size=4, samples=1)
    one, cpu = sets.Set("LN-COCO val", None, "draw"), torch.device("cpu")
    model = Painter()
    whole = drawing.draw(model, s, one, asked, root, folder, 0, "paper", cpu)
    assert model.drawn == 6 and whole["n"] == 6 and whole["samples"] == 1 and whole["fid"] > 0
    (folder / "000005.png").unlink()
    model = Painter()
    assert drawing.draw(model, s, one, asked, root, folder, 0, "paper", cpu) == whole and model.drawn == 2

    class Reddest:
        def text_features(self, texts):
            return torch.tensor([[1.0, 0, 0]] * len(texts))

        def image_features(self, images, crop):
            colors = torch.stack([torch.tensor(list(i.resize((1, 1)).getpixel((0, 0)))).float() for i in images])
            return colors - 100

    monkeypatch.setattr(drawing, "load_clip", lambda *a: Reddest())
    model = Painter()
    many = EvalSettings(batch_size=4, samples=3)
    assert drawing.draw(model, many, one, asked, root, tmp_path / "best", 0, "paper", cpu)["samples"] == 3
    assert model.drawn == 18
    assert (
        drawing.draw(
            Painter(),
            EvalSettings(),
            sets.Set("MS-COCO val-30K", None, "draw"),
            asked,
            root,
            tmp_path / "eight",
            0,
            "paper",
            cpu,
        )["samples"]
        == 8
    )

"""The prompts of the paper and of the released code, word by word."""

from lab.runs import UserError

import numpy as np
import pytest

from documents import prompts
from documents.readers import Picture, Text

PICTURE = Picture("x.jpg")


def told(parts) -> str:
    return "".join(p.text if isinstance(p, Text) else "{image}" if p.mask is None else "{mask}" for p in parts)


def test_the_released_codes_prompts():
    head = "You are a helpful assistant.\n\n ## USER: "
    assert told(prompts.vqa("What is it?", PICTURE, "code")) == (
        head
        + "Based on the image, please answer the question. {image}What is it? Please provide an accurate answer within "
        "one word.\n ## ASSISTANT: The answer is"
    )
    assert told(prompts.pope("Is there a dog in the image?", PICTURE, "code")) == (
        head
        + "Based on the image, please answer the question. {image}Is there a dog in the image? Please anwser yes or no "
        "\n ## ASSISTANT: The answer is"
    )
    assert told(prompts.caption(PICTURE, "code")).endswith(
        "{image} Could you provide a short description of the image? \n ## ASSISTANT: A photo of"
    )
    assert told(prompts.paragraph(PICTURE, "code")).endswith(
        "Please describe the image in detail. \n ## ASSISTANT: The image depicts"
    )


def test_the_papers_prompts_have_no_misspelling():
    text = told(prompts.robustvqa("Is tench the main object in this image?", PICTURE))
    assert "Is tench the main object in this image? Please answer yes or no." in text and "anwser" not in text
    assert (
        text.startswith("You are a helpful assistant.")
        and text.endswith("ASSISTANT: The answer is")
        and "##" not in text
    )
    assert "within one word" in text and "within one word" not in told(prompts.options("(a) x (b) y", PICTURE))


@pytest.mark.parametrize("form", prompts.FORMS)
def test_prompts_are_never_learned_and_hold_the_picture_once(form):
    made = [
        prompts.vqa("q?", PICTURE, form), prompts.pope("q?", PICTURE, form), prompts.options("q?", PICTURE, form),
        prompts.caption(PICTURE, form), prompts.paragraph(PICTURE, form), prompts.train_vqa("q?", PICTURE, form),
        prompts.dialog("a dog", [("q1?", "yes.")], "q2?", PICTURE, form),
    ]  # fmt: skip
    for parts in made:
        assert [p for p in parts if isinstance(p, Picture)] == [PICTURE]
        assert not any(p.learn for p in parts if isinstance(p, Text))
    assert "a dog q1? yes. q2?" in told(made[-1])


def test_plain_is_the_bare_question():
    assert prompts.pope("Is there a 3 in the image?", PICTURE, "plain") == [
        PICTURE,
        Text("Is there a 3 in the image?", False),
    ]
    assert prompts.caption(PICTURE, "plain") == [PICTURE]


def test_the_training_frame_of_stage_two():
    paper = told(prompts.train_vqa("Why", PICTURE))
    assert paper == "Based on the image, please answer the question. {image}Why. The answer is:"
    assert told(prompts.train_vqa("Why?", PICTURE, "code")).endswith("{image}Why?\n ## ASSISTANT:  The answer is")
    assert prompts.next_turn("And?", "code") == "\n ## USER: And?\n ## ASSISTANT: The answer is"


def test_what_stands_before_a_drawing():
    assert told(prompts.drawing("A Dog")) == told(prompts.drawing("A Dog", "plain")) == "a dog"
    assert told(prompts.drawing("A Dog", "code")).endswith("to be filled in A Dog \n ## ASSISTANT: ")


def test_a_region_stands_after_its_name():
    masked = Picture("x.jpg", np.ones((2, 2), bool))
    text = told(prompts.region(masked))
    assert "{image} Provide a short description for this <ref>region1</ref> {mask}" in text
    with pytest.raises(UserError, match="needs a picture with a mask"):
        prompts.region(PICTURE)
    with pytest.raises(UserError, match="form loud is unknown"):
        prompts.vqa("q", PICTURE, "loud")

"""The prompts of the paper's Figure 8, of the released code, and a plain form for small vocabularies.

A prompt is a list of Text and Picture parts that ends with the assistant's prefix; none of it is learned. Three forms:

* `paper`: the wording of the paper, role marks `USER:` and `ASSISTANT:`;
* `code`: the released code's: `## USER:`, "anwser" in the yes/no questions, no full stop after it and no request for
  one word there;
* `plain`: the picture and the bare question, for models with a vocabulary of a few dozen words (the digit scenes).
"""

from lab.runs import UserError

from documents.document import Picture, Text

FORMS = ("paper", "code", "plain")
SYSTEM = "You are a helpful assistant.\n\n "
ONE_WORD = " Please provide an accurate answer within one word."
MARKS = {"paper": ("USER: ", "ASSISTANT: "), "code": ("## USER: ", "## ASSISTANT: ")}
YES_NO = {"paper": " Please answer yes or no.", "code": " Please anwser yes or no", "plain": ""}

Parts = list[Text | Picture]


def _frame(before: str, picture: Picture, after: str, prefix: str, form: str, end: str = "\n ") -> Parts:
    """System line, user turn around the picture, `end`, assistant's prefix."""
    if form not in MARKS:
        raise UserError(f"prompt form {form} is unknown; use one of {', '.join(FORMS)}")
    user, assistant = MARKS[form]
    return [
        Text(SYSTEM + user + before, learn=False),
        picture,
        Text(f"{after}{end}{assistant}{prefix}", learn=False),
    ]


def _plain(picture: Picture, question: str) -> Parts:
    return [picture, Text(question, learn=False)] if question else [picture]


def _ask(question: str, picture: Picture, form: str, one_word: bool) -> Parts:
    if form == "plain":
        return _plain(picture, question)
    # The released code has a blank before the line break except after "within one word.".
    after, end = question + (ONE_WORD if one_word else ""), " \n " if form == "code" and not one_word else "\n "
    return _frame("Based on the image, please answer the question. ", picture, after, "The answer is", form, end)


def _describe(picture: Picture, request: str, prefix: str, form: str) -> Parts:
    if form == "plain":
        return _plain(picture, "")
    return _frame("", picture, request, prefix, form, " \n " if form == "code" else "\n ")


def vqa(question: str, picture: Picture, form: str = "paper") -> Parts:
    """Open question with an answer of a word: VQAv2, OK-VQA, GQA, VizWiz and the stage-II training frame."""
    return _ask(question, picture, form, one_word=True)


def train_vqa(question: str, picture: Picture, form: str = "paper") -> Parts:
    """The training frame of stage II: no request for one word."""
    if form == "plain":
        return _plain(picture, question)
    if form == "paper":
        before = "Based on the image, please answer the question. "
        return [Text(before, learn=False), picture, Text(f"{question}. The answer is:", learn=False)]
    # The released code trains with two blanks before "The", and none before the line break.
    return _frame("Based on the image, please answer the question. ", picture, question, " The answer is", form)


def next_turn(question: str, form: str = "paper") -> str:
    """A further question of a conversation, ending with the assistant's prefix."""
    if form == "plain":
        return f" {question}"
    user, assistant = MARKS[form] if form in MARKS else MARKS["paper"]
    return f"\n {user}{question}\n {assistant}The answer is"


def pope(question: str, picture: Picture, form: str = "paper") -> Parts:
    """`question` is POPE's, e.g. "Is there a dog in the image?"; the request for yes or no is added."""
    return _ask(question + YES_NO.get(form, ""), picture, form, one_word=form == "paper")


def robustvqa(question: str, picture: Picture, form: str = "paper") -> Parts:
    """`question` is "Is tench the main object in this image?"; the request for yes or no is added."""
    return pope(question, picture, form)


def options(question: str, picture: Picture, form: str = "paper") -> Parts:
    """Multiple choice (MMVP, Table 9): the options stand in the question and no length is asked for."""
    return _ask(question, picture, form, one_word=False)


def caption(picture: Picture, form: str = "paper") -> Parts:
    """Short description; 8 to 20 new tokens, 5 beams in the paper."""
    return _describe(picture, " Could you provide a short description of the image?", "A photo of", form)


def paragraph(picture: Picture, form: str = "paper") -> Parts:
    """Image2Paragraph; exactly 90 new tokens, repetition penalty 1.2 in the paper."""
    return _describe(picture, " Please describe the image in detail.", "The image depicts", form)


def drawing(caption_text: str, form: str = "paper") -> Parts:
    """What stands before a picture to be drawn: the caption alone, as in the training pairs, or the released code's
    request. Which of the two the paper's FID was measured with is not known."""
    if form != "code":
        return [Text(caption_text.lower(), learn=False)]
    user, assistant = MARKS["code"]
    request = "please reconstruct the complete image from the description and the image to be filled in"
    return [Text(f"{SYSTEM}{user}{request} {caption_text} \n {assistant}", learn=False)]


def region(picture: Picture, form: str = "paper", name: str = "region1") -> Parts:
    """Description of the region under `picture.mask`; the mask stands as a second picture after its name."""
    if picture.mask is None:
        raise UserError("a region prompt needs a picture with a mask")
    if form == "plain":
        return _plain(picture, "")
    whole = Picture(picture.source)
    parts = _frame("", whole, f" Provide a short description for this <ref>{name}</ref> ", "", form)
    head, middle, tail = parts
    words, mark, rest = tail.text.partition("</ref> ")
    return [head, middle, Text(words + mark, learn=False), picture, Text(rest, learn=False)]


def dialog(caption_text: str, turns: list[tuple[str, str]], question: str, picture: Picture, form: str = "paper"):
    """VisDial: caption, earlier (question, answer) turns and the question whose answers are ranked."""
    told = " ".join([caption_text, *(f"{q} {a}" for q, a in turns), question]).strip()
    return _ask(told, picture, form, one_word=False)

"""POPE, RobustVQA and MMVP: official files, builders, parsers and scores against references written on their own."""

import random
from collections import Counter

from lab.runs import UserError

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, precision_recall_fscore_support

from evaluation import benchmarks as bm
from evaluation import parsers

NAMES = [f"thing{k}" for k in range(12)]


def published_evaluator(answers: list[str], labels: list[str]) -> dict:
    """The POPE authors' evaluation, as they describe it: the first sentence, words at blanks, "no" if one of three
    words is there; counts of the four cases."""
    cases = Counter()
    for text, label in zip(answers, labels, strict=True):
        sentence = text[: text.index(".")] if "." in text else text
        words = [w for w in "".join(c for c in sentence if c != ",").split(" ")]
        said_no = any(w in ("No", "not", "no") for w in words)
        cases[("no" if said_no else "yes"), label] += 1
    tp, fp, tn, fn = (cases[k] for k in (("yes", "yes"), ("yes", "no"), ("no", "no"), ("no", "yes")))
    precision, recall = tp / (tp + fp), tp / (tp + fn)
    return {
        "accuracy": (tp + tn) / (tp + tn + fp + fn),
        "precision": precision,
        "recall": recall,
        "f1": 2 * precision * recall / (precision + recall),
        "yes_ratio": (tp + fp) / len(labels),
    }


SAID = (  # answer, read by the released code, read by POPE's authors
    ("yes", "yes", "yes"),
    ("No", "no", "no"),
    ("Yes, there is a dog.", "yes", "yes"),
    ("No, there is no dog", "no", "no"),
    ("The answer is yes", "yes", "yes"),
    ("there is no dog in the image", "", "no"),
    ("NO", "no", "yes"),  # capitals throughout are not among the authors' three words
    ("nope", "", "yes"),
    ("", "", "yes"),
    ("I do not know. yes", "", "no"),
    ("a dog", "", "yes"),
    ("yes or no", "yes", "no"),
    ('"yes"', "yes", "yes"),
    ("no\nyes", "no", "yes"),  # the authors split at blanks only, so "no\nyes" is one word
    ("it is: no", "", "no"),
    ("No dog", "", "no"),
    ("yes!", "yes", "yes"),
    ("banana yes", "yes", "yes"),  # "a " also cuts inside words
    ("not sure", "", "no"),
    ("[no]", "no", "yes"),
)


@pytest.mark.parametrize(("text", "released", "authors"), SAID)
def test_the_parsers_read_answers_as_their_authors_do(text, released, authors):
    assert parsers.parse_answer(text) == released
    assert parsers.parse_pope(text) == authors


def test_popes_reading_ends_with_the_first_sentence():
    assert parsers.parse_pope("There is a dog. It is not big.") == "yes"
    assert parsers.parse_pope("There is, no dog. Yes.") == "no"  # commas go before words are told apart
    assert parsers.parse_pope("No. There is a dog.") == "no" and parsers.parse_pope("Nothing") == "yes"


def test_extract_answer_takes_what_stands_between_the_leading_words():
    assert parsers.extract_answer("It is a cat of the house") == "house"  # "the " is looked for before " of"
    assert parsers.extract_answer("There are two, maybe three") == "two"
    assert parsers.extract_answer("red and blue") == "red"
    assert parsers.extract_answer("the left or right") == "left"
    assert parsers.extract_answer("is this is that") == "th"  # between the first and the second "is "
    assert parsers.extract_answer("  42.5 ") == "42"


@given(
    st.lists(st.tuples(st.sampled_from([s[0] for s in SAID]), st.sampled_from(["yes", "no"])), min_size=1, max_size=40)
)
def test_scores_equal_the_published_arithmetic(rows):
    answers, labels = map(list, zip(*rows, strict=True))
    got = parsers.score_yes_no([{"answer": a, "label": b} for a, b in rows])
    try:
        expected = published_evaluator(answers, labels)
    except ZeroDivisionError:  # their code ends there; ours says 0
        said = [parsers.parse_pope(a) for a in answers]
        assert (
            not sum(s == "yes" for s in said)
            or "yes" not in labels
            or not any(s == b == "yes" for s, b in zip(said, labels, strict=True))
        )
        assert got["pope_f1"] == 0
        return
    for key, value in expected.items():
        assert got[f"pope_{key}"] == pytest.approx(100 * value, abs=1e-9)


@given(st.lists(st.tuples(st.sampled_from(["yes", "no", ""]), st.sampled_from(["yes", "no"])), min_size=1, max_size=50))
def test_binary_scores_equal_scikit_learn(rows):
    said, labels = map(list, zip(*rows, strict=True))
    got = parsers.binary_scores(said, labels)
    p, r, f, _ = precision_recall_fscore_support(labels, said, labels=["yes"], zero_division=0)
    assert got["accuracy"] == pytest.approx(100 * accuracy_score(labels, said))
    assert [got["precision"], got["recall"], got["f1"]] == pytest.approx([100 * x[0] for x in (p, r, f)])
    assert got["unparsed"] == pytest.approx(100 * said.count("") / len(said))


@pytest.mark.parametrize("kind", bm.POPE_KINDS)
def test_always_yes_gives_exactly_half(kind):
    scenes = [random.Random(k).sample(NAMES, 4) for k in range(40)]
    questions = bm.build_pope(scenes, NAMES, kind=kind, images=20, seed=3)
    robust = bm.build_robustvqa({"imagenet_a": [{"file_name": "x", "gt_caption": "a", "error_caption": "b"}] * 7})
    for items in (questions, robust["imagenet_a"]):
        got = parsers.score_yes_no([{"answer": "Yes", "label": q.answer} for q in items])
        assert got["accuracy"] == 50.0 and got["recall"] == 100.0 and got["yes_ratio"] == 100.0
        got = parsers.score_yes_no([{"answer": "no", "label": q.answer} for q in items])
        assert got["accuracy"] == 50.0 and got["f1"] == 0.0 and got["yes_ratio"] == 0.0


def test_nothing_to_score_and_unknown_parser_are_told():
    with pytest.raises(UserError, match="no answered question"):
        parsers.score_yes_no([])
    with pytest.raises(UserError, match="parser loose is unknown"):
        parsers.score_yes_no([{"answer": "yes", "label": "yes"}], "loose")
    assert (
        parsers.score_yes_no([{"answer": "Yes.", "label": "yes"}], "strict")["accuracy"] == 0.0
    )  # lmms-eval: the whole text


# ---------------------------------------------------------------------------------------------- RobustVQA, choice, MMVP


def test_robustvqa_order_is_that_of_the_official_seed():
    rows = [{"file_name": f"{k}.jpg", "gt_caption": f"g{k}", "error_caption": f"e{k}"} for k in range(9)]
    got = bm.build_robustvqa({"imagenet_r": rows})["imagenet_r"]
    expected = [
        x for r in rows for x in ((r["file_name"], r["gt_caption"], "yes"), (r["file_name"], r["error_caption"], "no"))
    ]
    random.seed(8823)
    random.shuffle(expected)
    assert [(q.image, q.meta["object"], q.answer) for q in got] == expected
    assert got[0].question == f"Is {got[0].meta['object']} the main object in this image?"
    blanks = bm.build_robustvqa({"s": [{**rows[0], "gt_caption": "tiger_shark"}]}, underscores=False)["s"]
    assert {q.meta["object"] for q in blanks} == {"tiger shark", "e0"}


def test_multiple_choice_lists_both_orders():
    mined = {"imagenet_a": [{"file_name": "x.jpg", "gt_caption": "tench", "error_caption": "hen"}]}
    right, wrong = (bm.build_choice(mined, right_first=r)["imagenet_a"][0] for r in (True, False))
    assert "[tench, hen]" in right.question and "[hen, tench]" in wrong.question
    assert right.answer == wrong.answer == "tench"


def test_options_and_choices():
    options = bm.split_options("(a) Open (b) Closed, partly")
    assert options == [("(a)", "Open"), ("(b)", "Closed, partly")]
    for said, mark in (
        ("(a)", "(a)"), ("B", "(b)"), ("a) Open", "(a)"), ("(b) Closed", "(b)"), ("open.", "(a)"), ("b.", "(b)"),
        ("perhaps", ""), ("", ""), ("all of them", ""),
    ):  # fmt: skip
        assert parsers.parse_choice(said, options) == mark, said


def test_a_pair_counts_when_both_answers_are_right():
    rows = [
        ("p0", True),
        ("p0", True),
        ("p1", True),
        ("p1", False),
        ("p2", False),
        ("p2", False),
        ("p3", True),
        ("p3", True),
    ]
    got = parsers.score_pairs([{"pair": p, "right": r} for p, r in rows])
    assert got == {"accuracy": 50.0, "single_accuracy": 62.5, "n": 4}
    with pytest.raises(UserError, match="pair p9 has 1 answers"):
        parsers.score_pairs([{"pair": "p9", "right": True}])
    with pytest.raises(UserError, match="no answered question"):
        parsers.score_pairs([])


def test_mmvp_files(tmp_path):
    head = "Index,Question,Options,Correct Answer\n"
    rows = '1,"Is it open, or not?",(a) Open (b) Closed,(a)\n2,"Is it open, or not?",(a) Open (b) Closed,(b)\n'
    (tmp_path / "Questions.csv").write_text(head + rows)
    got = bm.read_mmvp(tmp_path)
    assert [q.image for q in got] == ["MMVP Images/1.jpg", "MMVP Images/2.jpg"] and got[0].pair == got[1].pair
    assert got[0].question == "Is it open, or not? (a) Open (b) Closed" and [q.answer for q in got] == ["(a)", "(b)"]
    (tmp_path / "Questions.csv").write_text(head + rows.splitlines()[0])
    with pytest.raises(UserError, match="odd number"):
        bm.read_mmvp(tmp_path)
    (tmp_path / "Questions.csv").write_text(head + rows.replace("(b)\n", "(c)\n"))
    with pytest.raises(UserError, match="question 2 has no answer"):
        bm.read_mmvp(tmp_path)
    (tmp_path / "Questions.csv").write_text("Question\nx\n")
    with pytest.raises(UserError, match="no column Options"):
        bm.read_mmvp(tmp_path)


def test_mmvp_pairs_can_be_built():
    got = bm.build_mmvp([((0, "left?", "yes"), (1, "left?", "no")), ((2, "two?", "yes"), (3, "two?", "no"))])
    assert [q.pair for q in got] == ["mmvp-0", "mmvp-0", "mmvp-1", "mmvp-1"] and got[3].answer == "no"
    with pytest.raises(UserError, match="pair 0 has 1 questions"):
        bm.build_mmvp([((0, "q", "yes"),)])

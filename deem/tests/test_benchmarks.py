"""POPE, RobustVQA and MMVP: official files, builders, parsers and scores against references written on their own."""

import itertools
import json
import os
import random
import re
from collections import Counter
from pathlib import Path

from lab.runs import UserError

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, precision_recall_fscore_support

from evaluation import benchmarks as bm
from evaluation import parsers

POPE = Path(os.environ.get("REPRO_DATA", "nowhere")) / "deem" / "pope"
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


# ----------------------------------------------------------------------------------------------------------- building


@given(
    st.lists(st.sets(st.sampled_from(NAMES), max_size=8), min_size=3, max_size=15),
    st.sampled_from(bm.POPE_KINDS),
    st.integers(1, 3),
    st.integers(0, 5),
)
@settings(max_examples=60, deadline=None)
def test_pope_items_are_balanced_true_and_never_repeat(scenes, kind, per_image, seed):
    enough = [k for k, s in enumerate(scenes) if len(s) >= per_image]
    if not enough:
        with pytest.raises(UserError, match="have .* or more objects"):
            bm.build_pope(scenes, NAMES, kind=kind, per_image=per_image, images=1, seed=seed)
        return
    questions = bm.build_pope(scenes, NAMES, kind=kind, per_image=per_image, images=len(enough), seed=seed)
    assert sorted({q.image for q in questions}) == enough
    for image, part in itertools.groupby(questions, key=lambda q: q.image):
        part = list(part)
        names = [q.meta["object"] for q in part]
        assert len(part) == 2 * per_image == len(set(names))
        assert [q.answer for q in part] == ["yes", "no"] * per_image
        assert all((q.meta["object"] in scenes[image]) == (q.answer == "yes") for q in part)
    assert [q.meta["question_id"] for q in questions] == list(range(1, len(questions) + 1))


def test_pope_kinds_ask_for_the_names_they_promise():
    scenes = [("thing0", "thing1"), ("thing0", "thing1"), ("thing0", "thing2"), ("thing3", "thing4")]
    by_kind = {k: bm.build_pope(scenes, NAMES, kind=k, per_image=1, images=None, seed=1) for k in bm.POPE_KINDS}
    present = {k: [q.meta["object"] for q in v if q.answer == "yes"] for k, v in by_kind.items()}
    assert (
        present["random"] == present["popular"] == present["adversarial"]
    )  # the same questions but for the absent one
    absent = {k: [q.meta["object"] for q in v if q.answer == "no"] for k, v in by_kind.items()}
    assert absent["popular"] == [
        "thing2",
        "thing2",
        "thing1",
        "thing0",
    ]  # counts 3, 2, 1, 1, 1; ties by first appearance
    asked_with_0 = [a for a, p in zip(absent["adversarial"], present["adversarial"], strict=True) if p == "thing0"]
    assert set(asked_with_0) <= {"thing1", "thing2"}
    assert set(absent["random"]) <= {f"thing{k}" for k in range(5)}  # names that occur in the drawn pictures only


def test_pope_counts_in_the_drawn_pictures_alone():
    """Names of pictures that are not asked about are neither frequent nor candidates."""
    scenes = [["a", "b"], ["a", "c"], ["b", "c"], ["z"], ["z"], ["z"], ["z"]]
    for kind in bm.POPE_KINDS:
        asked = bm.build_pope(scenes, [*"abcz"], kind=kind, per_image=2, images=2, seed=1)[:2]
        assert asked[1].meta["object"] != "z", kind


def test_pope_popular_goes_down_the_list_and_falls_back_at_its_end():
    scenes = [NAMES[:3], NAMES[:3], NAMES[3:6]]
    questions = bm.build_pope(scenes, NAMES, kind="popular", per_image=3, images=None, seed=0)
    first = [q.meta["object"] for q in questions if q.image == 0 and q.answer == "no"]
    assert first == ["thing3", "thing4", "thing5"]
    with pytest.raises(UserError, match="fewer than 3 absent names"):
        bm.build_pope([NAMES[:3]], NAMES[:5], kind="random", per_image=3, images=None)
    fallback = bm.build_pope([NAMES[:3]], NAMES, kind="adversarial", per_image=3, images=None)
    assert all(q.meta["object"] in NAMES[3:] for q in fallback if q.answer == "no")


def test_pope_depends_on_the_seed_and_on_nothing_else():
    scenes = [set(random.Random(k).sample(NAMES, 5)) for k in range(30)]
    a, b = (bm.build_pope(scenes, NAMES, kind="random", images=10, seed=4) for _ in range(2))
    c = bm.build_pope(scenes, NAMES, kind="random", images=10, seed=5)
    assert a == b and a != c
    listed = [sorted(s, key=NAMES.index) for s in scenes]
    assert bm.build_pope(listed, NAMES, kind="random", images=10, seed=4) == a  # a set is read in the names' order


@pytest.mark.parametrize("kind", ["popular", "adversarial"])
def test_pope_ties_go_to_the_name_that_appears_first(kind):
    """Against the authors' rules by loops: counts in the order of first appearance, the largest first, the earliest of
    equals; in many small pictures with many ties."""
    rng = random.Random(3)
    scenes = [rng.sample(NAMES, rng.randint(3, 4)) for _ in range(20)]
    count, together = {}, {}
    for scene in scenes:
        for name in scene:
            count[name] = count.get(name, 0) + 1
            for other in scene:
                if other != name:
                    own = together.setdefault(name, {})
                    own[other] = own.get(other, 0) + 1
    asked = bm.build_pope(scenes, NAMES, kind=kind, images=None, seed=2)
    by_name = 0
    for k, scene in enumerate(scenes):
        rows, used = [q.meta["object"] for q in asked if q.image == k], set(scene)
        for present, absent in zip(rows[::2], rows[1::2], strict=True):
            table = count if kind == "popular" else together[present]
            left = [n for n in table if n not in used]
            if left:
                best = max(table[n] for n in left)
                want = next(n for n in left if table[n] == best)
                assert absent == want
                by_name += want != min((n for n in left if table[n] == best), key=NAMES.index)
            used.add(absent)
    assert by_name > 3  # where the names' order would ask for another


def test_pope_user_errors():
    with pytest.raises(UserError, match="POPE kind hard is unknown"):
        bm.build_pope([NAMES], NAMES, kind="hard")
    with pytest.raises(UserError, match="holds zebra, which is not among"):
        bm.build_pope([["zebra"]], NAMES, per_image=1, images=1)
    with pytest.raises(UserError, match="at least one"):
        bm.build_pope([NAMES], NAMES, per_image=0)


def test_article_goes_by_the_first_letter():
    assert bm.ask_pope("orange") == "Is there an orange in the image?"
    assert bm.ask_pope("umbrella") == "Is there an umbrella in the image?"
    assert bm.ask_pope("Orange") == "Is there a Orange in the image?"  # as the authors: small letters only


def coco(path: Path) -> Path:
    path.write_text(
        json.dumps(
            {
                "categories": [{"id": 7, "name": "dog"}, {"id": 9, "name": "cat"}, {"id": 3, "name": "car"}],
                "images": [{"id": 1, "file_name": "a.jpg"}, {"id": 2, "file_name": "b.jpg"}],
                "annotations": [
                    {"image_id": 2, "category_id": 9},
                    {"image_id": 2, "category_id": 9},
                    {"image_id": 2, "category_id": 3},
                ],
            }
        )
    )
    return path


def test_pope_is_built_from_coco_annotations_and_read_back(tmp_path):
    files, scenes, names = bm.coco_scenes(coco(tmp_path / "instances.json"))
    assert files == ["a.jpg", "b.jpg"] and scenes == [[], ["cat", "car"]] and names == ["dog", "cat", "car"]
    questions = bm.build_pope(scenes, names, kind="popular", per_image=1, images=1, seed=0)
    bm.write_pope(tmp_path / "coco_pope_popular.json", questions, files)
    again = bm.read_pope(tmp_path / "coco_pope_popular.json")
    assert [(q.image, q.question, q.answer) for q in again] == [("b.jpg", q.question, q.answer) for q in questions]
    with pytest.raises(UserError, match="give COCO's instances JSON by --annotations"):
        bm.coco_scenes(tmp_path / "gone.json")
    (tmp_path / "instances.json").write_text('{"images": []}')
    with pytest.raises(UserError, match="not a COCO instances file"):
        bm.coco_scenes(tmp_path / "instances.json")


def test_the_builder_command_writes_three_lists(tmp_path, monkeypatch, capsys):
    words = ["--annotations", str(coco(tmp_path / "i.json")), "--out", str(tmp_path / "out"), "--per-image", "1"]
    monkeypatch.setattr("sys.argv", ["benchmarks.py", *words, "--images", "1"])
    bm.main()
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        f"coco_pope_{k}.json" for k in sorted(bm.POPE_KINDS)
    ]
    assert "2 questions" in capsys.readouterr().out


def test_broken_question_files_are_named_by_line(tmp_path):
    path = tmp_path / "pope.json"
    good = '{"question_id": 1, "image": "x.jpg", "text": "Is there a dog in the image?", "label": "yes"}\n'
    path.write_text(good + "{broken\n")
    with pytest.raises(UserError, match=r"pope\.json:2: not valid JSON"):
        bm.read_pope(path)
    path.write_text(good + good.replace("yes", "maybe"))
    with pytest.raises(UserError, match=r"pope\.json:2: needs image, text and label"):
        bm.read_pope(path)
    path.write_text("[" + good.strip() + "]")
    assert len(bm.read_pope(path)) == 1
    path.write_text("\n")
    with pytest.raises(UserError, match="holds no question"):
        bm.read_pope(path)
    with pytest.raises(UserError, match="no file"):
        bm.read_pope(tmp_path / "gone.json")
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="not UTF-8"):
        bm.read_pope(path)


@pytest.mark.realdata
@pytest.mark.skipif(not POPE.is_dir(), reason="no $REPRO_DATA/deem/pope")
def test_official_pope_files():
    counts = {}
    for path in sorted(POPE.glob("*.json")):
        questions = bm.read_pope(path)
        yes = sum(q.answer == "yes" for q in questions)
        counts[path.stem] = (len(questions), yes, len({q.image for q in questions}))
        got = parsers.score_yes_no([{"answer": "yes", "label": q.answer} for q in questions])
        assert got["accuracy"] == pytest.approx(100 * yes / len(questions))
        assert (got["accuracy"] == 50.0) == (path.stem != "coco_pope_random_2910")
    assert len(counts) == 10 and counts.pop("coco_pope_random_2910") == (2910, 1500, 500)
    assert set(counts.values()) == {(3000, 1500, 500)}
    # The three COCO lists ask about the same present objects of the same pictures.
    lists = [bm.read_pope(POPE / f"coco_pope_{k}.json") for k in bm.POPE_KINDS]
    present = [[(q.image, q.question) for q in x if q.answer == "yes"] for x in lists]
    assert present[0] == present[1] == present[2]
    for questions in lists:  # six questions a picture, no name twice, our wording but for the articles they got wrong
        for _, part in itertools.groupby(questions, key=lambda q: q.image):
            assert len({q.question for q in part}) == 6
        names = [re.match(r"Is there an? (.+) in the i", q.question)[1] for q in questions]
        odd = {q.question for q, n in zip(questions, names, strict=True) if bm.ask_pope(n) != q.question}
        assert odd <= {"Is there an traffic light in the image?"}
    for k in bm.POPE_KINDS[1:]:  # popular and adversarial absent names: what their statistics would give most often
        absent = Counter(q.question for q in bm.read_pope(POPE / f"coco_pope_{k}.json") if q.answer == "no")
        assert absent.most_common(1)[0][1] > 100


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

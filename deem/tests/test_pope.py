"""POPE: the lists that are built, against the authors' rules; the official files."""

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

from evaluation import benchmarks as bm
from evaluation import parsers

POPE = Path(os.environ.get("REPRO_DATA", "nowhere")) / "deem" / "pope"
NAMES = [f"thing{k}" for k in range(12)]


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

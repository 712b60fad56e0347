"""The digit scenes: pictures, captions, questions, pairs, and the study over them."""

import numpy as np
import pytest
import torch
from conftest import WORLD, make

from evaluation import benchmarks
from scenes import study
from scenes.world import QUESTIONS, SceneReader, truth
from streams import stream


def test_scenes_are_a_function_of_their_stream():
    a, b = (WORLD.make(20, stream(3, "x"), WORLD.train) for _ in range(2))
    assert np.array_equal(a.images, b.images) and np.array_equal(a.cells, b.cells)
    c = WORLD.make(20, stream(4, "x"), WORLD.train)
    assert not np.array_equal(a.images, c.images)
    assert stream(0, "a").integers(2**60) != stream(0, "b").integers(2**60)


def test_cells_hold_what_they_say():
    s = WORLD.make(60, stream(0, "x"), WORLD.train)
    assert s.images.shape == (60, 16, 16) and 0 <= s.images.min() and s.images.max() <= 1
    for image, cells in zip(s.images, s.cells, strict=True):
        assert 1 <= (cells >= 0).sum() <= 4
        for k in range(4):
            core = image[8 * (k // 2) + 2 : 8 * (k // 2) + 6, 8 * (k % 2) + 2 : 8 * (k % 2) + 6]
            assert (core.sum() > 0) == (cells[k] >= 0)
    assert all((s.details[i, k] == 0).all() == (s.cells[i, k] < 0) for i in range(60) for k in range(4))


def test_company_gives_language_a_prior():
    s = WORLD.make(800, stream(0, "x"), WORLD.train)
    with_three = [c for c in s.cells if 3 in c and (c >= 0).sum() > 1]
    share = np.mean([8 in c for c in with_three])
    assert share > 0.4  # by chance about a quarter
    free = WORLD.make(800, stream(0, "x"), WORLD.train, company=0.0)
    assert np.mean([8 in c for c in free.cells if 3 in c and (c >= 0).sum() > 1]) < share - 0.2


def test_train_and_test_scans_are_apart():
    train, test = WORLD.train, WORLD.test
    assert not {*train.tolist()} & {*test.tolist()} and len(train) + len(test) == 1797


def test_captions_and_questions():
    cells = np.array([3, -1, 8, 3])
    assert WORLD.listing(cells) == "there is a 3 and a 8 ."
    assert truth("there", cells, 3) and not truth("there", cells, 4)
    assert truth("left", cells, 8) and truth("count", cells, 3) and not truth("count", cells, 2)
    rng, model = stream(0, "q"), make("digits")[0]
    for kind in QUESTIONS:
        said = [WORLD.question(rng, cells, kind) for _ in range(200)]
        assert 40 < sum(a == "yes" for _, a in said) < (120 if kind != "left" else 201)
        for asked, answer in said:
            model.tok.encode(asked + answer)  # every word is known


def test_answers_about_a_scene_are_true():
    """Read back out of the words, by a reader of its own."""
    cells, rng, kinds = np.array([-1, 5, 5, 0]), stream(1, "q"), set()
    for _ in range(100):
        parts = WORLD.questions(rng, cells, QUESTIONS)
        assert 1 <= len(parts) // 2 <= 3 and [p.learn for p in parts] == [False, True] * (len(parts) // 2)
        for asked, answer in zip(parts[::2], parts[1::2], strict=True):
            words = asked.text.strip(" ?").split()
            if words[0] == "Are":
                kinds.add("count")
                right = words[2] == "three"
            else:
                kinds.add(words[1])
                right = words[3] in ("5", "0") if words[1] == "there" else words[2] == "5"
            assert answer.text == (" yes" if right else " no")
    assert kinds == {"count", "there", "the"}


def test_half_of_the_captions_name_every_digit():
    reader = SceneReader(WORLD, 0, 1, n=100, noise=0.0)
    listed = short = 0
    for _ in range(300):
        parts = next(reader).parts
        for picture, text in zip(*(iter(parts),) * 2, strict=True):
            picture, text = (picture, text) if hasattr(text, "text") else (text, picture)
            k = next(i for i, p in enumerate(reader.pictures) if p is picture)
            all_of_it = WORLD.listing(reader.scenes.cells[k])
            assert text.text in (all_of_it, WORLD.caption(reader.captioned[k]))
            if len({*reader.scenes.cells[k]} - {-1}) > 1:
                listed, short = listed + (text.text == all_of_it), short + (text.text != all_of_it)
    assert 0.4 < listed / (listed + short) < 0.6


def test_reader_goes_on_where_it_was():
    a, b = SceneReader(WORLD, 0, 1, n=30), SceneReader(WORLD, 0, 1, n=30)
    for _ in range(5):
        next(a)
    b.restore(a.state())
    assert next(a).text == next(b).text
    two = [SceneReader(WORLD, 0, 1, n=30, rank=r, world_size=2) for r in range(2)]
    one = SceneReader(WORLD, 0, 1, n=30)
    assert [next(one).text for _ in range(4)] == [next(two[i % 2]).text for i in range(4)]


def test_pairs_differ_in_their_answers():
    for first, second in WORLD.pairs(0, 30):
        assert first[1] == second[1] and {first[2], second[2]} == {"yes", "no"}
        assert not np.array_equal(first[0], second[0])
    for k, (first, second) in enumerate(WORLD.pairs(0, 30)):
        ink = [np.pad(x[0], 0).sum(0) for x in (first, second)]  # by column
        if k % 2 == 0:  # side: the same scan, moved to the right
            assert ink[0][:8].sum() > 2 * ink[0][8:].sum() and ink[1][8:].sum() > 2 * ink[1][:8].sum()
        else:  # number: one digit more, nothing else changed
            assert (second[0] >= first[0]).all() and second[0].sum() > first[0].sum()


def test_every_list_is_balanced_and_always_yes_has_half():
    asked, images = study.questions(WORLD, 0, 12)
    assert max(q.image for q in asked) < len(images)
    rows = [
        {"benchmark": q.meta["benchmark"], "group": q.group, "pair": q.pair, "label": q.answer, "answer": "yes"}
        | {"question": q.question}
        for q in asked
    ]
    found = study.answer_scores(rows, "digits")
    assert all(
        v == 50.0 for k, v in found.items() if k.endswith(("always_yes", "accuracy")) and not k.startswith("MMVP")
    )
    assert found["MMVP_accuracy"] == 0.0 and found["MMVP_single_accuracy"] == 50.0
    right = study.answer_scores([{**r, "answer": r["label"]} for r in rows], "digits")
    assert right["POPE_accuracy"] == right["MMVP_accuracy"] == right["MMVP_count_accuracy"] == 100.0
    assert right["POPE_random_n"] == right["MMVP_n"] == 72


def test_probe_finds_what_tokens_hold(monkeypatch):
    model, _ = make("digits")
    kept = {}

    def told(model, part):
        kept["n"] = kept.get("n", 0) + 1
        return np.eye(11)[part.cells + 1].reshape(len(part), -1)

    monkeypatch.setattr(study, "features", told)
    assert study.probe(model, WORLD, 0)["probe_uncaptioned"] == 100.0
    monkeypatch.setattr(study, "features", lambda m, part: np.ones((len(part), 4)))
    assert study.probe(model, WORLD, 0)["probe_uncaptioned"] < 40


def test_denoising_ratio_is_one_without_information():
    model, _ = make("digits")
    model.condition_head.weight.data.zero_()
    held = WORLD.make(16, stream(0, "x"), WORLD.test)
    assert study.denoising(model, held, 0, maps=False)["csr_ratio"] == pytest.approx(1.0, abs=1e-6)


def test_answers_are_the_models(monkeypatch):
    model, _ = make("digits")
    asked, images = study.questions(WORLD, 0, 10)
    asked = asked[:6]
    monkeypatch.setattr(type(model), "yes_no", lambda self, p, images: torch.tensor([[0.0, -1.0]] * len(p)))
    assert {r["answer"] for r in study.answers(model, asked, images)} == {"yes"}
    assert isinstance(asked[0], benchmarks.Question)


def test_denoising_compares_own_tokens_with_those_of_another_scene(monkeypatch):
    """A denoiser that answers with its condition: the error tells which scene's tokens it was given."""
    held = WORLD.make(6, stream(0, "x"), WORLD.test)

    class Told(torch.nn.Module):
        device = torch.device("cpu")
        scale = torch.arange(6.0)

        def encode_images(self, images):
            return type("Seen", (), {"maps": [], "condition": self.scale[:, None, None]})

        def __call__(self, z, time, condition):
            return condition[:, :, :, None].expand_as(z)

        latents = type("Z", (), {"encode": staticmethod(lambda v, g: torch.zeros(6, 1, 2, 2))})

        def noised(self, z, noise, time):
            return z, self.scale[:, None, None, None].expand_as(z)  # what its own tokens would answer

    told = Told()
    told.denoiser = told
    monkeypatch.setattr(study, "images_of", lambda *a: None)
    monkeypatch.setattr(study, "views", lambda *a: None)
    found = study.denoising(told, held, 0, maps=False)
    other = sum((a - (a - 1) % 6) ** 2 for a in range(6)) / 6
    assert found["csr_own"] == 0 and found["csr_ratio"] == 0 and found["csr_other"] == pytest.approx(other)

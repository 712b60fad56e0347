"""What the demo measures, against references: the probe, the questions, whose picture an answer is for, always-yes."""

import numpy as np
import pytest
import torch
from conftest import WORLD, make

from model import Seen
from scenes import study
from scenes.options import SceneSettings
from streams import stream


def test_probe_against_a_reference(monkeypatch):
    """Features that keep a part of what stands in the cells: ridge by an augmented least-squares problem, and loops."""
    rng = np.random.default_rng(0)
    lossy, seen = rng.normal(size=(44, 9)) * rng.uniform(0.01, 30, 9), []

    def features(model, part):
        x = 0.01 * (np.eye(11)[part.cells + 1].reshape(len(part), -1) @ lossy + rng.normal(size=(len(part), 9)))
        seen.append((x, part))
        return x

    monkeypatch.setattr(study, "features", features)
    found = study.probe(None, WORLD, 5)
    (x, fit), (y, held) = seen
    mean, std = x.mean(0), x.std(0) + 1e-6
    z, v = (np.c_[(a - mean) / std, np.ones(len(a))] for a in (x, y))
    penalty = study.RIDGE * len(x) / 100
    targets = np.eye(11)[fit.cells + 1].reshape(len(fit), -1)
    w = np.linalg.lstsq(np.r_[z, np.sqrt(penalty) * np.eye(10)], np.r_[targets, np.zeros((10, 44))], rcond=None)[0]
    right = {"uncaptioned": [], "captioned": [], "cells": []}
    for n, scores in enumerate((v @ w).reshape(len(held), 4, 11)):
        name = held.captioned()[n]
        for cell in range(4):
            hit = int(scores[cell].argmax()) - 1 == held.cells[n, cell]
            right["cells"].append(hit)
            if held.cells[n, cell] >= 0:
                right["captioned" if held.cells[n, cell] == name else "uncaptioned"].append(hit)
    shape = found.pop("probe_shape")
    assert found == {f"probe_{k}": pytest.approx(100 * np.mean(h)) for k, h in right.items()}
    details = fit.details.reshape(len(fit), -1)
    w = np.linalg.lstsq(np.r_[z, np.sqrt(penalty) * np.eye(10)], np.r_[details, np.zeros((10, 56))], rcond=None)[0]
    middle, off, all_of_it = fit.details[fit.cells >= 0].mean(0), 0.0, 0.0
    for n, drawn in enumerate((v @ w).reshape(len(held), 4, 14)):
        for cell in range(4):
            if held.cells[n, cell] >= 0:
                off += ((drawn[cell] - held.details[n, cell]) ** 2).sum()
                all_of_it += ((middle - held.details[n, cell]) ** 2).sum()
    assert shape == pytest.approx(100 * (1 - off / all_of_it), rel=1e-4) and shape < 60
    assert len(set(found.values())) == 3 and 20 < found["probe_cells"] < 90
    assert not {id(fit)} & {id(held)} and len(fit) == 1500 and len(held) == 500


def test_pope_asks_about_three_present_and_three_absent_digits_of_a_scene():
    asked, images = study.questions(WORLD, 3, 15)
    for kind in ("random", "popular", "adversarial"):
        own = [q for q in asked if q.meta["benchmark"] == "POPE" and q.group == kind]
        for picture in {q.image for q in own}:
            answers = {q.question: q.answer for q in own if q.image == picture}
            assert sorted(answers.values()) == ["no"] * 3 + ["yes"] * 3
        assert len(own) == 15 * 6
    assert {q.image for q in asked} == set(range(len(images))), "every picture is asked about"


def test_every_answer_is_about_its_own_picture_and_the_more_probable_word(monkeypatch):
    model, _ = make("digits")
    asked, images = study.questions(WORLD, 0, 10)
    brightness = [float(np.asarray(x).mean()) for x in images]
    middle = float(np.median(brightness))

    def encode(self, x):
        level = x.mean((1, 2, 3))[:, None, None]
        return Seen([level[..., None]], level, level)

    def yes_no(self, given, seen):
        assert len(given) == len(seen)
        level = seen.text[:, 0, 0]
        return torch.stack([0.05 * (level - middle).sign(), torch.zeros(len(given))], 1)

    monkeypatch.setattr(type(model), "encode_images", encode)
    monkeypatch.setattr(type(model), "yes_no", yes_no)
    rows = study.answers(model, asked, images, batch=7)
    told = [("yes" if brightness[q.image] > middle else "no", q.question, q.answer, q.group) for q in asked]
    near = [abs(brightness[q.image] - middle) < 1e-6 for q in asked]
    got = [(r["answer"], r["question"], r["label"], r["group"]) for r in rows]
    assert [g for g, n in zip(got, near, strict=True) if not n] == [t for t, n in zip(told, near, strict=True) if not n]
    assert {"yes", "no"} == {r["answer"] for r in rows}


def test_always_yes_gets_the_share_of_yes():
    names = [("POPE", g) for g in ("random", "popular", "adversarial")]
    rows = [
        {"benchmark": b, "group": g, "question": "?", "pair": "", "label": label, "answer": "no"}
        for b, g in names
        for label in ("yes", "yes", "yes", "no")
    ]
    rows += [
        {"benchmark": "MMVP", "group": "pairs", "question": "?", "pair": 0, "label": x, "answer": x}
        for x in ("yes", "no")
    ]
    found = study.answer_scores(rows, "digits")
    assert found["POPE_random_always_yes"] == found["POPE_adversarial_always_yes"] == 75
    assert found["POPE_accuracy"] == 25 and found["POPE_yes_ratio"] == 0 and found["MMVP_accuracy"] == 100


@pytest.mark.parametrize("maps", ["on", "off"])
def test_a_run_is_measured_as_it_was_trained_and_without_dropout(monkeypatch, maps):
    model, s = make("digits", stage=2, csr_use_mmfs=maps, scenes=SceneSettings(questions=10))
    model.train()
    told = {}

    def denoising(m, held, seed, *, maps):
        told.update(maps=maps, training=m.training, n=len(held))
        return {}

    monkeypatch.setattr(study, "denoising", denoising)
    monkeypatch.setattr(study, "probe", lambda m, world, seed: {"training": m.training})
    monkeypatch.setattr(study, "LOOKS", 20)
    found, rows = study.score(model, WORLD, s, 0)
    assert told == {"maps": maps == "on", "training": False, "n": 256} and not found["training"] and rows
    assert "POPE_accuracy" in found and "MMVP_accuracy" in found
    s.stage = 1
    found, rows = study.score(model, WORLD, s, 0)
    assert rows == [] and "caption_accuracy" in found and not any(k.startswith(("POPE", "MMVP")) for k in found)


def test_denoising_reads_the_scenes_own_maps_in_both_errors():
    """With maps the tokens add little: what differs between the two errors is the condition alone."""
    model, _ = make("digits")
    held = WORLD.make(8, stream(0, "x"), WORLD.test)
    plain, own = (study.denoising(model, held, 0, maps=m) for m in (False, True))
    with torch.no_grad():
        for p in model.denoiser.net.parameters():
            p.add_(0.05)
    again, other = (study.denoising(model, held, 0, maps=m) for m in (False, True))
    assert plain == again and own["csr_own"] != other["csr_own"] and own["csr_other"] != other["csr_other"]


def test_looks_tell_a_model_that_sees_and_reads_from_one_that_does_not(monkeypatch):
    """Models that answer by rule: out of the picture and the text, or always the most frequent digit and yes."""
    model, _ = make("digits")
    monkeypatch.setattr(study, "LOOKS", 120)
    held = WORLD.make(120, stream(4, "looks"), WORLD.test)
    names = {
        x.tobytes(): c for x, c in zip((held.images * 255).round().astype(np.uint8), held.captioned(), strict=True)
    }

    def by_rule(prompts, words, images=None):
        out = torch.zeros(len(prompts), len(words))
        for i, parts in enumerate(prompts):
            if images is not None:
                picture, begun = parts
                assert begun.text == "there is a" and words == WORLD.names and len(images) == len(prompts)
                out[i, names[np.asarray(picture.load())[:, :, 0].tobytes()]] = 1
            else:
                told, asked = parts[0].text.split(" . ") if " . " in parts[0].text else parts[0].text.split(". ", 1)
                digit = asked.split()[3]
                out[i, 0 if f"a {digit}" in told.replace(" and", "") else 1] = 1
        return out

    monkeypatch.setattr(model, "word_scores", by_rule)
    found = study.looks(model, WORLD, 4)
    guess = 100 * np.bincount(held.captioned()).max() / 120
    assert found["caption_accuracy"] == found["text_accuracy"] == 100 and found["caption_guess"] == pytest.approx(guess)
    common = int(np.bincount(held.captioned()).argmax())
    blind = lambda p, words, images=None: torch.eye(len(words))[common if images is not None else 0].repeat(len(p), 1)  # noqa: E731
    monkeypatch.setattr(model, "word_scores", blind)
    found = study.looks(model, WORLD, 4)
    assert found["caption_gain"] == pytest.approx(0) and 35 < found["text_accuracy"] < 65

"""eval.py --images: a folder of one's own pictures, with names of a model or a file, and the two rules of `flagged`."""

import csv
import json

from lab.runs import UserError

import numpy as np
import pytest
import torch
from PIL import Image
from test_cli import call
from test_papertables import FakeBackbone, vector

import backbones
import eval as evaluate
import scores
from names import providers
from scores import normalise


class Asked:
    """A language model that names two things for each class."""

    name, continues, asked = "asked", False, 0

    def __init__(self, *args):
        pass

    def complete(self, messages, q):
        type(self).asked += 1
        return {"cat": "- toy\n- black cat\n- cloud", "garden chair": "- bench\n- cloud"}[q.id_names[0]]


@pytest.fixture
def own(monkeypatch, tmp_path):
    """Seven pictures, four of them known; features by name."""
    rng = np.random.default_rng(0)
    for place, n in (("pictures", 7), ("known", 4)):
        (tmp_path / place / "deep").mkdir(parents=True)
        for i in range(n):
            where = tmp_path / place / ("deep" if i % 2 else "") / f"{i}.png"
            Image.fromarray(rng.integers(0, 255, (9, 9, 3), np.uint8)).save(where)
    monkeypatch.setattr(backbones, "load", lambda *a, **k: FakeBackbone())
    features = lambda b, s, *a: normalise(torch.stack([vector(p.name) for p in s.items]))  # noqa: E731
    monkeypatch.setattr(backbones, "image_features", features)
    monkeypatch.setattr(providers, "LocalModel", Asked)
    monkeypatch.setattr(Asked, "asked", 0)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def scored(own, monkeypatch, *more: str) -> list[dict]:
    words = ["--images", "pictures", "--classes", "cat, garden chair", "--envision", "near", "--out", "out"]
    words += [*([] if "--labels" in more or "--classes" in more else ["--model", "smollm2"]), *more]
    call(evaluate, monkeypatch, *words)
    return list(csv.DictReader(open(own / "out" / "scores.csv")))


def test_a_folder_is_scored_and_sorted(own, monkeypatch, capsys):
    rows = scored(own, monkeypatch)
    assert [*rows[0]] == ["name", "class", "score", "flagged", "envisioned"] and len(rows) == 7
    kept = json.loads((own / "out" / "names.json").read_text())
    assert kept["names"] == {"cat": ["toy", "black cat", "cloud"], "garden chair": ["bench", "cloud"]}
    assert kept["made_by"] == "smollm2" and Asked.asked == 2
    classes, names = ["cat", "garden chair"], ["toy", "cloud", "bench"]  # the word rule of the near task; once each
    text, out = (torch.stack([vector(f"a photo of a {n}") for n in x]) for x in (classes, names))
    for row in rows:
        v = normalise(vector(row["name"].split("/")[-1])[None])
        assert float(row["score"]) == pytest.approx(float(scores.eoe(v, text, out)), abs=1e-7)
        near, far = (v @ normalise(t).T for t in (text, out))
        assert row["class"] == classes[int(near.argmax())] and row["envisioned"] == names[int(far.argmax())]
        assert (row["flagged"] == "True") == bool(far.max() > near.max())
    assert [float(r["score"]) for r in rows] == sorted(float(r["score"]) for r in rows)
    assert (own / "out" / "lowest.png").stat().st_size > 1000
    assert "7 pictures" in capsys.readouterr().out
    scored(own, monkeypatch)
    assert Asked.asked == 2  # the names are kept
    scored(own, monkeypatch, "--n", "1")
    assert Asked.asked == 4  # another question


def test_flagged_by_pictures_that_are_known(own, monkeypatch, capsys):
    (own / "mine.json").write_text(json.dumps({"names": ["kite", "cloud"]}))
    rows = scored(own, monkeypatch, "--labels", "mine.json", "--known", "known")
    both = (["cat", "garden chair"], ["kite", "cloud"])
    text, out = (torch.stack([vector(f"a photo of a {n}") for n in x]) for x in both)
    known = scores.eoe(torch.stack([vector(f"{i}.png") for i in range(4)]), text, out)
    for row in rows:
        assert (row["flagged"] == "True") == (float(row["score"]) < float(known.min()) - 1e-7)


def test_names_of_this_project_class_by_class(own, monkeypatch):
    rows = scored(own, monkeypatch, "--classes", "Cat,dog")
    assert {r["class"] for r in rows} <= {"Cat", "dog"} and Asked.asked == 0
    assert {r["envisioned"] for r in rows} <= {"fox", "rabbit", "teddy bear", "wolf", "sheep", "fur rug"}
    with pytest.raises(UserError, match="no near names for garden gnome; ask a language model"):
        scored(own, monkeypatch, "--classes", "cat,garden gnome")
    with pytest.raises(UserError, match="no far names for cat"):
        scored(own, monkeypatch, "--classes", "cat", "--envision", "far")


@pytest.mark.parametrize(
    ("more", "word"),
    [
        (["--classes", ","], "holds no name"),
        (["--known", "nowhere"], "--known nowhere is no folder"),
        (["--images", "nowhere"], "--images nowhere is no folder"),
        (["--envision", ""], "go together"),
        (["--labels", "released"], "takes names of --model"),
        (["--labels", "nowhere.json"], "no file"),
    ],
)
def test_odd_options_of_a_folder(more, word, own, monkeypatch):
    with pytest.raises(UserError, match=word):
        scored(own, monkeypatch, *more)

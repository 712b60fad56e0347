"""Scale real on made-up images and features: splits, lists, controls, their records, and the figures made of them."""

import itertools
import json
import os
import random
from pathlib import Path
from types import SimpleNamespace

from lab import runs
from lab.records import long
from lab.runs import UserError

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from test_papertables import FakeBackbone, vector

import backbones
import claims
import data
import metrics
import scores
from names import reading
from real import bootstrap, pictures, sets, study, tasks
from scores import normalise
from settings import EvalSettings
from standins import layout

CPU = torch.device("cpu")


def fake(name: str, root, most: int = 0) -> data.ImageSet:
    names = {
        **{"cifar10": list(sets.CIFAR), "mnist": ["digit zero", "digit one"], "omniglot": ["letter of Angelic"]},
        **{"texture-wheel": ["brick", "grass"], "faces": ["face"]},
        **{"davis-id": [*sets.DAVIS_ID.values()], "davis-ood": [*sets.DAVIS_OOD.values()]},
    }[name]
    labels = [k for k in range(len(names)) for _ in range(6)]
    rng = np.random.default_rng(len(name))
    return data.made(name, [rng.integers(0, 255, (8, 8, 3), np.uint8) for _ in labels], labels, names, "made up")


class Backbone(FakeBackbone):
    name = "conse-lite0"


@pytest.fixture
def made_up(monkeypatch, tmp_path):
    monkeypatch.setattr(sets, "load", fake)
    monkeypatch.setattr(backbones, "load", lambda *a, **k: Backbone())
    monkeypatch.setattr(backbones, "CachedTexts", lambda b: b)
    monkeypatch.setattr(tasks, "NOUNS", 300)
    features = lambda b, s, *a: normalise(torch.stack([vector(f"{s.name} {i}") for i in range(len(s))]))  # noqa: E731
    monkeypatch.setattr(backbones, "image_features", features)
    folder = tmp_path / "data" / "eoe" / "neglabel_wordnet"
    folder.mkdir(parents=True)
    for kind in ("artifact", "body", "object", "plant"):
        (folder / f"noun.{kind}.txt").write_text("".join(f"{kind} {i}\n" for i in range(200)) + "cargo ship\n")
    return tmp_path / "data"


def records(kind: str, root, out, **more) -> list[dict]:
    s = EvalSettings(study=kind, scale="real", data_dir=str(root), out=str(out), splits=3, bootstrap=20,
                     draws=2, **more)  # fmt: skip
    s.check()
    run = runs.Run(out, s)
    study.run_study(s, run, 0, CPU)
    return run.finish()


def named(found: list[dict], table: str = "real") -> dict:
    keyed = {(r["dataset"], r["setting"], r["method"]): r["metrics"] for r in found if r["table"] == table}
    assert len(keyed) == sum(r["table"] == table for r in found)  # no row twice
    return keyed


@pytest.mark.parametrize("kind", ["near", "fine", "far", "davis"])
def test_every_study_makes_its_rows(kind, made_up, tmp_path):
    found = named(records(kind, made_up, tmp_path / "r"))
    shown = {"near": {"near"}, "fine": {"fine-grained"}, "davis": {"DAVIS"}}.get(kind)
    titles = ("MNIST", "Omniglot", "textures", "faces", "mean of 4 sets")
    assert {d for d, *_ in found} == (shown or {f"far: {t}" for t in titles})
    assert {s for _, s, _ in found} == {"lite0, a photo of a", "lite0, bare"}
    methods = {m for *_, m in found}
    own = [f"EOE({k})" for k in tasks.LISTS if k != "own fine" or kind in ("fine", "davis")]
    assert {"MCM", "MaxLogit", "Energy", "Ground Truth", *own} <= methods
    for method in own:
        assert {f"{c} for {method}" for c in ("irrelevant names", "WordNet nouns")} <= methods
    assert ("animals for EOE(own fine)" in methods) == (kind == "fine") and "animals for EOE(own far)" not in methods
    for (dataset, setting, method), m in found.items():
        assert np.isfinite([v for v in m.values()]).all()
        alone = dataset in ("far: Omniglot", "far: faces")  # one group: images are no sample of others
        assert ("FPR95_low" in m) == (not alone)
        if method in own:
            for metric, sign in (("FPR95", -1), ("AUROC", 1)):
                others = {"gain": "MCM", "beyond_irrelevant": f"irrelevant names for {method}"}
                others |= {"beyond_nouns": f"WordNet nouns for {method}", "beyond_maxlogit": "MaxLogit"}
                others |= {"beyond_beta0": method.replace("EOE", "S_MSP")}
                others |= {"beyond_animals": f"animals for {method}"} if "own fine" in method and kind == "fine" else {}
                for name, other in others.items():
                    gap = sign * (m[metric] - found[dataset, setting, other][metric])
                    assert m[f"{name}_{metric}"] == pytest.approx(gap, abs=1e-9)
                    assert alone or m[f"{name}_{metric}_low"] <= m[f"{name}_{metric}_high"]
                left = sign * (found[dataset, setting, "Ground Truth"][metric] - m[metric])
                assert m[f"left_to_truth_{metric}"] == pytest.approx(left, abs=1e-9)
            assert m["labels"] == found[dataset, setting, f"irrelevant names for {method}"]["labels"]
            assert found[dataset, setting, f"irrelevant names for {method}"]["hits"] == 0


def test_numbers_are_those_of_a_plain_evaluation(made_up, tmp_path):
    """MCM and EOE of the near study, split by split, by the metrics of the other tables."""
    found = named(records("near", made_up, tmp_path / "r"))
    chosen = random.Random("near 0").sample(list(itertools.combinations(sets.CIFAR, 6)), 3)
    pictures_ = {c: [vector(f"cifar10 {6 * k + i}") for i in range(6)] for k, c in enumerate(sets.CIFAR)}
    file = runs.HERE / "envisioned" / "cifar10-near.json"
    want: dict = {}
    for ids in chosen:
        inside, outside = (torch.stack([v for c in cs for v in pictures_[c]])
                           for cs in (ids, [c for c in sets.CIFAR if c not in ids]))  # fmt: skip
        names = [n for c in ids for n in reading.read_names(file).groups[c]]
        out = reading.clean(names, list(ids), "near").names
        text, other = (torch.stack([vector(f"a photo of a {n}") for n in x]) for x in (ids, out))
        for method, beta, rows in (("MCM", 0.0, other[:0]), ("EOE(own near)", 0.25, other)):
            both = [scores.eoe(x, text, rows, beta) for x in (inside, outside)]
            want.setdefault(method, []).append(metrics.measure(*both))
    for method, each in want.items():
        for metric in ("FPR95", "AUROC"):
            mean = np.mean([m[metric] for m in each])
            assert found["near", "lite0, a photo of a", method][metric] == pytest.approx(mean, abs=1e-3)


def test_controls_say_nothing_of_the_classes_and_are_as_many(made_up):
    made = tasks.pool("near", made_up, 0, 3)
    found = tasks.controls(made, made_up, 0, "near")
    assert {*found} == {"irrelevant names", "WordNet nouns"} and "cargo ship" not in found["WordNet nouns"]
    for names in found.values():
        assert not {w for n in names for w in n.split()} & {*sets.CIFAR}
    assert tasks.drawn(found["WordNet nouns"], 5, 0, "x") == tasks.drawn(found["WordNet nouns"], 5, 0, "x")
    assert tasks.drawn(found["WordNet nouns"], 5, 0, "x") != tasks.drawn(found["WordNet nouns"], 5, 1, "x")
    with pytest.raises(UserError, match="9999 names are asked"):
        tasks.drawn(found["WordNet nouns"], 9999, 0)


def test_animals_are_neither_classes_of_the_study_nor_kinds_of_one(made_up):
    made = tasks.pool("fine", made_up, 0, 20)
    found = tasks.controls(made, made_up, 0, "fine")["animals"]
    assert len(found) == len({*found}) > 113  # as many as the longest list that stands beside them
    assert {"tench", "zebra", "giant panda"} <= {*found}
    # a dog, a bird, a bird without its word, a frog, a cat, a horse; no animal
    gone = {
        "chihuahua",
        "bald eagle",
        "brambling",
        "american bullfrog",
        "egyptian mau",
        "common sorrel horse",
        "abacus",
    }
    assert not gone & {*found}
    one = tasks.pool("davis", made_up, 0, 1)  # birds and dogs alone
    assert {"egyptian mau", "zebra"} <= {*tasks.animals(one)} and "brambling" not in tasks.animals(one)


def test_kinds_of_the_ood_classes_are_left_out_and_those_of_id_classes_stay():
    split = tasks.Split(["cat", "dog", "horse"], ["bird", "deer", "frog"], None, None)
    names = ["bird", "owl", "snowy owl", "moose", "toad", "lynx", "wolf", "animal", "zebra"]
    assert study.fewer(names, split, "") == names
    assert study.fewer(names, split, study.FREE) == names[1:]
    assert study.fewer(names, split, study.KINDLESS) == ["lynx", "wolf", "zebra"]
    assert tasks.is_kind("Barn Owl", ["bird"]) and not tasks.is_kind("owlet moth", ["bird"])


def test_rows_without_names_count_what_is_left(made_up, tmp_path):
    found = named(records("fine", made_up, tmp_path / "r"))
    row = {end: found["fine-grained", "lite0, bare", f"EOE(own fine){end}"] for end in ("", study.FREE, study.KINDLESS)}
    assert row[""]["hits"] == 3 and row[study.FREE]["hits"] == row[study.KINDLESS]["hits"] == 0
    assert row[""]["labels"] - row[study.FREE]["labels"] == 3
    splits = tasks.pool("fine", made_up, 0, 3).splits
    left = [len(study.fewer(tasks.own("own fine", s, 0), s, study.KINDLESS)) for s in splits]
    assert row[study.KINDLESS]["labels"] == pytest.approx(np.mean(left)) and np.mean(left) < row[study.FREE]["labels"]
    control = found["fine-grained", "lite0, bare", f"animals for EOE(own fine){study.KINDLESS}"]
    assert control["labels"] == row[study.KINDLESS]["labels"] and "gain_FPR95_low" in control
    assert "S_MSP(own fine)" in {m for *_, m in found}


def test_units_of_an_interval_are_the_fewest_classes_of_a_side(made_up):
    made = {k: tasks.pool(k, made_up, 0, 3) for k in tasks.STUDIES}
    units = {d: p.units(v) for p in made.values() for d, v in p.shown.items()}
    assert units == {"near": 10, "fine-grained": 6, "far: MNIST": 2, "far: Omniglot": 1, "far: textures": 2,
                     "far: faces": 1, "far: mean of 4 sets": 10, "DAVIS": 4}  # fmt: skip
    assert [d for p in made.values() for d, v in p.shown.items() if p.apart(v)] == ["far: mean of 4 sets"]


def test_a_mean_of_sets_has_the_wider_of_two_intervals():
    """Images say +-0.1, four sets of 0, 10, 20 and 30 points say 15 +- 3.182 x 12.91 / 2."""
    v = np.array([0.0, 10, 20, 30])[:, None] + np.r_[0, np.random.default_rng(0).normal(0, 0.05, 200)]
    one, two = (study.told("x", v, 10, apart) for apart in (False, True))
    assert one["x"] == two["x"] == 15 and one["x_high"] - 15 < 0.2
    assert two["x_high"] - 15 == pytest.approx(3.1824 * np.std([0, 10, 20, 30], ddof=1) / 2, abs=1e-3)
    assert two["x_high"] - 15 == pytest.approx(15 - two["x_low"])
    assert study.told("x", v, 1, False) == {"x": 15}  # one class: no interval
    assert study.told("x", v[:, :1], 10, True) == {"x": 15}  # no replicate


def test_gains_are_paired_replicate_by_replicate():
    """A method that is always two points better leaves no doubt about it, however much both of them vary."""
    v = np.random.default_rng(0).normal(50, 10, (3, 41))
    found = {"EOE(x)": {"FPR95": v, "AUROC": v}, "MCM": {"FPR95": v + 2, "AUROC": v - 2}}
    found |= {pool: found["MCM"] for pool in (f"{p} for EOE(x)" for p in study.POOLS.values())}
    made = SimpleNamespace(units=lambda splits: 6, apart=lambda splits: False)
    m = study.compared("EOE(x)", found, [0, 1, 2], made)
    assert m["FPR95_high"] - m["FPR95_low"] > 5
    for what in ("gain", *(f"beyond_{k}" for k in study.POOLS)):
        for metric in study.HIGHER:
            assert [m[f"{what}_{metric}{end}"] for end in ("", "_low", "_high")] == pytest.approx([2, 2, 2], abs=1e-9)


def test_every_method_and_split_is_judged_on_the_same_replicates():
    """Column r of every method in every split is the metric of the images as row r of the weights repeats them."""
    groups = np.repeat(np.arange(4), 6)
    w = bootstrap.weights(groups, np.zeros(24, int), 12, 0)
    sides = [(np.isin(groups, ids), np.isin(groups, oods)) for ids, oods in (([0, 1], [2, 3]), ([0], [1, 3]))]
    splits = [tasks.Split([], [], *masks) for masks in sides]
    score = torch.from_numpy(np.random.default_rng(1).normal(size=(24, 2)))
    each = lambda number, split, x: {"a": [x[:, 0].numpy()], "b": [x[:, 1].numpy(), -x[:, 1].numpy()]}  # noqa: E731
    found = study.judged(SimpleNamespace(splits=splits), score, np.ascontiguousarray(w.T), each, True)
    for k, (inside, outside) in enumerate(sides):
        for r, times in enumerate(w.astype(int)):
            own, other = (np.repeat(score[m].numpy(), times[m], 0) for m in (inside, outside))
            if not len(own) or not len(other):
                assert np.isnan(found["a"]["FPR95"][k, r])
                continue
            one, *two = (metrics.measure(s * own[:, i], s * other[:, i]) for i, s in ((0, 1), (1, 1), (1, -1)))
            for metric in study.HIGHER:
                assert found["a"][metric][k, r] == pytest.approx(one[metric], abs=1e-4)
                assert found["b"][metric][k, r] == pytest.approx(np.mean([x[metric] for x in two]), abs=1e-4)


def test_splits_are_disjoint_and_belong_to_their_seed(made_up):
    for kind, k in (("near", 6), ("fine", 3)):
        made = tasks.pool(kind, made_up, 0, 20)
        assert len(made.splits) == 20 and len({tuple(s.id_names) for s in made.splits}) == 20
        for s in made.splits:
            assert len(s.id_names) == k and not {*s.id_names} & {*s.truth} and not (s.inside & s.outside).any()
            assert {made.labels[i] for i in np.flatnonzero(s.inside)} == {sets.CIFAR.index(c) for c in s.id_names}
    one, two = (tasks.pool("near", made_up, seed, 5).splits for seed in (0, 1))
    assert [s.id_names for s in one] != [s.id_names for s in two]
    far = tasks.pool("far", made_up, 0, 1)
    assert [s.truth for s in far.splits] == [fake(n, None).names for n in tasks.FAR]
    assert len({*far.groups}) == 10 + 2 + 1 + 2 + 1 and {*far.strata} == {0, 1, 2, 3, 4}


def test_published_lists_are_read_where_the_user_has_them(made_up, tmp_path):
    with pytest.raises(UserError, match="no envisioned names in .*near_3"):
        records("near", made_up, tmp_path / "r", labels="released")
    folder = made_up / "eoe" / "envisioned_classes" / "near_3"
    folder.mkdir(parents=True)
    for run in range(tasks.RUNS):
        names = {c: [f"{c} look {run}", f"thing {run}", "lamp"] for c in sets.CIFAR}
        (folder / f"cifar10_gpt-3.5-turbo-16k_{run}.json").write_text(json.dumps(names))
    found = named(records("near", made_up, tmp_path / "r2", labels="released"))
    assert "MCM" not in {m for *_, m in found}  # it stands in the record of the own lists
    assert found["near", "lite0, bare", "EOE(published near)"]["labels"] == 2  # the word rule, and once each


def test_what_is_missing_is_named(made_up, tmp_path, monkeypatch):
    (made_up / "eoe" / "neglabel_wordnet" / "noun.body.txt").unlink()
    with pytest.raises(UserError, match="no WordNet nouns"):
        records("near", made_up, tmp_path / "r")
    monkeypatch.undo()
    for name in ("cifar10", "mnist", "omniglot", "davis-id"):
        with pytest.raises(UserError, match="is not in .*expected"):
            sets.load(name, tmp_path)
    (tmp_path / "cifar10").mkdir()
    (tmp_path / "cifar10" / "cifar10-jpeg.tar.xz").write_bytes(b"half")
    with pytest.raises(UserError, match="cifar10 in .* is damaged"):
        sets.load("cifar10", tmp_path)


def test_pictures_out_of_packages():
    texture, face = sets.load("texture-wheel", runs.HERE), sets.load("faces", runs.HERE, 7)
    assert len(texture) == 192 and texture.names == ["brick", "grass", "gravel"] and texture[0].size == (64, 64)
    assert len(face) == 7 and face[0].size == (25, 25)


def test_drawn_pictures_in_the_layout_of_real_data(tmp_path):
    """What smoke runs the studies on: read as CIFAR-10, with nouns enough for the longest list."""
    layout.write(tmp_path, 2)
    found = sets.load("cifar10", tmp_path)
    assert len(found) == 20 and found.labels == [k for k in range(10) for _ in range(2)] and found[0].size == (32, 32)
    made = tasks.pool("fine", tmp_path, 0, 2)
    nouns = tasks.controls(made, tmp_path, 0, "fine")["WordNet nouns"]
    assert len(nouns) >= max(len(tasks.own(k, s)) for k in tasks.LISTS for s in made.splits)
    assert len([*(tmp_path / "pictures").glob("*.png")]) == 10


def test_gains_are_drawn_over_all_that_a_list_stands_beside(made_up, tmp_path):
    found = [r | {"run": "x"} for r in records("fine", made_up, tmp_path / "r")]
    figure, _ = pictures.gains(found)
    told = [t.get_text() for t in figure.legends[0].get_texts()]
    assert told == ["over MCM", "over as many irrelevant names", "over as many random animals"]
    assert "own fine,\nno OOD names or kinds" in {t.get_text() for t in figure.axes[0].get_yticklabels()}
    plt.close(figure)


def test_heat_maps_of_a_metric_have_one_range(made_up, tmp_path):
    found = [r | {"run": "x"} for r in records("near", made_up, tmp_path / "r")]
    figure, caption = pictures.heat(found)
    maps = [a.images[0] for a in figure.axes if a.images]
    bars = {a.get_ylabel() for a in figure.axes if a.get_ylabel().endswith("(%)")}
    assert len(maps) == 4 and {m.get_clim() for m in maps[:2]} == {(0, 100)} and bars == {"FPR95 (%)", "AUROC (%)"}
    assert {m.get_clim() for m in maps[2:]} == {(50, 100)} and "one range of colours" in caption
    plt.close(figure)


def test_figures_of_scale_real(made_up, tmp_path, monkeypatch):
    files = {"read_tensors": runs.read_tensors, "write_tensors": runs.write_tensors}
    monkeypatch.setattr(pictures, "runs", SimpleNamespace(HERE=tmp_path, **files))
    made: list[dict] = []
    for kind in ("near", "far"):
        out = tmp_path / "runs" / "real" / f"{kind}-own-conse-lite0"
        made += [{**r, "run": out.name} for r in records(kind, made_up, out)]
    drawn = dict(pictures.figures(made, "real"))
    assert {k for k, v in drawn.items() if v} == {"gains", "heat", "score-histograms", "images"}
    assert not any(v for _, v in pictures.figures([], "real"))
    said = claims.bottom_line({"real": long(made)})
    assert len(said) == 1 and "fine-grained not measured" in said[0] and "far not measured" not in said[0]
    assert claims.bottom_line({}) == []


@pytest.mark.realdata
@pytest.mark.slow
def test_a_study_on_real_images(tmp_path, monkeypatch):
    root = Path(os.environ.get("REPRO_DATA", "nowhere"))
    if not (root / "cifar10").is_dir() or not (root / "eoe" / "neglabel_wordnet").is_dir():
        pytest.skip("no $REPRO_DATA/cifar10 or $REPRO_DATA/eoe/neglabel_wordnet")
    monkeypatch.setenv("EOE_CACHE", str(tmp_path / "cache"))
    found = named(records("near", root, tmp_path / "r", backbone="conse-lite0", limit=3, workers=0))
    assert 30 < found["near", "lite0, a photo of a", "MCM"]["accuracy"] <= 100

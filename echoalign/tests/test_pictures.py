"""A folder of pictures with swapped labels, ranked; what of EfficientNet-Lite0 is read; what cannot be ranked."""

import csv
import importlib.metadata

from lab.runs import UserError

import numpy as np
import pytest
import torch
from conftest import start, told
from PIL import Image
from sklearn.datasets import load_digits

import eval as evaluation
import features
import readers


@pytest.fixture(scope="module")
def lite0():
    return features.Lite0(torch.device("cpu"), size=96)


def digits(folder, each=40, swapped=10):
    """Pictures of scikit-learn's digits, a folder a class; the names of those that lie in a wrong one."""
    found, rng = load_digits(), np.random.RandomState(0)
    chosen = [i for k in range(10) for i in np.flatnonzero(found.target == k)[:each]]
    wrong = set(rng.choice(chosen, swapped, replace=False).tolist())
    for i in chosen:
        label = (found.target[i] + (rng.randint(1, 10) if i in wrong else 0)) % 10
        place = folder / f"digit{label}" / f"{i}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((found.images[i] * 15.9).astype(np.uint8)).resize((32, 32), Image.Resampling.NEAREST).save(
            place
        )
    return {f"{i}.png": f"digit{found.target[i]}" for i in wrong}


def test_ten_swapped_labels_come_to_the_front(tmp_path, monkeypatch, capsys, lite0):
    wrong = digits(tmp_path / "in")
    monkeypatch.setattr(evaluation, "Lite0", lambda device: lite0)
    start(monkeypatch, "--images", tmp_path / "in", "--out", tmp_path / "out", "--worst", "20", main=evaluation.main)
    assert "400 pictures of 10 classes" in capsys.readouterr().out
    rows = list(csv.DictReader((tmp_path / "out" / "labels.csv").open()))
    assert len(rows) == 400 and [int(r["rank"]) for r in rows] == list(range(1, 401))
    front = [r for r in rows[:20] if r["file"].split("/")[1] in wrong]
    assert len(front) >= 8
    assert sum(r["likeliest"] == wrong[r["file"].split("/")[1]] for r in front) >= 7  # and the true class is named
    page = (tmp_path / "out" / "labels.html").read_text()
    assert page.count("<figure>") == 20 and page.count("data:image/png;base64,") == 20 and rows[0]["file"] in page
    assert "http" not in page  # it needs nothing from elsewhere


def test_what_cannot_be_ranked_is_told(tmp_path, monkeypatch, capsys, lite0):
    monkeypatch.setattr(evaluation, "Lite0", lambda device: lite0)

    def says(*args):
        return told(capsys, monkeypatch, evaluation.main, args)

    assert "give --run" in says() and "give --run" in says("--run", "a", "--images", "b")
    assert "is no folder" in says("--images", tmp_path / "none")
    digits(tmp_path / "in", each=6, swapped=1)
    (tmp_path / "one" / "a").mkdir(parents=True)
    assert "pictures in 0 folders" in says("--images", tmp_path / "one")
    assert "--worst must be at least 1" in says("--images", tmp_path / "in", "--worst", "0")
    broken = tmp_path / "in" / "digit3" / "x.jpg"
    broken.write_bytes(b"no picture")
    assert "x.jpg cannot be read as a picture" in says("--images", tmp_path / "in", "--out", tmp_path / "o")
    few = tmp_path / "few"
    for k, n in (("a", 6), ("b", 2)):
        (few / k).mkdir(parents=True)
        for i in range(n):
            Image.new("L", (8, 8), i).save(few / k / f"{i}.png")
    assert "class b has 2 pictures" in says("--images", few)


def test_lite0_is_the_library_s_network_with_the_wheel_s_weights(lite0):
    import timm

    net = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    state = torch.load(lite0.weights_file(), map_location="cpu", weights_only=True)
    net.load_state_dict(dict(zip(net.state_dict(), state.values(), strict=True)))
    net.eval()
    g = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (3, 96, 96, 3), generator=g, dtype=torch.uint8)
    with torch.no_grad():
        f = net.forward_head(net.forward_features((x.permute(0, 3, 1, 2) / 255 - 0.498) / 0.502), pre_logits=True)
        p = torch.softmax(net.get_classifier()(f), 1)
    assert lite0(x).shape == (3, 1280) and torch.nn.functional.cosine_similarity(lite0(x), f).min() > 0.99  # bf16
    found = lite0.grouped(f, [(0, 1), range(500, 900)])
    odds = (p[:, :2].sum(1) + 1e-6) / (p[:, 500:900].sum(1) + 1e-6)
    assert torch.allclose(found.mean(0), torch.tensor([0.5, 0.5]), atol=1e-3)  # equally frequent
    scale = (found[:, 0] / found[:, 1]) / odds  # and nothing but the frequencies is changed
    assert torch.allclose(scale, scale[:1], rtol=1e-3) and torch.allclose(found.sum(1), torch.ones(3))
    assert torch.allclose(lite0(x[..., :1]), lite0(x[..., :1].expand(-1, -1, -1, 3)), atol=1e-3)  # grey pictures


def test_imagenet_s_groups_are_disjoint_and_complete():
    every = [i for group in readers.IMAGENET10.values() for i in group]
    assert len(every) == len(set(every)) and tuple(readers.IMAGENET10) == readers.CIFAR10 and max(every) < 1000


@pytest.mark.realdata
def test_imagenet_s_groups_name_the_classes_of_cifar10():
    """A wrong number in a group would show: every class that ImageNet has is recognised far above chance."""
    from lab.runs import data_dir

    if not (data_dir("") / "cifar10").is_dir():
        pytest.skip("no cifar10 in the data folder")
    d = readers.load("cifar10", data_dir(""))
    pick = torch.cat([torch.nonzero(d.test.y == k)[:30, 0] for k in range(10)])
    net = features.Lite0(torch.device("cpu"))
    said = net.grouped(net(d.test.x[pick]), tuple(readers.IMAGENET10.values())).argmax(1).view(10, 30)
    right = (said == torch.arange(10)[:, None]).double().mean(1)
    assert right.mean() > 0.5 and right.min() > 0.25


def test_a_missing_or_broken_wheel_is_named(monkeypatch, tmp_path):
    class File:
        suffix = ".pth"

        def locate(self):
            return tmp_path / "w.pth"

    monkeypatch.setattr(importlib.metadata, "files", lambda name: [File()])
    for content, words in ((None, "are not here"), (b"no checkpoint", "readable checkpoint"), ({}, "does not hold")):
        if isinstance(content, bytes):
            (tmp_path / "w.pth").write_bytes(content)
        elif content is not None:
            torch.save({"a": torch.zeros(3)}, tmp_path / "w.pth")
        with pytest.raises(UserError, match=words):
            features.Lite0(torch.device("cpu"))

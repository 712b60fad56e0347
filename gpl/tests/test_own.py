"""A graph that is not in the folder: from Data, from files, through train.py and through gpl.fit."""

import json
import re
import sys
from pathlib import Path

from lab import runs
from lab.runs import UserError

import numpy as np
import pytest
import torch
from torch_geometric.data import Data

import data
import eval as command
import gpl
import own
import train
from settings import Settings
from trainer import Trainer

README = Path(__file__).resolve().parents[1] / "README.md"
QUICK = dict(warmup=4, epochs=4)


def example(n: int = 80) -> Data:
    g = data.synthetic(3, 0.3, n=n)
    classes = torch.where(g.y == 1, 2, 5)
    return Data(x=g.x, edge_index=torch.cat([g.edge, g.edge[:, :7].flip(0), torch.tensor([[4], [4]])], 1), y=classes)


def call(monkeypatch, module, words: list[str]) -> None:
    monkeypatch.setattr(sys, "argv", [module.__name__, *words])
    runs.command(module.main)


def test_edges_are_undirected_and_classes_become_positive_or_not():
    d = example()
    g = own.from_pyg(d, positive=2)
    assert torch.equal(g.edge, data.synthetic(3, 0.3, n=80).edge) and torch.equal(g.y, (d.y == 2).long())
    assert g.known and g.labelled is None and g.h == pytest.approx(0.3, abs=0.01)


def test_labelled_nodes_as_mask_ids_or_attribute():
    d = example()
    d.train_mask = torch.isin(torch.arange(80), (d.y == 2).nonzero().flatten()[:6])
    ids = d.train_mask.nonzero().flatten().tolist()
    for labelled in (d.train_mask, ids, "train_mask"):
        g = own.from_pyg(d, labelled=labelled)
        assert torch.equal(g.labelled, d.train_mask) and not g.known
        split = data.pu_split(g.y, 0.5, 0.5, 0.1, 0, g.labelled)
        assert torch.equal(split.labelled, d.train_mask) and split.held_p.sum() == 3


@pytest.mark.parametrize(
    "change, words, expected",
    [
        (dict(x=None), dict(positive=2), "needs x"),
        (dict(x=torch.full((80, 3), float("nan"))), dict(positive=2), "NaN"),
        (dict(edge_index=torch.tensor([[0], [80]])), dict(positive=2), "edge ends at node 80"),
        (dict(edge_index=torch.tensor([[3], [3]])), dict(positive=2), "no edge between two"),
        (dict(y=None), dict(positive=2), "needs y"),
        ({}, dict(positive=3), "there are 2, 5"),
        ({}, {}, "say which class"),
        ({}, dict(labelled="mask"), "has no 'mask'"),
        ({}, dict(labelled=[0, 99]), "labelled node 99"),
        ({}, dict(labelled=[0]), "two labelled"),
        ({}, dict(positive=2, labelled=list(range(10))), "only positives"),
    ],
)
def test_what_cannot_be_right_is_refused(change, words, expected):
    d = example()
    for key, value in change.items():
        d[key] = value
    with pytest.raises(UserError, match=re.escape(expected)):
        own.from_pyg(d, **words)


@pytest.mark.parametrize("prior", ["frozen", "bbe"])
def test_fit_is_what_train_does(prior):
    """Two writings of Algorithm 1, one to read and one that resumes: the same numbers to the last bit."""
    g = own.from_pyg(example(), positive=2)
    s = Settings(dataset="karate", seeds=(5,), prior=prior, **QUICK)
    s.check()
    t = Trainer(s, torch.device("cpu"), [g])
    want = t.fit()[0]
    found = gpl.fit(g, seed=5, prior=prior, **QUICK)
    assert torch.equal(found.posterior, want) and torch.equal(found.weight, t.method.weight[0])
    assert found.prior == t.method.pi.item() and (found.weight < 1).any()


def test_fit_takes_a_known_prior_and_refuses_an_impossible_one():
    assert gpl.fit(example(), positive=2, prior=0.25, **QUICK).prior == 0.25
    for prior in ("ted", 1.5):
        with pytest.raises(ValueError, match="prior must be"):
            gpl.fit(example(), positive=2, prior=prior, **QUICK)


@pytest.mark.parametrize("form", ["data.pt", "dict.pt", "arrays.npz"])
def test_train_on_a_file(tmp_path, monkeypatch, capsys, form):
    d, path = example(), tmp_path / form
    d.labelled = (d.y == 2).nonzero().flatten()[:12]
    if form == "arrays.npz":
        np.savez(path, **{k: v.numpy() for k, v in d.to_dict().items()})
    else:
        torch.save(d if form == "data.pt" else d.to_dict(), path)
    out = tmp_path / "run"
    words = ["--graph", str(path), "--warmup", "4", "--epochs", "4", "--out", str(out)]
    if form == "dict.pt":  # the labels of U are known: scored
        call(monkeypatch, train, [*words, "--positive", "2"])
        assert "F1" in capsys.readouterr().out
    else:
        call(monkeypatch, train, words)
        told = capsys.readouterr().out
        assert "% of U called positive" in told and "F1" not in told
    metrics = json.loads((out / "seed0" / "record.json").read_text())["metrics"]
    assert ("f1" in metrics) == (form == "dict.pt") and 0 <= metrics["pi_hat"] <= 1
    lines = (out / "seed0" / "predictions.csv").read_text().splitlines()
    assert len(lines) == 81 and sum(line.endswith(",1,1") for line in lines) == 12
    call(monkeypatch, command, ["--run", str(out)])
    assert "record agrees" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words, expected",
    [
        (["--graph", "none.pt"], "no such file"),
        (["--graph", "my.csv"], "neither .pt nor .npz"),
        (["--graph", "{bad}"], "is damaged, or holds more than tensors"),
        (["--graph", "{good}"], "say which class"),
        (["--graph", "{good}", "--positive", "2", "--prior", "given"], "--pi"),
        (["--graph", "{good}", "--labelled", "few", "--method", "gcn-nnpu"], "true prior of this graph is not known"),
        (["--graph", "{good}", "--positive", "2", "--features", "binary"], "negative numbers"),
        (["--positive", "2"], "describe --graph"),
    ],
)
def test_user_errors(tmp_path, monkeypatch, capsys, words, expected):
    d = example()
    d.few = torch.tensor((d.y == 2).nonzero().flatten()[:12].tolist())
    torch.save(d, tmp_path / "good.pt")
    (tmp_path / "bad.pt").write_bytes(b"nothing")
    words = [w.format(good=tmp_path / "good.pt", bad=tmp_path / "bad.pt") for w in words]
    with pytest.raises(SystemExit) as stop:
        call(monkeypatch, train, [*words, "--out", str(tmp_path / "x")])
    told = capsys.readouterr().err.strip()
    assert stop.value.code == 2 and told.startswith("error: ") and expected in told and "\n" not in told


def test_the_snippet_of_the_readme_runs(tmp_path, monkeypatch, capsys):
    text = README.read_text()
    part = text[text.index("## In your own code") :]
    snippet = part[part.index("```python\n") + 10 :]
    snippet = snippet[: snippet.index("```")]
    assert len(snippet.splitlines()) <= 15
    torch.save(example().to_dict(), tmp_path / "my.pt")
    monkeypatch.chdir(tmp_path)
    exec(compile(snippet, "README", "exec"), {})
    assert "prior" in capsys.readouterr().out

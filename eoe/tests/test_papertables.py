"""Every table of the paper on made-up features with the shipped names: rows, averages, Ground Truth, CLIPN."""

import hashlib
import os
from pathlib import Path
from types import SimpleNamespace

from lab import runs
from lab.cells import read_printed
from lab.runs import UserError

import numpy as np
import pytest
import torch

import backbones
import data
import metrics
import papertables
import scores
from names import reading
from settings import EvalSettings

D = 8


def vector(text: str) -> torch.Tensor:
    seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big")
    return torch.randn(D, generator=torch.Generator().manual_seed(seed))


class FakeBackbone:
    known = backbones.KNOWN["clip-vit-b16"]
    cache: dict[str, torch.Tensor] = {}

    def encode_texts(self, texts):
        for t in texts:
            if t not in self.cache:
                self.cache[t] = vector(t)
        return torch.stack([self.cache[t] for t in texts])


def fake_set(name: str, root, download=False) -> data.ImageSet:
    names = [] if name in papertables.FAR[:2] or name in ("svhn", "lsun", "ssb_hard", "ninco") else ["fold", "mesa"]
    names = names if name in ("texture", "places") or not names else data.id_names(name)
    return data.ImageSet(name, list(range(12)), [0] * 12, names, hashlib.sha256(name.encode()).hexdigest(), "paper")


@pytest.fixture
def made_up(monkeypatch):
    monkeypatch.setattr(data, "load", fake_set)
    monkeypatch.setattr(os, "fsync", lambda file: None)  # thousands of small records
    monkeypatch.setattr(backbones, "load", lambda *a, **k: FakeBackbone())
    monkeypatch.setattr(backbones, "CachedTexts", lambda b: b)
    features = lambda b, s, *a: scores.normalise(torch.stack([vector(f"{s.name} {i}") for i in range(len(s))]))  # noqa: E731
    monkeypatch.setattr(backbones, "image_features", features)


def records(table: str, out: Path, **more) -> list[dict]:
    s = EvalSettings(table=table, labels="own", out=str(out), scale="paper", **more)
    run = runs.Run(out, s)
    papertables.run_table(s, run, 0, torch.device("cpu"))
    return run.finish()


NOT_OURS = ("CLIPN", "MOS(BiT)", "Fort et al.", "Energy(FT)", "MSP", "EOE(llm=")


@pytest.mark.parametrize(
    "table", [t for t in papertables.TABLES if t not in ("table14", "table15", "table16", "table17")]
)
def test_every_table_runs_with_the_shipped_names(table, made_up, tmp_path):
    found = records(table, tmp_path / "r")
    assert {r["table"] for r in found} == {f"own-{table}"}
    assert all(np.isfinite(list(r["metrics"].values())).all() for r in found)
    if table in ("table19", "table20", "table21", "table24"):  # run once for each model, or language model
        return
    printed = read_printed(runs.HERE / "paper.csv")
    printed = printed[(printed["table"] == table) & ~printed["method"].str.startswith(NOT_OURS)]
    wanted = {tuple(r) for r in printed[["dataset", "setting", "method"]].to_numpy()}
    made = {(r["dataset"], r["setting"], r["method"]) for r in found}
    assert wanted and wanted <= made, sorted(wanted - made)[:5]
    assert len(made) == len(found)  # no row twice


def test_averages_are_means_over_all_parts(made_up, tmp_path):
    found = {(r["dataset"], r["method"]): r["metrics"]["AUROC"] for r in records("table1", tmp_path / "r")}
    ids = ("CUB-200-2011", "Stanford-Cars", "Food-101", "Oxford-IIIT Pet")
    over_sets = [found[f"CUB-200-2011 vs {o}", "EOE"] for o in ("iNaturalist", "SUN", "Places", "Texture")]
    assert found["CUB-200-2011 vs average of its OOD sets", "EOE"] == pytest.approx(sum(over_sets) / 4)
    over_ids = [found[f"{i} vs Places", "Ground Truth"] for i in ids]
    assert found["Average of 4 ID sets vs Places", "Ground Truth"] == pytest.approx(sum(over_ids) / 4)
    # Ground Truth exists for two of the four OOD sets: no average over "its OOD sets".
    assert not [d for d, m in found if m == "Ground Truth" and "average of its" in d]


def test_longer_lists_contain_the_shorter_ones(made_up, tmp_path):
    found = [r for r in records("table8", tmp_path / "r") if r["method"] == "EOE" and "beta=0.25" in r["setting"]]
    found = [r for r in found if r["dataset"].startswith("ImageNet-10")]
    counts = {int(r["setting"].split("L=")[1].split("xK")[0]): r["metrics"]["labels"] for r in found}
    assert [*counts] == [1, 3, 10] and counts[1] < counts[3] < counts[10]
    for k in data.id_names("imagenet10"):
        names = reading.read_names(runs.HERE / "envisioned" / "imagenet10-near.json").groups[k]
        assert len({n.lower() for n in names}) == 10


def test_figure_7_is_drawn_from_its_records(made_up, tmp_path):
    import figures

    found = [r for t in ("a", "b", "c") for r in records(f"figure7{t}", tmp_path / t)]
    figure, _ = figures.numbers(found)
    ticks = [[int(x) for x in axis.get_xticks()] for axis in figure.axes]
    assert ticks == [[0, 100, 300, 500], [0, 1, 3, 10], [0, 100, 300, 500]]
    assert figures.numbers([]) is None


def test_clipn_rows(made_up, tmp_path):
    ids = data.id_names("pet18")
    g = torch.Generator().manual_seed(0)
    yes, no = (torch.randn(len(ids), D, generator=g) for _ in range(2))
    place = tmp_path / "clipn"
    for case in papertables.TABLES["table4"]:
        k = len(data.id_names(case.id))
        pair = (
            {"yes": yes, "no": no} if case.id == "pet18" else {w: torch.randn(k, D, generator=g) for w in ("yes", "no")}
        )
        runs.write_tensors(place / f"{case.id}.safetensors", pair)
    found = {(r["dataset"], r["method"]): r["metrics"] for r in records("table4", tmp_path / "r", clipn=str(place))}
    x, o = (scores.normalise(torch.stack([vector(f"{n} {i}") for i in range(12)])) for n in ("pet18", "pet18-ood"))
    value = []
    for images in (x, o):  # from the formulas, image by image
        for v in images.double():
            s = [[float(v @ (w / w.norm())) / 0.01 for w in t.double()] for t in (yes, no)]
            p = torch.tensor(s[0], dtype=torch.float64).softmax(0).tolist()
            q = [1 / (1 + np.exp(a - b)) for a, b in zip(*s, strict=True)]
            value.append(1 - q[int(np.argmax(p))])
    want = metrics.measure(value[:12], value[12:])["AUROC"]
    assert found["Oxford-Pet-18 vs Oxford-Pet-19", "CLIPN(competing-to-win)"]["AUROC"] == pytest.approx(want)
    assert ("Average", "CLIPN(agreeing-to-differ)") in found
    runs.write_tensors(place / "pet18.safetensors", {"yes": yes[:3], "no": no})
    with pytest.raises(UserError, match="`yes` is"):
        records("table4", tmp_path / "r2", clipn=str(place))


def test_names_file_that_is_missing_is_told(tmp_path):
    s = SimpleNamespace(labels="released", llm="nobody", data_dir=str(tmp_path))
    with pytest.raises(UserError, match="no envisioned names"):
        papertables.envisioned(s, papertables.TABLES["table3"][0], [], "resemble", 3, 0)

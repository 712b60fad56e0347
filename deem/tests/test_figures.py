"""Figures from records and files of runs; missing and damaged files cost their figure alone."""

import json

from lab import runs

import pytest
import torch
from test_paper_claims import record

import figures
from claims import BASE, CLEAN, DEEM


def answers():
    return {f"POPE_{k}_{m}": 55.0 for k in figures.POPE for m in ("accuracy", "yes_ratio")}


def folder(root, name, seed=0):
    place = root / "runs" / "demo" / name / f"seed{seed}"
    place.mkdir(parents=True)
    tensors = {"scenes": torch.rand(8, 16, 16), "drawn": torch.rand(8, 16, 16), "attention": torch.rand(8, 8, 4, 4)}
    runs.write_tensors(place / "pictures.safetensors", tensors)
    lines = [{"step": k, "ntp": 1 / k, "csr": 0.5, "nip": 0.2} for k in (20, 40)]
    (place / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines) + "{broken")
    return place


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "HERE", tmp_path)


def test_all_figures(tmp_path):
    rows = []
    for m, name in ((DEEM, "a"), (CLEAN, "b"), (BASE, "c")):
        folder(tmp_path, name)
        rows += [{**record(m, setting=s, **answers()), "run": name} for s in ("stage 1", "stage 2")]
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir(), two.mkdir()
    made = figures.draw(rows, one, "demo")
    names = [f"demo-{n}.png" for n in ("reconstructions", "attention", "pope", "losses")]
    assert [p.name for p, _ in made] == names and sorted(p.name for p in one.iterdir()) == sorted(names)
    assert all(p.stat().st_size > 2000 for p, _ in made)
    figures.draw(rows[::-1], two, "demo")  # the same records, in another order
    assert all((one / n).read_bytes() == (two / n).read_bytes() for n in names)


def test_nothing_to_draw(tmp_path):
    assert figures.draw([record("x", table="other")], tmp_path, "demo") == []


def test_damaged_pictures_do_not_stop_the_others(tmp_path, capsys):
    place = folder(tmp_path, "a")
    (place / "pictures.safetensors").write_bytes(b"no")
    made = figures.draw([{**record(DEEM, **answers()), "run": "a"}], tmp_path, "demo")
    assert [p.name for p, _ in made] == ["demo-pope.png", "demo-losses.png"] and "left out" in capsys.readouterr().out
